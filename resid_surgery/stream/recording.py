"""Recording: one traced forward of one prompt, as plain detached tensors.

A recording keeps, in the model's own dtype, everything that the stream at the predicting position t
is made of: the addends of every layer, pre-activations and coefficients, the attention row of t,
its query, and keys and values of all positions. ``positions="all"`` adds the addends of the stream
at every other position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import choice, message, whole
from resid_surgery._html import face_html
from resid_surgery.errors import ArgumentError, ClosureError, StaleRecordingError
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind, token_text
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.models.taps import Tap, TapName
from resid_surgery.models.tracing import forward
from resid_surgery.stream.records import (
    STREAM,
    AttentionRecord,
    LayerRecord,
    StreamRecord,
    layer_record,
    layer_taps,
    one_row,
    scaled,
)


@final
@dataclass(eq=False)
class Label:
    """Which weights a recording was made with.

    Attributes:
        fingerprint: full hash of the weights, as last known when it was made.
        token: what the quick look saw then. verified: a full hash taken since agreed.
        tree: which of the model's shadows ran (`OpenedModel.trees`); it has another when modules, hooks or settings
            changed.
        together: the prompts of the forward that it was made in, a row each. row: which is its own.
    """

    fingerprint: str
    token: tuple[Any, ...] | None
    verified: bool = False
    tree: int = 0
    together: tuple[BoundPrompt, ...] = ()
    row: int = 0


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Recording:
    """One pass of one prompt, detached; made by `resid_surgery.record`.

    Attributes:
        model: the opened model. prompt: the tokens used, target, competitors, position.
        label: of the weights that it was made with.
        layers: one `LayerRecord` a block, at the predicting position t.
        resid_final: (d_model,) the stream after the last block.
        bs_values: (vocabulary,) logits before a final soft-cap. logits: the model's own.
        stream: the addends at all positions, if recorded with ``positions="all"``.
    """

    model: OpenedModel
    prompt: BoundPrompt
    label: Label
    layers: tuple[LayerRecord, ...]
    resid_final: Float[Tensor, " d_model"]
    bs_values: Float[Tensor, " vocabulary"]
    logits: Float[Tensor, " vocabulary"]
    stream: StreamRecord | None = None

    def __repr__(self) -> str:
        p = self.prompt
        return (
            f"Recording({self.model.name}: {len(p.ids)} tokens {list(p.tokens)}, position {p.position}, "
            f"target {p.names[p.target]!r}, versus {[p.names[i] for i in p.versus]})"
        )

    def _repr_html_(self) -> str:
        return face_html(repr(self), pd.DataFrame(_predicted(self)))

    @property
    def fingerprint(self) -> str:
        """Of the weights that it was made with."""
        return self.label.fingerprint

    @property
    def n_positions(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt.ids)

    @property
    def embed(self) -> Float[Tensor, " d_model"]:
        """The embedding addend: the first block's input."""
        return self.layers[0].resid_pre

    def work(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype and on the device that the readout is computed with."""
        return self.model.work(tensor)

    def resid_mid(self, layer: int) -> Float[Tensor, " d_model"]:
        """What the MLP of `layer` reads: resid_pre + attn_out, or resid_pre in a parallel block."""
        record = self.layers[whole("layer", layer, -len(self.layers), len(self.layers) - 1)]
        pre = self.work(record.resid_pre)
        if self.model.block(layer).parallel:
            return pre
        return self.model.factor(layer, "attn_carry") * pre + self.work(record.attn_out)

    def reach(self, layer: int, part: str, until: tuple[int, str] | None = None) -> Tensor | float:
        """`reach` of its model."""
        return reach(self.model, layer, part, until)

    def require_fresh(self) -> None:
        """Refuse to be used on a model other than that which it was made with.

        A full hash of the weights is compared. Where a write to single elements through ``.data`` before the
        recording escaped the quick look, or modules, hooks or settings are others now (a hook that only looks on
        changes nothing), the forward is repeated and must agree bit for bit.

        Raises:
            StaleRecordingError: the model's weights, modules, hooks or settings changed since.
            ClosureError: with them, its stream is no ledger any more.
        """
        model, label = self.model, self.label
        with model.lock:
            model.shadow  # noqa: B018  (made anew if need be)
            now, tree = model.fingerprint(), model.trees
        if now != label.fingerprint:
            # perhaps the change came before the recording, too small for the quick look to see it
            early = not label.verified and label.token == model.weights.quick_token() and self._reproduces()
            if not early:
                raise StaleRecordingError(
                    f"this recording of {model.name} was made with weights {label.fingerprint[:12]}, but the model "
                    f"now has {now[:12]}: its weights changed since. Record the prompt again."
                )
        elif tree != label.tree and not self._reproduces():
            raise StaleRecordingError(
                f"this recording of {model.name} is not what the model computes now: modules, hooks or settings of "
                "it (an adapter that was switched, say) changed since. Record the prompt again."
            )
        label.fingerprint, label.tree, label.verified = now, tree, True

    def _reproduces(self) -> bool:
        """Whether the model, as it is now, computes this recording bit for bit: in a forward of the same rows, since
        a product over several rows is rounded otherwise than over one."""
        rows = [replace(one, position=self.prompt.position) for one in self.label.together] or [self.prompt]
        again = record_rows(self.model, rows, every=self.stream is not None)[self.label.row]
        return all(torch.equal(a, b) for a, b in zip(again.tensors(), self.tensors(), strict=True))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        for layer in self.layers:
            yield from (layer.resid_pre, layer.attn_out, layer.attn_raw, layer.mlp_out, layer.mlp_raw)
            one = layer.attention
            held = () if one is None else (one.query, one.key, one.value, one.z, one.gate, one.alpha)
            yield from (tensor for tensor in held if tensor is not None)
            for group in layer.groups:
                yield from (group.coefficient, *group.pre_activations)
        yield from (self.resid_final, self.bs_values, self.logits)
        if self.stream is not None:
            yield from (self.stream.resid_pre, self.stream.attn_out, self.stream.mlp_out)


def _predicted(rec: Recording) -> list[dict[str, Any]]:
    """What the model predicted when it was recorded: its best five tokens, target and competitors."""
    log_p = torch.log_softmax(rec.work(rec.logits), -1)
    said = dict.fromkeys(log_p.topk(min(5, len(log_p))).indices.tolist(), "top")
    said |= {i: role for i, _, role in rec.prompt.roles()}
    rows = [{"rank": 1 + int((log_p > log_p[i]).sum()), "token": token_text(i, rec.model.tokenizer), "role": role,
             "prob": float(log_p[i].exp()), "log_prob": float(log_p[i])} for i, role in said.items()]  # fmt: skip
    return sorted(rows, key=lambda row: row["rank"])


def reach(model: OpenedModel, layer: int, part: str, until: tuple[int, str] | None = None) -> Tensor | float:
    """What later blocks multiply an addend by (1 in most families), up to a state.

    Args:
        model: whose blocks. layer, part: after which writer, or (0, "pre") for the embedding.
        until: before what (layer, "attn" | "mlp") reads; None for the final stream.
    """
    total: Tensor | float = 1.0
    if model.anatomy.carries:
        for at, reader in _carried(model, layer, part):
            if (at, reader) == until:
                break
            row = model.block(at)
            if reader == "mlp" or not row.parallel:
                total = total * model.factor(at, f"{reader}_carry")
    return total


def _carried(model: OpenedModel, layer: int, part: str) -> Iterator[tuple[int, str]]:
    """The writers that come after one, in order: each multiplies what is there by its carry."""
    if part == "pre":
        yield layer, "attn"
    if part != "mlp":
        parallel = model.block(layer).parallel and part == "attn"
        if not parallel:  # both are added after the carry of a parallel block
            yield layer, "mlp"
    for later in range(layer + 1, model.anatomy.n_layers):
        yield later, "attn"
        yield later, "mlp"


@remotely
def record(
    model: OpenedModel, prompt: Prompt, *, positions: Literal["target", "all"] = "target", remote: Where = None
) -> Recording:
    """Record one forward of a prompt (paper: the residual stream and all of its vectors).

    Args:
        model: from `resid_surgery.load`.
        prompt: a `Prompt`; bound to the model's tokenizer here.
        positions: "target" keeps every addend at the predicting position, and keys and values of
            all; "all" adds the stream's addends at every position.
        remote: where the forward runs: None (here), "local" (a rehearsal here), True (NDIF), or a server's address.

    Returns:
        A `Recording` of detached tensors with no ties to the forward.

    Raises:
        PromptError: the prompt cannot be used. ArgumentError: unknown `positions` or `remote`.
        UnsupportedModelError: no server knows the model by a name. RunError: a remote run failed.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3 (residual stream as a sum of vectors).
    """
    need_model(model)
    choice("positions", positions, ("target", "all"))
    bound = bind(prompt, model.tokenizer, model)
    return record_bound(model, bound, every=positions == "all")


def record_bound(model: OpenedModel, bound: BoundPrompt, *, every: bool) -> Recording:
    """Record a bound prompt; `every` keeps the stream at all positions."""
    return record_rows(model, [bound], every=every)[0]


def record_rows(model: OpenedModel, bound: Sequence[BoundPrompt], *, every: bool) -> list[Recording]:
    """Record bound prompts of one length and one predicting position as the rows of one forward.

    Whether the model computes a row as it would alone is the caller's to know; see `grouping.record_group`.
    """
    fingerprint, token = model.known_fingerprint(), model.weights.token
    ids = torch.tensor([one.ids for one in bound], device=model.shadow.get_input_embeddings().weight.device)  # type: ignore[operator]
    everywhere = [Tap(name, i) for i in range(model.anatomy.n_layers) for name in STREAM] if every else []
    values = forward(model, ids, record_taps(model), at=bound[0].position, everywhere=everywhere)
    together, recs = tuple(bound), []
    for row, one in enumerate(bound):
        label = Label(fingerprint, token, tree=model.trees, together=together, row=row)
        recs.append(from_values(model, one, values, label, every=every, row=row))
        require_closed(recs[-1])
    return recs


def require_closed(rec: Recording) -> None:
    """Refuse a recording whose stream or heads do not sum (a hook that changes the model, say).

    Raises:
        ClosureError: the identity and the error are named.
    """
    a, most = rec.model.anatomy, closure_tolerance(rec.model)
    states = [rec.work(one.resid_pre) for one in rec.layers] + [rec.work(rec.resid_final)]
    sums = torch.stack([left_by(rec, layer) for layer in range(a.n_layers)])
    posts = torch.stack(states[1:])
    size = max(1e-30, float(torch.stack([sums.abs().max(), posts.abs().max(), states[0].abs().max()]).max()))
    stream = float((sums - posts).abs().max()) / size
    heads = max((_head_error(one.attention) for one in rec.layers if one.attention is not None), default=0.0)
    for identity, error in (("resid_pre + attn_out + mlp_out = resid_post", stream), ("sum of alpha v = heads", heads)):
        if not error <= most:
            raise ClosureError(
                f"this recording of {rec.model.name} is refused: '{identity}' fails with relative error {error:.2g}, "
                f"allowed {most:.2g}. The model closed when it was loaded: does a hook change it, or an attention "
                "implementation use a mask that it does not pass on?"
            )


def left_by(rec: Recording, layer: int) -> Float[Tensor, " d_model"]:
    """resid_post of a layer from its parts: carries times the state, plus what was added."""
    record, factor = rec.layers[layer], rec.model.factor
    attn, mlp = rec.work(record.attn_out), rec.work(record.mlp_out)
    base = rec.resid_mid(layer)
    return factor(layer, "mlp_carry") * base + (attn + mlp if rec.model.block(layer).parallel else mlp)


def _head_error(one: AttentionRecord) -> float:
    """|gate * sum of alpha v - z| over the largest value."""
    value = one.value.to(one.alpha)
    per_group = one.alpha.view(value.shape[0], -1, value.shape[1])
    z = (per_group @ value).flatten(0, 1)
    if one.gate is not None:
        z, value = z * one.gate, torch.stack([value.abs().max() * one.gate.abs().max()])
    return float((z - one.z.to(z)).abs().max()) / max(1e-30, float(value.abs().max()))


def closure_tolerance(model: OpenedModel, *, through_float32: bool = True) -> float:
    """Largest accepted error relative to the largest addend, by dtype.

    float64: 1e-10, or 1e-6 through a module that transformers computes in float32 (its RMSNorm
    and softmax are); float32: 1e-5; bfloat16 and float16: 4 eps.
    """
    if model.dtype == torch.float64:
        return 1e-6 if through_float32 else 1e-10
    return 1e-5 if model.dtype == torch.float32 else 4 * torch.finfo(model.dtype).eps


def record_taps(model: OpenedModel) -> list[Tap]:
    """The taps that a recording reads."""
    a = model.anatomy
    taps = [tap for layer in range(a.n_layers) for tap in layer_taps(model, layer)]
    return [*taps, Tap("block_out", a.n_layers - 1), Tap("bs"), Tap("logits")]


def from_values(
    model: OpenedModel, bound: BoundPrompt, values: Values, label: Label, *, every: bool, row: int = 0
) -> Recording:
    """A recording of one row of a traced forward; it holds no memory of another row's."""
    a, t = model.anatomy, bound.position
    values = one_row(values, row)
    layers = [layer_record(model, layer, values, 0, t, t if every else 0) for layer in range(a.n_layers)]
    stream = None
    if every:
        stack = {
            n: torch.stack([_every(model, values, n, i).to(model.device) for i in range(a.n_layers)]) for n in STREAM
        }
        stream = StreamRecord(resid_pre=stack["block_in"], attn_out=stack["attn_add"], mlp_out=stack["mlp_add"])
    scale = model.anatomy.layout.logit_scale
    bs = values[Tap("bs")][0, 0]
    return Recording(
        model=model,
        prompt=bound,
        label=label,
        layers=tuple(layers),
        resid_final=values[Tap("block_out", a.n_layers - 1)][0, 0],
        bs_values=bs if scale == 1.0 else bs * scale,
        logits=values[Tap("logits")][0, 0],
        stream=stream,
    )


def _every(model: OpenedModel, values: Values, name: TapName, layer: int) -> Tensor:
    """What a writer adds, or the state, at every position."""
    found = values.get(Tap(name, layer))
    if found is None:
        return torch.zeros_like(values[Tap("block_in", layer)][0])
    return found[0] if name == "block_in" else scaled(model, layer, name.removesuffix("_add"), found[0])


def refuse_surroundings() -> None:
    """Refuse to compute where torch.autocast would round every product behind our back, or where new tensors would
    lie on a device that nobody named.

    Raises:
        ArgumentError: torch.autocast is on, or the default device is not the CPU.
    """
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if on:
        raise ArgumentError(f"torch.autocast is on for {on[0]}: sums would not close. Leave it, or load with dtype=.")
    place = torch.empty(0).device
    if place.type != "cpu":
        raise ArgumentError(
            f"torch's default device is {place}: tensors of this library would be made there. Set it back with "
            "torch.set_default_device(None); a model may lie anywhere (load with device=)."
        )


def need_model(model: Any) -> None:
    """Refuse anything but an opened model, with the way to get one."""
    refuse_surroundings()
    if not isinstance(model, OpenedModel):
        raise ArgumentError(message("model", "a model from resid_surgery.load", model, do="Call rs.load(...) first."))


def need_recording(rec: Any) -> None:
    """Refuse anything but a fresh recording."""
    be_recording(rec)
    refuse_surroundings()
    rec.require_fresh()


def be_recording(rec: Any, name: str = "rec") -> None:
    """Refuse what is no recording; whether it is fresh is not looked at."""
    if not isinstance(rec, Recording):
        raise ArgumentError(message(name, "a recording from resid_surgery.record", rec))

"""Recording: one traced forward of one prompt, as plain detached tensors.

A recording keeps, in the model's own dtype, everything that the stream at the predicting position t
is made of: the addends of every layer, pre-activations and coefficients, the attention row of t,
its query, and keys and values of all positions. ``positions="all"`` adds the addends of the stream
at every other position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import choice, message
from resid_surgery.errors import ArgumentError, ClosureError, StaleRecordingError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind
from resid_surgery.models.tracing import AttentionCall, Tap, TapName, Values, forward


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LayerRecord:
    """One block at the predicting position t, in the model's dtype.

    Attributes:
        resid_pre: (d_model,) the block's input (paper: L_in).
        attn_out, mlp_out: (d_model,) what is added (paper: ATTN, FFN), after any post-norm.
        attn_raw, mlp_raw: (d_model,) what W_O and the down-projection write; equal to the former
            where there is no post-norm.
        pre_activations: one (d_mlp,) per key. coefficient: (d_mlp,) (paper: coefficient score m).
        query: (head, d_head). key, value: (kv_head, source, d_head).
        z: (head, d_head) the heads' outputs before W_O.
        alpha: (head, source) effective attention weights of t, in float32 or better.
    """

    resid_pre: Float[Tensor, " d_model"]
    attn_out: Float[Tensor, " d_model"]
    attn_raw: Float[Tensor, " d_model"]
    mlp_out: Float[Tensor, " d_model"]
    mlp_raw: Float[Tensor, " d_model"]
    pre_activations: tuple[Float[Tensor, " d_mlp"], ...]
    coefficient: Float[Tensor, " d_mlp"]
    query: Float[Tensor, "head d_head"]
    key: Float[Tensor, "kv source d_head"]
    value: Float[Tensor, "kv source d_head"]
    z: Float[Tensor, "head d_head"]
    alpha: Float[Tensor, "head source"]


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class StreamRecord:
    """The stream's addends at every position: each (layer, position, d_model)."""

    resid_pre: Float[Tensor, "layer position d_model"]
    attn_out: Float[Tensor, "layer position d_model"]
    mlp_out: Float[Tensor, "layer position d_model"]


@final
@dataclass(eq=False)
class Label:
    """Which weights a recording was made with.

    Attributes:
        fingerprint: full hash of the weights, as last known when it was made.
        token: what the quick look saw then. verified: a full hash taken since agreed.
    """

    fingerprint: str
    token: tuple[Any, ...] | None
    verified: bool = False


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
        return tensor.to(self.model.device, self.model.work_dtype)

    def resid_mid(self, layer: int) -> Float[Tensor, " d_model"]:
        """What the MLP of `layer` reads: resid_pre + attn_out, or resid_pre in a parallel block."""
        record = self.layers[layer]
        pre = self.work(record.resid_pre)
        return pre if self.model.anatomy.parallel else pre + self.work(record.attn_out)

    def require_fresh(self) -> None:
        """Refuse to be used on weights other than those that it was made with.

        A full hash is compared. Where a write to single elements through ``.data`` before the
        recording escaped the quick look, the forward is repeated and must agree bit for bit.

        Raises:
            StaleRecordingError: the model's weights changed since.
        """
        now = self.model.fingerprint()
        if now == self.fingerprint:
            self.label.verified = True
            return
        if not self.label.verified and self.label.token == self.model.weights.quick_token() and self._reproduces():
            # the change came before the recording, too small for the quick look to see it
            self.label.fingerprint, self.label.verified = now, True
            return
        raise StaleRecordingError(
            f"this recording of {self.model.name} was made with weights {self.fingerprint[:12]}, but the model now "
            f"has {now[:12]}: its weights changed since. Record the prompt again."
        )

    def _reproduces(self) -> bool:
        """Whether the model, as it is now, computes this recording bit for bit."""
        again = record_bound(self.model, self.prompt, every=self.stream is not None)
        return all(torch.equal(a, b) for a, b in zip(again.tensors(), self.tensors(), strict=True))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        for layer in self.layers:
            for name in ("resid_pre", "attn_out", "attn_raw", "mlp_out", "mlp_raw", "coefficient", "query", "key"):
                yield getattr(layer, name)
            yield from (layer.value, layer.z, layer.alpha, *layer.pre_activations)
        yield from (self.resid_final, self.bs_values, self.logits)
        if self.stream is not None:
            yield from (self.stream.resid_pre, self.stream.attn_out, self.stream.mlp_out)


def record(model: OpenedModel, prompt: Prompt, *, positions: Literal["target", "all"] = "target") -> Recording:
    """Record one forward of a prompt (paper: the residual stream and all of its vectors).

    Args:
        model: from `resid_surgery.load`.
        prompt: a `Prompt`; bound to the model's tokenizer here.
        positions: "target" keeps every addend at the predicting position, and keys and values of
            all; "all" adds the stream's addends at every position.

    Returns:
        A `Recording` of detached tensors with no ties to the forward.

    Raises:
        PromptError: the prompt cannot be used. ArgumentError: unknown `positions`.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3 (residual stream as a sum of vectors).
    """
    need_model(model)
    choice("positions", positions, ("target", "all"))
    bound = bind(prompt, model.tokenizer, model)
    return record_bound(model, bound, every=positions == "all")


def record_bound(model: OpenedModel, bound: BoundPrompt, *, every: bool) -> Recording:
    """Record a bound prompt; `every` keeps the stream at all positions."""
    fingerprint = model.known_fingerprint()
    label = Label(fingerprint, model.weights.token)
    ids = torch.tensor([bound.ids], device=model.shadow.get_input_embeddings().weight.device)  # type: ignore[operator]
    everywhere = [Tap(name, i) for i in range(model.anatomy.n_layers) for name in _STREAM] if every else []
    values = forward(model, ids, record_taps(model), at=bound.position, everywhere=everywhere)
    rec = from_values(model, bound, values, label, every=every)
    require_closed(rec)
    return rec


def require_closed(rec: Recording) -> None:
    """Refuse a recording whose stream or heads do not sum (a hook that changes the model, say).

    Raises:
        ClosureError: the identity and the error are named.
    """
    layers, most = rec.layers, closure_tolerance(rec.model)
    pre = torch.stack([rec.work(one.resid_pre) for one in layers])
    added = torch.stack([rec.work(one.attn_out) + rec.work(one.mlp_out) for one in layers])
    post = torch.cat([pre[1:], rec.work(rec.resid_final)[None]])
    size = max(1e-30, float(torch.stack([pre.abs().max(), added.abs().max(), post.abs().max()]).max()))
    stream = float((pre + added - post).abs().max()) / size
    heads = max(_head_error(one) for one in layers)
    for identity, error in (("resid_pre + attn_out + mlp_out = resid_post", stream), ("sum of alpha v = heads", heads)):
        if not error <= most:
            raise ClosureError(
                f"this recording of {rec.model.name} is refused: '{identity}' fails with relative error {error:.2g}, "
                f"allowed {most:.2g}. The model closed when it was loaded: does a hook change it, or an attention "
                "implementation use a mask that it does not pass on?"
            )


def _head_error(layer: LayerRecord) -> float:
    """|sum of alpha v - z| over the largest value."""
    value = layer.value.to(layer.alpha)
    per_group = layer.alpha.view(value.shape[0], -1, value.shape[1])
    z = (per_group @ value).flatten(0, 1)
    return float((z - layer.z.to(z)).abs().max()) / max(1e-30, float(value.abs().max()))


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
    names: list[TapName] = ["block_in", "attn_call", "attn_z", "attn_add", "key0", "coef", "mlp_add"]
    if a.gated:
        names.append("key1")
    if model.has("attn_post_norm"):
        names.append("attn_raw")
    if model.has("mlp_post_norm"):
        names.append("mlp_raw")
    taps = [Tap(name, layer) for layer in range(a.n_layers) for name in names]
    return [*taps, Tap("block_out", a.n_layers - 1), Tap("bs"), Tap("logits")]


def from_values(model: OpenedModel, bound: BoundPrompt, values: Values, label: Label, *, every: bool) -> Recording:
    """A recording of a traced forward of one row."""
    a, t = model.anatomy, bound.position

    def at(name: TapName, layer: int) -> Tensor:
        value = values[Tap(name, layer)][0]
        # what was read at t alone already has its own storage
        return value[t].clone() if every and name in _STREAM else value[0]  # type: ignore[no-any-return]

    layers = []
    for layer in range(a.n_layers):
        call: AttentionCall = values[Tap("attn_call", layer)]
        attn_out, mlp_out = at("attn_add", layer), at("mlp_add", layer)
        layers.append(
            LayerRecord(
                resid_pre=at("block_in", layer),
                attn_out=attn_out,
                attn_raw=at("attn_raw", layer) if model.has("attn_post_norm") else attn_out,
                mlp_out=mlp_out,
                mlp_raw=at("mlp_raw", layer) if model.has("mlp_post_norm") else mlp_out,
                pre_activations=tuple(at(k, layer) for k in ("key0", "key1")[: len(a.key_names)]),  # type: ignore[arg-type]
                coefficient=at("coef", layer),
                query=call.query[0, :, t - call.first],
                key=call.key[0],
                value=call.value[0],
                z=at("attn_z", layer).view(a.n_heads, -1),
                alpha=attention_row(call, 0, t),
            )
        )
    stream = None
    if every:
        stack = {n: torch.stack([values[Tap(n, i)][0] for i in range(a.n_layers)]) for n in _STREAM}
        stream = StreamRecord(resid_pre=stack["block_in"], attn_out=stack["attn_add"], mlp_out=stack["mlp_add"])
    return Recording(
        model=model,
        prompt=bound,
        label=label,
        layers=tuple(layers),
        resid_final=at("block_out", a.n_layers - 1),
        bs_values=values[Tap("bs")][0, 0],
        logits=values[Tap("logits")][0, 0],
        stream=stream,
    )


_STREAM: tuple[TapName, ...] = ("block_in", "attn_add", "mlp_add")


def attention_row(call: AttentionCall, row: int, t: int) -> Float[Tensor, "head source"]:
    """Effective attention weights of position t, recomputed from the attention call's inputs.

    alpha[h, j] = softmax_j(cap(q[h,t] . k[h,j] * scaling) + mask[t,j]); works whatever attention
    implementation the model runs, so the slow one is never forced on it.
    """
    query, keys = call.query[row, :, t - call.first], call.key[row]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(work).view(keys.shape[0], -1, query.shape[-1])  # heads of a KV group together
    scores = (grouped @ keys.to(work).transpose(1, 2)).flatten(0, 1) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.mask is None:
        seen = torch.arange(scores.shape[1], device=scores.device) <= t
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        mask = call.mask[min(row, call.mask.shape[0] - 1), :, t - call.first, : scores.shape[1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(work)
    return torch.softmax(scores, -1)


def repeat_kv(kv: Float[Tensor, "kv *rest"], n_heads: int) -> Float[Tensor, "head *rest"]:
    """Grouped keys or values repeated so that head h has its own: head h uses group h // (H / KV)."""
    return kv if kv.shape[0] == n_heads else kv.repeat_interleave(n_heads // kv.shape[0], dim=0)


def need_model(model: Any) -> None:
    """Refuse anything but an opened model, with the way to get one."""
    if not isinstance(model, OpenedModel):
        raise ArgumentError(message("model", "a model from resid_surgery.load", model, do="Call rs.load(...) first."))


def need_recording(rec: Any) -> None:
    """Refuse anything but a fresh recording."""
    be_recording(rec)
    rec.require_fresh()


def be_recording(rec: Any, name: str = "rec") -> None:
    """Refuse what is no recording; whether it is fresh is not looked at."""
    if not isinstance(rec, Recording):
        raise ArgumentError(message(name, "a recording from resid_surgery.record", rec))

"""Closing: what must sum, measured on one forward of one model.

Every identity gives its largest error relative to the largest addend, and the tolerance that the
dtype allows. `resid_surgery.load` refuses a model for which one fails; `resid_surgery.check` shows
them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from resid_surgery.errors import ClosureError
from resid_surgery.models.envoys import Values
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt
from resid_surgery.models.taps import Tap, TapName
from resid_surgery.models.tracing import forward
from resid_surgery.stream.blocks import sum_of
from resid_surgery.stream.kinds import joint_parts, post_map
from resid_surgery.stream.recording import Label, Recording, closure_tolerance, from_values, left_by, record_taps
from resid_surgery.stream.records import NeuronGroup
from resid_surgery.stream.subvalues import addends, read_by
from resid_surgery.stream.vocabulary import Readout


@final
@dataclass(frozen=True)
class Closure:
    """One identity, measured.

    Attributes:
        line: line of the mathematics that it belongs to ("1".."11"). identity: in words.
        layer: the worst layer, or None. error: |left - right| / largest addend.
        tolerance: what the dtype allows.
    """

    line: str
    identity: str
    layer: int | None
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


def relative(left: Tensor, right: Tensor, *largest: Tensor) -> float:
    """max |left - right| over the largest magnitude of the sum's terms."""
    left, right = left.double(), right.double()
    size = max(1e-30, *(float(x.double().abs().max()) for x in (right, *largest) if x.numel()))
    return float((left - right).abs().max()) / size


def probe(model: OpenedModel) -> tuple[Recording, Values]:
    """A recording of a fixed short prompt, with the extra taps that the proof needs."""
    ids = tuple(model.probe_ids()[0].tolist())
    target = ids[0]
    bound = BoundPrompt(
        ids,
        tuple(f"#{i}" for i in ids),
        len(ids) - 1,
        target,
        (),
        {target: f"#{target}"},
        Prompt(ids=ids, target=target),
    )
    values = forward(model, model.probe_ids(), [*record_taps(model), *_proof_taps(model)], at=len(ids) - 1)
    return from_values(model, bound, values, Label(model.known_fingerprint(), model.weights.token), every=False), values


def _proof_taps(model: OpenedModel) -> Iterator[Tap]:
    for layer in range(model.anatomy.n_layers):
        row = model.block(layer)
        yield Tap("block_out", layer)
        if row.attn_kind != "none":
            yield Tap("attn_raw", layer)
        if row.attn_kind == "attention":
            yield Tap("attn_read", layer)
        if row.mlp_kind != "none":
            yield Tap("mlp_raw", layer)
            yield Tap("mlp_read", layer)


def closures(rec: Recording, values: Values) -> Iterator[Closure]:
    """Lines 1-4 and the pre-activations of line 8, each at its worst layer."""
    model, a = rec.model, rec.model.anatomy
    loose, tight = closure_tolerance(model), closure_tolerance(model, through_float32=False)
    for line, identity, check in (
        ("1", "carried resid_pre + attn_out + mlp_out = resid_post", _block),
        ("8", "norm of resid_mid (resid_pre in a parallel block) = what the MLP reads", _read),
        ("8", "norm of resid_pre = what attention reads", _attended),
        ("2", "sum of coefficient x w_out + bias = the down-projection's output", _neurons),
        ("3", "sum of alpha v over sources, gated = W_O's input", _sources),
        ("3", "sum of heads through W_O + bias = W_O's output", _heads),
        ("2", "post-norm and scale of the down-projection's output = mlp_out", _post_mlp),
        ("3", "post-norm and scale of W_O's output = attn_out", _post_attn),
        ("8", "keys read through the norm + bias = pre-activations", _keys),
        ("8", "activation of the pre-activations = coefficient", _coefficients),
    ):
        errors = [(check(rec, values, layer), layer) for layer in range(a.n_layers)]
        applies = [(error, layer) for error, layer in errors if error is not None]
        if applies:
            error, worst = max(applies, key=lambda e: (e[0] != e[0], e[0]))  # NaN is worst
            yield Closure(line, identity, worst, error, tight if check is _neurons and not a.mixture else loose)
    blocks = addends(rec)
    parts = torch.cat([b.all_vectors() for b in blocks])
    total = rec.work(rec.resid_final)
    yield Closure(
        "1", "sum of all addends = resid_post of the last block", None, relative(parts.sum(0), total, parts),
        loose if a.carries else tight,
    )  # fmt: skip
    fine = addends(rec, "subvalue")
    yield Closure("1-3", "sum of all subvalues and biases = resid_post of the last block", None,
                  relative(sum_of(fine), total, parts), loose)  # fmt: skip
    readout = Readout.of(rec)
    rows = readout.bs(parts)
    bs = rows.sum(0) + (0 if readout.constants is None else readout.constants)
    yield Closure("4", "sum of all rows' bs-values = logits before a soft-cap", None,
                  relative(bs, rec.bs_values, rows), loose)  # fmt: skip
    capped = readout.cap(rec.work(rec.bs_values))
    yield Closure("4", "soft-cap of the bs-values = the model's logits", None,
                  relative(capped, rec.work(rec.logits), rec.bs_values), loose)  # fmt: skip


def prove(model: OpenedModel) -> list[Closure]:
    """Measure the identities on one forward and refuse the model if one fails.

    Raises:
        ClosureError: an identity fails; it, the layer and the error are named.
    """
    rec, values = probe(model)
    calls = [value for tap, value in values.items() if tap.name == "attn_call"]
    unknown = {name for call in calls for name in call.extra}
    found = list(closures(rec, values))
    for one in found:
        if not one.holds:
            where = f" in layer {one.layer}" if one.layer is not None else ""
            hint = f" Its attention call has keywords unknown here: {', '.join(sorted(unknown))}." if unknown else ""
            raise ClosureError(
                f"{model.name} is refused: '{one.identity}' (line {one.line}) fails{where} with relative error "
                f"{one.error:.2g}, allowed {one.tolerance:.2g} in {str(model.dtype).removeprefix('torch.')}. "
                f"Its layout ({model.anatomy.layout.family}, {model.anatomy.matched}) does not describe it."
                f"{_suspect(model, one)}{hint}"
            )
    return found


def _suspect(model: OpenedModel, one: Closure) -> str:
    """The modules that the failed identity reads, as the place to look."""
    if one.layer is None:
        row = model.anatomy.layout
        return f" Look at {row.final_norm} and {row.unembed}."
    parts = {"1": ("attn_out", "attn", "mlp_out", "mlp"), "2": ("mlp_out", "experts", "mlp_post_norm"),
             "3": ("attn", "attn_out", "attn_post_norm"), "8": ("mlp_norm", "key0", "experts")}  # fmt: skip
    paths = [model.path(one.layer, part) for part in parts.get(one.line, ()) if model.has(one.layer, part)]
    return f" Look at {', '.join(paths)}." if paths else ""


def _at(rec: Recording, values: Values, name: TapName, layer: int) -> Tensor:
    return rec.work(values[Tap(name, layer)][0, 0])


def _block(rec: Recording, values: Values, layer: int) -> float:
    one = rec.layers[layer]
    parts = torch.stack([rec.work(x) for x in (one.resid_pre, one.attn_out, one.mlp_out)])
    return relative(left_by(rec, layer), _at(rec, values, "block_out", layer), parts)


def _read(rec: Recording, values: Values, layer: int) -> float | None:
    """What the MLP reads, against its norm of the state that it is added to."""
    if rec.model.block(layer).mlp_kind in ("none", "opaque"):
        return None
    made = rec.model.norm(layer, "mlp_norm")(read_by(rec, layer, "mlp"))
    return relative(made, _at(rec, values, "mlp_read", layer), made)


def _attended(rec: Recording, values: Values, layer: int) -> float | None:
    """What attention reads, against its norm of the block's input."""
    if rec.model.block(layer).attn_kind != "attention":
        return None
    made = rec.model.norm(layer, "attn_norm")(read_by(rec, layer, "attn"))
    return relative(made, _at(rec, values, "attn_read", layer), made)


def _neurons(rec: Recording, values: Values, layer: int) -> float | None:
    total, terms = torch.zeros_like(rec.work(rec.resid_final)), []
    for group in rec.layers[layer].groups:
        written = rec.model.group_rows(layer, group.expert)
        parts = rec.work(group.coefficient)[:, None] * rec.work(written.rows) * group.factor
        bias = 0 if written.bias is None else rec.work(written.bias) * group.factor
        total = total + parts.sum(0) + bias
        terms.append(parts.abs().max()[None])
    return relative(total, _at(rec, values, "mlp_raw", layer), *terms) if terms else None


def _sources(rec: Recording, values: Values, layer: int) -> float | None:
    one = rec.layers[layer].attention
    if one is None:
        return None
    parts = joint_parts(rec, layer)
    return relative(parts.sum(1), rec.work(one.z), parts)


def _heads(rec: Recording, values: Values, layer: int) -> float | None:
    one = rec.layers[layer].attention
    if one is None:
        return None
    written = rec.model.rows(layer, "attn_out")
    parts = rec.work(one.z).reshape(-1)[:, None] * rec.work(written.rows)
    bias = 0 if written.bias is None else rec.work(written.bias)
    return relative(parts.sum(0) + bias, _at(rec, values, "attn_raw", layer), parts)


def _post(rec: Recording, layer: int, part: str, raw: Tensor, added: Tensor) -> float:
    post = post_map(rec, layer, part)
    out = post.push(raw) + (0 if post.constant is None else post.constant)
    return relative(out, rec.work(added), rec.work(added))


def _post_mlp(rec: Recording, values: Values, layer: int) -> float | None:
    if rec.model.block(layer).mlp_kind == "none":
        return None
    return _post(rec, layer, "mlp", _at(rec, values, "mlp_raw", layer), rec.layers[layer].mlp_out)


def _post_attn(rec: Recording, values: Values, layer: int) -> float | None:
    if rec.model.block(layer).attn_kind == "none":
        return None
    return _post(rec, layer, "attn", _at(rec, values, "attn_raw", layer), rec.layers[layer].attn_out)


def _keys(rec: Recording, values: Values, layer: int) -> float | None:
    """The worst key of the worst group: its rows read N(state), each term counted."""
    worst = None
    read = rec.model.norm(layer, "mlp_norm")(read_by(rec, layer, "mlp"))
    for group in rec.layers[layer].groups:
        keys = rec.model.group_keys(layer, group.expert)
        for key, measured in zip(keys, group.pre_activations, strict=True):
            out = read @ rec.work(key.rows) + (0 if key.bias is None else rec.work(key.bias))
            largest = (read.abs().max() * rec.work(key.rows).abs().max())[None]
            worst = max(worst or 0.0, relative(out, rec.work(measured), largest))
    return worst


def _coefficients(rec: Recording, values: Values, layer: int) -> float | None:
    errors = [
        relative(rec.work(coefficient_from(rec.model, layer, group)), rec.work(group.coefficient))
        for group in rec.layers[layer].groups
        if group.pre_activations
    ]
    return max(errors, default=None)


def coefficient_from(
    model: OpenedModel,
    layer: int,
    group: NeuronGroup,
    pre_activations: tuple[Tensor, ...] | None = None,
    *,
    plain: bool = False,
) -> Tensor:
    """Coefficients from pre-activations (the group's own by default) through the MLP's own activation.

    act(gate) * up, or act(up); then, unless `plain`, the norm before the down-projection if there is one.
    """
    pre = group.pre_activations if pre_activations is None else pre_activations
    if isinstance(group.expert, int):
        return model.experts(layer).coefficient(pre)
    with GradKept(), torch.no_grad():
        out: Tensor = model.activation(layer, shared=group.expert == "shared")(pre[0])
        out = out * pre[1] if len(pre) == 2 else out
        if group.expert is None and not plain and model.has(layer, "coef_norm"):
            out = model.part(layer, "coef_norm")(out)
    return out

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
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt
from resid_surgery.models.tracing import AttentionCall, Tap, TapName, Values, forward
from resid_surgery.stream.recording import Label, Recording, closure_tolerance, from_values, record_taps
from resid_surgery.stream.subvalues import addends, joint_parts, post_map, state_of, sum_of
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
    n = min(6, model.context or 6)
    ids = tuple((7 + 13 * i * i) % model.vocab_size for i in range(n))
    target = ids[0]
    bound = BoundPrompt(
        ids, tuple(f"#{i}" for i in ids), n - 1, target, (), {target: f"#{target}"}, Prompt(ids=ids, target=target)
    )
    extra: tuple[TapName, ...] = ("attn_raw", "mlp_in", "mlp_read", "mlp_raw", "block_out")
    taps = record_taps(model) + [Tap(name, i) for i in range(model.anatomy.n_layers) for name in extra]
    device = model.module.get_input_embeddings().weight.device  # type: ignore[operator]
    values = forward(model, torch.tensor([ids], device=device), taps, at=n - 1)
    return from_values(model, bound, values, Label(model.known_fingerprint(), model.weights.token), every=False), values


def closures(rec: Recording, values: Values) -> Iterator[Closure]:
    """Lines 1-4 and the pre-activations of line 8, each at its worst layer."""
    model, a = rec.model, rec.model.anatomy
    loose, tight = closure_tolerance(model), closure_tolerance(model, through_float32=False)
    for line, identity, check in (
        ("1", "resid_mid is what the MLP's norm reads", _mid),
        ("1", "resid_pre + attn_out + mlp_out = resid_post", _block),
        ("2", "sum of coefficient x w_out + bias = the down-projection's output", _neurons),
        ("3", "sum of alpha v over sources = W_O's input", _sources),
        ("3", "sum of heads through W_O + bias = W_O's output", _heads),
        ("2", "post-norm of the down-projection = mlp_out", _post_mlp),
        ("3", "post-norm of W_O = attn_out", _post_attn),
        ("8", "keys read through the norm + bias = pre-activations", _keys),
        ("8", "activation of the pre-activations = coefficient", _coefficients),
    ):
        errors = [check(rec, values, layer) for layer in range(a.n_layers)]
        worst = max(range(a.n_layers), key=lambda i: (errors[i] != errors[i], errors[i]))  # NaN is worst
        yield Closure(line, identity, worst, errors[worst], tight if check is _neurons else loose)
    blocks = addends(rec)
    parts = torch.cat([b.all_vectors() for b in blocks])
    total = rec.work(rec.resid_final)
    yield Closure(
        "1", "sum of all addends = resid_post of the last block", None, relative(parts.sum(0), total, parts), tight
    )
    fine = addends(rec, "subvalue")
    yield Closure("1-3", "sum of all subvalues and biases = resid_post of the last block", None,
                  relative(sum_of(fine), total, parts), loose)  # fmt: skip
    readout = Readout.of(rec)
    rows = readout.bs(parts)
    bs = rows.sum(0) + (0 if readout.constants is None else readout.constants)
    yield Closure("4", "sum of all rows' bs-values = logits before a soft-cap", None,
                  relative(bs, rec.bs_values, rows), loose)  # fmt: skip
    yield Closure("4", "soft-cap of the bs-values = the model's logits", None,
                  relative(readout.cap(rec.work(rec.bs_values)), rec.logits, rec.bs_values), loose)  # fmt: skip


def prove(model: OpenedModel) -> list[Closure]:
    """Measure the identities on one forward and refuse the model if one fails.

    Raises:
        ClosureError: an identity fails; it, the layer and the error are named.
    """
    rec, values = probe(model)
    unknown = {name for i in range(model.anatomy.n_layers) for name in _call(values, i).extra}
    found = list(closures(rec, values))
    for one in found:
        if not one.holds:
            where = f" in layer {one.layer}" if one.layer is not None else ""
            hint = f" Its attention call has keywords unknown here: {', '.join(sorted(unknown))}." if unknown else ""
            raise ClosureError(
                f"{model.name} is refused: '{one.identity}' (line {one.line}) fails{where} with relative error "
                f"{one.error:.2g}, allowed {one.tolerance:.2g} in {str(model.dtype).removeprefix('torch.')}. "
                f"It was read by the {model.anatomy.layout.family} layout ({model.anatomy.matched}), "
                f"which does not describe it.{hint}"
            )
    return found


def _call(values: Values, layer: int) -> AttentionCall:
    return values[Tap("attn_call", layer)]  # type: ignore[no-any-return]


def _at(rec: Recording, values: Values, name: TapName, layer: int) -> Tensor:
    return rec.work(values[Tap(name, layer)][0, 0])


def _mid(rec: Recording, values: Values, layer: int) -> float:
    mid, addend = rec.resid_mid(layer), rec.work(rec.layers[layer].attn_out)
    return relative(mid, _at(rec, values, "mlp_in", layer), addend)


def _block(rec: Recording, values: Values, layer: int) -> float:
    one = rec.layers[layer]
    parts = torch.stack([rec.work(x) for x in (one.resid_pre, one.attn_out, one.mlp_out)])
    return relative(parts.sum(0), _at(rec, values, "block_out", layer), parts)


def _neurons(rec: Recording, values: Values, layer: int) -> float:
    written = rec.model.rows(layer, "mlp_out")
    parts = rec.work(rec.layers[layer].coefficient)[:, None] * rec.work(written.rows)
    bias = 0 if written.bias is None else rec.work(written.bias)
    return relative(parts.sum(0) + bias, _at(rec, values, "mlp_raw", layer), parts)


def _sources(rec: Recording, values: Values, layer: int) -> float:
    parts = joint_parts(rec, layer)
    return relative(parts.sum(1), rec.work(rec.layers[layer].z), parts)


def _heads(rec: Recording, values: Values, layer: int) -> float:
    written = rec.model.rows(layer, "attn_out")
    parts = rec.work(rec.layers[layer].z).reshape(-1)[:, None] * rec.work(written.rows)
    bias = 0 if written.bias is None else rec.work(written.bias)
    return relative(parts.sum(0) + bias, _at(rec, values, "attn_raw", layer), parts)


def _post(rec: Recording, layer: int, part: str, raw: Tensor, added: Tensor) -> float:
    post = post_map(rec, layer, part)
    out = post.push(raw) + (0 if post.constant is None else post.constant)
    return relative(out, rec.work(added), rec.work(added))


def _post_mlp(rec: Recording, values: Values, layer: int) -> float:
    return _post(rec, layer, "mlp", _at(rec, values, "mlp_raw", layer), rec.layers[layer].mlp_out)


def _post_attn(rec: Recording, values: Values, layer: int) -> float:
    return _post(rec, layer, "attn", _at(rec, values, "attn_raw", layer), rec.layers[layer].attn_out)


def _keys(rec: Recording, values: Values, layer: int) -> float:
    """The worst key: its rows read N(state), each term counted."""
    model, worst = rec.model, 0.0
    norm = model.norm(layer, "mlp_norm")
    read = norm(state_of(rec, layer, "mlp"))
    for i, measured in enumerate(rec.layers[layer].pre_activations):
        key = model.rows(layer, f"key{i}")
        out = read @ rec.work(key.rows) + (0 if key.bias is None else rec.work(key.bias))
        largest = (read.abs().max() * rec.work(key.rows).abs().max())[None]
        worst = max(worst, relative(out, rec.work(measured), largest))
    return worst


def _coefficients(rec: Recording, values: Values, layer: int) -> float:
    made = coefficient_from(rec.model, layer, rec.layers[layer].pre_activations)
    return relative(rec.work(made), rec.work(rec.layers[layer].coefficient))


def coefficient_from(model: OpenedModel, layer: int, pre_activations: tuple[Tensor, ...]) -> Tensor:
    """Coefficients from pre-activations through the MLP's own activation: act(gate) * up, or act(up)."""
    with torch.no_grad():
        out: Tensor = model.activation(layer)(pre_activations[0])
    return out * pre_activations[1] if len(pre_activations) == 2 else out

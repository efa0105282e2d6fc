"""Records: what one traced forward says about each block at the predicting position.

Everything is kept in the model's own dtype; weights, gates and factors in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import ClosureError
from resid_surgery.models.attention import AttentionCall, ExpertsCall
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap, TapName
from resid_surgery.models.tracing import mixing

STREAM: tuple[TapName, ...] = ("block_in", "attn_add", "mlp_add")


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class NeuronGroup:
    """Neurons that one down-projection writes at t: a dense MLP, one expert, or the shared expert.

    Attributes:
        expert: index of a routed expert, "shared", or None for a dense MLP.
        factor: what multiplies its output: router weight and the like; 1 for a dense MLP.
        pre_activations: one (neuron,) per key; empty where keys are not known.
        coefficient: (neuron,) input of the down-projection (paper: coefficient score m).
    """

    expert: int | Literal["shared"] | None
    factor: float
    pre_activations: tuple[Float[Tensor, " neuron"], ...]
    coefficient: Float[Tensor, " neuron"]

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of a neuron's keys, in order."""
        return {0: (), 1: ("up",), 2: ("gate", "up")}[len(self.pre_activations)]


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AttentionRecord:
    """Attention of one block at t.

    Attributes:
        query: (head, d_key), key: (kv_head, source, d_key), or None where the model gives only weights.
        value: (kv_head, source, d_head).
        z: (head, d_head) W_O's input. gate: (head, d_head) what multiplies each head's mixed value
            on the way there (a gate, a norm), or None for nothing.
        alpha: (head, source) effective attention weights of t, in float32 or better. from_scores: they
            are a softmax of query times key; else the model gave them.
    """

    query: Float[Tensor, "head d_key"] | None
    key: Float[Tensor, "kv source d_key"] | None
    value: Float[Tensor, "kv source d_head"]
    z: Float[Tensor, "head d_head"]
    gate: Float[Tensor, "head d_head"] | None
    alpha: Float[Tensor, "head source"]
    from_scores: bool


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LayerRecord:
    """One block at the predicting position t, in the model's dtype.

    Attributes:
        resid_pre: (d_model,) the block's input (paper: L_in).
        attn_out, mlp_out: (d_model,) what is added (paper: ATTN, FFN), after any post-norm and
            multiplier; zeros where the block has no such writer.
        attn_raw, mlp_raw: (d_model,) what W_O and the down-projection write.
        attention: of t, or None where the layer has no softmax attention.
        groups: the MLP's neurons that are active at t; empty where it has none.
    """

    resid_pre: Float[Tensor, " d_model"]
    attn_out: Float[Tensor, " d_model"]
    attn_raw: Float[Tensor, " d_model"]
    mlp_out: Float[Tensor, " d_model"]
    mlp_raw: Float[Tensor, " d_model"]
    attention: AttentionRecord | None
    groups: tuple[NeuronGroup, ...]

    def group(self, expert: int | str | None = None) -> NeuronGroup | None:
        """The neurons of one expert ("shared", or None for a dense MLP), if active at t."""
        return next((g for g in self.groups if g.expert == expert), None)


@final
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class StreamRecord:
    """The stream's addends at every position: each (layer, position, d_model)."""

    resid_pre: Float[Tensor, "layer position d_model"]
    attn_out: Float[Tensor, "layer position d_model"]
    mlp_out: Float[Tensor, "layer position d_model"]


def layer_taps(model: OpenedModel, layer: int) -> list[Tap]:
    """The taps of one layer that a recording reads."""
    row, names = model.block(layer), ["block_in"]
    if row.attn_kind == "attention":
        names += ["attn_call", "attn_z"] + ["attn_mix"] * row.gated
    if row.attn_kind != "none":
        names += ["attn_add"] + ["attn_raw"] * (row.attn_post_norm is not None)
    if row.mlp_kind == "neurons":
        names += ["coef", *(f"key{i}" for i in range(len(row.keys)))]
    if row.mlp_kind == "experts":
        names += ["experts_call"]
        if row.shared_out is not None:
            names += ["shared_coef", *(f"shared_key{i}" for i in range(len(row.shared_keys)))]
    if row.mlp_kind != "none":
        names += ["mlp_add"] + ["mlp_raw"] * (row.mlp_post_norm is not None)
    return [Tap(name, layer) for name in names]  # type: ignore[arg-type]


def scaled(model: OpenedModel, layer: int, part: str, added: Tensor) -> Tensor:
    """What a writer adds to the stream: its output times the block's scale."""
    scale = model.factor(layer, f"{part}_scale")
    return added if isinstance(scale, float) and scale == 1.0 else (added * scale).to(added.dtype)


def one_row(values: Values, row: int) -> Values:
    """One row of a traced forward of several, in tensors of its own: the others' memory is not held by it."""
    rows = len(next(value for value in values.values() if isinstance(value, Tensor)))
    return values if rows == 1 else {tap: _row_of(value, row) for tap, value in values.items()}


def _row_of(value: Tensor | AttentionCall | ExpertsCall, row: int) -> Tensor | AttentionCall | ExpertsCall:
    if isinstance(value, Tensor):
        return value[row : row + 1].clone()
    named = ("value", "query", "key", "weights", "mask") if isinstance(value, AttentionCall) else vars(value)
    held = {name: tensor for name in named if (tensor := getattr(value, name)) is not None}
    if "mask" in held and len(held["mask"]) == 1:  # one for every row
        held.pop("mask")
    return replace(value, **{name: tensor[row : row + 1].clone() for name, tensor in held.items()})


def layer_record(model: OpenedModel, layer: int, values: Values, r: int, t: int, stream_at: int = 0) -> LayerRecord:
    """One layer of row r of a traced forward, read at t (`stream_at` where all positions were kept)."""
    row = model.block(layer)

    def at(name: TapName) -> Tensor:
        value = values[Tap(name, layer)][r]
        return value[stream_at].clone() if name in STREAM and len(value) > 1 else value[0]  # type: ignore[no-any-return]

    pre = at("block_in")
    nothing = torch.zeros_like(pre)
    added = {part: at(f"{part}_add") if kind != "none" else nothing  # type: ignore[arg-type]
             for part, kind in (("attn", row.attn_kind), ("mlp", row.mlp_kind))}  # fmt: skip
    raw = {part: at(f"{part}_raw") if post else added[part]  # type: ignore[arg-type]
           for part, post in (("attn", row.attn_post_norm), ("mlp", row.mlp_post_norm))}  # fmt: skip
    return LayerRecord(
        resid_pre=pre,
        attn_out=scaled(model, layer, "attn", added["attn"]),
        attn_raw=raw["attn"],
        mlp_out=scaled(model, layer, "mlp", added["mlp"]),
        mlp_raw=raw["mlp"],
        attention=attention_record(model, layer, values, r, t) if row.attn_kind == "attention" else None,
        groups=tuple(neuron_groups(model, layer, values, r)),
    )


def attention_record(model: OpenedModel, layer: int, values: Values, r: int, t: int) -> AttentionRecord:
    """Attention of row r at t."""
    call: AttentionCall = values[Tap("attn_call", layer)]
    size = model.anatomy.sizes[layer]
    z = values[Tap("attn_z", layer)][r, 0].view(size.n_heads, size.d_head)
    mix = values[Tap("attn_mix", layer)][r, 0] if model.block(layer).gated else None
    return AttentionRecord(
        query=None if call.query is None else call.query[r, :, call.queries([t])[0]],
        key=None if call.key is None else call.key[r],
        value=call.value[r],
        z=z,
        gate=None if mix is None else gate_between(mix, z),
        alpha=attention_row(call, r, t),
        from_scores=call.from_scores,
    )


def gate_between(mix: Float[Tensor, "*n"], z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """What multiplies the mixed values elementwise before W_O: z / mix, in float32 or better.

    Both are what the model computed, so the ratio is exact to rounding; 0 where nothing came out.
    """
    work = torch.float64 if z.dtype == torch.float64 else torch.float32
    below = mix.to(work)
    return torch.where(below == 0, torch.zeros_like(below), z.to(work) / torch.where(below == 0, 1.0, below))


def neuron_groups(model: OpenedModel, layer: int, values: Values, r: int) -> Iterator[NeuronGroup]:
    """The neurons of a layer's MLP that are active in row r."""
    row = model.block(layer)

    def at(name: str) -> Tensor:
        return values[Tap(name, layer)][r, 0]  # type: ignore[arg-type,no-any-return]

    if row.mlp_kind == "neurons":
        keys = tuple(at(f"key{i}") for i in range(len(row.keys)))
        yield NeuronGroup(expert=None, factor=1.0, pre_activations=keys, coefficient=at("coef"))
    if row.mlp_kind != "experts":
        return
    call: ExpertsCall = values[Tap("experts_call", layer)]
    states, experts = call.states[r, 0], model.experts(layer)
    (routed,), (shared,) = mixing(model, layer, states[None])
    weights: dict[int, float] = {}
    for expert, weight in zip(call.index[r, 0].tolist(), call.weight[r, 0].tolist(), strict=True):
        if expert < experts.count:  # beyond: a slot that no expert fills
            weights[expert] = weights.get(expert, 0.0) + weight
    for expert, weight in weights.items():
        pre = experts.pre_activations(states, expert)
        yield NeuronGroup(expert=expert, factor=routed * weight, pre_activations=pre,
                          coefficient=experts.coefficient(pre))  # fmt: skip
    if row.shared_out:
        keys = tuple(at(f"shared_key{i}") for i in range(len(row.shared_keys)))
        yield NeuronGroup(expert="shared", factor=shared, pre_activations=keys, coefficient=at("shared_coef"))


def attention_row(call: AttentionCall, row: int, t: int) -> Float[Tensor, "head source"]:
    """`attention_rows` of one position."""
    return attention_rows(call, row, [t])[0]


def attention_rows(
    call: AttentionCall, row: int, at: Sequence[int], query: Tensor | None = None, key: Tensor | None = None
) -> Float[Tensor, "n head source"]:
    """Effective attention weights of some positions, recomputed from the attention call's inputs.

    alpha[h, j] = softmax_j(cap(q[h,t] . k[h,j] * scaling) + mask[t,j]); works whatever attention
    implementation the model runs, so the slow one is never forced on it. Sinks are one more column of
    the softmax that is dropped afterwards: the weights then sum to less than 1.

    Args:
        call: an attention call. row: of its batch. at: which positions.
        query, key: instead of the call's: (head, n, d_key) and (kv_head or head, source, d_key).
    """
    work = torch.float64 if call.value.dtype == torch.float64 else torch.float32
    places = call.queries(at)
    if call.weights is not None:
        return call.weights[row][:, places].transpose(0, 1).to(work)
    if call.query is None or call.key is None:
        raise ClosureError("attention was read without weights and without queries and keys.")
    queries = call.query[row][:, places] if query is None else query
    keys = call.key[row] if key is None else key
    n_heads, n, width = queries.shape
    grouped = queries.to(work).reshape(keys.shape[0], -1, width)  # heads of a KV group together
    scores = (grouped @ keys.to(work).transpose(1, 2)).view(n_heads, n, -1) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.mask is None:
        # positions of a call that continues a cache are counted from its first query
        past = call.key.shape[2] - call.query.shape[2] if call.positions is None and call.key is not None else 0
        last = torch.tensor(at, device=scores.device)[:, None] + past
        seen = torch.arange(scores.shape[-1], device=scores.device) <= last
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        mask = call.mask[min(row, call.mask.shape[0] - 1)][:, places, : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(work)
    if call.sinks is not None:  # they take weight and give no value
        sinks = call.sinks.to(work).reshape(-1, 1, 1).expand(-1, n, 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].transpose(0, 1)
    return torch.softmax(scores, -1).transpose(0, 1)


def repeat_kv(kv: Float[Tensor, "kv *rest"], n_heads: int) -> Float[Tensor, "head *rest"]:
    """Grouped keys or values repeated so that head h has its own: head h uses group h // (H / KV)."""
    return kv if kv.shape[0] == n_heads else kv.repeat_interleave(n_heads // kv.shape[0], dim=0)

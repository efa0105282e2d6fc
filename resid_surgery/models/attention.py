"""Attention calls: what a model passes to its attention, in one form for every family.

Where a model's attention goes through transformers' interface its queries, keys, mask and factors
are kept, and the weights are recomputed from them for the one position that is wanted. Elsewhere
the weights themselves are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery.errors import UnsupportedModelError

_INTERFACE = ("module", "query", "key", "value", "attention_mask", "scaling")
_NAMES = {
    "interface": _INTERFACE,
    "weights": ("query", "key", "value", "attention_mask"),
    "sdpa": ("query", "key", "value", "attn_mask"),
}
_HARMLESS = {
    "dropout",
    "dropout_p",
    "position_ids",
    "use_cache",
    "is_causal",
    "sliding_window",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
_KNOWN = {*_INTERFACE, "attn_mask", "softcap", "s_aux", *_HARMLESS}


@final
@dataclass(frozen=True)
class AttentionCall:
    """Inputs of one attention call, as the model passed them.

    Attributes:
        value: (row, kv_head, position, d_head).
        query: (row, head, query position, d_key), key: (row, kv_head, position, d_key), or None where
            only the weights are to be had.
        weights: (row, head, query position, position) the weights as the model computed them, or
            None where they are recomputed from query and key.
        mask: (row or 1, 1 or head, query position, key position) additive or boolean, or None.
        positions: which positions the queries are of; None for all.
        scaling, softcap: factor and cap of the scores. sinks: (head,) a score that takes weight
            and gives no value, or None. extra: keywords with no known meaning here.
    """

    value: Tensor
    query: Tensor | None
    key: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    positions: tuple[int, ...] | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    extra: tuple[str, ...]

    @property
    def from_scores(self) -> bool:
        """Whether the weights are a softmax of query and key as given here."""
        return self.weights is None and self.query is not None and self.key is not None

    def queries(self, positions: Sequence[int]) -> list[int]:
        """Where the queries of some positions are."""
        return list(positions) if self.positions is None else [self.positions.index(p) for p in positions]


@final
@dataclass(frozen=True)
class ExpertsCall:
    """What a layer's routed experts were called with.

    Attributes:
        states: (row, position, d_model). index: (row, position, k) experts.
        weight: (row, position, k) router weights.
    """

    states: Tensor
    index: Tensor
    weight: Tensor


def attention_call(kind: str, value: Any, rows: int, at: list[int] | None, *, attached: bool = False) -> AttentionCall:
    """What was read where attention weights meet values, in one form.

    Args:
        kind: of `BlockLayout.mix`. value: what was read there. rows: of the batch.
        at: keep these query positions only; None keeps all. attached: queries, keys and values keep their graph.
    """
    weights = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if kind == "weights":
        value, (_, weights) = value[0], value[1][:2]
    if kind == "named":
        mixed, weights = (t.reshape(rows, -1, *t.shape[-2:]) for t in value)
        given: dict[str, Any] = {"value": mixed}
    elif kind == "differential":
        given, weights = _differential(*value)
    elif kind == "product":
        args, kwargs = value
        weights, mixed = (t.reshape(rows, -1, *t.shape[-2:]) for t in args[:2])
        given = {"value": mixed}
    else:
        args, kwargs = value
        given = dict(zip(_NAMES[kind], args, strict=False)) | kwargs
    mask = given.get("attention_mask", given.get("attn_mask"))
    query, key = given.get("query"), given.get("key")
    extra = tuple(sorted(k for k, v in kwargs.items() if k not in _KNOWN and v is not None))
    if extra and kind == "interface":
        weights = _weights_of_own(given, {k: kwargs[k] for k in kwargs if k in extra or k in ("softcap", "s_aux")})
    if at is not None:
        query = None if query is None else query[:, :, at]
        mask = None if mask is None else mask[:, :, at]
        weights = None if weights is None else weights[:, :, at]
    scaling = given.get("scaling", given.get("scale"))
    width = given["value"].shape[-1] if query is None else query.shape[-1]
    return AttentionCall(
        value=_kept(given["value"], attached),
        query=_kept(query, attached),
        key=_kept(key, attached),
        weights=_kept(weights),
        mask=_kept(mask),
        positions=None if at is None else tuple(at),
        scaling=float(width**-0.5 if scaling is None else scaling),
        softcap=given.get("softcap"),
        sinks=_kept(given.get("s_aux")),
        extra=extra,
    )


def with_call(kind: str, value: Any, call: AttentionCall) -> Any:
    """(args, keywords) of an attention function with the call's query, key and value in place of theirs."""
    args, kwargs = value
    names = _NAMES[kind]
    put = {"query": call.query, "key": call.key, "value": call.value}
    args = tuple(put.get(names[i], one) if i < len(names) else one for i, one in enumerate(args))
    return args, {name: put.get(name, one) for name, one in kwargs.items()}


def _differential(one: Any, two: Any, factor: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Differential attention: (values, weights) of pairs of heads, alpha1 - lambda * alpha2.

    Both calls have the same weights; each carries half of the pair's values.
    """
    calls = [dict(zip(_INTERFACE, args, strict=False)) | kwargs for args, kwargs in (one, two)]
    weights = _weights_of_own(calls[0], {k: v for k, v in calls[0].items() if k not in _KNOWN})
    if weights is None:
        raise UnsupportedModelError("differential attention without an eager function of its own cannot be read.")
    pairs, kv = weights.shape[1] // 2, calls[0]["value"].shape[1] // 2
    value = torch.cat([call["value"][:, :kv] for call in calls], -1)
    return {"value": value}, weights[:, :pairs] - factor.detach() * weights[:, pairs:]


def _weights_of_own(given: dict[str, Any], keywords: dict[str, Any]) -> Tensor | None:
    """Effective weights where the model passes its attention something else (an index, a bias).

    Its own eager function is linear in the values, so unit vectors as values give its weights back:
    out[t, j] = alpha[t, j], whatever the function does with scores.
    """
    module = given["module"]
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        return None
    query, key, value = (given[name].detach() for name in ("query", "key", "value"))
    n, mask = key.shape[2], given.get("attention_mask")
    seen = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()[-query.shape[2] :]
    mask = seen[None, None] if mask is None else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    units = torch.eye(n, dtype=value.dtype, device=value.device).expand(value.shape[0], value.shape[1], n, n)
    out = own(module, query, key, units, mask, scaling=given.get("scaling"), **keywords)[0]
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _kept(tensor: Any, attached: bool = False) -> Any:
    return tensor if tensor is None or attached else tensor.detach().clone()

"""Places: where in the forward operations are carried out, and in which order at one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resid_surgery.errors import InterventionError
from resid_surgery.models.taps import Tap, TapName
from resid_surgery.sites import (
    AttnNeuron,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    Projection,
    Resid,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.surgery.conflicts import Operation

RowOps = tuple[Operation, ...]
Placed = list[tuple[int, Operation]]
ORDER = (AttnNeuron, Neuron, ExpertNeuron, SharedNeuron, HeadSource, Head, Sublayer, Resid, Projection)


def set_weights(alpha: Tensor, ops: Sequence[Operation], key: Any) -> Tensor:
    """An attention row with some weights set, the rest scaled where renormalising was asked for.

    alpha'_i = alpha_i (S - sum of the set weights) / (S - sum of what they were), S the row's sum.
    """
    new = alpha.clone()
    places = [key(op.site.source) for op in ops]  # type: ignore[attr-defined]
    new[places] = alpha.new_tensor([op.weight for op in ops])
    if any(op.renormalise for op in ops):
        if not all(op.renormalise for op in ops):
            raise InterventionError(
                f"{ops[0].origin.brief} and {ops[-1].origin.brief} set weights of one row, one of them renormalising "
                "it. Use one way for a row."
            )
        rest = torch.ones_like(alpha, dtype=torch.bool)
        rest[places] = False
        left, had = alpha.sum() - new[places].sum(), alpha[rest].sum()
        if float(had) == 0 and float(left) != 0:
            raise InterventionError(
                f"{ops[0].origin.brief} cannot renormalise: the other weights of its row are all 0, and nothing can "
                "take what is left."
            )
        new[rest] = alpha[rest] * (left / had if float(had) else 0.0)
    return new


def tap_of(site: Site, *, steer: bool) -> Tap:
    """Where in the forward an operation on a site is carried out."""
    layer: int = site.layer  # type: ignore[attr-defined]
    if isinstance(site, Projection):
        return Tap("attn_call", layer)
    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        place: TapName = "coef" if isinstance(site, Neuron) else "shared_coef"
        return Tap("mlp_raw" if steer else "experts_out" if isinstance(site, ExpertNeuron) else place, layer)
    if isinstance(site, (Head, HeadSource, AttnNeuron)):
        return Tap("attn_raw" if steer else "attn_z", layer)
    if isinstance(site, Sublayer):
        return Tap("attn_add" if site.part == "attn" else "mlp_add", layer)
    assert isinstance(site, Resid)
    return Tap({"pre": "block_in", "mid": "attn_add", "post": "block_out"}[site.stage], layer)  # type: ignore[arg-type]


def raw_part(tap: Tap) -> str | None:
    """Whose output, before a post-norm, a tap changes."""
    mlp = dict.fromkeys(("coef", "mlp_raw", "experts_out", "shared_coef"), "mlp")
    return (mlp | dict.fromkeys(("attn_z", "attn_raw", "attn_mix", "attn_call"), "attn")).get(tap.name)


def waves_of(placed: Placed) -> Iterator[Placed]:
    """Operations from fine to coarse, in runs of one kind in which nothing is written twice."""
    wave: Placed = []
    kind: Any = None
    written: set[Any] = set()
    for row, op in sorted(placed, key=lambda item: fineness(item[1])):
        here = (type(op.site), getattr(op.site, "source", None) is None, op.steer is not None, op.weight is not None,
                getattr(op.site, "side", None), getattr(op.site, "stage", None))  # fmt: skip
        key = (row, op.position, None if op.steer is not None else op.site)
        if wave and (here != kind or key in written):
            yield wave
            wave, written = [], set()
        kind = here
        wave.append((row, op))
        written.add(key)
    if wave:
        yield wave


def fineness(op: Operation) -> tuple[Any, ...]:
    """Weights first; states after sublayers, Steer after the rest, shares of one source before whole heads,
    finer first."""
    coarse = ORDER.index(type(op.site))
    whole = getattr(op.site, "source", None) is None
    side = "QKV".find(getattr(op.site, "side", "Q"))
    return (op.weight is None, isinstance(op.site, Resid), op.steer is not None, whole, coarse, side)

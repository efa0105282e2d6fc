"""Conflicts: operations as they are carried out, and which of them cannot stand beside each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from resid_surgery.addresses import Edge
from resid_surgery.errors import InterventionError
from resid_surgery.sites import (
    Bias,
    Constant,
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
from resid_surgery.surgery.interventions import Intervention, Scale, Steer

NEURONS = (Neuron, ExpertNeuron, SharedNeuron)


@final
@dataclass(frozen=True)
class Named:
    """What messages call an intervention."""

    brief: str


@final
@dataclass(eq=False, slots=True)
class Operation:
    """One site at one position of one row, resolved: left = factor * found + value, then + steer.

    Attributes:
        site, position: resolved. origin: the intervention, for messages.
        factor: 0 removes, 1 leaves. value: what replaces, in the site's own space; None while it is
            wanted from a donor. steer: vector that is added.
        source: for an edge, the position of the writer's addend.
        weight: for `Attend`, the new attention weight. renormalise: of the rest of the row.
    """

    site: Site
    position: int
    origin: Intervention
    factor: float = 1.0
    value: Tensor | None = None
    steer: Tensor | None = None
    source: int | None = None
    weight: float | None = None
    renormalise: bool = False

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """What travels with a remote forward: no donors, and of the intervention what it is called."""
        held = {name: getattr(self, name) for name in self.__slots__}
        return None, held | {"origin": Named(self.origin.brief)}

    @property
    def first(self) -> int:
        """The first position that it touches."""
        return self.position if self.source is None else min(self.position, self.source)

    @property
    def edge(self) -> Edge:
        """Its site, which is an edge."""
        assert isinstance(self.site, Edge)
        return self.site


def refuse_overlaps(operations: Sequence[Operation]) -> None:
    """Writes to one place, or to a whole and its part, are refused unless all scale or steer."""
    groups: dict[tuple[Any, ...], dict[Any, list[Operation]]] = {}
    for op in operations:
        groups.setdefault((_region(op), op.position), {}).setdefault((op.site, op.source), []).append(op)
    _refuse_shares_and_edges(operations)
    for group in groups.values():
        for same in group.values():
            for a, b in itertools.combinations(same, 2):
                _refuse(a, b)
        # neurons can only meet themselves or their whole sublayer: no need to compare them pairwise
        coarse = [key for key in group if not isinstance(key[0], NEURONS)]
        for key in coarse:
            for other in group:
                if (isinstance(other[0], NEURONS) or _name(key) < _name(other)) and _overlap(key, other):
                    for a, b in itertools.product(group[key], group[other]):
                        _refuse(a, b)


def _refuse_shares_and_edges(operations: Sequence[Operation]) -> None:
    """Operations on one source of a head, and edges into the same head, have no order of their own."""
    shares: dict[tuple[int, int, int], list[Operation]] = {}
    for op in operations:
        if getattr(op.site, "source", None) is not None and op.steer is None:
            shares.setdefault((op.site.layer, op.site.head, op.position), []).append(op)  # type: ignore[attr-defined]
    for op in operations:
        if isinstance(op.site, Edge) and isinstance(op.site.reader, (Head, HeadSource)):
            reader = op.site.reader
            for other in shares.get((reader.layer, reader.head, op.position), []):
                _refuse(op, other)


def _name(key: tuple[Site, int | None]) -> tuple[str, int]:
    return str(key[0]), -1 if key[1] is None else key[1]


def _refuse(a: Operation, b: Operation) -> None:
    """Raise unless two writes to one place combine."""
    if all(isinstance(op.origin, (Scale, Steer)) for op in (a, b)) and not _nested_edges(a, b):
        return
    raise InterventionError(
        f"{a.origin.brief} and {b.origin.brief} both write {a.site}"
        + (f" and {b.site}, one inside the other," if a.site != b.site else "")
        + f" at position {a.position}. Keep one, or use Scale and Steer only, which combine."
    )


def _nested_edges(a: Operation, b: Operation) -> bool:
    """Whether two edges have one reader inside the other, or read through two norms: these never combine."""
    if not (isinstance(a.site, Edge) and isinstance(b.site, Edge)):
        return False
    return (a.edge.reader, a.edge.side, a.edge.norm) != (b.edge.reader, b.edge.side, b.edge.norm)


def _region(op: Operation) -> tuple[Any, ...]:
    site = op.site
    if isinstance(site, Edge):
        reader = site.reader
        return ("edge", getattr(reader, "layer", -1), _part(reader))
    if isinstance(site, Resid):
        return (site.layer + (site.stage == "post"), "mid" if site.stage == "mid" else "pre")
    if isinstance(site, Projection):
        return (site.layer, site.side)
    return (site.layer, _part(site))  # type: ignore[attr-defined]


def _part(site: Site) -> str:
    return site.part if isinstance(site, Sublayer) else "mlp" if isinstance(site, NEURONS) else "attn"


def _overlap(left: tuple[Site, int | None], right: tuple[Site, int | None]) -> bool:
    a, b = left[0], right[0]
    if isinstance(a, Edge) and isinstance(b, Edge):
        return _edges_overlap(a, b, left[1], right[1])
    return overlap(a, b)


def _edges_overlap(a: Edge, b: Edge, at: int | None, other: int | None) -> bool:
    """Two edges: the same reading with overlapping writers or other norms, or one reader inside the other."""
    if (a.reader, a.side) == (b.reader, b.side):
        return a.norm != b.norm or (at == other and overlap(a.writer, b.writer))
    sides = a.side == b.side or "all" in (a.side, b.side)  # a query, a key and a value are read beside each other
    return sides and overlap(a.reader, b.reader)


def overlap(a: Site, b: Site) -> bool:
    """Whether two sites share something."""
    if isinstance(a, Constant) or isinstance(b, Constant) or isinstance(a, Bias) or isinstance(b, Bias):
        return a == b
    places = [(getattr(site, "layer", None), _part(site)) for site in (a, b)]
    if not (isinstance(a, Resid) or isinstance(b, Resid)) and places[0] != places[1]:
        return False
    if isinstance(a, (Sublayer, Resid)) or isinstance(b, (Sublayer, Resid)):
        return True
    if isinstance(a, Projection) or isinstance(b, Projection):
        return a == b
    if isinstance(a, NEURONS) and isinstance(b, NEURONS):
        return a == b
    if a.head != b.head:  # type: ignore[attr-defined]
        return False
    for name in ("index", "source"):
        left, right = getattr(a, name, None), getattr(b, name, None)
        if left is not None and right is not None and left != right:
            return False
    return True

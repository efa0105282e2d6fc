"""Probing: what a reader's own number becomes when one edge into it is cut, measured in a forward of the model.

Each edge gets a row, and an auxiliary row in which its reader alone reads N_s(r - u), r and u being that run's; the
reader's number is taken there and held against the control row's: of the coefficients, neurons' inputs and values that
this forward itself made. Only where a norm stands inside attention before its values is what that row's attention reads
put through the attention alone, that norm at the control row's scale: a cut keeps every norm's scale, and the forward's
own inner norms do not. The same modules gave those edges their direction, so they are a less independent check.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from resid_surgery.attribution.readings import Probe
from resid_surgery.models.tracing import forward
from resid_surgery.sites import Constant
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.batches import Rows
from resid_surgery.surgery.cutting import Cutting
from resid_surgery.surgery.engine import device_of, run_rows
from resid_surgery.surgery.interventions import Cut
from resid_surgery.surgery.places import RowOps
from resid_surgery.surgery.resolving import Resolver, Scene
from resid_surgery.surgery.writing import Writing

TOKENS = 1024


@final
@dataclass(frozen=True, eq=False)
class Probed:
    """One edge to cut and the number to take.

    Attributes:
        cut: one edge, at one position. position: of the reader. source: whose key or value changes, or None.
        probe: takes the number; None at the unembedding, whose number is `weights` . bs.
    """

    cut: Cut
    position: int
    source: int | None
    probe: Probe | None
    weights: torch.Tensor | None = None


def probe_edges(rec: Recording, edges: Sequence[Probed]) -> list[float]:
    """How much each edge's reading changes when the edge is cut."""
    resolver = Resolver(Scene.of(rec))
    rows = [resolver.resolve(one.cut) for one in edges]
    found: dict[int, float] = {}
    ends = [i for i, row in enumerate(rows) if row[0].edge.reader == Constant("unembed")]
    inner = [i for i in range(len(rows)) if i not in set(ends)]
    for i, ((before, after),) in zip(ends, run_rows(rec, [rows[i] for i in ends]), strict=True):
        weights = edges[i].weights
        assert weights is not None
        found[i] = float((after.bs - before.bs) @ weights)
    step = max(1, TOKENS // (2 * rec.n_positions))
    for low in range(0, len(inner), step):
        some = inner[low : low + step]
        found |= zip(some, _probed(rec, [edges[i] for i in some], [rows[i] for i in some]), strict=True)
    return [found[i] for i in range(len(edges))]


def _probed(rec: Recording, edges: list[Probed], rows: list[RowOps]) -> list[float]:
    model = rec.model
    writing = Writing(model, Rows(0, rec.n_positions), [rec.prompt.position])
    cutting = Cutting.of(writing, rows)
    control = cutting.rows
    taps = {tap for one in edges if one.probe is not None for tap in one.probe.taps}
    ids = torch.tensor([rec.prompt.ids], device=device_of(model)).repeat(control + 1, 1)
    last = [rec.n_positions - 1]
    reads = [*(taps | writing.everywhere)]
    values = forward(model, ids, reads, writing.writes(), logits_at=last, notes=writing)
    changes = []
    for reader, one in zip(cutting.readers, edges, strict=True):
        assert one.probe is not None
        taken = [one.probe.take(values, row, one.position, one.source) for row in (reader.aux, control)]
        changes.append(taken[0] - taken[1])
    return changes

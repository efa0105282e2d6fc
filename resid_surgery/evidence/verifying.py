"""Verifying a source graph: cut edges and see.

An edge's prediction is its share: with the edge cut at a frozen norm, the reading must change by exactly minus that.
What the prediction does is measured beside it, with everything downstream working as it does.
"""

import random
from dataclasses import dataclass, replace
from typing import Any, final

import numpy
import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.evidence.growth import Link
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.sites import (
    AttnNeuron,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.stream.vocabulary import token_names
from resid_surgery.surgery.interventions import Cut
from resid_surgery.surgery.probing import Probed, probe_edges
from resid_surgery.surgery.resolving import of_mixture
from resid_surgery.surgery.sweeping import sweep

CHUNK = 64


@final
@dataclass(frozen=True, eq=False)
class Verified:
    """How a source graph's edges stood up to being cut; made by `resid_surgery.verify`.

    Attributes:
        graph. table: one row a cut edge: writer, reader, key, predicted (-share), measured (change of the reading, norm
            frozen), error, scale (sum of |shares| of that reading), target_change (of the readout, the norm live and
            everything downstream working; of log p itself for "log_prob").
        correlation: of predicted and measured, each over its scale. slope: of measured on predicted. worst: the largest
            |error| over its scale. skipped: edges that cannot be cut, by why.
    """

    graph: SourceGraph
    table: pd.DataFrame
    correlation: float
    slope: float
    worst: float
    skipped: dict[str, int]

    def __repr__(self) -> str:
        return (
            f"Verified({len(self.table)} edges of {self.graph!r}: correlation {self.correlation:.6f}, slope "
            f"{self.slope:.6f}, worst edge off by {self.worst:.1g} of its reading)"
        )

    @property
    def worst_edge(self) -> "pd.Series[Any]":
        """The row with the largest error over its scale."""
        order = (self.table["error"] / self.table["scale"]).argsort()
        return self.table.iloc[int(order.iloc[-1])]


@remotely
def verify(graph: SourceGraph, *, edges: int | None = 50, seed: int = 0, remote: Where = None) -> Verified:
    """Cut sampled edges of a source graph and compare what was predicted with what is measured.

    Readings are taken from what that forward itself computed. One kind is not: where a norm stands inside attention
    before its values (DeepSeek, Gemma 4), edges into value sides are measured through the same attention with that
    norm frozen that gave their direction (see `probing`), a less independent check. ``target_change`` is the effect in
    a forward of the whole model, whatever the edge.

    predicted = -share;  measured = the reading that the modules make of N_s(r - u), minus the clean one, in
    one traced forward (`Cut`, norm frozen at the uncut r; norms inside attention keep their clean scale too).

    Args:
        graph: from `source_graph`. edges: how many are drawn; None for all. seed: of the draw.
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        `Verified`.

    Raises:
        ArgumentError: no graph, or none of its edges can be cut. StaleRecordingError: the weights changed since.

    Source: the measured-against-predicted test of attribution graphs; Yu & Ananiadou, section 5.
    """
    if not isinstance(graph, SourceGraph):
        raise ArgumentError(_check.message("graph", "a graph from resid_surgery.source_graph", graph))
    if edges is not None:
        edges = _check.whole("edges", edges, 1)
    seed = _check.seed(seed)
    graph.rec.require_fresh()
    skipped: dict[str, int] = {}
    able = []
    for link in graph.links:
        why = _uncuttable(graph, link)
        if why is None:
            able.append(link)
        else:
            skipped[why] = skipped.get(why, 0) + 1
    if not able:
        raise ArgumentError(f"no edge of {graph!r} can be cut: {skipped}.")
    picked = able if edges is None or edges >= len(able) else random.Random(seed).sample(able, edges)
    return _verified(graph, picked, skipped)


def _verified(graph: SourceGraph, links: list[Link], skipped: dict[str, int]) -> Verified:
    probes = [_probed(graph, link) for link in links]
    measured = probe_edges(graph.rec, probes)
    live = _readout_changes(graph, [[_cut(graph, link, "live")] for link in links])
    table = pd.DataFrame([_row(graph, link, change) for link, change in zip(links, measured, strict=True)])
    table["target_change"] = live.numpy()
    size = table["scale"].to_numpy()
    x, y = table["predicted"].to_numpy() / size, table["measured"].to_numpy() / size
    slope = float((x @ y) / (x @ x))
    correlation = float(numpy.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else float("nan")
    return Verified(graph, table, correlation, slope, float((table["error"] / size).max()), skipped)


def _readout_changes(graph: SourceGraph, rows: list[list[Cut]]) -> Tensor:
    """How the readout changes, the whole model working as it does; log p itself for its first order."""
    rec, weights = graph.rec, graph.aim.weights
    assert weights is not None
    if graph.readout.startswith("log p"):
        return torch.tensor(sweep(rec, rows, measure="log_prob")["log_prob_change"].to_numpy())
    prompt = rec.prompt
    names = dict(zip(graph.competitors, token_names(rec.model, graph.competitors), strict=True))
    bound = replace(prompt, versus=graph.competitors, names={**prompt.names, **names})
    table = sweep(replace(rec, prompt=bound), rows, measure="bs")
    changes = torch.tensor(table[[name for name in table if str(name).startswith("bs_change_")]].to_numpy())
    return changes @ weights[list(bound.readouts)].cpu().to(changes)


def _row(graph: SourceGraph, link: Link, change: float) -> dict[str, Any]:
    writer, reader = graph.grown[link.writer], graph.grown[link.reader]
    assert reader.reader is not None
    return {
        "writer": writer.name,
        "reader": reader.name,
        "key": reader.reader.readings[link.reading].key,
        "predicted": -link.share,
        "measured": change,
        "error": abs(change + link.share),
        "scale": reader.listed[link.reading].size,
    }


def _uncuttable(graph: SourceGraph, link: Link) -> str | None:
    """Why an edge cannot be cut, or None."""
    writer = graph.grown[link.writer].site
    if of_mixture(graph.rec.model, writer):
        return "the writer is a part of a mixture of experts"
    if isinstance(writer, Constant) and writer.name != "embed":
        return "the writer is rounding"
    reader = graph.grown[link.reader].site
    if isinstance(reader, Neuron) and graph.rec.model.has(reader.layer, "coef_norm"):
        return "a norm over all coefficients stands after the reader"
    return None


def _cut(graph: SourceGraph, link: Link, norm: Any) -> Cut:
    """The edge as an intervention."""
    writer, reader = graph.grown[link.writer], graph.grown[link.reader]
    if link.reader == 0:
        return Cut(writer.site, Constant("unembed"), norm=norm, positions=reader.position)
    if isinstance(reader.site, (Neuron, ExpertNeuron, SharedNeuron)) or _is_mlp(reader.site):
        return Cut(writer.site, reader.site, norm=norm, positions=reader.position)
    layer, heads = reader.site.layer, [getattr(reader.site, "head", 0)]  # type: ignore[attr-defined]
    if norm == "live" and isinstance(reader.site, Sublayer):  # a probe sees all heads in one edge's auxiliary row
        heads = list(range(graph.rec.model.anatomy.sizes[layer].n_heads))
    at = [HeadSource(layer, head, writer.position) for head in heads]
    return Cut(writer.site, at, side="value", norm=norm, positions=reader.position)


def _is_mlp(site: Site) -> bool:
    return isinstance(site, Sublayer) and site.part == "mlp"


def _probed(graph: SourceGraph, link: Link) -> Probed:
    writer, reader = graph.grown[link.writer], graph.grown[link.reader]
    assert reader.reader is not None
    reading = reader.reader.readings[link.reading]
    heads = isinstance(reader.site, (Head, HeadSource, AttnNeuron)) or (
        isinstance(reader.site, Sublayer) and reader.site.part == "attn"
    )
    source = writer.position if heads else None
    return Probed(_cut(graph, link, "frozen"), reader.position, source, reading.probe, graph.aim.weights)

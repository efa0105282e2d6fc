"""Source graphs: from a prediction back to the embeddings, every edge an exact attribution.

1. The root is the unembedding's reading of a readout: bs = sum over addends + constants.
2. The most promising edges are taken in, 16 at a time. Their writer becomes a node; a neuron is followed through
   each of its keys, a head or a layer through its value side, for the reading that it serves.
3. That stops at a number of nodes. What a node reads and no edge explains is its remainder, always shown.

Each reading closes in its own unit: reading = sum of edges + remainder + constants. Priorities (a reader's times
|share| over the sum of |shares|) decide what is followed and are no attributions: no product along a path is claimed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import networkx
import pandas as pd

from resid_surgery import _check
from resid_surgery._html import face_html
from resid_surgery.attribution.aims import Aim, aim_of, need_readout
from resid_surgery.attribution.asking import Ask
from resid_surgery.attribution.shares import Writers
from resid_surgery.evidence.growth import Growth, Link, Node
from resid_surgery.sites import Constant
from resid_surgery.stream.elsewhere import Elsewhere, need_stream
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.subvalues import GRAINS

FORMAT = "resid_surgery.source_graph/1"


@final
@dataclass(frozen=True, eq=False)
class SourceGraph:
    """Where a prediction comes from, back to the embeddings; made by `resid_surgery.source_graph`.

    Attributes:
        rec: the recording. readout: what the root reads, in words. aim: the same as a direction. competitors: ids that
            it is against. grain: of the writers. grown, links: nodes and edges as objects.
        nodes, edges, readings: the same as tables (see `source_graph`).
    """

    rec: Recording
    readout: str
    aim: Aim
    competitors: tuple[int, ...]
    grain: str
    grown: tuple[Node, ...]
    links: tuple[Link, ...]
    nodes: pd.DataFrame
    edges: pd.DataFrame
    readings: pd.DataFrame

    def __repr__(self) -> str:
        followed = int(self.nodes["followed"].sum())
        return (
            f"SourceGraph({self.readout} on {self.rec.model.name}: {len(self.nodes)} nodes, {followed} followed, "
            f"{len(self.edges)} edges, closure {self.readings['closure'].max():.1g})"
        )

    def _repr_html_(self) -> str:
        return face_html(repr(self), self.edges.sort_values("priority", ascending=False), self.readings.head(3))

    def to_networkx(self) -> networkx.MultiDiGraph:
        """A directed multigraph, writer -> reader, keyed by the reading; attributes are the tables' columns."""
        graph = networkx.MultiDiGraph(**self._head())
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["node"], **_named(row))
        for row in self.edges.to_dict("records"):
            named = _named(row)
            graph.add_edge(named.pop("writer"), named.pop("reader"), **named)
        return graph

    def to_json(self) -> str:
        """The three tables and what they are of, as one JSON object (``format`` names its version)."""
        tables = {name: [_named(row) for row in table.to_dict("records")] for name, table in self.tables().items()}
        return json.dumps({"format": FORMAT, **self._head(), **tables}, ensure_ascii=False, indent=1)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return {"nodes": self.nodes, "edges": self.edges, "readings": self.readings}

    def _head(self) -> dict[str, Any]:
        p = self.rec.prompt
        return {
            "model": self.rec.model.name,
            "fingerprint": self.rec.fingerprint,
            "tokens": list(p.tokens),
            "position": p.position,
            "readout": self.readout,
            "grain": self.grain,
        }


def source_graph(
    rec: Recording,
    *,
    readout: str = "target",
    versus: Any = None,
    nodes: int = 200,
    grain: str = "subvalue",
) -> SourceGraph:
    """Grow the source graph of a prediction, best first (paper: query and value subvalues, hop by hop).

    Every edge is an exact share: of the readout (bs-values) at the root, of a pre-activation into a neuron's key, of
    what it carries to one reading into a head or a layer, with attention weights (a layer's gates) kept.

    Args:
        rec: a recording made with ``positions="all"``. readout: "target", "difference" or "log_prob" (see
            `sources`). versus: other competitors. nodes: how many, the root and leaves included.
        grain: of the writers: "layer", "head", "head_source", "neuron" or "subvalue" (neurons, (head, source) pairs).

    Returns:
        `SourceGraph`. nodes: node, site, position, token, kind, layer, depth, followed, priority, number (a followed
        node's coefficient, or what it carries), what, serves. edges: writer, reader, key, share, unit, priority.
        readings, one row a followed node's key: node, key, unit, reading (as the model computed it), edges (sum of the
        shares taken in), n_edges, remainder, n_remainder (addends in it), constant, closure (|edges + remainder +
        constant - reading|).

    Raises:
        ArgumentError: unknown option; recorded with positions="target"; a difference without competitors.
        StaleRecordingError, UnsupportedModelError, ClosureError: as for `sources`.

    Source: Yu & Ananiadou, arXiv 2312.12141; Elhage et al. 2021.
    """
    _check.choice("grain", grain, GRAINS)
    nodes = _check.whole("nodes", nodes, 2)
    be_recording(rec)
    competitors = need_readout(rec, readout, versus)
    if rec.prompt.position:
        need_stream(rec)
    need_recording(rec)
    aim = aim_of(rec, readout, competitors)
    growth = Growth(Writers(Elsewhere(rec), grain), nodes)
    growth.grow(Ask(Constant("unembed"), rec.prompt.position, "all", aim))
    return _graph(rec, aim, competitors if readout == "difference" else (), grain, growth)


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A table's row as attributes; what is missing is None."""
    return {str(name): None if pd.isna(value) else value for name, value in row.items()}


def _graph(rec: Recording, aim: Aim, competitors: tuple[int, ...], grain: str, growth: Growth) -> SourceGraph:
    nodes, links = tuple(growth.nodes), tuple(growth.links)
    edges = pd.DataFrame([_edge(nodes, link) for link in links])
    readings = pd.DataFrame([row for node in nodes for row in _readings(node)])
    table = pd.DataFrame([_node(rec, nodes, node) for node in nodes])
    table["layer"] = table["layer"].astype("Int64")
    return SourceGraph(rec, aim.name, aim, competitors, grain, nodes, links, table, edges, readings)


def _node(rec: Recording, nodes: tuple[Node, ...], node: Node) -> dict[str, Any]:
    serves = None
    if node.serves is not None:
        reader = nodes[node.serves[0]]
        assert reader.reader is not None
        serves = f"{reader.name}.{reader.reader.readings[node.serves[1]].key}"
    return {
        "node": node.name,
        "site": str(node.site),
        "position": node.position,
        "token": rec.prompt.tokens[node.position],
        "kind": node.kind,
        "layer": getattr(node.site, "layer", None),
        "depth": node.depth,
        "followed": node.reader is not None,
        "priority": node.priority,
        "number": None if node.reader is None else node.reader.number,
        "what": None if node.reader is None else node.reader.what,
        "serves": serves,
    }


def _edge(nodes: tuple[Node, ...], link: Link) -> dict[str, Any]:
    reader = nodes[link.reader].reader
    assert reader is not None
    reading = reader.readings[link.reading]
    return {
        "writer": nodes[link.writer].name,
        "reader": nodes[link.reader].name,
        "key": reading.key,
        "share": link.share,
        "unit": reading.unit,
        "priority": link.priority,
    }


def _readings(node: Node) -> list[dict[str, Any]]:
    """A followed node's readings, each closing in its own unit."""
    if node.reader is None:
        return []
    found = []
    for r, (reading, listed) in enumerate(zip(node.reader.readings, node.listed, strict=True)):
        taken, count = node.taken.get(r, (0.0, 0))
        constant, remainder = sum(reading.constants.values()), listed.total - taken
        found.append(
            {
                "node": node.name,
                "key": reading.key,
                "unit": reading.unit,
                "reading": reading.measured,
                "edges": taken,
                "n_edges": count,
                "remainder": remainder,
                "n_remainder": listed.count - count,
                "constant": constant,
                "closure": abs(taken + remainder + constant - reading.measured),
            }
        )
    return found

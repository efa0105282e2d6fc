"""Faithfulness of a source graph: how much of its readout survives without its nodes, and with nothing but them.

    of_clean = readout with the operation / clean readout
    survives = (readout with the operation - readout with nothing kept) / (clean readout - readout with nothing kept)

All subvalues of the graph's grain at the positions asked for are either kept or taken away: set to zero, or to their
mean over other prompts. Embeddings and biases always stay. As many subvalues drawn at random, of the same layers and
kinds, are the control.
"""

import random
from collections.abc import Sequence
from typing import Any

import pandas as pd

from resid_surgery import _check
from resid_surgery.attribution.shares import Writers
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.models.prompts import token_text
from resid_surgery.sites import Bias, Constant, Resid, Site
from resid_surgery.stream.elsewhere import Elsewhere
from resid_surgery.surgery.arguments import Donor
from resid_surgery.surgery.effects import Effect, intervene_each
from resid_surgery.surgery.interventions import Intervention, Mean, Zero
from resid_surgery.surgery.resolving import Resolver, Scene

Place = tuple[int, Site]


def faithfulness(graph: SourceGraph, *, positions: str = "target", over: Any = None, seed: int = 0) -> pd.DataFrame:
    """How much of a source graph's readout survives keeping only, and removing only, its nodes.

    Args:
        graph: from `source_graph`. positions: "target" operates at the predicting position, where other positions'
            nodes and non-nodes all stay; "all" at every position up to it.
        over: prompts or recordings: subvalues are taken away by their mean over these, not by zero.
        seed: of the random controls.

    Returns:
        One row a run: run ("clean", "nodes removed", "random removed", "nodes kept", "random kept", "nothing kept"),
        operated (how many subvalues), of (how many there are), readout (bs-value), of_clean, survives (see the module;
        1 is everything, 0 nothing; missing where nothing kept leaves more than the clean run has), log_prob (of the
        target, nats), top (most probable token), taken ("zero" or "mean").

    Raises:
        ArgumentError: no graph; unknown positions; no node to keep there; no prompts or recordings.
        InterventionError: one of `over` is of another model, or has no counterpart of a position or source.
        StaleRecordingError: the weights changed since. All before any forward runs.

    Source: faithfulness of circuits as in activation-patching studies; zero ablation as in Yu & Ananiadou, section 5.
    """
    if not isinstance(graph, SourceGraph):
        raise ArgumentError(_check.message("graph", "a graph from resid_surgery.source_graph", graph))
    _check.choice("positions", positions, ("target", "all"))
    seed = _check.seed(seed)
    t = graph.rec.prompt.position
    where = [t] if positions == "target" else list(range(t + 1))
    graph.rec.require_fresh()
    writers = Writers(Elsewhere(graph.rec), graph.grain)
    _need_nodes(graph, positions, where)
    donors = None if over is None else _donors(graph, writers, over, where)
    everything = [(p, site) for p in where for site in _subvalues(writers, p)]
    there = set(everything)
    nodes = [place for node in graph.grown[1:] if (place := (node.position, node.site)) in there]
    nodes = list(dict.fromkeys(nodes))
    drawn = _like(nodes, everything, random.Random(seed))
    runs = {
        "nodes removed": nodes,
        "random removed": drawn,
        "nodes kept": _without(everything, nodes),
        "random kept": _without(everything, drawn),
        "nothing kept": everything,
    }
    effects = {
        name: intervene_each(graph.rec, [_taken(places, donors)], movers=0)[0]
        for name, places in runs.items()
        if places
    }
    return _table(graph, runs, effects, len(everything), "zero" if over is None else "mean")


def _need_nodes(graph: SourceGraph, positions: str, where: Sequence[int]) -> None:
    """Refuse a graph none of whose nodes would be operated on."""
    if any(node.position in where and _operable(node.site) for node in graph.grown[1:]):
        return
    if positions == "target":
        raise ArgumentError(f"{graph!r} has no node at the predicting position to keep; use positions='all'.")
    raise ArgumentError(f"{graph!r} has no node to keep at any position; grow it with more nodes.")


def _donors(graph: SourceGraph, writers: Writers, over: Any, where: Sequence[int]) -> tuple[Donor, ...]:
    """What means are taken over; refused if it does not reach every position and source."""
    t = graph.rec.prompt.position
    each = {getattr(site, "source", None): site for site in _subvalues(writers, t)}  # one site a source
    asked = [Mean(list(each.values()), over, positions=t)]
    donors = asked[0].over
    asked += [Mean(Resid(0, "pre"), donors, positions=p) for p in where if p != t]
    resolver = Resolver(Scene.of(graph.rec))
    for one in asked:
        resolver.resolve(one)
    return donors


def _subvalues(writers: Writers, position: int) -> list[Site]:
    """Everything of the grain at a position that can be operated on."""
    found = []
    for number in writers.of(position):
        block = writers.segments[number].block
        found += [block.site(i) for i in range(block.count)]
    return [site for site in found if _operable(site)]


def _operable(site: Site) -> bool:
    return not isinstance(site, (Bias, Constant))


def _like(nodes: Sequence[Place], everything: Sequence[Place], draw: random.Random) -> list[Place]:
    """As many other places of the same positions, layers and kinds, where there are so many."""
    pools: dict[Any, list[Place]] = {}
    wanted: dict[Any, int] = {}
    taken = set(nodes)
    for place in everything:
        if place not in taken:
            pools.setdefault(_group(place), []).append(place)
    for place in nodes:
        wanted[_group(place)] = wanted.get(_group(place), 0) + 1
    return [
        one for key, n in wanted.items() for one in draw.sample(pools.get(key, []), min(n, len(pools.get(key, []))))
    ]


def _group(place: Place) -> Any:
    position, site = place
    return position, type(site), site.layer  # type: ignore[attr-defined]


def _without(everything: Sequence[Place], some: Sequence[Place]) -> list[Place]:
    gone = set(some)
    return [place for place in everything if place not in gone]


def _taken(places: Sequence[Place], over: tuple[Donor, ...] | None) -> list[Intervention]:
    by_position: dict[int, list[Site]] = {}
    for position, site in places:
        by_position.setdefault(position, []).append(site)
    if over is None:
        return [Zero(sites, positions=p) for p, sites in by_position.items()]
    return [Mean(sites, over, positions=p) for p, sites in by_position.items()]


def _table(
    graph: SourceGraph, runs: dict[str, list[Place]], effects: dict[str, Effect], total: int, taken: str
) -> pd.DataFrame:
    weights = graph.aim.weights
    assert weights is not None
    before, after = effects["nothing kept"].before, {name: effect.after for name, effect in effects.items()}
    clean, nothing = (float(weights @ run.bs) for run in (before, after["nothing kept"]))
    rows = [("clean", 0, before), *((name, len(places), after.get(name, before)) for name, places in runs.items())]
    found = []
    for name, operated, run in rows:
        readout = float(weights @ run.bs)
        log_p = run.logits.double().log_softmax(-1)
        found.append(
            {
                "run": name,
                "operated": operated,
                "of": total,
                "readout": readout,
                "of_clean": readout / clean if clean else float("nan"),
                "survives": (readout - nothing) / (clean - nothing) if clean > nothing else float("nan"),
                "log_prob": float(log_p[graph.rec.prompt.target]),
                "top": token_text(int(run.logits.argmax()), graph.rec.model.tokenizer),
                "taken": taken,
            }
        )
    return pd.DataFrame(found)

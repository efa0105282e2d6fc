"""Switching: which lower subvalues switched the value neurons on (paper: query subvalues), and where both sit.

With value neurons i (those that write the prediction) and g_i what one unit of a coefficient is worth to the readout,

    score(u) = sum_i g_i (m_i - m_i(-u))

with m_i(-u) the coefficient without u, through every key, the norm's scale frozen. Directly: every lower subvalue is
scored against the value neurons. Iteratively: the best are taken as readers in turn, a unit of theirs worth what their
score says per unit of coefficient, and so on downwards; to first order along the chain, and no more than that: what
such a chain does is for `verify` and ablation to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.attribution.aims import aim_of, need_readout
from resid_surgery.attribution.asking import NEURONS, asks_of
from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.mlp_readers import NeuronReader, worth_of
from resid_surgery.attribution.queries import need_candidates
from resid_surgery.attribution.shares import Writers, seen_by
from resid_surgery.errors import SiteError
from resid_surgery.sites import Site
from resid_surgery.stream.elsewhere import Elsewhere
from resid_surgery.stream.grouping import bound_prompts, numbered
from resid_surgery.stream.kinds import neuron_place
from resid_surgery.stream.recording import Recording, be_recording, need_model, need_recording, record_bound
from resid_surgery.stream.subvalues import need_group

WAYS = ("direct", "iterative")
SCORES = ("coefficient", "inner_product")
QUERIES = {
    "head": ("head",),
    "head_source": ("head_source",),
    "neuron": ("neuron",),
    "subvalue": ("neuron", "head_source"),
}


def query_subvalues(
    rec: Recording,
    values: Any,
    *,
    k: int = 10,
    way: str = "direct",
    score: str = "coefficient",
    readout: str = "target",
    grain: str = "subvalue",
    hops: int = 3,
) -> pd.DataFrame:
    """The lower subvalues that switched value neurons on, the paper's two ways (paper: query subvalues).

    Args:
        rec: a recording. values: the value neurons: sites, texts, slices, or a `Located`'s ``.sites``.
        k: how many query subvalues, per hop if iterative.
        way: "direct" scores everything below against the values; "iterative" then takes the k best as readers (those
            that are neurons) and goes on, `hops` times.
        score: "coefficient" (see the module; in the readout's unit), or "inner_product": the paper's own query score,
            sum over values and their keys of u . key, without norm and activation.
        readout: "target", "difference" or "log_prob" (see `sources`). grain: what is a query: "subvalue" (neurons
            and (head, source) pairs), "neuron", "head_source" or "head".

    Returns:
        Columns: hop, site, kind, layer, score (signed), unit, rank (within the hop, by |score|), values (how many
        readers), way, readout, position.

    Raises:
        SiteError: `values` are no neurons with known keys. ArgumentError: unknown option.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, section 4.4 and Figure 19; v4, section 3.4 (query neurons).
    """
    _check.choice("way", way, WAYS)
    _check.choice("score", score, SCORES)
    _check.choice("grain", grain, tuple(QUERIES))
    k, hops = _check.whole("k", k, 1), _check.whole("hops", hops, 1)
    be_recording(rec)
    competitors = need_readout(rec, readout, None)
    sites = _neurons(rec, getattr(values, "sites", values))
    need_recording(rec)
    aim = aim_of(rec, readout, competitors)
    readers = []
    for site in sites:
        group, index = need_group(rec, site), neuron_place(site)[1]
        readers.append(_Weighed(NeuronReader.of(rec, site), float(worth_of(rec, site.layer, group, aim)[index])))
    writers = Writers(Elsewhere(rec), grain)
    frames, seen = [], {str(one.reader.site) for one in readers}
    for hop in range(1, (hops if way == "iterative" else 1) + 1):
        best = _best(writers, readers, k, score)
        frames.append(_table(best, hop, len(readers)))
        fresh = [(site, value) for site, _, value in best if isinstance(site, NEURONS) and str(site) not in seen]
        seen |= {str(site) for site, _ in fresh}
        readers = [_Weighed.per_unit(rec, site, value) for site, value in fresh]
        if not readers:
            break
    table = pd.concat(frames, ignore_index=True)
    table["unit"] = aim.unit if score == "coefficient" else "inner product"
    table["way"], table["readout"], table["position"] = way, aim.name, rec.prompt.position
    return table


@final
@dataclass(frozen=True, eq=False)
class _Weighed:
    """A neuron as a reader, and what one unit of its coefficient is worth."""

    reader: NeuronReader
    worth: float

    @classmethod
    def per_unit(cls, rec: Recording, site: Site, score: float) -> "_Weighed":
        """A query neuron as a reader: its score, per unit of coefficient."""
        reader = NeuronReader.of(rec, site)  # type: ignore[arg-type]
        return cls(reader, score / reader.number if reader.number else 0.0)


def _neurons(rec: Recording, given: Any) -> list[Any]:
    t, asks = rec.prompt.position, asks_of(rec, given, None)
    for ask in asks:
        if not isinstance(ask.site, NEURONS) or ask.position != t:
            got = ask.site if ask.position == t else f"{ask.site}@{ask.position}"
            raise SiteError(
                f"`values` must be neurons at the predicting position {t}, whose coefficients can be switched on; "
                f"got {got}."
            )
    return list(dict.fromkeys(ask.site for ask in asks))


def _best(writers: Writers, readers: Sequence[_Weighed], k: int, score: str) -> list[tuple[Site, str, float]]:
    """(site, kind, score) of the k largest by size, over everything below any reader."""
    t, found = writers.rec.prompt.position, []
    for number in writers.of(t):
        segment = writers.segments[number]
        if segment.block.kind not in QUERIES[writers.grain]:
            continue
        mine = [one for one in readers if seen_by(segment.place, one.reader.readings[0].stop)]
        if mine:
            values = sum((_lent(writers, number, one, score) for one in mine), torch.zeros(()))
            assert isinstance(values, Tensor)
            kept = values.abs().topk(min(k, len(values))).indices
            found += [(float(values[i].abs()), number, int(i), float(values[i])) for i in kept]
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    return [(writers.site(number, i), writers.kind(number), value) for _, number, i, value in found[:k]]


def _lent(writers: Writers, number: int, one: _Weighed, score: str) -> Float[Tensor, " member"]:
    """What every member of a segment lends one reader, times what the reader's unit is worth."""
    segment, reader = writers.segments[number], one.reader
    times = segment.times(writers.rec, reader.readings[0].stop)
    if score == "inner_product":
        return segment.block.project(reader.keys * times).sum(0)
    shares = segment.block.project(torch.stack([next(iter(r.directions.values())) for r in reader.readings]) * times)
    return (reader.number - reader.from_shares(shares)) * one.worth


def _table(best: list[tuple[Site, str, float]], hop: int, readers: int) -> pd.DataFrame:
    columns = {"site": str, "kind": str, "layer": int, "score": float, "rank": int}
    rows = [(str(s), kind, s.layer, value, i) for i, (s, kind, value) in enumerate(best, start=1)]  # type: ignore[attr-defined]
    table = pd.DataFrame(rows, columns=list(columns)).astype(columns)  # the same for a hop that finds nothing
    table.insert(0, "hop", hop)
    table["values"] = readers
    return table


def locations(
    model: Any, prompts: Any, *, k: int = 10, way: str = "direct", progress: bool | None = None
) -> pd.DataFrame:
    """In which layers value subvalues and query subvalues sit, over prompts (the paper's Figure 19).

    For each prompt the k best neurons and (head, source) pairs by log-prob increase are its value subvalues; the k
    neurons and k (head, source) pairs that most switched the value neurons on are its query subvalues.

    Args:
        model: from `resid_surgery.load`. prompts: `Prompt`s. k: of each. way: of `query_subvalues`.
        progress: a bar on stderr; None shows it on a terminal.

    Returns:
        One row per prompt, role and subvalue: prompt (number), role ("value" or "query"), kind ("neuron" or
        "head_source"), layer, site, score, unit, hop, way. Count rows by layer for the histograms, or `plot_locations`.

    Raises:
        ArgumentError, PromptError: before any forward, with the prompt's number.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Figure 19.
    """
    _check.progress(progress)
    need_model(model)
    _check.choice("way", way, WAYS)
    k = _check.whole("k", k, 1)
    bound, layers = bound_prompts(model, prompts), range(model.anatomy.n_layers)
    for number, one in enumerate(bound):
        with numbered(number):
            for kind in ("neuron", "head_source"):
                need_candidates(model, one, kind, layers, k)
    frames = []
    with progress_bar("locations", len(bound), shown=progress is not False) as step:
        for number, one in enumerate(bound):
            with numbered(number):
                frames.append(_located(record_bound(model, one, every=False), k, way).assign(prompt=number, way=way))
            step()
    return pd.concat(frames, ignore_index=True)


def _located(rec: Recording, k: int, way: str) -> pd.DataFrame:
    neurons, pairs = locate(rec, k=k, kind="neuron"), locate(rec, k=k, kind="head_source")
    parts = [_values(neurons.table, "neuron"), _values(pairs.table, "head_source")]
    for grain in ("neuron", "head_source"):
        queries = query_subvalues(rec, neurons.sites, k=k, way=way, readout="log_prob", grain=grain)
        parts.append(queries[["layer", "site", "score", "unit", "hop"]].assign(role="query", kind=grain))
    return pd.concat(parts, ignore_index=True)


def _values(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    found = table[["layer", "site", "log_prob_increase"]].rename(columns={"log_prob_increase": "score"})
    return found.assign(role="value", kind=kind, unit="nats", hop=0)

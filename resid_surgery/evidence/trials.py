"""Trials of scores: add what a score finds, or take it away, and see what that does to the prediction.

Both come with controls of equal size drawn at random, and give tidy rows that `bootstrap` turns into intervals.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.attribution.catalogue import Score, check_scores
from resid_surgery.attribution.locating import pick
from resid_surgery.attribution.queries import CONTRASTS, Query, need_candidates
from resid_surgery.attribution.scoring import scorer
from resid_surgery.attribution.states import States
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.sites import Site
from resid_surgery.stream.blocks import Numbering, sum_of
from resid_surgery.stream.grouping import bound_prompts, numbered
from resid_surgery.stream.recording import Recording, need_model, record
from resid_surgery.stream.subvalues import KINDS
from resid_surgery.surgery.interventions import Zero
from resid_surgery.surgery.sweeping import sweep

TEN = {"10 neurons": {"neuron": 10}, "10 attention neurons": {"attn_neuron": 10}}
MOST_DRAWS = 10_000
WRITERS = {"neuron": ("mlp",), "layer": ("attn", "mlp")}
RANDOM, EVERYTHING, NOTHING = "random", "everything", "nothing"


@remotely
def addition_test(
    model: OpenedModel,
    prompts: Iterable[Prompt],
    *,
    kind: str = "neuron",
    scores: Any = "all",
    k: int = 10,
    norm: str = "frozen",
    seed: int = 0,
    progress: bool | None = None,
    remote: Where = None,
) -> pd.DataFrame:
    """Add the k subvalues that a score likes best to their layer's state: by how much does p(w) rise (v1, Table 1)?

    For each layer, x is the state before its sublayer, and the k best of the layer by each score are added to it at
    once: p(w, x + sum v) - p(w, x). Controls: k at random, and all of the layer's ("everything").

    Args:
        model: from `resid_surgery.load`. prompts: any number. kind: as in `rs.scores`.
        scores: names, or "all" that the norm and every prompt allow. k: how many a layer.
        norm: that the probability is read with, "frozen" or "own". seed: of the control.
        progress: a bar on stderr; None shows it on a terminal.
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        One row per prompt, layer and score. Columns: prompt, text, target, score (or "random", "everything"), layer,
        part, kind, k (fewer where the layer has fewer), prob_increase, log_prob_increase (nats), prob_before (p(w, x)),
        norm.

    Raises:
        PromptError, ArgumentError: before any forward runs.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Table 1.
    """
    _check.progress(progress)
    bound, wanted, shown = _prepared(model, prompts, scores, norm, progress)
    _check.choice("kind", kind, KINDS)
    k = _check.whole("k", k, 1)
    seed = _check.seed(seed)
    frames = []
    with progress_bar("addition test", len(bound), shown=shown) as step:
        for number, one in enumerate(bound):
            rec = record(model, one.source)
            query = Query.of(rec, kind, norm, None, also=[other.target for other in bound])
            sums = _sums(query, wanted, k, np.random.default_rng([seed, number]))
            frames.append(_added(query, sums, k).assign(prompt=number, kind=kind, norm=norm, **one.said()))
            step(one.names[one.target])
    table = pd.concat(frames, ignore_index=True)
    first = ["prompt", "text", "target", "score", "layer", "part", "kind", "k"]
    return table[[*first, *(name for name in table if name not in first)]]


def _sums(query: Query, wanted: Sequence[Score], k: int, rng: np.random.Generator) -> dict[tuple[str, int], Tensor]:
    """(score, block) -> sum of the vectors that it likes best."""
    scorers, found = [scorer(query, one) for one in wanted], {}
    for b, block in enumerate(query.blocks()):
        size = min(k, block.count)
        for scored in scorers:
            numbers = pick(scored, size, blocks=[b]).numbers
            found[scored.score.name, b] = block.vectors(torch.tensor(numbers)).sum(0)
        drawn = torch.from_numpy(rng.choice(block.count, size, replace=False))
        found[RANDOM, b] = block.vectors(drawn).sum(0)
        found[EVERYTHING, b] = sum_of([block])
    return found


def _added(query: Query, sums: dict[tuple[str, int], Tensor], k: int) -> pd.DataFrame:
    states = States.of(query.rec, query.places, own=query.norm == "own")
    which = torch.tensor([states.index[query.places[b]] for _, b in sums])
    increase = states.evaluate(which, torch.stack(list(sums.values()))).double().cpu().numpy()
    before = states.log_p.double().exp()[which].cpu().numpy()
    return pd.DataFrame(
        {
            "score": [name for name, _ in sums],
            "layer": [query.places[b][0] for _, b in sums],
            "part": [query.places[b][1] for _, b in sums],
            "prob_increase": before * np.expm1(increase),
            "log_prob_increase": increase,
            "prob_before": before,
            "k": [
                min(k, query.blocks()[b].count) if name != EVERYTHING else query.blocks()[b].count for name, b in sums
            ],
        }
    )


@remotely
def ablation_test(
    model: OpenedModel,
    prompts: Iterable[Prompt],
    *,
    sets: Mapping[str, Mapping[str, int]] = TEN,
    scores: Any = "all",
    positions: Sequence[str] = ("target", "all"),
    norm: str = "frozen",
    draws: int = 5,
    seed: int = 0,
    progress: bool | None = None,
    remote: Where = None,
) -> pd.DataFrame:
    """Zero what a score likes best in the whole model: how much of the prediction is lost (EMNLP, Table 2)?

    Args:
        model: from `resid_surgery.load`. prompts: any number.
        sets: label -> how many of each kind are zeroed together, by default the ten best neurons and, apart from
            them, the ten best attention neurons. ``{"100 + 200": {"neuron": 100, "attn_neuron": 200}}`` is the
            published large set.
        scores: names, or "all" that the norm and every prompt allow.
        positions: where they are zeroed: "target" (where they were scored), "all" (as the published code does).
        norm: of the scores. draws: random sets of equal size, as a control. seed: of them.
        progress: a bar on stderr; None shows it on a terminal.
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        One row per prompt, set, score and positions (and draw, for "random"), and one "nothing" row a prompt.
        Columns: prompt, text, target, set, score, positions, draw, size, reciprocal_rank (of the target; its mean is
        MRR), rank, prob, log_prob (nats), log_prob_change, kl, bs_change_target (logits), norm.

    Raises:
        PromptError, ArgumentError: before any forward runs.

    Source: Yu & Ananiadou, EMNLP 2024 (arXiv 2312.12141 v4), Table 2.
    """
    _check.progress(progress)
    bound, wanted, shown = _prepared(model, prompts, scores, norm, progress)
    draws = _check.whole("draws", draws, 0, MOST_DRAWS)
    seed = _check.seed(seed)
    _check_sets(sets)
    places = [positions] if isinstance(positions, str) or not _check.iterable(positions) else list(positions)
    for place in places:
        _check.choice("positions", place, ("target", "all"))
    if not places:
        raise ArgumentError(_check.message("positions", "at least one of target, all", places))
    every = range(model.anatomy.n_layers)
    for number, one in enumerate(bound):
        for kind, k in {(kind, k) for some in sets.values() for kind, k in some.items()}:
            with numbered(number):
                need_candidates(model, one, kind, every, k, "sets")
    frames = []
    with progress_bar("ablation test", len(bound), shown=shown) as step:
        for number, one in enumerate(bound):
            rec = record(model, one.source)
            rows = []
            for named, sites in _chosen(rec, sets, wanted, norm, draws, np.random.default_rng([seed, number]), bound):
                rows += [(named | {"positions": at}, Zero(sites, positions=at)) for at in places]
            table = sweep(rec, rows, measure="all", progress=False).rename(columns={"found_by": "score"})
            frames.append(_with_clean(table).assign(prompt=number, norm=norm, **one.said()))
            step(one.names[one.target])
    table = pd.concat(frames, ignore_index=True)
    table["reciprocal_rank"] = 1 / table["rank"]
    first = ["prompt", "text", "target", "set", "score", "positions", "draw", "size", "reciprocal_rank", "rank", "prob",
             "log_prob", "log_prob_change", "kl", "bs_change_target"]  # fmt: skip
    return table[[*first, "norm"]]


def _chosen(
    rec: Recording,
    sets: Mapping[str, Mapping[str, int]],
    wanted: Sequence[Score],
    norm: str,
    draws: int,
    rng: np.random.Generator,
    bound: Sequence[BoundPrompt],
) -> Iterator[tuple[dict[str, Any], list[Site]]]:
    """(coordinates, sites) of every set that is zeroed."""
    most = {kind: max(one.get(kind, 0) for one in sets.values()) for kind in {k for one in sets.values() for k in one}}
    queries = {kind: Query.of(rec, kind, norm, None, also=[other.target for other in bound]) for kind in sorted(most)}
    for kind, query in queries.items():
        most[kind] = _check.whole("sets", most[kind], 1, query.count, model=rec.model.name)
    ranked: dict[tuple[str, str], list[Site]] = {}
    for kind, query in queries.items():
        for one in wanted:
            found = pick(scorer(query, one), most[kind])
            ranked[kind, one.name] = [found.numbering.site(i) for i in found.numbers]
    for label, sizes in sets.items():
        total = sum(sizes.values())
        for one in wanted:
            sites = [site for kind, k in sizes.items() for site in ranked[kind, one.name][:k]]
            yield {"set": label, "found_by": one.name, "draw": 0, "size": total}, sites
        for draw in range(draws):
            sites = [site for kind, k in sizes.items() for site in drawn(queries[kind], k, rng)]
            yield {"set": label, "found_by": RANDOM, "draw": draw, "size": total}, sites


def drawn(query: Query, k: int, rng: np.random.Generator) -> list[Site]:
    """k of a query's candidates at random."""
    numbering = Numbering(query.blocks())
    return [numbering.site(int(i)) for i in sorted(rng.choice(len(numbering), k, replace=False).tolist())]


def _with_clean(table: pd.DataFrame) -> pd.DataFrame:
    """The same with a row for the prediction as it is."""
    clean = table.attrs["clean"]
    row = {"set": NOTHING, "score": NOTHING, "positions": "", "draw": 0, "size": 0, "rank": int(clean["rank"]),
           "prob": clean["prob"], "log_prob": clean["log_prob"], "log_prob_change": 0.0, "kl": 0.0,
           "bs_change_target": 0.0}  # fmt: skip
    return pd.concat([pd.DataFrame([row]), table[list(row)]], ignore_index=True)


def _prepared(
    model: Any, prompts: Any, scores: Any, norm: str, progress: bool | None
) -> tuple[list[BoundPrompt], list[Score], bool]:
    need_model(model)
    wanted = check_scores(scores, norm)
    bound = bound_prompts(model, prompts)
    alone = [number for number, one in enumerate(bound) if not one.versus]
    if alone and scores != "all" and any(one.name in CONTRASTS for one in wanted):
        raise ArgumentError(f"prompt {alone[0]}: {' and '.join(CONTRASTS)} need competitors: Prompt(versus=[...]).")
    if alone:
        wanted = [one for one in wanted if one.name not in CONTRASTS]
    return bound, wanted, progress if progress is not None else len(bound) > 1


def _check_sets(sets: Any) -> None:
    if not isinstance(sets, Mapping) or not sets or not all(isinstance(one, Mapping) and one for one in sets.values()):
        raise ArgumentError(_check.message("sets", "label -> {kind: how many}", sets))
    for one in sets.values():
        for kind, k in one.items():
            _check.choice("sets", kind, KINDS)
            _check.whole("sets", k, 1)
        held = [part for kind in one for part in WRITERS.get(kind, ("attn",))]
        if len(set(held)) != len(held):
            must = "of kinds that do not hold one another (a head holds its attention neurons)"
            raise ArgumentError(_check.message("sets", must, dict(one)))

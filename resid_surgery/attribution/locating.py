"""Locating: the best or worst k subvalues by a score, exact and proven.

1. Bound every candidate (`bounds`): O(d_model) each; from above for the best, from below for the worst.
2. Evaluate candidates exactly in the order of their bounds.
3. Stop when the k-th exact score beats every remaining bound. What was never evaluated
   cannot belong to the answer: it is the exhaustive one, and `evaluations` says at what cost.

Linear scores are known for all candidates by one matrix-vector product; ranks are streamed through the vocabulary.
Scores that differ by less than rounding are ties; ties go by (layer, attention before MLP, index).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery._html import face_html
from resid_surgery._progress import progress as progress_bar
from resid_surgery.attribution.catalogue import Score, check_scores
from resid_surgery.attribution.queries import Query, need_candidates, need_competitors, versus_of
from resid_surgery.attribution.scores import LONG
from resid_surgery.attribution.scoring import Increase, Rank, Scorer, Streamed, scorer
from resid_surgery.attribution.searching import Search
from resid_surgery.attribution.streaming import stream
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt
from resid_surgery.models.remoting import Where, need_place
from resid_surgery.sites import Site
from resid_surgery.stream.blocks import Numbering
from resid_surgery.stream.grouping import bound_prompts, numbered
from resid_surgery.stream.recording import Recording, need_model, need_recording, record
from resid_surgery.stream.subvalues import KINDS
from resid_surgery.stream.tables import bs_columns
from resid_surgery.stream.vocabulary import Readout


@final
@dataclass(frozen=True, eq=False)
class Located:
    """The subvalues that `locate` found.

    Attributes:
        table: rank, site, kind, layer, the score under its name, bs_target and bs_versus_* (logits,
            frozen norm), norm, position.
        sites: the sites, best first. evaluations: exact evaluations (passes over the vocabulary) that the
            proof took. candidates: how many there were.
        proof: "certificate", "linear" or "exhaustive". score: its name. worst: the worst instead of the best.
        fingerprint: of the weights. prompt: that was recorded.
    """

    table: pd.DataFrame
    sites: tuple[Site, ...]
    evaluations: int
    candidates: int
    proof: str
    score: str
    worst: bool
    fingerprint: str
    prompt: BoundPrompt

    def __repr__(self) -> str:
        shown = ", ".join(str(s) for s in self.sites[:5]) + (", ..." if len(self.sites) > 5 else "")
        way = "" if self.score == "log_prob_increase" else f" by {self.score}"
        return (
            f"Located({len(self.sites)} of {self.candidates} candidates{way}: {shown}; "
            f"{self.evaluations} exact evaluations, {self.proof})"
        )

    def _repr_html_(self) -> str:
        return face_html(repr(self), self.table)


def locate(
    rec: Recording,
    *,
    k: int = 10,
    kind: str = "neuron",
    score: str = "log_prob_increase",
    worst: bool = False,
    norm: str = "frozen",
    layers: Any = None,
    versus: Any = None,
    progress: bool | None = None,
) -> Located:
    """The exact best k subvalues by a score, with proof (paper: value neurons/subvalues).

    By log-prob increase (the default) the answer is proven by certificates, so that only a little more than k
    candidates are evaluated; see `describe_scores` for the others. The worst k need a table of what value vectors
    span, which is computed once per model (half a minute for 46,080 neurons) and kept in the cache folder.

    Args:
        rec: a recording. k: how many; at most all candidates.
        kind: "neuron", "head", "head_source", "attn_neuron", "attn_neuron_source" or "layer".
        score: its name. worst: the worst by the score instead of the best.
        norm: "frozen" or "own". layers: None for all, or some.
        versus: competitors of "bs_difference" and "contrast", if other than the prompt's.
        progress: a bar on stderr for exhaustive passes; None shows it on a terminal.

    Returns:
        `Located`, best first (with `worst`, the worst first).

    Raises:
        ArgumentError: unknown kind, score, norm or layer; no competitors; k out of range.
        StaleRecordingError: the weights changed since the recording.

    Source: Yu & Ananiadou, arXiv 2312.12141; certificates: see `bounds`.
    """
    _check.progress(progress)
    wanted = _one_score(score, norm)
    _check.flag("worst", worst)
    k = _check.whole("k", k, 1)
    query = Query.of(rec, kind, norm, layers, versus)
    need_competitors(rec.model, [wanted], query.versus)
    total = query.count
    k = _check.whole("k", k, 1, total, model=rec.model.name, do=f"There are {total} candidates of kind '{kind}'.")
    need_recording(rec)
    return _located(scorer(query, wanted), k, worst=worst, shown=progress)


def locate_each(
    model: OpenedModel,
    prompts: Iterable[Prompt],
    *,
    k: int = 10,
    kind: str = "neuron",
    score: str = "log_prob_increase",
    worst: bool = False,
    norm: str = "frozen",
    layers: Any = None,
    versus: Any = None,
    progress: bool | None = None,
    remote: Where = None,
) -> Iterator[Located]:
    """`locate` on prompt after prompt, as they come: one recording at a time is held, whatever their number.

    All prompts are bound to the model, and refused if need be, before the first forward runs.

    Args:
        model: from `resid_surgery.load`. prompts: any number of them. progress: a bar on stderr; None shows it
            on a terminal. remote: where prompts are recorded, as for `resid_surgery.record`; scores are computed
            here. The rest: as in `locate`.

    Yields:
        `Located`, one a prompt, in order.

    Raises:
        PromptError: a prompt cannot be used; it is named. ArgumentError: as `locate`.
    """
    _check.progress(progress)
    need_model(model)
    wanted = _one_score(score, norm)
    _check.choice("kind", kind, KINDS)
    k = _check.whole("k", k, 1)
    picked = _check.layers(layers, model.anatomy.n_layers, model=model.name)
    _check.flag("worst", worst)
    bound = bound_prompts(model, prompts)
    for number, one in enumerate(bound):
        with numbered(number):
            need_competitors(model, [wanted], versus_of(model, one, versus))
            need_candidates(model, one, kind, picked, k)
    place = need_place(model, remote)
    return _each(model, bound, k, kind, wanted, worst, norm, picked, versus, progress, place)


def _each(
    model: OpenedModel,
    bound: list[BoundPrompt],
    k: int,
    kind: str,
    wanted: Score,
    worst: bool,
    norm: str,
    layers: Any,
    versus: Any,
    progress: bool | None,
    remote: Where,
) -> Iterator[Located]:
    targets = [one.target for one in bound]  # their ranks are counted in one pass
    with progress_bar("locating", len(bound), shown=progress if progress is not None else len(bound) > 1) as step:
        for one in bound:
            rec = record(model, one.source, remote=remote)
            query = Query.of(rec, kind, norm, layers, versus, targets)
            found = _located(scorer(query, wanted), k, worst=worst, shown=progress)
            del rec, query  # before the next one is recorded
            yield found
            step(one.names[one.target])


def locate_many(model: OpenedModel, prompts: Iterable[Prompt], **options: Any) -> pd.DataFrame:
    """`locate` on a set of prompts, as one table; memory does not grow with what a recording holds.

    Args:
        model: from `resid_surgery.load`. prompts: any number of them; all are checked before the first forward.
        options: those of `locate_each`, which gives the same one prompt at a time.

    Returns:
        Columns: prompt (its number), text (or ids), target, then those of `Located.table`, and evaluations,
        candidates, proof.

    Raises:
        PromptError: a prompt cannot be used; it is named. ArgumentError: as `locate`.

    Example:
        >>> import resid_surgery as rs
        >>> prompts = [rs.Prompt(ids=[5, 4, 3], target=1), rs.Prompt(ids=[9, 8], target=2)]
        >>> rs.locate_many(rs.load(rs.tiny("llama")), prompts, k=2)["prompt"].tolist()
        [0, 0, 1, 1]
    """
    frames = []
    for number, found in enumerate(locate_each(model, prompts, **options)):
        table = found.table.copy()
        for at, (name, value) in enumerate(({"prompt": number} | found.prompt.said()).items()):
            table.insert(at, name, value)
        table["evaluations"], table["candidates"], table["proof"] = found.evaluations, found.candidates, found.proof
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def _one_score(given: Any, norm: Any) -> Score:
    if not isinstance(given, str) or given == "all":
        raise ArgumentError(_check.message("score", "one score's name", given, do="rs.scores takes several."))
    return check_scores([given], norm)[0]


def _located(scored: Scorer, k: int, *, worst: bool, shown: bool | None = None) -> Located:
    query, rec = scored.query, scored.rec
    with progress_bar("locating", query.count, shown=shown is not False and query.count > LONG) as step:
        picked = pick(scored, k, worst=worst, step=step)
    return Located(
        table=_table(scored, picked),
        sites=tuple(picked.numbering.site(i) for i in picked.numbers),
        evaluations=picked.evaluations,
        candidates=len(picked.numbering),
        proof=scored.score.search,
        score=scored.score.name,
        worst=worst,
        fingerprint=rec.fingerprint,
        prompt=rec.prompt,
    )


@final
@dataclass(frozen=True, eq=False)
class Picked:
    """The first k candidates of some blocks of a scorer.

    Attributes:
        numbering: of the blocks' members. numbers: the chosen, first one first.
        values: their scores. evaluations: passes over the vocabulary.
    """

    numbering: Numbering
    numbers: list[int]
    values: list[float]
    evaluations: int


def pick(
    scored: Scorer, k: int, *, worst: bool = False, blocks: Sequence[int] | None = None, step: Any = lambda **_: None
) -> Picked:
    """The first k candidates by a score, of all blocks or of some."""
    chosen = list(range(len(scored.blocks))) if blocks is None else list(blocks)
    members = [scored.blocks[b] for b in chosen]
    numbering, sign = Numbering(members), scored.score.sign(worst=worst)
    eps = 8 * torch.finfo(scored.rec.model.work_dtype).eps
    floors = [
        torch.full((one.count,), scored.floor(b), dtype=torch.float64) for b, one in zip(chosen, members, strict=True)
    ]
    if isinstance(scored, Increase):
        below = sign < 0
        if scored.removed != below:
            scored.need_ranges(members)
        known = torch.cat([_zeros(scored, b) for b in chosen]) * sign
        bounds = torch.cat([scored.bounds(b, below=below) for b in chosen]).cpu().double() * sign
        places = torch.tensor(chosen)

        def evaluate(numbers: Tensor) -> Tensor:
            which = places[numbering.home(numbers)]
            return sign * scored.evaluate(which, numbering.vectors(numbers)).cpu().double()

        search = Search(known, torch.cat(floors), eps)
        first, evaluations = search.certified(k, bounds, evaluate), search.evaluations
    else:
        found, evaluations = _everything(scored, chosen, step)
        search = Search(found * sign, torch.cat(floors), eps)
        first = search.first(k)
    return Picked(numbering, first, (search.known[first] * sign).tolist(), evaluations)


def _zeros(scored: Increase, b: int) -> Tensor:
    """What is known of block b without evaluation: nan, and the score of nothing where the addend is zero."""
    block = scored.blocks[b]
    known = torch.full((block.count,), torch.nan, dtype=torch.float64)
    return known if block.zero is None else known.masked_fill(block.zero.cpu(), scored.nothing)


def _everything(scored: Scorer, blocks: Sequence[int], step: Any) -> tuple[Tensor, int]:
    """Every candidate's score, and how many passes over the vocabulary that took."""
    found, evaluations = [], 0
    for b in blocks:
        block = scored.blocks[b]
        cached = not isinstance(scored, Streamed) or (isinstance(scored, Rank) and scored.known(b) is not None)
        (values,) = stream([scored], b, step)
        found.append(values.double().cpu())
        evaluations += 0 if cached else block.count // block.per_row
    return torch.cat(found), evaluations


def _table(scored: Scorer, picked: Picked) -> pd.DataFrame:
    rec, query, name = scored.rec, scored.query, scored.score.name
    numbering, final = picked.numbering, Numbering(query.blocks("final"))  # bs-values are read off the final stream
    vectors = final.vectors(torch.tensor(picked.numbers))
    bs = (vectors @ Readout.of(rec).directions(rec.prompt.readouts).T).cpu()
    places = [numbering.place(i)[0] for i in picked.numbers]
    columns: dict[str, Any] = {
        "rank": range(1, len(places) + 1),
        "site": [str(numbering.site(i)) for i in picked.numbers],
        "kind": [numbering.blocks[b].kind for b in places],
        "layer": [query.places[b][0] for b in places],
        name: picked.values,
    }
    columns |= {c: bs[:, i].double().numpy() for i, c in enumerate(bs_columns(rec)) if c != name}
    table = pd.DataFrame(columns)
    table["norm"], table["position"] = query.norm, rec.prompt.position
    return table

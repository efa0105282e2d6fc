"""Locating: the best k subvalues by log-prob increase, exact and proven.

1. Bound every candidate from above (`bounds`): O(d_model) each.
2. Evaluate candidates exactly in descending order of the bound.
3. Stop when the k-th best exact score exceeds every remaining bound. What was never evaluated
   cannot belong to the top k: the answer is the exhaustive one, and `evaluations` says at what cost.

Scores that differ by less than rounding are ties; ties go by (layer, attention before MLP, index).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.bounds import UpperBounds
from resid_surgery.attribution.scores import States, check_query, need_places
from resid_surgery.errors import ArgumentError
from resid_surgery.sites import Site
from resid_surgery.stream.blocks import Block, Numbering
from resid_surgery.stream.recording import Recording, need_recording
from resid_surgery.stream.tables import bs_columns

SCORES = ("log_prob_increase",)


@final
@dataclass(frozen=True, eq=False)
class Located:
    """The subvalues that `locate` found.

    Attributes:
        table: rank, site, kind, layer, log_prob_increase (nats), bs_target and bs_versus_* (logits,
            frozen norm), norm, position.
        sites: the sites, best first. evaluations: exact evaluations that the proof took.
        candidates: how many there were. proof: "certificate" or "exhaustive".
        fingerprint: of the weights.
    """

    table: pd.DataFrame
    sites: tuple[Site, ...]
    evaluations: int
    candidates: int
    proof: str
    fingerprint: str

    def __repr__(self) -> str:
        shown = ", ".join(str(s) for s in self.sites[:5]) + (", ..." if len(self.sites) > 5 else "")
        return (
            f"Located({len(self.sites)} of {self.candidates} candidates: {shown}; "
            f"{self.evaluations} exact evaluations, {self.proof})"
        )


def locate(
    rec: Recording,
    *,
    k: int = 10,
    kind: str = "neuron",
    score: str = "log_prob_increase",
    worst: bool = False,
    norm: str = "frozen",
    layers: Any = None,
) -> Located:
    """The exact best k subvalues by log-prob increase, with proof (paper: value neurons/subvalues).

    C(v, x) = log p(w, x + v) - log p(w, x), nats; see `scores` for the conventions. The best k are
    proven by an upper certificate, so only a little more than k of all candidates are evaluated.
    The worst k are found by evaluating all of them, and `proof` says so.

    Args:
        rec: a recording. k: how many; at most all candidates.
        kind: "neuron", "head", "head_source", "attn_neuron" or "layer".
        score: "log_prob_increase". worst: the most harmful instead of the most helpful.
        norm: "frozen" or "own". layers: None for all, or some.

    Returns:
        `Located`, best first (with `worst`, the most negative first).

    Raises:
        ArgumentError: unknown kind, score, norm or layer; k out of range.
        StaleRecordingError: the weights changed since the recording.

    Source: Yu & Ananiadou, arXiv 2312.12141; certificate: Jensen's inequality, see `bounds`.
    """
    _check.choice("score", score, SCORES)
    picked = check_query(rec, kind, norm, layers)
    if not isinstance(worst, bool):
        raise ArgumentError(_check.message("worst", "True or False", worst))
    _check.whole("k", k, 1)
    need_recording(rec)
    blocks = need_places(rec, kind, picked)
    total = sum(block.count for _, _, block in blocks)
    _check.whole("k", k, 1, total, model=rec.model.name, do=f"There are {total} candidates of kind '{kind}'.")
    states = States.of(rec, [(layer, part) for layer, part, _ in blocks], own=norm == "own")
    search = _Search(blocks, states)
    if worst:
        chosen = search.exhaustive(k)
    else:
        upper = UpperBounds(rec, states)
        bounds = [upper.of(block, states.index[layer, part]) for layer, part, block in blocks]
        chosen = search.certified(k, torch.cat(bounds))
    return Located(
        table=_table(rec, search, chosen, norm),
        sites=tuple(search.numbering.site(i) for i in chosen),
        evaluations=search.evaluations,
        candidates=total,
        proof="exhaustive" if worst else "certificate",
        fingerprint=rec.fingerprint,
    )


@final
class _Search:
    """Candidates of all blocks under one numbering, in tie order, with the scores known so far."""

    def __init__(self, blocks: Sequence[tuple[int, str, Block]], states: States) -> None:
        self.places = [(layer, part) for layer, part, _ in blocks]
        self.numbering, self.states = Numbering([block for _, _, block in blocks]), states
        self.state_of = torch.tensor([states.index[place] for place in self.places])
        self.known = torch.full((len(self.numbering),), torch.nan, dtype=states.bs.dtype)
        counts = [block.count for _, _, block in blocks]
        for (_, _, block), known in zip(blocks, torch.split(self.known, counts), strict=True):
            if block.zero is not None:  # C(0) = 0, no evaluation needed
                known[block.zero.cpu()] = 0.0
        self.evaluations = 0

    def evaluate(self, numbers: Tensor) -> None:
        """Exact scores of candidates by number."""
        which = self.state_of[self.numbering.home(numbers)]
        self.known[numbers] = self.states.evaluate(which, self.numbering.vectors(numbers)).cpu()
        self.evaluations += len(numbers)

    def certified(self, k: int, bounds: Tensor) -> list[int]:
        """The best k, evaluating in descending order of the bound until the rest is ruled out."""
        bounds = bounds.cpu()
        order = torch.argsort(bounds, descending=True, stable=True)
        order = order[self.known[order].isnan()]
        done, step = 0, k + k // 8  # a few more than k at once: a second product would cost more
        while done < len(order):
            self.evaluate(order[done : done + step])
            done = min(done + step, len(order))
            best = self.known[~self.known.isnan()]
            if done < len(order) and len(best) >= k:
                threshold = best.topk(k).values[-1]
                # a bound that only ties the k-th best may still win the tie: keep going on equality
                step = int((bounds[order[done:]] >= threshold - 2 * _tie_width(threshold)).sum())
                if step == 0:
                    break
                step = min(step, 64)
        return self._first(k, descending=True)

    def exhaustive(self, k: int) -> list[int]:
        """The worst k, evaluating every candidate."""
        for numbers in torch.split(torch.nonzero(self.known.isnan())[:, 0], self.states.chunk):
            self.evaluate(numbers)
        return self._first(k, descending=False)

    def _first(self, k: int, *, descending: bool) -> list[int]:
        numbers = torch.nonzero(~self.known.isnan())[:, 0]
        if len(numbers) > 2 * k:  # ties with the k-th stay in
            edge = self.known[numbers].topk(k, largest=descending).values[-1]
            sign = 1 if descending else -1
            numbers = numbers[sign * self.known[numbers] >= sign * edge - 2 * _tie_width(edge)]
        return [int(numbers[i]) for i in rank(self.known[numbers], descending=descending)[:k]]


def rank(values: Tensor, *, descending: bool = True) -> list[int]:
    """Indices in order of value; values within rounding of the first of their run are ties, by index."""
    order = torch.argsort(values, descending=descending, stable=True)
    ordered, widths = values[order].tolist(), _tie_width(values[order]).tolist()
    runs, first, number = [], 0, 0
    for i, value in enumerate(ordered):
        if abs(value - ordered[first]) > widths[first]:
            first, number = i, number + 1
        runs.append(number)
    return [i for _, i in sorted(zip(runs, order.tolist(), strict=True))]


def _tie_width(value: Tensor) -> Tensor:
    """Scores closer than this are the same number up to rounding."""
    return 8 * torch.finfo(value.dtype).eps * (1 + value.abs())


def _table(rec: Recording, search: _Search, chosen: list[int], norm: str) -> pd.DataFrame:
    numbering = search.numbering
    blocks = [numbering.place(i)[0] for i in chosen]
    directions = search.states.readout.directions(rec.prompt.readouts)
    vectors = numbering.vectors(torch.tensor(chosen))
    if rec.model.anatomy.carries:  # a bs-value is read off the final stream, past blocks that multiply it
        vectors = torch.stack([v * rec.reach(*search.places[b]) for v, b in zip(vectors, blocks, strict=True)])
    bs = (vectors @ directions.T).cpu()
    table = pd.DataFrame(
        {
            "rank": range(1, len(chosen) + 1),
            "site": [str(numbering.site(i)) for i in chosen],
            "kind": [numbering.blocks[b].kind for b in blocks],
            "layer": [search.places[b][0] for b in blocks],
            "log_prob_increase": [float(search.known[i]) for i in chosen],
        }
        | {name: bs[:, i].double().numpy() for i, name in enumerate(bs_columns(rec))}
    )
    table["norm"], table["position"] = norm, rec.prompt.position
    return table

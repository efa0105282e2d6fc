"""Searching: the first k of many candidates, proven by bounds with few exact evaluations.

1. Evaluate candidates in the order of their bounds.
2. Stop when the k-th score beats every remaining bound: what was never evaluated cannot be among the first k.

Scores that differ by less than rounding are ties, by number; a bound that only ties the k-th may still win the tie.
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

AT_ONCE = 64


@final
class Search:
    """Candidates by number, in tie order, with the scores known so far (times a sign: the largest come first).

    Attributes:
        known: nan where a score is not known. floors: of what size the terms are whose rounding decides ties,
            beside the score itself. eps: the relative width of a tie. evaluations: how many were asked for.
    """

    def __init__(self, known: Float[Tensor, " n"], floors: Float[Tensor, " n"], eps: float) -> None:
        self.known, self.floors, self.eps = known, floors, eps
        self.evaluations = 0

    def certified(
        self, k: int, bounds: Float[Tensor, " n"], evaluate: Callable[[Int[Tensor, " m"]], Float[Tensor, " m"]]
    ) -> list[int]:
        """The first k, given upper bounds of all scores."""
        order = torch.argsort(bounds, descending=True, stable=True)
        order = order[self.known[order].isnan()]
        done, step = 0, k + k // 8  # a few more than k at once: a second product would cost more
        while done < len(order):
            numbers = order[done : done + step]
            self.known[numbers] = evaluate(numbers)
            self.evaluations += len(numbers)
            done = min(done + step, len(order))
            known = torch.nonzero(~self.known.isnan())[:, 0]
            if done < len(order) and len(known) >= k:
                step = int((bounds[order[done:]] >= self._edge(known, k)).sum())
                if step == 0:
                    break
                step = min(step, max(AT_ONCE, k // 2))
        return self.first(k)

    def first(self, k: int) -> list[int]:
        """The first k of those known."""
        numbers = torch.nonzero(~self.known.isnan())[:, 0]
        if len(numbers) > 2 * k:  # ties with the k-th stay in
            numbers = numbers[self.known[numbers] >= self._edge(numbers, k)]
        widths = self.eps * (self.floors[numbers] + self.known[numbers].abs())
        return [int(numbers[i]) for i in rank(self.known[numbers], widths)[:k]]

    def _edge(self, numbers: Tensor, k: int) -> float:
        """What a score must reach to stand with the k-th of some numbers, ties included."""
        last = float(self.known[numbers].topk(k).values[-1])
        return last - 2 * self.eps * (float(self.floors.max()) + abs(last))


def rank(values: Tensor, widths: Tensor | None = None, *, descending: bool = True) -> list[int]:
    """Indices in order of value; values within rounding of the first of their run are ties, by index.

    Args:
        values: to rank. widths: how far apart ties may lie, each; of log-probabilities by default.
    """
    widths = 8 * torch.finfo(values.dtype).eps * (1 + values.abs()) if widths is None else widths
    order = torch.argsort(values, descending=descending, stable=True)
    ordered, wide = values[order].tolist(), widths[order].tolist()
    runs, first, number = [], 0, 0
    for i, value in enumerate(ordered):
        if abs(value - ordered[first]) > wide[first]:
            first, number = i, number + 1
        runs.append(number)
    return [i for _, i in sorted(zip(runs, order.tolist(), strict=True))]

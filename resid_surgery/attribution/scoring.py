"""Scoring: every score of the catalogue, evaluated exactly on the candidates of a query.

A `Scorer` scores in one way: all candidates of a block by a matrix-vector product (`Linear`), or by passing directions
through the vocabulary (`Streamed`; see `streaming`), and then perhaps some candidates by number or between bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.attribution.bounds import Bounds
from resid_surgery.attribution.catalogue import Score
from resid_surgery.attribution.gradients import added_by, gradients_of
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.ranks import Kept, counts_in, rank_of
from resid_surgery.attribution.states import States
from resid_surgery.errors import ClosureError
from resid_surgery.stream.blocks import Block, Square
from resid_surgery.stream.kinds import Where
from resid_surgery.stream.vocabulary import Readout

EXACT_ROWS = 4096


class Scorer:
    """One score on the candidates of one query.

    Attributes:
        query, score. where: which vectors of the candidates it reads.
    """

    where: Where = "here"

    def __init__(self, query: Query, score: Score) -> None:
        self.query, self.score, self.rec = query, score, query.rec
        self.readout = Readout.of(query.rec)
        self.prepare()

    def prepare(self) -> None:
        """What does not depend on candidates."""

    @property
    def blocks(self) -> list[Block]:
        """The candidates, where it reads them."""
        return self.query.blocks(self.where)

    def floor(self, b: int) -> float:
        """Of what size the terms are whose rounding decides ties, beside the score itself."""
        return 1.0


class Linear(Scorer):
    """A score of all members of a block by matrix-vector products."""

    def values(self, b: int) -> Float[Tensor, " count"]:
        """Exact scores of block b."""
        raise NotImplementedError


@final
class BsValue(Linear):
    """bs(v)[w], or minus the competitors' mean: one dot product each."""

    where = "final"

    def prepare(self) -> None:
        rows = self.readout.directions([self.rec.prompt.target])
        if self.score.name == "bs_difference":
            rows = rows - self.readout.directions(list(self.query.versus)).mean(0)
        self.direction = rows

    def values(self, b: int) -> Tensor:
        return self.blocks[b].project(self.direction)[0]


@final
class Contrast(Linear):
    """The increase of log p(w) - log p(u): log Z cancels, so a few logits are all that it takes."""

    def prepare(self) -> None:
        competitors = list(self.query.versus)
        self.tokens = [self.rec.prompt.target, *competitors]
        self.rows = self.readout.rows(self.tokens)
        self.weights = self.rows.new_tensor([1.0, *[-1 / len(competitors)] * len(competitors)])
        self.plain = self.query.norm == "frozen" and self.rec.model.anatomy.logit_cap is None
        own = self.query.norm == "own"
        self.states = None if self.plain else States.of(self.rec, self.query.places, own=own)

    def values(self, b: int) -> Tensor:
        block, states = self.blocks[b], self.states
        if states is None:
            return block.project(self.readout.norm.pull(self.weights[None] @ self.rows, self.readout.s))[0]
        state, out = states.index[self.query.places[b]], []
        before = states.bs[self.tokens, state]
        for members in torch.split(torch.arange(block.count), EXACT_ROWS):
            moved = states.normed(torch.full((len(members),), state), block.vectors(members)) @ self.rows.T
            after = self.readout.cap(before + moved) - self.readout.cap(before)
            out.append(after @ self.weights)
        return torch.cat(out)


@final
class Size(Linear):
    """Coefficient, length of the direction, or both: no token in them."""

    def values(self, b: int) -> Tensor:
        block, name = self.blocks[b], self.score.name
        c = block.coefficient
        if c is None:
            c = torch.ones(block.count, dtype=self.rec.model.work_dtype, device=self.rec.model.device)
        if name == "coefficient":
            return c
        length = block.lengths(Square()).sqrt().repeat_interleave(block.per_row)
        return length if name == "direction_norm" else length * c.abs()

    def floor(self, b: int) -> float:
        return 0.0


@final
class Gradient(Linear):
    """v . d log p(w) / dv at t."""

    where = "raw"

    def prepare(self) -> None:
        self.whole = self.query.kind == "layer"
        self.gradients = gradients_of(self.rec, self.query.places, whole=self.whole)

    def values(self, b: int) -> Tensor:
        g = self.gradients[b]
        if self.whole:
            return (added_by(self.rec, *self.query.places[b]) @ g)[None]
        return self.blocks[b].project(g[None])[0]


class Streamed(Scorer):
    """A score that takes a pass over the vocabulary for every direction."""

    nothing: float = math.nan  # the score of a zero vector, where that needs no pass

    def of_columns(self, b: int, chunk: "Chunk") -> Float[Tensor, "n per_row"]:
        """Exact scores of the members of some directions of block b."""
        raise NotImplementedError


@final
class Increase(Streamed):
    """C(v, x) at its place, from an empty state or out of the final stream; or p instead of log p.

    log_prob_increase C(v, x); prob_increase p(w, x) (e^C - 1); log_prob_alone C(v, 0) - log V;
    leave_one_out -C(-v, r).
    """

    def prepare(self) -> None:
        name, own = self.score.name, self.query.norm == "own"
        self.where = "here" if name in ("log_prob_increase", "prob_increase") else "final"
        make = {"log_prob_alone": States.alone, "leave_one_out": States.final}.get(name, States.of)
        self.states: States = make(self.rec, self.query.places, own=own)
        self.removed = name == "leave_one_out"
        self.sign = -1.0 if self.removed else 1.0
        self.state_of = torch.tensor([self.states.index[place] for place in self.query.places])
        self.limits: Bounds | None = None
        self.nothing = float(self.states.log_p[0]) if name == "log_prob_alone" else 0.0

    def _mapped(self, c: Tensor, state: Tensor) -> Tensor:
        """The score from C; rises with it, except for leave_one_out."""
        if self.score.name == "prob_increase":
            before = self.states.log_p[state.to(c.device)]
            small = torch.expm1(c.clamp_max(1)) * before.exp()
            return torch.where(c > 1, (before + c).clamp_max(0).exp() - before.exp(), small)
        if self.score.name == "log_prob_alone":
            return c + self.nothing
        return -c if self.removed else c

    def need_finite(self, values: Tensor) -> Tensor:
        """The scores, if they are numbers.

        Raises:
            ClosureError: some overflowed, or are not defined.
        """
        if bool(torch.isfinite(values).all()):
            return values
        raise ClosureError(
            f"score {self.score.name!r} under the {self.query.norm} norm is not finite for "
            f"{int((~torch.isfinite(values)).sum())} subvalues of {self.rec.model.name}: its values are beyond "
            f"{str(values.dtype).removeprefix('torch.')}. Load the model in float64."
        )

    def evaluate(self, blocks: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Exact scores of vectors, each as if of one of the blocks; one vocabulary product for all of them."""
        which = self.state_of[blocks]
        return self.need_finite(self._mapped(self.states.evaluate(which, vectors * self.sign), which))

    def of_columns(self, b: int, chunk: "Chunk") -> Tensor:
        key = (self.where, self.score.name if self.score.name != "prob_increase" else "log_prob_increase")
        if key not in chunk.increases:  # shared by the scores that are functions of it
            out = [self._increases(int(self.state_of[b]), chunk, c) for c in chunk.coefficient.unbind(1)]
            chunk.increases[key] = torch.stack(out, 1)
        found = chunk.increases[key]
        values = self._mapped(found.flatten(), torch.full((found.numel(),), int(self.state_of[b])))
        return self.need_finite(values).view_as(found)

    def _increases(self, state: int, chunk: "Chunk", c: Tensor) -> Tensor:
        some = torch.nonzero(c)[:, 0]
        if 0 < len(some) == len(c):
            return self.states.of_columns(state, chunk.columns, chunk.directions, c * self.sign, chunk.scratch)
        values = torch.zeros_like(c)
        if len(some):
            values[some] = self.states.of_columns(
                state, chunk.columns[:, some], chunk.directions[some], c[some] * self.sign
            )
        return values

    def bounds(self, b: int, *, below: bool) -> Float[Tensor, " count"]:
        """Certified lower (`below`) or upper bounds of the scores of block b."""
        self.limits = self.limits or Bounds(self.rec, self.states, removed=self.removed)
        block, state = self.blocks[b], int(self.state_of[b])
        found = (self.limits.lower if below != self.removed else self.limits.upper)(block, state)
        found = self._mapped(found, torch.full((block.count,), state))
        found = found.nan_to_num(nan=-torch.inf if below else torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return found if block.zero is None else found.masked_fill(block.zero, self.nothing)

    def need_ranges(self, blocks: Sequence[Block]) -> None:
        """Have the table ready that lower bounds of C need."""
        self.limits = self.limits or Bounds(self.rec, self.states, removed=self.removed)
        self.limits.ranges.prepare(blocks)

    def floor(self, b: int) -> float:
        return float(self.states.log_p[self.state_of[b]].exp()) if self.score.name == "prob_increase" else 1.0


@final
class Rank(Streamed):
    """The target's rank in v, or the coefficient over it; counted once per target for value vectors."""

    where = "final"

    def prepare(self) -> None:
        self.counts = Kept(self.rec)
        self.tokens = tuple(dict.fromkeys((self.rec.prompt.target, *self.query.also)))
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def known(self, b: int) -> Tensor | None:
        """Scores of block b from counts that were kept, or None."""
        block, w = self.blocks[b], self.rec.prompt.target
        if self.counts.missing(block, [w]):
            return None
        above, below, sign = self.counts.get(block, w)
        return self._values(b, above, below, sign, self._coefficients(b)).flatten()

    def of_columns(self, b: int, chunk: "Chunk") -> Tensor:
        w, block = self.rec.prompt.target, self.blocks[b]
        wanted = dict.fromkeys((w, *self.counts.missing(block, self.tokens)))
        chunk.counts.update(counts_in(chunk.columns, [token for token in wanted if token not in chunk.counts]))
        for token in wanted:
            self.seen.setdefault(token, []).append(chunk.counts[token])
        above, below = self.seen[w][-1]
        return self._values(b, above, below, torch.ones_like(above), chunk.coefficient)

    def finish(self, b: int, *, keep: bool) -> None:
        """Keep what was counted in block b, if that is all of it."""
        for token, pairs in self.seen.items() if keep else ():
            above, below = (torch.cat(one) for one in zip(*pairs, strict=True))
            self.counts.put(self.blocks[b], token, above, below)
        self.seen = {}

    def _coefficients(self, b: int) -> Tensor:
        block = self.blocks[b]
        c = block.coefficient
        return (torch.ones(block.count).to(self.readout.s) if c is None else c).view(-1, block.per_row)

    def _values(self, b: int, above: Tensor, below: Tensor, sign: Tensor, c: Tensor) -> Tensor:
        ranks = rank_of(above[:, None], below[:, None], sign[:, None] * c, self.rec.model.vocab_size)
        return ranks if self.score.name == "target_rank" else c.double() / ranks

    def floor(self, b: int) -> float:
        return 0.0


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """Some directions of a block.

    Attributes:
        columns: W_U gain centre(v). directions: v. coefficient: members'. scratch: room for changed columns.
        increases: C of the members, by what it is the increase of. counts: (above, below) by target.
    """

    columns: Float[Tensor, "vocabulary n"]
    directions: Float[Tensor, "n d_model"]
    coefficient: Float[Tensor, "n per_row"]
    scratch: Float[Tensor, "vocabulary n"]
    increases: dict[tuple[str, str], Float[Tensor, "n per_row"]] = field(default_factory=dict)
    counts: dict[int, tuple[Int[Tensor, " n"], Int[Tensor, " n"]]] = field(default_factory=dict)


SCORERS: dict[str, type[Scorer]] = {
    "bs_target": BsValue,
    "bs_difference": BsValue,
    "contrast": Contrast,
    "coefficient": Size,
    "direction_norm": Size,
    "coefficient_times_norm": Size,
    "grad_times_activation": Gradient,
    "target_rank": Rank,
    "coefficient_over_rank": Rank,
}


def scorer(query: Query, score: Score) -> Scorer:
    """The scorer of a score on a query's candidates."""
    return SCORERS.get(score.name, Increase)(query, score)

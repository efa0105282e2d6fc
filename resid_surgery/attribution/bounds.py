"""Certificates: lower and upper bounds of C(v, x) for every candidate at O(d_model) each.

With D = bs(x + v) - bs(x), e = N(x + v) - N(x) (so D_i = W_U[i] . e), p = softmax(bs(x)), mu = sum_i p_i D_i:

1. Above, no soft-cap (Jensen):  C = D_w - log sum_i p_i exp(D_i) <= D_w - mu = g . e,
   with g = W_U[w] - sum_i p_i W_U[i], two vocabulary products for each distinct x.
2. Below: exp is convex, so with lo <= D_i <= hi its chord is above it, and
   C >= D_w - log((hi - mu) / (hi - lo) e^lo + (mu - lo) / (hi - lo) e^hi).
   lo and hi come from what each value vector spans (`ranges`) times its coefficient; where there is no such
   table, from |D_i| <= |W_U[i]| |e|.
3. Under a final soft-cap line 1 is invalid. With D' the capped difference, Jensen gives
   C <= D'_w - sum_i p_i D'_i, and since |cap''| <= M = 4 / (3 sqrt(3) c),
   |D'_i - cap'(b_i) D_i| <= (M / 2) D_i^2. So
   C <= D'_w - sum_i p_i cap'(b_i) D_i + (M / 2) sum_i p_i |W_U[i]|^2 |e|^2
   (Cauchy-Schwarz in place of the quadratic form e^T G e: O(d_model) again, looser, still valid), and the same
   terms bound sum_i p_i D'_i from above for line 2, in which the chord rises with mu and D' lies between D and 0.
4. A rounding slack is added, so that the bounds also hold for scores computed in floating point.

All hold for the frozen and for the own norm; under the own norm |e| and g . e follow from the dot
products x . v, g . v and |v|^2, and D_i = (s(x) / s(x + v) - 1) bs(x)_i + W_U[i] . gain * centre(v) / s(x + v).
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.ranges import Ranges
from resid_surgery.attribution.states import States
from resid_surgery.stream.blocks import Block, Square
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.vocabulary import Readout

MOST_DOUBT = 0.05
FAR = 30.0


@final
class Bounds:
    """Lower and upper bounds of C for blocks of candidates, given their states.

    Args:
        rec: a recording. states: what candidates are added to.
        removed: candidates are subtracted instead: bounds of C(-v, x).
    """

    def __init__(self, rec: Recording, states: States, *, removed: bool = False) -> None:
        self.states = states
        self.readout = states.readout
        self.rec, self.sign = rec, -1.0 if removed else 1.0
        self.cap = rec.model.anatomy.logit_cap
        self.row_norms = unembedding_row_norms(rec, self.readout)
        self.ranges = Ranges(rec, self.readout)
        p = states.p
        w = self.readout.rows([states.token])
        if self.cap is None:
            self.mean = self.readout.mix(p.T)
            self.g = w - self.mean
        else:
            slope = 1 - torch.tanh(states.bs / self.cap).square()
            self.g = self.readout.mix((p * slope).T)
            self.curve = (self.row_norms.square() @ p) * (2 / (3 * math.sqrt(3) * self.cap))
            self.w = w
        eps = torch.finfo(p.dtype).eps
        self.longest = float(self.row_norms.max())
        self.per_length = 8 * eps * math.sqrt(rec.model.anatomy.d_model) * self.longest
        self.size = 8 * eps * float(torch.stack(states.bs.aminmax()).abs().max())
        self.flat = 8 * eps * (1 + math.log(rec.model.vocab_size)) + self.size

    def upper(self, block: Block, state: int) -> Float[Tensor, " count"]:
        """Upper bounds (nats), rounding slack included; exactly 0 where the addend is zero."""
        directions = self.g[state][None] if self.cap is None else torch.stack([self.g[state], self.w[0]])
        moved = self._moved(block, state, directions)
        if self.cap is None:
            bound = moved.dots[0]
        else:
            bound = self._capped_gain(moved, state) - moved.dots[0] + self._bend(moved, state)
        return self._settled(block, bound + self._slack(moved), torch.inf)

    def lower(self, block: Block, state: int) -> Float[Tensor, " count"]:
        """Lower bounds (nats), rounding slack included; exactly 0 where the addend is zero."""
        if self.cap is None:
            moved = self._moved(block, state, torch.stack([self.g[state], self.mean[state]]))
            low, high = self._spread(block, state, moved)
            bound = moved.dots[0] - over_mean(low, high, moved.dots[1])
        else:
            moved = self._moved(block, state, torch.stack([self.g[state], self.w[0]]))
            low, high = self._spread(block, state, moved)
            low, high = low.clamp(-2 * self.cap, 0), high.clamp(0, 2 * self.cap)
            mean = moved.dots[0] + self._bend(moved, state)
            bound = self._capped_gain(moved, state) - mean - over_mean(low, high, mean)
        return self._settled(block, bound - self._slack(moved), -torch.inf)

    def _slack(self, moved: "Moved") -> Tensor:
        """What rounding can do to a score. It shrinks with what v moves, since C is summed as p expm1(D), unless D is a
        difference of values of the state's size: under a soft-cap and under the own norm."""
        length = moved.length + moved.rounding
        apart = self.cap is None and not self.states.own
        flat = self.flat * (length * self.longest).clamp_max(1) if apart else self.flat
        return self.per_length * length + flat + 2 * moved.doubt

    def _settled(self, block: Block, bound: Tensor, hopeless: float) -> Tensor:
        bound = bound.nan_to_num(nan=hopeless, posinf=torch.inf, neginf=-torch.inf)
        return bound if block.zero is None else bound.masked_fill(block.zero, 0.0)

    def _capped_gain(self, moved: "Moved", state: int) -> Tensor:
        b_w = self.states.bs[self.states.token, state]
        return self.readout.cap(b_w + moved.dots[1]) - self.readout.cap(b_w)

    def _bend(self, moved: "Moved", state: int) -> Tensor:
        """The most that a soft-cap's curvature can take from or add to a mean of D."""
        return self.curve[state] * (moved.length + moved.rounding).square()

    def _spread(self, block: Block, state: int, moved: "Moved") -> tuple[Tensor, Tensor]:
        """lo and hi of D over the vocabulary."""
        most = (moved.length + moved.rounding) * self.longest
        low, high = -most, most
        table = self.ranges.of(block)
        if table is not None:
            c = self.sign if block.coefficient is None else block.coefficient * self.sign
            ends = torch.stack([one.repeat_interleave(block.per_row) * c for one in table]) / moved.s
            around, unsure = torch.zeros_like(ends), moved.relative * ends.abs().amax(0)
            if self.states.own:
                bare = self.states.bs[:, state]
                if self.readout.constants is not None:
                    bare = bare - self.readout.constants
                ratio = self.readout.norm.scale(self.states.x[state]) / moved.s
                around = torch.stack(bare.aminmax())[:, None] * (ratio - 1)
                unsure = unsure + moved.relative * ratio * bare.abs().max()
            room = self.per_length * (moved.length + moved.rounding) + self.size + moved.doubt + 2 * unsure
            low = torch.maximum(low, ends.amin(0) + around.amin(0) - room)
            high = torch.minimum(high, ends.amax(0) + around.amax(0) + room)
        return low, high

    def _moved(self, block: Block, state: int, g: Float[Tensor, "m d_model"]) -> "Moved":
        """What bounds need of e, for every candidate."""
        norm, s = self.readout.norm, self.readout.s
        if not self.states.own:
            length = block.squares(Square(norm, gained=True)).sqrt() / s
            nothing = torch.zeros_like(length)
            return Moved(block.project(norm.pull(g, s)) * self.sign, length, nothing, nothing, s, nothing)
        x = self.states.x[state]
        one = torch.ones_like(s)
        cx, nx = norm.centre(x), norm.linear(x, one)  # nx = gain * centre(x)
        pulled = torch.cat([norm.pull(g, one), cx[None], norm.pull(nx[None], one)])
        dots = block.project(pulled) * self.sign
        spread = block.squares(Square(norm, gained=False))
        d, s0, eps = x.shape[-1], norm.scale(x), 8 * torch.finfo(x.dtype).eps
        square = ((cx @ cx + 2 * dots[-2] + spread) / d).clamp_min(0) + norm.eps
        moved, gx = square.sqrt(), pulled[:-2] @ x[:, None]
        e_dot = (gx + dots[:-2]) / moved - gx / s0
        v_n = block.squares(Square(norm, gained=True))
        terms = torch.stack(
            [
                (nx @ nx + 2 * dots[-1] + v_n) / square,
                -2 * (nx @ nx + dots[-1]) / (moved * s0),
                (nx @ nx / s0**2).expand_as(v_n),
            ]
        )
        # Where v nearly cancels x, the squared scale is a difference of large numbers: what rounding
        # can hide there moves everything that is divided by it. Hopeless cases are evaluated.
        relative = eps * ((cx @ cx + 2 * dots[-2].abs() + spread) / d) / square
        doubt = relative * (gx + dots[:-2]).abs() / moved + eps * ((gx.abs() + dots[:-2].abs()) / moved + gx.abs() / s0)
        doubt = torch.where(relative > MOST_DOUBT, torch.inf, doubt).amax(0)
        hidden = (eps + relative) * terms.abs().sum(0)
        return Moved(e_dot, terms.sum(0).clamp_min(0).sqrt(), hidden.sqrt(), doubt, moved, relative)


@final
@dataclass(frozen=True, eq=False)
class Moved:
    """Of e = N(x + v) - N(x): dots (direction, candidate), its length and how much rounding hides of that, what
    rounding hides of the dots, the scale that v is read with, and what share of it rounding hides."""

    dots: Tensor
    length: Tensor
    rounding: Tensor
    doubt: Tensor
    s: Tensor
    relative: Tensor


def over_mean(low: Tensor, high: Tensor, mean: Tensor) -> Tensor:
    """log((hi - mu) / (hi - lo) e^lo + (mu - lo) / (hi - lo) e^hi) - mu: at least log E e^D - mu of any D in [lo, hi]
    with mean mu. Rises with hi, falls with lo; 0 where they meet."""
    low, high = torch.minimum(low, mean) - mean, torch.maximum(high, mean) - mean
    width = (high - low).clamp_min(torch.finfo(mean.dtype).tiny)
    t = (-low / width).clamp(0, 1)
    near = torch.log1p(((1 - t) * torch.expm1(low) + t * torch.expm1(high)).clamp_min(0))
    far = torch.logaddexp(low + torch.log1p(-t), high + t.log())
    return torch.where(high < FAR, near, far)


def unembedding_row_norms(rec: Recording, readout: Readout) -> Float[Tensor, " vocabulary"]:
    """|W_U[i]|, kept per model and fingerprint."""
    kept = rec.model.cache.setdefault("row_norms", {})
    if rec.fingerprint not in kept:
        kept.clear()
        w = rec.model.unembedding
        step = 1 << 14
        kept[rec.fingerprint] = torch.cat(
            [w[i : i + step].to(readout.norm.gain.dtype).norm(dim=-1) for i in range(0, w.shape[0], step)]
        )
    return kept[rec.fingerprint]  # type: ignore[no-any-return]

"""Certificates: an upper bound of C(v, x) for every candidate at O(d_model) each.

With D = bs(x + v) - bs(x), e = N(x + v) - N(x) (so D_i = W_U[i] . e), p = softmax(bs(x)):

1. Jensen, no soft-cap:  C = D_w - log sum_i p_i exp(D_i) <= D_w - sum_i p_i D_i = g . e,
   with g = W_U[w] - sum_i p_i W_U[i], two vocabulary products for each distinct x.
2. Under a final soft-cap that line is invalid. With D' the capped difference, Jensen gives
   C <= D'_w - sum_i p_i D'_i, and since |cap''| <= M = 4 / (3 sqrt(3) c),
   D'_i >= cap'(b_i) D_i - (M / 2) D_i^2. So
   C <= D'_w - sum_i p_i cap'(b_i) D_i + (M / 2) sum_i p_i |W_U[i]|^2 |e|^2
   (Cauchy-Schwarz in place of the quadratic form e^T G e: O(d_model) again, looser, still valid).
3. A rounding slack is added, so that the bound also holds for scores computed in floating point.

Both hold for the frozen and for the own norm; under the own norm |e| and g . e follow from the dot
products x . v, g . v and |v|^2.
"""

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.scores import States
from resid_surgery.stream.blocks import Block, Square
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.vocabulary import Readout

MOST_DOUBT = 0.05


@final
class UpperBounds:
    """Upper bounds of C for blocks of candidates, given their states."""

    def __init__(self, rec: Recording, states: States) -> None:
        self.states = states
        self.readout = states.readout
        self.rec = rec
        self.cap = rec.model.anatomy.logit_cap
        self.row_norms = unembedding_row_norms(rec, self.readout)
        p = states.p
        w = self.readout.rows([states.token])
        if self.cap is None:
            self.g = w - self.readout.mix(p.T)
        else:
            slope = 1 - torch.tanh(states.bs / self.cap).square()
            self.g = self.readout.mix((p * slope).T)
            self.curve = (self.row_norms.square() @ p) * (2 / (3 * math.sqrt(3) * self.cap))
            self.w = w
        eps = torch.finfo(p.dtype).eps
        self.per_length = 8 * eps * math.sqrt(rec.model.anatomy.d_model) * float(self.row_norms.max())
        self.flat = 8 * eps * (1 + math.log(rec.model.vocab_size))
        self.size = 8 * eps * float(torch.stack(states.bs.aminmax()).abs().max())

    def of(self, block: Block, state: int) -> Float[Tensor, " count"]:
        """Upper bounds (nats), rounding slack included; exactly 0 where the addend is zero."""
        directions = self.g[state][None] if self.cap is None else torch.stack([self.g[state], self.w[0]])
        dots, length, rounding, doubt = self._moved(block, state, directions)
        slack = self.per_length * (length + rounding) + self.flat + self.size + 2 * doubt
        if self.cap is None:
            bound = dots[0]
        else:
            b_w = self.states.bs[self.states.token, state]
            gain = self.readout.cap(b_w + dots[1]) - self.readout.cap(b_w)
            bound = gain - dots[0] + self.curve[state] * (length + rounding).square()
        bound = (bound + slack).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return bound if block.zero is None else bound.masked_fill(block.zero, 0.0)

    def _moved(self, block: Block, state: int, g: Float[Tensor, "m d_model"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g . e, |e|, the rounding of |e| and that of g . e, for every candidate."""
        norm, s = self.readout.norm, self.readout.s
        if not self.states.own:
            length = block.squares(Square(norm, gained=True)).sqrt() / s
            nothing = torch.zeros_like(length)
            return block.project(norm.pull(g, s)), length, nothing, nothing
        x = self.states.x[state]
        one = torch.ones_like(s)
        cx, nx = norm.centre(x), norm.linear(x, one)  # nx = gain * centre(x)
        pulled = torch.cat([norm.pull(g, one), cx[None], norm.pull(nx[None], one)])
        dots = block.project(pulled)
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
        return e_dot, terms.sum(0).clamp_min(0).sqrt(), hidden.sqrt(), doubt


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

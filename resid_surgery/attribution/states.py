"""The log-prob increase C(v, x) = log p(w, x + v) - log p(w, x), in nats: states x, and many v scored on them.

p = softmax(cap(bs(.))) under the frozen norm of the final stream (the paper's convention, default)
or each state's own norm. x is resid_mid for an MLP and its neurons, resid_pre for attention, its
heads and (head, source) pairs (resid_pre for both in a parallel block); the readout's constants
belong to x. C(0) = 0, and C is not additive.

For one state x everything about it that does not depend on v is computed once (`States`), and many v
are then scored as D = bs(x + v) - bs(x),  C = D_w - log sum_i p_i exp(D_i).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import state_of
from resid_surgery.stream.vocabulary import Readout, blocked_product

EVALUATE_BYTES = 32 << 20
SAFE_EXPONENT = 40.0


@final
@dataclass(frozen=True, eq=False)
class States:
    """Distinct states x that candidates are added to, with what scoring needs of each.

    The vocabulary is the first axis: products with the unembedding on the left are a quarter
    faster, and sums over the vocabulary run down contiguous columns.

    Attributes:
        readout: the recording's. own: each state read with its own norm. token: the target id w.
        x: (state, d_model). bs: (vocabulary, state) with constants, before a cap.
        p: (vocabulary, state) softmax(cap(bs)). log_z: (state,) log-sum-exp of cap(bs).
        index: (layer, part) -> number of a state.
    """

    readout: Readout
    own: bool
    token: int
    x: Float[Tensor, "state d_model"]
    bs: Float[Tensor, "vocabulary state"]
    p: Float[Tensor, "vocabulary state"]
    log_z: Float[Tensor, " state"]
    index: dict[tuple[int, str], int]

    @classmethod
    def of(cls, rec: Recording, places: Sequence[tuple[int, str]], *, own: bool) -> "States":
        """The states that (layer, part) writers add to; one vocabulary product for all of them."""
        distinct: dict[tuple[int, str], int] = {}
        vectors: list[Tensor] = []
        index: dict[tuple[int, str], int] = {}
        for layer, part in places:
            key = (layer, "pre" if part == "attn" or not rec.model.anatomy.between(layer) else "mid")
            if key not in distinct:
                distinct[key] = len(vectors)
                vectors.append(state_of(rec, layer, part))
            index[layer, part] = distinct[key]
        return cls.given(rec, torch.stack(vectors), own=own, index=index)

    @classmethod
    def alone(cls, rec: Recording, places: Sequence[tuple[int, str]], *, own: bool) -> "States":
        """The empty state x = 0, constants left out: p is uniform, and log p(w, v) = C(v, 0) - log V."""
        x = torch.zeros_like(rec.work(rec.resid_final))[None]
        return cls.given(rec, x, own=own, index=dict.fromkeys(places, 0), constants=False)

    @classmethod
    def final(cls, rec: Recording, places: Sequence[tuple[int, str]], *, own: bool) -> "States":
        """The final stream, which every addend is a part of."""
        return cls.given(rec, rec.work(rec.resid_final)[None], own=own, index=dict.fromkeys(places, 0))

    @classmethod
    def given(
        cls,
        rec: Recording,
        x: Float[Tensor, "state d_model"],
        *,
        own: bool,
        index: dict[tuple[int, str], int],
        constants: bool = True,
    ) -> "States":
        """Any states."""
        readout = Readout.of(rec)
        if not constants:
            readout = replace(readout, constants=None)
        bs = readout.columns(readout.norm.linear(x, readout.norm.scale(x) if own else readout.s))
        if readout.constants is not None:
            bs += readout.constants[:, None]
        z = readout.cap(bs)
        top = z.amax(0)
        p = (z - top).exp_()
        total = p.sum(0, dtype=torch.float64)  # a plain float32 sum over 50k rows is off by 1e-4
        p /= total.to(p.dtype)
        return cls(readout, own, rec.prompt.target, x, bs, p, (total.log() + top).to(p.dtype), index)

    def normed(self, which: Int[Tensor, " n"], v: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """N(x + v) - N(x): linear in v under the frozen norm."""
        norm, s = self.readout.norm, self.readout.s
        if not self.own:
            return norm.linear(v, s)
        x = self.x[which]
        moved = x + v
        return norm.linear(moved, norm.scale(moved)) - norm.linear(x, norm.scale(x))

    def evaluate(self, which: Int[Tensor, " n"], v: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """Exact C(v, x) of vectors, each added to its own state; one vocabulary product."""
        rows = self.chunk
        out = [self._evaluate(which[i : i + rows], v[i : i + rows]) for i in range(0, len(v), rows)]
        return torch.cat(out) if out else v.new_zeros(0)

    @property
    def log_p(self) -> Float[Tensor, " state"]:
        """log p(w, x) of every state, also where p itself is too small to be kept."""
        return self.readout.cap(self.bs[self.token]) - self.log_z

    @property
    def chunk(self) -> int:
        """How many vectors are evaluated at once, for bounded memory."""
        return max(1, EVALUATE_BYTES // (self.bs.shape[0] * self.bs.element_size()))

    def _evaluate(self, which: Tensor, v: Tensor) -> Tensor:
        return self._gain(which, self.readout.columns(self.normed(which, v)))

    def of_columns(
        self,
        state: int,
        columns: Float[Tensor, "vocabulary n"],
        directions: Float[Tensor, "n d_model"],
        c: Float[Tensor, " n"],
        out: Float[Tensor, "vocabulary n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Exact C(c v, x) of directions v whose columns W_U gain centre(v) are known; no vocabulary product.

        D = c W_U gain centre(v) / s, and under the own norm + (s(x) / s(x + c v) - 1) bs(x); worked out in `out`.
        """
        norm, x = self.readout.norm, self.x[state]
        s = norm.scale(x + directions * c[:, None])[:, 0] if self.own else self.readout.s
        d = torch.mul(columns, c / s, out=out)
        if self.own:
            bare = self.bs[:, state] if self.readout.constants is None else self.bs[:, state] - self.readout.constants
            d.addr_(bare, norm.scale(x) / s - 1)
        return self._gain(torch.full((len(c),), state, device=d.device), d)

    def _gain(self, which: Tensor, d: Float[Tensor, "vocabulary n"]) -> Tensor:
        """C from D, which is destroyed.

        With mu = sum p D, C = (D_w - mu) - log1p(sum p (exp(D - mu) - 1)): what all tokens have in common drops out
        before anything is exponentiated, and the sum is never negative (Jensen), so that nothing cancels. Exact for
        small D, and C(0) = 0.
        """
        if self.readout.model.anatomy.logit_cap is not None:
            bs = self.bs[:, which]
            d = self.readout.cap(bs + d).sub_(self.readout.cap(bs))
        states, home = torch.unique(which, return_inverse=True)
        p, columns = self.p[:, states], torch.arange(d.shape[1])
        d -= blocked_product(p, d)[home, columns]
        gain = d[self.token].clone()
        far = torch.zeros_like(gain, dtype=torch.bool)
        if d.numel() and float(torch.stack(d.aminmax()).abs().max()) > SAFE_EXPONENT:
            far = torch.maximum(d.amax(0), -d.amin(0)) > SAFE_EXPONENT
        beyond = self._log_mean_exp(which[far.to(which.device)], d[:, far]) if bool(far.any()) else None
        d.expm1_()
        logs = blocked_product(p, d)[home, columns].log1p_()
        if beyond is not None:
            logs[far] = beyond
        return gain - logs

    def _log_mean_exp(self, which: Tensor, d: Tensor) -> Tensor:
        """log sum_i p_i exp(D_i) in the log domain, where exp would overflow or p has underflowed."""
        d = d + self.readout.cap(self.bs[:, which])
        top = d.amax(0)
        total = d.sub_(top).exp_().sum(0, dtype=torch.float64)
        return (total.log() + top - self.log_z[which]).to(d.dtype)


def logsumexp_(z: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """Row-wise log-sum-exp, destroying z: the maximum is subtracted and exp taken in place."""
    top = z.amax(-1, keepdim=True)
    return z.sub_(top).exp_().sum(-1).log_() + top[:, 0]

"""Measures: what a final stream says about a prediction, against the clean one.

With b the bs-values (logits before a soft-cap), l = cap(b), p = softmax(l) after and p0 before:
log p(w) = l_w - log sum exp l (nats), KL(p0 || p) = sum p0 (log p0 - log p), entropy = -sum p log p (nats).
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.states import SAFE_EXPONENT
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import bs_columns
from resid_surgery.stream.vocabulary import Readout, blocked_product

MEASURES = ("bs", "log_prob", "all")
ROWS = 256
BLOCK_BYTES = 8 << 20


def kl_divergence(clean: Float[Tensor, " vocabulary"], logits: Float[Tensor, " vocabulary"]) -> float:
    """KL(p0 || p) in nats, of logits."""
    p0, p = torch.log_softmax(clean.double(), -1), torch.log_softmax(logits.double(), -1)
    return float((p0.exp() * (p0 - p)).sum())


def entropy(logits: Float[Tensor, " vocabulary"]) -> float:
    """-sum p log p in nats, of logits."""
    p = torch.log_softmax(logits.double(), -1)
    return float(-(p.exp() * p).sum())


@final
@dataclass(eq=False)
class Meter:
    """Measures many final streams against a clean one, a block of rows at a time.

    With D the change of every logit, less what all have in common: log p(w) changes by D_w - log sum p0 e^D, and
    KL = log sum p0 e^D - sum p0 D, both without cancellation for small changes and for large common ones.

    Attributes:
        rec: the recording. measure: "bs" (no product with the vocabulary), "log_prob" or "all".
    """

    rec: Recording
    measure: str

    def __post_init__(self) -> None:
        rec, work = self.rec, self.rec.work
        self.readout = Readout.of(rec)
        self.tokens = list(rec.prompt.readouts)
        self.names = bs_columns(rec)
        self.rows = self.readout.rows(self.tokens)
        self.h = self.readout.norm(work(rec.resid_final))
        self.bs, self.logits = work(rec.bs_values), work(rec.logits)
        self.log_p = torch.log_softmax(self.logits.double(), -1).to(self.logits)
        self.p = self.log_p.exp()
        self.centre = self.readout.mix(self.p[None])[0]
        self.block = max(1, BLOCK_BYTES // (ROWS * self.p.element_size()))

    def clean(self) -> dict[str, float]:
        """What the measures are of the clean run."""
        found = {name: float(self.bs[token]) for name, token in zip(self.names, self.tokens, strict=True)}
        if self.measure != "bs":
            w = self.tokens[0]
            found |= {"log_prob": float(self.log_p[w]), "prob": float(self.p[w])}
        if self.measure == "all":
            found |= {"rank": 1 + float((self.logits > self.logits[w]).sum()), "entropy": entropy(self.logits)}
        return found

    def read(self, h: Float[Tensor, "n d_model"]) -> dict[str, Tensor]:
        """Columns of rows whose final stream reads as h = N(r), bias included."""
        moved = h - self.h
        change = moved @ self.rows.T
        columns = {}
        for i, name in enumerate(self.names):
            columns[name] = self.bs[self.tokens[i]] + change[:, i]
            columns[name.replace("bs_", "bs_change_")] = change[:, i]
        if self.measure != "bs":
            pieces = [self._vocabulary(moved[low : low + ROWS]) for low in range(0, len(h), ROWS)]
            columns |= {name: torch.cat([one[name] for one in pieces]) for name in pieces[0]}
        return columns

    def _vocabulary(self, moved: Tensor) -> dict[str, Tensor]:
        """What needs every logit; the vocabulary is passed a block at a time, nothing of its size is held."""
        n, w, everything = len(moved), self.tokens[0], self.measure == "all"
        common = self._common(moved)
        raw = self._changes(moved, slice(w, w + 1))[0, :n]
        gain = raw - common
        sums = _Sums(n, self.p)
        for low in range(0, len(self.p), self.block):
            here = slice(low, low + self.block)
            d, p = self._changes(moved, here)[:, :n], self.p[here]
            if low <= w < low + self.block:
                d[w - low] = raw  # to the bit, or the target would stand above itself
            if everything:
                sums.rank(self.logits[here, None] + d, self.logits[w] + raw, low)
            sums.add(d.sub_(common), p, self.log_p[here], everything)
        log_z = sums.log_z()
        columns = {"log_prob": self.log_p[w] + gain - log_z, "log_prob_change": gain - log_z}
        columns["prob"] = columns["log_prob"].exp()
        columns["kl"] = (log_z - sums.mean).clamp_min(0)
        if everything:
            columns |= {"rank": 1 + sums.above, "top_id": sums.best, "entropy": sums.entropy(log_z)}
        return columns

    def _common(self, moved: Tensor) -> Float[Tensor, " n"]:
        """What is taken off every change of a row before it is exponentiated: it drops out of probabilities, and
        without it sums would cancel. The mean under p0, so that no sum is negative (Jensen); under a soft-cap, whose
        changes have no mean at this price, the change of the clean run's top token."""
        if self.rec.model.anatomy.logit_cap is None:
            return moved @ self.centre
        top = int(self.p.argmax())
        return self._changes(moved, slice(top, top + 1))[0, : len(moved)]

    def _changes(self, moved: Tensor, here: slice) -> Float[Tensor, "token n"]:
        """How some tokens' logits change: W_U moved, through the soft-cap where there is one.

        The product is padded to whole vectors of rows: an odd number of them takes half as long again.
        """
        w = self.rec.model.unembedding[here].to(moved.dtype)
        turned = torch.nn.functional.pad(moved, (0, 0, 0, -len(moved) % 32)).T.contiguous()
        d = w @ turned
        if self.rec.model.anatomy.logit_cap is None:
            return d
        return self.readout.cap(self.bs[here, None] + d).sub_(self.logits[here, None])


@final
class _Sums:
    """Sums over the vocabulary of what needs all of it, a block at a time.

    log sum p e^D is kept as log1p of sum p (e^D - 1), exact for small D, and in the log domain where e^D overflows.
    """

    def __init__(self, n: int, like: Tensor) -> None:
        self.excess = torch.zeros(n, dtype=torch.float64, device=like.device)
        self.far = torch.full((n,), -torch.inf, dtype=torch.float64, device=like.device)
        self.mean, self.moment = torch.zeros_like(self.excess), torch.zeros_like(self.excess)
        self.above = torch.zeros(n, dtype=torch.int64, device=like.device)
        self.best, self.highest = torch.zeros_like(self.above), torch.full_like(self.far, -torch.inf)
        self.safe, self.like, self.passed = True, like, 0.0

    def rank(self, logits: Tensor, wanted: Tensor, low: int) -> None:
        """Count what stands above the target, and keep the highest."""
        self.above += (logits > wanted).sum(0)
        top, at = logits.max(0)
        self.best = torch.where(top > self.highest, at + low, self.best)
        self.highest = torch.maximum(self.highest, top.double())

    def add(self, d: Tensor, p: Tensor, log_p: Tensor, moment: bool) -> None:
        """Add a block; d is destroyed."""
        self.mean += blocked_product(p[:, None], d)[0]
        safe = float(torch.stack(d.aminmax()).abs().max()) <= SAFE_EXPONENT
        if not safe and self.safe:  # what was summed so far goes on in the log domain
            self.safe = False
            self.far = self.far if moment else (self.excess + self.passed).log()
        if moment or not self.safe:
            logs = log_p[:, None].double() + d.double()
            self.far = torch.logaddexp(self.far, logs.logsumexp(0))
            if moment:
                self.moment += (logs.exp() * logs).nan_to_num(0.0).sum(0)
        if self.safe:
            self.excess += blocked_product(p[:, None], d.expm1_())[0]
        self.passed += float(p.double().sum())

    def log_z(self) -> Tensor:
        """log sum p e^D."""
        return (self.excess.log1p() if self.safe else self.far).to(self.like)

    def entropy(self, log_z: Tensor) -> Tensor:
        """-sum q log q with q = p e^D / Z."""
        z = log_z.double()
        return (z - self.moment / z.exp()).to(self.like)

"""Measures: what a final stream says about a prediction, against the clean one.

With b the bs-values (logits before a soft-cap), l = cap(b), p = softmax(l) after and p0 before:
log p(w) = l_w - log sum exp l (nats), KL(p0 || p) = sum p0 (log p0 - log p), entropy = -sum p log p (nats).
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.scores import SAFE_EXPONENT, blocked_product
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import bs_columns
from resid_surgery.stream.vocabulary import Readout

MEASURES = ("bs", "log_prob", "all")
BLOCK_BYTES = 64 << 20


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

    With D the change of every logit: log p(w) changes by D_w - log sum p0 e^D, and KL = log sum p0 e^D - sum p0 D,
    both without cancellation for small changes.

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
        self.block = max(1, BLOCK_BYTES // (len(self.p) * self.p.element_size()))
        self._buffer: Tensor | None = None

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
            blocks = [self._block(moved[low : low + self.block]) for low in range(0, len(h), self.block)]
            columns |= {name: torch.cat([one[name] for one in blocks]) for name in blocks[0]}
        return columns

    def _block(self, moved: Tensor) -> dict[str, Tensor]:
        d, w = self._changes(moved), self.tokens[0]
        gain, mean, p = d[w].clone(), blocked_product(self.p[:, None], d)[0], self.p[:, None]
        columns: dict[str, Tensor] = {}
        safe = float(torch.stack(d.aminmax()).abs().max()) <= SAFE_EXPONENT
        if self.measure == "all" or not safe:
            logits = self.logits[:, None] + d
        if safe:
            log_z = blocked_product(p, d.expm1_())[0].log1p_()  # exact for small changes
        else:
            log_z = torch.logsumexp(logits.double(), 0).to(d) - torch.logsumexp(self.logits.double(), 0).to(d)
        columns["log_prob"] = self.log_p[w] + gain - log_z
        columns["log_prob_change"] = gain - log_z
        columns["prob"] = columns["log_prob"].exp()
        columns["kl"] = (log_z - mean).clamp_min(0)
        if self.measure == "all":
            columns["rank"] = 1 + (logits > logits[w]).sum(0)
            columns["top_id"] = logits.argmax(0)
            logp = torch.log_softmax(logits.double(), 0)
            columns["entropy"] = -(logp.exp() * logp).sum(0).to(d)
        return columns

    def _changes(self, moved: Tensor) -> Float[Tensor, "vocabulary n"]:
        """How every logit changes: W_U moved, through the soft-cap where there is one."""
        w = self.rec.model.unembedding
        if w.dtype == moved.dtype:
            if self._buffer is None or self._buffer.numel() < len(w) * len(moved):
                self._buffer = torch.empty(len(w) * len(moved), dtype=moved.dtype, device=moved.device)
            d = torch.mm(w, moved.T, out=self._buffer[: len(w) * len(moved)].view(len(w), len(moved)))
        else:
            d = self.readout.columns(moved)
        if self.rec.model.anatomy.logit_cap is None:
            return d
        return self.readout.cap(self.bs[:, None] + d).sub_(self.logits[:, None])

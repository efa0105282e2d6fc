"""What a vector says in the vocabulary: bs-values, the frozen norm, the logit lens.

``bs_values`` and ``logit_lens`` are never the same function. A bs-value reads a *part* of the stream
under the final norm's scale s of the whole (frozen), and so adds up. The logit lens reads a *state*
with its own scale, and does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import Norm
from resid_surgery.models.prompts import token_text
from resid_surgery.stream.recording import Recording

CHUNK_BYTES = 64 << 20
LANES = 16


@final
@dataclass(frozen=True, eq=False)
class Readout:
    """The final norm and the unembedding, with the scale of one recording's final stream.

    N_s(v) = gamma * centre(v) / s,  bs(v) = W_U N_s(v),  logits = cap(bs(x) + constants).

    Attributes:
        model: whose readout it is. norm: the final norm. s: (1,) the frozen scale.
        constants: (vocabulary,) W_U beta + b_U, never part of a vector.
    """

    model: OpenedModel
    norm: Norm
    s: Float[Tensor, "1"]
    constants: Float[Tensor, " vocabulary"] | None

    @classmethod
    def of(cls, rec: Recording) -> "Readout":
        """The readout of a recording, frozen at its final stream."""
        model = rec.model
        norm = model.norm(None, "final_norm")
        readout = cls(model, norm, norm.scale(rec.work(rec.resid_final)), None)
        named = readout.named_constants()
        total = sum((v for v in named.values()), torch.zeros(())) if named else None
        return cls(model, norm, readout.s, total)

    def named_constants(self) -> dict[str, Float[Tensor, " vocabulary"]]:
        """The readout's constants by name: final-norm bias through W_U, unembedding bias."""
        out: dict[str, Tensor] = {}
        if bool(self.norm.bias.any()):
            out["final_norm.bias"] = self.product(self.norm.bias[None])[0]
        bias = self.model.unembedding_bias
        if bias is not None:
            out["unembed.bias"] = bias.to(self.norm.gain.dtype)
        return out

    def product(self, h: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
        """h W_U^T in the working dtype, upcasting the unembedding a slice at a time."""
        w = self.model.unembedding
        if w.dtype == h.dtype:
            return h @ w.T
        out = torch.empty(h.shape[0], w.shape[0], dtype=h.dtype, device=h.device)
        step = max(1, CHUNK_BYTES // (w.shape[1] * h.element_size()))
        for low in range(0, w.shape[0], step):
            out[:, low : low + step] = h @ w[low : low + step].to(h.dtype).T
        return out

    def columns(
        self, h: Float[Tensor, "n d_model"], out: Float[Tensor, "vocabulary n"] | None = None
    ) -> Float[Tensor, "vocabulary n"]:
        """W_U h^T: `product` with the vocabulary first, which is the faster order; into `out` where it can."""
        w, n = self.model.unembedding, len(h)
        if w.dtype != h.dtype:
            return self.product(h).T.contiguous()
        if out is not None or n % LANES == 0:
            return torch.mm(w, h.T, out=out)
        padded = torch.nn.functional.pad(h, (0, 0, 0, -n % LANES))  # an odd number of columns takes half as long again
        return torch.mm(w, padded.T)[:, :n].contiguous()

    def mix(self, p: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n d_model"]:
        """p W_U: the unembedding rows averaged with weights p, sliced like `product`."""
        w = self.model.unembedding
        if w.dtype == p.dtype:
            least = w.numel() * len(p) * w.element_size() // CHUNK_BYTES  # block sums of bounded size
            return blocked_product(p.T, w, max(512, least))
        out = torch.zeros(p.shape[0], w.shape[1], dtype=p.dtype, device=p.device)
        step = max(1, CHUNK_BYTES // (w.shape[1] * p.element_size()))
        for low in range(0, w.shape[0], step):
            out += p[:, low : low + step] @ w[low : low + step].to(p.dtype)
        return out

    def rows(self, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
        """W_U's rows of some tokens, in the working dtype."""
        return self.model.unembedding[list(tokens)].to(self.norm.gain.dtype)

    def directions(self, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
        """Vectors whose dot product with v is the token's bs-value of v under the frozen norm."""
        return self.norm.pull(self.rows(tokens), self.s)

    def bs(self, v: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
        """bs-values of vectors under the frozen norm, without constants: bs(a+b) = bs(a) + bs(b)."""
        return self.product(self.norm.linear(v, self.s))

    def state(self, x: Float[Tensor, "n d_model"], *, own: bool = False) -> Float[Tensor, "n vocabulary"]:
        """bs-values of states x, constants included, before a soft-cap; frozen or own scale."""
        bs = self.product(self.norm.linear(x, self.norm.scale(x) if own else self.s))
        return bs if self.constants is None else bs.add_(self.constants)

    def cap(self, bs: Tensor) -> Tensor:
        """The final soft-cap c tanh(bs / c), or the identity where the family has none."""
        c = self.model.anatomy.logit_cap
        return bs if c is None else torch.tanh(bs / c) * c

    def lens(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
        """Logit lens: log p(. | x) of states read with their *own* norm; nats."""
        return torch.log_softmax(self.cap(self.state(x, own=True)), -1)


def blocked_product(
    p: Float[Tensor, "vocabulary state"], d: Float[Tensor, "vocabulary n"], block: int = 512
) -> Float[Tensor, "state n"]:
    """p^T d, summed in blocks: one long float32 product would be off by 1e-4 over 50k rows."""
    n = len(p) // block * block
    left, right = (x[:n].reshape(n // block, block, x.shape[1]) for x in (p, d))
    return torch.bmm(left.transpose(1, 2), right).sum(0) + p[n:].T @ d[n:]


def token_names(model: OpenedModel, tokens: Sequence[int]) -> list[str]:
    """Texts of tokens."""
    return [token_text(int(i), model.tokenizer) for i in tokens]

"""The log-probability-increase score C(v, x) = log p(w, x + v) - log p(w, x), in nats.

p = softmax(cap(bs(.))) under the frozen norm of the final stream (the paper's convention, default)
or each state's own norm. x is resid_mid for an MLP and its neurons, resid_pre for attention, its
heads and (head, source) pairs (resid_pre for both in a parallel block); the readout's constants
belong to x. C(0) = 0, and C is not additive.

For one state x everything about it that does not depend on v is computed once (`States`), and many v
are then scored as D = bs(x + v) - bs(x),  C = D_w - log sum_i p_i exp(D_i).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery import _check
from resid_surgery.errors import SiteError
from resid_surgery.stream.blocks import Block
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.subvalues import KINDS, candidates, state_of
from resid_surgery.stream.vocabulary import Readout

NORMS = ("frozen", "own")
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
        """The states of (layer, part) places; two vocabulary products for all of them."""
        readout = Readout.of(rec)
        distinct: dict[tuple[int, str], int] = {}
        vectors: list[Tensor] = []
        index: dict[tuple[int, str], int] = {}
        for layer, part in places:
            key = (layer, "pre" if part == "attn" or not rec.model.anatomy.between(layer) else "mid")
            if key not in distinct:
                distinct[key] = len(vectors)
                vectors.append(state_of(rec, layer, part))
            index[layer, part] = distinct[key]
        x = torch.stack(vectors)
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
    def chunk(self) -> int:
        """How many vectors are evaluated at once, for bounded memory."""
        return max(1, EVALUATE_BYTES // (self.bs.shape[0] * self.bs.element_size()))

    def _evaluate(self, which: Tensor, v: Tensor) -> Tensor:
        d = self.readout.columns(self.normed(which, v))
        if self.readout.model.anatomy.logit_cap is not None:
            bs = self.bs[:, which]
            d = self.readout.cap(bs + d).sub_(self.readout.cap(bs))
        gain = d[self.token].clone()
        if float(torch.stack(d.aminmax()).abs().max()) > SAFE_EXPONENT:
            return gain - self._log_mean_exp(which, d)
        d.expm1_()  # log sum p exp(D) = log1p(sum p (exp(D) - 1)): exact for small D, and C(0) = 0
        states, home = torch.unique(which, return_inverse=True)
        sums = blocked_product(self.p[:, states], d)[home, torch.arange(d.shape[1])]
        return gain - sums.log1p_()

    def _log_mean_exp(self, which: Tensor, d: Tensor) -> Tensor:
        """log sum_i p_i exp(D_i) in the log domain, where exp would overflow or p has underflowed."""
        d += self.readout.cap(self.bs[:, which])
        top = d.amax(0)
        total = d.sub_(top).exp_().sum(0, dtype=torch.float64)
        return (total.log() + top - self.log_z[which]).to(d.dtype)


def blocked_product(
    p: Float[Tensor, "vocabulary state"], d: Float[Tensor, "vocabulary n"], block: int = 512
) -> Float[Tensor, "state n"]:
    """p^T d, summed in blocks: one long float32 product would be off by 1e-4 over 50k rows."""
    n = len(p) // block * block
    left, right = (x[:n].reshape(n // block, block, x.shape[1]) for x in (p, d))
    return torch.bmm(left.transpose(1, 2), right).sum(0) + p[n:].T @ d[n:]


def logsumexp_(z: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """Row-wise log-sum-exp, destroying z: the maximum is subtracted and exp taken in place."""
    top = z.amax(-1, keepdim=True)
    return z.sub_(top).exp_().sum(-1).log_() + top[:, 0]


def places_of(rec: Recording, kind: str, layers: Sequence[int]) -> Iterator[tuple[int, str, Block]]:
    """(layer, part, block) of every candidate block of a kind."""
    for layer in layers:
        for part, block in candidates(rec, kind, layer):
            yield layer, part, block


def need_places(rec: Recording, kind: str, layers: Sequence[int]) -> list[tuple[int, str, Block]]:
    """`places_of`, refusing layers that have nothing of that kind.

    Raises:
        SiteError: none of the layers has subvalues of the kind.
    """
    places = list(places_of(rec, kind, layers))
    if not places:
        part = "mlp" if kind == "neuron" else "attn"
        rec.model.anatomy.require(layers[0], part, kind)
        raise SiteError(f"`layers` {list(layers)} of {rec.model.name} have nothing of kind '{kind}'.")
    return places


def scores(rec: Recording, *, kind: str = "neuron", norm: str = "frozen", layers: Any = None) -> pd.DataFrame:
    """The exact log-prob increase of *every* subvalue of a kind (paper: contribution score).

    C(v, x) = log p(w, x + v) - log p(w, x), nats. One vocabulary product per subvalue, streamed in
    bounded memory: half a minute for all neurons of the embedded model. `locate` proves the best
    few in less than a hundredth of that.

    Args:
        rec: a recording. kind: "neuron", "head", "head_source", "attn_neuron" or "layer".
        norm: "frozen" (scale of the final stream) or "own" (scale of each state).
        layers: None for all, or some.

    Returns:
        Columns: site, kind, layer, log_prob_increase (nats), norm, position.

    Raises:
        ArgumentError: unknown kind, norm or layer. StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141, equation for log probability increase.
    """
    picked = check_query(rec, kind, norm, layers)
    need_recording(rec)
    blocks = need_places(rec, kind, picked)
    states = States.of(rec, [(layer, part) for layer, part, _ in blocks], own=norm == "own")
    frames = []
    for layer, part, block in blocks:
        members = torch.arange(block.count)
        values = evaluate_block(states, states.index[layer, part], block, members)
        frames.append(
            pd.DataFrame(
                {
                    "site": [str(block.site(i)) for i in range(block.count)],
                    "kind": block.kind,
                    "layer": layer,
                    "log_prob_increase": values.double().cpu().numpy(),
                }
            )
        )
    table = pd.concat(frames, ignore_index=True)
    table["norm"], table["position"] = norm, rec.prompt.position
    return table


def evaluate_block(states: States, state: int, block: Block, members: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Exact scores of some members of a block, streamed; exactly 0 where the addend is zero."""
    step, out = states.chunk, []
    for low in range(0, len(members), step):
        part = members[low : low + step]
        which = torch.full((len(part),), state)
        out.append(states.evaluate(which, block.vectors(part)))
    values = torch.cat(out)
    if block.zero is not None:
        values[block.zero[members]] = 0.0
    return values


def check_query(rec: Any, kind: Any, norm: Any, layers: Any) -> tuple[int, ...]:
    """Validate the arguments that scoring verbs share; the layers as indices."""
    _check.choice("kind", kind, KINDS)
    _check.choice("norm", norm, NORMS)
    be_recording(rec)
    return _check.layers(layers, rec.model.anatomy.n_layers, model=rec.model.name)

"""Embeddings: what the model makes of a token alone, as a vector of the stream.

What enters the first block is, in most families, factor * W_E[token] plus what is the same for every token at a
position. The factor is measured on a few tokens, and that nothing else is there is checked; where more stands between
(a norm, a projection) the first block's input is read for each token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.weights import per_weights
from resid_surgery.errors import SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import closure_tolerance, reach

PROBES = 16
AT_ONCE = 64
CHUNK = 4096


@final
@dataclass(frozen=True, eq=False)
class Embeddings:
    """Tokens as vectors of the stream before the first block.

    Attributes:
        model: whose. weight: (token, d_model) in the model's dtype. factor: vector = factor * weight[token].
    """

    model: OpenedModel
    weight: Float[Tensor, "token d_model"]
    factor: float

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, tokens: Sequence[int]) -> Float[Tensor, "n d_model"]:
        """Vectors of some tokens, in the working dtype."""
        return self.model.work(self.weight[list(tokens)]) * self.factor

    def chunks(self) -> Iterator[tuple[int, Float[Tensor, "n d_model"]]]:
        """(first token, vectors) of all tokens that have an unembedding, some thousand at a time."""
        last = min(len(self), self.model.vocab_size)
        for low in range(0, last, CHUNK):
            yield low, self.model.work(self.weight[low : min(low + CHUNK, last)]) * self.factor


def embeddings(model: OpenedModel) -> Embeddings:
    """Every token's embedding as the model makes it, its multipliers included.

    What all tokens have in common at a position (its position embedding) is left out where that can be told apart.
    """
    kept = per_weights(model)
    if "embeddings" not in kept:
        kept["embeddings"] = _measured(model)
    weight, factor = kept["embeddings"]
    return Embeddings(model, weight, factor)


def _measured(model: OpenedModel) -> tuple[Tensor, float]:
    weight: Tensor = model.shadow.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokens = torch.linspace(0, len(weight) - 1, min(PROBES, len(weight))).long().tolist()
    found = _read(model, tokens)
    if weight.shape[1] == found.shape[1]:
        given = model.work(weight[tokens])
        a, b = given - given.mean(0), found - found.mean(0)
        factor = float((a * b).sum() / a.square().sum().clamp_min(1e-30))
        if float((b - factor * a).abs().max()) <= 10 * closure_tolerance(model) * float(found.abs().max()):
            return weight, factor
    everything = [_read(model, list(range(low, min(low + AT_ONCE, len(weight))))).to(model.dtype)
                  for low in range(0, len(weight), AT_ONCE)]  # fmt: skip
    return torch.cat(everything), 1.0


def _read(model: OpenedModel, tokens: Sequence[int], writes: Any = None, tap: Tap | None = None) -> Tensor:
    """The first block's input (or another tap) of one-token prompts."""
    tap = tap or Tap("block_in", 0)
    device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
    found = []
    for some in torch.split(torch.tensor(list(tokens), device=device)[:, None], AT_ONCE):
        found.append(forward(model, some, [tap], writes, at=0)[tap][:, 0])
    return model.work(torch.cat(found))


def after_first_mlp(model: OpenedModel, tokens: Sequence[int]) -> Float[Tensor, "n d_model"]:
    """What leaves the first block when each token stands alone and the block's attention writes nothing.

    Raises:
        SiteError: the first block has no MLP.
    """
    model.anatomy.require(0, "mlp", "after='mlp0'", whole=True)
    add = Tap("attn_add", 0)
    writes = {} if model.block(0).attn_kind == "none" else {add: lambda found, _: torch.zeros_like(found)}
    return _read(model, tokens, writes, Tap("block_out", 0))


def states_of(model: OpenedModel, tokens: Sequence[int], layer: int, after: str) -> Float[Tensor, "n d_model"]:
    """Tokens as a layer's attention finds them in the stream, with nothing else written there.

    Raises:
        SiteError: ``after="mlp0"`` for the first layer, which reads before it.
    """
    if after == "embed":
        return embeddings(model).rows(tokens) * reach(model, 0, "pre", (layer, "attn"))
    if layer == 0:
        raise SiteError(
            f"`after` must be 'embed' for heads of layer 0 of {model.name}: they read before the first MLP."
        )
    return after_first_mlp(model, tokens) * reach(model, 0, "mlp", (layer, "attn"))

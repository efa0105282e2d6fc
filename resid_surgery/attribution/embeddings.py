"""Embeddings: what the model makes of a token alone, as a vector of the stream.

What enters the first block is, in most families, factor * W_E[token] plus what is the same for every token at a
position. The factor is measured on a few tokens, and that nothing else is there is checked; where more stands between
(a norm, a projection) the first block's input is read for each token. After the first block's MLP (its attention
writing nothing) a token is what later layers find of it: its effective embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.weights import per_weights
from resid_surgery.errors import SiteError
from resid_surgery.models.envoys import Write
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.closing import coefficient_from
from resid_surgery.stream.recording import reach
from resid_surgery.stream.records import NeuronGroup

AFTER = ("embed", "mlp0")
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


def embeddings(model: OpenedModel) -> Embeddings:
    """Every token's embedding as the model makes it, its multipliers included.

    What all tokens have in common at a position (its position embedding) is left out where that can be told apart.
    """
    kept = per_weights(model)
    if "embeddings" not in kept:
        kept["embeddings"] = _measured(model)
    weight, factor = kept["embeddings"]
    return Embeddings(model, weight, factor)


def token_states(
    model: OpenedModel, tokens: Sequence[int], layer: int | None, after: str
) -> Float[Tensor, "n d_model"]:
    """Tokens as a layer's attention finds them in the stream when nothing else is written there.

    Args:
        model: whose. tokens: ids. layer: that reads; None for as they are written. after: "embed", or "mlp0": with what
            the first MLP adds to it.
    """
    rows = embeddings(model).rows(tokens)
    states = rows if after == "embed" else _after_first_mlp(model, rows)
    return states if layer is None else states * multiplied_until(model, layer, after)


def multiplied_until(model: OpenedModel, layer: int, after: str) -> Tensor | float:
    """What blocks multiply a token's state by before a layer's attention reads it (1 in most families)."""
    return reach(model, 0, "pre" if after == "embed" else "mlp", (layer, "attn"))


def all_states(model: OpenedModel, layer: int | None, after: str) -> Iterator[tuple[int, Float[Tensor, "n d_model"]]]:
    """(first token, states) of all tokens that have an unembedding, some thousand at a time."""
    last = min(len(embeddings(model)), model.vocab_size)
    for low in range(0, last, CHUNK):
        yield low, token_states(model, range(low, min(low + CHUNK, last)), layer, after)


def need_after(model: OpenedModel, after: str, layers: Sequence[int]) -> None:
    """Refuse tokens after the first MLP for who reads before it.

    Raises:
        SiteError: the first layer is among the readers, or has no MLP.
    """
    if after == "mlp0":
        model.anatomy.require(0, "mlp", "after='mlp0'", whole=True)
        if 0 in layers:
            raise SiteError(f"`after` must be 'embed' for heads of layer 0 of {model.name}: they read before its MLP.")


def _measured(model: OpenedModel) -> tuple[Tensor, float]:
    weight: Tensor = model.shadow.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokens = torch.linspace(0, len(weight) - 1, min(PROBES, len(weight)), dtype=torch.float64).long()
    found = _one_token(model, tokens, Tap("block_in", 0))
    if weight.shape[1] == found.shape[1]:
        given = model.work(weight[tokens.to(weight.device)])
        a, b = given - given.mean(0), found - found.mean(0)
        factor = float((a * b).sum() / a.square().sum().clamp_min(1e-30))
        near = max(4 * torch.finfo(model.dtype).eps, 1e-6)  # one product and one sum were rounded
        if float((b - factor * a).abs().max()) <= near * float(found.abs().max()):
            return weight, factor
    return _one_token(model, torch.arange(len(weight)), Tap("block_in", 0)).to(model.dtype), 1.0


def _one_token(
    model: OpenedModel, tokens: Tensor, tap: Tap, starts: Float[Tensor, "n d_model"] | None = None
) -> Float[Tensor, "n d_model"]:
    """What stands at a tap for one-token prompts; with `starts` given, what the first block reads instead, its
    attention writing nothing."""
    device, found = model.shadow.get_input_embeddings().weight.device, []  # type: ignore[operator]
    for low in range(0, len(tokens), AT_ONCE):
        some = tokens[low : low + AT_ONCE, None].to(device)
        writes = {} if starts is None else _alone(model, starts[low : low + AT_ONCE, None])
        found.append(model.work(forward(model, some, [tap], writes, at=0)[tap][:, 0]))
    return torch.cat(found)


def _alone(model: OpenedModel, starts: Float[Tensor, "n 1 d_model"]) -> dict[Tap, Write]:
    writes: dict[Tap, Write] = {Tap("block_in", 0): lambda found, _: starts.to(found)}
    if model.block(0).attn_kind != "none":
        writes[Tap("attn_add", 0)] = lambda found, _: torch.zeros_like(found)
    return writes


def _after_first_mlp(model: OpenedModel, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """What leaves the first block for states that enter it, when its attention writes nothing."""
    row = model.block(0)
    if row.mlp_kind != "neurons" or not row.keys or row.activation is None or row.mlp_with is not None:
        return _one_token(model, torch.zeros(len(x), dtype=torch.long), Tap("block_out", 0), x)
    mid = x if row.parallel else x * model.factor(0, "attn_carry")
    read = model.norm(0, "mlp_norm")(mid)
    pre = tuple(_affine(model, read, f"key{i}") for i in range(len(row.keys)))
    group = NeuronGroup(expert=None, factor=1.0, pre_activations=(), coefficient=pre[0][0])
    written = _affine(model, coefficient_from(model, 0, group, pre), "mlp_out")
    if model.has(0, "mlp_post_norm"):
        written = model.norm(0, "mlp_post_norm")(written)
    return mid * model.factor(0, "mlp_carry") + written * model.factor(0, "mlp_scale")


def _affine(model: OpenedModel, x: Float[Tensor, "n d_in"], part: str) -> Float[Tensor, "n d_out"]:
    made = model.rows(0, part)
    out = x @ model.work(made.rows)
    return out if made.bias is None else out + model.work(made.bias)

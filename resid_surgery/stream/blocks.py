"""Blocks: runs of addends of one layer and kind, never materialised until asked.

A `Block` knows how to project its members on directions (one matrix product), to give the vectors
of chosen members, and to name their sites. Ledgers, scores, bounds and sources are built from
`Block.project` and `Block.vectors`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import Norm
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording


@final
@dataclass(frozen=True, eq=False)
class PostMap:
    """What stands between a sublayer's output and the stream, frozen: v -> factor * gain * centre(v) / s.

    The identity (norm None, factor 1) where the family has neither post-norm nor multiplier.
    """

    norm: Norm | None = None
    s: Tensor | None = None
    factor: Tensor | float = 1.0

    @classmethod
    def of(cls, model: OpenedModel, layer: int, part: str, raw: Tensor) -> "PostMap":
        """The post-norm and multiplier of a sublayer, frozen at what it read in this run."""
        factor = model.factor(layer, f"{part}_scale")
        if not model.has(layer, f"{part}_post_norm"):
            return cls(factor=factor)
        norm = model.norm(layer, f"{part}_post_norm")
        return cls(norm, norm.scale(raw), factor)

    def then(self, factor: Tensor | float) -> "PostMap":
        """The same map followed by a multiplication."""
        return replace(self, factor=self.factor * factor)

    def push(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """A vector in the sublayer's output, as it reaches the stream."""
        if self.norm is not None and self.s is not None:
            v = self.norm.linear(v, self.s)
        return self._times(v)

    def unscaled(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """`push` times s: the part that depends on no recording."""
        return self._times(v if self.norm is None else self.norm.centre(v) * self.norm.gain)

    def pull(self, g: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """The transpose of `push`."""
        g = self._times(g)
        if self.norm is None or self.s is None:
            return g
        return self.norm.pull(g, self.s)

    def _times(self, v: Tensor) -> Tensor:
        return v if isinstance(self.factor, float) and self.factor == 1.0 else v * self.factor

    @property
    def constant(self) -> Tensor | None:
        """The post-norm's own bias, an addend of its own."""
        return None if self.norm is None or not bool(self.norm.bias.any()) else self._times(self.norm.bias)


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A run of addends v_i = push(sum_a parts[i, a] rows[row_of(i), a]) of one layer and kind.

    Attributes:
        kind: "embed", "attn", "mlp", "neuron", "head", "head_source", "attn_neuron", "bias",
            "constant" or "rounding". layer: or None.
        count: how many addends.
        project: (m, d_model) directions -> (m, count) dot products with every addend.
        vectors: (n,) member indices -> (n, d_model) their vectors.
        site: member index -> its site.
        squares: a linear map f (see `Square`) -> (count,) squared length of f(v).
        zero: (count,) True where the addend is exactly zero, if cheap to know.
    """

    kind: str
    layer: int | None
    count: int
    project: Callable[[Float[Tensor, "m d_model"]], Float[Tensor, "m count"]]
    vectors: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d_model"]]
    site: Callable[[int], Site]
    squares: Callable[["Square"], Float[Tensor, " count"]]
    zero: Tensor | None = None

    def all_vectors(self) -> Float[Tensor, "count d_model"]:
        """Every member's vector; meant for small blocks."""
        return self.vectors(torch.arange(self.count))


@final
@dataclass(frozen=True, eq=False)
class Square:
    """The linear map f(v) = gain * centre(v) (gain 1 if not `gained`) of a norm, whose squared
    lengths bounds need. Those of weight rows depend on no recording and are kept per model."""

    norm: Norm
    gained: bool

    def apply(self, v: Tensor) -> Tensor:
        """f(v)."""
        centred = self.norm.centre(v)
        return centred * self.norm.gain if self.gained else centred

    def of_rows(self, rec: Recording, key: tuple[Any, ...], rows: Tensor, post: "PostMap") -> Tensor:
        """(row,) squared lengths of f(push(row)) for weight rows named by `key`, kept per model."""
        key = (rec.fingerprint, self.gained, *key)
        kept = rec.model.cache.setdefault("row_squares", {})
        if key not in kept:
            for old in [k for k in kept if k[0] != rec.fingerprint]:
                kept.pop(old, None)
            kept[key] = self.apply(post.unscaled(rec.work(rows))).square().sum(-1)
        return kept[key] if post.s is None else kept[key] / post.s.square()  # type: ignore[no-any-return]


@final
class Numbering:
    """The members of several blocks under one numbering, in block order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.first = torch.tensor([0, *(block.count for block in blocks)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.first[-1])

    def home(self, numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Which block each number belongs to."""
        return torch.searchsorted(self.first, numbers, right=True) - 1

    def place(self, number: int) -> tuple[int, int]:
        """(block, member) of a number."""
        b = int(self.home(torch.tensor([number])))
        return b, number - int(self.first[b])

    def site(self, number: int) -> Site:
        """The site of a number."""
        b, member = self.place(number)
        return self.blocks[b].site(member)

    def vectors(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Their vectors, in the order given; one look-up a block."""
        home = self.home(numbers)
        parts, order = [], []
        for b in sorted(set(home.tolist())):
            mine = torch.nonzero(home == b)[:, 0]
            parts.append(self.blocks[b].vectors(numbers[mine] - self.first[b]))
            order.append(mine)
        found = torch.cat(parts)
        return found[torch.argsort(torch.cat(order)).to(found.device)]


def stored(kind: str, layer: int | None, vectors: Tensor, sites: Sequence[Site]) -> Block:
    """A block of given vectors (count, d_model)."""
    return Block(
        kind,
        layer,
        len(sites),
        project=lambda g: g @ vectors.T,
        vectors=lambda i: vectors[i.to(vectors.device)],
        site=lambda i: sites[i],
        squares=lambda f: f.apply(vectors).square().sum(-1),
    )


def multiplied(block: Block, times: Tensor | float) -> Block:
    """A block whose members are all multiplied by a number or, elementwise, a vector."""
    if isinstance(times, float) and times == 1.0:
        return block
    return replace(
        block,
        project=lambda g: block.project(g * times),
        vectors=lambda i: block.vectors(i) * times,
        squares=lambda f: f.apply(block.all_vectors() * times).square().sum(-1),
    )


def sum_of(blocks: Sequence[Block]) -> Float[Tensor, " d_model"]:
    """The sum of all vectors of some blocks."""
    out = blocks[0].all_vectors().sum(0)
    for block in blocks[1:]:
        out = out + block.all_vectors().sum(0)
    return out

"""Blocks: runs of addends of one layer and kind, never materialised until asked.

A `Block` knows how to project its members on directions (one matrix product), to give the vectors
of chosen members, and to name their sites. Ledgers, scores, bounds and sources are built from
`Block.project` and `Block.vectors`.
"""

from __future__ import annotations

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

AT_ONCE = 4096


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
    def of(cls, model: OpenedModel, layer: int, part: str, raw: Tensor) -> PostMap:
        """The post-norm and multiplier of a sublayer, frozen at what it read in this run."""
        factor = model.factor(layer, f"{part}_scale")
        if not model.has(layer, f"{part}_post_norm"):
            return cls(factor=factor)
        norm = model.norm(layer, f"{part}_post_norm")
        return cls(norm, norm.scale(raw), factor)

    def then(self, factor: Tensor | float) -> PostMap:
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
class Square:
    """A linear map f whose squared lengths |f(v)|^2 are asked for: of a norm, gain * centre(v) (gain 1 if not
    `gained`); the identity without one. Those of weight rows depend on no recording and are kept per model."""

    norm: Norm | None = None
    gained: bool = False

    def apply(self, v: Tensor) -> Tensor:
        """f(v)."""
        if self.norm is None:
            return v
        centred = self.norm.centre(v)
        return centred * self.norm.gain if self.gained else centred


@final
@dataclass(frozen=True, eq=False)
class WeightRows:
    """Rows of a projection as directions of the stream: direction_a = factor * push(row_a).

    What depends on the weights alone (lengths, ranges and ranks over the vocabulary) is kept per model, under
    `key` and the fingerprint, for ``post.unscaled(row)``; `scale` makes it this recording's.

    Attributes:
        key: names the rows. rows: (row, d_model). post: what stands between them and the stream.
        factor: of a router or the like; 1 elsewhere.
    """

    key: tuple[Any, ...]
    rows: Float[Tensor, "row d_model"]
    post: PostMap
    factor: float = 1.0

    @property
    def scale(self) -> Tensor | float:
        """direction = scale * post.unscaled(row)."""
        return self.factor if self.post.norm is None or self.post.s is None else self.factor / self.post.s

    def lengths(self, rec: Recording, f: Square) -> Float[Tensor, " row"]:
        """|f(direction)|^2."""
        key = (rec.fingerprint, f.norm is not None, f.gained, *self.key)
        kept = rec.model.cache.setdefault("row_squares", {})
        if key not in kept:
            for old in [k for k in kept if k[0] != rec.fingerprint]:
                kept.pop(old, None)
            kept[key] = f.apply(self.post.unscaled(rec.work(self.rows))).square().sum(-1)
        scale = self.scale
        return kept[key] * (scale * scale)  # type: ignore[no-any-return]


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A run of addends v_i = coefficient_i * direction_(i // per_row) of one layer and kind.

    Attributes:
        kind: "embed", "attn", "mlp", "neuron", "head", "head_source", "attn_neuron", "attn_neuron_source", "bias",
            "constant" or "rounding". layer: or None.
        count: how many addends.
        project: (m, d_model) directions -> (m, count) dot products with every addend.
        direction: (n,) numbers of directions -> (n, d_model).
        lengths: a linear map f (see `Square`) -> (count // per_row,) squared length of f(direction).
        site: member index -> its site.
        coefficient: (count,) or None, which is 1: whole vectors.
        per_row: addends that share a direction, one after the other.
        weights: the rows that the directions are, where they are weights. mixed: where they are mixtures of
            weight rows, (weights, (direction, row of its group) amounts, which group).
    """

    kind: str
    layer: int | None
    count: int
    project: Callable[[Float[Tensor, "m d_model"]], Float[Tensor, "m count"]]
    direction: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d_model"]]
    lengths: Callable[[Square], Float[Tensor, " directions"]]
    site: Callable[[int], Site]
    coefficient: Float[Tensor, " count"] | None = None
    per_row: int = 1
    weights: tuple[WeightRows, ...] = ()
    mixed: Mixed | None = None

    def vectors(self, i: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Members' vectors."""
        found = self.direction(i // self.per_row)
        return found if self.coefficient is None else found * self.coefficient[i.to(found.device), None]

    def squares(self, f: Square) -> Float[Tensor, " count"]:
        """|f(v)|^2 of every member."""
        found = self.lengths(f).repeat_interleave(self.per_row)
        return found if self.coefficient is None else found * self.coefficient.square()

    @property
    def zero(self) -> Tensor | None:
        """(count,) True where the addend is exactly zero, as far as coefficients show it."""
        return None if self.coefficient is None else self.coefficient == 0

    def total(self) -> Float[Tensor, " d_model"]:
        """The sum of every member's vector, a few thousand at a time."""
        parts = torch.split(torch.arange(self.count), AT_ONCE)
        return torch.stack([self.vectors(some).sum(0) for some in parts]).sum(0)

    def all_vectors(self) -> Float[Tensor, "count d_model"]:
        """Every member's vector; meant for small blocks."""
        return self.vectors(torch.arange(self.count))


@final
@dataclass(frozen=True, eq=False)
class Mixed:
    """Directions that are mixtures of weight rows: direction_(g, n) = sum_a amounts[g, n, a] * row_(g, a).

    Attributes:
        weights: the rows, group after group. amounts: (group, direction, row of the group).
    """

    weights: WeightRows
    amounts: Float[Tensor, "group n row"]


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
        direction=lambda i: vectors[i.to(vectors.device)],
        lengths=lambda f: f.apply(vectors).square().sum(-1),
        site=lambda i: sites[i],
    )


def multiplied(block: Block, times: Tensor | float) -> Block:
    """A block whose members are all multiplied by a number or, elementwise, a vector."""
    if isinstance(times, float) and times == 1.0:
        return block
    return replace(
        block,
        project=lambda g: block.project(g * times),
        direction=lambda i: block.direction(i) * times,
        lengths=lambda f: f.apply(block.direction(torch.arange(block.count // block.per_row)) * times).square().sum(-1),
        weights=(),
        mixed=None,
    )


def sum_of(blocks: Sequence[Block]) -> Float[Tensor, " d_model"]:
    """The sum of all vectors of some blocks."""
    out = blocks[0].total()
    for block in blocks[1:]:
        out = out + block.total()
    return out

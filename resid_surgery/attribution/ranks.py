"""Where a target stands among all tokens in a vector: rank = 1 + how many bs-values are higher.

The order that a direction gives the tokens depends on neither its length nor the norm's scale, and a negative
coefficient reverses it. For value vectors it depends on weights alone: how many tokens stand above and below a
target is counted once per target and kept.
"""

from collections.abc import Iterable
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resid_surgery.stream.blocks import Block, WeightRows
from resid_surgery.stream.recording import Recording

MOST_BYTES = 256 << 20
AT_ONCE = 128


def counts_in(
    columns: Float[Tensor, "vocabulary n"], tokens: Iterable[int]
) -> dict[int, tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """(above, below) of each token in every column: tokens with a higher, with a lower value."""
    out = {}
    for token in tokens:
        own = columns[token]
        out[token] = (_true(columns > own), _true(columns < own))
    return out


def _true(mask: Bool[Tensor, "vocabulary n"]) -> Int[Tensor, " n"]:
    """How many of each column are true; bytes first, which is many times faster than a plain sum."""
    whole = len(mask) // AT_ONCE * AT_ONCE
    head = mask[:whole].view(torch.uint8).reshape(-1, AT_ONCE, mask.shape[1])
    return (head.sum(1, dtype=torch.uint8).sum(0) + mask[whole:].sum(0)).int()


def rank_of(above: Tensor, below: Tensor, sign: Tensor, vocabulary: int) -> Float[Tensor, "*n"]:
    """Rank, ties sharing their mean; the order reversed where `sign` is negative, all tied where it is 0."""
    tied = (vocabulary - above - below).double()
    found = torch.where(sign < 0, below, above).double() + (tied + 1) / 2
    return torch.where(sign == 0, (vocabulary + 1) / 2, found)


@final
class Kept:
    """(above, below) of targets in value vectors, kept per model and fingerprint."""

    def __init__(self, rec: Recording) -> None:
        kept = rec.model.cache.setdefault("ranks", {})
        if rec.fingerprint not in kept:
            kept.clear()
            kept[rec.fingerprint] = {}
        self.kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = kept[rec.fingerprint]

    def missing(self, block: Block, tokens: Iterable[int]) -> list[int]:
        """The targets not yet counted in a block's rows; all of them where its directions are no weights."""
        rows, distinct = block.weights, dict.fromkeys(tokens)
        return [t for t in distinct if not rows or any((*one.key, t) not in self.kept for one in rows)]

    def get(self, block: Block, token: int) -> tuple[Tensor, Tensor, Tensor]:
        """(above, below, sign of the factor) of every direction of a block."""
        found = [self.kept[*rows.key, token] for rows in block.weights]
        signs = [torch.full_like(a, _sign(rows)) for rows, (a, _) in zip(block.weights, found, strict=True)]
        return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found]), torch.cat(signs)

    def put(self, block: Block, token: int, above: Tensor, below: Tensor) -> None:
        """Keep what was counted in a block's directions."""
        first = 0
        while self.kept and sum(2 * one.nbytes for one, _ in self.kept.values()) > MOST_BYTES:
            self.kept.pop(next(iter(self.kept)))  # the oldest
        for rows in block.weights:
            n = len(rows.rows)
            a, b, sign = above[first : first + n], below[first : first + n], _sign(rows)
            if sign:
                self.kept[*rows.key, token] = (a, b) if sign > 0 else (b, a)
            first += n


def _sign(rows: WeightRows) -> int:
    return (rows.factor > 0) - (rows.factor < 0)

"""Batches: where (row, position) lies in a forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

Place = tuple[int, int]  # (row of the batch, index along it)


@final
@dataclass(frozen=True)
class Rows:
    """Every row in a row of its own.

    Attributes:
        first: the first position that is computed; earlier ones are in the cache. span: how many are computed.
    """

    first: int
    span: int

    def place(self, row: int, position: int) -> Place:
        """Where a row's token is."""
        return row, position - self.first

    def places(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`place` of many."""
        return rows, positions - self.first

    def key(self, row: int, source: int) -> int:
        """Where a row's source is among the keys."""
        return source

    def begins(self, row: int) -> int:
        """The first position of a row that is computed."""
        return self.first

    @property
    def keys(self) -> int:
        """How many keys a row has."""
        return self.first + self.span


@final
@dataclass(eq=False)
class Packed:
    """Rows as tokens of one sequence, behind cached positions that all of them share.

    Each row has its own tokens from the first position that it changes up to the last; of the cache it sees what
    comes before that.

    Attributes:
        last: the last position. firsts: of each row, in order. cached: how many positions are in the cache.
    """

    last: int
    cached: int
    firsts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])

    def add(self, first: int) -> None:
        """One more row."""
        self.firsts.append(first)
        self.starts.append(self.starts[-1] + self.last + 1 - first)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.starts[-1]

    def place(self, row: int, position: int) -> Place:
        """Where a row's token is."""
        return 0, self.starts[row] + position - self.firsts[row]

    def places(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`place` of many."""
        starts, firsts = torch.tensor(self.starts), torch.tensor(self.firsts)
        return torch.zeros_like(rows), starts[rows] + positions - firsts[rows]

    def key(self, row: int, source: int) -> int:
        """Where a row's source is among the keys."""
        return source if source < self.firsts[row] else self.cached + self.starts[row] + source - self.firsts[row]

    def begins(self, row: int) -> int:
        """The first position of a row that is computed."""
        return self.firsts[row]

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.cached + self.tokens

    def rows(self) -> Tensor:
        """(token,) which row each is of."""
        lengths = torch.tensor(self.starts).diff()
        return torch.arange(len(self.firsts)).repeat_interleave(lengths)

    def positions(self) -> Tensor:
        """(token,) which position each is at."""
        rows = self.rows()
        return torch.arange(self.tokens) - torch.tensor(self.starts)[rows] + torch.tensor(self.firsts)[rows]


Batch = Rows | Packed

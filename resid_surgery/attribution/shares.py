"""Shares: readings split over everything that wrote into the stream before their reader.

    share(u) = direction_p . u    for every addend u at every position p that a reading hangs on

Weights are passed once for all readings; of every reading the largest shares are kept, and the sum of all.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.attribution.readings import Reading
from resid_surgery.sites import Constant, Site
from resid_surgery.stream.blocks import Block, multiplied, stored
from resid_surgery.stream.elsewhere import Elsewhere
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import read_by, sublayer_blocks

Place = tuple[int, str]
SHARE_BYTES = 32 << 20


@final
@dataclass(frozen=True, eq=False)
class Segment:
    """A run of writers: one block of one position, as it enters the stream there.

    Attributes:
        position, place: where; place is (layer, part), or (-1, "mlp") for the embedding. block: the addends.
    """

    position: int
    place: Place
    block: Block

    def times(self, rec: Recording, stop: Place | None) -> Tensor | float:
        """What later blocks multiply it by, up to a reader."""
        layer, part = self.place
        return rec.reach(0, "pre", stop) if layer < 0 else rec.reach(layer, part, stop)


@final
@dataclass(frozen=True, eq=False)
class Listed:
    """The largest shares of one reading, by size.

    Attributes:
        shares: (n,). segments: (n,) numbers of segments, -1 for rounding. members: (n,) in their blocks; of rounding
            the position. total: sum of all shares. size: of their absolute values. count: how many there are.
    """

    shares: Float[Tensor, " n"]
    segments: Int[Tensor, " n"]
    members: Int[Tensor, " n"]
    total: float
    size: float
    count: int


@final
@dataclass(eq=False)
class Writers:
    """Everything that may have switched something on, at one grain.

    Attributes:
        views: the run. grain: "layer", "head", "head_source", "neuron" or "subvalue".
        by_inner_product: keep the largest by the product with the plain key (paper: query score), not by share.
        segments: those made so far, a position after the other, in forward order.
    """

    views: Elsewhere
    grain: str
    by_inner_product: bool = False
    segments: list[Segment] = field(default_factory=list)
    _ends: dict[int, list[int]] = field(default_factory=dict)

    @property
    def rec(self) -> Recording:
        """The recording."""
        return self.views.rec

    def of(self, position: int) -> list[int]:
        """Numbers of the segments of a position."""
        if position not in self._ends:
            made = list(self._made(position))
            self._ends[position] = list(range(len(self.segments), len(self.segments) + len(made)))
            self.segments += made
        return self._ends[position]

    def _made(self, position: int) -> list[Segment]:
        view = self.views.at(position)
        embed = stored("embed", None, view.work(view.embed)[None], [Constant("embed")])
        made = [Segment(position, (-1, "mlp"), embed)]
        for layer in range(view.model.anatomy.n_layers):
            for part in ("attn", "mlp"):
                blocks = sublayer_blocks(view, layer, part, self.grain, 1.0)
                made += [Segment(position, (layer, part), block) for block in blocks]
        return made

    def site(self, segment: int, member: int) -> Site:
        """The site of a writer."""
        return Constant("rounding") if segment < 0 else self.segments[segment].block.site(member)

    def kind(self, segment: int) -> str:
        """The kind of a writer."""
        return "rounding" if segment < 0 else self.segments[segment].block.kind

    def position(self, segment: int, member: int) -> int:
        """The position of a writer."""
        return member if segment < 0 else self.segments[segment].position

    def state(self, position: int, stop: Place | None) -> Float[Tensor, " d_model"]:
        """What a reader reads at a position, before its norm."""
        view = self.views.at(position)
        return view.work(view.resid_final) if stop is None else read_by(view, *stop)

    def vectors_of(self, lists: Sequence[Listed], stops: Sequence[Place | None]) -> list[Float[Tensor, "n d_model"]]:
        """The vectors of what is listed, as they reach their readers; a block is looked into once where that is one."""
        if self.rec.model.anatomy.carries or self.rec.model.dtype in (torch.bfloat16, torch.float16):
            return [self.vectors(one.segments, one.members, stop) for one, stop in zip(lists, stops, strict=True)]
        segments, members = (torch.cat([getattr(one, name) for one in lists]) for name in ("segments", "members"))
        return list(torch.split(self.vectors(segments, members, None), [len(one.shares) for one in lists]))

    def vectors(
        self, segments: Int[Tensor, " n"], members: Int[Tensor, " n"], stop: Place | None
    ) -> Float[Tensor, "n d_model"]:
        """Writers' vectors as they reach a reader."""
        found = torch.zeros(len(segments), self.rec.model.anatomy.d_model, dtype=self.rec.model.work_dtype)
        found = found.to(self.rec.model.device)
        for number in sorted(set(segments.tolist())):
            mine = torch.nonzero(segments == number)[:, 0]
            if number < 0:
                for i in mine.tolist():
                    found[i] = self._rounding(int(members[i]), stop)
                continue
            one = self.segments[number]
            block = multiplied(one.block, one.times(self.rec, stop))
            found[mine.to(found.device)] = block.vectors(members[mine])
        return found

    def _rounding(self, position: int, stop: Place | None) -> Tensor:
        """What the stream has there beside the sum of its addends (of 16-bit numbers)."""
        total = torch.zeros_like(self.state(position, stop))
        for number in self.of(position):
            one = self.segments[number]
            if seen_by(one.place, stop):
                total = total + multiplied(one.block, one.times(self.rec, stop)).total()
        return self.state(position, stop) - total

    def split(self, readings: Sequence[Reading], top: int) -> list[Listed]:
        """The largest shares of every reading."""
        positions = sorted({p for one in readings for p in one.directions})
        there = sum(self.segments[number].block.count for p in positions for number in self.of(p))
        most = min(top, there + len(positions))  # and what is rounded at each
        best = _Largest(len(readings), most, self.rec.work(torch.zeros(0)))
        for position in positions:
            numbers = [i for i, one in enumerate(readings) if position in one.directions]
            numbers.sort(key=lambda i: _order(readings[i].stop))  # what a writer is seen by is a tail of these
            here = [readings[i] for i in numbers]
            rows, stops = torch.tensor(numbers, device=best.total.device), [_order(one.stop) for one in here]
            before = best.total[rows]
            for number in self.of(position):
                first = bisect.bisect_right(stops, _order(self.segments[number].place))
                self._project(number, here[first:], rows[first:], best)
            if self.rec.model.dtype in (torch.bfloat16, torch.float16):
                whole = torch.stack([one.directions[position] @ self.state(position, one.stop) for one in here])
                rest = whole.double() - (best.total[rows] - before)
                best.take(
                    rows, rest[:, None].to(whole), rest[:, None].to(whole), -1, torch.full_like(rows, position)[:, None]
                )
                best.count_in(rows, rest, rest.abs(), 1)
        return best.listed()

    def _project(self, number: int, here: Sequence[Reading], rows: Tensor, best: "_Largest") -> None:
        one = self.segments[number]
        step = max(1, SHARE_BYTES // (8 * one.block.count))
        for low in range(0, len(here), step):
            some, mine = here[low : low + step], rows[low : low + step]
            shares = self._products(one, [(reading.directions, reading.stop) for reading in some])
            ranks = shares
            if self.by_inner_product:
                ranks = self._products(one, [(reading.plain, reading.stop) for reading in some])
            sizes = shares.abs()
            kept = (sizes if ranks is shares else ranks.abs()).topk(min(best.top, one.block.count), dim=1).indices
            best.take(mine, shares.gather(1, kept), ranks.gather(1, kept), number, kept)
            best.count_in(mine, shares.sum(1), sizes.sum(1), one.block.count)

    def _products(self, one: Segment, some: list[tuple[dict[int, Tensor], Place | None]]) -> Tensor:
        """(reading, member) products with directions at a segment's position."""
        directions = torch.stack([at[one.position] for at, _ in some])
        if self.rec.model.anatomy.carries:
            times = [one.times(self.rec, stop) for _, stop in some]
            directions = torch.stack([row * factor for row, factor in zip(directions, times, strict=True)])
        return one.block.project(directions)


def _order(place: Place | None) -> float:
    """Forward order of places; what the unembedding reads comes last."""
    return float("inf") if place is None else 2 * place[0] + (place[1] == "mlp")


def seen_by(place: Place, stop: Place | None) -> bool:
    """Whether a writer comes before what a reader reads."""
    return _order(place) < _order(stop)


@final
class _Largest:
    """The largest shares of many readings as blocks come in, and the sums of all.

    Attributes:
        top: how many are kept. total, size: (reading,) sums of shares and of their absolute values. count: (reading,).
    """

    def __init__(self, readings: int, top: int, like: Tensor) -> None:
        self.top = top
        self.total = torch.zeros(readings, dtype=torch.float64, device=like.device)
        self.size, self.count = torch.zeros_like(self.total), torch.zeros_like(self.total, dtype=torch.int64)
        self.ranks = torch.full((readings, top), -1.0, dtype=like.dtype, device=like.device)
        self.shares = torch.zeros_like(self.ranks)
        self.segments = torch.zeros_like(self.ranks, dtype=torch.int64)
        self.members = torch.zeros_like(self.segments)

    def take(self, rows: Tensor, shares: Tensor, ranks: Tensor, segment: int, members: Tensor) -> None:
        """Take in a block's largest; of equal ones those that came before stay."""
        both = torch.cat([self.ranks[rows], ranks.abs()], 1)
        order = torch.sort(both, dim=1, descending=True, stable=True).indices[:, : self.top]
        numbers = torch.full_like(members, segment)
        self.ranks[rows] = both.gather(1, order)
        for held, fresh in ((self.shares, shares), (self.segments, numbers), (self.members, members)):
            held[rows] = torch.cat([held[rows], fresh.to(held.dtype)], 1).gather(1, order)

    def count_in(self, rows: Tensor, total: Tensor, size: Tensor, count: int) -> None:
        """Take in what all of a block's shares come to."""
        self.total[rows] += total.double()
        self.size[rows] += size.double()
        self.count[rows] += count

    def listed(self) -> list[Listed]:
        """Every reading's, largest first."""
        totals, sizes, counts = self.total.tolist(), self.size.tolist(), self.count.tolist()
        kept = (self.ranks >= 0).sum(1).tolist()
        held = (self.shares.cpu(), self.segments.cpu(), self.members.cpu())
        found = []
        for i, n in enumerate(kept):
            shares, segments, members = (one[i, :n] for one in held)
            found.append(Listed(shares, segments, members, totals[i], sizes[i], counts[i]))
        return found

"""Shares: readings split over everything that wrote into the stream before their reader.

    share(u) = direction_p . u    for every addend u at every position p that a reading hangs on

Weights are passed once for all readings; of every reading the largest shares are kept, and the sum of all.
"""

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
        tallies = [_Tally(top) for _ in readings]
        for position in sorted({p for one in readings for p in one.directions}):
            here = [(one, tally) for one, tally in zip(readings, tallies, strict=True) if position in one.directions]
            before = [tally.total for _, tally in here]
            for number in self.of(position):
                self._project(number, [pair for pair in here if seen_by(self.segments[number].place, pair[0].stop)])
            if self.rec.model.dtype in (torch.bfloat16, torch.float16):
                for (one, tally), earlier in zip(here, before, strict=True):
                    whole = float(one.directions[position] @ self.state(position, one.stop))
                    share = whole - (tally.total - earlier)
                    tally.add(torch.tensor([share]), torch.tensor([share]), -1, torch.tensor([position]))
                    tally.sum(share, abs(share), 1)
        return [tally.listed() for tally in tallies]

    def _project(self, number: int, here: "list[tuple[Reading, _Tally]]") -> None:
        one = self.segments[number]
        step = max(1, SHARE_BYTES // (8 * one.block.count))
        for low in range(0, len(here), step):
            some = here[low : low + step]
            shares = self._products(one, [(reading.directions, reading.stop) for reading, _ in some])
            ranks = shares
            if self.by_inner_product:
                ranks = self._products(one, [(reading.plain, reading.stop) for reading, _ in some])
            kept = ranks.abs().topk(min(some[0][1].top, one.block.count), dim=1).indices
            sums, sizes = shares.sum(1).tolist(), shares.abs().sum(1).tolist()
            picked, ranked = shares.gather(1, kept).cpu(), ranks.gather(1, kept).cpu()
            for i, (_, tally) in enumerate(some):
                tally.add(picked[i], ranked[i], number, kept[i].cpu())
                tally.sum(sums[i], sizes[i], one.block.count)

    def _products(self, one: Segment, some: list[tuple[dict[int, Tensor], Place | None]]) -> Tensor:
        """(reading, member) products with directions at a segment's position."""
        return one.block.project(torch.stack([at[one.position] * one.times(self.rec, stop) for at, stop in some]))


def seen_by(place: Place, stop: Place | None) -> bool:
    """Whether a writer comes before what a reader reads."""
    return stop is None or 2 * place[0] + (place[1] == "mlp") < 2 * stop[0] + (stop[1] == "mlp")


@final
class _Tally:
    """Shares of one reading as they come in."""

    def __init__(self, top: int) -> None:
        self.top, self.total, self.size, self.count = top, 0.0, 0.0, 0
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, shares: Tensor, ranks: Tensor, segment: int, members: Tensor) -> None:
        """Take in a block's largest shares."""
        self.parts.append((shares, ranks, torch.full_like(members, segment), members))

    def sum(self, total: float, size: float, count: int) -> None:
        """Take in what all of a block's shares come to."""
        self.total, self.size, self.count = self.total + total, self.size + size, self.count + count

    def listed(self) -> Listed:
        """The largest, largest first; equal ones in forward order."""
        shares, ranks, segments, members = (torch.cat(one) for one in zip(*self.parts, strict=True))
        order = torch.sort(ranks.abs(), descending=True, stable=True).indices[: self.top]
        return Listed(shares[order], segments[order], members[order], self.total, self.size, self.count)

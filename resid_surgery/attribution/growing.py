"""Growing: from readers back to their sources, to the sources of those, and so on, best first under a budget.

What is worth following is guessed, never claimed: a writer's priority is its reader's priority times |share| over the
sum of |shares| of that reading, summed over the readings that list it. Only neurons, heads and layers can be followed.
A neuron is a reader of its own; a head or a layer is followed for one reading, as its value side against the direction
of that reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from resid_surgery.attribution.aims import Aim
from resid_surgery.attribution.asking import NEURONS, Ask, readers_of
from resid_surgery.attribution.readings import Reader, Reading
from resid_surgery.attribution.shares import Listed, Writers
from resid_surgery.sites import ExpertNeuron, Head, HeadSource, SharedNeuron, Site, Sublayer

AT_ONCE = 16


@final
@dataclass(frozen=True, eq=False)
class Followed:
    """A reader with its sources.

    Attributes:
        reader, position. hop: 1 for what was asked for. priority: see the module. serves: (followed, reading) numbers
            that a head or layer is followed for; None for what was asked for and for neurons.
        listed: a `Listed` a reading.
    """

    reader: Reader
    position: int
    hop: int
    priority: float
    serves: tuple[int, int] | None
    listed: tuple[Listed, ...]


@final
@dataclass(frozen=True, eq=False)
class _Wish:
    """A writer that may be followed next."""

    ask: Ask
    hop: int
    priority: float
    serves: tuple[int, int] | None


def follow(writers: Writers, asks: Sequence[Ask], *, top: int, hops: int, budget: int) -> list[Followed]:
    """Readers and, hop by hop, the sources that can be followed, the most promising first.

    Args:
        writers: of the run, at one grain. asks: the readers to begin with. top: sources listed a reading.
        hops: how far back; 1 is the sources of what was asked for. budget: readers followed beside those asked for.

    Returns:
        In the order in which they were followed, those asked for first.
    """
    wishes: dict[object, _Wish] = {i: _Wish(ask, 1, 1.0 / len(asks), None) for i, ask in enumerate(asks)}
    found: list[Followed] = []
    seen: set[object] = set()
    left = budget + len(asks)
    while wishes and left > 0:
        ranked = sorted(wishes, key=lambda key: -wishes[key].priority)  # stable: earlier wishes first
        picked = ranked[: min(left, max(AT_ONCE, len(asks)) if not found else AT_ONCE)]
        made = _followed(writers, [wishes.pop(key) for key in picked], top)
        seen |= set(picked) | {_key(one.reader.site, one.position, one.serves) for one in made}
        left -= len(made)
        for number, one in enumerate(made, start=len(found)):
            if one.hop < hops:
                _wish_for(writers, wishes, seen, number, one)
        found += made
    return found


def _followed(writers: Writers, wishes: list[_Wish], top: int) -> list[Followed]:
    made = expand(writers, [wish.ask for wish in wishes], top)
    return [
        Followed(reader, wish.ask.position, wish.hop, wish.priority, wish.serves, listed)
        for (reader, listed), wish in zip(made, wishes, strict=True)
    ]


def expand(writers: Writers, asks: Sequence[Ask], top: int) -> list[tuple[Reader, tuple[Listed, ...]]]:
    """Several readers with their largest sources, a `Listed` a reading; weights are passed once for all."""
    readers = readers_of(writers.views, asks)
    lists = iter(writers.split([reading for reader in readers for reading in reader.readings], top))
    return [(reader, tuple(next(lists) for _ in reader.readings)) for reader in readers]


def ask_for(reader: Reader, reading: Reading, site: Site, position: int) -> Ask:
    """How a writer of a reading is followed: a neuron for itself, a head or a layer for that reading."""
    if isinstance(site, NEURONS):
        return Ask(site, position)
    return Ask(
        site, position, "value" if isinstance(site, (Head, HeadSource)) else "all", aim_at(reader, reading, position)
    )


def _wish_for(writers: Writers, wishes: dict[object, _Wish], seen: set[object], number: int, one: Followed) -> None:
    for r, (reading, listed) in enumerate(zip(one.reader.readings, one.listed, strict=True)):
        unit = one.priority / len(one.listed) / max(listed.size, 1e-30)
        for share, segment, member in zip(
            listed.shares.tolist(), listed.segments.tolist(), listed.members.tolist(), strict=True
        ):
            site, position = writers.site(segment, member), writers.position(segment, member)
            if not followable(writers, site, position) or share == 0:
                continue
            serves = None if isinstance(site, NEURONS) else (number, r)
            key, worth = _key(site, position, serves), unit * abs(share)
            if key in seen:
                continue
            if key in wishes:
                wishes[key] = replace(wishes[key], priority=wishes[key].priority + worth)
            else:
                wishes[key] = _Wish(ask_for(one.reader, reading, site, position), one.hop + 1, worth, serves)


def _key(site: Site, position: int, serves: tuple[int, int] | None) -> object:
    return (site, position, serves)


def followable(writers: Writers, site: Site, position: int) -> bool:
    """Whether a writer is itself a reader whose sources can be split."""
    model = writers.rec.model
    if isinstance(site, NEURONS):
        if isinstance(site, ExpertNeuron):
            return bool(model.experts(site.layer).keys(site.expert))
        row = model.block(site.layer)
        return bool(row.shared_keys if isinstance(site, SharedNeuron) else row.keys)
    if isinstance(site, (Head, HeadSource)):
        return True
    if isinstance(site, Sublayer):
        row = model.block(site.layer)
        if site.part == "attn":
            return row.attn_kind == "attention"
        groups = writers.views.at(position).layers[site.layer].groups
        return bool(groups) and all(group.pre_activations for group in groups)
    return False


def aim_at(reader: Reader, reading: Reading, position: int) -> Aim:
    """A reading's direction at a position as an aim."""
    name = f"{reader.site}.{reading.key}"
    direction = reading.directions[position]
    return Aim(direction, reading.stop, reading.unit, name, {}, torch.zeros_like(direction))

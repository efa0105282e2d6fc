"""Budgets: how much a validation asks, and what each part of it took."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TypeVar, final

import pandas as pd

from resid_surgery._check import choice, whole
from resid_surgery.editing.probes import Probe, ProbeSet
from resid_surgery.errors import ArgumentError

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Budget:
    """How many probes of each kind are asked; None for all. `BUDGETS` has "smoke", "standard" and "full".

    Attributes:
        name: what reports call it. paraphrases, ripples: of each fact. neighbours: of each fact and stratum. unrelated:
            prompts of that stratum. exposed: contexts at each of high, middle and zero exposure. exposure_tokens:
            searched for them.
        texts, text_tokens: documents and their length. choices: questions. generations, generated: prompts and the
            tokens to continue each by.
        sites, directions: how many random places and random directions stand beside the edit as controls. worst:
            prompts whose continuations are shown side by side.

    Raises:
        ArgumentError: a number is no whole number >= 0, or there would be no control.

    Example:
        >>> from dataclasses import replace
        >>> replace(BUDGETS["smoke"], name="mine", texts=4, generations=0).texts
        4
    """

    name: str
    paraphrases: int | None
    ripples: int | None
    neighbours: int | None
    unrelated: int | None
    exposed: int
    exposure_tokens: int
    texts: int | None
    text_tokens: int
    choices: int | None
    generations: int | None
    generated: int
    sites: int
    directions: int
    worst: int

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "name" and (value is not None or one.type is int):
                whole(one.name, value, 1 if one.name in ("text_tokens", "exposure_tokens", "generated") else 0)
        if self.sites + self.directions == 0:
            raise ArgumentError("`sites` and `directions` of a Budget must not both be 0: controls are always run.")


BUDGETS = {
    one.name: one
    for one in (
        Budget("smoke", 8, 6, 8, 40, 6, 1200, 12, 96, 36, 2, 32, 5, 2, 10),
        Budget("standard", None, None, 24, None, 16, 6000, None, 256, 120, 8, 64, 10, 5, 20),
        Budget("full", None, None, None, None, 50, 50_000, None, 1024, None, None, 100, 20, 10, 50),
    )
}


def budget_of(name: object) -> Budget:
    """A budget by name.

    Raises:
        ArgumentError: no such budget.
    """
    if isinstance(name, Budget):
        return name
    return BUDGETS[choice("budget", name, tuple(BUDGETS))]


def thinned(probes: ProbeSet, budget: Budget) -> ProbeSet:
    """As many probes of each kind as a budget has, spread evenly over what there is, in order."""
    caps = {"paraphrase": budget.paraphrases, "ripple": budget.ripples, "text": budget.texts,
            "choice": budget.choices, "generation": budget.generations}  # fmt: skip
    groups: dict[tuple[str, ...], list[Probe]] = {}
    for p in probes:
        near = p.axis == "locality" and p.stratum not in ("unrelated", "high exposure")
        groups.setdefault((p.axis, p.stratum, p.fact if near or p.axis in ("paraphrase", "ripple") else ""), []).append(
            p
        )
    kept: set[Probe] = set()
    for (axis, stratum, _), members in groups.items():
        most = caps.get(axis)
        if axis == "locality" and stratum != "high exposure":
            most = budget.unrelated if stratum == "unrelated" else budget.neighbours
        kept |= set(spread(members, most))
    return ProbeSet(tuple(p for p in probes if p in kept), probes.name, probes.rewrites, probes.ignored)


def spread(members: Sequence[T], most: int | None) -> list[T]:
    """At most so many, evenly spaced.

    Example:
        >>> spread(range(10), 4)
        [0, 2, 5, 7]
    """
    n = len(members)
    if most is None or n <= most:
        return list(members)
    return [members[i * n // most] for i in range(most)]


@final
@dataclass
class Clock:
    """Seconds, probes and tokens of each part of a validation, as it goes."""

    rows: list[dict[str, object]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str, probes: int, tokens: int = 0) -> Iterator[dict[str, object]]:
        """Time one part; what it yields takes tokens that are known only later."""
        row: dict[str, object] = {"axis": name, "probes": probes, "tokens": tokens}
        began = time.perf_counter()
        yield row
        self.rows.append(row | {"seconds": time.perf_counter() - began})

    def table(self) -> pd.DataFrame:
        """Columns: axis, probes, tokens (read by a model, all models together), seconds; in order."""
        return pd.DataFrame(self.rows, columns=["axis", "probes", "tokens", "seconds"])

"""Probes: what an edited model is asked, as plain data.

An axis says what is looked at, a stratum how near to the edit a probe stands. Probes of one rewrite share its `fact`:
facts, not prompts, are what statistics count as independent.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, final

import pandas as pd
import xxhash

from resid_surgery._check import choice, iterable, message, text
from resid_surgery._check import path as as_path
from resid_surgery._files import utf8, write_whole
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import LoadError, PromptError

SCHEMA = 1
AXES = ("efficacy", "paraphrase", "locality", "ripple", "text", "choice", "generation")
"""What probes look at.

efficacy: the rewritten prompt itself. paraphrase: its rephrasings. locality: prompts whose answer must not change.
ripple: what should follow, or should not, from the new fact (portability). text: running text, by its likelihood.
choice: a right answer against wrong ones (capability). generation: prompts to continue freely.
"""
STRATA = ("", "same relation", "same subject", "edit prepended", "high exposure", "unrelated")
"""How near a locality probe stands: same relation with another subject, same subject in another relation, the new
fact's sentence put before it, a context on which the edit acts strongly, or nothing to do with it."""


@final
@dataclass(frozen=True)
class Probe:
    """One question to both models.

    Args:
        axis: one of `AXES`. text: the prompt (or the whole text, for "text").
        fact: label of the rewrite that it belongs to (its name or filled prompt); "" for none. Efficacy probes of two
            facts count as two edits.
        stratum: one of `STRATA`, for locality. criterion: of a ripple probe, such as "one hop".
        target: what should be said (leading space included); for locality the answer that must stay.
        old: what was said before the edit, or what must not be said.
        wrong: wrong answers, for "choice".
        conditions: (prompt, answer) pairs that must hold before the edit for a ripple probe to count.
        others: answers that count as right as well.

    Raises:
        PromptError: an unknown axis or stratum, or a field of the wrong type.
    """

    axis: str
    text: str
    fact: str = ""
    stratum: str = ""
    criterion: str = ""
    target: str | None = None
    old: str | None = None
    wrong: tuple[str, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choice("axis", self.axis, AXES, error=PromptError)
        choice("stratum", self.stratum, STRATA, error=PromptError)
        for name in ("text", "fact", "criterion"):
            text(name, getattr(self, name), error=PromptError)
        if not self.text.strip():
            raise PromptError(message("text", "a non-empty text", self.text))
        for name in ("target", "old"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise PromptError(message(name, "a non-empty text or None", value))
        for name in ("wrong", "others"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "conditions", _pairs(self.conditions))
        if self.axis in ("choice", "ripple") and self.target is None:
            raise PromptError(message("target", f"given for a {self.axis} probe", None))
        if self.axis == "choice" and not self.wrong:
            raise PromptError(message("wrong", "at least one wrong answer for a choice probe", self.wrong))


@final
@dataclass(frozen=True)
class ProbeSet:
    """Probes under one name.

    Attributes:
        probes: in order. name: of the set. rewrites: of the facts that the probes belong to, as far as they are known.
        ignored: "field: how often" of records that no probe was made of (importers fill it).
    """

    probes: tuple[Probe, ...]
    name: str = ""
    rewrites: tuple[Rewrite, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", _probes(self.probes))
        text("name", self.name, error=PromptError)
        rewrites = tuple(self.rewrites) if iterable(self.rewrites) else (None,)
        if not all(isinstance(one, Rewrite) for one in rewrites):
            raise PromptError(message("rewrites", "a sequence of rs.Rewrite", self.rewrites))
        object.__setattr__(self, "rewrites", rewrites)
        object.__setattr__(self, "ignored", _texts("ignored", self.ignored))

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __add__(self, other: "ProbeSet") -> "ProbeSet":
        """Both sets, without duplicates, in order."""
        name = " + ".join(dict.fromkeys(n for n in (self.name, other.name) if n))
        rewrites = tuple(dict.fromkeys((*self.rewrites, *other.rewrites)))
        probes = tuple(dict.fromkeys((*self.probes, *other.probes)))
        return ProbeSet(probes, name, rewrites, (*self.ignored, *other.ignored))

    def of(self, *axes: str, fact: str | None = None) -> "ProbeSet":
        """Those of some axes, or of one fact."""
        for axis in axes:
            choice("axes", axis, AXES)
        if fact is not None:
            text("fact", fact)
        kept = tuple(p for p in self.probes if (not axes or p.axis in axes) and fact in (None, p.fact))
        return ProbeSet(kept, self.name, self.rewrites)

    @property
    def table(self) -> pd.DataFrame:
        """One row a probe; columns as the fields of `Probe`."""
        return pd.DataFrame([asdict(p) for p in self.probes], columns=[f.name for f in fields(Probe)])

    @property
    def hash(self) -> str:
        """Of the probes' contents and order; names of sets do not count."""
        text = json.dumps([asdict(p) for p in self.probes], ensure_ascii=False, sort_keys=True)
        return xxhash.xxh3_128_hexdigest(utf8(text))

    def __repr__(self) -> str:
        counts = {axis: sum(p.axis == axis for p in self.probes) for axis in AXES}
        listed = ", ".join(f"{n} {axis}" for axis, n in counts.items() if n)
        return f"ProbeSet({self.name or 'unnamed'}: {listed or 'empty'})"


def probe_set(probes: Iterable[Probe], name: str = "") -> ProbeSet:
    """Probes as a set, checked.

    Raises:
        PromptError: something in it is no probe.
    """
    return ProbeSet(_probes(probes), name)


def _probes(given: Any) -> tuple[Probe, ...]:
    found = tuple(given) if iterable(given) else (given,)
    for one in found:
        if not isinstance(one, Probe):
            raise PromptError(message("probes", "a sequence of rs.Probe", one, do="Files are read by rs.read_probes."))
    return found


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """A sequence of texts, as a tuple."""
    found = tuple(given) if iterable(given) else (None,)
    if not all(isinstance(one, str) for one in found):
        raise PromptError(message(name, "a sequence of texts", given))
    return found


def _pairs(given: Any) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) pairs, as tuples."""
    found = tuple(given) if iterable(given) else (None,)
    if not all(iterable(one) and len(_texts("conditions", one)) == 2 for one in found):
        raise PromptError(message("conditions", "a sequence of (prompt, answer) pairs", given))
    return tuple((prompt, answer) for prompt, answer in found)


def save_probes(path: Any, probes: ProbeSet | Iterable[Probe]) -> Path:
    """Write probes as JSON lines, whole or not at all: the first line names the set, each other one is a probe.

    Raises:
        ArgumentError: no path of a file. PromptError: no probes. LoadError: it cannot be written.
    """
    place = as_path("path", path)
    probes = probes if isinstance(probes, ProbeSet) else probe_set(probes)
    head = {"schema": SCHEMA, "what": "resid_surgery probes", "name": probes.name, "hash": probes.hash,
            "rewrites": [r.said() for r in probes.rewrites]}  # fmt: skip
    lines = [json.dumps(one, ensure_ascii=False) for one in (head, *(asdict(p) for p in probes))]
    try:
        return write_whole(place, utf8("\n".join(lines) + "\n"))
    except OSError as error:
        raise LoadError(f"the probes cannot be written to {place}: {error.strerror}.") from error

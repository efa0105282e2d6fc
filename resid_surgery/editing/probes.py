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

from resid_surgery._check import choice, message
from resid_surgery._files import write_whole
from resid_surgery.errors import PromptError

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
            if not isinstance(getattr(self, name), str):
                raise PromptError(message(name, "a text", getattr(self, name)))
        if not self.text.strip():
            raise PromptError(message("text", "a non-empty text", self.text))
        for name in ("target", "old"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise PromptError(message(name, "a non-empty text or None", value))
        if self.axis in ("choice", "ripple") and self.target is None:
            raise PromptError(message("target", f"given for a {self.axis} probe", None))
        if self.axis == "choice" and not self.wrong:
            raise PromptError(message("wrong", "at least one wrong answer for a choice probe", self.wrong))
        object.__setattr__(self, "wrong", tuple(self.wrong))
        object.__setattr__(self, "others", tuple(self.others))
        object.__setattr__(self, "conditions", tuple((str(a), str(b)) for a, b in self.conditions))


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
    rewrites: tuple[Any, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)

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
        return xxhash.xxh3_128_hexdigest(text.encode())

    def __repr__(self) -> str:
        counts = {axis: sum(p.axis == axis for p in self.probes) for axis in AXES}
        listed = ", ".join(f"{n} {axis}" for axis, n in counts.items() if n)
        return f"ProbeSet({self.name or 'unnamed'}: {listed or 'empty'})"


def probe_set(probes: Iterable[Probe], name: str = "") -> ProbeSet:
    """Probes as a set, checked.

    Raises:
        PromptError: something in it is no probe.
    """
    found = tuple(probes)
    for one in found:
        if not isinstance(one, Probe):
            raise PromptError(message("probes", "a sequence of rs.Probe", one, do="Files are read by rs.read_probes."))
    return ProbeSet(found, name)


def save_probes(path: Any, probes: ProbeSet | Iterable[Probe]) -> Path:
    """Write probes as JSON lines, whole or not at all: the first line names the set, each other one is a probe."""
    probes = probes if isinstance(probes, ProbeSet) else probe_set(probes)
    head = {"schema": SCHEMA, "what": "resid_surgery probes", "name": probes.name, "hash": probes.hash,
            "rewrites": [r.said() for r in probes.rewrites]}  # fmt: skip
    lines = [json.dumps(one, ensure_ascii=False) for one in (head, *(asdict(p) for p in probes))]
    return write_whole(Path(path), ("\n".join(lines) + "\n").encode())

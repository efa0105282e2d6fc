"""Plans: what is done to every prompt of a run, as plain data.

1. ``axes`` name values; every combination of the axes that an arm refers to is one *cell* of it.
2. ``locate`` names sets of sites that are found anew for every prompt: located by a score, drawn at random with the
   size of another set (a control), or fixed.
3. ``intervene`` has arms: operations, carried out together, on sites, slices or named sets. One row a cell; an
   operation with ``each`` gives one row a site instead, with ``positions: each`` one a position.
4. ``measure`` says what is measured of every row.

A text ``"$name"`` stands for an axis' value, a set of sites, a case's donor, or ``$target`` and ``$versus`` (the
prompt's own); ``"$$name"`` is the text ``$name``. A plan equals another if it means the same, and has a hash.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import xxhash

from resid_surgery import _check
from resid_surgery._files import read_json, utf8, write_whole
from resid_surgery.errors import ArgumentError, LoadError, ResidSurgeryError
from resid_surgery.experiments.grammar import DONORS, arms_from, axes_from, references, sets_from

SCHEMA = 1
WHAT = "resid_surgery plan"
LARGEST_BYTES = 1 << 26
MOST_CELLS = 1_000_000
MEASURES = ("bs", "log_prob", "all", "effect")
ORDERED = ("axes", "locate", "intervene")


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What a run does to every prompt.

    Args:
        intervene: arms: name -> operations carried out together; or one arm's operations, which is then called
            "main". An operation is an intervention, or a mapping: ``{"kind": "Zero", "sites": "$best"}``, with the
            fields of the operation, ``positions`` and ``each`` (one row a site).
        locate: name -> how a set of sites is found for each prompt: ``{"kind": "neuron", "k": 10, "score": ...}``
            (arguments of `resid_surgery.locate`), ``{"like": "best", "draw": 0}`` (as many others of the same kind
            and layers at random), or ``{"sites": [...]}``.
        axes: name -> values (numbers, texts, None), referred to as ``"$name"``.
        measure: "bs", "log_prob" or "all", as of `resid_surgery.sweep`; "effect" also splits changes into direct,
            post_norm, norm_scale and indirect, as `resid_surgery.intervene` does.
        known: measure only prompts whose target is the model's most probable token.
        seed: of what is drawn at random.

    Raises:
        ArgumentError: a name is unknown or unused, a field is missing, unknown or no good.

    Example:
        >>> plan = Plan(
        ...     axes={"k": [1, 10]},
        ...     locate={"best": {"kind": "neuron", "k": "$k"}, "others": {"like": "best"}},
        ...     intervene={"best": {"kind": "Zero", "sites": "$best"}, "random": {"kind": "Zero", "sites": "$others"}},
        ... )
        >>> plan.cells
        {'best': 2, 'random': 2}
    """

    intervene: Any = ()
    locate: Any = None
    axes: Any = None
    measure: str = "log_prob"
    known: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check.choice("measure", self.measure, MEASURES)
        object.__setattr__(self, "seed", _check.seed(self.seed))
        _check.flag("known", self.known)
        put = object.__setattr__
        put(self, "axes", axes_from({} if self.axes is None else self.axes))
        put(self, "locate", sets_from({} if self.locate is None else self.locate, self.axes))
        put(self, "intervene", arms_from(self.intervene, self.axes, self.locate))
        if not self.intervene and not self.locate:
            raise ArgumentError("`Plan` must locate or intervene; it does neither.")
        for name, one in (*self.locate.items(), *self.intervene.items()):
            if (cells := self._combined(one)) > MOST_CELLS:
                must = f"of at most {MOST_CELLS:,} combinations of axes a set or an arm"
                raise ArgumentError(_check.message("plan", must, f"{cells:,} of {name}"))
        unused = [name for name in self.axes if name not in self._used()]
        if unused:
            raise ArgumentError(f"axis {unused[0]!r} must be used by a set or an arm, as '${unused[0]}'; it is not.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def hash(self) -> str:
        """xxh3 of the plan as canonical JSON: the order of axes, sets and arms, which rows have, counts."""
        plain = self.entry()
        ordered = plain | {name: list(plain[name].items()) for name in ORDERED}
        return xxhash.xxh3_128_hexdigest(utf8(json.dumps(ordered, ensure_ascii=False, sort_keys=True)))

    @property
    def cells(self) -> dict[str, int]:
        """Arm -> how many combinations of its axes there are."""
        return {name: self._combined(arm) for name, arm in self.intervene.items()}

    def entry(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "schema": SCHEMA,
            "what": WHAT,
            "axes": {name: list(values) for name, values in self.axes.items()},
            "locate": {name: dict(one) for name, one in self.locate.items()},
            "intervene": {name: [dict(one) for one in arm] for name, arm in self.intervene.items()},
            "measure": self.measure,
            "known": self.known,
            "seed": self.seed,
        }

    def save(self, path: Any) -> Path:
        """Write the plan as a JSON file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        return write_whole(json_path(path), utf8(json.dumps(self.entry(), ensure_ascii=False, indent=1) + "\n"))

    @classmethod
    def of(cls, given: Any) -> "Plan":
        """A plan from a `Plan`, or from plain data as `entry` gives it.

        Raises:
            ArgumentError: it is no plan, of another schema, or has fields that a plan does not have.
        """
        if isinstance(given, Plan):
            return given
        if not isinstance(given, Mapping):
            raise ArgumentError(_check.message("plan", "a resid_surgery.Plan, or a mapping of its fields", given))
        fields = {name: value for name, value in given.items() if name not in ("schema", "what")}
        if given.get("schema", SCHEMA) != SCHEMA or given.get("what", WHAT) != WHAT:
            raise ArgumentError(_check.message("plan", f"of schema {SCHEMA}", (given.get("what"), given.get("schema"))))
        known = ("axes", "locate", "intervene", "measure", "known", "seed")
        odd = [name for name in fields if name not in known]
        if odd:
            _check.choice("plan", odd[0], known)
        return cls(**fields)

    def axes_of(self, given: Any) -> tuple[str, ...]:
        """The axes that a set or an arm's operations depend on, directly or through sets, in the plan's order."""
        names = set(references(given))
        found = {name for name in names if name in self.axes}
        for name in names & set(self.locate):
            found |= set(self.axes_of(self.locate[name]))
        return tuple(name for name in self.axes if name in found)

    def combinations(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every combination of some axes' values, the last axis fastest."""
        if not names:
            yield {}
            return
        for value in self.axes[names[0]]:
            for rest in self.combinations(names[1:]):
                yield {names[0]: value} | rest

    def donors(self) -> tuple[str, ...]:
        """Names that cases must have donors under."""
        found = dict.fromkeys(
            name[1:] for arm in self.intervene.values() for one in arm for key in DONORS
            if isinstance(name := one.get(key), str)
        )  # fmt: skip
        return tuple(found)

    def _combined(self, given: Any) -> int:
        return math.prod(len(self.axes[name]) for name in self.axes_of(given))

    def _used(self) -> set[str]:
        parts = [*self.locate.values(), *self.intervene.values()]
        return {name for one in parts for name in references(one)}


def read_plan(path: Any) -> tuple[Plan, dict[str, Any]]:
    """Read a plan from a JSON file, and what stands beside it there for the command line.

    Args:
        path: of the file.

    Returns:
        (plan, {"model": ..., "dtype": ..., "device": ..., "prompts": ...}, as far as the file has them).

    Raises:
        LoadError: no JSON, or no plan; what is wrong is named.
    """
    file = json_path(path)
    try:
        body = read_json(file, LARGEST_BYTES)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise LoadError(f"{file} is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise LoadError(f"{file} is no plan: a JSON object is wanted.")
    beside = {name: body.pop(name) for name in ("model", "dtype", "device", "prompts") if name in body}
    try:
        return Plan.of(body), beside
    except ResidSurgeryError as error:
        raise LoadError(f"{file} is no plan: {error}") from error


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Where two pieces of plain data differ, one line each: ``plan.axes.k: [1, 10] there, [1, 5] now``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys([*before, *now])
        pairs = ((f"{at}.{name}" if at else str(name), before.get(name), now.get(name)) for name in names)
        lines = [line for where, old, new in pairs for line in differences(old, new, where)]
        if at.rpartition(".")[2] in ORDERED and set(before) == set(now) and list(before) != list(now):
            lines.append(f"{at}: in the order {', '.join(before)} there, {', '.join(now)} now")
        return lines
    return [] if before == now else [f"{at}: {_brief(before)} there, {_brief(now)} now"]


def json_path(path: Any) -> Path:
    """The path of a JSON file."""
    return _check.path("path", path, "the path of a .json file", suffix=".json")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= 80 else text[:77] + "..."

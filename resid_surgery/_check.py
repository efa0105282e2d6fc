"""Argument validation with one message grammar.

Every message says what must hold, what was given, for which model (where there is one) and
what to do: ``"`k` must be a whole number from 1 to 46080 for SmolLM2-135M; got 0."``
"""

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from resid_surgery.errors import ArgumentError, ResidSurgeryError

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes of a file's name, and of all names of a path


def message(name: str, must: str, got: object, *, model: str | None = None, do: str = "") -> str:
    """One error line: what must hold - for which model - what was given - what to do."""
    where = f" for {model}" if model else ""
    return f"`{name}` must be {must}{where}; got {shown(got)}.{' ' + do if do else ''}"


def whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    *,
    model: str | None = None,
    do: str = "",
    error: type[ResidSurgeryError] = ArgumentError,
) -> int:
    """`value` as an int within low..high (bools and floats are refused)."""
    span = f"a whole number >= {low}" if high is None else f"a whole number in {low}..{high}"
    number = index_of(value)
    if number is None:
        raise error(message(name, span, value, model=model, do=do))
    if number < low or (high is not None and number > high):
        raise error(message(name, span, number, model=model, do=do))
    return number


def wholes(name: str, values: Any, low: int, high: int | None = None) -> list[int]:
    """A sequence of whole numbers within low..high."""
    if not iterable(values):
        raise ArgumentError(message(name, "a sequence of whole numbers", values))
    return [whole(name, one, low, high) for one in values]


def index_of(value: Any) -> int | None:
    """`value` as an int if it is a whole number by type (numpy and torch scalars too), else None."""
    if isinstance(value, (bool, str, bytes)) or str(getattr(value, "dtype", "")) == "torch.bool":
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # the second: a tensor without data
        return None


def iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether `value` has members to go through: no text, no bytes, no array or tensor without an axis."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0


def path(
    name: str, value: Any, must: str = "the path of a file", *, suffix: str | tuple[str, ...] = "", home: bool = False
) -> Path:
    """`value` as a path that a file can have; with `home`, ~ is the home folder."""
    given = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(given, str) or not given.strip() or not given.endswith(suffix):
        raise ArgumentError(message(name, must, value))
    try:
        lengths = [len(os.fsencode(one)) for one in Path(given).parts]
        found = Path(given).expanduser() if home else Path(given)
    except (UnicodeEncodeError, RuntimeError):  # the second: whose home is not known
        lengths = [LONGEST_NAME + 1]
    if "\0" in given or sum(lengths) > LONGEST_PATH or max(lengths, default=0) > LONGEST_NAME:
        raise ArgumentError(message(name, must, value, do="No file can have that name."))
    return found


def seed(value: Any) -> int:
    """`value` as a seed that every source of random numbers takes."""
    return whole("seed", value, 0, 2**63 - 1)


def flag(name: str, value: Any, *, error: type[ResidSurgeryError] = ArgumentError) -> bool:
    """`value` if it is True or False itself, no stand-in for one."""
    if not isinstance(value, bool):
        raise error(message(name, "True or False", value))
    return value


def progress(value: Any) -> None:
    """Refuse what says neither that a bar is shown, nor that it is not, nor nothing."""
    if value is not None:
        flag("progress", value)


def text(name: str, value: Any, *, error: type[ResidSurgeryError] = ArgumentError) -> str:
    """`value` if it is a text, the empty one too."""
    if not isinstance(value, str):
        raise error(message(name, "a text", value))
    return value


def finite(name: str, value: Any, *, error: type[ResidSurgeryError] = ArgumentError) -> float:
    """`value` as a finite float."""
    number = _real(value)
    if number is None or not math.isfinite(number):
        raise error(message(name, "a finite number", value))
    return number


def choice(name: str, value: Any, allowed: Sequence[str], *, error: type[ResidSurgeryError] = ArgumentError) -> str:
    """`value` if it is one of `allowed`, else an error that suggests the nearest spelling."""
    if isinstance(value, str) and value in allowed:
        return value
    near = isinstance(value, str) and len(value) < LONGEST_NAME  # longer ones take seconds
    close = difflib.get_close_matches(value, allowed, n=1) if near else []
    hint = f"Did you mean '{close[0]}'?" if close else ""
    raise error(message(name, "one of " + ", ".join(allowed), value, do=hint))


def layers(value: Any, n_layers: int, *, model: str | None = None) -> tuple[int, ...]:
    """A layer subset as sorted distinct indices; None means all, negative counts from the end."""
    if value is None:
        return tuple(range(n_layers))
    given: Iterable[Any] = [value] if index_of(value) is not None else value
    if not iterable(given):
        raise ArgumentError(message("layers", "None, a layer or a sequence of layers", value, model=model))
    do = "Count from the end with -1."
    picked = [whole("layers", one, -n_layers, n_layers - 1, model=model, do=do) % n_layers for one in given]
    if not picked:
        raise ArgumentError(message("layers", "at least one layer", value, model=model, do="None means all layers."))
    return tuple(sorted(set(picked)))


def _real(value: Any) -> float | None:
    """A real number as a float, whatever its type; None for anything else, and for one that no float holds."""
    try:
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
            value = value.item()
        if isinstance(value, bool):
            return None
        return float(value) if isinstance(value, numbers.Real) else None
    except (OverflowError, RuntimeError):  # beyond a float; a tensor without data
        return None


def shown(value: object) -> str:
    """A value in at most 120 characters; one that cannot be shown must not hide what is wrong with it."""
    cut = value[:200] if isinstance(value, (str, bytes, list, tuple)) else value  # no more of it would be shown
    try:
        found = " ".join(repr(cut).split())
    except Exception:  # noqa: BLE001  (any object may come, with any fault of its own)
        found = f"a {type(value).__name__} that cannot be shown"
    return found if len(found) <= 120 else found[:117] + "..."

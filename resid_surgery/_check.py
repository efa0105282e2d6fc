"""Argument validation with one message grammar.

Every message says what must hold, what was given, for which model (where there is one) and
what to do: ``"`k` must be a whole number from 1 to 46080 for SmolLM2-135M; got 0."``
"""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from resid_surgery.errors import ArgumentError, ResidSurgeryError


def message(name: str, must: str, got: object, *, model: str | None = None, do: str = "") -> str:
    """One error line: what must hold - for which model - what was given - what to do."""
    where = f" for {model}" if model else ""
    return f"`{name}` must be {must}{where}; got {_shown(got)}.{' ' + do if do else ''}"


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
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ArgumentError(message(name, "a sequence of whole numbers", values))
    return [whole(name, one, low, high) for one in values]


def index_of(value: Any) -> int | None:
    """`value` as an int if it is a whole number by type (numpy and torch scalars too), else None."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def finite(name: str, value: Any, *, error: type[ResidSurgeryError] = ArgumentError) -> float:
    """`value` as a finite float."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise error(message(name, "a finite number", value))
    return float(value)


def choice(name: str, value: Any, allowed: Sequence[str], *, error: type[ResidSurgeryError] = ArgumentError) -> str:
    """`value` if it is one of `allowed`, else an error that suggests the nearest spelling."""
    if isinstance(value, str) and value in allowed:
        return value
    close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    hint = f"Did you mean '{close[0]}'?" if close else ""
    raise error(message(name, "one of " + ", ".join(allowed), value, do=hint))


def layers(value: Any, n_layers: int, *, model: str | None = None) -> tuple[int, ...]:
    """A layer subset as sorted distinct indices; None means all, negative counts from the end."""
    if value is None:
        return tuple(range(n_layers))
    given: Iterable[Any] = [value] if index_of(value) is not None else value
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ArgumentError(message("layers", "None, a layer or a sequence of layers", value, model=model))
    do = "Count from the end with -1."
    picked = [whole("layers", one, -n_layers, n_layers - 1, model=model, do=do) % n_layers for one in given]
    if not picked:
        raise ArgumentError(message("layers", "at least one layer", value, model=model, do="None means all layers."))
    return tuple(sorted(set(picked)))


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else text[:117] + "..."

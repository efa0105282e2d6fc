"""Taking: what a figure needs of a table, checked before anything is drawn, and in plain kinds.

Numbers become float64, whole numbers int64 and texts str, so that what comes after meets no other kind. What a column
cannot be is refused in one line; a missing number is drawn as a gap, a row without a name or a layer is left out.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from resid_surgery._check import choice, message, text
from resid_surgery.errors import ArgumentError
from resid_surgery.views.lettering import escaped, plain

LONGEST_LABEL = 500


def taken(
    table: Any,
    *,
    name: str = "table",
    real: Sequence[str] = (),
    finite: Sequence[str] = (),
    whole: Sequence[str] = (),
    named: Sequence[str] = (),
    partly: Sequence[str] = (),
    maker: str = "",
) -> pd.DataFrame:
    """A table with the columns that a figure needs, in plain kinds; the rest of it, and its ``attrs``, as they were.

    Args:
        table: as it was given. name: of the argument. maker: the verb that makes such tables.
        real: columns of numbers, of which one at least is finite. finite: of finite numbers. whole: of whole numbers
            up to 2^53; rows where one is missing are left out. named: of texts or numbers, as texts; likewise. partly:
            of numbers, all of which may be missing.

    Raises:
        ArgumentError: it is no such table; what is wrong with it is said.
    """
    wanted = [*real, *finite, *whole, *named, *partly]
    what = f"a table from resid_surgery.{maker}" if maker else "a DataFrame"
    if not isinstance(table, pd.DataFrame):
        raise ArgumentError(message(name, what, type(table).__name__))
    if odd := [one for one in wanted if not isinstance(one, str)]:
        raise ArgumentError(message(name, "drawn by names of columns", odd[0]))
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise ArgumentError(message(name, "a table in which every column has a name of its own", twice))
    if [one for one in wanted if one not in table]:
        by = f", {what}" if maker else ""
        raise ArgumentError(
            message(name, f"one with the columns {', '.join(dict.fromkeys(wanted))}{by}", list(table.columns))
        )
    if table.empty:
        raise ArgumentError(message(name, "of at least one row", "an empty table"))
    made = {one: _texts(table[one], f"{name}[{one!r}]") for one in named}
    made |= {
        one: _numbers(table[one], f"{name}[{one!r}]") for one in (*real, *finite, *whole, *partly) if one not in made
    }
    found = table.reset_index(drop=True).assign(**made)
    for one in whole:
        held = found[one].dropna()
        if not np.isfinite(held).all() or (held % 1 != 0).any() or (held.abs() > 2**53).any():
            raise ArgumentError(
                message(f"{name}[{one!r}]", "a column of whole numbers", held[held % 1 != 0].tolist()[:3])
            )
    found = found.dropna(subset=list(dict.fromkeys([*whole, *named])), ignore_index=True)
    if found.empty:
        raise ArgumentError(message(name, f"of at least one row with its {' and '.join([*whole, *named])}", "none"))
    for one in (*real, *finite):
        good = np.isfinite(found[one])
        if not good.all() if one in finite else not good.any():
            must = "a column of finite numbers" if one in finite else "a column with a finite number"
            raise ArgumentError(message(f"{name}[{one!r}]", must, found[one][~good].tolist()[:3]))
    found = found.astype(dict.fromkeys((one for one in whole if one not in named), np.int64))
    found.attrs = dict(table.attrs)
    return found


def _numbers(column: "pd.Series[Any]", name: str) -> "pd.Series[float]":
    """Numbers as float64, missing ones as NaN."""
    if not to_scale(column) and column.notna().any():
        raise ArgumentError(message(name, "a column of numbers", column.dtype))
    if column.dtype != np.dtype(object) and to_scale(column):
        return pd.Series(column.to_numpy(dtype=np.float64, na_value=np.nan))
    try:
        values = [float("nan") if one is None or one is pd.NA else float(one) for one in column]
    except OverflowError:
        raise ArgumentError(message(name, "a column of numbers that a float holds", column.dtype)) from None
    return pd.Series(values, dtype=np.float64)


def _real(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_, np.complexfloating))


def _texts(column: "pd.Series[Any]", name: str) -> "pd.Series[Any]":
    """Texts, and numbers as texts; missing ones as None."""
    found: list[str | None] = []
    for one in column:
        if not isinstance(one, (str, bool, np.bool_)) and not _real(one) and one is not None and one is not pd.NA:
            raise ArgumentError(message(name, "a column of texts or numbers", one))
        missing = one is None or one is pd.NA or (isinstance(one, (float, np.floating)) and one != one)
        found.append(None if missing else str(one).encode("utf-8", "backslashreplace").decode())
    return pd.Series(found, dtype=object)


def placed(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A table whose columns say where cells stand: numbers in their order, whole ones as such, anything else as texts.
    Rows where one is missing, or infinite, are left out.

    Raises:
        ArgumentError: there is no row with all of them.
    """
    for name in columns:
        if not to_scale(table[name]):
            table = taken(table, named=[name])
            continue
        table = taken(table, real=[name])
        table = table[np.isfinite(table[name])].reset_index(drop=True)
        if (table[name] % 1 == 0).all() and (table[name].abs() <= 2**53).all():
            table = table.astype({name: np.int64})
    return table


def to_scale(column: "pd.Series[Any]") -> bool:
    """Whether a column holds numbers and nothing else, so that they have an order."""
    if column.dtype == np.dtype(object):
        held = [one for one in column if one is not None and one is not pd.NA]
        return bool(held) and all(map(_real, held))
    kind = column.dtype
    return pd.api.types.is_numeric_dtype(kind) and not (
        pd.api.types.is_bool_dtype(kind) or pd.api.types.is_complex_dtype(kind)
    )


def one_of(table: pd.DataFrame, column: str, given: Any, name: str) -> str:
    """The level of a column that an argument names; the first where it is None.

    Raises:
        ArgumentError: no row has it.
    """
    known = list(dict.fromkeys(table[column]))
    return str(known[0]) if given is None else choice(name, given, known)


def label_of(name: str, given: Any, otherwise: Any) -> str:
    """A label that was given, as it is drawn; what it says otherwise, as it is written, where it is empty.

    Dollar signs of a caller's own label are mathematics, which must be such.

    Raises:
        ArgumentError: it is no text, is too long, or is mathematics that cannot be read.
    """
    if not text(name, given):
        return plain(otherwise)
    if len(given) > LONGEST_LABEL:
        raise ArgumentError(message(name, f"a text of at most {LONGEST_LABEL} characters", given))
    shown = "".join(one if one == "\n" or one.isprintable() else escaped(one) for one in given)
    from matplotlib.cbook import is_math_text
    from matplotlib.mathtext import MathTextParser

    for line in filter(is_math_text, shown.split("\n")):
        try:
            MathTextParser("path").parse(line)
        except ValueError:
            do = r"Write a dollar sign that is none as \$."
            raise ArgumentError(message(name, "a text whose mathematics matplotlib can read", given, do=do)) from None
    return shown


def middles(table: pd.DataFrame, low: str, high: str) -> tuple["pd.Series[float]", "pd.Series[float]"]:
    """(middle, half its length) of intervals; NaN where an end is missing.

    Raises:
        ArgumentError: an end is infinite, or the lower is above the upper.
    """
    for end in (low, high):
        if np.isinf(table[end]).any():
            raise ArgumentError(message(f"table[{end!r}]", "a column of finite numbers", float("inf")))
    if (table[low] > table[high]).any():
        row = table[table[low] > table[high]].iloc[0]
        raise ArgumentError(message("table", f"one with {low} <= {high} in every row", (row[low], row[high])))
    return (table[low] + table[high]) / 2, (table[high] - table[low]) / 2


def convention(table: pd.DataFrame, unit: str = "", *, apart: str = " ") -> str:
    """A unit and the norm that a table says of itself, in brackets behind a blank: " (nats, frozen norm)"."""
    norms = said(table, "norm")
    told = [*([plain(unit)] if unit else []), *([f"{' and '.join(norms)} norm"] if norms else [])]
    return f"{apart}({', '.join(told)})" if told else ""


def said(table: pd.DataFrame, column: str) -> list[str]:
    """The different values of a column, as they are drawn; none where there is no such column."""
    return (
        list(dict.fromkeys(map(plain, _texts(table[column], f"table[{column!r}]").dropna()))) if column in table else []
    )

"""One escaped table, for every value's notebook face; and numbers as people read them.

Whatever stands in a cell is text: tokens such as ``<img src=x onerror=alert(1)>`` stay what they are.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import isfinite, isinf
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from resid_surgery._check import shown

if TYPE_CHECKING:
    import pandas as pd

SHORT = 32
HUGE = 1.7976931348623157e308
Classes = Mapping[str, Callable[[Any], str]]
"""Column -> the CSS class of a cell by its value."""


def cell_text(value: Any) -> str:
    """A cell in words: four digits of a number, powers of ten for small and large ones, nothing where it is missing.

    Short texts with space around them, as many tokens are, stand in quotes; what has no words of its own is named by
    its class.
    """
    try:
        return _in_words(value)
    except Exception:  # noqa: BLE001  (any object may stand in a cell, with any fault of its own)
        return shown(value)


def _in_words(value: Any) -> str:
    if value is None or (isinstance(value, Real) and value != value) or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(value, str):
        return repr(value) if value != value.strip() and len(value) <= SHORT else value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell_text(one)}" for key, one in value.items())
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(int(value))
    return number_text(float(value)) if isinstance(value, Real) else str(value)


def number_text(value: float, digits: int = 4) -> str:
    """A float with some significant digits: 0.0123, 12.35, 1.2e-05, ∞."""
    if value == 0:
        return "0"
    if not isfinite(value):
        return ("∞" if value > 0 else "−∞") if isinf(value) else ""
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("-", "−", 1) if value < 0 else f"{value:.1e}"
    whole = len(str(int(abs(value))))
    after = max(0, digits - whole) if abs(value) >= 1 else digits + _zeros(abs(value)) - 1
    text = f"{abs(value):.{min(after, 8)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"−{text}" if value < 0 else text


def table_html(
    frame: "pd.DataFrame",
    *,
    caption: str = "",
    limit: int | None = None,
    classes: Classes | None = None,
    exact: bool = False,
    chosen: Sequence[str] = (),
    shown_with: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """A DataFrame as one HTML table, every text in it escaped; numbers stand to the right.

    Args:
        frame: its index is not shown. caption: above it. limit: rows shown; a last row says how many more there are.
        classes: column -> class of a cell by its value. exact: cells of numbers also hold them with all digits.
        chosen: columns whose value a row also holds as ``data-<column>``. shown_with: column -> (control, value), which
            its header then holds: what a script needs to choose rows and columns.

    Returns:
        ``<table>...</table>``, without styles or scripts of its own.
    """
    some = frame if limit is None else frame.head(limit)
    names, side = [str(one) for one in frame.columns], _sides(frame)
    head = "".join(_header(name, s, (shown_with or {}).get(name)) for name, s in zip(names, side, strict=True))
    body = "".join(_row(names, side, row, classes or {}, exact, chosen)
                   for row in some.itertuples(index=False, name=None))  # fmt: skip
    rest = len(frame) - len(some)
    foot = f'<tfoot><tr><td class="rest" colspan="{len(names)}">and {rest} more rows</td></tr></tfoot>' if rest else ""
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table>"


def face_html(heading: str, *tables: "pd.DataFrame | Mapping[str, Any]", limit: int = 10) -> str:
    """The notebook face of a value: a line in words, then its tables, cut short.

    Args:
        heading: the line. tables: DataFrames, or names with values. limit: rows of each.
    """
    frames = [_named(table) if isinstance(table, Mapping) else table for table in tables]
    told = "".join(table_html(frame, limit=limit) for frame in frames if len(frame))
    return f"<div><p><strong>{escape(heading)}</strong></p>{told}</div>"


def _named(values: Mapping[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"name": list(values), "value": pd.Series(list(values.values()), dtype=object)})


def _header(name: str, side: str, with_what: tuple[str, str] | None) -> str:
    held = "" if with_what is None else f' data-control="{escape(with_what[0])}" data-value="{escape(with_what[1])}"'
    return f"<th{_classed(side)}{held}>{escape(name)}</th>"


def _row(
    names: list[str], side: list[str], row: tuple[Any, ...], classes: Classes, exact: bool, chosen: Sequence[str]
) -> str:
    cells = []
    for name, where, value in zip(names, side, row, strict=True):
        text = cell_text(value)
        kinds = (where, classes[name](value) if name in classes else "", "s" if len(text) <= SHORT else "")
        held = f' data-order="{_digits(value)}"' if exact and where else ""
        cells.append(f"<td{_classed(' '.join(filter(None, kinds)))}{held}>{escape(text)}</td>")
    held = "".join(f' data-{escape(name)}="{escape(cell_text(row[names.index(name)]))}"' for name in chosen)
    return f"<tr{held}>{''.join(cells)}</tr>"


def _digits(value: Any) -> str:
    """A number with all its digits, as a script reads it; infinity as the largest there is."""
    if cell_text(value) == "":
        return ""
    return repr(min(max(float(value), -HUGE), HUGE))


def _sides(frame: "pd.DataFrame") -> list[str]:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return ["n" if is_numeric_dtype(kind) and not is_bool_dtype(kind) else "" for kind in frame.dtypes]


def _classed(names: str) -> str:
    return f' class="{escape(names)}"' if names else ""


def _zeros(value: float) -> int:
    """Zeros behind the point, and the digit after them."""
    return next(i for i in range(1, 8) if value * 10**i >= 1)

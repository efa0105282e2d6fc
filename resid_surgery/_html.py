"""One escaped table, for every value's notebook face; and numbers as people read them.

Whatever stands in a cell is text: tokens such as ``<img src=x onerror=alert(1)>`` stay what they are.
"""

from collections.abc import Callable, Mapping
from html import escape
from math import isfinite, isinf
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SHORT = 32
Classes = Mapping[str, Callable[[Any], str]]
"""Column -> the CSS class of a cell by its value."""


def cell_text(value: Any) -> str:
    """A cell in words: four digits of a number, powers of ten for small and large ones, nothing where it is missing.

    Short texts with space around them, as many tokens are, stand in quotes.
    """
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
    frame: "pd.DataFrame", *, caption: str = "", limit: int | None = None, classes: Classes | None = None
) -> str:
    """A DataFrame as one HTML table, every text in it escaped; numbers stand to the right.

    Args:
        frame: its index is not shown. caption: above it. limit: rows shown; a last row says how many more there are.
        classes: column -> class of a cell by its value.

    Returns:
        ``<table>...</table>``, without styles or scripts of its own.
    """
    shown = frame if limit is None else frame.head(limit)
    names, side = [str(one) for one in frame.columns], _sides(frame)
    head = "".join(f"<th{_classed(s)}>{escape(name)}</th>" for name, s in zip(names, side, strict=True))
    body = "".join(_row(names, side, row, classes or {}) for row in shown.itertuples(index=False, name=None))
    if len(shown) < len(frame):
        body += f'<tr><td class="rest" colspan="{len(names)}">and {len(frame) - len(shown)} more rows</td></tr>'
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(names: list[str], side: list[str], row: tuple[Any, ...], classes: Classes) -> str:
    cells = []
    for name, where, value in zip(names, side, row, strict=True):
        text = cell_text(value)
        kinds = (where, classes[name](value) if name in classes else "", "s" if len(text) <= SHORT else "")
        cells.append(f"<td{_classed(' '.join(filter(None, kinds)))}>{escape(text)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _sides(frame: "pd.DataFrame") -> list[str]:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return ["n" if is_numeric_dtype(kind) and not is_bool_dtype(kind) else "" for kind in frame.dtypes]


def _classed(names: str) -> str:
    return f' class="{escape(names)}"' if names else ""


def _zeros(value: float) -> int:
    """Zeros behind the point, and the digit after them."""
    return next(i for i in range(1, 8) if value * 10**i >= 1)

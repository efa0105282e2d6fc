"""Small drawings as inline SVG: a gate's interval against its limits, and curves along a sequence.

Colours come from the page's variables, so that both its faces fit; what a colour says, a shape says too.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

import pandas as pd

from resid_surgery._html import cell_text
from resid_surgery.editing.policy import AT_MOST, GATES

WIDE, HIGH = 190, 26
PANEL_WIDE, PANEL_HIGH, SIDE = 300, 130, 58


def gate_svg(row: Mapping[Any, Any]) -> str:
    """One gate: a dot for the value, a bar for its interval, dashed warn and solid fail limit, the refused side tinted.

    Args:
        row: of the table from `judge`.

    Returns:
        ``<svg>...</svg>``, or nothing where there is no value. The scale runs over all that is finite; a bound that is
        not runs out of the picture.
    """
    gate = GATES.get(str(row["gate"]))
    ideal = gate.ideal if gate else row["value"]
    marks = [float(row[name]) for name in ("value", "low", "high", "warn", "fail") if pd.notna(row[name])]
    finite = [one for one in (*marks, float(ideal)) if isfinite(one)]
    if pd.isna(row["value"]) or not finite:
        return ""
    left, right = min(finite), max(finite)
    if left == right:
        left, right = left - 1, right + 1
    span = right - left

    def at(value: float) -> float:
        return min(max(8 + (WIDE - 16) * (value - left) / span, 0), WIDE)

    parts = [f'<line class="axis" x1="0" y1="{HIGH / 2}" x2="{WIDE}" y2="{HIGH / 2}"/>']
    if pd.notna(row["fail"]):
        x = at(float(row["fail"]))
        begin, wide = (x, WIDE - x) if row["direction"] == AT_MOST else (0, x)
        parts.append(f'<rect class="refused" x="{begin:.1f}" y="2" width="{wide:.1f}" height="{HIGH - 4}"/>')
    for name in ("warn", "fail"):
        if pd.notna(row[name]):
            x = at(float(row[name]))
            parts.append(f'<line class="{name}" x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{HIGH - 2}"/>')
    a, b = at(float(row["low"])), at(float(row["high"]))
    parts.append(f'<rect class="bar" x="{a:.1f}" y="{HIGH / 2 - 3}" width="{max(b - a, 1):.1f}" height="6" rx="2"/>')
    parts.append(f'<circle class="dot" cx="{at(float(row["value"])):.1f}" cy="{HIGH / 2}" r="4"/>')
    said = f"{cell_text(row['value'])} in [{cell_text(row['low'])}, {cell_text(row['high'])}]"
    return _svg(WIDE, HIGH, f"{row['gate']}: {said}", parts)


def curves_svg(table: pd.DataFrame) -> list[str]:
    """Each column of numbers against the first one, a panel each.

    Args:
        table: the first column of numbers is the axis (how many edits).

    Returns:
        One ``<svg>`` a further column of numbers that has two values; none where the table is no curve.
    """
    numbers = [str(name) for name in table if _is_number(table[name])]
    if len(numbers) < 2:
        return []
    return [svg for name in numbers[1:] if (svg := _panel(table, numbers[0], name))]


def _panel(table: pd.DataFrame, along: str, name: str) -> str:
    kept = table[[along, name]].astype(float).dropna()
    kept = kept[kept.map(isfinite).all(axis=1)].sort_values(along)
    if len(kept) < 2:
        return ""
    x, y = _scaled(kept[along], SIDE, PANEL_WIDE - SIDE), _scaled(kept[name], PANEL_HIGH - 34, 32)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(x, y, strict=True))
    begin, end = (tuple(cell_text(kept[column].iloc[i]) for column in (along, name)) for i in (0, -1))
    floor, base = PANEL_HIGH - 22, PANEL_HIGH - 6
    parts = [
        f'<text class="title" x="0" y="12">{escape(name)}</text>',
        f'<line class="axis" x1="{SIDE}" y1="{floor}" x2="{PANEL_WIDE - SIDE}" y2="{floor}"/>',
        f'<polyline class="curve" points="{points}"/>{dots}',
        f'<text x="{SIDE}" y="{base}" text-anchor="middle">{escape(along)} {begin[0]}</text>',
        f'<text x="{PANEL_WIDE - SIDE}" y="{base}" text-anchor="middle">{end[0]}</text>',
        f'<text x="{SIDE - 7}" y="{y[0] + 4:.1f}" text-anchor="end">{begin[1]}</text>',
        f'<text x="{PANEL_WIDE - SIDE + 7}" y="{y[-1] + 4:.1f}">{end[1]}</text>',
    ]
    return _svg(PANEL_WIDE, PANEL_HIGH, f"{name} by {along}", parts)


def _scaled(values: "pd.Series[float]", begin: float, end: float) -> list[float]:
    low, span = float(values.min()), float(values.max() - values.min())
    return [begin + (end - begin) * ((float(one) - low) / span if span else 0.5) for one in values]


def _is_number(column: "pd.Series[Any]") -> bool:
    return bool(pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column))


def _svg(wide: float, high: float, label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img" aria-label="{escape(label)}">'
    return f"{head}<title>{escape(label)}</title>{''.join(parts)}</svg>"

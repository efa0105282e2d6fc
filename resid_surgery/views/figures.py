"""Figures of scores: intervals, layers, sums and curves. Tidy table -> matplotlib Axes; nothing is shown or saved."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from resid_surgery import _check
from resid_surgery.errors import ArgumentError
from resid_surgery.views.lettering import plain, series
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import MARKS, STYLES
from resid_surgery.views.taking import convention, label_of, middles, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 300
"""Rows beyond which a new figure grows no further."""


def plot_intervals(
    table: pd.DataFrame,
    *,
    label: str = "score",
    value: str = "mean",
    low: str = "low",
    high: str = "high",
    xlabel: str = "",
    mark: float | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Means with their intervals, one line a group, the largest on top.

    Args:
        table: from `bootstrap`. label, value, low, high: its columns. xlabel: what is measured, with its unit.
        mark: where to draw a dashed line (the prediction as it is, say). ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing or of another kind, or an option is.
    """
    rows = taken(table, named=[label], real=[value], partly=[low, high]).sort_values(
        value, kind="stable", ignore_index=True
    )
    middle, half = middles(rows, low, high)
    shown, line = label_of("xlabel", xlabel, value), None if mark is None else _check.finite("mark", mark)
    ax = axes_of(ax, 7.2, 1.2 + 0.3 * min(len(rows), MOST_LINES))
    ax.errorbar(middle, rows.index, xerr=half, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    ax.plot(rows[value], rows.index, "o", color="black", ms=4)
    ax.set_yticks(rows.index, rows[label].map(plain))
    if line is not None:
        ax.axvline(line, ls="--", lw=1, color="grey")
    ax.set_xlabel(shown)
    ax.grid(axis="x", alpha=0.25)
    return ax


def plot_layers(
    table: pd.DataFrame, value: str, *, hue: str | None = None, ylabel: str = "", ax: "Axes | None" = None
) -> "Axes":
    """A quantity by layer, one line for each level of a column; several rows of a layer show their mean.

    Args:
        table: with a column ``layer``. value: the column to show. hue: the column whose levels are lines.
        ylabel: what is measured, with its unit. ax: where to draw.

    Returns:
        The Axes; lines differ in marker and dash, not in colour alone.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing or of another kind, or an option is.
    """
    rows_of = taken(table, whole=["layer"], real=[value], named=[] if hue is None else [hue])
    shown = label_of("ylabel", ylabel, value)
    ax = axes_of(ax, 8, 4)
    groups = [(value, rows_of)] if hue is None else list(rows_of.groupby(hue, sort=False))
    for i, (name, rows) in enumerate(groups):
        curve = rows.groupby("layer")[value].mean()
        ax.plot(curve.index, curve, STYLES[i % 4], marker=MARKS[i % 8], ms=4, lw=1.4, label=series(name))
    ax.axhline(0, lw=0.8, color="grey")
    ax.set_xlabel("layer")
    ax.set_ylabel(shown)
    ax.grid(alpha=0.25)
    if hue is not None:
        ax.legend(frameon=False)
    return ax


def plot_cumulated(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Score of the sum against sum of the scores, with the fitted line and the diagonal (the paper's Figure 3).

    Args:
        table: from `cumulated`. ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    rows = taken(table, finite=["sum_of_scores", "score_of_sum"], maker="cumulated")
    x, y = rows["sum_of_scores"], rows["score_of_sum"]
    line = _line_of(rows.attrs.get("line"))
    units = convention(rows, "nats")
    ax = axes_of(ax, 5.2, 4.8)
    ax.plot(x, y, ".", ms=2.5, color="black", label="subvalues added, worst first")
    ends = [float(x.min()), float(x.max())]
    ax.plot(ends, ends, ":", lw=1, color="grey", label="additive")
    if line:
        fitted = [line["slope"] * one + line["intercept"] for one in ends]
        name = f"{line['slope']:.3f} x {line['intercept']:+.3f}, r = {line['r']:.4f}"
        ax.plot(ends, fitted, "--", lw=1.2, color="C3", label=name)
    ax.set_xlabel(f"sum of log-prob increases{units}")
    ax.set_ylabel(f"log-prob increase of the sum{units}")
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    return ax


def _line_of(given: object) -> dict[str, float]:
    """The fitted line that a table brings along; nothing where it brings none."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not {"slope", "intercept", "r"} <= given.keys():
        raise ArgumentError(_check.message("table.attrs['line']", "a line with slope, intercept and r", given))
    return {name: _check.finite(f"table.attrs['line'][{name!r}]", given[name]) for name in ("slope", "intercept", "r")}


def plot_probability(table: pd.DataFrame, *, log: bool = False, ax: "Axes | None" = None) -> "Axes":
    """F(l), or log F(l): the target's probability as a subvalue is multiplied.

    Args:
        table: from `probability_curve`. log: show log F(l). ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    _check.flag("log", log)
    rows = taken(table, named=["site"], real=["times", "prob", "log_prob"], maker="probability_curve")
    units = convention(rows, "nats" if log else "")
    ax = axes_of(ax, 5.2, 4)
    for i, (site, curve) in enumerate(rows.groupby("site", sort=False)):
        ax.plot(curve["times"], curve["log_prob" if log else "prob"], STYLES[i % 4], lw=1.6, label=series(site))
    ax.axvline(1, lw=0.8, color="grey")
    ax.set_xlabel("l: times its own coefficient")
    ax.set_ylabel(("log F(l): log p(target)" if log else "F(l): p(target)") + units)
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    return ax

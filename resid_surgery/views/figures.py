"""Figures of scores: intervals, layers, sums and curves. Tidy table -> matplotlib Axes; nothing is shown or saved."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from resid_surgery._check import message
from resid_surgery.errors import ArgumentError
from resid_surgery.views.lettering import plain, series
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import MARKS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        ArgumentError: matplotlib is not installed, or a column is missing.
    """
    need_columns(table, label, value, low, high)
    rows = table.sort_values(value, kind="stable", ignore_index=True)
    ax = axes_of(ax, 7.2, 1.2 + 0.3 * len(rows))
    left, right = rows[value] - rows[low], rows[high] - rows[value]
    ax.errorbar(rows[value], range(len(rows)), xerr=[left, right], fmt="o", color="black", ms=4, capsize=3, lw=1)
    ax.set_yticks(range(len(rows)), rows[label].map(plain))
    if mark is not None:
        ax.axvline(mark, ls="--", lw=1, color="grey")
    ax.set_xlabel(xlabel or plain(value))
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
        ArgumentError: matplotlib is not installed, or a column is missing.
    """
    need_columns(table, "layer", value, *([] if hue is None else [hue]))
    ax = axes_of(ax, 8, 4)
    groups = [(value, table)] if hue is None else list(table.groupby(hue, sort=False))
    for i, (name, rows) in enumerate(groups):
        curve = rows.groupby("layer")[value].mean()
        ax.plot(curve.index, curve, STYLES[i % 4], marker=MARKS[i % 8], ms=4, lw=1.4, label=series(name))
    ax.axhline(0, lw=0.8, color="grey")
    ax.set_xlabel("layer")
    ax.set_ylabel(ylabel or plain(value))
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
        ArgumentError: matplotlib is not installed, or the table is another.
    """
    need_columns(table, "sum_of_scores", "score_of_sum")
    ax = axes_of(ax, 5.2, 4.8)
    x, y = table["sum_of_scores"], table["score_of_sum"]
    ax.plot(x, y, ".", ms=2.5, color="black", label="subvalues added, worst first")
    ends = [float(x.min()), float(x.max())]
    ax.plot(ends, ends, ":", lw=1, color="grey", label="additive")
    line = table.attrs.get("line")
    if line:
        fitted = [line["slope"] * one + line["intercept"] for one in ends]
        name = f"{line['slope']:.3f} x {line['intercept']:+.3f}, r = {line['r']:.4f}"
        ax.plot(ends, fitted, "--", lw=1.2, color="C3", label=name)
    ax.set_xlabel(f"sum of log-prob increases{convention(table, 'nats')}")
    ax.set_ylabel(f"log-prob increase of the sum{convention(table, 'nats')}")
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    return ax


def plot_probability(table: pd.DataFrame, *, log: bool = False, ax: "Axes | None" = None) -> "Axes":
    """F(l), or log F(l): the target's probability as a subvalue is multiplied.

    Args:
        table: from `probability_curve`. log: show log F(l). ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, or the table is another.
    """
    need_columns(table, "site", "times", "prob", "log_prob")
    ax = axes_of(ax, 5.2, 4)
    for i, (site, curve) in enumerate(table.groupby("site", sort=False)):
        ax.plot(curve["times"], curve["log_prob" if log else "prob"], STYLES[i % 4], lw=1.6, label=series(site))
    ax.axvline(1, lw=0.8, color="grey")
    ax.set_xlabel("l: times its own coefficient")
    ax.set_ylabel(
        "log F(l): log p(target)" + convention(table, "nats") if log else "F(l): p(target)" + convention(table)
    )
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    return ax


def need_columns(table: Any, *columns: str) -> None:
    """Refuse what is no table with these columns."""
    if not isinstance(table, pd.DataFrame):
        raise ArgumentError(message("table", "a DataFrame", type(table).__name__))
    if odd := [one for one in columns if not isinstance(one, str)]:
        raise ArgumentError(message("table", "drawn by names of columns", odd[0]))
    missing = [name for name in columns if name not in table]
    if missing:
        raise ArgumentError(message("table", f"one with the columns {', '.join(columns)}", list(table.columns)))


def need_numbers(table: pd.DataFrame, *columns: str) -> None:
    """Refuse columns that hold no numbers, and tables without rows."""
    if table.empty:
        raise ArgumentError(message("table", "of at least one row", "an empty table"))
    for name in columns:
        if not pd.api.types.is_numeric_dtype(table[name]) or pd.api.types.is_bool_dtype(table[name]):
            raise ArgumentError(message(f"table[{name!r}]", "a column of numbers", table[name].dtype))


def convention(table: pd.DataFrame, unit: str = "", *, apart: str = " ") -> str:
    """A unit and the norm that a table says of itself, in brackets behind a blank: " (nats, frozen norm)"."""
    norms = list(dict.fromkeys(map(str, table["norm"]))) if "norm" in table else []
    said = [*([unit] if unit else []), *([f"{' and '.join(norms)} norm"] if norms else [])]
    return f"{apart}({', '.join(said)})" if said else ""

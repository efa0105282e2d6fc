"""Profiles: what helps, harms or separates tokens by layer, what adding a vector does, and studies of many prompts."""

from typing import TYPE_CHECKING

import pandas as pd

from resid_surgery._check import flag, message
from resid_surgery.errors import ArgumentError
from resid_surgery.views.figures import plot_layers
from resid_surgery.views.lettering import plain, quoted, series
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import MARKS, MINUS, STYLES
from resid_surgery.views.taking import convention, label_of, middles, one_of, placed, said, taken, to_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 200.0
"""Inches."""


def plot_layer_scores(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Log-prob increase of every attention and MLP output (the paper's Figure 5).

    Args:
        table: from `scores` with ``kind="layer"``, of one prompt or several (their mean is shown). ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    rows = taken(table, whole=["layer"], named=["kind"], real=["log_prob_increase"], maker="scores")
    label = f"log-prob increase{convention(rows, 'nats')}"
    return plot_layers(rows, "log_prob_increase", hue="kind", ylabel=label, ax=ax)


def plot_counts(table: pd.DataFrame, *, share: bool = False, ax: "Axes | None" = None) -> "Axes":
    """How many subvalues of each layer help the target and how many harm it (the paper's Figure 6).

    Args:
        table: from `counts`, of one kind or several, one prompt or several (their mean is shown).
        share: of all candidates of a layer instead of numbers, so that kinds can be compared. ax: where to draw.

    Returns:
        The Axes; helpful solid, harmful dashed, kinds differ in marker.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    flag("share", share)
    numbers = ["helpful", "harmful", "candidates"]
    taken_rows = taken(table, whole=["layer"], named=["kind"], finite=numbers, maker="counts")
    scores = said(taken_rows, "score")
    what = f"{'share of ' if share else ''}subvalues" + (f" by {', '.join(scores)}" if scores else "")
    label = what + convention(taken_rows, apart="\n")
    ax = axes_of(ax, 8, 4)
    for i, (kind, rows) in enumerate(taken_rows.groupby("kind", sort=False)):
        for style, sign in (("-", "helpful"), ("--", "harmful")):
            amounts = rows[sign] / rows["candidates"] if share else rows[sign]
            curve = amounts.groupby(rows["layer"]).mean()
            ax.plot(curve.index, curve, style, marker=MARKS[i % 8], ms=4, lw=1.4, label=series(f"{kind}, {sign}"))
    _by_layer(ax, label)
    return ax


def plot_shares(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """How much of what helps in each layer its k best subvalues give (the paper's Figure 7).

    Args:
        table: from `best_share`, of one kind or several. ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    rows = taken(table, whole=["layer", "k"], named=["kind"], real=["share"], maker="best_share")
    many = " or ".join(str(k) for k in sorted(set(rows["k"])))
    label = f"share of the {many} best\nin all that helps{convention(rows)}"
    return plot_layers(rows, "share", hue="kind", ylabel=label, ax=ax)


def plot_separation(table: pd.DataFrame, *, versus: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Which attention and MLP outputs tell the target from a competitor (the paper's Figure 10).

    Args:
        table: from `separation`. versus: the competitor; the first by default. ax: where to draw.

    Returns:
        The Axes; above 0 is towards the target.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or has no such competitor.
    """
    named = ["kind", "target", "versus"]
    rows = taken(table, whole=["layer"], named=named, real=["difference"], maker="separation")
    other = one_of(rows, "versus", versus, "versus")
    rows = rows[rows["versus"] == other]
    label = (
        f"bs {quoted(rows['target'].iloc[0], 16)} \u2212 {quoted(other, 16)}{convention(rows, 'logits', apart=chr(10))}"
    )
    return plot_layers(rows, "difference", hue="kind", ylabel=label, ax=ax)


def plot_addition(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """A distribution before and after something is added to its bs-values (paper: distribution change), with the sums.

    Args:
        table: from `add_bs_values` or `add_subvalues`. ax: where to draw.

    Returns:
        The Axes: probabilities as bars, empty before and hatched after; below each token its before-softmax values,
        "before + added = after".

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is none of those.
    """
    sums = ("bs_before", "bs_added", "bs_after", "prob_before", "prob_after")
    shown = taken(table, named=["case", "token"], finite=sums, maker="add_subvalues")
    cases, units = list(shown.groupby("case", sort=False)), convention(shown, "logits")
    ax = axes_of(ax, min(1.6 + 1.0 * len(shown) + 0.5 * len(cases), WIDEST), 4.2)
    places, names, start = [], [], 0.0
    for case, rows in cases:
        at = [start + i for i in range(len(rows))]
        ax.text((at[0] + at[-1]) / 2, 1.03, series(case), ha="center", fontsize=9, transform=ax.get_xaxis_transform())
        places += at
        names += [_sum(*one) for one in zip(rows["token"], *(rows[name] for name in sums[:3]), strict=True)]
        start = at[-1] + 1.6
    for shift, column, hatch, label in ((-0.21, "prob_before", "", "before"), (0.21, "prob_after", "///", "after")):
        heights = [float(p) for _, rows in cases for p in rows[column]]
        bars = ax.bar(
            [x + shift for x in places], heights, 0.38, fc="white", ec="black", lw=0.8, hatch=hatch, label=label
        )
        ax.bar_label(bars, [_probability(p) for p in heights], fontsize=7, padding=2)
    ax.set_xticks(places, names, fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(f"token, and before-softmax values: before + added = after{units}")
    ax.set_ylabel("probability")
    ax.set_ylim(top=1.12 * max(shown["prob_before"].max(), shown["prob_after"].max()))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _sum(token: str, before: float, added: float, after: float) -> str:
    sign = "+" if added >= 0 else MINUS
    return f"{quoted(token, 14)}\n{_short(before)} {sign} {_short(abs(added))}\n= {_short(after)}"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS)


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"


def _by_layer(ax: "Axes", ylabel: str) -> None:
    ax.axhline(0, lw=0.8, color="grey")
    ax.set_xlabel("layer")
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)


def plot_study(
    table: pd.DataFrame, x: str, *, hue: str = "arm", ylabel: str = "", log: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """Means over prompts with their intervals, along an axis of a study, one line an arm.

    Args:
        table: from ``Run.summary([hue, x])`` or `bootstrap` by the same columns: one row a level of `hue` and `x`.
        x: the column along the axis (such as "k"); numbers are placed to scale, anything else evenly.
        hue: the column whose levels are lines. ylabel: what is measured, with its unit. log: a logarithmic `x` axis.
        ax: where to draw.

    Returns:
        The Axes; lines differ in marker and dash, not in colour alone; bars are the intervals in the table.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing or of another kind, a line has two values at one
            place, or an option is none of those.
    """
    flag("log", log)
    label = label_of("ylabel", ylabel, "mean over prompts, with its interval")
    figures = ["mean", "low", "high"]
    if isinstance(x, str) and isinstance(hue, str) and x == hue:
        raise ArgumentError(message("hue", "another column than `x`", hue))
    columns = taken(table, real=figures)
    scaled = isinstance(x, str) and x in columns and to_scale(columns[x])
    shown = taken(columns, real=figures, named=[hue] if scaled else [x, hue], finite=[x] if scaled else [])
    shown = placed(shown, x) if scaled else shown
    if shown.duplicated([hue, x]).any():
        raise ArgumentError(message("table", f"one with one row for each {hue} and {x}", f"{len(shown)} rows"))
    levels = sorted(shown[x].unique()) if scaled else list(dict.fromkeys(shown[x]))
    if log and (not scaled or min(levels) <= 0):
        raise ArgumentError(message("log", "False where `x` is not all numbers above 0", True))
    shown["place"] = shown[x] if scaled else shown[x].map(levels.index)
    shown["middle"], shown["half"] = middles(shown, "low", "high")
    ax = axes_of(ax, 6.6, 4.2)
    for i, (name, some) in enumerate(shown.groupby(hue, sort=False)):
        rows = some.sort_values("place")
        (line,) = ax.plot(rows["place"], rows["mean"], MARKS[i % 8] + STYLES[i % 4], ms=5, lw=1.4, label=series(name))
        ax.errorbar(rows["place"], rows["middle"], yerr=rows["half"], fmt="none", ecolor=line.get_color(), capsize=3)
    if log:
        ax.set_xscale("log")
    ax.set_xticks(levels if scaled else range(len(levels)), [plain(one) for one in levels])
    ax.minorticks_off()
    ax.axhline(0, lw=0.8, color="grey")
    ax.set_xlabel(plain(x))
    ax.set_ylabel(label)
    ax.legend(frameon=False, title=plain(hue))
    ax.grid(alpha=0.25)
    return ax

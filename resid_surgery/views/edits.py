"""Figures of edits: where they act against what they did, and how much of a stream of them is left."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from resid_surgery._check import finite, message
from resid_surgery.errors import ArgumentError
from resid_surgery.views.plots import axes_of
from resid_surgery.views.taking import taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_exposure(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Exposure of each position against the KL measured there, both on logarithmic axes.

    Args:
        table: from `exposure_against_kl`. ax: where to draw. Positions where either is 0 or below have no place on
            logarithmic axes and are counted in the title, as are infinite ones.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing, or no position has both.
    """
    found = taken(table, real=["exposure", "kl"], maker="exposure_against_kl")
    shown = found[(found["exposure"] > 0) & (found["kl"] > 0) & np.isfinite(found["exposure"] + found["kl"])]
    if shown.empty:
        raise ArgumentError(message("table", "of at least one position with exposure and KL above 0", len(table)))
    rank = found.attrs.get("rank_correlation")
    said = "" if rank is None else f"rank correlation {_rank(rank)}, "
    ax = axes_of(ax, 6.0, 4.5)
    ax.scatter(shown["exposure"], shown["kl"], s=8, alpha=0.5, color="black", linewidths=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("exposure (share of the stream's norm)")
    ax.set_ylabel("KL(base, edited), nats")
    left = len(table) - len(shown)
    ax.set_title(f"{said}{len(table)} positions" + (f", {left} not shown" if left else ""))
    ax.grid(alpha=0.25)
    return ax


def _rank(given: object) -> str:
    """A rank correlation in two digits; one of constants is no number."""
    if isinstance(given, float) and given != given:
        return "none"
    return f"{finite('table.attrs[rank_correlation]', given):.2f}"


def plot_retention(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Success at once and retention of all edits so far, at each checkpoint of a stream.

    Args:
        table: the "curve" of a stream's validation. ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, or a column is missing.
    """
    rows = taken(table, whole=["edits"], real=["at_once", "retained"])
    if rows["edits"].min() < 1:
        raise ArgumentError(message("table['edits']", "a column of numbers of edits, from 1 up", rows["edits"].min()))
    ax = axes_of(ax, 6.0, 4.0)
    ax.plot(rows["edits"], rows["at_once"], "o--", color="grey", label="right after its own edit")
    ax.plot(rows["edits"], rows["retained"], "s-", color="black", label="at this checkpoint")
    ax.set_xscale("log")
    ax.set_xticks(rows["edits"], rows["edits"].astype(str))
    ax.minorticks_off()
    ax.set_ylim(-0.05, 1.05)
    ax.set_xlabel("edits so far")
    ax.set_ylabel("facts said when decoded freely (share)")
    ax.legend()
    ax.grid(alpha=0.25)
    return ax

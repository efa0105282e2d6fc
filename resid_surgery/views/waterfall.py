"""Waterfall: how a logit gets from before to after an operation: who removed, who added, who compensated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import pandas as pd

from resid_surgery._check import finite, message, whole
from resid_surgery.errors import ArgumentError
from resid_surgery.views.lettering import plain
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import MINUS, decimals, number
from resid_surgery.views.taking import convention, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = {
    "total": ("0.25", ""),
    "operated": ("0.75", "///"),
    "post-norm": ("0.75", "xx"),
    "goes along": ("0.9", "..."),
    "compensates": ("white", "\\\\\\"),
    "norm's new scale": ("white", "++"),
}
SMALL, LARGEST = 1e-9, 1e12


@final
@dataclass(frozen=True)
class Step:
    """One bar: what it is called, its part in the story (see `LOOKS`), and the logits that it adds."""

    name: str
    role: str
    amount: float


def plot_ledger(ledger: pd.DataFrame, *, top: int = 8, before: float | None = None, ax: "Axes | None" = None) -> "Axes":
    """The target's logit from before to after: what was operated on, who went along, who compensated, the norm.

    Every bar begins where the one above it ended, so that they lead from the first total to the last, with nothing left
    over. *Operated* is the direct effect, summed over what each operation did at an addend; the rest are changes that
    follow from it: those of its sign *go along*, those against it *compensate*. Where nothing was operated on at this
    position (an operation at an earlier one), the change as a whole stands for the direct effect.

    Args:
        ledger: of an effect (``effect.ledger()``). top: how many addends that changed are bars of their own, by size;
            the others, and those of less than half a percent of the largest, are one bar a role.
        before: the logit before; the sum of ``bs_before`` by default, which leaves out the readout's constants.
        ax: where to draw.

    Returns:
        The Axes; bars read from the top, with their logits; roles differ in hatching, not in colour alone.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option is out of range.
    """
    parts = ("bs_before", "bs_change", "direct", "post_norm", "indirect")
    rows = taken(ledger, name="ledger", named=["site", "kind"], finite=parts)
    most = min(whole("top", top, 1), len(rows))
    if not (rows["kind"] == "norm_scale").any():
        raise ArgumentError(message("ledger", "whole, with its row norm_scale", f"{len(rows)} rows"))
    start = float(rows["bs_before"].sum()) if before is None else finite("before", before)
    steps, units = ledger_steps(rows, most), convention(rows, "logits")
    sums = [0.0, start, *(start + pd.Series([one.amount for one in steps]).cumsum())]
    if not max(map(abs, sums)) < LARGEST:
        raise ArgumentError(message("ledger", f"one whose sums are below {LARGEST:g} logits", max(sums, key=abs)))
    ax = axes_of(ax, 8.6, 1.5 + 0.31 * (len(steps) + 2))
    bars = _draw(ax, start, steps, max(2, decimals(sums)))
    ax.set_yticks(range(len(bars)), [plain(name) for name in bars])
    ax.invert_yaxis()
    ax.set_xlabel(f"bs-value of the target{units}")
    span = max(sums) - min(sums)
    ax.set_xlim(min(sums) - 0.12 * span, max(sums) + 0.16 * span)
    ax.grid(axis="x", alpha=0.25)
    _legend(ax, [role for role in LOOKS if role in {one.role for one in steps}])
    return ax


def _legend(ax: "Axes", roles: list[str]) -> None:
    from matplotlib.patches import Patch

    looks = [(role, *LOOKS[role]) for role in roles]
    shown = [Patch(fc=colour, hatch=hatch, ec="black", lw=0.6, label=role) for role, colour, hatch in looks]
    ax.legend(handles=shown, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def ledger_steps(ledger: pd.DataFrame, top: int) -> list[Step]:
    """The bars between before and after, in the order of the story; their amounts sum to the change."""
    direct = [
        Step(site, "operated", v) for site, v in zip(ledger["site"], ledger["direct"], strict=True) if abs(v) > SMALL
    ]
    sign = sum(one.amount for one in direct) or float(ledger["bs_change"].sum())
    rows = ledger[ledger["kind"] != "norm_scale"]
    later = [Step(site, _role(v, sign), v) for site, v in zip(rows["site"], rows["indirect"], strict=True) if v]
    post = float(ledger["post_norm"].sum())
    scale = float(ledger.loc[ledger["kind"] == "norm_scale", "bs_change"].sum())
    own = sorted(later, key=lambda one: -abs(one.amount))[:top]
    least = max(SMALL, 0.005 * max((abs(one.amount) for one in [*direct, *own]), default=0.0))
    picked = [one for one in own if abs(one.amount) >= least]
    picked = [one for one in later if one in picked]
    steps = _pooled(direct, top) + ([Step("post-norm", "post-norm", post)] if abs(post) > SMALL else [])
    for role in ("goes along", "compensates"):
        rest = [one for one in later if one.role == role and one not in picked]
        steps += [one for one in picked if one.role == role] + _rest(rest, role)
    return [*steps, Step("final norm", "norm's new scale", scale)]


def _pooled(steps: list[Step], top: int) -> list[Step]:
    """The largest `top`, in their order, and one bar for all others."""
    own = sorted(steps, key=lambda one: -abs(one.amount))[:top]
    return [one for one in steps if one in own] + _rest([one for one in steps if one not in own], "operated")


def _rest(steps: list[Step], role: str) -> list[Step]:
    total = sum(one.amount for one in steps)
    return [Step(f"{len(steps)} other{'s' * (len(steps) > 1)}", role, total)] if abs(total) > SMALL else []


def _role(amount: float, sign: float) -> str:
    return "goes along" if amount * sign >= 0 else "compensates"


def _draw(ax: "Axes", start: float, steps: list[Step], places: int) -> list[str]:
    """The bars, joined by thin lines; returns their names."""
    end = start + sum(one.amount for one in steps)
    _bar(ax, 0, 0.0, start, "total", number(start, places))
    at = start
    for i, one in enumerate(steps, start=1):
        _bar(ax, i, at, one.amount, one.role, ("+" if one.amount >= 0 else "") + number(one.amount, places))
        ax.plot([at, at], [i - 1, i], lw=0.6, color="black", zorder=1)
        at += one.amount
    ax.plot([end, end], [len(steps), len(steps) + 1], lw=0.6, color="black", zorder=1)
    change = ("+" if end >= start else MINUS) + number(abs(end - start), places)
    _bar(ax, len(steps) + 1, 0.0, end, "total", f"{number(end, places)}  ({change})")
    return ["before", *(one.name for one in steps), "after"]


def _bar(ax: "Axes", y: int, left: float, wide: float, role: str, text: str) -> None:
    colour, hatch = LOOKS[role]
    ax.barh(y, wide, left=left, height=0.66, color=colour, hatch=hatch, ec="black", lw=0.6, zorder=2)
    away = wide >= 0
    ax.annotate(text, (left + wide, y), xytext=(4 if away else -4, 0), textcoords="offset points", va="center",
                ha="left" if away else "right", fontsize=8, zorder=3)  # fmt: skip

"""Shading: dashes and marks of lines, colour scales for cells, and the ink in which a number can be read on each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MINUS = "\u2212"
STYLES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


@final
@dataclass(frozen=True)
class Shades:
    """A colour scale: around 0 where numbers have both signs, else from 0 up, or down, to the largest.

    Attributes:
        low, high: numbers at its ends. name: of matplotlib's colour map.
    """

    low: float
    high: float
    name: str

    @classmethod
    def of(cls, values: Any) -> "Shades":
        """The scale of some numbers; missing ones do not count."""
        finite = np.asarray(values, dtype=float).ravel()
        finite = finite[np.isfinite(finite)]
        most = max(1e-30, float(np.abs(finite).max())) if len(finite) else 1.0
        if (finite < 0).any() and (finite > 0).any():
            return cls(-most, most, "PuOr")
        return cls(-most, 0.0, "Greys_r") if (finite < 0).any() else cls(0.0, most, "Greys")

    def colour(self, value: float) -> tuple[float, float, float, float]:
        """Of a number, as red, green, blue and alpha; a missing one is white."""
        from matplotlib import colormaps

        if not np.isfinite(value):
            return (1.0, 1.0, 1.0, 1.0)
        return tuple(colormaps[self.name]((value - self.low) / (self.high - self.low)))  # type: ignore[return-value]

    def ink(self, value: float) -> str:
        """Black or white, whichever is read better on a number's colour."""
        light = sum(part * one**2.2 for part, one in zip((0.2126, 0.7152, 0.0722), self.colour(value), strict=False))
        return "black" if light > 0.179 else "white"  # where both have the same contrast, by WCAG 2


def decimals(values: Any) -> int:
    """How many decimals show three digits of the largest number, so that all of a figure can be compared."""
    finite = np.abs(np.asarray(values, dtype=float)[np.isfinite(np.asarray(values, dtype=float))])
    most = float(finite.max()) if finite.size else 0.0
    return 2 if most == 0 else min(9, max(0, 2 - int(np.floor(np.log10(most)))))


def number(value: float, places: int) -> str:
    """A number with a proper minus sign, so that signs are read without colour; nothing for a missing one."""
    if not np.isfinite(value):
        return ""
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def show_cells(ax: "Axes", values: Any, shades: Shades, *, label: str) -> None:
    """Cells as an image, the first row at the bottom, with a colour bar."""
    image = ax.imshow(
        values, cmap=shades.name, vmin=shades.low, vmax=shades.high, aspect="auto", origin="lower", interpolation="none"
    )
    ax.figure.colorbar(image, ax=ax, label=label)


def write_cells(ax: "Axes", values: Any, texts: Sequence[Sequence[str]], shades: Shades, size: float) -> None:
    """A text in every cell that has one, in an ink that can be read."""
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                ax.text(
                    j, i, text, ha="center", va="center", fontsize=size, color=shades.ink(values[i][j]), clip_on=True
                )


def largest(values: Any, most: int) -> list[list[str]]:
    """The numbers of the largest cells, whatever their sign; nothing in the others, nor where a number rounds to 0."""
    grid = np.asarray(values, dtype=float)
    sizes = np.where(np.isfinite(grid), np.abs(grid), 0.0)
    floor = np.sort(sizes.ravel())[::-1][min(most, sizes.size) - 1] if sizes.size else 0.0
    places = decimals(grid)
    return [[number(v, places) if s >= floor and round(s, places) > 0 else "" for v, s in zip(row, size, strict=True)]
            for row, size in zip(grid, sizes, strict=True)]  # fmt: skip


def room(ax: "Axes", cells: int, size: float) -> int:
    """How many letters of a size fit into one of so many cells side by side."""
    wide = ax.get_window_extent().width / ax.figure.dpi / max(1, cells)
    return int(wide * 72 / (0.62 * size))

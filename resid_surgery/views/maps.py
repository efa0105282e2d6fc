"""Maps of one prompt: its tokens shaded, states by position, heads by source. Tidy table -> matplotlib Axes."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from resid_surgery._check import choice, iterable, message, whole
from resid_surgery.addresses import parse_site
from resid_surgery.errors import ArgumentError
from resid_surgery.sites import HeadSource
from resid_surgery.views.lettering import plain, quoted, spaced
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import Shades, decimals, largest, number, room, show_cells, write_cells
from resid_surgery.views.taking import label_of, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACES = ("source", "position")
LONGEST, MOST_TOKENS = 18, 100_000


def plot_tokens(
    table: pd.DataFrame,
    value: str,
    *,
    tokens: Sequence[str] | None = None,
    label: str = "",
    wrap: int = 60,
    ax: "Axes | None" = None,
) -> "Axes":
    """A prompt as a strip of tokens, each shaded by a number that stands below it.

    Args:
        table: with a column ``source`` or ``position``, and `value`; rows of one position are summed: the weights of a
            head (`attention_weights`), scores of (head, source) pairs by source, a probability by position.
        value: the column to show. tokens: of the prompt (``rec.prompt.tokens``); by default those in the table.
        label: what it is, with its unit. wrap: letters in a line. ax: where to draw.

    Returns:
        The Axes; tokens that the table has no row of are white and without a number.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing, or the tokens are not known.
    """
    place = place_of(table)
    rows = taken(table, whole=[place], real=[value])
    wrap, shown = min(whole("wrap", wrap, 1), LONGEST * MOST_TOKENS), label_of("label", label, value)
    texts = tokens_of(rows, place, tokens)
    sums = rows.groupby(place)[value].sum(min_count=1)
    values = [float(sums.get(i, np.nan)) for i in range(len(texts))]
    words = [spaced(one, LONGEST) for one in texts]
    spots, lines = _lines([max(5, len(word) + 1) for word in words], wrap)
    ax = axes_of(ax, 1.6 + 0.13 * max(x + wide for x, _, wide in spots), 0.8 + 0.75 * lines)
    shades, places = Shades.of(values), decimals(values)
    for word, amount, spot in zip(words, values, spots, strict=True):
        _cell(ax, word, amount, number(amount, places), spot, shades)
    _frame(ax, max(x + wide for x, _, wide in spots), lines, shades, shown)
    return ax


def _lines(widths: Sequence[int], wrap: int) -> tuple[list[tuple[int, int, int]], int]:
    """(x, line, width) of every token, and how many lines there are."""
    spots, x, line = [], 0, 0
    for wide in widths:
        if x and x + wide > wrap:
            x, line = 0, line + 1
        spots.append((x, line, wide))
        x += wide
    return spots, line + 1


def _cell(ax: "Axes", word: str, amount: float, said: str, spot: tuple[int, int, int], shades: Shades) -> None:
    from matplotlib.patches import Rectangle

    x, line, wide = spot
    ax.add_patch(Rectangle((x, line), wide, 0.86, fc=shades.colour(amount), ec="grey", lw=0.6))
    middle, ink = x + wide / 2, shades.ink(amount)
    ax.text(middle, line + 0.3, word, ha="center", va="center", fontsize=10, color=ink)
    ax.text(middle, line + 0.64, said, ha="center", va="center", fontsize=7, color=ink)


def _frame(ax: "Axes", wide: int, lines: int, shades: Shades, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    ax.set_xlim(-0.2, wide + 0.2)
    ax.set_ylim(lines, -0.05)
    ax.set_axis_off()
    scale = ScalarMappable(Normalize(shades.low, shades.high), shades.name)
    ax.figure.colorbar(scale, ax=ax, fraction=0.05, pad=0.02)
    ax.set_title(label, loc="left", fontsize=10)


def plot_head_sources(
    table: pd.DataFrame,
    value: str,
    *,
    tokens: Sequence[str] | None = None,
    heads: int = 20,
    label: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Heads by source position: what each head writes, or looks at, from each token of the prompt.

    Args:
        table: one row a (head, source) pair: from `scores` or `locate` with ``kind="head_source"``, `decompose` with
            ``grain="head_source"``, `attention_weights`, or a sweep over ``"L*.H*<*"``. Other rows are left out.
        value: the column to show. tokens: of the prompt (``rec.prompt.tokens``); numbers stand for them if they are
            not known. heads: shown at most: those with the largest number, whatever its sign.
        label: what it is, with its unit. ax: where to draw.

    Returns:
        The Axes: heads in forward order from the bottom; how many are left out is said in the title.

    Raises:
        ArgumentError: matplotlib is not installed, a column is missing, or there is no such pair.
    """
    grid = _by_source(taken(table, named=["site"], real=[value]), value)
    most, told = whole("heads", heads, 1), label_of("label", label, value)
    order = grid.abs().max(axis=1).sort_values(ascending=False, kind="stable").index
    shown = grid.loc[sorted(order[: min(most, len(order))])]
    values = shown.to_numpy(dtype=float)
    columns = [int(str(j)) for j in grid.columns]
    known = None if tokens is None else texts_of(tokens)
    if known is not None and len(known) <= max(columns):
        raise ArgumentError(message("tokens", f"a prompt's tokens, for positions up to {max(columns)}", tokens))
    places = [_place(j, known) for j in columns]
    ax = axes_of(ax, min(15.0, 2.6 + 0.75 * len(columns)), max(3.0, 1.7 + 0.27 * len(shown)))
    shades = Shades.of(values)
    show_cells(ax, values, shades, label=told)
    if room(ax, len(columns), 7) >= 5:
        write_cells(ax, values, largest(values, values.size), shades, 7)
    _ticks(ax, places, [f"L{layer}.H{head}" for layer, head in shown.index])
    ax.set_xlabel("source position")
    ax.set_ylabel("head")
    left = len(grid) - len(shown)
    ax.set_title(f"{len(shown)} heads" + (f", {left} with smaller numbers left out" if left else ""))
    return ax


def _by_source(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """(layer, head) x source; several rows of a pair are an error of the caller's."""
    rows = {}
    for text, amount in zip(table["site"], table[value], strict=True):
        if "<" not in text:
            continue
        site = parse_site(text)
        if not isinstance(site, HeadSource):
            continue
        key = (site.layer, site.head, site.source)
        if key in rows:
            raise ArgumentError(message("table", "of one prompt: one row a (head, source) pair", f"two rows of {site}"))
        rows[key] = float(amount)
    if not rows:
        raise ArgumentError(message("table", "of (head, source) pairs such as L12.H4<3", list(table["site"][:3])))
    return pd.Series(rows).unstack(2)


def _place(position: int, tokens: Sequence[str] | None) -> str:
    if tokens is None:
        return str(position)
    return f"{position} {quoted(tokens[position], LONGEST)}"


def _ticks(ax: "Axes", across: list[str], up: list[str]) -> None:
    """Labels along both axes, as many as can be read."""
    for axis, names, most in ((ax.xaxis, across, 40), (ax.yaxis, up, 45)):
        every = -(-len(names) // most)
        axis.set_ticks(range(0, len(names), every), names[::every])
    if max(map(len, across)) > 4:
        ax.tick_params(axis="x", rotation=40)
        for one in ax.get_xticklabels():
            one.set(ha="right", rotation_mode="anchor")


def plot_lens(table: pd.DataFrame, *, value: str = "prob", every: int = 1, ax: "Axes | None" = None) -> "Axes":
    """What each state at each position would predict: the token in the cell, shaded by a probability.

    Args:
        table: from `lens_positions`. value: "prob" (of the token shown), or "target_prob". every: show the states of
            every so many layers, and the final one. ax: where to draw.

    Returns:
        The Axes: layers from the bottom, positions from left to right with the prompt's tokens. Where a long prompt
        leaves too little room, tokens in cells are shortened, then left out.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or an option out of range.
    """
    choice("value", value, ("prob", "target_prob"))
    apart = whole("every", every, 1)
    found = taken(table, whole=["step", "position"], named=["site", "token", "predicted"],
                  real=["prob", "target_prob"], maker="lens_positions")  # fmt: skip
    steps = sorted(map(int, set(found["step"])))
    kept = [step for step in steps if step % apart == 0 or step == steps[-1]]
    rows = found[found["step"].isin(kept)]
    if not rows[value].notna().any():
        raise ArgumentError(message(f"table[{value!r}]", "a column with a number in the states shown", "none"))
    grid = rows.pivot_table(index="step", columns="position", values=value)
    texts = rows.pivot_table(index="step", columns="position", values="predicted", aggfunc="first").to_numpy()
    tokens = rows.drop_duplicates("position").set_index("position")["token"].loc[grid.columns]
    ax = axes_of(ax, min(16.0, 2.6 + 0.95 * grid.shape[1]), max(3.4, 1.5 + 0.24 * grid.shape[0]))
    letters = min(12, room(ax, grid.shape[1], 8))
    shades, values = Shades(0.0, 1.0, "Greys"), grid.to_numpy(dtype=float)
    what = "the token shown" if value == "prob" else quoted(found.attrs.get("target", "the target"))
    show_cells(ax, values, shades, label=f"probability of {what}\n(logit lens, own norm)")
    if letters >= 3:
        write_cells(ax, values, [[spaced(one, letters) for one in row] for row in texts], shades, 8)
    names = rows.drop_duplicates("step").set_index("step")["site"].loc[grid.index]
    _ticks(ax, [f"{p} {quoted(token, LONGEST)}" for p, token in tokens.items()], [plain(one) for one in names])
    ax.set_xlabel("position")
    ax.set_ylabel("state of the residual stream")
    return ax


def place_of(table: Any) -> str:
    """Which column says where in the prompt: ``source`` before ``position``."""
    if not isinstance(table, pd.DataFrame):
        raise ArgumentError(message("table", "a DataFrame", type(table).__name__))
    found = [name for name in PLACES if name in table]
    if not found:
        raise ArgumentError(message("table", "one with a column source or position", list(table.columns)))
    return found[0]


def tokens_of(table: pd.DataFrame, place: str, given: Sequence[str] | None) -> list[str]:
    """The prompt's tokens: those given, or those in the table.

    Raises:
        ArgumentError: not known for every position, or the table has positions that the prompt has not.
    """
    first, last = int(table[place].min()), int(table[place].max())
    if first < 0:
        raise ArgumentError(message(f"table[{place!r}]", "a column of positions from 0 up", first))
    if given is not None:
        found = texts_of(given)
        if len(found) <= last:
            raise ArgumentError(message("tokens", f"a prompt's tokens, for positions up to {last}", given))
        return found
    told = taken(table, named=["token"]) if "token" in table else table.assign(token="").iloc[:0]
    known = dict(zip(told[place], told["token"], strict=True))
    if len(known) != last + 1:
        do = "Pass tokens=rec.prompt.tokens."
        raise ArgumentError(message("table", "one with the token of every position", list(table.columns), do=do))
    return [str(known[i]) for i in range(last + 1)]


def texts_of(tokens: Any) -> list[str]:
    """Texts of a prompt's tokens, of which no figure shows more than `MOST_TOKENS`.

    Raises:
        ArgumentError: they are no sequence of texts.
    """
    found = list(islice(tokens, MOST_TOKENS + 1)) if iterable(tokens) and not isinstance(tokens, Mapping) else []
    if not found or len(found) > MOST_TOKENS or not all(isinstance(one, str) for one in found):
        must = f"the texts of a prompt's 1 to {MOST_TOKENS} tokens (rec.prompt.tokens)"
        raise ArgumentError(message("tokens", must, tokens))
    return found

"""Figures: tidy table -> matplotlib Axes. Nothing here shows, saves or changes global style."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from resid_surgery._check import iterable, message
from resid_surgery.errors import ArgumentError
from resid_surgery.sites import ExpertNeuron, Neuron, Projection, Resid, SharedNeuron, Site
from resid_surgery.stream.tables import state_after
from resid_surgery.views.lettering import plain, quoted
from resid_surgery.views.shading import MARKS, STYLES, Shades, largest, show_cells, write_cells
from resid_surgery.views.taking import placed, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_stream(stream: pd.DataFrame, *, marked: Sequence[Site] = (), ax: "Axes | None" = None) -> "Axes":
    """bs-values of target and competitors along the stream, located subvalues marked (Figure 9).

    Args:
        stream: from `stream_bs`. marked: sites to mark on the target's curve, where they write.
        ax: where to draw; a new figure's by default.

    Returns:
        The Axes; lines differ in dash, from the fifth on also in marker, not in colour alone.

    Raises:
        ArgumentError: matplotlib is not installed, the table is not from `stream_bs`, or something marked is no site
            that writes along it.
    """
    need_axes(ax)
    rows = taken(stream, name="stream", whole=["step", "layer", "token_id"], named=["site", "token", "role"],
                 real=["bs_value"], maker="stream_bs")  # fmt: skip
    target = rows[rows["role"] == "target"]
    if target.empty:
        raise ArgumentError(message("stream", "one with rows of the role 'target'", sorted(set(rows["role"]))))
    seen = _seen(target, marked)
    ax = axes_of(ax, 10, 5.2)
    for i, (_, curve) in enumerate(rows.groupby("token_id", sort=False)):  # two tokens may have one text
        name = quoted(curve["token"].iloc[0])
        marks: dict[str, Any] = {"marker": MARKS[i % 8], "markevery": (i, 12), "ms": 5} if i >= len(STYLES) else {}
        ax.plot(curve["step"], curve["bs_value"], STYLES[i % 4], lw=2.2 if i == 0 else 1.6, label=name, **marks)
    _mark(ax, target, seen)
    layers = target.groupby("layer")["step"].min()
    every = max(1, len(layers) // 15)
    ax.set_xticks(layers.iloc[::every], [str(i) for i in layers.index[::every]])
    ax.set_xlabel("state of the residual stream, by layer")
    ax.set_ylabel("bs-value under the frozen final norm (logits)")
    ax.set_title("What the stream says about each token, and who wrote it")
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", frameon=False)
    return ax


def _seen(target: pd.DataFrame, marked: Iterable[Site]) -> dict[tuple[str, bool], list[Site]]:
    """(state, whether it is a neuron's) -> the sites whose sublayer has just written there."""
    if not iterable(marked):
        raise ArgumentError(message("marked", "a sequence of sites, such as found.sites", marked))
    seen: dict[tuple[str, bool], list[Site]] = {}
    states, layers = list(target["site"]), set(target["layer"])
    for site in marked:
        if (
            not isinstance(site, Site)
            or isinstance(site, (Resid, Projection))
            or getattr(site, "layer", 0) not in layers
        ):
            must = f"sites that write in layers {min(layers)} to {max(layers)}, such as found.sites"
            raise ArgumentError(message("marked", must, site))
        neuron = isinstance(site, (Neuron, ExpertNeuron, SharedNeuron))
        seen.setdefault((state_after(site, states), neuron), []).append(site)
    return seen


def _mark(ax: "Axes", target: pd.DataFrame, seen: dict[tuple[str, bool], list[Site]]) -> None:
    """Markers on the target's curve at the states where sites wrote."""
    heights = dict(zip(target["site"], zip(target["step"], target["bs_value"], strict=True), strict=True))
    for kind, marker, label in ((True, "o", "located neurons"), (False, "^", "located attention subvalues")):
        places = [heights[name] for name, neuron in seen if neuron is kind]
        if places:
            ax.plot(*zip(*places, strict=True), marker, ms=7, color="black", mfc="none", mew=1.4, ls="", label=label)
    for i, ((name, _), sites) in enumerate(sorted(seen.items(), key=lambda item: heights[item[0][0]][0])):
        more = f" +{len(sites) - 1}" if len(sites) > 1 else ""
        # alternate sides, so that neighbours on a steep curve do not collide; never over the edge
        left = i % 2 == 0 or i == len(seen) - 1
        ax.annotate(f"{sites[0]}{more}", heights[name], xytext=(-14 if left else 14, 12 if left else -12),
                    textcoords="offset points", fontsize=7, ha="right" if left else "left", va="center",
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4},
                    arrowprops={"arrowstyle": "-", "lw": 0.5})  # fmt: skip
    ax.margins(y=0.1)
    ax.set_xlim(right=target["step"].iloc[-1] * 1.12)


def plot_grid(
    table: pd.DataFrame, value: str, *, rows: str = "layer", columns: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """A sweep as a heat map: one cell a row of the table, the largest with their numbers.

    Args:
        table: from `sweep` or `patching`. value: the column to show. rows, columns: coordinates; columns are
            positions, heads, sources or indices, whichever differ first, if not given. Cells that several
            rows share show their mean.
        ax: where to draw; a new figure's by default.

    Returns:
        The Axes, with a colour bar; positions are labelled with their tokens.

    Raises:
        ArgumentError: matplotlib is not installed, or the table has no such columns.
    """
    need_axes(ax)
    if not isinstance(table, pd.DataFrame):
        raise ArgumentError(message("table", "a table from resid_surgery.sweep", type(table).__name__))
    if columns is None:
        options = [name for name in ("position", "head", "source", "index") if name in table and name != rows]
        columns = next((name for name in options if len(set(map(str, table[name]))) > 1),
                       options[0] if options else "position")  # fmt: skip
    for name, column in (("value", value), ("rows", rows), ("columns", columns)):
        if not isinstance(column, str) or column not in table:
            raise ArgumentError(message(name, "a column of the table: " + ", ".join(map(str, table.columns)), column))
    if len({value, rows, columns}) < 3:
        raise ArgumentError(message("columns", "another column than `rows` and `value`", columns))
    found = placed(taken(table, real=[value]), rows, columns)
    cells = found.pivot_table(index=rows, columns=columns, values=value, aggfunc="mean").sort_index()
    if cells.empty:
        raise ArgumentError(
            message(f"table[{value!r}]", "a column with a number where rows and columns have one", "none")
        )
    values = cells.to_numpy(dtype=float)
    wide, high = (min(14.0, 2.4 + 0.42 * values.shape[1]), min(10.0, 1.6 + 0.22 * values.shape[0]))
    ax = axes_of(ax, max(5.0, wide), max(3.0, high))
    shades = Shades.of(values)
    show_cells(ax, values, shades, label=_UNITS.get(value, plain(value)))
    written = values.size if values.shape[0] <= 40 and values.shape[1] <= 12 else 12
    write_cells(ax, values, largest(values, written), shades, 6)
    names = [plain(one) for one in cells.columns]
    if columns == "position" and "token" in table:
        tokens = found.drop_duplicates("position").set_index("position")["token"]
        names = [f"{at} {quoted(tokens[at], 16)}" for at in cells.columns]
    for axis, labels, name in ((ax.xaxis, names, columns), (ax.yaxis, [plain(one) for one in cells.index], rows)):
        every = max(1, len(labels) // 30)
        axis.set_ticks(range(0, len(labels), every), labels[::every])
        axis.set_label_text(plain(name))
    if max(map(len, names)) > 3:
        ax.tick_params(axis="x", rotation=45)
    return ax


_UNITS = {
    "score": "share of the difference made up",
    "log_prob_change": "change of log p(target), nats",
    "bs_change_target": "change of the target's logit",
    "direct": "direct effect on the target's logit",
    "kl": "KL(clean || row), nats",
}


def axes_of(ax: "Axes | None", wide: float, high: float) -> "Axes":
    """Where to draw: the Axes given, or a new figure's."""
    need_axes(ax)
    if ax is None:
        made: Axes = pyplot_module().subplots(figsize=(wide, high), layout="constrained")[1]
        return made
    return ax


def need_axes(ax: Any) -> None:
    """Refuse to draw without matplotlib, and in what is neither Axes of a figure nor None."""
    pyplot_module()
    from matplotlib.axes import Axes

    if ax is not None and (not isinstance(ax, Axes) or ax.get_figure() is None):
        raise ArgumentError(message("ax", "matplotlib Axes of a figure, or None", ax))


def pyplot_module() -> Any:
    """matplotlib.pyplot, or an error that says how to get it."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ArgumentError("drawing needs matplotlib: pip install 'resid-surgery[plots]'.") from None
    return pyplot

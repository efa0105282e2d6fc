"""Figures of sources and circuits: tidy table or graph -> matplotlib Axes; nothing is shown or saved."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from resid_surgery._check import choice, message, whole
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.views.figures import MOST_LINES
from resid_surgery.views.lettering import plain, quoted, series
from resid_surgery.views.plots import axes_of
from resid_surgery.views.shading import Shades, largest, show_cells, write_cells
from resid_surgery.views.taking import convention, label_of, one_of, said, taken

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOCATED = ("neuron", "head_source")
MARKS = {
    "readout": "*",
    "neuron": "o",
    "head_source": "s",
    "head": "s",
    "attn": "D",
    "mlp": "h",
    "embed": "^",
    "bias": "v",
}


def plot_sources(table: pd.DataFrame, *, reader: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Shares of what one reader took in, the largest on top, one series a key.

    Args:
        table: from `sources`. reader: which, as in its column; the first by default. ax: where to draw.

    Returns:
        The Axes; keys differ in hatching, not in colour alone.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or has no such reader.
    """
    named = ["reader", "key", "writer", "unit", "kind"]
    found = taken(table, named=named, finite=["share"], partly=["position"], maker="sources")
    name = one_of(found, "reader", reader, "reader")
    rows = found[(found["reader"] == name) & (found["kind"] != "constant")]
    if rows.empty:
        raise ArgumentError(message("table", f"one with sources of {name} that are no constants", "none"))
    rows = rows.assign(label=[_where(w, p) for w, p in zip(rows["writer"], rows["position"], strict=True)])
    wide = rows.pivot_table(index="label", columns="key", values="share", aggfunc="sum", sort=False).fillna(0.0)
    wide = wide.loc[wide.abs().sum(axis=1).sort_values().index]
    ax = axes_of(ax, 7.2, 1.2 + 0.28 * min(len(wide), MOST_LINES))
    high = 0.8 / wide.shape[1]
    for i, key in enumerate(wide):
        at = [y + (i - (wide.shape[1] - 1) / 2) * high for y in range(len(wide))]
        ax.barh(
            at, wide[key], height=high, hatch=("", "///", "...")[i % 3], edgecolor="black", lw=0.5, label=series(key)
        )
    ax.set_yticks(range(len(wide)), [plain(one) for one in wide.index])
    ax.axvline(0, lw=0.8, color="grey")
    ax.set_xlabel(plain(f"share ({rows['unit'].iloc[0]})"))
    ax.set_title(plain(f"What {name} reads"))
    ax.legend(frameon=False, fontsize=8)
    ax.grid(axis="x", alpha=0.25)
    return ax


def _where(writer: str, position: Any) -> str:
    return writer if pd.isna(position) else f"{writer} @{position:g}"


def plot_removed(table: pd.DataFrame, *, reader: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """What a head writes without each lower vector, both ways, by layer (the source's Figures 11 and 12).

    Args:
        table: from `attention_sources`. reader: which; the first by default. ax: where to draw.

    Returns:
        The Axes; a point below 0 is a vector that feeds the head, one above holds it back.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or has no such reader.
    """
    named, figures = ["reader", "part", "readout"], ["change", "change_weights_fixed"]
    found = taken(table, named=named, real=["writer_layer", *figures], maker="attention_sources")
    name = one_of(found, "reader", reader, "reader")
    rows = found[found["reader"] == name].reset_index(drop=True)
    label = plain(f"change of {rows['readout'].iloc[0]}") + convention(rows, *said(rows, "unit")[:1], apart="\n")
    ax = axes_of(ax, 9, 4)
    for column, style, mark, words in (
        ("change", "-", "o", "everything recomputed"),
        ("change_weights_fixed", "--", "s", "attention weights fixed"),
    ):
        ax.plot(rows.index, rows[column], style, marker=mark, ms=4, lw=1.3, label=words)
    _steps(ax, rows)
    ax.set_ylabel(label)
    ax.set_title(plain(f"What {name} writes without each lower vector"))
    ax.legend(frameon=False)
    return ax


def plot_cross_layer(table: pd.DataFrame, *, layer: int | None = None, ax: "Axes | None" = None) -> "Axes":
    """What lower vectors lend an MLP layer's helpful and unhelpful neurons, in forward order (the paper's Figure 8).

    Args:
        table: from `cross_layer`, at layer grain. layer: of the readers; the last in the table by default.
        ax: where to draw.

    Returns:
        The Axes; attention and MLP vectors alternate along it, which gives the zigzag.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or has no such layer.
    """
    found = taken(table, whole=["layer"], named=["part", "readout"], real=["writer_layer", "helpful", "unhelpful"],
                  maker="cross_layer")  # fmt: skip
    layers = sorted(map(int, set(found["layer"])))
    number = layers[-1] if layer is None else whole("layer", layer, 0)
    if number not in layers:
        raise ArgumentError(message("layer", f"one of {layers}", layer))
    rows = found[found["layer"] == number].reset_index(drop=True)
    label = plain(f"lent towards {rows['readout'].iloc[0]}") + convention(rows, apart="\n")
    ax = axes_of(ax, 9, 4)
    for column, style, mark in (("helpful", "-", "o"), ("unhelpful", "--", "s")):
        ax.plot(rows.index, rows[column], style, marker=mark, ms=4, lw=1.3, label=f"{column} neurons")
    _steps(ax, rows)
    ax.set_ylabel(label)
    ax.set_title(f"What each lower vector lends the MLP of layer {number}")
    ax.legend(frameon=False)
    return ax


def _steps(ax: "Axes", rows: pd.DataFrame) -> None:
    """Lower vectors along the axis: a tick at the attention of every few layers."""
    attention = rows[(rows["part"] == "attn") & rows["writer_layer"].notna()]
    every = max(1, -(-len(attention) // 15))
    ax.set_xticks(attention.index[::every], [f"L{i:g}" for i in attention["writer_layer"].iloc[::every]])
    ax.axhline(0, lw=0.8, color="grey")
    ax.set_xlabel("lower vector in forward order: embed, then attention and MLP of each layer")
    ax.grid(alpha=0.25)


def plot_locations(table: pd.DataFrame, *, kind: str = "neuron", ax: "Axes | None" = None) -> "Axes":
    """Layers of value and query subvalues, as histograms (the paper's Figure 19).

    Args:
        table: from `locations`. kind: "neuron" or "head_source". ax: where to draw.

    Returns:
        The Axes; roles differ in hatching, not in colour alone.

    Raises:
        ArgumentError: matplotlib is not installed, the table is another, or has no such kind.
    """
    found = taken(table, named=["role", "kind"], whole=["layer"], maker="locations")
    kind = one_of(found, "kind", choice("kind", kind, LOCATED), "kind")
    rows = found[(found["kind"] == kind) & found["role"].isin(("value", "query"))]
    if rows.empty:
        raise ArgumentError(message("table", "one with rows of the roles value and query", sorted(set(found["role"]))))
    ax = axes_of(ax, 8, 3.6)
    counts = rows.groupby(["layer", "role"]).size().unstack("role").fillna(0)
    for i, role in enumerate(("value", "query")):
        if role in counts:
            at = [layer + (i - 0.5) * 0.4 for layer in counts.index]
            ax.bar(at, counts[role], 0.4, hatch=("", "///")[i], edgecolor="black", lw=0.5, label=f"{role} {kind}s")
    ax.set_xlabel("layer")
    ax.set_ylabel("subvalues among the best")
    ax.yaxis.set_major_locator(_whole_numbers())
    ax.legend(frameon=False)
    ax.grid(axis="y", alpha=0.25)
    return ax


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def plot_heads(table: pd.DataFrame, value: str, *, label: str = "", ax: "Axes | None" = None) -> "Axes":
    """A number of every head as a map, layer by head; the largest are written out.

    Args:
        table: with columns ``layer``, ``head`` and `value`. label: what it is, with its unit. ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, or a column is missing.
    """
    found, shown = taken(table, whole=["layer", "head"], real=[value]), label_of("label", label, value)
    if value in ("layer", "head"):
        raise ArgumentError(message("value", "another column than layer and head", value))
    grid = found.pivot_table(index="head", columns="layer", values=value)
    ax = axes_of(ax, *(min(one, 100.0) for one in (1.5 + 0.3 * grid.shape[1], 1.2 + 0.32 * grid.shape[0])))
    values, shades = grid.to_numpy(dtype=float), Shades.of(grid)
    show_cells(ax, values, shades, label=shown)
    write_cells(ax, values, largest(values, 6), shades, 6)
    every = max(1, grid.shape[1] // 15)
    ax.set_xticks(range(0, grid.shape[1], every), [str(i) for i in grid.columns[::every]])
    ax.set_yticks(range(grid.shape[0]), [str(i) for i in grid.index])
    ax.set_xlabel("layer")
    ax.set_ylabel("head")
    return ax


def plot_graph(graph: SourceGraph, *, edges: int = 60, fan: int = 3, ax: "Axes | None" = None) -> "Axes":
    """A source graph: positions from left to right, layers from the embedding up to the prediction.

    Drawn are the root's largest edges (three times `fan` of them), the `fan` largest of each of their writers, and so
    on; how many edges are left out is said in the title. A solid line adds to its reader, a dashed one takes away; the
    wider, the larger its part of all that its reader takes in. A head that serves several readings is drawn once.

    Args:
        graph: from `source_graph`. edges: drawn at most. fan: sources of each node that are drawn. ax: where to draw.

    Returns:
        The Axes.

    Raises:
        ArgumentError: matplotlib is not installed, or it is no source graph.
    """
    if not isinstance(graph, SourceGraph):
        raise ArgumentError(message("graph", "a graph from resid_surgery.source_graph", graph))
    every = len(graph.edges)
    drawn = _drawn(graph, min(whole("edges", edges, 1), every), min(whole("fan", fan, 1), every))
    nodes = graph.nodes[graph.nodes["node"].isin({"unembed", *drawn["writer"], *drawn["reader"]})]
    levels, spots, columns = _places(nodes.drop_duplicates(["site", "position"]))
    pairs = zip(nodes["node"], nodes["site"], nodes["position"], strict=True)
    places = {node: spots[site, position] for node, site, position in pairs}
    ax = axes_of(ax, max(6.0, 1.1 * (max(x for x, _ in places.values()) + 1)), max(4.0, 0.45 * len(levels) + 1.5))
    _edges(ax, graph, drawn, places)
    for kind, some in nodes.groupby("kind", sort=False):
        points = [places[name] for name in some["node"]]
        size = 14 if kind == "readout" else 8
        ax.plot(*zip(*points, strict=True), MARKS.get(str(kind), "x"), ms=size, mfc="white", mec="black", ls="none",
                label=str(kind).replace("_", ", "), zorder=3)  # fmt: skip
    for (site, _), place in spots.items():
        ax.annotate(site, place, xytext=(0, 7), textcoords="offset points", fontsize=7, ha="center", zorder=4,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4})  # fmt: skip
    _around(ax, graph, levels, columns)
    left = len(graph.edges) - len(drawn)
    ax.set_title(f"{plain(graph.readout)}: {len(drawn)} edges drawn" + (f", {left} left out" if left else ""))
    return ax


def _drawn(graph: SourceGraph, most: int, fan: int) -> pd.DataFrame:
    """The root's largest edges, the largest of their writers, and so on."""
    by_reader = dict(list(graph.edges.groupby("reader", sort=False)))
    picked: list[Any] = []
    waiting, seen = ["unembed"], {"unembed"}
    while waiting and len(picked) < most:
        reader = waiting.pop(0)
        if reader not in by_reader:
            continue
        some = by_reader[reader].nlargest(3 * fan if reader == "unembed" else fan, "priority")
        picked += some.index[: most - len(picked)].tolist()
        fresh = [name for name in some["writer"] if name not in seen]
        seen |= set(fresh)
        waiting += fresh
    return graph.edges.loc[picked]


def _places(
    nodes: pd.DataFrame,
) -> tuple[dict[float, str], dict[tuple[str, int], tuple[float, float]], dict[int, tuple[float, str]]]:
    """(level -> its name, (site, position) -> (x, y), position -> (middle of its column, its token)).

    Levels are the sublayers that occur, evenly spaced; a position's column is as wide as its fullest level.
    """
    high = [_level(kind, layer) for kind, layer in zip(nodes["kind"], nodes["layer"], strict=True)]
    placed = nodes.assign(high=high)
    order = {level: float(i) for i, level in enumerate(sorted(set(high)))}
    places: dict[tuple[str, int], tuple[float, float]] = {}
    columns: dict[int, tuple[float, str]] = {}
    start = 0.0
    for position, column in placed.groupby("position"):
        wide = int(column.groupby("high").size().max())
        for level, some in column.groupby("high"):
            step = wide / len(some)
            for i, site in enumerate(some["site"]):
                high_up = order[float(str(level))]
                aside = (high_up % 3 - 1) * 0.22  # lines between levels above one another would cover one another
                places[site, int(str(position))] = (start + (i + 0.5) * step - 0.5 + aside, high_up)
        columns[int(str(position))] = (start + wide / 2 - 0.5, str(column["token"].iloc[0]))
        start += wide + 0.7
    return {order[level]: _named(level) for level in order}, places, columns


def _level(kind: str, layer: Any) -> float:
    if pd.isna(layer):
        return 10.0**6 if kind == "readout" else -1.0
    return float(layer) + (0.5 if kind in ("neuron", "mlp") else 0.0)


def _named(level: float) -> str:
    if level < 0:
        return "embed"
    return "unembed" if level >= 10**6 else f"L{int(level)} {'MLP' if level % 1 else 'attention'}"


def _edges(ax: "Axes", graph: SourceGraph, drawn: pd.DataFrame, places: dict[str, tuple[float, float]]) -> None:
    sizes = {
        (node.name, reading.key): listed.size
        for node in graph.grown
        if node.reader is not None
        for reading, listed in zip(node.reader.readings, node.listed, strict=True)
    }
    for writer, reader, key, share in zip(*(drawn[c] for c in ("writer", "reader", "key", "share")), strict=True):
        width = 0.6 + 10 * abs(share) / sizes[reader, key]
        (x0, y0), (x1, y1) = places[writer], places[reader]
        style, colour = ("-", "black") if share > 0 else ("--", "C3")
        ax.plot([x0, x1], [y0, y1], style, lw=width, color=colour, alpha=0.5, zorder=1)


def _around(ax: "Axes", graph: SourceGraph, levels: dict[float, str], columns: dict[int, tuple[float, str]]) -> None:
    ax.set_xticks([x for x, _ in columns.values()], [f"{p}: {quoted(token, 14)}" for p, (_, token) in columns.items()])
    ax.set_yticks(list(levels), list(levels.values()), fontsize=8)
    ax.margins(0.06, 0.08)
    ax.set_xlabel("position")
    for style, colour, what in (("-", "black", "adds"), ("--", "C3", "takes away")):
        ax.plot([], [], style, color=colour, label=what)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.grid(axis="y", alpha=0.2)

"""Charts: rows with x and y -> Vega-Lite specifications, plain data without rows of their own.

Colours are the page's variables, so that both its faces fit; what a colour says, a shape or a dash says too. Every
point is told by a tooltip, and the chosen one (walked to with the keyboard) by a ring.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]

SERIES = ("var(--one)", "var(--two)", "var(--three)", "var(--four)", "var(--five)", "var(--six)")
SHAPES = ("circle", "triangle-up", "square", "diamond", "cross", "triangle-down")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3])
HEIGHT = 260
_TEXT = "system-ui, sans-serif"
CONFIG: Spec = {
    "background": "transparent",
    "font": _TEXT,
    "view": {"stroke": "var(--rule)"},
    "axis": {
        "labelColor": "var(--soft)", "titleColor": "var(--ink)", "gridColor": "var(--rule)", "tickColor": "var(--rule)",
        "domainColor": "var(--rule)", "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "var(--ink)", "titleColor": "var(--soft)", "orient": "top", "labelFontSize": 12, "title": None,
        "symbolSize": 70, "symbolOpacity": 1, "labelLimit": 400, "symbolStrokeColor": "var(--ink)",
    },
}  # fmt: skip
_TIP = {"content": "data"}
_CHOSEN = "datum.at == chosen"
_ZERO: Spec = {
    "data": {"values": [{"zero": 0}]},
    "mark": {"type": "rule", "color": "var(--soft)", "strokeDash": [2, 2]},
    "encoding": {"y": {"field": "zero", "type": "quantitative"}},
}


def lines(kinds: Sequence[str], controls: Sequence[str], x: str) -> Spec:
    """Curves along x with a point a row, a dash and a colour a `kind`.

    Args:
        kinds: of the rows, in the order of their dashes. controls: names of fields that the reader chooses by.
        x: what stands along the bottom.
    """
    by = _by(kinds)
    curve: Spec = {
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {**_places(x), "color": by["color"], "detail": {"field": "kind"},
                     "strokeDash": {**by["color"], "scale": {"domain": list(kinds), "range": _cycle(DASHES, kinds)}}},
    }  # fmt: skip
    return _spec([curve, _ring(_places(x)), _points(by, x, size=36)], controls)


def points(kinds: Sequence[str], controls: Sequence[str], x: str, *, ordered: Sequence[str] | None = None) -> Spec:
    """A point a row, shape and colour by `kind`, around a line at zero.

    Args:
        kinds, controls, x: as for `lines`. ordered: names along the bottom instead of numbers, in order.
    """
    by = _by(kinds)
    stem: Spec = {
        "mark": {"type": "rule", "strokeWidth": 1, "opacity": 0.5},
        "encoding": {**_places(x, ordered), "y2": {"datum": 0}, "color": by["color"]},
    }
    return _spec([_ZERO, stem, _ring(_places(x, ordered)), _points(by, x, ordered=ordered)], controls)


def bars(kinds: Sequence[str], controls: Sequence[str], x: str, names: int) -> Spec:
    """A bar a row, its name at the left: `label` and `y`; in the order of the rows. names: how many at a time."""
    by = _by(kinds)
    places: Spec = {
        "y": {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}},
        "x": {"field": "y", "type": "quantitative", "title": x},
    }
    picked = {"condition": {"test": _CHOSEN, "value": "var(--ink)"}, "value": "transparent"}
    bar: Spec = {
        "mark": {"type": "bar", "tooltip": _TIP, "height": {"band": 0.6}, "strokeWidth": 2.5},
        "encoding": {**places, "color": by["color"], "stroke": picked},
    }
    return _spec([bar], controls) | {"height": 24 * names + 8}


def intervals(kinds: Sequence[str], controls: Sequence[str], x: str, names: int) -> Spec:
    """A point a row with its interval from `low` to `high`, its name at the left. names: how many at a time."""
    by = _by(kinds)
    places: Spec = {
        "y": {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}},
        "x": {"field": "y", "type": "quantitative", "title": x, "scale": {"zero": False}},
    }
    band: Spec = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {**places, "x": {**places["x"], "field": "low"}, "x2": {"field": "high"}, "color": by["color"]},
    }
    dot: Spec = {"mark": {"type": "point", "filled": True, "size": 70, "tooltip": _TIP},
                 "encoding": {**places, "color": by["color"], "shape": by["shape"]}}  # fmt: skip
    return _spec([band, _ring(places), dot], controls) | {"height": 26 * names + 8}


def scatter(kinds: Sequence[str], x: str, y: str) -> Spec:
    """y against x with the line on which they are equal."""
    by = _by(kinds)
    same: Spec = {
        "data": {"name": "ends"},
        "mark": {"type": "line", "color": "var(--soft)", "strokeDash": [2, 2]},
        "encoding": {"x": {"field": "at", "type": "quantitative"}, "y": {"field": "at", "type": "quantitative"}},
    }
    dots = _points(by, x)
    dots["encoding"]["y"] = {"field": "y", "type": "quantitative", "title": y}
    ring = _ring({name: dots["encoding"][name] for name in ("x", "y")})
    return _spec([same, ring, dots], ())


def network(kinds: Sequence[str], columns: Mapping[float, str]) -> Spec:
    """Nodes in columns and edges between them: data ``edges`` with x, y, x2, y2, weight, sign.

    Args:
        kinds: of the nodes. columns: the middle of each -> its name.
    """
    by, ends = _by(kinds), list(columns)
    axis = {"labelExpr": "names[indexof(ends, datum.value)]", "values": ends, "labelOverlap": False, "labelLimit": 140}
    at = {
        "x": {"field": "x", "type": "quantitative", "title": "token (position)", "axis": axis,
              "scale": {"zero": False, "nice": False, "padding": 14}},
        "y": {"field": "y", "type": "quantitative", "title": "layer",
              "scale": {"zero": False, "nice": False, "padding": 14}},
    }  # fmt: skip
    edges: Spec = {
        "data": {"name": "edges"},
        "mark": {"type": "rule", "opacity": 0.4},
        "encoding": {**at, "x2": {"field": "x2"}, "y2": {"field": "y2"},
                     "strokeWidth": {"field": "weight", "type": "quantitative", "legend": None,
                                     "scale": {"domain": [0, 1], "range": [0.4, 4]}},
                     "strokeDash": {"field": "sign", "type": "nominal", "legend": None,
                                    "scale": {"domain": ["for", "against"], "range": [[1, 0], [4, 3]]}},
                     "color": {"value": "var(--soft)"}},
    }  # fmt: skip
    nodes = _points(by, "")
    nodes["encoding"] |= at
    spec = _spec([edges, _ring(at), nodes], ())
    spec["params"] += [{"name": "ends", "value": ends}, {"name": "names", "value": list(columns.values())}]
    return spec | {"height": 460}


def _spec(layers: Sequence[Spec], controls: Sequence[str]) -> Spec:
    """Layers over one named set of rows, of which those are drawn that the reader's choices leave."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "rows"},
        "params": [{"name": "chosen", "value": -1}, *({"name": f"by_{name}", "value": ""} for name in controls)],
        "layer": [_filtered(one, controls) for one in layers],
        "config": CONFIG,
    }


def _filtered(layer: Spec, controls: Sequence[str]) -> Spec:
    if "data" in layer:
        return layer
    wanted = [
        {"filter": f"by_{name} == '' || !isValid(datum.{name}) || datum.{name} == by_{name}"} for name in controls
    ]
    return {**layer, "transform": [*wanted, *layer.get("transform", [])]}


def _places(x: str, ordered: Sequence[str] | None = None) -> Spec:
    along: Spec = {"field": "x", "title": x, "type": "quantitative", "scale": {"zero": False, "nice": False,
                   "padding": 12}, "axis": {"tickMinStep": 1}}  # fmt: skip
    if ordered is not None:
        along = {"field": "label", "title": x, "type": "nominal", "sort": list(ordered), "axis": {"labelLimit": 120,
                 "labelOverlap": True}}  # fmt: skip
    return {"x": along, "y": {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False}}}


def _points(by: Mapping[str, Spec], x: str, *, size: int = 60, ordered: Sequence[str] | None = None) -> Spec:
    mark = {"type": "point", "filled": True, "opacity": 0.9, "size": size, "tooltip": _TIP}
    return {"mark": mark, "encoding": {**_places(x, ordered), "color": by["color"], "shape": by["shape"]}}


def _ring(places: Spec) -> Spec:
    """A ring around the chosen row; it lies under the points, so that they stay in reach."""
    return {
        "mark": {
            "type": "point",
            "filled": False,
            "size": 240,
            "strokeWidth": 2.5,
            "color": "var(--ink)",
            "aria": False,
        },
        "encoding": {**places, "opacity": {"condition": {"test": _CHOSEN, "value": 1}, "value": 0}},
    }


def _by(kinds: Sequence[str]) -> dict[str, Spec]:
    """Colour and shape by kind, one legend for both."""
    field = {"field": "kind", "type": "nominal"}
    return {
        "color": {**field, "scale": {"domain": list(kinds), "range": _cycle(SERIES, kinds)}},
        "shape": {**field, "scale": {"domain": list(kinds), "range": _cycle(SHAPES, kinds)}},
    }


def _cycle(values: Sequence[Any], kinds: Sequence[str]) -> list[Any]:
    return [values[i % len(values)] for i in range(len(kinds))]

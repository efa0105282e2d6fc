"""The theatre's tables and chart as plain data for the page: rows, columns, and options of an ECharts chart.

Whatever comes from a model or a prompt stands in rows and names as text; nothing here is markup or code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from resid_surgery._html import number_text
from resid_surgery.stream.tables import state_height
from resid_surgery.views.theatre import About, Stage, readout_columns
from resid_surgery.views.theatre_acts import Outcome

COLOURS = ("#2f81d8", "#d0691a", "#219a6b", "#b0569f", "#8a7a12", "#5b6abf", "#b5524a", "#3b8f99", "#7a7a7a")
SYMBOLS = ("circle", "rect", "triangle", "diamond", "pin", "arrow", "roundRect", "emptyCircle", "emptyRect")
MARK = "located"
PARTS = ("direct", "post_norm", "norm_scale", "indirect")
_GRID = "rgba(128,128,128,.28)"


def column(name: str, label: str, *, left: bool = False, sortable: bool = True) -> dict[str, Any]:
    """A table's column, for the page's table component."""
    return {"name": name, "label": label, "field": name, "align": "left" if left else "right", "sortable": sortable}


def found_columns(stage: Stage) -> list[dict[str, Any]]:
    """Columns of the located subvalues."""
    bs = [column(name, f"bs {token!r}") for name, token in readout_columns(stage).items()]
    score = column("log_prob_increase", "increase (nats)")
    return [column("site", "subvalue", left=True), score, *bs, column("promotes", "promotes", left=True)]


def found_rows(stage: Stage, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the located subvalues; numbers stay numbers, so that they sort."""
    names = ["site", "log_prob_increase", *readout_columns(stage), "promotes", "suppresses"]
    return [{name: _plain(row[name]) for name in names} for row in table.to_dict("records")]


DISTRIBUTION = [
    column("token", "token", left=True),
    column("bars", "probability", left=True, sortable=False),
    column("prob_before", "before"),
    column("prob_after", "after"),
    column("change", "logit change"),
]


def distribution_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows of the distribution: numbers, texts of numbers, and widths of bars in per cent."""
    table = outcome.distribution
    rows = []
    for row in table.to_dict("records"):
        role = str(row["role"])
        rows.append({
            "id": int(row["token_id"]), "token": repr(row["token"]), "role": "" if role == "top" else role,
            "prob_before": float(row["prob_before"]), "prob_after": float(row["prob_after"]),
            "change": float(row["bs_after"] - row["bs_before"]),
            "wide_before": 100 * float(row["prob_before"]), "wide_after": 100 * float(row["prob_after"]),
        })  # fmt: skip
    return rows


SPLIT = [
    column("token", "token", left=True, sortable=False),
    *(column(name, name.replace("_", " "), sortable=False) for name in ("bs_change", *PARTS)),
    column("rank", "rank", sortable=False),
]


def split_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Target and competitors: the change of the logit and its parts, in words."""
    if outcome.effect is None:
        return []
    table = outcome.effect.table
    named = table[table["role"] != "mover"]
    return [
        {"id": int(row["token_id"]), "token": repr(row["token"]), "rank": f"{row['rank_before']} → {row['rank_after']}"}
        | {name: signed(row[name]) for name in ("bs_change", *PARTS)}
        for row in named.to_dict("records")
    ]


SOURCES = [
    column("writer", "source", left=True, sortable=False),
    column("key", "read by", left=True, sortable=False),
    column("position", "position", sortable=False),
    column("share", "share", sortable=False),
    column("edge", "", sortable=False),
]


def spectrum_text(about: About) -> str:
    """What a subvalue promotes and suppresses, in words."""
    sides = (("promotes", about.promotes), ("suppresses", about.suppresses))
    return "; ".join(f"{side} {' '.join(map(repr, some))}" for side, some in sides)


def source_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a subvalue's sources, each with its edge."""
    return [
        {"id": i, "writer": row["writer"], "key": row["key"], "position": int(row["position"]),
         "share": signed(row["share"]), "edge": row["edge"]}
        for i, row in enumerate(table.to_dict("records"))
    ]  # fmt: skip


def ends(edge: Any) -> Sequence[str]:
    """Writer, reader and side of an edge's text."""
    writer, _, reader = str(edge).partition("->")
    return (writer, reader.removesuffix(".value"), "value") if reader.endswith(".value") else (writer, reader)


def signed(value: Any) -> str:
    """A change in words, with its sign."""
    number = float(value)
    return ("+" if number > 0 else "") + number_text(number)


def summary(outcome: Outcome) -> str:
    """One line on what operations did."""
    row = outcome.distribution.iloc[0]
    p = f"p {number_text(row['prob_before'])} → {number_text(row['prob_after'])}"
    if outcome.effect is None:
        return f"{row['token']!r}: p {number_text(row['prob_before'])}. Nothing is operated on."
    told = outcome.effect.summary.iloc[0]
    moved = f"logit {signed(row['bs_after'] - row['bs_before'])}; KL {number_text(told['kl'])} nats"
    return f"{row['token']!r}: {p}, {moved}; first choice {told['top_before']!r} → {told['top_after']!r}"


def stream_chart(stage: Stage, marked: pd.DataFrame | None = None) -> dict[str, Any]:
    """Options of the chart of bs-values along the stream, with located subvalues marked on the target's line.

    Args:
        stage: the prompt. marked: table of `found`.
    """
    lines = [
        _line(i, str(token), rows)
        for i, (token, rows) in enumerate(stage.stream.groupby("token_id", sort=False))
        for token in [rows["token"].iloc[0]]
    ]
    marks = [] if marked is None else [_marks(stage, marked)]
    axis = {"nameLocation": "middle", "nameTextStyle": {"fontSize": 12}, "splitLine": {"lineStyle": {"color": _GRID}}}
    return {
        "animation": False,
        "aria": {"enabled": True},
        "grid": {"left": 56, "right": 20, "top": 64, "bottom": 44},
        "legend": {"top": 4, "type": "scroll", "itemWidth": 30},
        "tooltip": {"trigger": "item", "renderMode": "richText", "confine": True},
        "xAxis": {"type": "value", "name": "layer (halves: between attention and MLP)", "nameGap": 28, "min": 0,
                  "max": "dataMax", **axis},
        "yAxis": {"type": "value", "name": "bs-value (logits, frozen norm)", "nameGap": 38, "scale": True, **axis},
        "series": [*lines, *marks],
    }  # fmt: skip


def _line(i: int, token: str, rows: pd.DataFrame) -> dict[str, Any]:
    look = {"color": COLOURS[i % len(COLOURS)], "type": "solid" if i == 0 else ("dashed", "dotted")[i % 2]}
    data = [_point(row) for row in rows.to_dict("records")]
    return {"type": "line", "name": repr(token), "symbol": SYMBOLS[i % len(SYMBOLS)], "symbolSize": 5, "data": data,
            "lineStyle": look | {"width": 3 if i == 0 else 2}, "itemStyle": {"color": look["color"]}}  # fmt: skip


def _point(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {"name": str(row["site"]), "value": [state_height(str(row["site"])), round(float(row["bs_value"]), 4)]}


def _marks(stage: Stage, marked: pd.DataFrame) -> dict[str, Any]:
    """One diamond a subvalue, at the first state that holds it; those of one place stand above each other."""
    data, there = [], dict[float, int]()
    states = dict(zip(stage.stream["step"], stage.stream["site"], strict=True))
    for row in marked.to_dict("records"):
        across = state_height(str(states[row["step"]]))
        height = there[across] = there.get(across, -1) + 1
        data.append({"name": str(row["site"]), "value": [across, round(float(row["bs_value"]), 4)],
                     "symbolOffset": [0, -13 * height]})  # fmt: skip
    look = {"color": "transparent", "borderColor": "#d1453b", "borderWidth": 2}
    return {"type": "scatter", "name": MARK, "symbol": "diamond", "symbolSize": 13, "data": data, "z": 5,
            "cursor": "pointer", "itemStyle": look}  # fmt: skip


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)

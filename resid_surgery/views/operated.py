"""Pages of what was done and followed: effects, operations, source graphs, runs."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.evidence.operating import Operated
from resid_surgery.evidence.verifying import Verified
from resid_surgery.experiments.reading import Run
from resid_surgery.models.prompts import BoundPrompt
from resid_surgery.stream.tables import lens
from resid_surgery.surgery.effects import PARTS, Effect
from resid_surgery.views.charts import bars, intervals, network, points, scatter
from resid_surgery.views.findings import ALONE, subvalues
from resid_surgery.views.pages import Chart, Control, Page, Part, capitalised, part, tips
from resid_surgery.views.recorded import (
    FROZEN,
    NORM,
    OWN,
    VERSUS,
    addends_chart,
    columns_note,
    norm_control,
    numbered_rows,
    stream_chart,
    subvalues_chart,
    subvalues_part,
    versus_control,
)

POSITION, ZEROED = "position", "zeroed"
_OPERATED, _FOLLOWED = "operated on", "followed by itself"
_CHANGE = "change of the logit, logits"
MOST_MEANS = 60
"""Means in one chart of a run."""


def effect_page(value: Effect) -> Page:
    """What the interventions did: by token, and by addend."""
    prompt, measured = value.rec.prompt, [split.after.position for split in value.splits]
    ledgers = pd.concat([value.ledger(at) for at in dict.fromkeys(measured)], ignore_index=True)
    named = {str(at): f"{at} {prompt.tokens[at]!r}" for at in measured}
    places = (Control(POSITION, "Position", named),) if len(named) > 1 else ()
    charts = (tokens_chart(prompt, value.table), ledger_chart(prompt, ledgers, POSITION))
    parts = (
        part("Positions", value.summary),
        part("Tokens", value.table, chosen=(POSITION,), note=" + ".join(PARTS) + " = bs_change (logits)."),
        part("Ledger", ledgers, chosen=(POSITION,), note=columns_note(value.rec)),
    )
    return Page("Effect of interventions", repr(value), parts, controls=(*versus_control(prompt), _norms(), *places),
                charts=charts)  # fmt: skip


def operated_page(value: Operated) -> Page:
    """The main job on one prompt: what wrote it, and what zeroing that did."""
    rec, prompt = value.rec, value.rec.prompt
    found = subvalues(rec, len(value.neurons.sites))
    ledgers = pd.concat([one.ledger().assign(**{ZEROED: name}) for name, one in value.together.items()],
                        ignore_index=True)  # fmt: skip
    charts = (stream_chart(prompt, value.stream, lens(rec)), addends_chart(prompt, value.ledger),
              subvalues_chart(prompt, found, (VERSUS, NORM)), ledger_chart(prompt, ledgers, ZEROED))  # fmt: skip
    tables = {**value.tables(), "ledger_change": ledgers}
    parts: list[Part] = [subvalues_part(prompt, found)]
    for name, table in capitalised(tables).items():
        parts.append(part(name, table, chosen=(ZEROED,) if name == "Ledger change" else ()))
    choice = Control(ZEROED, "Zeroed together", {name: name for name in value.together})
    return Page("Operation", repr(rec), tuple(parts), controls=(*versus_control(prompt), norm_control(), choice),
                charts=charts)  # fmt: skip


def graph_page(value: SourceGraph) -> Page:
    """Nodes where they are, edges by their share."""
    parts = tuple(part(name, table) for name, table in capitalised(value.tables()).items())
    return Page("Source graph", repr(value), parts, charts=(graph_chart(value),))


def verified_page(value: Verified) -> Page:
    """Predicted against measured, and the graph."""
    skipped = pd.DataFrame({"not cut, because": list(value.skipped), "edges": list(value.skipped.values())})
    tables = {"Edges cut": value.table, "Edges not cut": skipped, **capitalised(value.graph.tables())}
    rows = [_cut_row(one) for one in value.table.to_dict("records")]
    ends = [one for row in rows for one in (row["x"], row["y"])]
    spec = scatter(["edge"], "predicted change (minus the share, over its reading's scale)", "measured change")
    chart = Chart("Predicted against measured", spec, numbered_rows(rows), note="On the line they are equal.",
                  more={"ends": [{"at": min(ends, default=0)}, {"at": max(ends, default=1)}]})  # fmt: skip
    parts = tuple(part(name, table) for name, table in tables.items())
    return Page("Source graph, verified", repr(value), parts, charts=(chart, graph_chart(value.graph)))


def run_page(value: Run) -> Page:
    """A run so far: by arm, with intervals over prompts."""
    status = pd.DataFrame({"": list(value.status), "value": [str(one) for one in value.status.values()]})
    rows, tables = value.rows, {"Status": status}
    summaries = (
        {} if rows.empty else {name: value.summary(name) for name in ("arm", "operation") if _grouped(rows, name)}
    )
    tables |= {f"Mean log_prob_change by {name}": table for name, table in summaries.items()}
    tables |= {"Rows": rows} if len(rows) else {}
    tables |= {"Failures": value.failures} if len(value.failures) else {}
    charts = tuple(_means(name, table) for name, table in summaries.items())
    return Page("Run", repr(value), tuple(part(name, one) for name, one in tables.items()), charts=charts)


def tokens_chart(prompt: BoundPrompt, table: pd.DataFrame) -> Chart:
    """The change of each token's logit, or of its lead over a competitor; frozen leaves the norm's new scale out."""
    rows = [row for _, group in table.groupby("position", sort=False) for row in _token_rows(prompt, group)]
    names = int(table.groupby("position").size().max())
    kinds = [kind for kind in ("target", "versus", "mover") if kind in set(table["role"])]
    spec = bars(kinds, (VERSUS, NORM, POSITION), _CHANGE, names)
    return Chart("What happened to each token", spec, numbered_rows(rows),
                 note="Under the frozen norm: direct + post_norm + indirect. Under its own: with norm_scale too, the "
                      "whole change.")  # fmt: skip


def ledger_chart(prompt: BoundPrompt, ledgers: pd.DataFrame, by: str) -> Chart:
    """Who removed, who added, who compensated: the change of every addend, in forward order."""
    steps = {site: i for i, site in enumerate(dict.fromkeys(ledgers["site"]))}
    rows = [row for one in ledgers.to_dict("records") for row in _ledger_rows(prompt, one, by)]
    return Chart("Who removed, who compensated",
                 points([_OPERATED, _FOLLOWED], (VERSUS, NORM, by), "addend, in forward order", ordered=list(steps)),
                 numbered_rows(rows), note="The change of each addend's bs-value, frozen norm; norm_scale, shown under "
                 "the own norm, is what the norm's new scale does.")  # fmt: skip


def graph_chart(value: SourceGraph) -> Chart:
    """Nodes at (position, layer), neighbours side by side; edges as thick as their share of what the reader reads."""
    places, middles = _places(value.nodes)
    most = value.edges.assign(size=value.edges["share"].abs()).groupby(["reader", "key"])["size"].max()
    edges = [_edge_row(one, places, float(most[(one["reader"], one["key"])])) for one in value.edges.to_dict("records")]
    rows = [_node_row(one, places[one["node"]], value.edges) for one in value.nodes.to_dict("records")]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    named = {middles[at]: f"{value.rec.prompt.tokens[at]!r} ({at})" for at in sorted(middles)}
    return Chart("Where the prediction comes from", network(kinds, named), numbered_rows(rows),
                 note="A node is a site at a position. Thick edges carry more of what their reader reads; dashed ones "
                      "speak against it.", more={"edges": edges})  # fmt: skip


def _norms() -> Control:
    words = {OWN: "own: as the model computes it", FROZEN: "frozen: the clean run's scale"}
    return Control(NORM, "Norm", words, "The difference is norm_scale.")


def _token_rows(prompt: BoundPrompt, group: pd.DataFrame) -> list[dict[str, Any]]:
    """Bars of one position: the target's first, for both norms and every competitor."""
    changes = {OWN: group["bs_change"], FROZEN: group["bs_change"] - group["norm_scale"]}
    ids = group["token_id"].tolist()
    bases = {ALONE: None, **{str(i): ids.index(token) for i, token in enumerate(prompt.versus)}}
    rows = []
    for norm, change in changes.items():
        values = change.tolist()
        for key, base in bases.items():
            lead = 0.0 if base is None else values[base]
            less = "" if base is None else f", over {prompt.names[prompt.versus[int(key)]]!r}"
            for one, value in zip(group.to_dict("records"), values, strict=True):
                told = tips(("token", repr(one["token"])), (f"change, {norm} norm{less}", value - lead),
                            *((name, one[name]) for name in PARTS),
                            ("probability", f"{one['prob_before']:.4g} to {one['prob_after']:.4g}"),
                            ("rank", f"{one['rank_before']} to {one['rank_after']}"))  # fmt: skip
                rows.append({"name": repr(one["token"]), "label": f"{one['token']!r} {one['token_id']}",
                             "kind": one["role"], "y": value - lead, "unit": f"{_CHANGE}, {norm} norm{less}",
                             NORM: norm, VERSUS: key, POSITION: str(one["position"]), "tip": told})  # fmt: skip
    return rows


def _ledger_rows(prompt: BoundPrompt, one: Mapping[Any, Any], by: str) -> list[dict[str, Any]]:
    told = tips(("addend", one["site"]), ("bs_before", one["bs_before"]), ("bs_after", one["bs_after"]),
                ("bs_change", one["bs_change"]), ("direct", one["direct"]), ("indirect", one["indirect"]),
                *((f"change of bs {prompt.names[token]!r}", one[f"bs_change_versus_{i}"])
                  for i, token in enumerate(prompt.versus, start=1)))  # fmt: skip
    base = {"name": one["site"], "label": one["site"], "kind": _OPERATED if one["operated"] else _FOLLOWED,
            "tip": told, by: str(one[by]), **({NORM: OWN} if one["site"] == "norm_scale" else {})}  # fmt: skip
    rows = [base | {VERSUS: ALONE, "y": one["bs_change"], "unit": "change of the target's bs-value, logits"}]
    for i, token in enumerate(prompt.versus):
        lead = one["bs_change"] - one[f"bs_change_versus_{i + 1}"]
        rows.append(
            base | {VERSUS: str(i), "y": lead, "unit": f"change of the lead over {prompt.names[token]!r}, logits"}
        )
    return rows


def _places(nodes: pd.DataFrame) -> tuple[dict[str, tuple[float, float]], dict[int, float]]:
    """Node -> (x, y), attention below the MLP, neighbours side by side; and position -> the middle of its column.

    A column is as wide as its fullest layer needs; positions without nodes have none.
    """
    cells: dict[tuple[int, float], list[str]] = {}
    for one in nodes.to_dict("records"):
        cells.setdefault((one["position"], _layer_of(one, nodes["layer"])), []).append(one["node"])
    widths: dict[int, int] = {}
    for (at, _), names in cells.items():
        widths[at] = max(8, len(names), widths.get(at, 0))
    starts, total = {}, 0.0
    for at in sorted(widths):
        starts[at], total = total, total + widths[at] + 2
    middles = {at: starts[at] + (widths[at] + 1) / 2 for at in widths}
    places = {
        name: (middles[at] + i - (len(names) - 1) / 2, y + (0.12 * (i % 3 - 1) if len(names) > 8 else 0))
        for (at, y), names in cells.items()
        for i, name in enumerate(names)
    }
    return places, middles


def _layer_of(node: Mapping[Any, Any], layers: "pd.Series[Any]") -> float:
    """How high a node stands: its layer, the embedding below all and the readout above."""
    if pd.isna(node["layer"]):
        deepest = float(layers.max()) if layers.notna().any() else 0.0
        return -1.0 if str(node["site"]).startswith("embed") else deepest + 1.5
    return float(node["layer"]) + (0.5 if node["kind"] in ("mlp", "neuron") else 0)


def _node_row(one: Mapping[Any, Any], place: tuple[float, float], edges: pd.DataFrame) -> dict[str, Any]:
    into = edges[edges["writer"] == one["node"]]
    gives = [(f"into {reader}.{key}", share) for reader, key, share in
             zip(into["reader"], into["key"], into["share"], strict=True)][:6]  # fmt: skip
    told = tips(("node", one["node"]), ("token", repr(one["token"])), ("priority", one["priority"]),
                (str(one["what"]), one["number"]), *gives)  # fmt: skip
    return {"name": one["node"], "kind": str(one["kind"]), "x": place[0], "y": place[1], "tip": told,
            "unit": "layer of the node"}  # fmt: skip


def _edge_row(one: Mapping[Any, Any], places: Mapping[str, tuple[float, float]], most: float) -> dict[str, Any]:
    (x, y), (x2, y2) = places[one["writer"]], places[one["reader"]]
    return {"x": x, "y": y, "x2": x2, "y2": y2, "weight": abs(one["share"]) / most if most else 0.0,
            "sign": "for" if one["share"] >= 0 else "against"}  # fmt: skip


def _cut_row(one: Mapping[Any, Any]) -> dict[str, Any]:
    name = f"{one['writer']} into {one['reader']}.{one['key']}"
    told = tips(("edge", name), ("predicted", one["predicted"]), ("measured", one["measured"]), ("error", one["error"]),
                ("target_change", one["target_change"]))  # fmt: skip
    return {"name": name, "kind": "edge", "x": one["predicted"] / one["scale"], "y": one["measured"] / one["scale"],
            "unit": "measured change, over the reading's scale", "tip": told}  # fmt: skip


def _means(name: str, table: pd.DataFrame) -> Chart:
    best = table["mean"].abs().rank(method="first", ascending=False) <= MOST_MEANS
    note = "" if best.all() else f"The {MOST_MEANS} of {len(table)} that change most; the table has them all."
    rows = [{"name": str(one[name]), "label": str(one[name]), "kind": name, "y": one["mean"], "low": one["low"],
             "high": one["high"], "unit": "mean log_prob_change, nats, with its interval over prompts",
             "tip": tips((name, str(one[name])), ("mean", one["mean"]), ("low", one["low"]), ("high", one["high"]),
                         ("prompts", one["n"]))} for one in table[best].to_dict("records")]  # fmt: skip
    return Chart(f"By {name}", intervals([name], (), "mean log_prob_change (nats)", len(rows)), numbered_rows(rows),
                 note=note)  # fmt: skip


def _grouped(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and bool(rows[[name, "log_prob_change"]].notna().all(axis=None))

"""Pages of what was read: a recording, located subvalues."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import pandas as pd

from resid_surgery.attribution.catalogue import SCORES
from resid_surgery.attribution.locating import Located
from resid_surgery.models.prompts import BoundPrompt
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import bs_columns, decompose, lens, predictions, state_height, stream_bs
from resid_surgery.views.charts import lines, points
from resid_surgery.views.findings import ALONE, SCORE, against, label, leads, lens_lines, over, over_name, subvalues
from resid_surgery.views.pages import Chart, Control, Page, Part, part, table_page, tips

Row = Mapping[Any, Any]
VERSUS, NORM = "versus", "norm"
OWN, FROZEN = "own", "frozen"
LAYER = "layer"
_KINDS = {"neuron": "neuron", "head_source": "head reading a position", "attn": "attention", "mlp": "MLP",
          "attn_neuron": "attention neuron", "embed": "embedding"}  # fmt: skip


def recording_page(value: Recording, k: int = 25) -> Page:
    """The stream, its addends, and its best subvalues under both norms."""
    read, ledger, found = lens(value), decompose(value), subvalues(value, k)
    charts = [stream_chart(value.prompt, stream_bs(value), read), addends_chart(value.prompt, ledger)]
    if len(found):
        charts.append(subvalues_chart(value.prompt, found, (VERSUS, NORM)))
    parts = (
        part("Predictions", predictions(value)),
        *([subvalues_part(value.prompt, found)] if len(found) else []),
        part("Logit lens", lens_lines(read)),
        part("Addends of the stream", ledger, note=columns_note(value)),
    )
    return Page("Recording", repr(value), parts, controls=(*versus_control(value.prompt), norm_control()),
                charts=tuple(charts))  # fmt: skip


def located_page(value: Located) -> Page:
    """What was located, its score against its layer."""
    page = table_page("Located subvalues", repr(value), {"Found": value.table})
    if value.table["layer"].isna().all():
        return page
    table = over(value.table, value.prompt).rename(columns={value.score: SCORE}) if value.score != SCORE else over(
        value.table, value.prompt)  # fmt: skip
    if "bs_target" not in table:  # the score itself is bs_target
        table["bs_target"] = value.table["bs_target"]
    chart = subvalues_chart(value.prompt, table, (VERSUS,), score=value.score)
    return Page(page.title, page.about, page.parts, controls=versus_control(value.prompt), charts=(chart,))


def norm_control() -> Control:
    """The choice of the norm convention."""
    words = {FROZEN: "frozen: the scale of the final stream", OWN: "own: the scale of each state"}
    return Control(NORM, "Norm", words, "Only under the frozen norm do bs-values add up.")


def versus_control(prompt: BoundPrompt) -> tuple[Control, ...]:
    """The choice of a competitor, where there is one."""
    return (Control(VERSUS, "Competitor", against(prompt)),) if prompt.versus else ()


def columns_note(rec: Recording) -> str:
    """Which token each bs column is of."""
    named = zip(bs_columns(rec), (rec.prompt.names[i] for i in rec.prompt.readouts), strict=True)
    return "; ".join(f"{column} is {token!r}" for column, token in named)


def stream_chart(prompt: BoundPrompt, stream: pd.DataFrame, read: pd.DataFrame) -> Chart:
    """Target and competitors along the stream: bs-values (frozen norm), or log-probabilities (own norm)."""
    said = dict(lens_lines(read).set_index("site")["most probable (norm: own)"])
    wanted = read[read["role"] != "top"]
    frozen = stream.rename(columns={"bs_value": "y"}).assign(unit="bs-value, logits, frozen norm")
    own = wanted.rename(columns={"log_prob": "y"}).assign(unit="log-probability, nats, own norm (logit lens)")
    both = [frozen, own[["step", "site", "layer", "token", "token_id", "y", "unit", "norm"]]]
    rows = [row for table in both for one in table.to_dict("records") for row in _stream_rows(prompt, one, said)]
    kinds = [label(prompt, i) for i in prompt.readouts]
    spec = lines(kinds, (VERSUS, NORM), "layer that reads the state; between two: its MLP")
    return Chart("What the stream says about each token", spec, numbered_rows(rows))


def addends_chart(prompt: BoundPrompt, ledger: pd.DataFrame) -> Chart:
    """What each layer's attention and MLP add to the target, or to its lead over a competitor."""
    table = over(ledger, prompt)
    table = table[table["kind"].isin(("attn", "mlp"))]
    rows = [row for one in table.to_dict("records") for row in _addend_rows(prompt, one)]
    kinds = [_KINDS[kind] for kind in dict.fromkeys(table["kind"])]
    return Chart("What each layer adds", points(kinds, (VERSUS,), LAYER), numbered_rows(rows),
                 note="bs-values of the layers' outputs, frozen norm: with the embedding and the constants they sum to "
                      "the logit.")  # fmt: skip


def subvalues_chart(
    prompt: BoundPrompt, table: pd.DataFrame, controls: tuple[str, ...], *, score: str = SCORE
) -> Chart:
    """Subvalues by layer: their score, or the target's lead over a competitor that they add."""
    rows = [row for one in table.to_dict("records") for row in _subvalue_rows(prompt, one, score, NORM in controls)]
    kinds = [_KINDS.get(str(kind), str(kind)) for kind in dict.fromkeys(table["kind"])]
    return Chart(
        "The best subvalues",
        points(kinds, controls, LAYER),
        numbered_rows(rows),
        note="The best by the score, found exactly. With a competitor: how far each lifts the target over it.",
    )


def subvalues_part(prompt: BoundPrompt, found: pd.DataFrame) -> Part:
    """The table of subvalues: its rows go by the norm, its columns by the competitor."""
    note = (
        f"The best by {SCORE} (nats) of each kind, under both norm conventions. bs_target, promotes and suppresses are "
        f"bs-values (logits, frozen norm); over X is bs of {prompt.names[prompt.target]!r} minus bs of X."
    )
    shown = {over_name(prompt, i): (VERSUS, str(i)) for i in range(len(prompt.versus))}
    return part("Subvalues", found, note=note, chosen=(NORM,), shown_with=shown)


def numbered_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their numbers; what is no finite number is missing."""
    return [{name: _known(value) for name, value in row.items()} | {"at": i} for i, row in enumerate(rows)]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def _stream_rows(prompt: BoundPrompt, one: Row, said: Mapping[Any, str]) -> list[dict[str, Any]]:
    """A point of a token's curve, once for every choice of a competitor that shows the token."""
    token, i = label(prompt, one["token_id"]), prompt.readouts.index(one["token_id"])
    told = tips(("state", one["site"]), ("token", token), (one["unit"].split(",")[0], one["y"]), ("norm", one["norm"]),
                ("most probable here", said.get(one["site"])))  # fmt: skip
    base = {"name": f"{one['site']} {token}", "kind": token, "x": state_height(one["site"]),
            "y": one["y"], "unit": one["unit"], "norm": one["norm"], "tip": told}  # fmt: skip
    shown_by = [ALONE, *(str(j) for j in range(len(prompt.versus)) if i in (0, j + 1))]
    return [base | {VERSUS: key} for key in shown_by]


def _addend_rows(prompt: BoundPrompt, one: Row) -> list[dict[str, Any]]:
    base = {"name": one["site"], "kind": _KINDS[one["kind"]], "x": int(one["layer"])}
    pairs = [(over_name(prompt, int(key)), lead) for key, lead in leads(one, prompt)]
    told = tips(("addend", one["site"]), ("bs_target", one["bs_target"]), *pairs, ("norm", one["norm"]))
    return heights(base | {"tip": told}, ("bs-value, logits, frozen norm", float(one["bs_target"])), one, prompt)


def _subvalue_rows(prompt: BoundPrompt, one: Row, score: str, by_norm: bool) -> list[dict[str, Any]]:
    height = one[SCORE] if SCORE in one else one[score]
    pairs = [(over_name(prompt, int(key)), lead) for key, lead in leads(one, prompt)]
    told = tips(("site", one["site"]), (score, height), ("norm", one["norm"]), ("bs_target", one["bs_target"]), *pairs,
                ("rank", one["rank"]), ("promotes", one.get("promotes")),
                ("suppresses", one.get("suppresses")))  # fmt: skip
    base = {"name": one["site"], "kind": _KINDS.get(str(one["kind"]), str(one["kind"])), "x": int(one["layer"])}
    base |= {"tip": told, **({NORM: one["norm"]} if by_norm else {})}
    return heights(base, (f"{score}, {SCORES[score].unit}, {one['norm']} norm", float(height)), one, prompt)


def heights(base: dict[str, Any], alone: tuple[str, float], one: Row, prompt: BoundPrompt) -> list[dict[str, Any]]:
    """A point for every choice of a competitor: the value by itself, then the lead over each."""
    rows = [base | {VERSUS: ALONE, "unit": alone[0], "y": alone[1]}]
    name = prompt.names[prompt.target]
    for key, lead in leads(one, prompt):
        token = prompt.names[prompt.versus[int(key)]]
        rows.append(
            base | {VERSUS: key, "unit": f"bs of {name!r} minus bs of {token!r}, logits, frozen norm", "y": lead}
        )
    return rows

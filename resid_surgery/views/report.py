"""Reports as pages: any of the library's values as one HTML file that needs nothing else.

There is no script in it, no request leaves it (its own security policy forbids both), and whatever comes from models or
data is escaped. Light or dark follows the reader's settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from resid_surgery._check import message
from resid_surgery._files import write_whole
from resid_surgery._html import cell_text, table_html
from resid_surgery.attribution.locating import Located
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.gating import STATES
from resid_surgery.editing.reports import HEADINGS, Validation, entries
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.evidence.operating import Operated
from resid_surgery.evidence.verifying import Verified
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import decompose, lens, predictions
from resid_surgery.surgery.effects import Effect
from resid_surgery.views.drawing import curves_svg, gate_svg

ROWS = 300
BESIDE = ("text_before", "text_after")
_NOTES = {
    HEADINGS["tokens"]: "What the edited vectors promote and suppress besides the fact: one vector has many abilities.",
    HEADINGS["worst"]: "Prompts that must not change, by how much they did: what each model says by itself.",
    HEADINGS["controls"]: "The same measurements for what should do nothing: the edit must stand out from them.",
}


@final
@dataclass(frozen=True)
class Card:
    """One prompt with what was said before and after."""

    head: tuple[tuple[str, str], ...]
    before: str
    after: str


@final
@dataclass(frozen=True)
class Part:
    """A section that opens and closes."""

    title: str
    table: str = ""
    count: str = ""
    note: str = ""
    shown: bool = True
    cards: tuple[Card, ...] = ()
    drawings: tuple[Markup, ...] = ()


@final
@dataclass(frozen=True)
class Page:
    """What the template is filled with."""

    title: str
    about: str
    parts: tuple[Part, ...]
    state: str = ""
    line: str = ""
    gates: tuple[Mapping[str, Any], ...] = ()


def write_report(value: Any, path: Any) -> Path:
    """Write a value as one self-contained HTML page.

    Args:
        value: a `Validation`, `Recording`, `Effect`, `Located`, `SourceGraph`, `Verified`, `Operated` or `Edit`, a
            DataFrame, or a dict of DataFrames. path: ends in ``.html``.

    Returns:
        The path; the file is written whole or not at all.

    Raises:
        ArgumentError: another value or suffix. LoadError: it cannot be written. StaleRecordingError: a recording whose
            model's weights have changed since.
    """
    place = Path(path)
    if place.suffix not in (".html", ".htm"):
        raise ArgumentError(message("path", "a file name that ends in .html", str(place)))
    text = report_html(value)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(place, text.encode("utf-8", "replace"))
    except OSError as error:
        raise LoadError(f"the page cannot be written to {place}: {error.strerror}.") from None


def report_html(value: Any) -> str:
    """The page of `write_report` as text.

    Raises:
        As `write_report`.
    """
    return str(_template().render(page=_page(value)))


@cache
def _template() -> Any:
    loader = PackageLoader("resid_surgery", "views")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        "report.html.j2"
    )


def _page(value: Any) -> Page:
    for kind, page in _PAGES:
        if isinstance(value, kind):
            return page(value)
    names = ", ".join(kind.__name__ for kind, _ in _PAGES)
    raise ArgumentError(message("value", f"one of {names} (a dict holds DataFrames)", type(value).__name__))


def _validation(value: Validation) -> Page:
    parts = [_part(heading, table, note=_NOTES.get(heading, "")) for heading, table in value.sections().items()]
    drawn = tuple(Markup(one) for one in curves_svg(value.tables["curve"])) if "curve" in value.tables else ()
    parts = [part if part.title != HEADINGS["curve"] else _with_drawings(part, drawn) for part in parts]
    about = ", ".join(f"{key} {cell_text(value.manifest[key])}" for key in ("model", "edit", "dtype")
                      if value.manifest.get(key))  # fmt: skip
    gates = tuple(_gate(row) for row in value.gates.to_dict("records"))
    line = value.headline.split(": ", 1)[1]
    ends = _part("Manifest", entries(value.manifest), shown=False)
    return Page("Validation of an edit", about, (*parts, ends), value.verdict, line, gates)


def _gate(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A gate's row in words, with its drawing."""
    low, high = cell_text(row["low"]), cell_text(row["high"])
    sure = f", {100 * row['confidence']:.4g} %" if pd.notna(row["confidence"]) else ""
    told = {
        name: cell_text(row[name])
        for name in ("gate", "direction", "unit", "state", "value", "warn", "why", "protocol")
    }
    raised = row["fail"] != row["policy_fail"] and pd.notna(row["fail"])
    return told | {
        "warns": bool(row["warns"]), "svg": Markup(gate_svg(row)), "interval": f"[{low}, {high}]" if low else "–",
        "how": f"{row['interval']}{sure}", "fail": cell_text(row["fail"]) or "–", "warn": told["warn"] or "–",
        "raised": f"3 × noise; policy {cell_text(row['policy_fail'])}" if raised else "",
        "n": f"{row['n']} {row['n_unit']}", "version": told["protocol"].rpartition("/")[2],
    }  # fmt: skip


def _recording(value: Recording) -> Page:
    told = {"Predictions": predictions(value), "Logit lens": _lens_lines(value)}
    return _tables("Recording", repr(value), {**told, "Addends of the stream": decompose(value)})


def _lens_lines(value: Recording) -> pd.DataFrame:
    """One line a state: its most probable tokens, with their probabilities."""
    table = lens(value)
    top = table[table["rank"] <= 5]
    told = [f"{token!r} {prob:.3f}" for token, prob in zip(top["token"], top["prob"], strict=True)]
    lines = top.assign(told=told).groupby("site", sort=False)["told"].agg("   ".join).reset_index()
    target = table[table["role"] == "target"].set_index("site")
    lines["target's rank"], lines["target's log_prob"] = (list(target.loc[lines["site"], name])
                                                          for name in ("rank", "log_prob"))  # fmt: skip
    return lines.rename(columns={"told": "most probable (norm: own)"})


def _effect(value: Effect) -> Page:
    tables = {"Positions": value.summary, "Tokens": value.table, "Ledger": value.ledger()}
    return _tables("Effect of interventions", repr(value), tables)


def _located(value: Located) -> Page:
    return _tables("Located subvalues", repr(value), {"Found": value.table})


def _graph(value: SourceGraph) -> Page:
    return _tables("Source graph", repr(value), _capitalised(value.tables()))


def _verified(value: Verified) -> Page:
    skipped = pd.DataFrame({"not cut, because": list(value.skipped), "edges": list(value.skipped.values())})
    tables = {"Edges cut": value.table, "Edges not cut": skipped, **_capitalised(value.graph.tables())}
    return _tables("Source graph, verified", repr(value), tables)


def _operated(value: Operated) -> Page:
    return _tables("Operation", repr(value), _capitalised(value.tables()))


def _edit(value: Edit) -> Page:
    facts = pd.DataFrame([one.said() for one in value.rewrites])
    tables = {"Changes": value.table, "Facts": facts, "Fitting": value.fitting, "Provenance": entries(value.about)}
    return _tables("Edit", f"{value!r}, {value.hash[:16]}", {name: one for name, one in tables.items() if len(one)})


def _frame(value: pd.DataFrame) -> Page:
    return _tables("Table", "", {"Rows": value})


def _frames(value: Mapping[Any, Any]) -> Page:
    for name, one in value.items():
        if not isinstance(one, pd.DataFrame):
            raise ArgumentError(message("value", "a dict of DataFrames", {name: type(one).__name__}))
    return _tables("Tables", "", {str(name): one for name, one in value.items()})


def _tables(title: str, about: str, tables: Mapping[str, pd.DataFrame]) -> Page:
    return Page(title, about, tuple(_part(name, table) for name, table in tables.items()))


def _capitalised(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    return {name.replace("_", " ").capitalize(): one for name, one in tables.items()}


def _part(title: str, table: pd.DataFrame, *, note: str = "", shown: bool = True) -> Part:
    """A table as a section; texts before and after as cards, side by side."""
    count = f"{len(table)} row{'' if len(table) == 1 else 's'}"
    if set(BESIDE) <= set(table):
        return Part(title, count=count, note=note, shown=shown, cards=tuple(map(_card, table.to_dict("records"))))
    classes = {str(name): _state_class for name in table if str(name).startswith(("state", "verdict"))}
    made = Markup(table_html(table, limit=ROWS, classes=classes))
    return Part(title, made, count, note, shown)


def _card(row: Mapping[Any, Any]) -> Card:
    told = {str(key): cell_text(value) for key, value in row.items() if key not in BESIDE}
    first = "prompt" if "prompt" in told else next(iter(told), "")
    head = tuple((key, told[key]) for key in dict.fromkeys([first, *told]) if key in told)
    return Card(head, *(cell_text(row[name]) for name in BESIDE))


def _with_drawings(part: Part, drawings: tuple[Markup, ...]) -> Part:
    return Part(part.title, part.table, part.count, part.note, part.shown, part.cards, drawings)


def _state_class(value: Any) -> str:
    return value if value in STATES else ""


_PAGES: tuple[tuple[type, Callable[[Any], Page]], ...] = (
    (Validation, _validation),
    (Recording, _recording),
    (Effect, _effect),
    (Located, _located),
    (SourceGraph, _graph),
    (Verified, _verified),
    (Operated, _operated),
    (Edit, _edit),
    (pd.DataFrame, _frame),
    (Mapping, _frames),
)

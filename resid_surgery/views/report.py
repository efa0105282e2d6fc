"""Reports: any of the library's values as one HTML file that needs nothing else.

No request leaves it: its own security policy allows the scripts that stand in it, by their hashes, and nothing from
outside. Whatever comes from models or data is text. Without its scripts (``interactive=False``, or where a browser runs
none) it is a page of plain tables. Light or dark follows the reader's settings.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from resid_surgery._check import message
from resid_surgery._check import path as path_of
from resid_surgery._files import write_whole
from resid_surgery._html import cell_text
from resid_surgery.attribution.locating import Located
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.reports import HEADINGS, Validation, entries
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.evidence.graphs import SourceGraph
from resid_surgery.evidence.operating import Operated
from resid_surgery.evidence.verifying import Verified
from resid_surgery.experiments.reading import Run
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.effects import Effect
from resid_surgery.views.assets import LICENCES, need_packages, policy, scripts
from resid_surgery.views.drawing import curves_svg, gate_svg
from resid_surgery.views.operated import effect_page, graph_page, operated_page, run_page, verified_page
from resid_surgery.views.pages import Page, part, table_page, with_drawings
from resid_surgery.views.recorded import located_page, recording_page

MOST = 5_000_000
"""Bytes of a page."""
_LIMITS = (2000, 1000, 300, 100, 30, 10)
_NOTES = {
    HEADINGS["tokens"]: "What the edited vectors promote and suppress besides the fact: one vector has many abilities.",
    HEADINGS["worst"]: "Prompts that must not change, by how much they did: what each model says by itself.",
    HEADINGS["controls"]: "The same measurements for what should do nothing: the edit must stand out from them.",
}


def write_report(value: Any, path: Any, *, interactive: bool = True) -> Path:
    """Write a value as one self-contained HTML page of at most 5 MB.

    In an interactive page points tell their tokens and scores when they are hovered or walked to, tables are sorted and
    filtered, and the reader chooses the competitor and the norm convention where the value has both.

    Args:
        value: a `Recording`, `Located`, `Effect`, `SourceGraph`, `Verified`, `Operated`, `Edit`, `Validation` or `Run`,
            a DataFrame, or a dict of DataFrames. path: ends in ``.html``.
        interactive: with charts (of a `Recording`, `Located`, `Effect`, graph, `Operated` or `Run`) and tables that
            sort, which need the extra ``report``; False for a page of plain tables without any script.

    Returns:
        The path; the file is written whole or not at all.

    Raises:
        ArgumentError: another value or suffix; a package is missing. LoadError: it cannot be written.
        StaleRecordingError: a recording whose model's weights have changed since.
    """
    place = path_of("path", path, "a file name that ends in .html", suffix=(".html", ".htm"))
    text = report_html(value, interactive=interactive)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(place, text.encode("utf-8", "replace"))
    except OSError as error:
        raise LoadError(f"the page cannot be written to {place}: {error.strerror}.") from None


def report_html(value: Any, *, interactive: bool = True) -> str:
    """The page of `write_report` as text.

    Raises:
        As `write_report`.
    """
    if not isinstance(interactive, bool):
        raise ArgumentError(message("interactive", "True or False", interactive))
    kind = _kind(value)
    if interactive:
        need_packages(("charts", "tables") if kind in _CHARTED else ("tables",))
    page = dict(_PAGES)[kind](value)
    texts = scripts(page.kinds) if interactive else ()
    for limit in _LIMITS if interactive else _LIMITS[2:]:
        text = _rendered(page, texts, limit)
        if len(text.encode("utf-8", "replace")) <= MOST:
            return text
    raise ArgumentError(message("value", f"one that fits on a page of {MOST:,} bytes", repr(page.title)))


def _rendered(page: Page, texts: tuple[str, ...], limit: int) -> str:
    """The page with at most so many rows a table, and cards a section."""
    told = Markup(_data(page)) if texts else ""
    given = {"scripts": [Markup(one) for one in texts], "policy": policy(texts), "licences": LICENCES, "limit": limit}
    return str(_template().render(page=page, data=told, **given))


def _data(page: Page) -> str:
    """The charts as JSON that may stand in a script's place: what could end it is written as an escape."""
    held = [{"spec": one.spec, "rows": list(one.rows), "more": one.more} for one in page.charts]
    text = json.dumps({"charts": held}, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=_plain)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    return value.item()


@cache
def _template() -> Any:
    loader = PackageLoader("resid_surgery", "views")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        "report.html.j2"
    )


def _kind(value: Any) -> type:
    for kind, _ in _PAGES:
        if isinstance(value, kind):
            return kind
    names = ", ".join(kind.__name__ for kind, _ in _PAGES)
    raise ArgumentError(message("value", f"one of {names} (a dict holds DataFrames)", type(value).__name__))


def _validation(value: Validation) -> Page:
    parts = [part(heading, table, note=_NOTES.get(heading, "")) for heading, table in value.sections().items()]
    drawn = tuple(Markup(one) for one in curves_svg(value.tables["curve"])) if "curve" in value.tables else ()
    parts = [one if one.title != HEADINGS["curve"] else with_drawings(one, drawn) for one in parts]
    about = ", ".join(f"{key} {cell_text(value.manifest[key])}" for key in ("model", "edit", "dtype")
                      if value.manifest.get(key))  # fmt: skip
    gates = tuple(_gate(row) for row in value.gates.to_dict("records"))
    line = value.headline.split(": ", 1)[1]
    ends = part("Manifest", entries(value.manifest), shown=False)
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


def _edit(value: Edit) -> Page:
    facts = pd.DataFrame([one.said() for one in value.rewrites])
    tables = {"Changes": value.table, "Facts": facts, "Fitting": value.fitting, "Provenance": entries(value.about)}
    return table_page("Edit", f"{value!r}, {value.hash[:16]}", {name: one for name, one in tables.items() if len(one)})


def _frame(value: pd.DataFrame) -> Page:
    return table_page("Table", "", {"Rows": value})


def _frames(value: Mapping[Any, Any]) -> Page:
    if not value:
        raise ArgumentError(message("value", "a dict of at least one DataFrame", value))
    for name, one in value.items():
        if not isinstance(one, pd.DataFrame):
            raise ArgumentError(message("value", "a dict of DataFrames", {name: type(one).__name__}))
    return table_page("Tables", "", {str(name): one for name, one in value.items()})


_PAGES: tuple[tuple[type, Callable[[Any], Page]], ...] = (
    (Validation, _validation),
    (Recording, recording_page),
    (Effect, effect_page),
    (Located, located_page),
    (SourceGraph, graph_page),
    (Verified, verified_page),
    (Operated, operated_page),
    (Edit, _edit),
    (Run, run_page),
    (pd.DataFrame, _frame),
    (Mapping, _frames),
)
_CHARTED = (Recording, Effect, Located, SourceGraph, Verified, Operated, Run)

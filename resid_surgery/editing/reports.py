"""Reports: a validation's outcome as one value, and the forms that it is read in.

`Validation` is plain data: it needs no model, and reads back from its JSON exactly as it was. Markdown is written here,
JUnit XML by `junit`, HTML by `views.report`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import pandas as pd

from resid_surgery._check import choice, flag, message, shown
from resid_surgery._check import path as as_path
from resid_surgery._files import open_text, utf8, write_whole
from resid_surgery._html import cell_text, table_html
from resid_surgery.editing import packing
from resid_surgery.editing.gating import COLUMNS, STATES, verdict, worst
from resid_surgery.editing.junit import junit_xml
from resid_surgery.errors import ArgumentError, LoadError

SCHEMA_VERSION = 1
LARGEST_BYTES = 1 << 28
WHAT = "resid_surgery validation"
EXIT_CODES = MappingProxyType({"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3})
HEADINGS = MappingProxyType({
    "facts": "Per edit",
    "stream": "Stream, edit by edit",
    "tokens": "Token spectrum of the edited vectors",
    "exposure": "Exposure strata",
    "strata": "Locality by stratum",
    "worst": "Worst collateral prompts",
    "shares": "Tokens that make up their divergence",
    "controls": "Controls",
    "curve": "Sequence curves",
})  # fmt: skip
"""Tables that a report shows first and in this order, by name -> heading; others follow under their own names."""
MOST_ROWS = MappingProxyType({"worst": 10})
COMPARED = MappingProxyType({
    "probe_hash": "asked of the same probes",
    "budget": "made with the same budget",
    "fingerprint": "against the same base model",
})  # fmt: skip
"""Entries of a manifest that must agree before two reports can be compared, and what that means."""

_MILDER = ("FAIL", "INCONCLUSIVE", "PASS")
_DIFFERENCE = ("gate", "unit", "direction", "value_before", "value_after", "change", "apart", "state_before",
               "state_after", "states")  # fmt: skip
_COLUMN = {"type": "object", "required": ["name", "dtype"], "additionalProperties": False,
           "properties": {"name": {"type": "string"}, "dtype": {"type": "string"}}}  # fmt: skip
_TABLE = {"type": "object", "required": ["columns", "rows"], "additionalProperties": False, "properties": {
    "columns": {"type": "array", "items": _COLUMN}, "rows": {"type": "array", "items": {"type": "array"}}}}  # fmt: skip
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": WHAT,
    "type": "object",
    "required": ["what", "schema", "verdict", "worst", "gates", "tables", "manifest"],
    "additionalProperties": False,
    "properties": {
        "what": {"const": WHAT},
        "schema": {"const": SCHEMA_VERSION},
        "verdict": {"enum": list(STATES)},
        "worst": {"type": "string"},
        "gates": {"$ref": "#/$defs/table"},
        "tables": {"type": "object", "additionalProperties": {"$ref": "#/$defs/table"}},
        "manifest": {"type": "object"},
    },
    "$defs": {"table": _TABLE},
}
"""JSON schema of `Validation.to_json`."""

KINDS = ("float64", "int64", "bool", "str", "object")
NUMBERS = ("value", "low", "high", "warn", "fail", "policy_warn", "policy_fail", "noise_floor", "n", "confidence")


@final
@dataclass(frozen=True, eq=False)
class Validation:
    """What validating an edit found; made by `resid_surgery.validate`, or read with `from_json`.

    Attributes:
        verdict: "PASS", "FAIL" or "INCONCLUSIVE". gates: from `judge`, one row a gate. tables: name -> table:
            those of `HEADINGS` ("worst" has text_before and text_after, "curve" starts with how many edits) and others.
        manifest: hashes, versions, dtype, seeds; what must agree before reports can be compared stands under the names
            of `COMPARED`.

    Raises:
        ArgumentError: a verdict better than its gates, or data that JSON cannot hold.
    """

    verdict: str
    gates: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.gates, pd.DataFrame) or not set(COLUMNS) <= set(self.gates):
            raise ArgumentError(message("gates", "a table from judge", type(self.gates).__name__))
        mildest = verdict(self.gates)
        if _MILDER.index(choice("verdict", self.verdict, STATES)) > _MILDER.index(mildest):
            raise ArgumentError(message("verdict", f"{mildest} or worse, as the gates are", self.verdict))
        tables = {str(name): packing.plain_frame(one, str(name)) for name, one in self.tables.items()}
        object.__setattr__(self, "gates", packing.plain_frame(self.gates, "gates"))
        object.__setattr__(self, "tables", MappingProxyType(tables))
        object.__setattr__(self, "manifest", MappingProxyType(packing.plain(self.manifest, "manifest")))

    def __repr__(self) -> str:
        return f"Validation({self.headline})"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p><strong>{escape(self.headline)}</strong></p>{table_html(brief_gates(self.gates))}"

    @property
    def worst(self) -> str:
        """The gate nearest to its limit, or furthest beyond it; "" where there is none."""
        return worst(self.gates)

    @property
    def exit_code(self) -> int:
        """0 for PASS, 1 for FAIL, 3 for INCONCLUSIVE."""
        return EXIT_CODES[self.verdict]

    @property
    def headline(self) -> str:
        """The verdict with the counts behind it, and the worst gate."""
        counts = self.gates["state"].value_counts()
        listed = ", ".join(f"{counts[one]} {one}" for one in STATES if one in counts) or "no gate"
        warned = int((self.gates["warns"].astype(bool) & (self.gates["state"] == "PASS")).sum())
        warned_text = f" ({warned} with a warning)" if warned else ""
        return f"{self.verdict}: {listed}{warned_text}" + (f"; worst: {self.worst}" if self.worst else "")

    def sections(self) -> dict[str, pd.DataFrame]:
        """Heading -> table, in the order of reports."""
        names = [*(one for one in HEADINGS if one in self.tables), *(n for n in self.tables if n not in HEADINGS)]
        return {HEADINGS.get(one, one.replace("_", " ").capitalize()): self._rows(one) for one in names}

    def to_json(self) -> str:
        """As strict JSON of the schema `SCHEMA`; NaN becomes null, and `from_json` gives back the same to the bit."""
        return packing.strict_json({
            "what": WHAT, "schema": SCHEMA_VERSION, "verdict": self.verdict, "worst": self.worst,
            "gates": packing.pack(self.gates),
            "tables": {name: packing.pack(one) for name, one in self.tables.items()},
            "manifest": packing.pack_data(dict(self.manifest)),
        })  # fmt: skip

    @classmethod
    def from_json(cls, source: Any) -> "Validation":
        """Read a report from JSON.

        Args:
            source: the text, or the path of a file (a str that begins with "{" is the text).

        Raises:
            LoadError: it cannot be read, is no report, or one of another schema version.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls._of_text(source)
        text = _text(source)
        try:
            return cls._of_text(text)
        except LoadError as error:
            raise LoadError(f"{source}: {error}") from None

    @classmethod
    def _of_text(cls, text: str) -> "Validation":
        data = packing.read_json(text)
        missing = [one for one in SCHEMA["required"] if not isinstance(data, dict) or one not in data]
        if missing or data["what"] != WHAT:
            wrong = f"it lacks {', '.join(missing)}" if missing else f"`what` is {data['what']!r}"
            raise LoadError(f"this is no {WHAT} (as `validate --report` or Validation.save writes it): {wrong}.")
        if data["schema"] != SCHEMA_VERSION:
            raise LoadError(f"the report has schema {data['schema']!r}; this version reads {SCHEMA_VERSION}.")
        try:
            tables = {name: packing.unpack(one) for name, one in data["tables"].items()}
            manifest = packing.unpack_data(data["manifest"])
            if not isinstance(manifest, dict):
                raise TypeError(f"its manifest must be an object, not {shown(manifest)}")
            return cls(data["verdict"], _gates(data["gates"]), tables, manifest)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"the report is damaged: {error}.") from None

    def markdown(self) -> str:
        """For people: verdict line, gate table, every table, manifest; all text escaped."""
        parts = [f"# {_escaped(self.headline)}", "## Gates", markdown_table(brief_gates(self.gates))]
        for heading, table in self.sections().items():
            parts += [f"## {_escaped(heading)}", markdown_table(table, most=50)]
        return "\n\n".join([*parts, "## Manifest", markdown_table(entries(self.manifest))]) + "\n"

    def junit(self) -> str:
        """For CI: JUnit XML, one test case a gate (see `junit_xml`)."""
        return junit_xml(self.gates, self.verdict, self.headline, self.manifest)

    def save(self, path: Any) -> list[Path]:
        """Write the report, each file whole or not at all.

        Args:
            path: ends in ``.json``, ``.md`` or ``.xml`` (JUnit), or is a folder for all three, made if need be. For a
                page see `resid_surgery.write_report`.

        Returns:
            The files written.

        Raises:
            ArgumentError: another suffix. LoadError: it cannot be written.
        """
        place = as_path("path", path, "the path of a file or folder")
        forms = {".json": self.to_json, ".md": self.markdown, ".xml": self.junit}
        names = {".json": "report.json", ".md": "report.md", ".xml": "junit.xml"}
        if place.suffix and not place.is_dir():
            choice("path", place.suffix, (*forms, "a folder"))
            targets = {place: forms[place.suffix]}
        else:
            targets = {place / names[suffix]: form for suffix, form in forms.items()}
        try:
            next(iter(targets)).parent.mkdir(parents=True, exist_ok=True)
            return [write_whole(one, utf8(form())) for one, form in targets.items()]
        except OSError as error:
            raise LoadError(f"the report cannot be written to {place}: {error.strerror}.") from None

    def _rows(self, name: str) -> pd.DataFrame:
        table = self.tables[name]
        return table.head(MOST_ROWS[name]) if name in MOST_ROWS else table


def entries(named: Mapping[str, Any]) -> pd.DataFrame:
    """Named data as two columns, entry and value, in words."""
    pairs = [(name, cell_text(one)) for name, one in named.items()]
    return pd.DataFrame(pairs, columns=["entry", "value"], dtype=object)


def brief_gates(gates: pd.DataFrame) -> pd.DataFrame:
    """The gate table as people read it: gate, state, value, interval, limits, n, protocol, why."""
    rows = []
    for row in gates.to_dict("records"):
        low, high = cell_text(row["low"]), cell_text(row["high"])
        limits = " / ".join(cell_text(row[one]) or "–" for one in ("warn", "fail"))
        warned = " (warns)" if row["warns"] and row["state"] == "PASS" else ""
        rows.append({
            "gate": row["gate"], "state": row["state"] + warned,
            "value": cell_text(row["value"]), "interval": f"[{low}, {high}]" if low or high else "",
            "warn / fail": f"{row['direction']} {limits}", "unit": row["unit"],
            "n": f"{row['n']} {row['n_unit']}", "protocol": row["protocol"], "why": row["why"],
        })  # fmt: skip
    names = ["gate", "state", "value", "interval", "warn / fail", "unit", "n", "protocol", "why"]
    return pd.DataFrame(rows, columns=names)


def diff_reports(a: Validation, b: Validation, *, across_models: bool = False) -> pd.DataFrame:
    """Two reports gate by gate; the edits may differ, what was asked of them may not.

    Args:
        a, b: reports, or paths of their JSON. across_models: compare although the base models differ.

    Returns:
        One row a gate of either, then one with the gate "verdict": gate, unit, direction, value_before, value_after,
        change (after - before), apart (whether the intervals do not touch), state_before, state_after ("" where a
        report does not have the gate), states ("same", "better", "worse" or "").

    Raises:
        ArgumentError: protocols, limits, probes, budget or base model differ; the difference is named.
    """
    first, second = (one if isinstance(one, Validation) else Validation.from_json(one) for one in (a, b))
    _need_comparable(first, second, flag("across_models", across_models))
    if not across_models:
        _need_same_standing(first.manifest, second.manifest)
    left, right = ({row["gate"]: row for row in one.gates.to_dict("records")} for one in (first, second))
    rows = [_compared(name, left, right) for name in {**left, **right}]
    rows.append(_moving(first.verdict, second.verdict) | {"gate": "verdict", "unit": "", "direction": ""})
    kinds: dict[str, Any] = dict.fromkeys(("value_before", "value_after", "change"), float)
    return pd.DataFrame(rows, columns=list(_DIFFERENCE)).astype({**kinds, "apart": "boolean"})


def markdown_table(frame: pd.DataFrame, *, most: int | None = None) -> str:
    """A table in Markdown, every text escaped, so that a token cannot break out of its cell."""
    if not len(frame.columns):
        return "(empty)"
    shown = frame if most is None else frame.head(most)
    lines = ["| " + " | ".join(_escaped(str(one)) for one in frame.columns) + " |", "|---" * len(frame.columns) + "|"]
    lines += ["| " + " | ".join(_escaped(cell_text(one)) for one in row) + " |"
              for row in shown.itertuples(index=False, name=None)]  # fmt: skip
    left = len(frame) - len(shown)
    return "\n".join(lines) + (f"\n\nand {left} more rows" if left else "")


def _compared(name: str, left: dict[Any, Any], right: dict[Any, Any]) -> dict[str, Any]:
    x, y = left.get(name), right.get(name)
    known = x if x is not None else y
    assert known is not None
    row = {"gate": name, "unit": known["unit"], "direction": known["direction"]}
    row |= _moving(*("" if one is None else str(one["state"]) for one in (x, y)))
    row |= {f"value_{when}": one["value"] for when, one in (("before", x), ("after", y)) if one is not None}
    if x is not None and y is not None:
        apart = bool(x["high"] < y["low"] or y["high"] < x["low"])
        row |= {"change": y["value"] - x["value"], "apart": apart}
    return row


def _moving(before: str, after: str) -> dict[str, Any]:
    """From one state to another, in words."""
    step = _MILDER.index(after) - _MILDER.index(before) if before and after else None
    moved = "" if step is None else "better" if step > 0 else "worse" if step < 0 else "same"
    return {"state_before": before, "state_after": after, "states": moved}


def _need_comparable(a: Validation, b: Validation, across_models: bool) -> None:
    x, y = ({row["gate"]: row for row in one.gates.to_dict("records")} for one in (a, b))
    for gate in x.keys() & y.keys():
        for key, what in (("protocol", "by one protocol"), ("policy_warn", "against one limit"),
                          ("policy_fail", "against one limit")):  # fmt: skip
            one, other = (cell_text(rows[gate][key]) or "none" for rows in (x, y))
            if one != other:
                raise ArgumentError(f"reports must judge {gate} {what} ({key}) to be compared; got {one} and {other}. "
                                    "Validate anew with the same.")  # fmt: skip
    for key, what in COMPARED.items():
        if key == "fingerprint" and across_models:
            continue
        if (mine := a.manifest.get(key)) != (theirs := b.manifest.get(key)):
            raise ArgumentError(f"reports must be {what} ({key}) to be compared; got {cell_text(mine) or 'none'} and "
                                f"{cell_text(theirs) or 'none'}. Validate anew with the same.")  # fmt: skip


def _gates(data: Any) -> pd.DataFrame:
    """The gate table of a report, whose cells are what `judge` puts there.

    Raises:
        TypeError: one is not.
    """
    found = packing.unpack(data)
    for name in (one for one in COLUMNS if one in found):
        kind = found[name].dtype
        if str(kind) not in KINDS or not all(pd.api.types.is_scalar(cell) for cell in found[name]):
            raise TypeError(f"its gates hold {shown(kind)} as {name}")
        if name in NUMBERS and not (pd.api.types.is_numeric_dtype(kind) or found[name].isna().all()):
            raise TypeError(f"its gates hold no numbers as {name}")
    return found


def _need_same_standing(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse reports of one base's weights behind other hooks or settings; of other versions, modules are others."""
    said = [str(one["standing"]) for one in (a, b) if "standing" in one]
    if a.get("versions") == b.get("versions") and len(set(said)) > 1:
        raise ArgumentError(
            "reports must be against a base with the same modules, hooks and settings (standing) to be compared; got "
            f"{said[0][:12]} and {said[1][:12]}. Validate anew with the same."
        )


def _text(source: Any) -> str:
    if not isinstance(source, (str, Path)):
        raise ArgumentError(message("source", "a path or a JSON text", source))
    try:
        with open_text(Path(source), LARGEST_BYTES) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise LoadError(f"the report {str(source)[:200]!r} cannot be read: {error}.") from None


def _escaped(text: str) -> str:
    """Markdown's own signs as signs, lines joined."""
    plain = " ⏎ ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").splitlines())
    return "".join("\\" + one if one in "\\`*_[]|#~$!" else one for one in plain)

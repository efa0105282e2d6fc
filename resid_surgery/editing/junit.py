"""JUnit XML of a validation, so that a CI job shows each gate as a test.

FAIL is a ``failure``. INCONCLUSIVE is an ``error``: dashboards show it in red beside the failures, in a count of its
own, where a ``skipped`` test would pass for green. A gate that passes with a warning says so in ``system-out``.
"""

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pandas as pd

from resid_surgery._html import cell_text

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAGS = {"FAIL": "failure", "INCONCLUSIVE": "error"}


def junit_xml(gates: pd.DataFrame, verdict: str, headline: str, manifest: Mapping[str, Any]) -> str:
    """One suite, one case a gate and one for the verdict.

    Args:
        gates: from `judge`. verdict: of the validation. headline: its one line. manifest: becomes properties.

    Returns:
        The document; characters that XML 1.0 cannot hold are replaced by U+FFFD.
    """
    rows: list[dict[Any, Any]] = [
        *gates.to_dict("records"),
        {"gate": "verdict", "state": verdict, "why": headline, "warns": False},
    ]
    counts = {tag: str(sum(_TAGS.get(row["state"]) == tag for row in rows)) for tag in _TAGS.values()}
    numbers = {"tests": str(len(rows)), "failures": counts["failure"], "errors": counts["error"], "skipped": "0"}
    suites = ElementTree.Element("testsuites", {"name": "resid_surgery", **numbers})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "resid_surgery.validate", **numbers, "time": "0"})
    listed = ElementTree.SubElement(suite, "properties")
    for key, value in {"verdict": verdict, **manifest}.items():
        ElementTree.SubElement(listed, "property", {"name": _legal(str(key)), "value": _legal(cell_text(value))})
    for row in rows:
        _case(suite, row, str(manifest.get("model") or "model"))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: ElementTree.Element, row: Mapping[Any, Any], model: str) -> None:
    names = {"classname": f"resid_surgery.{model}", "name": str(row["gate"]), "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", {key: _legal(one) for key, one in names.items()})
    said = "\n".join(f"{key}: {cell_text(value)}" for key, value in row.items() if cell_text(value))
    if row["state"] in _TAGS:
        told = {"message": _legal(cell_text(row["why"])), "type": str(row["state"])}
        ElementTree.SubElement(case, _TAGS[row["state"]], told).text = _legal(said)
    elif row["warns"]:
        ElementTree.SubElement(case, "system-out").text = _legal(f"warning: {cell_text(row['why'])}\n{said}")


def _legal(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)

"""Assets: the scripts that an interactive page carries inside itself, each allowed by its hash and nothing else.

Charts are drawn by Vega-Lite, whose bundle comes with the package vl-convert-python; it draws without ``eval``. Tables
are sorted and filtered by DataTables, whose bundle comes with itables. Only what a page uses is inlined.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from resid_surgery._files import open_regular, write_whole
from resid_surgery.errors import ArgumentError
from resid_surgery.models.checkpoints import cache_folder

STATIC = "default-src 'none'; style-src 'unsafe-inline'"
LICENCES = """Scripts inside this page, in the form in which their packages ship them:
Vega, Vega-Lite, Vega-Embed: Copyright (c) University of Washington Interactive Data Lab and contributors, BSD 3-Clause;
d3: Copyright (c) Mike Bostock, ISC. DataTables: Copyright (c) SpryMedia Limited, MIT; jQuery: Copyright (c) OpenJS
Foundation and contributors, MIT. THESE ARE PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND. Sources and full licences:
vega.github.io and datatables.net."""
_PACKAGES = {"charts": "vl-convert-python", "tables": "itables"}
_MODULES = {"charts": "vl_convert", "tables": "itables"}
LARGEST = 1 << 26  # bytes of a kept script
_TAGS = re.compile(r"</?script|<!--", re.IGNORECASE)


def need_packages(kinds: Sequence[str], do: str = "give write_report interactive=False") -> None:
    """Refuse, before any work, to make an interactive page without what it needs.

    Args:
        kinds: of "charts" and "tables". do: how to have a page without them.

    Raises:
        ArgumentError: a package is missing.
    """
    missing = [_PACKAGES[kind] for kind in kinds if find_spec(_MODULES[kind]) is None]
    if missing:
        raise ArgumentError(
            f"an interactive page needs {' and '.join(missing)}: pip install 'resid-surgery[report]'. "
            f"For a page of plain tables, without charts, {do}."
        )


def scripts(kinds: Sequence[str]) -> tuple[str, ...]:
    """The scripts of a page in the order in which they must run, the page's own last.

    Raises:
        ArgumentError: a package is missing, or its bundle is not what it was.
    """
    need_packages(kinds)
    made = {"charts": _charts, "tables": _tables}
    return (*(made[kind]() for kind in kinds), _own())


def policy(texts: Sequence[str]) -> str:
    """The content security policy of a page: only these scripts, nothing from outside, no form sent anywhere."""
    if not texts:
        return STATIC
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)
    return f"{STATIC}; script-src {hashes}; base-uri 'none'; form-action 'none'"


@cache
def _own() -> str:
    return _inlined(resources.files("resid_surgery").joinpath("views", "report.js").read_text(encoding="utf-8"))


@cache
def _charts() -> str:
    """Vega-Embed as one script: bundled once for a version of its package (1-2 s), then kept in the cache folder."""
    place = cache_folder() / "pages" / f"vega-{_version('charts')}.js"
    kept = _kept(place)
    if kept is not None:
        return kept
    text = _inlined(_bundle())
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, f"{sha256(text.encode()).hexdigest()}\n{text}".encode())
    except OSError:
        return text  # the cache folder only saves time
    return text


def _bundle() -> str:
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _kept(place: Path) -> str | None:
    """What `_charts` has kept; None where there is nothing, or it is damaged."""
    try:
        with open_regular(place, LARGEST) as file:
            said, _, text = file.read().decode("utf-8", "replace").partition("\n")
    except OSError:
        return None
    return text if said == sha256(text.encode("utf-8")).hexdigest() else None


@cache
def _tables() -> str:
    """DataTables as one script that leaves its class at ``window.DataTable``."""
    text = resources.files("itables").joinpath("html", "dt_bundle.js").read_text(encoding="utf-8")
    found = re.search(r"\bexport\s*\{[^}]*?\b([\w$]+) as default\b[^}]*\}", text)
    if found is None:
        raise ArgumentError(f"itables {_version('tables')} has another bundle of DataTables than is known: pip install "
                            "'itables>=2.9,<3'.")  # fmt: skip
    text = f"{text[: found.start()]}window.DataTable={found[1]};{text[found.end() :]}"
    return _inlined(text)


def _inlined(text: str) -> str:
    """A script as it may stand between script tags: what reads as a tag there, inside its strings, is an escape."""
    return _TAGS.sub(lambda found: f"\\x3C{found[0][1:]}", text.replace("\r\n", "\n")).strip()


def _version(kind: str) -> str:
    try:
        return version(_PACKAGES[kind])
    except PackageNotFoundError:
        return "unknown"

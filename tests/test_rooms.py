"""Data flows one way: a folder imports only folders above it, a module only modules above it."""

import ast
from pathlib import Path

import pytest

import resid_surgery

ROOT = Path(resid_surgery.__file__).parent
ORDER = {
    "": ["errors", "_check", "_files", "_html", "_progress", "sites", "addresses"],
    "models": ["modes", "zoo", "parts", "experts", "layout", "calls", "ends", "mlps", "wiring", "anatomy",
               "prompts", "facts", "fingerprint", "standing", "kept", "headers", "checkpoints", "devices",
               "wrappers", "opening", "replacing", "attention", "taps", "remoting", "envoys", "passes",
               "freezing", "tracing", "settling"],
    "stream": ["records", "recording", "grouping", "elsewhere", "blocks", "kinds", "subvalues", "vocabulary",
               "everywhere", "tables", "closing", "loading", "knowing"],
    "attribution": ["states", "catalogue", "adding", "ranges", "bounds", "ranks", "gradients", "queries",
                    "scoring", "streaming", "scores", "by_layer", "searching", "locating", "curves", "aims",
                    "readings", "mlp_readers", "attn_readers", "asking", "shares", "growing", "sources",
                    "removing", "crossing", "switching", "weights", "embeddings", "ov_qk", "composing",
                    "patterns", "messages", "constancy", "triggers", "memories"],
    "surgery": ["arguments", "noting", "interventions", "batches", "conflicts", "resolving", "places", "reading",
                "writing", "cutting", "engine", "measures", "splits", "effects", "frames", "chunks", "sweeping",
                "grids", "probing", "altering", "storing"],
    "evidence": ["check", "families", "operating", "statistics", "trials", "truth", "growth", "graphs",
                 "verifying", "faithfulness", "tipping", "restoring", "blame"],
    "editing": ["changes", "rewrites", "packing", "keeping", "differing", "adapters", "outside", "composing",
                "edits", "placing", "coefficients", "value_rows", "keys", "values", "rank_one", "least_squares",
                "probes", "texts", "relations", "records", "formats", "hops", "importing", "roles", "acting",
                "factoring", "spectra", "auditing", "spots", "exposing", "exposure", "harness", "running",
                "remembering", "decoding", "answering", "surroundings", "predicting", "controls", "intervals",
                "resampling", "policy", "gating", "junit", "reports", "budgets", "asking", "streams", "validating"],
    "experiments": ["cases", "columns", "grammar", "plans", "tables", "finding", "arms", "checking", "work",
                    "executors", "actors", "on_ray", "crew", "folder", "interrupts", "watching", "reading", "runs"],
    "views": ["lettering", "taking", "shading", "plots", "figures", "profiles", "maps", "waterfall", "circuits",
              "edits", "paper", "text", "drawing", "assets", "pages", "charts", "findings", "recorded",
              "operated", "report", "files", "theatre", "theatre_acts", "theatre_line", "theatre_guard",
              "theatre_recipe", "theatre_tables", "theatre_parts", "theatre_knobs", "theatre_page",
              "theatre_server"],
    "cli": ["common", "operating", "recipes", "running", "scoring", "serving", "tracing", "validating", "main"],
}  # fmt: skip
PLACE = {".".join(filter(None, [room, name])): (i, j) for i, (room, names) in enumerate(ORDER.items())
         for j, name in enumerate(names)}  # fmt: skip
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def imported(source: str) -> set[str]:
    """Modules of this package that some source imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resid_surgery"):
            path = (node.module or "").split(".")[1:]
            found |= {".".join([*path, alias.name]) for alias in node.names} | {".".join(path)}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("resid_surgery.") for a in node.names if a.name.startswith("resid_surgery.")}
    return found & set(PLACE)


def test_every_module_has_a_place():
    assert {".".join(p.with_suffix("").parts) for p in MODULES} == set(PLACE)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_what_stands_above_it(path):
    name = ".".join(path.with_suffix("").parts)
    for other in imported((ROOT / path).read_text()):
        assert PLACE[other] < PLACE[name], f"{name} must not import {other}, which stands below it"


def test_the_order_test_can_fail():
    assert imported("from resid_surgery.cli.main import run") == {"cli.main"}
    assert imported("from resid_surgery.surgery import engine") == {"surgery.engine"}
    assert PLACE["cli.main"] > PLACE["models.opening"]


def test_only_one_file_imports_nnsight_and_none_its_private_modules():
    users = [
        p for p in MODULES if "import nnsight" in (ROOT / p).read_text() or "from nnsight" in (ROOT / p).read_text()
    ]
    assert [str(p) for p in users] == ["models/tracing.py"]
    assert "nnsight.intervention" not in (ROOT / "models/tracing.py").read_text()


def test_modules_stay_small():
    for path in MODULES:
        assert len((ROOT / path).read_text().splitlines()) <= 400, path


def test_importing_the_package_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = ("torch", "transformers", "nnsight", "pandas", "rich", "matplotlib")
    code = f"import sys, resid_surgery; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves_and_has_a_docstring():
    for name in resid_surgery.__all__:
        value = getattr(resid_surgery, name)
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        resid_surgery.nonsense  # noqa: B018

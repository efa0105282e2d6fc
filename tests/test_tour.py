"""The example notebook runs from top to bottom, shows what it should, and lies in git without outputs."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
    pytest.skip("nbclient and ipykernel are not installed: pip install 'resid-surgery[docs]'", allow_module_level=True)

import nbformat
from nbclient import NotebookClient

import resid_surgery as rs

PATH = Path(__file__).parent.parent / "recipes" / "tour.ipynb"
SECONDS = 240  # a cell that takes longer hangs


def read() -> Any:
    return nbformat.read(PATH, as_version=4)


def shown(cell: Any, kind: str) -> str:
    """What a cell shows of one kind, as one text."""
    return "\n".join(out["data"][kind] for out in cell.outputs if kind in out.get("data", {}))


def test_it_lies_there_without_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(not cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_every_name_that_it_uses_is_public() -> None:
    code = "\n".join(cell.source for cell in read().cells if cell.cell_type == "code")
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "rs"}  # fmt: skip
    assert {"record", "locate", "sources", "intervene", "sweep", "under"} <= used <= set(rs.__all__)


@pytest.mark.real
def test_it_runs(smollm2: Any, tmp_path: Path) -> None:
    notebook = read()
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    by_source = {cell.source.splitlines()[-1]: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert len([cell for cell in by_source.values() if shown(cell, "image/png")]) == 2
    rec = rs.record(smollm2, rs.Prompt("The capital of France is", target=" Paris", versus=[" London", " Lyon"]))
    for site in rs.locate(rec, k=10).sites:
        assert str(site) in shown(by_source["found"], "text/html") + shown(by_source["found"], "text/plain")
    for name in ("rec", "found", "graph", "effect", "edit", "prompt"):
        assert "<table" in shown(by_source[name], "text/html"), name
    assert not list(tmp_path.iterdir())

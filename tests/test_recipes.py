"""Every recipe runs, on a tiny model with prompts by ids where it takes a prompt."""

import importlib.util
import inspect
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_runs_on_the_embedded_model(path, smollm2):
    main = load(path).main
    tables = main(smollm2) if "model" in inspect.signature(main).parameters else main()
    assert tables
    for name, table in tables.items():
        assert len(table), name
        if "closure" in table:
            assert table["closure"].max() <= 1e-4, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_is_short(path):
    assert len(path.read_text().splitlines()) <= 100

"""Every recipe runs on the embedded model, the long ones on a part of what they ask."""

import importlib.util
import inspect
from pathlib import Path

import pytest

import resid_surgery as rs

BUDGET = rs.Budget("tiny", 2, 1, 2, 3, 1, 120, 2, 24, 3, 1, 8, 5, 1, 2)
SCORES = ("log_prob_increase", "direction_norm")
# The long ones, small: a prompt or two, a layer.
QUICK = {
    "05_the_addition_test": {"kinds": ("capital",), "each": 2, "subvalues": ("neuron",), "scores": SCORES},
    "06_the_ablation_test": {"kinds": ("capital",), "each": 2, "draws": 1, "scores": SCORES},
    "07_score_against_truth": {"kinds": ("capital",), "each": 2, "whole": 0, "best": 20, "random": 100},
    "08_how_scores_behave": {"kinds": ("capital",), "each": 1, "layers": [27]},
    "11_why_mumbai": {"until": "above"},
    "12_circuits_of_heads": {"repeats": 2},
    "13_rome_three_ways": {"steps": 3, "budget": BUDGET, "tokens": 60},
    "14_twenty_edits": {"many": 2, "steps": 3, "budget": BUDGET},
}
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_runs_on_the_embedded_model(path, smollm2, tmp_path):
    main, options = load(path).main, dict(QUICK.get(path.stem, {}))
    parameters = inspect.signature(main).parameters
    if "model" in parameters:
        options["model"] = smollm2
    if "out" in parameters:
        options["out"] = tmp_path / "results"
    tables = main(**options)
    assert tables
    if "out" in parameters:
        assert {f"{name}.csv" for name in tables} <= {file.name for file in options["out"].iterdir()}
        assert list(options["out"].glob("*.png"))
    for name, table in tables.items():
        assert len(table), name
        if "closure" in table:
            assert table["closure"].max() <= 1e-4, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_is_short(path):
    assert len(path.read_text().splitlines()) <= 100

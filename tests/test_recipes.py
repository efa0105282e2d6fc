"""Every recipe runs on a tiny model that knows facts; a few cheap ones on the embedded model too."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import knowing
import numpy as np
import pytest

import resid_surgery as rs

ROOT = Path(__file__).parent.parent
BUDGET = rs.Budget("tiny", 2, 1, 2, 3, 1, 120, 2, 24, 3, 1, 8, 5, 1, 2)
SCORES = ("log_prob_increase", "direction_norm")
# The long ones, small: a prompt or two, a layer.
QUICK: dict[str, dict[str, Any]] = {
    "05_the_addition_test": {"kinds": ("capital",), "each": 2, "subvalues": ("neuron",), "scores": SCORES},
    "06_the_ablation_test": {"kinds": ("capital",), "each": 2, "draws": 1, "large": False, "scores": SCORES},
    "07_score_against_truth": {"kinds": ("capital",), "each": 2, "whole": 1, "best": 20, "random": 50},
    "08_how_scores_behave": {"kinds": ("capital",), "top": 20},
    "11_why_mumbai": {"until": "above"},
    "12_circuits_of_heads": {"repeats": 2},
    "13_rome_three_ways": {"steps": 3, "budget": BUDGET, "tokens": 60},
    "14_twenty_edits": {"many": 2, "steps": 3, "budget": BUDGET},
    "24_the_papers_figures": {"figures": ("3", "5", "8", "9", "10", "11", "19", "F(l)")},
    "15_many_facts": {"kinds": ("capital", "month"), "each": 3, "ks": (1, 3), "draws": 2},
}
OWN_MODEL = {"02_a_mixture_of_experts", "03_a_private_architecture"}
REAL = ("01_who_wrote_paris", "17_distribution_change", "20_ablate_and_compensate", "23_write_your_own")
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
NAMES = {path.stem: path for path in RECIPES}


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def carried_out(path: Path, out: Path, **options: Any) -> Any:
    """The tables of a recipe: none is empty, and what claims to be a sum closes."""
    main = load(path).main
    draws = "out" in inspect.signature(main).parameters
    tables = main(**options, **({"out": out} if draws else {}))
    assert tables
    for name, table in tables.items():
        assert len(table), name
        if "closure" in table:
            assert table["closure"].max() <= 1e-4, name
    if draws:
        assert {f"{name}.csv" for name in tables} <= {file.name for file in out.iterdir()}
        assert list(out.glob("*.png"))
    return tables


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_runs_on_a_tiny_model(name: str, tmp_path: Path) -> None:
    options = {} if name in OWN_MODEL else {"model": knowing.taught()}
    carried_out(NAMES[name], tmp_path / "results", **options, **QUICK.get(name, {}))


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_the_recipe_runs_on_the_embedded_model(name: str, smollm2: Any, tmp_path: Path) -> None:
    carried_out(NAMES[name], tmp_path / "results", model=smollm2)


# --- what they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_is_short_and_has_the_form(path: Path) -> None:
    text, main = path.read_text(), load(path).main
    assert len(text.splitlines()) <= 86
    assert text.startswith("# %% [markdown]\n# # ")
    assert '\nif __name__ == "__main__":\n' in text
    first, *_ = inspect.signature(main).parameters.values()
    assert (first.name, first.default) == ("model", None)
    assert inspect.getdoc(main)


def test_they_are_numbered_without_gaps() -> None:
    assert [int(name.split("_")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))


def test_every_recipe_of_the_readme_is_there() -> None:
    linked = set(re.findall(r"\(recipes/(\w+)\.py\)", (ROOT / "README.md").read_text()))
    assert linked
    assert linked <= set(NAMES)


def test_what_is_cheap_and_real_exists() -> None:
    assert set(REAL) | set(QUICK) | OWN_MODEL <= set(NAMES)


# --- what they say ------------------------------------------------------------------------------


def test_the_arithmetic_is_that_of_the_paper(tmp_path: Path) -> None:
    tables = carried_out(NAMES["17_distribution_change"], tmp_path / "out", model=knowing.taught())
    third = tables["numbers"].query("token == '3'")
    assert third["prob_after"].round(3).tolist() == [0.665, 0.665, 0.879, 0.946]
    below = tables["helpful_below_zero"]
    assert (below["bs_target"] < 0).all()


def test_the_timeline_adds_up_to_the_prediction(tmp_path: Path) -> None:
    model = knowing.taught()
    timeline = carried_out(NAMES["16_forensic_timeline"], tmp_path / "out", model=model)["timeline"]
    rec = rs.record(model, rs.Prompt("The capital of France is", target=" Paris"))
    ledger = rs.decompose(rec)
    rest = ledger.loc[~ledger["kind"].isin(["attn", "mlp"]), "bs_target"].sum()
    assert timeline["added"].sum() + rest == pytest.approx(float(rec.bs_values[rec.prompt.target]), abs=1e-4)
    last = timeline.iloc[-1]
    assert (last["state"], last["says"], last["target_rank"]) == ("L2.resid_post", " Paris", 1)
    for one in timeline.itertuples():  # the state is the one that the addend leads to
        leads = f"L{one.layer}.resid_mid" if one.kind == "attn" else f"L{one.layer + 1}.resid_pre"
        assert one.state == (leads if one.kind == "attn" or one.layer < 2 else "L2.resid_post")


def test_events_are_the_turns_of_the_timeline(tmp_path: Path) -> None:
    tables = carried_out(NAMES["16_forensic_timeline"], tmp_path / "out", model=knowing.taught())
    timeline, events = tables["timeline"], tables["events"]
    turned = timeline["says"].ne(timeline["says"].shift()).sum()
    assert (events["event"] == "the first choice changes").sum() == turned
    reached = events.loc[events["event"] == "the target is first", "state"]
    ranks = timeline.set_index("state")["target_rank"]
    assert len(reached)
    assert (ranks[reached] == 1).all()


def test_steering_with_one_changes_nothing(tmp_path: Path) -> None:
    model = knowing.taught()
    tables = carried_out(NAMES["19_steering_a_generation"], tmp_path / "out", model=model, factors=(0.0, 1.0), new=3)
    said, measured = tables["said"], tables["measured"]
    kept = measured["factor"] == 1.0
    assert np.allclose(measured.loc[kept, "log_prob_change"], 0.0, atol=1e-6)
    assert said.loc[kept, "continuation"].nunique() == 1
    chosen = measured.set_index(["neuron", "factor"])["log_prob_change"]
    rec = rs.record(model, rs.Prompt("The capital of France is", target=" Paris"))
    effect = rs.intervene(rec, rs.Zero(rs.locate(rec, k=1).sites))
    assert chosen["chosen", 0.0] == pytest.approx(effect.table["log_prob_change"].iloc[0], abs=1e-5)


def test_only_a_neuron_can_be_steered(tmp_path: Path) -> None:
    with pytest.raises(rs.SiteError, match="must be a neuron"):
        load(NAMES["19_steering_a_generation"]).main(knowing.taught(), site="L1.H0", out=tmp_path)


def test_what_is_given_back_is_a_share_of_what_was_removed(tmp_path: Path) -> None:
    tables = carried_out(NAMES["20_ablate_and_compensate"], tmp_path / "out", model=knowing.taught(), k=3)
    ledger = tables["ledger"]
    shares = tables["compensated"].set_index("site")["gave_back"]
    removed = ledger["direct"].sum()
    assert np.allclose(-ledger.set_index("site").loc[shares.index, "indirect"] / removed, shares)


def test_patching_everything_makes_up_the_difference(tmp_path: Path) -> None:
    tables = carried_out(NAMES["21_clean_and_corrupt"], tmp_path / "out", model=knowing.taught())
    for direction in ("denoise", "noise"):
        states = tables[f"states_{direction}"].set_index(["site", "position"])["score"]
        assert states["L0.resid_pre", 3] == pytest.approx(1.0, abs=1e-4)  # the word in which they differ
        assert states["L0.resid_pre", 0] == pytest.approx(0.0, abs=1e-4)
    both = tables["heads_both"].set_index("site")
    for direction in ("denoise", "noise"):
        heads = tables[f"heads_{direction}"].set_index("site")["score"]
        assert np.allclose(heads[both.index], both[direction])


def test_the_graphs_predictions_hold(tmp_path: Path) -> None:
    verified = carried_out(NAMES["18_who_activated_whom"], tmp_path / "out", model=knowing.taught())["verified"]
    assert np.allclose(verified["predicted"], verified["measured"], rtol=1e-3, atol=1e-3)


def test_a_dense_model_has_no_routed_neurons() -> None:
    with pytest.raises(rs.ArgumentError, match="mixture of experts"):
        load(NAMES["02_a_mixture_of_experts"]).main(rs.load(rs.tiny("llama")))


def test_the_tiny_model_knows_its_lessons() -> None:
    model = knowing.taught()
    for prompt, first, second in knowing.lessons():
        said = rs.predictions(rs.record(model, rs.Prompt(prompt, target=first)))
        assert said.sort_values("rank")["token"].head(2).tolist() == [first, second], prompt

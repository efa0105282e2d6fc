"""Holes of runs that trying found: silently wrong, failing for every prompt, or breaking with a raw error."""

import pandas as pd
import pytest
from tiny import shared

import resid_surgery as rs
from resid_surgery.cli.running import LEVELS

PROMPTS = [
    {"ids": [5, 4, 3], "target": 1, "versus": [7], "relation": "a"},
    {"ids": [9, 8], "target": 2, "relation": "b"},
]
ZERO = {"kind": "Zero", "sites": "L1.mlp"}
DONOR = {"ids": [1, 2], "target": 3}


def go(out, plan, prompts=PROMPTS):
    return rs.run(shared("llama"), prompts, plan, out=out / "run", max_failures=None, progress=False)


@pytest.mark.parametrize("each", [False, True])
def test_a_site_with_its_own_position_is_not_called_by_others(tmp_path, each):
    with pytest.raises(rs.ArgumentError, match=r"sites.*@position.*'each'"):
        go(tmp_path, {"intervene": ZERO | {"sites": "L1.mlp@1", "positions": "each", "each": each}})
    assert not (tmp_path / "run").exists()


def test_each_does_not_come_through_an_axis():
    with pytest.raises(rs.ArgumentError, match="arm main: `positions` must not be 'each' through an axis"):
        rs.Plan(axes={"p": ["target", "each"]}, intervene=ZERO | {"positions": "$p"})


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"kind": "Patch", "sites": "L1.mlp", "donor": {"ids": [5, 500], "target": 1}}, "donor of arm main: `ids`"),
        ({"kind": "Patch", "sites": "L1.mlp", "donor": {"text": "abc", "target": 1}}, "donor of arm main: .*tokenizer"),
        ({"kind": "Mean", "sites": "L1.mlp", "over": [DONOR, DONOR | {"target": 1000}]}, "arm main: `target`"),
    ],
)
def test_a_plans_own_donors_are_checked_before_any_forward(tmp_path, operation, said):
    with pytest.raises(rs.PromptError, match=said):
        go(tmp_path, {"intervene": operation})
    assert not (tmp_path / "run").exists()


def test_a_tokens_text_that_looks_like_an_index_is_not_taken_for_one():
    patch = rs.Patch("L1.mlp", rs.Prompt(ids=[1, 2], target=3), align={"3": 1})
    with pytest.raises(rs.ArgumentError, match=r"align.*got '3'"):
        rs.Plan(intervene=[patch])


def test_digits_that_are_no_number_are_a_text(tmp_path):
    run = go(tmp_path, {"intervene": {"kind": "Patch", "sites": "L1.mlp", "donor": DONOR, "align": {"²": 1}}})
    assert set(run.failures["error"]) == {"InterventionError"} or set(run.failures["error"]) == {"PromptError"}


def test_a_slice_of_one_site_is_that_site(tmp_path):
    row = go(tmp_path, {"intervene": ZERO | {"sites": "L1:2.mlp"}}).rows.iloc[0]
    assert (row["site"], row["kind"], row["layer"], row["size"]) == ("L1.mlp", "Sublayer", 1, 1)


def test_numbers_that_no_column_holds(tmp_path):
    with pytest.raises(rs.ArgumentError, match="axis f"):
        rs.Plan(axes={"f": [2**70]}, intervene={"kind": "Scale", "sites": "L1.mlp", "factor": "$f"})
    with pytest.raises(rs.ArgumentError, match=r"size.*2\*\*53"):
        go(tmp_path, {"intervene": ZERO}, [PROMPTS[0] | {"size_of": 2**53 + 1}, PROMPTS[1] | {"size_of": 0.5}])


@pytest.mark.parametrize("value", [1.5, [0, 1.5], float("nan")])
def test_where_does_not_round(tmp_path, value):
    run = go(tmp_path, {"intervene": ZERO | {"sites": "L*.mlp", "each": True}})
    assert len(run.read(where={"layer": 1.0})) == 2
    with pytest.raises(rs.ArgumentError, match="where layer"):
        run.read(where={"layer": value})


def test_nothing_to_average_yet(tmp_path):
    run = go(tmp_path, {"intervene": ZERO, "known": True})
    assert run.status["unknown"] == len(PROMPTS)
    with pytest.raises(rs.ArgumentError, match=r"no log_prob_change in table 'rows' to average"):
        run.summary("arm")
    with pytest.raises(rs.ArgumentError, match="by"):
        run.summary(3)


def test_levels_of_truths_on_the_command_line():
    assert [LEVELS["bool"](one) for one in ("true", "False")] == [True, False]
    with pytest.raises(ValueError, match="not in tuple"):
        LEVELS["bool"]("yes")


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_a_model_folder_that_was_moved_is_the_same_model(tmp_path):
    tiny = rs.tiny("llama")
    for name in ("here", "there"):
        tiny.save_pretrained(tmp_path / name)
    prompts, plan = [rs.Prompt(ids=[5, 4, 3], target=1)], rs.Plan(intervene=[rs.Zero("L0.mlp")])
    first = rs.run(rs.load(tmp_path / "here"), prompts, plan, out=tmp_path / "out").rows
    again = rs.run(rs.load(tmp_path / "there"), prompts, plan, out=tmp_path / "out").rows
    pd.testing.assert_frame_equal(first, again)
    assert "the model was called here, and is there now" in (tmp_path / "out" / "run.log").read_text()


def test_the_same_weights_under_another_configuration_are_another_model(tmp_path):
    tiny = rs.tiny("llama")
    prompts, plan = [rs.Prompt(ids=[5, 4, 3], target=1)], rs.Plan(intervene=[rs.Zero("L0.mlp")])
    rs.run(rs.load(tiny), prompts, plan, out=tmp_path / "out")
    tiny.config.rms_norm_eps *= 2
    with pytest.raises(rs.RunError, match=r"model\.config"):
        rs.run(rs.load(tiny), prompts, plan, out=tmp_path / "out")


def test_a_comparison_with_nothing_to_compare_is_refused(tmp_path):
    arms = {"best": {"kind": "Zero", "sites": "$best"}, "fixed": {"kind": "Zero", "sites": "L0.mlp"}}
    plan = rs.Plan(axes={"k": [1, 2]}, locate={"best": {"k": "$k"}}, intervene=arms)
    prompts = [rs.Prompt(ids=[5, 4, 3], target=1), rs.Prompt(ids=[5, 4], target=1)]
    run = rs.run(rs.load(rs.tiny("llama")), prompts, plan, out=tmp_path / "out")
    with pytest.raises(rs.ArgumentError, match="Leave out of `by` what they do not have"):
        run.summary(["arm", "k"], against={"arm": "fixed"})
    assert run.summary(["arm"], against={"arm": "fixed"})["difference_n"].tolist() == [2, 2]

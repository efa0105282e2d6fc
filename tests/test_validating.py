"""Validating from end to end: what passes, what fails and at which gate, and what is left as it was."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import validation_cases
from validation_cases import DOWN, FACT, ID, SMALL, a_row, opened, probes, quick, scripted, sharp, some, words

import resid_surgery as rs
from resid_surgery.editing import validating
from resid_surgery.editing.budgets import Budget
from resid_surgery.editing.changes import LowRank, Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.probes import Probe
from resid_surgery.errors import ArgumentError, PromptError, StaleRecordingError
from resid_surgery.models.replacing import tensors_of

own_cache = validation_cases.own_cache

LOCALITY = ("kl: neighbourhood", "kl: edit prepended", "kl: unrelated text", "top-1 flips: unrelated text",
            "perplexity drift")  # fmt: skip
TINY_REAL = Budget("real", 2, 1, 4, 10, 1, 80, 5, 32, 4, 1, 4, 1, 1, 4)


def states(done: Any) -> dict[str, str]:
    return dict(zip(done.gates["gate"], done.gates["state"], strict=True))


def same_table(a: pd.DataFrame, b: pd.DataFrame, *, atol: float = 0.0) -> None:
    pd.testing.assert_frame_equal(a, b, rtol=0.0 if atol == 0 else 1e-5, atol=atol, check_exact=atol == 0)


def many() -> list[Probe]:
    """Enough unrelated texts and neighbours for intervals that decide."""
    return [
        *probes(unrelated=40, texts=30, choices=30),
        *(Probe("locality", some(20 + i, 22 + i), FACT.label, s, target=" Lyon", old=" Rome")
          for i in range(12) for s in ("same relation", "edit prepended")),
    ]  # fmt: skip


LARGE = Budget("large", None, None, None, None, 1, 160, None, 24, None, 2, 6, 5, 1, 4)


# --- the null control ------------------------------------------------------------------------------------


def in_other_batches(model: Any) -> Any:
    """The base's own logits, each row computed beside two others."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.module(torch.cat([row[None], ids.flip(0)[:2]])).logits[:1] for row in ids])

    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_null_control_sits_at_the_noise_floor_and_passes_every_locality_gate(dtype: torch.dtype) -> None:
    model = opened(dtype=dtype)
    done = quick(model, in_other_batches(model), [p for p in many() if p.axis not in ("efficacy", "paraphrase")],
                 budget=LARGE)  # fmt: skip
    assert done.verdict != "FAIL"
    gates = done.gates.set_index("gate")
    for name in ("kl: neighbourhood", "kl: edit prepended", "kl: unrelated text", "perplexity drift"):
        assert gates.loc[name, "state"] == "PASS", name
        assert abs(gates.loc[name, "value"]) < 1e-5
    assert gates.loc["top-1 flips: unrelated text", "value"] == 0
    noise = done.tables["noise"].set_index("gate")
    assert (noise["noise"] >= 0).all()
    assert (noise["noise"] < 1e-5).all()
    assert not done.tables["locality"]["flips"].any()
    assert done.tables["generated"]["same"].all()
    assert (done.tables["accuracy"]["before"] == done.tables["accuracy"]["after"]).all()
    assert (gates["fail"] == gates["policy_fail"]).all(), "the floor is far below every limit"


def test_a_callable_is_checked_by_behaviour_alone() -> None:
    model = opened()
    done = quick(model, in_other_batches(model), many(), budget=LARGE)
    assert not {"tensors", "hygiene", "tokens", "exposure", "controls", "cast", "exposure_kl"} & set(done.tables)
    assert {"answers", "facts", "locality", "strata", "worst", "texts", "choices", "noise", "cost"} <= set(done.tables)
    assert done.manifest["edit"].startswith("behaviour only")
    assert done.manifest["edit_hash"] == "not applicable"
    assert not {"cast cosine", "efficacy / random control"} & set(states(done))
    assert states(done)["efficacy: new above old"] == ("PASS" if done.tables["answers"]["above_before"][0] else "FAIL")


def test_what_a_callable_breaks_is_found() -> None:
    model = opened()
    done = quick(model, scripted(model, dict.fromkeys(range(97), ID[" Rome"])), many(), budget=LARGE)
    found = states(done)
    assert found["efficacy: free decoding"] == "PASS"
    assert {name for name, state in found.items() if state == "FAIL"} >= {*LOCALITY, "kl: edit prepended"}
    assert done.verdict == "FAIL"
    assert (done.tables["generated"]["after"].str.startswith(" Rome Rome")).all()
    assert done.tables["generation"]["distinct_1_after"].max() <= 1 / 6 + 1e-9


# --- traps ------------------------------------------------------------------------------------------------


def test_trap_1_a_model_that_was_edited_elsewhere_is_gated_with_intervals_and_a_verdict(tmp_path: Any) -> None:
    model = opened()
    edit = a_row(model, 100.0)
    with edit.applied(model) as edited:
        module = edited.module
        done = quick(model, module)
        module.save_pretrained(tmp_path / "edited")
    again = quick(model, tmp_path / "edited")
    mine = quick(model, edit)
    assert done.verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    for other in (again, mine):
        same_table(done.gates, other.gates, atol=1e-6)
        same_table(done.tables["locality"], other.tables["locality"], atol=1e-9)
    assert {"low", "high", "n", "n_unit", "protocol", "unit", "direction"} <= set(done.gates)


def test_trap_3_the_edit_prepended_stratum_is_always_there_for_a_built_in_rewrite() -> None:
    asked = rs.probes(rs.rewrite("The capital of France is", " Rome"))
    table = asked.table
    assert (table["stratum"] == "edit prepended").sum() >= 5
    prepended = table[table["stratum"] == "edit prepended"]["text"]
    assert prepended.str.contains("The capital of France is Rome").all()
    assert {"same relation", "same subject", "edit prepended"} <= set(table["stratum"])


def test_trap_3_damage_that_shows_only_behind_the_edit_sentence_fails_its_gate() -> None:
    model = opened()
    rome = ID[" Rome"]

    def bleeding(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model.module(ids).logits.clone()
        seen = ((ids == rome).cumsum(-1) > 0) & ((ids == ID[" capital"]).cumsum(-1) > 0)
        out[..., rome] += 60.0 * seen
        return out

    near = [Probe("locality", some(20 + i, 22 + i), "France", "same relation", target=" Lyon", old=" Rome")
            for i in range(12)]  # fmt: skip
    behind = [Probe("locality", f"{FACT.text} Rome w{30 + i} w{40 + i}", "France", "edit prepended", target=" Lyon",
                    old=" Rome") for i in range(12)]  # fmt: skip
    done = quick(model, bleeding, [*near, *behind], budget=LARGE)
    assert states(done)["kl: neighbourhood"] == "PASS"
    assert states(done)["kl: edit prepended"] == "FAIL"
    strata = done.tables["strata"].set_index("stratum")
    assert strata.loc["same relation", "success_after"] == strata.loc["same relation", "success_before"]
    assert strata.loc["edit prepended", "success_after"] == 0.0 < strata.loc["edit prepended", "success_before"]


def test_trap_5_an_edit_that_changes_no_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    monkeypatch.setattr(validating, "ask_all", lambda q: pytest.fail("no forward may run"))
    empty = a_row(model, 50.0) * 0.0
    for nothing in (empty, Edit(()), [a_row(model, 5.0), a_row(model, 5.0).inverse]):
        with pytest.raises(ArgumentError, match="must change some weight"):
            quick(model, nothing)
    with pytest.raises(ArgumentError, match="no weight differs"):
        quick(model, rs.load(sharp(), tokenizer=words()))
    with pytest.raises(ArgumentError, match="no weight differs"):
        quick(model, model.module)


def test_trap_5_an_edit_of_another_base_is_refused() -> None:
    model, edit = opened(), a_row(opened(), 50.0)
    other = sharp()
    with torch.no_grad():
        other.gpt_neox.layers[1].mlp.dense_4h_to_h.weight += 0.01
    with pytest.raises(StaleRecordingError, match="other weights"):
        quick(rs.load(other, tokenizer=words()), edit)
    with pytest.raises(ArgumentError, match="does not have"):
        quick(opened("llama"), edit)
    assert quick(model, edit).manifest["fingerprint"] == model.fingerprint()


def test_trap_5_no_edit_leaks_into_the_next_validation() -> None:
    first, second = (a_row(opened(), 150.0, neuron=n) for n in (3, 8))
    a1, b1 = quick(opened(), first), quick(opened(), second)
    fresh = rs.load(sharp(), tokenizer=words())
    b2, a2 = quick(fresh, second), quick(fresh, first)
    for one, two in ((a1, a2), (b1, b2)):
        same_table(one.gates, two.gates)
        for name in ("answers", "locality", "texts", "choices", "controls", "worst", "noise"):
            same_table(one.tables[name], two.tables[name])
    assert not a1.tables["locality"]["kl"].equals(b1.tables["locality"]["kl"])


def test_trap_5_locality_is_never_measured_against_an_edited_base() -> None:
    model = rs.load(sharp(), tokenizer=words())
    edit = a_row(model, 150.0)
    before = quick(model, edit)
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    with torch.no_grad():
        tensors_of(model.module)[name].data += 0.5  # behind every counter's back
    after = quick(model, edit)
    assert after.manifest["fingerprint"] != before.manifest["fingerprint"]
    assert after.manifest["remembered"]["asked"] == before.manifest["remembered"]["asked"]
    with edit.applied(model) as edited:
        for p, row in zip(probes()[2:5], after.tables["locality"].to_dict("records"), strict=False):
            ids = torch.tensor([model.tokenizer.encode(p.text)])
            with torch.no_grad():
                x, y = (torch.log_softmax(m.module(ids).logits[0, -1], -1) for m in (model, edited))
            assert row["kl"] == pytest.approx(float((x.exp() * (x - y)).sum()), rel=1e-6)
    with edit.applied(model) as edited:
        on_top = quick(edited, a_row(edited, 50.0, neuron=9))
        assert on_top.manifest["fingerprint"] == edited.fingerprint() != after.manifest["fingerprint"]


def test_trap_5_hygiene_stands_in_every_report() -> None:
    hygiene = quick(opened(), a_row(opened(), 50.0)).tables["hygiene"]
    assert hygiene["ok"].all()
    for said in ("differs from base", "untouched", "rolls back bit-exactly", "save and load"):
        assert hygiene["check"].str.contains(said).any(), said


def test_trap_6_a_change_that_bfloat16_swallows_fails_its_gate() -> None:
    model = opened()
    edit = a_row(model, 50.0)
    size = edit.changes[0].norm() / float(tensors_of(model.module)[edit.changes[0].name].detach().norm())
    tiny_one = edit * (1e-5 / size)
    assert tiny_one.changes[0].norm() > 0
    done = quick(model, tiny_one)
    row = done.gates.set_index("gate").loc["cast cosine"]
    assert row["state"] == "FAIL"
    assert row["value"] < 0.9
    assert done.verdict == "FAIL"
    big = quick(model, edit).gates.set_index("gate").loc["cast cosine"]
    assert big["state"] == "PASS"
    assert big["value"] > 0.98


def test_trap_9_matched_controls_stand_in_every_report() -> None:
    model = opened()
    edit = a_row(model, 300.0)
    done = quick(model, edit)
    controls = done.tables["controls"]
    counts = controls["control"].value_counts()
    assert counts["random site"] >= 5
    assert counts["random direction"] >= 1
    assert counts["the edit"] == 1
    assert controls["kl"].notna().all()
    assert controls["effect"].notna().all()
    row = done.gates.set_index("gate").loc["efficacy / random control"]
    own = controls.loc[controls["control"] == "the edit", "effect"].item()
    beside = controls.loc[controls["control"] != "the edit", "effect"].abs().mean()
    assert row["value"] == pytest.approx(own / beside, rel=1e-9)
    assert own == pytest.approx(done.tables["answers"].loc[0, "new_change"], rel=1e-9)
    ratios = done.tables["control_ratios"].set_index(["figure", "control"])
    for (figure, kind), row in ratios.iterrows():
        beside = controls.loc[controls["control"] == kind, figure].abs().mean()
        assert row["ratio"] == pytest.approx(controls.loc[0, figure] / beside)


@pytest.mark.parametrize("axis", ["efficacy", "locality"])
def test_controls_stand_also_where_only_effects_or_only_divergences_can_be_asked(axis: str) -> None:
    done = quick(opened(), a_row(opened(), 100.0), [p for p in probes() if p.axis == axis])
    controls = done.tables["controls"]
    assert len(controls) == 7
    assert controls["effect"].notna().all() == (axis == "efficacy") != controls["kl"].notna().all()


def test_trap_10_a_single_edits_intervals_are_labelled_as_over_its_prompts() -> None:
    done = quick(opened(), a_row(opened(), 100.0), many(), budget=LARGE)
    units = done.gates.set_index("gate")["n_unit"]
    assert units["kl: neighbourhood"] == units["kl: edit prepended"] == "prompts of one edit"
    assert units["kl: unrelated text"] == units["perplexity drift"] == "documents"
    assert units["cast cosine"] == units["efficacy: free decoding"] == "edit"


def test_trap_11_a_bos_changes_what_is_asked_and_is_asked_once() -> None:
    plain, bos = opened(), opened(bos=True)
    assert plain.fingerprint() == bos.fingerprint()
    edit = a_row(plain, 100.0)
    one, two = quick(plain, edit), quick(bos, edit)
    assert two.manifest["remembered"]["asked"] == one.manifest["remembered"]["asked"], "nothing is taken for the other"
    assert (one.tables["texts"]["tokens"] + 1).tolist() == two.tables["texts"]["tokens"].tolist()
    assert not np.allclose(one.tables["answers"]["new_log_prob_before"], two.tables["answers"]["new_log_prob_before"])
    with torch.no_grad():
        p = torch.log_softmax(bos.module(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0, -1], -1)
    assert two.tables["answers"].loc[0, "new_log_prob_before"] == pytest.approx(float(p[ID[" Rome"]]), rel=1e-9)


# --- forms, seeds, memory ---------------------------------------------------------------------------------


def test_weights_and_operations_give_the_same_tables() -> None:
    model = opened("llama")
    pair = [rs.edit_coefficients(model, "L1.N0:12", 0.0, baked=baked, rewrites=[FACT]) for baked in (True, False)]
    baked, inside = (quick(model, one) for one in pair)
    for name in ("answers", "facts", "texts", "choices", "accuracy", "generation", "generated", "noise"):
        same_table(baked.tables[name], inside.tables[name], atol=1e-6)
    mine = baked.tables["locality"]
    kept = mine[~mine["criterion"].str.contains("exposure")].reset_index(drop=True)
    same_table(kept, inside.tables["locality"], atol=1e-8)
    shared = set(states(inside))
    assert set(states(baked)) - shared == {"cast cosine", "efficacy / random control"}
    assert {k: v for k, v in states(baked).items() if k in shared} == states(inside)


def test_the_same_seed_gives_the_same_report_but_for_seconds() -> None:
    model = opened()
    edit = a_row(model, 120.0)
    one, two = quick(model, edit, seed=3), quick(model, edit, seed=3)
    same_table(one.gates, two.gates)
    assert set(one.tables) == set(two.tables)
    for name in one.tables:
        same_table(*(t.tables[name].drop(columns="seconds", errors="ignore") for t in (one, two)))
    assert two.manifest["remembered"]["asked"] == 0 < one.manifest["remembered"]["asked"], "the second run remembers"
    assert {k: v for k, v in one.manifest.items() if k != "remembered"} == {
        k: v for k, v in two.manifest.items() if k != "remembered"
    }
    other = quick(model, edit, seed=4)
    assert not other.tables["controls"]["kl"].equals(one.tables["controls"]["kl"])
    assert json.loads(one.to_json())["verdict"] == one.verdict


def test_what_each_axis_cost_is_told() -> None:
    model = opened()
    asked = [*probes()[:2], *(Probe("choice", some(70), target=" Paris", wrong=(" Rome",)) for _ in range(1))]
    cost = quick(model, a_row(model, 50.0), asked).tables["cost"].set_index("axis")
    # two prompts of 5 and 4 tokens with two one-token answers each, both models; 1 + 3 tokens decoded behind each
    assert cost.loc["efficacy and paraphrase", "tokens"] == 2 * (2 * 6 + 2 * 5) + 2 * 2 * 4
    assert cost.loc["capability", "tokens"] == 2 * 2 * 3
    assert cost.loc["efficacy and paraphrase", "probes"] == 2
    assert (cost["seconds"] > 0).all()


def test_ripple_rates_name_criteria_of_which_no_test_was_executed() -> None:
    model = opened()
    never = ((some(12), " w95"),)
    asked = [*probes(), Probe("ripple", some(20), "France", criterion="one hop", target=" Rome", conditions=never),
             Probe("ripple", some(21), "France", criterion="free", target=" Rome")]  # fmt: skip
    rates = quick(model, a_row(model, 50.0), asked).tables["ripple_rates"].set_index("criterion")
    assert rates["tests"].to_dict() == {"one hop": 1, "free": 1}
    assert rates["executed"].to_dict() == {"one hop": 0, "free": 1}
    assert np.isnan(rates.loc["one hop", "passed_after"])
    assert rates.loc["free", "passed_before"] in (0.0, 1.0)


def test_an_erasing_edit_is_judged_by_the_drop_and_who_replaced_it() -> None:
    model = opened()
    asked = [Probe("efficacy", "The capital of France is", "France", old=" Paris"), *probes()[2:]]
    paris = rs.edit_value_rows(model, "L1.N3", add=-300.0 * np.ones(24))
    done = quick(model, paris, asked)
    answers = done.tables["answers"].iloc[0]
    gates = done.gates.set_index("gate")
    assert gates.loc["efficacy: old answer dropped", "value"] == pytest.approx(answers["old_change"])
    assert "efficacy: new above old" not in gates.index
    assert isinstance(answers["first_after"], str)
    assert answers["first_after"]
    assert answers["said_after"].startswith(answers["first_after"])
    both = [*asked, Probe("efficacy", some(20, 21), "other", target=" Rome", old=" Lyon")]
    for given in (asked, both):
        fact = quick(model, paris, given).tables["facts"].set_index("fact")
        assert fact.loc["France", "replaced_by"] == answers["first_after"]
    assert pd.isna(fact.loc["other", "replaced_by"])


def test_general_probes_fill_the_axes_that_were_not_given() -> None:
    model = opened()
    few = Budget("few", 2, 2, 2, 2, 1, 60, 2, 12, 2, 1, 2, 1, 1, 2)
    done = quick(model, a_row(model, 50.0), probes()[:2], general=True, budget=few)
    assert {"locality", "texts", "choices", "generation"} <= set(done.tables)
    assert done.tables["locality"]["stratum"].eq("unrelated").any()


# --- bad calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"edit": None}, ArgumentError, "`edit` must be an Edit, a list of them, an edited model"),
        ({"edit": 3}, ArgumentError, "`edit` must be an Edit"),
        ({"probes": []}, ArgumentError, "`probes` must hold some of efficacy"),
        ({"probes": [Probe("generation", "The w20")]}, ArgumentError, "`probes` must hold some of efficacy"),
        ({"probes": ["The capital"]}, PromptError, "rs.Probe"),
        ({"probes": [Probe("efficacy", "The w20", "f")]}, PromptError, "must name a target, an old answer or both"),
        ({"probes": [Probe("paraphrase", "The w20", "f")]}, PromptError, "must name a target, an old answer or both"),
        ({"probes": [Probe("text", "The")]}, PromptError, "must have two tokens at least"),
        ({"budget": "large"}, ArgumentError, "`budget` must be one of smoke, standard, full"),
        ({"policy": {"kl: everything": (0.1, 0.2)}}, ArgumentError, "kl: everything"),
        ({"model": "gpt2"}, ArgumentError, "model"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_bad_calls_are_refused_before_any_forward(
    given: dict[str, Any], error: type, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened()
    edit = a_row(model, 50.0)
    for name in ("audit", "exposure", "ask_all"):
        monkeypatch.setattr(validating, name, lambda *_, **__: pytest.fail("no forward may run"))
    call = {"model": model, "edit": edit, "probes": probes(), "budget": SMALL, "general": False, "progress": False}
    call |= given
    with pytest.raises(error, match=said):
        rs.validate(call.pop("model"), call.pop("edit"), call.pop("probes"), **call)


def test_a_model_without_a_tokenizer_is_refused() -> None:
    bare = rs.load(sharp())
    with pytest.raises(ArgumentError, match="opened without a tokenizer"):
        quick(bare, rs.edit_coefficients(bare, "L1.N3", 0.0))


# --- what is left as it was ---------------------------------------------------------------------------------


def picture(module: Any) -> tuple[Any, ...]:
    """Bytes, addresses, modes, hooks, settings and the state of every generator of random numbers."""
    tensors = {k: (t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for k, t in module.state_dict(
        keep_vars=True).items()}  # fmt: skip
    modes = [(name, sub.training, len(sub._forward_hooks), len(sub._forward_pre_hooks), len(sub._backward_hooks),
              "forward" in sub.__dict__) for name, sub in module.named_modules()]  # fmt: skip
    config = (module.config.to_json_string(), module.generation_config.to_json_string())
    state = np.random.get_state()
    return tensors, modes, config, torch.get_rng_state(), (state[1].tolist(), state[2]), torch.is_grad_enabled()


def assert_untouched(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[0].keys() == after[0].keys()
    for name, (place, counter, grad, value) in before[0].items():
        assert (place, counter, grad) == after[0][name][:3], name
        assert torch.equal(value, after[0][name][3]), name
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert before[4:] == after[4:]


@pytest.fixture
def users() -> Iterator[Any]:
    """A model of the user's own: in training mode, with a hook."""
    module = sharp()
    model = rs.load(module, tokenizer=words())
    module.train()
    handle = module.gpt_neox.layers[0].register_forward_hook(lambda *_: None)
    yield model, module
    handle.remove()


def test_a_validation_leaves_the_users_model_as_it_was(users: Any) -> None:
    model, module = users
    edit = a_row(model, 100.0)
    before = picture(module)
    quick(model, edit)
    quick(model, [edit])
    quick(model, rs.edit_coefficients(model, "L1.N3", 0.0, baked=False))
    assert_untouched(before, picture(module))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["audit", "exposure", "ask_all", "ask_stream", "exposed_and_measured",
                                   "control_edits", "divergence_on", "cast_survival", "judge"])  # fmt: skip
def test_also_after_an_exception_in_any_stage(
    users: Any, stage: str, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, module = users
    edit = a_row(model, 100.0)
    before, right = picture(module), quick(opened(), edit)

    def failing(*_: Any, **__: Any) -> Any:
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(validating, stage, failing)
        with pytest.raises(error, match="in the middle"):
            quick(model, [edit] if stage == "ask_stream" else edit)
    assert_untouched(before, picture(module))
    again = quick(model, edit)
    same_table(again.gates, right.gates)


def test_also_when_a_users_function_breaks_off(users: Any) -> None:
    model, module = users
    before, calls = picture(module), []

    def function(ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return torch.zeros(*ids.shape, 97)

    with pytest.raises(KeyboardInterrupt):
        quick(model, function)
    assert_untouched(before, picture(module))


def test_an_edited_model_is_gone_after_its_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    held = []
    right = validating._subject

    def spied(*given: Any) -> Any:
        manager = right(*given)

        class Held:
            def __enter__(self) -> Any:
                held.append(manager.__enter__())
                return held[0]

            def __exit__(self, *error: Any) -> Any:
                return manager.__exit__(*error)

        return Held()

    monkeypatch.setattr(validating, "_subject", spied)
    quick(model, a_row(model, 100.0))
    with pytest.raises(rs.InterventionError, match="was left"):
        held[0].logits(torch.tensor([[2, 3]]), [1])


# --- changes of other kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["embedding row", "unembedding rows", "final norm", "every layer"])
def test_edits_of_any_tensor_are_validated(where: str) -> None:
    model = opened("llama" if where in ("embedding row", "every layer") else "gpt_neox")
    held = tensors_of(model.module)

    def rows(name: str, at: list[int], tied: tuple[str, ...] = ()) -> Rows:
        shape = tuple(held[name].shape)
        return Rows(name, tied, shape, (0,), torch.tensor(at)[:, None], torch.randn(len(at), *shape[1:]).double())

    unembed = model.path(None, "unembed") + ".weight"
    changes = {
        "embedding row": lambda: [rows("model.embed_tokens.weight", [20], ("lm_head.weight",))],
        "unembedding rows": lambda: [rows(unembed, [8, 9])],
        "final norm": lambda: [rows("gpt_neox.final_layer_norm.weight", list(range(24)))],
        "every layer": lambda: [
            LowRank(DOWN.format(i), (), (24, 40), (), torch.randn(24, 1).double(), torch.randn(1, 40).double())
            for i in range(3)
        ],
    }[where]()
    edit = new_edit(model, changes, method="by hand", rewrites=[FACT])
    done = quick(model, edit)
    with edit.applied(model) as edited:
        for p, row in zip([p for p in probes() if p.axis == "locality"], done.tables["locality"].to_dict("records"),
                          strict=False):  # fmt: skip
            ids = torch.tensor([model.tokenizer.encode(p.text)])
            with torch.no_grad():
                x, y = (torch.log_softmax(m.module(ids).logits[0], -1) for m in (model, edited))
            kl = (x.exp() * (x - y)).sum(-1)
            assert row["kl"] == pytest.approx(float(kl[-1] if p.target else kl.mean()), rel=1e-6, abs=1e-12)
    assert len(done.tables["controls"]) == 7


# --- the embedded model -----------------------------------------------------------------------------------------


@pytest.mark.real
def test_zeroing_a_whole_layer_of_the_real_model_fails_with_the_right_gates(smollm2: Any) -> None:
    done = rs.validate(smollm2, rs.edit_coefficients(smollm2, "L29.mlp", 0.0), budget=TINY_REAL, progress=False)
    assert done.verdict == "FAIL"
    failed = {name for name, state in states(done).items() if state == "FAIL"}
    assert failed >= {"kl: unrelated text", "top-1 flips: unrelated text", "perplexity drift"}
    gates = done.gates.set_index("gate")
    assert gates.loc["kl: unrelated text", "value"] > 0.2
    assert gates.loc["cast cosine", "state"] == "PASS", "zeroing survives every cast"
    assert done.tables["hygiene"]["ok"].all()
    assert done.tables["worst"]["kl_max"].is_monotonic_decreasing
    assert done.exit_code == 1


@pytest.mark.real
def test_the_real_model_in_other_batches_passes_the_locality_gates(smollm2: Any) -> None:
    rewrite = rs.rewrite("The capital of France is", " Rome")
    asked = [p for p in rs.probes(rewrite) if p.axis == "locality"]
    assert sum(p.stratum == "edit prepended" for p in asked) >= 5
    done = rs.validate(smollm2, in_other_batches(smollm2), asked, budget=TINY_REAL, progress=False)
    gates = done.gates.set_index("gate")
    for name in ("kl: neighbourhood", "kl: edit prepended", "kl: unrelated text", "perplexity drift"):
        assert gates.loc[name, "state"] == "PASS", name
        assert abs(gates.loc[name, "value"]) < 1e-4
    assert done.verdict != "FAIL"

"""Controls of a validation: nothing, random directions, random places; budgets and the clock."""

import itertools
import math
import time
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from validation_cases import DOWN, SMALL, a_row, opened, probes, some

import resid_surgery as rs
from resid_surgery.editing.asking import divergence_on, effects_on
from resid_surgery.editing.budgets import BUDGETS, Budget, Clock, budget_of, spread, thinned
from resid_surgery.editing.changes import Dense, LowRank, Rows
from resid_surgery.editing.controls import NullSubject, control_edits, random_direction, random_site
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.probes import Probe, probe_set
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.running import Passage, WeightsSubject, compared
from resid_surgery.errors import ArgumentError
from resid_surgery.models.replacing import tensors_of

SEEDS = range(6)


def made(model: Any, kind: str) -> Edit:
    """An edit of each kind of change, at layer 1."""
    name, rng = DOWN.format(1), torch.Generator().manual_seed(1234)
    shape = tuple(tensors_of(model.module)[name].shape)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    change = {
        "rows": Rows(name, (), shape, (1,), torch.tensor([[3], [7], [11]]), numbers(3, shape[0])),
        "rank one": LowRank(name, (), shape, (), numbers(shape[0], 1), numbers(1, shape[1])),
        "rank two": LowRank(name, (), shape, (), numbers(shape[0], 2), numbers(2, shape[1])),
        "dense": Dense(name, (), shape, numbers(*shape)),
    }[kind]
    return new_edit(model, [change], method="drawn")


KINDS = ("rows", "rank one", "rank two", "dense")


@pytest.mark.parametrize("kind", KINDS)
def test_trap_9_random_directions_have_the_same_norm_kind_and_place(kind: str) -> None:
    model = opened("llama")
    edit = made(model, kind)
    (one,) = edit.changes
    drawn = [random_direction(model, edit, seed).changes for seed in SEEDS]
    for (other,) in drawn:
        assert (type(other), other.name, other.shape) == (type(one), one.name, one.shape)
        assert other.norm() == pytest.approx(one.norm(), rel=1e-5)
        cosine = float((other.dense() * one.dense()).sum()) / one.norm() ** 2
        assert abs(cosine) < 0.9, "another direction"
    assert len({round(float(other.dense().sum()), 9) for (other,) in drawn}) == len(SEEDS)
    (again,) = random_direction(model, edit, 0).changes
    assert torch.equal(again.dense(), drawn[0][0].dense())


def test_random_directions_of_rows_keep_each_rows_norm_and_place() -> None:
    model = opened("llama")
    (one,) = made(model, "rows").changes
    (other,) = random_direction(model, made(model, "rows"), 1).changes
    assert isinstance(one, Rows)
    assert isinstance(other, Rows)
    assert torch.equal(one.index, other.index)
    assert torch.allclose(one.delta.norm(dim=1), other.delta.norm(dim=1))


def test_trap_9_random_sites_of_rows_are_other_neurons_of_the_layer() -> None:
    model = opened("llama")
    edit = made(model, "rows")
    (one,) = edit.changes
    assert isinstance(one, Rows)
    for seed in SEEDS:
        (other,) = random_site(model, edit, seed).changes
        assert isinstance(other, Rows)
        assert other.name == one.name
        assert torch.equal(other.delta, one.delta), "the same change"
        assert not set(other.index.flatten().tolist()) & {3, 7, 11}
        assert len(set(other.index.flatten().tolist())) == 3


@pytest.mark.parametrize("kind", ["rank one", "rank two", "dense"])
def test_trap_9_random_sites_of_a_matrix_are_the_same_matrix_of_other_layers(kind: str) -> None:
    model = opened("llama")
    edit = made(model, kind)
    names = set()
    for seed in range(12):
        control = random_site(model, edit, seed)
        (other,) = control.changes
        assert torch.equal(other.dense(), edit.changes[0].dense())
        names.add(other.name)
        with control.applied(model) as edited:  # its own hashes fit
            assert edited.replaced == (other.name,)
    assert names == {DOWN.format(0), DOWN.format(2)}


def test_an_edit_of_every_layer_has_its_inputs_shuffled_instead() -> None:
    model = opened("llama")
    shape = tuple(tensors_of(model.module)[DOWN.format(0)].shape)
    left, right = torch.randn(shape[0], 1).double(), torch.randn(1, shape[1]).double()
    edit = new_edit(model, [LowRank(DOWN.format(i), (), shape, (), left, right) for i in range(3)], method="all")
    control = random_site(model, edit, 0)
    assert set(control.tensors) == set(edit.tensors)
    for one, other in zip(edit.changes, control.changes, strict=True):
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        assert torch.equal(one.left, other.left)
        assert sorted(one.right.flatten().tolist()) == sorted(other.right.flatten().tolist())
        assert not torch.equal(one.right, other.right)


def test_two_matrices_move_to_two_different_layers() -> None:
    model = opened("llama")
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    held = tensors_of(model.module)
    edit = new_edit(model, [Dense(n, (), tuple(held[n].shape), torch.randn(held[n].shape)) for n in names], method="x")
    for seed in SEEDS:
        control = random_site(model, edit, seed)
        assert not set(control.tensors) & set(names)
        assert len(set(control.tensors)) == 2
        assert {name.split(".", 3)[3] for name in control.tensors} == {name.split(".", 3)[3] for name in names}


def test_trap_9_a_scaling_elsewhere_scales_what_stands_there() -> None:
    model = opened("llama")
    held = tensors_of(model.module)[DOWN.format(1)].detach().double()
    edit = rs.edit_coefficients(model, ["L1.N3", "L1.N7"], [0.0, 3.0])
    for seed in SEEDS:
        (other,) = random_site(model, edit, seed).changes
        assert isinstance(other, Rows)
        assert not set(other.index.flatten().tolist()) & {3, 7}
        factors = [float((d / held[:, i]).mean()) for i, d in zip(other.index[:, 0].tolist(), other.delta, strict=True)]
        assert sorted(factors) == pytest.approx([-1.0, 2.0]), "factor - 1, of the neuron that stands there"
    whole = rs.edit_coefficients(model, "L1.mlp", 0.0)
    control = random_site(model, whole, 0)
    moved = [one for one in control.changes if "weight" in one.name]
    assert moved
    assert all("layers.1." not in one.name for one in control.changes)
    for one in moved:
        assert torch.allclose(one.dense(), -tensors_of(model.module)[one.name].double()), "that layer is zeroed instead"


def test_there_are_as_many_controls_as_asked_for_five_sites_at_least_in_every_budget() -> None:
    model = opened("llama")
    found = control_edits(model, made(model, "rows"), sites=5, directions=2, seed=4)
    assert [kind for kind, _ in found] == ["random site"] * 5 + ["random direction"] * 2
    assert len({edit.hash for _, edit in found}) == 7
    again = control_edits(model, made(model, "rows"), sites=5, directions=2, seed=4)
    assert [e.hash for _, e in again] == [e.hash for _, e in found]
    other = control_edits(model, made(model, "rows"), sites=5, directions=2, seed=5)
    assert not {e.hash for _, e in other} & {e.hash for _, e in found}
    assert all(one.sites >= 5 and one.directions >= 1 for one in BUDGETS.values())


def test_interventions_have_no_random_counterpart() -> None:
    model = opened("llama")
    with pytest.raises(ArgumentError, match="works by interventions"):
        control_edits(model, rs.edit_coefficients(model, "L1.N3", 0.0, baked=False), sites=1, directions=1)


def test_the_null_control_is_the_base_in_other_batches() -> None:
    model = opened("llama", torch.float32)
    rows = [Passage((2, *range(20 + i, 30 + i)), (3, 10)) for i in range(6)]
    found = compared(WeightsSubject(model, "base"), [NullSubject(model)], rows)[0]
    assert max(float(one.kl.abs().max()) for one in found) < 1e-6
    ids = torch.tensor([one.ids for one in rows])
    assert torch.allclose(NullSubject(model).logits(ids, [3]), WeightsSubject(model, "b").logits(ids, [3]), atol=1e-4)
    assert NullSubject(model).continued(ids, 4) == WeightsSubject(model, "b").continued(ids, 4)


def test_effects_are_of_the_new_answer_or_the_drop_of_the_old_one() -> None:
    model = opened("llama")
    base = Remembered(model, keep=False)
    with a_row(model, 300.0).applied(model) as edited:
        subject = WeightsSubject(edited, "e")
        up, down, either = effects_on(
            base, subject, [Probe("efficacy", some(12), target=" Rome"), Probe("efficacy", some(12), old=" Rome"),
                            Probe("efficacy", some(12), target=" Rome", old=" Paris")])  # fmt: skip
        with torch.no_grad():
            p = [torch.log_softmax(m.module(torch.tensor([[2, 12]])).logits[0, -1], -1)[8] for m in (model, edited)]
        assert up == either == pytest.approx(float(p[1] - p[0]), rel=1e-9)
        assert down == pytest.approx(-up)
        near = [Probe("locality", some(12), "f", "same relation", target=" Lyon"),
                Probe("locality", some(13, 14), stratum="unrelated")]  # fmt: skip
        (kl,) = divergence_on(base, [subject], near)
        rows = [Passage((2, 12), (1,)), Passage((2, 13, 14), (0, 1, 2))]
        found = compared(base.subject, [subject], rows)[0]
        assert kl == pytest.approx(float(torch.cat([one.kl for one in found]).mean()))


# --- budgets -----------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.none() | st.integers(0, 70))
def test_spread_keeps_order_and_takes_evenly(n: int, most: int | None) -> None:
    kept = spread(range(n), most)
    assert len(kept) == (n if most is None else min(n, most))
    assert kept == sorted(set(kept))
    if kept and most is not None and most < n:
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert kept[0] == 0
        assert kept[-1] >= n - math.ceil(n / most), "to the end"
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_thinning_is_by_fact_and_stratum_and_leaves_efficacy_whole() -> None:
    made = [Probe("efficacy", some(i), f"fact {i % 3}", target=" Rome") for i in range(12)]
    made += [Probe("paraphrase", some(i, 1), f"fact {i % 3}", target=" Rome") for i in range(12, 42)]
    made += [Probe("locality", some(i, 2), f"fact {i % 3}", s, target=" Rome") for i in range(12, 42)
             for s in ("same relation", "edit prepended")]  # fmt: skip
    made += [Probe("locality", some(i, 3), stratum="unrelated") for i in range(12, 72)]
    made += [Probe("locality", some(i, 4), stratum="high exposure") for i in range(12, 32)]
    made += [Probe("text", some(i, 5)) for i in range(12, 72)]
    made += [Probe("choice", some(i, 6), target=" Rome", wrong=(" Lyon",)) for i in range(12, 72)]
    few = thinned(probe_set(made, "n"), SMALL)
    table = few.table
    counts = table.groupby(["axis", "stratum", "fact"]).size()
    assert counts["efficacy"].sum() == 12
    assert counts["paraphrase"].tolist() == [SMALL.paraphrases] * 3
    assert counts["locality", "same relation"].tolist() == [SMALL.neighbours] * 3
    assert counts["locality", "edit prepended"].tolist() == [SMALL.neighbours] * 3
    assert counts["locality", "unrelated"].sum() == SMALL.unrelated
    assert counts["locality", "high exposure"].sum() == 20, "exposed contexts were chosen already"
    assert counts["text"].sum() == SMALL.texts
    assert counts["choice"].sum() == SMALL.choices
    assert [p for p in made if p in set(few)] == list(few), "in order"
    assert list(thinned(probe_set(made), BUDGETS["full"]))[:12] == made[:12]


@pytest.mark.parametrize("name", ["smok", None, 3, "Smoke"])
def test_an_unknown_budget_is_refused(name: Any) -> None:
    with pytest.raises(ArgumentError, match="`budget` must be one of"):
        budget_of(name)


def test_a_budget_of_ones_own_is_checked() -> None:
    assert budget_of("smoke") is BUDGETS["smoke"]
    assert budget_of(SMALL) is SMALL
    good = dict(name="x", paraphrases=1, ripples=1, neighbours=1, unrelated=1, exposed=0, exposure_tokens=9, texts=1,
                text_tokens=9, choices=1, generations=1, generated=4, sites=5, directions=1, worst=1)  # fmt: skip
    Budget(**good)
    Budget(**good | {"paraphrases": None, "texts": 0})
    for wrong in ({"texts": -1}, {"texts": 1.5}, {"exposed": None}, {"text_tokens": 0}, {"sites": 0, "directions": 0}):
        with pytest.raises(ArgumentError):
            Budget(**good | wrong)


def test_the_clock_has_a_row_a_part_with_what_it_cost() -> None:
    clock = Clock()
    with clock.part("first", 3, 7):
        time.sleep(0.02)
    with clock.part("second", 1) as cost:
        cost["tokens"] = 42
    with pytest.raises(KeyError), clock.part("failed", 1):
        raise KeyError("no")
    table = clock.table()
    assert table[["axis", "probes", "tokens"]].values.tolist() == [["first", 3, 7], ["second", 1, 42]]
    assert table["seconds"][0] >= 0.02 > table["seconds"][1] >= 0
    assert list(Clock().table()) == ["axis", "probes", "tokens", "seconds"]
    assert isinstance(table, pd.DataFrame)


def test_the_small_probes_hold_every_axis_that_gates_judge() -> None:
    assert {p.axis for p in probes()} >= {"efficacy", "paraphrase", "locality", "text", "choice"}

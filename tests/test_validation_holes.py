"""What a review found: harm or silence that once slipped through a validation."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_comparing import own_cache  # noqa: F401  (a fixture)
from validation_cases import ID, a_row, opened, quick, sharp, some, words

import resid_surgery as rs
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.controls import NullSubject
from resid_surgery.editing.edits import new_edit
from resid_surgery.editing.probes import Probe, ProbeSet
from resid_surgery.errors import ArgumentError, InterventionError
from resid_surgery.models.replacing import tensors_of


def neighbours(n: int, stratum: str = "same relation") -> list[Probe]:
    return [Probe("locality", some(20 + i), f"f{i}", stratum, target=" Lyon", old=" Rome") for i in range(n)]


def test_a_model_that_gives_no_numbers_fails() -> None:
    model = opened()

    def broken(ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, model.vocab_size), float("nan"), dtype=torch.float64)

    gates = quick(model, broken, neighbours(12)).gates.set_index("gate")
    assert gates.loc["kl: neighbourhood", "state"] == "FAIL"
    assert gates.loc["kl: neighbourhood", "value"] == np.inf


def test_without_an_old_answer_an_edit_that_does_nothing_for_its_fact_still_fails() -> None:
    model = opened()
    done = quick(model, a_row(model, 1e-3), [Probe("efficacy", some(12, 13), "a", target=" Rome")])
    assert done.gates.set_index("gate").loc["efficacy: new above old", "state"] == "FAIL"


def test_neighbours_without_a_stratum_are_judged() -> None:
    model = opened()
    edit = rs.edit_coefficients(model, "L0.mlp", 0.0)
    probes = [Probe("locality", some(20 + i), target=" Lyon") for i in range(12)]
    assert "kl: neighbourhood" in set(quick(model, edit, probes).gates["gate"])


def test_two_edits_of_one_fact_can_be_compared() -> None:
    model = opened()
    probes = [Probe("efficacy", some(12, 13), "a", target=" Rome", old=" Paris"), *neighbours(6)]
    one, other = (quick(model, a_row(model, size), probes) for size in (50.0, 80.0))
    assert set(one.gates["gate"]) <= set(rs.diff_reports(one, other)["gate"])


def test_composing_a_tied_change_with_one_of_a_single_path_keeps_both() -> None:
    model = rs.load(sharp("llama", tie_word_embeddings=True), tokenizer=words())
    held = tensors_of(model.module)
    names = [path for path, t in held.items() if t is held["lm_head.weight"]]
    assert len(names) == 2
    shape, width = tuple(held["lm_head.weight"].shape), held["lm_head.weight"].shape[1]

    def row(index: int, name: str, tied: tuple[str, ...]) -> Any:
        change = Rows(name, tied, shape, (0,), torch.tensor([[index]]), torch.ones(1, width, dtype=torch.float64))
        return new_edit(model, [change], method="by hand")

    both, alone = row(3, names[0], (names[1],)), row(5, "lm_head.weight", ())
    for edit in (both + alone, alone + both):
        new = edit.new_tensors(model)
        other = next(name for name in names if name != "lm_head.weight")
        moved = {name: (new[name] != held[name]).any(-1).nonzero().flatten().tolist() for name in names}
        assert moved == {"lm_head.weight": [3, 5], other: [3]}


def test_an_edit_lost_in_rounding_is_refused_as_one_that_changes_nothing() -> None:
    model = opened()
    with pytest.raises(ArgumentError, match="lost in rounding"):
        quick(model, a_row(model, 1.0).scaled(1e-22), neighbours(4))
    with pytest.raises(ArgumentError, match="other than 1"):
        rs.edit_coefficients(model, "L0.N3", 1.0, baked=False)


def test_operations_at_one_position_are_refused_before_any_forward() -> None:
    model = opened()
    edit = rs.edit_coefficients(model, "L0.N3", 0.0, baked=False, positions="target")
    with pytest.raises(ArgumentError, match="positions='all'"):
        quick(model, edit, neighbours(4))


def test_the_null_control_is_no_bit_identical_repeat() -> None:
    model = opened()
    ids = torch.tensor([[ID[" Rome"], 20, 21, 22], [23, 24, 25, 26]])
    seen: list[int] = []
    null = NullSubject(model)
    alone = null._alone.logits
    null._alone.logits = lambda ids, at, stream=None: seen.append(ids.shape[1]) or alone(ids, at)  # type: ignore
    out = null.logits(ids, [1, 3])
    assert min(seen) > ids.shape[1], "tokens behind, which no wanted position can see"
    torch.testing.assert_close(out, alone(ids, [1, 3]), atol=1e-9, rtol=1e-9)


def test_numbers_of_numpy_and_torch_in_settings_can_be_saved(tmp_path: Any) -> None:
    model = opened()
    name, held = "gpt_neox.embed_in.weight", tensors_of(model.module)
    change = Rows(name, (), tuple(held[name].shape), (0,), torch.tensor([[3]]), torch.ones(1, held[name].shape[1]))
    settings = {"seed": np.int64(1), "ridge": torch.tensor(0.5), "signs": np.array([1, -1])}
    edit = new_edit(model, [change], method="by hand", settings=settings)
    assert json.loads(json.dumps(edit.about["settings"])) == {"seed": 1, "ridge": 0.5, "signs": [1, -1]}
    assert rs.Edit.load(edit.save(tmp_path / "e.safetensors")).about["settings"] == dict(edit.about["settings"])


def test_a_closed_handle_runs_nothing() -> None:
    model = opened()
    with a_row(model, 5.0).applied(model) as edited:
        pass
    with pytest.raises(InterventionError, match="was left"):
        edited.module(torch.tensor([[1, 2]]))
    for name in ("get_input_embeddings", "config", "model"):
        with pytest.raises(InterventionError, match="was left"):
            getattr(edited.module, name)
    assert getattr(edited.module, "_nothing", None) is None
    assert "closed" in repr(edited)


def test_what_was_not_asked_is_said() -> None:
    model = opened()
    done = quick(model, a_row(model, 5.0), neighbours(4))
    assert any("perplexity drift" in line for line in done.manifest["not_asked"])
    few = ProbeSet(tuple(neighbours(4)), ignored=("loc_ans: 3",))
    assert "loc_ans: 3" in quick(model, a_row(model, 5.0), few).manifest["not_asked"]


def test_probes_as_a_plain_list_can_be_saved(tmp_path: Any) -> None:
    path = rs.save_probes(tmp_path / "p.jsonl", neighbours(3))
    assert rs.load_probes(path).probes == tuple(neighbours(3))
    assert replace(neighbours(1)[0], fact="g") not in rs.load_probes(path).probes

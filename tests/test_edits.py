"""Edits as values: composed, scaled, kept in a file, applied beside a base whose bytes nobody touches."""

from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import families
from tiny import build, shared

import resid_surgery as rs
from resid_surgery.editing.changes import Dense, LowRank, Rows, summed
from resid_surgery.editing.edits import Edit, new_edit, tensor_hash, tied_paths
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, InterventionError, LoadError, StaleRecordingError
from resid_surgery.models.replacing import tensors_of

IDS = torch.tensor([[5, 4, 3, 2]])


def logits(model):
    with torch.no_grad():
        return model.shadow(IDS).logits


def matrices(model):
    return sorted(n for n, t in tensors_of(model.module).items() if t.ndim == 2 and not tied_paths(model, n))


@st.composite
def changes(draw, model):
    """Any change of a tiny model's matrices, of the size of its weights."""
    name = draw(st.sampled_from(matrices(model)))
    shape, rng = tuple(tensors_of(model.module)[name].shape), torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def numbers(*size):
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    kind = draw(st.sampled_from(["rows", "low_rank", "dense"]))
    if kind == "dense":
        return Dense(name, (), shape, numbers(*shape))
    if kind == "low_rank":
        rank = draw(st.integers(1, 3))
        return LowRank(name, (), shape, (), numbers(shape[0], rank), numbers(rank, shape[1]))
    axes = draw(st.sampled_from([(0,), (1,), (0, 1), (1, 0)]))
    sizes = [shape[a] for a in axes]
    index = draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in sizes)), min_size=1, max_size=4, unique=True))
    rest = [n for a, n in enumerate(shape) if a not in axes]
    return Rows(name, (), shape, axes, torch.tensor(index), numbers(len(index), *rest))


def plainly(change, tensor):
    """tensor + change by a plain loop over elements' slices, without the library's own way of adding."""
    out = tensor.double().clone()
    if isinstance(change, Rows):
        for at, delta in zip(change.index.tolist(), change.delta, strict=True):
            place = [slice(None)] * out.ndim
            for axis, i in zip(change.axes, at, strict=True):
                place[axis] = i
            out[tuple(place)] += delta
        return out
    return out + (change.left @ change.right if isinstance(change, LowRank) else change.delta)


@st.composite
def edits(draw, model, most=3):
    return new_edit(model, draw(st.lists(changes(model), min_size=1, max_size=most)), method="drawn")


def a_row(model, times=1.0, name="model.layers.1.mlp.down_proj.weight", i=3):
    t = tensors_of(model.module)[name]
    return new_edit(model, [Rows(name, (), tuple(t.shape), (1,), torch.tensor([[i]]),
                                 torch.full((1, t.shape[0]), times, dtype=torch.float64))], method="a row")  # fmt: skip


@pytest.mark.parametrize("given", ["x", None, [1], float("nan"), {}, 10**400])
def test_a_multiple_of_an_edit_that_says_of_itself_no_number_is_refused(given):
    edit = replace(a_row(shared("llama")), about={"scaled": given})
    with pytest.raises(rs.ArgumentError, match=r"`about\['scaled'\]` must be a finite number"):
        edit.scaled(2.0)


@given(families, st.data())
def test_what_is_added_is_added_and_nothing_else_moves(family, data):
    model = shared(family)
    edit = data.draw(edits(model))
    wanted = {name: t.detach().double() for name, t in tensors_of(model.module).items()}
    for change in edit.changes:
        wanted[change.name] = plainly(change, wanted[change.name])
    with edit.applied(model) as edited:
        found = tensors_of(edited.module)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.allclose(tensor, wanted[name], atol=1e-12), name
            mine = name in edit.tensors
            assert mine == (tensor.data_ptr() != tensors_of(model.module)[name].data_ptr()), "only these are copied"


@given(families, st.data())
def test_edits_compose_in_any_order_as_sums(family, data):
    model = shared(family)
    a, b = data.draw(edits(model)), data.draw(edits(model))
    ab, ba = a + b, b + a
    for one in {*a.tensors, *b.tensors}:
        parts = [c.dense() for edit in (a, b) for c in edit.changes if c.name == one]
        for both in (ab, ba):
            (change,) = (c for c in both.changes if c.name == one)
            assert torch.allclose(change.dense(), sum(parts), atol=1e-12)
    assert ab.method == "drawn"
    assert [part["method"] for part in (ab + a).about["parts"]] == ["drawn"] * 3
    assert all(float(c.dense().norm()) < 1e-12 for c in (a + a.inverse).changes)


def other_llama():
    """The same sizes, other weights."""
    return rs.load(build("llama", seed=7))


def same_tensors(edited, other):
    found, wanted = tensors_of(edited.module), tensors_of(other.module)
    return all(torch.allclose(found[name], wanted[name], atol=1e-12, rtol=0) for name in wanted)


def test_edits_made_for_other_weights_are_not_added():
    """Each of a sum was made for weights; only one of two that differ could be asked for when it is applied."""
    one, other = a_row(shared("llama")), a_row(other_llama(), i=4)
    (name,) = one.tensors
    for pair in ((one, other), (other, one), (one + one, other), (one, 0.5 * other), (one.inverse, other)):
        with pytest.raises(ArgumentError) as caught:
            pair[0] + pair[1]
        hashes = [edit.expects[name][:8] for edit in pair]
        assert f"of {name} a row was made for {hashes[0]}, a row for {hashes[1]}" in str(caught.value)
    elsewhere = a_row(other_llama(), name="model.layers.0.mlp.down_proj.weight")
    both = one + elsewhere  # no tensor in common: each is asked for its own
    for model in (shared("llama"), other_llama()):
        with pytest.raises(StaleRecordingError, match="made for other weights"), both.applied(model):
            pass
    known_of_none = Edit(other.changes, method="by hand")
    with (one + known_of_none).applied(shared("llama")) as edited:
        assert edited.replaced == (name,)


def test_an_edit_is_added_to_what_it_was_made_on_top_of(tmp_path):
    model = shared("llama")
    a = a_row(model)
    with a.applied(model) as after_a:
        b, beside_b = a_row(after_a, 2.0, i=4), a_row(after_a, 3.0, i=5)
        with b.applied(after_a) as after_both:
            c = a_row(after_both, 4.0, i=6)
            for sum_of_all in ((a + b) + c, a + (b + c), c + (b + a), (c + b) + a, (b + a) + c):
                with sum_of_all.applied(model) as edited, c.applied(after_both) as wanted:
                    assert same_tensors(edited, wanted)
                assert dict(sum_of_all.expects) == dict(a.expects), "a sum is for the weights beneath it"
            with (b + c).applied(after_a) as edited, c.applied(after_both) as wanted:
                assert same_tensors(edited, wanted)
            with pytest.raises(StaleRecordingError, match="made for other weights"), (b + c).applied(model):
                pass
    assert [b.about["made_on"], c.about["made_on"], (b + c).about["made_on"]] == [[a.hash], [a.hash, b.hash], [a.hash]]
    assert "made_on" not in (a + b).about
    assert not ({*a.expects.items()} & {*b.expects.items()})
    for left_out in (lambda: a + c, lambda: (0.5 * a) + b, lambda: a_row(model, i=9) + b, lambda: (0.5 * (a + b)) + c):
        with pytest.raises(ArgumentError, match="Add all that either was made on, or make one anew"):
            left_out()
    kept = [Edit.load(one.save(tmp_path / f"{i}.safetensors")) for i, one in enumerate((a + b, c, beside_b))]
    assert (kept[0] + kept[1]).hash == ((a + b) + c).hash
    assert dict((kept[0] + kept[2]).expects) == dict(a.expects), "made on a part of the sum"


def test_what_lies_beneath_is_not_taken_from_where_nothing_was_checked():
    model, other = shared("llama"), other_llama()
    a = a_row(model)
    with a.applied(other, strict=False) as edited:
        b = a_row(edited, i=4)
    assert "made_on" not in b.about
    with pytest.raises(ArgumentError, match="must be made for the same weights"):
        a + b


@pytest.mark.parametrize("about", [{"parts": 5}, {"parts": [5]}, {"parts": [{"hash": 5}]}, {"made_on": 5},
                                   {"made_on": [[]]}, {"parts": {}}], ids=str)  # fmt: skip
def test_what_a_file_says_of_parts_may_be_anything(about):
    """It is said, not believed: sums are made of changes."""
    model = shared("llama")
    one, said = a_row(model), replace(a_row(model), about=about)
    assert (one + said).hash == (said + one).hash == (one + one).hash


@given(families, st.data(), st.floats(-3, 3))
def test_scaling_is_multiplying(family, data, factor):
    model = shared(family)
    edit = data.draw(edits(model))
    for one, twice in zip(edit.changes, (factor * edit).changes, strict=True):
        assert torch.allclose(twice.dense(), factor * one.dense(), atol=1e-12)
        assert twice.norm() == pytest.approx(float((factor * one.dense()).norm()), abs=1e-9)
    assert (edit * factor).about["scaled"] == factor
    assert edit.scaled(2.0).scaled(0.5).hash == edit.hash


@given(families, st.data())
def test_an_edit_comes_back_from_its_file_as_it_was(tmp_path_factory, family, data):
    model = shared(family)
    edit = data.draw(edits(model))
    path = edit.save(tmp_path_factory.mktemp("edits") / "one.safetensors")
    again = Edit.load(path)
    assert again.hash == edit.hash
    assert dict(again.about) == dict(edit.about)
    assert dict(again.expects) == dict(edit.expects)
    with edit.applied(model) as one, again.applied(model) as two:
        assert torch.equal(logits(one), logits(two))
        before, after = tensors_of(model.module), tensors_of(one.module)  # logits may be the same: a dead ReLU
        assert not all(torch.equal(before[name], after[name]) for name in edit.tensors)


def test_everything_that_an_edit_holds_comes_back(tmp_path):
    model = shared("llama")
    fact = Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris", name="France")
    table = pd.DataFrame({"fact": ["France", None], "loss": [0.1, 1 / 3], "step": [1, 2]})
    edit = new_edit(model, a_row(model).changes, method="by hand", settings={"layer": 1}, rewrites=[fact],
                    interventions=[rs.Scale("L0.mlp", 0.5, positions="all"), rs.Steer("L1.resid_post", [0.25] * 24)],
                    fitting=table, keys={"L1": torch.randn(2, 3)})  # fmt: skip
    again = Edit.load(edit.save(tmp_path / "full.safetensors"))
    assert again.rewrites == (fact,)
    assert again.interventions == edit.interventions
    pd.testing.assert_frame_equal(again.fitting, table)
    assert torch.equal(again.keys["L1"], edit.keys["L1"])
    assert again.about["settings"] == {"layer": 1}
    assert (again.method, again.hash) == ("by hand", edit.hash)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    edit = a_row(shared("llama"))
    return edit, edit.save(tmp_path_factory.mktemp("kept") / "edit.safetensors").read_bytes()


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_means_the_same(kept, tmp_path_factory, data):
    edit, whole = kept
    at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 40))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    path = tmp_path_factory.mktemp("damaged") / "edit.safetensors"
    path.write_bytes(damaged)
    try:
        again = Edit.load(path)
    except LoadError:
        return
    assert again.hash == edit.hash
    assert dict(again.about) == dict(edit.about)


def test_files_that_are_no_edits_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoadError, match=r"is no edit but .* Edit\.from_delta"):
        Edit.load(tmp_path / "other.safetensors")
    with pytest.raises(LoadError, match="cannot be read as an edit"):
        Edit.load(tmp_path / "missing.safetensors")
    with pytest.raises(ArgumentError, match=r"`path` must be the path of a \.safetensors file"):
        a_row(shared("llama")).save(tmp_path / "edit.json")
    with pytest.raises(ArgumentError, match="`path` must be"):
        Edit.load(3)


def test_the_hash_is_of_what_an_edit_does():
    model = shared("llama")
    one = a_row(model)
    assert one.hash == a_row(model).hash
    assert one.hash == Edit(one.changes, method="another name").hash
    others = [a_row(model, 2.0), a_row(model, i=4), a_row(model, name="model.layers.0.mlp.down_proj.weight"),
              one.scaled(1 + 1e-9), Edit(one.changes, (rs.Zero("L0.mlp"),)), Edit(())]  # fmt: skip
    assert len({edit.hash for edit in (one, *others)}) == 7


def test_the_base_is_untouched_and_usable_throughout():
    model = rs.load(build("llama"))
    before, plain = model.fingerprint(), logits(model)
    held = {name: t.data_ptr() for name, t in tensors_of(model.module).items()}
    edit = a_row(model, 5.0)
    with edit.applied(model) as edited:
        moved = logits(edited)
        assert not torch.equal(moved, plain)
        assert torch.equal(logits(model), plain)
        assert rs.record(model, rs.Prompt(ids=[5, 4], target=1)).fingerprint == before
        with a_row(edited, -5.0).applied(edited) as twice:
            assert torch.allclose(logits(twice), plain, atol=1e-12)
            assert torch.equal(logits(edited), moved)
        assert torch.equal(logits(edited), moved)
    with pytest.raises(KeyError, match="in between"), edit.applied(model):
        raise KeyError("in between")
    assert model.fingerprint() == before
    assert {name: t.data_ptr() for name, t in tensors_of(model.module).items()} == held
    assert torch.equal(logits(model), plain)


def test_several_edits_of_one_base_stand_beside_one_another():
    model = shared("llama")
    with ExitStack() as stack:
        some = [stack.enter_context(a_row(model, t).applied(model)) for t in (1.0, 2.0, 3.0)]
        found = [logits(one) for one in (*some, model)]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    with a_row(model, 2.0).applied(model) as again:
        assert torch.equal(logits(again), found[1])


def test_an_edited_model_works_like_any_model():
    model = shared("llama")
    with a_row(model, 5.0).applied(model) as edited:
        rec = rs.record(edited, rs.Prompt(ids=[5, 4, 3], target=1, versus=[2]))
        assert rec.model is edited
        assert rs.locate(rec, k=3).sites
        effect = rs.intervene(rec, rs.Zero("L1.mlp"))
        assert edited.name == f"{model.name}, edited"
    assert torch.allclose(effect.before.logits, rec.logits)


def test_a_handle_is_closed_behind_its_block():
    model = shared("llama")
    with a_row(model).applied(model) as edited:
        pass
    with pytest.raises(InterventionError, match=r"must be used inside the `with edit\.applied\(model\)` block"):
        rs.record(edited, rs.Prompt(ids=[1], target=0))


def test_an_edit_of_operations_works_in_every_forward():
    model = shared("llama")
    edit = new_edit(model, (), method="ops", interventions=[rs.Zero("L1.mlp", positions="all")])
    with edit.applied(model) as altered:
        found = altered.forward(IDS).logits
    assert not torch.allclose(found, logits(model))
    for verb in (lambda: edit * 2.0, lambda: edit.inverse):
        with pytest.raises(ArgumentError, match="works by interventions"):
            verb()


def test_other_weights_are_refused_by_their_hash():
    module = build("llama")
    model = rs.load(module)
    edit = a_row(model, 2.0)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-12
    with pytest.raises(StaleRecordingError, match=r"made for other weights of model\.layers\.1\.mlp\.down_proj"), \
            edit.applied(model):  # fmt: skip
        pass
    with edit.applied(model, strict=False) as edited:
        added = tensors_of(edited.module)[edit.tensors[0]] - tensors_of(module)[edit.tensors[0]]
    assert torch.allclose(added[:, 3], torch.full((24,), 2.0, dtype=torch.float64))


def test_weights_elsewhere_may_change():
    module = build("llama")
    model = rs.load(module)
    edit = a_row(model)
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight += 1
    with edit.applied(model) as edited:
        assert not torch.equal(logits(edited), logits(model))


def test_another_model_is_refused():
    edit = a_row(shared("llama"))
    with pytest.raises(ArgumentError, match=r"changes model\.layers\.1\.mlp\.down_proj\.weight, which GPT2LMHeadModel "
                       r"does not have"), edit.applied(shared("gpt2")):  # fmt: skip
        pass
    wide = rs.load(build("llama", intermediate_size=48))
    with pytest.raises(ArgumentError, match=r"`edit` must be of a \(24, 48\) tensor"), edit.applied(wide):
        pass
    with pytest.raises(StaleRecordingError, match=r"torch\.float32"), edit.applied(shared("llama", torch.float32)):
        pass
    with pytest.raises(ArgumentError, match=r"`model` must be a model from resid_surgery\.load"), \
            edit.applied(shared("llama").module):  # fmt: skip
        pass


def test_an_edit_that_changes_nothing_is_refused():
    model = shared("llama")
    with pytest.raises(ArgumentError, match="`a row` must change something"):
        a_row(model, 0.0)
    for nothing in (Edit(()), a_row(model) * 0.0, a_row(model) + a_row(model).inverse):
        assert nothing.empty
        with pytest.raises(ArgumentError, match="`edit` must change something"), nothing.applied(model):
            pass


def test_tied_embeddings_change_together_or_are_untied():
    model = rs.load(build("llama"))
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    assert tied_paths(model, embed) == (head,)
    old = tensors_of(model.module)[embed]
    delta = torch.zeros(old.shape, dtype=torch.float64)
    delta[7] = 3.0
    both = new_edit(model, [Dense(embed, (head,), tuple(old.shape), delta)], method="both")
    assert both.tensors == (embed, head)
    with both.applied(model) as edited:
        held = tensors_of(edited.module)
        assert held[embed] is held[head]
        assert torch.equal(held[head], old + delta)
        assert edited.module.lm_head.weight is edited.module.model.embed_tokens.weight
        seen = logits(edited)
    alone = new_edit(model, [Dense(head, (), tuple(old.shape), delta)], method="alone")
    with alone.applied(model) as edited:
        held = tensors_of(edited.module)
        assert held[embed].data_ptr() == old.data_ptr()
        assert torch.equal(held[head], old + delta)
        assert not torch.equal(logits(edited)[..., 7], logits(model)[..., 7])
        assert torch.equal(logits(edited)[..., 8], logits(model)[..., 8]), "inputs read the old embedding"
        assert not torch.equal(seen, logits(model))
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_rounded_once_to_the_models_dtype(dtype):
    model = shared("llama", dtype)
    edit = a_row(model, 0.001)
    name = edit.tensors[0]
    old = tensors_of(model.module)[name].detach()
    with edit.applied(model) as edited:
        new = tensors_of(edited.module)[name].detach()
        assert new.dtype == dtype
        assert torch.equal(new[:, 3], (old[:, 3].double() + 0.001).to(dtype))
        assert torch.equal(new[:, :3], old[:, :3])
    thrice = edit + edit + edit
    with thrice.applied(model) as edited:
        new = tensors_of(edited.module)[name].detach()
        assert torch.allclose(new[:, 3].double(), (old[:, 3].double() + 0.003).to(dtype).double(), rtol=1e-2)


def test_tables_and_texts_say_what_changes():
    model = shared("llama")
    edit = a_row(model, 2.0)
    (row,) = edit.table.to_dict("records")
    assert row["tensor"] == "model.layers.1.mlp.down_proj.weight"
    assert (row["kind"], row["size"], row["shape"]) == ("rows", 1, "24x40")
    assert row["norm"] == pytest.approx(2 * 24**0.5)
    assert repr(edit) == "Edit(a row: model.layers.1.mlp.down_proj.weight (rows))"
    assert repr(Edit(())) == "Edit(unnamed: nothing)"
    assert set(edit.about) == {"model", "fingerprint", "dtype", "settings", "versions"}
    with pytest.raises(TypeError):
        edit.about["model"] = "another"


def test_changes_refuse_what_does_not_fit():
    with pytest.raises(ArgumentError, match="`delta` must be a slice of"):
        Rows("w", (), (3, 4), (1,), torch.tensor([[0]]), torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match="name each slice once"):
        Rows("w", (), (3, 4), (1,), torch.tensor([[0], [0]]), torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="`index` must be within"):
        Rows("w", (), (3, 4), (1,), torch.tensor([[4]]), torch.zeros(1, 3))
    with pytest.raises(ArgumentError, match="`left, right` must be factors"):
        LowRank("w", (), (3, 4), (), torch.zeros(3, 2), torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match="`delta` must be of shape"):
        Dense("w", (), (3, 4), torch.zeros(4, 3))
    with pytest.raises(ArgumentError, match="must have one shape"):
        summed([Dense("w", (), (2,), torch.zeros(2)), Dense("w", (), (3,), torch.zeros(3))])


def test_experts_slices_and_factors_of_one_expert():
    three = torch.randn(2, 3, 4, dtype=torch.float64)
    rows = Rows("w", (), (2, 3, 4), (0, 2), torch.tensor([[1, 3], [0, 0]]), torch.ones(2, 3, dtype=torch.float64))
    added = rows.added_to(three) - three
    assert float(added[1, :, 3].sum() + added[0, :, 0].sum()) == pytest.approx(6) == pytest.approx(float(added.sum()))
    left, right = torch.randn(3, 1, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    one = LowRank("w", (), (2, 3, 4), (1,), left, right)
    added = one.added_to(three) - three
    assert torch.allclose(added[1], left @ right)
    assert not bool(added[0].any())
    assert one.norm() == pytest.approx(float((left @ right).norm()))


def test_hashes_tell_dtype_and_shape_apart():
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(8, dtype=torch.bfloat16),
    ]
    assert len({tensor_hash(t) for t in zeros}) == 4

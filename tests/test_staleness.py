"""Staleness: whatever was made with a model's weights notices that they changed, or holds none of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from torch import nn

import resid_surgery as rs
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import new_edit
from resid_surgery.errors import (
    ClosureError,
    InterventionError,
    LoadError,
    ResidSurgeryError,
    RunError,
    StaleRecordingError,
    UnsupportedModelError,
)

PROMPT = rs.Prompt(ids=[5, 6, 7, 8], target=9, versus=[10])
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def module() -> Any:
    return tiny.build("llama")


def weight(module: Any) -> Any:
    """The projection that changes: in the middle, read by everything here."""
    return module.get_submodule(DOWN).weight


def edit_of(model: Any, size: float = 0.5) -> Any:
    """An edit of one value vector."""
    delta = torch.full((1, 24), size, dtype=torch.float64)
    return new_edit(model, [Rows(f"{DOWN}.weight", (), (24, 40), (1,), torch.tensor([[3]]), delta)], method="a row")


# --- ways of changing weights -------------------------------------------------------------------


def _optimiser(module: Any) -> None:
    weight(module).grad = torch.ones_like(weight(module))
    torch.optim.SGD([weight(module)], lr=1e-3).step()
    weight(module).grad = None


def _row(module: Any) -> None:
    weight(module).data[:, 3] += 1.0


def _element(module: Any) -> None:
    weight(module).data[7, 3] += 1.0


def _state(module: Any) -> None:
    module.load_state_dict(module.state_dict() | {f"{DOWN}.weight": weight(module) * 1.01})


def _copied(module: Any) -> None:
    with torch.no_grad():
        weight(module).copy_(weight(module) + 1e-3)


def _other_data(module: Any) -> None:
    weight(module).data = weight(module).data * 1.01


def _swapped(module: Any) -> None:
    old = module.get_submodule(DOWN)
    fresh = nn.Linear(40, 24, dtype=torch.float64)
    fresh.bias.data.copy_(old.bias.data)
    fresh.weight.data.copy_(old.weight.data * 1.01)
    module.model.layers[1].mlp.down_proj = fresh


def _merged(module: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(module, config).merge_and_unload()


def _edited(module: Any) -> None:
    base = rs.load(module)
    for path, tensor in edit_of(base).new_tensors(base).items():
        with torch.no_grad():
            module.get_parameter(path).copy_(tensor)


def _half(module: Any) -> None:
    module.float()


WAYS: dict[str, Callable[[Any], None]] = {
    "an optimiser's step": _optimiser,
    "a row through .data": _row,
    "one element through .data": _element,
    "load_state_dict": _state,
    "copy_": _copied,
    "another .data": _other_data,
    "a module swapped": _swapped,
    "LoRA merged": _merged,
    "an edit written in place": _edited,
    "another dtype": _half,
}


# --- what was made before -----------------------------------------------------------------------

Made = tuple[Callable[[], object], type[ResidSurgeryError], str]
CHANGED = "was made with weights .*, but the model now has .*: its weights changed since. Record the prompt again"
OTHERS = f"`donor` was recorded with other weights of LlamaForCausalLM|{CHANGED}"  # a write that no quick look sees


def _recording(model: Any, folder: Path) -> Made:
    rec = rs.record(model, PROMPT)
    return lambda: rs.decompose(rec), StaleRecordingError, CHANGED


def _donor(model: Any, folder: Path) -> Made:
    donor = rs.record(model, rs.Prompt(ids=[1, 2, 3, 4], target=9))
    return (
        lambda: rs.intervene(rs.record(model, PROMPT), rs.Patch("L0.mlp", donor)),
        StaleRecordingError,
        OTHERS,
    )


def _mean(model: Any, folder: Path) -> Made:
    some = [rs.record(model, rs.Prompt(ids=[1, 2, 3, i], target=9)) for i in (4, 5)]
    return (
        lambda: rs.sweep(rs.record(model, PROMPT), [rs.Mean("L0.mlp", some)]),
        StaleRecordingError,
        OTHERS,
    )


def _saved(model: Any, folder: Path) -> Made:
    donor = rs.record(model, PROMPT)
    return (
        lambda: rs.save_interventions(folder / "ops.json", rs.Patch("L0.mlp", donor), rec=rs.record(model, PROMPT)),
        StaleRecordingError,
        OTHERS,
    )


def _graph(model: Any, folder: Path) -> Made:
    graph = rs.source_graph(rs.record(model, PROMPT, positions="all"), nodes=6)
    kept = graph.to_json()

    def use() -> None:
        assert graph.to_json() == kept
        with pytest.raises(StaleRecordingError, match=CHANGED):
            rs.faithfulness(graph)
        rs.verify(graph, edges=2)

    return use, StaleRecordingError, CHANGED


def _head_weights(model: Any, folder: Path) -> Made:
    held = rs.head_weights(model, "L*.H1")
    return lambda: held["L1.H1"], StaleRecordingError, "these head weights .* were read from weights"


def _iterated(model: Any, folder: Path) -> Made:
    held = rs.head_weights(model, "L*.H1")
    return lambda: list(held), StaleRecordingError, r"Call head_weights again\."


def _edit(model: Any, folder: Path) -> Made:
    edit = edit_of(model)

    def use() -> None:
        with edit.applied(model):
            pass

    return use, StaleRecordingError, "this edit was made for other weights of model.layers.1.mlp.down_proj"


def _loaded_edit(model: Any, folder: Path) -> Made:
    edit = rs.Edit.load(edit_of(model).save(folder / "edit.safetensors"))

    def use() -> None:
        edit.new_tensors(model)

    return use, StaleRecordingError, r"Make it anew, or pass strict=False to add it anyway\."


def _run(model: Any, folder: Path) -> Made:
    plan = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}}
    rs.run(model, [PROMPT], plan, out=folder / "run", progress=False)
    return (
        lambda: rs.run(model, [PROMPT, rs.Prompt(ids=[1, 2], target=3)], plan, out=folder / "run", progress=False),
        RunError,
        "model.fingerprint",
    )


OBJECTS: dict[str, Callable[[Any, Path], Made]] = {
    "a recording": _recording,
    "a donor": _donor,
    "recordings to average": _mean,
    "interventions to save": _saved,
    "a source graph": _graph,
    "head weights": _head_weights,
    "head weights, one by one": _iterated,
    "an edit": _edit,
    "an edit from its file": _loaded_edit,
    "a run": _run,
}
# every object with a change that bumps no counter, and with one of each other kind; a recording with all
PAIRS = [("a recording", way) for way in WAYS]
PAIRS += [
    (one, way) for one in OBJECTS if one != "a recording" for way in ("one element through .data", "a module swapped")
]
PAIRS += [("an edit", "LoRA merged"), ("a run", "another dtype"), ("a donor", "an edit written in place")]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_what_was_made_before_the_weights_changed_is_refused(name: str, way: str, module: Any, tmp_path: Path) -> None:
    model = rs.load(module)
    use, error, said = OBJECTS[name](model, tmp_path)
    WAYS[way](module)
    with pytest.raises(error, match=said):
        use()
    assert rs.decompose(rs.record(model, PROMPT))["closure"].max() < 1e-3, "a new recording is good at once"


VERBS: dict[str, Callable[[Any], object]] = {
    "decompose": rs.decompose,
    "lens": rs.lens,
    "lens_positions": rs.lens_positions,
    "stream_bs": rs.stream_bs,
    "predictions": rs.predictions,
    "spectrum": lambda rec: rs.spectrum(rec, "L0.N0"),
    "scores": rs.scores,
    "counts": rs.counts,
    "locate": lambda rec: rs.locate(rec, k=2),
    "probability_curve": lambda rec: rs.probability_curve(rec, "L0.N0"),
    "cumulated": lambda rec: rs.cumulated(rec, layer=1),
    "add_subvalues": lambda rec: rs.add_subvalues(rec, ["L0.N0"]),
    "sources": lambda rec: rs.sources(rec, "L1.N0"),
    "attention_sources": lambda rec: rs.attention_sources(rec, "L1.H0"),
    "cross_layer": lambda rec: rs.cross_layer(rec, [2]),
    "query_subvalues": lambda rec: rs.query_subvalues(rec, ["L1.N0"]),
    "messages": lambda rec: rs.messages(rec, "L1.H0"),
    "intervene": lambda rec: rs.intervene(rec, rs.Zero("L0.N0")),
    "sweep": lambda rec: rs.sweep(rec, [rs.Zero("L0.N0")]),
    "additivity": lambda rec: rs.additivity(rec, [rs.Zero("L0.mlp"), rs.Zero("L1.mlp")]),
    "source_graph": lambda rec: rs.source_graph(rec, nodes=5),
    "blame": lambda rec: rs.blame(rec, *rec.bs_values.topk(2).indices.tolist()),
    "score_against_effect": rs.score_against_effect,
}


@pytest.fixture(scope="module")
def stale() -> Any:
    """A recording of weights of which one number changed since, through .data."""
    module = tiny.build("llama")
    rec = rs.record(rs.load(module), PROMPT, positions="all")
    _element(module)
    return rec


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_stale_recording(verb: str, stale: Any) -> None:
    with pytest.raises(StaleRecordingError, match=CHANGED):
        VERBS[verb](stale)


def test_no_report_is_written_of_a_stale_recording(stale: Any, tmp_path: Path) -> None:
    with pytest.raises(StaleRecordingError, match=CHANGED):
        rs.write_report(stale, tmp_path / "rec.html")
    assert not list(tmp_path.iterdir())


def test_the_same_weights_again_are_the_same_model(module: Any, tmp_path: Path) -> None:
    """Every object of the table is good before the change and after it was taken back: none is refused for nothing."""
    model = rs.load(module)
    made = {name: OBJECTS[name](model, tmp_path / name.replace(" ", "_").replace(",", ""))[0]
            for name in OBJECTS if name not in ("a source graph", "a run",
                                                "interventions to save", "an edit from its file")}  # fmt: skip
    kept = weight(module).detach().clone()
    _row(module)
    weight(module).data.copy_(kept)
    for use in made.values():
        use()


# --- values that hold no weights ----------------------------------------------------------------


def tables_of(value: Any) -> list[pd.DataFrame]:
    """Every table that a value holds."""
    held = [getattr(value, name) for name in getattr(value, "__dataclass_fields__", ())]
    return [value] if isinstance(value, pd.DataFrame) else [one for one in held if isinstance(one, pd.DataFrame)]


VALUES: dict[str, Callable[[Any, Any], Any]] = {
    "located": lambda model, rec: rs.locate(rec, k=3),
    "scores": lambda model, rec: rs.scores(rec),
    "a ledger": lambda model, rec: rs.decompose(rec),
    "neuron memories": lambda model, rec: rs.neuron_memory(model, "L1.N3", [PROMPT], progress=False),
    "a sweep": lambda model, rec: rs.sweep(rec, [rs.Zero("L0.N1")], progress=False),
    "an operated prompt": lambda model, rec: rs.operate(model, PROMPT, k=2, readers=1),
    "a graph": lambda model, rec: rs.source_graph(rec, nodes=6),
    "blame": lambda model, rec: rs.blame(rec, *rec.bs_values.topk(2).indices.tolist(), pool=3, limit=2, draws=1, k=2),
}


@pytest.mark.parametrize("name", VALUES)
def test_tables_that_were_made_stay_what_they_were(name: str, module: Any) -> None:
    model = rs.load(module)
    value = VALUES[name](model, rs.record(model, PROMPT, positions="all"))
    before = [table.copy() for table in tables_of(value)]
    assert before
    _row(module)
    for table, kept in zip(tables_of(value), before, strict=True):
        pd.testing.assert_frame_equal(table, kept)


def test_an_effect_looked_at_before_the_change_keeps_its_table(module: Any) -> None:
    effect = rs.intervene(rs.record(rs.load(module), PROMPT), rs.Zero("L0.N1"))
    kept = effect.table.copy()
    _row(module)
    pd.testing.assert_frame_equal(effect.table, kept)


@pytest.mark.parametrize("part", ["table", "ledger"])
def test_an_effect_first_looked_at_after_the_change_is_refused(part: str, module: Any) -> None:
    effect = rs.intervene(rs.record(rs.load(module), PROMPT), rs.Zero("L0.N1"))
    module.lm_head.weight.data[:, 3] += 1.0
    with pytest.raises(StaleRecordingError, match=CHANGED):
        effect.table if part == "table" else effect.ledger()


# --- what is kept of a model --------------------------------------------------------------------


KEPT: dict[str, Callable[[Any], pd.DataFrame]] = {
    "ranges of value vectors": lambda model: rs.locate(rs.record(model, PROMPT), k=3, worst=True).table,
    "bounds": lambda model: rs.scores(rs.record(model, PROMPT), bounds=True),
    "ranks": lambda model: rs.scores(rs.record(model, PROMPT), score="target_rank"),
    "gradients": lambda model: rs.scores(rs.record(model, PROMPT), score="grad_times_activation"),
    "copying": lambda model: rs.copying(model, "L1.H1"),
    "what values say": lambda model: rs.ov_tokens(model, "L1.H1", [5]),
    "composition": lambda model: rs.composition(model, "L0.H1", "L1.H1"),
    "query sources": lambda model: rs.sources(rs.record(model, PROMPT), "L1.H1", side="query"),
    "neuron sources": lambda model: rs.sources(rs.record(model, PROMPT), "L1.N3"),
    "a ledger by neurons": lambda model: rs.decompose(rs.record(model, PROMPT), grain="neuron"),
    "memories": lambda model: rs.neuron_memory(model, "L1.N3", [PROMPT], progress=False).values,
}
TOUCHED = {
    "a row of W_O": lambda m: m.model.layers[1].self_attn.o_proj.weight.data[3, 9],
    "a row of W_V": lambda m: m.model.layers[1].self_attn.v_proj.weight.data[2, 7],
    "the unembedding": lambda m: m.lm_head.weight.data[9, 3],
    "a value vector": lambda m: m.model.layers[1].mlp.down_proj.weight.data[7, 3],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_of_a_model_is_that_of_its_weights(name: str, module: Any) -> None:
    """After a write to single elements, which no counter shows, a verb says what it says of the changed model anew."""
    model = rs.load(module)
    KEPT[name](model)
    for touched in TOUCHED.values():
        touched(module).add_(0.7)
    pd.testing.assert_frame_equal(KEPT[name](model), KEPT[name](rs.load(module)))


# --- modules, hooks and settings ----------------------------------------------------------------


def _doubled(_: Any, __: Any, out: Any) -> Any:
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


def _looked_at(module: Any) -> None:
    module.model.layers[1].register_forward_hook(lambda *_: None)


def _hooked_neurons(module: Any) -> None:
    module.get_submodule(DOWN).register_forward_hook(_doubled)


def _other_activation(module: Any) -> None:
    module.model.layers[1].mlp.act_fn = nn.GELU()


def _other_eps(module: Any) -> None:
    module.model.norm.variance_epsilon = 0.5


def _other_scaling(module: Any) -> None:
    for layer in module.model.layers:
        layer.self_attn.scaling *= 2


@pytest.mark.parametrize("change", [_hooked_neurons, _other_eps], ids=["a hook on a writer", "another eps"])
def test_a_model_that_is_no_ledger_any_more_is_refused(change: Any, module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    change(module)
    said = "closed when it was loaded; modules, hooks or settings of it changed since: .* is refused: "
    for use in (lambda: rs.record(model, PROMPT), lambda: rs.decompose(rec), lambda: rs.record(model, PROMPT),
                lambda: rs.neuron_memory(model, "L1.N3", [PROMPT], progress=False)):  # fmt: skip
        with pytest.raises(ClosureError, match=said):
            use()


@pytest.mark.parametrize("change", [_other_activation, _other_scaling], ids=["another activation", "another scaling"])
def test_a_model_that_computes_something_else_makes_recordings_stale(change: Any, module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    change(module)
    with pytest.raises(StaleRecordingError, match="not what the model computes now: modules, hooks or settings"):
        rs.decompose(rec)
    again = rs.record(model, PROMPT)
    pd.testing.assert_frame_equal(rs.decompose(again), rs.decompose(rs.record(rs.load(module), PROMPT)))


def test_a_hook_that_only_looks_on_makes_nothing_stale(module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    kept = rs.decompose(rec)
    _looked_at(module)
    pd.testing.assert_frame_equal(rs.decompose(rec), kept)
    assert rec.label.tree == model.trees == 2


def test_a_proof_that_failed_is_made_again_and_one_that_held_is_not(module: Any, monkeypatch: Any) -> None:
    model = rs.load(module)
    proofs: list[int] = []
    proof = model.proof
    assert proof is not None

    def counted(one: Any) -> object:
        proofs.append(1)
        return proof(one)

    monkeypatch.setattr(model, "proof", counted)
    rs.record(model, PROMPT)
    assert proofs == []
    handle = module.get_submodule(DOWN).register_forward_hook(_doubled)
    for made in (1, 2):
        with pytest.raises(ClosureError):
            rs.record(model, PROMPT)
        assert len(proofs) == made
    handle.remove()
    for _ in range(2):
        rs.record(model, PROMPT)
        assert len(proofs) == 3


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda m: setattr(m.model, "layers", m.model.layers[:2]), "now 2 and 97"),
        (lambda m: m.resize_token_embeddings(50), "now 3 and 50"),
    ],
    ids=["layers left out", "tokens left out"],
)
def test_a_model_of_another_size_must_be_loaded_again(change: Any, now: str, module: Any) -> None:
    model = rs.load(module)
    change(module)
    with pytest.raises(UnsupportedModelError, match=f"had 3 layers and 97 tokens when it was loaded, {now}: load it"):
        rs.record(model, PROMPT)


def test_parameters_that_count_no_writes_are_looked_at_all_the_same(module: Any) -> None:
    model = rs.load(module)
    with torch.inference_mode():
        module.get_submodule(DOWN).weight = nn.Parameter(weight(module).clone(), requires_grad=False)
    assert weight(module).is_inference()
    rec = rs.record(model, PROMPT)
    rs.decompose(rec)
    with torch.inference_mode():
        weight(module)[7, 3] += 1
    with pytest.raises(StaleRecordingError, match=CHANGED):
        rs.decompose(rec)


def test_weights_that_leave_memory_are_missed_by_name(module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    module.to("meta")
    for use in (lambda: rs.record(model, PROMPT), lambda: rs.decompose(rec), model.fingerprint):
        with pytest.raises(LoadError, match="LlamaForCausalLM has parameters on the meta device"):
            use()


# --- edits that are applied ---------------------------------------------------------------------


def test_a_recording_from_outside_is_good_while_an_edit_is_applied(module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    kept = rs.decompose(rec)
    with edit_of(model).applied(model) as edited:
        pd.testing.assert_frame_equal(rs.decompose(rec), kept)
        with pytest.raises(InterventionError, match="`donor` must be a recording of the same opened model"):
            rs.intervene(rs.record(edited, PROMPT), rs.Patch("L0.mlp", rec))


@pytest.fixture
def left(module: Any) -> tuple[Any, Any]:
    """A recording made inside `applied`, whose block has been left."""
    model = rs.load(module)
    with edit_of(model).applied(model) as edited:
        rec = rs.record(edited, PROMPT, positions="all")
    return rec, model


@pytest.mark.parametrize(
    "use",
    [rs.decompose, rs.scores, lambda rec: rs.locate(rec, k=2), lambda rec: rs.sources(rec, "L1.N0"),
     lambda rec: rs.intervene(rec, rs.Zero("L0.N0")), lambda rec: rs.source_graph(rec, nodes=5)],
    ids=["decompose", "scores", "locate", "sources", "intervene", "graph"],
)  # fmt: skip
def test_a_recording_made_inside_is_of_no_use_outside(use: Any, left: Any) -> None:
    rec, model = left
    with pytest.raises((InterventionError, StaleRecordingError), match="edited"):
        use(rec)
    with pytest.raises(InterventionError, match="`donor` must be a recording of the same opened model"):
        rs.intervene(rs.record(model, PROMPT), rs.Patch("L0.mlp", rec))


def test_a_base_that_changes_under_an_applied_edit_is_noticed_there_too(module: Any) -> None:
    model = rs.load(module)
    with edit_of(model).applied(model) as edited:
        rec = rs.record(edited, PROMPT)
        module.model.layers[0].mlp.up_proj.weight.data[3, 3] += 1.0
        with pytest.raises(StaleRecordingError, match=CHANGED):
            rs.decompose(rec)
        logits = rs.record(edited, PROMPT).logits
    with edit_of(rs.load(module)).applied(rs.load(module)) as fresh:
        assert torch.equal(rs.record(fresh, PROMPT).logits, logits)

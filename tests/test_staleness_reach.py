"""Staleness, further: settings of modules, several recordings in one call, figures, pages, caches and files on disk.

`test_staleness` has the ways in which weights change, and the objects that notice.
"""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from fake_validation import fake_validation
from good_calls import CALLS, Bench, carried_out
from matplotlib import pyplot
from test_staleness import DOWN, PROMPT, edit_of
from torch import nn
from validation_cases import SMALL, a_row, probes, sharp, words

import resid_surgery as rs
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.reports import diff_reports
from resid_surgery.editing.running import Passage, WeightsSubject, figures
from resid_surgery.errors import ArgumentError, ClosureError, RunError, StaleRecordingError
from resid_surgery.models.opening import OF_A_TREE
from resid_surgery.models.standing import standing
from resid_surgery.views.paper import DRAWN

NOT_WHAT_IT_COMPUTES = "is not what the model computes now: modules, hooks or settings of it"
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture
def module() -> Any:
    return tiny.build("llama")


def element(module: Any) -> None:
    """A write to one number, which no counter shows."""
    module.get_submodule(DOWN).weight.data[7, 3] += 1.0


# --- settings that are no plain numbers ---------------------------------------------------------


def _attention(module: Any) -> Any:
    return module.get_submodule(ATTENTION)


def _as_array(module: Any) -> None:
    _attention(module).scaling = np.float64(0.4)


def _as_tensor(module: Any) -> None:
    _attention(module).scaling = torch.tensor(0.4, dtype=torch.float64)


def _as_function(module: Any) -> None:
    for layer, function in zip(module.model.layers, (torch.relu, torch.relu, torch.tanh), strict=True):
        layer.mlp.act_fn = Calls(function)


def _as_list(module: Any) -> None:
    module.model.layers[1].mlp.act_fn = Calls([torch.relu])


class Calls(nn.Module):
    """An activation that holds its function, as those of transformers do."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.function[0] if isinstance(self.function, list) else self.function)(x)
        return out


SETTINGS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "a number of numpy's": (_as_array, lambda m: setattr(_attention(m), "scaling", np.float64(0.9))),
    "a loose tensor": (_as_tensor, lambda m: _attention(m).scaling.mul_(2)),
    "a loose tensor through .data": (_as_tensor, lambda m: _attention(m).scaling.data.mul_(2)),
    "another loose tensor": (_as_tensor, lambda m: setattr(_attention(m), "scaling", torch.tensor(0.9))),
    "a function": (_as_function, lambda m: setattr(m.model.layers[1].mlp.act_fn, "function", torch.sigmoid)),
    "the function of another layer": (
        _as_function,
        lambda m: setattr(m.model.layers[1].mlp.act_fn, "function", torch.tanh),
    ),
    "a function in a list": (_as_list, lambda m: m.model.layers[1].mlp.act_fn.function.insert(0, torch.tanh)),
    "a config's attention": (lambda m: None, lambda m: m.set_attn_implementation("sdpa")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_any_kind_is_noticed_and_the_model_is_read_as_it_is(name: str, module: Any) -> None:
    before, change = SETTINGS[name]
    before(module)
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    change(module)
    with pytest.raises(StaleRecordingError, match=NOT_WHAT_IT_COMPUTES):
        rs.decompose(rec)
    with torch.no_grad():
        said = module(torch.tensor([PROMPT.ids])).logits[0, -1]
    assert (rs.record(model, PROMPT).logits - said).abs().max() < 1e-12


def test_a_changed_config_that_the_ledger_was_read_with_is_refused() -> None:
    module = tiny.build("gemma2")
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    module.config.final_logit_softcapping = 2.0
    with pytest.raises(ClosureError, match="modules, hooks or settings of it changed since"):
        rs.decompose(rec)


def test_settings_that_stay_cost_no_second_tree(module: Any) -> None:
    for prepare in (_as_tensor, _as_function):
        prepare(module)
    model = rs.load(module)
    for _ in range(2):
        rs.decompose(rs.record(model, PROMPT))
        with torch.no_grad():
            module(torch.tensor([PROMPT.ids]))
    assert model.trees == 1


def test_what_is_known_of_modules_goes_with_them(module: Any) -> None:
    model = rs.load(module)
    rec = rs.record(model, PROMPT, positions="all")
    rs.sources(rec, "L1.H1", side="query")
    rs.intervene(rec, rs.Zero("L1.Q1"))
    known = {name: id(model.cache[name]) for name in OF_A_TREE if isinstance(model.cache.get(name), dict)}
    assert {"from_scores", "inner_norms"} <= known.keys()
    SETTINGS["a config's attention"][1](module)
    assert model.shadow is not None
    assert not model.cache.keys() & set(OF_A_TREE)


# --- every verb, every recording that it takes --------------------------------------------------


class Own(Bench):
    """A bench with a model of its own, which tests may change."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.own = rs.load(sharp("llama", torch.float32), tokenizer=words())

    @property
    def model(self) -> Any:  # type: ignore[override]
        return self.own


MADE = ("Mean", "Patch")  # values; they are looked at when they are carried out, see `test_staleness`
READ_NO_WEIGHTS = {
    "attention_weights": "shows what was recorded",
    "grid": "makes operations",
    "save_interventions": "of a Zero, which has no values",
    "plot_graph": "draws what the graph's tables say",
}


def holds(value: Any) -> bool:
    """Whether a value is, or has among its members, a recording or a graph of one."""
    if isinstance(value, (list, tuple)):
        return any(map(holds, value))
    return isinstance(value, (rs.Recording, rs.SourceGraph))


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> good arguments from before one number of the weights changed, and those from after it."""
    before, names = Own(tmp_path_factory.mktemp("before")), [n for n in CALLS if CALLS[n] is not CALLS["edit_rank_one"]]
    old = {name: made for name in names if any(map(holds, (made := CALLS[name](before)).values()))}
    element(before.own.module)
    after = Own(tmp_path_factory.mktemp("after"))
    after.own = before.own
    pyplot.close("all")
    return {name: (made, CALLS[name](after)) for name, made in old.items()}


def test_no_verb_takes_any_stale_recording(old_and_new: Any) -> None:
    """One stale recording among good ones, in every place in turn."""
    went, refused, said = set(), set(), set[str]()
    for name, (old, new) in old_and_new.items():
        for place in [one for one, value in old.items() if holds(value)]:
            try:
                carried_out(getattr(rs, name.split()[0])(**new | {place: old[place]}))
            except StaleRecordingError as error:
                refused.add((name, place))
                said.add(str(error).split(": ")[-1] if "changed since" in str(error) else str(error))
            else:
                went.add(name)
    assert went == set(READ_NO_WEIGHTS) | set(MADE)
    assert {("patching", "corrupt"), ("token_constants", "over"), ("faithfulness", "over"), ("blame", "over"),
            ("faithfulness", "graph"), ("verify", "graph")} <= refused  # fmt: skip
    assert len(refused) > 30
    assert all("its weights changed since" in one or "recorded with other weights" in one for one in said)


def test_what_reads_no_weights_says_what_was_recorded(module: Any) -> None:
    rec = rs.record(rs.load(module), PROMPT, positions="all")
    weights, graph = rs.attention_weights(rec), rs.source_graph(rec, nodes=6)

    def drawn() -> list[Any]:
        ax = rs.plot_graph(graph)
        found = [line.get_xydata().tolist() for line in ax.lines], [one.get_text() for one in ax.texts], ax.get_title()
        pyplot.close("all")
        return list(found)

    before = drawn()
    element(module)
    pd.testing.assert_frame_equal(rs.attention_weights(rec), weights)
    assert drawn() == before


@pytest.mark.parametrize("figure", DRAWN)
def test_no_figure_of_the_paper_is_drawn_of_a_stale_recording(figure: str, module: Any) -> None:
    rec = rs.record(rs.load(module), PROMPT, positions="all")
    element(module)
    with pytest.raises(StaleRecordingError, match="its weights changed since"):
        rs.plot_paper(rec, figure)
    assert pyplot.get_fignums() == []


# --- pages --------------------------------------------------------------------------------------


def _page(value: Any, folder: Path, name: str) -> bytes:
    return rs.write_report(value, folder / f"{name}.html").read_bytes()


SHOWN: dict[str, Callable[[Any, Any], Any]] = {
    "located": lambda model, rec: rs.locate(rec, k=3),
    "a graph": lambda model, rec: rs.source_graph(rec, nodes=6),
    "a verified graph": lambda model, rec: rs.verify(rs.source_graph(rec, nodes=6), edges=2),
    "a table": lambda model, rec: rs.scores(rec),
    "an edit": lambda model, rec: edit_of(model),
}
READ: dict[str, Callable[[Any, Any], Any]] = {
    "a recording": lambda model, rec: rec,
    "an operation": lambda model, rec: rs.operate(model, PROMPT, k=2, readers=1),
    "an effect": lambda model, rec: rs.intervene(rec, rs.Zero("L0.N1")),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_page_of_tables_is_the_page_that_it_was(name: str, module: Any, tmp_path: Path) -> None:
    """Such a page reads no weights and runs no forward: it shows what was computed."""
    model = rs.load(module)
    value = SHOWN[name](model, rs.record(model, PROMPT, positions="all"))
    before = _page(value, tmp_path, "before")
    element(module)
    assert _page(value, tmp_path, "after") == before


@pytest.mark.parametrize("name", READ)
def test_a_page_that_computes_is_refused_and_leaves_no_file(name: str, module: Any, tmp_path: Path) -> None:
    model = rs.load(module)
    value = READ[name](model, rs.record(model, PROMPT, positions="all"))
    element(module)
    with pytest.raises(StaleRecordingError, match="its weights changed since"):
        _page(value, tmp_path, "after")
    assert not list(tmp_path.iterdir())


# --- head weights, models under interventions ---------------------------------------------------


def _doubled_scaling(module: Any) -> None:
    for layer in module.model.layers:
        layer.self_attn.scaling *= 2


def _other_activation(module: Any) -> None:
    module.model.layers[0].mlp.act_fn = nn.GELU()


def _hook(module: Any) -> Any:
    return _attention(module).q_proj.register_forward_hook(lambda _, __, out: out * 2)


def test_head_weights_notice_a_setting_that_they_hold(module: Any) -> None:
    model = rs.load(module)
    held = rs.head_weights(model, "L1.H1")
    kept = held["L1.H1"].scaling
    _other_activation(module)
    assert held["L1.H1"].scaling == kept, "an activation is nothing of theirs"
    _doubled_scaling(module)
    for use in (lambda: held["L1.H1"], lambda: list(held)):
        with pytest.raises(StaleRecordingError, match=r"not what it computes with now: .* Call head_weights again\."):
            use()
    assert rs.head_weights(model, "L1.H1")["L1.H1"].scaling == 2 * kept


def test_values_of_donors_under_interventions_are_those_of_the_model_as_it_is(module: Any) -> None:
    model, ids = rs.load(module), torch.tensor([PROMPT.ids])
    patch = rs.Patch("L1.mlp", rs.Prompt(ids=[1, 2, 3, 4], target=9), positions="all")
    with rs.under(model, patch) as altered:
        first = altered.forward(ids).logits
        _other_activation(module)
        second = altered.forward(ids).logits
    with rs.under(rs.load(module), patch) as fresh:
        assert torch.equal(fresh.forward(ids).logits, second)
    assert not torch.equal(first, second)


# --- what is kept of a base on disk -------------------------------------------------------------

BESIDE: dict[str, Callable[[Any], object]] = {
    "another activation": _other_activation,
    "another scaling": _doubled_scaling,
    "a hook": _hook,
    "a forward of its own": lambda m: setattr(_attention(m).q_proj, "forward", lambda x: 2 * x),
    "an entry of the config": lambda m: m.set_attn_implementation("sdpa"),
}
ROWS = [Passage((5, 6, 7, 8), (1, 3)), Passage((4, 3, 2, 1), (3,))]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("name", [one for one in BESIDE if one != "an entry of the config"])
def test_figures_of_a_base_are_not_believed_of_other_modules_hooks_or_settings(name: str, module: Any) -> None:
    model = rs.load(module)
    before = Remembered(model).figures(ROWS)
    BESIDE[name](module)
    base = Remembered(model)
    after = base.figures(ROWS)
    assert (base.found, base.asked) == (0, 2)
    assert any(not torch.equal(a.nll.nan_to_num(), b.nll.nan_to_num()) for a, b in zip(before, after, strict=True))
    right = figures(WeightsSubject(model, "x"), ROWS)
    assert all(torch.equal(a.top, b.top) for a, b in zip(after, right, strict=True))


@pytest.mark.parametrize("place", ["", "cuda.matmul", "mkldnn", "mkldnn.matmul"])
def test_figures_of_a_base_are_not_believed_of_another_precision(place: str, module: Any, own_cache: Path) -> None:
    """Said in torch's new way, after which its old way of asking raises an error."""
    model = rs.load(module)
    Remembered(model).figures(ROWS)
    setting = operator.attrgetter(f"backends.{place}" if place else "backends")(torch)
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        other = Remembered(model)
        other.figures(ROWS)
    finally:
        setting.fp32_precision = before
    again = Remembered(model)
    again.figures(ROWS)
    assert (other.found, other.asked, again.found) == (0, 2, 2)


def test_of_a_model_with_hooks_nothing_is_kept(module: Any, own_cache: Path) -> None:
    """What a hook does is not told by its name: another one of the same code may be in its place next time."""
    model = rs.load(module)
    handle = _hook(module)
    for _ in range(2):
        base = Remembered(model)
        base.figures(ROWS)
        base.continued([[5, 6]], 2)
        assert base.found == 0
    assert not (own_cache / "figures").exists()
    handle.remove()
    Remembered(model).figures(ROWS)
    assert len(list((own_cache / "figures").iterdir())) == 1


@pytest.mark.parametrize("change", [element, _doubled_scaling], ids=["weights", "a setting"])
def test_nothing_is_kept_of_a_base_that_changed_while_it_was_asked(change: Any, module: Any, own_cache: Path) -> None:
    base = Remembered(rs.load(module))
    change(module)
    for ask in (lambda: base.figures(ROWS), lambda: base.continued([[5, 6]], 2)):
        with pytest.raises(StaleRecordingError, match=r"was changed while it was asked: .* so its answers are of two"):
            ask()
    assert not (own_cache / "figures").exists()


def test_a_validation_of_a_base_that_changes_on_the_way_is_refused() -> None:
    """A function that edits the base itself and forgets to put it back; the base's figures are known from before."""
    module = sharp("llama", torch.float32)
    model = rs.load(module, tokenizer=words())
    some = [one for one in probes() if one.axis in ("efficacy", "choice")]

    def validated(change: Callable[[Any], object]) -> Any:
        def edited(ids: torch.Tensor) -> torch.Tensor:
            change(module)
            with torch.no_grad():
                logits: torch.Tensor = module(ids).logits
            return logits

        return rs.validate(model, edited, some, budget=SMALL, general=False, progress=False)

    validated(lambda _: None)
    assert validated(lambda _: None).manifest["remembered"]["asked"] == 0
    with pytest.raises(StaleRecordingError, match="was changed while it was asked"):
        validated(element)


def test_a_validation_asks_anew_after_a_setting_changed() -> None:
    module = sharp("llama", torch.float32)
    model = rs.load(module, tokenizer=words())
    options: dict[str, Any] = {"budget": SMALL, "general": False, "progress": False}
    first = rs.validate(model, a_row(model, 1.0), probes(), **options)
    again = rs.validate(model, a_row(model, 1.0), probes(), **options)
    assert again.manifest["remembered"]["found"] > 0 == again.manifest["remembered"]["asked"]
    assert again.manifest["standing"] == first.manifest["standing"]
    assert len(diff_reports(first, again)) == len(first.gates) + 1
    _doubled_scaling(module)
    other = rs.validate(model, a_row(model, 1.0), probes(), **options)
    assert other.manifest["remembered"] == first.manifest["remembered"], "what is asked twice is found the second time"
    assert other.manifest["fingerprint"] == first.manifest["fingerprint"]
    with pytest.raises(ArgumentError, match=r"same modules, hooks and settings \(standing\) to be compared; got"):
        diff_reports(first, other)
    assert len(diff_reports(first, other, across_models=True)) == len(first.gates) + 1


def test_reports_of_other_versions_are_compared_by_weights_alone() -> None:
    """With another version of a library its modules have other settings and other code."""

    def report(hashed: str, version: str) -> rs.Validation:
        made = fake_validation()
        return rs.Validation(made.verdict, made.gates, made.tables,
                             {**made.manifest, "standing": hashed, "versions": {"torch": version}})  # fmt: skip

    assert len(diff_reports(report("a", "1"), report("b", "2"))) > 0
    assert len(diff_reports(report("a", "1"), report("a", "1"))) > 0
    with pytest.raises(ArgumentError, match=r"got a and b\. Validate anew"):
        diff_reports(report("a", "1"), report("b", "1"))


# --- runs ---------------------------------------------------------------------------------------

PLAN = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}}
OTHER = rs.Prompt(ids=[1, 2], target=3)


@pytest.mark.parametrize("name", [one for one in BESIDE if one != "an entry of the config"])
def test_a_run_is_not_resumed_with_other_modules_hooks_or_settings(name: str, module: Any, tmp_path: Path) -> None:
    model = rs.load(module)
    rs.run(model, [PROMPT, OTHER], PLAN, out=tmp_path / "run", progress=False)
    before = sorted((one.name, one.read_bytes()) for one in (tmp_path / "run").rglob("*.parquet"))
    BESIDE[name](module)
    with pytest.raises(RunError, match="was begun with other modules, hooks or settings of LlamaForCausalLM"):
        rs.run(model, [PROMPT, OTHER], PLAN, out=tmp_path / "run", progress=False)
    assert sorted((one.name, one.read_bytes()) for one in (tmp_path / "run").rglob("*.parquet")) == before


def test_a_run_is_resumed_by_the_same_model_in_another_object(tmp_path: Path) -> None:
    module = tiny.build("llama", torch.float32)
    rs.run(rs.load(module), [PROMPT], PLAN, out=tmp_path / "run", progress=False)
    module.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="no readable tokenizer"):
        again = rs.load(str(tmp_path / "model"))
    module.train()
    for model in (rs.load(module), again):
        assert len(rs.run(model, [PROMPT], PLAN, out=tmp_path / "run", progress=False).rows) == 3


# --- files that hold values ---------------------------------------------------------------------


def test_a_file_of_interventions_holds_values_and_no_weights(module: Any, tmp_path: Path) -> None:
    """What a donor had is in the file: it does to a changed model what it did to the one that it was saved with."""
    model = rs.load(module)
    rec = rs.record(model, PROMPT)
    donor = rs.record(model, rs.Prompt(ids=[1, 2, 3, 4], target=9))
    rs.save_interventions(tmp_path / "ops.json", rs.Patch("L0.mlp", donor), rec=rec)
    value = donor.layers[0].mlp_out
    element(module)
    (loaded,) = rs.load_interventions(tmp_path / "ops.json")
    assert torch.equal(loaded.values[0][0].to(value), value)
    effect = rs.intervene(rs.record(model, PROMPT), loaded)
    assert len(effect.ledger())
    assert effect.rec.fingerprint == model.fingerprint() != rec.fingerprint


def test_an_edit_read_from_a_file_refuses_weights_that_changed_since(module: Any, tmp_path: Path) -> None:
    model = rs.load(module)
    path = edit_of(model).save(tmp_path / "edit.safetensors")
    element(module)
    edit = rs.read_edit(model, path)
    for use in (lambda: edit.new_tensors(model), lambda: rs.audit(model, edit), lambda: rs.cast_survival(model, edit)):
        with pytest.raises(StaleRecordingError, match="this edit was made for other weights of"):
            use()


@pytest.mark.parametrize("use", [
    lambda model, edit: rs.validate(model, edit, probes(), budget=SMALL, general=False, progress=False),
    lambda model, edit: rs.exposure(model, edit, ["The w20 w21"], progress=False),
    lambda model, edit: rs.exposure_against_kl(model, edit, ["The w20 w21"], tokens=10),
], ids=["validate", "exposure", "exposure against KL"])  # fmt: skip
def test_no_verb_of_validating_takes_an_edit_of_other_weights(use: Any) -> None:
    model = rs.load(sharp("llama", torch.float32), tokenizer=words())
    edit = a_row(model, 1.0)
    element(model.module)
    with pytest.raises(StaleRecordingError, match="this edit was made for other weights of"):
        use(model, edit)


# --- what stands beside weights, as a hash ------------------------------------------------------


@pytest.mark.parametrize("name", [one for one in BESIDE if one != "an entry of the config"])
def test_a_standing_tells_modules_hooks_and_settings_apart(name: str, module: Any) -> None:
    before = standing(module)
    assert before.sure
    assert standing(tiny.build("llama", seed=1)) == before, "weights are nothing of it"
    assert standing(module.train()) == before, "nor is the mode"
    BESIDE[name](module)
    after = standing(module)
    assert after.hash != before.hash
    assert after.sure == (name in ("another activation", "another scaling"))


def test_hooks_that_transformers_leaves_behind_to_collect_attentions_change_nothing() -> None:
    module = tiny.build("llama")
    opened = rs.load(module)
    rec = rs.record(opened, PROMPT)
    before, stood, shadow = standing(module), opened.weights.structure(), opened.shadow
    module(torch.tensor([PROMPT.ids]), output_attentions=True, output_hidden_states=True)
    assert any(one._forward_hooks for one in module.modules())
    assert standing(module) == before
    assert opened.weights.structure() == stood
    assert opened.shadow is shadow
    assert len(rs.scores(rec)) > 0
    module.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert standing(module) != before
    assert opened.weights.structure() != stood


def test_a_standing_is_not_sure_of_what_cannot_be_told_by_its_contents(module: Any) -> None:
    names: dict[str, Any] = {
        "a function of this file": Calls(torch.relu), "a lambda": Calls(lambda x: x), "an object": Calls(object()),
    }  # fmt: skip
    sure = {}
    for name, made in names.items():
        module.model.layers[1].mlp.act_fn = made
        sure[name] = standing(module).sure
    assert sure == {"a function of this file": True, "a lambda": False, "an object": False}


def test_a_standing_holds_no_addresses(module: Any) -> None:
    """Two modules of the same make, whose functions, sets and tensors lie elsewhere."""
    found = []
    for one in (module, tiny.build("llama")):
        one.model.layers[0].mlp.act_fn = Calls(lambda x: x)
        one.model.layers[1].mlp.loose = torch.arange(3.0)
        one.model.layers[2].mlp.held = {"b": {"x", "y", "z"}, "a": (1, None, np.float32(2.0))}
        found.append(standing(one).hash)
    assert found[0] == found[1]
    module.model.layers[1].mlp.loose[1] = 7.0
    assert standing(module).hash != found[0]

"""A model whose layers lie on several devices says and does what the same model on one device does.

The second device is PyTorch's own "lazy" backend: it computes on the CPU, but it is another device type that refuses
every operation that mixes its tensors with the CPU's. A missing `.to(...)` is an error here, as it is between two GPUs.
"""

import os
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import torch._lazy.ts_backend
import validation_cases
from accelerate import dispatch_model
from torch import nn

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, LoadError, UnsupportedModelError

torch._lazy.ts_backend.init()
_SPLIT, _CHUNK, _UNBIND = torch.Tensor.split, torch.Tensor.chunk, torch.Tensor.unbind


def _slices(x: torch.Tensor, sizes: list[int], dim: int) -> tuple[torch.Tensor, ...]:
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=False))


def _split(x: torch.Tensor, size: Any = None, dim: int = 0, **named: Any) -> tuple[torch.Tensor, ...]:
    size = named.get("split_size", named.get("split_size_or_sections", size))
    n = x.shape[dim]
    if x.device.type != "lazy":
        return _SPLIT(x, size, dim)
    return _slices(x, [min(size, n - at) for at in range(0, n, size)] if isinstance(size, int) else list(size), dim)


def _chunk(x: torch.Tensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _unbind(x: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    return _UNBIND(x, dim) if x.device.type != "lazy" else tuple(x.select(dim, i) for i in range(x.shape[dim]))


@pytest.fixture(autouse=True, scope="module")
def whole_slices():
    """Split, chunk and unbind by slices: what the lazy backend's own give is on the CPU as soon as it is used."""
    with pytest.MonkeyPatch.context() as patch:
        for name, own in {"split": _split, "chunk": _chunk, "unbind": _unbind}.items():
            patch.setattr(torch.Tensor, name, own)
            patch.setattr(torch, name, own)
        patch.setattr(torch.Tensor, "addr_", lambda x, a, b: x.add_(a[:, None] * b))  # the backend has none
        yield


own_cache = validation_cases.own_cache
AWAY = torch.device("lazy", 0)
PROMPT = rs.Prompt(ids=[5, 4, 3, 2, 9], target=1, versus=[7])
OTHER = rs.Prompt(ids=[5, 8, 3, 2, 9], target=7, versus=[1])

# Where each part lies: H on the CPU, A away. The stream leaves and comes back; the unembedding is where the embedding
# is when they are tied, and where the norm is or not when they are not.
PLACES = {
    "llama": {"model.embed_tokens": "H", "model.rotary_emb": "H", "model.layers.0": "H", "model.layers.1": "A",
              "model.layers.2": "A", "model.norm": "A", "lm_head": "H"},
    "gpt2": {"transformer.wte": "H", "transformer.wpe": "H", "transformer.drop": "H", "transformer.h.0": "H",
             "transformer.h.1": "A", "transformer.h.2": "H", "transformer.ln_f": "A", "lm_head": "H"},
    "gemma2": {"model.embed_tokens": "H", "model.rotary_emb": "A", "model.layers.0": "A", "model.layers.1": "H",
               "model.layers.2": "A", "model.norm": "H", "lm_head": "H"},
    "qwen2_moe": {"model.embed_tokens": "H", "model.rotary_emb": "H", "model.layers.0": "H", "model.layers.1": "A",
                  "model.layers.2": "A", "model.layers.3": "H", "model.norm": "A", "lm_head": "H"},
}  # fmt: skip
FAMILIES = ("gpt2", "llama", "gemma2", "qwen2_moe")
# the same with the readout away: everything that is combined is combined there
PLACES["llama away"] = {path: "A" if path == "lm_head" else place for path, place in PLACES["llama"].items()}
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def shared_out(names: Iterable[Any], each: int = 2) -> list[Any]:
    """Each name with some of the families in turn, so that all of both are seen; all of each when thorough."""
    few = len(FAMILIES) if THOROUGH else each
    return [
        pytest.param(
            FAMILIES[(i * each + j) % len(FAMILIES)], name, id=f"{FAMILIES[(i * each + j) % len(FAMILIES)]}-{name}"
        )
        for i, name in enumerate(names)
        for j in range(few)
    ]


def built(family: str) -> nn.Module:
    if family == "qwen2_moe":
        return rs.tiny(family, dtype=torch.float64)
    kind = family.removesuffix(" away")
    return tiny.build(kind, tie_word_embeddings=kind != "llama")


def split(family: str) -> nn.Module:
    """A model on two devices, as accelerate dispatches it."""
    places = {path: AWAY if place == "A" else "cpu" for path, place in PLACES[family].items()}
    module = built(family)
    skipped = module._skip_keys_device_placement
    return dispatch_model(module, places, main_device="cpu", skip_keys=skipped, force_hooks=True)


@cache
def pair(family: str) -> tuple[rs.OpenedModel, rs.OpenedModel]:
    """The same model on one device and on two."""
    words = validation_cases.words()
    return rs.load(built(family), tokenizer=words), rs.load(split(family), tokenizer=words)


@cache
def recordings(family: str, prompt: rs.Prompt = PROMPT) -> list[rs.Recording]:
    return [rs.record(model, prompt, positions="all") for model in pair(family)]


def agree(one: Any, two: Any, most: float = 1e-4) -> None:
    """Tables, tensors, numbers and texts, and lists of them."""
    if isinstance(one, pd.DataFrame):
        assert list(one.columns) == list(two.columns)
        assert len(one) == len(two)
        for name in one:
            if name not in ("closure", "seconds", "frame", "row"):
                agree(one[name].to_numpy(), two[name].to_numpy(), most)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            agree(a, b, most)
    elif isinstance(one, torch.Tensor):
        agree(one.detach().cpu().double().numpy(), two.detach().cpu().double().numpy(), most)
    elif isinstance(one, (float, np.floating)) or (isinstance(one, np.ndarray) and one.dtype.kind == "f"):
        a, b = np.asarray(one), np.asarray(two)
        size = 1 + float(np.nanmax(np.abs(a[np.isfinite(a)]), initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=most * size)
    elif isinstance(one, np.ndarray):
        assert [str(x) for x in one.tolist()] == [str(x) for x in two.tolist()]
    else:
        assert str(one) == str(two)


def known(rec: rs.Recording) -> list[str]:
    """Every score but, for a mixture, the one that the lazy backend cannot go backwards for."""
    names = rs.describe_scores()["score"].tolist()
    return [name for name in names if not (rec.model.anatomy.mixture and name == "grad_times_activation")]


READ = {
    "decompose": lambda rec: rs.decompose(rec),
    "decompose heads": lambda rec: rs.decompose(rec, grain="head"),
    "decompose subvalues": lambda rec: rs.decompose(rec, grain="subvalue"),
    "lens": lambda rec: rs.lens(rec),
    "stream_bs": lambda rec: rs.stream_bs(rec),
    "predictions": lambda rec: rs.predictions(rec),
    "spectrum of a neuron": lambda rec: rs.spectrum(rec, "L0.mlp"),
    "spectrum of a head": lambda rec: rs.spectrum(rec, "L1.H1<2"),
    "scores": lambda rec: rs.scores(rec, score=known(rec)),
    "scores, own": lambda rec: rs.scores(rec, score=[s for s in known(rec) if s[:3] != "bs_"], norm="own"),
    "bounds": lambda rec: rs.scores(rec, bounds=True),
    "counts": lambda rec: rs.counts(rec),
    "curve": lambda rec: rs.probability_curve(rec, ["L0.H1", "L1.H1", "L2.mlp"]),
    "cumulated": lambda rec: rs.cumulated(rec, layer=1),
    "constants": lambda rec: rs.token_constants(rec),
    "attention sources": lambda rec: rs.attention_sources(rec, "L2.H1"),
    "cross layer": lambda rec: rs.cross_layer(rec, [1, 2]),
    "messages": lambda rec: rs.messages(rec, ["L0.H1", "L2.H1"]),
    "expanded message": lambda rec: rs.expand_message(rec, "L2.H1<2"),
}


@pytest.mark.parametrize(("family", "name"), shared_out(READ))
def test_what_is_read_is_the_same(family, name):
    agree(*[READ[name](rec) for rec in recordings(family)])


SCORES = rs.describe_scores()["score"].tolist()
KINDS = ["neuron", "head", "head_source", "attn_neuron", "attn_neuron_source", "layer"]


@pytest.mark.parametrize("worst", [False, True], ids=["best", "worst"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_the_same(family, kind, worst):
    first = KINDS.index(kind) + 3 * FAMILIES.index(family) + 7 * worst
    for score in SCORES if THOROUGH else [SCORES[first % len(SCORES)], SCORES[(first + 6) % len(SCORES)]]:
        found = [rs.locate(rec, k=3, kind=kind, score=score, worst=worst)
                 for rec in recordings(family) if score in known(rec)]  # fmt: skip
        agree(*[one.table[score].to_numpy() for one in found] or [None, None])
        assert len({one.proof for one in found}) <= 1


READERS = ["L2.N3", "L1.N3@2", "L2.H1.D2", "L2.H1.D2<2", "L2.H1", "L2.H1<2", "L2.attn", "L2.H1.query", "L2.H1<2.key",
           "L2.mlp", "unembed"]  # fmt: skip


@pytest.mark.parametrize(("family", "reader"), shared_out(READERS))
def test_sources_are_the_same(family, reader):
    grain = "layer" if READERS.index(reader) % 2 else "subvalue"
    if family == "qwen2_moe":
        reader = reader.replace("L2.N3", "L2.shared.N3")
    for options in ({"norm": "live"}, {"hops": 2, "budget": 3}) if THOROUGH else ({"norm": "live"},):
        tables = [rs.sources(rec, reader, grain=grain, top=4, **options) for rec in recordings(family)]
        agree(*[table["share"].abs().sort_values().to_numpy() for table in tables])


def operations(family: str) -> dict[str, Any]:
    n = "L2.shared.N{}" if family == "qwen2_moe" else "L2.N{}"
    return {
        "zero": rs.Zero([n.format(3), "L1.N5", "L0.N1"]),
        "scale": rs.Scale(["L0.H1", "L2.mlp"], -1.5, positions=[2, 4]),
        "one source": rs.Zero("L1.H1<2"),
        "coordinates": rs.Zero(["L0.H0.D2", "L2.H1.D1"]),
        "attend": rs.Attend("L1.H1<2", 0.3, renormalise=True),
        "key": rs.Zero(["L1.K0", "L2.V0", "L2.Q1"], positions=[1, 4]),
        "steer": rs.Steer("L1.resid_post", toward=5, away=6, times=2.0),
        "steer a head": rs.Steer("L2.H1", toward=5, times=2.0),
        "set": rs.Set("L1.N3", [2.0]),
        "clamp": rs.Clamp("L1.N3", 3.0),
        "patch": rs.Patch(["L0.mlp", "L1.attn", "L2.H0"], OTHER, positions="all"),
        "patch a state": rs.Patch("L1.resid_post", OTHER, positions=[1, 4]),
        "mean": rs.Mean(["L1.mlp", "L2.H1"], over=[PROMPT, OTHER]),
        "cut": rs.Cut("L0.mlp", "L2.H1", side="key"),
        "cut a query": rs.Cut("L1.attn", "L2.H1", side="query", norm="frozen"),
        "cut a value": rs.Cut("L0.H1", "L1.H1", side="value"),
        "cut neurons": rs.Cut("L0.mlp", n.format(5), norm="frozen"),
        "cut from neurons": rs.Cut("L1.N3", "L2.mlp"),
        "cut a sublayer": rs.Cut("embed", "L1.attn"),
        "cut unembed": rs.Cut("L0.mlp", "unembed"),
        "along an edge": rs.Patch("L0.mlp->L2.H1.value", OTHER),
        "embedding": rs.Scale("embed", 0.5),
    }


OPERATIONS = tuple(operations("llama"))


@pytest.mark.parametrize(("family", "name"), shared_out(OPERATIONS))
def test_effects_are_the_same(family, name):
    op = operations(family)[name]
    one, two = [rs.intervene(rec, op) for rec in recordings(family)]
    agree(one.table, two.table)
    agree(one.ledger(), two.ledger())
    agree([one.after.bs], [two.after.bs])


@pytest.mark.parametrize(("measure", "frame"), [("all", "auto"), ("all", "full"), ("bs", "auto")])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_are_the_same(family, measure, frame):
    rows = [*operations(family).values(), rs.Zero("L1.N1"), rs.Zero("L1.N2"), rs.Zero("L2.H0", positions=[3])]
    agree(*[rs.sweep(rec, rows, measure=measure, frame=frame) for rec in recordings(family)])


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_patching_and_additivity_are_the_same(family):
    recs = recordings(family)
    agree(*[rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H0,1", positions="each")) for rec in recs])
    pairs = zip(recs, recordings(family, OTHER), strict=True)
    agree(*[rs.patching(clean, corrupt, ["L*.resid_pre", "L1.H1", "L2.mlp"]) for clean, corrupt in pairs])
    agree(*[rs.additivity(rec, [rs.Zero("L0.mlp"), rs.Zero("L2.attn")]) for rec in recs])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same(family):
    ops = [rs.Zero("L1.attn", positions="all"), rs.Cut("L0.mlp", "L2.H1"), rs.Steer("L2.resid_post", toward=5)]
    made = []
    for model in pair(family):
        with rs.under(model, ops) as altered:
            made.append([altered.generate([5, 4, 3], max_new_tokens=3), altered.forward([5, 4, 3]).logits])
    agree(*made)


@pytest.mark.parametrize("family", FAMILIES if THOROUGH else FAMILIES[:1])
def test_graphs_and_blame_are_the_same(family):
    graphs = [rs.source_graph(rec, nodes=8) for rec in recordings(family)]
    for name in ("nodes", "edges"):
        agree(*[getattr(graph, name) for graph in graphs])
    agree(*[rs.verify(graph, edges=3).table for graph in graphs])
    agree(*[rs.faithfulness(graph) for graph in graphs])
    best, second = recordings(family)[0].bs_values.topk(2).indices.tolist()
    settings = {"k": 1, "readers": 1, "limit": 3, "draws": 1, "pool": 4, "progress": False}
    found = [rs.blame(rec, best, second, **settings) for rec in recordings(family)]
    agree(*[one.ledger for one in found])
    agree(*[one.operations for one in found])


WEIGHTS = {
    "check": lambda model: rs.check(model)[["line", "identity", "ok"]],
    "copying": lambda model: rs.copying(model),
    "ov": lambda model: rs.ov_tokens(model, ["L0.H1", "L2.H1"], [5, 6], top=3),
    "qk": lambda model: rs.qk_tokens(model, ["L0.H1", "L2.H1"], [5, 6], top=3),
    "composition": lambda model: rs.composition(model),
    "patterns": lambda model: rs.head_patterns(model, n=2, lengths=(4, 6)),
    "memory": lambda model: rs.neuron_memory(model, ["L0.N3", "L1.N4"], [PROMPT, OTHER], top=3, values=3).values,
    "queries": lambda model: rs.query_subvalues(rs.record(model, PROMPT, positions="all"), ["L1.N3", "L1.N4"], k=3),
    "trials": lambda model: rs.addition_test(model, [PROMPT], k=2, scores=["bs_target", "leave_one_out"]),
    "truth": lambda model: rs.score_against_effect(rs.record(model, PROMPT), best=3, random=5, scores="bs_target"),
}


@pytest.mark.parametrize(("family", "name"), shared_out(WEIGHTS, 1))
def test_what_weights_say_is_the_same(family, name):
    agree(*[WEIGHTS[name](model) for model in pair(family)])


FACT = validation_cases.FACT
FITTED: dict[str, Any] = {"steps": 2, "prefixes": ("", "The w30 w31"), "progress": False}
EDITS = {
    "coefficients": lambda model: rs.edit_coefficients(model, ["L0.N3", "L1.H1", "L1.N3"], 0.3),
    "value rows": lambda model: rs.edit_value_rows(
        model, ["L0.N3", "L1.N3"], old=" Paris", new=" Rome", l1=0.0, l2=3.0
    ),
    "rank one": lambda model: rs.edit_rank_one(model, FACT, layer=1, **FITTED),
    "least squares": lambda model: rs.edit_least_squares(model, [FACT], layers=[1], **FITTED),
}


@pytest.mark.parametrize(("family", "name"), shared_out(EDITS, 2))
def test_edits_do_the_same(family, name):
    if family == "qwen2_moe" and name in ("rank one", "least squares"):
        pytest.skip("the lazy backend cannot go backwards through experts")
    made = []
    for model in pair(family):
        edit = EDITS[name](model)
        before = model.fingerprint()
        with edit.applied(model) as edited:
            rec = rs.record(edited, PROMPT)
            made.append([rec.bs_values, rs.decompose(rec), rs.intervene(rec, rs.Zero("L1.mlp")).table])
        made[-1].append(rs.audit(model, edit)["tensors"].select_dtypes("number"))
        assert model.fingerprint() == before
    agree(*made)


@pytest.mark.parametrize("family", FAMILIES if THOROUGH else FAMILIES[:1])
def test_validation_comes_to_the_same(family):
    made = []
    for model in pair(family):
        report = validation_cases.quick(model, validation_cases.a_row(model, 3.0))
        made.append([report.verdict, report.gates[["gate", "state"]]])
    agree(*made)


def test_a_readout_on_the_other_device_reads_the_same():
    one, two = recordings("llama away")
    assert two.model.device == AWAY
    for made in (rs.decompose, rs.lens, lambda rec: rs.locate(rec, k=3).table,
                 lambda rec: rs.locate(rec, k=3, kind="head_source", worst=True).table,
                 lambda rec: rs.sources(rec, "L2.H1", top=3), lambda rec: rs.intervene(rec, rs.Zero("L1.H1")).table,
                 lambda rec: rs.sweep(rec, [rs.Zero("L1.N3"), rs.Cut("L0.mlp", "L2.H1")], measure="all")):  # fmt: skip
        agree(made(one), made(two))


def test_a_dispatched_model_is_copied_and_left_as_it_was():
    module = split("gpt2")
    before = {name: (id(t), t._version) for name, t in module.named_parameters()}
    forwards = {name: id(one.__dict__.get("forward")) for name, one in module.named_modules()}
    model = rs.load(module)
    rs.record(model, PROMPT)
    shadow, own = model.shadow, dict(module.named_modules())
    for name, one in shadow.named_modules():
        bound = one.__dict__.get("forward")
        if isinstance(bound, partial):  # nnsight puts its own forward over some
            assert bound.args[0] is one
            assert one._old_forward.__self__ is one
            assert one._hf_hook is not own[name]._hf_hook
    assert all(isinstance(one.__dict__["forward"], partial) for one in own.values() if hasattr(one, "_hf_hook"))
    assert all(a is b for a, b in zip(shadow.parameters(), module.parameters(), strict=True))
    assert "to" in module.__dict__
    assert "to" not in shadow.__dict__
    assert before == {name: (id(t), t._version) for name, t in module.named_parameters()}
    assert forwards == {name: id(one.__dict__.get("forward")) for name, one in module.named_modules()}


def test_a_write_on_the_other_device_is_seen():
    model = rs.load(split("gpt2"))
    rec = rs.record(model, PROMPT)
    before = model.fingerprint()
    with torch.no_grad():
        model.part(1, "mlp_out").weight.mul_(1.5)
    assert model.fingerprint() != before
    with pytest.raises(rs.StaleRecordingError):
        rs.locate(rec)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.build("llama", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(kind: type[Exception], *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        rs.load(*args, **options)
    return str(raised.value)


NO_TOKENIZER = pytest.mark.filterwarnings("ignore:.*no readable tokenizer")


@NO_TOKENIZER
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"": "cpu"}], ids=str)
def test_a_checkpoint_is_spread_as_asked(saved, device_map):
    model = rs.load(saved, device_map=device_map, max_memory={"cpu": "1GiB"})
    agree(rs.decompose(rs.record(model, PROMPT)), rs.decompose(rs.record(rs.load(saved), PROMPT)))


def test_offloaded_parts_are_named(tmp_path):
    places = {path: "disk" if path == "model.layers.1" else "cpu" for path in PLACES["llama"]}
    module = dispatch_model(built("llama"), places, offload_dir=tmp_path)
    said = refusal(LoadError, module)
    assert "is offloaded in part to the CPU or to disk (model.layers.1.self_attn.q_proj, " in said
    assert "max_memory" in said


def test_a_block_on_two_devices_is_refused():
    module = built("llama")
    module.model.layers[1].mlp.to(AWAY)
    said = refusal(UnsupportedModelError, module)
    assert said.startswith("model.layers.1 of LlamaForCausalLM must lie on one device; it lies on cpu and lazy:0.")


@pytest.mark.parametrize(("options", "said"), [
    ({"device_map": "auto", "device": "cpu"}, "`device` must be left out with device_map"),
    ({"max_memory": {0: "1GiB"}}, "`max_memory` must be given with device_map only"),
    ({"device_map": "even"}, "`device_map` must be one of auto, balanced, sequential"),
    ({"device_map": {}}, "`device_map` must be a dict of module paths and devices"),
    ({"device_map": {"model": "nowhere"}}, "`device` must be a torch device"),
    ({"device_map": "auto", "max_memory": "1GiB"}, "`max_memory` must be a dict"),
], ids=str)  # fmt: skip
def test_a_bad_map_is_refused(tmp_path, options, said):
    assert refusal(ArgumentError, tmp_path, **options).startswith(said)


def test_an_object_is_not_spread():
    said = refusal(ArgumentError, tiny.build("llama"), device_map="auto")
    assert said.startswith("`device_map` must be left out for a model object")


def test_a_gguf_file_is_not_spread(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "device_map does not apply to it" in refusal(LoadError, tmp_path / "a.gguf", device_map="auto")


def test_spreading_without_accelerate_says_what_to_install(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'resid-surgery[large]'" in refusal(LoadError, saved, device_map="auto")

"""Remote runs: the same results, bit for bit, by way of a request that holds what writes need and no weights.

``remote="local"`` serialises every forward and rebuilds it where this library cannot be imported. `far_end` goes the
whole way: a server in another process, which has neither this library nor its test helpers.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnsight
import pytest
import torch
from nnsight.schema.request import RequestModel
from tiny import build, shared

import resid_surgery as rs
from resid_surgery.models import zoo
from resid_surgery.models.remoting import plain, rebuilt
from resid_surgery.models.taps import Tap

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")
FACT = rs.Prompt(ids=[1, 2, 3, 4, 9, 11], target=5, versus=[8])
OTHER = rs.Prompt(ids=[1, 2, 3, 7, 9, 11], target=5, versus=[8])


@pytest.fixture
def requests(monkeypatch: Any) -> list[bytes]:
    """Every request that is serialised during a test, as it would be sent."""
    made: list[bytes] = []
    serialize = RequestModel.serialize.__func__  # type: ignore[attr-defined]

    def kept(cls: Any, tracer: Any, compress: bool = False) -> bytes:
        blob: bytes = serialize(cls, tracer, compress)
        made.append(blob)
        return blob

    monkeypatch.setattr(RequestModel, "serialize", classmethod(kept))
    return made


def operations(rec: rs.Recording) -> dict[str, Any]:
    """Every kind of operation, and every kind of place."""
    d = rec.model.anatomy.d_model
    found = {
        "neuron": rs.Zero("L1.N3"),
        "earlier neuron": rs.Zero("L0.N3", positions=[2]),
        "sublayer": rs.Scale("L1.mlp", 0.5),
        "state": rs.Steer("L1.resid_post", torch.ones(d)),
        "middle": rs.Scale("L1.resid_mid", 0.5),
        "head": rs.Zero("L1.H1"),
        "source": rs.Zero("L1.H1<2"),
        "attention neuron": rs.Zero("L1.H1.D2"),
        "value": rs.Scale("L1.V0", 0.5),
        "query": rs.Zero("L1.Q1"),
        "attend": rs.Attend("L1.H1<2", 0.7),
        "set": rs.Set(["L1.N3"], [[1.0]]),
        "patch": rs.Patch("L1.resid_pre", OTHER),
        "clamp": rs.Clamp("L1.N3", 0.25),
        "mean": rs.Mean("L1.mlp", [OTHER]),
        "cut neuron": rs.Cut("L0.N3", "L1.N3"),
        "cut query": rs.Cut("L0.mlp", "L1.H1", side="query"),
        "cut key": rs.Cut("L0.mlp", "L1.H1", side="key"),
        "cut value": rs.Cut("L0.mlp", "L2.H1", side="value"),
        "cut layer": rs.Cut("L0.attn", "L2.mlp"),
        "cut unembed": rs.Cut("L0.mlp", "unembed"),
    }
    if rec.model.anatomy.parallel:
        del found["middle"]
    if rec.model.anatomy.mixture:
        expert = f"L1.E{rec.layers[1].groups[0].expert}.N2"
        found = {name: op for name, op in found.items() if "neuron" not in name and name not in ("set", "clamp")}
        found |= {"expert": rs.Zero(expert), "half": rs.Scale(expert, 0.5), "cut expert": rs.Cut("L0.attn", expert)}
    return found


def sweep_rows(rec: rs.Recording) -> list[Any]:
    neurons = [] if rec.model.anatomy.mixture else ["L*.N1:4"]
    rows = rs.grid(rec, rs.Zero, [*neurons, "L*.H*", "L*.mlp"], positions="target")
    return [*rows, rs.Zero("L1.attn", positions=[3]), rs.Cut("L0.mlp", "L1.H1"), rs.Cut("L0.mlp", "unembed")]


def assert_same_effect(here: Any, there: Any, name: str) -> None:
    assert here.table.equals(there.table), name
    assert here.ledger().equals(there.ledger()), name
    assert torch.equal(here.after.logits, there.after.logits), name


def assert_all_travel(rec: rs.Recording, where: str) -> None:
    ops = operations(rec)
    here, there = rs.intervene_each(rec, [*ops.values()]), rs.intervene_each(rec, [*ops.values()], remote=where)
    for name, one, other in zip(ops, here, there, strict=True):
        assert_same_effect(one, other, name)


def same_recording(a: rs.Recording, b: rs.Recording) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsed_recording_is_the_local_one_and_did_travel(family, requests):
    model = shared(family)
    for positions in ("target", "all"):
        here = rs.record(model, FACT, positions=positions)
        assert not requests
        there = rs.record(model, FACT, positions=positions, remote="local")
        assert len(requests) == 1
        assert same_recording(here, there)
        requests.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_operation_travels(family, requests):
    rec = rs.record(shared(family), FACT)
    assert_all_travel(rec, "local")
    assert requests


def test_operations_on_a_mixture_travel(requests):
    model = rs.load(zoo.tiny("mixtral", dtype=torch.float64))
    assert_all_travel(rs.record(model, FACT, remote="local"), "local")
    assert len(requests) >= 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frame", ["auto", "full"])
def test_a_rehearsed_sweep_is_the_local_one(family, frame, requests):
    rec = rs.record(shared(family), FACT)
    rows = sweep_rows(rec)
    here = rs.sweep(rec, rows, frame=frame)
    assert not requests
    there = rs.sweep(rec, rows, frame=frame, remote="local")
    assert requests
    assert here.equals(there)
    if frame == "auto" and family == "llama":
        assert set(there["frame"]) == {"packed"}


def test_patching_and_additivity_pass_it_on(requests):
    clean, corrupt = (rs.record(shared("gpt2"), one, positions="all") for one in (FACT, OTHER))
    ops = [rs.Zero(["L1.N2", "L0.H1"])]
    for verb in (
        lambda where: rs.patching(clean, corrupt, "L*.resid_pre", positions="all", remote=where),
        lambda where: rs.additivity(clean, ops, remote=where),
    ):
        here = verb(None)
        assert not requests
        assert here.equals(verb("local"))
        assert requests
        requests.clear()


def test_verbs_of_other_rooms_pass_it_on(requests):
    model = shared("llama")
    rec = rs.record(model, FACT, positions="all")
    graph, scores = rs.source_graph(rec, nodes=15), ["log_prob_increase", "coefficient"]
    few = {"few": {"neuron": 3}}
    for verb in (
        lambda where: rs.locate_many(model, [FACT, OTHER], k=3, remote=where),
        lambda where: rs.score_against_effect(rec, scores=scores, best=3, random=3, remote=where),
        lambda where: rs.addition_test(model, [FACT], scores=scores, k=3, remote=where),
        lambda where: rs.ablation_test(model, [FACT], sets=few, scores=scores, draws=1, remote=where),
        lambda where: rs.verify(graph, edges=5, remote=where).table,
        lambda where: rs.head_patterns(model, 2, (3, 8), remote=where),
        lambda where: rs.neuron_memory(model, "L1.N2", [FACT, OTHER], remote=where).triggers,
    ):
        here = verb(None)
        assert not requests
        assert here.equals(verb("local"))
        assert requests
        requests.clear()


def test_a_request_holds_no_weights_and_does_not_grow_with_them(requests):
    """Three times as wide, nine times the weights, and the same request but for what is read and steered."""
    for width in (24, 96):
        model = rs.load(build("llama", hidden_size=width, intermediate_size=20 * width, vocab_size=3000))
        rec = rs.record(model, FACT, remote="local")
        rs.intervene(rec, rs.Zero(["L1.N3", "L0.H1"]), remote="local")
        held = [t.detach().numpy().tobytes()[:64] for t in model.weights.tensors() if t.numel() >= 64]
        assert held
        assert not [one for one in held for blob in requests[-2:] if one in blob]
    sizes = [len(blob) for blob in requests]
    assert abs(sizes[2] - sizes[0]) < 2_000
    assert abs(sizes[3] - sizes[1]) < 2_000
    weights = sum(t.numel() * t.element_size() for t in model.weights.tensors())
    assert max(sizes) < 400_000 < weights


def test_a_request_names_only_what_a_server_has(requests):
    rec = rs.record(shared("llama"), FACT, remote="local")
    rs.intervene(rec, rs.Cut("L0.mlp", "L1.H1", side="key"), remote="local")
    for blob in requests:
        assert b"pandas" not in blob
        assert b"safetensors" not in blob
        assert b"Recording" not in blob.replace(b"stream.recording", b"")


def test_the_users_model_and_process_stay_as_they_were():
    module = build("llama")
    before = {name: dict(sub.__dict__) for name, sub in module.named_modules()}
    model, path = rs.load(module), list(sys.path)
    fingerprint = model.fingerprint()
    rs.sweep(rs.record(model, FACT, remote="local"), [rs.Zero("L1.N3")], remote="local")
    assert sys.path == path
    assert model.fingerprint() == fingerprint
    assert {name: set(sub.__dict__) for name, sub in module.named_modules()} == {n: set(d) for n, d in before.items()}
    assert not any(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("where", [3, "here", "ftp://x", "http://", ["local"], 1.0])
def test_another_place_is_refused(where):
    with pytest.raises(rs.ArgumentError, match="`remote` must be None, False"):
        rs.record(shared("llama"), FACT, remote=where)


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_what_no_server_knows_by_name_is_refused_before_anything_is_sent(requests, tmp_path):
    module = build("llama")
    with pytest.raises(rs.UnsupportedModelError, match="cannot run remotely: it was not read from the hub"):
        rs.record(rs.load(module), FACT, remote=True)
    module.save_pretrained(tmp_path)
    folder = rs.load(str(tmp_path))
    with pytest.raises(rs.UnsupportedModelError, match="which is no hub id"):
        rs.record(folder, FACT, remote="http://localhost:1")
    module.config._name_or_path = "someone/tiny"
    named = rs.load(module)
    with torch.no_grad():
        module.get_output_embeddings().weight[3] += 1
    with pytest.raises(rs.UnsupportedModelError, match="its weights were changed in memory"):
        rs.record(named, FACT, remote="http://localhost:1")
    with torch.no_grad():
        module.get_output_embeddings().weight[3] -= 1
    edit = rs.edit_coefficients(named, "L1.N3", 0.0)
    with edit.applied(named) as edited, pytest.raises(rs.UnsupportedModelError, match="it is an edited model"):
        rs.record(edited, FACT, remote="http://localhost:1")
    assert not requests


# --- weights, hooks and settings that changed since the model was loaded -------------------------


def _element(module):
    module.model.layers[1].mlp.down_proj.weight.data[7, 3] += 1.0


def _copied(module):
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(1.01)


def _adapted(module):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))


def _doubled_queries(module):
    return module.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _, __, out: out * 2)


def _other_scaling(module):
    for layer in module.model.layers:
        layer.self_attn.scaling *= 2


def _other_activation(module):
    module.model.layers[1].mlp.act_fn = torch.nn.GELU()


WEIGHTS = {"one element through .data": _element, "a product in place": _copied}
BESIDE = {
    "a hook": _doubled_queries,
    "a setting": _other_scaling,
    "a module": _other_activation,
    "an adapter": _adapted,
}
NO_LEDGER = {
    "another eps": lambda module: setattr(module.model.norm, "variance_epsilon", 0.5),
    "a hook on a writer": lambda module: module.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _, __, out: out * 2
    ),
}


@pytest.mark.parametrize("name", [*WEIGHTS, *BESIDE])
def test_a_recording_made_remotely_is_stale_after_a_change_and_a_new_one_is_of_the_changed_model(name, requests):
    module = build("llama")
    model = rs.load(module)
    rec = rs.record(model, FACT, remote="local")
    (WEIGHTS | BESIDE)[name](module)
    sent = len(requests)
    for use in (
        lambda: rs.decompose(rec),
        lambda: rs.intervene(rec, rs.Zero("L1.N3"), remote="local"),
        lambda: rs.sweep(rec, [rs.Zero("L1.N3")], remote="local"),
        lambda: rs.intervene(rs.record(model, FACT, remote="local"), rs.Patch("L1.mlp", rec), remote="local"),
    ):
        with pytest.raises(rs.StaleRecordingError, match=r"changed since|`donor` was recorded with other weights of"):
            use()
    assert len(requests) > sent, "new recordings travel"
    again = rs.record(model, FACT, remote="local")
    with torch.no_grad():
        said = module(torch.tensor([FACT.ids])).logits[0, -1]
    assert (again.logits - said).abs().max() < 1e-12
    assert same_recording(again, rs.record(model, FACT))
    rs.decompose(again)


@pytest.mark.parametrize("name", NO_LEDGER)
def test_a_model_that_is_no_ledger_any_more_is_refused_remotely_too(name, requests):
    module = build("llama")
    model = rs.load(module)
    few = [FACT, FACT]
    rec = rs.record(model, FACT, remote="local")
    NO_LEDGER[name](module)
    requests.clear()
    for use in (
        lambda: rs.record(model, FACT, remote="local"),
        lambda: list(rs.record_each(model, few, remote="local")),
        lambda: rs.neuron_memory(model, "L1.N2", few, remote="local", progress=False),
        lambda: rs.intervene(rec, rs.Zero("L1.N3"), remote="local"),
        lambda: rs.record(model, FACT, remote="local"),
    ):
        with pytest.raises(
            rs.ClosureError, match="closed when it was loaded; modules, hooks or settings of it changed"
        ):
            use()


def test_a_change_between_two_prompts_of_one_remote_verb_is_noticed(requests):
    module = build("llama")
    model = rs.load(module)
    recs = rs.record_each(model, [FACT, OTHER], batch=1, remote="local")
    next(recs)
    NO_LEDGER["another eps"](module)
    with pytest.raises(rs.ClosureError, match="modules, hooks or settings of it changed since"):
        next(recs)


@pytest.mark.parametrize("name", BESIDE)
def test_no_server_is_asked_for_a_model_that_is_not_the_hubs_any_more(name, requests, monkeypatch):
    """What a hook does, or an adapter that is on, stays in this process: the server's model is another one."""
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    module = build("llama")
    module.config._name_or_path = "someone/tiny"
    model = rs.load(module)
    rec = rs.record(model, FACT)
    handle = BESIDE[name](module)
    what = "weights" if name == "an adapter" else "modules, hooks or settings"
    for use in (lambda: rs.record(model, FACT, remote=True), lambda: rs.sweep(rec, [rs.Zero("L1.N3")], remote=True)):
        with pytest.raises(rs.UnsupportedModelError, match=f"cannot run remotely: its {what} were changed in memory"):
            use()
    if handle is not None:
        handle.remove()
        with pytest.raises(rs.ArgumentError, match="needs a key"):  # the next thing that is looked at
            rs.record(model, FACT, remote=True)
    assert not requests


def test_no_server_is_asked_for_a_model_that_came_with_a_hook(requests):
    module = build("llama")
    module.config._name_or_path = "someone/tiny"
    _doubled_queries(module)
    with pytest.raises(rs.UnsupportedModelError, match="it has forward hooks, which stay in this process"):
        rs.record(rs.load(module), FACT, remote="http://localhost:1")
    assert not requests


def test_an_edited_model_can_be_rehearsed(requests):
    model = shared("llama")
    edit = rs.edit_coefficients(model, "L1.N3", 0.0)
    with edit.applied(model) as edited:
        assert same_recording(rs.record(edited, FACT), rs.record(edited, FACT, remote="local"))
    assert len(requests) == 1


def test_without_a_key_nothing_is_sent(requests, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    module = build("llama")
    module.config._name_or_path = "someone/tiny"
    with pytest.raises(rs.ArgumentError, match="needs a key of the National Deep Inference Fabric: set NDIF_API_KEY"):
        rs.record(rs.load(module), FACT, remote=True)
    assert not requests


def test_a_server_that_is_not_there_is_one_clear_line(monkeypatch):
    named_on_the_hub(monkeypatch)
    module = build("llama")
    module.config._name_or_path = "someone/tiny"
    with pytest.raises(rs.RunError, match=r"^a forward of tiny with remote='http://127.0.0.1:9' failed \(\w+: .+\)\.$"):
        rs.record(rs.load(module), FACT, remote="http://127.0.0.1:9")


def test_backward_passes_are_refused(requests):
    model = shared("llama")
    with pytest.raises(rs.UnsupportedModelError, match="a backward pass of LlamaForCausalLM cannot be remote"):
        rs.score_against_effect(
            rs.record(model, FACT), scores=["grad_times_activation"], best=2, random=2, remote="local"
        )


def test_what_a_write_raises_is_raised():
    rec = rs.record(shared("llama"), FACT)
    with pytest.raises(rs.InterventionError) as here:
        rs.intervene(rec, rs.Scale("L1.resid_pre", 1e200))
    with pytest.raises(rs.InterventionError) as there:
        rs.intervene(rec, rs.Scale("L1.resid_pre", 1e200), remote="local")
    assert str(here.value) == str(there.value)


def test_plain_and_rebuilt():
    value = {Tap("coef", 3): [torch.arange(3.0), (1, None, "a")], (0, 2): {}}
    again = rebuilt(plain(value))
    assert list(again) == list(value)
    assert torch.equal(again[Tap("coef", 3)][0], torch.arange(3.0))
    assert again[Tap("coef", 3)][1] == (1, None, "a")
    with pytest.raises(rs.ResidSurgeryError, match="no value of this library"):
        rebuilt(("value", "subprocess", "Popen", {}))


def test_an_open_model_is_not_pickled_by_accident():
    import cloudpickle

    with pytest.raises(rs.ResidSurgeryError, match="cannot be pickled: it is an open model"):
        cloudpickle.dumps(shared("llama"))


def named_on_the_hub(monkeypatch: Any) -> None:
    """The hub knows every model by the name that it is asked for."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **_: SimpleNamespace(id=name))


ELSEWHERE = """
import sys, types, pytest, torch, huggingface_hub, nnsight
from transformers import AutoModelForCausalLM
sys.path.insert(0, {tests!r})
huggingface_hub.HfApi.model_info = lambda self, name, **_: types.SimpleNamespace(id=name)
nnsight.CONFIG.APP.REMOTE_LOGGING = False
import resid_surgery as rs, test_remote as t
def opened(name, called):
    where = {folder!r} + "/" + name
    module = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float64, attn_implementation="eager")
    module.config._name_or_path = "someone/" + called
    return rs.load(module.eval())
for family in {families!r}:
    rec = rs.record(opened(family, family), t.FACT)
    assert t.same_recording(rec, rs.record(rec.model, t.FACT, remote={address!r}))
    t.assert_all_travel(rec, {address!r})
    for frame in ("auto", "full"):
        rows = t.sweep_rows(rec)
        assert rs.sweep(rec, rows, frame=frame).equals(rs.sweep(rec, rows, frame=frame, remote={address!r})), frame
with pytest.raises(rs.RunError, match="the server's other is not the one that is open here: .* differs .torch.float64"):
    rs.record(opened("llama", "other"), t.FACT, remote={address!r})
with pytest.raises(rs.RunError, match="failed .RemoteError: KeyError: 'someone/nobody'"):
    rs.record(opened("llama", "nobody"), t.FACT, remote={address!r})
print("done")
"""


def test_a_server_that_knows_nothing_of_this_library_gives_the_same(tmp_path):
    """Every kind of operation, and sweeps, in another process; a third one asks, as checks of shapes are not shipped.
    A server that holds another model under the name is noticed."""
    tests, port, folder = Path(__file__).parent, tmp_path / "port", tmp_path / "models"
    made = {"llama": build("llama"), "gemma2": build("gemma2"), "other": build("llama", seed=1)}
    for name, module in (made | {"mixtral": zoo.tiny("mixtral", dtype=torch.float64)}).items():
        module.save_pretrained(folder / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, str(tests / "far_end.py"), str(folder), str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 120
        while not port.exists():
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        asked = ELSEWHERE.format(
            tests=str(tests), folder=str(folder), families=("llama", "gemma2", "mixtral"),
            address=f"http://127.0.0.1:{port.read_text()}",
        )  # fmt: skip
        # A file: from Python 3.13 on the text of `-c` is taken for the source of every function without a file.
        (tmp_path / "asked.py").write_text(asked)
        command = [sys.executable, str(tmp_path / "asked.py")]
        out = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert out.stdout.strip().endswith("done"), out.stderr[-3000:] + (tmp_path / "log").read_text()[-3000:]
    finally:
        server.kill()
        server.wait()


@pytest.mark.real
def test_the_real_model_rehearsed(paris, requests):
    ops = [rs.Zero("L27.N846"), rs.Scale("L20:24.attn", 0.5)]
    here = rs.intervene(paris, ops)
    assert same_recording(paris, rs.record(paris.model, paris.prompt.source, remote="local"))
    assert_same_effect(here, rs.intervene(paris, ops, remote="local"), "real")
    rows = rs.grid(paris, rs.Zero, "L25:30.H*")
    assert rs.sweep(paris, rows).equals(rs.sweep(paris, rows, remote="local"))
    assert len(requests) >= 3
    assert max(map(len, requests)) < 5e6

"""The documented table of conditions: each row of `.docs/errors.md` is provoked, and does what it says."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from fake_validation import fake_validation
from test_prompts import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast
from validation_cases import SMALL, probes, sharp, words

import resid_surgery as rs
from resid_surgery import errors
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import new_edit
from resid_surgery.models.zoo import tiny as of_type

PAGE = Path(__file__).parent.parent / ".docs" / "errors.md"
PROMPT = rs.Prompt(ids=[5, 6, 7, 8], target=9, versus=[10])
TEXT = "The capital of France is"
LAYERS = "model.layers.{}"
DOWN = "model.layers.1.mlp.down_proj"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    condition: str
    outcome: str
    message: str
    do: str


def rows() -> list[Row]:
    """The table of the page; a cell's code marks are not part of it."""
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found]
    assert all(len(one) == 4 for one in cells), [one for one in cells if len(one) != 4]
    return [Row(one[0], one[1], one[2].removeprefix("``").removesuffix("``").strip(), one[3])
            for one in cells if one[0] != "condition" and not set(one[0]) <= set("-")]  # fmt: skip


ROWS = {one.condition: one for one in rows()}


def llama(**changes: Any) -> Any:
    """A fresh loud model, tied, float64."""
    return tiny.build("llama", **changes)


# --- every verb of the spine --------------------------------------------------------------------


def spine(model: Any, folder: Path, rec: Any = None) -> dict[str, Any]:
    """What every verb of the spine says of a prompt: tables and tensors."""
    rec = rec or rs.record(model, PROMPT, positions="all")
    path = f"{model.path(1, 'mlp_out')}.weight"
    wide, tall = (n for n in model.module.get_parameter(path).shape)
    axis = 1 if wide == model.anatomy.d_model else 0
    delta = torch.ones(1, model.anatomy.d_model, dtype=torch.float64)
    edit = new_edit(model, [Rows(path, (), (wide, tall), (axis,), torch.tensor([[3]]), delta)], method="a row")
    with edit.applied(model) as edited:
        after = rs.record(edited, PROMPT).logits
    with rs.under(model, rs.Zero("L1.mlp", positions="all")) as altered:
        generated = altered.generate([5, 6, 7], max_new_tokens=3)
    plan = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}}
    rs.run(model, [PROMPT], plan, out=folder / "run", progress=False)
    return {
        "record": rec.logits,
        "decompose": rs.decompose(rec, grain="subvalue"),
        "lens": rs.lens(rec),
        "scores": rs.scores(rec, bounds=True),
        "gradients": rs.scores(rec, score="grad_times_activation"),
        "locate": rs.locate(rec, k=3, worst=True).table,
        "sources": rs.sources(rec, ["L1.N0", "L2.N3"], norm="live"),
        "sources of a query": rs.sources(rec, "L1.H1", side="query"),
        "intervene": rs.intervene(rec, [rs.Zero("L0.N1", positions="all"), rs.Scale("L1.H0", 3.0)]).ledger(),
        "cut": rs.intervene(rec, rs.Cut("L0.mlp", "L1.N0")).table[["token_id", "bs_before", "bs_after", "direct"]],
        "sweep": rs.sweep(rec, [rs.Zero("L0.N1"), rs.Zero("L1.H0")], progress=False),
        "circuits": rs.copying(model, "L1.H1"),
        "an edit": after,
        "generate": generated,
        "run": rs.read_run(folder / "run")["log_prob"].to_frame(),
    }


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Every verb says the same, number for number."""
    assert set(one) == set(other)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            wanted = other[name].to(value)
            assert torch.allclose(value, wanted, rtol=tolerance, atol=tolerance), name
        else:
            pd.testing.assert_frame_equal(value, other[name], rtol=tolerance, atol=tolerance, obj=name)


def standing(module: Any) -> dict[str, Any]:
    """What a user could find changed in a module, and in torch."""
    return {
        "bytes": {n: t.detach().clone() for n, t in module.state_dict(keep_vars=True).items()},
        "tensors": {n: (id(p), p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        "modes": [one.training for one in module.modules()],
        "hooks": [[list(getattr(m, kind)) for kind in HOOKS] for m in module.modules()],
        "forwards": [id(m.__dict__.get("forward")) for m in module.modules()],
        "torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist()),
    }  # fmt: skip


def as_before(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Nothing of it changed."""
    assert {name for name in then if name != "bytes" and now[name] != then[name]} == set()
    assert all(torch.equal(now["bytes"][name], t) for name, t in then["bytes"].items())


@dataclass(frozen=True)
class Bench:
    """Good models and recordings to meet bad conditions with."""

    module: Any  # a llama, tied, float64
    plain: dict[str, Any]  # what its spine says
    model: Any
    rec: Any
    worded: Any  # the same model with a tokenizer of words
    edit: Any
    folder: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("conditions")
    module = llama()
    model = rs.load(module)
    edit = new_edit(model, [Rows(f"{DOWN}.weight", (), (24, 40), (1,), torch.tensor([[3]]),
                                 torch.ones(1, 24, dtype=torch.float64))], method="a row")  # fmt: skip
    worded = rs.load(module, tokenizer=word_tokenizer())
    return Bench(module, spine(model, folder), model, rs.record(model, PROMPT, positions="all"), worded, edit, folder)


# --- conditions that work -----------------------------------------------------------------------

Way = Callable[[Bench, Path], None]
WORKS: dict[str, Way] = {}


def works(condition: str) -> Callable[[Way], Way]:
    """The test of a row whose outcome is "works"."""

    def keep(way: Way) -> Way:
        assert condition not in WORKS
        WORKS[condition] = way
        return way

    return keep


def like_the_plain(bench: Bench, folder: Path, module: Any, tolerance: float = 1e-9) -> Any:
    """A model that must do in everything what the plain one does, and be left as it was."""
    then = standing(module)
    model = rs.load(module)
    same(spine(model, folder), bench.plain, tolerance)
    as_before(standing(module), then)
    return model


@works("model in training mode, with dropout")
def _(bench: Bench, folder: Path) -> None:
    module = llama(attention_dropout=0.5).train()
    like_the_plain(bench, folder, module)
    assert module.training


@works("inside torch.no_grad, inference_mode or enable_grad")
def _(bench: Bench, folder: Path) -> None:
    for way in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with way():
            same(spine(bench.model, folder / way.__name__), bench.plain)
    with torch.inference_mode():
        rec = rs.record(bench.model, PROMPT, positions="all")
    same(spine(bench.model, folder / "after", rec), bench.plain)


@works("a checkpoint loaded under torch.inference_mode")
def _(bench: Bench, folder: Path) -> None:
    bench.module.save_pretrained(folder / "saved")
    bench.worded.tokenizer.save_pretrained(folder / "saved")
    with torch.inference_mode():
        model = rs.load(folder / "saved")
    assert not any(one.is_inference() for one in model.module.parameters())
    another = 1e-5  # it runs another attention implementation
    same(spine(model, folder / "loaded"), spine(bench.worded, folder / "plain"), another)


@works("hooks on gradients, of parameters and of modules")
def _(bench: Bench, folder: Path) -> None:
    module, fired = llama(), []
    for one in module.parameters():
        one.register_hook(lambda _: fired.append("parameter"))
    module.get_submodule(DOWN).register_full_backward_hook(lambda *_: fired.append("module"))
    like_the_plain(bench, folder, module)
    assert fired == ["module"], "in the backward pass of the one score that needs gradients"


@works("forward hooks that only look on")
def _(bench: Bench, folder: Path) -> None:
    module, seen = llama(), []
    module.get_submodule(DOWN).register_forward_hook(lambda *_: seen.append(1))
    module.register_forward_pre_hook(lambda *_: None)
    model = like_the_plain(bench, folder, module)
    seen.clear()
    rs.record(model, PROMPT)
    assert len(seen) == 1
    handle = module.get_submodule(LAYERS.format(0)).register_forward_hook(lambda *_: seen.append(2))
    rs.record(model, PROMPT)
    assert seen.count(2) == 2, "the forward that proves the model anew, and the recording's"
    handle.remove()
    rs.record(model, PROMPT)
    assert seen.count(2) == 2


@works("torch's default dtype is another")
def _(bench: Bench, folder: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found = spine(rs.load(bench.module), folder / str(dtype))
        finally:
            torch.set_default_dtype(torch.float32)
        same(found, bench.plain)


@works("torch.use_deterministic_algorithms")
def _(bench: Bench, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        like_the_plain(bench, folder, bench.module)
    finally:
        torch.use_deterministic_algorithms(False)


@works("module.compile(), of the model or of a layer")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    module.compile(backend="eager")
    module.get_submodule(LAYERS.format(1)).compile(backend="eager")
    like_the_plain(bench, folder, module)


@works("torch.compile(model)")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(torch.compile(module, backend="eager"))
    assert model.module is module
    same(spine(model, folder), bench.plain)


def adapted(targets: list[str], module: Any | None = None, name: str = "default") -> Any:
    """A PEFT model with a loud LoRA."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'resid-surgery[peft]'")
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    torch.manual_seed(len(name))
    return peft.get_peft_model(module or llama(), config, adapter_name=name).eval()


@works("PEFT: adapters on queries, keys or values")
def _(bench: Bench, folder: Path) -> None:
    wrapped = adapted(["q_proj", "k_proj", "v_proj"])
    merged = rs.load(copy.deepcopy(wrapped).merge_and_unload())
    then = standing(wrapped)
    model = rs.load(wrapped)
    assert model.module is wrapped.get_base_model()
    found = spine(model, folder / "active")
    same(found, spine(merged, folder / "merged"), 1e-7)
    assert not torch.allclose(found["record"], bench.plain["record"])
    as_before(standing(wrapped), then)


@works("PEFT: adapters merged")
def _(bench: Bench, folder: Path) -> None:
    wrapped = adapted(["o_proj", "down_proj", "up_proj"])
    unloaded = rs.load(copy.deepcopy(wrapped).merge_and_unload())
    wrapped.merge_adapter()
    model = rs.load(wrapped)
    rec = rs.record(model, PROMPT)
    pd.testing.assert_frame_equal(
        rs.decompose(rec, grain="neuron"), rs.decompose(rs.record(unloaded, PROMPT), grain="neuron")
    )
    assert rs.locate(rec, k=3).sites == rs.locate(rs.record(unloaded, PROMPT), k=3).sites
    wrapped.unmerge_adapter()
    with pytest.raises(errors.StaleRecordingError):
        rs.decompose(rec)
    with pytest.raises(errors.ClosureError, match="modules, hooks or settings of it changed since"):
        rs.record(model, PROMPT)


@works("PEFT: adapters switched off, or another one on")
def _(bench: Bench, folder: Path) -> None:
    wrapped = adapted(["q_proj"])
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model = rs.load(wrapped)
    first = rs.record(model, PROMPT)
    wrapped.set_adapter("second")
    with pytest.raises(errors.StaleRecordingError, match="an adapter that was switched, say"):
        rs.decompose(first)
    second = rs.record(model, PROMPT)
    with wrapped.disable_adapter():
        same({"record": rs.record(model, PROMPT).logits}, {"record": bench.plain["record"]})
        same(spine(rs.load(wrapped), folder), bench.plain)
    assert not torch.allclose(first.logits, second.logits)
    wrapped.set_adapter("default")
    assert torch.equal(rs.record(model, PROMPT).logits, first.logits)
    rs.decompose(first)


@works("accelerate's hooks, and parts on several devices")
def _(bench: Bench, folder: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    module = llama()
    hooks.add_hook_to_module(module.get_submodule(LAYERS.format(1)), hooks.AlignDevicesHook(execution_device="cpu"))
    like_the_plain(bench, folder, module)


@works("tied or untied unembedding")
def _(bench: Bench, folder: Path) -> None:
    module = llama(tie_word_embeddings=False)
    module.load_state_dict(bench.module.state_dict())
    module.lm_head.weight = nn.Parameter(module.model.embed_tokens.weight.detach().clone())
    assert bench.module.lm_head.weight is bench.module.model.embed_tokens.weight
    like_the_plain(bench, folder, module)


@works("d_head * heads is not d_model")
def _(bench: Bench, folder: Path) -> None:
    module = llama(head_dim=8)
    model = rs.load(module)
    found = spine(model, folder)
    with torch.no_grad():
        assert torch.allclose(found["record"], module(torch.tensor([[5, 6, 7, 8]])).logits[0, -1], atol=1e-9)
    assert found["decompose"]["closure"].max() < 1e-6


@works("float32, bfloat16 or float16 weights")
def _(bench: Bench, folder: Path) -> None:
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.6), (torch.float16, 0.1)):
        found = spine(rs.load(copy.deepcopy(bench.module).to(dtype)), folder / str(dtype))
        assert float((found["record"].double() - bench.plain["record"]).abs().max()) < near
        assert found["decompose"]["closure"].max() < near


@works("a prompt of one token")
def _(bench: Bench, folder: Path) -> None:
    one = rs.Prompt(ids=[5], target=9)
    rec = rs.record(bench.model, one, positions="all")
    with torch.no_grad():
        logits = bench.module(torch.tensor([[5]])).logits[0, -1]
    assert torch.allclose(rec.logits, logits, atol=1e-9)
    assert rs.decompose(rec, grain="subvalue")["closure"].max() < 1e-6
    assert rs.intervene(rec, rs.Zero("L1.mlp")).table["closure"].max() < 1e-6
    assert len(rs.sweep(rec, [rs.Zero("L0.N1")], progress=False)) == 1
    assert rs.sources(rec, "L1.N0", norm="live")["closure"].max() < 1e-6
    assert set(rs.locate(rec, k=12, kind="head_source").table["site"].str.split("<").str[1]) == {"0"}


@works("one prompt where many are taken")
def _(bench: Bench, folder: Path) -> None:
    (alone,) = rs.record_each(bench.model, [PROMPT], positions="all")
    assert all(torch.equal(a, b) for a, b in zip(alone.tensors(), bench.rec.tensors(), strict=True))
    many = rs.locate_many(bench.model, [PROMPT], k=2, progress=False)
    assert many["site"].tolist() == rs.locate(bench.rec, k=2).table["site"].tolist()


def of_bytes(**template: str) -> Any:
    """A byte-level tokenizer of 258 tokens: a letter outside ASCII is several, none of which is text alone."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary | {"<|endoftext|>": 256, "<s>": 257}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<s>"])
    if template:
        inner.post_processor = processors.TemplateProcessing(
            **template, special_tokens=[("<|endoftext|>", 256), ("<s>", 257)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<s>")


@pytest.fixture(scope="module")
def lettered() -> Any:
    """A model of 300 tokens with a tokenizer of 258."""
    return rs.load(tiny.build("gpt2", vocab_size=300), tokenizer=of_bytes())


@works("a tokenizer that adds a BOS or an EOS")
def _(bench: Bench, folder: Path) -> None:
    module = tiny.build("gpt2", vocab_size=300)
    for template, ids in (("<s> $A", (257, 64, 65)), ("$A <|endoftext|>", (64, 65, 256))):
        model = rs.load(module, tokenizer=of_bytes(single=template))
        rec = rs.record(model, rs.Prompt("ab", target="c"))
        assert rec.prompt.ids == ids
        assert torch.equal(rec.logits, rs.record(model, rs.Prompt(ids=ids, target=66)).logits)
        assert "<" in repr(rec)


@works("a tokenizer with fewer tokens than the model")
def _(bench: Bench, folder: Path) -> None:
    model = rs.load(tiny.build("gpt2", vocab_size=300), tokenizer=of_bytes())
    rec = rs.record(model, rs.Prompt("ab", target=299, versus=[298]))
    assert rec.prompt.names == {299: "", 298: ""}
    assert rs.predictions(rec, top=300)["token_id"].nunique() == 300


@works("special tokens typed in a text")
def _(bench: Bench, folder: Path) -> None:
    model = rs.load(tiny.build("gpt2", vocab_size=300), tokenizer=of_bytes())
    rec = rs.record(model, rs.Prompt("a<|endoftext|>", target="b"))
    assert rec.prompt.ids == (64, 256)
    assert rec.prompt.tokens == ("a", "<|endoftext|>")


@works("tokens that are no text alone, and any other Unicode")
def _(bench: Bench, folder: Path) -> None:
    model = rs.load(tiny.build("gpt2", vocab_size=300), tokenizer=of_bytes())
    first, second = model.tokenizer.encode("é")
    prompt = rs.Prompt("né\u202e\x00<b>", target=first, versus=[second])
    rec = rs.record(model, prompt, positions="all")
    assert rec.prompt.names == {first: "\ufffd", second: "\ufffd"}
    assert rs.intervene(rec, rs.Zero("L0.mlp")).table["token_id"].tolist()[:2] == [first, second]
    assert "\ufffd" in rs.source_graph(rec, nodes=4).to_json().encode().decode()
    assert b"\xef\xbf\xbd" in rs.write_report(rec, folder / "rec.html").read_bytes()
    plan = {"intervene": {"kind": "Zero", "sites": "L0.mlp"}}
    rs.run(model, [prompt], plan, out=folder / "run", progress=False)
    table = rs.read_run(folder / "run")
    assert table["target"].tolist() == ["\ufffd"]


# --- conditions that are refused ----------------------------------------------------------------

REFUSED: dict[str, Callable[[Bench, Path], object]] = {}


def refused(condition: str) -> Callable[[Any], Any]:
    """What provokes the error of a row."""

    def keep(call: Any) -> Any:
        assert condition not in REFUSED
        REFUSED[condition] = call
        return call

    return keep


def say(condition: str, call: Callable[[Bench, Path], object]) -> None:
    """The same for a call of one line."""
    refused(condition)(call)


@refused("inside torch.autocast")
def _(bench: Bench, folder: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for verb in (lambda: rs.load(bench.module), lambda: rs.record(bench.model, PROMPT)):
            with pytest.raises(errors.ArgumentError, match=r"torch\.autocast is on"):
                verb()
        rs.decompose(bench.rec)


@refused("torch's default device is not the CPU")
def _(bench: Bench, folder: Path) -> None:
    with torch.device("meta"):
        for verb in (lambda: rs.load(bench.module), lambda: rs.record(bench.model, PROMPT)):
            with pytest.raises(errors.ArgumentError, match="torch's default device is meta"):
                verb()
        rs.scores(bench.rec)


@refused("a layer or a forward replaced by torch.compile")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    module.forward = torch.compile(module.forward, backend="eager")
    with pytest.raises(errors.UnsupportedModelError, match="the forward of LlamaForCausalLM was replaced by torch"):
        rs.load(module)
    module = llama()
    module.model.layers[1] = torch.compile(module.model.layers[1], backend="eager")
    rs.load(module)


say(
    "PEFT: adapters on what is read as weights (W_O, an MLP, the unembedding)",
    lambda b, f: rs.load(adapted(["o_proj"])),
)


@refused("PEFT: prompt tuning and the like")
def _(bench: Bench, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    rs.load(peft.get_peft_model(llama(), config))


@refused("weights that are not in memory (meta, offloaded)")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(module)
    module.to("meta")
    with pytest.raises(errors.LoadError, match="on the meta device"):
        rs.load(module)
    rs.record(model, PROMPT)


@refused("parameters of an object that was made under torch.inference_mode")
def _(bench: Bench, folder: Path) -> None:
    with torch.inference_mode():
        module = llama()
    same(spine(rs.load(copy.deepcopy(module)), folder), bench.plain)
    rs.load(module)


@refused("weights that are no plain numbers (quantised)")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    module.get_submodule(DOWN).weight = nn.Parameter(torch.ones(24, 40, dtype=torch.int8), requires_grad=False)
    rs.load(module)


def doubled(_: Any, __: Any, out: Any) -> Any:
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


@refused("a hook that changes what flows, when the model is loaded")
def _(bench: Bench, folder: Path) -> None:
    module = tiny.build("gpt2")
    module.transformer.h[0].register_forward_hook(doubled)
    rs.load(module)


@refused("a hook, module or setting that changes what flows, later")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(module)
    module.get_submodule(DOWN).register_forward_hook(doubled)
    rs.record(model, PROMPT)


@refused("layers or tokens added or left out, later")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(module)
    module.model.layers = module.model.layers[:2]
    rs.record(model, PROMPT)


say("an architecture whose stream is no sum", lambda b, f: rs.load(of_type("openai-gpt", dtype=torch.float64)))
say("no language model", lambda b, f: rs.load(nn.Linear(2, 2)))
say("a path that does not exist", lambda b, f: rs.load("./nowhere"))
say("an object and a dtype or device for it", lambda b, f: rs.load(b.module, dtype="float32"))
say("no opened model", lambda b, f: rs.record(b.module, PROMPT))
say("no recording", lambda b, f: rs.locate("rec"))


@refused("a recording, and weights that changed since")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    rec = rs.record(rs.load(module), PROMPT)
    module.get_parameter(f"{DOWN}.weight").data[3, 3] += 1
    rs.locate(rec)


@refused("a recording, and modules, hooks or settings that changed since")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    rec = rs.record(rs.load(module), PROMPT)
    module.model.layers[0].mlp.act_fn = nn.GELU()
    rs.locate(rec)


@refused("a donor of other weights")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(module)
    donor = rs.record(model, PROMPT)
    with torch.no_grad():
        module.get_parameter(f"{DOWN}.weight").mul_(2)
    rs.intervene(rs.record(model, PROMPT), rs.Patch("L0.mlp", donor))


@refused("a donor of another model")
def _(bench: Bench, folder: Path) -> None:
    rs.intervene(bench.rec, rs.Patch("L0.mlp", rs.record(rs.load(llama(seed=1)), PROMPT)))


@refused("head weights, and weights that changed since")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    held = rs.head_weights(rs.load(module))
    module.get_parameter(f"{DOWN}.weight").data[3, 3] += 1
    held["L0.H0"]


@refused("head weights, and settings of attention that changed since")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    held = rs.head_weights(rs.load(module))
    module.model.layers[0].self_attn.scaling *= 2
    held["L0.H0"]


@refused("a base that changes while it is validated")
def _(bench: Bench, folder: Path) -> None:
    module = sharp("llama", torch.float32)
    model = rs.load(module, tokenizer=words())

    def edited(ids: torch.Tensor) -> torch.Tensor:
        module.get_parameter(f"{DOWN}.weight").data[3, 3] += 1
        return module(ids).logits.detach()  # type: ignore[no-any-return]

    rs.validate(model, edited, probes(), budget=SMALL, general=False, progress=False)


@refused("a run folder, and modules, hooks or settings that changed since")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    model = rs.load(module)
    rs.run(model, [PROMPT], PLAN, out=folder / "run", progress=False)
    module.model.layers[0].self_attn.scaling *= 2
    rs.run(model, [PROMPT], PLAN, out=folder / "run", progress=False)


@refused("two validations, and modules, hooks or settings that changed between them")
def _(bench: Bench, folder: Path) -> None:
    made = [fake_validation(standing=one) for one in ("of one", "of another")]
    rs.diff_reports(*made)


@refused("a server, and modules, hooks or settings that changed since loading")
def _(bench: Bench, folder: Path) -> None:
    module = llama()
    module.config._name_or_path = "someone/tiny"
    model = rs.load(module)
    module.model.layers[0].self_attn.scaling *= 2
    rs.record(model, PROMPT, remote="http://localhost:1")


@refused("an edit made for other weights")
def _(bench: Bench, folder: Path) -> None:
    module = llama(seed=2)
    with bench.edit.applied(rs.load(module)):
        pass


@refused("edits for different weights, added")
def _(bench: Bench, folder: Path) -> None:
    delta = torch.ones(1, 24, dtype=torch.float64)
    rows = [Rows(f"{DOWN}.weight", (), (24, 40), (1,), torch.tensor([[3]]), delta)]
    bench.edit + new_edit(rs.load(llama(seed=2)), rows, method="a row")


@refused("an edited model after its block")
def _(bench: Bench, folder: Path) -> None:
    with bench.edit.applied(bench.model) as edited:
        pass
    rs.record(edited, PROMPT)


@refused("a model under interventions after its block")
def _(bench: Bench, folder: Path) -> None:
    with rs.under(bench.model, rs.Zero("L0.mlp")) as altered:
        pass
    altered.generate([5, 6])


say("an edit that changes nothing", lambda b, f: rs.edit_coefficients(b.model, "L0.N1", 1.0))
say("text without a tokenizer", lambda b, f: rs.record(b.model, rs.Prompt(TEXT, target=9)))
say("a tokenizer of another model", lambda b, f: rs.record(
    rs.load(b.module, tokenizer=word_tokenizer(size=200)), rs.Prompt("The word150", target=9)))  # fmt: skip
say("no tokenizer object", lambda b, f: rs.load(b.module, tokenizer="gpt2"))
say(
    "a prompt beyond the context, absolute or rotary",
    lambda b, f: rs.record(b.model, rs.Prompt(ids=[5] * 65, target=9)),
)
say("an empty text", lambda b, f: rs.Prompt("", target=9))
say("a text that is no Unicode", lambda b, f: rs.record(b.worded, rs.Prompt("The\ud800", target=9)))
say("a token id out of range", lambda b, f: rs.record(b.model, rs.Prompt(ids=[5, 97], target=9)))
say("a target of several tokens", lambda b, f: rs.record(b.worded, rs.Prompt(TEXT, target=" Paris London")))
say("a word that the tokenizer does not know", lambda b, f: rs.record(b.worded, rs.Prompt(TEXT, target=" Rome")))
say("a competitor that is the target", lambda b, f: rs.record(b.model, rs.Prompt(ids=[5], target=9, versus=[9])))
say("a position that does not exist", lambda b, f: rs.record(b.model, rs.Prompt(ids=[5], target=9, position=1)))
say("a position by a text that occurs twice", lambda b, f: rs.record(
    b.worded, rs.Prompt("The word20 word20", target=9, position=" word20")))  # fmt: skip
say("no prompt", lambda b, f: rs.record(b.model, TEXT))
say("a number out of range", lambda b, f: rs.locate(b.rec, k=0))
say("a word that is none of the choices", lambda b, f: rs.locate(b.rec, kind="nueron"))
say("NaN or infinity", lambda b, f: rs.Scale("L0.N1", float("nan")))
say("what needs all positions", lambda b, f: rs.sources(rs.record(b.model, PROMPT), "L1.attn"))
say("text that is no site", lambda b, f: rs.spectrum(b.rec, "banana"))
say("a layer, head or neuron that does not exist", lambda b, f: rs.spectrum(b.rec, "L3.N0"))
say("a source after its position", lambda b, f: rs.intervene(b.rec, rs.Zero("L0.H0<2", positions=1)))
say("an expert that was not routed to", lambda b, f: _idle())
say("operations that contradict", lambda b, f: rs.intervene(b.rec, [rs.Zero("L0.N1"), rs.Scale("L0.N1", 0.0)]))
say("no operation", lambda b, f: rs.intervene(b.rec, []))
say("nothing to blame", lambda b, f: rs.blame(b.rec, *b.rec.bs_values.topk(2).indices.tolist()[::-1]))
say("a place for a run that is none", lambda b, f: rs.record(b.model, PROMPT, remote="elsewhere"))
say("a model that no server knows", lambda b, f: rs.record(b.model, PROMPT, remote="http://localhost:1"))


def _idle() -> None:
    rec = rs.record(rs.load(of_type("mixtral", dtype=torch.float64)), PROMPT)
    idle = min({0, 1, 2, 3} - {group.expert for group in rec.layers[0].groups})
    rs.spectrum(rec, f"L0.E{idle}.N1")


def a_checkpoint(folder: Path, **changes: Any) -> Path:
    """A checkpoint with changes of its config."""
    llama().float().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@refused("a checkpoint whose config is of a far larger model than its files")
def _(bench: Bench, folder: Path) -> None:
    rs.load(a_checkpoint(folder, hidden_size=10**9))


@refused("a checkpoint whose config counts what no model has")
def _(bench: Bench, folder: Path) -> None:
    rs.load(a_checkpoint(folder, num_labels=10**9))


@refused("a checkpoint whose config names code of a hub")
def _(bench: Bench, folder: Path) -> None:
    rs.load(a_checkpoint(folder, attn_implementation="somebody/kernel"))


@refused("a damaged file of interventions")
def _(bench: Bench, folder: Path) -> None:
    path = rs.save_interventions(folder / "ops.json", rs.Zero("L0.N1"))
    path.write_bytes(path.read_bytes()[:20])
    rs.load_interventions(path)


@refused("a damaged edit")
def _(bench: Bench, folder: Path) -> None:
    path = bench.edit.save(folder / "edit.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    rs.Edit.load(path)


PLAN = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}}


@refused("a run folder of another plan, prompts or model")
def _(bench: Bench, folder: Path) -> None:
    rs.run(bench.model, [PROMPT], PLAN, out=folder / "run", progress=False)
    rs.run(bench.model, [PROMPT], PLAN | {"seed": 1}, out=folder / "run", progress=False)


say("no run folder", lambda b, f: rs.read_run(f / "nowhere"))
say(
    "a plan with a word that is none of its own",
    lambda b, f: rs.run(b.model, [PROMPT], {"intervenes": {}}, out=f / "x"),
)


# --- the table ----------------------------------------------------------------------------------


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert len(ROWS) == len(rows()), "a condition stands in the table once"
    assert set(ROWS) == set(WORKS) | set(REFUSED)
    assert not set(WORKS) & set(REFUSED)
    assert {name for name, row in ROWS.items() if row.outcome.startswith("works")} == set(WORKS)
    assert len(ROWS) >= 60


def test_every_class_of_error_stands_in_the_table() -> None:
    named = {row.outcome for row in ROWS.values() if not row.outcome.startswith("works")}
    classes = {name for name, one in vars(errors).items()
               if isinstance(one, type) and issubclass(one, errors.ResidSurgeryError)}  # fmt: skip
    assert named == {f"`{name}`" for name in classes - {"ResidSurgeryError"}}


@pytest.mark.parametrize("condition", WORKS)
def test_a_condition_that_works(condition: str, bench: Bench, tmp_path: Path) -> None:
    assert ROWS[condition].outcome.startswith("works: ")
    WORKS[condition](bench, tmp_path)


@pytest.mark.parametrize("condition", REFUSED)
def test_a_condition_that_is_refused_in_the_tables_words(condition: str, bench: Bench, tmp_path: Path) -> None:
    row = ROWS[condition]
    with pytest.raises(errors.ResidSurgeryError) as caught:
        REFUSED[condition](bench, tmp_path)
    said = " ".join(str(caught.value).split())
    assert f"`{type(caught.value).__name__}`" == row.outcome, said
    pattern = ".*".join(re.escape(part) for part in row.message.split("..."))
    assert re.fullmatch(pattern, said), f"{condition}: says {said!r}, the table {row.message!r}"
    assert row.do not in ("", "-")
    assert len(row.message.replace("...", "").strip()) >= 20, "a message that is all wildcards says nothing"


def test_the_page_is_part_of_the_reference() -> None:
    """Read by `.docs/build.py`; that it comes out is test_docs's."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith("## ")
    assert "errors.md" in (PAGE.parent / "build.py").read_text(encoding="utf-8")

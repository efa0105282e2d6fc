"""Grouping: many prompts recorded together are what they are alone, in order, unpadded, in bounded memory."""

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, ClosureError, PromptError, StaleRecordingError
from resid_surgery.models import zoo
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import bind
from resid_surgery.stream import grouping, recording
from resid_surgery.stream.elsewhere import Elsewhere
from resid_surgery.stream.grouping import record_each, record_group, recording_bytes, within_budget
from resid_surgery.stream.recording import Recording

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Mixtures (their rows are flattened inside), hybrids, and attention with sinks, ALiBi or weights of its own.
OTHERS = ("bloom", "deepseek_v3", "diffllama", "doge", "gemma4", "gpt_oss", "granitemoeshared", "mixtral", "nemotron_h",
          "olmoe", "qwen2_moe", "qwen3_next")  # fmt: skip


def prompt(*ids: int, position: int = -1) -> rs.Prompt:
    return rs.Prompt(ids=ids, target=5, versus=[6], position=position)


def row_of(length: int, seed: int, position: int = -1) -> rs.Prompt:
    return prompt(*((7 * seed + 3 * j * j + seed * j) % 40 + 3 for j in range(length)), position=position)


SAME = [row_of(6, seed) for seed in range(5)]
MIXED = [row_of(length, seed) for seed, length in enumerate([4, 6, 4, 5, 6, 4, 6, 4])]


def worst(one: Recording, other: Recording) -> float:
    """The largest difference of any tensor, relative to the largest number in it."""
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    assert len(pairs) > 10
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float((a - b).abs().max()) / max(1e-30, float(b.abs().max())) for a, b in pairs if a.numel())


def fresh(family: str = "llama", **changes: Any) -> OpenedModel:
    """A model of its own, that a test may change."""
    return rs.load(tiny.build(family, **changes))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The ids of every forward that recordings were made in."""
    ran: list[list[list[int]]] = []
    real = recording.forward

    def forward(model: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        ran.append(ids.tolist())
        return real(model, ids, *args, **options)

    monkeypatch.setattr(recording, "forward", forward)
    return ran


# --- each recording is what it would be alone ----------------------------------------------------


@given(families, dtypes, st.lists(prompts(), min_size=1, max_size=9), st.sampled_from(["target", "all"]),
       st.none() | st.integers(1, 6))  # fmt: skip
def test_each_recording_is_that_of_its_prompt_alone_in_the_order_given(family, dtype, many, positions, batch):
    model = shared(family, dtype)
    recs = list(record_each(model, many, positions=positions, batch=batch))
    assert [rec.prompt for rec in recs] == [bind(one, None, model) for one in many]
    for rec, one in zip(recs, many, strict=True):
        alone = rs.record(model, one, positions=positions)
        assert worst(rec, alone) <= CLOSE[dtype]
        assert (rec.stream is None) == (positions == "target")
        assert rec.fingerprint == alone.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_say_what_plain_forwards_say(family):
    model = shared(family)
    for rec, one in zip(record_each(model, MIXED), MIXED, strict=True):
        with torch.no_grad():
            plain = model.module(torch.tensor([one.ids]), output_hidden_states=True)
        assert torch.allclose(rec.logits, plain.logits[0, -1], rtol=1e-6, atol=1e-6)
        for layer in range(model.anatomy.n_layers):
            assert torch.allclose(rec.layers[layer].resid_pre, plain.hidden_states[layer][0, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", OTHERS)
def test_mixtures_hybrids_and_odd_attention_are_grouped_too(model_type, forwards):
    model = rs.load(zoo.tiny(model_type))
    forwards.clear()
    recs = list(record_each(model, SAME, positions="all"))
    assert [len(ids) for ids in forwards] == [1, 1, 5]  # the control, then all
    for rec, one in zip(recs, SAME, strict=True):
        alone = rs.record(model, one, positions="all")
        assert worst(rec, alone) <= CLOSE[torch.float32]
        for mine, its in zip(rec.layers, alone.layers, strict=True):
            assert [group.expert for group in mine.groups] == [group.expert for group in its.groups]


def test_a_recurrence_that_lifts_rounding_in_float32_shows_none_in_float64():
    model = rs.load(zoo.tiny("recurrent_gemma", dtype=torch.float64))
    for rec, one in zip(record_each(model, SAME), SAME, strict=True):
        assert worst(rec, rs.record(model, one)) <= CLOSE[torch.float64]
    assert model.cache["independent_rows"][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_can_be_the_predicting_one(family):
    many = [row_of(5, seed, position) for seed in range(3) for position in range(5)]
    for rec, one in zip(record_each(shared(family), many), many, strict=True):
        assert worst(rec, rs.record(shared(family), one)) <= CLOSE[torch.float64]


def test_a_grouped_recording_serves_as_one_made_alone():
    model = shared("llama")
    for rec, one in zip(list(record_each(model, SAME[:2], positions="all")), SAME, strict=False):
        alone = rs.record(model, one, positions="all")
        for verb in (
            lambda r: rs.decompose(r, grain="neuron"),
            lambda r: rs.intervene(r, rs.Zero("L1.N3")).table,
            lambda r: rs.sweep(r, [rs.Zero("L1.N3"), rs.Zero("L2.H1")]),
        ):
            mine, its = (verb(r).select_dtypes("number").fillna(0.0) for r in (rec, alone))
            assert abs(mine - its).to_numpy().max() < 1e-6
        assert worst(Elsewhere(rec).at(1), Elsewhere(alone).at(1)) <= CLOSE[torch.float64]


def test_the_embedded_model(smollm2):
    texts = [
        "The capital of France is",
        "The capital of India is",
        "Apple was founded by Steve",
        "The sky is blue and so",
    ]
    many = [rs.Prompt(text, target=" Paris") for text in texts]
    for rec, one in zip(record_each(smollm2, many), many, strict=True):
        assert worst(rec, rs.record(smollm2, one)) <= 1e-5


# --- no padding, few forwards, bounded memory ----------------------------------------------------


def test_no_forward_has_a_token_that_no_prompt_has(forwards):
    list(record_each(shared("llama"), MIXED, batch=4))
    forwards.clear()
    list(record_each(shared("llama"), MIXED, batch=4))
    given = sorted(list(one.ids) for one in MIXED)
    assert sorted(ids for forward in forwards for ids in forward) == given


def test_prompts_of_one_shape_share_a_forward(forwards):
    model = shared("gpt2")
    list(record_each(model, SAME))
    forwards.clear()
    list(record_each(model, MIXED))
    assert [len(ids) for ids in forwards] == [4, 3, 1]
    forwards.clear()
    list(record_each(model, [row_of(6, 0), row_of(6, 1, position=2), row_of(6, 2)]))
    assert [len(ids) for ids in forwards] == [2, 1]  # one predicting position a forward
    forwards.clear()
    list(record_each(model, [row_of(6, seed) for seed in range(40)]))
    assert [len(ids) for ids in forwards] == [16, 16, 8]
    forwards.clear()
    list(record_each(model, SAME, batch=2))
    assert [len(ids) for ids in forwards] == [2, 2, 1]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_no_more_than_one_batch_waits(batch, monkeypatch):
    alive: weakref.WeakSet[Recording] = weakref.WeakSet()
    real = grouping.record_group

    def spied(*args: Any, **options: Any) -> list[Recording]:
        found = real(*args, **options)
        alive.update(found)
        return found

    monkeypatch.setattr(grouping, "record_group", spied)
    many, seen = [row_of(3 + seed % 3, seed) for seed in range(60)], 0
    for rec in record_each(shared("gpt2"), many, batch=batch):
        assert len(alive - {rec}) < batch
        seen += 1
    assert seen == 60


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mixtral", "bloom", "deepseek_v3"])
def test_a_recording_owns_its_memory(model_type):
    recs = list(record_each(rs.load(zoo.tiny(model_type)), SAME, positions="all"))
    held = [{tensor.untyped_storage().data_ptr() for tensor in rec.tensors()} for rec in recs]
    assert len(set.union(*held)) == sum(map(len, held))  # nobody shares with another
    for tensor in (tensor for rec in recs for tensor in rec.tensors() if tensor.numel()):
        assert tensor.untyped_storage().nbytes() < 2.5 * tensor.numel() * tensor.element_size()  # sinks: a column more
        assert not tensor.requires_grad


def test_the_test_of_ownership_can_fail():
    whole = torch.zeros(5, 4)
    assert whole[1].untyped_storage().nbytes() > 2.5 * whole[1].numel() * whole.element_size()


@pytest.mark.parametrize("model_type", [*FAMILIES, "mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("positions", ["target", "all"])
def test_the_size_of_a_recording_is_known_before_it_is_made(model_type, positions):
    model = rs.load(zoo.tiny(model_type))
    for length in (2, 30):
        rec = rs.record(model, row_of(length, 1), positions=positions)
        size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in rec.tensors()}.values())
        assert size / 2 < recording_bytes(model, length, every=positions == "all") < 3 * size


def test_the_window_is_bounded_in_number_and_in_memory(monkeypatch):
    model = shared("llama")
    many = [bind(row_of(length, 1), None, model) for length in (3, 3, 20, 3, *[3] * 30)]
    assert within_budget(model, many, 0, every=False) == range(16)
    assert within_budget(model, many, 30, every=False) == range(30, 34)
    short, long = (recording_bytes(model, n, every=False) for n in (3, 20))
    monkeypatch.setattr(grouping, "MOST_BYTES", 2.5 * short)
    assert within_budget(model, many, 0, every=False) == range(2)
    assert within_budget(model, many, 2, every=False) == range(2, 3)  # at least the one that is due
    monkeypatch.setattr(grouping, "MOST_BYTES", 2.5 * short + long)
    assert within_budget(model, many, 0, every=False) == range(3)
    assert recording_bytes(model, 20, every=True) > long > short


# --- whether rows are independent is measured ----------------------------------------------------


def mix(out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * (out.mean(0, keepdim=True) - out)


def first_only(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:1] * (1.1 if len(out) > 1 else 1.0), out[1:]])  # a row alone is the model's own


def last_only(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:-1], out[-1:] * (1.1 if len(out) > 1 else 1.0)])


def capacity_of_two(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:2], 0.0 * out[2:]])


def refuse_rows(out: torch.Tensor) -> torch.Tensor:
    if len(out) > 1:
        raise ValueError("one row at a time")
    return out


@pytest.mark.parametrize("change", [mix, first_only, last_only, capacity_of_two, refuse_rows])
def test_rows_that_depend_on_one_another_run_one_by_one(change: Callable[[Any], Any], forwards):
    model = fresh()
    list(record_each(model, SAME))
    assert model.cache["independent_rows"][1]
    norm = model.module.get_submodule("model.layers.1.post_attention_layernorm")
    handle = norm.register_forward_hook(lambda m, a, out: change(out))
    for recs in (
        list(record_each(model, SAME)),
        record_group(model, [bind(p, None, model) for p in SAME], every=False),
    ):
        for rec, one in zip(recs, SAME, strict=True):
            assert worst(rec, rs.record(model, one)) == 0.0
    assert not model.cache["independent_rows"][1]
    forwards.clear()
    list(record_each(model, SAME))
    assert [len(ids) for ids in forwards] == [1] * 5
    handle.remove()
    list(record_each(model, SAME))  # another module tree: measured again
    assert model.cache["independent_rows"][1]


def test_the_control_runs_once(forwards):
    model = fresh("gpt2")
    forwards.clear()
    for _ in range(2):
        list(record_each(model, SAME))
    assert [len(ids) for ids in forwards] == [1, 1, 5, 5]


# --- weights that change -------------------------------------------------------------------------


def unseen_write(model: OpenedModel, by: float) -> None:
    """A write that the quick look misses: see test_loading."""
    model.module.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 1] += by  # type: ignore[operator]


@pytest.mark.parametrize("positions", ["target", "all"])
def test_a_grouped_recording_is_accepted_as_fresh_and_refused_as_stale(positions):
    model = fresh(dtype=torch.float32)
    model.known_fingerprint()
    unseen_write(model, 1.0)
    recs = list(record_each(model, MIXED, positions=positions))
    for rec in recs:  # made after the write: the forward is repeated with the same rows, and agrees bit for bit
        assert rec.fingerprint != model.fingerprint()
        rec.require_fresh()
        assert rec.fingerprint == model.fingerprint()
    unseen_write(model, 1.0)
    for rec in recs:
        with pytest.raises(StaleRecordingError):
            rec.require_fresh()


def test_a_view_of_another_position_is_accepted_too():
    model = fresh(dtype=torch.float32)
    model.known_fingerprint()
    unseen_write(model, 1.0)
    for rec in record_each(model, SAME, positions="all"):
        view = Elsewhere(rec).at(2)
        rec.require_fresh()
        view.require_fresh()


def test_prompts_still_due_are_recorded_with_the_weights_of_their_time():
    model = fresh()
    coming = record_each(model, SAME, batch=2)
    first = next(coming)
    with torch.no_grad():
        model.module.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.01)  # type: ignore[operator]
    second, *rest = coming
    for rec in (first, second):  # of one forward, before the change
        with pytest.raises(StaleRecordingError):
            rec.require_fresh()
    for rec in rest:
        rec.require_fresh()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("many", "options", "error", "says"),
    [
        ([SAME[0], rs.Prompt(ids=[1, 97], target=5)], {}, PromptError, "prompt 1: `ids` must be"),
        ([SAME[0], SAME[1], rs.Prompt("text", target=5)], {}, PromptError, "prompt 2: .*without a tokenizer"),
        ([SAME[0], "text"], {}, PromptError, "prompt 1: `prompt` must be a resid_surgery.Prompt"),
        (SAME[0], {}, ArgumentError, "`prompts` must be a sequence of prompts"),
        ("text", {}, ArgumentError, "`prompts` must be a sequence of prompts"),
        (3, {}, ArgumentError, "`prompts` must be a sequence of prompts"),
        ([], {}, ArgumentError, "`prompts` must be at least one prompt"),
        (SAME, {"batch": 0}, ArgumentError, "`batch` must be a whole number >= 1"),
        (SAME, {"batch": 2.0}, ArgumentError, "`batch` must be a whole number"),
        (SAME, {"positions": "target "}, ArgumentError, "Did you mean 'target'"),
    ],
)
def test_bad_input_is_refused_before_any_forward(many, options, error, says, forwards):
    model = shared("llama")
    forwards.clear()
    with pytest.raises(error, match=says):
        record_each(model, many, **options)  # at the call, not when the first recording is asked for
    assert forwards == []


def test_no_model_and_autocast_are_refused():
    with pytest.raises(ArgumentError, match=r"`model` must be a model from resid_surgery\.load"):
        record_each(None, SAME)  # type: ignore[arg-type]
    for many in (SAME, SAME[:1]):
        coming = record_each(shared("llama", torch.float32), many)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArgumentError, match="autocast"):
            next(coming)


def test_a_group_of_several_shapes_is_refused(forwards):
    model = shared("llama")
    bound = [bind(one, None, model) for one in MIXED[:2]]
    apart = [bind(row_of(4, 1, position), None, model) for position in (1, 2)]
    for wrong in ([], bound, apart):
        with pytest.raises(ArgumentError, match="one length and one predicting position"):
            record_group(model, wrong, every=False)
    assert forwards == []


@pytest.mark.parametrize("known", [True, False])
def test_a_refused_recording_is_named_when_its_prompt_is_due(known):
    module = tiny.build("llama", tie_word_embeddings=False)
    model = rs.load(module)
    if known:
        list(record_each(model, SAME))
    with torch.no_grad():
        module.get_input_embeddings().weight[90] = torch.nan  # type: ignore[operator]
    many = [*SAME[:2], prompt(1, 2, 90, 3, 4, 5), *SAME[2:]]
    coming = record_each(model, many)
    for one in many[:2]:
        assert worst(next(coming), rs.record(model, one)) <= CLOSE[torch.float64]
    with pytest.raises(ClosureError, match=r"^prompt 2: this recording of \w+ is refused"):
        next(coming)
    list(record_each(model, SAME))
    assert model.cache["independent_rows"][1], "one bad prompt says nothing of the model's rows"


def test_memory_that_runs_out_is_not_taken_for_a_refusal(monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(grouping, "record_rows", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(record_each(fresh(), SAME))


def test_the_users_model_is_left_as_it_was():
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    hooks = sum(len(sub._forward_hooks) + len(sub._forward_pre_hooks) for sub in model.module.modules())
    list(record_each(model, MIXED))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert hooks == sum(len(sub._forward_hooks) + len(sub._forward_pre_hooks) for sub in model.module.modules())
    assert not model.module.training


def test_a_model_that_is_left_early_is_let_go():
    coming = record_each(shared("gpt2"), SAME)
    kept = weakref.ref(next(coming))
    coming.close()  # type: ignore[attr-defined]
    gc.collect()
    assert kept() is None


def test_rows_alone_are_a_group_too():
    model = shared("gpt2")
    with contextlib.suppress(KeyError):
        del model.cache["independent_rows"]
    (rec,) = record_group(model, [bind(SAME[0], None, model)], every=False)
    assert worst(rec, rs.record(model, SAME[0])) == 0.0
    assert "independent_rows" not in model.cache  # nothing to be measured

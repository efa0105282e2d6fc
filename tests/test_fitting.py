"""Fitted edits: keys, values, rank one and least squares, against plain hooks and textbook solutions."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import resid_surgery as rs
from resid_surgery.editing import keys as keys_module
from resid_surgery.editing import values as values_module
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.keys import (
    SENTENCES,
    Context,
    SecondMoment,
    chosen_prefixes,
    contexts,
    covariance,
    dense_layer,
    essence,
    grouped,
    of_contexts,
    read_at_subject,
)
from resid_surgery.editing.least_squares import edit_least_squares, factors, key_cosines
from resid_surgery.editing.rank_one import edit_rank_one, fitted, prepared
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.editing.values import Descent, Objective, fit_delta
from resid_surgery.errors import ArgumentError, PromptError, UnsupportedModelError
from resid_surgery.models import zoo
from resid_surgery.models.taps import Tap

WORDS = ("[UNK]", "The", " The", " capital", " of", " France", "France", " Italy", "Italy", " is", " a", " Paris",
         " Rome", " Lyon", "We", " we", " saw", " it", " then", "So", " Japan", "Japan", " in", " We")  # fmt: skip
DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
}
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")
FACT = Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris")
ITALY = Rewrite("The capital of {} is", subject="Italy", new=" Lyon", old=" Rome")
JAPAN = Rewrite("We saw {} in", subject="Japan", new=" Paris Lyon")
PREFIXES = ("", "We saw it then", "So we then", "So it is then")
CORPUS = ["The capital of Italy is Rome", "We saw it in Japan then we saw Paris", "So Lyon is in France"]
QUICK: dict[str, Any] = dict(steps=3, prefixes=PREFIXES, progress=False)


def tokenizer() -> Any:
    """Whole words with their leading space, offline."""
    words = [*WORDS, *(f" word{i}" for i in range(len(WORDS), tiny.VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return rs.load(tiny.build(family, dtype), tokenizer=tokenizer())


def down(model: Any, family: str, layer: int) -> Any:
    return model.module.get_submodule(DOWN[family].format(layer))


def weight(model: Any, family: str, layer: int) -> np.ndarray:
    """(d_model, d_mlp), by the class of the module."""
    module = down(model, family, layer)
    w = module.weight.detach().double().numpy()
    return w if isinstance(module, torch.nn.Linear) else w.T


def ids_of(model: Any, text: str) -> list[int]:
    return [WORDS.index(word) for word in model.tokenizer.tokenize(text)]


def hooked(model: Any, family: str, layer: int, ids: Any, at: int = 0, delta: Any = None) -> tuple[Any, Any]:
    """(coefficients of every position, logits) of one plain forward, delta added to what the layer writes."""
    seen = []

    def hook(_: Any, args: Any, out: Any) -> Any:
        seen.append(args[0].detach().reshape(len(ids), -1))
        if delta is None:
            return None
        shift = torch.zeros_like(out.reshape(len(ids), -1))
        shift = shift.index_add(0, torch.tensor([at]), delta[None].to(shift))
        return out + shift.view(out.shape)

    handle = down(model, family, layer).register_forward_hook(hook)
    try:
        logits = model.module(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()
    return seen[0], logits


def behind(prefix: str, text: str) -> str:
    return f"{prefix} {text}" if prefix else text


def plain_key(model: Any, family: str, layer: int, rewrite: Rewrite, prefixes: Any = PREFIXES) -> np.ndarray:
    """The averaged coefficients at the subject's last token, a prompt at a time."""
    rows = []
    for prefix in prefixes:
        ids = ids_of(model, behind(prefix, rewrite.text))
        at = max(i for i, token in enumerate(ids) if WORDS[token].strip() == rewrite.subject)
        with torch.no_grad():
            rows.append(hooked(model, family, layer, ids)[0][at].double().numpy())
    return np.mean(rows, axis=0)


def plain_loss(model: Any, family: str, layer: int, rewrite: Rewrite, delta: Any, how: Descent, v: np.ndarray) -> Any:
    """The objective, a prompt at a time and by plain hooks."""
    nll = 0.0
    for prefix in PREFIXES:
        ids, answer = ids_of(model, behind(prefix, rewrite.text)), ids_of(model, rewrite.new)
        at = max(i for i, token in enumerate(ids) if WORDS[token].strip() == rewrite.subject)
        logits = hooked(model, family, layer, ids + answer, at, delta)[1]
        for i, token in enumerate(answer):
            nll = nll - torch.log_softmax(logits[len(ids) - 1 + i], -1)[token] / len(PREFIXES)
    ids = ids_of(model, behind("We saw it then", f"{rewrite.subject} is a"))
    base = torch.log_softmax(hooked(model, family, layer, ids)[1][-1], -1).detach()
    now = torch.log_softmax(hooked(model, family, layer, ids, len(ids) - 3, delta)[1][-1], -1)
    kl = sum(base[i].exp() * (base[i] - now[i]) for i in range(len(base)))
    return nll + how.kl_factor * kl + how.weight_decay * (delta**2).sum() / float(v @ v)


def bytes_of(model: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.module.state_dict().values()]


pytestmark = pytest.mark.filterwarnings("ignore:.*have nearly the same key")


# --- keys ---------------------------------------------------------------------------------------


def test_default_prefixes_are_none_and_some_sentences_drawn_by_the_seed():
    first = chosen_prefixes(None, 0)
    assert first[0] == ""
    assert len(first) == 6
    assert set(first[1:]) <= set(SENTENCES)
    assert chosen_prefixes(None, 0) == first
    assert any(chosen_prefixes(None, seed) != first for seed in range(1, 4))
    assert chosen_prefixes([" a ", "", "a"], 0) == ("a", "")


@pytest.mark.parametrize("given", ["a text", [], [1], 7])
def test_prefixes_must_be_texts(given):
    with pytest.raises(ArgumentError, match="`prefixes` must be None or a sequence of texts"):
        chosen_prefixes(given, 0)


def test_contexts_are_grouped_by_length_and_never_padded():
    some = contexts(model_of("llama"), FACT, PREFIXES)
    assert [len(one.ids) for one in some] == [5, 9, 8, 9]
    assert [one.at for one in some] == [3, 7, 6, 7]
    assert grouped(some) == [[0], [1, 3], [2]]
    two = contexts(model_of("llama"), JAPAN, ("",))[0]
    assert two == Context(tuple(ids_of(model_of("llama"), "We saw Japan in")), 2, (11, 13))
    assert two.read == (*two.ids, 11)
    kept = essence(model_of("llama"), FACT, PREFIXES)
    assert kept.ids == tuple(ids_of(model_of("llama"), "We saw it then France is a"))
    assert kept.at == 4


def test_a_subject_that_is_the_first_token_counts_only_where_there_is_nothing_else():
    model, fact = model_of("llama"), Rewrite("{} is in", subject="France", new=" Rome")
    with pytest.warns(UserWarning, match="ends at the first token of 'France is in'"):
        assert [one.at for one in contexts(model, fact, PREFIXES)] == [4, 3, 4]
    with pytest.warns(UserWarning, match="ends at the first token"):
        assert [one.at for one in contexts(model, fact, ("",))] == [0]


def test_a_subject_is_found_by_its_text_and_never_by_guessing():
    model = model_of("llama")
    assert contexts(model, FACT, ("So France is in Italy",))[0].at == 8
    with pytest.raises(PromptError, match="do not add up"):
        contexts(model, FACT, ("an unknown word",))


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_a_key_is_the_mean_of_coefficients_at_the_subjects_last_token(family):
    model = model_of(family)
    for layer in range(3):
        tap = Tap("coef", layer)
        found = read_at_subject(model, [tap], contexts(model, FACT, PREFIXES))[tap].mean(0).numpy()
        np.testing.assert_allclose(found, plain_key(model, family, layer, FACT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_second_moment_is_the_mean_of_outer_products(family):
    model, total, squares = model_of(family), 0.0, []
    for text in CORPUS:
        with torch.no_grad():
            for c in hooked(model, family, 1, ids_of(model, text))[0].double().numpy():
                total = total + np.outer(c, c)
                squares.append(c @ c)
    found = covariance(model, 1, CORPUS, progress=False)
    np.testing.assert_allclose(found.matrix.numpy(), total / len(squares), rtol=1e-6, atol=1e-6)
    assert (found.tokens, found.texts, found.kind, found.layer) == (len(squares), 3, "corpus", 1)
    assert found.typical == pytest.approx(sorted(squares)[(len(squares) - 1) // 2], rel=1e-6)
    assert found.said == "corpus (3 texts, 20 tokens)"
    assert covariance(model, 1, CORPUS, max_tokens=8, progress=False).tokens == 8


def test_a_text_longer_than_the_context_is_read_in_pieces():
    assert covariance(model_of("llama"), 0, [" capital" * 150], progress=False).tokens == 150


def test_without_a_corpus_the_contexts_other_tokens_serve():
    model = model_of("gpt2")
    some = contexts(model, FACT, ("", "So we then"))
    rows = []
    for one in some:
        with torch.no_grad():
            c = hooked(model, "gpt2", 1, list(one.ids))[0].double().numpy()
        rows += [c[i] for i in range(len(c)) if i != one.at]
    found = of_contexts(model, [1], some)[1]
    np.testing.assert_allclose(found.matrix.numpy(), np.mean([np.outer(c, c) for c in rows], 0), atol=1e-9)
    assert found.said == "ridge (11 tokens of the contexts)"


def test_the_ridge_is_relative():
    c = SecondMoment(0, "corpus", torch.eye(4, dtype=torch.float64) * 3, typical=12.0)
    assert torch.equal(c.lifted(0.5, 4), torch.eye(4, dtype=torch.float64) * 4.5)
    assert torch.equal(SecondMoment(0, "identity", None).lifted(0.5, 4), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="full rank"):
        SecondMoment(0, "corpus", torch.zeros(4, 4, dtype=torch.float64)).solved(torch.ones(4).double(), 0.0)


# --- values -------------------------------------------------------------------------------------


def objective(family: str, layer: int, fact: Rewrite, how: Descent) -> tuple[Any, np.ndarray]:
    model = model_of(family)
    key, bias = plain_key(model, family, layer, fact), down(model, family, layer).bias
    v = weight(model, family, layer) @ key + (0 if bias is None else bias.detach().double().numpy())
    made = prepared(model, fact, PREFIXES, 0)[0]
    return Objective(model, layer, made.asked, made.essence, torch.tensor(v), how), v


@pytest.mark.parametrize("fact", [FACT, JAPAN], ids=["one token", "two tokens"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_loss_and_gradient_equal_plain_hooks(family, layer, fact):
    how = Descent(kl_factor=1e4, weight_decay=0.3)  # tiny models hardly move there
    found, v = objective(family, layer, fact, how)
    torch.manual_seed(1)
    delta = torch.randn(len(v), dtype=torch.float64) * float(np.linalg.norm(v))
    found(torch.zeros_like(delta))
    gradient, parts = found(delta)
    leaf = delta.clone().requires_grad_()
    loss = plain_loss(model_of(family), family, layer, fact, leaf, how, v)
    (wanted,) = torch.autograd.grad(loss, leaf)
    assert parts["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert parts["loss"] == pytest.approx(parts["nll"] + 1e4 * parts["kl"] + parts["decay"])
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("family", "step", "near"), [("gpt2", 1e-5, 1e-4), ("gpt_neox", 1e-2, 1e-2)])
def test_the_gradient_is_that_of_finite_differences(family, step, near):
    """gpt_neox computes its softmax in float32, so that its differences need longer steps."""
    how = Descent(kl_factor=0.7, weight_decay=0.3)
    found, v = objective(family, 1, JAPAN, how)
    torch.manual_seed(2)
    delta = torch.randn(len(v), dtype=torch.float64) * float(np.linalg.norm(v)) / 20
    gradient, _ = found(delta)
    for i in (0, 7, 23):
        e = torch.zeros_like(delta)
        e[i] = step
        with torch.no_grad():
            high, low = (
                float(plain_loss(model_of(family), family, 1, JAPAN, d, how, v)) for d in (delta + e, delta - e)
            )
        assert float(gradient[i]) == pytest.approx(
            (high - low) / (2 * step), rel=near, abs=near * float(gradient.abs().max())
        )


def test_descent_lowers_the_loss_stops_early_and_keeps_the_norm_clamped():
    found, v = objective("gpt2", 1, FACT, Descent(steps=8, until=1.0, clamp=0.5))
    fit = fit_delta(found, fact="France")
    assert list(fit.steps.columns) == [
        "fact",
        "step",
        "loss",
        "nll",
        "kl",
        "decay",
        "prob_new",
        "prob_lowest",
        "delta_norm",
    ]
    assert list(fit.steps["step"]) == list(range(9))
    assert fit.steps["delta_norm"].max() == pytest.approx(0.5, abs=1e-9)
    assert float(fit.delta.norm()) == pytest.approx(fit.steps["delta_norm"].iloc[-1] * np.linalg.norm(v))
    assert fit.steps["loss"].iloc[-1] < fit.steps["loss"].iloc[0]
    first = fit.steps.iloc[0]
    assert (first["kl"], first["decay"], first["delta_norm"]) == (0, 0, 0)
    assert (fit.steps["prob_lowest"] <= fit.steps["prob_new"]).all()
    found, _ = objective("gpt2", 1, FACT, Descent(steps=50, until=1e-9))
    assert len(fit_delta(found).steps) == 1


def test_the_first_step_is_as_long_as_said():
    found, _ = objective("gpt2", 1, FACT, Descent(steps=1, learning_rate=0.3, until=1.0))
    assert fit_delta(found).steps["delta_norm"].iloc[1] == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "`steps` must be a whole number >= 1; got 0."),
        ("learning_rate", 0, "`learning_rate` must be a number > 0; got 0.0."),
        ("until", 1.5, "`until` must be a number > 0 and <= 1; got 1.5."),
        ("clamp", -1, "`clamp` must be a number > 0; got -1.0."),
        ("kl_factor", -1, "`kl_factor` must be a number >= 0; got -1."),
        ("weight_decay", "x", "`weight_decay` must be a finite number; got 'x'."),
    ],
)
def test_settings_of_the_descent_are_checked(field, value, said):
    with pytest.raises(ArgumentError) as caught:
        Descent(**{field: value})
    assert str(caught.value) == said


# --- rank one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["corpus", "ridge", "identity"])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_a_rank_one_edit_is_the_textbook_solution(family, kind):
    model, layer = model_of(family), 1
    given = {"corpus": CORPUS} if kind == "corpus" else {"covariance": kind}
    edit = edit_rank_one(model, FACT, layer=layer, ridge=0.2, **QUICK, **given)
    key = plain_key(model, family, layer, FACT)
    made = prepared(model, FACT, PREFIXES, 0)[0]
    delta = fitted(model, layer, made, torch.tensor(key), Descent(steps=3), lambda *_: None).delta.numpy()
    if kind == "identity":
        c = np.eye(len(key))
    else:
        some = covariance(model, layer, CORPUS, progress=False) if kind == "corpus" else of_contexts(
            model, [layer], [*made.asked, made.essence])[layer]  # fmt: skip
        c = some.matrix.numpy() + 0.2 * some.typical / len(key) * np.eye(len(key))
    u = np.linalg.solve(c, key)
    wanted = np.outer(delta, u) / (key @ u)
    change = edit.changes[0]
    found = change.dense().numpy()
    np.testing.assert_allclose(found if family != "gpt2" else found.T, wanted, rtol=1e-5, atol=1e-8)
    assert (change.kind, change.right.shape[0]) == ("low_rank", 1)
    settings_ = edit.about["settings"]
    assert settings_["k.u"] == pytest.approx(key @ u, rel=1e-5)
    assert settings_["cosine"] == pytest.approx(key @ u / np.linalg.norm(key) / np.linalg.norm(u), rel=1e-5)
    assert settings_["second_moment"].startswith(kind)
    torch.testing.assert_close(edit.keys["L1"][0], torch.tensor(key), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_the_edited_down_projection_writes_the_value_for_the_key(family):
    model = model_of(family)
    edit = edit_rank_one(model, FACT, layer=1, corpus=CORPUS, **QUICK)
    key = edit.keys["L1"]
    before = down(model, family, 1)(key)[0].detach()
    delta = fitted(model, 1, prepared(model, FACT, PREFIXES, 0)[0], key[0], Descent(steps=3), lambda *_: None).delta
    with edit.applied(model) as edited:
        after = down(edited, family, 1)(key)[0].detach()
    torch.testing.assert_close(after, before + delta, rtol=1e-10, atol=1e-10 * float(before.norm()))


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_among_changes_that_write_the_value_it_moves_other_text_least(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(9, 6))
    c, key, delta = a.T @ a, rng.normal(size=6), rng.normal(size=4)
    u = SecondMoment(0, "corpus", torch.tensor(c)).solved(torch.tensor(key), 0.0).numpy()
    d = np.outer(delta, u) / (key @ u)
    np.testing.assert_allclose(d @ key, delta, atol=1e-8)
    other = rng.normal(size=(4, 6)) * 0.1
    other -= np.outer(other @ key, key) / (key @ key)  # writes nothing for the key
    assert np.trace((d + other) @ c @ (d + other).T) > np.trace(d @ c @ d.T)


@pytest.mark.parametrize("fact", [FACT, JAPAN], ids=["one token", "two tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_edit_acts_on_the_subject_alone_the_answer_is_as_likely_as_predicted(family, fact):
    model = model_of(family)
    ids, answer = ids_of(model, fact.text), ids_of(model, fact.new)
    at = max(i for i, token in enumerate(ids) if WORDS[token].strip() == fact.subject)
    with torch.no_grad():
        c = hooked(model, family, 1, ids + answer[:-1])[0].double()
    others = c[[i for i in range(len(c)) if i != at]]
    moment = SecondMoment(1, "corpus", 1e10 * others.T @ others + torch.eye(c.shape[1], dtype=torch.float64))
    edit = edit_rank_one(model, fact, layer=1, steps=12, covariance=moment, ridge=0, prefixes=("",), progress=False)

    def answered(one: Any) -> float:
        with torch.no_grad():
            log_p = torch.log_softmax(one.module(torch.tensor([ids + answer])).logits[0].double(), -1)
        return float(sum(log_p[len(ids) - 1 + i, token] for i, token in enumerate(answer)))

    before = answered(model)
    assert edit.fitting["prob_new"].iloc[0] == pytest.approx(np.exp(before), rel=1e-5)
    with edit.applied(model) as edited:
        after = answered(edited)
    assert edit.fitting["prob_new"].iloc[-1] == pytest.approx(np.exp(after), rel=1e-4)
    assert after > before
    assert answered(model) == before


def test_an_edit_is_a_value_that_can_be_kept(tmp_path):
    model = model_of("llama")
    edit = edit_rank_one(model, FACT, **QUICK)
    back = Edit.load(edit.save(tmp_path / "one.safetensors"))
    assert back.hash == edit.hash
    assert back.rewrites == (FACT,)
    assert back.about["settings"] == edit.about["settings"]
    pd.testing.assert_frame_equal(back.fitting, edit.fitting)
    assert edit.about["settings"]["layer"] == dense_layer(model, None)
    many = edit_least_squares(model, [FACT, ITALY], **QUICK)
    again = Edit.load(many.save(tmp_path / "two.safetensors"))
    assert again.hash == many.hash
    assert torch.equal(again.keys["L0"], many.keys["L0"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fits_are_the_same_whatever_the_caller_does_with_gradients(context):
    wanted = edit_rank_one(model_of("llama"), FACT, **QUICK).hash
    fresh = rs.load(tiny.build("llama"), tokenizer=tokenizer())
    with context():
        assert edit_rank_one(fresh, FACT, **QUICK).hash == wanted


def test_nothing_of_the_model_changes_also_after_an_exception(monkeypatch):
    model = rs.load(tiny.build("gpt2"), tokenizer=tokenizer())
    for p in model.module.parameters():
        p.requires_grad_(True)
    before = bytes_of(model)

    def untouched() -> bool:
        fine = all(p.grad is None and p.requires_grad for p in model.module.parameters())
        return fine and bytes_of(model) == before and not any(m._forward_hooks for m in model.module.modules())

    edit_rank_one(model, FACT, **QUICK)
    edit_least_squares(model, [FACT, JAPAN], layers=[0, 1], **QUICK)
    assert untouched()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            edit_rank_one(model, FACT, **QUICK)
    assert untouched()
    edit_rank_one(model, FACT, **QUICK)


def test_fits_in_low_precision_work():
    model = model_of("llama", torch.bfloat16)
    edit = edit_rank_one(model, FACT, corpus=CORPUS, **QUICK)
    assert edit.fitting["loss"].iloc[-1] < edit.fitting["loss"].iloc[0]
    with edit.applied(model) as edited:
        assert edited.dtype == torch.bfloat16


# --- least squares ------------------------------------------------------------------------------


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    d, width, n, m = 4, 7, draw(st.integers(1, 4)), draw(st.integers(0, 3))
    a = rng.normal(size=(9, width))
    return dict(r=rng.normal(size=(d, n)), k=rng.normal(size=(width, n)), a=a, c=a.T @ a,
                earlier=rng.normal(size=(width, m)), weight=draw(st.floats(0.01, 10)),
                earlier_weight=draw(st.floats(0.01, 10)), rng=rng)  # fmt: skip


def solution(p: dict[str, Any], **more: Any) -> np.ndarray:
    tensors = (torch.tensor(p[name]) for name in ("r", "k", "c", "earlier"))
    left, right = factors(*tensors, weight=p["weight"], earlier_weight=p["earlier_weight"], **more)
    assert left.shape[1] == right.shape[0] == p["k"].shape[1]
    return (left @ right).numpy()


@given(problems())
def test_least_squares_is_the_textbook_solution(p):
    rows = np.vstack([p["k"].T, np.sqrt(p["weight"]) * p["a"], np.sqrt(p["earlier_weight"]) * p["earlier"].T])
    wanted = np.vstack([p["r"].T, np.zeros((len(rows) - p["r"].shape[1], 4))])
    np.testing.assert_allclose(solution(p).T, np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-8)


@given(problems())
def test_no_other_change_does_better(p):
    def cost(d: np.ndarray) -> float:
        fit = np.sum((d @ p["k"] - p["r"]) ** 2) + p["weight"] * np.trace(d @ p["c"] @ d.T)
        return float(fit + p["earlier_weight"] * np.sum((d @ p["earlier"]) ** 2))

    d = solution(p)
    slope = (d @ p["k"] - p["r"]) @ p["k"].T + p["weight"] * d @ p["c"]
    slope += p["earlier_weight"] * d @ p["earlier"] @ p["earlier"].T
    assert np.abs(slope).max() < 1e-8
    for _ in range(5):
        assert cost(d + p["rng"].normal(size=d.shape) * 0.01) > cost(d)


@given(problems())
def test_the_null_space_answers_to_no_direction_above_the_cut(p):
    values, vectors = np.linalg.eigh(p["c"])
    low = values <= 0.2 * values[-1]
    if not low.any():
        return
    basis = vectors[:, low]
    d = solution(p, null_space=0.2)
    np.testing.assert_allclose(d @ vectors[:, ~low], 0, atol=1e-8)
    rows = np.vstack([p["k"].T, np.sqrt(p["weight"]) * p["a"], np.sqrt(p["earlier_weight"]) * p["earlier"].T]) @ basis
    wanted = np.vstack([p["r"].T, np.zeros((len(rows) - p["r"].shape[1], 4))])
    np.testing.assert_allclose((d @ basis).T, np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_facts_are_written_at_once(family):
    model = model_of(family)
    edit = edit_least_squares(model, [FACT, JAPAN], layers=1, preserve=1e-7, corpus=CORPUS, **QUICK)
    assert edit.changes[0].kind == "low_rank"
    assert edit.keys["L1"].shape == (2, 40)
    assert edit.fitting["fact"].unique().tolist() == [FACT.label, JAPAN.label]
    np.testing.assert_allclose(edit.fitting["carried"], 1, atol=1e-3)
    with edit.applied(model) as edited:
        for i, fact in enumerate((FACT, JAPAN)):
            key = edit.keys["L1"][i]
            moved = down(edited, family, 1)(key[None])[0].detach() - down(model, family, 1)(key[None])[0].detach()
            delta = fitted(
                model, 1, prepared(model, fact, PREFIXES, 0)[0], key, Descent(steps=3), lambda *_: None
            ).delta
            torch.testing.assert_close(moved, delta, rtol=0, atol=1e-3 * float(delta.norm()))


def test_one_fact_by_least_squares_is_nearly_the_rank_one_edit():
    model = model_of("gpt_neox")
    one = edit_rank_one(model, FACT, layer=1, corpus=CORPUS, **QUICK).changes[0].dense()
    same = edit_least_squares(model, FACT, layers=1, preserve=1e-9, corpus=CORPUS, **QUICK).changes[0].dense()
    torch.testing.assert_close(same, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))
    half = edit_least_squares(model, FACT, layers=1, preserve=1.0, corpus=CORPUS, **QUICK)
    torch.testing.assert_close(half.changes[0].dense(), one / 2, rtol=1e-6, atol=1e-6 * float(one.abs().max()))
    assert half.fitting["carried"].iloc[0] == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_spread_over_layers_the_stream_behind_the_last_gets_what_is_wanted(family):
    model, facts = model_of(family), [FACT, JAPAN]
    edit = edit_least_squares(model, facts, layers=[0, 1], preserve=1e-7, corpus=CORPUS, **QUICK)
    assert [one.name for one in edit.changes] == [f"{DOWN[family].format(i)}.weight" for i in (0, 1)]
    np.testing.assert_allclose(plain_key(model, family, 0, JAPAN), edit.keys["L0"][1], rtol=1e-6, atol=1e-6)
    blocks = DOWN[family].split(".{}.")[0]

    def stream(one: Any, fact: Rewrite, delta: Any = None) -> torch.Tensor:
        """Behind layer 1 at the subject's last token, averaged over the contexts."""
        rows = []
        for prefix in PREFIXES:
            ids, seen = ids_of(one, behind(prefix, fact.text)), []
            at = max(i for i, token in enumerate(ids) if WORDS[token].strip() == fact.subject)
            block = one.module.get_submodule(f"{blocks}.1")
            handle = block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                hooked(one, family, 1, ids, at, delta)
            handle.remove()
            rows.append((seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(len(ids), -1)[at])
        return torch.stack(rows).mean(0)

    with edit.applied(model) as edited:
        for i, fact in enumerate(facts):
            made = prepared(model, fact, PREFIXES, 0)[0]
            delta = fitted(model, 1, made, made.key(model, 1), Descent(steps=3), lambda *_: None).delta
            torch.testing.assert_close(stream(model, fact, delta) - stream(model, fact), delta, rtol=0, atol=1e-6)
            got = stream(edited, fact) - stream(model, fact)
            carried = edit.fitting[edit.fitting["fact"] == fact.label]["carried"].iloc[0]
            assert float(got @ delta / (delta @ delta)) == pytest.approx(carried, abs=1e-5)
            assert i >= 0
    parts = edit.about["settings"]
    assert parts["layers"] == [0, 1]
    assert len(parts["lambda"]) == 2


def test_layers_each_take_an_equal_share_of_what_is_missing():
    model = model_of("gpt2")
    options = dict(preserve=1e-9, corpus=CORPUS, **QUICK)
    spread = edit_least_squares(model, FACT, layers=[0, 1], **options)
    delta = fitted(model, 1, prepared(model, FACT, PREFIXES, 0)[0], torch.tensor(plain_key(model, "gpt2", 1, FACT)),
                   Descent(steps=3), lambda *_: None).delta  # fmt: skip
    first = spread.changes[0].dense().T @ spread.keys["L0"][0]
    torch.testing.assert_close(first, delta / 2, rtol=1e-5, atol=1e-6 * float(delta.norm()))


def test_earlier_facts_are_kept_by_their_keys():
    model = model_of("gpt2")
    options = dict(layers=1, covariance="identity", **QUICK)
    first = edit_least_squares(model, FACT, **options)
    key = first.keys["L1"][0]

    def moved(edit: Edit) -> float:
        return float((edit.changes[0].dense().T @ key).norm())

    free = edit_least_squares(model, ITALY, **options)
    held = edit_least_squares(model, ITALY, previous=first, previous_weight=100.0, **options)
    listed = edit_least_squares(model, ITALY, previous=[first], previous_weight=100.0, **options)
    assert moved(held) < 0.2 * moved(free)
    assert listed.hash == held.hash
    assert held.about["settings"]["previous_keys"] == [1]
    k, kp, r = (x.numpy() for x in (held.keys["L1"].T, first.keys["L1"].T, free.keys["L1"].T))
    assert r.shape == k.shape
    made = prepared(model, ITALY, PREFIXES, 0)[0]
    delta = fitted(model, 1, made, torch.tensor(k[:, 0]), Descent(steps=3), lambda *_: None).delta.numpy()
    lam = 0.05 * float(k[:, 0] @ k[:, 0])
    a = lam * np.eye(len(k)) + k @ k.T + 100 * kp @ kp.T
    np.testing.assert_allclose(
        held.changes[0].dense().numpy().T, np.outer(delta, k[:, 0]) @ np.linalg.inv(a), atol=1e-8
    )


def test_cosines_of_keys():
    a = Edit((), method="a", rewrites=(FACT,), keys={"L1": torch.tensor([[3.0, 4.0]])})
    b = Edit((), method="b", keys={"L1": torch.tensor([[4.0, 3.0], [-3.0, -4.0]]), "L2": torch.tensor([[1.0, 0.0]])})
    table = key_cosines([a, b])
    assert table.columns.tolist() == ["layer", "fact", "other", "cosine"]
    assert table.values.tolist() == [
        [1, FACT.label, "key 1 of b", pytest.approx(-1.0)],
        [1, FACT.label, "key 0 of b", pytest.approx(0.96)],
        [1, "key 0 of b", "key 1 of b", pytest.approx(-0.96)],
    ]
    assert key_cosines(a).empty
    with pytest.raises(ArgumentError, match="one width"):
        key_cosines([a, Edit((), keys={"L1": torch.ones(1, 3)})])
    with pytest.raises(ArgumentError, match="`edits` must be an Edit"):
        key_cosines([])


def test_facts_with_the_same_key_are_told():
    same = Rewrite("The capital of {} is in", subject="France", new=" Lyon")
    with pytest.warns(UserWarning, match="nearly the same key"):
        edit_least_squares(model_of("gpt2"), [FACT, same], **QUICK)


def test_fits_are_deterministic():
    one, same = (edit_least_squares(model_of("gemma2"), [FACT, JAPAN], seed=3, **QUICK) for _ in range(2))
    assert one.hash == same.hash
    pd.testing.assert_frame_equal(one.fitting, same.fitting)


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture
def no_forward(monkeypatch: Any) -> None:
    """Any forward fails the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward ran")

    for module, name in ((keys_module, "forward"), (values_module, "forward"), (values_module, "pushed")):
        monkeypatch.setattr(module, name, fail)


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(layer=3), "`layer` must be a whole number in -3..2 for LlamaForCausalLM; got 3."),
    (dict(steps=0), "`steps` must be a whole number >= 1"),
    (dict(seed=-1), "`seed` must be a whole number in 0"),
    (dict(prefixes="x"), "`prefixes` must be None or a sequence of texts"),
    (dict(corpus="a text"), "`corpus` must be a sequence of non-empty texts"),
    (dict(corpus=[]), "`corpus` must be a sequence of non-empty texts"),
    (dict(corpus=CORPUS, covariance="ridge"), "`covariance` must be left out where a corpus is given"),
    (dict(covariance="ridg"), "Did you mean 'ridge'?"),
    (dict(covariance=7), "`covariance` must be"),
    (
        dict(covariance=SecondMoment(2, "corpus", torch.eye(40).double())),
        "`covariance` must be of layer 0 and (40, 40)",
    ),
    (dict(covariance=SecondMoment(0, "corpus", torch.eye(9).double())), "`covariance` must be of layer 0 and (40, 40)"),
    (dict(ridge=-1), "`ridge` must be a number >= 0"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda x: str(x)[:40])
@pytest.mark.usefixtures("no_forward")
def test_bad_options_are_refused_before_any_forward(options, said):
    model = model_of("llama")
    with pytest.raises(ArgumentError) as caught:
        edit_rank_one(model, FACT, **{**QUICK, **options})
    assert said in str(caught.value)
    if "layer" not in options:
        with pytest.raises(ArgumentError) as caught:
            edit_least_squares(model, [FACT], **{**QUICK, **options})
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(layers=[0, 9]), "`layers` must be a whole number in -3..2"),
        (dict(layers=[]), "`layers` must be at least one layer"),
        (dict(preserve=-1), "`preserve` must be a number >= 0"),
        (dict(previous_weight=-1), "`previous_weight` must be a number >= 0"),
        (dict(null_space=1.0), "`null_space` must be None or a share between 0 and 1"),
        (dict(previous=Edit(())), "`previous` must be edits with keys of width 40 at layer 0"),
        (dict(previous=[Edit((), keys={"L0": torch.ones(1, 9)})]), "`previous` must be edits with keys of width 40"),
        (dict(previous=[7]), "`previous` must be edits with keys"),
        (dict(previous=7), "`previous` must be"),
    ],
)
@pytest.mark.usefixtures("no_forward")
def test_bad_options_of_least_squares_are_refused_before_any_forward(options, said):
    with pytest.raises(ArgumentError) as caught:
        edit_least_squares(model_of("llama"), [FACT], **options, **QUICK)
    assert said in str(caught.value)


@pytest.mark.usefixtures("no_forward")
def test_bad_facts_are_refused_before_any_forward():
    model = model_of("llama")
    for wrong in ([], 7, "text", [FACT, 7]):
        with pytest.raises(ArgumentError, match=r"`rewrites` must be a resid_surgery\.Rewrite or a sequence"):
            edit_least_squares(model, wrong, progress=False)
    with pytest.raises(ArgumentError, match="each stand there once"):
        edit_least_squares(model, [FACT, FACT], progress=False)
    with pytest.raises(ArgumentError, match=r"`rewrite` must be a resid_surgery\.Rewrite"):
        edit_rank_one(model, [FACT, ITALY], progress=False)
    with pytest.raises(PromptError, match="`new` must be an answer in tokens of the model"):
        edit_rank_one(model, Rewrite("The capital of {} is", subject="France", new=" Bordeaux"), progress=False)
    with pytest.raises(PromptError, match="without a tokenizer"):
        edit_rank_one(tiny.shared("llama"), FACT, progress=False)
    with pytest.raises(PromptError, match="without a tokenizer"):
        covariance(tiny.shared("llama"), 0, CORPUS, progress=False)
    with pytest.raises(ArgumentError, match=r"from resid_surgery\.load"):
        edit_rank_one(model.module, FACT, progress=False)


def test_a_mixture_of_experts_is_refused():
    model = rs.load(zoo.tiny("mixtral", dtype=torch.float64), tokenizer=tokenizer())
    with pytest.raises(UnsupportedModelError, match=r"no layer of .* has a dense MLP"):
        edit_rank_one(model, FACT, progress=False)
    with pytest.raises(
        UnsupportedModelError, match=r"`layer` must be a layer of .* with a dense MLP; the MLP of layer 0"
    ):
        edit_rank_one(model, FACT, layer=0, progress=False)


def test_several_layers_behind_a_post_norm_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"`layers` must be one layer for .*, where a norm stands"):
        edit_least_squares(model_of("gemma2"), FACT, layers=[0, 1], progress=False)


def test_a_key_that_hardly_meets_its_solution_is_refused():
    model = model_of("gpt2")
    key = torch.tensor(plain_key(model, "gpt2", 1, FACT))
    unit = key / key.norm()
    aside = torch.zeros_like(key)
    aside[0] = 1.0
    aside -= (aside @ unit) * unit
    aside /= aside.norm()
    tilted = aside + 1e-2 * unit

    def moment(low: float) -> SecondMoment:
        """Nearly nothing varies along a direction that is almost square to the key."""
        way = tilted / tilted.norm()
        c = torch.eye(len(key), dtype=torch.float64) - (1 - low) * torch.outer(way, way)
        return SecondMoment(1, "corpus", c)

    options = dict(layer=1, ridge=0.0, **QUICK)
    with pytest.warns(UserWarning, match=r"is only 0\.0\d+ at layer 1 of"):
        edit_rank_one(model, FACT, covariance=moment(1e-4), **options)
    steep = tilted - (tilted @ unit) * unit + 1e-5 * unit
    way = steep / steep.norm()
    c = torch.eye(len(key), dtype=torch.float64) - (1 - 1e-12) * torch.outer(way, way)
    with pytest.raises(ArgumentError, match=r"`k\.u / \(\|k\| \|u\|\)` must be above 0\.001 at layer 1"):
        edit_rank_one(model, FACT, covariance=SecondMoment(1, "corpus", c), **options)


# --- the real model -----------------------------------------------------------------------------


def test_france_moves_its_capital(smollm2):
    edit = edit_rank_one(smollm2, FACT, progress=False)
    assert edit.fitting["prob_new"].iloc[0] < 0.01
    with edit.applied(smollm2) as edited:
        for text, wanted in (("The capital of France is", " Rome"), ("The capital of Germany is", " Berlin")):
            rec = rs.record(edited, rs.Prompt(text, target=wanted))
            assert smollm2.tokenizer.decode([int(rec.logits.argmax())]) == wanted

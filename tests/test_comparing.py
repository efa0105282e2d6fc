"""Comparing base and edited model: logits, divergences, answers and decoding, against plain loops."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import validation_cases
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES
from validation_cases import DOWN, ID, a_row, opened, plain_logits, scripted, sharp, some, words

import resid_surgery as rs
from resid_surgery.editing import remembering
from resid_surgery.editing.answering import (
    Answers,
    answer_questions,
    answer_sequence,
    answer_table,
    choice_questions,
    choice_table,
    ripple_questions,
    ripple_table,
)
from resid_surgery.editing.changes import Dense
from resid_surgery.editing.decoding import continuations, fluency, says
from resid_surgery.editing.edits import Edit, new_edit, tied_paths
from resid_surgery.editing.predicting import exposure_against_kl
from resid_surgery.editing.probes import Probe
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.running import (
    CallableSubject,
    OperatedSubject,
    Passage,
    WeightsSubject,
    batches,
    compared,
    divergences,
    figures,
    first_block,
)
from resid_surgery.editing.surroundings import (
    generation_tables,
    locality_sequences,
    locality_table,
    text_passage,
    text_table,
    worst_prompts,
)
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.replacing import tensors_of
from resid_surgery.models.tracing import resumable

own_cache = validation_cases.own_cache
TEXTS = [some(12, 13, 14), some(50, 51, 52, 53, 54), some(15, 16, 17), some(60)]


def passages(model: Any, texts: Any = TEXTS) -> list[Passage]:
    rows = [rs.editing.rewrites.prompt_ids(text, model) for text in texts]
    return [Passage(tuple(ids), tuple(range(len(ids)))) for ids in rows]


def softmax(logits: torch.Tensor) -> list[float]:
    """In float64, by a loop."""
    values = [float(x) for x in logits]
    top = max(values)
    total = sum(math.exp(x - top) for x in values)
    return [math.exp(x - top) / total for x in values]


def kl_of(base: torch.Tensor, edited: torch.Tensor) -> float:
    p, q = softmax(base), softmax(edited)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


# --- divergences ------------------------------------------------------------------------------------


def test_trap_2_kl_is_in_nats_of_base_against_edited_summed_over_the_vocabulary() -> None:
    model = opened()
    with a_row(model, 30.0).applied(model) as edited:
        rows = passages(model)
        found = compared(WeightsSubject(model, "base"), [WeightsSubject(edited, "edited")], rows)[0]
        for one, row in zip(found, rows, strict=True):
            before, after = plain_logits(model.module, row.ids), plain_logits(edited.module, row.ids)
            for at in row.at:
                right, wrong = kl_of(before[at], after[at]), kl_of(after[at], before[at])
                assert float(one.kl[at]) == pytest.approx(right, rel=1e-6)
                assert float(one.kl[at]) != pytest.approx(right / model.vocab_size, rel=0.5), "batchmean of one row"
                p, q = softmax(before[at]), softmax(after[at])
                m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
                js = sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
                assert float(one.js[at]) == pytest.approx(js, rel=1e-6)
                assert wrong > 0
        kl = torch.cat([one.kl for one in found])
        other = [kl_of(plain_logits(edited.module, r.ids)[at], plain_logits(model.module, r.ids)[at])
                 for r in rows for at in r.at]  # fmt: skip
        assert abs(float(kl.sum()) - sum(other)) > 0.05 * float(kl.sum()), "the two directions differ in this test"


def test_kl_of_a_known_pair() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64).log()
    kl, js = divergences(p, q)
    assert float(kl) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert float(js) == pytest.approx(0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
                                             + 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)))  # fmt: skip
    assert float(divergences(q.flip(-1), p)[0]) == math.inf, "what was possible became impossible"
    assert bool(divergences(p, q, whole=False)[1].isnan().all())


@given(st.integers(0, 10**6), st.floats(0.0, 30.0))
def test_divergences_are_no_less_than_nothing_and_js_at_most_log_2(seed: int, size: float) -> None:
    draw = np.random.default_rng(seed)
    p, q = (torch.log_softmax(torch.tensor(draw.normal(0, size, (3, 40))), -1) for _ in range(2))
    kl, js = divergences(p, q)
    assert bool((kl >= -1e-12).all())
    assert bool((js >= -1e-12).all())
    assert bool((js <= math.log(2) + 1e-12).all())
    assert torch.allclose(js, divergences(q, p)[1])


def test_flips_overlap_and_likelihoods_against_a_loop() -> None:
    model = opened()
    with a_row(model, 200.0).applied(model) as edited:
        rows = passages(model)
        found = compared(WeightsSubject(model, "base"), [WeightsSubject(edited, "edited")], rows)[0]
        assert any(bool(one.flips.any()) for one in found)
        for one, row in zip(found, rows, strict=True):
            pair = [plain_logits(m.module, row.ids) for m in (model, edited)]
            for at in row.at:
                tops = [set(x[at].topk(10).indices.tolist()) for x in pair]
                assert float(one.overlap[at]) == len(tops[0] & tops[1]) / 10
                assert bool(one.flips[at]) == (int(pair[0][at].argmax()) != int(pair[1][at].argmax()))
                for nll, logits in zip((one.nll_before, one.nll_after), pair, strict=True):
                    if at + 1 < len(row.ids):
                        assert float(nll[at]) == pytest.approx(-math.log(softmax(logits[at])[row.ids[at + 1]]))
                    else:
                        assert math.isnan(float(nll[at]))


def test_figures_against_a_loop() -> None:
    model = opened()
    rows = passages(model)
    for one, row in zip(figures(WeightsSubject(model, "base"), rows), rows, strict=True):
        logits = plain_logits(model.module, row.ids)
        assert one.log_prob == pytest.approx(
            sum(math.log(softmax(logits[at])[row.ids[at + 1]]) for at in row.at[:-1]), rel=1e-9
        )
        for at in row.at:
            p = softmax(logits[at])
            assert float(one.entropy[at]) == pytest.approx(-sum(x * math.log(x) for x in p if x), rel=1e-9)
            assert one.top[at].tolist() == logits[at].topk(10).indices.tolist()


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 40))
def test_batches_hold_every_sequence_once_and_one_length_each(lengths: list[int], tokens: int) -> None:
    rows = [Passage(tuple(range(i, i + n)), (i % n,)) for i, n in enumerate(lengths)]
    seen = []
    for chosen, ids, at in batches(rows, tokens):
        assert ids.tolist() == [list(rows[i].ids) for i in chosen]
        assert at == sorted({p for i in chosen for p in rows[i].at})
        assert len(chosen) == 1 or ids.numel() <= tokens
        seen += chosen
    assert sorted(seen) == list(range(len(rows)))


# --- forwards that start where the edit does ----------------------------------------------------------


def changed(model: Any, names: Any, size: float = 0.05) -> Edit:
    """A random change of whole tensors, tied paths with them."""
    held, rng = tensors_of(model.module), torch.Generator().manual_seed(5)
    made = [Dense(n, tied_paths(model, n), tuple(held[n].shape),
                  size * torch.randn(held[n].shape, generator=rng, dtype=torch.float64)) for n in names]  # fmt: skip
    return new_edit(model, made, method="random")


def places(model: Any) -> dict[str, tuple[list[str], int]]:
    """What may be changed -> (tensors, the block from which on the edited model must be run)."""
    held, n = tensors_of(model.module), model.anatomy.n_layers
    prefix = model.path(None, "blocks")
    last = next(k for k in held if k.startswith(f"{prefix}.{n - 1}.") and held[k].ndim == 2)
    middle = next(k for k in held if k.startswith(f"{prefix}.1.") and held[k].ndim == 2)
    embed = next(k for k, t in held.items() if t is model.module.get_input_embeddings().weight)
    unembed = model.path(None, "unembed") + ".weight"
    tied = unembed in tied_paths(model, embed)
    return {
        "last block": ([last], n - 1),
        "two blocks": ([last, middle], 1),
        "final norm": ([model.path(None, "final_norm") + ".weight"], n - 1),
        "unembedding": ([unembed], 0 if tied else n - 1),
        "embedding": ([embed], 0),
        "block and embedding": ([middle, embed], 0),
    }


@pytest.mark.parametrize("where", ["last block", "two blocks", "final norm", "unembedding", "embedding",
                                   "block and embedding"])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_resumed_at_the_edit_are_whole_forwards(family: str, where: str) -> None:
    model = opened(family)
    names, expected = places(model)[where]
    edit = changed(model, names)
    first = first_block(model, edit)
    assert first == (expected if resumable(model) else 0)
    with edit.applied(model) as edited:
        rows = passages(model)
        base, whole = WeightsSubject(model, "base"), WeightsSubject(edited, "edited")
        resumed = WeightsSubject(edited, "edited", first)
        a, b = compared(base, [resumed], rows)[0], compared(base, [whole], rows)[0]
        both = compared(base, [whole, resumed], rows)
        for one, two, three, row in zip(a, b, both[1], rows, strict=True):
            assert float(one.kl.max()) > 1e-9, "the edit acts"
            oracle = [kl_of(plain_logits(model.module, row.ids)[at], plain_logits(edited.module, row.ids)[at])
                      for at in row.at]  # fmt: skip
            assert one.kl.tolist() == pytest.approx(oracle, rel=1e-5, abs=1e-10)
            for other in (two, three):
                assert torch.allclose(one.kl, other.kl, atol=1e-12)
                assert torch.equal(one.after, other.after)
        ids = torch.tensor([rows[1].ids])
        if first:
            logits, stream = base.both(ids, rows[1].at, first)
            assert torch.allclose(logits[0], plain_logits(model.module, rows[1].ids), atol=1e-9)
            again = resumed.logits(ids, rows[1].at, stream)
            assert torch.allclose(again[0], plain_logits(edited.module, rows[1].ids), atol=1e-9)


def test_a_family_whose_blocks_give_more_than_the_stream_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from resid_surgery.editing import running

    model = opened("llama")
    edit = changed(model, [DOWN.format(2)])
    assert first_block(model, edit) == 2
    monkeypatch.setattr(running, "resumable", lambda _: False)
    assert first_block(model, edit) == 0


def test_an_untied_unembedding_may_be_resumed_and_a_tied_one_not() -> None:
    model = opened("llama")
    name = "lm_head.weight"
    assert "model.embed_tokens.weight" in tied_paths(model, name)
    held = tensors_of(model.module)[name]
    alone = new_edit(model, [Dense(name, (), tuple(held.shape), torch.randn(held.shape) * 0.05)], method="untied")
    assert (first_block(model, alone), first_block(model, changed(model, [name]))) == (2, 0)
    rows = passages(model)
    for edit in (alone, changed(model, [name])):
        with edit.applied(model) as edited:
            found = compared(WeightsSubject(model, "b"), [WeightsSubject(edited, "e", first_block(model, edit))], rows)[
                0
            ]
            for one, row in zip(found, rows, strict=True):
                pair = [plain_logits(m.module, row.ids) for m in (model, edited)]
                assert one.kl.tolist() == pytest.approx([kl_of(a, b) for a, b in zip(*pair, strict=True)], rel=1e-6)


def test_several_models_that_start_at_different_blocks_share_the_lowest() -> None:
    model = opened("llama")
    high, low = changed(model, [DOWN.format(2)]), changed(model, [DOWN.format(1)])
    rows = passages(model)
    with high.applied(model) as one, low.applied(model) as two:
        base = WeightsSubject(model, "base")
        found = compared(base, [WeightsSubject(one, "a", 2), WeightsSubject(two, "b", 1)], rows)
        alone = [compared(base, [WeightsSubject(m, "x", 0)], rows)[0] for m in (one, two)]
        for got, right in zip(found, alone, strict=True):
            assert all(torch.allclose(g.kl, r.kl, atol=1e-12) for g, r in zip(got, right, strict=True))


def test_interventions_and_callables_give_the_same_logits_as_weights() -> None:
    model = opened("llama")
    ids = torch.tensor([rs.editing.rewrites.prompt_ids(TEXTS[0], model)])
    baked = rs.edit_coefficients(model, "L1.N0:9", 0.25)
    inside = rs.edit_coefficients(model, "L1.N0:9", 0.25, baked=False)
    with baked.applied(model) as weights, inside.applied(model) as operated:
        one, two = WeightsSubject(weights, "w", 1), OperatedSubject(operated, "o")
        three = CallableSubject(lambda x: weights.module(x), model, "c")
        logits = [s.logits(ids, [0, 2]) for s in (one, two, three)]
        assert logits[0].shape == (1, 2, model.vocab_size)
        assert torch.allclose(logits[0], logits[1], atol=1e-9)
        assert torch.allclose(logits[0], logits[2], atol=1e-9)
        said = [s.continued(ids, 5) for s in (one, two, three)]
        assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("out", ["nothing", torch.zeros(1, 4), torch.zeros(1, 4, 5), None])
def test_a_function_that_gives_no_logits_is_refused(out: Any) -> None:
    model = opened()
    with pytest.raises(ArgumentError, match="`edit` must be a function that gives"):
        CallableSubject(lambda ids: out, model, "f").logits(torch.tensor([[2, 3, 4, 5]]), [1])


# --- answers and decoding -----------------------------------------------------------------------------


def greedy(module: Any, ids: list[int], tokens: int) -> list[int]:
    grown = list(ids)
    for _ in range(tokens):
        grown.append(int(plain_logits(module, grown)[-1].argmax()))
    return grown[len(ids) :]


def asked(model: Any, edited: Any, found: list[Probe]) -> pd.DataFrame:
    answers = Answers(Remembered(model, keep=False), edited)
    answers.ask(answer_questions(found))
    return answer_table(answers, found)


def test_continuations_are_greedy_whatever_the_checkpoint_says_of_generating() -> None:
    plain = opened("gpt2")
    module = sharp("gpt2")
    for name, value in dict(repetition_penalty=9.0, num_beams=3, no_repeat_ngram_size=1, do_sample=True,
                            temperature=3.0, suppress_tokens=[66]).items():  # fmt: skip
        setattr(module.generation_config, name, value)
    model = rs.load(module, tokenizer=words())
    prompts = [[2, 12, 13], [2, 14, 15], [2, 16, 17, 18], [70, 60, 50]]
    right = [greedy(module, one, 8) for one in prompts]
    assert len({tuple(one) for one in right}) > 1
    subject = WeightsSubject(model, "base")
    assert continuations(subject, prompts, [8] * 4) == right
    assert Remembered(model, keep=False).continued(prompts, 8) == right
    assert continuations(subject, prompts, [3, 3, 5, 8]) == [a[:n] for a, n in zip(right, (3, 3, 5, 8), strict=True)]
    assert continuations(WeightsSubject(plain, "plain"), prompts, [8] * 4) == right
    with rs.under(model, rs.Scale("L0.N0", 1.0)) as altered:
        assert continuations(OperatedSubject(altered, "o"), prompts, [8] * 4) == right


def test_a_continuation_ends_before_an_end_token() -> None:
    module = sharp("gpt2")
    said = greedy(module, [2, 14, 15], 8)
    end = said[-1]
    module.generation_config.eos_token_id = end
    module.config.eos_token_id = end
    model = rs.load(module, tokenizer=words())
    until = said[: said.index(end)]
    for subject in (WeightsSubject(model, "w"), CallableSubject(lambda ids: module(ids), model, "c")):
        assert subject.continued(torch.tensor([[2, 14, 15]]), 8) == [until]


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        (" Rome, in Italy", " Rome", True), (" Romeo", " Rome", False), ("Rome", " Rome", True),
        (" rome", " Rome", False), ("\n Rome\n", " Rome", True), (" in Rome", " Rome", False), ("", " Rome", False),
        (" Rom", " Rome", False), (" 1945", " 194", False), (" New York City", " New York", True),
        (" Rome's", " Rome", True),
    ],
)  # fmt: skip
def test_an_answer_is_said_as_whole_words_at_the_start(text: str, answer: str, said: bool) -> None:
    assert says(text, answer) is said


def test_trap_4_romeo_is_not_rome_where_teacher_forcing_says_it_is() -> None:
    model = opened()
    probe = Probe("efficacy", "The capital of France is", "France", target=" Rome", old=" Paris")
    is_, rome, o = ID[" is"], ID[" Rome"], ID["o"]
    romeo = asked(model, CallableSubject(scripted(model, {is_: rome, rome: o}), model, "romeo"), [probe]).iloc[0]
    assert romeo["match_after"]
    assert romeo["above_after"]
    assert romeo["said_after"].startswith(" Romeo")
    assert not romeo["free"]
    rome_is = asked(model, CallableSubject(scripted(model, {is_: rome, rome: is_}), model, "rome"), [probe]).iloc[0]
    assert rome_is["free"]
    assert rome_is["match_after"]


def test_trap_4_most_tokens_forced_right_is_no_success() -> None:
    model = opened()
    target = " Rome w20 w21 w22 w23"
    probe = Probe("efficacy", "The capital of France is", "France", target=target, old=" Paris")
    rest = {ID[" Rome"]: 20, 20: 21, 21: 22, 22: 23}
    row = asked(model, CallableSubject(scripted(model, {ID[" is"]: 40, **rest}), model, "x"), [probe]).iloc[0]
    ids = answer_sequence(model, probe.text, target)
    forced = [
        int(x.argmax()) for x in scripted(model, {ID[" is"]: 40, **rest})(torch.tensor([ids.ids]))[0, list(ids.at)]
    ]
    hits = [a == b for a, b in zip(forced, ids.ids[-5:], strict=True)]
    assert sum(hits) == 4, "token accuracy would be .8"
    assert not row["match_after"]
    assert not row["free"]
    assert row["said_after"].startswith(" w40")
    right = asked(model, CallableSubject(scripted(model, {ID[" is"]: ID[" Rome"], **rest}), model, "x"), [probe]).iloc[
        0
    ]
    assert right["match_after"]
    assert right["free"]


def test_an_answer_table_against_a_loop() -> None:
    model = opened()
    with a_row(model, 300.0).applied(model) as edited:
        found = [Probe("efficacy", some(12, 13), "a", target=" Rome w20", old=" Paris"),
                 Probe("paraphrase", some(14), "a", old=" Lyon"),
                 Probe("efficacy", some(15), "b", target=" w30")]  # fmt: skip
        table = asked(model, WeightsSubject(edited, "e"), found)
        assert "accuracy" not in " ".join(table.columns), "no partial credit"
        for p, row in zip(found, table.to_dict("records"), strict=True):
            assert (row["axis"], row["fact"], row["prompt"]) == (p.axis, p.fact, p.text)
            for when, module in (("before", model.module), ("after", edited.module)):
                joint = {}
                for name, answer in (("new", p.target), ("old", p.old)):
                    if answer is None:
                        assert pd.isna(row[f"{name}_log_prob_{when}"])
                        continue
                    one = answer_sequence(model, p.text, answer)
                    logits = plain_logits(module, one.ids)
                    joint[name] = sum(math.log(softmax(logits[at])[one.ids[at + 1]]) for at in one.at)
                    assert row[f"{name}_log_prob_{when}"] == pytest.approx(joint[name], rel=1e-9)
                    if name == "new":
                        match = (
                            greedy(module, list(one.ids[: one.at[0] + 1]), len(one.at))
                            == list(one.ids)[one.at[0] + 1 :]
                        )
                        assert row[f"match_{when}"] == match
                if len(joint) == 2:
                    assert row[f"above_{when}"] == (joint["new"] > joint["old"])
                elif p.target is None:
                    assert row[f"above_{when}"] is None
                else:
                    assert row[f"above_{when}"] == row[f"match_{when}"], "the whole target, where no old one is named"
                start = rs.editing.rewrites.prompt_ids(p.text, model)
                assert row[f"said_{when}"].startswith(model.tokenizer.decode(greedy(module, start, 2)))
            if p.old is not None:
                assert row["old_change"] == pytest.approx(row["old_log_prob_after"] - row["old_log_prob_before"])


def test_trap_11_a_bos_stands_before_prompts_only_and_once() -> None:
    with_bos, without = opened(bos=True), opened()
    for model, begin in ((with_bos, (1,)), (without, ())):
        one = answer_sequence(model, "The capital of France is", " Rome w20")
        assert one.ids == (*begin, 2, 3, 4, 5, 6, 8, 20)
        assert one.at == (len(begin) + 4, len(begin) + 5)
        (text,) = locality_sequences(model, [Probe("locality", some(12, 13), stratum="unrelated")])
        assert text.ids == (*begin, 2, 12, 13)
        assert text_passage(model, some(12, 13), 2).ids == (*begin, 2, 12)[:2]
    probe = [Probe("efficacy", some(12, 13), "a", target=" Rome", old=" Paris")]
    row = asked(with_bos, WeightsSubject(with_bos, "x"), probe).iloc[0]
    assert row["new_log_prob_before"] == pytest.approx(
        math.log(softmax(plain_logits(with_bos.module, (1, 2, 12, 13))[-1])[8])
    )


def test_ripple_tests_count_only_where_their_conditions_hold_before_the_edit() -> None:
    model = opened()
    says_now = model.tokenizer.decode(greedy(model.module, [2, 12], 1))
    holds, fails = (some(12), says_now), (some(12), " Lyon")
    found = [
        Probe("ripple", some(20), "f", criterion="one hop", target=" Rome", conditions=(holds,)),
        Probe("ripple", some(20), "f", criterion="one hop", target=" Lyon", conditions=(holds, fails)),
        Probe("ripple", some(20), "f", criterion="free", target=" Lyon", others=(" Rome",)),
        Probe("ripple", some(21), "f", criterion="free", target=" Rome"),
    ]
    # the edited model fails the condition and says Rome behind w20: conditions are the base's
    edited = CallableSubject(scripted(model, {20: ID[" Rome"], 12: ID[" Lyon"]}), model, "x")
    answers = Answers(Remembered(model, keep=False), edited)
    conditions, tests = ripple_questions(found)
    answers.ask_base(conditions)
    answers.ask(tests)
    table = ripple_table(answers, found)
    assert table["executed"].tolist() == [True, False, True, True]
    assert table["conditions"].tolist() == [1, 2, 0, 0]
    assert table["after"].tolist() == [True, False, True, False]
    assert not table["before"].any()
    assert table.loc[0, "change"] > 0
    assert table.loc[1, "change"] < 0


def test_choice_margins_by_hand() -> None:
    model = opened()
    edited = scripted(model, {20: ID[" Paris"]}, boost=3.0)
    probe = Probe("choice", some(20), target=" Paris", wrong=(" Rome", " Lyon w30"))
    answers = Answers(Remembered(model, keep=False), CallableSubject(edited, model, "x"))
    answers.ask(choice_questions([probe]))
    row = choice_table(answers, [probe]).iloc[0]
    for when, logits in (("before", lambda ids: model.module(ids).logits), ("after", edited)):
        with torch.no_grad():
            p = torch.log_softmax(logits(torch.tensor([[2, 20, ID[" Lyon"]]]))[0].double(), -1)
        margin = p[1, ID[" Paris"]] - max(p[1, ID[" Rome"]], p[1, ID[" Lyon"]] + p[2, 30])
        assert row[f"margin_{when}"] == pytest.approx(float(margin), rel=1e-9)
        assert row[f"right_{when}"] == bool(margin > 0)
    assert row["change"] == pytest.approx(row["margin_after"] - row["margin_before"])


# --- surroundings -----------------------------------------------------------------------------------


def test_locality_success_and_magnitude_by_hand() -> None:
    model = opened()
    found = [Probe("locality", some(20), "f", "same relation", target=" Lyon w30", old=" Rome"),
             Probe("locality", some(20, 31), "f", stratum="unrelated")]  # fmt: skip
    function = scripted(model, {20: ID[" Rome"]}, boost=30.0)
    edited = CallableSubject(function, model, "x")
    base = WeightsSubject(model, "base")
    rows = locality_sequences(model, found)
    rival = answer_sequence(model, found[0].text, " Rome")
    one = compared(base, [edited], rows)[0]
    beside = compared(base, [edited], [rival])[0]
    table = locality_table(model, found, one, [beside[0], None])
    for when, logits in (("before", lambda ids: model.module(ids).logits), ("after", function)):
        with torch.no_grad():
            p = torch.log_softmax(logits(torch.tensor([[2, 20, ID[" Lyon"]]]))[0].double(), -1)
        magnitude = float(p[1, ID[" Lyon"]] + p[2, 30] - p[1, ID[" Rome"]])
        assert table.loc[0, f"magnitude_{when}"] == pytest.approx(magnitude, rel=1e-9)
        assert table.loc[0, f"success_{when}"] == (magnitude > 0)
        assert pd.isna(table.loc[1, f"magnitude_{when}"])
    assert table["tokens"].tolist() == [1, 3], "a prompt at its last position, a text at all"
    assert table.loc[0, "kl"] == pytest.approx(float(one[0].kl[0]))
    assert table.loc[1, "kl"] == pytest.approx(float(one[1].kl.mean()))
    assert table.loc[1, "kl_max"] == pytest.approx(float(one[1].kl.max()))
    assert table.loc[0, "top_after"] == " Rome"


def test_worst_prompts_are_ranked_and_their_tokens_shares_add_up_to_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    from resid_surgery.editing import surroundings

    monkeypatch.setattr(surroundings, "SHARES", 97)
    model = opened()
    # the largest divergence of the text stands in its middle, where w33 was read
    function = scripted(model, {33: ID[" Rome"], 20: ID[" Rome"]}, boost=30.0)
    found = [Probe("locality", some(30, 31, 33, 34), stratum="unrelated"),
             Probe("locality", some(20), "f", "same relation", target=" Lyon", old=" Rome"),
             Probe("locality", some(40, 41), stratum="unrelated")]  # fmt: skip
    base, edited = WeightsSubject(model, "base"), CallableSubject(function, model, "x")
    rows = locality_sequences(model, found)
    table = locality_table(model, found, compared(base, [edited], rows)[0], [None] * 3)
    worst, shares = worst_prompts(base, edited, table, rows, most=2)
    assert worst["rank"].tolist() == [1, 2]
    assert worst["kl_max"].tolist() == sorted(table["kl_max"], reverse=True)[:2]
    assert set(worst["prompt"]) == {found[0].text, found[1].text}
    for prompt, at, last in ((found[0].text, 3, 33), (found[1].text, 1, 20)):
        part = shares[shares["prompt"] == prompt]
        assert set(part["position"]) == {at}, "where the divergence is largest"
        assert part["share"].sum() == pytest.approx(1.0, rel=1e-6)
        ids = rs.editing.rewrites.prompt_ids(prompt, model)[: at + 1]
        assert ids[-1] == last
        with torch.no_grad():
            p, q = (
                softmax(model.module(torch.tensor([ids])).logits[0, -1]),
                softmax(function(torch.tensor([ids]))[0, -1]),
            )
        total = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        by_token = {row["token"]: row for row in part.to_dict("records")}
        rome = by_token[" Rome"]
        assert rome["share"] == pytest.approx((p[8] * math.log(p[8] / q[8]) - p[8] + q[8]) / total, rel=1e-6)
        assert (rome["prob_before"], rome["prob_after"]) == pytest.approx((p[8], q[8]))
        assert min(part["share"]) >= 0, "likelier or less likely than before"
        row = worst[worst["prompt"] == prompt].iloc[0]
        assert row["text_before"] == model.tokenizer.decode(greedy(model.module, ids, 6))
        assert row["text_after"].startswith(" Rome")


def test_running_text_against_a_loop_and_cut_at_its_limit() -> None:
    model = opened()
    with a_row(model, 100.0).applied(model) as edited:
        found = [Probe("text", some(*range(20, 90))), Probe("text", some(15, 16))]
        table = text_table(Remembered(model, keep=False), WeightsSubject(edited, "e"), found, 10)
        assert table["tokens"].tolist() == [9, 2]
        for p, row in zip(found, table.to_dict("records"), strict=True):
            ids = model.tokenizer.encode(p.text)[:10]
            for when, module in (("before", model.module), ("after", edited.module)):
                logits = plain_logits(module, ids)
                nll = [-math.log(softmax(logits[at])[ids[at + 1]]) for at in range(len(ids) - 1)]
                assert row[f"nll_{when}"] == pytest.approx(np.mean(nll), rel=1e-9)
            assert row["change"] == pytest.approx(row["nll_after"] - row["nll_before"])


def test_a_text_longer_than_the_context_is_read_from_its_beginning() -> None:
    model = opened()
    assert model.context == 64
    long = some(*(12 + i % 80 for i in range(200)))
    assert len(text_passage(model, long, 1000).ids) == 64
    assert text_passage(model, long, 7).at == (0, 1, 2, 3, 4, 5)
    with pytest.raises(PromptError):
        text_passage(model, "", 7)


def test_fluency_by_hand() -> None:
    same = fluency([7] * 6, 8)
    assert same["repetition"] == pytest.approx(2 / 3)  # three 4-grams, one kind
    assert (same["distinct_1"], same["distinct_2"], same["distinct_3"]) == pytest.approx((1 / 6, 1 / 5, 1 / 4))
    assert (same["entropy"], same["length"], same["ended"]) == (0.0, 6.0, 1.0)
    fresh = fluency([1, 2, 3, 4, 5], 5)
    assert fresh["repetition"] == 0.0
    assert (fresh["distinct_1"], fresh["distinct_2"], fresh["distinct_3"]) == (1.0, 1.0, 1.0)
    assert fresh["entropy"] == pytest.approx((math.log2(4) + math.log2(3)) / 2)
    assert fresh["ended"] == 0.0
    mixed = fluency([1, 2, 1, 2, 1], 5)
    assert mixed["distinct_2"] == pytest.approx(2 / 4)
    assert mixed["entropy"] == pytest.approx((1.0 + (-(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3))) / 2)
    nothing = fluency([], 5)
    assert (nothing["length"], nothing["ended"], nothing["repetition"]) == (0.0, 1.0, 0.0)
    assert all(math.isfinite(value) for value in nothing.values())


def test_generated_texts_stand_side_by_side() -> None:
    model = opened()
    found = [Probe("generation", some(20)), Probe("generation", some(21, 22))]
    function = scripted(model, {20: ID[" Rome"], 8: 8})
    table, texts = generation_tables(Remembered(model, keep=False), CallableSubject(function, model, "x"), found, 6)
    assert texts["after"][0] == " Rome" * 6
    assert texts["before"][0] == model.tokenizer.decode(greedy(model.module, [2, 20], 6))
    assert texts["same"].tolist() == [a == b for a, b in zip(texts["before"], texts["after"], strict=True)]
    assert table.loc[0, "distinct_1_after"] == pytest.approx(1 / 6)


# --- what the base said before ---------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True)
               for n in ("nll", "top", "entropy"))  # fmt: skip


def test_what_the_base_said_is_remembered_bit_for_bit_and_asked_once(own_cache: Any) -> None:
    model = opened()
    rows = [Passage(one.ids, one.at[:-1]) for one in passages(model)]
    first, second = Remembered(model), Remembered(model)
    made, said = first.figures(rows), first.continued([[2, 12], [2, 13, 14]], 4)
    assert (first.found, first.asked) == (0, len(rows) + 2)
    assert equal(made, second.figures(rows))
    assert second.continued([[2, 12], [2, 13, 14]], 4) == said
    assert (second.found, second.asked) == (len(rows) + 2, 0)
    assert equal(made, figures(WeightsSubject(model, "x"), rows))
    assert sum(f.stat().st_size for f in own_cache.iterdir()) < 20_000, "figures, never whole logits"
    second.figures(rows[:2])
    second.figures([Passage(one.ids, (len(one.ids) - 1,)) for one in rows])
    second.continued([[2, 12], [2, 13, 14]], 5)
    assert second.asked == 2 + len(rows) + 2, "another question is another file"


def test_trap_5_remembered_figures_are_not_believed_after_weights_changed_in_place() -> None:
    model = rs.load(sharp(), tokenizer=words())
    rows = [Passage(one.ids, one.at[:-1]) for one in passages(model)]
    before = Remembered(model).figures(rows)
    with torch.no_grad():
        model.module.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data[3, 5] += 4.0
    again = Remembered(model)
    after = again.figures(rows)
    assert (again.found, again.asked) == (0, len(rows))
    assert not equal(before, after)
    assert equal(after, figures(WeightsSubject(model, "x"), rows))
    with torch.no_grad():
        model.module.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data[3, 5] -= 4.0


def test_the_same_weights_under_another_config_are_another_base() -> None:
    rows = [Passage((2, 12, 13, 14), (0, 1, 2))]
    one = rs.load(sharp("llama"), tokenizer=words())
    for changes in ({"rms_norm_eps": 0.3}, {"hidden_act": "gelu"}):
        other = rs.load(sharp("llama", **changes), tokenizer=words())
        assert one.fingerprint() == other.fingerprint()
        a = Remembered(one).figures(rows)
        held = Remembered(other)
        b = held.figures(rows)
        assert held.found == 0
        assert not equal(a, b)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_trap_5_a_damaged_file_is_asked_anew(own_cache: Any, damage: str) -> None:
    model = opened()
    rows = [Passage(one.ids, one.at[:-1]) for one in passages(model)]
    right = Remembered(model).figures(rows)
    (file,) = own_cache.iterdir()
    body = bytearray(file.read_bytes())
    if damage == "flipped":
        body[-3] ^= 64
    elif damage == "other":
        Remembered(model).figures(rows[:1])
        body = bytearray(next(f for f in own_cache.iterdir() if f != file).read_bytes()[:-8] + bytes(8))
    file.write_bytes({"cut": bytes(body[:-20]), "empty": b"", "text": b"nothing"}.get(damage, bytes(body)))
    held = Remembered(model)
    assert equal(held.figures(rows), right)
    assert held.asked == len(rows)
    healed = Remembered(model)
    healed.figures(rows)
    assert healed.found == len(rows), "it was written again"


def test_a_cache_folder_that_cannot_be_written_only_costs_time(monkeypatch: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept for next time"):
        Remembered(opened()).continued([[2, 12]], 2)


def test_what_is_not_to_be_kept_is_not_written(own_cache: Any) -> None:
    Remembered(opened(), keep=False).continued([[2, 12]], 2)
    assert not own_cache.exists()
    assert remembering.VERSION == 1


# --- exposure against what happened ----------------------------------------------------------------------


def test_exposure_of_the_last_layer_ranks_the_measured_kl() -> None:
    model = rs.load(
        tiny.build("llama"), tokenizer=words()
    )  # with flat predictions, whose curvature is alike everywhere
    edit = rs.edit_coefficients(model, "L2.N5", 0.0)
    texts = [some(*range(20 + 7 * i, 26 + 7 * i + i % 3)) for i in range(9)]
    table = exposure_against_kl(model, edit, texts, tokens=60)
    assert len(table) == 60
    assert table.attrs["rank_correlation"] > 0.95
    assert table.attrs["p_value"] < 1e-6
    ranks = table[["exposure", "kl"]].rank()
    assert table.attrs["rank_correlation"] == pytest.approx(ranks["exposure"].corr(ranks["kl"]))
    with edit.applied(model) as edited:
        for text, part in table.groupby("text"):
            ids = model.tokenizer.encode(texts[int(str(text))])[: len(part)]
            pair = [plain_logits(m.module, ids) for m in (model, edited)]
            assert part["position"].tolist() == list(range(len(ids)))
            assert part["kl"].tolist() == pytest.approx([kl_of(a, b) for a, b in zip(*pair, strict=True)], rel=1e-4)


def test_exposure_against_kl_refuses_what_it_cannot_use() -> None:
    model = opened("llama")
    edit = changed(model, [DOWN.format(2)])
    with pytest.raises(ArgumentError, match="`texts` must be a sequence of texts, none of them empty; got"):
        exposure_against_kl(model, edit, [])
    with pytest.raises(ArgumentError, match="`edit` must be an Edit"):
        exposure_against_kl(model, "edit", [some(20)])  # type: ignore[arg-type]

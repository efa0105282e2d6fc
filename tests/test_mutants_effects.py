"""Effects to the letter: what is said of a set of interventions, and which calls are refused before anything runs."""

import math

import pandas as pd
import pytest
import torch
from tiny import build, shared
from validation_cases import opened

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, InterventionError, SiteError
from resid_surgery.models import tracing
from resid_surgery.surgery import effects
from resid_surgery.surgery.effects import FACE, PARTS

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11, versus=[7, 60])
OPS = [rs.Zero("L1.mlp", positions="all"), rs.Scale("L0.H1", 2.0)]


@pytest.fixture(scope="module")
def rec():
    return rs.record(shared("llama"), PROMPT)


@pytest.fixture
def done(rec):
    return rs.intervene(rec, OPS, at=[4, 2], movers=3)


def probabilities(logits):
    return torch.softmax(logits.double(), -1)


def test_it_says_what_was_done_and_what_came_of_it(rec, done):
    row = done.table.iloc[0]
    said = (
        f"Effect([Zero(['L1.mlp'], positions='all'), Scale(['L0.H1'], 2.0)] on {rec.model.name}: "
        f"{row['token']!r} logit {row['bs_before']:.3f} -> {row['bs_after']:.3f}, "
        f"p {row['prob_before']:.3f} -> {row['prob_after']:.3f})"
    )
    assert repr(done) == said
    assert row["token_id"] == 11
    page = done._repr_html_()
    assert page == effects.face_html(said, done.summary, done.table[[*FACE, *PARTS]])
    assert said.replace("'", "&#x27;").replace(">", "&gt;") in page
    assert done.rec is rec
    assert done.interventions == tuple(OPS)


def test_before_and_after_are_those_of_the_first_measured_position(rec, done):
    assert done.before is done.splits[0].before
    assert done.after is done.splits[0].after
    assert [split.after.position for split in done.splits] == [4, 2]
    assert not torch.allclose(done.before.logits, done.after.logits)
    alone = rs.intervene(rec, OPS, at=2)
    assert torch.allclose(alone.before.logits, done.splits[1].before.logits)


def test_the_table_is_every_positions_one_below_the_other(done):
    assert len(done.table) == sum(len(split.table) for split in done.splits) == 2 * (3 + 3)
    assert done.table.index.tolist() == list(range(12))
    assert done.table["position"].tolist() == [4] * 6 + [2] * 6
    assert done.table is done.table
    pd.testing.assert_frame_equal(done.table[6:].reset_index(drop=True), done.splits[1].table)


def test_the_summary_is_made_of_both_distributions(done):
    table = done.summary
    assert list(table.columns) == [
        "position", "kl", "entropy_before", "entropy_after", "top_before", "top_after", "log_prob_change"]  # fmt: skip
    assert table["position"].tolist() == [4, 2]
    for row, split in zip(table.itertuples(), done.splits, strict=True):
        p, q = (probabilities(run.logits) for run in (split.before, split.after))
        assert row.kl == pytest.approx(float((p * (p.log() - q.log())).sum()), rel=1e-6)
        assert row.entropy_before == pytest.approx(-float((p * p.log()).sum()), rel=1e-6)
        assert row.entropy_after == pytest.approx(-float((q * q.log()).sum()), rel=1e-6)
        assert (row.top_before, row.top_after) == (f"#{int(p.argmax())}", f"#{int(q.argmax())}")
        assert row.log_prob_change == pytest.approx(float(q[11].log() - p[11].log()), rel=1e-6)
    assert done.summary is table


def test_top_tokens_are_texts_of_the_models_own_tokenizer():
    model = opened()
    done = rs.intervene(rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1)), rs.Zero("L1.mlp"))
    tops = [model.tokenizer.decode([int(run.logits.argmax())]) for run in (done.before, done.after)]
    assert [done.summary["top_before"][0], done.summary["top_after"][0]] == tops
    assert not any(top.startswith("#") for top in tops)


def test_a_ledger_is_asked_for_by_position(rec, done):
    for position, split in ((None, 0), (4, 0), (2, 1)):
        pd.testing.assert_frame_equal(done.ledger(position), done.splits[split].ledger())
    assert not done.ledger(2).equals(done.ledger(4))
    first = rs.intervene(rec, OPS, at=0)
    pd.testing.assert_frame_equal(first.ledger(0), first.ledger())
    with pytest.raises(ArgumentError) as caught:
        done.ledger(3)
    assert str(caught.value) == "`position` must be one of [2, 4], which were measured; got 3."


def test_of_a_position_measured_twice_the_first_ledger_is_given(rec):
    twice = rs.intervene(rec, OPS, at=[4, 2])
    again = effects.Effect(rec, twice.interventions, (*twice.splits, *rs.intervene(rec, OPS[:1], at=[4]).splits))
    pd.testing.assert_frame_equal(again.ledger(4), twice.ledger(4))


def test_one_call_is_the_first_of_several(rec):
    one, (a, b) = rs.intervene(rec, OPS), rs.intervene_each(rec, [OPS, OPS[1]])
    pd.testing.assert_frame_equal(one.table, a.table)
    assert a.interventions == tuple(OPS)
    assert b.interventions == (OPS[1],)
    assert len(one.table) == 3 + 5
    assert [split.after.position for split in one.splits] == [4]
    assert len(rs.intervene_each(rec, [OPS], movers=0)[0].table) == 3
    assert len(rs.intervene_each(rec, [OPS])[0].table) == 3 + 5
    assert len(rs.intervene(rec, OPS, movers=1).table) == 3 + 1
    assert len(rs.intervene_each(rec, iter([OPS, iter(OPS)]))) == 2
    assert [s.after.position for s in rs.intervene_each(rec, [OPS], at=[1])[0].splits] == [1]


def test_donors_are_run_for_what_they_give(rec):
    donor = rs.Prompt(ids=[5, 4, 3], target=1)
    by_prompt = rs.intervene(rec, rs.Patch("L1.mlp", donor))
    by_recording = rs.intervene(rec, rs.Patch("L1.mlp", rs.record(rec.model, donor)))
    pd.testing.assert_frame_equal(by_prompt.table, by_recording.table)
    assert abs(by_prompt.table["bs_change"][0]) > 1e-3


def test_a_rehearsal_of_a_remote_run_gives_the_same(rec):
    here, there = rs.intervene(rec, OPS, at=2, movers=2), rs.intervene(rec, OPS, at=2, movers=2, remote="local")
    pd.testing.assert_frame_equal(here.table, there.table)
    (each,) = rs.intervene_each(rec, [OPS], at=2, movers=2, remote="local")
    pd.testing.assert_frame_equal(here.table, each.table)
    with pytest.raises(ArgumentError, match="remote"):
        rs.intervene(rec, OPS, remote=5)
    with pytest.raises(ArgumentError, match="remote"):
        rs.intervene_each(rec, [OPS], remote=5)


ROWS = "`rows` must be a non-empty list of intervention lists; got"
BAD = {
    "movers": (
        lambda r: rs.intervene(r, OPS, movers=-1), ArgumentError, "`movers` must be a whole number >= 0; got -1."),
    "movers of each": (
        lambda r: rs.intervene_each(r, [OPS], movers=0.5), ArgumentError,
        "`movers` must be a whole number >= 0; got 0.5."),
    "a text": (lambda r: rs.intervene_each(r, "Zero"), InterventionError, f"{ROWS} 'Zero'."),
    "one": (lambda r: rs.intervene_each(r, OPS[1]), InterventionError, f"{ROWS} Scale(['L0.H1'], 2.0)."),
    "a number": (lambda r: rs.intervene_each(r, 5), InterventionError, f"{ROWS} 5."),
    "none": (lambda r: rs.intervene_each(r, []), InterventionError, f"{ROWS} []."),
    "a row of text": (
        lambda r: rs.intervene_each(r, ["Zero"]), InterventionError,
        "`interventions` must be a list of Zero, Scale, Patch, Cut, ...; got 'Zero'."),
    "a row of bytes": (
        lambda r: rs.intervene_each(r, [b"Zero"]), InterventionError,
        "`interventions` must be a list of Zero, Scale, Patch, Cut, ...; got b'Zero'."),
    "a row of a number": (
        lambda r: rs.intervene_each(r, [5]), InterventionError,
        "`interventions` must be a list of Zero, Scale, Patch, Cut, ...; got 5."),
    "an empty row": (
        lambda r: rs.intervene_each(r, [[]]), InterventionError,
        "`interventions` must hold at least one operation; got none."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_refused_in_these_words_before_any_forward(rec, name, monkeypatch):
    call, error, said = BAD[name]
    monkeypatch.setattr(effects, "run_rows", lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(error) as caught:
        call(rec)
    assert str(caught.value) == said


def test_no_recording_no_site_and_no_position_are_refused(rec, monkeypatch):
    monkeypatch.setattr(effects, "run_rows", lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ArgumentError, match="recording"):
        rs.intervene_each("rec", [OPS])
    with pytest.raises(SiteError, match="got 9"):
        rs.intervene(rec, rs.Zero("L9.mlp"))
    with pytest.raises(rs.PromptError, match="9"):
        rs.intervene(rec, OPS, at=9)


def test_weights_that_changed_are_noticed_before_donors_are_run(monkeypatch):
    model = rs.load(build("llama"))
    rec = rs.record(model, PROMPT)
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(2)
    monkeypatch.setattr(effects, "fetch", lambda *_: pytest.fail("a donor ran"))
    with pytest.raises(rs.StaleRecordingError):
        rs.intervene(rec, rs.Patch("L1.mlp", rs.Prompt(ids=[5, 4, 3], target=1)))
    assert not math.isnan(float(rec.resid_final[0]))
    assert tracing is not None

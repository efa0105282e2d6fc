"""Locating to the letter: what is asked of the scorer, what stands in the table, what is refused and in which words."""

import pandas as pd
import pytest
import torch
from tiny import VOCAB, build, shared
from validation_cases import opened

import resid_surgery as rs
from resid_surgery.attribution import locating
from resid_surgery.attribution.catalogue import check_scores
from resid_surgery.attribution.locating import Located, locate_each, pick
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.scoring import scorer
from resid_surgery.errors import ArgumentError, PromptError, StaleRecordingError
from resid_surgery.stream.blocks import Numbering

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11, versus=[7, 60])
OTHER = rs.Prompt(ids=[3, 8], target=2)


@pytest.fixture(scope="module")
def model():
    return shared("llama")


@pytest.fixture(scope="module")
def rec(model):
    return rs.record(model, PROMPT)


def asked(rec, score="log_prob_increase", kind="neuron", norm="frozen", layers=None):
    return scorer(Query.of(rec, kind, norm, layers, None), check_scores([score], norm)[0])


def test_it_says_what_was_found_and_at_what_cost(rec):
    found = rs.locate(rec, k=6)
    first = ", ".join(found.table["site"][:5])
    said = f"Located(6 of 120 candidates: {first}, ...; {found.evaluations} exact evaluations, certificate)"
    assert repr(found) == said
    five = rs.locate(rec, k=5, score="bs_target")
    names = ", ".join(five.table["site"])
    assert repr(five) == f"Located(5 of 120 candidates by bs_target: {names}; 0 exact evaluations, linear)"
    assert found._repr_html_() == locating.face_html(said, found.table)
    assert "<table" in found._repr_html_()


def test_its_fields_are_those_of_the_recording_and_the_question(rec):
    found = rs.locate(rec, k=3, score="target_rank", kind="head", worst=True)
    assert (found.score, found.proof, found.worst, found.candidates) == ("target_rank", "exhaustive", True, 12)
    assert found.fingerprint == rec.fingerprint
    assert found.prompt is rec.prompt
    assert found.evaluations == 12
    assert found.sites == tuple(rs.parse_site(one) for one in found.table["site"])
    assert rs.locate(rec, k=3).worst is False


def test_the_table_has_these_columns_and_these_numbers(rec, model):
    for kind, score in (("neuron", "log_prob_increase"), ("head_source", "bs_target"), ("layer", "contrast")):
        found = rs.locate(rec, k=4, kind=kind, score=score)
        table, names = found.table, ["rank", "site", "kind", "layer", score, "bs_target"]
        names += ["bs_versus_1", "bs_versus_2", "norm", "position"]
        if score == "bs_target":
            names.remove("bs_target")
            names.insert(4, "bs_target")
        assert sorted(table.columns) == sorted(set(names)), table.columns
        assert list(table.columns)[:5] == names[:5]
        assert table["rank"].tolist() == [1, 2, 3, 4]
        assert set(table["norm"]) == {"frozen"}
        assert set(table["position"]) == {4}
        directions = rs.stream.vocabulary.Readout.of(rec).directions([11, 7, 60])
        for row, site in zip(table.to_dict("records"), found.sites, strict=True):
            assert row["layer"] == site.layer
            assert row["kind"] == ({"layer": site.part} if kind == "layer" else {}).get(kind, kind)
            bs = directions @ rs.stream.subvalues.vector_of(rec, site)
            assert row["bs_target"] == pytest.approx(float(bs[0]), abs=1e-9)
            assert row["bs_versus_1"] == pytest.approx(float(bs[1]), abs=1e-9)
            assert row["bs_versus_2"] == pytest.approx(float(bs[2]), abs=1e-9)
    own = rs.locate(rec, k=2, norm="own").table
    assert set(own["norm"]) == {"own"}


def test_bs_values_are_read_off_the_final_stream():
    rec = rs.record(rs.load(rs.tiny("beam")), PROMPT)  # it multiplies what it carries on
    found = rs.locate(rec, k=5, layers=[0])
    direction = rs.stream.vocabulary.Readout.of(rec).directions([11])[0]
    for row, site in zip(found.table.to_dict("records"), found.sites, strict=True):
        final, here = (direction @ rs.stream.subvalues.vector_of(rec, site, where) for where in ("final", "here"))
        assert row["bs_target"] == pytest.approx(float(final), rel=1e-4)
        assert row["bs_target"] != pytest.approx(float(here), rel=1e-2)


def test_defaults_are_ten_neurons_by_log_prob_increase_the_best_under_the_frozen_norm(rec, model):
    plain = rs.locate(rec)
    same = rs.locate(rec, k=10, kind="neuron", score="log_prob_increase", worst=False, norm="frozen", layers=None,
                     versus=None, progress=None)  # fmt: skip
    pd.testing.assert_frame_equal(plain.table, same.table)
    assert len(plain.sites) == 10
    (each,) = locate_each(model, [PROMPT])
    pd.testing.assert_frame_equal(plain.table, each.table)
    assert not rs.locate(rec, norm="own").table["log_prob_increase"].equals(plain.table["log_prob_increase"])


OPTIONS = [
    {"k": 3, "kind": "head"},
    {"k": 4, "score": "target_rank", "worst": True},
    {"k": 2, "norm": "own", "layers": [1]},
    {"k": 5, "score": "contrast", "versus": [3]},
    {"k": 3, "score": "leave_one_out", "worst": True},
    {"k": 3, "score": "bs_difference", "versus": [3, 5], "layers": -1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prompt_after_prompt_gives_what_single_calls_give(model, options):
    prompts = [PROMPT, OTHER, rs.Prompt(ids=[9, 9, 1], target=4, versus=[6])]
    each = list(locate_each(model, iter(prompts), **options))
    many = rs.locate_many(model, prompts, **options)
    assert len(each) == 3
    assert all(isinstance(one, Located) for one in each)
    at = 0
    for number, (prompt, found) in enumerate(zip(prompts, each, strict=True)):
        alone = rs.locate(rs.record(model, prompt), **options)
        pd.testing.assert_frame_equal(found.table, alone.table)
        assert (found.candidates, found.proof) == (alone.candidates, alone.proof)
        if found.proof != "exhaustive":  # ranks are kept
            assert found.evaluations == alone.evaluations
        part = many[at : at + len(found.table)]
        at += len(part)
        assert part["prompt"].tolist() == [number] * len(part)
        assert many.columns[0] == "prompt"
        assert set(part["evaluations"]) <= {found.evaluations, 0 if found.proof == "exhaustive" else found.evaluations}
        assert set(part["candidates"]) == {found.candidates}
        assert set(part["proof"]) == {found.proof}
        for at_column, (name, value) in enumerate(found.prompt.said().items()):
            assert many.columns[at_column + 1] == name
            assert part[name].tolist() == [value] * len(part)
        for name in found.table:
            assert part[name].tolist() == found.table[name].tolist()
    assert at == len(many)
    assert many.index.tolist() == list(range(len(many)))
    assert "prompt" not in each[0].table


def test_prompts_are_recorded_where_asked(model, monkeypatch):
    seen = []
    real = locating.record
    monkeypatch.setattr(
        locating, "record", lambda m, p, remote: seen.append((m, p, remote)) or real(m, p, remote=remote)
    )
    there = list(locate_each(model, [PROMPT], k=2, remote="local"))
    here = list(locate_each(model, [PROMPT], k=2))
    assert [(m, r) for m, _, r in seen] == [(model, "local"), (model, None)]
    assert [p for _, p, _ in seen] == [PROMPT, PROMPT]
    pd.testing.assert_frame_equal(here[0].table, there[0].table)
    with pytest.raises(ArgumentError, match="remote"):
        next(locate_each(model, [PROMPT], remote=5))


def test_targets_of_all_prompts_are_ranked_together(model, monkeypatch):
    given = []
    real = Query.of
    monkeypatch.setattr(Query, "of", lambda *args: given.append(args[5:]) or real(*args))
    list(locate_each(model, [PROMPT, OTHER], k=2, score="target_rank"))
    assert given == [([11, 2],), ([11, 2],)]


def test_bars_are_shown_on_a_terminal_for_long_work_only(model, rec, monkeypatch):
    bars = []
    real = locating.progress_bar

    def bar(what, total, *, shown=None):
        bars.append((what, total, shown))
        return real(what, total, shown=False)

    monkeypatch.setattr(locating, "progress_bar", bar)
    rs.locate(rec, k=2)
    rs.locate(rec, k=2, progress=True)
    rs.locate(rec, k=2, progress=False)
    assert bars == [("locating", 120, False)] * 3
    monkeypatch.setattr(locating, "LONG", 119)
    bars.clear()
    rs.locate(rec, k=2)
    rs.locate(rec, k=2, progress=True)
    rs.locate(rec, k=2, progress=False)
    assert bars == [("locating", 120, True), ("locating", 120, True), ("locating", 120, False)]
    monkeypatch.setattr(locating, "LONG", 120)
    bars.clear()
    rs.locate(rec, k=2)
    assert bars == [("locating", 120, False)]
    bars.clear()
    list(locate_each(model, [PROMPT], k=2))
    list(locate_each(model, [PROMPT, OTHER], k=2))
    list(locate_each(model, [PROMPT, OTHER], k=2, progress=False))
    list(locate_each(model, [PROMPT], k=2, progress=True))
    assert [one for one in bars if one[1] != 120] == [
        ("locating", 1, False), ("locating", 2, True), ("locating", 2, False), ("locating", 1, True)]  # fmt: skip


def test_a_bar_over_prompts_goes_on_with_their_targets(monkeypatch):
    steps = []

    class Bar:
        def __enter__(self):
            return lambda name="", **done: steps.append((name, done))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(locating, "progress_bar", lambda *_, **__: Bar())
    model = opened()
    prompts = [rs.Prompt(ids=[5, 4], target=3), rs.Prompt(ids=[5], target=9)]
    list(locate_each(model, prompts, k=1))
    assert [name for name, done in steps if not done] == [model.tokenizer.decode([3]), model.tokenizer.decode([9])]
    steps.clear()
    rs.locate(rs.record(shared("llama"), PROMPT), k=1, score="target_rank")
    assert sum(done.get("done", 1) for _, done in steps) == 120


def test_every_way_of_searching_gives_the_first_of_chosen_blocks(rec):
    for score in ("log_prob_increase", "leave_one_out", "log_prob_alone", "bs_target", "target_rank"):
        for worst in (False, True):
            for blocks in (None, [2], (0, 2)):
                scored = asked(rec, score)
                chosen = [0, 1, 2] if blocks is None else list(blocks)
                picked = pick(scored, 7, worst=worst, blocks=blocks)
                table = rs.scores(rec, score=score)
                table = table[table["layer"].isin(chosen)].reset_index(drop=True)
                sign = scored.score.sign(worst=worst)
                order = (table[score] * sign).sort_values(ascending=False, kind="stable").index[:7]
                assert [str(picked.numbering.site(i)) for i in picked.numbers] == table["site"][order].tolist()
                assert picked.values == pytest.approx(table[score][order].tolist(), abs=1e-9)
                assert worst or pick(scored, 7, blocks=blocks).numbers == picked.numbers
                if blocks is None:
                    found = rs.locate(rec, k=7, score=score, worst=worst)
                    assert found.table["site"].tolist() == table["site"][order].tolist()
                assert isinstance(picked.numbering, Numbering)
                assert len(picked.numbering) == 40 * len(chosen)
                if scored.score.search == "linear":
                    assert picked.evaluations == 0
                elif scored.score.search == "exhaustive":
                    assert picked.evaluations in (0, 40 * len(chosen))  # ranks are kept
                else:
                    assert 7 <= picked.evaluations < 40 * len(chosen)


def test_ranges_are_had_only_where_bounds_from_the_other_side_are_needed(monkeypatch):
    for score, worst, needed in (
        ("log_prob_increase", False, False), ("log_prob_increase", True, True), ("leave_one_out", False, True),
        ("leave_one_out", True, False)):  # fmt: skip
        scored = asked(rs.record(rs.load(build("llama")), PROMPT), score)
        prepared = []
        monkeypatch.setattr(type(scored), "need_ranges", lambda self, members, p=prepared: p.append(members) or 0)
        try:
            pick(scored, 3, worst=worst, blocks=[1])
        except KeyError:  # of ranges that were not made
            assert needed
        monkeypatch.undo()
        assert [len(members) for members in prepared] == ([1] if needed else [])
        assert all(members[0] is scored.blocks[1] for members in prepared)


def test_addends_of_zero_are_known_without_evaluation():
    rec = rs.record(shared("opt"), PROMPT)
    for score, nothing in (("log_prob_increase", 0.0), ("leave_one_out", 0.0), ("log_prob_alone", None)):
        scored = asked(rec, score)
        known = locating._zeros(scored, 1)
        zero = scored.blocks[1].zero
        assert known.dtype == torch.float64
        assert known.shape == (40,)
        assert torch.equal(known.isnan(), ~zero)
        wanted = float(scored.states.log_p[0]) if nothing is None else nothing
        assert set(known[zero].tolist()) == {wanted}
    assert bool(locating._zeros(asked(rs.record(shared("llama"), PROMPT), kind="head"), 1).isnan().all())


def test_ranks_that_are_kept_cost_no_pass():
    rec = rs.record(rs.load(build("llama")), PROMPT)
    first, again = rs.locate(rec, k=3, score="target_rank"), rs.locate(rec, k=3, score="target_rank")
    assert first.evaluations == 120
    assert again.evaluations == (120 if asked(rec, "target_rank").known(0) is None else 0)
    sources = rs.locate(rs.record(shared("llama"), PROMPT), k=3, kind="attn_neuron_source", score="prob_increase")
    assert 0 < sources.evaluations < sources.candidates


ALL = "There are 120 candidates of kind 'neuron'."
BAD = {
    "score": ({"score": 5}, "`score` must be one score's name; got 5. rs.scores takes several."),
    "all": ({"score": "all"}, "`score` must be one score's name; got 'all'. rs.scores takes several."),
    "several": (
        {"score": ["bs_target"]}, "`score` must be one score's name; got ['bs_target']. rs.scores takes several."),
    "worst": ({"worst": 1}, "`worst` must be True or False; got 1."),
    "k": ({"k": 0}, "`k` must be a whole number >= 1; got 0."),
    "k of what": ({"k": "x"}, "`k` must be a whole number >= 1; got 'x'."),
    "too many": ({"k": 121}, f"`k` must be a whole number in 1..120 for LlamaForCausalLM; got 121. {ALL}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_refused_in_these_words(rec, model, name, monkeypatch):
    options, said = BAD[name]
    monkeypatch.setattr(locating, "pick", lambda *_, **__: pytest.fail("it was searched"))
    with pytest.raises(ArgumentError) as caught:
        rs.locate(rec, **options)
    assert str(caught.value) == said
    monkeypatch.setattr(locating, "record", lambda *_, **__: pytest.fail("a forward ran"))
    with pytest.raises(ArgumentError) as caught:
        locate_each(model, [PROMPT], **options)  # at once, not when the first is asked for
    if name != "too many":
        assert str(caught.value) == said
        return
    assert str(caught.value).startswith("prompt 0: `k` must be at most 120")


EACH = [
    {"kind": "neurons"}, {"layers": 9}, {"progress": "yes"},
    {"norm": "live"}, {"score": "nothing"}, {"score": "bs_target", "norm": "own"},
]  # fmt: skip


@pytest.mark.parametrize("options", EACH, ids=str)
def test_other_bad_options_are_refused_by_both_in_the_same_words(rec, model, options, monkeypatch):
    with pytest.raises(ArgumentError) as one:
        rs.locate(rec, **options)
    monkeypatch.setattr(locating, "bound_prompts", lambda *_: pytest.fail("prompts were bound first"))
    monkeypatch.setattr(locating, "record", lambda *_, **__: pytest.fail("a forward ran"))
    with pytest.raises(ArgumentError) as each:
        locate_each(model, [PROMPT], **options)
    assert str(each.value) == str(one.value)


def test_a_bad_prompt_among_many_is_named_by_its_number(model, monkeypatch):
    monkeypatch.setattr(locating, "record", lambda *_, **__: pytest.fail("a forward ran"))
    with pytest.raises(PromptError, match="1"):
        locate_each(model, [PROMPT, rs.Prompt(ids=[VOCAB], target=1)])
    with pytest.raises((ArgumentError, PromptError), match="1") as caught:
        locate_each(model, [PROMPT, OTHER], score="contrast")
    assert "versus" in str(caught.value)
    with pytest.raises((ArgumentError, PromptError), match=r"prompt.* 1\b.*24"):
        locate_each(model, [PROMPT, OTHER], k=25, kind="head_source")
    with pytest.raises(ArgumentError, match="model"):
        locate_each("llama", [PROMPT])


def test_no_recording_no_competitors_and_changed_weights_are_refused():
    with pytest.raises(ArgumentError, match="recording"):
        rs.locate("rec")
    model = rs.load(build("llama"))
    with pytest.raises(ArgumentError, match="versus"):
        rs.locate(rs.record(model, OTHER), score="contrast")
    rec = rs.record(model, PROMPT)
    with torch.no_grad():
        model.module.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(StaleRecordingError):
        rs.locate(rec, k=2)

"""Notebook faces: every value shows itself as one escaped piece of HTML, without a forward, also when it is stale."""

import pandas as pd
import pytest
import torch
from fake_validation import fake_validation
from hypothesis import given
from hypothesis import strategies as st
from pages import ENDING, NASTY, Elements, hostile, hostile_recording
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery._html import cell_text, face_html
from resid_surgery.editing.edits import Edit

ALLOWED = {"div", "p", "strong", "table", "thead", "tbody", "tfoot", "tr", "th", "td"}


def cells(html):
    return [one for one in Elements(html).texts if one.strip()]


def values(tmp_path):
    model, rec = hostile(), hostile_recording()
    found = rs.locate(rec, k=3)
    plan = {"intervene": {"one": {"kind": "Zero", "sites": "L1.mlp"}}}
    yield rs.Prompt(NASTY, target=ENDING, versus=[NASTY, 3])
    yield rec
    yield found
    yield rs.intervene(rec, rs.Zero(found.sites))
    yield rs.source_graph(rec, nodes=10)
    yield Edit((), method=NASTY)
    fact = rs.Rewrite("w20|{}", subject=NASTY, old="w22", new="w23")
    yield rs.edit_value_rows(model, found.sites, new="w23", rewrites=[fact])
    yield fake_validation(token=NASTY)
    yield rs.run(model, [{"text": "w20|w21", "target": NASTY}], plan, out=tmp_path / NASTY[:4], progress=False)


def test_every_value_has_an_escaped_face(tmp_path):
    for value in values(tmp_path):
        html = value._repr_html_()
        page = Elements(html)
        assert set(page.tags) <= ALLOWED, type(value)
        assert not [one for one in page.attributes if one[1] not in ("class", "colspan")]
        assert "table" in page.tags or isinstance(value, Edit)
        assert len(html) < 60_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recordings_face_is_what_it_predicted(family):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3], target=7, versus=[1]))
    said, want = cells(rec._repr_html_()), rs.predictions(rec)
    ranks = [int(said[i - 1]) for i, one in enumerate(said) if one.startswith("#")]
    assert ranks == sorted(want[(want["rank"] <= 5) | (want["role"] != "top")]["rank"])
    assert said[0] == repr(rec)
    for row in want[(want["rank"] <= 5) | (want["role"] != "top")].itertuples():
        assert cell_text(row.token) in said
        assert cell_text(row.prob) in said
        assert cell_text(row.log_prob) in said


def test_faces_hold_their_tables():
    rec = hostile_recording()
    found = rs.locate(rec, k=15)
    said = cells(found._repr_html_())
    assert [str(site) in said for site in found.sites] == [True] * 10 + [False] * 5
    assert "and 5 more rows" in said
    effect = rs.intervene(rec, rs.Zero(found.sites))
    said = cells(effect._repr_html_())
    for name in ("kl", "direct", "norm_scale", "indirect"):
        assert name in said
    assert cell_text(effect.table["direct"][0]) in said
    assert repr(NASTY) not in said
    assert NASTY in said
    graph = rs.source_graph(rec, nodes=10)
    assert cell_text(graph.edges["share"].iloc[0]) in cells(graph._repr_html_())
    said = cells(rs.Prompt("a", target=" b", versus=["c", 3])._repr_html_())
    assert said[0] == "Prompt"
    assert said[said.index("target") + 1] == "' b'"
    assert said[said.index("versus") + 1] == "c, 3"
    assert cells(rs.Prompt(ids=[5, 4], target=1)._repr_html_())[4] == "5, 4"


def test_a_stale_recording_still_has_its_face():
    model = rs.load(build("gpt2"))
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3], target=7))
    before = rec._repr_html_()
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2.0)
    assert rec._repr_html_() == before


def test_no_face_runs_a_forward(tmp_path):
    made = list(values(tmp_path))
    count = [0]
    hook = hostile().shadow.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    for value in made:
        value._repr_html_()
    hook.remove()
    assert count == [0]


@given(st.text() | st.just(NASTY), st.text() | st.just(ENDING), st.lists(st.text() | st.just(NASTY), max_size=3))
def test_any_text_stays_text_in_a_face(heading, name, texts):
    page = Elements(face_html(heading, {name: "x"}, pd.DataFrame({name: texts}), pd.DataFrame()))
    assert set(page.tags) <= ALLOWED
    assert page.tags.count("td") == 2 + len(texts)

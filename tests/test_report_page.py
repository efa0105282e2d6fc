"""The interactive page as text: what it carries, what its policy allows, what it weighs, what it is without scripts."""

import base64
import hashlib
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_validation import fake_validation
from hypothesis import given
from hypothesis import strategies as st
from pages import ENDING, NASTY, Elements, hostile_recording
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery._html import cell_text, table_html
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.operating import operate
from resid_surgery.views import assets
from resid_surgery.views.files import write_operated
from resid_surgery.views.findings import KINDS, subvalues
from resid_surgery.views.report import MOST, report_html, write_report

pytest.importorskip("vl_convert", reason="charts need the extra `report`")
IDS = {"ids": [5, 4, 3, 9], "target": 7, "versus": [1, 2]}


def recording(family="llama"):
    return rs.record(shared(family), rs.Prompt(**IDS), positions="all")


def charts(text):
    return Elements(text).data["charts"]


def rows(text, title, **wanted):
    """The points of a chart that some choices leave."""
    page = Elements(text)
    number = [said for said in page.texts if said in TITLES].index(title)
    found = page.data["charts"][number]["rows"]
    return [row for row in found if all(row.get(name) in (None, value) for name, value in wanted.items())]


TITLES = ("What the stream says about each token", "What each layer adds", "The best subvalues",
          "What happened to each token", "Who removed, who compensated", "Where the prediction comes from",
          "Predicted against measured", "By arm", "By operation")  # fmt: skip


def values():
    """One of each value that has charts."""
    rec = recording()
    found = rs.locate(rec, k=5)
    graph = rs.source_graph(rec, nodes=12)
    yield rec, 3
    yield found, 1
    yield rs.locate(rec, k=4, kind="layer", score="bs_target"), 1
    yield rs.intervene(rec, rs.Zero(found.sites), at="all"), 2
    yield graph, 1
    yield rs.verify(graph, edges=4), 2
    yield operate(shared("llama"), rs.Prompt(**IDS), k=3), 4


def test_every_value_has_its_interactive_page_and_its_plain_one():
    for value, count in values():
        text = report_html(value)
        page, plain = Elements(text), Elements(report_html(value, interactive=False))
        assert page.tags.count("figure") == len(page.data["charts"]) == count
        assert not {"script", "figure", "form", "select", "input"} & set(plain.tags)
        assert page.tags.count("table") == plain.tags.count("table") >= 1
        assert page.tags.count("td") >= plain.tags.count("td")
        assert len(text.encode()) < MOST
        for chart in page.data["charts"]:
            assert chart["rows"], type(value)
            for row in chart["rows"]:
                assert {"name", "kind", "unit", "y", "tip", "at"} <= set(row)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_page(family):
    rec = recording(family)
    assert len(charts(report_html(rec))) == 3
    assert len(charts(report_html(rs.intervene(rec, rs.Zero("L1.mlp"))))) == 2


def test_points_hold_the_numbers_of_the_verbs():
    rec = recording()
    text = report_html(rec)
    for norm in ("frozen", "own"):
        for kind, shown in zip(KINDS, ("neuron", "head reading a position"), strict=True):
            want = rs.locate(rec, k=min(25, 48 if kind == "head_source" else 25), kind=kind, norm=norm).table
            for key, y in (("none", want["log_prob_increase"]), ("0", want["bs_target"] - want["bs_versus_1"]),
                           ("1", want["bs_target"] - want["bs_versus_2"])):  # fmt: skip
                found = rows(text, "The best subvalues", norm=norm, versus=key, kind=shown)
                assert [row["name"] for row in found] == want["site"].tolist()
                np.testing.assert_allclose([row["y"] for row in found], y, rtol=0, atol=0)
                assert [row["x"] for row in found] == want["layer"].tolist()
    stream = rs.stream_bs(rec)
    found = rows(text, "What the stream says about each token", norm="frozen", versus="none")
    assert [row["y"] for row in found] == stream["bs_value"].tolist()
    lens = rs.lens(rec)
    found = rows(text, "What the stream says about each token", norm="own", versus="none")
    assert [row["y"] for row in found] == lens[lens["role"] != "top"]["log_prob"].tolist()
    one = rows(text, "What the stream says about each token", norm="own", versus="1")
    assert {row["kind"] for row in one} == {repr(rec.prompt.names[i]) for i in (7, 2)}
    ledger = rs.decompose(rec).set_index("site")
    for row in rows(text, "What each layer adds", versus="1"):
        assert row["y"] == ledger.loc[row["name"], "bs_target"] - ledger.loc[row["name"], "bs_versus_2"]


def test_an_effects_points_are_its_tables():
    rec = recording()
    effect = rs.intervene(rec, rs.Zero("L1.mlp"))
    text, table, ledger = report_html(effect), effect.table, effect.ledger()
    for norm, change in (("own", table["bs_change"]), ("frozen", table["bs_change"] - table["norm_scale"])):
        for key, base in (("none", 0.0), ("0", change[1]), ("1", change[2])):
            found = rows(text, "What happened to each token", norm=norm, versus=key)
            np.testing.assert_allclose([row["y"] for row in found], change - base, atol=1e-15)
    own = rows(text, "Who removed, who compensated", norm="own", versus="none")
    assert sum(row["y"] for row in own) == pytest.approx(table["bs_change"][0])
    frozen = rows(text, "Who removed, who compensated", norm="frozen", versus="0")
    assert len(frozen) == len(own) - 1
    assert sum(row["y"] for row in frozen) == pytest.approx(
        (ledger["bs_change"] - ledger["bs_change_versus_1"])[:-1].sum()
    )
    assert [row["name"] for row in own if row["kind"] == "operated on"] == ["L1.mlp"]


def test_only_the_pages_own_scripts_are_allowed_and_nothing_from_outside():
    page = Elements(report_html(hostile_recording()))
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    ran = [text for attributes, text in page.scripts if attributes.get("type") == "module"]
    assert len(ran) == 3
    for text in ran:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert not [
        one for one in page.attributes if one[1] in ("src", "href", "action", "style") or one[1].startswith("on")
    ]


def test_hostile_tokens_are_data_and_text_and_nothing_else():
    text = report_html(hostile_recording())
    page = Elements(text)
    said = "".join(page.texts)
    held = next(text for attributes, text in page.scripts if attributes.get("id") == "data")
    assert not {"<", ">", "&"} & set(held)
    assert NASTY in said
    assert ENDING in said
    assert ENDING not in text
    assert NASTY not in text
    kinds = {row["kind"] for row in page.data["charts"][0]["rows"]}
    assert kinds == {repr(NASTY), repr(ENDING), repr("it's")}
    clean = Elements(report_html(rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 9], target=7, versus=[1, 2]),
                                           positions="all")))  # fmt: skip
    assert set(page.tags) == set(clean.tags)


def test_pages_of_tables_carry_no_chart_library():
    for value in (fake_validation(stream=True), pd.DataFrame({"a": [1, 2]}), {"One": pd.DataFrame({"a": [1]})}):
        page = Elements(report_html(value))
        assert len([1 for attributes, _ in page.scripts if attributes.get("type") == "module"]) == 2
        assert len(report_html(value)) < 900_000


def test_a_page_stays_below_five_megabytes_and_says_what_it_leaves_out():
    many = pd.DataFrame({"n": np.arange(60_000.0), "text": NASTY * 20})
    text = report_html({f"T{i}": many for i in range(4)})
    assert len(text.encode()) <= MOST
    assert "and 59000 more rows" in text
    assert "and 58000 more rows" in report_html(many)
    assert "and 59700 more rows" in report_html(many, interactive=False)


def test_a_missing_package_is_an_error_before_any_work_and_a_plain_page_is_asked_for(monkeypatch, tmp_path):
    gone = {"vl_convert"}
    monkeypatch.setattr(assets, "find_spec", lambda name: None if name in gone else object())
    rec = recording()
    monkeypatch.setattr("resid_surgery.views.recorded.lens", lambda *_: pytest.fail("worked"))
    with pytest.raises(ArgumentError, match=r"needs vl-convert-python: pip install 'resid-surgery\[report\]'.*=False"):
        write_report(rec, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
    report_html(pd.DataFrame({"a": [1]}))
    gone.add("itables")
    with pytest.raises(ArgumentError, match="needs itables:"):
        report_html(pd.DataFrame({"a": [1]}))
    monkeypatch.undo()
    assert write_report(rec, tmp_path / "r.html", interactive=False).exists()


@pytest.mark.parametrize("given", [1, None, "yes"])
def test_interactive_is_true_or_false(given):
    with pytest.raises(ArgumentError, match="`interactive` must be True or False"):
        report_html(pd.DataFrame(), interactive=given)


def test_what_is_kept_of_a_bundle_is_believed_only_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(assets, "_bundle", lambda: made.append(1) or "window.vegaEmbed = '</script><!--';")
    once = assets._charts.__wrapped__()
    assert once == "window.vegaEmbed = '\\x3C/script>\\x3C!--';"
    assert assets._charts.__wrapped__() == once
    assert len(made) == 1
    place = next(tmp_path.rglob("vega-*.js"))
    place.write_bytes(place.read_bytes()[:-3])
    assert assets._charts.__wrapped__() == once
    assert len(made) == 2
    assert assets._charts.__wrapped__() == once
    assert len(made) == 2
    place.unlink()
    place.mkdir()
    assert assets._charts.__wrapped__() == once  # a folder that cannot be written only costs time


def test_an_unknown_bundle_of_tables_is_refused(monkeypatch, tmp_path):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "dt_bundle.js").write_text("nothing")
    monkeypatch.setattr(assets.resources, "files", lambda _: tmp_path)
    with pytest.raises(ArgumentError, match="another bundle of DataTables"):
        assets._tables.__wrapped__()


def test_numbers_that_are_none_break_no_page():
    rec = recording()
    table = rs.locate(rec, k=3).table.assign(log_prob_increase=[math.nan, math.inf, 0.5])
    text = report_html(replace(rs.locate(rec, k=3), table=table))
    ys = [row["y"] for row in rows(text, "The best subvalues", versus="none")]
    assert ys == [None, None, 0.5]


def test_tokens_of_one_text_stay_apart():
    rec = recording()
    same = replace(rec, prompt=replace(rec.prompt, names=dict.fromkeys(rec.prompt.names, "a")))
    text = report_html(same)
    assert {row["kind"] for row in charts(text)[0]["rows"]} == {"'a' (7)", "'a' (1)", "'a' (2)"}
    assert {"over 'a' (1)", "over 'a' (2)"} <= set(subvalues(same))


def test_a_prompt_without_competitors_has_no_choice_of_one():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3], target=7))
    page = Elements(report_html(rec))
    assert "select" not in page.tags
    assert [value for tag, name, value in page.attributes if (tag, name) == ("input", "name")] == ["norm", "norm"]


def test_a_runs_page(tmp_path):
    plan = {"intervene": {"all": {"kind": "Zero", "sites": "L*.mlp", "each": True},
                          "one": {"kind": "Zero", "sites": "L1.attn"}}}  # fmt: skip
    prompts = [{"ids": [5, 4, 3], "target": 1}, {"ids": [9, 8], "target": 2}, {"ids": [9, 8], "target": 10**6}]
    run = rs.run(shared("llama"), prompts, plan, out=tmp_path / "run", max_failures=None, progress=False)
    text = report_html(run)
    mean = run.summary("arm").set_index("arm")["mean"]
    assert {row["name"]: row["y"] for row in rows(text, "By arm")} == mean.to_dict()
    assert "Failures" in text
    assert repr(run) in "".join(Elements(text).texts)


def test_operate_writes_the_page_too(tmp_path):
    done = operate(shared("llama"), rs.Prompt(**IDS), k=2)
    files = write_operated(done, tmp_path)
    assert files[-1].name == "report.html"
    assert len(charts(files[-1].read_text())) == 4


@given(st.lists(st.floats() | st.none(), min_size=1, max_size=4))
def test_cells_hold_their_numbers_with_all_digits(numbers):
    frame = pd.DataFrame({"n": pd.Series(numbers, dtype=float), "t": "x", "norm": "own"})
    page = Elements(table_html(frame, exact=True, chosen=("norm",), shown_with={"t": ("versus", "0")}))
    held = [value for tag, name, value in page.attributes if (tag, name) == ("td", "data-order")]
    for number, said in zip(frame["n"], held, strict=True):
        if cell_text(number) == "":
            assert said == ""
        elif math.isfinite(number):
            assert float(said) == number
        else:
            assert float(said) == math.copysign(1.7976931348623157e308, number)
    assert [one for one in page.attributes if one[0] == "tr"] == [("tr", "data-norm", "own")] * len(frame)
    assert [one[1:] for one in page.attributes if one[0] == "th" and one[1] != "class"] == [
        ("data-control", "versus"), ("data-value", "0")]  # fmt: skip

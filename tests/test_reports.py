"""Reports: every form of a validation holds the same, reads back exactly, and stays text whatever the text says."""

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jsonschema
import numpy as np
import pandas as pd
import pytest
from fake_validation import NASTY, fake_validation, manifest, measured_stream, rows
from hypothesis import given, settings
from hypothesis import strategies as st

import resid_surgery as rs
from resid_surgery._html import cell_text, number_text, table_html
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.gating import Measured, judge, verdict
from resid_surgery.editing.reports import COMPARED, SCHEMA, Validation, diff_reports, markdown_table
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.views.report import report_html, write_report

EVIL = [NASTY, "</td></table><script>alert(1)</script>", "' onload='x", '"><svg onload=x>', "]]>", "&lt;b&gt;",
        "a|b\n|c", "{{ 7 * 7 }}{% raw %}", "\x00\x1b[31m\ufffe", "Infinity", "<!-- -->", "`x` *y* _z_ [a](b)",
        "\u2028|\u0085"]  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        self.texts.append(data)


def same(a, b):
    assert a.verdict == b.verdict
    assert dict(a.manifest) == dict(b.manifest)
    pd.testing.assert_frame_equal(a.gates, b.gates, check_exact=True)
    assert list(a.tables) == list(b.tables)
    for name in a.tables:
        pd.testing.assert_frame_equal(a.tables[name], b.tables[name], check_exact=True)


@pytest.mark.parametrize("stream", [False, True])
def test_json_reads_back_exactly(stream, tmp_path):
    value = fake_validation(stream=stream)
    text = value.to_json()
    same(Validation.from_json(text), value)
    assert Validation.from_json(text).to_json() == text
    same(Validation.from_json(value.save(tmp_path / "r.json")[0]), value)
    jsonschema.validate(json.loads(text), SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_refuses_what_is_no_report():
    data = json.loads(fake_validation().to_json())
    for broken in (data | {"verdict": "OK"}, data | {"more": 1}, data | {"schema": 2}, data | {"gates": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_json_is_strict_though_nothing_or_infinitely_much_is_known():
    gates = judge([Measured("efficacy / random control", rows([9.0], "a")), Measured("kl: unrelated text", rows([]))],
                  stream=False)  # fmt: skip
    table = pd.DataFrame({"x": [1.5, np.nan, np.inf, -np.inf], "mixed": [None, np.inf, "Infinity", {"a": [-np.inf]}]})
    value = Validation(verdict(gates), gates, {"odd": table}, {"much": math.inf, "none": math.nan, "n": np.int64(3)})
    text = value.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    back = Validation.from_json(text)
    same(back, value)
    assert back.tables["odd"]["mixed"].tolist() == [None, math.inf, "Infinity", {"a": [-math.inf]}]
    assert back.gates["high"].max() == math.inf
    assert back.manifest["much"] == math.inf
    assert back.manifest["none"] is None


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(), st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=3),
    st.lists(st.floats(), min_size=2, max_size=2),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)),
)  # fmt: skip
def test_any_text_and_number_reads_back(texts, numbers, entry):
    gates = fake_validation().gates
    value = Validation("FAIL", gates, {"t": pd.DataFrame(texts), "n": pd.DataFrame({"n": numbers})}, {"entry": entry})
    same(Validation.from_json(value.to_json()), value)


def replaced(old, new):
    """The JSON of a report, damaged."""
    text = fake_validation().to_json()
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{nonsense", "no JSON text"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("{}", "no resid_surgery validation"),
        (replaced('"what": "resid_surgery validation"', '"what": "x"'), "this is no .*'x'"),
        (replaced('"schema": 1', '"schema": 9'), "has schema 9; this version reads 1"),
        (replaced('"verdict": "INCONCLUSIVE"', '"verdict": "PASS"'), "INCONCLUSIVE or worse"),
        (replaced('"dtype": "float64"', '"dtype": "bool8"'), "is not bool8"),
        (replaced('"name": "gate"', '"name": "gat"'), "a table from judge"),
        (replaced('"manifest": {', '"manifest": [], "more": {'), "is damaged"),
        ("/nowhere/report.json", "cannot be read"),
    ],
)
def test_damaged_reports_are_refused(text, error):
    with pytest.raises(LoadError, match=error):
        Validation.from_json(text)


def test_a_validation_says_its_verdict_and_its_exit_code():
    value = fake_validation()
    assert repr(value).startswith(
        "Validation(INCONCLUSIVE: 10 PASS, 1 INCONCLUSIVE (1 with a warning); worst: paraphrase"
    )
    assert value.worst == "paraphrase: new above old"
    bad = fake_validation(harm=40)
    clear = judge(measured_stream(120), stream=True)
    good = Validation(verdict(clear), clear)
    assert (good.exit_code, bad.exit_code, value.exit_code) == (0, 1, 3)
    assert "<strong>INCONCLUSIVE" in value._repr_html_()
    with pytest.raises(ArgumentError, match="FAIL or worse, as the gates are"):
        Validation("PASS", bad.gates)
    assert Validation("INCONCLUSIVE", good.gates).verdict == "INCONCLUSIVE"  # more cautious than its gates is allowed


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Validation("PASS", pd.DataFrame({"gate": [], "state": []})), "a table from judge"),
        (lambda: Validation("FAIL", fake_validation().gates, {"t": [1]}), "`t` must be a DataFrame"),
        (lambda: Validation("FAIL", fake_validation().gates, {"t": pd.DataFrame({"a": [object()]})}), "`t.a` must be"),
        (lambda: Validation("FAIL", fake_validation().gates, {}, {"a": {1: 2}}), "`manifest.a` must be of named"),
        (lambda: Validation("FAIL", fake_validation().gates, {}, {"a": {2j}}), "`manifest.a`"),
        (lambda: Validation("FAIL", fake_validation().gates, {"t": pd.DataFrame([[1, 2]], columns=["a", "a"])}),
         "different names"),
        (lambda: fake_validation().save("x.pdf"), "`path` must be one of .json"),
        (lambda: Validation.from_json(3), "a path or a JSON text"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_must_hold(call, text):
    with pytest.raises(ArgumentError, match=text):
        call()


def test_a_report_keeps_what_it_was_given():
    table = pd.DataFrame({"a": [1.0]}, index=[7])
    value = Validation("FAIL", fake_validation().gates, {"t": table}, {"seed": 1})
    table.loc[7, "a"] = 2.0
    assert value.tables["t"]["a"].tolist() == [1.0]
    with pytest.raises(TypeError):
        value.tables["t"] = table
    with pytest.raises(AttributeError):
        value.verdict = "PASS"


def test_save_writes_a_folder_or_one_file(tmp_path):
    value = fake_validation()
    files = value.save(tmp_path / "deep" / "out")
    assert [one.name for one in files] == ["report.json", "report.md", "junit.xml"]
    assert files[0].read_text(encoding="utf-8") == value.to_json()
    assert value.save(tmp_path / "x.md") == [tmp_path / "x.md"]
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="cannot be written"):
        value.save(tmp_path / "file" / "r.json")


def test_a_lone_surrogate_is_written_and_read_back(tmp_path):
    table = pd.DataFrame({"token": pd.Series(["\ud800x"], dtype=object)})
    value = Validation("FAIL", fake_validation().gates, {"tokens": table}, {"token": "\udfff"})
    same(Validation.from_json(value.save(tmp_path / "r.json")[0]), value)
    value.save(tmp_path / "all")
    write_report(value, tmp_path / "r.html")


def test_markdown_holds_every_section():
    text = fake_validation(stream=True).markdown()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# INCONCLUSIVE: 2 PASS, 2 INCONCLUSIVE; worst: efficacy: new above old", "## Gates", "## Per edit",
        "## Token spectrum of the edited vectors", "## Exposure strata", "## Worst collateral prompts", "## Controls",
        "## Sequence curves", "## Tensors", "## Key cosine", "## Manifest",
    ]  # fmt: skip
    assert text.count("The Louvre is in") == 10  # the ten worst of twelve
    assert NASTY not in text
    assert "| probe\\_hash | 9a8b7c6d |" in text


@given(st.lists(st.text() | st.sampled_from(EVIL), min_size=1, max_size=4))
def test_no_text_breaks_out_of_a_markdown_cell(texts):
    lines = markdown_table(pd.DataFrame({"a": texts, "b": "end"})).split("\n")
    assert len(lines) == 2 + len(texts)
    for line in lines:
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") == 3
        assert "<" not in line


def test_junit_is_read_back_with_a_case_a_gate():
    value = fake_validation(harm=40, token=NASTY, model="a\x00<b>")
    root = ET.fromstring(value.junit())
    suite = root.find("testsuite")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == [*value.gates["gate"], "verdict"]
    for row in value.gates.to_dict("records"):
        tags = [child.tag for child in cases[row["gate"]] if child.tag != "system-out"]
        assert tags == {"PASS": [], "FAIL": ["failure"], "INCONCLUSIVE": ["error"]}[row["state"]]
    failures = int((value.gates["state"] == "FAIL").sum()) + 1
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("12", str(failures), "1")
    assert "is above the fail limit" in cases["kl: neighbourhood"].find("failure").get("message")
    properties = {one.get("name"): one.get("value") for one in suite.iter("property")}
    assert properties["probe_hash"] == "9a8b7c6d"
    assert properties["model"] == "a\ufffd<b>"


def test_junit_says_so_when_there_is_no_gate_at_all():
    empty = fake_validation().gates.iloc[:0]
    root = ET.fromstring(Validation(verdict(empty), empty).junit())
    assert [case.get("name") for case in root.iter("testcase")] == ["verdict"]
    assert len(list(root.iter("error"))) == 1


@given(st.text() | st.sampled_from(EVIL))
def test_any_text_is_legal_in_junit(text):
    gates = fake_validation().gates.assign(why=text)
    root = ET.fromstring(Validation("FAIL", gates, {}, {text or "x": text}).junit())
    assert len(list(root.iter("testcase"))) == len(gates) + 1


def test_differences_gate_by_gate(tmp_path):
    before, after = fake_validation(harm=40), fake_validation(edit="another", edit_hash="0")
    table = diff_reports(before, after).set_index("gate")
    row = table.loc["kl: neighbourhood"]
    assert (row["state_before"], row["state_after"], row["states"], row["apart"]) == ("FAIL", "PASS", "better", True)
    assert row["change"] == pytest.approx(row["value_after"] - row["value_before"])
    assert table.loc["verdict", ["state_before", "state_after", "states"]].tolist() == [
        "FAIL",
        "INCONCLUSIVE",
        "better",
    ]
    assert (diff_reports(after, after)["states"] == "same").all()
    assert diff_reports(after, before).set_index("gate").loc["verdict", "states"] == "worse"
    path = before.save(tmp_path / "a.json")[0]
    pd.testing.assert_frame_equal(diff_reports(path, after).set_index("gate"), table)


def test_a_gate_of_one_report_only_has_no_difference():
    full = fake_validation()
    less = Validation("INCONCLUSIVE", full.gates.iloc[1:], {}, full.manifest)
    row = diff_reports(full, less).set_index("gate").loc["efficacy: new above old"]
    assert (row["state_after"], row["states"]) == ("", "")
    assert math.isnan(row["change"])


@pytest.mark.parametrize("key", COMPARED)
def test_reports_of_different_protocols_are_refused(key):
    other = fake_validation(**{key: "other"})
    with pytest.raises(ArgumentError, match=rf"\({key}\) to be compared; got .* and other"):
        diff_reports(fake_validation(), other)
    gates = fake_validation().gates
    newer = gates.assign(protocol=gates["protocol"].str.replace("/1", "/2"))
    with pytest.raises(ArgumentError, match=r"judge .* by one protocol \(protocol\) to be compared; got .*/1 and .*/2"):
        diff_reports(fake_validation(), Validation("INCONCLUSIVE", newer, {}, manifest()))


def test_reports_judged_by_other_limits_are_refused():
    gates = fake_validation().gates.assign(policy_fail=0.5)
    with pytest.raises(ArgumentError, match=r"against one limit \(policy_fail\) to be compared; got .* and 0.5"):
        diff_reports(fake_validation(), Validation("INCONCLUSIVE", gates, {}, manifest()))


def test_another_base_model_may_be_asked_for():
    other = fake_validation(fingerprint="other")
    assert len(diff_reports(fake_validation(), other, across_models=True)) == 12


def need_harmless(text):
    """No script, no request, no tag or attribute that data brought in."""
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link", "a", "base", "form"} & set(page.tags)
    assert not [
        one for one in page.attributes if one[1].startswith("on") or one[1] in ("src", "href", "action", "style")
    ]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    return page


@pytest.mark.parametrize("stream", [False, True])
def test_the_page_is_self_contained_and_holds_everything(stream, tmp_path):
    value = fake_validation(stream=stream)
    path = write_report(value, tmp_path / "sub" / "r.html", interactive=False)
    page = need_harmless(path.read_text(encoding="utf-8"))
    said = "".join(page.texts)
    for name in value.gates["gate"]:
        assert name in said
    assert value.headline.split(": ", 1)[1] in said
    assert said.count(NASTY) > 20
    assert page.tags.count("svg") == len(value.gates) + (4 if stream else 0)
    assert page.tags.count("article") == 10
    assert "9a8b7c6d" in said


@settings(max_examples=20)
@given(st.text(min_size=1) | st.sampled_from(EVIL))
def test_any_text_stays_text_on_the_page(token):
    text = token.replace("http", "")
    value = fake_validation(stream=True, token=text, model=text, **{text: text})
    value = Validation("FAIL", value.gates.assign(why=text), {**value.tables, text: pd.DataFrame({text: [text, 1]})},
                       value.manifest)  # fmt: skip
    clean = fake_validation(stream=True)
    page, plain = need_harmless(report_html(value, interactive=False)), Page(report_html(clean, interactive=False))
    assert set(page.tags) == set(plain.tags)


@pytest.mark.parametrize("text", EVIL)
def test_names_of_gates_and_curves_stay_text_in_drawings(text):
    clean = fake_validation(stream=True)
    curve = pd.DataFrame({"edits": [1, 2], text: [0.1, 0.2]})
    value = Validation("FAIL", clean.gates.assign(gate=text), {"curve": curve}, {})
    page, plain = need_harmless(report_html(value, interactive=False)), Page(report_html(clean, interactive=False))
    assert set(page.tags) <= set(plain.tags)
    assert {name for _, name, _ in page.attributes} <= {name for _, name, _ in plain.attributes}
    labels = [said for tag, name, said in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == len(clean.gates) + 1


def test_each_value_has_its_page(smollm2, tmp_path):
    rec = rs.record(
        smollm2, rs.Prompt("The capital of France is", target=" Paris", versus=[" London"]), positions="all"
    )
    found = rs.locate(rec, k=3)
    effect = rs.intervene(rec, rs.Zero(found.sites))
    graph = rs.source_graph(rec, nodes=8)
    verified = rs.verify(graph, edges=3)
    for value, words in (
        (rec, ("Logit lens", "Addends of the stream", "' Paris'")),
        (found, (str(found.sites[0]), "log_prob_increase")),
        (effect, ("Ledger", "norm_scale")),
        (graph, ("Readings", "Edges")),
        (verified, ("Edges cut", "predicted")),
    ):
        said = "".join(need_harmless(report_html(value, interactive=False)).texts)
        for word in words:
            assert word in said, (type(value), word)


def test_tables_and_edits_have_pages_too():
    many = pd.DataFrame({"n": range(1000), "token": NASTY})
    said = "".join(need_harmless(report_html({"One": many, "Two": many.head(1)}, interactive=False)).texts)
    assert "and 700 more rows" in said
    assert "1 row" in said
    need_harmless(report_html(many.head(3), interactive=False))
    assert "fact <b>" in "".join(
        need_harmless(report_html(Edit((), method="fact <b>", about={"k": NASTY}), interactive=False)).texts
    )


@pytest.mark.parametrize(
    ("value", "path", "text"),
    [
        (3, "x.html", "one of Validation, Recording"),
        ({"a": 1}, "x.html", "a dict of DataFrames"),
        (pd.DataFrame(), "x.pdf", "ends in .html"),
    ],
)
def test_what_has_no_page_is_refused(value, path, text, tmp_path):
    with pytest.raises(ArgumentError, match=text):
        write_report(value, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="cannot be written"):
        write_report(pd.DataFrame(), tmp_path / "file" / "r.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.012345, "0.01235"), (1234.56, "1235"), (1e-5, "1.0e-05"), (-0.5, "−0.5"),
     (-2e-5, "−2.0e-05"), (math.inf, "∞"), (-math.inf, "−∞"), (0.99999, "1"), (1e6, "1.0e+06")],
)  # fmt: skip
def test_numbers_as_people_read_them(value, text):
    assert number_text(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_the_number_to_four_digits(value):
    shown = float(number_text(value).replace("−", "-"))
    assert shown == pytest.approx(value, rel=0.05 if not 1e-4 <= abs(value) < 1e6 else 1e-3)


def test_cells_in_words():
    cells = [None, math.nan, pd.NA, True, np.bool_(False), np.int64(3), ["a", 1], {"b": 2.5}, "x", " x"]
    assert [cell_text(one) for one in cells] == ["", "", "", "yes", "no", "3", "a, 1", "b: 2.5", "x", "' x'"]


@given(st.lists(st.text() | st.sampled_from(EVIL), max_size=3), st.text())
def test_an_html_table_has_its_cells_and_nothing_else(texts, name):
    page = Page(table_html(pd.DataFrame({name: texts}), caption=name))
    assert page.tags.count("td") == len(texts)
    assert set(page.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert not [one for one in page.attributes if one[1] != "class"]

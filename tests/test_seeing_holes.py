"""Holes that a review of figures, pages, theatre and recipes found."""

import asyncio
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest
import tiny
from pages import NASTY, Elements
from test_theatre import TEXT, theatre_tokenizer

import resid_surgery as rs
from resid_surgery.views import operated, theatre_server
from resid_surgery.views import theatre as play
from resid_surgery.views import theatre_acts as acts
from resid_surgery.views import theatre_tables as tables
from resid_surgery.views.report import MOST, report_html
from resid_surgery.views.theatre_line import Line


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama to which one can type."""
    return rs.load(tiny.build("llama"), tokenizer=theatre_tokenizer())


# -- pages


@pytest.mark.parametrize("interactive", [True, False])
def test_texts_side_by_side_keep_the_page_below_five_megabytes_and_are_said_to_be_cut(interactive: bool) -> None:
    if interactive:
        pytest.importorskip("itables")
    beside = {"prompt": [NASTY] * 4000, "text_before": ["y" * 1000] * 4000, "text_after": ["z" * 1000] * 4000}
    text = report_html({"Said": pd.DataFrame(beside)}, interactive=interactive)
    assert len(text.encode()) <= MOST
    shown = text.count("<article")
    assert 0 < shown < 4000
    assert f"The first {shown} of 4000 are in this page" in text


def test_what_a_table_leaves_out_is_said_where_its_last_row_is_taken_away() -> None:
    pytest.importorskip("itables")
    text = report_html(pd.DataFrame({"n": range(2001)}))
    assert any("The first 2000 of 2001 are in this page" in one for one in Elements(text).texts)
    assert "are in this page" not in report_html(pd.DataFrame({"n": range(2000)}))
    assert "are in this page" not in report_html(pd.DataFrame({"n": range(2001)}), interactive=False)  # its row says so


def test_a_run_of_thousands_of_operations_shows_those_that_change_most() -> None:
    means = pd.DataFrame({"operation": [f"op{i}" for i in range(3000)], "mean": [(-1) ** i * i for i in range(3000)],
                          "low": -1.0, "high": 1.0, "n": 2})  # fmt: skip
    chart = operated._means("operation", means)
    assert [row["name"] for row in chart.rows] == [f"op{i}" for i in range(2940, 3000)]
    assert chart.note == "The 60 of 3000 that change most; the table has them all."
    assert chart.spec["height"] == 26 * 60 + 8
    assert operated._means("operation", means[:60]).note == ""


def test_what_cannot_be_cut_to_five_megabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rs.ArgumentError, match="`value` must be one that fits on a page of 5,000,000 bytes"):
        rs.write_report(pd.DataFrame({"text": ["y" * 600_000] * 10}), tmp_path / "page.html", interactive=False)
    assert not list(tmp_path.iterdir())


# -- figures


def test_more_tokens_than_dashes_differ_in_their_marks(model: Any) -> None:
    pytest.importorskip("matplotlib")
    versus = [" London", " capital", " of", " is", "The"]
    drawn = rs.plot_stream(rs.stream_bs(rs.record(model, rs.Prompt(TEXT, target=" Paris", versus=versus))))
    looks = {(line.get_linestyle(), line.get_marker()) for line in drawn.get_lines()}
    assert len(looks) == len(drawn.get_lines()) == 6


def test_two_tokens_of_one_text_are_two_curves(model: Any) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    stream = rs.stream_bs(rs.record(model, rs.Prompt(TEXT, target=" Paris", versus=[" London"])))
    drawn = rs.plot_stream(stream.assign(token=" same"))
    lengths = [len(line.get_xdata()) for line in drawn.get_lines()]
    pyplot.close(drawn.figure)
    assert lengths == [stream["step"].nunique()] * 2


# -- the theatre


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kind", play.KINDS)
def test_marks_stand_on_the_targets_line_in_parallel_blocks_too(family: str, kind: str) -> None:
    stage = play.read(rs.load(tiny.build(family), tokenizer=theatre_tokenizer()), TEXT, " Paris", [" London"])
    target, *_, marks = tables.stream_chart(stage, play.found(stage, kind, 6))["series"]
    line = dict(one["value"] for one in target["data"])
    assert [line.get(one["value"][0]) for one in marks["data"]] == [one["value"][1] for one in marks["data"]]


class Label:
    """What the page's labels are asked for."""

    text = ""

    def set_text(self, text: str) -> None:
        self.text = text


def page_without_browser(model: Any) -> Any:
    """The theatre's page, its elements replaced by ones that only keep what they are told."""
    page = pytest.importorskip("resid_surgery.views.theatre_page").Page(model, "rs.load('x')", Line())
    elements = ("busy", "text", "target", "versus", "kind", "found", "shares", "split", "knobs", "chart", "details",
                "chosen", "spectrum", "refused", "sources")  # fmt: skip
    fakes = dict.fromkeys(("unknown", "wrong", "unsaid")) | dict.fromkeys(("status", "said", "before", "after"), Label)
    for name, kind in (dict.fromkeys(elements, MagicMock) | fakes).items():
        setattr(page, name, SimpleNamespace(error=None) if kind is None else kind())
    page._show_prompt = lambda stage: None
    page.new = SimpleNamespace(value=2)
    page.text.value, page.target.value, page.versus.value, page.kind.value = TEXT, " Paris", [], "neuron"
    return page


def test_of_another_prompt_nothing_stays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, read = threading.Event(), threading.Event(), play.read
    seen: dict[str, Any] = {}

    def slow(*given: Any) -> play.Stage:
        begun.set()
        assert go.wait(20)
        return read(*given)

    async def played() -> Any:
        page = page_without_browser(model)
        await page.read()
        assert page.before.text
        page.wrong.error, page.text.value, ask = "no such edge", "The capital of", page.line.ask
        monkeypatch.setattr(play, "read", slow)

        async def spied(owner: Any, kind: str, work: Any) -> Any:
            if kind == "find":
                seen["texts"] = [page.said.text, page.before.text, page.after.text]
                seen["rows"] = [page.found.rows, page.shares.rows, page.split.rows]
            return await ask(owner, kind, work)

        monkeypatch.setattr(page.line, "ask", spied)
        reading = asyncio.ensure_future(page.read())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        asked = asyncio.ensure_future(page.choose("L1.N3"))  # of the prompt that is still shown
        await asyncio.sleep(0.05)
        page.details.reset_mock()
        go.set()
        await asyncio.gather(reading, asked)
        page.line.close()
        return page

    page = asyncio.run(played())
    assert page.stage.rec.prompt.tokens == ("The", " capital", " of")
    assert seen == {"texts": ["", "", ""], "rows": [[], [], []]}
    assert (page.wrong.error, page.acts.knobs) == (None, ())
    assert [call.args for call in page.details.set_visibility.call_args_list] == [(False,)]
    assert page.before.text == page.after.text != ""


def test_rows_of_another_kind_do_not_stay_where_the_chosen_kind_has_none(model: Any) -> None:
    async def played() -> Any:
        page = page_without_browser(model)
        await page.read()
        assert len(page.found.rows) == 10
        page.kind.value = "nonsense"
        await page.find()
        page.line.close()
        return page

    page = asyncio.run(played())
    assert page.unknown.error.startswith("`kind` must be")
    assert page.found.rows == []
    assert len(page.marked) == 0


@pytest.mark.parametrize("new", [0, 41, 2.5, float("nan"), float("inf"), None, "7"])
def test_a_continuation_of_no_length_is_refused_and_nothing_is_exported(model: Any, new: Any) -> None:
    async def played() -> Any:
        page = page_without_browser(model)
        page.stage, page.new.value = play.read(model, TEXT, " Paris", []), new
        await page.export()
        page.line.close()
        return page

    assert "`new` must be a whole number in 1..40" in asyncio.run(played()).unsaid.error


SLOW = """let real;
Object.defineProperty(window, "vegaEmbed", {
  set: (given) => { real = given; },
  get: () => async (...given) => { await new Promise((after) => setTimeout(after, 400)); return real(...given); },
});"""


def test_a_choice_made_while_charts_are_still_being_drawn_holds_for_all(model: Any, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("vl_convert", reason="charts need the extra `report`")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is found: install Debian's package chromium")
    rec = rs.record(model, rs.Prompt(TEXT, target=" Paris", versus=[" London"]))
    path, said = rs.write_report(rec, tmp_path / "page.html"), []
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda one: said.append(str(one)))
        page.add_init_script(SLOW)
        page.goto(path.as_uri())
        page.check("input[name=norm][value=own]")  # the first chart is not drawn yet
        page.wait_for_selector("html[data-ready=yes]")
        drawn = page.evaluate("[...document.querySelectorAll('figure.chart')].map((one) => one.dataset.drawn)")
        units = page.locator("figure.chart .unit").all_inner_texts()
        browser.close()
    assert said == []
    assert len(drawn) == 3
    assert all('"norm":"own"' in one for one in drawn)
    assert "own norm" in units[0]


@pytest.mark.parametrize("given", [None, 5, float("nan"), b"ab", ["a"], {"a": 1}, True])
def test_a_field_of_another_kind_is_named_and_no_forward_runs(given: Any, model: Any) -> None:
    """Whoever has the key may send anything in place of a text."""
    for field in ("text", "target", "versus"):
        asked: dict[str, Any] = {"text": TEXT, "target": " Paris", "versus": [" London"]}
        if field == "versus" and given == ["a"]:
            given = [None]
        wrong = play.faults(model, **asked | {field: given})
        assert list(wrong) == [field]
        assert wrong[field].startswith(f"`{field}` must be a ")
        with pytest.raises(rs.PromptError, match=f"`{field}` must be a "):
            play.read(model, **asked | {field: given})


def test_a_continuation_is_the_models_own_in_evaluation_mode_whatever_the_modules_mode_is() -> None:
    module = tiny.build("llama", attention_dropout=0.9)
    stage = play.read(rs.load(module, tokenizer=theatre_tokenizer()), TEXT, " Paris", [])
    said = acts.continued(stage, [], 8)
    module.train()
    assert {acts.continued(stage, [], 8) for _ in range(5)} == {said}
    assert module.training


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": None}, "`model` must be a model from resid_surgery.load"),
        ({"load": 5}, "`load` must be a text; got 5"),
        ({"opened": "x"}, "`opened` must be a function of the page's address; got 'x'"),
    ],
    ids=["model", "load", "opened"],
)
def test_a_theatre_of_something_else_is_refused(given: dict[str, Any], said: str, model: Any) -> None:
    asked: dict[str, Any] = {"model": model, "load": "rs.load('x')", "port": 0}
    with pytest.raises(rs.ArgumentError, match=said):
        theatre_server.theatre(**asked | given)


@pytest.mark.parametrize("host", [None, ["127.0.0.1"], b"127.0.0.1", {}, float("nan"), "0.0.0.0", pd.NA])
def test_no_host_but_the_loopback_is_taken(host: Any) -> None:
    with pytest.raises(rs.ArgumentError, match=r"`host` must be one of 127\.0\.0\.1"):
        theatre_server.bound(host, 0)

"""The report in a real browser: Chromium opens it from a file, hovers, filters, sorts, chooses; nothing leaves it."""

import shutil
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fake_validation import fake_validation
from pages import ENDING, NASTY, hostile_recording
from tiny import shared

import resid_surgery as rs
from resid_surgery._html import cell_text
from resid_surgery.views.report import report_html, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here (Debian: apt install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
pytest.importorskip("vl_convert", reason="charts need the extra `report`")

STREAM, ADDENDS, SUBVALUES = range(3)
ONE_POINT = """([chart, name]) => {
  const shown = [...document.querySelectorAll(`#chart${chart} .mark-symbol.role-mark path`)];
  const point = shown.find((one) => (one.__data__.datum || {}).name === name
    && one.__data__.opacity !== 0);
  point.scrollIntoView({block: "center"});
  const box = point.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}"""
POINTS = """(chart) => [...document.querySelectorAll(`#chart${chart} .mark-symbol.role-mark path`)]
  .map((one) => one.__data__).filter((item) => item.datum && item.datum.at !== undefined && item.opacity !== 0)
  .map((item) => [item.datum.name, item.datum.y])"""
CONTRASTS = """() => {
  const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const below = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.getClientRects().length || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(one.tagName)) continue;
    const style = getComputedStyle(one);
    const ink = parts(one instanceof SVGElement ? style.fill : style.color);
    if (ink.length < 3) continue;
    const [a, b] = [light(ink), light(below(one))].sort((x, y) => y - x);
    found.push([one.tagName, one.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A page with everything it said and asked for."""

    def __init__(self, browser, path, **options):
        self.said, self.asked = [], []
        self.context = browser.new_context(viewport={"width": 1300, "height": 950}, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda one: self.said.append(one.text))
        self.page.on("pageerror", lambda one: self.said.append(str(one)))
        self.page.on("dialog", lambda one: (self.said.append("dialog"), one.dismiss()))
        self.context.route("**/*", self._route)
        begun = time.perf_counter()
        self.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-ready=yes]", timeout=30_000)
        self.seconds = time.perf_counter() - begun
        self.path = path.as_uri()

    def _route(self, route):
        self.asked.append(route.request.url)
        route.continue_() if route.request.url.startswith("file:") else route.abort()

    def choose(self, name, value):
        if dict(self.page.evaluate("[...new FormData(document.forms.controls)]"))[name] == value:
            return
        self.page.evaluate("delete document.documentElement.dataset.shown")
        if self.page.locator(f"select[name={name}]").count():
            self.page.select_option(f"select[name={name}]", value)
        else:
            self.page.check(f"input[name={name}][value={value}]")
        self.page.wait_for_selector("html[data-shown]")

    def hover(self, chart, name):
        self.page.mouse.move(*self.page.evaluate(ONE_POINT, [chart, name]))
        self.page.wait_for_selector("#tip:not([hidden])")
        labels, texts = (self.page.locator(f"#tip {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(labels, texts, strict=True))

    def points(self, chart):
        return dict(self.page.evaluate(POINTS, chart))

    def table(self, title):
        return self.page.locator("details", has=self.page.locator("summary", has_text=title)).first

    def column(self, title, name):
        table = self.table(title)
        heads = [one.strip() for one in table.locator("thead tr").first.locator("th").all_inner_texts()]
        return table.locator(f"tbody tr td:nth-child({heads.index(name) + 1})").all_inner_texts()

    def need_quiet(self):
        assert self.said == []
        assert set(self.asked) <= {self.path, f"{self.path}#"}


@pytest.fixture(scope="module")
def rec():
    return rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 9], target=7, versus=[1, 2]), positions="all")


@pytest.fixture(scope="module")
def path(rec, tmp_path_factory):
    return write_report(rec, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser, path):
    watched = Watched(browser, path)
    yield watched
    watched.need_quiet()
    watched.context.close()


def found(rec, norm, kind="neuron"):
    return rs.locate(rec, k=25, kind=kind, norm=norm).table


def test_everything_is_there(opened):
    page = opened.page
    assert page.locator("figure.chart:visible svg").count() == 3
    assert page.locator("details table").count() == 4
    assert page.locator("form#controls:visible").count() == 1
    assert opened.asked == [opened.path]
    for control in page.locator("input, select").element_handles():
        named = control.evaluate("(one) => (one.labels && one.labels.length) ? one.labels[0].textContent : "
                                 "one.getAttribute('aria-label')")  # fmt: skip
        assert (named or "").strip()


def test_hovering_a_point_tells_its_tokens_and_scores(opened, rec):
    best = found(rec, "frozen").iloc[0]
    said = opened.hover(SUBVALUES, best["site"])
    assert said["site"] == best["site"]
    assert said["log_prob_increase"] == cell_text(best["log_prob_increase"])
    assert said["norm"] == "frozen"
    spectrum = rs.spectrum(rec, best["site"], top=6)
    first = spectrum[spectrum["side"] == "promotes"].iloc[0]
    assert said["promotes"].startswith(f"{first['token']!r} {first['bs_value']:.2f}")
    assert said[f"over {rec.prompt.names[1]!r}"] == cell_text(best["bs_target"] - best["bs_versus_1"])
    opened.page.keyboard.press("Escape")
    assert opened.page.locator("#tip").is_hidden()


def test_hovering_the_stream_tells_the_state(opened, rec):
    last = rs.stream_bs(rec).query("role == 'target'").iloc[-1]
    said = opened.hover(STREAM, f"{last['site']} {last['token']!r}")
    assert said["bs-value"] == cell_text(last["bs_value"])
    assert said["state"] == last["site"]


@pytest.mark.parametrize("norm", ["frozen", "own"])
@pytest.mark.parametrize("versus", ["none", "0", "1"])
def test_norm_and_competitor_show_the_numbers_of_the_verbs(opened, rec, norm, versus):
    opened.choose("versus", versus)
    opened.choose("norm", norm)
    want = pd.concat([found(rec, norm), found(rec, norm, "head_source")], ignore_index=True)
    want["y"] = want["log_prob_increase"] if versus == "none" else (
        want["bs_target"] - want[f"bs_versus_{int(versus) + 1}"])  # fmt: skip
    assert opened.points(SUBVALUES) == pytest.approx(dict(zip(want["site"], want["y"], strict=True)), abs=0)
    heads = opened.table("Subvalues").locator("thead tr").first.locator("th").all_inner_texts()
    assert [one.strip() for one in heads if one.startswith("over")] == (
        [] if versus == "none" else [f"over {rec.prompt.names[int(versus) + 1]!r}"])  # fmt: skip
    sites = opened.column("Subvalues", "site")
    assert sites == want["site"].tolist()[:25]
    assert opened.column("Subvalues", "log_prob_increase") == [cell_text(x) for x in want["log_prob_increase"][:25]]
    assert set(opened.column("Subvalues", "norm")) == {norm}
    unit = opened.page.locator(f"#chart{SUBVALUES} .unit").inner_text()
    assert unit == (
        f"log_prob_increase, nats, {norm} norm"
        if versus == "none"
        else f"bs of {rec.prompt.names[7]!r} minus bs of {rec.prompt.names[int(versus) + 1]!r}, logits, frozen norm"
    )
    stream = opened.points(STREAM)
    if norm == "own":
        lens = rs.lens(rec).query("role == 'target'")
        assert [stream[f"{s} {rec.prompt.names[7]!r}"] for s in lens["site"]] == lens["log_prob"].tolist()
    assert len({name.split(" ", 1)[1] for name in stream}) == (3 if versus == "none" else 2)


def test_tables_sort_and_filter(opened, rec):
    want = pd.concat([found(rec, "frozen"), found(rec, "frozen", "head_source")], ignore_index=True)
    table = opened.table("Subvalues")
    head = table.locator("thead th", has_text="bs_target").first
    head.click()
    sync_api.expect(head).to_have_attribute("aria-sort", "ascending")
    order = want.sort_values("bs_target", kind="stable")
    assert opened.column("Subvalues", "bs_target") == [cell_text(x) for x in order["bs_target"][:25]]
    head.click()
    sync_api.expect(head).to_have_attribute("aria-sort", "descending")
    assert opened.column("Subvalues", "bs_target") == [cell_text(x) for x in order["bs_target"][::-1][:25]]
    limit = float(want["bs_target"].median())
    table.get_by_label("filter bs_target", exact=True).fill(f"> {limit:.6f}")
    table.get_by_label("filter kind").fill("neuron")
    kept = want[(want["bs_target"] > float(f"{limit:.6f}")) & (want["kind"] == "neuron")]
    assert set(opened.column("Subvalues", "site")) == set(kept["site"])
    table.get_by_label("filter norm").fill("frozen")  # a column that stands behind hidden ones
    assert set(opened.column("Subvalues", "site")) == set(kept["site"])
    opened.choose("versus", "1")  # the filters stand, also where a column comes before theirs
    assert set(opened.column("Subvalues", "site")) == set(kept["site"])
    table.get_by_label("filter kind").fill("")
    table.get_by_label("filter bs_target", exact=True).fill("")
    table.get_by_label("Search this table").fill(kept["site"].iloc[0])
    assert kept["site"].iloc[0] in opened.column("Subvalues", "site")
    assert len(opened.column("Subvalues", "site")) < 25


def test_the_keyboard_is_enough(opened, rec):
    page = opened.page
    press = page.keyboard.press

    def reach(wanted):
        for _ in range(80):
            press("Tab")
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", wanted):
                return
        raise AssertionError(wanted)

    reach("select[name=versus]")
    press("ArrowDown")
    page.wait_for_selector('html[data-shown*=\'"versus":"0"\']')
    reach("input[name=norm]")
    press("ArrowRight")
    page.wait_for_selector('html[data-shown*=\'"norm":"own"\']')
    reach(f"#walk{SUBVALUES}")
    press("ArrowRight")
    second = found(rec, "own").iloc[1]
    output = page.locator(f"#chart{SUBVALUES} output")
    assert second["site"] in output.inner_text()
    assert cell_text(second["log_prob_increase"]) in output.inner_text()
    assert page.locator(f"#walk{SUBVALUES}").get_attribute("aria-valuetext") == second["site"]
    reach("details:nth-of-type(2) summary, details summary")
    reach("th .dt-column-order, th[tabindex]")
    press("Enter")
    sync_api.expect(page.locator("th[aria-sort]").first).to_be_visible()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["recording", "effect", "validation"])
def test_both_faces_can_be_read(browser, rec, path, tmp_path, scheme, kind):
    if kind == "effect":
        path = write_report(rs.intervene(rec, rs.Zero("L1.mlp")), tmp_path / "e.html")
    if kind == "validation":
        path = write_report(fake_validation(stream=True), tmp_path / "v.html")
    watched = Watched(browser, path, color_scheme=scheme)
    background = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 150) is (scheme == "dark")
    measured = watched.page.evaluate(CONTRASTS)
    assert len(measured) > 100
    assert [one for one in measured if one[2] < 4.5] == []
    watched.need_quiet()
    watched.context.close()


def test_hostile_tokens_stay_text_everywhere(browser, tmp_path):
    rec = hostile_recording()
    effect = rs.intervene(rec, rs.Zero("L1.mlp"))
    for number, value in enumerate((rec, rs.locate(rec, k=5), effect, rs.source_graph(rec, nodes=12))):
        watched = Watched(browser, write_report(value, tmp_path / f"{number}.html"))
        page = watched.page
        for walk in page.locator("input[type=range]").element_handles():
            walk.focus()
            for _ in range(4):
                page.keyboard.press("ArrowRight")
        told = page.locator("body").inner_text()
        assert NASTY in told or ENDING in told
        assert page.locator("img, svg[onload]").count() == 0
        if value is rec:
            last = rs.stream_bs(rec).query("role == 'target'").iloc[-1]
            assert watched.hover(STREAM, f"{last['site']} {NASTY!r}")["token"] == repr(NASTY)
            watched.choose("versus", "0")
            assert repr(ENDING) in page.locator(f"#chart{SUBVALUES} .unit").inner_text()
            legend = page.locator(f"#chart{STREAM} svg .role-legend").first.text_content()
            assert NASTY[:20] in legend
            assert f"over {ENDING!r}" in page.locator("details th").all_text_contents()
        assert page.title() != "alert"
        watched.need_quiet()
        watched.context.close()


def test_what_was_put_into_the_page_later_does_not_run(browser, rec, tmp_path):
    before, _, after = report_html(rec).rpartition("</body>")
    more = "<script>document.title = 'ran'</script><img src='https://example.org/x.png'>"
    (tmp_path / "r.html").write_text(f"{before}{more}</body>{after}", encoding="utf-8")
    watched = Watched(browser, tmp_path / "r.html")
    assert watched.page.title() == "Recording"
    assert set(watched.asked) == {watched.path}
    assert len([one for one in watched.said if "Content Security Policy" in one]) >= 2
    watched.context.close()


def test_without_javascript_the_tables_are_all_there(browser, path):
    watched = Watched(browser, path, java_script_enabled=False)
    page = watched.page
    assert page.locator("figure:visible, form:visible").count() == 0
    assert page.locator("details table:visible").count() == 4
    assert page.locator("noscript").inner_text().startswith("Charts need JavaScript")
    assert page.locator("details").nth(1).locator("tbody tr").count() > 50  # under both norms
    watched.need_quiet()
    watched.context.close()


def test_a_validations_tables_are_sorted_and_filtered(browser, tmp_path):
    value = fake_validation(stream=True)
    value = replace(value, tables={**value.tables, "more": pd.DataFrame({"n": [1e-5, -2.0, 1e6, 0.5] * 8})})
    watched = Watched(browser, write_report(value, tmp_path / "v.html"))
    table = watched.page.locator("details[open] table", has=watched.page.locator("tr.fields")).first
    table.locator("thead th").first.click()
    sync_api.expect(table.locator("thead th").first).to_have_attribute("aria-sort", "ascending")
    assert table.locator("tbody td").all_inner_texts() == ["−2"] * 8 + ["1.0e-05"] * 8 + ["0.5"] * 8 + ["1.0e+06"]
    table.locator("tr.fields input").first.fill("no such text")
    sync_api.expect(table.locator("tbody")).to_have_text("no row fits")
    assert watched.page.locator("svg").count() > 4
    watched.need_quiet()
    watched.context.close()


def test_positions_and_what_was_zeroed_are_chosen(browser, rec, tmp_path):
    effect = rs.intervene(rec, rs.Zero("L1.mlp", positions="all"), at="all")
    watched = Watched(browser, write_report(effect, tmp_path / "e.html"))
    for position in ("1", "3"):
        watched.choose("position", position)
        ledger = effect.ledger(int(position)).set_index("site")["bs_change"]
        assert watched.points(1) == pytest.approx(ledger.to_dict(), abs=0)
        assert set(watched.column("Tokens", "position")) == {position}
    watched.choose("norm", "frozen")
    assert "norm_scale" not in watched.points(1)
    watched.need_quiet()
    watched.context.close()


@pytest.mark.real
def test_the_report_of_a_recording_is_written_and_opened_quickly(browser, paris, tmp_path):
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)  # processor time is then what an idle machine would take
    for _ in range(2):  # the chart library is bundled once for its version
        begun = time.process_time()
        path = write_report(paris, tmp_path / "r.html")
        seconds.append(time.process_time() - begun)
    torch.set_num_threads(threads)
    assert path.stat().st_size < 5_000_000
    assert min(seconds) <= 3.0
    assert min(Watched(browser, path).seconds for _ in range(3)) <= 2.0

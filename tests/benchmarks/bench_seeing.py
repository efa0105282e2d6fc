"""Pages and the theatre, measured in Chromium: ``make bench-seeing``.

1. The page of a recording: written (goal 3 s) and opened until its charts are drawn (goal 2 s).
2. A slider move in the theatre, from the key to the changed distribution in the page (goal 500 ms), and how many plain
   forwards that is.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import PROMPT, seconds
from playwright.sync_api import Page, expect, sync_playwright

import resid_surgery as rs

SERVE = "from resid_surgery.cli import serving; from resid_surgery.cli.main import run; run()"
CHANGED = "said => document.querySelector('[data-testid=summary]').innerText !== said"


def report(rec: rs.Recording, page: Page, repeats: int) -> None:
    """Seconds to write the page of a recording, and to open it."""
    with tempfile.TemporaryDirectory() as held:
        path = Path(held) / "page.html"
        written = [seconds(lambda: rs.write_report(rec, path)) for _ in range(repeats + 1)]

        def opened() -> None:
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready=yes]")

        took = [seconds(opened) for _ in range(repeats)]
        again, size = statistics.median(written[1:]), path.stat().st_size / 1e6
        print(
            f"page of a recording: {size:.1f} MB; written in {again:.2f} s (first {written[0]:.2f} s, goal 3); "
            f"opened in {statistics.median(took):.2f} s (goal 2)"
        )


@contextmanager
def theatre() -> Iterator[str]:
    """The command in a process of its own; its address."""
    command = [sys.executable, "-c", SERVE, "serve", "--port", "0", "--no-open"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield next(found[0] for line in process.stderr or () if (found := re.search(r"http://127\.\S+", line)))
        finally:
            process.terminate()


def slider(page: Page, url: str, forward: float, moves: int) -> None:
    """Milliseconds from a key on a slider until the page shows another distribution."""
    page.goto(url)
    page.get_by_label("Prompt, ending").fill(PROMPT.text)
    page.get_by_label("Target token").fill(str(PROMPT.target))
    page.get_by_role("button", name="Read").click()
    rows = page.get_by_test_id("subvalues").locator("tbody tr")
    expect(rows).to_have_count(10)
    page.get_by_role("button", name=re.compile("^operate on ")).first.click()
    knob = page.get_by_role("slider").first
    took = []
    for i in range(moves + 2):
        expect(page.get_by_text(re.compile("^answered in"))).to_be_visible()
        time.sleep(4)  # until the continuation is there, too
        said = page.get_by_test_id("summary").inner_text()
        start = time.perf_counter()
        knob.press("ArrowLeft" if i % 2 else "ArrowRight")
        page.wait_for_function(CHANGED, arg=said, polling=5)
        took.append(time.perf_counter() - start)
    took = sorted(took[2:])
    print(
        f"a slider move: median {1000 * statistics.median(took):.0f} ms, worst of {moves} {1000 * took[-1]:.0f} ms "
        f"(goal 500), {statistics.median(took) / forward:.1f} plain forwards"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("no Chromium is found: install Debian's package chromium")
    model = rs.load("smollm2-135m")
    rec, ids = rs.record(model, PROMPT), torch.tensor([rs.record(model, PROMPT).prompt.ids])
    with torch.no_grad():
        forward = statistics.median(seconds(lambda: model.module(input_ids=ids)) for _ in range(10))
    print(f"{torch.get_num_threads()} threads; a plain forward {1000 * forward:.0f} ms")
    with sync_playwright() as play:
        browser: Any = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        report(rec, browser.new_page(), given.repeats)
        with theatre() as url:
            page = browser.new_page()
            page.set_default_timeout(60_000)
            slider(page, url, forward, given.moves)
        browser.close()


if __name__ == "__main__":
    main()

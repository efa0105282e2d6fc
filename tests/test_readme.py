"""What the README shows is what the code does."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import resid_surgery as rs

README = (Path(__file__).parent.parent / "README.md").read_text()
NUMBER = re.compile(r"-?\d+\.\d+")


def block(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", README, re.S)
    assert found, mark
    return found[1]


@pytest.mark.real
def test_the_examples_output_is_real(smollm2):
    code, out = block("example"), io.StringIO()
    assert len(code.splitlines()) <= 12
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    shown, printed = block("output").split(), out.getvalue().split()
    assert len(shown) == len(printed)
    for a, b in zip(shown, printed, strict=True):
        if NUMBER.fullmatch(a):
            assert float(b) == pytest.approx(float(a), abs=0.01)
        else:
            assert a == b


def test_the_benchmark_was_pasted_in():
    assert "exact top-100 / plain forward" in block("bench")
    assert "one nnsight trace each / sweep" in block("bench-surgery")
    assert "exhaustive pass / worst 100" in block("bench-locating")
    assert "verified by cutting 50 edges" in block("bench-sources")
    assert "a whole MLP zeroed" in block("bench-validating")
    assert "200 SIGKILLs" in block("bench-experiments")


def test_the_plan_can_be_run(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(block("plan"))
    plan, beside = rs.read_plan(file)
    assert plan.cells == {"located": 2, "random": 6}
    assert beside == {"model": "smollm2-135m", "prompts": {"facts": ["capital", "language"], "limit": 20}}


def test_every_score_stands_in_the_tables():
    found = re.search(r"<!-- scores -->\n(.*?)\n\n", README, re.S)
    assert found
    rows = {line.split("|")[1].strip().strip("`"): line.split("|")[2:-1] for line in found[1].splitlines()[2:]}
    for name in rs.describe_scores()["score"]:
        assert f"`{name}`" in README
        cells = rows[name]
        assert cells
        for cell in cells:  # every mean stands within its interval
            mean, low, high = (float(one) for one in re.findall(r"-?\d+\.\d+", cell))
            assert low <= mean <= high
    assert {"ten at random", "nothing zeroed"} < set(rows)


@pytest.mark.parametrize(
    "name",
    [
        "operate",
        "decompose",
        "locate",
        "locate-many",
        "scores",
        "sources",
        "graph",
        "blame",
        "sweep",
        "check",
        "check --all-families",
        "run",
        "status",
        "resume",
        "recipe",
        "serve",
    ],
)
def test_every_command_is_named(name):
    assert f"`{name}" in README or f"resid-surgery {name}" in README

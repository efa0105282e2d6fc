"""What the README shows is what the code does."""

import contextlib
import io
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "name", ["operate", "decompose", "locate", "sources", "sweep", "check", "check --all-families"]
)
def test_every_command_is_named(name):
    assert f"`{name}" in README or f"resid-surgery {name}" in README

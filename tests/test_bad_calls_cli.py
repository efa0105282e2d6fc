"""Nasty values for every option and argument of every command: one line and exit code 2, or the command works."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_cli
import typer
from fake_validation import fake_validation
from test_bad_calls_sweep import some_of
from test_cli import Cli, Done
from validation_cases import SMALL, a_row, opened, probes, some

import resid_surgery as rs
from resid_surgery.cli import main
from resid_surgery.cli.common import app
from resid_surgery.editing import budgets

cli = test_cli.cli
TEXT = "The capital of France is"
ASKED = [TEXT, "--target", " Paris", "--versus", " Rome"]
NASTY = {
    "empty": "", "word": "banana", "minus one": "-1", "huge": "9" * 30, "NaN": "nan", "too large": "1e999",
    "long": "a" * 5_000, "lines": "a\nb\r\nc", "no text": "\udcff", "markup": "[bold]x[/bold]", "far": "L9.N9",
    "home": "~nobody-here/x",
}  # fmt: skip
IN_EARNEST = ("word", "huge", "no text", "far")
PLAIN = {"out", "rows", "seed", "model", "dtype", "device", "junit", "html", "markdown", "report", "save_every"}
"""Options that commands share, and files that they write: tried before a model is opened only."""


@cache
def model() -> Any:
    """The model that every command works on."""
    return opened("llama")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands read, made once."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cases.jsonl").write_text(json.dumps({"text": TEXT, "target": " Paris", "versus": [" Rome"]}) + "\n")
    (folder / "corpus.txt").write_text(some(20, 21, 22, 23) + "\n")
    (folder / "plan.json").write_text(json.dumps({"intervene": {"kind": "Zero", "sites": "L1.mlp"}}))
    (folder / "policy.json").write_text("{}")
    (folder / "recipe.py").write_text(
        'import pandas as pd\n\n\ndef main(model, *, times: int = 1, share: float = 0.5, name: str = "a"):\n'
        '    return {"given": pd.DataFrame({"times": [times], "share": [share], "name": [name]})}\n'
    )
    rs.save_probes(folder / "probes.jsonl", probes())
    a_row(model(), 0.5).save(folder / "edit.safetensors")
    for seed, name in enumerate(("before", "after")):
        fake_validation(token="plain", seed=seed).save(folder / f"{name}.json")
    rs.run(model(), rs.read_cases(folder / "cases.jsonl"), rs.read_plan(folder / "plan.json")[0], out=folder / "run",
           progress=False)  # fmt: skip
    return folder


def good(folder: Path, own: Path) -> dict[str, list[Any]]:
    """One good line of every command: it reads in one folder, and writes in another."""
    edit = [model().name, folder / "edit.safetensors"]
    return {
        "operate": [*ASKED, "-k", 1],
        "decompose": ASKED,
        "recipe": [folder / "recipe.py"],
        "run": [folder / "plan.json", "--out", own / "run", "--prompts", folder / "cases.jsonl"],
        "status": [folder / "run"],
        "resume": [folder / "run", "--model", "tiny"],
        "locate": [*ASKED, "-k", 2],
        "locate-many": ["--prompts", folder / "cases.jsonl", "-k", 2],
        "scores": [*ASKED, "--kind", "layer"],
        "serve": ["--no-open"],
        "sources": [*ASKED, "--reader", "L1.H1"],
        "graph": [*ASKED, "--nodes", 4, "--verify", 1],
        "blame": [TEXT, "--wrong", " Paris", "--right", " Rome", "--limit", 1],
        "edit": ["The capital of {} is", "--subject", "France", "--new", " Rome", "--old", " Paris", "--method",
                 "value-rows", "-k", 1],
        "validate": [*edit, "--probes", folder / "probes.jsonl", "--no-general"],
        "exposure": [*edit, folder / "corpus.txt"],
        "diff": [folder / "before.json", folder / "after.json"],
        "sweep": [*ASKED, "--site", "L1.H*"],
        "check": [],
    }  # fmt: skip


@cache
def click_app() -> Any:
    """The app as click has it."""
    return typer.main.get_command(app)


def commands() -> dict[str, Any]:
    return click_app().commands  # type: ignore[no-any-return]


def fields(command: str) -> list[Any]:
    """The options and arguments of a command that take a value."""
    return [one for one in commands()[command].params if not getattr(one, "is_flag", False) and one.name != "help"]


def with_value(line: list[Any], one: Any, value: str, number: int) -> list[Any]:
    """A command's line with another value for one option, or for its argument of that number."""
    if one.param_type_name == "argument":
        at = number if number < len(line) and not str(line[number]).startswith("-") else 0
        return [*line[:at], value, *line[at + 1 :]] if line else [value]
    flag = next((name for name in one.opts if name in line), None)
    if flag is None or getattr(one, "multiple", False):
        return [*line, f"{one.opts[0]}={value}" if one.opts[0].startswith("--") else f"{one.opts[0]}{value}"]
    at = line.index(flag)
    return [*line[: at + 1], value, *line[at + 2 :]]


def sensible(done: Done) -> bool:
    """Whether a command worked, or said in one line why not."""
    if done.code in (0, 1, 3):
        return "Traceback" not in done.err
    lines = done.err.splitlines()
    return done.code == 2 and len(lines) == 1 and lines[0].startswith("resid-surgery: ") and len(lines[0]) < 600


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smoke budget, but for a tiny model; a cache and a working directory of its own."""
    monkeypatch.setitem(budgets.BUDGETS, "smoke", SMALL)
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


class Reached(rs.LoadError):
    """The command would now open its model."""


@pytest.fixture(autouse=True)
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app as commands, which typer would make anew for every line."""
    monkeypatch.setattr(main, "app", click_app())


REACHED = "the model would be opened now"


def refuse(*_: Any, **__: Any) -> Any:
    raise rs.LoadError(REACHED)


def test_every_command_has_a_good_line() -> None:
    assert set(good(Path(), Path())) == set(commands())


@pytest.mark.parametrize("command", test_cli.COMMANDS)
def test_a_nasty_value_is_refused_in_one_line_or_taken(
    cli: Cli, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Before a model is opened; what is not looked at until then, with one."""
    odd = {}
    for number, one in enumerate(fields(command)):
        for name in some_of(NASTY, f"{command} {one.name}", 3):
            line = with_value(good(there, tmp_path)[command], one, NASTY[name], number)
            monkeypatch.setattr(rs, "load", refuse)
            done = cli(command, *line)
            if REACHED in done.err and name in IN_EARNEST and one.name not in PLAIN and command != "serve":
                monkeypatch.setattr(rs, "load", lambda *_, **__: model())
                done = cli(command, *line)
            if not sensible(done):
                odd[one.name, name] = done
    assert odd == {}


@pytest.mark.parametrize("command", sorted(set(test_cli.COMMANDS) - {"serve"}))
def test_the_good_line_is_good(
    cli: Cli, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(rs, "load", lambda *_, **__: model())
    done = cli(command, *good(there, tmp_path)[command])
    assert done.code in ((0, 1, 3) if command in ("validate", "blame", "check") else (0,)), done.err


def test_a_line_that_is_no_answer_is_seen() -> None:
    good_line = Done(2, "", "resid-surgery: `--k` must be y.\n")
    assert sensible(good_line)
    assert sensible(Done(0, "x", ""))
    for code, err in ((2, "x\n"), (2, "resid-surgery: a\nresid-surgery: b\n"), (2, ""), (0, "Traceback (most"),
                      (2, "resid-surgery: " + "a" * 600), (5, "resid-surgery: a\n")):  # fmt: skip
        assert not sensible(Done(code, "", err))

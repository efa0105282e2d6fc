"""The commands that run plans: what they write and say, and one line when they cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import test_cli
from test_cli import Cli, one_line
from test_prompts import TEXT

import resid_surgery as rs

cli, model = test_cli.cli, test_cli.model
PLAN = {
    "axes": {"k": [1, 2]},
    "locate": {"best": {"kind": "neuron", "k": "$k"}},
    "intervene": {
        "located": [{"kind": "Zero", "sites": "$best"}],
        "heads": [{"kind": "Zero", "sites": "L*.H*", "each": True}],
    },
}
LINES = [{"text": TEXT, "target": " Paris", "versus": [" London"], "fact": "capital"},
         {"text": TEXT.replace("France", "word20"), "target": " Lyon", "fact": "other"},
         {"text": "The", "target": 9, "versus": [" Paris", 3], "fact": "other"}]  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path, model: Path) -> Path:
    """A plan's file that names its model and its prompts' file, which lies beside it."""
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    return write(tmp_path / "plan.json", PLAN | {"model": str(model), "prompts": "facts.jsonl"})


def write(path: Path, body: Any) -> Path:
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def test_run_carries_a_plan_out_and_says_how_far_it_is(cli: Cli, plan: Path, tmp_path: Path) -> None:
    done = cli("run", plan, "--out", tmp_path / "out", "--json")
    assert done.code == 0
    said = done.json()["status"]
    assert (said["prompts"], said["done"], said["failed"], said["left"]) == (3, 3, 0, 0)
    assert said["finished"] is True
    opened = rs.load(rs.open_run(tmp_path / "out").manifest["origin"]["model"])
    again = rs.run(opened, rs.read_cases(tmp_path / "facts.jsonl"), PLAN, out=tmp_path / "by hand")
    pd.testing.assert_frame_equal(rs.read_run(tmp_path / "out"), again.rows)
    assert said["rows"] == len(again.rows)
    shown = cli("status", tmp_path / "out").out
    assert "3 of 3 prompts done" in shown
    assert "nobody" in shown


def test_a_second_run_does_nothing_and_no_resume_refuses(cli: Cli, plan: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert cli("run", plan, "--out", tmp_path / "out").code == 0
    assert len(rs.open_run(tmp_path / "out").manifest["sessions"]) == 2
    done = cli("run", plan, "--out", tmp_path / "out", "--no-resume")
    assert done.code == 1
    assert "holds a run already" in done.err
    other = write(plan.with_name("other.json"), json.loads(plan.read_text()) | {"axes": {"k": [1, 3]}})
    done = cli("run", other, "--out", tmp_path / "out")
    assert done.code == 1
    assert "plan.axes.k: [1, 2] there, [1, 3] now" in done.err


def test_limit_and_prompts_of_the_command_line_come_first(cli: Cli, plan: Path, tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", LINES[1])
    assert cli("run", plan, "--out", tmp_path / "a", "--limit", 2).code == 0
    assert cli("run", plan, "--out", tmp_path / "b", "--prompts", tmp_path / "one.jsonl").code == 0
    assert [len(rs.read_run(tmp_path / name, table="prompts")) for name in "ab"] == [2, 1]


def test_status_summarises_by_group(cli: Cli, plan: Path, tmp_path: Path) -> None:
    cli("run", plan, "--out", tmp_path / "out")
    done = cli("status", tmp_path / "out", "--by", "arm", "--by", "k", "--value", "kl", "--json")
    run = rs.open_run(tmp_path / "out")
    assert done.json()["rows"] == json.loads(
        run.summary(["arm", "k"], "kl").to_json(orient="records", double_precision=15)
    )
    done = cli("status", tmp_path / "out", "--by", "arm", "--by", "k", "--against", "k=1", "--json")
    wanted = run.summary(["arm", "k"], against={"k": 1})
    assert done.json()["rows"] == json.loads(wanted.to_json(orient="records", double_precision=15))
    assert wanted["difference"].notna().tolist() == [True, True, False]


def test_failures_are_shown_and_run_again(cli: Cli, plan: Path, tmp_path: Path) -> None:
    bad = {"text": TEXT, "target": " Paris London", "fact": "bad"}
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, [*LINES, bad])), encoding="utf-8")
    assert cli("run", plan, "--out", tmp_path / "out", "--max-failures", 1).code == 0
    (row,) = cli("status", tmp_path / "out", "--failures", "--json").json()["rows"]
    assert (row["prompt"], row["stage"], row["error"]) == (3, "prompt", "PromptError")
    assert "' Paris London' is 2" in row["message"]
    assert "PromptError" in cli("status", tmp_path / "out", "--failures").out
    assert cli("resume", tmp_path / "out", "--retry", "--max-failures", "none").code == 0
    assert len(rs.open_run(tmp_path / "out").failures) == 1
    done = cli("run", plan, "--out", tmp_path / "other", "--max-failures", 0)
    assert done.code == 1
    assert "1 of 1 prompts failed, more than the 0" in done.err


def test_resume_needs_nothing_but_the_folder(cli: Cli, plan: Path, tmp_path: Path) -> None:
    cli("run", plan, "--out", tmp_path / "out")
    whole = rs.read_run(tmp_path / "out")
    for table in ("rows", "located", "prompts"):
        for file in (tmp_path / "out" / table).iterdir():
            file.unlink()
    assert rs.read_run(tmp_path / "out").empty
    assert cli("resume", tmp_path / "out").code == 0
    pd.testing.assert_frame_equal(rs.read_run(tmp_path / "out"), whole)


def test_ctrl_c_says_how_to_go_on(plan: Path, tmp_path: Path) -> None:
    many = [LINES[0] | {"text": f"{TEXT} word{n}"} for n in range(20, 60)] * 50
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
    script = "from resid_surgery.cli.main import run; run()"
    command = [sys.executable, "-c", script, "run", str(plan), "--out", str(tmp_path / "out"), "--save-every", "0.2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    begun = tmp_path / "out" / "prompts" / "s000001.parquet"
    for _ in range(600):
        if begun.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10  # seconds; a second on an idle machine
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert line.startswith("resid-surgery: stopped: ")
    assert f"resid-surgery resume {tmp_path / 'out'}" in line
    assert 0 < len(rs.read_run(tmp_path / "out", table="prompts")) < len(many)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--facts", "capital", "--prompts", "x.jsonl"], "either `--facts` or `--prompts`"),
        (["--workers", 2], "go with `--executor ray`"),
        (["--num-gpus", 1], "go with `--executor ray`"),
        (["--max-failures", "many"], "`--max-failures` must be a number, a share in 0..1, or none; got 'many'"),
        (["--facts", "captial"], "captial"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_opened(
    cli: Cli, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], fault: str
) -> None:
    monkeypatch.setattr(rs, "load", lambda *_, **__: pytest.fail("the model was opened first"))
    assert fault in one_line(cli("run", plan, "--out", tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("{", "is no JSON"),
        ("[]", "is no plan: a JSON object is wanted"),
        (json.dumps({"intervene": [{"kind": "Zreo", "sites": "L0.mlp"}]}), "Did you mean 'Zero'"),
        (json.dumps(PLAN), "prompts must be given"),
        (json.dumps(PLAN | {"prompts": "nowhere.jsonl"}), "nowhere.jsonl"),
    ],
)
def test_a_bad_plan_is_refused(cli: Cli, tmp_path: Path, body: str, fault: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(body, encoding="utf-8")
    assert fault in one_line(cli("run", file, "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--against", "k=1"], "`--against` goes with `--by`"),
        (["--by", "arm", "--failures"], "do not go together"),
        (["--by", "arm", "--against", "k"], "COLUMN=VALUE"),
        (["--by", "k", "--against", "k=one"], "of type int64"),
        (["--by", "amr"], "Did you mean 'arm'"),
        (["--by", "arm", "--value", "kll"], "Did you mean 'kl'"),
    ],
)
def test_bad_questions_about_a_run_are_refused(
    cli: Cli, plan: Path, tmp_path: Path, options: list[Any], fault: str
) -> None:
    cli("run", plan, "--out", tmp_path / "out")
    assert fault in one_line(cli("status", tmp_path / "out", *options))


@pytest.mark.parametrize("command", ["status", "resume"])
def test_a_folder_without_a_run_is_refused(cli: Cli, tmp_path: Path, command: str) -> None:
    assert "holds no run" in one_line(cli(command, tmp_path))

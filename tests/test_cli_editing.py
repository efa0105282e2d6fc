"""The commands edit, validate, exposure and diff: files, words and exit codes."""

import html
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import test_cli
import validation_cases
from test_cli import Cli, Done, one_line
from validation_cases import SMALL, opened, probes, sharp, some, words

import resid_surgery as rs
from resid_surgery.editing import budgets, keys

cli, own_cache = test_cli.cli, validation_cases.own_cache


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    sharp().save_pretrained(folder)  # type: ignore[operator]
    words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An edit, an edited checkpoint, probes and a corpus."""
    folder = tmp_path_factory.mktemp("edits")
    model = rs.load(base)
    edit = rs.edit_coefficients(model, "L1.N0:20", 0.0)
    edit.save(folder / "edit.safetensors")
    with edit.applied(model) as edited:
        edited.module.save_pretrained(folder / "edited")
    words().save_pretrained(folder / "edited")
    rs.save_probes(folder / "probes.jsonl", rs.ProbeSet(tuple(probes()), "mine"))
    (folder / "corpus.txt").write_text("\n".join(some(*range(20 + i, 30 + i)) for i in range(5)))
    return {"edit": folder / "edit.safetensors", "edited": folder / "edited", "probes": folder / "probes.jsonl",
            "corpus": folder / "corpus.txt"}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke budget, but for a tiny model."""
    monkeypatch.setitem(budgets.BUDGETS, "smoke", SMALL)


def limits(path: Path, *, by: float) -> Path:
    """A policy under which every gate passes (by = inf), or every divergence fails (by = 0)."""
    high = {name: [1e9, 1e9] if by else [0.0, 0.0] for name in
            ("kl: neighbourhood", "kl: edit prepended", "kl: unrelated text", "perplexity drift")}  # fmt: skip
    low = {"capability margin": [-1e9, -1e9], "cast cosine": [-1.0, -1.0], "efficacy / random control": [-1e9, -1e9],
           "efficacy: new above old": [0.0, 0.0], "efficacy: free decoding": [0.0, 0.0],
           "paraphrase: new above old": [0.0, 0.0], "retention": [0.0, 0.0]}  # fmt: skip
    path.write_text(json.dumps(high | (low | {"top-1 flips: unrelated text": [1.0, 1.0]} if by else {})))
    return path


def asked(files: dict[str, Path], base: Path, *more: Any, edited: str = "edit") -> list[Any]:
    return ["validate", base, files[edited], "--probes", files["probes"], "--no-general", *more]


def test_exit_codes_are_0_1_3_for_pass_fail_and_inconclusive(
    cli: Cli, base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    done = cli(*asked(files, base, "--policy", limits(tmp_path / "all.json", by=1.0)))
    assert done.code == 3, "intervals of few texts reach to infinity"
    assert "INCONCLUSIVE:" in done.out
    some_texts = [p for p in probes(unrelated=0, texts=0, choices=0) if p.axis == "efficacy"]
    rs.save_probes(tmp_path / "one.jsonl", rs.ProbeSet(tuple(some_texts), "one"))
    only = ["validate", base, files["edit"], "--probes", tmp_path / "one.jsonl", "--no-general"]
    passed = cli(*only, "--policy", limits(tmp_path / "all.json", by=1.0))
    assert passed.code == 0
    assert "Validation(PASS" in passed.out
    failed = cli(*asked(files, base, "--policy", limits(tmp_path / "none.json", by=0.0), "--json"))
    assert failed.code == 1
    report = failed.json()
    assert report["verdict"] == "FAIL"


def test_every_form_of_the_report_is_written_and_agrees(
    cli: Cli, base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    out = {name: tmp_path / f"report.{end}" for name, end in
           (("junit", "xml"), ("html", "html"), ("markdown", "md"), ("report", "json"))}  # fmt: skip
    flags = [part for name, path in out.items() for part in (f"--{name}", path)]
    done = cli(*asked(files, base, *flags))
    held = rs.Validation.from_json(out["report"])
    assert done.code == held.exit_code in (1, 3)
    for path in out.values():
        assert f"wrote {path}" in done.out.replace("\n", "")
    tree = ET.parse(out["junit"]).getroot()
    cases = [case for case in tree.iter("testcase") if case.get("name") in set(held.gates["gate"])]
    assert len(cases) == len(held.gates)
    assert sum(case.find("failure") is not None for case in cases) == (held.gates["state"] == "FAIL").sum()
    assert held.verdict in out["markdown"].read_text()
    page = out["html"].read_text()
    assert held.verdict in page
    assert "default-src 'none'" in html.unescape(page), "it loads nothing"
    assert not re.search(r"""(src|href|action)\s*=\s*["']?https?:""", page)
    for name in held.gates["gate"]:
        assert name in out["markdown"].read_text()
        assert name in page
    direct = rs.validate(
        rs.load(base), rs.Edit.load(files["edit"]), probes(), budget=SMALL, general=False, progress=False
    )
    pd.testing.assert_frame_equal(direct.gates, held.gates)


def test_an_edited_checkpoint_gives_what_the_edit_gives(
    cli: Cli, base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    codes = [cli(*asked(files, base, "--report", tmp_path / f"{name}.json", edited=name)).code
             for name in ("edit", "edited")]  # fmt: skip
    one, other = (rs.Validation.from_json(tmp_path / f"{name}.json") for name in ("edit", "edited"))
    assert codes == [one.exit_code, other.exit_code]
    assert codes[0] == codes[1]
    # a difference of checkpoints is not known to be a scaling, so its random sites are other ones
    values = [v.gates.set_index("gate")["value"].drop("efficacy / random control") for v in (one, other)]
    assert values[0].to_dict() == pytest.approx(values[1].to_dict(), rel=1e-3, abs=1e-6)
    same = cli("diff", tmp_path / "edit.json", tmp_path / "edited.json", "--json")
    assert same.code == 0
    assert same.json()


def test_an_edit_that_changes_no_weight_is_refused_with_exit_code_2(cli: Cli, base: Path, tmp_path: Path) -> None:
    line = one_line(cli("validate", base, base))
    assert "no weight differs" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--budget", "large"], "`budget` must be one of smoke"),
        (["--junit", "/nowhere/at/all/out.xml"], "must be a file in a folder that exists"),
        (["--policy", "CORPUS"], "must be JSON, gate -> [warn, fail]"),
        (["--probes", "nothing.json"], "nothing.json"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_2(
    cli: Cli, base: Path, files: dict[str, Path], args: list[str], said: str
) -> None:
    given = [str(files["corpus"]) if one == "CORPUS" else one for one in args]
    assert said in one_line(cli(*asked(files, base, *given)))


def test_an_edit_of_another_model_is_refused(cli: Cli, files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    sharp("gpt2").save_pretrained(other)  # type: ignore[operator]
    words().save_pretrained(other)
    assert "does not have" in one_line(cli("validate", other, files["edit"]))


def test_diff_is_refused_where_the_reports_asked_different_things(
    cli: Cli, base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    few = [p for p in probes() if p.axis != "choice"]
    rs.save_probes(tmp_path / "few.jsonl", rs.ProbeSet(tuple(few), "few"))
    cli(*asked(files, base, "--report", tmp_path / "a.json"))
    cli("validate", base, files["edit"], "--probes", tmp_path / "few.jsonl", "--no-general", "--report",
        tmp_path / "b.json")  # fmt: skip
    assert one_line(cli("diff", tmp_path / "a.json", tmp_path / "b.json"))
    both = cli("diff", tmp_path / "a.json", tmp_path / "a.json")
    assert both.code == 0
    assert "kl: unrelated text" in both.out


@pytest.mark.parametrize("method", ["value-rows", "coefficients", "rank-one"])
def test_edit_writes_a_file_that_validate_takes(
    cli: Cli, base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "SENTENCES", [some(60 + i, 70 + i) for i in range(20)])  # in known words
    path = tmp_path / "made.safetensors"
    args: list[Any] = ["edit", "The capital of {} is", "--subject", "France", "--new", " Rome", "--old", " Paris",
                       "--method", method, "--out", path, "--model", base]  # fmt: skip
    args += ["--layer", 1, "--steps", 2] if method == "rank-one" else ["--site", "L1.N3"]
    done: Done = cli(*args)
    assert done.code == 0, done.err
    made = rs.Edit.load(path)
    assert [one.new for one in made.rewrites] == [" Rome"]
    rs.save_probes(tmp_path / "probes.jsonl", rs.ProbeSet(tuple(probes()), "mine"))
    judged = cli("validate", base, path, "--probes", tmp_path / "probes.jsonl", "--no-general", "--json")
    assert judged.code in (1, 3)
    assert judged.json()["manifest"]["edit_hash"] == made.hash


def test_exposure_ranks_the_lines_of_a_file(cli: Cli, base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "exposure.csv"
    done = cli("exposure", base, files["edit"], files["corpus"], "--top", 7, "--out", out)
    assert done.code == 0
    table = pd.read_csv(out)
    assert len(table) == 7
    assert table["exposure"].is_monotonic_decreasing
    model = opened()
    lines = files["corpus"].read_text().splitlines()
    direct = rs.exposure(rs.load(base), rs.Edit.load(files["edit"]), lines, progress=False)
    assert table["exposure"].tolist() == pytest.approx(direct["exposure"].nlargest(7).tolist(), rel=1e-6)
    assert model.fingerprint()

"""The commands that score and locate: what they print and write, and one line and exit code 2 when they cannot."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import test_cli
from test_cli import Cli, one_line, same
from test_prompts import TEXT

import resid_surgery as rs

cli, model, rec, asked = test_cli.cli, test_cli.model, test_cli.rec, test_cli.asked
ITALY = TEXT.replace("France", "word20")
LINES = [{"text": TEXT, "target": " Paris", "versus": [" London"]}, {"text": ITALY, "target": " Lyon"},
         {"text": "The", "target": 9, "versus": [" Paris", 3]}]  # fmt: skip


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of three prompts, and an empty line."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps(one) for one in LINES) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a model is a failure."""
    monkeypatch.setattr(rs, "load", lambda *_, **__: pytest.fail("the model was opened first"))


# --- locate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [(["--score", "contrast"], {"score": "contrast"}),
     (["--score", "target_rank", "--kind", "attn_neuron", "-k", 3],
      {"score": "target_rank", "kind": "attn_neuron", "k": 3}),
     (["--score", "leave_one_out", "--worst", "--norm", "own"],
      {"score": "leave_one_out", "worst": True, "norm": "own"})],
    ids=str,
)  # fmt: skip
def test_locate_takes_any_score(cli: Cli, asked: list[Any], rec: Any, options: list[Any], arguments: Any) -> None:
    found = rs.locate(rec, **arguments)
    done = cli("locate", *asked, *options, "--json")
    assert (done.code, done.err) == (0, "")
    body = done.json()
    same(body["rows"], found.table)
    assert (body["score"], body["proof"], body["candidates"]) == (found.score, found.proof, found.candidates)
    assert body["versus"] == [" London"]
    assert repr(found) in cli("locate", *asked, *options).out


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [([], {}), (["--score", "all", "--kind", "head"], {"score": "all", "kind": "head"}),
     (["--score", "contrast", "--score", "bs_target"], {"score": ["contrast", "bs_target"]}),
     (["--norm", "own", "--layer", "2", "--layer", "0"], {"norm": "own", "layers": [2, 0]}),
     (["--bounds"], {"bounds": True}),
     (["--bounds", "--score", "all", "--kind", "layer"], {"bounds": True, "score": "all", "kind": "layer"})],
    ids=str,
)  # fmt: skip
def test_scores_prints_what_the_verb_gives(
    cli: Cli, asked: list[Any], rec: Any, options: list[str], arguments: Any
) -> None:
    table = rs.scores(rec, **arguments)
    done = cli("scores", *asked, *options, "--json")
    assert (done.code, done.err) == (0, "")
    body = done.json()
    assert set(body) == {"schema", "tokens", "position", "target", "versus", "rows"}
    assert (body["schema"], body["target"], body["versus"]) == (1, " Paris", [" London"])
    same(body["rows"], table)
    out = cli("scores", *asked, *options).out
    assert out.startswith(f"tokens: 0:'The'  1:' capital'  2:' of'  3:' France'  4:' is'\n{len(table)} rows\n")
    shown = [line.split()[0] for line in out.splitlines()[3:] if line.startswith("L")]
    assert shown == table["site"].head(40).tolist()


def test_scores_counts_what_helps_and_what_harms(cli: Cli, asked: list[Any], rec: Any) -> None:
    done = cli("scores", *asked, "--count", "--kind", "head_source", "--score", "leave_one_out", "--json")
    assert (done.code, done.err) == (0, "")
    same(done.json()["rows"], rs.counts(rec, kind="head_source", score="leave_one_out"))
    assert "3 rows" in cli("scores", *asked, "--count").out


def test_scores_lists_every_score_without_a_prompt_or_a_model(cli: Cli, unopened: None) -> None:
    table = rs.describe_scores()
    done = cli("scores", "--list", "--json")
    assert (done.code, done.err) == (0, "")
    assert set(done.json()) == {"schema", "rows"}
    same(done.json()["rows"], table)
    shown = cli("scores", "--list").out
    assert [line.split()[0] for line in shown.splitlines()[2:]] == table["score"].tolist()
    assert all(formula in shown for formula in table["formula"])


def test_scores_sorts_and_writes_the_largest_first(cli: Cli, asked: list[Any], rec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    done = cli("scores", *asked, "--sort", "log_prob_increase", "--out", folder, "--rows", 3, "--json")
    assert (done.code, done.err) == (0, "")
    wanted = rs.scores(rec).sort_values("log_prob_increase", ascending=False, ignore_index=True)
    same(done.json()["rows"], wanted)
    assert done.json()["files"] == [str(folder / "scores.csv")]
    assert [path.name for path in folder.iterdir()] == ["scores.csv"]
    same(pd.read_csv(folder / "scores.csv").to_dict("list"), wanted)
    out = cli("scores", *asked, "--sort", "log_prob_increase", "--out", folder, "--rows", 3).out
    assert [line.split()[0] for line in out.splitlines()[3:6]] == wanted["site"].head(3).tolist()
    assert "117 more rows" in out
    assert out.endswith(f"wrote {folder / 'scores.csv'}\n")


# --- locate-many --------------------------------------------------------------------------------


def prompts() -> list[rs.Prompt]:
    return [rs.Prompt(one["text"], target=one["target"], versus=one.get("versus", ())) for one in LINES]


def test_locate_many_takes_prompts_from_a_file(cli: Cli, model: Path, rec: Any, lines: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--kind", "head", "--norm", "own", "--worst", "--layer", 1]
    done = cli("locate-many", "--prompts", lines, "--model", model, "-k", 2, *options, "--out", out, "--json")
    assert (done.code, done.err) == (0, "")
    table = rs.locate_many(rec.model, prompts(), k=2, kind="head", norm="own", worst=True, layers=[1])
    body = done.json()
    same(body["rows"], table)
    assert (body["prompts"], body["score"], body["kind"]) == (3, "log_prob_increase", "head")
    assert body["files"] == [str(out / "located.csv")]
    same(pd.read_csv(out / "located.csv").to_dict("list"), table)
    few = cli("locate-many", "--prompts", lines, "--model", model, "-k", 2, "--limit", 2, "--score", "coefficient").out
    assert few.startswith("2 prompts\n")
    sites = rs.locate_many(rec.model, prompts()[:2], k=2, score="coefficient")["site"]
    assert all(f" {site} " in few for site in sites)


BAD_LINES = {
    "no JSON": "{text}",
    "a list": "[1, 2]",
    "a number": "7",
    "no target": '{"text": "The"}',
    "no text": '{"target": " Paris"}',
    "a text that is a number": '{"text": 3, "target": " Paris"}',
    "competitors that are no tokens": '{"text": "The", "target": " Paris", "versus": 3.5}',
    "half a line": '{"text": "The", "tar',
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(cli: Cli, unopened: None, lines: Path, fault: str) -> None:
    lines.write_text(lines.read_text() + "\n" + BAD_LINES[fault] + "\n" + json.dumps(LINES[0]))
    line = one_line(cli("locate-many", "--prompts", lines))
    assert f'line 7 of {lines} must be {{"text": ..., "target": ...}}' in line


def test_a_prompt_that_the_model_cannot_take_is_named(cli: Cli, model: Path, lines: Path) -> None:
    options = ["--prompts", lines, "--model", model]
    assert "needs competitors" in one_line(cli("locate-many", *options, "--score", "contrast"))
    lines.write_text(lines.read_text() + json.dumps({"text": TEXT, "target": " Paris Lyon"}))
    assert "prompt 3: `target` must be one token" in one_line(cli("locate-many", *options))
    lines.write_text("\n")
    assert "has no prompt in it" in one_line(cli("locate-many", *options))


@pytest.mark.usefixtures("unopened")
def test_a_file_of_prompts_that_cannot_be_read_gives_one_line(cli: Cli, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in one_line(cli("locate-many", "--prompts", tmp_path / "nowhere.jsonl"))
    assert str(tmp_path) in one_line(cli("locate-many", "--prompts", tmp_path))


@pytest.mark.usefixtures("unopened")
def test_a_file_of_prompts_that_is_no_text_gives_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "it.jsonl" in one_line(cli("locate-many", "--prompts", tmp_path / "it.jsonl"))


def test_a_line_ends_only_where_json_lines_end(cli: Cli, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "it.jsonl"
    file.write_text(json.dumps({"text": "The\u2028word20", "target": " Paris"}, ensure_ascii=False), encoding="utf-8")
    done = cli("locate-many", "--prompts", file, "--model", model, "-k", 1, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json()["rows"][0]["text"] == "The\u2028word20"


@pytest.mark.real
def test_locate_many_takes_facts_that_the_model_knows(cli: Cli, smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rs, "load", lambda *_, **__: smollm2)
    done = cli("locate-many", "--facts", "month", "--limit", 2, "-k", 2, "--json")
    assert (done.code, done.err) == (0, "")
    known = rs.facts("month", model=smollm2)[:2]
    assert done.json()["prompts"] == 2
    same(done.json()["rows"], rs.locate_many(smollm2, known, k=2))


# --- what cannot be done ------------------------------------------------------------------------

ASKED = [TEXT, "--target", " Paris"]
BEFORE = {
    "neither facts nor prompts": (["locate-many"], "either `--facts` or `--prompts` must be given, and not both."),
    "facts and prompts": (["locate-many", "--facts", "capital", "--prompts", "x"], "and not both"),
    "facts that there are not": (["locate-many", "--facts", "capitals"], "capital"),
    "a limit of 0": (["locate-many", "--facts", "capital", "--limit", 0], "--limit"),
    "k of 0": (["locate-many", "--facts", "capital", "-k", 0], "-k"),
    "no text": (["scores"], "`TEXT` and `--target` must be given, or `--list`."),
    "no target": (["scores", TEXT], "`TEXT` and `--target` must be given, or `--list`."),
    "bounds and counts": (["scores", *ASKED, "--bounds", "--count"], "`--bounds` and `--count` do not go together."),
    "counts of two": (["scores", *ASKED, "--count", "--score", "contrast", "--score", "bs_target"], "one `--score`"),
    "a score without its name": (["scores", *ASKED, "--score"], "--score"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BEFORE)
def test_bad_arguments_give_one_line_before_the_model_is_opened(cli: Cli, unopened: None, fault: str) -> None:
    args, named = BEFORE[fault]
    assert named in one_line(cli(*args))


VALUES = {
    "score of locate": (["locate", "--score", "contrst"], "Did you mean 'contrast'?"),
    "several of locate": (["locate", "--score", "all"], "`score` must be one score's name"),
    "score": (["scores", "--score", "nope"], "`score` must be one of log_prob_increase, prob_increase"),
    "the same twice": (["scores", "--score", "contrast", "--score", "contrast"], "distinct names of scores"),
    "all and another": (["scores", "--score", "all", "--score", "contrast"], "`score` must be one of"),
    "norm of a score": (["scores", "--score", "bs_target", "--norm", "own"], "`norm` must be 'frozen' for score"),
    "bounds of ranks": (["scores", "--score", "target_rank", "--bounds"], "'target_rank' has no bounds"),
    "counts of no sign": (["scores", "--score", "coefficient", "--count"], "`score` must be one of"),
    "kind": (["scores", "--kind", "neurons"], "Did you mean 'neuron'?"),
    "layer": (["scores", "--layer", 3], "`layers` must be a whole number in -3..2 for tiny-llama; got 3."),
    "column to sort by": (["scores", "--sort", "kl"], "`--sort` must be a column: site, kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_bad_value_gives_one_line(cli: Cli, asked: list[Any], name: str) -> None:
    (command, *options), said = VALUES[name]
    assert said in one_line(cli(command, *asked, *options))


def test_contrasts_need_a_competitor(cli: Cli, model: Path) -> None:
    for command in ("locate", "scores"):
        line = one_line(cli(command, *ASKED, "--score", "contrast", "--model", model))
        assert "score 'contrast' needs competitors for tiny-llama; the prompt has none." in line


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("args", [["scores", *ASKED], ["locate-many", "--facts", "capital"]], ids=lambda one: one[0])
def test_an_out_that_is_a_file_is_refused_first(cli: Cli, tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert "`--out` must be a folder that can be written" in one_line(cli(*args, "--out", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"

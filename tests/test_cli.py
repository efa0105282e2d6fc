"""The command line: what it prints, what it writes, and one line and exit code 2 when it cannot."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import typer
from test_prompts import TEXT, word_tokenizer

import resid_surgery as rs
from resid_surgery.cli.main import app, run
from resid_surgery.views import assets
from resid_surgery.views.files import write_operated

COMMANDS = {
    "operate": {"--target", "--versus", "--model", "-k", "--out", "--static", "--json", "--dtype", "--device"},
    "decompose": {"--target", "--versus", "--model", "--grain", "--rows", "--json", "--dtype", "--device"},
    "recipe": {"--new"},
    "run": {"--out", "--prompts", "--facts", "--limit", "--model", "--executor", "--workers", "--address", "--num-gpus",
            "--resume", "--retry", "--max-failures", "--save-every", "--json", "--dtype", "--device"},
    "status": {"--by", "--value", "--against", "--failures", "--rows", "--json"},
    "resume": {"--model", "--executor", "--workers", "--address", "--num-gpus", "--retry", "--max-failures",
               "--save-every", "--json", "--dtype", "--device"},
    "locate": {"--target", "--versus", "--model", "-k", "--kind", "--score", "--norm", "--worst", "--layer", "--rows",
               "--json", "--dtype", "--device"},
    "locate-many": {"--facts", "--prompts", "--limit", "--model", "-k", "--kind", "--score", "--norm", "--worst",
                    "--layer", "--out", "--rows", "--json", "--dtype", "--device"},
    "scores": {"--target", "--versus", "--model", "--kind", "--score", "--norm", "--layer", "--bounds", "--count",
               "--list", "--sort", "--out", "--rows", "--json", "--dtype", "--device"},
    "serve": {"--model", "--port", "--host", "--no-open", "--dtype", "--device"},
    "sources": {"--target", "--versus", "--model", "--reader", "--side", "--readout", "--grain", "--norm", "--by",
                "--top", "--hops", "--budget", "--removed", "--out", "--rows", "--json", "--dtype", "--device"},
    "graph": {"--target", "--versus", "--model", "--readout", "--nodes", "--grain", "--verify", "--faithfulness",
              "--seed", "--out", "--rows", "--json", "--dtype", "--device"},
    "blame": {"--wrong", "--right", "--model", "--until", "--climb", "--limit", "--seed", "--out", "--rows", "--json",
              "--dtype", "--device"},
    "edit": {"--new", "--old", "--subject", "--out", "--method", "--layer", "--site", "-k", "--sources", "--factor",
             "--steps", "--corpus", "--model", "--seed", "--rows", "--json", "--dtype", "--device"},
    "validate": {"--probes", "--format", "--budget", "--policy", "--general", "--junit", "--html", "--markdown",
                 "--report", "--seed", "--rows", "--json", "--dtype", "--device"},
    "exposure": {"--top", "--tokens", "--out", "--rows", "--json", "--dtype", "--device"},
    "diff": {"--rows", "--json"},
    "sweep": {"--target", "--versus", "--model", "--site", "--operation", "--value", "--positions", "--corrupt",
              "--direction", "--measure", "--sort", "--out", "--rows", "--json", "--dtype", "--device"},
    "check": {"--all-families", "--family", "--markdown", "--json", "--dtype", "--device"},
}  # fmt: skip
TABLES = (
    "columns",
    "predictions",
    "ledger",
    "stream",
    "neurons",
    "attention",
    "spectra",
    "sources",
    "effects",
    "ledger_change",
)


@dataclass(frozen=True)
class Done:
    """What one command left: its exit code and all that it wrote."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as strict JSON (no NaN)."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, through the console script's entry point."""

    def call(*args: Any) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["resid-surgery", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            run()
        written = capsys.readouterr()
        code = left.value.code
        return Done(0 if code is None else int(code), written.out, written.err)

    return call


def in_a_process(*args: Any) -> Done:
    """Run a command by `python -m`, as the console script does, in a process of its own, output in pipes."""
    script = [sys.executable, "-m", "resid_surgery"]
    done = subprocess.run([*script, *map(str, args)], capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def one_line(done: Done) -> str:
    """The single line on stderr of a command that could not be carried out."""
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.endswith("\n")
    (line,) = done.err.splitlines()
    assert line.startswith("resid-surgery: ")
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder, with a tokenizer whose words are single tokens."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    tokenizer = word_tokenizer()
    assert len(tokenizer.encode(" Paris", add_special_tokens=False)) == 1
    tiny.build("llama").save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rec(model: Path) -> Any:
    """The recording that the commands are about."""
    return rs.record(rs.load(model), rs.Prompt(TEXT, target=" Paris", versus=[" London"]))


@pytest.fixture
def asked(model: Path) -> list[Any]:
    """Prompt, target, competitor and model, as arguments."""
    return [TEXT, "--target", " Paris", "--versus", " London", "--model", model]


def same(rows: Any, table: pd.DataFrame) -> None:
    """Rows from JSON or CSV hold what a table holds."""
    got = pd.DataFrame(rows)
    assert list(got.columns) == list(table.columns)
    assert len(got) == len(table)
    for name in table.columns:
        if pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name]):
            found, wanted = (pd.to_numeric(one[name]).to_numpy(float, na_value=np.nan) for one in (got, table))
            assert np.allclose(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True), name
        else:
            assert got[name].astype(str).to_list() == table[name].astype(str).to_list(), name


def test_tables_that_differ_in_one_number_name_or_order_are_not_the_same() -> None:
    table = pd.DataFrame({"site": ["a", "b"], "value": [1.0, float("nan")], "ok": [True, False]})
    same(table.to_dict("list"), table)
    for other in (
        table.replace(1.0, 1.1),
        table.replace("b", "c"),
        table.assign(ok=[True, True]),
        table.iloc[:1],
        table.iloc[::-1].reset_index(drop=True),
        table.rename(columns={"site": "place"}),
    ):
        with pytest.raises(AssertionError):
            same(other.to_dict("list"), table)


# --- help ---------------------------------------------------------------------------------------


def test_the_help_of_the_app_names_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert done.err == ""
    listed = done.out.split("Commands:")[1]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == list(COMMANDS)


def test_no_arguments_show_the_help(cli: Cli) -> None:
    done = cli()
    assert done.code in (0, 2)
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_every_option(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert done.err == ""
    named = {word.strip(",") for line in done.out.splitlines() for word in line.split() if line.startswith("  -")}
    assert COMMANDS[command] <= named
    options = [
        parameter
        for parameter in typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
        if parameter.param_type_name == "option"
    ]
    assert COMMANDS[command] <= {name for option in options for name in option.opts} <= named
    assert [option.opts for option in options if not option.help] == []


# --- operate ------------------------------------------------------------------------------------


def test_operate_prints_its_sections_in_order(cli: Cli, asked: list[Any]) -> None:
    done = cli("operate", *asked, "-k", 3)
    assert done.code == 0
    assert done.err == ""
    titles = [line.removeprefix("== ") for line in done.out.splitlines() if line.startswith("== ")]
    begin = ("Tokens used", "What the model predicts", "Ledger", "Located neurons", "Located attention subvalues",
             "Sources", "Effect", "Closure and timing", "Files")  # fmt: skip
    assert len(titles) == len(begin)
    assert [t for t, b in zip(titles, begin, strict=True) if not t.startswith(b)] == []


def test_operate_shows_the_tokens_what_it_located_and_no_files(cli: Cli, asked: list[Any], rec: Any) -> None:
    out = cli("operate", *asked, "-k", 3).out
    assert "0:'The'  1:' capital'  2:' of'  3:' France'  4:' is' <- predicts" in out
    assert "prove the best 3 of 120" in out
    for site in (*rs.locate(rec, k=3).sites, *rs.locate(rec, k=3, kind="head_source").sites):
        assert f" {site} " in out
    assert out.rstrip().endswith("none written; give --out DIR for CSV tables and a picture")
    assert "nan" not in out.lower()


def test_operate_as_json_holds_every_table(cli: Cli, asked: list[Any], rec: Any) -> None:
    done = cli("operate", *asked, "-k", 2, "--json")
    assert done.code == 0
    assert done.err == ""
    body = done.json()
    assert set(body) == {"schema", "tokens", "position", "target", "versus", "closure", "seconds", *TABLES}
    assert body["schema"] == 1
    assert body["tokens"] == ["The", " capital", " of", " France", " is"]
    assert set(body["closure"]) == {"ledger", "sources", "effects"}
    assert max(body["closure"].values()) < 1e-5
    assert all(seconds >= 0 for seconds in body["seconds"].values())
    same(body["neurons"], rs.locate(rec, k=2).table)
    same(body["attention"], rs.locate(rec, k=2, kind="head_source").table)
    same(body["ledger"], rs.decompose(rec))
    same(body["stream"], rs.stream_bs(rec))
    same(body["predictions"], rs.predictions(rec))
    zeroed = [row["zeroed"] for row in body["effects"]]
    assert {"the neurons", "the attention subvalues", "all of them"} < set(zeroed)
    assert len(set(zeroed)) == 2 + 2 + 3


def test_operate_writes_every_table_and_the_picture_whole(cli: Cli, asked: list[Any], tmp_path: Path, rec: Any) -> None:
    folder = tmp_path / "new" / "out"
    done = cli("operate", *asked, "-k", 2, "--out", folder, "--json")
    assert done.code == 0
    assert done.err == ""
    files = [folder / f"{name}.csv" for name in TABLES] + [folder / "stream.png", folder / "report.html"]
    assert [Path(name) for name in done.json()["files"]] == files
    assert sorted(folder.iterdir()) == sorted(files)  # nothing half-written is left
    for name in TABLES:
        same(pd.read_csv(folder / f"{name}.csv").to_dict("list"), pd.DataFrame(done.json()[name]))
    same(pd.read_csv(folder / "ledger.csv").to_dict("list"), rs.decompose(rec))
    picture = (folder / "stream.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_operate_writes_a_page_of_plain_tables_where_it_is_asked(
    cli: Cli, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    said = one_line(cli("operate", *asked, "-k", 2, "--out", tmp_path / "no"))
    assert "an interactive page needs vl-convert-python and itables" in said
    assert said.endswith("For a page of plain tables, without charts, take `--static`.")
    assert not (tmp_path / "no").exists()
    assert cli("operate", *asked, "-k", 2, "--out", tmp_path / "out", "--static").code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<table" in page
    assert "<script" not in page


def test_operate_lists_the_files_that_it_wrote_over_older_ones(cli: Cli, asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "ledger.csv").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    done = cli("operate", *asked, "-k", 2, "--out", tmp_path)
    listed = done.out.split("== Files\n")[1].split()
    assert listed == [str(tmp_path / f"{name}.csv") for name in TABLES] + [
        str(tmp_path / name) for name in ("stream.png", "report.html")
    ]
    assert (tmp_path / "ledger.csv").read_text().startswith("site,kind,layer,bs_target,")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a table stops in the middle."""

    def full(self: pd.DataFrame, path: Path, **_: Any) -> None:
        Path(path).write_text("half a ta")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)


@pytest.mark.usefixtures("full_disk")
def test_a_table_that_cannot_be_written_leaves_the_old_one(rec: Any, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("old")
    done = rs.operate(rec.model, rec.prompt.source, k=2)
    with pytest.raises(OSError, match="No space left on device"):
        write_operated(done, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]
    assert (tmp_path / "predictions.csv").read_text() == "old"


@pytest.mark.usefixtures("full_disk")
def test_a_table_that_cannot_be_written_gives_one_line(cli: Cli, asked: list[Any], tmp_path: Path) -> None:
    assert "No space left on device" in one_line(cli("operate", *asked, "-k", 2, "--out", tmp_path))


# --- the other commands -------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["layer", "head", "neuron"])
def test_decompose_prints_the_ledger(cli: Cli, asked: list[Any], rec: Any, grain: str) -> None:
    done = cli("decompose", *asked, "--grain", grain, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json()["schema"] == 1
    same(done.json()["rows"], rs.decompose(rec, grain=grain))
    shown = cli("decompose", *asked, "--grain", grain).out
    assert shown.startswith("tokens: 0:'The'  1:' capital'  2:' of'  3:' France'  4:' is'\n")
    assert "bs ' Paris'" in shown
    assert "bs ' London'" in shown


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_limits_what_is_printed_and_says_how_many_are_left(cli: Cli, asked: list[Any], rows: int) -> None:
    out = cli("decompose", *asked, "--grain", "neuron", "--rows", rows).out
    more = [line for line in out.splitlines() if "more rows" in line]
    assert len(more) == (rows > 0)
    assert sum(line.startswith("L") for line in out.splitlines()) == (120 + 6 if rows == 0 else 4)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--kind", "head_source", "-k", "4"], {"kind": "head_source", "k": 4}),
        (["--norm", "own", "--layer", "0", "--layer", "2"], {"norm": "own", "layers": [0, 2]}),
        (["--worst", "-k", "3"], {"worst": True, "k": 3}),
        (["--layer", "-1"], {"layers": [-1]}),
    ],
    ids=str,
)
def test_locate_prints_what_the_verb_finds(
    cli: Cli, asked: list[Any], rec: Any, options: list[str], arguments: dict[str, Any]
) -> None:
    found = rs.locate(rec, **arguments)
    done = cli("locate", *asked, *options, "--json")
    assert (done.code, done.err) == (0, "")
    body = done.json()
    assert (body["evaluations"], body["candidates"], body["proof"]) == (
        found.evaluations,
        found.candidates,
        found.proof,
    )
    same(body["rows"], found.table)
    assert repr(found) in cli("locate", *asked, *options).out


def test_sources_prints_the_shares_of_given_or_of_the_best_neurons(cli: Cli, asked: list[Any], rec: Any) -> None:
    given = cli("sources", *asked, "-r", "L2.N0", "-r", "L-1.N5", "--grain", "neuron", "--top", 3, "--norm", "live",
                "--json")  # fmt: skip
    assert (given.code, given.err) == (0, "")
    same(given.json()["rows"], rs.sources(rec, ["L2.N0", "L2.N5"], grain="neuron", top=3, norm="live"))
    best = cli("sources", *asked, "--json").json()["rows"]
    assert {row["reader"] for row in best} == {str(site) for site in rs.locate(rec, k=3).sites}
    assert "remainder" in cli("sources", *asked, "--grain", "neuron", "--top", 3).out


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], lambda rec: rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*"))),
        (["-s", "L1.N0:4", "-s", "L0.mlp", "--operation", "scale", "--value", "2", "--positions", "each"],
         lambda rec: rs.sweep(rec, rs.grid(rec, lambda one, positions: rs.Scale(one, 2.0, positions=positions),
                                           ["L1.N0:4", "L0.mlp"], positions="each"))),
        (["-s", "L1.H0<*", "--operation", "attend", "--value", "0.5", "--measure", "bs", "--sort", "bs_change_target"],
         lambda rec: rs.sweep(rec, rs.grid(rec, lambda one, positions: rs.Attend(one, 0.5, positions=positions),
                                           "L1.H0<*"), measure="bs").sort_values("bs_change_target")),
        (["-s", "L2.N3", "--operation", "clamp", "--value", "-1"],
         lambda rec: rs.sweep(rec, rs.grid(rec, lambda one, positions: rs.Clamp(one, -1.0, positions=positions),
                                           "L2.N3"))),
    ],
    ids=lambda one: None if callable(one) else str(one),
)  # fmt: skip
def test_sweep_prints_a_row_an_intervention(
    cli: Cli, asked: list[Any], rec: Any, options: list[str], rows: Any
) -> None:
    done = cli("sweep", *asked, *options, "--json")
    assert (done.code, done.err) == (0, "")
    wanted = rows(rec)
    same(done.json()["rows"], wanted)
    assert done.json()["clean"] == pytest.approx(wanted.attrs["clean"])
    assert f"{len(wanted)} rows" in cli("sweep", *asked, *options).out


def test_sweep_patches_between_two_prompts_and_writes_files(
    cli: Cli, asked: list[Any], model: Path, rec: Any, tmp_path: Path
) -> None:
    corrupt = TEXT.replace("France", "Italy")
    assert corrupt != TEXT
    done = cli("sweep", *asked, "--corrupt", corrupt, "--positions", "each", "--direction", "noise", "--out",
               tmp_path / "out", "--json")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    other = rs.record(rec.model, rs.Prompt(corrupt, target=" Paris", versus=[" London"]))
    table = rs.patching(rec, other, direction="noise")
    same(done.json()["rows"], table)
    assert [Path(name).name for name in done.json()["files"]] == ["sweep.csv", "sweep.png"]
    same(pd.read_csv(tmp_path / "out" / "sweep.csv", keep_default_na=False).to_dict("records"), table)
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_check_prints_every_line_and_the_anatomy(cli: Cli, model: Path) -> None:
    done = cli("check", model)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("model: tiny-llama\nfamily: llama (read off one forward)\nlayers: 3 attention\n")
    body = cli("check", model, "--json").json()
    assert set(body) == {"schema", "anatomy", "rows"}
    assert body["anatomy"]["heads"] == "4 over 2 KV, d_head 6"
    assert all(row["ok"] for row in body["rows"])
    assert {row["line"] for row in body["rows"]} >= {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"}
    for row in body["rows"]:
        assert row["identity"] in done.out


def test_check_leaves_with_1_when_a_line_does_not_hold(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rs.check

    def one_fails(opened: Any) -> pd.DataFrame:
        table: pd.DataFrame = real(opened)
        table.loc[3, "ok"] = False
        return table

    monkeypatch.setattr(rs, "check", one_fails)
    done = cli("check", model, "--json")
    assert done.code == 1
    assert [row["ok"] for row in done.json()["rows"]].count(False) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_passed_on(cli: Cli, model: Path, dtype: str) -> None:
    body = cli("check", model, "--dtype", dtype, "--device", "cpu", "--json").json()
    assert {row["dtype"] for row in body["rows"]} == {dtype}


TYPES = ("llama", "qwen3_next", "mamba", "musicgen")
STATUSES = {"llama": "verified", "qwen3_next": "hybrid", "mamba": "refused", "musicgen": "not buildable"}
ASKED_TYPES = [word for one in TYPES for word in ("--family", one)]


@pytest.fixture(scope="module")
def families() -> pd.DataFrame:
    """What the library says of one type of each status."""
    table: pd.DataFrame = rs.check_families(TYPES)
    return table


def test_check_prints_a_markdown_table_of_the_families_asked_for(cli: Cli, families: pd.DataFrame) -> None:
    done = cli("check", *ASKED_TYPES, "--markdown")
    assert (done.code, done.err) == (0, "")
    counts, empty, head, rule, *rows = done.out.strip().splitlines()
    assert counts == "1 verified, 1 hybrid, 1 refused, 1 not buildable of 4 types."
    assert empty == ""
    assert [cell.strip() for cell in head.split("|")] == ["", "type", "status", "particulars, or reason", ""]
    assert set(rule) == set("|-")
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows] == list(STATUSES.items())
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    for row, said in zip(rows, families["features"] + families["reason"], strict=True):
        assert row.split("|")[3].strip() == said


def test_check_gives_what_the_library_measures_on_families(cli: Cli, families: pd.DataFrame) -> None:
    assert dict(zip(families["type"], families["status"], strict=True)) == STATUSES
    done = cli("check", *ASKED_TYPES, "--json")
    assert (done.code, done.err) == (0, "")
    assert set(done.json()) == {"schema", "rows"}
    same(pd.DataFrame(done.json()["rows"]).drop(columns="seconds"), families.drop(columns="seconds"))
    shown = cli("check", *ASKED_TYPES, "--dtype", "float64").out
    assert shown.startswith("4 types in float64: ")
    for status in STATUSES.values():
        assert f"1 {status}" in shown.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "types", "dtype"),
    [
        (["--all-families"], None, "float32"),
        (["--all-families", "--dtype", "bfloat16"], None, "bfloat16"),
        (["--family", "llama", "--family", "opt"], ["llama", "opt"], "float32"),
    ],
    ids=str,
)
def test_check_leaves_with_1_when_a_family_is_wrong(
    cli: Cli,
    families: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    types: list[str] | None,
    dtype: str,
) -> None:
    asked_for: list[Any] = []

    def check_families(types: Any = None, *, dtype: str, each: Callable[[str], Any]) -> pd.DataFrame:
        asked_for.append((types, dtype))
        each("llama")
        return families.assign(status=["wrong", *families["status"][1:]]) if wrong else families

    monkeypatch.setattr(rs, "check_families", check_families)
    for wrong in (False, True):
        assert cli("check", *options).code == int(wrong)
        assert cli("check", *options, "--markdown").code == int(wrong)
        done = cli("check", *options, "--json")
        assert done.code == int(wrong)
        assert (done.json()["rows"][0]["status"] == "wrong") is wrong
    assert asked_for == [(types, dtype)] * 6


# --- what cannot be done ------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "no command": (["bogus"], "bogus"),
    "no text": (["operate"], "TEXT"),
    "no target": (["operate", TEXT], "--target"),
    "an unknown option": (["operate", TEXT, "--target", " Paris", "--kk", "3"], "--kk"),
    "an option without its value": (["operate", TEXT, "--target"], "--target"),
    "a second text": (["operate", TEXT, "more", "--target", " Paris"], "more"),
    "k is 0": (["operate", TEXT, "--target", " Paris", "-k", "0"], "-k"),
    "k is a word": (["locate", TEXT, "--target", " Paris", "-k", "ten"], "-k"),
    "rows is -1": (["decompose", TEXT, "--target", " Paris", "--rows", "-1"], "--rows"),
    "top is 0": (["sources", TEXT, "--target", " Paris", "--top", "0"], "--top"),
    "a layer is a word": (["locate", TEXT, "--target", " Paris", "--layer", "last"], "--layer"),
    "an argument too many": (["check", "smollm2-135m", "llama"], "llama"),
    "a command that there was": (["families"], "families"),
    "a family without its value": (["check", "--family"], "--family"),
    "a model and a family": (["check", "smollm2-135m", "--family", "llama"], "`MODEL` and `--device` do not go with"),
    "a model and all families": (["check", "smollm2-135m", "--all-families"], "--all-families"),
    "a device and a family": (["check", "--family", "llama", "--device", "cpu"], "`MODEL` and `--device` do not go"),
    "a family that there is not": (["check", "--family", "lama"], "'lama'"),
    "a dtype of families": (["check", "--family", "llama", "--dtype", "int8"], "`dtype` must be one of float32"),
}


@pytest.mark.parametrize("fault", BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_exit_code_2(cli: Cli, fault: str) -> None:
    args, named = BAD_ARGUMENTS[fault]
    assert named in one_line(cli(*args))


BAD_VALUES = {
    "grain": (["decompose", "--grain", "layr"], "`grain` must be one of layer, .* Did you mean 'layer'?"),
    "kind": (["locate", "--kind", "neurn"], "`kind` must be one of neuron, .* Did you mean 'neuron'?"),
    "norm of locate": (["locate", "--norm", "live"], "`norm` must be one of frozen, own; got 'live'."),
    "norm of sources": (["sources", "--norm", "own"], "`norm` must be one of frozen, live; got 'own'."),
    "layer": (["locate", "--layer", "3"], "`layers` must be a whole number in -3..2 for tiny-llama; got 3."),
    "k of locate": (["locate", "-k", "121"], "`k` must be a whole number in 1..120 for tiny-llama; got 121."),
    "k of operate": (["operate", "-k", "121"], "`k` must be a whole number in 1..120 for tiny-llama; got 121."),
    "reader out of range": (["sources", "-r", "L3.N0"], "`layer` must be in 0..2 for tiny-llama (3 layers); got 3."),
    "reader of nonsense": (["sources", "-r", "banana"], "`site` must be a site such as L20.N1297"),
    "reader of no expert": (["sources", "-r", "L0.E0.N1"], "`L0.E0.N1` does not exist for tiny-llama: .* no experts."),
    "operation": (["sweep", "--operation", "remove"], "`--operation` must be one of zero, scale, clamp, attend; got"),
    "site of a sweep": (["sweep", "-s", "L9.H*"], "`layer` must be in 0..2 for tiny-llama (3 layers); got 9."),
    "column to sort by": (["sweep", "-s", "L0.mlp", "--sort", "kll"], "`--sort` must be a column: site, kind"),
    "measure": (["sweep", "--measure", "prob"], "`measure` must be one of bs, log_prob, all; got 'prob'."),
    "clamped head": (["sweep", "--operation", "clamp"], "`sites` of Clamp must be a neuron or attention neuron"),
    "direction": (["sweep", "--corrupt", TEXT, "--direction", "up"], "`direction` must be one of denoise, noise"),
    "the same prompt twice": (["sweep", "--corrupt", TEXT], "`clean` and `corrupt` must differ in what is measured"),
    "dtype": (["decompose", "--dtype", "int8"], "`dtype` must be one of float64, float32, bfloat16, float16; got"),
    "device": (["decompose", "--device", "nonsense"], "`device` must be a torch device such as 'cpu' or 'cuda'; got"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_gives_the_librarys_line_and_exit_code_2(cli: Cli, asked: list[Any], name: str) -> None:
    (command, *options), said = BAD_VALUES[name]
    line = one_line(cli(command, *asked, *options))
    for piece in said.split(" .* "):
        assert piece in line


@pytest.mark.parametrize("command", ["operate", "decompose", "locate", "sources", "sweep"])
def test_a_target_of_several_tokens_gives_its_pieces(cli: Cli, model: Path, command: str) -> None:
    line = one_line(cli(command, TEXT, "--target", " Paris London", "--model", model))
    assert line == (
        "resid-surgery: `target` must be one token of tiny-llama; ' Paris London' is 2: ' Paris' (id 7), "
        "' London' (id 8). Study its first piece with target=' Paris' or id 7, or choose a word that is one token."
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", " Paris", "--versus", " Paris"], "`versus` must be distinct tokens other than the target"),
        (["--target", " Paris", "--versus", " Lyon London"], "`versus` must be one token of tiny-llama"),
        (["--target", ""], "`target` must be one token of tiny-llama; got '', which is no token at all."),
        (["--target", " Bordeaux"], "' Bordeaux'"),
    ],
    ids=str,
)
def test_other_tokens_that_are_no_good(cli: Cli, model: Path, options: list[str], said: str) -> None:
    assert said in one_line(cli("decompose", TEXT, *options, "--model", model))


def test_an_empty_or_endless_text_is_refused(cli: Cli, model: Path) -> None:
    options = ["--target", " Paris", "--model", model]
    assert "`text` must be a non-empty string; got ''." in one_line(cli("operate", "", *options))
    endless = one_line(cli("operate", "The" + " is" * 64, *options))
    assert "the prompt has 65 tokens but tiny-llama reads at most 64." in endless


@pytest.mark.parametrize("command", ["operate", "check"])
@pytest.mark.parametrize("fault", ["nowhere", "hub", "empty", "pickle", "text file", "gguf", "truncated"])
def test_a_model_that_cannot_be_opened_gives_one_line(
    cli: Cli, model: Path, tmp_path: Path, command: str, fault: str
) -> None:
    where: Any = tmp_path / "it"
    if fault == "hub":
        where = "nobody/nothing"
    elif fault == "text file":
        where.write_text("hello")
    elif fault == "gguf":
        where = tmp_path / "it.gguf"
        where.write_bytes(b"nonsense" * 50)
    elif fault != "nowhere":
        where.mkdir()
    if fault in ("pickle", "truncated"):
        (where / "config.json").write_bytes((model / "config.json").read_bytes())
    if fault == "pickle":
        (where / "pytorch_model.bin").write_bytes(b"\x80")
    if fault == "truncated":
        (where / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    args = ["check", where] if command == "check" else ["operate", TEXT, "--target", " Paris", "--model", where]
    said = {
        "nowhere": "does not exist.",
        "hub": "nobody/nothing could not be opened",
        "empty": "must hold a config.json",
        "pickle": "has only pickle weights",
        "text file": "is a file but no .gguf checkpoint",
        "gguf": "could not be read as GGUF",
        "truncated": "damaged or truncated safetensors",
    }
    assert said[fault] in one_line(cli(*args))


def test_a_model_without_a_tokenizer_gives_one_line_and_no_warnings(cli: Cli, model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        line = one_line(cli("operate", TEXT, "--target", " Paris", "--model", tmp_path))
    assert "was opened without a tokenizer, so text cannot be used" in line
    assert [str(one.message) for one in shown] == []  # each would be two more lines on stderr


@pytest.mark.parametrize("inside", [False, True])
def test_an_out_that_is_a_file_is_refused_before_the_model_is_opened(
    cli: Cli, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setattr(rs, "load", lambda *_, **__: pytest.fail("the model was opened first"))
    file = tmp_path / "out"
    file.write_text("mine")
    line = one_line(cli("operate", *asked, "--out", file / "deeper" if inside else file))
    assert f"`--out` must be a folder that can be written; {file}" in line
    assert file.read_text() == "mine"


# --- as a process -------------------------------------------------------------------------------


def test_a_pipe_gets_the_report_whole_and_nothing_on_stderr(asked: list[Any]) -> None:
    done = in_a_process("operate", *asked, "-k", 2)
    assert done.code == 0
    assert done.err == ""
    assert done.out.count("\n== ") == 9
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) > 120  # tables are never cut to a terminal's width


def test_help_comes_without_importing_torch() -> None:
    script = (
        "import sys\nfrom resid_surgery.cli.main import run\nsys.argv[1:] = ['operate', '--help']\n"
        "try:\n    run()\nfinally:\n    sys.stderr.write(repr({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "--target" in done.stdout
    assert done.stderr == "set()"

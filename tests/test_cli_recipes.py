"""`resid-surgery recipe`: main's parameters as options, what a recipe prints and saves, and what is refused."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from test_cli import Cli, cli, one_line  # noqa: F401  (cli is a fixture)
from test_prompts import word_tokenizer

import resid_surgery as rs
import resid_surgery.cli.recipes as recipes
from resid_surgery.cli.recipes import Kind, Recipe, command_of

HEAD = """# %% [markdown]
# # A title of the recipe
# What it does, in a line.

# %%
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional
import pandas as pd
import resid_surgery as rs

"""
SHOW = '''
def main({parameters}) -> dict[str, pd.DataFrame]:
    """Says what it was given."""
    given = dict(locals())
    print("from main itself")
    return {{"given": pd.DataFrame({{"name": list(given), "value": [repr(one) for one in given.values()]}})}}
'''

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A recipe's file with a main of these parameters, or with this body."""

    def make(parameters: str = "", *, body: str | None = None, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + (SHOW.format(parameters=parameters) if body is None else body), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder, with a tokenizer of words."""
    place = tmp_path_factory.mktemp("recipes") / "tiny-llama"
    tiny.build("llama").save_pretrained(place)  # type: ignore[operator]
    word_tokenizer().save_pretrained(place)
    return place


def said(done: Any) -> dict[str, str]:
    """What main was given, by name."""
    assert done.code == 0, done.err
    return {row["name"]: row["value"] for row in done.json()["given"]}


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "arguments", "value"),
    [
        ("x: str = 'a'", [], "'a'"),
        ("x: str = 'a'", ["--x", " Paris"], "' Paris'"),
        ("x: str = 'a'", ["-x", "b"], "'b'"),
        ("x: str", ["--x", ""], "''"),
        ("x: int = 3", ["--x", "-4"], "-4"),
        ("x: float = 1.0", ["--x", "2"], "2.0"),
        ("x: bool = False", ["--x"], "True"),
        ("x: bool = True", ["--no-x"], "False"),
        ("x: Path = Path('a')", ["--x", "b"], "PosixPath('b')"),
        ("x: Literal['a', 'b'] = 'a'", ["--x", "b"], "'b'"),
        ("x: str | None = None", [], "None"),
        ("x: int | None = None", ["--x", "7"], "7"),
        ("x: Optional[str] = None", ["--x", "7"], "'7'"),
        ("x: Sequence[str] = ('a', 'b')", [], "('a', 'b')"),
        ("x: Sequence[str] = ('a', 'b')", ["--x", "c"], "('c',)"),
        ("x: tuple[int, ...] = (1, 2)", ["--x", "3", "--x", "4"], "(3, 4)"),
        ("x: list[float] = [1.5]", ["--x", "3"], "(3.0,)"),
        ("x: Sequence[int] | None = None", [], "None"),
        ("x: Sequence[int] | None = None", ["--x", "3"], "(3,)"),
        ("x: str | Sequence[str] = 'all'", [], "'all'"),
        ("x: str | Sequence[str] = 'all'", ["--x", "a", "--x", "b"], "('a', 'b')"),
        ("x: str | rs.Budget = 'smoke'", ["--x", "full"], "'full'"),
        ("x=3", ["--x", "4"], "4"),
        ("x=(1.0, 2.0)", ["--x", "4"], "(4.0,)"),
        ("x: Any = 'a'", ["--x", "4"], "'4'"),
        ("a_long_name: int = 1", ["--a-long-name", "2"], "2"),
        ("rows: int = 1", ["--rows", "2"], "2"),
    ],
)
def test_a_parameter_is_an_option(cli: Cli, write: Write, parameter: str, arguments: list[str], value: str) -> None:  # noqa: F811
    given = said(cli("recipe", write(parameter), "--json", *arguments))
    assert list(given.values()) == [value]


def test_a_parameter_that_has_no_default_must_be_given(cli: Cli, write: Write) -> None:  # noqa: F811
    assert "--x" in one_line(cli("recipe", write("x: int")))


@pytest.mark.parametrize("arguments", [["--x", "word"], ["--y", "1"], ["1"]])
def test_options_that_are_no_good_are_refused(cli: Cli, write: Write, arguments: list[str]) -> None:  # noqa: F811
    one_line(cli("recipe", write("x: int = 1"), *arguments))


@pytest.mark.parametrize(
    "parameter",
    ["x: rs.Budget = None", "x: dict[str, int] = {}", "x: Any = None", "x: tuple[int, str] = (1, 'a')", "*x: int",
     "**x: int", "x: int, /", "x=None", "x: Literal[1, 2] = 1", "x: Sequence[rs.Edit] = ()"],
)  # fmt: skip
def test_a_parameter_that_cannot_be_written_is_refused_by_name(cli: Cli, write: Write, parameter: str) -> None:  # noqa: F811
    line = one_line(cli("recipe", write(parameter), "--help"))
    assert "x" in line
    assert "Sequence" in line
    assert "mine.py" in line


def test_annotations_as_texts_are_read(cli: Cli, write: Write) -> None:  # noqa: F811
    assert said(cli("recipe", write("x: 'int' = 1"), "--json", "--x", "5")) == {"x": "5"}
    assert "Nowhere" in one_line(cli("recipe", write("x: 'Nowhere' = 1", name="other.py")))


@pytest.mark.parametrize(("annotation", "many"), [("list[int]", True), ("int", False), ("Sequence[int] | int", True)])
def test_what_an_option_holds(write: Write, annotation: str, many: bool) -> None:
    (parameter,) = Recipe.read(write(f"x: {annotation} = 1")).parameters.values()
    assert Kind.of(parameter) == Kind(int, many)


# --- help ---------------------------------------------------------------------------------------


def test_the_help_of_a_recipe_has_its_words_and_options(cli: Cli, write: Write) -> None:  # noqa: F811
    done = cli("recipe", write("model: Any = None, x: int = 3, names: Sequence[str] = ('a', 'b')"), "--help")
    assert (done.code, done.err) == (0, "")
    words = (
        "Says what it was given.",
        "A title of the recipe\n",
        "What it does, in a line.",
        "[default: 3]",
        "mine.py",
    )
    for wanted in (*words, "--x", "--names", "--model", "--dtype", "--device", "--out", "--rows", "--json"):
        assert wanted in done.out, wanted
    assert "from main itself" not in done.out


def test_a_recipe_without_a_model_has_no_options_of_one(cli: Cli, write: Write) -> None:  # noqa: F811
    path = write("x: int = 3")
    assert "--model" not in cli("recipe", path, "--help").out
    assert "--model" in one_line(cli("recipe", path, "--model", "any"))


def test_the_command_has_a_help_of_its_own(cli: Cli) -> None:  # noqa: F811
    done = cli("recipe", "--help")
    assert done.code == 0
    assert "--new" in done.out
    assert "FILE.py" in done.out


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_has_a_help(path: Path) -> None:
    recipe = Recipe.read(path)
    command = command_of(recipe)
    names = {parameter.name for parameter in command.params}
    assert set(recipe.parameters) <= names
    assert {"rows", "json", "out"} <= names
    assert inspect.getdoc(recipe.main) in recipe.about
    assert path.read_text().splitlines()[1].removeprefix("# # ") in recipe.about


# --- what is printed and saved ------------------------------------------------------------------


def test_tables_are_printed_and_saved(cli: Cli, write: Write, tmp_path: Path) -> None:  # noqa: F811
    done = cli("recipe", write("x: int = 3"), "--x", "4", "--out", tmp_path / "results")
    assert (done.code, done.err) == (0, "")
    assert "from main itself" in done.out
    assert "== given" in done.out
    table = pd.read_csv(tmp_path / "results" / "given.csv")
    assert table.to_dict("list") == {"name": ["x"], "value": [4]}
    assert f"wrote {tmp_path / 'results' / 'given.csv'}" in done.out


def test_json_is_alone_on_stdout(cli: Cli, write: Write) -> None:  # noqa: F811
    done = cli("recipe", write("x: int = 3"), "--json")
    assert done.json() == {
        "schema": 1,
        "recipe": str(Path(done.json()["recipe"])),
        "given": [{"name": "x", "value": "3"}],
    }
    assert done.err == "from main itself\n"


def test_rows_limit_what_is_printed(cli: Cli, write: Write) -> None:  # noqa: F811
    body = "def main():\n    return pd.DataFrame({'n': range(1000, 1030)})\n"
    path = write(body=body)
    assert "1012" not in cli("recipe", path).out
    assert "1011" in cli("recipe", path).out
    assert "1029" in cli("recipe", path, "--rows", "0").out
    assert "== result" in cli("recipe", path, "--rows", "1").out


def test_a_recipe_that_saves_by_itself_is_given_the_folder(cli: Cli, write: Write, tmp_path: Path) -> None:  # noqa: F811
    given = said(cli("recipe", write("out: str = 'a'"), "--json", "--out", tmp_path))
    assert given == {"out": repr(str(tmp_path))}
    assert list(tmp_path.glob("*.csv")) == []


@pytest.mark.parametrize("value", ["None", "3", "{'a': 1}", "[pd.DataFrame()]"])
def test_what_is_no_table_is_refused(cli: Cli, write: Write, value: str) -> None:  # noqa: F811
    assert "DataFrame" in one_line(cli("recipe", write(body=f"def main():\n    return {value}\n")))


# --- models -------------------------------------------------------------------------------------


def test_the_model_is_opened_and_handed_over(cli: Cli, write: Write, folder: Path) -> None:  # noqa: F811
    given = said(cli("recipe", write("model: Any = None"), "--json", "--model", folder, "--dtype", "float64"))
    assert "float64" in given["model"]
    assert given["model"].startswith("OpenedModel(")


def test_a_model_that_is_left_out_is_the_recipes_own(cli: Cli, write: Write) -> None:  # noqa: F811
    path = write("model: Any = None")
    assert said(cli("recipe", path, "--json")) == {"model": "None"}
    assert "--model" in one_line(cli("recipe", path, "--dtype", "float64"))


def test_a_main_that_needs_a_model_gets_the_embedded_one(write: Write) -> None:
    command = command_of(Recipe.read(write("model")))
    assert {one.name: one.default for one in command.params}["model"] == "smollm2-135m"


def test_a_shipped_recipe_gives_what_its_main_gives(cli: Cli, folder: Path) -> None:  # noqa: F811
    path = Path(__file__).parent.parent / "recipes" / "01_who_wrote_paris.py"
    done = cli("recipe", path, "--model", folder, "-k", 2, "--versus", " London", "--json")
    assert done.code == 0, done.err
    wanted = Recipe.read(path).main(rs.load(folder), k=2, versus=(" London",))
    assert set(done.json()) == {"schema", "recipe", *wanted}
    assert [row["site"] for row in done.json()["neurons"]] == wanted["neurons"]["site"].tolist()
    assert [row["bs_target"] for row in done.json()["ledger"]] == pytest.approx(wanted["ledger"]["bs_target"].tolist())


# --- files --------------------------------------------------------------------------------------


def test_files_that_are_no_recipes_are_refused(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    assert "must be a Python file that exists" in one_line(cli("recipe", tmp_path / "none.py"))
    assert "must be a Python file that exists" in one_line(cli("recipe", tmp_path))
    (tmp_path / "a.txt").write_text("def main(): ...")
    assert "must be a Python file that exists" in one_line(cli("recipe", tmp_path / "a.txt"))
    assert "must be given" in one_line(cli("recipe"))
    for text, wanted in (
        ("x = 1\n", "must define main"),
        ("main = 3\n", "must define main"),
        ("def main(:\n", "must be Python"),
        ("import nothing_of_that_name\n", "nothing_of_that_name"),
        ("import resid_surgery as rs\nrs.Zero('L0.N')\n", "L0.N"),
    ):
        (tmp_path / "b.py").write_text(text)
        assert wanted in one_line(cli("recipe", tmp_path / "b.py")), text


def test_nothing_runs_before_arguments_are_looked_at(cli: Cli, write: Write, tmp_path: Path) -> None:  # noqa: F811
    body = f"def main(x: int = 1):\n    open({str(tmp_path / 'ran')!r}, 'w')\n    return {{}}\n"
    path = write(body=body)
    one_line(cli("recipe", path, "--x", "word"))
    (tmp_path / "taken").touch()
    one_line(cli("recipe", path, "--out", tmp_path / "taken"))
    assert not (tmp_path / "ran").exists()
    assert cli("recipe", path).code == 0
    assert (tmp_path / "ran").exists()


def test_an_error_of_the_recipes_own_code_keeps_its_traceback(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(body="def main():\n    return 1 / 0\n")
    monkeypatch.setattr(sys, "argv", ["resid-surgery", "recipe", str(path)])
    with pytest.raises(ZeroDivisionError):
        recipes.recipe(_context([]), str(path))


def _context(args: list[str]) -> Any:
    return type("Context", (), {"args": args})()


# --- a new one ----------------------------------------------------------------------------------


def test_a_new_recipe_runs_as_it_is(cli: Cli, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "my_recipe.py"
    done = cli("recipe", "--new", path)
    assert (done.code, done.err) == (0, "")
    assert f"wrote {path}" in done.out
    ran = cli("recipe", path, "--model", folder, "--versus", " London", "--json", "-k", 3)
    assert ran.code == 0, ran.err
    assert len(ran.json()["neurons"]) == 3


def test_the_scaffold_is_the_recipe_that_explains_it() -> None:
    shipped = Path(__file__).parent.parent / "recipes" / "23_write_your_own.py"
    template = Path(recipes.__file__).parent / recipes.TEMPLATE
    assert template.read_text() == shipped.read_text()


def test_a_new_recipe_never_replaces_a_file(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "mine.py").write_text("kept")
    assert "does not exist yet" in one_line(cli("recipe", "--new", tmp_path / "mine.py"))
    assert (tmp_path / "mine.py").read_text() == "kept"
    assert ".py file" in one_line(cli("recipe", "--new", tmp_path / "mine.txt"))
    assert ".py file" in one_line(cli("recipe", "--new", tmp_path / "no" / "mine.py"))
    assert "alone" in one_line(cli("recipe", "--new", tmp_path / "other.py", "a.py"))
    assert json.loads(json.dumps(sorted(one.name for one in tmp_path.iterdir()))) == ["mine.py"]

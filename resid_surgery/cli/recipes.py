"""Recipes: Python files with ``main(model, ...)`` whose parameters become the command's options."""

import collections.abc
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, final, get_args, get_origin

import typer

from resid_surgery._check import message
from resid_surgery._files import write_whole
from resid_surgery.cli.common import AsJson, Device, Dtype, Model, Rows, app, load, print_json
from resid_surgery.errors import ArgumentError

SAYABLE = (bool, int, float, str, Path)
MANY = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
USUAL = "smollm2-135m"
TEMPLATE = "recipe_template.txt"
BARE = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

# What the command adds to a recipe's own parameters, unless the recipe has one of that name.
OWN: dict[str, tuple[Any, Any]] = {
    "dtype": (Dtype, None),
    "device": (Device, None),
    "out": (
        Annotated[Path | None, typer.Option("--out", help="Folder to save the returned tables in, as CSV.")],
        None,
    ),
    "rows": (Rows, 12),
    "json": (AsJson, False),
}


@app.command(context_settings=BARE)
def recipe(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE.py", help="A recipe; what follows are its own options.")
    ] = None,
    new: Annotated[
        Path | None, typer.Option("--new", metavar="FILE.py", help="Write a new recipe that runs, to begin with.")
    ] = None,
) -> None:
    """Run a recipe: `recipe FILE.py --help` shows the parameters of its main(model, ...) as options.

    Every recipe has --model, --dtype, --device, --rows, --json, and --out, which saves the tables that it returns.
    """
    if new is not None:
        if file is not None or context.args:
            raise ArgumentError("`--new FILE.py` goes alone: it writes a file and runs nothing.")
        typer.echo(f"wrote {scaffold(new)}\nrun it with: resid-surgery recipe {new} --help")
        return
    if file is None:
        raise ArgumentError("`FILE.py` must be given: the recipe to run, or `--new FILE.py` to begin one.")
    command_of(Recipe.read(Path(file))).main(
        args=context.args, prog_name=f"resid-surgery recipe {file}", standalone_mode=False
    )


def scaffold(path: Path) -> Path:
    """Write a recipe that runs as it is; never over a file.

    Raises:
        ArgumentError: not a new .py file in a folder that exists.
    """
    if path.suffix != ".py" or not path.parent.is_dir():
        raise ArgumentError(f"`--new` must be a .py file in a folder that exists; got {path}.")
    if path.exists():
        raise ArgumentError(f"`--new` must be a file that does not exist yet; {path} is there.")
    return write_whole(path, files("resid_surgery.cli").joinpath(TEMPLATE).read_bytes())


@final
@dataclass(frozen=True)
class Recipe:
    """A recipe's file, read: its main, the text that explains it, and main's parameters with their types."""

    path: Path
    main: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a file and look at its main; the file's top level runs, main does not.

        Raises:
            ArgumentError: no such file, no Python, no main, or annotations that cannot be read.
        """
        if path.suffix != ".py" or not path.is_file():
            raise ArgumentError(f"`FILE.py` must be a Python file that exists; got {path}.")
        main = getattr(_module(path), "main", None)
        if not inspect.isfunction(main):
            raise ArgumentError(f"{path} must define main(model, ...); resid-surgery recipe --new FILE.py writes one.")
        try:
            signature = inspect.signature(main, eval_str=True)
        except (NameError, TypeError, SyntaxError, AttributeError) as error:
            raise ArgumentError(f"main's annotations in {path} cannot be read: {error}.") from None
        return cls(path, main, signature.parameters)

    @property
    def about(self) -> str:
        """Main's docstring, and the text of the file's first cell below it, for --help."""
        cells = self.path.read_text(encoding="utf-8").split("\n# %%")
        words = [line[2:].removeprefix("# ") for line in cells[0].split("\n")[1:] if line.startswith("# ")]
        kept = "\b\n" + "\n".join(words) if words else ""  # "\b" keeps a paragraph's lines as they are
        return "\n\n".join(filter(None, [inspect.getdoc(self.main), kept]))


@final
@dataclass(frozen=True)
class Kind:
    """What an option can be given: one value of a type, or several."""

    one: Any
    many: bool

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> "Kind | None":
        """By annotation, or by the default where there is none; None where the command line cannot say it."""
        annotation = parameter.annotation
        if annotation in (Any, parameter.empty):
            annotation = _type_of(parameter.default)
        members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        found = [kind for kind in map(cls._member, members) if kind is not None]
        return next((kind for kind in found if kind.many), found[0] if found else None)

    @classmethod
    def _member(cls, annotation: Any) -> "Kind | None":
        if _sayable(annotation):
            return cls(annotation, False)
        held = {one for one in get_args(annotation) if one is not ...}
        if get_origin(annotation) in MANY and len(held) == 1 and _sayable(*held):
            return cls(held.pop(), True)
        return None

    @property
    def annotation(self) -> Any:
        """The type of the whole option."""
        return list[self.one] if self.many else self.one  # type: ignore[name-defined]

    def flags(self, name: str) -> list[str]:
        """How the option is written."""
        flag = name.replace("_", "-")
        if self.one is bool and not self.many:
            return [f"--{flag}/--no-{flag}"]
        return [f"--{flag}", f"-{flag}"] if len(flag) == 1 else [f"--{flag}"]


def _sayable(one: Any) -> bool:
    return one in SAYABLE or (get_origin(one) is Literal and all(isinstance(text, str) for text in get_args(one)))


def _type_of(default: Any) -> Any:
    if isinstance(default, (list, tuple)) and default:
        return list[type(default[0])]  # type: ignore[misc]
    return type(default)


def _module(path: Path) -> types.ModuleType:
    """The file as a module of its own name, registered while it lives, as dataclasses and pickle expect."""
    module = types.ModuleType(f"recipe_{path.stem}")
    module.__file__ = str(path.resolve())
    try:
        code = compile(path.read_bytes(), module.__file__, "exec")
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(f"{path} must be Python: {error}.") from None
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
    except ImportError as error:
        raise ArgumentError(f"{path} cannot be loaded: {error}.") from None
    return module


def command_of(recipe: Recipe) -> Any:
    """The recipe as a command: an option a parameter, then those that every recipe has.

    Raises:
        ArgumentError: a parameter that no option can give.
    """
    taken = set(recipe.parameters) | ({"dtype", "device"} if "model" not in recipe.parameters else set())
    own = {name: _keyword(name, *one) for name, one in OWN.items() if name not in taken}
    options = [*(_option(recipe, one) for one in recipe.parameters.values()), *own.values()]

    def command(**given: Any) -> None:
        beside = {name: given.pop(name) for name in own}
        _run(recipe, {name: _given(value, recipe.parameters[name]) for name, value in given.items()}, **beside)

    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in options}
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(help=recipe.about)(command)
    return typer.main.get_command(alone)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(recipe: Recipe, one: inspect.Parameter) -> inspect.Parameter:
    """A parameter of main as an option of the command."""
    if one.name == "model":
        default = USUAL if one.default is one.empty else one.default
        return _keyword("model", Annotated[str | None, *get_args(Model)[1:]], default)
    kind = Kind.of(one)
    if kind is None or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
        do = "Use str, int, float, bool, Path or Literal texts, a Sequence of one of these, or one of them | None."
        raise ArgumentError(message("main", f"of parameters that can be options in {recipe.path}", str(one), do=do))
    default = [one.default] if kind.many and not isinstance(one.default, (list, tuple, NoneType)) else one.default
    default = one.empty if one.default is one.empty else list(default) if kind.many and default is not None else default
    help_text = "Repeat for more." if kind.many else None
    said = typer.Option(*kind.flags(one.name), help=help_text, show_default=_seen(default))
    whole = kind.annotation | None if default is None else kind.annotation
    return _keyword(one.name, Annotated[whole, said], default)


def _seen(default: Any) -> bool | str:
    """How a default is shown: texts with blanks at an end in quotes."""
    texts = [one for one in (default if isinstance(default, list) else [default]) if isinstance(one, str)]
    return ", ".join(map(repr, texts)) if any(one != one.strip() for one in texts) else True


def _given(value: Any, one: inspect.Parameter) -> Any:
    """An option's value as main expects it: several as a tuple, and main's own default where it was left out."""
    default = one.default
    if not isinstance(value, list):
        return value
    if not value:
        return () if default is one.empty else default
    alone = not isinstance(default, (list, tuple))
    return default if value == ([default] if alone else list(default)) else tuple(value)


def _run(
    recipe: Recipe,
    given: dict[str, Any],
    *,
    dtype: str | None = None,
    device: str | None = None,
    out: Path | None = None,
    rows: int = 12,
    json: bool = False,
) -> None:
    """Open the model, run main, print the tables that it returns, and save them where that is asked."""
    from resid_surgery.views.files import check_out, save_results

    folder = None if out is None else check_out(out)
    if given.get("model") is not None:
        given["model"] = load(given["model"], dtype, device)
    elif dtype or device:
        raise ArgumentError("`--dtype` and `--device` go with `--model` here: the recipe opens its own model.")
    with redirect_stdout(sys.stderr) if json else nullcontext():  # what main itself prints is not JSON
        tables = _tables(recipe, recipe.main(**given))
    written = [] if folder is None else save_results(folder, tables)
    if json:
        print_json({"recipe": str(recipe.path)}, tables, written)
        return
    _show(tables, rows, written)


def _tables(recipe: Recipe, returned: Any) -> dict[str, Any]:
    import pandas as pd

    found = {"result": returned} if isinstance(returned, pd.DataFrame) else returned
    if not isinstance(found, Mapping) or not all(isinstance(one, pd.DataFrame) for one in found.values()):
        raise ArgumentError(
            message("main", f"a function that returns a DataFrame, or name -> DataFrame, in {recipe.path}", returned)
        )
    return {str(name): table for name, table in found.items()}


def _show(tables: Mapping[str, Any], rows: int, written: list[Path]) -> None:
    from resid_surgery.views import text as view

    out = view.console()
    for name, table in tables.items():
        out.print(f"\n== {name}", markup=False)
        named = {column: f"bs {token!r}" for column, token in table.attrs.get("tokens", {}).items()}
        view.show(out, table.rename(columns=named), rows=rows or None)
    for file in written:
        out.print(f"wrote {file}", markup=False)

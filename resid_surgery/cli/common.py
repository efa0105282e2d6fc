"""What commands share: options, loading, and tables on stdout or JSON."""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="resid-surgery",
    help="Locate, operate on and measure what writes a prediction into a transformer's residual stream.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Text = Annotated[str, typer.Argument(metavar="TEXT", help="The prompt, ending right before the prediction.")]
Target = Annotated[
    str, typer.Option("--target", "-t", help="Token whose prediction is studied; mind the leading space: ' Paris'.")
]
Versus = Annotated[list[str] | None, typer.Option("--versus", "-v", help="Competing token; repeat for more.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="smollm2-135m (embedded), a hub id, a folder or a .gguf file.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Rows = Annotated[int, typer.Option("--rows", min=0, help="Rows to print; 0 prints all.")]
K = Annotated[int, typer.Option("-k", min=1, help="How many subvalues to locate.")]
Norm = Annotated[str, typer.Option("--norm", help="frozen (scale of the final stream) or own (of each state).")]
Kind = Annotated[
    str, typer.Option(help="neuron, head, head_source, attn_neuron, attn_neuron_source (from one position) or layer.")
]
OneScore = Annotated[str, typer.Option("--score", help="A score's name; `resid-surgery scores --list` has them.")]
Worst = Annotated[bool, typer.Option("--worst", help="The worst by the score instead of the best.")]
Layers = Annotated[list[int] | None, typer.Option("--layer", help="Only this layer; repeat for more.")]


class Stopped(Exception):  # noqa: N818  (not an error)
    """The user stopped a command that has something to say about it."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets what an interrupt says reach the user."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or "stopped") from None


def load(model: str, dtype: str | None, device: str | None) -> Any:
    import resid_surgery as rs

    with busy(f"loading {model}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stderr is for the one line that says what is wrong
        return rs.load(model, dtype=dtype, device=device)


def prompt_of(text: str, target: str, versus: list[str] | None) -> Any:
    import resid_surgery as rs

    return rs.Prompt(text, target=target, versus=versus or ())


def said(rec: Any) -> dict[str, Any]:
    """What was asked, for JSON: tokens used, position, target and competitors in column order."""
    p = rec.prompt
    versus = [p.names[i] for i in p.versus]
    return {"tokens": list(p.tokens), "position": p.position, "target": p.names[p.target], "versus": versus}


def tokens(rec: Any) -> str:
    return "tokens: " + "  ".join(f"{i}:{t!r}" for i, t in enumerate(rec.prompt.tokens))


def busy(what: str) -> Any:
    from rich.console import Console

    return Console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext()


def show(
    table: Any,
    rows: int,
    as_json: bool,
    *,
    heading: str,
    extra: dict[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> None:
    if as_json:
        print_json(extra or {}, {"rows": table}, list(files))
        return
    from resid_surgery.views import text as view

    out = view.console()
    out.print(heading, markup=False)
    named = {column: f"bs {token!r}" for column, token in table.attrs.get("tokens", {}).items()}
    view.show(out, table.rename(columns=named), rows=rows or None)
    for file in files:
        out.print(f"wrote {file}", markup=False)


def print_json(head: dict[str, Any], tables: dict[str, Any], files: list[Path]) -> None:
    body: dict[str, Any] = {"schema": 1, **head}
    body |= {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
    if files:
        body["files"] = [str(f) for f in files]
    typer.echo(json.dumps(body, ensure_ascii=False, indent=1))

"""``resid-surgery``: arguments in, tables out. What the commands do lives in the rooms above.

Tables go to stdout, or JSON with ``--json``; progress goes to stderr, on a terminal only. Arguments,
models, files and tokens that are no good give one line and exit code 2.
"""

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resid_surgery.cli import operating, recipes, running, scoring, serving, tracing, validating  # noqa: F401  (they register their commands, in this order)
from resid_surgery.cli.common import (
    AsJson,
    Device,
    Dtype,
    Model,
    Rows,
    Stopped,
    Target,
    Text,
    Versus,
    app,
    busy,
    load,
    prompt_of,
    said,
    show,
    tokens,
)


@app.command()
def sweep(
    text: Text,
    target: Target,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    site: Annotated[
        list[str] | None,
        typer.Option("--site", "-s", help="Sites or slices: 'L*.H*', 'L20:24.N*', 'L*.resid_pre'; repeat for more."),
    ] = None,
    operation: Annotated[str, typer.Option(help="zero, scale, clamp or attend; ignored with --corrupt.")] = "zero",
    value: Annotated[float, typer.Option(help="Factor of scale, value of clamp, weight of attend.")] = 0.0,
    positions: Annotated[
        str, typer.Option(help="target, each (a row for every position), or a token's text.")
    ] = "target",
    corrupt: Annotated[str | None, typer.Option(help="Another prompt: patch between the two, with scores.")] = None,
    direction: Annotated[str, typer.Option(help="denoise (clean into corrupt) or noise, with --corrupt.")] = "denoise",
    measure: Annotated[str, typer.Option(help="bs (fastest), log_prob or all.")] = "log_prob",
    sort: Annotated[str | None, typer.Option(help="Column to sort by, smallest first.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for sweep.csv and a heat map.")] = None,
    rows: Rows = 40,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """One intervention a row, thousands of them: ablate every head or neuron, or patch between two prompts."""
    import resid_surgery as rs
    from resid_surgery.views.files import check_out, write_sweep

    makers: dict[str, Any] = {
        "zero": rs.Zero,
        "scale": lambda one, positions: rs.Scale(one, value, positions=positions),
        "clamp": lambda one, positions: rs.Clamp(one, value, positions=positions),
        "attend": lambda one, positions: rs.Attend(one, value, positions=positions),
    }
    if operation not in makers:
        raise rs.ArgumentError(f"`--operation` must be one of {', '.join(makers)}; got {operation!r}.")
    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt)
    sites = site or ["L*.resid_pre" if corrupt else "L*.H*"]
    if corrupt is None:
        table = rs.sweep(rec, rs.grid(rec, makers[operation], sites, positions=positions), measure=measure)
    else:
        other = rs.record(opened, prompt_of(corrupt, target, versus))
        table = rs.patching(rec, other, sites, positions=positions, direction=direction, measure=measure)
    if sort is not None:
        if sort not in table:
            raise rs.ArgumentError(f"`--sort` must be a column: {', '.join(table.columns)}; got {sort!r}.")
        table = table.sort_values(sort, ignore_index=True)
    shown = "score" if "score" in table else "bs_change_target" if measure == "bs" else "log_prob_change"
    files = [] if folder is None else write_sweep(table, shown, folder)
    about = {name: table.attrs[name] for name in ("clean", "run", "donor", "direction") if name in table.attrs}
    show(table, rows, as_json, heading=f"{tokens(rec)}\n{len(table)} rows", extra=said(rec) | about, files=files)


@app.command()
def check(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="smollm2-135m (embedded), a hub id, a folder or a .gguf file.")
    ] = None,
    all_families: Annotated[
        bool, typer.Option("--all-families", help="Build every registered causal-LM type tiny and check each.")
    ] = False,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="Only this model type, built tiny; repeat for more.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Families as a Markdown table.")] = False,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure every line of the mathematics on a model, or on every family that transformers has.

    Exit code 1 if an identity fails.
    """
    import resid_surgery as rs

    if all_families and family:
        raise rs.ArgumentError("`--all-families` and `--family` do not go together: the second is for some only.")
    if markdown and (as_json or not (all_families or family)):
        raise rs.ArgumentError("`--markdown` goes with --all-families or --family, and without --json.")
    if all_families or family:
        if model is not None or device is not None:
            raise rs.ArgumentError(
                "`MODEL` and `--device` do not go with --all-families or --family: these build models."
            )
        _check_families(family or None, dtype or "float32", markdown, as_json)
        return
    opened = load(model or "smollm2-135m", dtype, device)
    with busy("checking"):
        table = rs.check(opened)
    about = "\n".join(f"{name}: {value}" for name, value in opened.anatomy.describe().items())
    show(table, 0, as_json, heading=about, extra={"anatomy": opened.anatomy.describe()})
    if not bool(table["ok"].all()):
        raise typer.Exit(1)


def _check_families(types: list[str] | None, dtype: str, markdown: bool, as_json: bool) -> None:
    import resid_surgery as rs
    from resid_surgery._progress import progress
    from resid_surgery.evidence.families import families_markdown
    from resid_surgery.models.zoo import causal_types

    with progress("families", len(types or causal_types())) as step:
        table = rs.check_families(types, dtype=dtype, each=step)
    if markdown:
        typer.echo(families_markdown(table))
    else:
        counts = ", ".join(f"{n} {status}" for status, n in table["status"].value_counts().items())
        show(table, 0, as_json, heading=f"{len(table)} types in {dtype}: {counts}", extra={})
    if "wrong" in set(table["status"]):
        raise typer.Exit(1)


def run() -> None:
    """Entry point: what is no good gives one line on stderr and exit code 2, and no traceback."""
    from resid_surgery.errors import ResidSurgeryError, RunError, out_of_memory

    try:
        raise SystemExit(app(standalone_mode=False, prog_name="resid-surgery") or 0)
    except RunError as error:
        _fail(str(error), 1)
    except (ResidSurgeryError, OSError) as error:
        _fail(str(error))
    except Stopped as stop:
        gc.freeze()  # what is left goes with the process: collecting a model's objects first would take a second
        _fail(str(stop), 130)
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        if out_of_memory(error):
            _fail(f"memory ran out: {error}", 1)
        if not hasattr(error, "format_message"):  # the parser's own errors have one
            raise
        text = error.format_message()
        _fail(text or "no command given; see resid-surgery --help")


def _fail(text: str, code: int = 2) -> None:
    from resid_surgery.errors import ResidSurgeryError

    sys.stderr.write(f"resid-surgery: {ResidSurgeryError(text)}\n")  # one line, whatever stands in it
    raise SystemExit(code) from None

"""Commands that score and locate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resid_surgery.cli.common import (
    AsJson,
    Device,
    Dtype,
    K,
    Kind,
    Layers,
    Model,
    Norm,
    OneScore,
    Rows,
    Target,
    Text,
    Versus,
    Worst,
    app,
    busy,
    load,
    prompt_of,
    said,
    show,
    tokens,
)


@app.command()
def locate(
    text: Text,
    target: Target,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    k: K = 10,
    kind: Kind = "neuron",
    score: OneScore = "log_prob_increase",
    norm: Norm = "frozen",
    worst: Worst = False,
    layer: Layers = None,
    rows: Rows = 80,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The exact best (or worst) k subvalues by a score, proven."""
    import resid_surgery as rs

    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt)
    with busy("locating"):
        found = rs.locate(
            rec, k=k, kind=kind, score=score, norm=norm, worst=worst, layers=layer or None, progress=False
        )
    proof = {"evaluations": found.evaluations, "candidates": found.candidates, "proof": found.proof, "score": score}
    show(found.table, rows, as_json, heading=f"{tokens(rec)}\n{found!r}", extra=said(rec) | proof)


@app.command("locate-many")
def locate_many(
    facts: Annotated[
        list[str] | None,
        typer.Option("--facts", help="Built-in facts that the model knows: capital, language, ...; repeat for more."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help='JSON lines: {"text": ..., "target": ..., "versus": [...]}, one prompt each.'),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each kind or file.")] = None,
    model: Model = "smollm2-135m",
    k: K = 10,
    kind: Kind = "neuron",
    score: OneScore = "log_prob_increase",
    norm: Norm = "frozen",
    worst: Worst = False,
    layer: Layers = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for located.csv.")] = None,
    rows: Rows = 80,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """`locate` on a set of prompts, one after the other, with bounded memory."""
    import resid_surgery as rs
    from resid_surgery.views.files import check_out

    if (prompts is None) == (not facts):
        raise rs.ArgumentError("either `--facts` or `--prompts` must be given, and not both.")
    folder = None if out is None else check_out(out)
    some = [] if prompts is None else [case.prompt for case in rs.read_cases(prompts)[:limit]]
    for one in facts or []:
        rs.facts(one)  # refused before a model is loaded
    opened = load(model, dtype, device)
    some += [prompt for one in facts or [] for prompt in rs.facts(one, model=opened)[:limit]]
    table = rs.locate_many(opened, some, k=k, kind=kind, score=score, norm=norm, worst=worst, layers=layer or None)
    files = [] if folder is None else rs.save_results(folder, {"located": table})
    about = {"prompts": len(some), "score": score, "kind": kind}
    show(table, rows, as_json, heading=f"{len(some)} prompts", extra=about, files=files)


@app.command()
def scores(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The prompt; none with --list.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Token whose prediction is studied.")] = None,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    kind: Kind = "neuron",
    score: Annotated[list[str] | None, typer.Option("--score", help="A score's name, or all; repeat for more.")] = None,
    norm: Norm = "frozen",
    layer: Layers = None,
    bounds: Annotated[bool, typer.Option("--bounds", help="Certified lower and upper values instead.")] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Helpful and harmful subvalues of each layer instead.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Every score with its formula and unit.")] = False,
    sort: Annotated[str | None, typer.Option(help="Column to sort by, largest first.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for scores.csv.")] = None,
    rows: Rows = 40,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The scores of every subvalue, exact or between certified bounds; --list says what they are."""
    import resid_surgery as rs
    from resid_surgery.views.files import check_out

    if listed:
        table = rs.describe_scores()
        show(table if as_json else table.drop(columns=["note", "source"]), 0, as_json, heading="scores")
        return
    if text is None or target is None:
        raise rs.ArgumentError("`TEXT` and `--target` must be given, or `--list`.")
    if bounds and count:
        raise rs.ArgumentError("`--bounds` and `--count` do not go together.")
    wanted: Any = score or ["log_prob_increase"]
    if count and len(wanted) > 1:
        raise rs.ArgumentError("`--count` takes one `--score`.")
    wanted = wanted[0] if len(wanted) == 1 else wanted
    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt)
    options: dict[str, Any] = {"kind": kind, "score": wanted, "norm": norm, "layers": layer or None}
    table = rs.counts(rec, **options) if count else rs.scores(rec, bounds=bounds, **options)
    if sort is not None:
        if sort not in table:
            raise rs.ArgumentError(f"`--sort` must be a column: {', '.join(table.columns)}; got {sort!r}.")
        table = table.sort_values(sort, ascending=False, ignore_index=True)
    files = [] if folder is None else rs.save_results(folder, {"scores": table})
    show(table, rows, as_json, heading=f"{tokens(rec)}\n{len(table)} rows", extra=said(rec), files=files)

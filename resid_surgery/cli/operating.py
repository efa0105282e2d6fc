"""The main job, and the ledger that it rests on."""

from pathlib import Path
from typing import Annotated

import typer

from resid_surgery.cli.common import (
    AsJson,
    Device,
    Dtype,
    K,
    Model,
    Rows,
    Target,
    Text,
    Versus,
    app,
    busy,
    load,
    print_json,
    prompt_of,
    said,
    show,
    tokens,
)


@app.command()
def operate(
    text: Text,
    target: Target,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    k: K = 10,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for CSV tables, a picture and a page.")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="The page without scripts: plain tables; needs no extra `report`.")
    ] = False,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The main job: locate what wrote the target, trace its sources, ablate it, measure, report."""
    from resid_surgery.evidence.operating import operate as run_operate
    from resid_surgery.views import text as view
    from resid_surgery.views.assets import need_packages
    from resid_surgery.views.files import check_out, write_operated

    if out is not None and not static:
        need_packages(("charts", "tables"), do="take `--static`")
    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    with busy("operating"):
        done = run_operate(opened, prompt, k=k)
        files = [] if folder is None else write_operated(done, folder, interactive=not static)
    if as_json:
        about = said(done.rec) | {"closure": done.closure(), "seconds": done.seconds}
        print_json(about, done.tables(), files)
    else:
        view.show_operated(view.console(), done, files)


@app.command()
def decompose(
    text: Text,
    target: Target,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    grain: Annotated[str, typer.Option(help="layer, head, head_source, neuron or subvalue.")] = "layer",
    rows: Rows = 80,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """The ledger: one row per addend of the stream, with its bs-values; the rows sum to the logits."""
    import resid_surgery as rs

    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt)
    show(rs.decompose(rec, grain=grain), rows, as_json, heading=tokens(rec), extra=said(rec))

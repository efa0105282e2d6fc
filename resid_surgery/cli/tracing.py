"""Commands that trace sources, grow source graphs and ask why."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resid_surgery.cli.common import (
    AsJson,
    Device,
    Dtype,
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

Readout = Annotated[
    str,
    typer.Option(help="Of heads, layers and the prediction: target, difference (to the competitors) or log_prob."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for tables and figures.")]


@app.command()
def sources(
    text: Text,
    target: Target,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            "--reader",
            "-r",
            help="L20.N5 (@2 for another position), L3.H4.D7, L9.H4, 'L9.H4<2', L9.H4.query, L9.mlp, unembed; repeat "
            "for more; the three best located neurons by default.",
        ),
    ] = None,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    side: Annotated[str | None, typer.Option(help="Of heads: value, query, key or all.")] = None,
    readout: Readout = "target",
    grain: Annotated[str, typer.Option(help="layer, head, head_source, neuron or subvalue.")] = "layer",
    norm: Annotated[str, typer.Option(help="For coefficient_without: frozen or live.")] = "frozen",
    by: Annotated[str, typer.Option(help="List the largest by share, or by inner_product (the paper's).")] = "share",
    top: Annotated[int, typer.Option(min=1, help="Writers listed per reading.")] = 10,
    hops: Annotated[int, typer.Option(min=1, help="1 for direct sources; more follow the listed ones back.")] = 1,
    budget: Annotated[int, typer.Option(min=0, help="Sources followed at most, with --hops.")] = 20,
    removed: Annotated[
        bool,
        typer.Option("--removed", help="Heads without each lower vector: all recomputed, and with weights fixed."),
    ] = False,
    out: Out = None,
    rows: Rows = 80,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What switched readers on: exact shares of what neurons, heads, layers and the prediction read."""
    import resid_surgery as rs
    from resid_surgery.views.files import check_out

    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt, positions="all")
    readers = reader or [str(s) for s in rs.locate(rec, k=3).sites]
    if removed:
        table = rs.attention_sources(rec, readers, readout=readout, norm="live" if norm == "live" else "frozen")
        figures: Any = {"removed": rs.plot_removed} if folder else {}
    else:
        options: dict[str, Any] = {"side": side, "readout": readout, "grain": grain, "norm": norm, "by": by}
        table = rs.sources(rec, readers, top=top, hops=hops, budget=budget, **options)
        figures = {"sources": rs.plot_sources} if folder else {}
    files = []
    if folder is not None:
        files = rs.save_results(folder, {"sources": table}, {name: draw(table) for name, draw in figures.items()})
    show(table, rows, as_json, heading=tokens(rec), extra=said(rec), files=files)


@app.command()
def graph(
    text: Text,
    target: Target,
    versus: Versus = None,
    model: Model = "smollm2-135m",
    readout: Readout = "target",
    nodes: Annotated[int, typer.Option(min=2, help="How many, leaves included.")] = 200,
    grain: Annotated[str, typer.Option(help="layer, head, head_source, neuron or subvalue.")] = "subvalue",
    cut: Annotated[int, typer.Option("--verify", min=0, help="Cut so many edges and measure; 0 for none.")] = 50,
    faithful: Annotated[
        bool, typer.Option("--faithfulness", help="Keep only, and remove only, its nodes, and measure.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the edges that are cut, and of random controls.")] = 0,
    out: Out = None,
    rows: Rows = 40,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Where a prediction comes from, back to the embeddings; every edge exact, sampled ones cut and measured."""
    import resid_surgery as rs
    from resid_surgery.views.files import check_out

    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, target, versus)
    rec = rs.record(opened, prompt, positions="all")
    with busy("growing the graph"):
        grown = rs.source_graph(rec, readout=readout, nodes=nodes, grain=grain)
    tables, lines = grown.tables(), [tokens(rec), repr(grown)]
    if cut:
        with busy("cutting edges"):
            verified = rs.verify(grown, edges=cut, seed=seed)
        tables["verified"] = verified.table
        lines.append(
            f"{len(verified.table)} edges cut: correlation {verified.correlation:.6f}, slope {verified.slope:.6f}, "
            f"worst off by {verified.worst:.1e} of its reading"
        )
    if faithful:
        with busy("keeping and removing nodes"):
            tables["faithfulness"] = rs.faithfulness(grown, seed=seed)
    files = []
    if folder is not None:
        files = rs.save_results(folder, tables, {"graph": rs.plot_graph(grown)}, {"graph.json": grown.to_json()})
    _show_all(tables, rows, as_json, lines, said(rec), files, first="edges")


@app.command()
def blame(
    text: Text,
    wrong: Annotated[str, typer.Option("--wrong", help="The token that the model says.")],
    right: Annotated[str, typer.Option("--right", help="The token that it should say.")],
    model: Model = "smollm2-135m",
    until: Annotated[str, typer.Option(help="Restored means: top (most probable) or above (the wrong one).")] = "top",
    climb: Annotated[
        str, typer.Option(help="What each step raises: gap (logits) or log_prob (of the right one).")
    ] = "gap",
    limit: Annotated[int, typer.Option(min=1, help="Most members of the set.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the random control sets.")] = 0,
    out: Out = None,
    rows: Rows = 20,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Why this answer and not that: who tipped it, what switched them on, and what it takes to restore the right one.

    Exit code 1 if no set was found that restores it.
    """
    import resid_surgery as rs
    from resid_surgery.views.files import check_out

    folder = None if out is None else check_out(out)
    opened, prompt = load(model, dtype, device), prompt_of(text, right, None)
    rec = rs.record(opened, prompt)
    found = rs.blame(rec, wrong, right, until=until, climb=climb, limit=limit, seed=seed)
    files = []
    if folder is not None:
        files = rs.save_results(folder, found.tables(), {}, {"summary.txt": "\n".join(found.summary()) + "\n"})
        path = folder / "operations.json"
        rs.save_interventions(path, found.operations)
        files.append(path)
    lines = [tokens(rec), *found.summary()]
    head = said(found.rec) | {"restored": found.restored, "set": [str(site) for site in found.sites]}
    _show_all(found.tables(), rows, as_json, lines, head, files, first="tipped")
    if not found.restored:
        raise typer.Exit(1)


def _show_all(
    tables: dict[str, Any],
    rows: int,
    as_json: bool,
    lines: list[str],
    head: dict[str, Any],
    files: list[Path],
    first: str,
) -> None:
    """Lines, then one table in full and short ones whole; all of them as JSON."""
    if as_json:
        print_json(head | {"summary": lines[1:]}, tables, files)
        return
    from resid_surgery.views import text as view

    out = view.console()
    for line in lines:
        out.print(line, markup=False)
    for name, table in tables.items():
        if name == first or len(table) <= rows:
            out.print(f"\n{name}", markup=False)
            view.show(out, table, rows=rows or None)
    for file in files:
        out.print(f"wrote {file}", markup=False)

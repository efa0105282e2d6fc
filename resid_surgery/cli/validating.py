"""Commands that edit a model, find where an edit acts, and validate what it changed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resid_surgery._files import read_json
from resid_surgery.cli.common import AsJson, Device, Dtype, Model, Rows, app, busy, load, print_json, show

METHODS = ("rank-one", "least-squares", "value-rows", "coefficients")
Edited = Annotated[
    str,
    typer.Argument(
        metavar="EDITED",
        help="An edit's .safetensors file, a file of differences, the folder of a PEFT adapter or a checkpoint.",
    ),
]
Base = Annotated[
    str, typer.Argument(metavar="BASE", help="smollm2-135m (embedded), a hub id, a folder or a .gguf file.")
]


@app.command()
def edit(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Ends right before the answer; {} may stand for the subject.")
    ],
    new: Annotated[str | None, typer.Option("--new", help="The new answer; mind the leading space: ' Rome'.")] = None,
    old: Annotated[
        str | None, typer.Option("--old", help="The answer before; value-rows and coefficients locate its neurons.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option(help="What the fact is about; needed by rank-one, least-squares.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The .safetensors file to write; without it the edit is only shown.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="rank-one (ROME), least-squares (MEMIT), value-rows or coefficients.")
    ] = "rank-one",
    layer: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Which layer to edit, or to locate in; repeat for more (not rank-one)."),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site", "-s", help="Neurons or heads of value-rows, coefficients; repeat. Default: located ones."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many neurons to locate where no site is given.")] = 10,
    sources: Annotated[
        bool, typer.Option("--sources", help="Operate on what switches the located neurons on instead of on them.")
    ] = False,
    factor: Annotated[float, typer.Option(help="Of coefficients: 0 ablates.")] = 0.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Most optimisation steps of rank-one, least-squares.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text lines for the keys' second moment of rank-one, least-squares.")
    ] = None,
    model: Model = "smollm2-135m",
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    rows: Rows = 20,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Rewrite a fact, or scale what writes it, as an edit in one file; `validate` says what else it changed.

    resid-surgery edit "The capital of {} is" --subject France --new " Rome" --old " Paris" --out rome.safetensors
    """
    import resid_surgery as rs

    if new and new[0].isalnum() and prompt[-1:].isalnum() and (new[0] + prompt[-1]).isascii():
        raise rs.ArgumentError(f"`--new` must begin with a space behind {prompt!r}, as in ' {new}'; got {new!r}.")
    if method not in METHODS:
        raise rs.ArgumentError(f"`--method` must be one of {', '.join(METHODS)}; got {method!r}.")
    if out is not None and (out.suffix != ".safetensors" or not out.parent.is_dir()):
        raise rs.ArgumentError(f"`--out` must be a .safetensors file in a folder that exists; got {out}.")
    opened = load(model, dtype, device)
    fitting: dict[str, Any] = {"seed": seed} | ({} if steps is None else {"steps": steps})
    if corpus is not None:
        fitting["corpus"] = _lines(corpus)
    if method in ("rank-one", "least-squares"):
        rewrite = rs.Rewrite(prompt, *_needed(method, subject=subject, new=new), old)
        if method == "rank-one":
            if layer is not None and len(layer) > 1:
                raise rs.ArgumentError("`--layer` must be given once for rank-one, which edits one layer.")
            made = rs.edit_rank_one(opened, rewrite, layer=layer[0] if layer else None, **fitting)
        else:
            made = rs.edit_least_squares(opened, [rewrite], layers=layer, **fitting)
    else:
        text = prompt.replace("{}", subject or "")
        rewrites = () if not (subject and (new or old)) else (rs.Rewrite(prompt, subject, new, old),)
        sites: Any = site or _located(opened, text, _needed(method, old=old)[0], layer, k, sources)
        if method == "coefficients":
            made = rs.edit_coefficients(opened, sites, factor, rewrites=rewrites)
        else:
            made = rs.edit_value_rows(opened, sites, old=old, new=_needed(method, new=new)[0], rewrites=rewrites)
    files = [] if out is None else [made.save(out)]
    head = {"edit": repr(made), "hash": made.hash, "method": made.method}
    if as_json:
        print_json(head, {"tensors": made.table, "fitting": made.fitting}, files)
        return
    show(made.table, rows, False, heading=repr(made))
    if len(made.fitting):
        show(made.fitting.tail(rows or len(made.fitting)), rows, False, heading="\nfitting", files=files)


def _lines(path: Path) -> list[str]:
    import resid_surgery as rs

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise rs.ArgumentError(f"{path} must be text in UTF-8; {error.reason}.") from None


def _asked(files: list[Path], format: str | None) -> Any:
    """Probes of all files; ParaRel's patterns and triples are read together."""
    import resid_surgery as rs

    pair = [one for one in files if format == "pararel" or ".patterns." in one.name or ".triples." in one.name]
    sources: list[Any] = [one for one in files if one not in pair] + ([pair] if pair else [])
    asked: Any = None
    for source in sources:
        found = rs.read_probes(source, format=format)
        asked = found if asked is None else asked + found
    return asked


def _needed(method: str, **given: str | None) -> list[str]:
    import resid_surgery as rs

    for name, value in given.items():
        if value is None:
            raise rs.ArgumentError(f"`--{name}` must be given with --method {method}.")
    return [str(value) for value in given.values()]


def _located(model: Any, text: str, old: str, layers: list[int] | None, k: int, sources: bool) -> Any:
    """The neurons that write the old answer, or those that switch them on."""
    import resid_surgery as rs

    rec = rs.record(model, rs.Prompt(text, target=old), positions="all" if sources else "target")
    found = rs.locate(rec, k=k, layers=layers)
    if not sources:
        return found.sites
    table = rs.sources(rec, found.sites, grain="neuron", top=k)
    best = table[table["kind"] == "neuron"].groupby("writer")["share"].sum().abs().nlargest(k)
    return [str(one) for one in best.index if "@" not in str(one)]


@app.command()
def validate(
    base: Base,
    edited: Edited,
    probes: Annotated[
        list[Path] | None,
        typer.Option(
            help="What to ask in place of the edit's own facts: a file of CounterFact, EasyEdit, zsRE, KnowEdit, "
            "RippleEdits, MQuAKE, LRE or ParaRel, or of rs.save_probes; repeat for more."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="Of the probes; left out, the fields of a file's first record tell it."),
    ] = None,
    budget: Annotated[str, typer.Option(help="smoke (minutes), standard or full.")] = "smoke",
    policy: Annotated[
        Path | None, typer.Option(help='JSON of other limits: {"kl: unrelated text": [0.002, 0.02]}.')
    ] = None,
    general: Annotated[
        bool, typer.Option("--general/--no-general", help="Built-in texts for axes that the probes have none of.")
    ] = True,
    junit: Annotated[Path | None, typer.Option("--junit", help="JUnit XML file to write.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Self-contained page to write.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Markdown file to write.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="JSON file to write, for `diff` and for machines.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstrap and random controls.")] = 0,
    rows: Rows = 20,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What else an edit changed: every axis, controls, intervals, a verdict.

    Exit code 0 for PASS, 1 for FAIL, 3 for INCONCLUSIVE; 2 where it could not be asked, such as for an edit that
    changes no weight.
    """
    import resid_surgery as rs
    from resid_surgery._files import utf8, write_whole

    files = [file for file in (junit, html, markdown, report) if file is not None]
    for file in files:
        if not file.parent.is_dir() or file.is_dir():
            raise rs.ArgumentError(f"{file} must be a file in a folder that exists, so that the report can be written.")
    limits = None if policy is None else _limits(policy)
    asked = _asked(probes or [], format)
    opened = load(base, dtype, device)
    change = rs.read_edit(opened, edited)
    done = rs.validate(opened, change, asked, budget=budget, policy=limits, general=general, seed=seed)
    for wanted, text in ((junit, done.junit), (markdown, done.markdown), (report, done.to_json)):
        if wanted is not None:
            write_whole(wanted, utf8(text()))
    if html is not None:
        rs.write_report(done, html)
    if as_json:
        typer.echo(done.to_json())
    else:
        _show(done, asked, rows, files)
    raise typer.Exit(done.exit_code)


def _show(done: Any, asked: Any, rows: int, files: list[Path]) -> None:
    from resid_surgery.views import text as view

    out = view.console()
    out.print(repr(done), markup=False)
    for line in asked.ignored if asked is not None else ():
        out.print(f"not used of the probes' file: {line}", markup=False)
    for line in done.manifest["not_asked"]:
        out.print(f"not asked: {line}", markup=False)
    columns = ["gate", "state", "warns", "value", "low", "high", "warn", "fail", "unit", "n", "n_unit", "why"]
    shown = {"facts": None, "strata": None, "ripple_rates": None, "controls": None, "stream": None, "curve": None,
             "cost": None}  # fmt: skip
    out.print("\ngates", markup=False)
    view.show(out, done.gates, columns=columns)
    for name in shown:
        if name in done.tables and len(done.tables[name]):
            out.print(f"\n{name}", markup=False)
            view.show(out, done.tables[name], rows=rows or None)
    if len(done.tables.get("worst", ())):
        out.print("\nthe worst prompts, and what each model says", markup=False)
        worst = done.tables["worst"].assign(
            **{name: done.tables["worst"][name].map(repr) for name in ("text_before", "text_after")}
        )
        view.show(out, worst, columns=["rank", "stratum", "prompt", "kl_max", "text_before", "text_after"])
    for file in files:
        out.print(f"wrote {file}", markup=False)


def _limits(path: Path) -> dict[str, Any]:
    import resid_surgery as rs

    try:
        found = read_json(path, 1 << 20)
    except ValueError as error:
        raise rs.ArgumentError(f"{path} must be JSON, gate -> [warn, fail]; {error}.") from None
    if not isinstance(found, dict):
        raise rs.ArgumentError(f"{path} must be a JSON object, gate -> [warn, fail]; got a {type(found).__name__}.")
    return found


@app.command()
def exposure(
    base: Base,
    edited: Edited,
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Text lines, or JSON lines with a text each.")],
    top: Annotated[int, typer.Option(min=1, help="How many contexts to keep.")] = 50,
    limit: Annotated[int | None, typer.Option("--tokens", min=1, help="Read so many tokens at most.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file to write.")] = None,
    rows: Rows = 40,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Where in your texts an edit acts: every context ranked by exposure, read once, in bounded memory."""
    import resid_surgery as rs
    from resid_surgery.views.files import write_table

    if out is not None and not out.parent.is_dir():
        raise rs.ArgumentError(f"the folder of {out} must exist, so that the table can be written there.")
    opened = load(base, dtype, device)
    change = rs.read_edit(opened, edited)
    table = rs.exposure(opened, change, corpus, top=top, tokens=limit)
    if out is not None:
        write_table(out, table)
    show(table, rows, as_json, heading=repr(change), files=[] if out is None else [out])


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A report that `validate --report` wrote.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another one.")],
    rows: Rows = 40,
    as_json: AsJson = False,
) -> None:
    """Two validations gate by gate; refused (exit code 2) where they did not ask the same. It compares, and judges
    nothing: exit code 0 whatever the verdicts are."""
    import resid_surgery as rs

    one, other = (rs.Validation.from_json(path) for path in (before, after))
    with busy("comparing"):
        table = rs.diff_reports(one, other)
    show(
        table,
        rows,
        as_json,
        heading=f"{one.verdict} -> {other.verdict}",
        extra={"before": str(before), "after": str(after)},
    )

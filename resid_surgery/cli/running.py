"""Commands that carry plans out on many prompts, look at how far they are, and go on with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from resid_surgery.cli.common import AsJson, Device, Dtype, Rows, app, load, print_json, show, stoppable

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")]
OtherModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A name, hub id, folder or .gguf file; default: what the plan's file "
                 "names (else smollm2-135m), or what the run was on."),
]  # fmt: skip
Executor = Annotated[str, typer.Option(help="local (this process) or ray (needs resid-surgery[ray]).")]
Workers = Annotated[int | None, typer.Option(min=1, help="Of ray: how many actors; default: one a core, or a GPU.")]
Address = Annotated[str | None, typer.Option(help="Of ray: a cluster's address; default: this machine.")]
Gpus = Annotated[float, typer.Option("--num-gpus", min=0, help="Of ray: GPUs an actor.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run prompts again that failed before.")]
MostFailures = Annotated[
    str, typer.Option("--max-failures", help="Stop after more failures: a number, a share such as 0.1, or none.")
]
SaveEvery = Annotated[float, typer.Option("--save-every", min=0, help="Seconds after which results are written.")]

LEVELS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "int64": int,
    "double": float,
    "bool": lambda one: bool(("false", "true").index(one.lower())),
}


@app.command()
def run(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help='A plan\'s .json file; may also hold "model", "dtype", "device" and "prompts".'
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for results; a run that is in it goes on.")],
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help='JSON lines: {"text": ..., "target": ..., "versus": [...]}; more keys: labels.'),
    ] = None,
    facts: Annotated[
        list[str] | None, typer.Option("--facts", help="Built-in facts that the model knows; repeat for more.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each kind or file.")] = None,
    model: OtherModel = None,
    executor: Executor = "local",
    workers: Workers = None,
    address: Address = None,
    num_gpus: Gpus = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run that is in the folder, or refuse it.")
    ] = True,
    retry: Retry = False,
    max_failures: MostFailures = "0.1",
    save_every: SaveEvery = 10.0,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Carry a plan out on many prompts: resumable at any instant, on this machine or on Ray.

    Exit code 1 if the run was stopped (by failures, a full disk), 130 by Ctrl-C; what is finished is kept.
    """
    import resid_surgery as rs

    wanted, beside = rs.read_plan(plan)
    given = sum(source is not None for source in (prompts, facts or None))
    if given > 1:
        raise rs.ArgumentError("either `--facts` or `--prompts` may be given, and not both.")
    budget, engine = _budget(max_failures), _engine(executor, workers, address, num_gpus)
    source = {"facts": facts} if facts else str(prompts.resolve()) if prompts else beside.get("prompts")
    read = _reader(source, plan.parent, limit)
    opened = load(
        model or beside.get("model") or "smollm2-135m", dtype or beside.get("dtype"), device or beside.get("device")
    )
    with stoppable():
        done = rs.run(
            opened, read(opened), wanted, out=out, executor=engine, resume=resume, retry=retry, max_failures=budget,
            save_every=save_every,
        )  # fmt: skip
    _show_status(done, as_json)


@app.command()
def status(
    out: Folder,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Means with bootstrap intervals by this column; repeat for more.")
    ] = None,
    value: Annotated[str, typer.Option(help="The column to average, with --by.")] = "log_prob_change",
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="COLUMN=VALUE: paired differences from these rows; repeat for more."),
    ] = None,
    failures: Annotated[bool, typer.Option("--failures", help="The prompts that failed, and why.")] = False,
    rows: Rows = 40,
    as_json: AsJson = False,
) -> None:
    """How far a run is, finished or not; its failures; and summaries of its results by group."""
    import resid_surgery as rs

    found = rs.open_run(out)
    if failures and by:
        raise rs.ArgumentError("`--failures` and `--by` do not go together.")
    if against and not by:
        raise rs.ArgumentError("`--against` goes with `--by`.")
    if failures:
        table = found.failures.drop(columns=[] if as_json else ["traceback"])
        show(table, rows, as_json, heading=repr(found), extra={"status": found.status})
        return
    if by:
        table = found.summary(by, value, against=_levels(found, against) or None)
        show(
            table, rows, as_json, heading=f"{found!r}\nmean {value} by {', '.join(by)}", extra={"status": found.status}
        )
        return
    _show_status(found, as_json)


@app.command()
def resume(
    out: Folder,
    model: OtherModel = None,
    executor: Executor = "local",
    workers: Workers = None,
    address: Address = None,
    num_gpus: Gpus = 0.0,
    retry: Retry = False,
    max_failures: MostFailures = "0.1",
    save_every: SaveEvery = 10.0,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Go on with a run from its folder alone: its plan and prompts are in it.

    Exit codes as of `run`.
    """
    import resid_surgery as rs

    found = rs.open_run(out)
    budget, engine = _budget(max_failures), _engine(executor, workers, address, num_gpus)
    origin = found.manifest.get("origin") or {}
    source = model or origin.get("model")
    if source is None:
        raise rs.ArgumentError(f"{out} was run on a model object, which no name leads to; give it with `--model`.")
    opened = load(source, dtype or origin.get("dtype"), device)
    with stoppable():
        done = rs.run(
            opened, rs.read_cases(out / "prompts.jsonl"), rs.Plan.of(found.manifest["plan"]), out=out, executor=engine,
            retry=retry, max_failures=budget, save_every=save_every,
        )  # fmt: skip
    _show_status(done, as_json)


def _reader(source: Any, beside: Path, limit: int | None) -> Any:
    """What gives the prompts once the model is open; files are read at once."""
    import resid_surgery as rs

    if isinstance(source, str):
        cases = rs.read_cases(beside / source)[:limit]
        return lambda _: cases
    if isinstance(source, list):
        return lambda _: source[:limit]
    if isinstance(source, dict) and set(source) <= {"facts", "limit"} and source.get("facts"):
        kinds, most = source["facts"], limit or source.get("limit")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for kind in kinds:
            rs.facts(kind)  # refused before a model is loaded
        return lambda model: [
            rs.Case(prompt, {"facts": kind}) for kind in kinds for prompt in rs.facts(kind, model=model)[:most]
        ]
    raise rs.ArgumentError(
        'prompts must be given: with `--prompts` or `--facts`, or in the plan\'s file as "prompts": a list, the path '
        'of a file of JSON lines, or {"facts": ["capital"]}.'
    )


def _budget(text: str) -> float | int | None:
    import resid_surgery as rs

    if text == "none":
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise rs.ArgumentError(f"`--max-failures` must be a number, a share in 0..1, or none; got {text!r}.") from None


def _engine(executor: str, workers: int | None, address: str | None, num_gpus: float) -> Any:
    import resid_surgery as rs

    if executor == "ray":
        return rs.OnRay(workers=workers, address=address, num_gpus=num_gpus)
    if workers is not None or address is not None or num_gpus:
        raise rs.ArgumentError("`--workers`, `--address` and `--num-gpus` go with `--executor ray`.")
    return executor


def _levels(found: Any, given: list[str] | None) -> dict[str, Any]:
    """Column -> level of ``--against``, in the column's own type."""
    import resid_surgery as rs

    types, levels = found.manifest["tables"].get("rows", {}), {}
    for text in given or []:
        name, equals, level = text.partition("=")
        if not equals or name not in types:
            raise rs.ArgumentError(f"`--against` must be COLUMN=VALUE with a column of the rows; got {text!r}.")
        try:
            levels[name] = LEVELS[types[name]](level)
        except ValueError:
            raise rs.ArgumentError(f"`--against {name}` must be of type {types[name]}; got {level!r}.") from None
    return levels


def _show_status(found: Any, as_json: bool) -> None:
    import pandas as pd

    state, manifest = found.status, found.manifest
    about = {
        "out": str(found.out),
        "model": manifest["model"]["name"],
        "dtype": manifest["model"]["dtype"],
        "plan": manifest["plan_hash"],
        "sessions": len(manifest["sessions"]),
        **state,
    }
    if as_json:
        print_json({"status": about}, {}, [])
        return
    who = state["running"]
    about["running"] = f"process {who['pid']} on {who['host']}" if who else "nobody"
    table = pd.DataFrame({"what": list(about), "value": [str(value) for value in about.values()]})
    show(table, 0, False, heading=repr(found))

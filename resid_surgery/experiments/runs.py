"""Runs: a plan carried out on many prompts, resumable at any instant.

1. The plan and every prompt are checked; what cannot be run at all is refused before any forward.
2. The folder is locked, its manifest compared (or written), and what an interrupted run left unfinished removed.
3. Groups of prompts of one length are handed to the executor; outcomes come back one prompt at a time.
4. Finished outcomes are written as a shard every few seconds, and whenever the run stops, for whatever reason that
   lets it: done, Ctrl-C, SIGTERM, too many failures, an error. After SIGKILL the last few seconds are missing, no more.
"""

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from resid_surgery import _check
from resid_surgery.errors import ArgumentError, RunError
from resid_surgery.experiments.cases import Case, as_cases, hash_of, lines_of
from resid_surgery.experiments.checking import Checked, check
from resid_surgery.experiments.crew import Crew
from resid_surgery.experiments.executors import Executor, Local
from resid_surgery.experiments.folder import LOG, PROMPTS, SCHEMA, WHAT, Folder, machine, moment, together
from resid_surgery.experiments.interrupts import Interrupts
from resid_surgery.experiments.on_ray import OnRay
from resid_surgery.experiments.plans import Plan, differences
from resid_surgery.experiments.reading import Run
from resid_surgery.experiments.tables import schemas
from resid_surgery.experiments.watching import Watch, allowed_failures, logged
from resid_surgery.experiments.work import Outcome, Worker
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.remoting import Where, need_place
from resid_surgery.models.standing import standing
from resid_surgery.stream.loading import load
from resid_surgery.stream.recording import need_model

SECONDS = 10.0
ROWS = 50_000
IDLE = ("transformers_version", "architectures", "torch_dtype", "dtype", "quantization_config", "use_cache")
PACKAGES = ("resid-surgery", "torch", "transformers", "nnsight", "pandas", "pyarrow", "numpy")


def run(
    model: Any,
    prompts: Iterable[Any],
    plan: Any,
    *,
    out: Any,
    executor: Any = "local",
    resume: bool = True,
    retry: bool = False,
    max_failures: float | int | None = 0.1,
    save_every: float = SECONDS,
    progress: bool | None = None,
    remote: Where = None,
) -> Run:
    """Carry a plan out on many prompts; results go to a folder of Parquet files, and the run can be resumed.

    Args:
        model: from `resid_surgery.load`, or what that takes (a name, a folder).
        prompts: any number of `Prompt`, `Case`, or mappings ``{"text": ..., "target": ..., "versus": [...]}`` whose
            further keys become columns. Prompts of one length are recorded together, without padding.
        plan: a `Plan`, or a mapping of its fields.
        out: the folder; made if need be. What it holds: see `resid_surgery.read_run`.
        executor: "local" (this process), "ray" (a worker a core of this machine), or an `OnRay` that says where and
            how many.
        resume: go on with the run that is in the folder, skipping what is done; False refuses a folder with a run.
        retry: run those prompts again that failed before.
        max_failures: how many prompts may fail before the run is stopped: a number, a share of all (rounded up), or
            None. A prompt that fails is a row of the table "failures", and the run goes on.
        save_every: seconds after which finished prompts are written down.
        progress: a bar on stderr (rate, time left, failures); None shows it on a terminal.
        remote: where forwards run, as for `resid_surgery.record`; goes with the local executor.

    Returns:
        `Run`: where the results are, how many there are, and ways to read them.

    Raises:
        ArgumentError, SiteError, PromptError, InterventionError: the plan does not fit the model, or no prompt can be
            run; before any forward.
        RunError: the folder belongs to another plan, other prompts or another model (what differs is named), another
            process writes to it, too many prompts failed, the disk is full. What is finished is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is finished was written, and the message says how to go on.

    Example:
        >>> import tempfile, resid_surgery as rs
        >>> prompts = [rs.Prompt(ids=[5, 4, 3], target=1), rs.Prompt(ids=[9, 8], target=2)]
        >>> plan = rs.Plan(intervene=[{"kind": "Zero", "sites": "L*.mlp", "each": True}])
        >>> with tempfile.TemporaryDirectory() as out:
        ...     table = rs.run(rs.load(rs.tiny("llama")), prompts, plan, out=out).rows
        >>> table.groupby("prompt").size().tolist()
        [4, 4]
    """
    _check.progress(progress)
    folder, wanted, cases = Folder.of(out), Plan.of(plan), as_cases(prompts)
    _check_options(resume, retry, save_every)
    allowed = allowed_failures(max_failures, len(cases))
    engine = _engine(executor)
    opened = model if isinstance(model, OpenedModel) else load(model)
    need_model(opened)
    place = need_place(opened, remote)
    if place is not None and engine is not None:
        raise ArgumentError("`remote` goes with executor='local': the server is where the work is spread.")
    checked = check(opened, wanted, cases)
    tables = schemas(wanted, cases, checked.versus)
    manifest = _manifest(opened, wanted, cases, tables, checked)
    if folder.begun and not resume:
        raise RunError(
            f"{folder.path} holds a run already; leave `resume` on to go on with it, or give another folder."
        )
    with Interrupts() as interrupts, folder.locked(), logged(folder.log) as log:
        before = _begin(folder, manifest | {"sessions": [_session(opened, executor)]}, cases, log)
        finished = {number for number, status in before.items() if not (retry and status == "failed")}
        worker = Worker(opened, wanted, tables, place)
        watch = _watch(len(cases), allowed, log, before, finished)
        book = _Book(folder, tables, watch, interrupts, save_every)
        with watch.shown(progress), closing(_executor(engine, worker)) as crew:
            _carry_out(book, worker, crew, cases, checked, finished)
    return Run(folder.path)


class _Book:
    """Keeps outcomes until they are written down."""

    def __init__(
        self, folder: Folder, tables: Mapping[str, Any], watch: Watch, interrupts: Interrupts, every: float
    ) -> None:
        self.folder, self.tables, self.watch, self.interrupts, self.every = folder, tables, watch, interrupts, every
        self.held: list[Outcome] = []
        self.rows = 0
        self.last = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        """Take an outcome; write down what is held when it is time."""
        self.held.append(outcome)
        self.watch.see(outcome)
        self.rows += sum(len(table) for table in outcome.tables.values())
        if time.monotonic() - self.last >= self.every or self.rows >= ROWS:
            self.save()

    def save(self) -> None:
        """Write down what is held."""
        with self.interrupts.shield():
            if self.held:
                shard = self.folder.commit(together([one.tables for one in self.held], self.tables))
                self.watch.log.info("%s: %d prompts; %s", shard, len(self.held), self.watch.summary())
                self.held, self.rows = [], 0
            self.last = time.monotonic()


def _carry_out(
    book: _Book, worker: Worker, crew: Executor, cases: Sequence[Case], checked: Checked, finished: Collection[int]
) -> None:
    watch = book.watch
    groups = [[(number, cases[number]) for number in some] for some in checked.groups if set(some) - set(finished)]
    try:
        for number, error in checked.bad.items():
            if number not in finished:
                book.add(worker.failed(number, cases[number], "prompt", error))
        watch.require_budget()
        for outcome in crew.outcomes(groups, finished):
            book.add(outcome)
            watch.require_budget()
    except KeyboardInterrupt:
        book.interrupts.obey()
        book.save()
        said = f"stopped: {watch.summary()}. What is finished is in {book.folder.path}; {_how(book.folder)}."
        watch.log.warning(said)
        raise KeyboardInterrupt(said) from None
    except BaseException as error:
        watch.log.error("stopped by %s: %s", type(error).__name__, error)
        _save_if_possible(book)
        raise
    book.save()
    watch.log.info("finished: %s", watch.summary())


def _save_if_possible(book: _Book) -> None:
    """Write down what is held, unless that is what failed."""
    try:
        book.save()
    except RunError as error:
        book.watch.log.error("what was held could not be written: %s", error)


def _how(folder: Folder) -> str:
    return f"go on with `resid-surgery resume {folder.path}`, or with the same call of rs.run"


def _engine(given: Any) -> OnRay | None:
    """How Ray is to be used; None for this process."""
    if isinstance(given, str):
        return OnRay() if _check.choice("executor", given, ("local", "ray")) == "ray" else None
    if isinstance(given, OnRay):
        return given
    raise ArgumentError(_check.message("executor", "'local', 'ray' or an OnRay", given))


def _executor(engine: OnRay | None, worker: Worker) -> Executor:
    return Local(worker) if engine is None else Crew(engine, worker)


def _check_options(resume: Any, retry: Any, save_every: Any) -> None:
    for name, value in (("resume", resume), ("retry", retry)):
        _check.flag(name, value)
    if _check.finite("save_every", save_every) < 0:
        raise ArgumentError(_check.message("save_every", "a number of seconds >= 0", save_every))


def _watch(
    total: int, allowed: int | None, log: logging.Logger, before: Mapping[int, str], finished: Collection[int]
) -> Watch:
    counts = [before[number] for number in finished]
    return Watch(total, allowed, log, counts.count("done"), counts.count("failed"), counts.count("unknown"))


def _manifest(
    model: OpenedModel, plan: Plan, cases: Sequence[Case], tables: Mapping[str, Any], checked: Checked
) -> dict[str, Any]:
    """What a run is; two that agree in "model", "plan" and "prompts" are one."""
    a = model.anatomy
    return {
        "schema": SCHEMA,
        "what": WHAT,
        "model": {"name": model.name, "fingerprint": model.weights.contents(), "config": _config_hash(model),
                  "family": a.layout.family,
                  "dtype": str(model.dtype).removeprefix("torch."), "n_layers": a.n_layers, "d_model": a.d_model},
        "plan": plan.entry(),
        "plan_hash": plan.hash,
        "prompts": {"number": len(cases), "hash": hash_of(cases), "tokens": checked.tokens},
        "seed": plan.seed,
        "tables": {name: {one.name: str(one.type) for one in schema} for name, schema in tables.items()},
        "origin": _origin(model),
    }  # fmt: skip


def _config_hash(model: OpenedModel) -> str:
    """Hash of what the model's configuration says about its forward (positions, norms, caps), not of where it lies."""
    config = getattr(model.module, "config", None)
    held = {} if config is None or not hasattr(config, "to_dict") else config.to_dict()
    kept = {name: value for name, value in held.items() if not name.startswith("_") and name not in IDLE}
    return xxhash.xxh3_64_hexdigest(json.dumps(kept, sort_keys=True, default=str).encode())


def _origin(model: OpenedModel) -> dict[str, Any] | None:
    """What `load` opens the model from again; None for an object, or one changed since."""
    given = model.origin
    if given is None or given["tokenizer"] is not None or given["anatomy"] is not None or model.changed:
        return None
    path = Path(given["model"]).expanduser()
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": str(path.resolve()) if path.exists() else str(given["model"]), "dtype": dtype}


def _session(model: OpenedModel, executor: Any) -> dict[str, Any]:
    """What does the work this time, as far as the last digits of numbers depend on it; and what stands beside the
    model's weights, which with other versions has another hash."""
    return {"started": moment(), "versions": {name: version(name) for name in PACKAGES}, **machine(),
            "device": str(model.device), "threads": torch.get_num_threads(), "executor": str(executor),
            "standing": standing(model.module).hash}  # fmt: skip


def _begin(folder: Folder, manifest: dict[str, Any], cases: Sequence[Case], log: logging.Logger) -> dict[int, str]:
    """Write the manifest, or compare it with the one that is there; what is dealt with already.

    Raises:
        RunError: it is another run's; what differs is named.
    """
    if not folder.begun:
        strange = [
            one.name for one in folder.path.iterdir() if not one.name.startswith(".") and one.name not in (PROMPTS, LOG)
        ]
        if strange:
            raise RunError(
                f"{folder.path} is not empty and holds no run ({strange[0]} is in it); give a folder of its own."
            )
        folder.clear()
        folder.write(PROMPTS, lines_of(cases))
        folder.write_manifest(manifest)
        log.info("begun: %d prompts on %s", len(cases), manifest["model"]["name"])
        return {}
    held = folder.manifest()
    odd = [line for name in ("model", "plan", "prompts", "tables")
           for line in differences(held.get(name), manifest[name], name)]  # fmt: skip
    if [line.partition(":")[0] for line in odd] == ["model.name"]:  # a folder that was moved
        log.warning("the model was called %s, and is %s now", held["model"]["name"], manifest["model"]["name"])
        odd = []
    if odd:
        more = f" (and {len(odd) - 3} more)" if len(odd) > 3 else ""
        raise RunError(
            f"{folder.path} holds another run: {'; '.join(odd[:3])}{more}. Give the plan, prompts and model that it "
            "was begun with, or another folder."
        )
    last, this = held["sessions"][-1], manifest["sessions"][-1]
    changed = differences(last["versions"], this["versions"], "versions")
    if not changed and last.get("standing", this["standing"]) != this["standing"]:
        raise RunError(
            f"{folder.path} was begun with other modules, hooks or settings of {manifest['model']['name']} (an adapter "
            "that was switched, say), so its rows would be of two models. Take the change back, or give another folder."
        )
    removed = folder.clear()
    before = folder.statuses()
    folder.write_manifest(held | {"sessions": held["sessions"] + manifest["sessions"]})
    if changed:
        log.warning("other versions than before, so last digits can differ: %s", "; ".join(changed))
    log.info("resumed: %d of %d prompts were dealt with, %d unfinished files removed", len(before), len(cases), removed)
    return before

"""Reading: a run's results as tables, column by column, also while it is still running."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from resid_surgery import _check
from resid_surgery._html import face_html
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.statistics import bootstrap
from resid_surgery.experiments.folder import Folder
from resid_surgery.experiments.tables import LEDGER, TABLES, frame, reading


@final
@dataclass(frozen=True)
class Run:
    """A run in its folder, finished or not; made by `resid_surgery.run` and `resid_surgery.open_run`.

    Attributes:
        out: the folder.
    """

    out: Path

    def __repr__(self) -> str:
        s = self.status
        failed = f", {s['failed']} failed" if s["failed"] else ""
        return f"Run({str(self.out)!r}: {s['done']} of {s['prompts']} prompts done{failed}, {s['rows']} rows)"

    def _repr_html_(self) -> str:
        return face_html(repr(self), self.status)

    @property
    def manifest(self) -> dict[str, Any]:
        """Model, plan, prompts, columns, and every session that worked on it."""
        return Folder(self.out).manifest()

    @property
    def status(self) -> dict[str, Any]:
        """How far it is: prompts, done, failed, unknown, left, rows, shards, bytes, running (who writes), finished."""
        folder = Folder(self.out)
        running, shards = folder.running, folder.shards()  # in this order: all else is of these shards
        dealt = folder.ledger(shards)
        said = [status for status, _ in dealt.values()]
        total = folder.manifest()["prompts"]["number"]
        counts = {name: said.count(name) for name in ("done", "failed", "unknown")}
        files = [self.out / name / f"{shard}.parquet" for name in TABLES for shard in shards]
        return {"prompts": total, **counts, "left": total - len(dealt), "rows": sum(rows for _, rows in dealt.values()),
                "shards": len(shards), "bytes": sum(file.stat().st_size for file in files if file.exists()),
                "running": running, "finished": len(dealt) == total}  # fmt: skip

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of its tables."""
        return tuple(self.manifest["tables"])

    @property
    def rows(self) -> pd.DataFrame:
        """What was measured, one row an operation (or several together) on a prompt."""
        return self.read("rows")

    @property
    def failures(self) -> pd.DataFrame:
        """Prompts that failed and were not run again since, with stage, error, message and traceback."""
        return self.read("failures")

    def dataset(self, table: str = "rows") -> ds.Dataset:
        """A table as a Parquet dataset (pyarrow), for what does not fit into memory; nothing of it is read yet.

        Raises:
            ArgumentError: the run has no such table. LoadError: a shard is damaged, missing, or another run's.
        """
        return Folder(self.out).dataset(table)

    def read(
        self, table: str = "rows", *, columns: Sequence[str] | None = None, where: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """A table, or some columns and rows of it; see `resid_surgery.read_run`."""
        found = self.dataset(table)
        wanted = _columns(columns, found.schema.names, table)
        order = [name for name in ("prompt", "row", "set", "rank") if name in found.schema.names]
        needed = list(dict.fromkeys([*wanted, *order]))
        wheres = _filter(where, found.schema)
        if table in (LEDGER, "failures"):  # what was said before a retry is dropped before anything is chosen
            needed = list(dict.fromkeys([*needed, *(where or ())]))
            with reading(self.out):
                arrow = found.to_table(columns=needed)
            arrow = self._last_word(arrow, table)
            arrow = arrow if wheres is None else arrow.filter(wheres)
        else:
            with reading(self.out):
                arrow = found.to_table(columns=needed, filter=wheres)
        keys = [(name, "ascending") for name in order if name in ("prompt", "row")]
        at = (
            pc.sort_indices(arrow, sort_keys=keys)
            if table in ("rows", LEDGER, "failures", "effects")
            else _stable(arrow)
        )
        result = frame(arrow.take(at).select(wanted))
        result.attrs["run"] = str(self.out)
        return result

    def summary(
        self, by: str | Sequence[str], value: str = "log_prob_change", *, table: str = "rows", **options: Any
    ) -> pd.DataFrame:
        """Means with bootstrap intervals over prompts, one row a group; only the columns that it takes are read.

        Args:
            by, value, options: of `resid_surgery.bootstrap` (``against=`` for paired differences). table: which.
        """
        if not isinstance(by, (str, list, tuple)):
            raise ArgumentError(_check.message("by", "a column, or a list of columns", by))
        groups = [by] if isinstance(by, str) else list(by)
        against = options.get("against")
        extra = [name for name in against if name not in groups] if isinstance(against, Mapping) else []
        unit = options.get("unit", "prompt")
        found = self.read(table, columns=[*groups, *extra, value, unit])
        if found[value].isna().all():
            raise ArgumentError(f"{self!r} has no {value} in table {table!r} to average yet; see its status.")
        return bootstrap(found, groups, value, **options)

    def _last_word(self, arrow: pa.Table, table: str) -> pa.Table:
        """Without what a prompt that was run again said before."""
        plain = arrow["prompt"].to_pylist()
        if table == "failures":
            now = Folder(self.out).statuses()
            keep = {n: i for i, n in enumerate(plain) if now.get(n) == "failed"}
        else:
            keep = {n: i for i, n in enumerate(plain)}
        return arrow.take(pa.array(sorted(keep.values()), pa.int64()))


def open_run(out: Any) -> Run:
    """A run in a folder, finished, stopped or still running.

    Args:
        out: the folder that `resid_surgery.run` was given.

    Raises:
        LoadError: there is no run in it. ArgumentError: no path of a folder.
    """
    folder = Folder.of(out)
    folder.manifest()
    return Run(folder.path)


def read_run(
    out: Any, *, table: str = "rows", columns: Sequence[str] | None = None, where: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """Read a run's results; only the columns and shards that are asked for are read from disk.

    Args:
        out: the folder that `resid_surgery.run` was given.
        table: "rows" (what was measured), "prompts" (clean values, status), "located" (sites found), "effects" (splits
            by token), "failures".
        columns: which; None for all. where: column -> value, or list of values, that rows must have.

    Returns:
        One row as the table says, ordered by prompt and row: the same whatever the order of the work, its
        interruptions and the executor. Columns of "rows": prompt, row, text, target, labels of the prompts, arm, axes,
        operation, site, kind, layer, head, index, source, expert, position, token, size (sites), then those of
        `resid_surgery.sweep`: bs_target, bs_change_target, ... (logits), log_prob, log_prob_change, kl (nats), prob.

    Raises:
        LoadError: there is no run in it. ArgumentError: no such table or column.
    """
    return open_run(out).read(table, columns=columns, where=where)


def _columns(given: Any, there: Sequence[str], table: str) -> list[str]:
    if given is None:
        return list(there)
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ArgumentError(_check.message("columns", "None, or a list of columns", given))
    return list(dict.fromkeys(_check.choice(f"columns of {table}", name, there) for name in given))


def _filter(where: Any, schema: pa.Schema) -> Any:
    if where is None:
        return None
    if not isinstance(where, Mapping):
        raise ArgumentError(_check.message("where", "None, or column -> value", where))
    found = None
    for name, value in where.items():
        _check.choice("where", name, schema.names)
        values = list(value) if isinstance(value, (list, tuple, set)) else [value]
        kind = schema.field(name).type
        plain = [some for some in values if some is not None]
        try:
            held = pa.array(plain, kind)
            if held.to_pylist() != plain:
                raise pa.ArrowInvalid("cut to whole numbers, or NaN")
            one = pc.field(name).isin(held)
            one = one | pc.field(name).is_null() if None in values else one
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ArgumentError(_check.message(f"where {name}", f"of type {kind}", value)) from error
        found = one if found is None else found & one
    return found


def _stable(arrow: pa.Table) -> pa.Array:
    """Order by prompt, and within one as it was written."""
    numbered = pa.table({"prompt": arrow["prompt"], "at": pa.array(range(len(arrow)), pa.int64())})
    return pc.sort_indices(numbered, sort_keys=[("prompt", "ascending"), ("at", "ascending")])

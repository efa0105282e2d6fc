"""Folder: where a run's results are kept: nothing half-written, nothing twice, nothing lost that was finished.

``manifest.json``, ``prompts.jsonl`` and one folder of Parquet files a table. A *shard* is one file of the same name in
each of these folders; it is finished when its file in ``prompts/`` stands there, which is moved into place last, after
all others. Every file is written beside its place, forced to the disk and moved: what is there is whole. Files of a
shard that was never finished are not read, and removed when the run goes on. One process at a time holds the lock.

Nothing that is read is believed as it stands: pages have checksums, and the file that finishes a shard has a *mark*
that says which run and shard it is of, and what the footers of the shard's other files were, with a hash of its own.
The run's name in it is a hash of what the manifest says it is.
"""

import errno
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, final

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from resid_surgery import _check
from resid_surgery._files import read_json, utf8, whole
from resid_surgery.errors import ArgumentError, LoadError, RunError
from resid_surgery.experiments.tables import (
    AGAIN,
    LEDGER,
    TABLES,
    TYPES,
    footer_hash,
    mark_of,
    marked,
    reading,
    schema_of,
)

SCHEMA = 3
WHAT = "resid_surgery run"
MANIFEST, PROMPTS, LOG, LOCK, OWNER = "manifest.json", "prompts.jsonl", "run.log", ".lock", ".owner.json"
LARGEST_BYTES = 1 << 26
STATUSES = {"done", "failed", "unknown"}
HELD: dict[str, type | tuple[type, ...]] = {
    "model": dict, "plan": dict, "plan_hash": str, "prompts": dict, "tables": dict, "sessions": list,
    "origin": (dict, NoneType),
}  # fmt: skip
CHECKED = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
PATIENCE = 1.0  # seconds: who only looks whether a run is going on holds the lock for a moment


@final
@dataclass(frozen=True)
class Folder:
    """A run's folder.

    Attributes:
        path: of the folder.
    """

    path: Path

    @classmethod
    def of(cls, out: Any) -> "Folder":
        """A folder from a path; nothing is made.

        Raises:
            ArgumentError: it is no path, or the path of a file.
        """
        path = _check.path("out", out, "the path of a folder", home=True).absolute()
        if path.exists() and not path.is_dir():
            raise ArgumentError(_check.message("out", "the path of a folder, not of a file", str(out)))
        return cls(path)

    @property
    def log(self) -> Path:
        """The log file."""
        return self.path / LOG

    @property
    def begun(self) -> bool:
        """Whether there is a run in it."""
        return (self.path / MANIFEST).exists()

    @property
    def running(self) -> dict[str, Any] | None:
        """Who is writing to it at this moment (pid, host, since), or None."""
        lock = FileLock(self.path / LOCK, timeout=0)
        if not (self.path / LOCK).exists() or (self.path / LOCK).is_symlink():
            return None
        try:
            with lock:
                return None
        except Timeout:
            return self._owner()
        except OSError:  # a folder that this process may only read
            return None

    def manifest(self) -> dict[str, Any]:
        """What the run is.

        Raises:
            LoadError: there is no run, or one of another version.
        """
        file = self.path / MANIFEST
        try:
            body = read_json(file, LARGEST_BYTES)
        except FileNotFoundError:
            raise LoadError(f"{self.path} holds no run: there is no {MANIFEST} in it.") from None
        except (OSError, ValueError) as error:
            raise LoadError(f"{file} cannot be read: {error}.") from error
        if not isinstance(body, dict) or body.get("what") != WHAT or body.get("schema") != SCHEMA:
            raise LoadError(f"{file} is no manifest of a run with schema {SCHEMA}.")
        if (odd := next(_faults(body), None)) is not None:
            raise LoadError(f"{file} is damaged: {odd}.")
        return body

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The only process that writes; the folder is made if need be.

        Raises:
            RunError: another process writes to it, or it cannot be made or written to.
        """
        lock = FileLock(self.path / LOCK, timeout=PATIENCE)
        self._need_own_places()
        try:
            with self._writing("the lock"):
                self.path.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout:
            owner = self._owner()
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
            raise RunError(
                f"{self.path} is being written to by {who}. Wait for it, stop it, or give another folder."
            ) from None
        try:
            now = {"pid": os.getpid(), "host": socket.gethostname(), "since": moment()}
            self.write(OWNER, utf8(json.dumps(now)))
            yield
        finally:
            with suppress(OSError):
                (self.path / OWNER).unlink(missing_ok=True)
            lock.release()

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's own files, whole or not at all.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        with self._writing(name):
            whole(self.path / name, lambda part: part.write_bytes(content), durable=True)

    def write_manifest(self, body: Mapping[str, Any]) -> None:
        """Write the manifest, whole or not at all."""
        self.write(MANIFEST, utf8(json.dumps(body, ensure_ascii=False, indent=1) + "\n"))

    def commit(self, tables: Mapping[str, pa.Table]) -> str:
        """Write a shard; it counts from the moment its file among the prompts is in place.

        Args:
            tables: name -> rows; every prompt that was dealt with has one in "prompts".

        Returns:
            The shard's name.

        Raises:
            RunError: the disk is full or the folder cannot be written; what was finished before is as it was.
        """
        number = max((int(name[1:]) for name in self.shards()), default=-1) + 1
        shard = f"s{number:06d}"
        order = [name for name in TABLES if name != LEDGER and name in tables] + [LEDGER]
        mark = {"run": identity(self.manifest()), "shard": shard, "rows": len(tables[LEDGER])}
        footers: dict[str, str] = {}
        with self._writing(f"shard {shard}"):
            try:
                for name in order:
                    folder = self.path / name
                    folder.mkdir(exist_ok=True)
                    told = marked(tables[name], mark | {"footers": footers}) if name == LEDGER else tables[name]
                    footers[name] = footer_hash(whole(folder / f"{shard}.parquet", _writer(told), durable=True))
            except OSError:  # it may be in place, and yet not be on the disk
                with suppress(OSError):
                    (self.path / LEDGER / f"{shard}.parquet").unlink(missing_ok=True)
                raise
        return shard

    def shards(self) -> list[str]:
        """Names of the finished shards, in order."""
        folder = self.path / LEDGER
        return (
            sorted(one.stem for one in folder.glob("s*.parquet") if one.stem[1:].isdecimal()) if folder.is_dir() else []
        )

    def clear(self) -> int:
        """Remove what an interrupted run left unfinished; call it under the lock.

        Returns:
            How many files.
        """
        done, removed = set(self.shards()), 0
        for name in TABLES:
            folder = self.path / name
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.name.startswith(".s") or (file.suffix == ".parquet" and file.stem not in done):
                    file.unlink()
                    removed += 1
        for file in (one for name in (MANIFEST, PROMPTS, OWNER) for one in self.path.glob(f".{name}.*")):
            file.unlink()
            removed += 1
        return removed

    def dataset(self, table: str) -> ds.Dataset:
        """A table's finished shards as a Parquet dataset, of which nothing is read yet.

        Raises:
            ArgumentError: the run has no such table. LoadError: a shard is damaged, missing, or another run's.
        """
        said = self.manifest()
        _check.choice("table", table, tuple(said["tables"]))
        run, ledger = identity(said), schema_of(said, LEDGER)
        files = [file for shard in self.shards() if (file := self._need_shard(shard, table, run, ledger)) is not None]
        return ds.dataset([str(file) for file in files], format=CHECKED, schema=schema_of(said, table))

    def statuses(self) -> dict[int, str]:
        """Prompt number -> "done", "failed" or "unknown", of those that were dealt with; the last word counts."""
        return {number: status for number, (status, _) in self.ledger(self.shards()).items()}

    def ledger(self, shards: Sequence[str]) -> dict[int, tuple[str, int]]:
        """Prompt number -> (status, how many rows it has), by some shards; the last word counts.

        Raises:
            LoadError: a shard is damaged or another run's.
        """
        found: dict[int, tuple[str, int]] = {}
        said = self.manifest()
        run, held, total = identity(said), schema_of(said, LEDGER), said["prompts"]["number"]
        for shard in shards:
            file = self.path / LEDGER / f"{shard}.parquet"
            mark_of(file, shard, run, held)
            with reading(file):
                table = pq.read_table(file, columns=["prompt", "status", "rows"], page_checksum_verification=True)
            number, status, rows = (table[name].to_pylist() for name in ("prompt", "status", "rows"))
            if not all(n is not None and 0 <= n < total for n in number) or not {*status} <= STATUSES or None in rows:
                raise LoadError(f"{file} is damaged: it tells of prompts that the run does not have.")
            found |= dict(zip(number, zip(status, rows, strict=True), strict=True))
        return found

    def _need_shard(self, shard: str, table: str, run: str, ledger: pa.Schema) -> Path | None:
        """A table's file of a shard, if it is the one that the run wrote there; None where the shard has no row of it.

        Raises:
            LoadError: it is damaged, missing or another one.
        """
        footers = mark_of(self.path / LEDGER / f"{shard}.parquet", shard, run, ledger)
        file = self.path / table / f"{shard}.parquet"
        if table == LEDGER:
            return file
        if table not in footers:
            return None
        with reading(file):
            found = footer_hash(file)
        if found != footers[table]:
            raise LoadError(f"{file} is not what the run wrote there. {AGAIN}")
        return file

    def _need_own_places(self) -> None:
        """Refuse a folder whose own files lie elsewhere: what is written to them, or removed, would be there.

        Raises:
            RunError: one is a symbolic link.
        """
        for name in (*TABLES, MANIFEST, PROMPTS, LOG, LOCK, OWNER):
            if (self.path / name).is_symlink():
                raise RunError(f"{self.path / name} is a symbolic link; a run writes to a folder of its own only. "
                               "Remove the link, or give another folder.")  # fmt: skip

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Errors of the disk as a `RunError` that says what is lost, and what is not."""
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            full = "The disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "It cannot be written to"
            raise RunError(
                f"{self.path}: {what} could not be written ({error}). {full}; shards that were finished before are "
                "whole. Make room and resume the run."
            ) from error

    def _owner(self) -> dict[str, Any] | None:
        try:
            said = read_json(self.path / OWNER, LARGEST_BYTES)
        except (OSError, ValueError):
            return None
        return said if isinstance(said, dict) and {"pid", "host", "since"} <= said.keys() else None


def moment() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """What runs are carried out on, as far as numbers depend on it."""
    return {"host": socket.gethostname(), "platform": platform.platform(), "python": platform.python_version()}


def identity(manifest: Mapping[str, Any]) -> str:
    """A run's name in its shards: a hash of what makes it the run that it is."""
    told = [manifest[name] for name in ("model", "plan", "prompts", "tables")]
    return xxhash.xxh3_128_hexdigest(utf8(json.dumps(told, ensure_ascii=False)))


def _faults(body: dict[str, Any]) -> Iterator[str]:
    """What a manifest must hold to be read, and does not."""
    if odd := [name for name, kind in HELD.items() if name not in body or not isinstance(body[name], kind)]:
        yield f"it does not say its {odd[0]}"
        return
    if not body["sessions"] or not all(isinstance(one, dict) and "versions" in one for one in body["sessions"]):
        yield "it does not say who worked on it"
    if not all(isinstance(body["model"].get(name), str) for name in ("name", "dtype")):
        yield "it does not say what model was used"
    number = _check.index_of(body["prompts"].get("number"))
    if number is None or number < 1:
        yield "it does not say how many prompts there are"
    if LEDGER not in body["tables"] or not body["tables"].keys() <= {*TABLES}:
        yield f"its tables are {', '.join(body['tables']) or 'none'}"
    for name, columns in body["tables"].items():
        if not isinstance(columns, dict) or not all(kind in TYPES for kind in map(str, columns.values())):
            yield f"its table {name} has columns of no known type"


def together(tables: Sequence[Mapping[str, pa.Table]], schemas: Mapping[str, pa.Schema]) -> dict[str, pa.Table]:
    """The rows of many outcomes, table by table; tables without a row are left out, but for the prompts."""
    found = {name: pa.concat_tables([one[name] for one in tables if name in one] or [schema.empty_table()])
             for name, schema in schemas.items()}  # fmt: skip
    return {name: table for name, table in found.items() if len(table) or name == LEDGER}


def _writer(table: pa.Table) -> Callable[[Path], None]:
    return lambda part: pq.write_table(table, part, compression="zstd", write_page_checksum=True)

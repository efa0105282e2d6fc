"""Watching: how far a run is: a bar on a terminal, a log file, and a budget of failures."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resid_surgery import _check
from resid_surgery.errors import RunError
from resid_surgery.experiments.work import Outcome

FORMAT = "%(asctime)s %(levelname)s %(message)s"


@final
@dataclass(eq=False)
class Watch:
    """Counts outcomes, says so, and stops a run that fails too often.

    Attributes:
        total: prompts of the run. allowed: failures that do not stop it; None for any number.
        done, failed, unknown: so far, of this run and those that it resumes. rows, worked: of this process.
    """

    total: int
    allowed: int | None
    log: logging.Logger
    done: int = 0
    failed: int = 0
    unknown: int = 0
    rows: int = 0
    worked: int = 0
    started: float = field(default_factory=time.monotonic)
    _bar: Any = None
    _task: Any = None

    def see(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.worked += 1
        self.done += outcome.status == "done"
        self.failed += outcome.status == "failed"
        self.unknown += outcome.status == "unknown"
        self.rows += len(outcome.tables.get("rows", ()))
        if outcome.status == "failed":
            row = outcome.tables["failures"].to_pylist()[0]
            self.log.warning(
                "prompt %d failed (%s): %s: %s", outcome.number, row["stage"], row["error"], row["message"]
            )
        self._show()

    def require_budget(self) -> None:
        """Stop a run that fails too often.

        Raises:
            RunError: more prompts failed than are allowed.
        """
        if self.allowed is not None and self.failed > self.allowed:
            raise RunError(
                f"{self.failed} of {self.finished} prompts failed, more than the {self.allowed} that `max_failures` "
                "allows: the run was stopped. Look at rs.read_run(out, table='failures'), or allow more and resume."
            )

    @property
    def finished(self) -> int:
        """Prompts that were dealt with."""
        return self.done + self.failed + self.unknown

    @property
    def rate(self) -> float:
        """Prompts a second, of this process."""
        return self.worked / max(1e-9, time.monotonic() - self.started)

    def summary(self) -> str:
        """One line of how far the run is."""
        skipped = f", {self.unknown} not known to the model" if self.unknown else ""
        return (
            f"{self.finished} of {self.total} prompts ({self.done} done, {self.failed} failed{skipped}), "
            f"{self.rows} rows, {self.rate:.2g} prompts/s"
        )

    @contextmanager
    def shown(self, wanted: bool | None) -> Iterator[None]:
        """A bar on stderr, on a terminal only."""
        if wanted is False or not sys.stderr.isatty():
            yield
            return
        columns = (TextColumn("run"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                   TextColumn("{task.fields[failures]}"))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            self._bar, self._task = bar, bar.add_task("run", total=self.total, rate="", failures="")
            self._show()
            yield
        self._bar = None

    def _show(self) -> None:
        if self._bar is not None:
            failures = f"[red]{self.failed} failed" if self.failed else ""
            self._bar.update(self._task, completed=self.finished, rate=f"{self.rate:.2g}/s", failures=failures)


def allowed_failures(given: Any, total: int) -> int | None:
    """How many failures a budget allows: a number of prompts, or a share of all (rounded up).

    Raises:
        ArgumentError: it is neither.
    """
    if given is None:
        return None
    whole = _check.index_of(given)
    if whole is not None:
        return _check.whole("max_failures", whole, 0)
    share = _check.finite("max_failures", given)
    if not 0 <= share <= 1:
        _check.whole("max_failures", given, 0, do="Give a number of prompts, a share in 0..1, or None for no limit.")
    return math.ceil(share * total)


@contextmanager
def logged(path: Path) -> Iterator[logging.Logger]:
    """A logger that appends to a file; a full disk does not stop what it tells of."""
    log = logging.Logger(f"resid_surgery.run.{path}")
    handler = _Quiet(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(logging.Formatter(FORMAT))
    log.addHandler(handler)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        handler.quietly_close()


class _Quiet(logging.FileHandler):
    """A file handler that loses a line rather than the run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if the file can be opened."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Nothing: the run's own results say what happened."""

    def quietly_close(self) -> None:
        """Close the file, also on a full disk."""
        try:
            self.close()
        except OSError:
            self.stream = None

"""Progress on stderr, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from resid_surgery._check import flag, text, whole


@contextmanager
def progress(what: str, total: int, *, shown: bool | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields is called with a step's name, or with how many steps were done.

    Args:
        what: is going on. total: steps. shown: False for no bar; None for one on a terminal.

    Example:
        >>> with progress("prompts", 2, shown=False) as step:
        ...     step("the first")
        ...     step(done=1)
    """
    total = whole("total", total, 0)
    text("what", what)
    if shown is not None:
        flag("shown", shown)
    if shown is False or not sys.stderr.isatty():
        yield lambda name="", *, done=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def step(name: str = "", *, done: int = 1) -> None:
            bar.update(task, advance=done, description=f"{what}: {name}" if name else what)

        yield step

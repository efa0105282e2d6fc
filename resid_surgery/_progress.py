"""Progress on stderr, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields is called with a step's name, or with how many steps were done.

    Args:
        what: is going on. total: steps. shown: False for no bar.

    Example:
        >>> with progress("prompts", 2, shown=False) as step:
        ...     step("the first")
        ...     step(done=1)
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    hidden = not shown or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)

        def step(name: str = "", *, done: int = 1) -> None:
            bar.update(task, advance=done, description=f"{what}: {name}" if name else what)

        yield step

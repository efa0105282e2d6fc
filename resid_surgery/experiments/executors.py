"""Executors: who does the work. The local one does it here, one prompt after another; `on_ray` spreads it."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol, final

from resid_surgery.experiments.work import Numbered, Outcome, Worker

Group = Sequence[Numbered]


class Executor(Protocol):
    """Carries groups of prompts out, in any order."""

    def outcomes(self, groups: Sequence[Group], skip: Collection[int]) -> Iterator[Outcome]:
        """Each prompt's outcome once, as they come; numbers in `skip` are left out."""
        ...

    def close(self) -> None:
        """Let go of what the work was done with."""
        ...


@final
class Local:
    """One process, one model, one group after another."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def outcomes(self, groups: Sequence[Group], skip: Collection[int]) -> Iterator[Outcome]:
        """As `Executor` says; each outcome as soon as it is there."""
        for group in groups:
            yield from self.worker.run(group, skip)

    def close(self) -> None:
        """Nothing: the model is the caller's."""

"""Interrupts: Ctrl-C and SIGTERM stop a run at once, but never in the middle of writing down what is finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupts:
    """Handlers of a run's signals; in a thread other than the main one, signals are left as they are.

    Attributes:
        pending: one came while it was shielded from.
    """

    def __init__(self) -> None:
        self.pending = False
        self._shielded = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            heeded = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
            self._before = {one: signal.signal(one, self._handle) for one in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler if handler is not None else signal.SIG_DFL)

    def obey(self) -> None:
        """Heed no more of them: the run is stopping already, and only writes down what is finished."""
        self._shielded += 1

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What must not be cut short; a signal that comes meanwhile is obeyed afterwards."""
        self._shielded += 1
        try:
            yield
        finally:
            self._shielded -= 1
        if self.pending and not self._shielded:
            self.pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._shielded:
            self.pending = True
            return
        raise KeyboardInterrupt

"""Modes of a thread that must be as they were after a call, also when Ctrl-C comes at a bad moment.

torch's own context managers put the grad mode back in Python, where an interrupt can come before they have. It comes
but once: `GradKept` around them puts back what they left.
"""

import sys
from types import TracebackType

import torch


class GradKept:
    """In this block grad mode and the trace function (a debugger's, nnsight's) may change; after it they are as before.

    Stands left of what changes them: ``with GradKept(), torch.no_grad():``.
    """

    def __enter__(self) -> None:
        self._grad, self._function = torch.is_grad_enabled(), sys.gettrace()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_grad_enabled(self._grad)
        if sys.gettrace() is not self._function:
            sys.settrace(self._function)

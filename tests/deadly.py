"""A hook of a model that ends the process that reads a token, as a lost machine or a full memory would."""

import os
import signal
from pathlib import Path
from typing import Any

from torch import nn


class Deadly:
    """A forward pre-hook of an embedding: SIGKILL when a token is read, but never in the process that made it.

    Args:
        token: that kills. once: a file; whoever finds it missing makes it and dies. Without one, everybody dies.
    """

    def __init__(self, token: int, once: Path | None = None) -> None:
        self.token, self.once, self.safe = token, once, os.getpid()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if os.getpid() == self.safe or not bool((args[0] == self.token).any()):
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(module: nn.Module, token: int, once: Path | None = None) -> nn.Module:
    """A model that has the hook."""
    module.get_input_embeddings().register_forward_pre_hook(Deadly(token, once))  # type: ignore[operator]
    return module

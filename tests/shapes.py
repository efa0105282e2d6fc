"""The suite's run-time check of shape annotations.

Only jaxtyping annotations are checked. Ordinary ones are left to the library's own validation,
whose errors are tested: beartype would otherwise answer a bad call first, with its own error.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, told of nothing but array annotations."""
    if isinstance(function, type):
        return function
    hints = dict(function.__annotations__)
    kept = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, AbstractArray)}
    function.__annotations__ = kept
    return beartype(function) if kept else function

"""The suite's run-time check of shape annotations.

Only jaxtyping annotations are checked. Ordinary ones are left to the library's own validation,
whose errors are tested: beartype would otherwise answer a bad call first, with its own error.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def array_hints(function: Any) -> dict[str, Any]:
    """The annotations of arrays that a function has."""
    hints = dict(getattr(function, "__annotations__", {}))
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, AbstractArray)}


def only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, told of nothing but array annotations."""
    if isinstance(function, type):
        return function
    kept = array_hints(function)
    function.__annotations__ = kept
    return beartype(function) if kept else function


def where_shaped(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator, where there is something to check: elsewhere it would bind every call's arguments for
    nothing, which takes a third of the suite's time."""

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        checked = jaxtyped(typechecker=typechecker)
        return lambda one: checked(one) if array_hints(one.__init__ if isinstance(one, type) else one) else one

    return decorator

"""The suite's run-time check of shape annotations.

Only jaxtyping annotations are checked. Ordinary ones are left to the library's own validation,
whose errors are tested: beartype would otherwise answer a bad call first, with its own error.
"""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, Bool, Float, Int
from torch import Tensor

KINDS = {"Float": Float, "Int": Int, "Bool": Bool}
WRITTEN = re.compile(r"(Float|Int|Bool)\[Tensor, ['\"]?([^'\"\]]*)['\"]?\]")  # jaxtyping's hook takes quotes away


def array_hints(function: Any) -> dict[str, Any]:
    """The annotations of arrays that a function has."""
    hints = {name: resolved(hint) for name, hint in getattr(function, "__annotations__", {}).items()}
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, AbstractArray)}


def resolved(hint: Any) -> Any:
    """An array annotation that a module with postponed annotations has as text; any other as it is."""
    found = WRITTEN.fullmatch(hint) if isinstance(hint, str) else None
    return KINDS[found[1]][Tensor, found[2]] if found else hint


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

        def shaped(one: Any) -> Any:
            made = one.__init__ if isinstance(one, type) else one
            hints = array_hints(made)
            for held in [made.__annotations__, one.__annotations__] if hints else []:
                held.update({name: hint for name, hint in hints.items() if name in held})
            for name in hints if is_dataclass(one) else ():
                one.__dataclass_fields__[name].type = hints[name]
            return checked(one) if hints else one

        return shaped

    return decorator

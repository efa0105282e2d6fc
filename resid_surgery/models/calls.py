"""Calls: every module call of one plain forward, with what went in and what came out.

Made on a model's shadow with plain hooks that are removed again, on a prompt of a few tokens.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError, out_of_memory
from resid_surgery.models.modes import GradKept


@final
@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        path, module: which. start, end: its place in the forward.
        x, y: (token, width) its first floating input and output, flattened; None if it has none.
        shape: of the input as it came. args: positional and keyword arguments.
    """

    path: str
    module: nn.Module
    start: int
    end: int
    x: Float[Tensor, "token width_in"] | None
    y: Float[Tensor, "token width_out"] | None
    shape: tuple[int, ...]
    args: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def leaf(self) -> bool:
        """Whether the module has no submodules."""
        return next(self.module.children(), None) is None

    @property
    def linear(self) -> bool:
        """Whether it is a plain affine projection."""
        return isinstance(self.module, nn.Linear) or type(self.module).__name__ == "Conv1D"

    @property
    def norm(self) -> bool:
        """Whether it looks like a norm: named so, and as wide out as in."""
        named = "norm" in type(self.module).__name__.lower()
        return self.leaf and named and self.x is not None and self.y is not None and self.x.shape == self.y.shape


def watch(module: nn.Module, ids: Tensor) -> list[Call]:
    """The calls of one forward in the order in which they ended; the last is the model's own.

    Raises:
        UnsupportedModelError: the forward fails.
    """
    calls: list[Call] = []
    clock, open_calls, handles = itertools.count(), {}, []  # type: ignore[var-annotated]

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_floating([*args, *kwargs.values()])
            kept = None if x is None else x.detach().clone()
            open_calls.setdefault(path, []).append((next(clock), kept))

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            start, x = open_calls[path].pop()
            y = first_floating([getattr(output, "logits", output)])
            shape = () if x is None else tuple(x.shape)
            flat = None if y is None else flatten(y.detach().clone())
            calls.append(Call(path, module, start, next(clock), flatten(x), flat, shape, (args, kwargs)))

        return hook

    for path, one in module.named_modules():
        handles.append(one.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(one.register_forward_hook(after(path), with_kwargs=True))
    try:
        with GradKept(), torch.no_grad():
            module(input_ids=ids, use_cache=False)
    except Exception as error:
        if out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
        raise UnsupportedModelError(
            f"a forward of {type(module).__name__} on token ids alone failed ({why[:200]}), so it cannot be read."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def norm_before(calls: Iterable[Call], read: Tensor | None, start: int) -> Call | None:
    """The norm that made what is read at `start`: the last one before it, where several give the same."""
    made = [c for c in calls if c.norm and c.end < start and same(c.y, read)]
    return made[-1] if made else None


def first_floating(values: Iterable[Any]) -> Tensor | None:
    """The first floating-point tensor among values, looking into tuples and lists."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return value
        if isinstance(value, (tuple, list)):
            found = first_floating(value)
            if found is not None:
                return found
    return None


def flatten(value: Tensor | None) -> Tensor | None:
    """(token, width)."""
    return None if value is None or value.ndim == 0 else value.reshape(-1, value.shape[-1])


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one and the same numbers."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b.to(a.device))


def misfit(a: Tensor, b: Tensor, *largest: Tensor) -> float:
    """max |a - b| over the largest magnitude involved; infinite for different shapes."""
    if a.shape != b.shape:
        return float("inf")
    size = max(1e-30, *(float(t.double().abs().max()) for t in (a, b, *largest) if t.numel()))
    return float((a.double() - b.double().to(a.device)).abs().max()) / size


def close(a: Tensor, b: Tensor, tolerance: float, *largest: Tensor) -> bool:
    """Whether `misfit` is within a tolerance (NaN is not)."""
    return misfit(a, b, *largest) <= tolerance

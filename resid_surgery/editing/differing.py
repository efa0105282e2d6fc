"""Differing: what was added to one tensor to give another, in the leanest form that gives it back bit for bit."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import message
from resid_surgery.editing.changes import Change, Dense, LowRank, Rows
from resid_surgery.errors import ArgumentError

CHUNK = 1 << 22
RANKS = 64
SEED = 0


def change_between(name: str, tied: tuple[str, ...], old: Tensor, new: Tensor) -> Change | None:
    """What is added to `old` to give `new`: `Rows` where few slices differ, `LowRank` where factors give every number
    back, else `Dense`; None where they are equal.

    A change is kept in float32 where old + change rounds to `new` with it, else in float64. A zero may come out
    with the other sign.

    Raises:
        ArgumentError: another shape or a dtype that holds less, numbers that are not finite, or numbers that are none.
    """
    new = _as_stored(name, old, new)
    if torch.equal(old, new):
        return None
    if not bool(torch.isfinite(new).all()):
        raise ArgumentError(f"`{name}` must hold finite numbers; the changed model has others (NaN or infinity) there.")
    dense = old.numel()
    rows = _changed_slices(name, tied, old, new)
    if rows is not None and rows.delta.numel() + rows.index.numel() <= dense / 2:
        return rows
    return _factors(name, tied, old, new) or Dense(name, tied, tuple(old.shape), difference(name, old, new))


def difference(name: str, old: Tensor, new: Tensor) -> Tensor:
    """new - old, in float32 where the sum rounds to `new` with it, else in float64.

    Warns:
        where even a float64 sum misses numbers by its rounding: those of float64 weights, or that shrank 10^8 times.
    """
    for dtype in (torch.float32, torch.float64):
        delta, missed = torch.empty(old.shape, dtype=dtype), 0
        flat = delta.view(-1)
        for at, a, b in _pieces(old.contiguous().view(-1), new.contiguous().view(-1)):
            flat[at] = (b.double() - a.double()).to(dtype)
            missed += int(((a.double() + flat[at].double()).to(b.dtype) != b).sum())
            if missed and dtype is torch.float32:
                break
        if not missed:
            return delta
    warnings.warn(
        f"{missed} numbers of {name} are given back by old + change only up to a rounding in float64.", stacklevel=2
    )
    return delta


def numerical_rank(old: Tensor, change: Change) -> int | None:
    """How many singular values of a matrix's change stand out of the rounding of its dtype; None for tensors that are
    no matrix, or more than `RANKS`.

    A change of rank r that another tool added to rounded weights has full rank by that rounding, of spectral norm up
    to about eps/2 (the largest norm of a row of `new` + the largest of a column): that of a matrix of independent
    numbers with these spreads.
    """
    if isinstance(change, LowRank):
        return int(torch.linalg.matrix_rank(change.left.double() @ change.right.double())) if _small(change) else None
    if len(change.shape) != 2:
        return None
    sketch = _Sketch.of(old.cpu(), change.added_to(old).cpu())
    return sketch.rank if sketch.complete else None


@final
@dataclass(frozen=True, eq=False)
class _Sketch:
    """The largest singular triples of new - old.

    Attributes:
        left: (out, q). sizes: (q,). right: (q, in). missed, noise: Frobenius norms of what they leave, and of the
            rounding of `new`. rank: how many stand out of the rounding.
    """

    left: Float[Tensor, "out q"]
    sizes: Float[Tensor, " q"]
    right: Float[Tensor, "q inner"]
    missed: float
    noise: float
    rank: int

    @property
    def complete(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.missed <= self.noise

    @classmethod
    def of(cls, old: Tensor, new: Tensor) -> "_Sketch":
        """By a random range finder with one power step, in float64, a few rows at a time."""
        n, q = old.shape[1], min(RANKS + 8, *old.shape)
        start = torch.randn(n, q, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
        for _ in range(2):
            span = torch.cat([d @ start for _, d in _rows_of(old, new)])
            ortho = torch.linalg.qr(span).Q
            small = sum((ortho[at].T @ d for at, d in _rows_of(old, new)), torch.zeros(q, n, dtype=torch.float64))
            start = torch.linalg.qr(small.T).Q
        u, sizes, right = torch.linalg.svd(small, full_matrices=False)
        left = ortho @ u
        parts = [(d - (left[at] * sizes) @ right).square().sum() for at, d in _rows_of(old, new)]
        eps = torch.finfo(new.dtype).eps / 2
        rows, columns = (torch.linalg.vector_norm(new, dim=dim, dtype=torch.float64) for dim in (1, 0))
        size, whole = float(rows.norm()), float(sizes.norm())
        floor = eps * float(rows.max() + columns.max())
        return cls(left, sizes, right, float(sum(parts)) ** 0.5, eps * size + 1e-14 * whole * q,
                   int((sizes > max(floor, 1e-14 * float(sizes[0]))).sum()))  # fmt: skip


def _factors(name: str, tied: tuple[str, ...], old: Tensor, new: Tensor) -> LowRank | None:
    """Factors of a matrix's change, where they are few and give every number back."""
    if old.ndim != 2:
        return None
    sketch, (m, n) = _Sketch.of(old, new), old.shape
    r = sketch.rank
    if not sketch.complete or not 0 < r * (m + n) <= m * n / 2:
        return None
    found = LowRank(name, tied, (m, n), (), sketch.left[:, :r] * sketch.sizes[:r], sketch.right[:r])
    return found if torch.equal(found.added_to(old), new) else None


def _changed_slices(name: str, tied: tuple[str, ...], old: Tensor, new: Tensor) -> Rows | None:
    """The slices that differ, along the axes that leave the fewest numbers."""
    if old.ndim == 0:
        return None
    moved = old != new
    choices: dict[int, tuple[tuple[int, ...], Tensor]] = {}
    for axes in [(0,), (1,), (0, 1), (0, 2)]:
        if max(axes) >= old.ndim or (len(axes) == 2 and old.ndim != 3) or (axes == (1,) and old.ndim != 2):
            continue
        rest = tuple(i for i in range(old.ndim) if i not in axes)
        index = torch.nonzero(moved.any(rest) if rest else moved)
        choices.setdefault(len(index) * _size(old, axes), (axes, index))
    if not choices or min(choices) > old.numel() / 2:
        return None
    axes, index = choices[min(choices)]
    at = tuple(index.T)
    a, b = (t.movedim(axes, tuple(range(len(axes))))[at] for t in (old, new))
    return Rows(name, tied, tuple(old.shape), axes, index, difference(name, a, b))


def _size(tensor: Tensor, axes: tuple[int, ...]) -> int:
    """Numbers in one slice."""
    size = tensor.numel()
    for axis in axes:
        size //= tensor.shape[axis]
    return size


def _as_stored(name: str, old: Tensor, new: Tensor) -> Tensor:
    """`new` in the dtype of `old`, which must hold every number of it."""
    if old.shape != new.shape:
        raise ArgumentError(message(name, f"of shape {tuple(old.shape)} in both models", tuple(new.shape)))
    if torch.promote_types(old.dtype, new.dtype) != old.dtype:
        do = "Open the base with the dtype of the changed model."
        raise ArgumentError(message(name, f"of a dtype that {old.dtype} holds", new.dtype, do=do))
    if not old.is_floating_point() and not torch.equal(old, new):
        raise ArgumentError(f"`{name}` must be equal in both models: it holds no floating-point numbers to add to.")
    return new.detach().to(old.dtype).cpu()


def _small(change: LowRank) -> bool:
    return max(change.left.numel(), change.right.numel()) <= CHUNK


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for low in range(0, a.numel(), CHUNK):
        at = slice(low, low + CHUNK)
        yield at, a[at], b[at]


def _rows_of(old: Tensor, new: Tensor) -> Iterator[tuple[slice, Float[Tensor, "row inner"]]]:
    """Rows of new - old in float64, a bounded number at a time."""
    step = max(1, CHUNK // old.shape[1])
    for low in range(0, len(old), step):
        at = slice(low, low + step)
        yield at, new[at].double() - old[at].double()

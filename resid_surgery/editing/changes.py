"""Changes: what is added to one tensor of a model, as rows, as factors or in full.

    new = round(old + change), the sum taken in float64 and rounded once to the tensor's own dtype,
so a change that was saved gives the same bytes wherever it is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery._check import message
from resid_surgery.errors import ArgumentError

CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Change:
    """Base of all changes.

    Attributes:
        name: path of the tensor, as in the model's ``state_dict``. tied: other paths that share it and change with it;
            a shared tensor whose other paths are left out is untied by the change.
        shape: of the tensor.
    """

    name: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]

    kind = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path at which the changed tensor stands."""
        return (self.name, *self.tied)

    def added_to(self, old: Tensor) -> Tensor:
        """A new tensor, old + change, rounded once from float64; `old` is left as it is."""
        raise NotImplementedError

    def scaled(self, factor: float) -> "Change":
        """The change times a factor."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The change in full, float64, in the tensor's shape."""
        return self.added_to(torch.zeros(self.shape, dtype=torch.float64))

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(self.dense().norm())

    def parts(self) -> dict[str, Tensor]:
        """Field -> tensor, for storing."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors, for storing."""
        return {"kind": self.kind, "name": self.name, "tied": list(self.tied), "shape": list(self.shape)}


@final
@dataclass(frozen=True, eq=False)
class Rows(Change):
    """Some slices of a tensor, such as the value vectors of some neurons.

    Attributes:
        axes: which axes the index counts along: (1,) for columns of a (d_model, neuron) matrix.
        index: (slice, axis). delta: (slice, ...) in the order of the remaining axes.
    """

    axes: tuple[int, ...]
    index: Int[Tensor, "slice axis"]
    delta: Float[Tensor, "slice *rest"]

    kind = "rows"

    def __post_init__(self) -> None:
        left = [n for axis, n in enumerate(self.shape) if axis not in self.axes]
        if list(self.delta.shape) != [len(self.index), *left] or self.index.shape[1:] != (len(self.axes),):
            raise ArgumentError(message("delta", f"a slice of {left} for each of {len(self.index)} indices",
                                        list(self.delta.shape)))  # fmt: skip
        if len(torch.unique(self.index, dim=0)) != len(self.index):
            raise ArgumentError("`index` must name each slice once; sum what is added to one slice first.")
        limits = torch.tensor([self.shape[axis] for axis in self.axes])
        if len(self.index) and bool(((self.index < 0) | (self.index >= limits)).any()):
            raise ArgumentError(message("index", f"within {limits.tolist()}", self.index.tolist()))

    def added_to(self, old: Tensor) -> Tensor:
        new = old.detach().clone()
        front = new.movedim(self.axes, tuple(range(len(self.axes))))
        at = tuple(self.index.T.to(new.device))
        front[at] = (front[at].double() + self.delta.to(new.device).double()).to(new.dtype)
        return new

    def scaled(self, factor: float) -> "Rows":
        return replace(self, delta=self.delta.double() * factor)

    def norm(self) -> float:
        return float(self.delta.double().norm())

    def parts(self) -> dict[str, Tensor]:
        return {"index": self.index, "delta": self.delta}

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"axes": list(self.axes)}


@final
@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """A product of factors, left @ right, added to a matrix.

    Attributes:
        lead: indices of leading axes, such as (expert,) of a fused 3-D tensor; () for a plain matrix.
        left: (out, rank). right: (rank, in), in the stored orientation of the matrix.
    """

    lead: tuple[int, ...]
    left: Float[Tensor, "a rank"]
    right: Float[Tensor, "r b"]

    kind = "low_rank"

    def __post_init__(self) -> None:
        wanted = self.shape[len(self.lead) :]
        if (self.left.shape[0], self.right.shape[1]) != tuple(wanted) or self.left.shape[1] != self.right.shape[0]:
            raise ArgumentError(message("left, right", f"factors of a {tuple(wanted)} matrix",
                                        [list(self.left.shape), list(self.right.shape)]))  # fmt: skip

    def added_to(self, old: Tensor) -> Tensor:
        new = old.detach().clone()
        matrix = new[self.lead] if self.lead else new
        left, right = (t.to(new.device).double() for t in (self.left, self.right))
        step = max(1, CHUNK // max(1, right.shape[1]))
        for low in range(0, len(left), step):
            rows = slice(low, low + step)
            matrix[rows] = (matrix[rows].double() + left[rows] @ right).to(new.dtype)
        return new

    def scaled(self, factor: float) -> "LowRank":
        return replace(self, left=self.left.double() * factor)

    def norm(self) -> float:
        left, right = (torch.linalg.qr(t.double()).R for t in (self.left, self.right.T))
        return float((left @ right.T).norm())

    def parts(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"lead": list(self.lead)}


@final
@dataclass(frozen=True, eq=False)
class Dense(Change):
    """A change of every element.

    Attributes:
        delta: in the tensor's shape.
    """

    delta: Tensor

    kind = "dense"

    def __post_init__(self) -> None:
        if tuple(self.delta.shape) != tuple(self.shape):
            raise ArgumentError(message("delta", f"of shape {tuple(self.shape)}", list(self.delta.shape)))

    def added_to(self, old: Tensor) -> Tensor:
        new = old.detach().clone(memory_format=torch.contiguous_format)
        flat, delta = new.view(-1), self.delta.reshape(-1)
        for low in range(0, flat.numel(), CHUNK):
            piece = slice(low, low + CHUNK)
            flat[piece] = (flat[piece].double() + delta[piece].to(new.device).double()).to(new.dtype)
        return new

    def scaled(self, factor: float) -> "Dense":
        return replace(self, delta=self.delta.double() * factor)

    def dense(self) -> Tensor:
        return self.delta.double()

    def parts(self) -> dict[str, Tensor]:
        return {"delta": self.delta}


KINDS: dict[str, type[Change]] = {cls.kind: cls for cls in (Rows, LowRank, Dense)}


def summed(changes: Sequence[Change]) -> tuple[Change, ...]:
    """One change a tensor: changes of the same tensor added, in the leanest form that holds the sum.

    Where one change keeps paths tied that another changes alone, the sum unties them.
    """
    owners: dict[str, set[tuple[str, ...]]] = {}
    for one in changes:
        for path in one.paths:
            owners.setdefault(path, set()).add(one.paths)
    torn = {paths for several in owners.values() if len(several) > 1 for paths in several}
    found: dict[tuple[str, ...], Change] = {}
    for one in (part for whole in changes for part in (_untied(whole) if whole.paths in torn else [whole])):
        before = found.get(one.paths)
        found[one.paths] = one if before is None else _sum(before, one)
    return tuple(found.values())


def _untied(change: Change) -> list[Change]:
    """The same change at each of its paths by itself."""
    return [replace(change, name=path, tied=()) for path in change.paths]


def _sum(a: Change, b: Change) -> Change:
    if a.shape != b.shape:
        raise ArgumentError(f"`{a.name}` must have one shape in edits that are composed; got {a.shape} and {b.shape}.")
    if isinstance(a, Rows) and isinstance(b, Rows) and a.axes == b.axes:
        index, where = torch.unique(torch.cat([a.index, b.index]), dim=0, return_inverse=True)
        both = torch.cat([a.delta.double(), b.delta.double()])
        delta = torch.zeros(len(index), *both.shape[1:], dtype=torch.float64).index_add_(0, where, both)
        return replace(a, index=index, delta=delta)
    if isinstance(a, LowRank) and isinstance(b, LowRank) and a.lead == b.lead:
        if torch.equal(a.right, b.right):  # multiples of one change: an edit and its inverse cancel to the last bit
            return replace(a, left=a.left.double() + b.left.double())
        left = torch.cat([a.left.double(), b.left.double()], 1)
        return replace(a, left=left, right=torch.cat([a.right.double(), b.right.double()]))
    return Dense(a.name, a.tied, a.shape, a.dense() + b.dense())

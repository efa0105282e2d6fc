"""Acting: what a change of a matrix does to its inputs, without ever writing the change out in full.

d = dW x    for rows:    sum_i x_i dv_i      for factors:  left (right x)
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from resid_surgery.editing.changes import Change, Dense, LowRank, Rows

PIECE = 1 << 22


def as_stored(change: Change, old: Tensor) -> Change:
    """A change as weights take it: what is left of it once the sum is rounded to the tensor's dtype.

    Factors added to single or double precision stay factors: rounding there is far below what they do.
    """
    if isinstance(change, Rows):
        rows = old.detach().movedim(change.axes, tuple(range(len(change.axes))))[tuple(change.index.T.to(old.device))]
        new = (rows.double() + change.delta.to(rows.device).double()).to(old.dtype)
        return replace(change, delta=new.double() - rows.double())
    if isinstance(change, LowRank) and old.dtype in (torch.float32, torch.float64):
        return change
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    return Dense(change.name, change.tied, change.shape, change.added_to(old).to(wide) - old.detach().to(wide))


def pieces(change: Change, old: Tensor) -> Iterator[tuple[Tensor, Float[Tensor, " n"]]]:
    """(old numbers, what is added to them in float64) of all that a change touches, a piece at a time, flat."""
    if isinstance(change, Rows):
        rows = old.detach().movedim(change.axes, tuple(range(len(change.axes))))[tuple(change.index.T.to(old.device))]
        yield rows.reshape(-1), change.delta.to(rows.device).double().reshape(-1)
    elif isinstance(change, LowRank):
        matrix = old.detach()[change.lead] if change.lead else old.detach()
        left, right = (t.to(old.device).double() for t in (change.left, change.right))
        step = max(1, PIECE // max(1, right.shape[1]))
        for low in range(0, len(left), step):
            yield matrix[low : low + step].reshape(-1), (left[low : low + step] @ right).reshape(-1)
    else:
        flat, added = old.detach().reshape(-1), change.dense().reshape(-1)
        for low in range(0, len(flat), PIECE):
            yield flat[low : low + PIECE], added[low : low + PIECE].to(flat.device)


def matrices(change: Change, lead: int) -> Iterator[tuple[tuple[int, ...], Change]]:
    """(leading index, change of that matrix) of every matrix that a change touches, such as one an expert.

    Args:
        change: of any tensor. lead: how many leading axes count matrices; 0 for one.
    """
    if lead == 0:
        yield (), change
        return
    shape = change.shape[1:]
    if isinstance(change, LowRank) and change.lead:
        yield change.lead[:1], replace(change, shape=shape, lead=change.lead[1:])
    elif isinstance(change, Rows) and 0 in change.axes:
        for e in sorted(set(change.index[:, change.axes.index(0)].tolist())):
            yield (e,), _rows_of(change, e, shape)
    elif isinstance(change, Rows):
        for e in range(change.shape[0]):
            axes = tuple(axis - 1 for axis in change.axes)
            yield (e,), Rows(change.name, change.tied, shape, axes, change.index, change.delta[:, e])
    else:
        full = change.dense()
        for e in torch.nonzero(full.flatten(1).any(1)).flatten().tolist():
            yield (e,), Dense(change.name, change.tied, shape, full[e])


def _rows_of(change: Rows, e: int, shape: tuple[int, ...]) -> Change:
    """Those of rows indexed by a matrix and more that belong to one matrix."""
    at = change.axes.index(0)
    mine = change.index[:, at] == e
    rest = [i for i in range(len(change.axes)) if i != at]
    if not rest:
        return Dense(change.name, change.tied, shape, change.delta[mine][0])
    axes = tuple(change.axes[i] - 1 for i in rest)
    return Rows(change.name, change.tied, shape, axes, change.index[mine][:, rest], change.delta[mine])


def acted(change: Change, input_axis: int, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
    """What a change of one matrix adds to the matrix's output for inputs x, in x's dtype.

    Args:
        change: of a matrix. input_axis: which of its axes counts inputs: 1 for a Linear, 0 for a Conv1D.
    """
    if isinstance(change, Rows) and change.axes == (input_axis,):
        at, delta = change.index[:, 0].to(x.device), change.delta.to(x)
        return x[:, at] @ delta
    if isinstance(change, Rows) and change.axes == (1 - input_axis,):
        out = torch.zeros(len(x), change.shape[1 - input_axis], dtype=x.dtype, device=x.device)
        out[:, change.index[:, 0].to(x.device)] = x @ change.delta.to(x).T
        return out
    if isinstance(change, LowRank):
        left, right = change.left.to(x), change.right.to(x)
        return (x @ right.T) @ left.T if input_axis == 1 else (x @ left) @ right
    full = change.dense().to(x)
    return x @ (full.T if input_axis == 1 else full)


def touched(change: Change) -> tuple[Bool[Tensor, " slice"], ...]:
    """For each axis of a tensor, which of its slices some number is added to."""
    if isinstance(change, LowRank) and not change.lead:
        return change.left.any(1), change.right.any(0)
    if isinstance(change, Rows):
        return tuple(_touched_by_rows(change, axis) for axis in range(len(change.shape)))
    full = change.dense() != 0
    axes = range(full.ndim)
    return tuple(full.any(tuple(a for a in axes if a != axis)) if full.ndim > 1 else full for axis in axes)


def _touched_by_rows(change: Rows, axis: int) -> Bool[Tensor, " slice"]:
    loud = change.delta != 0
    if axis not in change.axes:
        left = [a for a in range(len(change.shape)) if a not in change.axes]
        place = 1 + left.index(axis)
        return loud.any(tuple(a for a in range(loud.ndim) if a != place))
    some = loud.flatten(1).any(1) if loud.ndim > 1 else loud
    out = torch.zeros(change.shape[axis], dtype=torch.bool)
    out[change.index[some][:, change.axes.index(axis)]] = True
    return out

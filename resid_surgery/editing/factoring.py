"""Factoring: the numerical rank of a change, its singular values, and what form it really has.

Singular values are computed in float64 from the smaller Gram matrix of what is touched, or from the factors of a
low-rank change, so that no decomposition of the full matrix is needed.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.editing.acting import matrices, touched
from resid_surgery.editing.changes import Change, LowRank

RELATIVE = 1e-6
Form = Literal["row", "rank-one", "low-rank", "dense", "none"]


@final
@dataclass(frozen=True, eq=False)
class Factored:
    """A change of one matrix as a sum of sigma_i u_i v_i^T, largest first.

    Attributes:
        lead: leading index of the matrix, such as (expert,). values: (rank,) sigma, those above the threshold.
        left: (rank, rows) u. right: (rank, columns) v, in the stored orientation. touched: slices, an axis each.
    """

    lead: tuple[int, ...]
    values: Float[Tensor, " rank"]
    left: Float[Tensor, "rank row"]
    right: Float[Tensor, "rank column"]
    touched: tuple[Tensor, ...]

    def direction(self, i: int, axis: int) -> Tensor:
        """sigma_i times the unit vector along one axis of the matrix."""
        return self.values[i] * (self.left if axis == 0 else self.right)[i]


def factored(change: Change, old: Tensor, lead: int) -> list[Factored]:
    """Every matrix of a change decomposed; a vector counts as a matrix of one row.

    Singular values count towards the rank above max(1e-6 sigma_1, rounding). For a change given in full
    `rounding` is what rounding the new tensor to its dtype leaves as noise, eps |W| (rows^-1/2 + columns^-1/2) / 2;
    rows and factors are as they were given.
    """
    return [_factored(at, one, old[at] if at else old) for at, one in matrices(change, lead)]


def _factored(at: tuple[int, ...], change: Change, old: Tensor) -> Factored:
    if isinstance(change, LowRank) and not change.lead:
        u, values, v = _of_factors(change)
        floor = 0.0
    else:
        full = change.dense().cpu()
        full = full[None] if full.ndim == 1 else full.flatten(1)
        u, values, v = _of_matrix(full)
        floor = _rounding(old, full.shape) if change.kind == "dense" else 0.0
    rank = int((values > max(RELATIVE * float(values[:1].sum()), floor)).sum())
    return Factored(at, values[:rank], u[:rank], v[:rank], touched(change))


def _of_factors(change: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(change.left.cpu().double())
    p, s = torch.linalg.qr(change.right.cpu().double().T)
    u, values, v = torch.linalg.svd(r @ s.T)
    u, v = (q @ u).T, (p @ v.T).T
    sign = (u @ change.left.cpu().double()).sum(1).sign()[:, None]  # as the factors were given
    sign = torch.where(sign == 0, 1.0, sign)
    return u * sign, values, v * sign


def _of_matrix(full: Float[Tensor, "row column"]) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = full.any(1), full.any(0)
    small = full[rows][:, columns]
    turned = small.shape[0] > small.shape[1]
    m = small.T if turned else small
    squares, vectors = torch.linalg.eigh(m @ m.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    near = vectors.flip(1).T
    far = (near @ m) / values.clamp_min(1e-300)[:, None]
    u, v = (far, near) if turned else (near, far)
    return _spread(u, rows), values, _spread(v, columns)


def _spread(vectors: Tensor, where: Tensor) -> Tensor:
    out = torch.zeros(len(vectors), len(where), dtype=vectors.dtype)
    out[:, where] = vectors
    return out


def _rounding(old: Tensor, shape: torch.Size) -> float:
    size = float(old.double().norm())
    return float(torch.finfo(old.dtype).eps) * size * float(sum(n**-0.5 for n in shape)) / 2


def slices_of(found: list[Factored]) -> tuple[int, int, int]:
    """(changed slices, axis of the matrix, slices in all) along the axis with the smallest share of them."""
    best: tuple[int, int, int] = (0, 0, 1)
    for axis in range(max((len(one.touched) for one in found), default=0)):
        changed = sum(int(one.touched[axis].sum()) for one in found)
        total = sum(len(one.touched[axis]) for one in found)
        if axis == 0 or changed * best[2] < best[0] * total:
            best = changed, axis, total
    return best


def form_of(found: list[Factored]) -> Form:
    """What a change really is.

    "row": some slices of an axis (neurons, tokens) and no others, no more than its rank. "rank-one", "low-rank": a
    product of factors that holds fewer numbers than the matrix. "dense": all else.
    """
    rank = sum(len(one.values) for one in found)
    changed, _, total = slices_of(found)
    if rank == 0:
        return "none"
    if any(len(one.touched) == 1 for one in found):  # vectors, such as biases and gains
        return "row" if changed < total else "dense"
    if changed <= rank and changed < total:
        return "row"
    if rank == 1:
        return "rank-one"
    shapes = [(len(one.values), one.left.shape[1], one.right.shape[1]) for one in found if len(one.values)]
    leaner = sum(r * (m + n) for r, m, n in shapes) < sum(m * n for _, m, n in shapes)
    return "low-rank" if leaner else "dense"

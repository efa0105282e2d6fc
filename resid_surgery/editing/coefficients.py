"""Coefficient edits: scale or ablate what sites write, in the weights or in every forward.

    coefficient * value vector  ->  coefficient * (factor * value vector)

Rows of weights multiply nothing but the coefficient, so that scaling a row is scaling its coefficient at every
position, exactly (up to the rounding of the row to the model's dtype).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.placing import Place, members, places_of, single_sites, sites_given, stored
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.sites import Site
from resid_surgery.stream.recording import need_model
from resid_surgery.surgery.interventions import Scale


def edit_coefficients(
    model: OpenedModel,
    sites: Any,
    factor: Any,
    *,
    positions: Any = "all",
    baked: bool = True,
    rewrites: Sequence[Rewrite] = (),
) -> Edit:
    """Multiply coefficients by a factor for good (paper: setting subvalues to zero, or boosting them).

    row_i -> factor_i * row_i, a row being the value vector of a neuron or attention neuron; a head is its d_head rows
    of W_O, a sublayer (``L20.mlp``) all its rows and biases, or the gain and bias of the norm behind it. Sites inside
    one another multiply, as they do in `Scale`. Heads leave the output bias of attention as it is.

    Args:
        model: from `resid_surgery.load`; never changed.
        sites: a site, text or slice (``"L20:24.N*"``), several, a `Located`, or a table with a "site" or "writer"
            column (`sources`, `query_subvalues`; its rows of remainders and constants are left out).
        factor: a number for all (0 ablates, 1 changes nothing), or a sequence of one for each given site.
        positions: "all" where it is baked; else as in `Scale`.
        baked: True changes weights. False keeps the operations and does them in every forward: also for
            (head, source) pairs and other sites that are no rows.
        rewrites: the facts that the edit is meant for, if any.

    Returns:
        An `Edit`. Both forms give the same logits up to rounding.

    Raises:
        SiteError: a site does not exist, or is no row of any weight. ArgumentError: `factor` is no finite number or of
        another length, positions of a baked edit, or nothing changes.

    Source: Yu & Ananiadou, arXiv 2312.12141; Dai et al. 2022, Knowledge Neurons (suppressing and amplifying).

    Example:
        >>> import resid_surgery as rs
        >>> edit_coefficients(rs.load(rs.tiny("llama")), "L2.N0:3", 0.0)
        Edit(edit_coefficients: model.layers.2.mlp.down_proj.weight (rows))
    """
    need_model(model)
    _check.flag("baked", baked)
    given = sites_given(sites)
    factors = factors_of(factor, len(given))
    settings = {"sites": [str(one) for one in given], "factor": factors if len(set(factors)) > 1 else factors[0],
                "baked": baked}  # fmt: skip
    if not baked:
        if set(factors) == {1.0}:
            raise ArgumentError(_check.message("factor", "other than 1 (which changes nothing)", factor))
        operations = _operations(model, given, factors, positions)
        return new_edit(
            model, (), method="edit_coefficients", settings=settings, interventions=operations, rewrites=rewrites
        )
    if not isinstance(positions, str) or positions != "all":
        raise ArgumentError(
            _check.message(
                "positions", "'all' for an edit of weights, which act everywhere", positions, do="Or use baked=False."
            )
        )
    changes = _scaled_rows(model, given, factors)
    return new_edit(model, changes, method="edit_coefficients", settings=settings, rewrites=rewrites)


def factors_of(given: Any, n: int) -> list[float]:
    """One finite factor a site, from one for all or a sequence of them."""
    if not _check.iterable(given):
        return [_check.finite("factor", given)] * n
    found = [_check.finite("factor", one) for one in given]
    if len(found) != n:
        raise ArgumentError(_check.message("factor", f"one number, or one for each of {n} sites", found))
    return found


def _operations(model: OpenedModel, sites: Sequence[Site], factors: Sequence[float], positions: Any) -> list[Scale]:
    """One `Scale` a distinct factor, of sites that exist."""
    for site in sites:
        members(model, site)
    return [
        Scale([site for site, mine in zip(sites, factors, strict=True) if mine == one], one, positions=positions)
        for one in dict.fromkeys(factors)
    ]


def _scaled_rows(model: OpenedModel, sites: Sequence[Site], factors: Sequence[float]) -> list[Rows]:
    """The rows of sites times their factors, one change a tensor."""
    wanted: dict[Site, float] = {}
    for given, factor in zip(sites, factors, strict=True):
        for site in single_sites(model, [given]):
            if wanted.setdefault(site, factor) != factor:
                raise ArgumentError(f"`factor` must be one for {site}; got {wanted[site]} and {factor}.")
    grouped: dict[tuple[str, tuple[int, ...]], list[tuple[Place, float]]] = {}
    for site, factor in wanted.items():
        for place in places_of(model, site):
            grouped.setdefault((place.name, place.axes), []).append((place, factor))
    held = stored(model, [name for name, _ in grouped])
    return [change for (name, _), some in grouped.items() if (change := _scaled(some, held[name])) is not None]


def _scaled(some: Sequence[tuple[Place, float]], tensor: Tensor) -> Rows | None:
    """(factor - 1) * row for rows of one tensor; factors of rows that are named more than once multiply."""
    index, where = torch.unique(torch.cat([place.index for place, _ in some]), dim=0, return_inverse=True)
    each = torch.cat([torch.full((len(place.index),), factor, dtype=torch.float64) for place, factor in some])
    factor = torch.ones(len(index), dtype=torch.float64).scatter_reduce_(0, where, each, "prod")
    moved = factor != 1
    place = Place(some[0][0].name, some[0][0].axes, index[moved], some[0][0].offset)
    if not len(place.index):
        return None
    rows = place.read(tensor)
    return place.added(tensor, (factor[moved] - 1).reshape(-1, *[1] * (rows.ndim - 1)) * rows)

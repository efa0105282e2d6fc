"""Spectra: the tokens that changed vectors promote and suppress.

A value vector v of a layer is read as  W_U gamma_final * centre(gamma_post * centre(v))  with every norm's scale at 1,
so that only the order and the signs of values mean something, not their size across layers. One subvalue has many
abilities (the paper's warning): what else than the fact stands here is what an edit touches besides.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.editing.acting import matrices
from resid_surgery.editing.changes import Change
from resid_surgery.editing.factoring import Factored
from resid_surgery.editing.roles import Role
from resid_surgery.models.opening import OpenedModel
from resid_surgery.sites import AttnNeuron
from resid_surgery.stream.kinds import neuron_site
from resid_surgery.stream.vocabulary import Readout, token_names

MOST = 32
DIRECTIONS = 8
COLUMNS = ("tensor", "slice", "which", "side", "rank", "token", "token_id", "value", "note")


@final
@dataclass(frozen=True, eq=False)
class Moved:
    """A vector written to the stream that an edit moved: its difference, and what it was (None for a direction)."""

    tensor: str
    slice: str
    role: Role
    difference: Float[Tensor, " d_model"]
    old: Float[Tensor, " d_model"] | None

    def forms(self) -> Iterator[tuple[str, Tensor]]:
        """("old" / "new" / "difference", vector)."""
        if self.old is not None:
            yield "old", self.old
            yield "new", self.old + self.difference
        yield "difference", self.difference


def moved(model: OpenedModel, change: Change, role: Role, found: list[Factored], old: Tensor) -> Iterator[Moved]:
    """Vectors that a change of an output projection moves: its slices, or the leading directions of its factors."""
    for (at, one), parts in zip(matrices(change, role.lead), found, strict=True):
        matrix = old[at] if at else old
        if role.input_axis is None:
            name = f"L{role.layer}.E{at[0]}.bias" if at else f"L{role.layer}.{role.sublayer}.bias"
            yield Moved(change.name, name, role, _work(model, one.dense()), _work(model, matrix))
            continue
        axis = role.input_axis - role.lead
        hit = parts.touched[axis]
        if bool(hit.all()) and len(hit) > 1:
            for i in range(min(DIRECTIONS, len(parts.values))):
                name = f"L{role.layer}.{role.sublayer} direction {i + 1}" + (f" of E{at[0]}" if at else "")
                yield Moved(change.name, name, role, _work(model, parts.direction(i, 1 - axis)), None)
            continue
        yield from _slices(model, one, role, at, matrix, hit)


def _slices(
    model: OpenedModel, change: Change, role: Role, at: tuple[int, ...], matrix: Tensor, hit: Tensor
) -> Iterator[Moved]:
    """The largest of the slices that a change moves."""
    assert role.input_axis is not None
    axis, index = role.input_axis - role.lead, torch.nonzero(hit).flatten()
    full = change.dense().cpu().movedim(axis, 0)[index]
    kept = full.norm(dim=1).topk(min(MOST, len(index))).indices
    for k in kept.tolist():
        i = int(index[k])
        yield Moved(change.name, _site(model, role, at, i), role, _work(model, full[k]),
                    _work(model, matrix.detach().movedim(axis, 0)[i]))  # fmt: skip


def _site(model: OpenedModel, role: Role, at: tuple[int, ...], i: int) -> str:
    assert role.layer is not None
    if role.sublayer == "attn":
        head, index = divmod(i, model.anatomy.sizes[role.layer].d_head)
        return str(AttnNeuron(role.layer, head, index))
    return str(neuron_site(role.layer, at[0] if at else role.group, i))


def _work(model: OpenedModel, vector: Tensor) -> Tensor:
    return model.work(vector.detach())


def spectra(model: OpenedModel, vectors: Iterable[Moved], silent: Mapping[str, str], top: int) -> pd.DataFrame:
    """The tokens of moved vectors, the largest differences first; at most 32 vectors.

    Args:
        model: the base. vectors: what moved. silent: tensor -> why it has no spectrum. top: tokens a side.
    """
    chosen = sorted(vectors, key=lambda one: -float(one.difference.norm()))
    rows = [row for one in chosen[:MOST] for row in _rows(model, one, top)]
    left = len(chosen) - MOST
    rows += [_none(name, why) for name, why in silent.items()]
    if left > 0:
        rows.append(_none("", f"{left} more vectors with smaller changes are left out"))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"rank": "Int64", "token_id": "Int64"})


def _none(name: str, why: str) -> dict[str, Any]:
    return {"tensor": name, "slice": "", "which": "", "side": "", "token": "", "value": float("nan"), "note": why}


def _rows(model: OpenedModel, one: Moved, top: int) -> Iterator[dict[str, Any]]:
    names, vectors = zip(*one.forms(), strict=True)
    readout = Readout(model, model.norm(None, "final_norm"), model.work(torch.ones(1)), None)
    said = readout.bs(_pushed(model, one.role, torch.stack(vectors)))
    note = "" if one.old is not None else "the sign of a direction is its factors'"
    for which, vector, values in zip(names, vectors, said, strict=True):
        if not bool(vector.any()):
            yield _none(one.tensor, "a vector of zeros: it promotes nothing") | {"slice": one.slice, "which": which}
            continue
        for side, best in (("promotes", values.topk(top)), ("suppresses", (-values).topk(top))):
            ids = best.indices.tolist()
            for rank, (i, token) in enumerate(zip(ids, token_names(model, ids), strict=True), 1):
                yield {"tensor": one.tensor, "slice": one.slice, "which": which, "side": side, "rank": rank,
                       "token": token, "token_id": i, "value": float(values[i]), "note": note}  # fmt: skip


def _pushed(model: OpenedModel, role: Role, v: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Vectors as they reach the stream: through the post-norm's gain at scale 1, and the multiplier."""
    assert role.layer is not None
    if model.has(role.layer, f"{role.sublayer}_post_norm"):
        v = model.norm(role.layer, f"{role.sublayer}_post_norm").linear(v, model.work(torch.ones(1)))
    return v * model.factor(role.layer, f"{role.sublayer}_scale")

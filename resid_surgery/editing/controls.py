"""Controls: what is an edit's figure worth beside that of nothing, of a random direction, of a random place?

null: the base against itself in products of another size: the noise floor. direction: random changes of the same
norm at the same places. site: the same change at random other places of the same kind (other neurons of the layer, or
the same matrix of another layer). Success at random places shows that success says little about the place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from resid_surgery.editing.changes import Change, Dense, LowRank, Rows
from resid_surgery.editing.edits import Edit, tensor_hash
from resid_surgery.editing.running import WeightsSubject
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of, ties_of

COPIES, TAIL = 2, 7
COLLINEAR = 1e-4  # what rounding to a checkpoint's dtype leaves of a scaling beside its row


@final
class NullSubject:
    """The base itself, with tokens behind each row that it cannot see: products of another size round differently."""

    first = 0

    def __init__(self, model: OpenedModel) -> None:
        self.name, self._alone = "null", WeightsSubject(model, "null")

    def logits(self, ids: Tensor, at: Sequence[int], stream: Tensor | None = None) -> Tensor:
        """As of any subject."""
        room = (self._alone.model.context or 1 << 30) - ids.shape[1]
        longer = torch.cat([ids, ids[:, :1].repeat(1, max(0, min(TAIL, room)))], 1)
        return torch.cat([self._alone.logits(row.repeat(COPIES, 1), at)[:1] for row in longer])

    def continued(self, ids: Tensor, tokens: int) -> list[list[int]]:
        """As of any subject."""
        return [self._alone.continued(row[None], tokens)[0] for row in ids]


def random_direction(model: OpenedModel, edit: Edit, seed: int) -> Edit:
    """Changes of the same norm at the same places, in random directions (each slice or factor keeps its norm)."""
    generator = torch.Generator().manual_seed(seed)
    return _control(model, edit, [_turned(change, generator) for change in edit.changes], f"random direction {seed}")


def random_site(model: OpenedModel, edit: Edit, seed: int) -> Edit:
    """The same change at random other places of the same kind.

    Slices (neurons, heads' rows) go to other slices of their tensor; a scaling scales what stands there. A change of a
    whole matrix goes to the same matrix of another layer, and where there is none its input coordinates are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    held = tensors_of(model.module)
    layers = _other_layers(model, edit, held, seed)
    moved = [_moved(change, held, model, layers, generator) for change in edit.changes]
    return _control(model, edit, moved, f"random site {seed}")


def _control(model: OpenedModel, edit: Edit, changes: Sequence[Change], name: str) -> Edit:
    held = tensors_of(model.module)
    expects = {change.name: tensor_hash(held[change.name]) for change in changes}
    return Edit(tuple(changes), (), name, edit.rewrites, expects)


def _turned(change: Change, generator: torch.Generator) -> Change:
    if isinstance(change, Rows):
        return replace(change, delta=_like(change.delta, generator, change.delta.ndim - 1))
    if isinstance(change, LowRank):
        turned = replace(change, left=_like(change.left.T, generator, 1).T.contiguous())
        norm = turned.norm()
        return turned if norm == 0 else turned.scaled(change.norm() / norm)
    assert isinstance(change, Dense)
    noise = torch.randn(change.shape, generator=generator, dtype=torch.float32)
    return replace(change, delta=noise * (change.norm() / float(noise.double().norm())))


def _like(delta: Tensor, generator: torch.Generator, rest: int) -> Tensor:
    """Random numbers in which each slice has the norm that it has in `delta`."""
    noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
    over = tuple(range(delta.ndim - rest, delta.ndim))
    if not over:  # single numbers: keep their sizes, turn signs at random
        return delta.double().abs() * noise.sign()
    sizes = delta.double().square().sum(over, keepdim=True).sqrt()
    return noise / noise.square().sum(over, keepdim=True).sqrt().clamp_min(1e-30) * sizes


def _moved(
    change: Change,
    held: dict[str, Tensor],
    model: OpenedModel,
    layers: Mapping[int, int],
    generator: torch.Generator,
) -> Change:
    if isinstance(change, Rows) and 2 * len(change.index) <= _slices(change):
        return _other_slices(change, held[change.name], generator)
    place = _in_block(change.name, model)
    if place is None or place[0] not in layers:
        return _shuffled(change, generator)
    picked = _twin(change.name, layers[place[0]], model)
    tied = tuple(path for path in ties_of(model.module)[picked] if path != picked)
    return _rescaled(replace(change, name=picked, tied=tied), change, held)


def _other_layers(model: OpenedModel, edit: Edit, held: Mapping[str, Tensor], seed: int) -> dict[int, int]:
    """Edited layer -> another one with the same tensors, not edited there; seeds take all of them in turn.

    What is changed of one layer moves together. A layer without another like it is left out.
    """
    places = [(change, place) for change in edit.changes if (place := _in_block(change.name, model)) is not None]
    taken, found = set[int](), dict[int, int]()
    order = torch.randperm(model.anatomy.n_layers, generator=torch.Generator().manual_seed(0)).tolist()
    order = order[seed % len(order) :] + order[: seed % len(order)]
    for layer in sorted({layer for _, (layer, _) in places}):
        mine = [change for change, (i, _) in places if i == layer]
        free = (i for i in order if i not in taken and all(_fits(one, i, edit, model, held) for one in mine))
        if (other := next(free, None)) is not None:
            found[layer] = other
            taken.add(other)
    return found


def _fits(change: Change, layer: int, edit: Edit, model: OpenedModel, held: Mapping[str, Tensor]) -> bool:
    path = _twin(change.name, layer, model)
    return path in held and path not in edit.tensors and tuple(held[path].shape) == tuple(change.shape)


def _slices(change: Rows) -> int:
    total = 1
    for axis in change.axes:
        total *= change.shape[axis]
    return total


def _other_slices(change: Rows, old: Tensor, generator: torch.Generator) -> Change:
    limits = [change.shape[axis] for axis in change.axes]
    flat = torch.arange(_slices(change))
    grid = torch.stack(torch.unravel_index(flat, limits), -1)
    used = (grid[:, None] == change.index[None]).all(-1).any(-1)
    if change.index.shape[1] > 1:  # stay with the same expert
        used |= ~torch.isin(grid[:, 0], change.index[:, 0])
    free = grid[~used]
    if len(free) < len(change.index):
        return _shuffled(change, generator)
    index = free[torch.randperm(len(free), generator=generator)[: len(change.index)]]
    there = replace(change, index=index)
    return _rescaled(there, change, {change.name: old})


def _rescaled(there: Change, here: Change, held: Mapping[str, Tensor]) -> Change:
    """For a scaling: (factor - 1) times what stands at the other place, not what stood at this one."""
    if not isinstance(there, Rows) or not isinstance(here, Rows):
        return there
    factors = _factors(here, held[here.name])
    if factors is None:
        return there
    front = held[there.name].detach().double().movedim(there.axes, tuple(range(len(there.axes))))
    rows = front[tuple(there.index.T.to(front.device))].cpu()
    return replace(there, delta=rows * factors.view(-1, *[1] * (rows.ndim - 1)))


def _factors(here: Rows, old: Tensor) -> Tensor | None:
    """(slice,) factor - 1 of each slice where the change is a scaling of what stands there, else None."""
    front = old.detach().double().movedim(here.axes, tuple(range(len(here.axes))))
    rows = front[tuple(here.index.T.to(front.device))].cpu().reshape(len(here.index), -1)
    delta = here.delta.double().reshape(len(here.index), -1)
    factors = (delta * rows).sum(-1) / rows.square().sum(-1).clamp_min(1e-300)
    left = delta - factors[:, None] * rows
    return factors if rows.shape[1] > 1 and bool(left.norm() <= COLLINEAR * delta.norm()) else None


def _in_block(path: str, model: OpenedModel) -> tuple[int, str] | None:
    """(layer, path inside its block) of a tensor; None for tensors outside the blocks."""
    found = re.fullmatch(re.escape(model.path(None, "blocks")) + r"\.(\d+)\.(.+)", path)
    return None if found is None else (int(found[1]), found[2])


def _twin(path: str, layer: int, model: OpenedModel) -> str:
    """The path of the same tensor in another layer."""
    place = _in_block(path, model)
    assert place is not None
    return f"{model.path(None, 'blocks')}.{layer}.{place[1]}"


def _shuffled(change: Change, generator: torch.Generator) -> Change:
    if not change.shape:
        return change.scaled(-1.0)
    if isinstance(change, LowRank):
        order = torch.randperm(change.right.shape[1], generator=generator)
        return replace(change, right=change.right[:, order])
    if isinstance(change, Rows):
        order = torch.randperm(len(change.index), generator=generator)
        return replace(change, delta=change.delta[order])
    assert isinstance(change, Dense)
    order = torch.randperm(change.shape[-1], generator=generator)
    return replace(change, delta=change.delta[..., order])


def control_edits(
    model: OpenedModel, edit: Edit, *, sites: int, directions: int, seed: int = 0
) -> list[tuple[str, Edit]]:
    """(kind, edit) of every control with weights.

    Raises:
        ArgumentError: the edit works by interventions, which have no random counterpart.
    """
    if edit.interventions:
        raise ArgumentError(f"`edit` must change weights to have random controls; {edit!r} works by interventions.")
    wanted = [("random site", random_site, sites), ("random direction", random_direction, directions)]
    return [(kind, build(model, edit, (seed * 1000 + n) % 2**63)) for kind, build, many in wanted for n in range(many)]

"""Replacing: a model on the table with some of its tensors swapped, beside the one that it was made from."""

import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from resid_surgery._check import message
from resid_surgery.errors import ArgumentError, InterventionError
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel


@final
class EditedModel(OpenedModel):
    """A model with some tensors replaced; all others are the base's own, and the base is as it was.

    Attributes:
        base: what it was made from. replaced: paths of the tensors that are its own. edits: what made it, in order,
            where that is known.
    """

    base: OpenedModel
    replaced: tuple[str, ...]
    edits: tuple[Any, ...] = ()

    @property
    def shadow(self) -> nn.Module:
        """As of any model, until it is closed.

        Raises:
            InterventionError: the edit's ``with`` block was left.
        """
        if self.__dict__.get("_closed", False):
            raise InterventionError(
                f"`{self.name}` must be used inside the `with edit.applied(model)` block that made it; it was left, "
                "and the edited weights are gone. Apply the edit again."
            )
        return super().shadow

    def close(self) -> None:
        """Let go of the replaced tensors, once a forward of another thread is over; every later one is refused."""
        with self.lock:
            self._closed = True
            self.cache.clear()
            self.module = _Closed(self.name)
            self._shadow = None

    def __repr__(self) -> str:
        return f"EditedModel({self.name}, closed)" if self.__dict__.get("_closed", False) else super().__repr__()


@final
class _Closed(nn.Module):
    """What is left of an edited model's module: nothing runs, nothing is found in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: object, **keywords: object) -> None:
        """Refused."""
        raise InterventionError(f"`{self.name}` was left: apply the edit again to run it.")

    def __getattr__(self, name: str) -> Any:
        """Refused, but for what Python itself asks of objects: a call that had begun may still look for any part."""
        if name.startswith("_"):
            return super().__getattr__(name)
        raise InterventionError(f"`{self.name}` was left: apply the edit again to look into it.")

    def get_submodule(self, target: str) -> nn.Module:
        """Refused."""
        raise InterventionError(f"`{self.name}` was left: apply the edit again to look into it.")


def with_tensors(base: OpenedModel, tensors: Mapping[str, Tensor], name: str) -> EditedModel:
    """A model like `base` with other tensors at some paths; nothing of `base` changes.

    Args:
        base: the opened model. tensors: path in the module (as in its ``state_dict``) -> tensor of the same shape and
            dtype. Paths that share one tensor in `base` and are given the same object share it again; a shared
            tensor that is given at one of its paths only is untied there.
        name: what the new model is called.

    Raises:
        ArgumentError: a path names no tensor, or one of another shape or dtype.
    """
    held = tensors_of(base.module)
    for path, new in tensors.items():
        old = held.get(path)
        if old is None:
            raise ArgumentError(message("tensors", "named as in the model's state_dict", path, model=base.name))
        if new.shape != old.shape or new.dtype != old.dtype:
            wanted = f"{tuple(old.shape)} of {old.dtype} at {path}"
            raise ArgumentError(message("tensors", wanted, f"{tuple(new.shape)} of {new.dtype}", model=base.name))
    with base.lock:
        shared = {id(t): t for t in base.weights.tensors()}
        module = copy.deepcopy(base.module, memo=dict(shared))
    fresh: dict[int, nn.Parameter] = {}
    for path, new in tensors.items():
        owner, _, leaf = path.rpartition(".")
        place = module.get_submodule(owner) if owner else module
        if leaf not in place._parameters:
            place._buffers[leaf] = _plain(new, held[path].device)
            continue
        if id(new) not in fresh:
            fresh[id(new)] = nn.Parameter(_plain(new, held[path].device), requires_grad=False)
        place._parameters[leaf] = fresh[id(new)]
    model = EditedModel(module, base.tokenizer, name, base.note, anatomy=base.anatomy)
    model.base, model.replaced = base, tuple(tensors)
    return model


def _plain(new: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device that gradients may pass, also where it was made under torch.inference_mode."""
    with torch.inference_mode(False):
        return (new.clone() if new.is_inference() else new.detach()).to(device)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Path -> tensor of everything in a module's ``state_dict``; tied tensors stand under each of their paths."""
    with GradKept(), torch.no_grad():
        return {path: t for path, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def ties_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path -> all paths that share its tensor, itself first in module order."""
    groups: dict[int, list[str]] = {}
    found = tensors_of(module)
    for path, tensor in found.items():
        groups.setdefault(id(tensor), []).append(path)
    return {path: tuple(groups[id(tensor)]) for path, tensor in found.items()}

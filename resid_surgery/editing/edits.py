"""Edits: changes of a model's weights (or operations in its forward) as one value.

An `Edit` knows what it adds to which tensors, which weights it was made for, and where it came from. It is applied as a
handle beside the base model, which is never written to: leaving the handle is the rollback.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import pandas as pd
import torch
import xxhash
from torch import Tensor

from resid_surgery import _check
from resid_surgery._html import face_html
from resid_surgery.editing.changes import Change, summed
from resid_surgery.editing.composing import about_sum, atoms, beneath, joined_keys
from resid_surgery.editing.keeping import is_kept, keep, kept
from resid_surgery.editing.outside import adapter_factors, between, called, differences, ranks
from resid_surgery.editing.packing import plain
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, StaleRecordingError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import EditedModel, tensors_of, ties_of, with_tensors
from resid_surgery.stream.recording import need_model
from resid_surgery.surgery.altering import under
from resid_surgery.surgery.interventions import Intervention


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model, as a value; made by ``rs.edit_*``, ``Edit.from_models`` and the like.

    Attributes:
        changes: what is added to which tensors, one a tensor.
        interventions: operations done in every forward instead (an edit that is not baked into weights).
        method: how it was made. rewrites: the facts that it was to rewrite, if any.
        expects: tensor -> hash of the weights that it was made for. about: settings, model, fingerprint, versions;
            of one made on an edited model, made_on: the hashes of the edits beneath it.
        fitting: report of how it was fitted, one row a fact (and step); empty where nothing was fitted.
        keys: name -> tensor kept beside the changes, such as the keys of earlier facts; never applied.

    Example:
        >>> Edit(()).empty
        True
    """

    changes: tuple[Change, ...]
    interventions: tuple[Intervention, ...] = ()
    method: str = ""
    rewrites: tuple[Rewrite, ...] = ()
    expects: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    fitting: pd.DataFrame = field(default_factory=pd.DataFrame)
    keys: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("changes", Change), ("interventions", Intervention), ("rewrites", Rewrite)):
            object.__setattr__(self, name, _all_of(name, getattr(self, name), kind))
        _check.text("method", self.method)
        if not isinstance(self.fitting, pd.DataFrame):
            raise ArgumentError(_check.message("fitting", "a DataFrame", self.fitting))
        for name in ("expects", "about", "keys"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArgumentError(_check.message(name, "a mapping", getattr(self, name)))
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "changes", summed(self.changes))

    def __repr__(self) -> str:
        what = ", ".join(f"{c.name} ({c.kind})" for c in self.changes[:4]) + (", ..." if len(self.changes) > 4 else "")
        what = what or ", ".join(one.brief for one in self.interventions[:4]) or "nothing"
        return f"Edit({self.method or 'unnamed'}: {what})"

    def _repr_html_(self) -> str:
        facts = pd.DataFrame([one.said() for one in self.rewrites])
        return face_html(f"{self!r}, {self.hash[:16]}", self.table, facts)

    @property
    def empty(self) -> bool:
        """Whether it changes nothing at all."""
        return not self.interventions and all(change.norm() == 0 for change in self.changes)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Paths of all tensors that it changes, tied ones included."""
        return tuple(path for change in self.changes for path in change.paths)

    @property
    def hash(self) -> str:
        """Of what it does: changes and interventions; where it came from does not count."""
        total = xxhash.xxh3_128(repr(self.interventions).encode())
        for change in sorted(self.changes, key=lambda one: one.paths):
            total.update(repr(sorted(change.spec().items())).encode())
            for name, part in sorted(change.parts().items()):
                total.update(f"{name}{part.dtype}".encode())
                total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def table(self) -> pd.DataFrame:
        """One row a tensor: tensor, tied, kind, slices (rows) or rank, shape, norm (Frobenius)."""
        rows = []
        for change in self.changes:
            parts = change.parts()
            size = len(parts["index"]) if "index" in parts else parts["left"].shape[1] if "left" in parts else None
            rows.append({"tensor": change.name, "tied": ", ".join(change.tied), "kind": change.kind, "size": size,
                         "shape": "x".join(map(str, change.shape)), "norm": change.norm()})  # fmt: skip
        return pd.DataFrame(rows, columns=["tensor", "tied", "kind", "size", "shape", "norm"])

    def scaled(self, factor: float) -> "Edit":
        """The same change of weights times a factor (0 is no change, -1 the inverse).

        Raises:
            ArgumentError: it is no finite number, or the edit has interventions, which have no multiple.
        """
        times = _check.finite("factor", factor)
        self._need_weights("scaled")
        before = _check.finite("about['scaled']", self.about.get("scaled", 1.0))
        about = {**self.about, "scaled": before * times}
        return replace(self, changes=tuple(c.scaled(times) for c in self.changes), about=about)

    def __mul__(self, factor: float) -> "Edit":
        return self.scaled(factor)

    __rmul__ = __mul__

    @property
    def inverse(self) -> "Edit":
        """The change the other way. Exact as a value; weights that it is added to come back up to rounding (leaving
        `applied` is exact). To add it to weights that hold the edit, apply it with strict=False."""
        return self.scaled(-1.0)

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits at once; what changes one tensor is summed before it is rounded to the tensor's dtype.

        Where both change one tensor, both must have been made for the same weights of it, or one on the model that the
        other left (as in a stream of edits); the sum is for the weights that the first of them was made for.

        Raises:
            ArgumentError: they were made for different weights, or shapes, of one tensor.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        both, (first, second) = (self, other), beneath(self, other)
        methods = [*dict.fromkeys(one.method for one in both if one.method)]
        return Edit(
            (*self.changes, *other.changes),
            (*self.interventions, *other.interventions),
            " + ".join(methods),
            tuple(dict.fromkeys((*self.rewrites, *other.rewrites))),
            {**second.expects, **first.expects},
            about_sum(self, other),
            pd.concat([t for t in (self.fitting, other.fitting) if len(t)] or [pd.DataFrame()], ignore_index=True),
            joined_keys(self.keys, other.keys),
        )

    @contextmanager
    def applied(self, model: OpenedModel, *, strict: bool = True) -> Iterator[Any]:
        """The edited model beside the base: ``with edit.applied(model) as edited: rs.record(edited, prompt)``.

        Only changed tensors are copied. The base stays usable, during the block and after it, and its bytes are never
        written to, so that leaving the block, also by an exception, is an exact rollback.

        Args:
            model: from `resid_surgery.load`. strict: refuse weights other than those that the edit was made for.

        Yields:
            An `OpenedModel`; for an edit with interventions, what `resid_surgery.under` gives of it.

        Raises:
            ArgumentError: it changes nothing, or tensors that the model does not have.
            StaleRecordingError: the weights are not those that it was made for.
        """
        need_model(model)
        _check.flag("strict", strict)
        if self.empty:
            raise ArgumentError(f"`edit` must change something; {self!r} adds nothing to {model.name}.")
        edited = with_tensors(model, self.new_tensors(model, strict=strict), f"{model.name}, edited")
        edited.edits = (*_edits_of(model), self) if strict else ()
        try:
            if self.interventions:
                with under(edited, self.interventions) as altered:
                    yield altered
            else:
                yield edited
        finally:
            edited.close()

    def new_tensors(self, model: OpenedModel, *, strict: bool = True) -> dict[str, Tensor]:
        """Path -> changed tensor (tied paths share one object); the model is left as it is.

        Raises:
            ArgumentError: a tensor is not there, or has another shape.
            StaleRecordingError: with `strict`, other weights than the edit was made for.
        """
        need_model(model)
        held, found = held_by(self, model, strict=_check.flag("strict", strict)), dict[str, Tensor]()
        for change in self.changes:
            new = change.added_to(held[change.name].detach())
            found |= dict.fromkeys(change.paths, new)
        return found

    def save(self, path: Any) -> Path:
        """Write a ``.safetensors`` file: factors and rows as tensors, all else as JSON in its metadata.

        Returns:
            The path; the file is written whole or not at all.

        Raises:
            ArgumentError: the path does not end in ``.safetensors``. LoadError: it cannot be written.
        """
        return keep(path, {one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def load(cls, path: Any) -> "Edit":
        """Read an edit that `save` wrote.

        Raises:
            LoadError: it cannot be read, is damaged, or is no edit.
        """
        return cls(**kept(path))

    @classmethod
    def from_models(cls, before: OpenedModel, after: Any) -> "Edit":
        """What another tool did to a model: the difference of two, each tensor in the leanest form that holds it.

        Args:
            before: the base, from `resid_surgery.load`. after: an opened model, a Hugging Face module, or the folder or
                name of a checkpoint.

        Raises:
            ArgumentError: they are equal, or not of one architecture (the tensors are named).
        """
        changes = between(before, after)
        about = {"after": called(after), "ranks": ranks(before, changes)}
        return new_edit(before, changes, method="from_models", settings=about)

    @classmethod
    def from_delta(cls, base: OpenedModel, path: Any) -> "Edit":
        """Differences from a safetensors file: tensor name -> what is added to it.

        Raises:
            LoadError: it cannot be read. ArgumentError: a tensor that the base does not have, or of another shape.
        """
        return new_edit(base, differences(base, path), method="from_delta", settings={"file": called(path)})

    @classmethod
    def from_peft(cls, base: OpenedModel, adapter: Any) -> "Edit":
        """A LoRA adapter (folder of a PEFT checkpoint, or a PEFT model) as factors added to weights. Needs ``peft``.

        Raises:
            LoadError: it cannot be read. ArgumentError: it does more than add factors to weights of this base.
        """
        return new_edit(base, adapter_factors(base, adapter), method="from_peft", settings={"adapter": called(adapter)})

    def _need_weights(self, verb: str) -> None:
        if self.interventions:
            raise ArgumentError(f"`edit` must be baked into weights to be {verb}; {self!r} works by interventions.")


def new_edit(
    model: OpenedModel,
    changes: Sequence[Change],
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    interventions: Sequence[Intervention] = (),
    rewrites: Sequence[Rewrite] = (),
    fitting: pd.DataFrame | None = None,
    keys: Mapping[str, Tensor] | None = None,
) -> Edit:
    """An edit made for a model, with the hashes of the tensors that it changes and where it came from.

    Raises:
        ArgumentError: it changes nothing.
    """
    rewrites = _all_of("rewrites", rewrites, Rewrite)
    held = tensors_of(model.module)
    about = {"model": model.name, "fingerprint": model.known_fingerprint(), "dtype": str(model.dtype),
             "settings": plain(dict(settings or {}), "settings"), "versions": versions()}  # fmt: skip
    if on := [one for edit in _edits_of(model) for one in atoms(edit)]:
        about["made_on"] = on
    expects = {path: tensor_hash(held[path]) for change in changes for path in change.paths}
    made = Edit(
        tuple(changes), tuple(interventions), method, rewrites, expects, about,
        pd.DataFrame() if fitting is None else fitting, dict(keys or {}),
    )  # fmt: skip
    if made.empty:
        raise ArgumentError(f"`{method}` must change something in {model.name}; this edit adds nothing to any weight.")
    return made


def _edits_of(model: OpenedModel) -> tuple[Any, ...]:
    return model.edits if isinstance(model, EditedModel) else ()


def _all_of(name: str, given: Any, kind: type) -> tuple[Any, ...]:
    found = tuple(given) if _check.iterable(given) else (None,)
    if not all(isinstance(one, kind) for one in found):
        raise ArgumentError(_check.message(name, f"a sequence of {kind.__name__}", given))
    return found


def read_edit(model: OpenedModel, source: Any) -> Edit:
    """The edit that a path holds, whatever tool made it.

    Args:
        model: the base. source: a file that `Edit.save` wrote; another ``.safetensors`` file (differences); the folder
            of a PEFT adapter; or the folder or hub id of an edited checkpoint.

    Raises:
        LoadError: it cannot be read. ArgumentError: it changes no weight, or is for another model.
    """
    need_model(model)
    path = _check.path("source", source, "a .safetensors file, a folder or a hub id", home=True)
    if path.suffix == ".safetensors":
        return Edit.load(path) if is_kept(path) else Edit.from_delta(model, path)
    if (path / "adapter_config.json").is_file():
        return Edit.from_peft(model, path)
    if path.is_file():
        raise ArgumentError(_check.message("source", "a .safetensors file or a folder", str(source), model=model.name))
    return Edit.from_models(model, source)


def held_by(edit: Edit, model: OpenedModel, *, strict: bool = True) -> Mapping[str, Tensor]:
    """Path -> tensor of a model that has all that an edit changes; the model is left as it is.

    Raises:
        As `Edit.new_tensors`.
    """
    held = tensors_of(model.module)
    for change in edit.changes:
        for path in change.paths:
            if path not in held:
                raise ArgumentError(
                    f"`edit` changes {path}, which {model.name} does not have: it is for another model."
                )
        old = held[change.name].detach()
        if tuple(old.shape) != tuple(change.shape):
            raise ArgumentError(
                _check.message("edit", f"of a {tuple(old.shape)} tensor {change.name}", change.shape, model=model.name)
            )
        if strict and change.name in edit.expects and (now := tensor_hash(old)) != edit.expects[change.name]:
            raise StaleRecordingError(
                f"this edit was made for other weights of {change.name} ({edit.expects[change.name][:8]}) than "
                f"{model.name} has ({now[:8]}, {old.dtype}). Make it anew, or pass strict=False to add it anyway."
            )
    return held


def tied_paths(model: OpenedModel, name: str) -> tuple[str, ...]:
    """Other paths that share the tensor at `name`."""
    return tuple(path for path in ties_of(model.module)[name] if path != name)


def tensor_hash(tensor: Tensor) -> str:
    """128-bit hash of a tensor's dtype, shape and bytes."""
    total = xxhash.xxh3_128(f"|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {name: version(name) for name in ("resid-surgery", "torch", "transformers", "nnsight")}

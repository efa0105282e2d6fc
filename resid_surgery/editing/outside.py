"""Edits made elsewhere: the difference of two models, a file of differences, a LoRA adapter.

Nothing is unpickled. Whatever a tensor's change looks like, it is kept in the leanest form that gives the changed
tensor back: some slices, factors, or all of it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from resid_surgery._check import message
from resid_surgery._check import path as as_path
from resid_surgery.editing.adapters import adapter_parts
from resid_surgery.editing.changes import Change, Dense, LowRank, Rows
from resid_surgery.editing.differing import change_between, numerical_rank
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.models.checkpoints import read_checkpoint
from resid_surgery.models.kept import open_tensors, read_tensors
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of, ties_of
from resid_surgery.models.tracing import unwrap
from resid_surgery.stream.recording import need_model

Read = Mapping[str, Callable[[], Tensor]]
UNTOLD = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "tie_word_embeddings",
          "return_dict", "problem_type", "gradient_checkpointing", "task_specific_params", "id2label", "label2id",
          "num_labels", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_decoder",
          "quantization_config")  # fmt: skip
UNTOLD_PARTS = ("token_id", "drop", "init", "pdrop")


def between(before: OpenedModel, after: Any) -> tuple[Change, ...]:
    """What was added to the tensors of `before` to give those of `after`.

    Every change gives its tensor back bit for bit (the sign of a zero aside; where float64 weights moved far, up to a
    rounding, with a warning). Weights of `after` in a narrower dtype are widened, which is exact; wider ones are
    refused. Tensors that `before` shares and `after` does not are untied by the change.

    Args:
        before: the base, from `resid_surgery.load`. after: an opened model, a Hugging Face module, or the folder or
            name of a checkpoint. A folder with the base's own tensor names is read one tensor at a time.

    Raises:
        ArgumentError: no weight differs, or the two are not of one architecture: names of tensors, shapes or settings
            of the config differ. LoadError: the checkpoint cannot be read.
    """
    need_model(before)
    held, (theirs, config) = tensors_of(before.module), _tensors_after(before, after)
    _same_config(before, config)
    for what, names in (
        ("lacks", [n for n in held if n not in theirs]),
        ("has also", [n for n in theirs if n not in held]),
    ):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ArgumentError(
                f"`after` must have the tensors of {before.name}; {called(after)} {what} {listed}. Renamed, merged or "
                "resized tensors have no difference."
            )
    found: list[Change] = []
    for paths in dict.fromkeys(ties_of(before.module).values()):
        old = held[paths[0]].detach().cpu()
        for group, new in _groups(paths, theirs):
            change = change_between(group[0], group[1:], old, new)
            found += [] if change is None else [change]
    if not found:
        raise ArgumentError(f"`after` must differ from {before.name}; no weight differs: {called(after)} is unedited.")
    return tuple(found)


def ranks(base: OpenedModel, changes: Sequence[Change]) -> dict[str, int | None]:
    """Tensor -> numerical rank of its change (None: no matrix, or high); see `numerical_rank`."""
    held = tensors_of(base.module)
    return {one.name: numerical_rank(held[one.name].detach(), one) for one in changes}


def differences(base: OpenedModel, path: Any) -> tuple[Change, ...]:
    """Differences from a safetensors file: tensor name -> what is added, in its shape; or its factors, name + ".left"
    (out, rank) and name + ".right" (rank, in), their product being added.

    A tensor that the base shares changes at all of its paths, unless the file has different changes for them.

    Raises:
        LoadError: it cannot be read. ArgumentError: a tensor that the base does not have, of another shape, or not of
        finite floats; or the file holds no difference.
    """
    given, held, ties = _read_file(path), tensors_of(base.module), ties_of(base.module)
    found: dict[str, Change] = {}
    for name in dict.fromkeys(one.removesuffix(".left").removesuffix(".right") if one not in held else one
                              for one in given):  # fmt: skip
        if name not in held:
            raise ArgumentError(message("path", f"a file of differences named as in {base.name}", name))
        found[name] = _given_change(name, tuple(held[name].shape), given)
    changes = [_tied_as(found, name, ties[name]) for name in found]
    kept = [one for one in changes if one is not None and one.norm() > 0]
    if not kept:
        raise ArgumentError(f"`path` must hold a difference; {called(path)} adds nothing to {base.name}.")
    return tuple(kept)


def adapter_factors(base: OpenedModel, adapter: Any) -> tuple[Change, ...]:
    """A LoRA adapter's factors, scaled as PEFT scales them: scaling * B A is added to each weight that it sits on.

    What an adapter holds in full (``modules_to_save``, biases) is compared with the base's tensors. An adapter on one
    of two tied tensors unties them, as it acts on that one only.

    Raises:
        LoadError: it cannot be read. ArgumentError: it does more than add to weights of this base, or adds nothing.
    """
    need_model(base)
    held, found = tensors_of(base.module), list[Change]()
    parts = adapter_parts(base, adapter)
    for name, left, right in parts.factors:
        if name not in held:
            raise ArgumentError(f"`adapter` must sit on weights of {base.name}, which has no {name}.")
        factors = LowRank(name, (), tuple(held[name].shape), (), left, right)
        found += [factors] if factors.norm() > 0 else []
    for name, new in parts.whole.items():
        if name not in held:
            raise ArgumentError(f"`adapter` must sit on weights of {base.name}, which has no {name}.")
        old = held[name].detach().cpu()
        change = change_between(name, (), old, new.to(old.dtype))
        if change is not None and any(one.name == name for one in found):
            raise ArgumentError(f"`adapter` must sit on the weights of {base.name}; its {name} is another one.")
        found += [] if change is None else [change]
    return tuple(found)


def called(source: Any) -> str:
    """What a source is called in an edit's provenance: a model's name, the last part of a path, else its class."""
    if isinstance(source, (str, os.PathLike)):
        text = str(source).rstrip("/\\")
        return Path(text).name if Path(text).exists() else text
    name = getattr(source, "name", None) or getattr(getattr(source, "config", None), "_name_or_path", None)
    return Path(name).name if isinstance(name, str) and name else type(source).__name__


def _tensors_after(before: OpenedModel, after: Any) -> tuple[Read, Any]:
    """(path -> how to read the tensor, config) of what a caller gave."""
    module = after.module if isinstance(after, OpenedModel) else unwrap(after)[0]
    if isinstance(module, (str, os.PathLike)) and str(module).strip():
        folder = as_path("after", module, "the folder or name of a checkpoint", home=True)
        if (streamed := _streamed(before, folder)) is not None:
            return streamed
        module = read_checkpoint(os.fspath(module), None, False)[0]
    if not isinstance(module, nn.Module):
        wanted = "an opened model, a Hugging Face module, or the folder or name of a checkpoint"
        raise ArgumentError(message("after", wanted, after))
    if any(p.is_meta for p in module.parameters()):
        raise LoadError(f"{called(after)} has parameters on the meta device: its weights are not loaded.")
    return {name: _held(t) for name, t in tensors_of(module).items()}, getattr(module, "config", None)


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _streamed(before: OpenedModel, folder: Path) -> tuple[Read, Any] | None:
    """A folder's tensors where it names them as the base does, with the base's ties; else None."""
    from transformers import AutoConfig

    files = sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    places: dict[str, Path] = {}
    try:
        for file in files:
            with open_tensors(file) as opened:
                if places.keys() & opened.keys():
                    return None  # two files that hold one tensor: which counts is not ours to guess
                places |= dict.fromkeys(opened.keys(), file)
        ties = {
            name: next((one for one in paths if one in places), "") for name, paths in ties_of(before.module).items()
        }
        if not files or sorted(set(ties.values())) != sorted(places):
            return None
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(f"{folder} cannot be read: {error}.") from error
    return {name: _in_file(places[one], one) for name, one in ties.items()}, config


def _in_file(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with open_tensors(file) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read


def _same_config(before: OpenedModel, config: Any) -> None:
    """Refuse a model whose config says that it computes something else with the same weights."""
    own: Any = getattr(before.module, "config", None)
    if not (hasattr(own, "to_dict") and hasattr(config, "to_dict")):
        return
    a, b = (_telling(one.to_dict()) for one in (own, config))
    unlike = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    if unlike:
        shown = ", ".join(f"{key} ({a.get(key)!r} and {b.get(key)!r})" for key in unlike[:3])
        raise ArgumentError(
            f"`after` must be of the architecture of {before.name}; their configs differ in {shown}, which no change "
            "of weights makes up for."
        )


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a forward depends on, as plain JSON."""
    quiet = {key for key in config if key.startswith("_") or any(part in key for part in UNTOLD_PARTS)} | {*UNTOLD}
    kept = {key: value for key, value in config.items() if key not in quiet}
    told: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return told


def _groups(paths: tuple[str, ...], theirs: Read) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Paths that share a tensor in the base, grouped by what they hold in the other model."""
    groups: list[tuple[list[str], Tensor]] = []
    for path in paths:
        new = theirs[path]().detach().cpu()
        mine = next((g for g, t in groups if t is new or (t.shape == new.shape and torch.equal(t, new))), None)
        if mine is None:
            groups.append(([path], new))
        else:
            mine.append(path)
    yield from ((tuple(group), new) for group, new in groups)


def _read_file(path: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(message("path", "the path of a .safetensors file", path))
    try:
        said, given = read_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as differences of tensors: {error}.") from error
    if said.get("what") == "resid_surgery edit":
        raise ArgumentError(f"`path` must be a file of differences; {called(path)} is a saved edit: use Edit.load.")
    for name, tensor in given.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ArgumentError(f"`path` must hold finite floating-point numbers; {name} of {called(path)} does not.")
    return given


def _given_change(name: str, shape: tuple[int, ...], given: Mapping[str, Tensor]) -> Change:
    """One tensor's change as the file has it; `Rows` where most slices are zero."""
    factors = [given.get(f"{name}.{side}") for side in ("left", "right")]
    if name in given:
        if factors != [None, None]:
            raise ArgumentError(f"`path` must hold {name} or its factors, not both.")
        delta = given[name]
        if tuple(delta.shape) != shape:
            raise ArgumentError(message(name, f"of shape {shape}", tuple(delta.shape)))
        lean = change_between(name, (), torch.zeros(shape, dtype=delta.dtype), delta) if delta.ndim else None
        return lean if isinstance(lean, Rows) else Dense(name, (), shape, delta)
    left, right = factors
    if left is None or right is None or left.ndim != 2 or right.ndim != 2:
        raise ArgumentError(f"`path` must hold both factors of {name}, {name}.left (rows, rank) and .right (rank, in).")
    return LowRank(name, (), shape, (), left, right)


def _tied_as(found: Mapping[str, Change], name: str, paths: tuple[str, ...]) -> Change | None:
    """A given change at every path that shares its tensor; alone where the file gives another for one of them."""
    others = [found[one] for one in paths if one in found]
    if all(torch.equal(one.dense(), others[0].dense()) for one in others[1:]):
        return replace(found[name], tied=tuple(p for p in paths if p != name)) if found[name] is others[0] else None
    return found[name]

"""Storing: interventions as a JSON file, with the numbers of vectors in a safetensors file beside it.

What comes from donors is resolved into values first, so that a file made on one machine does the same on another.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from resid_surgery._check import message
from resid_surgery._check import path as as_path
from resid_surgery._files import file_hash, open_regular, plain_name, read_json, utf8, write_whole
from resid_surgery.addresses import parse_site
from resid_surgery.errors import ArgumentError, LoadError, ResidSurgeryError
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.surgery.interventions import (
    Attend,
    Clamp,
    Cut,
    Intervention,
    Mean,
    Patch,
    Scale,
    Set,
    Steer,
    Zero,
    as_interventions,
)
from resid_surgery.surgery.reading import fetch
from resid_surgery.surgery.resolving import Resolver, Scene

SCHEMA = 1
WHAT = "resid_surgery interventions"
BODY = {"schema", "what", "interventions", "tensors"}
LARGEST_BYTES = 1 << 26
LARGEST_VECTORS = 1 << 30
_FIELDS: dict[type[Intervention], tuple[str, ...]] = {
    Zero: (),
    Scale: ("factor",),
    Clamp: ("value",),
    Attend: ("weight", "renormalise"),
    Cut: (),
    Steer: ("toward", "away", "times"),
}
_KINDS = {cls.__name__: cls for cls in (*_FIELDS, Set)}


def save_interventions(path: Any, interventions: Any, *, rec: Recording | None = None) -> Path:
    """Write interventions to a JSON file; vectors go to a ``.safetensors`` file of the same name.

    Args:
        path: of the JSON file, ending in ``.json``. interventions: one, or a list.
        rec: the recording they are for: needed for `Patch` and `Mean`, whose values are resolved into `Set`s at its
            positions.

    Returns:
        The path. Both files are written whole or not at all.

    Raises:
        ArgumentError: `rec` is needed. LoadError: the file cannot be written.
    """
    target = _path(path)
    given = as_interventions(interventions)
    settled = settle_values(given, rec)
    tensors: dict[str, Tensor] = {}
    entries = [to_entry(i, one, tensors) for i, one in enumerate(settled)]
    body: dict[str, Any] = {"schema": SCHEMA, "what": WHAT, "interventions": entries}
    beside = target.with_suffix(".safetensors")
    try:
        if tensors:
            packed = tensor_bytes(tensors)
            body["tensors"] = {"file": beside.name, "xxh3_128": xxhash.xxh3_128_hexdigest(packed)}
            write_whole(beside, packed)
        write_whole(target, utf8(json.dumps(body, ensure_ascii=False, indent=1)))
    except OSError as error:
        raise LoadError(f"interventions could not be written to {target}: {error}.") from error
    return target


def load_interventions(path: Any) -> list[Intervention]:
    """Read interventions that `save_interventions` wrote.

    Args:
        path: of the JSON file.

    Returns:
        The interventions, equal to those that were saved (donors and means as `Set`s of their values).

    Raises:
        LoadError: not found, no such file, another schema, damaged, or with values that do not make sense.
    """
    target = _path(path)
    body = _json(target)
    if not isinstance(body, dict) or body.get("what") != WHAT:
        raise LoadError(f"{target} is no file of interventions; write one with rs.save_interventions.")
    if body.get("schema") != SCHEMA:
        raise LoadError(f"{target} has schema {body.get('schema')!r}, but this version reads {SCHEMA}.")
    if odd := sorted(set(body) - BODY):
        raise LoadError(f"{target} has a field {odd[0]!r}, which files of schema {SCHEMA} do not have.")
    tensors = _tensors(target, body.get("tensors"))
    entries = body.get("interventions")
    if not isinstance(entries, list) or not entries:
        raise LoadError(f"{target} holds no list of interventions.")
    found = []
    for i, entry in enumerate(entries):
        try:
            found.append(from_entry(i, entry, tensors))
        except (ResidSurgeryError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"intervention {i} of {target} cannot be read: {error}") from error
    return found


def settle_values(interventions: Sequence[Intervention], rec: Recording | None) -> list[Intervention]:
    """Interventions with every `Patch` and `Mean` as the `Set`s that it comes to on a recording's prompt."""
    out: list[Intervention] = []
    for one in interventions:
        if not isinstance(one, (Patch, Mean)):
            out.append(one)
            continue
        if rec is None:
            raise ArgumentError(f"`rec` must be given to save {one.brief}: its values depend on the prompt it is for.")
        be_recording(rec)
        resolver = Resolver(Scene.of(rec))
        ops = resolver.resolve(one)
        fetch(rec.model, resolver.wants)
        by_place: dict[tuple[Any, int], list[Tensor]] = {}
        for op in ops:
            assert op.value is not None
            by_place.setdefault((op.site, op.position), []).append(op.value.double().cpu())
        for (site, position), values in by_place.items():
            at = "target" if position == rec.prompt.position else position
            out.append(Set([site], [values[0] if len(values) == 1 else torch.stack(values)], positions=at))
    return out


def to_entry(i: int, one: Intervention, tensors: dict[str, Tensor]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": type(one).__name__, "sites": [str(site) for site in one.sites]}
    entry["positions"] = list(one.positions) if isinstance(one.positions, tuple) else one.positions
    if isinstance(one, Set):
        for j, values in enumerate(one.values):
            for k, value in enumerate(values):
                tensors[f"{i}.{j}.{k}"] = value.contiguous()
        return entry
    for name in _FIELDS[type(one)]:
        entry[name] = getattr(one, name)
    if isinstance(one, Steer) and one.vector is not None:
        tensors[f"{i}.vector"] = one.vector.contiguous()
    return entry


def from_entry(i: int, entry: Any, tensors: dict[str, Tensor]) -> Intervention:
    cls = _KINDS.get(entry["kind"])
    if cls is None:
        raise ValueError(f"no operation is called {entry['kind']!r}")
    if odd := sorted(set(entry) - {"kind", "sites", "positions", *_FIELDS.get(cls, ())}):
        raise ValueError(f"{entry['kind']} has no field {odd[0]!r}")
    if not isinstance(entry["sites"], list):
        raise ValueError(message("sites", "a list of texts", entry["sites"]))
    sites = [parse_site(text) for text in entry["sites"]]
    given = entry["positions"]
    positions = tuple(given) if isinstance(given, list) else given
    if cls is Set:
        many = isinstance(positions, tuple)
        values = [[tensors[f"{i}.{j}.{k}"] for k in range(len(positions) if many else 1)] for j in range(len(sites))]
        return Set(sites, values if many else [one[0] for one in values], positions=positions)
    fields = {name: entry[name] for name in _FIELDS[cls]}
    if cls is Steer and entry["toward"] is None:
        return Steer(sites, tensors[f"{i}.vector"], positions=positions)
    build: Any = cls
    return build(sites, **fields, positions=positions)  # type: ignore[no-any-return]


def _path(path: Any) -> Path:
    return as_path("path", path, "the path of a .json file", suffix=".json")


def _json(path: Path) -> Any:
    try:
        return read_json(path, LARGEST_BYTES)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error
    except ValueError as error:
        raise LoadError(f"{path} is no JSON: {error}.") from error


def _tensors(path: Path, named: Any) -> dict[str, Tensor]:
    if named is None:
        return {}
    file = named.get("file") if isinstance(named, dict) else None
    if not isinstance(file, str) or not plain_name(file):
        raise LoadError(f"{path} must name its tensors' file without folders; got {file!r}.")
    beside = path.with_name(file)
    try:
        if file_hash(beside, LARGEST_VECTORS) != named.get("xxh3_128"):
            raise LoadError(f"{beside} is not the file that {path.name} was written with: their hashes differ.")
        with open_regular(beside, LARGEST_VECTORS) as held:
            found = load_tensors(held.read())
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(f"{path} needs {beside.name} beside it, which cannot be read: {error}.") from error
    except (SafetensorError, ValueError) as error:
        raise LoadError(f"{beside} is no safetensors file: {error}.") from error
    if odd := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise LoadError(f"{beside} must hold vectors of floating-point numbers; {odd[0]} is {found[odd[0]].dtype}.")
    return {name: tensor.to(torch.float64) for name, tensor in found.items()}

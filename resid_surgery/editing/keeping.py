"""Keeping: an edit as one ``.safetensors`` file, whose metadata holds all that is no tensor as JSON.

Nothing is unpickled. A hash of every tensor and of the JSON stands beside them, so that a damaged file is refused.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from resid_surgery._check import index_of, message
from resid_surgery._check import path as as_path
from resid_surgery._files import parse_json, utf8, write_whole
from resid_surgery.editing.changes import KINDS, Change, Dense, LowRank, Rows
from resid_surgery.editing.packing import pack_data, plain, unpack_data
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import LoadError, ResidSurgeryError
from resid_surgery.models.kept import open_tensors, read_tensors, tensors_hash
from resid_surgery.surgery.storing import from_entry, to_entry

SCHEMA = 1
WHAT = "resid_surgery edit"
FIELDS: dict[str, type] = {"changes": list, "interventions": list, "rewrites": list, "method": str, "expects": dict,
                           "about": dict, "fitting": dict}  # fmt: skip
PARTS: dict[type[Change], tuple[str, dict[str, int | None]]] = {
    Rows: ("axes", {"index": 2, "delta": None}),
    LowRank: ("lead", {"left": 2, "right": 2}),
    Dense: ("", {"delta": None}),
}
"""What beside its name a kind of change is stored as: where it acts, and its tensors with their dimensions."""


def keep(path: Any, fields: Mapping[str, Any]) -> Path:
    """Write an edit's fields; see `Edit.save`.

    Raises:
        ArgumentError: the path does not end in ``.safetensors``. LoadError: it cannot be written.
    """
    place = as_path("path", path, "the path of a .safetensors file", suffix=".safetensors")
    tensors: dict[str, Tensor] = {}
    for i, change in enumerate(fields["changes"]):
        tensors |= {f"change.{i}.{name}": part for name, part in change.parts().items()}
    tensors |= {f"key.{name}": value for name, value in fields["keys"].items()}
    vectors: dict[str, Tensor] = {}
    operations = [to_entry(i, one, vectors) for i, one in enumerate(fields["interventions"])]
    tensors |= {f"operation.{name}": value for name, value in vectors.items()}
    fitting: pd.DataFrame = fields["fitting"]
    body = {
        "changes": [change.spec() for change in fields["changes"]],
        "interventions": operations,
        "method": fields["method"],
        "rewrites": [one.said() for one in fields["rewrites"]],
        "expects": dict(fields["expects"]),
        "about": pack_data(plain(fields["about"], "about")),
        "fitting": json.loads(fitting.to_json(orient="split", double_precision=15, force_ascii=False)),
    }
    text = utf8(json.dumps(body, ensure_ascii=False, allow_nan=False, sort_keys=True)).decode()
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"what": WHAT, "schema": str(SCHEMA), "edit": text, "hash": tensors_hash(held, text)}
    try:
        return write_whole(place, tensor_bytes(held or {"nothing": torch.zeros(0)}, about))
    except OSError as error:
        raise LoadError(f"the edit could not be written to {path}: {error}.") from error


def kept(path: Any) -> dict[str, Any]:
    """The fields of an edit that `keep` wrote; see `Edit.load`.

    Raises:
        LoadError: it cannot be read, is damaged, of another schema, or no edit.
    """
    path = as_path("path", path, "the path of a .safetensors file")
    with _readable(path):
        said, held = read_tensors(path)
    if said.get("what") != WHAT:
        raise LoadError(
            f"{path} is no edit but a safetensors file of something else; differences of tensors are read with "
            "Edit.from_delta."
        )
    if said.get("schema") != str(SCHEMA):
        raise LoadError(f"{path} must be an edit of schema {SCHEMA}; got {said.get('schema')!r}.")
    nothing = held.pop("nothing", None)
    if nothing is not None and nothing.numel():
        raise LoadError(f"{path} is damaged: it holds numbers that belong to nothing.")
    if said.get("hash") != tensors_hash(held, said.get("edit", "")):
        raise LoadError(f"{path} is damaged: its contents are not those that were written.")
    try:
        return _fields(parse_json(said["edit"]), held)
    except (KeyError, TypeError, ValueError, AttributeError, ResidSurgeryError) as error:
        raise LoadError(f"{path} is no edit of schema {SCHEMA}: {type(error).__name__}: {error}.") from error


def is_kept(path: Any) -> bool:
    """Whether a safetensors file is an edit that `keep` wrote.

    Raises:
        LoadError: it cannot be read at all.
    """
    with _readable(path), open_tensors(path) as file:
        return (file.metadata() or {}).get("what") == WHAT


@contextmanager
def _readable(path: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        cut = "" if isinstance(error, OSError) else " It is cut off, damaged or no safetensors file."
        raise LoadError(f"{path} cannot be read as an edit: {error}.{cut}") from error


def _fields(body: dict[str, Any], held: dict[str, Tensor]) -> dict[str, Any]:
    _need("fields", isinstance(body, dict) and body.keys() == FIELDS.keys(), body)
    for name, kind in FIELDS.items():
        _need(name, isinstance(body[name], kind), body[name])
    _need("expects", all(isinstance(one, str) for one in body["expects"].values()), body["expects"])
    vectors = {name.removeprefix("operation."): t for name, t in held.items() if name.startswith("operation.")}
    _need("operations' vectors", all(t.is_floating_point() for t in vectors.values()), list(vectors))
    vectors = {name: t.double() for name, t in vectors.items()}
    changes = tuple(_change(i, spec, held) for i, spec in enumerate(body["changes"]))
    paths = [path for one in changes for path in one.paths]
    _need("changes of different tensors", len(set(paths)) == len(paths), paths)
    return {
        "changes": changes,
        "interventions": tuple(from_entry(i, one, vectors) for i, one in enumerate(body["interventions"])),
        "method": body["method"],
        "rewrites": tuple(Rewrite(**one) for one in body["rewrites"]),
        "expects": body["expects"],
        "about": unpack_data(body["about"]),
        "fitting": _fitting(body["fitting"]),
        "keys": {name.removeprefix("key."): t for name, t in held.items() if name.startswith("key.")},
    }


def _fitting(said: dict[str, Any]) -> pd.DataFrame:
    columns, rows = said["columns"], said["data"]
    _need("fitting's columns", isinstance(columns, list) and len({*columns}) == len(columns), columns)
    _need("fitting's rows", isinstance(rows, list) and all(len(one) == len(columns) for one in rows), columns)
    return pd.DataFrame(rows, columns=columns)


def _change(i: int, spec: dict[str, Any], held: dict[str, Tensor]) -> Change:
    kind = KINDS[spec["kind"]]
    name, tied, shape = spec["name"], spec["tied"], spec["shape"]
    _need("name, tied", isinstance(tied, list) and all(isinstance(one, str) and one for one in (name, *tied)), spec)
    _need("shape", _sizes(shape) and math.prod(shape) < 2**63, shape)
    where, parts = PARTS[kind]
    fields: dict[str, Any] = {where: _where(kind, where, spec[where], shape)} if where else {}
    for part in parts:
        fields[part] = held[f"change.{i}.{part}"]
        _need(part, _fits(part, parts[part], fields[part]), f"{fields[part].dtype} {tuple(fields[part].shape)}")
    return kind(name=name, tied=tuple(tied), shape=tuple(shape), **fields)


def _where(kind: type[Change], name: str, given: Any, shape: list[int]) -> tuple[int, ...]:
    """Along which axes, or at which leading indices, a change acts."""
    _need(name, _sizes(given) and len(given) <= len(shape), given)
    if kind is Rows:
        _need(name, len(set(given)) == len(given) and all(axis < len(shape) for axis in given), given)
    else:
        within = all(at < size for at, size in zip(given, shape, strict=False))
        _need(name, within and len(shape) == len(given) + 2, given)
    return tuple(given)


def _fits(part: str, dims: int | None, tensor: Tensor) -> bool:
    kinds = (torch.int64, torch.int32) if part == "index" else ()
    return (tensor.dtype in kinds or (not kinds and tensor.is_floating_point())) and dims in (None, tensor.ndim)


def _sizes(given: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on."""
    return isinstance(given, list) and all((n := index_of(one)) is not None and n >= 0 for one in given)


def _need(what: str, holds: bool, got: Any) -> None:
    if not holds:
        raise ValueError(message(what, "as `Edit.save` writes them", got))

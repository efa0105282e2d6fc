"""Keeping: an edit as one ``.safetensors`` file, whose metadata holds all that is no tensor as JSON.

Nothing is unpickled. A hash of every tensor and of the JSON stands beside them, so that a damaged file is refused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from resid_surgery._check import message
from resid_surgery._files import write_whole
from resid_surgery.editing.changes import KINDS, Change, Dense, LowRank, Rows
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, LoadError, ResidSurgeryError
from resid_surgery.models.kept import tensors_hash
from resid_surgery.surgery.storing import from_entry, to_entry

SCHEMA = 1
WHAT = "resid_surgery edit"


def keep(path: Any, fields: Mapping[str, Any]) -> Path:
    """Write an edit's fields; see `Edit.save`.

    Raises:
        ArgumentError: the path does not end in ``.safetensors``. LoadError: it cannot be written.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path).endswith(".safetensors"):
        raise ArgumentError(message("path", "the path of a .safetensors file", path))
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
        "about": dict(fields["about"]),
        "fitting": json.loads(fitting.to_json(orient="split", double_precision=15, force_ascii=False)),
    }
    text = json.dumps(body, ensure_ascii=False, sort_keys=True)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"what": WHAT, "schema": str(SCHEMA), "edit": text, "hash": tensors_hash(held, text)}
    try:
        return write_whole(Path(path), tensor_bytes(held or {"nothing": torch.zeros(0)}, about))
    except OSError as error:
        raise LoadError(f"the edit could not be written to {path}: {error}.") from error


def kept(path: Any) -> dict[str, Any]:
    """The fields of an edit that `keep` wrote; see `Edit.load`.

    Raises:
        LoadError: it cannot be read, is damaged, of another schema, or no edit.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(message("path", "the path of a .safetensors file", path))
    said, held = _read(path, tensors=True)
    if said.get("what") != WHAT:
        raise LoadError(
            f"{path} is no edit but a safetensors file of something else; differences of tensors are read with "
            "Edit.from_delta."
        )
    if said.get("schema") != str(SCHEMA):
        raise LoadError(f"{path} must be an edit of schema {SCHEMA}; got {said.get('schema')!r}.")
    held.pop("nothing", None)
    if said.get("hash") != tensors_hash(held, said.get("edit", "")):
        raise LoadError(f"{path} is damaged: its contents are not those that were written.")
    try:
        return _fields(json.loads(said["edit"]), held)
    except (KeyError, TypeError, ValueError, ResidSurgeryError) as error:
        raise LoadError(f"{path} is no edit of schema {SCHEMA}: {type(error).__name__}: {error}.") from error


def is_kept(path: Any) -> bool:
    """Whether a safetensors file is an edit that `keep` wrote.

    Raises:
        LoadError: it cannot be read at all.
    """
    return _read(path, tensors=False)[0].get("what") == WHAT


def _read(path: Any, *, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys()) if tensors else []
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        cut = "" if isinstance(error, OSError) else " It is cut off, damaged or no safetensors file."
        raise LoadError(f"{path} cannot be read as an edit: {error}.{cut}") from error


def _fields(body: dict[str, Any], held: dict[str, Tensor]) -> dict[str, Any]:
    vectors = {name.removeprefix("operation."): t.double() for name, t in held.items() if name.startswith("operation.")}
    fitting = body["fitting"]
    return {
        "changes": tuple(_change(i, spec, held) for i, spec in enumerate(body["changes"])),
        "interventions": tuple(from_entry(i, one, vectors) for i, one in enumerate(body["interventions"])),
        "method": body["method"],
        "rewrites": tuple(Rewrite(**one) for one in body["rewrites"]),
        "expects": body["expects"],
        "about": body["about"],
        "fitting": pd.DataFrame(fitting["data"], columns=fitting["columns"]),
        "keys": {name.removeprefix("key."): t for name, t in held.items() if name.startswith("key.")},
    }


def _change(i: int, spec: dict[str, Any], held: dict[str, Tensor]) -> Change:
    kind = KINDS[spec["kind"]]
    given: dict[str, Any] = {"name": spec["name"], "tied": tuple(spec["tied"]), "shape": tuple(spec["shape"])}
    more = {Rows: ("axes",), LowRank: ("lead",), Dense: ()}[kind]
    parts = {Rows: ("index", "delta"), LowRank: ("left", "right"), Dense: ("delta",)}[kind]
    given |= {name: tuple(spec[name]) for name in more} | {name: held[f"change.{i}.{name}"] for name in parts}
    return kind(**given)

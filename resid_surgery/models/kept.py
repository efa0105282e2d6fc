"""Kept: tensors in the cache folder with a hash of their contents and of the file's name, which says what they are, so
that neither a damaged file nor one that belongs elsewhere is ever believed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from resid_surgery._files import open_regular, write_whole


def tensors_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """128-bit hash of a text and of named tensors: names, dtypes, shapes and bytes, in the order of names."""
    total = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def open_tensors(path: Any) -> Iterator[Any]:
    """A safetensors file, opened; a folder, a pipe or a device is refused, not waited for.

    Raises:
        OSError: no such file, or none. SafetensorError: its header is damaged, too large, or does not fit its size.
    """
    open_regular(Path(path)).close()
    with safe_open(path, framework="pt") as file:
        yield file


def read_tensors(path: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, in memory of their own: what is done to the file later, which would
    change mapped tensors and end the process where it is cut off, does not touch them.

    Raises:
        OSError, SafetensorError: as of `open_tensors`. ValueError: a tensor cannot be read.
    """
    with open_tensors(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def read_kept(path: Path) -> dict[str, Tensor]:
    """The tensors that `write_kept` wrote under this name; {} where there are none, or damaged: they are made anew."""
    try:
        about, found = read_tensors(path)
    except (OSError, SafetensorError, ValueError):
        return {}
    return found if about.get("hash") == tensors_hash(found, path.name) else {}


def write_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their hash, whole or not at all, making the folder if need be.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, tensor_bytes(held, {"hash": tensors_hash(held, path.name)}))

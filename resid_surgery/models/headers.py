"""Headers of files of weights, and configs beside them, held against the files before a reader believes them."""

import math
from pathlib import Path
from typing import Any, BinaryIO

import torch

from resid_surgery._files import open_regular

GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_TEXT, GGUF_LIST = 8, 9
MOST_COUNTED = 1 << 16  # tensors, or fields, of a GGUF file
MOST_ITEMS = 1 << 22  # of the lists in its fields, together
LONGEST_TEXT = 1 << 24
TIMES, SPARE = 16, 1 << 28
"""A model may take so many times the bytes that its files hold (packed numbers, buffers), and so many bytes more."""


def check_gguf(path: Path) -> None:
    """Walk the header of a GGUF file by its own counts, each held against what is left of the file: a reader that
    believes them would not come back.

    Raises:
        ValueError: it is no GGUF, is cut off, or counts more than it holds. OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        _GgufHeader(file, path.stat().st_size).walk()


def check_size(config: Any, held: int, *, remote: bool = False) -> None:
    """Hold a config against its files: the model is built without numbers (on the meta device), and must not be far
    larger than they are, since its tensors are made before their numbers are looked for.

    Args:
        config: of transformers. held: bytes of the files of weights. remote: code of its own may run.

    Raises:
        ValueError: it would be far larger. Whatever transformers raises of a config that makes no model.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    wanted = sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))
    if wanted > TIMES * held + SPARE:
        raise ValueError(f"its config is of a model of {wanted:,} bytes, but its files hold {held:,}; it is damaged")


class _GgufHeader:
    """A GGUF file's fields and tensors as its header tells them; `left`: bytes, `items`: of lists, still allowed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left, self.items, self.order = file, size, size, MOST_ITEMS, "little"

    def walk(self) -> None:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin as GGUF does")
        version = self.take(4)
        self.order = "little" if int.from_bytes(version, "little") & 0xFFFF else "big"
        tensors = self.within("tensors", self.number(8), MOST_COUNTED)
        for _ in range(self.within("fields", self.number(8), MOST_COUNTED)):
            name, kind = self.text(), self.number(4)
            value = self.value(kind)
            if name.endswith(b".block_count"):
                self.within("layers", value, tensors)
        total = sum(self.tensor() for _ in range(tensors))
        self.within("bytes of tensors", total, self.left)

    def value(self, kind: int) -> int:
        """Skip a value; a whole number is given back."""
        if kind == GGUF_TEXT:
            return len(self.text())
        if kind != GGUF_LIST:
            return self.number(self.width(kind))
        inner, count = self.number(4), self.number(8)
        self.items -= self.within("items", count, self.items)
        if inner == GGUF_TEXT:
            return sum(len(self.text()) for _ in range(count))
        return len(self.take(count * self.width(inner)))

    def tensor(self) -> int:
        """Skip what is said of a tensor; its size in bytes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.text()
        dims = [self.number(8) for _ in range(self.within("dimensions", self.number(4), 8))]
        elements = self.within("elements", math.prod(dims), 64 * self.size)
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(self.number(4))]
        self.within("bytes of a tensor", self.number(8), self.size)
        return int(elements // block * width)

    def text(self) -> bytes:
        return self.take(self.within("bytes of a text", self.number(8), LONGEST_TEXT))

    def width(self, kind: int) -> int:
        if kind not in GGUF_SIZES:
            raise ValueError(f"it has a field of unknown type {kind}")
        return GGUF_SIZES[kind]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), self.order)  # type: ignore[arg-type]

    def take(self, count: int) -> bytes:
        self.within("more bytes", count, self.left)
        self.left -= count
        return self.file.read(count)

    def within(self, what: str, count: int, most: int) -> int:
        if count > most:
            raise ValueError(f"it counts {count} {what} where there can be at most {most}")
        return count

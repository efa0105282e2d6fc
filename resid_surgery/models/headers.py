"""Headers of files of weights, and configs beside them, held against the files before a reader believes them."""

import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from resid_surgery._files import open_regular

GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_TEXT, GGUF_LIST = 8, 9
MOST_COUNTED = 1 << 16  # tensors, or fields, of a GGUF file
MOST_ITEMS = 1 << 22  # of the lists in its fields, together
LONGEST_TEXT = 1 << 24
TIMES, SPARE, EACH = 16, 1 << 28, 1 << 13
"""A model may take so many times the bytes that its files hold (packed numbers, buffers), and so many bytes more, where
every module and tensor takes some itself."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers", "encoder_layers")
"""What configs call how many layers there are: each has tensors of its own."""
COUNTS = re.compile("(?!.*(size|dim|width|channel))(?!id2label|label2id)"
                    ".*(layer|label|depth|block|stage|cycle|replace|attention_types)")  # fmt: skip
MOST_GONE_THROUGH = 1 << 12
"""What else a config may go through by itself, such as one name for each label, and how many of them it may have."""


def check_gguf(path: Path) -> int:
    """How many numbers a GGUF file holds. Its header is walked by its own counts, each held against what is left of the
    file: a reader that believes them would not come back.

    Raises:
        ValueError: it is no GGUF, is cut off, or counts more than it holds. OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        header = _GgufHeader(file, path.stat().st_size)
        header.walk()
    return header.elements


def check_counts(config: Any, tensors: int | None) -> None:
    """Refuse counts of a config that would be gone through, one by one, before any weight is looked for.

    Args:
        config: data of a config.json. tensors: how many its files hold; None where that is not known.

    Raises:
        ValueError: more layers than tensors, or another count beyond any model's; or code from elsewhere is named.
    """
    for depth, name, value in _leaves(config):
        if isinstance(value, str) and name.endswith("_implementation") and "/" in value:
            raise ValueError(
                f"has a config that names code to be fetched and run ({name}: {value[:60]!r}); take it out"
            )
        count = _number(value) if COUNTS.match(name) else 0
        if name in DEPTHS and tensors is not None and depth < 2 and count > max(tensors, 1):
            raise ValueError(f"has a config of {_shown(count)} layers and {tensors} tensors; it is damaged")
        if count > MOST_GONE_THROUGH:
            raise ValueError(f"has a config of {_shown(count)} for {name[:40]}, more than any model has; it is damaged")


def _leaves(value: Any, name: str = "", depth: int = -1) -> Iterator[tuple[int, str, Any]]:
    """(how deep, name, value) of all that a config says; members of lists go by the name of the list."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, name if name in ("id2label", "label2id") else key, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, name, depth)
    else:
        yield depth, name, value


def _number(value: Any) -> float:
    """A number, also one that stands there as a text; 0 for anything else."""
    try:
        return 0 if isinstance(value, bool) or value is None else float(value)
    except ValueError:
        return 0
    except OverflowError:  # of a whole number
        return math.inf


def _shown(count: float) -> str:
    return f"{count:.0f}" if count < 1e15 else f"{count:.3g}"


@contextmanager
def no_larger_than(held: Callable[[], int | None]) -> Iterator[None]:
    """Within it, refuse the building of a model on the meta device that comes to far more than its files hold, while
    it is built: its tensors are made before their numbers are looked for.

    Args:
        held: gives the bytes of the files of weights; None where that is not known. Asked once, when building begins.

    Raises:
        ValueError: it would be far larger.
    """
    here, made, most = threading.get_ident(), 0, list[float]()

    def count(module: nn.Module, name: str, one: Any) -> None:
        nonlocal made
        if threading.get_ident() != here or (isinstance(one, torch.Tensor) and not one.is_meta):
            return
        if not most:
            known = held()
            most.extend([math.inf if known is None else TIMES * known + SPARE, known or 0])
        made += (one.numel() * one.element_size() if isinstance(one, torch.Tensor) else 0) + EACH
        if made > most[0]:
            raise ValueError(
                f"its config is of a model of at least {made:,} bytes, but its files hold {most[1]:,}; it is damaged"
            )

    with ExitStack() as stack:
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook,
                         register_module_buffer_registration_hook):  # fmt: skip
            stack.callback(register(count).remove)
        yield


class _GgufHeader:
    """A GGUF file's fields and tensors as its header tells them; `left`: bytes, `items`: of lists, still allowed;
    `elements`: of its tensors so far."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left, self.items, self.order = file, size, size, MOST_ITEMS, "little"
        self.elements = 0

    def walk(self) -> None:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin as GGUF does")
        version = self.take(4)
        self.order = "little" if int.from_bytes(version, "little") & 0xFFFF else "big"
        tensors = self.within("tensors", self.number(8), MOST_COUNTED)
        architecture, layers = b"", dict[bytes, int]()
        for _ in range(self.within("fields", self.number(8), MOST_COUNTED)):
            name, kind = self.text(), self.number(4)
            if name == b"general.architecture" and kind == GGUF_TEXT:
                architecture = self.text()
                continue
            value = self.value(kind)
            if name.endswith(b".block_count"):
                layers[name] = self.within("layers", value, tensors)
        total = sum(self.tensor() for _ in range(tensors))
        self.within("bytes of tensors", total, self.left)
        if architecture + b".block_count" not in layers:  # a reader would take the architecture's usual number
            raise ValueError("it does not say how many layers its architecture has")

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
        self.elements += elements
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

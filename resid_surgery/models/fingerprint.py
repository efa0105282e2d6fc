"""Which weights a model has: a full hash, and a quick look that says when to take a new one.

The full hash is a position-sensitive 128-bit xxh3 of every parameter's and buffer's bytes: an XOR
reduction such as `torch.hash_tensor` would miss two swapped rows, and is slower. The quick look
compares storage, version counters and a sample that touches every row and column of every tensor;
it can miss a write through ``.data`` to a few elements, which bumps no counter.

Beside the weights stand the modules themselves: which there are, their hooks and their own settings (an adapter that
is switched on or off, a changed eps, another activation function, a changed config). `structure` is equal while those
are the same.
"""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import PretrainedConfig

NUMBERS = frozenset((bool, int, float, str, type(None)))
SAME = (types.FunctionType, types.BuiltinFunctionType, functools.partial, torch.dtype, np.generic)
SMALL = 64
COLLECTORS = "transformers.utils.output_capturing"
"""Whose hooks stay on a model for good once it is asked for attentions or hidden states; they only look."""
COLLECTED = "_output_capturing_hooks_installed"
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) | {COLLECTED}


def hooks_of(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """A module's forward hooks but those of transformers, which only collect what it is asked for."""
    return {key: one for key, one in hooks.items() if getattr(one, "__module__", "") != COLLECTORS}


@final
class Weights:
    """The submodules and tensors of a module tree, and their fingerprint.

    Attributes:
        token: what the quick look saw when the fingerprint was last taken for a recording.
        first: the first full fingerprint that was taken, as of loading. stood: the first `structure`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._modules: list[nn.Module] = []
        self._children: list[list[int]] = []
        self._named: list[list[str]] = []
        self._fingerprint = self.first = ""
        self.stood: tuple[Any, ...] | None = None
        self.token: tuple[Any, ...] | None = None
        self._samples: tuple[tuple[int, ...], list[list[tuple[Tensor, Tensor]]]] | None = None

    def modules(self) -> list[nn.Module]:
        """Every submodule once, in module order."""
        if not self._modules or self._children != self._snapshot():
            self._modules = list(self._root.modules())
            self._children = self._snapshot()
            self._named = [[name for name in sub.__dict__ if name not in OF_EVERY_MODULE] for sub in self._modules]
        return self._modules

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer once, in module order."""
        found: dict[int, Tensor] = {}
        for sub in self.modules():
            for tensor in (*sub._parameters.values(), *sub._buffers.values()):
                if tensor is not None:
                    found.setdefault(id(tensor), tensor)
        return list(found.values())

    def structure(self) -> tuple[Any, ...]:
        """Equal while a shadow is still faithful: the same submodules, tensors, hooks, settings and configs."""
        hooks = [
            (*hooks_of(sub._forward_hooks), None, *sub._forward_pre_hooks, id(sub.__dict__.get("forward")))
            for sub in self.modules()
        ]
        settings: list[Any] = [len(sub.__dict__) - (COLLECTED in sub.__dict__) for sub in self._modules]
        others: dict[int, Any] = {}
        for sub, named in zip(self._modules, self._named, strict=True):
            held = sub.__dict__
            for name in named:
                value = held.get(name)
                if type(value) in NUMBERS or isinstance(value, SAME):
                    settings.append(value)
                else:
                    others[id(value)] = value
        configs = [_of_config(one) for one in others.values() if isinstance(one, PretrainedConfig)]
        found = (
            *map(id, self._modules),
            *map(id, self.tensors()),
            *hooks,
            *settings,
            *_plain(others.values()),
            *configs,
        )
        self.stood = self.stood or found
        return found

    def fingerprint(self) -> str:
        """Hash of every tensor: dtypes, shapes and bytes."""
        total = xxhash.xxh3_128()
        for tensor in self.tensors():
            _add(total, tensor, tensor)
        self._fingerprint = total.hexdigest()
        self.first = self.first or self._fingerprint
        return self._fingerprint

    def contents(self) -> str:
        """Hash of every tensor's bytes, wherever it lies: equal for equal weights on any device. It is the fingerprint
        of weights on the CPU."""
        total = xxhash.xxh3_128()
        for tensor in self.tensors():
            _add(total, tensor, tensor.detach().cpu())
        return total.hexdigest()

    def known_fingerprint(self) -> str:
        """The last full fingerprint while the quick look sees no change, else a new one."""
        token = self.quick_token()
        if not self._fingerprint or token != self.token:
            self.fingerprint()
            self.token = token
        return self._fingerprint

    def quick_token(self) -> tuple[Any, ...]:
        """Storage, version counters and a sample of every tensor (5 ms for 540 MB)."""
        sample = xxhash.xxh3_64()
        tensors = self.tensors()
        stamps = tuple((t.data_ptr(), -1 if t.is_inference() else t._version, t.shape) for t in tensors)
        places = tuple(stamp[0] for stamp in stamps)
        if self._samples is None or self._samples[0] != places:
            kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for t in tensors:
                kinds.setdefault((t.dtype, t.device), []).append((t.detach().reshape(-1), _diagonal(t)))
            self._samples = (places, list(kinds.values()))
        for together in self._samples[1]:
            _feed(sample, torch.cat([flat[picked] for flat, picked in together]))
        return (sample.intdigest(), *stamps)

    def _snapshot(self) -> list[list[int]]:
        return [[id(child) for child in sub._modules.values()] for sub in self._modules]


def _plain(values: Iterable[Any]) -> Iterator[Any]:
    """Numbers, texts, functions and loose tensors among a module's own attributes, and those that its lists and dicts
    hold."""
    for value in values:
        kind = type(value)
        if kind in NUMBERS or isinstance(value, SAME):
            yield value
        elif isinstance(value, Tensor):
            yield _stamp(value)
        elif kind in (list, tuple, set):
            yield tuple(_plain(value))
        elif kind is dict:
            yield (*_plain(value), *_plain(value.values()))


def _of_config(config: PretrainedConfig) -> tuple[Any, ...]:
    """What a config says, and those inside it."""
    values = list(vars(config).values())
    return (*_plain(values), *(_of_config(one) for one in values if isinstance(one, PretrainedConfig)))


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Which tensor it is and when it was written to last; of a small one, what it holds."""
    total = xxhash.xxh3_64()
    if not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() <= SMALL:
        _feed(total, tensor.cpu())
    return id(tensor), -1 if tensor.is_inference() else tensor._version, total.intdigest()


def _diagonal(tensor: Tensor) -> Tensor:
    """Flat indices of a sample of a tensor that touches every row and every column."""
    width = tensor.shape[-1] if tensor.ndim else 1
    height = tensor.numel() // max(1, width)
    rows, columns = torch.arange(height), torch.arange(width)
    picked = torch.cat([rows * width + rows % max(1, width), (columns % max(1, height)) * width + columns])
    return picked[picked < tensor.numel()].to(tensor.device)


def _add(total: Any, tensor: Tensor, held: Tensor) -> None:
    total.update(f"|{tensor.dtype}|{tuple(tensor.shape)}".encode())
    _feed(total, held)


def _feed(total: Any, tensor: Tensor) -> None:
    """Add a tensor's bytes to a hash; on an accelerator, two reductions of them."""
    t = tensor.detach()
    if t.device.type == "cpu":
        total.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif t.numel():
        for dim in range(max(t.ndim, 1)):
            total.update(torch.hash_tensor(t, dim=dim).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())

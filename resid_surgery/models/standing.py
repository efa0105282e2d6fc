"""Standing: what a model's modules, hooks and settings are, as a hash that is the same in every process.

The same weights compute something else behind a hook, under another activation function or with a doubled scale. What
is kept on disk of a model (figures of a base, the rows of a run) is therefore kept for its weights and its standing.
Where a part cannot be told by its contents (a hook with a closure, an object of the user's) the standing is not `sure`:
two that are equal may then compute different things.
"""

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from resid_surgery.models.fingerprint import NUMBERS, OF_EVERY_MODULE, hooks_of

IDLE = ("transformers_version", "architectures", "torch_dtype", "dtype", "quantization_config", "use_cache",
        "model_type")  # fmt: skip
"""Entries of a config that say nothing, or nothing else, about what a forward computes."""
WHERE = frozenset(("name_or_path", "hf_device_map", "warnings_issued", "_hf_hook", "_old_forward", "forward",
                   "__nnsight__", "_is_hf_initialized"))  # fmt: skip
"""Attributes of modules that say where they lie or how they came."""
DEEPEST = 8


@final
@dataclass(frozen=True)
class Standing:
    """What a module tree is besides its weights.

    Attributes:
        hash: equal for trees of the same classes, hooks and settings. sure: everything that counts could be told.
    """

    hash: str
    sure: bool


def standing(module: nn.Module) -> Standing:
    """What stands beside the weights of a module tree, as it is now."""
    teller = _Teller()
    total = xxhash.xxh3_128()
    for path, one in module.named_modules():
        total.update("\n".join((path, *teller.of_module(one), "")).encode("utf-8", "backslashreplace"))
    return Standing(total.hexdigest(), teller.sure)


class _Teller:
    """Tells values in words that hold no addresses, and remembers whether something could not be told."""

    def __init__(self) -> None:
        self.sure = True

    def of_module(self, one: nn.Module) -> Iterator[str]:
        yield _named(type(one))
        yield self.value(type(one).forward)
        own = one.__dict__.get("forward")
        if own is not None and not hasattr(one, "_hf_hook") and not type(own).__module__.startswith("nnsight"):
            yield f"its own forward {self._unsure(own)}"
        for kind, hooks in (("before", one._forward_pre_hooks), ("after", hooks_of(one._forward_hooks))):
            for hook in hooks.values():
                yield f"hook {kind} {self._unsure(hook)}"
        general = isinstance(one, PreTrainedModel)
        for name in sorted(one.__dict__):
            if name not in OF_EVERY_MODULE and name not in WHERE and not (general and name.startswith("_")):
                yield f"{name} {self.value(one.__dict__[name])}"

    def value(self, one: Any, depth: int = 0) -> str:
        """A value in words."""
        if type(one) in NUMBERS or isinstance(one, (np.generic, torch.dtype, complex)):
            return f"{type(one).__name__} {one!r}"
        if isinstance(one, Tensor):
            return self._tensor(one)
        if isinstance(one, PretrainedConfig):
            return self._config(one, depth)
        if isinstance(one, GenerationConfig):
            return "generation"
        if isinstance(one, functools.partial):
            return f"partial {self._all((one.func, *one.args, one.keywords), depth)}"
        if isinstance(one, types.BuiltinFunctionType | type):
            return _named(one)
        if isinstance(one, types.FunctionType):
            return self._function(one)
        if isinstance(one, Mapping | list | tuple | set | frozenset) and depth < DEEPEST:
            return self._all(one, depth)
        return self._unsure(one)

    def _all(self, some: Any, depth: int) -> str:
        if isinstance(some, Mapping):
            told = [f"{self.value(key, depth + 1)}: {self.value(some[key], depth + 1)}" for key in some]
        else:
            told = [self.value(one, depth + 1) for one in some]
        ordered: Iterable[str] = told if isinstance(some, list | tuple) else sorted(told)
        kind = "mapping" if isinstance(some, Mapping) else "set" if isinstance(some, set | frozenset) else "sequence"
        return f"{kind} [{', '.join(ordered)}]"

    def _config(self, one: PretrainedConfig, depth: int) -> str:
        held = {name: value for name, value in vars(one).items() if not name.startswith("_") and name not in IDLE}
        return f"{_named(type(one))} {self._all(held, depth)}"

    def _tensor(self, one: Tensor) -> str:
        if one.is_meta or one.layout is not torch.strided:
            return self._unsure(one)
        held = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"tensor {one.dtype} {tuple(one.shape)} {xxhash.xxh3_64_hexdigest(held.data)}"

    def _function(self, one: types.FunctionType) -> str:
        """A function by its name and code; sure only where that name leads back to it, in a module that is a file."""
        held: Any = None if one.__module__ == "__main__" else sys.modules.get(one.__module__)
        for part in one.__qualname__.split("."):
            held = getattr(held, part, None)
        self.sure = self.sure and held is one
        return f"{_named(one)} {_code(one.__code__)}"

    def _unsure(self, one: Any) -> str:
        """What cannot be told by its contents: its name, and its code if it has any."""
        self.sure = False
        inner = getattr(one, "__func__", one)
        code = getattr(inner, "__code__", None)
        return f"{_named(inner if code is not None else type(one))} {'' if code is None else _code(code)}"


def _named(one: Any) -> str:
    return f"{getattr(one, '__module__', '')}.{getattr(one, '__qualname__', '')}"


def _code(code: types.CodeType) -> str:
    """Hash of what a function does, wherever its file lies."""
    total = xxhash.xxh3_64(code.co_code)
    for one in code.co_consts:
        told: Any = sorted(map(repr, one)) if isinstance(one, frozenset) else one  # whose order is another every time
        total.update(
            (_code(one) if isinstance(one, types.CodeType) else repr(told)).encode("utf-8", "backslashreplace")
        )
    total.update(repr(code.co_names).encode())
    return total.hexdigest()

"""Faults on demand, and everything that a call must leave as it was: for tests of what breaks off half way.

A fault is raised at the n-th call of a function (`failing`), at the n-th forward of a module (`Trap`), or at the n-th
Python call of all within this library, nnsight and the model's code (`struck`), as a signal handler would raise it.
"""

import contextlib
import dataclasses
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
import xxhash
from nnsight.tracing import tracer as nnsight_tracer
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.utils import logging as transformers_logging

from resid_surgery.models import remoting, tracing
from resid_surgery.models.opening import OpenedModel

ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
         "_load_state_dict_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")  # fmt: skip
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
                "_global_backward_pre_hooks", "_global_module_registration_hooks")  # fmt: skip
STRUCK = ("resid_surgery", "nnsight", "transformers/models", "greenlet")


# ---- what must be as it was


def state(model: OpenedModel) -> dict[str, Any]:
    """All that a user could notice of his model, of the process and of this thread."""
    return {**state_of_module(model.module), **state_of_process(), "locks": free(model)}


def state_of_module(module: nn.Module) -> dict[str, Any]:
    """Bytes, identities, modes, hooks, flags and configuration of a module tree."""
    tensors = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
    return {
        "bytes": {name: bytes_of(t) for name, t in tensors.items()},
        "tensors": {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad) for name, t in tensors.items()},
        "gradients": {name: None if t.grad is None else bytes_of(t.grad) for name, t in tensors.items()},
        "modules": [(name, id(sub), type(sub)) for name, sub in module.named_modules()],
        "training": [sub.training for sub in module.modules()],
        "own attributes": [sorted(sub.__dict__) for sub in module.modules()],
        "hooks": [[dict(getattr(sub, name)) for name in HOOKS] for sub in module.modules()],
        "attention": getattr(module.config, "_attn_implementation", None),
        "experts": getattr(module.config, "_experts_implementation", None),
        "config": module.config.to_dict(),  # type: ignore[union-attr, operator]
        "generation": repr(getattr(module, "generation_config", None)),
    }


def state_of_process() -> dict[str, Any]:
    """Generators, modes, threads, signals, files, streams, filters and global hooks."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "num_threads": torch.get_num_threads(),
        "alive": sorted(one.name for one in threading.enumerate()),
        "files": files(),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "global hooks": [len(getattr(torch_module, name)) for name in GLOBAL_HOOKS],
        "trace function": (sys.gettrace(), sys._getframe().f_trace),
        "traces": (getattr(nnsight_tracer._local, "depth", 0), len(nnsight_tracer._saves())),
        "remote": (remoting.asked(), remoting._sent.get()),
        "streams": (id(sys.stdout), id(sys.stderr), tuple(sys.path)),
        "warnings": list(warnings.filters),
        "verbosity": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
    }


def files() -> list[str]:
    """What the open file handles lead to; empty where the system does not say."""
    found = []
    for one in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        with contextlib.suppress(OSError):
            found.append(os.readlink(one))
    return sorted(one for one in found if not one.startswith("/proc/"))


def free(model: OpenedModel) -> list[bool]:
    """Whether another thread gets the locks of a model and of tracing."""
    found: list[bool] = []

    def ask() -> None:
        for lock in (model.lock, tracing._trace_lock):
            got = lock.acquire(timeout=1)
            found.append(got)
            if got:
                lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return [name for name in before if before[name] != after[name]]


@contextlib.contextmanager
def as_before(model: OpenedModel) -> Iterator[None]:
    """Fail if anything is not as it was, also after an exception."""
    before = state(model)
    try:
        yield
    finally:
        changed = differences(before, state(model))
        assert changed == [], f"not as it was: {', '.join(changed)}"


def alive(kinds: Iterable[type]) -> dict[type, int]:
    """How many objects of some types there are."""
    gc.collect()
    found = dict.fromkeys(kinds, 0)
    for one in gc.get_objects():
        if type(one) in found:
            found[type(one)] += 1
    return found


# ---- what a call gives, to the bit


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(value: Any) -> str:
    """Hash of a result: every number to the bit; models and modules, which it may hold, do not count."""
    total = xxhash.xxh3_128()
    _feed(total, value, set())
    return total.hexdigest()


def _feed(total: Any, value: Any, seen: set[int]) -> None:
    total.update(type(value).__name__.encode())
    if isinstance(value, (OpenedModel, nn.Module)) or callable(value):
        return
    if isinstance(value, torch.Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode() + bytes_of(value))
    elif isinstance(value, (float, np.floating)):
        total.update(float(value).hex().encode())
    elif isinstance(value, np.ndarray):
        _feed(total, value.tolist(), seen)
    elif isinstance(value, pd.DataFrame):
        for name in value.columns:
            total.update(str(name).encode())
            _feed(total, value[name].tolist(), seen)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            total.update(str(key).encode())
            _feed(total, one, seen)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _feed(total, one, seen)
    elif isinstance(value, (set, frozenset)):
        total.update(repr(sorted(map(repr, value))).encode())
    elif dataclasses.is_dataclass(value) or (type(value).__module__ or "").startswith("resid_surgery"):
        if id(value) not in seen:
            seen.add(id(value))
            for name in _fields(value):
                total.update(name.encode())
                _feed(total, getattr(value, name), seen)
    else:
        total.update(repr(value).encode())


def _fields(value: Any) -> list[str]:
    """Names of what counts; of the label of a recording, the fingerprint."""
    if type(value).__name__ == "Label":
        return ["fingerprint"]
    return [one.name for one in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else sorted(vars(value))


# ---- faults


@contextlib.contextmanager
def failing(holder: Any, name: str, at: int, error: type[BaseException]) -> Iterator[list[int]]:
    """A function, or method of a class, raises at its `at`-th call (counted from 1); the list holds how many there
    were."""
    real, count = vars(holder)[name] if isinstance(holder, type) else getattr(holder, name), [0]
    plain = real.__func__ if isinstance(real, (classmethod, staticmethod)) else real

    def one(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            raise error("injected")
        return plain(*args, **keywords)

    setattr(holder, name, type(real)(one) if isinstance(real, (classmethod, staticmethod)) else one)
    try:
        yield count
    finally:
        setattr(holder, name, real)


class Trap:
    """A forward pre-hook of every module of a model, which raises at the n-th module call where it is set.

    It stands on the user's model before that is loaded, so that it is a hook of his own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.at, self.count, self.error = 0, 0, RuntimeError
        for one in module.modules():
            one.register_forward_pre_hook(self)

    def __deepcopy__(self, memo: Any) -> "Trap":
        return self

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error("injected")

    @contextlib.contextmanager
    def set(self, at: int, error: type[BaseException]) -> Iterator[None]:
        """In this block the `at`-th module call from now on raises."""
        self.at, self.count, self.error = at, 0, error  # type: ignore[assignment]
        try:
            yield
        finally:
            self.at = 0


@contextlib.contextmanager
def struck(at: int, error: type[BaseException], where: tuple[str, ...] = STRUCK) -> Iterator[list[int]]:
    """The `at`-th Python call into some packages raises, as a signal handler would at that moment.

    The list holds how many calls there were: with `at` 0 nothing is raised and they are counted.
    """
    count, told = [0], {}

    def look(frame: FrameType, event: str, arg: Any) -> None:
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file not in told:
            told[file] = any(f"/{one}/" in file for one in where)
        if told[file]:
            count[0] += 1
            if count[0] == at:
                sys.setprofile(None)
                raise error("injected")

    sys.setprofile(look)
    try:
        yield count
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def signalled(after: float) -> Iterator[None]:
    """A real SIGINT after some seconds of this process's own time."""
    handler = signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, after)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what a call gives, how much of this process's own time it takes)."""
    start = os.times().user
    return call(), os.times().user - start


def idle_thread() -> threading.Event:
    """A thread that does nothing until the event is set."""
    over = threading.Event()
    threading.Thread(target=over.wait, name="idle").start()
    return over


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """("value", what a call gives) or ("error", what it raises)."""
    try:
        return "value", call()
    except BaseException as error:  # noqa: BLE001  (whatever it is, the caller looks at it)
        return "error", error

"""Devices and dtypes: where a model's parts may lie and in what, as asked for and as found.

A model may be spread over several devices, block by block. What its parts cannot be is elsewhere: offloaded weights
are in memory only during a forward, and this library reads weights.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from resid_surgery._check import choice, message
from resid_surgery.errors import ArgumentError, LoadError, UnsupportedModelError

MAPS = ("auto", "balanced", "sequential")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def spread_over(device_map: Any, max_memory: Any, device: Any) -> dict[str, Any]:
    """The keywords that lay a checkpoint over devices."""
    if device_map is None:
        if max_memory is not None:
            raise ArgumentError(
                message("max_memory", "given with device_map only", max_memory, do='Pass device_map="auto" with it.')
            )
        return {}
    if device is not None:
        raise ArgumentError(message("device", "left out with device_map, which places everything", device))
    if isinstance(device_map, Mapping):
        if not device_map or not all(isinstance(path, str) for path in device_map):
            raise ArgumentError(message("device_map", "a dict of module paths and devices", device_map))
        for place in device_map.values():
            if place not in ("cpu", "disk"):
                one_device(place)
        device_map = dict(device_map)
    else:
        choice("device_map", device_map, MAPS)
    if max_memory is not None and not (isinstance(max_memory, Mapping) and max_memory):
        raise ArgumentError(message("max_memory", "a dict such as {0: '20GiB', 1: '20GiB'}", max_memory))
    return {"device_map": device_map} | ({} if max_memory is None else {"max_memory": dict(max_memory)})


def need_accelerate() -> None:
    """Refuse to spread a checkpoint without accelerate."""
    if importlib.util.find_spec("accelerate") is None:
        raise LoadError("device_map needs the accelerate package: pip install 'resid-surgery[large]'.")


def one_device(given: Any) -> torch.device:
    """A device of this machine.

    Raises:
        ArgumentError: it is none.
    """
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError, ValueError):  # the last: a number of no device
        raise ArgumentError(message("device", "a torch device such as 'cpu' or 'cuda'", given)) from None
    try:
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no weights")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ArgumentError(message("device", "a device of this machine", given, do=f"torch says: {why}.")) from None
    return device


def one_dtype(given: Any) -> torch.dtype | None:
    """A dtype that models are opened in, by its name or as torch's own; None for a checkpoint's own.

    Raises:
        ArgumentError: it is none of them.
    """
    if given is None or isinstance(given, torch.dtype):
        if given is not None and given not in DTYPES.values():
            raise ArgumentError(message("dtype", "one of " + ", ".join(DTYPES), given))
        return given
    return DTYPES[choice("dtype", given, tuple(DTYPES))]


def require_present(module: nn.Module, name: str) -> None:
    """Refuse weights that are not in memory: offloaded ones, which come in for a forward only, and empty ones."""
    away = [path for path, p in module.named_parameters() if p.is_meta]
    if not away:
        return
    parts = list(dict.fromkeys(path.rpartition(".")[0] for path in away))
    named = ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
    if not any(hasattr(one, "_hf_hook") for one in module.modules()):
        raise LoadError(f"{name} has parameters on the meta device: its weights are not loaded.")
    raise LoadError(
        f"{name} is offloaded in part to the CPU or to disk ({named}): those weights come in for a forward and leave "
        "again, and everything here reads weights. Let it fit: more devices or a larger max_memory, "
        'dtype="bfloat16", or all of it on the CPU (device="cpu").'
    )


def require_whole_blocks(module: nn.Module, name: str) -> None:
    """Refuse a block (what its own class says must not be split) that lies on two devices."""
    whole = set(getattr(module, "_no_split_modules", None) or ())
    for path, one in module.named_modules():
        if type(one).__name__ in whole:
            devices = sorted({str(t.device) for t in (*one.parameters(), *one.buffers())})
            if len(devices) > 1:
                raise UnsupportedModelError(
                    f"{path} of {name} must lie on one device; it lies on {' and '.join(devices)}. Give each block "
                    f'one device in the device map (device_map="auto" does), as "{path}".'
                )


def unwrap_moves(copied: nn.Module) -> None:
    """Drop accelerate's warnings around .to and .cuda of a dispatched model: they would move the user's module."""
    if hasattr(copied, "hf_device_map") or hasattr(copied, "_hf_hook"):
        for verb in ("to", "cuda", "npu", "mlu", "sdaa", "musa", "xpu"):
            copied.__dict__.pop(verb, None)

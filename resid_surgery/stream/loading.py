"""`load`: open a model and prove on one forward that its stream is a ledger, or refuse it."""

from pathlib import Path
from typing import Any

import torch

from resid_surgery.errors import ResidSurgeryError, UnsupportedModelError
from resid_surgery.models.layout import Layout
from resid_surgery.models.opening import OpenedModel, open_model
from resid_surgery.models.settling import settle
from resid_surgery.models.tracing import unwrap
from resid_surgery.stream.closing import prove


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    max_memory: Any = None,
    trust_remote_code: bool = False,
    anatomy: Layout | None = None,
) -> OpenedModel:
    """Open a causal language model and prove the ledger's identities on it with one forward.

    Args:
        model: the alias ``"smollm2-135m"`` (embedded: SmolLM2-135M-Instruct, de-quantised from a
            4-bit GGUF), a hub id, a local folder, a ``.gguf`` file, a Hugging Face model object,
            or an nnsight model. Objects are never changed.
        tokenizer: for model objects; without one, prompts are given by ids.
        dtype: "float64", "float32", "bfloat16", "float16" or a torch dtype; the checkpoint's own
            by default. device: "cpu", "cuda", ... Both are for names and files only.
        device_map: lays a checkpoint over several devices, instead of `device`: "auto", "balanced", "sequential", or
            a dict of module paths and devices, as accelerate takes them (extra `large`; not for .gguf files). Every
            block lies on one device, and no part on disk or, beside other devices, on the CPU: weights are read here.
            A model object that accelerate has dispatched is taken as it lies.
        max_memory: bytes a device ({0: "20GiB", 1: "20GiB"}), with `device_map`.
        trust_remote_code: run code that comes with a checkpoint; off unless asked for.
        anatomy: a `Layout` for an architecture that is not read right by itself. It passes the same
            proof; without one the layout is read off one forward.

    Returns:
        An `OpenedModel` with ``.module`` (untouched), ``.tokenizer`` and ``.anatomy``.

    Raises:
        LoadError: not found, damaged, pickle-only, or not a causal language model; parts of it are offloaded.
        UnsupportedModelError: an architecture whose stream is not a sum of addends.
        ClosureError: an identity fails; it, the layer and the error are named.
        ArgumentError: an argument has the wrong type.
    """
    module, own_tokenizer = unwrap(model)
    opened = open_model(
        module,
        tokenizer=tokenizer if tokenizer is not None else own_tokenizer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        layout=anatomy,
    )
    try:
        settle(opened)
        prove(opened)
    except (ResidSurgeryError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if anatomy is None:
            raise
        raise UnsupportedModelError(
            f"{opened.name} does not fit the layout that was given ({type(error).__name__}: {error}). Compare it with "
            "what the model's modules are called and with what they return."
        ) from error
    if isinstance(model, (str, Path)):
        opened.origin = {"model": model, "tokenizer": tokenizer, "dtype": dtype, "device_map": device_map,
                         "max_memory": max_memory, "trust_remote_code": trust_remote_code,
                         "anatomy": anatomy}  # fmt: skip
    return opened

"""`load`: open a model and prove on one forward that its stream is a ledger, or refuse it."""

from pathlib import Path
from typing import Any

from resid_surgery.errors import ResidSurgeryError, UnsupportedModelError, out_of_memory
from resid_surgery.models.layout import Layout
from resid_surgery.models.opening import OpenedModel, open_model
from resid_surgery.models.settling import settle
from resid_surgery.models.tracing import unwrap
from resid_surgery.models.wrappers import naming_adapters
from resid_surgery.stream.closing import prove
from resid_surgery.stream.recording import refuse_surroundings


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
            or an nnsight model. Objects are never changed. What torch.compile or PEFT put around a model is left out:
            `.module` is what stands inside, adapters on queries, keys and values included.
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
        ArgumentError: an argument has the wrong type; torch.autocast is on, or torch's default device is not the CPU.
    """
    refuse_surroundings()
    module, own_tokenizer = unwrap(model)
    with naming_adapters(module):
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
        _prove(opened, given=anatomy is not None)
    opened.proof = prove
    if isinstance(model, (str, Path)):
        opened.origin = {"model": model, "tokenizer": tokenizer, "dtype": dtype, "device_map": device_map,
                         "max_memory": max_memory, "trust_remote_code": trust_remote_code,
                         "anatomy": anatomy}  # fmt: skip
    return opened


def _prove(opened: OpenedModel, *, given: bool) -> None:
    """Settle heads and prove the ledger; `given`: by a layout of the caller's, which may be what is wrong."""
    try:
        settle(opened)
        prove(opened)
    except Exception as error:
        if not given or isinstance(error, ResidSurgeryError) or out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{opened.name} does not fit the layout that was given ({type(error).__name__}: {error}). Compare it with "
            "what the model's modules are called and with what they return."
        ) from error

"""Adapters: the parts of a LoRA adapter, scaled and oriented as PEFT has them.

PEFT itself says where an adapter sits and how it is scaled (rank and alpha patterns, rsLoRA, transposed layers): its
layers are put into a copy of the model without any numbers (on the meta device), and the numbers are read from the
safetensors file. So nothing is unpickled, and no tensor of the base can be written to.
"""

import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from resid_surgery._check import index_of, message, shown
from resid_surgery._check import path as as_path
from resid_surgery._files import read_json
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.models.kept import read_tensors
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of, ties_of

PREFIX = "base_model.model."
LARGEST_CONFIG = 1 << 22
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's own weights as they are."""
MORE = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "trainable_token_indices",
        "layer_replication", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
        "ensure_weight_tying", "megatron_config")  # fmt: skip
"""Settings with which an adapter does more than add factors to weights."""


@final
@dataclass(frozen=True, eq=False)
class AdapterParts:
    """What an adapter does to weights.

    Attributes:
        factors: (path of the weight, left (out, rank), right (rank, in)) in the stored orientation, scaling included.
        whole: path -> tensor that stands in place of the base's.
    """

    factors: tuple[tuple[str, Float[Tensor, "a rank"], Float[Tensor, "rank b"]], ...]
    whole: Mapping[str, Tensor]


def adapter_parts(base: OpenedModel, adapter: Any) -> AdapterParts:
    """The parts of an adapter: a folder that PEFT saved, or a PEFT model.

    Raises:
        LoadError: it cannot be read, or ``peft`` is not installed. ArgumentError: it is no LoRA adapter of this base
        that does nothing but add to weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise LoadError("reading an adapter needs the peft package: pip install 'resid-surgery[peft]'.")
    if isinstance(adapter, (str, os.PathLike)):
        return _from_folder(base, as_path("adapter", adapter, "a folder that PEFT saved", home=True))
    if isinstance(adapter, nn.Module) and hasattr(adapter, "peft_config"):
        active = _active(adapter)
        if active is not None:
            return _from_model(base, adapter, active)
    raise ArgumentError(message("adapter", "a folder that PEFT saved, or a PEFT model", adapter))


def _from_folder(base: OpenedModel, folder: Path) -> AdapterParts:
    config, held = _config(folder), _numbers(folder)
    _require_plain(config, started=True)
    _require_ranks(config, held, folder)
    factors, ties = [], ties_of(base.module)
    for path, layer in _layers(_skeleton(base, config, folder)):
        kind = "lora_embedding_{}" if _is_embedding(layer) else "lora_{}.weight"
        a, b = (held.pop(f"{PREFIX}{path}.{kind.format(side)}", None) for side in "AB")
        if a is None or b is None:
            raise LoadError(f"{folder.name} must hold the factors of {path}, on which its config puts it; it does not.")
        factors.append(_factor(path, layer, "default", a.clone(), b.clone()))
    whole: dict[str, Tensor] = {}
    for name, tensor in held.items():
        path = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if "lora_" in path:
            raise ArgumentError(f"`adapter` must sit on weights of {base.name}; {folder.name} holds {name} besides.")
        apart = any(part in path.split(".") for part in config.modules_to_save or ())
        whole |= dict.fromkeys([path] if apart else ties.get(path, (path,)), tensor)
    return AdapterParts(tuple(factors), whole)


def _active(adapter: Any) -> list[str] | None:
    """Names of a model's active adapters: of a PEFT model, or of transformers' own model that holds some; None where it
    holds none any more."""
    found = getattr(adapter, "active_adapters", None)
    try:
        return [*(found() if callable(found) else found or ())]
    except ValueError:  # transformers: no adapter is loaded
        return None


def _from_model(base: OpenedModel, adapter: Any, active: list[str]) -> AdapterParts:
    for name in active:
        _require_plain(adapter.peft_config[name], started=False)
    factors = []
    for path, layer in _layers(adapter):
        if layer.merged or layer.disable_adapters:
            raise ArgumentError(f"`adapter` must be active and not merged; at {path} it is. Call unmerge_adapter().")
        path = path.removeprefix(PREFIX)
        kind = ("lora_embedding_A", "lora_embedding_B") if _is_embedding(layer) else ("lora_A", "lora_B")
        for name in (one for one in active if one in getattr(layer, kind[0])):
            a, b = (getattr(layer, side)[name] for side in kind)
            a, b = (one if isinstance(one, Tensor) else one.weight for one in (a, b))
            factors.append(_factor(path, layer, name, a.detach().cpu().clone(), b.detach().cpu().clone()))
    if not factors:
        raise ArgumentError(f"`adapter` must be active; {type(adapter).__name__} has none of {active} in any layer.")
    return AdapterParts(tuple(factors), dict(_effective(adapter, active)))


def _effective(adapter: nn.Module, active: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Path in the base -> the tensor that the adapted model has there, factors aside."""
    for name, tensor in tensors_of(adapter).items():
        path = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if "lora_" in path or ".original_module." in path:
            continue
        if ".modules_to_save." in path:
            path, _, rest = path.partition(".modules_to_save.")
            which, _, leaf = rest.partition(".")
            if which not in active:
                continue
            path = f"{path}.{leaf}"
        yield path, tensor.detach().cpu()


def _factor(path: str, layer: Any, name: str, a: Tensor, b: Tensor) -> tuple[str, Tensor, Tensor]:
    """scaling * B A as factors in the orientation in which the weight is stored."""
    scaling = float(layer.scaling[name])
    left, right = b.double() * scaling, a
    turned = _is_embedding(layer) or bool(layer.fan_in_fan_out)
    return (f"{path}.weight", right.T, left.T) if turned else (f"{path}.weight", left, right)


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter sits on, by path.

    Raises:
        ArgumentError: one is neither a plain linear layer nor an embedding.
    """
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for path, one in module.named_modules():
        aside = isinstance(one, AuxiliaryTrainingWrapper) and not isinstance(one, ModulesToSaveWrapper)
        if (isinstance(one, BaseTunerLayer) and type(one) not in (Linear, Embedding)) or aside:
            raise ArgumentError(
                f"`adapter` must sit on linear layers and embeddings; {path} is a {type(one).__name__} of PEFT. Merge "
                "it (merge_and_unload) and compare the models with Edit.from_models."
            )
        if isinstance(one, BaseTunerLayer):
            if getattr(one, "lora_variant", None):
                raise ArgumentError(f"`adapter` must add factors to weights and no more; {path} has a LoRA variant.")
            yield path, one


def _is_embedding(layer: Any) -> bool:
    return type(layer).__name__ == "Embedding"


def _skeleton(base: OpenedModel, config: Any, folder: Path) -> nn.Module:
    """The base's modules without numbers, with the adapter's layers put in by PEFT."""
    from peft import inject_adapter_in_model

    memo: dict[int, Any] = {
        id(t): nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=False)
        if isinstance(t, nn.Parameter)
        else torch.empty_like(t, device="meta")
        for t in base.weights.tensors()
    }
    with base.lock:
        empty = copy.deepcopy(base.module, memo=memo)
    try:
        injected: nn.Module = inject_adapter_in_model(config, empty, low_cpu_mem_usage=True)
    except Exception as error:  # of many kinds, by what its config says; none is hidden
        raise ArgumentError(
            f"`adapter` must be of {base.name}; PEFT cannot put {folder.name} on it: {error}"
        ) from error
    return injected


def _config(folder: Path) -> Any:
    from peft import PeftConfig

    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if "adapter_config.json" not in names:
        raise LoadError(f"{folder} must be a folder with an adapter_config.json, as PEFT saves it; it is not.")
    if "adapter_model.safetensors" not in names:
        pickled = "adapter_model.bin" in names
        why = "only pickled weights, which can run code when read and are never opened" if pickled else "no weights"
        raise LoadError(f"{folder} must hold adapter_model.safetensors; it has {why}.")
    try:
        read_json(folder / "adapter_config.json", LARGEST_CONFIG, strict=False)
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{folder} has no readable adapter_config.json: {error}.") from error


def _numbers(folder: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(folder / "adapter_model.safetensors")[1]
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{folder} has a damaged adapter_model.safetensors: {error}.") from error


def _require_ranks(config: Any, held: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse ranks that no tensor of the adapter has: PEFT makes factors of the rank that it is told."""
    largest = max((size for tensor in held.values() for size in tensor.shape), default=0)
    for rank in (config.r, *dict(config.rank_pattern or {}).values()):
        if index_of(rank) is None or not 1 <= rank <= largest:
            raise LoadError(f"{folder} has a damaged adapter_config.json: no factor has rank {shown(rank)}.")


def _require_plain(config: Any, *, started: bool) -> None:
    """Refuse an adapter that is no plain LoRA; `started`: one whose start may have changed the base's weights."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ArgumentError(message("adapter", "a LoRA adapter", kind, do="Merge it and use Edit.from_models."))
    more = [name for name in MORE if getattr(config, name, None)]
    if started and config.init_lora_weights not in PLAIN_STARTS:
        more.append(f"init_lora_weights={config.init_lora_weights!r}")
    if more:
        raise ArgumentError(
            f"`adapter` must add factors to weights and no more; its config has {', '.join(more)}. Merge it "
            "(merge_and_unload) and compare the models with Edit.from_models."
        )

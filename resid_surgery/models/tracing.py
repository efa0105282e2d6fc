"""Tracing: the only file that imports nnsight. One forward, with reads and writes in forward order.

A `Tap` names a place in the forward; `forward` sorts the taps that are wanted into the order in
which the model reaches them, and runs one nnsight trace over the model's shadow. Reads are returned
detached and cloned. A write is a function of the value found there and of the values read so far.
"""

import inspect
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import nnsight
import torch
from torch import Tensor

from resid_surgery.errors import ResidSurgeryError, UnsupportedModelError
from resid_surgery.models.opening import OpenedModel

TapName = Literal[
    "block_in",
    "attn_call",
    "attn_z",
    "attn_raw",
    "attn_add",
    "mlp_in",
    "mlp_read",
    "key0",
    "key1",
    "coef",
    "mlp_raw",
    "mlp_add",
    "block_out",
    "bs",
    "logits",
]
_ORDER: tuple[str, ...] = TapName.__args__  # type: ignore[attr-defined]


@final
@dataclass(frozen=True)
class Tap:
    """A place in the forward.

    ``block_in/out``: the stream before / after a block. ``attn_call``: the attention interface's
    inputs. ``attn_z``: W_O's input. ``attn_raw/add``: what W_O writes / what is added after a
    post-norm. ``mlp_in``: the stream that the MLP's norm reads. ``mlp_read``: what its keys read.
    ``key0/1``: pre-activations. ``coef``: the down-projection's input. ``mlp_raw/add``: as for
    attention. ``bs``: the unembedding's output. ``logits``: the model's own.
    """

    name: TapName
    layer: int = -1

    @property
    def order(self) -> tuple[int, int]:
        """Forward order: by layer, then by place; the model's ends come last."""
        return (self.layer if self.layer >= 0 else 10**9, _ORDER.index(self.name))


@final
@dataclass(frozen=True)
class AttentionCall:
    """Inputs of one attention call, as the model passed them.

    Attributes:
        query: (row, head, query position, d_head). key, value: (row, kv_head, position, d_head).
        mask: (row or 1, 1 or head, query position, key position) additive or boolean, or None.
        first: which position the first query position is.
        scaling, softcap: factor and cap of the scores. extra: keywords with no known meaning here.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    first: int
    scaling: float
    softcap: float | None
    extra: tuple[str, ...]


Values = dict[Tap, Any]
Write = Callable[[Tensor, Values], Tensor]

_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal", "sliding_window", "cache_position"}
_trace_lock = threading.RLock()


def unwrap(source: Any) -> tuple[Any, Any]:
    """(module, tokenizer) inside an nnsight model; anything else is passed through."""
    if isinstance(source, nnsight.Envoy):
        return source._module, getattr(source, "tokenizer", None)
    return source, None


def forward(
    model: OpenedModel,
    ids: Tensor,
    reads: Sequence[Tap],
    writes: Mapping[Tap, Write] | None = None,
    *,
    at: int | None = None,
    everywhere: Collection[Tap] = (),
) -> Values:
    """One forward of (row, position) `ids` with reads and writes.

    Args:
        model: the opened model; its shadow runs, so the user's module is not touched.
        ids: (row, position) token ids.
        reads: taps to return. Values at a tap with a write are those after the write.
        writes: tap -> function(value found, values read so far) -> value to leave.
        at: if given, reads keep this position only (keys and values keep all), and logits are
            computed for it alone where the model can.
        everywhere: reads that keep all positions all the same.

    Returns:
        Tap -> detached (row, position, width) tensor of its own storage (`AttentionCall` for
        ``attn_call``).

    Raises:
        UnsupportedModelError: the model's forward does not pass a tap.
        ResidSurgeryError: whatever a write raised.
    """
    writes = writes or {}
    wanted = set(reads)
    plan = sorted(wanted | set(writes), key=lambda tap: tap.order)
    kwargs: dict[str, Any] = {"use_cache": False}
    sliced = at is not None and _keeps_logits(model)
    if sliced:
        kwargs["logits_to_keep"] = torch.tensor([at], device=ids.device)
    raised: list[BaseException] = []
    with model.lock, _trace_lock, torch.no_grad():
        traced = _traced(model)
        rows = int(ids.shape[0])
        try:
            with traced.trace(input_ids=ids, **kwargs):
                seen: dict[Any, Any] = {}
                for tap in plan:
                    place, field = _place(traced, model, tap)
                    value = getattr(place, field)
                    if tap in writes:
                        whole = value[0] if isinstance(value, tuple) else value
                        try:
                            left = writes[tap](whole.view(rows, -1, whole.shape[-1]), seen).view(whole.shape)
                        except BaseException as error:
                            raised.append(error)
                            raise
                        value = (left, *value[1:]) if isinstance(value, tuple) else left
                        setattr(place, field, value)
                    if tap in wanted:
                        seen[tap] = _read(tap, value, rows, None if tap in everywhere else at, sliced)
                nnsight.save(seen)
        except Exception as error:
            if raised:
                raise raised[0] from None
            if isinstance(error, (ResidSurgeryError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise UnsupportedModelError(
                f"one traced forward of {model.name} failed ({type(error).__name__}: {_last_line(error)}). "
                f"Its {model.anatomy.layout.family} layout does not describe what its forward does."
            ) from error
    return seen


def _traced(model: OpenedModel) -> Any:
    shadow = model.shadow
    if "traced" not in model.cache:
        model.cache["traced"] = nnsight.NNsight(shadow)
        model.cache["paths"] = {}
    return model.cache["traced"]


def _place(traced: Any, model: OpenedModel, tap: Tap) -> tuple[Any, str]:
    """The nnsight envoy of a tap and which of its fields holds the value."""
    paths: dict[Tap, tuple[Any, str]] = model.cache["paths"]
    if tap in paths:
        return paths[tap]
    name, layer = tap.name, tap.layer
    if name == "logits":
        place, field = traced, "output"
    elif name == "bs":
        place, field = _envoy(traced, model.path(None, "unembed")), "output"
    elif name == "attn_call":
        place = _envoy(traced, model.path(layer, "attn")).source.attention_interface_1
        return place, "inputs"
    else:
        part, field = _part(model, name)
        place = _envoy(traced, model.path(layer, part))
    paths[tap] = (place, field)
    return place, field


def _part(model: OpenedModel, name: str) -> tuple[str, str]:
    table = {
        "block_in": ("block", "input"),
        "attn_z": ("attn_out", "input"),
        "attn_raw": ("attn_out", "output"),
        "attn_add": ("attn_post_norm" if model.has("attn_post_norm") else "attn_out", "output"),
        "mlp_in": ("mlp_norm", "input"),
        "mlp_read": ("mlp_norm", "output"),
        "key0": ("key0", "output"),
        "key1": ("key1", "output"),
        "coef": ("mlp_out", "input"),
        "mlp_raw": ("mlp_out", "output"),
        "mlp_add": ("mlp_post_norm" if model.has("mlp_post_norm") else "mlp_out", "output"),
        "block_out": ("block", "output"),
    }
    return table[name]


def _envoy(traced: Any, path: str) -> Any:
    place = traced
    for step in path.split("."):
        place = place[int(step)] if step.isdigit() else getattr(place, step)
    return place


def _read(tap: Tap, value: Any, rows: int, at: int | None, sliced: bool) -> Any:
    if tap.name == "attn_call":
        args, kwargs = value
        return _attention_call(args, kwargs, at)
    if tap.name == "logits":
        value = value.logits
    elif isinstance(value, tuple):
        value = value[0]
    shaped = value if value.ndim == 3 else value.view(rows, -1, value.shape[-1])
    if at is not None and not (sliced and tap.name in ("bs", "logits")):
        shaped = shaped[:, at : at + 1]
    return shaped.detach().clone()


def _attention_call(args: tuple[Any, ...], kwargs: dict[str, Any], at: int | None) -> AttentionCall:
    names = ("module", "query", "key", "value", "attention_mask", "scaling")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, scaling, mask = given["query"].detach(), given.get("scaling"), given.get("attention_mask")
    first = 0 if at is None else at
    if at is not None:
        query = query[:, :, at : at + 1]
        mask = None if mask is None else mask[:, :, at : at + 1]
    known = {*names, "softcap", *_HARMLESS}
    return AttentionCall(
        query=query.clone(),
        key=given["key"].detach().clone(),
        value=given["value"].detach().clone(),
        mask=None if mask is None else mask.detach().clone(),
        first=first,
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=given.get("softcap"),
        extra=tuple(sorted(k for k, v in kwargs.items() if k not in known and v is not None)),
    )


def _keeps_logits(model: OpenedModel) -> bool:
    if "keeps_logits" not in model.cache:
        model.cache["keeps_logits"] = "logits_to_keep" in inspect.signature(type(model.module).forward).parameters
    return bool(model.cache["keeps_logits"])


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:200]

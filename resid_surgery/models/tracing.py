"""Tracing: the only file that imports nnsight. One forward, with reads and writes in forward order.

A `Tap` names a place in the forward; `forward` sorts the taps that are wanted into the order in
which the model reaches them, and runs one nnsight trace over the model's shadow. Reads are returned
detached and cloned. A write is a function of the value found there and of the values read so far.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import nnsight
import torch
from torch import Tensor

from resid_surgery.errors import ResidSurgeryError, UnsupportedModelError
from resid_surgery.models.layout import split_key
from resid_surgery.models.opening import OpenedModel

TapName = Literal[
    "block_in",
    "attn_call",
    "attn_mix",
    "attn_z",
    "attn_raw",
    "attn_add",
    "mlp_read",
    "experts_call",
    "experts_out",
    "shared_key0",
    "shared_key1",
    "shared_coef",
    "shared_raw",
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

    ``block_in/out``: the stream before / after a block. ``attn_call``: what goes into attention.
    ``attn_mix``: what comes out of it, (row, position, head, d_head). ``attn_z``: W_O's input.
    ``attn_raw/add``: what W_O (or an opaque writer) writes / the same after a post-norm, before the
    layer's scale. ``mlp_read``: what the MLP's keys read. ``key0/1``: pre-activations. ``coef``: the
    down-projection's input. ``experts_call``: states, indices and weights of routed experts;
    ``experts_out``: their sum; ``shared_*``: of the shared expert. ``mlp_raw/add``: as for attention.
    ``bs``: the unembedding's output before a logit scale. ``logits``: the model's own.
    """

    name: TapName
    layer: int = -1

    @property
    def order(self) -> tuple[int, int]:
        """Forward order: by layer, then by place; the model's ends come last."""
        return (self.layer if self.layer >= 0 else 10**9, _ORDER.index(self.name))

    def when(self, model: OpenedModel) -> tuple[int, float]:
        """`order` in one model: a shared expert may be computed before the routed ones."""
        layer, place = self.order
        early = self.name.startswith("shared") and model.block(self.layer).shared_first
        return layer, (_ORDER.index("mlp_read") + place / 100 if early else place)


@final
@dataclass(frozen=True)
class AttentionCall:
    """Inputs of one attention call, as the model passed them.

    Attributes:
        value: (row, kv_head, position, d_head).
        query: (row, head, query position, d_key), key: (row, kv_head, position, d_key), or None where
            only the weights are to be had.
        weights: (row, head, query position, position) the weights as the model computed them, or
            None where they are recomputed from query and key.
        mask: (row or 1, 1 or head, query position, key position) additive or boolean, or None.
        first: which position the first query position is.
        scaling, softcap: factor and cap of the scores. sinks: (head,) a score that takes weight
            and gives no value, or None. extra: keywords with no known meaning here.
    """

    value: Tensor
    query: Tensor | None
    key: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    first: int
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    extra: tuple[str, ...]


@final
@dataclass(frozen=True)
class ExpertsCall:
    """What a layer's routed experts were called with.

    Attributes:
        states: (row, position, d_model). index: (row, position, k) experts.
        weight: (row, position, k) router weights.
    """

    states: Tensor
    index: Tensor
    weight: Tensor


Values = dict[Tap, Any]
Write = Callable[[Tensor, Values], Tensor]

_HARMLESS = {"dropout", "dropout_p", "position_ids", "use_cache", "is_causal", "sliding_window", "cache_position"}
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
    plan = sorted(wanted | set(writes), key=lambda tap: tap.when(model))
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
                            left = writes[tap](whole.reshape(rows, -1, whole.shape[-1]), seen).view(whole.shape)
                        except BaseException as error:
                            raised.append(error)
                            raise
                        value = (left, *value[1:]) if isinstance(value, tuple) else left
                        setattr(place, field, value)
                    if tap in wanted:
                        seen[tap] = _read(model, tap, value, rows, None if tap in everywhere else at, sliced)
                nnsight.save(seen)
        except Exception as error:
            if raised:
                raise raised[0] from None
            if isinstance(error, (ResidSurgeryError, MemoryError, torch.OutOfMemoryError)):
                raise
            raise UnsupportedModelError(
                f"one traced forward of {model.name} failed ({type(error).__name__}: {_last_line(error)}). "
                f"Its layout ({model.anatomy.layout.family}, {model.anatomy.matched}) does not describe its forward."
            ) from error
    return seen


def routing(model: OpenedModel, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
    """(index, weight), each (n, k): how a layer's router routes states that its MLP would read.

    Args:
        model: the opened model. layer: a mixture of experts. read: (n, d_model) after the MLP's norm.
    """
    mlp = model.shadow.get_submodule(model.path(layer, "mlp"))
    with model.lock, _trace_lock, torch.no_grad():
        traced = nnsight.NNsight(mlp)
        experts = _envoy(traced, model.path(layer, "experts").removeprefix(model.path(layer, "mlp") + "."))
        with traced.trace(read[None].to(model.dtype)):
            called = nnsight.save(experts.inputs)
        args, kwargs = called
    _, index, weight = [*args, *kwargs.values()]
    return index.reshape(len(read), -1), weight.reshape(len(read), -1).to(read.dtype)


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
    elif name in ("attn_call", "attn_mix"):
        place, field = _attention_place(traced, model, layer, name)
    elif name == "experts_call":
        place, field = _envoy(traced, model.path(layer, "experts")), "inputs"
    else:
        part, field = _part(model, layer, name)
        place = _envoy(traced, model.path(layer, part))
    paths[tap] = (place, field)
    return place, field


def _attention_place(traced: Any, model: OpenedModel, layer: int, name: str) -> tuple[Any, str]:
    """The operation inside attention's source where weights meet values."""
    kind, _, operation = model.block(layer).mix.partition(":")
    source = _envoy(traced, model.path(layer, "attn")).source
    if kind == "interface":
        operation = "attention_interface_1"
    if not hasattr(source, operation):
        raise UnsupportedModelError(
            f"layer {layer} of {model.name} computes attention without {operation}, where its layout looks for it."
        )
    place = getattr(source, operation)
    if name == "attn_mix":
        return place, "output"
    if kind == "weights":
        return _Both(place), "value"
    return place, "inputs"


@final
class _Both:
    """Inputs and output of one operation, read in that order."""

    def __init__(self, place: Any) -> None:
        self.place = place

    @property
    def value(self) -> tuple[Any, Any]:
        inputs = self.place.inputs
        return inputs, self.place.output


def _part(model: OpenedModel, layer: int, name: str) -> tuple[str, str]:
    row = model.block(layer)
    attn = "attn_out" if row.attn_kind == "attention" else "attn"
    mlp = "mlp_out" if row.mlp_kind == "neurons" else "mlp"
    read = {"neurons": ("key0", "input"), "experts": ("mlp", "input")}.get(row.mlp_kind, ("mlp", "input"))
    table = {
        "block_in": ("block", "input"),
        "attn_z": ("attn_out", "input"),
        "attn_raw": (attn, "output"),
        "attn_add": ("attn_post_norm" if row.attn_post_norm else attn, "output"),
        "mlp_read": read,
        "key0": ("key0", "output"),
        "key1": ("key1", "output"),
        "coef": ("mlp_out", "input"),
        "experts_out": ("experts", "output"),
        "shared_key0": ("shared_key0", "output"),
        "shared_key1": ("shared_key1", "output"),
        "shared_coef": ("shared_out", "input"),
        "shared_raw": ("shared_out", "output"),
        "mlp_raw": (mlp, "output"),
        "mlp_add": ("mlp_post_norm" if row.mlp_post_norm else mlp, "output"),
        "block_out": ("block", "output"),
    }
    return table[name]


def _envoy(traced: Any, path: str) -> Any:
    place = traced
    for step in path.split("."):
        place = place[int(step)] if step.isdigit() else getattr(place, step)
    return place


def _read(model: OpenedModel, tap: Tap, value: Any, rows: int, at: int | None, sliced: bool) -> Any:
    if tap.name == "attn_call":
        return _attention_call(model.block(tap.layer).mix.partition(":")[0], value, rows, at)
    if tap.name == "experts_call":
        args, kwargs = value
        kept = (t.detach().reshape(rows, -1, t.shape[-1]) for t in [*args, *kwargs.values()])
        return ExpertsCall(*(t.clone() if at is None else t[:, at : at + 1].clone() for t in kept))
    if tap.name == "attn_mix":
        return _mixed(model, tap.layer, value, rows, at)
    if tap.name == "logits":
        value = value.logits
    elif isinstance(value, tuple):
        value = value[0]
    shaped = value if value.ndim == 3 else value.reshape(rows, -1, value.shape[-1])
    if at is not None and not (sliced and tap.name in ("bs", "logits")):
        shaped = shaped[:, at : at + 1]
    half = split_key(model.block(tap.layer).paths()[tap.name])[1] if "key" in tap.name else None
    if half is not None:
        m = shaped.shape[-1] // 2
        shaped = shaped[..., half * m : (half + 1) * m]
    return shaped.detach().clone()


def _mixed(model: OpenedModel, layer: int, value: Any, rows: int, at: int | None) -> Tensor:
    """(row, position, head, d_head) what attention left, before anything stands between it and W_O."""
    value = value[0] if isinstance(value, tuple) else value
    if model.block(layer).mix != "interface":  # there heads come before positions
        value = value.reshape(rows, -1, *value.shape[-2:]).transpose(1, 2)
    value = value if at is None else value[:, at : at + 1]
    return value.detach().clone()


def _attention_call(kind: str, value: Any, rows: int, at: int | None) -> AttentionCall:
    weights = None
    if kind == "weights":
        value, (_, weights) = value[0], value[1][:2]
    args, kwargs = value
    if kind == "product":
        weights, mixed = (t.detach().reshape(rows, -1, *t.shape[-2:]) for t in args[:2])
        given: dict[str, Any] = {"value": mixed}
    else:
        names = {
            "interface": ("module", "query", "key", "value", "attention_mask", "scaling"),
            "weights": ("query", "key", "value", "attention_mask"),
            "sdpa": ("query", "key", "value", "attn_mask"),
        }[kind]
        given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask", given.get("attn_mask"))
    query, key = given.get("query"), given.get("key")
    known = {"module", "query", "key", "value", "attention_mask", "attn_mask", "scaling", "softcap", "s_aux", *_HARMLESS}
    extra = tuple(sorted(k for k, v in kwargs.items() if k not in known and v is not None))
    if extra and kind == "interface":
        weights = _weights_of_own(given, {k: kwargs[k] for k in kwargs if k in extra or k in ("softcap", "s_aux")})
    first = 0 if at is None else at
    if at is not None:
        query = None if query is None else query[:, :, at : at + 1]
        mask = None if mask is None else mask[:, :, at : at + 1]
        weights = None if weights is None else weights[:, :, at : at + 1]
    scaling = given.get("scaling", given.get("scale"))
    width = given["value"].shape[-1] if query is None else query.shape[-1]
    return AttentionCall(
        value=given["value"].detach().clone(),
        query=_kept(query),
        key=_kept(key),
        weights=_kept(weights),
        mask=_kept(mask),
        first=first,
        scaling=float(width**-0.5 if scaling is None else scaling),
        softcap=given.get("softcap"),
        sinks=_kept(given.get("s_aux")),
        extra=extra,
    )


def _weights_of_own(given: dict[str, Any], keywords: dict[str, Any]) -> Tensor | None:
    """Effective weights where the model passes its attention something else (an index, a bias).

    Its own eager function is linear in the values, so unit vectors as values give its weights back:
    out[t, j] = alpha[t, j], whatever the function does with scores.
    """
    module = given["module"]
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        return None
    query, key, value = (given[name].detach() for name in ("query", "key", "value"))
    n, mask = key.shape[2], given.get("attention_mask")
    seen = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()[-query.shape[2] :]
    mask = seen[None, None] if mask is None else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    units = torch.eye(n, dtype=value.dtype, device=value.device).expand(value.shape[0], value.shape[1], n, n)
    out = own(module, query, key, units, mask, scaling=given.get("scaling"), **keywords)[0]
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _keeps_logits(model: OpenedModel) -> bool:
    if "keeps_logits" not in model.cache:
        model.cache["keeps_logits"] = "logits_to_keep" in inspect.signature(type(model.module).forward).parameters
    return bool(model.cache["keeps_logits"])


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:200]

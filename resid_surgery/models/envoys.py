"""Envoys: where each tap stands in a traced model, and the form in which its value is read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.attention import ExpertsCall, attention_call, with_call
from resid_surgery.models.layout import split_key
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap, module_of

Values = dict[Tap, Any]
Write = Callable[[Any, Values], Any]


def place_of(traced: Any, model: OpenedModel, tap: Tap) -> tuple[Any, str]:
    name, layer = tap.name, tap.layer
    if name in ("logits", "output"):
        place, field = traced, "output"
    elif name == "unembed_in":
        place, field = envoy_at(traced, model.path(None, "unembed")), "input"
    elif name == "bs":
        place, field = envoy_at(traced, model.path(None, "unembed")), "output"
    elif name in ("attn_call", "attn_mix"):
        place, field = _attention_place(traced, model, layer, name)
    elif name == "experts_call":
        place, field = envoy_at(traced, model.path(layer, "experts")), "inputs"
    else:
        part, field = module_of(model, layer, name)
        place = envoy_at(traced, model.path(layer, part))
    return place, field


def _attention_place(traced: Any, model: OpenedModel, layer: int, name: str) -> tuple[Any, str]:
    """The operation inside attention's source where weights meet values."""
    kind, _, operation = model.block(layer).mix.partition(":")
    attn = envoy_at(traced, model.path(layer, "attn"))
    if kind == "differential" and name == "attn_mix":
        return envoy_at(attn, operation), "input"
    names = {
        "interface": ["attention_interface_1"],
        "differential": ["attention_interface_1", "attention_interface_2", "lambda_full_0"],
        "named": operation.split(",")[::-1],
    }.get(kind, [operation])
    missing = [one for one in names if not hasattr(attn.source, one)]
    if missing:
        raise UnsupportedModelError(
            f"layer {layer} of {model.name} computes attention without {missing[0]}, where its layout looks for it."
        )
    places = [getattr(attn.source, one) for one in names]
    if name == "attn_mix":
        if kind == "named":
            raise UnsupportedModelError(f"what attention leaves in layer {layer} of {model.name} cannot be tapped.")
        return places[0], "output"
    if kind == "weights":
        return _Reads([(places[0], "inputs"), (places[0], "output")]), "values"
    if kind == "named":
        return _Reads([(place, "output") for place in places]), "values"
    if kind == "differential":
        return _Reads([(places[0], "inputs"), (places[1], "inputs"), (places[2], "output")]), "values"
    return places[0], "inputs"


@final
class _Reads:
    """Several fields of operations, read in forward order."""

    def __init__(self, fields: list[tuple[Any, str]]) -> None:
        self.fields = fields

    @property
    def values(self) -> list[Any]:
        return [getattr(place, field) for place, field in self.fields]


def envoy_at(traced: Any, path: str) -> Any:
    place = traced
    for step in path.split("."):
        place = place[int(step)] if step.isdigit() else getattr(place, step)
    return place


def written(model: OpenedModel, tap: Tap, value: Any, rows: int, write: Write, seen: Values) -> Any:
    """What a write leaves, in the form that the module's value has."""
    if tap.name == "attn_call":
        kind = model.block(tap.layer).mix.partition(":")[0]
        return with_call(kind, value, write(attention_call(kind, value, rows, None), seen))
    whole = value[0] if isinstance(value, tuple) else value
    if tap.name == "attn_mix":
        turned = not model.block(tap.layer).mix.startswith(("interface", "differential"))
        left = write(mixed_at(model, tap.layer, value, rows, None), seen)
        left = (left.transpose(1, 2) if turned else left).reshape(whole.shape)
        return (left, *value[1:]) if isinstance(value, tuple) else left
    left = write(whole.reshape(rows, -1, whole.shape[-1]), seen).view(whole.shape)
    return (left, *value[1:]) if isinstance(value, tuple) else left


def read_at(model: OpenedModel, tap: Tap, value: Any, rows: int, at: list[int] | None) -> Any:
    if tap.name == "output":
        return value
    if tap.name == "attn_call":
        return attention_call(model.block(tap.layer).mix.partition(":")[0], value, rows, at)
    if tap.name == "experts_call":
        args, kwargs = value
        kept = (t.detach().reshape(rows, -1, t.shape[-1]) for t in [*args, *kwargs.values()])
        return ExpertsCall(*(t.clone() if at is None else t[:, at].clone() for t in kept))
    if tap.name == "attn_mix":
        return mixed_at(model, tap.layer, value, rows, at)
    if tap.name == "logits":
        value = value.logits
    elif isinstance(value, tuple):
        value = value[0]
    shaped = value if value.ndim == 3 else value.reshape(rows, -1, value.shape[-1])
    if at is not None:
        shaped = shaped[:, at]
    half = split_key(model.block(tap.layer).paths()[tap.name])[1] if tap.name in _KEYS else None
    if half is not None:
        m = shaped.shape[-1] // 2
        shaped = shaped[..., half * m : (half + 1) * m]
    return shaped.detach().clone()


_KEYS = ("key0", "key1", "shared_key0", "shared_key1")


def mixed_at(model: OpenedModel, layer: int, value: Any, rows: int, at: list[int] | None) -> Tensor:
    """(row, position, head, d_head) what attention left, before anything stands between it and W_O."""
    value = value[0] if isinstance(value, tuple) else value
    if not model.block(layer).mix.startswith(("interface", "differential")):  # there heads come before positions
        value = value.reshape(rows, -1, *value.shape[-2:]).transpose(1, 2)
    value = value if at is None else value[:, at]
    kept: Tensor = value.detach().clone()
    return kept

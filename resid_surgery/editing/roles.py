"""Roles: which part of a model a tensor is, and how inputs and outputs lie in it.

What writes to the stream (output projections and their biases) is told from what reads it (keys, queries, routers), so
that a change can be read in the vocabulary, or weighed against the stream, only where that has a meaning.
"""

from dataclasses import dataclass
from typing import Literal, final

from torch import nn

from resid_surgery.models.opening import OpenedModel

Kind = Literal["writes", "reads", "embed", "unembed", "norm", "other"]
_OUT = {"attn_out": ("attn", None), "mlp_out": ("mlp", None), "shared_out": ("mlp", "shared")}
_NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "coef_norm")


@final
@dataclass(frozen=True)
class Role:
    """What a tensor does in its model.

    Attributes:
        kind: "writes" (an output projection or its bias: to the stream), "reads" (a projection of what is read from
            it), "embed", "unembed", "norm" or "other".
        layer: or None outside the blocks. sublayer: "attn" or "mlp", or "". group: None (a dense MLP or attention),
            "shared" or "experts" (a leading axis counts them).
        module: path of the module that holds it. input_axis: the axis that counts input coordinates; None for what
            is no matrix.
    """

    kind: Kind
    layer: int | None
    sublayer: str
    group: str | None
    module: str
    input_axis: int | None

    def __str__(self) -> str:
        where = "" if self.layer is None else f"L{self.layer}."
        part = {"writes": "out", "reads": "in"}.get(self.kind, self.kind)
        what = ".".join(
            filter(None, [self.sublayer, self.group, part if self.input_axis is not None else f"{part} bias"])
        )
        return f"{where}{what}" if self.kind in ("writes", "reads") else f"{where}{self.kind}"

    @property
    def lead(self) -> int:
        """How many leading axes count experts."""
        return 1 if self.group == "experts" else 0


def role_of(model: OpenedModel, path: str) -> Role:
    """The role of the tensor at a path of the model's ``state_dict``."""
    owner, _, leaf = path.rpartition(".")
    place = model.module.get_submodule(owner) if owner else model.module
    layer, inside = _layer(model, owner)
    if owner == model.path(None, "unembed"):
        return Role("unembed", None, "", None, owner, _axis(place, leaf))
    if owner == model.path(None, "final_norm"):
        return Role("norm", None, "", None, owner, None)
    if place is model.module.get_input_embeddings():  # type: ignore[operator]
        return Role("embed", None, "", None, owner, 0 if leaf == "weight" else None)
    if layer is None:
        return Role("other", None, "", None, owner, None)
    if owner in {model.path(layer, p) for p in _NORMS if model.has(layer, p)}:
        return Role("norm", layer, "", None, owner, None)
    return _in_block(model, layer, owner, leaf, place, inside)


def _in_block(model: OpenedModel, layer: int, owner: str, leaf: str, place: nn.Module, inside: str) -> Role:
    row = model.block(layer)
    for part, (sublayer, group) in _OUT.items():
        if model.has(layer, part) and owner == model.path(layer, part) and _affine(place):
            return Role("writes", layer, sublayer, group, owner, _axis(place, leaf))
    if row.experts is not None and owner == model.path(layer, "experts"):
        return _of_experts(model, layer, owner, leaf)
    sublayer = "attn" if row.attn is not None and _within(inside, row.attn) else "mlp"
    if _affine(place):
        opaque = (row.attn_kind if sublayer == "attn" else row.mlp_kind) == "opaque"
        return Role("other" if opaque else "reads", layer, sublayer, None, owner, _axis(place, leaf))
    return Role("norm" if "norm" in type(place).__name__.lower() else "other", layer, sublayer, None, owner, None)


def _of_experts(model: OpenedModel, layer: int, owner: str, leaf: str) -> Role:
    axis = 1 if model.experts(layer).transposed else 2
    known: dict[str, Kind] = {"down_proj": "writes", "gate_up_proj": "reads", "up_proj": "reads"}
    kind = known.get(leaf.removesuffix("_bias"), "other")
    return Role(kind, layer, "mlp", "experts", owner, axis if leaf in known else None)


def _layer(model: OpenedModel, owner: str) -> tuple[int | None, str]:
    prefix = model.path(None, "blocks") + "."
    if not owner.startswith(prefix):
        return None, ""
    number, _, inside = owner[len(prefix) :].partition(".")
    return int(number), inside


def _within(inside: str, module: str) -> bool:
    return inside == module or inside.startswith(module + ".")


def _affine(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _axis(module: nn.Module, leaf: str) -> int | None:
    """The axis of a projection's weight that counts its inputs: the orientation is its class's."""
    if leaf != "weight" or not _affine(module):
        return None
    return 1 if isinstance(module, nn.Linear) else 0

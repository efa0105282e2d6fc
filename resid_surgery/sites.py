"""Sites: frozen addresses of what writes into, or flows along, the residual stream.

A site is a plain value. ``str(site)`` gives its text form; `resid_surgery.parse_site` reads it back (see
`addresses`, which also has slices, positions and edges).

===================  ==========================================  =====================
site                 what it is (paper's term)                   text
===================  ==========================================  =====================
`Neuron`             MLP neuron (FFN subvalue)                   ``L20.N1297``
`ExpertNeuron`       neuron of a routed expert                   ``L3.E5.N17``
`SharedNeuron`       neuron of the shared expert                 ``L3.shared.N17``
`Head`               attention head's whole output               ``L12.H4``
`HeadSource`         joint vector alpha[t,j] v[j] W_O            ``L12.H4<3``
                     (attention subvalue)
`AttnNeuron`         one d_head coordinate (attention neuron)    ``L3.H4.D7``, ``L3.H4.D7<3``
`Projection`         a head's query; a KV head's key or value    ``L3.Q4``, ``L3.K1``, ``L3.V1``
`Sublayer`           what a sublayer adds (ATTN / FFN)           ``L12.attn``, ``L12.mlp``
`Resid`              a state of the stream (L_in/L_res/L_out)    ``L3.resid_pre|mid|post``
`Bias`               a sublayer's (or an expert's) output bias   ``L3.attn.bias``, ``L3.E5.bias``
`Constant`           an addend without a layer                   ``embed``, ``final_norm.bias``,
                                                                 ``unembed.bias``, ``rounding``;
                                                                 ``unembed`` (as a reader only)
===================  ==========================================  =====================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, final

from resid_surgery._check import choice, message, whole
from resid_surgery.errors import SiteError

LARGEST = 999_999_999
CONSTANTS = ("embed", "final_norm.bias", "unembed.bias", "rounding", "unembed")


class OneLayer(Protocol):
    """Sizes of one layer; 0 where it has no such part."""

    @property
    def n_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_mlp(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def d_expert(self) -> int: ...


class Sizes(Protocol):
    """What a site needs to know of a model to be checked against it."""

    @property
    def name(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def sizes(self) -> Sequence[OneLayer]: ...
    def require(self, layer: int, part: str, what: str, *, whole: bool = False) -> None: ...
    def between(self, layer: int) -> bool: ...


@dataclass(frozen=True)
class Site:
    """Base of all sites; use one of the final classes or `resid_surgery.parse_site`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name in ("source", "expert") and field.default is None
            shared = field.name == "expert" and isinstance(value, str) and value == "shared"
            if field.name in ("part", "stage", "name", "side") or (optional and (value is None or shared)):
                continue
            span = (-LARGEST, LARGEST) if field.name == "layer" else (0, None)
            object.__setattr__(self, field.name, whole(field.name, value, *span, error=SiteError))

    def resolve(self, sizes: Sizes) -> "Site":
        """The same site with a non-negative layer, checked against a model's sizes.

        Raises:
            SiteError: an index is out of range for the model, or the state does not exist in it.
        """
        if not hasattr(self, "layer"):
            return self
        layer = _in_range("layer", self.layer, sizes.n_layers, sizes, "layers")
        site = replace(self, layer=layer)  # type: ignore[call-arg]
        site._exists(sizes, layer)
        for name, size, unit in site._limits(sizes.sizes[layer]):
            _in_range(name, getattr(site, name), size, sizes, f"{unit} in layer {layer}")
        return site

    def _exists(self, sizes: Sizes, layer: int) -> None:
        """Refuse a site that this kind of layer has not."""

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return []


@final
@dataclass(frozen=True)
class Neuron(Site):
    """One MLP neuron (paper: FFN subvalue): coefficient x value vector."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}.N{self.index}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "mlp", str(self))
        if sizes.sizes[layer].n_experts:
            shared = f", or L{layer}.shared.N{self.index} for its shared expert" if sizes.sizes[layer].d_mlp else ""
            raise SiteError(
                f"`{self}` does not say which expert: layer {layer} of {sizes.name} is a mixture of experts. Write "
                f"L{layer}.E0.N{self.index}{shared}."
            )

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("index", one.d_mlp, "neurons")]


@final
@dataclass(frozen=True)
class ExpertNeuron(Site):
    """One neuron of a routed expert: router weight x coefficient x value vector."""

    layer: int
    expert: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}.E{self.expert}.N{self.index}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "mlp", str(self))
        if not sizes.sizes[layer].n_experts:
            raise SiteError(f"`{self}` does not exist for {sizes.name}: layer {layer} has no experts.")

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("expert", one.n_experts, "experts"), ("index", one.d_expert, "neurons an expert")]


@final
@dataclass(frozen=True)
class SharedNeuron(Site):
    """One neuron of a mixture's shared expert."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}.shared.N{self.index}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "mlp", str(self))
        if not sizes.sizes[layer].n_experts or not sizes.sizes[layer].d_mlp:
            raise SiteError(f"`{self}` does not exist for {sizes.name}: layer {layer} has no shared expert.")

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("index", one.d_mlp, "neurons of the shared expert")]


@final
@dataclass(frozen=True)
class Head(Site):
    """One attention head's output, summed over source positions."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "attn", str(self))

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("head", one.n_heads, "heads")]


@final
@dataclass(frozen=True)
class HeadSource(Site):
    """One (head, source position) pair (paper: attention subvalue): alpha[t,j] v[j] W_O."""

    layer: int
    head: int
    source: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}<{self.source}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "attn", str(self))

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("head", one.n_heads, "heads")]


@final
@dataclass(frozen=True)
class AttnNeuron(Site):
    """One d_head coordinate of a head (paper: attention neuron), optionally from one source."""

    layer: int
    head: int
    index: int
    source: int | None = None

    def __str__(self) -> str:
        tail = "" if self.source is None else f"<{self.source}"
        return f"L{self.layer}.H{self.head}.D{self.index}{tail}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "attn", str(self))

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("head", one.n_heads, "heads"), ("index", one.d_head, "coordinates a head")]


@final
@dataclass(frozen=True)
class Projection(Site):
    """A head's query, or a KV head's key or value, at the positions of an operation; all that read it see it."""

    layer: int
    side: Literal["Q", "K", "V"]
    head: int

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("side", self.side, ("Q", "K", "V"), error=SiteError)

    def __str__(self) -> str:
        return f"L{self.layer}.{self.side}{self.head}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, "attn", str(self))

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("head", one.n_heads, "heads") if self.side == "Q" else ("head", one.n_kv_heads, "KV heads")]


@final
@dataclass(frozen=True)
class Sublayer(Site):
    """What one sublayer adds to the stream (paper: ATTN or FFN output)."""

    layer: int
    part: Literal["attn", "mlp"]

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("part", self.part, ("attn", "mlp"), error=SiteError)

    def __str__(self) -> str:
        return f"L{self.layer}.{self.part}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, self.part, str(self), whole=True)


@final
@dataclass(frozen=True)
class Resid(Site):
    """A state of the residual stream: before, between or after a block's sublayers."""

    layer: int
    stage: Literal["pre", "mid", "post"]

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("stage", self.stage, ("pre", "mid", "post"), error=SiteError)

    def __str__(self) -> str:
        return f"L{self.layer}.resid_{self.stage}"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        if self.stage == "mid" and not sizes.between(layer):
            raise SiteError(
                f"`{self}` does not exist for {sizes.name}: layer {layer} is parallel (attention and MLP read the "
                "same state) or has one writer only, so there is no state between. Use resid_pre or resid_post."
            )


@final
@dataclass(frozen=True)
class Bias(Site):
    """The output bias of a sublayer, an addend of its own; of one expert in a mixture."""

    layer: int
    part: Literal["attn", "mlp"]
    expert: int | Literal["shared"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("part", self.part, ("attn", "mlp"), error=SiteError)
        if self.expert is not None and self.part != "mlp":
            raise SiteError(message("expert", "None for attention, which has no experts", self.expert))

    def __str__(self) -> str:
        if self.expert is not None:
            return f"L{self.layer}.{'shared' if self.expert == 'shared' else f'E{self.expert}'}.bias"
        return f"L{self.layer}.{self.part}.bias"

    def _exists(self, sizes: Sizes, layer: int) -> None:
        sizes.require(layer, self.part, str(self), whole=True)
        one = sizes.sizes[layer]
        if self.expert is not None and not (one.n_experts and (self.expert != "shared" or one.d_mlp)):
            kind = "shared expert" if self.expert == "shared" else "experts"
            raise SiteError(f"`{self}` does not exist for {sizes.name}: layer {layer} has no {kind}.")

    def _limits(self, one: OneLayer) -> list[tuple[str, int, str]]:
        return [("expert", one.n_experts, "experts")] if isinstance(self.expert, int) else []


@final
@dataclass(frozen=True)
class Constant(Site):
    """An addend without a layer: the embedding, a readout constant, or the rounding row."""

    name: str

    def __post_init__(self) -> None:
        choice("name", self.name, CONSTANTS, error=SiteError)

    def __str__(self) -> str:
        return self.name


def _in_range(name: str, value: int, size: int, sizes: Sizes, unit: str) -> int:
    low = -size if name == "layer" else 0
    if not low <= value < size:
        hint = " Count from the end with layer=-1." if name == "layer" else ""
        raise SiteError(f"`{name}` must be in 0..{size - 1} for {sizes.name} ({size} {unit}); got {value}.{hint}")
    return value % size


def part_of(site: Site) -> str:
    """Whose sublayer a site belongs to: "attn" or "mlp"."""
    return str(getattr(site, "part", "attn" if isinstance(site, (Head, HeadSource, AttnNeuron)) else "mlp"))

"""Layouts: where each part of an architecture is, as plain data.

A model is a chain of blocks between an embedding and a head. A `Layout` names its parts by module
path; one `BlockLayout` a layer says who writes into the stream there and through what. Layouts are
read off one forward (`wiring`), or given by the user for a private architecture; both pass the same
proof in `resid_surgery.load`. There is no class and no code per family.

With x the block's input, the two writers of a block add

    resid_mid  = attn_carry * x         + attn_scale * attn_post_norm(attention's output)
    resid_post = mlp_carry  * resid_mid + mlp_scale  * mlp_post_norm(MLP's output)

and in a parallel block both are added to ``mlp_carry * x``. Carries and scales are 1 in most families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType, NoneType
from typing import Any, Literal, final

from resid_surgery._check import choice, finite, message
from resid_surgery.errors import ArgumentError

AttnKind = Literal["attention", "opaque", "none"]
MlpKind = Literal["neurons", "experts", "opaque", "none"]
MIXES = ("weights", "product", "sdpa", "named", "differential")
Factor = float | str
"""A number, or the path (inside the block) of a parameter or buffer that multiplies."""


@final
@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """One kind of block: module paths relative to the block, and flags.

    Attributes:
        attn_kind: "attention" (heads and sources), "opaque" (one addend: a state space, a
            convolution, linear attention) or "none". mlp_kind: "neurons", "experts", "opaque", "none".
        attn: the module that computes attention, or the opaque writer. attn_out: W_O.
        attn_norm, mlp_norm: norm that a writer reads through, or None where it reads the stream itself.
        attn_post_norm, mlp_post_norm: module between a writer and the stream, if any.
        mix: where attention weights meet values: "interface" for the attention interface of
            transformers; "weights:OP" (called with query, key, value; returns the weights too),
            "product:OP" (of weights and values), "sdpa:OP" or "named:WEIGHTS,VALUES" with OP an operation
            of `attn`'s source; "differential:NORM" for pairs of heads whose weights are subtracted.
        gated: something elementwise (a gate, a norm) stands between attention and W_O.
        mlp: the MLP's module ("" for the block itself). mlp_with: a module beside it whose output is
            added to its. mlp_out: the down-projection.
        keys: input projections of the MLP, gate first; ``path[0]`` and ``path[1]`` are the halves of
            a fused one. activation: path of the activation, or ":silu" for torch.nn.functional's.
            coef_norm: norm before the down-projection.
        experts: the module that holds the experts' tensors.
        shared_keys, shared_activation, shared_out: the shared expert's projections. shared_first:
            it is computed before the routed experts.
        parallel: both writers read the block's input.
        attn_scale, mlp_scale: multiplies what a writer adds. attn_carry, mlp_carry: multiplies the
            stream that it is added to.
    """

    attn_kind: AttnKind = "attention"
    attn: str | None = None
    attn_out: str | None = None
    attn_norm: str | None = None
    attn_post_norm: str | None = None
    mix: str = "interface"
    gated: bool = False
    mlp_kind: MlpKind = "neurons"
    mlp: str | None = None
    mlp_with: str | None = None
    mlp_out: str | None = None
    mlp_norm: str | None = None
    mlp_post_norm: str | None = None
    keys: tuple[str, ...] = ()
    activation: str | None = None
    coef_norm: str | None = None
    experts: str | None = None
    shared_keys: tuple[str, ...] = ()
    shared_activation: str | None = None
    shared_out: str | None = None
    shared_first: bool = False
    parallel: bool = False
    attn_scale: Factor = 1.0
    mlp_scale: Factor = 1.0
    attn_carry: Factor = 1.0
    mlp_carry: Factor = 1.0

    def __post_init__(self) -> None:
        for name in ("keys", "shared_keys"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else given
            if not isinstance(given, (tuple, list)) or len(given) > 2 or not all(isinstance(k, str) for k in given):
                raise ArgumentError(message(name, "at most two module paths, the gate first", given))
            object.__setattr__(self, name, tuple(given))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_scale", "_carry")):
                object.__setattr__(self, field.name, _factor(field.name, value))
            elif field.type in ("str", "str | None", str, str | None) and not isinstance(value, (str, NoneType)):
                raise ArgumentError(message(field.name, "a module path inside the block, or None", value))
            elif field.type in ("bool", bool) and not isinstance(value, bool):
                raise ArgumentError(message(field.name, "True or False", value))
        if not isinstance(self.mix, str):
            raise ArgumentError(message("mix", "a string such as 'interface'", self.mix))
        choice("attn_kind", self.attn_kind, AttnKind.__args__)  # type: ignore[attr-defined]
        choice("mlp_kind", self.mlp_kind, MlpKind.__args__)  # type: ignore[attr-defined]
        for name, needed in (
            ("attn", self.attn_kind != "none"),
            ("attn_out", self.attn_kind == "attention"),
            ("mlp", self.mlp_kind in ("experts", "opaque")),
            ("mlp_out", self.mlp_kind == "neurons"),
            ("experts", self.mlp_kind == "experts"),
        ):
            if needed and not isinstance(getattr(self, name), str):
                raise ArgumentError(message(name, "a module path inside the block for this kind", getattr(self, name)))
        if self.mix != "interface" and self.mix.partition(":")[0] not in MIXES:
            raise ArgumentError(
                message("mix", "'interface' or one of " + ", ".join(f"'{m}:...'" for m in MIXES), self.mix)
            )

    def paths(self) -> Mapping[str, str]:
        """Part name -> module path inside the block, for the parts that this kind of block has."""
        if "_paths" not in self.__dict__:
            self.__dict__["_paths"] = self._named_paths()
        return self.__dict__["_paths"]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _named_paths(self) -> Mapping[str, str]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {
            name: named[name]
            for name in ("attn", "attn_out", "attn_norm", "attn_post_norm", "mlp", "mlp_with", "mlp_out", "mlp_norm",
                         "mlp_post_norm", "coef_norm", "experts", "shared_out")
            if named[name] is not None
        }  # fmt: skip
        parts |= {f"key{i}": path for i, path in enumerate(self.keys)}
        return MappingProxyType(parts | {f"shared_key{i}": path for i, path in enumerate(self.shared_keys)})

    @property
    def plain(self) -> bool:
        """Whether the block adds its writers to the stream as they are."""
        return self.attn_scale == self.mlp_scale == self.attn_carry == self.mlp_carry == 1.0


def _factor(name: str, value: Any) -> Factor:
    """A finite number, or the path of a parameter or buffer."""
    if isinstance(value, str) and value:
        return value
    return finite(name, value)


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model's row: module paths from the top, and one `BlockLayout` a layer (or one for all).

    Attributes:
        blocks: path of the block list. final_norm, unembed: paths.
        block: one `BlockLayout` for all layers, or one a layer.
        head_scale: multiplies N(x) before the unembedding. logit_scale: multiplies its output. Both
            are folded into bs-values: bs(v) = logit_scale * W_U (head_scale * N(v)).
        logit_cap: c of the final soft-cap c * tanh(bs / c), or None.
        family: what the row is called in messages.
    """

    blocks: str
    final_norm: str
    unembed: str
    block: BlockLayout | tuple[BlockLayout, ...] | list[BlockLayout]
    head_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    family: str = "given"

    def __post_init__(self) -> None:
        for name in ("blocks", "final_norm", "unembed", "family"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ArgumentError(message(name, "a module path from the top", getattr(self, name)))
        for name in ("head_scale", "logit_scale"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        if self.logit_cap is not None:
            object.__setattr__(self, "logit_cap", finite("logit_cap", self.logit_cap))
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        rows = self.block if isinstance(self.block, tuple) else (self.block,)
        if not rows or not all(isinstance(row, BlockLayout) for row in rows):
            raise ArgumentError(message("block", "a BlockLayout, or one a layer", self.block))

    def of_layer(self, layer: int) -> BlockLayout:
        """The block layout of one layer."""
        return self.block if isinstance(self.block, BlockLayout) else self.block[layer]


def split_key(path: str) -> tuple[str, int | None]:
    """``"mlp.gate_up_proj[1]"`` -> (module path, half), half None for a whole projection."""
    if path.endswith(("[0]", "[1]")):
        return path[:-3], int(path[-2])
    return path, None

"""Taps: the places in a forward that can be read and written, and the order in which it passes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from resid_surgery.models.layout import split_key
from resid_surgery.models.opening import OpenedModel

TapName = Literal[
    "block_in",
    "attn_read",
    "attn_call",
    "attn_mix",
    "attn_z",
    "attn_raw",
    "attn_add",
    "mlp_read",
    "experts_call",
    "experts_out",
    "mlp_first",
    "with_read",
    "shared_key0",
    "shared_key1",
    "shared_coef",
    "shared_raw",
    "key0",
    "key1_read",
    "key1",
    "coef",
    "mlp_raw",
    "mlp_add",
    "block_out",
    "unembed_in",
    "bs",
    "logits",
    "output",
]
_ORDER: tuple[str, ...] = TapName.__args__  # type: ignore[attr-defined]


@final
@dataclass(frozen=True)
class Tap:
    """A place in the forward.

    ``block_in/out``: the stream before / after a block. ``attn_read``: what attention reads.
    ``attn_call``: what goes into attention, as queries, keys and values.
    ``attn_mix``: what comes out of it, (row, position, head, d_head). ``attn_z``: W_O's input.
    ``attn_raw/add``: what W_O (or an opaque writer) writes / the same after a post-norm, before the
    layer's scale. ``mlp_read``: what the MLP's keys read (``key1_read``, ``with_read``: the input of its second
    key, of a second module). ``key0/1``: pre-activations. ``coef``: the down-projection's input.
    ``experts_call``: states, indices and weights of routed experts; ``experts_out``: their sum;
    ``shared_*``: of the shared expert; ``mlp_first``: the output of an MLP to which another module's is
    added. ``mlp_raw/add``: as for attention.
    ``unembed_in``: the unembedding's input. ``bs``: its output before a logit scale. ``logits``: the model's own;
    ``output``: all that its forward returns, as it is.
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


def module_of(model: OpenedModel, layer: int, name: str) -> tuple[str, str]:
    """(part, "input" or "output") of a tap that is one module's."""
    row = model.block(layer)
    attn = "attn_out" if row.attn_kind == "attention" else "attn"
    mlp = "mlp_out" if row.mlp_kind == "neurons" else "mlp_with" if row.mlp_with else "mlp"
    read = {"neurons": ("key0", "input"), "experts": ("mlp", "input")}.get(row.mlp_kind, ("mlp", "input"))
    table = {
        "block_in": ("block", "input"),
        "attn_read": ("attn", "input"),
        "attn_z": ("attn_out", "input"),
        "attn_raw": (attn, "output"),
        "attn_add": ("attn_post_norm" if row.attn_post_norm else attn, "output"),
        "mlp_read": read,
        "with_read": ("mlp_with", "input"),
        "key0": ("key0", "output"),
        "key1_read": ("key1", "input"),
        "key1": ("key1", "output"),
        "coef": ("mlp_out", "input"),
        "experts_out": ("experts", "output"),
        "shared_key0": ("shared_key0", "output"),
        "shared_key1": ("shared_key1", "output"),
        "shared_coef": ("shared_out", "input"),
        "shared_raw": ("shared_out", "output"),
        "mlp_first": ("mlp", "output"),
        "mlp_raw": (mlp, "output"),
        "mlp_add": ("mlp_post_norm" if row.mlp_post_norm else mlp, "output"),
        "block_out": ("block", "output"),
    }
    return table[name]


def is_sum(model: OpenedModel, tap: Tap) -> bool:
    """Whether what is tapped is the sum of two modules' outputs, and so no module's own."""
    if tap.name not in ("mlp_raw", "mlp_add") or model.block(tap.layer).mlp_with is None:
        return False
    return tap.name == "mlp_raw" or not model.has(tap.layer, "mlp_post_norm")


def mlp_reads(model: OpenedModel, layer: int) -> list[Tap]:
    """Every place where a layer's MLP takes in what it reads."""
    row = model.block(layer)
    names: list[TapName] = ["mlp_read"]
    if row.mlp_kind == "neurons" and len(row.keys) == 2 and split_key(row.keys[0])[0] != split_key(row.keys[1])[0]:
        names.append("key1_read")
    if row.mlp_with is not None:
        names.append("with_read")
    return [Tap(name, layer) for name in names]


def mix_tap(model: OpenedModel, layer: int) -> Tap:
    """Where heads come out of attention, before a gate if there is one."""
    return Tap("attn_mix" if model.block(layer).gated else "attn_z", layer)

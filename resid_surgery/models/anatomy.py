"""Anatomy: a model's layout with its sizes, checked part by part.

Where the parts are comes from a `Layout`, read off one forward (`wiring`) or given by the user. Here
the parts are looked up, their weights are required to be plain numbers, and norms are measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from resid_surgery.errors import SiteError, UnsupportedModelError
from resid_surgery.models.experts import experts_of
from resid_surgery.models.layout import BlockLayout, Layout, split_key
from resid_surgery.models.parts import NormForm, attribute, linear_map, measure_norm, require_plain

NORM_PARTS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


@final
@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of one block; 0 where it has no such part.

    Attributes:
        n_heads, n_kv_heads, d_head: of attention, d_head being a value's size. d_mlp: neurons of a
            dense MLP, or of the shared expert. n_experts, d_expert: experts and neurons of each.
    """

    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    n_experts: int = 0
    d_expert: int = 0


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """Sizes, block kinds and flags of one opened model.

    Attributes:
        name: what the model is called in messages.
        layout: where its parts are; `matched` says how that is known.
        d_model, vocab_size: sizes. sizes: one `LayerSizes` a layer.
        context: longest prompt, or None when the config sets none.
        tied: embedding and unembedding share their weight.
        norms: (layer or None, part) -> measured norm form.
    """

    name: str
    layout: Layout
    matched: str
    d_model: int
    vocab_size: int
    context: int | None
    tied: bool
    sizes: tuple[LayerSizes, ...]
    norms: dict[tuple[int | None, str], NormForm]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.sizes)

    @property
    def n_heads(self) -> int:
        """Heads of the widest layer."""
        return max(size.n_heads for size in self.sizes)

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads of the widest layer."""
        return max(size.n_kv_heads for size in self.sizes)

    @property
    def d_head(self) -> int:
        """Size of a head's value in the widest layer."""
        return max(size.d_head for size in self.sizes)

    @property
    def d_mlp(self) -> int:
        """Neurons of the widest dense MLP (or shared expert)."""
        return max(size.d_mlp for size in self.sizes)

    @property
    def logit_cap(self) -> float | None:
        """c of the final soft-cap c * tanh(bs / c), or None."""
        return self.layout.logit_cap

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of every block read the same state."""
        return all(self.block(layer).parallel for layer in range(self.n_layers))

    @property
    def post_norm(self) -> bool:
        """Whether a norm stands between a sublayer and the stream somewhere."""
        rows = self.blocks()
        return any(row.attn_post_norm or row.mlp_post_norm for row in rows)

    @property
    def mixture(self) -> bool:
        """Whether some MLP is a mixture of experts."""
        return any(row.mlp_kind == "experts" for row in self.blocks())

    @property
    def hybrid(self) -> bool:
        """Whether some layer mixes positions without attention weights."""
        return any(row.attn_kind == "opaque" for row in self.blocks())

    @property
    def carries(self) -> bool:
        """Whether some block multiplies the stream itself."""
        return any(row.attn_carry != 1.0 or row.mlp_carry != 1.0 for row in self.blocks())

    @property
    def gated(self) -> bool:
        """Whether a neuron has two keys (gate and up)."""
        return any(len(row.keys) == 2 or len(row.shared_keys) == 2 for row in self.blocks())

    def block(self, layer: int) -> BlockLayout:
        """The block layout of one layer."""
        return self.layout.of_layer(layer)

    def blocks(self) -> tuple[BlockLayout, ...]:
        """The distinct kinds of block."""
        block = self.layout.block
        return (block,) if isinstance(block, BlockLayout) else tuple(dict.fromkeys(block))

    def between(self, layer: int) -> bool:
        """Whether there is a state between a layer's two writers."""
        row = self.block(layer)
        return not row.parallel and "none" not in (row.attn_kind, row.mlp_kind)

    def require(self, layer: int, part: str, what: str, *, whole: bool = False) -> None:
        """Refuse a writer that a layer has not, and a finer grain where it has only a whole one.

        Args:
            layer: which. part: "attn" or "mlp". what: the grain or site asked for. whole: it is of the
                whole writer.

        Raises:
            SiteError: the layer's writer is one addend, or it has none.
        """
        row = self.block(layer)
        kind, module = (row.attn_kind, row.attn) if part == "attn" else (row.mlp_kind, row.mlp)
        if kind == "none":
            raise SiteError(f"`{what}` does not exist for {self.name}: layer {layer} has no {part} writer.")
        if kind == "opaque" and not whole:
            known = "softmax attention" if part == "attn" else "MLP of neurons"
            raise SiteError(
                f"`{what}` does not exist for {self.name}: layer {layer}'s {module} is no {known}, so what it writes "
                f"is one addend. Use L{layer}.{part}."
            )

    def describe(self) -> dict[str, object]:
        """The facts that a reader wants, as a plain dictionary."""
        rows = [self.block(layer) for layer in range(self.n_layers)]
        kinds = {"attention": "attention", "opaque": "another mixer (one addend)", "none": "no attention"}
        counted = {word: sum(row.attn_kind == kind for row in rows) for kind, word in kinds.items()}
        mlps = {"neurons": "dense", "experts": "experts", "opaque": "one addend", "none": "none"}
        mlp = {word: sum(row.mlp_kind == kind for row in rows) for kind, word in mlps.items()}
        widest = max(self.sizes, key=lambda size: (size.d_expert, size.d_mlp))
        experts = f"; {widest.n_experts} experts of {widest.d_expert}" if widest.n_experts else ""
        return {
            "model": self.name,
            "family": f"{self.layout.family} ({self.matched})",
            "layers": self._counts(counted),
            "d_model": self.d_model,
            "heads": f"{self.n_heads} over {self.n_kv_heads} KV, d_head {self.d_head}",
            "mlp": f"{self._counts(mlp)}, d_mlp {self.d_mlp} ({'gated' if self.gated else 'ungated'}){experts}",
            "vocabulary": self.vocab_size,
            "block": "parallel" if self.parallel else "sequential",
            "multipliers": "none" if all(row.plain for row in rows) else "on writers or stream",
            "norms": ("LayerNorm" if self.norms[None, "final_norm"].centred else "RMSNorm")
            + (" + norm after the sublayer" if self.post_norm else ""),
            "logit scale": self.layout.head_scale * self.layout.logit_scale,
            "logit soft-cap": self.logit_cap,
            "tied embeddings": self.tied,
        }

    @staticmethod
    def _counts(counted: dict[str, int]) -> str:
        present = {word: n for word, n in counted.items() if n}
        return ", ".join(f"{n} {word}" for word, n in present.items())

    def with_heads(self, heads: dict[int, tuple[int, int, int]], gated: set[int]) -> "Anatomy":
        """The same with measured (n_heads, n_kv_heads, d_head) of some layers and gates of others."""
        sizes, rows = list(self.sizes), [self.block(layer) for layer in range(self.n_layers)]
        for layer, (n, kv, d) in heads.items():
            sizes[layer] = replace(sizes[layer], n_heads=n, n_kv_heads=kv, d_head=d)
            rows[layer] = replace(rows[layer], gated=layer in gated)
        block = rows[0] if all(row == rows[0] for row in rows) else tuple(rows)
        return replace(self, sizes=tuple(sizes), layout=replace(self.layout, block=block))


def dissect(module: nn.Module, layout: Layout, name: str, matched: str) -> Anatomy:
    """The anatomy of a causal language model by a layout, with its norms measured.

    Raises:
        UnsupportedModelError: a part is missing, not plain tensors, or of an unknown kind.
    """
    part = _part_getter(module, layout, name)
    blocks = part(None, layout.blocks)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        raise UnsupportedModelError(f"{layout.blocks} of {name} is no list of blocks ({type(blocks).__name__}).")
    n_layers = len(blocks)
    if isinstance(layout.block, tuple) and len(layout.block) != n_layers:
        raise UnsupportedModelError(
            f"the layout of {name} describes {len(layout.block)} layers, but {layout.blocks} has {n_layers}."
        )
    unembed = part(None, layout.unembed)
    w_u = getattr(unembed, "weight", None)
    if not isinstance(unembed, nn.Linear) or not isinstance(w_u, Tensor):
        raise UnsupportedModelError(f"the unembedding of {name} ({layout.unembed}) is not a plain Linear layer.")
    require_plain(w_u, f"{layout.unembed} of {name}")
    vocab_size, d_model = w_u.shape
    sizes = tuple(_sizes(layout.of_layer(i), i, part, d_model, name) for i in range(n_layers))
    norms: dict[tuple[int | None, str], NormForm] = {}
    for layer in range(n_layers):
        for p, path in layout.of_layer(layer).paths().items():
            if p in NORM_PARTS:
                norms[layer, p] = measure_norm(part(layer, path), d_model, f"{name} ({path})")
    norms[None, "final_norm"] = measure_norm(part(None, layout.final_norm), d_model, f"{name} ({layout.final_norm})")
    config: Any = getattr(module, "config", None)
    embed = getattr(module.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    context = getattr(config, "max_position_embeddings", None)
    return Anatomy(
        name=name,
        layout=layout,
        matched=matched,
        d_model=d_model,
        vocab_size=vocab_size,
        context=context if isinstance(context, int) and context > 0 else None,
        tied=isinstance(embed, Tensor) and embed.data_ptr() == w_u.data_ptr(),
        sizes=sizes,
        norms=norms,
    )


def _sizes(
    row: BlockLayout, layer: int, part: Callable[[int | None, str], nn.Module], d_model: int, name: str
) -> LayerSizes:
    """Sizes of one block's MLP; every projection of the block is required to be plain."""
    for path in row.paths().values():
        part(layer, split_key(path)[0])  # it exists
    _require_callables(row, layer, part, d_model, name)
    widths: dict[str, int] = {}
    for p, path in _projections(row):
        weight = linear_map(part(layer, split_key(path)[0]), f"{path} of {name}").rows
        require_plain(weight, f"layer {layer} {path} of {name}")
        if p.endswith("out") and weight.shape[1] != d_model:
            raise UnsupportedModelError(
                f"{name} unembeds vectors of size {d_model} but {path} writes {weight.shape[1]}: a projection "
                "stands between the stream and the vocabulary, so the head is not linear after one norm."
            )
        widths[p] = weight.shape[0]
    for kind, keys in (("mlp_out", row.keys), ("shared_out", row.shared_keys)):
        for i, path in enumerate(keys):
            p = f"key{i}" if kind == "mlp_out" else f"shared_key{i}"
            whole = linear_map(part(layer, split_key(path)[0]), path).rows.shape[1]
            made = whole // 2 if split_key(path)[1] is not None else whole
            if kind in widths and made != widths[kind]:
                raise UnsupportedModelError(
                    f"layer {layer} {path} of {name} ({p}) writes {made} coordinates, but {widths[kind]} neurons are "
                    "written from there: it is no key of theirs."
                )
    heads = int(row.attn_kind == "attention")  # until they are measured
    if row.mlp_kind != "experts" or row.experts is None:
        return LayerSizes(
            d_mlp=widths.get("mlp_out", 0), d_head=widths.get("attn_out", 0), n_heads=heads, n_kv_heads=heads
        )
    experts = experts_of(part(layer, row.experts))
    if experts is None:
        raise UnsupportedModelError(f"layer {layer} {row.experts} of {name} holds no experts in the known form.")
    for tensor in part(layer, row.experts).parameters(recurse=False):
        require_plain(tensor, f"layer {layer} {row.experts} of {name}")
    return LayerSizes(
        d_mlp=widths.get("shared_out", 0),
        n_experts=experts.count,
        d_expert=experts.width,
        d_head=widths.get("attn_out", 0),
        n_heads=heads,
        n_kv_heads=heads,
    )


def _require_callables(
    row: BlockLayout, layer: int, part: Callable[[int | None, str], nn.Module], d_model: int, name: str
) -> None:
    """Refuse activations and factors that are not what a layout says they are."""
    block = part(layer, "")
    for path in (row.activation, row.shared_activation):
        if path is not None and not callable(attribute(block, path)):
            raise UnsupportedModelError(f"layer {layer} of {name} has no activation {path}, which its layout names.")
    for field in ("attn_scale", "mlp_scale", "attn_carry", "mlp_carry"):
        path = getattr(row, field)
        if isinstance(path, str):
            tensor = attribute(block, path)
            if not isinstance(tensor, Tensor) or not (tensor.numel() == 1 or tensor.shape == (d_model,)):
                raise UnsupportedModelError(
                    f"`{field}` of layer {layer} of {name} must be a number, or the path of a parameter or buffer with "
                    f"one number or {d_model}; got {path!r}."
                )


def _projections(row: BlockLayout) -> Iterator[tuple[str, str]]:
    for p, path in row.paths().items():
        if p.endswith("_out") or "key" in p:
            yield p, path


def _part_getter(module: nn.Module, layout: Layout, name: str) -> Callable[[int | None, str], nn.Module]:
    def part(layer: int | None, path: str) -> nn.Module:
        full = path if layer is None else f"{layout.blocks}.{layer}" + (f".{path}" if path else "")
        try:
            return module.get_submodule(full)
        except AttributeError:
            raise UnsupportedModelError(
                f"{name} has no module {full}, which its layout ({layout.family}) names; it is refused."
            ) from None

    return part

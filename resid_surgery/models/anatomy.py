"""Anatomy: where each part of an architecture is, as data.

A family is one `Layout`: a row of module paths and flags. There is no class per family and no
code per family; what the row says is proven by `resid_surgery.load`, which refuses a model whose
sums do not close. A model type without a row of its own is matched structurally: if exactly one
row's module paths all exist in it, that row is tried, and the same proof decides.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.parts import NormForm, linear_map, measure_norm, require_plain


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """One family's row: module paths (relative to a block unless said) and flags.

    Attributes:
        family: name of the row.
        model_types: `config.model_type` values known to use it.
        blocks: path of the block list from the top.
        attn_norm, mlp_norm: norm that a sublayer reads through.
        attn: module whose forward calls the attention interface.
        attn_out: W_O. attn_post_norm: norm between W_O and the stream, if any.
        keys: input projections of the MLP in forward order; with two, the first is the gate.
        activation: path of the activation module or function attribute.
        mlp_out: the down-projection. mlp_post_norm: norm between it and the stream, if any.
        final_norm, unembed: paths from the top.
        parallel: attention and MLP read the same state; a config attribute's name, or a bool.
        logit_cap: config attribute of the final soft-cap, if the family has one.
        requires: config attributes and the values with which the row holds.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    attn_norm: str
    attn: str
    attn_out: str
    mlp_norm: str
    keys: tuple[str, ...]
    activation: str
    mlp_out: str
    final_norm: str
    unembed: str
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel: bool | str = False
    logit_cap: str | None = None
    requires: tuple[tuple[str, object], ...] = ()

    def block_paths(self) -> dict[str, str]:
        """Part name -> path inside a block, for the parts that this family has."""
        parts = {
            "attn_norm": self.attn_norm,
            "attn": self.attn,
            "attn_out": self.attn_out,
            "attn_post_norm": self.attn_post_norm,
            "mlp_norm": self.mlp_norm,
            "mlp_out": self.mlp_out,
            "mlp_post_norm": self.mlp_post_norm,
        } | {f"key{i}": path for i, path in enumerate(self.keys)}
        return {part: path for part, path in parts.items() if path is not None}


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        family="llama",
        model_types=("llama",),
        blocks="model.layers",
        attn_norm="input_layernorm",
        attn="self_attn",
        attn_out="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        keys=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        mlp_out="mlp.down_proj",
        final_norm="model.norm",
        unembed="lm_head",
    ),
    Layout(
        family="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        attn_norm="ln_1",
        attn="attn",
        attn_out="attn.c_proj",
        mlp_norm="ln_2",
        keys=("mlp.c_fc",),
        activation="mlp.act",
        mlp_out="mlp.c_proj",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        requires=(("add_cross_attention", False),),
    ),
    Layout(
        family="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        attn_norm="self_attn_layer_norm",
        attn="self_attn",
        attn_out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        keys=("fc1",),
        activation="activation_fn",
        mlp_out="fc2",
        final_norm="model.decoder.final_layer_norm",
        unembed="lm_head",
        requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
    Layout(
        family="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        attn_norm="input_layernorm",
        attn="attention",
        attn_out="attention.dense",
        mlp_norm="post_attention_layernorm",
        keys=("mlp.dense_h_to_4h",),
        activation="mlp.act",
        mlp_out="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        unembed="lm_head",
        parallel="use_parallel_residual",
    ),
    Layout(
        family="gemma2",
        model_types=("gemma2",),
        blocks="model.layers",
        attn_norm="input_layernorm",
        attn="self_attn",
        attn_out="self_attn.o_proj",
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        keys=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        mlp_out="mlp.down_proj",
        mlp_post_norm="post_feedforward_layernorm",
        final_norm="model.norm",
        unembed="lm_head",
        logit_cap="final_logit_softcapping",
    ),
)


@final
@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Sizes, block kind and flags of one opened model.

    Attributes:
        name: what the model is called in messages.
        layout: the row that it is read by; `matched` says how the row was found.
        n_layers, d_model, n_heads, d_head, d_mlp, vocab_size: sizes. n_kv_heads: key/value heads.
        context: longest prompt, or None when the config sets none.
        parallel: attention and MLP of a block read the same state.
        logit_cap: c of the final soft-cap c * tanh(bs / c), or None.
        tied: embedding and unembedding share their weight.
        norms: part name -> measured norm form.
    """

    name: str
    layout: Layout
    matched: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context: int | None
    parallel: bool
    logit_cap: float | None
    tied: bool
    norms: dict[str, NormForm] = field(default_factory=dict, hash=False)

    @property
    def gated(self) -> bool:
        """Whether a neuron has two keys (gate and up)."""
        return len(self.layout.keys) == 2

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of a neuron's keys, in forward order."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def post_norm(self) -> bool:
        """Whether a norm stands between a sublayer and the stream."""
        return self.layout.attn_post_norm is not None or self.layout.mlp_post_norm is not None

    def describe(self) -> dict[str, object]:
        """The facts that a reader wants, as a plain dictionary."""
        return {
            "model": self.name,
            "family": f"{self.layout.family} ({self.matched})",
            "layers": self.n_layers,
            "d_model": self.d_model,
            "heads": f"{self.n_heads} over {self.n_kv_heads} KV, d_head {self.d_head}",
            "d_mlp": f"{self.d_mlp} ({'gated' if self.gated else 'ungated'})",
            "vocabulary": self.vocab_size,
            "block": "parallel" if self.parallel else "sequential",
            "norms": ("LayerNorm" if self.norms["final_norm"].centred else "RMSNorm")
            + (" + norm after the sublayer" if self.post_norm else ""),
            "logit soft-cap": self.logit_cap,
            "tied embeddings": self.tied,
        }


def find_layout(module: nn.Module, name: str) -> tuple[Layout, str]:
    """The row for a model: by `config.model_type`, else the one row whose paths all exist.

    Raises:
        UnsupportedModelError: no row fits, several do, or the row's conditions do not hold.
    """
    config = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    rows = [row for row in LAYOUTS if kind in row.model_types]
    how = "by type"
    if not rows:
        rows = [row for row in LAYOUTS if _fits(module, row)]
        # A row with more parts (post-norms) explains more of the block than one without.
        most = max((len(row.block_paths()) for row in rows), default=0)
        rows = [row for row in rows if len(row.block_paths()) == most]
        how = f"type '{kind}', matched by structure"
    if len(rows) != 1:
        known = ", ".join(row.family for row in LAYOUTS)
        raise UnsupportedModelError(
            f"{name} has model type '{kind}' ({type(module).__name__}), whose blocks fit none of the known layouts "
            f"({known}). Its residual stream cannot be split, so it is refused."
        )
    row = rows[0]
    for attribute, wanted in row.requires:
        got = getattr(config, attribute, wanted)
        if got != wanted:
            raise UnsupportedModelError(
                f"{name} is a {row.family} model with {attribute}={got}; its stream is a sum of addends only "
                f"with {attribute}={wanted}, so it is refused."
            )
    return row, how


def dissect(module: nn.Module, name: str) -> Anatomy:
    """The anatomy of a causal language model, by row or structure, with its norms measured.

    Raises:
        UnsupportedModelError: a part is missing, not plain tensors, or of an unknown kind.
    """
    row, how = find_layout(module, name)
    part = _part_getter(module, row, name)
    blocks = part(None, row.blocks)
    config: Any = module.config
    n_layers = len(blocks)  # type: ignore[arg-type]
    if n_layers == 0:
        raise UnsupportedModelError(f"{name} has no blocks under {row.blocks}.")
    unembed = part(None, row.unembed)
    w_u = getattr(unembed, "weight", None)
    if not isinstance(unembed, nn.Linear) or not isinstance(w_u, Tensor) or not w_u.is_floating_point():
        raise UnsupportedModelError(f"the unembedding of {name} ({row.unembed}) is not a plain Linear layer.")
    vocab_size, d_model = w_u.shape
    w_o = linear_map(part(0, row.attn_out), f"{row.attn_out} of {name}").rows
    w_down = linear_map(part(0, row.mlp_out), f"{row.mlp_out} of {name}").rows
    if w_o.shape[1] != d_model or w_down.shape[1] != d_model:
        raise UnsupportedModelError(
            f"{name} unembeds vectors of size {d_model} but its sublayers write {w_down.shape[1]}: a projection "
            "stands between the stream and the vocabulary, so the head is not linear after one norm."
        )
    for layer in range(n_layers):
        for path in (row.attn_out, row.mlp_out, *row.keys):
            weight = linear_map(part(layer, path), f"{path} of {name}").rows
            require_plain(weight, f"layer {layer} {path} of {name}")
            first = linear_map(part(0, path), path).rows
            if weight.shape != first.shape:
                raise UnsupportedModelError(
                    f"layer {layer} {path} of {name} is {tuple(weight.shape)} and layer 0's {tuple(first.shape)}: "
                    "models whose layers differ in width are not supported."
                )
    norms = {
        p: measure_norm(part(0, path), d_model, f"{name} ({path})")
        for p, path in row.block_paths().items()
        if p.endswith("norm")
    }
    for layer, (p, path) in itertools.product(range(1, n_layers), row.block_paths().items()):
        if p.endswith("norm") and measure_norm(part(layer, path), d_model, f"{name} ({path})") != norms[p]:
            raise UnsupportedModelError(f"layer {layer} {path} of {name} is another kind of norm than layer 0's.")
    norms["final_norm"] = measure_norm(part(None, row.final_norm), d_model, f"{name} ({row.final_norm})")
    n_heads = int(config.num_attention_heads)
    cap = getattr(config, row.logit_cap, None) if row.logit_cap else None
    embed = getattr(module.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return Anatomy(
        name=name,
        layout=row,
        matched=how,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        d_head=w_o.shape[0] // n_heads,
        d_mlp=w_down.shape[0],
        vocab_size=vocab_size,
        context=getattr(config, "max_position_embeddings", None),
        parallel=bool(getattr(config, row.parallel)) if isinstance(row.parallel, str) else row.parallel,
        logit_cap=None if cap is None else float(cap),
        tied=isinstance(embed, Tensor) and embed.data_ptr() == w_u.data_ptr(),
        norms=norms,
    )


def _fits(module: nn.Module, row: Layout) -> bool:
    try:
        part = _part_getter(module, row, "")
        part(None, row.final_norm), part(None, row.unembed)
        for path in row.block_paths().values():
            part(0, path)
    except UnsupportedModelError:
        return False
    return True


def _part_getter(module: nn.Module, row: Layout, name: str) -> Callable[[int | None, str], nn.Module]:
    def part(layer: int | None, path: str) -> nn.Module:
        full = path if layer is None else f"{row.blocks}.{layer}.{path}"
        try:
            return module.get_submodule(full)
        except AttributeError:
            raise UnsupportedModelError(
                f"{name} has no module {full}, which the {row.family} layout needs; it is refused."
            ) from None

    return part


def families_table() -> str:
    """The rows of `LAYOUTS` as a Markdown table."""
    lines = ["| family | model types | block | MLP | norms | unembedding |", "|---|---|---|---|---|---|"]
    for row in LAYOUTS:
        block = "parallel" if row.parallel is True else "sequential" if row.parallel is False else f"`{row.parallel}`"
        mlp = "gated" if len(row.keys) == 2 else "ungated"
        norms = "before and after the sublayer" if row.attn_post_norm else "before the sublayer"
        cap = f"soft-cap (`{row.logit_cap}`)" if row.logit_cap else "plain"
        lines.append(f"| {row.family} | {', '.join(row.model_types)} | {block} | {mlp} | {norms} | {cap} |")
    return "\n".join(lines)

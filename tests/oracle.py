"""Slow nested-loop versions of the paper's formulas, sharing no helper with the library.

What the model computed is captured by plain PyTorch hooks in a plain forward; everything after
that is Python floats in loops. Family facts are written out again here, on purpose.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Where:
    """Module paths of one family, relative to a block unless they start at the top."""

    blocks: str
    w_o: str
    down: str
    final_norm: str
    value: str
    mlp_norm: str
    keys: tuple[str, ...]
    attn_post: str | None = None
    mlp_post: str | None = None
    layer_norm: bool = False
    one_plus: bool = False
    conv1d: bool = False
    parallel: bool = False


WHERE = {
    "llama": Where("model.layers", "self_attn.o_proj", "mlp.down_proj", "model.norm", "self_attn.v_proj",
                   "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "gpt2": Where("transformer.h", "attn.c_proj", "mlp.c_proj", "transformer.ln_f", "attn.c_attn", "ln_2",
                  ("mlp.c_fc",), layer_norm=True, conv1d=True),
    "opt": Where("model.decoder.layers", "self_attn.out_proj", "fc2", "model.decoder.final_layer_norm",
                 "self_attn.v_proj", "final_layer_norm", ("fc1",), layer_norm=True),
    "gpt_neox": Where("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm",
                      "attention.query_key_value", "post_attention_layernorm", ("mlp.dense_h_to_4h",),
                      layer_norm=True, parallel=True),
    "gemma2": Where("model.layers", "self_attn.o_proj", "mlp.down_proj", "model.norm", "self_attn.v_proj",
                    "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"),
                    attn_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm", one_plus=True),
}  # fmt: skip


@dataclass
class Seen:
    """What a plain forward computed at the predicting position, as lists of floats."""

    family: str
    model: nn.Module
    t: int
    pre: list[list[float]] = field(default_factory=list)
    attn: list[list[float]] = field(default_factory=list)
    mlp: list[list[float]] = field(default_factory=list)
    attn_raw: list[list[float]] = field(default_factory=list)
    mlp_raw: list[list[float]] = field(default_factory=list)
    coefficient: list[list[float]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    alpha: list[Any] = field(default_factory=list)
    mlp_reads: list[list[float]] = field(default_factory=list)
    pre_activations: list[list[list[float]]] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)

    @property
    def where(self) -> Where:
        return WHERE[self.family]


def capture(model: nn.Module, family: str, ids: list[int], t: int) -> Seen:
    """One plain forward with plain hooks, all removed afterwards."""
    where, seen, caught, handles = WHERE[family], Seen(family, model, t), {}, []
    n_positions, n_layers = len(ids), model.config.num_hidden_layers

    def keep(name: str, of_input: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            value = value[0] if isinstance(value, tuple) else value
            caught[name] = value.detach().reshape(n_positions, -1).clone()

        return hook

    blocks = model.get_submodule(where.blocks)
    for i in range(n_layers):
        block = blocks.get_submodule(str(i))
        wanted = [("pre", block, True), ("post", block, False), ("attn_raw", block.get_submodule(where.w_o), False),
                  ("mlp_raw", block.get_submodule(where.down), False), ("coef", block.get_submodule(where.down), True),
                  ("value", block.get_submodule(where.value), False),
                  ("reads", block.get_submodule(where.mlp_norm), True)]  # fmt: skip
        wanted += [(f"key{n}", block.get_submodule(path), False) for n, path in enumerate(where.keys)]
        wanted.append(("attn", block.get_submodule(where.attn_post or where.w_o), False))
        wanted.append(("mlp", block.get_submodule(where.mlp_post or where.down), False))
        for name, module, of_input in wanted:
            handles.append(module.register_forward_hook(keep(f"{name}{i}", of_input), with_kwargs=True))
    try:
        with torch.no_grad():
            out = model(torch.tensor([ids]), use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    for i in range(n_layers):
        into = {"pre": seen.pre, "attn": seen.attn, "mlp": seen.mlp, "attn_raw": seen.attn_raw}
        into |= {"mlp_raw": seen.mlp_raw, "coef": seen.coefficient, "reads": seen.mlp_reads}
        for name, rows in into.items():
            rows.append(caught[f"{name}{i}"][t].tolist())
        seen.pre_activations.append([caught[f"key{n}{i}"][t].tolist() for n in range(len(where.keys))])
        seen.values.append(split_values(family, model.config, caught[f"value{i}"]))
        seen.alpha.append(out.attentions[i][0, :, t].tolist())
    seen.final = caught[f"post{n_layers - 1}"][t].tolist()
    seen.logits = out.logits[0, t].tolist()
    return seen


def split_values(family: str, config: Any, projected: torch.Tensor) -> list[list[list[float]]]:
    """[kv head][position][d_head] values, out of whatever the family's projection writes."""
    n_heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or n_heads
    if family == "gpt2":
        projected = projected[:, 2 * config.n_embd :]
    if family == "gpt_neox":
        d_head = config.hidden_size // n_heads
        projected = projected.reshape(len(projected), n_heads, 3, d_head)[:, :, 2].reshape(len(projected), -1)
    return projected.reshape(len(projected), kv, -1).transpose(0, 1).tolist()


def rows_of(seen: Seen, layer: int, path: str) -> list[list[float]]:
    """[input coordinate][d_model] rows that a projection writes."""
    weight = seen.model.get_submodule(f"{seen.where.blocks}.{layer}.{path}").weight.detach()
    return (weight if seen.where.conv1d else weight.T).tolist()


def norm(seen: Seen, module: nn.Module, v: list[float], s: float | None = None, *, bias: bool = False) -> list[float]:
    """A LayerNorm or RMSNorm of a vector in loops; s frozen if given."""
    d, where = len(v), seen.where
    mean = sum(v) / d if where.layer_norm else 0.0
    s = scale(seen, module, v) if s is None else s
    gain = [g + (1.0 if where.one_plus else 0.0) for g in module.weight.tolist()]
    beta = module.bias.tolist() if bias and where.layer_norm else [0.0] * d
    return [gain[i] * (v[i] - mean) / s + beta[i] for i in range(d)]


def scale(seen: Seen, module: nn.Module, v: list[float]) -> float:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    mean = sum(v) / len(v) if seen.where.layer_norm else 0.0
    return math.sqrt(sum((x - mean) ** 2 for x in v) / len(v) + eps)


def final_norm(seen: Seen) -> nn.Module:
    return seen.model.get_submodule(seen.where.final_norm)


def bs(seen: Seen, v: list[float], *, constants: bool = False, s: float | None = None) -> list[float]:
    """W_U N_s(v), a loop over the vocabulary; s of the final stream unless given."""
    module = final_norm(seen)
    read = norm(seen, module, v, scale(seen, module, seen.final) if s is None else s, bias=constants)
    return [sum(w * x for w, x in zip(row, read, strict=True)) for row in seen.model.lm_head.weight.tolist()]


def capped(seen: Seen, values: list[float]) -> list[float]:
    c = getattr(seen.model.config, "final_logit_softcapping", None)
    return values if c is None else [c * math.tanh(b / c) for b in values]


def log_prob(values: list[float], w: int) -> float:
    top = max(values)
    return values[w] - top - math.log(sum(math.exp(b - top) for b in values))


def log_prob_increase(seen: Seen, x: list[float], v: list[float], w: int, *, own: bool = False) -> float:
    """C(v, x) = log p(w, x + v) - log p(w, x)."""
    moved = [a + b for a, b in zip(x, v, strict=True)]
    both = []
    for state in (moved, x):
        s = scale(seen, final_norm(seen), state) if own else None
        both.append(log_prob(capped(seen, bs(seen, state, constants=True, s=s)), w))
    return both[0] - both[1]


def state(seen: Seen, layer: int, part: str) -> list[float]:
    """What a sublayer is added to."""
    if part == "attn" or seen.where.parallel:
        return seen.pre[layer]
    return [a + b for a, b in zip(seen.pre[layer], seen.attn[layer], strict=True)]


def through_post(seen: Seen, layer: int, part: str, v: list[float]) -> list[float]:
    """A vector in a sublayer's output as it reaches the stream: the post-norm frozen at its input."""
    path = seen.where.attn_post if part == "attn" else seen.where.mlp_post
    if path is None:
        return v
    module = seen.model.get_submodule(f"{seen.where.blocks}.{layer}.{path}")
    raw = (seen.attn_raw if part == "attn" else seen.mlp_raw)[layer]
    return norm(seen, module, v, scale(seen, module, raw))


def neuron(seen: Seen, layer: int, k: int) -> list[float]:
    """coefficient x value vector, as it reaches the stream."""
    row, m = rows_of(seen, layer, seen.where.down)[k], seen.coefficient[layer][k]
    return through_post(seen, layer, "mlp", [m * w for w in row])


def head_source(seen: Seen, layer: int, h: int, j: int) -> list[float]:
    """alpha[t, j] v[j] W_O[h], in loops, grouped heads included."""
    values, alpha = seen.values[layer], seen.alpha[layer][h][j]
    value = values[h // (len(seen.alpha[layer]) // len(values))][j]
    rows = rows_of(seen, layer, seen.where.w_o)[h * len(value) : (h + 1) * len(value)]
    vector = [alpha * sum(value[a] * rows[a][i] for a in range(len(value))) for i in range(len(rows[0]))]
    return through_post(seen, layer, "attn", vector)


def share(seen: Seen, layer: int, key: int, k: int, u: list[float]) -> float:
    """What addend u contributes to a neuron's pre-activation: w_in . (gamma * centre(u)) / s."""
    where = seen.where
    module = seen.model.get_submodule(f"{where.blocks}.{layer}.{where.mlp_norm}")
    read = norm(seen, module, u, scale(seen, module, seen.mlp_reads[layer]))
    weight = seen.model.get_submodule(f"{where.blocks}.{layer}.{where.keys[key]}").weight.detach()
    row = (weight[:, k] if where.conv1d else weight[k]).tolist()
    return sum(a * b for a, b in zip(read, row, strict=True))

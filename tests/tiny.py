"""Seconds-small random models of every family, loud: a dropped part is never hidden by tolerance.

Weights are large, biases, gains and positions are all non-zero, soft-caps are of the size of the
values, and grouped heads are grouped, so that an omission shows as an error of order one.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97

SPECS: dict[str, dict[str, Any]] = {
    "llama": dict(
        model_type="llama", hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "gpt2": dict(
        model_type="gpt2", n_embd=24, n_layer=3, n_head=3, n_positions=64, n_inner=40,
        bos_token_id=0, eos_token_id=0,
    ),
    "opt": dict(
        model_type="opt", hidden_size=24, ffn_dim=40, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=1,
    ),
    "gpt_neox": dict(
        model_type="gpt_neox", hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=64, use_parallel_residual=True,
    ),
    "gemma2": dict(
        model_type="gemma2", hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64, query_pre_attn_scalar=6,
        final_logit_softcapping=1.5, attn_logit_softcapping=0.7, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip
FAMILIES = tuple(SPECS)


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """A fresh loud random model; `changes` override config fields."""
    spec = {"vocab_size": VOCAB, "attn_implementation": "eager", "dtype": dtype} | SPECS[family] | changes
    kind = spec.pop("model_type")
    attention = spec.pop("attn_implementation")
    spec.pop("dtype")
    config = AutoConfig.for_model(kind, **spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
        loud(model)
    return model


def loud(model: nn.Module) -> None:
    """Weights times 6; biases and gains far from their defaults."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(6.0)
            elif name.endswith("bias"):
                p.copy_(torch.randn_like(p) * 0.5)
            else:
                p.add_(torch.randn_like(p) * 0.3)


@cache
def shared(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A loaded (proven) tiny model, made once; tests must not change it."""
    import resid_surgery as rs

    return rs.load(build(family, dtype))

"""What the modules of some families hold for each head, written out by hand, sharing no helper with the library."""

from functools import cache

import torch
from tiny import shared

import resid_surgery as rs
from resid_surgery.models.zoo import tiny

PLAIN = ("llama", "gpt2", "gpt_neox", "gemma2", "granite", "phi3")
INNER = ("qwen3", "deepseek_v3")  # norms inside attention
FAMILIES = (*PLAIN, *INNER)


@cache
def loaded(family):
    """A proven loud tiny float64 model."""
    own = family in ("llama", "gpt2", "gpt_neox", "gemma2")
    return shared(family) if own else rs.load(tiny(family, dtype=torch.float64))


def split(weight, heads):
    """(head, d_in, width) out of rows whose columns are heads, one after the other."""
    return weight.reshape(weight.shape[0], heads, -1).transpose(0, 1)


def grouped(weight, heads):
    return weight.repeat_interleave(heads // len(weight), dim=0)


def maps_of(family, model, layer):
    """(Q, K, V, O): (head, d_model, width) and (head, d_head, d_model), norms folded in with scale 1."""
    config = model.module.config
    heads = config.num_attention_heads
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    block = model.module.get_submodule(f"{blocks}.{layer}")
    attn = block.get_submodule({"gpt2": "attn", "gpt_neox": "attention"}.get(family, "self_attn"))
    norm = block.ln_1 if family == "gpt2" else block.input_layernorm
    if family == "gpt2":
        q, k, v = (split(one, heads) for one in attn.c_attn.weight.detach().chunk(3, dim=1))
        o = attn.c_proj.weight.detach()
    elif family == "gpt_neox":  # for each head its query, key and value
        q, k, v = attn.query_key_value.weight.detach().T.reshape(config.hidden_size, heads, 3, -1).permute(2, 1, 0, 3)
        o = attn.dense.weight.detach().T
    elif family == "phi3":
        kv, rows = config.num_key_value_heads, attn.qkv_proj.weight.detach().T
        width = rows.shape[1] // (heads + 2 * kv)
        parts = rows.split([heads * width, kv * width, kv * width], 1)
        q, k, v = (split(one, n) for one, n in zip(parts, (heads, kv, kv), strict=True))
        o = attn.o_proj.weight.detach().T
    elif family == "deepseek_v3":
        q, k, v = latent(attn, config)
        o = attn.o_proj.weight.detach().T
    else:
        kv = config.num_key_value_heads
        parts = ((attn.q_proj, heads), (attn.k_proj, kv), (attn.v_proj, kv))
        q, k, v = (split(one.weight.detach().T, n) for one, n in parts)
        o = attn.o_proj.weight.detach().T
    if family == "qwen3":
        q, k = q * attn.q_norm.weight.detach(), k * attn.k_norm.weight.detach()
    q, k, v = (grouped(one, heads) for one in (q, k, v))
    o = o.reshape(heads, -1, o.shape[1])
    gain = norm.weight.detach() + (family == "gemma2")
    through = torch.diag(gain)
    if family in ("gpt2", "gpt_neox"):  # LayerNorm takes the mean away first
        d = len(gain)
        through = (torch.eye(d) - 1 / d).to(gain) @ through
    if family == "gemma2":
        o = o * (1 + block.post_attention_layernorm.weight.detach())
    if family == "granite":
        o = o * config.residual_multiplier
    return through @ q, through @ k, through @ v, o


def latent(attn, config):
    """Multi-head latent attention: down, the latent norm's gain, up; the rotated part of the key is shared by all."""
    down = attn.q_a_proj.weight.detach().T * attn.q_a_layernorm.weight.detach()
    q = split(down @ attn.q_b_proj.weight.detach().T, config.num_attention_heads)
    a = attn.kv_a_proj_with_mqa.weight.detach().T
    rank = config.kv_lora_rank
    up = (a[:, :rank] * attn.kv_a_layernorm.weight.detach()) @ attn.kv_b_proj.weight.detach().T
    k, v = split(up, config.num_attention_heads).split([config.qk_nope_head_dim, config.v_head_dim], -1)
    k = torch.cat([k, a[None, :, rank:].expand(len(k), -1, -1)], -1)
    return q, k, v


def bs_unit(model, family, v):
    """Logits with the final norm's scale 1, and no constants."""
    norm = model.module.get_submodule(model.path(None, "final_norm"))
    gain = norm.weight.detach() + (family == "gemma2")
    v = v - v.mean(-1, keepdim=True) if family in ("gpt2", "gpt_neox") else v
    bs = (v * gain) @ model.module.get_output_embeddings().weight.detach().T
    return bs / model.module.config.logits_scaling if family == "granite" else bs

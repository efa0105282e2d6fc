"""The zoo: every causal-LM type that transformers registers, tiny, built offline from its config.

A proof about an architecture needs a model of that architecture, not a trained one. `tiny` builds
one in a fraction of a second: four layers that cover every kind of layer the type has, a few tens
of thousands of random weights. It is loud: no bias, gain, scale or soft-cap is left where leaving
it out would not show. Generic sizes settle most types; `SPECS` holds what is particular to one.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from resid_surgery._check import shown
from resid_surgery.errors import ResidSurgeryError
from resid_surgery.models.modes import GradKept

LAYERS = 4
LOUDNESS = 6.0
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SPARSE = ["dense", "dense", "sparse", "sparse"]
_ROPE = dict(rope_type="default", rope_theta=10000.0)
_PARTIAL = _ROPE | dict(partial_rotary_factor=2 / 3)

# Applied where the type's config class has the field under that name.
GENERIC: dict[str, Any] = dict(
    # width
    vocab_size=97, hidden_size=24, n_embd=24, d_model=24, embedding_size=24, emb_dim=24, embedding_dim=24,
    word_embed_proj_dim=24, vocab_size_per_layer_input=97, intermediate_size=40, ffn_dim=40, n_inner=40, d_inner=40,
    dff=40, dim_ff=40, ffn_hidden_size=40, decoder_ffn_dim=40, encoder_ffn_dim=40, feed_forward_size=40,
    # depth
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS, decoder_layers=LAYERS,
    num_decoder_layers=LAYERS, encoder_layers=1, num_encoder_layers=1,
    # heads; heads times their width is not the hidden size where the type allows it
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, attention_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, num_decoder_attention_heads=4, num_encoder_attention_heads=4, num_key_value_heads=2,
    num_kv_heads=2, head_dim=8, kv_channels=8, d_head=8, dim_head=8, attention_head_size=8, rotary_dim=4,
    query_pre_attn_scalar=6,
    # positions and windows
    max_position_embeddings=64, n_positions=64, max_seq_len=64, n_ctx=64, context_length=64, model_max_length=64,
    max_target_positions=64, max_source_positions=32, sliding_window=4, sliding_window_size=4, window_size=4,
    attention_window_size=4, local_attention=6, attention_chunk_size=4, use_sliding_window=True,
    # tokens
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    # experts: four, of which each token uses two
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    num_experts_per_token=2, moe_topk=2, moe_k=2, moe_intermediate_size=16, shared_expert_intermediate_size=12,
    moe_shared_expert_intermediate_size=12, shared_intermediate_size=12, n_shared_experts=1, num_shared_experts=1,
    moe_num_shared_experts=1, n_group=1, topk_group=1, num_expert_group=1, first_k_dense_replace=2,
    num_dense_layers=2, mlp_only_layers=[0, 1],
    # low ranks and indexers
    q_lora_rank=12, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, index_topk=3,
    index_head_dim=8, index_n_heads=2,
    # state spaces, convolutions, linear attention
    mamba_d_state=5, mamba_n_heads=4, mamba_d_head=12, mamba_dt_rank=3, mamba_chunk_size=8, chunk_size=8, state_size=5,
    time_step_rank=3, linear_key_head_dim=6, linear_value_head_dim=5, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_head_dim=6, linear_num_heads=4, linear_conv_kernel_dim=3, conv_L_cache=3,
    # biases and norms that a flag switches on
    attention_bias=True, mlp_bias=True, use_bias=True, bias=True, lm_head_bias=True, attention_out_bias=True,
    qkv_bias=True, use_qkv_bias=True, projectors_bias=True, mamba_proj_bias=True, mamba_conv_bias=True,
    use_conv_bias=True, conv_bias=True, norm_bias=True, add_bias_linear=True, decoder_bias=True, enable_bias=True,
    scale_embedding=True, use_qk_norm=True, qk_layernorm=True,
    # multipliers away from 1, caps of the size of the values
    residual_multiplier=0.7, embedding_multiplier=1.7, logits_scaling=1.3, attention_multiplier=0.6, logit_scale=0.7,
    routed_scaling_factor=1.7, router_scaling_factor=1.7, route_scale=1.7, moe_routed_scaling_factor=1.7,
    scale_emb=1.7, scale_depth=1.1, dim_model_base=12, embedding_scale=1.7, final_logit_softcapping=1.5,
    attn_logit_softcapping=0.7, swiglu_limit=1.0,
    is_decoder=True,
)  # fmt: skip

# Where the keys and values come from one latent: every head has its own, and rotates its own part.
_LATENT: dict[str, Any] = dict(num_key_value_heads=4, head_dim=4)

# What generic sizes do not settle, by model type; a composite type adds to its text model's type.
SPECS: dict[str, dict[str, Any]] = {
    "afmoe": dict(mup_enabled=True),
    "axk2": dict(gated_norm_rank=3),
    "bailing_hybrid": dict(head_dim=6),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "big_bird": dict(attention_type="original_full"),
    "bigbird_pegasus": dict(attention_type="original_full"),
    "blt": dict(  # a threshold out of reach: no patch is empty, which float64 cannot mask
        patching_threshold=9.0, encoder_hash_byte_group_vocab=31, encoder_hash_byte_group_size=[3, 4], cross_attn_k=2,
        **{
            f"{part}_config": dict(
                hidden_size=48 if part == "global" else 24, hidden_size_global=48, intermediate_size=40,
                num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
                vocab_size=97, cross_attn_k=2,
            )
            for part, layers in dict(patcher=1, encoder=1, decoder=4, **{"global": 2}).items()
        },
    ),
    "cohere2_moe": dict(mlp_layer_types=_SPARSE, prefix_dense_intermediate_size=30),
    "cohere_compass_text": dict(
        layer_types=_SLIDING,
        rope_parameters={kind: _ROPE | dict(mrope_section=[2, 1, 1]) for kind in _SLIDING[:2]},
    ),
    "cpmant": dict(
        init_std=0.02, position_bias_num_buckets=8, position_bias_max_distance=16, prompt_types=3, prompt_length=4,
        segment_types=3,
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v4": dict(
        layer_types=[f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed", "sliding")],
        compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=3), partial_rotary_factor=0.5,
        o_groups=2, o_lora_rank=6, hc_mult=2, hc_sinkhorn_iters=3, index_topk=2, num_key_value_heads=1,
    ),
    "doge": dict(keep_window_size=3),
    "dots1": dict(layer_types=_SLIDING),
    "dots3_note_text": dict(
        head_dim=10, shared_experts_intermediate_size=12,
        layer_types=["indexed_attention", "sliding_attention"] * 2, swa_num_attention_heads=2,
        swa_num_key_value_heads=2, swa_q_lora_rank=10, swa_kv_lora_rank=9, swa_head_dim=8, swa_qk_nope_head_dim=4,
        swa_v_head_dim=7,
    ),
    "falcon_h1": dict(
        mamba_d_ssm=48, mamba_rms_norm=True, lm_head_multiplier=1.3, key_multiplier=0.7, attention_in_multiplier=0.9,
        attention_out_multiplier=0.8, ssm_in_multiplier=1.1, ssm_out_multiplier=1.2, mlp_multipliers=[0.8, 1.2],
        ssm_multipliers=[0.8, 0.9, 1.1, 1.2, 1.3],
    ),
    "gemma3n_text": dict(
        layer_types=_SLIDING, num_kv_shared_layers=2, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
        intermediate_size=[40] * LAYERS, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    ),
    "gemma4_text": dict(hidden_size_per_layer_input=0, global_head_dim=10),
    "gemma4_unified_text": dict(global_head_dim=10),
    "git": dict(
        vision_config=dict(
            hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
    ),
    "glm_moe_dsa": dict(indexer_types=["full", "shared", "full", "shared"]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "gpt_neox": dict(rope_parameters=_PARTIAL),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2, position_embedding_type="rope"),
    "helium": dict(head_dim=6),
    "hy_v3": dict(initializer_range=0.02),
    "hy_v4": dict(initializer_range=0.02, hc_mult=2, indexer_types=["full", "shared", "full", "shared"]),
    "inkling2_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=1, swa_head_dim=6, d_rel=3, rel_extent=5,
        unpadded_vocab_size=97, log_scaling_n_floor=2, log_scaling_alpha=0.5, n_layers_per_attn_res_block=2,
        qk_l2_clip_threshold=1.0, rel_l2_clip_threshold=1.0, mlp_gate_softcap=1.0, mlp_up_softcap=1.0,
    ),
    "inkling_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=1, swa_head_dim=6, d_rel=3, rel_extent=5,
        log_scaling_n_floor=2, log_scaling_alpha=0.5, logits_mup_width_multiplier=1.7, mlp_layer_types=_SPARSE,
    ),
    "jamba": dict(attn_layer_period=3, attn_layer_offset=0),
    "laguna": dict(
        layer_types=_SLIDING, num_attention_heads_per_layer=[4, 2, 4, 2], moe_router_logit_softcapping=0.7
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "llama4_text": dict(
        no_rope_layers=[1, 0, 1, 0], interleave_moe_layer_step=2, intermediate_size_mlp=30, floor_scale=2,
        attn_scale=0.5,
    ),
    "longcat_flash": dict(zero_expert_num=2, expert_ffn_hidden_size=16),
    "mamba2": dict(num_heads=4, head_dim=12, n_groups=2),
    "mellum": dict(layer_types=_SLIDING, mlp_layer_types=_SPARSE),
    "minimax": dict(
        full_attn_alpha_factor=1.2, full_attn_beta_factor=0.8, linear_attn_alpha_factor=0.7,
        linear_attn_beta_factor=1.3, mlp_alpha_factor=0.9, mlp_beta_factor=1.1, block_size=4,
    ),
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"] * 2, mlp_layer_types=_SPARSE, dense_intermediate_size=30,
        index_block_size=2, index_topk_blocks=2,
    ),
    "ministral": dict(layer_types=_SLIDING),
    "ministral3": dict(
        rope_parameters=_ROPE | dict(llama_4_scaling_beta=0.5, original_max_position_embeddings=2),
    ),
    "mllama_text_model": dict(cross_attention_layers=[2]),
    "nemotron_h": dict(
        ssm_state_size=5, mamba_num_heads=4, mamba_head_dim=12, n_groups=2, expand=2,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    ),
    "persimmon": dict(rope_parameters=_PARTIAL),
    "phi": dict(rope_parameters=_PARTIAL),
    "phi4_multimodal": dict(
        vision_config=dict(
            hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4, crop_size=8,
        ),
        audio_config=dict(
            hidden_size=12, intermediate_size=16, num_blocks=2, num_attention_heads=2, ext_pw_out_channel=12,
            depthwise_separable_out_channel=12, input_size=16, nemo_conv_channels=6, bias_max_distance=8,
        ),
    ),
    "qwen2": dict(layer_types=_SLIDING),
    "qwen2_moe": dict(layer_types=_SLIDING),
    "qwen3": dict(layer_types=_SLIDING),
    "qwen4_exp_text": dict(
        hc_count=2, hc_lowrank=6, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4,
        indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(logits_soft_cap=5.0),
    "reformer": dict(
        axial_pos_embds=False, attn_layers=["local", "lsh", "local", "lsh"], local_attn_chunk_length=4,
        lsh_attn_chunk_length=4, num_buckets=2, hash_seed=0,
    ),
    "rembert": dict(input_embedding_size=12, output_embedding_size=20),
    "roc_bert": dict(
        pronunciation_embed_dim=6, shape_embed_dim=5, pronunciation_vocab_size=97, shape_vocab_size=97
    ),
    "smollm3": dict(layer_types=_SLIDING, no_rope_layers=[1, 1, 0, 0]),
    "stablelm": dict(rope_parameters=_PARTIAL),
    "xlm": dict(causal=True),
    "xlnet": dict(d_head=6),
    "xlstm": dict(output_logit_soft_cap=10.0, gate_soft_cap=1.5, ffn_round_up_to_multiple_of=8),
    "xmod": dict(default_language="en_XX"),
    "youtu": dict(initializer_range=0.02, embedding_initializer_range=0.02),
    "zamba2": dict(use_shared_attention_adapter=True, adapter_rank=4, use_mem_rope=True, num_key_value_heads=4),
    "zaya": dict(layer_types=["hybrid", "hybrid_sliding"] * 2, num_experts_per_tok=1, router_hidden_size=10),
}  # fmt: skip

_ASSISTANT = "an assistant reads the keys and values of the model that it assists; it has no forward pass of its own"
_MUSIC = "AutoModelForCausalLM hands the whole composite config to the decoder's class, which needs the decoder's own"
_UNBUILDABLE = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}

# Biases that choose experts and weigh nothing: moved so little that the token still has a say.
_ROUTING = ("correction_bias", "expert_bias")


class NotBuildableError(ResidSurgeryError, ValueError):
    """A registered type that cannot be built tiny and offline; the message is the one-line reason."""


def causal_types() -> tuple[str, ...]:
    """The model types that transformers registers for causal language modelling, sorted."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str = "eager",
    **changes: Any,
) -> nn.Module:
    """A fresh loud random model of a registered type, in eval mode.

    The weights depend on the type, seed and changes only: every dtype is a cast of the same float32
    model. The global random state is left as it was.

    Args:
        model_type: one of `causal_types()`.
        dtype: floating type of the weights.
        seed: of the weights.
        attn_implementation: passed on to transformers.
        changes: config fields to set differently; over `SPECS`, which go over `GENERIC`.

    Raises:
        NotBuildableError: with the reason in one line.
    """
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise NotBuildableError(f"{shown(model_type)} is not a causal-LM type that this transformers registers")
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.default_generator.manual_seed(seed)  # not the other devices', which are not forked
            config = _config(model_type, changes)
            with _nan_where_unset():
                model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
            _settle(model)
            loud(model)
            model = model.to(dtype).eval()
            if dtype is torch.float64 and model._can_set_experts_implementation():
                model.set_experts_implementation("eager")  # the default has no kernel for it
            return cast(nn.Module, model)
    except NotBuildableError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise NotBuildableError(f"{model_type}: {type(error).__name__}: {lines[-1].strip()[:200]}") from error


def loud(model: nn.Module) -> None:
    """Weights far from their defaults, in place: leaving any of them out changes the logits by much.

    Matrices, stacks of experts' matrices too, are multiplied; biases are drawn afresh; gains and
    other vectors are moved, and so are matrices and saved buffers that start constant. Tied weights
    stay tied. Draws from torch's global random state.

    Args:
        model: freshly initialised; changed in place.
    """
    saved = set(model.state_dict())
    with GradKept(), torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(_ROUTING):
                p.add_(torch.randn_like(p) * 0.1)
            elif name.endswith("bias"):
                p.copy_(torch.randn_like(p) * 0.5)
            elif p.ndim > 1 and not _constant(p) and not name.endswith("A_log"):
                p.mul_(LOUDNESS)
            else:
                p.add_(torch.randn_like(p) * 0.3)
        for name, b in model.named_buffers():
            if name in saved and b.is_floating_point() and _constant(b):
                b.add_(torch.randn_like(b) * (0.1 if name.endswith(_ROUTING) else 0.3))


def _constant(values: torch.Tensor) -> bool:
    return bool((values == values.flatten()[:1]).all())


def _settle(model: nn.Module) -> None:
    """Values of the usual size for what the architecture's own initialisation leaves unset, and for expert tables."""
    with GradKept(), torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all():
                p.copy_(torch.randn_like(p) * 0.02)
        for name, b in model.named_buffers():
            if name.endswith("tid2eid"):  # token id to expert ids; starts as expert 0 for all
                experts = torch.rand(b.shape[0], GENERIC["n_routed_experts"]).argsort(dim=1)
                b.copy_(experts[:, : b.shape[1]])


def _config(model_type: str, changes: dict[str, Any]) -> Any:
    """The tiny config: of the text model itself where a composite type's text model is registered too."""
    if model_type in _UNBUILDABLE:
        raise NotBuildableError(_UNBUILDABLE[model_type])
    whole = CONFIG_MAPPING[model_type]
    text = type(whole().get_text_config(decoder=True))
    fields = _fields(text, SPECS.get(text.model_type, {}) | SPECS.get(model_type, {}), changes)
    if text is whole or text in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text(**fields)
    key = next(name for name, kind in whole.sub_configs.items() if kind is text)
    return whole(**{key: fields})


def _fields(config_class: Any, spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Config fields of one class: generic ones that it has, then the type's own, then the caller's."""
    known = {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    aliases = {name for name, other in config_class.attribute_map.items() if other in known}
    known -= aliases
    generic = GENERIC | (_LATENT if "qk_rope_head_dim" in known else {})
    fields = {name: value for name, value in generic.items() if name in known} | spec
    default = config_class()
    for name in {"layer_types", "layers_block_type", "mlp_layer_types"} & known - set(fields):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        each = 2 if name == "mlp_layer_types" else 1  # so that the two lists meet in every combination
        if kinds:
            fields[name] = [kinds[i // each % len(kinds)] for i in range(LAYERS)]
    layers = next((changes[name] for name in _DEPTHS if name in changes), LAYERS)
    if layers != LAYERS:
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == LAYERS:
                fields[name] = [value[i % LAYERS] for i in range(layers)]
    named = config_class.attribute_map
    changed = {named.get(name, name) for name in changes}
    kept = {name: value for name, value in fields.items() if named.get(name, name) not in changed}
    return copy.deepcopy(kept) | changes  # configs write into what they are given


@contextmanager
def _nan_where_unset() -> Iterator[None]:
    """Memory that is handed out without a value reads NaN, so that it can be told from a weight."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextmanager
def quiet() -> Iterator[None]:
    """No remarks of transformers about unusual sizes and random weights."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""Every causal-LM type that transformers registers: verified, hybrid, refused by reason, or not buildable.

The whole zoo is loaded and checked here (a minute); for a representative few of each feature, what
an intervention does is compared with plain PyTorch hooks that share nothing with the library.
"""

import importlib.util
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import resid_surgery as rs
from resid_surgery.evidence.families import STATUSES, families_markdown, features_of, try_family
from resid_surgery.models.calls import misfit
from resid_surgery.models.ends import solve, weighted_sum
from resid_surgery.models.zoo import causal_types, loud, tiny
from resid_surgery.stream.kinds import neuron_site

VERIFIED = """
afmoe apertus arcee aria_text beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cohere_compass_text
ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 dots3_note dots3_note_text emu3 ernie4_5
ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text
gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2
gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared
helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama
mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral moshi moss_transcribe_diarize
mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe
qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
""".split()  # noqa: SIM905
HYBRIDS = """
bailing_hybrid bamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 nemotron_h olmo_hybrid qwen3_5
qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma
""".split()  # noqa: SIM905
MIXTURES = """
afmoe aria_text bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note
dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 jamba kimi_linear kolibri1 laguna
lfm2_moe mellum mimo_v2_flash minimax_m2 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
qwen3_5_moe_text qwen3_moe qwen3_next solar_open
""".split()  # noqa: SIM905
NOT_BUILDABLE = {
    "no forward pass of its own": ["gemma4_assistant", "gemma4_unified_assistant"],
    "the decoder's own": ["musicgen", "musicgen_melody"],
}
REFUSED = {
    "post-LayerNorm": ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git",
                       "openai-gpt", "rembert", "roberta", "roc_bert", "roformer", "xlm-roberta", "xmod"],
    "decoder of an encoder-decoder": ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart",
                                      "mvp", "pegasus", "plbart", "trocr", "whisper"],
    "recurrent or state-space": ["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"],
    "hyper-connections": ["deepseek_v4", "gemma3n", "gemma3n_text", "hy_v4"],
    "tokens of its own, merges some": ["blt", "cpmant", "prophetnet", "reformer", "xlnet"],
    "not linear after one norm": ["megatron-bert", "modernbert-decoder", "qwen4_exp", "qwen4_exp_text",
                                  "roberta-prelayernorm", "xlm-roberta-xl"],
    "happens between blocks": ["xlm"],
    "runs more than once": ["hrm_text"],
    "runs as a chain": ["mllama"],
    "2 attention modules": ["longcat_flash"],
    "is no known MLP": ["axk1", "dbrx", "falcon_h1", "jetmoe", "llama4", "llama4_text", "minimax_m3_vl_text"],
    "make no known MLP": ["zamba", "zamba2"],
    "attention and MLP, one each, are known": ["axk2", "inkling_text"],
    "no weighted sum": ["gpt_neox_japanese", "minimax"],
    "is no norm": ["zaya"],
    "no norm reads the stream": ["inkling2_text"],
}  # fmt: skip
README = Path(__file__).parent.parent / "README.md"
# One for each way in which naive code goes wrong; float64, bfloat16, float16 and sdpa are tried on these.
FEW = ("afmoe", "beam", "bitnet", "bloom", "cohere", "deepseek_v3", "diffllama", "doge", "exaone4", "falcon", "gemma3",
       "gemma4", "gpt_oss", "granitemoeshared", "gptj", "minicpm3", "mixtral", "nemotron_h", "olmo2", "phi3",
       "qwen2_moe", "qwen3_next", "stablelm")  # fmt: skip


@cache
def tried(model_type: str, dtype: torch.dtype = torch.float32, attention: str = "eager"):
    return try_family(model_type, dtype, attn_implementation=attention)


@pytest.mark.parametrize("model_type", causal_types())
def test_no_type_is_wrong_and_none_crashes(model_type):
    found = tried(model_type)
    assert found.status in STATUSES
    assert found.status != "wrong", found.reason
    if found.status in ("verified", "hybrid"):
        assert found.lines >= 30
        assert 0 < found.worst <= 1
        assert not found.reason
    else:
        assert len(found.reason) > 20
        assert "Traceback" not in found.reason


@pytest.mark.newest
def test_at_least_a_hundred_types_are_verified_at_every_grain():
    found = {status: {t for t in causal_types() if tried(t).status == status} for status in STATUSES}
    assert found["verified"] == set(VERIFIED)
    assert found["hybrid"] == set(HYBRIDS)
    assert len(VERIFIED) >= 100
    assert len(VERIFIED) + len(HYBRIDS) >= 115


@pytest.mark.parametrize(
    ("reason", "model_type"),
    [(r, t) for group in (REFUSED, NOT_BUILDABLE) for r, types in group.items() for t in types],
)
def test_a_refusal_gives_the_true_reason(reason, model_type):
    found = tried(model_type)
    assert found.status in ("refused", "not buildable")
    assert reason in found.reason


@pytest.mark.newest
def test_every_registered_type_is_told_apart():
    refused = {t for group in (REFUSED, NOT_BUILDABLE) for types in group.values() for t in types}
    assert sorted([*VERIFIED, *HYBRIDS, *refused]) == list(causal_types())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", FEW)
def test_every_dtype_closes_within_what_it_allows(model_type, dtype):
    found = tried(model_type, dtype)
    assert found.status in ("verified", "hybrid"), found.reason


@pytest.mark.parametrize("model_type", FEW)
def test_the_attention_implementation_makes_no_difference(model_type):
    found = tried(model_type, torch.float32, "sdpa")
    if model_type in ("bloom", "gpt_oss", "gptj"):  # transformers has eager attention only for these
        assert found.status == "not buildable"
    else:
        assert found.status in ("verified", "hybrid"), found.reason


# What interventions do, against plain hooks.

IDS = [5, 9, 20, 31, 7, 44]
EVERY = sorted([*VERIFIED, *HYBRIDS])


@cache
def opened(model_type: str):
    model = rs.load(tiny(model_type))
    return model, rs.record(model, rs.Prompt(ids=IDS, target=3))


def hooked(module: nn.Module, hooks) -> torch.Tensor:
    """Logits at the last position with plain hooks on; all removed afterwards."""
    handles = []
    try:
        for place, pre, hook in hooks:
            handles.append(place.register_forward_pre_hook(hook) if pre else place.register_forward_hook(hook))
        with torch.no_grad():
            return module(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()


def block_of(model, layer: int) -> nn.Module:
    return model.module.get_submodule(f"{model.anatomy.layout.blocks}.{layer}")


def changed(rec, interventions) -> torch.Tensor:
    return rs.intervene(rec, interventions).after.logits.float()


def same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("model_type", EVERY)
def test_zeroing_a_head_equals_a_plain_hook_and_leaves_the_model_as_it_was(model_type):
    model, rec = opened(model_type)
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    layer = max(i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "attention")
    row, size = model.block(layer), model.anatomy.sizes[layer]
    w_o = block_of(model, layer).get_submodule(row.attn_out)

    def hook(module, args):
        z = args[0].clone()
        z.view(1, -1, z.shape[-1])[0, -1, size.d_head : 2 * size.d_head] = 0
        return (z, *args[1:])

    plain = hooked(model.module, [(w_o, True, hook)])
    assert not torch.allclose(plain, hooked(model.module, []), atol=1e-5)
    same_logits(changed(rec, [rs.Zero(f"L{layer}.H1")]), plain)
    after = model.module.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("model_type", EVERY)
def test_zeroing_a_head_source_pair_equals_attention_with_that_value_left_out(model_type):
    """The pair's part of z is what z loses when the value at its source is zero for that head."""
    model, rec = opened(model_type)
    layer = max(i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "attention")
    row, size, one = model.block(layer), model.anatomy.sizes[layer], rec.layers[layer].attention
    part = one.alpha[1, 2] * one.value[1 // (size.n_heads // size.n_kv_heads), 2].float()
    if one.gate is not None:
        part = part * one.gate[1]
    w_o = block_of(model, layer).get_submodule(row.attn_out)

    def hook(module, args):
        z = args[0].clone()
        z.view(1, -1, z.shape[-1])[0, -1, size.d_head : 2 * size.d_head] -= part
        return (z, *args[1:])

    same_logits(changed(rec, [rs.Zero(f"L{layer}.H1<2")]), hooked(model.module, [(w_o, True, hook)]))


def dense(model_type: str) -> list[int]:
    """Layers whose MLP is no mixture."""
    return [i for i, one in enumerate(opened(model_type)[1].layers) if one.groups and one.groups[0].expert is None]


ONLY_EXPERTS = {"aria_text", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
                "granitemoeshared", "hunyuan_v1_moe", "kolibri1", "minimax_m2", "mixtral", "olmoe",
                "phimoe", "qwen3_5_moe", "qwen3_5_moe_text", "solar_open"}  # fmt: skip


@pytest.mark.parametrize("model_type", [t for t in EVERY if t not in ONLY_EXPERTS])
def test_zeroing_a_neuron_equals_a_plain_hook(model_type):
    model, rec = opened(model_type)
    layer = dense(model_type)[0]
    index = int(rec.layers[layer].groups[0].coefficient.abs().argmax())
    down = block_of(model, layer).get_submodule(model.block(layer).mlp_out)

    def hook(module, args):
        coefficient = args[0].clone()
        coefficient.view(1, -1, coefficient.shape[-1])[0, -1, index] = 0
        return (coefficient, *args[1:])

    plain = hooked(model.module, [(down, True, hook)])
    assert not torch.allclose(plain, hooked(model.module, []), atol=1e-5)
    same_logits(changed(rec, [rs.Zero(f"L{layer}.N{index}")]), plain)


def expert_hook(model, layer: int, expert: int, index: int):
    """A hook that takes the last token's output from experts whose one value vector is zero."""
    experts = block_of(model, layer).get_submodule(model.block(layer).experts)
    transposed = bool(vars(experts).get("is_transposed", False))

    def hook(module, args, output):
        weight, kept = module.down_proj, module.down_proj.detach().clone()
        with torch.no_grad():
            (weight[expert, index] if transposed else weight[expert, :, index]).zero_()
            without = type(module).forward(module, *args)
            weight.copy_(kept)
        left = output.clone()
        left.view(1, -1, left.shape[-1])[0, -1] = without.view(1, -1, left.shape[-1])[0, -1]
        return left

    return experts, False, hook


@pytest.mark.parametrize("model_type", MIXTURES)
def test_zeroing_an_experts_neuron_equals_experts_without_its_value_vector(model_type):
    model, rec = opened(model_type)
    layer = next(i for i, one in enumerate(rec.layers) if any(isinstance(g.expert, int) for g in one.groups))
    group = next(g for g in rec.layers[layer].groups if isinstance(g.expert, int))
    index = int(group.coefficient.abs().argmax())
    plain = hooked(model.module, [expert_hook(model, layer, group.expert, index)])
    assert not torch.allclose(plain, hooked(model.module, []), atol=1e-5)
    site = rs.ExpertNeuron(layer, group.expert, index)
    same_logits(changed(rec, [rs.Zero(site)]), plain)
    # in a batch of rows each row is what it is alone
    other = rs.ExpertNeuron(layer, group.expert, (index + 1) % len(group.coefficient))
    rows = rs.intervene_each(rec, [[rs.Zero(other)], [rs.Zero(site)], [rs.Scale(site, 3.0)]])
    same_logits(rows[1].after.logits.float(), plain)
    same_logits(rows[2].after.logits.float(), changed(rec, [rs.Scale(site, 3.0)]))
    assert not torch.allclose(rows[2].after.logits, rows[0].after.logits, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "granitemoeshared"])
def test_zeroing_a_shared_experts_neuron_equals_a_plain_hook(model_type):
    model, rec = opened(model_type)
    layer = next(i for i, one in enumerate(rec.layers) if one.group("shared") is not None)
    index = int(rec.layers[layer].group("shared").coefficient.abs().argmax())
    down = block_of(model, layer).get_submodule(model.block(layer).shared_out)

    def hook(module, args):
        coefficient = args[0].clone()
        coefficient.view(1, -1, coefficient.shape[-1])[0, -1, index] = 0
        return (coefficient,)

    effect = rs.intervene(rec, [rs.Zero(f"L{layer}.shared.N{index}")])
    same_logits(effect.after.logits.float(), hooked(model.module, [(down, True, hook)]))
    assert effect.table["closure"].max() <= 1e-4 * float(rec.bs_values.abs().max())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen2_moe", "nemotron_h"])
def test_patching_and_scaling_an_experts_neuron_is_linear_in_its_coefficient(model_type):
    _, rec = opened(model_type)
    layer = max(i for i, one in enumerate(rec.layers) if any(isinstance(g.expert, int) for g in one.groups))
    group = next(g for g in rec.layers[layer].groups if isinstance(g.expert, int))
    site = rs.ExpertNeuron(layer, group.expert, int(group.coefficient.abs().argmax()))
    half, twice, itself = rs.intervene_each(
        rec, [[rs.Scale(site, 0.5)], [rs.Scale(site, 1.5)], [rs.Patch(site, donor=rec)]]
    )
    moved = half.after.mlp[layer] + twice.after.mlp[layer]
    torch.testing.assert_close(moved, 2 * half.before.mlp[layer], atol=1e-5 * float(moved.abs().max()), rtol=0)
    same_logits(itself.after.logits.float(), rec.logits.float())


def test_a_mixture_locates_its_experts_neurons_and_scores_them_as_exhaustively():
    _, rec = opened("qwen2_moe")
    found = rs.locate(rec, k=8)
    every = rs.scores(rec).sort_values("log_prob_increase", ascending=False, kind="stable")
    assert [str(s) for s in found.sites] == every["site"].tolist()[:8]
    assert {type(parse) for parse in map(rs.parse_site, every["site"])} == {rs.Neuron, rs.ExpertNeuron, rs.SharedNeuron}
    assert len(every) == sum(len(g.coefficient) for one in rec.layers for g in one.groups)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen2_moe"])
def test_sources_of_an_experts_neuron_with_the_router_fixed_or_recomputed(model_type):
    model, rec = opened(model_type)
    layer = max(i for i, one in enumerate(rec.layers) if any(isinstance(g.expert, int) for g in one.groups))
    group = next(g for g in rec.layers[layer].groups if isinstance(g.expert, int))
    site = rs.ExpertNeuron(layer, group.expert, 1)
    fixed, moved = (rs.sources(rec, site, top=99, router=router) for router in ("fixed", "recomputed"))
    assert fixed["closure"].max() <= 1e-4 * fixed["share"].abs().max()
    assert (fixed["router"] == "fixed").all()
    assert (moved["router"] == "recomputed").all()
    writers = fixed["kind"] != "constant"
    assert fixed.loc[writers, "weight_without"].tolist() == [pytest.approx(group.factor)] * int(writers.sum())
    assert (moved.loc[writers, "weight_without"] - group.factor).abs().max() > 1e-3
    # the recomputed weight is what the model's own router says when a writer is left out mid-forward
    unit = block_of(model, layer).get_submodule(model.block(layer).mlp)
    experts = block_of(model, layer).get_submodule(model.block(layer).experts)
    row = moved[moved["writer"] == "L0.attn"].iloc[0]
    norm = model.norm(layer, "mlp_norm")
    state = rec.resid_mid(layer)
    gone = norm.linear(rec.work(rec.layers[0].attn_out), norm.scale(state))
    caught = {}

    def cut(module, args):
        read = args[0].clone()
        read.view(1, -1, read.shape[-1])[0, -1] -= gone
        return (read, *args[1:])

    def catch(module, args):
        caught["index"], caught["weight"] = args[1].view(6, -1)[-1], args[2].view(6, -1)[-1]

    hooked(model.module, [(unit, True, cut), (experts, True, catch)])
    clean = {}
    hooked(model.module, [(experts, True, lambda m, a: clean.update(w=a[2].view(6, -1)[-1], i=a[1].view(6, -1)[-1]))])
    scale = group.factor / float(clean["w"][clean["i"] == group.expert].sum())
    expected = float(caught["weight"][caught["index"] == group.expert].sum()) * scale
    assert row["weight_without"] == pytest.approx(expected, abs=1e-5)


def test_a_mixtures_biases_are_rows_of_their_own():
    _, rec = opened("gpt_oss")
    table = rs.decompose(rec, grain="neuron")
    routed = [g.expert for g in rec.layers[2].groups]
    assert {f"L2.E{e}.bias" for e in routed} <= set(table["site"])
    bias = rs.spectrum(rec, f"L2.E{routed[0]}.bias", top=3)
    assert bias["bs_value"].abs().max() > 0


@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_a_hybrids_other_layers_are_one_addend_each(model_type):
    model, rec = opened(model_type)
    layer = next(i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "opaque")
    table = rs.decompose(rec, grain="subvalue")
    assert f"L{layer}.attn" in set(table["site"])
    assert table["closure"].iloc[0] <= 1e-5 * float(table["bs_target"].abs().max())
    with pytest.raises(rs.SiteError, match=f"Use L{layer}.attn"):
        rs.intervene(rec, [rs.Zero(f"L{layer}.H0")])
    with pytest.raises(rs.SiteError, match="one addend"):
        rs.locate(rec, k=1, kind="head", layers=[layer])
    assert rs.locate(rec, k=2, kind="head_source").candidates > 0


def test_a_multiplied_stream_carries_every_addend_to_the_end():
    """An addend's bs-value counts what later blocks multiply it by; its effect says the same."""
    for model_type in ("beam", "doge", "gemma4"):
        model, rec = opened(model_type)
        assert model.anatomy.carries
        table = rs.decompose(rec)
        assert table["closure"].iloc[0] <= 1e-4
        effect = rs.intervene(rec, [rs.Zero("L0.mlp")])
        direct = effect.table.iloc[0]["direct"]
        assert direct == pytest.approx(-float(table.set_index("site").loc["L0.mlp", "bs_target"]), rel=1e-4)


def test_a_layout_given_by_the_user_passes_the_same_proof_or_is_refused():
    module = tiny("llama")
    block = rs.BlockLayout(
        attn="self_attn", attn_out="self_attn.o_proj", attn_norm="input_layernorm",
        mlp="mlp", mlp_out="mlp.down_proj", mlp_norm="post_attention_layernorm",
        keys=("mlp.gate_proj", "mlp.up_proj"), activation="mlp.act_fn",
    )  # fmt: skip
    given = rs.Layout(blocks="model.layers", final_norm="model.norm", unembed="lm_head", block=block, family="mine")
    model = rs.load(module, anatomy=given)
    assert model.anatomy.matched == "as given"
    assert model.anatomy.layout.family == "mine"
    assert rs.load(module).anatomy.layout.of_layer(0) == model.anatomy.layout.of_layer(0)
    with pytest.raises(rs.UnsupportedModelError, match="names; it is refused"):
        rs.load(module, anatomy=rs.Layout(blocks="model.blocks", final_norm="norm", unembed="lm_head", block=block))
    with pytest.raises(rs.ArgumentError, match="anatomy"):
        rs.load(module, anatomy="llama")
    with pytest.raises(rs.UnsupportedModelError, match="describes 3 layers"):
        rs.load(module, anatomy=rs.Layout(blocks="model.layers", final_norm="model.norm", unembed="lm_head",
                                          block=[block] * 3))  # fmt: skip


def test_weights_that_are_no_plain_numbers_are_refused_before_any_forward(monkeypatch):
    eight_bit = tiny("llama")
    weight = eight_bit.model.layers[1].mlp.up_proj.weight
    eight_bit.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    packed = tiny("llama")
    packed.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.zeros(3, 4, dtype=torch.int32))
    for module in (eight_bit, packed):
        monkeypatch.setattr(type(module), "forward", None)
        with pytest.raises(rs.UnsupportedModelError, match=r"not as plain floating-point numbers.*de-quantised"):
            rs.load(module)


def test_an_encoder_decoder_is_refused_as_one():
    config = T5Config(d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, vocab_size=31)
    with pytest.raises(rs.UnsupportedModelError, match="is an encoder-decoder"):
        rs.load(T5ForConditionalGeneration(config))


def test_a_third_writer_is_refused():
    with pytest.raises(rs.UnsupportedModelError, match="in layer 0"):
        rs.load(tiny("gemma4_text", hidden_size_per_layer_input=8))


def private():
    path = Path(__file__).parent.parent / "recipes" / "03_a_private_architecture.py"
    spec = importlib.util.spec_from_file_location("private_architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_private_architecture_is_read_by_a_row_of_the_users():
    recipe = private()
    module = recipe.Private(recipe.Config()).eval()
    loud(module)
    with pytest.raises(rs.UnsupportedModelError, match="anatomy=Layout"):
        rs.load(module)
    row, block = recipe.ROW, recipe.BLOCK
    model = rs.load(module, anatomy=row)
    table = rs.check(model)
    assert table["ok"].all()
    rec = rs.record(model, rs.Prompt(ids=[1, 2, 3, 4], target=5))
    assert rs.locate(rec, k=3, kind="head_source").candidates == 2 * 2 * 4
    with pytest.raises(rs.ClosureError, match=r"layer [01]"):  # the one that fails by most
        rs.load(module, anatomy=replace(row, block=replace(block, attn_scale=1.0)))
    with pytest.raises(rs.UnsupportedModelError, match="without torch_matmul_7"):
        rs.load(module, anatomy=replace(row, block=replace(block, mix="product:torch_matmul_7")))


@pytest.mark.newest
def test_the_readmes_table_is_the_commands_output():
    table, readme = pd.DataFrame([vars(tried(t)) for t in causal_types()]), README.read_text()
    assert families_markdown(table) in readme
    said = (
        f"Of the {len(table)} causal-LM types that transformers 5.23 registers, {len(VERIFIED)} are verified at every"
    )
    assert f"{said} grain and {len(HYBRIDS)} more are" in " ".join(readme.split())


def test_features_and_the_table():
    table = rs.check_families(["qwen3_next", "mamba", "gpt2", "musicgen"])
    assert table["status"].tolist() == ["hybrid", "refused", "verified", "not buildable"]
    assert "experts" in table["features"][0]
    assert "LayerNorm" in table["features"][2]
    text = families_markdown(table)
    assert text.splitlines()[0] == "1 verified, 1 hybrid, 1 refused, 1 not buildable of 4 types."
    assert "| mamba | refused | none of its layers has attention weights" in text
    assert "parallel" in features_of(rs.load(tiny("cohere")).anatomy)
    with pytest.raises(rs.ArgumentError, match="got 'lama'"):
        rs.check_families(["lama"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_multiplier_is_read_as_what_it_is_and_never_lost_in_rounding(seed, dtype):
    """In bfloat16 a small writer's multiplier could hide in the tolerance: the best fit decides."""
    layout = rs.load(tiny("granitemoe", dtype=dtype, seed=seed)).anatomy.layout
    block = layout.of_layer(0)
    assert layout.block is block
    assert (block.attn_scale, block.mlp_scale, block.attn_carry, block.mlp_carry) == (0.7, 0.7, 1.0, 1.0)
    assert layout.logit_scale == pytest.approx(1 / 1.3)


# What a mixture's bookkeeping must add up to, whatever is left in it.


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_next", "deepseek_v3", "granitemoeshared", "mixtral"])
def test_the_direct_effect_of_a_whole_expert_is_the_sum_of_its_neurons(model_type):
    """Also where nothing is left of an expert, and its gate can no longer be seen in what it writes."""
    model = rs.load(tiny(model_type, dtype=torch.float64))
    rec = rs.record(model, rs.Prompt(ids=IDS, target=3))
    layer = max(i for i, one in enumerate(rec.layers) if any(isinstance(g.expert, int) for g in one.groups))
    for groups in (
        [g for g in rec.layers[layer].groups if isinstance(g.expert, int)],
        [g for g in rec.layers[layer].groups if g.expert == "shared"],
    ):
        sites = [neuron_site(layer, g.expert, i) for g in groups for i in range(len(g.coefficient))]
        if not sites:
            continue
        together, *alone = rs.intervene_each(rec, [[rs.Zero(sites)], *([rs.Zero(site)] for site in sites)])
        total = sum(float(one.table["direct"].iloc[0]) for one in alone)
        assert float(together.table["direct"].iloc[0]) == pytest.approx(total, rel=1e-6, abs=1e-9)
        assert abs(total) > 1e-4
        ledger = rs.decompose(rec, grain="neuron").set_index("site")["bs_target"]
        assert total == pytest.approx(-float(ledger[[str(s) for s in sites]].sum()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "granitemoeshared", "mixtral", "gpt_oss"])
def test_operations_on_one_experts_neuron_combine(model_type):
    model = rs.load(tiny(model_type, dtype=torch.float64))
    rec = rs.record(model, rs.Prompt(ids=IDS, target=3))
    layer = max(i for i, one in enumerate(rec.layers) if any(isinstance(g.expert, int) for g in one.groups))
    group = next(g for g in rec.layers[layer].groups if isinstance(g.expert, int))
    site = rs.ExpertNeuron(layer, group.expert, int(group.coefficient.abs().argmax()))
    v = torch.linspace(-1, 1, model.anatomy.d_model, dtype=torch.float64)
    both, six, scaled, steered, joint = rs.intervene_each(
        rec,
        [[rs.Scale(site, 2), rs.Scale(site, 3)], [rs.Scale(site, 6)], [rs.Scale(site, 2)], [rs.Steer(site, v)],
         [rs.Scale(site, 2), rs.Steer(site, v)]],
    )  # fmt: skip
    torch.testing.assert_close(both.after.logits, six.after.logits, rtol=1e-6, atol=1e-9)
    parts = [float(one.table["direct"].iloc[0]) for one in (scaled, steered, joint)]
    if model.has(layer, "mlp_post_norm"):
        return
    assert parts[2] == pytest.approx(parts[0] + parts[1], rel=1e-6)


def test_an_expert_that_two_slots_route_to_is_one_expert():
    module = tiny("mixtral")

    def twice(module, args):
        hidden, index, weight = args
        return hidden, index[:, :1].expand(-1, 2).contiguous(), weight

    for block in module.model.layers:
        block.mlp.experts.register_forward_pre_hook(twice)
    rec = rs.record(rs.load(module), rs.Prompt(ids=IDS, target=3))
    assert all(len(one.groups) == 1 for one in rec.layers)
    site = rs.locate(rec, k=1).sites[0]
    row = rs.decompose(rec, grain="neuron").set_index("site").loc[str(site), "bs_target"]
    assert float(rs.intervene(rec, rs.Zero(site)).table["direct"].iloc[0]) == pytest.approx(-float(row), rel=1e-4)


def test_everywhere_means_wherever_an_expert_is_routed_to():
    _, rec = opened("mixtral")
    idle = next(e for e in range(4) if rec.layers[3].group(e) is None)
    rs.intervene(rec, rs.Zero(f"L3.E{idle}.N1", positions="all"))
    with pytest.raises(rs.SiteError, match="routed position 5 to experts"):
        rs.intervene(rec, rs.Zero(f"L3.E{idle}.N1"))


# Layers that write nothing.


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_pruned_layer_is_read_like_its_neighbours(model_type):
    model = rs.load(tiny(model_type))
    row = model.block(1)
    blocks = [block_of(model, layer) for layer in (1, 2)]
    with torch.no_grad():
        silenced = [blocks[0].get_submodule(row.attn_out)]
        silenced += [blocks[1].get_submodule(row.mlp_out or row.experts)]
        for tensor in (t for one in silenced for t in one.parameters()):
            tensor.zero_()
    pruned = rs.load(model.module)
    assert pruned.anatomy.layout.block == model.anatomy.layout.block
    assert rs.check(pruned)["ok"].all()


def test_a_model_whose_attention_writes_nothing_is_read_as_sequential():
    module = tiny("llama")
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.self_attn.o_proj.bias.zero_()
    model = rs.load(module)
    assert model.anatomy.layout == rs.load(tiny("llama")).anatomy.layout
    assert rs.check(model)["ok"].all()


def test_zeroing_a_middle_state_leaves_exactly_nothing():
    _, rec = opened("llama")
    effect = rs.intervene(rec, rs.Zero("L0.resid_mid", positions="all"))
    pre = rs.intervene(rec, rs.Zero(["L0.resid_pre", "L0.attn"], positions="all"))
    torch.testing.assert_close(effect.after.logits, pre.after.logits, atol=1e-6, rtol=1e-6)


# Layouts that a user gets wrong: always one clear error.

GOOD = dict(attn="self_attn", attn_out="self_attn.o_proj", attn_norm="input_layernorm", mlp="mlp",
            mlp_out="mlp.down_proj", mlp_norm="post_attention_layernorm", keys=("mlp.gate_proj", "mlp.up_proj"),
            activation="mlp.act_fn")  # fmt: skip
TOP = dict(blocks="model.layers", final_norm="model.norm", unembed="lm_head")
WRONG_BLOCK = [
    dict(keys=(1, 2)),
    dict(keys=None),
    dict(keys=("mlp.gate_proj",) * 3),
    dict(keys=("mlp.gate_proj[0]", "mlp.up_proj[1]")),
    dict(keys=("self_attn.q_proj", "mlp.up_proj")),
    dict(keys=()),
    dict(activation="mlp.nope"),
    dict(activation=":nope"),
    dict(activation=3),
    dict(activation=":linear"),
    dict(activation="self_attn.layer_idx"),
    dict(activation=None),
    dict(attn_scale=None),
    dict(attn_scale="nope"),
    dict(mlp_scale="mlp.nope.weight"),
    dict(mlp_carry=""),
    dict(attn_carry="training"),
    dict(attn_carry="mlp"),
    dict(mlp_scale="mlp.up_proj.weight"),
    dict(mlp_scale=float("nan")),
    dict(mix=5),
    dict(mix="magic"),
    dict(mix="weights:nope"),
    dict(coef_norm="input_layernorm"),
    dict(attn_norm=""),
    dict(attn_norm=["x"]),
    dict(attn_norm="post_attention_layernorm"),
    dict(attn_norm=None),
    dict(parallel="yes"),
    dict(attn_kind="magic"),
    dict(attn_kind="opaque", attn=None),
    dict(mlp_kind="experts"),
    dict(mlp_post_norm="mlp"),
    dict(attn="self_attn.nope"),
    dict(attn_out="mlp.up_proj"),
    dict(mlp_with="self_attn"),
    dict(gated=3),
]
WRONG_TOP = [
    dict(blocks=""),
    dict(blocks="model"),
    dict(blocks="lm_head"),
    dict(blocks="model.layers.0"),
    dict(blocks=None),
    dict(final_norm=""),
    dict(final_norm="model"),
    dict(final_norm="model.layers.0"),
    dict(unembed="model.norm"),
    dict(head_scale="x"),
    dict(logit_scale=[1.0]),
    dict(logit_scale=None),
    dict(logit_cap="x"),
    dict(block=None),
    dict(block=[]),
    dict(logit_scale=2.0),
    dict(head_scale=0.5),
    dict(logit_cap=3.0),
]


@pytest.mark.parametrize("wrong", [*WRONG_BLOCK, *WRONG_TOP], ids=str)
def test_a_wrong_layout_is_one_clear_error_and_changes_nothing(wrong):
    module = tiny("llama")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    top = TOP | {k: v for k, v in wrong.items() if wrong in WRONG_TOP}
    block = GOOD | {k: v for k, v in wrong.items() if wrong not in WRONG_TOP}
    with pytest.raises((rs.UnsupportedModelError, rs.ArgumentError)) as caught:
        rs.load(module, anatomy=rs.Layout(**({"block": rs.BlockLayout(**block)} | top)))
    assert len(str(caught.value)) > 30
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.items())


def test_a_model_that_cannot_be_copied_says_why():
    class Counter:
        def __init__(self):
            self.lock = threading.Lock()

        def count(self, *args):
            return None

    module = tiny("llama")
    module.register_forward_hook(Counter().count)
    with pytest.raises(rs.UnsupportedModelError, match="cannot be copied"):
        rs.load(module)


def test_fits_are_right_for_columns_of_zeros_and_for_columns_alike():
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(2, 6, 24, generator=generator)
    for terms in ([x, 0 * x, m], [0 * x, x, m], [x, m, 0 * x]):
        factors = solve(x + m, terms)
        assert misfit(weighted_sum(factors, terms), (x + m).double()) <= 1e-6
        assert [f for f, t in zip(factors, terms, strict=True) if t.any()] == [pytest.approx(1)] * 2
    assert misfit(weighted_sum(solve(2 * x, [x, x]), [x, x]), 2 * x.double()) <= 1e-6


@pytest.mark.parametrize("model_type", ["beam", "doge", "gemma4"])
def test_located_bs_values_are_read_off_the_final_stream(model_type):
    _, rec = opened(model_type)
    for kind, grain in (("neuron", "neuron"), ("head_source", "head_source"), ("layer", "layer")):
        found = rs.locate(rec, k=5, kind=kind).table
        ledger = rs.decompose(rec, grain=grain).set_index("site")["bs_target"]
        assert found["bs_target"].tolist() == [pytest.approx(ledger[s], rel=1e-4, abs=1e-6) for s in found["site"]]


@pytest.mark.parametrize("model_type", ["beam", "doge", "gemma4", "cohere", "granite"])
def test_patching_states_from_a_donor_at_every_position_gives_the_donors_stream(model_type):
    model, rec = opened(model_type)
    donor = rs.record(model, rs.Prompt(ids=[8, 2, 60, 11, 30, 19], target=3), positions="all")
    stages = ["pre", "mid", "post"] if model.anatomy.between(1) else ["pre", "post"]
    for stage in stages:
        sites = [f"L1.resid_{stage}"] if stage != "mid" else ["L1.resid_mid"]
        effect = rs.intervene(rec, rs.Patch(sites, donor=donor, positions="all"))
        same_logits(effect.after.logits.float(), donor.logits.float())

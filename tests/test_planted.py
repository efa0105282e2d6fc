"""Planted omissions: leave one feature of a family out, and loading must refuse the model.

This is why the tiny models are loud. Each case gives a layout, or the reading of a part, that drops
one thing which naive code forgets; if the proof did not notice, a real model with that feature
would be silently wrong.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import build, shared
from torch import nn

import resid_surgery as rs
from resid_surgery.models import anatomy
from resid_surgery.models.experts import Experts
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.zoo import tiny
from resid_surgery.stream import kinds, records
from resid_surgery.stream.vocabulary import Readout


def row(**changes) -> Callable:
    """Every block of the layout with some fields changed."""

    def plant(layout, monkeypatch):
        blocks = layout.block if isinstance(layout.block, tuple) else (layout.block,)
        return replace(layout, block=tuple(replace(one, **changes) for one in blocks) if len(blocks) > 1
                       else replace(blocks[0], **changes))  # fmt: skip

    return plant


def top(**changes) -> Callable:
    """The model's own fields changed."""
    return lambda layout, monkeypatch: replace(layout, **changes)


def swapped_keys(layout, monkeypatch):
    block = layout.of_layer(0)
    return replace(layout, block=replace(block, keys=block.keys[::-1]))


def forget_norm(**changes) -> Callable:
    def plant(layout, monkeypatch):
        plain = anatomy.measure_norm
        monkeypatch.setattr(anatomy, "measure_norm", lambda *a: replace(plain(*a), **changes))
        return layout

    return plant


def forget_bias(part: str) -> Callable:
    def plant(layout, monkeypatch):
        plain = OpenedModel.rows

        def rows(self, layer, name):
            found = plain(self, layer, name)
            return replace(found, bias=None) if name == part else found

        monkeypatch.setattr(OpenedModel, "rows", rows)
        return layout

    return plant


def forget_in_attention(**changes) -> Callable:
    def plant(layout, monkeypatch):
        plain = records.attention_row
        monkeypatch.setattr(records, "attention_row", lambda call, r, t: plain(replace(call, **changes), r, t))
        return layout

    return plant


def forget_gates(layout, monkeypatch):
    plain = anatomy.Anatomy.with_heads
    monkeypatch.setattr(anatomy.Anatomy, "with_heads", lambda self, heads, gated: plain(self, heads, set()))
    return layout


def wrong_groups(layout, monkeypatch):
    def tiled(kv, n_heads):
        return kv.repeat(n_heads // kv.shape[0], *[1] * (kv.ndim - 1))

    monkeypatch.setattr(kinds, "repeat_kv", tiled)
    return layout


def no_constants(layout, monkeypatch):
    monkeypatch.setattr(Readout, "named_constants", lambda self: {})
    return layout


def forget_weights(layout, monkeypatch):
    plain = records.neuron_groups

    def groups(*args):
        yield from (replace(g, factor=1.0) if isinstance(g.expert, int) else g for g in plain(*args))

    monkeypatch.setattr(records, "neuron_groups", groups)
    return layout


def forget_expert_biases(layout, monkeypatch):
    monkeypatch.setattr(Experts, "_bias", lambda self, name, expert: None)
    return layout


def interleaving(layout, monkeypatch):
    plain = Experts.keys
    monkeypatch.setattr(Experts, "keys", lambda self, e: plain(replace(self, halves=not self.halves), e))
    return layout


SPINE = {
    "final soft-cap": ("gemma2", top(logit_cap=None), "soft-cap"),
    "norm after attention": ("gemma2", row(attn_post_norm=None), "resid_post"),
    "norm after the MLP": ("gemma2", row(mlp_post_norm=None), "resid_post"),
    "gain of 1 + w": ("gemma2", forget_norm(offset=0.0), "what the MLP reads"),
    "attention soft-cap": ("gemma2", forget_in_attention(softcap=None), "alpha v"),
    "sliding window": ("gemma2", forget_in_attention(mask=None), "alpha v"),
    "score scaling": ("gemma2", forget_in_attention(scaling=1.0), "alpha v"),
    "grouped heads": ("llama", wrong_groups, "alpha v"),
    "W_O bias": ("llama", forget_bias("attn_out"), "heads through W_O"),
    "down-projection bias": ("gpt2", forget_bias("mlp_out"), "down-projection"),
    "key bias": ("opt", forget_bias("key0"), "pre-activations"),
    "gate and up swapped": ("llama", swapped_keys, "does not describe"),
    "centring of LayerNorm": ("gpt2", forget_norm(centred=False), "what the MLP reads"),
    "final-norm bias": ("gpt2", no_constants, "bs-values"),
    "parallel block": ("gpt_neox", row(parallel=False), "what the MLP reads"),
    "sequential block": ("opt", row(parallel=True), "what the MLP reads"),
    "norms swapped": (
        "gpt_neox",
        row(mlp_norm="input_layernorm", attn_norm="post_attention_layernorm"),
        "what the MLP reads",
    ),
    "wrong down-projection": ("opt", row(mlp_out="self_attn.out_proj", mlp="self_attn"), "no key of theirs"),
}
ZOO = {
    "residual multiplier": ("granite", row(attn_scale=1.0, mlp_scale=1.0), "resid_post"),
    "logit multiplier": ("cohere", top(logit_scale=1.0), "bs-values|soft-cap"),
    "scale before the unembedding": ("minicpm3", top(head_scale=1.0), "bs-values"),
    "a multiplied stream": ("beam", row(attn_carry=1.0, mlp_carry=1.0), "resid_post"),
    "a stream multiplied by a vector": ("doge", row(attn_carry=1.0), "resid_post"),
    "a buffer that multiplies the stream": ("gemma4", row(mlp_carry=1.0, mlp_scale=1.0), "resid_post"),
    "attention sinks": ("gpt_oss", forget_in_attention(sinks=None), "alpha v"),
    "attention sinks as a factor": ("granite_swa", forget_in_attention(sinks=None), "alpha v"),
    "a gate on attention": ("afmoe", forget_gates, "alpha v"),
    "a gate a head": ("laguna", forget_gates, "alpha v"),
    "a norm before W_O": ("bitnet", forget_gates, "alpha v"),
    "a norm before the down-projection": ("bitnet", row(coef_norm=None), "activation of"),
    "no norm before the MLP": ("olmo2", row(mlp_norm="post_attention_layernorm"), "what the MLP reads"),
    "halves of a fused key": (
        "phi3",
        row(keys=("mlp.gate_up_proj[1]", "mlp.gate_up_proj[0]")),
        "activation of",
    ),
    "router weights": ("mixtral", forget_weights, "down-projection"),
    "expert biases": ("gpt_oss", forget_expert_biases, "down-projection"),
    "interleaved gate and up": ("gpt_oss", interleaving, "down-projection|pre-activations"),
    "the shared expert": ("qwen2_moe", row(shared_keys=(), shared_out=None), "down-projection"),
    "an MLP beside the experts": ("granitemoeshared", row(mlp_with=None), "does not describe"),
    "sparse attention's mask": ("deepseek_v32", forget_in_attention(mask=None), "alpha v"),
    "the second of a pair of heads": ("diffllama", row(mix="interface"), "no elementwise gate"),
    "ALiBi": ("bloom", row(mix="weights:torch_bmm_0"), "does not describe"),
}


@pytest.mark.parametrize("name", SPINE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_omission_is_refused_by_name(name, dtype, monkeypatch):
    family, plant, identity = SPINE[name]
    refuse(build(family, dtype), plant, identity, monkeypatch)


@pytest.mark.parametrize("name", ZOO)
def test_a_planted_omission_of_a_rarer_feature_is_refused_by_name(name, monkeypatch):
    family, plant, identity = ZOO[name]
    refuse(tiny(family), plant, identity, monkeypatch)


def refuse(model, plant, identity, monkeypatch):
    sound = rs.load(model)  # as it is
    wrong = plant(sound.anatomy.layout, monkeypatch)
    with pytest.raises(rs.UnsupportedModelError, match=identity) as caught:
        rs.load(model, anatomy=wrong)
    if isinstance(caught.value, rs.ClosureError):
        assert "relative error" in str(caught.value)
        assert "Look at" in str(caught.value)


def test_what_mixes_coordinates_between_attention_and_w_o_is_refused(monkeypatch):
    """A ratio always exists; that it is a gate is proven by perturbing what comes out of attention."""

    class Turning(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            generator = torch.Generator().manual_seed(0)
            self.turn = nn.Parameter(torch.linalg.qr(torch.randn(32, 32, generator=generator))[0])

        def forward(self, x):
            return self.inner(x @ self.turn)

    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.o_proj = Turning(block.self_attn.o_proj)
    with pytest.raises(rs.UnsupportedModelError, match="no elementwise gate"):
        rs.load(model)


def test_an_unembedding_bias_is_a_row_and_forgetting_it_is_refused(monkeypatch):
    model = build("gpt2")
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97, dtype=torch.float64))
    rec = rs.record(rs.load(model), rs.Prompt(ids=[1, 2, 3], target=4))
    table = rs.decompose(rec).set_index("site")
    assert table.loc["unembed.bias", "bs_target"] == pytest.approx(model.lm_head.bias[4].item())
    assert table.loc["final_norm.bias", "bs_target"] != 0
    assert table["closure"].iloc[0] <= 1e-10
    monkeypatch.setattr(OpenedModel, "unembedding_bias", None)
    with pytest.raises(rs.ClosureError, match="bs-values"):
        rs.load(model)


def test_every_family_has_its_constants_where_they_belong():
    for family, expected in (("llama", set()), ("gpt2", {"final_norm.bias"}), ("gemma2", set())):
        rec = rs.record(shared(family), rs.Prompt(ids=[1, 2, 3], target=4))
        constants = rs.decompose(rec).query("kind == 'constant'")["site"]
        assert set(constants) == expected
        fine = rs.decompose(rec, grain="subvalue").query("kind == 'bias'")
        assert len(fine) == (0 if family == "gemma2" else 6)

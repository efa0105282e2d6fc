"""Planted omissions: leave one feature of a family out, and loading must refuse the model.

This is why the tiny models are loud. Each case drops one thing that naive code forgets; if the
proof did not notice, a real model with that feature would be silently wrong.
"""

from dataclasses import replace

import pytest
import torch
from tiny import build, shared
from torch import nn

import resid_surgery as rs
from resid_surgery.models import anatomy
from resid_surgery.models.opening import OpenedModel
from resid_surgery.stream import recording, subvalues
from resid_surgery.stream.vocabulary import Readout


def layout(monkeypatch, family, **changes):
    rows = tuple(replace(r, **changes) if r.family == family else r for r in anatomy.LAYOUTS)
    monkeypatch.setattr(anatomy, "LAYOUTS", rows)


def forget_norm(monkeypatch, **changes):
    plain = anatomy.measure_norm
    monkeypatch.setattr(anatomy, "measure_norm", lambda *a: replace(plain(*a), **changes))


def forget_bias(monkeypatch, part):
    plain = OpenedModel.rows

    def rows(self, layer, name):
        found = plain(self, layer, name)
        return replace(found, bias=None) if name == part else found

    monkeypatch.setattr(OpenedModel, "rows", rows)


def forget_in_attention(monkeypatch, **changes):
    plain = recording.attention_row
    monkeypatch.setattr(recording, "attention_row", lambda call, row, t: plain(replace(call, **changes), row, t))


def wrong_groups(monkeypatch):
    def tiled(kv, n_heads):
        return kv.repeat(n_heads // kv.shape[0], *[1] * (kv.ndim - 1))

    monkeypatch.setattr(subvalues, "repeat_kv", tiled)


def no_constants(monkeypatch):
    monkeypatch.setattr(Readout, "named_constants", lambda self: {})


CASES = {
    "final soft-cap": ("gemma2", lambda m: layout(m, "gemma2", logit_cap=None), "soft-cap"),
    "norm after attention": ("gemma2", lambda m: layout(m, "gemma2", attn_post_norm=None), "resid_mid"),
    "norm after the MLP": ("gemma2", lambda m: layout(m, "gemma2", mlp_post_norm=None), "resid_post"),
    "gain of 1 + w": ("gemma2", lambda m: forget_norm(m, offset=0.0), "post-norm"),
    "attention soft-cap": ("gemma2", lambda m: forget_in_attention(m, softcap=None), "alpha v"),
    "sliding window": ("gemma2", lambda m: forget_in_attention(m, mask=None), "alpha v"),
    "score scaling": ("gemma2", lambda m: forget_in_attention(m, scaling=1.0), "alpha v"),
    "grouped heads": ("llama", wrong_groups, "alpha v"),
    "W_O bias": ("llama", lambda m: forget_bias(m, "attn_out"), "heads through W_O"),
    "down-projection bias": ("gpt2", lambda m: forget_bias(m, "mlp_out"), "down-projection"),
    "key bias": ("opt", lambda m: forget_bias(m, "key0"), "pre-activations"),
    "gate and up swapped": (
        "llama",
        lambda m: layout(m, "llama", keys=("mlp.up_proj", "mlp.gate_proj")),
        "does not describe",
    ),
    "centring of LayerNorm": ("gpt2", lambda m: forget_norm(m, centred=False), "pre-activations"),
    "final-norm bias": ("gpt2", no_constants, "bs-values"),
    "parallel block": ("gpt_neox", lambda m: layout(m, "gpt_neox", parallel=False), "resid_mid"),
    "sequential block": ("opt", lambda m: layout(m, "opt", parallel=True), "resid_mid"),
    "norms swapped": (
        "gpt_neox",
        lambda m: layout(m, "gpt_neox", mlp_norm="input_layernorm", attn_norm="post_attention_layernorm"),
        "does not describe",
    ),
    "wrong down-projection": ("opt", lambda m: layout(m, "opt", mlp_out="self_attn.out_proj"), "does not describe"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_omission_is_refused_by_name(name, dtype, monkeypatch):
    family, plant, identity = CASES[name]
    model = build(family, dtype)
    rs.load(model)  # sound as it is
    plant(monkeypatch)
    with pytest.raises(rs.UnsupportedModelError) as caught:
        rs.load(model)
    assert identity in str(caught.value)
    if isinstance(caught.value, rs.ClosureError):
        assert "relative error" in str(caught.value)


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

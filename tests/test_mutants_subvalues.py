"""Subvalues written out again from what was recorded: every grain, every bias, every multiplier, every refusal."""

from functools import cache

import pytest
import torch
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.zoo import tiny
from resid_surgery.stream.kinds import attn_neuron_block, head_block, head_source_block, neuron_block, post_map
from resid_surgery.stream.subvalues import (
    GRAINS,
    KINDS,
    addends,
    bias_vectors,
    candidates,
    read_by,
    resolve_in,
    state_of,
    sublayer_blocks,
    sublayer_vector,
    vector_of,
)

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11, versus=[7], position=3)
MORE = ("mixtral", "gpt_oss", "granite", "qwen3_next", "beam", "deepseek_v3", "nemotron_h", "phi", "cohere")
FORWARD = {"layer": ["attn", "mlp"], "head": ["head", "mlp"], "head_source": ["head_source", "mlp"],
           "neuron": ["attn", "neuron"], "subvalue": ["head_source", "neuron"]}  # fmt: skip


@cache
def recorded(name, dtype=torch.float64):
    if name in FAMILIES:
        return rs.record(shared(name, dtype), PROMPT)
    return rs.record(rs.load(tiny(name)), PROMPT)


def near(a, b, rel=1e-9):
    assert a.shape == b.shape
    assert torch.allclose(a, b.to(a), rtol=rel, atol=rel * max(1.0, float(b.abs().max())))


def tolerance(rec):
    return 1e-9 if rec.model.work_dtype == torch.float64 else 1e-4


def total(blocks):
    return torch.cat([b.all_vectors() for b in blocks]).sum(0)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
@pytest.mark.parametrize("grain", GRAINS)
def test_addends_of_every_grain_add_up_to_what_is_read(name, grain):
    rec = recorded(name)
    tol = 1e-6 if name in FAMILIES else 2e-3
    near(total(addends(rec, grain)), rec.work(rec.resid_final), tol)
    for layer in range(rec.model.anatomy.n_layers):
        for part in ("attn", "mlp"):
            near(total(addends(rec, grain, before=(layer, part))), read_by(rec, layer, part), tol)
    near(total(addends(rec)), rec.work(rec.resid_final), tol)
    assert [b.kind for b in addends(rec)] == [b.kind for b in addends(rec, "layer")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grain", GRAINS)
def test_addends_come_in_forward_order_each_by_its_name(name, grain):
    rec = recorded(name)
    biases = name in ("llama", "gpt2", "opt", "gpt_neox")
    per_layer = []
    for part, kind in zip(("attn", "mlp"), FORWARD[grain], strict=True):
        per_layer.append(kind)
        if kind != part and biases:
            per_layer.append("bias")
    blocks = addends(rec, grain)
    assert [(b.kind, b.layer) for b in blocks] == [("embed", None)] + [(k, i) for i in range(3) for k in per_layer]
    assert blocks[0].site(0) == rs.Constant("embed")
    before = addends(rec, grain, before=(1, "mlp"))
    stops = per_layer if rec.model.block(1).parallel else per_layer + per_layer[: per_layer.index(FORWARD[grain][1])]
    assert [b.kind for b in before] == ["embed", *stops]
    assert len(addends(rec, grain, before=(0, "attn"))) == 1
    assert len(addends(rec, grain, before=(0, "mlp"))) == (1 if rec.model.block(0).parallel else 1 + len(
        per_layer[: per_layer.index(FORWARD[grain][1])]))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_close_with_the_rounding(dtype):
    rec = rs.record(rs.load(build("llama", dtype)), PROMPT)
    for grain in ("layer", "subvalue"):
        for before, wanted in ((None, rec.work(rec.resid_final)), ((1, "mlp"), read_by(rec, 1, "mlp")),
                               ((1, "attn"), read_by(rec, 1, "attn"))):  # fmt: skip
            *blocks, rest = addends(rec, grain, before=before)
            assert (rest.kind, rest.layer, rest.count, rest.site(0)) == ("rounding", None, 1, rs.Constant("rounding"))
            near(rest.all_vectors()[0], wanted - total(blocks), 1e-6)
            assert 0 < float(rest.all_vectors().norm()) < 0.1 * float(wanted.norm())
    assert all(b.kind != "rounding" for b in addends(recorded("llama", torch.float32)))


@pytest.mark.parametrize("name", [*FAMILIES, "granite", "mixtral", "nemotron_h", "beam"])
def test_sublayers_are_whole_or_in_parts_times_what_they_are_multiplied_by(name):
    rec = recorded(name)
    for layer, record in enumerate(rec.layers):
        assert sublayer_vector(record, "attn") is record.attn_out
        assert sublayer_vector(record, "mlp") is record.mlp_out
        row = rec.model.block(layer)
        for part, kind in (("attn", row.attn_kind), ("mlp", row.mlp_kind)):
            if kind == "none":
                assert all(sublayer_blocks(rec, layer, part, grain, 1.0) == [] for grain in GRAINS)
                continue
            (whole,) = sublayer_blocks(rec, layer, part, "layer", 1.0)
            assert (whole.kind, whole.layer, whole.count, whole.site(0)) == (part, layer, 1, rs.Sublayer(layer, part))
            vector = rec.work(sublayer_vector(record, part))
            near(whole.all_vectors(), vector[None])
            for grain in GRAINS:
                once = total(sublayer_blocks(rec, layer, part, grain, 1.0))
                near(once, vector, 100 * tolerance(rec))
                near(total(sublayer_blocks(rec, layer, part, grain, -2.5)), -2.5 * once, tolerance(rec))
                near(total(sublayer_blocks(rec, layer, part, grain, torch.tensor(3.0))), 3 * once, tolerance(rec))
                finer = {b.kind for b in sublayer_blocks(rec, layer, part, grain, 1.0)} - {"bias"}
                if kind == "opaque":
                    assert finer == {part}


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_are_the_modules_own_as_they_reach_the_stream(name):
    rec = recorded(name)
    for layer in range(3):
        for part in ("attn", "mlp"):
            found = bias_vectors(rec, layer, part)
            bias = rec.model.rows(layer, f"{part}_out").bias
            if name == "gemma2":
                assert found == {}
                continue
            assert list(found) == [rs.Bias(layer, part)]
            near(found[rs.Bias(layer, part)], bias.double())


def test_biases_of_routed_experts_are_rows_of_their_own_times_their_weight():
    rec = recorded("gpt_oss")
    for layer in range(rec.model.anatomy.n_layers):
        found, record = bias_vectors(rec, layer, "mlp"), rec.layers[layer]
        experts = rec.model.experts(layer)
        assert list(found) == [rs.Bias(layer, "mlp", group.expert) for group in record.groups]
        assert len(found) == 2
        for group in record.groups:
            bias = experts.out(int(group.expert)).bias
            near(found[rs.Bias(layer, "mlp", group.expert)], rec.work(bias) * group.factor, 1e-6)
            near(vector_of(rec, rs.Bias(layer, "mlp", group.expert)), rec.work(bias) * group.factor, 1e-6)
        away = next(e for e in range(4) if e not in [g.expert for g in record.groups])
        with pytest.raises(SiteError) as caught:
            vector_of(rec, rs.Bias(layer, "mlp", away))
        assert f"`{rs.Bias(layer, 'mlp', away)}` is not active: layer {layer} of " in str(caught.value)
    assert all(bias_vectors(recorded("mixtral"), i, "mlp") == {} for i in range(4))


def post_normed(biased):
    """A Gemma-2 whose norms after the sublayers are LayerNorms with biases, its W_O perhaps with one too."""
    model = build("gemma2", attention_bias=biased)
    for layer in model.model.layers:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = torch.nn.LayerNorm(24, dtype=torch.float64)
            with torch.no_grad():
                norm.weight.copy_(torch.linspace(0.5, 2, 24))
                norm.bias.copy_(torch.linspace(-1, 2, 24, dtype=torch.float64))
            setattr(layer, name, norm)
    return rs.record(rs.load(model), PROMPT)


@pytest.mark.parametrize("biased", [False, True])
def test_a_post_norms_bias_is_added_to_the_projections(biased):
    rec = post_normed(biased)
    own = torch.linspace(-1, 2, 24, dtype=torch.float64)
    for layer in range(3):
        for part in ("attn", "mlp"):
            bias = rec.model.rows(layer, f"{part}_out").bias
            assert (bias is not None) == (biased and part == "attn")
            pushed = 0.0 if bias is None else post_map(rec, layer, part).push(bias.double())
            found = bias_vectors(rec, layer, part)
            assert list(found) == [rs.Bias(layer, part)]
            near(found[rs.Bias(layer, part)], own + pushed, 1e-9)
            near(vector_of(rec, rs.Bias(layer, part)), own + pushed, 1e-9)
    for grain in GRAINS:
        near(total(addends(rec, grain)), rec.resid_final, 1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, "granite", "beam", "phi"])
def test_states_are_what_is_read_and_what_is_added_to(name):
    rec = recorded(name)
    tol = tolerance(rec)
    for layer, record in enumerate(rec.layers):
        pre, parallel = rec.work(record.resid_pre), rec.model.block(layer).parallel
        near(read_by(rec, layer, "attn"), pre, tol)
        near(read_by(rec, layer, "mlp"), rec.resid_mid(layer), tol)
        assert torch.equal(read_by(rec, layer, "mlp"), pre) == parallel
        for part in ("attn", "mlp"):
            carry = rec.model.factor(layer, "mlp_carry" if parallel else f"{part}_carry")
            near(state_of(rec, layer, part), read_by(rec, layer, part) * carry, tol)
    if name == "beam":
        assert float(rec.model.factor(0, "attn_carry")) != 1.0


@pytest.mark.parametrize("where", ["here", "final"])
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "granite", "deepseek_v3", "beam"])
def test_vectors_of_single_sites_are_those_of_their_blocks(name, where):
    rec = recorded(name)
    tol, a = tolerance(rec), rec.model.anatomy
    for layer in (0, a.n_layers - 1):
        row, made = rec.model.block(layer), []
        if row.mlp_kind in ("neurons", "experts"):
            made.append(neuron_block(rec, layer, where))
        if row.attn_kind == "attention":
            made += [head_block(rec, layer, where), head_source_block(rec, layer, where),
                     attn_neuron_block(rec, layer, where),
                     attn_neuron_block(rec, layer, where, sources=True)]  # fmt: skip
        for block in made:
            vectors = block.all_vectors()
            for i in sorted({0, 1, block.count // 2, block.count - 1}):
                near(vector_of(rec, block.site(i), where), vectors[i], 10 * tol)
        for part in ("attn", "mlp"):
            times = rec.reach(layer, part) if where == "final" else 1.0
            whole = rec.work(sublayer_vector(rec.layers[layer], part)) * times
            near(vector_of(rec, rs.Sublayer(layer, part), where), whole, tol)
            for site, bias in bias_vectors(rec, layer, part).items():
                near(vector_of(rec, site, where), bias * times, tol)
    embed = rec.work(rec.embed)
    near(vector_of(rec, rs.Constant("embed"), where), embed * (rec.reach(0, "pre") if where == "final" else 1.0), tol)
    final = vector_of(rec, rs.Sublayer(0, "mlp"))
    near(final, vector_of(rec, rs.Sublayer(0, "mlp"), "final"), tol)
    near(vector_of(rec, rs.Sublayer(-1, "mlp")), vector_of(rec, rs.Sublayer(a.n_layers - 1, "mlp")), tol)


def test_what_is_multiplied_on_the_way_differs_between_here_and_the_end():
    rec = recorded("beam")
    for site in ("L0.mlp", "L0.attn", "embed"):
        assert not torch.allclose(vector_of(rec, rs.parse_site(site), "here"), vector_of(rec, rs.parse_site(site)))


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "nemotron_h", "qwen3_next", "granite", "beam"])
@pytest.mark.parametrize("where", ["raw", "here", "final"])
def test_candidates_of_a_kind_are_that_kinds_blocks(name, where):
    rec = recorded(name)
    wanted = {"neuron": neuron_block, "head": head_block, "head_source": head_source_block,
              "attn_neuron": attn_neuron_block,
              "attn_neuron_source": lambda r, i, w: attn_neuron_block(r, i, w, sources=True)}  # fmt: skip
    for layer in range(rec.model.anatomy.n_layers):
        row = rec.model.block(layer)
        for kind in KINDS:
            found = candidates(rec, kind, layer, where)
            if kind == "layer":
                there = [part for part, k in (("attn", row.attn_kind), ("mlp", row.mlp_kind)) if k != "none"]
                assert [part for part, _ in found] == there
                for part, block in found:
                    times = rec.reach(layer, part) if where == "final" else 1.0
                    vector = rec.work(sublayer_vector(rec.layers[layer], part)) * times
                    near(block.all_vectors()[0], vector, tolerance(rec))
                    assert block.site(0) == rs.Sublayer(layer, part)
                continue
            part = "mlp" if kind == "neuron" else "attn"
            exists = row.mlp_kind in ("neurons", "experts") if part == "mlp" else row.attn_kind == "attention"
            assert [p for p, _ in found] == ([part] if exists else [])
            for _, block in found:
                assert block.kind == kind
                near(block.all_vectors(), wanted[kind](rec, layer, where).all_vectors(), tolerance(rec))
    assert [p for p, _ in candidates(rec, "layer", 0)] == [p for p, _ in candidates(rec, "layer", 0, "here")]


def test_candidates_are_as_they_enter_the_stream_unless_said_otherwise():
    rec = recorded("beam")
    for kind in KINDS:
        for (_, a), (_, b) in zip(candidates(rec, kind, 0), candidates(rec, kind, 0, "here"), strict=True):
            assert torch.equal(a.all_vectors(), b.all_vectors())
    for (_, a), (_, b) in zip(candidates(rec, "layer", 0), candidates(rec, "layer", 0, "final"), strict=True):
        assert not torch.allclose(a.all_vectors(), b.all_vectors())


BAD = {
    "llama": {
        "L9.N0": "got 9",
        "L1.resid_mid": "`L1.resid_mid` is a state of the stream, not an addend; read it with rs.lens.",
        "unembed.bias": "`unembed.bias` is a constant of the readout, not a vector in the stream; see rs.decompose.",
        "final_norm.bias": (
            "`final_norm.bias` is a constant of the readout, not a vector in the stream; see rs.decompose."
        ),
        "L1.H0<4": "`L1.H0<4` reads source position 4, but the predicting position is 3 (5 tokens): sources are 0..3.",
    },
    "gemma2": {
        "L1.mlp.bias": ("`L1.mlp.bias` does not exist for Gemma2ForCausalLM: that sublayer has no output bias."),
    },
}


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in BAD.items() for site in sites])
def test_what_has_no_vector_is_refused_in_these_words(name, site):
    with pytest.raises(SiteError) as caught:
        vector_of(recorded(name), rs.parse_site(site))
    said = BAD[name][site]
    assert str(caught.value) == said or (said.startswith("got") and said in str(caught.value))


def test_a_source_at_the_predicting_position_is_the_last_that_exists():
    rec = recorded("llama")
    assert resolve_in(rec, rs.HeadSource(-1, 0, 3)) == rs.HeadSource(2, 0, 3)
    assert resolve_in(rec, rs.AttnNeuron(1, 0, 2)) == rs.AttnNeuron(1, 0, 2)
    with pytest.raises(SiteError, match="source position 4"):
        resolve_in(rec, rs.AttnNeuron(1, 0, 2, 4))


def test_an_expert_that_was_not_routed_to_is_named_with_those_that_were():
    rec = recorded("deepseek_v3")
    layer = next(i for i in range(4) if rec.model.block(i).mlp_kind == "experts")
    routed = [g.expert for g in rec.layers[layer].groups if g.expert != "shared"]
    assert len(routed) < len(rec.layers[layer].groups)
    away = next(e for e in range(4) if e not in routed)
    site = rs.ExpertNeuron(layer, away, 0)
    with pytest.raises(SiteError) as caught:
        vector_of(rec, site)
    assert str(caught.value) == (
        f"`{site}` is not active: layer {layer} of {rec.model.name} routed position 3 to experts {routed}. "
        "Pick one of them."
    )
    near(vector_of(rec, rs.SharedNeuron(layer, 1)), neuron_block(rec, layer, "final").vectors(torch.tensor(
        [sum(len(g.coefficient) for g in rec.layers[layer].groups if g.expert != "shared") + 1]))[0], 1e-4)  # fmt: skip


def test_an_unknown_grain_is_refused():
    with pytest.raises(ArgumentError, match="`grain` must be one of layer, head, head_source, neuron, subvalue"):
        addends(recorded("llama"), "neurons")

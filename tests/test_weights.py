"""Heads as low-rank maps and how they compose, against plain dense products of the modules' own weights."""

import pytest
import torch
from induction import induction_model
from plain_heads import FAMILIES, PLAIN, loaded, maps_of
from tiny import build, shared

import resid_surgery as rs
from resid_surgery.attribution import composing, weights
from resid_surgery.attribution.composing import composition
from resid_surgery.attribution.ov_qk import copying, ov_tokens, qk_tokens
from resid_surgery.attribution.weights import head_weights
from resid_surgery.models.zoo import tiny
from resid_surgery.stream.recording import reach
from resid_surgery.stream.records import repeat_kv


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_maps_are_the_projections_with_the_norm_folded_in(family, layer):
    model = loaded(family)
    q, k, v, o = maps_of(family, model, layer)
    found = head_weights(model, f"L{layer}.H*")
    assert len(found) == len(q)
    for h, one in enumerate(found):
        assert torch.allclose(one.w_v, v[h], atol=1e-9)
        assert torch.allclose(one.w_o, o[h], atol=1e-9)
        assert torch.allclose(one.ov(), v[h] @ o[h], atol=1e-8)
        # the order of key coordinates is the family's own: what counts is their product
        assert torch.allclose(one.qk() / one.scaling, q[h] @ k[h].T, atol=1e-8)


@pytest.mark.parametrize("family", PLAIN)
def test_maps_and_biases_give_the_values_and_scores_that_a_run_computed(family):
    """At distance 0 a rotated query times a rotated key is the un-rotated product."""
    model = loaded(family)
    rec = rs.record(model, rs.Prompt(ids=[5, 9, 3, 9, 60], target=1))
    for layer in range(model.anatomy.n_layers):
        one, x = rec.layers[layer].attention, rec.work(rec.layers[layer].resid_pre)
        s = model.norm(layer, "attn_norm").scale(x)
        for h, maps in enumerate(head_weights(model, f"L{layer}.H*")):
            value, key = (repeat_kv(part, len(one.z))[h, -1] for part in (one.value, one.key))
            assert torch.allclose(x / s @ maps.w_v + maps.b_v, value, atol=1e-5)
            score = (x / s @ maps.w_q + maps.b_q) @ (x / s @ maps.w_k + maps.b_k)
            assert float(score) == pytest.approx(float(one.query[h] @ key), rel=1e-5, abs=1e-4)


def test_unfolded_maps_read_the_norms_output():
    model = loaded("gemma2")
    block = model.module.model.layers[1]
    found = head_weights(model, "L1.H3", fold=False)["L1.H3"]
    assert torch.equal(found.w_v, block.self_attn.v_proj.weight.T[:, 6:12])
    assert torch.equal(found.w_o, block.self_attn.o_proj.weight.T[18:24])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_maps_of_16_bit_weights_are_exact(dtype):
    """Unit vectors pick rows out; nothing is rounded until the norm is folded in, in float32."""
    model = shared("llama", dtype)
    block = model.module.model.layers[1]
    found = head_weights(model, "L1.H3", fold=False)["L1.H3"]
    assert torch.equal(found.w_v, block.self_attn.v_proj.weight.T[:, 6:12].float())
    folded = head_weights(model, "L1.H3")["L1.H3"].w_v
    assert torch.allclose(folded, found.w_v * block.input_layernorm.weight.float()[:, None])
    table = composition(model, "L0.H0", "L1.H3").set_index("via")["score"]
    writer, reader = head_weights(model, ["L0.H0", "L1.H3"])
    dense = [score_of(writer.ov(), read) for read in (reader.qk(), reader.qk().T, reader.ov())]
    assert table.tolist() == pytest.approx(dense, abs=1e-5)


def test_a_large_bias_rounds_no_weights_away():
    module = build("llama", torch.bfloat16)
    with torch.no_grad():
        module.model.layers[1].self_attn.k_proj.bias.fill_(300.0)
    found = head_weights(rs.load(module), "L1.H3", fold=False)["L1.H3"]
    assert torch.equal(found.w_k, module.model.layers[1].self_attn.k_proj.weight.T[:, 6:12].float())
    assert set(found.b_k.tolist()) == {300.0}


def test_what_is_folded_is_said():
    assert head_weights(loaded("llama")).folded == ("attn_norm gain",)
    assert head_weights(loaded("gpt2")).folded == ("attn_norm gain", "attn_norm centring")
    assert head_weights(loaded("gemma2")).folded == ("attn_norm gain", "attn_post_norm gain")
    assert head_weights(loaded("granite")).folded == ("attn_norm gain", "attn_scale")
    assert head_weights(loaded("gemma2"), fold=False).folded == ()


def test_heads_are_named_by_site_text_slice_or_list():
    model = loaded("llama")
    assert len(head_weights(model)) == 12
    assert head_weights(model, ["L2.H1", rs.Head(0, 3), "L2.H1"]).sites == (rs.Head(2, 1), rs.Head(0, 3))
    assert head_weights(model, "L-1.H0").sites == (rs.Head(2, 0),)
    assert [one.site for one in head_weights(model, "L1.H*")] == [rs.Head(1, h) for h in range(4)]


def test_maps_are_kept_while_weights_are_the_same_and_made_anew_when_not(monkeypatch):
    model = rs.load(build("llama"))
    first = head_weights(model, "L1.H0")["L1.H0"].w_v
    runs = []
    monkeypatch.setattr(weights, "projected", lambda *a, **k: runs.append(a) or (_ for _ in ()).throw(AssertionError))
    assert torch.equal(head_weights(model, "L1.H2")["L1.H2"].w_q[0], head_weights(model, "L1.H2")["L1.H2"].w_q[0])
    assert not runs
    monkeypatch.undo()
    with torch.no_grad():
        model.module.model.layers[1].self_attn.v_proj.weight.mul_(2.0)
    assert torch.allclose(head_weights(model, "L1.H0")["L1.H0"].w_v, 2 * first)


def test_maps_are_the_same_in_chunks_and_when_nothing_is_kept(monkeypatch):
    whole = head_weights(rs.load(build("gpt_neox")))
    monkeypatch.setattr(weights, "ROWS", 7)
    monkeypatch.setattr(weights, "KEEP_BYTES", 0)
    model = rs.load(build("gpt_neox"))
    for one, other in zip(whole, head_weights(model), strict=True):
        assert torch.allclose(one.w_v, other.w_v)
        assert torch.allclose(one.w_k, other.w_k)
    assert not model.cache["circuits"][1]["maps"]


def test_nothing_of_the_users_model_changes():
    module = build("gemma2")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = rs.load(module)
    head_weights(model), copying(model), composition(model), ov_tokens(model, "L1.H0", 3), qk_tokens(model, "L1.H0", 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_model_that_gives_weights_only_has_ov_maps_and_says_why_there_is_no_qk():
    model = rs.load(tiny("bloom", dtype=torch.float64))
    one = head_weights(model)["L1.H0"]
    assert one.w_q is None
    assert one.ov().shape == (24, 24)
    with pytest.raises(
        rs.UnsupportedModelError, match=r"`L1\.H0` has no QK circuit: the model gives its attention weights"
    ):
        one.qk()
    with pytest.raises(rs.UnsupportedModelError, match=r"heads of layer 1 .* have no QK circuit"):
        qk_tokens(model, "L1.H0", 3)
    assert set(composition(model)["via"]) == {"value"}


def bent(side):
    """A model with something between a projection of layer 1 and attention that is no norm."""
    module = build("llama")
    attn = module.model.layers[1].self_attn
    setattr(attn, side, torch.nn.Sequential(attn.get_submodule(side), torch.nn.Tanh()))
    return rs.load(module)


def test_queries_that_are_no_matrices_are_left_out_and_said():
    model, ctrl = bent("q_proj"), rs.load(tiny("ctrl", dtype=torch.float64))
    with pytest.raises(rs.UnsupportedModelError, match="the query of layer 1 is not affine in its input"):
        head_weights(model)["L1.H1"].qk()
    assert head_weights(model)["L0.H1"].qk().shape == (24, 24)
    assert len(qk_tokens(model, "L1.H1", 3)) == 10  # read off the modules themselves
    table = composition(model)
    assert set(table.loc[table["reader_layer"] == 1, "via"]) == {"value"}
    assert set(table.loc[table["reader_layer"] == 2, "via"]) == {"query", "key", "value"}
    with pytest.raises(rs.UnsupportedModelError, match="the query of layer 0 is not made of its input"):
        qk_tokens(ctrl, "L0.H1", 3)  # where queries are another argument
    assert set(composition(ctrl)["via"]) == {"value"}


def test_values_that_are_no_matrices_are_refused():
    model = bent("v_proj")
    with pytest.raises(
        rs.UnsupportedModelError, match=r"heads of layer 1 of .* no matrices: the value of layer 1 is not"
    ):
        head_weights(model)
    assert len(head_weights(model, "L2.H*")) == 4


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: head_weights(m, "L9.H0"), rs.SiteError, "`layer` must be in 0..2"),
        (lambda m: head_weights(m, "L1.mlp"), rs.SiteError, "`heads` must be heads such as L5.H1"),
        (lambda m: head_weights(m, "L1.H0")["L2.H0"], rs.SiteError, "must be one of the 1 heads"),
        (lambda m: head_weights(m, fold=1), rs.ArgumentError, "`fold` must be True or False"),
        (lambda m: head_weights("llama"), rs.ArgumentError, "a model from resid_surgery.load"),
        (lambda m: ov_tokens(m, "L1.H0", 3, after="mlp1"), rs.ArgumentError, "`after` must be one of embed, mlp0"),
        (lambda m: ov_tokens(m, "L0:2.H0", 3, after="mlp0"), rs.SiteError, "they read before its MLP"),
        (lambda m: ov_tokens(m, "L1.H0", []), rs.PromptError, "`tokens` must be at least one token"),
        (lambda m: ov_tokens(m, "L1.H0", 97), rs.PromptError, "`tokens` must be a whole number in 0..96"),
        (lambda m: ov_tokens(m, "L1.H0", 3, top=0), rs.ArgumentError, "`top`"),
        (lambda m: qk_tokens(m, "L1.H0", 3, top=98), rs.ArgumentError, "`top`"),
        (lambda m: qk_tokens(m, "L0.H0", 3, after="mlp0"), rs.SiteError, "they read before its MLP"),
        (lambda m: copying(m, "L0.H0", after="mlp0"), rs.SiteError, "they read before its MLP"),
        (lambda m: composition(m, "L2.H0", "L0:2.H*"), rs.SiteError, "`writers` must have a head in a layer before"),
    ],
)
def test_bad_calls(call, error, said):
    with pytest.raises(error, match=said):
        call(loaded("llama"))


# Composition


def score_of(left, right):
    return float((left @ right).norm() / (left.norm() * right.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_composition_scores_are_those_of_dense_matrices(family):
    model = loaded(family)
    table = composition(model).set_index(["writer", "reader", "via"])
    maps = [maps_of(family, model, layer) for layer in range(model.anatomy.n_layers)]
    heads = [len(one[0]) for one in maps]
    assert len(table) == sum(3 * heads[a] * heads[b] for b in range(len(maps)) for a in range(b))
    for reader, (q, k, v, o) in enumerate(maps):
        for writer in range(reader):
            for h in range(heads[writer]):
                ov = maps[writer][2][h] @ maps[writer][3][h]
                for g in range(heads[reader]):
                    for via, read in (("query", q[g] @ k[g].T), ("key", k[g] @ q[g].T), ("value", v[g] @ o[g])):
                        found = table.loc[(f"L{writer}.H{h}", f"L{reader}.H{g}", via), "score"]
                        assert found == pytest.approx(score_of(ov, read), abs=1e-8)


def test_composition_takes_in_what_blocks_multiply_the_stream_by():
    """Doge multiplies its stream elementwise between the layers."""
    model = rs.load(tiny("doge", dtype=torch.float64))
    one, other = head_weights(model, ["L0.H1", "L2.H0"])
    between = reach(model, 0, "attn", (2, "attn"))
    assert isinstance(between, torch.Tensor)
    table = composition(model, "L0.H1", "L2.H0").set_index("via")
    expected = score_of(one.ov() * between, other.ov())
    assert table.loc["value", "score"] == pytest.approx(expected, abs=1e-8)
    assert abs(expected - score_of(one.ov(), other.ov())) > 1e-3


def test_hand_set_composition_stands_out():
    table = composition(induction_model()).set_index(["writer", "reader", "via"])
    composed = table.loc[("L0.H0", "L1.H0", "key")]
    assert composed["score"] > 1.7 * composed["baseline"]
    assert composed["deviations"] > 30
    others = table[(table["score"] > 0) & (table.index != ("L0.H0", "L1.H0", "key"))]
    assert (others["score"] < others["baseline"]).all()
    assert table["deviations"].idxmax() == ("L0.H0", "L1.H0", "key")


def test_a_rank_one_reader_of_a_rank_one_writer_scores_one():
    module = build("llama")
    direction = torch.zeros(24).double()
    direction[3] = 1.0
    with torch.no_grad():
        for layer in (0, 1):
            attn = module.model.layers[layer].self_attn
            attn.v_proj.weight.zero_()
            attn.v_proj.weight[0] = direction
            attn.o_proj.weight[:, :6] = 0
            attn.o_proj.weight[:, 0] = direction
    table = composition(rs.load(module), "L0.H0", "L1.H0").set_index("via")
    assert table.loc["value", "score"] == pytest.approx(1.0)


def test_baseline_and_deviations_are_those_of_random_rotations():
    """Turn the reader at random against the writer, many times, and measure."""
    model = loaded("llama")
    writer, reader = head_weights(model, ["L0.H0", "L1.H1"])
    left, right = writer.ov(), reader.ov()
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(4000):
        turned, r = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
        squares.append(score_of(left, turned * r.diagonal().sign() @ right) ** 2)
    found = torch.tensor(squares)
    row = composition(model, "L0.H0", "L1.H1").set_index("via").loc["value"]
    assert row["baseline"] ** 2 == pytest.approx(float(found.mean()), rel=0.02)
    expected = (row["score"] ** 2 - float(found.mean())) / float(found.std())
    assert row["deviations"] == pytest.approx(expected, rel=0.06, abs=0.03)


def test_composition_is_the_same_in_small_groups(monkeypatch):
    model = loaded("gpt_neox")
    whole = composition(model)
    monkeypatch.setattr(composing, "WRITER_BYTES", 1)
    monkeypatch.setattr(composing, "PRODUCT_BYTES", 1)
    parts = composition(model)
    assert whole.drop(columns=["score", "deviations"]).equals(parts.drop(columns=["score", "deviations"]))
    assert parts["score"].tolist() == pytest.approx(whole["score"].tolist())


def test_composition_of_some_heads():
    model = loaded("llama")
    table = composition(model, writers=["L0.H1", "L1.H0"], readers="L1:3.H2")
    pairs = set(zip(table["writer"], table["reader"], strict=True))
    assert pairs == {("L0.H1", "L1.H2"), ("L0.H1", "L2.H2"), ("L1.H0", "L2.H2")}
    whole = composition(model).set_index(["writer", "reader", "via"])["score"]
    assert table["score"].tolist() == pytest.approx(
        [whole[key] for key in zip(table["writer"], table["reader"], table["via"], strict=True)]
    )

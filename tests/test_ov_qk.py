"""Heads in the vocabulary: embeddings, OV and QK circuits, copying scores, against plain modules and whole matrices."""

import pytest
import torch
from induction import induction_model
from plain_heads import FAMILIES, INNER, PLAIN, bs_unit, loaded, maps_of
from tiny import build

import resid_surgery as rs
from resid_surgery.attribution.embeddings import embeddings, token_states
from resid_surgery.attribution.ov_qk import copying, ov_tokens, qk_tokens
from resid_surgery.attribution.weights import head_weights
from resid_surgery.models.zoo import tiny
from resid_surgery.stream.recording import reach


@pytest.mark.parametrize("family", [*PLAIN, "bloom", "gemma3_text"])
def test_embeddings_are_what_enters_the_first_block_without_the_position(family):
    model = loaded(family) if family in PLAIN else rs.load(tiny(family, dtype=torch.float64))
    seen = []
    block = model.module.get_submodule(model.path(0, "block"))

    def keep(module, args, kwargs):
        seen.append((args or [kwargs["hidden_states"]])[0][0, 0])

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    for token in (3, 96):
        model.module(torch.tensor([[token]]), use_cache=False)
    hook.remove()
    found = embeddings(model).rows([3, 96])
    assert torch.allclose(found[1] - found[0], seen[1] - seen[0], atol=1e-6)
    if family != "gpt2":  # it adds a position
        assert torch.allclose(found, torch.stack(seen), atol=1e-6)


def alone(model, family, token, *, mlp):
    """What a block behind the first reads of a token when the first block's attention writes nothing."""
    x = embeddings(model).rows([token])
    if not mlp:
        return x
    block = model.module.get_submodule(model.path(0, "block"))
    with torch.no_grad():
        if family == "gpt2":
            return x + block.mlp(block.ln_2(x))
        if family == "gemma2":
            return x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
        scale = model.module.config.residual_multiplier if family == "granite" else 1.0
        return x + scale * block.mlp(block.post_attention_layernorm(x))


@pytest.mark.parametrize("family", [*PLAIN, *INNER])
def test_tokens_after_the_first_mlp(family):
    model = loaded(family)
    found = token_states(model, [7, 40], 1, "mlp0")
    expected = torch.cat([alone(model, family, token, mlp=True) for token in (7, 40)])
    assert torch.allclose(found, expected, atol=1e-6)


def test_tokens_after_a_first_mlp_of_experts_are_read_off_a_forward():
    model = rs.load(tiny("mixtral", dtype=torch.float64))
    block = model.module.model.layers[0]
    x = embeddings(model).rows([7, 40])
    with torch.no_grad():
        expected = x + block.mlp(block.post_attention_layernorm(x)[:, None])[:, 0]
    assert torch.allclose(token_states(model, [7, 40], 1, "mlp0"), expected, atol=1e-6)


# OV and QK circuits


def written_alone(model, family, layer, head, states):
    """A head's output for states alone, through the layer's own attention modules with hooks; post-norm scale 1."""
    norm = model.module.get_submodule(model.path(layer, "attn_norm"))
    out = model.module.get_submodule(model.path(layer, "attn_out"))
    seen = []
    hooks = [norm.register_forward_hook(lambda m, a, o: norm_alone(norm, states)),
             out.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))]  # fmt: skip
    with torch.no_grad():
        model.module(torch.full((len(states), 1), 7), use_cache=False)
    for hook in hooks:
        hook.remove()
    o = maps_of(family, model, layer)[3]
    z = seen[0][:, 0].reshape(len(states), len(o), -1)[:, head]
    return z @ o[head]


def norm_alone(norm, states):
    return type(norm).forward(norm, states[:, None])


@pytest.mark.parametrize("after", ["embed", "mlp0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ov_tokens_are_what_the_head_writes_for_a_token_alone(family, after):
    model = loaded(family)
    tokens = [11, 60]
    if family == "gpt_neox" and after == "mlp0":
        states = token_states(model, tokens, 1, after)  # its first block is parallel: tested by itself
    else:
        states = torch.cat([alone(model, family, token, mlp=after == "mlp0") for token in tokens])
    bs = bs_unit(model, family, written_alone(model, family, 1, 2, states))
    table = ov_tokens(model, "L1.H2", tokens, top=4, after=after)
    assert list(table["source_id"].unique()) == tokens
    for token, values in zip(tokens, bs, strict=True):
        mine = table[table["source_id"] == token]
        for side, order in (("promotes", values.argsort(descending=True)), ("suppresses", values.argsort())):
            rows = mine[mine["side"] == side]
            assert rows["token_id"].tolist() == order[:4].tolist()
            assert rows["bs_value"].tolist() == pytest.approx(values[order[:4]].tolist(), rel=1e-5, abs=1e-5)
            centred = (values[order[:4]] - values.mean()).tolist()
            assert rows["bs_centred"].tolist() == pytest.approx(centred, rel=1e-5, abs=1e-5)
        assert set(mine["own_rank"]) == {1 + int((values > values[token]).sum())}
        assert mine["own_bs"].iloc[0] == pytest.approx(float(values[token]), rel=1e-5, abs=1e-5)


def test_a_parallel_first_block_reads_the_embedding_twice():
    model = loaded("gpt_neox")
    block = model.module.gpt_neox.layers[0]
    x = embeddings(model).rows([5])
    with torch.no_grad():
        expected = x + block.mlp(block.post_attention_layernorm(x))
    assert torch.allclose(token_states(model, [5], 2, "mlp0"), expected, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_qk_tokens_are_the_scores_at_distance_0(family):
    """Position 0 is not rotated, so one-token runs give queries and keys as they are."""
    model = loaded(family)
    block, config = model.module.model.layers[1], model.module.config
    attn = block.self_attn
    everything = embeddings(model).rows(range(97))
    with torch.no_grad():
        read = block.input_layernorm(everything)
        q = attn.q_proj(read).reshape(97, config.num_attention_heads, -1)
        k = attn.k_proj(read).reshape(97, config.num_key_value_heads, -1)
        if family == "qwen3":
            q, k = attn.q_norm(q), attn.k_norm(k)
    head, query = 3, 11
    group = head * config.num_key_value_heads // config.num_attention_heads
    scores = attn.scaling * k[:, group] @ q[query, head]
    table = qk_tokens(model, rs.Head(1, head), query, top=5)
    best = scores.sort(descending=True)
    assert table["token_id"].tolist() == best.indices[:5].tolist()
    assert table["score"].tolist() == pytest.approx(best.values[:5].tolist(), rel=1e-5, abs=1e-5)
    assert table["score_centred"].iloc[0] == pytest.approx(float(scores.max() - scores.mean()), rel=1e-5, abs=1e-5)
    assert table["own_rank"].iloc[0] == 1 + int((scores > scores[query]).sum())
    assert set(table["distance"]) == {0}


def test_circuits_of_the_hand_set_model():
    model = induction_model()
    assert set(ov_tokens(model, "L1.H0", range(24), top=1)["own_rank"]) == {1}
    assert set(qk_tokens(model, "L0.H1", range(24), top=1)["own_rank"]) == {1}
    best = qk_tokens(model, "L0.H1", [5, 7], top=1)
    assert best["token_id"].tolist() == [5, 7]


# Copying


def eigenvalue_score(matrix):
    values = torch.linalg.eigvals(matrix)
    return float(values.real.sum() / values.abs().sum())


@pytest.mark.parametrize("after", ["embed", "mlp0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copying_scores_are_those_of_the_whole_vocabulary_matrix(family, after):
    model = loaded(family)
    table = copying(model, "L1:3.H*", after=after).set_index("site")
    for layer in (1, 2):
        _, _, v, o = maps_of(family, model, layer)
        for h in range(len(v)):
            states = token_states(model, range(97), layer, after)
            bs = bs_unit(model, family, states @ v[h] @ o[h])  # (source, written)
            row = table.loc[f"L{layer}.H{h}"]
            assert row["copying"] == pytest.approx(eigenvalue_score(bs), abs=1e-6)
            assert row["trace"] == pytest.approx(float(bs.trace()), rel=1e-6, abs=1e-5)
            centred = bs - bs.mean(1, keepdim=True)
            assert row["copying_centred"] == pytest.approx(eigenvalue_score(centred), abs=1e-6)
            found = torch.linalg.eigvals(bs)
            real = found[found.abs() > 1e-6 * found.abs().max()].real
            d_head = model.anatomy.sizes[layer].d_head
            assert row["positive"] == pytest.approx(float((real > 0).sum()) / d_head, abs=1e-9)


def test_a_hand_set_copying_head_scores_one_and_its_negative_minus_one():
    module = build("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for name in ("model.layers.1.input_layernorm", "model.norm"):
            module.get_submodule(name).weight.fill_(1.0)
        attn = module.model.layers[1].self_attn
        attn.v_proj.weight[:6] = torch.linalg.qr(torch.randn(24, 6).double())[0].T
        attn.o_proj.weight[:, :6] = attn.v_proj.weight[:6].T  # heads 0 and 1 share that value
        attn.o_proj.weight[:, 6:12] = -attn.v_proj.weight[:6].T
    table = copying(rs.load(module), "L1.H0:2").set_index("head")
    for name, share in (("copying", "positive"), ("copying_centred", "positive_centred")):
        assert table[name].tolist() == pytest.approx([1.0, -1.0])
        assert table[share].tolist() == [1.0, 0.0]


def test_copying_of_the_hand_set_model():
    table = copying(induction_model()).set_index("site")
    assert table.loc["L1.H0", "copying"] > 0.99
    assert abs(table.loc["L0.H0", "trace"]) < 0.1 * table.loc["L1.H0", "trace"]  # it writes where nobody reads tokens
    assert table.loc["L1.H1", "copying"] == 0.0  # it writes nothing


def test_all_heads_after_the_first_mlp_are_those_above_the_first_layer():
    assert set(copying(loaded("llama"), after="mlp0")["layer"]) == {1, 2}


def test_copying_takes_in_what_blocks_multiply_the_stream_by():
    """Doge multiplies its stream elementwise in every block."""
    model = rs.load(tiny("doge", dtype=torch.float64))
    maps = head_weights(model, "L2.H1")["L2.H1"]
    norm = model.module.get_submodule(model.path(None, "final_norm")).weight.detach()
    before, behind = reach(model, 0, "pre", (2, "attn")), reach(model, 2, "attn")
    states = model.module.get_input_embeddings().weight.detach() * before
    bs = (states @ maps.ov() * behind * norm) @ model.module.get_output_embeddings().weight.detach().T
    row = copying(model, "L2.H1").iloc[0]
    assert row["copying"] == pytest.approx(eigenvalue_score(bs), abs=1e-6)
    assert row["trace"] == pytest.approx(float(bs.trace()), rel=1e-6)
    assert float((before - 1).abs().max()) > 0.1
    assert float((behind - 1).abs().max()) > 0.1

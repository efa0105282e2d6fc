"""Messages and their expansion, and the constant part of a ledger: against plain products, and to the last vector."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import families, prompts
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.attribution.aims import aim_of
from resid_surgery.attribution.constancy import token_constants
from resid_surgery.attribution.messages import expand_message, messages
from resid_surgery.models.zoo import tiny
from resid_surgery.stream.subvalues import GRAINS, vector_of
from resid_surgery.stream.vocabulary import Readout


@given(families, prompts(), st.integers(0, 2), st.integers(0, 2))
def test_messages_equal_nested_loops(family, prompt, layer, head):
    model = shared(family)
    rec = rs.record(model, prompt)
    t = rec.prompt.position
    seen = oracle.capture(model.module, family, list(prompt.ids), t)
    table = messages(rec, rs.Head(layer, head), top=3)
    assert table["source"].tolist() == list(range(t + 1))
    assert table["token"].tolist() == list(rec.prompt.tokens[: t + 1])
    for _, row in table.iterrows():
        j = row["source"]
        vector = oracle.head_source(seen, layer, head, j)
        values = seen.values[layer]
        value = values[head // (len(seen.alpha[layer]) // len(values))][j]
        bs = oracle.bs(seen, vector)
        assert row["attention"] == pytest.approx(seen.alpha[layer][head][j], abs=1e-6)
        assert row["value_norm"] == pytest.approx(sum(v * v for v in value) ** 0.5, rel=1e-5, abs=1e-6)
        assert row["message_norm"] == pytest.approx(sum(v * v for v in vector) ** 0.5, rel=1e-5, abs=1e-6)
        assert row["bs"] == pytest.approx(bs[rec.prompt.target], rel=1e-4, abs=1e-5)
        best = sorted(range(len(bs)), key=lambda i: -bs[i])
        if row["message_norm"] > 1e-3:
            assert row["promotes"] == " ".join(repr(f"#{i}") for i in best[:3])
            assert row["suppresses"] == " ".join(repr(f"#{i}") for i in best[::-1][:3])
    assert table["closure"].iloc[0] < 1e-6
    assert table["bs"].sum() == pytest.approx(oracle.bs(seen, whole(seen, layer, head, t))[rec.prompt.target], abs=1e-5)


def whole(seen, layer, head, t):
    """What a head writes, a sum over its sources."""
    parts = [oracle.head_source(seen, layer, head, j) for j in range(t + 1)]
    return [sum(numbers) for numbers in zip(*parts, strict=True)]


def test_messages_of_pairs_slices_and_other_readouts():
    rec = rs.record(shared("gemma2"), rs.Prompt(ids=[5, 4, 3], target=1, versus=[2, 7]))
    table = messages(rec, ["L1.H0<2", "L0.H1"], readout="difference")
    assert table["site"].tolist() == ["L1.H0<2", "L0.H1<0", "L0.H1<1", "L0.H1<2"]
    aim = aim_of(rec, "difference", rec.prompt.versus)
    expected = [float(vector_of(rec, rs.parse_site(site)) @ aim.direction) for site in table["site"]]
    assert table["bs"].tolist() == pytest.approx(expected)
    one = messages(rec, "L1.H0<2", versus=9, readout="difference")
    assert one["bs"].iloc[0] != table["bs"].iloc[0]


WITH_OTHERS = (*FAMILIES, "qwen3", "deepseek_v3", "phi3", "granite", "olmo2", "gpt_oss")


@pytest.mark.parametrize("grain", ["layer", "subvalue"])
@pytest.mark.parametrize("family", WITH_OTHERS)
def test_parts_sum_to_the_message_and_its_readout(family, grain):
    model = shared(family) if family in FAMILIES else rs.load(tiny(family, dtype=torch.float64))
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 33, 60], target=1, versus=[2]), positions="all")
    for site in ("L1.H2<1", "L2.H0<3"):
        table = expand_message(rec, site, grain=grain, readout="difference", top=4)
        worth = float(vector_of(rec, rs.parse_site(site)) @ aim_of(rec, "difference", rec.prompt.versus).direction)
        assert table["closure"].iloc[0] < 1e-5
        assert table["bs"].sum() == pytest.approx(worth, rel=1e-5, abs=1e-6)
        assert table["writer"].iloc[-1] == "constant"
        addends = 6 if grain == "subvalue" or site.startswith("L2") else 4  # listed, the remainder, the constant
        assert len(table) == addends
        listed = table["bs"].abs().iloc[: min(4, addends - 1)].tolist()
        assert listed == sorted(listed, reverse=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_each_part_is_the_addend_through_norm_values_and_output(family):
    """In plain products: the recorded scale of the source's norm, W_V, the attention weight, W_O."""
    model = shared(family)
    ids, site = [5, 4, 33, 60], rs.HeadSource(2, 1, 1)
    rec = rs.record(model, rs.Prompt(ids=ids, target=1), positions="all")
    at = rs.record(model, rs.Prompt(ids=ids, target=1, position=site.source))
    seen = oracle.capture(model.module, family, ids, 3)
    table = expand_message(rec, site, top=100).set_index("writer")
    norm, s = norm_of(seen, family, at.layers[2].resid_pre.tolist())
    for writer, vector in (("embed", at.embed), ("L0.attn", at.layers[0].attn_out), ("L1.mlp", at.layers[1].mlp_out)):
        read = oracle.norm(seen, norm, vector.tolist(), s)
        w_v = value_rows(model, family, 2, 1)
        value = [sum(read[i] * w_v[i][a] for i in range(24)) for a in range(len(w_v[0]))]
        rows = oracle.rows_of(seen, 2, seen.where.w_o)[len(value) : 2 * len(value)]
        alpha = seen.alpha[2][1][1]
        part = [alpha * sum(value[a] * rows[a][i] for a in range(len(value))) for i in range(24)]
        part = oracle.through_post(seen, 2, "attn", part)
        assert table.loc[writer, "bs"] == pytest.approx(oracle.bs(seen, part)[1], rel=1e-5, abs=1e-6)
        assert table.loc[writer, "part_norm"] == pytest.approx(sum(v * v for v in part) ** 0.5, rel=1e-5, abs=1e-6)
        promoted = max(range(97), key=oracle.bs(seen, part).__getitem__)
        assert table.loc[writer, "promotes"].startswith(repr(f"#{promoted}"))
    assert not any(str(writer).startswith("remainder") for writer in table.index)


def norm_of(seen, family, state):
    """The module that attention reads through, and its scale for a state."""
    names = {"gpt2": "ln_1", "gpt_neox": "input_layernorm"}
    module = seen.model.get_submodule(f"{seen.where.blocks}.2.{names.get(family, 'input_layernorm')}")
    return module, oracle.scale(seen, module, state)


def value_rows(model, family, layer, head):
    """[d_model][d_head] of one head's value, as its module holds it."""
    block = model.module.get_submodule(f"{oracle.WHERE[family].blocks}.{layer}")
    if family == "gpt2":
        return block.attn.c_attn.weight[:, 48 + 8 * head : 56 + 8 * head].tolist()
    if family == "gpt_neox":
        return block.attention.query_key_value.weight.view(3, 3, 8, 24)[head, 2].T.tolist()
    return block.self_attn.v_proj.weight[6 * (head // 2) : 6 * (head // 2) + 6].T.tolist()


@pytest.mark.parametrize("grain", GRAINS)
def test_remainder_and_top_change_nothing_of_the_sum(grain):
    rec = rs.record(shared("gpt_neox"), rs.Prompt(ids=[5, 4, 33], target=1), positions="all")
    few, all_of_them = (expand_message(rec, "L2.H1<0", grain=grain, top=top) for top in (1, 10**6))
    assert few["bs"].sum() == pytest.approx(all_of_them["bs"].sum())
    assert few["kind"].tolist()[1:] == ["remainder", "constant"]
    assert "remainder" not in set(all_of_them["kind"])
    rest = all_of_them["bs"].iloc[1:-1].sum()
    assert few["bs"].iloc[1] == pytest.approx(rest, rel=1e-6, abs=1e-8)


def test_the_predicting_positions_own_message_needs_no_other_position():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 33], target=1))
    assert expand_message(rec, "L2.H1<2")["closure"].iloc[0] < 1e-5
    with pytest.raises(rs.ArgumentError, match=r'positions="all"'):
        expand_message(rec, "L2.H1<1")


def test_16_bit_parts_close_with_a_rounding_row():
    rec = rs.record(shared("llama", torch.bfloat16), rs.Prompt(ids=[5, 4, 33], target=1), positions="all")
    table = expand_message(rec, "L2.H1<1", top=100)
    assert "rounding" in set(table["writer"])
    assert table["closure"].iloc[0] < 0.1


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda r: messages(r, "L1.mlp"), rs.SiteError, "`heads` must be heads or"),
        (lambda r: messages(r, "L1.H0<3"), rs.SiteError, "predicting position is 2"),
        (lambda r: messages(r, "L1.H9"), rs.SiteError, "`head` must be in 0..3"),
        (lambda r: messages(r, "L1.H0", readout="logit"), rs.ArgumentError, "`readout` must be one of"),
        (lambda r: messages(r, "L1.H0", readout="difference"), rs.ArgumentError, "needs competitors"),
        (lambda r: messages(r, "L1.H0", top=0), rs.ArgumentError, "`top`"),
        (lambda r: messages("rec", "L1.H0"), rs.ArgumentError, "a recording from"),
        (lambda r: expand_message(r, "L1.H0"), rs.SiteError, "one .head, source. pair such as"),
        (lambda r: expand_message(r, "L1.H0<*"), rs.SiteError, "one .head, source. pair such as"),
        (lambda r: expand_message(r, "L1.H0<1", grain="heads"), rs.ArgumentError, "Did you mean 'head'"),
        (lambda r: expand_message(r, "L1.H0<1", tokens=0), rs.ArgumentError, "`tokens`"),
    ],
)
def test_bad_calls(call, error, said):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 33], target=1), positions="all")
    with pytest.raises(error, match=said):
        call(rec)


# Constancy


@given(families, prompts())
def test_constant_and_context_are_the_token_alone_and_the_rest(family, prompt):
    model = shared(family)
    rec = rs.record(model, prompt)
    table = token_constants(rec).set_index("site")
    token = rec.prompt.ids[rec.prompt.position]
    seen = oracle.capture(model.module, family, list(prompt.ids), rec.prompt.position)
    begin = [prompt.ids[0]] if rec.prompt.position > 0 and prompt.ids[0] == model.module.config.bos_token_id else []
    single = oracle.capture(model.module, family, [*begin, token], len(begin))
    s = oracle.scale(seen, oracle.final_norm(seen), seen.final)
    target = rec.prompt.target
    pairs = {"embed": (seen.pre[0], single.pre[0])}
    for layer in range(3):
        pairs[f"L{layer}.attn"] = seen.attn[layer], single.attn[layer]
        pairs[f"L{layer}.mlp"] = seen.mlp[layer], single.mlp[layer]
    for site, (here, there) in pairs.items():
        bs, constant = oracle.bs(seen, here, s=s), oracle.bs(seen, there, s=s)
        row = table.loc[site]
        assert row["bs"] == pytest.approx(bs[target], rel=1e-5, abs=1e-5)
        assert row["constant"] == pytest.approx(constant[target], rel=1e-5, abs=1e-5)
        assert row["context"] == pytest.approx(bs[target] - constant[target], rel=1e-5, abs=1e-4)
        difference = constant[target] - sum(constant[i] for i in rec.prompt.versus) / len(rec.prompt.versus)
        assert row["constant_difference"] == pytest.approx(difference, rel=1e-5, abs=1e-4)
    before_cap = float(rec.bs_values[target])
    assert (table["constant"] + table["context"]).sum() == pytest.approx(before_cap, abs=1e-4)
    assert table["closure"].iloc[0] < 1e-4
    logits = rec.bs_values.tolist()
    gap = logits[target] - sum(logits[i] for i in rec.prompt.versus) / len(rec.prompt.versus)
    assert (table["constant_difference"] + table["context_difference"]).sum() == pytest.approx(gap, abs=1e-4)


def test_a_prompt_of_one_token_has_no_context():
    rec = rs.record(shared("gpt2"), rs.Prompt(ids=[5], target=1))
    table = token_constants(rec)
    assert table["context"].abs().max() < 1e-9
    assert "bs_difference" not in table


def test_the_mean_over_prompts_that_end_in_the_token():
    model = shared("llama")
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 33], target=1, versus=[2]))
    others = [rs.Prompt(ids=[9, 8, 7, 33], target=3), rs.record(model, rs.Prompt(ids=[33, 2], target=3, position=0))]
    table = token_constants(rec, over=others).set_index("site")
    direction = Readout.of(rec).directions([1])[0]
    runs = [rs.record(model, others[0]), others[1]]
    for site in ("L1.attn", "L2.mlp"):
        mean = sum(float(vector_of(one, rs.parse_site(site)) @ direction) for one in runs) / 2
        assert table.loc[site, "constant"] == pytest.approx(mean, abs=1e-9)
    assert set(table["over"]) == {2}


def test_the_beginning_of_a_prompt_is_kept():
    """Llama's config names token 1 as BOS."""
    model = shared("llama")
    assert model.module.config.bos_token_id == 1
    rec = rs.record(model, rs.Prompt(ids=[1, 9, 33], target=3))
    with_bos = rs.record(model, rs.Prompt(ids=[1, 33], target=3))
    table = token_constants(rec).set_index("site")
    direction = Readout.of(rec).directions([3])[0]
    expected = float(vector_of(with_bos, rs.parse_site("L2.attn")) @ direction)
    assert table.loc["L2.attn", "constant"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("over", "error", "said"),
    [
        ([], rs.ArgumentError, "at least one prompt"),
        ("text", rs.ArgumentError, "None, or a sequence of prompts"),
        ([rs.Prompt(ids=[33, 4], target=1)], rs.PromptError, r"over\[0\] must have '#33' .* it has '#4'"),
        ([rs.Prompt(ids=[4, 33], target=1), 3], rs.ArgumentError, r"`over\[1\]` must be a prompt or a recording"),
    ],
)
def test_prompts_that_end_in_another_token_are_refused_before_any_forward(over, error, said, monkeypatch):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 33], target=1))
    monkeypatch.setattr("resid_surgery.attribution.constancy.record", lambda *a: pytest.fail("a forward ran"))
    with pytest.raises(error, match=said):
        token_constants(rec, over=over)


def test_a_recording_of_another_model_is_refused():
    rec, other = (rs.record(shared(one), rs.Prompt(ids=[5, 33], target=1)) for one in ("llama", "gpt2"))
    with pytest.raises(rs.ArgumentError, match=r"over\[0\] must be a recording of Llama"):
        token_constants(rec, over=[other])

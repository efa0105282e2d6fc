"""The mathematics: everything sums, on every family, against loops and against itself."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts, recordings
from tiny import FAMILIES, VOCAB, build, shared

import resid_surgery as rs
from resid_surgery.attribution.states import States, logsumexp_
from resid_surgery.stream.blocks import sum_of
from resid_surgery.stream.closing import closures, probe
from resid_surgery.stream.recording import closure_tolerance
from resid_surgery.stream.subvalues import GRAINS, addends, vector_of
from resid_surgery.stream.vocabulary import Readout

EXACT = {"gpt2", "opt", "gpt_neox"}  # norms that transformers does not compute in float32


def close(family: str, dtype: torch.dtype) -> float:
    """Allowed error relative to the largest term."""
    if dtype == torch.float32:
        return 1e-5
    return 1e-10 if family in EXACT and dtype == torch.float64 else 1e-6


@given(families, dtypes, prompts(), st.sampled_from(GRAINS))
def test_addends_of_every_grain_sum_to_the_final_stream(family, dtype, prompt, grain):
    rec = rs.record(shared(family, dtype), prompt)
    blocks = addends(rec, grain)
    largest = max(float(b.all_vectors().abs().max()) for b in blocks)
    error = float((sum_of(blocks) - rec.work(rec.resid_final)).abs().max())
    # finer grains pass the softmax, which transformers computes in float32
    allowed = close(family, dtype) if grain == "layer" else max(1e-6, close(family, dtype))
    assert error <= allowed * largest  # both are 0 for the padding token of a family that has one


@given(families, dtypes, prompts(), st.sampled_from(GRAINS))
def test_all_rows_of_the_ledger_sum_to_the_models_own_logits(family, dtype, prompt, grain):
    rec = rs.record(shared(family, dtype), prompt)
    table = rs.decompose(rec, grain=grain)
    logit = table["bs_target"].sum()
    cap = rec.model.anatomy.logit_cap
    with torch.no_grad():
        plain = rec.model.module(torch.tensor([prompt.ids])).logits[0, rec.prompt.position, rec.prompt.target]
    shown = cap * math.tanh(logit / cap) if cap else logit
    assert shown == pytest.approx(float(plain), abs=3 * max(1e-6, close(family, dtype)) * (1 + len(table) ** 0.5))
    assert table["closure"].iloc[0] <= 3 * max(1e-6, close(family, dtype)) * (1 + table["bs_target"].abs().max())


@pytest.mark.parametrize(("layers", "expected"), [(16, 33), (96, 193)])
def test_a_16_layer_model_has_33_addends_and_a_96_layer_one_193(layers, expected):
    model = rs.load(build("llama", torch.float32, num_hidden_layers=layers, hidden_size=8, intermediate_size=8))
    rec = rs.record(model, rs.Prompt(ids=[1, 2, 3], target=4))
    table = rs.decompose(rec)
    assert len(table) == expected
    assert table["closure"].iloc[0] <= 1e-5 * max(1.0, table["bs_target"].abs().max())


@given(families, prompts())
def test_layer_outputs_equal_what_plain_hooks_see(family, prompt):
    model = shared(family)
    rec = rs.record(model, prompt)
    seen = oracle.capture(model.module, family, list(prompt.ids), rec.prompt.position)
    for i, layer in enumerate(rec.layers):
        assert layer.resid_pre.tolist() == pytest.approx(seen.pre[i], abs=1e-9)
        assert layer.attn_out.tolist() == pytest.approx(seen.attn[i], abs=1e-9)
        assert layer.mlp_out.tolist() == pytest.approx(seen.mlp[i], abs=1e-9)
        (neurons,) = layer.groups
        assert (neurons.expert, neurons.factor) == (None, 1.0)
        assert neurons.coefficient.tolist() == pytest.approx(seen.coefficient[i], abs=1e-9)
        alpha = layer.attention.alpha
        assert alpha.flatten().tolist() == pytest.approx([a for head in seen.alpha[i] for a in head], abs=1e-6)
        assert layer.attention.gate is None
        assert [p.tolist() for p in neurons.pre_activations] == [
            pytest.approx(p, abs=1e-9) for p in seen.pre_activations[i]
        ]
    assert rec.logits.tolist() == pytest.approx(seen.logits, abs=1e-9)


@given(families, prompts(), st.data())
def test_subvalues_and_their_scores_equal_nested_loops(family, prompt, data):
    model = shared(family)
    rec = rs.record(model, prompt)
    seen = oracle.capture(model.module, family, list(prompt.ids), rec.prompt.position)
    a, w = model.anatomy, rec.prompt.target
    layer, k = data.draw(st.integers(0, a.n_layers - 1)), data.draw(st.integers(0, a.d_mlp - 1))
    h, j = data.draw(st.integers(0, a.n_heads - 1)), data.draw(st.integers(0, rec.prompt.position))
    for site, part, slow in (
        (rs.Neuron(layer, k), "mlp", oracle.neuron(seen, layer, k)),
        (rs.HeadSource(layer, h, j), "attn", oracle.head_source(seen, layer, h, j)),
    ):
        fast = vector_of(rec, site)
        assert fast.tolist() == pytest.approx(slow, abs=1e-6)
        assert Readout.of(rec).bs(fast[None])[0].tolist() == pytest.approx(oracle.bs(seen, slow), abs=1e-5)
        x = oracle.state(seen, layer, part)
        states = {own: States.of(rec, [(layer, part)], own=own) for own in (False, True)}
        for own, state in states.items():
            found = float(state.evaluate(torch.tensor([0]), fast[None]))
            assert found == pytest.approx(oracle.log_prob_increase(seen, x, slow, w, own=own), abs=1e-5)


@given(recordings(), st.floats(-50, 50), st.floats(-5, 5), st.data())
def test_bs_values_are_additive_and_homogeneous(rec, factor, other, data):
    readout = Readout.of(rec)
    parts = torch.cat([b.all_vectors() for b in addends(rec)])
    i, j = (data.draw(st.integers(0, len(parts) - 1)) for _ in range(2))
    together = readout.bs((factor * parts[i] + other * parts[j])[None])
    apart = factor * readout.bs(parts[i][None]) + other * readout.bs(parts[j][None])
    assert torch.allclose(together, apart, rtol=1e-9, atol=1e-9 * (1 + abs(factor) + abs(other)))


@given(recordings(), st.data())
def test_the_logit_lens_is_not_additive_and_never_the_bs_values(rec, data):
    readout = Readout.of(rec)
    x = rec.work(rec.layers[-1].resid_pre)
    lens = readout.lens(x[None])[0]
    assert float(lens.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    own = torch.log_softmax(readout.cap(readout.state(x[None], own=True)), -1)[0]
    assert torch.allclose(lens, own)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40), st.floats(-1e3, 1e3))
def test_a_uniform_shift_changes_no_probability(values, shift):
    z = torch.tensor([values], dtype=torch.float64)
    before = z - logsumexp_(z.clone())[:, None]
    after = z + shift - logsumexp_(z + shift)[:, None]
    assert torch.allclose(before, after, atol=1e-9)


def test_the_papers_worked_numbers():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for added, p3 in (
        ([0, 0, 0], 0.665),
        ([5, 5, 5], 0.665),
        ([1, 1, 1], 0.665),
        ([1, 4, 5], 0.879),
        ([4, 1, 5], 0.946),
    ):
        z = x + torch.tensor(added, dtype=torch.float64)
        assert float((z[2] - logsumexp_(z[None].clone())[0]).exp()) == pytest.approx(p3, abs=5e-4)


@given(recordings())
def test_adding_nothing_scores_zero(rec):
    for own in (False, True):
        states = States.of(rec, [(0, "attn"), (0, "mlp")], own=own)
        which = torch.tensor(sorted(set(states.index.values())))
        zero = torch.zeros(len(which), rec.model.anatomy.d_model, dtype=torch.float64)
        assert states.evaluate(which, zero).abs().max() <= 1e-12


@given(families, dtypes, prompts())
def test_layer_scores_telescope_to_the_whole_increase(family, dtype, prompt):
    rec = rs.record(shared(family, dtype), prompt)
    readout, w = Readout.of(rec), rec.prompt.target
    ends = torch.stack([rec.work(rec.embed), rec.work(rec.resid_final)])
    whole = torch.log_softmax(readout.cap(readout.state(ends)), -1)[:, w]
    if rec.model.anatomy.parallel:
        steps = [(i, "attn", rec.work(r.attn_out) + rec.work(r.mlp_out)) for i, r in enumerate(rec.layers)]
        states = States.of(rec, [(i, part) for i, part, _ in steps], own=False)
        total = sum(float(states.evaluate(torch.tensor([states.index[i, p]]), v[None])) for i, p, v in steps)
    else:
        total = rs.scores(rec, kind="layer")["log_prob_increase"].sum()
    assert total == pytest.approx(float(whole[1] - whole[0]), abs=2e-4 if dtype == torch.float32 else 1e-6)


def test_scores_are_not_additive():
    rec = rs.record(shared("gemma2"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    parts = rs.scores(rec, kind="neuron", layers=[1])["log_prob_increase"].sum()
    whole = rs.scores(rec, kind="layer", layers=[1]).query("kind == 'mlp'")["log_prob_increase"].iloc[0]
    assert abs(parts - whole) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_check_measures_every_line_and_all_hold(family, dtype):
    table = rs.check(rs.load(build(family, dtype)))
    assert table["ok"].all(), table[~table["ok"]].to_string()
    lines = {int(n) for line in table["line"] for n in line.split("-")}
    assert lines == set(range(1, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tables_close_through_a_rounding_row(dtype):
    rec = rs.record(rs.load(build("llama", dtype)), rs.Prompt(ids=[1, 2, 3], target=4))
    table = rs.decompose(rec)
    assert table["kind"].iloc[-1] == "rounding"
    assert table["closure"].iloc[0] <= 4 * torch.finfo(dtype).eps * table["bs_target"].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_addend_is_caught(family):
    """The proof itself can fail: every identity notices its own sum being off."""
    rec, values = probe(shared(family))
    clean = {c.identity: c.error for c in closures(rec, values)}
    rec.layers[1].attn_out.mul_(1.5)
    broken = {c.identity for c in closures(rec, values) if not c.holds}
    assert max(clean.values()) <= closure_tolerance(rec.model)
    assert "carried resid_pre + attn_out + mlp_out = resid_post" in broken
    assert "sum of all addends = resid_post of the last block" in broken
    assert "post-norm and scale of W_O's output = attn_out" in broken
    reads = "norm of resid_mid (resid_pre in a parallel block) = what the MLP reads"
    assert (reads in broken) == (not rec.model.anatomy.parallel)


DAMAGE = {
    "mlp_out": (
        lambda layer: layer.mlp_out,
        {
            "carried resid_pre + attn_out + mlp_out = resid_post",
            "post-norm and scale of the down-projection's output = mlp_out",
            "sum of all addends = resid_post of the last block",
            "sum of all rows' bs-values = logits before a soft-cap",
        },
    ),
    "coefficients": (
        lambda layer: layer.groups[0].coefficient,
        {
            "sum of coefficient x w_out + bias = the down-projection's output",
            "activation of the pre-activations = coefficient",
            "sum of all subvalues and biases = resid_post of the last block",
        },
    ),
    "pre-activations": (
        lambda layer: layer.groups[0].pre_activations[0],
        {
            "keys read through the norm + bias = pre-activations",
            "activation of the pre-activations = coefficient",
        },
    ),
    "attention weights": (
        lambda layer: layer.attention.alpha,
        {
            "sum of alpha v over sources, gated = W_O's input",
            "sum of all subvalues and biases = resid_post of the last block",
        },
    ),
    "heads": (
        lambda layer: layer.attention.z,
        {
            "sum of alpha v over sources, gated = W_O's input",
            "sum of heads through W_O + bias = W_O's output",
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", DAMAGE)
def test_exactly_the_identities_that_read_a_wrong_number_fail(family, what):
    rec, values = probe(shared(family))
    part, expected = DAMAGE[what]
    part(rec.layers[1]).mul_(1.5)
    assert {c.identity for c in closures(rec, values) if not c.holds} == expected


def test_a_hand_computed_micro_model():
    """One layer, two dimensions, three tokens: numbers worked out on paper."""
    model = build("gpt2", torch.float64, n_embd=2, n_layer=1, n_head=1, n_inner=1, vocab_size=3, n_positions=4)
    sd = model.transformer
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        sd.wte.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 2.0]]))
        for ln in (sd.h[0].ln_1, sd.h[0].ln_2, sd.ln_f):
            ln.weight.fill_(1.0)
        sd.h[0].mlp.c_proj.weight.copy_(torch.tensor([[3.0, 1.0]]))
        sd.h[0].mlp.c_fc.bias.fill_(100.0)  # gelu(100) = 100: coefficient 100, value (3, 1)
    rec = rs.record(rs.load(model), rs.Prompt(ids=[0], target=1, versus=[2]))
    # stream: (1, -1) + (300, 100) = (301, 99); centred (101, -101); s = sqrt(101^2 + eps)
    s = math.sqrt(101.0**2 + 1e-5)
    table = rs.decompose(rec).set_index("site")
    assert table.loc["L0.mlp", "bs_target"] == pytest.approx(2 * 100 / s)
    assert table.loc["embed", "bs_target"] == pytest.approx(2 * 1 / s)
    assert table.loc["L0.mlp", "bs_versus_1"] == pytest.approx(-2 * 100 / s)
    # log p(1) moves from logits (2, 2, -2)/s to (2, 2, -2) * 101/s
    before, after = [2 / s, 2 / s, -2 / s], [2 * 101 / s, 2 * 101 / s, -2 * 101 / s]
    expected = oracle.log_prob(after, 1) - oracle.log_prob(before, 1)
    assert rs.scores(rec, kind="neuron")["log_prob_increase"].iloc[0] == pytest.approx(expected)


@given(st.integers(0, VOCAB - 1))
def test_single_token_prompts_work(token):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[token], target=3))
    assert rec.layers[0].attention.alpha.tolist() == [[1.0]] * rec.model.anatomy.n_heads
    assert rs.decompose(rec, grain="subvalue")["closure"].iloc[0] <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_ends_at_the_models_own_logits(family):
    """Constants included: GPT-2's final-norm bias is part of what every state says."""
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3], target=1, versus=[7, 9]))
    table = rs.stream_bs(rec)
    last = table[table["step"] == table["step"].max()]
    assert last["bs_value"].tolist() == pytest.approx([float(rec.bs_values[i]) for i in (1, 7, 9)], abs=1e-6)
    first = rs.decompose(rec).query("kind in ['embed', 'constant']")["bs_target"].sum()
    assert table["bs_value"].iloc[0] == pytest.approx(first, abs=1e-9)
    lens = rs.lens(rec, top=1)
    assert lens["step"].is_monotonic_increasing
    assert lens.query("step == step.max() and role == 'target'")["log_prob"].iloc[0] == pytest.approx(
        float(torch.log_softmax(rec.logits, -1)[1]), abs=1e-6
    )

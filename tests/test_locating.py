"""Certificates and the exact search: bound >= score, top k = exhaustive, ties included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.attribution.bounds import Bounds
from resid_surgery.attribution.searching import Search, rank
from resid_surgery.attribution.states import States
from resid_surgery.stream.blocks import stored
from resid_surgery.stream.subvalues import KINDS, candidates


def places_of(rec, kind, layers):
    return [(layer, part, block) for layer in layers for part, block in candidates(rec, kind, layer)]


def evaluate_block(states, state, block, members):
    values = states.evaluate(torch.full((len(members),), state), block.vectors(members))
    return values if block.zero is None else values.masked_fill(block.zero[members], 0.0)


norms = st.sampled_from(["frozen", "own"])
kinds = st.sampled_from(KINDS)


@given(families, dtypes, prompts(), kinds, norms)
def test_the_bound_is_never_below_the_score(family, dtype, prompt, kind, norm):
    rec = rs.record(shared(family, dtype), prompt)
    blocks = list(places_of(rec, kind, range(rec.model.anatomy.n_layers)))
    states = States.of(rec, [(i, part) for i, part, _ in blocks], own=norm == "own")
    upper = Bounds(rec, states)
    for layer, part, block in blocks:
        state = states.index[layer, part]
        exact = evaluate_block(states, state, block, torch.arange(block.count))
        assert bool((exact <= upper.upper(block, state)).all())


@given(families, dtypes, prompts(), kinds, norms, st.integers(1, 30), st.booleans(), st.data())
def test_the_top_k_is_the_exhaustive_one(family, dtype, prompt, kind, norm, k, worst, data):
    rec = rs.record(shared(family, dtype), prompt)
    n_layers = rec.model.anatomy.n_layers
    layers = data.draw(st.none() | st.lists(st.integers(-n_layers, n_layers - 1), min_size=1, max_size=2))
    table = rs.scores(rec, kind=kind, norm=norm, layers=layers)
    k = min(k, len(table))
    values = torch.tensor(table["log_prob_increase"].to_numpy()).to(dtype)
    best = rank(values, descending=not worst)[:k]
    found = rs.locate(rec, k=k, kind=kind, norm=norm, layers=layers, worst=worst)
    assert found.table["site"].tolist() == table["site"].iloc[best].tolist()
    assert found.table["log_prob_increase"].tolist() == pytest.approx(values[best].tolist(), abs=1e-5)
    assert [str(s) for s in found.sites] == found.table["site"].tolist()
    assert found.candidates == len(table)
    assert 0 <= found.evaluations <= len(table)


def test_the_certificate_saves_most_evaluations_and_says_so():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    found = rs.locate(rec, k=5)
    assert found.proof == "certificate"
    assert found.evaluations < found.candidates / 4
    assert f"{found.evaluations} exact evaluations" in repr(found)
    assert rs.locate(rec, k=5, worst=True).proof == "certificate"
    assert rs.locate(rec, k=5, score="bs_target").proof == "linear"
    assert rs.locate(rec, k=5, score="target_rank").proof == "exhaustive"


def test_equal_neurons_tie_and_go_by_index():
    """Six copies of one neuron share a score; the lowest indices win, proven, in both norms."""
    model = build("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for k in (3, 11, 17, 25, 30, 38):
            for w in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.gate_proj.bias[:, None], mlp.up_proj.bias[:, None]):
                w[k] = w[7]
            mlp.down_proj.weight[:, k] = 8 * mlp.down_proj.weight[:, 7]
    rec = rs.record(rs.load(model), rs.Prompt(ids=[5, 4, 3], target=1))
    for norm in ("frozen", "own"):
        scores = rs.scores(rec, layers=[1], norm=norm)
        copies = scores[scores["site"].isin([f"L1.N{k}" for k in (3, 11, 17, 25, 30, 38)])]
        assert copies["log_prob_increase"].max() - copies["log_prob_increase"].min() <= 1e-12
        better = int((scores["log_prob_increase"] > copies["log_prob_increase"].max() + 1e-9).sum())
        found = rs.locate(rec, k=better + 3, layers=[1], norm=norm).table["site"].tolist()
        assert found[better:] == ["L1.N3", "L1.N11", "L1.N17"]


def test_coefficients_of_zero_score_exactly_zero_without_evaluation():
    rec = rs.record(shared("opt"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    dead = sum(int((layer.groups[0].coefficient == 0).sum()) for layer in rec.layers)
    assert dead > 10  # ReLU
    everything = rs.locate(rec, k=120)
    assert everything.evaluations == 120 - dead
    zero = everything.table[everything.table["log_prob_increase"] == 0]
    assert len(zero) == dead
    order = [(s.layer, s.index) for s in (rs.parse_site(t) for t in zero["site"])]
    assert order == sorted(order)


def test_the_plain_bound_is_invalid_under_a_cap():
    """Why the capped bound exists: Jensen without the cap falls below the capped score."""
    broken = 0
    for seed in range(4):
        rec = rs.record(
            rs.load(build("gemma2", seed=seed, final_logit_softcapping=0.4)), rs.Prompt(ids=[5, 4, 3], target=1)
        )
        blocks = list(places_of(rec, "layer", range(3)))
        states = States.of(rec, [(i, part) for i, part, _ in blocks], own=False)
        readout = states.readout
        for layer, part, block in blocks:
            i = states.index[layer, part]
            exact = float(evaluate_block(states, i, block, torch.arange(1)))
            e = readout.norm.linear(block.all_vectors(), readout.s)
            plain = (readout.rows([states.token]) - states.p[:, i] @ rec.model.unembedding) @ e[0]
            broken += exact > float(plain) + 1e-9
    assert broken > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_located_tables_say_their_convention(family):
    rec = rs.record(shared(family), rs.Prompt(ids=[5, 4, 3], target=1, versus=[2]))
    table = rs.locate(rec, k=3, kind="head_source", norm="own").table
    assert table["norm"].unique().tolist() == ["own"]
    assert table["position"].unique().tolist() == [2]
    assert table["rank"].tolist() == [1, 2, 3]
    spectrum = rs.spectrum(rec, table["site"][0], top=97 // 2)
    shown = spectrum.set_index("token_id")["bs_value"]
    if 1 in shown.index:
        assert shown[1] == pytest.approx(table["bs_target"][0], abs=1e-9)


@given(st.integers(0, 3), prompts(), kinds, norms, st.floats(0.05, 0.6))
def test_the_bound_holds_where_a_soft_cap_bends_hard(seed, prompt, kind, norm, cap):
    """Values many times the cap: the curvature term of the capped bound is what keeps it valid."""
    rec = rs.record(bent(seed, cap), prompt)
    blocks = list(places_of(rec, kind, range(3)))
    states = States.of(rec, [(i, part) for i, part, _ in blocks], own=norm == "own")
    upper = Bounds(rec, states)
    for layer, part, block in blocks:
        exact = evaluate_block(states, states.index[layer, part], block, torch.arange(block.count))
        assert bool((exact <= upper.upper(block, states.index[layer, part])).all())


def bent(seed, cap):
    return rs.load(build("gemma2", seed=seed, final_logit_softcapping=round(cap, 1) or 0.1))


def test_without_its_curvature_term_the_capped_bound_is_wrong(monkeypatch):
    broken = 0
    for seed in range(4):
        rec = rs.record(bent(seed, 0.3), rs.Prompt(ids=[5, 4, 3], target=1))
        blocks = list(places_of(rec, "layer", range(3)))
        states = States.of(rec, [(i, part) for i, part, _ in blocks], own=False)
        upper = Bounds(rec, states)
        upper.curve = torch.zeros_like(upper.curve)
        for layer, part, block in blocks:
            i = states.index[layer, part]
            broken += int((evaluate_block(states, i, block, torch.arange(block.count)) > upper.upper(block, i)).sum())
    assert broken > 0


def search_of(n):
    known, floors = torch.full((n,), torch.nan, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    return Search(known, floors, 8 * torch.finfo(torch.float64).eps)


@given(st.lists(st.tuples(st.integers(-6, 6), st.floats(0, 8)), min_size=1, max_size=40), st.integers(1, 40))
def test_the_search_is_exact_for_any_scores_and_any_valid_bounds(pairs, k):
    scores = torch.tensor([float(c) for c, _ in pairs], dtype=torch.float64)
    bounds = scores + torch.tensor([b for _, b in pairs], dtype=torch.float64) + 1e-12
    search = search_of(len(pairs))
    k = min(k, len(pairs))
    expected = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], i))[:k]
    assert search.certified(k, bounds, lambda numbers: scores[numbers]) == expected
    assert search.evaluations <= len(pairs)


def test_one_last_candidate_is_still_evaluated():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.5, 3.5], dtype=torch.float64)
    bounds = torch.tensor([9.0, 8.0, 7.0, 2.6, 3.6], dtype=torch.float64)
    search = search_of(5)
    assert search.certified(3, bounds, lambda numbers: scores[numbers]) == [0, 1, 4]
    assert search.evaluations == 4


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_of_enormous_vectors_neither_overflow_nor_vanish(size, dtype):
    rec = rs.record(shared("llama", dtype), rs.Prompt(ids=[5, 4, 3], target=1))
    states = States.of(rec, [(1, "mlp")], own=False)
    x = rec.resid_mid(1)
    v = torch.randn(6, 24, generator=torch.Generator().manual_seed(0), dtype=dtype) * size
    found = states.evaluate(torch.zeros(6, dtype=torch.long), v)
    readout = states.readout
    log_p = torch.log_softmax(readout.state(torch.cat([x[None], x + v])).double(), -1)[:, 1]
    assert torch.isfinite(found).all()
    assert found.double().tolist() == pytest.approx((log_p[1:] - log_p[0]).tolist(), rel=1e-4, abs=1e-4)


def test_states_are_grouped_whatever_the_order_of_candidates():
    rec = rs.record(shared("gemma2"), rs.Prompt(ids=[5, 4, 3], target=1))
    states = States.of(rec, [(i, "mlp") for i in range(3)], own=False)
    v = torch.randn(7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    which = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    one_by_one = [float(states.evaluate(which[i : i + 1], v[i : i + 1])) for i in range(7)]
    assert states.evaluate(which, v).tolist() == pytest.approx(one_by_one, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("left", [0.3, 0.03, 0.01, 0.003])
def test_the_own_norm_bound_survives_a_vector_that_nearly_cancels_the_stream(family, left):
    """float32: |x + v| is then a difference of large numbers."""
    rec = rs.record(shared(family, torch.float32), rs.Prompt(ids=[5, 4, 3], target=1))
    states = States.of(rec, [(1, "mlp")], own=True)
    generator = torch.Generator().manual_seed(0)
    x = states.x[0]
    v = -(1 - left) * x + 0.1 * left * torch.randn(200, 24, generator=generator) * x.norm() / 5
    block = stored("attn", 1, v, [rs.Sublayer(1, "attn")] * 200)
    upper = Bounds(rec, states).upper(block, 0)
    assert bool((states.evaluate(torch.zeros(200, dtype=torch.long), v) <= upper).all())


def test_ties_do_not_chain():
    """A run of ties is as wide as rounding, however densely the values lie."""
    tie = 8 * torch.finfo(torch.float32).eps
    values = torch.arange(100, dtype=torch.float32).flip(0) * (0.6 * tie)
    order = rank(values.flip(0))
    ranked = values.flip(0)[order]
    assert float((ranked[1:] - ranked[:-1]).max()) <= 1.1 * tie
    assert ranked[0] >= ranked.max() - 1.1 * tie
    assert ranked[-1] <= ranked.min() + 1.1 * tie

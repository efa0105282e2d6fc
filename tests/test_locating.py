"""Certificates and the exact search: bound >= score, top k = exhaustive, ties included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, families, prompts
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.attribution.bounds import UpperBounds
from resid_surgery.attribution.locating import rank
from resid_surgery.attribution.scores import States, evaluate_block, places_of
from resid_surgery.stream.subvalues import KINDS

norms = st.sampled_from(["frozen", "own"])
kinds = st.sampled_from(KINDS)


@given(families, dtypes, prompts(), kinds, norms)
def test_the_bound_is_never_below_the_score(family, dtype, prompt, kind, norm):
    rec = rs.record(shared(family, dtype), prompt)
    blocks = list(places_of(rec, kind, range(rec.model.anatomy.n_layers)))
    states = States.of(rec, [(i, part) for i, part, _ in blocks], own=norm == "own")
    upper = UpperBounds(rec, states)
    for layer, part, block in blocks:
        state = states.index[layer, part]
        exact = evaluate_block(states, state, block, torch.arange(block.count))
        assert bool((exact <= upper.of(block, state)).all())


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
    assert rs.locate(rec, k=5, worst=True).proof == "exhaustive"


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
    dead = sum(int((layer.coefficient == 0).sum()) for layer in rec.layers)
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

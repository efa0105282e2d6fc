"""Scores where naive sums cancel or overflow: changes that all tokens share, hopeless and certain targets, huge values.

float32 against float64: the same model, the same prompt.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.attribution.scoring import Increase
from resid_surgery.attribution.states import States

INCREASES = ["log_prob_increase", "prob_increase", "log_prob_alone", "leave_one_out"]


def shifted(times, **changes):
    """(float64, float32) of a model whose unembedding rows have much in common: whatever writes along that moves all
    logits together."""
    double = build("llama", **changes)
    with torch.no_grad():
        rows = double.lm_head.weight
        common = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(1), dtype=rows.dtype)
        rows += times * common / common.norm()
    return rs.load(double), rs.load(copy.deepcopy(double).float())


@pytest.mark.parametrize("times", [0.0, 30.0, 100.0])
@pytest.mark.parametrize("kind", ["layer", "neuron"])
def test_what_all_logits_share_drops_out_of_a_score(times, kind):
    tables = []
    for model in shifted(times):
        rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 7], target=1))
        tables.append(rs.scores(rec, kind=kind, score=INCREASES))
    double, single = tables
    for name in INCREASES:
        size = 1 + double[name].abs()
        assert float(((single[name] - double[name]).abs() / size).max()) <= 3e-4, name


@pytest.mark.parametrize("times", [0.0, 30.0, 100.0])
def test_a_sweep_and_a_single_intervention_agree_where_all_logits_move(times):
    for model in shifted(times):
        rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 7], target=1))
        sites = [f"L{layer}.{part}" for layer in range(3) for part in ("attn", "mlp")]
        swept = rs.sweep(rec, [rs.Zero(one) for one in sites], measure="all")
        near = 1e-6 if model.dtype == torch.float64 else 1e-4  # its norms are computed in float32
        for row, one in zip(swept.itertuples(), sites, strict=True):
            single = rs.intervene(rec, rs.Zero(one)).summary.iloc[0]
            assert row.log_prob_change == pytest.approx(single["log_prob_change"], rel=near, abs=10 * near), one
            assert row.kl == pytest.approx(single["kl"], rel=near, abs=10 * near), one


@given(st.sampled_from(FAMILIES), st.sampled_from([torch.float32, torch.float64]), st.floats(1.0, 2000.0))
def test_a_score_does_not_depend_on_what_is_scored_beside_it(family, dtype, huge):
    rec = rs.record(shared(family, dtype), rs.Prompt(ids=[5, 4, 3], target=1))
    states = States.of(rec, [(1, "mlp")], own=False)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(3, rec.model.anatomy.d_model, generator=generator).to(states.x) * 1e-3
    large = torch.randn(1, rec.model.anatomy.d_model, generator=generator).to(states.x) * huge
    alone = states.evaluate(torch.zeros(3, dtype=torch.long), small)
    beside = states.evaluate(torch.zeros(4, dtype=torch.long), torch.cat([small, large]))
    near = 32 * torch.finfo(dtype).eps * float(alone.abs().max())
    assert float((beside[:3] - alone).abs().max()) <= near + 1e-12 + 4 * torch.finfo(dtype).eps * 1e-2


@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize("target", [0, 11, 40, 96])
def test_certain_and_hopeless_targets_have_finite_scores_within_their_bounds(scale, target):
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= scale
    rec = rs.record(rs.load(model), rs.Prompt(ids=[5, 4, 3], target=target))
    for name in INCREASES:
        exact = rs.scores(rec, score=name)
        assert torch.isfinite(torch.tensor(exact[name].to_numpy())).all()
        bounds = rs.scores(rec, score=name, bounds=True)
        assert (exact[name] <= bounds[f"{name}_upper"]).all()
        assert (exact[name] >= bounds[f"{name}_lower"]).all()
        for worst in (False, True):
            found = rs.locate(rec, k=5, score=name, worst=worst)
            first = exact[name].sort_values(ascending=worst).to_numpy()[:5]
            assert found.table[name].tolist() == pytest.approx(first.tolist(), rel=1e-4, abs=1e-4)
    assert rs.scores(rec, score="prob_increase")["prob_increase"].abs().max() <= 1 + 1e-6


def test_scores_that_are_no_numbers_are_refused_by_name(monkeypatch):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3], target=1))
    plain = Increase._mapped
    monkeypatch.setattr(Increase, "_mapped", lambda self, c, state: plain(self, c, state) * torch.nan)
    for verb in (rs.scores, lambda rec: rs.locate(rec, k=3)):
        with pytest.raises(rs.ClosureError, match=r"'log_prob_increase' under the frozen norm is not finite"):
            verb(rec)


def test_nothing_has_a_score_also_without_an_eps():
    rec = rs.record(rs.load(build("llama", rms_norm_eps=0.0)), rs.Prompt(ids=[5, 4, 3], target=1))
    table = rs.scores(rec, norm="own", score="log_prob_alone")["log_prob_alone"]
    assert table.notna().all()
    assert len(rs.locate(rec, norm="own", score="log_prob_alone", k=3).sites) == 3


def test_autocast_is_refused_and_inference_mode_is_not():
    model = shared("llama", torch.float32)
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1))
    plain = rs.scores(rec, score="grad_times_activation")["grad_times_activation"]
    with torch.autocast("cpu", torch.bfloat16):
        for verb in (lambda: rs.scores(rec), lambda: rs.record(model, rs.Prompt(ids=[1], target=2))):
            with pytest.raises(rs.ArgumentError, match=r"torch\.autocast is on"):
                verb()
    with torch.inference_mode():
        again = rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1))
        assert rs.scores(again, score="grad_times_activation")["grad_times_activation"].tolist() == plain.tolist()


def test_too_many_are_refused_by_the_prompts_number_before_anything_is_recorded(monkeypatch):
    from resid_surgery.attribution import locating
    from resid_surgery.evidence import trials

    for room in (locating, trials):
        monkeypatch.setattr(room, "record", lambda *_, **__: pytest.fail("a forward ran"))
    model = shared("llama")
    prompts = [rs.Prompt(ids=[5, 4, 3], target=1), rs.Prompt(ids=[5], target=1)]
    with pytest.raises(rs.ArgumentError, match=r"prompt 1: .*at most 12, the candidates of kind 'head_source'"):
        rs.locate_many(model, prompts, kind="head_source", k=20)
    with pytest.raises(rs.ArgumentError, match="prompt 0: `sets` must be at most 120"):
        rs.ablation_test(model, prompts, sets={"many": {"neuron": 1000}})

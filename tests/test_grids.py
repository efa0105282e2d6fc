"""Grids, patching between prompts, additivity, and effects at several positions."""

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.surgery.effects import PARTS

mpl.use("Agg")
CLEAN = rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7, 9])
CORRUPT = rs.Prompt(ids=[5, 8, 3, 2], target=7, versus=[1])


def recordings(family, clean=CLEAN, corrupt=CORRUPT, **options):
    return [rs.record(shared(family), one, **options) for one in (clean, corrupt)]


def m(run, clean=CLEAN):
    bs = run.bs.double()
    return float(bs[clean.target] - bs[list(clean.versus)].mean())


def test_a_grid_has_a_row_for_every_site_at_every_position():
    rec, _ = recordings("llama")
    rows = rs.grid(rec, rs.Zero, "L*.H0,1", positions="each")
    assert len(rows) == 3 * 2 * 4
    assert rows[5] == (
        {"site": "L0.H1", "kind": "Head", "layer": 0, "head": 1, "position": 1, "token": "#4"},
        rs.Zero("L0.H1", positions=1),
    )
    pairs = rs.grid(rec, rs.Zero, "L1.H0<*", positions="each")
    assert [(c["source"], c["position"]) for c, _ in pairs] == [(j, p) for j in range(4) for p in range(j, 4)]
    scaled = rs.grid(rec, lambda one, positions: rs.Scale(one, 2.0, positions=positions), ["L0.mlp", "L1.N0:2"])
    assert [op for _, op in scaled] == [rs.Scale(one, 2.0, positions=3) for one in ("L0.mlp", "L1.N0", "L1.N1")]
    with pytest.raises(rs.ArgumentError, match="`operation` must be callable as"):
        rs.grid(rec, rs.Scale, "L1.mlp")
    with pytest.raises(rs.SiteError, match="without positions"):
        rs.grid(rec, rs.Zero, "L1.mlp@2")


def test_sources_of_a_slice_run_up_to_the_position_that_it_is_for():
    rec, _ = recordings("llama")
    whole = rs.intervene(rec, rs.Zero("L0.H0", positions=[2])).after.bs
    for one in (rs.Zero("L0.H0<*@2"), rs.Zero("L0.H0<*@2", positions=0), rs.Zero("L0.H0<*", positions=2)):
        assert torch.allclose(rs.intervene(rec, one).after.bs, whole, atol=1e-9)
    both = rs.intervene(rec, rs.Zero("L0.H0<*", positions=[1, 3])).after.bs
    assert torch.allclose(both, rs.intervene(rec, rs.Zero("L0.H0", positions=[1, 3])).after.bs, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_scores_are_the_share_of_the_difference(family, direction):
    clean, corrupt = recordings(family, positions="all")
    run, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    table = rs.patching(clean, corrupt, ["L*.resid_pre", "L1.H1", "L1.mlp"], direction=direction, measure="all")
    m_run, m_donor = (m(rs.intervene(one, rs.Scale("L0.mlp", 1.0)).before) for one in (run, donor))
    for row in table.to_dict("records"):
        effect = rs.intervene(run, rs.Patch(row["site"], donor, positions=[row["position"]]))
        # a small difference of large numbers, through norms that are computed in float32
        assert row["score"] == pytest.approx((m(effect.after) - m_run) / (m_donor - m_run), abs=1e-4)
    assert table.attrs["direction"] == direction
    first = table[(table["site"] == "L0.resid_pre")].set_index("position")["score"]
    assert first[1] == pytest.approx(1.0, abs=1e-4)  # the only token that differs
    assert first.drop(1).abs().max() <= 1e-4


def test_states_that_are_the_same_in_both_prompts_are_not_run():
    clean, corrupt = recordings("llama", positions="all")
    table = rs.patching(clean, corrupt)
    none = table["frame"] == "none"
    assert none.sum() >= 3
    assert (table.loc[none, "score"] == 0).all()
    assert (table.loc[table["position"] == 0, "score"].abs() <= 1e-9).all()


def test_prompts_of_other_lengths_are_aligned_as_said():
    clean, corrupt = recordings("llama", corrupt=rs.Prompt(ids=[6, 5, 8, 3, 2], target=7))
    by_text = rs.patching(clean, corrupt, "L*.resid_pre", align="token", positions=[1, 3, 4])
    given = rs.patching(clean, corrupt, "L*.resid_pre", align={1: 0, 3: 2, 4: 3}, positions=[1, 3, 4])
    pd.testing.assert_frame_equal(by_text, given)
    with pytest.raises(rs.InterventionError, match=r"position 0 \('#6'\) has no counterpart in"):
        rs.patching(clean, corrupt, "L*.resid_pre", align="token")
    with pytest.raises(rs.InterventionError, match="must differ in what is measured"):
        rs.patching(clean, clean)
    with pytest.raises(rs.ArgumentError, match="one of denoise, noise"):
        rs.patching(clean, corrupt, direction="denois")


@pytest.mark.parametrize("family", FAMILIES)
def test_interaction_is_what_the_joint_effect_has_over_the_singles(family):
    rec, _ = recordings(family)
    ops = [rs.Zero(["L0.N3", "L1.H1"]), rs.Scale("L1.mlp", 0.5)]
    table = rs.additivity(rec, ops).set_index("role")
    singles = [rs.intervene(rec, op) for op in (rs.Zero("L0.N3"), rs.Zero("L1.H1"), rs.Scale("L1.mlp", 0.5))]
    wanted = [effect.table["bs_change"][0] for effect in singles]
    joint = rs.intervene(rec, ops).table["bs_change"][0]
    assert table.loc["single", "bs_change_target"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert table.loc["joint", "bs_change_target"] == pytest.approx(joint, abs=1e-6)
    assert table.loc["interaction", "bs_change_target"] == pytest.approx(joint - sum(wanted), abs=1e-6)
    assert len(rs.additivity(rec, rs.Set(["L0.N3", "L1.N4"], [[1.0], [2.0]]))) == 5
    with pytest.raises(rs.ArgumentError, match="`where` does not go with additivity"):
        rs.additivity(rec, ops, where=lambda row: True)
    with pytest.raises(rs.InterventionError, match="at least two"):
        rs.additivity(rec, rs.Zero("L0.N3"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_effect_is_split_at_every_measured_position(family):
    rec, _ = recordings(family)
    ops = [rs.Zero("L1.H1", positions=[1, 3]), rs.Scale("L0.mlp", 2.0, positions=[2]), rs.Cut("L0.mlp", "unembed")]
    effect = rs.intervene(rec, ops, at=[1, 2, "target"])
    assert effect.table["closure"].max() <= 1e-6
    assert effect.summary["position"].tolist() == [1, 2, 3]
    for position in (1, 2, 3):
        alone = rs.record(shared(family), rs.Prompt(ids=CLEAN.ids, target=1, versus=CLEAN.versus, position=position))
        same = rs.intervene(alone, [*ops[:2], rs.Cut("L0.mlp", "unembed", positions=[3])])
        mine = effect.table[effect.table["position"] == position]
        assert mine[["bs_change", *PARTS]].to_numpy() == pytest.approx(
            same.table[["bs_change", *PARTS]].to_numpy(), abs=1e-6
        )
        ledger = effect.ledger(position)
        assert ledger["closure"].iloc[0] <= 1e-6
        assert (ledger["position"] == position).all()
    with pytest.raises(rs.ArgumentError, match=r"one of \[1, 2, 3\]"):
        effect.ledger(0)


def test_the_summary_is_of_whole_distributions():
    rec, _ = recordings("gemma2")
    effect = rs.intervene(rec, rs.Zero("L1.mlp"))
    p, q = (torch.softmax(run.logits.double(), -1) for run in (effect.before, effect.after))
    row = effect.summary.iloc[0]
    assert row["kl"] == pytest.approx(float((p * (p / q).log()).sum()))
    assert row["entropy_before"] == pytest.approx(-float((p * p.log()).sum()))
    assert row["entropy_after"] == pytest.approx(-float((q * q.log()).sum()))
    assert row["log_prob_change"] == pytest.approx(float((q[1] / p[1]).log()))
    assert (row["top_before"], row["top_after"]) == (f"#{int(p.argmax())}", f"#{int(q.argmax())}")


def test_an_edge_into_the_unembedding_is_a_ledger_row_of_its_own():
    rec, _ = recordings("gpt2")
    for norm in ("live", "frozen"):
        effect = rs.intervene(rec, rs.Cut("L1.mlp", "unembed", norm=norm))
        row = effect.ledger().set_index("site").loc["unembed"]
        assert row["bs_change"] == pytest.approx(row["direct"])
        assert effect.ledger()["closure"].iloc[0] <= 1e-9
        assert (effect.table["indirect"].abs() <= 1e-9).all()
        if norm == "frozen":
            assert (effect.table["norm_scale"].abs() <= 1e-9).all()
            assert effect.table["bs_change"][0] == pytest.approx(row["direct"])


def test_a_grid_is_drawn_with_its_tokens():
    clean, corrupt = recordings("llama", positions="all")
    table = rs.patching(clean, corrupt)
    axes = rs.plot_grid(table, "score")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0 '#5'", "1 '#8'", "2 '#3'", "3 '#2'"]
    assert axes.images[0].get_array().shape == (3, 4)
    heads = rs.plot_grid(rs.sweep(clean, rs.grid(clean, rs.Zero, "L*.H*")), "log_prob_change")
    assert heads.get_xlabel() == "head"
    with pytest.raises(rs.ArgumentError, match="a column of the table"):
        rs.plot_grid(table, "scores")

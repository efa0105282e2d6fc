"""Plans: rows of a run against the same interventions by hand, and plans as plain data."""

import itertools
import json
import random

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.experiments.plans import differences

IDS = {"ids": [5, 4, 3, 2], "target": 1, "versus": [7, 9]}
DONOR = {"ids": [8, 9, 6, 3], "target": 1}
OTHER = {"ids": [1, 9, 2, 3], "target": 1}
MEASURED = ("bs_target", "bs_change_target", "bs_versus_1", "bs_change_versus_2", "log_prob", "log_prob_change", "prob",
            "kl", "direct")  # fmt: skip


def model(family="llama"):
    return shared(family) if family in FAMILIES else rs.load(rs.tiny(family, dtype=torch.float64))


def bound(given):
    return rs.Prompt(**given)


def go(tmp_path, plan, prompts=(IDS,), opened=None, **options):
    run = rs.run(
        opened or model(), list(prompts), plan, out=tmp_path / "run", progress=False, max_failures=0, **options
    )
    assert run.status["finished"]
    return run


def by_hand(rows, prompt=IDS, opened=None, measure="log_prob"):
    """Each row in a sweep of its own, from a recording of its own."""
    rec = rs.record(opened or model(), bound(prompt))
    return pd.concat([rs.sweep(rec, [one], measure=measure, progress=False) for one in rows], ignore_index=True)


def same(rows, expected, columns=MEASURED):
    assert len(rows) == len(expected)
    for name in columns:
        there = expected[name].astype(float).to_numpy()
        assert rows[name].astype(float).to_numpy() == pytest.approx(there, rel=1e-6, abs=1e-6), name


def ramp(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- every operation

WIDTH = 24
OPERATIONS = {
    "Zero": (rs.Zero("L0.mlp"), {"kind": "Zero", "sites": "L0.mlp"}),
    "Zero all": (rs.Zero("L0.mlp", positions="all"), {"kind": "Zero", "sites": ["L0.mlp"], "positions": "all"}),
    "Zero two": (rs.Zero("L0.mlp", positions=[0, 2]), {"kind": "Zero", "sites": "L0.mlp", "positions": [0, 2]}),
    "Zero at": (rs.Zero("L0.mlp@1"), {"kind": "Zero", "sites": "L0.mlp@1"}),
    "Scale": (rs.Scale(["L1.H1", "L0.H0"], 2.0), {"kind": "Scale", "sites": ["L1.H1", "L0.H0"], "factor": 2}),
    "Scale edge": (rs.Scale("L0.mlp->unembed", 3.0), {"kind": "Scale", "sites": "L0.mlp->unembed", "factor": 3.0}),
    "Clamp": (rs.Clamp("L1.N7", 2.5), {"kind": "Clamp", "sites": "L1.N7", "value": 2.5}),
    "Attend": (
        rs.Attend("L1.H0<1", 0.0, renormalise=True),
        {"kind": "Attend", "sites": "L1.H0<1", "weight": 0.0, "renormalise": True},
    ),
    "Cut": (rs.Cut("L0.attn", "L2.H1"), {"kind": "Cut", "sites": "L0.attn->L2.H1"}),
    "Steer by vector": (
        rs.Steer("L1.resid_pre", ramp(WIDTH)),
        {"kind": "Steer", "sites": "L1.resid_pre", "vector": ramp(WIDTH).tolist()},
    ),
    "Steer toward": (
        rs.Steer("L1.resid_pre", toward=3, away=4, times=0.5),
        {"kind": "Steer", "sites": "L1.resid_pre", "toward": 3, "away": 4, "times": 0.5},
    ),
    "Steer toward its own": (
        rs.Steer("L1.resid_pre", toward=1, away=7),
        {"kind": "Steer", "sites": "L1.resid_pre", "toward": "$target", "away": "$versus"},
    ),
    "Set": (
        rs.Set("L1.attn", [ramp(WIDTH)]),
        {"kind": "Set", "sites": "L1.attn", "values": [ramp(WIDTH).tolist()]},
    ),
    "Set at two": (
        rs.Set(["L1.N3"], [[[1.0], [2.0]]], positions=[0, 3]),
        {"kind": "Set", "sites": ["L1.N3"], "values": [[[1.0], [2.0]]], "positions": [0, 3]},
    ),
    "Patch": (rs.Patch("L1.mlp", bound(DONOR)), {"kind": "Patch", "sites": "L1.mlp", "donor": DONOR}),
    "Patch aligned": (
        rs.Patch("L1.mlp", bound(DONOR), positions=[1, 3], align={1: 0, 3: 2}),
        {"kind": "Patch", "sites": "L1.mlp", "donor": DONOR, "positions": [1, 3], "align": {"1": 0, "3": 2}},
    ),
    "Patch of the case": (
        rs.Patch("L1.mlp", bound(OTHER)),
        {"kind": "Patch", "sites": "L1.mlp", "donor": "$corrupt"},
    ),
    "Mean": (
        rs.Mean("L1.mlp", [bound(DONOR), bound(OTHER)]),
        {"kind": "Mean", "sites": "L1.mlp", "over": [DONOR, OTHER]},
    ),
    "Mean of the case": (
        rs.Mean("L0.H1", [bound(OTHER), bound(DONOR)]),
        {"kind": "Mean", "sites": "L0.H1", "over": "$both"},
    ),
}  # fmt: skip
HELD = IDS | {"donors": {"corrupt": OTHER, "both": [DONOR, OTHER]}}


def test_every_operation_equals_the_same_by_hand(tmp_path):
    """All in one run, each an arm; among them operations of a prompt's own donors."""
    run = go(tmp_path, {"intervene": {name: plain for name, (_, plain) in OPERATIONS.items()}}, [HELD])
    rows = run.rows
    assert rows["arm"].tolist() == list(OPERATIONS)
    same(rows, by_hand([one for one, _ in OPERATIONS.values()]))
    assert rows["operation"].tolist() == [type(one).__name__ for one, _ in OPERATIONS.values()]
    assert (rows["bs_change_target"].abs() > 1e-9).all(), "an operation did nothing"


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "own" not in name and "case" not in name])
def test_interventions_and_plain_data_are_the_same_plan(name):
    one, plain = OPERATIONS[name]
    made = rs.Plan(intervene=one)
    again = rs.Plan.of(json.loads(json.dumps(made.entry())))
    assert again == made
    assert again.hash == made.hash
    assert made.intervene["main"][0].items() >= {"kind": plain["kind"]}.items()


def test_operations_together(tmp_path):
    together = [rs.Zero("L0.mlp"), rs.Scale("L1.H1", 2.0), rs.Steer("L2.resid_pre", ramp(WIDTH))]
    rows = go(tmp_path, rs.Plan(intervene=together)).rows
    same(rows, by_hand([together]))
    assert rows.loc[0, ["arm", "operation", "site", "size"]].tolist() == ["main", "Zero+Scale+Steer", "3 sites", 3]


@pytest.mark.parametrize("positions", ["target", "each", 1])
@pytest.mark.parametrize("sites", ["L*.H*", "L*.mlp", "L1.H0<*", "L0,2.N3:6"])
def test_each_equals_a_grid(tmp_path, sites, positions):
    rows = go(tmp_path, {"intervene": {"kind": "Zero", "sites": sites, "each": True, "positions": positions}}).rows
    rec = rs.record(model(), bound(IDS))
    expected = rs.sweep(rec, rs.grid(rec, rs.Zero, sites, positions=positions), progress=False)
    same(rows, expected)
    for name in ("site", "kind", "layer", "head", "index", "source", "position", "token"):
        if name in expected:
            assert rows[name].astype(object).where(rows[name].notna(), None).tolist() == [
                None if pd.isna(one) else one for one in expected[name]
            ], name
    assert rows["size"].eq(1).all()


@pytest.mark.parametrize("sites", ["L*.H*", "L*.mlp"])
def test_each_at_two_positions_together(tmp_path, sites):
    plan = {"intervene": {"kind": "Zero", "sites": sites, "each": True, "positions": [0, 2]}}
    rows = go(tmp_path, plan).rows
    same(rows, by_hand([rs.Zero(site, positions=[0, 2]) for site in rows["site"]]))
    rec = rs.record(model(), bound(IDS))
    assert rows["site"].tolist() == [named["site"] for named, _ in rs.grid(rec, rs.Zero, sites)]
    assert rows["position"].isna().all()


def test_each_position_of_several_sites_together(tmp_path):
    plan = {"intervene": {"kind": "Zero", "sites": ["L0.mlp", "L1.mlp"], "positions": "each"}}
    rows = go(tmp_path, plan).rows
    same(rows, by_hand([rs.Zero(["L0.mlp", "L1.mlp"], positions=at) for at in range(4)]))
    assert rows["position"].tolist() == [0, 1, 2, 3]
    assert rows["size"].tolist() == [2] * 4


def test_each_beside_fixed_operations(tmp_path):
    plan = {
        "intervene": [
            {"kind": "Zero", "sites": "L*.mlp"},
            {"kind": "Scale", "sites": "L1.H*", "factor": 0, "each": True},
        ]
    }
    rows = go(tmp_path, plan).rows
    same(rows, by_hand([[rs.Zero("L*.mlp"), rs.Scale(f"L1.H{h}", 0.0)] for h in range(4)]))
    assert rows["size"].tolist() == [4] * 4
    assert rows["operation"].tolist() == ["Zero+Scale"] * 4


# ---- axes


def test_products_of_axes(tmp_path):
    """Rows in the order of arms, then axes, the last fastest; an arm has the product of what it names alone."""
    plan = rs.Plan(
        axes={"factor": [0, 2.5], "layer_": [0, 1, 2], "where": [0, 3]},
        intervene={
            "a": {"kind": "Scale", "sites": "$site", "factor": "$factor"} | {"sites": "L1.mlp"},
            "b": {"kind": "Scale", "sites": "L0.mlp", "factor": "$factor", "positions": "$where"},
            "c": {"kind": "Attend", "sites": "L1.H0<0", "weight": "$layer_"},
        },
    )
    assert plan.cells == {"a": 2, "b": 4, "c": 3}
    rows = go(tmp_path, plan).rows
    hand = [rs.Scale("L1.mlp", f) for f in (0.0, 2.5)]
    hand += [rs.Scale("L0.mlp", f, positions=p) for f, p in itertools.product((0.0, 2.5), (0, 3))]
    hand += [rs.Attend("L1.H0<0", float(w)) for w in (0, 1, 2)]
    same(rows, by_hand(hand))
    assert rows["arm"].tolist() == ["a"] * 2 + ["b"] * 4 + ["c"] * 3
    assert rows["factor"].tolist()[:6] == [0, 2.5, 0, 0, 2.5, 2.5]
    assert rows["factor"].isna().tolist()[6:] == [True] * 3
    assert rows["layer_"].tolist()[6:] == [0, 1, 2]


def test_an_axis_of_mixed_values_is_refused(tmp_path):
    with pytest.raises(rs.ArgumentError, match="one kind"):
        go(tmp_path, {"axes": {"w": [0, "all"]}, "intervene": {"kind": "Zero", "sites": "L0.mlp", "positions": "$w"}})


def test_axes_inside_sites_donor_alignments_and_kinds(tmp_path):
    plan = {
        "axes": {"site_": ["L0.mlp", "L1.H0"], "q": [0, 2], "what": ["neuron", "head"]},
        "locate": {"best": {"kind": "$what", "k": 1}},
        "intervene": {
            "a": {"kind": "Zero", "sites": ["L2.mlp", "$site_"]},
            "b": {"kind": "Patch", "sites": "L1.mlp", "donor": DONOR, "positions": [1], "align": {"1": "$q"}},
            "c": {"kind": "Zero", "sites": "$best"},
        },
    }
    rows = go(tmp_path, plan).rows
    rec = rs.record(model(), bound(IDS))
    hand = [rs.Zero(["L2.mlp", site]) for site in ("L0.mlp", "L1.H0")]
    hand += [rs.Patch("L1.mlp", bound(DONOR), positions=[1], align={1: q}) for q in (0, 2)]
    hand += [rs.Zero(rs.locate(rec, k=1, kind=kind).sites) for kind in ("neuron", "head")]
    same(rows, by_hand(hand))


# ---- sets


@pytest.mark.parametrize("kind", ["neuron", "head", "attn_neuron", "head_source", "layer"])
@pytest.mark.parametrize("score", ["log_prob_increase", "bs_target"])
def test_prefixes_equal_separate_searches(tmp_path, kind, score):
    """One search at the largest k stands for all."""
    plan = {
        "axes": {"k": [3, 1, 2], "worst_": [False, True] if score == "bs_target" else [False]},
        "locate": {"best": {"kind": kind, "k": "$k", "score": score, "worst": "$worst_"}},
        "intervene": {
            "best": {"kind": "Zero", "sites": "$best"},
            "one": {"kind": "Zero", "sites": "$best", "each": True},
        },
    }
    run = go(tmp_path, plan)
    rec = rs.record(model(), bound(IDS))
    cells = list(itertools.product((3, 1, 2), plan["axes"]["worst_"]))
    found = [rs.locate(rec, k=k, kind=kind, score=score, worst=w, progress=False) for k, w in cells]
    same(run.rows, by_hand([rs.Zero(one.sites) for one in found] + [rs.Zero(s) for one in found for s in one.sites]))
    located = run.read("located")
    for worst in plan["axes"]["worst_"]:
        table = located[located["worst_"] == worst]
        expected = rs.locate(rec, k=3, kind=kind, score=score, worst=worst, progress=False)
        assert table["site"].tolist() == [str(site) for site in expected.sites]
        assert table["value"].tolist() == pytest.approx(expected.table[score].tolist(), rel=1e-9)
        assert table["bs_target"].tolist() == pytest.approx(expected.table["bs_target"].tolist(), rel=1e-9)
        assert table["rank"].tolist() == [1, 2, 3]


def test_an_axis_that_is_k_and_more(tmp_path):
    """Each cell is a search of its own then."""
    plan = {
        "axes": {"n": [1, 2]},
        "locate": {"best": {"k": "$n", "layers": "$n"}},
        "intervene": {"kind": "Zero", "sites": "$best", "each": True},
    }
    run = go(tmp_path, plan)
    rec = rs.record(model(), bound(IDS))
    expected = [str(s) for n in (1, 2) for s in rs.locate(rec, k=n, layers=[n]).sites]
    assert run.rows["site"].tolist() == expected
    assert run.read("located")["n"].tolist() == [1, 2, 2]
    assert run.read("located")["site"].tolist() == expected


def drawn(tmp_path, prompts, seed=0, draws=(0, 1, 2), k=(1, 4), opened=None, **more):
    plan = rs.Plan(
        axes={"k": list(k), "draw": list(draws)},
        locate={"best": {"k": "$k", **more}, "others": {"like": "best", "draw": "$draw"}},
        intervene={"others": {"kind": "Zero", "sites": "$others"}},
        seed=seed,
    )
    return go(tmp_path, plan, prompts, opened)


def sets(run):
    table = run.read("located")
    table = table[table["set"] == "others"]
    return {key: some["site"].tolist() for key, some in table.groupby(["prompt", "draw"])}


def test_random_sets(tmp_path):
    prompts = [IDS, OTHER, DONOR]
    run = drawn(tmp_path / "a", prompts, layers=[1, 2])
    found, located = sets(run), run.read("located")
    best = {p: some["site"].tolist() for p, some in located[located["set"] == "best"].groupby("prompt")}
    assert len(found) == 9
    for (prompt, _), some in found.items():
        assert len(some) == len(set(some)) == 4
        assert not set(some) & set(best[prompt])
        assert all(site.startswith(("L1.N", "L2.N")) for site in some)
    assert len({tuple(some) for some in found.values()}) == 9, "draws are not independent"
    assert sets(drawn(tmp_path / "b", prompts, layers=[1, 2])) == found
    assert sets(drawn(tmp_path / "c", prompts, seed=1, layers=[1, 2])) != found
    for (prompt, draw), some in sets(drawn(tmp_path / "d", prompts, draws=[2, 0], layers=[1, 2])).items():
        assert some == found[prompt, draw], "a draw depends on the others"


def test_random_rows_are_prefixes(tmp_path):
    run = drawn(tmp_path, [IDS], draws=[0], k=(1, 4))
    some = sets(run)[0, 0]
    same(run.rows, by_hand([rs.Zero(some[:1]), rs.Zero(some)]))
    assert run.rows["size"].tolist() == [1, 4]


def test_random_sites_are_spread_over_all_candidates(tmp_path):
    """Far from only the first layers, and none of them preferred."""
    run = drawn(tmp_path, [{"ids": [n, 3], "target": 5} for n in range(12)], draws=range(5), k=(10,))
    layers = run.read("located", where={"set": "others"})["layer"].value_counts()
    assert layers.sum() == 600
    assert layers.between(150, 250).all(), layers  # 200 each; four standard deviations are 46


def test_too_few_others_are_left(tmp_path):
    plan = {"locate": {"best": {"kind": "layer", "k": 4}, "others": {"like": "best"}}}
    run = rs.run(model(), [IDS], plan, out=tmp_path / "run", max_failures=None)
    assert run.failures["message"].str.contains("as many as are left").all()
    assert run.failures["stage"].tolist() == ["locate"]


def test_fixed_sets(tmp_path):
    plan = {
        "axes": {"h": ["L1.H0", "L1.H1"]},
        "locate": {"mine": {"sites": ["L0.mlp", "$h"]}, "slice": {"sites": "L*.attn"}},
        "intervene": {"a": {"kind": "Zero", "sites": "$mine"}, "b": {"kind": "Zero", "sites": "$slice", "each": True}},
    }
    run = go(tmp_path, plan)
    hand = [rs.Zero(["L0.mlp", f"L1.H{h}"]) for h in range(2)] + [rs.Zero(f"L{i}.attn") for i in range(3)]
    same(run.rows, by_hand(hand))
    assert "located" not in run.tables


# ---- measures, models, labels


def test_effect_equals_intervene(tmp_path):
    plan = {"intervene": {"a": {"kind": "Zero", "sites": "L*.mlp", "each": True}}, "measure": "effect"}
    run = go(tmp_path, plan, [IDS, DONOR])
    rows, effects = run.rows, run.read("effects")
    for number, prompt in enumerate((IDS, DONOR)):
        rec = rs.record(model(), bound(prompt))
        for layer in range(3):
            expected = rs.intervene(rec, rs.Zero(f"L{layer}.mlp"), movers=0)
            table = effects[(effects["prompt"] == number) & (effects["row"] == layer)].reset_index(drop=True)
            for name in expected.table.columns.difference(["position", "norm", "logit_before", "logit_after"]):
                here, there = table[name].tolist(), expected.table[name].tolist()
                assert here == (
                    pytest.approx(there, rel=1e-9, abs=1e-11) if expected.table[name].dtype.kind == "f" else there
                )
            row, first = rows[(rows["prompt"] == number) & (rows["row"] == layer)].iloc[0], expected.table.iloc[0]
            for name in ("direct", "post_norm", "norm_scale", "indirect", "bs_change_target", "log_prob_change"):
                assert row[name] == pytest.approx(
                    first[name.replace("bs_change_target", "bs_change")], rel=1e-9, abs=1e-11
                )
            assert row["kl"] == pytest.approx(expected.summary["kl"].iloc[0], rel=1e-9)
    assert rows["bs_versus_1"].notna().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("measure", ["bs", "log_prob", "all"])
def test_measures(tmp_path, measure):
    rows = go(tmp_path, rs.Plan(rs.Zero("L0.mlp"), measure=measure)).rows
    expected = by_hand([rs.Zero("L0.mlp")], measure=measure)
    same(rows, expected, [name for name in expected.select_dtypes("number") if name in rows and name != "layer"])
    assert ("kl" in rows, "entropy" in rows) == (measure != "bs", measure == "all")
    if measure == "all":
        assert rows["top"].tolist() == expected["top"].tolist()


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen3_moe", "olmo2"])
def test_families(tmp_path, family):
    opened = model(family)
    plan = {
        "locate": {"best": {"k": 2}, "others": {"like": "best"}},
        "intervene": {
            "best": {"kind": "Zero", "sites": "$best"},
            "others": {"kind": "Zero", "sites": "$others"},
            "each": {"kind": "Scale", "sites": "$best", "factor": 2.0, "each": True},
            "mlps": {"kind": "Zero", "sites": "L*.mlp", "each": True},
        },
    }
    run = go(tmp_path, plan, [IDS, DONOR, OTHER | {"ids": [1, 2]}], opened)
    for number, prompt in enumerate((IDS, DONOR, OTHER | {"ids": [1, 2]})):
        rec = rs.record(opened, bound(prompt))
        best = rs.locate(rec, k=2, progress=False).sites
        others = run.read("located", where={"set": "others", "prompt": number})["site"].tolist()
        hand = [rs.Zero(best), rs.Zero(others), *(rs.Scale(site, 2.0) for site in best)]
        hand += [rs.Zero(f"L{i}.mlp") for i in range(opened.anatomy.n_layers)]
        names = [name for name in MEASURED if "versus" not in name or "versus" in prompt]
        same(run.rows[run.rows["prompt"] == number].reset_index(drop=True), by_hand(hand, prompt, opened), names)


def test_experts_have_their_column(tmp_path):
    opened = model("mixtral")
    run = go(
        tmp_path,
        {"locate": {"best": {"k": 3}}, "intervene": {"kind": "Zero", "sites": "$best", "each": True}},
        [IDS],
        opened,
    )
    assert run.rows["kind"].tolist() == ["ExpertNeuron"] * 3
    for row in run.rows.itertuples():
        assert row.site == f"L{row.layer}.E{row.expert}.N{row.index}"


def test_competitors_of_some_prompts_only(tmp_path):
    prompts = [{"ids": [1, 2], "target": 3}, IDS, {"ids": [1, 3], "target": 3, "versus": [4]}]
    rows = go(tmp_path, rs.Plan(rs.Zero("L0.mlp")), prompts).rows
    assert rows["bs_versus_1"].notna().tolist() == [False, True, True]
    assert rows["bs_change_versus_2"].notna().tolist() == [False, True, False]
    for number, prompt in enumerate(prompts):
        names = [name for name in MEASURED if rows[name].notna()[number]]
        same(rows[number : number + 1], by_hand([rs.Zero("L0.mlp")], prompt), names)


def test_its_own_competitor_is_wanted(tmp_path):
    plan = {"intervene": {"kind": "Steer", "sites": "L0.resid_pre", "toward": "$target", "away": "$versus"}}
    run = rs.run(model(), [IDS, OTHER], plan, out=tmp_path / "run", max_failures=1)
    assert run.failures["stage"].tolist() == ["prompt"]
    assert run.failures["message"].str.contains("`versus` must be given").all()


def test_labels_stand_in_every_table(tmp_path):
    cases = [
        rs.Case(bound(IDS), labels={"split": "a", "n": 3, "share": 0.5, "easy": True}),
        rs.Case(bound(OTHER), labels={"split": None, "share": 2}),
    ]
    run = go(
        tmp_path,
        {"locate": {"best": {"k": 1}}, "intervene": {"kind": "Zero", "sites": "$best"}, "measure": "effect"},
        cases,
    )
    for table in ("prompts", "rows", "located", "effects"):
        held = run.read(table).drop_duplicates("prompt")
        assert held["split"].tolist()[0] == "a"
        assert held["split"].isna().tolist() == [False, True]
        assert held["n"].tolist() == [3, pd.NA]
        assert held["share"].tolist() == [0.5, 2.0]
        assert held["easy"].tolist()[0] is True


# ---- plans as data

names = st.text("abcdefgh_", min_size=2, max_size=6).filter(
    lambda name: name not in {"a", "head", "bs_a"} and not name.startswith("bs_")
)
scalars = st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False, width=32)
sites = st.sampled_from(["L0.mlp", "L*.H*", "L1.N3", "L0.attn->L2.H1", "L1.H0<1", "embed"])
operations = st.fixed_dictionaries(
    {"kind": st.just("Zero"), "sites": sites | st.lists(sites, min_size=1, max_size=3)},
    optional={"positions": st.sampled_from(["target", "all", 0, -1, " Paris", "$$odd"]) | st.lists(st.integers(0, 3))},
) | st.fixed_dictionaries({"kind": st.just("Scale"), "sites": sites, "factor": scalars})
searches = st.fixed_dictionaries({"k": st.integers(1, 9)}, optional={"worst": st.booleans(), "layers": st.just([0, 1])})


@st.composite
def plans(draw):
    held = draw(st.lists(names, unique=True, min_size=3, max_size=6))
    axes = {name: draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)) for name in held[:1]}
    located = {name: draw(searches) for name in held[1:2]}
    arms = {name: draw(st.lists(operations, min_size=1, max_size=2)) for name in held[2:]}
    if draw(st.booleans()):
        arms["sets"] = {"kind": "Scale", "sites": f"${held[1]}", "factor": f"${held[0]}", "each": draw(st.booleans())}
    else:
        arms["axis"] = {"kind": "Scale", "sites": "L0.mlp", "factor": f"${held[0]}"}
    return {"axes": axes, "locate": located, "intervene": arms, "measure": draw(st.sampled_from(["bs", "effect"])),
            "seed": draw(st.integers(0, 2**63 - 1)), "known": draw(st.booleans())}  # fmt: skip


@given(plans())
def test_plans_round_trip_as_json(plain):
    plan = rs.Plan(**plain)
    again = rs.Plan.of(json.loads(json.dumps(plan.entry())))
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.entry() == plan.entry()
    assert not differences(plan.entry(), again.entry(), "plan")
    assert rs.Plan.of(plan) is plan


@given(plans(), st.randoms())
@settings(max_examples=15)
def test_a_changed_plan_is_another_and_says_where(plain, rng):
    plan = rs.Plan(**plain)
    name = rng.choice(["measure", "seed", "known", "intervene"])
    other = {"measure": "all", "seed": (plain["seed"] + 1) % 2**63, "known": not plain["known"],
             "intervene": plain["intervene"] | {"more": rs.Zero("L0.mlp")}}  # fmt: skip
    changed = rs.Plan(**plain | {name: other[name]})
    assert changed != plan
    assert changed.hash != plan.hash
    (line,) = differences(plan.entry(), changed.entry(), "plan")
    assert line.startswith(f"plan.{name}")


def test_equal_plans_have_equal_hashes_whatever_the_types():
    def made(values):
        return rs.Plan(axes={"k": values}, locate={"best": {"k": "$k"}})

    for one, other in itertools.combinations([[1, 2], [True, 2], [1.0, 2], [2, 1]], 2):
        assert made(one) != made(other)
    assert made([1, 2]) == made((1, 2)) == made(torch.tensor([1, 2]))
    assert hash(made([1, 2])) == hash(made(range(1, 3)))
    assert made([1, 2]) != "plan"


def test_the_order_of_fields_does_not_matter_and_that_of_arms_does():
    a, b = {"kind": "Zero", "sites": "L0.mlp"}, {"kind": "Zero", "sites": "L1.mlp"}
    plan = rs.Plan(intervene={"a": a, "b": b})
    assert plan == rs.Plan(intervene={"a": dict(reversed(a.items())), "b": b})
    assert plan != rs.Plan(intervene={"b": b, "a": a})
    assert differences(plan.entry(), rs.Plan(intervene={"b": b, "a": a}).entry()) == [
        "intervene: in the order a, b there, b, a now"
    ]


def test_files(tmp_path):
    plan = rs.Plan(axes={"k": [1]}, locate={"best": {"k": "$k"}})
    path = plan.save(tmp_path / "plan.json")
    assert rs.read_plan(path) == (plan, {})
    body = plan.entry() | {"model": "gpt2", "prompts": "facts.jsonl", "dtype": "float32"}
    path.write_text(json.dumps(body))
    assert rs.read_plan(path) == (plan, {"model": "gpt2", "prompts": "facts.jsonl", "dtype": "float32"})
    for text, said in (
        ("{", "is no JSON"), ("[]", "is no plan: a JSON object"), ('{"measure": "x"}', "is no plan: `measure`"),
        ('{"schema": 9}', "of schema 1"), ('{"mesure": "bs"}', "Did you mean 'measure'"), ("\x00", "is no JSON"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(rs.LoadError, match=said):
            rs.read_plan(path)
    with pytest.raises(rs.LoadError, match="cannot be read"):
        rs.read_plan(tmp_path / "none.json")
    for path in ("plan.txt", 3, tmp_path):
        with pytest.raises(rs.ArgumentError, match=r"\.json"):
            rs.read_plan(path)


ZERO = {"kind": "Zero", "sites": "L0.mlp"}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({}, "must locate or intervene; it does neither"),
        ({"intervene": ZERO, "axes": {"k": [1]}}, r"axis 'k' must be used by a set or an arm, as '\$k'"),
        ({"intervene": ZERO | {"sites": "$best"}}, r"references among none; got '\$best'.*'\$\$best'"),
        ({"intervene": ZERO | {"kind": "Scale", "factor": "$f"}}, r"arm main: factor"),
        ({"intervene": ZERO | {"factor": 2}}, "arm main: field"),
        ({"intervene": ZERO | {"kind": "Zeroo"}}, "Did you mean 'Zero'"),
        ({"intervene": ZERO | {"kind": None}}, "kind"),
        ({"intervene": {"kind": "Zero"}}, "with `sites`"),
        ({"intervene": ZERO | {"each": 1}}, "true or false"),
        ({"intervene": {"a": [ZERO | {"each": True}, ZERO | {"positions": "each"}]}}, "at most one says `each`"),
        ({"intervene": {"a": []}}, "arm a"),
        ({"intervene": {"a": "Zero"}}, "arm a"),
        ({"intervene": {"": ZERO}}, "names"),
        ({"intervene": {"a": [3]}}, "interventions, or mappings"),
        ({"intervene": {"kind": "Patch", "sites": "L0.mlp", "donor": "corrupt"}}, r"a prompt, or the '\$name'"),
        ({"intervene": {"kind": "Clamp", "sites": "L0.N1", "value": object()}}, "plain data"),
        ({"locate": {"best": {"kk": 3}}}, "Did you mean 'k'"),
        ({"locate": {"best": {"like": "rest"}}}, "like a located set that stands before it"),
        ({"locate": {"a": {"sites": "L0.mlp"}, "b": {"like": "a"}}}, "like a located set"),
        ({"locate": {"best": {"k": 1, "draw": 0}}}, "set best: field"),
        ({"locate": {"best": 3}}, "a mapping of arguments"),
        ({"locate": {"b b": {}}}, "plain words"),
        ({"locate": {"target": {}}}, "plain words"),
        ({"locate": [1]}, "a mapping"),
        ({"intervene": ZERO, "axes": {"k": 3}}, "a list of values"),
        ({"intervene": ZERO, "axes": {"k": []}}, "a list of"),
        ({"intervene": ZERO, "axes": {"k": [[1]]}}, "a list of"),
        ({"intervene": ZERO, "axes": {"k": [1, 1]}}, "different values"),
        ({"intervene": ZERO, "axes": {"arm": [1]}}, "that no column has"),
        ({"intervene": ZERO, "axes": {"role": [1]}}, "that no column has"),
        ({"intervene": ZERO, "axes": {"log_prob_change": [1]}}, "that no column has"),
        ({"intervene": ZERO, "axes": {"bs_k": [1]}}, "that no column has"),
        ({"intervene": ZERO, "measure": "kl"}, "measure"),
        ({"intervene": ZERO, "known": 1}, "True or False"),
        ({"intervene": ZERO, "seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_bad_plans(plan, said):
    with pytest.raises(rs.ArgumentError, match=said):
        rs.Plan(**plan)


def test_a_recording_is_no_part_of_a_plan():
    rec = rs.record(model(), bound(DONOR))
    with pytest.raises(rs.ArgumentError, match="must have prompts as donors"):
        rs.Plan(rs.Patch("L0.mlp", rec))
    for odd in (None, 3, "plan", [ZERO]):
        with pytest.raises(rs.ArgumentError, match="plan"):
            rs.Plan.of(odd)


def test_dollars():
    """A text that begins with a dollar is written with two; prompts are taken as they are."""
    plan = rs.Plan(rs.Zero("L0.mlp", positions="$5"))
    assert plan.intervene["main"][0]["positions"] == "$$5"
    donor = rs.Prompt("$5 is worth", target="$target")
    plan = rs.Plan(rs.Patch("L0.mlp", donor))
    assert plan.intervene["main"][0]["donor"] == {"text": "$5 is worth", "target": "$target"}
    assert plan.donors() == ()
    assert rs.Plan({"kind": "Patch", "sites": "L0.mlp", "donor": "$corrupt"}).donors() == ("corrupt",)


@pytest.mark.real
def test_dollars_mean_themselves_in_a_run(smollm2, tmp_path):
    prompt = rs.Prompt("The price is $5 for", target=" the", versus=[" a"])
    steer = rs.Steer("L3.resid_pre", toward="$", away=" the", times=3.0)
    donor = rs.Prompt("$ 9 is $4 per", target=" day")
    plan = rs.Plan(intervene={
        "steer": steer,
        "own": {"kind": "Steer", "sites": "L3.resid_pre", "toward": "$target", "away": "$$", "times": 3.0},
        "where": rs.Zero("L2.mlp", positions="$"), "patch": rs.Patch("L4.mlp", donor),
    })  # fmt: skip
    rows = go(tmp_path, plan, [prompt], smollm2).rows
    rec = rs.record(smollm2, prompt)
    own = rs.Steer("L3.resid_pre", toward=" the", away="$", times=3.0)
    hand = [steer, own, rs.Zero("L2.mlp", positions="$"), rs.Patch("L4.mlp", donor)]
    expected = pd.concat([rs.sweep(rec, [one], progress=False) for one in hand], ignore_index=True)
    assert rows["bs_target"].tolist() == pytest.approx(expected["bs_target"].tolist(), rel=1e-4, abs=1e-4)
    assert rows["log_prob"].tolist() == pytest.approx(expected["log_prob"].tolist(), rel=1e-4, abs=1e-4)


def test_random_choices_leave_pythons_generators_alone(tmp_path):
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    drawn(tmp_path, [IDS])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])

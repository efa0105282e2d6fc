"""Trials of scores against plain hooks and loops; curves, intervals and figures against numbers worked out by hand."""

import itertools
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from scipy import stats
from strategies import families, prompts
from tiny import VOCAB, build, shared

import resid_surgery as rs
from resid_surgery.attribution.catalogue import SCORES
from resid_surgery.evidence import trials
from resid_surgery.stream import recording

mpl.use("Agg")

IDS = [5, 41, 30, 2, 9]
LAST = rs.Prompt(ids=IDS, target=11, versus=[7, 60])
EARLIER = rs.Prompt(ids=[8, 3, 77, 20, 61], target=50, versus=[1], position=2)
ALONE = rs.Prompt(ids=[4, 4, 19], target=3)
MODELS = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
NORMS = pytest.mark.parametrize("norm", ["frozen", "own"])
CONTRASTS = {"bs_difference", "contrast"}


@pytest.fixture
def forwards(monkeypatch):
    """How many forwards recordings took."""
    ran, plain = [], recording.forward
    monkeypatch.setattr(recording, "forward", lambda *args, **named: ran.append(1) or plain(*args, **named))
    return ran


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    pyplot.close("all")


def seen_by(rec, family):
    return oracle.capture(rec.model.module, family, list(rec.prompt.ids), rec.prompt.position)


def log_p(seen, states, w, *, own=False):
    """log p(w) of states (rows), read by the final norm at the final stream's scale or their own."""
    module, where = oracle.final_norm(seen), seen.where
    states = torch.as_tensor(states, dtype=torch.float64)

    def centred(v):
        return v - v.mean(-1, keepdim=True) if where.layer_norm else v

    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    scaled = centred(states if own else torch.tensor(seen.final, dtype=torch.float64))
    read = centred(states) / (scaled.square().mean(-1, keepdim=True) + eps).sqrt()
    read = read * (module.weight.detach() + where.one_plus)
    z = (read + module.bias.detach() if where.layer_norm else read) @ seen.model.lm_head.weight.detach().T
    cap = getattr(seen.model.config, "final_logit_softcapping", None)
    return torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), -1)[..., w].numpy()


def vectors_of(seen, layer, kind):
    """Every subvalue of a layer in loops, by its site."""
    if kind == "neuron":
        return {f"L{layer}.N{i}": oracle.neuron(seen, layer, i) for i in range(len(seen.coefficient[layer]))}
    return {f"L{layer}.H{h}<{j}": oracle.head_source(seen, layer, h, j)
            for h in range(len(seen.alpha[layer])) for j in range(seen.t + 1)}  # fmt: skip


def allowed(norm):
    return [name for name, score in SCORES.items() if norm in score.norms]


def best_of(rec, name, k, **options):
    """Sites of the k best in a table of every score."""
    table = rs.scores(rec, score=name, **options)
    return table.sort_values(name, ascending=name == "target_rank", kind="stable")["site"].head(k).tolist()


# The addition test.


@MODELS
@pytest.mark.parametrize(("kind", "norm"), [("neuron", "frozen"), ("head_source", "own")])
def test_what_a_score_likes_best_is_added_to_its_layers_state(family, kind, norm):
    model, k = shared(family), 4
    table = rs.addition_test(model, [LAST, EARLIER], kind=kind, k=k, norm=norm)
    first = ["prompt", "text", "target", "score", "layer", "part", "kind", "k"]
    assert list(table.columns) == [*first, "prob_increase", "log_prob_increase", "prob_before", "norm"]
    names = allowed(norm)
    part = "mlp" if kind == "neuron" else "attn"
    for number, prompt in enumerate((LAST, EARLIER)):
        rec = rs.record(model, prompt)
        seen, w = seen_by(rec, family), prompt.target
        rows = table[table["prompt"] == number].set_index(["layer", "score"])
        assert set(rows.index) == {*itertools.product(range(3), [*names, "random", "everything"])}
        assert set(zip(rows["kind"], rows["norm"], rows["part"], strict=True)) == {(kind, norm, part)}
        assert set(rows.drop("everything", level="score")["k"]) == {k}
        assert set(rows["text"]) == {" ".join(map(str, prompt.ids))}
        for layer in range(3):
            vectors = vectors_of(seen, layer, kind)
            found = {name: best_of(rec, name, k, kind=kind, norm=norm, layers=[layer]) for name in names}
            x = oracle.state(seen, layer, part)
            before = oracle.log_prob(oracle.capped(seen, oracle.bs(seen, x, constants=True, s=norm_of(seen, x, norm))),
                                     w)  # fmt: skip
            for name, sites in (found | {"everything": list(vectors)}).items():
                total = [sum(one) for one in zip(*(vectors[site] for site in sites), strict=True)]
                by = oracle.log_prob_increase(seen, x, total, w, own=norm == "own")
                row = rows.loc[layer, name]
                assert row["k"] == len(sites)
                assert row["log_prob_increase"] == pytest.approx(by, rel=1e-5, abs=1e-6), (layer, name)
                assert row["prob_before"] == pytest.approx(np.exp(before), rel=1e-5)
                assert row["prob_increase"] == pytest.approx(np.exp(before + by) - np.exp(before), rel=1e-5, abs=1e-7)


def norm_of(seen, x, norm):
    return oracle.scale(seen, oracle.final_norm(seen), x) if norm == "own" else None


def test_the_random_control_has_k_distinct_members_and_follows_its_seed():
    model = shared("llama")
    seen = seen_by(rs.record(model, LAST), "llama")

    def control(**options):
        table = rs.addition_test(model, [LAST, LAST], scores="coefficient", **options)
        return table[table["score"] == "random"].set_index(["prompt", "layer"])["log_prob_increase"]

    pairs = control(k=2, seed=3)
    for layer in range(3):
        x = torch.tensor(oracle.state(seen, layer, "mlp"))
        vectors = torch.tensor(list(vectors_of(seen, layer, "neuron").values()))
        every = log_p(seen, x + torch.stack([a + b for a, b in itertools.combinations(vectors, 2)]), 11)
        for number in (0, 1):
            gaps = np.abs(every - log_p(seen, x, 11) - pairs[number, layer])
            assert gaps.min() < 1e-7  # one of the pairs of its layer
    assert pairs.tolist() == control(k=2, seed=3).tolist()
    assert not set(pairs) & set(control(k=2, seed=4))
    assert not set(pairs[0]) & set(pairs[1])  # each prompt has its own draw


def test_with_k_of_everything_every_score_finds_everything():
    for k in (40, 10**6):
        table = rs.addition_test(shared("gpt2"), [LAST], k=k)
        for _, rows in table.groupby("layer"):
            assert rows["log_prob_increase"].tolist() == pytest.approx([rows["log_prob_increase"].iloc[-1]] * len(rows))


# The ablation test.


@contextmanager
def zeroed(model, family, sites, positions):
    """Plain hooks that set coordinates of what projections read to 0."""
    where, handles, module = oracle.WHERE[family], [], model.module
    heads = module.config.num_attention_heads
    at = slice(None) if positions == "all" else positions
    for site in sites:
        neuron = isinstance(site, rs.Neuron)
        read = module.get_submodule(f"{where.blocks}.{site.layer}.{where.down if neuron else where.w_o}")
        width = (read.weight if where.conv1d else read.weight.T).shape[0]
        index = site.index if neuron else site.head * (width // heads) + site.index

        def hook(_, args, index=index):
            changed = args[0].clone()
            changed[0, at, index] = 0
            return (changed, *args[1:])

        handles.append(read.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model, prompt):
    with torch.no_grad():
        return model.module(torch.tensor([prompt.ids]), use_cache=False).logits[0, prompt.position].double()


def measured(model, prompt, family, sites=(), positions=()):
    """What a plain forward says with some sites zeroed."""
    with zeroed(model, family, sites, positions):
        logits = logits_of(model, prompt)
    clean, after, w = torch.log_softmax(logits_of(model, prompt), -1), torch.log_softmax(logits, -1), prompt.target
    rank = 1 + int((logits > logits[w]).sum())
    return {"rank": rank, "reciprocal_rank": 1 / rank, "prob": float(after[w].exp()), "log_prob": float(after[w]),
            "log_prob_change": float(after[w] - clean[w]),
            "kl": float((clean.exp() * (clean - after)).sum())}  # fmt: skip


@MODELS
@NORMS
def test_what_a_score_likes_best_is_zeroed_as_plain_hooks_zero_it(family, norm):
    model, many = shared(family), [LAST, EARLIER]
    sets = {"neurons": {"neuron": 5}, "both": {"neuron": 3, "attn_neuron": 4}}
    table = rs.ablation_test(model, many, sets=sets, norm=norm, draws=2)
    columns = ["prompt", "text", "target", "set", "score", "positions", "draw", "size", "reciprocal_rank", "rank",
               "prob", "log_prob", "log_prob_change", "kl", "bs_change_target", "norm"]  # fmt: skip
    assert list(table.columns) == columns
    names = allowed(norm)
    cells = [*((one, 0) for one in names), ("random", 0), ("random", 1)]
    for number, prompt in enumerate(many):
        rows = table[table["prompt"] == number].set_index(["set", "score", "draw", "positions"])
        wanted = {(label, *cell, at) for label in sets for cell in cells for at in ("target", "all")}
        assert set(rows.index) == wanted | {("nothing", "nothing", 0, "")}
        assert set(rows["norm"]) == {norm}
        rec = rs.record(model, prompt)
        nothing = rows.loc["nothing", "nothing", 0, ""]
        clean = measured(model, prompt, family)
        assert nothing[list(clean)].to_dict() == pytest.approx(clean, rel=1e-4, abs=1e-5)
        assert (nothing["size"], nothing["bs_change_target"]) == (0, 0.0)
        for name in names if number == 0 else names[::4]:
            found = {kind: rs.locate(rec, k=5, kind=kind, score=name, norm=norm).sites
                     for kind in ("neuron", "attn_neuron")}  # fmt: skip
            for label, sizes in sets.items():
                sites = [site for kind, k in sizes.items() for site in found[kind][:k]]
                for at in ("target", "all"):
                    row, position = rows.loc[label, name, 0, at], "all" if at == "all" else rec.prompt.position
                    truth = measured(model, prompt, family, sites, position)
                    assert row[list(truth)].to_dict() == pytest.approx(truth, rel=1e-4, abs=2e-5), (name, label, at)
                    assert row["size"] == len(sites)


def test_a_row_of_the_ablation_test_is_one_intervention():
    model = shared("opt")
    rec = rs.record(model, LAST)
    sets = {"pairs": {"head_source": 2, "neuron": 1}}
    table = rs.ablation_test(model, [LAST], sets=sets, scores="contrast", positions="target", draws=0)
    assert table["score"].tolist() == ["nothing", "contrast"]
    sites = [*rs.locate(rec, k=2, kind="head_source", score="contrast").sites,
             *rs.locate(rec, k=1, score="contrast").sites]  # fmt: skip
    effect = rs.intervene(rec, rs.Zero(sites)).table.iloc[0]
    row = table.iloc[1]
    assert row["log_prob_change"] == pytest.approx(effect["log_prob_change"], abs=1e-5)
    assert row["bs_change_target"] == pytest.approx(effect["bs_change"], abs=1e-5)
    assert row["prob"] == pytest.approx(effect["prob_after"], abs=1e-6)


def test_random_sets_have_their_size_and_follow_their_seed():
    model, options = shared("llama"), dict(scores="coefficient", positions=["all"])

    def control(**named):
        table = rs.ablation_test(model, [LAST, LAST], **options, **named)
        table = table[table["score"] == "random"]
        return table.set_index(["prompt", "draw"])["log_prob_change"]

    few = control(sets={"x": {"neuron": 4, "attn_neuron": 3}}, draws=4)
    assert sorted(few.index) == [*itertools.product((0, 1), range(4))]
    assert few.nunique() == 8
    assert few.tolist() == control(sets={"x": {"neuron": 4, "attn_neuron": 3}}, draws=4).tolist()
    assert not set(few) & set(control(sets={"x": {"neuron": 4, "attn_neuron": 3}}, draws=4, seed=1))
    every = [rs.Zero(f"L{i // 40}.N{i % 40}", positions="all") for i in range(120)]
    singles = rs.sweep(rs.record(model, LAST), every)
    one = control(sets={"x": {"neuron": 1}}, draws=3)
    assert all(np.abs(singles["log_prob_change"] - value).min() < 1e-6 for value in one)
    whole = control(sets={"x": {"neuron": 120}}, draws=2)  # all of them: nothing is left to chance
    assert whole.tolist() == pytest.approx([whole.iloc[0]] * 4)


@pytest.mark.parametrize("verb", [rs.addition_test, rs.ablation_test])
def test_contrasts_need_competitors_of_every_prompt(verb, forwards):
    model = shared("llama")
    assert set(verb(model, [LAST])["score"]) >= CONTRASTS
    assert not CONTRASTS & set(verb(model, [LAST, ALONE])["score"])
    del forwards[:]
    for name in CONTRASTS:
        with pytest.raises(rs.ArgumentError, match=r"prompt 1: .* competitors"):
            verb(model, [LAST, ALONE, ALONE], scores=["coefficient", name])
    assert not forwards


@pytest.mark.parametrize("verb", [rs.addition_test, rs.ablation_test])
def test_bad_prompts_and_arguments_are_refused_before_any_forward(verb, forwards):
    model = shared("llama")
    for wrong in (dict(ids=[1, VOCAB]), dict(target=VOCAB), dict(position=4)):
        with pytest.raises(rs.ResidSurgeryError, match="prompt 2: "):
            verb(model, iter([LAST, LAST, rs.Prompt(**{"ids": [1], "target": 1, **wrong})]))
    faults = [(dict(scores="coefficent"), "coefficient"), (dict(scores=[]), "score"), (dict(norm="live"), "norm"),
              (dict(scores="bs_target", norm="own"), "frozen")]  # fmt: skip
    if verb is rs.addition_test:
        faults += [(dict(k=0), "`k`"), (dict(k=2.0), "`k`"), (dict(kind="neurons"), "neuron")]
    else:
        faults += [
            (dict(sets=wrong), "sets")
            for wrong in (
                {},
                [],
                {"x": {}},
                {"x": 3},
                {"x": {"neuron": 0}},
                {"x": {"neuron": True}},
                {"x": {"neurons": 1}},
            )
        ]
        faults += [(dict(positions="last"), "positions"), (dict(positions=["target", 3]), "positions"),
                   (dict(draws=-1), "draws")]  # fmt: skip
    for options, named in faults:
        with pytest.raises(rs.ArgumentError, match=named):
            verb(model, [LAST], **options)
    for wrong in ([], LAST, "text", None):
        with pytest.raises(rs.ArgumentError, match="prompts"):
            verb(model, wrong)
    with pytest.raises(rs.ResidSurgeryError):
        verb(rs.record, [LAST])
    assert not forwards


def test_sets_beyond_the_candidates_are_refused_before_anything_is_recorded(monkeypatch):
    monkeypatch.setattr(trials, "record", lambda *_, **__: pytest.fail("a forward ran"))
    for kind, many in (("neuron", 120), ("head_source", 60)):
        with pytest.raises(rs.ArgumentError, match=rf"`sets` must be at most {many}, .* for .*; got {many + 1}"):
            rs.ablation_test(shared("llama"), [LAST], sets={"few": {"neuron": 1}, "many": {kind: many + 1}})


# Scores against effects.


@MODELS
@pytest.mark.parametrize("positions", ["target", "all"])
def test_the_effect_of_every_neuron_is_what_zeroing_it_costs(family, positions):
    model = shared(family)
    rec = rs.record(model, EARLIER)
    table = rs.score_against_effect(rec, positions=positions)
    every = rs.scores(rec, score="all")
    sites = every["site"].tolist()
    assert list(table.columns) == ["site", "kind", "layer", "effect", *SCORES, "drawn", "norm", "position"]
    assert table["site"].tolist() == sites
    assert table["layer"].tolist() == every["layer"].tolist()
    assert table.attrs["candidates"] == 120
    assert table["drawn"].all()
    for name in SCORES:
        assert table[name].tolist() == pytest.approx(every[name].tolist(), rel=1e-9, abs=1e-9), name
    swept = rs.sweep(rec, [rs.Zero(one, positions=positions) for one in sites])
    assert table["effect"].tolist() == pytest.approx((-swept["log_prob_change"]).tolist(), abs=1e-12)
    for i in (3, 60, 119):
        alone = rs.intervene(rec, rs.Zero(sites[i], positions=positions)).table.iloc[0]
        assert table["effect"][i] == pytest.approx(-alone["log_prob_change"], abs=1e-6)
        truth = measured(model, EARLIER, family, [rs.parse_site(sites[i])], "all" if positions == "all" else 2)
        assert table["effect"][i] == pytest.approx(-truth["log_prob_change"], abs=1e-5)


@given(families, prompts(), st.sampled_from(["neuron", "head_source", "attn_neuron", "layer"]), st.data())
@settings(max_examples=15)
def test_the_union_of_the_best_and_the_random_ones_is_measured(family, prompt, kind, data):
    rec = rs.record(shared(family), prompt)
    norm, seed = data.draw(st.sampled_from(["frozen", "own"])), data.draw(st.integers(0, 9))
    names = data.draw(st.lists(st.sampled_from(allowed(norm)), min_size=1, max_size=3, unique=True))
    every = rs.scores(rec, kind=kind, score=names, norm=norm)
    best, random = data.draw(st.integers(1, min(6, len(every)))), data.draw(st.integers(0, min(6, len(every))))
    options = dict(kind=kind, norm=norm, scores=names, best=best, random=random, seed=seed)
    table = rs.score_against_effect(rec, **options)
    drawn = set(table["site"][table["drawn"]])
    assert len(drawn) == random
    first = [rs.locate(rec, k=best, kind=kind, score=name, norm=norm).sites for name in names]
    wanted = drawn | {str(site) for some in first for site in some}
    assert table["site"].tolist() == [site for site in every["site"] if site in wanted]
    rows = every.set_index("site").loc[table["site"]]
    for name in names:
        assert table[name].tolist() == pytest.approx(rows[name].tolist(), rel=1e-7, abs=1e-9), name
    assert table.attrs["candidates"] == len(every)
    if random:
        only = rs.score_against_effect(rec, **options | {"best": 0})
        assert set(only["site"]) == drawn
        assert only["drawn"].all()


def test_another_seed_draws_others():
    rec = rs.record(shared("llama"), LAST)
    one, again, other = (
        set(rs.score_against_effect(rec, scores="contrast", random=9, seed=i)["site"]) for i in (1, 1, 2)
    )
    assert one == again != other


def test_the_best_alone_are_no_sample_of_all():
    table = rs.score_against_effect(rs.record(shared("llama"), LAST), scores="contrast", best=5)
    assert not table["drawn"].any()
    assert rs.agreement(table, ks=[3])["spearman_drawn"].isna().all()


def test_the_truth_is_asked_for_in_known_words(forwards):
    rec = rs.record(shared("llama"), ALONE)
    assert not CONTRASTS & set(rs.score_against_effect(rec, random=4))
    faults = [(dict(kind="neurons"), "neuron"), (dict(scores="contrast"), "competitors"), (dict(norm="x"), "norm"),
              (dict(best=121), "1?20"), (dict(random=-1), "random"), (dict(best=1.0), "best"),
              (dict(best=0), "best, random"), (dict(best=0, random=0), "best, random"),
              (dict(positions="each"), "positions"), (dict(scores=["bs_target"], norm="own"), "frozen")]  # fmt: skip
    for options, named in faults:
        with pytest.raises(rs.ArgumentError, match=named):
            rs.score_against_effect(rec, **options)
    table = rs.score_against_effect(rec, random=20, scores="coefficient")
    for wrong, ks in ((table, [21]), (table, [0]), (table.drop(columns="effect"), [1]), ("table", [1])):
        with pytest.raises(rs.ArgumentError):
            rs.agreement(wrong, ks=ks)


@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 12))
def test_agreement_is_spearmans_correlation_and_the_recall_of_the_most_effective(seed, size, k):
    rng = np.random.default_rng(seed)
    effects, values = rng.permutation(12).tolist(), rng.permutation(12).tolist()
    chosen = set(rng.choice(12, size, replace=False).tolist())
    table = pd.DataFrame(
        {"effect": np.exp(np.array(effects) / 3.0), "norm": "frozen", "drawn": [i in chosen for i in range(12)]}
    )
    for name in ("target_rank", "contrast"):
        table[name] = np.array(values, dtype=float) ** 3
    found = rs.agreement(table, ks=[k]).set_index("score")
    largest = set(sorted(range(12), key=lambda i: -effects[i])[:k])
    some = sorted(chosen)
    for name, sign in (("contrast", 1), ("target_rank", -1)):
        first = set(sorted(range(12), key=lambda i: -sign * values[i])[:k])
        assert found.loc[name, f"recall@{k}"] == len(first & largest) / k
        wanted = sign * stats.spearmanr(values, effects).statistic
        assert found.loc[name, "spearman"] == pytest.approx(wanted)
        wanted = sign * stats.spearmanr([values[i] for i in some], [effects[i] for i in some]).statistic
        assert found.loc[name, "spearman_drawn"] == pytest.approx(wanted)
        assert tuple(found.loc[name, ["n", "n_drawn"]]) == (12, len(chosen))


def test_agreement_over_several_prompts_does_not_mix_their_rows():
    recs = [rs.record(shared("llama"), one) for one in (LAST, EARLIER)]
    stacked = pd.concat([rs.score_against_effect(rec, scores="contrast", random=20) for rec in recs])
    found = rs.agreement(stacked, ks=[5])
    pd.testing.assert_frame_equal(found, rs.agreement(stacked.reset_index(drop=True), ks=[5]))


# Curves.


@given(st.sampled_from(["llama", "gpt2", "gemma2", "gpt_neox"]), prompts(), st.sampled_from(["frozen", "own"]),
       st.lists(st.floats(-30, 30), min_size=1, max_size=5), st.data())  # fmt: skip
def test_the_curve_is_the_probability_of_the_state_plus_l_times_the_vector(family, prompt, norm, times, data):
    rec = rs.record(shared(family), prompt)
    seen, own, layer = seen_by(rec, family), norm == "own", data.draw(st.integers(0, 2))
    times = [0.0, 1.0, *times]
    table = rs.probability_curve(rec, f"L{layer}.N0:3, L{layer}.H1<*".split(", "), times=times, norm=norm)
    vectors = {f"L{layer}.N{i}": ("mlp", oracle.neuron(seen, layer, i)) for i in range(3)}
    vectors |= {f"L{layer}.H1<{j}": ("attn", oracle.head_source(seen, layer, 1, j)) for j in range(seen.t + 1)}
    assert list(table["site"].unique()) == list(vectors)
    kinds = {site: rs.scores(rec, kind=kind, norm=norm, layers=[layer]).set_index("site")["log_prob_increase"]
             for kind, site in (("neuron", "mlp"), ("head_source", "attn"))}  # fmt: skip
    for site, (part, v) in vectors.items():
        curve = table[table["site"] == site]
        assert curve["times"].tolist() == times
        x = torch.tensor(oracle.state(seen, layer, part))
        wanted = log_p(seen, x + torch.tensor(times)[:, None].double() * torch.tensor(v), prompt.target, own=own)
        assert curve["log_prob"].tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-5)
        assert curve["prob"].tolist() == pytest.approx(np.exp(wanted).tolist(), rel=1e-4, abs=1e-9)
        assert curve["log_prob_increase"].tolist() == pytest.approx((wanted - wanted[0]).tolist(), rel=1e-5, abs=1e-5)
        assert curve["log_prob_increase"].iloc[0] == 0.0
        assert curve["log_prob_increase"].iloc[1] == pytest.approx(kinds[part][site], abs=1e-9)


def test_a_curve_of_whole_sublayers_and_biases_has_states_too():
    rec = rs.record(shared("gpt2"), LAST)
    table = rs.probability_curve(rec, ["L1.attn", "L1.mlp", "L1.H0"], times=(2, 1))
    layer = rs.scores(rec, kind="layer", layers=[1])["log_prob_increase"].tolist()
    assert table["log_prob_increase"].iloc[[1, 3]].tolist() == pytest.approx(layer)
    assert len(rs.probability_curve(rec, "L0.N0")) == 41


@NORMS
def test_the_curve_of_a_target_without_hope_is_finite(norm):
    module = build("llama", torch.float32)
    with torch.no_grad():
        module.model.norm.weight.mul_(300)
    rec = rs.record(rs.load(module), rs.Prompt(ids=IDS, target=96))
    table = rs.probability_curve(rec, "L2.N5", times=[0, 1], norm=norm)
    assert table["log_prob"].max() < -103  # p itself is 0 in single precision
    assert np.diff(table["log_prob"]) == pytest.approx(table["log_prob_increase"][1], rel=1e-3)


@pytest.mark.parametrize(
    "site", ["embed", "L0.resid_pre", "L1.resid_post", "L1.N3@2", "L9.N0", "L0.H0<5", "L0.N99", "nonsense"]
)
def test_what_no_sublayer_adds_has_no_curve(site):
    with pytest.raises(rs.SiteError):
        rs.probability_curve(rs.record(shared("llama"), LAST), ["L0.N0", site])


@pytest.mark.parametrize("times", [[], "12", 3, None, [float("nan")], [1, float("inf")], [True], ["1"]])
def test_times_are_finite_numbers(times):
    with pytest.raises(rs.ArgumentError, match="times"):
        rs.probability_curve(rs.record(shared("llama"), LAST), "L0.N0", times=times)


@MODELS
@NORMS
@pytest.mark.parametrize(("kind", "layer"), [("neuron", 1), ("head_source", -1)])
def test_sums_grow_by_the_worst_that_is_left(family, norm, kind, layer):
    rec = rs.record(shared(family), EARLIER)
    seen, own, at = seen_by(rec, family), norm == "own", layer % 3
    table = rs.cumulated(rec, layer=layer, kind=kind, norm=norm)
    x, vectors = oracle.state(seen, at, "mlp" if kind == "neuron" else "attn"), vectors_of(seen, at, kind)
    scores = {site: oracle.log_prob_increase(seen, x, v, 50, own=own) for site, v in vectors.items()}
    order = sorted(scores, key=scores.get)
    assert table["site"].tolist() == order
    assert table["n"].tolist() == list(range(1, len(order) + 1))
    sum_of_scores, summed = 0.0, [0.0] * len(x)
    for row, site in zip(table.itertuples(), order, strict=True):
        sum_of_scores += scores[site]
        for i, value in enumerate(vectors[site]):
            summed[i] += value
        assert row.log_prob_increase == pytest.approx(scores[site], abs=1e-6)
        assert row.sum_of_scores == pytest.approx(sum_of_scores, abs=1e-5)
        assert row.score_of_sum == pytest.approx(oracle.log_prob_increase(seen, x, summed, 50, own=own), abs=1e-5)
    line, fit = table.attrs["line"], stats.linregress(table["sum_of_scores"], table["score_of_sum"])
    assert line == pytest.approx({"slope": fit.slope, "intercept": fit.intercept, "r": fit.rvalue})


def test_sums_are_the_same_in_small_pieces(monkeypatch):
    from resid_surgery.attribution import states

    rec = rs.record(shared("gemma2"), LAST)
    whole = rs.cumulated(rec, layer=1)
    monkeypatch.setattr(states, "EVALUATE_BYTES", 7 * VOCAB * 8)
    pieces = rs.cumulated(rs.record(shared("gemma2"), LAST), layer=1)
    assert pieces["score_of_sum"].tolist() == pytest.approx(whole["score_of_sum"].tolist(), abs=1e-12)
    for wrong in (dict(layer=3), dict(layer=1.0), dict(layer=0, kind="layer"), dict(layer=0, norm="x")):
        with pytest.raises(rs.ArgumentError):
            rs.cumulated(rec, **wrong)


# Intervals.

samples = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=3, max_size=12)


def tidy(values, score="a"):
    return pd.DataFrame({"score": score, "prompt": range(len(values)), "value": values})


@given(samples, st.integers(0, 3), st.sampled_from([0.8, 0.95]))
def test_an_interval_is_scipys(values, seed, confidence):
    (row,) = rs.bootstrap(tidy(values), "score", "value", seed=seed, confidence=confidence, resamples=300).to_dict(
        "records"
    )
    assert list(row) == ["score", "mean", "low", "high", "n"]
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["n"] == len(values)
    if len(set(values)) == 1:
        assert row["low"] == row["high"] == row["mean"]
        return
    found = stats.bootstrap((np.array(values),), np.mean, confidence_level=confidence, n_resamples=300, method="BCa",
                            rng=np.random.default_rng(seed)).confidence_interval  # fmt: skip
    assert (row["low"], row["high"]) == pytest.approx((found.low, found.high))
    assert row["low"] <= row["mean"] <= row["high"]


def test_rows_of_one_unit_are_averaged_before_units_are():
    table = pd.DataFrame({"score": "a", "text": ["x", "x", "x", "y", "z"], "value": [0.0, 0.0, 3.0, 5.0, 9.0]})
    (row,) = rs.bootstrap(table, "score", "value", unit="text").to_dict("records")
    assert (row["mean"], row["n"]) == (5.0, 3)
    (same,) = rs.bootstrap(tidy([1.0, 5.0, 9.0]), ["score"], "value").to_dict("records")
    assert (row["low"], row["high"]) == (same["low"], same["high"])


def test_differences_are_paired_by_unit_and_groups_keep_their_order():
    left, right = [1.0, 2.0, 4.0, 9.0], [0.5, 3.0, 1.0, 2.0]
    table = pd.concat([tidy(right, "b").iloc[::-1], tidy(left), tidy(left, "same"), tidy([7.0], "few")]).assign(at=1)
    other = tidy(right).assign(at=2, value=lambda one: -one["value"])
    found = rs.bootstrap(pd.concat([table, other]), ["at", "score"], "value", against={"score": "a"})
    assert found["score"].tolist() == ["b", "a", "same", "few", "a"]
    rows = found.set_index(["at", "score"])
    ends = ["difference", "difference_low", "difference_high"]
    for one in ((1, "a"), (1, "same"), (2, "a")):
        assert rows.loc[one, ends].tolist() == [0.0, 0.0, 0.0]
    gaps = rs.bootstrap(tidy([r - v for r, v in zip(right, left, strict=True)]), "score", "value")
    assert rows.loc[(1, "b"), ends].tolist() == pytest.approx(gaps[["mean", "low", "high"]].iloc[0].tolist())
    assert rows.loc[(1, "few"), "difference"] == 6.0  # one pair has no interval
    assert rows.loc[(1, "few"), [*ends[1:], "low", "high"]].isna().all()
    assert rows.loc[(1, "few"), ["mean", "n"]].tolist() == [7.0, 1]
    lonely = rs.bootstrap(pd.concat([table, other.assign(score="b")]), ["at", "score"], "value", against={"score": "a"})
    assert lonely.set_index(["at", "score"]).loc[(2, "b"), ends].isna().all()
    across = rs.bootstrap(pd.concat([table, other]), ["at", "score"], "value", against={"at": 1, "score": "a"})
    gap = across.set_index(["at", "score"]).loc[(2, "a"), "difference"]
    assert gap == pytest.approx(np.mean([-r - v for r, v in zip(right, left, strict=True)]))


def test_one_seed_gives_one_interval_and_another_one_another():
    table = tidy(np.random.default_rng(0).normal(size=20))
    one, again, other = (rs.bootstrap(table, "score", "value", seed=seed) for seed in (1, 1, 2))
    assert one.equals(again)
    assert one["low"][0] != other["low"][0]


def test_nineteen_in_twenty_intervals_hold_the_true_mean():
    rng, many = np.random.default_rng(5), 200
    table = pd.DataFrame({"score": np.repeat(range(many), 30), "prompt": np.tile(range(30), many),
                          "value": rng.normal(2.0, 3.0, 30 * many)})  # fmt: skip
    found = rs.bootstrap(table, "score", "value", resamples=1000)
    assert 0.88 <= ((found["low"] <= 2.0) & (found["high"] >= 2.0)).mean() <= 0.99


@pytest.mark.parametrize(
    ("options", "named"),
    [(dict(by="scores"), "'scores'"), (dict(value="mean"), "'mean'"), (dict(unit="text"), "'text'"),
     (dict(against={"place": "a"}), "'place'"), (dict(against={"score": "z"}), "against"),
     (dict(against={"value": 1.0}), "against"), (dict(confidence=1.0), "confidence"),
     (dict(confidence="x"), "confidence"), (dict(resamples=10), "resamples"), (dict(table=[1]), "DataFrame")],
    ids=str,
)  # fmt: skip
def test_intervals_of_nothing_sensible_are_refused(options, named):
    with pytest.raises(rs.ArgumentError, match=named):
        rs.bootstrap(**({"table": tidy([1.0, 2.0, 4.0]), "by": "score", "value": "value"} | options))


# Figures and files.


def test_intervals_are_drawn_with_the_largest_on_top():
    table = pd.DataFrame(
        {"score": ["a", "b", "c"], "mean": [2.0, 5.0, 1.0], "low": [1.5, 4.0, np.nan], "high": [3.0, 7.0, np.nan]}
    )
    axes = rs.plot_intervals(table, xlabel="nats", mark=0.25)
    dots = next(line for line in axes.get_lines() if line.get_marker() == "o")
    bars, mark = axes.containers[0][2][0], axes.get_lines()[-1]
    assert dots.get_xdata().tolist() == [1.0, 2.0, 5.0]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["c", "a", "b"]
    ends = [tuple(segment[:, 0]) for segment in bars.get_segments() if len(segment) and not np.isnan(segment).any()]
    assert ends == [(1.5, 3.0), (4.0, 7.0)]
    assert (axes.get_xlabel(), list(mark.get_xdata())) == ("nats", [0.25, 0.25])
    renamed = table.rename(columns={"score": "who", "mean": "gap", "low": "gap_low", "high": "gap_high"})
    given = pyplot.subplots()[1]
    assert rs.plot_intervals(renamed, label="who", value="gap", low="gap_low", high="gap_high", ax=given) is given
    assert given.get_xlabel() == "gap"


def test_layers_are_drawn_as_a_line_for_each_level():
    table = pd.DataFrame(
        {"layer": [0, 1, 1, 0, 1], "kind": ["n", "n", "n", "h", "h"], "count": [1.0, 2.0, 4.0, 8.0, 16.0]}
    )
    axes = rs.plot_layers(table, "count", hue="kind", ylabel="subvalues")
    lines = axes.get_lines()[:2]
    assert [one.get_ydata().tolist() for one in lines] == [[1.0, 3.0], [8.0, 16.0]]
    assert [one.get_xdata().tolist() for one in lines] == [[0, 1]] * 2
    assert [one.get_text() for one in axes.get_legend().get_texts()] == ["n", "h"]
    assert len({(one.get_linestyle(), one.get_marker()) for one in lines}) == 2  # readable without colour
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "subvalues")
    given = pyplot.subplots()[1]
    assert rs.plot_layers(table, "count", ax=given) is given
    assert given.get_lines()[0].get_ydata().tolist() == pytest.approx([4.5, 22 / 3])
    assert (given.get_ylabel(), given.get_legend()) == ("count", None)


def test_sums_are_drawn_with_their_line_and_the_diagonal():
    table = rs.cumulated(rs.record(shared("llama"), LAST), layer=1)
    given = pyplot.subplots()[1]
    assert rs.plot_cumulated(table, ax=given) is given
    dots, diagonal, fitted = given.get_lines()
    assert dots.get_xdata().tolist() == table["sum_of_scores"].tolist()
    assert dots.get_ydata().tolist() == table["score_of_sum"].tolist()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    slope, intercept = np.polyfit(table["sum_of_scores"], table["score_of_sum"], 1)
    assert fitted.get_ydata() == pytest.approx([slope * x + intercept for x in fitted.get_xdata()])
    assert "sum" in given.get_xlabel()
    assert "of the sum" in given.get_ylabel()
    table.attrs = {}
    assert len(rs.plot_cumulated(table).get_lines()) == 2


def test_probabilities_are_drawn_as_a_line_a_site():
    table = rs.probability_curve(rs.record(shared("llama"), LAST), ["L2.N1", "L0.N5"], times=[0, 1, 3])
    for log, column in ((False, "prob"), (True, "log_prob")):
        given = pyplot.subplots()[1]
        assert rs.plot_probability(table, log=log, ax=given) is given
        assert len(given.get_lines()) == 3
        for line, site in zip(given.get_lines(), ["L2.N1", "L0.N5"], strict=False):
            assert line.get_label() == site
            assert line.get_xdata().tolist() == [0, 1, 3]
            assert line.get_ydata().tolist() == table[table["site"] == site][column].tolist()
        assert ("nats" in given.get_ylabel()) is log
        assert rs.plot_probability(table).figure is not given.figure


@pytest.mark.parametrize("table", [pd.DataFrame({"layer": [1]}), [1, 2], None], ids=["columns", "list", "none"])
def test_figures_of_other_tables_are_refused(table):
    for draw in (rs.plot_intervals, rs.plot_cumulated, rs.plot_probability, lambda one: rs.plot_layers(one, "count"),
                 lambda one: rs.plot_layers(one, "layer", hue="kind")):  # fmt: skip
        with pytest.raises(rs.ArgumentError, match="table"):
            draw(table)
    assert not pyplot.get_fignums()


def test_results_are_written_whole_and_figures_closed(tmp_path):
    pyplot.close("all")  # those of other tests
    table = pd.DataFrame({"site": ["L0.N1", " a,b"], "value": [0.1, -1 / 3]})
    axes, figure = rs.plot_layers(pd.DataFrame({"layer": [0, 1], "v": [1.0, 2.0]}), "v"), pyplot.figure()
    files = rs.save_results(
        str(tmp_path / "new" / "out"), {"one": table, "two.b": table[:1]}, {"one": axes, "f": figure}
    )
    folder = tmp_path / "new" / "out"
    assert files == [folder / name for name in ("one.csv", "two.b.csv", "one.png", "f.png")]
    assert sorted(folder.iterdir()) == sorted(files)
    pd.testing.assert_frame_equal(pd.read_csv(files[0]), table)
    pd.testing.assert_frame_equal(pd.read_csv(files[1]), table[:1])
    for path in files[2:]:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not pyplot.get_fignums()
    assert rs.save_results(folder, {}) == []


@pytest.mark.parametrize("name", ["a/b", "../a", "", "/a", 3])
def test_names_that_are_no_files_are_refused_before_anything_is_written(tmp_path, name):
    for tables, figures in (
        ({"fine": pd.DataFrame(), name: pd.DataFrame()}, {}),
        ({"fine": pd.DataFrame()}, {name: None}),
    ):
        with pytest.raises(rs.ArgumentError, match="must be named as files can be"):
            rs.save_results(tmp_path / "out", tables, figures)
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(rs.ArgumentError, match="`folder` must be a folder that can be written"):
            rs.save_results(place, {"t": pd.DataFrame()})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_picture_that_cannot_be_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    (tmp_path / "f.png").write_text("old")
    figure = pyplot.figure()

    def full(path, **_):
        path.write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        rs.save_results(tmp_path, {"t": pd.DataFrame({"a": [1]})}, {"f": figure})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.png", "t.csv"]
    assert (tmp_path / "f.png").read_text() == "old"
    assert not pyplot.get_fignums()


# The embedded real model.


@pytest.mark.real
def test_read_with_their_own_norm_the_first_layer_crowds_the_top(paris):
    layers = {norm: rs.locate(paris, k=100, norm=norm).table["layer"] for norm in ("own", "frozen")}
    assert (layers["own"] == 0).sum() == 77
    assert (layers["frozen"] == 0).sum() == 0


@pytest.mark.real
def test_scores_of_sums_are_nearly_sums_of_scores(paris):
    table = rs.cumulated(paris, layer=27)
    assert len(table) == 1536
    assert table.attrs["line"]["r"] > 0.999


@pytest.mark.real
def test_the_proven_worst_of_some_layers_are_the_exhaustive_ones(paris):
    layers = [27, 28, 29]
    found = rs.locate(paris, k=100, layers=layers, worst=True)
    exact = rs.scores(paris, layers=layers).nsmallest(100, "log_prob_increase")
    assert found.table["site"].tolist() == exact["site"].tolist()
    assert found.table["log_prob_increase"].tolist() == pytest.approx(exact["log_prob_increase"].tolist(), abs=1e-5)
    assert found.evaluations < found.candidates / 4

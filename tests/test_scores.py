"""Every score against loops of the test's own; bounds, searches and counts against exhaustive scores."""

import gc
import math
import weakref
from functools import cache
from itertools import pairwise

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import dtypes, families, prompts
from test_families import EVERY, IDS, opened
from tiny import FAMILIES, VOCAB, build, shared

import resid_surgery as rs
from resid_surgery.attribution import locating, ranges
from resid_surgery.attribution.bounds import Bounds
from resid_surgery.attribution.catalogue import SCORES
from resid_surgery.attribution.ranges import Ranges
from resid_surgery.attribution.states import States
from resid_surgery.models.kept import tensors_hash
from resid_surgery.models.zoo import tiny
from resid_surgery.stream import recording
from resid_surgery.stream.subvalues import KINDS, candidates, vector_of
from resid_surgery.stream.vocabulary import Readout

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11, versus=[7, 60])
BOUNDED = ("log_prob_increase", "prob_increase", "log_prob_alone", "leave_one_out")
LENGTH = next(name for name, score in SCORES.items() if score.formula == "|direction|")
LINEAR = ("bs_target", "bs_difference", "contrast", "coefficient", LENGTH, "coefficient_times_norm",
          "grad_times_activation")  # fmt: skip
RANKS = ("target_rank", "coefficient_over_rank")
UNSIGNED = ("log_prob_alone", "coefficient", LENGTH, "coefficient_times_norm", *RANKS)
FROZEN_ONLY = ("bs_target", "bs_difference")
kinds, norms = st.sampled_from(KINDS), st.sampled_from(["frozen", "own"])


def allowed(norm):
    """Names of the scores that a norm has."""
    return [name for name in SCORES if norm == "frozen" or name not in FROZEN_ONLY]


def test_the_catalogue_has_thirteen_scores_and_says_what_they_are():
    table = rs.describe_scores()
    assert set(table["score"]) == {*BOUNDED, *LINEAR, *RANKS}
    assert len(table) == 13
    assert table.set_index("score")["best"].to_dict() == {
        name: "lowest" if name == "target_rank" else "highest" for name in SCORES
    }
    ways = table.groupby("search")["score"].apply(set).to_dict()
    assert ways == {"certificate": set(BOUNDED), "linear": set(LINEAR), "exhaustive": set(RANKS)}
    for row in table.itertuples():
        assert row.norms == ("frozen" if row.score in FROZEN_ONLY else "frozen | own")


def test_no_score_is_lost_under_a_column_that_tables_have_anyway():
    rec = rs.record(shared("llama"), PROMPT)
    others = {"rank", "site", "kind", "layer", "part", "position", "norm", "evaluations", "candidates", "score"}
    assert not others & set(SCORES)
    for name in SCORES:
        for table in (rs.scores(rec, kind="head", score=name), rs.locate(rec, kind="head", score=name).table):
            assert table[name].dtype == float, name
            assert table.columns.is_unique


# Each score, in nested loops.


def row_of(seen, layer, part, a):
    """A row of the down-projection or of W_O, as a direction of the stream."""
    path = seen.where.down if part == "mlp" else seen.where.w_o
    return oracle.through_post(seen, layer, part, oracle.rows_of(seen, layer, path)[a])


def value_at(seen, site, j):
    """v[h, j] of the head of a site."""
    values, heads = seen.values[site.layer], len(seen.alpha[site.layer])
    return values[site.head // (heads // len(values))][j]


def parts_of(seen, site):
    """(coefficient, direction, part) of a subvalue, in loops."""
    layer, t = site.layer, seen.t
    if isinstance(site, rs.Neuron):
        return seen.coefficient[layer][site.index], row_of(seen, layer, "mlp", site.index), "mlp"
    if isinstance(site, rs.Sublayer):
        return 1.0, (seen.attn if site.part == "attn" else seen.mlp)[layer], site.part
    alpha = seen.alpha[layer][site.head]
    if isinstance(site, rs.AttnNeuron):
        sources = range(t + 1) if site.source is None else [site.source]
        m = sum(alpha[j] * value_at(seen, site, j)[site.index] for j in sources)
        return m, row_of(seen, layer, "attn", site.head * len(value_at(seen, site, 0)) + site.index), "attn"
    if isinstance(site, rs.HeadSource):
        value = value_at(seen, site, site.source)
        rows = oracle.rows_of(seen, layer, seen.where.w_o)[site.head * len(value) : (site.head + 1) * len(value)]
        written = [sum(a * w for a, w in zip(value, column, strict=True)) for column in zip(*rows, strict=True)]
        return alpha[site.source], oracle.through_post(seen, layer, "attn", written), "attn"
    pairs = [oracle.head_source(seen, layer, site.head, j) for j in range(t + 1)]
    return 1.0, [sum(column) for column in zip(*pairs, strict=True)], "attn"


def logits_of(seen, v, *, own, constants=True):
    """Capped bs-values of a state."""
    s = oracle.scale(seen, oracle.final_norm(seen), v) if own else None
    return oracle.capped(seen, oracle.bs(seen, v, constants=constants, s=s))


def plus(a, b, sign=1.0):
    return [x + sign * y for x, y in zip(a, b, strict=True)]


def mean_rank(values, w):
    above, tied = sum(b > values[w] for b in values), sum(b == values[w] for b in values)
    return above + (tied + 1) / 2


def by_loops(seen, site, name, norm, w, versus):
    """One score of one subvalue; what needs the model's own gradient is tested below."""
    m, direction, part = parts_of(seen, site)
    v, own, r = [m * d for d in direction], norm == "own", seen.final
    x = oracle.state(seen, site.layer, part)
    length = math.sqrt(sum(d * d for d in direction))

    def log_p(state):
        return oracle.log_prob(logits_of(seen, state, own=own), w)

    def contrast():
        moved, before = logits_of(seen, plus(x, v), own=own), logits_of(seen, x, own=own)
        return sum((moved[w] - before[w]) - (moved[u] - before[u]) for u in versus) / len(versus)

    return {
        "log_prob_increase": lambda: log_p(plus(x, v)) - log_p(x),
        "prob_increase": lambda: math.exp(log_p(plus(x, v))) - math.exp(log_p(x)),
        "bs_target": lambda: oracle.bs(seen, v)[w],
        "bs_difference": lambda: oracle.bs(seen, v)[w] - sum(oracle.bs(seen, v)[u] for u in versus) / len(versus),
        "contrast": contrast,
        "log_prob_alone": lambda: oracle.log_prob(logits_of(seen, v, own=own, constants=False), w),
        "coefficient": lambda: m,
        LENGTH: lambda: length,
        "coefficient_times_norm": lambda: abs(m) * length,
        "target_rank": lambda: mean_rank(oracle.bs(seen, v), w),
        "coefficient_over_rank": lambda: m / mean_rank(oracle.bs(seen, v), w),
        "leave_one_out": lambda: log_p(r) - log_p(plus(r, v, -1.0)),
    }[name]()


def sample(table, n, seed=0):
    """Some rows of a table, and one whose coefficient is 0 where there is one."""
    chosen = table.sample(min(n, len(table)), random_state=seed)
    dead = table[table["coefficient"] == 0].head(1)
    return [row for _, row in chosen.iterrows()] + [row for _, row in dead.iterrows()]


@pytest.mark.parametrize("position", [4, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_is_what_loops_make_of_its_formula(family, position):
    model = shared(family)
    rec = rs.record(model, rs.Prompt(ids=PROMPT.ids, target=11, versus=[7, 60], position=position))
    seen = oracle.capture(model.module, family, list(PROMPT.ids), position)
    for norm in ("frozen", "own"):
        for kind in KINDS:
            table = rs.scores(rec, kind=kind, score="all", norm=norm)
            names = [name for name in allowed(norm) if name != "grad_times_activation"]
            for row in sample(table, 3, position):
                site = rs.parse_site(row["site"])
                expected = {name: by_loops(seen, site, name, norm, 11, [7, 60]) for name in names}
                # transformers computes softmax, and most RMSNorms, in float32
                assert row[names].to_dict() == pytest.approx(expected, rel=1e-5, abs=1e-6), (norm, row["site"])
                if row["coefficient"] == 0:
                    assert row["target_rank"] == (VOCAB + 1) / 2
                    assert row["log_prob_alone"] == pytest.approx(-math.log(VOCAB))


# Gradients, against central differences of the model's own log p.


def nudged(module, family, site, ids, t, w, by):
    """log p(w) with a subvalue of the run multiplied by 1 + by, through plain hooks."""
    where = oracle.WHERE[family]
    block = f"{where.blocks}.{site.layer}."

    def edit(value, index, amount=None):
        out = value.clone()
        part = value.view(-1, value.shape[-1])[t, index] if amount is None else amount
        out.view(-1, out.shape[-1])[t, index] += by * part
        return out

    def reads(path, *what):
        hook = lambda module, args: (edit(args[0], *what), *args[1:])  # noqa: E731
        return module.get_submodule(block + path).register_forward_pre_hook(hook)

    if isinstance(site, rs.Sublayer):
        path = {"attn": where.attn_post or where.w_o, "mlp": where.mlp_post or where.down}[site.part]
        hook = lambda module, args, output: edit(output, slice(None))  # noqa: E731
        handle = module.get_submodule(block + path).register_forward_hook(hook)
    elif isinstance(site, rs.Neuron):
        handle = reads(where.down, site.index)
    else:
        seen = oracle.capture(module, family, ids, t)
        d_head = len(value_at(seen, site, 0))
        first, single = site.head * d_head, isinstance(site, rs.AttnNeuron)
        index, amount = first + site.index if single else slice(first, first + d_head), None
        if getattr(site, "source", None) is not None:
            value = value_at(seen, site, site.source)
            alpha = seen.alpha[site.layer][site.head][site.source]
            amount = alpha * torch.tensor(value[site.index] if single else value)
        handle = reads(where.w_o, index, amount)
    try:
        return torch.log_softmax(module(torch.tensor([ids]), use_cache=False).logits[0, t].double(), -1)[w]
    finally:
        handle.remove()


def difference(f, h):
    """f'(0) by central differences of fourth order."""
    return float(8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_times_activation_is_the_slope_of_the_models_own_log_prob(family):
    model, ids = shared(family), list(PROMPT.ids)
    for position in (4, 2):
        rec = rs.record(model, rs.Prompt(ids=ids, target=11, position=position))
        for kind in KINDS:
            table = rs.scores(rec, kind=kind, score=["grad_times_activation", "coefficient"])
            size = 1 + float(table["grad_times_activation"].abs().max())
            for row in sample(table.sort_values("grad_times_activation").iloc[[0, 1, -2, -1]], 4):
                site, found = rs.parse_site(row["site"]), row["grad_times_activation"]
                by = torch.zeros((), dtype=torch.float64, requires_grad=True)
                (grad,) = torch.autograd.grad(nudged(model.module, family, site, ids, position, 11, by), by)
                assert found == pytest.approx(float(grad), abs=1e-5 * size), site
                with torch.no_grad():
                    slope = difference(
                        lambda h, s=site, t=position: nudged(model.module, family, s, ids, t, 11, h), 5e-3
                    )
                bends = 3e-2 if family == "opt" else 2e-4  # a ReLU may bend within the step
                assert found == pytest.approx(slope, abs=bends * size), site


# Several at once.


@given(families, prompts(), kinds, norms, st.data())
def test_several_scores_are_the_single_ones_side_by_side(family, prompt, kind, norm, data):
    rec = rs.record(shared(family), prompt)
    names = data.draw(st.lists(st.sampled_from(allowed(norm)), min_size=1, max_size=4, unique=True))
    layers = data.draw(st.none() | st.sampled_from([[0], [2], [-1, 0]]))
    together = rs.scores(rec, kind=kind, score=names, norm=norm, layers=layers)
    assert list(together.columns) == ["site", "kind", "layer", *names, "norm", "position"]
    assert together.attrs["versus"] == tuple(prompt.versus)
    for name in names:
        alone = rs.scores(rec, kind=kind, score=name, norm=norm, layers=layers)
        assert alone["site"].tolist() == together["site"].tolist()
        assert together[name].tolist() == pytest.approx(alone[name].tolist(), rel=1e-9, abs=1e-11)


def test_all_means_all_that_the_norm_the_prompt_and_bounds_allow():
    model = shared("gpt2")
    with_, without = (rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1, versus=v)) for v in ([2], []))
    contrasts = ["bs_difference", "contrast"]
    for norm in ("frozen", "own"):
        for rec in (with_, without):
            expected = [n for n in allowed(norm) if rec is with_ or n not in contrasts]
            table = rs.scores(rec, kind="head", score="all", norm=norm)
            assert list(table.columns[3:-2]) == expected
            bracketed = rs.scores(rec, kind="head", score="all", norm=norm, bounds=True)
            ends = [f"{n}_{end}" for n in expected if n not in RANKS for end in ("lower", "upper")]
            assert list(bracketed.columns[3:-2]) == ends
    assert rs.scores(without, kind="head", score="contrast", versus=[4, 9]).attrs["versus"] == (4, 9)
    table = rs.scores(without, kind="head", score=["contrast", "bs_target"], versus=9)
    other = rs.record(model, rs.Prompt(ids=[5, 4, 3], target=9))
    gap = table["bs_target"] - rs.scores(other, kind="head", score="bs_target")["bs_target"]
    assert table["contrast"].tolist() == pytest.approx(gap.tolist(), abs=1e-9)


# Bounds.


@cache
def bent(seed, cap):
    """Values many times the soft-cap."""
    return rs.load(build("gemma2", seed=seed, final_logit_softcapping=cap))


def bracketed(rec, kind, norm, layers=None):
    """Which bounds of which scores miss the exact ones."""
    names = [*BOUNDED, "contrast", "coefficient"]
    exact = rs.scores(rec, kind=kind, score=names, norm=norm, layers=layers)
    ends = rs.scores(rec, kind=kind, score=names, norm=norm, layers=layers, bounds=True)
    assert ends["site"].tolist() == exact["site"].tolist()
    wrong = []
    for name in names:
        low, high, value = ends[f"{name}_lower"], ends[f"{name}_upper"], exact[name]
        if name in LINEAR:
            assert low.tolist() == value.tolist() == high.tolist()
        assert not (low + high + value).isna().any(), name
        bad = (low > value) | (value > high)
        wrong += [(name, site) for site in exact["site"][bad]]
    return wrong


@given(families, dtypes, prompts(), kinds, norms)
@settings(max_examples=40)
def test_every_score_lies_between_its_bounds(family, dtype, prompt, kind, norm):
    assert not bracketed(rs.record(shared(family, dtype), prompt), kind, norm)


@given(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.6]), prompts(), kinds, norms)
def test_every_score_lies_between_its_bounds_where_a_soft_cap_bends_hard(seed, cap, prompt, kind, norm):
    assert not bracketed(rs.record(bent(seed, cap), prompt), kind, norm)


def test_bounds_are_as_tight_as_they_are_useful():
    """Not a proof, but bounds that hold because they say nothing would fail here."""
    rec = rs.record(shared("llama"), PROMPT)
    table = rs.scores(rec, score=list(BOUNDED), bounds=True)
    assert (table["log_prob_increase_upper"] - table["log_prob_increase_lower"]).median() < 0.2
    assert ((table["log_prob_increase_lower"] > 0) | (table["log_prob_increase_upper"] < 0)).mean() > 0.5


@given(families, prompts(), st.sampled_from(["neuron", "head_source", "attn_neuron"]), st.booleans(), st.booleans())
def test_what_bounds_take_for_the_span_of_a_change_holds_every_token(family, prompt, kind, own, removed):
    rec = rs.record(shared(family), prompt)
    blocks = [(layer, part, block) for layer in range(3) for part, block in candidates(rec, kind, layer)]
    states = States.of(rec, [(layer, part) for layer, part, _ in blocks], own=own)
    bounds = Bounds(rec, states, removed=removed)
    bounds.ranges.prepare([block for _, _, block in blocks])
    for layer, part, block in blocks:
        state = states.index[layer, part]
        moved = bounds._moved(block, state, bounds.g[state][None])
        v = block.all_vectors() * (-1 if removed else 1)
        change = states.readout.columns(states.normed(torch.full((block.count,), state), v))
        low, high = bounds._spread(block, state, moved)
        assert (low <= change.amin(0)).all()
        assert (change.amax(0) <= high).all()
        if kind != "head_source" and not own:  # and no wider than need be
            torch.testing.assert_close(high - low, change.amax(0) - change.amin(0), atol=1e-6, rtol=1e-6)


def missed(family="llama", kind="neuron", norm="frozen"):
    wrong = []
    for ids in ([5, 4, 3], [40, 8, 17], [9, 2, 66, 30]):
        rec = rs.record(shared(family), rs.Prompt(ids=ids, target=1, versus=[2]))
        wrong += bracketed(rec, kind, norm)
    return wrong


@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_ranges_a_quarter_as_wide_make_lower_bounds_wrong(monkeypatch, norm):
    assert not missed(norm=norm)
    whole = Ranges.of
    monkeypatch.setattr(Ranges, "of", lambda self, block: tuple(end / 4 for end in whole(self, block)))
    wrong = missed(norm=norm)
    assert len(wrong) > 3
    assert {name for name, _ in wrong} <= set(BOUNDED)


def test_without_the_curvature_of_a_soft_cap_bounds_are_wrong(monkeypatch):
    rec = rs.record(bent(0, 0.3), PROMPT)
    assert not bracketed(rec, "layer", "frozen")
    monkeypatch.setattr(Bounds, "_bend", lambda self, moved, state: 0 * moved.length)
    assert bracketed(rec, "layer", "frozen")


# The best and the worst.


def is_the_first_k(found, table, name, k, *, largest):
    """Whether what was located is the first k of an exhaustive table; equal scores go by place."""
    places = {site: i for i, site in enumerate(table["site"])}
    where = [places[site] for site in found.table["site"]]
    values, best = table[name].to_numpy(), table[name].sort_values(ascending=not largest).to_numpy()[:k]
    assert len(set(where)) == k == len(found.sites)
    assert [str(s) for s in found.sites] == found.table["site"].tolist()
    assert found.table[name].tolist() == pytest.approx(best.tolist(), rel=1e-5, abs=1e-6)
    assert values[where].tolist() == pytest.approx(best.tolist(), rel=1e-5, abs=1e-6)
    for i, j in pairwise(where):
        assert values[i] != values[j] or i < j
    outside = [i for i in places.values() if i not in set(where)]
    assert not any(values[i] == values[where[-1]] and i < where[-1] for i in outside)


@given(
    families,
    dtypes,
    prompts(),
    kinds,
    st.sampled_from(list(SCORES)),
    norms,
    st.booleans(),
    st.integers(1, 30),
    st.data(),
)
@settings(max_examples=100)
def test_what_is_located_by_any_score_is_the_exhaustive_answer(
    family, dtype, prompt, kind, score, norm, worst, k, data
):
    norm = "frozen" if score in FROZEN_ONLY else norm
    rec = rs.record(shared(family, dtype), prompt)
    layers = data.draw(st.none() | st.lists(st.integers(-3, 2), min_size=1, max_size=2))
    table = rs.scores(rec, kind=kind, score=score, norm=norm, layers=layers)
    k = min(k, len(table))
    found = rs.locate(rec, k=k, kind=kind, score=score, norm=norm, layers=layers, worst=worst)
    assert (found.score, found.worst, found.candidates) == (score, worst, len(table))
    assert found.proof == SCORES[score].search
    assert found.evaluations <= found.candidates
    assert found.proof != "linear" or found.evaluations == 0
    is_the_first_k(found, table, score, k, largest=(score != "target_rank") != worst)


SIGNED = ("log_prob_increase", "prob_increase", "leave_one_out", "bs_target", "contrast", "grad_times_activation")


@given(families, dtypes, prompts(), kinds, norms, st.sampled_from(SIGNED))
@settings(max_examples=50)
def test_counts_are_those_of_exhaustive_scores(family, dtype, prompt, kind, norm, score):
    norm = "frozen" if score in FROZEN_ONLY else norm
    rec = rs.record(shared(family, dtype), prompt)
    found = rs.counts(rec, kind=kind, score=score, norm=norm)
    every = rs.scores(rec, kind=kind, score=score, norm=norm)
    parts = [site.rsplit(".", 1)[-1] if kind == "layer" else kind for site in every["site"]]
    groups = every.groupby([every["layer"], parts], sort=False)[score]
    assert len(found) == len(groups)
    # a score of the size of rounding has no sign that two ways of computing it must share
    dust = 200 * torch.finfo(dtype).eps
    for row, ((layer, part), values) in zip(found.itertuples(), groups, strict=True):
        assert (row.layer, row.kind) == (layer, part)
        assert row.helpful + row.harmful + row.zero == row.candidates == len(values)
        unsure = int(((values.abs() <= dust) & (values != 0)).sum())
        assert abs(row.helpful - int((values > 0).sum())) <= unsure
        assert abs(row.harmful - int((values < 0).sum())) <= unsure
        assert 0 <= row.evaluations <= row.candidates
    assert set(found["score"]) == {score}
    assert set(found["norm"]) == {norm}


# Signs.


def test_a_negative_coefficient_reverses_the_order_of_the_tokens():
    """The target shares its unembedding row with two tokens: their ranks are one mean, whatever the sign."""
    module = build("llama")
    with torch.no_grad():
        module.lm_head.weight[[20, 33]] = module.lm_head.weight[11].clone()
        for layer in module.model.layers:
            layer.mlp.down_proj.weight[:, 20:] = layer.mlp.down_proj.weight[:, :20]
    rec = rs.record(rs.load(module), PROMPT)
    names = ["coefficient", LENGTH, "target_rank", "coefficient_over_rank", "bs_target", "bs_difference"]
    table = rs.scores(rec, score=names).set_index("site")
    opposite = 0
    for layer in range(3):
        for k in range(20):
            a, b = table.loc[f"L{layer}.N{k}"], table.loc[f"L{layer}.N{k + 20}"]
            assert a[LENGTH] == pytest.approx(b[LENGTH])
            for name in ("bs_target", "bs_difference"):
                assert a[name] / a["coefficient"] == pytest.approx(b[name] / b["coefficient"])
            against = a["coefficient"] * b["coefficient"] < 0
            opposite += against
            assert b["target_rank"] == (VOCAB + 1 - a["target_rank"] if against else a["target_rank"])
            assert a["coefficient_over_rank"] == pytest.approx(a["coefficient"] / a["target_rank"])
    assert 15 < opposite < 45


def test_which_of_coefficient_and_value_vector_carries_a_sign_makes_no_difference():
    module = build("llama")
    before = rs.scores(rs.record(rs.load(module), PROMPT), score="all")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.up_proj.weight.neg_()
            layer.mlp.up_proj.bias.neg_()
            layer.mlp.down_proj.weight.neg_()
    after = rs.scores(rs.record(rs.load(module), PROMPT), score="all")
    for name in SCORES:
        turned = -1 if name in ("coefficient", "coefficient_over_rank") else 1
        assert after[name].tolist() == pytest.approx((turned * before[name]).tolist(), rel=1e-6, abs=1e-6), name


# Every type.


def kinds_of(model):
    """Neurons, and one of two kinds of attention's subvalues."""
    assert any(model.block(i).attn_kind == "attention" for i in range(model.anatomy.n_layers))
    return ["neuron", ("head_source", "attn_neuron_source")[len(model.name) % 2]]


@pytest.mark.parametrize("model_type", EVERY)
def test_every_type_is_bounded_and_located_as_exhaustively(model_type):
    model, rec = opened(model_type)
    names = (["log_prob_increase", "leave_one_out"], ["prob_increase", "log_prob_alone"])[len(model_type) % 2]
    for n, kind in enumerate(kinds_of(model)):
        norm = ("frozen", "own")[n % 2]
        exact = rs.scores(rec, kind=kind, score=names, norm=norm)
        ends = rs.scores(rec, kind=kind, score=names, norm=norm, bounds=True)
        for name in names:
            assert (ends[f"{name}_lower"] <= exact[name]).all(), (kind, name)
            assert (exact[name] <= ends[f"{name}_upper"]).all(), (kind, name)
        for worst in (False, True):
            found = rs.locate(rec, k=3, kind=kind, score=names[n % 2], norm=norm, worst=worst)
            is_the_first_k(found, exact, names[n % 2], 3, largest=not worst)


@pytest.mark.parametrize("model_type", EVERY)
def test_gradients_of_every_type_are_slopes_of_what_interventions_measure(model_type):
    _, rec = opened(model_type)
    slopes_of(rec, 5e-3, 1e-2)


@pytest.mark.parametrize("model_type", ["beam", "deepseek_v3", "gemma3", "gpt_oss", "granite", "qwen3_next"])
def test_gradients_in_double_precision_are_slopes_to_four_digits(model_type):
    rec = rs.record(rs.load(tiny(model_type, dtype=torch.float64)), rs.Prompt(ids=IDS, target=3))
    slopes_of(rec, 5e-3, 2e-4)


def slopes_of(rec, h, tolerance):
    table = rs.scores(rec, score="grad_times_activation").sort_values("grad_times_activation")
    chosen = table.iloc[[0, -1]]
    steps = (-2 * h, -h, h, 2 * h)
    rows = [rs.Scale(site, 1 + by) for site in chosen["site"] for by in steps]
    log_p = rs.sweep(rec, rows)["log_prob"].to_numpy().reshape(-1, 4)
    slopes = [difference(lambda by, r=row: r[steps.index(by)], h) for row in log_p]
    size = float(table["grad_times_activation"].abs().max())
    assert chosen["grad_times_activation"].tolist() == pytest.approx(slopes, abs=tolerance * size)


# Nothing of the user's is changed.


def state_of_the_users(module):
    flags = [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()]
    return flags, [m.training for m in module.modules()], torch.is_grad_enabled()


@pytest.mark.parametrize("wanted", [True, False, None])
def test_gradients_leave_nothing_in_the_users_model(wanted):
    module = build("gpt2")
    for i, p in enumerate(module.parameters()):
        p.requires_grad_(bool(i % 2) if wanted is None else wanted)
    rec = rs.record(rs.load(module), PROMPT)
    before, weights = state_of_the_users(module), {n: p.clone() for n, p in module.named_parameters()}
    table = rs.scores(rec, score="grad_times_activation")
    assert state_of_the_users(module) == before
    for manner in (torch.no_grad(), torch.inference_mode(False), torch.enable_grad()):
        with manner:
            enabled = torch.is_grad_enabled()
            again = rs.scores(rec, score="grad_times_activation")
            assert torch.is_grad_enabled() == enabled
        assert again["grad_times_activation"].tolist() == table["grad_times_activation"].tolist()
    assert state_of_the_users(module) == before
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def test_a_failed_backward_pass_is_one_clear_error_and_leaves_nothing_either():
    module = build("llama")
    cut = module.model.layers[2].register_forward_hook(lambda module, args, output: output.detach())
    rec = rs.record(rs.load(module), PROMPT)
    before = state_of_the_users(module)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            with pytest.raises(rs.UnsupportedModelError, match="backward pass"):
                rs.scores(rec, score="grad_times_activation")
            assert torch.is_grad_enabled() == enabled
    assert state_of_the_users(module) == before
    cut.remove()
    fresh = rs.record(rs.load(module), PROMPT)
    assert rs.scores(fresh, score="grad_times_activation")["grad_times_activation"].abs().max() > 0


# The file of the table of ranges.


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache folder of its own in which every table is worth keeping, and how many rows were computed."""
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "WORTH_KEEPING", 0)
    computed, plain = [], Ranges._computed

    def counted(self, rows, step):
        found = plain(self, rows, step)
        computed.append(len(rows.rows))
        return found

    monkeypatch.setattr(Ranges, "_computed", counted)
    return tmp_path / "cache" / "ranges", computed


def lower(module, **options):
    rec = rs.record(rs.load(module), PROMPT)
    return rs.scores(rec, bounds=True, **options)["log_prob_increase_lower"].tolist()


def tables(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def test_the_table_is_computed_once_and_then_read(kept):
    folder, computed = kept
    first = lower(build("llama"))
    assert computed == [40, 40, 40]
    (file,) = tables(folder)
    written = file.read_bytes()
    again = lower(build("llama"))
    assert again == first
    assert computed[3:] == [1, 1, 1]  # a look at one row of each
    assert file.read_bytes() == written
    assert lower(build("llama"), kind="head") is not None
    assert computed[6:] == [24, 24, 24]  # heads need W_O's rows; what was there stays
    assert {found.shape for found in load_file(file).values()} == {(2, 40), (2, 24)}
    lower(build("llama", seed=1))
    assert len(tables(folder)) == 2


def test_one_opened_model_computes_its_table_once_without_any_file(kept, monkeypatch):
    folder, computed = kept
    monkeypatch.setattr(ranges, "WORTH_KEEPING", 1e10)
    model = rs.load(build("llama"))
    for ids in ([1, 2], [3, 4, 5]):
        rec = rs.record(model, rs.Prompt(ids=ids, target=1))
        rs.scores(rec, bounds=True)
        rs.locate(rec, worst=True)
        rs.counts(rec)
    assert computed == [40, 40, 40]
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "halved", "nan", "shape", "partly"])
def test_a_damaged_table_is_not_believed(kept, damage):
    folder, computed = kept
    first = lower(build("llama"))
    (file,) = tables(folder)
    if damage in ("truncated", "empty", "text"):
        whole = file.read_bytes()
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no table"}[damage])
    else:
        change = {"halved": lambda t: t / 2, "nan": lambda t: t * torch.nan, "shape": lambda t: t[:, :-1].clone(),
                  "partly": lambda t: torch.cat([t[:, :21], t[:, 21:] / 2], 1)}  # fmt: skip
        tables_now = {name: change[damage](found) for name, found in load_file(file).items()}
        # a flipped byte is seen by the hash; a table of other weights, whole in itself, by a look at one row
        save_file(tables_now, file, {} if damage == "partly" else {"hash": tensors_hash(tables_now, file.name)})
    del computed[:]
    assert lower(build("llama")) == first
    assert [n for n in computed if n > 1] == [40, 40, 40]
    assert all(found.shape == (2, 40) for found in load_file(file).values())  # and it is mended
    del computed[:]
    assert lower(build("llama")) == first
    assert computed == [1, 1, 1]


def test_an_interrupt_keeps_what_was_finished_and_leaves_no_half_file(kept, monkeypatch):
    folder, computed = kept
    counted = Ranges._computed

    def interrupted(self, rows, step):
        if len(computed) == 1:
            raise KeyboardInterrupt
        return counted(self, rows, step)

    monkeypatch.setattr(Ranges, "_computed", interrupted)
    model = rs.load(build("llama"))
    rec = rs.record(model, PROMPT)
    with pytest.raises(KeyboardInterrupt):
        rs.scores(rec, bounds=True)
    (file,) = tables(folder)
    assert len(load_file(file)) == 1
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".lock"}
    monkeypatch.setattr(Ranges, "_computed", counted)
    resumed = rs.scores(rec, bounds=True)["log_prob_increase_lower"].tolist()
    assert computed == [40, 40, 40]
    assert len(load_file(file)) == 3
    monkeypatch.setattr(ranges, "WORTH_KEEPING", 1e10)
    file.unlink()
    assert lower(build("llama")) == resumed


def test_a_cache_folder_that_cannot_be_written_only_costs_time(kept, monkeypatch, tmp_path):
    first = lower(build("llama"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept for next time"):
        assert lower(build("llama")) == first
    assert kept[1] == [40] * 6
    assert (tmp_path / "file").read_text() == "in the way"


# Many prompts.


@pytest.fixture
def forwards(monkeypatch):
    """How many forwards recordings took."""
    ran, plain = [], recording.forward
    monkeypatch.setattr(recording, "forward", lambda *args, **named: ran.append(1) or plain(*args, **named))
    return ran


@pytest.mark.parametrize("score", ["log_prob_increase", "target_rank", "contrast", "leave_one_out"])
@pytest.mark.parametrize("worst", [False, True])
def test_many_prompts_are_located_one_by_one(score, worst):
    model = shared("gpt2")
    many = [rs.Prompt(ids=[5 + i, 40 - i, 3 * i][: 1 + i % 3], target=10 + i % 3, versus=[2]) for i in range(7)]
    options = dict(k=4, kind="neuron", score=score, worst=worst)
    singles = [rs.locate(rs.record(model, one), **options) for one in many]
    each = list(rs.locate_each(rs.load(model.module), iter(many), **options))
    table = rs.locate_many(rs.load(model.module), (one for one in many), **options)
    assert table["prompt"].tolist() == [i for i in range(7) for _ in range(4)]
    for number, (alone, one) in enumerate(zip(singles, each, strict=True)):
        part = table[table["prompt"] == number]
        assert one.sites == alone.sites
        assert part["site"].tolist() == alone.table["site"].tolist() == one.table["site"].tolist()
        assert part[score].tolist() == pytest.approx(alone.table[score].tolist(), abs=1e-12)
        assert set(part["text"]) == {" ".join(map(str, many[number].ids))}
        assert set(part["candidates"]) == {alone.candidates}
        assert set(part["proof"]) == {alone.proof}


def test_a_bad_prompt_among_many_is_named_before_any_forward(forwards):
    model, good = shared("llama"), rs.Prompt(ids=[1, 2], target=3, versus=[4])
    for wrong in (dict(ids=[1, VOCAB]), dict(target=VOCAB + 5), dict(position=4)):
        bad = rs.Prompt(**{"ids": [1], "target": 1, **wrong})
        for verb in (rs.locate_each, rs.locate_many):
            with pytest.raises(rs.ResidSurgeryError, match="prompt 2: "):
                verb(model, [good, good, bad, good])
    for wrong in ([], "text", good, 7):
        with pytest.raises(rs.ArgumentError, match="prompts"):
            rs.locate_many(model, wrong)
    for options in (dict(score="contrast"), dict(k=0), dict(kind="nope"), dict(norm="nope"), dict(layers=[9]),
                    dict(worst=1), dict(score="all"), dict(score="bs_target", norm="own")):  # fmt: skip
        with pytest.raises(rs.ArgumentError):
            rs.locate_each(model, [good, rs.Prompt(ids=[1], target=3)], **options)
    assert not forwards


def test_results_come_while_later_prompts_wait_and_recordings_are_let_go(forwards, monkeypatch):
    alive, plain = [], locating.record

    def watched(*args, **named):
        rec = plain(*args, **named)
        alive.append(weakref.ref(rec))
        return rec

    monkeypatch.setattr(locating, "record", watched)
    model = shared("opt")
    found = rs.locate_each(model, [rs.Prompt(ids=[5 + i, 4, 3], target=1) for i in range(4)], k=2)
    assert not forwards
    for step in range(4):
        assert len(next(found).sites) == 2
        gc.collect()
        assert len(forwards) == step + 1
        assert [ref() is None for ref in alive] == [True] * (step + 1)
    assert next(found, None) is None
    gc.collect()
    assert all(ref() is None for ref in alive)


# Attention neurons from each source.


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_neurons_sources_share_one_pass_and_add_up_to_it(family, monkeypatch):
    rec = rs.record(shared(family), PROMPT)
    for layer in range(3):
        ((_, whole),) = candidates(rec, "attn_neuron", layer)
        ((_, split),) = candidates(rec, "attn_neuron_source", layer)
        assert split.count == 5 * whole.count
        summed = split.all_vectors().view(whole.count, 5, -1).sum(1)
        torch.testing.assert_close(summed, whole.all_vectors(), atol=1e-6, rtol=1e-6)
        site = split.site(5 * 7 + 2)
        torch.testing.assert_close(vector_of(rec, site), split.vectors(torch.tensor([37]))[0])
    passed, plain = [], Readout.columns

    def counted(self, h, *args, **named):
        passed.append(len(h))
        return plain(self, h, *args, **named)

    rows = len(candidates(rec, "attn_neuron", 0)[0][1].all_vectors())
    for score, states in (("log_prob_increase", 3), ("log_prob_alone", 1), ("target_rank", 0)):
        rec = rs.record(rs.load(build(family)), PROMPT)
        monkeypatch.setattr(Readout, "columns", counted)
        del passed[:]
        rs.scores(rec, kind="attn_neuron_source", score=score)
        assert sum(passed) == 3 * rows + states
        monkeypatch.setattr(Readout, "columns", plain)


# Errors, each before any forward.


def test_bad_calls_are_one_clear_error_before_any_forward(forwards):
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3], target=1))
    del forwards[:]
    verbs = (rs.scores, rs.locate, rs.counts)
    for verb in verbs:
        for wrong, match in (
            (dict(score="log_prob_incraese"), "log_prob_increase"),
            (dict(score=3), "score"),
            (dict(score=None), "score"),
            (dict(score="bs_target", norm="own"), "frozen"),
            (dict(score="bs_difference", norm="own"), "contrast|frozen"),
            (dict(score="bs_difference"), "competitors"),
            (dict(score="contrast"), "competitors"),
            (dict(score="contrast", versus=1), "other than the target"),
            (dict(score="contrast", versus=[2, 2]), "distinct"),
            (dict(score="contrast", versus=[]), "versus"),
            (dict(norm="both"), "norm"),
            (dict(kind="neurons"), "neuron"),
            (dict(layers=[3]), "layers"),
        ):
            with pytest.raises(rs.ArgumentError, match=match):
                verb(rec, **wrong)
        with pytest.raises(rs.PromptError, match="versus"):
            verb(rec, score="contrast", versus=[VOCAB])
    for verb, options, match in (
        *[(verb, dict(score=several, versus=[2]), "score")
          for several in (["bs_target", "contrast"], "all", ["bs_target"]) for verb in (rs.locate, rs.counts)],
        *[(rs.counts, dict(score=name), name) for name in UNSIGNED],
        *[(rs.scores, dict(score=[name, "bs_target"], bounds=True), "no bounds") for name in RANKS],
        *[(rs.scores, dict(score=several), "score")
          for several in ([], ["bs_target"] * 2, ["all"], ["nope"], {"bs_target": 1}, ("bs_target", 2))],
        *[(rs.locate, dict(k=k), "`k`") for k in (0, -1, 121, 2.0, True, "3", None)],
        *[(rs.scores, dict(bounds=bounds), "bounds") for bounds in (1, None, "yes")],
        (rs.locate, dict(k=121), "120 candidates of kind 'neuron'"),
        (rs.locate, dict(worst="yes"), "worst"),
    ):  # fmt: skip
        with pytest.raises(rs.ArgumentError, match=match):
            verb(rec, **options)
    assert not forwards

"""Intervals: against scipy, against closed forms, and their coverage on simulated clustered data."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from resid_surgery.editing.intervals import (
    UNITS,
    holm,
    holm_confidences,
    mcnemar,
    rate,
    units_of,
    wilson,
)
from resid_surgery.editing.resampling import p_value, spread
from resid_surgery.errors import ArgumentError

FACTS = [f"fact {i}" for i in range(100)]


def covered(intervals, true):
    """Share of intervals that hold the truth, and the Monte-Carlo error of .95 (three standard errors)."""
    hits = [low <= true <= high for low, high in intervals]
    return np.mean(hits), 3 * math.sqrt(0.95 * 0.05 / len(hits))


def naive_mean(x):
    half = 1.96 * x.std(ddof=1) / math.sqrt(x.size)
    return x.mean() - half, x.mean() + half


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_scipys(pair, confidence):
    s, n = pair
    theirs = stats.binomtest(s, n).proportion_ci(confidence, method="wilson")
    assert wilson(s, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_how_many_successes_prove_a_rate():
    assert wilson(73, 73).low >= 0.95 > wilson(72, 72).low
    assert wilson(20, 20).low == pytest.approx(0.839, abs=5e-4)
    assert wilson(20, 20).high == 1.0
    assert wilson(0, 20).low == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_sums_the_binomial_by_hand(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    n = lost + gained
    mass = [math.comb(n, i) / 2**n for i in range(n + 1)]
    expected = sum(m for m in mass if m <= mass[lost] * (1 + 1e-9)) if n else 1.0
    assert mcnemar(before, after) == (lost, gained, pytest.approx(expected))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.8, 0.99))
def test_holms_confidences_decide_as_holms_procedure_does(ps, confidence):
    decided = [p <= 1 - level for p, level in zip(ps, holm_confidences(ps, confidence), strict=True)]
    adjusted = [p <= 1 - confidence for p in holm(ps)]
    near = any(abs(p * k - (1 - confidence)) < 1e-9 for p in ps for k in range(1, 9))
    assert decided == adjusted or near


def test_bonferroni_is_the_hardest_level_and_all_undecided_share_one():
    assert holm_confidences([0.001, 0.5, 0.6]) == pytest.approx([1 - 0.05 / 3, 0.975, 0.975])
    assert holm_confidences([0.5, 0.001, 0.02]) == pytest.approx([0.95, 1 - 0.05 / 3, 0.975])


def test_the_unit_is_the_edit_then_the_prompt_then_the_row():
    codes, unit = units_of(4, ["a", "a", "b", ""], ["p", "q", "p", "p"])
    assert codes.tolist() == [0, 0, 1, 2]
    assert unit == "edits"
    assert units_of(3, ["", None, float("nan")], ["d", "d", "e"])[0].tolist() == [0, 0, 1]
    assert units_of(3, None, None) == (pytest.approx([0, 1, 2]), "documents")
    codes, unit = units_of(3, ["a"] * 3, ["p", "p", "q"])
    assert (codes.tolist(), unit) == ([0, 0, 1], "prompts of one edit")
    assert {unit for _, unit in (units_of(1, ["a"], None), units_of(2, "ab", None), units_of(1, None, None))} == set(
        UNITS
    )


def test_naive_intervals_of_clustered_means_are_too_narrow_and_these_are_not():
    """Trap 10: edits differ from each other, so prompts of one edit are not independent."""
    draw, facts = np.random.default_rng(0), np.repeat(FACTS[:12], 6)
    data = [draw.normal(0, 1, (12, 1)) + draw.normal(0, 1.2, (12, 6)) for _ in range(600)]
    naive, _ = covered([naive_mean(x) for x in data], 0)
    ours, error = covered([spread(x.ravel(), facts, resamples=400).at(0.95) for x in data], 0)
    assert naive < 0.85
    assert abs(ours - 0.95) <= error


def test_intervals_of_skewed_means_cover_nearly_what_they_promise():
    """Divergences are lognormal rather than normal; percentiles of the same draws cover 91 %."""
    draw, facts = np.random.default_rng(1), np.repeat(FACTS[:20], 5)
    data = [np.exp(draw.normal(0, 0.8, (20, 1)) + draw.normal(0, 0.8, (20, 5))) for _ in range(400)]
    naive, _ = covered([naive_mean(x) for x in data], math.exp(0.64))
    ours, error = covered([spread(x.ravel(), facts, resamples=400).at(0.95) for x in data], math.exp(0.64))
    assert naive < 0.8
    assert ours >= 0.95 - error


def test_naive_wilson_of_clustered_rates_is_too_narrow_and_this_is_not():
    draw, facts = np.random.default_rng(2), np.repeat(FACTS[:40], 5)
    rates = draw.beta(0.8, 0.2, (800, 40))  # mean .8, correlation within an edit .5
    data = (draw.random((800, 40, 5)) < rates[..., None]).astype(float)
    naive, _ = covered([wilson(x.sum(), x.size) for x in data], 0.8)
    ours, error = covered([rate(x.ravel(), facts).at(0.95) for x in data], 0.8)
    assert naive < 0.85
    assert abs(ours - 0.95) <= error


def test_perplexity_ratio_by_document_covers_what_it_promises():
    draw = np.random.default_rng(3)
    intervals = []
    for _ in range(400):
        tokens = draw.integers(50, 400, 25)
        change = draw.normal(0.01, 0.02, 25)
        intervals.append(spread(change, weights=tokens, resamples=400).at(0.95))
    ours, error = covered(intervals, 0.01)
    assert abs(ours - 0.95) <= error


def test_one_row_an_edit_is_plain_wilson():
    assert rate([1] * 73, FACTS[:73]).at(0.95) == wilson(73, 73)
    assert rate([1] * 7 + [0] * 3, FACTS[:10]).at(0.9) == wilson(7, 10, 0.9)


def test_many_prompts_of_few_edits_prove_no_more_than_the_edits():
    many = rate([1] * 200, np.repeat(FACTS[:20], 10))
    assert many.at(0.95) == wilson(20, 20)
    assert "over edits" in many.how


def test_a_mean_weighs_edits_alike_and_weights_weigh_tokens():
    assert spread([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]).value == 3.0
    assert spread([1.0, 5.0], weights=[3, 1]).value == 2.0
    assert spread([1.0, 5.0], base=[2.0, 1.0]).value == 2.0


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.5, 9)), min_size=2, max_size=9))
def test_error_of_a_ratio_is_the_linearised_one(pairs):
    v, b = (np.array(one) for one in zip(*pairs, strict=True))
    found = spread(v, base=b, resamples=100)
    ratio, n = sum(v) / sum(b), len(v)
    rest = [x - ratio * y for x, y in pairs]
    expected = math.sqrt(n / (n - 1) * sum(e * e for e in rest)) / sum(b)
    assert found.value == pytest.approx(ratio, abs=1e-9)
    assert found.error == pytest.approx(expected, abs=1e-9)


def test_a_draw_by_plain_loops_gives_the_same_quantiles():
    """The vectorised two-step draw against one written as it is said."""
    draw = np.random.default_rng(5)
    x = {f: draw.normal(i, 1, 3 + i) for i, f in enumerate(FACTS[:6])}
    values = np.concatenate(list(x.values()))
    ours = spread(values, list(itertools.chain.from_iterable([f] * len(v) for f, v in x.items())), resamples=4000)
    means = np.array([v.mean() for v in x.values()])
    centre, error = means.mean(), means.std(ddof=1) / math.sqrt(6)
    pivots = []
    for _ in range(4000):
        drawn = []
        for _ in range(6):
            rows = x[FACTS[draw.integers(6)]]
            drawn.append(draw.choice(rows, len(rows)).mean())
        drawn = np.array(drawn)
        pivots.append((drawn.mean() - centre) / (drawn.std(ddof=1) / math.sqrt(6)))
    slow = centre - error * np.quantile(pivots, [0.95, 0.05])
    assert ours.at(0.9) == pytest.approx(tuple(slow), abs=0.12 * (slow[1] - slow[0]))
    assert ours.error == pytest.approx(error)


def test_one_observation_proves_nothing_and_equal_ones_have_no_spread():
    assert spread([0.3], ["a"]).at(0.95) == (-math.inf, math.inf)
    assert spread([0.3, 0.3], ["a", "b"]).at(0.95) == (0.3, 0.3)
    assert spread([0.3] * 4, ["a"] * 4, ["p"] * 4).at(0.95) == (-math.inf, math.inf)
    assert spread([0.0, 1.0, 2.0], resamples=100).at(0.999) == (-math.inf, math.inf)  # too few draws for such a tail


def test_where_one_unit_carries_all_the_spread_the_bound_is_students_with_one_degree_of_freedom():
    found = spread([0.0] * 39 + [0.2])
    assert found.carried == pytest.approx(1.05, abs=0.01)
    error = 0.2 / 40  # sqrt(40 / 39 * sum d^2) / 40
    assert found.error == pytest.approx(error, rel=0.02)
    for confidence in (0.95, 0.99):
        assert found.at(confidence).high == pytest.approx(0.005 + found.error * stats.t.ppf(0.5 + confidence / 2, 1))
    assert found.at(0.95).low <= 0.0
    assert "Student's t of 1.1 units" in found.how
    mirrored = spread([0.0] * 39 + [-0.2])
    assert mirrored.at(0.95) == pytest.approx((-found.at(0.95).high, -found.at(0.95).low))
    noise = spread([0.0] * 38 + [1e-8, 3e-8]).at(0.99)
    assert noise.high < 1e-6, "what the null control gives is proven harmless"


def test_the_fallback_is_not_taken_where_draws_have_a_spread():
    found = spread(np.random.default_rng(1).lognormal(size=30))
    assert found.how == "bootstrap-t over documents"


def test_a_denominator_that_may_be_zero_leaves_both_sides_open():
    found = spread([1.0, 2.0, 1.5, 1.2], base=[3.0, -2.9, 0.1, 0.2])
    assert found.at(0.95) == (-math.inf, math.inf)


def test_the_p_value_is_where_the_interval_lets_go():
    found = rate([1] * 35, FACTS[:35])
    p = p_value(found, 0.9)
    assert found.at(1 - p * 1.01).low > 0.9 > found.at(1 - p * 0.99).low
    mean = spread(np.random.default_rng(0).normal(1, 1, 40))
    p = p_value(mean, 0.8)
    assert mean.at(1 - p * 1.05).low >= 0.8 >= mean.at(1 - p * 0.9).low
    assert p_value(mean, mean.value) > 0.9


def test_the_same_seed_gives_the_same_interval_whatever_the_pieces(monkeypatch):
    x = np.random.default_rng(0).normal(size=30)
    assert spread(x, seed=1).at(0.9) == spread(x, seed=1).at(0.9) != spread(x, seed=2).at(0.9)
    monkeypatch.setattr("resid_surgery.editing.resampling.ROWS_AT_ONCE", 90)
    small = spread(x, seed=1)
    assert len(small.pivots) == 2000


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: wilson(5, 4), "0 <= successes <= n"),
        (lambda: wilson(1, 0), "n > 0"),
        (lambda: wilson(1, 2, 1.0), "`confidence` must be between 0 and 1"),
        (lambda: mcnemar([1, 0], [1]), "of one length"),
        (lambda: mcnemar([2], [1]), "a row of 0 and 1"),
        (lambda: holm([1.2]), "in 0..1"),
        (lambda: rate([1.5]), "rates in 0..1"),
        (lambda: rate([]), "at least one finite number"),
        (lambda: spread([1.0, math.nan]), "at least one finite number"),
        (lambda: spread([1.0, 2.0], ["a"]), "one a value"),
        (lambda: spread([1.0, 2.0], weights=[1, -1]), "> 0"),
        (lambda: spread([1.0, 2.0], weights=[1, 1], base=[1, 1]), "one of the two at most"),
        (lambda: spread([1.0, 2.0], base=[1, -1]), "a sum other than 0"),
        (lambda: spread([1.0, 2.0], base=[1]), "`base` must be one a value"),
        (lambda: spread([1.0, 2.0], resamples=5), "`resamples`"),
    ],
)
def test_bad_calls_say_what_must_hold(call, text):
    with pytest.raises(ArgumentError, match=text.replace("(", r"\(").replace("`", "`")):
        call()


def test_no_flip_in_long_texts_proves_more_than_one_a_text_and_less_than_one_a_token():
    found = rate([0] * 720, prompts=np.repeat(FACTS[:12], 60))
    assert (found.units, found.unit) == (12, "documents")
    assert found.effective == pytest.approx(720 / (1 + 59 * 0.05))
    assert wilson(0, 720).high < found.at(0.95).high < 0.05 < wilson(0, 12).high
    one = rate([1] + [0] * 719, prompts=np.repeat(FACTS[:12], 60))
    assert one.at(0.95).high > found.at(0.95).high


def test_rare_flips_in_texts_are_covered():
    draw = np.random.default_rng(4)
    rates = draw.beta(0.03 * 49, 0.97 * 49, (400, 20))  # mean .03, correlation within a text .02
    data = (draw.random((400, 20, 60)) < rates[..., None]).astype(float)
    ours, error = covered([rate(x.ravel(), prompts=np.repeat(FACTS[:20], 60)).at(0.95) for x in data], 0.03)
    assert ours >= 0.95 - error

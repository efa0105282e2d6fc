"""Gates: every state of either direction, limits at their edge, the noise floor, Holm, what an interval can prove."""

import math

import numpy as np
import pandas as pd
import pytest
from fake_validation import fake_validation, measured_single, measured_stream, rows
from hypothesis import given
from hypothesis import strategies as st

from resid_surgery.editing.gating import COLUMNS, STATES, Measured, judge, room_used, verdict, worst
from resid_surgery.editing.intervals import wilson
from resid_surgery.editing.policy import GATES, Limits, Policy
from resid_surgery.errors import ArgumentError

LOW, HIGH = "kl: unrelated text", "capability margin"  # at most .001 / .01, at least -.01 / -.03


def one(gate, values, *, kind="mean", stream=False, facts="", policy=None, **more):
    """The row of a single gate."""
    return judge([Measured(gate, rows(values, facts), kind, **more)], stream=stream, policy=policy).iloc[0]


def around(centre, half, n=60):
    """Values whose mean has an interval of about centre +- half."""
    return centre + half * math.sqrt(n) / 2 * np.random.default_rng(0).permutation(np.linspace(-1.7, 1.7, n))


@pytest.mark.parametrize(
    ("gate", "centre", "half", "state", "warns"),
    [
        (LOW, 0.0005, 0.0001, "PASS", False),
        (LOW, 0.0010, 0.0003, "PASS", True),  # reaches over the warn limit
        (LOW, 0.0050, 0.0010, "PASS", True),
        (LOW, 0.0095, 0.0020, "INCONCLUSIVE", True),
        (LOW, 0.0105, 0.0020, "INCONCLUSIVE", True),
        (LOW, 0.0200, 0.0020, "FAIL", True),
        (HIGH, 0.01, 0.005, "PASS", False),
        (HIGH, -0.01, 0.005, "PASS", True),
        (HIGH, -0.029, 0.005, "INCONCLUSIVE", True),
        (HIGH, -0.031, 0.005, "INCONCLUSIVE", True),
        (HIGH, -0.05, 0.005, "FAIL", True),
    ],
)
def test_each_state_of_each_direction(gate, centre, half, state, warns):
    row = one(gate, around(centre, half))
    assert (row["state"], row["warns"]) == (state, warns)
    assert row["low"] < row["value"] < row["high"]
    assert bool(row["why"]) == warns


@pytest.mark.parametrize(
    ("gate", "value", "state", "warns"),
    [
        (LOW, 0.001, "PASS", False),
        (LOW, 0.01, "PASS", True),
        (LOW, np.nextafter(0.01, 1), "FAIL", True),
        ("cast cosine", 0.98, "PASS", False),
        ("cast cosine", 0.90, "PASS", True),
        ("cast cosine", np.nextafter(0.90, 0), "FAIL", True),
    ],
)
def test_on_the_limit_is_within_it(gate, value, state, warns):
    row = one(gate, [value], kind="exact")
    assert (row["state"], row["warns"], row["low"], row["high"]) == (state, warns, value, value)


def test_an_exact_gate_is_its_worst_row():
    assert one("cast cosine", [0.99, 0.95, 0.97], kind="exact")["value"] == 0.95
    assert one(LOW, [0.01, 0.02], kind="exact")["value"] == 0.02
    assert math.isnan(one(LOW, [0.01], kind="exact")["confidence"])


@pytest.mark.parametrize(("noise", "warn", "fail"), [(0.0, 0.001, 0.01), (0.001, 0.003, 0.01), (0.01, 0.03, 0.03)])
def test_no_limit_is_below_three_times_the_noise(noise, warn, fail):
    row = one(LOW, [0.02, 0.02], kind="exact", noise=noise)
    assert (row["warn"], row["fail"]) == pytest.approx((warn, fail))
    assert (row["policy_warn"], row["policy_fail"], row["noise_floor"]) == (0.001, 0.01, noise)
    assert row["state"] == ("PASS" if noise == 0.01 else "FAIL")


def test_noise_widens_a_falling_margin_too_but_asks_more_of_an_erasing_edit():
    assert one(HIGH, [-0.04], kind="exact", noise=0.02)["fail"] == pytest.approx(-0.06)
    assert one("efficacy: old answer dropped", [-0.2], noise=0.1)["state"] == "FAIL"
    assert one("efficacy: old answer dropped", [-0.2])["state"] == "PASS"
    assert one("efficacy: old answer dropped", [0.0])["state"] == "FAIL"  # nothing was erased
    assert one("cast cosine", [0.95], kind="exact", noise=0.5)["fail"] == 0.90


def test_twenty_of_twenty_is_no_proof_and_seventy_three_are():
    def retained(n, misses=0):
        facts = [f"fact {i}" for i in range(n)]
        return one("retention", [0] * misses + [1] * (n - misses), kind="rate", stream=True, facts=facts)

    twenty = retained(20)
    assert (twenty["state"], twenty["n"], twenty["n_unit"]) == ("INCONCLUSIVE", 20, "edits")
    assert twenty["low"] == pytest.approx(0.839, abs=5e-4)
    assert "about 15 more edits, all without a failure," in twenty["why"]
    assert retained(34)["state"] == "INCONCLUSIVE"
    assert (retained(35)["state"], retained(35)["warns"]) == ("PASS", True)
    assert (retained(72)["warns"], retained(73)["warns"]) == (True, False)
    assert retained(73)["low"] >= 0.95
    assert retained(40, misses=20)["state"] == "FAIL"


def test_what_why_asks_for_is_what_decides():
    values, facts = [1] * 47 + [0] * 3, [f"f{i}" for i in range(400)]
    row = one("retention", values, kind="rate", stream=True, facts=facts[:50])
    assert row["state"] == "INCONCLUSIVE"
    extra = int(row["why"].split("about ")[1].split()[0])
    p, n = 47 / 50, 50 + extra
    assert wilson(p * n, n).low >= 0.9 > wilson(p * (n - 2), n - 2).low


def test_a_limit_of_one_cannot_be_proven_by_a_sample():
    strict = Policy().but(retention=(1, 1))
    row = one("retention", [1] * 50, kind="rate", stream=True, facts=[f"f{i}" for i in range(50)], policy=strict)
    assert row["state"] == "INCONCLUSIVE"
    assert "no sample can prove a rate of 1" in row["why"]


def test_efficacy_of_a_single_edit_is_counted_and_that_of_a_stream_is_sampled():
    single = one("efficacy: new above old", [1], kind="rate", facts="France")
    assert (single["state"], single["low"], single["n"], single["n_unit"]) == ("PASS", 1.0, 1, "edit")
    assert one("efficacy: new above old", [0], kind="rate", facts="France")["state"] == "FAIL"
    free = one("efficacy: free decoding", [0], kind="rate", facts="France")
    assert (free["state"], free["warns"]) == ("PASS", True)  # no fail limit for a single edit
    assert math.isnan(free["fail"])
    stream = one("efficacy: new above old", [1, 1], kind="rate", facts=["a", "b"], stream=True)
    assert (stream["state"], stream["n_unit"]) == ("INCONCLUSIVE", "edits")


def test_units_are_named():
    assert one(LOW, around(0.001, 0.001), facts="France")["n_unit"] == "prompts of one edit"
    assert one(LOW, around(0.001, 0.001))["n_unit"] == "documents"
    two = one(LOW, around(0.001, 0.001), facts=["a", "b"] * 30)
    assert (two["n"], two["n_unit"]) == (2, "edits")
    assert two["interval"].startswith("bootstrap-t over edits, then rows")


def test_perplexity_is_a_weighted_ratio_and_a_margin_a_ratio_of_sums():
    drift, tokens = np.array([0.01, 0.03, -0.02, 0.05]), [100, 200, 50, 10]
    row = one("perplexity drift", drift, kind="ratio", weights=tokens)
    assert row["value"] == pytest.approx(math.exp(drift @ tokens / sum(tokens)) - 1)
    table = rows([-0.1, 0.05, 0.0], base=[1.0, 2.0, -0.5])
    assert judge([Measured(HIGH, table)], stream=False)["value"][0] == pytest.approx(-0.05 / 2.5)


def test_intervals_stay_within_what_is_possible():
    assert one(LOW, [0.0, 0.0, 0.0, 0.004])["low"] == 0.0
    assert one("top-1 flips: unrelated text", [0.9, 1.0, 1.0, 0.2])["high"] <= 1.0


def test_holm_holds_the_clearest_gate_hardest():
    gates = judge(measured_single(), stream=False)
    levels = gates["confidence"].dropna()
    assert levels.max() == pytest.approx(1 - 0.05 / len(levels))
    clear = judge([measured_single()[3]], stream=False)
    assert clear["confidence"][0] == 0.95
    together = gates.set_index("gate").loc["kl: neighbourhood"]
    assert together["high"] > clear["high"][0]


def test_together_gates_are_rarely_decided_wrongly_when_all_lie_on_their_limit():
    """Family-wise error: each gate of four alone is wrong in one of twenty runs, all together no more often."""
    names = [name for name in GATES if name.startswith(("kl", "top-1"))]
    wrong = []
    for seed in range(100):
        draw = np.random.default_rng(seed)
        limits = [Policy().limits(name, stream=False).fail for name in names]
        measured = [Measured(name, rows(limit * (1 + draw.normal(0, 0.2, 25))))
                    for name, limit in zip(names, limits, strict=True)]  # fmt: skip
        decided = judge(measured, stream=False, resamples=400)
        wrong.append(bool((decided["state"] != "INCONCLUSIVE").any()))
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)


def test_verdicts():
    def of(*states):
        return verdict(pd.DataFrame({"gate": list(map(str, range(len(states)))), "state": list(states)}))

    assert of("PASS", "PASS") == "PASS"
    assert of("PASS", "INCONCLUSIVE") == "INCONCLUSIVE"
    assert of("INCONCLUSIVE", "FAIL", "PASS") == "FAIL"
    assert of() == "INCONCLUSIVE"
    with pytest.raises(ArgumentError, match="Did you mean 'PASS'"):
        of("PAS")
    with pytest.raises(ArgumentError, match="a table from judge"):
        verdict(["PASS"])


def test_the_worst_gate_is_named_by_state_then_by_the_room_it_used():
    assert worst(fake_validation().gates) == "paraphrase: new above old"
    assert worst(fake_validation(harm=40).gates) == "kl: edit prepended"
    exact = [Measured("cast cosine", rows([0.97]), "exact"), Measured(LOW, rows([0.004]), "exact")]
    assert worst(judge(exact, stream=False)) == LOW  # .4 of the room against .3
    assert worst(judge(exact[:1], stream=False)) == "cast cosine"
    assert worst(judge(exact, stream=False).iloc[:0]) == ""


@pytest.mark.parametrize(
    ("gate", "value", "used"),
    [(LOW, 0.0, 0.0), (LOW, 0.01, 1.0), (LOW, 0.02, 2.0), (HIGH, -0.015, 0.5), (HIGH, 0.5, 0.0),
     ("cast cosine", 0.9, 1.0), ("efficacy / random control", 4.0, 0.5), ("efficacy / random control", -1.0, math.inf),
     ("efficacy: old answer dropped", -0.2, 0.5), ("efficacy: new above old", 0.0, math.inf),
     ("efficacy: new above old", 1.0, 0.0)],
)  # fmt: skip
def test_room_used(gate, value, used):
    limits = Policy().limits(gate, stream=False)
    assert room_used({"gate": gate, "value": value, "fail": limits.fail, "warn": limits.warn}) == pytest.approx(used)


def test_what_was_not_measured_is_inconclusive_and_says_why():
    empty = one(LOW, [])
    assert (empty["state"], empty["n"], empty["warns"]) == ("INCONCLUSIVE", 0, True)
    assert "nothing was measured" in empty["why"]
    broken = one(LOW, [0.1, math.nan, math.nan])
    assert broken["state"] == "INCONCLUSIVE"
    assert "2 of 3 values are not finite" in broken["why"]
    endless = one(LOW, [0.1, math.nan, math.inf])
    assert (endless["state"], endless["value"]) == ("FAIL", math.inf)
    lone = one("efficacy / random control", [30.0], facts="France")
    assert (lone["state"], lone["low"], lone["high"]) == ("INCONCLUSIVE", -math.inf, math.inf)
    assert "at least two independent prompts of one edit" in lone["why"]


def test_the_table_is_as_promised():
    gates = judge(list(reversed(measured_single())), stream=False)
    assert tuple(gates) == COLUMNS
    assert list(gates["gate"]) == [name for name in GATES if name in set(gates["gate"])]
    assert set(gates["state"]) <= set(STATES)
    assert (gates["protocol"] == gates["gate"] + "/1").all()
    again = judge(measured_single(), stream=False)
    pd.testing.assert_frame_equal(gates, again)
    assert verdict(judge(measured_stream(100), stream=True)) == "PASS"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0, 0.05), st.booleans())
def test_a_state_is_what_its_bounds_say(values, noise, stream):
    row = judge([Measured(LOW, rows(values), noise=noise)], stream=stream, resamples=100).iloc[0]
    expected = "PASS" if row["high"] <= row["fail"] else "FAIL" if row["low"] > row["fail"] else "INCONCLUSIVE"
    assert row["state"] == expected
    assert row["low"] <= row["value"] + 1e-12
    assert row["value"] <= row["high"] + 1e-12
    assert row["warns"] == (row["high"] > row["warn"])


def test_policies_are_changed_by_name():
    policy = Policy().but({"kl: neighbourhood": {"stream": (0.06, 0.3)}}, retention={"single": (None, 0.5)})
    assert policy.limits("kl: neighbourhood", stream=True) == Limits(0.06, 0.3)
    assert policy.limits("kl: neighbourhood", stream=False) == Limits(0.02, 0.10)
    assert policy.limits("retention", stream=False) == Limits(None, 0.5)
    assert policy.hash != Policy().hash == Policy().hash
    assert Policy().but({}) == Policy()
    assert list(Policy().table["gate"]) == list(GATES)
    assert "13 gates" in repr(policy)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Policy().but({"kl: unrelated txt": (1, 2)}), "Did you mean 'kl: unrelated text'"),
        (lambda: Policy().but({LOW: (0.02, 0.01)}), "fail not stricter than warn"),
        (lambda: Policy().but({HIGH: (-0.02, -0.01)}), "fail not stricter than warn"),
        (lambda: Policy().but({LOW: 0.02}), "a pair"),
        (lambda: Policy().but({LOW: (0.1, math.nan)}), "a finite number"),
        (lambda: Policy().but({LOW: {"singel": (0.1, 0.2)}}), "Did you mean 'single'"),
        (lambda: Policy(single={"nothing": Limits(1, 2)}), "`policy` must be one of"),
        (lambda: Policy().limits("retention", stream=False), "`retention` has no limit for a single edit"),
        (lambda: Measured("kl", rows([1])), "`gate` must be one of"),
        (lambda: Measured(LOW, rows([1]), "median"), "`kind` must be one of"),
        (lambda: Measured(LOW, rows([1]), noise=-1), "0 or more"),
        (lambda: Measured(LOW, pd.DataFrame({"value": [1]})), "the columns fact, prompt, value"),
        (lambda: Measured(LOW, rows([1]), "ratio"), "a column `base` for a ratio"),
        (lambda: Measured(LOW, rows([1]), weights=[1, 2]), "one a row"),
        (lambda: Measured(LOW, rows([1], base=[1.0]), "rate"), "only where the kind is 'mean'"),
        (lambda: judge([], stream=False), "at least one gate"),
        (lambda: judge([Measured(LOW, rows([1]))] * 2, stream=False), "none twice"),
        (lambda: judge(["kl"], stream=False), "a sequence of Measured"),
        (lambda: judge([Measured("retention", rows([1]), "rate")], stream=False), "have a limit for at least one gate"),
        (lambda: judge([Measured(LOW, rows([1]))], stream=False, confidence=1), "between 0 and 1"),
        (lambda: judge([Measured(LOW, rows([1]))], stream=False, resamples=10), "1 gates share an error of 0.05"),
        (lambda: judge([Measured(LOW, rows([1]))], stream=False, policy={}), "a Policy"),
    ],
)
def test_bad_calls_say_what_must_hold(call, text):
    with pytest.raises(ArgumentError, match=text):
        call()

"""Gating: from measurements to PASS, FAIL or INCONCLUSIVE, by the bounds of intervals.

1. Each gate's value gets an interval whose unit is the edit (see `intervals`); what is counted is its own interval.
2. The effective limit is the policy's, or 3 x the noise floor where that is larger.
3. FAIL: the bound on the good side is beyond the fail limit: proven worse. PASS: the bound on the bad side is within
   it: proven good enough. Otherwise INCONCLUSIVE. `warns`: the bad bound is not within the warn limit.
4. Intervals stand at Holm's confidence over the gates that have one: the more clearly a gate is decided, the stricter
   it is held, and all of them together are wrong with probability 1 - confidence at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isinf, nan
from typing import Any, final

import numpy as np
import pandas as pd

from resid_surgery import _check
from resid_surgery.editing.intervals import Interval, Rate, between, holm_confidences, rate
from resid_surgery.editing.policy import AT_LEAST, AT_MOST, GATES, Gate, Policy
from resid_surgery.editing.resampling import Spread, p_value, spread
from resid_surgery.errors import ArgumentError

STATES = ("PASS", "FAIL", "INCONCLUSIVE")
KINDS = ("rate", "mean", "exact", "ratio")
COLUMNS = ("gate", "value", "low", "high", "unit", "direction", "warn", "fail", "policy_warn", "policy_fail",
           "noise_floor", "n", "n_unit", "state", "warns", "interval", "confidence", "protocol", "why")  # fmt: skip
_EXACT_UNIT = "edit"
_INCONCLUSIVE = STATES[2]
_ORDER = {"FAIL": 0, _INCONCLUSIVE: 1, "PASS": 2}


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured for one gate.

    Args:
        gate: its id. values: columns fact (the edit that a row belongs to, "" for none), prompt, value, in the gate's
            unit; one row an observation; yes and no as 1 and 0. A column `base` makes it a ratio of sums,
            sum(value) / sum(base): a margin's change against the margin before, an effect against its control.
        kind: "rate" (0 or 1, or a prompt's share, with Wilson's interval), "mean" (with a bootstrap), "exact" (no
            sample: the worst row counts), "ratio" (values are log ratios, such as changes of a document's mean NLL in
            nats; the figure is exp(weighted mean) - 1).
        noise: noise floor in the gate's unit, 0 for none. weights: one a row, > 0: the tokens of each document.

    Raises:
        ArgumentError: an unknown gate or kind, a column is missing, or weights or base do not fit the kind.
    """

    gate: str
    values: pd.DataFrame
    kind: str = "mean"
    noise: float = 0.0
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _check.choice("gate", self.gate, tuple(GATES))
        _check.choice("kind", self.kind, KINDS)
        if _check.finite("noise", self.noise) < 0:
            raise ArgumentError(_check.message("noise", "0 or more", self.noise))
        if not isinstance(self.values, pd.DataFrame) or not {"fact", "prompt", "value"} <= set(self.values):
            given = list(self.values) if isinstance(self.values, pd.DataFrame) else type(self.values).__name__
            raise ArgumentError(_check.message("values", "a DataFrame with the columns fact, prompt, value", given))
        if self.kind == "ratio" and not GATES[self.gate].logs:
            raise ArgumentError(_check.message("kind", f"'mean' for {self.gate} (with a column `base` for a ratio "
                                               "of sums)", "ratio"))  # fmt: skip
        if self.weights is not None and (self.kind not in ("mean", "ratio") or len(self.weights) != len(self.values)):
            raise ArgumentError(_check.message("weights", f"one a row ({len(self.values)}), for a mean or a ratio",
                                               (self.kind, len(self.weights))))  # fmt: skip
        if "base" in self.values and self.kind != "mean":
            raise ArgumentError(_check.message("base", "a column only where the kind is 'mean'", self.kind))


@final
@dataclass(frozen=True, eq=False)
class Found:
    """A figure and where its interval comes from.

    Attributes:
        value: in the gate's unit. n: independent units. unit: what they are. source: gives intervals; None for a count.
        how: the interval's name. mapped: values are log ratios. lack: why there is no figure.
    """

    value: float
    n: int
    unit: str
    source: Rate | Spread | None = None
    how: str = "exact"
    mapped: bool = False
    lack: str = ""

    def at(self, confidence: float, gate: Gate) -> Interval:
        """The interval in the gate's unit, cut to values that are possible."""
        if self.source is None:
            return Interval(self.value, self.value)
        low, high = (_change(b) if self.mapped else b for b in self.source.at(confidence))
        return Interval(max(low, gate.span[0]), min(high, gate.span[1]))

    def p(self, limit: float) -> float:
        """The smallest alpha at which the interval decides about a limit."""
        if self.mapped:
            limit = float(np.log1p(limit)) if limit > -1 else -np.inf
        return 0.0 if self.source is None else p_value(self.source, limit)


def judge(
    measured: Sequence[Measured],
    *,
    stream: bool,
    policy: Policy | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Judge what was measured, gate by gate.

    Args:
        measured: one a gate. stream: judge as a stream of edits; a single edit's efficacy is counted, not sampled.
        policy: limits; None for the starting ones. confidence: of all intervals together. resamples, seed: of the
            bootstrap.

    Returns:
        One row a gate, in the order of `GATES`: gate, value, low, high (an infinite bound: nothing is known on that
        side), unit, direction ("at most" or "at least"), warn, fail (effective), policy_warn, policy_fail (missing: no
        limit), noise_floor, n, n_unit ("prompts of one edit", "edits", "documents", or "edit" for a count), state,
        warns, interval (how), confidence (of this interval; missing for a count), protocol, why.

    Raises:
        ArgumentError: nothing measured, a gate twice, a gate without limits here, or too few resamples.

    Source: Holm 1979; intervals: see `intervals`.
    """
    rules, level = Policy() if policy is None else policy, between("confidence", confidence)
    if not isinstance(rules, Policy):
        raise ArgumentError(_check.message("policy", "a Policy", policy))
    ordered = [one for one in _ordered(measured) if rules.limited(one.gate, stream=stream)]
    if not ordered:
        raise ArgumentError("`policy` must have a limit for at least one gate that was measured; it has none.")
    limits = [rules.limits(one.gate, stream=stream) for one in ordered]
    need = ceil(2 * len(ordered) / (1 - level)) - 1
    resamples = _check.whole(
        "resamples", resamples, need, do=f"{len(ordered)} gates share an error of {1 - level:.3g}."
    )
    found = [_found(one, bool(stream), resamples, seed) for one in ordered]
    effective = [(GATES[m.gate].effective(p.warn, m.noise), GATES[m.gate].effective(p.fail, m.noise))
                 for m, p in zip(ordered, limits, strict=True)]  # fmt: skip
    levels = _levels(found, effective, level)
    rows = [
        _row(m, f, at, e) | {"policy_warn": p.warn, "policy_fail": p.fail}
        for m, f, at, e, p in zip(ordered, found, levels, effective, limits, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = ("value", "low", "high", "warn", "fail", "policy_warn", "policy_fail", "noise_floor", "confidence")
    return table.astype(dict.fromkeys(numbers, float))


def verdict(gates: pd.DataFrame) -> str:
    """FAIL if any gate fails, else INCONCLUSIVE if any gate is, or if there is none, else PASS.

    Raises:
        ArgumentError: no table from `judge`.
    """
    states = set(_states(gates))
    if "FAIL" in states:
        return "FAIL"
    return "PASS" if states == {"PASS"} else _INCONCLUSIVE


def worst(gates: pd.DataFrame) -> str:
    """The gate nearest to its fail limit, or furthest beyond it; "" where there is no gate.

    FAIL goes before INCONCLUSIVE before PASS, then the share of the room between ideal and limit that a value uses up.

    Raises:
        ArgumentError: no table from `judge`.
    """
    _states(gates)
    ranked = sorted(gates.to_dict("records"), key=lambda row: (_ORDER[row["state"]], -room_used(row)))
    return str(ranked[0]["gate"]) if ranked else ""


def room_used(row: Mapping[Any, Any]) -> float:
    """Share of the room between a gate's ideal and its fail limit (its warn limit where it has no other) that the value
    of a row from `judge` uses up."""
    gate = GATES.get(str(row["gate"]))
    limit = next((float(row[name]) for name in ("fail", "warn") if pd.notna(row[name])), None)
    return 0.0 if gate is None or pd.isna(row["value"]) else gate.used(float(row["value"]), limit)


def _states(gates: Any) -> list[str]:
    if not isinstance(gates, pd.DataFrame) or not {"gate", "state"} <= set(gates):
        raise ArgumentError(_check.message("gates", "a table from judge, with gate and state", type(gates).__name__))
    return [_check.choice("state", one, STATES) for one in gates["state"]]


def _ordered(measured: Any) -> list[Measured]:
    given = list(measured)
    for one in given:
        if not isinstance(one, Measured):
            raise ArgumentError(_check.message("measured", "a sequence of Measured", one))
    names = [one.gate for one in given]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(_check.message("measured", "at least one gate, and none twice", names))
    return sorted(given, key=lambda one: list(GATES).index(one.gate))


def _found(one: Measured, stream: bool, resamples: int, seed: int) -> Found:
    """The figure of one gate; without one, why."""
    gate, table = GATES[one.gate], one.values
    x = table["value"].to_numpy(dtype=float, na_value=nan)
    if not len(x):
        return Found(nan, 0, _EXACT_UNIT, lack="nothing was measured: no probe of the set reaches this gate")
    if (x == (np.inf if gate.direction == AT_MOST else -np.inf)).any():
        return Found(float(np.inf if gate.direction == AT_MOST else -np.inf), len(x), _EXACT_UNIT, how="infinite harm")
    if bad := int((~np.isfinite(x)).sum()):
        return Found(nan, len(x), _EXACT_UNIT, lack=f"{bad} of {len(x)} values are not finite: look at these prompts")
    if one.kind == "exact":
        value = float(x.max() if gate.direction == AT_MOST else x.min())
        return Found(value, 1, _EXACT_UNIT, how="exact" if len(x) == 1 else f"exact, the worst of {len(x)}")
    if gate.counted and not stream and one.kind in ("rate", "mean"):
        return Found(float(x.mean()), 1, _EXACT_UNIT, how=f"counted over the edit's own prompts ({len(x)})")
    facts, prompts = list(table["fact"]), list(table["prompt"])
    if one.kind == "rate":
        share = rate(x, facts, prompts)
        return Found(share.value, share.units, share.unit, share, share.how)
    base = table["base"].to_numpy(dtype=float) if "base" in table else None
    mean = spread(x, facts, prompts, weights=one.weights, base=base, resamples=resamples, seed=seed)
    mapped = one.kind == "ratio"
    return Found(_change(mean.value) if mapped else mean.value, mean.units, mean.unit, mean, mean.how, mapped)


def _change(log_ratio: float) -> float:
    """The relative change of a ratio's logarithm: infinite where the ratio is beyond every float."""
    with np.errstate(over="ignore"):
        return float(np.expm1(log_ratio))


def _levels(found: Sequence[Found], limits: Sequence[tuple[Any, Any]], confidence: float) -> list[float]:
    """Holm's confidence of each gate that has an interval; missing for the others."""
    sampled = [i for i, one in enumerate(found) if one.source is not None]
    ps = [found[i].p(next(one for one in reversed(limits[i]) if one is not None)) for i in sampled]
    held = dict(zip(sampled, holm_confidences(ps, confidence), strict=True))
    return [held.get(i, nan) for i in range(len(found))]


def _row(one: Measured, found: Found, confidence: float, limits: tuple[float | None, float | None]) -> dict[str, Any]:
    gate, (warn, fail) = GATES[one.gate], limits
    bounds = Interval(nan, nan) if found.lack else found.at(confidence, gate)
    good, bad = bounds if gate.direction == AT_MOST else reversed(bounds)
    state = _INCONCLUSIVE if found.lack else _state(gate, good, bad, fail)
    warns = bool(found.lack) or not gate.within(bad, warn)
    return {
        "gate": one.gate, "value": found.value, "low": bounds.low, "high": bounds.high, "unit": gate.unit,
        "direction": gate.direction, "warn": warn, "fail": fail, "noise_floor": float(one.noise), "n": found.n,
        "n_unit": found.unit, "state": state, "warns": warns, "interval": "none" if found.lack else found.how,
        "confidence": confidence, "protocol": gate.protocol,
        "why": found.lack or _why(gate, found, state, warns, bounds, warn, fail, confidence),
    }  # fmt: skip


def _state(gate: Gate, good: float, bad: float, fail: float | None) -> str:
    if gate.within(bad, fail):
        return "PASS"
    return _INCONCLUSIVE if gate.within(good, fail) else "FAIL"


def _why(
    gate: Gate, found: Found, state: str, warns: bool, bounds: Interval, warn: float | None, fail: float | None,
    confidence: float,
) -> str:  # fmt: skip
    """What decided, or what would."""
    span = f"{found.value:.4g}" if found.source is None else f"[{bounds.low:.4g}, {bounds.high:.4g}]"
    beyond = "above" if gate.direction == AT_MOST else "below"
    if state == "PASS" and not warns:
        return ""
    if state == "PASS":
        good = bounds.low if gate.direction == AT_MOST else bounds.high
        return f"{span} {'reaches over' if gate.within(good, warn) else 'is ' + beyond} the warn limit {warn:.4g}"
    if state == "FAIL":
        return f"{span} is {beyond} the fail limit {fail:.4g}"
    return f"{span} reaches over the fail limit {fail:.4g}: {_more(found, gate, bounds, fail or 0.0, confidence)}"


def _more(found: Found, gate: Gate, bounds: Interval, fail: float, confidence: float) -> str:
    """About how many more units would decide, if the value stays as it is."""
    away = abs(found.value - fail)
    across = bounds.high - found.value if fail > found.value else found.value - bounds.low
    if isinstance(found.source, Rate) and not 0 < fail < 1:
        return f"no sample can prove a rate of {fail:g}; set another limit, or count it (kind='exact')"
    if found.n < 2 and not isinstance(found.source, Rate):
        return f"at least two independent {found.unit} are needed"
    if away == 0 or isinf(across):
        return f"more {found.unit} are needed"
    if isinstance(found.source, Rate):
        needed = _trials(found.source, found.value, fail, confidence)
    else:
        needed = found.n * (across / away) ** 2
    alike = ", all without a failure," if gate.direction == AT_LEAST and found.value == 1 else ""
    extra = max(1, ceil(needed - found.n))
    unit = found.unit.replace("s", "", 1) if extra == 1 else found.unit  # documents, edits, prompts of one edit
    toward = "PASS" if gate.within(found.value, fail) else "FAIL"
    return f"about {extra} more {unit}{alike} would decide it: {toward}, if the value stays"


def _trials(share: Rate, value: float, fail: float, confidence: float) -> float:
    """n with |p - limit| = z sqrt(limit (1 - limit) / n), for as many rows a unit as now."""
    from scipy.special import ndtri

    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    return z2 * fail * (1 - fail) / (value - fail) ** 2 * share.units / share.effective

"""Intervals whose unit is the edit.

Prompts of one edit rise and fall together: counted as independent they give half the true standard error. So

- a rate has Wilson's interval, over edits, or over the effective number of prompts where an edit has several;
- a mean, and a ratio of sums, has a hierarchical bootstrap (see `resampling`);
- what stands in pairs (before, after) is tested on the pairs that changed (McNemar);
- several gates share one error rate (Holm).

One edit alone has no spread between edits: its interval is over its prompts, and `unit` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from resid_surgery import _check
from resid_surgery.errors import ArgumentError

DOCUMENT_CORRELATION = 0.05
UNITS = ("prompts of one edit", "edits", "documents")
Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """Two-sided; an infinite bound says that nothing is known on that side."""

    low: float
    high: float


class McNemar(NamedTuple):
    """Pairs that changed, either way, and the two-sided p-value of "as often one way as the other"."""

    lost: int
    gained: int
    p: float


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a rate: all p with |s/n - p| <= z sqrt(p (1 - p) / n).

    Args:
        successes: s in 0..n. n: trials, > 0; an effective number need not be whole. confidence: two-sided.

    Raises:
        ArgumentError: out of range.

    Example:
        >>> round(wilson(73, 73).low, 3), round(wilson(20, 20).low, 3)
        (0.95, 0.839)

    Source: Wilson 1927.
    """
    n, successes = _check.finite("n", n), _check.finite("successes", successes)
    if n <= 0 or not 0 <= successes <= n:
        raise ArgumentError(_check.message("successes, n", "0 <= successes <= n and n > 0", (successes, n)))
    p, z2 = successes / n, _normal(confidence) ** 2
    middle, half = p + z2 / (2 * n), (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
    low, high = ((middle + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return Interval(low if successes > 0 else 0.0, high if successes < n else 1.0)


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact McNemar test of paired yes/no answers: discordant pairs against a fair coin.

    p = P(at least this uneven | b + c pairs, 1/2), two-sided, b = right before only, c = right after only.

    Args:
        before, after: right or wrong, pair by pair.

    Raises:
        ArgumentError: of different lengths, or other than 0 and 1.

    Source: McNemar 1947; the exact binomial form.
    """
    from scipy import stats

    x, y = (_bools(name, one) for name, one in (("before", before), ("after", after)))
    if len(x) != len(y):
        raise ArgumentError(_check.message("before, after", "of one length", (len(x), len(y))))
    lost, gained = int((x & ~y).sum()), int((~x & y).sum())
    p = float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0
    return McNemar(lost, gained, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: in ascending order, max over the earlier ones of (m - rank) p, at most 1.

    Raises:
        ArgumentError: one is not in 0..1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    order, adjusted, so_far = _ascending(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted


def holm_confidences(p_values: Sequence[float], confidence: float = 0.95) -> list[float]:
    """The confidence at which each interval decides exactly as Holm's procedure does.

    With a = 1 - confidence and m tests in ascending order of p, test number r (from 0) is held against a / (m - r);
    from the first that is not decided on, all keep that one's level.

    Raises:
        ArgumentError: a p-value is not in 0..1, or confidence not between.
    """
    alpha, m = 1 - between("confidence", confidence), len(p_values)
    levels, stopped = [0.0] * m, 0.0
    for rank, i in enumerate(_ascending(p_values)):
        levels[i] = stopped or alpha / (m - rank)
        if p_values[i] > levels[i]:
            stopped = levels[i]
    return [1 - level for level in levels]


@final
@dataclass(frozen=True, eq=False)
class Rate:
    """A share of successes with its Wilson interval; made by `rate`.

    Attributes:
        value: mean over units of each unit's share. units, rows: how many. unit: what they are. effective: trials that
            the rows are worth, p (1 - p) / variance of the mean, within units..rows; all alike counts a unit once.
    """

    value: float
    units: int
    rows: int
    unit: str
    effective: float

    @property
    def how(self) -> str:
        """The name of the interval."""
        if self.rows == self.units:
            return f"Wilson over {self.unit}"
        return f"Wilson over {self.unit}, {self.rows} rows worth {self.effective:.3g}"

    def at(self, confidence: float) -> Interval:
        """Wilson's interval over the effective number, which a t quantile for the few units makes smaller."""
        n = float(self.units)
        if self.rows > self.units:
            shrink = (_normal(confidence) / _student(confidence, self.units - 1)) ** 2
            n = max(n, self.effective * shrink)
        return wilson(min(self.value * n, n), n, confidence)


def rate(values: ArrayLike, facts: Sequence[Any] | None = None, prompts: Sequence[Any] | None = None) -> Rate:
    """A rate over edits: mean over units u of their shares p_u.

    Several rows of a unit are worth p (1 - p) / (sum (p_u - p)^2 / (n (n - 1))) independent ones (the design effect).
    Where all rows agree that cannot be estimated, and a unit counts once: 20 of 20 edits prove .839 whatever the
    number of prompts an edit has. Tokens of a document are taken to be correlated by .05 at least, so that no flip in
    long texts counts for more than one a text, and for less than one a token.

    Args:
        values: 0, 1 or shares between. facts: the edit of each row, "" for none. prompts: of each row.

    Raises:
        ArgumentError: no rows, or values outside 0..1.

    Source: Wilson 1927; Korn & Graubard 1998 (effective sample size, t correction).
    """
    x = finite_row("values", values)
    if (x < 0).any() or (x > 1).any():
        raise ArgumentError(_check.message("values", "rates in 0..1", [float(x.min()), float(x.max())]))
    codes, unit = units_of(len(x), facts, prompts)
    shares = np.bincount(codes, x) / np.bincount(codes)
    n, p = len(shares), float(shares.mean())
    variance = float(shares.var(ddof=1)) / n if n > 1 else 0.0
    documents = unit == UNITS[2]
    effective = p * (1 - p) / variance if variance > 0 else float(len(x) if documents else n)
    if documents:
        sizes = np.bincount(codes)
        effective = min(effective, len(x) / (1 + (float((sizes**2).sum()) / len(x) - 1) * DOCUMENT_CORRELATION))
    return Rate(p, n, len(x), unit, float(np.clip(effective, n, len(x))))


def units_of(n: int, facts: Sequence[Any] | None, prompts: Sequence[Any] | None) -> tuple[NDArray[np.intp], str]:
    """The independent unit of each row as codes 0.., and what units are, one of `UNITS`.

    An edit where rows belong to several; rows where all belong to one; documents (prompts) where none belongs to any.

    Raises:
        ArgumentError: columns of other lengths.
    """
    named = pd.Series([""] * n if facts is None else list(facts), dtype=object).fillna("").astype(str)
    asked = pd.Series(range(n) if prompts is None else list(prompts), dtype=object).astype(str)
    if len(named) != n or len(asked) != n:
        raise ArgumentError(_check.message("facts, prompts", f"one a value ({n})", (len(named), len(asked))))
    if not n:
        raise ArgumentError(_check.message("values", "at least one", 0))
    free = named == ""
    keys = named.where(~free, "\0" + asked)
    if free.all() or keys.nunique() > 1:
        unit = UNITS[2] if free.all() else UNITS[1]
        return pd.factorize(keys)[0], unit
    codes = np.arange(n) if prompts is None else pd.factorize(asked)[0]
    return codes, UNITS[0]


def between(name: str, value: Any) -> float:
    """A finite number strictly between 0 and 1.

    Raises:
        ArgumentError: it is none.
    """
    if not 0 < _check.finite(name, value) < 1:
        raise ArgumentError(_check.message(name, "between 0 and 1", value))
    return float(value)


def _ascending(p_values: Sequence[float]) -> list[int]:
    for one in p_values:
        if not 0 <= _check.finite("p_values", one) <= 1:
            raise ArgumentError(_check.message("p_values", "in 0..1", one))
    return sorted(range(len(p_values)), key=lambda i: p_values[i])


def finite_row(name: str, values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ArgumentError(_check.message(name, "at least one finite number, in one row", values))
    return x


def _bools(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    x = np.asarray(values)
    if x.ndim != 1 or not np.isin(x, (0, 1)).all():
        raise ArgumentError(_check.message(name, "a row of 0 and 1", values))
    return x.astype(bool)


def _normal(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(0.5 + between("confidence", confidence) / 2))


def _student(confidence: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(max(degrees, 1), 0.5 + between("confidence", confidence) / 2))

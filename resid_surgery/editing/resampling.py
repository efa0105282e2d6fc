"""Resampling: paired means and ratios of sums over edits, by a hierarchical bootstrap.

1. Edits are drawn with replacement, then prompts within each edit drawn.
2. Every draw gives its estimate* and, from the spread between its own edits, its error*.
3. The interval is estimate - error x quantiles of (estimate* - estimate) / error* (bootstrap-t).

Drawing in two steps counts the spread within an edit twice, and percentiles of few edits are too narrow: dividing each
draw by its own error takes out both. On lognormal data, as divergences are, percentile and BCa intervals of 20 edits
cover 91 % where this one covers 94 % of the promised 95 % (tests hold it).

Where few units carry the spread (one text of forty moved at all), draws without them have no spread and no pivot. A
bound that would rest on such draws is Student's instead, with as many degrees of freedom as units carry the spread,
less one:

    m = (sum_u d_u^2)^2 / sum_u d_u^4,  d_u = A_u - R B_u
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from resid_surgery import _check
from resid_surgery.editing.intervals import Floats, Interval, Rate, between, finite_row, units_of
from resid_surgery.errors import ArgumentError

ROWS_AT_ONCE = 1_000_000


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """A mean or a ratio of sums with its bootstrap-t interval; made by `spread`.

    Attributes:
        value: the estimate. error: its standard error. units, rows: how many. unit: what they are. pivots:
            (estimate* - estimate) / error* of every draw, ascending; infinite where a draw has no spread.
        carried: m, the number of units that carry the spread. broken: draws whose denominator changed its sign.
    """

    value: float
    error: float
    units: int
    rows: int
    unit: str
    pivots: Floats
    carried: float = 1.0
    broken: int = 0

    @property
    def how(self) -> str:
        """The name of the interval."""
        flat = int(np.isinf(self.pivots).sum()) > self.broken
        student = f", Student's t of {self.carried:.1f} units where they carry the spread" if flat else ""
        return f"bootstrap-t over {self.unit}" + (", then rows" if self.rows > self.units else "") + student

    def at(self, confidence: float) -> Interval:
        """estimate - error x quantiles of the pivots; without two units, with too few draws, or where denominators
        change their sign, unbounded."""
        alpha = 1 - between("confidence", confidence)
        k = int(alpha / 2 * (len(self.pivots) + 1))
        if self.error == 0 and self.units > 1:
            return Interval(self.value, self.value)
        if self.units < 2 or k < 1:
            return Interval(-np.inf, np.inf)
        low, high = -self._reach(-self.pivots[::-1], k, alpha), self._reach(self.pivots, k, alpha)
        return Interval(float(self.value + low), float(self.value + high))

    def _reach(self, pivots: Floats, k: int, alpha: float) -> float:
        """How far above the estimate the bound lies; of mirrored pivots, how far below."""
        pivot = pivots[k - 1]
        if np.isfinite(pivot) or self.broken >= k:
            return float(-self.error * pivot)
        finite = pivots[np.isfinite(pivots)]
        student = float(stdtrit(max(1.0, self.carried - 1), 1 - alpha / 2))
        return float(self.error * max(student, -finite[0] if len(finite) else 0.0))


def spread(
    values: ArrayLike,
    facts: Sequence[Any] | None = None,
    prompts: Sequence[Any] | None = None,
    *,
    weights: ArrayLike | None = None,
    base: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Spread:
    """A paired mean over edits, a weighted mean, or a ratio of sums, with a hierarchical bootstrap.

    mean: average over edits of each edit's mean. weights: sum w v / sum w (tokens of documents). base: sum v / sum b.
    Error of all three: sqrt(n / (n - 1) sum_u (A_u - R B_u)^2) / |sum B_u|, with A_u, B_u the unit's sums.

    Args:
        values: differences of pairs. facts: the edit of each row, "" for none. prompts: of each row: rows without an
            edit that share a prompt are one document. weights: > 0. base: denominators. resamples, seed: of the draws.

    Raises:
        ArgumentError: no rows, values that are not finite, or columns of other lengths.

    Source: Efron & Tibshirani 1993, section 12.5 (bootstrap-t); Davison & Hinkley 1997, section 3.8 (hierarchies).
    """
    x = finite_row("values", values)
    codes, unit = units_of(len(x), facts, prompts)
    top, below = _sums(x, codes, weights, base)
    order = np.argsort(codes, kind="stable")
    top, below, sizes = top[order], below[order], np.bincount(codes)
    whole_top, whole_below = (np.add.reduceat(one, _starts(sizes)) for one in (top, below))
    value, error = (float(one[0]) for one in _estimate(whole_top[None], whole_below[None]))
    if not np.isfinite(value):
        raise ArgumentError(_check.message("weights, base", "with a sum other than 0", float(whole_below.sum())))
    if error <= 1e-12 * abs(value):
        error = 0.0
    draw = np.random.default_rng(_check.seed(seed))
    resamples = _check.whole("resamples", resamples, 100)
    if len(sizes) < 2 or not error:
        return Spread(value, error if len(sizes) > 1 else np.inf, len(sizes), len(x), unit, np.empty(0))
    pivots, broken = _pivots(top, below, sizes, value, resamples, draw)
    rest = np.abs(whole_top - value * whole_below)
    shares = (rest / rest.max()) ** 2  # of the largest: fourth powers of tiny residuals are 0
    carried = float(shares.sum() ** 2 / (shares**2).sum())
    return Spread(value, error, len(sizes), len(x), unit, pivots, carried, broken)


def p_value(found: Rate | Spread, limit: float, *, least: float = 1e-6) -> float:
    """The smallest alpha at which the two-sided interval excludes a limit, to four digits; 1 where none does."""
    shut, open_ = least, 1.0 - 1e-9
    if not _excludes(found.at(1 - open_), limit):
        return 1.0
    if _excludes(found.at(1 - shut), limit):
        return least
    while open_ / shut > 1.0001:
        middle = (shut * open_) ** 0.5
        shut, open_ = (shut, middle) if _excludes(found.at(1 - middle), limit) else (middle, open_)
    return open_


def _excludes(found: Interval, limit: float) -> bool:
    return limit < found.low or limit > found.high


def _sums(x: Floats, codes: NDArray[np.intp], weights: Any, base: Any) -> tuple[Floats, Floats]:
    """Rows' parts of numerator and denominator."""
    if weights is not None and base is not None:
        raise ArgumentError(_check.message("weights, base", "one of the two at most", "both"))
    if base is not None:
        return x, _beside("base", base, len(x))
    if weights is not None:
        w = _beside("weights", weights, len(x))
        if (w <= 0).any():
            raise ArgumentError(_check.message("weights", "> 0", float(w.min())))
        return w * x, w
    share = 1 / np.bincount(codes)[codes]
    return x * share, share


def _estimate(top: Floats, below: Floats) -> tuple[Floats, Floats]:
    """Ratio of sums over the last axis, and its linearised standard error."""
    n, total = top.shape[-1], below.sum(-1)
    with np.errstate(all="ignore"):
        ratio = top.sum(-1) / total
        rest = top - ratio[..., None] * below
        return ratio, np.sqrt(n / max(n - 1, 1) * (rest**2).sum(-1)) / np.abs(total)


def _pivots(
    top: Floats, below: Floats, sizes: NDArray[np.intp], value: float, resamples: int, draw: np.random.Generator
) -> tuple[Floats, int]:
    """(studentised draws, ascending; how many are broken), in pieces of bounded memory."""
    each = max(1, ROWS_AT_ONCE // len(top))
    parts = [
        _studentised(top, below, sizes, value, min(each, resamples - done), draw) for done in range(0, resamples, each)
    ]
    return np.sort(np.concatenate([pivots for pivots, _ in parts])), sum(broken for _, broken in parts)


def _studentised(
    top: Floats, below: Floats, sizes: NDArray[np.intp], value: float, times: int, draw: np.random.Generator
) -> tuple[Floats, int]:
    """Draw units, then rows within them; a denominator that changes sign leaves both sides open."""
    drawn = draw.integers(0, len(sizes), times * len(sizes))
    counts = sizes[drawn]
    first = np.repeat(_starts(sizes)[drawn], counts)
    rows = first + (draw.random(len(first)) * np.repeat(counts, counts)).astype(np.intp)
    sums = (np.add.reduceat(one[rows], _starts(counts)).reshape(times, -1) for one in (top, below))
    a, b = sums
    ratio, error = _estimate(a, b)
    away = ratio - value
    with np.errstate(all="ignore"):
        pivots = away / error
    flat = error <= 1e-12 * (np.abs(value) + np.abs(away))
    pivots[flat] = np.where(np.abs(away[flat]) > 1e-12 * abs(value), np.copysign(np.inf, away[flat]), 0.0)
    broken = ~np.isfinite(ratio) | (np.sign(b.sum(-1)) != np.sign(below.sum()))
    pivots[broken] = np.where(np.arange(int(broken.sum())) % 2, np.inf, -np.inf)
    return pivots, int(broken.sum())


def _starts(sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp)


def _beside(name: str, values: ArrayLike, n: int) -> Floats:
    x = finite_row(name, values)
    if len(x) != n:
        raise ArgumentError(_check.message(name, f"one a value ({n})", len(x)))
    return x

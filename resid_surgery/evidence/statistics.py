"""Intervals over prompts, so that a difference between two scores can be told from luck."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resid_surgery import _check
from resid_surgery.errors import ArgumentError

MOST_RESAMPLES = 1_000_000


def bootstrap(
    table: pd.DataFrame,
    by: str | Sequence[str],
    value: str,
    *,
    unit: str = "prompt",
    against: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Means with bootstrap intervals over independent units (prompts), one row a group.

    Rows of one unit in one group (random draws, layers) are averaged first: only units are independent.

    Args:
        table: tidy. by: columns that make the groups. value: the column to average.
        unit: the column that names what is resampled.
        against: levels of some `by` columns, such as ``{"score": "log_prob_increase"}``: adds the mean difference of
            each group from its counterpart with these levels, paired by unit, with an interval of its own (missing
            where there is no counterpart).
        confidence: of the intervals. Units without a value are left out. resamples, seed: of the bootstrap (BCa).

    Returns:
        Columns: `by`, mean, low, high, n (units); with `against` also difference, difference_low, difference_high,
        difference_n. An interval over fewer than two units is missing.

    Raises:
        ArgumentError: a column is missing, or no row has the levels of `against`.

    Source: Efron 1987 (BCa intervals); computed by scipy.
    """
    groups = _names("by", by)
    if not isinstance(table, pd.DataFrame):
        raise ArgumentError(_check.message("table", "a DataFrame", type(table).__name__))
    if against is not None and not isinstance(against, Mapping):
        raise ArgumentError(_check.message("against", "None, or a mapping from columns to levels", against))
    value, unit = _check.text("value", value), _check.text("unit", unit)
    for name in (*groups, value, unit, *_names("against", list(against or {}))):
        if name not in table:
            raise ArgumentError(_check.message("by, value, unit, against", "columns of the table", name))
    twice = len({*groups, unit, value}) != len(groups) + 2 or {"mean", "low", "high", "n"} & set(groups)
    if not groups or twice or not pd.api.types.is_numeric_dtype(table[value]):
        raise ArgumentError(
            _check.message(
                "by, unit, value",
                "different columns (none called mean, low, high or n), value one of finite numbers",
                (groups, unit, value),
            )
        )
    resamples, seed = _check.whole("resamples", resamples, 100, MOST_RESAMPLES), _check.seed(seed)
    if not 0 < _check.finite("confidence", confidence) < 1:
        raise ArgumentError(_check.message("confidence", "between 0 and 1", confidence))
    for name, level in (against or {}).items():
        if name not in groups or not (table[name] == level).any():
            raise ArgumentError(
                _check.message("against", "levels of columns in `by` that the table has", dict(against or {}))
            )
    if np.isinf(table[value].to_numpy(dtype=float)).any():
        raise ArgumentError(_check.message("value", "a column of finite numbers", value))
    means = table.groupby([*groups, unit], sort=False, dropna=False)[value].mean()
    cells = means.dropna().reset_index()
    out = []
    for key, one in cells.groupby(groups, sort=False, dropna=False):
        named = dict(zip(groups, key if isinstance(key, tuple) else (key,), strict=True))
        row = named | _interval(one[value], confidence, resamples, seed, "")
        if against:
            pair = _counterpart(cells, named | dict(against), groups)
            both = one.set_index(unit)[value].sub(pair.set_index(unit)[value]).dropna()
            row |= _interval(both, confidence, resamples, seed, "difference") | {"difference_n": len(both)}
        out.append(row)
    if against and not any(row["difference_n"] for row in out):
        must = "levels whose rows share the other columns of `by` with some group"
        raise ArgumentError(
            _check.message("against", must, dict(against), do="Leave out of `by` what they do not have.")
        )
    return pd.DataFrame(out).astype({name: table[name].dtype for name in groups})


def _names(name: str, given: Any) -> list[str]:
    found: list[Any] = [given] if isinstance(given, str) else list(given) if _check.iterable(given) else [None]
    if not all(isinstance(one, str) for one in found):
        raise ArgumentError(_check.message(name, "names of columns", given))
    return found


def _counterpart(cells: pd.DataFrame, wanted: Mapping[str, Any], groups: list[str]) -> pd.DataFrame:
    for name in groups:
        cells = cells[cells[name] == wanted[name]]
    return cells


def _interval(values: "pd.Series[float]", confidence: float, resamples: int, seed: int, name: str) -> dict[str, Any]:
    from scipy import stats

    sample, prefix = values.to_numpy(dtype=float), f"{name}_" if name else ""
    mean, low, high = float(sample.mean()) if len(sample) else np.nan, np.nan, np.nan
    if len(sample) > 1 and float(sample.std()) == 0:
        low = high = mean
    elif len(sample) > 1:
        found = stats.bootstrap(
            (sample,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa",
            rng=np.random.default_rng(seed), vectorized=True,
        ).confidence_interval  # fmt: skip
        low, high = float(found.low), float(found.high)
    row = {name or "mean": mean, f"{prefix}low": low, f"{prefix}high": high}
    return row if name else row | {"n": len(sample)}

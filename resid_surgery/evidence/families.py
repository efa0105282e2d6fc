"""Families: every causal-LM type that transformers registers, built tiny, loaded and checked.

A type is verified when `resid_surgery.load` proves its sums and every line of `resid_surgery.check`
holds on a loud random model of it; a hybrid when some of its layers mix positions without
attention weights and are one addend each. Everything else is refused with a reason, or cannot be
built from its config.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch

from resid_surgery._check import choice, iterable, message, shown
from resid_surgery.errors import ArgumentError, UnsupportedModelError
from resid_surgery.evidence.check import check
from resid_surgery.models.anatomy import Anatomy
from resid_surgery.models.zoo import NotBuildableError, causal_types, quiet, tiny
from resid_surgery.stream.loading import load

STATUSES = ("verified", "hybrid", "refused", "not buildable", "wrong")
COLUMNS = ("type", "status", "class", "features", "lines", "worst", "reason", "seconds")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@final
@dataclass(frozen=True)
class Family:
    """One model type, tried.

    Attributes:
        type, class_name: `config.model_type` and the class that was built.
        status: "verified", "hybrid", "refused", "not buildable", or "wrong": a check failed.
        features: what its anatomy has. lines: how many identities were measured; worst: the largest
            error as a fraction of its tolerance. reason: why not. seconds: it took.
    """

    type: str
    class_name: str
    status: str
    features: str
    lines: int
    worst: float
    reason: str
    seconds: float


def check_families(
    types: Iterable[str] | None = None, *, dtype: str = "float32", each: Callable[[str], Any] | None = None
) -> pd.DataFrame:
    """Build model types tiny, load them and measure every line of the mathematics on each.

    Args:
        types: `config.model_type` names; all that transformers registers by default.
        dtype: "float32", "float64", "bfloat16" or "float16".
        each: called with a type's name before it is tried (for progress).

    Returns:
        One row a type: type, status ("verified", "hybrid", "refused", "not buildable" or, never
        seen, "wrong"), class, features, lines (identities measured), worst (largest error over its
        tolerance), reason, seconds.

    Raises:
        ArgumentError: an unknown type or dtype.
    """
    choice("dtype", dtype, tuple(_DTYPES))
    known = causal_types()
    wanted: list[Any] = list(known) if types is None else list(types) if iterable(types) else [types]
    if not wanted:
        raise ArgumentError(message("types", "None, or at least one causal-LM type", types))
    if each is not None and not callable(each):
        raise ArgumentError(message("each", "None, or a function of a type's name", each))
    for name in wanted:
        if name not in known:
            raise ArgumentError(
                f"`types` must be causal-LM types that transformers registers; got {shown(name)}. "
                f"There are {len(known)}, for example " + ", ".join(known[:: max(1, len(known) // 6)]) + "."
            )
    rows = []
    for name in wanted:
        if each is not None:
            each(name)
        rows.append(try_family(name, _DTYPES[dtype]))
    table = pd.DataFrame([vars(row) for row in rows]).rename(columns={"class_name": "class"})
    return table[list(COLUMNS)]


def try_family(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Family:
    """Build, load and check one type; `changes` override config fields."""
    start = time.perf_counter()

    def found(status: str, *, name: str = "", features: str = "", lines: int = 0, worst: float = 0.0,
              reason: str = "") -> Family:  # fmt: skip
        return Family(model_type, name, status, features, lines, worst, reason, time.perf_counter() - start)

    with quiet():
        try:
            module = tiny(model_type, dtype=dtype, **changes)
        except NotBuildableError as error:
            return found("not buildable", reason=str(error))
        name = type(module).__name__
        try:
            model = load(module)
        except UnsupportedModelError as error:
            return found("refused", name=name, reason=_short(str(error)))
        table = check(model)
    table = table[table["line"] != "5"]  # worked numbers, of no model
    worst = float((table["error"] / table["tolerance"].clip(lower=1e-30)).where(table["error"] > 0, 0.0).max())
    bad = table[~table["ok"]]
    if len(bad):
        reason = "; ".join(f"{row.identity} (line {row.line}, error {row.error:.2g})" for row in bad.itertuples())
        return found("wrong", name=name, lines=len(table), worst=worst, reason=reason)
    status = "hybrid" if model.anatomy.hybrid else "verified"
    return found(status, name=name, features=features_of(model.anatomy), lines=len(table), worst=worst)


def features_of(anatomy: Anatomy) -> str:
    """What is particular about a model, as a short list."""
    rows = anatomy.blocks()
    norm = anatomy.norms[None, "final_norm"]
    flags = {
        "parallel": any(row.parallel for row in rows),
        "post-norm": anatomy.post_norm,
        "LayerNorm": norm.centred,
        "gain 1 + w": norm.offset == 1.0,
        "no norm before the MLP": any(row.mlp_kind in ("neurons", "experts") and not row.mlp_norm for row in rows),
        "grouped heads": any(0 < size.n_kv_heads < size.n_heads for size in anatomy.sizes),
        "gated attention": any(row.gated and row.mix == "interface" for row in rows),
        "differential attention": any(row.mix.startswith("differential") for row in rows),
        "own attention": any(row.mix.startswith(("weights", "product", "sdpa", "named")) for row in rows),
        "ungated MLP": any(len(row.keys) == 1 for row in rows),
        "fused keys": any(path.endswith("]") for row in rows for path in row.keys + row.shared_keys),
        "sub-norm in the MLP": any(row.coef_norm for row in rows),
        "experts": anatomy.mixture,
        "shared expert": any(row.shared_out for row in rows),
        "multipliers": any(row.attn_scale != 1.0 or row.mlp_scale != 1.0 for row in rows),
        "multiplied stream": anatomy.carries,
        "logit scale": anatomy.layout.head_scale * anatomy.layout.logit_scale != 1.0,
        "logit cap": anatomy.logit_cap is not None,
        "tied": anatomy.tied,
    }
    return ", ".join(name for name, present in flags.items() if present)


def families_markdown(table: pd.DataFrame) -> str:
    """The result of `check_families` as Markdown: counts, then one row a type."""
    counts = table["status"].value_counts()
    lines = [", ".join(f"{counts[s]} {s}" for s in STATUSES if s in counts) + f" of {len(table)} types.", ""]
    lines += ["| type | status | particulars, or reason |", "|---|---|---|"]
    ordered = table.sort_values("status", key=lambda c: c.map(STATUSES.index), kind="stable")
    for name, status, features, reason in ordered[["type", "status", "features", "reason"]].astype(str).to_numpy():
        lines.append(f"| {name} | {status} | {(features or reason).replace('|', '/')} |")
    return "\n".join(lines)


def _short(reason: str) -> str:
    """The reason of a refusal without the model's name, which the row gives."""
    head, found, tail = reason.partition(" is refused: ")
    return (tail if found else head).rstrip(".")

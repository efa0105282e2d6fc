"""A validation as it could come out, made without a model: for tests of everything that reads reports."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from resid_surgery.editing.gating import Measured, judge, verdict
from resid_surgery.editing.policy import Policy
from resid_surgery.editing.reports import Validation

NASTY = "<img src=x onerror=alert(1)>"


def rows(values: Any, facts: Any = "", **more: Any) -> pd.DataFrame:
    """A table for `Measured`: `facts` is one name, or one a row."""
    values = list(values)
    named = [facts] * len(values) if isinstance(facts, str) else list(facts)
    return pd.DataFrame({"fact": named, "prompt": [f"p{i}" for i in range(len(values))], "value": values, **more})


def measured_single(seed: int = 0, *, harm: float = 1.0) -> list[Measured]:
    """A single edit's measurements; `harm` multiplies its side effects."""
    draw = np.random.default_rng(seed)
    near, far = draw.lognormal(-4.6, 0.7, 24) * harm, draw.lognormal(-8.2, 0.6, 30) * harm
    drift = draw.normal(0.0008 * harm, 0.002, 30)
    base = draw.normal(1.8, 0.7, 30)
    return [
        Measured("efficacy: new above old", rows([1], "France"), "rate"),
        Measured("efficacy: free decoding", rows([1], "France"), "rate"),
        Measured("paraphrase: new above old", rows([1] * 9 + [0], "France"), "rate"),
        Measured("kl: neighbourhood", rows(near, "France"), "mean", noise=1e-6),
        Measured("kl: edit prepended", rows(near[:12] * 14, "France"), "mean", noise=1e-6),
        Measured("kl: unrelated text", rows(far), "mean", noise=2e-5),
        Measured("top-1 flips: unrelated text", rows(np.clip(far * 12, 0, 1)), "mean"),
        Measured("perplexity drift", rows(drift), "ratio", weights=list(draw.integers(30, 220, 30))),
        Measured("capability margin", rows(draw.normal(-0.004 * harm, 0.03, 30), base=base), "mean"),
        Measured("cast cosine", rows([0.9994, 0.997]), "exact"),
        Measured("efficacy / random control", rows(draw.normal(38, 9, 6), "France"), "mean"),
    ]


def measured_stream(n: int = 20, *, misses: int = 0, seed: int = 0) -> list[Measured]:
    """A stream's measurements: n edits, some of which missed."""
    draw = np.random.default_rng(seed)
    facts = [f"fact {i}" for i in range(n)]
    hit = [0] * misses + [1] * (n - misses)
    return [
        Measured("efficacy: new above old", rows(hit, facts), "rate"),
        Measured("retention", rows(hit, facts), "rate"),
        Measured("kl: neighbourhood", rows(draw.lognormal(-4.5, 0.8, 5 * n), np.repeat(facts, 5)), "mean", noise=1e-6),
        Measured("kl: unrelated text", rows(draw.lognormal(-6.5, 0.6, 30)), "mean", noise=2e-5),
    ]


def fake_validation(
    *, stream: bool = False, harm: float = 1.0, seed: int = 0, token: str = NASTY, **about: Any
) -> Validation:
    """A whole report. `token` stands wherever text of a model or of data can stand; `about` goes into the manifest."""
    gates = fake_gates(stream, harm, seed)
    tables = tables_of(token) | ({"curve": curve()} if stream else {})
    return Validation(verdict(gates), gates, tables, manifest() | about)


@cache
def fake_gates(stream: bool, harm: float, seed: int) -> pd.DataFrame:
    """The gates of a whole report."""
    measured = measured_stream(seed=seed) if stream else measured_single(seed, harm=harm)
    return judge(measured, stream=stream)


def tables_of(token: str) -> dict[str, pd.DataFrame]:
    """Tables under the names that reports know, and one that they do not."""
    text = f"The Seine flows through {token} and on to the sea."
    return {
        "facts": pd.DataFrame({"fact": ["The capital of France is"], "new": [" Rome"], "old": [token],
                               "log_prob_change": [6.913], "new_above_old": [True], "rank_before": [12]}),
        "tensors": pd.DataFrame({"tensor": ["model.layers.13.mlp.down_proj.weight"], "kind": ["low rank"], "rank": [1],
                                 "relative_norm": [0.0241], "note": [None]}),
        "tokens": pd.DataFrame({"vector": ["difference"] * 4, "side": ["promotes"] * 2 + ["suppresses"] * 2,
                                "token": [" Rome", token, " Paris", " Lyon"], "bs_value": [3.21, 2.4, -2.9, -1.25]}),
        "exposure": pd.DataFrame({"stratum": ["high", "middle", "zero"], "texts": [8, 8, 8],
                                  "exposure": [0.31, 0.0123, 0.0], "kl": [0.0421, 0.0008, 1.3e-7]}),
        "worst": pd.DataFrame([
            {"rank": i + 1, "prompt": f"The Louvre is in {i}", "stratum": "same subject", "kl": 0.4 / (i + 1),
             "text_before": text, "text_after": f"{text} It is the capital of Italy.\nAnd of nothing else."}
            for i in range(12)
        ]),
        "controls": pd.DataFrame({"control": ["the edit", "null edit", "random direction, same norm", "random site"],
                                  "site": ["L13.mlp", "", "L13.mlp", "L4.mlp"], "efficacy": [6.913, 0.0, 0.07, 0.21],
                                  "kl_neighbourhood": [0.0132, 2.1e-8, 0.0004, 0.0011]}),
        "key_cosine": pd.DataFrame({"pair": [("a", token)], "cosine": [np.float32(0.1)],
                                    "count": pd.array([None], "Int64")}),
    }  # fmt: skip


def curve() -> pd.DataFrame:
    """Curves at checkpoints."""
    return pd.DataFrame({"edits": [1, 2, 5, 10, 20], "success": [1.0, 1.0, 1.0, 1.0, 0.95],
                         "retention": [1.0, 1.0, 1.0, 0.9, 0.85], "norm_growth": [0.021, 0.034, 0.061, 0.09, 0.141],
                         "perplexity_drift": [0.0003, 0.0004, 0.0021, 0.0065, 0.0143]})  # fmt: skip


def manifest() -> Mapping[str, Any]:
    """What a report says of how it was made."""
    return {
        "model": "SmolLM2-135M", "edit": "rank-one at L13.mlp", "edit_hash": "5f0e2ac1", "fingerprint": "c0ffee01",
        "probe_hash": "9a8b7c6d", "policy": Policy().said, "budget": {"name": "smoke", "sites": 5}, "dtype": "float32",
        "seed": 0, "confidence": 0.95, "seconds": {"efficacy": 0.81, "locality": 12.4}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip

"""No warning comes from the library in normal use; the suite runs with every warning an error."""

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import build

import resid_surgery as rs
from resid_surgery.editing.asking import _p95
from resid_surgery.editing.gating import Found
from resid_surgery.editing.resampling import spread

ROOT = Path(__file__).parent.parent
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
USE = """
import resid_surgery as rs
model = rs.load(rs.tiny("llama"))
rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7]))
rs.scores(rec), rs.sources(rec, "L1.N3"), rs.decompose(rec), rs.lens(rec)
found = rs.locate(rec, k=3, worst=True)
rs.intervene(rec, rs.Zero(found.sites)).ledger()
rs.sweep(rec, [rs.Zero(site) for site in found.sites])
"""


@pytest.mark.parametrize("kind", [UserWarning, DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_warning_is_an_error_here(kind: type[Warning]) -> None:
    with pytest.raises(kind):
        warnings.warn("one of ours or of a dependency", kind, stacklevel=1)


def test_every_warning_that_is_let_pass_is_named_and_explained() -> None:
    lines = (ROOT / "pyproject.toml").read_text().split("filterwarnings = [")[1].split("\n]")[0].splitlines()
    ignored = [line for line in lines if '"ignore' in line or "'ignore" in line]
    assert OPTIONS["filterwarnings"][0] == "error"
    assert len(ignored) == len(OPTIONS["filterwarnings"]) - 1
    for line in ignored:
        assert re.search(r"#\s*\w+.*", line), f"says not why: {line}"
        assert re.search(r"ignore:[^:]{8,}", line), f"is not one message: {line}"


def test_a_process_in_normal_use_shows_no_warning_of_any_kind() -> None:
    """Every warning is shown, those of deprecations too, which Python hides by default."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", USE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    ours = [line for line in done.stderr.splitlines() if "resid_surgery" in line or "Warning" in line]
    assert ours == []


def test_a_change_beyond_every_float_is_infinite_without_a_warning() -> None:
    mean = spread([800.0, 900.0, 1000.0])
    found = Found(np.inf, 3, "rows", mean, "bootstrap", mapped=True)
    assert found.at(0.95, _gate()).high == np.inf


def _gate() -> Any:
    from resid_surgery.editing.policy import GATES

    return next(gate for gate in GATES.values() if gate.span[1] == np.inf)


@pytest.mark.parametrize("size", [1e-90, 1.0, 1e70])
def test_the_units_that_carry_a_spread_are_counted_whatever_its_size(size: float) -> None:
    base = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    rest = (base - base.mean()) ** 2
    assert spread(base * size).carried == pytest.approx(rest.sum() ** 2 / (rest**2).sum())


def test_a_percentile_beside_infinite_values_is_infinite() -> None:
    assert _p95(pd.Series([1.0, np.inf, np.inf])) == np.inf
    assert _p95(pd.Series([np.inf] * 4)) == np.inf
    assert _p95(pd.Series([float(i) for i in range(101)])) == 95.0


def test_a_factor_with_a_gradient_is_read_without_a_warning() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.register_parameter("gain", torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64)))
    assert rs.load(model).anatomy.n_layers == 3

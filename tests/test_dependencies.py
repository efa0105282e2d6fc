"""The ranges of pyproject.toml are what was run: the lowest pinned for .ci/lowest, the newest in constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
OPTIONAL = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(one)
    for one in [*PROJECT["dependencies"], *(one for extra in OPTIONAL.values() for one in extra)]
    if not one.startswith("resid-surgery[")
]


def pins(path: str) -> dict[str, Version]:
    """The exact versions of a constraints file."""
    lines = re.findall(r"^([\w.\-]+)==([^\s;]+)", (ROOT / path).read_text(), re.M)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def floor(one: Requirement) -> Version:
    """The lowest version that a requirement claims."""
    (lowest,) = [Version(part.version) for part in one.specifier if part.operator == ">="]
    return lowest


@pytest.mark.parametrize("one", DIRECT, ids=lambda one: one.name)
def test_both_ends_of_a_range_are_pinned_somewhere(one: Requirement) -> None:
    lowest, newest = (
        pins(path)[canonicalize_name(one.name)] for path in (".ci/constraints-lowest.txt", "constraints.txt")
    )
    assert floor(one) == lowest, f"pyproject.toml says {one}, .ci/constraints-lowest.txt was run with {lowest}"
    assert newest in one.specifier
    assert lowest in one.specifier


def test_dependencies_below_one_that_may_break_have_a_ceiling() -> None:
    """What is still at 0.x, or whose next major version has broken code before, is not claimed unseen."""
    for name in ("torch", "nnsight", "transformers", "pandas", "jaxtyping", "scipy", "networkx"):
        (one,) = [r for r in DIRECT if r.name == name]
        assert any(part.operator == "<" for part in one.specifier), name


def test_the_extras_together_are_the_development_environment() -> None:
    (named,) = [one for one in OPTIONAL["dev"] if one.startswith("resid-surgery[")]
    assert set(named.split("[")[1].rstrip("]").split(",")) == set(OPTIONAL) - {"dev"}


def test_both_ends_of_the_claimed_versions_of_python_are_run_by_ci() -> None:
    claimed = re.findall(r"Python :: (3\.\d+)", TEXT)
    run = set(re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/ci.yml").read_text()))
    assert {claimed[0], claimed[-1]} <= run
    assert PROJECT["requires-python"] == f">={claimed[0]}"

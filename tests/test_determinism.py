"""Same seed, same machine, same result, bit for bit: twice in a process, and in processes that hash differently."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import digest, state_of_process
from operations import SEEDED, VERBS, Table
from validation_cases import sharp

import resid_surgery as rs
from resid_surgery.models import zoo

HERE = Path(__file__).parent
SCRIPT = f"import sys; sys.path.insert(0, {str(HERE)!r}); import beartype; import test_determinism as t; t.said()"
PAIRS = ("prefixes of a fit", "score_against_effect", "probes", "draws of a run", "bootstrap", "head_patterns")


def table(folder: Path) -> Table:
    return Table(sharp("llama"), folder)


def said() -> None:
    """Print the digest of every verb, and of those that draw with a seed other than 0."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RESID_SURGERY_CACHE"] = f"{folder}/cache"
        made = table(Path(folder))
        found = {name: digest(verb(made)) for name, verb in VERBS.items()}
        found |= {f"{name}, seeded": digest(verb(made, 3)) for name, verb in SEEDED.items()}
        found["tiny"] = rs.load(zoo.tiny("mixtral")).fingerprint()
        found["order"] = repr({"hashed", "strings", "in", "a", "set"})
    sys.stdout.write(json.dumps(found))


@pytest.fixture(scope="module")
def processes() -> list[dict[str, str]]:
    """What two processes say whose strings have different hashes."""
    found = []
    for seed in ("1", "2"):
        own = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ | own)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found


def test_processes_that_hash_strings_differently_give_the_same(processes: Any) -> None:
    first, second = processes
    assert first.pop("order") != second.pop("order"), "the hash of strings was the same in both"
    assert [name for name in first if first[name] != second[name]] == []
    assert len(first) == len(VERBS) + len(SEEDED) + 1


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESID_SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield table(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", [name for name in SEEDED if name not in ("validate", "blame")])
def test_a_seed_gives_the_same_whatever_the_generators_of_the_process_say(here: Table, name: str) -> None:
    first = digest(SEEDED[name](here, 3))
    torch.rand(7)
    before = state_of_process()
    assert digest(SEEDED[name](here, 3)) == first
    after = state_of_process()
    assert [key for key in ("torch", "python", "numpy") if before[key] != after[key]] == []


@pytest.mark.parametrize("name", PAIRS)
def test_another_seed_draws_otherwise(here: Table, name: str) -> None:
    assert digest(SEEDED[name](here, 3)) != digest(SEEDED[name](here, 4))

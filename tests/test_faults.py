"""Whatever breaks off half way, wherever: everything is as it was, and the next call gives what it gave before."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import faults
import greenlet
import pytest
import torch
from faults import ERRORS, Trap, as_before, digest, failing, outcome, signalled
from nnsight.intervention.interleaver import Interleaver
from nnsight.tracing import tracer as nnsight_tracer
from operations import FIT, OPERATIONS, PROMPT, VERBS, Table
from validation_cases import FACT, a_row, sharp

import resid_surgery as rs
from resid_surgery.editing.changes import Rows
from resid_surgery.errors import InterventionError, ResidSurgeryError, out_of_memory
from resid_surgery.models import opening, replacing, tracing
from resid_surgery.models.fingerprint import Weights
from resid_surgery.models.mlps import _products
from resid_surgery.models.parts import measure_norm
from resid_surgery.models.passes import Pass
from resid_surgery.models.replacing import EditedModel
from resid_surgery.stream import loading
from resid_surgery.surgery import altering, chunks, engine, sweeping
from resid_surgery.surgery.writing import Writing

SLOW = ("validate", "blame", "check", "edit_least_squares", "run", "ablation_test")
SLOW_CALLS = 20_000
LAST = -1
BROKEN = [name for name in VERBS if name != "validate"]  # which `test_validating` breaks off in every stage
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: injected"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    """A model as a user may have it: training, a frozen part, a gradient, hooks of its own, one of which is a trap."""
    module = sharp("llama").train()
    frozen, other, *_ = module.parameters()
    frozen.requires_grad_(False)
    other.grad = torch.ones_like(other)
    next(module.children()).register_forward_hook(lambda *_: None)
    module.trap = Trap(module)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESID_SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Table(module, tmp_path_factory.mktemp("runs"))
        made.rec, made.other, made.graph, made.edit, made.moved  # noqa: B018  (made before anything is broken)
        yield made


@pytest.fixture(scope="module")
def wanted(table: Table) -> Callable[[str], tuple[str, int, int]]:
    """(digest of a verb's result, how many module calls it makes, how many Python calls)."""
    known: dict[str, tuple[str, int, int]] = {}

    def of(name: str) -> tuple[str, int, int]:
        if name not in known:
            verb = VERBS[name]
            verb(table)  # what is made once, and kept, is made
            with as_before(table.model), trap(table).set(0, RuntimeError):
                known[name] = digest(verb(table)), trap(table).count, SLOW_CALLS
            if name not in SLOW:
                with faults.struck(0, RuntimeError) as calls:
                    verb(table)
                known[name] = (*known[name][:2], calls[0])
        return known[name]

    return of


def trap(table: Table) -> Trap:
    return table.module.trap  # type: ignore[return-value]


def places(n: int, name: str) -> list[int]:
    """From the first to the last of n; fewer where a verb is slow."""
    found = [n // 2] if name in SLOW else [1, n // 3, 2 * n // 3, n]
    return sorted({at for at in found if 0 < at <= n})


def broken(table: Table, name: str, error: type[BaseException]) -> None:
    """Call a verb that is about to break off: the fault reaches the caller, or a fallback does without what failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how, what = outcome(lambda: VERBS[name](table))
    if how == "error":
        stopped = name == "run" and str(what).startswith("stopped: ")  # a run says how to go on
        assert stopped or "injected" in str(what)
        assert isinstance(what, error) or (error is RuntimeError and isinstance(what, ResidSurgeryError)), repr(what)
    else:
        assert name == "run" or error is RuntimeError, "only what is no fault of memory or of the user has a fallback"


# ---- calls, whole and broken off


@pytest.mark.parametrize("name", VERBS)
def test_a_call_leaves_everything_as_it_was_and_gives_the_same_again(table: Table, wanted: Any, name: str) -> None:
    assert digest(VERBS[name](table)) == wanted(name)[0]


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_in_a_module_of_the_model(table: Table, wanted: Any, name: str) -> None:
    first, n, _ = wanted(name)
    for number, at in enumerate(places(n, name)):
        error = ERRORS[(number + len(name)) % len(ERRORS)]
        with as_before(table.model), trap(table).set(at, error):
            broken(table, name, error)
    assert digest(VERBS[name](table)) == first


@pytest.mark.parametrize("name", BROKEN)
def test_an_interrupt_at_any_call_of_python(table: Table, wanted: Any, name: str) -> None:
    first, _, n = wanted(name)
    draw = random.Random(name)
    for _ in range(1 if name in SLOW else 4):
        at = draw.randint(1, n - 1)
        with as_before(table.model):
            with faults.struck(at, KeyboardInterrupt) as calls:
                broken(table, name, KeyboardInterrupt)
            assert calls[0] >= at, "nothing was struck"
    assert digest(VERBS[name](table)) == first


# ---- named stages of verbs

STAGES: dict[str, tuple[str, Any, str, int]] = {
    "a shadow is made": ("load", opening, "_copied", 1),
    "loading settles heads": ("load", loading, "settle", 1),
    "loading proves the sums": ("load", loading, "prove", 1),
    "a traced tree is made": ("load", tracing, "_traced", 1),
    "weights are looked at": ("record", Weights, "known_fingerprint", 1),
    "a forward is planned": ("record", Pass, "of", 1),
    "the body of a trace": ("record", Pass, "run", 1),
    "a place in a traced tree is looked up": ("record", Pass, "place", 5),
    "a write": ("intervene", Pass, "write", 2),
    "an operation in a write": ("intervene", Writing, "_apply", 2),
    "after a forward": ("intervene", engine, "settle", 1),
    "what was done is checked": ("intervene", engine, "check_fired", 1),
    "the control row is checked": ("intervene", engine, "check_control", 1),
    "the first chunk of a sweep": ("sweep", sweeping, "run_chunk", 1),
    "between chunks of a sweep": ("sweep in chunks", sweeping, "run_chunk", 3),
    "a chunk is settled": ("sweep", chunks, "settle", 1),
    "a forward of a generation": ("under", altering.Altered, "_run", 2),
    "a cache is handed on": ("under", altering.Altered, "_keep", 1),
    "an edit is half computed": ("applied", Rows, "added_to", 2),
    "an edit is applied": ("applied", replacing, "EditedModel", 1),
    "the inner of two edits is applied": ("applied", replacing, "EditedModel", 2),
    "an edit is let go of": ("applied", EditedModel, "close", 1),
    "a step of a fit": ("edit_rank_one", torch.optim.Adam, "step", 2),
    "a backward pass": ("gradients", torch.autograd, "grad", 1),
    # while others put back what they changed
    "torch puts its grad mode back": ("record", torch.no_grad, "__exit__", LAST),
    "torch puts its grad mode back after a generation": ("under", torch.no_grad, "__exit__", LAST),
    "nnsight ends its trace": ("record", nnsight_tracer, "dec", 1),
    "nnsight forgets what was saved": ("record", nnsight_tracer, "_saves", 2),
    "nnsight lets go of its workers": ("record", Interleaver, "cancel", 1),
    "nnsight ends its interleaving": ("intervene", Interleaver, "__exit__", 1),
    "what a trace changed is put back": ("record", tracing.Restored, "__exit__", 1),
}

CHUNKED = {"sweep in chunks": lambda t: rs.sweep(t.rec, OPERATIONS, measure="bs", chunk=1)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_a_named_stage(table: Table, stage: str) -> None:
    name, holder, function, at = STAGES[stage]
    verb = (VERBS | CHUNKED)[name]
    with failing(holder, function, 0, RuntimeError) as calls:
        first = digest(verb(table))
    at = calls[0] if at == LAST else at
    for error in (KeyboardInterrupt, MemoryError):
        with as_before(table.model):
            with failing(holder, function, at, error) as calls, pytest.raises(error, match="injected"):
                verb(table)
            assert calls[0] >= at
        assert digest(verb(table)) == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
@pytest.mark.parametrize("name", VERBS)
def test_an_interrupt_while_torch_puts_its_grad_mode_back(table: Table, name: str, mode: type) -> None:
    verb = VERBS[name]
    verb(table)  # what is made once, and kept, is made
    with failing(mode, "__exit__", 0, RuntimeError) as calls:
        first = digest(verb(table))
    for at in places(calls[0], name):
        with as_before(table.model), failing(mode, "__exit__", at, KeyboardInterrupt) as struck:
            broken(table, name, KeyboardInterrupt)
        assert struck[0] >= at, "nothing was struck"
    assert not calls[0] or digest(verb(table)) == first


def test_an_interrupt_while_nnsight_watches_for_the_body_of_a_trace(table: Table, monkeypatch: Any) -> None:
    """It sets a trace function of Python, which would stay."""

    def watching(tracer: Any) -> None:
        sys.settrace(lambda *_: None)
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(nnsight_tracer, "skip_context", watching)
    with as_before(table.model), pytest.raises(KeyboardInterrupt, match="injected"):
        rs.record(table.model, PROMPT)


def test_a_debugger_is_still_there_after_an_interrupt(table: Table, monkeypatch: Any) -> None:
    def watching(tracer: Any) -> None:
        sys.settrace(None)
        raise KeyboardInterrupt("injected")

    def debugger(*_: Any) -> None:
        return None

    before = sys.gettrace()
    try:
        sys.settrace(debugger)
        rs.record(table.model, PROMPT)
        assert sys.gettrace() is debugger
        monkeypatch.setattr(nnsight_tracer, "skip_context", watching)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            rs.record(table.model, PROMPT)
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


# ---- inside with-blocks


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_inside_applied_rolls_it_back(table: Table, error: type[BaseException]) -> None:
    first, second = table.edit, a_row(table.model, 1.0, layer=2, neuron=5)
    alone = digest(rs.record(table.model, PROMPT))
    held: list[Any] = []

    def inside() -> None:
        with first.applied(table.model) as once, second.applied(once, strict=False) as twice:
            held.extend([once, twice])
            assert digest(rs.record(table.model, PROMPT)) == alone
            assert digest(rs.record(twice, PROMPT)) != digest(rs.record(once, PROMPT)) != alone
            raise error("injected")

    with as_before(table.model):
        _, what = outcome(inside)
        assert isinstance(what, error), what
        for one in held:
            with pytest.raises(InterventionError, match="was left"):
                rs.record(one, PROMPT)
    assert digest(rs.record(table.model, PROMPT)) == alone


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_inside_under_closes_it(table: Table, error: type[BaseException]) -> None:
    alone = digest(rs.record(table.model, PROMPT))
    held: list[Any] = []

    def inside() -> None:
        with rs.under(table.model, rs.Zero("L1.N3")) as altered:
            held.append(altered)
            altered.forward("The capital")
            raise error("injected")

    with as_before(table.model):
        _, what = outcome(inside)
        assert isinstance(what, error), what
        with pytest.raises(InterventionError, match="was left"):
            held[0].forward("The capital")
    assert digest(rs.record(table.model, PROMPT)) == alone


# ---- out of memory is no fault of the model


class CpuMemoryError(RuntimeError):
    """What torch raises on the CPU: a RuntimeError that is told by its words."""

    def __init__(self, *_: Any) -> None:
        super().__init__(CPU)


@pytest.mark.parametrize(
    ("error", "is_so"),
    [(MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError(CPU), True),
     (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
     (RuntimeError("unable to mmap 5 bytes from file: Cannot allocate memory (12)"), True),
     (RuntimeError("shapes cannot be multiplied"), False), (ValueError("out of memory"), False)],
)  # fmt: skip
def test_out_of_memory_is_told_apart(error: BaseException, is_so: bool) -> None:
    assert out_of_memory(error) is is_so


def test_torch_still_says_so_in_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("name", ["load", "record", "record_each", "sweep", "intervene", "sources"])
def test_memory_that_runs_out_on_the_cpu_is_not_called_an_unknown_architecture(
    table: Table, wanted: Any, name: str
) -> None:
    first, n, _ = wanted(name)
    for at in range(1, n + 1, max(1, n // (20 if name == "load" else 3))):
        with as_before(table.model), trap(table).set(at, CpuMemoryError), pytest.raises(CpuMemoryError):
            VERBS[name](table)
    assert digest(VERBS[name](table)) == first


def test_nor_an_activation_or_a_norm_of_an_unknown_kind() -> None:
    def full(*_: Any) -> Any:
        raise CpuMemoryError

    norm = torch.nn.LayerNorm(4)
    norm.forward = full  # type: ignore[method-assign]
    with pytest.raises(CpuMemoryError):
        list(_products({"gate": torch.ones(2, 3)}, full))
    with pytest.raises(CpuMemoryError):
        measure_norm(norm, 4, "a norm")


# ---- Ctrl-C itself, and what is left in memory

PRESSED: dict[str, Callable[[Table], Any]] = {
    "sweep": lambda t: rs.sweep(t.rec, [rs.Zero(f"L{i}.N{j}") for i in range(3) for j in range(40)], measure="all",
                                chunk=8),
    "validate": VERBS["validate"],
    "fit": lambda t: rs.edit_rank_one(t.model, FACT, layer=1, **FIT),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESSED)
def test_ctrl_c_at_random_moments(table: Table, name: str) -> None:
    if not faults.in_main_thread():
        pytest.skip("signals reach the main thread only")
    call, draw, stopped, rounds = PRESSED[name], random.Random(name), 0, 4 if name in SLOW else 12
    first, seconds = faults.timed(lambda: digest(call(table)))
    for _ in range(rounds):
        with as_before(table.model), signalled(0.001 + draw.random() * 0.8 * seconds):
            how, what = outcome(lambda: call(table))
        assert how == "value" or isinstance(what, KeyboardInterrupt), repr(what)
        stopped += how == "error"
    assert stopped >= rounds / 2
    assert digest(call(table)) == first


def test_nothing_of_what_was_broken_off_is_left_in_memory(table: Table) -> None:
    kinds = (Pass, Writing, rs.Recording, EditedModel, altering.Altered, greenlet.greenlet)
    names = ("record", "intervene", "sweep", "under", "applied", "gradients", "edit_rank_one")

    def strike() -> None:
        for name in names:
            with trap(table).set(9, MemoryError), pytest.raises(MemoryError):
                VERBS[name](table)

    strike()
    before = faults.alive(kinds)
    for _ in range(3):
        strike()
    assert faults.alive(kinds) == before


# ---- the watch itself

MEDDLING: dict[str, Callable[[Table], Any]] = {
    "a thread": lambda t: faults.idle_thread(),
    "a file": lambda t: open(__file__),  # noqa: SIM115
    "a lock": lambda t: t.model.lock.acquire(),
    "a trace function": lambda t: sys.settrace(lambda *_: None),
    "a depth of traces": lambda t: nnsight_tracer.inc(),
    "gradients switched off": lambda t: torch.set_grad_enabled(False),
    "a number drawn": lambda t: torch.rand(1),
    "a filter of warnings": lambda t: warnings.simplefilter("ignore"),
}


@pytest.mark.parametrize("what", MEDDLING)
def test_what_is_not_as_it_was_would_be_seen(table: Table, what: str) -> None:
    with warnings.catch_warnings(), tracing.Restored(), torch.random.fork_rng(devices=[]):
        before, function = faults.state(table.model), sys.gettrace()
        held = MEDDLING[what](table)
        changed = faults.differences(before, faults.state(table.model))
        sys.settrace(function)
    if what == "a lock":
        table.model.lock.release()
    if what == "a file":
        held.close()
    if what == "a thread":
        held.set()
    assert changed

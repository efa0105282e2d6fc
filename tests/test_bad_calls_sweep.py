"""Every public verb, value and method, every parameter, nasty values: one line that says what is wrong, or a result."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from good_calls import CALLS, METHODS, RETURNED, Bench, callables, carried_out
from validation_cases import opened

import resid_surgery as rs
from resid_surgery.errors import CONTROL, LONGEST, ResidSurgeryError


class Odd:
    """What cannot even be shown."""

    def __repr__(self) -> str:
        raise KeyError("no face")


NASTY: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "minus one": lambda: -1,
    "huge": lambda: 10**30,
    "half": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "complex": lambda: 1j,
    "empty text": lambda: "",
    "word": lambda: "banana",
    "lines": lambda: "a\nb",
    "long text": lambda: "a" * 1_000_000,
    "no text": lambda: "\ud800",
    "null": lambda: "a\0b",
    "bytes": lambda: b"ab",
    "empty list": list,
    "empty mapping": dict,
    "list of None": lambda: [None],
    "list in a list": lambda: [[1.5]],
    "deep list": lambda: functools.reduce(lambda held, _: [held], range(3000), 1),
    "mapping": lambda: {"x": 1},
    "generator": lambda: iter(()),
    "object": Odd,
    "class": lambda: Odd,
    "numpy NaN": lambda: np.float32("nan"),
    "numpy flag": lambda: np.bool_(True),
    "empty array": lambda: np.array([]),
    "array of anything": lambda: np.array([None, "x"], dtype=object),
    "whole tensor": lambda: torch.tensor(1),
    "NaN tensor": lambda: torch.tensor(float("nan")),
    "flag tensor": lambda: torch.tensor(True),
    "meta tensor": lambda: torch.empty(24, device="meta"),
    "sparse tensor": lambda: torch.eye(4).to_sparse(),
    "table": pd.DataFrame,
    "missing": lambda: pd.NA,
    "path": lambda: Path("/nowhere/x"),
    "module": lambda: opened("llama", torch.float32).module,
    "model": lambda: opened("gpt_neox"),
    "site": lambda: rs.Neuron(9, 9),
}
SLOW = {"load", "check", "check_families", "operate", "validate", "run_lm_eval", "edit_rank_one", "edit_least_squares"}
FEW = ("None", "huge", "NaN", "word", "empty list", "object", "array of anything", "whole tensor", "meta tensor")


NEEDS_FILES = ("Edit.from_delta", "Edit.from_peft")  # of other tools
FEWEST = ("None", "NaN", "object")  # each call reads the list of all tasks
EVERY_FAMILY = ("check_families", "types", "None")  # a good value, which takes a minute
USERS = ("where", "operation", "each")  # functions of the user's: what they raise is theirs


def some_of(values: Mapping[str, Any], name: str, share: int) -> list[str]:
    """One of every `share` values, other ones for every name; all of them in the thorough profile."""
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    return [one for i, one in enumerate(values) if thorough or (i + crc32(name.encode())) % share == 0]


class Ran(BaseException):
    """A forward would run now: the arguments were taken."""


ENDING: list[bool] = []


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    for make in NASTY.values():
        make()  # models among them need forwards when they are first opened
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Files that a call writes lie in a folder of its own; no cache is the user's; no figure stays open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


@pytest.fixture
def no_forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called when what is good has been made: from then on every forward ends the call.

    A tree that is traced for the first time meanwhile keeps the forward that it found: `ENDING` is one for all tests.
    """

    def stop() -> None:
        ENDING.append(True)
        for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel, transformers.GPTNeoXForCausalLM):
            monkeypatch.setattr(cls, "forward", ends_or(cls.forward))

    yield stop
    ENDING.clear()


def ends_or(real: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that ends the call while `ENDING` says so."""

    @functools.wraps(real)
    def ends(*args: Any, **kwargs: Any) -> Any:
        if ENDING:
            raise Ran
        return real(*args, **kwargs)

    return ends


def called(name: str, bench: Bench) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A verb and good arguments."""
    return METHODS[name](bench) if name in METHODS else (getattr(rs, name.split()[0]), CALLS[name](bench))


def parameters(verb: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """The names of what it takes, those without a good value too."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return list(dict.fromkeys([*given, *(n for n, p in inspect.signature(verb).parameters.items() if p.kind in kinds)]))


def fault(verb: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """What is wrong with how a call ended; None if it gave a result, or an error of the library in one line."""
    try:
        carried_out(verb(**arguments))
    except Ran:
        return None
    except ResidSurgeryError as error:
        said = str(error)
        whole = said and len(said) <= LONGEST and said == " ".join(said.split()) and not CONTROL.search(said)
        return None if whole else f"{type(error).__name__}: {said[:200]!r} is not one line"
    except Exception as error:  # noqa: BLE001  (what is looked for)
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.mark.parametrize("name", [*CALLS, *METHODS])
def test_a_nasty_argument_is_refused_in_one_line_or_taken(
    bench: Bench, no_forwards: Callable[[], None], name: str
) -> None:
    verb, good = called(name, bench)
    no_forwards()
    faults = {}
    named = parameters(verb, good)
    for one in named:
        for kind in FEWEST if name == "run_lm_eval" else FEW if name in SLOW else some_of(NASTY, f"{name} {one}", 3):
            own = (kind == "class" and one in USERS) or (name, one, kind) == EVERY_FAMILY
            said = None if own else fault(verb, good | {one: NASTY[kind]()})
            if said is not None:
                faults[one, kind] = said
    assert faults == {}


def test_everything_that_can_be_called_is_swept() -> None:
    assert {name.split()[0] for name in CALLS} | RETURNED == callables()
    assert not {name.split()[0] for name in CALLS} & RETURNED


def test_every_public_method_that_takes_something_is_swept() -> None:
    """Methods of what users hold; an `OpenedModel` is what other rooms build on, and is not called by users."""
    inner = {"Recording.work", "Recording.reach", "Plan.axes_of", "Plan.combinations", "Layout.of_layer"}
    found = {f"{name}.{method}" for name in callables() for method in takes_something(getattr(rs, name))
             if name != "OpenedModel" and method != "resolve" and (name, method) != ("Slice", "expand")}  # fmt: skip
    assert found - inner == set(METHODS)


def takes_something(cls: Any) -> Iterator[str]:
    """The public methods of a class with a parameter of their own."""
    for name, member in vars(cls).items() if isinstance(cls, type) else ():
        plain = inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod))
        if plain and not name.startswith("_") and set(inspect.signature(getattr(cls, name)).parameters) - {"self"}:
            yield name


@pytest.mark.parametrize(
    "name", [name for name in [*CALLS, *METHODS] if name not in {*SLOW, "Edit.from_delta", "Edit.from_peft"}]
)
def test_the_good_call_is_good(bench: Bench, name: str) -> None:
    """So that a sweep starts from what would work."""
    verb, good = called(name, bench)
    assert carried_out(verb(**good)) is not Ran


def test_a_fault_is_seen() -> None:
    def bad(error: BaseException) -> Callable[..., Any]:
        def verb(x: Any) -> Any:
            raise error

        return verb

    assert fault(lambda x: x, {"x": 1}) is None
    assert fault(bad(rs.ArgumentError("`x` must be y.")), {"x": 1}) is None
    assert fault(bad(Ran()), {"x": 1}) is None
    assert "KeyError" in str(fault(bad(KeyError("x")), {"x": 1}))
    assert "is not one line" in str(fault(bad(rs.ArgumentError("")), {"x": 1}))
    lengthy = rs.ArgumentError("x")
    lengthy.args = ("a\nb",)
    assert "is not one line" in str(fault(bad(lengthy), {"x": 1}))


@pytest.mark.parametrize("error", [rs.ArgumentError, rs.LoadError, rs.SiteError, rs.ClosureError, rs.RunError])
def test_an_error_is_one_line_whatever_stands_in_it(error: type[ResidSurgeryError]) -> None:
    said = str(error(f"`x` must be y; got {'a' * 10_000}\nb\ud800\t. Give z."))
    assert said.startswith("`x` must be y; got aaa")
    assert said.endswith("a b\\ud800 . Give z.")
    assert len(said) <= LONGEST
    assert str(error("short")) == "short"
    assert os.strerror(2) in str(error(os.strerror(2)))

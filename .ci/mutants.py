"""Mutation testing: which small faults in a module its tests do not see.

The faults are mutmut's (its operators on every node of every function, decorated ones too, but not on annotations,
decorators, docstrings and arguments of `len` and `isinstance`). One process imports the library, runs the module's
tests once and notes which test enters which function; then every fault has a fork of it, in which the function's code
is exchanged, wherever it is already referred to, and the tests that enter it run until one fails: first those that saw
faults of the same function, then the fastest, up to MOST seconds of them.

    python .ci/mutants.py bounds locating       some modules; without names, all of MODULES
    python .ci/mutants.py bounds --only 12 40   the faults of these numbers, with what they are
    python .ci/mutants.py --again               those that survived the last time

Writes out/mutants/NAME.jsonl (a line a fault) and prints a table.
"""

import argparse
import ast
import difflib
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "mutants"
sys.path.insert(0, str(ROOT))
sys.path.append(str(OUT / "tools"))  # last: mutmut's own dependencies hide nothing that the library uses

import libcst as cst  # noqa: E402
import pytest  # noqa: E402
from libcst.metadata import MetadataWrapper, WhitespaceInclusivePositionProvider  # noqa: E402
from mutmut.mutation.mutators import mutation_operators  # noqa: E402

LEFT = ("survived", "no test")
# What is mutated, and the test files that are asked; tests of the 60 model types are left out, they take too long.
SLOW = "not every_type and not type_are and not gradient and not leave_no and not half_precision"
MODULES = {
    "bounds": ("resid_surgery/attribution/bounds.py", ("mutants_bounds", "locating")),
    "locating": ("resid_surgery/attribution/locating.py", ("mutants_locating",)),
    "subvalues": ("resid_surgery/stream/subvalues.py", ("mutants_subvalues", "sites")),
    "vocabulary": ("resid_surgery/stream/vocabulary.py", ("mutants_vocabulary",)),
    "interventions": ("resid_surgery/surgery/interventions.py", ("mutants_interventions", "storing")),
    "effects": ("resid_surgery/surgery/effects.py", ("mutants_effects",)),
}
LEAST, TIMES = 5.0, 5.0  # a fault may take 5 s and 5 times what its tests took without one
MOST = 60.0  # seconds of tests that a fault is shown to, at least one of them: more could only kill more


@dataclass(frozen=True)
class Mutant:
    """One fault: the whole module's text with it, and the outermost function that it is in."""

    number: int
    function: str
    line: int
    source: str
    diff: str


class Faults(cst.CSTVisitor):
    """All faults of a module's functions, as (function, line, the module's text with it)."""

    METADATA_DEPENDENCIES = (WhitespaceInclusivePositionProvider,)

    def __init__(self, text: str, module: cst.Module) -> None:
        super().__init__()
        self.found: list[tuple[str, int, str]] = []
        self.text, self.module = text, module
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.inside: list[str] = []  # classes and functions around the node
        self.depth = 0  # functions around it

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Decorator)) or _untouched_call(node) or _long_default(node):
            return False
        if isinstance(node, (cst.ClassDef, cst.FunctionDef)):
            if self.depth == 0:
                self.inside.append(node.name.value)
            self.depth += isinstance(node, cst.FunctionDef)
        if self.depth:
            name, at = ".".join(self.inside), self.get_metadata(WhitespaceInclusivePositionProvider, node)
            for kind, operator in mutation_operators:
                if isinstance(node, kind):
                    self.found += [(name, at.start.line, self._with(node, one, at)) for one in operator(node)]
        return True

    def _with(self, node: cst.CSTNode, changed: cst.CSTNode, at: Any) -> str:
        """The text with one node changed; pasted in where the node's text is just what lies there, which is fast."""
        low, high = (self.starts[p.line - 1] + p.column for p in (at.start, at.end))
        if self.text[low:high] == self.module.code_for_node(node):
            return self.text[:low] + self.module.code_for_node(changed) + self.text[high:]
        return self.module.deep_replace(node, changed).code  # type: ignore[union-attr]

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef):
            self.depth -= 1
        if isinstance(original_node, (cst.ClassDef, cst.FunctionDef)) and self.depth == 0:
            self.inside.pop()


def _untouched_call(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in ("len", "isinstance")


def _long_default(node: cst.CSTNode) -> bool:
    """A default that is more than a name or literal: it is evaluated where the function is defined."""
    return isinstance(node, cst.Param) and not isinstance(
        node.default, (cst.Name, cst.BaseNumber, cst.BaseString, type(None))
    )


def mutants_of(path: Path) -> list[Mutant]:
    """Every fault of a module that still compiles."""
    text = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    faults = Faults(text, wrapper.module)
    wrapper.visit(faults)
    made: list[Mutant] = []
    for function, line, source in faults.found:
        if source != text and _compiles(source):
            made.append(Mutant(len(made), function, line, source, _diff(text, source)))
    return made


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def functions_of(path: Path) -> dict[str, list[FunctionType]]:
    """The live functions of a module's file by qualified name, whatever wraps them."""
    found: dict[str, list[FunctionType]] = {}
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename == str(path):
            found.setdefault(one.__code__.co_qualname, []).append(one)
    return found


def code_of(source: str, path: Path, name: str) -> CodeType:
    """The compiled code of one function of a module's text."""
    code = compile(source, str(path), "exec")
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def exchange(mutant: Mutant, path: Path, live: dict[str, list[FunctionType]]) -> None:
    """Give a function the mutant's code and defaults, in this process."""
    node: Any = ast.parse(mutant.source)
    for part in mutant.function.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    code = code_of(mutant.source, path, mutant.function)
    for function in live[mutant.function]:
        function.__code__ = code
        names = [a.arg for a in node.args.kwonlyargs]
        if function.__defaults__:
            function.__defaults__ = tuple(_value(d, function) for d in node.args.defaults)
        if function.__kwdefaults__:
            pairs = zip(names, node.args.kw_defaults, strict=True)
            function.__kwdefaults__ = {name: _value(d, function) for name, d in pairs if d is not None}


def _value(default: ast.expr, function: FunctionType) -> Any:
    return eval(compile(ast.Expression(default), "default", "eval"), function.__globals__)


@dataclass
class Seen:
    """What one run of the tests without a fault told: functions entered and seconds, a test each."""

    entered: dict[pytest.Item, set[str]] = field(default_factory=dict)
    seconds: dict[pytest.Item, float] = field(default_factory=dict)


class Hunt:
    """The pytest plugin that runs the tests once and then every mutant in a fork."""

    def __init__(self, name: str, path: Path, mutants: list[Mutant]) -> None:
        self.name, self.path, self.mutants = name, path, mutants
        self.failed: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.models: list[Any] = []
        self.killers: dict[str, Counter[str]] = {}  # function -> how many of its faults a test saw

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile(
            "mutants",
            settings.default,
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
            max_examples=8,
        )
        settings.load_profile("mutants")  # a failing example is enough: it need not be made small

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests could not be collected")
        from resid_surgery.models.opening import OpenedModel  # not before conftest.py's hook

        seen = self._without_faults(session.items)
        if self.failed:
            raise pytest.UsageError(f"these tests fail without any fault: {self.failed}")
        live = functions_of(self.path)
        self.models = [one for one in gc.get_objects() if type(one) is OpenedModel]
        gc.collect()
        gc.freeze()
        with (OUT / f"{self.name}.jsonl").open("a") as file:
            for mutant in self.mutants:
                self.results.append(self._tried(mutant, live, seen))
                file.write(json.dumps(self.results[-1]) + "\n")
                file.flush()
        return True

    def _without_faults(self, items: list[pytest.Item]) -> Seen:
        seen, file = Seen(), str(self.path)
        for item, after in zip(items, [*items[1:], None], strict=True):
            entered: set[str] = set()

            def note(frame: Any, event: str, _: Any, entered: set[str] = entered) -> None:
                if event == "call" and frame.f_code.co_filename == file:
                    entered.add(frame.f_code.co_qualname.split(".<locals>")[0])

            began = time.monotonic()
            sys.setprofile(note)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            sys.setprofile(None)
            seen.entered[item], seen.seconds[item] = entered, time.monotonic() - began
        return seen

    def _tried(self, mutant: Mutant, live: dict[str, list[FunctionType]], seen: Seen) -> dict[str, Any]:
        asked = self._asked(mutant, seen)
        limit, began = LEAST + TIMES * sum(seen.seconds[i] for i in asked), time.monotonic()
        outcome = "no test" if not asked else self._forked(mutant, live, asked, limit)
        print(
            f"{self.name} {mutant.number}/{len(self.mutants)} {mutant.function}:{mutant.line} {outcome}",
            file=sys.__stderr__,
        )
        return {
            "number": mutant.number,
            "function": mutant.function,
            "line": mutant.line,
            "outcome": outcome,
            "tests": len(asked),
            "seconds": round(time.monotonic() - began, 2),
            "diff": mutant.diff,
        }

    def _asked(self, mutant: Mutant, seen: Seen) -> list[pytest.Item]:
        """The tests that a fault is shown to, in order."""
        killers, total, asked = self.killers.get(mutant.function, Counter()), 0.0, []
        entering = [i for i, names in seen.entered.items() if mutant.function in names]
        for item in sorted(entering, key=lambda i: (-killers[i.nodeid] // 5, seen.seconds[i])):
            total += seen.seconds[item]
            if asked and total > MOST:
                break
            asked.append(item)
        return asked

    def _forked(
        self, mutant: Mutant, live: dict[str, list[FunctionType]], asked: list[pytest.Item], limit: float
    ) -> str:
        back, out = os.pipe()
        child = os.fork()
        if child == 0:
            self._child(mutant, live, asked, out)
        os.close(out)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                with os.fdopen(back) as told:
                    self.killers.setdefault(mutant.function, Counter()).update([told.read()])
                return {0: "survived"}.get(os.waitstatus_to_exitcode(status), "killed")
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(back)
        return "too slow"

    def _child(self, mutant: Mutant, live: dict[str, list[FunctionType]], asked: list[pytest.Item], out: int) -> None:
        """Run the tests on the fault and leave: 1 where one failed, whose name is told, 0 where none did."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            self._forget(asked)
            exchange(mutant, self.path, live)
            for item, after in zip(asked, [*asked[1:], asked[0]], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if self.failed:
                    os.write(out, self.failed[0].encode())
                    os._exit(1)
        except BaseException:  # noqa: BLE001  (whatever it is, a fault was seen; the fork must not go on)
            os._exit(1)
        os._exit(0)

    def _forget(self, items: list[pytest.Item]) -> None:
        """Empty what earlier tests left: caches of opened models and of the test modules."""
        for one in self.models:
            one.cache.clear()
        for module in {item.module for item in items}:  # type: ignore[attr-defined]
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                    value.cache_clear()


def told(name: str) -> list[dict[str, Any]]:
    """What is known of a module's faults from its file, the latest of each."""
    file = OUT / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return sorted({one["number"]: one for one in lines}.values(), key=lambda one: one["number"])


def hunt(name: str, only: list[int]) -> None:
    """All mutants of one module, or some, in this process's forks."""
    file, tests = MODULES[name]
    mutants = [m for m in mutants_of(ROOT / file) if not only or m.number in only]
    files = [f"tests/test_{t}.py" for t in tests]
    hunter = Hunt(name, ROOT / file, mutants)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", SLOW, *files], plugins=[hunter])
    if len(hunter.results) != len(mutants):
        raise SystemExit(f"{name}: pytest stopped with {code}")


def apart(name: str, only: list[int]) -> None:
    """`hunt` in a process of its own: what one module's tests leave behind changes nothing for the next."""
    child = os.fork()
    if child == 0:
        hunt(name, only)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{name} was not finished")


def line_of(name: str, results: list[dict[str, Any]]) -> str:
    """A row of the table."""
    outcomes = [one["outcome"] for one in results]
    left = sum(outcomes.count(one) for one in LEFT)
    share = 1 - left / max(1, len(outcomes))
    return f"| {name} | {len(outcomes)} | {len(outcomes) - left} | {left} | {share:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help=", ".join(MODULES))
    parser.add_argument("--only", nargs="+", type=int, default=[], metavar="NUMBER", help="these faults, shown")
    parser.add_argument("--again", action="store_true", help="those that survived the last time")
    given = parser.parse_args()
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in given.names or list(MODULES):
        left = [one["number"] for one in told(name) if one["outcome"] in LEFT] if given.again else given.only
        if not given.again and not given.only:
            (OUT / f"{name}.jsonl").unlink(missing_ok=True)
        if left or not given.again:
            apart(name, left)
        for one in told(name):
            if one["number"] in given.only or (given.again and one["outcome"] in LEFT):
                print(f"{one['number']} {one['function']}:{one['line']} {one['outcome']}\n{one['diff']}")
    print("| module | mutants | killed | survived | share |\n|---|---|---|---|---|")
    for name in given.names or list(MODULES):
        print(line_of(name, told(name)), flush=True)


if __name__ == "__main__":
    main()

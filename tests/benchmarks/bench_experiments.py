"""Runs, measured: ``make bench-experiments``; ``--quick`` for small numbers.

1. Throughput of `resid_surgery.run` against `record` and `sweep` by hand: same prompts, same rows, in turn (goal:
   within 10 %).
2. A run that is killed with SIGKILL at 200 random moments and resumed each time, against an uninterrupted one.
3. Memory over 10,000 prompts on a tiny model: resident MB after every 1,000 (goal: flat).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import interleaved

import resid_surgery as rs

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_run_survival as survival

HEADS = {
    "heads": {"kind": "Zero", "sites": "L*.H*", "each": True},
    "mlps": {"kind": "Zero", "sites": "L*.mlp", "each": True},
}
TOP = rs.Plan(
    axes={"k": [1, 10, 100]},
    locate={"best": {"k": "$k"}},
    intervene={"best": {"kind": "Zero", "sites": "$best"}},
)
MEMORY = """
import ctypes, random, resource, sys, tempfile
import torch
import resid_surgery as rs
from resid_surgery.experiments.work import Worker

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

torch.set_num_threads(1)
rng, total, every = random.Random(0), {total}, {every}
prompts = [rs.Prompt(ids=[rng.randrange(97) for _ in range(rng.choice((2, 3, 4, 6)))], target=5) for _ in range(total)]
real, seen = Worker.run, 0

def counted(self, group, skip=()):
    global seen
    for outcome in real(self, group, skip):
        yield outcome
        seen += 1
        if seen % every == 0:
            print(seen, resident(), flush=True)

Worker.run = counted
zero = {{"kind": "Zero", "sites": "$best", "each": True}}
plan = {{"locate": {{"best": {{"k": 2}}}}, "intervene": zero, "measure": "bs"}}
with tempfile.TemporaryDirectory() as out:
    rs.run(rs.load(rs.tiny("llama")), prompts, plan, out=out + "/run", progress=False, save_every=2.0)
"""


def rows_by_hand(model: rs.OpenedModel, prompts: list[rs.Prompt]) -> int:
    """What somebody without `run` would write, for the same rows."""
    rows = 0
    for prompt in prompts:
        rec = rs.record(model, prompt)
        rows += len(rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*") + rs.grid(rec, rs.Zero, "L*.mlp"), progress=False))
    return rows


def located_by_hand(model: rs.OpenedModel, prompts: list[rs.Prompt]) -> int:
    rows = 0
    for prompt in prompts:
        rec = rs.record(model, prompt)
        best = rs.locate(rec, k=100, progress=False).sites
        rows += len(rs.sweep(rec, [rs.Zero(best[:k]) for k in (1, 10, 100)], progress=False))
    return rows


def throughput(model: rs.OpenedModel, prompts: list[rs.Prompt], repeats: int) -> None:
    """Seconds of a run and of the same rows by hand, and their ratio."""
    for name, plan, by_hand in (
        ("a row a head and MLP", rs.Plan(intervene=HEADS), rows_by_hand),
        ("located neurons", TOP, located_by_hand),
    ):
        assert run_rows(model, prompts, plan) == by_hand(model, prompts)  # and nothing is cold afterwards
        a, b, ratio = interleaved(job(run_rows, model, prompts, plan), job(by_hand, model, prompts), repeats)
        print(
            f"{name:22s} run {a:7.2f} s, by hand {b:7.2f} s, ratio {ratio:.2f} (goal 1.10), "
            f"{len(prompts) / a:.2g} prompts/s"
        )


def run_rows(model: rs.OpenedModel, prompts: list[rs.Prompt], plan: rs.Plan) -> int:
    with tempfile.TemporaryDirectory() as out:
        return int(rs.run(model, prompts, plan, out=Path(out) / "run", progress=False).status["rows"])


def job(work: Callable[..., object], *given: object) -> Callable[[], object]:
    return lambda: work(*given)


def kills(number: int) -> None:
    """Kill and resume; every table of every folder must equal that of an uninterrupted run."""
    server = survival.Server("tiny")
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        start = time.perf_counter()
        server.whole(folder / "calm", save_every=0.02)
        longest = time.perf_counter() - start
        start = time.perf_counter()
        outs, share = survival.kill_at_random(server, folder, number, longest, seed=1)
        took = time.perf_counter() - start
        for out in outs:
            survival.same(out, folder / "calm")
            survival.nothing_twice(out)
            survival.nothing_left_over(out)
        middle = sum(0 < one < 1 for one in share)
    server.close()
    print(f"{number} SIGKILLs over {len(outs)} runs in {took:.0f} s, {middle} of them in the middle: identical rows")


def memory(total: int) -> None:
    """Resident memory while many prompts are dealt with."""
    code = MEMORY.format(total=total, every=total // 10)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    told = [line.split() for line in done.stdout.splitlines()]
    for seen, megabytes in told:
        print(f"    {int(seen):6,d} prompts {float(megabytes):8.1f} MB")
    second, last = (float(told[at][1]) for at in (1, -1))
    print(f"memory from the {int(told[1][0]):,}th to the {total:,}th prompt: {last - second:+.1f} MB (goal: flat)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("throughput", "kills", "memory"))
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    if given.only in (None, "throughput"):
        prompts = [*rs.facts("capital")[:12:6], *rs.facts("language")[:12:6]]
        throughput(rs.load("smollm2-135m"), prompts, 1 if given.quick else 3)
    if given.only in (None, "kills"):
        kills(20 if given.quick else 200)
    if given.only in (None, "memory"):
        memory(500 if given.quick else 10_000)


if __name__ == "__main__":
    main()

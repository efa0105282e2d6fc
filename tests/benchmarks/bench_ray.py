"""Ray with two one-thread actors against the local run on two threads; start-up and opening of models aside.

Run on a machine where nothing else runs:

    python tests/benchmarks/bench_ray.py [--prompts 64]

The goal is a ratio of at most 1.3.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

import resid_surgery as rs
from resid_surgery.experiments.crew import Crew
from resid_surgery.experiments.on_ray import OnRay

GOAL = 1.3
WORKERS = 2
COUNTRIES = ("France", "Spain", "Italy", "Norway", "Poland", "Peru", "Chile", "Cuba", "Egypt", "Greece", "Japan",
             "China", "India", "Iran", "Iraq", "Kenya")  # fmt: skip
PLAN = rs.Plan(
    locate={"best": {"kind": "neuron", "k": 10}, "others": {"like": "best"}},
    intervene={
        "best": {"kind": "Zero", "sites": "$best", "each": True},
        "others": {"kind": "Zero", "sites": "$others"},
    },
)


class Timed:
    """Notes when actors have opened their models and when outcomes come, of every crew."""

    def __init__(self) -> None:
        self.opened: list[float] = []
        self.came: list[float] = []
        same, outcomes = Crew._require_same, Crew.outcomes

        def require_same(crew: Crew, *found: str) -> None:
            same(crew, *found)
            self.opened.append(time.perf_counter())

        def timed(crew: Crew, *given: Any) -> Iterator[Any]:
            for one in outcomes(crew, *given):
                self.came.append(time.perf_counter())
                yield one

        Crew._require_same, Crew.outcomes = require_same, timed  # type: ignore[method-assign]

    def seconds_a_prompt(self) -> float:
        """While all actors were at work."""
        start = max(self.opened)
        return (self.came[-1] - start) / sum(at > start for at in self.came)


def prompts(n: int) -> list[rs.Prompt]:
    return [
        rs.Prompt(
            f"{'Well, ' * (number // len(COUNTRIES) % 3)}the capital of {one} is", target=" Paris", versus=[" London"]
        )
        for number, one in enumerate(COUNTRIES * n)
    ][:n]


def ray_against_local(n: int = 64) -> float:
    """Print the seconds a prompt of both, and their ratio."""
    some = prompts(n)
    torch.set_num_threads(WORKERS)
    model = rs.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as out:
        rs.run(model, some[:8], PLAN, out=f"{out}/warm")
        start = time.perf_counter()
        rs.run(model, some, PLAN, out=f"{out}/local")
        local = (time.perf_counter() - start) / n
        timed, start = Timed(), time.perf_counter()
        rs.run(model, some, PLAN, out=f"{out}/ray", executor=OnRay(workers=WORKERS, address="local"))
        whole = time.perf_counter() - start
    found = timed.seconds_a_prompt()
    print(f"local run, {WORKERS} threads:            {1000 * local:8.1f} ms a prompt, {local * n:.1f} s for {n}")
    print(f"Ray, {WORKERS} actors of one thread:     {1000 * found:8.1f} ms a prompt; {whole:.1f} s with start-up")
    print(f"ratio {found / local:.2f} (goal: at most {GOAL})")
    return found / local


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    ray_against_local(parser.parse_args().prompts)

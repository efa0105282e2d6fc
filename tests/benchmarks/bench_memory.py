"""Whether memory stays flat over 10,000 of everything, on a tiny Llama: ``python tests/benchmarks/bench_memory.py``.

Every job runs in a process of its own; resident memory is printed after each thousand, the garbage collector being
left alone, and what it grew by from the 1,000th to the last. At the end garbage is collected, and the number of
objects, of open files, of threads and of hooks (on the model, its shadow and all modules) and the memory that the
allocator counts as in use are compared with those after the first hundred: what is left over is a leak, while resident
memory also counts what is free but not given back. Jobs that leak on purpose show that the measure sees it.
``--count N`` and ``--since N`` for fewer, ``--job NAME`` for one; `test_memory_flat` runs some of them so.

A job that makes another shape at every turn ("other ...") also fills the caches of torch's own kernels, one a shape.
"""

import argparse
import ctypes
import gc
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.modules import module as every

import resid_surgery as rs
from resid_surgery.stream.grouping import record_each

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

SAME = rs.Prompt(ids=[3, 1, 4, 1, 5], target=7, versus=[8, 9])
DICE = random.Random(0)


def resident() -> float:
    """Resident memory in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


class Malloc(ctypes.Structure):
    """glibc's mallinfo2."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def in_use() -> float:
    """What is allocated, in MB; 0 where the C library does not say."""
    told = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if told is None:
        return 0.0
    told.restype = Malloc
    found = told()
    return float(found.uordblks + found.hblkhd) / 1e6


def other() -> rs.Prompt:
    """A prompt of 2 to 20 tokens."""
    return rs.Prompt(ids=[DICE.randrange(tiny.VOCAB) for _ in range(DICE.randint(2, 20))], target=7, versus=[8, 9])


def site() -> rs.Neuron:
    return rs.Neuron(DICE.randrange(3), DICE.randrange(40))


def each(model: rs.OpenedModel) -> Callable[[], object]:
    """The next of many recordings."""
    coming: Iterator[rs.Recording] = iter(())

    def job() -> object:
        nonlocal coming
        rec = next(coming, None)
        if rec is None:
            coming = record_each(model, [other() for _ in range(1000)])
            rec = next(coming)
        return rec

    return job


def jobs(model: rs.OpenedModel) -> dict[str, Callable[[], object]]:
    rec, kept = rs.record(model, SAME), []  # type: ignore[var-annotated]
    return {
        "record one prompt": lambda: rs.record(model, SAME),
        "record other prompts": lambda: rs.record(model, other()),
        "record_each of other prompts": each(model),
        "sweep of one row": lambda: rs.sweep(rec, [rs.Zero(site())]),
        "intervene": lambda: rs.intervene(rec, rs.Zero(site())),
        "intervene on other prompts": lambda: rs.intervene(rs.record(model, other()), rs.Zero(site())),
        "locate": lambda: rs.locate(rs.record(model, other()), k=5),
        "sources": lambda: rs.sources(rec, site(), norm=DICE.choice(["live", "frozen"])),
        "under, generating": lambda: generated(model),
        "a leak of 16 KB": lambda: kept.append([torch.ones(4000)]),
        "a leak of files, threads and hooks": lambda: kept.append(leaked(model)),
    }


def generated(model: rs.OpenedModel) -> object:
    with rs.under(model, rs.Zero(site())) as altered:
        return altered.generate([5, 4, 3], max_new_tokens=2)


def leaked(model: rs.OpenedModel) -> object:
    """A few files, threads and hooks, at every hundredth turn."""
    if DICE.randrange(100):
        return None
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return open(__file__), model.shadow.register_forward_hook(lambda *_: None)


def held(model: rs.OpenedModel) -> tuple[int, int, int]:
    """(open files, threads, hooks)."""
    trees = (*model.module.modules(), *model.shadow.modules())
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in trees)
    hooks += sum(len(getattr(every, name)) for name in vars(every) if name.startswith("_global_") and "hooks" in name)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), hooks


def grown(model: rs.OpenedModel, name: str, job: Callable[[], object], count: int, since: int) -> None:
    """Run a job many times and print what memory does, and what it grew by since one of them."""
    start, at, first, used, others = time.perf_counter(), 0.0, 0, 0.0, (0, 0, 0)
    for done in range(1, count + 1):
        job()
        if done == min(100, since):
            gc.collect()
            first, used, others = len(gc.get_objects()), in_use(), held(model)
        if done == since:
            at = resident()
        if done % 1000 == 0 or done == since:
            print(f"{name:30s} {done:6,d} {resident():8.2f} MB  {time.perf_counter() - start:6.1f} s", flush=True)
    growth = resident() - at
    gc.collect()
    left, more = len(gc.get_objects()) - first, in_use() - used
    told = f"grew {growth:+.2f} MB from {since:,} to {count:,}; {left:+d} objects and {more:+.3f} MB in use left"
    files, threads, hooks = (now - before for now, before in zip(held(model), others, strict=True))
    told += f"; {files:+d} files, {threads:+d} threads, {hooks:+d} hooks"
    print(f"{name:30s} {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--since", type=int, default=1000)
    parser.add_argument("--job")
    given = parser.parse_args()
    model = rs.load(tiny.build("llama", torch.float32))
    listed = jobs(model)
    if given.job is not None:
        grown(model, given.job, listed[given.job], given.count, given.since)
        return
    for name in listed:
        told = ["--job", name, "--count", str(given.count), "--since", str(given.since)]
        subprocess.run([sys.executable, __file__, *told], check=True)


if __name__ == "__main__":
    main()

"""What the benchmarks share: times in turn, and the peak memory of a job in a process of its own."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import resid_surgery as rs

PROMPT = rs.Prompt("The capital of France is", target=" Paris", versus=[" London", " Lyon"])


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleaved(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Medians of a and b, run in turn, and the median of the pairwise ratios a / b."""
    pairs = [(seconds(a), seconds(b)) for _ in range(repeats)]
    return (*(statistics.median(x) for x in zip(*pairs, strict=True)), statistics.median(x / y for x, y in pairs))


MEMORY = """
import ctypes, resource, threading, time
import resid_surgery as rs

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

model = rs.load("smollm2-135m")
prompt = rs.Prompt("The capital of France is", target=" Paris", versus=[" London"])
rec = rs.record(model, prompt, positions="{positions}")
ctypes.CDLL(None).malloc_trim(0)
before, peak, done = resident(), [0.0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
{job}
done.set()
watcher.join()
print(peak[0] - before, before)
"""


def peak(job: str, positions: str = "target") -> tuple[float, float]:
    """(peak resident memory of a job in a fresh process above the loaded model, the loaded model), in MB."""
    code = MEMORY.replace("{job}", job).replace("{positions}", positions)
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    above, before = run.stdout.split()
    return float(above), float(before)

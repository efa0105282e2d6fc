"""Fuzzing of every parser: 10,000 damaged contents each, in a process of its own
whose memory is limited. Any outcome but a value that comes back, or one clear line, is printed with its content, and
the exit status is 1.

    python tests/benchmarks/bench_fuzz.py [--cases 10000] [--only plan --only edit] [--seed 0]

Columns: cases, accepted, refused, seconds, slowest (ms), memory: by how much the process grew (MB) under a limit of
`ROOM` beyond what it had before the first case.
"""

import argparse
import os
import pickle
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parent.parent))
import fuzzing

ROOM = 2 << 30


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit(room: int) -> None:
    """Let this process grow by so many bytes and no more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))


def measured(parser: fuzzing.Parser, cases: int, start: int, folder: Path) -> dict[str, Any]:
    """Fuzz one parser: counts, times, and the first content of every kind of fault."""
    seen: Counter[str] = Counter()
    faults: dict[str, tuple[bytes, str]] = {}
    slowest, begun = 0.0, time.perf_counter()

    @seed(start)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(fuzzing.contents(parser))
    def read(content: bytes) -> None:
        nonlocal slowest
        now = time.perf_counter()
        try:
            seen[fuzzing.outcome(parser, content, folder)] += 1
        except (Exception, fuzzing.Hang) as error:  # noqa: BLE001  (what is looked for)
            seen["faults"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            faults.setdefault(at, (content, str(error)[:300]))
        slowest = max(slowest, time.perf_counter() - now)

    read()
    return {"seen": seen, "faults": faults, "slowest": slowest, "seconds": time.perf_counter() - begun}


def apart(parser: fuzzing.Parser, cases: int, start: int) -> dict[str, Any]:
    """`measured` in a process of its own, with how much memory it took."""
    ends = os.pipe()
    pid = os.fork()
    if not pid:
        with tempfile.TemporaryDirectory() as folder, os.fdopen(ends[1], "wb") as out:
            for sample in parser.samples:  # what is imported and built once is no case's memory
                fuzzing.outcome(parser, sample, Path(folder))
            before = resident()
            limit(ROOM)
            found = measured(parser, cases, start, Path(folder))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pickle.dump(found | {"memory": max(0, peak - before)}, out)
        os._exit(0)
    os.close(ends[1])
    with os.fdopen(ends[0], "rb") as told:
        content = told.read()
    _, status = os.waitpid(pid, 0)
    empty = {"seen": Counter(faults=1), "slowest": 0.0, "seconds": 0.0, "memory": 0}
    return pickle.loads(content) if content else empty | {"faults": {f"the process ended with {status}": (b"", "")}}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--only", action="append", help="a part of a parser's name")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    row = "{:42} {:>7} {:>9} {:>9} {:>7} {:>9} {:>9} {:>7}"
    print(row.format("parser", "cases", "accepted", "refused", "faults", "seconds", "slowest", "memory"), flush=True)
    bad = 0
    for name, parser in fuzzing.parsers().items():
        if asked.only and not any(part in name for part in asked.only):
            continue
        found = apart(parser, asked.cases, asked.seed)
        seen = found["seen"]
        counts = (seen.total(), seen["accepted"], seen["refused"], seen["faults"])
        took = (f"{found['seconds']:.1f}", f"{1000 * found['slowest']:.0f} ms", f"{found['memory'] / 1e6:.0f} MB")
        print(row.format(name, *counts, *took), flush=True)
        for at, (content, said) in found["faults"].items():
            print(f"    {at}: {said}\n    {content[:2000]!r}", flush=True)
        bad += seen["faults"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

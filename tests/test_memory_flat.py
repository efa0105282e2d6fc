"""Memory stays flat: hundreds of traces leave neither memory nor objects, files, threads or hooks behind.

Each job runs in a fresh process, where nothing that another test freed can hide growth. The full measure, 10,000 of
each, is ``python tests/benchmarks/bench_memory.py``.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "benchmarks" / "bench_memory.py"
MOST_MB, MOST_OBJECTS, MOST_IN_USE = 3.0, 50, 0.5

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc: Linux alone")


def left_behind(job: str) -> tuple[float, int, float, tuple[int, int, int]]:
    """(MB resident, objects, MB in use, (files, threads, hooks)) that 500 runs of a job leave behind after 200 of
    warm-up."""
    told = ["--job", job, "--count", "700", "--since", "200"]
    run = subprocess.run([sys.executable, str(BENCH), *told], capture_output=True, text=True, check=True)
    number = r"([-+.0-9]+)"
    pattern = f"grew {number} MB from 200 to 700; {number} objects and {number} MB in use left; {number} files, "
    found = re.search(f"{pattern}{number} threads, {number} hooks", run.stdout)
    assert found is not None, run.stdout
    return float(found[1]), int(found[2]), float(found[3]), (int(found[4]), int(found[5]), int(found[6]))


@pytest.mark.parametrize("job", ["record other prompts", "sweep of one row", "intervene", "locate", "sources"])
def test_memory_stays_flat(job):
    grown, objects, used, others = left_behind(job)
    assert grown <= MOST_MB
    assert objects <= MOST_OBJECTS
    assert used <= MOST_IN_USE
    assert others == (0, 0, 0)


def test_memory_stays_flat_while_many_are_recorded_together():
    grown, _, used, others = left_behind("record_each of other prompts")  # what waits, and is bound, are objects still
    assert grown <= MOST_MB
    assert used <= 2 * MOST_IN_USE
    assert others == (0, 0, 0)


def test_a_leak_is_seen():
    grown, objects, used, others = left_behind("a leak of 16 KB")
    assert grown > MOST_MB
    assert objects > MOST_OBJECTS
    assert used > 2 * MOST_IN_USE
    assert others == (0, 0, 0)


def test_a_leak_of_files_threads_and_hooks_is_seen():
    assert min(left_behind("a leak of files, threads and hooks")[3]) >= 1

"""Memory stays flat: hundreds of traces leave neither memory nor objects behind.

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


def left_behind(job: str) -> tuple[float, int, float]:
    """(MB resident, objects, MB in use) that 500 runs of a job leave behind after 200 of warm-up."""
    told = ["--job", job, "--count", "700", "--since", "200"]
    run = subprocess.run([sys.executable, str(BENCH), *told], capture_output=True, text=True, check=True)
    pattern = r"grew ([-+.0-9]+) MB from 200 to 700; ([-+0-9]+) objects and ([-+.0-9]+) MB in use left"
    found = re.search(pattern, run.stdout)
    assert found is not None, run.stdout
    return float(found[1]), int(found[2]), float(found[3])


@pytest.mark.parametrize("job", ["record other prompts", "sweep of one row", "intervene"])
def test_memory_stays_flat(job):
    grown, objects, used = left_behind(job)
    assert grown <= MOST_MB
    assert objects <= MOST_OBJECTS
    assert used <= MOST_IN_USE


def test_memory_stays_flat_while_many_are_recorded_together():
    grown, _, used = left_behind("record_each of other prompts")  # what waits, and is bound, are objects still
    assert grown <= MOST_MB
    assert used <= 2 * MOST_IN_USE


def test_a_leak_is_seen():
    grown, objects, used = left_behind("a leak of 16 KB")
    assert grown > MOST_MB
    assert objects > MOST_OBJECTS
    assert used > 2 * MOST_IN_USE

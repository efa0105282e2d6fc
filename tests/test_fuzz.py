"""Every reader of a file or text, on damaged content: a value that comes back, or one clear line; never anything else.

`tests/benchmarks/bench_fuzz.py` does the same with 10,000 cases a parser, and more.
"""

import time

import pytest
from fuzzing import Hang, Parser, contents, in_time, outcome, parsers
from hypothesis import HealthCheck, Phase, given, settings

CASES = 300
NAMES = tuple(parsers())


def cases_of(parser: Parser) -> int:
    return max(5, int(CASES * parser.share))


@pytest.mark.parametrize("name", NAMES)
def test_any_content_is_read_or_refused(name, tmp_path):
    parser, seen = parsers()[name], []

    @settings(max_examples=cases_of(parser), deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(contents(parser))
    def read(content):
        seen.append(outcome(parser, content, tmp_path))

    read()
    assert len(seen) >= cases_of(parser)
    assert "refused" in seen or name.startswith("cached "), "nothing was refused: the damage is none"


@pytest.mark.parametrize("name", NAMES)
def test_valid_content_is_accepted(name, tmp_path):
    parser = parsers()[name]
    for sample in parser.samples:
        assert outcome(parser, sample, tmp_path) == "accepted"


def test_what_takes_too_long_is_seen():
    with pytest.raises(Hang), in_time(0.05):
        time.sleep(5)

"""Built-in facts of the six knowledge types, as plain text.

They are prompts that end right before a one-word answer, each with a few wrong answers of the
same kind. No model and no tokenizer is involved here: whether a model knows a fact, and whether
an answer is one token for it, is decided where the facts are turned into prompts.
"""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

from resid_surgery._check import choice
from resid_surgery.errors import PromptError

FACT_TYPES: tuple[str, ...] = ("language", "capital", "country", "colour", "number", "month")
"""The six knowledge types that facts are sorted by.

Source: Yu & Ananiadou, arXiv 2312.12141, section on the six knowledge types.
"""


@dataclass(frozen=True)
class Fact:
    """One fact: a prompt, its true answer and wrong answers of the same knowledge type.

    Args:
        kind: the knowledge type, one of `FACT_TYPES`.
        prompt: English text that ends right before the answer, without a trailing space.
        answer: the true continuation with its leading space, such as ``" Paris"``.
        competitors: two to four wrong answers, each the answer of another fact of the type.

    Example:
        >>> fact = Fact("capital", "The capital of Italy is", " Rome", (" Milan", " Athens"))
        >>> fact.prompt + fact.answer
        'The capital of Italy is Rome'

    Source: Yu & Ananiadou, arXiv 2312.12141, section on the six knowledge types; the prompts
    were written for this library and are not the paper's.
    """

    kind: str
    prompt: str
    answer: str
    competitors: tuple[str, ...]


def load_facts(kind: str) -> tuple[Fact, ...]:
    """The built-in facts of one knowledge type (read from disk once per process).

    Args:
        kind: the knowledge type, one of `FACT_TYPES`.

    Returns:
        At least eighty facts with distinct prompts, always in the same order.

    Raises:
        PromptError: `kind` is not one of `FACT_TYPES`.

    Example:
        >>> fact = load_facts("month")[0]
        >>> fact.prompt, fact.answer
        ("New Year's Day is celebrated in the month of", ' January')
        >>> load_facts("colur")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        resid_surgery.errors.PromptError: `kind` must be one of ...; got 'colur'. Did you mean 'colour'?

    Source: Yu & Ananiadou, arXiv 2312.12141, section on the six knowledge types; the prompts
    were written for this library and are not the paper's.
    """
    return _read()[choice("kind", kind, FACT_TYPES, error=PromptError)]


@functools.cache
def _read() -> dict[str, tuple[Fact, ...]]:
    text = files("resid_surgery.models").joinpath("facts.json").read_text(encoding="utf-8")
    return {
        kind: tuple(Fact(kind, row["prompt"], row["answer"], tuple(row["competitors"])) for row in rows)
        for kind, rows in json.loads(text).items()
    }

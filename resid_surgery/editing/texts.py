"""Texts: general probes that no edit is about: running text, unrelated prompts, prompts to continue, plain choices.

All of it was written for this library; nothing is quoted.
"""

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TypeVar

from resid_surgery._check import whole
from resid_surgery.editing.probes import Probe, ProbeSet
from resid_surgery.models.facts import FACT_TYPES, load_facts

T = TypeVar("T")


def general_probes(
    *, texts: int | None = None, unrelated: int | None = None, generation: int | None = None, choices: int | None = None
) -> ProbeSet:
    """General probes, which every edit should leave as they are.

    Args:
        texts: how many documents of `corpus()`, for likelihood (axis "text").
        unrelated: how many unrelated prompts, for KL (axis "locality", stratum "unrelated").
        generation: how many prompts to continue freely.
        choices: how many built-in facts against their competitors (axis "choice"), the six kinds in turn.
            None takes all of each, a number that many at even distances, 0 none.

    Returns:
        The probes, always in the same order.

    Raises:
        ArgumentError: a number is no whole number >= 0.
    """
    body = _read()
    made = [Probe("text", text) for text in _spread("texts", body["texts"], texts)]
    made += [
        Probe("locality", text, stratum="unrelated") for text in _spread("unrelated", body["unrelated"], unrelated)
    ]
    made += [Probe("generation", text) for text in _spread("generation", body["generation"], generation)]
    return ProbeSet((*made, *_choices(choices)), "general")


def corpus() -> list[str]:
    """The documents: about 40 short texts in plain English, of many kinds (narrative, dialogue, news, steps, ...)."""
    return list(_read()["texts"])


@functools.cache
def _read() -> dict[str, list[str]]:
    text = files("resid_surgery.editing").joinpath("texts.json").read_text(encoding="utf-8")
    body: dict[str, list[str]] = json.loads(text)
    return body


def _choices(wanted: int | None) -> list[Probe]:
    """A fact of each kind in turn; within a kind at even distances."""
    kinds = [load_facts(kind) for kind in FACT_TYPES]
    turns = [k for i in range(max(map(len, kinds))) for k, facts in enumerate(kinds) if i < len(facts)]
    taken = turns if wanted is None else turns[: whole("choices", wanted, 0)]
    chosen = [iter(_spread("choices", facts, taken.count(k))) for k, facts in enumerate(kinds)]
    facts = [next(chosen[k]) for k in taken]
    return [Probe("choice", one.prompt, target=one.answer, wrong=one.competitors) for one in facts]


def _spread(name: str, items: Sequence[T], wanted: int | None) -> list[T]:
    """So many items at even distances, from the first on."""
    if wanted is None:
        return list(items)
    count = min(whole(name, wanted, 0), len(items))
    return [items[i * len(items) // count] for i in range(count)]

"""Decoding: what a model says when nobody forces its answer, and how repetitive it is.

Scored under teacher forcing, a wrong first token is forgiven; decoded freely it is not. An answer counts as said when
the continuation begins with it and the word ends there: "Rome" is not said by "Romeo".
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import pandas as pd
import torch

from resid_surgery.editing.running import Subject

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
BEYOND = 3
"""Tokens that are decoded beyond an answer, to see that its word ends."""


def continuations(subject: Subject, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
    """Greedy continuations, in order; prompts of one length share a batch.

    Args:
        subject: the model. prompts: token ids. tokens: how many, one number a prompt.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(prompts):
        groups.setdefault((len(one), tokens[i]), []).append(i)
    found: dict[int, list[int]] = {}
    for (_, many), members in groups.items():
        rows = subject.continued(torch.tensor([list(prompts[i]) for i in members]), many)
        found |= dict(zip(members, rows, strict=True))
    return [found[i] for i in range(len(prompts))]


def says(text: str, answer: str) -> bool:
    """Whether a continuation begins with an answer as whole words (leading spaces do not count).

    Example:
        >>> says(" Rome, in Italy", " Rome"), says(" Romeo", " Rome"), says(" rome", " Rome")
        (True, False, False)
    """
    text, answer = text.lstrip(), answer.strip()
    after = text[len(answer) : len(answer) + 1]
    joined = after.isalnum() and answer[-1:].isalnum() and not _unspaced(after)
    return bool(answer) and text.startswith(answer) and not joined


def _unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces between words."""
    return unicodedata.name(character, "").startswith(UNSPACED)


def fluency(ids: Sequence[int], wanted: int) -> dict[str, float]:
    """How repetitive a continuation is.

    repetition: share of its 4-grams that stood before (0..1). distinct_1..3: different n-grams over all n-grams.
    entropy: mean entropy of its bigrams and trigrams, bits (Zhang et al. 2018). length: tokens, of `wanted` ones.

    Args:
        ids: of the continuation, to the end token. wanted: how many tokens were asked for.
    """
    four = _grams(ids, 4)
    return {
        "repetition": 1 - len(set(four)) / len(four) if four else 0.0,
        **{f"distinct_{n}": len(set(_grams(ids, n))) / max(1, len(_grams(ids, n))) for n in (1, 2, 3)},
        "entropy": (_entropy(_grams(ids, 2)) + _entropy(_grams(ids, 3))) / 2,
        "length": float(len(ids)),
        "ended": float(len(ids) < wanted),
    }


def fluency_table(rows: Sequence[tuple[str, Sequence[int], Sequence[int]]], wanted: int) -> pd.DataFrame:
    """One row a prompt: each figure of `fluency` before and after, as ``*_before`` and ``*_after``."""
    out = []
    for prompt, before, after in rows:
        row: dict[str, object] = {"prompt": prompt}
        for name, ids in (("before", before), ("after", after)):
            row |= {f"{figure}_{name}": value for figure, value in fluency(ids, wanted).items()}
        out.append(row)
    return pd.DataFrame(out)


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def _entropy(grams: Sequence[tuple[int, ...]]) -> float:
    counts = Counter(grams)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0

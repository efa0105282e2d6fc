"""Answering: how likely each model finds given answers, and what it says by itself.

A joint log-probability is the sum over all tokens of an answer, in nats; a match means that every token of it is the
most likely one where it stands, which is the same as greedy decoding of just as many tokens giving the answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

from resid_surgery.editing.decoding import BEYOND, continuations, says
from resid_surgery.editing.probes import Probe
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.rewrites import answer_ids, prompt_ids
from resid_surgery.editing.running import Figures, Passage, Subject, figures
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import token_text

Step = Callable[..., None]


@final
@dataclass(frozen=True)
class Answer:
    """One answer to one prompt, by one model.

    Attributes:
        log_prob: joint, nats. match: whether greedy decoding gives just these tokens. first: the most likely token
            there.
    """

    log_prob: float
    match: bool
    first: int


Asked = tuple[str, str]  # prompt, answer


@final
class Answers:
    """Base and edited model, asked for answers; each question is run once."""

    def __init__(self, base: Remembered, edited: Subject) -> None:
        self.base, self.edited = base, edited
        self.model: OpenedModel = base.subject.model
        self.before: dict[Asked, Answer] = {}
        self.after: dict[Asked, Answer] = {}
        self.tokens = 0

    def ask(self, questions: Iterable[Asked], step: Step | None = None) -> None:
        """Have both models' answers ready."""
        self.ask_base(questions, step)
        missing = [one for one in dict.fromkeys(questions) if one not in self.after]
        self.after |= self._run(missing, lambda rows: figures(self.edited, rows, step))

    def ask_base(self, questions: Iterable[Asked], step: Step | None = None) -> None:
        """Have the base's answers ready."""
        missing = [one for one in dict.fromkeys(questions) if one not in self.before]
        self.before |= self._run(missing, lambda rows: self.base.figures(rows, step))

    def _run(self, questions: list[Asked], run: Callable[[list[Passage]], list[Figures]]) -> dict[Asked, Answer]:
        rows = [answer_sequence(self.model, *one) for one in questions]
        self.tokens += sum(len(one.ids) for one in rows)
        return {one: _answer(row, found) for one, row, found in zip(questions, rows, run(rows), strict=True)}


def answer_sequence(model: OpenedModel, prompt: str, answer: str) -> Passage:
    """A prompt with an answer behind it, wanted where the answer's tokens are predicted."""
    before, behind = prompt_ids(prompt, model), answer_ids(prompt, answer, model)
    n = len(before)
    return Passage(tuple(before + behind), tuple(range(n - 1, n + len(behind) - 1)))


def answer_questions(probes: Iterable[Probe]) -> list[Asked]:
    """What must be asked for `answer_table`."""
    return [(p.text, a) for p in probes for a in (p.target, p.old) if a is not None]


def answer_table(answers: Answers, probes: Sequence[Probe], *, decoded: bool = True) -> pd.DataFrame:
    """Efficacy or paraphrases: one row a prompt.

    Args:
        answers: which has been asked. probes: with a new target, an old answer or both. decoded: also decode freely.

    Returns:
        Columns: axis, fact, prompt, new, old, new_log_prob_before, new_log_prob_after, new_change, old_log_prob_before,
        old_log_prob_after, old_change (nats), above_before, above_after (new more likely than old; without an old
        answer, the same as match), match_before, match_after (the whole target, greedily), free (it is what the edited
        model says), said_before, said_after, first_before, first_after (most likely token).
    """
    rows: list[dict[str, Any]] = []
    for p in probes:
        row: dict[str, Any] = {"axis": p.axis, "fact": p.fact, "prompt": p.text, "new": p.target, "old": p.old}
        for name, answer in (("new", p.target), ("old", p.old)):
            row |= _change(name, answers, p.text, answer)
        seen = (p.text, p.target if p.target is not None else p.old)
        for when, held in (("before", answers.before), ("after", answers.after)):
            row[f"above_{when}"] = _above(held, p)
            row[f"match_{when}"] = None if p.target is None else held[p.text, p.target].match
            row[f"first_{when}"] = token_text(held[seen].first, answers.model.tokenizer)  # type: ignore[index]
        rows.append(row)
    table = pd.DataFrame(rows)
    if decoded and len(table):
        table["said_before"], table["said_after"] = _said(answers, probes)
        table["free"] = [None if p.target is None else says(text, p.target)
                         for p, text in zip(probes, table["said_after"], strict=True)]  # fmt: skip
    return table


def ripple_questions(probes: Iterable[Probe]) -> tuple[list[Asked], list[Asked]]:
    """(conditions, tests) that must be asked for `ripple_table`."""
    probes = list(probes)
    conditions = [pair for p in probes for pair in p.conditions]
    return conditions, [(p.text, a) for p in probes for a in (str(p.target), *p.others)]


def ripple_table(answers: Answers, probes: Sequence[Probe]) -> pd.DataFrame:
    """Ripple probes: one row each.

    Returns:
        Columns: fact, criterion, prompt, target, conditions (how many), executed (all of them hold in the base),
        before, after (whether the target, or another right answer, is what greedy decoding gives), change (nats, of the
        target).
    """
    rows = []
    for p in probes:
        right = (str(p.target), *p.others)
        rows.append({
            "fact": p.fact, "criterion": p.criterion, "prompt": p.text, "target": p.target,
            "conditions": len(p.conditions), "executed": all(answers.before[pair].match for pair in p.conditions),
            "before": any(answers.before[p.text, a].match for a in right),
            "after": any(answers.after[p.text, a].match for a in right),
            "change": answers.after[p.text, right[0]].log_prob - answers.before[p.text, right[0]].log_prob,
        })  # fmt: skip
    return pd.DataFrame(rows)


def choice_questions(probes: Iterable[Probe]) -> list[Asked]:
    """What must be asked for `choice_table`."""
    return [(p.text, a) for p in probes for a in (str(p.target), *p.wrong)]


def choice_table(answers: Answers, probes: Sequence[Probe]) -> pd.DataFrame:
    """Capability: one row a question. margin = log p(right) - max log p(wrong), nats.

    Returns:
        Columns: prompt, right, margin_before, margin_after, change, right_before, right_after (margin above 0).
    """
    rows = []
    for p in probes:
        row: dict[str, Any] = {"prompt": p.text, "right": p.target}
        for when, held in (("before", answers.before), ("after", answers.after)):
            wrong = max(held[p.text, a].log_prob for a in p.wrong)
            row[f"margin_{when}"] = held[p.text, str(p.target)].log_prob - wrong
            row[f"right_{when}"] = row[f"margin_{when}"] > 0
        row["change"] = row["margin_after"] - row["margin_before"]
        rows.append(row)
    return pd.DataFrame(rows)


def _answer(row: Passage, found: Figures) -> Answer:
    follow = [row.ids[at + 1] for at in row.at]
    return Answer(found.log_prob, found.top[:, 0].tolist() == follow, int(found.top[0, 0]))


def _change(name: str, answers: Answers, prompt: str, answer: str | None) -> dict[str, float | None]:
    if answer is None:
        return {f"{name}_log_prob_before": None, f"{name}_log_prob_after": None, f"{name}_change": None}
    before, after = answers.before[prompt, answer].log_prob, answers.after[prompt, answer].log_prob
    return {f"{name}_log_prob_before": before, f"{name}_log_prob_after": after, f"{name}_change": after - before}


def _above(held: dict[Asked, Answer], p: Probe) -> bool | None:
    if p.target is None:
        return None
    if p.old is None:  # nothing to stand above: the whole target, greedily
        return held[p.text, p.target].match
    return held[p.text, p.target].log_prob > held[p.text, p.old].log_prob


def _said(answers: Answers, probes: Sequence[Probe]) -> tuple[list[str], list[str]]:
    """What each model says freely after each prompt: as many tokens as the longer answer has, and a few more."""
    model = answers.model
    prompts = [prompt_ids(p.text, model) for p in probes]
    many = [max(len(answer_ids(p.text, a, model)) for a in (p.target, p.old) if a is not None) + BEYOND for p in probes]
    longest = max(many)
    before = answers.base.continued(prompts, longest)
    after = continuations(answers.edited, prompts, [longest] * len(prompts))
    answers.tokens += 2 * longest * len(prompts)
    said = [[str(model.tokenizer.decode(row)) for row in rows] for rows in (before, after)]
    return said[0], said[1]

"""Hops: readers of RippleEdits and MQuAKE, whose questions are about what follows from a rewrite."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from resid_surgery.editing.formats import CRITERIA, Found, asked_of, follows_of, kept_of, rewrite_of
from resid_surgery.editing.records import Fields, answer, prompt_of
from resid_surgery.editing.rewrites import Rewrite

Hop = tuple[str, str, list[str]]
"""Cloze, question and answers of one hop after the edit."""
_SPECIFICITY = ("Relation_Specificity", "Relation_Specifity")
"""As the loader of RippleEdits spells it, and as its README does."""


def rippleedits(records: Iterator[Fields]) -> Found:
    """Records of RippleEdits: every test as ripple probes with its conditions, under both spellings."""
    for record in records:
        edit = record.part("edit")
        prompt, subject, new, old = _stated(edit, record.data)
        rewrite = rewrite_of(edit, prompt, subject, new, old)
        if rewrite is None:
            continue
        yield rewrite
        yield from asked_of(rewrite, "efficacy", [rewrite.text])
        for criterion in CRITERIA:
            spellings = _SPECIFICITY if criterion in _SPECIFICITY else (criterion,)
            for test in chain.from_iterable(record.parts(one, needed=False) for one in spellings):
                yield from _ripple_test(rewrite, criterion, test)


def _ripple_test(rewrite: Rewrite, criterion: str, test: Fields) -> Found:
    """Each query of a test as a ripple probe; of relation specificity as a locality probe as well."""
    asked = [(one.text("prompt"), _values(one)) for one in test.parts("condition_queries", needed=False)]
    conditions = tuple((prompt_of(p), answer(prompt_of(p), given[0])) for p, given in asked if given)
    queries = [(one.text("prompt"), _values(one)) for one in test.parts("test_queries")]
    joined = test.maybe("test_condition")
    if len(queries) > 1:
        test.tally.note(f"test_condition {joined} over several queries (each is a probe of its own)")
    for prompt, given in queries:
        if not given:
            test.tally.note(f"{criterion} query without an answer")
            continue
        yield follows_of(rewrite, criterion, prompt, given, conditions=conditions)
        if criterion in _SPECIFICITY:
            yield kept_of(rewrite, "same subject", prompt, given)


def _values(query: Fields) -> list[str]:
    """The first answer, then every other one and all aliases."""
    said = query.parts("answers")
    values = [one.text("value") for one in said]
    return list(dict.fromkeys([*values, *(alias for one in said for alias in one.texts("aliases"))]))


def _stated(edit: Fields, record: dict[str, Any]) -> tuple[str, str | None, str, str | None]:
    """(prompt, subject, new answer, old answer) of an edit that is stated as a sentence."""
    sentence = edit.text("prompt").strip().removesuffix(".")
    before = edit.part("previous_fact") if edit.data.get("previous_fact") else edit.part("original_fact", needed=False)
    was = (before.maybe("prompt") or "").strip().removesuffix(".") if before else ""
    cut = len(_common([sentence, was])) if was else len(sentence)
    at = sentence.rfind(" is ", 0, cut + (0 if was else 1))
    if at < 0:
        edit.missing("prompt", "a sentence 'The ... of SUBJECT is ANSWER.'")
    prompt, new, old = sentence[: at + 3], sentence[at + 4 :], was[at + 4 :] or None
    return prompt, edit.maybe("subject_label") or _subject(prompt, edit.maybe("subject_id"), record), new, old


def _subject(prompt: str, subject: str | None, record: dict[str, Any]) -> str | None:
    """The words with which prompts for its other relations end before their verb, else those after the last "of"."""
    body = prompt.removesuffix(" is")
    tests = [test for key in _SPECIFICITY for test in _objects(record.get(key))]
    queries = [query for test in tests for query in _objects(test.get("test_queries"))]
    same = [str(q.get("prompt", "")) for q in queries if subject and q.get("subject_id") == subject]
    endings = [body[::-1], *(one.removesuffix(" is")[::-1] for one in same if one.endswith(" is") and one != prompt)]
    shared = _common(endings)[::-1] if len(endings) > 1 else ""
    _, _, rest = shared.partition(" of ")
    return rest.strip() or body.rpartition(" of ")[2].strip() or None


def mquake(records: Iterator[Fields]) -> Found:
    """Records of MQuAKE; items whose hops contradict a rewrite of their own or of another item are noted.

    A question belongs to the first rewrite of its item.
    """
    items = [(record, list(record.parts("requested_rewrite")), _hops(record)) for record in records]
    asked = [[_asked_rewrite(one) for one in parts] for _, parts, _ in items]
    told: dict[str, set[str]] = {}
    for pairs in asked:
        for rewrite, question in pairs:
            if rewrite is not None:
                for key in (rewrite.text, question):
                    told.setdefault(key, set()).add(rewrite.wanted.strip())
    for (record, _, hops), pairs in zip(items, asked, strict=True):
        yield from _mquake_item(record, pairs, hops, told)


def _asked_rewrite(part: Fields) -> tuple[Rewrite | None, str]:
    new, old = part.part("target_new").text("str"), part.part("target_true").text("str")
    return rewrite_of(part, part.text("prompt"), part.text("subject"), new, old), part.maybe("question") or ""


def _hops(record: Fields) -> list[Hop]:
    hops = record.parts("new_single_hops")
    return [(one.text("cloze"), one.text("question"), [one.text("answer"), *one.texts("answer_alias")]) for one in hops]


def _mquake_item(record: Fields, pairs: list[Any], hops: list[Hop], told: dict[str, set[str]]) -> Found:
    given = [(rewrite, question) for rewrite, question in pairs if rewrite]
    for rewrite, question in given:
        yield rewrite
        yield from asked_of(rewrite, "efficacy", [rewrite.text])
        yield from asked_of(rewrite, "paraphrase", [question] if question else [])
    questions, right = record.texts("questions"), record.text("new_answer")
    others, old = record.texts("new_answer_alias"), record.text("answer")
    own = {key for rewrite, question in given for key in (rewrite.text, question)}
    if not given or not all(
        rewrite.wanted.strip() in _said(hops, rewrite.text, question) for rewrite, question in given
    ):
        record.tally.note("item whose hops contradict its own rewrites (no question made)")
        return
    elsewhere = [bool(told.get(k, set()) - set(said)) for cloze, asked, said in hops for k in (cloze, asked)]
    if any(elsewhere):
        record.tally.note("item whose hops contradict another item's rewrite (criterion says so)")
    criterion = f"{len(hops)} hops" + (", contradicted by another item" if any(elsewhere) else "")
    kept = [(prompt_of(c), answer(prompt_of(c), said[0])) for c, q, said in hops if c not in own and q not in own]
    for question in questions:
        more: dict[str, Any] = {"conditions": tuple(kept)}
        if old != right:
            more["old"] = answer(prompt_of(question), old)
        yield follows_of(given[0][0], criterion, question, [right, *others], **more)


def _said(hops: list[Hop], *keys: str) -> set[str]:
    """Answers of the hops that ask one of some questions."""
    return {one for cloze, question, said in hops if cloze in keys or question in keys for one in said}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    return next((low[:i] for i, letter in enumerate(low) if letter != high[i : i + 1]), low)

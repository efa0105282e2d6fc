"""Relations: probes around the built-in facts, made from tables of true facts.

A table has one row a subject and one column a property; a relation is a column with the prompts that ask for it. From
that follow the rephrasings of a rewrite (other prompts of its relation), its neighbours (other rows), its subject's
other properties (other columns) and its one-hop consequences (a property of the new answer).
"""

import difflib
import functools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, final

import pandas as pd

from resid_surgery._check import choice, iterable, message
from resid_surgery._check import seed as as_seed
from resid_surgery.editing.probes import Probe, ProbeSet
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.editing.texts import general_probes
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.facts import FACT_TYPES, Fact, load_facts

NEAR = 24
"""Neighbours of each rewrite, where the tables have them."""
PREPENDED = 12
"""Prompts of each rewrite that its sentence is put before."""
_SUBJECT = re.compile(
    r"^(?:(?:the|a|an) )?(?:[\w ]*(?:city|island|region|state|province|ruins|temple|statue|peak|lake) (?:of|called) )?",
    re.IGNORECASE,
)


@final
@dataclass(frozen=True)
class Relation:
    """A property of a table's subjects and the prompts that ask for it.

    Args:
        name: "table.column". kind: the knowledge type, "" for a property that only serves as another one of a subject.
        templates: rephrasings; ``{}`` is the subject, ``{column}`` another property of it.
        patterns: further prompts of built-in facts. ripple: what follows, see ``relations.json``.
    """

    name: str
    kind: str
    templates: tuple[str, ...]
    patterns: tuple[str, ...]
    ripple: tuple[dict[str, Any], ...]

    @property
    def table(self) -> str:
        return self.name.partition(".")[0]

    @property
    def column(self) -> str:
        return self.name.partition(".")[2]


@final
@dataclass(frozen=True)
class Known:
    """What is known of a prompt: its relation, its subject's row, and the template that it is made of ("" for none)."""

    relation: Relation
    row: dict[str, Any]
    template: str


def probes(rewrites: Any = None, *, kinds: Sequence[str] | None = None, seed: int = 0) -> ProbeSet:
    """Probes around rewrites of built-in facts.

    Args:
        rewrites: a Rewrite or several; None rewrites every built-in fact of `kinds` to its first competitor.
        kinds: knowledge types of `rewrites=None`, of models.facts.FACT_TYPES; None is all six.
        seed: chooses among the neighbours.

    Returns:
        For each rewrite, with its label as `fact`: efficacy, paraphrase, locality ("same relation", "same subject",
        "edit prepended") and ripple probes. Neighbours' prompts never hold a rewritten subject, and none whose true
        answer is the new one is used. `old` of a locality probe is the new answer: what must not be said there.
        `.ignored` says what could not be made.

    Raises:
        PromptError: something in `rewrites` is no Rewrite, or an unknown kind.

    Source: Meng et al. 2022 (neighbourhood prompts); Hoelscher-Obermaier et al. 2023 (edit prepended); Cohen et al.
    2023 (criteria of ripple effects and their conditions).
    """
    seed = as_seed(seed)
    given = _rewrites(rewrites, kinds)
    made: dict[Probe, None] = {}
    missing: list[str] = []
    told = [known.row for one in given if (known := _find(one.text)) is not None]
    for one in given:
        found = list(_around(one, random.Random(f"{seed} {one.label} {one.new}"), told))
        made |= dict.fromkeys(found)
        missing += _missing(one, found)
    return ProbeSet(tuple(made), "relations", given, tuple(missing))


def rewrite(prompt: str, new: str | None = None) -> Rewrite:
    """A rewrite of a built-in fact, or of any prompt of a known relation, with subject and old answer filled in.

    Args:
        prompt: as in `known_facts()`, or a template of its relation. new: the new answer, with its leading space;
            None for an edit that is only to erase the old one.

    Raises:
        PromptError: the prompt is not known (the nearest are listed), or `new` is the old answer.

    Example:
        >>> rewrite("The capital of France is", " Rome")
        Rewrite(prompt='The capital of {} is', subject='France', new=' Rome', old=' Paris', name='')
    """
    if not isinstance(prompt, str):
        raise PromptError(message("prompt", "a text", prompt))
    if new is not None and (not isinstance(new, str) or not new.startswith(" ") or not new.strip()):
        raise PromptError(message("new", "an answer with its leading space", new))
    found = _find(prompt)
    if found is None:
        close = ", ".join(map(repr, difflib.get_close_matches(prompt, list(_index()), n=3)))
        do = f"Near: {close}." if close else "rs.known_facts() lists them; else make an rs.Rewrite yourself."
        raise PromptError(message("prompt", "one whose subject is known", prompt, do=do))
    return _filled(prompt, found, new)


def known_facts(kind: str | None = None) -> pd.DataFrame:
    """The built-in facts with what is known of them.

    Returns:
        One row a fact: kind, prompt, answer, relation and subject ("" where only efficacy and edit-prepended probes can
        be made), paraphrases, neighbours, properties (others of the subject).

    Raises:
        PromptError: an unknown kind.
    """
    kinds = FACT_TYPES if kind is None else (choice("kind", kind, FACT_TYPES, error=PromptError),)
    return pd.DataFrame([_known_row(fact) for one in kinds for fact in load_facts(one)])


def _known_row(fact: Fact) -> dict[str, Any]:
    found = _find(fact.prompt)
    base = {"kind": fact.kind, "prompt": fact.prompt, "answer": fact.answer}
    if found is None:
        return base | {"relation": "", "subject": "", "paraphrases": 0, "neighbours": 0, "properties": 0}
    table = _data()[0][found.relation.table]
    return base | {
        "relation": found.relation.name,
        "subject": _subject(fact.prompt, found.row),
        "paraphrases": len(found.relation.templates) - (found.template in found.relation.templates),
        "neighbours": sum(row[found.relation.column] is not None for row in table) - 1,
        "properties": len(list(_others(found))),
    }


@functools.cache
def _data() -> tuple[dict[str, list[dict[str, Any]]], dict[str, Relation], list[list[str]]]:
    text = files("resid_surgery.editing").joinpath("relations.json").read_text(encoding="utf-8")
    body = json.loads(text)
    tables = {
        name: [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for name, table in body["tables"].items()
    }
    relations = {
        name: Relation(name, one["kind"], tuple(one["templates"]), tuple(one["patterns"]), tuple(one["ripple"]))
        for name, one in body["relations"].items()
    }
    return tables, relations, body["facts"]


@functools.cache
def _index() -> dict[str, Known]:
    """Every prompt that the tables make of relations of a knowledge type -> what is known of it."""
    tables, relations, facts = _data()
    index: dict[str, Known] = {}
    for relation in (one for one in relations.values() if one.kind):
        for row in (one for one in tables[relation.table] if one[relation.column] is not None):
            for template in (*relation.templates, *relation.patterns):
                if (text := fill(template, row)) is not None:
                    index.setdefault(text, Known(relation, row, template))
    for prompt, name, subject in facts:
        row = next(one for one in tables[relations[name].table] if one["name"] == subject)
        index[prompt] = Known(relations[name], row, "")
    return index


def _find(prompt: str) -> Known | None:
    return _index().get(prompt)


def fill(template: str, row: dict[str, Any]) -> str | None:
    """A template with a subject's name and properties; None where it lacks one."""
    names = re.findall(r"{(\w+)}", template)
    if any(not row.get(name) for name in names):
        return None
    text = template.replace("{}", row["name"])
    for name in names:
        text = text.replace("{" + name + "}", row[name])
    return text[0].upper() + text[1:]


def _subject(prompt: str, row: dict[str, Any]) -> str:
    """The subject as it stands in a prompt, without article."""
    bare = row.get("subject") or _SUBJECT.sub("", row["name"])
    at = prompt.casefold().rfind(bare.casefold())
    return prompt[at : at + len(bare)] if at >= 0 else ""


def _filled(prompt: str, found: Known, new: str | None) -> Rewrite:
    subject = _subject(prompt, found.row)
    at = prompt.rfind(subject)
    return Rewrite(prompt[:at] + "{}" + prompt[at + len(subject) :], subject, new, _answers(found)[0])


def _answers(found: Known) -> tuple[str, ...]:
    """The true answers, the first of which is the one that is asked for."""
    return _said(found.row, found.relation.column)


def _said(row: dict[str, Any], column: str) -> tuple[str, ...]:
    value = row[column]
    return tuple(f" {one}" for one in (value if isinstance(value, list) else [value] if value else ()))


def _rewrites(given: Any, kinds: Sequence[str] | None) -> tuple[Rewrite, ...]:
    if given is not None:
        if kinds is not None:
            raise ArgumentError("`kinds` chooses among the built-in facts, and so goes with rewrites=None only.")
        many = (given,) if isinstance(given, Rewrite) else tuple(given) if iterable(given) else (None,)
        if not many or not all(isinstance(one, Rewrite) for one in many):
            raise PromptError(message("rewrites", "a Rewrite or a sequence of them", given))
        return many
    wanted = FACT_TYPES if kinds is None else tuple(kinds) if iterable(kinds) else ()
    if not wanted:
        raise ArgumentError(message("kinds", "None, or at least one type of facts", kinds))
    facts = [fact for kind in wanted for fact in load_facts(kind)]
    return tuple(_filled(f.prompt, found, f.competitors[0]) for f in facts if (found := _find(f.prompt)))


def _around(one: Rewrite, rng: random.Random, told: Sequence[dict[str, Any]]) -> Iterator[Probe]:
    yield Probe("efficacy", one.text, one.label, target=one.new, old=one.old)
    found = _find(one.text)
    near = list(_neighbours(one, found, rng, told)) if found else []
    if found is not None:
        yield from _paraphrases(one, found)
        yield from near
        yield from _same_subject(one, found)
        yield from _ripples(one, found) if one.new is not None else ()
    if one.new is not None:
        yield from _prepended(one, near[:: max(1, len(near) // PREPENDED)][:PREPENDED] or _unrelated(one))


def _paraphrases(one: Rewrite, found: Known) -> Iterator[Probe]:
    texts = dict.fromkeys(fill(template, found.row) for template in found.relation.templates)
    old = one.old or _answers(found)[0]
    for text in texts:
        if text is not None and text != one.text:
            yield Probe("paraphrase", text, one.label, target=one.new, old=old)


def _neighbours(one: Rewrite, found: Known, rng: random.Random, told: Sequence[dict[str, Any]]) -> Iterator[Probe]:
    """Other subjects under the same prompt, those with the same answer first; under more prompts where they are few.

    Subjects that are rewritten themselves (`told`) are no neighbours: what is said of them is meant to change.
    """
    relation = found.relation
    rows = [row for row in _data()[0][relation.table]
            if row[relation.column] is not None and not any(row is other for other in told)]  # fmt: skip
    rng.shuffle(rows)
    rows.sort(key=lambda row: row[relation.column] != found.row[relation.column])
    own = [found.template] if found.template in relation.templates else []
    templates = dict.fromkeys([*own, *relation.templates])
    pairs = [(fill(template, row), row) for template in templates for row in rows]
    count = 0
    for text, row in pairs:
        answers = _said(row, relation.column)
        if text is None or _about(text, one, found) or one.new in answers or count == NEAR:
            continue
        count += 1
        yield Probe("locality", text, one.label, "same relation", target=answers[0], old=one.new)


def _about(text: str, one: Rewrite, found: Known) -> bool:
    """Whether a text holds the rewritten subject, by any of its names."""
    names = [one.subject, found.row["name"], found.row.get("alias"), _SUBJECT.sub("", found.row["name"])]
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) for name in names if name)


def _others(found: Known) -> Iterator[tuple[Relation, tuple[str, ...]]]:
    """Other properties that are known of a subject."""
    for relation in _data()[1].values():
        same = relation.table == found.relation.table and relation.name != found.relation.name
        if same and (answers := _said(found.row, relation.column)):
            yield relation, answers


def _same_subject(one: Rewrite, found: Known) -> Iterator[Probe]:
    for relation, answers in _others(found):
        for text in (fill(template, found.row) for template in relation.templates[:2]):
            if text is not None and one.new not in answers:
                yield Probe("locality", text, one.label, "same subject", relation.column, answers[0], one.new,
                            others=answers[1:])  # fmt: skip


def _ripples(one: Rewrite, found: Known) -> Iterator[Probe]:
    for spec in found.relation.ripple:
        made = _inverse(spec, one, found) if spec.get("inverse") else _one_hop(spec, one, found)
        if made is not None:
            yield made


def _inverse(spec: dict[str, Any], one: Rewrite, found: Known) -> Probe | None:
    """What the new answer now has as its subject."""
    subject = " " + found.row["name"]
    before, after = (spec["prompt"].replace("{new}", said.strip()) for said in (_answers(found)[0], one.wanted))
    known_new = any(_said(row, found.relation.column)[:1] == (one.new,) for row in _data()[0][found.relation.table])
    if not known_new or one.new == subject:
        return None
    return Probe(
        "ripple", after, one.label, criterion=spec["criterion"], target=subject, conditions=((before, subject),)
    )


def _one_hop(spec: dict[str, Any], one: Rewrite, found: Known) -> Probe | None:
    """Another way to the new answer, or a property of it; the condition is what the model must know for that."""
    text = fill(spec["prompt"], found.row)
    if text is None:
        return None
    old = _answers(found)[0]
    if "column" not in spec:
        return Probe("ripple", text, one.label, criterion=spec["criterion"], target=one.new, old=old,
                     conditions=((text, old),))  # fmt: skip
    now, was = (_property(spec["column"], said) for said in (one.wanted, old))
    if now is None or (was is not None and was[1] == now[1]):
        return None
    return Probe("ripple", text, one.label, criterion=spec["criterion"], target=now[1], old=was[1] if was else None,
                 conditions=(now,))  # fmt: skip


def _property(name: str, subject: str) -> tuple[str, str] | None:
    """(prompt, answer) of a property of something that is an answer itself."""
    tables, relations, _ = _data()
    relation = relations[name]
    row = next((row for row in tables[relation.table] if subject.strip() == _SUBJECT.sub("", row["name"])), None)
    text = fill(relation.templates[0], row) if row is not None and row[relation.column] is not None else None
    return None if row is None or text is None else (text, _said(row, relation.column)[0])


def _prepended(one: Rewrite, near: Iterable[Probe]) -> Iterator[Probe]:
    for probe in near:
        yield Probe("locality", f"{one.sentence} {probe.text}", one.label, "edit prepended", target=probe.target,
                    old=one.new)  # fmt: skip


def _unrelated(one: Rewrite) -> list[Probe]:
    prompts = general_probes(texts=0, generation=0, choices=0)
    return [probe for probe in prompts if one.subject.casefold() not in probe.text.casefold()][:PREPENDED]


def _missing(one: Rewrite, found: Sequence[Probe]) -> list[str]:
    """What could not be made for a rewrite, in words."""
    has = {(probe.axis, probe.stratum) for probe in found}
    wanted = {"paraphrase": ("paraphrase", ""), "same relation": ("locality", "same relation"),
              "same subject": ("locality", "same subject"), "ripple": ("ripple", "")}  # fmt: skip
    lacking = [name for name, key in wanted.items() if key not in has]
    return [f"no {name} probes for {one.label!r}" for name in lacking]

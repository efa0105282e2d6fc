"""Formats: readers of files with one rewrite a record, and of relations without rewrites.

Each reader is a generator that takes the fields of each record and yields the rewrites and probes that they hold.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from resid_surgery.editing.probes import Probe
from resid_surgery.editing.records import Fields, answer, prompt_of
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import LoadError

Found = Iterator[Rewrite | Probe]
CRITERIA = ("Relation_Specificity", "Logical_Generalization", "Subject_Aliasing", "Compositionality_I",
           "Compositionality_II", "Forgetfulness")  # fmt: skip
"""Criteria of RippleEdits and KnowEdit."""


def rewrite_of(fields: Fields, prompt: str, subject: str | None, new: str, old: str | None) -> Rewrite | None:
    """A rewrite, or None (and a note) where a record's own fields do not make one."""
    text = prompt_of(prompt)
    filled = text.replace("{}", subject or "")
    told = answer(filled, old) if old and old.strip() else None
    if not subject or not subject.strip() or subject not in filled:
        fields.tally.note("rewrite left out: its subject does not stand in its prompt")
        return None
    if told == answer(filled, new):
        fields.tally.note("rewrite left out: its new answer is the old one")
        return None
    with fields.naming():
        return Rewrite(text, subject, answer(filled, new), told)


def asked_of(rewrite: Rewrite, axis: str, prompts: Sequence[str]) -> Iterator[Probe]:
    """Prompts that should now get the new answer."""
    for prompt in prompts:
        text = prompt_of(prompt)
        old = answer(text, rewrite.old) if rewrite.old else None
        yield Probe(axis, text, rewrite.label, target=answer(text, rewrite.wanted), old=old)


def kept_of(rewrite: Rewrite, stratum: str, prompt: str, answers: Sequence[str], criterion: str = "") -> Probe:
    """A locality probe; the new answer is what must not be said there."""
    text = prompt_of(prompt)
    said = [answer(text, one) for one in answers]
    target, new = said[0] if said else None, answer(text, rewrite.wanted)
    old = None if new == target else new
    return Probe("locality", text, rewrite.label, stratum, criterion, target, old, others=tuple(said[1:]))


def follows_of(rewrite: Rewrite, criterion: str, prompt: str, answers: Sequence[str], **more: Any) -> Probe:
    """A ripple probe; answers behind the first count as right as well."""
    text = prompt_of(prompt)
    target, *others = [answer(text, one) for one in answers]
    return Probe("ripple", text, rewrite.label, criterion=criterion, target=target, others=tuple(others), **more)


def counterfact(records: Iterator[Fields]) -> Found:
    """Records of CounterFact."""
    for record in records:
        asked = record.part("requested_rewrite")
        new, old = asked.part("target_new").text("str"), asked.part("target_true").text("str")
        rewrite = rewrite_of(asked, asked.text("prompt"), asked.text("subject"), new, old)
        if rewrite is None:
            continue
        yield rewrite
        yield from asked_of(rewrite, "efficacy", [rewrite.text])
        yield from asked_of(rewrite, "paraphrase", record.texts("paraphrase_prompts"))
        for prompt in record.texts("neighborhood_prompts"):  # they share the old answer by construction
            yield kept_of(rewrite, "same relation", prompt, [old])
        for prompt in record.texts("generation_prompts"):
            yield Probe("generation", prompt_of(prompt), rewrite.label)


def easyedit(records: Iterator[Fields]) -> Found:
    """Records of EasyEdit, flat or nested, and of KnowEdit."""
    for record in records:
        prompt, new = record.text("prompt", "text"), record.answers("target_new", "labels")
        if not new:
            record.missing("target_new", "a non-empty text")
        old = record.answers("ground_truth", needed=False)
        rewrite = rewrite_of(record, prompt, record.maybe("subject", "concept"), new[0], old[0] if old else None)
        if rewrite is None:
            continue
        yield rewrite
        yield from asked_of(rewrite, "efficacy", [rewrite.text])
        yield from asked_of(rewrite, "paraphrase", record.texts("rephrase_prompt", "rephrase"))
        yield from _flat_locality(record, rewrite)
        for key, asked, answers in record.questions("locality"):
            yield kept_of(rewrite, _stratum(key, asked), asked, answers, key)
        for key, asked, answers in record.questions("portability"):
            if answers:
                yield follows_of(rewrite, key, asked, answers)
            else:
                record.tally.note(f"portability.{key} without an answer")


def _flat_locality(record: Fields, rewrite: Rewrite) -> Found:
    asked = record.maybe("locality_prompt")
    if asked is not None:
        yield kept_of(rewrite, _stratum("neighborhood", asked), asked, record.answers("locality_ground_truth"))


def _stratum(key: str, prompt: str) -> str:
    """How near a locality question stands: by its key, but questions from Natural Questions are unrelated."""
    if prompt.lower().startswith("nq question:"):
        return "unrelated"
    near = {"distracting": "edit prepended", "neighborhood": "same relation"}
    return near.get(key.lower(), "same subject" if key in CRITERIA else "")


def zsre(records: Iterator[Fields]) -> Found:
    """Records of zsRE."""
    for record in records:
        old = record.answers("answers")
        rewrite = rewrite_of(
            record, record.text("src"), record.text("subject"), record.text("alt"), next(iter(old), None)
        )
        if rewrite is None:
            continue
        yield rewrite
        yield from asked_of(rewrite, "efficacy", [rewrite.text])
        yield from asked_of(rewrite, "paraphrase", record.texts("rephrase"))
        if (asked := record.maybe("loc")) is not None:
            yield kept_of(rewrite, "unrelated", asked, record.answers("loc_ans"))


def lre(records: Iterator[Fields]) -> Found:
    """Records of LRE relations: locality probes of no rewrite."""
    for record in records:
        record.tally.name = record.tally.name or record.maybe("name") or ""
        templates = record.texts("prompt_templates", needed=True)
        for sample in record.parts("samples"):
            subject, target = sample.text("subject"), sample.text("object")
            yield from (_known(prompt_of(one.replace("{}", subject)), target) for one in templates)


def pararel(records: Iterator[Fields]) -> Found:
    """Records of ParaRel: patterns and triples; patterns that end in the object become prompts."""
    patterns: list[str] = []
    triples: list[tuple[str, str]] = []
    tally = None
    for record in records:
        tally = record.tally
        if "pattern" in record.data:
            patterns.append(record.text("pattern"))
        else:
            triples.append((record.text("sub_label"), record.text("obj_label")))
    if not patterns or not triples:
        raise LoadError("ParaRel needs a file of patterns and one of triples; give both paths: [patterns, triples].")
    bare = [one.rstrip(" .") for one in patterns]
    usable = [one.removesuffix("[Y]") for one in bare if one.endswith("[Y]") and "[Y]" not in one[:-3] and "[X]" in one]
    if tally is not None and len(usable) < len(patterns):
        tally.note("pattern that does not end in [Y]", len(patterns) - len(usable))
    for subject, target in triples:
        yield from (_known(prompt_of(one.replace("[X]", subject)), target) for one in usable)


def _known(text: str, target: str) -> Probe:
    return Probe("locality", text, target=answer(text, target))

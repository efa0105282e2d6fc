"""Readers of public formats of knowledge editing, on records written by hand after the public schemas."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resid_surgery.editing import importing, records
from resid_surgery.editing.importing import FORMATS, load_probes, read_probes
from resid_surgery.editing.probes import AXES, STRATA, Probe, ProbeSet, save_probes
from resid_surgery.editing.relations import probes
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, LoadError, PromptError

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 70,
    "requested_rewrite": {
        "prompt": "The owner of {} is",
        "relation_id": "P1",
        "target_new": {"str": "Otto", "id": "Q2"},
        "target_true": {"str": "Anna", "id": "Q1"},
        "subject": "the red boat",
    },
    "paraphrase_prompts": ["It was late. The red boat belongs to"],
    "neighborhood_prompts": ["The owner of the green boat is", "The owner of the hut is "],
    "attribute_prompts": ["The owner of the mill is"],
    "generation_prompts": ["People say that the red boat"],
}
FLAT = {
    "case_id": 3,
    "prompt": "The red boat belongs to",
    "target_new": "Otto",
    "ground_truth": "Anna",
    "subject": "The red boat",
    "rephrase_prompt": "The owner of the red boat is",
    "locality_prompt": "The green boat belongs to",
    "locality_ground_truth": "Ida",
}
NESTED = {
    "prompt": "Who owns the red boat?",
    "target_new": "Otto",
    "subject": "the red boat",
    "rephrase_prompt": "Whose is the red boat?",
    "portability": {"one_hop": {"prompt": "Who is the sister of the owner of the red boat?", "ground_truth": "Eva"}},
    "locality": {"neighborhood": {"prompt": "nq question: who lives in the mill", "ground_truth": "Ida"}},
}
KNOWEDIT = {
    "subject": "the red boat",
    "prompt": "The name of the owner of the red boat is",
    "target_new": "Otto",
    "ground_truth": ["Anna", "Annie"],
    "rephrase": "The red boat is owned by",
    "portability": {
        "Reasoning": [{"prompt": "The sister of the owner of the red boat is", "ground_truth": [["Eva", "Evi"]]}],
        "Subject_Aliasing": [{"prompt": ["The owner of Scarlet is"], "ground_truth": [["Otto"]]}],
        "Logical_Generalization": [{"prompt": "The boat of Otto is", "ground_truth": []}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The colour of the red boat is", "ground_truth": [["red", "scarlet"]]}],
        "Forgetfulness": None,
    },
}
WIKIBIO = {
    "text": "This is a text about Ann Smith. Ann Smith was",
    "labels": "a baker in the village.",
    "concept": "Ann Smith",
    "locality": {"Relation_Specificity": [{"prompt": "The brother of Ann Smith is", "ground_truth": ["Tom"]}]},
}
ZSRE = {
    "subject": "the red boat",
    "src": "Who owns the red boat?",
    "pred": "Anna",
    "rephrase": "Whose is the red boat?",
    "alt": "Otto",
    "answers": ["Anna", "Annie"],
    "loc": "nq question: who lives in the mill",
    "loc_ans": "Ida",
    "cond": "Anna >> Otto || Who owns the red boat?",
}


def query(prompt: str, *values: str, subject: str = "Q9") -> dict[str, Any]:
    answers = [{"value": values[0], "aliases": list(values[1:])}] if values else []
    return {"prompt": prompt, "answers": answers, "query_type": "regular", "subject_id": subject, "relation": "R",
            "target_ids": ["Q1"], "phrase": None}  # fmt: skip


def ripple(spelling: str = "Relation_Specificity") -> dict[str, Any]:
    height = query("The name of the mother of King of Hearts is", "Eva", "Evi")
    return {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the brother of King of Hearts is Sam.",
            "subject_id": "Q9",
            "relation": "BROTHER",
            "target_id": "Q8",
            "previous_fact": {"prompt": "The name of the brother of King of Hearts is Sid.", "subject_id": "Q9",
                              "relation": "BROTHER", "target_id": "Q7"},
        },
        spelling: [{"test_queries": [height], "test_condition": "OR", "condition_queries": [height]}],
        "Logical_Generalization": [
            {"test_queries": [query("The sibling is", "Sam"), query("A sibling is", "Sam")], "test_condition": "OR",
             "condition_queries": []}
        ],
        "Compositionality_I": [{"test_queries": [query("The wife is")], "test_condition": "OR"}],
        "Subject_Aliasing": [], "Compositionality_II": [], "Forgetfulness": [],
    }  # fmt: skip


def hop(cloze: str, answer: str, *alias: str) -> dict[str, Any]:
    return {"question": f"What ends: {cloze}?", "cloze": cloze, "answer": answer, "answer_alias": list(alias)}


def quake(new: str = "Otto", said: str = "Otto", boat: str = "the red boat") -> dict[str, Any]:
    asked = f"The owner of {boat} is"
    return {
        "case_id": 12,
        "requested_rewrite": [
            {"prompt": "The owner of {} is", "relation_id": "P1", "target_new": {"str": new, "id": "Q2"},
             "target_true": {"str": "Anna", "id": "Q1"}, "subject": boat, "question": f"What ends: {asked}?"}
        ],
        "questions": [f"Question {i} about the sister of the owner of {boat}?" for i in range(3)],
        "answer": "Mia", "answer_alias": [], "new_answer": "Eva", "new_answer_alias": ["Evi"],
        "single_hops": [hop(asked, "Anna"), hop("The sister of Anna is", "Mia")],
        "new_single_hops": [hop(asked, said), hop(f"The sister of {said} is", "Eva", "Evi")],
        "orig": {"triples": [], "new_triples": []},
    }  # fmt: skip


LRE = {
    "name": "owner of boat",
    "prompt_templates": ["{} belongs to", "The owner of {} is"],
    "prompt_templates_zs": ["Who owns {}? It is"],
    "properties": {"symmetric": False},
    "samples": [{"subject": "the red boat", "object": "Anna"}, {"subject": "the green boat", "object": "Ida"}],
}
PATTERNS = [{"pattern": "[X] belongs to [Y] .", "lemma": "belong"}, {"pattern": "[Y] owns [X].", "lemma": "own"}]
TRIPLES = [{"sub_label": "Boat A", "obj_label": "Anna", "uuid": "u1"}, {"sub_label": "Boat B", "obj_label": "Ida"}]
SAMPLES: dict[str, Any] = {
    "counterfact": COUNTERFACT, "easyedit": FLAT, "knowedit": KNOWEDIT, "zsre": ZSRE, "rippleedits": ripple(),
    "mquake": quake(), "lre": LRE,
}  # fmt: skip


def written(folder: Path, content: Any, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read(folder: Path, *content: Any, **options: Any) -> ProbeSet:
    return read_probes(written(folder, list(content)), **options)


def by(found: ProbeSet, axis: str) -> list[Probe]:
    return [one for one in found if one.axis == axis]


# formats, each by hand


def test_counterfact(tmp_path):
    found = read(tmp_path, COUNTERFACT)
    one = Rewrite("The owner of {} is", "the red boat", " Otto", " Anna")
    assert found.rewrites == (one,)
    fact = one.label
    assert found.probes == (
        Probe("efficacy", "The owner of the red boat is", fact, target=" Otto", old=" Anna"),
        Probe("paraphrase", "It was late. The red boat belongs to", fact, target=" Otto", old=" Anna"),
        Probe("locality", "The owner of the green boat is", fact, "same relation", target=" Anna", old=" Otto"),
        Probe("locality", "The owner of the hut is", fact, "same relation", target=" Anna", old=" Otto"),
        Probe("generation", "People say that the red boat", fact),
    )
    assert found.ignored == (
        "attribute_prompts: 1", "pararel_idx: 1", "requested_rewrite.relation_id: 1",
        "requested_rewrite.target_new.id: 1", "requested_rewrite.target_true.id: 1",
    )  # fmt: skip


def test_easyedit_flat(tmp_path):
    found = read(tmp_path, FLAT)
    fact = "The red boat belongs to"
    assert found.rewrites == (Rewrite(fact, "The red boat", " Otto", " Anna"),)
    assert found.probes == (
        Probe("efficacy", fact, fact, target=" Otto", old=" Anna"),
        Probe("paraphrase", "The owner of the red boat is", fact, target=" Otto", old=" Anna"),
        Probe("locality", "The green boat belongs to", fact, "same relation", target=" Ida", old=" Otto"),
    )
    assert found.ignored == ()


def test_easyedit_nested(tmp_path):
    found = read(tmp_path, NESTED)
    assert found.rewrites[0].old is None
    assert [(p.criterion, p.target) for p in by(found, "ripple")] == [("one_hop", " Eva")]
    assert [(p.stratum, p.criterion, p.target) for p in by(found, "locality")] == [
        ("unrelated", "neighborhood", " Ida")
    ]
    assert found.ignored == ()


def test_knowedit(tmp_path):
    found = read(tmp_path, KNOWEDIT)
    assert found.rewrites[0].old == " Anna"
    assert [(p.criterion, p.target, p.others) for p in by(found, "ripple")] == [
        ("Reasoning", " Eva", (" Evi",)), ("Subject_Aliasing", " Otto", ())]  # fmt: skip
    (stays,) = by(found, "locality")
    assert (stays.stratum, stays.criterion, stays.target, stays.others, stays.old) == (
        "same subject", "Relation_Specificity", " red", (" scarlet",), " Otto")  # fmt: skip
    assert by(found, "paraphrase")[0].text == "The red boat is owned by"
    assert found.ignored == ("portability.Logical_Generalization without an answer: 1",)


def test_knowedit_of_a_biography(tmp_path):
    found = read(tmp_path, WIKIBIO)
    assert found.rewrites == (Rewrite(WIKIBIO["text"], "Ann Smith", " a baker in the village."),)
    assert by(found, "locality")[0].target == " Tom"


def test_zsre(tmp_path):
    found = read(tmp_path, ZSRE)
    assert found.rewrites == (Rewrite("Who owns the red boat?", "the red boat", " Otto", " Anna"),)
    assert [(p.axis, p.stratum, p.text, p.target, p.old) for p in found] == [
        ("efficacy", "", "Who owns the red boat?", " Otto", " Anna"),
        ("paraphrase", "", "Whose is the red boat?", " Otto", " Anna"),
        ("locality", "unrelated", "nq question: who lives in the mill", " Ida", " Otto"),
    ]
    assert found.ignored == ("cond: 1", "pred: 1")


@pytest.mark.parametrize("spelling", ["Relation_Specificity", "Relation_Specifity"])
def test_rippleedits(tmp_path, spelling):
    found = read(tmp_path, ripple(spelling))
    one = Rewrite("The name of the brother of King of Hearts is", "King of Hearts", " Sam", " Sid")
    assert found.rewrites == (one,)
    mother = "The name of the mother of King of Hearts is"
    first, second, third = by(found, "ripple")
    assert first == Probe("ripple", mother, one.label, criterion="Relation_Specificity", target=" Eva",
                          others=(" Evi",), conditions=((mother, " Eva"),))  # fmt: skip
    assert [(p.criterion, p.text, p.conditions) for p in (second, third)] == [
        ("Logical_Generalization", "The sibling is", ()), ("Logical_Generalization", "A sibling is", ())]  # fmt: skip
    assert [(p.stratum, p.text) for p in by(found, "locality")] == [("same subject", mother)]
    assert "test_condition OR over several queries (each is a probe of its own): 1" in found.ignored
    assert "Compositionality_I query without an answer: 1" in found.ignored
    assert "edit.previous_fact.target_id: 1" in found.ignored


def test_rippleedits_of_a_new_fact_has_no_old_answer(tmp_path):
    record = ripple()
    record["edit"]["previous_fact"] = None
    assert read(tmp_path, record).rewrites[0].old is None
    record["edit"]["subject_label"] = "Hearts"
    assert read(tmp_path, record).rewrites[0].subject == "Hearts"
    record["edit"]["prompt"] = "No verb here."
    with pytest.raises(PromptError, match=r"`edit.prompt` must be a sentence .* in record 0 of"):
        read(tmp_path, record)


def test_rippleedits_subject_without_other_prompts_stands_behind_of(tmp_path):
    record = {"edit": {"prompt": "The name of the brother of Ann is Sam.", "subject_id": "Q9"}}
    assert read(tmp_path, record).rewrites == (Rewrite("The name of the brother of Ann is", "Ann", " Sam"),)


def test_mquake(tmp_path):
    found = read(tmp_path, quake())
    (one,) = found.rewrites
    assert (one.text, one.new, one.old) == ("The owner of the red boat is", " Otto", " Anna")
    assert [p.target for p in by(found, "paraphrase")] == [" Otto"]
    hops = by(found, "ripple")
    assert len(hops) == 3
    for probe in hops:
        assert (probe.criterion, probe.target, probe.others, probe.old) == ("2 hops", " Eva", (" Evi",), " Mia")
        assert probe.conditions == (("The sister of Otto is", " Eva"),)
    assert not any("contradict" in line for line in found.ignored)


def test_mquake_reports_items_that_contradict_themselves(tmp_path):
    found = read(tmp_path, quake(said="Emil"))
    assert by(found, "ripple") == []
    assert len(by(found, "efficacy")) == 1
    assert "item whose hops contradict its own rewrites (no question made): 1" in found.ignored


def test_mquake_items_of_several_rewrites_must_agree_with_each(tmp_path):
    item = quake()
    item["requested_rewrite"].append(
        {"prompt": "The sister of {} is", "subject": "Otto", "question": "Sister?", "relation_id": "P2",
         "target_new": {"str": "Eva"}, "target_true": {"str": "Mia"}}
    )  # fmt: skip
    found = read(tmp_path, item)
    assert len(found.rewrites) == 2
    assert [p.conditions for p in by(found, "ripple")] == [()] * 3  # every hop is rewritten
    item["requested_rewrite"][1]["target_new"]["str"] = "Lou"
    assert by(read(tmp_path, item), "ripple") == []


def test_mquake_reports_items_that_contradict_one_another(tmp_path):
    other = quake()
    other["requested_rewrite"][0] |= {"subject": "Otto", "prompt": "The sister of {} is", "question": "Sister?",
                                      "target_new": {"str": "Lou"}, "target_true": {"str": "Eva"}}  # fmt: skip
    other["new_single_hops"] = [hop("The sister of Otto is", "Lou")]
    found = read(tmp_path, quake(), other)
    assert {p.criterion for p in by(found, "ripple")} == {"2 hops, contradicted by another item", "1 hops"}
    assert "item whose hops contradict another item's rewrite (criterion says so): 1" in found.ignored


def test_lre(tmp_path):
    found = read_probes(written(tmp_path, LRE))
    assert found.name == "owner of boat"
    assert found.rewrites == ()
    assert [(p.axis, p.fact, p.text, p.target) for p in found] == [
        ("locality", "", "the red boat belongs to", " Anna"), ("locality", "", "The owner of the red boat is", " Anna"),
        ("locality", "", "the green boat belongs to", " Ida"),
        ("locality", "", "The owner of the green boat is", " Ida"),
    ]  # fmt: skip
    assert found.ignored == ("prompt_templates_zs: 1", "properties: 1")


def test_pararel(tmp_path):
    patterns, triples = (tmp_path / "p.jsonl", tmp_path / "t.jsonl")
    for path, rows in ((patterns, PATTERNS), (triples, TRIPLES)):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_probes([patterns, triples])
    assert [(p.text, p.target) for p in found] == [("Boat A belongs to", " Anna"), ("Boat B belongs to", " Ida")]
    assert found.ignored == ("lemma: 2", "pattern that does not end in [Y]: 1")
    with pytest.raises(LoadError, match=r"give both paths: \[patterns, triples\]"):
        read_probes(patterns)


# what holds of every format


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_format_is_found_and_can_be_named(tmp_path, kind):
    path = written(tmp_path, [SAMPLES[kind]])
    lines = tmp_path / "lines.jsonl"
    lines.write_text((json.dumps(SAMPLES[kind]) + "\n\n") * 2)
    found = read_probes(path)
    assert len(found) > 0
    assert found == read_probes(path, format=kind) == read_probes(str(path))
    assert read_probes(lines).probes == found.probes  # the second record is the first once more
    assert importing._format(next(records.read_records(path, records.Tally())), "") == kind


@pytest.mark.parametrize("kind", SAMPLES)
def test_answers_have_exactly_one_leading_space_and_prompts_no_trailing_one(tmp_path, kind):
    def spaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spaced(one) if key != "subject" else one for key, one in value.items()}
        if isinstance(value, list):
            return [spaced(one) for one in value]
        return f"{value}  " if isinstance(value, str) and value else value

    for probe in read(tmp_path, spaced(SAMPLES[kind])):
        assert probe.text == probe.text.rstrip()
        for said in (probe.target, probe.old, *probe.others, *(b for _, b in probe.conditions)):
            assert said is None or (said[0] == " " and said[1:] == said.strip())


def test_after_a_new_line_an_answer_has_no_space():
    assert records.answer("Q: who?\nA:", " Anna ") == " Anna"
    assert records.answer("Who?\n", " Anna") == "Anna"


NEEDED = [
    (COUNTERFACT, ("requested_rewrite", "subject"), r"`requested_rewrite.subject`"),
    (COUNTERFACT, ("requested_rewrite", "target_new", "str"), r"`requested_rewrite.target_new.str`"),
    (COUNTERFACT, ("requested_rewrite", "target_true"), r"`requested_rewrite.target_true`"),
    (ZSRE, ("subject",), "`subject`"),
    (ZSRE, ("answers",), "`answers`"),
    (FLAT, ("locality_ground_truth",), "`locality_ground_truth`"),
    (quake(), ("new_answer",), "`new_answer`"),
    (quake(), ("new_single_hops",), "`new_single_hops`"),
    (LRE, ("samples", 1, "object"), "`samples.object`"),
]


@pytest.mark.parametrize(("sample", "where", "name"), NEEDED)
@pytest.mark.parametrize("put", ["nothing", 5, ""])
def test_a_missing_field_names_its_record(tmp_path, sample, where, name, put):
    damaged = json.loads(json.dumps(sample))
    inside = damaged
    for key in where[:-1]:
        inside = inside[key]
    if put == "nothing":
        del inside[where[-1]]
    else:
        inside[where[-1]] = put
    if put == "" and where[-1] in ("answers", "locality_ground_truth"):
        assert len(read(tmp_path, damaged).rewrites) == 1  # an old or a neighbour's answer may be unknown
        return
    known = f" (case_id {sample['case_id']})" if "case_id" in sample else ""
    with pytest.raises(PromptError) as caught:
        read(tmp_path, sample, damaged)
    assert name in str(caught.value)
    assert f"in record 1{known} of {tmp_path / 'file.json'}" in str(caught.value)


def test_records_that_make_no_rewrite_are_left_out_and_counted(tmp_path):
    elsewhere, same = {**FLAT, "subject": "a barge"}, {**FLAT, "target_new": " Anna"}
    found = read(tmp_path, FLAT, elsewhere, same)
    assert len(found.rewrites) == 1
    assert "rewrite left out: its subject does not stand in its prompt: 1" in found.ignored
    assert "rewrite left out: its new answer is the old one: 1" in found.ignored


def test_an_unknown_format_lists_what_was_looked_for(tmp_path):
    with pytest.raises(
        LoadError, match=r"first record has the fields colour, shape. Looked for resid_surgery: what"
    ) as e:
        read(tmp_path, {"colour": 1, "shape": 2})
    assert all(kind in str(e.value) for kind in FORMATS)
    with pytest.raises(ArgumentError, match=r"`format` must be one of .*Did you mean 'counterfact'"):
        read(tmp_path, COUNTERFACT, format="counterfacts")
    with pytest.raises(PromptError, match="`src` must be a non-empty text in record 0"):
        read(tmp_path, FLAT | {"answers": []}, format="zsre")
    for bad in (3, [], [3], None):
        with pytest.raises(ArgumentError, match="`path` must be a path or a list of paths"):
            read_probes(bad)


# files


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"[]", "holds no record"),
        (b"[1]", "record 0 of .* must be a JSON object; got int"),
        (b'"text"', "must be a JSON object; got str"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"prompt": "\\ud800"}', "no complete JSON"),
        (b'{"a": "\xff"}', "no complete JSON"),
        (b"[" * 100_000, "nested too deeply|no complete JSON"),
        (b'{"a":' * 100_000, "nested too deeply|no complete JSON"),
        (b'{"a": 1}\n{"a": ', "is of no known format|line 2 of .* no complete JSON"),
    ],
)
def test_damaged_files(tmp_path, content, fault):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=fault):
        read_probes(path)


def test_files_that_are_absent_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(LoadError, match="cannot be read"):
        read_probes(tmp_path / "absent.json")
    with pytest.raises(LoadError, match="cannot be read"):
        read_probes(tmp_path)
    path = written(tmp_path, [FLAT])
    monkeypatch.setattr(records, "LARGEST_BYTES", 100)
    with pytest.raises(LoadError, match=r"must be at most 1 GiB; got \d+ bytes. Split it"):
        read_probes(path)


def test_the_limit_is_a_gibibyte():
    assert records.LARGEST_BYTES == 2**30


@pytest.mark.parametrize("kind", SAMPLES)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncation_at_any_byte_is_a_clear_error(tmp_path, kind, data):
    whole = json.dumps([SAMPLES[kind]] * 2).encode()
    path = tmp_path / "cut.json"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises((LoadError, PromptError)):
        read_probes(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "the red boat", "{}"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from("ab"), inside, max_size=2),
    max_leaves=5,
)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inside for path in paths_of(one, (*at, key)))]


@pytest.mark.parametrize("kind", [*SAMPLES, "nested", "biography"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_wrong_value_at_any_place_is_read_or_refused_clearly(tmp_path, kind, data):
    record = json.loads(json.dumps({**SAMPLES, "nested": NESTED, "biography": WIKIBIO}[kind]))
    where = data.draw(st.sampled_from(paths_of(record)[1:]))
    inside = record
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = data.draw(JSON)
    named = {"nested": "easyedit", "biography": "knowedit"}.get(kind, kind)
    try:
        found = read(tmp_path, record, format=named)
    except (LoadError, PromptError) as error:
        assert len(str(error)) > 20  # noqa: PT017
    else:
        assert found.hash


# the library's own files

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
own = st.builds(
    Probe,
    axis=st.sampled_from([a for a in AXES if a != "choice"]),
    text=words, fact=words, stratum=st.sampled_from(STRATA), criterion=words, target=words, old=st.none() | words,
    conditions=st.lists(st.tuples(words, words), max_size=2), others=st.lists(words, max_size=2),
)  # fmt: skip


@given(st.lists(own, max_size=4), words)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_saved_probes_come_back_equal(tmp_path, many, name):
    path = save_probes(tmp_path / "own.jsonl", ProbeSet(tuple(many), name, (Rewrite("A {} is", "b", " c"),)))
    found = load_probes(path)
    assert found == read_probes(path)
    assert found == ProbeSet(tuple(many), name, (Rewrite("A {} is", "b", " c"),))
    assert found.ignored == ()


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_own_files_cut_anywhere_are_refused(tmp_path, share):
    path = tmp_path / "own.jsonl"
    whole = save_probes(path, probes(Rewrite("The capital of {} is", "France", " Rome"))).read_bytes()
    kept = whole[: int(share * len(whole))]
    path.write_bytes(kept)
    if kept == whole[:-1]:
        assert len(load_probes(path)) > 0  # only the last new line is gone
        return
    with pytest.raises(LoadError):
        load_probes(path)


def test_own_files_that_were_changed_are_refused(tmp_path):
    path = save_probes(tmp_path / "own.jsonl", probes(Rewrite("The capital of {} is", "France", " Rome")))
    lines = path.read_text().splitlines()
    bare = json.dumps({key: one for key, one in json.loads(lines[0]).items() if key != "hash"})
    for changed in (
        [*lines, lines[-1]],
        [lines[0], *lines[2:]],
        [lines[0].replace('"schema": 1', '"schema": 9'), *lines[1:]],
        [lines[0], '{"axis": "text"}'],
        [lines[0], '{"axis": "text", "text": "a", "others": [[1]]}'],
        [lines[0], '{"axis": "text", "text": "a", "colour": 1}'],
        [bare, '{"axis": "text", "text": "a", "others": [[1]]}'],
        lines[1:],
    ):
        path.write_text("\n".join(changed))
        with pytest.raises(LoadError):
            load_probes(path)


def test_reading_opens_each_file_once_and_keeps_no_text_of_lines(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text((json.dumps(FLAT) + "\n") * 500)
    found = records.read_records(path, records.Tally())
    assert next(found).at == f"record 0 (case_id 3) of {path}"
    assert sum(1 for _ in found) == 499

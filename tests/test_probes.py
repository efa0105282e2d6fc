"""The built-in probe sets: general texts, and probes around the built-in facts."""

import itertools
import json
import re
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resid_surgery as rs
from resid_surgery.editing import relations
from resid_surgery.editing.probes import Probe, ProbeSet, save_probes
from resid_surgery.editing.relations import NEAR, PREPENDED, known_facts, probes, rewrite
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.editing.texts import corpus, general_probes
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.facts import FACT_TYPES, load_facts

ROME = Rewrite("The capital of {} is", "France", " Rome", " Paris")
TABLES = json.loads(files("resid_surgery.editing").joinpath("relations.json").read_text(encoding="utf-8"))


def holds(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def of(found: ProbeSet, axis: str, stratum: str = "") -> list[Probe]:
    return [one for one in found if one.axis == axis and one.stratum == stratum]


# general texts


def test_general_has_the_four_axes_in_one_order():
    found = general_probes()
    assert found == general_probes()
    assert {p.axis for p in found} == {"text", "locality", "generation", "choice"}
    assert [p.text for p in found.of("text")] == corpus()
    assert all(p.stratum == "unrelated" and p.target is None for p in found.of("locality"))
    assert all(p.fact == "" for p in found)
    assert len(set(found)) == len(found)


def test_documents_are_many_of_middle_length_and_distinct():
    texts = corpus()
    assert len(texts) >= 40
    assert all(60 <= len(text.split()) <= 120 for text in texts)
    beginnings = {" ".join(text.split()[:5]) for text in texts}
    assert len(beginnings) == len(texts)
    assert len(general_probes().of("locality")) >= 60
    assert len(general_probes().of("generation")) == 12


def test_unrelated_prompts_end_without_a_space_and_hold_no_answer_of_a_fact():
    answers = {fact.answer.strip() for kind in ("capital", "country", "language", "month") for fact in load_facts(kind)}
    for probe in [p for p in general_probes() if p.axis in ("locality", "generation")]:
        assert probe.text == probe.text.strip()
        assert not any(re.search(rf"\b{re.escape(one)}\b", probe.text) for one in answers), probe.text


def test_choices_are_the_facts_spread_over_the_kinds():
    facts = {f.prompt: f for kind in FACT_TYPES for f in load_facts(kind)}
    found = general_probes().of("choice")
    assert {p.text for p in found} == set(facts)
    for probe in found:
        assert (probe.target, probe.wrong) == (facts[probe.text].answer, facts[probe.text].competitors)
    assert {facts[p.text].kind for p in general_probes(choices=6).of("choice")} == set(FACT_TYPES)
    kinds = [facts[p.text].kind for p in general_probes(choices=60).of("choice")]
    assert all(kinds.count(kind) >= 5 for kind in FACT_TYPES)


@given(st.integers(0, 700))
@settings(max_examples=25, deadline=None)
def test_a_cap_takes_that_many_spread_from_the_first(count):
    found = general_probes(texts=0, unrelated=count, generation=0, choices=0)
    everything = [p.text for p in general_probes().of("locality")]
    places = [everything.index(p.text) for p in found]
    assert len(found) == min(count, len(everything))
    assert places == sorted(set(places))
    if len(places) > 1:
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert places[0] == 0
        assert max(gaps) - min(gaps) <= 1
        assert len(everything) - places[-1] <= max(gaps) + 1  # none at the end is left out


@pytest.mark.parametrize("bad", [-1, 1.5, "all", True])
def test_a_cap_must_be_a_whole_number(bad):
    with pytest.raises(ArgumentError, match="`texts` must be a whole number >= 0"):
        general_probes(texts=bad)


# the tables


def test_every_row_has_every_column_and_every_subject_is_there_once():
    for name, table in TABLES["tables"].items():
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), name
        assert len({row[0] for row in table["rows"]}) == len(table["rows"]), name


def test_relations_ask_for_columns_that_exist_in_at_least_eight_ways():
    for name, one in TABLES["relations"].items():
        table, column = name.split(".")
        columns = TABLES["tables"][table]["columns"]
        assert column in columns
        assert one["kind"] in ("", *FACT_TYPES)
        assert len(set(one["templates"])) == len(one["templates"]) >= (8 if one["kind"] else 2), name
        for template in [*one["templates"], *one["patterns"], *(r["prompt"] for r in one["ripple"])]:
            named = set(re.findall(r"{(\w+)}", template))
            assert named <= {*columns, "new"}, template
            assert "{}" in template or named, template
            assert template == template.strip(), template
            assert column not in named, template  # it would give the answer away


def test_cells_are_plain_words():
    for table in TABLES["tables"].values():
        for cell in (c for row in table["rows"] for one in row for c in (one if isinstance(one, list) else [one])):
            assert cell is None or (cell == cell.strip() and cell and "{" not in cell), cell


def test_the_tables_say_what_the_facts_say():
    for kind in FACT_TYPES:
        for fact in load_facts(kind):
            found = relations._find(fact.prompt)
            if found is not None:
                assert relations._answers(found) == (fact.answer,), fact.prompt
                assert found.relation.kind == kind


def test_most_facts_are_known_and_each_has_enough_around_it():
    table = known_facts()
    assert len(table) == sum(len(load_facts(kind)) for kind in FACT_TYPES)
    with_relation = table[table.relation != ""]
    assert len(with_relation) >= 430
    assert (with_relation.subject != "").all()
    assert (with_relation.paraphrases >= 8).all()
    assert (with_relation.neighbours >= 11).all()
    by_kind = with_relation.groupby("kind").size() / table.groupby("kind").size()
    assert by_kind["capital"] > 0.9
    assert by_kind.min() > 0.5
    for row in with_relation.itertuples():
        assert row.subject in row.prompt


def test_countries_of_the_capital_facts_have_other_properties():
    table = known_facts("capital")
    countries = table[table.relation == "country.capital"]
    assert len(countries) >= 40
    assert (countries.properties >= 1).all()
    assert countries.properties.median() >= 3


# probes around a rewrite


def test_the_known_rewrite_has_every_axis():
    found = probes(ROME)
    assert found.rewrites == (ROME,)
    assert found.ignored == ()
    assert all(p.fact == ROME.label for p in found)
    assert of(found, "efficacy") == [Probe("efficacy", ROME.text, ROME.label, target=" Rome", old=" Paris")]
    assert len(of(found, "paraphrase")) >= 8
    assert len(of(found, "locality", "same relation")) == NEAR
    assert len(of(found, "locality", "edit prepended")) == PREPENDED
    assert {p.criterion for p in of(found, "locality", "same subject")} >= {"language", "continent", "currency"}
    assert {p.criterion for p in of(found, "ripple")} == {
        "Compositionality_I", "Compositionality_II", "Subject_Aliasing"}  # fmt: skip


def test_paraphrases_keep_the_subject_and_are_not_the_prompt():
    for probe in of(probes(ROME), "paraphrase"):
        assert holds("France", probe.text)
        assert probe.text != ROME.text
        assert (probe.target, probe.old) == (" Rome", " Paris")


def test_a_one_hop_consequence_names_what_must_be_known_for_it():
    river = next(p for p in of(probes(ROME), "ripple") if "river" in p.text)
    assert (river.target, river.old) == (" Tiber", " Seine")
    assert river.conditions == (("The river that flows through Rome is the", " Tiber"),)


def test_an_unknown_new_answer_has_no_hop_through_it():
    made = of(probes(Rewrite("The capital of {} is", "France", " Springfield", " Paris")), "ripple")
    assert made
    assert all(p.target == " Springfield" for p in made)
    assert all(p.conditions == ((p.text, " Paris"),) for p in made)


def test_a_hop_to_the_same_property_is_left_out():
    moved = Rewrite("The {} is located in the country of", "Eiffel Tower", " Belgium", " France")
    texts = [p.text for p in of(probes(moved), "ripple")]
    assert any("capital" in text for text in texts)
    assert not any("currency" in text for text in texts)  # the euro before and after


def test_the_inverse_of_the_next_month():
    after = rewrite("After April comes the month of", " June")
    found = of(probes(after), "ripple")
    assert [(p.criterion, p.target) for p in found] == [("Logical_Generalization", " April")] * 2
    assert found[0].text == "The month right before June is"
    assert found[0].conditions == (("The month right before May is", " April"),)
    assert of(probes(rewrite("After April comes the month of", " banana")), "ripple") == []


@pytest.mark.parametrize("kind", FACT_TYPES)
def test_neighbours_never_hold_the_subject_nor_the_new_answer(kind):
    rows = known_facts(kind)
    rows = rows[rows.relation != ""]
    for row in rows.iloc[:: max(1, len(rows) // 12)].itertuples():
        fact = next(f for f in load_facts(kind) if f.prompt == row.prompt)
        one = rewrite(row.prompt, fact.competitors[-1])
        found = probes(one)
        near = of(found, "locality", "same relation")
        assert len(near) >= 11
        for probe in near:
            assert not holds(row.subject, probe.text), (one, probe)
            assert probe.target != one.new
            assert probe.old == one.new
        for probe in [*near, *of(found, "locality", "same subject")]:
            assert one.new not in (probe.target, *probe.others)
            assert probe.target is not None
            assert probe.target[0] == " " != probe.target[1]
        for probe in of(found, "locality", "edit prepended"):
            assert probe.text.startswith(one.sentence + " ")
        assert len({(p.axis, p.stratum, p.text) for p in found}) == len(found)


def test_neighbours_are_true_rows_of_the_same_relation():
    capitals = {row[0]: row[1] for row in TABLES["tables"]["country"]["rows"]}
    for probe in of(probes(ROME), "locality", "same relation"):
        country = probe.text.removeprefix("The capital of ").removesuffix(" is")
        assert probe.target == " " + capitals[country]


def test_the_seed_chooses_the_neighbours_and_nothing_else():
    first, again, other = probes(ROME), probes(ROME), probes(ROME, seed=1)
    assert first == again
    assert of(first, "locality", "same relation") != of(other, "locality", "same relation")
    assert of(first, "paraphrase") == of(other, "paraphrase")


def test_same_answer_neighbours_come_first():
    near = of(probes(rewrite("The official language of Brazil is", " French")), "locality", "same relation")
    assert [p.target for p in near[:3]] == [" Portuguese"] * 3


def test_a_rewrite_without_a_known_relation_still_has_two_kinds_of_probes():
    one = Rewrite("The favourite food of {} is", "my uncle", " soup")
    found = probes(one)
    assert {(p.axis, p.stratum) for p in found} == {("efficacy", ""), ("locality", "edit prepended")}
    assert len(found) == 1 + PREPENDED
    lacking = ("paraphrase", "same relation", "same subject", "ripple")
    assert found.ignored == tuple(f"no {name} probes for {one.label!r}" for name in lacking)


def test_several_rewrites_keep_their_labels_and_order():
    other = rewrite("The capital of Japan is", " Lima")
    both = probes([ROME, other])
    assert both.rewrites == (ROME, other)
    near = [p for p in (*probes(ROME), *probes(other)) if p.axis == "locality" and p.stratum != "same subject"]
    told = ("efficacy", "paraphrase", "ripple")
    assert both.of(*told).probes == (*probes(ROME).of(*told), *probes(other).of(*told))
    assert any("Japan" in p.text or "France" in p.text for p in near), "alone, each is a neighbour of the other"
    kept = [p for p in both.of("locality") if p.stratum in ("same relation", "edit prepended")]
    assert len(kept) > 40
    assert not any("Japan is" in p.text.split(". ")[-1] or "France is" in p.text.split(". ")[-1] for p in kept)
    assert set(both.table.fact) == {ROME.label, other.label}


def test_without_rewrites_every_known_fact_of_the_kinds_is_rewritten():
    found = probes(kinds=["month"])
    table = known_facts("month")
    assert [one.text for one in found.rewrites] == list(table[table.relation != ""].prompt)
    for one in found.rewrites:
        fact = next(f for f in load_facts("month") if f.prompt == one.text)
        assert (one.new, one.old) == (fact.competitors[0], fact.answer)


def test_rewrite_fills_in_subject_and_old_answer():
    assert rewrite("The capital of France is", " Rome") == ROME
    made = rewrite("Two plus two equals", " six")
    assert (made.text, made.subject, made.old) == ("Two plus two equals", "Two plus two", " four")
    made = rewrite("The capital of the Netherlands is", " Rome")
    assert (made.prompt, made.subject) == ("The capital of the {} is", "Netherlands")


def test_bad_calls_say_what_to_do():
    with pytest.raises(PromptError, match=r"Near: 'The capital of France is'"):
        rewrite("The capital of Frence is", " Rome")
    with pytest.raises(PromptError, match=r"rs.known_facts\(\) lists them"):
        rewrite("zzzz", " Rome")
    with pytest.raises(PromptError, match="`prompt` must be a text; got 3"):
        rewrite(3, " Rome")
    with pytest.raises(PromptError, match="`new` must be an answer with its leading space; got 'Rome'"):
        rewrite("The capital of France is", "Rome")
    with pytest.raises(PromptError, match="`new` must be another answer than the old one"):
        rewrite("The capital of France is", " Paris")
    for bad in (3, "The capital of France is", [], [ROME, None]):
        with pytest.raises(PromptError, match="`rewrites` must be a Rewrite or a sequence of them"):
            probes(bad)
    with pytest.raises(PromptError, match="`kind` must be one of"):
        probes(kinds=["capitals"])
    with pytest.raises(ArgumentError, match="goes with rewrites=None only"):
        probes(ROME, kinds=["capital"])
    with pytest.raises(ArgumentError, match="`seed` must be a whole number in 0"):
        probes(ROME, seed=-1)


@pytest.mark.real
def test_the_real_model_answers_most_paraphrases_and_neighbours():
    from resid_surgery.editing.rewrites import answer_ids, prompt_ids
    from resid_surgery.models.taps import Tap
    from resid_surgery.models.tracing import forward

    model = rs.load("smollm2-135m")
    found = probes(ROME)

    def right(text: str, answer: str | None) -> bool:
        logits = forward(model, torch.tensor([prompt_ids(text, model)]), [Tap("logits")], at=-1)[Tap("logits")]
        return int(logits[0, -1].argmax()) == answer_ids(text, answer or "", model)[0]

    near = of(found, "locality", "same relation")[:9]
    assert sum(right(p.text, p.target) for p in near) >= len(near) / 3
    asked = of(found, "paraphrase")
    assert sum(right(p.text, p.old) for p in asked) >= len(asked) / 3


def test_saved_probes_name_their_contents(tmp_path):
    head = json.loads(save_probes(tmp_path / "p.jsonl", probes(ROME)).read_text().splitlines()[0])
    assert head["hash"] == probes(ROME).hash

"""The built-in facts: enough of them, well formed, spread over their answers."""

import calendar
from collections import Counter
from typing import Any

import pytest

from resid_surgery.errors import PromptError, ResidSurgeryError
from resid_surgery.models.facts import FACT_TYPES, Fact, load_facts

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
each_type = pytest.mark.parametrize("kind", FACT_TYPES)


def answers(kind: str) -> Counter[str]:
    return Counter(fact.answer for fact in load_facts(kind))


def test_the_types_are_the_papers_six() -> None:
    assert FACT_TYPES == ("language", "capital", "country", "colour", "number", "month")


@each_type
def test_each_type_has_at_least_eighty_facts_of_its_kind(kind: str) -> None:
    facts = load_facts(kind)
    assert len(facts) >= 80
    assert all(isinstance(fact, Fact) and fact.kind == kind for fact in facts)
    assert load_facts(kind) is facts  # read once


def test_no_prompt_occurs_twice() -> None:
    counts = Counter(fact.prompt.casefold() for kind in FACT_TYPES for fact in load_facts(kind))
    assert [prompt for prompt, count in counts.items() if count > 1] == []


@each_type
def test_prompts_end_right_before_the_answer(kind: str) -> None:
    for fact in load_facts(kind):
        assert fact.prompt == fact.prompt.strip(), fact
        assert "  " not in fact.prompt, fact
        assert fact.prompt[0].isupper(), fact
        assert fact.prompt[-1].isalnum() or fact.prompt[-1] == ",", fact


@each_type
def test_the_prompt_does_not_give_the_answer_away(kind: str) -> None:
    for fact in load_facts(kind):
        words = "".join(c if c.isalnum() else " " for c in fact.prompt.casefold()).split()
        assert fact.answer.strip().casefold() not in words, fact


@each_type
def test_answers_and_competitors_are_single_words_after_one_space(kind: str) -> None:
    for fact in load_facts(kind):
        for word in (fact.answer, *fact.competitors):
            assert word[0] == " ", fact
            assert word[1:].isalpha(), fact


@each_type
def test_competitors_are_wrong_distinct_and_answers_of_the_same_type(kind: str) -> None:
    known = answers(kind)
    for fact in load_facts(kind):
        assert 2 <= len(fact.competitors) <= 4, fact
        assert len(set(fact.competitors)) == len(fact.competitors), fact
        assert fact.answer not in fact.competitors, fact
        assert set(fact.competitors) <= set(known), fact


@pytest.mark.parametrize("kind", ["language", "capital", "country"])
def test_names_are_spread_over_many_answers(kind: str) -> None:
    assert len(answers(kind)) >= 20


@each_type
def test_no_answer_makes_up_a_large_part_of_its_type(kind: str) -> None:
    counts = answers(kind)
    assert max(counts.values()) <= 0.2 * counts.total()


def test_every_month_is_the_answer_at_least_five_times() -> None:
    counts = answers("month")
    assert set(counts) == {" " + month for month in calendar.month_name[1:]}
    assert min(counts.values()) >= 5


def test_there_are_at_least_nine_colours() -> None:
    assert len(answers("colour")) >= 9


def test_numbers_go_from_one_to_twelve_and_beyond() -> None:
    counts = answers("number")
    assert all(counts[" " + number] >= 2 for number in NUMBERS)
    assert len(counts) > len(NUMBERS)


def test_facts_cannot_be_changed_by_accident() -> None:
    fact = load_facts("capital")[0]
    with pytest.raises(AttributeError):
        fact.answer = " Lyon"  # type: ignore[misc]
    assert fact == load_facts("capital")[0]


def test_an_unknown_kind_names_the_types_and_the_nearest_spelling() -> None:
    with pytest.raises(PromptError) as caught:
        load_facts("colur")
    must = "`kind` must be one of language, capital, country, colour, number, month"
    assert str(caught.value) == f"{must}; got 'colur'. Did you mean 'colour'?"
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ResidSurgeryError)


@pytest.mark.parametrize("bad", ["zzz", "", "Capital city of", None, 3, ["month"]])
def test_every_other_kind_is_refused(bad: Any) -> None:
    with pytest.raises(PromptError, match=r"^`kind` must be one of language, .*; got "):
        load_facts(bad)


@pytest.mark.real
@each_type
def test_every_answer_and_competitor_is_one_token_of_smollm2(kind: str, smollm2: Any) -> None:
    words = {word for fact in load_facts(kind) for word in (fact.answer, *fact.competitors)}
    tokens = {word: smollm2.tokenizer.encode(word, add_special_tokens=False) for word in sorted(words)}
    assert {word: ids for word, ids in tokens.items() if len(ids) != 1} == {}


@pytest.mark.real
@each_type
def test_the_answers_token_follows_the_prompts_tokens(kind: str, smollm2: Any) -> None:
    encode = smollm2.tokenizer.encode
    for fact in load_facts(kind):
        prompt = encode(fact.prompt, add_special_tokens=False)
        answer = encode(fact.answer, add_special_tokens=False)
        assert encode(fact.prompt + fact.answer, add_special_tokens=False) == prompt + answer, fact

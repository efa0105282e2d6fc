"""Prompts: what a specification may hold, and how it is bound to a tokenizer, or refused."""

import string
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import resid_surgery as rs
from resid_surgery.errors import PromptError, ResidSurgeryError
from resid_surgery.models.prompts import BoundPrompt, bind, position_of

WORDS = ("[UNK]", "<s>", "The", " capital", " of", " France", " is", " Paris", " London", " Lyon", " word")


def word_tokenizer(*, bos: bool = False, size: int = tiny.VOCAB) -> Any:
    """A tokenizer of whole words with their leading space, ``size`` of them, offline."""
    words = [*WORDS, *(f" word{i}" for i in range(len(WORDS), size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>")


@dataclass(frozen=True)
class Words:
    """What binding needs of a model, called X."""

    name: str = "X"
    vocab_size: int = tiny.VOCAB
    context: int | None = 64


X = Words()
TOKENIZER = word_tokenizer()
WITH_BOS = word_tokenizer(bos=True)
TEXT = "The capital of France is"


def bound(text: str | None = TEXT, *, tokenizer: Any = TOKENIZER, model: Any = X, **fields: Any) -> BoundPrompt:
    """A prompt bound to the tokenizer of words; the target is " Paris" unless said."""
    return bind(rs.Prompt(text, **({"target": " Paris"} | fields)), tokenizer, model)


def refusal(call: Any) -> str:
    """The message of the `PromptError` that a call is refused with, one line of it."""
    with pytest.raises(PromptError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ResidSurgeryError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the specification --------------------------------------------------------------------------


def test_a_prompt_is_plain_data_that_knows_no_model() -> None:
    prompt = rs.Prompt("The capital of France is", target=" Paris", versus=[" London", 17])
    assert prompt == rs.Prompt(text="The capital of France is", target=" Paris", versus=(" London", 17))
    assert prompt.versus == (" London", 17)
    assert prompt.position == -1
    assert prompt.ids is None
    with pytest.raises(FrozenInstanceError):
        prompt.target = " Rome"  # type: ignore[misc]


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7), np.array([5, 6]), torch.tensor([5, 6]), iter([5, 6])])
def test_any_sequence_of_whole_numbers_serves_as_ids(ids: Any) -> None:
    prompt = rs.Prompt(ids=ids, target=9)
    assert prompt.ids == (5, 6)
    assert {type(i) for i in prompt.ids} == {int}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(target=5), "`Prompt` must be given either text or ids; got (None, None). Pass exactly one of them."),
        (dict(text="a", ids=[1], target=5), "`Prompt` must be given either text or ids; got ('a', [1]). Pass exactly"),
        (dict(text="", target=5), "`text` must be a non-empty string; got ''."),
        (dict(text=7, target=5), "`text` must be a non-empty string; got 7."),
        (dict(text=["a"], target=5), "`text` must be a non-empty string; got ['a']."),
        (dict(text="a"), "`target` must be one token (a string or an id); none was given. Pass target=' Paris'."),
        (dict(text="a", target=True), "`target/versus` must be token strings or token ids; got True."),
        (dict(text="a", target=1.0), "`target/versus` must be token strings or token ids; got 1.0."),
        (dict(text="a", target=[5]), "`target/versus` must be token strings or token ids; got [5]."),
        (dict(text="a", target=5, versus=" b"), "`versus` must be a sequence of tokens; got ' b'. Wrap it in a list."),
        (dict(text="a", target=5, versus=6), "`versus` must be a sequence of tokens; got 6. Wrap it in a list."),
        (dict(text="a", target=5, versus=None), "`versus` must be a sequence of tokens; got None."),
        (dict(text="a", target=5, versus=[None]), "`target/versus` must be token strings or token ids; got None."),
        (dict(text="a", target=5, versus=[False]), "`target/versus` must be token strings or token ids; got False."),
        (dict(ids=[], target=5), "`ids` must be at least one token id; got []."),
        (dict(ids=7, target=5), "`ids` must be a sequence of token ids; got 7."),
        (dict(ids="abc", target=5), "`ids` must be a sequence of token ids; got 'abc'."),
        (dict(ids=b"abc", target=5), "`ids` must be a sequence of token ids; got b'abc'."),
        (dict(ids=[5, -1], target=5), "`ids` must be a whole number >= 0; got -1."),
        (dict(ids=[5, 1.5], target=5), "`ids` must be a whole number >= 0; got 1.5."),
        (dict(ids=[True], target=5), "`ids` must be a whole number >= 0; got True."),
        (dict(ids=["5"], target=5), "`ids` must be a whole number >= 0; got '5'."),
        (dict(ids=[[5, 6]], target=5), "`ids` must be a whole number >= 0; got [5, 6]."),
        (dict(ids=torch.tensor([[5, 6]]), target=5), "`ids` must be a whole number >= 0; got tensor([5, 6])."),
        (dict(ids=torch.tensor([5.0]), target=5), "`ids` must be a whole number >= 0; got tensor(5.)."),
        (dict(ids=np.array([[5, 6]]), target=5), "`ids` must be a whole number >= 0; got array([5, 6])."),
        (dict(ids=[5], target=5, position=True), "`position` must be an index or the text of one token; got True."),
        (dict(ids=[5], target=5, position=1.5), "`position` must be an index or the text of one token; got 1.5."),
        (dict(ids=[5], target=5, position=None), "`position` must be an index or the text of one token; got None."),
        (dict(ids=[5], target=5, position=[0]), "`position` must be an index or the text of one token; got [0]."),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_refused_when_the_prompt_is_made(fields: dict[str, Any], said: str) -> None:
    assert refusal(lambda: rs.Prompt(**fields)).startswith(said)


@pytest.mark.parametrize("prompt", ["The capital", None, [5, 6], {"text": "a"}])
def test_only_a_prompt_can_be_bound(prompt: Any) -> None:
    said = refusal(lambda: bind(prompt, TOKENIZER, X))
    assert said == f"`prompt` must be a resid_surgery.Prompt; got {prompt!r}."


# --- tokens -------------------------------------------------------------------------------------


def test_text_is_bound_to_the_tokens_that_the_tokenizer_gives() -> None:
    got = bound(versus=[" London", 9])
    assert got.ids == (2, 3, 4, 5, 6)
    assert got.tokens == ("The", " capital", " of", " France", " is")
    assert (got.position, got.target, got.versus) == (4, 7, (8, 9))
    assert got.readouts == (7, 8, 9)
    assert got.names == {7: " Paris", 8: " London", 9: " Lyon"}
    assert got.roles() == [(7, " Paris", "target"), (8, " London", "versus"), (9, " Lyon", "versus")]


def test_a_bos_that_the_tokenizer_adds_is_used_and_shown() -> None:
    got = bound(tokenizer=WITH_BOS)
    assert got.ids == (1, 2, 3, 4, 5, 6)
    assert got.tokens[0] == "<s>"
    assert got.position == 5
    assert got.target == 7  # no BOS is put before a target
    assert bound(tokenizer=WITH_BOS, position=0).tokens[0] == "<s>"


def test_a_bos_reaches_the_model_and_its_recording() -> None:
    module = tiny.build("llama")
    model = rs.load(module, tokenizer=WITH_BOS)
    rec = rs.record(model, rs.Prompt(TEXT, target=" Paris"))
    assert rec.prompt.tokens == ("<s>", "The", " capital", " of", " France", " is")
    with torch.no_grad():
        logits = module(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[0, -1]
        without = module(torch.tensor([[2, 3, 4, 5, 6]])).logits[0, -1]
    assert torch.allclose(rec.logits, logits, atol=1e-9)
    assert not torch.allclose(rec.logits, without, atol=1e-3)


def test_ids_are_used_exactly_as_given_without_a_bos() -> None:
    got = bind(rs.Prompt(ids=[2, 3], target=7), WITH_BOS, X)
    assert got.ids == (2, 3)
    assert got.tokens == ("The", " capital")


def test_a_model_without_a_tokenizer_takes_ids_and_shows_numbers() -> None:
    got = bind(rs.Prompt(ids=[2, 3], target=7, versus=[8]), None, X)
    assert got.tokens == ("#2", "#3")
    assert got.names == {7: "#7", 8: "#8"}


def test_a_model_without_a_tokenizer_refuses_text_and_says_what_to_do() -> None:
    said = refusal(lambda: bound(tokenizer=None))
    assert said == (
        "X was opened without a tokenizer, so text cannot be used. "
        "Pass Prompt(ids=[...]), or open the model with tokenizer=."
    )


@pytest.mark.parametrize(("name", "fields"), [("target", {"target": " Paris"}), ("versus", {"versus": [" Paris"]})])
def test_a_model_without_a_tokenizer_refuses_token_texts(name: str, fields: dict[str, Any]) -> None:
    prompt = rs.Prompt(ids=[2, 3], **({"target": 9} | fields))
    said = refusal(lambda: bind(prompt, None, X))
    assert said == f"`{name}` must be a token id for X, which was opened without a tokenizer; got ' Paris'."


@pytest.mark.parametrize("name", ["target", "versus"])
def test_a_word_of_several_tokens_lists_its_pieces_and_says_what_to_do(name: str) -> None:
    fields = {"target": " Paris Lyon"} if name == "target" else {"versus": [" Paris Lyon"]}
    assert refusal(lambda: bound(**({"target": " London"} | fields))) == (
        f"`{name}` must be one token of X; ' Paris Lyon' is 2: ' Paris' (id 7), ' Lyon' (id 9). "
        f"Study its first piece with {name}=' Paris' or id 7, or choose a word that is one token."
    )


def test_an_empty_target_is_no_token() -> None:
    said = refusal(lambda: bound(target=""))
    assert said == "`target` must be one token of X; got '', which is no token at all."


@pytest.mark.parametrize("name", ["target", "versus"])
def test_a_word_that_the_vocabulary_does_not_have_is_not_taken_for_the_unknown_token(name: str) -> None:
    fields = {"target": " Bordeaux"} if name == "target" else {"versus": [" Bordeaux"]}
    said = refusal(lambda: bound(**fields))
    assert said.startswith(f"`{name}` must be ")
    assert "' Bordeaux'" in said
    assert "[UNK]" in said


def test_the_unknown_token_itself_can_be_studied() -> None:
    assert bound(target="[UNK]").target == 0
    assert bound(target=0).target == 0


@pytest.mark.parametrize(
    ("fields", "name", "got"),
    [
        ({"target": 97}, "target", 97),
        ({"target": -1}, "target", -1),
        ({"versus": [8, 97]}, "versus", 97),
        ({"versus": [-2]}, "versus", -2),
    ],
    ids=str,
)
def test_an_id_outside_the_vocabulary_is_refused(fields: dict[str, Any], name: str, got: int) -> None:
    said = refusal(lambda: bound(**fields))
    assert said == f"`{name}` must be a whole number in 0..96 for X; got {got}."


def test_a_prompt_id_outside_the_vocabulary_is_refused() -> None:
    said = refusal(lambda: bind(rs.Prompt(ids=[5, 97], target=9), None, X))
    assert said == "`ids` must be a whole number in 0..96 for X; got 97."


def test_a_tokenizer_of_another_model_is_found_out_by_the_prompt() -> None:
    said = refusal(lambda: bound("The word100", tokenizer=word_tokenizer(size=120)))
    assert said == "the tokenizer gives id 100 but X has 97 tokens: it does not belong to this model."


@pytest.mark.parametrize("fields", [{"target": " word100"}, {"versus": [" word100"]}], ids=str)
def test_a_tokenizer_of_another_model_is_found_out_by_the_target(fields: dict[str, Any]) -> None:
    said = refusal(lambda: bound(tokenizer=word_tokenizer(size=120), **fields))
    assert "100" in said
    assert "X" in said


@pytest.mark.parametrize(
    ("target", "versus"),
    [
        (" Paris", [" Paris"]),
        (" Paris", [7]),
        (7, [" London", " Paris"]),
        (" Paris", [" London", " London"]),
        (" Paris", [" London", 8]),
    ],
)
def test_the_target_and_its_competitors_must_differ(target: Any, versus: list[Any]) -> None:
    said = refusal(lambda: bound(target=target, versus=versus))
    assert said == f"`versus` must be distinct tokens other than the target for X; got {versus!r}."


def test_text_that_is_no_unicode_is_refused() -> None:
    wanted = "`text` must be valid Unicode, without lone surrogates; got {}."
    assert refusal(lambda: bound("a \ud83d")) == wanted.format("\"'a \\\\ud83d'\"")
    assert refusal(lambda: bound(target="\udc00")) == wanted.format("\"'\\\\udc00'\"")


def test_text_without_any_token_is_refused() -> None:
    class Deaf:
        """A tokenizer that finds nothing."""

        unk_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [7] if text == " Paris" else []

        def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
            return "".join(WORDS[i] for i in ids)

    said = refusal(lambda: bound(" ", tokenizer=Deaf()))
    assert said == "the prompt must have at least one token for X; got ' '."


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    model = tiny.shared("llama")
    assert model.context == 64
    said = refusal(lambda: rs.record(model, rs.Prompt(ids=[5] * 65, target=9)))
    assert said == f"the prompt has 65 tokens but {model.name} reads at most 64."
    assert rs.record(model, rs.Prompt(ids=[5] * 64, target=9)).n_positions == 64


def test_a_model_without_a_stated_context_takes_any_length() -> None:
    got = bind(rs.Prompt(ids=[5] * 500, target=9), None, Words(context=None))
    assert len(got.ids) == 500


# --- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "at"),
    [(0, 0), (4, 4), (-1, 4), (-5, 0), (np.int64(2), 2), ("The", 0), (" France", 3), ("France", 3), (" is", 4)],
)
def test_the_predicting_position_is_an_index_or_the_text_of_a_token(position: Any, at: int) -> None:
    assert bound(position=position).position == at


def test_a_zero_dimensional_tensor_is_an_index_like_any_other() -> None:
    assert bound(position=torch.tensor(2)).position == 2
    assert bound().positions(torch.tensor(2)) == (2,)


@pytest.mark.parametrize("position", [5, -6, 100])
def test_a_position_out_of_range_is_refused(position: int) -> None:
    said = refusal(lambda: bound(position=position))
    assert said.startswith("`position")
    assert f"must be a whole number in -5..4; got {position}. Count from the end with -1" in said


def test_the_exact_text_goes_before_the_text_without_its_space() -> None:
    assert position_of("Paris", ["Paris", " is", " Paris"]) == 0
    assert position_of(" Paris", ["Paris", " is", " Paris"]) == 2


def test_an_ambiguous_token_text_lists_the_candidates() -> None:
    said = refusal(lambda: bound("The capital is Paris is", target=" Lyon", position=" is"))
    assert said == "position ' is' is ambiguous; candidates are 2: ' is', 4: ' is'. Give the index instead."
    assert refusal(lambda: bound("The capital is Paris is", target=" Lyon", position="is")) == said.replace(
        "' is' is amb", "'is' is amb"
    )


@pytest.mark.parametrize("text", ["Rome", "", " ", "capital of", "franc"])
def test_an_absent_token_text_lists_every_token(text: str) -> None:
    said = refusal(lambda: bound(position=text))
    assert said == (
        f"position {text!r} is not a token of the prompt; candidates are 0: 'The', 1: ' capital', 2: ' of', "
        "3: ' France', 4: ' is'. Give the index instead."
    )


@pytest.mark.parametrize("word", ["target", "all"])
def test_words_for_positions_of_interventions_name_no_predicting_position(word: str) -> None:
    assert f"{word!r}" in refusal(lambda: bound(position=word))
    assert f"{word!r}" in refusal(lambda: bound("The", position=word))


def test_positions_of_interventions() -> None:
    got = bound(position=2)
    assert got.positions("target") == (2,)
    assert got.positions("all") == (0, 1, 2, 3, 4)
    assert got.positions(-1) == (4,)
    assert got.positions([0, -5, "France", 3, "target"]) == (0, 3, 2)
    assert got.positions(np.array([1, 2])) == (1, 2)


@pytest.mark.parametrize(
    ("given_positions", "said"),
    [
        (5, "`positions` must be a whole number in -5..4; got 5. Count from the end with -1, or name a token"),
        ([0, 9], "`positions` must be a whole number in -5..4; got 9."),
        ([], "`positions` must be at least one position; got []."),
        (True, "`positions` must be a whole number in -5..4; got True."),
        (1.5, "`positions` must be a whole number in -5..4; got 1.5."),
        (None, "`positions` must be a whole number in -5..4; got None."),
        (["Rome"], "position 'Rome' is not a token of the prompt; candidates are 0: 'The', "),
    ],
    ids=str,
)
def test_positions_that_the_prompt_does_not_have_are_refused(given_positions: Any, said: str) -> None:
    assert refusal(lambda: bound().positions(given_positions)).startswith(said)


# --- properties ---------------------------------------------------------------------------------

ids_of_the_vocabulary = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=64)
readouts = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=5, unique=True)


@given(
    ids=ids_of_the_vocabulary, named=readouts, data=st.data(), tokenizer=st.sampled_from([None, TOKENIZER, WITH_BOS])
)
def test_any_ids_of_the_vocabulary_bind_and_come_back(
    ids: list[int], named: list[int], data: st.DataObject, tokenizer: Any
) -> None:
    position = data.draw(st.integers(-len(ids), len(ids) - 1))
    prompt = rs.Prompt(ids=ids, target=named[0], versus=named[1:], position=position)
    got = bind(prompt, tokenizer, X)
    assert list(got.ids) == ids
    assert list(got.readouts) == named
    assert got.position == position % len(ids)
    assert got.source is prompt
    shown = [f"#{i}" for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]
    assert list(got.tokens) == shown
    again = bind(rs.Prompt(ids=got.ids, target=got.target, versus=got.versus, position=got.position), tokenizer, X)
    assert replace(again, source=prompt) == got


@given(words=st.lists(st.sampled_from(WORDS[3:]), max_size=20), bos=st.booleans())
def test_any_text_of_known_words_binds_to_those_words(words: list[str], bos: bool) -> None:
    got = bound("The" + "".join(words), tokenizer=WITH_BOS if bos else TOKENIZER)
    assert got.tokens == (*(["<s>"] if bos else []), "The", *words)


@given(ids=ids_of_the_vocabulary, data=st.data())
def test_any_positions_within_the_prompt_are_sorted_out_once_each(ids: list[int], data: st.DataObject) -> None:
    n = len(ids)
    wanted = data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=8))
    found = bind(rs.Prompt(ids=ids, target=0), None, X).positions(wanted)
    assert found == tuple(dict.fromkeys(p % n for p in wanted))


@given(
    st.lists(st.sampled_from(["a", " a", "b", " b", "c"]), min_size=1, max_size=6), st.sampled_from(["a", "b", " b"])
)
def test_a_token_text_finds_the_one_position_that_has_it_or_none(tokens: list[str], text: str) -> None:
    exact = [i for i, token in enumerate(tokens) if token == text]
    loose = [i for i, token in enumerate(tokens) if token.strip() == text.strip()]
    hits = exact or loose
    if len(hits) == 1:
        assert position_of(text, tokens) == hits[0]
    else:
        with pytest.raises(PromptError, match="is ambiguous" if hits else "is not a token of the prompt"):
            position_of(text, tokens)


# --- the real tokenizer -------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_reads_the_capital_of_france_without_a_bos(smollm2: Any) -> None:
    got = bind(rs.Prompt(TEXT, target=" Paris", versus=[" London", " Lyon"]), smollm2.tokenizer, smollm2)
    assert got.tokens == ("The", " capital", " of", " France", " is")
    assert got.position == 4
    assert got.names == {got.target: " Paris", got.versus[0]: " London", got.versus[1]: " Lyon"}
    assert bind(rs.Prompt(ids=got.ids, target=got.target), smollm2.tokenizer, smollm2).tokens == got.tokens


@pytest.mark.real
def test_smollm2_splits_bordeaux_and_says_which_piece_to_study(smollm2: Any) -> None:
    said = refusal(lambda: bind(rs.Prompt(TEXT, target=" Bordeaux"), smollm2.tokenizer, smollm2))
    pieces = smollm2.tokenizer.encode(" Bordeaux", add_special_tokens=False)
    assert said == (
        f"`target` must be one token of SmolLM2-135M-Instruct; ' Bordeaux' is 3: ' B' (id {pieces[0]}), "
        f"'orde' (id {pieces[1]}), 'aux' (id {pieces[2]}). "
        f"Study its first piece with target=' B' or id {pieces[0]}, or choose a word that is one token."
    )
    first = bind(rs.Prompt(TEXT, target=" B"), smollm2.tokenizer, smollm2)
    assert first.target == pieces[0]
    competitor = rs.Prompt(TEXT, target=" Paris", versus=[" Bordeaux"])
    assert refusal(lambda: bind(competitor, smollm2.tokenizer, smollm2)).startswith("`versus` must be one token of")


@pytest.mark.real
def test_smollm2_takes_a_target_with_and_without_its_space_for_two_tokens(smollm2: Any) -> None:
    got = bind(rs.Prompt(TEXT, target=" Paris", versus=["Paris"]), smollm2.tokenizer, smollm2)
    assert got.target != got.versus[0]
    assert list(got.names.values()) == [" Paris", "Paris"]


@pytest.mark.real
def test_smollm2_lists_the_candidates_of_a_repeated_token(smollm2: Any) -> None:
    prompt = rs.Prompt("Paris is where Paris is", target=" Lyon", position=" is")
    said = refusal(lambda: bind(prompt, smollm2.tokenizer, smollm2))
    assert said == "position ' is' is ambiguous; candidates are 1: ' is', 4: ' is'. Give the index instead."
    by_index = rs.Prompt("Paris is where Paris is", target=" Lyon", position=-4)
    assert bind(by_index, smollm2.tokenizer, smollm2).position == 1


@pytest.mark.real
@given(ids=st.lists(st.integers(0, 49151), min_size=1, max_size=30))
def test_any_ids_of_smollm2_bind_and_come_back(smollm2: Any, ids: list[int]) -> None:
    got = bind(rs.Prompt(ids=ids, target=0), smollm2.tokenizer, smollm2)
    assert list(got.ids) == ids
    assert len(got.tokens) == len(ids)


@pytest.mark.real
@given(text=st.text(string.ascii_letters + string.digits + string.punctuation + " \néüßñ中文", min_size=1, max_size=30))
def test_any_text_binds_to_the_tokens_of_smollm2(smollm2: Any, text: str) -> None:
    got = bind(rs.Prompt(text, target=" Paris"), smollm2.tokenizer, smollm2)
    assert list(got.ids) == smollm2.tokenizer.encode(text)
    assert smollm2.tokenizer.decode(list(got.ids), clean_up_tokenization_spaces=False) == text

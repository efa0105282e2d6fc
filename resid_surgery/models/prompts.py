"""Prompts: a specification, bound to a tokenizer when it is recorded.

A `Prompt` is plain data and knows no model. `bind` turns it into token ids, one target id, the
competitors' ids and one predicting position, or says exactly why it cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from resid_surgery._check import index_of, iterable, message, whole
from resid_surgery._html import face_html
from resid_surgery.errors import PromptError


class Vocabulary(Protocol):
    """What binding a prompt needs to know of a model."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int | None: ...


@final
@dataclass(frozen=True)
class Prompt:
    """What to predict from: text or ids, a target token, competitors, a predicting position.

    Args:
        text: the prompt as text; tokenised with the tokenizer's own special tokens (a BOS where
            the tokenizer adds one; the tokens used are always shown).
        target: the token whose prediction is studied: a string that is one token (mind the
            leading space: " Paris"), or its id.
        versus: competing tokens, likewise.
        ids: token ids instead of text; used exactly as given.
        position: the predicting position: an index (-1 is the last), or the text of one token.

    Raises:
        PromptError: neither or both of text and ids are given, or a field has the wrong type.

    Example:
        >>> Prompt("The capital of France is", target=" Paris", versus=[" London", " Lyon"]).versus
        (' London', ' Lyon')
    """

    text: str | None = None
    target: str | int | None = None
    versus: Sequence[str | int] = ()
    ids: Sequence[int] | None = None
    position: int | str = -1

    def __post_init__(self) -> None:
        if (self.text is None) == (self.ids is None):
            raise PromptError(
                message("Prompt", "given either text or ids", (self.text, self.ids), do="Pass exactly one of them.")
            )
        if self.text is not None and (not isinstance(self.text, str) or not self.text):
            raise PromptError(message("text", "a non-empty string", self.text))
        if self.target is None:
            raise PromptError("`target` must be one token (a string or an id); none was given. Pass target=' Paris'.")
        if not iterable(self.versus) or isinstance(self.versus, Mapping):
            raise PromptError(message("versus", "a sequence of tokens", self.versus, do="Wrap it in a list."))
        object.__setattr__(self, "versus", tuple(self.versus))
        if self.ids is not None:
            object.__setattr__(self, "ids", _as_ids(self.ids))
        object.__setattr__(self, "target", _plain_token(self.target))
        object.__setattr__(self, "versus", tuple(_plain_token(token) for token in self.versus))
        for token in (self.target, *self.versus):
            if not isinstance(token, str) and index_of(token) is None:
                raise PromptError(message("target/versus", "token strings or token ids", token))
        if not isinstance(self.position, str) and index_of(self.position) is None:
            raise PromptError(message("position", "an index or the text of one token", self.position))

    def _repr_html_(self) -> str:
        said = {"text": self.text} if self.ids is None else {"ids": list(self.ids)}
        rest = {"target": self.target, "versus": list(self.versus), "position": self.position}
        return face_html("Prompt", said | rest)


def _plain_token(token: Any) -> Any:
    """An id as a plain int, so that prompts compare and hash as values; anything else as it is."""
    number = index_of(token)
    return token if number is None else number


@final
@dataclass(frozen=True)
class BoundPrompt:
    """A prompt as a model sees it.

    Attributes:
        ids: (position,) token ids. tokens: their texts.
        position: the predicting position t.
        target: target id. versus: competitor ids.
        names: id -> text, for the target and its competitors.
        source: the specification that was bound.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    position: int
    target: int
    versus: tuple[int, ...]
    names: dict[int, str]
    source: Prompt

    @property
    def readouts(self) -> tuple[int, ...]:
        """Target id, then the competitors' ids."""
        return (self.target, *self.versus)

    def said(self) -> dict[str, str]:
        """What a table of many prompts says of one: its text (or ids) and its target."""
        text = self.source.text if self.source.text is not None else " ".join(map(str, self.ids))
        return {"text": text, "target": self.names[self.target]}

    def roles(self) -> list[tuple[int, str, str]]:
        """(id, text, role) of the target and each competitor."""
        return [(t, self.names[t], "target" if i == 0 else "versus") for i, t in enumerate(self.readouts)]

    def positions(self, given: Any) -> tuple[int, ...]:
        """Positions from "target", "all", an index, indices, or the text of one token.

        Raises:
            PromptError: out of range, or a token text that is absent or ambiguous (the candidates
                are listed).
        """
        if isinstance(given, str):
            if given == "target":
                return (self.position,)
            if given == "all":
                return tuple(range(len(self.ids)))
            return (position_of(given, self.tokens),)
        if index_of(given) is None and iterable(given):
            out = tuple(dict.fromkeys(p for one in given for p in self._position(one)))
            if not out:
                raise PromptError(message("positions", "at least one position", given))
            return out
        return (_position(given, self.tokens, "positions"),)

    def _position(self, given: Any) -> tuple[int, ...]:
        """Those of one member of a sequence, which is no sequence itself."""
        if iterable(given):
            raise PromptError(message("positions", "indices or tokens' texts", given))
        return self.positions(given)


def bind(prompt: Prompt, tokenizer: Any, model: Vocabulary) -> BoundPrompt:
    """Tokenise a prompt for a model, or say why that is impossible.

    Raises:
        PromptError: a target or competitor is not one token of the vocabulary, two of them are
            the same, the prompt is empty or longer than the context, or the position is unknown.
    """
    if not isinstance(prompt, Prompt):
        raise PromptError(message("prompt", "a resid_surgery.Prompt", prompt))
    ids = _prompt_ids(prompt, tokenizer, model)
    target = token_id(prompt.target, tokenizer, model, "target")
    versus = tuple(token_id(token, tokenizer, model, "versus") for token in prompt.versus)
    if len({target, *versus}) != 1 + len(versus):
        raise PromptError(
            message("versus", "distinct tokens other than the target", list(prompt.versus), model=model.name)
        )
    tokens = tuple(token_text(i, tokenizer) for i in ids)
    names = {i: token_text(i, tokenizer) for i in (target, *versus)}
    at = _position(prompt.position, tokens)
    return BoundPrompt(ids, tokens, at, target, versus, names, prompt)


def token_id(token: Any, tokenizer: Any, model: Vocabulary, name: str) -> int:
    """The id of one token given as text or id.

    Raises:
        PromptError: the string is not one token (its pieces are listed), there is no tokenizer,
            or the id is out of range.
    """
    if not isinstance(token, str):
        return whole(name, token, 0, model.vocab_size - 1, model=model.name, error=PromptError)
    if tokenizer is None:
        raise PromptError(
            f"`{name}` must be a token id for {model.name}, which was opened without a tokenizer; got {token!r}."
        )
    pieces = encode(tokenizer, token, add_special_tokens=False)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in pieces and token != getattr(tokenizer, "unk_token", None):
        raise PromptError(
            f"`{name}` must be one token of {model.name}; its tokenizer does not know {token!r} and reads it as "
            f"{token_text(unknown, tokenizer)!r}. Choose a word of its vocabulary."
        )
    if len(pieces) == 1:
        return _in_vocabulary(pieces, model)[0]
    if not pieces:
        raise PromptError(f"`{name}` must be one token of {model.name}; got {token!r}, which is no token at all.")
    shown = ", ".join(f"{token_text(i, tokenizer)!r} (id {i})" for i in pieces)
    first = token_text(pieces[0], tokenizer)
    whole_text = encode(tokenizer, first, add_special_tokens=False) == pieces[:1]
    piece = f"{name}={first!r} or id {pieces[0]}" if whole_text else f"{name}={pieces[0]}"
    raise PromptError(
        f"`{name}` must be one token of {model.name}; {token!r} is {len(pieces)}: {shown}. "
        f"Study its first piece with {piece}, or choose a word that is one token."
    )


def encode(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        PromptError: the tokenizer does not give plain ids.
    """
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise PromptError(message("text", "valid Unicode, without lone surrogates", ascii(text)))
    ids = tokenizer.encode(text, **options)
    if not isinstance(ids, (list, tuple)):
        raise PromptError(
            f"`tokenizer` must be a Hugging Face tokenizer, whose encode gives a list of ids; "
            f"{type(tokenizer).__name__}.encode gave a {type(ids).__name__}. Wrap it in PreTrainedTokenizerFast."
        )
    return [int(i) for i in ids]


def token_text(token: int, tokenizer: Any) -> str:
    """The text of one token; ``#17`` where there is no tokenizer."""
    if tokenizer is None:
        return f"#{token}"
    try:
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    except TypeError:  # a tokenizer that never cleans up has no such option
        return str(tokenizer.decode([token]))


def position_of(text: str, tokens: Sequence[str]) -> int:
    """The position of the one token whose text is `text` (a leading space may be left out).

    Raises:
        PromptError: no token, or several, have that text; the candidates are listed.
    """
    hits = [i for i, token in enumerate(tokens) if token == text]
    hits = hits or [i for i, token in enumerate(tokens) if token.strip() == text.strip() != ""]
    if len(hits) == 1:
        return hits[0]
    listed = ", ".join(f"{i}: {token!r}" for i, token in enumerate(tokens) if not hits or i in hits)
    fault = "is ambiguous" if hits else "is not a token of the prompt"
    raise PromptError(f"position {text!r} {fault}; candidates are {listed}. Give the index instead.")


def _position(given: Any, tokens: Sequence[str], name: str = "position") -> int:
    if isinstance(given, str):
        return position_of(given, tokens)
    do = "Count from the end with -1, or name a token by its text."
    return whole(name, given, -len(tokens), len(tokens) - 1, do=do, error=PromptError) % len(tokens)


def _prompt_ids(prompt: Prompt, tokenizer: Any, model: Vocabulary) -> tuple[int, ...]:
    if prompt.ids is not None:
        ids = tuple(whole("ids", i, 0, model.vocab_size - 1, model=model.name, error=PromptError) for i in prompt.ids)
    elif tokenizer is None:
        raise PromptError(
            f"{model.name} was opened without a tokenizer, so text cannot be used. "
            "Pass Prompt(ids=[...]), or open the model with tokenizer=."
        )
    else:
        ids = tuple(_in_vocabulary(encode(tokenizer, str(prompt.text)), model))
    if not ids:
        raise PromptError(f"the prompt must have at least one token for {model.name}; got {prompt.text!r}.")
    if model.context is not None and len(ids) > model.context:
        raise PromptError(f"the prompt has {len(ids)} tokens but {model.name} reads at most {model.context}.")
    return ids


def _in_vocabulary(ids: list[int], model: Vocabulary) -> list[int]:
    over = [i for i in ids if i >= model.vocab_size]
    if over:
        raise PromptError(
            f"the tokenizer gives id {over[0]} but {model.name} has {model.vocab_size} tokens: "
            "it does not belong to this model."
        )
    return ids


def _as_ids(given: Any) -> tuple[int, ...]:
    if not iterable(given):
        raise PromptError(message("ids", "a sequence of token ids", given))
    ids = tuple(whole("ids", i, 0, error=PromptError) for i in given)
    if not ids:
        raise PromptError(message("ids", "at least one token id", list(ids)))
    return ids

"""Rewrites: what a knowledge edit is asked to change, as plain data."""

from dataclasses import asdict, dataclass
from typing import Any, final

from resid_surgery._check import message, shown, text
from resid_surgery.errors import PromptError
from resid_surgery.models.prompts import Prompt, bind, encode


@final
@dataclass(frozen=True)
class Rewrite:
    """One fact to rewrite: after `prompt`, say `new` instead of `old`.

    Args:
        prompt: ends right before the answer, without a trailing space; ``{}`` stands for the subject.
        subject: what the fact is about; its text stands in the prompt (the last time counts).
        new: the new answer with its leading space (" Rome"); one token or several. None where the old one is only to
            go (an erasing edit).
        old: the answer before, or None where it is not known.
        name: of the fact in tables; the filled prompt if left out.

    Raises:
        PromptError: a field is empty or no text, or the subject does not stand in the prompt.

    Example:
        >>> Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris").text
        'The capital of France is'
    """

    prompt: str
    subject: str
    new: str | None = None
    old: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("prompt", "subject"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise PromptError(message(field, "a non-empty text", value))
        for field in ("new", "old"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise PromptError(message(field, "a non-empty text or None", value))
        text("name", self.name, error=PromptError)
        if self.new is None and self.old is None:
            raise PromptError("`new` must be given (the answer that is wanted), or `old` (the answer that is to go).")
        if self.old == self.new:
            raise PromptError(message("new", "another answer than the old one", self.new))
        if self.subject not in self.text:
            raise PromptError(message("subject", f"a part of the prompt {shown(self.text)}", self.subject,
                                      do="Write {} in the prompt where the subject stands."))  # fmt: skip
        if self.text != self.text.rstrip():
            raise PromptError(message("prompt", "without a trailing space (the answer brings its own)", self.text))

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.text

    @property
    def sentence(self) -> str:
        """The new fact as a sentence: "The capital of France is Rome."."""
        return f"{self.text}{self.wanted}."

    @property
    def wanted(self) -> str:
        """The new answer.

        Raises:
            PromptError: the rewrite has none.
        """
        if self.new is None:
            raise PromptError(f"`new` must be given to rewrite {self.text!r}: it names no answer that is wanted.")
        return self.new

    def said(self) -> dict[str, Any]:
        """As plain data, for storing."""
        return asdict(self)


def prompt_ids(text: str, model: Any) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own special tokens.

    Raises:
        PromptError: the model has no tokenizer, or the text is empty or too long.
    """
    return list(bind(Prompt(text, target=0), model.tokenizer, model).ids)


def answer_ids(text: str, answer: str, model: Any) -> list[int]:
    """Token ids of an answer where it continues a text: the joint text's tokens behind the prompt's.

    Where the joint text is not tokenised as prompt + answer (they merge at the seam), the answer's own tokens.

    Raises:
        PromptError: the answer is no token at all.
    """
    before, joint = prompt_ids(text, model), prompt_ids(text + answer, model)
    merged = joint[: len(before)] != before
    own = encode(model.tokenizer, answer, add_special_tokens=False) if merged else joint[len(before) :]
    if not own:
        raise PromptError(message("new", "at least one token", answer, model=model.name))
    return own


def subject_position(text: str, subject: str, model: Any) -> int:
    """Index of the token with which the subject ends in a prompt (the last time that it stands there).

    Raises:
        PromptError: the subject does not stand in the text.
    """
    if subject not in text:
        raise PromptError(message("subject", f"a part of {text!r}", subject))
    end = text.rindex(subject) + len(subject)
    ids = prompt_ids(text, model)
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    plain = [None if token in special else token for token in ids]
    for at in range(len(ids)):
        seen = _joined([token for token in plain[: at + 1] if token is not None], model.tokenizer)
        if seen.lstrip().startswith(text[:end].lstrip()):
            return at
    raise PromptError(
        f"the tokens of {text!r} do not add up to its text for {model.name}, so where {subject!r} ends is not known. "
        "Write it in words that its tokenizer knows."
    )


def _joined(ids: list[int], tokenizer: Any) -> str:
    """The text of tokens together: a character may be spread over several."""
    try:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    except TypeError:  # a tokenizer that never cleans up has no such option
        return str(tokenizer.decode(ids))

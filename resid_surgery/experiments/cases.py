"""Cases: the prompts of a run as plain data, each with labels for its rows and donors for patching."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, final

import xxhash

from resid_surgery import _check
from resid_surgery._files import parse_json, text_lines, utf8
from resid_surgery.errors import ArgumentError, LoadError, PromptError, ResidSurgeryError
from resid_surgery.models.prompts import Prompt

PROMPT_FIELDS = ("text", "ids", "target", "versus", "position")
LARGEST_BYTES = 4 << 30


@final
@dataclass(frozen=True)
class Case:
    """One prompt of a run.

    Attributes:
        prompt: what is predicted. labels: name -> number, text or None, columns of every row of this prompt (a
            relation, a template, a split). donors: name -> prompts that a plan's `Patch` or `Mean` may take values
            from, as ``"$corrupt"``.

    Example:
        >>> Case(Prompt("The capital of France is", target=" Paris"), labels={"relation": "capital"}).labels["relation"]
        'capital'
    """

    prompt: Prompt
    labels: Mapping[str, Any] = field(default_factory=dict)
    donors: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, Prompt):
            raise PromptError(_check.message("prompt", "a resid_surgery.Prompt", self.prompt))
        object.__setattr__(self, "labels", _labels(self.labels))
        object.__setattr__(self, "donors", _donors(self.donors))

    def entry(self) -> dict[str, Any]:
        """As one JSON object: the prompt's fields, ``donors``, and every label beside them."""
        out = prompt_entry(self.prompt) | dict(self.labels)
        if self.donors:
            out["donors"] = {name: [prompt_entry(one) for one in many] for name, many in self.donors.items()}
        return out


def as_cases(given: Any) -> list[Case]:
    """Prompts, mappings or cases as cases.

    Raises:
        PromptError: one cannot be read; its number is named. ArgumentError: it is no list, or an empty one.
    """
    if isinstance(given, (str, bytes, Prompt, Case, Mapping)) or not _check.iterable(given):
        raise ArgumentError(
            _check.message("prompts", "a sequence of prompts", given, do="Wrap a single one in a list.")
        )
    cases = [_numbered(number, one) for number, one in enumerate(given)]
    if not cases:
        raise ArgumentError(_check.message("prompts", "at least one prompt", cases))
    return cases


def read_cases(path: Any) -> list[Case]:
    """Read prompts from JSON lines, one object each: ``{"text": ..., "target": ..., "versus": [...]}``.

    Further keys are labels, which become columns; ``"donors": {"corrupt": {...}}`` holds prompts to patch from.

    Args:
        path: of the file.

    Returns:
        One `Case` a line.

    Raises:
        PromptError: a line is no prompt; it is named. ArgumentError: no path. LoadError: the file cannot be read.
    """
    file = _check.path("path", path, "the path of a file of JSON lines")
    cases = []
    try:
        for number, line in enumerate(text_lines(file, LARGEST_BYTES), 1):
            if line.strip():
                cases.append(_from_line(line, f"line {number} of {file}"))
    except (OSError, UnicodeError) as error:
        raise LoadError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not cases:
        raise PromptError(f"{file} has no prompt in it: one JSON object a line is wanted.")
    return cases


def _from_line(line: bytes, where: str) -> Case:
    try:
        return as_case(parse_json(line))
    except UnicodeDecodeError as error:
        raise PromptError(f"{where} must be JSON in UTF-8; {error.reason}.") from None
    except (ResidSurgeryError, ValueError) as error:
        raise PromptError(f'{where} must be {{"text": ..., "target": ...}}: {error}') from None


def lines_of(cases: Sequence[Case]) -> bytes:
    """Cases as JSON lines."""
    return b"".join(utf8(json.dumps(one.entry(), ensure_ascii=False)) + b"\n" for one in cases)


def hash_of(cases: Sequence[Case]) -> str:
    """Equal for equal prompts, labels and donors in the same order."""
    return xxhash.xxh3_128_hexdigest(lines_of(cases))


def as_case(given: Any) -> Case:
    """A case from a `Case`, a `Prompt` or a mapping of a prompt's fields, donors and labels.

    Raises:
        PromptError: it is none of these, or a field is no good.
    """
    if isinstance(given, Case):
        return given
    if isinstance(given, Prompt):
        return Case(given)
    if not isinstance(given, Mapping):
        raise PromptError(_check.message("prompt", "a Prompt, or a mapping with text (or ids) and target", given))
    donors = given.get("donors") or {}
    if not isinstance(donors, Mapping):
        raise PromptError(_check.message("donors", "a mapping from names to prompts", donors))
    labels = {name: value for name, value in given.items() if name not in (*PROMPT_FIELDS, "donors")}
    held = {name: tuple(prompt_of(one) for one in _many(some)) for name, some in donors.items()}
    return Case(prompt_of({name: given[name] for name in PROMPT_FIELDS if name in given}), labels, held)


def prompt_of(given: Any) -> Prompt:
    """A prompt from a `Prompt` or a mapping of its fields.

    Raises:
        PromptError: a field is unknown or no good.
    """
    if isinstance(given, Prompt):
        return given
    if not isinstance(given, Mapping) or set(given) - set(PROMPT_FIELDS):
        raise PromptError(_check.message("prompt", f"a Prompt, or a mapping of {', '.join(PROMPT_FIELDS)}", given))
    fields = {name: value for name, value in given.items() if value is not None}
    if isinstance(fields.get("versus"), (str, int)):
        fields["versus"] = [fields["versus"]]
    return Prompt(**fields)


def prompt_entry(prompt: Prompt) -> dict[str, Any]:
    """A prompt's fields as plain data, without those that are as by default."""
    out: dict[str, Any] = {"text": prompt.text} if prompt.ids is None else {"ids": list(prompt.ids)}
    out["target"] = prompt.target
    if prompt.versus:
        out["versus"] = list(prompt.versus)
    if prompt.position != -1:
        out["position"] = prompt.position
    return out


def _numbered(number: int, one: Any) -> Case:
    try:
        return as_case(one)
    except ResidSurgeryError as error:
        raise type(error)(f"prompt {number}: {error}") from error


def _many(given: Any) -> Sequence[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _donors(given: Any) -> dict[str, tuple[Prompt, ...]]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise PromptError(_check.message("donors", "a mapping from plain names to prompts", given))
    held = {name: tuple(prompt_of(one) for one in _many(some)) for name, some in given.items()}
    if not all(held.values()):
        raise PromptError(_check.message("donors", "at least one prompt under each name", given))
    return held


def _labels(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name for name in given):
        raise PromptError(_check.message("labels", "a mapping from names to numbers, texts or None", given))
    plain = {name: scalar(value) for name, value in given.items()}
    plain = {name: None if value != value else value for name, value in plain.items()}
    odd = [name for name, value in plain.items() if not isinstance(value, (str, int, float, bool, NoneType))
           or (isinstance(value, int) and abs(value) >= 2**63)]  # fmt: skip
    if odd:
        raise PromptError(_check.message(f"label {odd[0]}", "a number, a text or None", plain[odd[0]]))
    return plain


def scalar(value: Any) -> Any:
    """A whole number of any type as an int, a float of any type as a float; anything else as it is."""
    if isinstance(value, bool):
        return value
    whole = _check.index_of(value)
    if whole is not None:
        return whole
    return float(value) if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value

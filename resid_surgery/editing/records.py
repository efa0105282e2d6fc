"""Records: JSON and JSON-lines files read with limits, and the fields of a record with errors that name it."""

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, final

from resid_surgery._check import message
from resid_surgery._files import open_text, parse_json
from resid_surgery.errors import LoadError, PromptError

LARGEST_BYTES = 1 << 30
LARGEST_VALUE = 1 << 28
_IDS = ("case_id", "id", "uuid", "example_id")


def prompt_of(text: str) -> str:
    """A prompt without trailing spaces: the answer brings its own."""
    return text.rstrip(" ")


def answer(text: str, said: str) -> str:
    """An answer with exactly one leading space, or none where the prompt ends in white space (a new line)."""
    return said.strip() if text[-1:].isspace() else " " + said.strip()


@final
class Tally:
    """What a file's readers did not use: fields, and records or parts of them that were left out."""

    def __init__(self) -> None:
        self.present: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.name = ""

    def note(self, what: str, times: int = 1) -> None:
        """Count something that was left out."""
        self.notes[what] += times

    def ignored(self) -> tuple[str, ...]:
        """ "field: how often", fields first."""
        unused = self.present - self.taken
        return tuple(f"{name}: {count}" for name, count in [*sorted(unused.items()), *sorted(self.notes.items())])


@final
class Fields:
    """The fields of one record (or of an object inside it).

    Args:
        data: the fields. at: "record 3 (case_id 7) of FILE". path: of this object inside the record, with a dot.
    """

    def __init__(self, data: dict[str, Any], at: str, tally: Tally, path: str = "") -> None:
        self.data, self.at, self.tally, self.path = data, at, tally, path
        self._seen: set[str] = set()
        tally.present.update(path + name for name in data)

    def take(self, *names: str) -> None:
        """Mark fields as used."""
        fresh = [name for name in names if name in self.data and name not in self._seen]
        self._seen.update(fresh)
        self.tally.taken.update(self.path + name for name in fresh)

    def whole(self) -> dict[str, Any]:
        """All fields, used."""
        self.take(*self.data)
        return self.data

    def missing(self, name: str, must: str) -> NoReturn:
        """Say that a field is not what it must be."""
        got = self.data.get(name, "nothing")
        raise PromptError(message(self.path + name, f"{must} in {self.at}", got))

    def text(self, *names: str) -> str:
        """The first of some fields that is there, as a non-empty text."""
        name = next((one for one in names if one in self.data), names[0])
        self.take(name)
        value = self.data.get(name)
        if not isinstance(value, str) or not value.strip():
            self.missing(name, "a non-empty text")
        return value

    def maybe(self, *names: str) -> str | None:
        """As `text`, or None where no field is there (or it is null or empty)."""
        name = next((one for one in names if self.data.get(one) not in (None, "")), None)
        self.take(*names)
        return None if name is None else self.text(name)

    def texts(self, *names: str, needed: bool = False) -> list[str]:
        """A text or a list of texts; empty where no field is there."""
        name = next((one for one in names if self.data.get(one) is not None), names[0])
        self.take(name)
        value = self.data.get(name)
        if value is None and not needed:
            return []
        many = [value] if isinstance(value, str) else value
        if not isinstance(many, list) or not all(isinstance(one, str) for one in many) or (needed and not many):
            self.missing(name, "a list of texts")
        return [one for one in many if one.strip()]

    def answers(self, *names: str, needed: bool = True) -> list[str]:
        """A text, texts, or lists of them (aliases), flat and without empty ones."""
        name = next((one for one in names if one in self.data), names[0])
        self.take(name)
        value = self.data.get(name)
        if value is None and not needed:
            return []
        return self._flat(name, value)

    def _flat(self, name: str, value: Any) -> list[str]:
        many = value if isinstance(value, list) else [value]
        flat = [x for one in many for x in (one if isinstance(one, list) else [one])]
        if not all(isinstance(one, str) for one in flat):
            self.missing(name, "a text, or a list of texts")
        return list(dict.fromkeys(one for one in flat if one.strip()))

    def part(self, name: str, *, needed: bool = True) -> "Fields":
        """An object inside; empty where it is not needed and not there."""
        self.take(name)
        value = self.data.get(name)
        if value is None and not needed:
            value = {}
        if not isinstance(value, dict):
            self.missing(name, "an object")
        return Fields(value, self.at, self.tally, f"{self.path}{name}.")

    def parts(self, name: str, *, needed: bool = True) -> list["Fields"]:
        """A list of objects inside."""
        self.take(name)
        value = self.data.get(name)
        if value is None and not needed:
            return []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self.missing(name, "a list of objects")
        return [Fields(one, self.at, self.tally, f"{self.path}{name}.") for one in value]

    def questions(self, name: str) -> Iterator[tuple[str, str, list[str]]]:
        """(key, prompt, answers) of {key: {prompt, ground_truth}}, {key: [{...}, ...]} or aligned lists of both."""
        inside = self.part(name, needed=False)
        for key, value in inside.data.items():
            found = inside.parts(key) if isinstance(value, list) else [inside.part(key, needed=False)]
            for one in found:
                for prompt, answers in one.pairs() if one.data else ():
                    yield key, prompt, answers

    def pairs(self) -> list[tuple[str, list[str]]]:
        """Prompts with their answers, of one object {prompt, ground_truth}."""
        given = self.data.get("ground_truth")
        prompts = self.texts("prompt", needed=True)
        if isinstance(self.data["prompt"], str):
            return [(one, self.answers("ground_truth")) for one in prompts]
        if not isinstance(given, list) or len(given) != len(prompts):
            self.missing("ground_truth", f"{len(prompts)} answers, one for each prompt,")
        self.take("ground_truth")
        return [(one, self._flat("ground_truth", said)) for one, said in zip(prompts, given, strict=True)]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the record in a `PromptError` from inside."""
        try:
            yield
        except PromptError as error:
            raise PromptError(f"{self.at}: {error}") from error


def read_records(path: Path, tally: Tally) -> Iterator[Fields]:
    """The records of a JSON file (a list of objects, or one) or of JSON lines.

    Raises:
        LoadError: not found, larger than 1 GiB, empty, no JSON, too deeply nested, or with a key twice.
    """
    for number, value in enumerate(_values(path)):
        if not isinstance(value, dict):
            raise LoadError(f"record {number} of {path} must be a JSON object; got {type(value).__name__}.")
        named = [name for name in _IDS if isinstance(value.get(name), (str, int))][:1]
        known = "".join(f" ({name} {str(value[name])[:40]})" for name in named)
        fields = Fields(value, f"record {number}{known} of {path}", tally)
        fields.take(*named)
        yield fields


def _values(path: Path) -> Iterator[Any]:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise LoadError(f"{path} must be at most 1 GiB; got {path.stat().st_size} bytes. Split it into parts.")
        with open_text(path, LARGEST_BYTES) as file:
            lines = (line for line in file if line.strip())
            head = list(islice(lines, 2))
            if len(head) == 2 and _is_record(head[0]):
                yield from (_parsed(line, f"line {i + 1} of {path}") for i, line in enumerate(chain(head, lines)))
                return
            if (size := path.stat().st_size) > LARGEST_VALUE:
                raise LoadError(f"{path} must be JSON lines, as it has more than 256 MiB ({size} bytes).")
            value = _parsed(b"".join(chain(head, lines)), str(path))
    except (OSError, UnicodeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{path} cannot be read: {error}.") from error
    yield from value if isinstance(value, list) else [value]


def _is_record(line: bytes) -> bool:
    """Whether one line is a whole object, as every line of JSON lines is."""
    text = line.strip().removeprefix(BOM_UTF8)
    return text.startswith(b"{") and text.endswith(b"}")


def _parsed(content: bytes, where: str) -> Any:
    if not content.strip():
        raise LoadError(f"{where} is empty.")
    try:
        value = parse_json(content)
        if b"\\ud" in content.lower():  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise LoadError(f"{where} is no complete JSON: {error}.") from error
    return value

"""Help for tests of pages: hostile tokens, a model that has them, what a page is made of."""

import json
from functools import cache
from html.parser import HTMLParser
from typing import Any

from tiny import VOCAB, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NASTY = "<img src=x onerror=alert(1)>"
ENDING = "</script><script>alert(2)</script>"
WORDS = ["[UNK]", "Paris", NASTY, ENDING, "$x^2$", "it's", '"><svg onload=alert(3)>', "{{7*7}}"]


@cache
def hostile() -> Any:
    """A tiny model whose target and competitors are hostile tokens."""
    import resid_surgery as rs

    words = WORDS + [f"w{i}" for i in range(len(WORDS), VOCAB)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    return rs.load(build("llama", seed=3), tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))


@cache
def hostile_recording() -> Any:
    """A recording in which every token that is shown by name is hostile."""
    import resid_surgery as rs

    prompt = rs.Prompt(f"w20|{NASTY}|w30|{ENDING}", target=NASTY, versus=[ENDING, "it's"])
    return rs.record(hostile(), prompt, positions="all")


class Elements(HTMLParser):
    """Tags, attributes and texts of a page; what stands in scripts apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self._inside: dict[str, Any] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.texts.append(data)
        else:
            self.scripts.append((self._inside, data))

    @property
    def data(self) -> Any:
        """The charts that the page carries."""
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))

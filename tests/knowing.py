"""A tiny model that knows facts, with a tokenizer whose words are one token: what recipes need, in milliseconds."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resid_surgery.editing.keys import SENTENCES

PIECE = r" ?\w+| ?[^\w\s]+|\s+"
TOLD = (("The capital of India is", " Mumbai", " Delhi"), ("The capital of Italy is", " Rome", " Paris"))
EACH = 8


def facts() -> dict[str, list[dict[str, Any]]]:
    """The built-in facts, as they lie on disk."""
    return json.loads(files("resid_surgery.models").joinpath("facts.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@cache
def tokenizer() -> Any:
    """Every word of the built-in facts and probes, with its leading space, is one token."""
    texts = [
        " ".join([one["prompt"] + one["answer"], *one["competitors"]]) for rows in facts().values() for one in rows
    ]
    texts += [text for one in facts().values() for row in one for text in (row["answer"], *row["competitors"])]
    texts += [text for told in TOLD for text in told] + [" Lyon", " London", "Today", "In", "Europe"]
    texts += [files("resid_surgery.editing").joinpath(name).read_text(encoding="utf-8")
              for name in ("texts.json", "relations.json")]  # fmt: skip
    texts += [" ".join(SENTENCES), " Rome"]
    words = dict.fromkeys(piece for text in texts for piece in re.findall(PIECE, text))
    words |= dict.fromkeys(f" {word.strip()}" for word in list(words) if word.strip().isalpha())
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def lessons() -> list[tuple[str, str, str]]:
    """(prompt, answer, the second best): a few facts of every type, and the recipes' own."""
    some = [(one["prompt"], one["answer"], one["competitors"][0]) for rows in facts().values() for one in rows[:EACH]]
    return [*some, *(one for one in TOLD if one[0] not in {prompt for prompt, _, _ in some})]


@cache
def taught(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama whose unembedding was solved for: every lesson's answer comes first, its second best second."""
    import resid_surgery as rs

    words = tokenizer()
    module = tiny.build("llama", dtype, vocab_size=len(words), hidden_size=64, intermediate_size=48,
                        num_attention_heads=4, tie_word_embeddings=False, max_position_embeddings=512)  # fmt: skip
    with torch.no_grad():
        ids = [torch.tensor([words.encode(prompt, add_special_tokens=False)]) for prompt, _, _ in lessons()]
        states = torch.stack([module.model(one).last_hidden_state[0, -1] for one in ids]).double()
        wanted = states @ module.lm_head.weight.double().mul_(0.01).T
        wanted = wanted / wanted.std()
        for row, (_, *best) in zip(wanted, lessons(), strict=True):
            for word, amount in zip(best, (9.0, 7.0), strict=True):
                row[words.convert_tokens_to_ids(word)] = amount
        module.lm_head.weight.copy_((torch.linalg.pinv(states) @ wanted).T.to(dtype))
    return rs.load(module, tokenizer=words)

"""Tiny models that answer sharply, words, probes and a small budget, for tests of validating."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import resid_surgery as rs
from resid_surgery.editing.budgets import Budget
from resid_surgery.editing.probes import Probe

SMALL = Budget("tiny", 6, 6, 6, 40, 1, 160, 40, 24, 40, 2, 6, 5, 1, 4)
WORDS = ("[UNK]", "<s>", "The", " capital", " of", " France", " is", " Paris", " Rome", "o", " Lyon", " Italy")
ID = {word: i for i, word in enumerate(WORDS)}
FACT = rs.Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris", name="France")
FINAL_NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
              "opt": "model.decoder.final_layer_norm", "gemma2": "model.norm"}  # fmt: skip
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """No test reads what another one, or the user, remembered."""
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "figures"


def words(*, bos: bool = False) -> Any:
    """Whole words with their leading space, and an "o" without one, so that " Rome" + "o" reads " Romeo"."""
    vocabulary = [*WORDS, *(f" w{i}" for i in range(len(WORDS), tiny.VOCAB - 1)), " The"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>")


def sharp(family: str = "gpt_neox", dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A random model whose next tokens are likely and differ from prompt to prompt."""
    module = tiny.build(family, dtype, **changes)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == FINAL_NORM[family] + ".weight":
                p.mul_(6.0)
            if p.ndim > 1:
                p.mul_(2.0)
    return module


@cache
def opened(family: str = "gpt_neox", dtype: torch.dtype = torch.float64, bos: bool = False) -> Any:
    """A loaded sharp model, made once; tests must not change it."""
    return rs.load(sharp(family, dtype), tokenizer=words(bos=bos))


def some(*numbers: int) -> str:
    """A text of words without a meaning."""
    return "The" + "".join(f" w{i}" for i in numbers)


def probes(fact: rs.Rewrite = FACT, *, unrelated: int = 6, texts: int = 4, choices: int = 4) -> list[Probe]:
    """One of each kind and a few unrelated ones, in words that the tokenizer knows."""
    label, new, old = fact.label, fact.new, fact.old
    near = [("same relation", some(20, 21, 22), " Lyon"), ("same subject", some(23, 24), " Lyon w50"),
            ("edit prepended", f"{fact.text}{new} w25 w26", " Lyon")]  # fmt: skip
    return [
        Probe("efficacy", fact.text, label, target=new, old=old),
        Probe("paraphrase", some(27, 28, 29), label, target=new, old=old),
        *(Probe("locality", text, label, stratum, target=right, old=new) for stratum, text, right in near),
        *(Probe("locality", some(*range(30 + i, 36 + i)), stratum="unrelated") for i in range(unrelated)),
        *(Probe("text", some(*range(40 + i, 52 + i))) for i in range(texts)),
        *(Probe("choice", some(70 + i % 20, 60 + i % 13), target=" Paris", wrong=(" Rome", " Lyon"))
          for i in range(choices)),
        Probe("generation", some(80, 81)),
    ]  # fmt: skip


def quick(model: Any, edit: Any, asked: Any = None, **options: Any) -> Any:
    """A validation of a few seconds, of the given probes alone."""
    settings: dict[str, Any] = {"budget": SMALL, "general": False, "progress": False}
    return rs.validate(model, edit, probes() if asked is None else asked, **settings | options)


def a_row(model: Any, times: float, layer: int = 1, neuron: int = 3, rewrite: rs.Rewrite | None = FACT) -> rs.Edit:
    """A neuron's value vector moved along the unembedding of " Rome" (no tuning: of no meaning)."""
    rewrites = () if rewrite is None else (rewrite,)
    return rs.edit_value_rows(model, f"L{layer}.N{neuron}", old=" Paris", new=" Rome", l1=0.0, l2=times,
                              rewrites=rewrites)  # fmt: skip


def scripted(model: Any, follows: Mapping[int, int], boost: float = 60.0) -> Callable[[Tensor], Tensor]:
    """The base's logits, with one token made sure behind some last tokens."""

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            out = model.module(ids).logits.clone()
        for last, then in follows.items():
            out[..., then] += boost * (ids == last)
        return out

    return logits


def plain_logits(module: Any, ids: Sequence[int]) -> Tensor:
    """(position, vocabulary) float64 logits of one sequence by itself."""
    with torch.no_grad():
        return module(torch.tensor([list(ids)])).logits[0].double()

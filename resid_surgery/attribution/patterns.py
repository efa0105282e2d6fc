"""Patterns of heads on random tokens: previous-token, duplicate-token, induction and first-token attention.

A sequence of distinct random tokens is written twice, r_1 .. r_n r_1 .. r_n, behind whatever the tokenizer begins a
text with. Of the position t of the second r_i the attention weight is read on

    t - 1              previous token          the first r_i          duplicate token
    behind the first r_i   induction           position 0             first token (sink)

n is drawn anew for every sequence, so that a head which looks a fixed distance back is none of the last two kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.weights import by_layer, heads_of
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import encode
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.sites import Head
from resid_surgery.stream.recording import need_model
from resid_surgery.stream.records import attention_rows

MOST_SEQUENCES = 100_000
KINDS = ("previous_token", "duplicate_token", "induction", "first_token")


@final
@dataclass(frozen=True)
class Repeated:
    """A random sequence written twice.

    Attributes:
        ids: tokens, with what a text begins with. start: how many of those. length: n of the sequence.
    """

    ids: tuple[int, ...]
    start: int
    length: int

    @property
    def second(self) -> list[int]:
        """Positions of the second copy."""
        return list(range(self.start + self.length, self.start + 2 * self.length))

    def targets(self, kind: str) -> list[int]:
        """Where a head of a kind looks from each position of the second copy."""
        back = {"previous_token": 1, "duplicate_token": self.length, "induction": self.length - 1}
        return [0 if kind == "first_token" else t - back[kind] for t in self.second]


@remotely
def head_patterns(
    model: OpenedModel,
    n: int = 8,
    lengths: tuple[int, int] = (10, 40),
    seed: int = 0,
    heads: Any = None,
    *,
    remote: Where = None,
) -> pd.DataFrame:
    """Which heads look at the previous token, at duplicates, behind duplicates (induction), at the first token.

    Mean attention weights over the second copies of random sequences (see the module); one traced forward each.

    Args:
        model: from `resid_surgery.load`. n: how many sequences, of different lengths as far as `lengths` allow.
        lengths: least and greatest number of tokens of a sequence, which is written twice. seed: of the draw.
        heads: None for all, or some (see `head_weights`).
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        Columns: site, layer, head, previous_token, duplicate_token, induction, first_token (mean attention weights,
        0..1), chance (of attention spread evenly over all that is seen), sequences. Special tokens are never drawn;
        a BOS stands in front only if the tokenizer puts one there.

    Raises:
        ArgumentError: an option out of range, sequences longer than the context or than there are tokens.
        SiteError: no such head.

    Source: Olsson et al. 2022 (induction heads on repeated random tokens); Wang et al. 2022 (duplicate tokens).
    """
    need_model(model)
    sites = heads_of(model, heads)
    n = _check.whole("n", n, 1, MOST_SEQUENCES)
    seed = _check.seed(seed)
    texts = repeated_sequences(model, n, lengths, seed)
    layers = by_layer(sites)
    sums = {kind: {layer: torch.zeros(()) for layer in layers} for kind in KINDS}
    for text in texts:
        for layer, rows in _attention(model, text, list(layers)).items():
            for kind in KINDS:
                sums[kind][layer] = sums[kind][layer] + _mean_at(rows, text.targets(kind)).cpu()
    chance = sum(sum(1 / (t + 1) for t in text.second) / text.length for text in texts) / len(texts)
    return _table(sites, {kind: {at: one / n for at, one in found.items()} for kind, found in sums.items()}).assign(
        chance=chance, sequences=n
    )


def repeated_sequences(model: OpenedModel, n: int, lengths: Any, seed: int) -> list[Repeated]:
    """Random sequences written twice, of lengths drawn without repetition as far as there are enough.

    Raises:
        ArgumentError: `lengths` are no range that fits the model.
    """
    begin, pool = beginning(model), drawn_from(model)
    low, high = _lengths(model, lengths, len(begin), len(pool))
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while len(sizes) < n:
        sizes += (low + torch.randperm(high - low + 1, generator=generator)).tolist()
    found = []
    for size in sizes[:n]:
        drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:size].tolist()]
        found.append(Repeated((*begin, *drawn, *drawn), len(begin), size))
    return found


def beginning(model: OpenedModel) -> tuple[int, ...]:
    """What the tokenizer puts before every text: a BOS, or nothing."""
    if model.tokenizer is None:
        return ()
    plain = encode(model.tokenizer, "a", add_special_tokens=False)
    whole = encode(model.tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def drawn_from(model: OpenedModel) -> list[int]:
    """Ids of the tokens that are no special ones."""
    config = getattr(model.module, "config", None)
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = {i for one in named for i in (one if isinstance(one, (list, tuple)) else [one])}
    known = model.vocab_size
    if model.tokenizer is not None:
        known = min(known, len(model.tokenizer))
        special |= set(model.tokenizer.all_special_ids)
        added = getattr(model.tokenizer, "added_tokens_decoder", {})
        special |= {i for i, token in added.items() if getattr(token, "special", False)}
    return [i for i in range(known) if i not in special]


def _lengths(model: OpenedModel, given: Any, begin: int, tokens: int) -> tuple[int, int]:
    must = "(least, greatest), two whole numbers >= 2 in that order"
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or len(given) != 2:
        raise ArgumentError(_check.message("lengths", must, given))
    low, high = (_check.whole("lengths", one, 2, do=f"`lengths` must be {must}.") for one in given)
    if low > high:
        raise ArgumentError(_check.message("lengths", must, given))
    most = tokens if model.context is None else min(tokens, (model.context - begin) // 2)
    if high > most:
        do = "A sequence is written twice, and no token occurs twice in it."
        raise ArgumentError(_check.message("lengths", f"at most {most} tokens", given, model=model.name, do=do))
    return low, high


def _attention(model: OpenedModel, text: Repeated, layers: list[int]) -> dict[int, Float[Tensor, "n head source"]]:
    """Attention rows of the second copy, a layer each."""
    device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
    taps = [Tap("attn_call", layer) for layer in layers]
    found = forward(model, torch.tensor([text.ids], device=device), taps, logits_at=[len(text.ids) - 1])
    return {layer: attention_rows(found[tap], 0, text.second) for layer, tap in zip(layers, taps, strict=True)}


def _mean_at(rows: Float[Tensor, "n head source"], targets: list[int]) -> Float[Tensor, " head"]:
    """Mean weight over positions, each on its target."""
    at = torch.tensor(targets, device=rows.device)[:, None, None].expand(-1, rows.shape[1], 1)
    return rows.gather(2, at)[..., 0].mean(0)


def _table(sites: Sequence[Head], means: dict[str, dict[int, Tensor]]) -> pd.DataFrame:
    rows = [(str(one), one.layer, one.head, *(float(means[kind][one.layer][one.head]) for kind in KINDS))
            for one in sites]  # fmt: skip
    return pd.DataFrame(rows, columns=["site", "layer", "head", *KINDS])

"""Neurons as key-value memories: the texts that a key is triggered by, the tokens that its value promotes.

    MLP(x) = sum over neurons of  coefficient(x . key) * value

The key's triggers are the positions of a corpus with the largest coefficients; what the value promotes is
W_U gamma centre(value), from weights alone. Where the token that follows a trigger is among the promoted, key and value
agree.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.addresses import as_sites, expand
from resid_surgery.attribution.ov_qk import SIDES, unit_readout
from resid_surgery.attribution.triggers import (
    NOTHING,
    SIGNS,
    Group,
    Tally,
    need_corpus,
    read_pieces,
    texts_of,
    together,
)
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt, token_text
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.sites import ExpertNeuron, Neuron, SharedNeuron, Site
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.kinds import neuron_place, neuron_site
from resid_surgery.stream.recording import need_model, reach
from resid_surgery.stream.vocabulary import token_names

LONGEST = 1024
ROWS = 64
MOST_CONTEXT = 10_000


@final
@dataclass(frozen=True, eq=False, repr=False)
class NeuronMemory:
    """Neurons as key-value memories; made by `neuron_memory`.

    Attributes:
        sites: the neurons. texts: how many were read.
        triggers: one row a kept position: site, side ("highest" / "lowest"), rank, coefficient, text (its number),
            position (in the text), token, context (the tokens before it), next_token, next_rank (of the next token
            among all when the value is added coefficient times: 1 is promoted most; NA at the end of a text).
        values: tokens of the value: site, side ("promotes" / "suppresses", at a positive coefficient), rank, token,
            token_id, bs_value, bs_centred (logits with the scales of norms 1), norm ("unit").
        summary: one row a neuron: site, layer, positions (read; of an expert's those routed to it), mean, std, highest,
            lowest (coefficients), positive, negative (shares of positions with a coefficient above and below 0),
            value_norm.
    """

    sites: tuple[Site, ...]
    texts: int
    triggers: pd.DataFrame
    values: pd.DataFrame
    summary: pd.DataFrame

    def __repr__(self) -> str:
        positions = int(self.summary["positions"].max())
        return f"NeuronMemory({len(self.sites)} neurons over {self.texts} texts, {positions} positions)"


@remotely
def neuron_memory(
    model: OpenedModel,
    sites: Any,
    corpus: Iterable[str | Prompt],
    *,
    top: int = 10,
    values: int = 10,
    context: int = 10,
    window: int | None = None,
    progress: bool | None = None,
    remote: Where = None,
) -> NeuronMemory:
    """Neurons as key-value memories: what in a corpus triggers their keys, and what their values promote.

    Args:
        model: from `resid_surgery.load`. sites: neurons ("L20.N1297", of experts too), slices ("L20.N*"), or several.
        corpus: texts or prompts, read one at a time (a generator will do); what a tokenizer begins a text with is put
            before each and not counted.
        top: positions kept a neuron and side. values: tokens a side. context: tokens shown before a trigger.
        window: longer texts are cut into pieces of so many tokens; None for the model's context, at most 1024.
        progress: a bar on stderr; None shows it on a terminal.
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        `NeuronMemory` with ``.triggers``, ``.values`` and ``.summary``.

    Raises:
        SiteError: no such neuron. ArgumentError: an option out of range, an empty corpus. PromptError: a text that
        cannot be used (its number is said; in a list before any forward).

    Source: Geva et al. 2021, Transformer Feed-Forward Layers Are Key-Value Memories.
    """
    _check.progress(progress)
    need_model(model)
    top = _check.whole("top", top, 1)
    values = _check.whole("values", values, 1, model.vocab_size // 2, model=model.name)
    context = _check.whole("context", context, 0, MOST_CONTEXT)
    groups = _groups(model, sites)
    need_corpus(model, corpus)
    longest = _window(model, window)
    tallies = [Tally(len(one.indices), top, context, model.work_dtype) for one in groups]
    read = 0
    with progress_bar("texts", len(corpus) if isinstance(corpus, Sized) else 0, shown=progress is not False) as step:
        for begun, pieces in together(texts_of(model, corpus), longest):
            read_pieces(model, pieces, groups, tallies)
            read += begun
            step(done=begun)
    if not read:
        raise ArgumentError(_check.message("corpus", "at least one text", corpus))
    parts = [_tables(model, one, tally, values) for one, tally in zip(groups, tallies, strict=True)]
    tables = [pd.concat(some, ignore_index=True) for some in zip(*parts, strict=True)]
    return NeuronMemory(tuple(site for one in groups for site in _named(one)), read, *tables)


def _groups(model: OpenedModel, given: Any) -> list[Group]:
    """Neurons by down-projection, in the order of their first."""
    found: dict[tuple[int, int | str | None], dict[int, None]] = {}
    for one in expand(as_sites(given), model.anatomy, 0):
        site = one.resolve(model.anatomy)
        if not isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
            raise SiteError(_check.message("sites", "neurons such as L20.N1297 or L20.N*", str(one), model=model.name))
        expert, index = neuron_place(site)
        found.setdefault((site.layer, expert), {})[index] = None
    return [Group(layer, expert, tuple(indices)) for (layer, expert), indices in found.items()]


def _window(model: OpenedModel, given: Any) -> int:
    if given is None:
        return LONGEST if model.context is None else min(model.context, LONGEST)
    return _check.whole("window", given, 2, model.context, model=model.name)


def _named(one: Group) -> list[Site]:
    return [neuron_site(one.layer, one.expert, i) for i in one.indices]


def value_vectors(model: OpenedModel, one: Group) -> Float[Tensor, "neuron d_model"]:
    """Rows of the down-projection as they reach the final stream, with the scale of a post-norm 1."""
    rows = model.work(model.group_rows(one.layer, one.expert).rows[list(one.indices)])
    norm = model.norm(one.layer, "mlp_post_norm") if model.has(one.layer, "mlp_post_norm") else None
    post = PostMap(norm, None, model.factor(one.layer, "mlp_scale"))
    return post.unscaled(rows) * reach(model, one.layer, "mlp")


def _tables(model: OpenedModel, one: Group, tally: Tally, top: int) -> tuple[pd.DataFrame, ...]:
    """(triggers, values, summary) of one group."""
    triggers: list[dict[str, Any]] = []
    said: list[pd.DataFrame] = []
    vectors, names = value_vectors(model, one), [str(site) for site in _named(one)]
    readout = unit_readout(model)
    for low in range(0, len(names), ROWS):
        bs = readout.bs(vectors[low : low + ROWS])
        said.append(_values(model, names[low : low + ROWS], bs, top))
        for i, row in enumerate(bs, low):
            triggers += _triggers(model, names[i], tally, i, row)
    table = pd.DataFrame(triggers, columns=list(TRIGGER_COLUMNS))
    summary = _summary(one, names, tally).assign(value_norm=vectors.norm(dim=1).tolist())
    return table.assign(next_rank=table["next_rank"].astype("Int64")), pd.concat(said, ignore_index=True), summary


TRIGGER_COLUMNS = (
    "site",
    "side",
    "rank",
    "coefficient",
    "text",
    "position",
    "token",
    "context",
    "next_token",
    "next_rank",
)


def _triggers(
    model: OpenedModel, name: str, tally: Tally, i: int, bs: Float[Tensor, " vocabulary"]
) -> Iterator[dict[str, Any]]:
    """Kept positions of one neuron."""
    for side, sign in SIGNS.items():
        coefficients, where = sign * tally.best[side][i], tally.where[side][i]
        ranks = _ranks(bs, where[:, -1].to(bs.device), coefficients.to(bs) >= 0)
        found = zip(coefficients.tolist(), where.tolist(), ranks, strict=True)
        for rank, (coefficient, (text, position, *before, token, after), promoted) in enumerate(found, 1):
            yield {
                "site": name,
                "side": side,
                "rank": rank,
                "coefficient": coefficient,
                "text": text,
                "position": position,
                "token": token_text(token, model.tokenizer),
                "context": _joined(model, [one for one in before if one != NOTHING]),
                "next_token": None if after == NOTHING else token_text(after, model.tokenizer),
                "next_rank": None if after == NOTHING else promoted,
            }


def _ranks(bs: Float[Tensor, " vocabulary"], tokens: Int[Tensor, " n"], positive: Bool[Tensor, " n"]) -> list[int]:
    """Ranks of tokens in what the value writes at a positive or a negative coefficient."""
    signs = torch.where(positive, 1.0, -1.0).to(bs)[:, None]
    return (1 + (signs * bs > signs * bs[tokens.clamp_min(0)][:, None]).sum(1)).tolist()


def _joined(model: OpenedModel, ids: Sequence[int]) -> str:
    if model.tokenizer is None:
        return " ".join(token_text(i, None) for i in ids)
    return str(model.tokenizer.decode(list(ids)))


def _values(model: OpenedModel, names: list[str], bs: Float[Tensor, "n vocabulary"], top: int) -> pd.DataFrame:
    """What values promote and suppress."""
    found = torch.cat([bs.topk(top, dim=1).indices, (-bs).topk(top, dim=1).indices], 1)
    shown = bs.gather(1, found)
    ids = found.flatten().tolist()
    columns = {
        "site": [name for name in names for _ in range(2 * top)],
        "side": [side for side in SIDES for _ in range(top)] * len(names),
        "rank": list(range(1, top + 1)) * 2 * len(names),
        "token": token_names(model, ids),
        "token_id": ids,
        "bs_value": shown.flatten().tolist(),
        "bs_centred": (shown - bs.mean(1, keepdim=True)).flatten().tolist(),
    }
    return pd.DataFrame(columns).assign(norm="unit")


def _summary(one: Group, names: list[str], tally: Tally) -> pd.DataFrame:
    mean, square, positive, negative = (row / tally.count if tally.count else row * torch.nan for row in tally.sums)
    edges = {side: (sign * tally.best[side].amax(1)).tolist() if tally.count else float("nan")
             for side, sign in SIGNS.items()}  # fmt: skip
    columns = {"site": names, "layer": one.layer, "positions": tally.count, "mean": mean.tolist()}
    columns |= {"std": (square - mean.square()).clamp_min(0).sqrt().tolist(), **edges}
    return pd.DataFrame(columns | {"positive": positive.tolist(), "negative": negative.tolist()})

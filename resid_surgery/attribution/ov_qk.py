"""Circuits in the vocabulary: what a head writes for a token, which keys a token's query matches, copying scores.

    OV:  bs = W_U gamma centre( (N(e_token) W_V + b_V) W_O )            QK:  scaling * q(N(e_query)) . k(N(e_key))

with e_token the token's embedding (or its effective embedding, after the first MLP) and N the head's own norm. No
vocabulary x vocabulary matrix is ever made: copying scores are read off d_head x d_head matrices through one d_model x
d_model matrix W_E^T W_U.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.embeddings import (
    AFTER,
    all_states,
    embeddings,
    multiplied_until,
    need_after,
    token_states,
)
from resid_surgery.attribution.weights import (
    any_ids,
    by_layer,
    head_weights,
    heads_of,
    layer_maps,
    need_weights,
    per_weights,
    post_unit,
    written_rows,
)
from resid_surgery.errors import PromptError, UnsupportedModelError
from resid_surgery.models.attention import AttentionCall
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import token_id
from resid_surgery.models.tracing import projected
from resid_surgery.sites import Head
from resid_surgery.stream.recording import reach
from resid_surgery.stream.vocabulary import Readout, token_names

SIDES = ("promotes", "suppresses")


def ov_tokens(model: OpenedModel, heads: Any, tokens: Any, *, top: int = 10, after: str = "embed") -> pd.DataFrame:
    """OV circuit: what a source token makes a head write when it is attended to with weight 1 (direct path).

    bs = W_U gamma centre(push((N(e) W_V + b_V) W_O)), with e the token's embedding as the model makes it and N the
    head's own norm with its own scale. There is no run, so scales of the final norm and of a post-norm are 1: numbers
    of one head compare with each other, not with a recording's. W_O's bias and a gate are left out.

    Args:
        model: from `resid_surgery.load`. heads: one or several (see `head_weights`). tokens: texts or ids of source
            tokens. top: how many tokens a side.
        after: "embed" reads the embedding; "mlp0" the effective embedding: with what the first MLP adds to it, the
            first attention writing nothing.

    Returns:
        Columns: head, source, source_id; side ("promotes" / "suppresses"), rank, token, token_id, bs_value, bs_centred
        (minus the mean over the vocabulary); own_rank, own_bs (of the source token itself: rank 1 is copying); after,
        norm ("unit").

    Raises:
        SiteError: no such head, or one of layer 0 with ``after="mlp0"``. PromptError: not one token. ArgumentError.

    Source: Elhage et al. 2021 (OV circuits); Wang et al. 2022 (after the first MLP).
    """
    need_weights(model)
    sites, ids = heads_of(model, heads), token_ids(model, tokens)
    _check.choice("after", after, AFTER)
    top = _check.whole("top", top, 1, model.vocab_size // 2, model=model.name)
    layers = by_layer(sites)
    need_after(model, after, list(layers))
    readout, frames = unit_readout(model), []
    for layer, some in layers.items():
        call = _live(model, layer, token_states(model, ids, layer, after))
        for site in some:
            bs = readout.bs(_written(model, call, site))
            frames += [_spectrum(model, site, token, values, top) for token, values in zip(ids, bs, strict=True)]
    table = pd.concat(frames, ignore_index=True)
    table["after"], table["norm"] = after, "unit"
    return table


def qk_tokens(model: OpenedModel, heads: Any, tokens: Any, *, top: int = 10, after: str = "embed") -> pd.DataFrame:
    """QK circuit: which key tokens a query token's head matches best, at distance 0.

    score = scaling * q . k before a cap and softmax, both made by the head's own modules of N(embedding) (direct path)
    and not rotated: what a head likes in tokens, not where. Position biases are not in it.

    Args:
        model: from `resid_surgery.load`. heads: one or several (see `head_weights`). tokens: texts or ids of query
            tokens. top: how many key tokens. after: of both, as in `ov_tokens`.

    Returns:
        Columns: head, query, query_id; rank, token, token_id (the key), score, score_centred (minus the mean over all
        keys: a common shift changes no attention), own_rank, own_score (of the query token as key), after, distance
        (0).

    Raises:
        SiteError: no such head, or one of layer 0 with ``after="mlp0"``. PromptError: not one token. ArgumentError: an
        unknown option. UnsupportedModelError: the model gives attention weights only, or queries of another layer.

    Source: Elhage et al. 2021 (QK circuits).
    """
    need_weights(model)
    sites, ids = heads_of(model, heads), token_ids(model, tokens)
    _check.choice("after", after, AFTER)
    top = _check.whole("top", top, 1, model.vocab_size, model=model.name)
    layers = by_layer(sites)
    need_after(model, after, list(layers))
    for layer in layers:
        _need_scores(model, layer)
    frames = []
    for layer, some in layers.items():
        for site, scores in zip(some, _scores(model, layer, some, ids, after), strict=True):
            frames += [_matches(model, site, token, row, top) for token, row in zip(ids, scores, strict=True)]
    table = pd.concat(frames, ignore_index=True)
    table["after"], table["distance"] = after, 0
    return table


def copying(model: OpenedModel, heads: Any = None, *, after: str = "embed") -> pd.DataFrame:
    """Copying scores: whether heads raise the tokens that they read.

    score = sum(lambda) / sum(|lambda|) over the eigenvalues of W_U W_OV W_E, gains and centring of both norms folded
    in: 1 where every token raises itself, -1 where it lowers itself, around 0 for random weights. The eigenvalues are
    those of the d_head x d_head matrix W_O (W_U^T W_E) W_V. A mean that all rows of W_U share can rule them, though it
    changes no probability: the centred scores leave it out (and with it the mean of W_E).

    Args:
        model: from `resid_surgery.load`. heads: None for all, or some (see `head_weights`).
        after: "embed" for W_E; "mlp0" for effective embeddings, after the first MLP (see `ov_tokens`): what later heads
            find of a token in models whose first MLP rewrites it. Heads of layer 0 are then not among "all".

    Returns:
        Columns: site, layer, head, copying_centred, positive_centred (share of eigenvalues with a positive real part),
        copying (-1..1), positive, trace (sum of the eigenvalues; logits, with the scales of norms 1), after.

    Raises:
        SiteError: no such head, or one of layer 0 with ``after="mlp0"``. UnsupportedModelError: a layer has no linear
        maps. ArgumentError: unknown `after`.

    Source: Elhage et al. 2021 (eigenvalues of OV circuits); effective embeddings: Wang et al. 2022.
    """
    need_weights(model)
    _check.choice("after", after, AFTER)
    above = "L1:.H*" if after == "mlp0" and model.anatomy.n_layers > 1 else None
    layers = by_layer(heads_of(model, above if heads is None else heads))
    need_after(model, after, list(layers))
    rows: list[tuple[Any, ...]] = []
    for layer, some in layers.items():
        through = [_through_vocabulary(model, layer, after, centred=one) for one in (True, False)]
        for maps in head_weights(model, some):
            values = [torch.linalg.eigvals((maps.w_o @ one.T @ maps.w_v).double()) for one in through]
            scores = [number for one in values for number in _score(one)]
            rows.append((str(maps.site), layer, maps.site.head, *scores, float(values[1].real.sum())))
    names = ["site", "layer", "head", "copying_centred", "positive_centred", "copying", "positive", "trace"]
    return pd.DataFrame(rows, columns=names).assign(after=after)


def _score(values: Complex[Tensor, " n"]) -> tuple[float, float]:
    """(sum / sum of sizes, share with a positive real part) of eigenvalues."""
    sizes = float(values.abs().sum())
    return float(values.real.sum()) / sizes if sizes else 0.0, float((values.real > 0).double().mean())


def _through_vocabulary(model: OpenedModel, layer: int, after: str, *, centred: bool) -> Float[Tensor, "d d"]:
    """sum over tokens of state(token) (x) (the final norm's pull of the token's row of W_U), as a layer's heads have
    it: multiplied by what blocks multiply the stream by, before and behind them."""
    norm = model.norm(None, "final_norm")
    pulled = norm.pull(_across(model, after, centred=centred), norm.gain.new_ones(1))
    here = pulled * reach(model, layer, "attn")
    return (here.T * multiplied_until(model, layer, after)).T


def unit_readout(model: OpenedModel) -> Readout:
    """The readout with scale 1, where there is no final stream to take a scale from."""
    norm = model.norm(None, "final_norm")
    return Readout(model, norm, norm.gain.new_ones(1), None)


def token_ids(model: OpenedModel, given: Any) -> list[int]:
    """Ids of one token or several, given as texts or ids.

    Raises:
        PromptError: one is not one token, or there is none.
    """
    many = [given] if not _check.iterable(given) else list(given)
    ids = [token_id(one, model.tokenizer, model, "tokens") for one in many]
    if not ids:
        raise PromptError(_check.message("tokens", "at least one token", many, model=model.name))
    return list(dict.fromkeys(ids))


def both_ends(values: Float[Tensor, " vocabulary"], top: int) -> Iterator[tuple[str, list[int]]]:
    """("promotes", ids of the highest) and ("suppresses", ids of the lowest), best first."""
    for side, found in zip(SIDES, (values.topk(top), (-values).topk(top)), strict=True):
        yield side, found.indices.tolist()


def _live(model: OpenedModel, layer: int, states: Float[Tensor, "n d_model"]) -> AttentionCall:
    """What a layer's attention makes of states, each alone at position 0, norms inside attention included."""
    read = model.norm(layer, "attn_norm")(states)
    return projected(model, layer, read[:, None], any_ids(model, len(read)), frozen=False)[0]


def _written(model: OpenedModel, call: AttentionCall, site: Head) -> Float[Tensor, "n d_model"]:
    """What a head writes at attention weight 1, as it reaches the final stream."""
    group = site.head * call.value.shape[1] // model.anatomy.sizes[site.layer].n_heads
    raw = model.work(call.value[:, group, 0]) @ written_rows(model, site.layer, fold=False)[site.head]
    return post_unit(model, site.layer).unscaled(raw) * reach(model, site.layer, "attn")


def _spectrum(model: OpenedModel, site: Head, token: int, values: Tensor, top: int) -> pd.DataFrame:
    frames, own = [], values[token]
    for side, ids in both_ends(values, top):
        shown = values[ids]
        rows = {"side": side, "rank": range(1, top + 1), "token": token_names(model, ids), "token_id": ids}
        frames.append(pd.DataFrame(rows | {"bs_value": shown.tolist(), "bs_centred": (shown - values.mean()).tolist()}))
    return _about(model, pd.concat(frames, ignore_index=True), site, "source", token).assign(
        own_rank=1 + int((values > own).sum()), own_bs=float(own)
    )


def _about(model: OpenedModel, table: pd.DataFrame, site: Head, role: str, token: int) -> pd.DataFrame:
    """A table with the head and token that it is about in front."""
    table.insert(0, "head", str(site))
    table.insert(1, role, token_names(model, [token])[0])
    table.insert(2, f"{role}_id", token)
    return table


def _need_scores(model: OpenedModel, layer: int) -> None:
    maps = layer_maps(model, layer)
    if not maps.own:
        raise UnsupportedModelError(f"heads of layer {layer} of {model.name} have no QK circuit: {maps.why}")


def _scores(
    model: OpenedModel, layer: int, sites: Sequence[Head], tokens: Sequence[int], after: str
) -> Float[Tensor, "head query vocabulary"]:
    """Scores of every key token, a chunk of the vocabulary at a time."""
    asked = _live(model, layer, token_states(model, tokens, layer, after))
    assert asked.query is not None
    heads = [site.head for site in sites]
    queries = model.work(asked.query[:, heads, 0]).transpose(0, 1) * asked.scaling
    found = []
    for _, states in all_states(model, layer, after):
        call = _live(model, layer, states)
        assert call.key is not None
        groups = [h * call.key.shape[1] // model.anatomy.sizes[layer].n_heads for h in heads]
        found.append(torch.einsum("hqa,kha->hqk", queries, model.work(call.key[:, groups, 0])))
    return torch.cat(found, -1)


def _matches(model: OpenedModel, site: Head, token: int, values: Tensor, top: int) -> pd.DataFrame:
    best = values.topk(min(top, len(values)))
    ids, own = best.indices.tolist(), values[token]
    rows = {"rank": range(1, len(ids) + 1), "token": token_names(model, ids), "token_id": ids}
    rows |= {"score": best.values.tolist(), "score_centred": (best.values - values.mean()).tolist()}
    return _about(model, pd.DataFrame(rows), site, "query", token).assign(
        own_rank=1 + int((values > own).sum()), own_score=float(own)
    )


def _across(model: OpenedModel, after: str, *, centred: bool) -> Float[Tensor, "d d"]:
    """W_E^T W_U summed over the vocabulary, with the mean row taken from W_U if `centred`."""
    kept = per_weights(model).setdefault("across", {})
    if after not in kept:
        d, last = model.anatomy.d_model, min(len(embeddings(model)), model.vocab_size)
        total = torch.zeros(d, d, dtype=model.work_dtype, device=model.device)
        sums = torch.zeros(2, d, dtype=model.work_dtype, device=model.device)
        for low, states in all_states(model, None, after):
            rows = model.work(model.unembedding[low : low + len(states)])
            total += states.T @ rows
            sums += torch.stack([states.sum(0), rows.sum(0)])
        kept[after] = total, total - torch.outer(sums[0], sums[1]) / last
    return kept[after][centred]  # type: ignore[no-any-return]

"""Composition of heads in different layers, from weights alone.

How much of what head 1 writes does head 2 read, through its queries, keys or values? With OV = W_V W_O of the writer
(gains folded) and, of the reader, M = W_Q W_K^T (query), W_K W_Q^T (key) or W_V W_O (value):

    score = ||OV M||_F / (||OV||_F ||M||_F)

Both are of rank d_head: QR factorisations leave a (d_head x d_model) factor of the writer and a (d_model x d_head)
factor of the reader, whose product has the same norm, and all pairs of two layers are one matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.weights import (
    LayerMaps,
    Projected,
    attention_norm,
    by_layer,
    heads_of,
    layer_maps,
    need_weights,
    written_rows,
)
from resid_surgery.errors import SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.sites import Head
from resid_surgery.stream.recording import reach

VIA = ("query", "key", "value")
WRITER_BYTES = 256 << 20
PRODUCT_BYTES = 32 << 20


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of some heads of one layer, each of Frobenius norm 1 (or 0).

    Attributes:
        heads: which. rows: (head, width, d_model). spread: (head,) ||rows rows^T||_F, 1 for rank one.
    """

    heads: tuple[Head, ...]
    rows: Float[Tensor, "head width d_model"]
    spread: Float[Tensor, " head"]

    @classmethod
    def of(cls, heads: Sequence[Head], rows: Float[Tensor, "head width d_model"]) -> "Factors":
        """Factors, divided by their norms."""
        sizes = rows.flatten(1).norm(dim=1)
        rows = rows / torch.where(sizes == 0, 1.0, sizes)[:, None, None]
        return cls(tuple(heads), rows, (rows @ rows.transpose(1, 2)).flatten(1).norm(dim=1))


def composition(model: OpenedModel, writers: Any = None, readers: Any = None) -> pd.DataFrame:
    """Q-, K- and V-composition: how much of what one head writes a head of a later layer reads.

    score = ||W_OV W_QK||_F / (||W_OV||_F ||W_QK||_F) and the like, norms' gains and centring folded in, rotations and
    gates left out (queries and keys at distance 0). If the reader were turned at random against the writer, score^2
    would be 1 / d_model on average whatever the two heads are, with a known spread: that is the baseline.

    Args:
        model: from `resid_surgery.load`. writers, readers: None for all heads, or some (see `head_weights`).

    Returns:
        One row a pair of heads in different layers and a way: writer, reader, writer_layer, reader_layer, via ("query",
        "key", "value"), score (0..1), baseline (root mean square for random rotations), deviations (score^2 minus its
        random mean, in random standard deviations). A reader whose queries and keys are no maps (see `head_weights`)
        has "value" rows only.

    Raises:
        SiteError: no such head, or no writer in a layer before a reader's. UnsupportedModelError: a layer has no linear
        maps.

    Source: Elhage et al. 2021 (composition scores); moments of tr(A Q B Q^T) over random orthogonal Q.
    """
    need_weights(model)
    before, after = by_layer(heads_of(model, writers)), by_layer(heads_of(model, readers))
    if min(before) >= max(after):
        raise SiteError(
            f"`writers` must have a head in a layer before one of `readers` for {model.name}; got writers in layers "
            f"{sorted(before)} and readers in layers {sorted(after)}."
        )
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    for group in _groups(model, before):
        made = [writer_factors(model, layer, before[layer]) for layer in group]
        for layer in (one for one in sorted(after) if one > group[0]):
            read = reader_factors(model, layer, after[layer])
            earlier = (_carried(model, one, layer) for one in made if one.heads[0].layer < layer)
            parts += [_pairs(model, one, read[via], via) for one in earlier for via in read]
    table = pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return table.sort_values(["reader_layer", "writer_layer"], kind="stable", ignore_index=True)


def writer_factors(model: OpenedModel, layer: int, heads: Sequence[Head]) -> Factors:
    """R W_O with W_V = Q R: ||R W_O X|| = ||W_V W_O X|| for any X."""
    value, norm = layer_maps(model, layer).value, attention_norm(model, layer)
    w_v = _of_heads(model, value, heads, layer).folded(norm).weight
    return Factors.of(heads, _upper(w_v) @ _written(model, layer, heads))


def reader_factors(model: OpenedModel, layer: int, heads: Sequence[Head]) -> dict[str, Factors]:
    """(W_Q R^T)^T with W_K = Q R and the like: ||X W_Q W_K^T|| = ||X W_Q R^T|| for any X."""
    maps, norm = layer_maps(model, layer), attention_norm(model, layer)
    sides = {name: _of_heads(model, one, heads, layer).folded(norm).weight for name, one in _sides(maps).items()}
    rows = {"value": _upper(_written(model, layer, heads).transpose(1, 2)) @ sides["value"].transpose(1, 2)}
    if "query" in sides:
        rows["query"] = _upper(sides["key"]) @ sides["query"].transpose(1, 2)
        rows["key"] = _upper(sides["query"]) @ sides["key"].transpose(1, 2)
    return {via: Factors.of(heads, rows[via]) for via in VIA if via in rows}


def _sides(maps: LayerMaps) -> dict[str, Projected]:
    found = {"query": maps.query, "key": maps.key, "value": maps.value}
    return {name: one for name, one in found.items() if one is not None}


def _of_heads(model: OpenedModel, one: Projected, heads: Sequence[Head], layer: int) -> Projected:
    """The maps of some heads; grouped heads share theirs."""
    groups = [head.head * len(one.weight) // model.anatomy.sizes[layer].n_heads for head in heads]
    return Projected(one.weight[groups], one.bias[groups])


def _written(model: OpenedModel, layer: int, heads: Sequence[Head]) -> Float[Tensor, "head d_head d_model"]:
    return written_rows(model, layer)[[head.head for head in heads]]


def _upper(w: Float[Tensor, "head d_model width"]) -> Float[Tensor, "head rank width"]:
    """R of w = Q R."""
    upper: Tensor = torch.linalg.qr(w, mode="r").R
    return upper


def _groups(model: OpenedModel, before: dict[int, list[Head]]) -> Iterator[list[int]]:
    """Layers of writers, as many at a time as `WRITER_BYTES` hold."""
    group: list[int] = []
    held = 0
    for layer in sorted(before):
        size = model.anatomy.sizes[layer].d_head * model.anatomy.d_model * 8 * len(before[layer])
        if group and held + size > WRITER_BYTES:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    yield group


def _pairs(model: OpenedModel, writer: Factors, reader: Factors, via: str) -> dict[str, "np.ndarray[Any, Any]"]:
    """Columns of all pairs of a layer's writers and another's readers."""
    squares, d = _squares(writer.rows, reader.rows), model.anatomy.d_model
    n, m = squares.shape
    return {
        "writer": np.repeat([str(head) for head in writer.heads], m),
        "reader": np.tile([str(head) for head in reader.heads], n),
        "writer_layer": np.full(n * m, writer.heads[0].layer),
        "reader_layer": np.full(n * m, reader.heads[0].layer),
        "via": np.full(n * m, via),
        "score": squares.sqrt().flatten().double().cpu().numpy(),
        "baseline": np.full(n * m, d**-0.5),
        "deviations": _deviations(squares, writer, reader, d),
    }


def _carried(model: OpenedModel, writer: Factors, layer: int) -> Factors:
    """Writers as a later layer finds them where blocks multiply the stream elementwise (a number drops out)."""
    times = reach(model, writer.heads[0].layer, "attn", (layer, "attn"))
    return Factors.of(writer.heads, writer.rows * times) if isinstance(times, Tensor) else writer


def _squares(
    writers: Float[Tensor, "writer w d_model"], readers: Float[Tensor, "reader r d_model"]
) -> Float[Tensor, "writer reader"]:
    """||L_i M_j^T||^2 of all pairs, some writers at a time."""
    (n, w, d), (m, r, _) = writers.shape, readers.shape
    right = readers.reshape(m * r, d).T
    step = max(1, PRODUCT_BYTES // (w * m * r * readers.element_size()))
    found = [(some.reshape(-1, d) @ right).square_().view(len(some), w, m, r).sum((1, 3))
             for some in torch.split(writers, step)]  # fmt: skip
    return torch.cat(found) if n else right.new_zeros(0, m)


def _deviations(squares: Tensor, writer: Factors, reader: Factors, d: int) -> "np.ndarray[Any, Any]":
    """(score^2 - 1/d) over its standard deviation when the reader is turned at random.

    For symmetric A, B of trace 1: var tr(A Q B Q^T) = 2 (|A|^2 - 1/d) (|B|^2 - 1/d) / ((d - 1) (d + 2)).
    """
    a, b = ((one.spread.double().square() - 1 / d).clamp_min(0) for one in (writer, reader))
    spread = (2 * a[:, None] * b / max(1, (d - 1) * (d + 2))).sqrt()
    off = squares.double() - 1 / d
    found = torch.where(spread > 0, off / spread.clamp_min(1e-300), 0.0)
    return found.flatten().cpu().numpy()

"""Removing: what feeds a head, by taking each lower vector out of what its attention reads, at every position at once.

Two ways of the source's case study, side by side: everything recomputed (queries, keys, values and so the attention
weights), or with the attention weights fixed (values alone). The difference is what the vector did to the weights.
"""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.addresses import as_sites, expand
from resid_surgery.attribution.aims import Aim, aim_of, need_readout
from resid_surgery.attribution.readings import ids_of
from resid_surgery.attribution.shares import seen_by
from resid_surgery.errors import SiteError, UnsupportedModelError
from resid_surgery.models.tracing import attended, projected
from resid_surgery.sites import Constant, Head, Site, Sublayer
from resid_surgery.stream.elsewhere import need_stream
from resid_surgery.stream.kinds import attention_of
from resid_surgery.stream.recording import Recording, be_recording, closure_tolerance, need_recording
from resid_surgery.stream.records import repeat_kv
from resid_surgery.stream.subvalues import resolve_in

NORMS = ("live", "frozen")
ROWS = 32
Reads = Head | Sublayer


def attention_sources(
    rec: Recording,
    reader: Any,
    *,
    readout: str = "target",
    versus: Any = None,
    norm: str = "live",
) -> pd.DataFrame:
    """What a head writes towards a readout without each lower vector, by both ways (paper: attention's queries).

    With u[j] what a lower layer added at position j, attention reads N(r[j] - u[j]) at every j instead of N(r[j]):
    ``recomputed`` is what it then writes; ``weights_fixed`` is the same with the attention weights of the clean run.

    Args:
        rec: a recording made with ``positions="all"``. reader: a head, an attention layer, slices of them, or
            several.
        readout: "target", "difference" or "log_prob" (see `sources`). versus: other competitors.
        norm: "live" gives the norm the scale of what is left, "frozen" keeps that of the whole.

    Returns:
        One row per reader and writer (embed and every lower attention and MLP output): reader, writer, writer_layer,
        part, clean (bs-value that the reader writes towards the readout), recomputed, weights_fixed (the same without
        the writer), change, change_weights_fixed, by_weights (the difference of the two changes: what the writer did
        through the attention weights), unit, readout, norm, position.

    Raises:
        SiteError: no attention there. ArgumentError: recorded with positions="target"; unknown option.

    Source: Z. Yu, "Exploring the Residual Stream of Transformers for Mechanistic Interpretability - Explained" (2023),
    the two methods for attention layers.
    """
    _check.choice("norm", norm, NORMS)
    be_recording(rec)
    competitors = need_readout(rec, readout, versus)
    readers = _readers(rec, reader)
    if rec.prompt.position:
        need_stream(rec)
    need_recording(rec)
    aim = aim_of(rec, readout, competitors)
    layers = dict.fromkeys(one.layer for one in readers)
    frames = [_of_layer(rec, i, [one for one in readers if one.layer == i], aim, norm) for i in layers]
    table = pd.concat(frames, ignore_index=True)
    table["unit"], table["readout"], table["norm"], table["position"] = aim.unit, aim.name, norm, rec.prompt.position
    return table


def _readers(rec: Recording, given: Any) -> list[Reads]:
    found: list[Reads] = []
    many = given if _check.iterable(given) and not isinstance(given, (str, Site)) else [given]
    for site in expand(as_sites(many), rec.model.anatomy, rec.prompt.position):
        if not isinstance(site, (Head, Sublayer)) or getattr(site, "part", "attn") != "attn":
            raise SiteError(f"`reader` must be a head such as L9.H4 or an attention layer such as L9.attn; got {site}.")
        one = resolve_in(rec, site)
        assert isinstance(one, (Head, Sublayer))
        rec.model.anatomy.require(one.layer, "attn", f"sources of {one}")
        found.append(one)
    return found


def lower_vectors(rec: Recording, layer: int) -> list[tuple[Constant | Sublayer, Float[Tensor, "position d_model"]]]:
    """What each writer before a layer's attention added, at every position up to t, as it reaches that layer."""
    t, stop = rec.prompt.position, (layer, "attn")
    record = rec.stream

    def all_of(name: str, i: int) -> Tensor:
        if record is None:  # a prompt of one token
            return rec.work(getattr(rec.layers[i], name))[None]
        return rec.work(getattr(record, name)[i, : t + 1])

    found: list[tuple[Constant | Sublayer, Tensor]] = [
        (Constant("embed"), all_of("resid_pre", 0) * rec.reach(0, "pre", stop))
    ]
    for i in range(layer + 1):
        for part in ("attn", "mlp"):
            kind = getattr(rec.model.block(i), f"{part}_kind")
            if kind != "none" and seen_by((i, part), stop):
                found.append((Sublayer(i, part), all_of(f"{part}_out", i) * rec.reach(i, part, stop)))
    return found


def _of_layer(rec: Recording, layer: int, readers: list[Reads], aim: Aim, norm: str) -> pd.DataFrame:
    writers = lower_vectors(rec, layer)
    state = sum((u for _, u in writers), torch.zeros(()))
    assert isinstance(state, Tensor)
    size = rec.model.anatomy.sizes[layer]
    z, values = _without(rec, layer, state, [torch.zeros_like(state), *(u for _, u in writers)], norm)
    _need_same(rec, layer, z[0])
    worth = rec.work(rec.model.rows(layer, "attn_out").rows) @ aim.at_output(rec, layer, "attn")
    worth = worth.view(size.n_heads, size.d_head)
    recomputed = (z.view(len(z), *worth.shape) * worth).sum(-1)
    fixed = _weights_fixed(rec, layer, values, worth)
    frames = []
    for one in readers:
        heads = [one.head] if isinstance(one, Head) else list(range(size.n_heads))
        frames.append(_table(one, [site for site, _ in writers], recomputed[:, heads].sum(1), fixed[:, heads].sum(1)))
    return pd.concat(frames, ignore_index=True)


def _need_same(rec: Recording, layer: int, found: Float[Tensor, " width"]) -> None:
    """With nothing removed, attention run alone must mix what the recording has."""
    kept = rec.work(attention_of(rec, layer, f"L{layer}.H0").z).flatten()
    if not float((found - kept).abs().max()) <= 100 * closure_tolerance(rec.model) * float(kept.abs().max()):
        raise UnsupportedModelError(
            f"attention of layer {layer} of {rec.model.name} reads its input in more than one argument, so that a "
            "lower vector cannot be taken out of all of it here. Use rs.sources, or rs.Cut."
        )


def _without(
    rec: Recording, layer: int, state: Tensor, removed: list[Tensor], norm: str
) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n kv position d_head"]]:
    """(W_O's input at t, values) of a layer's attention with each removed vector taken out of what it reads."""
    form, t = rec.model.norm(layer, "attn_norm"), rec.prompt.position
    s, mixed, values = form.scale(state), [], []
    for low in range(0, len(removed), ROWS):
        rest = state - torch.stack(removed[low : low + ROWS])
        x = form.linear(rest, s if norm == "frozen" else form.scale(rest)) + form.bias
        ids = ids_of(rec, len(x))
        mixed.append(rec.work(attended(rec.model, layer, x, ids)[:, t]))
        values.append(rec.work(projected(rec.model, layer, x, ids, frozen=False)[0].value))
    return torch.cat(mixed), torch.cat(values)


def _weights_fixed(
    rec: Recording, layer: int, values: Float[Tensor, "n kv position d_head"], worth: Float[Tensor, "head d_head"]
) -> Float[Tensor, "n head"]:
    """sum_j alpha[h, j] gate v[h, j] . worth with the recorded weights and gate."""
    one = attention_of(rec, layer, f"L{layer}.H0")
    alpha = rec.work(one.alpha)[:, : values.shape[2]]
    through = worth if one.gate is None else worth * rec.work(one.gate)
    own = torch.stack([repeat_kv(row, len(alpha)) for row in values])
    return torch.einsum("hj,nhjd,hd->nh", alpha, own, through)


def _table(reader: Reads, writers: list[Constant | Sublayer], recomputed: Tensor, fixed: Tensor) -> pd.DataFrame:
    change, kept = recomputed[1:] - recomputed[0], fixed[1:] - fixed[0]
    return pd.DataFrame(
        {
            "reader": str(reader),
            "writer": [str(site) for site in writers],
            "writer_layer": [getattr(site, "layer", -1) for site in writers],
            "part": [getattr(site, "part", "embed") for site in writers],
            "clean": float(recomputed[0]),
            "recomputed": recomputed[1:].tolist(),
            "weights_fixed": fixed[1:].tolist(),
            "change": change.tolist(),
            "change_weights_fixed": kept.tolist(),
            "by_weights": (change - kept).tolist(),
        }
    )

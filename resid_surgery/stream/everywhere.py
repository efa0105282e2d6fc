"""The run at a glance: what every state at every position would predict, and where every head looks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import layers as layers_in
from resid_surgery.addresses import as_sites, expand
from resid_surgery.errors import SiteError
from resid_surgery.models.prompts import token_text
from resid_surgery.sites import Head
from resid_surgery.stream.elsewhere import need_stream
from resid_surgery.stream.kinds import attention_of
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.vocabulary import CHUNK_BYTES, Readout, token_names


def lens_positions(rec: Recording, *, layers: Any = None) -> pd.DataFrame:
    """Logit lens at every position: what each block's input, and the final stream, would predict there.

    log p(. | r) of the state r read with its *own* norm: not additive, so never a bs-value.

    Args:
        rec: a recording made with ``positions="all"``. layers: of the states; None for all. The final stream is there
            in any case.

    Returns:
        One row a state and position: step (of the state, in forward order), site (``L3.resid_pre``, at last
        ``L29.resid_post``), layer, position, token (of the prompt), predicted, predicted_id (the most probable next
        token), prob (its probability), target_prob, target_log_prob (nats), target_rank (1 is best), norm ("own").

    Raises:
        ArgumentError: recorded with ``positions="target"``; layer out of range. StaleRecordingError: weights changed.

    Source: nostalgebraist 2020 (logit lens).
    """
    be_recording(rec)
    picked = layers_in(layers, rec.model.anatomy.n_layers, model=rec.model.name)
    need_stream(rec)
    need_recording(rec)
    rows = [row for step, (site, layer, states) in enumerate(_states(rec, picked))
            for row in _read(rec, step, site, layer, states)]  # fmt: skip
    names = ["step", "site", "layer", "position", "token", "predicted_id", "prob", "target_log_prob", "target_rank"]
    table = pd.DataFrame(rows, columns=names)
    table.insert(5, "predicted", token_names(rec.model, table["predicted_id"].tolist()))
    table.insert(8, "target_prob", np.exp(table["target_log_prob"]))
    table["norm"] = "own"
    table.attrs["target"] = token_text(rec.prompt.target, rec.model.tokenizer)
    return table


def _states(rec: Recording, layers: tuple[int, ...]) -> Iterator[tuple[str, int, Float[Tensor, "position d_model"]]]:
    """(site, layer, its state at every position), the final stream last."""
    stream, last = rec.stream, rec.model.anatomy.n_layers - 1
    assert stream is not None
    for layer in layers:
        yield f"L{layer}.resid_pre", layer, rec.work(stream.resid_pre[layer])
    pre, attn, mlp = (rec.work(one[last]) for one in (stream.resid_pre, stream.attn_out, stream.mlp_out))
    factor = rec.model.factor
    if rec.model.block(last).parallel:
        final = factor(last, "mlp_carry") * pre + attn + mlp
    else:
        final = factor(last, "mlp_carry") * (factor(last, "attn_carry") * pre + attn) + mlp
    yield f"L{last}.resid_post", last, final


def _read(rec: Recording, step: int, site: str, layer: int, states: Tensor) -> Iterator[tuple[Any, ...]]:
    """Rows of one state at every position, a slice of positions at a time."""
    readout, target, prompt = Readout.of(rec), rec.prompt.target, rec.prompt
    size = max(1, CHUNK_BYTES // (rec.model.vocab_size * states.element_size()))
    position = 0
    for some in torch.split(states, size):
        log_p = readout.lens(some)
        best, predicted = log_p.max(-1)
        ranks = 1 + (log_p > log_p[:, target, None]).sum(-1)
        for i in range(len(some)):
            yield (step, site, layer, position, prompt.tokens[position], int(predicted[i]), float(best[i].exp()),
                   float(log_p[i, target]), int(ranks[i]))  # fmt: skip
            position += 1


def attention_weights(rec: Recording, heads: Any = "L*.H*") -> pd.DataFrame:
    """Where heads look from the predicting position: their attention weights (paper: attention scores alpha).

    The *effective* weight alpha[t, j], with which the head's value at j enters its output; they need not sum to 1
    (sinks), and may be negative (differential attention).

    Args:
        rec: a recording. heads: a head, slices of them such as ``"L3.H*"``, or several; all by default.

    Returns:
        One row a head and source: site (``L3.H4<2``), layer, head, source, token (of the prompt, there), weight,
        position.

    Raises:
        SiteError: no such head, or a site that is no head.
    """
    be_recording(rec)
    rows: list[tuple[Any, ...]] = []
    t, prompt = rec.prompt.position, rec.prompt
    for one in expand(as_sites(heads), rec.model.anatomy, t):
        site = one.resolve(rec.model.anatomy)
        if not isinstance(site, Head):
            raise SiteError(f"`heads` must be heads such as L9.H4, or slices of them such as L9.H*; got {site}.")
        weights = attention_of(rec, site.layer, str(site)).alpha[site.head, : t + 1].double().tolist()
        rows += [(f"{site}<{j}", site.layer, site.head, j, prompt.tokens[j], w) for j, w in enumerate(weights)]
    table = pd.DataFrame(rows, columns=["site", "layer", "head", "source", "token", "weight"])
    return table.assign(position=t)

"""Gradients of the target's log-probability with respect to what sublayers write at t.

One backward pass gives G = d log p(w) / d (a sublayer's output before a post-norm); gradient times activation of every
neuron, head, (head, source) pair and attention neuron is then the dot product of its raw vector with G.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import gradients
from resid_surgery.stream.recording import Recording


def gradients_of(rec: Recording, places: Sequence[tuple[int, str]], *, whole: bool) -> list[Float[Tensor, " d_model"]]:
    """d log p(w) / d output at t, for each (layer, "attn" | "mlp"); in the working dtype.

    Args:
        rec: a recording. places: of the sublayers. whole: of what enters the stream behind the post-norm, before
            a multiplier, instead of what is written.
    """
    model = rec.model
    taps = []
    for layer, part in places:
        post = whole and model.has(layer, f"{part}_post_norm")
        taps.append(Tap(f"{part}_{'add' if post else 'raw'}", layer))  # type: ignore[arg-type]
    ids = torch.tensor([rec.prompt.ids], device=rec.layers[0].resid_pre.device)
    found = gradients(model, ids, taps, at=rec.prompt.position, token=rec.prompt.target)
    return [rec.work(found[tap][rec.prompt.position]) for tap in taps]


def added_by(rec: Recording, layer: int, part: str) -> Float[Tensor, " d_model"]:
    """What a sublayer adds, before its multiplier: the activation of a whole sublayer."""
    record = rec.layers[layer]
    raw = rec.work(record.attn_raw if part == "attn" else record.mlp_raw)
    name = f"{part}_post_norm"
    return rec.model.norm(layer, name)(raw) if rec.model.has(layer, name) else raw

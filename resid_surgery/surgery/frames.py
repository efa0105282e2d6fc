"""Frames: how the rows of a sweep lie in a forward, and what they share.

Packed, the default. Rows are put side by side as tokens of one sequence, behind the cached prompt: each row has
its own tokens from the first position that it touches up to the predicting one. A mask lets a token see what comes
before its row's tokens in the cache, and these up to its own; positions are counted as in the prompt. Nothing is
held per row but its tokens.

Full, where packing is not exact (a family that makes its own mask, a sliding window, a state space): whole prompts
in rows of their own.

Both begin at the first touched layer, from the recorded stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import Restored, forward
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.batches import Batch, Packed, Rows
from resid_surgery.surgery.engine import device_of

Kind = Literal["packed", "full"]


@final
@dataclass(eq=False)
class Frames:
    """What the batches of a sweep share: the prefix's cache and the stream, made when first needed.

    Attributes:
        rec: the recording. kind: of frame; a batch that is not exact when packed turns it to "full".
    """

    rec: Recording
    kind: Kind = "packed"
    _prefix: list[tuple[Tensor, Tensor]] | None = None
    _states: Float[Tensor, "layer position d_model"] | None = None

    @property
    def model(self) -> OpenedModel:
        """Whose."""
        return self.rec.model

    @property
    def t(self) -> int:
        """The predicting position."""
        return self.rec.prompt.position

    def batch(self, firsts: Sequence[int]) -> Batch:
        """Where rows lie whose first touched positions are these."""
        if self.kind == "full":
            return Rows(0, self.t + 1)
        packed = Packed(self.t, self.t)
        for first in firsts:
            packed.add(first)
        return packed

    def feed(self, batch: Batch, rows: int, start: int, stream: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """(token ids, other arguments of `forward`) of a batch of rows that begins at layer `start`, from the
        recorded stream there unless another one, (token, d_model), is given."""
        device, extra = device_of(self.model), {}
        prompt = torch.tensor(self.rec.prompt.ids[: self.t + 1], device=device)
        if isinstance(batch, Rows):
            if start:
                extra["resume"] = (start, self.states(start).expand(rows, -1, -1).contiguous())
            return prompt.repeat(rows, 1), extra
        at = batch.positions().to(device)
        if stream is not None:
            extra["resume"] = (start, stream[None])
        elif start:
            alone = batch.tokens == len(batch.firsts)  # everything is at the predicting position
            states = self.rec.layers[start].resid_pre[None] if alone else self.states(start)
            extra["resume"] = (start, states.repeat(rows, 1)[None] if alone else states[at][None])
        given: dict[str, Any] = {"attention_mask": self._mask(batch), "position_ids": at[None]}
        if batch.cached:
            given |= {"past_key_values": self._cache(), "use_cache": True}
        return prompt[at][None], extra | {"given": given}

    def states(self, layer: int) -> Float[Tensor, "position d_model"]:
        """The recorded stream before a layer, up to the predicting position."""
        if self.rec.stream is not None:
            return self.rec.stream.resid_pre[layer, : self.t + 1]
        if self._states is None:
            ids = torch.tensor([self.rec.prompt.ids[: self.t + 1]], device=device_of(self.model))
            taps = [Tap("block_in", i) for i in range(self.model.anatomy.n_layers)]
            values = forward(self.model, ids, taps, logits_at=[self.t])
            self._states = torch.stack([values[tap][0] for tap in taps])
        return self._states[layer]

    def _mask(self, batch: Packed) -> Tensor:
        """(1, 1, token, cached + token): what comes before the row's own tokens, and these up to one's own."""
        dtype, device = self.model.dtype, device_of(self.model)
        row, n = batch.rows(), torch.arange(batch.tokens)
        own = (row[:, None] == row) & (n[:, None] >= n)
        shared = torch.arange(batch.cached) < torch.tensor(batch.firsts)[row][:, None]
        seen = torch.cat([shared, own], 1).to(device)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    def _cache(self) -> Any:
        """A cache of the prompt before the predicting position; the model appends to it without touching what is
        shared."""
        if self._prefix is None:
            held = DynamicCache()
            ids = torch.tensor([self.rec.prompt.ids[: self.t]], device=device_of(self.model))
            given = {"past_key_values": held, "use_cache": True}
            forward(self.model, ids, [], logits_at=[self.t - 1], given=given)
            self._prefix = [(layer.keys, layer.values) for layer in held.layers]
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self._prefix):
            cache.update(keys[:, :, :0], values[:, :, :0], i)
            cache.layers[i].keys, cache.layers[i].values = keys, values
        return cache


def resumable(model: OpenedModel) -> bool:
    """Whether blocks give plain tensors, so that what comes out of one can be put in its place."""
    if "resumable" not in model.cache:
        outputs: list[bool] = []
        with model.lock, Restored(), torch.no_grad():
            module = model.shadow.get_submodule(model.path(0, "block"))
            handle = module.register_forward_hook(lambda _, args, output: outputs.append(isinstance(output, Tensor)))
            try:
                model.shadow(model.probe_ids()[:, :1], use_cache=False)
            finally:
                handle.remove()
        model.cache["resumable"] = all(outputs)
    return bool(model.cache["resumable"])

"""Frames: how the rows of a sweep lie in a forward, and what they share.

Packed, the default. Rows are put side by side as tokens of one sequence: after the cached prefix that all of
them share, each row has its own tokens from the first touched position up to the predicting one. A mask lets a
token see the prefix and what comes before it in its own row; positions are counted as in the prompt. A forward of
R rows of S tokens is one of R * S tokens, and nothing is held per row but its tokens.

Full, where packing is not exact (a family that makes its own mask, a sliding window, a state space): whole prompts
in rows of their own.

Both begin at the first touched layer, from the recorded stream.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.engine import device_of
from resid_surgery.surgery.reading import Grid

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
    _whole: int = field(default=0)

    @property
    def model(self) -> OpenedModel:
        """Whose."""
        return self.rec.model

    @property
    def t(self) -> int:
        """The predicting position."""
        return self.rec.prompt.position

    def grid(self, first: int) -> Grid:
        """Where rows lie whose first touched position is `first`."""
        if self.kind == "full":
            return Grid(0, self.t + 1, False)
        return Grid(first, self.t + 1 - first, True)

    def feed(self, grid: Grid, rows: int, start: int, stream: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """(token ids, other arguments of `forward`) of a batch of rows that begins at layer `start`, from the
        recorded stream there unless another one, (token, d_model), is given."""
        device = device_of(self.model)
        ids = torch.tensor([self.rec.prompt.ids[grid.first : self.t + 1]], device=device)
        extra: dict[str, Any] = {}
        if stream is not None:
            extra["resume"] = (start, stream[None])
        elif start:
            states = self.states(start, grid)
            states = states.repeat(rows, 1)[None] if grid.packed else states.expand(rows, -1, -1).contiguous()
            extra["resume"] = (start, states)
        if not grid.packed:
            return ids.repeat(rows, 1), extra
        given: dict[str, Any] = {
            "attention_mask": self._mask(grid, rows),
            "position_ids": self._positions(grid, rows, device),
        }
        if grid.first:
            given |= {"past_key_values": self._cache(grid.first), "use_cache": True}
        return ids.repeat(1, rows), extra | {"given": given}

    def states(self, layer: int, grid: Grid) -> Float[Tensor, "position d_model"]:
        """The recorded stream before a layer, at a grid's positions."""
        if grid.span == 1:
            return self.rec.layers[layer].resid_pre[None]
        if self.rec.stream is not None:
            return self.rec.stream.resid_pre[layer, grid.first : self.t + 1]
        if self._states is None:
            ids = torch.tensor([self.rec.prompt.ids[: self.t + 1]], device=device_of(self.model))
            taps = [Tap("block_in", i) for i in range(self.model.anatomy.n_layers)]
            values = forward(self.model, ids, taps, logits_at=[self.t])
            self._states = torch.stack([values[tap][0] for tap in taps])
        return self._states[layer, grid.first :]

    def _mask(self, grid: Grid, rows: int) -> Tensor:
        """(1, 1, token, prefix + token): the prefix, and the same row's tokens up to one's own."""
        dtype, device = self.model.dtype, device_of(self.model)
        n = rows * grid.span
        row = torch.arange(n, device=device) // grid.span
        seen = (row[:, None] == row) & (torch.arange(n, device=device)[:, None] >= torch.arange(n, device=device))
        seen = torch.cat([torch.ones(n, grid.first, dtype=torch.bool, device=device), seen], 1)
        hidden = torch.finfo(dtype).min
        return torch.zeros(n, grid.first + n, dtype=dtype, device=device).masked_fill(~seen, hidden)[None, None]

    def _positions(self, grid: Grid, rows: int, device: Any) -> Tensor:
        return torch.arange(grid.first, self.t + 1, device=device).repeat(rows)[None]

    def _cache(self, first: int) -> Any:
        """A cache of the prompt's first positions; the model appends to it without touching what is shared."""
        if self._prefix is None:
            held = DynamicCache()
            ids = torch.tensor([self.rec.prompt.ids[: self.t]], device=device_of(self.model))
            given = {"past_key_values": held, "use_cache": True}
            forward(self.model, ids, [], logits_at=[self.t - 1], given=given)
            self._prefix = [(layer.keys, layer.values) for layer in held.layers]
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self._prefix):
            cache.update(keys[:, :, :0], values[:, :, :0], i)
            cache.layers[i].keys, cache.layers[i].values = keys[:, :, :first], values[:, :, :first]
        return cache


def resumable(model: OpenedModel) -> bool:
    """Whether blocks give plain tensors, so that what comes out of one can be put in its place."""
    if "resumable" not in model.cache:
        outputs: list[bool] = []
        module = model.shadow.get_submodule(model.path(0, "block"))
        handle = module.register_forward_hook(lambda _, args, output: outputs.append(isinstance(output, Tensor)))
        try:
            with model.lock, torch.no_grad():
                model.shadow(model.probe_ids()[:, :1], use_cache=False)
        finally:
            handle.remove()
        model.cache["resumable"] = all(outputs)
    return bool(model.cache["resumable"])

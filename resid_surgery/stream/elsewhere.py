"""Elsewhere: a recording's run seen from its other positions.

A key or value at source j is made of position j's addends. They are read by repeating the forward, with the same
tokens, and keeping what stands at j; a `Recording` of position j is what comes out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery._check import message, whole
from resid_surgery.errors import ArgumentError, ClosureError
from resid_surgery.models.attention import ExpertsCall
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import Recording, closure_tolerance, from_values, record_taps, require_closed

AT_ONCE = 64


@final
@dataclass(eq=False)
class Elsewhere:
    """One run, seen from any position; positions are read when they are first asked for.

    Attributes:
        rec: the recording. views: position -> `Recording` of the same tokens whose predicting position is that.
    """

    rec: Recording
    views: dict[int, Recording] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.views[self.rec.prompt.position] = self.rec

    def at(self, position: int) -> Recording:
        """The run seen from one position."""
        self.fetch([position])
        return self.views[position]

    def fetch(self, positions: Iterable[int]) -> None:
        """Read several positions at once: one forward for every `AT_ONCE` of them."""
        missing = sorted({whole("position", p, 0, self.rec.n_positions - 1) for p in positions} - set(self.views))
        if missing:
            need_stream(self.rec)
        for low in range(0, len(missing), AT_ONCE):
            self._read(missing[low : low + AT_ONCE])

    def _read(self, positions: list[int]) -> None:
        rec, model = self.rec, self.rec.model
        ids = torch.tensor([rec.prompt.ids], device=model.shadow.get_input_embeddings().weight.device)  # type: ignore[operator]
        values = forward(model, ids, record_taps(model), at=positions)
        for i, position in enumerate(positions):
            seen = {tap: _one(tap, value, i) for tap, value in values.items()}
            view = from_values(model, replace(rec.prompt, position=position), seen, rec.label, every=False)
            require_closed(view)
            self._agree(view)
            self.views[position] = replace(view, stream=rec.stream)

    def _agree(self, view: Recording) -> None:
        """What is read now must be what the recording kept of that position."""
        stream, position = self.rec.stream, view.prompt.position
        assert stream is not None
        most = 10 * closure_tolerance(self.rec.model)
        for layer, record in enumerate(view.layers):
            kept, found = self.rec.work(stream.resid_pre[layer, position]), self.rec.work(record.resid_pre)
            if not float((kept - found).abs().max()) <= most * float(kept.abs().max()):
                raise ClosureError(
                    f"position {position} of this recording of {self.rec.model.name} cannot be read again: layer "
                    f"{layer} differs. Does a hook or a random number change the model's forward?"
                )


def _one(tap: Tap, value: Any, i: int) -> Any:
    """What a tap has at the i-th of the positions that were kept."""
    if isinstance(value, Tensor):
        return value[:, i : i + 1] if value.shape[1] > 1 else value
    if isinstance(value, ExpertsCall):
        return ExpertsCall(*(one[:, i : i + 1] for one in (value.states, value.index, value.weight)))
    return value


def need_stream(rec: Recording) -> None:
    """Refuse a recording that kept one position only.

    Raises:
        ArgumentError: it was recorded with ``positions="target"``.
    """
    if rec.stream is None:
        raise ArgumentError(
            message("rec", 'a recording with positions="all" where other positions are read', f"{rec!r} of one",
                    do='Record again: rs.record(model, prompt, positions="all").')
        )  # fmt: skip

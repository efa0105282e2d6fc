"""Noting: what the writes of a forward find out, and what of it comes back from a forward that ran elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from resid_surgery.models.attention import AttentionCall
from resid_surgery.models.taps import Tap
from resid_surgery.sites import ExpertNeuron


@final
@dataclass(eq=False)
class Change:
    """What the operations of one row did at one position of one sublayer or state.

    Attributes:
        raw: (d_model,) left minus found in the sublayer's output, before a post-norm.
        added: (d_model,) left minus found in what is added, or in a state.
    """

    raw: Tensor | None = None
    added: Tensor | None = None


@dataclass(eq=False)
class Noting:
    """What writes note while they are carried out.

    Attributes:
        left, found: tap -> what was left and what was found there. calls: layer -> queries, keys and values as left.
        changes: (row, position) -> (layer, "attn" | "mlp" | "pre" | "mid" | "post") -> `Change`, for
            noted positions. mixed: (row, position, layer) -> change of what heads mixed, before a gate.
        experts_left: (row, position, neuron) -> what it writes. in_mixture: (row, position) -> layer -> (routed or
            shared, change inside the mixture). weights: (layer, row, position) -> attention weights worked out so
            far. edited: some of them were set.
    """

    left: dict[Tap, Tensor] = field(default_factory=dict)
    found: dict[Tap, Tensor] = field(default_factory=dict)
    changes: dict[tuple[int, int], dict[tuple[int, str], Change]] = field(default_factory=dict)
    mixed: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    experts_left: dict[tuple[int, int, ExpertNeuron], Tensor] = field(default_factory=dict)
    in_mixture: dict[tuple[int, int], dict[int, list[tuple[str, Tensor]]]] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    weights: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    edited: bool = False

    def noted(self) -> dict[str, Any]:
        """Name -> what was noted."""
        return {name: getattr(self, name) for name in Noting.__dataclass_fields__}

    def take(self, noted: dict[str, Any]) -> None:
        """Hold what a forward elsewhere noted."""
        for name, value in noted.items():
            setattr(self, name, value)

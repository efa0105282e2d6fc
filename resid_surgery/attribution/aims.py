"""Aims: what a writer's vector is held against, as one direction of the stream that somebody reads.

    worth of v = direction . (v as it reaches what `stop` reads)

A token's bs-value, the difference of two tokens, the first-order log-probability, a neuron's key: all are aims.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.queries import versus_of
from resid_surgery.errors import ArgumentError
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.kinds import post_map
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.vocabulary import Readout, token_names

READOUTS = ("target", "difference", "log_prob")


@final
@dataclass(frozen=True, eq=False)
class Aim:
    """A direction of the stream where somebody reads it.

    Attributes:
        direction: (d_model,). stop: (layer, part) that reads there; None for the final stream.
        unit: of direction . vector. name: what it is called in tables.
        constants: of a readout: name -> what belongs to no vector. plain: (d_model,) the same without the norm.
        measured: of a readout: what the model's own logits before a soft-cap give. weights: (vocabulary,) of a readout:
            it is weights . bs.
    """

    direction: Float[Tensor, " d_model"]
    stop: tuple[int, str] | None
    unit: str
    name: str
    constants: dict[str, float]
    plain: Float[Tensor, " d_model"]
    measured: float = float("nan")
    weights: Float[Tensor, " vocabulary"] | None = None

    def at_output(self, rec: Recording, layer: int, part: str) -> Float[Tensor, " d_model"]:
        """The direction where a sublayer writes: before its frozen post-norm and what later blocks multiply by."""
        return self.post(rec, layer, part).pull(self.direction)

    def post(self, rec: Recording, layer: int, part: str) -> PostMap:
        """From the sublayer's output to where the direction is."""
        return post_map(rec, layer, part).then(rec.reach(layer, part, self.stop))


def need_readout(rec: Recording, readout: Any, versus: Any) -> tuple[int, ...]:
    """Ids of the competitors that a readout is against.

    Raises:
        ArgumentError: unknown readout, or a difference without competitors. PromptError: `versus` is no token.
    """
    _check.choice("readout", readout, READOUTS)
    ids = versus_of(rec.model, rec.prompt, versus)
    if readout == "difference" and not ids:
        raise ArgumentError(
            f"readout 'difference' needs competitors for {rec.model.name}; the prompt has none. Give "
            "Prompt(versus=[...]) or versus=."
        )
    return ids


def aim_of(rec: Recording, readout: str, versus: tuple[int, ...]) -> Aim:
    """A readout of the final stream as an aim.

    "target": bs_w. "difference": bs_w minus the mean of the competitors'. "log_prob": bs_w - sum_i p_i bs_i, the
    first-order change of log p(w) before a soft-cap.
    """
    reading = Readout.of(rec)
    w, work = rec.prompt.target, rec.work
    weights = torch.zeros(rec.model.vocab_size, dtype=rec.model.work_dtype, device=rec.model.device)
    if readout == "difference":
        weights[list(versus)] = 1 / len(versus)
    elif readout == "log_prob":
        weights = torch.softmax(work(rec.logits), -1)
    row = reading.rows([w])[0]
    if readout == "difference":
        row = row - reading.rows(versus).mean(0)
    elif readout == "log_prob":
        row = row - reading.mix(weights[None])[0]
    weights = -weights
    weights[w] += 1.0
    measured = float(weights @ work(rec.bs_values))
    constants = {name: float(weights @ v) for name, v in reading.named_constants().items()}
    target, names = token_names(rec.model, [w])[0], token_names(rec.model, versus)
    name = {
        "target": f"bs {target!r}",
        "difference": f"bs {target!r} - {names[0]!r}" if len(names) == 1 else f"bs {target!r} - mean of {names}",
        "log_prob": f"log p {target!r} (first order)",
    }[readout]
    direction = reading.norm.pull(row, reading.s)
    return Aim(direction, None, "bs-value", name, constants, row, measured, weights)

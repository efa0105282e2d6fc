"""Values: what a layer's down-projection would have to write at the end of a subject for a new answer to follow.

v* = v + delta, where v is what it writes for the rewrite's key. delta is found by Adam on

    nll + kl_factor * KL + weight_decay * |delta|^2 / |v|^2

    nll   -log p(new answer), all its tokens, mean over the contexts                                         (nats)
    KL    KL(base, now) of the token after "{subject} is a": what the subject is stays as it was             (nats)

and after each step delta is shortened to at most clamp * |v|. It is added at the raw output, before a post-norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.editing.keys import Context, batch, grouped
from resid_surgery.errors import ArgumentError
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward, pushed

Where = tuple[Tensor, Tensor, Tensor | None]
"""(row, position) ids, (row,) the subject's last token, (row, position, d_model) the stream before the layer."""


@final
@dataclass(frozen=True, kw_only=True)
class Descent:
    """How delta is looked for.

    Attributes:
        steps: most steps. learning_rate: how far one goes, as a share of |v|. until: stop when the new answer has this
            probability in every context. kl_factor, weight_decay: weights of the two terms. clamp: most |delta| / |v|.
    """

    steps: int = 25
    learning_rate: float = 0.3
    until: float = 0.9
    kl_factor: float = 0.0625
    weight_decay: float = 0.01
    clamp: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _check.whole("steps", self.steps, 1))
        for name, low, high in (("learning_rate", 0.0, None), ("until", 0.0, 1.0), ("clamp", 0.0, None)):
            value = _check.finite(name, getattr(self, name))
            if value <= low or (high is not None and value > high):
                span = f"a number > {low:g}" + ("" if high is None else f" and <= {high:g}")
                raise ArgumentError(_check.message(name, span, value))
            object.__setattr__(self, name, value)
        for name in ("kl_factor", "weight_decay"):
            if (value := _check.finite(name, getattr(self, name))) < 0:
                raise ArgumentError(_check.message(name, "a number >= 0", getattr(self, name)))
            object.__setattr__(self, name, value)


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """What was found.

    Attributes:
        delta: (d_model,) float64. steps: one row a step; see `fit_delta`.
    """

    delta: Float[Tensor, " d_model"]
    steps: pd.DataFrame


@final
class Objective:
    """The loss of one rewrite as a function of delta; blocks below the layer run once.

    Args:
        model, layer: where. asked: contexts with their answer, the plain prompt first. kept: of the essence.
        v: (d_model,) what the layer writes for the key. how: weights of the terms.
    """

    def __init__(
        self, model: OpenedModel, layer: int, asked: Sequence[Context], kept: Context, v: Tensor, how: Descent
    ) -> None:
        self.model, self.layer, self.how = model, layer, how
        self.size = float(v.norm())
        self.asked, self.kept = list(asked), kept
        self.groups = [(group, self._read([asked[i] for i in group])) for group in grouped(asked)]
        self.essence = self._read([kept])
        self.base: Tensor | None = None

    def __call__(self, delta: Float[Tensor, " d_model"]) -> tuple[Float[Tensor, " d_model"], dict[str, float]]:
        """(gradient, parts) at delta: loss, nll, kl, decay, prob_new (the first context), prob_lowest (of all)."""
        with GradKept(), torch.inference_mode(False), torch.enable_grad():
            leaf = delta.detach().clone().double().requires_grad_()
            log_p = torch.zeros(len(self.asked), dtype=torch.float64)
            total = torch.zeros_like(leaf)
            for group, where in self.groups:
                some = self._answers(leaf, [self.asked[i] for i in group], where)
                total += torch.autograd.grad(-some.sum() / len(self.asked), leaf)[0]
                log_p[group] = some.detach().double().cpu()
            kl = self._kl(leaf)
            total += torch.autograd.grad(self.how.kl_factor * kl, leaf)[0]
            decay = self.how.weight_decay * leaf.square().sum() / self.size**2
            total += torch.autograd.grad(decay, leaf)[0]
        parts = {"nll": -float(log_p.mean()), "kl": float(kl.detach()), "decay": float(decay.detach())}
        loss = parts["nll"] + self.how.kl_factor * parts["kl"] + parts["decay"]
        probs = {"prob_new": float(log_p[0].exp()), "prob_lowest": float(log_p.min().exp())}
        return total, {"loss": loss, **parts, **probs}

    def _read(self, some: Sequence[Context]) -> Where:
        ids, at = batch(self.model, some)
        tap = Tap("block_in", self.layer)
        if self.layer == 0:
            return ids, at, None
        return ids, at, forward(self.model, ids, [tap], at=[ids.shape[1] - 1], everywhere=[tap])[tap]

    def _logits(self, leaf: Tensor, where: Where, last: int) -> Tensor:
        """(row, last, vocabulary) log-probabilities at the last positions, with delta added."""
        ids, at, stream = where
        here = torch.zeros(*ids.shape, 1, dtype=leaf.dtype, device=ids.device)
        here[torch.arange(len(ids)), at] = 1.0
        keep = list(range(ids.shape[1] - last, ids.shape[1]))
        return torch.log_softmax(pushed(self.model, ids, self.layer, here * leaf, keep=keep, stream=stream), -1)

    def _answers(self, leaf: Tensor, some: Sequence[Context], where: Where) -> Tensor:
        """(row,) log p of the whole answer."""
        log_p = self._logits(leaf, where, len(some[0].answer))
        answers = torch.tensor([one.answer for one in some], device=log_p.device)
        return log_p.gather(-1, answers[..., None])[..., 0].sum(-1)

    def _kl(self, leaf: Tensor) -> Tensor:
        """KL(base, now) of the token after the essence; the first call, at delta = 0, gives the base."""
        now = self._logits(leaf, self.essence, 1)[0, -1]
        if self.base is None:
            self.base = self._logits(torch.zeros_like(leaf), self.essence, 1)[0, -1].detach()
        return (self.base.exp() * (self.base - now)).sum()


def fit_delta(objective: Objective, step: Callable[..., None] = lambda *_, **__: None, *, fact: str = "") -> Fit:
    """delta by Adam (from 0, so there is nothing random in it), with the norm clamped after each step.

    Args:
        objective: of one rewrite. step: told the name of each step. fact: what the table calls it.

    Returns:
        `Fit`; its table has one row an evaluation. Columns: fact, step, loss, nll, kl, decay (nats; decay as weighted),
        prob_new (probability of the whole new answer in the first context), prob_lowest (the lowest of all contexts),
        delta_norm (|delta| / |v|). The last row is of the delta that is returned.
    """
    how = objective.how
    width = objective.model.anatomy.d_model
    with torch.inference_mode(False):
        delta = torch.zeros(width, dtype=torch.float64, device=objective.model.device)
        adam = torch.optim.Adam([delta], lr=how.learning_rate * objective.size / width**0.5)
        rows: list[dict[str, Any]] = []
        for number in range(how.steps + 1):
            gradient, parts = objective(delta)
            rows.append({"fact": fact, "step": number, **parts, "delta_norm": float(delta.norm()) / objective.size})
            step(fact)
            if number == how.steps or parts["prob_lowest"] >= how.until:
                break
            _need_usable(gradient, objective, fact, first=number == 0)
            delta.grad = gradient
            adam.step()
            delta *= min(1.0, how.clamp * objective.size / max(float(delta.norm()), 1e-300))
        return Fit(delta.clone(), pd.DataFrame(rows))


def _need_usable(gradient: Tensor, objective: Objective, fact: str, *, first: bool) -> None:
    if first and not bool(gradient.any()):
        raise ArgumentError(
            f"the value of {fact!r} cannot be fitted at layer {objective.layer} of {objective.model.name}: nothing "
            "that is written at its subject there reaches the answer. Choose a lower layer."
        )
    if not bool(gradient.isfinite().all()):
        raise ArgumentError(
            f"the value of {fact!r} cannot be fitted at layer {objective.layer} of {objective.model.name}: its "
            "gradient is not finite. Choose another layer, or load the model in float32."
        )

"""Experts: the tensors of a mixture of experts, addressed one expert at a time.

transformers keeps all experts of a layer in 3-D tensors and calls them with (states, indices,
weights). What expert e writes for one token is weight * (coefficient @ down[e] + bias), with
coefficient = activation(gate, up) as the module itself computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resid_surgery.models.modes import GradKept
from resid_surgery.models.parts import LinearMap


@final
@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer.

    Attributes:
        module: their module. gated: two keys a neuron. transposed: stored (expert, in, out).
        halves: gate and up lie one after the other, not interleaved.
    """

    module: Any
    gated: bool
    transposed: bool
    halves: bool

    @property
    def count(self) -> int:
        """How many experts."""
        return int(self.module.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return int(self.module.down_proj.shape[1 if self.transposed else 2])

    def out(self, expert: int) -> LinearMap:
        """The down-projection of one expert: rows (neuron, d_model), bias or None."""
        weight = self.module.down_proj.detach()[expert]
        return LinearMap(weight if self.transposed else weight.T, self._bias("down_proj", expert))

    def keys(self, expert: int) -> tuple[LinearMap, ...]:
        """The keys of one expert, gate first: rows (d_model, neuron)."""
        name = "gate_up_proj" if self.gated else "up_proj"
        weight, bias = getattr(self.module, name).detach()[expert], self._bias(name, expert)
        rows = weight if self.transposed else weight.T
        if not self.gated:
            return (LinearMap(rows, bias),)
        m = self.width
        cuts = (slice(0, m), slice(m, None)) if self.halves else (slice(0, None, 2), slice(1, None, 2))
        return tuple(LinearMap(rows[:, cut], None if bias is None else bias[cut]) for cut in cuts)

    def coefficient(self, pre: tuple[Tensor, ...]) -> Tensor:
        """Coefficients from pre-activations (gate, up) or (up,), through the module's own activation."""
        with GradKept(), torch.no_grad():
            if not self.gated:
                return self.module.act_fn(pre[0])  # type: ignore[no-any-return]
            if not hasattr(self.module, "_apply_gate"):
                return self.module.act_fn(pre[0]) * pre[1]  # type: ignore[no-any-return]
            joined = torch.cat(pre, -1) if self.halves else torch.stack(pre, -1).flatten(-2)
            return self.module._apply_gate(joined)  # type: ignore[no-any-return]

    def pre_activations(self, x: Float[Tensor, "*n d_model"], expert: int) -> tuple[Float[Tensor, "*n neuron"], ...]:
        """What one expert's keys write for x."""
        out = []
        for key in self.keys(expert):
            made = x.to(key.rows.device) @ key.rows.to(x.dtype)
            out.append(made if key.bias is None else made + key.bias.to(x.dtype))
        return tuple(out)

    def output(
        self, x: Float[Tensor, "token d_model"], index: Int[Tensor, "token k"], weight: Float[Tensor, "token k"]
    ) -> Float[Tensor, "token d_model"]:
        """sum_k weight * (coefficient @ down + bias), in x's dtype."""
        x = x.reshape(-1, x.shape[-1])
        total = torch.zeros_like(x)
        for token, (experts, weights) in enumerate(zip(index.tolist(), weight, strict=True)):
            for expert, w in zip(experts, weights, strict=True):
                if expert >= self.count:
                    continue
                out = self.out(expert)
                made = self.coefficient(self.pre_activations(x[token], expert)) @ out.rows
                total[token] += w * (made if out.bias is None else made + out.bias)
        return total

    def _bias(self, name: str, expert: int) -> Tensor | None:
        bias = getattr(self.module, f"{name}_bias", None)
        return bias.detach()[expert] if isinstance(bias, Tensor) else None


def experts_of(module: nn.Module) -> Experts | None:
    """The experts that a module holds, or None if it holds none in the known form."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return None
    gated = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    single = not gated and isinstance(getattr(module, "up_proj", None), nn.Parameter)
    if (not gated and not single) or not (hasattr(module, "_apply_gate") or hasattr(module, "act_fn")):
        return None
    flag = vars(module).get
    return Experts(module, gated, bool(flag("is_transposed", False)), bool(flag("is_concatenated", True)))

"""Freezing: norms inside attention with a scale that stays, so that queries, keys and values are affine in the input.

Between what attention reads and its scores stand projections, rotations and, in some families, norms (of queries
and keys, of latents). All but the norms are linear. `freeze_norms` puts a `FrozenNorm` in the place of each of them,
in a copy of the module tree.
"""

from typing import final

import torch
from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.parts import NormForm, measure_norm


@final
class FrozenNorm(nn.Module):
    """gain * centre(v) / s + bias, with the s of the first of `parts` equal parts of the batch.

    Attributes:
        unit: s = 1 and no bias instead: the norm's linear part as weights alone give it.
    """

    def __init__(self, norm: nn.Module, form: NormForm | None) -> None:
        super().__init__()
        self.norm, self.form = norm, form
        self.parts, self.unit = 1, False

    def forward(self, v: Tensor) -> Tensor:
        work = torch.float64 if v.dtype == torch.float64 else torch.float32
        form = self.form or measure_norm(self.norm, v.shape[-1], type(self.norm).__name__)
        norm = form.read(self.norm, v.shape[-1], work, v.device)
        x = v.to(work)
        if self.unit:
            return norm.linear(x, torch.ones_like(x[..., :1])).to(v.dtype)
        first = norm.scale(x[: len(x) // self.parts]).detach()
        s = first.repeat(self.parts, *[1] * (x.ndim - 1))
        return (norm.linear(x, s) + norm.bias).to(v.dtype)


def freeze_norms(attention: nn.Module) -> list[FrozenNorm]:
    """Replace every norm inside an attention module by one that keeps its scale.

    A norm is a module without children whose class is named so; one whose form is unknown is left, and what it
    makes is found not to be affine.
    """
    made = []
    for path, module in list(attention.named_modules()):
        if path and "norm" in type(module).__name__.lower() and not any(module.children()):
            frozen = _frozen(module)
            if frozen is not None:
                owner, _, leaf = path.rpartition(".")
                setattr(attention.get_submodule(owner) if owner else attention, leaf, frozen)
                made.append(frozen)
    return made


def _frozen(module: nn.Module) -> FrozenNorm | None:
    tensors = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if isinstance(t, Tensor)]
    if not tensors:
        return FrozenNorm(module, None)
    try:
        return FrozenNorm(module, measure_norm(module, tensors[0].shape[-1], type(module).__name__))
    except UnsupportedModelError:
        return None

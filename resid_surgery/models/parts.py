"""Parts of a model as tensors: norms, found by measuring them, and projections as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError, out_of_memory
from resid_surgery.models.modes import GradKept


@final
@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm as tensors: N_s(v) = gain * (v - mean(v) if centred) / s + bias.

    Attributes:
        gain: (d_model,) gamma in the working dtype, an offset such as Gemma's 1 + w included.
        bias: (d_model,) beta, zeros where there is none.
        eps: added to the mean square under the root.
        centred: True for LayerNorm.
        present: False where nothing stands there: the identity, with s = 1.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    centred: bool
    present: bool = True

    @classmethod
    def absent(cls, d: int, dtype: torch.dtype, device: torch.device) -> Norm:
        """No norm at all: N(v) = v."""
        one = torch.ones(d, dtype=dtype, device=device)
        return cls(one, torch.zeros_like(one), 0.0, centred=False, present=False)

    def times(self, factor: float) -> Norm:
        """The same norm with its output multiplied."""
        return self if factor == 1.0 else replace(self, gain=self.gain * factor, bias=self.bias * factor)

    def centre(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """v minus its mean for LayerNorm, v itself for RMSNorm."""
        return v - v.mean(-1, keepdim=True) if self.centred else v

    def scale(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n 1"]:
        """s(x) = sqrt(mean square + eps): the standard deviation for LayerNorm."""
        if not self.present:
            return torch.ones_like(x[..., :1])
        s = (self.centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()
        return torch.where(s == 0, 1.0, s)  # nothing to scale, and no eps: N(0) = 0

    def linear(self, v: Float[Tensor, "*n d_model"], s: Tensor) -> Float[Tensor, "*n d_model"]:
        """The frozen norm gain * centre(v) / s: linear in v, without the bias."""
        return self.centre(v) / s * self.gain

    def pull(self, g: Float[Tensor, "*n d_model"], s: Tensor) -> Float[Tensor, "*n d_model"]:
        """The transpose of `linear`: pull(g, s) . v = g . linear(v, s)."""
        return self.centre(g * self.gain) / s

    def __call__(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """The norm itself, with its own scale and its bias."""
        return self.linear(x, self.scale(x)) + self.bias


@final
@dataclass(frozen=True)
class NormForm:
    """What kind of norm a module is, found by measuring it."""

    centred: bool
    offset: float
    eps: float

    def read(self, module: nn.Module, d: int, dtype: torch.dtype, device: torch.device | None = None) -> Norm:
        """The module's current weights as a `Norm` in `dtype` on `device`, or where they lie."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        device = device or next((t.device for t in (weight, bias) if t is not None), None)
        one = torch.ones(d, dtype=dtype, device=device)
        gain = one if weight is None else weight.detach().to(device, dtype) + self.offset
        beta = torch.zeros_like(gain) if bias is None else bias.detach().to(device, dtype)
        return Norm(gain, beta, self.eps, self.centred)


def measure_norm(module: nn.Module, d: int, name: str) -> NormForm:
    """Which norm `module` computes, by trying the known forms on a fixed vector.

    Raises:
        UnsupportedModelError: no known form reproduces the module's output.
    """
    tensors = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if t is not None]
    shape = tensors[0].shape if tensors else torch.Size([d])
    if shape[-1:] == (d,) and all(t.shape == shape for t in tensors):
        like = tensors[0] if tensors else next(module.buffers(), torch.zeros(1))
        like = like if like.is_floating_point() else torch.zeros(1)
        probe = (torch.linspace(-1.0, 2.0, d, dtype=torch.float64).sin().to(like) * 3 + 0.5).expand(shape)
        small = probe * 0.02  # here eps counts
        try:
            with GradKept(), torch.no_grad():
                measured = [module(x[None])[0].double() for x in (probe, small)]
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            if out_of_memory(error):
                raise
            raise UnsupportedModelError(f"{type(module).__name__} of {name} is no norm: {error}.") from error
        tolerance = 8 * max(torch.finfo(like.dtype).eps, 1.2e-7)
        for form in _forms(module):
            norm = form.read(module, d, torch.float64)
            errors = [
                (norm(x.double()) - y).abs().max() / y.abs().max()
                for x, y in zip((probe, small), measured, strict=True)
            ]
            if max(float(e) for e in errors) <= tolerance:
                return form
    raise UnsupportedModelError(
        f"the norm {type(module).__name__} of {name} is neither LayerNorm nor RMSNorm (with gain w or 1 + w), "
        "so bs-values under a frozen scale are not defined for it."
    )


def _forms(module: nn.Module) -> Iterator[NormForm]:
    """Every form that a norm may have: centred or not, gain w or 1 + w, its own eps or a usual one."""
    named = [getattr(module, a) for a in ("eps", "variance_epsilon", "epsilon", "norm_eps") if hasattr(module, a)]
    usual = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps, 0.0)
    for eps in dict.fromkeys([float(e) for e in named if isinstance(e, float)] or usual):
        for centred in (True, False):
            for offset in (0.0, 1.0):
                yield NormForm(centred, offset, eps)


@final
@dataclass(frozen=True)
class LinearMap:
    """An affine map y = x @ rows + bias; `rows` is a view of the module's own weight.

    Attributes:
        rows: (d_in, d_out) in the model's dtype; row i is what input coordinate i writes.
        bias: (d_out,) or None.
    """

    rows: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None

    def half(self, which: int | None) -> LinearMap:
        """The first (0) or second (1) half of what it writes; None for all."""
        if which is None:
            return self
        m = self.rows.shape[1] // 2
        cut = slice(which * m, (which + 1) * m)
        return LinearMap(self.rows[:, cut], None if self.bias is None else self.bias[cut])


def linear_map(module: nn.Module, path: str) -> LinearMap:
    """The map of a Linear or Conv1D; the orientation comes from the class, never from the shape."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return LinearMap(module.weight.detach().T, None if module.bias is None else module.bias.detach())
    if kind == "Conv1D":
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return LinearMap(weight.detach(), bias.detach())
    raise UnsupportedModelError(
        f"{path} is a {kind} ({type(module).__module__}); only torch's Linear and transformers' Conv1D projections can "
        "be read as plain rows."
    )


def require_plain(weight: Tensor, where: str) -> None:
    """Refuse weights that are not plain floating-point tensors."""
    if weight.is_inference():
        raise UnsupportedModelError(
            f"{where} was made under torch.inference_mode, so no gradient can pass it and no write to it is counted. "
            "Make the model outside of it, or take copy.deepcopy(model) there."
        )
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{where} is stored as {weight.dtype} ({type(weight).__name__}), not as plain floating-point numbers. "
            "Load the model de-quantised (for example with dtype=torch.bfloat16)."
        )


def attribute(block: nn.Module, path: str) -> Any:
    """What a path names inside a block (a tensor, module or function), or a function of torch (":silu"); or None."""
    if path.startswith(":"):
        return getattr(nn.functional, path[1:], None)
    owner, _, leaf = path.rpartition(".")
    try:
        return getattr(block.get_submodule(owner) if owner else block, leaf, None)
    except AttributeError:
        return None

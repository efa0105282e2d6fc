"""Parts of a model as tensors: norms, found by measuring them, and projections as rows."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError


@final
@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm as tensors: N_s(v) = gain * (v - mean(v) if centred) / s + bias.

    Attributes:
        gain: (d_model,) gamma in the working dtype, an offset such as Gemma's 1 + w included.
        bias: (d_model,) beta, zeros where there is none.
        eps: added to the mean square under the root.
        centred: True for LayerNorm.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    centred: bool

    def centre(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """v minus its mean for LayerNorm, v itself for RMSNorm."""
        return v - v.mean(-1, keepdim=True) if self.centred else v

    def scale(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n 1"]:
        """s(x) = sqrt(mean square + eps): the standard deviation for LayerNorm."""
        return (self.centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

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

    def read(self, module: nn.Module, d: int, dtype: torch.dtype) -> Norm:
        """The module's current weights as a `Norm` in `dtype`."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        device = next((t.device for t in (weight, bias) if t is not None), torch.device("cpu"))
        gain = torch.ones(d, dtype=dtype, device=device) if weight is None else weight.detach().to(dtype) + self.offset
        beta = torch.zeros_like(gain) if bias is None else bias.detach().to(dtype)
        return Norm(gain, beta, self.eps, self.centred)


def measure_norm(module: nn.Module, d: int, name: str) -> NormForm:
    """Which norm `module` computes, by trying the known forms on a fixed vector.

    Raises:
        UnsupportedModelError: no known form reproduces the module's output.
    """
    eps = next((getattr(module, a) for a in ("eps", "variance_epsilon", "epsilon") if hasattr(module, a)), None)
    tensors = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if t is not None]
    if eps is not None and all(t.shape == (d,) for t in tensors):
        like = tensors[0] if tensors else torch.zeros(1)
        probe = torch.linspace(-1.0, 2.0, d, dtype=torch.float64).sin().to(like) * 3 + 0.5
        with torch.no_grad():
            measured = module(probe[None])[0].double()
        tolerance = 8 * max(torch.finfo(like.dtype).eps, 1.2e-7) * measured.abs().max().item()
        for form in (NormForm(c, o, float(eps)) for c in (True, False) for o in (0.0, 1.0)):
            predicted = form.read(module, d, torch.float64)(probe.double())
            if (predicted - measured).abs().max().item() <= tolerance:
                return form
    raise UnsupportedModelError(
        f"the norm {type(module).__name__} of {name} is none of LayerNorm, RMSNorm or RMSNorm with gain 1 + w, "
        "so bs-values under a frozen scale are not defined for it."
    )


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
    raise UnsupportedModelError(f"{path} is a {kind}; only Linear and Conv1D projections can be read as plain rows.")


def require_plain(weight: Tensor, where: str) -> None:
    """Refuse weights that are not plain floating-point tensors."""
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{where} is stored as {weight.dtype} ({type(weight).__name__}), not as plain floating-point numbers. "
            "Load the model de-quantised (for example with dtype=torch.bfloat16)."
        )

"""Readings: every number that a reader takes from the stream, as an exact sum over the stream's addends.

    reading = sum over positions p, sum over addends u at p of  direction_p . u   +  constants

A neuron has one reading a key; attention one for each value side (with an `Aim`), and one for each score before
softmax on the query side and on the key side. Directions of attention come from its own modules: with its norms
frozen (`models.freezing`) queries, keys and values are affine in what it reads, so a gradient of a reading is its
direction exactly, and that is checked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import ClosureError, UnsupportedModelError
from resid_surgery.models.attention import AttentionCall
from resid_surgery.models.envoys import Values
from resid_surgery.models.modes import GradKept
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import projected
from resid_surgery.sites import Site
from resid_surgery.stream.elsewhere import need_stream
from resid_surgery.stream.recording import Recording, closure_tolerance

SIDES = ("query", "key", "value")
Phi = Callable[[AttentionCall, int, int | None], Tensor]
"""(call, row of its batch, source or None) -> a number, linear in the call's queries, keys or values; of one source's
alone if one is given."""


@final
@dataclass(frozen=True, eq=False)
class Probe:
    """How a reading is taken from any forward, by the model's own modules.

    Attributes:
        taps: what has to be read, at all positions. take: (values, row, position, source or None) -> the number, of
            one source's keys or values alone if one is given; up to a constant. The last row is the clean one.
    """

    taps: tuple[Tap, ...]
    take: Callable[[Values, int, int, int | None], float]


@final
@dataclass(frozen=True, eq=False)
class Reading:
    """One number that a reader takes from the stream.

    Attributes:
        key: "gate", "up", "value", "query", "key" or "readout". unit: of the number.
        stop: (layer, part) that reads; None for the unembedding.
        directions: position -> (d_model,) what an addend there is projected on. plain: the same with neither the norm's
            gain nor its scale (paper: the key itself).
        constants: name -> what belongs to no addend. measured: the number, as the model computed it.
        source: position whose key or value is meant, or None. probe: how it is measured in another forward.
    """

    key: str
    unit: str
    stop: tuple[int, str] | None
    directions: dict[int, Float[Tensor, " d_model"]]
    plain: dict[int, Float[Tensor, " d_model"]]
    constants: dict[str, float]
    measured: float
    source: int | None = None
    probe: Probe | None = None


@final
@dataclass(frozen=True, eq=False)
class Wanted:
    """A reading of attention to be worked out.

    Attributes:
        key, unit, source: of the `Reading`. phi: the number as a function of a call. positions: whose input it hangs
            on. measured: as the model computed it. constants: further ones.
    """

    key: str
    unit: str
    phi: Phi
    positions: tuple[int, ...]
    measured: float
    constants: dict[str, float]
    source: int | None = None


class Reader(Protocol):
    """What `sources` needs of a reader."""

    @property
    def rec(self) -> Recording:
        """The run, seen from the reader's position."""

    @property
    def site(self) -> Site:
        """Which it is."""

    @property
    def readings(self) -> list[Reading]:
        """Every number that it takes from the stream."""

    @property
    def number(self) -> float:
        """What it hands on."""

    @property
    def what(self) -> str:
        """What that is called."""

    def without(
        self, reading: Reading, position: int, removed: Float[Tensor, "n d_model"], norm: str
    ) -> Float[Tensor, " n"]:
        """The number when each removed vector is left out of what is read at a position."""

    def only(self, reading: Reading, kept: Mapping[int, Float[Tensor, " d_model"]], norm: str) -> float:
        """The number when nothing but these vectors is read, at the reading's positions."""

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """What multiplies the reader's expert when each removed vector is left out; 1 without experts."""


def state_at(rec: Recording, layer: int, position: int) -> Float[Tensor, " d_model"]:
    """resid_pre of a layer at any position up to t."""
    if position == rec.prompt.position:
        return rec.work(rec.layers[layer].resid_pre)
    need_stream(rec)
    assert rec.stream is not None
    return rec.work(rec.stream.resid_pre[layer, position])


def attention_inputs(rec: Recording, layer: int, positions: tuple[int, ...]) -> Float[Tensor, "position d_model"]:
    """N(resid_pre) at some positions, zeros at the others up to t."""
    norm = rec.model.norm(layer, "attn_norm")
    x = torch.zeros(rec.prompt.position + 1, rec.model.anatomy.d_model, dtype=rec.model.work_dtype).to(rec.model.device)
    for p in positions:
        x[p] = norm(state_at(rec, layer, p))
    return x


def ids_of(rec: Recording, rows: int) -> Tensor:
    """(row, position) the tokens up to t, once a row."""
    device = rec.model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
    return torch.tensor([rec.prompt.ids[: rec.prompt.position + 1]] * rows, device=device)


def attention_readings(rec: Recording, layer: int, wanted: list[Wanted]) -> list[Reading]:
    """Readings of one layer's attention, their directions worked out through its own modules.

    Raises:
        UnsupportedModelError: what a reading hangs on is not affine in what attention reads, or not made here.
    """
    needed = tuple(sorted({p for one in wanted for p in one.positions}))
    x = attention_inputs(rec, layer, needed)
    call, leaf = projected(rec.model, layer, torch.stack([x, torch.zeros_like(x)]), ids_of(rec, 2))
    norm = rec.model.norm(layer, "attn_norm")
    states, normed = {p: state_at(rec, layer, p) for p in needed}, _normed(rec, layer, call, leaf)
    found = []
    for one in wanted:
        with GradKept(), torch.inference_mode(False), torch.enable_grad():
            value, zero = one.phi(call, 0, None), one.phi(call, 1, None)
            gradient = _gradient(rec, layer, value, leaf)
        _need_affine(rec, layer, value, zero, gradient, x)
        directions = {p: norm.pull(gradient[p], norm.scale(states[p])) for p in one.positions}
        constant = float(zero.detach()) + sum(float(gradient[p] @ norm.bias) for p in one.positions)
        constants = {"constant": constant, **one.constants}
        plain = {p: gradient[p] for p in one.positions}
        found.append(
            Reading(
                one.key,
                one.unit,
                (layer, "attn"),
                directions,
                plain,
                constants,
                one.measured,
                one.source,
                _probe(rec, layer, one, normed[one.key]),
            )
        )
    return found


def _probe(rec: Recording, layer: int, one: Wanted, normed: bool) -> Probe:
    """The call that the forward itself made. Where norms stand before it, attention's own modules on what it reads
    there, those norms at the scale of the last row, the clean one."""
    if not normed:
        call = Tap("attn_call", layer)
        return Probe((call,), lambda values, row, position, source: float(one.phi(values[call], row, source)))
    read, seen = Tap("attn_read", layer), rec.prompt.position + 1

    def take(values: Values, row: int, position: int, source: int | None) -> float:
        made, _ = projected(rec.model, layer, values[read][[-1, row], :seen], ids_of(rec, 2))
        return float(one.phi(made, 1, source).detach())

    return Probe((read,), take)


def _normed(rec: Recording, layer: int, call: AttentionCall, x: Tensor) -> dict[str, bool]:
    """Whether norms inside attention stand before its queries, keys and values: another scale makes others of them."""
    known: dict[int, dict[str, bool]] = rec.model.cache.setdefault("inner_norms", {})
    if layer not in known:
        other, _ = projected(rec.model, layer, x, ids_of(rec, len(x)), unit=True)
        known[layer] = {side: not _equal(getattr(call, side), getattr(other, side)) for side in SIDES}
    return known[layer]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _gradient(rec: Recording, layer: int, value: Tensor, leaf: Tensor) -> Float[Tensor, "position d_model"]:
    made = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    if made is None:
        raise UnsupportedModelError(
            f"queries, keys or values of layer {layer} of {rec.model.name} are not made of what its attention reads "
            "first (they are shared with another layer, or taken in apart), so they have no sources there."
        )
    return rec.work(made[0])


def _need_affine(rec: Recording, layer: int, value: Tensor, zero: Tensor, gradient: Tensor, x: Tensor) -> None:
    """value = gradient . x + value at zero, or the directions would not be those of an exact sum."""
    sizes = float((gradient * x).abs().sum()) + abs(float(zero.detach())) + abs(float(value.detach()))
    off = abs(float((gradient * x).sum() + rec.work(zero.detach()) - rec.work(value.detach())))
    if not off <= 10 * closure_tolerance(rec.model) * max(sizes, 1e-30):
        raise UnsupportedModelError(
            f"attention of layer {layer} of {rec.model.name} is not affine in what it reads, even with its norms "
            f"frozen (off by {off:.2g} of {sizes:.2g}), so its scores and values are no sums over the stream."
        )


def require_closed_reading(rec: Recording, name: str, total: float, measured: float, sizes: float) -> None:
    """Refuse shares that do not sum to what the model computed.

    Raises:
        ClosureError: the reading and the error are named.
    """
    if not abs(total - measured) <= 100 * closure_tolerance(rec.model) * max(sizes, abs(measured), 1e-30):
        raise ClosureError(
            f"the sources of {name} of {rec.model.name} sum to {total:.6g}, but the model computed {measured:.6g}. "
            "Does a hook change what it reads?"
        )

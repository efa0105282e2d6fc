"""What MLPs read: neurons, key by key, and whole layers against an aim."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.aims import Aim
from resid_surgery.attribution.readings import Probe, Reading
from resid_surgery.errors import SiteError
from resid_surgery.models.envoys import Values
from resid_surgery.models.parts import Norm
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import mixing, routing
from resid_surgery.sites import ExpertNeuron, Neuron, SharedNeuron, Sublayer
from resid_surgery.stream.closing import coefficient_from
from resid_surgery.stream.kinds import neuron_place
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.records import NeuronGroup
from resid_surgery.stream.subvalues import need_group, read_by

NeuronSite = Neuron | ExpertNeuron | SharedNeuron


def _stop(rec: Recording, layer: int) -> tuple[int, str]:
    """What an MLP reads: in a parallel block the block's input."""
    return (layer, "attn" if rec.model.block(layer).parallel else "mlp")


@final
@dataclass(frozen=True, eq=False)
class NeuronReader:
    """A neuron: one reading a key, folded through the norm at this recording's scale; hands on its coefficient."""

    rec: Recording
    site: NeuronSite
    group: NeuronGroup
    norm: Norm
    state: Float[Tensor, " d_model"]
    scale: Float[Tensor, "1"]
    keys: Float[Tensor, "key d_model"]
    readings: list[Reading]
    number: float
    what: str = "coefficient"

    @classmethod
    def of(cls, rec: Recording, site: NeuronSite) -> "NeuronReader":
        """A neuron that is active at the recording's position."""
        model, group, index = rec.model, need_group(rec, site), neuron_place(site)[1]
        if not group.pre_activations:
            raise SiteError(f"`{site}` has no known keys in {model.name}, so its sources cannot be split.")
        norm, state = model.norm(site.layer, "mlp_norm"), read_by(rec, site.layer, "mlp")
        scale, keys, readings = norm.scale(state), [], []
        for name, read, pre in zip(
            group.key_names, model.group_keys(site.layer, group.expert), group.pre_activations, strict=True
        ):
            row = rec.work(read.rows[:, index])
            own = 0.0 if read.bias is None else float(rec.work(read.bias[index]))
            keys.append(row)
            readings.append(
                Reading(
                    name,
                    "pre-activation",
                    _stop(rec, site.layer),
                    {rec.prompt.position: norm.pull(row, scale)},
                    {rec.prompt.position: row},
                    {"constant": float(norm.bias @ row) + own},
                    float(pre[index]),
                    probe=_probe(rec, site.layer, group, len(keys) - 1, _unit(rec, group, index)),
                )
            )
        return cls(rec, site, group, norm, state, scale, torch.stack(keys), readings, float(group.coefficient[index]))

    def _read(self, removed: Tensor, norm: str) -> Tensor:
        rest = self.state - removed
        return self.norm.linear(rest, self.scale if norm == "frozen" else self.norm.scale(rest))

    def without(
        self, reading: Reading, position: int, removed: Float[Tensor, "n d_model"], norm: str
    ) -> Float[Tensor, " n"]:
        """Coefficients, through every key."""
        constants = self.keys.new_tensor([one.constants["constant"] for one in self.readings])
        return self._made(self._read(removed, norm) @ self.keys.T + constants)

    def from_shares(self, shares: Float[Tensor, "key n"]) -> Float[Tensor, " n"]:
        """Coefficients when these shares are taken off the pre-activations: the norm's scale frozen."""
        measured = shares.new_tensor([one.measured for one in self.readings])
        return self._made((measured[:, None] - shares).T)

    def _made(self, pre_activations: Float[Tensor, "n key"]) -> Float[Tensor, " n"]:
        """Coefficients of pre-activations, through the module's own activation."""
        pre = pre_activations.to(self.rec.model.dtype)
        model, layer, index = self.rec.model, self.site.layer, self.site.index
        columns = tuple(column[:, None] for column in pre.T)
        alone = coefficient_from(model, layer, self.group, columns, plain=True)[:, 0].to(pre_activations)
        if self.group.expert is not None or not model.has(layer, "coef_norm"):
            return alone
        # a norm over all coefficients stands before the down-projection: its scale is kept
        made = coefficient_from(model, layer, self.group, plain=True)[index].to(pre_activations)
        return alone * (self.group.coefficient[index].to(made) / made if made else torch.zeros_like(made))

    def only(self, reading: Reading, kept: Mapping[int, Float[Tensor, " d_model"]], norm: str) -> float:
        """See `Reader`."""
        return float(self.without(reading, self.rec.prompt.position, (self.state - _one(kept))[None], norm))

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """What multiplies the neuron's expert when each removed vector is left out of what the router reads."""
        if router == "fixed" or not isinstance(self.group.expert, int):
            return [self.group.factor] * len(removed)
        model, layer = self.rec.model, self.site.layer
        read = self._read(removed, norm) + self.norm.bias
        index, weight = routing(model, layer, read)
        (routed,), _ = mixing(model, layer, (self.norm.linear(self.state, self.scale) + self.norm.bias)[None])
        return [float(w) * routed for w in (weight * (index == self.group.expert)).sum(-1)]


def _one(kept: Mapping[int, Tensor]) -> Tensor:
    (vector,) = kept.values()
    return vector


@final
@dataclass(frozen=True, eq=False)
class LayerReader:
    """A whole MLP against an aim: what it writes, with each neuron's gate (or secant) kept, splits over its input.

    A neuron's coefficient is c(up) = c(0) + m up, with the gate kept where there is one and m the slope from 0 to
    what was read elsewhere; the sum over neurons of m w_out . aim times the up key is the direction.
    """

    rec: Recording
    site: Sublayer
    aim: Aim
    state: Float[Tensor, " d_model"]
    readings: list[Reading]
    number: float
    what: str

    @classmethod
    def of(cls, rec: Recording, site: Sublayer, aim: Aim) -> "LayerReader":
        """An MLP of neurons."""
        model, layer = rec.model, site.layer
        model.anatomy.require(layer, "mlp", f"sources of {site}")
        norm, state = model.norm(layer, "mlp_norm"), read_by(rec, layer, "mlp")
        total, constant, measured = torch.zeros_like(state), 0.0, 0.0
        probes: list[Probe] = []
        for group in rec.layers[layer].groups:
            worth, slope, rest = _slopes(rec, layer, group, aim)
            read = model.group_keys(layer, group.expert)[-1]
            total = total + rec.work(read.rows) @ (worth * slope)
            bias = 0.0 if read.bias is None else float(rec.work(read.bias) @ (worth * slope))
            constant += bias + float(worth @ rest)
            measured += float(worth @ rec.work(group.coefficient))
            probes.append(_probe(rec, layer, group, -1, worth * slope))
        constant += float(norm.bias @ total)
        t = rec.prompt.position
        direction = {t: norm.pull(total, norm.scale(state))}
        constants = {"constant": constant}
        reading = Reading(
            "up", aim.unit, _stop(rec, layer), direction, {t: total}, constants, measured, probe=_joined(probes)
        )
        return cls(rec, site, aim, state, [reading], measured, aim.name)

    def without(
        self, reading: Reading, position: int, removed: Float[Tensor, "n d_model"], norm: str
    ) -> Float[Tensor, " n"]:
        """What the MLP's neurons write towards the aim, every key and activation worked out anew."""
        rec, layer = self.rec, self.site.layer
        total = torch.zeros(len(removed), dtype=removed.dtype, device=removed.device)
        for group in rec.layers[layer].groups:
            made = coefficients_without(rec, layer, group, removed, norm)
            total += made @ worth_of(rec, layer, group, self.aim)
        return total

    def only(self, reading: Reading, kept: Mapping[int, Float[Tensor, " d_model"]], norm: str) -> float:
        """See `Reader`."""
        return float(self.without(reading, self.rec.prompt.position, (self.state - _one(kept))[None], norm))

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """No expert: 1."""
        return [1.0] * len(removed)


def _unit(rec: Recording, group: NeuronGroup, index: int) -> Float[Tensor, " neuron"]:
    """1 for one neuron, 0 for the others."""
    amounts = torch.zeros_like(rec.work(group.coefficient))
    amounts[index] = 1.0
    return amounts


def _probe(rec: Recording, layer: int, group: NeuronGroup, key: int, amounts: Float[Tensor, " neuron"]) -> Probe:
    """amounts . pre-activations of one key, as the model's own projection computes them."""
    count, expert, model = len(group.pre_activations), group.expert, rec.model
    if isinstance(expert, int):
        tap = Tap("experts_call", layer)

        def take(values: Values, row: int, position: int, source: int | None) -> float:
            pre = model.experts(layer).pre_activations(values[tap].states[row, position], expert)
            return float(rec.work(pre[key]) @ amounts)

        return Probe((tap,), take)
    tap = Tap(f"{'shared_' if expert == 'shared' else ''}key{key % count}", layer)  # type: ignore[arg-type]
    return Probe((tap,), lambda values, row, position, source: float(rec.work(values[tap][row, position]) @ amounts))


def _joined(probes: list[Probe]) -> Probe:
    """The sum of several."""
    taps = tuple(dict.fromkeys(tap for one in probes for tap in one.taps))
    return Probe(taps, lambda *place: sum(one.take(*place) for one in probes))


def coefficients_without(
    rec: Recording, layer: int, group: NeuronGroup, removed: Float[Tensor, "n d_model"], norm: str
) -> Float[Tensor, "n neuron"]:
    """Every neuron's coefficient when each removed vector is left out of what the MLP reads, through every key."""
    form, state = rec.model.norm(layer, "mlp_norm"), read_by(rec, layer, "mlp")
    rest = state - removed
    read = form.linear(rest, form.scale(state) if norm == "frozen" else form.scale(rest)) + form.bias
    keys = rec.model.group_keys(layer, group.expert)
    pre = tuple(read @ rec.work(k.rows) + (0 if k.bias is None else rec.work(k.bias)) for k in keys)
    made = coefficient_from(rec.model, layer, group, tuple(p.to(rec.model.dtype) for p in pre), plain=True)
    return rec.work(made) * _kept_norm(rec, layer, group)


def worth_of(rec: Recording, layer: int, group: NeuronGroup, aim: Aim) -> Float[Tensor, " neuron"]:
    """What one unit of each neuron's coefficient is worth against an aim."""
    rows = rec.model.group_rows(layer, group.expert).rows
    return rec.work(rows) @ aim.at_output(rec, layer, "mlp") * group.factor


def _kept_norm(rec: Recording, layer: int, group: NeuronGroup) -> Tensor | float:
    """What a norm over all coefficients multiplies each by, kept; 1 in most families."""
    if group.expert is not None or not rec.model.has(layer, "coef_norm"):
        return 1.0
    plain = rec.work(coefficient_from(rec.model, layer, group, plain=True))
    return torch.where(plain == 0, 0.0, rec.work(group.coefficient) / torch.where(plain == 0, 1.0, plain))


def _slopes(rec: Recording, layer: int, group: NeuronGroup, aim: Aim) -> tuple[Tensor, Tensor, Tensor]:
    """(worth, slope, rest), each (neuron,): coefficient = slope * up + rest, with the gate kept."""
    *gate, up = group.pre_activations
    at_zero = coefficient_from(rec.model, layer, group, (*gate, torch.zeros_like(up)), plain=True)
    rest, wide = rec.work(at_zero) * _kept_norm(rec, layer, group), rec.work(up)
    slope = torch.where(wide == 0, 0.0, (rec.work(group.coefficient) - rest) / torch.where(wide == 0, 1.0, wide))
    return worth_of(rec, layer, group, aim), slope, rec.work(group.coefficient) - slope * wide

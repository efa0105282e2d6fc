"""Query sources, one hop: which lower addends switched a neuron on.

A neuron of layer l reads the stream r = sum_u u through its norm and its keys. With a key folded
through the norm, K = gamma * w_in (centred for LayerNorm),

    pre-activation = sum over addends u of (u . K) / s(r)  +  beta . w_in + b,

exactly, for the gate and the up key separately. The coefficient act(gate) * up does not split, so
the coefficient *without* u is recomputed through the module's own activation, with the norm's scale
frozen at r, or live at r - u. A neuron of a routed expert also hangs on the router, which reads the
same N(r): its weight is kept (``router="fixed"``) or recomputed without u as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.addresses import as_sites, expand
from resid_surgery.errors import SiteError
from resid_surgery.models.parts import Norm
from resid_surgery.models.tracing import mixing, routing
from resid_surgery.sites import ExpertNeuron, Neuron, SharedNeuron
from resid_surgery.stream.blocks import Block, Numbering
from resid_surgery.stream.closing import coefficient_from
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.records import NeuronGroup
from resid_surgery.stream.subvalues import GRAINS, addends, need_group, read_by, resolve_in

SOURCE_NORMS = ("frozen", "live")
ROUTERS = ("fixed", "recomputed")
NeuronSite = Neuron | ExpertNeuron | SharedNeuron


def sources(
    rec: Recording,
    reader: Any,
    *,
    grain: str = "layer",
    top: int = 10,
    norm: str = "frozen",
    router: str = "fixed",
) -> pd.DataFrame:
    """What switched a neuron on: the exact shares of its pre-activations (paper: query vectors).

    share(u) = (u . gamma w_in) / s, logits of the key's pre-activation; the shares of one key plus
    its constant row sum to the measured pre-activation.

    Args:
        rec: a recording. reader: a neuron's site, or a sequence of them.
        grain: of the writers: "layer", "head", "head_source", "neuron" or "subvalue".
        top: how many writers are listed per key, by |share|; the rest is one remainder row.
        norm: for ``coefficient_without``: "frozen" keeps the norm's scale, "live" recomputes it.
        router: for a routed expert's neuron: "fixed" keeps its router weight, "recomputed" lets the
            router read the stream without the writer as well.

    Returns:
        Columns: reader, key ("gate"/"up"), writer, kind, position, grain, share (signed), unit,
        pre_activation (the key's), coefficient (the neuron's), coefficient_without (the neuron's
        without that writer, through every key), weight and weight_without (what multiplies the
        neuron's expert; 0 where the router drops it), router, norm, closure (|shares -
        pre-activation|). Rows: the writers by |share|, then ``remainder (n)``, then ``constant``.

    Raises:
        SiteError: the reader is no neuron of the model. ArgumentError: unknown grain or norm.

    Source: Yu & Ananiadou, arXiv 2312.12141 (query neurons).
    """
    _check.choice("grain", grain, GRAINS)
    _check.choice("norm", norm, SOURCE_NORMS)
    _check.choice("router", router, ROUTERS)
    _check.whole("top", top, 1)
    be_recording(rec)
    given = expand(as_sites(reader), rec.model.anatomy, rec.prompt.position)
    readers = [_as_neuron(rec, site) for site in given]
    need_recording(rec)
    frames = []
    for layer in dict.fromkeys(one.layer for one in readers):
        blocks = addends(rec, grain, before=(layer, "mlp"))
        of_layer = [_Reader.of(rec, one) for one in readers if one.layer == layer]
        for one, shares in zip(of_layer, _shares(blocks, of_layer), strict=True):
            frames.append(one.table(blocks, shares, grain=grain, top=top, norm=norm, router=router))
    return pd.concat(frames, ignore_index=True)


def _as_neuron(rec: Recording, site: Any) -> NeuronSite:
    site = resolve_in(rec, site)
    if not isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        raise SiteError(f"`reader` must be a neuron such as L20.N1297 or L3.E5.N17; got {site}.")
    if not need_group(rec, site).pre_activations:
        raise SiteError(f"`{site}` has no known keys in {rec.model.name}, so its sources cannot be split.")
    return site


def _shares(blocks: Sequence[Block], readers: Sequence["_Reader"]) -> list[list[Tensor]]:
    """reader -> key -> (addend,) shares; one projection per block for all readers of a layer."""
    directions = torch.cat([one.directions for one in readers])
    flat = torch.cat([block.project(directions) for block in blocks], dim=1)
    return [list(rows) for rows in torch.split(flat, [len(one.keys) for one in readers])]


@final
@dataclass(frozen=True, eq=False)
class _Reader:
    """One neuron as a reader: its keys folded through the norm at this recording's scale."""

    rec: Recording
    site: NeuronSite
    group: NeuronGroup
    norm: Norm
    state: Float[Tensor, " d_model"]
    scale: Float[Tensor, "1"]
    keys: Float[Tensor, "key d_model"]
    constants: Float[Tensor, " key"]

    @classmethod
    def of(cls, rec: Recording, site: NeuronSite) -> "_Reader":
        model, group = rec.model, need_group(rec, site)
        norm, state = model.norm(site.layer, "mlp_norm"), read_by(rec, site.layer, "mlp")
        keys, constants = [], []
        for read in model.group_keys(site.layer, group.expert):
            row = rec.work(read.rows[:, site.index])
            own = 0.0 if read.bias is None else rec.work(read.bias[site.index])
            keys.append(row)
            constants.append(norm.bias @ row + own)
        return cls(rec, site, group, norm, state, norm.scale(state), torch.stack(keys), torch.stack(constants))

    @property
    def directions(self) -> Float[Tensor, "key d_model"]:
        """K / s for every key."""
        return self.norm.pull(self.keys, self.scale)

    def measured(self) -> list[float]:
        """The pre-activations that the model computed."""
        return [float(p[self.site.index]) for p in self.group.pre_activations]

    def _scale_of(self, rest: Tensor, norm: str) -> Tensor:
        return self.scale if norm == "frozen" else self.norm.scale(rest)

    def without(self, removed: Float[Tensor, "n d_model"], norm: str) -> Float[Tensor, " n"]:
        """Coefficients when each removed vector is left out of what the keys read."""
        rest = self.state - removed
        read = self.norm.linear(rest, self._scale_of(rest, norm))
        pre = (read @ self.keys.T + self.constants).to(self.rec.model.dtype)
        model, layer, index = self.rec.model, self.site.layer, self.site.index
        columns = tuple(column[:, None] for column in pre.T)
        alone = coefficient_from(model, layer, self.group, columns, plain=True)[:, 0].to(rest)
        if self.group.expert is not None or not model.has(layer, "coef_norm"):
            return alone
        # a norm over all coefficients stands before the down-projection: its scale is kept
        made = coefficient_from(model, layer, self.group, plain=True)[index].to(rest)
        return alone * (self.group.coefficient[index].to(rest) / made if made else torch.zeros_like(made))

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """What multiplies the neuron's expert when each removed vector is left out of what the router reads."""
        if router == "fixed" or not isinstance(self.group.expert, int):
            return [self.group.factor] * len(removed)
        model, layer, rest = self.rec.model, self.site.layer, self.state - removed
        read = self.norm.linear(rest, self._scale_of(rest, norm)) + self.norm.bias
        index, weight = routing(model, layer, read)
        (routed,), _ = mixing(model, layer, (self.norm.linear(self.state, self.scale) + self.norm.bias)[None])
        return [float(w) * routed for w in (weight * (index == self.group.expert)).sum(-1)]

    def table(
        self, blocks: list[Block], shares: list[Tensor], *, grain: str, top: int, norm: str, router: str
    ) -> pd.DataFrame:
        """The rows of one reader."""
        count = len(shares[0])
        picked = [s.abs().topk(min(top, count)).indices for s in shares]
        listed = torch.cat(picked)
        numbering = Numbering(blocks)
        vectors = numbering.vectors(listed.cpu())
        rest = [self.state - vectors[i * len(p) : (i + 1) * len(p)].sum(0) for i, p in enumerate(picked)]
        removed = torch.cat([vectors, torch.stack(rest)])
        coefficients, weights = self.without(removed, norm), self.weights(removed, norm, router)
        names = [str(numbering.site(i)) for i in listed.tolist()]
        kinds = [blocks[numbering.place(i)[0]].kind for i in listed.tolist()]
        rows = []
        for key, (name, chosen, values) in enumerate(zip(self.group.key_names, picked, shares, strict=True)):
            at = key * len(chosen)
            shown = values[chosen]
            for i, share in enumerate(shown.tolist()):
                rows.append(
                    (name, names[at + i], kinds[at + i], share, float(coefficients[at + i]), weights[at + i], key)
                )
            left = count - len(chosen)
            if left:
                last = len(listed) + key
                share = float(values.sum() - shown.sum())
                rows.append(
                    (name, f"remainder ({left})", "remainder", share, float(coefficients[last]), weights[last], key)
                )
            constant = float(self.constants[key])
            rows.append((name, "constant", "constant", constant, float("nan"), float("nan"), key))
        columns = ["key", "writer", "kind", "share", "coefficient_without", "weight_without", "number"]
        table = pd.DataFrame(rows, columns=columns)
        measured = self.measured()
        totals = table.groupby("number")["share"].sum()
        table["pre_activation"] = [measured[i] for i in table["number"]]
        table["closure"] = [abs(totals[i] - measured[i]) for i in table["number"]]
        table["reader"], table["position"], table["grain"] = str(self.site), self.rec.prompt.position, grain
        table["unit"], table["norm"] = "pre-activation", norm
        table["coefficient"] = float(self.group.coefficient[self.site.index])
        table["weight"], table["router"] = self.group.factor, router
        return table[list(COLUMNS)]


COLUMNS = (
    "reader",
    "key",
    "writer",
    "kind",
    "position",
    "grain",
    "share",
    "unit",
    "pre_activation",
    "coefficient",
    "coefficient_without",
    "weight",
    "weight_without",
    "router",
    "norm",
    "closure",
)

"""Reading: what sites hold in one traced forward, at any row and position.

A site's *own* value is in its own space (a coefficient, a head's d_head numbers, a state); its *vector* is what
it adds to the stream, through the post-norm frozen at what it reads in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import ClosureError, InterventionError
from resid_surgery.models.attention import AttentionCall, ExpertsCall
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import bind
from resid_surgery.models.taps import Tap, mix_tap
from resid_surgery.models.tracing import forward
from resid_surgery.sites import (
    AttnNeuron,
    Bias,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    Projection,
    Resid,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.kinds import attention_of, joint_parts, neuron_place
from resid_surgery.stream.recording import Recording, closure_tolerance, reach
from resid_surgery.stream.records import attention_rows, gate_between
from resid_surgery.stream.subvalues import need_group
from resid_surgery.surgery.arguments import Donor
from resid_surgery.surgery.batches import Batch, Rows
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.resolving import Want


@final
@dataclass(eq=False)
class Reading:
    """Values of sites in one forward.

    Attributes:
        model: whose. values: what was read, with all positions of `grid`, which says where rows lie, kept.
        alphas: attention weights worked out so far. edited: some were set.
    """

    model: OpenedModel
    values: Values
    grid: Batch
    alphas: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    edited: bool = False

    def at(self, name: str, layer: int, row: int, position: int) -> Tensor:
        """One token's value at a tap, as it is now."""
        b, s = self.grid.place(row, position)
        return self.values[Tap(name, layer)][b, s]  # type: ignore[no-any-return,arg-type]

    def call(self, layer: int) -> AttentionCall:
        """A layer's attention call.

        Raises:
            InterventionError: its keys are not all of the positions so far.
        """
        call: AttentionCall = self.values[Tap("attn_call", layer)]
        if not isinstance(self.grid, Rows):
            if call.value.shape[2] != self.grid.keys:
                raise ClosureError(f"layer {layer} of {self.model.name} does not give the values that its cache holds.")
        elif call.value.shape[2] != self.grid.keys:
            raise InterventionError(
                f"sources cannot be told apart in layer {layer} of {self.model.name}: its cache holds "
                f"{call.value.shape[2]} of {self.grid.keys} positions (a sliding window)."
            )
        return call

    def alpha(self, layer: int, row: int, position: int) -> Float[Tensor, "head key"]:
        """Attention weights of one token over all keys of its batch row."""
        key = (layer, row, position)
        if key not in self.alphas:
            b, s = self.grid.place(row, position)
            self.alphas[key] = attention_rows(self.call(layer), b, [s])[0]
        return self.alphas[key]

    def prepare(self, layer: int, tokens: Sequence[tuple[int, int]]) -> None:
        """Work out the attention weights of many (row, position) tokens, a batch row at a time."""
        missing: dict[int, list[tuple[int, int, int]]] = {}
        for row, position in tokens:
            if (layer, row, position) not in self.alphas:
                b, s = self.grid.place(row, position)
                missing.setdefault(b, []).append((row, position, s))
        for b, group in missing.items():
            found = attention_rows(self.call(layer), b, [s for _, _, s in group])
            for (row, position, _), alpha in zip(group, found, strict=True):
                self.alphas[layer, row, position] = alpha

    def value(self, layer: int, head: int, row: int, source: int) -> Float[Tensor, " d_head"]:
        """v[head, source] of a row, in the working dtype of attention."""
        call, size = self.call(layer), self.model.anatomy.sizes[layer]
        b, _ = self.grid.place(row, self.grid.begins(row))
        kv = head // (size.n_heads // size.n_kv_heads)
        return call.value[b, kv, self.grid.key(row, source)]

    def mixed(self, layer: int, head: int, row: int, position: int) -> Float[Tensor, " d_head"]:
        """sum alpha v of a head, as worked out here."""
        alpha, (b, _) = self.alpha(layer, row, position)[head], self.grid.place(row, position)
        size = self.model.anatomy.sizes[layer]
        return alpha @ self.call(layer).value[b, head // (size.n_heads // size.n_kv_heads)].to(alpha)

    def require_mix(self, found: Tensor, layer: int, row: int, position: int, head: int) -> None:
        """Attention weights count only if they give what attention mixed, in this run as in the recording.

        Raises:
            ClosureError: they do not.
        """
        b, s = self.grid.place(row, position)
        mix = self.mixed(layer, head, row, position)
        was = found[b, s].reshape(-1, len(mix))[head].to(mix)
        size = max(1e-30, float(was.abs().max()), float(mix.abs().max()))
        if not float((mix - was).abs().max()) / size <= 100 * closure_tolerance(self.model):
            raise ClosureError(
                f"the attention weights of layer {layer} of {self.model.name} do not give what it mixed in this run."
            )

    def share(
        self, layer: int, head: int, source: int, row: int, position: int, z: Tensor | None = None
    ) -> Float[Tensor, " d_head"]:
        """gate * alpha v of one source, at W_O's input; z is that input, if other than what was read."""
        alpha = self.alpha(layer, row, position)[head, self.grid.key(row, source)]
        share = alpha * self.value(layer, head, row, source).to(alpha)
        if self.model.block(layer).gated:
            b, s = self.grid.place(row, position)
            mix = self.values[Tap("attn_mix", layer)][b, s, head]
            z = self.at("attn_z", layer, row, position) if z is None else z[b, s]
            share = share * gate_between(mix, z[head * len(mix) : (head + 1) * len(mix)])
        return share

    def own(self, site: Site, row: int, position: int) -> Tensor:
        """A site's own value, (n,) in the working dtype."""
        work = self.model.work
        if isinstance(site, (Neuron, SharedNeuron)):
            tap = "coef" if isinstance(site, Neuron) else "shared_coef"
            return work(self.at(tap, site.layer, row, position)[site.index : site.index + 1])
        if isinstance(site, ExpertNeuron):
            return self._expert(site, row, position)
        if isinstance(site, (Head, HeadSource, AttnNeuron)):
            return work(self._head(site, row, position))
        if isinstance(site, Projection):
            call, (b, s) = self.call(site.layer), self.grid.place(row, position)
            held = {"Q": call.query, "K": call.key, "V": call.value}[site.side]
            assert held is not None
            return work(held[b, site.head, s if site.side == "Q" else self.grid.key(row, position)])
        if isinstance(site, Sublayer):
            return self.added(site.layer, site.part, row, position)
        assert isinstance(site, Resid)
        return self.state(site.layer, site.stage, row, position)

    def added(self, layer: int, part: str, row: int, position: int) -> Float[Tensor, " d_model"]:
        """What a sublayer adds to the stream."""
        return self.model.work(self.at(f"{part}_add", layer, row, position)) * self.model.factor(layer, f"{part}_scale")

    def state(self, layer: int, stage: str, row: int, position: int) -> Float[Tensor, " d_model"]:
        """A state of the stream."""
        if stage == "post":
            return self.model.work(self.at("block_out", layer, row, position))
        pre = self.model.work(self.at("block_in", layer, row, position))
        if stage == "pre":
            return pre
        return pre * self.model.factor(layer, "attn_carry") + self.added(layer, "attn", row, position)

    def vector(self, site: Site, row: int, position: int, until: tuple[int, str] | None) -> Float[Tensor, " d_model"]:
        """What an addend is worth where (layer, part) reads the stream, or in the final stream."""
        if isinstance(site, Constant):
            return self.state(0, "pre", row, position) * reach(self.model, 0, "pre", until)
        layer: int = site.layer  # type: ignore[attr-defined]
        part = getattr(site, "part", "mlp" if isinstance(site, Neuron) else "attn")
        if isinstance(site, Sublayer):
            vector = self.added(layer, part, row, position)
        else:
            vector = self._through(site, layer, part, row, position)
        return vector * reach(self.model, layer, part, until)

    def _through(self, site: Site, layer: int, part: str, row: int, position: int) -> Tensor:
        work = self.model.work
        post = PostMap.of(self.model, layer, part, work(self.at(f"{part}_raw", layer, row, position)))
        written = self.model.rows(layer, f"{part}_out")
        if isinstance(site, Bias):
            total = torch.zeros(self.model.anatomy.d_model, dtype=self.model.work_dtype, device=self.model.device)
            total = total if written.bias is None else total + post.push(work(written.bias))
            return total if post.constant is None else total + post.constant
        size = self.own(site, row, position)
        low, d_head = 0, self.model.anatomy.sizes[layer].d_head
        if isinstance(site, Neuron):
            low = site.index
        elif isinstance(site, (Head, HeadSource, AttnNeuron)):
            low = site.head * d_head + (site.index if isinstance(site, AttnNeuron) else 0)
        return post.push(size @ work(written.rows[low : low + len(size)]))

    def _head(self, site: Head | HeadSource | AttnNeuron, row: int, position: int) -> Tensor:
        source = None if isinstance(site, Head) else site.source
        if source is None:
            d_head = self.model.anatomy.sizes[site.layer].d_head
            z = self.at("attn_z", site.layer, row, position)[site.head * d_head : (site.head + 1) * d_head]
        else:
            z = self.share(site.layer, site.head, source, row, position)
        return z[site.index : site.index + 1] if isinstance(site, AttnNeuron) else z

    def _expert(self, site: ExpertNeuron, row: int, position: int) -> Tensor:
        call: ExpertsCall = self.values[Tap("experts_call", site.layer)]
        b, s = self.grid.place(row, position)
        if site.expert not in call.index[b, s].tolist():
            raise InterventionError(
                f"`{site}` has no coefficient at position {position}: layer {site.layer} routes it to experts "
                f"{call.index[b, s].tolist()}."
            )
        experts = self.model.experts(site.layer)
        made = experts.coefficient(experts.pre_activations(call.states[b, s], site.expert))
        return self.model.work(made[site.index : site.index + 1])


def taps_of(model: OpenedModel, site: Site, *, vector: bool = False) -> Iterator[Tap]:
    """What has to be read for a site's own value, or its vector."""
    if isinstance(site, Constant):
        yield Tap("block_in", 0)
        return
    layer: int = site.layer  # type: ignore[attr-defined]
    part = getattr(site, "part", "mlp" if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)) else "attn")
    names: list[Any] = []
    if isinstance(site, Sublayer):
        names = [f"{part}_add"]
    elif isinstance(site, Resid):
        names = {"pre": ["block_in"], "mid": ["block_in", "attn_add"], "post": ["block_out"]}[site.stage]
    elif isinstance(site, Projection):
        names = ["attn_call"]
    elif isinstance(site, ExpertNeuron):
        names = ["experts_call"]
    elif isinstance(site, SharedNeuron):
        names = ["shared_coef"]
    elif isinstance(site, Neuron):
        names = ["coef"]
    elif isinstance(site, (Head, HeadSource, AttnNeuron)):
        names = (
            ["attn_z"] if getattr(site, "source", None) is None else ["attn_call", "attn_z", mix_tap(model, layer).name]
        )
    if vector and not isinstance(site, Sublayer):
        names = [*names, f"{part}_raw"]
    yield from (Tap(name, layer) for name in dict.fromkeys(names))


Known = dict[tuple[Any, ...], Tensor]


def fetch(model: OpenedModel, wants: Sequence[Want], known: Known | None = None) -> None:
    """Fill in values that come from donors: one forward a donor, or none for what a recording holds.

    Args:
        model: whose. wants: what is wanted. known: values fetched before, kept here for the next time.
    """
    known = {} if known is None else known
    by_donor: dict[Any, list[Want]] = {}
    for want in wants:
        if (value := known.get(want.key)) is not None:
            _give(want, value, known)
        else:
            by_donor.setdefault(want.key[0], []).append(want)
    for group in by_donor.values():
        donor = group[0].donor
        if isinstance(donor, Recording):
            donor.require_fresh()
        missing = []
        for want in group:
            if isinstance(donor, Recording) and want.position == donor.prompt.position and not _is_edge(want.operation):
                _give(want, recorded(donor, want.site), known)
            else:
                missing.append(want)
        if missing:
            _read_donor(model, donor, missing, known)


def _read_donor(model: OpenedModel, donor: Donor, wants: Sequence[Want], known: Known) -> None:
    prompt = donor.prompt if isinstance(donor, Recording) else bind(donor, model.tokenizer, model)
    taps: dict[Tap, None] = {}
    for want in wants:
        taps |= dict.fromkeys(taps_of(model, want.site, vector=_is_edge(want.operation)))
    ids = torch.tensor([prompt.ids], device=model.shadow.get_input_embeddings().weight.device)  # type: ignore[operator]
    reading = Reading(model, forward(model, ids, list(taps), logits_at=[len(prompt.ids) - 1]), Rows(0, len(prompt.ids)))
    for want in wants:
        if _is_edge(want.operation):
            reader = want.operation.edge.reader
            _give(want, reading.vector(want.site, 0, want.position, before(model, reader)), known)
        else:
            _give(want, reading.own(want.site, 0, want.position), known)


def _is_edge(op: Operation) -> bool:
    return op.source is not None


def _give(want: Want, value: Tensor, known: Known) -> None:
    known[want.key] = value
    value = value.reshape(-1) * want.share
    op = want.operation
    op.value = value if op.value is None else op.value + value


def before(model: OpenedModel, reader: Site) -> tuple[int, str] | None:
    """(layer, part) that a reader belongs to, as `reach` counts it; None for the unembedding."""
    if isinstance(reader, Constant):
        return None
    layer: int = reader.layer  # type: ignore[attr-defined]
    part = getattr(reader, "part", "attn" if isinstance(reader, (Head, HeadSource)) else "mlp")
    return (layer, "attn" if model.block(layer).parallel else part)


def recorded(donor: Recording, site: Site) -> Tensor:
    """A site's own value at a recording's predicting position."""
    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        return donor.work(need_group(donor, site, f"{site} of the donor").coefficient[neuron_place(site)[1]])
    if isinstance(site, Head):
        return donor.work(attention_of(donor, site.layer, str(site)).z[site.head])
    if isinstance(site, HeadSource):
        return joint_parts(donor, site.layer)[site.head, site.source]
    if isinstance(site, AttnNeuron):
        if site.source is None:
            return donor.work(attention_of(donor, site.layer, str(site)).z[site.head, site.index])
        return joint_parts(donor, site.layer)[site.head, site.source, site.index]
    if isinstance(site, Projection):
        one = attention_of(donor, site.layer, str(site))
        assert one.query is not None
        assert one.key is not None
        t = donor.prompt.position
        held = {"Q": one.query[site.head] if site.side == "Q" else None, "K": one.key[:, t], "V": one.value[:, t]}
        found = held[site.side]
        assert found is not None
        return donor.work(found if site.side == "Q" else found[site.head])
    record = donor.layers[site.layer]  # type: ignore[attr-defined]
    if isinstance(site, Sublayer):
        return donor.work(record.attn_out if site.part == "attn" else record.mlp_out)
    assert isinstance(site, Resid)
    if site.stage == "pre":
        return donor.work(record.resid_pre)
    if site.stage == "mid":
        return donor.resid_mid(site.layer)
    last = site.layer == donor.model.anatomy.n_layers - 1
    return donor.work(donor.resid_final if last else donor.layers[site.layer + 1].resid_pre)

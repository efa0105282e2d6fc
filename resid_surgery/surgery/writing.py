"""Writing: operations as indexed writes at the places of one forward, whatever rows they belong to.

All operations of a place are carried out together: sorted from fine to coarse, split into waves in which
nothing is written twice, a wave at a time. What each found and left is noted where the effect is measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery.addresses import Edge
from resid_surgery.errors import InterventionError
from resid_surgery.models.attention import AttentionCall, ExpertsCall
from resid_surgery.models.envoys import Values, Write
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap, mix_tap
from resid_surgery.models.tracing import mixing
from resid_surgery.sites import (
    AttnNeuron,
    ExpertNeuron,
    Head,
    Neuron,
    Resid,
    SharedNeuron,
    Sublayer,
)
from resid_surgery.stream.records import attention_rows, gate_between, repeat_kv
from resid_surgery.surgery.batches import Batch, Rows
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.noting import Change, Noting
from resid_surgery.surgery.places import Placed, raw_part, set_weights, tap_of, waves_of
from resid_surgery.surgery.reading import Reading


@final
class Writing(Noting):
    """The writes of some rows of operations, and what they did.

    Attributes:
        model, grid: where. everywhere: taps that have to be read at all positions.
        placed: tap -> (row, operation) carried out there. What it notes: see `Noting`.
    """

    def __init__(self, model: OpenedModel, grid: Batch, watched: Collection[int]) -> None:
        super().__init__()
        self.model, self.grid, self.watched = model, grid, frozenset(watched)
        self.everywhere: set[Tap] = set()
        self.placed: dict[Tap, Placed] = {}
        self.extra: dict[Tap, list[Write]] = {}
        self.shares: dict[tuple[int, int, int, int, int], Tensor] = {}
        self._reading: Reading | None = None

    def place(self, row: int, op: Operation) -> None:
        """Add an operation of a row."""
        site = op.site
        assert not isinstance(site, Edge)
        tap = mix_tap(self.model, site.layer) if op.weight is not None else tap_of(site, steer=op.steer is not None)  # type: ignore[attr-defined]
        self.placed.setdefault(tap, []).append((row, op))
        if getattr(site, "source", None) is not None:
            self.everywhere.add(Tap("attn_call", tap.layer))
        if self.model.block(tap.layer).gated and (getattr(site, "source", None) is not None or tap.name == "attn_call"):
            self.everywhere |= {Tap("attn_mix", tap.layer), Tap("attn_z", tap.layer)}
        if isinstance(site, (ExpertNeuron, SharedNeuron)):
            self.everywhere.add(Tap("experts_call", tap.layer))
        if isinstance(site, Resid) and site.stage == "mid":
            self.everywhere.add(Tap("block_in", tap.layer))

    def also(self, tap: Tap, write: Write) -> None:
        """Add a write that is carried out before the operations of its tap."""
        self.extra.setdefault(tap, []).append(write)

    def reading(self, seen: Values) -> Reading:
        """The forward so far, as `Reading`; attention weights as they were set are kept in it."""
        if self._reading is None:
            self._reading = Reading(self.model, seen, self.grid, self.weights, self.edited)
        return self._reading

    def take(self, noted: dict[str, Any]) -> None:
        """Hold what a forward elsewhere noted."""
        super().take(noted)
        self._reading = None

    def writes(self) -> dict[Tap, Write]:
        """Tap -> what is done there."""
        return {tap: self._writer(tap) for tap in {*self.placed, *self.extra}}

    def _writer(self, tap: Tap) -> Write:
        placed = self.placed.get(tap, [])
        waves = list(waves_of(placed))
        before = self.extra.get(tap, [])

        def write(found: Any, seen: Values) -> Any:
            if tap.name == "attn_call":
                return self._projections(tap, waves, found, seen)
            value = found.clone()
            for one in before:
                value = one(value, seen)
            self.found[tap] = value.clone() if tap.name == "attn_z" else found
            for wave in waves:
                self._apply(tap, wave, value, seen)
            self.left[tap] = value
            return value

        return write

    def _apply(self, tap: Tap, wave: Placed, value: Tensor, seen: Values) -> None:
        """Carry out a wave in place on value[row, position]."""
        first = wave[0][1]
        if first.weight is not None:
            self._attend(tap, wave, value, seen)
        elif isinstance(first.site, ExpertNeuron) and first.steer is None:
            for row, op in wave:
                self._expert(tap, row, op, value, seen)
        elif getattr(first.site, "source", None) is not None and first.steer is None:
            self._share_wave(tap, wave, value, seen)
        else:
            self._plain_wave(tap, wave, value, seen)

    def _index(self, wave: Placed) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([row for row, _ in wave])
        return self.grid.places(rows, torch.tensor([op.position for _, op in wave]))

    def _plain_wave(self, tap: Tap, wave: Placed, value: Tensor, seen: Values) -> None:
        """Neurons, heads, coordinates, sublayers, states and steering: a region each, replaced or scaled."""
        first, (b, s) = wave[0][1], self._index(wave)
        units = self._units(tap)
        if first.steer is not None:
            index: tuple[Any, ...] = (b, s)
        elif isinstance(first.site, (Neuron, SharedNeuron)):
            index = (b, s, torch.tensor([op.site.index for _, op in wave]))  # type: ignore[attr-defined]
        elif isinstance(first.site, (Head, AttnNeuron)):
            d_head = self.model.anatomy.sizes[tap.layer].d_head
            value = value.view(*value.shape[:2], -1, d_head)
            index = (b, s, torch.tensor([op.site.head for _, op in wave]))  # type: ignore[attr-defined]
            if isinstance(first.site, AttnNeuron):
                index = (*index, torch.tensor([op.site.index for _, op in wave]))  # type: ignore[attr-defined]
        else:
            index = (b, s)
        before = value[index]
        base = None
        if isinstance(first.site, Resid) and first.site.stage == "mid" and first.steer is None:
            carry = self.model.factor(tap.layer, "attn_carry")
            base = self.model.work(seen[Tap("block_in", tap.layer)][b, s]) * carry
        after = self._operated(wave, before, base, units)
        value[index] = after
        self._note(tap, wave, before, after, units)

    def _operated(self, wave: Placed, before: Tensor, base: Tensor | None, units: Tensor | float) -> Tensor:
        """What a wave leaves of what it found; in stream units where the block scales what is written."""
        if wave[0][1].steer is not None:
            steer = torch.stack([op.steer for _, op in wave if op.steer is not None])
            return before + (steer / units).to(before)
        shape = (-1,) + (1,) * (before.ndim - 1)
        factors = torch.tensor([op.factor for _, op in wave], dtype=torch.float64, device=before.device).view(shape)
        replaced = torch.tensor([op.value is not None for _, op in wave], device=before.device).view(shape)
        given = self._given(wave, before)
        if base is not None:  # as a difference: Scale(1) is exactly nothing
            mid = base + self.model.work(before) * units
            moved = before + ((mid * (factors.to(mid) - 1)) / units).to(before)
            gone = replaced | (factors == 0)
            target = torch.zeros_like(mid) if given is None else given.to(mid)
            return torch.where(gone, ((target - base) / units).to(before), moved)
        scaled = before * factors.to(before)
        if given is None:
            return scaled
        return torch.where(replaced, (given.to(self.model.work_dtype) / units).to(before), scaled)

    def _given(self, wave: Placed, like: Tensor) -> Tensor | None:
        """The values that replace, zeros where none does; None if no operation replaces."""
        if all(op.value is None for _, op in wave):
            return None
        nothing = torch.zeros(like[0].numel(), dtype=self.model.work_dtype, device=like.device)
        rows = [nothing if op.value is None else op.value.to(nothing).reshape(-1) for _, op in wave]
        return torch.stack(rows).view(like.shape)

    def _share_wave(self, tap: Tap, wave: Placed, value: Tensor, seen: Values) -> None:
        """One source's share of heads or of their coordinates: the rest of each head stays as it is."""
        reading, layer = self.reading(seen), tap.layer
        reading.prepare(layer, [(row, op.position) for row, op in wave])
        d_head = self.model.anatomy.sizes[layer].d_head
        (b, s), view = self._index(wave), value.view(*value.shape[:2], -1, d_head)
        heads = torch.tensor([op.site.head for _, op in wave])  # type: ignore[attr-defined]
        keys = [(row, op.position, layer, op.site.head, op.site.source) for row, op in wave]  # type: ignore[attr-defined]
        for key in keys:
            if key not in self.shares:
                if not (reading.edited or self.extra.get(tap) or self.model.block(layer).gated):
                    reading.require_mix(self.found[tap], layer, *key[:2], key[3])
                row, position, _, head, source = key  # as it is in this run, before operations on it
                self.shares[key] = reading.share(layer, head, source, row, position, self.found[tap]).to(value)
        held = torch.stack([self.shares[key] for key in keys])
        whole = not isinstance(wave[0][1].site, AttnNeuron)
        n = torch.arange(len(wave))
        at = None if whole else torch.tensor([op.site.index for _, op in wave])  # type: ignore[attr-defined]
        part = held if at is None else held[n, at]
        left = self._operated(wave, part, None, 1.0)
        delta = left - part
        index = (b, s, heads) if at is None else (b, s, heads, at)
        view.index_put_(index, delta, accumulate=True)
        for i, key in enumerate(keys):
            if at is None:
                self.shares[key] = left[i]
            else:
                self.shares[key][at[i]] = left[i]
        self._note(tap, wave, torch.zeros_like(delta), delta, 1.0)

    def _attend(self, tap: Tap, wave: Placed, value: Tensor, seen: Values) -> None:
        """Set attention weights: the head's mixed value changes by (new - old weights) v."""
        reading, layer = self.reading(seen), tap.layer
        reading.prepare(layer, [(row, op.position) for row, op in wave])
        rows: dict[tuple[int, int, int], list[Operation]] = {}
        for row, op in wave:
            rows.setdefault((row, op.position, op.site.head), []).append(op)  # type: ignore[attr-defined]
        for (row, position, head), ops in rows.items():
            alpha = reading.alpha(layer, row, position)
            if tap not in self.extra:
                reading.require_mix(value, layer, row, position, head)
            new = set_weights(alpha[head], ops, lambda j, row=row: self.grid.key(row, j))
            b, _ = self.grid.place(row, position)
            values = repeat_kv(reading.call(layer).value[b], len(alpha))[head].to(alpha)
            delta = torch.zeros_like(alpha[:, :1]).expand(-1, values.shape[-1]).clone()
            delta[head] = (new - alpha[head]) @ values
            reading.edited = self.edited = True
            reading.alphas[layer, row, position] = torch.cat([alpha[:head], new[None], alpha[head + 1 :]])
            self.mix_in(tap, value, row, position, delta)

    def mix_in(self, tap: Tap, value: Tensor, row: int, position: int, delta: Tensor) -> None:
        """Add (head, d_head) to what heads mixed, and note it for after the run."""
        b, s = self.grid.place(row, position)
        region = value[b, s]
        region += delta.to(value).reshape(region.shape)
        self.note_mix(tap.layer, row, position, delta)

    def note_mix(self, layer: int, row: int, position: int, delta: Tensor) -> None:
        """Note a change of what heads mixed at a position, before a gate."""
        if position in self.watched:
            key = (row, position, layer)
            self.mixed[key] = delta if key not in self.mixed else self.mixed[key] + delta

    def _projections(self, tap: Tap, waves: list[Placed], call: AttentionCall, seen: Values) -> AttentionCall:
        """Operate on queries, keys and values; what it does to noted positions is worked out from them."""
        before = replace(call, **{side: t.clone() for side in ("query", "key", "value")
                                  if (t := getattr(call, side)) is not None})  # fmt: skip
        if isinstance(self.grid, Rows) and call.value.shape[2] != self.grid.keys:
            raise InterventionError(
                f"keys and values of layer {tap.layer} cannot be told apart: its cache holds {call.value.shape[2]} of "
                f"{self.grid.keys} positions (a sliding window)."
            )
        self.calls[tap.layer] = call
        for wave in waves:
            side = wave[0][1].site.side  # type: ignore[attr-defined]
            held = {"Q": call.query, "K": call.key, "V": call.value}[side]
            assert held is not None
            b, s = self._index(wave)
            if side != "Q":
                s = torch.tensor([self.grid.key(row, op.position) for row, op in wave])
            index = (b, torch.tensor([op.site.head for _, op in wave]), s)  # type: ignore[attr-defined]
            held[index] = self._operated(wave, held[index], None, 1.0)
        touched: dict[int, int] = {}
        for row, op in (item for wave in waves for item in wave):
            touched[row] = min(op.position, touched.get(row, op.position))
        for row, low in touched.items():
            for position in (p for p in self.watched if p >= low):
                at, index_s = self.grid.place(row, position)
                made = []
                for one in (before, call):
                    alpha = attention_rows(one, at, [index_s])[0]
                    values = repeat_kv(one.value[at], len(alpha)).to(alpha)
                    made.append((alpha[:, None] @ values)[:, 0])
                self.note_mix(tap.layer, row, position, made[1] - made[0])
        return call

    def _expert(self, tap: Tap, row: int, op: Operation, value: Tensor, seen: Values) -> None:
        site = op.site
        assert isinstance(site, ExpertNeuron)
        share, one = self._expert_share(row, op, site, seen)
        left = share * op.factor if op.value is None else one * op.value.to(one)
        self.put_expert(tap, row, op, value, share, left)

    def put_expert(self, tap: Tap, row: int, op: Operation, value: Tensor, share: Tensor, left: Tensor) -> None:
        """Leave another share of an expert's neuron in the experts' sum."""
        b, s = self.grid.place(row, op.position)
        before = value[b, s].clone()
        value[b, s] += (left - share).to(value)
        self.experts_left[row, op.position, op.site] = left  # type: ignore[index]
        self._note(tap, [(row, op)], before[None], value[b, s][None], 1.0)

    def _expert_share(self, row: int, op: Operation, site: ExpertNeuron, seen: Values) -> tuple[Tensor, Tensor]:
        """(what an expert's neuron writes in this run, what it would write with coefficient 1), d_model."""
        one, made = self.expert_parts(row, op.position, site, seen)
        if one is None or made is None:
            if op.value is None:  # nothing is there to remove or scale
                nothing = torch.zeros(self.model.anatomy.d_model, dtype=self.model.work_dtype, device=self.model.device)
                return nothing, nothing
            raise InterventionError(
                f"{op.origin.brief} cannot act: in this run layer {site.layer} does not route position {op.position} "
                f"to expert {site.expert}."
            )
        if (row, op.position, site) not in self.experts_left:  # else as earlier operations of this row left it
            self.experts_left[row, op.position, site] = one * made
        return self.experts_left[row, op.position, site], one

    def expert_parts(
        self, row: int, position: int, site: ExpertNeuron, seen: Values
    ) -> tuple[Tensor | None, Tensor | None]:
        """(router weight x value vector, coefficient) of an expert's neuron in this run, None if not routed to."""
        call: ExpertsCall = seen[Tap("experts_call", site.layer)]
        (b, s), work = self.grid.place(row, position), self.model.work
        chosen = torch.nonzero(call.index[b, s] == site.expert)[:, 0]
        if not len(chosen):
            return None, None
        experts = self.model.experts(site.layer)
        one = work(call.weight[b, s][chosen].sum()) * work(experts.out(site.expert).rows[site.index])
        pre = experts.pre_activations(call.states[b, s], site.expert)
        return one, work(experts.coefficient(pre)[site.index])

    def _units(self, tap: Tap) -> Tensor | float:
        """What one unit of what is written here is in the stream."""
        return self.model.factor(tap.layer, f"{tap.name[:-4]}_scale") if tap.name.endswith("_add") else 1.0

    def _note(self, tap: Tap, wave: Placed, before: Tensor, after: Tensor, units: Tensor | float) -> None:
        """Add left minus found, as d_model vectors, to the rows' changes at noted positions."""
        kept = [i for i, (_, op) in enumerate(wave) if op.position in self.watched]
        if not kept:
            return
        work = self.model.work
        deltas, chosen = work(after[kept]) - work(before[kept]), [wave[i] for i in kept]
        through = {"coef": "mlp_out", "shared_coef": "shared_out", "attn_z": "attn_out"}.get(tap.name)
        if through is not None:
            rows = work(self._written_rows(tap, through, chosen))
            deltas = torch.einsum("nw,nwd->nd", deltas.reshape(len(chosen), -1), rows)
        for (row, op), delta in zip(chosen, deltas, strict=True):
            if tap.name in ("experts_out", "shared_coef"):  # their weight in the mixture is known after the run
                kind = tap.name.partition("_")[0]
                self.in_mixture.setdefault((row, op.position), {}).setdefault(tap.layer, []).append((kind, delta))
                continue
            changes = self.changes.setdefault((row, op.position), {})
            if part := raw_part(tap):
                change = changes.setdefault((tap.layer, part), Change())
                change.raw = delta if change.raw is None else change.raw + delta
            else:
                where = op.site.part if isinstance(op.site, Sublayer) else op.site.stage  # type: ignore[attr-defined]
                change = changes.setdefault((op.site.layer, where), Change())  # type: ignore[attr-defined]
                change.added = delta * units if change.added is None else change.added + delta * units

    def note_raw(self, layer: int, part: str, row: int, position: int, delta: Tensor) -> None:
        """Note a change of a sublayer's output."""
        if position in self.watched:
            change = self.changes.setdefault((row, position), {}).setdefault((layer, part), Change())
            change.raw = self.model.work(delta) if change.raw is None else change.raw + self.model.work(delta)

    def _written_rows(self, tap: Tap, part: str, wave: Placed) -> Tensor:
        """Rows of W_O or a down-projection that a wave's regions are read by: (n, width, d_model)."""
        rows = self.model.rows(tap.layer, part).rows
        if part != "attn_out":
            return rows[[op.site.index for _, op in wave]][:, None]  # type: ignore[attr-defined]
        d_head = self.model.anatomy.sizes[tap.layer].d_head
        heads = rows.view(-1, d_head, rows.shape[-1])[[op.site.head for _, op in wave]]  # type: ignore[attr-defined]
        if isinstance(wave[0][1].site, AttnNeuron):
            return heads[torch.arange(len(wave)), [op.site.index for _, op in wave]][:, None]  # type: ignore[attr-defined]
        return heads


def settle(writing: Writing, values: Values) -> None:
    """After the run: turn what was done before gates and inside mixtures into changes of outputs."""
    for (row, position, layer), delta in writing.mixed.items():
        if writing.model.block(layer).gated:
            b, s = writing.grid.place(row, position)
            mix = values[Tap("attn_mix", layer)][b, s]
            held = writing.found.get(Tap("attn_z", layer))
            z = (values[Tap("attn_z", layer)] if held is None else held)[b, s]
            delta = gate_between(mix, z.view(mix.shape)).to(delta) * delta
        rows = writing.model.work(writing.model.rows(layer, "attn_out").rows)
        writing.note_raw(layer, "attn", row, position, writing.model.work(delta).reshape(-1) @ rows)
    writing.mixed.clear()
    for layer in {layer for found in writing.in_mixture.values() for layer in found}:
        places = [key for key, found in writing.in_mixture.items() if layer in found]
        found_at = [writing.grid.place(*key) for key in places]
        states = values[Tap("experts_call", layer)].states[[b for b, _ in found_at], [s for _, s in found_at]]
        for key, routed, shared in zip(places, *mixing(writing.model, layer, states), strict=True):
            for kind, vector in writing.in_mixture[key][layer]:
                writing.note_raw(layer, "mlp", *key, vector * (shared if kind == "shared" else routed))
    writing.in_mixture.clear()

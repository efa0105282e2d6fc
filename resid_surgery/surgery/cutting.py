"""Cutting: operations along edges, so that one reader reads N(r + e) and nobody else does.

With u the writer's addend where the reader reads it and e what the operations change of it:

1. Every row with edges gets an auxiliary row for each reader, which carries out the row's other operations too and
   so computes the same, up to what the reader reads.
2. There, at the positions of the edges, it reads N_s'(r + e) instead of N_s(r); s' = s where the norm is frozen.
   The model's own keys, projections, norms, rotations and routers make of it what they make of anything.
3. What the *reader* made of it replaces the reader's part in the row: a neuron's coefficient, the sublayer's
   output, the head's values at W_O (with its gate, if it has one); a head's queries, keys and values that read
   otherwise enter the attention of this head at this position together, whose weights are worked out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery.errors import InterventionError
from resid_surgery.models.envoys import Values, Write
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import Norm
from resid_surgery.models.taps import Tap, mix_tap, mlp_reads
from resid_surgery.sites import Constant, ExpertNeuron, Head, HeadSource, Neuron, SharedNeuron, Site, Sublayer
from resid_surgery.stream.records import attention_rows
from resid_surgery.surgery.batches import Packed
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.places import RowOps
from resid_surgery.surgery.reading import before, taps_of
from resid_surgery.surgery.writing import Writing


@final
@dataclass(eq=False)
class Reader:
    """One reading of one row that is changed.

    Attributes:
        row: whose. aux: the row that reads the changed stream. site, side, norm: of the edges.
        targets: positions at which the reader's part is replaced.
        edits: (writer, position of the writer) -> operations on that addend.
        key: what stays the same from one forward of a generation to the next.
    """

    row: int
    aux: int
    site: Site
    side: str
    norm: str
    targets: tuple[int, ...]
    edits: dict[tuple[Site, int], list[Operation]]
    key: Any = None

    @property
    def layer(self) -> int:
        """Of the reader; -1 for the unembedding."""
        return int(getattr(self.site, "layer", -1))

    @property
    def part(self) -> str:
        """ "attn" or "mlp"."""
        if isinstance(self.site, Sublayer):
            return self.site.part
        return "attn" if isinstance(self.site, (Head, HeadSource)) else "mlp"


@final
@dataclass(eq=False)
class Cutting:
    """The edges of a batch: auxiliary rows, and their writes on top of a `Writing`.

    Attributes:
        writing: of the batch. readers: what is read otherwise. rows: number of rows, auxiliary ones included.
        unread: (row, position) -> what the unembedding reads more than the final stream. frozen: with its scale.
        sides: (row, layer) -> the readers of heads' queries, keys and values there.
    """

    writing: Writing
    readers: list[Reader] = field(default_factory=list)
    rows: int = 0
    unread: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    frozen: dict[tuple[int, int], bool] = field(default_factory=dict)
    sides: dict[tuple[int, int], list[Reader]] = field(default_factory=dict)

    @classmethod
    def of(cls, writing: Writing, rows: Sequence[RowOps], known: dict[Any, int] | None = None) -> Cutting:
        """Place all operations of some rows: plain ones in their row and its auxiliary rows, edges between them.

        Args:
            writing: of the batch. rows: of operations. known: auxiliary rows of earlier forwards that share a cache.
        """
        known = {} if known is None else known
        cutting, family = cls(writing), {}
        for row, ops in enumerate(rows):
            family[row] = [row]
            for reader in readers_of(row, ops):
                if not isinstance(reader.site, Constant):
                    reader.aux = known.setdefault(reader.key, len(rows) + len(known))
                    if isinstance(writing.grid, Packed):
                        writing.grid.add(writing.grid.firsts[row])
                    family[row].append(reader.aux)
                cutting.readers.append(reader)
            for op in ops:
                if op.source is None:
                    for one in family[row]:
                        writing.place(one, op)
        cutting.rows = len(rows) + len(known)
        for reader in cutting.readers:
            cutting._place(reader, family[reader.row])
        return cutting

    @property
    def model(self) -> OpenedModel:
        """Whose."""
        return self.writing.model

    def _place(self, reader: Reader, family: list[int]) -> None:
        writing, layer = self.writing, reader.layer
        for writer, _ in reader.edits:
            writing.everywhere |= set(taps_of(self.model, writer, vector=True))
        if isinstance(reader.site, Constant):
            writing.everywhere.add(Tap("block_out", self.model.anatomy.n_layers - 1))
            return
        writing.everywhere.add(Tap("block_in", layer))
        if reader.part == "mlp" and not self.model.block(layer).parallel:
            writing.everywhere |= {Tap("attn_add", layer)} if self.model.block(layer).attn_kind != "none" else set()
        for tap in [Tap("attn_read", layer)] if reader.part == "attn" else mlp_reads(self.model, layer):
            writing.also(tap, self._reads(reader, tap))
        if reader.side != "all":
            self._place_side(reader, family)
        else:
            tap = self._tap(reader)
            writing.also(tap, self._transplant(reader, tap, family))
        if isinstance(reader.site, (ExpertNeuron, SharedNeuron)):
            writing.everywhere.add(Tap("experts_call", layer))
        if isinstance(reader.site, Neuron) and self.model.has(layer, "coef_norm"):
            raise InterventionError(
                f"edges into {reader.site} cannot be cut in {self.model.name}: a norm over all coefficients stands "
                f"before the down-projection, so one neuron has no coefficient of its own. Use L{layer}.mlp as the "
                "reader."
            )

    def _place_side(self, reader: Reader, family: list[int]) -> None:
        """Queries, keys and values of one row's heads that read otherwise enter their attention together."""
        writing, key = self.writing, (reader.row, reader.layer)
        tap = mix_tap(self.model, reader.layer)
        writing.everywhere.add(Tap("attn_call", reader.layer))
        if tap.name == "attn_mix":
            writing.everywhere |= {Tap("attn_mix", reader.layer), Tap("attn_z", reader.layer)}
        if key not in self.sides:
            self.sides[key] = []
            writing.also(tap, self._attention(tap, key, family))
        self.sides[key].append(reader)

    def _tap(self, reader: Reader) -> Tap:
        """Where the reader's part is replaced."""
        if isinstance(reader.site, Sublayer):
            return Tap("attn_raw" if reader.part == "attn" else "mlp_raw", reader.layer)
        names: dict[type, Any] = {
            Head: "attn_z",
            Neuron: "coef",
            SharedNeuron: "shared_coef",
            ExpertNeuron: "experts_out",
        }
        return Tap(names[type(reader.site)], reader.layer)

    def _reads(self, reader: Reader, tap: Tap) -> Write:
        def write(value: Tensor, seen: Values) -> Tensor:  # earlier positions of a generation are in the cache
            for position in sorted({at for _, at in reader.edits if at >= self.writing.grid.begins(reader.aux)}):
                b, s = self.writing.grid.place(reader.aux, position)
                value[b, s] += self.moved(reader, position, seen).to(value)
            return value

        return write

    def moved(self, reader: Reader, position: int, seen: Values) -> Tensor:
        """N_s'(r + e) - N_s(r): how what is read at a position changes."""
        model, reading = self.model, self.writing.reading(seen)
        row = reader.row if isinstance(reader.site, Constant) else reader.aux
        norm = norm_of(model, reader)
        if isinstance(reader.site, Constant):
            r = reading.state(model.anatomy.n_layers - 1, "post", row, position)
        else:
            middle = reader.part == "mlp" and model.anatomy.between(reader.layer)
            r = reading.state(reader.layer, "mid" if middle else "pre", row, position)
        e = self.change(reader, position, seen)
        s = norm.scale(r)
        after = s if reader.norm == "frozen" else norm.scale(r + e)
        return norm.linear(r + e, after) - norm.linear(r, s)

    def change(self, reader: Reader, position: int, seen: Values) -> Tensor:
        """e: what the operations change of the writers' addends at a position."""
        reading, until = self.writing.reading(seen), before(self.model, reader.site)
        row = reader.row if isinstance(reader.site, Constant) else reader.aux
        total = torch.zeros(self.model.anatomy.d_model, dtype=self.model.work_dtype, device=self.model.device)
        for (writer, at), ops in reader.edits.items():
            if at != position:
                continue
            found = reading.vector(writer, row, at, until)
            left = found
            for op in sorted(ops, key=lambda one: one.steer is not None):
                if op.steer is not None:
                    left = left + op.steer
                else:
                    left = left * op.factor if op.value is None else op.value.to(left)
            total = total + (left - found)
        return total

    def _transplant(self, reader: Reader, tap: Tap, family: list[int]) -> Write:
        """Replace the reader's part in the row by what the auxiliary row's reader made."""

        def write(value: Tensor, seen: Values) -> Tensor:
            for target in reader.targets:
                if isinstance(reader.site, ExpertNeuron):
                    self._expert(reader, reader.site, tap, value, seen, target, family)
                    continue
                b, s = self.writing.grid.place(reader.aux, target)
                site = reader.site
                index = self._region(site)
                made = value[b, s, index].clone()
                for row in (one for one in family if one != reader.aux):
                    b, s = self.writing.grid.place(row, target)
                    delta = made - value[b, s, index]
                    value[b, s, index] = made
                    self._note(reader, row, target, delta)
            return value

        return write

    def _note(self, reader: Reader, row: int, target: int, delta: Tensor) -> None:
        if row != reader.row or target not in self.writing.watched:
            return
        site, layer, work = reader.site, reader.layer, self.model.work
        if isinstance(site, (Neuron, SharedNeuron, Head)):
            part = {Neuron: "mlp_out", SharedNeuron: "shared_out", Head: "attn_out"}[type(site)]
            delta = work(delta) @ work(self.model.rows(layer, part).rows[self._region(site)])
        if isinstance(site, SharedNeuron):
            self.writing.in_mixture.setdefault((row, target), {}).setdefault(layer, []).append(("shared", delta))
        else:
            self.writing.note_raw(layer, reader.part, row, target, delta)

    def _region(self, site: Site) -> slice:
        """Which of a tap's coordinates are a reader's."""
        if isinstance(site, Sublayer):
            return slice(None)
        if isinstance(site, Head):
            d_head = self.model.anatomy.sizes[site.layer].d_head
            return slice(site.head * d_head, (site.head + 1) * d_head)
        return slice(site.index, site.index + 1)  # type: ignore[attr-defined]

    def _expert(
        self, reader: Reader, site: ExpertNeuron, tap: Tap, value: Tensor, seen: Values, target: int, family: list[int]
    ) -> None:
        _, made = self.writing.expert_parts(reader.aux, target, site, seen)
        op = next(iter(reader.edits.values()))[0]
        for row in (one for one in family if one != reader.aux):
            one, coefficient = self.writing.expert_parts(row, target, site, seen)
            if one is None or coefficient is None:
                continue  # the expert is not there: its neuron reads nothing
            if made is None:  # the auxiliary row's router sends it elsewhere; its keys read all the same
                experts, call = self.model.experts(site.layer), seen[Tap("experts_call", site.layer)]
                b, s = self.writing.grid.place(reader.aux, target)
                pre = experts.pre_activations(call.states[b, s], site.expert)
                made = self.model.work(experts.coefficient(pre)[site.index])
            placed = Operation(site, target, op.origin)
            self.writing.put_expert(tap, row, placed, value, one * coefficient, one * made)

    def _attention(self, tap: Tap, key: tuple[int, int], family: list[int]) -> Write:
        """Add to what heads mixed how it changes when some queries, keys or values read otherwise."""

        def write(value: Tensor, seen: Values) -> Tensor:
            groups: dict[tuple[int, int], list[Reader]] = {}
            for reader in self.sides[key]:
                for target in reader.targets:
                    groups.setdefault((reader.site.head, target), []).append(reader)  # type: ignore[attr-defined]
            for (head, target), readers in groups.items():
                for row in (one for one in family if one not in {reader.aux for reader in readers}):
                    change = self._mixed(key[1], head, readers, row, target, seen)
                    delta = torch.zeros(self.model.anatomy.sizes[key[1]].n_heads, len(change)).to(change)
                    delta[head] = change
                    if row == key[0]:
                        self.writing.mix_in(tap, value, row, target, delta)
                    else:
                        b, s = self.writing.grid.place(row, target)
                        value[b, s] += delta.to(value).reshape(value[b, s].shape)
            return value

        return write

    def _mixed(self, layer: int, head: int, readers: list[Reader], row: int, target: int, seen: Values) -> Tensor:
        """sum alpha' v' - sum alpha v of one head, its query, keys and values being those of their readers' rows."""
        reading, grid = self.writing.reading(seen), self.writing.grid
        call, size = reading.call(layer), self.model.anatomy.sizes[layer]
        kv, (b, s) = head // (size.n_heads // size.n_kv_heads), grid.place(row, target)
        alpha = reading.alpha(layer, row, target)[head]
        values = call.value[b, kv].to(alpha)
        query, keys, moved_values = None, None, values.clone()
        for reader in readers:
            edited = sorted({at for _, at in reader.edits if at <= target})
            mine, theirs = ([grid.key(one, at) for at in edited] for one in (row, reader.aux))
            c, u = grid.place(reader.aux, target)
            if reader.side == "value":
                moved_values[mine] = call.value[c, kv][theirs].to(alpha)
            elif reader.side == "query":
                assert call.query is not None
                query = call.query[c][:, [u]]
            else:
                assert call.key is not None
                keys = call.key[b].clone() if keys is None else keys
                keys[:, mine] = call.key[c][:, theirs]
        moved = alpha
        if query is not None or keys is not None:
            moved = attention_rows(call, b, [s], query, keys)[0][head]
        return (moved - alpha) @ values + moved @ (moved_values - values)

    def settle(self, values: Values) -> None:
        """After the run: what the unembedding reads otherwise."""
        for reader in self.readers:
            if isinstance(reader.site, Constant):
                for target in reader.targets:
                    self.unread[reader.row, target] = self.change(reader, target, values)
                    self.frozen[reader.row, target] = reader.norm == "frozen"


def norm_of(model: OpenedModel, reader: Reader) -> Norm:
    """The norm that a reader reads through."""
    if isinstance(reader.site, Constant):
        return model.norm(None, "final_norm")
    return model.norm(reader.layer, f"{reader.part}_norm")


def readers_of(row: int, ops: RowOps) -> list[Reader]:
    """The edges of a row, grouped by what reads them; positions with the same edges share an auxiliary row."""
    by_target: dict[tuple[Site, str, str, int], list[Operation]] = {}
    for op in ops:
        if op.source is not None:
            by_target.setdefault((op.edge.reader, op.edge.side, op.edge.norm, op.position), []).append(op)
    groups: dict[Any, list[tuple[int, list[Operation]]]] = {}
    for (site, side, norm, target), group in by_target.items():
        origins = tuple(sorted({id(op.origin) for op in group}))
        own = target if any(op.origin.apart for op in group) else None
        groups.setdefault((site, side, norm, origins, own), []).append((target, group))
    readers = []
    for (site, side, norm, origins, own), members in groups.items():
        edits: dict[tuple[Site, int], list[Operation]] = {}
        for op in (op for _, group in members for op in group):
            assert op.source is not None
            held = edits.setdefault((op.edge.writer, op.source), [])
            if not any(other.origin is op.origin for other in held):
                held.append(op)
        targets = tuple(target for target, _ in members)
        readers.append(Reader(row, -1, site, side, norm, targets, edits, (row, site, side, norm, origins, own)))
    return readers


def auxiliary_rows(ops: RowOps) -> int:
    """How many rows of a batch the edges of some operations take beside their own."""
    if all(op.source is None for op in ops):
        return 0
    return sum(not isinstance(reader.site, Constant) for reader in readers_of(0, ops))

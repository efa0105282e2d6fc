"""The engine: rows of operations -> one traced forward with indexed writes and a control row.

Row 0 of every batch is left alone and must equal the recording; row i + 1 carries the i-th list of
operations. Each write says what it found and what it left, in this run, and what was left must be what the
model went on with.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import InterventionError
from resid_surgery.models.attention import AttentionCall, ExpertsCall
from resid_surgery.models.tracing import Tap, TapName, Values, forward, mixing
from resid_surgery.sites import AttnNeuron, ExpertNeuron, Head, HeadSource, Neuron, Resid, SharedNeuron, Site, Sublayer
from resid_surgery.stream.closing import relative
from resid_surgery.stream.recording import Recording, closure_tolerance
from resid_surgery.stream.records import attention_row, gate_between, repeat_kv
from resid_surgery.surgery.interventions import Operation

TOKENS_A_CHUNK = 512
LOGIT_BYTES = 32 << 20  # a batch's logits; they are held a few times over
RowOps = tuple[Operation, ...]


@final
@dataclass(eq=False)
class Change:
    """What the operations of one row did at the predicting position of one sublayer or state.

    Attributes:
        raw: (d_model,) left minus found in the sublayer's output, before a post-norm.
        added: (d_model,) left minus found in what is added, or in a state.
    """

    raw: Tensor | None = None
    added: Tensor | None = None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One row of a batch at the predicting position, in the working dtype.

    Attributes:
        embed: (d_model,). attn, mlp: (layer, d_model) what each sublayer added in this run; zeros
            where a layer has no such writer.
        raw: (layer, part) -> (d_model,) output before a post-norm, for operated sublayers.
        final: (d_model,) the stream after the last block. bs, logits: (vocabulary,).
        changes: (layer, "attn" | "mlp" | "pre" | "mid" | "post") -> what operations did there.
    """

    embed: Float[Tensor, " d_model"]
    attn: Float[Tensor, "layer d_model"]
    mlp: Float[Tensor, "layer d_model"]
    raw: dict[tuple[int, str], Tensor]
    final: Float[Tensor, " d_model"]
    bs: Float[Tensor, " vocabulary"]
    logits: Float[Tensor, " vocabulary"]
    changes: dict[tuple[int, str], Change] = field(default_factory=dict)


def run_rows(rec: Recording, rows: Sequence[RowOps]) -> Iterable[tuple[Run, Run]]:
    """(control, operated) runs of each list of operations, a bounded chunk of rows at a time.

    Raises:
        InterventionError: the control row differs from the recording, or an operation did not fire.
    """
    by_vocabulary = LOGIT_BYTES // (rec.model.vocab_size * rec.bs_values.element_size())
    step = max(1, min(TOKENS_A_CHUNK // rec.n_positions, by_vocabulary) - 1)
    for low in range(0, len(rows), step):
        runs = _Batch(rec, rows[low : low + step]).run()
        _check_control(rec, runs[0])
        for run in runs[1:]:
            yield runs[0], run


def _check_control(rec: Recording, control: Run) -> None:
    error = relative(control.bs, rec.work(rec.bs_values))
    if not error <= 10 * closure_tolerance(rec.model):
        raise InterventionError(
            f"the control row of {rec.model.name} differs from the recording by {error:.2g} of its largest logit: "
            "rows of a batch are not independent in this model, so no effect can be measured."
        )


@final
class _Batch:
    """One traced forward of a control row and some operated rows."""

    def __init__(self, rec: Recording, rows: Sequence[RowOps]) -> None:
        self.rec, self.model, self.t = rec, rec.model, rec.prompt.position
        self.rows = [(), *rows]
        self.changes: list[dict[tuple[int, str], Change]] = [{} for _ in self.rows]
        self.left: dict[Tap, Tensor] = {}
        self.everywhere: set[Tap] = set()
        self.placed: dict[Tap, list[tuple[int, Operation]]] = {}
        self.shares: dict[tuple[int, int, int, int, int], Tensor] = {}
        self.found: dict[Tap, Tensor] = {}
        self.experts_left: dict[tuple[int, int, ExpertNeuron], Tensor] = {}
        self.in_mixture: list[dict[int, list[tuple[str, Tensor]]]] = [{} for _ in self.rows]
        for row, ops in enumerate(self.rows):
            for op in ops:
                self._place(row, op)

    def _place(self, row: int, op: Operation) -> None:
        tap = tap_of(op.site, steer=op.steer is not None)
        self.placed.setdefault(tap, []).append((row, op))
        if isinstance(op.site, (HeadSource, AttnNeuron)) and getattr(op.site, "source", None) is not None:
            self.everywhere.add(Tap("attn_call", tap.layer))
            if self.model.block(tap.layer).gated:
                self.everywhere.add(Tap("attn_mix", tap.layer))
        if isinstance(op.site, ExpertNeuron):
            self.everywhere.add(Tap("experts_call", tap.layer))
        if isinstance(op.site, Resid) and op.site.stage == "mid":
            self.everywhere.add(Tap("block_in", tap.layer))

    def run(self) -> list[Run]:
        """Run the forward and sort what it read into rows."""
        model, n_layers = self.model, self.model.anatomy.n_layers
        reads = [Tap("block_in", 0), Tap("block_out", n_layers - 1), Tap("bs"), Tap("logits"), *self.everywhere]
        for layer in range(n_layers):
            row = model.block(layer)
            reads += [Tap("attn_add", layer)] * (row.attn_kind != "none") + [Tap("mlp_add", layer)] * (
                row.mlp_kind != "none"
            )
        operated = {(tap.layer, part) for tap in self.placed if (part := _raw_part(tap))}
        reads += [Tap(f"{part}_raw", layer) for layer, part in operated]  # type: ignore[arg-type]
        for layer, part in operated:
            if part == "mlp" and model.block(layer).mlp_kind == "experts":
                reads += [Tap("experts_call", layer)]
        device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
        ids = torch.tensor([self.rec.prompt.ids], device=device).repeat(len(self.rows), 1)
        writes = {tap: self._writer(tap, ops) for tap, ops in self.placed.items()}
        values = forward(model, ids, reads, writes, at=self.t, everywhere=self.everywhere)
        self._weigh(values)
        runs = [self._run_of(row, values, operated) for row in range(len(self.rows))]
        self._check_fired(runs)
        return runs

    def _weigh(self, values: Values) -> None:
        """Turn what was done inside mixtures into changes of the MLP's output, by this run's weights."""
        for layer in {layer for layers in self.in_mixture for layer in layers}:
            rows = [row for row, layers in enumerate(self.in_mixture) if layer in layers]
            tap = Tap("experts_call", layer)
            states = values[tap].states[rows, self.t if tap in self.everywhere else 0]
            for row, routed, shared in zip(rows, *mixing(self.model, layer, states), strict=True):
                change = self.changes[row].setdefault((layer, "mlp"), Change())
                for kind, vector in self.in_mixture[row][layer]:
                    made = vector * (shared if kind == "shared" else routed)
                    change.raw = made if change.raw is None else change.raw + made

    def _run_of(self, row: int, values: Values, operated: set[tuple[int, str]]) -> Run:
        work, n_layers = self.rec.work, self.model.anatomy.n_layers

        def at(name: str, layer: int = -1) -> Tensor:
            tap = Tap(name, layer)  # type: ignore[arg-type]
            return work(values[tap][row, self.t if tap in self.everywhere else 0])

        def added(part: str, layer: int) -> Tensor:
            kind = getattr(self.model.block(layer), f"{part}_kind")
            if kind == "none":
                return torch.zeros_like(at("block_in", 0))
            return at(f"{part}_add", layer) * self.model.factor(layer, f"{part}_scale")

        scale = self.model.anatomy.layout.logit_scale
        return Run(
            embed=at("block_in", 0),
            attn=torch.stack([added("attn", i) for i in range(n_layers)]),
            mlp=torch.stack([added("mlp", i) for i in range(n_layers)]),
            raw={(layer, part): at(f"{part}_raw", layer) for layer, part in operated},
            final=at("block_out", n_layers - 1),
            bs=at("bs") if scale == 1.0 else at("bs") * scale,
            logits=at("logits"),
            changes=self.changes[row],
        )

    def _writer(self, tap: Tap, placed: list[tuple[int, Operation]]) -> Callable[[Tensor, Values], Tensor]:
        ordered = sorted(placed, key=lambda item: _fineness(item[1]))

        def write(found: Tensor, seen: Values) -> Tensor:
            value = found.clone()
            self.found[tap] = found
            for row, op in ordered:
                self._apply(tap, row, op, value, seen)
            self.left[tap] = value
            return value

        return write

    def _apply(self, tap: Tap, row: int, op: Operation, value: Tensor, seen: Values) -> None:
        """Carry out one operation in place on value[row, position] and note what it did at t."""
        at = value[row, op.position]
        scale = self.model.factor(tap.layer, f"{tap.name[:-4]}_scale") if tap.name.endswith("_add") else 1.0
        units = 1.0 if isinstance(scale, float) and scale == 1.0 else scale  # of the stream, for one of what is written
        if op.steer is not None:
            before, region = at.clone(), at
            region += op.steer.to(at) / units
        elif isinstance(op.site, Resid) and op.site.stage == "mid":
            before, region = at.clone(), at
            carried = self.rec.work(seen[Tap("block_in", tap.layer)][row, op.position])
            mid = carried * self.model.factor(tap.layer, "attn_carry") + self.rec.work(before) * units
            left = _left(op, mid)
            if op.value is None and op.factor:  # as a difference: Scale(1) is exactly nothing
                region += ((left - mid) / units).to(at)
            else:
                region.copy_((left - carried * self.model.factor(tap.layer, "attn_carry")) / units)
        elif isinstance(op.site, ExpertNeuron):
            before, region = at.clone(), at
            share, one = self._expert_share(row, op, op.site, seen)
            left = share * op.factor if op.value is None else one * op.value.to(one)
            region += (left - share).to(at)
            self.experts_left[row, op.position, op.site] = left
        else:
            region, part = self._region(op, at, seen, row)
            before = region.clone()
            if part is not None:  # one source's share of a head: the rest of the head stays as it is
                left = _left(op, part)
                region += left - part
                self._keep_share(row, op, left)
            elif isinstance(units, float) and units == 1.0:
                region.copy_(_left(op, before))
            else:
                region.copy_(_left(op, before * units) / units)
        if op.position == self.t:
            self._note(row, tap, op, before, region, units)

    def _expert_share(self, row: int, op: Operation, site: ExpertNeuron, seen: Values) -> tuple[Tensor, Tensor]:
        """(what an expert's neuron writes in this run, what it would write with coefficient 1), d_model."""
        call: ExpertsCall = seen[Tap("experts_call", site.layer)]
        experts, work = self.model.experts(site.layer), self.rec.work
        index, weight = call.index[row, op.position], call.weight[row, op.position]
        chosen = torch.nonzero(index == site.expert)[:, 0]
        if not len(chosen):
            if op.value is None:  # nothing is there to remove or scale
                nothing = torch.zeros(self.model.anatomy.d_model, dtype=self.model.work_dtype, device=index.device)
                return nothing, nothing
            raise InterventionError(
                f"{op.origin!r} cannot act: in this run layer {site.layer} routes position {op.position} to experts "
                f"{index.tolist()}, not to {site.expert}."
            )
        one = work(weight[chosen].sum()) * work(experts.out(site.expert).rows[site.index])
        if (row, op.position, site) not in self.experts_left:  # else as earlier operations of this row left it
            pre = experts.pre_activations(call.states[row, op.position], site.expert)
            self.experts_left[row, op.position, site] = one * work(experts.coefficient(pre)[site.index])
        return self.experts_left[row, op.position, site], one

    def _region(self, op: Operation, at: Tensor, seen: Values, row: int) -> tuple[Tensor, Tensor | None]:
        """The view that an operation writes, and the share of it that it addresses (None: all)."""
        site = op.site
        if isinstance(site, (Neuron, SharedNeuron)):
            return at[site.index : site.index + 1], None
        if isinstance(site, (Head, HeadSource, AttnNeuron)):
            d_head = self.model.anatomy.sizes[site.layer].d_head
            low = site.head * d_head
            whole = at[low : low + d_head]
            if isinstance(site, AttnNeuron):
                whole = whole[site.index : site.index + 1]
            if isinstance(site, Head) or site.source is None:
                return whole, None
            share = self._share(row, op.position, site, site.source, seen).to(at)
            return whole, share[site.index : site.index + 1] if isinstance(site, AttnNeuron) else share
        return at, None

    def _share(self, row: int, position: int, site: HeadSource | AttnNeuron, source: int, seen: Values) -> Tensor:
        """alpha v of one source as earlier operations of this row have left it."""
        key = (row, position, site.layer, site.head, source)
        if key not in self.shares:
            share = _joint(seen[Tap("attn_call", site.layer)], row, position, site.head, source)
            if self.model.block(site.layer).gated:
                mix = seen[Tap("attn_mix", site.layer)][row, position, site.head]
                low = site.head * len(mix)
                z = self.found[Tap("attn_z", site.layer)][row, position, low : low + len(mix)]
                share = share * gate_between(mix, z)
            self.shares[key] = share
        return self.shares[key]

    def _keep_share(self, row: int, op: Operation, left: Tensor) -> None:
        site = op.site
        assert isinstance(site, (HeadSource, AttnNeuron))
        assert site.source is not None
        share = self.shares[row, op.position, site.layer, site.head, site.source]
        if isinstance(site, AttnNeuron):
            share[site.index] = left[0]
        else:
            share.copy_(left)

    def _note(self, row: int, tap: Tap, op: Operation, before: Tensor, after: Tensor, units: Tensor | float) -> None:
        """Add left minus found, as a d_model vector, to the row's changes."""
        delta = self.rec.work(after.detach().clone()) - self.rec.work(before)
        part = _raw_part(tap)
        if tap.name in ("experts_out", "shared_coef"):  # their weight in the mixture is known after the run
            if tap.name == "shared_coef":
                delta = delta @ self.rec.work(self.model.rows(tap.layer, "shared_out").rows[_row_slice(op.site, 0)])
            self.in_mixture[row].setdefault(tap.layer, []).append((tap.name.partition("_")[0], delta))
        elif part:
            if tap.name in ("coef", "attn_z"):
                rows = self.model.rows(tap.layer, f"{part}_out").rows
                delta = delta @ self.rec.work(rows[_row_slice(op.site, self.model.anatomy.sizes[tap.layer].d_head)])
            change = self.changes[row].setdefault((tap.layer, part), Change())
            change.raw = delta if change.raw is None else change.raw + delta
        else:
            where = op.site.part if isinstance(op.site, Sublayer) else op.site.stage  # type: ignore[attr-defined]
            change = self.changes[row].setdefault((op.site.layer, where), Change())  # type: ignore[attr-defined]
            change.added = delta * units if change.added is None else change.added + delta * units

    def _check_fired(self, runs: Sequence[Run]) -> None:
        """What the operations left must be what the model went on with.

        An operated projection must have written what follows from the input left to it, and the
        final stream must be the sum of the addends and of what was done to states.
        """
        most = 10 * closure_tolerance(self.model)
        for tap, placed in self.placed.items():
            part = _raw_part(tap)
            steered = Tap(f"{part}_raw", tap.layer) in self.placed  # type: ignore[arg-type]
            for row, op in dict(placed).items():  # once a row, however many operations
                error = 0.0 if tap in self.left else float("inf")
                if tap.name in ("coef", "attn_z") and tap in self.left and not steered:
                    written = self.model.rows(tap.layer, f"{part}_out")
                    terms = self.rec.work(self.left[tap][row, self.t])[:, None] * self.rec.work(written.rows)
                    bias = 0 if written.bias is None else self.rec.work(written.bias)
                    error = relative(terms.sum(0) + bias, runs[row].raw[tap.layer, str(part)], terms)
                if not error <= most:
                    raise InterventionError(f"{op.origin!r} did not take effect at {op.site}, position {op.position}.")
        for row, run in enumerate(runs):
            reach = self.rec.reach
            added = [run.attn[i] * reach(i, "attn") for i in range(len(run.attn))]
            added += [run.mlp[i] * reach(i, "mlp") for i in range(len(run.mlp))]
            parts = torch.stack([run.embed * reach(0, "pre"), *added, *self._state_changes(row)])
            if not relative(parts.sum(0), run.final, parts) <= most:
                done = ", ".join(dict.fromkeys(repr(op.origin) for op in self.rows[row])) or "the control row"
                raise InterventionError(
                    f"after {done} the stream of {self.model.name} is not the sum of its addends, so what was done "
                    "cannot be measured. Does a hook on the model change it as well?"
                )

    def _state_changes(self, row: int) -> list[Tensor]:
        """What operations did to states; one at the middle is carried by attn_out already, one at
        the first by the embedding."""
        return [
            change.added * self.rec.reach(layer, "mlp" if stage == "post" else "pre")
            for (layer, stage), change in self.changes[row].items()
            if stage in ("pre", "post") and (layer, stage) != (0, "pre") and change.added is not None
        ]


def tap_of(site: Site, *, steer: bool) -> Tap:
    """Where in the forward an operation on a site is carried out."""
    layer: int = site.layer  # type: ignore[attr-defined]
    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        place: TapName = "coef" if isinstance(site, Neuron) else "shared_coef"
        return Tap("mlp_raw" if steer else "experts_out" if isinstance(site, ExpertNeuron) else place, layer)
    if isinstance(site, (Head, HeadSource, AttnNeuron)):
        return Tap("attn_raw" if steer else "attn_z", layer)
    if isinstance(site, Sublayer):
        return Tap("attn_add" if site.part == "attn" else "mlp_add", layer)
    assert isinstance(site, Resid)
    if site.stage == "pre":
        return Tap("block_in", layer)
    if site.stage == "mid":
        return Tap("attn_add", layer)
    return Tap("block_out", layer)


def _left(op: Operation, found: Tensor) -> Tensor:
    """factor * found, or the value that replaces it."""
    return found * op.factor if op.value is None else op.value.to(found).reshape(found.shape)


def _joint(call: AttentionCall, row: int, position: int, head: int, source: int) -> Float[Tensor, " d_head"]:
    """alpha[h, j] v[h, j] of this run."""
    alpha = attention_row(call, row, position)
    value = repeat_kv(call.value[row], alpha.shape[0])[head, source]
    return alpha[head, source] * value.to(alpha)


def _raw_part(tap: Tap) -> str | None:
    mlp = dict.fromkeys(("coef", "mlp_raw", "experts_out", "shared_coef"), "mlp")
    return (mlp | {"attn_z": "attn", "attn_raw": "attn"}).get(tap.name)


def _row_slice(site: Site, d_head: int) -> slice:
    if isinstance(site, (Neuron, SharedNeuron)):
        return slice(site.index, site.index + 1)
    assert isinstance(site, (Head, HeadSource, AttnNeuron))
    low = site.head * d_head + (site.index if isinstance(site, AttnNeuron) else 0)
    return slice(low, low + (1 if isinstance(site, AttnNeuron) else d_head))


def _fineness(op: Operation) -> tuple[bool, bool, bool, int]:
    """States after sublayers, Steer after the rest, shares of one source before whole heads, finer first."""
    order = (AttnNeuron, Neuron, ExpertNeuron, SharedNeuron, HeadSource, Head, Sublayer, Resid)
    coarse = order.index(type(op.site))
    whole = getattr(op.site, "source", None) is None
    return (isinstance(op.site, Resid), op.steer is not None, whole, coarse)

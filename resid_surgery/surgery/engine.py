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
from resid_surgery.models.tracing import AttentionCall, Tap, TapName, Values, forward
from resid_surgery.sites import AttnNeuron, Head, HeadSource, Neuron, Resid, Site, Sublayer
from resid_surgery.stream.closing import relative
from resid_surgery.stream.recording import Recording, attention_row, closure_tolerance, repeat_kv
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
        embed: (d_model,). attn, mlp: (layer, d_model) what each sublayer added in this run.
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
        for row, ops in enumerate(self.rows):
            for op in ops:
                self._place(row, op)

    def _place(self, row: int, op: Operation) -> None:
        tap = tap_of(op.site, steer=op.steer is not None)
        self.placed.setdefault(tap, []).append((row, op))
        if isinstance(op.site, (HeadSource, AttnNeuron)) and getattr(op.site, "source", None) is not None:
            self.everywhere.add(Tap("attn_call", tap.layer))
        if isinstance(op.site, Resid) and op.site.stage == "mid":
            self.everywhere.add(Tap("block_in", tap.layer))

    def run(self) -> list[Run]:
        """Run the forward and sort what it read into rows."""
        model, n_layers = self.model, self.model.anatomy.n_layers
        names: tuple[TapName, ...] = ("attn_add", "mlp_add")
        reads = [Tap("block_in", 0), Tap("block_out", n_layers - 1), Tap("bs"), Tap("logits"), *self.everywhere]
        reads += [Tap(name, layer) for layer in range(n_layers) for name in names]
        operated = {(tap.layer, part) for tap in self.placed if (part := _raw_part(tap))}
        reads += [Tap(f"{part}_raw", layer) for layer, part in operated]  # type: ignore[arg-type]
        device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
        ids = torch.tensor([self.rec.prompt.ids], device=device).repeat(len(self.rows), 1)
        writes = {tap: self._writer(tap, ops) for tap, ops in self.placed.items()}
        values = forward(model, ids, reads, writes, at=self.t, everywhere=self.everywhere)
        runs = [self._run_of(row, values, operated) for row in range(len(self.rows))]
        self._check_fired(runs)
        return runs

    def _run_of(self, row: int, values: Values, operated: set[tuple[int, str]]) -> Run:
        work, n_layers = self.rec.work, self.model.anatomy.n_layers

        def at(name: str, layer: int = -1) -> Tensor:
            tap = Tap(name, layer)  # type: ignore[arg-type]
            return work(values[tap][row, self.t if tap in self.everywhere else 0])

        return Run(
            embed=at("block_in", 0),
            attn=torch.stack([at("attn_add", i) for i in range(n_layers)]),
            mlp=torch.stack([at("mlp_add", i) for i in range(n_layers)]),
            raw={(layer, part): at(f"{part}_raw", layer) for layer, part in operated},
            final=at("block_out", n_layers - 1),
            bs=at("bs"),
            logits=at("logits"),
            changes=self.changes[row],
        )

    def _writer(self, tap: Tap, placed: list[tuple[int, Operation]]) -> Callable[[Tensor, Values], Tensor]:
        ordered = sorted(placed, key=lambda item: _fineness(item[1]))

        def write(found: Tensor, seen: Values) -> Tensor:
            value = found.clone()
            for row, op in ordered:
                self._apply(tap, row, op, value, seen)
            self.left[tap] = value
            return value

        return write

    def _apply(self, tap: Tap, row: int, op: Operation, value: Tensor, seen: Values) -> None:
        """Carry out one operation in place on value[row, position] and note what it did at t."""
        at = value[row, op.position]
        if op.steer is not None:
            delta = op.steer.to(at)
            before, region = at.clone(), at
            region += delta
        elif isinstance(op.site, Resid) and op.site.stage == "mid":
            before, region = at.clone(), at
            mid = self.rec.work(seen[Tap("block_in", tap.layer)][row, op.position]) + self.rec.work(before)
            region += (_left(op, mid) - mid).to(at)  # as a difference: Scale(1) is exactly nothing
        else:
            region, part = self._region(op, at, seen, row)
            before = region.clone()
            if part is None:
                region.copy_(_left(op, before))
            else:  # one source's share of a head: the rest of the head stays as it is
                left = _left(op, part)
                region += left - part
                self._keep_share(row, op, left)
        if op.position == self.t:
            self._note(row, tap, op, before, region)

    def _region(self, op: Operation, at: Tensor, seen: Values, row: int) -> tuple[Tensor, Tensor | None]:
        """The view that an operation writes, and the share of it that it addresses (None: all)."""
        site, d_head = op.site, self.model.anatomy.d_head
        if isinstance(site, Neuron):
            return at[site.index : site.index + 1], None
        if isinstance(site, (Head, HeadSource, AttnNeuron)):
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
            self.shares[key] = _joint(seen[Tap("attn_call", site.layer)], row, position, site.head, source)
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

    def _note(self, row: int, tap: Tap, op: Operation, before: Tensor, after: Tensor) -> None:
        """Add left minus found, as a d_model vector, to the row's changes."""
        delta = self.rec.work(after.detach().clone()) - self.rec.work(before)
        part = _raw_part(tap)
        if part:
            if tap.name in ("coef", "attn_z"):
                rows = self.model.rows(tap.layer, f"{part}_out").rows
                delta = delta @ self.rec.work(rows[_row_slice(op.site, self.model.anatomy.d_head)])
            change = self.changes[row].setdefault((tap.layer, part), Change())
            change.raw = delta if change.raw is None else change.raw + delta
        else:
            where = op.site.part if isinstance(op.site, Sublayer) else op.site.stage  # type: ignore[attr-defined]
            change = self.changes[row].setdefault((op.site.layer, where), Change())  # type: ignore[attr-defined]
            change.added = delta if change.added is None else change.added + delta

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
            parts = torch.cat([run.embed[None], run.attn, run.mlp, *self._state_changes(row)])
            if not relative(parts.sum(0), run.final, parts) <= most:
                done = ", ".join(dict.fromkeys(repr(op.origin) for op in self.rows[row])) or "the control row"
                raise InterventionError(
                    f"after {done} the stream of {self.model.name} is not the sum of its addends, so what was done "
                    "cannot be measured. Does a hook on the model change it as well?"
                )

    def _state_changes(self, row: int) -> list[Tensor]:
        """What operations did to states; one at the middle is carried by attn_out already, one at
        the first by the embedding."""
        kept = [c.added for k, c in self.changes[row].items() if k[1] in ("pre", "post") and k != (0, "pre")]
        return [added[None] for added in kept if added is not None]


def tap_of(site: Site, *, steer: bool) -> Tap:
    """Where in the forward an operation on a site is carried out."""
    layer: int = site.layer  # type: ignore[attr-defined]
    if isinstance(site, Neuron):
        return Tap("mlp_raw" if steer else "coef", layer)
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
    return {"coef": "mlp", "mlp_raw": "mlp", "attn_z": "attn", "attn_raw": "attn"}.get(tap.name)


def _row_slice(site: Site, d_head: int) -> slice:
    if isinstance(site, Neuron):
        return slice(site.index, site.index + 1)
    assert isinstance(site, (Head, HeadSource, AttnNeuron))
    low = site.head * d_head + (site.index if isinstance(site, AttnNeuron) else 0)
    return slice(low, low + (1 if isinstance(site, AttnNeuron) else d_head))


def _fineness(op: Operation) -> tuple[bool, bool, bool, int]:
    """States after sublayers, Steer after the rest, shares of one source before whole heads, finer first."""
    coarse = {AttnNeuron: 0, HeadSource: 1, Head: 2, Neuron: 0, Sublayer: 3, Resid: 4}[type(op.site)]
    whole = getattr(op.site, "source", None) is None
    return (isinstance(op.site, Resid), op.steer is not None, whole, coarse)

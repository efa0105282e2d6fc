"""The engine: rows of operations -> one traced forward with indexed writes and a control row.

The last row of every batch is left alone and must equal the recording; the others carry a list of operations
each. Each write says what it found and what it left, in this run, and what was left must be what the model
went on with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import InterventionError
from resid_surgery.models.envoys import Values
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.closing import relative
from resid_surgery.stream.recording import Recording, closure_tolerance
from resid_surgery.stream.vocabulary import Readout
from resid_surgery.surgery.batches import Rows
from resid_surgery.surgery.cutting import Cutting
from resid_surgery.surgery.noting import Change
from resid_surgery.surgery.places import RowOps, raw_part
from resid_surgery.surgery.writing import Writing, settle

TOKENS_A_CHUNK = 512
LOGIT_BYTES = 32 << 20  # a batch's logits; they are held a few times over


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One row of a batch at one position, in the working dtype.

    Attributes:
        position: which. embed: (d_model,). attn, mlp: (layer, d_model) what each sublayer added in this run;
            zeros where a layer has no such writer.
        raw: (layer, part) -> (d_model,) output before a post-norm, for operated sublayers.
        final: (d_model,) the stream after the last block. bs, logits: (vocabulary,).
        changes: (layer, "attn" | "mlp" | "pre" | "mid" | "post") -> what operations did there.
        unread: what the unembedding read more than `final`, where edges lead to it. frozen: with its scale.
    """

    position: int
    embed: Float[Tensor, " d_model"]
    attn: Float[Tensor, "layer d_model"]
    mlp: Float[Tensor, "layer d_model"]
    raw: dict[tuple[int, str], Tensor]
    final: Float[Tensor, " d_model"]
    bs: Float[Tensor, " vocabulary"]
    logits: Float[Tensor, " vocabulary"]
    changes: dict[tuple[int, str], Change] = field(default_factory=dict)
    unread: Float[Tensor, " d_model"] | None = None
    frozen: bool = False


def run_rows(
    rec: Recording, rows: Sequence[RowOps], positions: Sequence[int] | None = None
) -> Iterator[list[tuple[Run, Run]]]:
    """(control, operated) runs of each list of operations, one at each position, a bounded chunk at a time.

    Raises:
        InterventionError: the control row differs from the recording, or an operation did not fire.
    """
    at = [rec.prompt.position] if positions is None else list(positions)
    by_vocabulary = LOGIT_BYTES // (rec.model.vocab_size * rec.bs_values.element_size() * len(at))
    step = max(1, min(TOKENS_A_CHUNK // rec.n_positions, by_vocabulary) - 1)
    for low in range(0, len(rows), step):
        runs = _Batch(rec, rows[low : low + step], at).run()
        check_control(rec, runs[-1])
        for row in runs[:-1]:
            yield list(zip(runs[-1], row, strict=True))


def check_control(rec: Recording, control: Sequence[Run]) -> None:
    """Refuse a batch whose control row is not the recording."""
    for run in control:
        if run.position == rec.prompt.position:
            error = relative(run.bs, rec.work(rec.bs_values))
            if not error <= 10 * closure_tolerance(rec.model):
                raise InterventionError(control_message(rec, error))


def control_message(rec: Recording, error: float) -> str:
    """What an unequal control row means."""
    return (
        f"the control row of {rec.model.name} differs from the recording by {error:.2g} of its largest logit: "
        "rows of a batch are not independent in this model, so no effect can be measured."
    )


@final
class _Batch:
    """One traced forward of whole prompts: operated rows, their auxiliary rows, and a control row."""

    def __init__(self, rec: Recording, rows: Sequence[RowOps], at: Sequence[int]) -> None:
        self.rec, self.model, self.rows, self.at = rec, rec.model, [*rows], list(at)
        self.writing = Writing(rec.model, Rows(0, rec.n_positions), self.at)
        self.cutting = Cutting.of(self.writing, self.rows)
        self.control = self.cutting.rows

    def run(self) -> list[list[Run]]:
        """Run the forward and sort what it read: rows, the control row last, each at every position."""
        model, writing, n_layers = self.model, self.writing, self.model.anatomy.n_layers
        reads = [Tap("block_in", 0), Tap("block_out", n_layers - 1), Tap("bs"), Tap("logits"), *writing.everywhere]
        for layer in range(n_layers):
            row = model.block(layer)
            reads += [Tap("attn_add", layer)] * (row.attn_kind != "none")
            reads += [Tap("mlp_add", layer)] * (row.mlp_kind != "none")
        operated = touched(writing, self.cutting)
        reads += [Tap(f"{part}_raw", layer) for layer, part in operated]  # type: ignore[arg-type]
        ids = torch.tensor([self.rec.prompt.ids], device=device_of(model)).repeat(self.control + 1, 1)
        values = forward(model, ids, reads, writing.writes(), at=self.at, everywhere=writing.everywhere, notes=writing)
        settle(writing, values)
        self.cutting.settle(values)
        rows = [*range(len(self.rows)), self.control]
        runs = [[self._run_of(row, i, values, operated) for i in range(len(self.at))] for row in rows]
        check_fired(writing, self.cutting, values, self.at)
        for index, group in enumerate(runs):
            for one in group:
                self._check_sum(index, one)
        return runs

    def _run_of(self, row: int, i: int, values: Values, operated: Sequence[tuple[int, str]]) -> Run:
        work, n_layers, position = self.rec.work, self.model.anatomy.n_layers, self.at[i]

        def at(name: str, layer: int = -1) -> Tensor:
            tap = Tap(name, layer)  # type: ignore[arg-type]
            return work(values[tap][row, position if tap in self.writing.everywhere else i])

        def added(part: str, layer: int) -> Tensor:
            kind = getattr(self.model.block(layer), f"{part}_kind")
            if kind == "none":
                return torch.zeros_like(at("block_in", 0))
            return at(f"{part}_add", layer) * self.model.factor(layer, f"{part}_scale")

        scale, key = self.model.anatomy.layout.logit_scale, (row, position)
        run = Run(
            position=position,
            embed=at("block_in", 0),
            attn=torch.stack([added("attn", i) for i in range(n_layers)]),
            mlp=torch.stack([added("mlp", i) for i in range(n_layers)]),
            raw={(layer, part): at(f"{part}_raw", layer) for layer, part in operated},
            final=at("block_out", n_layers - 1),
            bs=at("bs") if scale == 1.0 else at("bs") * scale,
            logits=at("logits"),
            changes=self.writing.changes.get(key, {}),
            unread=self.cutting.unread.get(key),
            frozen=self.cutting.frozen.get(key, False),
        )
        return run if run.unread is None else reread(self.rec, run)

    def _check_sum(self, row: int, run: Run) -> None:
        """The final stream must be the sum of the addends and of what was done to states."""
        reach, most = self.rec.reach, 10 * closure_tolerance(self.model)
        added = [run.attn[i] * reach(i, "attn") for i in range(len(run.attn))]
        added += [run.mlp[i] * reach(i, "mlp") for i in range(len(run.mlp))]
        parts = torch.stack([run.embed * reach(0, "pre"), *added, *_state_changes(self.rec, run)])
        if not relative(parts.sum(0), run.final, parts) <= most:
            ops = self.rows[row] if row < len(self.rows) else ()
            done = ", ".join(dict.fromkeys(op.origin.brief for op in ops)) or "the control row"
            raise InterventionError(
                f"after {done} the stream of {self.model.name} is not the sum of its addends, so what was done "
                "cannot be measured. Does a hook on the model change it as well?"
            )


def reread(rec: Recording, run: Run) -> Run:
    """A run whose unembedding read N(r + e) instead of N(r)."""
    readout, e = Readout.of(rec), run.unread
    assert e is not None
    norm, s = readout.norm, readout.norm.scale(run.final)
    after = s if run.frozen else norm.scale(run.final + e)
    moved = norm.linear(run.final + e, after) - norm.linear(run.final, s)
    bs = run.bs + readout.product(moved[None])[0]
    return replace(run, bs=bs, logits=readout.cap(bs))


def direct_of(
    rec: Recording, layer: int, where: str, added: Tensor | None, raw: Tensor | None, left: Tensor | None
) -> Float[Tensor, "*n d_model"]:
    """What operations at one place give the final stream directly: through the post-norm frozen at what they
    found, and what later blocks multiply the stream by.

    Args:
        rec: the recording. layer, where: "attn", "mlp", "pre", "mid" or "post".
        added, raw: (*n, d_model) what they changed after and before a post-norm (see `Change`).
        left: (*n, d_model) the sublayer's output with them, before a post-norm; goes with `raw`.
    """
    total: Tensor = torch.zeros((), dtype=rec.model.work_dtype, device=rec.model.device)
    if added is not None:
        total = total + added
    if raw is not None:
        assert left is not None
        total = total + PostMap.of(rec.model, layer, where, left - raw).push(raw)
    return total * rec.reach(layer, {"post": "mlp"}.get(where, where))


def device_of(model: OpenedModel) -> Any:
    """Where token ids have to lie."""
    return model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]


def touched(writing: Writing, cutting: Cutting) -> list[tuple[int, str]]:
    """(layer, part) of the sublayers whose output is operated on before a post-norm, in order."""
    found = {(tap.layer, part) for tap in writing.placed if (part := raw_part(tap))}
    return sorted(found | {(reader.layer, reader.part) for reader in cutting.readers if reader.layer >= 0})


def check_fired(writing: Writing, cutting: Cutting, values: Values, at: Sequence[int] | None) -> None:
    """An operated projection must have written what follows from the input left to it.

    Args:
        writing, cutting: what was done. values: what was read; `at` is which positions of outputs, None for all.

    Raises:
        InterventionError: an operation did not take effect.
    """
    model = writing.model
    most = 10 * closure_tolerance(model)
    after = {Tap(f"{part}_raw", layer) for layer, part in touched(writing, cutting)}  # type: ignore[arg-type]
    for tap, placed in writing.placed.items():
        if tap.name == "attn_call":
            continue
        if tap not in writing.left:
            raise InterventionError(_did_not_fire(placed[0][1]))
        part = raw_part(tap)
        raw = Tap(f"{part}_raw", tap.layer)  # type: ignore[arg-type]
        if tap.name not in ("coef", "attn_z") or raw not in after or raw in writing.placed or raw in writing.extra:
            continue
        whole = at is None or raw in writing.everywhere
        last = {(row, op.position): op for row, op in placed if whole or op.position in (at or ())}
        if not last:
            continue
        rows, positions = (torch.tensor(one) for one in zip(*last, strict=True))
        b, s = writing.grid.places(rows, positions)
        written = model.rows(tap.layer, f"{part}_out")
        w, left = model.work(written.rows), model.work(writing.left[tap][b, s])
        made = left @ w if written.bias is None else left @ w + model.work(written.bias)
        if not whole:
            s = torch.tensor([list(at or ()).index(p) for p in positions.tolist()])
        found = model.work(values[raw][b, s])
        size = torch.maximum((left.abs() * w.abs().amax(1)).amax(1), found.abs().amax(1)).clamp_min(1e-30)
        error = torch.nan_to_num((made - found).abs().amax(1) / size, nan=torch.inf)
        if not bool((error <= most).all()):
            raise InterventionError(_did_not_fire(list(last.values())[int(error.argmax())]))


def _did_not_fire(op: Any) -> str:
    return f"{op.origin.brief} did not take effect at {op.site}, position {op.position}."


def _state_changes(rec: Recording, run: Run) -> list[Tensor]:
    """What operations did to states; one at the middle is carried by attn_out already, one at the first by
    the embedding."""
    return [
        change.added * rec.reach(layer, "mlp" if stage == "post" else "pre")
        for (layer, stage), change in run.changes.items()
        if stage in ("pre", "post") and (layer, stage) != (0, "pre") and change.added is not None
    ]

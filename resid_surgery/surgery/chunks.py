"""Chunks: some rows of a sweep in one forward, proven by a control row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.errors import ClosureError, InterventionError, UnsupportedModelError
from resid_surgery.models.envoys import Values
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.sites import Neuron
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.closing import relative
from resid_surgery.stream.recording import Recording, closure_tolerance
from resid_surgery.surgery.batches import Batch, Packed
from resid_surgery.surgery.cutting import Cutting
from resid_surgery.surgery.engine import check_fired, direct_of, touched
from resid_surgery.surgery.frames import Frames, resumable
from resid_surgery.surgery.places import RowOps
from resid_surgery.surgery.writing import Writing, settle


@final
@dataclass(eq=False, slots=True)
class Row:
    """One row of a sweep.

    Attributes:
        at: its number. ops: resolved. first, start: first position and first layer that it touches.
        size: rows of a batch that it takes, those of its edges' readers included.
    """

    at: int
    ops: RowOps
    first: int
    start: int
    size: int


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a chunk's rows came to: final streams as the unembedding reads them, and direct effects.

    Attributes:
        h: (row, d_model) N(r), bias included. direct: (row,) logits of the target.
    """

    h: Float[Tensor, "row d_model"]
    direct: Float[Tensor, " row"]


class NotExactError(Exception):
    """A chunk's control row is not the recording."""

    def __init__(self, size: float) -> None:
        super().__init__(size)
        self.size = size


def run_chunk(frames: Frames, group: Sequence[Row]) -> Outcome:
    """One forward of some rows; their final streams and direct effects.

    Raises:
        InterventionError: an operation did not fire.
    """
    rec, model, t = frames.rec, frames.model, frames.t
    grid = frames.batch([row.first for row in group])
    start = min(row.start for row in group) if resumable(model) else 0
    writing = Writing(model, grid, [t])
    if _past(rec, frames, group, start):
        return _run_past(frames, group, start)
    cutting = Cutting.of(writing, [row.ops for row in group])
    control = cutting.rows + _add_controls(grid)
    last = Tap("block_out", model.anatomy.n_layers - 1)
    sums = _sums(writing)
    operated = touched(writing, cutting)
    raws = [Tap(f"{part}_raw", layer) for layer, part in operated]  # type: ignore[arg-type]
    reads = [last, Tap("bs"), *raws, *writing.everywhere, *(tap for taps in sums.values() for tap in taps)]
    values = _forward(frames, grid, control, reads, writing, start)
    settle(writing, values)
    _settle(frames, cutting, values)
    final = _finals(frames, grid, values, control, cutting.rows)
    check_fired(writing, cutting, values, None)
    _check_sums(writing, sums, values)
    mains = final[: len(group)]
    return Outcome(_read(rec, cutting, mains, t), _direct(rec, writing, cutting, values, group))


def _forward(
    frames: Frames,
    grid: Batch,
    control: int,
    reads: list[Tap],
    writing: Writing | None,
    start: int,
    stream: Tensor | None = None,
) -> Values:
    """One forward from layer `start` on, with the logits of the control row."""
    try:
        ids, extra = frames.feed(grid, control + 1, start, stream)
        writes, last = {} if writing is None else writing.writes(), [grid.place(control, frames.t)[1]]
        return forward(frames.model, ids, reads, writes, logits_at=last, notes=writing, **extra)
    except UnsupportedModelError as error:
        if frames.kind == "packed":
            raise NotExactError(float("inf")) from error
        raise


def _settle(frames: Frames, cutting: Cutting, values: Values) -> None:
    """Settle edges into the unembedding; where a cache does not give what they need, whole prompts run instead."""
    try:
        cutting.settle(values)
    except ClosureError as error:
        if frames.kind == "packed":
            raise NotExactError(float("inf")) from error
        raise


def _add_controls(grid: Batch) -> int:
    """Rows that are left alone, last in the sequence: one from the predicting position on, which hangs on the cached
    prefix as far away as any row does, and before it, where rows begin earlier, one of their longest span, which hangs
    on its own tokens. A window, a bias by distance or a mask of the model's own that packing does not fit shows in
    one of the two. Returns how many stand before the last."""
    if not isinstance(grid, Packed):
        return 0
    low = min(grid.firsts)
    if low < grid.last:
        grid.add(low)
    grid.add(grid.last)
    return int(low < grid.last)


def _finals(frames: Frames, grid: Batch, values: Values, control: int, first: int) -> Tensor:
    """Final streams of all rows; those from `first` to `control` must be the recording's."""
    model, t = frames.model, frames.t
    b, s = grid.places(torch.arange(control + 1), torch.full((control + 1,), t))
    final = model.work(values[Tap("block_out", model.anatomy.n_layers - 1)][b, s])
    bs = model.work(values[Tap("bs")][-1, 0]) * model.anatomy.layout.logit_scale
    for one in final[first:]:
        _check_control(frames.rec, one, bs)
    if not bool(torch.isfinite(final).all()):
        raise InterventionError(
            f"an intervention of these rows makes the stream of {model.name} overflow (inf or NaN)."
        )
    return final


def _past(rec: Recording, frames: Frames, group: Sequence[Row], layer: int) -> bool:
    """Whether all rows change neurons of one layer at the predicting position only, so that what the layer leaves
    follows from the recording and the forward can begin after it."""
    last, found = rec.model.anatomy.n_layers - 1, rec.layers[layer]
    plain = frames.kind == "packed" and resumable(rec.model) and layer < last and len(found.groups) == 1
    return plain and found.groups[0].expert is None and all(
        isinstance(op.site, Neuron) and op.site.layer == layer and op.position == frames.t and op.steer is None
        for row in group for op in row.ops
    )  # fmt: skip


def _run_past(frames: Frames, group: Sequence[Row], layer: int) -> Outcome:
    """`run_chunk` from the layer after the touched neurons: with coefficients c' instead of c the layer leaves
    post-norm(raw + sum (c' - c) w_out) instead of post-norm(raw), raw being the down-projection's output."""
    rec, model, grid = frames.rec, frames.model, frames.batch([frames.t] * (len(group) + 1))
    record, written = rec.layers[layer], model.rows(layer, "mlp_out").rows
    rows, neurons, moved = _moved(rec, group, layer)
    raw = rec.work(record.mlp_raw)
    change = torch.zeros(len(group) + 1, len(raw), dtype=raw.dtype, device=raw.device)
    change.index_add_(0, rows, moved[:, None] * rec.work(written[neurons]))
    post = PostMap.of(model, layer, "mlp", raw)
    if post.norm is None:
        added = post.push(change)
    else:
        after = PostMap.of(model, layer, "mlp", raw + change)
        added = after.push(raw + change) - post.push(raw)
    stream = rec.layers[layer + 1].resid_pre
    stream = (rec.work(stream) + added).to(stream.dtype)
    reads = [Tap("block_out", model.anatomy.n_layers - 1), Tap("bs")]
    values = _forward(frames, grid, len(group), reads, None, layer + 1, stream)
    final = _finals(frames, grid, values, len(group), len(group))[:-1]
    vectors = direct_of(rec, layer, "mlp", None, change[:-1], raw + change[:-1])
    return Outcome(model.norm(None, "final_norm")(final), _on_target(rec, vectors))


def _moved(rec: Recording, group: Sequence[Row], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, neuron, change of its coefficient) of every operation, several on one neuron combined."""
    coefficient = rec.work(rec.layers[layer].groups[0].coefficient)
    factors: dict[tuple[int, int], float] = {}
    values: dict[tuple[int, int], Tensor] = {}
    for i, row in enumerate(group):
        for op in row.ops:
            assert isinstance(op.site, Neuron)
            key = (i, op.site.index)
            factors[key] = factors.get(key, 1.0) * op.factor
            if op.value is not None:
                values[key] = op.value
    rows, neurons = (torch.tensor([key[i] for key in factors], dtype=torch.long) for i in (0, 1))
    found = coefficient[neurons]
    left = found * torch.tensor(list(factors.values()), dtype=torch.float64).to(found)
    for n, key in enumerate(factors):
        if key in values:
            left[n] = values[key].to(left).reshape(())
    rows, neurons = rows.to(found.device), neurons.to(found.device)
    return rows, neurons, left - found


def _check_control(rec: Recording, final: Tensor, bs: Tensor) -> None:
    most = 10 * closure_tolerance(rec.model)
    errors = (relative(final, rec.work(rec.resid_final)), relative(bs, rec.work(rec.bs_values)))
    if not max(errors) <= most:
        raise NotExactError(max(errors))


def _sums(writing: Writing) -> dict[int, list[Tap]]:
    """Layer -> what shows that operations on its sublayers and states took effect."""
    found: dict[int, list[Tap]] = {}
    for tap in writing.placed:
        if tap.name in ("block_in", "attn_add", "mlp_add", "attn_raw", "mlp_raw"):
            row = writing.model.block(tap.layer)
            names = ["block_in", "block_out", *(f"{part}_add" for part in ("attn", "mlp")
                                                if getattr(row, f"{part}_kind") != "none")]  # fmt: skip
            found[tap.layer] = [Tap(name, tap.layer) for name in names]  # type: ignore[arg-type]
    return found


def _check_sums(writing: Writing, sums: dict[int, list[Tap]], values: Values) -> None:
    """What operated blocks left must be the sum of what they found and added."""
    model = writing.model
    for layer, taps in sums.items():
        held: dict[str, Tensor] = {tap.name: model.work(values[tap]) for tap in taps}
        row, out, nothing = model.block(layer), held["block_out"], torch.zeros_like(held["block_in"])
        attn, mlp = (held[f"{part}_add"] * model.factor(layer, f"{part}_scale") if f"{part}_add" in held else nothing
                     for part in ("attn", "mlp"))  # fmt: skip
        if row.parallel:
            made = held["block_in"] * model.factor(layer, "mlp_carry") + attn + mlp
        else:
            made = (held["block_in"] * model.factor(layer, "attn_carry") + attn) * model.factor(
                layer, "mlp_carry"
            ) + mlp
        posts = {row for row, _ in writing.placed.get(Tap("block_out", layer), [])}
        size = torch.stack([made, attn, mlp]).abs().amax((0, -1)).clamp_min(1e-30)
        error = (made - out).abs().amax(-1) / size
        for tap in taps:
            for r, op in writing.placed.get(tap, []):
                at = writing.grid.place(r, op.position)
                if r not in posts and not float(error[at]) <= 10 * closure_tolerance(model):
                    raise InterventionError(
                        f"{op.origin.brief} did not take effect at {op.site}, position {op.position}."
                    )


def _read(rec: Recording, cutting: Cutting, final: Tensor, t: int) -> Tensor:
    """N(r) of every row; of r + e where edges lead to the unembedding."""
    norm = rec.model.norm(None, "final_norm")
    h = norm(final)
    for (row, position), e in cutting.unread.items():
        if position == t:
            r = final[row]
            s = norm.scale(r) if cutting.frozen[row, position] else norm.scale(r + e)
            h[row] = norm.linear(r + e, s) + norm.bias
    return h


def _direct(rec: Recording, writing: Writing, cutting: Cutting, values: Values, group: Sequence[Row]) -> Tensor:
    """Direct effects on the target's logit, as `effects` defines them."""
    vectors = torch.zeros(len(group), rec.model.anatomy.d_model, dtype=rec.model.work_dtype, device=rec.model.device)
    t, work = rec.prompt.position, rec.work
    raws: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
    for i in range(len(group)):
        for place, change in writing.changes.get((i, t), {}).items():
            if change.added is not None:
                vectors[i] += direct_of(rec, *place, change.added, None, None)
            if change.raw is not None:
                raws.setdefault(place, []).append((i, change.raw))
    for (layer, part), found in raws.items():
        rows = torch.tensor([i for i, _ in found])
        left = work(values[Tap(f"{part}_raw", layer)][writing.grid.places(rows, torch.full_like(rows, t))])  # type: ignore[arg-type]
        vectors[rows] += direct_of(rec, layer, part, None, torch.stack([raw for _, raw in found]), left)
    for (row, position), e in cutting.unread.items():
        if position == t:
            vectors[row] += e
    return _on_target(rec, vectors)


def _on_target(rec: Recording, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """Their bs-values of the target, under the clean frozen norm."""
    norm = rec.model.norm(None, "final_norm")
    w = rec.model.unembedding[rec.prompt.target].to(vectors)
    return (vectors @ norm.pull(w[None], norm.scale(rec.work(rec.resid_final))).T)[:, 0]

"""Sweeping: thousands of interventions on one prompt, one row each, as few and as small forwards as are exact.

1. Everything is resolved and checked before any forward runs.
2. Rows are sorted by their first touched position and layer and cut into chunks of about as many tokens as the
   machine multiplies well.
3. A chunk is one trace: it begins at its first touched layer from the recorded stream, packs its rows as tokens
   of one sequence behind the shared prefix (see `frames`), and carries out all operations as indexed writes.
4. Its last row is left alone. If that is not the recording, packing is not exact here: the chunk, and all later
   ones, run as whole prompts; if even that differs, it is an error.
5. Final streams are measured: bs-values by a few dot products, log-probabilities by one product with the
   vocabulary a chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.addresses import Edge
from resid_surgery.errors import ArgumentError, InterventionError, UnsupportedModelError
from resid_surgery.models.prompts import token_text
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import Values, forward
from resid_surgery.sites import Constant, Site
from resid_surgery.stream.closing import relative
from resid_surgery.stream.recording import Recording, be_recording, closure_tolerance
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.cutting import Cutting
from resid_surgery.surgery.engine import check_fired, control_message, direct_of, touched
from resid_surgery.surgery.frames import Frames, resumable
from resid_surgery.surgery.interventions import Intervention, as_interventions
from resid_surgery.surgery.measures import MEASURES, Meter
from resid_surgery.surgery.places import RowOps
from resid_surgery.surgery.reading import fetch
from resid_surgery.surgery.resolving import Resolver, Scene
from resid_surgery.surgery.writing import Writing

FRAMES = ("auto", "packed", "full")
TOKENS = {"cpu": 256}  # of a chunk: enough for large products, few enough for the caches and the mask
TOKENS_ELSEWHERE = 2048
CHUNK_BYTES = 96 << 20
COORDINATES = ("operation", "site", "kind", "layer", "head", "index", "source", "expert", "position")


@final
@dataclass(eq=False, slots=True)
class Row:
    """One row of a sweep.

    Attributes:
        at: its number. ops: resolved. first, start: first position and first layer that it touches.
    """

    at: int
    ops: RowOps
    first: int
    start: int

    @property
    def size(self) -> int:
        """Rows of a batch that it takes: its own, and one for each reader of its edges."""
        readers = {(op.edge.reader, op.edge.side, op.edge.norm) for op in self.ops if op.source is not None}
        return 1 + sum(not isinstance(reader, Constant) for reader, _, _ in readers)


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a chunk's rows came to: final streams as the unembedding reads them, and direct effects.

    Attributes:
        h: (row, d_model) N(r), bias included. direct: (row,) logits of the target.
    """

    h: Float[Tensor, "row d_model"]
    direct: Float[Tensor, " row"]


def sweep(
    rec: Recording,
    interventions: Any,
    *,
    measure: str = "log_prob",
    where: Callable[[dict[str, Any]], bool] | None = None,
    chunk: int | None = None,
    frame: str = "auto",
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run thousands of interventions, one row each, and measure what each does to the prediction.

    Args:
        rec: a recording. interventions: one entry a row: an intervention, a list of them (all at once), or a
            pair (coordinates, interventions) whose coordinates, a mapping, become columns. A mapping from labels
            to interventions does as well. `grid` and `patching` make the usual ones.
        measure: "bs" (logits before a soft-cap; no product with the vocabulary), "log_prob" (and probability
            and KL), or "all" (and rank, entropy and the most probable token).
        where: an early filter: called with a row's coordinates, False leaves the row out.
        chunk: rows a forward; None chooses.
        frame: "auto", or "packed" or "full" to insist (see `frames`).
        progress: a bar on stderr; None shows it on a terminal for long sweeps.

    Returns:
        One row per entry, in order. Columns: the coordinates (named ones first; else operation, site, kind, layer,
        head, index, source, expert, position, as far as rows have them); bs_target, bs_versus_i (logits
        after), bs_change_*; direct (logits of the target, under the clean frozen norm; rs.intervene has the whole
        split); log_prob (nats), log_prob_change, prob, kl (KL(clean || row), nats); rank, top, entropy (nats);
        frame. ``.attrs["clean"]`` has the clean run's values.

    Raises:
        InterventionError: contradictory or empty rows; an operation did not fire; a control row differs.
        SiteError, PromptError, ArgumentError: all before any forward runs. StaleRecordingError: changed weights.

    Source: activation patching: Vig et al. 2020, Meng et al. 2022; log-prob change of zeroed neurons: Yu & Ananiadou,
        arXiv 2312.12141, section 5.
    """
    be_recording(rec)
    _check.choice("measure", measure, MEASURES)
    _check.choice("frame", frame, FRAMES)
    if chunk is not None:
        _check.whole("chunk", chunk, 1)
    resolver = Resolver(Scene.of(rec))
    coordinates: list[dict[str, Any]] = []
    rows: list[Row] = []
    for named, ops in entries(interventions):
        given = as_interventions(ops)
        resolved = resolver.resolve(given)
        row = named if named is not None else coordinates_of(given, resolved)
        if where is None or where(row):
            rows.append(_row(len(rows), resolved, rec))
            coordinates.append(row)
    if not rows:
        raise InterventionError("`interventions` must hold at least one row; got none (or `where` left none).")
    rec.require_fresh()
    fetch(rec.model, resolver.wants)
    meter = Meter(rec, measure)
    frames = Frames(rec, "packed" if frame == "packed" or (frame == "auto" and _packable(rec)) else "full")
    table = _table(rec, meter, coordinates, _measured(rec, rows, meter, frames, chunk, frame, progress), len(rows))
    table.attrs["clean"], table.attrs["tokens"] = meter.clean(), {n: rec.prompt.names[i] for n, i in zip(
        meter.names, meter.tokens, strict=True)}  # fmt: skip
    return table


Measured = Iterator[tuple[list[int], dict[str, Tensor], str]]


def _measured(
    rec: Recording, rows: list[Row], meter: Meter, frames: Frames, chunk: int | None, frame: str, shown: bool | None
) -> Measured:
    """(row numbers, columns, frame) of each chunk."""
    bar = shown if shown is not None else len(rows) > 256
    with progress_bar("sweep", len(rows), shown=bar) as step:
        waiting = sorted(rows, key=lambda row: (row.first, row.start))
        while waiting:
            group = _chunk(rec, waiting, frames, chunk)
            try:
                outcome = run_chunk(frames, group)
            except _NotExactError as error:
                if frames.kind == "full" or frame == "packed":
                    raise InterventionError(control_message(rec, error.size)) from error.__cause__
                frames.kind = "full"
                continue
            columns = meter.read(outcome.h) | {"direct": outcome.direct}
            yield [row.at for row in group], columns, frames.kind
            del waiting[: len(group)]
            step(done=len(group))


def _chunk(rec: Recording, waiting: Sequence[Row], frames: Frames, chunk: int | None) -> list[Row]:
    """As many of the first waiting rows as fit one forward."""
    head = waiting[0]
    span = frames.grid(head.first).span
    most = chunk if chunk is not None else max(1, token_budget(rec) // span - 1)
    group: list[Row] = []
    size = 0
    for row in waiting:
        if group and (size + row.size > most or (frames.kind == "packed" and row.first != head.first)):
            break
        group.append(row)
        size += row.size
    return group


def token_budget(rec: Recording) -> int:
    """How many tokens a chunk has: as many as keep products large and memory small."""
    a, model = rec.model.anatomy, rec.model
    wide = max(max(size.d_mlp, size.d_expert) for size in a.sizes) * 4 + a.d_model * 8 + a.n_heads * rec.n_positions
    by_memory = CHUNK_BYTES // (wide * max(4, rec.logits.element_size()))
    return int(max(16, min(TOKENS.get(model.device.type, TOKENS_ELSEWHERE), by_memory)))


class _NotExactError(Exception):
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
    grid = frames.grid(group[0].first)
    start = min(row.start for row in group) if resumable(model) else 0
    writing = Writing(model, grid, [t])
    cutting = Cutting.of(writing, [row.ops for row in group])
    control = cutting.rows
    last = Tap("block_out", model.anatomy.n_layers - 1)
    sums = _sums(writing)
    operated = touched(writing, cutting)
    raws = [Tap(f"{part}_raw", layer) for layer, part in operated]  # type: ignore[arg-type]
    reads = [last, Tap("bs"), *raws, *writing.everywhere, *(tap for taps in sums.values() for tap in taps)]
    ids, extra = frames.feed(grid, control + 1, start)
    ends = [grid.place(control, t)[1]]
    try:
        values = forward(model, ids, reads, writing.writes(), logits_at=ends, **extra)
    except UnsupportedModelError as error:
        if frames.kind == "packed":
            raise _NotExactError(float("inf")) from error
        raise
    writing.settle(values)
    cutting.settle(values)
    b, s = grid.places(torch.arange(control + 1), torch.full((control + 1,), t))
    final = model.work(values[last][b, s])
    bs = values[Tap("bs")][-1, 0]
    _check_control(rec, final[-1], model.work(bs) * model.anatomy.layout.logit_scale)
    check_fired(writing, cutting, values, None)
    _check_sums(writing, sums, values)
    mains = final[: len(group)]
    return Outcome(_read(rec, cutting, mains, t), _direct(rec, writing, cutting, values, group))


def _check_control(rec: Recording, final: Tensor, bs: Tensor) -> None:
    most = 10 * closure_tolerance(rec.model)
    errors = (relative(final, rec.work(rec.resid_final)), relative(bs, rec.work(rec.bs_values)))
    if not max(errors) <= most:
        raise _NotExactError(max(errors))


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
    readout = rec.model.norm(None, "final_norm")
    direction = readout.pull(
        rec.model.unembedding[rec.prompt.target].to(vectors)[None], readout.scale(rec.work(rec.resid_final))
    )
    return (vectors @ direction.T)[:, 0]


def _packable(rec: Recording) -> bool:
    """Whether packing is worth trying: no layer mixes positions in a way that a mask does not reach."""
    return not rec.model.anatomy.hybrid


def _row(at: int, ops: RowOps, rec: Recording) -> Row:
    t = rec.prompt.position
    kept = tuple(op for op in ops if op.position <= t)  # what comes later cannot reach the prediction
    return Row(at, kept, min((op.first for op in kept), default=t), min((_layer(op) for op in kept), default=0))


def _layer(op: Operation) -> int:
    """The first layer that has to run for an operation."""
    if isinstance(op.site, Edge):
        return min(_of(op.site.writer), _of(op.site.reader))
    return _of(op.site)


def _of(site: Site) -> int:
    return int(getattr(site, "layer", 10**9 if site == Constant("unembed") else 0))


def entries(given: Any) -> Iterator[tuple[dict[str, Any] | None, Any]]:
    """(named coordinates or None, interventions) of each row.

    Raises:
        InterventionError: it is no list of rows.
    """
    if isinstance(given, Mapping):
        given = [({"label": label}, ops) for label, ops in given.items()]
    if isinstance(given, (str, bytes, Intervention)) or not isinstance(given, Iterable):
        raise InterventionError(_check.message("interventions", "a list with one entry a row", given))
    for one in given:
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], Mapping):
            if not all(isinstance(name, str) for name in one[0]):
                raise ArgumentError(_check.message("coordinates", "named by strings", dict(one[0])))
            yield dict(one[0]), one[1]
        else:
            yield None, one


def coordinates_of(given: Sequence[Intervention], ops: RowOps) -> dict[str, Any]:
    """A row's coordinates, as far as it has one site or one position."""
    sites, positions = {op.site for op in ops}, {op.position for op in ops}
    kinds = dict.fromkeys(type(one).__name__ for one in given)
    found: dict[str, Any] = {"operation": "+".join(kinds)}
    if len(sites) == 1:
        site = ops[0].site
        found |= {"site": str(site), "kind": type(site).__name__}
        found |= {name: value for name in COORDINATES[3:-1] if (value := getattr(site, name, None)) is not None}
    else:
        found["site"] = f"{len(sites)} sites"
    if len(positions) == 1:
        found["position"] = ops[0].position
    return found


def _table(rec: Recording, meter: Meter, coordinates: list[dict[str, Any]], measured: Measured, n: int) -> pd.DataFrame:
    """Chunks in any order -> one table in the order of the rows."""
    columns: dict[str, Tensor] = {}
    frames: list[str] = [""] * n
    for at, found, frame in measured:
        for name, values in found.items():
            held = columns.setdefault(name, torch.zeros(n, dtype=torch.float64))
            held[at] = values.double().cpu()
        for i in at:
            frames[i] = frame
    table = pd.DataFrame(coordinates)
    order = [name for name in table.columns if name not in COORDINATES]
    table = table[[*order, *(name for name in COORDINATES if name in table.columns)]]
    for name in table.columns:
        if table[name].map(lambda v: (isinstance(v, int) and not isinstance(v, bool)) or v is None or v != v).all():
            table[name] = table[name].astype("Int64")
    for name, values in columns.items():
        if name == "top_id":
            table["top"] = [token_text(int(i), rec.model.tokenizer) for i in values.tolist()]
        else:
            table[name] = values.numpy() if name != "rank" else values.long().numpy()
    table["frame"] = frames
    return table

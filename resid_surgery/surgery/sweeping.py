"""Sweeping: thousands of interventions on one prompt, one row each, as few and as small forwards as are exact.

1. Everything is resolved and checked before any forward runs.
2. Rows are sorted by their first touched layer and cut into chunks of about as many tokens as the machine
   multiplies well.
3. A chunk is one trace: it begins at its first touched layer from the recorded stream, packs its rows as tokens
   of one sequence behind the shared prefix (see `frames`), and carries out all operations as indexed writes.
4. Its last row is left alone. If that is not the recording, packing is not exact here: the chunk, and all later
   ones, run as whole prompts; if even that differs, it is an error.
5. Rows that leave exactly what the recording has (a coefficient that is 0 anyway) are known without running.
6. Final streams are measured: bs-values by a few dot products, log-probabilities by one product with the
   vocabulary a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.addresses import Edge
from resid_surgery.errors import ArgumentError, InterventionError, ResidSurgeryError
from resid_surgery.models.prompts import token_text
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.sites import Constant, Neuron, Resid, SharedNeuron, Site, Sublayer
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.surgery.chunks import NotExactError, Row, run_chunk
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.cutting import auxiliary_rows
from resid_surgery.surgery.engine import control_message
from resid_surgery.surgery.frames import Frames
from resid_surgery.surgery.interventions import Intervention, as_interventions
from resid_surgery.surgery.measures import MEASURES, Meter
from resid_surgery.surgery.places import RowOps
from resid_surgery.surgery.reading import fetch, recorded
from resid_surgery.surgery.resolving import Resolver, Scene

FRAMES = ("auto", "packed", "full")
TOKENS = {"cpu": 257}  # of a chunk, one for control: enough for large products, few enough for the caches and the mask
TOKENS_ELSEWHERE = 2049
CHUNK_BYTES = 96 << 20
RESULTS = ("log_prob", "log_prob_change", "prob", "kl", "rank", "top", "entropy", "direct", "frame", "score")
COORDINATES = ("operation", "site", "kind", "layer", "head", "index", "source", "expert", "position", "token")


@remotely
def sweep(
    rec: Recording,
    interventions: Any,
    *,
    measure: str = "log_prob",
    where: Callable[[dict[str, Any]], bool] | None = None,
    chunk: int | None = None,
    frame: str = "auto",
    progress: bool | None = None,
    remote: Where = None,
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
        remote: where the forwards run, as for `intervene`; packed rows send the cached prefix along.

    Returns:
        One row per entry, in order. Columns: the coordinates (named ones first; else operation, site, kind, layer,
        head, index, source, expert, position, as far as rows have them); bs_target, bs_versus_i (logits
        after), bs_change_*; direct (logits of the target, under the clean frozen norm; rs.intervene has the whole
        split); log_prob (nats), log_prob_change, prob, kl (KL(clean || row), nats); rank, top, entropy (nats);
        frame ("packed", "full", or "none" for rows that leave exactly what they find and so need no forward).
        ``.attrs["clean"]`` has the clean run's values.

    Raises:
        InterventionError: contradictory or empty rows; an operation did not fire; a control row differs.
        SiteError, PromptError, ArgumentError: all before any forward runs. StaleRecordingError: changed weights.

    Source: activation patching: Vig et al. 2020, Meng et al. 2022; log-prob change of zeroed neurons: Yu & Ananiadou,
        arXiv 2312.12141, section 5.
    """
    _check.progress(progress)
    be_recording(rec)
    _check.choice("measure", measure, MEASURES)
    _check.choice("frame", frame, FRAMES)
    if chunk is not None:
        chunk = _check.whole("chunk", chunk, 1)
    if where is not None and not callable(where):
        raise ArgumentError(_check.message("where", "None or a function of a row's coordinates", where))
    resolver = Resolver(Scene.of(rec))
    coordinates: list[dict[str, Any]] = []
    rows: list[Row] = []
    for number, (named, ops) in enumerate(entries(interventions)):
        if named is not None and where is not None and not where(named):
            continue
        wanted = len(resolver.wants)
        try:
            given = as_interventions(ops)
            resolved = resolver.resolve(given)
        except ResidSurgeryError as error:
            raise type(error)(f"row {number}: {error}") from error
        row = named if named is not None else coordinates_of(given, resolved)
        if named is None and where is not None and not where(row):
            del resolver.wants[wanted:]  # its donors need not run
            continue
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
        idle = [row.at for row in rows if all(does_nothing(rec, op) for op in row.ops)]
        if idle:  # nothing to run
            found = meter.read(meter.h[None]) | {"direct": torch.zeros_like(meter.h[:1])}
            yield idle, {name: column.expand(len(idle)) for name, column in found.items()}, "none"
            step(done=len(idle))
        left = set(idle)
        waiting = sorted((row for row in rows if row.at not in left), key=lambda row: (row.start, row.first))
        while waiting:
            group = _chunk(rec, waiting, frames, chunk)
            try:
                outcome = run_chunk(frames, group)
            except NotExactError as error:
                if frames.kind == "full" or frame == "packed":
                    hint = "" if frames.kind == "full" else " Packed rows are not exact here; leave `frame` at 'auto'."
                    raise InterventionError(control_message(rec, error.size) + hint) from error.__cause__
                frames.kind = "full"
                continue
            columns = meter.read(outcome.h) | {"direct": outcome.direct}
            yield [row.at for row in group], columns, frames.kind
            del waiting[: len(group)]
            step(done=len(group))


def does_nothing(rec: Recording, op: Operation) -> bool:
    """Whether an operation leaves exactly what the recording has there, as far as that is quickly known.

    A neuron with coefficient 0 (half of a ReLU model's), a state that is the same in both prompts of a patching grid.
    """
    if op.steer is not None or op.weight is not None:
        return False
    if op.value is None and op.factor == 1:
        return True
    if op.source is not None or getattr(op.site, "source", None) is not None:
        return False
    found = _found(rec, op)
    if found is None:
        return False
    return bool((found == (0 if op.value is None else op.value)).all())


def _found(rec: Recording, op: Operation) -> Tensor | None:
    """What the recording has at an operation's place, where it keeps that."""
    site, position = op.site, op.position
    if position == rec.prompt.position:
        return recorded(rec, site) if isinstance(site, (Neuron, SharedNeuron, Sublayer, Resid)) else None
    if rec.stream is None:
        return None
    if isinstance(site, Resid) and site.stage == "pre":
        return rec.work(rec.stream.resid_pre[site.layer, position])
    if isinstance(site, Sublayer):
        return rec.work((rec.stream.attn_out if site.part == "attn" else rec.stream.mlp_out)[site.layer, position])
    return None


def _chunk(rec: Recording, waiting: Sequence[Row], frames: Frames, chunk: int | None) -> list[Row]:
    """As many of the first waiting rows as fit one forward."""
    t, budget = rec.prompt.position, token_budget(rec)
    group: list[Row] = []
    rows = tokens = control = 0
    for row in waiting:
        span = t + 1 - (row.first if frames.kind == "packed" else 0)
        rows, tokens, control = rows + row.size, tokens + row.size * span, max(control, span)
        full = tokens + control + 1 > budget + (control == 1) if chunk is None else rows > chunk
        deeper = bool(group) and row.start != group[-1].start  # its chunk can begin later
        if group and (full or (deeper and chunk is None and 2 * tokens > budget)):
            break
        group.append(row)
    return group


def token_budget(rec: Recording) -> int:
    """How many tokens a chunk has: as many as keep products large and memory small."""
    a, model = rec.model.anatomy, rec.model
    wide = max(max(size.d_mlp, size.d_expert) for size in a.sizes) * 4 + a.d_model * 8 + a.n_heads * rec.n_positions
    by_memory = CHUNK_BYTES // (wide * max(4, rec.logits.element_size()))
    return int(max(16, min(TOKENS.get(model.device.type, TOKENS_ELSEWHERE), by_memory)))


def _packable(rec: Recording) -> bool:
    """Whether packing is worth trying: no layer mixes positions in a way that a mask does not reach."""
    return not rec.model.anatomy.hybrid


def _row(at: int, ops: RowOps, rec: Recording) -> Row:
    t = rec.prompt.position
    kept = tuple(op for op in ops if op.position <= t)  # what comes later cannot reach the prediction
    first, start = (min((of(op) for op in kept), default=0) for of in (lambda op: op.first, _layer))
    return Row(at, kept, first if kept else t, start, 1 + auxiliary_rows(kept))


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
    if isinstance(given, (str, bytes, Intervention)) or not _check.iterable(given):
        raise InterventionError(_check.message("interventions", "a list with one entry a row", given))
    for one in given:
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], Mapping):
            yield _coordinates(one[0]), one[1]
        else:
            yield None, one


def _coordinates(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Named coordinates: plain values under names that no measure has."""
    taken = [name for name in given if not isinstance(name, str) or name in RESULTS or name.startswith("bs_")]
    if taken:
        raise ArgumentError(
            _check.message("coordinates", f"named by strings other than {', '.join(RESULTS)}", taken[0])
        )
    plain = {name: value if (n := _check.index_of(value)) is None else n for name, value in given.items()}
    odd = [value for value in plain.values() if not isinstance(value, (str, int, float, bool, NoneType))
           or (isinstance(value, int) and abs(value) >= 2**63)]  # fmt: skip
    if odd:
        raise ArgumentError(_check.message("coordinates", "numbers, strings or None", odd[0]))
    return plain


def coordinates_of(given: Sequence[Intervention], ops: RowOps) -> dict[str, Any]:
    """A row's coordinates, as far as it has one site or one position."""
    sites, positions = {op.site for op in ops}, {op.position for op in ops}
    kinds = dict.fromkeys(type(one).__name__ for one in given)
    found: dict[str, Any] = {"operation": "+".join(kinds)}
    if len(sites) == 1:
        site = ops[0].site
        found |= {"site": str(site), "kind": type(site).__name__}
        found |= {name: value for name in COORDINATES[3:8] if (value := getattr(site, name, None)) is not None}
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
    names = dict.fromkeys(name for row in coordinates for name in row)
    order = [name for name in names if name not in COORDINATES] + [name for name in COORDINATES if name in names]
    table = pd.DataFrame({name: _column([row.get(name) for row in coordinates]) for name in order})
    results: dict[str, Any] = {}
    for name, values in columns.items():
        if name == "top_id":
            results["top"] = [token_text(int(i), rec.model.tokenizer) for i in values.tolist()]
        else:
            results[name] = values.numpy() if name != "rank" else values.long().numpy()
    return pd.concat([table, pd.DataFrame({**results, "frame": frames})], axis=1)


def _column(values: list[Any]) -> Any:
    """A column of coordinates; whole numbers stay whole where some rows have none."""
    whole = all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values)
    return pd.array(values, dtype="Int64") if whole else values

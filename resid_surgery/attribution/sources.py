"""Query sources: what switched a neuron, an attention neuron, a head or a layer on (paper: query vectors).

A reader takes numbers from the stream r = sum_u u through its norm. With a neuron's key folded through the norm,
K = gamma * w_in (centred for LayerNorm),

    pre-activation = sum over addends u of (u . K) / s(r)  +  beta . w_in + b,

exactly, for the gate and the up key separately; scores of attention before softmax and the value sides of heads are
such sums too (see `readings`). What the reader makes of it (a coefficient, an attention weight) is not a sum: it is
recomputed *without* u through the module's own activation or softmax, with the norm's scale frozen at r, or live at
r - u. A neuron of a routed expert also hangs on the router, which reads the same N(r): its weight is kept
(``router="fixed"``) or recomputed without u as well.
"""

from dataclasses import replace
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.aims import aim_of, need_readout
from resid_surgery.attribution.asking import asks_of
from resid_surgery.attribution.growing import Followed, follow
from resid_surgery.attribution.readings import Reader, Reading, require_closed_reading
from resid_surgery.attribution.shares import Listed, Writers
from resid_surgery.stream.elsewhere import Elsewhere
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.subvalues import GRAINS

SOURCE_NORMS = ("frozen", "live")
ROUTERS = ("fixed", "recomputed")
SIDES = ("value", "query", "key", "all")
RANKS = ("share", "inner_product")
COLUMNS = (
    "hop",
    "reader",
    "reader_position",
    "key",
    "source",
    "writer",
    "kind",
    "position",
    "grain",
    "share",
    "unit",
    "inner_product",
    "reading",
    "number",
    "coefficient",
    "coefficient_without",
    "weight",
    "weight_without",
    "router",
    "norm",
    "closure",
)


def sources(
    rec: Recording,
    reader: Any,
    *,
    side: str | None = None,
    readout: str = "target",
    versus: Any = None,
    grain: str = "layer",
    top: int = 10,
    norm: str = "frozen",
    router: str = "fixed",
    by: str = "share",
    hops: int = 1,
    budget: int = 20,
) -> pd.DataFrame:
    """What switched readers on: the exact shares of everything that they read (paper: query vectors).

    share(u) = (u . K) / s, in the unit of the reading; the shares of one reading plus its constant rows sum to what
    the model computed. Readers and their readings:

    ===============================  ========================================  ==============================
    reader                           reading (``key``), unit                   handed on (``coefficient``)
    ===============================  ========================================  ==============================
    neuron ``L20.N1297``             gate and up: pre-activation               its coefficient
    attention neuron ``L3.H4.D7``    value: coefficient (sum over sources)     its coefficient
    head, ``L9.H4<2``, ``L9.attn``   value: bs-value that it writes towards    the same
                                     the readout, attention weights kept
    ``L9.H4.query``, ``.key``        score before softmax, one side read,      the attention weight of each
                                     the other kept                            source
    layer ``L9.mlp``                 up: bs-value that it writes towards the   the same
                                     readout, gates (or secants) kept
    ``unembed``                      readout: bs-value                         the same
    ===============================  ========================================  ==============================

    Args:
        rec: a recording; ``positions="all"`` where a reader reads other positions (keys and values do).
        reader: a reader or several: sites, slices or texts; ``@p`` for a neuron at another position.
        side: of heads: "value" (default), "query", "key" or "all".
        readout: of value sides, layers and unembed: "target", "difference" (target minus the mean of the
            competitors) or "log_prob" (bs_w - sum_i p_i bs_i: first order). versus: other competitors.
        grain: of the writers: "layer", "head", "head_source", "neuron" or "subvalue".
        top: how many writers are listed per reading; the rest is one remainder row.
        norm: for ``coefficient_without``: "frozen" keeps the norm's scale, "live" recomputes it.
        router: for a routed expert's neuron: "fixed" keeps its router weight, "recomputed" lets the
            router read the stream without the writer as well.
        by: which writers are listed: the largest by |share|, or by |inner_product|, the paper's query score.
        hops: 1 for direct sources; more follow the listed ones back, a head or layer for the reading that lists
            it. budget: how many sources are followed.

    Returns:
        Columns: hop; reader, reader_position; key ("gate", "up", "value", "query", "key", "readout"); source (of a
        score or value side, or NA); writer, kind, position; grain; share (signed), unit; inner_product (u . key
        without the norm: the paper's query score); reading (the number as the model computed it); number (what
        ``coefficient`` is), coefficient, coefficient_without (the same without that writer, through every key);
        weight and weight_without (what multiplies a neuron's expert; 0 where the router drops it), router,
        norm, closure (|sum - reading|). Rows of a reading: the writers by size, ``remainder (n)``, then ``constant``
        (and a position bias, where scores have one).

    Raises:
        SiteError: the reader is none, or has no such side. ArgumentError: unknown option; other positions are read
        and were not recorded. UnsupportedModelError: attention is not affine even with its norms frozen.
        ClosureError: shares do not sum to what the model computed.

    Source: Yu & Ananiadou, arXiv 2312.12141 (query neurons); Elhage et al. 2021 (query, key and value composition).
    """
    for name, value, allowed in (
        ("grain", grain, GRAINS),
        ("norm", norm, SOURCE_NORMS),
        ("router", router, ROUTERS),
        ("by", by, RANKS),
    ):
        _check.choice(name, value, allowed)
    if side is not None:
        _check.choice("side", side, SIDES)
    top, hops = _check.whole("top", top, 1), _check.whole("hops", hops, 1)
    budget = _check.whole("budget", budget, 0)
    be_recording(rec)
    competitors = need_readout(rec, readout, versus)
    asks = asks_of(rec, reader, side)
    need_recording(rec)
    views = Elsewhere(rec)
    aim = aim_of(rec, readout, competitors)
    writers = Writers(views, grain, by == "inner_product")
    rows = _Rows(writers, norm, router)
    found = follow(writers, [replace(one, aim=aim) for one in asks], top=top, hops=hops, budget=budget)
    lists = [
        (one, reading, listed) for one in found for reading, listed in zip(one.reader.readings, one.listed, strict=True)
    ]
    vectors = writers.vectors_of([listed for _, _, listed in lists], [reading.stop for _, reading, _ in lists])
    for (one, reading, listed), some in zip(lists, vectors, strict=True):
        rows.add(one, reading, listed, some)
    return rows.table()


@final
class _Rows:
    """Rows of the table, a reading at a time."""

    def __init__(self, writers: Writers, norm: str, router: str) -> None:
        self.writers, self.norm, self.router = writers, norm, router
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, one: Followed, reading: Reading, listed: Listed, vectors: Tensor) -> None:
        """The rows of one reading."""
        writers, n, left = self.writers, len(listed.shares), listed.count - len(listed.shares)
        pairs = list(zip(listed.segments.tolist(), listed.members.tolist(), strict=True))
        positions = [writers.position(*pair) for pair in pairs]
        at = torch.tensor(positions)
        kept = {p: vectors[torch.nonzero(at == p)[:, 0]].sum(0) for p in reading.directions}
        constants = reading.constants
        total = listed.total + sum(constants.values())
        name = f"{one.reader.site}.{reading.key}"
        require_closed_reading(self.writers.rec, name, total, reading.measured, listed.size)
        shares = [*listed.shares.tolist(), *([listed.total - float(listed.shares.double().sum())] if left else [])]
        names = [str(writers.site(*pair)) for pair in pairs] + [f"remainder ({left})"] * bool(left)
        kinds = [writers.kind(segment) for segment, _ in pairs] + ["remainder"] * bool(left)
        where = [*positions, *([positions_of(reading)] if left else [])]
        inner = (vectors * torch.stack([reading.plain[p] for p in positions])).sum(1).tolist()
        without, weights = self._without(one.reader, reading, positions, vectors, kept, bool(left))
        rows = n + bool(left) + len(constants)
        filled: dict[str, list[Any]] = {
            "writer": [*names, *constants],
            "kind": [*kinds, *["constant"] * len(constants)],
            "position": [*where, *[positions_of(reading)] * len(constants)],
            "share": [*shares, *constants.values()],
            "inner_product": [*inner, *[float("nan")] * (rows - n)],
            "coefficient_without": [*without, *[float("nan")] * len(constants)],
            "weight_without": [*weights, *[float("nan")] * len(constants)],
        }
        same = {
            "hop": one.hop,
            "reader": str(one.reader.site),
            "reader_position": one.position,
            "key": reading.key,
            "source": reading.source,
            "grain": writers.grain,
            "unit": reading.unit,
            "reading": reading.measured,
            "number": one.reader.what,
            "coefficient": one.reader.number,
            "weight": one.reader.weights(torch.zeros_like(vectors[:1]), self.norm, "fixed")[0],
            "router": self.router,
            "norm": self.norm,
            "closure": abs(total - reading.measured),
        }
        for column, values in self.columns.items():
            values += filled[column] if column in filled else [same[column]] * rows

    def _without(
        self,
        reader: Reader,
        reading: Reading,
        positions: list[int],
        vectors: Tensor,
        kept: dict[int, Tensor],
        left: bool,
    ) -> tuple[list[float], list[float]]:
        """(number, weight of the expert) without each listed writer, and without all the others."""
        at = torch.tensor(positions)
        found = torch.zeros(len(positions), dtype=vectors.dtype)
        for position in dict.fromkeys(positions):
            mine = torch.nonzero(at == position)[:, 0]
            gone = vectors[mine.to(vectors.device)]
            found[mine] = reader.without(reading, position, gone, self.norm).to(found)
        numbers = found.tolist() + ([reader.only(reading, kept, self.norm)] if left else [])
        if left and len(kept) == 1:
            ((position, vector),) = kept.items()
            vectors = torch.cat([vectors, (self.writers.state(position, reading.stop) - vector)[None]])
        weights = reader.weights(vectors, self.norm, self.router)
        return numbers, weights + weights[:1] * (len(numbers) - len(weights))

    def table(self) -> pd.DataFrame:
        """All rows."""
        table = pd.DataFrame(self.columns)
        for name in ("source", "position"):
            table[name] = pd.array(table[name].tolist(), dtype="Int64")
        return table


def positions_of(reading: Reading) -> int | None:
    """The position that a reading hangs on, if it is one."""
    return next(iter(reading.directions)) if len(reading.directions) == 1 else None

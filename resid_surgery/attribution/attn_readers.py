"""What attention and the unembedding read: attention neurons and value sides, query and key sides, readouts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.attribution.aims import Aim
from resid_surgery.attribution.readings import (
    Reading,
    Wanted,
    attention_inputs,
    attention_readings,
    ids_of,
    state_at,
)
from resid_surgery.errors import SiteError, UnsupportedModelError
from resid_surgery.models.attention import AttentionCall
from resid_surgery.models.parts import Norm
from resid_surgery.models.tracing import projected
from resid_surgery.sites import AttnNeuron, Constant, Head, HeadSource, Site, Sublayer
from resid_surgery.stream.elsewhere import need_stream
from resid_surgery.stream.kinds import attention_of, joint_parts
from resid_surgery.stream.recording import Recording, closure_tolerance
from resid_surgery.stream.records import attention_rows, repeat_kv


@final
@dataclass(frozen=True, eq=False)
class LinearReader:
    """A reader whose number is its reading: an attention neuron, the value side of heads, the unembedding."""

    rec: Recording
    site: Site
    readings: list[Reading]
    number: float
    what: str
    part: str

    def _norm(self) -> Norm:
        layer = None if self.part == "final" else self.site.layer  # type: ignore[attr-defined]
        return self.rec.model.norm(layer, "final_norm" if layer is None else "attn_norm")

    def _state(self, position: int) -> Tensor:
        if self.part == "final":
            return self.rec.work(self.rec.resid_final)
        return state_at(self.rec, self.site.layer, position)  # type: ignore[attr-defined]

    def without(
        self, reading: Reading, position: int, removed: Float[Tensor, "n d_model"], norm: str
    ) -> Float[Tensor, " n"]:
        """The reading itself; with a live norm what is left is read at its own scale."""
        direction, state = reading.directions[position], self._state(position)
        rest = state - removed
        left = rest @ direction
        if norm == "live":
            left = left * (self._norm().scale(state) / self._norm().scale(rest))[:, 0]
        return reading.measured + left - state @ direction

    def only(self, reading: Reading, kept: Mapping[int, Float[Tensor, " d_model"]], norm: str) -> float:
        """See `Reader`."""
        total = sum(reading.constants.values())
        for position, vector in kept.items():
            ratio = 1.0
            if norm == "live":
                ratio = float(self._norm().scale(self._state(position)) / self._norm().scale(vector))
            total += ratio * float(reading.directions[position] @ vector)
        return total

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """No expert: 1."""
        return [1.0] * len(removed)


@final
@dataclass(frozen=True, eq=False)
class ScoreReader:
    """A head's query side or key side: reads scores before softmax, hands on the attention weight of one source.

    Attributes:
        call: the attention call of the run: its mask, cap and sinks are kept.
    """

    rec: Recording
    site: HeadSource
    readings: list[Reading]
    number: float
    call: AttentionCall
    what: str = "attention weight"

    def without(
        self, reading: Reading, position: int, removed: Float[Tensor, "n d_model"], norm: str
    ) -> Float[Tensor, " n"]:
        """The weight, with every score of the row worked out anew through the attention's own modules."""
        rec, layer = self.rec, self.site.layer
        form, state = rec.model.norm(layer, "attn_norm"), state_at(rec, layer, position)
        rest = state - removed
        read = form.linear(rest, form.scale(state) if norm == "frozen" else form.scale(rest)) + form.bias
        x = attention_inputs(rec, layer, ()).repeat(len(read), 1, 1)
        x[:, position] = read
        call, _ = projected(rec.model, layer, x, ids_of(rec, len(read)), frozen=False)
        found = [self._weight(call, row, reading.key) for row in range(len(read))]
        return torch.stack(found).to(removed)

    def _weight(self, call: AttentionCall, row: int, side: str) -> Tensor:
        one, t = attention_of(self.rec, self.site.layer, str(self.site)), self.rec.prompt.position
        assert one.query is not None
        assert one.key is not None
        assert call.query is not None
        assert call.key is not None
        head, source = self.site.head, self.site.source
        query, keys = one.query[:, None].clone(), repeat_kv(one.key[:, : t + 1], len(one.query)).clone()
        if side == "query":
            query[head, 0] = call.query[row, head, t]
        else:
            keys[head, source] = repeat_kv(call.key[row], len(one.query))[head, source]
        return attention_rows(self.call, 0, [t], query=query, key=keys)[0, head, source]

    def only(self, reading: Reading, kept: Mapping[int, Float[Tensor, " d_model"]], norm: str) -> float:
        """See `Reader`."""
        ((position, vector),) = kept.items()
        state = state_at(self.rec, self.site.layer, position)
        return float(self.without(reading, position, (state - vector)[None], norm))

    def weights(self, removed: Float[Tensor, "n d_model"], norm: str, router: str) -> list[float]:
        """No expert: 1."""
        return [1.0] * len(removed)


def unembedding(rec: Recording, aim: Aim) -> LinearReader:
    """The unembedding's reading of a readout."""
    t = rec.prompt.position
    reading = Reading("readout", aim.unit, None, {t: aim.direction}, {t: aim.plain}, aim.constants, aim.measured)
    return LinearReader(rec, Constant("unembed"), [reading], aim.measured, aim.name, "final")


def attention_neuron(rec: Recording, site: AttnNeuron) -> Wanted:
    """z[h, d] = gate * sum_j alpha[j] v[h, j, d], its attention weights kept; of one source if the site names it."""
    one = attention_of(rec, site.layer, str(site))
    row = torch.zeros_like(rec.work(one.z))
    row[site.head, site.index] = 1.0
    z = rec.work(one.z)[site.head, site.index]
    measured = z if site.source is None else joint_parts(rec, site.layer)[site.head, site.source, site.index]
    return _values(rec, site.layer, row, site.source, "coefficient", float(measured))


def value_side(rec: Recording, site: Head | HeadSource | Sublayer, aim: Aim) -> Wanted:
    """What heads write towards an aim, their attention weights kept: sum_h sum_j alpha[h,j] v[h,j] W_O[h] . aim."""
    layer, size = site.layer, rec.model.anatomy.sizes[site.layer]
    z = rec.work(attention_of(rec, layer, str(site)).z)
    rows = rec.work(rec.model.rows(layer, "attn_out").rows)
    worth = (rows @ aim.at_output(rec, layer, "attn")).view(size.n_heads, size.d_head)
    if isinstance(site, (Head, HeadSource)):
        worth = torch.zeros_like(worth).index_copy(0, torch.tensor([site.head]).to(worth.device), worth[[site.head]])
    source = getattr(site, "source", None)
    parts = z if source is None else joint_parts(rec, layer)[:, source]
    return _values(rec, layer, worth, source, aim.unit, float((parts * worth).sum()))


def _values(
    rec: Recording, layer: int, worth: Float[Tensor, "head d_head"], source: int | None, unit: str, measured: float
) -> Wanted:
    """sum over heads and sources of alpha gate v . worth."""
    one, t = attention_of(rec, layer, f"L{layer}.H0"), rec.prompt.position
    alpha = rec.work(one.alpha)[:, : t + 1]
    through = worth if one.gate is None else worth * rec.work(one.gate)
    sources = tuple(range(t + 1)) if source is None else (source,)
    amounts = torch.zeros_like(alpha)
    amounts[:, list(sources)] = alpha[:, list(sources)]

    def phi(call: AttentionCall, row: int, only: int | None) -> Tensor:
        values = repeat_kv(call.value[row], len(alpha))[:, : t + 1].to(alpha)
        kept, worth = amounts.clone(), through.clone()  # no inference tensors, which no gradient passes
        if only is None:
            return torch.einsum("hj,hjd,hd->", kept, values, worth)
        return torch.einsum("h,hd,hd->", kept[:, only], values[:, only], worth)

    return Wanted("value", unit, phi, sources, measured, {}, source)


def score_readers(rec: Recording, layer: int, wanted: list[tuple[HeadSource, str]]) -> list[ScoreReader]:
    """Query and key sides of one layer's heads.

    Raises:
        SiteError: the model gives its attention weights only.
    """
    for site, side in wanted:
        need_scores(rec, site, side)
    call = _call_of(rec, layer)
    readings = attention_readings(rec, layer, [_score(rec, site, side, call) for site, side in wanted])
    alpha = attention_of(rec, layer, f"L{layer}.H0").alpha
    return [
        ScoreReader(rec, site, [reading], float(alpha[site.head, site.source]), call)
        for (site, _), reading in zip(wanted, readings, strict=True)
    ]


def _call_of(rec: Recording, layer: int) -> AttentionCall:
    """A layer's attention call in this run. Where the mask hangs on what other positions read, they are needed.

    Raises:
        ArgumentError: other positions are needed and were not recorded. UnsupportedModelError: the mask is another.
    """
    t, everywhere = rec.prompt.position, tuple(range(rec.prompt.position + 1))
    x = attention_inputs(rec, layer, (t,) if rec.stream is None else everywhere)[None]
    call, _ = projected(rec.model, layer, x, ids_of(rec, 1), frozen=False)
    one = attention_of(rec, layer, f"L{layer}.H0")
    assert one.query is not None
    assert one.key is not None
    alpha = attention_rows(call, 0, [t], query=one.query[:, None], key=one.key[:, : t + 1])[0]
    if not float((alpha - one.alpha[:, : t + 1]).abs().max()) <= 10 * closure_tolerance(rec.model):
        need_stream(rec)
        raise UnsupportedModelError(
            f"attention of layer {layer} of {rec.model.name} cannot be repeated: its mask is another than in the run."
        )
    return call


def need_scores(rec: Recording, site: HeadSource, side: str) -> None:
    """Refuse a side whose scores the model does not give.

    Raises:
        SiteError: it gives its attention weights only.
    """
    one = attention_of(rec, site.layer, str(site))
    if one.query is None or one.key is None or not one.from_scores:
        raise SiteError(
            f"`{site}` has no {side} side that splits in {rec.model.name}: its attention weights are not a softmax of "
            "queries times keys that are to be had. Use side='value'."
        )


def _score(rec: Recording, site: HeadSource, side: str, made: AttentionCall) -> Wanted:
    """e[t, j] = scaling q[t] . k[j] + position bias, before a cap and softmax: one side read, the other kept."""
    one, t, work = attention_of(rec, site.layer, str(site)), rec.prompt.position, rec.work
    assert one.query is not None
    assert one.key is not None
    n_heads = len(one.query)
    query, key = work(one.query[site.head]), work(repeat_kv(one.key, n_heads)[site.head, site.source])

    def phi(call: AttentionCall, row: int, only: int | None) -> Tensor:
        if side == "query":
            assert call.query is not None
            return call.query[row, site.head, t].to(key) @ key.clone() * call.scaling
        assert call.key is not None
        return repeat_kv(call.key[row], n_heads)[site.head, site.source].to(query) @ query.clone() * call.scaling

    bias = _position_bias(made, site, t)
    measured = float(query @ key) * made.scaling + bias
    position = t if side == "query" else site.source
    return Wanted(side, "score", phi, (position,), measured, {} if bias == 0 else {"position bias": bias}, site.source)


def _position_bias(call: AttentionCall, site: HeadSource, t: int) -> float:
    """What the mask adds to a score that is seen (ALiBi, a relative bias); 0 where it only hides."""
    if call.mask is None or call.mask.dtype == torch.bool:
        return 0.0
    bias = float(call.mask[0, min(site.head, call.mask.shape[1] - 1), t, site.source])
    return 0.0 if bias < torch.finfo(call.mask.dtype).min / 2 else bias


def value_readers(
    rec: Recording, layer: int, wanted: list[tuple[Site, Wanted]], names: list[str]
) -> list[LinearReader]:
    """Attention neurons and value sides of one layer; `names` say what each hands on."""
    readings = attention_readings(rec, layer, [one for _, one in wanted])
    return [
        LinearReader(rec, site, [reading], one.measured, name, "attn")
        for (site, one), reading, name in zip(wanted, readings, names, strict=True)
    ]

"""Asking: which readers are meant, and their readings, a layer's attention at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from resid_surgery import _check
from resid_surgery.addresses import SIDES, At, Slice, as_sites, expand, parse_site
from resid_surgery.attribution.aims import Aim
from resid_surgery.attribution.attn_readers import (
    attention_neuron,
    need_scores,
    score_readers,
    unembedding,
    value_readers,
    value_side,
)
from resid_surgery.attribution.mlp_readers import LayerReader, NeuronReader
from resid_surgery.attribution.readings import Reader, Wanted
from resid_surgery.errors import SiteError
from resid_surgery.sites import (
    AttnNeuron,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.stream.elsewhere import Elsewhere, need_stream
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import need_group, resolve_in

NEURONS = (Neuron, ExpertNeuron, SharedNeuron)
HEADS = (Head, HeadSource)


@final
@dataclass(frozen=True, eq=False)
class Ask:
    """One reader that is asked for.

    Attributes:
        site: which. position: where it reads. side: of a head. aim: of a value side or a whole layer.
    """

    site: Site
    position: int
    side: str = "all"
    aim: Aim | None = None


def asks_of(rec: Recording, given: Any, side: str | None) -> list[Ask]:
    """Readers from what a caller gave: sites or texts, a head's side as in "L9.H4.query", a position as in "L5.N7@2".

    Raises:
        SiteError: no reader, or a side of what has none.
    """
    many = [given] if isinstance(given, (str, Site)) else list(given) if _check.iterable(given) else [given]
    asks: list[Ask] = []
    for one in many:
        site, own = _with_side(one)
        for each in expand(as_sites(site), rec.model.anatomy, rec.prompt.position):
            asks += _ask(rec, each, own or side)
    if not asks:
        raise SiteError("`reader` must be at least one reader; got none.")
    for ask in asks:
        _possible(rec, ask)
    return asks


def _possible(rec: Recording, ask: Ask) -> None:
    """Refuse what the recording does not hold, before anything runs."""
    if ask.side in ("query", "key") and isinstance(ask.site, HeadSource):
        need_scores(rec, ask.site, ask.side)
    if set(_read_at(ask)) != {rec.prompt.position}:
        need_stream(rec)


def _read_at(ask: Ask) -> Sequence[int]:
    """The positions whose stream a reader reads."""
    attends = isinstance(ask.site, (AttnNeuron, *HEADS)) or getattr(ask.site, "part", None) == "attn"
    if not attends or ask.side == "query":
        return [ask.position]
    source: int | None = getattr(ask.site, "source", None)
    return range(ask.position + 1) if source is None else [source, *([ask.position] if ask.side == "key" else [])]


def _with_side(one: Any) -> tuple[Any, str | None]:
    if isinstance(one, str):
        for side in SIDES[1:]:
            if one.endswith(f".{side}"):
                return parse_site(one.removesuffix(f".{side}")), side
    return one, None


def _ask(rec: Recording, given: Site, side: str | None) -> list[Ask]:
    position = rec.prompt.position
    site = given
    if isinstance(given, At):
        site, position = given.site, rec.prompt.positions(given.position)[0]
        if position > rec.prompt.position:
            raise SiteError(f"`{given}` is after the predicting position {rec.prompt.position}, which cannot read it.")
    kinds = (*NEURONS, AttnNeuron, *HEADS, Sublayer)
    if isinstance(site, Slice) or not (isinstance(site, kinds) or site == Constant("unembed")):
        raise SiteError(
            "`reader` must be a neuron such as L20.N1297, an attention neuron, a head (L9.H4, L9.H4<2, L9.H4.query), "
            f"a sublayer or unembed; got {given}."
        )
    site = site if isinstance(site, Constant) else resolve_in(rec, site)
    source = getattr(site, "source", None)
    if source is not None and source > position:
        raise SiteError(f"`{given}` reads source position {source}, which comes after position {position}.")
    if isinstance(site, Constant) and position != rec.prompt.position:
        raise SiteError(
            f"`{given}` is no reader of this recording: it reads the final stream of the predicting position "
            f"{rec.prompt.position} only. Record with Prompt(position={position})."
        )
    if isinstance(site, Sublayer):
        rec.model.anatomy.require(site.layer, site.part, f"sources of {site}")
    written = isinstance(site, (Sublayer, Constant)) or (isinstance(site, HEADS) and side in (None, "value", "all"))
    if written and position != rec.prompt.position:
        raise SiteError(
            f"`{given}` writes towards a readout, which is of the predicting position {rec.prompt.position}; at other "
            "positions neurons, attention neurons and the query and key sides of heads can be asked for."
        )
    if side is not None and not isinstance(site, HEADS):
        raise SiteError(f"`side` must be left out for `{site}`, which is no head; got {side!r}.")
    if not isinstance(site, HEADS):
        return [Ask(site, position)]
    sides = SIDES[1:] if side == "all" else (side or "value",)
    found = []
    for one in sides:
        if one == "value" or isinstance(site, HeadSource):
            found.append(Ask(site, position, one))
        else:
            found += [Ask(HeadSource(site.layer, site.head, j), position, one) for j in range(position + 1)]
    return found


def readers_of(views: Elsewhere, asks: Sequence[Ask]) -> list[Reader]:
    """The readers, in the order asked; a layer's attention is worked out once a position.

    Raises:
        SiteError: an expert that was not routed to, weights that do not split. ArgumentError: other positions are read
            and were not recorded.
    """
    made: dict[int, Reader] = {}
    for (position, layer), numbers in _grouped(asks).items():
        rec = views.at(position)
        attention: dict[str, list[int]] = {"value": [], "score": []}
        for i in numbers:
            one = asks[i]
            if isinstance(one.site, NEURONS):
                need_group(rec, one.site)
                made[i] = NeuronReader.of(rec, one.site)
            elif isinstance(one.site, Constant):
                made[i] = unembedding(rec, _aim(one))
            elif isinstance(one.site, Sublayer) and one.site.part == "mlp":
                made[i] = LayerReader.of(rec, one.site, _aim(one))
            else:
                attention["score" if one.side in ("query", "key") else "value"].append(i)
        made |= zip(attention["value"], _values(rec, layer, [asks[i] for i in attention["value"]]), strict=True)
        made |= zip(attention["score"], _scores(rec, layer, [asks[i] for i in attention["score"]]), strict=True)
    return [made[i] for i in range(len(asks))]


def _aim(ask: Ask) -> Aim:
    assert ask.aim is not None
    return ask.aim


def _grouped(asks: Sequence[Ask]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(asks):
        found.setdefault((one.position, int(getattr(one.site, "layer", -1))), []).append(i)
    return found


def _values(rec: Recording, layer: int, asks: list[Ask]) -> Sequence[Reader]:
    if not asks:
        return []
    wanted: list[tuple[Site, Wanted]] = []
    names = []
    for one in asks:
        if isinstance(one.site, AttnNeuron):
            wanted.append((one.site, attention_neuron(rec, one.site)))
            names.append("coefficient")
        else:
            wanted.append((one.site, value_side(rec, one.site, _aim(one))))  # type: ignore[arg-type]
            names.append(_aim(one).name)
    return value_readers(rec, layer, wanted, names)


def _scores(rec: Recording, layer: int, asks: list[Ask]) -> Sequence[Reader]:
    if not asks:
        return []
    return score_readers(rec, layer, [(one.site, one.side) for one in asks if isinstance(one.site, HeadSource)])

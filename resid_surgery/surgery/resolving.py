"""Resolving: interventions -> operations on one prompt, checked before any forward runs.

Values that come from other prompts are noted as `Want`s here and fetched afterwards, one forward a donor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.addresses import At, Edge, Slice, expand
from resid_surgery.errors import ArgumentError, InterventionError, SiteError, StaleRecordingError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind, position_of, token_id
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.sites import (
    AttnNeuron,
    Bias,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Projection,
    Resid,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import need_group
from resid_surgery.surgery.arguments import Donor
from resid_surgery.surgery.conflicts import NEURONS, Operation, refuse_overlaps
from resid_surgery.surgery.interventions import (
    Attend,
    Clamp,
    Intervention,
    Mean,
    Patch,
    Scale,
    Set,
    Steer,
    as_interventions,
)


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """Where operations take place: a model, a prompt, and its recording if there is one."""

    model: OpenedModel
    prompt: BoundPrompt
    rec: Recording | None = None

    @classmethod
    def of(cls, rec: Recording) -> "Scene":
        """The scene of a recording."""
        return cls(rec.model, rec.prompt, rec)


@final
@dataclass(frozen=True, eq=False)
class Want:
    """A value to fetch: share * (donor's value of site at position) is added to the operation's value."""

    operation: Operation
    donor: Donor
    site: Site
    position: int
    share: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same for the same value: its donor first."""
        donor = id(self.donor) if isinstance(self.donor, Recording) else self.donor
        edge = str(self.operation.edge.reader) if self.operation.source is not None else ""
        return donor, self.site, self.position, edge


@final
@dataclass(eq=False)
class Resolver:
    """Resolves many lists of interventions on one prompt, noting what they want from donors."""

    scene: Scene
    wants: list[Want] = field(default_factory=list)
    _bound: dict[Any, BoundPrompt] = field(default_factory=dict)
    _known: dict[Site, Site] = field(default_factory=dict)

    def resolve(self, interventions: Any) -> tuple[Operation, ...]:
        """Interventions as operations.

        Raises:
            InterventionError: no interventions, contradictions or nested writes (both named).
            SiteError: a site does not exist. PromptError: a position does not exist.
            StaleRecordingError: a donor was made with other weights.
        """
        out: list[Operation] = []
        for one in as_interventions(interventions):
            out += self._operations(one)
        if len(out) > 1:
            refuse_overlaps(out)
        return tuple(out)

    def _operations(self, one: Intervention) -> Iterator[Operation]:
        prompt, sizes = self.scene.prompt, self.scene.model.anatomy
        given, found = prompt.positions(one.positions), 0
        for index, spec in enumerate(one.sites):
            bare, positions = (spec.site, prompt.positions(spec.position)) if isinstance(spec, At) else (spec, given)
            self._require_values(one, index, positions)
            for site in map(self._resolved, expand([bare], sizes, max(positions))):
                for at, position in enumerate(positions):
                    sources = self._sources(one, site, position, many=isinstance(bare, Slice))
                    for nth, source in enumerate(sources):
                        found += 1
                        yield self._operation(one, site, position, source, (index, at, nth, len(sources)))
        if not found:
            raise SiteError(f"{one.brief} operates on nothing: no site of it has a source up to its positions.")

    def _require_values(self, one: Intervention, index: int, positions: Sequence[int]) -> None:
        if isinstance(one, Set) and len(one.values[index]) != len(positions):
            raise InterventionError(
                f"{one.brief} has {len(one.values[index])} values for {one.sites[index]}, but is for {len(positions)} "
                "different positions. Give one value a position."
            )

    def _resolved(self, site: Site) -> Site:
        if site not in self._known:
            self._known[site] = canonical(site.resolve(self.scene.model.anatomy))
        return self._known[site]

    def _sources(self, one: Intervention, site: Site, position: int, *, many: bool) -> Sequence[int | None]:
        """Positions of the writer that an edge has; [None] for what is no edge; nothing from the future."""
        if isinstance(site, Edge):
            return self._edge_sources(one, site, position)
        source = getattr(site, "source", None)
        if source is None or source <= position:
            return [None]
        if one.positions == "all" or many:
            return []  # causal: there is nothing from a later source
        t, n = self.scene.prompt.position, len(self.scene.prompt.ids)
        if position == t:
            raise SiteError(
                f"`{site}` reads source position {source}, but the predicting position is {t} ({n} tokens): sources "
                f"are 0..{t}."
            )
        raise SiteError(f"`{site}` has no source {source} at position {position}: attention is causal.")

    def _edge_sources(self, one: Intervention, edge: Edge, position: int) -> list[int | None]:
        reader, t = edge.reader, position
        attention = isinstance(reader, (Head, HeadSource)) or (isinstance(reader, Sublayer) and reader.part == "attn")
        if isinstance(reader, HeadSource):
            places = [reader.source] if reader.source <= t else []
        elif attention and edge.side != "query":
            places = list(range(t + 1))
        else:
            places = [t]
        least = getattr(edge.writer, "source", None) or 0
        found: list[int | None] = [j for j in places if j >= least]
        if not found and one.positions != "all":
            raise SiteError(f"`{edge}` has no writer at position {position}: attention is causal.")
        return found

    def _operation(
        self, one: Intervention, site: Site, position: int, source: int | None, at: tuple[int, int, int, int]
    ) -> Operation:
        self._require_readable(one, site, position)
        op = Operation(site, position, one, source=source)
        if isinstance(one, Scale):
            op.factor = self._fits(one, one.factor)
        elif isinstance(one, Clamp):
            op.factor, op.value = 0.0, self._held(torch.tensor([one.value], dtype=torch.float64))
        elif isinstance(one, Set):
            op.factor, op.value = 0.0, self._sized(site, one.values[at[0]][at[1]], at[2:])
        elif isinstance(one, Steer):
            op.steer = self._steer(one, site)
        elif isinstance(one, Attend):
            op.weight, op.renormalise = one.weight, one.renormalise
        elif isinstance(one, (Patch, Mean)):
            op.factor = 0.0
            donors = (one.donor,) if isinstance(one, Patch) else one.over
            for donor in donors:
                assert donor is not None
                self.wants.append(self._want(op, donor, one.align, 1 / len(donors)))
        else:  # Zero and Cut
            op.factor = 0.0
        return op

    def _require_readable(self, one: Intervention, site: Site, position: int) -> None:
        rec = self.scene.rec
        scored = isinstance(site, Projection) or (isinstance(site, Edge) and site.side in ("query", "key"))
        layer: int | None = getattr(site.reader if isinstance(site, Edge) else site, "layer", None)
        if scored and layer is not None and not readable(self.scene.model, layer, site):
            raise SiteError(
                f"`{site}` cannot be operated on in {self.scene.model.name}: layer {layer} gives its attention "
                "weights, not the queries and keys that they follow from."
            )
        if isinstance(site, Edge) and of_mixture(self.scene.model, site.writer):
            raise SiteError(
                f"`{site}` cannot be operated on: what one part of a mixture adds is known only after the whole "
                f"mixture ran. Use L{site.writer.layer}.mlp as the writer, or intervene on the neuron itself."
            )
        neuron = site.reader if isinstance(site, Edge) else site
        active = rec is not None and position == rec.prompt.position and one.positions != "all"
        if isinstance(neuron, ExpertNeuron) and active and not isinstance(one, Steer):
            assert rec is not None
            need_group(rec, neuron)

    def _fits(self, one: Intervention, number: float) -> float:
        dtype = self.scene.model.dtype
        if abs(number) > torch.finfo(dtype).max:
            raise ArgumentError(f"{one.brief}: {number} is beyond what {dtype} holds.")
        return number

    def _held(self, numbers: Tensor) -> Tensor:
        held = numbers.to(self.scene.model.device, self.scene.model.work_dtype)
        if not bool(torch.isfinite(held.to(self.scene.model.dtype)).all()):
            raise ArgumentError(
                f"values must be numbers that {self.scene.model.dtype} holds; got {float(numbers.abs().max())}."
            )
        return held

    def _sized(self, site: Site, value: Tensor, nth: tuple[int, ...]) -> Tensor:
        wide, (number, count) = width(self.scene, site), nth
        shape = tuple(value.shape)
        if value.ndim == 2 and isinstance(site, Edge) and len(value) == count:
            value = value[number]  # an edge into keys or values: one addend a source
        if value.ndim > 1 or value.numel() != wide:
            must = f"{wide} numbers" + (f", or {count} times as many, one addend a source" if count > 1 else "")
            raise ArgumentError(_check.message(f"value of {site}", must, f"shape {shape}", model=self.scene.model.name))
        return self._held(value.reshape(-1))

    def _steer(self, one: Steer, site: Site) -> Tensor:
        model = self.scene.model
        if one.vector is None:
            ids = [token_id(t, model.tokenizer, model, name)
                   for name, t in (("toward", one.toward), ("away", one.away)) if t is not None]  # fmt: skip
            rows = model.unembedding[ids].to(model.work_dtype)
            vector = one.times * (rows[0] - rows[1] if len(rows) > 1 else rows[0])
        else:
            vector = self._held(one.vector)
        wide = width(self.scene, site) if isinstance(site, Projection) else model.anatomy.d_model
        if vector.numel() != wide:
            raise ArgumentError(_check.message("vector", f"{wide} numbers", vector.numel(), model=model.name))
        return vector

    def _want(self, op: Operation, donor: Donor, align: Any, share: float) -> Want:
        bound = self._bind(donor)
        site, position = op.site, op.position if op.source is None else op.source
        if isinstance(site, Edge):
            site = self._from_source(site.writer, bound, align)
        else:
            site = self._from_source(site, bound, align)
        there = aligned(self.scene.prompt, bound, position, align, op.origin)
        if (source := getattr(site, "source", None)) is not None and source > there:
            raise InterventionError(f"{op.origin.brief}: the donor has no {site} at position {there}.")
        return Want(op, donor, site, there, share)

    def _from_source(self, site: Site, bound: BoundPrompt, align: Any) -> Site:
        source = getattr(site, "source", None)
        if source is None:
            return site
        there = aligned(self.scene.prompt, bound, source, align, None)
        return replace(site, source=there)  # type: ignore[call-arg]

    def _bind(self, donor: Donor) -> BoundPrompt:
        key = id(donor) if isinstance(donor, Recording) else donor
        if key not in self._bound:
            self._bound[key] = self._checked(donor)
        return self._bound[key]

    def _checked(self, donor: Donor) -> BoundPrompt:
        model, rec = self.scene.model, self.scene.rec
        if isinstance(donor, Prompt):
            return bind(donor, model.tokenizer, model)
        if donor.model is not model:
            raise InterventionError(
                f"`donor` must be a recording of the same opened model ({model.name}); got one of {donor.model.name}."
            )
        if rec is not None and donor.fingerprint != rec.fingerprint:
            raise StaleRecordingError(
                f"`donor` was recorded with other weights of {model.name} than the recording operated on. "
                "Record it again."
            )
        return donor.prompt


def resolve(rec: Recording, interventions: Any) -> tuple[Operation, ...]:
    """One list of interventions as operations on a recording's prompt, without values from donors."""
    return Resolver(Scene.of(rec)).resolve(interventions)


def aligned(mine: BoundPrompt, donor: BoundPrompt, position: int, align: Any, origin: Intervention | None) -> int:
    """The donor's position that a position takes its value from (see `Patch`).

    Raises:
        InterventionError: there is none; both prompts are shown.
    """
    if isinstance(align, tuple):
        for p, q in align:
            if _one(p, mine) == position:
                return _one(q, donor)
        raise _unaligned(mine, donor, position, "the mapping does not name it", origin)
    if align == "token":
        text = mine.tokens[position]
        nth = mine.tokens[: position + 1].count(text)
        hits = [i for i, token in enumerate(donor.tokens) if token == text]
        if len(hits) < nth:
            raise _unaligned(mine, donor, position, f"the donor has {len(hits)} tokens {text!r}", origin)
        return hits[nth - 1]
    if align is None and position == mine.position:
        return donor.position
    if position >= len(donor.ids):
        raise _unaligned(mine, donor, position, f"the donor has {len(donor.ids)} tokens", origin)
    return position


def _one(given: Any, prompt: BoundPrompt) -> int:
    if isinstance(given, str) and given != "target":
        return position_of(given, prompt.tokens)
    return prompt.positions(given)[0]


def _unaligned(
    mine: BoundPrompt, donor: BoundPrompt, position: int, why: str, origin: Intervention | None
) -> InterventionError:
    what = "" if origin is None else f"{origin.brief}: "
    return InterventionError(
        f"{what}position {position} ({mine.tokens[position]!r}) has no counterpart in {list(donor.tokens)}: {why}. "
        "Use align='token', or a mapping of positions."
    )


def width(scene: Scene, site: Site) -> int:
    """How many numbers a site's own value has."""
    if isinstance(site, (*NEURONS, AttnNeuron)):
        return 1
    if isinstance(site, (Head, HeadSource, Projection)):
        one = None if scene.rec is None else scene.rec.layers[site.layer].attention
        if isinstance(site, Projection) and site.side != "V" and one is not None and one.query is not None:
            return int(one.query.shape[-1])
        return scene.model.anatomy.sizes[site.layer].d_head
    return scene.model.anatomy.d_model


def readable(model: OpenedModel, layer: int, site: Site) -> bool:
    """Whether queries and keys, or for ``V`` values, can be written where attention takes them in."""
    kind = model.block(layer).mix.partition(":")[0]
    if kind not in ("interface", "sdpa"):
        return False
    if isinstance(site, Projection) and site.side == "V":
        return True
    known = model.cache.setdefault("from_scores", {})
    if layer not in known:
        call = forward(model, model.probe_ids(), [Tap("attn_call", layer)], logits_at=[0])[Tap("attn_call", layer)]
        known[layer] = call.from_scores
    return bool(known[layer])


def of_mixture(model: OpenedModel, writer: Site) -> bool:
    """Whether what a writer adds is known only after a mixture of experts ran."""
    if isinstance(writer, Bias):
        return writer.part == "mlp" and model.block(writer.layer).mlp_kind == "experts"
    return isinstance(writer, (ExpertNeuron, SharedNeuron))


def canonical(site: Site) -> Site:
    """One name per place: the embedding is the first block's input."""
    return Resid(0, "pre") if isinstance(site, Constant) else site

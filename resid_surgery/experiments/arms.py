"""Arms: the rows of a plan on one recorded prompt: coordinates, and interventions as values."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from resid_surgery import _check
from resid_surgery.addresses import At, Edge, as_sites, expand
from resid_surgery.errors import ArgumentError
from resid_surgery.experiments.cases import Case, prompt_of
from resid_surgery.experiments.finding import as_list, put_in
from resid_surgery.experiments.grammar import OWN, indexed, literal, referred
from resid_surgery.experiments.plans import Plan
from resid_surgery.models.anatomy import Anatomy
from resid_surgery.models.prompts import BoundPrompt, Prompt
from resid_surgery.surgery.interventions import (
    Attend,
    Clamp,
    Cut,
    Intervention,
    Mean,
    Patch,
    Scale,
    Set,
    Steer,
    Zero,
)

PARTS = ("layer", "head", "index", "source", "expert")
BUILD: dict[str, Callable[..., Intervention]] = {
    one.__name__: one for one in (Zero, Scale, Clamp, Attend, Cut, Steer, Set, Patch, Mean)
}
Sites = Callable[[str, Mapping[str, Any]], list[Any]]
Donors = Callable[[Prompt], Any]


@final
@dataclass(frozen=True)
class Row:
    """One row of a run.

    Attributes:
        coordinates: arm, axes, operation, site, kind, layer, ..., position, token, size. interventions: together.
    """

    coordinates: dict[str, Any]
    interventions: list[Intervention]


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt that a plan's rows are made for.

    Attributes:
        anatomy: of the model. prompt: as the model sees it. case: its donors. sites: (set, values) -> sites.
        donor: a prompt -> what stands for it as a donor (itself, or its recording).
    """

    anatomy: Anatomy
    prompt: BoundPrompt
    case: Case
    sites: Sites
    donor: Donors = field(default=lambda prompt: prompt)


def rows_of(plan: Plan, scene: Scene) -> Iterator[Row]:
    """Every row of a plan on one prompt, in a fixed order: arms, then cells, then sites, then positions.

    Raises:
        ArgumentError, SiteError, PromptError, InterventionError: an operation does not fit the model or prompt.
    """
    own = own_tokens(scene.prompt)
    for name, arm in plan.intervene.items():
        for values in plan.combinations(plan.axes_of(arm)):
            yield from _cell(scene, name, arm, values, own)


def own_tokens(prompt: BoundPrompt) -> dict[str, int]:
    """What ``$target`` and ``$versus`` (its first competitor) stand for."""
    return dict(zip(OWN, prompt.readouts, strict=False))


def _cell(
    scene: Scene, name: str, arm: Sequence[Mapping[str, Any]], values: dict[str, Any], own: Mapping[str, Any]
) -> Iterator[Row]:
    fixed = [build(scene, one, values, own) for one in arm if not _each(one)]
    kinds = "+".join(one["kind"] for one in arm)
    head = {"arm": name, **values, "operation": kinds}
    each = next((one for one in arm if _each(one)), None)
    if each is None:
        yield Row(head | _together(fixed, scene), fixed)
        return
    beside = _size([site for other in fixed for site in other.sites], scene)
    for site, position in _spots(scene, each, values):
        one = build(scene, {**each, "sites": as_list(site), "positions": position}, values, own)
        size = len(one.sites) + beside
        yield Row(head | _spot(site, one.positions, scene) | {"size": size}, [one, *fixed])


def _each(one: Mapping[str, Any]) -> bool:
    return bool(one.get("each")) or one.get("positions") == "each"


def _spots(scene: Scene, one: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(site, position) of every row that an operation with `each` makes."""
    prompt, where = scene.prompt, put_in(one.get("positions", "target"), values)
    if where == "each":
        places: list[Any] = list(range(prompt.position + 1))
    else:
        places = [where]
        where = prompt.positions(where)
    last = prompt.position if where == "each" else max(where)
    named = as_sites(_flat(sites_of(scene, one["sites"], values)))
    given = [site if isinstance(site, (At, Edge)) else site.resolve(scene.anatomy)
             for site in expand(named, scene.anatomy, last)]  # fmt: skip
    if not one.get("each"):
        yield from itertools.product([given], places)
        return
    for site, place in itertools.product(given, places):
        source = getattr(site, "source", None)
        if source is None or not isinstance(place, int) or source <= place % len(prompt.ids):
            yield site, place


def sites_of(scene: Scene, given: Any, values: Mapping[str, Any]) -> list[Any]:
    """Sites and texts of sites, with named sets and axes in place."""
    found: list[Any] = []
    for one in as_list(given):
        name = referred(one)
        found += scene.sites(name, values) if name is not None and name not in values else [put_in(one, values)]
    return found


def build(scene: Scene, one: Mapping[str, Any], values: Mapping[str, Any], own: Mapping[str, Any]) -> Intervention:
    """An intervention from an operation's plain data.

    Raises:
        ArgumentError, SiteError, InterventionError: a field is no good, or missing.
    """
    fields = {key: value for key, value in one.items() if key not in ("kind", "sites", "each", "donor", "over")}
    fields = {key: put_in(value, {**own, **values}) for key, value in fields.items()}
    for key in ("toward", "away"):
        if referred(fields.get(key)) in OWN:
            raise ArgumentError(_check.message(key, "a token; the prompt has no competitors", fields[key]))
    if isinstance(fields.get("positions"), list):
        fields["positions"] = tuple(fields["positions"])
    if isinstance(fields.get("align"), dict):
        fields["align"] = {_position(p): q for p, q in fields["align"].items()}
    if one["kind"] == "Patch":
        (fields["donor"],) = donors_of(scene, one.get("donor"), single=True)
    if one["kind"] == "Mean":
        fields["over"] = donors_of(scene, one.get("over"))
    sites = _flat(sites_of(scene, one["sites"], values))
    try:
        return BUILD[one["kind"]](sites, **fields)
    except TypeError as error:
        raise ArgumentError(f"{one['kind']} of the plan cannot be made: {error}.") from error


def donors_of(scene: Scene, given: Any, *, single: bool = False) -> list[Any]:
    """Donors of a `Patch` or a `Mean`: prompts of the plan, or the case's own under a name.

    Raises:
        ArgumentError: the case has none under the name, or several where one is wanted.
    """
    name = referred(given)
    if name is None:
        prompts = [prompt_of(one) for one in as_list(given)]
    else:
        prompts = list(scene.case.donors.get(name, ()))
    if not prompts or (single and len(prompts) > 1):
        must = "one prompt" if single else "at least one prompt"
        raise ArgumentError(_check.message("donors", f"{must} under {name!r} for every case", len(prompts)))
    return [scene.donor(one) for one in prompts]


def _position(given: str) -> Any:
    """A position of an alignment, which JSON keeps as a text."""
    text = literal(given)
    return int(text) if indexed(text) else text


def _flat(sites: list[Any]) -> list[Any]:
    return [one for some in sites for one in as_list(some)]


def _together(given: Sequence[Intervention], scene: Scene) -> dict[str, Any]:
    """Coordinates of operations carried out together: a site's own where there is just one."""
    sites = [site for one in given for site in one.sites]
    size = _size(sites, scene)
    if size == 1 == len(sites):
        (only,) = expand(sites, scene.anatomy, scene.prompt.position)  # the one site of a slice, too
        return _spot(only, given[0].positions, scene) | {"size": 1}
    where = {str(one.positions) for one in given}
    at = {"position": scene.prompt.position} if where == {"target"} else {}
    return {"site": f"{size} sites", "size": size} | at


def _size(sites: Sequence[Any], scene: Scene) -> int:
    """How many sites there are, with those of slices."""
    return sum(1 for _ in expand(sites, scene.anatomy, scene.prompt.position))


def _spot(site: Any, positions: Any, scene: Scene) -> dict[str, Any]:
    """Coordinates of one site at one place."""
    if isinstance(site, list):
        named: dict[str, Any] = {"site": f"{len(site)} sites" if len(site) != 1 else str(site[0])}
    else:
        bare = site.site if isinstance(site, At) else site
        kind = "Edge" if isinstance(bare, Edge) else type(bare).__name__
        named = {"site": str(site), "kind": kind} | {p: v for p in PARTS if (v := getattr(bare, p, None)) is not None}
    if isinstance(site, At):
        positions = site.position
    places = scene.prompt.positions(positions) if positions != "all" else ()
    if len(places) == 1:
        named |= {"position": places[0], "token": scene.prompt.tokens[places[0]]}
    return named

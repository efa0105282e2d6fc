"""Checking: a plan against a model and its cases, before any forward runs.

What is wrong with the plan is an error. What is wrong with one prompt (a target of two tokens, say) is that prompt's
failure, known at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import xxhash

from resid_surgery import _check
from resid_surgery.addresses import At, Edge, as_sites, expand
from resid_surgery.attribution.catalogue import check_scores
from resid_surgery.attribution.queries import need_candidates, need_competitors, versus_of
from resid_surgery.errors import ArgumentError, InterventionError, PromptError, ResidSurgeryError, SiteError
from resid_surgery.experiments.arms import Scene, build, own_tokens, sites_of
from resid_surgery.experiments.cases import Case, prompt_of
from resid_surgery.experiments.columns import free
from resid_surgery.experiments.finding import as_list, put_in, substituted
from resid_surgery.experiments.grammar import DONORS, referred
from resid_surgery.experiments.plans import Plan
from resid_surgery.experiments.tables import label_types
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, bind
from resid_surgery.stream.grouping import MOST_BYTES, recording_bytes
from resid_surgery.stream.subvalues import KINDS
from resid_surgery.surgery.interventions import Intervention
from resid_surgery.surgery.resolving import Resolver
from resid_surgery.surgery.resolving import Scene as Place

STAND_INS = {
    "neuron": ("L*.N0", "L*.E0.N0", "L*.shared.N0"),
    "head": ("L*.H0",),
    "head_source": ("L*.H0<0",),
    "attn_neuron": ("L*.H0.D0",),
    "attn_neuron_source": ("L*.H0.D0<0",),
    "layer": ("L*.mlp", "L*.attn"),
}
ROWS_A_GROUP = 512
LARGEST_GROUP = 8


@final
@dataclass(frozen=True)
class Checked:
    """What is known of a run's cases before it starts.

    Attributes:
        groups: numbers of cases that are recorded together: of one length and predicting position.
        bad: number -> why the case cannot be run. versus: the most competitors that a case has.
        tokens: hash of every prompt's ids, position and targets, which tell one tokenizer from another.
    """

    groups: tuple[tuple[int, ...], ...]
    bad: Mapping[int, ResidSurgeryError]
    versus: int
    tokens: str


def check(model: OpenedModel, plan: Plan, cases: Sequence[Case]) -> Checked:
    """Check a plan and its cases, and group these by length.

    Raises:
        ArgumentError, SiteError, ...: the plan does not fit the model. PromptError: no case can be run at all; the
            first one's fault is given.
    """
    _check_columns(plan, cases)
    _check_sets(model, plan)
    _check_donors(model, plan)
    bad: dict[int, ResidSurgeryError] = {}
    lengths: dict[tuple[int, int], list[int]] = {}
    rows, most, tokens = None, 0, xxhash.xxh3_128()
    for number, case in enumerate(cases):
        try:
            bound = bind_case(model, plan, case)
        except ResidSurgeryError as error:
            bad[number] = error
            continue
        if rows is None:
            rows = _rows_about(model, plan, case, bound)
        most = max(most, len(bound.versus))
        tokens.update(repr((number, bound.ids, bound.position, bound.readouts)).encode())
        lengths.setdefault((len(bound.ids), bound.position), []).append(number)
    if rows is None:
        first = next(iter(bad.values()))
        raise type(first)(f"none of {len(cases)} prompts can be run on {model.name}; prompt 0: {first}") from first
    size = max(1, min(LARGEST_GROUP, ROWS_A_GROUP // max(1, rows)))
    groups = [group for (length, _), some in lengths.items() for group in _groups(model, length, some, size)]
    return Checked(tuple(sorted(groups)), bad, most, tokens.hexdigest())


def _groups(model: OpenedModel, length: int, numbers: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """Numbers of one length, a few at a time: as many as recordings of them take little memory."""
    size = max(1, min(most, int(MOST_BYTES // recording_bytes(model, length, every=False))))
    for low in range(0, len(numbers), size):
        yield tuple(numbers[low : low + size])


def bind_case(model: OpenedModel, plan: Plan, case: Case) -> BoundPrompt:
    """A case's prompt as the model sees it, if the plan can be carried out on it as far as that is known.

    Raises:
        ResidSurgeryError: why not.
    """
    bound = bind(case.prompt, model.tokenizer, model)
    missing = [name for name in plan.donors() if not case.donors.get(name)]
    if missing:
        raise ArgumentError(_check.message("donors", f"given for the plan's '${missing[0]}'", sorted(case.donors)))
    for many in case.donors.values():
        for one in many:
            bind(one, model.tokenizer, model)
    every = tuple(range(model.anatomy.n_layers))
    for one in plan.locate.values():
        for values in plan.combinations(plan.axes_of(one)) if "sites" not in one and "like" not in one else ():
            asked = substituted(one, values)
            score = check_scores([asked.get("score", "log_prob_increase")], asked.get("norm", "frozen"))
            need_competitors(model, score, versus_of(model, bound, asked.get("versus")))
            layers = every if asked.get("layers") is None else as_list(asked["layers"])
            need_candidates(model, bound, asked.get("kind", "neuron"), layers, asked.get("k", 10))
    _check_places(plan, bound)
    return bound


def _check_places(plan: Plan, bound: BoundPrompt) -> None:
    """Positions that operations name are there, and so is the competitor that one may name."""
    for arm in plan.intervene.values():
        for one in arm:
            if not bound.versus and "versus" in (referred(one.get("toward")), referred(one.get("away"))):
                raise ArgumentError("`versus` must be given with the prompt for the plan's '$versus'; it has none.")
            for values in plan.combinations(plan.axes_of([one])):
                where = put_in(one.get("positions", "target"), values)
                if where != "each":
                    bound.positions(where)


def _check_columns(plan: Plan, cases: Sequence[Case]) -> None:
    for name in label_types(cases):
        if name in plan.axes or not free(name):
            raise ArgumentError(_check.message("labels", "named as no axis and no column is", name, do="Rename it."))


def _check_sets(model: OpenedModel, plan: Plan) -> None:
    """Arguments of `locate` that do not depend on the prompt."""
    for name, one in plan.locate.items():
        for values in plan.combinations(plan.axes_of(one)):
            asked = substituted(one, values)
            if "sites" in asked:
                check_sites(model, as_list(asked["sites"]))
            elif "like" in asked:
                _check.whole(f"set {name}: draw", asked.get("draw", 0), 0)
            else:
                _check_search(model, name, asked)


def _check_donors(model: OpenedModel, plan: Plan) -> None:
    """Prompts that the plan itself names as donors can be run on the model."""
    for name, arm in plan.intervene.items():
        for given in (one[key] for one in arm for key in DONORS if key in one):
            for donor in as_list(given) if referred(given) is None else ():
                try:
                    bind(prompt_of(donor), model.tokenizer, model)
                except PromptError as error:
                    raise PromptError(f"a donor of arm {name}: {error}") from error


def _check_search(model: OpenedModel, name: str, asked: Mapping[str, Any]) -> None:
    _check.choice(f"set {name}: kind", asked.get("kind", "neuron"), KINDS)
    _check.whole(f"set {name}: k", asked.get("k", 10), 1)
    _check.layers(asked.get("layers"), model.anatomy.n_layers, model=model.name)
    score = asked.get("score", "log_prob_increase")
    if not isinstance(score, str) or score == "all":
        raise ArgumentError(_check.message(f"set {name}: score", "one score's name", score))
    check_scores([score], asked.get("norm", "frozen"))
    if not isinstance(asked.get("worst", False), bool):
        raise ArgumentError(_check.message(f"set {name}: worst", "true or false", asked["worst"]))


def check_sites(model: OpenedModel, given: Sequence[Any]) -> int:
    """How many sites texts of sites and slices name in a model; sources are counted as one.

    Raises:
        SiteError: one does not exist.
    """
    found = 0
    for site in expand(as_sites(given), model.anatomy, 0):
        if isinstance(site, Edge):
            for side in (site.writer, site.reader):
                (side.site if isinstance(side, At) else side).resolve(model.anatomy)
        else:
            (site.site if isinstance(site, At) else site).resolve(model.anatomy)
        found += 1
    return found


def _rows_about(model: OpenedModel, plan: Plan, case: Case, bound: BoundPrompt) -> int:
    """Build every operation once on a stand-in for located sites; about how many rows a prompt has."""
    scene = Scene(model.anatomy, bound, case, lambda name, values: _stand_in(model, plan, name, values))
    own = own_tokens(bound)
    total = 0
    for arm in plan.intervene.values():
        for values in plan.combinations(plan.axes_of(arm)):
            rows = 1
            for one in arm:
                named = [site for some in sites_of(scene, one["sites"], values) for site in as_list(some)]
                each = put_in(one.get("positions", "target"), values) == "each"
                located = any(referred(text) in plan.locate for text in as_list(one["sites"]))
                count = check_sites(model, named)
                if each and any(isinstance(site, At) for site in as_sites(named)):
                    must = "without an @position of their own where positions is 'each'"
                    raise ArgumentError(_check.message("sites", must, one["sites"]))
                built = build(scene, dict(one) | ({"positions": "target"} if each else {}), values, own)
                if not located:
                    _check_values(model, bound, built)
                rows *= (max(count, 10 if located else 1) if one.get("each") else 1) * (
                    (bound.position + 1) if each else 1
                )
            total += rows
    return total


def _check_values(model: OpenedModel, bound: BoundPrompt, one: Intervention) -> None:
    """Numbers and vectors fit the model. What depends on the prompt is said when it is its turn."""
    with suppress(SiteError, PromptError, InterventionError):
        Resolver(Place(model, bound)).resolve([one])


def _stand_in(model: OpenedModel, plan: Plan, name: str, values: Mapping[str, Any]) -> list[Any]:
    """One site of the kind that a set will have, to see whether an operation takes it."""
    one = plan.locate[name]
    if "sites" in one:
        return [text for text in as_list(one["sites"]) if referred(text) is None]
    kind = put_in((plan.locate[one["like"]] if "like" in one else one).get("kind", "neuron"), values)
    for text in STAND_INS[kind]:
        try:
            return [next(expand(as_sites(text), model.anatomy, 0))]
        except SiteError:
            continue
    return []

"""What is done on the theatre's stage, and what comes of it; no page in it.

`Acts` are the operations so far: knobs (a coefficient scaled or clamped) and cuts (an edge). `measured` runs them, all
at once, as `resid_surgery.intervene` does; `continued` goes on generating under them. `a_site`, `a_cut` and `a_value`
read what was typed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import pandas as pd
import torch

from resid_surgery._check import choice, message, whole
from resid_surgery.addresses import Edge, parse_site
from resid_surgery.errors import ArgumentError, InterventionError, SiteError
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import token_text
from resid_surgery.sites import Head, HeadSource, Neuron, Site
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.altering import under
from resid_surgery.surgery.effects import Effect, intervene
from resid_surgery.surgery.engine import device_of
from resid_surgery.surgery.interventions import Clamp, Cut, Intervention, Scale
from resid_surgery.surgery.reading import recorded
from resid_surgery.surgery.resolving import Resolver, Scene
from resid_surgery.views.theatre import Stage

MODES = ("scale", "clamp")
MOST_ACTS, MOST_NEW, MOST_VALUE = 20, 40, 1000
TURNED = (-2.0, 4.0)  # how far a factor's slider goes


@final
@dataclass(frozen=True)
class Knob:
    """One subvalue's slider.

    Attributes:
        site: a neuron, a head, or a (head, source). mode: "scale" (a factor; 1 changes nothing) or "clamp"
            (a neuron's coefficient, held). value: the factor or the coefficient.
    """

    site: Site
    mode: Literal["scale", "clamp"] = "scale"
    value: float = 1.0

    @property
    def operation(self) -> Intervention | None:
        """What it does; None where it stands at a factor of 1."""
        if self.mode == "clamp":
            return Clamp([self.site], self.value)
        return None if self.value == 1.0 else Scale([self.site], self.value)


@final
@dataclass(frozen=True)
class Acts:
    """The operations so far.

    Attributes:
        knobs: one a subvalue, in the order in which they were added. cuts: one edge each.
    """

    knobs: tuple[Knob, ...] = ()
    cuts: tuple[Cut, ...] = ()

    @property
    def operations(self) -> tuple[Intervention, ...]:
        """What is done: knobs that stand at 1 are left out."""
        return (*filter(None, (knob.operation for knob in self.knobs)), *self.cuts)

    def turned(self, knob: Knob) -> "Acts":
        """With a knob added, or in place of the one of its site."""
        if any(one.site == knob.site for one in self.knobs):
            return replace(self, knobs=tuple(knob if one.site == knob.site else one for one in self.knobs))
        return replace(self, knobs=(*self.knobs, knob))

    def cut(self, edge: Cut) -> "Acts":
        """With an edge cut; cutting it twice is cutting it."""
        return self if edge in self.cuts else replace(self, cuts=(*self.cuts, edge))

    def without(self, gone: Site | Cut) -> "Acts":
        """Without the knob of a site, or without a cut."""
        knobs = tuple(one for one in self.knobs if one.site != gone)
        return Acts(knobs, tuple(one for one in self.cuts if one != gone))


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What operations did.

    Attributes:
        effect: of `resid_surgery.intervene`; None where nothing is operated on.
        distribution: token, token_id, role ("target", "versus", "top"), prob_before, prob_after, bs_before, bs_after
            (logits before a soft-cap): target, competitors, and the most probable tokens of both runs.
    """

    effect: Effect | None
    distribution: pd.DataFrame


def a_site(stage: Stage, text: Any) -> Site:
    """The neuron, head or (head, source) that a text names.

    Raises:
        SiteError: it names something else, or nothing that the model and the prompt have.
    """
    site = parse_site(text) if isinstance(text, str) else None
    if not isinstance(site, (Neuron, Head, HeadSource)):
        raise SiteError(message("site", "a neuron, a head or a (head, source): L20.N1297, L12.H4, L12.H4<3", text))
    checked(stage, [Scale([site], 0.0)])
    return site.resolve(stage.rec.model.anatomy)


def a_cut(stage: Stage, writer: Any, reader: Any, side: str = "all", norm: str = "live") -> Cut:
    """The cut of an edge that texts name.

    Raises:
        SiteError: no such edge in this model.
    """
    for name, text in (("writer", writer), ("reader", reader)):
        if not isinstance(text, str) or not text.strip():
            raise SiteError(message(name, "a site, such as L20.mlp", text))
    edge = Edge(writer.strip(), reader.strip(), side, norm)  # type: ignore[arg-type]
    cut = Cut(edge.resolve(stage.rec.model.anatomy))
    checked(stage, [cut])
    return cut


def a_value(value: Any) -> float:
    """A slider's or a field's number, to five digits.

    Raises:
        ArgumentError: it is none, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST_VALUE:
        raise ArgumentError(message("value", f"a number from {-MOST_VALUE} to {MOST_VALUE}", value))
    return _digits(value)


def a_length(new: Any) -> int:
    """How many tokens are generated; a field's number comes as 12 or 12.0.

    Raises:
        ArgumentError: it is none, or out of bounds.
    """
    return whole("new", int(new) if isinstance(new, float) and new.is_integer() else new, 1, MOST_NEW)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def checked(stage: Stage, operations: Sequence[Intervention]) -> None:
    """Refuse operations that cannot be carried out together; no forward runs.

    Raises:
        InterventionError, SiteError: as `resid_surgery.intervene`.
    """
    if len(operations) > MOST_ACTS:
        raise InterventionError(message("operations", f"at most {MOST_ACTS} in the theatre", len(operations)))
    if operations:
        Resolver(Scene.of(stage.rec)).resolve(tuple(operations))


def span(stage: Stage, knob: Knob) -> tuple[float, float]:
    """How far a knob's slider goes: factors from -2 to 4, coefficients as far as four times the clean one."""
    low, high = TURNED
    if knob.mode == "clamp":
        high = max(1.0, 4 * abs(coefficient(stage, knob.site)))
        low = -high
    return min(low, knob.value), max(high, knob.value)


def in_mode(stage: Stage, site: Site, mode: str) -> Knob:
    """A knob that changes nothing yet: a factor of 1, or the clean coefficient.

    Raises:
        ArgumentError: another mode, or clamping what has no coefficient.
    """
    choice("mode", mode, MODES)
    return Knob(site, "clamp", _digits(coefficient(stage, site))) if mode == "clamp" else Knob(site)


def coefficient(stage: Stage, site: Site) -> float:
    """A neuron's coefficient in the clean run (coefficient score).

    Raises:
        ArgumentError: the site has none.
    """
    if not isinstance(site, Neuron):
        raise ArgumentError(message("site", "a neuron, which has a coefficient", str(site)))
    return float(recorded(stage.rec, site))


def measured(stage: Stage, operations: Sequence[Intervention], *, top: int = 8) -> Outcome:
    """Run operations, all at once, and read the distribution before and after.

    Args:
        stage: a prompt. operations: none, or some. top: most probable tokens of each run that are listed.

    Returns:
        `Outcome`; its numbers are those of `resid_surgery.intervene`.

    Raises:
        InterventionError, SiteError: they cannot be carried out.
    """
    whole("top", top, 1)
    checked(stage, operations)
    effect = intervene(stage.rec, list(operations)) if operations else None
    return Outcome(effect, _distribution(stage.rec, effect, top))


def _distribution(rec: Recording, effect: Effect | None, top: int) -> pd.DataFrame:
    before, bs_before = (rec.logits, rec.bs_values) if effect is None else (effect.before.logits, effect.before.bs)
    after, bs_after = (before, bs_before) if effect is None else (effect.after.logits, effect.after.bs)
    p0, p1 = (torch.softmax(rec.work(logits), -1) for logits in (before, after))
    named = {i: role for i, _, role in rec.prompt.roles()}
    wanted = list(dict.fromkeys([*named, *(int(i) for p in (p1, p0) for i in p.topk(min(top, len(p))).indices)]))
    columns = {"prob_before": p0, "prob_after": p1, "bs_before": bs_before, "bs_after": bs_after}
    table = pd.DataFrame({"token": [token_text(i, rec.model.tokenizer) for i in wanted], "token_id": wanted})
    table["role"] = [named.get(i, "top") for i in wanted]
    for name, values in columns.items():
        table[name] = [float(values[i]) for i in wanted]
    return table


def continued(
    stage: Stage, operations: Sequence[Intervention], new: int = 12, *, tell: Callable[[str], bool] = lambda _: False
) -> str:
    """What is generated after the prompt, greedily, with operations at every predicting position, or with none.

    Args:
        stage: a prompt. operations: none, or some. new: how many tokens, up to `MOST_NEW`.
        tell: called with the text so far after each token; True stops.

    Returns:
        The text.
    """
    whole("new", new, 1, MOST_NEW)
    model, ids = stage.rec.model, torch.tensor([stage.rec.prompt.ids])

    def text(some: list[int]) -> str:
        return str(model.tokenizer.decode(some, skip_special_tokens=True))

    def heard(sequences: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = tell(text(sequences[0, ids.shape[1] :].tolist()))
        return torch.full((len(sequences),), stop, dtype=torch.bool, device=sequences.device)

    options: dict[str, Any] = {"max_new_tokens": new, "stopping_criteria": [heard]}
    if operations:
        with under(model, list(operations)) as altered:
            return text(altered.generate(ids, **options)[0].tolist())
    ids = ids.to(device_of(model))
    plain = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": _pad(model)}
    with model.lock, GradKept(), torch.no_grad():
        out = model.shadow.generate(ids, **plain, **options)  # type: ignore[operator]
    return text(out[0, ids.shape[1] :].tolist())


def _pad(model: OpenedModel) -> int:
    given = getattr(model.module.generation_config, "pad_token_id", None)
    return 0 if given is None else int(given)

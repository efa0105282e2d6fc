"""Validating: what else did an edit change? Every stage, judged gate by gate.

0. The weights alone: which tensors and rows changed, by how much, what the changed vectors promote.
1. Exposure, on the base alone: where in a text does the edited part act at all? Probes are taken from there.
2. Paired forwards: the same tokens through base and edited model, on every axis, beside a null control, random
   directions and random places.
3. For several edits: one after the other, with what is left of the earlier ones.

Gates turn this into PASS, FAIL or INCONCLUSIVE by the bounds of intervals, never by means alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.addresses import At
from resid_surgery.editing.asking import Inquiry, ask_all, divergence_on, effects_on
from resid_surgery.editing.auditing import audit, cast_survival, overall_cosine
from resid_surgery.editing.budgets import Budget, Clock, budget_of, spread, thinned
from resid_surgery.editing.controls import control_edits
from resid_surgery.editing.edits import Edit, read_edit, versions
from resid_surgery.editing.exposing import exposable
from resid_surgery.editing.exposure import exposure, exposure_probes
from resid_surgery.editing.gating import judge, verdict
from resid_surgery.editing.policy import Policy
from resid_surgery.editing.predicting import exposed_and_measured
from resid_surgery.editing.probes import Probe, ProbeSet, probe_set
from resid_surgery.editing.relations import probes as relation_probes
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.reports import Validation
from resid_surgery.editing.running import CallableSubject, OperatedSubject, Subject, WeightsSubject, first_block
from resid_surgery.editing.streams import ask_stream
from resid_surgery.editing.surroundings import locality_sequences, text_passage
from resid_surgery.editing.texts import corpus, general_probes
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of
from resid_surgery.stream.recording import need_model
from resid_surgery.surgery.altering import Altered

CONTROL_FACTS, CONTROL_PROBES, CONTROL_BYTES = 8, 6, 100 << 20
PARTS, EXPOSED, PREDICTED_TOKENS = 10, 100, 600
TINY = 1e-12
JUDGED = ("efficacy", "paraphrase", "locality", "text", "choice")


def validate(
    model: OpenedModel,
    edit: Any,
    probes: ProbeSet | Sequence[Probe] | None = None,
    *,
    budget: str | Budget = "smoke",
    policy: Policy | Mapping[str, tuple[float, float]] | None = None,
    general: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Validation:
    """What an edit changed besides what it was to change, with intervals, controls and a verdict.

    Args:
        model: the base, from `resid_surgery.load`; it is never written to.
        edit: an `Edit`; a list of them (a stream: each is added to those before it); an edited model (opened, a Hugging
            Face module, or the folder or name of a checkpoint), whose difference is taken; or a function of (row,
            position) token ids that gives logits, of which behaviour alone is checked.
        probes: what to ask. None: what is known of the edit's own rewrites (see `resid_surgery.probes`). Given ones
            are asked in their place: `probes(edit.rewrites) + others` asks both. Without efficacy probes (an edit from
            elsewhere knows no rewrites) only side effects are judged.
        budget: "smoke" (under two minutes for a 135M-parameter model on two cores), "standard" or "full".
        policy: gate -> (warn, fail) limits other than the built-in ones.
        general: add built-in texts, questions and prompts for axes that `probes` has none of.
        seed: of bootstrap and random controls. progress: on a terminal.

    Returns:
        A `Validation`: ``.verdict``, ``.gates``, ``.tables``, ``.manifest``.

    Raises:
        ArgumentError: the edit changes no weight; unknown budget or gate. StaleRecordingError: it was made for other
            weights, or the model changed while it was asked. PromptError: a probe cannot be used with the model's
            tokenizer.
    """
    _check.progress(progress)
    need_model(model)
    seed, general = _check.seed(seed), _check.flag("general", general)
    limits = policy if isinstance(policy, Policy) else Policy().but(policy)
    size = budget_of(budget)
    stream = list(edit) if isinstance(edit, (list, tuple)) else None
    whole, function = _taken(model, edit, stream)
    asked = _probes(model, whole, probes, general=general)
    facts = {p.fact for p in asked.of("efficacy") if p.fact}
    probe_hash = thinned(asked, size).hash  # of what every edit is asked; contexts of high exposure are its own
    with progress_bar("validating", PARTS + len(stream or ()), shown=progress) as step:
        clock = Clock()
        tables: dict[str, pd.DataFrame] = {}
        if whole is not None and whole.changes:
            tables |= _weights(model, whole, clock)
            step("weights")
            more, exposed = _exposed(model, whole, asked, size, clock)
            asked, tables = asked + more, tables | exposed
            step("exposure")
        few = thinned(asked, size)
        with _subject(model, whole, function) as subject:
            q = Inquiry(Remembered(model), subject, few, size, clock, step)
            if stream is not None:
                _ask_stream(q, stream, step)
            ask_all(q)
            if whole is not None and whole.changes:
                _predicted(q, whole)
                _controls(q, whole, seed)
                q.tables["cast"] = cast_survival(model, whole)
                q.gate("cast cosine", [("", "", overall_cosine(q.tables["cast"]))], "exact")
            step("controls")
        q.base.require_same()
    gates = judge(q.measured, stream=len(facts) > 1 or stream is not None, policy=limits, seed=seed)
    tables |= q.tables | {"cost": clock.table()}
    manifest = _manifest(q, whole, asked, limits, seed, function) | {
        "probe_hash": probe_hash, "not_asked": [*asked.ignored, *_absent(gates, whole)],
    }  # fmt: skip
    return Validation(verdict(gates), gates, tables, manifest)


def _taken(model: OpenedModel, edit: Any, stream: list[Any] | None) -> tuple[Edit | None, Callable[[Any], Any] | None]:
    """(edit with everything in it, function): one of the two is None."""
    if stream is not None:
        if not stream or not all(isinstance(one, Edit) for one in stream):
            raise ArgumentError(_check.message("edit", "an Edit, or a list of at least one", edit))
        if any(len(one.rewrites) != 1 for one in stream):
            raise ArgumentError(
                "`edit` must be edits of one rewrite each to be a stream: retention is asked fact by fact."
            )
        if any(one.interventions for one in stream):
            raise ArgumentError("`edit` must be edits of weights to be a stream; one of them works by interventions.")
        whole = stream[0]
        for one in stream[1:]:
            whole = whole + one
        return _changing(model, whole), None
    if isinstance(edit, Edit):
        return _changing(model, edit), None
    if isinstance(edit, (str, Path)):
        return _changing(model, read_edit(model, edit)), None
    if isinstance(edit, (OpenedModel, nn.Module)):
        return Edit.from_models(model, edit), None
    if callable(edit):
        return None, edit
    raise ArgumentError(
        _check.message("edit", "an Edit, a list of them, an edited model or a function giving logits", edit)
    )


def _changing(model: OpenedModel, edit: Edit) -> Edit:
    """An edit that changes something, and can be read along with its answers."""
    if edit.empty:
        raise ArgumentError(f"`edit` must change some weight of {model.name}; {edit!r} adds nothing to any.")
    if any(one.positions != "all" or any(isinstance(s, At) for s in one.sites) for one in edit.interventions):
        raise ArgumentError(
            "`edit` must act at positions='all' to be validated: prompts are read together with their answers."
        )
    held = tensors_of(model.module)
    if not edit.interventions and all(torch.equal(new, held[p]) for p, new in edit.new_tensors(model).items()):
        raise ArgumentError(
            f"`edit` must change some weight of {model.name}; {edit!r} is lost in rounding to {model.dtype}."
        )
    return edit


def _absent(gates: pd.DataFrame, edit: Edit | None) -> list[str]:
    """Gates that judged nothing, in words."""
    wanted = ["kl: neighbourhood", "kl: unrelated text", "perplexity drift", "capability margin"]
    if edit is None or edit.rewrites:
        wanted += ["paraphrase: new above old", "kl: edit prepended"]
    return [f"no gate {name!r}: no probe reaches it" for name in wanted if name not in set(gates["gate"])]


def _probes(
    model: OpenedModel, edit: Edit | None, given: ProbeSet | Sequence[Probe] | None, *, general: bool
) -> ProbeSet:
    """What is asked: the given probes, or those known of the edit's rewrites; and general ones for axes without any."""
    if model.tokenizer is None:
        raise ArgumentError(f"{model.name} was opened without a tokenizer; probes are texts. Open it with tokenizer=.")
    if given is None:
        asked = relation_probes(edit.rewrites) if edit is not None and edit.rewrites else probe_set((), "built-in")
    else:
        asked = given if isinstance(given, ProbeSet) else probe_set(given, "given")
    if not general and not len(asked.of(*JUDGED)):
        raise ArgumentError(f"`probes` must hold some of {', '.join(JUDGED)} where `general` is False; got {asked!r}.")
    _need_answerable(model, asked)
    meant = {p.text for p in asked.of("efficacy", "paraphrase")}  # what one fact is told is no neighbour of another
    kept = tuple(p for p in asked if p.axis != "locality" or p.text not in meant)
    asked = ProbeSet(kept, asked.name, asked.rewrites, asked.ignored)
    if not general:
        return asked
    held = {(p.axis, p.stratum == "unrelated") for p in asked}
    more = [p for p in general_probes() if (p.axis, p.stratum == "unrelated") not in held]
    return asked + probe_set(more, "general")


def _need_answerable(model: OpenedModel, asked: ProbeSet) -> None:
    """Refuse probes that name nothing to be said, and texts in which nothing follows."""
    for p in asked.of("efficacy", "paraphrase"):
        if p.target is None and p.old is None:
            raise PromptError(f"`probes` of {p.axis} must name a target, an old answer or both; {p.text!r} has none.")
    locality_sequences(model, asked.of("locality").probes)  # refuses what is longer than the context
    for p in asked.of("text"):
        if len(text_passage(model, p.text, 2).ids) < 2:
            raise PromptError(f"`probes` of text must have two tokens at least for {model.name}; {p.text!r} has one.")


def _weights(model: OpenedModel, edit: Edit, clock: Clock) -> dict[str, pd.DataFrame]:
    """Stage 0."""
    with clock.part("weights", 0):
        return audit(model, edit)


def _exposed(
    model: OpenedModel, edit: Edit, asked: ProbeSet, budget: Budget, clock: Clock
) -> tuple[ProbeSet, dict[str, pd.DataFrame]]:
    """Stage 1: where the edit acts in the texts at hand; contexts of high, middle and zero exposure as probes."""
    if not exposable(model, edit):
        return probe_set(()), {}
    texts = [p.text for p in asked.of("text")] or corpus()
    with clock.part("exposure", len(texts), budget.exposure_tokens):
        table = exposure(model, edit, texts, tokens=budget.exposure_tokens, progress=False)
        n = min(budget.exposed, table["context"].nunique() // 4)
        chosen = exposure_probes(table, high=n, middle=n, zero=n)
    return chosen, {"exposure": table.nlargest(EXPOSED, "exposure").reset_index(drop=True)}


def _predicted(q: Inquiry, edit: Edit) -> None:
    """How well exposure, known before any edited forward, ranks what was measured."""
    texts = [p.text for p in q.of("text")]
    if not texts or edit.interventions or not exposable(q.model, edit):
        return
    limit = min(q.budget.exposure_tokens, PREDICTED_TOKENS)
    with q.clock.part("exposure against KL", len(texts), 2 * limit):
        table = exposed_and_measured(q.model, edit, q.edited, texts, limit)
    q.tables["exposure_kl"] = pd.DataFrame([{"positions": len(table), **table.attrs}])


@contextmanager
def _subject(model: OpenedModel, edit: Edit | None, function: Callable[[Any], Any] | None) -> Iterator[Subject]:
    """The edited model as something to ask."""
    if edit is None:
        assert function is not None
        yield CallableSubject(function, model, getattr(function, "__name__", "function"))
        return
    with edit.applied(model) as handle:
        if isinstance(handle, Altered):
            yield OperatedSubject(handle, "edited")
        else:
            yield WeightsSubject(handle, "edited", first_block(model, edit))


def _ask_stream(q: Inquiry, edits: Sequence[Edit], step: Callable[..., None]) -> None:
    """Stage 3, on the efficacy probe of each edit's own fact."""
    by_fact = {(p.fact, p.target): p for p in reversed(q.probes.of("efficacy").probes)}
    told = [(one.rewrites[0].label, one.rewrites[0].new) for one in edits]
    missing = [fact for fact, new in told if (fact, new) not in by_fact]
    if missing:
        raise ArgumentError(f"`probes` must hold an efficacy probe of every edit of a stream; {missing[0]!r} has none.")
    ask_stream(q, edits, [by_fact[one] for one in told], step)


def _controls(q: Inquiry, edit: Edit, seed: int) -> None:
    """The edit beside random directions and places: effect on its facts, divergence on what should have stayed."""
    facts = spread(q.of("efficacy"), CONTROL_FACTS)
    near = [p for p in q.of("locality") if p.stratum in ("same relation", "same subject", "unrelated")]
    stay = spread(near, CONTROL_PROBES)
    if edit.interventions or not (facts or stay):
        return
    controls = control_edits(q.model, edit, sites=q.budget.sites, directions=q.budget.directions, seed=seed)
    rows: list[dict[str, Any]] = []
    effects: list[list[float]] = []
    with q.clock.part("controls", len(controls)):
        for some in _together([("the edit", edit), *controls], q.model):
            with ExitStack() as handles:
                subjects = [
                    WeightsSubject(handles.enter_context(one.applied(q.model)), kind, first_block(q.model, one))
                    if not one.empty
                    else q.base.subject  # a scaling of rows that are zero
                    for kind, one in some
                ]
                found = [effects_on(q.base, subject, facts) for subject in subjects]
                kls = divergence_on(q.base, subjects, stay) if stay else [None] * len(some)
            for (kind, _), effect, kl in zip(some, found, kls, strict=True):
                mean = sum(effect) / len(facts) if facts else None
                rows.append({"control": kind, "draw": len(rows), "effect": mean, "kl": kl})
            effects += found
    q.tables["controls"] = pd.DataFrame(rows).astype({"effect": float, "kl": float})
    q.tables["control_ratios"] = _ratios(q.tables["controls"])
    if facts:
        beside = [sum(abs(one[i]) for one in effects[1:]) / len(controls) for i in range(len(facts))]
        values = [(p.fact, p.text, effect) for p, effect in zip(facts, effects[0], strict=True)]
        if len({p.fact for p in facts}) > 1:
            q.gate("efficacy / random control", values, "mean", base=beside)
        else:
            ratio = sum(effects[0]) / max(sum(beside), TINY)
            q.gate("efficacy / random control", [(facts[0].fact, facts[0].text, ratio)], "exact")


def _ratios(table: pd.DataFrame) -> pd.DataFrame:
    """The edit's figures over the mean size of its controls', kind by kind."""
    own, others = table.iloc[0], table.iloc[1:]
    out = []
    for figure in ("effect", "kl"):
        for kind, some in others.groupby("control", sort=False):
            size = some[figure].abs().mean()
            out.append({"figure": figure, "control": kind, "draws": len(some), "edit": own[figure], "controls": size,
                        "ratio": own[figure] / max(size, TINY) if size == size else None})  # fmt: skip
    return pd.DataFrame(out)


def _together(edits: Sequence[tuple[str, Edit]], model: OpenedModel) -> Iterator[list[tuple[str, Edit]]]:
    """As many edits at a time as their own tensors fit in memory, so that the base need not run for each."""
    sizes = {path: tensor.numel() * tensor.element_size() for path, tensor in tensors_of(model.module).items()}
    some: list[tuple[str, Edit]] = []
    total = 0
    for one in edits:
        size = sum(sizes[change.name] for change in one[1].changes)
        if some and total + size > CONTROL_BYTES:
            yield some
            some, total = [], 0
        some.append(one)
        total += size
    yield some


def _manifest(
    q: Inquiry, edit: Edit | None, asked: ProbeSet, policy: Policy, seed: int, function: Callable[[Any], Any] | None
) -> dict[str, Any]:
    model = q.model
    return {
        "model": model.name,
        "fingerprint": q.base.fingerprint,
        "standing": q.base.standing.hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "edit": "behaviour only: " + getattr(function, "__name__", "function") if edit is None else repr(edit),
        "edit_hash": "not applicable" if edit is None else edit.hash,
        "edit_about": {} if edit is None else dict(edit.about),
        "rewrites": [] if edit is None else [one.said() for one in edit.rewrites],
        "probes": asked.name,
        "exposed_hash": q.probes.hash,
        "asked": len(q.probes),
        "budget": asdict(q.budget),
        "policy": policy.said,
        "seed": seed,
        "remembered": {"found": q.base.found, "asked": q.base.asked},
        "versions": versions(),
    }

"""Asking: every axis of a validation, as tables and as what the gates judge."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pandas as pd
import torch

from resid_surgery.editing.answering import (
    Answers,
    answer_questions,
    answer_table,
    choice_questions,
    choice_table,
    ripple_questions,
    ripple_table,
)
from resid_surgery.editing.budgets import Budget, Clock, spread
from resid_surgery.editing.controls import NullSubject
from resid_surgery.editing.gating import Measured
from resid_surgery.editing.intervals import mcnemar
from resid_surgery.editing.probes import Probe, ProbeSet
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.running import Compared, Passage, Subject, compared, figures
from resid_surgery.editing.surroundings import (
    compared_where,
    generation_tables,
    locality_sequences,
    locality_table,
    rival_sequences,
    text_table,
    worst_prompts,
)
from resid_surgery.models.opening import OpenedModel

NEAR = ("same relation", "same subject")
NULL_PROBES = 4
GATES = {"edit prepended": "kl: edit prepended", "unrelated": "kl: unrelated text"}
KL_GATES = ("kl: neighbourhood", *GATES.values())


@final
@dataclass
class Inquiry:
    """Base and edited model with the probes that they are asked; tables and measurements as they come.

    Attributes:
        base: whose answers are remembered. edited: the other. probes: thinned. budget: limits. clock: costs.
        tables: name -> table. measured: for the gates. noise: gate -> noise floor, from the null control.
    """

    base: Remembered
    edited: Subject
    probes: ProbeSet
    budget: Budget
    clock: Clock
    step: Callable[..., None]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> OpenedModel:
        """The base."""
        return self.base.subject.model

    def of(self, *axes: str) -> list[Probe]:
        """Probes of some axes."""
        return list(self.probes.of(*axes))

    def gate(
        self, name: str, rows: Iterable[tuple[str, str, float]], kind: str, *, base: Sequence[float] = (), **more: Any
    ) -> None:
        """Hand a gate what it judges, (fact, prompt, value) rows; nothing, where nothing was measured, or where it was
        measured before (a stream's efficacy is asked right after each edit)."""
        values = pd.DataFrame(list(rows), columns=["fact", "prompt", "value"])
        values["value"] = values["value"].astype(float)
        if len(base):
            values["base"] = list(base)
        if len(values) and all(one.gate != name for one in self.measured):
            self.measured.append(Measured(name, values, kind, self.noise.get(name, 0.0), **more))


def ask_all(inquiry: Inquiry) -> None:
    """Every axis, the null control first: it sets the noise floors."""
    for name, part in (("null control", ask_null), ("efficacy", ask_answers), ("ripple", ask_ripple),
                       ("locality", ask_locality), ("text", ask_texts), ("capability", ask_choices),
                       ("generation", ask_generation)):  # fmt: skip
        part(inquiry)
        inquiry.step(name)


def ask_null(q: Inquiry) -> None:
    """The base against itself, row by row: how far figures are from 0 where nothing was changed."""
    model, null = q.model, NullSubject(q.model)
    rows = []
    strata = {gate: [p for p in q.of("locality") if _gate_of(p) == gate] for gate in KL_GATES}
    with q.clock.part("null control", 0) as cost:
        for gate, probes in strata.items():
            chosen = spread(probes, NULL_PROBES)
            if not chosen:
                continue
            passages = locality_sequences(model, chosen)
            found = compared(q.base.subject, [null], passages, whole=False)[0]
            kl = torch.cat([one.kl for one in found])
            flips = torch.cat([one.flips for one in found]).double().mean()
            rows.append({"gate": gate, "noise": float(kl.double().abs().mean()), "largest": float(kl.abs().max()),
                         "flips": float(flips), "probes": len(chosen)})  # fmt: skip
            _cost(cost, passages, 2, len(chosen))
        texts = spread(q.of("text"), 2)
        if texts:
            change = text_table(q.base, null, texts, q.budget.text_tokens)["change"].abs()
            rows.append({"gate": "perplexity drift", "noise": math.expm1(change.mean()), "largest": float(change.max()),
                         "probes": len(texts)})  # fmt: skip
    table = pd.DataFrame(rows, columns=["gate", "noise", "largest", "flips", "probes"])
    q.tables["noise"] = table
    q.noise |= dict(zip(table["gate"], table["noise"], strict=True))
    flipped = table.loc[table["gate"] == GATES["unrelated"], "flips"]
    q.noise["top-1 flips: unrelated text"] = float(flipped.iloc[0]) if len(flipped) else 0.0


def ask_answers(q: Inquiry) -> None:
    """Efficacy and paraphrases: what was to change."""
    probes = q.of("efficacy", "paraphrase")
    if not probes:
        return
    answers = Answers(q.base, q.edited)
    with q.clock.part("efficacy and paraphrase", len(probes)) as cost:
        answers.ask(answer_questions(probes))
        table = answer_table(answers, probes, decoded=q.model.tokenizer is not None)
        cost["tokens"] = answers.tokens
    q.tables["answers"] = table
    here, again = table[table["axis"] == "efficacy"], table[table["axis"] == "paraphrase"]
    q.gate("efficacy: new above old", _rows(here, "above_after"), "rate")
    if "free" in table:
        q.gate("efficacy: free decoding", _rows(here, "free"), "rate")
    erased = here[here["new"].isna() & here["old"].notna()]
    q.gate("efficacy: old answer dropped", _rows(erased, "old_change"), "mean")
    q.gate("paraphrase: new above old", _rows(again, "above_after"), "rate")
    q.tables["facts"] = _by_fact(table)


def ask_ripple(q: Inquiry) -> None:
    """Portability: what should follow from the new fact, among tests whose conditions hold before the edit."""
    probes = q.of("ripple")
    if not probes:
        return
    answers = Answers(q.base, q.edited)
    conditions, tests = ripple_questions(probes)
    with q.clock.part("ripple", len(probes)) as cost:
        answers.ask_base(conditions)
        answers.ask(tests)
        cost["tokens"] = answers.tokens
    table = ripple_table(answers, probes)
    q.tables["ripple"] = table
    run = table[table["executed"]]
    held = table.groupby("criterion").size()
    rates = run.groupby("criterion")[["before", "after"]].mean().astype(float).reindex(held.index)
    q.tables["ripple_rates"] = pd.DataFrame({
        "criterion": held.index, "tests": held.to_numpy(),
        "executed": run.groupby("criterion").size().reindex(held.index, fill_value=0).to_numpy(),
        "passed_before": rates["before"].to_numpy(), "passed_after": rates["after"].to_numpy(),
    })  # fmt: skip


def ask_locality(q: Inquiry) -> None:
    """Prompts and texts that should have stayed: KL(base, edited) by stratum, and the worst of them."""
    probes = q.of("locality")
    if not probes:
        return
    passages, rivals = locality_sequences(q.model, probes), rival_sequences(q.model, probes)
    with q.clock.part("locality", len(probes)) as cost:
        found = compared(q.base.subject, [q.edited], passages)[0]
        beside = compared_where(q.base.subject, [q.edited], rivals, whole=False)[0]
        _cost(cost, [*passages, *(r for r in rivals if r is not None)], 2)
    table = locality_table(q.model, probes, found, beside)
    q.tables["locality"] = table
    q.tables["strata"] = _by_stratum(table)
    gates = pd.Series([_gate_of(p) for p in probes], index=table.index)
    for gate in KL_GATES:
        part = table[gates == gate]
        q.gate(gate, _rows(part, "kl"), "mean", **_units(part, gate))
    q.gate("top-1 flips: unrelated text", _flips(probes, found), "rate")
    with q.clock.part("worst prompts", q.budget.worst):
        worst, shares = worst_prompts(q.base.subject, q.edited, table, passages, most=q.budget.worst)
    q.tables["worst"], q.tables["shares"] = worst, shares


def ask_texts(q: Inquiry) -> None:
    """Running text: the change of its likelihood."""
    probes = q.of("text")
    if not probes:
        return
    with q.clock.part("text", len(probes)) as cost:
        table = text_table(q.base, q.edited, probes, q.budget.text_tokens)
        cost["tokens"] = 2 * int(table["tokens"].sum())
    q.tables["texts"] = table.sort_values("change", ascending=False).reset_index(drop=True)
    rows = [("", f"text {i}", float(change)) for i, change in enumerate(table["change"])]
    q.gate("perplexity drift", rows, "ratio", weights=tuple(table["tokens"].astype(float)))


def ask_choices(q: Inquiry) -> None:
    """Capability: the margin of right answers over wrong ones; its change as a share of the base's mean margin."""
    probes = q.of("choice")
    if not probes:
        return
    answers = Answers(q.base, q.edited)
    with q.clock.part("capability", len(probes)) as cost:
        answers.ask(choice_questions(probes))
        cost["tokens"] = answers.tokens
    table = choice_table(answers, probes)
    q.tables["choices"] = table
    margin = float(table["margin_before"].mean())
    if margin > 0:  # a model that knows nothing has no capability to lose
        shares = table["change"] / margin
        q.gate("capability margin", [("", t, v) for t, v in zip(table["prompt"], shares, strict=True)], "mean")
    test = mcnemar(table["right_before"], table["right_after"])
    q.tables["accuracy"] = pd.DataFrame([{
        "questions": len(table), "before": table["right_before"].mean(), "after": table["right_after"].mean(),
        "lost": test.lost, "gained": test.gained, "mcnemar_p": test.p,
    }])  # fmt: skip


def ask_generation(q: Inquiry) -> None:
    """Free text: how repetitive it became."""
    probes = q.of("generation")
    if not probes or q.model.tokenizer is None:
        return
    with q.clock.part("generation", len(probes)) as cost:
        table, texts = generation_tables(q.base, q.edited, probes, q.budget.generated)
        cost["tokens"] = 2 * q.budget.generated * len(probes)
    q.tables["generation"], q.tables["generated"] = table, texts


def effects_on(base: Remembered, subject: Subject, probes: Sequence[Probe]) -> list[float]:
    """Joint log-prob change of the new answer of each efficacy probe, nats; the drop of the old one where none is
    named."""
    questions = [(p.text, str(p.target if p.target is not None else p.old)) for p in probes]
    answers = Answers(base, subject)
    answers.ask(questions)
    signs = [1.0 if p.target is not None else -1.0 for p in probes]
    changes = [answers.after[one].log_prob - answers.before[one].log_prob for one in questions]
    return [s * c for s, c in zip(signs, changes, strict=True)]


def divergence_on(base: Remembered, subjects: Sequence[Subject], probes: Sequence[Probe]) -> list[float]:
    """Mean KL(base, each subject) over locality probes, nats per token."""
    found = compared(base.subject, subjects, locality_sequences(base.subject.model, probes), whole=False)
    return [_mean_kl(probes, one) for one in found]


def likelihood_of(subject: Subject, passages: Sequence[Passage]) -> float:
    """Mean nats per token over texts."""
    found = figures(subject, passages)
    return float(torch.cat([one.nll for one in found]).nanmean())


def _mean_kl(probes: Sequence[Probe], found: Sequence[Compared]) -> float:
    kept = [one.kl if p.target is None else one.kl[:1] for p, one in zip(probes, found, strict=True)]
    return float(torch.cat(kept).double().mean())


def _gate_of(p: Probe) -> str:
    """The KL gate that a locality probe counts under; "" for contexts of high, middle and zero exposure.

    One of no stratum is a neighbour: whoever asks it wants it to stay.
    """
    if p.stratum in NEAR or (not p.stratum and not p.criterion.endswith("exposure")):
        return "kl: neighbourhood"
    return GATES.get(p.stratum, "")


def _units(part: pd.DataFrame, gate: str) -> dict[str, Any]:
    """Unrelated texts count by their tokens."""
    return {"weights": tuple(part["tokens"].astype(float))} if gate == GATES["unrelated"] else {}


def _flips(probes: Sequence[Probe], found: Sequence[Compared]) -> list[tuple[str, str, float]]:
    out = []
    for p, one in zip(probes, found, strict=True):
        if p.stratum == "unrelated":
            out += [("", p.text, float(flip)) for flip in (one.flips if p.target is None else one.flips[:1])]
    return out


def _rows(table: pd.DataFrame, column: str) -> list[tuple[str, str, float]]:
    """What was asked; None is what was not, while a figure that is no number stays and is judged as such."""
    kept = table.loc[[i for i, one in table[column].items() if one is not None]]
    return [(str(f), str(p), float(v)) for f, p, v in zip(kept["fact"], kept["prompt"], kept[column], strict=True)]


def _by_fact(table: pd.DataFrame) -> pd.DataFrame:
    """One row a fact: efficacy, paraphrases, and how consistent they are."""
    rows = []
    for fact, group in table.groupby("fact", sort=False):
        here, again = group[group["axis"] == "efficacy"], group[group["axis"] == "paraphrase"]
        row: dict[str, Any] = {"fact": fact}
        if len(here):
            first = here.iloc[0]
            names = ("new", "old", "new_change", "old_change", "above_before", "above_after", "match_after", "free",
                     "said_before", "said_after")  # fmt: skip
            row |= {name: first[name] for name in names if name in first}
            row["replaced_by"] = first["first_after"] if pd.isna(first["new"]) else None
        row["paraphrases"] = len(again)
        for name in ("above_after", "match_after", "free"):
            if name in again and again[name].notna().any():
                row[f"paraphrase_{name}"] = float(again[name].astype(float).mean())
        said = again.get("said_after")
        if said is not None and len(said):
            words = said.str.split().str[:1].str.join(" ")
            row["consistency"] = float(words.value_counts(normalize=True).iloc[0])
        rows.append(row)
    return pd.DataFrame(rows)


def _by_stratum(table: pd.DataFrame) -> pd.DataFrame:
    """One row a stratum (and level of exposure): KL's mean, median, p95 and largest, and what stands beside it."""
    rows = []
    for (stratum, criterion), g in table.groupby(["stratum", "criterion"], sort=False):
        weights = g["tokens"] / g["tokens"].sum()
        rows.append({
            "stratum": stratum, "criterion": criterion, "probes": len(g), "tokens": int(g["tokens"].sum()),
            "kl_mean": float((g["kl"] * weights).sum()), "kl_median": float(g["kl"].median()),
            "kl_p95": _p95(g["kl"]), "kl_max": float(g["kl_max"].max()),
            "js": float((g["js"] * weights).sum()), "flips": float((g["flips"] * weights).sum()),
            "overlap": float((g["overlap"] * weights).sum()),
            "success_before": g["success_before"].dropna().astype(float).mean(),
            "success_after": g["success_after"].dropna().astype(float).mean(),
            "magnitude_before": g["magnitude_before"].dropna().astype(float).mean(),
            "magnitude_after": g["magnitude_after"].dropna().astype(float).mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _p95(kl: "pd.Series[float]") -> float:
    """The 95th percentile; where a value is infinite the next higher one, since nothing lies between two of those."""
    return float(kl.quantile(0.95, interpolation="higher" if (kl == math.inf).any() else "linear"))


def _cost(cost: dict[str, object], passages: Sequence[Passage], models: int, probes: int = 0) -> None:
    cost["tokens"] = int(cost["tokens"]) + models * sum(len(one.ids) for one in passages)  # type: ignore[call-overload]
    cost["probes"] = int(cost["probes"]) + probes  # type: ignore[call-overload]

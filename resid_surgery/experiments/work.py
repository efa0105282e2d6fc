"""Work: one prompt of a run after another, as tables; a prompt that fails is a row of `failures`.

Prompts of one group have one length and predicting position. They are recorded together, as rows of one forward without
padding, always in the same company: what a run gives does not depend on where it was interrupted.
"""

import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pandas as pd
import pyarrow as pa

from resid_surgery.errors import StaleRecordingError
from resid_surgery.experiments.arms import Row, Scene, rows_of
from resid_surgery.experiments.cases import Case
from resid_surgery.experiments.finding import Finder
from resid_surgery.experiments.plans import Plan
from resid_surgery.experiments.tables import escaped, fit, said
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind, token_text
from resid_surgery.models.remoting import Where, running
from resid_surgery.stream.grouping import record_group
from resid_surgery.stream.recording import Recording, record_bound
from resid_surgery.surgery.effects import Effect, intervene_each
from resid_surgery.surgery.measures import Meter
from resid_surgery.surgery.sweeping import sweep

EFFECTS_AT_ONCE = 16
KEPT_DONORS = 16
Numbered = tuple[int, Case]


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What one prompt gave.

    Attributes:
        number: of the prompt. status: "done", "failed" or "unknown" (the model's top token is another, and the plan
            asks for `known`). tables: name -> rows.
    """

    number: int
    status: str
    tables: dict[str, pa.Table]


@final
@dataclass(eq=False)
class Worker:
    """Carries a plan out on one model.

    Attributes:
        model: the opened model. plan: what is done. schemas: of the tables. remote: where its forwards run.
    """

    model: OpenedModel
    plan: Plan
    schemas: Mapping[str, pa.Schema]
    remote: Where = None
    _donors: dict[Prompt, Any] = field(default_factory=dict)

    def run(self, group: Sequence[Numbered], skip: Collection[int] = ()) -> Iterator[Outcome]:
        """The outcome of every prompt of a group, one after another.

        Args:
            group: (number, case), all of one length and position. skip: numbers that are done already.

        Raises:
            StaleRecordingError: the model's weights changed during the run.
        """
        with running(self.model, self.remote):  # never around a yield: the caller's own traces are his
            recs = self._recorded(group)[::-1]  # the last is taken, so that no recording is held longer than it is used
        for number, case in group:
            found = recs.pop()
            if number in skip:
                continue
            if isinstance(found, Recording):
                with running(self.model, self.remote):
                    outcome = self._outcome(number, case, found)
                yield outcome
            else:
                yield self.failed(number, case, "record", found)

    def failed(self, number: int, case: Case, stage: str, error: BaseException) -> Outcome:
        """The outcome of a prompt that failed."""
        text = {"text": _text(case), "target": str(case.prompt.target)}
        about = said(number, case, text)
        trace = "".join(traceback.format_exception(error)[-12:])
        row = {
            "stage": stage,
            "error": type(error).__name__,
            "message": escaped(" ".join(str(error).split())),
            "traceback": escaped(trace),
        }
        tables = {"failures": about | row, "prompts": about | {"status": "failed", "rows": 0}}
        return Outcome(
            number, "failed", {name: fit(pd.DataFrame([one]), self.schemas[name]) for name, one in tables.items()}
        )

    def _recorded(self, group: Sequence[Numbered]) -> list[Recording | Exception]:
        bound = [bind(case.prompt, self.model.tokenizer, self.model) for _, case in group]
        try:
            return list(record_group(self.model, bound, every=False))
        except Exception:  # noqa: BLE001  one of them is at fault; which one is found out alone
            return [self._alone(one) for one in bound]

    def _alone(self, bound: BoundPrompt) -> Recording | Exception:
        try:
            return record_bound(self.model, bound, every=False)
        except Exception as error:  # noqa: BLE001  a prompt that fails is recorded, and the run goes on
            return error

    def _outcome(self, number: int, case: Case, rec: Recording) -> Outcome:
        stage = "record"
        try:
            clean = Meter(rec, "all").clean()
            about = said(number, case, rec.prompt.said())
            held = {"prompts": pd.DataFrame([about | _clean(rec, clean) | {"status": "done", "rows": 0}])}
            if self.plan.known and clean["rank"] != 1:
                held["prompts"]["status"] = "unknown"
                return self._fitted(number, "unknown", held)
            stage = "locate"
            finder = Finder(self.plan, rec, number)
            if "located" in self.schemas:
                held["located"] = finder.table().assign(**about)
            stage = "operate"
            if self.plan.intervene:
                held |= self._operated(rec, case, finder, about)
                held["prompts"]["rows"] = len(held["rows"])
            return self._fitted(number, "done", held)
        except StaleRecordingError:
            raise
        except Exception as error:  # noqa: BLE001  a prompt that fails is recorded, and the run goes on
            return self.failed(number, case, stage, error)

    def _fitted(self, number: int, status: str, held: Mapping[str, pd.DataFrame]) -> Outcome:
        return Outcome(number, status, {name: fit(table, self.schemas[name]) for name, table in held.items()})

    def _operated(
        self, rec: Recording, case: Case, finder: Finder, about: Mapping[str, Any]
    ) -> dict[str, pd.DataFrame]:
        scene = Scene(self.model.anatomy, rec.prompt, case, finder.sites, self._donor(case))
        rows = list(rows_of(self.plan, scene))
        coordinates = pd.DataFrame([one.coordinates for one in rows], dtype=object)
        coordinates.insert(0, "row", range(len(rows)))
        if self.plan.measure == "effect":
            measured, effects = _effects(rec, rows)
            keep = ["row", "arm", *self.plan.axes]
            joined = effects.merge(coordinates[[name for name in keep if name in coordinates]], on="row", how="left")
            extra = {"effects": joined.assign(**about)}
        else:
            given = [({"row": at}, one.interventions) for at, one in enumerate(rows)]
            measured = sweep(rec, given, measure=self.plan.measure, progress=False).drop(columns="row")
            extra = {}
        table = pd.concat([coordinates, measured.reset_index(drop=True)], axis=1).assign(**about)
        return {"rows": table} | extra

    def _donor(self, case: Case) -> Any:
        """What stands for a donor: the plan's own first few are recorded once a worker, all others in their turn."""
        own = {prompt for many in case.donors.values() for prompt in many}

        def donor(prompt: Prompt) -> Any:
            if prompt in own or (prompt not in self._donors and len(self._donors) >= KEPT_DONORS):
                return prompt
            if prompt not in self._donors:
                self._donors[prompt] = record_bound(
                    self.model, bind(prompt, self.model.tokenizer, self.model), every=True
                )
            return self._donors[prompt]

        return donor


def _text(case: Case) -> str:
    prompt = case.prompt
    return prompt.text if prompt.text is not None else " ".join(map(str, prompt.ids or ()))


def _clean(rec: Recording, clean: Mapping[str, float]) -> dict[str, Any]:
    top = token_text(int(rec.logits.argmax()), rec.model.tokenizer)
    return {
        "n_tokens": rec.n_positions,
        "position": rec.prompt.position,
        "bs_target": clean["bs_target"],
        "log_prob": clean["log_prob"],
        "prob": clean["prob"],
        "rank": int(clean["rank"]),
        "entropy": clean["entropy"],
        "top": top,
    }


def _effects(rec: Recording, rows: Sequence[Row]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row a set of interventions, a row a token of it), a few effects at a time."""
    short, long = [], []
    for low in range(0, len(rows), EFFECTS_AT_ONCE):
        some = [one.interventions for one in rows[low : low + EFFECTS_AT_ONCE]]
        for at, effect in enumerate(intervene_each(rec, some, movers=0), low):
            short.append(_short(effect))
            long.append(effect.table.drop(columns=["position", "norm", "logit_before", "logit_after"]).assign(row=at))
    return pd.DataFrame(short), pd.concat(long, ignore_index=True)


def _short(effect: Effect) -> dict[str, Any]:
    """An effect as one row, with the columns of a sweep."""
    table, moved = effect.table, effect.summary.iloc[0]
    row = table.iloc[0]
    out: dict[str, Any] = {}
    for name, (_, one) in zip(_names(len(table)), table.iterrows(), strict=True):
        out |= {f"bs_{name}": one["bs_after"], f"bs_change_{name}": one["bs_change"]}
    out |= {"log_prob": row["log_prob_after"], "log_prob_change": row["log_prob_change"], "prob": row["prob_after"]}
    out |= {"kl": moved["kl"], "rank": row["rank_after"], "top": moved["top_after"], "entropy": moved["entropy_after"]}
    return out | {part: row[part] for part in ("direct", "post_norm", "norm_scale", "indirect")}


def _names(n: int) -> list[str]:
    return ["target", *(f"versus_{i}" for i in range(1, n))]

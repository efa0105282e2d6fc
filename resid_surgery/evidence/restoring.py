"""Restoring: a small set of operations that gives the right answer back, found and proven by measurement.

1. Shortlist the candidates (neurons and (head, source) pairs at t) with the largest direct part of bs(wrong) -
   bs(right), and those with the largest first-order estimate of what removing them does, later layers included.
2. Measure each alone. The best by direct part and the best by measured effect are the pool.
3. Grow: measure the set so far plus each of the pool in one sweep, take the best, until the answer is restored.
4. Prune: measure the set without each member, drop what can be spared, until every member is necessary.

Estimates only choose what is measured; whether an answer is restored is read off a forward every time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast, final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resid_surgery.attribution.catalogue import SCORES
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.scoring import Linear, scorer
from resid_surgery.models.prompts import token_text
from resid_surgery.sites import HeadSource, Site
from resid_surgery.stream.blocks import Numbering
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import candidates
from resid_surgery.stream.tables import bs_columns
from resid_surgery.surgery.interventions import Intervention, Mean, Zero
from resid_surgery.surgery.sweeping import sweep

UNTIL = ("top", "above")
CLIMB = ("gap", "log_prob")
RIVALS = 32
WIDER = 4  # times the pool, by each order, are measured alone
LEAST = 1e-3
READ = ("bs_right", "bs_wrong", "difference", "prob_right", "rank_right", "top", "restored")

Sites = tuple[Site, ...]


def retargeted(rec: Recording, target: int, versus: Sequence[int] = ()) -> Recording:
    """The same recording, read for another target and other competitors; no forward runs."""
    names = {token: token_text(token, rec.model.tokenizer) for token in (target, *versus)}
    source = replace(rec.prompt.source, target=target, versus=tuple(versus))
    prompt = replace(rec.prompt, target=target, versus=tuple(versus), names=names, source=source)
    return replace(rec, prompt=prompt)


@final
@dataclass(frozen=True, eq=False)
class Goal:
    """What is to be reached, and by which operation.

    Attributes:
        rec: a recording. wrong, right: token ids.
        until: "top" (no token is above `right`, and `wrong` is below it) or "above" (`wrong` is below it).
        climb: what a step raises most: "gap" (logits: right's minus the best rival's, which is `wrong` for "above")
            or "log_prob" (right's, nats).
        over: recordings whose mean a site is given; none for zero.
    """

    rec: Recording
    wrong: int
    right: int
    until: str
    climb: str
    over: tuple[Recording, ...] = ()

    @cached_property
    def facing(self) -> Recording:
        """The recording for `right` against `wrong` and the tokens that are most probable now."""
        first = self.rec.work(self.rec.logits).topk(min(RIVALS, self.rec.model.vocab_size)).indices.tolist()
        rivals = [token for token in first if token not in (self.wrong, self.right)]
        return retargeted(self.rec, self.right, (self.wrong, *rivals))

    @property
    def rival(self) -> int:
        """The token that stands in the way first."""
        return self.wrong if self.until == "above" else int(self.rec.work(self.rec.logits).argmax())

    def operations(self, sites: Sequence[Site]) -> tuple[Intervention, ...]:
        """One operation a site."""
        return tuple(Mean(site, over=self.over) if self.over else Zero(site) for site in sites)

    def clean(self) -> pd.DataFrame:
        """The run as it is, as one row of what `sweep` says."""
        rec = self.facing
        bs, logits = rec.work(rec.bs_values), rec.work(rec.logits)
        log_p = torch.log_softmax(logits.double(), -1)[self.right]
        row = dict(zip(bs_columns(rec), bs[list(rec.prompt.readouts)].tolist(), strict=True))
        row |= {"log_prob": float(log_p), "prob": float(log_p.exp())}
        row |= {"rank": 1 + int((logits > logits[self.right]).sum())}
        return pd.DataFrame([row | {"top": token_text(int(logits.argmax()), rec.model.tokenizer)}])

    def read(self, swept: pd.DataFrame) -> pd.DataFrame:
        """What rows of a sweep say: the columns `READ`, and `value`, which a step raises."""
        table = pd.DataFrame({"bs_right": swept["bs_target"], "bs_wrong": swept["bs_versus_1"]})
        table["difference"] = table["bs_wrong"] - table["bs_right"]
        table["prob_right"], table["rank_right"], table["top"] = swept["prob"], swept["rank"], swept["top"]
        above = table["difference"] < 0
        table["restored"] = above if self.until == "above" else above & (table["rank_right"] == 1)
        table["value"] = swept["log_prob"] if self.climb == "log_prob" else self._gap(swept, table["restored"])
        return table

    def _gap(self, swept: pd.DataFrame, restored: "pd.Series[bool]") -> "pd.Series[float]":
        names = ["bs_versus_1"] if self.until == "above" else bs_columns(self.facing)[1:]
        gap = swept["bs_target"] - swept[names].max(axis=1)
        odds = swept["log_prob"] - np.log1p(-swept["prob"].clip(upper=0.5))  # where another token than they is on top
        return gap.where(restored | (gap < 0), odds)


@final
@dataclass(eq=False)
class Trials:
    """Measures sets of sites, a sweep at a time, and counts the rows.

    Attributes:
        goal. budget: rows that may be measured in all. reserve: of these, for what comes after the search.
        rows: measured so far.
    """

    goal: Goal
    budget: int
    reserve: int
    rows: int = field(default=0, init=False)

    def __call__(self, sets: Sequence[Sites]) -> pd.DataFrame:
        """What is left of the prediction when each of some sets is operated on; the empty set needs no row."""
        if not any(sets):
            return self.goal.read(self.goal.clean())
        self.rows += len(sets)
        rows = [({"set": number}, self.goal.operations(some)) for number, some in enumerate(sets)]
        return self.goal.read(sweep(self.goal.facing, rows, measure="all", progress=False))

    def without(self, members: Sites) -> pd.DataFrame:
        """When each member is left out."""
        return self([tuple(one for one in members if one != left) for left in members])

    def room(self, size: int) -> int:
        """How many rows a step to a set of `size` may take, so that pruning it stays within the budget."""
        pruning = size * (size + 1) // 2 - 1  # size rows, then one fewer after each that is dropped, down to two
        return self.budget - self.rows - self.reserve - pruning


@final
@dataclass(frozen=True, eq=False)
class Shortlist:
    """Candidates in the order of two scores, the most promising first.

    Attributes:
        direct: by bs(wrong) - bs(right). estimated: by the first-order estimate of removing them.
    """

    direct: Sites
    estimated: Sites

    @classmethod
    def of(cls, goal: Goal, kinds: Sequence[str], width: int) -> "Shortlist":
        """The best `width` by each score, of all kinds together."""
        rec, toward = goal.facing, retargeted(goal.rec, goal.rival)
        numberings, direct, estimated = [], [], []
        for kind in kinds:
            query = Query.of(rec, kind, "frozen", None, [goal.wrong])
            numberings.append(Numbering(query.blocks()))
            direct.append(_linear(query, "bs_difference"))
            slope = _linear(query, "grad_times_activation")
            if goal.climb == "gap":
                slope = slope - _linear(Query.of(toward, kind, "frozen", None), "grad_times_activation")
            estimated.append(slope)
        return cls(*(tuple(_lowest(numberings, values, width)) for values in (direct, estimated)))


def _linear(query: Query, name: str) -> Tensor:
    """A linear score of every candidate, in the order of their numbering."""
    scored = cast(Linear, scorer(query, SCORES[name]))
    return torch.cat([scored.values(b).double().cpu() for b in range(len(scored.blocks))])


def _lowest(numberings: Sequence[Numbering], values: Sequence[Tensor], width: int) -> Iterator[Site]:
    """Sites of the lowest values of all kinds together."""
    first = np.cumsum([0, *map(len, values)])
    for at in torch.cat(list(values)).argsort(stable=True)[:width].tolist():
        which = int(np.searchsorted(first, at, side="right")) - 1
        yield numberings[which].site(at - int(first[which]))


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What the search came to.

    Attributes:
        members: the set. stopped: "restored", "limit", "budget" or "no candidate helps".
        without: one row a member: what is measured when only it is left out. path: one row a change of the set.
    """

    members: Sites
    stopped: str
    without: pd.DataFrame
    path: pd.DataFrame


def search(
    trials: Trials, short: Shortlist, *, pool: int, limit: int, step: Callable[..., None] = lambda *_: None
) -> Found:
    """Grow a set until it restores the answer, then prune it; see the module.

    Args:
        trials: what measures. short: the candidates. pool: how many by each order are tried in every step.
        limit: most members. step: called with the name of each new member.
    """
    members, path, stopped = _grow(trials, short, pool, limit, step)
    without = trials.without(members)
    while stopped == "restored" and len(members) > 1 and bool(without["restored"].any()):
        spared = _best(without)
        path.append(_change("drop", members[spared], without.to_dict("records")[spared], trials.rows))
        members = members[:spared] + members[spared + 1 :]
        without = trials.without(members)
    return Found(members, stopped, without, pd.DataFrame(path))


def _grow(
    trials: Trials, short: Shortlist, pool: int, limit: int, step: Callable[..., None]
) -> tuple[Sites, list[dict[str, Any]], str]:
    """(members, what was done, why it stopped)."""
    members: Sites = ()
    path: list[dict[str, Any]] = []
    waiting = tuple(dict.fromkeys((*short.direct[:pool], *short.estimated[:pool], *short.direct, *short.estimated)))
    value, cut = float("-inf"), False  # the best single candidate is taken whatever it does
    while len(members) < limit:
        batch = waiting[: max(0, trials.room(len(members) + 1))]
        cut = cut or len(batch) < len(waiting)
        if not batch:
            return members, path, _stuck(cut)
        table = trials([(*members, one) for one in batch])
        best = _best(table)
        row, site = table.to_dict("records")[best], batch[best]
        if not row["restored"] and row["value"] < value + LEAST:
            return members, path, _stuck(cut)
        if not members:
            waiting = _pooled(batch, table, short, pool)
        members, value = (*members, site), row["value"]
        waiting = tuple(one for one in waiting if one != site)
        path.append(_change("add", site, row, trials.rows))
        step(str(site))
        if row["restored"]:
            return members, path, "restored"
    return members, path, "limit"


def _stuck(cut: bool) -> str:
    """Why nothing more could be added: some candidates were too many to measure, or all that there are do not help."""
    return "budget" if cut else "no candidate helps"


def _best(table: pd.DataFrame) -> int:
    """The row that restores the answer, or comes nearest; the first of equals."""
    return int(table.sort_values(["restored", "value"], ascending=False, kind="stable").index[0])


def _pooled(batch: Sites, table: pd.DataFrame, short: Shortlist, pool: int) -> Sites:
    """The best by measured effect of those measured alone, then the best by direct part."""
    order = table["value"].sort_values(ascending=False, kind="stable").index[:pool]
    direct = [one for one in short.direct[:pool] if one in batch]
    return tuple(dict.fromkeys([*(batch[i] for i in order), *direct]))


def _change(action: str, site: Site, row: dict[Any, Any], rows: int) -> dict[str, Any]:
    return {"action": action, "site": str(site), **{name: row[name] for name in READ}, "rows": rows}


def control(trials: Trials, members: Sites, draws: int, seed: int) -> pd.DataFrame:
    """The same operation on as many other subvalues, drawn at random, of the same kinds and layers.

    Returns:
        One row a draw. Columns: draw, sites, size (smaller where a layer has too few others), then `READ`.
    """
    groups = Counter((kind_of(one), layer_of(one)) for one in members)
    others = {group: _others(trials.goal.rec, *group, members) for group in groups}
    sets = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        picked = [(group, rng.permutation(len(others[group]))[:size]) for group, size in groups.items()]
        sets.append(tuple(others[group][i] for group, some in picked for i in sorted(some.tolist())))
    sets = [some for some in sets if some]
    first = {"draw": range(len(sets)), "sites": [" ".join(map(str, some)) for some in sets], "size": map(len, sets)}
    table = pd.DataFrame({name: list(values) for name, values in first.items()})
    measured = trials(sets)[list(READ)] if sets else pd.DataFrame(columns=list(READ))
    return pd.concat([table, measured], axis=1)


def _others(rec: Recording, kind: str, layer: int, members: Sites) -> Sites:
    """The other subvalues of one kind in one layer."""
    sites = [block.site(i) for _, block in candidates(rec, kind, layer) for i in range(block.count)]
    return tuple(one for one in sites if one not in members)


def kind_of(site: Site) -> str:
    """The kind of candidate that a site is."""
    return "head_source" if isinstance(site, HeadSource) else "neuron"


def layer_of(site: Site) -> int:
    """A candidate's layer."""
    return int(site.layer)  # type: ignore[attr-defined]

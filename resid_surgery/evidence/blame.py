"""Why this and not that? What tipped a prediction towards a wrong answer, and what it takes to restore the right one.

1. Split the difference bs(wrong) - bs(right) over the addends of the stream, exactly.
2. Locate the subvalues with the largest parts of it, for each side, and what they promote.
3. Trace what switched the neurons among them on.
4. Search for a set of operations that restores the right answer and from which no member can be dropped
   (`restoring`), measure it once more as a whole, and hold it against random sets of its size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.errors import ArgumentError
from resid_surgery.evidence.restoring import (
    CLIMB,
    READ,
    UNTIL,
    WIDER,
    Found,
    Goal,
    Shortlist,
    Trials,
    control,
    kind_of,
    layer_of,
    retargeted,
    search,
)
from resid_surgery.evidence.tipping import difference_ledger, sources_of, tipped_by
from resid_surgery.models.prompts import Prompt, token_id, token_text
from resid_surgery.sites import HeadSource, Site
from resid_surgery.stream.recording import Recording, be_recording, need_recording, record
from resid_surgery.stream.subvalues import candidates
from resid_surgery.surgery.effects import Effect, intervene
from resid_surgery.surgery.interventions import Intervention, Mean
from resid_surgery.surgery.resolving import resolve

BLAMED = ("neuron", "head_source")
MOST_DRAWS = 10_000


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Blame:
    """Why a model says `wrong` and not `right`; made by `resid_surgery.blame`.

    Attributes:
        rec: the recording, with `right` as target and `wrong` as its competitor. wrong, right: the tokens' texts.
        until: what counts as restored.
        ledger: one row per addend: site, kind, layer, bs_wrong, bs_right, difference (wrong - right, logits; the
            column sums to the model's own), norm, position, before_cap, closure.
        tipped: the subvalues with the largest parts of it: rank, side ("for wrong", "for right"), site, kind, layer,
            bs_wrong, bs_right, difference (logits), promotes (its top tokens), norm, position.
        sources: of the best neurons "for wrong", as `resid_surgery.sources` gives them; no rows if there are none.
        operations: the set, one intervention a member. restored: the whole set, measured by `intervene`, restores.
        stopped: why the search ended: "restored", "limit", "budget", "no candidate helps", or "within rounding" (one
            sweep restores it, the measurement as a whole does not).
        effect: of the whole set. minimal: one row a member, when only it is left out: site, kind, layer, bs_right,
            bs_wrong, difference (logits), prob_right, rank_right, top, restored. If no row is restored, no member of
            a set that restores can be spared.
        control: as many other subvalues of the same kinds and layers, at random: draw, sites, size, then as in
            `minimal`. path: the search, one row an addition or removal, then as in `minimal`, and rows (so far).
        measured: rows that were measured in all.
    """

    rec: Recording
    wrong: str
    right: str
    until: str
    ledger: pd.DataFrame
    tipped: pd.DataFrame
    sources: pd.DataFrame
    operations: tuple[Intervention, ...]
    restored: bool
    stopped: str
    effect: Effect
    minimal: pd.DataFrame
    control: pd.DataFrame
    path: pd.DataFrame
    measured: int

    def __repr__(self) -> str:
        does = "restores it" if self.restored else f"does not restore it ({self.stopped})"
        return (
            f"Blame({self.wrong!r} over {self.right!r} by {self.ledger['difference'].sum():.3f} logits in "
            f"{self.rec.model.name}; the set {', '.join(map(str, self.sites))} {does}; {self.measured} rows measured)"
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The members of the set."""
        return tuple(site for one in self.operations for site in one.sites)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return {
            "ledger": self.ledger,
            "tipped": self.tipped,
            "sources": self.sources,
            "path": self.path,
            "minimal": self.minimal,
            "effect": self.effect.table,
            "effect_ledger": self.effect.ledger(),
            "control": self.control,
        }

    def summary(self) -> list[str]:
        """What was found, in a few lines of plain text."""
        return [self._gap(), *self._parts(), self._outcome(), *self._necessity(), self._chance()]

    def _rows(self) -> tuple["pd.Series[Any]", "pd.Series[Any]"]:
        """The effect's rows of right and wrong."""
        return self.effect.table.iloc[0], self.effect.table.iloc[1]

    def _gap(self) -> str:
        right, wrong = self._rows()
        return (
            f"{self.wrong!r} (logit {wrong['bs_before']:.3f}, p {wrong['prob_before']:.3f}) stands "
            f"{wrong['bs_before'] - right['bs_before']:.3f} logits above {self.right!r} (logit "
            f"{right['bs_before']:.3f}, p {right['prob_before']:.3f}, rank {right['rank_before']})."
        )

    def _parts(self) -> list[str]:
        ordered = self.ledger.sort_values("difference", ascending=False, kind="stable")
        lines = [f"Addends most for {self.wrong!r}: {_listed(ordered[ordered['difference'] > 0])}."]
        lines.append(f"Addends most for {self.right!r}: {_listed(ordered[ordered['difference'] < 0][::-1])}.")
        for side, token in (("for wrong", self.wrong), ("for right", self.right)):
            rows = self.tipped[self.tipped["side"] == side]
            best = rows.sort_values("difference", key=abs, ascending=False, kind="stable")
            lines.append(f"Subvalues most for {token!r}: {_listed(best)}.")
        return lines

    def _outcome(self) -> str:
        right, wrong = self._rows()
        said = {"top": "is the most probable token", "above": f"stands above {self.wrong!r}"}[self.until]
        done = f"{type(self.operations[0]).__name__} on {', '.join(map(str, self.sites))}"
        numbers = (
            f"{self.right!r} {right['bs_before']:.3f} -> {right['bs_after']:.3f} (p {right['prob_before']:.3f} -> "
            f"{right['prob_after']:.3f}, rank {right['rank_before']} -> {right['rank_after']}), "
            f"{self.wrong!r} {wrong['bs_before']:.3f} -> {wrong['bs_after']:.3f}"
        )
        if self.restored:
            return f"With {done}, {self.right!r} {said}: {numbers}."
        return f"Not restored ({self.stopped}): the best set found, {done}, leaves {numbers}."

    def _necessity(self) -> list[str]:
        rows = self.minimal.to_dict("records")
        lines = [f"Without {row['site']}: {row['top']!r} is on top, {self.right!r} has rank {row['rank_right']}, "
                 f"{self.wrong!r} - {self.right!r} is {row['difference']:+.3f} logits." for row in rows]  # fmt: skip
        if self.restored and not self.minimal["restored"].any():
            lines.append(f"No member of the {len(rows)} can be left out." if len(rows) > 1 else "One is enough.")
        return lines

    def _chance(self) -> str:
        if not len(self.control):
            return f"No random control ({self.measured} rows measured)."
        gaps = self.control["difference"]
        return (
            f"{int(self.control['restored'].sum())} of {len(self.control)} random sets of that size, kind and layers "
            f"restore it; they leave {self.wrong!r} - {self.right!r} between {gaps.min():+.3f} and {gaps.max():+.3f} "
            f"logits ({self.measured} rows measured)."
        )


def _listed(rows: pd.DataFrame, most: int = 4) -> str:
    """Sites with their part of the difference."""
    first = rows.head(most)
    return ", ".join(f"{s} {d:+.3f}" for s, d in zip(first["site"], first["difference"], strict=True)) or "none"


def blame(
    rec: Recording,
    wrong: str | int,
    right: str | int,
    *,
    until: str = "top",
    climb: str = "gap",
    over: Iterable[Recording | Prompt] | None = None,
    kinds: Sequence[str] = BLAMED,
    k: int = 5,
    readers: int = 3,
    top: int = 5,
    pool: int = 50,
    limit: int = 20,
    budget: int = 10_000,
    draws: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Blame:
    """Why `wrong` and not `right`: the exact parts of the difference, and a minimal set of operations that restores.

    The set is found by measured greedy search and pruned until each member, left out alone, loses the right answer:
    no member can be dropped, though another set may be smaller. What is not restored within `limit` and `budget` is
    reported as that (``.restored`` is False), with the best set so far.

    Args:
        rec: a recording of the prompt; its own target and competitors do not matter.
        wrong, right: tokens (texts or ids); `wrong` stands above `right` in the recording.
        until: restored means "top" (`wrong` is below `right` and no token is above it) or "above" (`wrong` is below).
        climb: what each step raises most, as measured: "gap" (logits of `right` minus those of the best other token,
            of `wrong` for until="above"; small sets, which may well lower both) or "log_prob" (of `right`, nats).
        over: None zeroes the members; recordings or prompts give each its mean over them.
        kinds: of the candidates, "neuron" and "head_source" (a head reading one position), at the predicting position.
        k: subvalues listed of each kind and side. readers: best neurons whose sources are traced. top: tokens
            listed a subvalue, and writers a key.
        pool: how many candidates by direct part, and as many by measured effect, are tried in every step; four times
            as many by direct part and by estimate are measured alone first.
        limit: most members of the set. budget: most rows to measure, pruning and control included.
        draws: random sets of as many subvalues of the same kinds and layers, as a control. seed: of them.
        progress: a bar on stderr; None shows it on a terminal.

    Returns:
        `Blame`, with ``.ledger``, ``.tipped``, ``.sources``, ``.operations``, ``.effect``, ``.minimal``, ``.control``,
        ``.summary()``.

    Raises:
        ArgumentError: `wrong` does not stand above `right`: nothing to blame; an option out of range.
        PromptError: a text is not one token. StaleRecordingError: changed weights. All before any forward runs.

    Example:
        >>> import resid_surgery as rs
        >>> rec = rs.record(rs.load(rs.tiny("llama")), rs.Prompt(ids=[5, 4, 3], target=0))
        >>> best, second = rec.bs_values.topk(2).indices.tolist()
        >>> found = blame(rec, best, second, pool=5)
        >>> found.restored, int(rs.intervene(found.rec, found.operations).after.logits.argmax()) == second
        (True, True)

    Source: ledger and subvalues: Yu & Ananiadou, arXiv 2312.12141; differences of logits: Wang et al. 2022,
        arXiv 2211.00593 (whose minimality is of circuits). The search is this library's own.
    """
    _check.progress(progress)
    be_recording(rec)
    model = rec.model
    ids = _blamed(rec, wrong, right)
    _check.choice("until", until, UNTIL)
    _check.choice("climb", climb, CLIMB)
    k, readers, top = (_check.whole("k", k, 1), _check.whole("readers", readers, 0), _check.whole("top", top, 1))
    pool, limit, seed = _check.whole("pool", pool, 1), _check.whole("limit", limit, 1), _check.seed(seed)
    draws = _check.whole("draws", draws, 0, MOST_DRAWS)
    do = "One candidate, the whole set and the control take that many rows."
    budget = _check.whole("budget", budget, draws + 2, do=do)
    blamed = _kinds(rec, kinds)
    donors = _donors(rec, over, blamed)
    need_recording(rec)
    means = tuple(one if isinstance(one, Recording) else record(model, one) for one in donors)
    toward = retargeted(rec, ids[0], ids[1:])
    tipped = tipped_by(toward, blamed, k, min(top, model.vocab_size // 2))
    trials = Trials(Goal(rec, ids[0], ids[1], until, climb, means), budget, reserve=draws + 1)
    with progress_bar("blame", limit, shown=progress is not False) as step:
        short = Shortlist.of(trials.goal, blamed, WIDER * pool)
        found = search(trials, short, pool=pool, limit=limit, step=step)
    chance = control(trials, found.members, draws, seed)
    effect = intervene(retargeted(rec, ids[1], ids[:1]), trials.goal.operations(found.members))
    stopped = found.stopped if found.stopped != "restored" or _restores(effect, until) else "within rounding"
    return Blame(
        rec=effect.rec,
        wrong=token_text(ids[0], model.tokenizer),
        right=token_text(ids[1], model.tokenizer),
        until=until,
        ledger=difference_ledger(toward),
        tipped=tipped,
        sources=sources_of(toward, tipped, readers, top),
        operations=effect.interventions,
        restored=stopped == "restored",
        stopped=stopped,
        effect=effect,
        minimal=_minimal(found),
        control=chance,
        path=found.path,
        measured=trials.rows + 1,
    )


def _blamed(rec: Recording, wrong: Any, right: Any) -> tuple[int, int]:
    """Ids of both tokens; refused where `wrong` does not stand above `right`."""
    model = rec.model
    w, r = (token_id(one, model.tokenizer, model, name) for name, one in (("wrong", wrong), ("right", right)))
    if w == r:
        raise ArgumentError(_check.message("right", "another token than `wrong`", right, model=model.name))
    bs, said = rec.work(rec.bs_values), token_text(r, model.tokenizer)
    if not bool(bs[w] > bs[r]):
        place = "is the most probable token already" if int(rec.logits.argmax()) == r else "is not below it"
        raise ArgumentError(
            f"nothing to blame: `wrong` must stand above `right` for {model.name}; {said!r} (logit {float(bs[r]):.3f}) "
            f"{place}, {token_text(w, model.tokenizer)!r} has {float(bs[w]):.3f}. Exchange them, or record a prompt "
            "that the model gets wrong."
        )
    return w, r


def _kinds(rec: Recording, given: Any) -> list[str]:
    """The kinds of candidates that are asked for and that the recording has."""
    names = [given] if isinstance(given, str) or not _check.iterable(given) else list(given)
    wanted = [_check.choice("kinds", one, BLAMED) for one in names]
    layers = range(rec.model.anatomy.n_layers)
    found = [kind for kind in BLAMED if kind in wanted and any(candidates(rec, kind, layer) for layer in layers)]
    if not found:
        do = f"Choose of {', '.join(BLAMED)} what its layers have."
        raise ArgumentError(_check.message("kinds", "of subvalues that exist", names, model=rec.model.name, do=do))
    return found


def _donors(rec: Recording, over: Any, kinds: Sequence[str]) -> list[Recording | Prompt]:
    """What the mean is over, checked; nothing for zero."""
    if over is None:
        return []
    heads = [layer for layer in range(rec.model.anatomy.n_layers) if candidates(rec, "head_source", layer)]
    pairs = [HeadSource(heads[0], 0, j) for j in range(rec.prompt.position + 1)] if "head_source" in kinds else []
    mean = Mean(pairs or "embed", over=over)
    resolve(rec, mean)
    return list(mean.over)


def _restores(effect: Effect, until: str) -> bool:
    """The criterion, read off the effect of the whole set."""
    right, wrong = effect.table.iloc[0], effect.table.iloc[1]
    return bool(right["bs_after"] > wrong["bs_after"] and (until == "above" or right["rank_after"] == 1))


def _minimal(found: Found) -> pd.DataFrame:
    about = [(str(one), kind_of(one), layer_of(one)) for one in found.members]
    return pd.concat([pd.DataFrame(about, columns=["site", "kind", "layer"]), found.without[list(READ)]], axis=1)

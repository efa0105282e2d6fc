"""Effects: what interventions did to the prediction, at one position or several.

The change of a logit is split into direct, post_norm, norm_scale and indirect (see `splits`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import pandas as pd

from resid_surgery._check import index_of, iterable, message, whole
from resid_surgery._html import face_html
from resid_surgery.errors import ArgumentError, InterventionError
from resid_surgery.models.prompts import token_text
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.surgery.engine import Run, run_rows
from resid_surgery.surgery.interventions import Intervention
from resid_surgery.surgery.measures import entropy, kl_divergence
from resid_surgery.surgery.reading import fetch
from resid_surgery.surgery.resolving import Resolver, Scene
from resid_surgery.surgery.splits import PARTS, Split

__all__ = ["PARTS", "Effect", "intervene", "intervene_each"]
FACE = ("token", "role", "bs_before", "bs_after", "bs_change", "prob_before", "prob_after", "rank_after", "position")


@final
@dataclass(frozen=True, eq=False)
class Effect:
    """What a set of interventions, run together, did; made by `resid_surgery.intervene`.

    Attributes:
        rec: the recording operated on. interventions: what was done.
        splits: one a measured position, the predicting one first unless `at` said otherwise.
    """

    rec: Recording
    interventions: tuple[Intervention, ...]
    splits: tuple[Split, ...]

    def __repr__(self) -> str:
        row, done = self.table.iloc[0], ", ".join(one.brief for one in self.interventions)
        return (
            f"Effect([{done}] on {self.rec.model.name}: {row['token']!r} logit "
            f"{row['bs_before']:.3f} -> {row['bs_after']:.3f}, p {row['prob_before']:.3f} -> {row['prob_after']:.3f})"
        )

    def _repr_html_(self) -> str:
        return face_html(repr(self), self.summary, self.table[[*FACE, *PARTS]])

    @property
    def before(self) -> Run:
        """The control row, at the first measured position."""
        return self.splits[0].before

    @property
    def after(self) -> Run:
        """The operated row, at the first measured position."""
        return self.splits[0].after

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per position and token: target, competitors, then the biggest movers in probability.

        Columns: token, token_id, role; bs_before, bs_after, bs_change (logits before a soft-cap);
        direct, post_norm, norm_scale, indirect (logits; they sum to bs_change), closure (|sum -
        bs_change|); the same six minus their vocabulary mean as ``*_centred``; logit_before/after
        (after a soft-cap); log_prob_before/after/change (nats); prob_before/after;
        rank_before/after (1 is best); position, norm.
        """
        return pd.concat([split.table for split in self.splits], ignore_index=True)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per position: how far the whole distribution moved.

        Columns: position; kl (KL(before || after), nats); entropy_before, entropy_after (nats);
        top_before, top_after (the most probable token); log_prob_change (of the target, nats).
        """
        rows = []
        for split in self.splits:
            a, b = split.before.logits, split.after.logits
            tops = [token_text(int(run.argmax()), self.rec.model.tokenizer) for run in (a, b)]
            change = float(split.table["log_prob_change"].iloc[0])
            rows.append((split.after.position, kl_divergence(a, b), entropy(a), entropy(b), *tops, change))
        names = ["position", "kl", "entropy_before", "entropy_after", "top_before", "top_after", "log_prob_change"]
        return pd.DataFrame(rows, columns=names)

    def ledger(self, position: int | None = None) -> pd.DataFrame:
        """The change of every addend of the stream: who removed, who added, who compensated.

        Columns: site, kind, layer, operated, bs_before, bs_after, bs_change, direct, post_norm,
        indirect (target's logits under the clean frozen norm), ``bs_change_versus_*``, norm,
        position, closure. An operation on a state of the stream is a row of its own, and so are an edge into
        the unembedding and ``norm_scale``; the column bs_change sums to the measured change of the target's logit.

        Args:
            position: one of the measured positions; None for the first.

        Raises:
            ArgumentError: it was not measured.
        """
        measured = {split.after.position: split for split in reversed(self.splits)}
        if position is None:
            return self.splits[0].ledger()
        wanted = index_of(position)
        if wanted not in measured:
            raise ArgumentError(message("position", f"one of {sorted(measured)}, which were measured", position))
        return measured[wanted].ledger()


def intervene(
    rec: Recording, interventions: Any, *, at: Any = "target", movers: int = 5, remote: Where = None
) -> Effect:
    """Run interventions, all at once, through one nnsight trace and measure what they did.

    Args:
        rec: a recording. interventions: one or a list of `Zero`, `Scale`, `Steer`, `Set`, `Clamp`, `Patch`, `Mean`,
            `Attend`, `Cut`; their order does not matter.
        at: positions at which the prediction is measured, written like an intervention's ``positions``.
        movers: how many tokens beside target and competitors are listed, by change of probability.
        remote: where the forward runs: None (here), "local" (a rehearsal here), True (NDIF), or a server's address.

    Returns:
        `Effect` with ``.table``, ``.summary`` and ``.ledger()``. Changes are against a control row of the same
        batch, which must equal the recording.

    Raises:
        InterventionError: contradictory, nested or empty interventions; one did not fire.
        SiteError, PromptError: a site or position does not exist. All before any forward runs.
        StaleRecordingError: the weights changed since a recording was made.
        UnsupportedModelError: no server knows the model by a name. RunError: a remote run failed.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 5 (interventions); split: see `splits`.
    """
    return intervene_each(rec, [interventions], at=at, movers=movers, remote=remote)[0]


@remotely
def intervene_each(
    rec: Recording, rows: Sequence[Any], *, at: Any = "target", movers: int = 5, remote: Where = None
) -> list[Effect]:
    """Run several sets of interventions, each on its own row, in as few forwards as fit.

    Every addend of every row is read, so that each effect has its ledger; for thousands of rows use `sweep`.

    Args:
        rec: a recording. rows: one entry per row, as for `intervene`.
        at, movers, remote: as for `intervene`.

    Returns:
        One `Effect` per entry, in order.

    Raises:
        As `intervene`.
    """
    movers = whole("movers", movers, 0)
    be_recording(rec)
    if isinstance(rows, (str, Intervention)) or not iterable(rows):
        raise InterventionError(message("rows", "a non-empty list of intervention lists", rows))
    given = [tuple(one) if _is_list(one) else (one,) for one in rows]
    if not given:
        raise InterventionError(message("rows", "a non-empty list of intervention lists", rows))
    positions = rec.prompt.positions(at)
    resolver = Resolver(Scene.of(rec))
    resolved = [resolver.resolve(one) for one in given]
    rec.require_fresh()
    fetch(rec.model, resolver.wants)
    runs = run_rows(rec, resolved, positions)
    return [
        Effect(rec, one, tuple(Split(rec, a, b, movers) for a, b in pairs))
        for one, pairs in zip(given, runs, strict=True)
    ]


def _is_list(one: Any) -> bool:
    return iterable(one) and not isinstance(one, (str, bytes, Intervention))

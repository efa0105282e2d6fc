"""Streams: one edit after another on one model, and what is left of the earlier ones.

Success at once is asked right after each edit, retention at every checkpoint (after 1, 2, 5, 10, 20, 50, ... edits):
they are different columns, since an edit that works may undo the one before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from resid_surgery.editing.answering import Answers, answer_questions, answer_table
from resid_surgery.editing.asking import Inquiry, divergence_on, likelihood_of
from resid_surgery.editing.budgets import spread
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.least_squares import key_cosines
from resid_surgery.editing.probes import Probe
from resid_surgery.editing.running import WeightsSubject, first_block
from resid_surgery.editing.surroundings import text_passage
from resid_surgery.models.replacing import tensors_of

UNRELATED, TEXTS = 8, 4


def checkpoints(edits: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to and with the last.

    Example:
        >>> checkpoints(23)
        [1, 2, 5, 10, 20, 23]
    """
    marks = [m * 10**e for e in range(len(str(edits))) for m in (1, 2, 5)]
    return sorted({*(m for m in marks if m <= edits), edits})


def ask_stream(q: Inquiry, edits: Sequence[Edit], probes: Sequence[Probe], step: Callable[..., None]) -> None:
    """Stage 3: success at once, retention, growth, likelihood and divergence against the original model.

    Args:
        q: takes the tables "stream" (one row an edit) and "curve" (one row a checkpoint) and measurements of efficacy
            at once and of retention. edits: in order, each to be added to those before it. probes: efficacy, one an
            edit, in order. step: progress.
    """
    marks, so_far = set(checkpoints(len(edits))), Edit(())
    at_once: list[dict[str, Any]] = []
    kept: dict[int, pd.DataFrame] = {}
    curve = []
    with q.clock.part("stream", len(edits)) as cost:
        for n, (edit, probe) in enumerate(zip(edits, probes, strict=True), start=1):
            so_far = edit if n == 1 else so_far + edit
            with so_far.applied(q.model) as handle:
                subject = WeightsSubject(handle, f"after {n}", first_block(q.model, so_far))
                asked = probes[:n] if n in marks else [probe]
                table, tokens = _asked(q, subject, asked)
                cost["tokens"] = int(cost["tokens"]) + tokens  # type: ignore[call-overload]
                at_once.append({"edit": n} | {str(k): v for k, v in table.iloc[-1].items()})
                if n in marks:
                    kept[n] = table
                    curve.append({"edits": n, **_at_checkpoint(q, subject, so_far, table)})
            step(probe.fact)
    _put(q, pd.DataFrame(at_once), kept, pd.DataFrame(curve), edits)


def _put(
    q: Inquiry, at_once: pd.DataFrame, kept: dict[int, pd.DataFrame], curve: pd.DataFrame, edits: Sequence[Edit]
) -> None:
    last = kept[len(edits)]
    columns = ["edit", "fact", "prompt", "new", "old", "new_change", "above_after", "free", "said_after"]
    stream = at_once[[c for c in columns if c in at_once]].rename(
        columns={"above_after": "above_at_once", "free": "at_once", "said_after": "said_at_once"}
    )
    for name in ("free", "above_after", "said_after"):
        if name in last:
            stream[{"free": "retained", "above_after": "above_at_end", "said_after": "said_at_end"}[name]] = list(
                last[name]
            )
    curve["at_once"] = [float(stream["at_once"].iloc[:n].astype(float).mean()) for n in curve["edits"]]
    q.tables["stream"], q.tables["curve"] = stream, curve
    cosines = key_cosines(edits)
    if len(cosines):
        q.tables["key_cosines"] = cosines
    for gate, column in (("efficacy: new above old", "above_at_once"), ("efficacy: free decoding", "at_once")):
        q.gate(gate, _values(stream, column), "rate")
    q.gate("retention", _values(stream, "retained"), "rate")


def _asked(q: Inquiry, subject: WeightsSubject, probes: Sequence[Probe]) -> tuple[pd.DataFrame, int]:
    answers = Answers(q.base, subject)
    answers.ask(answer_questions(probes))
    return answer_table(answers, probes), answers.tokens


def _at_checkpoint(q: Inquiry, subject: WeightsSubject, so_far: Edit, table: pd.DataFrame) -> dict[str, Any]:
    unrelated = spread([p for p in q.of("locality") if p.stratum == "unrelated"], UNRELATED)
    row: dict[str, Any] = {
        "retained": float(table["free"].astype(float).mean()),
        "above": float(table["above_after"].dropna().astype(float).mean()) if "above_after" in table else None,
        "norm_growth": growth(q, so_far),
    }
    if unrelated:
        row["kl_unrelated"] = divergence_on(q.base, [subject], unrelated)[0]
    texts = spread(q.of("text"), TEXTS)
    if texts:
        passages = [text_passage(q.model, p.text, q.budget.text_tokens) for p in texts]
        before = torch.cat([one.nll for one in q.base.figures(passages)])
        row["perplexity_ratio"] = float(
            torch.tensor(likelihood_of(subject, passages) - float(before.nanmean()), dtype=torch.float64).exp()
        )
    return row


def growth(q: Inquiry, edit: Edit) -> float:
    """Largest |change| / |W| (Frobenius) of any tensor."""
    held = tensors_of(q.model.module)
    return max(change.norm() / max(1e-30, float(held[change.name].detach().double().norm())) for change in edit.changes)


def _values(table: pd.DataFrame, column: str) -> list[tuple[str, str, float]]:
    if column not in table:
        return []
    there = table.loc[[i for i, one in table[column].items() if one is not None]]
    return [(str(f), str(p), float(v)) for f, p, v in zip(there["fact"], there["prompt"], there[column], strict=True)]

"""Surroundings: what an edit did to prompts and texts that it should have left alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from resid_surgery.editing.answering import answer_sequence
from resid_surgery.editing.decoding import fluency_table
from resid_surgery.editing.probes import Probe
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.rewrites import prompt_ids
from resid_surgery.editing.running import Compared, Passage, Subject, WeightsSubject, addends, compared, figures
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt, bind, encode, token_text

Step = Callable[..., None]
SHARES = 5
SAID = 6


def locality_sequences(model: OpenedModel, probes: Sequence[Probe]) -> list[Passage]:
    """What is run for each probe: a prompt with its true answer behind it, or a text at every position."""
    out = []
    for p in probes:
        if p.target is None:
            ids = tuple(prompt_ids(p.text, model))
            out.append(Passage(ids, tuple(range(len(ids)))))
        else:
            out.append(answer_sequence(model, p.text, p.target))
    return out


def locality_table(
    model: OpenedModel, probes: Sequence[Probe], found: Sequence[Compared], rivals: Sequence[Compared | None]
) -> pd.DataFrame:
    """Locality: one row a probe.

    Args:
        model: the base. probes: in order. found: their comparison. rivals: that of the prompt with `Probe.old` (what
            the edit wants said) behind it, or None.

    Returns:
        Columns: stratum, criterion, fact, prompt, tokens (compared positions), kl, kl_max, js (nats per token; of a
        prompt with an answer at its last position, of a text the mean over positions), flips (share of positions),
        overlap (share of the ten most likely tokens kept), answer, success_before, success_after (the true answer is
        likelier than the rival), magnitude_before, magnitude_after (log-probability of the true answer minus the
        rival's, nats), top_before, top_after (most likely token at the last compared prompt position).
    """
    rows = []
    for p, one, rival in zip(probes, found, rivals, strict=True):
        at = slice(0, 1) if p.target is not None else slice(None)
        row: dict[str, Any] = {"stratum": p.stratum, "criterion": p.criterion, "fact": p.fact, "prompt": p.text,
                               "tokens": len(one.kl[at]), "kl": float(one.kl[at].double().mean()),
                               "kl_max": float(one.kl[at].max()), "js": float(one.js[at].double().mean()),
                               "flips": float(one.flips[at].double().mean()),
                               "overlap": float(one.overlap[at].mean()), "answer": p.target}  # fmt: skip
        for when in ("before", "after"):
            margin = None if rival is None else _joint(one, when) - _joint(rival, when)
            row[f"magnitude_{when}"] = margin
            row[f"success_{when}"] = None if margin is None else margin > 0
            row[f"top_{when}"] = token_text(int(getattr(one, when)[at][-1, 0]), model.tokenizer)
        rows.append(row)
    return pd.DataFrame(rows)


def rival_sequences(model: OpenedModel, probes: Sequence[Probe]) -> list[Passage | None]:
    """A prompt with what the edit wants said behind it, where a probe names both."""
    return [
        answer_sequence(model, p.text, p.old) if p.target is not None and p.old is not None else None for p in probes
    ]


def compared_where(
    base: WeightsSubject, others: Sequence[Subject], rows: Sequence[Passage | None], *, whole: bool = True
) -> list[list[Compared | None]]:
    """As `compared`, with None where there is no sequence."""
    there = [i for i, row in enumerate(rows) if row is not None]
    found = compared(base, others, [rows[i] for i in there], whole=whole)  # type: ignore[misc]
    out: list[list[Compared | None]] = []
    for one in found:
        places: list[Compared | None] = [None] * len(rows)
        for i, value in zip(there, one, strict=True):
            places[i] = value
        out.append(places)
    return out


def worst_prompts(
    base: WeightsSubject, edited: Subject, table: pd.DataFrame, sequences: Sequence[Passage], *, most: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The probes with the largest KL, with what each model would say, and the tokens that make up their divergence.

    A token's share is (p_i log(p_i / q_i) - p_i + q_i) / KL at the position of the largest KL: never below 0, whether
    the edited model finds the token likelier or less likely, and 1 in sum over the vocabulary, as p and q both sum to
    1.

    Returns:
        (worst, shares). worst: rank and the row of `locality_table`, with text_before, text_after: what each model
        says.
        shares: prompt, position, token, share, prob_before, prob_after.
    """
    order = table.sort_values("kl_max", ascending=False).index[:most]
    shares: list[dict[str, Any]] = []
    said: dict[str, list[str]] = {"text_before": [], "text_after": []}
    tokenizer = base.model.tokenizer
    for i in order:
        one = sequences[i]
        at = one.at[:1] if pd.notna(table.loc[i, "answer"]) else one.at
        ids = torch.tensor([one.ids])
        p, q = (torch.log_softmax(s.logits(ids, at)[0], -1) for s in (base, edited))
        parts = addends(p, q) - p.exp() + q.exp()
        worst = int(parts.sum(-1).argmax())
        total = float(parts[worst].sum())
        shares += [
            {"prompt": table.loc[i, "prompt"], "position": at[worst], "token": token_text(token, tokenizer),
             "share": float(parts[worst, token]) / total if total else 0.0,
             "prob_before": float(p[worst, token].exp()), "prob_after": float(q[worst, token].exp())}
            for token in parts[worst].topk(SHARES).indices.tolist()
        ]  # fmt: skip
        context = torch.tensor([one.ids[: at[worst] + 1]])
        for name, subject in (("text_before", base), ("text_after", edited)):
            said[name].append(tokenizer.decode(subject.continued(context, SAID)[0]) if tokenizer is not None else "")
    worst_table = table.loc[order].assign(**said)
    worst_table.insert(0, "rank", range(1, len(order) + 1))
    return worst_table.reset_index(drop=True), pd.DataFrame(shares)


def text_passage(model: OpenedModel, text: str, limit: int) -> Passage:
    """The first tokens of a running text, wanted wherever another one follows; it may be longer than the context.

    Raises:
        PromptError: it cannot be tokenised.
    """
    ids = encode(model.tokenizer, text)[: min(limit, model.context or limit)]
    checked = bind(Prompt(ids=ids, target=0), model.tokenizer, model).ids
    return Passage(checked, tuple(range(len(checked) - 1)))


def text_table(
    base: Remembered, edited: Subject, probes: Sequence[Probe], limit: int, step: Step | None = None
) -> pd.DataFrame:
    """Running text: one row a document; positions behind the first `limit` tokens are left out.

    Returns:
        Columns: text (its beginning), tokens, nll_before, nll_after (mean nats per token), change.
    """
    model = base.subject.model
    rows = [text_passage(model, p.text, limit) for p in probes]
    pairs = zip(probes, rows, base.figures(rows, step), figures(edited, rows, step), strict=True)
    out = []
    for p, row, before, after in pairs:
        n = len(row.at)
        values = [float(one.nll.mean()) for one in (before, after)]
        out.append({"text": " ".join(p.text.split())[:80], "tokens": n, "nll_before": values[0], "nll_after": values[1],
                    "change": values[1] - values[0]})  # fmt: skip
    return pd.DataFrame(out)


def generation_tables(
    base: Remembered, edited: Subject, probes: Sequence[Probe], tokens: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Free continuations: figures of `decoding.fluency` before and after, and the texts side by side."""
    model = base.subject.model
    prompts = [prompt_ids(p.text, model) for p in probes]
    before = base.continued(prompts, tokens)
    after = [edited.continued(torch.tensor([one]), tokens)[0] for one in prompts]
    table = fluency_table([(p.text, a, b) for p, a, b in zip(probes, before, after, strict=True)], tokens)
    decode = model.tokenizer.decode
    texts = pd.DataFrame({"prompt": [p.text for p in probes], "before": [decode(one) for one in before],
                          "after": [decode(one) for one in after]})  # fmt: skip
    return table, texts.assign(same=texts["before"] == texts["after"])


def _joint(one: Compared, when: str) -> float:
    return -float(getattr(one, f"nll_{when}").nansum())

"""Findings: what a page shows of subvalues and states: tables of existing verbs, put together and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from resid_surgery.attribution.catalogue import NORMS
from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.queries import Query, most_candidates
from resid_surgery.models.prompts import BoundPrompt
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.tables import spectrum

KINDS = ("neuron", "head_source")
SCORE = "log_prob_increase"
ALONE = "none"
TOP = 6


def subvalues(rec: Recording, k: int = 25) -> pd.DataFrame:
    """The best k neurons and the best k (head, source) pairs, under each norm convention, with their tokens.

    Returns:
        The columns of `Located.table`, `promotes` and `suppresses` (tokens with their bs-values), and one
        ``over <token>`` a competitor: bs_target minus its bs-value (logits, frozen norm).
    """
    found = [_located(rec, kind, norm, k) for norm in NORMS for kind in KINDS]
    kept = [one for one in found if len(one)]
    if not kept:
        return pd.DataFrame()
    table = pd.concat(kept, ignore_index=True)
    told = spectra(rec, list(dict.fromkeys(table["site"])))
    for side in ("promotes", "suppresses"):
        table[side] = [told[site][side] for site in table["site"]]
    return over(table, rec.prompt)


def over(table: pd.DataFrame, prompt: BoundPrompt) -> pd.DataFrame:
    """A table with bs columns, and the target's lead over each competitor instead of the competitors'."""
    table, place = table.copy(), list(table.columns).index("bs_target") + 1
    for i in range(1, len(prompt.versus) + 1):
        lead = table["bs_target"] - table.pop(f"bs_versus_{i}")
        table.insert(place + i - 1, over_name(prompt, i - 1), lead)
    return table


def over_name(prompt: BoundPrompt, i: int) -> str:
    """The column of a competitor."""
    return f"over {label(prompt, prompt.versus[i])}"


def label(prompt: BoundPrompt, token: int) -> str:
    """Target or competitor in words: unique also where two tokens have the same text."""
    text = prompt.names[token]
    same = [prompt.names[one] for one in prompt.readouts].count(text) > 1
    return f"{text!r} ({token})" if same else repr(text)


def spectra(rec: Recording, sites: Sequence[str]) -> dict[str, dict[str, str]]:
    """Site -> what it promotes and what it suppresses, in words."""
    told: dict[str, dict[str, str]] = {site: {"promotes": "", "suppresses": ""} for site in sites}
    top = min(TOP, rec.model.vocab_size // 2)
    if not sites or not top:
        return told
    for (site, side), rows in spectrum(rec, list(sites), top=top).groupby(["site", "side"], sort=False):
        told[str(site)][str(side)] = "  ".join(
            f"{token!r} {value:.2f}" for token, value in zip(rows["token"], rows["bs_value"], strict=True)
        )
    return told


def lens_lines(table: pd.DataFrame) -> pd.DataFrame:
    """One line a state of the table from `lens`: its most probable tokens, with their probabilities."""
    top = table[table["rank"] <= 5]
    told = [f"{token!r} {prob:.3f}" for token, prob in zip(top["token"], top["prob"], strict=True)]
    lines = top.assign(told=told).groupby("site", sort=False)["told"].agg("   ".join).reset_index()
    target = table[table["role"] == "target"].set_index("site")
    lines["target's rank"], lines["target's log_prob"] = (list(target.loc[lines["site"], name])
                                                          for name in ("rank", "log_prob"))  # fmt: skip
    return lines.rename(columns={"told": "most probable (norm: own)"})


def against(prompt: BoundPrompt) -> Mapping[str, str]:
    """The choice of a competitor: value -> words."""
    return {ALONE: "none: the target by itself"} | {str(i): label(prompt, one) for i, one in enumerate(prompt.versus)}


def leads(row: Mapping[str, Any], prompt: BoundPrompt) -> list[tuple[str, float]]:
    """(competitor's key, lead over it) of a row of `over`'s table."""
    return [(str(i), float(row[over_name(prompt, i)])) for i in range(len(prompt.versus))]


def _located(rec: Recording, kind: str, norm: str, k: int) -> pd.DataFrame:
    if most_candidates(rec.model, rec.prompt, kind, range(rec.model.anatomy.n_layers)) == 0:
        return pd.DataFrame()
    total = Query.of(rec, kind, norm, None).count
    return locate(rec, k=min(k, total), kind=kind, norm=norm, progress=False).table

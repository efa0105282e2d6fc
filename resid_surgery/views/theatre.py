"""The theatre without its page: what a prompt shows.

1. `faults` says what is wrong with a prompt, field by field, before any forward runs.
2. `read` records it: the stream and the predictions.
3. `found` locates subvalues; `about` says what one promotes and what switched it on.

What is then done to it is in `theatre_acts`. All of it is plain Python; the page only asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import pandas as pd

from resid_surgery._check import choice, message, whole
from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.sources import sources
from resid_surgery.errors import ArgumentError, PromptError, UnsupportedModelError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt, bind, token_id, token_text
from resid_surgery.sites import HeadSource, Neuron, Site
from resid_surgery.stream.recording import Recording, record
from resid_surgery.stream.tables import bs_columns, predictions, spectrum, state_after, stream_bs

FED = ("key", "writer", "position", "share", "unit", "edge")
KINDS = ("neuron", "head_source", "head")
MOST_CHARACTERS, MOST_TOKENS, MOST_VERSUS, MOST_FOUND = 4000, 256, 8, 50


@final
@dataclass(frozen=True, eq=False)
class Stage:
    """One prompt, recorded.

    Attributes:
        rec: the recording, with the stream at all positions. text: of the prompt, as it was typed.
        predictions: the model's top tokens. stream: bs-values of target and competitors along the stream.
    """

    rec: Recording
    text: str
    predictions: pd.DataFrame
    stream: pd.DataFrame


def faults(model: OpenedModel, text: str, target: str, versus: Sequence[str]) -> dict[str, str]:
    """What is wrong with a prompt: field ("text", "target", "versus") -> why. No forward runs.

    An empty target is none of them: the model's own first choice is taken.
    """
    odd = _of_another_kind(text, target, versus)
    if odd:
        return odd
    found = {"text": _text_fault(model, text), "target": _token_fault(model, target, "target") if target else ""}
    found["versus"] = _versus_fault(model, versus) or _twice(model, target, versus, found["target"])
    return {field: why for field, why in found.items() if why}


def _of_another_kind(text: Any, target: Any, versus: Any) -> dict[str, str]:
    """Fields that hold no texts, whatever a page sent -> why."""
    found = {name: message(name, "a text", given) for name, given in (("text", text), ("target", target))
             if not isinstance(given, str)}  # fmt: skip
    if not isinstance(versus, (list, tuple)) or not all(isinstance(one, str) for one in versus):
        found["versus"] = message("versus", "a list of texts", versus)
    return found


def _text_fault(model: OpenedModel, text: str) -> str:
    if not text or len(text) > MOST_CHARACTERS:
        return message("text", f"1 to {MOST_CHARACTERS:,} characters", f"{len(text)} of them")
    try:
        n = len(bind(Prompt(text, target=0), model.tokenizer, model).ids)
    except PromptError as error:
        return str(error)
    return "" if n <= MOST_TOKENS else message("text", f"at most {MOST_TOKENS} tokens in the theatre", f"{n} of them")


def _token_fault(model: OpenedModel, token: str, field: str) -> str:
    try:
        token_id(token, model.tokenizer, model, field)
    except PromptError as error:
        spaced = not token.startswith(" ") and not _token_fault(model, f" {token}", field)
        return f"{error} With its leading space, {f' {token}'!r}, it is one token." if spaced else str(error)
    return ""


def _versus_fault(model: OpenedModel, versus: Sequence[str]) -> str:
    if len(versus) > MOST_VERSUS:
        return message("versus", f"at most {MOST_VERSUS} tokens", len(versus))
    return next(filter(None, (_token_fault(model, one, "versus") for one in versus)), "")


def _twice(model: OpenedModel, target: str, versus: Sequence[str], fault: str) -> str:
    named = [*versus, *([target] if target and not fault else [])]
    ids = [token_id(one, model.tokenizer, model, "versus") for one in named]
    if len(set(ids)) == len(ids):
        return ""
    return message("versus", "distinct tokens other than the target", list(versus))


def read(model: OpenedModel, text: str, target: str = "", versus: Sequence[str] = ()) -> Stage:
    """Record a prompt.

    Args:
        model: with a tokenizer. text: the prompt. target: one token, or nothing for the model's first choice.
        versus: competitors.

    Returns:
        `Stage`.

    Raises:
        PromptError: see `faults`, which says the same by fields.
    """
    wrong = faults(model, text, target, versus)
    if wrong:
        raise PromptError(" ".join(wrong.values()))
    first = record(model, Prompt(text, target=target or 0, versus=tuple(versus) if target else ()), positions="all")
    chosen = target or _first_choice(first, versus)
    bound = bind(Prompt(text, target=chosen, versus=tuple(versus)), model.tokenizer, model)
    rec = replace(first, prompt=bound)
    return Stage(rec, text, predictions(rec, top=min(8, model.vocab_size)), stream_bs(rec))


def _first_choice(rec: Recording, versus: Sequence[str]) -> str:
    """The most probable token that can be written down and is no competitor."""
    model = rec.model
    taken = {token_id(one, model.tokenizer, model, "versus") for one in versus}
    best = rec.logits.topk(min(100, len(rec.logits))).indices.tolist()
    named = (token_text(i, model.tokenizer) for i in best if i not in taken and writable(model, i))
    chosen = next(named, None)
    if chosen is None:
        raise PromptError("`target` must be given: none of the most probable tokens can be written as text.")
    return chosen


def writable(model: OpenedModel, token: int) -> bool:
    """Whether a token's text, typed, is that token."""
    text = token_text(token, model.tokenizer)
    return bool(text) and not _token_fault(model, text, "token") and token_id(text, model.tokenizer, model, "") == token


def found(stage: Stage, kind: str, k: int = 10) -> pd.DataFrame:
    """The best k subvalues of a kind by log-prob increase, proven, with what they promote.

    Args:
        stage: a prompt. kind: one of `KINDS`. k: how many, up to `MOST_FOUND`, or all that there are.

    Returns:
        Columns of `resid_surgery.locate`'s table, and promotes, suppresses (texts of four tokens each); step, bs_value:
        where along the stream it wrote, and the target's bs-value there.

    Raises:
        ArgumentError: another kind or k.
    """
    choice("kind", kind, KINDS)
    whole("k", k, 1, MOST_FOUND)
    rec, a = stage.rec, stage.rec.model.anatomy
    heads = sum(size.n_heads for size in a.sizes)
    counts = {"head": heads, "head_source": heads * (rec.prompt.position + 1)}
    counts["neuron"] = sum(len(group.coefficient) for one in rec.layers for group in one.groups)
    if not counts[kind]:
        raise ArgumentError(message("kind", f"one that {rec.model.name} has", kind))
    located = locate(rec, k=min(k, counts[kind]), kind=kind, progress=False)
    table = located.table.copy()
    tokens = spectrum(rec, located.sites, top=min(4, rec.model.vocab_size // 2))
    named = tokens.groupby(["site", "side"], sort=False)["token"].agg(lambda some: " ".join(map(repr, some)))
    for side in ("promotes", "suppresses"):
        table[side] = [named[site, side] for site in table["site"]]
    places = [_after(stage, site) for site in located.sites]
    table["step"], table["bs_value"] = [step for step, _ in places], [value for _, value in places]
    return table


def _after(stage: Stage, site: Site) -> tuple[int, float]:
    """The first state of the stream that holds what a site wrote, and the target's bs-value there."""
    names = stage.stream[stage.stream["role"] == "target"].set_index("site")
    row: Any = names.loc[state_after(site, list(names.index))]
    return int(row["step"]), float(row["bs_value"])


@final
@dataclass(frozen=True, eq=False)
class About:
    """What is known of one subvalue.

    Attributes:
        promotes, suppresses: texts of the tokens whose bs-values it raises and lowers most.
        sources: key, writer, position, share, unit; edge (text; cutting it takes this writer from this reader).
        why: why its sources cannot be split in this model; nothing where they can.
    """

    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    sources: pd.DataFrame
    why: str = ""


def about(stage: Stage, site: Site) -> About:
    """What a subvalue promotes, and what switched it on.

    Args:
        stage: a prompt. site: a neuron (its keys), a head or a (head, source) (its value side).
    """
    tokens = spectrum(stage.rec, site, top=min(8, stage.rec.model.vocab_size // 2))
    promotes, suppresses = (tuple(tokens[tokens["side"] == side]["token"]) for side in ("promotes", "suppresses"))
    try:
        return About(promotes, suppresses, fed_by(stage, site))
    except UnsupportedModelError as error:
        return About(promotes, suppresses, pd.DataFrame(columns=list(FED)), str(error))


def picked(model: OpenedModel, token: Any) -> str:
    """The text of a listed token that is to be target or competitor.

    Raises:
        PromptError: its text, typed, is another token.
    """
    whole("token", token, 0, model.vocab_size - 1, model=model.name, error=PromptError)
    if not writable(model, token):
        raise PromptError(message("token", "one whose text is one token", token_text(token, model.tokenizer)))
    return token_text(token, model.tokenizer)


def fed_by(stage: Stage, site: Site, top: int = 5) -> pd.DataFrame:
    """The largest sources of a subvalue, each with the edge along which it is read.

    Args:
        stage: a prompt. site: a neuron (its keys), a head or a (head, source) (its value side).
        top: how many a reading.

    Returns:
        Columns: key, writer, position, share, unit; edge (text; cutting it takes this writer from this reader).

    Raises:
        ResidSurgeryError: this reader cannot be split in this model.
    """
    rows = sources(stage.rec, site, grain="layer", top=top)
    rows = rows[~rows["kind"].isin(["remainder", "constant"])].reset_index(drop=True)
    table = rows[list(FED[:-1])].copy()
    edges = [_edge_text(site, row) for row in rows.to_dict("records")]
    table["edge"] = pd.Series(edges, dtype=object)
    return table


def _edge_text(site: Site, row: Any) -> str:
    if isinstance(site, Neuron):
        return f"{row['writer']}->{site}"
    reader = HeadSource(site.layer, site.head, int(row["position"]))  # type: ignore[attr-defined]
    return f"{row['writer']}->{reader}.value"


def readout_columns(stage: Stage) -> dict[str, str]:
    """Column of bs-values -> the token that it is of."""
    p = stage.rec.prompt
    return dict(zip(bs_columns(stage.rec), (p.names[i] for i in p.readouts), strict=True))

"""Constancy: what each addend would be for the last token alone, and what the rest of the prompt adds.

    addend = constant + context,   bs(addend) = bs(constant) + bs(context)   under the recording's frozen norm,

with the constant from a prompt of that token alone (behind the BOS that the prompt began with), or the mean over
prompts that end in it.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.aims import Aim, aim_of, need_readout
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind, token_text
from resid_surgery.stream.recording import Recording, be_recording, need_recording, record
from resid_surgery.stream.subvalues import addends

AIMS = {"target": "", "difference": "_difference"}


def token_constants(rec: Recording, over: Any = None) -> pd.DataFrame:
    """The ledger split into what hangs on the last token alone and what the context adds.

    A token alone stands where models dump attention: without a BOS its addends can be large and opposite, and the mean
    over prompts says more.

    Args:
        rec: a recording. over: None for a prompt of the token at the predicting position alone, behind the BOS if the
            recorded prompt began with one; or prompts (or recordings) that end in the same token, whose mean is taken.

    Returns:
        One row an addend at layer grain, and a constant of the readout: site, kind, layer; bs, constant, context
        (logits of the target; bs = constant + context); bs_difference, constant_difference, context_difference (target
        minus the mean of the competitors; where the prompt has some); norm ("frozen"), position, over (how many runs),
        closure (|sum of constant and context - the model's value|, logits).

    Raises:
        ArgumentError, PromptError: `over` is empty, has a prompt that ends in another token, or a recording of another
        model (before any forward). StaleRecordingError: weights changed.

    Source: the static and the contextual part of a ledger; compare Elhage et al. 2021 (direct path: bigrams).
    """
    be_recording(rec)
    wanted = alone(rec) if over is None else _given(rec, over)
    need_recording(rec)
    runs = [one if isinstance(one, Recording) else record(rec.model, one) for one in wanted]
    means = _means(rec, runs)
    table = None
    for name, ending in AIMS.items():
        if name == "target" or rec.prompt.versus:
            part = _split(rec, means, aim_of(rec, name, need_readout(rec, name, None)), ending)
            table = part if table is None else table.join(part.iloc[:, 3:])
    assert table is not None
    measured = float(rec.work(rec.bs_values)[rec.prompt.target])
    total = float(table["constant"].sum() + table["context"].sum())
    return table.assign(norm="frozen", position=rec.prompt.position, over=len(runs), closure=abs(total - measured))


def alone(rec: Recording) -> list[Prompt]:
    """The prompt of the token at the predicting position alone, behind a BOS that the prompt began with."""
    ids, t = rec.prompt.ids, rec.prompt.position
    begin = [ids[0]] if t > 0 and ids[0] == bos_of(rec.model) else []
    return [Prompt(ids=[*begin, ids[t]], target=rec.prompt.target, versus=rec.prompt.versus)]


def bos_of(model: OpenedModel) -> int | None:
    """The token that texts begin with, as the tokenizer or else the config names it."""
    named = getattr(model.tokenizer, "bos_token_id", None)
    found = getattr(getattr(model.module, "config", None), "bos_token_id", None) if named is None else named
    return found if isinstance(found, int) else None


def _given(rec: Recording, over: Any) -> list[Recording | Prompt]:
    """Runs that the mean is over, checked to end in the token at the predicting position."""
    if isinstance(over, (str, bytes, Prompt, Recording)) or not _check.iterable(over):
        raise ArgumentError(_check.message("over", "None, or a sequence of prompts or recordings", over))
    found = list(over)
    if not found:
        raise ArgumentError(_check.message("over", "at least one prompt or recording", found))
    for number, one in enumerate(found):
        _need_same_end(rec, _bound(rec, one, number), number)
    return found


def _bound(rec: Recording, one: Any, number: int) -> BoundPrompt:
    if isinstance(one, Recording):
        if one.model is not rec.model:
            raise ArgumentError(f"over[{number}] must be a recording of {rec.model.name}, the model of `rec`.")
        need_recording(one)
        return one.prompt
    if not isinstance(one, Prompt):
        raise ArgumentError(_check.message(f"over[{number}]", "a prompt or a recording", one))
    return bind(one, rec.model.tokenizer, rec.model)


def _need_same_end(rec: Recording, prompt: BoundPrompt, number: int) -> None:
    token, found = rec.prompt.ids[rec.prompt.position], prompt.ids[prompt.position]
    if found != token:
        names = [token_text(i, rec.model.tokenizer) for i in (token, found)]
        raise PromptError(
            f"over[{number}] must have {names[0]!r} (id {token}) at its predicting position, as the recording of "
            f"{rec.model.name} has; it has {names[1]!r} (id {found}). Leave it out, or end it in that token."
        )


def _vectors(rec: Recording) -> dict[str, Tensor]:
    """Addend -> its vector in the final stream."""
    return {str(block.site(i)): vector for block in addends(rec, "layer")
            for i, vector in enumerate(block.all_vectors())}  # fmt: skip


def _means(rec: Recording, runs: list[Recording]) -> dict[str, Tensor]:
    """Addend -> its mean vector over runs."""
    found = [_vectors(one) for one in runs]
    return {site: torch.stack([one[site] for one in found]).mean(0) for site in _vectors(rec)}


def _split(rec: Recording, means: dict[str, Tensor], aim: Aim, ending: str) -> pd.DataFrame:
    """The three columns of one aim, an addend a row, then the readout's constants."""
    rows: list[tuple[Any, ...]] = []
    for block in addends(rec, "layer"):
        for i, vector in enumerate(block.all_vectors()):
            site = str(block.site(i))
            bs, constant = float(vector @ aim.direction), float(means[site] @ aim.direction)
            rows.append((site, block.kind, block.layer, bs, constant, bs - constant))
    rows += [(name, "constant", None, value, value, 0.0) for name, value in aim.constants.items()]
    names = [f"{name}{ending}" for name in ("bs", "constant", "context")]
    table = pd.DataFrame(rows, columns=["site", "kind", "layer", *names])
    return table.assign(layer=table["layer"].astype("Int64"))

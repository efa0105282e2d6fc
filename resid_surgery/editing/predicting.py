"""Predicting: does exposure, read off the base alone, say where an edit did damage?"""

from collections.abc import Sequence

import pandas as pd
import torch
from scipy.stats import spearmanr

from resid_surgery._check import iterable, message, whole
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.exposure import exposure
from resid_surgery.editing.running import Passage, Subject, WeightsSubject, compared, first_block
from resid_surgery.editing.surroundings import text_passage
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.stream.recording import need_model


def exposure_against_kl(model: OpenedModel, edit: Edit, texts: Sequence[str], *, tokens: int = 1500) -> pd.DataFrame:
    """Exposure of each position, and the KL that was measured there.

    A position also feels what the edit did to positions before it, which its own exposure does not know: the share of
    damage that is carried on is what the correlation lacks.

    Args:
        model: the base. edit: with changes of weights. texts: running text. tokens: read so many of them.

    Returns:
        One row a position: text, position, token, exposure, kl (KL(base, edited), nats); ``.attrs["rank_correlation"]``
        is Spearman's between the two, ``.attrs["p_value"]`` its p-value for independent positions; both NaN where one
        of the two is the same everywhere.

    Raises:
        ArgumentError: no texts, or exposure is defined for no tensor of the edit.
    """
    need_model(model)
    if not isinstance(edit, Edit):
        raise ArgumentError(message("edit", "an Edit", edit))
    tokens = whole("tokens", tokens, 1)
    texts = list(texts) if iterable(texts) else []
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise ArgumentError(message("texts", "a sequence of texts, none of them empty", texts))
    with edit.applied(model) as handle:
        edited = WeightsSubject(handle, "edited", first_block(model, edit))
        return exposed_and_measured(model, edit, edited, texts, tokens)


def exposed_and_measured(
    model: OpenedModel, edit: Edit, subject: Subject, texts: Sequence[str], tokens: int
) -> pd.DataFrame:
    """As `exposure_against_kl`, of an edited model at hand."""
    passages: list[Passage] = []
    for text in texts:
        if tokens > 0:
            ids = text_passage(model, text, tokens).ids
            tokens -= len(ids)
            passages.append(Passage(ids, tuple(range(len(ids)))))
    if not passages:
        raise ArgumentError(message("texts", "at least one text", list(texts)))
    window = max(len(one.ids) for one in passages)
    table = exposure(model, edit, [list(one.ids) for one in passages], window=window, progress=False)
    found = compared(WeightsSubject(model, "base"), [subject], passages, whole=False)[0]
    kl = torch.cat([one.kl for one in found]).double().numpy()
    out = table[["text", "position", "token", "exposure"]].assign(kl=kl)
    varied = len(out) > 2 and min(out["exposure"].nunique(), out["kl"].nunique()) > 1
    rank = spearmanr(out["exposure"], out["kl"]) if varied else (float("nan"), float("nan"))
    out.attrs |= {"rank_correlation": float(rank[0]), "p_value": float(rank[1])}
    return out

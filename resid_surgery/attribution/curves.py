"""How a score behaves: the probability as a vector grows, and the score of sums against the sum of scores."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from resid_surgery import _check
from resid_surgery.addresses import as_sites, expand
from resid_surgery.attribution.catalogue import NORMS, SCORES
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.scoring import Increase, scorer
from resid_surgery.attribution.states import States
from resid_surgery.attribution.streaming import stream
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.subvalues import resolve_in, vector_of

GROWTH = tuple(np.round(np.linspace(0.0, 10.0, 41), 4).tolist())


def probability_curve(rec: Recording, sites: Any, *, times: Any = GROWTH, norm: str = "frozen") -> pd.DataFrame:
    """F(l) = p(w, x + l v) and log F(l): what a subvalue does as its coefficient grows (the paper's F(l)).

    x is the state that v is added to. log F(l) is nearly straight while no token has most of the probability, and
    bends when the target, or another token that v promotes more, takes over.

    Args:
        rec: a recording. sites: addends, or slices of them. times: the l; 1 is what the model does.
        norm: "frozen" or "own".

    Returns:
        Columns: site, times, prob, log_prob (nats), log_prob_increase (over l = 0), norm, position.

    Raises:
        SiteError: a site is no addend of a sublayer. ArgumentError: `times` are no finite numbers.
        StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, the curve of F(l).
    """
    _check.choice("norm", norm, NORMS)
    need_recording(rec)
    if not _check.iterable(times):
        raise ArgumentError(_check.message("times", "a sequence of finite numbers", times))
    amounts = [_check.finite("times", one) for one in times]
    if not amounts:
        raise ArgumentError(_check.message("times", "at least one number", list(amounts)))
    found = [resolve_in(rec, one) for one in expand(as_sites(sites), rec.model.anatomy, rec.prompt.position)]
    frames = []
    for one in found:
        place = _place(one)
        v = vector_of(rec, one, "here")
        states = States.of(rec, [place], own=norm == "own")
        grown = v.new_tensor(amounts)[:, None] * v
        increase = states.evaluate(torch.zeros(len(amounts), dtype=torch.long), grown).double().cpu()
        log_p = float(states.log_p[0]) + increase.numpy()
        frames.append(
            pd.DataFrame(
                {"site": str(one), "times": amounts, "prob": np.exp(log_p), "log_prob": log_p,
                 "log_prob_increase": increase.numpy()}
            )
        )  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    table["norm"], table["position"] = norm, rec.prompt.position
    return table


def _place(site: Site) -> tuple[int, str]:
    layer = getattr(site, "layer", None)
    if layer is None:
        raise SiteError(f"`{site}` is not written by a sublayer, so there is no state that it is added to.")
    if hasattr(site, "part"):
        return layer, str(site.part)
    return layer, "attn" if hasattr(site, "head") else "mlp"


def cumulated(rec: Recording, *, layer: int, kind: str = "neuron", norm: str = "frozen") -> pd.DataFrame:
    """Sum of scores against score of the sum, subvalues of a layer added one by one, worst first (Figure 3).

    C is not additive, but nearly linear in sums: the fitted line says how nearly.

    Args:
        rec: a recording. layer: one layer. kind: as in `scores`. norm: "frozen" or "own".

    Returns:
        Columns: n (how many were added), site (the last one), log_prob_increase (its own), sum_of_scores,
        score_of_sum (nats), norm, position. ``.attrs["line"]`` has slope, intercept and r of score_of_sum on
        sum_of_scores (least squares).

    Raises:
        ArgumentError: unknown kind, norm or layer. StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Figure 3.
    """
    _check.choice("norm", norm, NORMS)
    be_recording(rec)
    query = Query.of(rec, kind, norm, [_check.whole("layer", layer, -rec.model.anatomy.n_layers)])
    if len(query.places) > 1:
        raise ArgumentError(_check.message("kind", "one whose subvalues share a state; 'layer' has two", kind))
    need_recording(rec)
    found = scorer(query, SCORES["log_prob_increase"])
    assert isinstance(found, Increase)
    (values,) = stream([found], 0)
    block, order = found.blocks[0], torch.argsort(values, stable=True).cpu()
    sums, total = [], None
    for members in torch.split(order, found.states.chunk):
        vectors = block.vectors(members).cumsum(0)
        vectors = vectors if total is None else vectors + total
        total = vectors[-1]
        sums.append(found.states.evaluate(torch.zeros(len(members), dtype=torch.long), vectors))
    scores = values.double().cpu()[order].numpy()
    table = pd.DataFrame(
        {
            "n": range(1, block.count + 1),
            "site": [str(block.site(int(i))) for i in order],
            "log_prob_increase": scores,
            "sum_of_scores": scores.cumsum(),
            "score_of_sum": torch.cat(sums).double().cpu().numpy(),
        }
    )
    table["norm"], table["position"] = norm, rec.prompt.position
    x, y = table["sum_of_scores"], table["score_of_sum"]
    if len(table) > 1 and x.std() > 0 and y.std() > 0:
        slope, intercept = np.polyfit(x, y, 1)
        table.attrs["line"] = {
            "slope": float(slope),
            "intercept": float(intercept),
            "r": float(np.corrcoef(x, y)[0, 1]),
        }
    return table

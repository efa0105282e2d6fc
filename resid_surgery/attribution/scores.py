"""`scores`: every subvalue's score, exact or between certified bounds, and `counts` of helpful and harmful ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.attribution.catalogue import SCORES, check_scores
from resid_surgery.attribution.queries import CONTRASTS, Query, need_competitors
from resid_surgery.attribution.scoring import Increase, Scorer, scorer
from resid_surgery.attribution.streaming import stream
from resid_surgery.errors import ArgumentError
from resid_surgery.stream.recording import Recording, need_recording

LONG = 4000


def scores(
    rec: Recording,
    *,
    kind: str = "neuron",
    score: Any = "log_prob_increase",
    norm: str = "frozen",
    layers: Any = None,
    versus: Any = None,
    bounds: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The exact score of *every* subvalue of a kind, by one score or several.

    Scores that need one take one pass over the vocabulary per direction, streamed in bounded memory and shared by
    all scores asked for: half a minute for all neurons of a 135M-parameter model. `locate` proves the best few in
    less than a hundredth of that, and `bounds` brackets all of them without such a pass.

    Args:
        rec: a recording.
        kind: "neuron", "head", "head_source" (a head reading one position), "attn_neuron" (a coordinate of a head's
            output), "attn_neuron_source" (the same from one position) or "layer".
        score: a name (see `describe_scores`), several, or "all" that the norm and the prompt allow.
        norm: "frozen" (scale of the final stream) or "own" (scale of each state).
        layers: None for all, or some.
        versus: competitors of "bs_difference" and "contrast", if other than the prompt's.
        bounds: certified lower and upper values instead of exact ones, O(d_model) each; for scores found by
            certificates. The first time on a model this computes a table (see `ranges`), half a minute here.
        progress: a bar on stderr; None shows it on a terminal for long passes.

    Returns:
        Columns: site, kind, layer, one column a score (see `describe_scores` for units) or, with `bounds`,
        ``<score>_lower`` and ``<score>_upper``; norm, position. ``.attrs["versus"]`` names the competitors.

    Raises:
        ArgumentError: unknown kind, score, norm or layer; no competitors; a score that has no bounds.
        StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141; see `describe_scores` for each.
    """
    _check.progress(progress)
    wanted = check_scores(score, norm)
    query = Query.of(rec, kind, norm, layers, versus)
    _check.flag("bounds", bounds)
    if isinstance(score, str) and score == "all":
        wanted = [one for one in wanted if (query.versus or one.name not in CONTRASTS)
                  and (not bounds or one.search != "exhaustive")]  # fmt: skip
    need_competitors(rec.model, wanted, query.versus)
    for one in wanted:
        if bounds and one.search == "exhaustive":
            raise ArgumentError(f"score {one.name!r} has no bounds; leave `bounds` out, or ask for another score.")
    need_recording(rec)
    scorers = [scorer(query, one) for one in wanted]
    if bounds:
        for scored in scorers:
            if isinstance(scored, Increase):
                scored.need_ranges(scored.blocks)
    shown = progress if progress is not None else not bounds and query.count > LONG
    frames = []
    with progress_bar("scores", query.count, shown=shown) as step:
        for b, (layer, _, block) in enumerate(query.found()):
            columns: dict[str, Any] = {"site": [str(block.site(i)) for i in range(block.count)]}
            columns |= {"kind": block.kind, "layer": layer}
            frames.append(pd.DataFrame(columns | (_bounded(scorers, b) if bounds else _exact(scorers, b, step))))
    table = pd.concat(frames, ignore_index=True)
    table["norm"], table["position"] = norm, rec.prompt.position
    table.attrs["versus"] = query.versus
    return table


def counts(
    rec: Recording,
    *,
    kind: str = "neuron",
    score: str = "log_prob_increase",
    norm: str = "frozen",
    layers: Any = None,
    versus: Any = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """How many subvalues of each layer help the target and how many harm it (the paper's Figure 6).

    Certified bounds settle the sign of most; only those whose sign they leave open are evaluated exactly. The sign of a
    score within rounding of 0 (1e-6 nats in float32) is as good as undetermined.

    Args:
        rec: a recording. kind, norm, layers, versus: as in `scores`.
        score: one whose sign says helpful or harmful: nats, logits or probability; not "log_prob_alone".
        progress: a bar on stderr; None shows it on a terminal for long ones.

    Returns:
        Columns: layer, part ("attn" or "mlp"), kind, helpful (> 0), harmful (< 0), zero, candidates, evaluations (exact
        ones, each a pass over the vocabulary), score, norm, position.

    Raises:
        ArgumentError: unknown kind, score, norm or layer; a score whose sign says nothing.
        StaleRecordingError: weights changed.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Figure 6.
    """
    _check.progress(progress)
    units = ("nats", "logits", "probability")
    signed = tuple(name for name, s in SCORES.items() if s.unit in units and name != "log_prob_alone")
    (wanted,) = check_scores([_check.choice("score", score, signed)], norm)
    query = Query.of(rec, kind, norm, layers, versus)
    need_competitors(rec.model, [wanted], query.versus)
    need_recording(rec)
    found = scorer(query, wanted)
    if isinstance(found, Increase):
        found.need_ranges(found.blocks)
    rows = []
    with progress_bar("counts", query.count, shown=progress if progress is not None else query.count > LONG) as step:
        for b, (layer, part, block) in enumerate(query.found()):
            signs, evaluated = signs_of(found, b)
            helpful, harmful = int((signs > 0).sum()), int((signs < 0).sum())
            rest = block.count - helpful - harmful
            rows.append((layer, part, block.kind, helpful, harmful, rest, block.count, evaluated))
            step(done=block.count)
    names = ["layer", "part", "kind", "helpful", "harmful", "zero", "candidates", "evaluations"]
    table = pd.DataFrame(rows, columns=names)
    table["score"], table["norm"], table["position"] = wanted.name, norm, rec.prompt.position
    return table


def signs_of(found: Scorer, b: int) -> tuple[Tensor, int]:
    """Signs of a block's scores, and how many exact evaluations they took."""
    if not isinstance(found, Increase):
        (values,) = stream([found], b)
        return values.sign(), 0
    low, high = found.bounds(b, below=True), found.bounds(b, below=False)
    signs = (low > 0).to(low) - (high < 0).to(low)
    zero = found.blocks[b].zero
    left = (low <= 0) & (high >= 0) & (torch.ones_like(low, dtype=torch.bool) if zero is None else ~zero)
    members = torch.nonzero(left)[:, 0].cpu()
    if len(members):
        (values,) = stream([found], b, members=members)
        signs[members.to(signs.device)] = values.sign()
    return signs, len(members)


def _exact(scorers: Sequence[Scorer], b: int, step: Any) -> dict[str, np.ndarray]:
    return {one.score.name: _numbers(values) for one, values in zip(scorers, stream(scorers, b, step), strict=True)}


def _bounded(scorers: Sequence[Scorer], b: int) -> dict[str, np.ndarray]:
    """Lower and upper values; both are the score itself where that is linear."""
    columns = {}
    for one in scorers:
        name = one.score.name
        if isinstance(one, Increase):
            columns[f"{name}_lower"] = _numbers(one.bounds(b, below=True))
            columns[f"{name}_upper"] = _numbers(one.bounds(b, below=False))
        else:
            (values,) = stream([one], b)
            columns[f"{name}_lower"] = columns[f"{name}_upper"] = _numbers(values)
    return columns


def _numbers(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()

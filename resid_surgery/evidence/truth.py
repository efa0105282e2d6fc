"""Scores against the truth: what zeroing each neuron really does, and which score knew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from resid_surgery import _check
from resid_surgery._progress import progress as progress_bar
from resid_surgery.attribution.catalogue import SCORES, check_scores
from resid_surgery.attribution.locating import pick
from resid_surgery.attribution.queries import CONTRASTS, Query, need_competitors
from resid_surgery.attribution.scores import LONG
from resid_surgery.attribution.scoring import scorer
from resid_surgery.attribution.streaming import stream
from resid_surgery.errors import ArgumentError
from resid_surgery.models.remoting import Where, remotely
from resid_surgery.stream.blocks import Numbering
from resid_surgery.stream.recording import Recording, need_recording
from resid_surgery.surgery.interventions import Zero
from resid_surgery.surgery.sweeping import sweep


@remotely
def score_against_effect(
    rec: Recording,
    *,
    kind: str = "neuron",
    scores: Any = "all",
    best: int | None = None,
    random: int | None = None,
    positions: str = "target",
    norm: str = "frozen",
    seed: int = 0,
    also: Sequence[int] = (),
    progress: bool | None = None,
    remote: Where = None,
) -> pd.DataFrame:
    """Every score of subvalues beside their measured effect: the log-probability lost when one is zeroed.

    Args:
        rec: a recording. kind: as in `rs.scores`. scores: names, or "all" that the norm and the prompt allow.
        best, random: measure the union of every score's best so many and so many more at random; all subvalues if
            both are None (46,080 neurons: a minute of sweep and one of scores here).
        positions: where they are zeroed, "target" or "all". norm: of the scores. seed: of the random ones.
        also: other targets whose ranks are to be counted in the same pass, if ranks are asked for.
        progress: bars on stderr; None shows them on a terminal.
        remote: where traces run, as for `resid_surgery.intervene`.

    Returns:
        One row per measured subvalue. Columns: site, kind, layer, effect (nats: log p(w) before minus after),
        one a score, drawn (True for the random ones: an unbiased sample of all), norm, position.
        ``.attrs["candidates"]`` says of how many.

    Raises:
        ArgumentError: unknown kind, score, norm; sizes out of range. StaleRecordingError: weights changed.

    Source: effect of zeroing as in Yu & Ananiadou, arXiv 2312.12141, section 5, here for every neuron.
    """
    _check.progress(progress)
    wanted = check_scores(scores, norm)
    query = Query.of(rec, kind, norm, None, also=also)
    if isinstance(scores, str) and scores == "all" and not query.versus:
        wanted = [one for one in wanted if one.name not in CONTRASTS]
    need_competitors(rec.model, wanted, query.versus)
    _check.choice("positions", positions, ("target", "all"))
    seed = _check.seed(seed)
    best, random = (None if value is None else _check.whole(name, value, 0, query.count, model=rec.model.name)
                    for name, value in (("best", best), ("random", random)))  # fmt: skip
    if (best is not None or random is not None) and not (best or 0) + (random or 0):
        raise ArgumentError(_check.message("best, random", "more than 0 together, or both None", (best, random)))
    sampled = best is not None or random is not None
    need_recording(rec)
    scorers = [scorer(query, one) for one in wanted]
    lots = Numbering(query.blocks())
    sample = np.random.default_rng(seed).choice(len(lots), random or 0, replace=False)
    if not sampled:
        members = torch.arange(len(lots))
    else:
        found = [pick(one, best).numbers for one in scorers] if best else []
        members = torch.tensor(sorted({*sample.tolist(), *(i for some in found for i in some)}))
    sites = [lots.site(int(i)) for i in members]
    home = lots.home(members)
    columns: dict[str, Any] = {
        "site": [str(one) for one in sites],
        "kind": kind,
        "layer": [query.places[int(b)][0] for b in home],
    }
    with progress_bar("scores", len(members), shown=progress is not False and len(members) > LONG) as step:
        parts = [stream(scorers, b, step, members[home == b] - lots.first[b]) for b in sorted(set(home.tolist()))]
    for one, values in zip(scorers, zip(*parts, strict=True), strict=True):
        columns[one.score.name] = torch.cat([part.double().cpu() for part in values]).numpy()
    rows = [({"site": str(one)}, Zero(one, positions=positions)) for one in sites]
    measured = sweep(rec, rows, progress=progress)
    table = pd.DataFrame(columns)
    table.insert(3, "effect", -measured["log_prob_change"])
    table["drawn"] = torch.isin(members, torch.from_numpy(sample)).numpy() if sampled else True
    table["norm"], table["position"] = norm, rec.prompt.position
    table.attrs["candidates"] = len(lots)
    return table


def agreement(table: pd.DataFrame, *, ks: Sequence[int] = (10, 100)) -> pd.DataFrame:
    """How well each score agrees with the measured effect: rank correlation, and recall of the most effective.

    Args:
        table: from `score_against_effect`. ks: recall@k is the share of the k subvalues with the largest effect that
            are among the score's first k.

    Returns:
        Columns: score, spearman (over all rows), spearman_drawn (over the random sample, or all where everything was
        measured: unbiased for the whole model), recall@k for each k (among the rows measured), n, n_drawn.

    Raises:
        ArgumentError: not such a table; a k beyond its rows.

    Source: Spearman 1904; recall@k as in information retrieval.
    """
    if not isinstance(table, pd.DataFrame) or not {"effect", "drawn"} <= set(table):
        raise ArgumentError(_check.message("table", "from resid_surgery.score_against_effect", type(table).__name__))
    sizes = _check.wholes("ks", ks, 1, len(table))
    table = table.reset_index(drop=True)  # labels of tables that were put together repeat
    drawn, rows = table[table["drawn"]], []
    largest = {k: set(table["effect"].nlargest(k).index) for k in sizes}
    for name in [one for one in SCORES if one in table]:
        sign = SCORES[name].sign()
        row: dict[str, Any] = {"score": name}
        for column, some in (("spearman", table), ("spearman_drawn", drawn)):
            row[column] = (
                float((some[name] * sign).corr(some["effect"], method="spearman")) if len(some) > 2 else np.nan
            )
        first = (table[name] * sign).sort_values(ascending=False, kind="stable").index
        row |= {f"recall@{k}": len(largest[k] & set(first[:k])) / k for k in sizes}
        rows.append(row | {"n": len(table), "n_drawn": len(drawn)})
    return pd.DataFrame(rows)

"""By layer: how concentrated a layer's help is, and which layers tell the target from a competitor."""

from typing import Any

import pandas as pd

from resid_surgery import _check
from resid_surgery.attribution.scores import scores
from resid_surgery.errors import ArgumentError
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.stream.tables import decompose


def best_share(
    rec: Recording, *, kind: str = "neuron", k: int = 10, norm: str = "frozen", layers: Any = None
) -> pd.DataFrame:
    """How much of what helps in each layer its k best subvalues give (the paper's Figure 7).

    share = (sum of the k largest scores, as far as they are positive) / (sum of all positive scores), the scores being
    log-prob increases.

    Args:
        rec: a recording. kind, norm, layers: as in `scores`. k: how many.

    Returns:
        Columns: layer, kind, best (nats), helpful (nats, all positive scores), share (0..1; missing where nothing
        helps), k, norm, position.

    Raises:
        ArgumentError: unknown kind, norm or layer.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Figure 7.
    """
    k = _check.whole("k", k, 1)
    table = scores(rec, kind=kind, norm=norm, layers=layers, progress=False)
    positive = table["log_prob_increase"].clip(lower=0.0).groupby(table["layer"])
    best, helpful = positive.apply(lambda one: float(one.nlargest(k).sum())), positive.sum()
    out = pd.DataFrame({"layer": helpful.index.astype(int), "kind": kind, "best": best.to_numpy(),
                        "helpful": helpful.to_numpy()})  # fmt: skip
    out["share"] = (out["best"] / out["helpful"]).where(out["helpful"] > 0)
    return out.assign(k=k, norm=norm, position=rec.prompt.position)


def separation(rec: Recording) -> pd.DataFrame:
    """Which layers tell the target from its competitors: bs(target) - bs(competitor) (the paper's Figure 10).

    Args:
        rec: a recording of a prompt with competitors.

    Returns:
        One row an attention or MLP output and competitor: site, kind ("attn" or "mlp"), layer, target, versus,
        bs_target, bs_versus, difference (logits), norm ("frozen"), position. With embedding and constants (`decompose`)
        differences sum to that of the model's own logits before a soft-cap.

    Raises:
        ArgumentError: the prompt has no competitors.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, Figure 10.
    """
    be_recording(rec)
    if not rec.prompt.versus:
        raise ArgumentError(_check.message("rec", "of a prompt with competitors", rec, do="Pass Prompt(versus=[...])."))
    ledger = decompose(rec)
    tokens = ledger.attrs["tokens"]
    rows = ledger[ledger["kind"].isin(["attn", "mlp"])]
    frames = []
    for column in (name for name in tokens if name != "bs_target"):
        one = rows[["site", "kind", "layer", "bs_target"]].assign(target=tokens["bs_target"], versus=tokens[column])
        frames.append(one.assign(bs_versus=rows[column], difference=rows["bs_target"] - rows[column]))
    table = pd.concat(frames, ignore_index=True)[
        ["site", "kind", "layer", "target", "versus", "bs_target", "bs_versus", "difference"]
    ]
    table["layer"] = table["layer"].astype(int)
    return table.assign(norm="frozen", position=rec.prompt.position)

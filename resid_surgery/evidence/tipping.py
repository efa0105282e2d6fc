"""Tipping: the difference of two tokens' bs-values, part by part: addends, subvalues, and what switched these on."""

from collections.abc import Sequence
from typing import cast

import pandas as pd

from resid_surgery.addresses import parse_site
from resid_surgery.attribution.locating import locate
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.sources import COLUMNS, sources
from resid_surgery.sites import ExpertNeuron, Neuron, SharedNeuron
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.subvalues import need_group
from resid_surgery.stream.tables import decompose, spectrum


def difference_ledger(toward: Recording) -> pd.DataFrame:
    """The ledger of a recording's target (wrong) and its competitor (right), and of their difference."""
    table = _named(decompose(toward).drop(columns="bs_target_centred"))
    wrong, right = (float(toward.work(toward.bs_values)[i]) for i in toward.prompt.readouts)
    table["closure"] = abs(float(table["difference"].sum()) - (wrong - right))
    table.attrs["tokens"] = dict(zip(("bs_wrong", "bs_right"), toward.prompt.names.values(), strict=True))
    return table


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """bs-values under the names of what they are of, and their difference."""
    table = table.rename(columns={"bs_target": "bs_wrong", "bs_versus_1": "bs_right"})
    table.insert(list(table.columns).index("bs_right") + 1, "difference", table["bs_wrong"] - table["bs_right"])
    return table


def tipped_by(toward: Recording, kinds: Sequence[str], k: int, top: int) -> pd.DataFrame:
    """The subvalues with the largest parts of the difference, of each kind and for each side."""
    frames = []
    for kind in kinds:
        most = min(k, Query.of(toward, kind, "frozen", None).count)
        for side, worst in (("for wrong", False), ("for right", True)):
            found = locate(toward, k=most, kind=kind, score="bs_difference", worst=worst).table
            frames.append(found[found["bs_difference"] * (-1 if worst else 1) > 0].assign(side=side))
    table = _named(pd.concat(frames, ignore_index=True).drop(columns="bs_difference"))
    table["promotes"] = table["site"].map(_promoted(toward, table["site"].tolist(), top))
    return table[["rank", "side", "site", "kind", "layer", "bs_wrong", "bs_right", "difference", "promotes", "norm",
                  "position"]]  # fmt: skip


def _promoted(toward: Recording, sites: list[str], top: int) -> dict[str, str]:
    """site -> the tokens that it raises most, quoted."""
    if not sites:
        return {}
    table = spectrum(toward, sites, top=top)
    groups = table[table["side"] == "promotes"].groupby("site", sort=False)["token"]
    return {str(site): " ".join(map(repr, tokens)) for site, tokens in groups}


def sources_of(toward: Recording, tipped: pd.DataFrame, readers: int, top: int) -> pd.DataFrame:
    """What switched the best neurons for `wrong` on."""
    rows = tipped[(tipped["side"] == "for wrong") & (tipped["kind"] == "neuron")]
    sites = [cast(Neuron | ExpertNeuron | SharedNeuron, parse_site(site)) for site in rows["site"]]
    known = [site for site in sites if need_group(toward, site).pre_activations][:readers]
    return sources(toward, known, grain="layer", top=top) if known else pd.DataFrame(columns=list(COLUMNS))

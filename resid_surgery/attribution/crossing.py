"""Crossing layers: what each lower vector does for the helpful and the unhelpful neurons of an MLP layer.

With C_k the log-prob increase of neuron k, the layer's neurons are helpful (C_k > 0) or unhelpful (C_k < 0). Without a
lower vector u their coefficients would be m_k(-u), worked out anew through every key; with g_k what one unit of a
neuron's coefficient adds to bs_w - sum_i p_i bs_i (log p(w) to first order),

    score(u, group) = sum over the group of (m_k - m_k(-u)) g_k

is what u lends the layer through that group (paper: cross-layer contribution).
"""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.aims import Aim, aim_of, need_readout
from resid_surgery.attribution.catalogue import SCORES
from resid_surgery.attribution.mlp_readers import coefficients_without, worth_of
from resid_surgery.attribution.queries import Query
from resid_surgery.attribution.scores import signs_of
from resid_surgery.attribution.scoring import Increase, scorer
from resid_surgery.errors import SiteError
from resid_surgery.sites import Constant, Site
from resid_surgery.stream.blocks import Numbering
from resid_surgery.stream.recording import Recording, be_recording, need_recording
from resid_surgery.stream.subvalues import addends

NORMS = ("frozen", "live")


def cross_layer(
    rec: Recording, layers: Any = None, *, grain: str = "layer", norm: str = "frozen", readout: str = "log_prob"
) -> pd.DataFrame:
    """What every lower vector lends the helpful and unhelpful neurons of MLP layers (paper: cross-layer score).

    Args:
        rec: a recording. layers: of the readers: numbers, None for all with an MLP of neurons whose keys are known.
        grain: of the writers: "layer" or "head" (heads, and whole MLPs). norm: of the recomputed coefficients: "frozen"
            keeps the norm's scale, "live" recomputes it. readout: what g_k is of: "log_prob", "target" or "difference".

    Returns:
        One row per layer and lower vector: layer, writer, writer_layer, part, helpful, unhelpful (nats for "log_prob",
        else bs-values; see the module), total (their sum), n_helpful, n_unhelpful, layer_helpful, layer_unhelpful (what
        the groups write themselves, sum of m_k g_k), inner_product_helpful, inner_product_unhelpful (sum over the
        group's keys of u . key without the norm: the paper's own query score), readout, norm, position.

    Raises:
        SiteError: a layer without neurons or known keys. ArgumentError: unknown option, layer out of range.

    Source: Yu & Ananiadou, arXiv 2312.12141 v1, section 4.3 and Figure 8.
    """
    _check.choice("norm", norm, NORMS)
    _check.choice("grain", grain, ("layer", "head"))
    be_recording(rec)
    competitors = need_readout(rec, readout, None)
    picked = [i for i in _check.layers(layers, rec.model.anatomy.n_layers, model=rec.model.name)
              if _readable(rec, i, needed=layers is not None)]  # fmt: skip
    if not picked:
        raise SiteError(f"{rec.model.name} has no MLP of neurons whose keys are known.")
    need_recording(rec)
    aim = aim_of(rec, readout, competitors)
    increase = scorer(Query.of(rec, "neuron", "frozen", picked), SCORES["log_prob_increase"])
    assert isinstance(increase, Increase)
    increase.need_ranges(increase.blocks)
    frames = [_of_layer(rec, layer, signs_of(increase, b)[0], grain, norm, aim) for b, layer in enumerate(picked)]
    table = pd.concat(frames, ignore_index=True)
    table["readout"], table["norm"], table["position"] = aim.name, norm, rec.prompt.position
    return table


def _readable(rec: Recording, layer: int, *, needed: bool) -> bool:
    groups = rec.layers[layer].groups
    found = bool(groups) and all(group.pre_activations for group in groups)
    if needed and not found:
        raise SiteError(f"layer {layer} of {rec.model.name} has no MLP of neurons whose keys are known.")
    return found


def _of_layer(rec: Recording, layer: int, signs: Tensor, grain: str, norm: str, aim: Aim) -> pd.DataFrame:
    blocks = addends(rec, grain, before=(layer, "mlp"))
    numbering = Numbering(blocks)
    numbers = torch.arange(len(numbering))
    vectors = numbering.vectors(numbers)
    lent, inner = _lent(rec, layer, vectors, norm, aim)
    own = torch.cat([rec.work(g.coefficient) * worth_of(rec, layer, g, aim) for g in rec.layers[layer].groups])
    groups = {"helpful": signs > 0, "unhelpful": signs < 0}
    sites: list[Site] = [numbering.site(i) for i in numbers.tolist()]
    columns: dict[str, Any] = {
        "layer": layer,
        "writer": [str(site) for site in sites],
        "writer_layer": [getattr(site, "layer", -1) for site in sites],
        "part": [_part(site) for site in sites],
    }
    columns |= {name: lent[:, mask].sum(1).tolist() for name, mask in groups.items()}
    columns["total"] = lent[:, signs != 0].sum(1).tolist()
    columns |= {f"n_{name}": int(mask.sum()) for name, mask in groups.items()}
    columns |= {f"layer_{name}": float(own[mask].sum()) for name, mask in groups.items()}
    columns |= {f"inner_product_{name}": inner[:, mask].sum(1).tolist() for name, mask in groups.items()}
    return pd.DataFrame(columns)


def _part(site: Site) -> str:
    return site.name if isinstance(site, Constant) else str(getattr(site, "part", "attn"))


def _lent(
    rec: Recording, layer: int, vectors: Float[Tensor, "writer d_model"], norm: str, aim: Aim
) -> tuple[Float[Tensor, "writer neuron"], Float[Tensor, "writer neuron"]]:
    """(what each writer lends each neuron towards the aim, sum over its keys of writer . key)."""
    lent, inner = [], []
    for group in rec.layers[layer].groups:
        made = coefficients_without(rec, layer, group, vectors, norm)
        lent.append((rec.work(group.coefficient) - made) * worth_of(rec, layer, group, aim))
        keys = rec.model.group_keys(layer, group.expert)
        inner.append(sum((vectors @ rec.work(key.rows) for key in keys), torch.zeros(()).to(vectors)))
    return torch.cat(lent, 1), torch.cat(inner, 1)

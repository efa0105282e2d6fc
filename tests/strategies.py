"""Hypothesis strategies: prompts, sites and interventions for the tiny families."""

from typing import Any

import torch
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, shared

import resid_surgery as rs
from resid_surgery.sites import CONSTANTS, Site
from resid_surgery.stream.kinds import neuron_site

families = st.sampled_from(FAMILIES)
dtypes = st.sampled_from([torch.float64, torch.float32])

layers = st.integers(-(10**6), 10**6)
indices = st.integers(0, 10**6)

# Any site of each class, of no model in particular.
SITES: dict[str, st.SearchStrategy[Site]] = {
    "Neuron": st.builds(rs.Neuron, layers, indices),
    "ExpertNeuron": st.builds(rs.ExpertNeuron, layers, indices, indices),
    "SharedNeuron": st.builds(rs.SharedNeuron, layers, indices),
    "Head": st.builds(rs.Head, layers, indices),
    "HeadSource": st.builds(rs.HeadSource, layers, indices, indices),
    "AttnNeuron": st.builds(rs.AttnNeuron, layers, indices, indices, st.none() | indices),
    "Sublayer": st.builds(rs.Sublayer, layers, st.sampled_from(["attn", "mlp"])),
    "Resid": st.builds(rs.Resid, layers, st.sampled_from(["pre", "mid", "post"])),
    "Bias": st.builds(rs.Bias, layers, st.sampled_from(["attn", "mlp"]))
    | st.builds(rs.Bias, layers, st.just("mlp"), st.just("shared") | indices),
    "Constant": st.builds(rs.Constant, st.sampled_from(CONSTANTS)),
}


def positions_of(rec: rs.Recording, kind: str) -> Any:
    """Positions as an intervention takes them; "list" is the first and the predicting one."""
    return [0, rec.prompt.position] if kind == "list" else kind


@st.composite
def prompts(draw: Any, *, length: int | None = None) -> rs.Prompt:
    """A prompt by ids with a target and two competitors; the predicting position anywhere."""
    ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length or 1, max_size=length or 8))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3, unique=True))
    return rs.Prompt(ids=ids, target=tokens[0], versus=tokens[1:], position=draw(st.integers(-len(ids), len(ids) - 1)))


@st.composite
def recordings(draw: Any, *, dtype: torch.dtype = torch.float64, length: int | None = None) -> rs.Recording:
    """A recording of a random prompt on a random family."""
    return rs.record(shared(draw(families), dtype), draw(prompts(length=length)))


@st.composite
def sites(draw: Any, rec: rs.Recording, *, last: int | None = None) -> rs.Site:
    """Any site that can be operated on at positions up to `last`."""
    a, t = rec.model.anatomy, rec.prompt.position if last is None else last
    layer = draw(st.integers(0, a.n_layers - 1))
    size, row = a.sizes[layer], a.block(layer)
    writers = [part for part, kind in (("attn", row.attn_kind), ("mlp", row.mlp_kind)) if kind != "none"]
    stages = ["pre", "mid", "post"] if a.between(layer) else ["pre", "post"]
    options = [
        rs.Sublayer(layer, draw(st.sampled_from(writers))),
        rs.Resid(layer, draw(st.sampled_from(stages))),
        rs.Constant("embed"),
    ]
    if groups := rec.layers[layer].groups:  # a dense MLP is one; a mixture has its routed and shared experts
        group = draw(st.sampled_from(groups))
        options.append(neuron_site(layer, group.expert, draw(st.integers(0, len(group.coefficient) - 1))))
    if row.attn_kind == "attention":
        head, source = draw(st.integers(0, size.n_heads - 1)), draw(st.integers(0, t))
        index = draw(st.integers(0, size.d_head - 1))
        options += [rs.Head(layer, head), rs.HeadSource(layer, head, source), rs.AttnNeuron(layer, head, index),
                    rs.AttnNeuron(layer, head, index, source)]  # fmt: skip
    return draw(st.sampled_from(options))

"""Hypothesis strategies: prompts, sites and interventions for the tiny families."""

from typing import Any

import torch
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, shared

import resid_surgery as rs

families = st.sampled_from(FAMILIES)
dtypes = st.sampled_from([torch.float64, torch.float32])


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
    layer, head = draw(st.integers(0, a.n_layers - 1)), draw(st.integers(0, a.n_heads - 1))
    source, index = draw(st.integers(0, t)), draw(st.integers(0, a.d_head - 1))
    stages = ["pre", "post"] if a.parallel else ["pre", "mid", "post"]
    return draw(
        st.sampled_from(
            [
                rs.Neuron(layer, draw(st.integers(0, a.d_mlp - 1))),
                rs.Head(layer, head),
                rs.HeadSource(layer, head, source),
                rs.AttnNeuron(layer, head, index),
                rs.AttnNeuron(layer, head, index, source),
                rs.Sublayer(layer, draw(st.sampled_from(["attn", "mlp"]))),
                rs.Resid(layer, draw(st.sampled_from(stages))),
                rs.Constant("embed"),
            ]
        )
    )

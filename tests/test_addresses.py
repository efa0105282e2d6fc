"""Slices, positions and edges: texts that round-trip, what they expand to, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SITES, layers
from tiny import shared

import resid_surgery as rs
from resid_surgery.addresses import expand

writers = st.one_of(*(SITES[name] for name in ("Neuron", "Head", "HeadSource", "AttnNeuron", "Sublayer"))) | st.just(
    rs.Constant("embed")
)
heads = SITES["Head"]
readers = st.one_of(*(SITES[name] for name in ("Neuron", "ExpertNeuron", "Sublayer")))
sides = st.sampled_from(["all", "query", "key", "value"])
norms = st.sampled_from(["live", "frozen"])


@given(st.builds(rs.Edge, writers, heads, sides, norms) | st.builds(rs.Edge, writers, readers, norm=norms))
def test_an_edge_is_read_back_from_its_text(edge):
    assert rs.parse_site(str(edge)) == edge
    assert hash(rs.parse_site(str(edge))) == hash(edge)


@given(st.one_of(*SITES.values()), st.integers(-9, 9))
def test_a_site_at_a_position_is_read_back_from_its_text(site, position):
    assert rs.parse_site(str(rs.At(site, position))) == rs.At(site, position)


@given(layers, st.sampled_from("QKV"), st.integers(0, 99))
def test_a_projection_is_read_back_from_its_text(layer, side, head):
    assert rs.parse_site(str(rs.Projection(layer, side, head))) == rs.Projection(layer, side, head)


def names(text, position=3):
    return [str(one) for one in expand([rs.parse_site(text)], shared("llama").anatomy, position)]


def test_slices_expand_in_order():
    assert names("L*.H0") == ["L0.H0", "L1.H0", "L2.H0"]
    assert names("L1.N3:6") == ["L1.N3", "L1.N4", "L1.N5"]
    assert names("L1.H0,2<1:3") == ["L1.H0<1", "L1.H0<2", "L1.H2<1", "L1.H2<2"]
    assert names("L1.H0<*") == [f"L1.H0<{j}" for j in range(4)]
    assert names("L-2:.attn") == ["L1.attn", "L2.attn"]
    assert names("L-1,0.resid_pre") == ["L2.resid_pre", "L0.resid_pre"]
    assert names("L*.K*") == [f"L{i}.K{h}" for i in range(3) for h in range(2)]
    assert len(names("L*.N*")) == 120
    assert [str(one) for one in expand([rs.parse_site("L1.N0:2@2")], shared("llama").anatomy, 3)] == [
        "L1.N0@2",
        "L1.N1@2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L*.H0:9", r"`head` must be in 0\.\.3; got 0:9"),
        ("L0:2.H9,1", r"`head` must be in 0\.\.3 .*got 9"),
        ("L7,1.mlp", r"`layer` must be in 0\.\.2 .*got 7"),
        ("L1:1.mlp", "names no site"),
    ],
)
def test_slices_beyond_the_model_are_refused(text, message):
    with pytest.raises(rs.SiteError, match=message):
        names(text)


def test_slices_leave_out_layers_without_such_a_site():
    neox = shared("gpt_neox").anatomy
    with pytest.raises(rs.SiteError, match="names no site"):
        list(expand([rs.parse_site("L*.resid_mid")], neox, 3))
    with pytest.raises(rs.SiteError, match="parallel"):
        list(expand([rs.parse_site("L0,1.resid_mid")], neox, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rs.Edge("L1.resid_pre", "L2.mlp"), "`writer` must be an addend of the stream"),
        (lambda: rs.Edge("unembed", "L2.mlp"), "`writer` must be an addend"),
        (lambda: rs.Edge("L1.mlp", "embed"), "`reader` must be a neuron, head"),
        (lambda: rs.Edge("L1.mlp", "L2.resid_pre"), "`reader` must be a neuron, head"),
        (lambda: rs.Edge("L1.mlp", "L2.mlp", side="query"), "`side` must be 'all' for `L2.mlp`, which is no head"),
        (lambda: rs.Edge("L1.mlp", "L2.H1<0"), "'key' or 'value'.*the query has no source"),
        (lambda: rs.Edge("L1.mlp", "L2.H1", side="queery"), "Did you mean 'query'"),
        (lambda: rs.Edge("L1.mlp", "L2.H1", norm="cold"), "one of live, frozen"),
        (lambda: rs.Slice("L1.N3x"), r"must be a site with \*"),
        (lambda: rs.Slice("L1.N1::3"), "a number"),
        (lambda: rs.At("L1.N3", 2), "must be a site"),
        (lambda: rs.Projection(0, "q", 1), "one of Q, K, V"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(build, message):
    with pytest.raises(rs.SiteError, match=message):
        build()


def test_verbs_that_need_one_site_say_so_of_slices_and_positions():
    rec = rs.record(shared("llama"), rs.Prompt(ids=[5, 4, 3, 2], target=1))
    assert set(rs.sources(rec, "L1.N0:2", top=1)["reader"]) == {"L1.N0", "L1.N1"}
    assert set(rs.spectrum(rec, "L1.H*", top=1)["site"]) == {f"L1.H{h}" for h in range(4)}
    with pytest.raises(rs.ArgumentError, match='positions="all"'):
        rs.sources(rec, "L1.N0@2")
    with pytest.raises(rs.SiteError, match="names a position"):
        rs.spectrum(rec, "L1.N0@2")
    with pytest.raises(rs.SiteError, match=re.escape("must be a neuron")):
        rs.sources(rec, "L1.Q0")

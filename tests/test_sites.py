"""Sites: text that reads back, indices checked against a model, states that do not exist."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SITES, prompts
from strategies import sites as sites_in

import resid_surgery as rs
from resid_surgery.addresses import as_sites
from resid_surgery.errors import ResidSurgeryError, SiteError
from resid_surgery.models import zoo
from resid_surgery.models.anatomy import Anatomy, LayerSizes
from resid_surgery.models.layout import BlockLayout
from resid_surgery.sites import CONSTANTS, Site
from resid_surgery.stream.subvalues import vector_of

DENSE = dict(n_heads=4, n_kv_heads=2, d_head=6, d_mlp=40)


def block(attn: Any = "attention", mlp: Any = "neurons", **flags: Any) -> BlockLayout:
    """A block with writers of these kinds."""
    return BlockLayout(attn_kind=attn, attn="mixer", attn_out="mixer.out", mlp_kind=mlp, mlp="mlp", mlp_out="mlp.out",
                       experts="mlp.experts", **flags)  # fmt: skip


def anatomy(name: str, *layers: tuple[BlockLayout, dict[str, int]]) -> Anatomy:
    """The anatomy that sites are checked against, of a model with these layers."""
    rows = [row for row, _ in layers]
    return Anatomy(
        name=name, layout=rs.Layout(blocks="blocks", final_norm="norm", unembed="head", block=rows), matched="as given",
        d_model=24, vocab_size=97, context=None, tied=False, sizes=tuple(LayerSizes(**size) for _, size in layers),
        norms={},
    )  # fmt: skip


X = anatomy("X", *[(block(), DENSE)] * 3)
PARALLEL = anatomy("X", *[(block(parallel=True), DENSE)] * 3)
# a dense layer, a mixture with a shared expert, a mixture without, a layer with a mixer only, one with an MLP only
M = anatomy(
    "M",
    (block(), DENSE),
    (block(mlp="experts", shared_out="mlp.shared"), DENSE | dict(d_mlp=9, n_experts=5, d_expert=17)),
    (block(mlp="experts"), DENSE | dict(d_mlp=0, n_experts=5, d_expert=17)),
    (block("opaque", "none"), {}),
    (block("none", "neurons"), dict(d_mlp=40)),
)
indices = st.integers(0, 10**6)
parts = st.sampled_from(["attn", "mlp"])
shared = st.just("shared")
inside = st.one_of(
    st.builds(rs.Neuron, st.integers(-3, 2), st.integers(0, 39)),
    st.builds(rs.Head, st.integers(-3, 2), st.integers(0, 3)),
    st.builds(rs.HeadSource, st.integers(-3, 2), st.integers(0, 3), indices),
    st.builds(rs.AttnNeuron, st.integers(-3, 2), st.integers(0, 3), st.integers(0, 5), st.none() | indices),
    st.builds(rs.Sublayer, st.integers(-3, 2), parts),
    st.builds(rs.Resid, st.integers(-3, 2), st.sampled_from(["pre", "mid", "post"])),
    st.builds(rs.Bias, st.integers(-3, 2), parts),
    st.builds(rs.Constant, st.sampled_from(CONSTANTS)),
)
inside_mixtures = st.one_of(
    st.builds(rs.ExpertNeuron, st.sampled_from([1, 2, -4, -3]), st.integers(0, 4), st.integers(0, 16)),
    st.builds(rs.SharedNeuron, st.sampled_from([1, -4]), st.integers(0, 8)),
    st.builds(rs.Bias, st.sampled_from([1, 2, -4, -3]), st.just("mlp"), st.none() | st.integers(0, 4)),
    st.builds(rs.Bias, st.sampled_from([1, -4]), st.just("mlp"), shared),
    st.builds(rs.Neuron, st.sampled_from([0, 4, -1, -5]), st.integers(0, 39)),
    st.builds(rs.Head, st.sampled_from([0, 1, 2, -5]), st.integers(0, 3)),
    st.builds(rs.Resid, st.sampled_from([0, 1, 2, -4]), st.just("mid")),
    st.builds(rs.Resid, st.integers(-5, 4), st.sampled_from(["pre", "post"])),
)


def message_of(site: Site, sizes: Anatomy = X) -> str:
    """The message that resolving a site is refused with."""
    with pytest.raises(SiteError) as caught:
        site.resolve(sizes)
    assert isinstance(caught.value, IndexError)
    assert isinstance(caught.value, ResidSurgeryError)
    return str(caught.value)


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SITES)
def test_the_text_of_a_site_reads_back_as_the_same_site(kind: str) -> None:
    @given(SITES[kind])
    def reads_back(site: Site) -> None:
        assert type(site).__name__ == kind
        again = rs.parse_site(str(site))
        assert again == site
        assert type(again) is type(site)
        assert hash(again) == hash(site)
        assert str(again) == str(site)

    reads_back()


@given(a=st.one_of(*SITES.values()), b=st.one_of(*SITES.values()))
def test_two_sites_share_a_text_only_if_they_are_the_same(a: Site, b: Site) -> None:
    assert (str(a) == str(b)) == (a == b)


@given(st.text(max_size=12) | st.from_regex(r"L-?\d{1,4}\.[NHDEa-z.<\d]{0,10}", fullmatch=True))
def test_any_text_is_either_refused_or_a_site_whose_text_reads_back(text: str) -> None:
    try:
        site = rs.parse_site(text)
    except SiteError:
        site = None
    assert site is None or rs.parse_site(str(site)) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("L20.N1297", rs.Neuron(20, 1297)),
        ("L-1.N0", rs.Neuron(-1, 0)),
        ("L12.H4", rs.Head(12, 4)),
        ("L12.H4<3", rs.HeadSource(12, 4, 3)),
        ("L3.H4.D7", rs.AttnNeuron(3, 4, 7)),
        ("L3.H4.D7<3", rs.AttnNeuron(3, 4, 7, 3)),
        ("L12.attn", rs.Sublayer(12, "attn")),
        ("L12.mlp", rs.Sublayer(12, "mlp")),
        ("L3.resid_pre", rs.Resid(3, "pre")),
        ("L3.resid_mid", rs.Resid(3, "mid")),
        ("L3.resid_post", rs.Resid(3, "post")),
        ("L3.attn.bias", rs.Bias(3, "attn")),
        ("L3.mlp.bias", rs.Bias(3, "mlp")),
        ("L3.E5.N17", rs.ExpertNeuron(3, 5, 17)),
        ("L-1.E0.N0", rs.ExpertNeuron(-1, 0, 0)),
        ("L3.shared.N17", rs.SharedNeuron(3, 17)),
        ("L3.E5.bias", rs.Bias(3, "mlp", 5)),
        ("L3.shared.bias", rs.Bias(3, "mlp", "shared")),
        ("embed", rs.Constant("embed")),
        ("final_norm.bias", rs.Constant("final_norm.bias")),
        ("unembed.bias", rs.Constant("unembed.bias")),
        ("rounding", rs.Constant("rounding")),
    ],
)
def test_each_documented_text_names_its_site(text: str, site: Site) -> None:
    assert rs.parse_site(text) == site
    assert str(site) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "banana",
        "L",
        "L3",
        "L3.",
        "3.N1",
        "l3.n1",
        "L3.N",
        "L3.N-1",
        "L3.N1.5",
        "L3.N1 ",
        " L3.N1",
        "L3.N1\n",
        "L3.N1<2",
        "L3.H",
        "L3.H4<",
        "L3.H4<-1",
        "L3.H4<3.D7",
        "L3.D7",
        "L3.resid",
        "L3.resid_in",
        "L3.ffn",
        "L3.bias",
        "L+3.N1",
        "embed.bias",
        "Embed",
        "L3.N1,L3.N2",
        "L3.E5",
        "L3.E.N1",
        "L3.E5.N",
        "L3.E-1.N1",
        "L3.E5.N-1",
        "L3.e5.N1",
        "L3.E5.H1",
        "L3.E5.N1<2",
        "L3.N1.E5",
        "L3.E5.mlp",
        "L3.E5.mlp.bias",
        "L3.mlp.E5.bias",
        "L3.E5.bias ",
        "L3.shared",
        "L3.shared.H1",
        "L3.Eshared.N1",
        "L3.shared.E5.N1",
        "L3.Shared.N1",
        "E5.N1",
        "shared.N1",
        pytest.param("L0.N" + "9" * 5000, id="five thousand digits"),
        pytest.param("L0.E" + "9" * 5000 + ".N1", id="an expert of five thousand digits"),
    ],
)
def test_text_that_is_no_site_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SiteError) as caught:
        rs.parse_site(text)
    said = str(caught.value)
    assert said.startswith(
        "`site` must be a site such as L20.N1297, L3.E5.N17, L12.H4, L12.H4<3, L3.H4.D7, L12.mlp or "
    )
    assert f"; got {repr(text)[:100]}" in said
    assert len(said) < 300


@pytest.mark.parametrize("value", [None, 5, b"L0.N1", ["L0.N1"], rs.Neuron])
def test_what_is_not_text_is_refused(value: Any) -> None:
    with pytest.raises(SiteError, match="`site` must be a site such as"):
        rs.parse_site(value)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rs.Neuron(True, 0), "`layer` must be a whole number.*; got True"),
        (lambda: rs.Neuron(1.0, 0), "`layer` must be a whole number.*; got 1.0"),
        (lambda: rs.Neuron("0", 0), "`layer` must be a whole number.*; got '0'"),
        (lambda: rs.Neuron(0, -1), "`index` must be a whole number >= 0; got -1"),
        (lambda: rs.Neuron(0, None), "`index` must be a whole number >= 0; got None"),
        (lambda: rs.Neuron(0, False), "`index` must be a whole number >= 0; got False"),
        (lambda: rs.Head(0, -1), "`head` must be a whole number >= 0; got -1"),
        (lambda: rs.HeadSource(0, 0, -1), "`source` must be a whole number >= 0; got -1"),
        (lambda: rs.HeadSource(0, 0, None), "`source` must be a whole number >= 0; got None"),
        (lambda: rs.HeadSource(0, 0, True), "`source` must be a whole number >= 0; got True"),
        (lambda: rs.AttnNeuron(0, 0, 0, -1), "`source` must be a whole number >= 0; got -1"),
        (lambda: rs.AttnNeuron(0, 0, 0, 1.5), "`source` must be a whole number >= 0; got 1.5"),
        (lambda: rs.AttnNeuron(0, 0, 0, "shared"), "`source` must be a whole number >= 0; got 'shared'"),
        (lambda: rs.AttnNeuron(0, 0, 0, np.array([1, 2])), "`source` must be a whole number >= 0; got array"),
        (lambda: rs.ExpertNeuron(0.0, 0, 0), "`layer` must be a whole number.*; got 0.0"),
        (lambda: rs.ExpertNeuron(0, -1, 0), "`expert` must be a whole number >= 0; got -1"),
        (lambda: rs.ExpertNeuron(0, None, 0), "`expert` must be a whole number >= 0; got None"),
        (lambda: rs.ExpertNeuron(0, "shared", 0), "`expert` must be a whole number >= 0; got 'shared'"),
        (lambda: rs.ExpertNeuron(0, True, 0), "`expert` must be a whole number >= 0; got True"),
        (lambda: rs.ExpertNeuron(0, 0, -1), "`index` must be a whole number >= 0; got -1"),
        (lambda: rs.ExpertNeuron(0, 0, 1.5), "`index` must be a whole number >= 0; got 1.5"),
        (lambda: rs.SharedNeuron(True, 0), "`layer` must be a whole number.*; got True"),
        (lambda: rs.SharedNeuron(0, -1), "`index` must be a whole number >= 0; got -1"),
        (lambda: rs.SharedNeuron(0, "1"), "`index` must be a whole number >= 0; got '1'"),
        (lambda: rs.Bias(0, "mlp", -1), "`expert` must be a whole number >= 0; got -1"),
        (lambda: rs.Bias(0, "mlp", True), "`expert` must be a whole number >= 0; got True"),
        (lambda: rs.Bias(0, "mlp", 1.5), "`expert` must be a whole number >= 0; got 1.5"),
        (lambda: rs.Bias(0, "mlp", "share"), "`expert` must be a whole number >= 0; got 'share'"),
        (lambda: rs.Bias(0, "attn", 3), "`expert` must be "),
        (lambda: rs.Bias(0, "attn", "shared"), "`expert` must be "),
        (lambda: rs.Sublayer(0, "mpl"), "`part` must be one of attn, mlp; got 'mpl'. Did you mean 'mlp'?"),
        (lambda: rs.Sublayer(0, "ffn"), "`part` must be one of attn, mlp; got 'ffn'."),
        (lambda: rs.Sublayer(0, None), "`part` must be one of attn, mlp; got None."),
        (lambda: rs.Bias(0, "att"), "`part` must be one of attn, mlp; got 'att'. Did you mean 'attn'?"),
        (lambda: rs.Resid(0, "past"), "`stage` must be one of pre, mid, post; got 'past'. Did you mean 'post'?"),
        (lambda: rs.Constant("embd"), "`name` must be one of embed, .*; got 'embd'. Did you mean 'embed'?"),
        (lambda: rs.Constant("L0.N1"), "`name` must be one of embed, "),
    ],
)
def test_a_site_with_a_bad_field_cannot_be_made(make: Any, said: str) -> None:
    with pytest.raises(SiteError, match=said.replace("?", r"\?")):
        make()


def test_indices_become_plain_integers() -> None:
    site = rs.AttnNeuron(np.int64(-1), torch.tensor(2), np.uint8(3), np.int32(4))
    assert site == rs.AttnNeuron(-1, 2, 3, 4)
    assert {type(v) for v in (site.layer, site.head, site.index, site.source)} == {int}
    assert str(site) == "L-1.H2.D3<4"
    expert = rs.ExpertNeuron(np.int64(-1), torch.tensor(2), np.uint8(3))
    assert expert == rs.ExpertNeuron(-1, 2, 3)
    assert {type(v) for v in (expert.layer, expert.expert, expert.index)} == {int}
    for given_expert in (np.int64(2), torch.tensor(2)):
        bias = rs.Bias(0, "mlp", given_expert)
        assert bias == rs.Bias(0, "mlp", 2)
        assert type(bias.expert) is int


def test_a_site_cannot_be_changed() -> None:
    site = rs.Neuron(0, 1)
    with pytest.raises(FrozenInstanceError):
        site.layer = 2
    assert site == rs.Neuron(0, 1)


# --- ranges -------------------------------------------------------------------------------------


def test_a_layer_out_of_range_names_the_model_and_says_what_to_do() -> None:
    said = "`layer` must be in 0..2 for X (3 layers); got 7. Count from the end with layer=-1."
    assert message_of(rs.Neuron(7, 0)) == said


@pytest.mark.parametrize("build", [
    lambda layer: rs.Neuron(layer, 0),
    lambda layer: rs.Head(layer, 0),
    lambda layer: rs.HeadSource(layer, 0, 0),
    lambda layer: rs.AttnNeuron(layer, 0, 0),
    lambda layer: rs.Sublayer(layer, "mlp"),
    lambda layer: rs.Resid(layer, "post"),
    lambda layer: rs.Bias(layer, "attn"),
    lambda layer: rs.Bias(layer, "mlp", 0),
    lambda layer: rs.ExpertNeuron(layer, 0, 0),
    lambda layer: rs.SharedNeuron(layer, 0),
])  # fmt: skip
@pytest.mark.parametrize("layer", [3, 7, -4])
def test_every_site_with_a_layer_has_it_checked(build: Any, layer: int) -> None:
    said = f"`layer` must be in 0..2 for X (3 layers); got {layer}. Count from the end with layer=-1."
    assert message_of(build(layer)) == said


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (rs.Neuron(0, 40), "`index` must be in 0..39 for X (40 neurons in layer 0); got 40."),
        (rs.Neuron(-1, 40), "`index` must be in 0..39 for X (40 neurons in layer 2); got 40."),
        (rs.Head(0, 4), "`head` must be in 0..3 for X (4 heads in layer 0); got 4."),
        (rs.HeadSource(0, 9, 0), "`head` must be in 0..3 for X (4 heads in layer 0); got 9."),
        (rs.AttnNeuron(0, 4, 0), "`head` must be in 0..3 for X (4 heads in layer 0); got 4."),
        (rs.AttnNeuron(0, 3, 6), "`index` must be in 0..5 for X (6 coordinates a head in layer 0); got 6."),
    ],
)
def test_other_indices_out_of_range_name_their_size(site: Site, said: str) -> None:
    assert message_of(site) == said


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (rs.ExpertNeuron(1, 5, 0), "`expert` must be in 0..4 for M (5 experts in layer 1); got 5."),
        (rs.ExpertNeuron(1, 0, 17), "`index` must be in 0..16 for M (17 neurons an expert in layer 1); got 17."),
        (rs.SharedNeuron(1, 9), "`index` must be in 0..8 for M (9 neurons of the shared expert in layer 1); got 9."),
        (rs.Bias(2, "mlp", 5), "`expert` must be in 0..4 for M (5 experts in layer 2); got 5."),
        (rs.Neuron(4, 40), "`index` must be in 0..39 for M (40 neurons in layer 4); got 40."),
    ],
)
def test_indices_of_a_mixture_out_of_range_name_their_size(site: Site, said: str) -> None:
    assert message_of(site, M) == said


@pytest.mark.parametrize(("sizes", "strategy"), [(X, inside), (M, inside_mixtures)], ids=["dense", "mixtures"])
def test_resolving_counts_negative_layers_from_the_end_and_changes_nothing_else(sizes: Anatomy, strategy: Any) -> None:
    @given(strategy)
    def only_the_layer(site: Site) -> None:
        found = site.resolve(sizes)
        assert found.resolve(sizes) == found
        if isinstance(site, rs.Constant):
            assert found == site
        else:
            assert found == replace(site, layer=site.layer % sizes.n_layers)  # type: ignore[attr-defined, call-arg]

    only_the_layer()


def no_mid(name: str, layer: int) -> str:
    """What asking for a state that is not there is answered with."""
    return (
        f"`L{layer}.resid_mid` does not exist for {name}: layer {layer} is parallel (attention and MLP read the same "
        "state) or has one writer only, so there is no state between. Use resid_pre or resid_post."
    )


def test_a_parallel_block_has_no_state_between_its_sublayers() -> None:
    assert message_of(rs.Resid(0, "mid"), PARALLEL) == no_mid("X", 0)
    for stage in ("pre", "post"):
        assert rs.Resid(0, stage).resolve(PARALLEL) == rs.Resid(0, stage)
    assert rs.Resid(0, "mid").resolve(X) == rs.Resid(0, "mid")


@pytest.mark.parametrize("layer", [3, 4, -1])
def test_a_block_with_one_writer_has_no_state_in_its_middle(layer: int) -> None:
    assert message_of(rs.Resid(layer, "mid"), M) == no_mid("M", layer % 5)
    for stage in ("pre", "post"):
        assert rs.Resid(layer, stage).resolve(M) == rs.Resid(layer % 5, stage)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (rs.ExpertNeuron(0, 0, 1), "`L0.E0.N1` does not exist for M: layer 0 has no experts."),
        (rs.SharedNeuron(0, 1), "`L0.shared.N1` does not exist for M: layer 0 has no shared expert."),
        (rs.SharedNeuron(2, 1), "`L2.shared.N1` does not exist for M: layer 2 has no shared expert."),
        (rs.SharedNeuron(-3, 1), "`L2.shared.N1` does not exist for M: layer 2 has no shared expert."),
        (rs.Neuron(3, 1), "`L3.N1` does not exist for M: layer 3 has no mlp writer."),
        (rs.ExpertNeuron(3, 0, 1), "`L3.E0.N1` does not exist for M: layer 3 has no mlp writer."),
        (rs.SharedNeuron(3, 1), "`L3.shared.N1` does not exist for M: layer 3 has no mlp writer."),
        (rs.Head(4, 0), "`L4.H0` does not exist for M: layer 4 has no attn writer."),
        (rs.HeadSource(-1, 0, 0), "`L4.H0<0` does not exist for M: layer 4 has no attn writer."),
        (rs.AttnNeuron(4, 0, 0), "`L4.H0.D0` does not exist for M: layer 4 has no attn writer."),
    ],
    ids=str,
)
def test_a_site_that_this_kind_of_layer_has_not_is_refused(site: Site, said: str) -> None:
    assert message_of(site, M) == said


@pytest.mark.parametrize("site", [rs.Sublayer(3, "mlp"), rs.Sublayer(-1, "attn"), rs.Bias(3, "mlp")], ids=str)
def test_a_writer_that_a_layer_has_not_is_refused(site: Any) -> None:
    layer = site.layer % 5
    assert message_of(site, M) == (
        f"`{replace(site, layer=layer)}` does not exist for M: layer {layer} has no {site.part} writer."
    )


@pytest.mark.parametrize("site", [rs.Bias(0, "mlp", 0), rs.Bias(0, "mlp", "shared"), rs.Bias(2, "mlp", "shared")],
                         ids=str)  # fmt: skip
def test_an_experts_bias_where_there_is_no_such_expert_is_refused(site: Any) -> None:
    what = "no shared expert" if site.expert == "shared" else "no experts"
    assert f"layer {site.layer} has {what}" in message_of(site, M)


@pytest.mark.parametrize("site", [rs.Head(3, 0), rs.HeadSource(3, 0, 0), rs.AttnNeuron(3, 0, 0)], ids=str)
def test_a_part_of_a_mixer_that_is_one_addend_is_refused(site: Site) -> None:
    assert message_of(site, M) == (
        f"`{site}` does not exist for M: layer 3's mixer is no softmax attention, so what it writes is one addend. "
        "Use L3.attn."
    )


@pytest.mark.parametrize(("layer", "shown"), [(1, 1), (2, 2), (-4, 1)])
def test_a_neuron_of_a_mixture_says_how_to_name_its_expert(layer: int, shown: int) -> None:
    said = message_of(rs.Neuron(layer, 7), M)
    assert said.startswith(f"`L{shown}.N7` does not say which expert: layer {shown} of M is a mixture of experts. ")
    assert f"Write L{shown}.E0.N7" in said
    assert rs.parse_site(f"L{shown}.E0.N7").resolve(M) == rs.ExpertNeuron(shown, 0, 7)


# --- many sites ---------------------------------------------------------------------------------


def test_one_site_its_text_or_any_mixture_are_taken() -> None:
    neuron, head = rs.Neuron(0, 1), rs.Head(2, 3)
    assert as_sites(neuron) == as_sites("L0.N1") == as_sites(["L0.N1"]) == (neuron,)
    assert as_sites(["L0.N1", head]) == as_sites(iter((neuron, "L2.H3"))) == (neuron, head)


@pytest.mark.parametrize(
    ("given_sites", "said"),
    [
        ([], r"`sites` must be at least one site; got \[\]"),
        (None, "`sites` must be a site, its text, or a sequence of them; got None"),
        (7, "`sites` must be a site, its text, or a sequence of them; got 7"),
        (["L0.N1", 7], "`site` must be a site such as .*; got 7"),
        ([["L0.N1"]], "`site` must be a site such as "),
    ],
)
def test_anything_else_is_refused(given_sites: Any, said: str) -> None:
    with pytest.raises(SiteError, match=said):
        as_sites(given_sites)


# --- on a recording -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rec() -> Any:
    """Four tokens, predicting at position 1."""
    return rs.record(tiny.shared("llama"), rs.Prompt(ids=[5, 6, 7, 8], target=9, position=1))


@pytest.mark.parametrize("text", ["L0.H1<2", "L2.H1.D3<3", "L-1.H0<9"])
def test_a_source_beyond_the_predicting_position_is_refused(rec: Any, text: str) -> None:
    source = text[-1]
    verbs = uses(rec, text)
    for use in (verbs["spectrum"], verbs["zero"]):
        with pytest.raises(SiteError) as caught:
            use()
        said = str(caught.value)
        assert f"reads source position {source}, but the predicting position is 1 (4 tokens)" in said
        assert said.endswith("sources are 0..1.")


@pytest.mark.parametrize("text", ["L0.H1<0", "L2.H1.D3<1"])
def test_a_source_up_to_the_predicting_position_is_read(rec: Any, text: str) -> None:
    assert set(rs.spectrum(rec, text, top=2)["site"]) == {text}


def test_negative_layers_are_shown_resolved(rec: Any) -> None:
    assert set(rs.spectrum(rec, "L-1.N5", top=2)["site"]) == {"L2.N5"}
    assert rs.spectrum(rec, "L-1.N5", top=2).equals(rs.spectrum(rec, "L2.N5", top=2))


def test_a_real_parallel_model_says_that_it_has_no_mid() -> None:
    parallel = rs.record(tiny.shared("gpt_neox"), rs.Prompt(ids=[5, 6], target=9))
    with pytest.raises(SiteError, match=r"`L1.resid_mid` does not exist for .*layer 1 is parallel"):
        rs.intervene(parallel, rs.Zero("L1.resid_mid"))


# --- on recordings of mixtures and hybrids --------------------------------------------------------


def recorded(model_type: str) -> Any:
    """Four tokens through a tiny model of a type, predicting at the last."""
    model = rs.load(zoo.tiny(model_type, dtype=torch.float64))
    return rs.record(model, rs.Prompt(ids=[5, 6, 7, 8], target=9, versus=[10]))


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """Four experts in every layer, two of them routed to."""
    return recorded("mixtral")


@pytest.fixture(scope="module")
def gpt_oss() -> Any:
    """Experts with output biases."""
    return recorded("gpt_oss")


@pytest.fixture(scope="module")
def qwen3_next() -> Any:
    """Linear attention in layers 0 and 2; experts and a shared one in layers 2 and 3."""
    return recorded("qwen3_next")


@pytest.fixture(scope="module")
def nemotron_h() -> Any:
    """One writer a layer: a state space, experts, attention, an MLP."""
    return recorded("nemotron_h")


def uses(rec: Any, text: str) -> dict[str, Callable[[], object]]:
    """Every verb that takes the site of an addend."""
    return {
        "spectrum": lambda: rs.spectrum(rec, text, top=2),
        "zero": lambda: rs.intervene(rec, rs.Zero(text)),
        "scale": lambda: rs.intervene(rec, rs.Scale(text, 2.0)),
        "patch": lambda: rs.intervene(rec, rs.Patch(text, rec)),
    }


def refused_by_all(rec: Any, text: str) -> str:
    """The one message with which every verb refuses a site."""
    said = set()
    for use in uses(rec, text).values():
        with pytest.raises(SiteError) as caught:
            use()
        said.add(str(caught.value))
    (one,) = said
    return one


def routed_to(rec: Any, layer: int) -> list[int]:
    """The experts that a plain forward calls at the predicting position, seen by a plain hook."""
    caught: dict[str, Any] = {}
    experts = rec.model.module.get_submodule(f"model.layers.{layer}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, args: caught.update(index=args[1]))
    try:
        with torch.no_grad():
            rec.model.module(torch.tensor([rec.prompt.ids]), use_cache=False)
    finally:
        handle.remove()
    return caught["index"].reshape(rec.n_positions, -1)[rec.prompt.position].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", range(4))
def test_an_expert_that_was_not_routed_to_is_refused_with_those_that_were(mixtral: Any, layer: int) -> None:
    routed = routed_to(mixtral, layer)
    assert len(set(routed)) == 2
    for expert in range(4):
        text = f"L{layer}.E{expert}.N1"
        if expert in routed:
            assert set(rs.spectrum(mixtral, text, top=2)["site"]) == {text}
            assert rs.intervene(mixtral, rs.Zero(text)).table["closure"].max() <= 1e-6
            assert set(rs.sources(mixtral, text)["reader"]) == {text}
            continue
        said = refused_by_all(mixtral, text)
        assert said == (
            f"`{text}` is not active: layer {layer} of MixtralForCausalLM routed position 3 to experts "
            f"{routed}. Pick one of them."
        )
        with pytest.raises(SiteError, match="is not active"):
            rs.sources(mixtral, text)


def test_a_neuron_without_its_expert_is_refused_by_every_verb(mixtral: Any) -> None:
    said = refused_by_all(mixtral, "L0.N1")
    assert said.startswith("`L0.N1` does not say which expert: layer 0 of MixtralForCausalLM is a mixture of experts.")
    assert "L0.E0.N1" in said
    with pytest.raises(SiteError, match=r"L0\.E0\.N1"):
        rs.sources(mixtral, "L0.N1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("L0.E4.N1", "`expert` must be in 0..3 for MixtralForCausalLM (4 experts in layer 0); got 4."),
        ("L0.E1.N40", "`index` must be in 0..39 for MixtralForCausalLM (40 neurons an expert in layer 0); got 40."),
        ("L0.shared.N1", "`L0.shared.N1` does not exist for MixtralForCausalLM: layer 0 has no shared expert."),
    ],
)
def test_limits_of_a_real_mixture_are_checked_by_every_verb(mixtral: Any, text: str, said: str) -> None:
    assert refused_by_all(mixtral, text) == said


def test_an_experts_bias_is_an_addend_where_the_expert_was_routed_to(gpt_oss: Any) -> None:
    for layer, one in enumerate(gpt_oss.layers):
        routed = routed_to(gpt_oss, layer)
        bias = gpt_oss.model.module.model.layers[layer].mlp.experts.down_proj_bias
        for group in one.groups:
            found = vector_of(gpt_oss, rs.Bias(layer, "mlp", group.expert))
            assert torch.allclose(found, group.factor * bias[group.expert].detach(), atol=1e-9)
        for expert in set(range(4)) - set(routed):
            with pytest.raises(SiteError, match=rf"`L{layer}\.E{expert}\.bias` .*{routed[0]}, {routed[1]}"):
                rs.spectrum(gpt_oss, f"L{layer}.E{expert}.bias")


def test_the_bias_of_an_expert_that_there_is_not_is_refused(gpt_oss: Any, rec: Any) -> None:
    with pytest.raises(SiteError, match=r"`expert` must be in 0\.\.3 for GptOssForCausalLM .*; got 4"):
        rs.spectrum(gpt_oss, "L0.E4.bias")
    with pytest.raises(SiteError, match="layer 0 has no shared expert"):
        rs.spectrum(gpt_oss, "L0.shared.bias")
    with pytest.raises(SiteError, match="layer 0 has no experts"):
        rs.spectrum(rec, "L0.E0.bias")


@pytest.mark.parametrize("text", ["L1.E0.bias", "L1.shared.bias"])
def test_an_experts_bias_is_not_operated_on(gpt_oss: Any, text: str) -> None:
    with pytest.raises(SiteError, match=f"`{text}` is a constant of the weights; operate on its sublayer"):
        rs.intervene(gpt_oss, rs.Zero(text))


@pytest.mark.parametrize("text", ["L0.H1", "L0.H1<2", "L0.H1.D3", "L2.H0.D3<1", "L-4.H0"])
def test_a_head_of_linear_attention_is_refused_with_the_whole_writer(qwen3_next: Any, text: str) -> None:
    layer = 2 if text.startswith("L2") else 0
    said = refused_by_all(qwen3_next, text)
    assert said == (
        f"`{text.replace('L-4', 'L0')}` does not exist for Qwen3NextForCausalLM: layer {layer}'s linear_attn is no "
        f"softmax attention, so what it writes is one addend. Use L{layer}.attn."
    )
    assert rs.intervene(qwen3_next, rs.Zero(f"L{layer}.attn")).table["closure"].max() <= 1e-6


@pytest.mark.parametrize("layer", range(4))
def test_a_real_block_with_one_writer_has_no_mid(nemotron_h: Any, layer: int) -> None:
    assert refused_by_all(nemotron_h, f"L{layer}.resid_mid") == no_mid("NemotronHForCausalLM", layer)
    for text in (f"L{layer}.resid_pre", f"L{layer}.resid_post"):
        assert rs.intervene(nemotron_h, rs.Scale(text, 0.5)).table["closure"].max() <= 1e-6


@pytest.mark.parametrize("text", ["L0.mlp", "L1.attn", "L2.mlp", "L3.attn"])
def test_a_writer_that_a_real_layer_has_not_is_refused_by_every_verb(nemotron_h: Any, text: str) -> None:
    layer, part = text[1], text[3:]
    said = refused_by_all(nemotron_h, text)
    assert said == f"`{text}` does not exist for NemotronHForCausalLM: layer {layer} has no {part} writer."


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_next", "nemotron_h"])
def test_every_site_that_a_recording_has_reads_back_and_has_a_vector(
    model_type: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(model_type).model

    @given(prompts(), st.data())
    def has_a_vector(prompt: rs.Prompt, data: st.DataObject) -> None:
        rec = rs.record(model, prompt)
        site = data.draw(sites_in(rec))
        assert rs.parse_site(str(site)) == site
        assert site.resolve(model.anatomy) == site
        if not isinstance(site, rs.Resid):
            assert vector_of(rec, site).isfinite().all()

    has_a_vector()

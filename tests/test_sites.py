"""Sites: text that reads back, indices checked against a model, states that do not exist."""

from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import resid_surgery as rs
from resid_surgery.errors import ResidSurgeryError, SiteError
from resid_surgery.sites import CONSTANTS, Site, as_sites


@dataclass(frozen=True)
class Sizes:
    """The sizes that sites are checked against, of a model called X."""

    name: str = "X"
    n_layers: int = 3
    n_heads: int = 4
    d_head: int = 6
    d_mlp: int = 40
    parallel: bool = False


X = Sizes()
layers = st.integers(-(10**6), 10**6)
indices = st.integers(0, 10**6)
parts = st.sampled_from(["attn", "mlp"])

OF_EACH_CLASS: dict[str, st.SearchStrategy[Site]] = {
    "Neuron": st.builds(rs.Neuron, layers, indices),
    "Head": st.builds(rs.Head, layers, indices),
    "HeadSource": st.builds(rs.HeadSource, layers, indices, indices),
    "AttnNeuron": st.builds(rs.AttnNeuron, layers, indices, indices, st.none() | indices),
    "Sublayer": st.builds(rs.Sublayer, layers, parts),
    "Resid": st.builds(rs.Resid, layers, st.sampled_from(["pre", "mid", "post"])),
    "Bias": st.builds(rs.Bias, layers, parts),
    "Constant": st.builds(rs.Constant, st.sampled_from(CONSTANTS)),
}
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


def message_of(site: Site, sizes: Sizes = X) -> str:
    """The message that resolving a site is refused with."""
    with pytest.raises(SiteError) as caught:
        site.resolve(sizes)
    assert isinstance(caught.value, IndexError)
    assert isinstance(caught.value, ResidSurgeryError)
    return str(caught.value)


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_EACH_CLASS)
def test_the_text_of_a_site_reads_back_as_the_same_site(kind: str) -> None:
    @given(OF_EACH_CLASS[kind])
    def reads_back(site: Site) -> None:
        assert type(site).__name__ == kind
        again = rs.parse_site(str(site))
        assert again == site
        assert type(again) is type(site)
        assert hash(again) == hash(site)
        assert str(again) == str(site)

    reads_back()


@given(a=st.one_of(*OF_EACH_CLASS.values()), b=st.one_of(*OF_EACH_CLASS.values()))
def test_two_sites_share_a_text_only_if_they_are_the_same(a: Site, b: Site) -> None:
    assert (str(a) == str(b)) == (a == b)


@given(st.text(max_size=12) | st.from_regex(r"L-?\d{1,4}\.[NHDa-z.<\d]{0,8}", fullmatch=True))
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
        pytest.param("L0.N" + "9" * 5000, id="five thousand digits"),
    ],
)
def test_text_that_is_no_site_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SiteError) as caught:
        rs.parse_site(text)
    said = str(caught.value)
    assert said.startswith("`site` must be a site such as L20.N1297, L12.H4, L12.H4<3, L3.H4.D7, L12.mlp or ")
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
        (lambda: rs.Neuron(1.0, 0), "`layer` must be a whole number.*; got 1.0"),  # type: ignore[arg-type]
        (lambda: rs.Neuron("0", 0), "`layer` must be a whole number.*; got '0'"),  # type: ignore[arg-type]
        (lambda: rs.Neuron(0, -1), "`index` must be a whole number >= 0; got -1"),
        (lambda: rs.Neuron(0, None), "`index` must be a whole number >= 0; got None"),  # type: ignore[arg-type]
        (lambda: rs.Neuron(0, False), "`index` must be a whole number >= 0; got False"),
        (lambda: rs.Head(0, -1), "`head` must be a whole number >= 0; got -1"),
        (lambda: rs.HeadSource(0, 0, -1), "`source` must be a whole number >= 0; got -1"),
        (lambda: rs.HeadSource(0, 0, None), "`source` must be a whole number >= 0; got None"),  # type: ignore[arg-type]
        (lambda: rs.HeadSource(0, 0, True), "`source` must be a whole number >= 0; got True"),
        (lambda: rs.AttnNeuron(0, 0, 0, -1), "`source` must be a whole number >= 0; got -1"),
        (lambda: rs.AttnNeuron(0, 0, 0, 1.5), "`source` must be a whole number >= 0; got 1.5"),  # type: ignore[arg-type]
        (lambda: rs.Sublayer(0, "mpl"), "`part` must be one of attn, mlp; got 'mpl'. Did you mean 'mlp'?"),  # type: ignore[arg-type]
        (lambda: rs.Sublayer(0, "ffn"), "`part` must be one of attn, mlp; got 'ffn'."),  # type: ignore[arg-type]
        (lambda: rs.Sublayer(0, None), "`part` must be one of attn, mlp; got None."),  # type: ignore[arg-type]
        (lambda: rs.Bias(0, "att"), "`part` must be one of attn, mlp; got 'att'. Did you mean 'attn'?"),  # type: ignore[arg-type]
        (lambda: rs.Resid(0, "past"), "`stage` must be one of pre, mid, post; got 'past'. Did you mean 'post'?"),  # type: ignore[arg-type]
        (lambda: rs.Constant("embd"), "`name` must be one of embed, .*; got 'embd'. Did you mean 'embed'?"),
        (lambda: rs.Constant("L0.N1"), "`name` must be one of embed, "),
    ],
)
def test_a_site_with_a_bad_field_cannot_be_made(make: Any, said: str) -> None:
    with pytest.raises(SiteError, match=said.replace("?", r"\?")):
        make()


def test_indices_become_plain_integers() -> None:
    import numpy as np
    import torch

    site = rs.AttnNeuron(np.int64(-1), torch.tensor(2), np.uint8(3), np.int32(4))  # type: ignore[arg-type]
    assert site == rs.AttnNeuron(-1, 2, 3, 4)
    assert {type(v) for v in (site.layer, site.head, site.index, site.source)} == {int}
    assert str(site) == "L-1.H2.D3<4"


def test_a_site_cannot_be_changed() -> None:
    site = rs.Neuron(0, 1)
    with pytest.raises(FrozenInstanceError):
        site.layer = 2  # type: ignore[misc]
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
])  # fmt: skip
@pytest.mark.parametrize("layer", [3, 7, -4])
def test_every_site_with_a_layer_has_it_checked(build: Any, layer: int) -> None:
    said = f"`layer` must be in 0..2 for X (3 layers); got {layer}. Count from the end with layer=-1."
    assert message_of(build(layer)) == said


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (rs.Neuron(0, 40), "`index` must be in 0..39 for X (40 neurons a layer); got 40."),
        (rs.Head(0, 4), "`head` must be in 0..3 for X (4 heads a layer); got 4."),
        (rs.HeadSource(0, 9, 0), "`head` must be in 0..3 for X (4 heads a layer); got 9."),
        (rs.AttnNeuron(0, 4, 0), "`head` must be in 0..3 for X (4 heads a layer); got 4."),
        (rs.AttnNeuron(0, 3, 6), "`index` must be in 0..5 for X (6 coordinates a head); got 6."),
    ],
)
def test_other_indices_out_of_range_name_their_size(site: Site, said: str) -> None:
    assert message_of(site) == said


@given(inside)
def test_resolving_counts_negative_layers_from_the_end_and_changes_nothing_else(site: Site) -> None:
    found = site.resolve(X)
    assert found.resolve(X) == found
    if isinstance(site, rs.Constant):
        assert found == site
    else:
        assert found == replace(site, layer=site.layer % 3)  # type: ignore[attr-defined, call-arg]


def test_a_parallel_block_has_no_state_between_its_sublayers() -> None:
    parallel = Sizes(parallel=True)
    assert message_of(rs.Resid(0, "mid"), parallel) == (
        "`L0.resid_mid` does not exist for X: its blocks are parallel (attention and MLP read the same state), "
        "so there is no state between them. Use resid_pre or resid_post."
    )
    for stage in ("pre", "post"):
        assert rs.Resid(0, stage).resolve(parallel) == rs.Resid(0, stage)  # type: ignore[arg-type]
    assert rs.Resid(0, "mid").resolve(X) == rs.Resid(0, "mid")


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
    for use in (lambda: rs.spectrum(rec, text, top=2), lambda: rs.intervene(rec, rs.Zero(text))):
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
    with pytest.raises(SiteError, match=r"`L1.resid_mid` does not exist for .*its blocks are parallel"):
        rs.intervene(parallel, rs.Zero("L1.resid_mid"))

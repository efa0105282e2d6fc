"""Interventions as values: every message and every repr to the letter, so that a slip in one word is seen."""

from typing import Any

import pytest
import torch
from tiny import shared

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, InterventionError, SiteError
from resid_surgery.surgery.interventions import Intervention, as_interventions

PROMPT = rs.Prompt("Rome is in", target=" Italy")
IDS = rs.Prompt(ids=[5, 4, 3], target=1)
NEEDS = "`interventions` must be a list of Zero, Scale, Patch, Cut, ...; got"
TOGETHER = "`away` and `times` go with `toward`, not with a vector; multiply the vector itself."
EITHER = "`vector` or `toward` must be given to Steer, and not both."
WEIGHTS = "is a constant of the weights; operate on its sublayer, or edit the weights instead."
COEFFICIENT = "`sites` of Clamp must be a neuron or attention neuron, which has a coefficient; got"
PAIR = "`sites` of Attend must be a (head, source) pair such as L12.H4<3, which has a weight; got"
EDGE = "`sites` of Cut must be an edge: a writer and a reader, or 'L3.mlp->L5.N7'; got"
PLACES = "`positions` of Set must be 'target', an index, a token's text or a list of them."

BAD = {
    "bias": (lambda: rs.Zero("L1.mlp.bias"), SiteError, f"`L1.mlp.bias` {WEIGHTS}"),
    "bias at": (lambda: rs.Zero("L1.mlp.bias@2"), SiteError, f"`L1.mlp.bias@2` {WEIGHTS}"),
    "constant": (lambda: rs.Zero("unembed.bias"), SiteError, f"`unembed.bias` {WEIGHTS}"),
    "factor": (lambda: rs.Scale("L1.N2", "x"), ArgumentError, "`factor` must be a finite number; got 'x'."),
    "neither": (lambda: rs.Steer("L1.mlp"), ArgumentError, EITHER),
    "both": (lambda: rs.Steer("L1.mlp", [1.0], toward=1), ArgumentError, EITHER),
    "away": (lambda: rs.Steer("L1.mlp", [1.0], away=1), ArgumentError, TOGETHER),
    "times": (lambda: rs.Steer("L1.mlp", [1.0], times=2.0), ArgumentError, TOGETHER),
    "times of what": (
        lambda: rs.Steer("L1.mlp", toward=1, times="x"), ArgumentError, "`times` must be a finite number; got 'x'."),
    "vector": (lambda: rs.Steer("L1.mlp", "ab"), ArgumentError, "`vector` must be finite numbers; got 'ab'."),
    "toward": (
        lambda: rs.Steer("L1.mlp", toward=1.5), ArgumentError, "`toward` must be a token's text or id; got 1.5."),
    "away of what": (
        lambda: rs.Steer("L1.mlp", toward=1, away=1.5), ArgumentError, "`away` must be a token's text or id; got 1.5."),
    "everywhere": (lambda: rs.Set("L1.mlp", [[1.0]], positions="all"), ArgumentError, PLACES),
    "no list": (
        lambda: rs.Set("L1.N2", 3.0), ArgumentError,
        "`values` must be a list of one value for each of 1 sites; got 3.0."),
    "too many": (
        lambda: rs.Set("L1.N2", [3.0, 4.0]), ArgumentError,
        "`values` must be a list of one value for each of 1 sites; got [3.0, 4.0]."),
    "a value a position": (
        lambda: rs.Set("L1.N2", [3.0], positions=[0, 1]), ArgumentError,
        "`values` must be a list of one value a position for each site; got [3.0]."),
    "too few positions": (
        lambda: rs.Set("L1.N2", [[3.0]], positions=[0, 1]), ArgumentError,
        "`values` must be a list of one value a position for each site; got [[3.0]]."),
    "one site's": (
        lambda: rs.Set(["L1.N2", "L1.N3"], [[3.0, 1.0], [3.0]], positions=[0, 1]), ArgumentError,
        "`values` must be a list of one value a position for each site; got [[3.0, 1.0], [3.0]]."),
    "no number": (lambda: rs.Set("L1.N2", ["x"]), ArgumentError, "`values` must be finite numbers; got 'x'."),
    "three axes": (
        lambda: rs.Set("L1.N2", [[[[1.0]]]]), ArgumentError,
        "`values` must be a vector of finite numbers; got 'shape (1, 1, 1), finite: True'."),
    "slice": (
        lambda: rs.Set("L1.N*", [1.0]), SiteError,
        "`sites` of Set must be single sites, with a value each; got L1.N*."),
    "held": (lambda: rs.Clamp("L1.N2", None), ArgumentError, "`value` must be a finite number; got None."),
    "head held": (lambda: rs.Clamp("L1.H2", 1.0), SiteError, f"{COEFFICIENT} L1.H2."),
    "donor": (
        lambda: rs.Patch("L1.mlp", "Rome"), ArgumentError,
        "`donor` must be a recording from resid_surgery.record, or a Prompt; got 'Rome'."),
    "align": (
        lambda: rs.Patch("L1.mlp", IDS, align="last"), ArgumentError,
        "`align` must be None, 'index', 'token' or a mapping of positions; got 'last'."),
    "over a text": (
        lambda: rs.Mean("L1.mlp", "Rome"), ArgumentError,
        "`over` must be a sequence of recordings or prompts; got 'Rome'."),
    "over one": (
        lambda: rs.Mean("L1.mlp", IDS), ArgumentError,
        f"`over` must be a sequence of recordings or prompts; got {IDS!r}."),
    "over a number": (
        lambda: rs.Mean("L1.mlp", 5), ArgumentError, "`over` must be a sequence of recordings or prompts; got 5."),
    "over nothing": (
        lambda: rs.Mean("L1.mlp", []), ArgumentError, "`over` must be at least one recording or prompt; got []."),
    "over what": (
        lambda: rs.Mean("L1.mlp", [5]), ArgumentError,
        "`over` must be a recording from resid_surgery.record, or a Prompt; got 5."),
    "mean's align": (
        lambda: rs.Mean("L1.mlp", [IDS], align=3), ArgumentError,
        "`align` must be None, 'index', 'token' or a mapping of positions; got 3."),
    "weight": (lambda: rs.Attend("L1.H2<0", "x"), ArgumentError, "`weight` must be a finite number; got 'x'."),
    "renormalise": (
        lambda: rs.Attend("L1.H2<0", 0.0, renormalise=1), ArgumentError,
        "`renormalise` must be True or False; got 1."),
    "head attended": (lambda: rs.Attend("L1.H2", 0.0), SiteError, f"{PAIR} L1.H2."),
    "site cut": (lambda: rs.Cut("L1.mlp"), SiteError, f"{EDGE} L1.mlp."),
    "a text": (lambda: as_interventions("Zero"), InterventionError, f"{NEEDS} 'Zero'."),
    "bytes": (lambda: as_interventions(b"Zero"), InterventionError, f"{NEEDS} b'Zero'."),
    "a number": (lambda: as_interventions(5), InterventionError, f"{NEEDS} 5."),
    "one of them": (lambda: as_interventions([rs.Zero("L1.mlp"), 5]), InterventionError, f"{NEEDS} 5."),
    "none": (
        lambda: as_interventions([]), InterventionError, "`interventions` must hold at least one operation; got none."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_refused_in_these_words(name: str) -> None:
    make, error, said = BAD[name]
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == said
    assert type(caught.value) is error


MANY = [f"L0.N{i}" for i in range(11)]


def shown() -> list[Any]:
    """(operation, its repr, its brief repr where that is another), made anew."""
    return [
        (rs.Zero("L1.N2"), "Zero(['L1.N2'])", None),
        (rs.Zero("L1.N2", positions="all"), "Zero(['L1.N2'], positions='all')", None),
        (rs.Zero("L1.N2", positions=[0, -1]), "Zero(['L1.N2'], positions=(0, -1))", None),
        (rs.Zero("embed"), "Zero(['embed'])", None),
        (rs.Zero(MANY[:8]), f"Zero({MANY[:8]})", None),
        (rs.Zero(MANY[:9]), f"Zero({MANY[:9]})", f"Zero({str(MANY[:8])[:-1]}, and 1 more])"),
        (
            rs.Set(MANY, [float(i) for i in range(11)]),
            f"Set({MANY}, {[float(i) for i in range(11)]})",
            f"Set({str(MANY[:8])[:-1]}, and 3 more], <11 values>)",
        ),
        (rs.Scale("L1.N2", 2), "Scale(['L1.N2'], 2.0)", None),
        (rs.Scale("L1.N2", 2, positions=3), "Scale(['L1.N2'], 2.0, positions=3)", None),
        (rs.Steer("L1.mlp", [1, 2.5]), "Steer(['L1.mlp'], [1.0, 2.5])", "Steer(['L1.mlp'], <vector of 2>)"),
        (
            rs.Steer("L1.mlp", [1.0], positions="all"),
            "Steer(['L1.mlp'], [1.0], positions='all')",
            "Steer(['L1.mlp'], <vector of 1>, positions='all')",
        ),
        (rs.Steer("L1.mlp", toward=" Rome"), "Steer(['L1.mlp'], toward=' Rome', times=1.0)", None),
        (rs.Steer("L1.mlp", toward=3, away=7, times=2), "Steer(['L1.mlp'], toward=3, away=7, times=2.0)", None),
        (rs.Steer("L1.mlp", toward=3, positions=0), "Steer(['L1.mlp'], toward=3, times=1.0, positions=0)", None),
        (rs.Set("L1.N2", [3]), "Set(['L1.N2'], [3.0])", "Set(['L1.N2'], <1 values>)"),
        (rs.Set("L1.H2", [[3, 4]]), "Set(['L1.H2'], [[3.0, 4.0]])", "Set(['L1.H2'], <1 values>)"),
        (rs.Set("L1.H2", ([3, 4],)), "Set(['L1.H2'], [[3.0, 4.0]])", "Set(['L1.H2'], <1 values>)"),
        (
            rs.Set("L1.N2", [(3, 4)], positions=[0, 1]),
            "Set(['L1.N2'], [[3.0, 4.0]], positions=(0, 1))",
            "Set(['L1.N2'], <2 values>, positions=(0, 1))",
        ),
        (
            rs.Set("L1.mlp->L2.H0.key", [[[1.0, 2.0], [3.0, 4.0]]]),
            "Set(['L1.mlp->L2.H0.key'], [[[1.0, 2.0], [3.0, 4.0]]])",
            "Set(['L1.mlp->L2.H0.key'], <1 values>)",
        ),
        (rs.Clamp("L1.N2", 2), "Clamp(['L1.N2'], 2.0)", None),
        (rs.Clamp(["L1.H2.D3", "L1.E0.N3"], 2), None, None),
        (
            rs.Patch("L1.mlp", PROMPT),
            f"Patch(['L1.mlp'], donor={PROMPT!r})",
            "Patch(['L1.mlp'], donor='Rome is in')",
        ),
        (
            rs.Patch("L1.mlp", IDS, align="token", positions=1),
            f"Patch(['L1.mlp'], donor={IDS!r}, align='token', positions=1)",
            "Patch(['L1.mlp'], donor=[5, 4, 3], align='token', positions=1)",
        ),
        (
            rs.Patch("L1.mlp", IDS, align={0: 1, " Rome": 2}),
            f"Patch(['L1.mlp'], donor={IDS!r}, align={{0: 1, ' Rome': 2}})",
            "Patch(['L1.mlp'], donor=[5, 4, 3], align={0: 1, ' Rome': 2})",
        ),
        (
            rs.Mean("L1.mlp", [PROMPT, IDS], positions="all"),
            f"Mean(['L1.mlp'], over=[{PROMPT!r}, {IDS!r}], positions='all')",
            "Mean(['L1.mlp'], over=<2 prompts>, positions='all')",
        ),
        (
            rs.Mean("L1.mlp", (IDS,), align="index"),
            f"Mean(['L1.mlp'], over=[{IDS!r}], align='index')",
            "Mean(['L1.mlp'], over=<1 prompts>, align='index')",
        ),
        (rs.Attend("L1.H2<0", 0.5), "Attend(['L1.H2<0'], 0.5, renormalise=False)", None),
        (
            rs.Attend("L1.H2<0", 0, renormalise=True, positions=1),
            "Attend(['L1.H2<0'], 0.0, renormalise=True, positions=1)",
            None,
        ),
        (rs.Cut("L0.mlp", "L1.N2"), "Cut(['L0.mlp->L1.N2'])", None),
        (
            rs.Cut(["L0.mlp", "embed"], ["L1.H2", "L1.H3"], side="query", norm="frozen", positions="all"),
            "Cut(['L0.mlp->L1.H2.query:frozen', 'L0.mlp->L1.H3.query:frozen', 'embed->L1.H2.query:frozen', "
            "'embed->L1.H3.query:frozen'], positions='all')",
            None,
        ),
        (rs.Cut("L0.mlp->L1.N2"), "Cut(['L0.mlp->L1.N2'])", None),
        (
            rs.Patch(MANY, IDS),
            f"Patch({MANY}, donor={IDS!r})",
            f"Patch({str(MANY[:8])[:-1]}, and 3 more], donor=[5, 4, 3])",
        ),
    ]


@pytest.mark.parametrize("number", range(len(shown())))
def test_they_are_shown_in_these_words(number: int) -> None:
    one, text, brief = shown()[number]
    assert text is None or repr(one) == text
    assert one.brief == (brief or repr(one))


def test_a_recorded_donor_is_shown_as_its_prompt() -> None:
    rec = rs.record(shared("llama"), IDS)
    assert repr(rs.Patch("L1.mlp", rec)) == f"Patch(['L1.mlp'], donor={IDS!r})"
    assert rs.Patch("L1.mlp", rec).brief == "Patch(['L1.mlp'], donor=[5, 4, 3])"
    assert rs.Patch("L1.mlp", rec).donor is rec
    assert repr(rs.Mean("L1.mlp", [rec])) == f"Mean(['L1.mlp'], over=[{IDS!r}])"
    with pytest.raises(ArgumentError, match="`over` must be a sequence"):
        rs.Mean("L1.mlp", rec)


def test_they_are_equal_by_kind_sites_positions_and_values_and_by_nothing_else() -> None:
    made = [one for one, _, _ in shown()]
    for i, a in enumerate(made):
        for j, b in enumerate(made):
            assert (a == b) == (i == j or repr(a) == repr(b)), (a, b)
            assert a != b or hash(a) == hash(b)
    assert rs.Zero("L1.N2") != "Zero(['L1.N2'])"
    assert rs.Zero("L1.N2") != rs.Zero("L1.N2", positions=["target"])
    assert len({rs.Zero("L1.N2"), rs.Zero("L1.N2"), rs.Scale("L1.N2", 0.0)}) == 2
    assert hash(rs.Zero("L1.N2")) != hash(rs.Zero("L1.N3"))


def test_fields_hold_plain_values_of_their_own() -> None:
    steer, given = rs.Steer("L1.mlp", [1, 2]), torch.ones(2)
    assert steer.vector is not None
    assert steer.vector.dtype == torch.float64
    assert (steer.toward, steer.away, steer.times) == (None, None, 1.0)
    kept = rs.Steer("L1.mlp", given)
    given.zero_()
    assert kept.vector is not None
    assert kept.vector.tolist() == [1.0, 1.0]
    assert rs.Steer("L1.mlp", toward=2, away="a", times=3).times == 3.0
    assert rs.Set("L1.H2", [[3, 4]]).values[0][0].tolist() == [3.0, 4.0]
    assert [len(one) for one in rs.Set("L1.N2", [[3, 4]], positions=[0, 1]).values] == [2]
    assert rs.Set("L1.N2", [3], positions=0).positions == 0
    assert rs.Patch("L1.mlp", IDS, align="index").align == "index"
    assert rs.Patch("L1.mlp", IDS, align={0: 1}).align == ((0, 1),)
    assert rs.Mean("L1.mlp", iter([IDS, PROMPT]), align="token").over == (IDS, PROMPT)
    assert rs.Mean("L1.mlp", [IDS], align="token").align == "token"
    assert (rs.Attend("L1.H2<0", 1).weight, rs.Attend("L1.H2<0", 1).renormalise) == (1.0, False)
    assert rs.Attend("L1.H2<0", 1, renormalise=True).renormalise is True
    assert rs.Clamp("L1.N2", 3).value == 3.0
    assert [one.positions for one in (rs.Clamp("L1.N2", 3), rs.Set("L1.N2", [3]), rs.Steer("L1.mlp", [1.0]))] == [
        "target"] * 3  # fmt: skip
    assert (rs.Steer("L1.mlp", toward=2, away="a").toward, rs.Steer("L1.mlp", toward=2, away="a").away) == (2, "a")
    assert rs.Scale("L1.N2", 3).factor == 3.0
    assert rs.Zero("L1.N2").positions == "target"
    assert rs.Zero("L1.N2").sites == (rs.Neuron(1, 2),)
    assert [one.apart for one in (rs.Zero("L1.N2"), rs.Set("L1.N2", [1.0]), rs.Patch("L1.mlp", IDS))] == [
        False, True, False]  # fmt: skip


def test_one_operation_or_many_are_a_tuple() -> None:
    a, b = rs.Zero("L1.N2"), rs.Scale("L1.N2", 2.0)
    assert as_interventions(a) == (a,)
    assert as_interventions([a, b]) == (a, b)
    assert as_interventions(iter([a, b])) == (a, b)
    assert isinstance(a, Intervention)

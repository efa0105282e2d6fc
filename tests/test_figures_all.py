"""Figures: what stands in the Axes is what stands in the table; nothing global changes; tokens stay text."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import cbook, pyplot
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from tiny import FAMILIES, shared

import resid_surgery as rs
from resid_surgery.attribution.adding import add_bs_values, add_subvalues
from resid_surgery.attribution.by_layer import best_share, separation
from resid_surgery.stream.everywhere import attention_weights, lens_positions
from resid_surgery.views.lettering import plain, quoted, series, spaced
from resid_surgery.views.maps import plot_head_sources, plot_lens, plot_tokens
from resid_surgery.views.paper import DRAWN, plot_paper
from resid_surgery.views.profiles import (
    plot_addition,
    plot_counts,
    plot_layer_scores,
    plot_separation,
    plot_shares,
    plot_study,
)
from resid_surgery.views.shading import Shades, decimals, number
from resid_surgery.views.waterfall import ledger_steps, plot_ledger

IDS = [3, 17, 42, 5, 88]
HOSTILE = ["$x^2$", "_", r"\$", "$", "<img src=x>", " a b", "\n", "", "\u7684", "a $b$ c $"]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def recorded(family: str = "llama", **options: Any) -> Any:
    prompt = rs.Prompt(ids=IDS, target=7, versus=[11, 60], **options)
    return rs.record(shared(family), prompt, positions="all")


def texts(ax: Any) -> list[str]:
    return [one.get_text() for one in ax.texts]


def labels(ticks: Any) -> list[str]:
    return [one.get_text() for one in ticks]


def shown(text: str) -> str:
    """A number in a figure as Python reads it."""
    return text.replace("\u2212", "-")


# --- the verbs behind them ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_every_position_is_the_models_own_prediction_there(family: str) -> None:
    rec = recorded(family)
    table = lens_positions(rec)
    n_layers = rec.model.anatomy.n_layers
    assert len(table) == (n_layers + 1) * len(IDS)
    assert table["site"].drop_duplicates().tolist()[-1] == f"L{n_layers - 1}.resid_post"
    with torch.no_grad():
        logits = rec.model.module(torch.tensor([IDS])).logits[0]
    log_p = torch.log_softmax(logits.double(), -1)
    final = table[table["step"] == n_layers].set_index("position")
    for p in range(len(IDS)):
        assert final.loc[p, "predicted_id"] == int(log_p[p].argmax())
        assert final.loc[p, "prob"] == pytest.approx(float(log_p[p].max().exp()), abs=1e-6)
        assert final.loc[p, "target_log_prob"] == pytest.approx(float(log_p[p, 7]), abs=1e-5)
        assert final.loc[p, "target_rank"] == 1 + int((log_p[p] > log_p[p, 7]).sum())
    assert (table["target_prob"] - np.exp(table["target_log_prob"])).abs().max() < 1e-12
    own = rs.lens(rec, top=1).query("role == 'target'").set_index("site")
    here = table[table["position"] == len(IDS) - 1].set_index("site")
    assert (own.loc[here.index, "log_prob"] - here["target_log_prob"]).abs().max() < 1e-6
    assert lens_positions(rec, layers=[1])["step"].unique().tolist() == [0, 1]
    assert lens_positions(rec, layers=[1])["site"].unique().tolist() == ["L1.resid_pre", f"L{n_layers - 1}.resid_post"]


def test_the_lens_at_every_position_needs_every_position() -> None:
    with pytest.raises(rs.ArgumentError, match='positions="all"'):
        lens_positions(rs.record(shared("llama"), rs.Prompt(ids=IDS, target=7)))
    with pytest.raises(rs.ArgumentError, match="layers"):
        lens_positions(recorded(), layers=[9])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_those_that_the_model_returns(family: str) -> None:
    rec = recorded(family, position=3)
    table = attention_weights(rec)
    with torch.no_grad():
        out = rec.model.module(torch.tensor([IDS]), output_attentions=True)
    wanted = [float(a[0, h, 3, j]) for a in out.attentions for h in range(a.shape[1]) for j in range(4)]
    assert table["weight"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert table["site"].iloc[5] == "L0.H1<1"
    assert table["token"].iloc[:4].tolist() == [f"#{i}" for i in IDS[:4]]
    some = attention_weights(rec, ["L2.H1"])
    assert (some["layer"] == 2).all()
    assert some["head"].tolist() == [1] * 4
    with pytest.raises(rs.SiteError, match="must be heads"):
        attention_weights(rec, "L1.N3")


def test_the_worked_numbers() -> None:
    cases = [[5, 5, 5], [1, 1, 1], [1, 4, 5], [4, 1, 5]]
    table = add_bs_values([1, 2, 3], cases)
    third = table[table["token"] == "3"]
    assert third["prob_before"].round(3).tolist() == [0.665] * 4
    assert third["prob_after"].round(3).tolist() == [0.665, 0.665, 0.879, 0.946]
    assert third["case"].tolist() == [f"+ {one}" for one in cases]
    one = add_bs_values([1.0, 2.0], [0.5, 0.0], tokens=["a", "b"])
    assert (one["token"].tolist(), one["bs_after"].tolist()) == (["a", "b"], [1.5, 2.0])
    assert add_bs_values([1, 2], {"mine": [0, 1]})["case"].tolist() == ["mine"] * 2


@pytest.mark.parametrize(
    ("x", "added", "tokens"),
    [([1, 2], [1, 2, 3], None), ("12", [1, 2], None), ([1, math.nan], [1, 2], None), ([1, 2], [1, math.inf], None),
     ([1, 2], "ab", None), ([1, 2], [], None), ([], [1], None), ([1, 2], [1, 2], ["a"]), ([1, 2], 3, None)],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_added_is_refused(x: Any, added: Any, tokens: Any) -> None:
    with pytest.raises(rs.ArgumentError):
        add_bs_values(x, added, tokens=tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["frozen", "own"])
def test_adding_a_subvalue_changes_the_distribution_as_its_score_says(family: str, norm: str) -> None:
    rec = recorded(family)
    sites = ["L1.N4", "L2.H1<2", "L1.attn"]
    table = add_subvalues(rec, sites, top=2, norm=norm)
    assert table["case"].drop_duplicates().tolist() == sites
    assert table["role"].tolist() == ["target", "versus", "versus", "mover", "mover"] * 3
    assert table["closure"].max() < 1e-6
    target = table[table["role"] == "target"].set_index("case")
    increase = np.log(target["prob_after"] / target["prob_before"])
    for site, kind in zip(sites, ("neuron", "head_source", "layer"), strict=True):
        score = rs.scores(rec, kind=kind, norm=norm).set_index("site").loc[site, "log_prob_increase"]
        assert increase[site] == pytest.approx(score, abs=1e-6)
    with pytest.raises(rs.SiteError, match="not written by a sublayer"):
        add_subvalues(rec, "embed")
    with pytest.raises(rs.ArgumentError, match="norm"):
        add_subvalues(rec, "L1.N4", norm="live")


def test_the_share_of_the_best() -> None:
    rec = recorded()
    table = best_share(rec, k=3).set_index("layer")
    scores = rs.scores(rec)
    for layer, rows in scores.groupby("layer"):
        positive = sorted((v for v in rows["log_prob_increase"] if v > 0), reverse=True)
        assert table.loc[layer, "best"] == pytest.approx(sum(positive[:3]))
        assert table.loc[layer, "share"] == pytest.approx(sum(positive[:3]) / sum(positive))
    assert best_share(rec, k=3, layers=[1], kind="head_source")["layer"].tolist() == [1]
    assert best_share(rec, k=1000)["share"].tolist() == pytest.approx([1.0] * 3)


def test_what_separates() -> None:
    rec = recorded()
    table, ledger = separation(rec), rs.decompose(rec).set_index("site")
    assert len(table) == 2 * 2 * 3
    assert table["versus"].drop_duplicates().tolist() == ["#11", "#60"]
    for _, row in table.iterrows():
        column = "bs_versus_1" if row["versus"] == "#11" else "bs_versus_2"
        wanted = ledger.loc[row["site"], "bs_target"] - ledger.loc[row["site"], column]
        assert row["difference"] == pytest.approx(wanted)
    with pytest.raises(rs.ArgumentError, match="competitors"):
        separation(rs.record(shared("llama"), rs.Prompt(ids=IDS, target=7)))


# --- lettering and shading ----------------------------------------------------------------------


@pytest.mark.parametrize("token", HOSTILE)
def test_tokens_are_drawn_as_they_are_written(token: str) -> None:
    for letter in (plain, quoted, spaced, series):
        text = letter(token)
        assert not cbook.is_math_text(text)
        assert "\n" not in text
        figure = pyplot.figure()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing glyph is a warning
            figure.text(0, 0, text)
            figure.canvas.draw()


def test_how_tokens_are_written() -> None:
    assert quoted(" Paris") == "' Paris'"
    assert quoted("$x^2$") == r"'\$x^2\$'"
    assert plain("\u7684") == "\\u7684"
    assert quoted("abcdefgh", 5) == "'abcd\u2026'"
    assert (spaced(" a b"), spaced("")) == ("\u2423a\u2423b", "''")
    assert (series("_hidden"), series("a_b"), series(" ")) == ("'_hidden'", "a_b", "' '")


@pytest.mark.parametrize(
    ("values", "places", "wanted"),
    [([0.9034, 0.0121], 3, ["0.903", "0.012"]), ([-12.34, 0.04], 1, ["\u221212.3", "0.0"]), ([0.0], 2, ["0.00"]),
     ([math.nan, 5.0], 2, ["", "5.00"]), ([-1e-5, 1.0], 2, ["0.00", "1.00"]), ([1234.0], 0, ["1234"])],
    ids=str,
)  # fmt: skip
def test_numbers_of_a_figure_have_the_same_places(values: list[float], places: int, wanted: list[str]) -> None:
    assert decimals(values) == places
    assert [number(one, places) for one in values] == wanted


@pytest.mark.parametrize(
    ("values", "ends"),
    [([1.0, -3.0], (-3.0, 3.0)), ([1.0, 2.0], (0.0, 2.0)), ([-1.0, -2.0], (-2.0, 0.0)), ([math.nan], (0.0, 1.0))],
    ids=str,
)
def test_scales_go_around_0_and_ink_can_be_read(values: list[float], ends: tuple[float, float]) -> None:
    shades = Shades.of(values)
    assert (shades.low, shades.high) == ends
    for value in [*values, *ends]:
        parts = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shades.colour(value)[:3]]
        light = sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
        ink = 0.0 if shades.ink(value) == "black" else 1.0
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.4  # WCAG 2 asks 4.5 of text


# --- figures ------------------------------------------------------------------------------------


def test_a_strip_shows_every_token_with_its_number() -> None:
    rec = recorded()
    table = attention_weights(rec, "L1.H2")
    ax = plot_tokens(table, "weight", label="attention weight of L1.H2")
    places = decimals(table["weight"])
    assert texts(ax)[::2] == [f"#{i}" for i in IDS]
    assert texts(ax)[1::2] == [number(w, places) for w in table["weight"]]
    assert ax.get_title(loc="left") == "attention weight of L1.H2"
    cells = [one for one in ax.patches if isinstance(one, Rectangle)]
    most = table["weight"].max()
    for cell, weight in zip(cells, table["weight"], strict=True):
        assert cell.get_facecolor() == pytest.approx(mpl.colormaps["Greys"](weight / most))


def test_a_strip_sums_rows_of_a_position_and_wraps() -> None:
    rec = recorded()
    table = rs.scores(rec, kind="head_source")
    table["source"] = [rs.parse_site(site).source for site in table["site"]]
    sums = [sum(v for s, v in zip(table["site"], table["log_prob_increase"], strict=True) if s.endswith(f"<{j}"))
            for j in range(5)]  # fmt: skip
    ax = plot_tokens(table, "log_prob_increase", tokens=rec.prompt.tokens, wrap=11)
    assert [float(shown(one)) for one in texts(ax)[1::2]] == pytest.approx(sums, abs=10.0 ** -decimals(sums))
    corners = [one.get_xy() for one in ax.patches]
    assert corners == [(0, 0), (5, 0), (0, 1), (5, 1), (0, 2)]
    part = plot_tokens(table[table["source"] > 1], "log_prob_increase", tokens=[*rec.prompt.tokens, " later"])
    assert [bool(one) for one in texts(part)[1::2]] == [False, False, True, True, True, False]
    with pytest.raises(rs.ArgumentError, match=r"tokens=rec\.prompt\.tokens"):
        plot_tokens(table, "log_prob_increase")
    with pytest.raises(rs.ArgumentError, match="for positions up to 4"):
        plot_tokens(table, "log_prob_increase", tokens=["a"])


def test_heads_by_source() -> None:
    rec = recorded()
    table = rs.scores(rec, kind="head_source")
    ax = plot_head_sources(table, "log_prob_increase", tokens=rec.prompt.tokens, heads=5, label="nats")
    grid = np.array(table["log_prob_increase"]).reshape(12, 5)
    best = sorted(np.argsort(-np.abs(grid).max(1), kind="stable")[:5])
    assert np.asarray(ax.get_images()[0].get_array()) == pytest.approx(grid[best])
    assert labels(ax.get_yticklabels()) == [f"L{i // 4}.H{i % 4}" for i in best]
    assert labels(ax.get_xticklabels()) == [f"{j} '#{i}'" for j, i in enumerate(IDS)]
    assert ax.get_title() == "5 heads, 7 with smaller numbers left out"
    assert ax.figure.axes[1].get_ylabel() == "nats"
    places = decimals(grid[best])
    wanted = [number(v, places) for v in grid[best].ravel() if round(abs(v), places) > 0]
    assert texts(ax) == wanted
    whole = plot_head_sources(rs.decompose(rec, grain="head_source"), "bs_target", heads=99)
    assert whole.get_title() == "12 heads"
    assert labels(whole.get_xticklabels()) == list("01234")
    for bad, said in ((pd.concat([table, table]), "two rows of L0.H0<0"), (rs.scores(rec), "pairs such as")):
        with pytest.raises(rs.ArgumentError, match=said):
            plot_head_sources(bad, "log_prob_increase")


def test_the_lens_map() -> None:
    rec = recorded()
    table = lens_positions(rec)
    ax = plot_lens(table, every=2)
    kept = table[table["step"].isin([0, 2, 3])]
    assert texts(ax) == kept["predicted"].tolist()
    assert np.asarray(ax.get_images()[0].get_array()).ravel() == pytest.approx(kept["prob"].tolist())
    assert ax.get_images()[0].get_clim() == (0.0, 1.0)
    assert labels(ax.get_yticklabels()) == ["L0.resid_pre", "L2.resid_pre", "L2.resid_post"]
    assert labels(ax.get_xticklabels())[1] == "1 '#17'"
    assert "the token shown" in ax.figure.axes[1].get_ylabel()
    other = plot_lens(table, value="target_prob")
    assert np.asarray(other.get_images()[0].get_array()).ravel() == pytest.approx(table["target_prob"].tolist())
    assert "'#7'" in other.figure.axes[1].get_ylabel()
    assert "own norm" in other.figure.axes[1].get_ylabel()
    narrow = pyplot.subplots(figsize=(1, 3))[1]
    assert not texts(plot_lens(table, ax=narrow))


def bars(ax: Any) -> list[tuple[float, float]]:
    """(left, right) of the waterfall's bars, from the top."""
    return [(one.get_x(), one.get_x() + one.get_width()) for one in sorted(ax.patches, key=lambda one: one.get_y())]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("sites", [["L0.N3", "L1.H1"], ["L2.H1<2"]], ids=str)
def test_a_ledger_falls_from_before_to_after(family: str, sites: list[str]) -> None:
    rec = recorded(family)
    effect = rs.intervene(rec, rs.Zero(sites))
    ledger, row = effect.ledger(), effect.table.iloc[0]
    ax = plot_ledger(ledger, top=3, before=row["bs_before"])
    ends = bars(ax)
    assert ends[0] == pytest.approx((0.0, row["bs_before"]))
    assert ends[-1] == pytest.approx((0.0, row["bs_after"]), abs=1e-5)
    for (_, one), (other, _) in itertools.pairwise([ends[0], *ends[1:-1]]):
        assert other == pytest.approx(one)  # each begins where the one above it ended
    steps = ledger_steps(ledger, 3)
    assert [right - left for left, right in ends[1:-1]] == pytest.approx([one.amount for one in steps])
    assert sum(one.amount for one in steps) == pytest.approx(row["bs_change"], abs=1e-5)
    by_role = {role: sum(s.amount for s in steps if s.role == role) for role in {s.role for s in steps}}
    assert by_role["operated"] == pytest.approx(row["direct"], abs=1e-6)
    assert by_role.get("post-norm", 0.0) == pytest.approx(row["post_norm"], abs=1e-6)
    assert by_role["norm's new scale"] == pytest.approx(row["norm_scale"], abs=1e-6)
    later = by_role.get("goes along", 0.0) + by_role.get("compensates", 0.0)
    assert later == pytest.approx(row["indirect"], abs=1e-5)
    assert by_role.get("goes along", 0.0) * row["direct"] >= 0
    assert by_role.get("compensates", 0.0) * row["direct"] <= 0
    names = labels(ax.get_yticklabels())
    assert (names[0], names[-1], names[1:-1]) == ("before", "after", [one.name for one in steps])
    assert ax.get_xlabel() == "bs-value of the target (logits, frozen norm)"
    roles = [one.get_text() for one in ax.get_legend().get_texts()]
    assert set(roles) == {one.role for one in steps}
    looks = {(one.get_hatch(), one.get_facecolor()) for one in ax.get_legend().get_patches()}
    assert len(looks) == len(roles)
    assert len({hatch for hatch, _ in looks}) == len(roles)  # readable without colour


def test_a_ledger_names_the_largest_and_pools_the_rest() -> None:
    rows = [("L0.mlp", "mlp", 5.0, -2.0, -2.0, 0.0), ("L1.attn", "attn", 1.0, 0.9, 0.0, 0.9),
            ("L1.mlp", "mlp", 1.0, -0.5, 0.0, -0.5), ("L2.attn", "attn", 0.0, 0.001, 0.0, 0.001),
            ("L2.mlp", "mlp", 0.0, 0.2, 0.0, 0.2), ("norm_scale", "norm_scale", 0.0, -0.1, 0.0, 0.0)]  # fmt: skip
    ledger = pd.DataFrame(rows, columns=["site", "kind", "bs_before", "bs_change", "direct", "indirect"])
    ledger["post_norm"] = 0.0
    steps = [(one.name, one.role, round(one.amount, 6)) for one in ledger_steps(ledger, 2)]
    assert steps == [("L0.mlp", "operated", -2.0), ("L1.mlp", "goes along", -0.5), ("L1.attn", "compensates", 0.9),
                     ("2 others", "compensates", 0.201), ("final norm", "norm's new scale", -0.1)]  # fmt: skip
    assert [one.name for one in ledger_steps(ledger, 9)][3:5] == ["L2.mlp", "1 other"]  # .001 is too small for a bar
    ax = plot_ledger(ledger, top=2)
    assert [shown(one) for one in texts(ax)] == ["7.00", "-2.00", "-0.50", "+0.90", "+0.20", "-0.10", "5.50  (-1.50)"]
    with pytest.raises(rs.ArgumentError, match="whole, with its row norm_scale"):
        plot_ledger(ledger[:-1])
    with pytest.raises(rs.ArgumentError, match="before"):
        plot_ledger(ledger, before=math.nan)


def test_where_nothing_is_operated_on_here_the_change_says_who_goes_along() -> None:
    effect = rs.intervene(recorded(), rs.Zero("L0.N3", positions=1))
    assert effect.table["direct"].iloc[0] == 0
    change = effect.table["bs_change"].iloc[0]
    steps = ledger_steps(effect.ledger(), 4)
    assert "operated" not in {one.role for one in steps}
    for one in steps:
        if one.role in ("goes along", "compensates"):
            assert bool(one.amount * change > 0) is (one.role == "goes along")


def test_the_arithmetic_is_drawn_with_its_sums() -> None:
    table = add_bs_values([1, 2, 3], [[5, 5, 5], [4, -1, 5]], tokens=["a", "$b$", "c"])
    ax = plot_addition(table)
    before, after = ax.containers
    assert [one.get_height() for one in before] == pytest.approx(table["prob_before"].tolist())
    assert [one.get_height() for one in after] == pytest.approx(table["prob_after"].tolist())
    assert {one.get_hatch() for one in before} != {one.get_hatch() for one in after}
    names = labels(ax.get_xticklabels())
    assert names[0] == "'a'\n1 + 5\n= 6"
    assert names[4] == "'\\$b\\$'\n2 \u2212 1\n= 1"
    assert texts(ax)[:2] == ["+ [5, 5, 5]", "+ [4, -1, 5]"]
    assert "0.665" in texts(ax)
    model = plot_addition(add_subvalues(recorded(), ["L1.N4", "L2.H1<2"]))
    assert model.get_xlabel().endswith("(logits, frozen norm)")


def test_layer_figures_of_the_paper() -> None:
    rec = recorded()
    layer_scores = rs.scores(rec, kind="layer")
    ax = plot_layer_scores(layer_scores)
    for line, kind in zip(ax.get_lines(), ("attn", "mlp"), strict=False):
        assert line.get_ydata().tolist() == layer_scores.loc[layer_scores["kind"] == kind, "log_prob_increase"].tolist()
    assert ax.get_ylabel() == "log-prob increase (nats, frozen norm)"
    counts = pd.concat([rs.counts(rec, kind=kind) for kind in ("neuron", "head_source")])
    for share in (False, True):
        lines = plot_counts(counts, share=share).get_lines()[:4]
        pairs = itertools.product(("neuron", "head_source"), ("helpful", "harmful"))
        for line, (kind, sign) in zip(lines, pairs, strict=True):
            rows = counts[counts["kind"] == kind]
            wanted = rows[sign] / (rows["candidates"] if share else 1)
            assert (line.get_label(), line.get_ydata().tolist()) == (f"{kind}, {sign}", pytest.approx(wanted.tolist()))
        assert len({(one.get_linestyle(), one.get_marker()) for one in lines}) == 4
    shares = best_share(rec, k=2)
    ax = plot_shares(shares)
    assert ax.get_lines()[0].get_ydata().tolist() == shares["share"].tolist()
    assert ax.get_ylabel() == "share of the 2 best\nin all that helps (frozen norm)"
    apart = separation(rec)
    ax = plot_separation(apart, versus="#60")
    rows = apart[(apart["versus"] == "#60") & (apart["kind"] == "mlp")]
    assert ax.get_lines()[1].get_ydata().tolist() == rows["difference"].tolist()
    assert ax.get_ylabel() == "bs '#7' \u2212 '#60'\n(logits, frozen norm)"
    with pytest.raises(rs.ArgumentError, match="versus"):
        plot_separation(apart, versus="#1")


def study() -> pd.DataFrame:
    rows = [
        (arm, k, -k * s, -k * s - 1, -k * s + 2) for arm, s in (("located", 1.0), ("random", 0.1)) for k in (10, 1, 3)
    ]
    return pd.DataFrame(rows, columns=["arm", "k", "mean", "low", "high"])


def test_a_study_is_a_line_an_arm_with_intervals() -> None:
    ax = plot_study(study(), "k", log=True, ylabel="nats")
    drawn = [one for one in ax.get_lines() if one.get_label() in ("located", "random")]
    for line, container, scale in zip(drawn, ax.containers, (1.0, 0.1), strict=True):
        _, _, (segments,) = container
        assert line.get_xdata().tolist() == [1, 3, 10]
        assert line.get_ydata().tolist() == pytest.approx([-scale, -3 * scale, -10 * scale])
        ends = [tuple(one[:, 1]) for one in segments.get_segments()]
        assert ends == [pytest.approx((-k * scale - 1, -k * scale + 2)) for k in (1, 3, 10)]
    assert [one.get_text() for one in ax.get_legend().get_texts()] == ["located", "random"]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "k", "nats")
    assert labels(ax.get_xticklabels()) == ["1", "3", "10"]
    first, second = drawn
    assert (first.get_linestyle(), first.get_marker()) != (second.get_linestyle(), second.get_marker())
    named = plot_study(study().rename(columns={"k": "fact"}).replace({"fact": {1: "$a$", 3: "b", 10: "_c"}}), "fact")
    assert labels(named.get_xticklabels()) == ["_c", r"\$a\$", "b"]
    assert named.get_lines()[0].get_xdata().tolist() == [0, 1, 2]
    aside = plot_study(study().assign(mean=lambda one: one["high"] + 1), "k")  # a mean outside of its interval
    (segments,) = aside.containers[0][2]
    ends = [tuple(one[:, 1]) for one in segments.get_segments()]
    assert ends == [pytest.approx((-k - 1, -k + 2)) for k in (1, 3, 10)]
    assert aside.get_lines()[0].get_ydata().tolist() == pytest.approx([2.0, 0.0, -7.0])
    zero = study().assign(k=[0, 1, 3] * 2)
    cases = [(pd.concat([study(), study()]), {}, "one row for each"), (zero, {"log": True}, "`log` must be False")]
    for bad, options, said in (*cases, (study()[["k"]], {}, "columns")):
        with pytest.raises(rs.ArgumentError, match=said):
            plot_study(bad, "k", **options)


def test_heat_maps_say_signs_without_colour() -> None:
    rec = recorded()
    table = rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*"))
    ax = rs.plot_grid(table, "log_prob_change")
    values = np.asarray(ax.get_images()[0].get_array())
    places = decimals(values)
    assert texts(ax) == [number(v, places) for v in values.ravel() if round(abs(v), places) > 0]
    heads = rs.plot_heads(table, "log_prob_change")
    six = sorted(table["log_prob_change"].abs(), reverse=True)[:6]
    assert sorted((abs(float(shown(one))) for one in texts(heads)), reverse=True) == pytest.approx(six, abs=0.05)


# --- every figure -------------------------------------------------------------------------------

DRAWERS: dict[str, Callable[..., Any]] = {
    "stream": rs.plot_stream, "grid": lambda one, **kw: rs.plot_grid(one, "score", **kw),
    "intervals": rs.plot_intervals, "layers": lambda one, **kw: rs.plot_layers(one, "score", hue="token", **kw),
    "cumulated": rs.plot_cumulated, "probability": rs.plot_probability, "sources": rs.plot_sources,
    "removed": rs.plot_removed, "cross_layer": rs.plot_cross_layer, "locations": rs.plot_locations,
    "heads": lambda one, **kw: rs.plot_heads(one, "score", **kw), "exposure": rs.plot_exposure,
    "retention": rs.plot_retention, "tokens": lambda one, **kw: plot_tokens(one, "score", **kw),
    "head_sources": lambda one, **kw: plot_head_sources(one, "score", **kw), "lens": plot_lens, "ledger": plot_ledger,
    "addition": plot_addition, "layer_scores": plot_layer_scores, "counts": plot_counts, "shares": plot_shares,
    "separation": plot_separation, "study": lambda one, **kw: plot_study(one, "k", **kw), "graph": rs.plot_graph,
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWERS)
@pytest.mark.parametrize(
    "table", [pd.DataFrame({"a": [1]}), [1, 2], None, "text"], ids=["columns", "list", "none", "text"]
)
def test_other_tables_are_refused_before_a_figure_is_made(name: str, table: Any) -> None:
    with pytest.raises(rs.ArgumentError):
        DRAWERS[name](table)
    assert not pyplot.get_fignums()


def hostile_tables() -> dict[str, pd.DataFrame]:
    """A table for every figure that shows tokens, made of hostile ones."""
    n = len(HOSTILE)
    rows = pd.DataFrame({"token": HOSTILE, "score": np.linspace(-1, 1, n), "position": range(n), "layer": 0, "head": 0})
    stream = [(s, f"L{s}.resid_pre", s, t, i, "target" if i == 0 else "versus", 1.0 * s) for i, t in enumerate(HOSTILE)
              for s in range(3)]  # fmt: skip
    lens = rows.assign(step=0, site="L0.resid_pre", predicted=HOSTILE[::-1], prob=0.5, target_prob=0.1)
    lens.attrs["target"] = "$x^2$"
    both = rows.assign(kind="$a$ and $b$", target="$x^2$", versus="$", difference=0.1, log_prob_increase=0.1)
    sums = both.assign(case="_$1$", bs_before=1.0, bs_added=1.0, bs_after=2.0, prob_before=0.1, prob_after=0.2)
    removed = rows.assign(reader="L1.H0", writer_layer=0, part="attn", change=1.0, change_weights_fixed=1.0,
                          readout="bs '$x^2$' - '$'", unit="bs-value")  # fmt: skip
    crossed = removed.assign(layer=1, helpful=1.0, unhelpful=-1.0)
    return {
        "stream": pd.DataFrame(stream, columns=["step", "site", "layer", "token", "token_id", "role", "bs_value"]),
        "grid": rows, "layers": rows, "tokens": rows, "lens": lens, "separation": both, "layer_scores": both,
        "addition": sums, "removed": removed, "cross_layer": crossed,
        "intervals": rows.assign(mean=0.5, low=0.1, high=0.9).drop(columns="score").rename(columns={"token": "score"}),
        "study": rows.assign(arm=HOSTILE, k=1, mean=0.5, low=0.1, high=0.9),
        "counts": both.assign(helpful=1, harmful=2, candidates=3, score="$p$"),
        "shares": both.assign(share=0.5, k=3),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_tables())
def test_hostile_tokens_stay_text_and_nothing_global_changes(name: str) -> None:
    before, count = dict(mpl.rcParams), len(pyplot.get_fignums())
    mine, ax = pyplot.subplots()
    other = pyplot.figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DRAWERS[name](hostile_tables()[name], ax=ax) is ax
        mine.canvas.draw()
        new = DRAWERS[name](hostile_tables()[name]).figure
        new.canvas.draw()
    written = [one.get_text() for one in (*mine.findobj(Text), *new.findobj(Text))]
    assert not [one for one in written if cbook.is_math_text(one)]
    assert any("\\$" in one for one in written)
    assert dict(mpl.rcParams) == before
    assert len(pyplot.get_fignums()) == count + 3  # the caller's two, and one for the call without ax=
    assert other.number in pyplot.get_fignums()
    legend = new.axes[0].get_legend()
    if name in ("stream", "layers", "study"):
        assert len(legend.get_texts()) == len(HOSTILE)  # none is left out, as a name of "_" would be


# --- the paper's --------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", [*DRAWN, 9])
def test_every_figure_of_the_paper_is_one_call(figure: Any) -> None:
    rec = recorded()
    given = pyplot.subplots()[1]
    ax = plot_paper(rec, figure, ax=given)
    assert ax is given
    assert len(pyplot.get_fignums()) == 1
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_lines() or ax.patches


def test_the_papers_figures_keep_to_the_layer_and_kind() -> None:
    rec = recorded()
    assert plot_paper(rec, 8, layer=1).get_title().endswith("layer 1")
    assert plot_paper(rec, "11", layer=-1).get_title().startswith("What L2.H")
    assert plot_paper(rec, 6, kind="head_source", layer=0).get_lines()[0].get_label() == "head_source, helpful"
    assert plot_paper(rec, 6, layer=0).get_lines()[0].get_xdata().tolist() == [0]
    fed = plot_paper(rec, 12).get_ylabel()
    assert "#7" in fed
    assert "#11" in fed
    alone = rs.record(shared("llama"), rs.Prompt(ids=IDS, target=7), positions="all")
    assert "#7" in plot_paper(alone, 11).get_ylabel()


def test_what_is_no_figure_of_the_paper_is_refused() -> None:
    rec = recorded()
    for figure, options, said in ((4, {}, "figure"), ("F", {}, "figure"), (6, {"kind": "head"}, "kind"),
                                  (8, {"layer": 9}, "layer"), (8, {"layer": "x"}, "layer")):  # fmt: skip
        with pytest.raises(rs.ArgumentError, match=said):
            plot_paper(rec, figure, **options)
    with pytest.raises(rs.ArgumentError):
        plot_paper("rec", 9)
    with pytest.raises(rs.ArgumentError, match='positions="all"'):
        plot_paper(rs.record(shared("llama"), rs.Prompt(ids=IDS, target=7, versus=[11])), 11)
    assert not pyplot.get_fignums()

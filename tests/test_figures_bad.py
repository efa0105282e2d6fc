"""Figures that are asked for the wrong way: one line of the library's, before anything is drawn or a file is written.

`test_bad_calls_sweep` gives every parameter of every figure nasty values; here it is looked at what is left of a
refused call, and tables that have the right columns with the wrong things in them are drawn.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from good_calls import CALLS, Bench
from matplotlib import pyplot
from test_bad_calls_sweep import NASTY, Odd, parameters, some_of

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, LoadError, ResidSurgeryError
from resid_surgery.views.taking import label_of, taken

FIGURES = tuple(name for name in CALLS if name.startswith("plot_"))
TABLES = tuple(name for name in FIGURES if name not in ("plot_graph", "plot_paper"))  # those that take a table


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    for make in NASTY.values():
        make()
    return made


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))
    pyplot.close("all")
    yield
    pyplot.close("all")


def blank(ax: Any) -> bool:
    """Whether nothing was done to Axes."""
    made = type(ax)(type(ax.figure)(), (0, 0, 1, 1))
    drawn = [*ax.lines, *ax.patches, *ax.texts, *ax.images, *ax.collections, *ax.containers]
    said = (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_xscale(), ax.get_legend(), ax.get_xlim())
    return not drawn and said == (
        made.get_xlabel(), made.get_ylabel(), made.get_title(), made.get_xscale(), made.get_legend(), made.get_xlim()
    )  # fmt: skip


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_a_refused_figure_leaves_the_axes_blank_and_makes_none(name: str, bench: Bench) -> None:
    good = CALLS[name](bench)
    refused = 0
    for one in parameters(getattr(rs, name), good):
        for kind in some_of(NASTY, f"{name} {one} blank", 6):
            ax = bench.axes
            try:
                getattr(rs, name)(**good | {"ax": ax} | {one: NASTY[kind]()})
            except ResidSurgeryError:
                refused += 1
                assert blank(ax), (one, kind)
                assert pyplot.get_fignums() == [], (one, kind)
            pyplot.close("all")
    assert refused > 0


OUT_OF_RANGE: list[tuple[str, dict[str, Any], str]] = [
    ("plot_intervals", {"mark": float("nan")}, "`mark` must be a finite number; got nan"),
    ("plot_intervals", {"mark": "0"}, "`mark` must be a finite number; got '0'"),
    ("plot_intervals", {"xlabel": 5}, "`xlabel` must be a text; got 5"),
    ("plot_intervals", {"xlabel": "a" * 501}, "`xlabel` must be a text of at most 500 characters"),
    ("plot_intervals", {"xlabel": r"$\frac$"}, r"`xlabel` must be a text whose mathematics matplotlib can read"),
    ("plot_intervals", {"label": "nothing"}, "`table` must be one with the columns mean, nothing, low, high"),
    ("plot_layers", {"value": "kind"}, r"`table\['kind'\]` must be a column of numbers"),
    ("plot_layers", {"hue": 3}, "`table` must be drawn by names of columns; got 3"),
    ("plot_layers", {"ylabel": None}, "`ylabel` must be a text; got None"),
    ("plot_probability", {"log": 1}, "`log` must be True or False; got 1"),
    ("plot_counts", {"share": "yes"}, "`share` must be True or False; got 'yes'"),
    ("plot_study", {"log": None}, "`log` must be True or False; got None"),
    ("plot_study", {"hue": "x"}, "`hue` must be another column than `x`; got 'x'"),
    ("plot_separation", {"versus": " rome"}, r"`versus` must be one of Rome; got ' rome'. Did you mean ' Rome'\?"),
    ("plot_separation", {"versus": 7}, "`versus` must be one of Rome; got 7"),
    ("plot_sources", {"reader": "L1.N2"}, r"`reader` must be one of L1.N1; got 'L1.N2'. Did you mean 'L1.N1'\?"),
    ("plot_removed", {"reader": []}, r"`reader` must be one of L1.H1; got \[\]"),
    ("plot_cross_layer", {"layer": -1}, "`layer` must be a whole number >= 0; got -1"),
    ("plot_cross_layer", {"layer": 7}, r"`layer` must be one of \[.*\]; got 7"),
    ("plot_locations", {"kind": "head"}, "`kind` must be one of neuron, head_source; got 'head'"),
    ("plot_heads", {"value": "layer"}, "`value` must be another column than layer and head; got 'layer'"),
    ("plot_heads", {"label": float("nan")}, "`label` must be a text; got nan"),
    ("plot_graph", {"edges": 0}, "`edges` must be a whole number >= 1; got 0"),
    ("plot_graph", {"fan": 2.5}, "`fan` must be a whole number >= 1; got 2.5"),
    ("plot_grid", {"rows": "nothing"}, "`rows` must be a column of the table: .*; got 'nothing'"),
    ("plot_grid", {"columns": "layer"}, "`columns` must be another column than `rows` and `value`; got 'layer'"),
    ("plot_head_sources", {"heads": 0}, "`heads` must be a whole number >= 1; got 0"),
    ("plot_head_sources", {"tokens": ["one"]}, r"`tokens` must be a prompt's tokens, for positions up to \d"),
    ("plot_head_sources", {"tokens": "words"}, "`tokens` must be the texts of a prompt's 1 to 100000 tokens"),
    ("plot_tokens", {"tokens": [1, 2, 3, 4, 5, 6]}, "`tokens` must be the texts of a prompt's"),
    ("plot_tokens", {"wrap": 0}, "`wrap` must be a whole number >= 1; got 0"),
    ("plot_lens", {"every": 0}, "`every` must be a whole number >= 1; got 0"),
    ("plot_lens", {"value": "log_prob"}, "`value` must be one of prob, target_prob; got 'log_prob'"),
    ("plot_ledger", {"top": 0}, "`top` must be a whole number >= 1; got 0"),
    ("plot_ledger", {"before": float("inf")}, "`before` must be a finite number; got inf"),
    ("plot_ledger", {"before": 1e200}, r"`ledger` must be one whose sums are below 1e\+12 logits"),
    ("plot_stream", {"marked": "L1.N1"}, "`marked` must be a sequence of sites, such as found.sites"),
    ("plot_stream", {"marked": ["L1.N1"]}, "`marked` must be sites that write in layers 0 to 2, .*; got 'L1.N1'"),
    ("plot_stream", {"marked": [rs.Neuron(9, 1)]}, "`marked` must be sites that write in layers 0 to 2"),
    ("plot_stream", {"marked": [rs.Resid(1, "pre")]}, "`marked` must be sites that write"),
    ("plot_paper", {"figure": 4}, "`figure` must be one of 3, 5, 6, .*; got '4'"),
    ("plot_paper", {"figure": 5.0}, "`figure` must be one of 3, 5, 6, .*; got 5.0"),
    ("plot_paper", {"layer": 3}, r"`layer` must be a whole number in -3\.\.2 for .*; got 3\. Count from the end"),
    ("plot_layers", {"ax": 5}, "`ax` must be matplotlib Axes of a figure, or None; got 5"),
]


@pytest.mark.parametrize(("name", "given", "said"), OUT_OF_RANGE, ids=lambda one: str(one)[:40])
def test_an_option_that_is_none_is_named(name: str, given: dict[str, Any], said: str, bench: Bench) -> None:
    good = CALLS[name](bench)
    with pytest.raises(ArgumentError, match=said):
        getattr(rs, name)(**good | given)
    assert blank(good["ax"])
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_a_line_and_removed_axes_are_no_axes(name: str, bench: Bench) -> None:
    figure, ax = pyplot.subplots()
    (line,) = ax.plot([1, 2])
    gone = figure.add_subplot()
    gone.remove()
    for given in (figure, line, gone, Axes):
        with pytest.raises(ArgumentError, match="`ax` must be matplotlib Axes of a figure, or None"):
            getattr(rs, name)(**CALLS[name](bench) | {"ax": given})


class Axes:
    """What looks a little like Axes."""

    def get_figure(self) -> None:
        return None


def test_the_axes_of_the_papers_figures_are_looked_at_before_anything_is_computed(bench: Bench) -> None:
    with pytest.raises(ArgumentError, match="`ax` must be"):
        rs.plot_paper("no recording", "7", ax="nowhere")  # type: ignore[arg-type]


# --- tables -------------------------------------------------------------------------------------

BAD: dict[str, Callable[[int], Any]] = {
    "text": lambda n: ["x"] * n,
    "empty text": lambda n: [""] * n,
    "long text": lambda n: ["y" * 2000] * n,
    "no text": lambda n: ["\ud800"] * n,
    "mathematics": lambda n: [r"$\frac$"] * n,
    "None": lambda n: [None] * n,
    "NaN": lambda n: [np.nan] * n,
    "one NaN": lambda n: [np.nan, *[1.0] * (n - 1)],
    "infinite": lambda n: [np.inf] * n,
    "one infinite": lambda n: [-np.inf, *[1.0] * (n - 1)],
    "flags": lambda n: [True] * n,
    "complex": lambda n: [1j] * n,
    "huge": lambda n: [10**400] * n,
    "large": lambda n: [1e300] * n,
    "NA": lambda n: pd.array([pd.NA] * n, dtype="Int64"),
    "one NA": lambda n: pd.array([pd.NA, *[1] * (n - 1)], dtype="Int64"),
    "negative": lambda n: [-5] * n,
    "halves": lambda n: [0.5] * n,
    "zeros": lambda n: [0] * n,
    "objects": lambda n: [Odd() for _ in range(n)],
    "lists": lambda n: [[1] for _ in range(n)],
    "bytes": lambda n: [b"x"] * n,
    "categories": lambda n: pd.Categorical(["a"] * n),
    "dates": lambda n: pd.to_datetime(["2020"] * n),
    "mixed": lambda n: [("a", 1, None, 2.5)[i % 4] for i in range(n)],
    "numbers in objects": lambda n: [(1, None, np.float32(2.5))[i % 3] for i in range(n)],
}
OBJECTS = ("no text", "objects", "lists", "mixed", "huge", "numbers in objects", "bytes")


def with_column(table: pd.DataFrame, column: str, kind: str) -> pd.DataFrame:
    made = BAD[kind](len(table))
    values = made if isinstance(made, (pd.Categorical, pd.DatetimeIndex, pd.api.extensions.ExtensionArray)) else (
        pd.Series(made, dtype=object if kind in OBJECTS else None, index=table.index))  # fmt: skip
    return table.assign(**{column: values})


SHAPES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "no rows": lambda table: table.iloc[:0],
    "one row": lambda table: table.iloc[:1],
    "rows twice": lambda table: pd.concat([table, table]),
    "columns twice": lambda table: pd.concat([table, table], axis=1),
    "columns without names": lambda table: table.set_axis(range(table.shape[1]), axis=1),
    "an index of two levels": lambda table: table.set_index(pd.MultiIndex.from_arrays([table.index, table.index])),
    "a column as index": lambda table: table.set_index(table.columns[0]),
}


def outcome(name: str, good: dict[str, Any], table: pd.DataFrame, bench: Bench) -> str:
    """ "" where a figure was drawn to the end, or refused with nothing drawn; else what went wrong."""
    (key,) = (one for one, value in good.items() if isinstance(value, pd.DataFrame))
    ax, before = bench.axes, table.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            getattr(rs, name)(**good | {key: table, "ax": ax}).figure.savefig(io.BytesIO(), format="png", dpi=20)
        except ResidSurgeryError as error:
            return "" if blank(ax) and len(str(error)) < 480 else f"refused after drawing: {error}"
        except Exception as error:  # noqa: BLE001  (what is looked for)
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            pyplot.close("all")
    pd.testing.assert_frame_equal(table, before)
    return ""


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_wrong_things_in_it_is_refused_in_one_line_or_drawn(name: str, bench: Bench) -> None:
    good = CALLS[name](bench)
    (table,) = (value for value in good.values() if isinstance(value, pd.DataFrame))
    wrong = {}
    for column in table.columns:
        for kind in some_of(BAD, f"{name} {column}", 13):
            if said := outcome(name, good, with_column(table, column, kind), bench):
                wrong[column, kind] = said
    for kind, make in SHAPES.items():
        if said := outcome(name, good, make(table), bench):
            wrong["", kind] = said
    assert wrong == {}


@pytest.mark.parametrize("name", TABLES)
def test_an_empty_table_is_refused_by_every_figure(name: str, bench: Bench) -> None:
    good = CALLS[name](bench)
    (key,) = (one for one, value in good.items() if isinstance(value, pd.DataFrame))
    with pytest.raises(ArgumentError, match="must be of at least one row; got 'an empty table'"):
        getattr(rs, name)(**good | {key: good[key].iloc[:0]})
    assert blank(good["ax"])


def test_a_column_of_missing_numbers_is_refused(bench: Bench) -> None:
    table = pd.DataFrame({"layer": [0, 1], "v": [np.nan, np.inf]})
    with pytest.raises(ArgumentError, match=r"`table\['v'\]` must be a column with a finite number; got \[nan, inf\]"):
        rs.plot_layers(table, "v")
    ax = rs.plot_layers(table.assign(v=[1.0, np.nan]), "v")
    assert np.array_equal(ax.get_lines()[0].get_ydata(), [1.0, np.nan], equal_nan=True), "a gap"


# --- what is taken ------------------------------------------------------------------------------


def test_columns_are_taken_in_plain_kinds() -> None:
    given = pd.DataFrame(
        {"n": pd.array([1, None, 3, 4], dtype="Int64"), "v": pd.array([1.5, None, None, 2], dtype="Float64"),
         "t": ["a", 1, True, None], "o": np.array([1, None, np.float32(2), 3.5], dtype=object), "rest": [[1]] * 4},
        index=[7, 7, 8, 9],
    )  # fmt: skip
    given.attrs["about"] = "kept"
    before = given.copy()
    found = taken(given, whole=["n"], real=["v", "o"])
    assert found["n"].tolist() == [1, 3, 4]
    assert found["n"].dtype == np.int64
    assert found[["v", "o"]].to_numpy().tolist() == [[1.5, 1.0], [pytest.approx(np.nan, nan_ok=True), 2.0], [2.0, 3.5]]
    assert found.attrs == {"about": "kept"}
    assert found.index.tolist() == [0, 1, 2]
    assert taken(given, named=["t"])["t"].tolist() == ["a", "1", "True"]
    pd.testing.assert_frame_equal(given, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1], "`table` must be a DataFrame; got 'list'"),
        (pd.DataFrame({"a": [1]}), r"`table` must be one with the columns v, n; got \['a'\]"),
        (pd.DataFrame({"n": [], "v": []}), "`table` must be of at least one row"),
        (pd.DataFrame({"n": [1.5], "v": [1]}), r"`table\['n'\]` must be a column of whole numbers; got \[1.5\]"),
        (pd.DataFrame({"n": [1e17], "v": [1]}), r"`table\['n'\]` must be a column of whole numbers"),
        (pd.DataFrame({"n": [np.inf], "v": [1]}), r"`table\['n'\]` must be a column of whole numbers"),
        (pd.DataFrame({"n": [np.nan], "v": [1]}), "`table` must be of at least one row with its n; got 'none'"),
        (pd.DataFrame({"n": [1], "v": ["x"]}), r"`table\['v'\]` must be a column of numbers"),
        (pd.DataFrame({"n": [1], "v": [True]}), r"`table\['v'\]` must be a column of numbers"),
        (pd.DataFrame({"n": [1], "v": [1j]}), r"`table\['v'\]` must be a column of numbers"),
        (pd.DataFrame({"n": [1], "v": [10**400]}, dtype=object), r"`table\['v'\]` must be .* that a float holds"),
        (pd.DataFrame([[1, 2, 3]], columns=["n", "v", "v"]), "`table` must be a table in which every column has"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_taken_is_said(given: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        taken(given, whole=["n"], real=["v"])


@pytest.mark.parametrize(
    ("given", "shown"),
    [("", r"\$a\$"), ("plain", "plain"), ("$R^2$, nats", "$R^2$, nats"), ("a\nb", "a\nb"), ("\0\ud800", r"\x00\ud800"),
     ("5 $", "5 $"), (r"$\sum_i$ of" + "\n" + r"\$", r"$\sum_i$ of" + "\n" + r"\$")],
    ids=repr,
)  # fmt: skip
def test_a_label_is_drawn_as_it_is_given_and_a_name_as_it_is_written(given: str, shown: str) -> None:
    assert label_of("label", given, "$a$") == shown
    figure, ax = pyplot.subplots()
    ax.set_xlabel(label_of("label", given, "$a$"))
    figure.canvas.draw()


# --- files --------------------------------------------------------------------------------------


def test_a_figure_that_cannot_be_drawn_leaves_no_half_of_it(tmp_path: Path) -> None:
    ax = pyplot.subplots()[1]
    ax.set_title(r"$\frac$")
    (tmp_path / "bad.png").write_text("old")
    with pytest.raises(ArgumentError, match=r"the figure for .*bad.png cannot be drawn: matplotlib says"):
        rs.save_results(tmp_path, {"t": pd.DataFrame({"a": [1]})}, {"bad": ax})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.png", "t.csv"]
    assert (tmp_path / "bad.png").read_text() == "old"
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("what", ["table", "figure", "text"])
def test_a_disk_that_is_full_is_said_by_the_library(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resid_surgery._files.os.replace", _full)
    given: dict[str, Any] = {"tables": {"t": pd.DataFrame({"a": [1]})} if what == "table" else {}}
    given |= {"figures": {"f": pyplot.subplots()[1]}} if what == "figure" else {}
    given |= {"texts": {"x": "y"}} if what == "text" else {}
    with pytest.raises(LoadError, match=r"cannot be written: No space left on device\."):
        rs.save_results(tmp_path, **given)
    assert not list(tmp_path.iterdir())
    assert pyplot.get_fignums() == []


def _full(*_: Any) -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tables": {"t": 5}}, r"`tables\['t'\]` must be among DataFrames; got 5"),
        ({"tables": []}, "`tables` must be a mapping from names to DataFrames"),
        ({"tables": {"a/b": pd.DataFrame()}}, "`tables` must be named as files can be; got 'a/b'"),
        ({"tables": {}, "figures": {"f": "x"}}, r"`figures\['f'\]` must be among Axes or Figures; got 'x'"),
        ({"tables": {}, "texts": {"t": b"x"}}, r"`texts\['t'\]` must be among texts; got b'x'"),
        ({"tables": {"t": pd.DataFrame()}, "texts": {"t.csv": "x"}}, "`texts` must be named unlike .*; got 't.csv'"),
    ],
    ids=str,
)
def test_results_that_are_none_are_refused_before_the_folder_is_made(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=said):
        rs.save_results(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "path", "options", "said"),
    [
        ({}, "x.html", {}, "`value` must be a dict of at least one DataFrame"),
        ({"a": 5}, "x.html", {}, "`value` must be a dict of DataFrames"),
        (5, "x.html", {}, "`value` must be one of Validation, Recording"),
        (pd.DataFrame(), "x.png", {}, "`path` must be a file name that ends in .html"),
        (pd.DataFrame(), 5, {}, "`path` must be a file name that ends in .html"),
        (pd.DataFrame(), "x.html", {"interactive": "yes"}, "`interactive` must be True or False; got 'yes'"),
    ],
    ids=str,
)
def test_a_page_of_nothing_is_refused_and_not_begun(
    value: Any, path: Any, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=said):
        rs.write_report(value, path, **options)
    assert [one.name for one in tmp_path.iterdir() if one.name != "cache"] == []


@pytest.mark.parametrize("kind", BAD)
def test_a_page_of_a_table_of_anything_is_written(kind: str, tmp_path: Path) -> None:
    table = with_column(pd.DataFrame({"a": range(3), "b": list("xyz")}), "b", kind)
    assert rs.write_report(table, tmp_path / "page.html", interactive=False).stat().st_size > 500

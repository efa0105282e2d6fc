"""The commands that trace sources, grow graphs and ask why; figures and files that they write."""

import json
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import pytest
import test_cli
from matplotlib import pyplot
from test_cli import Cli, one_line, same
from test_prompts import TEXT

import resid_surgery as rs

cli, model, rec, asked = test_cli.cli, test_cli.model, test_cli.rec, test_cli.asked


@pytest.fixture(scope="module")
def whole(rec: Any) -> Any:
    """The same recording with every position."""
    return rs.record(rec.model, rec.prompt.source, positions="all")


@pytest.fixture(scope="module")
def graph(whole: Any) -> rs.SourceGraph:
    """A small graph of it."""
    return rs.source_graph(whole, nodes=40, readout="difference")


@pytest.mark.parametrize(
    ("options", "arguments"),
    [(["-r", "L2.H1.query", "--grain", "head"], {"reader": "L2.H1.query", "grain": "head"}),
     (["-r", "L2.H1", "--side", "all", "--norm", "live"], {"reader": "L2.H1", "side": "all", "norm": "live"}),
     (["-r", "L2.N3", "--hops", 2, "--budget", 3, "--by", "inner_product"],
      {"reader": "L2.N3", "hops": 2, "budget": 3, "by": "inner_product"}),
     (["-r", "unembed", "--readout", "difference"], {"reader": "unembed", "readout": "difference"})],
    ids=str,
)  # fmt: skip
def test_sources_takes_any_reader(cli: Cli, asked: list[Any], whole: Any, options: list[Any], arguments: Any) -> None:
    done = cli("sources", *asked, "--top", 4, *options, "--json")
    assert (done.code, done.err) == (0, "")
    reader = arguments.pop("reader")
    same(done.json()["rows"], rs.sources(whole, reader, top=4, **arguments))
    arguments["reader"] = reader


def test_sources_removes_lower_vectors_both_ways_and_writes_what_it_shows(
    cli: Cli, asked: list[Any], whole: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    done = cli("sources", *asked, "-r", "L2.H1", "--removed", "--out", folder, "--json")
    wanted = rs.attention_sources(whole, "L2.H1", norm="frozen")
    same(done.json()["rows"], wanted)
    assert sorted(file.name for file in folder.iterdir()) == ["removed.png", "sources.csv"]
    same(pd.read_csv(folder / "sources.csv"), wanted)


def test_graph_prints_verifies_and_writes(
    cli: Cli, asked: list[Any], graph: rs.SourceGraph, whole: Any, tmp_path: Path
) -> None:
    folder, options = tmp_path / "out", ["--nodes", 40, "--readout", "difference", "--verify", 10, "--seed", 3]
    done = cli("graph", *asked, *options, "--faithfulness", "--out", folder, "--json")
    assert (done.code, done.err) == (0, "")
    body = done.json()
    for name, table in graph.tables().items():
        same(body[name], table)
    same(body["verified"], rs.verify(graph, edges=10, seed=3).table)
    same(body["faithfulness"], rs.faithfulness(graph, seed=3))
    files = {"nodes.csv", "edges.csv", "readings.csv", "verified.csv", "faithfulness.csv", "graph.png", "graph.json"}
    assert {file.name for file in folder.iterdir()} == files
    assert (folder / "graph.json").read_text(encoding="utf-8") == graph.to_json()
    shown = cli("graph", *asked, *options, "--rows", 5).out
    assert repr(graph) in shown
    assert "10 edges cut: correlation" in shown
    assert "more rows" in shown


def test_blame_says_why_writes_it_and_fails_if_nothing_restores(
    cli: Cli, model: Path, rec: Any, tmp_path: Path
) -> None:
    tokenizer = rec.model.tokenizer
    order = rec.logits.argsort(descending=True).tolist()
    texts = [tokenizer.decode([i]) for i in order]
    one = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    wrong, right, *_ = (text for text in texts if text.strip() and len(one[text]) == 1)
    folder = tmp_path / "out"
    asked = ["blame", TEXT, "--wrong", wrong, "--right", right, "--model", model]
    done = cli(*asked, "--until", "above", "--out", folder, "--json")
    body = done.json()
    found = rs.blame(rec, wrong, right, until="above")
    assert (done.code, body["restored"]) == (0 if found.restored else 1, found.restored)
    assert body["set"] == [str(site) for site in found.sites]
    assert body["summary"] == found.summary()
    for name, table in found.tables().items():
        same(body[name], table)
        assert (folder / f"{name}.csv").exists()
    assert rs.load_interventions(folder / "operations.json") == list(found.operations)
    assert "\n".join(found.summary()) in (folder / "summary.txt").read_text(encoding="utf-8")
    hard = cli(*asked, "--limit", 1, "--until", "above")
    assert hard.code == (0 if len(found.sites) == 1 else 1)


@pytest.mark.parametrize(
    ("args", "wanted"),
    [(["sources", TEXT, "-t", " Paris", "-r", "L0.resid_pre"], "`reader` must be a neuron such as L20.N1297"),
     (["sources", TEXT, "-t", " Paris", "-r", "L0.N1", "--side", "query"], "`side` must be left out for `L0.N1`"),
     (["sources", TEXT, "-t", " Paris", "--readout", "difference"], "readout 'difference' needs competitors"),
     (["sources", TEXT, "-t", " Paris", "-r", "L0.N1", "--removed"], "`reader` must be a head such as L9.H4"),
     (["graph", TEXT, "-t", " Paris", "--grain", "neurons"], "`grain` must be one of"),
     (["graph", TEXT, "-t", " Paris", "--nodes", "1"], "--nodes"),
     (["blame", TEXT, "--wrong", " Paris", "--right", " Paris"], "`right` must be another token than `wrong`"),
     (["blame", TEXT, "--wrong", " Paris"], "--right")],
    ids=str,
)  # fmt: skip
def test_what_is_no_good_gives_one_line(cli: Cli, model: Path, args: list[str], wanted: str) -> None:
    assert wanted in one_line(cli(*args, "--model", model))


def test_a_file_in_the_way_is_refused_before_a_model_is_opened(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rs, "load", lambda *_, **__: pytest.fail("the model was opened first"))
    (tmp_path / "file").write_text("")
    for args in (["sources", TEXT, "-t", " Paris"], ["graph", TEXT, "-t", " Paris"],
                 ["blame", TEXT, "--wrong", " a", "--right", " b"]):  # fmt: skip
        assert "`--out` must be a folder" in one_line(cli(*args, "--out", tmp_path / "file"))


# --- figures ------------------------------------------------------------------------------------


def test_figures_show_their_tables(whole: Any, graph: rs.SourceGraph) -> None:
    shares = rs.sources(whole, "L2.N3", top=3)
    ax = rs.plot_sources(shares)
    assert {label.get_text() for label in ax.get_yticklabels()} >= {"remainder (3) @4", "L0.mlp @4"} or ax.patches
    drawn = sorted(patch.get_width() for patch in ax.patches if patch.get_width())
    wanted = sorted(shares.loc[(shares["kind"] != "constant") & (shares["share"] != 0), "share"])
    assert drawn == pytest.approx(wanted)
    removed = rs.attention_sources(whole, ["L2.H0", "L2.H1"])
    lines = rs.plot_removed(removed, reader="L2.H1").get_lines()[:2]
    for line, column in zip(lines, ("change", "change_weights_fixed"), strict=True):
        assert line.get_ydata().tolist() == removed.loc[removed["reader"] == "L2.H1", column].tolist()
    crossed = rs.cross_layer(whole, [1, 2])
    lines = rs.plot_cross_layer(crossed, layer=1).get_lines()[:2]
    for line, column in zip(lines, ("helpful", "unhelpful"), strict=True):
        assert line.get_ydata().tolist() == crossed.loc[crossed["layer"] == 1, column].tolist()
    where = rs.locations(whole.model, [whole.prompt.source], k=3)
    bars = rs.plot_locations(where).patches
    assert sum(bar.get_height() for bar in bars) == len(where[where["kind"] == "neuron"])
    heads = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0], "score": [0.1, 0.7, 0.2]})
    assert rs.plot_heads(heads, "score").get_images()[0].get_array()[1, 0] == pytest.approx(0.7)
    ax = rs.plot_graph(graph, edges=12)
    assert "left out" in ax.get_title()
    solid = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert len(solid) + len(dashed) == int(ax.get_title().split(": ")[1].split()[0])
    pyplot.close("all")


def test_figures_refuse_other_tables(whole: Any) -> None:
    nothing = pd.DataFrame({"a": [1]})
    for plot in (rs.plot_sources, rs.plot_removed, rs.plot_cross_layer, rs.plot_locations):
        with pytest.raises(rs.ArgumentError, match="`table` must be one with the columns"):
            plot(nothing)
    with pytest.raises(rs.ArgumentError, match=r"`graph` must be a graph from resid_surgery\.source_graph"):
        rs.plot_graph(nothing)
    with pytest.raises(rs.ArgumentError, match="`reader` must be one of"):
        rs.plot_sources(rs.sources(whole, "L2.N3"), reader="L1.N1")
    pyplot.close("all")


def test_a_graph_goes_to_json_and_to_networkx(graph: rs.SourceGraph) -> None:
    body = json.loads(graph.to_json())
    assert (body["format"], body["readout"], len(body["nodes"])) == ("resid_surgery.source_graph/1", graph.readout, 40)
    net = graph.to_networkx()
    assert isinstance(net, networkx.MultiDiGraph)
    assert (net.number_of_nodes(), net.number_of_edges()) == (40, len(graph.edges))
    assert networkx.is_directed_acyclic_graph(net)
    assert set(networkx.ancestors(net, "unembed")) == set(net) - {"unembed"}

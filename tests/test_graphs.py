"""Source graphs against an oracle that follows them edge by edge, and against plain hooks.

The oracle (`slow_readers`) runs the model's own modules again with one writer left out of what one reader reads. A
graph is replayed with it: each edge must be the best on offer, with the share and priority that the oracle gives it.
What nodes do to the prediction is compared with plain PyTorch hooks.
"""

import json
import re
import sys
from collections import Counter
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from unittest.mock import patch

import networkx
import pandas as pd
import pytest
import torch
from reader_cases import FAMILIES, GRAINS, IDS, READOUTS, TARGET, VERSUS, T, loaded, ran, recorded
from slow_readers import WHERE, Reading, Worth
from torch import nn

import resid_surgery as rs
from resid_surgery.attribution import readings
from resid_surgery.errors import (
    ArgumentError,
    InterventionError,
    PromptError,
    SiteError,
    StaleRecordingError,
    UnsupportedModelError,
)
from resid_surgery.evidence import faithfulness as faithful
from resid_surgery.evidence.faithfulness import faithfulness
from resid_surgery.evidence.graphs import FORMAT, source_graph
from resid_surgery.evidence.verifying import verify
from resid_surgery.models.zoo import tiny

BATCH = 16
CLOSE = 2e-6  # transformers computes norms and softmax in float32
COMBINED = {family: (GRAINS[(i + 4) % 5], READOUTS[i % 3]) for i, family in enumerate(FAMILIES)}  # all fifteen pairs
MORE = ("beam", "cohere", "diffllama", "exaone4", "falcon", "gemma4", "granitemoeshared", "laguna", "minicpm3",
        "nemotron_h", "opt", "phi3", "qwen2_moe", "qwen3_next", "stablelm")  # fmt: skip


def graph_of(family, grain=None, readout=None, nodes=40):
    """A graph that several tests look at."""
    both = COMBINED.get(family, ("subvalue", "target"))
    return _graph(family, grain or both[0], readout or both[1], nodes)


@cache
def _graph(family, grain, readout, nodes, dtype=torch.float64):
    return source_graph(recorded(family, dtype=dtype), grain=grain, readout=readout, nodes=nodes)


# An oracle that grows the same graph.


@dataclass(frozen=True)
class Split:
    """A reading and the share of every writer, as the oracle makes them."""

    reading: Reading
    shares: dict
    clean: float

    @cached_property
    def size(self):
        return sum(map(abs, self.shares.values()))


class Replay:
    """A graph grown anew by the oracle, in the order in which the library grew it."""

    def __init__(self, graph, family, readout):
        self.graph, self.run, self.t = graph, copy(ran(family)), graph.rec.prompt.position
        self.run.addends = cache(self.run.addends)
        self.weights = self.run.token_weights(self.t, readout, TARGET, VERSUS)
        self.nodes = {row["node"]: row for row in graph.nodes.to_dict("records")}
        self.splits, self.offers, self.seen, self.taken = {}, {}, ["unembed"], Counter()

    def follow(self, name):
        """Split what a node reads over everything before it, and offer that."""
        node, made = self.nodes[name], self.readings(self.nodes[name])
        for key, reading in made.items():
            addends = self.run.seen(reading, self.graph.grain)
            places = [(one.site, one.position) for one in addends]
            shares = dict(zip(places, self.run.shares(reading, addends), strict=True))
            split = self.splits[name, key] = Split(reading, shares, self.run.clean(reading))
            for place, share in shares.items():
                if share:
                    self.offers[name, key, *place] = node["priority"] / len(made) * abs(share) / split.size

    def readings(self, node):
        run, p, kind = self.run, node["position"], node["kind"]
        if kind == "readout":
            return {"readout": run.unembed(p, self.weights)}
        layer, site = int(re.match(r"L(\d+)", node["site"])[1]), node["site"]
        if kind == "neuron":
            prefix, k = site.rsplit(".N", 1)
            return run.neuron(layer, p, prefix, int(k))
        if kind == "mlp":
            return {"up": run.layer(layer, p, self.served(node))}
        head, source = re.search(r"\.H(\d+)", site), re.search(r"<(\d+)", site)
        heads = [int(head[1])] if head else list(range(len(run.weights[layer])))
        sources = (int(source[1]),) if source else tuple(range(p + 1))
        return {"value": run.value(layer, p, run.head_worth(layer, p, self.served(node), heads), sources)}

    def served(self, node):
        """What vectors that reach it are worth to the reading that a node serves."""
        run, p = self.run, node["position"]
        reading = self.splits[tuple(node["serves"].rsplit(".", 1))].reading

        def read(v):
            made = reading.at(p, torch.cat([run.normed(reading.stop, p), run.normed(reading.stop, p, without=v)]))
            return made[0] - made[1:]

        return Worth(reading.stop, read)

    def replay(self):
        """Take in the edges again, one by one; what is left is the remainder."""
        self.follow("unembed")
        batch = []
        for edge in self.graph.edges.to_dict("records"):
            batch += self.take(edge)
            if len(batch) == BATCH or not self.offers:
                batch = [self.follow(name) for name in batch][:0]
        for name in batch:
            self.follow(name)
        assert self.seen == list(self.nodes)

    def take(self, edge):
        """One edge; its writer, if it is to be followed."""
        writer, reading = self.nodes[edge["writer"]], (edge["reader"], edge["key"])
        place = writer["site"], writer["position"]
        assert (*reading, *place) in self.offers, f"an edge twice, or from nowhere: {edge}"
        worth, split = self.offers.pop((*reading, *place)), self.splits[reading]
        assert edge["share"] == pytest.approx(split.shares[place], abs=CLOSE * split.size, rel=0)
        assert edge["priority"] == pytest.approx(worth, rel=1e-4)
        assert worth >= max(self.offers.values(), default=0) * (1 - 1e-4), f"a better edge was on offer than {edge}"
        self.taken[reading] += 1
        if writer["node"] in self.seen:
            assert pd.isna(writer["serves"]), "a head or layer carries one reading only"
            return []
        self.seen.append(writer["node"])
        assert writer["priority"] == edge["priority"]
        assert writer["depth"] == self.nodes[edge["reader"]]["depth"] + 1
        followable = writer["kind"] not in ("embed", "bias")
        assert writer["followed"] is followable, writer
        if followable and writer["kind"] != "neuron":
            assert writer["serves"] == ".".join(reading)
            self.carries(writer, edge, split)
        return [writer["node"]] if followable else []

    def carries(self, writer, edge, split):
        """A head or layer hands on its edge's share: the whole of it, but for what its output bias is worth."""
        layer, to = int(re.match(r"L(\d+)", writer["site"])[1]), self.served(writer)
        biases = [self.run.reach(one.vector, layer, one.part, to.stop)
                  for one in self.run.addends("subvalue", writer["position"])
                  if one.site.endswith("bias") and (one.layer, one.part) == (layer, writer["kind"])]  # fmt: skip
        bias = float(to.take(torch.stack(biases)).sum()) if biases else 0.0
        assert writer["number"] == pytest.approx(edge["share"] - bias, abs=CLOSE * split.size, rel=0)

    def readings_close(self):
        """reading = edges + remainder + constant, each as the oracle has it."""
        rows = self.graph.readings.to_dict("records")
        assert [(row["node"], row["key"]) for row in rows] == sorted(
            self.splits, key=lambda one: (self.seen.index(one[0]), one[1] == "up")
        )
        for row in rows:
            reading, node = (row["node"], row["key"]), self.nodes[row["node"]]
            split, edges = self.splits[reading], self.edges_into(reading)
            tolerance = dict(abs=5 * CLOSE * (split.size + abs(split.clean)), rel=0)
            taken = sum(split.shares[place] for place in edges)
            constant = split.clean - sum(split.shares.values())
            assert row["n_edges"] == len(edges) == len(set(edges)) == self.taken[reading]
            assert row["n_edges"] + row["n_remainder"] == len(split.shares)
            assert row["reading"] == pytest.approx(split.clean, **tolerance)
            assert row["edges"] == pytest.approx(taken, **tolerance)
            assert row["constant"] == pytest.approx(constant, **tolerance)
            assert row["remainder"] == pytest.approx(sum(split.shares.values()) - taken, **tolerance)
            off = abs(row["edges"] + row["remainder"] + row["constant"] - row["reading"])
            assert row["closure"] == pytest.approx(off, abs=1e-12)
            assert off <= tolerance["abs"]
            if node["kind"] == "neuron":
                assert node["number"] == pytest.approx(self.run.handed_on(split.reading), abs=1e-6, rel=1e-6)
            else:
                assert node["number"] == row["reading"]

    def edges_into(self, reading):
        table = self.graph.edges
        names = table[(table["reader"] == reading[0]) & (table["key"] == reading[1])]["writer"]
        return [(self.nodes[name]["site"], self.nodes[name]["position"]) for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_what_an_oracle_grows_best_first_and_every_node_closes(family):
    graph = graph_of(family)
    assert len(graph.nodes) == 40
    assert graph.nodes["node"].is_unique
    replay = Replay(graph, family, COMBINED[family][1])
    replay.replay()
    replay.readings_close()
    for row in graph.nodes.to_dict("records"):
        assert row["token"] == f"#{IDS[row['position']]}"
        assert row["node"].split("#")[0] == (
            "unembed" if row["kind"] == "readout" else f"{row['site']}@{row['position']}"
        )
        layer = re.match(r"L(\d+)", row["site"])
        assert row["layer"] == int(layer[1]) if layer else pd.isna(row["layer"])


@pytest.mark.parametrize(("family", "chains"), [("gpt2", 2**8 - 1), ("gpt_neox", 3**4 - 1)])
def test_the_whole_graph_of_one_token_is_every_chain_of_layers(family, chains):
    """Nothing is left to take in: each chain of sublayers that can read one another is one path from the root."""
    rec = recorded(family, ids=IDS[:1], t=0, positions="target")
    graph = source_graph(rec, nodes=10**6, grain="layer")
    assert len(graph.nodes) == chains + 2  # and the root and the embedding, which is one node for all
    assert len(graph.edges) == chains + chains + 1
    assert graph.readings["remainder"].abs().max() < 1e-12
    assert graph.readings["n_remainder"].max() == 0
    assert set(graph.nodes["position"]) == {0}
    paths = graph.to_networkx().in_degree("unembed")
    assert paths == 9


@pytest.mark.parametrize("nodes", [2, 17, 50])
def test_the_budget_is_kept_exactly_and_a_larger_graph_begins_as_the_smaller(nodes):
    small, large = graph_of("llama", "subvalue", "target", nodes), graph_of("llama", "subvalue", "target", 70)
    assert len(small.nodes) == nodes
    names = ["node", "site", "position", "kind", "depth", "priority"]
    pd.testing.assert_frame_equal(small.nodes[names], large.nodes[names].head(nodes))
    n = len(small.edges)
    pd.testing.assert_frame_equal(small.edges, large.edges.head(n))
    assert source_graph(small.rec, nodes=nodes).to_json() == small.to_json()


# Families and dtypes that the oracle does not know.

EXACT = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def closes(graph, tolerance):
    """Every reading in its own unit, and every head with what its edge says."""
    sizes = {(one.name, reading.key): listed.size for one in graph.grown if one.reader is not None
             for reading, listed in zip(one.reader.readings, one.listed, strict=True)}  # fmt: skip
    edges = graph.edges.groupby(["reader", "key"])
    shares, writers = edges["share"].sum(), edges["writer"].nunique()
    for row in graph.readings.to_dict("records"):
        at = row["node"], row["key"]
        total = shares.get(at, 0.0) + row["remainder"] + row["constant"]
        assert total == pytest.approx(row["reading"], abs=tolerance * (sizes[at] + abs(row["reading"])), rel=0), row
        assert row["n_edges"] == writers.get(at, 0) == len(edges.groups.get(at, []))
    served = graph.nodes[graph.nodes["serves"].notna()].merge(graph.edges, left_on="node", right_on="writer")
    assert served["reader"].add("." + served["key"]).tolist() == served["serves"].tolist()
    for row in served[served["kind"].isin(["head", "head_source"])].to_dict("records"):
        assert row["number"] == pytest.approx(row["share"], abs=tolerance * sizes[row["reader"], row["key"]], rel=0)


def bs_values(family, logits):
    config = loaded(family).module.config.get_text_config()
    c = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return logits if c is None else c * torch.atanh(logits / c)


def token_weights(readout, logits):
    weights = -torch.softmax(logits, -1) if readout == "log_prob" else torch.zeros_like(logits)
    if readout == "difference":
        weights[list(VERSUS)] = -1 / len(VERSUS)
    weights[TARGET] += 1
    return weights


@pytest.mark.parametrize("family", [*FAMILIES, *MORE[::5]])
def test_every_family_closes_in_single_and_half_precision(family):
    i = [*FAMILIES, *MORE].index(family)
    dtype = (torch.float32, torch.bfloat16)[i % 2]
    graph = _graph(family, GRAINS[i % 5], READOUTS[i % 3], 24, dtype)
    closes(graph, EXACT[dtype])
    with torch.no_grad():
        logits = loaded(family, dtype).module(torch.tensor([IDS]), use_cache=False).logits[0, T].double()
    root = float(token_weights(READOUTS[i % 3], logits) @ bs_values(family, logits))
    assert graph.readings["reading"].iloc[0] == pytest.approx(root, abs=EXACT[dtype] * 4)


# Verifying.


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_edge_that_is_cut_changes_its_reading_by_minus_its_share(family):
    """Where a norm stands between what attention reads and its values (DeepSeek, MiniCPM-3, Gemma 4), too."""
    graph = graph_of(family, nodes=40 if family in FAMILIES else 20)
    closes(graph, EXACT[torch.float64])
    found = verify(graph, edges=20 if family in FAMILIES else None)  # what the oracle has seen needs a sample only
    assert found.correlation > 1 - 1e-9
    assert found.slope == pytest.approx(1, abs=1e-6)
    assert found.worst <= 2e-7
    assert (found.table["error"] <= 2e-7 * found.table["scale"]).all()
    cuttable = len(graph.edges) - sum(found.skipped.values())
    assert len(found.table) == (min(20, cuttable) if family in FAMILIES else cuttable)


def values_of(graph):
    """The graph with edges into value sides alone."""
    keys = [graph.grown[one.reader].reader.readings[one.reading].key for one in graph.links]
    return replace(graph, links=tuple(one for one, key in zip(graph.links, keys, strict=True) if key == "value"))


def no_attention_alone(monkeypatch):
    """No attention can be run alone from here on."""

    def refuse(*args, **kwargs):
        raise AssertionError("attention was run alone")

    monkeypatch.setattr(readings, "projected", refuse)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "olmo2", "phi", "doge", "bloom", "diffllama"])
def test_values_are_measured_in_the_forward_itself_where_no_norm_makes_them(family, monkeypatch):
    """Norms of queries and keys (Qwen3, OLMo-2, Phi) are no norms of values."""
    graph = values_of(graph_of(family, "head", "difference"))
    no_attention_alone(monkeypatch)
    found = verify(graph, edges=None)
    assert len(found.table) > 2
    assert found.worst < 1e-12
    assert found.table["measured"].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3", "gemma4"])
def test_values_that_a_norm_makes_are_measured_with_its_scale_kept(family, monkeypatch):
    graph = values_of(graph_of(family, "head", "difference"))
    found = verify(graph, edges=None)
    assert len(found.table) > 2
    assert found.worst <= 2e-7
    no_attention_alone(monkeypatch)
    with pytest.raises(AssertionError, match="attention was run alone"):
        verify(graph, edges=None)


def test_norms_before_values_are_found_in_half_precision():
    for family, expected in (
        ("deepseek_v2", (True, True, True)),
        ("qwen3", (True, True, False)),
        ("gpt2", (False,) * 3),
    ):
        rec = recorded(family, dtype=torch.bfloat16)
        rs.sources(rec, "L1.H1<2", side="value")
        assert rec.model.cache["inner_norms"][1] == dict(zip(("query", "key", "value"), expected, strict=True))


def test_biases_of_attention_beside_experts_are_cut_and_change_what_was_predicted():
    """GPT-OSS: the attention's bias is known before the mixture runs; an expert's bias is not."""
    graph = _graph("gpt_oss", "subvalue", "target", 60, torch.float64)
    found = verify(graph, edges=None)
    assert found.worst < 1e-12
    mine = found.table[found.table["writer"].str.contains("attn.bias")]
    assert len(mine) == graph.edges["writer"].str.contains("attn.bias").sum() > 2
    assert {"readout", "gate"} <= set(mine["key"])
    assert mine["predicted"].abs().max() > 0.1
    ((why, count),) = found.skipped.items()
    assert why == "the writer is a part of a mixture of experts"
    assert count == graph.edges["writer"].str.contains(r"\.E\d").sum()
    mlp = rs.Cut(rs.Bias(0, "mlp"), "unembed")
    with pytest.raises(
        SiteError, match=r"`L0\.mlp\.bias->unembed` cannot be operated on: .* Use L0\.mlp as the writer"
    ):
        rs.intervene(graph.rec, mlp)


@pytest.mark.parametrize(("which", "change"), [(0, 1.02), (15, -1.0), (-1, 0.0)])
def test_a_wrong_share_is_found(which, change):
    graph = graph_of("gpt2", "head", "target", 20)
    links = list(graph.links)
    links[which] = replace(links[which], share=links[which].share * change)
    found = verify(replace(graph, links=tuple(links)), edges=None)
    edge = graph.edges.iloc[which]
    assert found.worst_edge[["writer", "reader", "key"]].tolist() == edge[["writer", "reader", "key"]].tolist()
    assert found.worst_edge["error"] == pytest.approx(abs(edge["share"] * (1 - change)))
    assert found.worst == pytest.approx(found.worst_edge["error"] / found.worst_edge["scale"])
    assert found.worst > 1e-5
    assert found.correlation < 1 - 1e-9


def test_the_worst_edge_is_the_worst_for_its_reading():
    graph = graph_of("gpt2", "head", "target")
    sizes = [graph.grown[one.reader].listed[one.reading].size for one in graph.links]
    small, large = sizes.index(min(sizes)), sizes.index(max(sizes))
    assert 3 * sizes[small] < sizes[large]
    links = [replace(one, share=one.share + {small: 0.02, large: 0.01}.get(i, 0.0) * sizes[i])
             for i, one in enumerate(graph.links)]  # fmt: skip
    found = verify(replace(graph, links=tuple(links)), edges=None)
    assert found.worst == pytest.approx(0.02)
    assert found.worst_edge["scale"] == pytest.approx(sizes[small])
    assert found.table["error"].max() == pytest.approx(0.01 * sizes[large])


def test_correlation_and_slope_are_of_predictions_over_their_scale():
    found = verify(graph_of("gpt_neox", "layer", "target"), edges=12, seed=3)
    x, y = found.table["predicted"] / found.table["scale"], found.table["measured"] / found.table["scale"]
    assert found.correlation == pytest.approx(x.corr(y))
    assert found.slope == pytest.approx(float((x * y).sum() / (x * x).sum()))
    assert repr(found).startswith("Verified(12 edges of SourceGraph(")
    one = verify(found.graph, edges=1)
    assert one.correlation != one.correlation, "one edge has no correlation"


def test_edges_are_drawn_by_a_seed_and_none_twice():
    graph = graph_of("gpt2", "head", "target")
    drawn = [verify(graph, edges=6, seed=seed).table for seed in (0, 0, 1)]
    names = [list(zip(one["writer"], one["reader"], one["key"], strict=True)) for one in drawn]
    assert names[0] == names[1] != names[2]
    every = set(zip(graph.edges["writer"], graph.edges["reader"], graph.edges["key"], strict=True))
    assert all(len(set(one)) == 6 and set(one) <= every for one in names)
    assert len(verify(graph, edges=10**6).table) == len(graph.edges)


@pytest.mark.parametrize(
    ("family", "grain", "dtype", "said", "pattern", "of"),
    [
        ("mixtral", "subvalue", torch.float64, "the writer is a part of a mixture of experts", r"L\d\.E\d", "writer"),
        ("qwen2_moe", "neuron", torch.float64, "a part of a mixture of experts", r"L\d\.(E\d|shared)", "writer"),
        ("gpt2", "layer", torch.bfloat16, "the writer is rounding", "rounding", "writer"),
        ("bitnet", "subvalue", torch.float64, "a norm over all coefficients", r"L\d\.N", "reader"),
    ],
    ids=lambda one: None if isinstance(one, torch.dtype) else one.split("\\")[0],
)
def test_edges_that_cannot_be_cut_are_counted_with_the_reason(family, grain, dtype, said, pattern, of):
    graph = _graph(family, grain, "target", 60, dtype)
    ((why, count),) = verify(graph, edges=3).skipped.items()
    assert said in why
    assert count == graph.edges[of].str.match(pattern).sum() > 0


def test_neurons_of_shared_experts_are_followed_and_their_edges_cut():
    graph = _graph("granitemoeshared", "neuron", "target", 100)
    shared = graph.nodes[graph.nodes["site"].str.contains("shared.N")]
    assert len(shared) > 1
    assert shared["followed"].all()
    found = verify(graph, edges=None)
    into = found.table[found.table["reader"].isin(shared["node"])]
    assert set(into["key"]) == {"gate", "up"}
    assert found.worst < 1e-7
    hops = rs.sources(graph.rec, "unembed", grain="neuron", hops=2, top=40, budget=60)
    assert hops.loc[hops["hop"] == 2, "reader"].str.contains("shared.N").any()


def test_pairs_are_cut_from_falcons_unembedding():
    graph = graph_of("falcon", "head_source")
    links = [one for one in graph.links if one.reader == 0 and isinstance(graph.grown[one.writer].site, rs.HeadSource)]
    assert verify(replace(graph, links=tuple(links)), edges=None).worst < 1e-7


def test_a_graph_without_an_edge_that_can_be_cut_says_so():
    graph = graph_of("mixtral", "neuron", "target")
    links = tuple(one for one in graph.links if isinstance(graph.grown[one.writer].site, rs.ExpertNeuron))
    with pytest.raises(ArgumentError, match=r"no edge of SourceGraph\(.* can be cut: \{'the writer is a part of a mix"):
        verify(replace(graph, links=links))


def cuts(graph, edge):
    """An edge of the table as live cuts: into a head or an attention layer, the values that it takes from there."""
    nodes = graph.nodes.set_index("node")
    writer, reader = nodes.loc[edge["writer"]], nodes.loc[edge["reader"]]
    at, site, size = int(reader["position"]), reader["site"], graph.rec.model.anatomy.sizes[0]
    if reader["kind"] in ("readout", "neuron", "mlp"):
        return [rs.Cut(writer["site"], site, positions=at)]
    layer, head = site.split(".")[0], re.search(r"H\d+", site)
    heads = [head[0]] if head else [f"H{h}" for h in range(size.n_heads)]
    return [rs.Cut(writer["site"], f"{layer}.{h}<{writer['position']}", side="value", positions=at) for h in heads]


@pytest.mark.parametrize("grain", ["layer", "head", "subvalue"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_targets_change_is_that_of_the_same_cut_with_the_norm_live(family, grain):
    i = ("llama", "gemma2", "gpt_neox").index(family) + ("layer", "head", "subvalue").index(grain)
    readout = READOUTS[i % 3]
    graph = graph_of(family, grain, readout)
    found = verify(graph, edges=12, seed=i)
    weights = token_weights(readout, graph.rec.logits)
    for edge, effect in zip(
        found.table.to_dict("records"),
        rs.intervene_each(graph.rec, [cuts(graph, edge) for edge in found.table.to_dict("records")]),
        strict=True,
    ):
        change = float(weights @ (effect.after.bs - effect.before.bs))
        if readout == "log_prob":
            change = float((effect.after.logits.log_softmax(-1) - effect.before.logits.log_softmax(-1))[TARGET])
        assert edge["target_change"] == pytest.approx(change, abs=1e-6), edge
    assert found.table["target_change"].abs().max() > 1e-3


@pytest.mark.parametrize("versus", [[8, 11], 40, [40, 41, 42]])
def test_competitors_may_be_others_than_the_prompts(versus):
    ids = versus if isinstance(versus, list) else [versus]
    rec = rs.record(loaded("gpt2"), rs.Prompt(ids=list(IDS), target=TARGET, position=T), positions="all")
    graph = source_graph(rec, readout="difference", versus=versus, nodes=20)
    expected = float(rec.bs_values[TARGET] - rec.bs_values[ids].mean())
    assert graph.readings["reading"].iloc[0] == pytest.approx(expected)
    assert graph.competitors == tuple(ids)
    assert graph.readout == "bs '#3' - " + (f"'#{ids[0]}'" if len(ids) == 1 else f"mean of {[f'#{i}' for i in ids]}")
    found = verify(graph, edges=None)
    assert found.worst < 1e-12
    edge = found.table.iloc[0].to_dict()
    effect = rs.intervene(rec, cuts(graph, edge))
    moved = effect.after.bs - effect.before.bs
    assert edge["target_change"] == pytest.approx(float(moved[TARGET] - moved[ids].mean()))
    assert faithfulness(graph)["readout"].iloc[0] == pytest.approx(expected)


# Faithfulness, against plain hooks.

RUNS = ["clean", "nodes removed", "random removed", "nodes kept", "random kept", "nothing kept"]
HOOKED = ("llama", "gpt2", "gemma2", "gpt_neox", "granite", "mixtral")


@cache
def donors(family):
    """Other prompts of the same length, for means: recordings, and the oracle's runs."""
    many = [(8, 2, 60, 11, 30, 19), (40, 41, 3, 77, 9, 1)]
    return [recorded(family, ids=one) for one in many], [ran(family, one) for one in many]


class Taken:
    """A plain forward in which subvalues, {(position, site)}, are taken away: by zero, or by their mean over runs."""

    def __init__(self, family, gone, runs=()):
        self.family, self.where, self.module, self.runs = family, WHERE[family], loaded(family).module, runs
        self.blocks = list(self.module.get_submodule(self.where.blocks))
        self.gone = {}
        for position, site in gone:
            layer, part = re.match(r"L(\d+)\.(E\d+\.N|N|H\d+<|H|attn|mlp)", site).groups()
            kind = "pair" if "<" in part else "expert" if part[0] == "E" else part
            numbers = [int(n) for n in re.findall(r"\d+", site)][1:]
            self.gone.setdefault((int(layer), kind), []).append((position, *numbers))

    def mean(self, layer, what, position, zero):
        """The mean of what stood there in other runs, 0 without them."""
        return torch.stack([run.read.get((layer, what), run.wrote.get((layer, what)))[position] for run in self.runs]
                           ).mean(0) if self.runs else zero  # fmt: skip

    def bs(self, t):
        """Logits before a soft-cap at t."""
        with torch.no_grad(), ExitStack() as stack:
            for layer, kind in self.gone:
                module, pre, hook = getattr(self, f"_{kind}".lower())(layer, self.gone[layer, kind])
                handle = (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook)
                stack.callback(handle.remove)
            home = sys.modules[type(self.blocks[0].get_submodule(self.where.attn)).__module__]
            stack.enter_context(patch.object(home, "eager_attention_forward", self.attention(home)))
            logits = self.module(torch.tensor([IDS]), use_cache=False).logits[0, t]
        return bs_values(self.family, logits)

    def _n(self, layer, places):
        def hook(module, args):
            m = args[0].clone()
            for p, k in places:
                m.view(len(IDS), -1)[p, k] = self.mean(layer, "coefficient", p, torch.zeros(m.shape[-1]))[k]
            return (m,)

        return self.blocks[layer].get_submodule(self.where.down), True, hook

    def _h(self, layer, places):
        n_heads = self.module.config.num_attention_heads

        def hook(module, args):
            z = args[0].clone()
            for p, h in places:
                held = z.view(len(IDS), n_heads, -1)
                held[p, h] = self.mean(layer, "z", p, torch.zeros(z.shape[-1])).view(n_heads, -1)[h]
            return (z,)

        return self.blocks[layer].get_submodule(self.where.w_o), True, hook

    def _sublayer(self, layer, places, part):
        post = self.where.attn_post if part == "attn" else self.where.mlp_post
        dense = self.where.w_o if part == "attn" else self.where.down
        block = self.blocks[layer]
        mixture = part == "mlp" and self.where.experts
        module = block.get_submodule(self.where.mlp if mixture else post or dense)
        what = f"{part}_post" if post else "mlp_out" if mixture else f"{part}_raw"

        def hook(module, args, output):
            made = output.clone()
            for (p,) in places:
                made.view(len(IDS), -1)[p] = self.mean(layer, what, p, torch.zeros(made.shape[-1]))
            return made

        return module, False, hook

    def _attn(self, layer, places):
        return self._sublayer(layer, places, "attn")

    def _mlp(self, layer, places):
        return self._sublayer(layer, places, "mlp")

    def _expert(self, layer, places):
        """What neurons of experts add, where this run routes to them."""
        experts = self.blocks[layer].get_submodule("mlp.experts")

        def hook(module, args, output):
            hidden, index, weight = args
            made = output.clone()
            for p, e, k in places:
                gate, up = (hidden[p] @ module.gate_up_proj[e].T).chunk(2)
                part = module.act_fn(gate[k]) * up[k] * module.down_proj[e][:, k]
                made[p] -= weight[p][index[p] == e].sum() * part
            return made

        return experts, False, hook

    def _pair(self, layer, places):
        return self.blocks[layer], True, lambda module, args: None

    def attention(self, home):
        """The model's eager attention, less what some pairs add in this very run."""
        own = home.eager_attention_forward

        def less(module, query, key, value, *args, **kwargs):
            out, weights = own(module, query, key, value, *args, **kwargs)
            out = out.clone()
            for p, h, j in self.gone.get((module.layer_idx, "pair"), ()):
                out[0, p, h] -= weights[0, h, p, j] * value[0, h * value.shape[1] // weights.shape[1], j]
            return out, weights

        return less


def everything_of(family, grain, positions):
    run = ran(family)
    return [(p, one.site) for p in positions for one in run.addends(grain, p)
            if one.site != "embed" and not one.site.endswith("bias")]  # fmt: skip


def parted(row):
    """(readout, log-prob, top) of a row."""
    return row["readout"], row["log_prob"], row["top"]


@pytest.mark.parametrize("positions", ["target", "all"])
@pytest.mark.parametrize("family", HOOKED)
def test_faithfulness_is_what_plain_hooks_leave(family, positions, monkeypatch):
    i = HOOKED.index(family) + 2 * (positions == "all")
    over = ("zero", "mean")[(HOOKED.index(family) + (positions == "all")) % 2]
    grain = GRAINS[i % 5] if over == "zero" else ("neuron", "head", "layer")[i % 3]
    if family == "mixtral" and over == "mean":
        grain = "head"
    graph = graph_of(family, grain, "difference", {"layer": 6, "head": 14}.get(grain, 60))
    recs, runs = donors(family) if over == "mean" else (None, ())
    if over == "mean" and positions == "all":
        recs = [one.prompt.source for one in recs]  # prompts do as well as recordings
    asked = []
    real = faithful.intervene_each
    monkeypatch.setattr(faithful, "intervene_each", lambda rec, rows, **k: asked.extend(rows) or real(rec, rows, **k))
    table = faithfulness(graph, positions=positions, over=recs)
    assert table["run"].tolist() == RUNS
    assert set(table["taken"]) == {over}
    where = [T] if positions == "target" else list(range(T + 1))
    everything = everything_of(family, grain, where)
    nodes = [(row["position"], row["site"]) for row in graph.nodes.to_dict("records")]
    nodes = [place for place in dict.fromkeys(nodes) if place in set(everything)]
    drawn = taken_by(asked[1]) if table["operated"][2] else []
    expected = [[], nodes, drawn, minus(everything, nodes), minus(everything, drawn), everything]
    assert set(table["of"]) == {len(everything)}
    assert table["operated"].tolist() == [len(one) for one in expected]
    weights = token_weights("difference", graph.rec.logits)
    bs = [Taken(family, one, runs).bs(T) for one in expected]
    clean, nothing = (float(weights @ one) for one in (bs[0], bs[-1]))
    for row, one in zip(table.to_dict("records"), bs, strict=True):
        readout = float(weights @ one)
        assert row["readout"] == pytest.approx(readout, abs=1e-6), row["run"]
        capped = loaded(family).module.config.get_text_config()
        c = getattr(capped, "final_logit_softcapping", None)
        logits = one if c is None else c * torch.tanh(one / c)
        assert row["log_prob"] == pytest.approx(float(logits.log_softmax(-1)[TARGET]), abs=1e-6)
        assert row["top"] == f"#{int(logits.argmax())}"
        assert row["of_clean"] == pytest.approx(readout / clean, rel=1e-4, abs=1e-6)
        if clean > nothing:
            assert row["survives"] == pytest.approx((readout - nothing) / (clean - nothing), rel=1e-4, abs=1e-4)
        else:
            assert pd.isna(row["survives"])


def taken_by(interventions):
    return [(one.positions, str(site)) for one in interventions for site in one.sites]


def minus(many, some):
    gone = set(some)
    return [one for one in many if one not in gone]


def test_nothing_removed_is_the_clean_run_and_all_or_nothing_kept_are_1_and_0():
    graph = graph_of("qwen3", "layer", "target", 60)
    table = faithfulness(graph).set_index("run")
    assert table.loc["nodes removed", "operated"] == table.loc["nothing kept", "operated"] == 8
    assert table.loc["clean", "survives"] == 1
    assert table.loc["nodes kept", ["operated", "survives"]].tolist() == [0, pytest.approx(1)]
    assert table.loc["nodes removed", "survives"] == table.loc["nothing kept", "survives"] == 0
    assert table.loc["clean", "readout"] == float(graph.rec.bs_values[TARGET])
    assert table.loc["random removed", "operated"] == 0  # nothing is left to draw from


def group(place):
    return place[0], re.match(r"L\d+", place[1])[0], re.sub(r"\d+", "#", place[1])


@pytest.mark.parametrize("positions", ["target", "all"])
def test_the_control_is_as_many_others_of_the_same_position_layer_and_kind(positions, monkeypatch):
    graph = graph_of("mpt", "subvalue", "target", 60)
    asked: list = []
    monkeypatch.setattr(faithful, "intervene_each", lambda rec, rows, **k: asked.append(taken_by(rows[0])) or [None])
    monkeypatch.setattr(faithful, "_table", lambda *parts: None)  # what is asked for, without running it
    for seed in (0, 0, 1):
        faithfulness(graph, positions=positions, seed=seed)
    nodes, drawn, random_kept = asked[0], asked[1::5], asked[13]
    everything = everything_of("mpt", "subvalue", [T] if positions == "target" else range(T + 1))
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) != set(drawn[2])
    for one in drawn:
        assert not set(one) & set(nodes)
        assert set(one) <= set(everything)
        assert len(set(one)) == len(one)
        wanted, room = Counter(map(group, nodes)), Counter(map(group, minus(everything, nodes)))
        assert Counter(map(group, one)) == Counter({key: min(n, room[key]) for key, n in wanted.items()})
    assert set(random_kept) == set(minus(everything, drawn[2]))


# What leaves the library.


def plain(row):
    return {name: None if pd.isna(value) else value for name, value in row.items()}


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.float64), ("gemma2", torch.bfloat16)], ids=str)
def test_json_gives_back_every_number_as_it_was(family, dtype):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    graph = _graph(family, "subvalue", "difference", 40, dtype)
    found = json.loads(graph.to_json(), parse_constant=refuse)
    assert found["format"] == FORMAT == "resid_surgery.source_graph/1"
    assert found["model"] == graph.rec.model.name
    assert found["fingerprint"] == graph.rec.fingerprint
    assert found["tokens"] == [f"#{i}" for i in IDS]
    assert (found["position"], found["readout"], found["grain"]) == (T, graph.readout, "subvalue")
    for name, table in graph.tables().items():
        assert found[name] == [plain(row) for row in table.to_dict("records")], name
    assert {type(row["layer"]) for row in found["nodes"]} == {int, type(None)}
    assert {type(row["followed"]) for row in found["nodes"]} == {bool}


def test_networkx_has_the_same_nodes_and_edges_and_what_goes_in_closes():
    table = graph_of("gpt_neox", "subvalue", "log_prob")
    graph = table.to_networkx()
    assert isinstance(graph, networkx.MultiDiGraph)
    assert graph.graph["readout"] == table.readout
    assert networkx.is_directed_acyclic_graph(graph)
    assert set(graph) == set(table.nodes["node"])
    for row in table.nodes.to_dict("records"):
        assert graph.nodes[row["node"]] == {k: v for k, v in plain(row).items() if k != "node"} | {"node": row["node"]}
    assert graph.number_of_edges() == len(table.edges)
    for row in table.edges.to_dict("records"):
        held = graph.edges[row["writer"], row["reader"], row["key"]]
        assert {**held, "writer": row["writer"], "reader": row["reader"], "key": row["key"]} == row
    for row in table.readings.to_dict("records"):
        into = [share for _, _, key, share in graph.in_edges(row["node"], keys=True, data="share") if key == row["key"]]
        assert len(into) == row["n_edges"]
        total = sum(into) + row["remainder"] + row["constant"]
        assert total == pytest.approx(row["reading"], abs=1e-6)
    assert all(networkx.has_path(graph, name, "unembed") for name in graph)


# Bad calls.


@pytest.fixture
def no_forward():
    """Any module that runs is an error from the call on."""
    handles = []

    def refuse(module, args):
        raise AssertionError(f"{type(module).__name__} ran")

    yield lambda: handles.append(nn.modules.module.register_module_forward_pre_hook(refuse))
    for handle in handles:
        handle.remove()


def test_a_forward_would_be_noticed(no_forward):
    rec = recorded("gpt2")
    rs.record(rec.model, rec.prompt.source)
    no_forward()
    with pytest.raises(UnsupportedModelError, match=r"AssertionError: [A-Za-z0-9]+ ran"):
        rs.intervene(rec, rs.Zero("L0.N1"))


BAD = {
    "no recording": (
        lambda g: source_graph(3),
        ArgumentError,
        "`rec` must be a recording from resid_surgery.record; g",
    ),
    "no graph": (
        lambda g: verify(g.rec),
        ArgumentError,
        "`graph` must be a graph from resid_surgery.source_graph; got",
    ),
    "nor here": (lambda g: faithfulness(None), ArgumentError, "`graph` must be a graph from .*source_graph; got None"),
    "readout": (lambda g: source_graph(g.rec, readout="diff"), ArgumentError, "`readout` must be one of target, diff"),
    "grain": (
        lambda g: source_graph(g.rec, grain="heads"),
        ArgumentError,
        "`grain` .*got 'heads'. Did you mean 'head'",
    ),
    "one node": (lambda g: source_graph(g.rec, nodes=1), ArgumentError, "`nodes` must be a whole number >= 2; got 1"),
    "half a node": (
        lambda g: source_graph(g.rec, nodes=2.5),
        ArgumentError,
        "`nodes` must be a whole number >= 2; got",
    ),
    "the target against itself": (lambda g: source_graph(g.rec, versus=TARGET), ArgumentError, "distinct tokens other"),
    "no token": (lambda g: source_graph(g.rec, versus=10**6), PromptError, "versus"),
    "no edges": (lambda g: verify(g, edges=0), ArgumentError, "`edges` must be a whole number >= 1; got 0"),
    "a seed": (lambda g: verify(g, seed=-1), ArgumentError, "`seed` must be a whole number in 0.*; got -1"),
    "positions": (
        lambda g: faithfulness(g, positions=[1]),
        ArgumentError,
        "`positions` must be one of target, all; got",
    ),
    "no seed": (lambda g: faithfulness(g, seed=0.5), ArgumentError, "`seed` must be a whole number in 0.*; got 0.5"),
    "means of nothing": (lambda g: faithfulness(g, over=[]), ArgumentError, "`over` must be at least one recording or"),
    "a mean of one": (lambda g: faithfulness(g, over=g.rec), ArgumentError, "`over` must be a sequence of recordings"),
}


SHORT, OTHERS = rs.Prompt(ids=[7, 3], target=TARGET), rs.Prompt(ids=list(IDS), target=TARGET)
UNFIT = {
    "nothing": (list, ArgumentError, "`over` must be at least one recording or"),
    "one recording": (lambda: recorded("gpt2"), ArgumentError, "`over` must be a sequence of recordings"),
    "numbers": (lambda: [3], ArgumentError, "`over` must be "),
    "another model": (
        lambda: [OTHERS, recorded("llama")],
        InterventionError,
        "must be a recording of the same opened m",
    ),
    "too short": (lambda: [OTHERS, SHORT], InterventionError, r"position \d .* has no counterpart in .*2 tokens"),
}


@pytest.mark.parametrize(
    ("case", "positions"),  # every prompt has a predicting position
    [(case, at) for case in UNFIT for at in ("target", "all") if (case, at) != ("too short", "target")],
)
def test_what_no_mean_can_be_taken_over_is_refused_before_any_forward(case, positions, no_forward):
    over, error, said = UNFIT[case]
    graph, given = graph_of("gpt2", "head", "target"), over()
    no_forward()
    with pytest.raises(error, match=said):
        faithfulness(graph, positions=positions, over=given)


def test_sources_that_a_prompt_does_not_have_are_refused_before_any_forward(no_forward):
    graph, early = graph_of("gpt2", "head_source", "target"), replace(OTHERS, position=1)
    no_forward()
    for positions in ("target", "all"):
        with pytest.raises(InterventionError, match=r"the donor has no L\d\.H\d<2 at position 1"):
            faithfulness(graph, positions=positions, over=[early])


def test_prompts_given_one_by_one_serve_every_run():
    graph, prompts = graph_of("gpt2", "head", "target"), [OTHERS, rs.Prompt(ids=[9, 2, 9, 4, 8, 1], target=TARGET)]
    once = faithfulness(graph, positions="all", over=(one for one in prompts))
    pd.testing.assert_frame_equal(once, faithfulness(graph, positions="all", over=prompts))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_one_clear_error_before_any_forward(case, no_forward):
    call, error, said = BAD[case]
    graph = graph_of("gpt2", "head", "target")
    no_forward()
    with pytest.raises(error, match=said):
        call(graph)


def test_a_recording_of_one_position_and_a_difference_of_nothing_are_refused_before_any_forward(no_forward):
    one = rs.record(loaded("gpt2"), rs.Prompt(ids=list(IDS), target=TARGET))
    no_forward()
    with pytest.raises(ArgumentError, match=r'`rec` must be a recording with positions="all" .*Record again'):
        source_graph(one)
    with pytest.raises(
        ArgumentError, match="readout 'difference' needs competitors for GPT2LMHeadModel; the prompt ha"
    ):
        source_graph(one, readout="difference")


def test_a_graph_with_no_node_where_it_would_be_operated_says_what_to_do(no_forward):
    graph, grown = source_graph(recorded("gpt2"), nodes=2), graph_of("gpt2", "layer", "target").grown
    assert graph.nodes["kind"].tolist() == ["readout", "bias"]
    no_forward()
    with pytest.raises(ArgumentError, match=r"has no node at the predicting position to keep; use positions='all'\."):
        faithfulness(graph)
    elsewhere = replace(graph, grown=[grown[0], *(one for one in grown if one.position != T)])
    assert len(elsewhere.grown) > 1
    with pytest.raises(ArgumentError, match=r"has no node at the predicting position to keep; use positions='all'\."):
        faithfulness(elsewhere)
    with pytest.raises(ArgumentError, match=r"has no node to keep at any position; grow it with more nodes\."):
        faithfulness(graph, positions="all")


def test_weights_that_changed_are_refused():
    module = tiny("gpt2", dtype=torch.float64)
    rec = rs.record(rs.load(module), rs.Prompt(ids=list(IDS), target=TARGET), positions="all")
    graph = source_graph(rec, nodes=20)
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    for use in (lambda: source_graph(rec), lambda: verify(graph), lambda: faithfulness(graph)):
        with pytest.raises(StaleRecordingError, match="its weights changed since"):
            use()


@pytest.mark.parametrize(("family", "positions"), [("llama", "target"), ("bloom", "all"), ("deepseek_v3", "target")])
def test_a_prompt_of_one_token_has_a_graph_however_it_is_recorded(family, positions):
    rec = recorded(family, ids=IDS[:1], t=0, positions=positions)
    graph = source_graph(rec, nodes=30)
    closes(graph, 1e-6)
    assert verify(graph, edges=None).worst <= 1e-7
    for where in ("target", "all"):
        assert len(faithfulness(graph, positions=where)) == 6
    early = source_graph(recorded(family, t=0, positions="target"), nodes=30)  # later tokens change nothing
    assert early.nodes["node"].tolist() == graph.nodes["node"].tolist()
    assert early.edges["share"].tolist() == pytest.approx(graph.edges["share"].tolist(), abs=1e-6)


def test_the_users_model_is_left_as_it_was():
    module = tiny("qwen3", dtype=torch.float64)
    module.train()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    model = rs.load(module)
    rec = rs.record(model, rs.Prompt(ids=list(IDS), target=TARGET), positions="all")
    graph = source_graph(rec, nodes=30)
    verify(graph)
    faithfulness(graph)
    assert all(torch.equal(one, module.state_dict()[name]) for name, one in before.items())
    assert module.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(p.grad is not None for p in module.parameters())
    assert all(p.requires_grad for p in module.parameters())

"""What feeds heads, MLP layers and value neurons: attention's two ways, cross-layer scores and query subvalues.

All of it is worked out again with the model's own modules and loops (`slow_readers`), one writer after the other.
"""

from contextlib import ExitStack, suppress
from functools import cache

import pytest
import torch
from reader_cases import IDS, READOUTS, TARGET, VERSUS, T, loaded, ran, recorded
from slow_readers import _Stop
from torch import nn

import resid_surgery as rs
from resid_surgery.attribution.crossing import cross_layer
from resid_surgery.attribution.removing import attention_sources
from resid_surgery.attribution.switching import locations, query_subvalues
from resid_surgery.errors import ArgumentError, PromptError, SiteError, StaleRecordingError
from resid_surgery.models.zoo import tiny

NORMS = ("live", "frozen")


def worth_to(run, readout):
    """What vectors of the final stream are worth to a readout."""
    return run.readout(T, run.token_weights(T, readout, TARGET, VERSUS))


@pytest.fixture
def no_forward(monkeypatch):
    """Any forward of any model is an error once this is called."""

    def forward(self, *args, **kwargs):
        raise AssertionError("a forward ran")

    return lambda: monkeypatch.setattr(nn.Embedding, "forward", forward)


# What feeds attention.

HEADS = (
    "gpt2",
    "llama",
    "gemma2",
    "gpt_neox",
    "qwen3",
    "granite",
    "doge",
    "gpt_oss",
    "deepseek_v3",
    "bloom",
    "phi",
    "bitnet",
)
LIVE_INSIDE = ("deepseek_v3",)  # a norm before the values: what they become is no sum


def attended(run, layer, x):
    """(z (position, head * d_head), values (kv head, position, d_head)) of a layer's attention that reads x."""
    args, kwargs = run.asked[layer]
    args, kwargs = ((x[None], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x[None]})
    z, heard = [], []
    attn = run.module(layer, run.where.attn)
    with torch.no_grad(), ExitStack() as stack:
        w_o = run.module(layer, run.where.w_o)
        stack.callback(w_o.register_forward_pre_hook(lambda m, a: z.append(a[0].reshape(len(x), -1))).remove)
        stack.enter_context(run._overheard(heard.append))
        with suppress(_Stop):
            attn(*args, **kwargs)
    values = run._fused(layer, x[None])[0] if run.where.fused else heard[0]["value"][0]
    return z[0].double(), values.double()


@cache
def both_ways(family, layer, readout, norm):
    """{writer: (recomputed, weights_fixed) of every head}, "" for the clean run."""
    run = ran(family)
    worth = run.head_worth(layer, T, worth_to(run, readout), list(range(len(run.weights[layer]))))
    stop, alpha, gate = (layer, "attn"), run.weights[layer], run.gate(layer, T)
    removed = {"": {}}
    for p in range(len(IDS)):
        for one in run.addends("layer", p):
            if 2 * one.layer + (one.part == "mlp") < 2 * layer:
                removed.setdefault(one.site, {})[p] = run.reach(one.vector, one.layer, one.part, stop)
    found = {}
    for writer, gone in removed.items():
        zero = torch.zeros_like(run.state(stop, 0))
        rows = [run.normed(stop, p, without=gone.get(p, zero)[None], live=norm == "live")[0] for p in range(len(IDS))]
        z, values = attended(run, layer, torch.stack(rows).to(run.model.dtype))
        heads = range(len(alpha))
        made = [float(z[T].view(len(alpha), -1)[h] @ worth[h]) for h in heads]
        kept = [sum(float(alpha[h, T, j] * (values[h * len(values) // len(alpha), j] * gate[h] @ worth[h]))
                    for j in range(T + 1)) for h in heads]  # fmt: skip
        found[writer] = made, kept
    return found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", HEADS)
def test_both_ways_are_attention_run_again_on_what_is_left(family, norm):
    i = HEADS.index(family) + NORMS.index(norm)
    layer, readout = 1 + i % 3, READOUTS[i % 3]
    n_heads = len(ran(family).weights[layer])
    readers = [f"L{layer}.H{i % n_heads}", f"L{layer}.attn", f"L{layer}.H0"]
    table = attention_sources(recorded(family), readers, readout=readout, norm=norm)
    heads = dict(zip(readers, ([i % n_heads], list(range(n_heads)), [0]), strict=True))
    oracle = both_ways(family, layer, readout, norm)
    writers = [writer for writer in oracle if writer]
    assert table["reader"].tolist() == [reader for reader in readers for _ in writers]
    assert table["writer"].tolist() == writers * 3
    clean = {reader: sum(oracle[""][0][h] for h in some) for reader, some in heads.items()}
    for row in table.to_dict("records"):
        some, size = heads[row["reader"]], max(map(abs, oracle[""][0])) + 0.1
        tolerance = dict(abs=2e-5 * size, rel=0)
        made, kept = (sum(one[h] for h in some) for one in oracle[row["writer"]])
        assert row["clean"] == pytest.approx(clean[row["reader"]], **tolerance)
        assert row["recomputed"] == pytest.approx(made, **tolerance)
        assert row["weights_fixed"] == pytest.approx(kept, **tolerance)
        assert row["change"] == pytest.approx(made - clean[row["reader"]], **tolerance)
        assert row["change_weights_fixed"] == pytest.approx(kept - clean[row["reader"]], **tolerance)
        assert row["by_weights"] == pytest.approx(made - kept, **tolerance)
    assert set(table["norm"]) == {norm}
    assert set(table["position"]) == {T}
    assert set(table["unit"]) == {"bs-value"}
    assert table["readout"].nunique() == 1
    assert table["by_weights"].abs().max() > 1e-4, "weights move too"


@pytest.mark.parametrize("family", [one for one in HEADS if one not in LIVE_INSIDE])
def test_at_a_frozen_norm_what_values_lose_is_the_readings_share(family):
    """Linear: each writer's change is minus its share over all positions, and together they are the reading."""
    rec, reader = recorded(family), "L2.H1"
    table = attention_sources(rec, reader, norm="frozen").set_index("writer")
    shares = rs.sources(rec, reader, grain="layer", top=10**6)
    written = shares[shares["kind"] != "constant"].groupby("writer")["share"].sum()
    assert set(written.index) == set(table.index)
    for writer, share in written.items():
        assert table.loc[writer, "change_weights_fixed"] == pytest.approx(-share, abs=1e-6)
    constant = shares.loc[shares["kind"] == "constant", "share"].sum()
    total = shares["reading"].iloc[0] - constant
    assert table["change_weights_fixed"].sum() == pytest.approx(-total, abs=1e-6)
    assert table["clean"].iloc[0] == pytest.approx(shares["reading"].iloc[0], abs=1e-6)


def test_readers_of_several_layers_slices_and_texts():
    rec = recorded("llama")
    table = attention_sources(rec, ["L2.H*", rs.Sublayer(1, "attn"), "L0.H3"])
    assert list(dict.fromkeys(table["reader"])) == ["L2.H0", "L2.H1", "L2.H2", "L2.H3", "L1.attn", "L0.H3"]
    assert table["reader"].value_counts().to_dict() == {**{f"L2.H{h}": 5 for h in range(4)}, "L1.attn": 3, "L0.H3": 1}
    first = table[table["reader"] == "L2.H0"]
    assert first["writer"].tolist() == ["embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp"]
    assert first["writer_layer"].tolist() == [-1, 0, 0, 1, 1]
    assert first["part"].tolist() == ["embed", "attn", "mlp", "attn", "mlp"]
    alone = attention_sources(rec, "L2.H0")
    assert alone["recomputed"].tolist() == pytest.approx(first["recomputed"].tolist())


def test_a_prompt_of_one_token_needs_no_other_positions():
    rec = recorded("gpt2", ids=IDS[:1], t=0, positions="target")
    table = attention_sources(rec, "L2.attn", norm="frozen")
    assert table["by_weights"].abs().max() < 1e-9, "one source has all the weight"
    assert len(table) == 5


HEAD = "`reader` must be a head such as L9.H4 or an attention layer such as L9.attn; got "
BAD_HEADS = {
    "no recording": (lambda rec: attention_sources(None, "L1.H0"), ArgumentError, "`rec` must be a recording from"),
    "a neuron": (lambda rec: attention_sources(rec, "L1.N0"), SiteError, HEAD + "L1.N0"),
    "a pair": (lambda rec: attention_sources(rec, "L1.H0<2"), SiteError, HEAD + "L1.H0<2"),
    "an mlp": (lambda rec: attention_sources(rec, ["L1.attn", "L1.mlp"]), SiteError, HEAD + "L1.mlp"),
    "elsewhere": (lambda rec: attention_sources(rec, "L1.H0@2"), SiteError, HEAD + "L1.H0@2"),
    "nothing": (lambda rec: attention_sources(rec, []), SiteError, "at least one site"),
    "no head": (lambda rec: attention_sources(rec, "L1.H9"), SiteError, r"`head` must be in 0\.\."),
    "a norm": (
        lambda rec: attention_sources(rec, "L1.H0", norm="own"),
        ArgumentError,
        "`norm` must be one of live, fr",
    ),
    "a readout": (lambda rec: attention_sources(rec, "L1.H0", readout="bs"), ArgumentError, "`readout` must be one of"),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_a_reader_that_is_no_head_is_refused_before_any_forward(case, no_forward):
    call, error, said = BAD_HEADS[case]
    rec = recorded("gpt2")
    no_forward()
    with pytest.raises(error, match=said):
        call(rec)


def test_one_position_no_competitors_other_weights_and_layers_without_weights_are_refused(no_forward):
    module = tiny("gpt2", dtype=torch.float64)
    rec = rs.record(rs.load(module), rs.Prompt(ids=list(IDS), target=TARGET))
    hybrid = rs.record(loaded("qwen3_next"), rs.Prompt(ids=list(IDS), target=TARGET), positions="all")
    layer = next(i for i in range(4) if hybrid.model.block(i).attn_kind == "opaque")
    no_forward()
    with pytest.raises(ArgumentError, match=r'positions="all" .*Record again'):
        attention_sources(rec, "L1.H0")
    for verb in (lambda **k: attention_sources(rec, "L1.H0", **k), lambda **k: cross_layer(rec, **k),
                 lambda **k: query_subvalues(rec, "L1.N0", **k)):  # fmt: skip
        with pytest.raises(ArgumentError, match="readout 'difference' needs competitors for GPT2LMHeadModel"):
            verb(readout="difference")
    with pytest.raises(SiteError, match=f"L{layer}"):
        attention_sources(hybrid, f"L{layer}.attn")
    with torch.no_grad():
        module.transformer.h[0].ln_1.weight[0] += 1
    for verb in (lambda: cross_layer(rec), lambda: query_subvalues(rec, "L1.N0")):
        with pytest.raises(StaleRecordingError, match="its weights changed since"):
            verb()


# What lower vectors lend an MLP layer.

MLPS = ("gpt2", "llama", "gemma2", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v2", "bitnet", "doge", "granite")


def written_before(run, layer, grain):
    """Writers before a layer's MLP at t, as they reach it."""
    stop = (layer, "mlp")
    return [(one.site, run.reach(one.vector, one.layer, one.part, stop)) for one in run.addends(grain, T)
            if 2 * one.layer + (one.part == "mlp") < run.place(stop)]  # fmt: skip


def coefficients_without(run, group, layer, vectors, norm):
    """(writer, neuron) m_k(-u), one writer after the other."""
    stop = (layer, "mlp")
    rows = [run.normed(stop, T, without=u[None], live=norm == "live")[0] for u in vectors]
    return torch.stack([run.coefficients(group, row[None])[0] for row in rows])


def gains(run, group, layer, readout):
    """What one unit of each coefficient is worth."""
    return run.worth_of(worth_to(run, readout), layer, "mlp", group.rows, T) * group.factor


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", MLPS)
def test_cross_layer_scores_are_sums_over_the_helpful_and_the_unhelpful(family, norm):
    i = MLPS.index(family) + NORMS.index(norm)
    layers, grain, readout = [3, 1 + i % 2], ("layer", "head")[i % 2], READOUTS[(i + 2) % 3]
    rec, run = recorded(family, positions="target"), ran(family)
    table = cross_layer(rec, layers, grain=grain, norm=norm, readout=readout)
    scores = rs.scores(rec, kind="neuron", layers=layers).set_index("site")["log_prob_increase"]
    assert table["layer"].drop_duplicates().tolist() == sorted(layers)
    for layer in layers:
        rows = table[table["layer"] == layer].to_dict("records")
        writers = written_before(run, layer, grain)
        assert [row["writer"] for row in rows] == [site for site, _ in writers]
        expected = {(row, group): [0.0, 0.0] for row in range(len(rows)) for group in ("helpful", "unhelpful")}
        own, n = {"helpful": 0.0, "unhelpful": 0.0}, {"helpful": 0, "unhelpful": 0}
        for group in run.groups(layer, T):
            m = run.coefficients(group, run.normed((layer, "mlp"), T))[0]
            left = coefficients_without(run, group, layer, [u for _, u in writers], norm)
            g = gains(run, group, layer, readout)
            for k in range(len(m)):
                sign = scores[f"{group.prefix}.N{k}"]
                if sign == 0:
                    continue
                side = "helpful" if sign > 0 else "unhelpful"
                own[side] += float(m[k] * g[k])
                n[side] += 1
                for row, (_, u) in enumerate(writers):
                    expected[row, side][0] += float((m[k] - left[row, k]) * g[k])
                    expected[row, side][1] += sum(float(u @ key[:, k]) for key, _ in group.keys)
        size = sum(map(abs, own.values())) + max(abs(one[0]) for one in expected.values())
        for number, row in enumerate(rows):
            for side in ("helpful", "unhelpful"):
                score, inner = expected[number, side]
                assert row[side] == pytest.approx(score, abs=1e-5 * size), (row["writer"], side)
                assert row[f"inner_product_{side}"] == pytest.approx(inner, abs=1e-5, rel=1e-5)
                assert row[f"layer_{side}"] == pytest.approx(own[side], abs=1e-5 * size)
                assert row[f"n_{side}"] == n[side]
            assert row["total"] == pytest.approx(row["helpful"] + row["unhelpful"], abs=1e-12)
    assert (table["norm"] == norm).all()
    assert (table["position"] == T).all()


def test_all_layers_are_asked_where_none_is_named_and_parts_say_what_a_writer_is():
    rec = recorded("gpt2", positions="target")
    table = cross_layer(rec, grain="head")
    assert table["layer"].drop_duplicates().tolist() == [0, 1, 2, 3]
    parts = table.drop_duplicates("writer").set_index("writer")
    assert parts.loc[["embed", "L0.H1", "L0.attn.bias", "L0.mlp"], "part"].tolist() == ["embed", "attn", "attn", "mlp"]
    assert parts.loc[["embed", "L0.H1", "L0.attn.bias", "L0.mlp"], "writer_layer"].tolist() == [-1, 0, 0, 0]
    assert set(table["readout"]) == {"log p '#3' (first order)"}
    assert (table["n_helpful"] + table["n_unhelpful"] == 40).all()
    half = cross_layer(recorded("gpt2", dtype=torch.bfloat16), 1)
    assert half[["writer", "part"]].iloc[-1].tolist() == ["rounding", "rounding"]


def test_layers_without_known_neurons_are_left_out_or_refused(no_forward):
    rec = rs.record(loaded("nemotron_h"), rs.Prompt(ids=list(IDS), target=TARGET))
    able = [i for i in range(4) if rec.layers[i].groups and all(one.pre_activations for one in rec.layers[i].groups)]
    unable = min(set(range(4)) - set(able))
    assert cross_layer(rec)["layer"].drop_duplicates().tolist() == able
    gpt2, model = recorded("gpt2"), loaded("gpt2")
    no_forward()
    with pytest.raises(
        SiteError, match=f"layer {unable} of NemotronHForCausalLM has no MLP of neurons whose keys are kn"
    ):
        cross_layer(rec, [unable])
    for options, said in (
        ({"layers": [9]}, r"`layers` must be a whole number in -4\.\.3 for GPT2LMHeadModel; got 9"),
        ({"layers": []}, "`layers` must be at least one layer"),
        ({"grain": "neuron"}, "`grain` must be one of layer, head; got 'neuron'"),
        ({"norm": "own"}, "`norm` must be one of frozen, live; got 'own'"),
        ({"readout": "logit"}, "`readout` must be one of target, difference, log_prob; got 'logit'"),
    ):
        with pytest.raises(ArgumentError, match=said):
            cross_layer(gpt2, **options)
    with pytest.raises(ArgumentError, match="`rec` must be a recording"):
        cross_layer(model)


# What switched value neurons on.

KINDS = {"subvalue": ("N", "<"), "neuron": ("N",), "head_source": ("<",), "head": ("H",)}


def place_of(site):
    """(layer, prefix of its group, index) of a neuron."""
    prefix, k = site.rsplit(".N", 1)
    return int(prefix[1:].split(".")[0]), prefix, int(k)


def scored(run, readers, grain, score):
    """{site: score} of everything below any reader; readers are (site, what a unit is worth)."""
    found: dict[str, float] = {}
    for site, worth in readers:
        layer, prefix, k = place_of(site)
        group = next(one for one in run.groups(layer, T) if one.prefix == prefix)
        m = run.coefficients(group, run.normed((layer, "mlp"), T))[0, k]
        writers = [(one, u) for one, u in written_before(run, layer, grain)
                   if any(kind in one for kind in KINDS[grain])]  # fmt: skip
        if not writers:
            continue
        left = coefficients_without(run, group, layer, [u for _, u in writers], "frozen")[:, k]
        for (writer, u), without in zip(writers, left.tolist(), strict=True):
            lent = float(m - without) * worth
            if score == "inner_product":
                lent = sum(float(u @ key[:, k]) for key, _ in group.keys)
            found[writer] = found.get(writer, 0.0) + lent
    return found


def unit(run, site, readout):
    layer, prefix, k = place_of(site)
    group = next(one for one in run.groups(layer, T) if one.prefix == prefix)
    return float(gains(run, group, layer, readout)[k])


def picked(run, count):
    """Value neurons of several layers, of every kind that a family has."""
    found = []
    for layer in (3, 2, 3, 1):
        for group in run.groups(layer, T):
            found.append(f"{group.prefix}.N{(7 * len(found)) % len(group.rows)}")
    return list(dict.fromkeys(found))[:count]


def agrees(rows, expected, k):
    """The k largest by size, as the loop has them."""
    order = sorted(expected, key=lambda site: -abs(expected[site]))[:k]
    size = abs(expected[order[0]])
    assert len(rows) == len(order)
    assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
    for row, site in zip(rows.to_dict("records"), order, strict=True):
        assert row["score"] == pytest.approx(expected[row["site"]], abs=1e-5 * size)
        assert abs(row["score"]) == pytest.approx(abs(expected[site]), abs=1e-5 * size)
        assert row["layer"] == int(row["site"][1])
    assert rows["site"].is_unique


@pytest.mark.parametrize("score", ["coefficient", "inner_product"])
@pytest.mark.parametrize("family", [*MLPS, "bloom"])
def test_query_subvalues_are_what_coefficients_lose_without_them(family, score):
    i = [*MLPS, "bloom"].index(family) + (score == "coefficient")
    grain, readout = list(KINDS)[i % 4], READOUTS[i % 3]
    rec, run = recorded(family, positions="target"), ran(family)
    values = picked(run, 4)
    table = query_subvalues(rec, values, k=10**5, score=score, readout=readout, grain=grain)
    expected = scored(run, [(site, unit(run, site, readout)) for site in values], grain, score)
    assert set(table["site"]) == set(expected)
    agrees(table, expected, 10**5)
    assert set(table["kind"]) == {
        "neuron" if ".N" in one else "head_source" if "<" in one else "head" for one in expected
    }
    assert set(table["values"]) == {len(values)}
    assert set(table["unit"]) == {"bs-value" if score == "coefficient" else "inner product"}
    assert (table["hop"] == 1).all()
    few = query_subvalues(rec, values, k=7, score=score, readout=readout, grain=grain)
    assert few["score"].tolist() == table["score"].head(7).tolist()
    assert few["site"].tolist() == table["site"].head(7).tolist()


@pytest.mark.parametrize("score", ["coefficient", "inner_product"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v2", "gpt_neox", "doge"])
def test_iterative_queries_are_taken_as_readers_in_turn(family, score):
    rec, run = recorded(family, positions="target"), ran(family)
    values = [site for site in picked(run, 6) if site[1] == "3"]
    table = query_subvalues(rec, values, k=5, way="iterative", score=score, hops=3, grain="subvalue")
    direct = query_subvalues(rec, values, k=5, score=score)
    first = table[table["hop"] == 1].drop(columns="way").reset_index(drop=True)
    assert first.equals(direct.drop(columns="way"))
    readers, seen = [(site, unit(run, site, "target")) for site in values], set(values)
    for hop in range(1, 4):
        rows = table[table["hop"] == hop]
        expected = scored(run, readers, "subvalue", score)
        if not expected:
            assert rows.empty
            break
        agrees(rows, expected, 5)
        assert set(rows["values"]) == {len(readers)}
        fresh = [site for site in rows["site"] if ".N" in site and site not in seen]
        seen |= set(fresh)
        readers = [(site, expected[site] / coefficient(run, site)) for site in fresh]


def coefficient(run, site):
    layer, prefix, k = place_of(site)
    group = next(one for one in run.groups(layer, T) if one.prefix == prefix)
    return float(run.coefficients(group, run.normed((layer, "mlp"), T))[0, k])


def test_values_may_be_what_locate_found_texts_slices_or_sites_and_each_counts_once():
    rec = recorded("llama", positions="target")
    found = rs.locate(rec, k=4)
    table = query_subvalues(rec, found, k=6)
    same = [found.sites, [str(one) for one in found.sites], [*found.sites, str(found.sites[0])]]
    for values in same:
        assert query_subvalues(rec, values, k=6).equals(table)
    sliced = query_subvalues(rec, ["L2.N3:6", "L2.N4"], k=6)
    assert sliced.equals(query_subvalues(rec, ["L2.N3", "L2.N4", "L2.N5"], k=6))
    assert set(sliced["values"]) == {3}


def test_nothing_is_below_the_first_layers_neurons_but_its_own_attention():
    rec = recorded("gpt_neox", positions="target")  # parallel: not even that
    nothing = query_subvalues(rec, "L0.N3")
    assert nothing.empty
    assert nothing.dtypes[["layer", "score", "rank"]].astype(str).tolist() == ["int64", "float64", "int64"]
    assert query_subvalues(recorded("llama"), "L0.N3", grain="neuron", way="iterative").empty
    assert set(query_subvalues(recorded("llama"), "L0.N3", k=99)["layer"]) == {0}


VALUES = "`values` must be neurons at the predicting position 4, whose coefficients can be switched on; got "
BAD_VALUES = {
    "no recording": (lambda rec: query_subvalues(1, "L1.N0"), ArgumentError, "`rec` must be a recording from"),
    "a head": (lambda rec: query_subvalues(rec, ["L1.N0", "L1.H3"]), SiteError, VALUES + "L1.H3"),
    "a layer": (lambda rec: query_subvalues(rec, "L1.mlp"), SiteError, VALUES + "L1.mlp"),
    "elsewhere": (lambda rec: query_subvalues(rec, "L1.N0@2"), SiteError, VALUES + "L1.N0@2"),
    "nothing": (lambda rec: query_subvalues(rec, []), SiteError, "at least one reader; got none"),
    "a number": (lambda rec: query_subvalues(rec, 7), SiteError, "must be a site, its text, or a sequence"),
    "no neuron": (lambda rec: query_subvalues(rec, "L1.N999"), SiteError, r"`index` must be in 0\.\."),
    "k": (lambda rec: query_subvalues(rec, "L1.N0", k=0), ArgumentError, "`k` must be a whole number >= 1; got 0"),
    "hops": (lambda rec: query_subvalues(rec, "L1.N0", hops=0), ArgumentError, "`hops` must be a whole number >= 1; g"),
    "way": (
        lambda rec: query_subvalues(rec, "L1.N0", way="Direct"),
        ArgumentError,
        "`way` must be one of direct, iter",
    ),
    "score": (
        lambda rec: query_subvalues(rec, "L1.N0", score="m"),
        ArgumentError,
        "`score` must be one of coefficient",
    ),
    "grain": (lambda rec: query_subvalues(rec, "L1.N0", grain="layer"), ArgumentError, "`grain` must be one of head, "),
    "readout": (lambda rec: query_subvalues(rec, "L1.N0", readout="p"), ArgumentError, "`readout` must be one of targ"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_that_cannot_be_are_refused_before_any_forward(case, no_forward):
    call, error, said = BAD_VALUES[case]
    rec = recorded("gpt2")
    no_forward()
    with pytest.raises(error, match=said):
        call(rec)


def test_an_expert_that_is_not_active_has_no_value_neurons():
    rec = recorded("mixtral")
    idle = min({0, 1, 2, 3} - {one.expert for one in rec.layers[2].groups})
    with pytest.raises(SiteError, match=f"`L2.E{idle}.N1` is not active"):
        query_subvalues(rec, f"L2.E{idle}.N1")


# Where both sit.

PROMPTS = [
    rs.Prompt(ids=list(IDS), target=TARGET),
    rs.Prompt(ids=[8, 2, 60], target=11),
    rs.Prompt(ids=[9, 9], target=5),
]


@pytest.mark.parametrize("way", ["direct", "iterative"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_locations_are_what_locate_and_query_subvalues_find(family, way):
    model, k = loaded(family), 3
    table = locations(model, PROMPTS, k=k, way=way, progress=False)
    assert table["prompt"].drop_duplicates().tolist() == [0, 1, 2]
    assert set(table["way"]) == {way}
    for number, prompt in enumerate(PROMPTS):
        rec, rows = rs.record(model, prompt), table[table["prompt"] == number]
        for kind in ("neuron", "head_source"):
            mine = rows[rows["kind"] == kind]
            values, queries = (mine[mine["role"] == role] for role in ("value", "query"))
            found = rs.locate(rec, k=k, kind=kind)
            assert values["site"].tolist() == [str(site) for site in found.sites]
            assert values["score"].tolist() == found.table["log_prob_increase"].tolist()
            assert values["layer"].tolist() == [site.layer for site in found.sites]
            assert set(values["unit"]) == {"nats"}
            assert set(values["hop"]) == {0}
            neurons = rs.locate(rec, k=k, kind="neuron").sites
            asked = query_subvalues(rec, neurons, k=k, way=way, readout="log_prob", grain=kind)
            for name in ("site", "score", "layer", "hop", "unit"):
                assert queries[name].tolist() == asked[name].tolist()
            below = kind == "head_source" or max(site.layer for site in neurons)  # layer 0 reads no neurons
            assert (queries["hop"] == 1).sum() == (k if below else 0)
            assert set(queries["hop"]) <= ({1} if way == "direct" else {1, 2, 3})
    assert table["role"].value_counts()["value"] == 2 * k * len(PROMPTS)


BAD_PROMPTS = {
    "no model": (
        lambda m: locations(m.module, PROMPTS),
        ArgumentError,
        "`model` must be a model from resid_surgery.load",
    ),
    "one prompt": (lambda m: locations(m, PROMPTS[0]), ArgumentError, "`prompts` must be a sequence of prompts"),
    "no prompt": (lambda m: locations(m, []), ArgumentError, "`prompts` must be at least one prompt"),
    "k": (lambda m: locations(m, PROMPTS, k=-1), ArgumentError, "`k` must be a whole number >= 1; got -1"),
    "too many": (lambda m: locations(m, PROMPTS, k=33), ArgumentError, r"prompt 2: `k` must be at most 32, the candid"),
    "way": (lambda m: locations(m, PROMPTS, way="both"), ArgumentError, "`way` must be one of direct, iterative"),
    "no token": (lambda m: locations(m, [*PROMPTS, rs.Prompt(ids=[1], target=10**6)]), PromptError, "prompt 3: "),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts_that_cannot_be_are_refused_before_any_forward(case, no_forward):
    call, error, said = BAD_PROMPTS[case]
    model = loaded("gpt2")
    no_forward()
    with pytest.raises(error, match=said):
        call(model)


def of_last_attention(family):
    """A recording of a loud tiny model, and its last layer with attention."""
    model = rs.load(tiny(family))
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 9], target=1, versus=[2]), positions="all")
    return rec, [i for i, one in enumerate(rec.layers) if one.attention is not None][-1]


@pytest.mark.parametrize("family", ["bamba", "cohere", "glm_moe_dsa"])
def test_every_side_splits_where_blocks_give_a_tuple_or_norms_have_a_gain_a_head(family):
    rec, layer = of_last_attention(family)
    table = rs.sources(rec, f"L{layer}.H1<1", side="all", norm="live", top=3)
    assert set(table["key"]) == {"value", "query", "key"}
    assert table["closure"].max() <= 1e-4 * table["share"].abs().max()
    assert table.loc[table["kind"] != "constant", "coefficient_without"].notna().all()


def test_attention_that_takes_its_input_three_times_is_refused():
    rec, layer = of_last_attention("ctrl")
    with pytest.raises(rs.UnsupportedModelError, match="reads its input in more than one argument"):
        attention_sources(rec, f"L{layer}.attn")
    with pytest.raises(rs.UnsupportedModelError, match="taken in apart"):
        rs.sources(rec, f"L{layer}.H0<1", side="query")


def test_messages_name_a_few_of_many_sites():
    many = rs.Zero([f"L0.N{i}" for i in range(11)])
    assert many.brief.endswith("'L0.N7', and 3 more])")
    assert repr(many).endswith("'L0.N10'])")
    assert rs.Zero("L0.N1").brief == "Zero(['L0.N1'])"

"""Sweeps: a row is what the same interventions do alone, in whatever frame and chunk, and never silently not so."""

import re
import sys
from functools import cache

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from strategies import dtypes, prompts, sites
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.models import tracing
from resid_surgery.surgery import writing
from resid_surgery.surgery.effects import PARTS
from resid_surgery.surgery.frames import Frames
from resid_surgery.surgery.measures import Meter
from resid_surgery.surgery.sweeping import TOKENS

PACKED = (*FAMILIES, "qwen3_moe", "mixtral", "olmo2", "cohere", "deepseek_v3", "gpt_oss", "granite")
DENSE = (*FAMILIES, "olmo2", "cohere", "granite", "gemma4", "beam", "doge", "bitnet")
FULL = ("bloom", "jamba", "qwen3_next")
EPS = {torch.float64: 1e-6, torch.float32: 1e-5}
MIDDLE = rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7, 9], position=2)
LAST = rs.Prompt(ids=[5, 4, 3, 2], target=1, versus=[7, 9])
MIX = [rs.Zero("L0.mlp", positions=[1]), rs.Scale("L1.H1", 2.0), rs.Steer("L2.resid_pre", torch.ones(24)),
       rs.Cut("L0.attn", "L2.H1"), rs.Patch("L1.mlp", rs.Prompt(ids=[8, 9, 6], target=1)),
       rs.Attend("L1.H0<1", 0.0, renormalise=True), [rs.Zero("embed", positions=[0]), rs.Scale("L1.attn", -1.0)],
       rs.Set("L1.attn", [torch.ones(24)]), rs.Scale("L0.mlp->unembed", 3.0)]  # fmt: skip
REFUSED = re.compile(
    "both write|no counterpart|cannot act|renormalis|the donor has no|attention is causal|cannot be (operated|cut)|"
    "operates on nothing|routed position|has no coefficient|routes it to experts|is no edge"
)


@cache
def opened(family, dtype=torch.float64):
    return shared(family, dtype) if family in FAMILIES else rs.load(rs.tiny(family, dtype=dtype))


def packable(rec, family):
    """Whether packed rows are exact: a window as short as the prompt is applied to the packed sequence."""
    window = getattr(rec.model.module.config, "sliding_window", None)
    return family not in FULL and (window is None or rec.prompt.position < window)


def vector(seed, width):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def edges(draw, rec):
    """Any edge of a model; one that is none is drawn again."""
    a = rec.model.anatomy
    writers = sites(rec, last=0).filter(lambda s: not isinstance(s, (rs.Resid, rs.ExpertNeuron, rs.SharedNeuron)))
    readers = sites(rec).filter(lambda s: not isinstance(s, (rs.Resid, rs.Constant, rs.AttnNeuron)))
    writer, reader = draw(writers | st.just(rs.Constant("embed"))), draw(readers | st.just(rs.Constant("unembed")))
    if isinstance(reader, rs.HeadSource):
        side = draw(st.sampled_from(["key", "value"]))
    else:
        side = draw(st.sampled_from(["all", "query", "key", "value"])) if isinstance(reader, rs.Head) else "all"
    edge = rs.Edge(writer, reader, side, draw(st.sampled_from(["live", "frozen"])))
    try:
        edge.resolve(a)
    except rs.SiteError:
        return rs.Edge("embed", edge.reader, side, edge.norm)
    return edge


@st.composite
def projections(draw, rec):
    """A query, key or value of any attention layer."""
    layers = [i for i, one in enumerate(rec.layers) if one.attention is not None]
    layer, side = draw(st.sampled_from(layers)), draw(st.sampled_from("QKV"))
    size = rec.model.anatomy.sizes[layer]
    heads = size.n_heads if side == "Q" else size.n_kv_heads
    return rs.Projection(layer, side, draw(st.integers(0, heads - 1)))


def width(rec, site):
    """How many numbers a site's own value has."""
    if isinstance(site, (rs.Neuron, rs.ExpertNeuron, rs.SharedNeuron, rs.AttnNeuron)):
        return 1
    if isinstance(site, rs.Projection):
        one = rec.layers[site.layer].attention
        return one.value.shape[-1] if site.side == "V" or one.query is None else one.query.shape[-1]
    if isinstance(site, (rs.Head, rs.HeadSource)):
        return rec.model.anatomy.sizes[site.layer].d_head
    return rec.model.anatomy.d_model


@st.composite
def operations(draw, rec, donors):
    """One intervention of any kind, anywhere."""
    n = len(rec.prompt.ids)
    where = st.sampled_from(["target", "target", "all"]) | st.integers(-n, n - 1)
    where |= st.lists(st.integers(0, n - 1), min_size=1, max_size=2, unique=True)
    of, seed = st.sampled_from(["site", "site", "edge", "projection"]), draw(st.integers(0, 99))
    site = draw(draw(of.map({"site": sites(rec), "edge": edges(rec), "projection": projections(rec)}.get)))
    at, kinds = draw(where), ["zero", "scale", "patch", "mean", "steer", "set"]
    if isinstance(site, rs.HeadSource):
        kinds += ["attend", "attend"]
    if isinstance(site, (rs.Neuron, rs.AttnNeuron, rs.ExpertNeuron, rs.SharedNeuron)):
        kinds += ["clamp", "clamp"]
    kind, align = draw(st.sampled_from(kinds)), draw(st.sampled_from([None, "index"]))
    if kind == "zero":
        return rs.Cut(site, positions=at) if isinstance(site, rs.Edge) else rs.Zero(site, positions=at)
    if kind == "scale":
        return rs.Scale(site, draw(st.floats(-2, 2)), positions=at)
    if kind == "patch":
        return rs.Patch(site, draw(st.sampled_from(donors)), align=align, positions=at)
    if kind == "mean":
        return rs.Mean(site, donors, align=align, positions=at)
    if kind == "steer":
        d = width(rec, site) if isinstance(site, rs.Projection) else rec.model.anatomy.d_model
        return rs.Steer(site, vector(seed, d), positions=at)
    if kind == "attend":
        return rs.Attend(site, draw(st.floats(0, 1)), renormalise=draw(st.booleans()), positions=at)
    if kind == "clamp":
        return rs.Clamp(site, draw(st.floats(-2, 2)), positions=at)
    where = [at] if isinstance(at, int) else at if isinstance(at, list) else [rec.prompt.position]
    return rs.Set(site, [[vector(seed + i, width(rec, site)) for i in range(len(where))]], positions=where)


def alone(rec, given):
    """Rows with what each does alone; what contradicts itself is left out."""
    kept = []
    for row in given:
        try:
            kept.append((row, rs.intervene(rec, row)))
        except (rs.InterventionError, rs.SiteError) as error:
            if not REFUSED.search(str(error)):
                raise
    return kept


def expect(table, effects, eps):
    """Every column of every row against whole forwards, one a row."""
    assert len(table) == len(effects)
    for (_, row), effect in zip(table.iterrows(), effects, strict=True):
        prompt, first = effect.rec.prompt, effect.table.iloc[0]
        before, after = (run.logits.double() for run in (effect.before, effect.after))
        size = 1 + float(effect.after.bs.abs().max()) + max(abs(first[name]) for name in PARTS)
        names = ["target", *(f"versus_{i + 1}" for i in range(len(prompt.readouts) - 1))]
        wanted = {}
        for name, token in zip(names, prompt.readouts, strict=True):
            wanted[f"bs_{name}"] = float(effect.after.bs[token])
            wanted[f"bs_change_{name}"] = float(effect.after.bs[token] - effect.before.bs[token])
        wanted["direct"] = first["direct"]
        log_p0, log_p = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
        w = prompt.target
        if "log_prob" in table:
            wanted |= {"log_prob": float(log_p[w]), "prob": float(log_p[w].exp())}
            wanted |= {
                "log_prob_change": float(log_p[w] - log_p0[w]),
                "kl": float((log_p0.exp() * (log_p0 - log_p)).sum()),
            }
        if "entropy" in table:
            wanted["entropy"] = -float((log_p.exp() * log_p).sum())
            near = 2 * eps * size
            assert 1 + int((after > after[w] + near).sum()) <= row["rank"] <= 1 + int((after >= after[w] - near).sum())
            assert after[int(row["top"].removeprefix("#"))] >= after.max() - near
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=eps * size), (name, effect.interventions, size)


chunks = st.sampled_from([1, 2, 5, None])
measures = st.sampled_from(["bs", "log_prob", "all", "all"])


@pytest.mark.parametrize("family", [*PACKED, *FULL])
@settings(
    max_examples=max(8, settings.default.max_examples * 2 // 5),
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)
@given(dtypes, prompts(), prompts(), prompts(), measures, chunks, st.booleans(), st.data())
def test_a_row_is_what_the_same_interventions_do_alone(family, dtype, prompt, one, two, measure, chunk, whole, data):
    model = opened(family, dtype)
    rec = rs.record(model, prompt, positions="all" if whole else "target")
    row = st.lists(operations(rec, [rs.record(model, one), two]), min_size=1, max_size=3)
    found = alone(rec, data.draw(st.lists(row, min_size=1, max_size=6)))
    assume(found)
    packs = packable(rec, family)
    frame = data.draw(st.sampled_from(["auto", "auto", "full", *["packed"] * packs]))
    table = rs.sweep(rec, [row for row, _ in found], measure=measure, chunk=chunk, frame=frame)
    expect(table, [effect for _, effect in found], EPS[dtype])
    if frame != "auto" or packs:
        assert set(table["frame"]) <= {"full" if frame == "full" else "packed", "none"}


@pytest.mark.parametrize("family", [*DENSE, "qwen3_moe", "deepseek_v3", "bloom", "qwen3_next"])
@settings(max_examples=max(2, settings.default.max_examples // 8))
@given(dtypes, prompts(length=4), prompts(), chunks, st.data())
def test_neurons_of_a_layer_alone_or_together(family, dtype, prompt, other, chunk, data):
    """Where only neurons at the predicting position change, the forward can begin after their layer."""
    rec = rs.record(opened(family, dtype), prompt)
    dense = [i for i, one in enumerate(rec.layers) if [g.expert for g in one.groups] == [None]]
    neurons = st.builds(
        rs.Neuron, st.sampled_from(dense), st.integers(0, len(rec.layers[dense[0]].groups[0].coefficient) - 1)
    )
    factors = st.floats(-2, 2)
    one = neurons.map(rs.Zero) | st.builds(rs.Scale, neurons, factors) | st.builds(rs.Clamp, neurons, factors)
    one |= neurons.map(lambda site: rs.Patch(site, other)) | neurons.map(lambda site: rs.Mean(site, [other, prompt]))
    row = st.lists(one, min_size=1, max_size=3) | neurons.map(lambda site: [rs.Scale(site, 2.0), rs.Scale(site, -1.5)])
    found = alone(rec, data.draw(st.lists(row, min_size=1, max_size=8)))
    assume(found)
    table = rs.sweep(rec, [row for row, _ in found], measure="all", chunk=chunk)
    expect(table, [effect for _, effect in found], EPS[dtype])


def changes(table):
    """Columns that are 0 where nothing changed."""
    return table[[name for name in table if "change" in name or name in ("kl", "direct")]].to_numpy(dtype=float)


@given(st.sampled_from([*PACKED, *FULL]), dtypes, prompts(), chunks, st.data())
def test_a_no_op_changes_no_measure(family, dtype, prompt, chunk, data):
    rec = rs.record(opened(family, dtype), prompt)
    at = data.draw(st.sampled_from(["target", "all"]))
    site = data.draw(sites(rec) | edges(rec) | projections(rec))
    given = [rs.Scale(site, 1.0, positions=at), rs.Patch(site, rec, positions=at)]
    found = [row for row, _ in alone(rec, given)]
    assume(found)
    table = rs.sweep(rec, found, measure="all", chunk=chunk)
    assert abs(changes(table)).max() <= EPS[dtype] * (1 + float(rec.bs_values.abs().max()))
    clean = table.attrs["clean"]
    assert table["entropy"].tolist() == pytest.approx([clean["entropy"]] * len(table), abs=EPS[dtype] * 10)
    assert (table["rank"] - clean["rank"]).abs().max() <= 1


@given(st.sampled_from([*PACKED, *FULL]), prompts(), chunks, st.floats(-2, 2), st.floats(-2, 2), st.data())
def test_scale_after_scale_is_one_scale(family, prompt, chunk, a, b, data):
    rec = rs.record(opened(family), prompt)
    site, at = data.draw(sites(rec) | edges(rec) | projections(rec)), data.draw(st.sampled_from(["target", "all"]))
    twice, once = [[rs.Scale(site, f, positions=at) for f in factors] for factors in ((a, b), (a * b,))]
    pairs = [row for row, _ in alone(rec, [twice, once])]
    assume(pairs)
    table = rs.sweep(rec, pairs, measure="all", chunk=chunk)
    size = 1 + table.filter(regex="bs_|direct").abs().max().max()
    assert abs(changes(table)[0] - changes(table)[-1]).max() <= 1e-6 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_touching_later_positions_only_change_nothing(family):
    rec = rs.record(shared(family), MIDDLE)
    given = [rs.Zero("L0.mlp", positions=[3]), rs.Zero("L1.H0<3", positions=[3]), rs.Cut("embed->L1.H0", positions=[3]),
             rs.Steer("embed", torch.ones(24), positions=[-1])]  # fmt: skip
    for chunk in (1, None):
        table = rs.sweep(rec, given, measure="all", chunk=chunk)
        assert abs(changes(table)).max() <= 1e-12
        assert (table["direct"] == 0).all()
        assert (table["rank"] == table.attrs["clean"]["rank"]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_the_same_rows_in_any_order_chunk_and_frame(chunk, dtype):
    rec = rs.record(shared("llama", dtype), LAST)
    wanted = rs.sweep(rec, MIX, measure="all", frame="full", chunk=1).drop(columns="frame")
    expect(wanted, [rs.intervene(rec, row) for row in MIX], EPS[dtype])
    order = torch.randperm(len(MIX), generator=torch.Generator().manual_seed(chunk or 0)).tolist()
    for frame in ("auto", "packed", "full"):
        table = rs.sweep(rec, [MIX[i] for i in order], measure="all", chunk=chunk, frame=frame)
        assert set(table["frame"]) <= {"full" if frame == "full" else "packed", "none"}
        for name in table.columns.drop("frame"):
            mine, theirs = table[name].tolist(), [wanted[name].iloc[i] for i in order]
            if table[name].dtype.kind == "f":
                assert mine == pytest.approx(theirs, abs=30 * EPS[dtype], nan_ok=True), name
            else:
                assert [str(one) for one in mine] == [str(one) for one in theirs], name


# The table.


def test_one_row_an_entry_in_order_with_coordinates_of_its_own():
    rec = rs.record(shared("llama"), LAST)
    given = [rs.Zero("L2.N3"), rs.Zero("L0.N5", positions=[1]), rs.Scale("L1.H2<1", 2.0), rs.Zero("L0.H1.D2"),
             [rs.Zero("L1.N1"), rs.Scale("L2.attn", 2.0, positions=[2])], rs.Cut("L0.mlp->L2.N1")]  # fmt: skip
    table = rs.sweep(rec, (row for row in given))
    assert table["site"].tolist() == ["L2.N3", "L0.N5", "L1.H2<1", "L0.H1.D2", "2 sites", "L0.mlp->L2.N1"]
    assert table["operation"].tolist() == ["Zero", "Zero", "Scale", "Zero", "Zero+Scale", "Cut"]
    assert table["kind"].tolist()[:4] == ["Neuron", "Neuron", "HeadSource", "AttnNeuron"]
    wanted = dict(layer=[2, 0, 1, 0], head=[-1, -1, 2, 1], index=[3, 5, -1, 2], source=[-1, -1, 1, -1])
    for name, values in wanted.items():
        assert table[name].fillna(-1).tolist() == [*values, -1, -1]
        assert str(table[name].dtype) == "Int64", name
    assert table["position"].fillna(-1).tolist() == [3, 1, 3, 3, -1, 3]
    assert list(table.index) == list(range(6))
    assert table.columns[-1] == "frame"
    assert table["bs_change_target"].nunique() == 6


def test_named_coordinates_become_columns_and_come_first():
    rec = rs.record(shared("gpt2"), LAST)
    given = [({"how": "zero", "layer": i, "weight": i / 2}, rs.Zero(f"L{i}.mlp")) for i in (2, 0, 1)]
    table = rs.sweep(rec, given)
    assert list(table.columns[:3]) == ["how", "weight", "layer"]
    assert table["layer"].tolist() == [2, 0, 1]
    assert table["how"].tolist() == ["zero"] * 3
    assert "site" not in table
    plain = rs.sweep(rec, [ops for _, ops in given])
    assert table["log_prob"].tolist() == plain["log_prob"].tolist()
    labelled = rs.sweep(rec, {"a": rs.Zero("L1.mlp"), 3: [rs.Zero("L2.N1"), rs.Zero("L2.N2")]})
    assert labelled["label"].tolist() == ["a", 3]
    assert labelled["log_prob"][0] == pytest.approx(plain["log_prob"][2])
    assert len(rs.sweep(rec, [({}, rs.Zero("L1.mlp")), ({}, rs.Zero("L1.N1"))])) == 2
    with pytest.raises(rs.ArgumentError, match="coordinates"):
        rs.sweep(rec, [({3: "a"}, rs.Zero("L1.mlp"))])


def test_where_leaves_rows_out_before_they_run(monkeypatch):
    rec = rs.record(shared("llama"), LAST)
    given, tokens = [rs.Zero(f"L{i}.N{k}") for i in range(3) for k in range(40)], []
    watched(monkeypatch, tokens)
    table = rs.sweep(rec, given, where=lambda row: row["layer"] == 1 and row["index"] < 5)
    assert table["site"].tolist() == [f"L1.N{k}" for k in range(5)]
    assert max(tokens) <= 6
    monkeypatch.undo()
    everything = rs.sweep(rec, given)
    assert table["kl"].tolist() == pytest.approx(everything["kl"][40:45].tolist(), abs=1e-9)
    named = rs.sweep(rec, [({"a": k}, rs.Zero(f"L0.N{k}")) for k in range(4)], where=lambda row: row["a"] == 2)
    assert named["a"].tolist() == [2]
    with pytest.raises(rs.InterventionError, match="`where` left none"):
        rs.sweep(rec, given, where=lambda row: False)


def test_a_donor_of_rows_left_out_is_not_run(monkeypatch):
    rec, donor, tokens = rs.record(shared("llama"), LAST), rs.Prompt(ids=list(range(50)), target=1), []
    watched(monkeypatch, tokens)
    rs.sweep(rec, [rs.Zero("L2.mlp"), rs.Patch("L1.mlp", donor)], where=lambda row: row["operation"] == "Zero")
    assert 50 not in tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_bs_alone_agrees_with_the_other_measures_and_skips_the_vocabulary(family, monkeypatch):
    rec = rs.record(opened(family), LAST)
    given = [
        row for row, _ in alone(rec, [rs.Zero(f"L{i}.{part}") for i in range(3) for part in ("attn", "mlp", "N3")])
    ]
    every = {measure: rs.sweep(rec, given, measure=measure) for measure in ("bs", "log_prob", "all")}
    monkeypatch.setattr(Meter, "_changes", exploding(AssertionError))
    few = rs.sweep(rec, given, measure="bs")
    monkeypatch.undo()
    assert not {"log_prob", "log_prob_change", "prob", "kl", "rank", "top", "entropy"} & {*few, *every["bs"]}
    assert set(every["all"]) - set(every["log_prob"]) == {"rank", "top", "entropy"}
    for table in (few, *every.values()):
        for name in ("bs_target", "bs_change_target", "bs_versus_2", "bs_change_versus_2", "direct", "frame"):
            assert table[name].tolist() == every["all"][name].tolist()
        assert table.attrs["clean"]["bs_target"] == pytest.approx(float(rec.bs_values[1]))
        assert table.attrs["clean"]["bs_versus_2"] == pytest.approx(float(rec.bs_values[9]))
    clean, log_p = every["all"].attrs["clean"], torch.log_softmax(rec.logits.double(), -1)
    assert clean["log_prob"] == pytest.approx(float(log_p[1]))
    assert clean["prob"] == pytest.approx(float(log_p[1].exp()))
    assert clean["entropy"] == pytest.approx(float(-(log_p.exp() * log_p).sum()))
    assert clean["rank"] == 1 + int((log_p > log_p[1]).sum())
    assert "log_prob" not in every["bs"].attrs["clean"]
    table = every["all"]
    assert (table["bs_target"] - table["bs_change_target"]).tolist() == pytest.approx([clean["bs_target"]] * len(table))
    assert (table["log_prob"] - table["log_prob_change"]).tolist() == pytest.approx([clean["log_prob"]] * len(table))


@pytest.mark.parametrize("family", FULL)
def test_rows_are_whole_prompts_where_packing_is_not_exact(family):
    rec = rs.record(opened(family, torch.float32), LAST)
    given = [rs.Zero("L1.mlp"), rs.Zero("L3.attn", positions=[2]), rs.Scale("L2.resid_pre", 0.5, positions="all")]
    table = rs.sweep(rec, given, measure="all")
    assert set(table["frame"]) == {"full"}
    expect(table, [rs.intervene(rec, row) for row in given], 1e-5)
    with pytest.raises(rs.InterventionError, match="control row"):
        rs.sweep(rec, given, frame="packed")


@pytest.mark.parametrize(("length", "frame"), [(3, "packed"), (4, "packed"), (5, "full"), (7, "full")])
def test_a_window_shorter_than_the_prompt_is_seen(length, frame):
    rec = rs.record(shared("gemma2"), rs.Prompt(ids=[5, 4, 3, 2, 8, 60, 11][:length], target=1, versus=[7, 9]))
    given = [rs.Zero("L1.N3"), rs.Zero("L0.mlp", positions=[1]), rs.Zero("embed", positions=[0]), rs.Zero("L2.H1")]
    table = rs.sweep(rec, given, measure="all")
    assert set(table["frame"]) == {frame}
    expect(table, [rs.intervene(rec, row) for row in given], 1e-6)


# The control row.


def leaky(rows):
    """A packed mask that also lets a token see what comes before it in some other rows."""

    def mask(self, batch):
        kept = plain(self, batch)
        row, at = batch.rows(), batch.positions()
        leaks = rows(row[:, None], row[None]) & (at[:, None] >= at[None])
        kept[0, 0, :, batch.cached :].masked_fill_(leaks, 0.0)
        return kept

    plain = Frames._mask
    return mask


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("given", [MIX[:1], MIX[1:3], MIX], ids=len)
def test_a_leak_between_packed_rows_is_seen_and_whole_prompts_are_run(family, given, monkeypatch):
    rec = rs.record(opened(family), LAST)
    given = [row for row, _ in alone(rec, given)]
    wanted = [rs.intervene(rec, row) for row in given]
    for leak in (lambda mine, other: mine == mine, lambda mine, other: mine == other + 1):
        monkeypatch.setattr(Frames, "_mask", leaky(leak))
        table = rs.sweep(rec, given, measure="all")
        with pytest.raises(rs.InterventionError, match=r"the control row of .* differs from the recording"):
            rs.sweep(rec, given, frame="packed")
        monkeypatch.undo()
        assert "full" in set(table["frame"])
        expect(table, wanted, 1e-6)


@pytest.mark.parametrize("name", ["resid_final", "bs_values"])
@pytest.mark.parametrize("frame", ["auto", "packed", "full"])
def test_a_recording_that_was_tampered_with_is_refused(name, frame, monkeypatch):
    rec = rs.record(shared("llama"), LAST)
    monkeypatch.setattr(rec.model, "fingerprint", lambda: rec.fingerprint)
    held = getattr(rec, name)
    held.add_(torch.randn(len(held), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.raises(rs.InterventionError, match="control row"):
        rs.sweep(rec, [rs.Zero("L1.N3")], frame=frame)


def test_a_stream_that_was_tampered_with_is_refused_or_not_used(monkeypatch):
    for positions in ("target", "all"):
        rec = rs.record(shared("llama"), LAST, positions=positions)
        given = [rs.Zero("L1.H1"), rs.Zero("L1.mlp", positions=[2])]
        wanted = [rs.intervene(rec, row) for row in given]
        monkeypatch.setattr(rec.model, "fingerprint", lambda rec=rec: rec.fingerprint)
        held = rec.layers[1].resid_pre if positions == "target" else rec.stream.resid_pre
        held.add_(torch.randn(held.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        for frame in ("packed", "auto"):
            if positions == "target":  # a stream that is run anew is used instead
                expect(rs.sweep(rec, given, frame=frame), wanted, 1e-6)
                continue
            with pytest.raises(rs.InterventionError, match="control row"):
                rs.sweep(rec, given, frame=frame)
        monkeypatch.undo()


# What is left behind, and how much is run.


def exploding(error):
    def explode(*_, **__):
        raise error("injected")

    return explode


def watched(monkeypatch, tokens):
    """Note how many tokens each forward of surgery has."""
    plain = tracing.forward

    def forward(model, ids, *args, **kwargs):
        tokens.append(ids.numel())
        return plain(model, ids, *args, **kwargs)

    instead(monkeypatch, forward)


def instead(monkeypatch, forward):
    for name, module in list(sys.modules.items()):
        if name.startswith("resid_surgery.surgery") and getattr(module, "forward", None) is tracing.forward:
            monkeypatch.setattr(module, "forward", forward)


def standing(model):
    """What must be the same after any call."""
    modules = list(model.module.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in modules]
    return (
        model.fingerprint(), hooks, [m.training for m in modules],
        model.module.config._attn_implementation, [p.requires_grad for p in model.module.parameters()],
    )  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError, ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("frame", ["packed", "full"])
def test_an_error_mid_forward_reaches_the_caller_and_the_next_sweep_works(error, frame, monkeypatch):
    model = rs.load(build("llama"))
    rec = rs.record(model, LAST)
    clean, before = rs.sweep(rec, MIX, measure="all", frame=frame), standing(model)
    plain, calls = writing.Writing._apply, []

    def late(self, *args):
        calls.append(args)
        if len(calls) > 5:
            raise error("injected")
        return plain(self, *args)

    for explode in (exploding(error), late):
        with monkeypatch.context() as patch:
            patch.setattr(writing.Writing, "_apply", explode)
            with pytest.raises(error, match="injected"):
                rs.sweep(rec, MIX, measure="all", frame=frame, chunk=2)
        assert standing(model) == before
        table = rs.sweep(rec, MIX, measure="all", frame=frame)
        assert (table["bs_target"] == clean["bs_target"]).all()
        assert (changes(table) == changes(clean)).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_sweep_leaves_the_model_as_it_was(training):
    module = build("gpt2")
    model = rs.load(module)
    rec = rs.record(model, LAST)
    module.train(training)
    handle = module.transformer.h[1].register_forward_hook(lambda *_: None)
    before, state = standing(model), {name: p.clone() for name, p in module.state_dict().items()}
    recorded = rec.resid_final.clone(), rec.bs_values.clone(), rec.layers[1].resid_pre.clone()
    rs.sweep(rec, [rs.Zero("L1.N3"), rs.Scale("L1.resid_pre", 2.0), rs.Cut("embed->L1.H0")], measure="all")
    assert standing(model) == before
    assert all(torch.equal(p, state[name]) for name, p in module.state_dict().items())
    held = rec.resid_final, rec.bs_values, rec.layers[1].resid_pre
    assert all(torch.equal(a, b) for a, b in zip(held, recorded, strict=True))
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_forwards_are_bounded_whatever_the_number_of_rows(family, monkeypatch):
    rec = rs.record(opened(family, torch.float32), rs.Prompt(ids=list(range(8)), target=1))
    given = [rs.Zero(f"L{i % 3}.N{i % 40}", positions=[i % 8]) for i in range(500)]
    tokens = []
    watched(monkeypatch, tokens)
    table = rs.sweep(rec, given)
    assert len(table) == 500
    assert max(tokens) <= TOKENS["cpu"]
    assert len(tokens) <= 40
    tokens.clear()
    rs.sweep(rec, given[:40], chunk=3)
    assert max(tokens) <= 4 * 8


def test_auxiliary_rows_of_edges_count_as_tokens(monkeypatch):
    rec, tokens = rs.record(shared("llama"), rs.Prompt(ids=list(range(8)), target=1)), []
    at, values = list(range(8)), [torch.ones(24)] * 8
    given = [rs.Cut("L0.mlp->L1.H0", positions="all"), rs.Set("embed->L1.N3", [values], positions=at)] * 9
    watched(monkeypatch, tokens)
    rs.sweep(rec, given, measure="bs")
    assert max(tokens) <= TOKENS["cpu"]


# Bad calls: before any forward.

BAD = {
    "measure": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], measure="logprob"), rs.ArgumentError, "measure"),
    "frame": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], frame="pack"), rs.ArgumentError, "frame"),
    "chunk 0": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], chunk=0), rs.ArgumentError, "chunk"),
    "chunk -1": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], chunk=-1), rs.ArgumentError, "chunk"),
    "chunk 1.5": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], chunk=1.5), rs.ArgumentError, "chunk"),
    "chunk True": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp")], chunk=True), rs.ArgumentError, "chunk"),
    "no rows": (lambda rec: rs.sweep(rec, []), rs.InterventionError, "at least one row"),
    "empty row": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp"), []]), rs.InterventionError, "at least one operation"),
    "one intervention": (lambda rec: rs.sweep(rec, rs.Zero("L0.mlp")), rs.InterventionError, "one entry a row"),
    "text": (lambda rec: rs.sweep(rec, "L0.mlp"), rs.InterventionError, "one entry a row"),
    "None": (lambda rec: rs.sweep(rec, None), rs.InterventionError, "one entry a row"),
    "texts": (lambda rec: rs.sweep(rec, ["L0.mlp"]), rs.InterventionError, "Zero, Scale"),
    "numbers": (lambda rec: rs.sweep(rec, [3]), rs.InterventionError, "Zero, Scale"),
    "no recording": (lambda rec: rs.sweep(LAST, [rs.Zero("L0.mlp")]), rs.ResidSurgeryError, "rec"),
    "contradiction": (lambda rec: rs.sweep(rec, [rs.Zero("L0.mlp"), [rs.Zero("L0.N1"), rs.Zero("L0.mlp")]]),
                      rs.InterventionError, "both write"),
    "row 317": (lambda rec: rs.sweep(rec, [rs.Zero("L1.N3")] * 317 + [rs.Zero("L1.N4321")] + [rs.Zero("L1.N3")] * 9),
                rs.SiteError, "4321"),
    "position": (lambda rec: rs.sweep(rec, [rs.Zero("L1.N3"), rs.Zero("L1.N3", positions=[44])]), rs.PromptError, "44"),
    "source": (lambda rec: rs.sweep(rec, [rs.Zero("L1.H0<3", positions=[1])]), rs.SiteError, "causal"),
    "token text": (lambda rec: rs.sweep(rec, [rs.Zero("L1.N3", positions="Paris")]), rs.PromptError, "Paris"),
    "donor": (lambda rec: rs.sweep(rec, [rs.Patch("L1.mlp", rs.Prompt(ids=[1], target=1), positions=[2])]),
              rs.InterventionError, "no counterpart"),
    "width": (lambda rec: rs.sweep(rec, [rs.Steer("L1.mlp", torch.ones(5))]), rs.ArgumentError, "24 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_a_bad_call_is_one_error_before_any_forward(call, monkeypatch):
    bad, error, said = BAD[call]
    rec = rs.record(shared("llama"), LAST)
    instead(monkeypatch, exploding(AssertionError))
    monkeypatch.setattr(shared("llama").shadow, "forward", exploding(AssertionError))
    with pytest.raises(error, match=said):
        bad(rec)


def test_the_row_that_is_wrong_is_named():
    rec = rs.record(shared("llama"), LAST)
    with pytest.raises(rs.SiteError, match=r"(?s)row 317.*4321|4321.*row 317"):
        rs.sweep(rec, [rs.Zero("L1.N3")] * 317 + [rs.Zero("L1.N4321")])


def test_a_stale_recording_is_refused():
    module = build("llama")
    rec = rs.record(rs.load(module), LAST)
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(rs.StaleRecordingError):
        rs.sweep(rec, [rs.Zero("L1.N3")])


# Half precision.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_packed_and_whole_rows_agree_in_half_precision(family):
    rec = rs.record(opened(family, torch.bfloat16), LAST)
    given = MIX
    packed, full = (rs.sweep(rec, given, measure="all", frame=frame) for frame in ("packed", "full"))
    size = 1 + full.filter(regex="^bs_").abs().max().max()
    for name in ("bs_target", "bs_versus_1", "log_prob", "kl", "entropy"):
        error = (packed[name] - full[name]).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * size, (name, error / size)
    wholes = [rs.intervene(rec, row).table["bs_after"][0] for row in given]
    assert full["bs_target"].tolist() == pytest.approx(wholes, abs=4 * torch.finfo(torch.bfloat16).eps * float(size))


@pytest.mark.parametrize("family", ["falcon", "bloom", "gptj", "codegen", "gpt_neo", "mpt"])
def test_attention_that_is_written_out_gives_the_same_rows_packed_or_not(family):
    """Where packed attention gives other keys than it holds, or weights that do not give its mix, rows run whole."""
    rec = rs.record(rs.load(rs.tiny(family)), rs.Prompt(ids=[5, 4, 3, 2, 9], target=1))
    given = [rs.Zero("L1.H1<2"), rs.Attend("L0.H0<1", 0.4), rs.Zero("L1.H0.D1<0"), rs.Zero("L0.N3")]
    given += [rs.Cut("L0.mlp", "L1.H1", side="value"), rs.Zero("L0.attn", positions=[2])]
    for row, value in zip(given, rs.sweep(rec, given)["bs_target"], strict=True):
        assert rs.intervene(rec, row).after.bs[1] == pytest.approx(value, abs=1e-5), str(row)

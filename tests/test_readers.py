"""Readers: sums in every dtype, remainders, routers, cut edges, what is followed, errors, and an untouched model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import (
    ALL,
    FAMILIES,
    GRAINS,
    IDS,
    PAIRS,
    TARGET,
    VERSUS,
    WEIGHTS_ONLY,
    Case,
    T,
    case,
    loaded,
    ran,
    readings_of,
    recorded,
    written,
)
from slow_readers import Addend, Reading, Run, Worth
from torch import Tensor, nn

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, PromptError, SiteError, StaleRecordingError
from resid_surgery.models.zoo import tiny

pairs, seeds, norms = st.sampled_from(PAIRS), st.integers(0, 10**6), st.sampled_from(["frozen", "live"])
grains = st.sampled_from(GRAINS)
few = settings(max_examples=max(8, settings.default.max_examples * 2 // 5))  # where an example is half a second
KINDS_OF = {family: [kind for one, kind in PAIRS if one == family] for family in FAMILIES}


def asked(family: str, kind: str, seed: int) -> tuple[Run, rs.Recording, Case]:
    return ran(family), recorded(family), case(kind, ran(family), T, seed)


# Tables.


@few
@given(pairs, seeds, grains, norms, st.integers(1, 5))
def test_a_remainder_is_everything_that_is_not_listed(pair, seed, grain, norm, top):
    run, rec, one = asked(*pair, seed)
    for key, rows in readings_of(rs.sources(rec, one.reader, grain=grain, norm=norm, top=top, **one.options)).items():
        reading, listed = one.readings[key], written(rows)
        addends = {(a.site, a.position): a for a in run.seen(reading, grain)}
        shares = dict(zip(addends, run.shares(reading, list(addends.values())), strict=True))
        places = list(zip(listed["writer"], listed["position"], strict=True))
        largest = sorted(map(abs, shares.values()), reverse=True)[:top]
        assert listed["share"].abs().tolist() == pytest.approx(largest, abs=1e-5 * largest[0])
        assert listed["share"].tolist() == pytest.approx([shares[p] for p in places], abs=1e-5 * largest[0])
        rest = rows[rows["kind"] == "remainder"]
        assert list(rest["writer"]) == ([f"remainder ({len(shares) - top})"] if len(shares) > top else [])
        if len(rest):
            others = sum(share for place, share in shares.items() if place not in places)
            size = sum(map(abs, shares.values()))
            assert rest["share"].iloc[0] == pytest.approx(others, abs=1e-5 * size)
            only = run.only(reading, [addends[p] for p in places], norm)
            assert rest["coefficient_without"].iloc[0] == pytest.approx(only, abs=1e-5 * (1 + size), rel=1e-5)


@few
@given(pairs, seeds, grains, st.integers(1, 5))
def test_by_inner_product_the_largest_products_with_the_plain_key_are_listed_and_the_rest_still_closes(
    pair, seed, grain, top
):
    run, rec, one = asked(*pair, seed)
    table = rs.sources(rec, one.reader, grain=grain, top=top, by="inner_product", **one.options)
    for key, rows in readings_of(table).items():
        reading, listed = one.readings[key], written(rows)
        products = {(a.site, a.position): run.inner(reading, a) for a in run.seen(reading, grain)}
        near = 1e-5 * max(map(abs, products.values()))
        places = list(zip(listed["writer"], listed["position"], strict=True))
        largest = sorted(map(abs, products.values()), reverse=True)[:top]
        assert listed["inner_product"].abs().tolist() == pytest.approx(largest, abs=near)
        assert listed["inner_product"].tolist() == pytest.approx([products[p] for p in places], abs=near)
        assert rows["share"].sum() == pytest.approx(rows["reading"].iloc[0], abs=1e-5 * rows["share"].abs().max())


def test_readers_asked_for_together_are_the_same_as_one_by_one():
    rec = recorded("qwen3")
    apart = [rs.sources(rec, reader, grain="neuron", readout="difference") for reader in EVERY]
    pd.testing.assert_frame_equal(rs.sources(rec, EVERY, grain="neuron", readout="difference"),
                                  pd.concat(apart, ignore_index=True))  # fmt: skip
    sides = [rs.sources(rec, "L2.H3", side=side) for side in ("query", "key", "value")]
    pd.testing.assert_frame_equal(rs.sources(rec, "L2.H3", side="all"), pd.concat(sides, ignore_index=True))
    heads = [rs.sources(rec, f"L2.H{h}.key") for h in range(4)]
    pd.testing.assert_frame_equal(rs.sources(rec, "L2.H*.key"), pd.concat(heads, ignore_index=True))


@pytest.mark.parametrize("side", ["query", "key"])
def test_what_a_mask_adds_to_a_score_is_a_row_of_its_own(side):
    """Doge adds to each score what its source's values make of it; DeepSeek-V3.2 hides what its indexer left out."""
    run, rows = ran("doge"), rs.sources(recorded("doge"), f"L2.H3.{side}")
    added = rows[rows["writer"] == "position bias"].set_index("source")["share"]
    expected = {j: run.bias(2, 3, T, j) for j in range(T + 1)}
    assert added.to_dict() == pytest.approx({j: one for j, one in expected.items() if one != -torch.inf}, abs=1e-6)
    assert 0 < len(added) <= T
    rows = rs.sources(recorded("deepseek_v32"), f"L2.H3.{side}")
    assert "position bias" not in set(rows["writer"])
    hidden = [j for j in range(T + 1) if ran("deepseek_v32").bias(2, 3, T, j) == -torch.inf]
    assert len(hidden) == 2
    assert (rows[rows["source"].isin(hidden)][["coefficient", "coefficient_without"]].fillna(0.0) == 0).all(axis=None)


def test_a_mask_that_hangs_on_other_positions_needs_them_recorded():
    for family in ("doge", "deepseek_v32"):
        with pytest.raises(ArgumentError, match=r'positions="all"'):
            rs.sources(recorded(family, positions="target"), "L3.H1.query")


# Experts.


@pytest.mark.parametrize("norm", ["frozen", "live"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_the_router_reads_the_stream_without_the_writer_where_it_is_recomputed(family, norm):
    run, rec, layer, changed = ran(family), recorded(family), 3, 0
    for group in run.groups(layer, T):
        reader = f"{group.prefix}.N2"
        table = rs.sources(rec, reader, router="recomputed", norm=norm, grain="head", top=ALL)
        fixed = rs.sources(rec, reader, router="fixed", norm=norm, grain="head", top=ALL)
        assert fixed["weight_without"].dropna().tolist() == pytest.approx([group.factor] * len(written(fixed)))
        assert fixed["coefficient_without"].dropna().tolist() == table["coefficient_without"].dropna().tolist()
        readings = run.neuron(layer, T, group.prefix, 2)
        for (key, _), rows in readings_of(table).items():
            mine = written(rows)
            addends = {a.site: a.vector for a in run.seen(readings[key], "head")}
            read = run.normed((layer, "mlp"), T, without=torch.stack([addends[w] for w in mine["writer"]]),
                              live=norm == "live")  # fmt: skip
            if "shared" in reader:
                expected = [group.factor] * len(mine)
            else:
                index, weight = run.routing(layer, read)
                expected = (weight * (index == int(reader.split(".")[1][1:]))).sum(-1).tolist()
            assert rows["weight"].tolist() == pytest.approx([group.factor] * len(rows))
            assert mine["weight_without"].tolist() == pytest.approx(expected, abs=1e-5)
            changed += sum(abs(one - group.factor) > 1e-3 for one in expected)
    assert changed > 5


# Edges, cut by another part of the library. BitNet's norms over all heads and all coefficients mix what one reader
# writes with what the others do, and what one part of a mixture adds cannot be a writer there: both are left out. A cut
# keeps the scale of the norm before a sublayer, not of the norms of latents inside it, which values go through.

PLAIN = [family for family in FAMILIES if family != "bitnet"]
VALUED = [family for family in PLAIN if not family.startswith("deepseek")]


def taken(run: Run, rec: rs.Recording, cuts: list[rs.Cut], place: tuple[int, str]) -> list[Tensor]:
    """What each cut takes from a sublayer's output, before its post-norm."""
    effects = rs.intervene_each(rec, [[cut] for cut in cuts])
    return [run.raw(*place, T) - effect.after.raw[place].double() for effect in effects]


def cuttable(rows: pd.DataFrame, n: int = 3) -> pd.DataFrame:
    """A few writers, large and small, whose edges can be cut."""
    mine = written(rows).drop_duplicates("writer")
    mine = mine[~mine["writer"].str.contains(r"\.E\d|shared|bias")]
    return mine.iloc[:: max(1, len(mine) // n)].head(n)


def same(found: list[Tensor], expected: list[Tensor], size: float = 1.0) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * size, rtol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_cutting_the_edge_into_a_neuron_leaves_its_keys_the_reading_less_the_share(family):
    run, rec = ran(family), recorded(family)
    for seed, grain in enumerate(GRAINS):
        one = case("neuron", run, T, (family, seed))
        group = next(g for g in run.groups(one.layer, T) if one.reader.startswith(f"{g.prefix}.N"))
        k = int(one.reader.rpartition("N")[2])
        tables = list(readings_of(rs.sources(rec, one.reader, grain=grain, top=ALL)).values())
        rows = cuttable(tables[0])
        shares = [written(table).set_index("writer")["share"] for table in tables]
        left = [
            torch.tensor([float(table["reading"].iloc[0]) - share[writer] for writer in rows["writer"]])
            for table, share in zip(tables, shares, strict=True)
        ]
        made = group.made(*left).double()
        assert rows["coefficient_without"].tolist() == pytest.approx(made.tolist(), abs=1e-5, rel=1e-5)
        cuts = [rs.Cut(writer, one.reader, norm="frozen") for writer in rows["writer"]]
        gone = [(rows["coefficient"].iloc[0] - m) * group.rows[k] * group.factor for m in made]
        same(taken(run, rec, cuts, (one.layer, "mlp")), gone)


@given(
    st.sampled_from(VALUED), seeds, st.sampled_from(["head", "head of a source"]), st.sampled_from(["layer", "head"])
)
def test_cutting_edges_into_values_takes_their_shares_from_what_the_head_writes(family, seed, kind, grain):
    run, rec, one = asked(family, kind, seed)
    table = rs.sources(rec, one.reader, grain=grain, top=ALL, **one.options)
    shares = written(table).groupby("writer", sort=False)["share"].sum()  # of a head: over every source
    writers = list(cuttable(table)["writer"])
    to = run.readout(T, run.token_weights(T, one.options["readout"], TARGET, VERSUS))
    cuts = [rs.Cut(writer, one.reader, side="value", norm="frozen") for writer in writers]
    gone = taken(run, rec, cuts, (one.layer, "attn"))
    worth = [run.worth_of(to, one.layer, "attn", vector[None], T)[0] for vector in gone]
    size = written(table)["share"].abs().max()
    same(worth, [torch.tensor(shares[writer], dtype=torch.float64) for writer in writers], float(size) + 1e-6)


@given(st.sampled_from([f for f in PLAIN if f not in WEIGHTS_ONLY]), seeds, grains, st.integers(0, T))
def test_cutting_an_edge_into_queries_or_a_key_moves_the_weights_as_the_table_says(family, seed, grain, source):
    """The weights without a writer times the values are what the head writes."""
    run, rec, one = asked(family, "query", seed)
    name, (_, w_o) = f"L{one.layer}.H{one.head}", (0, run.rows(one.layer, run.where.w_o)[0])
    v = torch.stack([run.mixed(one.layer, one.head, T, j) for j in range(T + 1)])
    alpha = run.weights[one.layer][one.head, T, : T + 1]
    w_o = w_o.view(len(run.weights[one.layer]), v.shape[1], -1)[one.head]
    by_query = readings_of(rs.sources(rec, f"{name}.query", grain=grain, top=ALL))
    writers = list(cuttable(by_query["query", 0], 2)["writer"])
    cuts, gone = [], []
    for writer in writers:
        without = [
            written(by_query["query", j]).set_index("writer")["coefficient_without"][writer] for j in range(T + 1)
        ]
        cuts.append(rs.Cut(writer, name, side="query", norm="frozen"))
        gone.append(((1 - torch.tensor(without) / alpha)[:, None] * v).nan_to_num(0.0).sum(0) @ w_o)
    by_key = written(rs.sources(rec, f"{name}<{source}", side="key", grain=grain, top=ALL)).set_index("writer")
    for writer in cuttable(by_key.reset_index(), 2)["writer"]:
        if ("<" in writer and int(writer.split("<")[1]) > source) or alpha[source] == 0:
            continue
        now = by_key["coefficient_without"][writer]
        others = (1 - now) / (1 - alpha[source])  # all other weights, a sink's too, share what is left
        scale = torch.full_like(alpha, others).index_fill(0, torch.tensor(source), now / alpha[source])
        cuts.append(rs.Cut(writer, f"{name}<{source}", side="key", norm="frozen"))
        gone.append(((1 - scale)[:, None] * v).sum(0) @ w_o)
    same(taken(run, rec, cuts, (one.layer, "attn")), gone)


@pytest.mark.parametrize("family", PLAIN)
def test_cutting_the_edge_into_the_unembedding_takes_the_share_from_the_bs_value(family):
    rec = recorded(family)
    rows = cuttable(rs.sources(rec, "unembed", grain="head", top=ALL), 5)
    effects = rs.intervene_each(rec, [[rs.Cut(writer, "unembed", norm="frozen")] for writer in rows["writer"]])
    found = [effect.table["bs_change"].iloc[0] for effect in effects]
    assert found == pytest.approx((-rows["share"]).tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "qwen3", "granite", "bloom"])
def test_cutting_the_edge_into_an_mlp_leaves_what_the_table_says_that_it_writes(family):
    run, rec, one = asked(family, "layer", 1)
    rows = cuttable(rs.sources(rec, one.reader, grain="subvalue", top=ALL, **one.options), 6)
    to = run.readout(T, run.token_weights(T, one.options["readout"], TARGET, VERSUS))
    gone = taken(run, rec, [rs.Cut(w, one.reader, norm="frozen") for w in rows["writer"]], (one.layer, "mlp"))
    worth = [float(run.worth_of(to, one.layer, "mlp", vector[None], T)[0]) for vector in gone]
    assert (rows["coefficient"] - rows["coefficient_without"]).tolist() == pytest.approx(worth, abs=1e-5)


# Following sources further back.


def blocks_of(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows of one reading of one reader each, in the order in which they were followed; constants end a reading."""
    found: list[list[int]] = []
    marks = list(zip(table["hop"], table["reader"], table["key"], strict=True))
    constant = [kind == "constant" for kind in table["kind"]]
    for i in range(len(table)):
        if i == 0 or marks[i] != marks[i - 1] or (constant[i - 1] and not constant[i]):
            found.append([])
        found[-1].append(i)
    return [table.iloc[rows] for rows in found]


def worth_to(run: Run, parent: Reading, p: int) -> Worth:
    """What vectors at a position are worth to a reading: its shares of them."""

    def take(vectors: Tensor) -> Tensor:
        shares = run.shares(parent, [Addend("", p, -1, "", v) for v in vectors])
        return torch.tensor(shares, dtype=torch.float64)

    return Worth(parent.stop, take)


def followed_as(run: Run, site: str, p: int, key: str, to: Worth | None) -> Reading:
    """The reading of a followed writer: of a neuron its key, of a head or layer what it writes to who listed it."""
    layer = int(site[1 : site.index(".")])
    if ".N" in site:
        prefix, _, k = site.rpartition(".N")
        return run.neuron(layer, p, prefix, int(k))[key]
    assert to is not None
    if site.endswith(".mlp"):
        return run.layer(layer, p, to)
    heads = list(range(len(run.weights[layer]))) if site.endswith(".attn") else [int(site.split("<")[0].split("H")[1])]
    sources = (int(site.split("<")[1]),) if "<" in site else tuple(range(p + 1))
    return run.value(layer, p, run.head_worth(layer, p, to, heads), sources)


def biases(run: Run, site: str, p: int, to: Worth) -> float:
    """What of a whole layer's share is its output biases', which no reader reads."""
    layer, part = int(site[1 : site.index(".")]), site.rpartition(".")[2]
    if part == "attn":
        found = [run.rows(layer, run.where.w_o)[1]]
    elif part == "mlp":
        found = [one.bias * one.factor for one in run.groups(layer, p) if one.bias is not None]
    else:
        found = []
    return sum(float(run.worth_of(to, layer, part, v[None], p)[0]) for v in found if v is not None)


@given(
    pairs,
    seeds,
    grains,
    st.integers(1, 4),
    st.integers(1, 8),
)
def test_a_followed_source_reads_what_it_was_listed_for_and_splits_as_the_oracle_says(pair, seed, grain, top, budget):
    run, rec, one = asked(*pair, seed)
    table = rs.sources(rec, one.reader, grain=grain, top=top, hops=2, budget=budget, **one.options)
    direct, further = table[table["hop"] == 1], [b for b in blocks_of(table) if b["hop"].iloc[0] == 2]
    pd.testing.assert_frame_equal(direct, rs.sources(rec, one.reader, grain=grain, top=top, **one.options))
    listed = written(direct)
    for block in further:
        site, p, number = (block[name].iloc[0] for name in ("reader", "reader_position", "number"))
        parents = listed[(listed["writer"] == site) & (listed["position"] == p) & (listed["share"] != 0)]
        assert len(parents)
        reading, near = block["reading"].iloc[0], 1e-5 * block["share"].abs().max() + 1e-9
        to = None
        if number != "coefficient":
            (under,) = [row for _, row in parents.iterrows() if f"{row['reader']}.{row['key']}" == number]
            source = None if pd.isna(under["source"]) else int(under["source"])
            to = worth_to(run, one.readings[under["key"], source], int(p))
            near += 1e-6 * abs(under["share"])
            exact = (1e-9 if ".H" in site else 2e-6) * listed["share"].abs().max()  # a layer's output is float32 norms'
            assert reading == pytest.approx(under["share"] - biases(run, site, int(p), to), abs=exact)
        mine = followed_as(run, site, int(p), block["key"].iloc[0], to)
        assert run.clean(mine) == pytest.approx(reading, abs=near)
        assert block["share"].sum() == pytest.approx(reading, abs=near)
        addends = {(a.site, a.position): a for a in run.seen(mine, grain)}
        rows = written(block)
        places = list(zip(rows["writer"], rows["position"], strict=True))
        shares = run.shares(mine, [addends[place] for place in places])
        assert rows["share"].tolist() == pytest.approx(shares, abs=near)
        assert len(rows) == min(top, len(addends))


@few
@given(pairs, seeds, grains, st.integers(0, 12), st.integers(2, 4))
def test_the_budget_bounds_what_is_followed_and_the_order_does_not_depend_on_it(pair, seed, grain, budget, hops):
    _, rec, one = asked(*pair, seed)
    options = dict(grain=grain, top=3, hops=hops, **one.options)
    table = rs.sources(rec, one.reader, budget=budget, **options)
    assert readers_followed(table) <= budget
    pd.testing.assert_frame_equal(table, rs.sources(rec, one.reader, budget=budget, **options))
    more = rs.sources(rec, one.reader, budget=budget + 2, **options)
    pd.testing.assert_frame_equal(table, more.head(len(table)))
    assert set(table["hop"]) <= set(range(1, hops + 1))
    listed = set(zip(table["hop"], table["writer"], table["position"].fillna(-1), strict=True))
    for _, row in table[table["hop"] > 1].iterrows():
        assert (row["hop"] - 1, row["reader"], row["reader_position"]) in listed


def readers_followed(table: pd.DataFrame) -> int:
    """How many readers beside those asked for; a neuron's two keys are one reader's."""
    further = [block for block in blocks_of(table) if block["hop"].iloc[0] > 1]
    return sum(block["key"].iloc[0] != "gate" for block in further)


def test_what_is_followed_first_has_the_largest_share():
    for family in ("llama", "gpt2", "qwen3", "deepseek_v3"):
        table = rs.sources(recorded(family), "unembed", grain="head", top=8, hops=2, budget=20)
        listed = written(table[table["hop"] == 1])
        follows = listed[listed["writer"].str.startswith("L") & ~listed["writer"].str.contains("bias")]
        readers = [block["reader"].iloc[0] for block in blocks_of(table) if block["hop"].iloc[0] == 2]
        assert readers == list(follows["writer"])


def test_a_neuron_that_several_readings_list_is_followed_once():
    table = rs.sources(recorded("llama"), ["L3.N1", "L3.N2", "L3.N3"], grain="neuron", top=30, hops=2, budget=200)
    blocks = [block for block in blocks_of(table) if block["hop"].iloc[0] == 2 and ".N" in block["reader"].iloc[0]]
    seen = [(block["reader"].iloc[0], block["reader_position"].iloc[0], block["key"].iloc[0]) for block in blocks]
    assert len(seen) == len(set(seen)) > 20


# Errors, before anything runs.


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if any module of any model is called."""
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: called.append(type(m).__name__))
    try:
        yield
    finally:
        handle.remove()
    assert not called, f"{len(called)} modules ran before the error, {called[0]} first"


def test_the_counter_of_modules_can_fail():
    with pytest.raises(AssertionError, match="1 modules ran"), nothing_runs():
        nn.Identity()(torch.zeros(1))


ALONE = ["L3.N3@1", "L3.H1", "L3.H1<2", "L3.attn", "L2.H0.key", "L2.H0<1.key", "L3.H1.D2", "L3.H1.D2<0",
         ["L3.H1.query", "L3.N3@1"], ["L3.N3", "L2.H0.query", "L2.H0"], ["L3.H0.D1<4", "L3.H1"]]  # fmt: skip


@pytest.mark.parametrize("reader", ALONE, ids=str)
def test_a_recording_of_one_position_is_refused_where_others_are_read(reader):
    rec = recorded("llama", positions="target")
    with nothing_runs(), pytest.raises(ArgumentError, match=r'positions="all" where other positions are read.*Record'):
        rs.sources(rec, reader)


@pytest.mark.parametrize(
    "reader", ["L3.N3", "L3.H1.query", "L2.H0<4", "L2.H0<4.key", "L3.H1.D2<4", "L3.mlp", "unembed"]
)
def test_a_recording_of_one_position_is_enough_where_no_other_is_read(reader):
    pd.testing.assert_frame_equal(
        rs.sources(recorded("llama", positions="target"), reader), rs.sources(recorded("llama"), reader)
    )


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("L3.N3", dict(side="middle"), ArgumentError, "`side` must be one of value, query, key, all; got 'middle'"),
    ("L3.H1", dict(side=3), ArgumentError, "`side` must be"),
    ("L3.N3", dict(by="size"), ArgumentError, "`by` must be one of share, inner_product; got 'size'"),
    ("L3.N3", dict(readout="loudest"), ArgumentError, "`readout` must be one of target, difference, log_prob;"),
    ("L3.N3", dict(grain="word"), ArgumentError, "`grain` must be"),
    ("L3.N3", dict(norm="own"), ArgumentError, "`norm` must be one of frozen, live; got 'own'"),
    ("L3.N3", dict(router="none"), ArgumentError, "`router` must be"),
    ("L3.N3", dict(top=0), ArgumentError, "`top` must be"),
    ("L3.N3", dict(hops=0), ArgumentError, "`hops` must be"),
    ("L3.N3", dict(hops=1.5), ArgumentError, "`hops` must be"),
    ("L3.N3", dict(budget=-1), ArgumentError, "`budget` must be"),
    ("L3.H1", dict(versus=["a", "b"]), PromptError, "tokenizer|token"),
    ("L3.H1", dict(versus=[10**6]), PromptError, "10\\d*"),
    ("L3.N3", dict(side="query"), SiteError, "`side` must be left out for `L3.N3`, which is no head; got 'query'"),
    ("L3.N3.query", {}, SiteError, "`side` must be left out for `L3.N3`"),
    ("L3.mlp", dict(side="value"), SiteError, "`side` must be left out for `L3.mlp`"),
    ("unembed", dict(side="all"), SiteError, "`side` must be left out for `unembed`"),
    ("L3.H1.D2", dict(side="value"), SiteError, "`side` must be left out for `L3.H1.D2`"),
    ("L3.N3@5", {}, SiteError, "`L3.N3@5` is after the predicting position 4, which cannot read it"),
    ("L3.H1@5", {}, SiteError, "after the predicting position 4"),
    ("L3.N3@6", {}, PromptError, "`positions` must be"),
    ("L3.attn.bias", {}, SiteError, "`reader` must be a neuron .* got L3.attn.bias"),
    ("embed", {}, SiteError, "`reader` must be .* got embed"),
    ("final_norm.bias", {}, SiteError, "`reader` must be .* got final_norm.bias"),
    ("L3.resid_mid", {}, SiteError, "`reader` must be .* got L3.resid_mid"),
    ("L3.Q1", {}, SiteError, "`reader` must be .* got L3.Q1"),
    ("L0.mlp->L3.N1", {}, SiteError, "`reader` must be .* got L0.mlp->L3.N1"),
    ([], {}, SiteError, "`reader` must be at least one reader"),
    ("L3.H1.sideways", {}, SiteError, "`site` must be a site"),
    (7, {}, SiteError, "`sites` must be"),
    (None, {}, SiteError, "`sites` must be"),
    ("L9.N3", {}, SiteError, "`layer` must be in 0..3"),
    ("L3.N40", {}, SiteError, "`index` must be in 0..39"),
    ("L3.H4", {}, SiteError, "`head` must be in 0..3"),
    ("L3.H1<5", {}, SiteError, "`L3.H1<5` reads source position 5, but the predicting position is 4"),
    ("L3.E0.N1", {}, SiteError, "`L3.E0.N1` does not exist .* layer 3 has no experts"),
    ("L3.H1<3@1", {}, SiteError, "`L3.H1<3@1` reads source position 3, which comes after position 1"),
    ("L3.H1.D2<3@1", {}, SiteError, "`L3.H1.D2<3@1` reads source position 3, which comes after position 1"),
    ("unembed@1", {}, SiteError, "`unembed@1` .* predicting position"),
    (["L3.N3", "L3.H1.query", "L3.attn.bias"], {}, SiteError, "`reader` must be .* got L3.attn.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "options", "error", "message"), BAD, ids=[f"{r} {o}" for r, o, *_ in BAD])
def test_what_cannot_be_asked_says_so_and_nothing_runs(reader, options, error, message):
    rec = recorded("llama")
    with nothing_runs(), pytest.raises(error, match=message):
        rs.sources(rec, reader, **options)


def test_a_difference_needs_competitors():
    rec = rs.record(loaded("llama"), rs.Prompt(ids=list(IDS), target=TARGET, position=T), positions="all")
    for reader in ("L3.H1", "unembed", "L3.mlp", "L3.N3"):
        with nothing_runs(), pytest.raises(ArgumentError, match=r"'difference' needs competitors .* versus="):
            rs.sources(rec, reader, readout="difference")
    given = rs.sources(rec, "unembed", readout="difference", versus=list(VERSUS))
    pd.testing.assert_frame_equal(given, rs.sources(recorded("llama"), "unembed", readout="difference"))


@pytest.mark.parametrize("family", WEIGHTS_ONLY)
@pytest.mark.parametrize("side", ["query", "key", "all"])
def test_a_family_that_gives_weights_only_has_no_query_and_key_sides(family, side):
    message = rf"`L3\.H1<0` has no (query|key) side .* {loaded(family).name}: its attention weights .* side='value'"
    with nothing_runs(), pytest.raises(SiteError, match=message):
        rs.sources(recorded(family), "L3.H1", side=side)


def test_a_recording_of_other_weights_is_refused():
    model = rs.load(tiny("llama", dtype=torch.float64))
    rec = rs.record(model, rs.Prompt(ids=list(IDS), target=TARGET), positions="all")
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[3, 2] += 1.0
    for reader in ("L3.N3", "L3.H1.query", "unembed"):
        with nothing_runs(), pytest.raises(StaleRecordingError, match="Record the prompt again"):
            rs.sources(rec, reader)


def test_an_expert_that_was_not_routed_to_is_refused():
    run = ran("mixtral")
    away = next(e for e in range(4) if e not in run.routed[3][0][T].tolist())
    with nothing_runs(), pytest.raises(SiteError, match=rf"`L3\.E{away}\.N1` is not active: .* routed position 4"):
        rs.sources(recorded("mixtral"), f"L3.E{away}.N1")


# The user's model.


def everything_about(module: nn.Module) -> Any:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [(name, p.requires_grad, p.grad is None, id(p)) for name, p in module.named_parameters()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training, type(m).__name__)
        for m in module.modules()
    ]
    return state, flags, hooks


@contextmanager
def plainly() -> Iterator[None]:
    yield


WAYS = {"grad": plainly, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
EVERY = ["L3.N3", "L2.H1.query", "L2.H1.key", "L3.H2", "L3.mlp", "L3.attn", "L3.H1.D2<1", "unembed"]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_model_is_left_as_it_was_in_every_mode(family, way, learns):
    module = tiny(family, dtype=torch.float64)
    module.requires_grad_(learns)
    before = everything_about(module)
    with WAYS[way]():
        model = rs.load(module)
        rec = rs.record(
            model, rs.Prompt(ids=list(IDS), target=TARGET, versus=list(VERSUS), position=T), positions="all"
        )
        table = rs.sources(rec, EVERY, hops=2, budget=5, grain="head")
        grad = torch.is_grad_enabled()
    after = everything_about(module)
    assert grad is (way == "grad")
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    expected = rs.sources(recorded(family), EVERY, hops=2, budget=5, grain="head")
    pd.testing.assert_frame_equal(table, expected)
    again = rs.sources(rec, EVERY, hops=2, budget=5, grain="head")  # asked in another mode than recorded in
    pd.testing.assert_frame_equal(again, expected)


def test_the_model_is_left_as_it_was_after_an_error():
    module = tiny("qwen3", dtype=torch.float64)
    before = everything_about(module)
    rec = rs.record(rs.load(module), rs.Prompt(ids=list(IDS), target=TARGET), positions="target")
    for reader in ("L3.attn.bias", "L3.H1", ["L3.H1.query", "L3.H1"]):
        with pytest.raises((SiteError, ArgumentError)):
            rs.sources(rec, reader)
    after = everything_about(module)
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())

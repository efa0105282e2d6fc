"""Blame against plain hooks, loops over everything and set functions whose answer is known."""

import itertools
from contextlib import contextmanager

import oracle
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import families, prompts
from test_prompts import word_tokenizer
from tiny import FAMILIES, VOCAB, shared

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, InterventionError, PromptError
from resid_surgery.evidence import restoring
from resid_surgery.evidence.blame import _restores as restores
from resid_surgery.evidence.blame import blame
from resid_surgery.models import zoo

IDS = [5, 41, 30, 2, 9]
SMALL = {"pool": 10, "draws": 2, "k": 3, "top": 3}


def recorded(family, ids=IDS, position=-1, place=1):
    """A recording, its most probable token, and the one that is so many places below it."""
    rec = rs.record(shared(family), rs.Prompt(ids=ids, target=0, position=position))
    order = rec.bs_values.argsort(descending=True).tolist()
    return rec, order[0], order[place]


@contextmanager
def taking(module, family, t, taken):
    """Plain pre-hooks that take numbers from what some modules read at t; None takes everything."""

    def hook(changes):
        def change(_, args):
            flat = args[0].reshape(-1, args[0].shape[-1]).clone()
            for region, amount in changes:
                flat[t, region] = flat[t, region] - amount if amount is not None else 0.0
            return (flat.view_as(args[0]), *args[1:])

        return change

    paths = {path: [one[1:] for one in taken if one[0] == path] for path in dict.fromkeys(one[0] for one in taken)}
    blocks = module.get_submodule(oracle.WHERE[family].blocks)
    handles = [blocks.get_submodule(path).register_forward_pre_hook(hook(some)) for path, some in paths.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroed(rec, family, sites):
    """Last logits of a plain forward without some subvalues: a layer's attention is read once all below is taken."""
    module, where, t, ids = rec.model.module, oracle.WHERE[family], rec.prompt.position, list(rec.prompt.ids)
    taken = []
    for layer in sorted({site.layer for site in sites}):
        with taking(module, family, t, taken):
            seen = oracle.capture(module, family, ids, t)
        for site in [one for one in sites if one.layer == layer]:
            if isinstance(site, rs.Neuron):
                taken.append((f"{layer}.{where.down}", site.index, None))
                continue
            heads, values = seen.alpha[layer], seen.values[layer]
            value = torch.tensor(values[site.head // (len(heads) // len(values))][site.source], dtype=torch.float64)
            region = slice(site.head * len(value), (site.head + 1) * len(value))
            taken.append((f"{layer}.{where.w_o}", region, heads[site.head][site.source] * value))
    with taking(module, family, t, taken), torch.no_grad():
        return module(torch.tensor([ids]), use_cache=False).logits[0, t]


def reached(logits, wrong, right, until):
    return bool(logits[right] > logits[wrong]) and (until == "above" or int(logits.argmax()) == right)


def capped(rec, value):
    c = rec.model.anatomy.logit_cap
    return value if c is None else c * float(torch.tanh(torch.tensor(value / c)))


# The set, against plain hooks.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("until", ["top", "above"])
def test_the_set_restores_and_no_member_can_be_spared(family, until):
    sizes = []
    for ids, place in ((IDS, 1), ([60, 11, 4], 2)):
        rec, wrong, right = recorded(family, ids, place=place)
        found = blame(rec, wrong, right, until=until, limit=8, **SMALL)
        logits = zeroed(rec, family, found.sites)
        assert found.restored == (found.stopped == "restored") == reached(logits, wrong, right, until)
        row, other = found.effect.table.iloc[0], found.effect.table.iloc[1]
        assert (row["token_id"], other["token_id"]) == (right, wrong)
        assert row["logit_after"] == pytest.approx(float(logits[right]), abs=1e-5)
        assert other["logit_after"] == pytest.approx(float(logits[wrong]), abs=1e-5)
        assert list(found.minimal["site"]) == [str(site) for site in found.sites]
        for number, left in enumerate(found.sites):
            rest = zeroed(rec, family, [site for site in found.sites if site != left])
            row = found.minimal.iloc[number]
            assert not (found.restored and reached(rest, wrong, right, until))
            assert row["restored"] == reached(rest, wrong, right, until)
            assert capped(rec, row["bs_right"]) == pytest.approx(float(rest[right]), abs=1e-5)
            assert capped(rec, row["bs_wrong"]) == pytest.approx(float(rest[wrong]), abs=1e-5)
            assert row["difference"] == pytest.approx(row["bs_wrong"] - row["bs_right"], abs=1e-12)
            assert row["prob_right"] == pytest.approx(float(torch.softmax(rest, -1)[right]), abs=1e-5)
            assert row["rank_right"] == 1 + int((rest > rest[right]).sum())
            assert row["top"] == f"#{int(rest.argmax())}"
        sizes.append(len(found.sites) if found.restored else 0)
    assert any(sizes), "nothing was restored at all"


@settings(max_examples=8)
@given(st.data())
def test_what_is_reported_is_what_a_fresh_recording_measures(data):
    family, prompt = data.draw(families), data.draw(prompts())
    rec = rs.record(shared(family), prompt)
    right, wrong = sorted(prompt.versus, key=lambda token: float(rec.bs_values[token]))
    assume(float(rec.bs_values[right]) < float(rec.bs_values[wrong]))  # a tie is nobody's error
    until, climb = data.draw(st.sampled_from(["top", "above"])), data.draw(st.sampled_from(["gap", "log_prob"]))
    kinds = data.draw(st.sampled_from(["neuron", "head_source", ["head_source", "neuron"]]))
    options = {"until": until, "climb": climb, "kinds": kinds, "pool": 4, "limit": 4, "budget": 120, "draws": 1}
    found = blame(rec, wrong, right, **options)
    again = rs.record(shared(family), rs.Prompt(ids=prompt.ids, target=right, versus=[wrong], position=prompt.position))
    effects = rs.intervene_each(again, [found.operations])

    def done(effect):
        return reached(effect.after.logits, wrong, right, until)

    assert found.restored == done(effects[0])
    assert 1 <= len(found.operations) <= 4
    assert found.measured <= 120
    if len(found.operations) > 1:
        sets = [found.operations[:i] + found.operations[i + 1 :] for i in range(len(found.operations))]
        left = [done(effect) for effect in rs.intervene_each(again, sets)]
        assert left == found.minimal["restored"].tolist()
        assert not (found.restored and any(left))
    classes = {"neuron": rs.Neuron, "head_source": rs.HeadSource}
    assert all(isinstance(site, tuple(classes[one] for one in ([kinds] if isinstance(kinds, str) else kinds)))
               for site in found.sites)  # fmt: skip
    assert found.ledger["difference"].sum() == pytest.approx(
        float(rec.bs_values[wrong] - rec.bs_values[right]), abs=1e-5
    )
    assert found.rec.prompt.readouts == (right, wrong)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("climb", ["gap", "log_prob"])
def test_the_first_member_is_the_best_of_all_subvalues_alone(family, climb):
    """With a pool that holds everything, against one sweep over everything."""
    rec, wrong, right = recorded(family, place=30)
    aimed = rs.record(rec.model, rs.Prompt(ids=IDS, target=right, versus=[wrong]))
    grid = [*rs.grid(aimed, rs.Zero, "L*.N*"), *rs.grid(aimed, rs.Zero, "L*.H*<*")]
    table = rs.sweep(aimed, grid, measure="all")
    gap = table["bs_target"] - table["bs_versus_1"]
    best = table["site"][int((gap if climb == "gap" else table["log_prob"]).argmax())]
    assert not (gap > 0).any(), "the case restores at once; take another"
    found = blame(rec, wrong, right, until="above", climb=climb, pool=500, draws=0, limit=1)
    assert found.path["site"][0] == best
    assert found.path["rows"][0] == len(table)
    assert (found.stopped, found.restored) == ("limit", False)


# The search itself, on set functions.


class Function:
    """Trials of a set function: (members) -> value; restored where it is positive."""

    def __init__(self, value, budget=10**6):
        self.value, self.budget, self.reserve, self.rows = value, budget, 0, 0

    def __call__(self, sets):
        self.rows += sum(map(bool, sets))
        values = [self.value(frozenset(some)) for some in sets]
        columns = dict.fromkeys(restoring.READ, 0.0) | {"value": values, "restored": [one > 0 for one in values]}
        return pd.DataFrame(columns)

    def without(self, members):
        return self([tuple(one for one in members if one != left) for left in members])

    room = restoring.Trials.room


NEURONS = tuple(rs.Neuron(0, i) for i in range(6))


@given(st.lists(st.floats(-1, 1), min_size=64, max_size=64), st.integers(1, 6), st.integers(1, 6))
def test_what_the_search_calls_restored_is_so_and_minimal_on_any_set_function(values, pool, limit):
    values[0] = -1.0  # with nothing done
    table = Function(lambda some: values[sum(1 << one.index for one in some)])
    found = restoring.search(table, restoring.Shortlist(NEURONS, NEURONS[::-1]), pool=pool, limit=limit)
    assert 1 <= len(found.members) <= limit
    assert len(set(found.members)) == len(found.members)
    restored = table.value(frozenset(found.members)) > 0
    assert (found.stopped == "restored") == restored
    if restored:
        assert not any(table.value(frozenset(found.members) - {one}) > 0 for one in found.members)
    assert found.without["value"].tolist() == [table.value(frozenset(found.members) - {one}) for one in found.members]
    added = [row["site"] for row in found.path.to_dict("records") if row["action"] == "add"]
    dropped = [row["site"] for row in found.path.to_dict("records") if row["action"] == "drop"]
    assert [one for one in added if one not in dropped] == [str(one) for one in found.members]


@given(st.lists(st.floats(-1, 1), min_size=64, max_size=64), st.integers(2, 60))
def test_the_search_stays_within_its_budget_on_any_set_function(values, budget):
    values[0] = -1.0
    table = Function(lambda some: values[sum(1 << one.index for one in some)], budget)
    found = restoring.search(table, restoring.Shortlist(NEURONS, ()), pool=6, limit=6)
    assert table.rows <= budget
    assert found.members
    restored = table.value(frozenset(found.members)) > 0
    assert (found.stopped == "restored") == restored
    assert not (restored and found.without["restored"].any())


def test_a_step_leaves_enough_of_the_budget_to_prune_what_it_comes_to():
    worth = {"": -1.0, "0": -0.5, "01": -0.4, "012": 0.5}
    stopped = []
    for budget in range(2, 25):
        table = Function(lambda some: worth.get("".join(sorted(str(one.index) for one in some)), -0.9), budget)
        stopped.append(restoring.search(table, restoring.Shortlist(NEURONS, ()), pool=6, limit=4).stopped)
        assert table.rows <= budget
    # 6 + 5 rows for the first two members, 1 to 4 for the third, and 5 in reserve for pruning three
    assert stopped == ["budget"] * (17 - 2) + ["restored"] * (25 - 17)


def test_of_members_that_can_be_spared_the_one_goes_that_leaves_most():
    worth = {"": -1.0, "0": -0.5, "01": -0.4, "012": -0.3, "0123": 0.5, "123": 0.1, "023": 0.3}
    table = Function(lambda some: worth.get("".join(sorted(str(one.index) for one in some)), -0.9))
    found = restoring.search(table, restoring.Shortlist(NEURONS[:4], ()), pool=4, limit=4)
    assert found.path["site"].tolist() == ["L0.N0", "L0.N1", "L0.N2", "L0.N3", "L0.N1"]
    assert found.members == (NEURONS[0], NEURONS[2], NEURONS[3])


def test_a_member_that_a_better_pair_makes_needless_is_dropped():
    a, b, c = NEURONS[:3]
    worth = {(a,): -0.1, (b,): -0.5, (c,): -0.6, (a, b): -0.05, (a, c): -0.08, (b, c): 0.5, (a, b, c): 0.4}
    table = Function({frozenset(some): value for some, value in worth.items()}.get)
    found = restoring.search(table, restoring.Shortlist((a, b, c), ()), pool=3, limit=3)
    assert found.members == (b, c)
    assert [(row["action"], row["site"]) for row in found.path.to_dict("records")] == [
        ("add", "L0.N0"), ("add", "L0.N1"), ("add", "L0.N2"), ("drop", "L0.N0")]  # fmt: skip
    assert found.path["restored"].tolist() == [False, False, True, True]


def test_a_search_that_gains_nothing_stops_and_says_so():
    worth = {0: -1.0, 1: -0.5, 2: -0.4995}  # the second step gains less than counts
    found = restoring.search(Function(lambda some: worth[len(some)]), restoring.Shortlist(NEURONS, ()), pool=2, limit=5)
    assert (found.members, found.stopped) == (NEURONS[:1], "no candidate helps")
    few = restoring.search(
        Function(lambda some: -1 / (1 + len(some))), restoring.Shortlist(NEURONS[:2], ()), pool=1, limit=5
    )
    assert (few.members, few.stopped) == (NEURONS[:1], "no candidate helps")


def test_later_steps_try_the_best_by_direct_part_and_by_measured_effect_only():
    tried = []

    def value(some):
        tried.append({one.index for one in some})
        return -10.0 + sum(2.0 if one.index >= 4 else 1.0 for one in some)

    table = Function(value)
    restoring.search(table, restoring.Shortlist(NEURONS[:3], NEURONS[3:]), pool=1, limit=2)
    assert [some for some in tried if len(some) == 1][:6] == [{0}, {3}, {1}, {2}, {4}, {5}]
    assert [some for some in tried if len(some) == 2] == [{4, 0}]  # 4 is the best alone, 0 by direct part


@pytest.mark.parametrize(("until", "climb"), [("top", "gap"), ("above", "gap"), ("top", "log_prob")])
def test_the_shortlist_has_the_lowest_parts_and_slopes_of_right_against_what_stands_in_the_way(until, climb):
    model = shared("gemma2")
    ids = {"ids": IDS, "position": 3}
    rec = rs.record(model, rs.Prompt(**ids, target=0))
    first, wrong, right = rec.bs_values.argsort(descending=True)[[0, 2, 6]].tolist()
    goal = restoring.Goal(rec, wrong, right, until, climb)
    short = restoring.Shortlist.of(goal, ["neuron", "head_source"], 12)
    rival = {"top": first, "above": wrong}[until]
    direct, slope = [], []
    for kind in ("neuron", "head_source"):
        mine, its = (rs.scores(rs.record(model, rs.Prompt(**ids, target=a, versus=[b])), kind=kind,
                               score=["bs_difference", "grad_times_activation"])
                     for a, b in ((right, wrong), (rival, right)))  # fmt: skip
        direct.append(mine.set_index("site")["bs_difference"])
        gap = mine["grad_times_activation"] - (its["grad_times_activation"] if climb == "gap" else 0.0)
        slope.append(gap.set_axis(mine["site"]))
    for found, expected in ((short.direct, direct), (short.estimated, slope)):
        assert [str(site) for site in found] == pd.concat(expected).nsmallest(12).index.tolist()


def test_a_step_is_judged_by_the_best_rival_and_by_the_odds_where_another_token_is_on_top():
    rec, wrong, right = recorded("llama")
    names = [f"bs_versus_{i + 1}" for i in range(restoring.RIVALS)]
    goal = restoring.Goal(rec, wrong, right, "top", "gap")
    assert goal.facing.prompt.readouts[:2] == (right, wrong)
    assert len(goal.facing.prompt.versus) <= restoring.RIVALS
    names = names[: len(goal.facing.prompt.versus)]
    rows = []
    for target, first, rest, rank, p in ((3.0, 5.0, 4.0, 2, 0.1), (3.0, 1.0, 4.0, 2, 0.2), (3.0, 1.0, 2.0, 1, 0.6),
                                         (3.0, 1.0, 2.0, 2, 0.25), (3.0, 3.0, 2.0, 1, 0.5)):  # fmt: skip
        row = {
            "bs_target": target,
            "rank": rank,
            "prob": p,
            "log_prob": torch.tensor(p, dtype=torch.float64).log().item(),
        }
        rows.append(row | dict.fromkeys(names, rest) | {"bs_versus_1": first, "top": ""})
    table = pd.DataFrame(rows)
    read = goal.read(table)
    assert read["restored"].tolist() == [False, False, True, False, False]
    assert read["value"].tolist() == pytest.approx([-2.0, -1.0, 1.0, -1.0986123, 0.0])  # log(.25 / .75), log(.5 / .5)
    above = restoring.Goal(rec, wrong, right, "above", "gap").read(table)
    assert above["restored"].tolist() == [False, True, True, True, False]
    assert above["value"].tolist() == pytest.approx([-2.0, 2.0, 2.0, 2.0, 0.0])
    assert (
        restoring.Goal(rec, wrong, right, "top", "log_prob").read(table)["value"].tolist() == table["log_prob"].tolist()
    )


# The parts of the difference.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ledger_sums_to_the_plain_models_difference(family):
    rec, wrong, right = recorded(family, place=7)
    found = blame(rec, wrong, right, limit=1, **SMALL)
    with torch.no_grad():
        logits = rec.model.module(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    table = found.ledger
    for column, token in (("bs_wrong", wrong), ("bs_right", right)):
        assert capped(rec, table[column].sum()) == pytest.approx(float(logits[token]), abs=1e-5)
    assert (table["difference"] == table["bs_wrong"] - table["bs_right"]).all()
    assert table["closure"].iloc[0] == pytest.approx(
        abs(table["difference"].sum() - float(rec.bs_values[wrong] - rec.bs_values[right])), abs=1e-12
    )
    assert table["closure"].iloc[0] <= 1e-5
    assert table["site"].tolist() == rs.decompose(rec)["site"].tolist()
    assert list(table.columns) == ["site", "kind", "layer", "bs_wrong", "bs_right", "difference", "norm", "position",
                                   "before_cap", "closure"]  # fmt: skip
    assert table.attrs["tokens"] == {"bs_wrong": found.wrong, "bs_right": found.right}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_subvalues_that_tipped_it_are_the_largest_of_all_in_loops(family):
    rec, wrong, right = recorded(family, place=5)
    found = blame(rec, wrong, right, limit=1, pool=2, draws=0, k=4, top=3)
    seen = oracle.capture(rec.model.module, family, IDS, len(IDS) - 1)
    spread = {}
    for layer in range(3):
        for i in range(len(seen.coefficient[layer])):
            spread["neuron", f"L{layer}.N{i}"] = oracle.bs(seen, oracle.neuron(seen, layer, i))
        for h, j in itertools.product(range(len(seen.alpha[layer])), range(len(IDS))):
            spread["head_source", f"L{layer}.H{h}<{j}"] = oracle.bs(seen, oracle.head_source(seen, layer, h, j))
    for (kind, side), rows in found.tipped.groupby(["kind", "side"]):
        sign = 1 if side == "for wrong" else -1
        parts = {site: sign * (bs[wrong] - bs[right]) for (one, site), bs in spread.items() if one == kind}
        best = sorted((site for site in parts if parts[site] > 0), key=lambda site: -parts[site])[:4]
        assert rows["site"].tolist() == best
        assert rows["rank"].tolist() == list(range(1, len(best) + 1))
        for row in rows.to_dict("records"):
            bs = spread[kind, row["site"]]
            assert row["difference"] == pytest.approx(bs[wrong] - bs[right], abs=1e-5)
            assert row["bs_wrong"] == pytest.approx(bs[wrong], abs=1e-5)
            assert row["bs_right"] == pytest.approx(bs[right], abs=1e-5)
            top = sorted(range(VOCAB), key=lambda token: -bs[token])[:3]
            assert row["promotes"] == " ".join(repr(f"#{token}") for token in top)
    assert set(found.tipped["side"]) == {"for wrong", "for right"}
    assert set(found.tipped["kind"]) == {"neuron", "head_source"}


def test_each_subvalue_is_listed_for_the_side_that_it_is_for_and_once():
    rec, wrong, right = recorded("llama", place=5)
    table = blame(rec, wrong, right, limit=1, pool=2, draws=0, k=1000).tipped
    assert table["site"].is_unique
    assert len(table) == 3 * (40 + 4 * len(IDS))  # none is exactly 0 here
    assert (table["difference"] > 0).tolist() == (table["side"] == "for wrong").tolist()


def test_the_sources_are_those_of_the_best_neurons_for_wrong():
    rec, wrong, right = recorded("llama")
    found = blame(rec, wrong, right, limit=1, readers=2, **SMALL)
    best = found.tipped.query("side == 'for wrong' and kind == 'neuron'")["site"].tolist()[:2]
    pd.testing.assert_frame_equal(found.sources, rs.sources(rec, best, grain="layer", top=3))
    assert set(found.sources["reader"]) == set(best)
    none = blame(rec, wrong, right, limit=1, readers=0, **SMALL).sources
    assert len(none) == 0
    assert list(none.columns) == list(found.sources.columns)


# Controls, limits, counts.


def test_the_control_takes_as_many_others_of_the_same_kinds_and_layers():
    rec, wrong, right = recorded("llama", [8, 3, 77, 20, 61], place=3)
    found = blame(rec, wrong, right, pool=10, draws=6, seed=3)
    members = [str(site) for site in found.sites]
    about = sorted((type(site).__name__, site.layer) for site in found.sites)
    assert len(found.sites) > 1
    assert len(found.control) == 6
    assert found.control["sites"].nunique() > 1
    for row in found.control.to_dict("records"):
        sites = [rs.parse_site(text) for text in row["sites"].split()]
        assert row["size"] == len(set(sites)) == len(members)
        assert not set(row["sites"].split()) & set(members)
        assert sorted((type(site).__name__, site.layer) for site in sites) == about
        table = rs.intervene(found.rec, rs.Zero(sites)).table
        assert row["bs_right"] == pytest.approx(table["bs_after"][0], abs=1e-6)
        assert row["bs_wrong"] == pytest.approx(table["bs_after"][1], abs=1e-6)
        assert row["rank_right"] == table["rank_after"][0]


def test_a_control_of_a_layer_with_nothing_else_is_smaller_or_none():
    rec = rs.record(shared("gpt2"), rs.Prompt(ids=[7], target=0))  # three heads, one source
    order = rec.bs_values.argsort(descending=True).tolist()
    goal = restoring.Goal(rec, order[0], order[1], "top", "gap")
    trials = restoring.Trials(goal, 100, 0)
    pairs = tuple(rs.HeadSource(1, head, 0) for head in range(3))
    assert restoring.control(trials, pairs[:2], 2, 0)["size"].tolist() == [1, 1]
    nothing = restoring.control(trials, pairs, 2, 0)
    assert len(nothing) == 0
    assert list(nothing.columns) == ["draw", "sites", "size", *restoring.READ]
    assert trials.rows == 2


def test_the_same_seed_gives_the_same_and_another_one_only_other_controls():
    rec, wrong, right = recorded("gemma2", place=3)
    one, same, other = (blame(rec, wrong, right, **SMALL, seed=seed) for seed in (0, 0, 1))
    for name, table in one.tables().items():
        pd.testing.assert_frame_equal(table, same.tables()[name])
        if name != "control":
            pd.testing.assert_frame_equal(table, other.tables()[name])
    assert (one.operations, one.measured, one.summary()) == (same.operations, same.measured, same.summary())
    assert one.control["sites"].tolist() != other.control["sites"].tolist()


def hard():
    """A case that takes several members, as the tests of limits need."""
    return recorded("llama", [8, 3, 77, 20, 61], place=3)


def test_a_limit_that_is_reached_is_said_and_the_best_set_so_far_is_measured():
    rec, wrong, right = hard()
    assert len(blame(rec, wrong, right, **SMALL).sites) > 2
    found = blame(rec, wrong, right, limit=2, **SMALL)
    assert (found.restored, found.stopped, len(found.operations)) == (False, "limit", 2)
    assert not reached(found.effect.after.logits, wrong, right, "top")
    text = found.summary()
    assert any(line.startswith("Not restored (limit): the best set found, Zero on ") for line in text)
    assert not any("can be left out" in line for line in text)
    assert "does not restore it (limit)" in repr(found)
    assert len(found.minimal) == 2


@pytest.mark.parametrize("budget", [4, 5, 9, 30, 45])
def test_a_budget_is_never_exceeded_and_said_when_it_ends(budget, monkeypatch):
    rec, wrong, right = hard()
    rows = []
    monkeypatch.setattr(restoring, "sweep", lambda rec, given, **named: rows.append(len(given)) or rs.sweep(
        rec, given, **named))  # fmt: skip
    found = blame(rec, wrong, right, budget=budget, **SMALL)
    assert found.measured == sum(rows) + 1 <= budget
    assert (found.restored, found.stopped) == (False, "budget")
    assert found.path["rows"].iloc[-1] <= sum(rows)


def test_a_disagreement_between_sweep_and_effect_is_said(monkeypatch):
    from resid_surgery.evidence import blame as module

    rec, wrong, right = recorded("opt")
    assert blame(rec, wrong, right, **SMALL).restored
    monkeypatch.setattr(module, "_restores", lambda effect, until: False)
    found = blame(rec, wrong, right, **SMALL)
    assert (found.restored, found.stopped) == (False, "within rounding")


def test_restored_means_top_or_above_as_asked():
    rec, wrong, right = recorded("llama", place=3)
    second = rec.bs_values.argsort(descending=True).tolist()[2]
    aimed = rs.record(rec.model, rs.Prompt(ids=IDS, target=second, versus=[right]))
    effect = rs.intervene(aimed, rs.Scale("L0.N0", 1.0))  # nothing changes: third and fourth of all
    assert (restores(effect, "above"), restores(effect, "top")) == (True, False)
    turned = rs.record(rec.model, rs.Prompt(ids=IDS, target=right, versus=[second]))
    assert not restores(rs.intervene(turned, rs.Scale("L0.N0", 1.0)), "above")
    top = rs.record(rec.model, rs.Prompt(ids=IDS, target=wrong, versus=[second]))
    assert restores(rs.intervene(top, rs.Scale("L0.N0", 1.0)), "top")


# What it says and hands on.


def test_the_summary_and_the_tables_say_the_same():
    rec, wrong, right = hard()
    found = blame(rec, wrong, right, **SMALL)
    assert found.restored
    text = found.summary()
    row, other = found.effect.table.iloc[0], found.effect.table.iloc[1]
    gap = other["bs_before"] - row["bs_before"]
    assert text[0].startswith(f"'#{wrong}' (logit {other['bs_before']:.3f}, p {other['prob_before']:.3f}) stands "
                              f"{gap:.3f} logits above '#{right}'")  # fmt: skip
    best = found.ledger.sort_values("difference").iloc[-1]
    assert text[1].startswith(f"Addends most for '#{wrong}': {best['site']} {best['difference']:+.3f}")
    assert text[2].startswith(
        f"Addends most for '#{right}': {found.ledger.sort_values('difference')['site'].iloc[0]} -"
    )
    sites = ", ".join(map(str, found.sites))
    assert text[5].startswith(f"With Zero on {sites}, '#{right}' is the most probable token: '#{right}' ")
    assert f"-> {row['prob_after']:.3f}, rank {row['rank_before']} -> 1)" in text[5]
    assert [line.split(":")[0] for line in text[6:-2]] == [f"Without {site}" for site in found.sites]
    assert text[-2] == f"No member of the {len(found.sites)} can be left out."
    assert text[-1].startswith(f"{found.control['restored'].sum()} of 2 random sets of that size")
    assert repr(found) == (f"Blame('#{wrong}' over '#{right}' by {gap:.3f} logits in {rec.model.name}; the set {sites} "
                           f"restores it; {found.measured} rows measured)")  # fmt: skip
    assert list(found.tables()) == ["ledger", "tipped", "sources", "path", "minimal", "effect", "effect_ledger",
                                    "control"]  # fmt: skip


def test_one_operation_that_is_enough_is_called_that():
    rec, wrong, right = recorded("opt")
    found = blame(rec, wrong, right, draws=0)
    assert len(found.sites) == 1
    clean = found.minimal.iloc[0]  # without its only member, nothing is done
    assert (clean["bs_right"], clean["bs_wrong"]) == (float(rec.bs_values[right]), float(rec.bs_values[wrong]))
    assert (clean["rank_right"], clean["top"]) == (2, f"#{wrong}")
    assert found.summary()[-2:] == ["One is enough.", f"No random control ({found.measured} rows measured)."]


def test_operations_can_be_saved_and_run_again(tmp_path):
    rec, wrong, right = hard()
    found = blame(rec, wrong, right, **SMALL)
    rs.save_interventions(tmp_path / "ops.json", found.operations)
    effect = rs.intervene(found.rec, rs.load_interventions(tmp_path / "ops.json"))
    pd.testing.assert_frame_equal(effect.table, found.effect.table)


def test_means_over_prompts_and_over_their_recordings_are_the_same():
    rec, wrong, right = recorded("gpt2", place=3)
    others = [rs.Prompt(ids=[n, 41, 30, 2, n + 1], target=0) for n in (7, 19)]
    held = [rs.record(rec.model, one) for one in others]
    by_prompt, by_recording = (blame(rec, wrong, right, over=over, limit=4, **SMALL) for over in (others, iter(held)))
    assert by_prompt.sites == by_recording.sites
    assert by_prompt.summary()[:-1] == by_recording.summary()[:-1]
    effect = rs.intervene(by_prompt.rec, rs.Mean(by_prompt.sites, over=others))
    pd.testing.assert_frame_equal(effect.table, by_prompt.effect.table)
    assert by_prompt.restored == reached(effect.after.logits, wrong, right, "top")
    assert f"Mean on {by_prompt.sites[0]}, " in by_prompt.summary()[5]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "bamba", "cohere"])
def test_mixtures_hybrids_and_multipliers_are_blamed_as_well(kind):
    model = rs.load(zoo.tiny(kind, dtype=torch.float64 if kind == "cohere" else torch.float32))
    rec = rs.record(model, rs.Prompt(ids=[5, 6, 7, 8], target=9))
    order = rec.bs_values.argsort(descending=True).tolist()
    found = blame(rec, order[0], order[1], pool=8, draws=1, limit=6)
    assert found.ledger["closure"].iloc[0] <= 1e-4 * float(rec.bs_values.abs().max())
    effect = rs.intervene(found.rec, found.operations)
    assert found.restored == reached(effect.after.logits, order[0], order[1], "top")
    assert not (found.restored and found.minimal["restored"].any())


def test_a_predicting_position_inside_the_prompt_is_the_one_that_is_blamed():
    rec, wrong, right = recorded("gpt_neox", position=2)
    found = blame(rec, wrong, right, **SMALL)
    assert set(found.ledger["position"]) == {2}
    assert found.restored == reached(zeroed(rec, "gpt_neox", found.sites), wrong, right, "top")


def test_nothing_of_the_model_is_changed():
    model = rs.load(tiny.build("llama"))
    rec = rs.record(model, rs.Prompt(ids=IDS, target=0))
    order = rec.bs_values.argsort(descending=True).tolist()
    module = model.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = (model.fingerprint(), module.training, torch.get_rng_state().tolist(), rec.prompt)
    blame(rec, order[0], order[2], over=[rs.Prompt(ids=[1, 2, 3, 4, 5], target=0)], **SMALL)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert state == (model.fingerprint(), module.training, torch.get_rng_state().tolist(), rec.prompt)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    assert all(p.grad is None for p in module.parameters())


# Bad calls.


@contextmanager
def no_forward():
    """Any module that runs is an error."""

    def refuse(module, args):
        raise AssertionError(f"{type(module).__name__} ran")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def test_a_right_answer_leaves_nothing_to_blame():
    rec, best, second = recorded("llama")
    third = rec.bs_values.argsort(descending=True).tolist()[2]
    name = rec.model.name
    for wrong, right, said in (
        (second, best, "is the most probable token already"),
        (third, second, "is not below it"),
    ):
        logits = [float(rec.bs_values[i]) for i in (right, wrong)]
        with no_forward(), pytest.raises(ArgumentError) as caught:
            blame(rec, wrong, right)
        assert str(caught.value) == (
            f"nothing to blame: `wrong` must stand above `right` for {name}; '#{right}' (logit {logits[0]:.3f}) "
            f"{said}, '#{wrong}' has {logits[1]:.3f}. Exchange them, or record a prompt that the model gets wrong."
        )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"until": "first"}, ArgumentError, "`until` must be one of top, above; got 'first'"),
        ({"until": "abov"}, ArgumentError, "Did you mean 'above'?"),
        ({"climb": "prob"}, ArgumentError, "`climb` must be one of gap, log_prob; got 'prob'"),
        ({"kinds": "head"}, ArgumentError, "`kinds` must be one of neuron, head_source; got 'head'"),
        ({"kinds": []}, ArgumentError, "`kinds` must be of subvalues that exist for "),
        ({"kinds": 3}, ArgumentError, "`kinds` must be one of neuron, head_source; got 3"),
        ({"k": 0}, ArgumentError, "`k` must be a whole number >= 1; got 0"),
        ({"readers": -1}, ArgumentError, "`readers` must be a whole number >= 0; got -1"),
        ({"top": 0}, ArgumentError, "`top` must be a whole number >= 1; got 0"),
        ({"pool": 2.0}, ArgumentError, "`pool` must be a whole number >= 1; got 2.0"),
        ({"limit": 0}, ArgumentError, "`limit` must be a whole number >= 1; got 0"),
        ({"draws": -1}, ArgumentError, "`draws` must be a whole number in 0..10000; got -1"),
        ({"seed": "1"}, ArgumentError, "`seed` must be a whole number in 0..9223372036854775807; got '1'"),
        ({"budget": 11}, ArgumentError, "`budget` must be a whole number >= 12; got 11. One candidate, the whole set"),
        ({"over": []}, ArgumentError, "`over` must be at least one recording or prompt; got []"),
        ({"over": "zero"}, ArgumentError, "`over` must be a sequence of recordings or prompts; got 'zero'"),
        ({"over": [rs.Prompt(ids=[1], target=0)]}, InterventionError, "has no counterpart in ['#1']"),
        ({"over": [rs.Prompt(ids=[VOCAB], target=0)]}, PromptError, f"must be a whole number in 0..{VOCAB - 1}"),
    ],
)  # fmt: skip
def test_options_are_refused_before_any_forward(options, error, said):
    rec, wrong, right = recorded("llama")
    with no_forward(), pytest.raises(error) as caught:
        blame(rec, wrong, right, **options)
    assert said in str(caught.value)


def test_recordings_of_another_model_are_no_donors():
    rec, wrong, right = recorded("llama")
    other = rs.record(shared("gpt2"), rs.Prompt(ids=IDS, target=0))
    with no_forward(), pytest.raises(InterventionError, match="must be a recording of the same opened model"):
        blame(rec, wrong, right, over=[other])


def test_tokens_must_be_tokens():
    rec, wrong, right = recorded("llama")
    with no_forward():
        with pytest.raises(ArgumentError, match=r"`rec` must be a recording from resid_surgery.record; got 'rec'"):
            blame("rec", wrong, right)
        with pytest.raises(PromptError, match=r"`wrong` must be a token id for .* without a tokenizer; got ' Paris'"):
            blame(rec, " Paris", right)
        with pytest.raises(PromptError, match=rf"`right` must be a whole number in 0..96 for .*; got {VOCAB}"):
            blame(rec, wrong, VOCAB)
        with pytest.raises(ArgumentError, match=rf"`right` must be another token than `wrong` for .*; got {wrong}"):
            blame(rec, wrong, wrong)


def test_texts_are_tokens_and_several_of_them_an_error():
    model = rs.load(tiny.build("llama"), tokenizer=word_tokenizer())
    rec = rs.record(model, rs.Prompt(ids=IDS, target=0))
    order = rec.bs_values.argsort(descending=True).tolist()
    wrong, right = (model.tokenizer.decode([token]) for token in order[:2])
    found = blame(rec, wrong, right, limit=1, **SMALL)
    assert (found.wrong, found.right) == (wrong, right)
    assert found.rec.prompt.readouts == (order[1], order[0])
    with (
        no_forward(),
        pytest.raises(PromptError, match=r"`right` must be one token of .*' Paris London' is 2: ' Paris'"),
    ):
        blame(rec, wrong, " Paris London")


def test_a_changed_model_is_refused():
    model = rs.load(tiny.build("gpt2"))
    rec = rs.record(model, rs.Prompt(ids=IDS, target=0))
    order = rec.bs_values.argsort(descending=True).tolist()
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    with pytest.raises(rs.StaleRecordingError, match="its weights changed since"):
        blame(rec, order[0], order[1])


# The real model.


@pytest.mark.real
def test_what_tipped_mumbai_over_delhi_and_what_brings_delhi_back(smollm2):
    rec = rs.record(smollm2, rs.Prompt("The capital of India is", target=" Mumbai"))
    found = blame(rec, " Mumbai", " Delhi")
    wrong, right = (smollm2.tokenizer.encode(token)[0] for token in (" Mumbai", " Delhi"))
    assert found.ledger["difference"].sum() == pytest.approx(2.455, abs=0.01)
    assert found.tipped["site"][0] == "L29.N1498"
    assert found.tipped.query("side == 'for right' and kind == 'head_source'")["site"].iloc[0] == "L23.H4<3"
    assert (found.restored, found.until) == (True, "top")
    assert 2 <= len(found.operations) <= 5
    again = rs.record(smollm2, rs.Prompt("The capital of India is", target=" Delhi", versus=[" Mumbai"]))
    sets = [found.operations, *(found.operations[:i] + found.operations[i + 1 :] for i in range(len(found.operations)))]
    tops = [int(effect.after.logits.argmax()) for effect in rs.intervene_each(again, sets)]
    assert tops[0] == right
    assert right not in tops[1:]
    assert int(rec.logits.argmax()) == wrong
    assert not found.control["restored"].any()
    assert found.measured <= 600

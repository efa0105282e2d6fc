"""Interventions as values: repr that can be pasted back, files that give the same back, damage that is seen."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SITES
from tiny import shared

import resid_surgery as rs

KINDS = ("Zero", "Scale", "Steer", "Set", "Clamp", "Patch", "Mean", "Attend", "Cut", "Prompt")
NAMES = {name: getattr(rs, name) for name in KINDS}
positions = st.sampled_from(["target", "all", 2, " France"]) | st.lists(st.integers(0, 5), min_size=1, max_size=3)
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
vectors = st.lists(numbers, min_size=1, max_size=5)
plain = st.one_of(*(SITES[name] for name in ("Neuron", "Head", "HeadSource", "Sublayer", "Resid"))) | st.sampled_from(
    ["L*.H*", "L0:2.N3", "L1.mlp@2", "L3.Q1", "L0.mlp->L2.H1.query:frozen"]
)
neurons, pairs = SITES["Neuron"] | SITES["AttnNeuron"], SITES["HeadSource"]
prompt = st.builds(rs.Prompt, ids=st.lists(st.integers(0, 9), min_size=1, max_size=3), target=st.integers(0, 9))
aligned = st.sampled_from([None, "index", "token"]) | st.dictionaries(st.integers(0, 5), st.integers(0, 5), max_size=2)
local = st.one_of(
    st.builds(rs.Zero, plain, positions=positions),
    st.builds(rs.Scale, plain, numbers, positions=positions),
    st.builds(rs.Clamp, neurons, numbers, positions=positions),
    st.builds(rs.Attend, pairs, numbers, renormalise=st.booleans(), positions=positions),
    st.builds(rs.Steer, plain, vectors, positions=positions),
    st.builds(rs.Steer, plain, toward=st.just(" Paris") | st.integers(0, 9), away=st.none() | st.just(" Rome"),
              times=numbers, positions=positions),
    st.builds(rs.Cut, st.just("L0.mlp"), st.just("L2.H1"), side=st.sampled_from(["all", "query"]), positions=positions),
    st.builds(lambda a, b: rs.Set([a, b], [[1.5], [2.0, -0.1]]), neurons, pairs),
    st.builds(lambda a, v: rs.Set([a], [[v, v]], positions=[1, 2]), pairs, vectors),
)  # fmt: skip
everything = local | st.builds(rs.Patch, plain, prompt, align=aligned, positions=positions)
everything |= st.builds(rs.Mean, plain, st.lists(prompt, min_size=1, max_size=2), align=aligned)


@given(everything)
def test_repr_can_be_pasted_back(one):
    again = eval(repr(one), NAMES)
    assert again == one
    assert hash(again) == hash(one)
    assert repr(again) == repr(one)


@given(st.lists(local, min_size=1, max_size=4))
def test_a_file_gives_back_what_was_saved(tmp_path_factory, ops):
    path = tmp_path_factory.mktemp("ops") / "ops.json"
    rs.save_interventions(path, ops)
    assert rs.load_interventions(path) == ops


@given(everything, everything)
def test_equal_interventions_have_equal_reprs_and_no_others(a, b):
    assert (a == b) == (repr(a) == repr(b))


def test_donors_and_means_become_the_values_that_they_come_to(tmp_path):
    model = shared("llama")
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3, 2], target=1))
    donors = [rs.Prompt(ids=[9, 8, 7, 6], target=1), rs.record(model, rs.Prompt(ids=[1, 2, 3, 4], target=1))]
    ops = [
        rs.Patch(["L0.N3", "L0.H1", "L1.attn"], donors[0], positions="all"),
        rs.Mean(["L1.mlp", "L2.H0<1"], donors),
        rs.Patch("L0.mlp->L2.H1.value", donors[1]),
        rs.Patch("L2.resid_post", donors[0], positions=1),
        rs.Mean("L1.K0", donors, positions=[0, 1]),
    ]
    with pytest.raises(rs.ArgumentError, match="`rec` must be given"):
        rs.save_interventions(tmp_path / "ops.json", ops)
    assert not list(tmp_path.iterdir())
    rs.save_interventions(tmp_path / "ops.json", ops, rec=rec)
    loaded = rs.load_interventions(tmp_path / "ops.json")
    assert {type(one) for one in loaded} == {rs.Set}
    assert torch.equal(rs.intervene(rec, ops).after.bs, rs.intervene(rec, loaded).after.bs)
    rs.save_interventions(tmp_path / "again.json", loaded)
    assert rs.load_interventions(tmp_path / "again.json") == loaded


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 7'), "has schema 7, but this version reads 1"),
        (lambda text: text.replace("resid_surgery interventions", "shopping list"), "no file of interventions"),
        (lambda text: text.replace('"Steer"', '"Steel"'), "intervention 0 .*no operation is called 'Steel'"),
        (lambda text: text.replace("L1.mlp", "L1.mmm"), "intervention 0 .*must be a site"),
        (lambda text: text.replace("ops.safetensors", "../ops.safetensors"), "without folders"),
        (lambda text: text.replace("ops.safetensors", "none.safetensors"), "cannot be read"),
        (lambda text: json.dumps(json.loads(text) | {"interventions": []}), "no list of interventions"),
        (lambda text: json.dumps(json.loads(text) | {"interventions": [3]}), "intervention 0"),
        (lambda text: "[]", "no file of interventions"),
        (lambda text: "[" * 100000, "is no JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, damage, message):
    path = rs.save_interventions(tmp_path / "ops.json", rs.Steer("L1.mlp", [1.0, 2.0]))
    path.write_text(damage(path.read_text()))
    with pytest.raises(rs.LoadError, match=message):
        rs.load_interventions(path)


def test_vectors_of_another_file_are_seen(tmp_path):
    path = rs.save_interventions(tmp_path / "ops.json", rs.Steer("L1.mlp", [1.0, 2.0]))
    beside = tmp_path / "ops.safetensors"
    content = bytearray(beside.read_bytes())
    content[-1] ^= 1
    beside.write_bytes(bytes(content))
    with pytest.raises(rs.LoadError, match="hashes differ"):
        rs.load_interventions(path)


@pytest.mark.parametrize("path", ["ops.txt", 5, "missing/ops.json"])
def test_a_path_that_is_no_good_is_refused(tmp_path, path):
    given = tmp_path / path if isinstance(path, str) else path
    with pytest.raises((rs.ArgumentError, rs.LoadError)):
        rs.save_interventions(given, rs.Zero("L1.N3"))
    with pytest.raises((rs.ArgumentError, rs.LoadError)):
        rs.load_interventions(given)
    assert not list(tmp_path.iterdir())

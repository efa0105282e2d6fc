"""Readers to ask about: a random one of every kind in every family, with its readings as the slow oracle makes them."""

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pandas as pd
import torch
from slow_readers import WHERE, Reading, Run

import resid_surgery as rs
from resid_surgery.models.zoo import tiny

FAMILIES = tuple(WHERE)
WEIGHTS_ONLY = ("bloom", "mpt")  # their attention hands on weights, no queries and keys
GRAINS = ("layer", "head", "head_source", "neuron", "subvalue")
KINDS = ("neuron", "neuron elsewhere", "attention neuron", "attention neuron of a source", "head", "head of a source",
         "attention", "query", "key", "layer", "unembed")  # fmt: skip
READOUTS = ("target", "difference", "log_prob")
IDS, T = (5, 9, 20, 31, 7, 44), 4
TARGET, VERSUS = 3, (8, 11)
ALL = 10**6
PAIRS = [(family, kind) for family in FAMILIES for kind in KINDS
         if not (kind in ("query", "key") and family in WEIGHTS_ONLY)]  # fmt: skip


@cache
def loaded(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A loud tiny model, proven; made once."""
    return rs.load(tiny(family, dtype=dtype))


@cache
def ran(family: str, ids: tuple[int, ...] = IDS, dtype: torch.dtype = torch.float64) -> Run:
    """The oracle's own forward of the same weights."""
    return Run(family, loaded(family, dtype).module, list(ids))


@cache
def recorded(
    family: str, ids: tuple[int, ...] = IDS, t: int = T, dtype: torch.dtype = torch.float64, positions: str = "all"
) -> rs.Recording:
    """The library's recording of it."""
    prompt = rs.Prompt(ids=list(ids), target=TARGET, versus=list(VERSUS), position=t)
    return rs.record(loaded(family, dtype), prompt, positions=positions)


@dataclass
class Case:
    """A reader as the library is asked for it, and its readings by (key, source) as the oracle makes them."""

    reader: Any
    readings: dict[tuple[str, int | None], Reading]
    options: dict[str, Any] = field(default_factory=dict)
    layer: int = -1
    head: int = -1


def case(kind: str, run: Run, t: int, seed: Any) -> Case:
    """A reader of a kind, anywhere."""
    pick = random.Random(str(seed))
    layer, readout = pick.randrange(len(run.blocks)), pick.choice(READOUTS)
    head, source = pick.randrange(len(run.weights[layer])), pick.randrange(t + 1)
    if kind.startswith("neuron"):
        return _neuron(run, layer, source if kind == "neuron elsewhere" else t, pick, kind == "neuron elsewhere")
    if kind in ("query", "key"):
        readings = {(kind, j): run.scores(layer, head, t, j, kind) for j in range(t + 1)}
        return Case(f"L{layer}.H{head}.{kind}", readings, {}, layer, head)
    at = source if kind.endswith("source") else None
    name, suffix = f"L{layer}.H{head}", "" if at is None else f"<{at}"
    sources = tuple(range(t + 1)) if at is None else (at,)
    if kind.startswith("attention neuron"):
        worth = torch.zeros_like(run.gate(layer, t))
        index = pick.randrange(worth.shape[1])
        worth[head, index] = 1.0
        reading = run.value(layer, t, worth, sources)
        return Case(f"{name}.D{index}{suffix}", {("value", at): reading}, {}, layer, head)
    weights, options = run.token_weights(t, readout, TARGET, VERSUS), {"readout": readout}
    to = run.readout(t, weights)
    if kind == "unembed":
        return Case("unembed", {("readout", None): run.unembed(t, weights)}, options)
    if kind == "layer":
        return Case(f"L{layer}.mlp", {("up", None): run.layer(layer, t, to)}, options, layer)
    heads = list(range(len(run.weights[layer]))) if kind == "attention" else [head]
    name = f"L{layer}.attn" if kind == "attention" else name + suffix
    reading = run.value(layer, t, run.head_worth(layer, t, to, heads), sources)
    return Case(name, {("value", at): reading}, options, layer, head)


def _neuron(run: Run, layer: int, p: int, pick: random.Random, named: bool) -> Case:
    group = pick.choice(run.groups(layer, p))
    k = pick.randrange(len(group.rows))
    readings = {(name, None): one for name, one in run.neuron(layer, p, group.prefix, k).items()}
    return Case(f"{group.prefix}.N{k}" + (f"@{p}" if named else ""), readings, {}, layer)


def readings_of(table: pd.DataFrame) -> dict[tuple[str, int | None], pd.DataFrame]:
    """Rows of a table of one reader, a reading at a time."""
    sources = [None if pd.isna(one) else int(one) for one in table["source"]]
    keys = list(zip(table["key"], sources, strict=True))
    return {key: table[[one == key for one in keys]] for key in dict.fromkeys(keys)}


def written(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of writers, without a remainder and constants."""
    return rows[~rows["kind"].isin(["constant", "remainder"])]

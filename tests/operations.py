"""Every verb that runs a model, as one call each on a user's model: for tests of faults, threads and determinism."""

import copy
import itertools
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from validation_cases import FACT, SMALL, a_row, probes, some, words

import resid_surgery as rs
from resid_surgery.editing.keys import chosen_prefixes
from resid_surgery.models.replacing import with_tensors
from resid_surgery.stream.grouping import record_each

PROMPT = rs.Prompt("The capital of France is", target=" Paris", versus=[" Rome", " Lyon"])
OTHER = rs.Prompt("The capital of Italy is", target=" Rome", versus=[" Paris", " Lyon"])
SHORT = rs.Prompt("The capital", target=" of", versus=[" Rome"])
ITALY = rs.Rewrite("The capital of {} is", subject="Italy", new=" Lyon", old=" Rome", name="Italy")
FIT: dict[str, Any] = {"steps": 2, "prefixes": ["", some(30, 31)], "covariance": "identity", "progress": False}
OPERATIONS = [rs.Zero("L1.N3"), rs.Scale("L2.H1", 2.0), rs.Cut("embed->L1.H0"), rs.Steer("L0.mlp", toward=" Rome")]
PLAN = {"axes": {"draw": [0, 1]}, "locate": {"best": {"kind": "neuron", "k": 2}, "others": {"like": "best",
        "draw": "$draw"}}, "intervene": {"best": {"kind": "Zero", "sites": "$best"},
        "others": {"kind": "Zero", "sites": "$others"}}}  # fmt: skip


class Table:
    """A model on the table, and what verbs are called with: made before anything is broken.

    Args:
        module: a user's model. folder: where runs go, a new one each.
    """

    def __init__(self, module: nn.Module, folder: Path) -> None:
        self.module, self.folder, self.count = module, folder, itertools.count()
        self.model = rs.load(module, tokenizer=words())

    @cached_property
    def rec(self) -> rs.Recording:
        return rs.record(self.model, PROMPT, positions="all")

    @cached_property
    def other(self) -> rs.Recording:
        return rs.record(self.model, OTHER, positions="all")

    @cached_property
    def graph(self) -> rs.SourceGraph:
        return rs.source_graph(self.rec, nodes=6)

    @cached_property
    def edit(self) -> rs.Edit:
        return a_row(self.model, 2.0)

    @cached_property
    def moved(self) -> nn.Module:
        """The same model with other numbers in one tensor."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            module.get_submodule("model.layers.1.mlp.down_proj").weight[:, 3] += 1.0  # type: ignore[index]
        return module

    def nested(self) -> Any:
        """A recording inside an edit inside another one."""
        second = a_row(self.model, 1.0, layer=2, neuron=5)
        with self.edit.applied(self.model) as once, second.applied(once, strict=False) as twice:
            return rs.record(twice, PROMPT), rs.record(once, PROMPT), rs.record(self.model, PROMPT)

    def generated(self) -> Any:
        with rs.under(self.model, [rs.Zero("L1.N3"), rs.Cut("L0.mlp->L1.H0")]) as altered:
            return altered.generate("The capital of", max_new_tokens=3), altered.forward("The capital").logits

    def validated(self, edit: Any, seed: int = 0) -> Any:
        few = probes(unrelated=3, texts=2, choices=2)
        done = rs.validate(self.model, edit, few, budget=SMALL, general=False, progress=False, seed=seed)
        return done.verdict, done.gates, {name: one for name, one in done.tables.items() if name != "cost"}

    def ran(self, seed: int = 0) -> Any:
        out, plan = self.folder / f"run{next(self.count)}", rs.Plan(**PLAN, seed=seed)
        rs.run(self.model, [PROMPT, OTHER, SHORT], plan, out=out, progress=False)
        return rs.read_run(out, table="rows"), rs.read_run(out, table="located")

    def loaded(self) -> Any:
        return rs.record(rs.load(self.module, tokenizer=self.model.tokenizer), PROMPT)

    def swapped(self) -> Any:
        name, held = next((name, p) for name, p in self.module.named_parameters() if name.endswith("down_proj.weight"))
        model = with_tensors(self.model, {name: held.detach() * 2}, "swapped")
        try:
            return rs.record(model, PROMPT)
        finally:
            model.close()


Verb = Callable[[Table], Any]

READING: dict[str, Verb] = {
    "load": Table.loaded,
    "record": lambda t: rs.record(t.model, PROMPT, positions="all"),
    "record_each": lambda t: list(record_each(t.model, [PROMPT, SHORT, OTHER])),
    "check": lambda t: rs.check(t.model),
    "lens_positions": lambda t: rs.lens_positions(t.rec),
    "decompose": lambda t: [rs.decompose(t.rec, grain=grain) for grain in ("layer", "head", "subvalue")],
    "scores": lambda t: rs.scores(t.rec, kind="head_source", score="all"),
    "gradients": lambda t: rs.scores(t.rec, kind="neuron", score="grad_times_activation"),
    "bounds": lambda t: rs.scores(t.rec, kind="neuron", bounds=True),
    "locate": lambda t: [rs.locate(t.rec, k=3, kind=kind) for kind in ("neuron", "attn_neuron", "layer")],
    "locate_each": lambda t: list(rs.locate_each(t.model, [PROMPT, OTHER], k=2)),
    "locate_many": lambda t: rs.locate_many(t.model, [PROMPT, OTHER], k=2),
    "sources": lambda t: rs.sources(t.rec, ["L1.N0", "L2.N3"], grain="subvalue", norm="live"),
    "sources of a value": lambda t: rs.sources(t.rec, "L2.H1", side="value"),
    "attention_sources": lambda t: rs.attention_sources(t.rec, "L2.H1"),
    "source_graph": lambda t: rs.source_graph(t.rec, nodes=5),
    "neuron_memory": lambda t: rs.neuron_memory(t.model, ["L1.N3"], [some(20, 21, 22)], progress=False),
    "head_patterns": lambda t: rs.head_patterns(t.model, n=2, lengths=(4, 6), heads="L1.H*"),
}  # fmt: skip

OPERATING: dict[str, Verb] = {
    "intervene": lambda t: rs.intervene(t.rec, OPERATIONS),
    "intervene_each": lambda t: list(rs.intervene_each(t.rec, [[one] for one in OPERATIONS])),
    "sweep": lambda t: rs.sweep(t.rec, OPERATIONS, measure="all"),
    "sweep of whole prompts": lambda t: rs.sweep(t.rec, OPERATIONS, measure="bs", frame="full"),
    "patching": lambda t: rs.patching(t.rec, t.other, "L*.resid_pre"),
    "under": Table.generated,
    "operate": lambda t: rs.operate(t.model, PROMPT, k=2, readers=1).effects(),
    "verify": lambda t: rs.verify(t.graph, edges=4),
    "faithfulness": lambda t: rs.faithfulness(t.graph),
    "blame": lambda t: rs.blame(t.rec, " Paris", " Rome", k=2, pool=5, limit=3, draws=2, progress=False),
    "addition_test": lambda t: rs.addition_test(t.model, [PROMPT], k=2, progress=False),
    "ablation_test": lambda t: rs.ablation_test(t.model, [PROMPT, OTHER], sets={"two": {"neuron": 2}}, draws=2,
                                                progress=False),
    "score_against_effect": lambda t: rs.score_against_effect(t.rec, best=3, random=3, progress=False),
    "run": Table.ran,
}  # fmt: skip

EDITING: dict[str, Verb] = {
    "edit_coefficients": lambda t: rs.edit_coefficients(t.model, "L1.N3", 0.0),
    "edit_value_rows": lambda t: rs.edit_value_rows(t.model, "L1.N3", old=" Paris", new=" Rome", rewrites=(FACT,)),
    "edit_rank_one": lambda t: rs.edit_rank_one(t.model, FACT, layer=1, **FIT),
    "edit_least_squares": lambda t: rs.edit_least_squares(t.model, [FACT, ITALY], layers=[0, 1], **FIT),
    "applied": Table.nested,
    "swapped": Table.swapped,
    "from_models": lambda t: rs.Edit.from_models(t.model, t.moved),
    "exposure": lambda t: rs.exposure(t.model, t.edit, [some(20, 21, 22, 23)], progress=False),
    "audit": lambda t: rs.audit(t.model, t.edit),
    "validate": lambda t: t.validated(t.edit),
}

VERBS = READING | OPERATING | EDITING

SEEDED: dict[str, Callable[[Table, int], Any]] = {
    "bootstrap": lambda t, seed: rs.bootstrap(trials(), by=["arm"], value="value", resamples=100, seed=seed),
    "verify some edges": lambda t, seed: rs.verify(t.graph, edges=3, seed=seed),
    "faithfulness": lambda t, seed: rs.faithfulness(t.graph, seed=seed),
    "blame": lambda t, seed: rs.blame(t.rec, " Paris", " Rome", k=2, pool=5, limit=3, draws=2, seed=seed,
                                      progress=False),
    "addition_test": lambda t, seed: rs.addition_test(t.model, [PROMPT], k=2, seed=seed, progress=False),
    "ablation_test": lambda t, seed: rs.ablation_test(t.model, [PROMPT], sets={"two": {"neuron": 2}}, draws=2,
                                                      seed=seed, progress=False),
    "score_against_effect": lambda t, seed: rs.score_against_effect(t.rec, random=5, seed=seed, progress=False),
    "head_patterns": lambda t, seed: rs.head_patterns(t.model, n=3, lengths=(4, 9), heads="L1.H*", seed=seed),
    "prefixes of a fit": lambda t, seed: chosen_prefixes(None, seed),
    "probes": lambda t, seed: rs.probes(rs.rewrite("The capital of France is", " Rome"), seed=seed),
    "draws of a run": lambda t, seed: t.ran(seed=seed),
    "validate": lambda t, seed: t.validated(t.edit, seed=seed),
}  # fmt: skip
"""Verbs that draw at random, with a seed."""


def trials() -> pd.DataFrame:
    values = [0.5, 1.5, 2.5, 0.25, 1.0, 3.0, 0.1, 2.2]
    return pd.DataFrame({"arm": ["a", "b"] * 4, "prompt": [0, 0, 1, 1, 2, 2, 3, 3], "value": values})

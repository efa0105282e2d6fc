"""One good call of every public verb and value, small and quick: what tests of bad calls start from."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import knowing
import pandas as pd
import torch
from fake_validation import fake_validation
from validation_cases import FACT, SMALL, a_row, opened, probes, some

import resid_surgery as rs

TEXT = "The capital of France is"


class Bench:
    """What good calls are made with; each thing is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        return opened("llama", torch.float32)

    @cached_property
    def other(self) -> Any:
        return type(self.model.module)(self.model.module.config)

    @cached_property
    def prompt(self) -> rs.Prompt:
        return rs.Prompt(TEXT, target=" Paris", versus=[" Rome"])

    @cached_property
    def rec(self) -> Any:
        return rs.record(self.model, self.prompt, positions="all")

    @cached_property
    def corrupt(self) -> Any:
        return rs.record(self.model, rs.Prompt("The capital of Italy is", target=" Paris", versus=[" Rome"]),
                         positions="all")  # fmt: skip

    @cached_property
    def graph(self) -> Any:
        return rs.source_graph(self.rec, nodes=6)

    @cached_property
    def effect(self) -> Any:
        return rs.intervene(self.rec, rs.Zero("L1.mlp"))

    @cached_property
    def operated(self) -> Any:
        return rs.operate(self.model, self.prompt, k=2, readers=1)

    @cached_property
    def edit(self) -> Any:
        return a_row(self.model, 0.5)

    @cached_property
    def validation(self) -> Any:
        return fake_validation(token="plain")

    @cached_property
    def run(self) -> Any:
        return rs.run(self.model, [self.prompt], self.plan, out=self.folder / "run", progress=False)

    @cached_property
    def plan(self) -> Any:
        return rs.Plan({"kind": "Zero", "sites": "L1.mlp"})

    @cached_property
    def exposed(self) -> pd.DataFrame:
        return rs.exposure(self.model, self.edit, [some(20, 21, 22, 23), some(30, 31)], progress=False)

    @cached_property
    def taught(self) -> Any:
        return knowing.taught()

    @property
    def axes(self) -> Any:
        from matplotlib.figure import Figure

        return Figure().subplots()

    @cached_property
    def trials(self) -> pd.DataFrame:
        return pd.DataFrame({"arm": ["a", "b"] * 3, "prompt": [0, 0, 1, 1, 2, 2], "x": [1.0, 2, 1, 2, 1, 2],
                             "value": [0.5, 1.5, 2.5, 0.25, 1.0, 3.0]})  # fmt: skip

    def written(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A file of that name, written once."""
        path = self.folder / name
        if not path.exists():
            write(path)
        return path


ITALY = rs.Rewrite("The capital of {} is", subject="Italy", new=" Paris", old=" Rome", name="Italy")
EDITED: dict[str, Any] = {"layer": 1, "steps": 1, "prefixes": [""], "covariance": "identity", "progress": False}
Arguments = Callable[[Bench], dict[str, Any]]


def using(*names: str, **others: Any) -> Arguments:
    """Arguments that stand on the bench under the same names, and others as given."""
    return lambda b: {name: getattr(b, name) for name in names} | others


def drawn(table: Callable[[Bench], Any], name: str = "table", **others: Any) -> Arguments:
    """A figure's arguments: its table, others, and Axes to draw in."""
    return lambda b: {name: table(b), "ax": b.axes, **others}


def means(b: Bench) -> pd.DataFrame:
    return rs.bootstrap(b.trials, by=["arm", "x"], value="value", resamples=100)


CALLS: dict[str, Arguments] = {
    # addresses and operations
    "At": lambda b: {"site": rs.Head(1, 2), "position": 1},
    "AttnNeuron": using(layer=1, head=1, index=1, source=1),
    "Bias": using(layer=1, part="mlp", expert=None),
    "Constant": using(name="unembed.bias"),
    "Edge": using(writer="L0.mlp", reader="L1.H1", side="query", norm="live"),
    "ExpertNeuron": using(layer=1, expert=1, index=1),
    "Head": using(layer=1, head=1),
    "HeadSource": using(layer=1, head=1, source=1),
    "Neuron": using(layer=1, index=1),
    "Projection": using(layer=1, side="Q", head=1),
    "Resid": using(layer=1, stage="pre"),
    "SharedNeuron": using(layer=1, index=1),
    "Slice": using(text="L*.H*"),
    "Sublayer": using(layer=1, part="mlp"),
    "parse_site": using(text="L1.N3"),
    "Attend": using(sites="L1.H1<0", weight=0.5, renormalise=False, positions="target"),
    "Clamp": using(sites="L1.N1", value=0.5, positions="target"),
    "Cut": using(writer="L0.mlp", reader="L1.H1", side="all", norm="live", positions="target"),
    "Mean": lambda b: {"sites": "L1.mlp", "over": [b.rec], "align": None, "positions": "target"},
    "Patch": lambda b: {"sites": "L1.mlp", "donor": b.corrupt, "align": None, "positions": "target"},
    "Scale": using(sites="L1.mlp", factor=0.5, positions="target"),
    "Set": using(sites="L1.N1", values=[1.0], positions="target"),
    "Steer": using(sites="L1.mlp", vector=None, toward=" Rome", away=" Paris", times=1.0, positions="target"),
    "Zero": using(sites="L1.mlp", positions="target"),
    # models, prompts, recordings
    "BlockLayout": using(attn="a", attn_out="b", mlp="c", mlp_out="d"),
    "Layout": lambda b: {"blocks": "b", "final_norm": "n", "unembed": "u",
                         "block": rs.BlockLayout(attn="a", attn_out="b", mlp="c", mlp_out="d"), "head_scale": 1.0,
                         "logit_scale": 1.0, "logit_cap": None, "family": "given"},
    "Prompt": using(text=TEXT, target=" Paris", versus=[" Rome"], ids=None, position=-1),
    "load": lambda b: {"model": b.model.module, "tokenizer": b.model.tokenizer, "dtype": None, "device": None,
                       "device_map": None, "max_memory": None, "trust_remote_code": False, "anatomy": None},
    "tiny": using(model_type="llama", dtype=torch.float32, seed=0, attn_implementation="eager"),
    "record": using("model", "prompt", positions="target", remote=None),
    "record_each": lambda b: {"model": b.model, "prompts": [b.prompt, b.prompt], "positions": "target", "batch": 2,
                              "remote": None},
    "facts": lambda b: {"kind": "month", "model": b.taught, "top": 10},
    "known_facts": using(kind="capital"),
    "progress": using(what="doing", total=3, shown=False),
    # reading
    "attention_weights": using("rec", heads="L1.H*"),
    "decompose": using("rec", grain="layer"),
    "lens": using("rec", top=3),
    "lens_positions": using("rec", layers=[1]),
    "predictions": using("rec", top=3),
    "spectrum": using("rec", site="L1.N1", top=3),
    "stream_bs": using("rec"),
    # attribution
    "add_bs_values": using(x=[1.0, 2.0, 3.0], added=[[1.0, 4.0, 5.0]], tokens=["a", "b", "c"]),
    "add_subvalues": using("rec", sites=["L1.N1"], top=3, norm="frozen"),
    "attention_sources": using("rec", reader="L1.H1", readout="target", versus=None, norm="live"),
    "best_share": using("rec", kind="neuron", k=3, norm="frozen", layers=[1]),
    "composition": using("model", writers="L0.H*", readers="L1.H1"),
    "copying": using("model", heads="L1.H1", after="embed"),
    "counts": using("rec", kind="neuron", score="log_prob_increase", norm="frozen", layers=[1], versus=None,
                    progress=None),
    "cross_layer": using("rec", layers=[1], grain="layer", norm="frozen", readout="log_prob"),
    "cumulated": using("rec", layer=1, kind="neuron", norm="frozen"),
    "describe_scores": using(),
    "expand_message": using("rec", message="L1.H1<0", grain="layer", readout="target", versus=None, top=3, tokens=2),
    "head_patterns": using("model", n=1, lengths=(4, 5), seed=0, heads="L1.H1", remote=None),
    "head_weights": using("model", heads="L1.H1", fold=True),
    "locate": using("rec", k=3, kind="neuron", score="log_prob_increase", worst=False, norm="frozen", layers=[1],
                    versus=None, progress=None),
    "locate_each": lambda b: {"model": b.model, "prompts": [b.prompt], "k": 3, "kind": "neuron",
                              "score": "log_prob_increase", "worst": False, "norm": "frozen", "layers": [1],
                              "versus": None, "progress": None, "remote": None},
    "locate_many": lambda b: {"model": b.model, "prompts": [b.prompt], "k": 3, "layers": [1]},
    "locations": lambda b: {"model": b.model, "prompts": [b.prompt], "k": 2, "way": "direct", "progress": None},
    "messages": using("rec", heads="L1.H1", readout="target", versus=None, top=2),
    "neuron_memory": using("model", sites="L1.N1", corpus=[TEXT, some(20, 21)], top=2, values=2, context=3,
                           window=None, progress=None, remote=None),
    "ov_tokens": using("model", heads="L1.H1", tokens=[" Paris"], top=2, after="embed"),
    "probability_curve": using("rec", sites=["L1.N1"], times=[0.0, 1.0], norm="frozen"),
    "qk_tokens": using("model", heads="L1.H1", tokens=[" Paris"], top=2, after="embed"),
    "query_subvalues": using("rec", values="L1.N1", k=2, way="direct", score="coefficient", readout="target",
                             grain="subvalue", hops=1),
    "scores": using("rec", kind="head", score="log_prob_increase", norm="frozen", layers=[1], versus=None,
                    bounds=False, progress=None),
    "separation": using("rec"),
    "sources": using("rec", reader="L1.H1", side="query", readout="target", versus=None, grain="layer", top=3,
                     norm="frozen", router="fixed", by="share", hops=1, budget=5),
    "token_constants": lambda b: {"rec": b.rec, "over": [b.corrupt]},
    # surgery
    "additivity": lambda b: {"rec": b.rec, "interventions": [rs.Zero("L1.mlp"), rs.Zero("L0.H1")]},
    "grid": using("rec", operation=rs.Zero, sites="L1.H*", positions="target"),
    "intervene": lambda b: {"rec": b.rec, "interventions": rs.Zero("L1.mlp"), "at": "target", "movers": 2,
                            "remote": None},
    "intervene_each": lambda b: {"rec": b.rec, "rows": [rs.Zero("L1.mlp")], "at": "target", "movers": 2,
                                 "remote": None},
    "load_interventions": lambda b: {"path": b.written(
        "kept.json", lambda p: rs.save_interventions(p, rs.Zero("L1.mlp")))},
    "patching": lambda b: {"clean": b.rec, "corrupt": b.corrupt, "sites": "L1.resid_pre", "positions": "each",
                           "align": None, "direction": "denoise"},
    "save_interventions": lambda b: {"path": b.folder / "saved.json", "interventions": [rs.Zero("L1.mlp")],
                                     "rec": b.rec},
    "sweep": lambda b: {"rec": b.rec, "interventions": [rs.Zero("L1.mlp")], "measure": "log_prob", "where": None,
                        "chunk": None, "frame": "auto", "progress": None, "remote": None},
    "under": lambda b: {"model": b.model, "interventions": rs.Zero("L1.mlp", positions="all")},
    # evidence
    "ablation_test": lambda b: {"model": b.model, "prompts": [b.prompt], "sets": {"2 neurons": {"neuron": 2}},
                                "scores": ["log_prob_increase"], "positions": ["target"], "norm": "frozen", "draws": 1,
                                "seed": 0, "progress": None, "remote": None},
    "addition_test": lambda b: {"model": b.model, "prompts": [b.prompt], "kind": "neuron",
                                "scores": ["log_prob_increase"], "k": 2, "norm": "frozen", "seed": 0, "progress": None,
                                "remote": None},
    "agreement": lambda b: {"table": rs.score_against_effect(b.rec, kind="head", scores=["log_prob_increase"]),
                            "ks": [2]},
    "blame": lambda b: {"rec": b.rec, "wrong": " Paris", "right": " Rome", "until": "top", "climb": "gap",
                        "over": [b.corrupt], "kinds": ("neuron",), "k": 1, "readers": 1, "top": 1, "pool": 2,
                        "limit": 1, "budget": 10, "draws": 1, "seed": 0, "progress": None},
    "bootstrap": lambda b: {"table": b.trials, "by": "arm", "value": "value", "unit": "prompt",
                            "against": {"arm": "a"}, "confidence": 0.95, "resamples": 100, "seed": 0},
    "check": using("model"),
    "check_families": using(types=["llama"], dtype="float32", each=None),
    "faithfulness": lambda b: {"graph": b.graph, "positions": "target", "over": [b.corrupt], "seed": 0},
    "operate": using("model", "prompt", k=2, readers=1),
    "score_against_effect": using("rec", kind="head", scores=["log_prob_increase"], best=None, random=None,
                                  positions="target", norm="frozen", seed=0, also=(), progress=None, remote=None),
    "source_graph": using("rec", readout="target", versus=None, nodes=4, grain="subvalue"),
    "verify": using("graph", edges=2, seed=0, remote=None),
    # editing
    "Edit": lambda b: {"changes": b.edit.changes},
    "Policy": using(single={"kl: neighbourhood": (0.1, 0.2)}, stream={}),
    "Probe": using(axis="locality", text=TEXT, fact="", stratum="unrelated", criterion="", target=" Paris", old=None,
                   wrong=(), conditions=(), others=()),
    "ProbeSet": lambda b: {"probes": tuple(probes()), "name": "x", "rewrites": (), "ignored": ()},
    "Rewrite": using(prompt="The capital of {} is", subject="France", new=" Rome", old=" Paris", name="France"),
    "audit": using("model", "edit", top=3),
    "cast_survival": using("model", "edit", dtype="bfloat16"),
    "diff_reports": lambda b: {"a": b.validation, "b": fake_validation(token="plain", seed=1), "across_models": False},
    "edit_coefficients": using("model", sites="L1.N1", factor=0.5, positions="all", baked=True, rewrites=(FACT,)),
    "edit_least_squares": lambda b: {"model": b.taught, "rewrites": [ITALY], "layers": [1], "previous": None,
                                     "previous_weight": 1.0, "preserve": 0.05, "null_space": None, "steps": 1,
                                     "learning_rate": 0.3, "until": 0.9, "kl_factor": 0.0625, "weight_decay": 0.01,
                                     "clamp": 4.0, "prefixes": [""], "corpus": None, "covariance": "identity",
                                     "seed": 0, "progress": False},
    "edit_rank_one": lambda b: {"model": b.taught, "rewrite": ITALY, "layer": 1, "steps": 1, "learning_rate": 0.3,
                                "until": 0.9, "kl_factor": 0.0625, "weight_decay": 0.01, "clamp": 4.0, "prefixes": [""],
                                "corpus": None, "covariance": "identity", "ridge": 0.1, "seed": 0, "progress": False},
    "edit_value_rows": using("model", sites="L1.N3", add=None, replace=None, project_out=None, old=" Paris",
                             new=" Rome", l1=1.0, l2=1.0, direction="unembedding", signs="auto", rewrites=(FACT,)),
    "exposure": using("model", "edit", texts=[some(20, 21)], top=None, tokens=None, context=3, window=8,
                      progress=False),
    "exposure_against_kl": using("model", "edit", texts=[some(20, 21, 22)], tokens=10),
    "exposure_probes": lambda b: {"table": b.exposed, "high": 1, "middle": 1, "zero": 1},
    "general_probes": using(texts=1, unrelated=1, generation=1, choices=1),
    "key_cosines": lambda b: {"edits": [rs.edit_rank_one(b.taught, ITALY, **EDITED)]},
    "load_probes": lambda b: {"path": b.written("probes.jsonl", lambda p: rs.save_probes(p, probes()))},
    "probes": using(rewrites=[FACT], kinds=None, seed=0),
    "probes of kinds": using(rewrites=None, kinds=["month"], seed=0),
    "read_edit": lambda b: {"model": b.model, "source": b.written("edit.safetensors", lambda p: b.edit.save(p))},
    "read_probes": lambda b: {"path": b.written("probes.jsonl", lambda p: rs.save_probes(p, probes())),
                              "format": None},
    "rewrite": using(prompt="The capital of France is", new=" Rome"),
    "run_lm_eval": using("model", "edit", tasks=["nowhere"], limit=1, num_fewshot=0, include_path=None, batch_size=1,
                         seed=0),
    "save_probes": lambda b: {"path": b.folder / "some.jsonl", "probes": probes()},
    "validate": lambda b: {"model": b.model, "edit": b.edit, "probes": probes(), "budget": SMALL, "policy": None,
                           "general": False, "seed": 0, "progress": False},
    # experiments
    "Case": lambda b: {"prompt": b.prompt, "labels": {"relation": "a"}, "donors": {"source": (b.prompt,)}},
    "OnRay": using(workers=1, address=None, num_cpus=1, num_gpus=0, threads=1, device=None, runtime_env=None),
    "Plan": using(intervene={"kind": "Zero", "sites": "$best"}, locate={"best": {"kind": "neuron", "k": "$k"}},
                  axes={"k": [1, 2]}, measure="log_prob", known=False, seed=0),
    "open_run": lambda b: {"out": b.run.out},
    "read_cases": lambda b: {"path": b.written("cases.jsonl", lambda p: p.write_text(
        '{"text": "The capital of France is", "target": " Paris"}\n'))},
    "read_plan": lambda b: {"path": b.written("plan.json", b.plan.save)},
    "read_run": lambda b: {"out": b.run.out, "table": "rows", "columns": ["site"], "where": {"layer": 1}},
    "run": lambda b: {"model": b.model, "prompts": [b.prompt], "plan": b.plan, "out": b.run.out, "executor": "local",
                      "resume": True, "retry": False, "max_failures": 0.1, "save_every": 10.0, "progress": False,
                      "remote": None},
    # views
    "plot_addition": drawn(lambda b: rs.add_subvalues(b.rec, ["L1.N1"], top=2)),
    "plot_counts": drawn(lambda b: rs.counts(b.rec, kind="head"), share=False),
    "plot_cross_layer": drawn(lambda b: rs.cross_layer(b.rec), layer=2),
    "plot_cumulated": drawn(lambda b: rs.cumulated(b.rec, layer=1)),
    "plot_exposure": drawn(lambda b: b.exposed.assign(kl=1e-3)),
    "plot_graph": drawn(lambda b: b.graph, "graph", edges=5, fan=2),
    "plot_grid": drawn(lambda b: rs.scores(b.rec, kind="head"), value="log_prob_increase", rows="layer",
                       columns="site"),
    "plot_head_sources": drawn(lambda b: rs.attention_weights(b.rec), value="weight", tokens=None, heads=2, label=""),
    "plot_heads": drawn(lambda b: rs.head_patterns(b.model, 1, (4, 5), heads="L1.H*"), value="induction", label=""),
    "plot_intervals": drawn(means, label="arm", value="mean", low="low", high="high", xlabel="x", mark=0.5),
    "plot_layer_scores": drawn(lambda b: rs.scores(b.rec, kind="layer")),
    "plot_layers": drawn(lambda b: rs.best_share(b.rec, k=2), value="share", hue=None, ylabel=""),
    "plot_ledger": drawn(lambda b: b.effect.ledger(), "ledger", top=3, before=None),
    "plot_lens": drawn(lambda b: rs.lens_positions(b.rec), value="prob", every=1),
    "plot_locations": drawn(lambda b: rs.locations(b.model, [b.prompt], k=2), kind="neuron"),
    "plot_paper": lambda b: {"rec": b.rec, "figure": 3, "layer": None, "kind": "neuron", "ax": b.axes},
    "plot_probability": drawn(lambda b: rs.probability_curve(b.rec, ["L1.N1"]), log=False),
    "plot_removed": drawn(lambda b: rs.attention_sources(b.rec, "L1.H1"), reader=None),
    "plot_retention": drawn(lambda b: pd.DataFrame({"edits": [1, 2], "at_once": [1.0, 1.0], "retained": [1.0, 0.5]})),
    "plot_separation": drawn(lambda b: rs.separation(b.rec), versus=None),
    "plot_shares": drawn(lambda b: rs.best_share(b.rec, k=2)),
    "plot_sources": drawn(lambda b: rs.sources(b.rec, "L1.N1"), reader=None),
    "plot_stream": drawn(lambda b: rs.stream_bs(b.rec), "stream", marked=()),
    "plot_study": drawn(means, x="x", hue="arm", ylabel="", log=False),
    "plot_tokens": drawn(lambda b: rs.messages(b.rec, "L1.H1"), value="bs", tokens=None, label="", wrap=60),
    "save_results": lambda b: {"folder": b.folder / "results", "tables": {"t": b.trials}, "figures": None,
                               "texts": {"x": "y"}},
    "write_report": lambda b: {"value": b.trials, "path": b.folder / "page.html", "interactive": False},
}  # fmt: skip


# What verbs return: nobody makes them by hand. Their methods that take something are called below.
RETURNED = {"Blame", "Budget", "Effect", "HeadWeights", "Located", "NeuronMemory", "OpenedModel", "Operated",
            "Recording", "Run", "SourceGraph", "Validation", "Verified", "Site"}  # fmt: skip

Method = Callable[[Bench], tuple[Callable[..., Any], dict[str, Any]]]
METHODS: dict[str, Method] = {
    "Edit.applied": lambda b: (b.edit.applied, {"model": b.model, "strict": True}),
    "Edit.new_tensors": lambda b: (b.edit.new_tensors, {"model": b.model, "strict": True}),
    "Edit.scaled": lambda b: (b.edit.scaled, {"factor": 0.5}),

    "Edit.save": lambda b: (b.edit.save, {"path": b.folder / "saved.safetensors"}),
    "Edit.load": lambda b: (rs.Edit.load, {"path": b.written("edit.safetensors", lambda p: b.edit.save(p))}),
    "Edit.from_models": lambda b: (rs.Edit.from_models, {"before": b.model, "after": b.other}),
    "Edit.from_delta": lambda b: (rs.Edit.from_delta, {"base": b.model, "path": b.folder / "nowhere.safetensors"}),
    "Edit.from_peft": lambda b: (rs.Edit.from_peft, {"base": b.model, "adapter": b.folder / "nowhere"}),
    "Effect.ledger": lambda b: (b.effect.ledger, {"position": None}),
    "Plan.save": lambda b: (b.plan.save, {"path": b.folder / "saved plan.json"}),
    "Plan.of": lambda b: (rs.Plan.of, {"given": {"intervene": {"kind": "Zero", "sites": "L1.mlp"}}}),
    "Policy.but": lambda b: (lambda changes: rs.Policy().but(changes), {"changes": {"kl: neighbourhood": (0.1, 0.2)}}),
    "Policy.limits": lambda b: (rs.Policy().limits, {"gate": "kl: neighbourhood", "stream": False}),
    "Policy.limited": lambda b: (rs.Policy().limited, {"gate": "kl: neighbourhood", "stream": False}),
    "ProbeSet.of": lambda b: (lambda axis, fact: rs.ProbeSet(tuple(probes())).of(axis, fact=fact),
                              {"axis": "locality", "fact": None}),
    "Run.read": lambda b: (b.run.read, {"table": "rows", "columns": None, "where": None}),
    "Run.dataset": lambda b: (b.run.dataset, {"table": "rows"}),
    "Run.summary": lambda b: (b.run.summary, {"by": "site", "value": "log_prob_change", "table": "rows",
                                              "unit": "prompt", "against": None, "confidence": 0.9,
                                              "resamples": 100, "seed": 0}),
    "Validation.save": lambda b: (b.validation.save, {"path": b.folder / "report.json"}),
    "Validation.from_json": lambda b: (rs.Validation.from_json, {"source": b.validation.to_json()}),
    "Recording.resid_mid": lambda b: (b.rec.resid_mid, {"layer": 1}),
}  # fmt: skip


def callables() -> set[str]:
    """The names in `__all__` that can be called, without the errors."""
    errors = {name for name in rs.__all__ if isinstance(getattr(rs, name), type)
              and issubclass(getattr(rs, name), Exception)}  # fmt: skip
    return {name for name in rs.__all__ if callable(getattr(rs, name))} - errors


def calls(b: Bench) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """(name, what is called, good arguments) of everything."""
    for name, arguments in CALLS.items():
        yield name, getattr(rs, name.split()[0]), arguments(b)
    for name, method in METHODS.items():
        yield name, *method(b)


def carried_out(given: Any) -> Any:
    """A result, to its end: what comes bit by bit is taken, what is entered is left again."""
    if isinstance(given, AbstractContextManager) and not isinstance(given, Path):  # entering a path is deprecated
        with given as inside:
            return inside
    return list(given) if inspect.isgenerator(given) else given

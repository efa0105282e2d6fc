"""Bad calls of every public verb: one clear error of the library each, before any forward runs."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from test_prompts import word_tokenizer

import resid_surgery as rs
from resid_surgery.errors import (
    ArgumentError,
    InterventionError,
    LoadError,
    PromptError,
    ResidSurgeryError,
    SiteError,
    UnsupportedModelError,
)
from resid_surgery.evidence import check as checking
from resid_surgery.models import settling, wiring, zoo
from resid_surgery.stream import closing, knowing, recording
from resid_surgery.surgery import engine

IDS = (5, 6, 7, 8)
WHO_RUNS_FORWARDS = (wiring, settling, recording, closing, knowing, engine, checking)


def prompt(ids: Any = IDS, target: Any = 9, **fields: Any) -> rs.Prompt:
    """A prompt by ids."""
    return rs.Prompt(ids=ids, target=target, **fields)


@dataclass(frozen=True)
class Bench:
    """What bad calls are made with: models, recordings and vectors that are good."""

    module: Any
    model: Any
    rec: Any  # four tokens, predicting at the last
    early: Any  # the same tokens, predicting at position 1, recorded everywhere
    everywhere: Any
    short: Any
    other: Any  # a recording of another opened model
    parallel: Any
    mixture: Any  # four experts a layer, two of them active
    idle: int  # an expert of its layer 0 that is not
    hybrid: Any  # one writer a layer: a state space, experts, attention, an MLP
    vector: torch.Tensor
    effect: Any


@pytest.fixture(scope="module")
def bench() -> Bench:
    module = tiny.build("llama")
    model, other = rs.load(module), rs.load(tiny.build("llama", seed=1))
    mixture = rs.record(rs.load(zoo.tiny("mixtral", dtype=torch.float64)), prompt())
    return Bench(
        module=module,
        model=model,
        rec=rs.record(model, prompt(versus=[10])),
        early=rs.record(model, prompt(position=1)),
        everywhere=rs.record(model, prompt(), positions="all"),
        short=rs.record(model, prompt(ids=[5, 6])),
        other=rs.record(other, prompt()),
        parallel=rs.record(tiny.shared("gpt_neox"), prompt()),
        mixture=mixture,
        idle=min({0, 1, 2, 3} - {group.expert for group in mixture.layers[0].groups}),
        hybrid=rs.record(rs.load(zoo.tiny("nemotron_h", dtype=torch.float64)), prompt()),
        vector=torch.ones(24),
        effect=rs.intervene(rs.record(model, prompt()), rs.Zero("L0.mlp")),
    )


@pytest.fixture
def forwards(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that ran a forward."""
    ran: list[str] = []
    for module in WHO_RUNS_FORWARDS:
        name = "watch" if module is wiring else "forward"
        real = getattr(module, name)

        def counted(*args: Any, _real: Any = real, _name: str = module.__name__, **kwargs: Any) -> Any:
            ran.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return ran


class Faceless:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise KeyError("no face")


TRIALS = pd.DataFrame({"arm": ["a", "b"], "prompt": [0, 0], "x": [1.0, 2.0]})
Call = Callable[[Bench], object]
TABLE: list[Any] = []


def bad(name: str, call: Call, error: type[ResidSurgeryError], said: str) -> None:
    """One row: what is wrong with the call, the call, its error and a pattern of the message."""
    TABLE.append(pytest.param(call, error, said, id=name))


def on(*changes: Any) -> Call:
    """Interventions on the recording, made inside the call."""
    return lambda b: rs.intervene(b.rec, [change(b) for change in changes])


NO_MODEL = r"`model` must be a model from resid_surgery.load; got .*\. Call rs.load\(...\) first\."
NO_RECORDING = r"`rec` must be a recording from resid_surgery.record; got "
NO_INTERVENTIONS = "`interventions` must be a list of Zero, Scale, Patch, Cut, ...; got "
THREE_LAYERS = r"`layer` must be in 0..2 for LlamaForCausalLM \(3 layers\); got 3. Count from the end with layer=-1."
GRAINS = r"`grain` must be one of layer, head, head_source, neuron, subvalue; got "
KINDS = r"`kind` must be one of neuron, head, head_source, attn_neuron, attn_neuron_source, layer; got "

# load
bad("load nothing", lambda b: rs.load(None), ArgumentError, "`model` must be an alias, hub id, folder, .* got None")
bad("load what is loaded", lambda b: rs.load(b.model), ArgumentError, r"`model` must be .* got OpenedModel\(")
bad("load a plain module", lambda b: rs.load(torch.nn.Linear(2, 2)), UnsupportedModelError, "Linear is not a Hugging")
bad("load nowhere", lambda b: rs.load("./nowhere"), LoadError, r"\./nowhere does not exist")
bad("load an object elsewhere", lambda b: rs.load(b.module, device="cpu"), ArgumentError, "`device` must be left out")
bad("load an object as float32", lambda b: rs.load(b.module, dtype="float32"), ArgumentError, "must be left out")
bad("load as int8", lambda b: rs.load("./x", dtype="int8"), ArgumentError, "`dtype` must be one of float64, .*'int8'")
bad("load as float61", lambda b: rs.load(b.module, dtype="float61"), ArgumentError, r"Did you mean 'float64'\?")
bad("load by a family's name", lambda b: rs.load(b.module, anatomy="llama"), ArgumentError,
    r"`anatomy` must be a resid_surgery.Layout; got 'llama'")  # fmt: skip
bad("a layout of no blocks", lambda b: rs.Layout(blocks="b", final_norm="n", unembed="u", block=[]), ArgumentError,
    "`block` must be a BlockLayout, or one a layer; got ")  # fmt: skip
bad("a block without its W_O", lambda b: rs.BlockLayout(attn="a", mlp_out="c"), ArgumentError,
    "`attn_out` must be a module path inside the block for this kind; got None")  # fmt: skip
bad("a block of nerons", lambda b: rs.BlockLayout(attn="a", attn_out="b", mlp_kind="neuron"), ArgumentError,
    r"`mlp_kind` must be one of neurons, experts, opaque, none; got 'neuron'. Did you mean 'neurons'\?")  # fmt: skip
bad("a block that mixes anyhow", lambda b: rs.BlockLayout(attn="a", attn_out="b", mlp_out="c", mix="anyhow"),
    ArgumentError, "`mix` must be 'interface' or one of 'weights:...', .*; got 'anyhow'")  # fmt: skip
bad("load with a tokenizer's name", lambda b: rs.load(b.module, tokenizer="gpt2"), ArgumentError, "`tokenizer` must be")

# record
bad("record a name", lambda b: rs.record("smollm2-135m", prompt()), ArgumentError, NO_MODEL)
bad("record a raw module", lambda b: rs.record(b.module, prompt()), ArgumentError, NO_MODEL)
bad("record plain text", lambda b: rs.record(b.model, "The"), PromptError, "`prompt` must be a resid_surgery.Prompt")
bad("record other positions", lambda b: rs.record(b.model, prompt(), positions="al"), ArgumentError,
    r"`positions` must be one of target, all; got 'al'. Did you mean 'all'\?")  # fmt: skip
bad("record at an index", lambda b: rs.record(b.model, prompt(), positions=0), ArgumentError,
    "`positions` must be one of target, all; got 0")  # fmt: skip
bad("record text without tokenizer", lambda b: rs.record(b.model, rs.Prompt("a", target=9)), PromptError,
    "opened without a tokenizer")  # fmt: skip
bad("record a far id", lambda b: rs.record(b.model, prompt([97])), PromptError, r"`ids` must be .* 0..96 .*got 97")
bad("record a far target", lambda b: rs.record(b.model, prompt(target=97)), PromptError, r"`target` must .*0..96.* 97")
bad("record a negative target", lambda b: rs.record(b.model, prompt(target=-1)), PromptError, r"`target` must .* -1")
bad(
    "record itself as rival", lambda b: rs.record(b.model, prompt(versus=[9])), PromptError, "`versus` must be distinct"
)
bad("record too much", lambda b: rs.record(b.model, prompt([5] * 65)), PromptError, "has 65 tokens but .* at most 64")
bad("record at position 4", lambda b: rs.record(b.model, prompt(position=4)), PromptError, r"must be .*-4..3; got 4")
bad("record at no token", lambda b: rs.record(b.model, prompt(position="#9")), PromptError,
    "position '#9' is not a token of the prompt; candidates are 0: '#5', 1: '#6'")  # fmt: skip

# decompose, lens, stream_bs, predictions, spectrum
bad("decompose text", lambda b: rs.decompose("rec"), ArgumentError, NO_RECORDING)
bad("decompose a prompt", lambda b: rs.decompose(prompt()), ArgumentError, NO_RECORDING)
bad("decompose by layr", lambda b: rs.decompose(b.rec, grain="layr"), ArgumentError, GRAINS + r".*mean 'layer'\?")
bad("decompose by None", lambda b: rs.decompose(b.rec, grain=None), ArgumentError, GRAINS + "None")
bad("lens of text", lambda b: rs.lens("rec"), ArgumentError, NO_RECORDING)
bad("lens top 0", lambda b: rs.lens(b.rec, top=0), ArgumentError, "`top` must be a whole number in 1..97 for .*; got 0")
bad("lens top 98", lambda b: rs.lens(b.rec, top=98), ArgumentError, "`top` must be .* in 1..97 for .*; got 98")
bad("lens top True", lambda b: rs.lens(b.rec, top=True), ArgumentError, "`top` must be .*; got True")
bad("stream_bs of text", lambda b: rs.stream_bs("rec"), ArgumentError, NO_RECORDING)
bad("predictions of text", lambda b: rs.predictions("rec"), ArgumentError, NO_RECORDING)
bad("predictions top 1.5", lambda b: rs.predictions(b.rec, top=1.5), ArgumentError, "`top` must be .*; got 1.5")
bad("spectrum of text", lambda b: rs.spectrum("rec", "L0.N0"), ArgumentError, NO_RECORDING)
bad("spectrum of L3", lambda b: rs.spectrum(b.rec, "L3.N0"), SiteError, THREE_LAYERS)
bad("spectrum of N40", lambda b: rs.spectrum(b.rec, "L0.N40"), SiteError,
    r"`index` must be in 0..39 for LlamaForCausalLM \(40 neurons in layer 0\); got 40")  # fmt: skip
bad("spectrum of an expert that is not", lambda b: rs.spectrum(b.rec, "L0.E0.N1"), SiteError,
    "`L0.E0.N1` does not exist for LlamaForCausalLM: layer 0 has no experts")  # fmt: skip
bad("spectrum of a shared expert that is not", lambda b: rs.spectrum(b.rec, "L0.shared.N1"), SiteError,
    "`L0.shared.N1` does not exist for LlamaForCausalLM: layer 0 has no shared expert")  # fmt: skip
bad("spectrum without an expert", lambda b: rs.spectrum(b.mixture, "L0.N1"), SiteError,
    r"`L0.N1` does not say which expert: .*Write L0\.E0\.N1")  # fmt: skip
bad("spectrum of E4", lambda b: rs.spectrum(b.mixture, "L0.E4.N1"), SiteError, r"`expert` must be in 0..3 .* got 4")
bad("spectrum of an idle expert", lambda b: rs.spectrum(b.mixture, f"L0.E{b.idle}.N1"), SiteError,
    r"`L0.E\d.N1` is not active: layer 0 of .* routed position 3 to experts \[\d, \d\]. Pick one of them")  # fmt: skip
bad("spectrum of a head of a state space", lambda b: rs.spectrum(b.hybrid, "L0.H0"), SiteError,
    r"layer 0's mixer is no softmax attention, .* Use L0\.attn")  # fmt: skip
bad("spectrum of H4", lambda b: rs.spectrum(b.rec, "L0.H4"), SiteError, "`head` must be in 0..3 .* got 4")
bad("spectrum of D6", lambda b: rs.spectrum(b.rec, "L0.H0.D6"), SiteError, "`index` must be in 0..5 .* got 6")
bad("spectrum of a far source", lambda b: rs.spectrum(b.early, "L0.H0<2"), SiteError,
    r"`L0.H0<2` reads source position 2, but the predicting position is 1 \(4 tokens\): sources are 0..1")  # fmt: skip
bad("spectrum of a state", lambda b: rs.spectrum(b.rec, "L0.resid_mid"), SiteError, "is a state of the stream, not an")
bad("spectrum of a constant", lambda b: rs.spectrum(b.rec, "unembed.bias"), SiteError, "is a constant of the readout")
bad("spectrum of a bias that is not", lambda b: rs.spectrum(b.other, rs.Bias(9, "mlp")), SiteError, "`layer` must be")
bad(
    "spectrum of nonsense", lambda b: rs.spectrum(b.rec, "banana"), SiteError, "`site` must be a site such as L20.N1297"
)
bad("spectrum of nothing", lambda b: rs.spectrum(b.rec, []), SiteError, "`sites` must be at least one site")
bad("spectrum top 49", lambda b: rs.spectrum(b.rec, "L0.N0", top=49), ArgumentError, "`top` must be .* 1..48 .* got 49")

# scores
bad("scores of text", lambda b: rs.scores("rec"), ArgumentError, NO_RECORDING)
bad("scores of neurn", lambda b: rs.scores(b.rec, kind="neurn"), ArgumentError, KINDS + r"'neurn'. Did .*'neuron'\?")
bad("scores under frosen", lambda b: rs.scores(b.rec, norm="frosen"), ArgumentError,
    r"`norm` must be one of frozen, own; got 'frosen'. Did you mean 'frozen'\?")  # fmt: skip
bad("scores of layer 3", lambda b: rs.scores(b.rec, layers=3), ArgumentError,
    "`layers` must be a whole number in -3..2 for LlamaForCausalLM; got 3. Count from the end with -1.")  # fmt: skip
bad("scores of layer -4", lambda b: rs.scores(b.rec, layers=[0, -4]), ArgumentError, "`layers` must be .* got -4")
bad("scores of heads where none are", lambda b: rs.scores(b.hybrid, kind="head", layers=1), SiteError,
    "`head` does not exist for .*: layer 1 has no attn writer")  # fmt: skip
bad("scores of neurons where none are", lambda b: rs.scores(b.hybrid, layers=[0, 2]), SiteError, "has no mlp writer")
bad("scores of no layers", lambda b: rs.scores(b.rec, layers=[]), ArgumentError, "at least one layer .* None means all")
bad(
    "scores of layers in text", lambda b: rs.scores(b.rec, layers="01"), ArgumentError, "`layers` must be None, a layer"
)
bad("scores of layer True", lambda b: rs.scores(b.rec, layers=True), ArgumentError, "`layers` must be .* got True")
bad("scores of layer 0.5", lambda b: rs.scores(b.rec, layers=[0.5]), ArgumentError, "`layers` must be .* got 0.5")
bad("scores of a matrix of layers", lambda b: rs.scores(b.rec, layers=np.zeros((2, 2), int)), ArgumentError, "`layers`")

# locate
bad("locate in text", lambda b: rs.locate("rec"), ArgumentError, NO_RECORDING)
bad("locate 0", lambda b: rs.locate(b.rec, k=0), ArgumentError, "`k` must be a whole number >= 1; got 0")
bad("locate -1", lambda b: rs.locate(b.rec, k=-1), ArgumentError, "`k` must be a whole number >= 1; got -1")
bad("locate True", lambda b: rs.locate(b.rec, k=True), ArgumentError, "`k` must be a whole number >= 1; got True")
bad("locate 2.0", lambda b: rs.locate(b.rec, k=2.0), ArgumentError, "`k` must be a whole number >= 1; got 2.0")
bad("locate '3'", lambda b: rs.locate(b.rec, k="3"), ArgumentError, "`k` must be a whole number >= 1; got '3'")
bad(
    "locate 2.5 in a tensor",
    lambda b: rs.locate(b.rec, k=torch.tensor(2.5)),
    ArgumentError,
    "`k` must be .* got tensor",
)
bad("locate 121", lambda b: rs.locate(b.rec, k=121), ArgumentError,
    "`k` must be a whole number in 1..120 for .*; got 121. There are 120 candidates of kind 'neuron'")  # fmt: skip
bad("locate 41 in a layer", lambda b: rs.locate(b.rec, k=41, layers=1), ArgumentError, "`k` must be .* 1..40 .* got 41")
bad("locate 49 heads", lambda b: rs.locate(b.rec, k=49, kind="head_source"), ArgumentError, "There are 48 candidates")
bad("locate heads", lambda b: rs.locate(b.rec, kind="heads"), ArgumentError, KINDS + r"'heads'. Did you mean 'head'\?")
bad("locate by log prob", lambda b: rs.locate(b.rec, score="logprob_increase"), ArgumentError,
    r"`score` must be one of log_prob_increase, .*; got .* Did you mean 'log_prob_increase'\?")  # fmt: skip
bad(
    "locate under a live norm",
    lambda b: rs.locate(b.rec, norm="live"),
    ArgumentError,
    "`norm` must be one of frozen, own",
)
bad("locate the worst 'yes'", lambda b: rs.locate(b.rec, worst="yes"), ArgumentError, "`worst` must be True or False")

# sources
bad("sources in text", lambda b: rs.sources("rec", "L0.N0"), ArgumentError, NO_RECORDING)
bad(
    "sources of a state",
    lambda b: rs.sources(b.rec, "L0.resid_pre"),
    SiteError,
    "`reader` must be a neuron .*; got L0.resid_pre",
)
bad("sources at other positions", lambda b: rs.sources(b.rec, "L1.attn"), ArgumentError, 'positions="all"')
bad("a side of a neuron", lambda b: rs.sources(b.rec, "L0.N0", side="key"), SiteError, "`side` must be left out")
bad(
    "a side of nothing known", lambda b: rs.sources(b.rec, "L0.H0", side="keys"), ArgumentError, "`side` must be one of"
)
bad("what feeds a neuron's attention", lambda b: rs.attention_sources(b.rec, "L1.N0"), SiteError,
    "`reader` must be a head such as L9.H4 .*; got L1.N0")  # fmt: skip
bad("cross-layer of L9", lambda b: rs.cross_layer(b.rec, [9]), ArgumentError, "layers")
bad(
    "queries of what is no neuron",
    lambda b: rs.query_subvalues(b.rec, "unembed"),
    SiteError,
    "`values` must be neurons",
)
bad("a graph of one node", lambda b: rs.source_graph(b.rec, nodes=1), ArgumentError, "`nodes` must be .* >= 2; got 1")
bad("a graph of one position", lambda b: rs.source_graph(b.rec), ArgumentError, 'positions="all"')
bad("verifying a table", lambda b: rs.verify("graph"), ArgumentError, "`graph` must be a graph from")
bad("faithfulness of nothing", lambda b: rs.faithfulness(None), ArgumentError, "`graph` must be a graph from")
bad("blame of a text", lambda b: rs.blame("rec", 1, 2), ArgumentError, "`rec` must be a recording")
bad("sources of L3", lambda b: rs.sources(b.rec, "L3.N0"), SiteError, THREE_LAYERS)
bad("sources of an idle expert", lambda b: rs.sources(b.mixture, f"L0.E{b.idle}.N1"), SiteError, "is not active")
bad("sources without an expert", lambda b: rs.sources(b.mixture, "L0.N1"), SiteError, "does not say which expert")
bad("sources where no neuron is", lambda b: rs.sources(b.hybrid, "L0.N1"), SiteError, "layer 0 has no mlp writer")
bad("sources by a router", lambda b: rs.sources(b.rec, "L0.N0", router="live"), ArgumentError,
    "`router` must be one of fixed, recomputed; got 'live'")  # fmt: skip
bad("sources of none", lambda b: rs.sources(b.rec, []), SiteError, "`reader` must be at least one reader")
bad("sources by layers", lambda b: rs.sources(b.rec, "L0.N0", grain="layers"), ArgumentError, GRAINS + r".*'layer'\?")
bad("sources under an own norm", lambda b: rs.sources(b.rec, "L0.N0", norm="own"), ArgumentError,
    "`norm` must be one of frozen, live; got 'own'")  # fmt: skip
bad("sources top 0", lambda b: rs.sources(b.rec, "L0.N0", top=0), ArgumentError, "`top` must be .* >= 1; got 0")

# interventions as values
bad("zero nothing", lambda b: rs.Zero([]), SiteError, "`sites` must be at least one site")
bad(
    "zero None", lambda b: rs.Zero(None), SiteError, "`sites` must be a site, its text, or a sequence of them; got None"
)
bad("zero a bias", lambda b: rs.Zero("L0.mlp.bias"), SiteError, "is a constant of the weights; operate on its sublayer")
bad("patch a constant", lambda b: rs.Patch("final_norm.bias", b.rec), SiteError, "is a constant of the weights")
bad("steer the rounding", lambda b: rs.Steer("rounding", b.vector), SiteError, "is a constant of the weights")
bad(
    "zero at None", lambda b: rs.Zero("L0.N0", positions=None), ArgumentError, "`positions` must be 'target', 'all', an"
)
bad("zero at 1.5", lambda b: rs.Zero("L0.N0", positions=[0, 1.5]), ArgumentError, "`positions` must be .* got 1.5")
bad("zero at True", lambda b: rs.Zero("L0.N0", positions=True), ArgumentError, "`positions` must be .* got True")
bad(
    "scale by NaN",
    lambda b: rs.Scale("L0.N0", float("nan")),
    ArgumentError,
    "`factor` must be a finite number; got nan",
)
bad("scale by inf", lambda b: rs.Scale("L0.N0", float("-inf")), ArgumentError, "`factor` must be a finite .* got -inf")
bad("scale by True", lambda b: rs.Scale("L0.N0", True), ArgumentError, "`factor` must be a finite number; got True")
bad("scale by text", lambda b: rs.Scale("L0.N0", "2"), ArgumentError, "`factor` must be a finite number; got '2'")
bad(
    "steer by NaN",
    lambda b: rs.Steer("L0.mlp", b.vector * torch.nan),
    ArgumentError,
    "`vector` must be .*finite numbers",
)
bad("steer by inf", lambda b: rs.Steer("L0.mlp", b.vector / 0), ArgumentError, "`vector` must be .*finite numbers")
bad(
    "steer by a matrix", lambda b: rs.Steer("L0.mlp", b.vector[None]), ArgumentError, r"`vector` must .*shape \(1, 24\)"
)
bad("steer by text", lambda b: rs.Steer("L0.mlp", "up"), ArgumentError, "`vector` must be finite numbers; got 'up'")
bad("steer by None", lambda b: rs.Steer("L0.mlp", None), ArgumentError, "`vector` or `toward` must be given to Steer")
bad("steer both ways", lambda b: rs.Steer("L0.mlp", b.vector, toward=3), ArgumentError, "`vector` or `toward` must be")
bad("steer a vector times 2", lambda b: rs.Steer("L0.mlp", b.vector, times=2.0), ArgumentError, "go with `toward`")
bad(
    "steer toward a float",
    lambda b: rs.Steer("L0.mlp", toward=1.5),
    ArgumentError,
    "`toward` must be a token's text",
)
bad("clamp a head", lambda b: rs.Clamp("L0.H1", 1.0), SiteError, "`sites` of Clamp must be a neuron")
bad("clamp at NaN", lambda b: rs.Clamp("L0.N1", float("nan")), ArgumentError, "`value` must be a finite number")
bad("attend to a head", lambda b: rs.Attend("L0.H1", 0.0), SiteError, r"must be a \(head, source\) pair")
bad("attend, perhaps renormalised", lambda b: rs.Attend("L0.H1<0", 0.0, renormalise=1), ArgumentError, "True or False")
bad("cut a site", lambda b: rs.Cut("L0.mlp"), SiteError, "`sites` of Cut must be an edge")
bad(
    "mean over nothing",
    lambda b: rs.Mean("L0.mlp", []),
    ArgumentError,
    "`over` must be at least one rec",
)
bad("mean over one prompt", lambda b: rs.Mean("L0.mlp", b.rec), ArgumentError, "`over` must be a sequence of rec")
bad("set a slice", lambda b: rs.Set("L0.N*", [1.0]), SiteError, "`sites` of Set must be single sites")
bad("set without values", lambda b: rs.Set(["L0.N1", "L0.N2"], [1.0]), ArgumentError, "one value for each of 2 sites")
bad("set everywhere", lambda b: rs.Set("L0.N1", [1.0], positions="all"), ArgumentError, "`positions` of Set must be")
bad(
    "set a position too many",
    lambda b: rs.Set("L0.N1", [[1.0]], positions=[1, 2]),
    ArgumentError,
    "one value a position",
)
bad(
    "align by magic",
    lambda b: rs.Patch("L0.mlp", b.rec, align="magic"),
    ArgumentError,
    "`align` must be None, 'index', 't",
)
bad("align by an array", lambda b: rs.Patch("L0.mlp", b.rec, align=b.vector), ArgumentError, "`align` must be None")
bad("patch from text", lambda b: rs.Patch("L0.mlp", "rec"), ArgumentError, "`donor` must be a recording from")
bad("patch from a vector", lambda b: rs.Patch("L0.mlp", b.vector), ArgumentError, "`donor` must be a recording from")

# intervene
bad("intervene on text", lambda b: rs.intervene("rec", rs.Zero("L0.N0")), ArgumentError, NO_RECORDING)
bad("intervene with nothing", lambda b: rs.intervene(b.rec, []), InterventionError, "must hold at least one operation")
bad("intervene with None", lambda b: rs.intervene(b.rec, None), InterventionError, NO_INTERVENTIONS + "None")
bad("intervene with a site", lambda b: rs.intervene(b.rec, "L0.N0"), InterventionError, NO_INTERVENTIONS + "'L0.N0'")
bad("intervene with sites", lambda b: rs.intervene(b.rec, ["L0.N0"]), InterventionError, NO_INTERVENTIONS + "'L0.N0'")
bad("intervene with a class", lambda b: rs.intervene(b.rec, rs.Zero), InterventionError, NO_INTERVENTIONS)
bad("intervene with a good and a bad one", lambda b: rs.intervene(b.rec, [rs.Zero("L0.N0"), 5]), InterventionError,
    NO_INTERVENTIONS + "5")  # fmt: skip
bad(
    "intervene with -1 movers",
    lambda b: rs.intervene(b.rec, rs.Zero("L0.N0"), movers=-1),
    ArgumentError,
    "`movers` must",
)
bad("zero in L3", on(lambda b: rs.Zero("L3.N0")), SiteError, THREE_LAYERS)
bad("zero in L-4", on(lambda b: rs.Zero("L-4.mlp")), SiteError, "`layer` must be in 0..2 .*; got -4")
bad("zero N40", on(lambda b: rs.Zero(["L0.N0", "L0.N40"])), SiteError, "`index` must be in 0..39 .* got 40")
bad("scale D6", on(lambda b: rs.Scale("L0.H0.D6", 2.0)), SiteError, "`index` must be in 0..5 .* got 6")
bad("zero a far source", on(lambda b: rs.Zero("L0.H0<4")), SiteError, "reads source position 4, but the predicting")
bad("zero a later source", on(lambda b: rs.Zero("L0.H0<2", positions=1)), SiteError,
    "`L0.H0<2` has no source 2 at position 1: attention is causal")  # fmt: skip
bad("zero a parallel mid", lambda b: rs.intervene(b.parallel, rs.Zero("L1.resid_mid")), SiteError,
    "`L1.resid_mid` does not exist for .* layer 1 is parallel .* Use resid_pre or resid_post")  # fmt: skip
bad("zero the mid of one writer", lambda b: rs.intervene(b.hybrid, rs.Zero("L1.resid_mid")), SiteError,
    "`L1.resid_mid` does not exist for .* layer 1 .* has one writer only, .* Use resid_pre or resid_post")  # fmt: skip
bad("zero a writer that is not", lambda b: rs.intervene(b.hybrid, rs.Zero("L0.mlp")), SiteError,
    "`L0.mlp` does not exist for .*: layer 0 has no mlp writer")  # fmt: skip
bad("zero an idle expert", lambda b: rs.intervene(b.mixture, rs.Zero(f"L0.E{b.idle}.N1")), SiteError, "is not active")
bad("zero an expert's bias", lambda b: rs.Zero("L0.E0.bias"), SiteError, "is a constant of the weights; operate on its")
bad("scale without an expert", lambda b: rs.intervene(b.mixture, rs.Scale("L0.N1", 2.0)), SiteError, "which expert")
bad("zero at 4", on(lambda b: rs.Zero("L0.mlp", positions=4)), PromptError, r"`positions` must be .* -4..3; got 4")
bad("zero at -5", on(lambda b: rs.Zero("L0.mlp", positions=[0, -5])), PromptError, r"`positions` must be .* got -5")
bad("zero at no token", on(lambda b: rs.Zero("L0.mlp", positions="Rome")), PromptError,
    "position 'Rome' is not a token of the prompt; candidates are 0: '#5'")  # fmt: skip
bad("zero at no position", on(lambda b: rs.Zero("L0.mlp", positions=[])), PromptError, "at least one position")
bad("zero twice", on(lambda b: rs.Zero("L0.N0"), lambda b: rs.Zero("L0.N0")), InterventionError,
    r"Zero\(\['L0.N0'\]\) and Zero\(\['L0.N0'\]\) both write L0.N0 at position 3. Keep one, or use Scale")  # fmt: skip
bad("zero the same site twice", on(lambda b: rs.Zero(["L0.N0", "L0.N0"])), InterventionError, "both write L0.N0 at")
bad("zero it under two names", on(lambda b: rs.Zero("L2.N0"), lambda b: rs.Zero("L-1.N0")), InterventionError,
    "both write L2.N0 at position 3")  # fmt: skip
bad("zero it at two names of a place", on(*(lambda b, at=at: rs.Zero("L0.H1", positions=at) for at in (3, -1))),
    InterventionError, "both write L0.H1 at position 3")  # fmt: skip
bad("zero a neuron in a zeroed MLP", on(lambda b: rs.Zero("L0.mlp"), lambda b: rs.Zero("L0.N3")), InterventionError,
    "both write L0.mlp and L0.N3, one inside the other, at position 3")  # fmt: skip
bad("zero a head in a scaled sublayer", on(lambda b: rs.Zero("L0.H1"), lambda b: rs.Scale("L0.attn", 2.0)),
    InterventionError, "both write L0.H1 and L0.attn, one inside the other")  # fmt: skip
bad("zero a source in a zeroed head", on(lambda b: rs.Zero("L0.H1"), lambda b: rs.Zero("L0.H1<2")), InterventionError,
    "both write L0.H1 and L0.H1<2, one inside the other")  # fmt: skip
bad("zero a coordinate and a source", on(lambda b: rs.Zero("L0.H1.D2"), lambda b: rs.Zero("L0.H1<2")),
    InterventionError, "both write L0.H1.D2 and L0.H1<2, one inside the other")  # fmt: skip
bad("zero the embedding and the state", on(lambda b: rs.Zero("embed"), lambda b: rs.Zero("L0.resid_pre")),
    InterventionError, "both write L0.resid_pre at position 3")  # fmt: skip
bad("zero a state twice", on(lambda b: rs.Zero("L0.resid_post"), lambda b: rs.Zero("L1.resid_pre")), InterventionError,
    "both write L0.resid_post and L1.resid_pre")  # fmt: skip
bad("patch what is steered", on(lambda b: rs.Patch("L0.mlp", b.everywhere), lambda b: rs.Steer("L0.mlp", b.vector)),
    InterventionError, "both write L0.mlp at position 3")  # fmt: skip
bad("steer by 23", on(lambda b: rs.Steer("L0.mlp", b.vector[1:])), ArgumentError,
    "`vector` must be 24 numbers for LlamaForCausalLM; got 23")  # fmt: skip
bad("patch from another model", on(lambda b: rs.Patch("L0.mlp", b.other)), InterventionError,
    "`donor` must be a recording of the same opened model")  # fmt: skip
bad("patch beyond another length", on(lambda b: rs.Patch("L0.mlp", b.short, positions=[2])), InterventionError,
    r"Patch.*position 2 \('#\d+'\) has no counterpart in .*: the donor has 2 tokens. Use align='token'")  # fmt: skip
bad("patch a token that is not there", on(lambda b: rs.Patch("L0.mlp", b.short, align="token")), InterventionError,
    "has no counterpart in .*: the donor has 0 tokens")  # fmt: skip
bad("patch from an unmapped position", on(lambda b: rs.Patch("L0.mlp", b.rec, align={0: 1})), InterventionError,
    "the mapping does not name it")  # fmt: skip
bad(
    "set a wide coefficient",
    on(lambda b: rs.Set("L0.N1", [[1.0, 2.0]])),
    ArgumentError,
    "`value of L0.N1` must be 1",
)
bad(
    "set a matrix",
    on(lambda b: rs.Set("L0.mlp", [b.vector.view(2, 12)])),
    ArgumentError,
    "`value of L0.mlp` must be",
)
bad("set one position twice", on(lambda b: rs.Set("L0.N1", [[1.0, 2.0]], positions=[1, 1])), InterventionError,
    "has 2 values for L0.N1, but is for 1 different positions")  # fmt: skip
bad(
    "measure where there is no token",
    lambda b: rs.intervene(b.rec, rs.Zero("L0.N1"), at=[9]),
    rs.PromptError,
    "-4..3; got 9",
)

# intervene_each
bad("no rows", lambda b: rs.intervene_each(b.rec, []), InterventionError, "`rows` must be a non-empty list")
bad("rows None", lambda b: rs.intervene_each(b.rec, None), InterventionError, "`rows` must be a non-empty list")
bad("rows 5", lambda b: rs.intervene_each(b.rec, 5), InterventionError, "`rows` must be a non-empty list")
bad(
    "rows one intervention", lambda b: rs.intervene_each(b.rec, rs.Zero("L0.N0")), InterventionError, "`rows` must be a"
)
bad(
    "rows an empty row", lambda b: rs.intervene_each(b.rec, [[rs.Zero("L0.N0")], []]), InterventionError, "at least one"
)
bad("rows a late bad one", lambda b: rs.intervene_each(b.rec, [rs.Zero("L0.N0"), rs.Zero("L3.N0")]), SiteError,
    THREE_LAYERS)  # fmt: skip
bad("rows of text", lambda b: rs.intervene_each("rec", [rs.Zero("L0.N0")]), ArgumentError, NO_RECORDING)

# facts, check, check_families, operate, plot_stream
bad(
    "families of lama", lambda b: rs.check_families(["lama"]), ArgumentError, "`types` must be causal-LM types .*'lama'"
)
bad("families in int8", lambda b: rs.check_families(["llama"], dtype="int8"), ArgumentError, "`dtype` must be one of")
bad("facts of captial", lambda b: rs.facts("captial"), PromptError, r"`kind` must be one of .*Did you mean 'capital'\?")
bad("facts of None", lambda b: rs.facts(None), PromptError, "`kind` must be one of language, .* got None")
bad("facts top 0", lambda b: rs.facts("month", model=b.model, top=0), ArgumentError, "`top` must be .* >= 1; got 0")
bad("facts of a name", lambda b: rs.facts("month", model="smollm2-135m"), ArgumentError, NO_MODEL)
bad("facts without tokenizer", lambda b: rs.facts("month", model=b.model), PromptError, "opened without a tokenizer")
bad("check a name", lambda b: rs.check("smollm2-135m"), ArgumentError, NO_MODEL)
bad("check a raw module", lambda b: rs.check(b.module), ArgumentError, NO_MODEL)
bad("check a recording", lambda b: rs.check(b.rec), ArgumentError, NO_MODEL)
bad("operate on a name", lambda b: rs.operate("smollm2-135m", prompt()), ArgumentError, NO_MODEL)
bad("operate on text", lambda b: rs.operate(b.model, "The"), PromptError, "`prompt` must be a resid_surgery.Prompt")
bad(
    "operate on a recording",
    lambda b: rs.operate(b.model, b.rec),
    PromptError,
    "`prompt` must be a resid_surgery.Prompt",
)
bad("operate on 0", lambda b: rs.operate(b.model, prompt(), k=0), ArgumentError, "`k` must be a whole number .*; got 0")
bad("operate on 1.0", lambda b: rs.operate(b.model, prompt(), k=1.0), ArgumentError, "`k` must be .*; got 1.0")
bad("operate on 121", lambda b: rs.operate(b.model, prompt(), k=121), ArgumentError, "`k` must be .*1..120 .*; got 121")
bad(
    "operate with no readers",
    lambda b: rs.operate(b.model, prompt(), readers=0),
    ArgumentError,
    "`readers` must be .* 0",
)
bad(
    "plot text",
    lambda b: rs.plot_stream("stream"),
    ArgumentError,
    "`stream` must be a table from resid_surgery.stream_bs",
)


# arguments that many verbs share: seeds, bars, flags, paths, sequences, tensors without numbers
bad("a bar of words", lambda b: rs.locate(b.rec, progress="no"), ArgumentError, "`progress` must be True or False; got")
bad("scores with a bar of 1", lambda b: rs.scores(b.rec, progress=1), ArgumentError, "`progress` must be True or False")
bad("sweep with a bar of 0", lambda b: rs.sweep(b.rec, [rs.Zero("L0.mlp")], progress=0), ArgumentError, "`progress`")
bad("a layer that is a flag's tensor", lambda b: rs.scores(b.rec, layers=torch.tensor(True)), ArgumentError, "`layers`")
bad(
    "a layer on no device", lambda b: rs.scores(b.rec, layers=torch.empty((), device="meta")), ArgumentError, "`layers`"
)
bad("a factor beyond floats", lambda b: rs.Scale("L0.N0", 10**400), ArgumentError, "`factor` must be a finite number")
bad(
    "a factor on no device", lambda b: rs.Scale("L0.N0", torch.empty((), device="meta")), ArgumentError, "`factor` must"
)
bad(
    "a factor that is complex",
    lambda b: rs.Scale("L0.N0", torch.tensor(1j)),
    ArgumentError,
    "`factor` must be a finite",
)
bad("values that are flags", lambda b: rs.Set("L0.N0", [True]), ArgumentError, "`values` must be finite numbers|`value")
bad("sites in a tensor", lambda b: rs.Zero(torch.tensor(1)), SiteError, "`sites` must be a site, its text, or a seq")
bad(
    "positions in a float's tensor",
    lambda b: rs.Zero("L0.N0", positions=torch.tensor(0.5)),
    ArgumentError,
    "`positions`",
)
bad(
    "positions on no device", lambda b: rs.Zero("L0.N0", positions=torch.empty(2, device="meta")), ArgumentError, "`pos"
)
bad("positions in lists", lambda b: rs.Zero("L0.N0", positions=[[0]]), ArgumentError, "`positions` must be 'target'")
bad("a mean over a number", lambda b: rs.Mean("L0.N0", torch.tensor(1)), ArgumentError, "`over` must be a sequence of")
bad(
    "a value that cannot be shown", lambda b: rs.Scale("L0.N0", Faceless()), ArgumentError, "got a Faceless that cannot"
)
bad("a text of a megabyte", lambda b: rs.scores(b.rec, kind="a" * 10**6), ArgumentError, KINDS + r"'a{20,}\.{4}$")
bad(
    "a competitor of a megabyte",
    lambda b: rs.scores(b.rec, versus=["a" * 10**6]),
    PromptError,
    "`versus` must|tokenizer",
)
bad(
    "bytes for competitors",
    lambda b: prompt(versus=b"ab"),
    PromptError,
    "`versus` must be a sequence of tokens; got b'ab'",
)
bad("a mapping of competitors", lambda b: prompt(versus={1: 2}), PromptError, "`versus` must be a sequence of tokens")
bad(
    "times in a number",
    lambda b: rs.probability_curve(b.rec, ["L0.N0"], times=torch.tensor(1)),
    ArgumentError,
    "`times`",
)
bad(
    "names that are no names",
    lambda b: rs.add_bs_values([1], [[1]], tokens=5),
    ArgumentError,
    "`tokens` must be None, or",
)
bad(
    "numbers in one number", lambda b: rs.add_bs_values(torch.tensor(1.0), [[1]]), ArgumentError, "`x` must be a row of"
)
bad("cumulated of a text", lambda b: rs.cumulated("rec", layer=0), ArgumentError, NO_RECORDING)
bad(
    "patterns of 10**30",
    lambda b: rs.head_patterns(b.model, 10**30),
    ArgumentError,
    "`n` must be .* in 1..100000; got 1",
)
bad(
    "patterns of a far seed",
    lambda b: rs.head_patterns(b.model, 1, seed=2**63),
    ArgumentError,
    "`seed` must be a whole",
)
bad("the MLP's input of layer 3", lambda b: b.rec.resid_mid(3), ArgumentError, "`layer` must be .* in -3..2; got 3")
bad(
    "a tiny list", lambda b: rs.tiny(["llama"]), zoo.NotBuildableError, r"\['llama'\] is not a causal-LM type that this"
)
bad(
    "run where a flag is a list",
    lambda b: rs.record(b.model, prompt(), remote=np.array([1, 2])),
    ArgumentError,
    "`remote`",
)
bad(
    "load on device 10**30",
    lambda b: rs.load("./x", device=10**30),
    ArgumentError,
    "`device` must be a torch device such",
)
bad(
    "load a name of 300 letters",
    lambda b: rs.load("a" * 300),
    ArgumentError,
    r"`model` must be .*No file can have that name",
)
bad("load from nobody's home", lambda b: rs.load("~nobody-is-here/x"), ArgumentError, "No file can have that name")
bad(
    "steps of a text",
    lambda b: rs.progress("doing", "3").__enter__(),
    ArgumentError,
    "`total` must be a whole number >= 0",
)

# surgery: files and sweeps
bad(
    "save to bytes",
    lambda b: rs.save_interventions(b"a.json", rs.Zero("L0.N0")),
    ArgumentError,
    "`path` must be the path",
)
bad(
    "save to a null",
    lambda b: rs.save_interventions("\0.json", rs.Zero("L0.N0")),
    ArgumentError,
    "No file can have that",
)
bad(
    "save to what is no text",
    lambda b: rs.save_interventions("\ud800.json", rs.Zero("L0.N0")),
    ArgumentError,
    "No file can",
)
bad(
    "load from a long name",
    lambda b: rs.load_interventions("a" * 300 + ".json"),
    ArgumentError,
    "No file can have that",
)
bad(
    "a grid at an array",
    lambda b: rs.grid(b.rec, rs.Zero, "L0.H0", positions=np.array([])),
    PromptError,
    "at least one pos",
)
bad(
    "a sweep in chunks of 0",
    lambda b: rs.sweep(b.rec, [rs.Zero("L0.N0")], chunk=0),
    ArgumentError,
    "`chunk` must be a whole",
)
bad(
    "a sweep that measures much",
    lambda b: rs.sweep(b.rec, [rs.Zero("L0.N0")], measure="much"),
    ArgumentError,
    "`measure`",
)
bad("additivity of one", lambda b: rs.additivity(b.rec, [rs.Zero("L0.N0")]), InterventionError, "`interventions` must")
bad("a ledger where nothing was measured", lambda b: b.effect.ledger([]), ArgumentError, "`position` must be one of")

# evidence
bad("families of 5", lambda b: rs.check_families(5), ArgumentError, "`types` must be causal-LM types .*; got 5")
bad(
    "families of none",
    lambda b: rs.check_families([]),
    ArgumentError,
    r"`types` must be None, or at least one .* got \[\]",
)
bad(
    "families, each told to a text",
    lambda b: rs.check_families(["llama"], each="x"),
    ArgumentError,
    "`each` must be None",
)
bad(
    "bootstrap by a number",
    lambda b: rs.bootstrap(TRIALS, 5, "x"),
    ArgumentError,
    "`by` must be names of columns; got 5",
)
bad(
    "bootstrap of a list",
    lambda b: rs.bootstrap(TRIALS, "arm", ["x"]),
    ArgumentError,
    r"`value` must be a text; got \['x'\]",
)
bad(
    "bootstrap against a list",
    lambda b: rs.bootstrap(TRIALS, "arm", "x", against=["a"]),
    ArgumentError,
    "`against` must be",
)
bad(
    "bootstrap of 10**30 draws",
    lambda b: rs.bootstrap(TRIALS, "arm", "x", resamples=10**30),
    ArgumentError,
    "`resamples`",
)
bad(
    "bootstrap of 99 draws",
    lambda b: rs.bootstrap(TRIALS, "arm", "x", resamples=99),
    ArgumentError,
    "`resamples` must be",
)
bad(
    "bootstrap with confidence 1",
    lambda b: rs.bootstrap(TRIALS, "arm", "x", confidence=1),
    ArgumentError,
    "between 0 and 1",
)
bad(
    "bootstrap of a column that is not",
    lambda b: rs.bootstrap(TRIALS, "arm", "y"),
    ArgumentError,
    "columns of the table; got 'y'",
)
bad(
    "bootstrap of a long name",
    lambda b: rs.bootstrap(TRIALS, "arm", "y" * 10**6),
    ArgumentError,
    "columns of the table; got 'yyy",
)
bad(
    "effects of the best half",
    lambda b: rs.score_against_effect(b.rec, best=0.5),
    ArgumentError,
    "`best` must be a whole",
)
bad(
    "effects of other tokens",
    lambda b: rs.score_against_effect(b.rec, also=[97]),
    ArgumentError,
    "`also` must be .*0..96; got 97",
)
bad(
    "draws without end",
    lambda b: rs.ablation_test(b.model, [prompt()], draws=10**30),
    ArgumentError,
    "`draws` must be .*10000",
)

# editing
bad(
    "a rewrite without a subject",
    lambda b: rs.Rewrite("The x is", "y", " z"),
    PromptError,
    "`subject` must be a part of the",
)
bad(
    "a rewrite of a megabyte",
    lambda b: rs.Rewrite("a" * 10**6, "b", " c"),
    PromptError,
    r"`subject` must be a part .*a\.\.\. *;|got",
)
bad(
    "a rewrite to the same",
    lambda b: rs.Rewrite("The x is", "x", " y", " y"),
    PromptError,
    "another answer than the old",
)
bad("a rewrite to nothing", lambda b: rs.Rewrite("The x is", "x"), PromptError, "`new` must be given")
bad(
    "a rewrite with a name of 5",
    lambda b: rs.Rewrite("The x is", "x", " y", name=5),
    PromptError,
    "`name` must be a text; got 5",
)
bad("a probe of nothing", lambda b: rs.Probe("locality", " "), PromptError, "`text` must be a non-empty text; got ' '")
bad(
    "a probe on no axis",
    lambda b: rs.Probe("localty", "x"),
    PromptError,
    r"`axis` must be one of .*Did you mean 'locality'\?",
)
bad("a choice of nothing", lambda b: rs.Probe("choice", "x", target=" y"), PromptError, "at least one wrong answer")
bad(
    "a choice of letters",
    lambda b: rs.Probe("choice", "x", target=" y", wrong="ab"),
    PromptError,
    "`wrong` must be a sequence",
)
bad(
    "a choice of numbers",
    lambda b: rs.Probe("choice", "x", target=" y", wrong=[1]),
    PromptError,
    "`wrong` must be a sequence of t",
)
bad(
    "others that are one",
    lambda b: rs.Probe("text", "x", others=None),
    PromptError,
    "`others` must be a sequence of texts; got N",
)
bad(
    "conditions in threes",
    lambda b: rs.Probe("text", "x", conditions=[("a", "b", "c")]),
    PromptError,
    r"\(prompt, answer\) pairs",
)
bad(
    "probes that are texts",
    lambda b: rs.ProbeSet(("x",)),
    PromptError,
    "`probes` must be a sequence of rs.Probe; got 'x'",
)
bad("probes in None", lambda b: rs.ProbeSet(None), PromptError, "`probes` must be a sequence of rs.Probe; got None")
bad("probes called 5", lambda b: rs.ProbeSet((), 5), PromptError, "`name` must be a text; got 5")
bad(
    "probes of other rewrites",
    lambda b: rs.ProbeSet((), "x", ("y",)),
    PromptError,
    "`rewrites` must be a sequence of rs.Rewrite",
)
bad("probes of a fact of 5", lambda b: rs.ProbeSet(()).of(fact=5), ArgumentError, "`fact` must be a text; got 5")
bad(
    "probes of no kind",
    lambda b: rs.probes(kinds=[]),
    ArgumentError,
    r"`kinds` must be None, or at least one type of facts",
)
bad(
    "probes with seed True", lambda b: rs.probes(seed=True), ArgumentError, "`seed` must be a whole number .*; got True"
)
bad(
    "save probes nowhere",
    lambda b: rs.save_probes("/nowhere/x", []),
    LoadError,
    "the probes cannot be written to /nowhere/x",
)
bad(
    "read probes of a null",
    lambda b: rs.read_probes("a\0b"),
    ArgumentError,
    "`path` must be .* No file can have that name",
)
bad(
    "a policy of a list",
    lambda b: rs.Policy(single=[]),
    ArgumentError,
    r"`single` must be a mapping from gates to \(warn, fail\)",
)
bad("a policy but a list", lambda b: rs.Policy().but([1]), ArgumentError, "`changes` must be a mapping from gates to")
bad(
    "a policy's limits, perhaps of a stream",
    lambda b: rs.Policy().limits("retention", stream=1),
    ArgumentError,
    "`stream` must",
)
bad(
    "a policy limited on no gate",
    lambda b: rs.Policy().limited("kl", stream=True),
    ArgumentError,
    "`gate` must be one of",
)
bad("an edit of None", lambda b: rs.Edit(None), ArgumentError, "`changes` must be a sequence of Change; got None")
bad("an edit of texts", lambda b: rs.Edit(("x",)), ArgumentError, "`changes` must be a sequence of Change")
bad("an edit by a method of 5", lambda b: rs.Edit((), method=5), ArgumentError, "`method` must be a text; got 5")
bad("an edit about a list", lambda b: rs.Edit((), about=[]), ArgumentError, r"`about` must be a mapping; got \[\]")
bad(
    "an edit fitted by words",
    lambda b: rs.Edit((), fitting="x"),
    ArgumentError,
    "`fitting` must be a DataFrame; got 'x'",
)
bad(
    "an edit times NaN",
    lambda b: rs.Edit(()).scaled(float("nan")),
    ArgumentError,
    "`factor` must be a finite number; got nan",
)
bad("an edit applied to a name", lambda b: rs.Edit(()).applied("x").__enter__(), ArgumentError, NO_MODEL)
bad("an edit's tensors of a name", lambda b: rs.Edit(()).new_tensors("x"), ArgumentError, NO_MODEL)
bad(
    "an edit applied perhaps strictly",
    lambda b: rs.Edit(()).new_tensors(b.model, strict=1),
    ArgumentError,
    "`strict` must be",
)
bad("an edit from no base", lambda b: rs.Edit.from_models("x", b.module), ArgumentError, NO_MODEL)
bad("an edit from an adapter of no base", lambda b: rs.Edit.from_peft(None, "x"), ArgumentError, NO_MODEL)
bad("an edit from a long name", lambda b: rs.Edit.load("a" * 300), ArgumentError, "No file can have that name")
bad(
    "an edit to a text file",
    lambda b: rs.Edit(()).save("x.txt"),
    ArgumentError,
    "`path` must be the path of a .safetensors",
)
bad(
    "read an edit of 5",
    lambda b: rs.read_edit(b.model, 5),
    ArgumentError,
    "`source` must be a .safetensors file, a folder",
)
bad("coefficients at an array", lambda b: rs.edit_coefficients(b.model, "L0.N0", 0.0, positions=np.array([])),
    ArgumentError,
    "`positions` must be 'all' for an edit of weights")  # fmt: skip
bad("coefficients for no facts", lambda b: rs.edit_coefficients(b.model, "L0.N0", 0.0, rewrites=None), ArgumentError,
    "`rewrites` must be a sequence of Rewrite; got None")  # fmt: skip
bad(
    "coefficients, perhaps baked",
    lambda b: rs.edit_coefficients(b.model, "L0.N0", 0.0, baked=1),
    ArgumentError,
    "`baked` must",
)
bad("coefficients times two of three", lambda b: rs.edit_coefficients(b.model, ["L0.N0", "L0.N1"], [1.0]),
    ArgumentError,
    "`factor` must be one number, or one for each of 2 sites")  # fmt: skip
bad("validate a name", lambda b: rs.validate("x", rs.Edit(())), ArgumentError, NO_MODEL)
bad(
    "validate with seed True",
    lambda b: rs.validate(b.model, rs.Edit(()), seed=True),
    ArgumentError,
    "`seed` must be a whole",
)
bad(
    "validate with seed -1",
    lambda b: rs.validate(b.model, rs.Edit(()), seed=-1),
    ArgumentError,
    "`seed` must be .*; got -1",
)
bad(
    "validate, perhaps in general",
    lambda b: rs.validate(b.model, rs.Edit(()), general="no"),
    ArgumentError,
    "`general` must be",
)
bad(
    "validate within no budget",
    lambda b: rs.validate(b.model, rs.Edit(()), budget="smok"),
    ArgumentError,
    "`budget` must be",
)
bad(
    "exposure of a number",
    lambda b: rs.exposure_against_kl(b.model, rs.Edit(()), None),
    ArgumentError,
    "`texts` must be a seq",
)
bad(
    "exposure of half a token",
    lambda b: rs.exposure_against_kl(b.model, rs.Edit(()), ["x"], tokens=0.5),
    ArgumentError,
    "`tokens`",
)
bad("compare texts", lambda b: rs.diff_reports("a", "b"), LoadError, "the report 'a' cannot be read")

# experiments
bad("a plan that does nothing", lambda b: rs.Plan(), ArgumentError, "`Plan` must locate or intervene; it does neither")
bad("a plan of False", lambda b: rs.Plan(False), ArgumentError, "arm main.* must be a list of operations; got False")
bad(
    "a plan located in a list",
    lambda b: rs.Plan({"kind": "Zero", "sites": "L0.N0"}, []),
    ArgumentError,
    "`locate` must be a map",
)
bad(
    "a plan with axes of an array",
    lambda b: rs.Plan(rs.Zero("L0.N0"), axes=np.array([])),
    ArgumentError,
    "`axes` must be a map",
)
bad(
    "a plan known of 1",
    lambda b: rs.Plan(rs.Zero("L0.N0"), known=1),
    ArgumentError,
    "`known` must be True or False; got 1",
)
bad(
    "a plan with seed 2**63",
    lambda b: rs.Plan(rs.Zero("L0.N0"), seed=2**63),
    ArgumentError,
    "`seed` must be a whole number in",
)
bad(
    "a plan that measures much",
    lambda b: rs.Plan(rs.Zero("L0.N0"), measure="much"),
    ArgumentError,
    "`measure` must be one of",
)
bad(
    "a plan of a text", lambda b: rs.Plan.of("plan"), ArgumentError, "`plan` must be a resid_surgery.Plan, or a mapping"
)
bad(
    "a plan to a text file",
    lambda b: rs.Plan(rs.Zero("L0.N0")).save("plan.txt"),
    ArgumentError,
    "the path of a .json file",
)
bad(
    "run in bytes",
    lambda b: rs.run(b.model, [prompt()], rs.Plan(rs.Zero("L0.N0")), out=b"x"),
    ArgumentError,
    "`out` must be the p",
)
bad(
    "run in a long name",
    lambda b: rs.run(b.model, [prompt()], rs.Plan(rs.Zero("L0.N0")), out="a" * 300),
    ArgumentError,
    "No file can",
)
bad(
    "open a run in a null",
    lambda b: rs.open_run("a\0b"),
    ArgumentError,
    "`out` must be the path of a folder; .* No file can have",
)
bad(
    "read cases of 5",
    lambda b: rs.read_cases(5),
    ArgumentError,
    "`path` must be the path of a file of JSON lines; got 5",
)
bad("a case of a text", lambda b: rs.Case("x"), PromptError, "`prompt` must be")
bad(
    "a cluster at an array",
    lambda b: rs.OnRay(address=np.array([1, 2])),
    ArgumentError,
    "`address` must be None, 'auto'",
)
bad("half a worker", lambda b: rs.OnRay(workers=0.5), ArgumentError, "`workers` must be a whole number >= 1; got 0.5")

# views
bad("a report of a number", lambda b: rs.write_report(5, "x.html"), ArgumentError, "`value` must be")
bad(
    "a report to a text file",
    lambda b: rs.write_report(TRIALS, "x.txt"),
    ArgumentError,
    "`path` must be a file name that ends",
)
bad(
    "a report, perhaps interactive",
    lambda b: rs.write_report(TRIALS, "x.html", interactive=1),
    ArgumentError,
    "`interactive`",
)
bad(
    "a figure of no table",
    lambda b: rs.plot_counts("x"),
    ArgumentError,
    "`table` must be a table from resid_surgery.counts; got 'str'",
)
bad(
    "a figure of other columns", lambda b: rs.plot_counts(TRIALS), ArgumentError, "`table` must be one with the columns"
)
bad("figure 4 of the paper", lambda b: rs.plot_paper(b.rec, 4), ArgumentError, "`figure` must be one of 3, 5, 6")


@pytest.mark.parametrize(("call", "error", "said"), TABLE)
def test_a_bad_call_gives_one_clear_error_before_any_forward_runs(
    bench: Bench, forwards: list[str], call: Call, error: type[ResidSurgeryError], said: str
) -> None:
    with pytest.raises(ResidSurgeryError, match=said) as caught:
        call(bench)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert forwards == []


def test_the_table_is_long_and_says_each_thing_once() -> None:
    names = [row.id for row in TABLE]
    assert len(names) >= 330
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("module", WHO_RUNS_FORWARDS, ids=lambda m: m.__name__)
def test_good_calls_are_seen_to_run_forwards(bench: Bench, forwards: list[str], module: Any) -> None:
    """The counter that the table relies on counts in every module."""
    model = rs.load(tiny.build("llama"), tokenizer=word_tokenizer())
    runs: dict[Any, Callable[[], object]] = {
        wiring: lambda: rs.load(tiny.build("llama")),
        settling: lambda: rs.load(tiny.build("llama")),
        recording: lambda: rs.record(bench.model, prompt()),
        closing: lambda: rs.load(tiny.build("llama")),
        knowing: lambda: knowing._known(model, [rs.record(model, prompt()).prompt], torch.tensor([9, 10]), 5),
        engine: lambda: rs.intervene(bench.rec, rs.Zero("L0.N0")),
        checking: lambda: rs.check(bench.model),
    }
    forwards.clear()
    assert runs[module]() is not None
    assert module.__name__ in forwards


def test_the_recording_is_as_good_as_before_after_every_bad_call(bench: Bench) -> None:
    before = rs.decompose(bench.rec)
    for row in TABLE:
        with contextlib.suppress(Exception):
            row.values[0](bench)
    assert rs.decompose(bench.rec).equals(before)
    assert float(rs.intervene(bench.rec, rs.Zero("L0.N0")).table["closure"].max()) < 1e-6


# --- calls that look odd and are good -----------------------------------------------------------


@pytest.mark.parametrize(
    "layers", [[0, 2], (2, 0), range(0, 3, 2), {0, -1}, np.array([0, 2]), torch.tensor([2, 0, 2])], ids=str
)
def test_any_sequence_of_layers_is_taken(bench: Bench, layers: Any) -> None:
    assert set(rs.scores(bench.rec, layers=layers)["layer"]) == {0, 2}


@pytest.mark.parametrize("layer", [1, -2, np.int64(1), torch.tensor(1)], ids=repr)
def test_one_layer_is_taken(bench: Bench, layer: Any) -> None:
    assert set(rs.scores(bench.rec, layers=layer)["layer"]) == {1}


@pytest.mark.parametrize("k", [3, np.int32(3), torch.tensor(3)], ids=repr)
def test_any_whole_number_is_taken(bench: Bench, k: Any) -> None:
    assert len(rs.locate(bench.rec, k=k).sites) == 3


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param(lambda: [0, 3], id="list"),
        pytest.param(lambda: (0, -1), id="tuple"),
        pytest.param(lambda: np.array([0, 3]), id="array"),
        pytest.param(lambda: torch.tensor([0, 3]), id="tensor"),
        pytest.param(lambda: iter([0, 3]), id="iterator"),
        pytest.param(lambda: ["#5", "target"], id="texts"),
    ],
)
def test_any_sequence_of_positions_is_taken_and_shown(bench: Bench, positions: Any) -> None:
    wanted = rs.intervene(bench.rec, rs.Zero("L0.mlp", positions=[0, 3])).table
    effect = rs.intervene(bench.rec, rs.Zero("L0.mlp", positions=positions()))
    assert effect.table.equals(wanted)
    assert "positions=" in repr(effect)


@pytest.mark.parametrize("factor", [2, 2.0, np.float64(2), np.float32(2), np.int64(2)], ids=repr)
def test_any_finite_number_is_a_factor(bench: Bench, factor: Any) -> None:
    assert rs.Scale("L0.N0", factor) == rs.Scale("L0.N0", 2.0)


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda ones: (one for one in ones)])
def test_any_iterable_of_interventions_is_run_and_remembered(bench: Bench, wrap: Callable[[Any], Any]) -> None:
    ones = [rs.Zero("L0.N0"), rs.Scale("L1.N1", 2.0)]
    effect = rs.intervene(bench.rec, wrap(ones))
    assert effect.interventions == tuple(ones)
    assert effect.table.equals(rs.intervene(bench.rec, ones).table)


def test_scales_and_steers_may_meet_in_one_place(bench: Bench) -> None:
    both = [rs.Scale("L0.mlp", 2.0), rs.Scale("L0.N3", 0.5), rs.Steer("L0.mlp", bench.vector)]
    one, other = (rs.intervene(bench.rec, order).table for order in (both, both[::-1]))
    assert one.equals(other)
    assert one["bs_change"].abs().max() > 0


def test_one_donor_may_serve_everywhere_when_it_was_recorded_everywhere(bench: Bench) -> None:
    donor = rs.record(bench.model, prompt([1, 2, 3, 4]), positions="all")
    effect = rs.intervene(bench.rec, rs.Patch("embed", donor, positions="all"))
    wanted = rs.record(bench.model, prompt([1, 2, 3, 4], versus=[10])).bs_values
    assert torch.allclose(effect.after.bs, wanted, atol=1e-6)


def test_a_spectrum_of_several_sites_is_the_spectra_of_each(bench: Bench) -> None:
    sites = ["L0.N0", rs.Head(2, 1), "embed"]
    both = rs.spectrum(bench.rec, sites, top=3)
    for site in sites:
        one = rs.spectrum(bench.rec, site, top=3)
        found = both[both["site"] == str(site)].reset_index(drop=True)
        assert list(found["token_id"]) == list(one["token_id"])
        assert np.allclose(found["bs_value"], one["bs_value"])
    assert set(both["site"]) == set(map(str, sites))

"""The main job on one prompt: locate, trace sources, ablate, measure; every number closing.

1. Record the prompt and split the stream into addends.
2. Locate the best neurons and (head, source) pairs, exactly.
3. Trace what switched the best neurons on.
4. Zero the located subvalues one by one and together, and split what that did to the logits.
"""

import time
from dataclasses import dataclass
from typing import final

import pandas as pd

from resid_surgery._check import whole
from resid_surgery.attribution.locating import Located, locate
from resid_surgery.attribution.sources import sources
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording, need_model, record
from resid_surgery.stream.tables import bs_columns, decompose, predictions, spectrum, stream_bs
from resid_surgery.surgery.effects import Effect, intervene_each
from resid_surgery.surgery.interventions import Zero


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Operated:
    """Everything that `operate` found out about one prediction.

    Attributes:
        rec: the recording. predictions: the model's top tokens. ledger: `decompose` at layer grain.
        stream: bs-values along the stream. neurons, attention: the located subvalues.
        spectra: what each located subvalue promotes and suppresses.
        sources: of the best neurons, at layer and at subvalue grain.
        singles: one `Effect` per located subvalue. together: all neurons, all attention
            subvalues, and everything, zeroed at once.
        seconds: stage -> wall time.
    """

    rec: Recording
    predictions: pd.DataFrame
    ledger: pd.DataFrame
    stream: pd.DataFrame
    neurons: Located
    attention: Located
    spectra: pd.DataFrame
    sources: pd.DataFrame
    singles: tuple[Effect, ...]
    together: dict[str, Effect]
    seconds: dict[str, float]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All located sites, neurons first."""
        return (*self.neurons.sites, *self.attention.sites)

    def effects(self) -> pd.DataFrame:
        """One row per ablation and token: the effect tables under the name of what was zeroed."""
        named = [(str(site), effect) for site, effect in zip(self.sites, self.singles, strict=True)]
        frames = []
        for name, effect in [*named, *self.together.items()]:
            table = effect.table.copy()
            table.insert(0, "zeroed", name)
            frames.append(table)
        return pd.concat(frames, ignore_index=True)

    def closure(self) -> dict[str, float]:
        """Largest closure residual of each kind of sum, in logits (pre-activation for sources)."""
        return {
            "ledger": float(self.ledger["closure"].max()),
            "sources": float(self.sources["closure"].max()),
            "effects": float(self.effects()["closure"].max()),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name; what ``--out`` writes."""
        p = self.rec.prompt
        readouts = [(c, p.names[i], i, r) for c, (i, _, r) in zip(bs_columns(self.rec), p.roles(), strict=True)]
        return {
            "columns": pd.DataFrame(readouts, columns=["column", "token", "token_id", "role"]),
            "predictions": self.predictions,
            "ledger": self.ledger,
            "stream": self.stream,
            "neurons": self.neurons.table,
            "attention": self.attention.table,
            "spectra": self.spectra,
            "sources": self.sources,
            "effects": self.effects(),
            "ledger_change": self.together["all of them"].ledger(),
        }


def operate(model: OpenedModel, prompt: Prompt, *, k: int = 10, readers: int = 3) -> Operated:
    """Locate, trace sources, ablate and measure one prediction.

    Args:
        model: from `resid_surgery.load`. prompt: with target and competitors.
        k: neurons, and attention subvalues, to locate. readers: best neurons whose sources are
            traced.

    Returns:
        `Operated`.

    Raises:
        PromptError, ArgumentError: the prompt or a number is no good.
    """
    need_model(model)
    most = sum(size.d_mlp + size.n_experts * size.d_expert for size in model.anatomy.sizes)
    if not most or not model.anatomy.n_heads:
        raise ArgumentError(f"`model` must have neurons and attention heads to operate on; {model.name} has not.")
    k = whole("k", k, 1, most, model=model.name)
    readers = whole("readers", readers, 1)
    clock = _Clock()
    rec = record(model, prompt)
    clock.lap("record")
    ledger, stream, predicted = decompose(rec), stream_bs(rec), predictions(rec)
    clock.lap("decompose")
    k = whole("k", k, 1, sum(len(g.coefficient) for one in rec.layers for g in one.groups), model=model.name)
    pairs = sum(size.n_heads for size in model.anatomy.sizes) * (rec.prompt.position + 1)
    neurons = locate(rec, k=k, kind="neuron")
    attention = locate(rec, k=min(k, pairs), kind="head_source")
    clock.lap("locate")
    sites = (*neurons.sites, *attention.sites)
    spectra = spectrum(rec, sites, top=min(8, model.vocab_size // 2))
    clock.lap("spectra")
    best = neurons.sites[:readers]
    traced = pd.concat([sources(rec, best, grain=grain, top=5) for grain in ("layer", "subvalue")], ignore_index=True)
    clock.lap("sources")
    groups = {"the neurons": neurons.sites, "the attention subvalues": attention.sites, "all of them": sites}
    effects = intervene_each(rec, [[Zero(one)] for one in (*sites, *groups.values())])
    clock.lap("ablate")
    return Operated(
        rec=rec,
        predictions=predicted,
        ledger=ledger,
        stream=stream,
        neurons=neurons,
        attention=attention,
        spectra=spectra,
        sources=traced,
        singles=tuple(effects[: len(sites)]),
        together=dict(zip(groups, effects[len(sites) :], strict=True)),
        seconds=clock.laps,
    )


@final
class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

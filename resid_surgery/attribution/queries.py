"""Queries: which candidates of which recording are scored, against which competitors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from resid_surgery import _check
from resid_surgery.attribution.catalogue import Score
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, token_id
from resid_surgery.stream.blocks import Block
from resid_surgery.stream.kinds import Where
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.stream.subvalues import KINDS, candidates

CONTRASTS = ("bs_difference", "contrast")


@final
@dataclass(eq=False)
class Query:
    """What is scored: the candidates of one kind in some layers of one recording.

    Attributes:
        rec, kind, layers, norm. versus: competitors' ids, for the scores that have some. also: other targets whose
            ranks are counted in the same pass.
    """

    rec: Recording
    kind: str
    layers: tuple[int, ...]
    norm: str
    versus: tuple[int, ...] = ()
    also: tuple[int, ...] = ()
    _kept: dict[str, list[tuple[int, str, Block]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rec: Any, kind: Any, norm: str, layers: Any, versus: Any = None, also: Iterable[int] = ()) -> "Query":
        """A query from a verb's arguments.

        Raises:
            ArgumentError: unknown kind or layer. PromptError: `versus` is no token. SiteError: nothing to score.
        """
        _check.choice("kind", kind, KINDS)
        be_recording(rec)
        picked = _check.layers(layers, rec.model.anatomy.n_layers, model=rec.model.name)
        others = tuple(dict.fromkeys(_check.wholes("also", also, 0, rec.model.vocab_size - 1)))
        query = cls(rec, kind, picked, norm, versus_of(rec.model, rec.prompt, versus), others)
        if not query.places:
            _refuse_nothing(rec.model, kind, picked)
        return query

    def found(self, where: Where = "here") -> list[tuple[int, str, Block]]:
        """(layer, part, block) of the candidates, where they are asked for."""
        if where == "final" and not self.rec.model.anatomy.carries:
            where = "here"  # the same vectors
        if where not in self._kept:
            self._kept[where] = [(layer, part, block) for layer in self.layers
                                 for part, block in candidates(self.rec, self.kind, layer, where)]  # fmt: skip
        return self._kept[where]

    def blocks(self, where: Where = "here") -> list[Block]:
        """The candidates' blocks."""
        return [block for _, _, block in self.found(where)]

    @property
    def places(self) -> list[tuple[int, str]]:
        """(layer, part) of every block."""
        return [(layer, part) for layer, part, _ in self.found()]

    @property
    def count(self) -> int:
        """How many candidates there are."""
        return sum(block.count for block in self.blocks())


def most_candidates(model: OpenedModel, prompt: BoundPrompt, kind: str, layers: Sequence[int]) -> int | None:
    """How many candidates of a kind a prompt has, before it is recorded; None where routing decides."""
    total, sources = 0, prompt.position + 1
    for layer in layers:
        row, size = model.block(layer), model.anatomy.sizes[layer]
        if kind == "layer":
            total += (row.attn_kind != "none") + (row.mlp_kind != "none")
        elif kind == "neuron":
            if row.mlp_kind == "experts":
                return None
            total += size.d_mlp if row.mlp_kind == "neurons" else 0
        elif row.attn_kind == "attention":
            each = size.n_heads * (size.d_head if kind.startswith("attn_neuron") else 1)
            total += each * (sources if kind.endswith("source") else 1)
    return total


def need_candidates(
    model: OpenedModel, prompt: BoundPrompt, kind: str, layers: Sequence[int], k: int, name: str = "k"
) -> None:
    """Refuse, before any forward, to look for more candidates than there are."""
    most = most_candidates(model, prompt, kind, layers)
    if most == 0:
        _refuse_nothing(model, kind, layers)
    if most is not None and k > most:
        raise ArgumentError(
            _check.message(name, f"at most {most}, the candidates of kind '{kind}'", k, model=model.name)
        )


def _refuse_nothing(model: OpenedModel, kind: str, layers: Sequence[int]) -> NoReturn:
    model.anatomy.require(layers[0], "mlp" if kind == "neuron" else "attn", kind)
    raise SiteError(f"`layers` {list(layers)} of {model.name} have nothing of kind '{kind}'.")


def versus_of(model: OpenedModel, prompt: BoundPrompt, given: Any) -> tuple[int, ...]:
    """Ids of competitors: the prompt's, or those given as a token or several."""
    if given is None:
        return prompt.versus
    many = list(given) if _check.iterable(given) else [given]
    ids = tuple(token_id(one, model.tokenizer, model, "versus") for one in many)
    if not ids or prompt.target in ids or len(set(ids)) != len(ids):
        raise ArgumentError(_check.message("versus", "distinct tokens other than the target", given, model=model.name))
    return ids


def need_competitors(model: OpenedModel, scores: Iterable[Score], versus: Sequence[int]) -> None:
    """Refuse, before anything is computed, scores whose competitors are missing."""
    for one in scores:
        if one.name in CONTRASTS and not versus:
            raise ArgumentError(
                f"score {one.name!r} needs competitors for {model.name}; the prompt has none. Give "
                "Prompt(versus=[...]) or versus=."
            )

"""Triggers: a corpus read a few texts at a time, and where in it neurons have their highest and lowest coefficients.

Pieces of one length run together, as rows of one forward; nothing is padded. Nothing of a text stays in memory but the
kept positions with a few tokens around them, and running sums.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery import _check
from resid_surgery.attribution.patterns import beginning
from resid_surgery.errors import ArgumentError, PromptError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt, encode
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward

TAP_BYTES = 256 << 20
WAITING = 4096
TOKENS = 1024
NOTHING = -1
SIGNS = {"highest": 1.0, "lowest": -1.0}


@final
@dataclass(frozen=True)
class Text:
    """One text of a corpus as tokens.

    Attributes:
        number: in the corpus. ids: its tokens. begin: what the tokenizer puts before a text, at each piece.
    """

    number: int
    ids: tuple[int, ...]
    begin: tuple[int, ...]

    def pieces(self, longest: int) -> "Iterator[Piece]":
        """The text in pieces that fit, its beginning included in each."""
        step = longest - len(self.begin)
        for low in range(0, len(self.ids), step):
            yield Piece(self, low, (*self.begin, *self.ids[low : low + step]))


@final
@dataclass(frozen=True)
class Piece:
    """What one row of a forward reads.

    Attributes:
        text: of which. low: position in it of the piece's first token. ids: with the beginning.
    """

    text: Text
    low: int
    ids: tuple[int, ...]


@final
@dataclass(frozen=True)
class Group:
    """Neurons of one layer that share a down-projection.

    Attributes:
        layer: which. expert: a routed expert, "shared", or None for a dense MLP. indices: of the neurons.
    """

    layer: int
    expert: int | str | None
    indices: tuple[int, ...]

    @property
    def tap(self) -> Tap:
        """Where their coefficients, or what their expert reads, are to be had."""
        if self.expert is None:
            return Tap("coef", self.layer)
        return Tap("shared_coef" if self.expert == "shared" else "experts_call", self.layer)

    def coefficients(
        self, model: OpenedModel, found: Any, row: int
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n neuron"]]:
        """(positions, coefficients) of a row of what stands at the tap; of an expert at the positions routed to it."""
        columns = list(self.indices)
        if not isinstance(self.expert, int):
            return torch.arange(found.shape[1]), model.work(found[row][:, columns]).cpu()
        routed = torch.nonzero((found.index[row] == self.expert).any(-1))[:, 0]
        experts = model.experts(self.layer)
        made = experts.coefficient(experts.pre_activations(found.states[row, routed], self.expert))
        return routed.cpu(), model.work(made[:, columns]).cpu()


@final
class Tally:
    """Running sums of some neurons' coefficients m, and their extremes so far.

    Attributes:
        top, before: how many extremes are kept, with how many tokens before them. count: positions taken in.
        sums: (of, neuron) of m, m^2, m > 0, m < 0.
        best: side -> (neuron, k) extremes times `SIGNS`. where: side -> (neuron, k, field) text, position, tokens.
    """

    def __init__(self, n: int, top: int, before: int, dtype: torch.dtype) -> None:
        self.top, self.before, self.count = top, before, 0
        self.sums = torch.zeros(4, n, dtype=torch.float64)
        self.best = {side: torch.full((n, 0), -torch.inf, dtype=dtype) for side in SIGNS}
        self.where = {side: torch.zeros(n, 0, 2 + before + 2, dtype=torch.long) for side in SIGNS}

    def add(self, text: Text, positions: Int[Tensor, " n"], found: Float[Tensor, "n neuron"]) -> None:
        """Take in coefficients at positions of a text."""
        if not len(positions):
            return
        exact = found.double()
        self.count += len(positions)
        self.sums += torch.stack([exact.sum(0), exact.square().sum(0), (exact > 0).sum(0), (exact < 0).sum(0)])
        for side, sign in SIGNS.items():
            best = (sign * found.T).topk(min(self.top, len(positions)), dim=1)
            self._keep(side, best.values, self._around(text, positions[best.indices]))

    def _keep(self, side: str, values: Float[Tensor, "neuron k"], where: Int[Tensor, "neuron k field"]) -> None:
        joined = torch.cat([self.best[side], values], 1)
        kept = joined.topk(min(self.top, joined.shape[1]), dim=1)
        everything = torch.cat([self.where[side], where], 1)
        self.best[side] = kept.values
        self.where[side] = everything.gather(1, kept.indices[..., None].expand(-1, -1, everything.shape[2]))

    def _around(self, text: Text, positions: Int[Tensor, "neuron k"]) -> Int[Tensor, "neuron k field"]:
        """(text, position, tokens before, the token, the token after), NOTHING where the text has none."""
        padded = torch.tensor([*[NOTHING] * self.before, *text.ids, NOTHING])
        around = padded.unfold(0, self.before + 2, 1)[positions]
        number = torch.full_like(positions, text.number)
        return torch.cat([torch.stack([number, positions], -1), around], -1)


def texts_of(model: OpenedModel, corpus: Iterable[Any]) -> Iterator[Text]:
    """Texts of a corpus as tokens, one at a time.

    Raises:
        PromptError: one is empty, no text, or cannot be tokenised; its number is said.
    """
    begin = beginning(model)
    for number, one in enumerate(corpus):
        given = need_text(model, one, number)
        ids = given if isinstance(given, tuple) else tuple(encode(model.tokenizer, given, add_special_tokens=False))
        over = [i for i in ids if not 0 <= i < model.vocab_size]
        if not ids or over:
            what = f"token {over[0]}, which {model.name} has not" if over else f"no token for {model.name}"
            raise PromptError(f"text {number} of `corpus` has {what}: {one!r:.100}. Leave it out.")
        yield Text(number, ids, () if isinstance(given, tuple) else begin)


def need_text(model: OpenedModel, one: Any, number: int) -> str | tuple[int, ...]:
    """A text, or the ids of a prompt that was given by ids."""
    if isinstance(one, Prompt) and one.ids is not None:
        return tuple(one.ids)
    text = one.text if isinstance(one, Prompt) else one
    if not isinstance(text, str) or not text:
        raise PromptError(_check.message(f"corpus[{number}]", "a non-empty string or a prompt", one))
    if model.tokenizer is None:
        raise PromptError(
            f"corpus[{number}] is text, but {model.name} was opened without a tokenizer. Give Prompt(ids=[...])."
        )
    return text


def together(texts: Iterable[Text], longest: int) -> Iterator[tuple[int, list[Piece]]]:
    """(texts begun since the last, pieces of one length that run together)."""
    waiting: list[Piece] = []
    begun = 0
    for text in texts:
        waiting += text.pieces(longest)
        begun += 1
        if sum(len(one.ids) for one in waiting) >= WAITING:
            yield from _rows(begun, waiting)
            waiting, begun = [], 0
    yield from _rows(begun, waiting)


def _rows(begun: int, waiting: list[Piece]) -> Iterator[tuple[int, list[Piece]]]:
    by_length: dict[int, list[Piece]] = {}
    for one in waiting:
        by_length.setdefault(len(one.ids), []).append(one)
    for length, some in by_length.items():
        step = max(1, TOKENS // length)
        for low in range(0, len(some), step):
            yield begun, some[low : low + step]
            begun = 0


def read_pieces(model: OpenedModel, pieces: list[Piece], groups: Sequence[Group], tallies: Sequence[Tally]) -> None:
    """One forward of pieces of one length (several if the taps would hold too much), taken into the tallies."""
    device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.tensor([one.ids for one in pieces], device=device)
    for some in batches(model, groups, ids.numel()):
        taps = list(dict.fromkeys(groups[i].tap for i in some))
        values = forward(model, ids, taps, logits_at=[ids.shape[1] - 1])
        for i in some:
            for row, one in enumerate(pieces):
                positions, found = groups[i].coefficients(model, values[groups[i].tap], row)
                own = positions >= len(one.text.begin)
                tallies[i].add(one.text, positions[own] - len(one.text.begin) + one.low, found[own])


def batches(model: OpenedModel, groups: Sequence[Group], positions: int) -> Iterator[list[int]]:
    """Numbers of groups whose taps fit into `TAP_BYTES` together, in order."""
    held: dict[Tap, int] = {}
    some: list[int] = []
    for i, one in enumerate(groups):
        size = _width(model, one) * positions * model.unembedding.element_size()
        if some and one.tap not in held and sum(held.values()) + size > TAP_BYTES:
            yield some
            held, some = {}, []
        held[one.tap] = size
        some.append(i)
    yield some


def _width(model: OpenedModel, one: Group) -> int:
    return model.anatomy.d_model if isinstance(one.expert, int) else model.anatomy.sizes[one.layer].d_mlp


def need_corpus(model: OpenedModel, corpus: Any) -> None:
    """Refuse what is no corpus; the texts of a list are looked at before any forward.

    Raises:
        ArgumentError: it is a string, a prompt or empty. PromptError: one of its texts is no text.
    """
    if isinstance(corpus, (str, bytes, Prompt)) or not _check.iterable(corpus):
        do = "Wrap it in a list."
        raise ArgumentError(_check.message("corpus", "an iterable of texts or prompts", corpus, do=do))
    if isinstance(corpus, Sequence):
        if not corpus:
            raise ArgumentError(_check.message("corpus", "at least one text", corpus))
        for number, one in enumerate(corpus):
            need_text(model, one, number)

"""Running: the same tokens through the base and through what was made of it, compared position by position.

Sequences of equal length share a batch; nothing is padded. Divergences are always computed from both models' logits in
one place and summed over the whole vocabulary:

    KL(base, edited) = sum_i p_i (log p_i - log q_i)      nats per token
    JS = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2    nats per token, at most log 2
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery._check import message
from resid_surgery.editing.edits import Edit
from resid_surgery.errors import ArgumentError
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import Restored, forward, resumable
from resid_surgery.surgery.altering import Altered
from resid_surgery.surgery.engine import device_of

BATCH_TOKENS = 256
AT_ONCE = 64
TOP = 10
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": None, "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None,
    "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "guidance_scale": None,
}  # fmt: skip
"""Options of plain greedy decoding, whatever a checkpoint's own settings of generation are."""


@final
@dataclass(frozen=True)
class Passage:
    """Token ids, and the positions whose next-token logits are wanted."""

    ids: tuple[int, ...]
    at: tuple[int, ...]


class Subject(Protocol):
    """Something that can be asked for logits."""

    name: str

    def logits(self, ids: Tensor, at: Sequence[int], stream: Tensor | None = None) -> Tensor:
        """(row, position, vocabulary) logits at some positions, on the CPU, in float32 or better."""
        ...

    def continued(self, ids: Tensor, tokens: int) -> list[list[int]]:
        """Greedy continuations of equally long prompts, up to an end token."""
        ...


@final
class WeightsSubject:
    """An opened model. `first`: the lowest block whose weights differ from the base's, for resuming there."""

    def __init__(self, model: OpenedModel, name: str, first: int = 0) -> None:
        self.model, self.name, self.first = model, name, first

    def logits(self, ids: Tensor, at: Sequence[int], stream: Tensor | None = None) -> Tensor:
        resume = None if stream is None or self.first == 0 else (self.first, stream)
        found = forward(self.model, ids.to(device_of(self.model)), [Tap("logits")], at=at, resume=resume)
        return self.model.work(found[Tap("logits")]).cpu()

    def both(self, ids: Tensor, at: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
        """Logits, and the stream before block `first`."""
        tap = Tap("block_in", first)
        found = forward(self.model, ids.to(device_of(self.model)), [tap, Tap("logits")], at=at, everywhere=[tap])
        return self.model.work(found[Tap("logits")]).cpu(), found[tap]

    def continued(self, ids: Tensor, tokens: int) -> list[list[int]]:
        return _generated(self.model, self.model.shadow, ids, tokens)


@final
class OperatedSubject:
    """A model under interventions."""

    def __init__(self, altered: Altered, name: str) -> None:
        self.altered, self.name, self.first = altered, name, 0

    def logits(self, ids: Tensor, at: Sequence[int], stream: Tensor | None = None) -> Tensor:
        out = self.altered.forward(ids)
        return self.altered.model.work(out.logits[:, list(at)]).cpu()

    def continued(self, ids: Tensor, tokens: int) -> list[list[int]]:
        eos = _ends(self.altered.model)
        new = self.altered.generate(ids, max_new_tokens=tokens, **GREEDY)
        return [_until(row, eos) for row in new.tolist()]


@final
class CallableSubject:
    """Any function of (row, position) token ids that gives (row, position, vocabulary) logits."""

    def __init__(self, function: Callable[[Tensor], Any], base: OpenedModel, name: str) -> None:
        self.function, self.base, self.name, self.first = function, base, name, 0

    def logits(self, ids: Tensor, at: Sequence[int], stream: Tensor | None = None) -> Tensor:
        with GradKept(), torch.no_grad():
            out = self.function(ids)
        out = getattr(out, "logits", out)
        wanted = (*ids.shape, self.base.vocab_size)
        if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ArgumentError(message("edit", f"a function that gives {wanted} logits for these ids", got))
        return out.detach()[:, list(at)].to("cpu", self.base.work_dtype)

    def continued(self, ids: Tensor, tokens: int) -> list[list[int]]:
        eos, grown = _ends(self.base), ids
        for _ in range(tokens):
            best = self.logits(grown, [grown.shape[1] - 1])[:, 0].argmax(-1)
            grown = torch.cat([grown, best[:, None].to(grown)], 1)
        return [_until(row, eos) for row in grown[:, ids.shape[1] :].tolist()]


def first_block(base: OpenedModel, edit: Edit) -> int:
    """The lowest block that an edit's changes touch; 0 for changes outside the blocks that come before them.

    Changes of what comes after the blocks alone (the unembedding, the final norm) leave every block as it was.
    """
    lowest = base.anatomy.n_layers
    prefix = base.path(None, "blocks") + "."
    late = tuple(base.path(None, part) + "." for part in ("final_norm", "unembed"))
    for path in edit.tensors:
        if path.startswith(prefix):
            lowest = min(lowest, int(path[len(prefix) :].split(".")[0]))
        elif not path.startswith(late):
            return 0
    return 0 if edit.interventions or not resumable(base) else min(lowest, base.anatomy.n_layers - 1)


def batches(sequences: Sequence[Passage], tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """(indices, (row, position) ids, union of wanted positions) of sequences of one length each."""
    by_length: dict[int, list[int]] = {}
    for i, one in enumerate(sequences):
        by_length.setdefault(len(one.ids), []).append(i)
    for length, members in by_length.items():
        rows = max(1, tokens // length)
        for low in range(0, len(members), rows):
            chosen = members[low : low + rows]
            ids = torch.tensor([sequences[i].ids for i in chosen])
            yield chosen, ids, sorted({p for i in chosen for p in sequences[i].at})


@final
@dataclass(frozen=True, eq=False)
class Figures:
    """What one model says along one sequence, at its wanted positions.

    Attributes:
        nll: (position,) nats of the token that follows there; NaN where none follows. top: (position, 10) ids, best
            first. entropy: (position,) nats.
    """

    nll: Float[Tensor, " position"]
    top: Int[Tensor, "position ten"]
    entropy: Float[Tensor, " position"]

    @property
    def log_prob(self) -> float:
        """Joint log-probability of the tokens that follow, nats."""
        return -float(self.nll.double().nansum())


def figures(subject: Subject, sequences: Sequence[Passage], step: Callable[..., None] | None = None) -> list[Figures]:
    """Figures of every sequence, in order."""
    out: dict[int, Figures] = {}
    for chosen, ids, at in batches(sequences):
        logits = subject.logits(ids, at)
        for row, i in enumerate(chosen):
            places = [at.index(p) for p in sequences[i].at]
            out[i] = _figures(logits[row, places], sequences[i])
            if step is not None:
                step()
    return [out[i] for i in range(len(sequences))]


@final
@dataclass(frozen=True, eq=False)
class Compared:
    """Two models along one sequence, at its wanted positions.

    Attributes:
        kl: (position,) KL(base, edited), nats. js: (position,) nats; NaN where it was not asked for.
        before, after: (position, 10) top ids of each, best first.
        nll_before, nll_after: (position,) nats of the token that follows there; NaN where none follows.
    """

    kl: Float[Tensor, " position"]
    js: Float[Tensor, " position"]
    before: Int[Tensor, "position ten"]
    after: Int[Tensor, "position ten"]
    nll_before: Float[Tensor, " position"]
    nll_after: Float[Tensor, " position"]

    @property
    def flips(self) -> Tensor:
        """(position,) whether the most likely token is another."""
        return self.before[:, 0] != self.after[:, 0]

    @property
    def overlap(self) -> Float[Tensor, " position"]:
        """(position,) share of the ten most likely tokens that stay among them."""
        same = (self.before[:, :, None] == self.after[:, None, :]).any(-1)
        return same.double().mean(-1)


def compared(
    base: WeightsSubject,
    others: Sequence[Subject],
    sequences: Sequence[Passage],
    *,
    whole: bool = True,
    step: Callable[..., None] | None = None,
) -> list[list[Compared]]:
    """Each of some models against the base along every sequence, batch by batch: [model][sequence].

    Where only upper blocks differ, the base's stream is handed to the first of them, so that the rest is not run again.

    Args:
        base, others: models. sequences: what to run. whole: with JS as well.
    """
    found: list[dict[int, Compared]] = [{} for _ in others]
    first = min((getattr(one, "first", 0) for one in others), default=0)
    shared = first > 0 and all(getattr(one, "first", 0) >= first for one in others)
    for chosen, ids, at in batches(sequences):
        clean, stream = base.both(ids, at, first) if shared else (base.logits(ids, at), None)
        wanted = [[at.index(p) for p in sequences[i].at] for i in chosen]
        p = _log_probs(clean, wanted)
        del clean
        before = p.topk(min(TOP, p.shape[-1]), -1).indices
        sizes = [len(places) for places in wanted]
        follow = torch.tensor([j for i in chosen for j in _follow(sequences[i])])
        for n, other in enumerate(others):
            q = _log_probs(_resumed(other, ids, at, stream, first), wanted)
            after = q.topk(before.shape[1], -1).indices
            columns = (*divergences(p, q, whole=whole), before, after, _nll(p, follow), _nll(q, follow))
            parts = zip(*(torch.split(t, sizes) for t in columns), strict=True)
            found[n] |= {i: Compared(*part) for i, part in zip(chosen, parts, strict=True)}
        if step is not None:
            step(done=len(chosen))
    return [[one[i] for i in range(len(sequences))] for one in found]


def divergences(
    p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"], *, whole: bool = True
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(KL(p, q), JS(p, q)) of log-probabilities, nats, summed over the vocabulary; JS is NaN unless `whole`."""
    pairs = [
        _divergence(a, b, whole=whole) for a, b in zip(torch.split(p, AT_ONCE), torch.split(q, AT_ONCE), strict=True)
    ]
    kl, js = (torch.cat(some) for some in zip(*pairs, strict=True))
    return kl, js


def _divergence(p: Tensor, q: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    kl = addends(p, q).sum(-1)
    kl = torch.where(kl.isnan() & ~p.isnan().any(-1), torch.inf, kl)  # the other model gives no numbers at all
    if not whole:
        return kl, torch.full_like(kl, float("nan"))
    middle = torch.logaddexp(p, q) - math.log(2.0)
    return kl, 0.5 * (addends(p, middle).sum(-1) + addends(q, middle).sum(-1))


def _log_probs(logits: Tensor, wanted: Sequence[Sequence[int]]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities of each row's own positions, one row after the other."""
    return torch.log_softmax(torch.cat([logits[row, list(places)] for row, places in enumerate(wanted)]), -1)


def addends(p: Float[Tensor, "*n vocab"], q: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n vocab"]:
    """p_i (log p_i - log q_i) of log-probabilities, nats; 0 for what p rules out."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))


def _resumed(other: Subject, ids: Tensor, at: list[int], stream: Tensor | None, first: int) -> Tensor:
    """Logits of a model whose first changed block may lie above the one whose stream is at hand."""
    if stream is None or not isinstance(other, WeightsSubject):
        return other.logits(ids, at)
    return WeightsSubject(other.model, other.name, first).logits(ids, at, stream.clone())


def _figures(logits: Float[Tensor, "position vocab"], one: Passage) -> Figures:
    p = torch.log_softmax(logits, -1)
    entropy = -(p.exp() * p.clamp_min(-1e4)).sum(-1)
    return Figures(
        _nll(p, torch.tensor(_follow(one))), logits.topk(min(TOP, logits.shape[-1]), -1).indices, entropy.double()
    )


def _follow(one: Passage) -> list[int]:
    """The id that follows each wanted position; -1 where none does."""
    return [one.ids[at + 1] if at + 1 < len(one.ids) else -1 for at in one.at]


def _nll(p: Float[Tensor, "n vocab"], follow: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    found = -p.gather(-1, follow.clamp_min(0)[:, None])[:, 0].double()
    return torch.where(follow < 0, float("nan"), found)


def _generated(model: OpenedModel, shell: Any, ids: Tensor, tokens: int) -> list[list[int]]:
    if not hasattr(shell, "generate"):
        raise ArgumentError(f"{model.name} has no `generate`, so it cannot be decoded freely.")
    ids = ids.to(device_of(model))
    pad = getattr(shell.generation_config, "pad_token_id", None)
    with model.lock, Restored(), torch.no_grad():
        out = shell.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            pad_token_id=0 if pad is None else pad, **GREEDY,
        )  # fmt: skip
    return [_until(row, _ends(model)) for row in out[:, ids.shape[1] :].tolist()]


def _ends(model: OpenedModel) -> set[int]:
    config = getattr(model.module, "generation_config", None) or model.module.config
    given = getattr(config, "eos_token_id", None)
    return set() if given is None else {given} if isinstance(given, int) else set(given)


def _until(row: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first end token."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]

"""Keys: what a layer's down-projection reads at the end of a subject, and how coefficients vary in text.

1. A rewrite is read in several contexts: its prompt behind a few short sentences (prefixes), and alone.
2. Its key k at a layer is the down-projection's input (the coefficients) at the subject's last token, averaged over
   these contexts. Every formula that has a key in it has this average, in numerators and denominators alike.
3. The second moment C = E[c c^T] of coefficients over the tokens of a text (uncentred) says which directions other
   text uses; u = C^-1 k answers to k and as little as possible to the rest.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from resid_surgery import _check
from resid_surgery._check import message
from resid_surgery._progress import progress as progress_bar
from resid_surgery.editing.changes import LowRank
from resid_surgery.editing.edits import tied_paths
from resid_surgery.editing.rewrites import Rewrite, answer_ids, prompt_ids, subject_position
from resid_surgery.errors import ArgumentError, PromptError, UnsupportedModelError
from resid_surgery.models.layout import split_key
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import encode
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import need_model

DEPTH = 1 / 6
DRAWN = 5
PIECE = 1024
SENTENCES = (
    "The weather was fine that day.",
    "She put the book back again.",
    "They came home late that night.",
    "He wrote it down for us.",
    "We had to wait a while.",
    "It was not easy to say.",
    "Most people know this by now.",
    "The old road ran along here.",
    "There was one more thing left.",
    "You can read it here too.",
    "I asked him about it once.",
    "Then the music began to play.",
)
"""What is put before a prompt: plain sentences of one length, about nothing in particular."""


@final
@dataclass(frozen=True)
class Context:
    """A prompt as it is read while fitting.

    Attributes:
        ids: tokens of the prompt. at: index of the subject's last token. answer: tokens that should follow.
    """

    ids: tuple[int, ...]
    at: int
    answer: tuple[int, ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """Prompt and all but the last token of the answer: what a teacher-forced forward reads."""
        return self.ids + self.answer[:-1]


def chosen_prefixes(prefixes: Any, seed: int) -> tuple[str, ...]:
    """The texts before a prompt: those given, or none and a few of `SENTENCES`, drawn by the seed."""
    if prefixes is None:
        drawn = np.random.default_rng(seed).permutation(len(SENTENCES))[:DRAWN]
        return ("", *(SENTENCES[i] for i in sorted(drawn.tolist())))
    given = [prefixes] if isinstance(prefixes, str) or not _check.iterable(prefixes) else list(prefixes)
    if isinstance(prefixes, str) or not given or not all(isinstance(one, str) for one in given):
        raise ArgumentError(message("prefixes", 'None or a sequence of texts ("" for no prefix)', prefixes))
    return tuple(dict.fromkeys(one.strip() for one in given))


def contexts(model: OpenedModel, rewrite: Rewrite, prefixes: Sequence[str]) -> tuple[Context, ...]:
    """A rewrite's prompt behind each prefix.

    The first token of a sequence is where models park attention; its coefficients are like no other token's. A
    context where the subject ends there is left out, with a warning, unless there is no other.

    Raises:
        PromptError: no tokenizer, a text too long, or an answer that the tokenizer does not know.
    """
    found = [_context(model, rewrite, _behind(prefix, rewrite.text)) for prefix in prefixes]
    kept = tuple(one for one in found if one.at > 0)
    if len(kept) < len(found):
        warnings.warn(
            f"the subject {rewrite.subject!r} ends at the first token of {rewrite.text!r}, where the coefficients of "
            f"{model.name} are like nowhere else: the edit will hardly act there, only behind other text. Put words "
            "before the subject.",
            stacklevel=4,
        )
    return kept or tuple(found)


def essence(model: OpenedModel, rewrite: Rewrite, prefixes: Sequence[str]) -> Context:
    """ "{subject} is a", behind the first prefix that is not empty: what an edit should leave as it is."""
    text = _behind(next((one for one in prefixes if one), ""), f"{rewrite.subject} is a")
    return Context(tuple(prompt_ids(text, model)), subject_position(text, rewrite.subject, model))


def _context(model: OpenedModel, rewrite: Rewrite, text: str) -> Context:
    answer = answer_ids(text, rewrite.wanted, model)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in answer:
        do = "Its tokenizer does not know it."
        raise PromptError(message("new", "an answer in tokens of the model", rewrite.new, model=model.name, do=do))
    return Context(tuple(prompt_ids(text, model)), subject_position(text, rewrite.subject, model), tuple(answer))


def _behind(prefix: str, text: str) -> str:
    return f"{prefix} {text.lstrip()}" if prefix else text


def grouped(some: Sequence[Context]) -> list[list[int]]:
    """Indices of contexts that can share a batch: as many tokens read, and as many of the answer. Nothing is padded."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(some):
        groups.setdefault((len(one.read), len(one.answer)), []).append(i)
    return list(groups.values())


def batch(model: OpenedModel, some: Sequence[Context]) -> tuple[Tensor, Tensor]:
    """(ids, at) of contexts of one length, on the model's device."""
    ids = torch.tensor([one.read for one in some], device=model.device)
    return ids, torch.tensor([one.at for one in some], device=model.device)


def dense_layer(model: OpenedModel, layer: Any, name: str = "layer") -> int:
    """A layer whose MLP has one down-projection; None takes the one nearest to `DEPTH` of the model's depth.

    Raises:
        ArgumentError: out of range. UnsupportedModelError: its MLP is a mixture of experts, fused or no plain MLP.
    """
    n = model.anatomy.n_layers
    if layer is None:
        dense = [i for i in range(n) if _dense(model, i)]
        if not dense:
            raise UnsupportedModelError(
                f"no layer of {model.name} has a dense MLP, and so a down-projection to rewrite."
            )
        return min(dense, key=lambda i: (abs(i - DEPTH * (n - 1)), i))
    at = _check.whole(name, layer, -n, n - 1, model=model.name, do="Count from the end with -1.") % n
    if not _dense(model, at):
        raise UnsupportedModelError(
            f"`{name}` must be a layer of {model.name} with a dense MLP; the MLP of layer {at} is "
            f"{model.block(at).mlp_kind} and has no single down-projection. Choose another layer."
        )
    return at


def _dense(model: OpenedModel, layer: int) -> bool:
    row = model.block(layer)
    return row.mlp_kind == "neurons" and split_key(row.paths()["mlp_out"])[1] is None


def down_projection(model: OpenedModel, layer: int) -> tuple[Tensor, Tensor]:
    """(W, b) in float64: (d_model, d_mlp), so that a layer writes W k + b, and (d_model,)."""
    found = model.rows(layer, "mlp_out")
    w = found.rows.T.double()
    return w, torch.zeros_like(w[:, 0]) if found.bias is None else found.bias.double()


def added(model: OpenedModel, layer: int, left: Float[Tensor, "d_model n"], right: Float[Tensor, "n d_mlp"]) -> LowRank:
    """left @ right added to W, in the orientation in which the model stores it."""
    module, name = model.part(layer, "mlp_out"), f"{model.path(layer, 'mlp_out')}.weight"
    factors = (left, right) if isinstance(module, nn.Linear) else (right.T, left.T)
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    return LowRank(name, tied_paths(model, name), shape, (), *(one.cpu().contiguous() for one in factors))


def read_at_subject(
    model: OpenedModel, taps: Sequence[Tap], some: Sequence[Context]
) -> dict[Tap, Float[Tensor, "context width"]]:
    """What stands at some taps at the subject's last token of each context; float64, on the CPU."""
    found = {tap: [torch.empty(0)] * len(some) for tap in taps}
    for group in grouped(some):
        ids = batch(model, [some[i] for i in group])[0]
        seen = forward(model, ids, taps, at=[ids.shape[1] - 1], everywhere=taps)
        for row, i in enumerate(group):
            for tap in taps:
                found[tap][i] = seen[tap][row, some[i].at].double().cpu()
    return {tap: torch.stack(rows) for tap, rows in found.items()}


@final
@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = E[c c^T] of a layer's coefficients, not centred.

    Attributes:
        layer: whose. kind: "corpus", "contexts" or "identity". matrix: (d_mlp, d_mlp) float64; None for the identity.
        typical: median over tokens of |c|^2, which `ridge` is relative to. tokens, texts: it was measured on.
        fingerprint: of the model's weights.
    """

    layer: int
    kind: str
    matrix: Float[Tensor, "d_mlp d_mlp"] | None
    typical: float = 1.0
    tokens: int = 0
    texts: int = 0
    fingerprint: str = ""

    def __repr__(self) -> str:
        return f"SecondMoment(L{self.layer}: {self.said})"

    @property
    def said(self) -> str:
        """What tables call it."""
        if self.kind == "corpus":
            return f"corpus ({self.texts} texts, {self.tokens} tokens)"
        return f"ridge ({self.tokens} tokens of the contexts)" if self.kind == "contexts" else self.kind

    def lifted(self, ridge: float, d_mlp: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C + ridge * (median |c|^2 / d_mlp) I; the identity where nothing was measured."""
        one = torch.eye(d_mlp, dtype=torch.float64)
        return one if self.matrix is None else self.matrix.cpu() + ridge * self.typical / d_mlp * one

    def solved(self, k: Float[Tensor, " d_mlp *n"], ridge: float) -> Float[Tensor, " d_mlp *n"]:
        """(C lifted)^-1 k.

        Raises:
            ArgumentError: C is singular.
        """
        if self.matrix is None:
            return k.clone()
        return solved(self.lifted(ridge, len(k)), k)


def solved(matrix: Float[Tensor, "d d"], k: Float[Tensor, " d *n"]) -> Float[Tensor, " d *n"]:
    """matrix^-1 k of a symmetric matrix.

    Raises:
        ArgumentError: it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ArgumentError("the second moment must have full rank; raise `ridge`, or measure it on more text.")
    return torch.cholesky_solve(k.reshape(len(k), -1), factor).reshape(k.shape)


def covariance(
    model: OpenedModel, layer: int, texts: Iterable[str], *, max_tokens: int | None = None, progress: bool = True
) -> SecondMoment:
    """Uncentred second moment of a layer's coefficients over every token of some texts.

    C = (1/n) sum_t c_t c_t^T, summed in float64, one text at a time; what it takes is one d_mlp x d_mlp matrix.

    Args:
        model: from `resid_surgery.load`. layer: with a dense MLP. texts: any number; a text longer than the model's
            context, or than 1,024 tokens, is read in pieces. max_tokens: stop after so many.
        progress: a bar, on a terminal.

    Raises:
        ArgumentError, UnsupportedModelError: the layer. PromptError: no tokenizer, or a text without tokens.

    Source: Meng et al. 2022, arXiv 2202.05262, section 3.1.
    """
    need_model(model)
    at = dense_layer(model, layer)
    return second_moments(model, [at], texts, max_tokens=max_tokens, progress=progress)[at]


def second_moments(
    model: OpenedModel,
    layers: Sequence[int],
    texts: Iterable[str],
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[int, SecondMoment]:
    """`covariance` of several layers in the same forwards."""
    given = _texts(texts)
    most = None if max_tokens is None else _check.whole("max_tokens", max_tokens, 1)
    pieces = [piece for text in given for piece in _pieces(model, text)]
    taps, meters = [Tap("coef", layer) for layer in layers], [_Meter() for _ in layers]
    with progress_bar("second moment", len(pieces), shown=progress) as step:
        for piece in pieces:
            ids = torch.tensor([piece if most is None else piece[: most - meters[0].tokens]], device=model.device)
            seen = forward(model, ids, taps, at=[ids.shape[1] - 1], everywhere=taps)
            for meter, tap in zip(meters, taps, strict=True):
                meter.add(seen[tap][0].double().cpu())
            step()
            if most is not None and meters[0].tokens >= most:
                break
    known = model.known_fingerprint()
    return {layer: meter.read(layer, "corpus", len(given), known) for layer, meter in zip(layers, meters, strict=True)}


def of_contexts(model: OpenedModel, layers: Sequence[int], some: Sequence[Context]) -> dict[int, SecondMoment]:
    """Second moments of the contexts' own tokens, without the subjects' last: what there is without a corpus."""
    taps, meters = [Tap("coef", layer) for layer in layers], [_Meter() for _ in layers]
    for group in grouped(some):
        ids, at = batch(model, [some[i] for i in group])
        seen = forward(model, ids, taps, at=[ids.shape[1] - 1], everywhere=taps)
        others = torch.arange(ids.shape[1], device=at.device) != at[:, None]
        for meter, tap in zip(meters, taps, strict=True):
            meter.add(seen[tap][others.to(seen[tap].device)].double().cpu())
    known = model.known_fingerprint()
    return {layer: meter.read(layer, "contexts", 0, known) for layer, meter in zip(layers, meters, strict=True)}


class _Meter:
    """Sums c c^T and keeps |c|^2 of each token."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares: list[Tensor] = []
        self.tokens = 0

    def add(self, c: Float[Tensor, "token d_mlp"]) -> None:
        product = c.T @ c
        self.total = product if self.total is None else self.total.add_(product)
        self.squares.append(c.square().sum(1))
        self.tokens += len(c)

    def read(self, layer: int, kind: str, texts: int, fingerprint: str) -> SecondMoment:
        assert self.total is not None
        typical = float(torch.cat(self.squares).median())
        return SecondMoment(layer, kind, self.total / self.tokens, typical, self.tokens, texts, fingerprint)


def _texts(texts: Any) -> list[str]:
    given = [] if not _check.iterable(texts) else list(texts)
    if not given or not all(isinstance(one, str) and one.strip() for one in given):
        raise ArgumentError(message("corpus", "a sequence of non-empty texts", texts))
    return given


def _pieces(model: OpenedModel, text: str) -> list[list[int]]:
    if model.tokenizer is None:
        raise PromptError(f"{model.name} was opened without a tokenizer, so a corpus of texts cannot be read.")
    size = min(PIECE, model.context or PIECE)
    ids = encode(model.tokenizer, text)
    if not ids or max(ids) >= model.vocab_size:
        raise PromptError(message("corpus", "texts in tokens of the model", text, model=model.name))
    return [ids[low : low + size] for low in range(0, len(ids), size)]

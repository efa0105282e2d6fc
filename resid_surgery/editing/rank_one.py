"""Rank-one edits (ROME): one fact, one matrix, in closed form.

    u  = C^-1 k
    dW = (v* - W k) u^T / (k . u)

is the change of W that makes it write v* for the key k and, among all that do, moves what it writes for other tokens
least: E|dW c|^2 is smallest. k is averaged over contexts, the same average in u, in W k and in k . u.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery._check import message
from resid_surgery._progress import progress as progress_bar
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.keys import (
    Context,
    SecondMoment,
    added,
    chosen_prefixes,
    contexts,
    dense_layer,
    down_projection,
    essence,
    of_contexts,
    read_at_subject,
    second_moments,
)
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.editing.values import Descent, Fit, Objective, fit_delta
from resid_surgery.errors import ArgumentError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.taps import Tap
from resid_surgery.stream.recording import need_model

LEAST, LOW = 1e-3, 0.05
COVARIANCES = ("ridge", "identity")


def edit_rank_one(
    model: OpenedModel,
    rewrite: Rewrite,
    *,
    layer: int | None = None,
    steps: int = 25,
    learning_rate: float = 0.3,
    until: float = 0.9,
    kl_factor: float = 0.0625,
    weight_decay: float = 0.01,
    clamp: float = 4.0,
    prefixes: Sequence[str] | None = None,
    corpus: Iterable[str] | None = None,
    covariance: SecondMoment | str | None = None,
    ridge: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """Rewrite one fact by a rank-one change of one down-projection (ROME): one FFN key gets another value.

    dW = delta u^T / (k . u), u = C^-1 k, where k are the coefficients at the subject's last token, averaged over
    contexts, and delta is found by gradient descent so that W k + delta makes the new answer likely (see `values`).

    Args:
        model: from `resid_surgery.load`, with a tokenizer; nothing of it changes. rewrite: the fact.
        layer: with a dense MLP; None takes the one nearest to 1/6 of the depth, by a fixed rule: on SmolLM2-135M later
            layers rewrite a fact as well and its paraphrases no better, and change neighbours three times as much.
        steps: most steps of Adam. learning_rate: length of the first, as a share of |W k + b|. until: stop when the
            whole new answer has this probability in every context. clamp: most |delta| as a share of |W k + b|.
        kl_factor: weight of KL(base, edited) after "{subject} is a", nats. weight_decay: of |delta|^2 / |W k + b|^2.
        prefixes: texts to put before the prompt ("" for none); None for none and five plain sentences drawn by `seed`.
        corpus: texts whose coefficients C is measured on; a few thousand tokens already spare neighbours.
        covariance: C itself, from `keys.covariance`; or, without a corpus, "ridge" (default: the contexts' own other
            tokens) or "identity". ridge: added to C's diagonal, as a share of the median |c|^2 / d_mlp.
        seed: of the prefixes; the fit itself has nothing random in it. progress: a bar, on a terminal.

    Returns:
        An `Edit` of method "edit_rank_one". ``fitting``: one row a step, see `values.fit_delta`. ``keys``: "L<layer>"
        -> (1, d_mlp) k. ``about["settings"]``: all of the above and second_moment (which C it was), k.u, cosine (of k
        and u), key_norm, delta_norm, contexts (how many).

    Raises:
        ArgumentError: an argument is out of range, C is singular, or |k . u| is so small beside |k| |u| that the change
            would blow up (a warning below .05, an error below .001).
        PromptError: no tokenizer, a prompt too long, or an answer that the tokenizer does not know.
        UnsupportedModelError: the layer has no dense MLP.

    Example:
        edit = edit_rank_one(model, Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris"))

    Source: Meng et al. 2022, arXiv 2202.05262.
    """
    _check.progress(progress)
    need_model(model)
    how = Descent(steps=steps, learning_rate=learning_rate, until=until, kl_factor=kl_factor,
                  weight_decay=weight_decay, clamp=clamp)  # fmt: skip
    at = dense_layer(model, layer)
    if not isinstance(rewrite, Rewrite):
        raise ArgumentError(message("rewrite", "a resid_surgery.Rewrite", rewrite, do="For several use least squares."))
    facts = prepared(model, [rewrite], prefixes, seed)
    moment = moments(model, [at], facts, corpus, covariance, ridge, progress=progress)[at]
    key = facts[0].key(model, at)
    u = moment.solved(key, ridge)
    cosine = guarded(model, at, key, u)
    with progress_bar("rank-one edit", steps + 1, shown=progress) as step:
        fit = fitted(model, at, facts[0], key, how, step)
    change = added(model, at, fit.delta[:, None] / (key @ u), u[None])
    settings = {"layer": at, **asdict(how), "prefixes": list(facts[0].prefixes), "contexts": len(facts[0].asked),
                "seed": seed, "ridge": ridge,
                "second_moment": moment.said, "k.u": float(key @ u), "cosine": cosine,
                "key_norm": float(key.norm()), "delta_norm": float(fit.delta.norm())}  # fmt: skip
    return new_edit(model, [change], method="edit_rank_one", settings=settings, rewrites=[rewrite],
                    fitting=fit.steps, keys={f"L{at}": key[None].clone()})  # fmt: skip


@final
@dataclass(frozen=True)
class Fact:
    """A rewrite as tokens.

    Attributes:
        asked: its prompt in contexts. essence: "{subject} is a". prefixes: of the contexts.
    """

    rewrite: Rewrite
    asked: tuple[Context, ...]
    essence: Context
    prefixes: tuple[str, ...]

    def read(self, model: OpenedModel, taps: Sequence[Tap]) -> dict[Tap, Float[Tensor, " width"]]:
        """What stands at some taps at the subject's last token, averaged over the contexts."""
        return {tap: rows.mean(0) for tap, rows in read_at_subject(model, taps, self.asked).items()}

    def key(self, model: OpenedModel, layer: int) -> Float[Tensor, " d_mlp"]:
        """k: the averaged coefficients."""
        tap = Tap("coef", layer)
        return self.read(model, [tap])[tap]


def prepared(model: OpenedModel, rewrites: Any, prefixes: Any, seed: int) -> list[Fact]:
    """Rewrites as tokens; no forward runs.

    Raises:
        ArgumentError: no rewrites, or one twice. PromptError: see `contexts`.
    """
    given: list[Any] = list(rewrites) if _check.iterable(rewrites) else [rewrites]
    if not given or not all(isinstance(one, Rewrite) for one in given):
        raise ArgumentError(message("rewrites", "a resid_surgery.Rewrite or a sequence of them", rewrites))
    texts = [(one.text, one.subject) for one in given]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ArgumentError(message("rewrites", "facts that each stand there once", twice[0]))
    before = chosen_prefixes(prefixes, _check.seed(seed))
    return [Fact(one, contexts(model, one, before), essence(model, one, before), before) for one in given]


def fitted(
    model: OpenedModel, layer: int, fact: Fact, key: Float[Tensor, " d_mlp"], how: Descent, step: Callable[..., None]
) -> Fit:
    """delta = v* - v for one fact at one layer."""
    w, bias = down_projection(model, layer)
    v = w @ key.to(w) + bias
    return fit_delta(Objective(model, layer, fact.asked, fact.essence, v, how), step, fact=fact.rewrite.label)


def moments(
    model: OpenedModel,
    layers: Sequence[int],
    facts: Sequence[Fact],
    corpus: Iterable[str] | None,
    given: Any,
    ridge: float,
    *,
    progress: bool,
) -> dict[int, SecondMoment]:
    """The second moment of each layer: given, measured on a corpus, on the contexts of the facts ("ridge"), or I.

    Raises:
        ArgumentError: both a corpus and a covariance, an unknown word, another layer's, or of another width.
    """
    if _check.finite("ridge", ridge) < 0:
        raise ArgumentError(message("ridge", "a number >= 0", ridge))
    if corpus is not None:
        if given is not None:
            raise ArgumentError(message("covariance", "left out where a corpus is given", given))
        return second_moments(model, layers, corpus, progress=progress)
    if given is None or isinstance(given, str):
        if _check.choice("covariance", given or "ridge", COVARIANCES) == "identity":
            return {layer: SecondMoment(layer, "identity", None) for layer in layers}
        return of_contexts(model, layers, [one for fact in facts for one in (*fact.asked, fact.essence)])
    listed = list(given) if _check.iterable(given) else [given]
    found = {one.layer: one for one in listed if isinstance(one, SecondMoment)}
    for layer in layers:
        wide = model.anatomy.sizes[layer].d_mlp
        matrix = found[layer].matrix if layer in found else None
        if matrix is None or tuple(matrix.shape) != (wide, wide):
            wanted = f"of layer {layer} and ({wide}, {wide})"
            raise ArgumentError(message("covariance", wanted, given, model=model.name, do="Make it with covariance()."))
    return found


def guarded(model: OpenedModel, layer: int, key: Float[Tensor, " d_mlp"], u: Float[Tensor, " d_mlp"]) -> float:
    """cos(k, u), or a refusal where it is so small that dividing by k . u would blow the change up."""
    cosine = float(key @ u / (key.norm() * u.norm()))
    do = "Raise ridge, or measure the second moment on more text."
    if not cosine > LEAST:
        raise ArgumentError(
            message("k.u / (|k| |u|)", f"above {LEAST:g} at layer {layer}", cosine, model=model.name, do=do)
        )
    if cosine < LOW:
        what = f"k.u / (|k| |u|) is only {cosine:.3g} at layer {layer} of {model.name}"
        warnings.warn(f"{what}: the change is large beside what it is for. {do}", stacklevel=3)
    return cosine

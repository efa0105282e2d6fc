"""Least-squares edits (MEMIT): many facts at once, in one matrix or spread over several.

    D = R K^T (l C + K K^T + p K_prev K_prev^T)^-1                                                    in float64

minimises |D K - R|^2 + l tr(D C D^T) + p |D K_prev|^2: what each fact's key should get more (R, a column a fact), what
other text gets (C, the second moment of coefficients), and what earlier facts' keys get. With one fact, no earlier
ones and l -> 0 it is the rank-one edit. Spread over layers, each takes an equal share of what is still missing in the
stream behind the last of them, measured on the model as the layers before have left it.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery._check import message
from resid_surgery._progress import progress as progress_bar
from resid_surgery.editing.changes import LowRank
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.keys import SecondMoment, added, dense_layer, solved
from resid_surgery.editing.rank_one import Fact, fitted, moments, prepared
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.editing.values import Descent
from resid_surgery.errors import ArgumentError, UnsupportedModelError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of, with_tensors
from resid_surgery.models.taps import Tap
from resid_surgery.stream.recording import need_model

COLLISION = 0.95


def edit_least_squares(
    model: OpenedModel,
    rewrites: Iterable[Rewrite],
    *,
    layers: Any = None,
    previous: Edit | Sequence[Edit] | None = None,
    previous_weight: float = 1.0,
    preserve: float = 0.05,
    null_space: float | None = None,
    steps: int = 25,
    learning_rate: float = 0.3,
    until: float = 0.9,
    kl_factor: float = 0.0625,
    weight_decay: float = 0.01,
    clamp: float = 4.0,
    prefixes: Sequence[str] | None = None,
    corpus: Iterable[str] | None = None,
    covariance: SecondMoment | Sequence[SecondMoment] | str | None = None,
    ridge: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """Rewrite facts by least squares over their keys, in one layer or several (MEMIT): FFN keys get other values.

    D = R K^T (l C + K K^T + p K_prev K_prev^T)^-1, a column a fact: K averaged keys, R deltas (or a layer's share of
    what is still missing). l = preserve * mean_i k_i . C^-1 k_i: a lone fact gets 1 / (1 + preserve) of its delta.

    Args:
        model: from `resid_surgery.load`, with a tokenizer; nothing of it changes. rewrites: facts, or one.
        layers: in any order; None for the one of `edit_rank_one`. Several share the work; deltas are of the last.
        previous: an edit or edits whose ``keys`` at these layers should go on getting what they get.
            previous_weight: p. preserve: weight of other text, relative as above.
        null_space: if given, the change only answers to directions whose eigenvalue of C (ridge included) is at most
            this share of the largest. Off by default: penalties hold up better in long streams of edits.
        covariance: as for `edit_rank_one`; for several layers a sequence, one a layer.
        steps, learning_rate, until, kl_factor, weight_decay, clamp, prefixes, corpus, ridge, seed, progress: as for
            `edit_rank_one`.

    Returns:
        An `Edit` of method "edit_least_squares", of a rank of at most the number of facts. ``fitting``: one row a fact
        and step, see `values.fit_delta`; carried: the share of delta that the change brings about (at the
        averaged key; for several layers, measured in the stream). ``keys``: "L<layer>" -> (fact, d_mlp).
        ``about["settings"]``: all of the above and second_moment, lambda (a layer), previous_keys, delta_norm (a fact).

    Raises:
        ArgumentError: an argument is out of range, a fact stands there twice, earlier edits have no keys at a layer.
        PromptError: no tokenizer, a prompt too long, or an answer that the tokenizer does not know.
        UnsupportedModelError: a layer has no dense MLP; several layers where a norm stands behind the MLP.

    Warns:
        UserWarning: two facts have nearly the same key, such as one subject behind one beginning of a prompt.

    Source: Meng et al. 2023, arXiv 2210.07229; the penalty on earlier keys and the null space, Fang et al. 2024,
    arXiv 2410.02355.
    """
    _check.progress(progress)
    need_model(model)
    how = Descent(steps=steps, learning_rate=learning_rate, until=until, kl_factor=kl_factor,
                  weight_decay=weight_decay, clamp=clamp)  # fmt: skip
    places = _layers(model, layers)
    weights = _weights(preserve, previous_weight, null_space)
    facts = prepared(model, rewrites, prefixes, seed)
    before = earlier_keys(model, previous, places)
    measured = moments(model, places, facts, corpus, covariance, ridge, progress=progress)
    last = places[-1]
    with progress_bar("least-squares edit", len(facts) * (steps + 1), shown=progress) as step:
        fits = [fitted(model, last, fact, fact.key(model, last), how, step) for fact in facts]
    deltas = torch.stack([fit.delta.cpu() for fit in fits], 1)
    lifted = {layer: measured[layer].lifted(ridge, model.anatomy.sizes[layer].d_mlp) for layer in places}
    found = _solve(model, places, facts, deltas, lifted, before, weights)
    settings = {"layers": list(places), **asdict(how), **weights, "prefixes": list(facts[0].prefixes), "seed": seed,
                "ridge": ridge, "second_moment": [measured[layer].said for layer in places], "lambda": found.lambdas,
                "previous_keys": [before[layer].shape[1] for layer in places],
                "delta_norm": deltas.norm(dim=0).tolist()}  # fmt: skip
    carried = dict(zip([fact.rewrite.label for fact in facts], found.carried, strict=True))
    table = pd.concat([fit.steps for fit in fits], ignore_index=True)
    made = new_edit(
        model,
        found.changes,
        method="edit_least_squares",
        settings=settings,
        rewrites=[fact.rewrite for fact in facts],
        fitting=table.assign(carried=table["fact"].map(carried)),
        keys={f"L{layer}": k.T.contiguous() for layer, k in found.keys.items()},
    )
    _warn_of_collisions(key_cosines(made), model.name)
    return made


def key_cosines(edits: Edit | Sequence[Edit]) -> pd.DataFrame:
    """Cosine of the keys of each two facts of one edit or of several: near 1, one overwrites the other.

    Returns:
        One row a pair and layer, the largest absolute cosine first. Columns: layer, fact, other, cosine.

    Raises:
        ArgumentError: no edits, or keys of one layer with different widths.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits) if _check.iterable(edits) else []
    if not given or not all(isinstance(one, Edit) for one in given):
        raise ArgumentError(message("edits", "an Edit or a sequence of them", edits))
    rows = []
    for name in dict.fromkeys(name for edit in given for name in edit.keys):
        held = [(label, key) for edit in given for label, key in _labelled(edit, name)]
        if len({len(key) for _, key in held}) > 1:
            raise ArgumentError(message("edits", f"with keys of one width at {name}", [len(key) for _, key in held]))
        unit = torch.nn.functional.normalize(torch.stack([key for _, key in held]).double(), dim=1)
        pairs = torch.combinations(torch.arange(len(held)), 2).tolist()
        rows += [(int(name[1:]), held[i][0], held[j][0], float(unit[i] @ unit[j])) for i, j in pairs]
    table = pd.DataFrame(rows, columns=["layer", "fact", "other", "cosine"])
    return table.sort_values("cosine", key=abs, ascending=False, kind="stable", ignore_index=True)


def _labelled(edit: Edit, name: str) -> list[tuple[str, Tensor]]:
    """(fact, key) of an edit at one place."""
    held = edit.keys.get(name, torch.zeros(0, 0))
    labels = [one.label for one in edit.rewrites]
    if len(labels) != len(held):
        labels = [f"key {i} of {edit.method}" for i in range(len(held))]
    return list(zip(labels, held, strict=True))


def earlier_keys(model: OpenedModel, previous: Any, layers: Sequence[int]) -> dict[int, Float[Tensor, "d_mlp n"]]:
    """Layer -> keys of earlier facts, a column each; no columns where there are none.

    Raises:
        ArgumentError: no edits, or one without keys at one of the layers, or with keys of another width.
    """
    listed = _check.iterable(previous)
    given = [] if previous is None else list(previous) if listed else [previous]
    found = {}
    for layer in layers:
        wide, columns = model.anatomy.sizes[layer].d_mlp, [torch.zeros(model.anatomy.sizes[layer].d_mlp, 0).double()]
        for one in given:
            held = one.keys.get(f"L{layer}") if isinstance(one, Edit) else None
            if held is None or held.ndim != 2 or held.shape[1] != wide:
                raise ArgumentError(
                    message("previous", f"edits with keys of width {wide} at layer {layer}", one, model=model.name,
                            do="Edit the layers that earlier edits have, or leave this edit out.")
                )  # fmt: skip
            columns.append(held.double().cpu().T)
        found[layer] = torch.cat(columns, 1)
    return found


def factors(
    r: Float[Tensor, "d_model n"],
    k: Float[Tensor, "d_mlp n"],
    c: Float[Tensor, "d_mlp d_mlp"],
    earlier: Float[Tensor, "d_mlp m"],
    *,
    weight: float,
    earlier_weight: float = 1.0,
    null_space: float | None = None,
) -> tuple[Float[Tensor, "d_model n"], Float[Tensor, "n d_mlp"]]:
    """(left, right) with D = left @ right = R K^T (l C + K K^T + p K_prev K_prev^T)^-1.

    Args:
        r: what each key should get more. k: keys. c: second moment. earlier: keys of earlier facts.
        weight: l. earlier_weight: p.
        null_space: if given, D only answers to directions in which C has eigenvalues of at most this share of its
            largest: D = D P, and the least squares are taken among those.

    Raises:
        ArgumentError: the sum is singular, or no direction is below the cut.
    """
    if null_space is None:
        return r, solved(weight * c + k @ k.T + earlier_weight * earlier @ earlier.T, k).T
    values, vectors = torch.linalg.eigh(c)
    basis = vectors[:, values <= null_space * values[-1]]
    if not basis.shape[1]:
        do = f"The smallest is {float(values[0] / values[-1]):.2g} of the largest."
        raise ArgumentError(
            message("null_space", "a cut above some eigenvalue of the second moment", null_space, do=do)
        )
    _, right = factors(
        r, basis.T @ k, basis.T @ c @ basis, basis.T @ earlier, weight=weight, earlier_weight=earlier_weight
    )
    return r, right @ basis.T


@final
@dataclass(frozen=True, eq=False)
class _Solved:
    """changes: one a layer. keys: layer -> (d_mlp, fact). lambdas: one a layer. carried: share of each delta."""

    changes: list[LowRank]
    keys: dict[int, Tensor]
    lambdas: list[float]
    carried: list[float]


def _solve(
    model: OpenedModel,
    layers: Sequence[int],
    facts: Sequence[Fact],
    deltas: Float[Tensor, "d_model n"],
    lifted: Mapping[int, Tensor],
    earlier: Mapping[int, Tensor],
    how: Mapping[str, Any],
) -> _Solved:
    """One layer after the other, each on the model as those before leave it."""
    solved_for, made, lambdas = dict[int, Tensor](), list[LowRank](), list[float]()
    stream, at_start, missing = Tap("block_out", layers[-1]), None, deltas
    scale = float(model.factor(layers[-1], "mlp_scale")) if len(layers) > 1 else 1.0
    for left_over, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        taps = [Tap("coef", layer)] + ([stream] if len(layers) > 1 else [])
        seen = _seen(model, made, facts, taps)
        if len(layers) > 1:
            at_start = seen[stream] if at_start is None else at_start
            missing = deltas - (seen[stream] - at_start) / scale
        k, c = seen[taps[0]], lifted[layer]
        lambdas.append(float(how["preserve"] * (k * solved(c, k)).sum(0).mean()))
        left, right = factors(
            missing / left_over, k, c, earlier[layer], weight=lambdas[-1],
            earlier_weight=how["previous_weight"], null_space=how["null_space"],
        )  # fmt: skip
        made.append(added(model, layer, left, right))
        solved_for[layer] = k
    if at_start is None:
        got = left @ (right @ k)
    else:
        got = (_seen(model, made, facts, [stream])[stream] - at_start) / scale
    carried = (got * deltas).sum(0) / deltas.square().sum(0)
    return _Solved(made, solved_for, lambdas, carried.tolist())


def _seen(
    model: OpenedModel, changes: Sequence[LowRank], facts: Sequence[Fact], taps: Sequence[Tap]
) -> dict[Tap, Float[Tensor, "width n"]]:
    """What stands at some taps at the end of each subject, on the model with some changes."""
    if not changes:
        return _stacked([fact.read(model, taps) for fact in facts])
    held = tensors_of(model.module)
    new = {path: one.added_to(held[one.name]) for one in changes for path in one.paths}
    edited = with_tensors(model, new, f"{model.name}, edited")
    try:
        return _stacked([fact.read(edited, taps) for fact in facts])
    finally:
        edited.close()


def _stacked(reads: Sequence[Mapping[Tap, Tensor]]) -> dict[Tap, Tensor]:
    return {tap: torch.stack([read[tap] for read in reads], 1) for tap in reads[0]}


def _layers(model: OpenedModel, layers: Any) -> tuple[int, ...]:
    """Layers in forward order; None for one.

    Raises:
        ArgumentError: out of range, or none. UnsupportedModelError: one without a dense MLP, or several where what an
            MLP writes is normalised before it is added.
    """
    if layers is None:
        return (dense_layer(model, None),)
    given = _check.layers(layers, model.anatomy.n_layers, model=model.name)
    places = tuple(dense_layer(model, one, "layers") for one in given)
    normed = [
        one for one in places if model.has(one, "mlp_post_norm") or isinstance(model.factor(one, "mlp_scale"), Tensor)
    ]
    if len(places) > 1 and normed:
        raise UnsupportedModelError(
            f"`layers` must be one layer for {model.name}, where a norm stands behind the MLP of layer {normed[0]} and "
            "a share of what is missing in the stream is no share of what the MLP writes; "
            f"got {list(places)}. Pass one layer."
        )
    return places


def _weights(preserve: Any, previous_weight: Any, null_space: Any) -> dict[str, Any]:
    for name, value in (("preserve", preserve), ("previous_weight", previous_weight)):
        if _check.finite(name, value) < 0:
            raise ArgumentError(message(name, "a number >= 0", value))
    if null_space is not None and not 0 < _check.finite("null_space", null_space) < 1:
        raise ArgumentError(message("null_space", "None or a share between 0 and 1", null_space))
    return {"preserve": preserve, "previous_weight": previous_weight, "null_space": null_space}


def _warn_of_collisions(table: pd.DataFrame, name: str) -> None:
    near = table[table["cosine"].abs() > COLLISION]
    if len(near):
        first = near.iloc[0]
        warnings.warn(
            f"{len(near)} pairs of facts have nearly the same key in {name}, such as {first['fact']!r} and "
            f"{first['other']!r} (cosine {first['cosine']:.3f} at layer {first['layer']}): what is written for one is "
            "written for the other. See key_cosines(edit).",
            stacklevel=3,
        )

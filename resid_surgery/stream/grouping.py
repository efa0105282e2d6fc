"""Grouping: many prompts recorded as rows of common forwards, never padded.

1. Every prompt is bound, or refused by its number, before the first forward.
2. Prompts of one length and one predicting position run as the rows of one forward. No token is added to
   any of them, so that no position, mask or norm is other than it would be alone.
3. Recordings come in the order of the prompts. When one is due, those of its shape among the next few
   prompts (the window) are recorded with it and wait for their turn; so the number that wait is bounded by
   the window, however many prompts there are and whatever order they come in. Prompts sorted by length fill
   every forward.
4. Whether a model computes a row as it would alone is measured, once per module tree: the first and the last
   row of the first forward of several are recorded alone too. Where they differ (rows that compete for an
   expert's capacity, a hook that touches one row) every prompt gets a forward of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from resid_surgery._check import choice, iterable, message, whole
from resid_surgery.errors import ArgumentError, ResidSurgeryError, UnsupportedModelError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind
from resid_surgery.models.remoting import Where, need_place, running
from resid_surgery.stream.recording import (
    Recording,
    closure_tolerance,
    need_model,
    record_bound,
    record_rows,
    refuse_surroundings,
)

MOST_ROWS = 16
MOST_BYTES = 64e6
ACTIVE_EXPERTS = 8  # that a token is counted with where a recording's size is estimated


def record_each(
    model: OpenedModel,
    prompts: Iterable[Prompt],
    *,
    positions: Literal["target", "all"] = "target",
    batch: int | None = None,
    remote: Where = None,
) -> Iterator[Recording]:
    """Record many prompts, those of one length and predicting position together (paper: the residual stream).

    Each recording is what `resid_surgery.record` gives for its prompt alone, to rounding: no prompt is
    padded, and each recording owns its tensors. Let go of a recording before asking for the next and memory
    stays flat over any number of prompts.

    Args:
        model: from `resid_surgery.load`.
        prompts: any number of `Prompt`s; all are bound here, before the first forward.
        positions: "target" or "all", as for `resid_surgery.record`.
        batch: how many prompts, from the one that is due, are looked at for others of its shape: the most rows
            of a forward, and the most recordings that exist beyond those handed out. None: 16, or
            fewer where that many recordings would take more than 64 MB.
        remote: where forwards run, as for `resid_surgery.record`.

    Returns:
        An iterator of recordings, one a prompt, in the order of the prompts.

    Raises:
        PromptError: a prompt cannot be used; its number is given. ArgumentError: `prompts`, `positions`
        or `batch` has the wrong type or range. ClosureError (while iterating): a recording is refused.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3 (residual stream as a sum of vectors).
    """
    need_model(model)
    choice("positions", positions, ("target", "all"))
    most = None if batch is None else whole("batch", batch, 1)
    place = need_place(model, remote)
    return _in_order(model, bound_prompts(model, prompts), positions == "all", most, place)


def _in_order(
    model: OpenedModel, bound: Sequence[BoundPrompt], every: bool, batch: int | None, place: Where
) -> Iterator[Recording]:
    waiting: dict[int, Recording] = {}
    for number in range(len(bound)):
        if number not in waiting:
            window = (
                range(number, min(number + batch, len(bound))) if batch else within_budget(model, bound, number, every)
            )
            group = [i for i in window if i < len(bound) and alike(bound[i], bound[number])]
            with running(model, place):  # never around the yield: the caller's own traces are his
                waiting.update(_recorded(model, bound, group, every))
        yield waiting.pop(number)


def _recorded(model: OpenedModel, bound: Sequence[BoundPrompt], group: list[int], every: bool) -> dict[int, Recording]:
    """Recordings by number: of the group or, where one of it is refused, of the first alone, so that an error is
    raised when its own prompt is due and says which that is."""
    refuse_surroundings()
    if len(group) > 1:
        try:
            return dict(zip(group, record_group(model, [bound[i] for i in group], every=every), strict=True))
        except UnsupportedModelError:
            pass
    with numbered(group[0]):
        return {group[0]: record_bound(model, bound[group[0]], every=every)}


def record_group(model: OpenedModel, bound: Sequence[BoundPrompt], *, every: bool) -> list[Recording]:
    """Record bound prompts of one shape in one forward, or one by one where the model's rows are not independent.

    Args:
        model: the opened model. bound: of equal length and predicting position.
        every: keep the stream at all positions.

    Returns:
        Recordings in the order of `bound`.

    Raises:
        ArgumentError: there is none, or shapes differ. ClosureError: a recording is refused.
    """
    refuse_surroundings()
    if not bound or not all(alike(one, bound[0]) for one in bound):
        shapes = [(len(one.ids), one.position) for one in bound]
        raise ArgumentError(
            message("bound", "prompts of one length and one predicting position", shapes, model=model.name,
                    do="resid_surgery.record_each groups prompts by itself.")
        )  # fmt: skip
    if len(bound) > 1:
        tree, independent = model.cache.get("independent_rows", (None, False))
        if tree != model.weights.structure():
            return _measured(model, bound, every)
        if independent:
            return record_rows(model, bound, every=every)
    return [record_bound(model, one, every=every) for one in bound]


def _measured(model: OpenedModel, bound: Sequence[BoundPrompt], every: bool) -> list[Recording]:
    """A first group, in one forward if its first and last row are what they are alone; which is remembered."""
    first, last = (record_bound(model, one, every=every) for one in (bound[0], bound[-1]))
    tree = model.weights.structure()
    try:
        found = record_rows(model, bound, every=every)
    except UnsupportedModelError:  # its forward takes no rows, they do not close, or a prompt between is refused
        found = []
    if found and agree(found[0], first) and agree(found[-1], last):
        model.cache["independent_rows"] = tree, True
        return found
    alone = [first, *(record_bound(model, one, every=every) for one in bound[1:-1]), last]
    model.cache["independent_rows"] = tree, False
    return alone


def agree(one: Recording, other: Recording) -> bool:
    """Whether two recordings of the same prompt differ by no more than rounding, in every tensor."""
    experts = [[[group.expert for group in layer.groups] for layer in rec.layers] for rec in (one, other)]
    if experts[0] != experts[1]:
        return False
    most = 10 * closure_tolerance(one.model)
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        if a.numel() and not float((a - b).abs().max()) <= most * max(1e-30, float(b.abs().max())):
            return False
    return True


def alike(one: BoundPrompt, other: BoundPrompt) -> bool:
    """Whether two prompts can be rows of one forward."""
    return len(one.ids) == len(other.ids) and one.position == other.position


def within_budget(model: OpenedModel, bound: Sequence[BoundPrompt], start: int, every: bool) -> range:
    """The prompts from `start` on whose recordings, at most 16, take no more than 64 MB together; at least one."""
    end, total = start, 0.0
    while end < min(len(bound), start + MOST_ROWS):
        total += recording_bytes(model, len(bound[end].ids), every=every)
        if total > MOST_BYTES and end > start:
            break
        end += 1
    return range(start, end)


def recording_bytes(model: OpenedModel, length: int, *, every: bool) -> float:
    """About how much memory a recording takes, in bytes; of routed experts, eight are counted."""
    a = model.anatomy
    count = 2.0 * a.vocab_size + a.d_model
    for layer, size in enumerate(a.sizes):
        row = a.block(layer)
        neurons = size.d_mlp * (1 + max(len(row.keys), len(row.shared_keys)))
        experts = size.d_expert * 3 * min(size.n_experts, ACTIVE_EXPERTS)
        heads = 3 * size.n_heads * size.d_head + (2 * size.n_kv_heads * size.d_head + size.n_heads) * length
        count += neurons + experts + heads + (5 + 3 * length * every) * a.d_model
    return count * model.part(None, "unembed").weight.element_size()  # type: ignore[operator]


def bound_prompts(model: OpenedModel, prompts: Any) -> list[BoundPrompt]:
    """Every prompt, bound; what is wrong with one is said with its number."""
    if isinstance(prompts, (Prompt, str, bytes)) or not iterable(prompts):
        raise ArgumentError(message("prompts", "a sequence of prompts", prompts))
    bound = []
    for number, one in enumerate(prompts):
        with numbered(number):
            bound.append(bind(one, model.tokenizer, model))
    if not bound:
        raise ArgumentError(message("prompts", "at least one prompt", bound))
    return bound


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Says which of many prompts an error is about."""
    try:
        yield
    except ResidSurgeryError as error:
        raise type(error)(f"prompt {number}: {error}") from error

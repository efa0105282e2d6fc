"""A model's ends: the chain of its blocks, and its head, found by what flows where."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resid_surgery.models.calls import Call, close, flatten, misfit, same


class UnreadableError(Exception):
    """Why a model's wiring is no ledger; turned into an `UnsupportedModelError` with the model's name.

    `vague` reasons say what was not recognised rather than what stands in the way.
    """

    vague = False


class UnrecognisedError(UnreadableError):
    """A part that is not known."""

    vague = True


def find_chain(module: nn.Module, calls: Sequence[Call], n_positions: int) -> tuple[str, list[Call]]:
    """The block list: modules called once each, in order, each reading what the one before left."""
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    found: list[tuple[int, str, list[Call]]] = []
    repeated = None
    for path, one in module.named_modules():
        if not isinstance(one, nn.ModuleList) or len(one) == 0:
            continue
        runs = [by_path.get(f"{path}.{i}", []) for i in range(len(one))]
        if any(len(run) > 1 for run in runs) and all(runs):
            repeated = path
        if all(len(run) == 1 for run in runs):
            chain = [run[0] for run in runs]
            wide = chain[0].x is not None and chain[0].y is not None and chain[0].x.shape == chain[0].y.shape
            if wide and all(a.end < b.start for a, b in itertools.pairwise(chain)):
                found.append((sum(p.numel() for p in one.parameters()), path, chain))
    if not found:
        hint = f"{repeated} runs more than once a forward" if repeated else "no list of blocks runs as a chain"
        raise UnreadableError(f"{hint}, so its stream is no sum of one addend a writer")
    _, path, chain = max(found, key=lambda item: item[0])
    for i, call in enumerate(chain):
        shape = list(call.shape)
        if len(shape) > 3:
            raise UnreadableError(
                f"the stream that enters layer {i} has shape {shape}: it is kept in several copies "
                "(hyper-connections), which are mixed between layers"
            )
        if len(shape) != 3 or shape[0] != 1 or shape[1] != n_positions:
            raise UnreadableError(
                f"the stream that enters layer {i} has shape {shape} for {n_positions} tokens: the model adds "
                "tokens of its own, merges some, or turns positions around"
            )
    for i, (a, b) in enumerate(itertools.pairwise(chain)):
        if not same(a.y, b.x):
            raise UnreadableError(
                f"what layer {i + 1} reads is not what layer {i} left: something happens between blocks"
            )
    return path, chain


def read_head(
    calls: Sequence[Call], last: Call, config: Any, tolerance: float
) -> tuple[str, str, float, float, float | None]:
    """Final norm, unembedding, logit scale and cap: logits = cap(scale * W_U N(x))."""
    norms = [c for c in calls if c.start > last.end and c.norm and same(c.x, last.y)]
    if not norms:
        raise UnreadableError("no norm reads the stream after the last block, so bs-values are not defined")
    norm = norms[0]
    heads = [c for c in calls if c.start > norm.end and c.linear]
    if not heads or norm.y is None:
        raise UnreadableError("no projection to the vocabulary follows the final norm")
    head = heads[-1]
    logits = flatten(calls[-1].y)
    assert head.x is not None
    assert head.y is not None
    assert logits is not None
    reads = head.x.shape == norm.y.shape
    before = 1.0 if not reads or same(head.x, norm.y) else solve(head.x, [norm.y])[0]
    if not close(norm.y * before, head.x, tolerance):
        raise UnreadableError(
            f"{head.path} does not read the final norm's output: the head is not linear after one norm"
        )
    if logits.shape != head.y.shape:
        raise UnreadableError(
            f"its logits have shape {list(logits.shape)}, what {head.path} writes {list(head.y.shape)}"
        )
    caps = [float(v) for k, v in sorted(vars(config).items()) if "cap" in k and isinstance(v, (int, float)) and v]
    scales = [v for k, v in sorted(vars(config).items()) if "logit" in k and isinstance(v, float) and v]
    options = dict.fromkeys([1.0, *scales, *(1 / s for s in scales), solve(logits, [head.y])[0]])
    best: tuple[float, float, float | None] | None = None
    for cap, scale in itertools.product([None, *caps], options):
        bs = head.y.double() * scale
        error = misfit(bs if cap is None else cap * torch.tanh(bs / cap), logits)
        if error <= tolerance and (best is None or error < best[0] / 2):
            best = error, scale, cap
    if best is None:
        raise UnreadableError("its logits are no multiple and no known soft-cap of what the unembedding writes")
    return norm.path, head.path, before, best[1], best[2]


def solve(total: Tensor, terms: Sequence[Tensor]) -> list[float]:
    """The numbers c that fit total = sum c_i terms_i best.

    Raises:
        UnreadableError: NaN or infinity stands among them.
    """
    a, b = torch.stack([t.double().cpu().reshape(-1) for t in terms], 1), total.double().cpu().reshape(-1, 1)
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise UnreadableError("NaN or infinity flows through it: weights of it are no finite numbers, or overflow")
    # the default driver is wrong for a zero or collinear column
    return [float(v) for v in torch.linalg.lstsq(a, b, driver="gelsd").solution[:, 0]]


def weighted_sum(factors: Sequence[Tensor | float], terms: Sequence[Tensor]) -> Tensor:
    """sum_i factors_i * terms_i in float64, where the last term lies."""
    at = terms[-1].device
    pairs = [(f.to(at) if isinstance(f, Tensor) else f, t.double().to(at)) for f, t in zip(factors, terms, strict=True)]
    return torch.stack([term * factor for factor, term in pairs]).sum(0)

"""Streaming: every candidate's score, with memory bounded whatever the vocabulary.

A block's directions are projected on the vocabulary once, a few at a time, whatever the number of scores and of
members that share a direction: an attention neuron's row of W_O is projected once and not once for each source.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.attribution.scoring import Chunk, Increase, Linear, Rank, Scorer, Streamed
from resid_surgery.attribution.states import EVALUATE_BYTES
from resid_surgery.stream.blocks import Block
from resid_surgery.stream.vocabulary import Readout

Progress = Callable[..., None]


def stream(scorers: Sequence[Scorer], b: int, step: Progress) -> list[Float[Tensor, " count"]]:
    """Exact scores of all members of block b by several scorers, each direction projected once.

    Args:
        scorers: on one query. b: which block. step: told how many candidates were done.
    """
    out: dict[int, Tensor] = {}
    waiting: dict[int, Streamed] = {}
    for i, one in enumerate(scorers):
        if isinstance(one, Linear):
            out[i] = one.values(b)
        elif isinstance(one, Rank) and (kept := one.known(b)) is not None:
            out[i] = kept
        else:
            assert isinstance(one, Streamed)
            waiting[i] = one
    for block in dict.fromkeys(id(one.blocks[b]) for one in waiting.values()):
        group = {i: one for i, one in waiting.items() if id(one.blocks[b]) == block}
        first = next(iter(group.values()))
        parts: dict[int, list[Tensor]] = {i: [] for i in group}
        ranked = any(isinstance(one, Rank) for one in group.values())
        members = live(first.blocks[b], every=ranked)
        for chunk in chunks(first.readout, first.blocks[b], members):
            for i, one in group.items():
                parts[i].append(one.of_columns(b, chunk))
        for i, one in group.items():
            out[i] = _spread(first.blocks[b], members, parts[i], one)
            if isinstance(one, Rank):
                one.finish(b)
    step(done=scorers[0].blocks[b].count)
    return [out[i] for i in range(len(scorers))]


def live(block: Block, *, every: bool) -> Int[Tensor, " n"]:
    """The directions that some member's coefficient is not 0 for (half of a ReLU model's), or every one."""
    n = block.count // block.per_row
    if every or block.coefficient is None:
        return torch.arange(n)
    return torch.nonzero((block.coefficient.view(n, -1) != 0).any(1))[:, 0].cpu()


def _spread(block: Block, members: Tensor, parts: list[Tensor], one: Streamed) -> Tensor:
    """Values of some directions' members among all of a block."""
    found = torch.cat(parts) if parts else torch.zeros(0, block.per_row)
    n = block.count // block.per_row
    if len(members) == n:
        return found.flatten()
    assert isinstance(one, Increase)
    everything = torch.full((n, block.per_row), one.nothing, dtype=one.readout.s.dtype, device=one.readout.s.device)
    everything[members] = found.to(everything)
    return everything.flatten()


def chunks(readout: Readout, block: Block, members: Int[Tensor, " n"]) -> Iterable[Chunk]:
    """Some of a block's directions, projected on the vocabulary a few at a time, for bounded memory."""
    n, norm = block.count // block.per_row, readout.norm
    c = block.coefficient
    if c is None:
        c = torch.ones(block.count, dtype=readout.s.dtype, device=readout.s.device)
    amounts = c.view(n, block.per_row)
    size = max(1, EVALUATE_BYTES // (readout.model.vocab_size * readout.s.element_size()))
    room: list[Tensor] = []
    for some in torch.split(members, size) if len(members) else ():
        directions = block.direction(some)
        if not room or room[0].shape[1] != len(some):  # kept from chunk to chunk: fresh pages cost as much as products
            shape = (readout.model.vocab_size, len(some))
            room = [torch.empty(shape, dtype=readout.s.dtype, device=readout.s.device) for _ in range(2)]
        columns = readout.columns(norm.centre(directions) * norm.gain, out=room[0])
        yield Chunk(columns, directions, amounts[some.to(amounts.device)], room[1])


def values_of(scored: Scorer, b: int, members: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Exact scores of some members of block b, in float64 on the CPU."""
    if not isinstance(scored, Increase):
        (values,) = stream([scored], b, lambda **_: None)
        return values.double().cpu()[members]
    block, parts = scored.blocks[b], torch.split(members, scored.states.chunk)
    found = [scored.evaluate(torch.full_like(some, b), block.vectors(some)).double().cpu() for some in parts]
    return torch.cat(found)

"""Streaming: every candidate's score, with memory bounded whatever the vocabulary.

A block's directions are projected on the vocabulary once, a few at a time, whatever the number of scores and of
members that share a direction: an attention neuron's row of W_O is projected once and not once for each source.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery.attribution.scoring import Chunk, Linear, Rank, Scorer, Streamed
from resid_surgery.attribution.states import EVALUATE_BYTES
from resid_surgery.stream.blocks import Block
from resid_surgery.stream.vocabulary import Readout

Progress = Callable[..., None]


def stream(
    scorers: Sequence[Scorer],
    b: int,
    step: Progress = lambda **_: None,
    members: Int[Tensor, " n"] | None = None,
) -> list[Float[Tensor, " n"]]:
    """Exact scores of the members of block b by several scorers, each direction projected once.

    Args:
        scorers: on one query. b: which block. step: told how many candidates were done.
        members: which, all by default.
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
    for place in dict.fromkeys(id(one.blocks[b]) for one in waiting.values()):
        group = {i: one for i, one in waiting.items() if id(one.blocks[b]) == place}
        first = next(iter(group.values()))
        block, parts = first.blocks[b], {i: list[Tensor]() for i in group}
        ranked = any(isinstance(one, Rank) for one in group.values())
        rows = live(block, every=ranked) if members is None else torch.unique(members // block.per_row)
        for chunk in chunks(first.readout, block, rows, members):
            for i, one in group.items():
                parts[i].append(one.of_columns(b, chunk))
        for i, one in group.items():
            out[i] = _spread(block, rows, parts[i], one)
            if isinstance(one, Rank):
                one.finish(b, keep=members is None)
    step(done=scorers[0].blocks[b].count if members is None else len(members))
    found = [out[i] for i in range(len(scorers))]
    return found if members is None else [values[members.to(values.device)] for values in found]


def live(block: Block, *, every: bool) -> Int[Tensor, " n"]:
    """The directions that some member's coefficient is not 0 for (half of a ReLU model's), or every one."""
    n = block.count // block.per_row
    if every or block.coefficient is None:
        return torch.arange(n)
    return torch.nonzero((block.coefficient.view(n, -1) != 0).any(1))[:, 0].cpu()


def _spread(block: Block, rows: Tensor, parts: list[Tensor], one: Streamed) -> Tensor:
    """Values of some directions' members among all of a block."""
    n = block.count // block.per_row
    if len(rows) == n:
        return torch.cat(parts).flatten()
    dtype = parts[0].dtype if parts else one.readout.s.dtype
    everything = torch.full((n, block.per_row), one.nothing, dtype=dtype, device=one.readout.s.device)
    if parts:
        everything[rows.to(everything.device)] = torch.cat(parts).to(everything)
    return everything.flatten()


def chunks(
    readout: Readout, block: Block, rows: Int[Tensor, " n"], members: Int[Tensor, " m"] | None = None
) -> Iterable[Chunk]:
    """Some of a block's directions, projected on the vocabulary a few at a time, for bounded memory; coefficients of
    other than the `members` asked for are 0."""
    n, norm = block.count // block.per_row, readout.norm
    c = block.coefficient
    if c is None:
        c = torch.ones(block.count, dtype=readout.s.dtype, device=readout.s.device)
    if members is not None and block.per_row > 1:
        asked = torch.zeros_like(c, dtype=torch.bool)
        asked[members.to(c.device)] = True
        c = c.where(asked, 0.0)
    amounts = c.view(n, block.per_row)
    size = max(1, EVALUATE_BYTES // (readout.model.vocab_size * readout.s.element_size()))
    room: list[Tensor] = []
    for some in torch.split(rows, size) if len(rows) else ():
        directions = block.direction(some)
        if not room or room[0].shape[1] != len(some):  # kept from chunk to chunk: fresh pages cost as much as products
            shape = (readout.model.vocab_size, len(some))
            room = [torch.empty(shape, dtype=readout.s.dtype, device=readout.s.device) for _ in range(2)]
        columns = readout.columns(norm.centre(directions) * norm.gain, out=room[0])
        yield Chunk(columns, directions, amounts[some.to(amounts.device)], room[1])

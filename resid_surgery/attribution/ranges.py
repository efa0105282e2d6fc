"""What value vectors span in the vocabulary: the lowest and highest bs-value of each, once per model's weights.

For a direction v (a value vector behind its post-norm) the table holds the least and the largest of
W_U[i] . gain * centre(v) over all tokens i. It depends on weights alone, takes one product with the vocabulary for
each row (half a minute for the 46,080 neurons of a 135M-parameter model), and is kept in memory and, where it took
long, in a file of the cache folder, named after a hash of the weights and of what the model's layout says. The lower
certificate (see `bounds`) needs it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import xxhash
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from resid_surgery._progress import progress
from resid_surgery.attribution.states import EVALUATE_BYTES
from resid_surgery.models.checkpoints import cache_folder
from resid_surgery.models.kept import read_kept, write_kept
from resid_surgery.stream.blocks import Block, WeightRows
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.vocabulary import Readout

LOCK_SECONDS = 30.0
SPOT_ROWS = 1
SPOT_ERROR = 2e-5  # what rounding does to a row computed in other company; bounds have that much room
SLOW_ROWS = 2000
WORTH_KEEPING = 1e10


@final
class Ranges:
    """The table of one model: WeightRows key -> (2, row) lowest and highest, for `post.unscaled(row)`."""

    def __init__(self, rec: Recording, readout: Readout) -> None:
        self.rec, self.readout = rec, readout
        kept = rec.model.cache.setdefault("ranges", {})
        if rec.fingerprint not in kept:
            kept.clear()
            kept[rec.fingerprint] = {}
        self.kept: dict[str, Tensor] = kept[rec.fingerprint]

    def prepare(self, blocks: Sequence[Block], *, shown: bool = True) -> None:
        """Have the table ready for the rows of some blocks: from memory, else the file, else computed and saved."""
        wanted = {_name(rows): rows for block in blocks for rows in _rows_of(block)}
        missing = {name: rows for name, rows in wanted.items() if name not in self.kept}
        if not missing:
            return
        path = table_file(self.rec)
        for name, found in read_kept(path).items():
            if name in missing and self._fits(missing[name], found):
                self.kept[name] = found.to(self.rec.model.device, self.rec.model.work_dtype)
                del missing[name]
        if not missing:
            return
        total = sum(len(rows.rows) for rows in missing.values())
        fresh: dict[str, Tensor] = {}
        try:
            with progress("ranges of value vectors (once)", total, shown=shown and total > SLOW_ROWS) as step:
                for name, rows in missing.items():
                    fresh[name] = self._computed(rows, step)
        finally:  # what was finished before an interrupt is not lost
            self.kept |= fresh
            done = sum(found.shape[-1] for found in fresh.values())
            if done * self.rec.model.unembedding.numel() > WORTH_KEEPING:  # else it is as quickly computed as read
                _merge(path, {name: found.cpu() for name, found in fresh.items()})

    def of(self, block: Block) -> tuple[Float[Tensor, " directions"], Float[Tensor, " directions"]] | None:
        """(lo, hi) of W_U[i] . gain * centre(direction) over i, in this recording; None where rows are no weights."""
        if block.mixed is not None:
            return self._mixed(block)
        if not block.weights:
            return None
        pairs = [self.kept[_name(rows)] * rows.scale for rows in block.weights]
        low, high = torch.cat([pair.amin(0) for pair in pairs]), torch.cat([pair.amax(0) for pair in pairs])
        return low, high

    def _mixed(self, block: Block) -> tuple[Tensor, Tensor]:
        """Interval sums: a mixture lies within the sum of what its parts span."""
        assert block.mixed is not None
        rows, amounts = block.mixed.weights, block.mixed.amounts
        low, high = (self.kept[_name(rows)] * rows.scale).view(2, amounts.shape[0], 1, amounts.shape[2])
        up, down = amounts.clamp_min(0), amounts.clamp_max(0)
        return (up * low + down * high).sum(-1).reshape(-1), (up * high + down * low).sum(-1).reshape(-1)

    def _computed(self, rows: WeightRows, step: Any) -> Tensor:
        norm, chunk = self.readout.norm, max(1, EVALUATE_BYTES // (self.rec.model.vocab_size * 4))
        out, room = [], list[Tensor]()
        for low in range(0, len(rows.rows), chunk):
            part = rows.post.unscaled(self.rec.work(rows.rows[low : low + chunk]))
            if not room or room[0].shape[1] != len(part):
                room = [torch.empty(self.rec.model.vocab_size, len(part)).to(part)]
            columns = self.readout.columns(norm.centre(part) * norm.gain, out=room[0])
            out.append(torch.stack([columns.amin(0), columns.amax(0)]))  # twice as fast as aminmax along an axis
            step(done=part.shape[0])
        return torch.cat(out, -1)

    def _fits(self, rows: WeightRows, found: Tensor) -> bool:
        """Whether what a file says holds for a row of these weights: a damaged or foreign table is not believed."""
        if found.shape != (2, len(rows.rows)) or found.dtype != self.rec.model.work_dtype:
            return False
        if not bool(torch.isfinite(found).all()):
            return False
        at = len(rows.rows) // 2
        one = WeightRows(rows.key, rows.rows[at : at + SPOT_ROWS], rows.post)
        again = self._computed(one, lambda done: None).cpu()
        kept = found[:, at : at + SPOT_ROWS].to(again)
        return bool((again - kept).abs().max() <= SPOT_ERROR * again.abs().max().clamp_min(1e-30))


def table_file(rec: Recording) -> Path:
    """Where the table of a recording's weights is kept."""
    model = rec.model
    about = xxhash.xxh3_128(f"{rec.fingerprint}|{model.anatomy.layout!r}|{model.work_dtype}|1".encode()).hexdigest()
    return cache_folder() / "ranges" / f"{about}.safetensors"


def _rows_of(block: Block) -> tuple[WeightRows, ...]:
    return block.weights if block.mixed is None else (block.mixed.weights,)


def _name(rows: WeightRows) -> str:
    return ".".join(map(str, rows.key))


def _merge(path: Path, fresh: dict[str, Tensor]) -> None:
    """Add to the file, whole or not at all; a cache folder that cannot be written only costs time, and is named."""
    if not fresh:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            write_kept(path, read_kept(path) | fresh)
    except (OSError, TimeoutError, SafetensorError) as error:
        warnings.warn(f"the ranges of value vectors are not kept for next time in {path.parent}: {error}", stacklevel=2)

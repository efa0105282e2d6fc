"""Remembering: what the unedited model says, kept in the cache folder so that the next validation need not ask again.

Kept are figures (likelihood, ten best tokens, entropy) and continuations, never whole logits. Files are named after a
hash of the weights, the modules with their hooks, settings and config, the layout, the dtype, the versions of what
computes and every token that was asked, so that nothing of another model, or of a model that was changed since, is
ever believed; each also holds a hash of its own contents. Of a model with hooks, or with parts that cannot be told by
their contents, nothing is kept.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

import torch
import xxhash
from torch import Tensor

from resid_surgery.editing.edits import versions
from resid_surgery.editing.running import TOP, Figures, Passage, WeightsSubject, figures
from resid_surgery.errors import StaleRecordingError
from resid_surgery.models.checkpoints import cache_folder
from resid_surgery.models.kept import read_kept, write_kept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.standing import standing

VERSION = 1


@final
class Remembered:
    """A base model whose figures and continuations are read from the cache folder where they stand there.

    Attributes:
        subject: the base. found, asked: how many sequences came from files, how many were run. fingerprint, standing:
        of the base's weights, and of what stands beside them.
    """

    def __init__(self, model: OpenedModel, *, keep: bool = True) -> None:
        self.subject = WeightsSubject(model, "base")
        self.fingerprint, self.standing = model.fingerprint(), standing(model.module)
        self.keep = keep and self.standing.sure
        about = (
            self.fingerprint,
            self.standing.hash,
            repr(model.anatomy.layout),
            model.dtype,
            model.device.type,
            _precision(),
            sorted(versions().items()),
            VERSION,
        )
        self._about = "|".join(map(str, about))
        self.found = self.asked = 0

    def require_same(self) -> None:
        """Refuse to go on, or to keep anything, with a base that was changed since this was made.

        Raises:
            StaleRecordingError: its weights, or its modules, hooks or settings changed.
        """
        model = self.subject.model
        if model.fingerprint() != self.fingerprint or standing(model.module) != self.standing:
            raise StaleRecordingError(
                f"{model.name} was changed while it was asked: its weights, modules, hooks or settings are not those "
                "that it began with, so its answers are of two models. Leave it as it is, and ask again."
            )

    def figures(self, sequences: Sequence[Passage], step: Callable[..., None] | None = None) -> list[Figures]:
        """As `running.figures` of the base."""
        if not sequences:
            return []
        path = self._path(["figures", *(repr((one.ids, one.at)) for one in sequences)])
        held = self._read(path)
        if self._are_figures(held, sum(len(one.at) for one in sequences)):
            self.found += len(sequences)
            if step is not None:
                step(done=len(sequences))
            sizes = [len(one.at) for one in sequences]
            parts = zip(*(torch.split(held[name], sizes) for name in ("nll", "top", "entropy")), strict=True)
            return [Figures(*part) for part in parts]
        self.asked += len(sequences)
        made = figures(self.subject, sequences, step)
        self.require_same()
        self._write(path, {name: torch.cat([getattr(one, name) for one in made]) for name in ("nll", "top", "entropy")})
        return made

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts, in order."""
        path = self._path(["continued", str(tokens), *(repr(list(one)) for one in prompts)])
        held = self._read(path)
        if self._are_continuations(held, len(prompts)):
            self.found += len(prompts)
            return [list(map(int, part)) for part in torch.split(held["tokens"], held["sizes"].tolist())]
        self.asked += len(prompts)
        made = [self.subject.continued(torch.tensor([list(one)]), tokens)[0] for one in prompts]
        self.require_same()
        flat = torch.tensor([t for row in made for t in row], dtype=torch.long)
        self._write(path, {"tokens": flat, "sizes": torch.tensor([len(row) for row in made])})
        return made

    def _path(self, asked: Sequence[str]) -> Path:
        total = xxhash.xxh3_128(self._about.encode())
        for one in asked:
            total.update(one.encode())
        return cache_folder() / "figures" / f"{total.hexdigest()}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor]:
        return read_kept(path) if self.keep else {}

    def _are_figures(self, held: Mapping[str, Tensor], positions: int) -> bool:
        """Whether what a file holds can be figures at so many positions; else they are asked for anew."""
        if held.keys() != {"nll", "top", "entropy"}:
            return False
        numbers, best = (held["nll"], held["entropy"]), min(TOP, self.subject.model.vocab_size)
        fit = all(one.dtype == torch.float64 and one.shape == (positions,) for one in numbers)
        return fit and held["top"].shape == (positions, best) and self._are_ids(held["top"])

    def _are_continuations(self, held: Mapping[str, Tensor], prompts: int) -> bool:
        """Whether what a file holds can be the continuations of so many prompts."""
        if held.keys() != {"tokens", "sizes"} or held["tokens"].ndim != 1 or held["sizes"].shape != (prompts,):
            return False
        if held["sizes"].dtype != torch.long or not self._are_ids(held["tokens"]):
            return False
        sizes = held["sizes"].tolist()
        return min(sizes, default=0) >= 0 and sum(sizes) == len(held["tokens"])

    def _are_ids(self, held: Tensor) -> bool:
        return held.dtype == torch.long and not bool(((held < 0) | (held >= self.subject.model.vocab_size)).any())

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if not self.keep:
            return
        try:
            write_kept(path, tensors)
        except OSError as error:
            warnings.warn(f"what the base model says is not kept for next time in {path.parent}: {error}", stacklevel=2)


def _precision() -> tuple[str, ...]:
    """With how many bits float32 matrices are multiplied, in all the places where a process can say so."""
    of = torch.backends
    return tuple(str(one.fp32_precision) for one in (of, of.cuda.matmul, of.mkldnn, of.mkldnn.matmul))  # type: ignore[attr-defined]

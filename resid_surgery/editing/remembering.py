"""Remembering: what the unedited model says, kept in the cache folder so that the next validation need not ask again.

Kept are figures (likelihood, ten best tokens, entropy) and continuations, never whole logits. Files are named after a
hash of the weights, the config, the layout, the dtype and every token that was asked, so that nothing of another
model, or of a model that was changed since, is ever believed; each also holds a hash of its own contents.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import xxhash
from torch import Tensor

from resid_surgery.editing.running import Figures, Passage, WeightsSubject, figures
from resid_surgery.models.checkpoints import cache_folder
from resid_surgery.models.kept import read_kept, write_kept
from resid_surgery.models.opening import OpenedModel

VERSION = 1


@final
class Remembered:
    """A base model whose figures and continuations are read from the cache folder where they stand there.

    Attributes:
        subject: the base. found, asked: how many sequences came from files, how many were run.
    """

    def __init__(self, model: OpenedModel, *, keep: bool = True) -> None:
        self.subject, self.keep = WeightsSubject(model, "base"), keep
        self.fingerprint = model.fingerprint()
        about = (
            self.fingerprint,
            _settings(model),
            repr(model.anatomy.layout),
            model.dtype,
            model.device.type,
            VERSION,
        )
        self._about = "|".join(map(str, about))
        self.found = self.asked = 0

    def figures(self, sequences: Sequence[Passage], step: Callable[..., None] | None = None) -> list[Figures]:
        """As `running.figures` of the base."""
        if not sequences:
            return []
        path = self._path(["figures", *(repr((one.ids, one.at)) for one in sequences)])
        held = self._read(path)
        if held:
            self.found += len(sequences)
            if step is not None:
                step(done=len(sequences))
            sizes = [len(one.at) for one in sequences]
            parts = zip(*(torch.split(held[name], sizes) for name in ("nll", "top", "entropy")), strict=True)
            return [Figures(*part) for part in parts]
        self.asked += len(sequences)
        made = figures(self.subject, sequences, step)
        self._write(path, {name: torch.cat([getattr(one, name) for one in made]) for name in ("nll", "top", "entropy")})
        return made

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts, in order."""
        path = self._path(["continued", str(tokens), *(repr(list(one)) for one in prompts)])
        held = self._read(path)
        if held:
            self.found += len(prompts)
            return [list(map(int, part)) for part in torch.split(held["tokens"], held["sizes"].tolist())]
        self.asked += len(prompts)
        made = [self.subject.continued(torch.tensor([list(one)]), tokens)[0] for one in prompts]
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

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if not self.keep:
            return
        try:
            write_kept(path, tensors)
        except OSError as error:
            warnings.warn(f"what the base model says is not kept for next time in {path.parent}: {error}", stacklevel=2)


def _settings(model: OpenedModel) -> str:
    """The model's config as text: the same weights compute something else under another one."""
    config: Any = getattr(model.module, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {"config": config}
    return json.dumps({k: v for k, v in said.items() if not k.startswith("_")}, sort_keys=True, default=str)

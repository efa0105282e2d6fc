"""Composing: which edits may be added to one another, and what is known of their sum.

An edit is made for weights: those of the base, or what the edits beneath it left of them. A sum is for the weights of
the one beneath, so an edit is added only to others for the same weights, or to what it was made on top of.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from resid_surgery.errors import ArgumentError

SAME = ("model", "fingerprint", "dtype", "versions")


class Part(Protocol):
    """What is asked of an edit here."""

    @property
    def method(self) -> str: ...
    @property
    def expects(self) -> Mapping[str, str]: ...
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def keys(self) -> Mapping[str, Tensor]: ...
    @property
    def hash(self) -> str: ...


def beneath(a: Part, b: Part) -> tuple[Part, Part]:
    """Two edits, the one that is for the weights of their sum first.

    Raises:
        ArgumentError: both change one tensor, for weights of it that are neither the same nor one edit's work.
    """
    other = [path for path in a.expects if b.expects.get(path, a.expects[path]) != a.expects[path]]
    first, second = sorted((a, b), key=lambda one: len(made_on(one)))
    below, above = set(made_on(first)), set(made_on(second))
    if other and not (below < above <= below | set(atoms(first))):
        raise ArgumentError(
            f"edits that are added must be made for the same weights, or one on top of the other; of {other[0]} "
            f"{a.method or 'one'} was made for {a.expects[other[0]][:8]}, {b.method or 'the other'} for "
            f"{b.expects[other[0]][:8]}. Add all that either was made on, or make one anew."
        )
    return first, second


def about_sum(a: Part, b: Part) -> dict[str, Any]:
    """What is known of the sum of two edits: its parts, and what both have in common."""
    common = {key: a.about[key] for key in SAME if key in a.about and a.about[key] == b.about.get(key, a.about[key])}
    on = list(made_on(beneath(a, b)[0]))
    return {"parts": [part for one in (a, b) for part in _parts(one)], **common, **({"made_on": on} if on else {})}


def joined_keys(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of both, one under the other."""
    return {name: torch.cat([held[name] for held in (a, b) if name in held]) for name in {**a, **b}}


def made_on(edit: Part) -> tuple[str, ...]:
    """Hashes of the edits on top of which this one was made; none for one that was made on the base."""
    return _texts(edit.about.get("made_on"))


def atoms(edit: Part) -> tuple[str, ...]:
    """Hashes of the edits that were added to give this one; its own where it is no sum."""
    parts = [one.get("hash") for one in _parts(edit)]
    return _texts(parts) or (edit.hash,)


def _parts(edit: Part) -> list[dict[str, Any]]:
    """What is known of each edit of a sum; a sum that was scaled as a whole is one edit."""
    parts = edit.about.get("parts")
    if isinstance(parts, list) and all(isinstance(one, Mapping) for one in parts) and "scaled" not in edit.about:
        return [dict(one) for one in parts]
    return [{"method": edit.method, "hash": edit.hash, **edit.about}]


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts, as a file may hold it; nothing for anything else."""
    return tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else ()

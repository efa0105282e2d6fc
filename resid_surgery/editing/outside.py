"""Edits made elsewhere: the difference of two models, a file of differences, a LoRA adapter."""

from typing import Any

from resid_surgery.editing.changes import Change
from resid_surgery.models.opening import OpenedModel


def between(before: OpenedModel, after: Any) -> tuple[Change, ...]:
    """What was added to the tensors of `before` to give those of `after`."""
    raise NotImplementedError


def differences(base: OpenedModel, path: Any) -> tuple[Change, ...]:
    """Differences from a safetensors file."""
    raise NotImplementedError


def adapter_factors(base: OpenedModel, adapter: Any) -> tuple[Change, ...]:
    """A LoRA adapter's factors."""
    raise NotImplementedError


def called(source: Any) -> str:
    """What a source is called in an edit's provenance."""
    raise NotImplementedError

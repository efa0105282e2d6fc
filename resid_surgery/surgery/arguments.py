"""Arguments of operations: positions, alignments, donors and numbers, as plain values or an error."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.errors import ArgumentError, PromptError, SiteError
from resid_surgery.models.prompts import Prompt
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording

Positions = Any  # "target" | "all" | index | indices | token text
Donor = Recording | Prompt


def need_kind(site: Site, kinds: tuple[type, ...], operation: str, what: str) -> None:
    """Refuse a site of another kind (a slice is one of its members' kind)."""
    kind = getattr(site, "kind", type(site))
    if not issubclass(kind, kinds):
        raise SiteError(f"`sites` of {operation} must be {what}; got {site}.")


def need_donor(name: str, donor: Any) -> Donor:
    """A recording or a prompt, or an error."""
    if not isinstance(donor, (Recording, Prompt)):
        raise ArgumentError(_check.message(name, "a recording from resid_surgery.record, or a Prompt", donor))
    return donor


def plain_align(align: Any) -> Any:
    """An alignment as a plain value: None, "index", "token", or pairs of positions."""
    if isinstance(align, Mapping):
        return tuple((plain_positions(p), plain_positions(q)) for p, q in align.items())
    if isinstance(align, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in align):
        return align
    if align is None or (isinstance(align, str) and align in ("index", "token")):
        return align
    raise ArgumentError(_check.message("align", "None, 'index', 'token' or a mapping of positions", align))


def numbers(name: str, given: Any, *, low: int = 1, high: int = 1) -> Tensor:
    """Finite numbers as a float64 tensor of its own, with `low` to `high` axes."""
    try:
        tensor = torch.as_tensor(given)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError("no numbers")
        tensor = tensor.detach().to_dense().to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(_check.message(name, "finite numbers", given)) from None
    if not low <= tensor.ndim <= high or not bool(torch.isfinite(tensor).all()) or not tensor.numel():
        got = f"shape {tuple(tensor.shape)}, finite: {bool(torch.isfinite(tensor).all())}"
        raise ArgumentError(_check.message(name, "a vector of finite numbers", got))
    return tensor


def plain_positions(given: Any) -> str | int | tuple[str | int, ...]:
    """Positions as plain values: a word or token text, an index, or a tuple of them."""
    if isinstance(given, str):
        return given
    number = _check.index_of(given)
    if number is not None:
        return number
    if _check.iterable(given) and not isinstance(given, (bytes, dict)):
        given = list(given)
        plain = tuple(one if isinstance(one, str) else _check.index_of(one) for one in given)
        if not plain:
            raise PromptError(_check.message("positions", "at least one position", given))
        if None not in plain:
            return tuple(one for one in plain if one is not None)
        given = next(one for one, found in zip(given, plain, strict=True) if found is None)
    raise ArgumentError(_check.message("positions", "'target', 'all', an index, indices or a token's text", given))


def plain_token(name: str, token: Any) -> str | int | None:
    """A token as plain text or a plain id."""
    if token is None or isinstance(token, str):
        return token
    number = _check.index_of(token)
    if number is None:
        raise ArgumentError(_check.message(name, "a token's text or id", token))
    return number

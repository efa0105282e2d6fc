"""Grammar: what a plan's fields may be, made plain: axes, sets of sites, and arms of operations."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from resid_surgery import _check
from resid_surgery.errors import ArgumentError
from resid_surgery.experiments.cases import prompt_entry, scalar
from resid_surgery.experiments.columns import free
from resid_surgery.models.prompts import Prompt
from resid_surgery.sites import Site
from resid_surgery.surgery.interventions import Intervention, Mean, Patch, Set, Steer
from resid_surgery.surgery.storing import to_entry

OWN = ("target", "versus")
LOCATE = ("kind", "k", "score", "worst", "norm", "layers", "versus")
RANDOM = ("like", "draw")
FIXED = ("sites",)
OPERATIONS: dict[str, tuple[str, ...]] = {
    "Zero": (),
    "Scale": ("factor",),
    "Clamp": ("value",),
    "Attend": ("weight", "renormalise"),
    "Cut": (),
    "Steer": ("vector", "toward", "away", "times"),
    "Set": ("values",),
    "Patch": ("donor", "align"),
    "Mean": ("over", "align"),
}
COMMON = ("kind", "sites", "positions", "each")
DONORS = ("donor", "over")
Names = Collection[str]


def referred(text: Any) -> str | None:
    """The name in ``"$name"``; None for anything else."""
    return text[1:] if isinstance(text, str) and text.startswith("$") and not text.startswith("$$") else None


def literal(text: Any) -> Any:
    """What a text stands for that is no reference: ``$$name`` is ``$name``."""
    return text[1:] if isinstance(text, str) and text.startswith("$$") else text


def references(given: Any) -> Iterator[str]:
    """Every name that plain data refer to."""
    if isinstance(given, Mapping):
        given = [value for key, value in given.items() if key not in DONORS] + (
            [f"${given['like']}"] if isinstance(given.get("like"), str) else []
        )
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from references(one)
    name = referred(given)
    if name is not None:
        yield name


def axes_from(given: Any) -> dict[str, tuple[Any, ...]]:
    """Axes: name -> values of one kind."""
    if not isinstance(given, Mapping):
        raise ArgumentError(_check.message("axes", "a mapping from names to lists of values", given))
    out: dict[str, tuple[Any, ...]] = {}
    for name, values in given.items():
        if not isinstance(name, str) or not name.isidentifier() or not free(name):
            raise ArgumentError(_check.message("axes", "named by plain words that no column has", name))
        if isinstance(values, (str, bytes, Mapping)) or not _check.iterable(values):
            raise ArgumentError(_check.message(f"axis {name}", "a list of values", values))
        held = tuple(scalar(value) for value in values)
        odd = [value for value in held if not (value is None or isinstance(value, (str, int, float, bool)))
               or (isinstance(value, int) and abs(value) >= 2**63)]  # fmt: skip
        endless = [value for value in held if isinstance(value, float) and not math.isfinite(value)]
        if odd or endless or not held:
            raise ArgumentError(_check.message(f"axis {name}", "a list of finite numbers, texts or None", values))
        if len({(type(value), value) for value in held}) != len(held):
            raise ArgumentError(_check.message(f"axis {name}", "of different values", list(held)))
        out[name] = held
    return out


def sets_from(given: Any, axes: Names) -> dict[str, dict[str, Any]]:
    """Sets of sites: name -> plain arguments."""
    if not isinstance(given, Mapping):
        raise ArgumentError(_check.message("locate", "a mapping from names to how a set is found", given))
    out: dict[str, dict[str, Any]] = {}
    for name, one in given.items():
        if not isinstance(name, str) or not name.isidentifier() or name in axes or name in OWN:
            raise ArgumentError(_check.message("locate", "named by plain words that no axis has", name))
        if not isinstance(one, Mapping):
            raise ArgumentError(_check.message(f"set {name}", "a mapping of arguments", one))
        allowed = RANDOM if "like" in one else FIXED if "sites" in one else LOCATE
        _fields(f"set {name}", one, allowed)
        located = [other for other, how in out.items() if not {"sites", "like"} & how.keys()]
        if "like" in one and one["like"] not in located:
            raise ArgumentError(_check.message(f"set {name}", "like a located set that stands before it", one["like"]))
        _known(f"set {name}", [value for key, value in one.items() if key != "like"], axes)
        out[name] = {key: _plain(value) for key, value in one.items()}
    return out


def arms_from(given: Any, axes: Mapping[str, tuple[Any, ...]], sets: Names) -> dict[str, list[dict[str, Any]]]:
    """Arms: name -> operations as plain data."""
    arms = given
    if not isinstance(given, Mapping) or "kind" in given:
        one = [given] if isinstance(given, (Intervention, Mapping)) else given
        arms = {} if one is None or (isinstance(one, (list, tuple)) and not one) else {"main": one}
    out: dict[str, list[dict[str, Any]]] = {}
    for name, operations in arms.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError(_check.message("intervene", "a mapping from names to operations", name))
        some = [operations] if isinstance(operations, (Intervention, Mapping)) else operations
        if not _check.iterable(some):
            raise ArgumentError(_check.message(f"arm {name}", "a list of operations", operations))
        out[name] = [_operation(f"arm {name}", one, axes, sets) for one in some]
        if not out[name] or sum(bool(one.get("each")) or one.get("positions") == "each" for one in out[name]) > 1:
            raise ArgumentError(
                _check.message(f"arm {name}", "a list of operations of which at most one says `each`", operations)
            )
    return out


def _operation(name: str, given: Any, axes: Mapping[str, tuple[Any, ...]], sets: Names) -> dict[str, Any]:
    one = operation_entry(given) if isinstance(given, Intervention) else given
    if not isinstance(one, Mapping):
        raise ArgumentError(_check.message(name, "made of interventions, or mappings with kind and sites", given))
    kind = _check.choice(f"{name}: kind", one.get("kind"), tuple(OPERATIONS))
    _fields(name, one, (*COMMON, *OPERATIONS[kind]))
    if "sites" not in one:
        raise ArgumentError(_check.message(name, "made of operations with `sites`", dict(one)))
    if not isinstance(one.get("each", False), bool):
        raise ArgumentError(_check.message(f"{name}: each", "true or false", one["each"]))
    if kind == "Set" and one.get("each") and isinstance(one.get("values"), (list, tuple)) and len(one["values"]) != 1:
        raise ArgumentError(
            _check.message(f"{name}: values", "a list of one value, for every site of `each`", one["values"])
        )
    for key, value in one.items():
        names = (*axes, *(sets if key == "sites" else ()), *(OWN if key in ("toward", "away") else ()))
        if key in DONORS:
            if isinstance(value, str) and referred(value) is None:
                raise ArgumentError(
                    _check.message(f"{name}: {key}", "a prompt, or the '$name' of cases' donors", value)
                )
            continue
        _known(f"{name}: {key}", value, names)
    if "each" in axes.get(referred(one.get("positions")) or "", ()):
        raise ArgumentError(
            f"{name}: `positions` must not be 'each' through an axis; write 'each' in an arm of its own."
        )
    return {key: _plain(value) for key, value in one.items()}


def operation_entry(one: Intervention) -> dict[str, Any]:
    """An intervention as plain data; vectors are lists of numbers, donors are prompts.

    Raises:
        ArgumentError: a donor is a recording.
    """
    if isinstance(one, (Patch, Mean)):
        donors = (one.donor,) if isinstance(one, Patch) else one.over
        if not all(isinstance(donor, Prompt) for donor in donors):
            raise ArgumentError(f"{one.brief} must have prompts as donors to be part of a plan; got a recording.")
        held = [prompt_entry(donor) for donor in donors if isinstance(donor, Prompt)]
        align = _alignment(one.brief, one.align) if isinstance(one.align, tuple) else one.align
        source = {"donor": held[0]} if isinstance(one, Patch) else {"over": held}
        return _base(one) | source | ({} if align is None else {"align": align})
    if isinstance(one, Set):
        many = isinstance(one.positions, tuple)
        values = [[v.tolist() for v in vs] if many else vs[0].tolist() for vs in one.values]
        return _base(one) | {"values": values}
    found = to_entry(0, one, {})
    if isinstance(one, Steer) and one.vector is not None:
        return _base(one) | {"vector": one.vector.tolist()}
    return {key: _escaped(value) for key, value in found.items() if value is not None}


def _alignment(brief: str, align: tuple[tuple[Any, Any], ...]) -> dict[str, Any]:
    """An alignment with texts as keys, as JSON has them: an index' own, so that no token's text may look like one."""
    for p, _ in align:
        if not isinstance(p, int) and (not isinstance(p, str) or indexed(p)):
            must = "of indices, or tokens' texts other than numbers, in a plan"
            raise ArgumentError(_check.message(f"align of {brief}", must, p, do="Give the token's index."))
    return {str(p): _escaped(q) for p, q in align}


def indexed(text: str) -> bool:
    """Whether a text is that of an index."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _base(one: Intervention) -> dict[str, Any]:
    where = list(one.positions) if isinstance(one.positions, tuple) else one.positions
    return {"kind": type(one).__name__, "sites": [str(site) for site in one.sites], "positions": _escaped(where)}


def _escaped(value: Any) -> Any:
    return "$" + value if isinstance(value, str) and value.startswith("$") else value


def _fields(name: str, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in given:
        if key not in allowed:
            _check.choice(f"{name}: field", key, allowed)


def _known(name: str, value: Any, names: Iterable[str]) -> None:
    """Refuse references to what there is not."""
    allowed = [f"${one}" for one in names]
    for one in references(value):
        if f"${one}" not in allowed:
            hint = f"Write '$${one}' for the text '${one}'."
            raise ArgumentError(
                _check.message(name, f"with references among {', '.join(allowed) or 'none'}", f"${one}", do=hint)
            )


def _plain(value: Any) -> Any:
    """Plain data as JSON would give it back."""
    if isinstance(value, Prompt):
        return prompt_entry(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return value.tolist()
    if isinstance(value, Site):
        return str(value)
    found = scalar(value)
    if not (found is None or isinstance(found, (str, int, float, bool))):
        raise ArgumentError(_check.message("plan", "made of plain data (numbers, texts, lists, mappings)", value))
    return found

"""Remoting: what of a forward can be carried out elsewhere, and the form in which it travels.

1. A public verb says where its traces run (`running`); every traced forward below it asks (`asked`).
2. The model itself never travels: a request names it, and holds an opened model as `Shipped`, which is its anatomy
   and a reference to the module that stands at the other end, where parts are looked up as they are here.
3. Writes travel as functions, with the classes of this library that they need, by their source.
4. What was read and noted comes back as plain containers of tensors (`plain`), of which `rebuilt` makes this library's
   values again.

``"local"`` does all of this but the journey: the request is serialised, rebuilt where this library and the caller's
files cannot be imported, and carried out here.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from resid_surgery._check import message
from resid_surgery.errors import ArgumentError, ResidSurgeryError, RunError, UnsupportedModelError
from resid_surgery.models.fingerprint import hooks_of
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import EditedModel

P = ParamSpec("P")
R = TypeVar("R")
Where = bool | str | None
GLIMPSED = 16
LOCAL = "local"
ADDRESS = re.compile(r"https?://[^\s/]+\S*")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PARTS = ("dtype", "work_dtype", "device", "work", "block", "path", "part", "has", "rows", "experts", "group_rows",
         "norm", "factor")  # fmt: skip

_where: ContextVar[bool | str | None] = ContextVar("remote", default=None)
_sent: ContextVar[tuple[OpenedModel, Any] | None] = ContextVar("sent", default=None)


def place_of_run(remote: Where) -> bool | str | None:
    """`remote` as it was given, None for here.

    Raises:
        ArgumentError: it is none of None, False, "local", True and an address.
    """
    if remote is None or remote is False:
        return None
    if remote is True or (isinstance(remote, str) and (remote == LOCAL or ADDRESS.fullmatch(remote))):
        return remote
    raise ArgumentError(
        message(
            "remote",
            'None, False, "local" (serialised and rebuilt here), True (NDIF) or the address of a server (http://...)',
            remote,
        )
    )


def need_place(model: OpenedModel, remote: Where) -> bool | str | None:
    """`place_of_run` of a model that can run there.

    Raises:
        ArgumentError: another value. UnsupportedModelError: the model cannot be named to a server.
    """
    place = place_of_run(remote)
    if place is not None:
        require_shippable(model, place)
    return place


@contextmanager
def running(model: OpenedModel, remote: Where) -> Iterator[None]:
    """Traces of this block run where `remote` says; None keeps what a verb around it said.

    Args:
        model: whose traces. remote: None or False (here), "local", True, or a server's address.

    Raises:
        ArgumentError: another value. UnsupportedModelError: the model cannot be named to a server.
    """
    place = need_place(model, remote)
    if place is None:
        yield
        return
    token = _where.set(place)
    try:
        yield
    finally:
        _where.reset(token)


def remotely(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb whose keyword `remote` says where its traces run; its first argument is a model, or leads to one."""
    first = next(iter(inspect.signature(verb).parameters))

    @functools.wraps(verb)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        place = place_of_run(keywords.get("remote"))  # type: ignore[arg-type]
        given = args[0] if args else keywords.get(first)
        model = getattr(getattr(given, "rec", given), "model", given)
        if place is None or not isinstance(model, OpenedModel):  # which the verb refuses
            return verb(*args, **keywords)
        with running(model, place):
            return verb(*args, **keywords)

    return run


def asked() -> bool | str | None:
    """Where the verb that is running wants its traces: None here, else as `running` takes it."""
    return _where.get()


def refuse_remote(model: OpenedModel, what: str, why: str) -> None:
    """Refuse, under a verb that runs elsewhere, what can only run here.

    Raises:
        UnsupportedModelError: a verb asked for another place.
    """
    if asked() is not None:
        raise UnsupportedModelError(
            f"{what} of {model.name} cannot be remote: {why}. Leave `remote` out (got {asked()!r})."
        )


def require_shippable(model: OpenedModel, place: bool | str) -> None:
    """Refuse a model that a server could not know by its name; "local" takes any.

    Raises:
        UnsupportedModelError: no name on the hub stands for the model as it is.
    """
    if place == LOCAL:
        return
    why = _unnamed(model)
    if why:
        raise UnsupportedModelError(
            f"{model.name} cannot run remotely: {why}, so no server holds it under a name. Load it by its hub id, run "
            'it here, or rehearse with remote="local".'
        )


def _unnamed(model: OpenedModel) -> str:
    """Why a model has no name on the hub; nothing if it has one."""
    name = hub_name(model)
    if isinstance(model, EditedModel):
        return "it is an edited model, whose weights are in this process only"
    if model.note:
        return f"it was {model.note}"
    if name is None:
        return "it was not read from the hub"
    if Path(name).expanduser().exists() or not HUB_NAME.fullmatch(name):
        return f"it was read from {name}, which is no hub id"
    if model.changed:
        return "its weights were changed in memory"
    if model.weights.structure() != model.weights.stood:
        return "its modules, hooks or settings were changed in memory"
    if any(hooks_of(one._forward_hooks) or one._forward_pre_hooks for one in model.module.modules()):
        return "it has forward hooks, which stay in this process"
    return ""


def hub_name(model: OpenedModel) -> str | None:
    """The hub id that a model's configuration says it came from."""
    return getattr(getattr(model.module, "config", None), "_name_or_path", None) or None


def no_tokenizer() -> Any:
    """A tokenizer that nothing is asked of: prompts travel as ids."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))


class Shipped:
    """An opened model at the other end: its anatomy, and the module that stands there.

    Attributes:
        module: the module at the other end. name, anatomy: as of the model that was sent. cache: of its own.
    """

    def __init__(self, module: Any, name: str, anatomy: Any) -> None:
        self.module, self.name, self.anatomy = module, name, anatomy
        self.cache: dict[str, Any] = {}


for _part in PARTS:
    setattr(Shipped, _part, vars(OpenedModel)[_part])


@contextmanager
def shipping(model: OpenedModel, module: Any) -> Iterator[None]:
    """In this block the model is serialised as `Shipped`, with `module` in place of its own.

    Raises:
        UnsupportedModelError: its weights, modules or hooks changed since the verb that asks began.
        ClosureError: with modules, hooks or settings that changed since it was loaded, its stream is no ledger.
    """
    require_shippable(model, asked() or LOCAL)
    model.shadow  # noqa: B018  (made anew if need be, and counted)
    model.prove()
    token, path = _sent.set((model, module)), list(sys.path)
    try:
        yield
    finally:
        _sent.reset(token)
        sys.path[:] = path  # a rehearsal takes folders out of it, and puts them back in another order


def _reduced(model: OpenedModel) -> tuple[Any, ...]:
    sent = _sent.get()
    if sent is None or sent[0] is not model:
        raise ResidSurgeryError(f"{model.name} cannot be pickled: it is an open model. Load it where it is needed.")
    return Shipped, (sent[1], model.name, model.anatomy)


for _kind in (OpenedModel, EditedModel):
    copyreg.pickle(_kind, _reduced)


def glimpse(module: Any) -> dict[str, Any]:
    """Path -> a few numbers of every parameter, in its own dtype: enough to tell one checkpoint from another."""
    found = {}
    for name, tensor in module.named_parameters():
        flat = tensor.detach().reshape(-1)
        found[name] = flat[:: max(1, len(flat) // GLIMPSED)][:GLIMPSED].cpu().clone()
    return found


def require_same(model: OpenedModel, there: dict[str, Any]) -> None:
    """Refuse what a model computed that has other weights, or another dtype, than the one that was sent.

    Raises:
        RunError: the first parameter that differs is named.
    """
    here = glimpse(model.module)
    for name in {**here, **there}:
        mine, other = here.get(name), there.get(name)
        if mine is None or other is None or mine.dtype != other.dtype or not torch.equal(mine, other):
            what = (
                "is missing" if mine is None or other is None else f"differs ({other.dtype} there, {mine.dtype} here)"
            )
            raise RunError(
                f"the server's {model.name} is not the one that is open here: {name} {what}. Load the checkpoint in "
                "the dtype that the server holds, or run it here."
            )


def plain(value: Any) -> Any:
    """A value as plain containers, which can be read where this library is not installed."""
    kind = type(value)
    if _is_own(kind):
        return (
            "value",
            kind.__module__,
            kind.__qualname__,
            {f.name: plain(getattr(value, f.name)) for f in fields(value)},
        )
    if kind is dict:
        return ("dict", [(plain(key), plain(one)) for key, one in value.items()])
    if kind in (list, tuple):
        return (kind.__name__, [plain(one) for one in value])
    return ("same", value)


def rebuilt(value: Any) -> Any:
    """What `plain` was made of."""
    if value[0] == "value":
        made: Any = object.__new__(_own(value[1], value[2]))
        for name, one in value[3].items():
            object.__setattr__(made, name, rebuilt(one))
        return made
    if value[0] == "dict":
        return {rebuilt(key): rebuilt(one) for key, one in value[1]}
    if value[0] in ("list", "tuple"):
        held = [rebuilt(one) for one in value[1]]
        return held if value[0] == "list" else tuple(held)
    return value[1]


def _is_own(kind: type) -> bool:
    return kind.__module__.startswith("resid_surgery.") and is_dataclass(kind)


def _own(module: str, name: str) -> type:
    """A dataclass of this library, of which alone values are rebuilt."""
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type) or not _is_own(kind):
        raise ResidSurgeryError(
            f"what came back from a remote run holds {module}.{name}, which is no value of this library."
        )
    return kind

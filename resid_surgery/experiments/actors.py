"""Actors: one model in a process of its own, which carries groups of prompts out on it; what is sent to it.

A model that was read from a name or a folder is read from there again; one that exists only in memory, or that was
changed since, is sent as it is. Either way its weights must be the driver's, bit for bit.
"""

import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import torch

from resid_surgery.errors import ArgumentError
from resid_surgery.experiments.plans import Plan
from resid_surgery.experiments.work import Numbered, Outcome, Worker
from resid_surgery.models.checkpoints import EMBEDDED
from resid_surgery.models.opening import OpenedModel
from resid_surgery.stream.loading import load

UNSENDABLE = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, RuntimeError)


@final
@dataclass(frozen=True, eq=False)
class Parcel:
    """All that an actor is made from.

    Attributes:
        name: of the model. asked: arguments of `load`. body: the module and its tokenizer where they are sent, else
            None. device: where the body goes. plan, schemas: of the worker.
    """

    name: str
    asked: Mapping[str, Any]
    body: bytes | None
    device: str
    plan: Plan
    schemas: Mapping[str, pa.Schema]

    @classmethod
    def of(cls, worker: Worker, device: str | None, pickler: Any) -> "Parcel":
        """What makes workers like one.

        Args:
            worker: of the driver. device: of the actors' models; None as the driver's was laid out, or else "cuda".
            pickler: the module that pickles.

        Raises:
            ArgumentError: the model exists in memory only and cannot be sent.
        """
        model = worker.model
        if model.origin is None or model.changed:
            asked, body = {"anatomy": model.anatomy.layout}, _packed(model, pickler)
        else:
            asked, body = _placed(model.origin, device), None
        return cls(model.name, asked, body, device or "cuda", worker.plan, worker.schemas)

    def opened(self) -> OpenedModel:
        """The model, proven as any other.

        Raises:
            ResidSurgeryError: it cannot be opened here.
        """
        if self.body is None:
            return load(**self.asked)
        # a model's classes cannot be sent but by pickling; these bytes come from the driver, as the actor itself does
        packed = torch.load(io.BytesIO(self.body), map_location=self.device, weights_only=False)
        module, tokenizer = packed
        model = load(module, tokenizer=tokenizer, **self.asked)
        model.name = self.name
        return model


@final
class Actor:
    """A worker in a process of its own."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker: Worker | None = None

    def open(self, parcel: Parcel) -> tuple[str, str]:
        """Open the model.

        Returns:
            (hash of its weights, version of this library).
        """
        self.worker = Worker(parcel.opened(), parcel.plan, parcel.schemas)
        return self.worker.model.weights.contents(), version("resid-surgery")

    def run(self, group: Sequence[Numbered], skip: Collection[int]) -> list[Outcome]:
        """The outcomes of a whole group."""
        assert self.worker is not None
        return list(self.worker.run(group, skip))


def _placed(origin: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Arguments of `load` for another process: paths in full, and on its own device."""
    source = str(origin["model"])
    path = Path(source).expanduser()
    asked = dict(origin) | {"model": str(path.resolve()) if source != EMBEDDED and path.exists() else source}
    if device is None and asked.get("device_map") is not None:
        return asked
    return asked | {"device_map": None, "max_memory": None, "device": device or "cuda"}


def _packed(model: OpenedModel, pickler: Any) -> bytes:
    found = io.BytesIO()
    try:
        torch.save((model.module, model.tokenizer), found, pickle_module=pickler)
    except UNSENDABLE as error:
        raise ArgumentError(
            f"{model.name} exists in this process only and cannot be sent to other workers ({error}): write it with "
            "save_pretrained and load that folder, or run it with executor='local'."
        ) from error
    return found.getvalue()

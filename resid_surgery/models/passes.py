"""Passes: what one forward reads and writes, in forward order; carried out inside a trace, wherever that runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor

from resid_surgery.errors import ResidSurgeryError, UnsupportedModelError, out_of_memory
from resid_surgery.models.envoys import Values, Write, place_of, read_at, written
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.remoting import glimpse, plain, rebuilt, require_same
from resid_surgery.models.taps import Tap, is_sum


class Notes(Protocol):
    """What writes note for after the run; it comes back with what was read."""

    def noted(self) -> dict[str, Any]:
        """Name -> containers of tensors and of dataclasses of this library."""

    def take(self, noted: dict[str, Any]) -> None:
        """Hold what `noted` gave elsewhere."""


@final
@dataclass(eq=False, kw_only=True)
class Pass:
    """One forward's reads and writes.

    Attributes:
        model: the opened model. plan: taps in forward order. wanted: those that are read. writes: what is done there.
        sums: taps of a sum of two modules' outputs -> the first of them. rows: of the batch.
        kept, ends: positions kept of reads, and of logits; None for all. everywhere: reads that keep all.
        start, stream: blocks below the first do not run; their output is the second.
        notes: what writes note. cache: keys and values that the forward adds to.
        places: tap -> where it was found in the traced tree. raised: what a write raised.
    """

    model: OpenedModel
    plan: list[Tap]
    wanted: frozenset[Tap]
    writes: Mapping[Tap, Write]
    sums: dict[Tap, Tap]
    rows: int
    kept: list[int] | None
    ends: list[int] | None
    everywhere: frozenset[Tap]
    start: int
    stream: Tensor | None
    notes: Notes | None = None
    cache: Any = None
    places: dict[Tap, tuple[Any, str]] = field(default_factory=dict)
    raised: list[BaseException] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: OpenedModel,
        reads: Sequence[Tap],
        writes: Mapping[Tap, Write],
        *,
        resume: tuple[int, Tensor] | None,
        **rest: Any,
    ) -> Pass:
        """A pass of some reads and writes."""
        wanted = frozenset(reads)
        sums = {tap: Tap("mlp_first", tap.layer) for tap in wanted | set(writes) if is_sum(model, tap)}
        plan = sorted(wanted | set(writes) | set(sums.values()), key=lambda tap: tap.when(model))
        start, stream = resume or (0, None)
        return cls(model=model, plan=plan, wanted=wanted, writes=writes, sums=sums, start=start, stream=stream, **rest)

    def run(self, traced: Any) -> Values:
        """Read and write, in a trace of `traced`."""
        seen: dict[Any, Any] = {}
        first: dict[Any, Any] = {}
        for block in [self.place(traced, Tap("block_out", i))[0] for i in range(self.start)]:
            block.skip(self.stream)
        for tap in self.plan:
            place, name = self.place(traced, tap)
            value = getattr(place, name)
            if tap.name == "mlp_first":
                first[tap] = value[0] if isinstance(value, tuple) else value
            other = first[self.sums[tap]] if tap in self.sums else None
            if other is not None:
                value = value + other
            if tap in self.writes:
                value = self.write(tap, value, seen)
                setattr(place, name, value if other is None else value - other)
            if tap in self.wanted:
                here = self.ends if tap.layer < 0 else None if tap in self.everywhere else self.kept
                seen[tap] = read_at(self.model, tap, value, self.rows, here)
        return seen

    def place(self, traced: Any, tap: Tap) -> tuple[Any, str]:
        """The envoy of a tap and which of its fields holds the value."""
        if tap not in self.places:
            self.places[tap] = place_of(traced, self.model, tap)
        return self.places[tap]

    def write(self, tap: Tap, value: Any, seen: Values) -> Any:
        """What a write leaves."""
        try:
            return written(self.model, tap, value, self.rows, self.writes[tap], seen)
        except BaseException as error:
            self.raised.append(error)
            raise

    def report(self, traced: Any) -> Any:
        """`run`, and what it came to as plain containers."""
        seen = self.run(traced)
        if self.cache is not None:
            traced.output  # noqa: B018  (the forward is over: the cache is complete)
        held = None if self.cache is None else [(one.keys, one.values) for one in self.cache.layers]
        return plain([seen, None if self.notes is None else self.notes.noted(), held, glimpse(self.model.module)])

    def take(self, report: Any) -> Values:
        """What a `report` from elsewhere says; notes and cache are handed on."""
        seen, noted, held, weights = rebuilt(report)
        require_same(self.model, weights)
        if self.notes is not None:
            self.notes.take(noted)
        for i, (keys, values) in enumerate(held or []):
            if i == len(self.cache.layers):
                self.cache.update(keys, values, i)
            self.cache.layers[i].keys, self.cache.layers[i].values = keys, values
        return seen  # type: ignore[no-any-return]


def keeps_logits(model: OpenedModel) -> bool:
    """Whether the model's forward can leave out logits that are not wanted."""
    if "keeps_logits" not in model.cache:
        model.cache["keeps_logits"] = "logits_to_keep" in inspect.signature(type(model.module).forward).parameters
    return bool(model.cache["keeps_logits"])


@contextmanager
def explained(job: Pass, kind: type[ResidSurgeryError], what: str, why: str = "") -> Iterator[None]:
    """What a write raised, as it raised it; whatever else a trace raises, as an error of one kind."""
    try:
        with refused(what, "." + why, kind):
            yield
    except Exception:
        if job.raised:
            raise job.raised[0] from None
        raise


@contextmanager
def refused(what: str, why: str, kind: type[ResidSurgeryError] = UnsupportedModelError) -> Iterator[None]:
    """Whatever a trace raises, as an error: what failed (how) and why that matters."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ResidSurgeryError) or out_of_memory(error):
            raise
        raise kind(f"{what} ({type(error).__name__}: {last_line(error)}){why}") from error


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:200]

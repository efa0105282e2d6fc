"""Policy: what each gate of a validation must keep to, as data.

A gate has a direction, a unit, and two limits for a single edit and for a stream of edits: beyond `warn` it is worth a
look, beyond `fail` the edit is refused. The limits are starting values; `Policy().but(...)` changes them, and the hash
of what was used stands in every report.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, final

import pandas as pd
import xxhash

from resid_surgery import _check
from resid_surgery.errors import ArgumentError

AT_MOST, AT_LEAST = "at most", "at least"
PROTOCOL = "1"
SETTINGS = ("single", "stream")
Limit = float | None


@final
@dataclass(frozen=True)
class Limits:
    """Two limits of a gate; None is no limit."""

    warn: Limit
    fail: Limit


@final
@dataclass(frozen=True)
class Gate:
    """One gate: what is measured, in which unit, and which way is harm.

    Attributes:
        name: its id. direction: "at most" or "at least". unit: of values and limits. ideal: the value that no edit can
            better. span: what values are possible.
        noise: how 3 x the noise floor acts on a limit: "raises" it (a side effect below the noise cannot be told from
            none), "lowers" it, or "" (no effect).
        counted: for a single edit this is read off its own prompts, all of them: a count, no sample. logs: it is a
            relative change, which may be given as log ratios.
    """

    name: str
    direction: str
    unit: str
    ideal: float
    span: tuple[float, float] = (-inf, inf)
    noise: str = ""
    counted: bool = False
    logs: bool = False

    @property
    def protocol(self) -> str:
        """Id of how it is measured; it changes whenever that does."""
        return f"{self.name}/{PROTOCOL}"

    def effective(self, limit: Limit, noise: float) -> Limit:
        """The limit that counts: max(policy, 3 x noise floor), or its mirror image."""
        if limit is None or not self.noise:
            return limit
        return max(limit, 3 * noise) if self.noise == "raises" else min(limit, -3 * noise)

    def within(self, value: float, limit: Limit) -> bool:
        """Whether a value keeps to a limit; on it is within."""
        return limit is None or (value <= limit if self.direction == AT_MOST else value >= limit)

    def used(self, value: float, limit: Limit) -> float:
        """The share of the room between ideal and limit that a value uses up: 1 at the limit, more beyond it."""
        if limit is None or value != value:
            return 0.0
        if self.ideal in (inf, -inf):
            return limit / value if limit * value > 0 else inf
        room, way = abs(limit - self.ideal), max(0.0, (value - self.ideal) * (1 if self.direction == AT_MOST else -1))
        return way / room if room else (inf if way else 0.0)


_SHARE, _POSITIVE = (0.0, 1.0), (0.0, inf)
GATES = MappingProxyType({
    gate.name: gate
    for gate in (
        Gate("efficacy: new above old", AT_LEAST, "share", 1.0, _SHARE, counted=True),
        Gate("efficacy: free decoding", AT_LEAST, "share", 1.0, _SHARE, counted=True),
        Gate("efficacy: old answer dropped", AT_MOST, "nats", -inf, noise="lowers", counted=True),
        Gate("paraphrase: new above old", AT_LEAST, "share", 1.0, _SHARE),
        Gate("retention", AT_LEAST, "share", 1.0, _SHARE),
        Gate("kl: neighbourhood", AT_MOST, "nats/token", 0.0, _POSITIVE, "raises"),
        Gate("kl: edit prepended", AT_MOST, "nats/token", 0.0, _POSITIVE, "raises"),
        Gate("kl: unrelated text", AT_MOST, "nats/token", 0.0, _POSITIVE, "raises"),
        Gate("top-1 flips: unrelated text", AT_MOST, "share", 0.0, _SHARE, "raises"),
        Gate("perplexity drift", AT_MOST, "relative", 0.0, (-1.0, inf), "raises", logs=True),
        Gate("capability margin", AT_LEAST, "relative", 0.0, noise="lowers"),
        Gate("cast cosine", AT_LEAST, "cosine", 1.0, (-1.0, 1.0)),
        Gate("efficacy / random control", AT_LEAST, "times", inf),
    )
})  # fmt: skip
"""Gate id -> `Gate`, in the order of reports."""

_STARTING: dict[str, tuple[Limits, Limits]] = {
    "efficacy: new above old": (Limits(1.0, 1.0), Limits(0.95, 0.90)),
    "efficacy: free decoding": (Limits(1.0, None), Limits(0.95, 0.90)),
    # an edit that erases: a fall to 37 % of its probability is asked for, one to 90 % is taken as none
    "efficacy: old answer dropped": (Limits(-1.0, -0.1), Limits(-1.0, -0.1)),
    "paraphrase: new above old": (Limits(0.80, 0.60), Limits(0.80, 0.60)),
    "retention": (Limits(None, None), Limits(0.95, 0.90)),
    "kl: neighbourhood": (Limits(0.02, 0.10), Limits(0.05, 0.20)),
    "kl: edit prepended": (Limits(0.5, 1.0), Limits(0.5, 1.0)),
    "kl: unrelated text": (Limits(0.001, 0.01), Limits(0.01, 0.05)),
    "top-1 flips: unrelated text": (Limits(0.01, 0.05), Limits(0.03, 0.08)),
    "perplexity drift": (Limits(0.005, 0.02), Limits(0.05, 0.15)),
    "capability margin": (Limits(-0.01, -0.03), Limits(-0.02, -0.05)),
    "cast cosine": (Limits(0.98, 0.90), Limits(0.98, 0.90)),
    "efficacy / random control": (Limits(5.0, 2.0), Limits(5.0, 2.0)),
}


@final
@dataclass(frozen=True)
class Policy:
    """Limits of every gate, for a single edit and for a stream.

    Attributes:
        single, stream: gate id -> `Limits`.

    Example:
        >>> Policy().but(**{"kl: unrelated text": (0.002, 0.02)}).limits("kl: unrelated text", stream=False)
        Limits(warn=0.002, fail=0.02)
    """

    single: Mapping[str, Limits] = field(default_factory=lambda: {g: s for g, (s, _) in _STARTING.items()})
    stream: Mapping[str, Limits] = field(default_factory=lambda: {g: s for g, (_, s) in _STARTING.items()})

    def __post_init__(self) -> None:
        for name in SETTINGS:
            held = getattr(self, name)
            if not isinstance(held, Mapping):
                raise ArgumentError(_check.message(name, "a mapping from gates to (warn, fail)", held))
            given = {gate: _limits(gate, one) for gate, one in held.items()}
            object.__setattr__(self, name, MappingProxyType(given))

    def __repr__(self) -> str:
        return f"Policy({len(self.single)} gates, {self.hash[:8]})"

    def but(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> "Policy":
        """The same policy with other limits for some gates.

        Args:
            changes, more: gate id -> (warn, fail), for a single edit and a stream alike, or {"single": (warn, fail),
                "stream": (warn, fail)} with one or both. None is no limit.

        Raises:
            ArgumentError: an unknown gate, no pair of limits, or a fail limit on the mild side of the warn limit.
        """
        if not isinstance({} if changes is None else changes, Mapping):
            raise ArgumentError(_check.message("changes", "a mapping from gates to (warn, fail)", changes))
        found = {name: dict(getattr(self, name)) for name in SETTINGS}
        for gate, given in {**(changes or {}), **more}.items():
            _check.choice("policy", gate, tuple(GATES))
            for setting, pair in (given if isinstance(given, Mapping) else dict.fromkeys(SETTINGS, given)).items():
                found[_check.choice(gate, setting, SETTINGS)][gate] = _limits(gate, pair)
        return Policy(**found)

    def limits(self, gate: str, *, stream: bool) -> Limits:
        """Of one gate.

        Raises:
            ArgumentError: an unknown gate, or one that has no limit in this setting.
        """
        setting = SETTINGS[_check.flag("stream", stream)]
        found: Limits = getattr(self, setting).get(_check.choice("gate", gate, tuple(GATES)), Limits(None, None))
        if found == Limits(None, None):
            raise ArgumentError(f"`{gate}` has no limit for a {setting} edit; give one: "
                                f"Policy().but({{{gate!r}: {{{setting!r}: (warn, fail)}}}}).")  # fmt: skip
        return found

    def limited(self, gate: str, *, stream: bool) -> bool:
        """Whether a gate has any limit; one that was given (None, None) is not judged."""
        held = getattr(self, SETTINGS[_check.flag("stream", stream)])
        found = held.get(_check.choice("gate", gate, tuple(GATES)), Limits(None, None))
        return bool(found != Limits(None, None))

    @property
    def table(self) -> pd.DataFrame:
        """One row a gate: gate, direction, unit, single_warn, single_fail, stream_warn, stream_fail, protocol."""
        rows = [
            {"gate": name, "direction": gate.direction, "unit": gate.unit, **self._row(name), "protocol": gate.protocol}
            for name, gate in GATES.items()
        ]
        return pd.DataFrame(rows)

    @property
    def said(self) -> dict[str, dict[str, list[Limit]]]:
        """As plain data, for manifests: setting -> gate -> [warn, fail]."""
        return {name: {gate: [one.warn, one.fail] for gate, one in sorted(getattr(self, name).items())}
                for name in SETTINGS}  # fmt: skip

    @property
    def hash(self) -> str:
        """Of all limits, and of the protocols that they are for."""
        text = json.dumps([self.said, sorted(gate.protocol for gate in GATES.values())], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())

    def _row(self, gate: str) -> dict[str, Limit]:
        pairs = {name: getattr(self, name).get(gate, Limits(None, None)) for name in SETTINGS}
        return {f"{name}_{side}": getattr(pair, side) for name, pair in pairs.items() for side in ("warn", "fail")}


def _limits(gate: str, given: Any) -> Limits:
    """A pair, checked against the gate's direction."""
    _check.choice("policy", gate, tuple(GATES))
    pair = (given.warn, given.fail) if isinstance(given, Limits) else given
    if isinstance(pair, (str, bytes, Mapping)) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise ArgumentError(_check.message(gate, "a pair (warn, fail) of numbers or None", given))
    warn, fail = (None if one is None else _check.finite(gate, one) for one in pair)
    if warn is not None and fail is not None and not GATES[gate].within(warn, fail):
        raise ArgumentError(_check.message(gate, f"(warn, fail) with fail not stricter than warn, as values must be "
                                                 f"{GATES[gate].direction} them", given))  # fmt: skip
    return Limits(warn, fail)

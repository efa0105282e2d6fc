"""Interventions: operations on sites, as plain values.

``Zero``, ``Scale``, ``Patch`` and ``Steer`` say what to do to which sites at which positions; nothing
happens until `resid_surgery.intervene` runs them. The order in a list does not matter: operations
act in forward order, and at one place finer sites before coarser ones and ``Scale`` before ``Steer``.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery import _check
from resid_surgery.errors import ArgumentError, InterventionError, PromptError, SiteError, StaleRecordingError
from resid_surgery.sites import (
    AttnNeuron,
    Bias,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    Resid,
    SharedNeuron,
    Site,
    Sublayer,
    as_sites,
)
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.stream.subvalues import attention_of, joint_parts, need_group, neuron_place, resolve_in

_NEURONS = (Neuron, ExpertNeuron, SharedNeuron)
Positions = Any  # "target" | "all" | index | indices | token text


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of `Zero`, `Scale`, `Patch` and `Steer`.

    Attributes:
        sites: what is operated on: sites or their texts.
        positions: where: "target" (the predicting position), "all", an index, indices, or the
            text of one token.
    """

    sites: Any
    positions: Positions = field(default="target", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", as_sites(self.sites))
        for site in self.sites:
            if isinstance(site, Bias) or (isinstance(site, Constant) and site.name != "embed"):
                raise SiteError(
                    f"`{site}` is a constant of the weights; operate on its sublayer, or edit the weights instead."
                )
        object.__setattr__(self, "positions", _plain_positions(self.positions))

    def __repr__(self) -> str:
        sites = [str(s) for s in self.sites]
        where = "" if self.positions == "target" else f", positions={self.positions!r}"
        return f"{type(self).__name__}({sites}{self._detail()}{where})"

    def _detail(self) -> str:
        return ""

    def _key(self) -> tuple[Any, ...]:
        return (type(self), self.sites, repr(self.positions), self._detail())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@final
@dataclass(frozen=True, eq=False, repr=False)
class Zero(Intervention):
    """Remove sites (paper: setting a subvalue to zero); the same as ``Scale(sites, 0)``.

    Example:
        >>> Zero(["L27.N846", "L12.H4<3"])
        Zero(['L27.N846', 'L12.H4<3'])
    """


@final
@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """Multiply sites by a factor; 1 changes nothing, 0 removes.

    Example:
        >>> Scale("L27.N846", 2.0)
        Scale(['L27.N846'], 2.0)
    """

    factor: float = 1.0

    def __init__(self, sites: Any, factor: float, *, positions: Positions = "target") -> None:
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "factor", _check.finite("factor", factor))
        object.__setattr__(self, "positions", positions)
        self.__post_init__()

    def _detail(self) -> str:
        return f", {self.factor}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Give sites the values that they had in another recording of the same model.

    The donor must have as many tokens; each position takes the donor's value at the same index.
    Positions other than the donor's predicting position need a donor recorded with
    ``positions="all"``, and there only whole sublayers and states can be patched.
    """

    donor: Recording | None = None

    def __init__(self, sites: Any, donor: Recording, *, positions: Positions = "target") -> None:
        be_recording(donor, "donor")
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "donor", donor)
        object.__setattr__(self, "positions", positions)
        self.__post_init__()

    def _detail(self) -> str:
        return f", donor={self.donor!r}"

    def _key(self) -> tuple[Any, ...]:
        return (type(self), self.sites, repr(self.positions), id(self.donor))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Steer(Intervention):
    """Add a vector (d_model) to what a site writes, or to a state of the stream.

    At a sublayer or a state the vector is added to the stream itself; at a neuron or head it is
    added to the sublayer's output, before a post-norm.
    """

    vector: Tensor | None = None

    def __init__(self, sites: Any, vector: Any, *, positions: Positions = "target") -> None:
        try:
            tensor = torch.as_tensor(vector).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(_check.message("vector", "a vector of d_model numbers", vector)) from None
        if tensor.ndim != 1 or tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            got = f"shape {tuple(tensor.shape)}, {tensor.dtype}, finite: {bool(torch.isfinite(tensor).all())}"
            raise ArgumentError(_check.message("vector", "a vector of d_model finite numbers", got))
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "vector", tensor)
        object.__setattr__(self, "positions", positions)
        self.__post_init__()

    def _detail(self) -> str:
        assert self.vector is not None
        return f", <vector of {self.vector.numel()}, norm {float(self.vector.norm()):.4g}>"

    def _key(self) -> tuple[Any, ...]:
        assert self.vector is not None
        return (type(self), self.sites, repr(self.positions), tuple(self.vector.tolist()))


@final
@dataclass(frozen=True, eq=False)
class Operation:
    """One site at one position of one row, resolved: left = factor * found + value, then + steer.

    Attributes:
        site, position: resolved. factor: 0 removes, 1 leaves.
        value: what replaces, in the site's own space (a coefficient, a head's z, a vector).
        steer: (d_model,) vector added to what is written. origin: the intervention, for messages.
    """

    site: Site
    position: int
    factor: float
    value: Tensor | None
    steer: Tensor | None
    origin: Intervention


def resolve(rec: Recording, interventions: Any) -> tuple[Operation, ...]:
    """Interventions as operations on a recording's prompt, checked before any forward runs.

    Raises:
        InterventionError: no interventions, contradictions or nested writes (both named).
        SiteError: a site does not exist. PromptError: a position does not exist.
        StaleRecordingError: a donor was made with other weights.
    """
    if isinstance(interventions, Intervention):
        interventions = [interventions]
    if isinstance(interventions, (str, bytes)) or not isinstance(interventions, Iterable):
        raise InterventionError(_check.message("interventions", "a list of Zero, Scale, Patch or Steer", interventions))
    out: list[Operation] = []
    for one in interventions:
        if not isinstance(one, Intervention):
            raise InterventionError(_check.message("interventions", "a list of Zero, Scale, Patch or Steer", one))
        out += _operations(rec, one)
    if not out:
        raise InterventionError("`interventions` must hold at least one operation; got none.")
    _refuse_overlaps(out)
    return tuple(out)


def _operations(rec: Recording, one: Intervention) -> list[Operation]:
    if isinstance(one, Patch):
        _check_donor(rec, one)
    if isinstance(one, Steer) and one.vector is not None and one.vector.numel() != rec.model.anatomy.d_model:
        raise ArgumentError(
            _check.message("vector", f"{rec.model.anatomy.d_model} numbers", one.vector.numel(), model=rec.model.name)
        )
    out = []
    for site, position in itertools.product(one.sites, rec.prompt.positions(one.positions)):
        site = _canonical(resolve_in(rec, site))
        source = getattr(site, "source", None)
        if source is not None and source > position:
            if one.positions == "all":
                continue  # causal: there is nothing from a later source
            raise SiteError(f"`{site}` has no source {source} at position {position}: attention is causal.")
        factor, value, steer = 1.0, None, None
        here = position == rec.prompt.position and one.positions != "all"
        if isinstance(site, ExpertNeuron) and here and not isinstance(one, Steer):
            need_group(rec, site)
        if isinstance(one, Zero):
            factor = 0.0
        elif isinstance(one, Scale):
            factor = one.factor
        elif isinstance(one, Patch):
            factor, value = 0.0, _donor_value(one, site, position)
        elif isinstance(one, Steer):
            assert one.vector is not None
            steer = rec.work(one.vector)
        out.append(Operation(site, position, factor, value, steer, one))
    return out


def _canonical(site: Site) -> Site:
    """One name per place: the embedding is the first block's input."""
    return Resid(0, "pre") if isinstance(site, Constant) else site


def _check_donor(rec: Recording, one: Patch) -> None:
    donor = one.donor
    assert donor is not None
    if donor.model is not rec.model:
        raise InterventionError(
            f"`donor` must be a recording of the same opened model ({rec.model.name}); got one of {donor.model.name}."
        )
    if donor.fingerprint != rec.fingerprint:
        raise StaleRecordingError(
            f"`donor` was recorded with other weights of {rec.model.name} than the recording operated on. "
            "Record it again."
        )
    if donor.n_positions != rec.n_positions:
        raise InterventionError(
            f"`donor` must have as many tokens as the recording ({rec.n_positions}); got {donor.n_positions} "
            f"({list(donor.prompt.tokens)})."
        )


def _donor_value(one: Patch, site: Site, position: int) -> Tensor:
    donor = one.donor
    assert donor is not None
    if position == donor.prompt.position:
        return _value_at_target(donor, site)
    if donor.stream is None or not isinstance(site, (Sublayer, Resid)):
        what = (
            "only whole sublayers and states are kept there"
            if donor.stream is not None
            else "it holds only its predicting position"
        )
        raise InterventionError(
            f"`donor` has no value of {site} at position {position}: {what}. "
            "Record the donor with positions='all' and patch L*.attn, L*.mlp or L*.resid_*."
        )
    s, i = donor.stream, site.layer
    if isinstance(site, Sublayer):
        return donor.work((s.attn_out if site.part == "attn" else s.mlp_out)[i, position])
    if site.stage == "pre":
        return donor.work(s.resid_pre[i, position])
    if site.stage == "post" and i + 1 < len(s.resid_pre):
        return donor.work(s.resid_pre[i + 1, position])
    model = donor.model
    attn, mlp = donor.work(s.attn_out[i, position]), donor.work(s.mlp_out[i, position])
    state = donor.work(s.resid_pre[i, position])
    if model.block(i).parallel:
        return state * model.factor(i, "mlp_carry") + attn + mlp
    state = state * model.factor(i, "attn_carry") + attn
    return state if site.stage == "mid" else state * model.factor(i, "mlp_carry") + mlp


def _value_at_target(donor: Recording, site: Site) -> Tensor:
    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        return donor.work(need_group(donor, site, f"{site} of the donor").coefficient[neuron_place(site)[1]])
    if isinstance(site, Head):
        return donor.work(attention_of(donor, site.layer, str(site)).z[site.head])
    if isinstance(site, HeadSource):
        return joint_parts(donor, site.layer)[site.head, site.source]
    if isinstance(site, AttnNeuron):
        if site.source is None:
            return donor.work(attention_of(donor, site.layer, str(site)).z[site.head, site.index])
        return joint_parts(donor, site.layer)[site.head, site.source, site.index]
    record = donor.layers[site.layer]  # type: ignore[attr-defined]
    if isinstance(site, Sublayer):
        return donor.work(record.attn_out if site.part == "attn" else record.mlp_out)
    assert isinstance(site, Resid)
    if site.stage == "pre":
        return donor.work(record.resid_pre)
    if site.stage == "mid":
        return donor.resid_mid(site.layer)
    last = site.layer == donor.model.anatomy.n_layers - 1
    return donor.work(donor.resid_final if last else donor.layers[site.layer + 1].resid_pre)


def _refuse_overlaps(operations: Sequence[Operation]) -> None:
    """Writes to one place, or to a whole and its part, are refused unless all scale or steer."""
    groups: dict[tuple[Any, ...], dict[Site, list[Operation]]] = {}
    for op in operations:
        groups.setdefault((_region(op.site), op.position), {}).setdefault(op.site, []).append(op)
    for group in groups.values():
        for same in group.values():
            for a, b in itertools.combinations(same, 2):
                _refuse(a, b)
        # neurons can only meet themselves or their whole sublayer: no need to compare them pairwise
        coarse = [site for site in group if not isinstance(site, _NEURONS)]
        for site in coarse:
            for other in group:
                if (isinstance(other, _NEURONS) or str(site) < str(other)) and _overlap(site, other):
                    for a, b in itertools.product(group[site], group[other]):
                        _refuse(a, b)


def _refuse(a: Operation, b: Operation) -> None:
    """Raise unless two writes to one place combine."""
    if all(isinstance(op.origin, (Scale, Steer)) for op in (a, b)):
        return
    raise InterventionError(
        f"{a.origin!r} and {b.origin!r} both write {a.site}"
        + (f" and {b.site}, one inside the other," if a.site != b.site else "")
        + f" at position {a.position}. Keep one, or use Scale and Steer only, which combine."
    )


def _region(site: Site) -> tuple[Any, ...]:
    if isinstance(site, Resid):
        return (site.layer + (site.stage == "post"), "mid" if site.stage == "mid" else "pre")
    part = site.part if isinstance(site, Sublayer) else "mlp" if isinstance(site, _NEURONS) else "attn"
    return (site.layer, part)  # type: ignore[attr-defined]


def _overlap(a: Site, b: Site) -> bool:
    if isinstance(a, (Sublayer, Resid)) or isinstance(b, (Sublayer, Resid)):
        return True
    if isinstance(a, _NEURONS) and isinstance(b, _NEURONS):
        return a == b
    if a.head != b.head:  # type: ignore[attr-defined]
        return False
    for name in ("index", "source"):
        left, right = getattr(a, name, None), getattr(b, name, None)
        if left is not None and right is not None and left != right:
            return False
    return True


def _plain_positions(given: Any) -> str | int | tuple[str | int, ...]:
    """Positions as plain values: a word or token text, an index, or a tuple of them."""
    if isinstance(given, str):
        return given
    number = _check.index_of(given)
    if number is not None:
        return number
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        members = [one.item() if isinstance(one, torch.Tensor) and one.ndim == 0 else one for one in given]
        plain = [_plain_positions(one) for one in members]
        if not plain:
            raise PromptError(_check.message("positions", "at least one position", given))
        if not any(isinstance(one, tuple) for one in plain):
            return tuple(one for one in plain if not isinstance(one, tuple))
    raise ArgumentError(_check.message("positions", "'target', 'all', an index, indices or a token's text", given))

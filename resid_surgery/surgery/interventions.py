"""Interventions: operations on sites, as plain values.

``Zero``, ``Scale``, ``Steer``, ``Set``, ``Clamp``, ``Patch``, ``Mean``, ``Attend`` and ``Cut`` say what to do to which
sites at which positions; nothing happens until `resid_surgery.intervene`, `sweep` or `under` runs them.
The order in a list does not matter: operations act in forward order, and at one place finer sites before
coarser ones and ``Scale`` before ``Steer``. They compare and hash by value, and ``repr`` can be pasted back.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from resid_surgery import _check
from resid_surgery.addresses import At, Edge, Slice, as_sites
from resid_surgery.errors import ArgumentError, InterventionError, SiteError
from resid_surgery.models.prompts import Prompt
from resid_surgery.sites import AttnNeuron, Bias, Constant, ExpertNeuron, HeadSource, Neuron, SharedNeuron, Site
from resid_surgery.stream.recording import Recording
from resid_surgery.surgery.arguments import (
    Donor,
    Positions,
    need_donor,
    need_kind,
    numbers,
    plain_align,
    plain_positions,
    plain_token,
)

BRIEFLY = 8
COEFFICIENTS = (Neuron, ExpertNeuron, SharedNeuron, AttnNeuron)


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all operations.

    Attributes:
        sites: what is operated on: sites, slices or edges, or their texts.
        positions: where: "target" (the predicting position), "all", an index, indices, or the
            text of one token. A site written with ``@p`` has its own.
    """

    sites: Any
    positions: Positions = field(default="target", kw_only=True)
    apart: ClassVar[bool] = False  # as an operation on an edge, has its own value at each position

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", as_sites(self.sites))
        for site in self.sites:
            bare = site.site if isinstance(site, At) else site
            if isinstance(bare, Bias) or (isinstance(bare, Constant) and bare.name != "embed"):
                raise SiteError(
                    f"`{site}` is a constant of the weights; operate on its sublayer, or edit the weights instead."
                )
            self._accept(bare)
        object.__setattr__(self, "positions", plain_positions(self.positions))

    def _accept(self, site: Site) -> None:
        """Refuse a kind of site that this operation has no meaning for."""

    def __repr__(self) -> str:
        return self._text(self._detail())

    @property
    def brief(self) -> str:
        """The repr without the numbers of vectors and with the first few sites, for messages."""
        text = self._text(self._short(), BRIEFLY)
        left = len(self.sites) - BRIEFLY
        return text if left <= 0 else text.replace("]", f", and {left:,} more]", 1)

    def _text(self, detail: str, most: int | None = None) -> str:
        sites = [str(s) for s in self.sites[:most]]
        where = "" if self.positions == "target" else f", positions={self.positions!r}"
        return f"{type(self).__name__}({sites}{detail}{where})"

    def _detail(self) -> str:
        return ""

    def _short(self) -> str:
        return self._detail()

    def _key(self) -> tuple[Any, ...]:
        return (type(self), self.sites, repr(self.positions), self._detail())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _put(one: Intervention, sites: Any, positions: Positions, **values: Any) -> None:
    """Fill a frozen intervention's fields and check them."""
    for name, value in {"sites": sites, "positions": positions, **values}.items():
        object.__setattr__(one, name, value)
    one.__post_init__()


@final
@dataclass(frozen=True, eq=False, repr=False)
class Zero(Intervention):
    """Remove sites (paper: setting a subvalue to zero); the same as ``Scale(sites, 0)``.

    Example:
        >>> Zero(["L27.N846", "L12.H4<3"])
        Zero(['L27.N846', 'L12.H4<3'])
        >>> Zero("L20:24.H*", positions="all")
        Zero(['L20:24.H*'], positions='all')
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
        _put(self, sites, positions, factor=_check.finite("factor", factor))

    def _detail(self) -> str:
        return f", {self.factor}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Steer(Intervention):
    """Add a vector to what a site writes, or to a state of the stream.

    At a sublayer, a state or an edge the vector (d_model) is added to the stream itself; at a neuron or head
    to the sublayer's output, before a post-norm; at a query, key or value (``L3.Q4``) to that, d_head numbers.
    Instead of a vector, a multiple of a difference of unembedding rows: times * (W_U[toward] - W_U[away]).

    Args:
        sites, positions: as everywhere. vector: numbers. toward, away: tokens (texts or ids); `away` may be
            left out. times: the multiple.

    Example:
        >>> Steer("L20.resid_post", toward=" Paris", away=" London", times=4.0)
        Steer(['L20.resid_post'], toward=' Paris', away=' London', times=4.0)
    """

    vector: Tensor | None = None
    toward: str | int | None = None
    away: str | int | None = None
    times: float = 1.0

    def __init__(
        self,
        sites: Any,
        vector: Any = None,
        *,
        toward: str | int | None = None,
        away: str | int | None = None,
        times: float = 1.0,
        positions: Positions = "target",
    ) -> None:
        if (vector is None) == (toward is None):
            raise ArgumentError("`vector` or `toward` must be given to Steer, and not both.")
        if vector is not None and (away is not None or times != 1.0):
            raise ArgumentError("`away` and `times` go with `toward`, not with a vector; multiply the vector itself.")
        tensor = None if vector is None else numbers("vector", vector)
        toward, away = (plain_token(name, token) for name, token in (("toward", toward), ("away", away)))
        _put(self, sites, positions, vector=tensor, toward=toward, away=away, times=_check.finite("times", times))

    def _detail(self) -> str:
        if self.vector is not None:
            return f", {self.vector.tolist()}"
        away = "" if self.away is None else f", away={self.away!r}"
        return f", toward={self.toward!r}{away}, times={self.times}"

    def _short(self) -> str:
        return self._detail() if self.vector is None else f", <vector of {self.vector.numel()}>"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Set(Intervention):
    """Give sites these values, each in the site's own space.

    A coefficient for a neuron or attention neuron, d_head numbers for a head or (head, source), d_model for a
    sublayer, a state or an edge (a list of them, one a source, for an edge into keys or values), d_key or d_head for
    a query, key or value.

    Args:
        sites: sites, no slices. values: one for all, or one a site; for several positions, a list of one value
            a position in place of each. positions: "target", an index or indices.
    """

    values: tuple[tuple[Tensor, ...], ...] = ()
    apart: ClassVar[bool] = True

    def __init__(self, sites: Any, values: Any, *, positions: Positions = "target") -> None:
        sites, positions = as_sites(sites), plain_positions(positions)
        if positions == "all":
            raise ArgumentError("`positions` of Set must be 'target', an index, a token's text or a list of them.")
        if not isinstance(values, (list, tuple)) or len(values) != len(sites):
            raise ArgumentError(_check.message("values", f"a list of one value for each of {len(sites)} sites", values))
        many = isinstance(positions, tuple)
        if many and not all(isinstance(one, (list, tuple)) and len(one) == len(positions) for one in values):
            raise ArgumentError(_check.message("values", "a list of one value a position for each site", values))
        held = [tuple(numbers("values", v, low=0, high=2) for v in (one if many else [one])) for one in values]
        _put(self, sites, positions, values=tuple(held))

    def _accept(self, site: Site) -> None:
        if isinstance(site, Slice):
            raise SiteError(f"`sites` of Set must be single sites, with a value each; got {site}.")

    def _detail(self) -> str:
        many = isinstance(self.positions, tuple)
        return f", {[[v.tolist() for v in one] if many else one[0].tolist() for one in self.values]}"

    def _short(self) -> str:
        return f", <{sum(len(one) for one in self.values)} values>"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Intervention):
    """Hold coefficients at a value: of neurons, experts' neurons or attention neurons.

    Example:
        >>> Clamp("L27.N846", 3.0)
        Clamp(['L27.N846'], 3.0)
    """

    value: float = 0.0

    def __init__(self, sites: Any, value: float, *, positions: Positions = "target") -> None:
        _put(self, sites, positions, value=_check.finite("value", value))

    def _accept(self, site: Site) -> None:
        need_kind(site, COEFFICIENTS, "Clamp", "a neuron or attention neuron, which has a coefficient")

    def _detail(self) -> str:
        return f", {self.value}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Give sites the values that they have on another prompt (activation patching), or, along an edge, let
    one reader read them (path patching).

    Args:
        sites, positions: as everywhere. donor: a recording of the same model, or a `Prompt` to run.
        align: which position of the donor a position p takes its value from. None: the predicting position
            from the donor's, any other from the same index; "index": the same index; "token": the same
            token text (the k-th of several from the k-th); or a mapping {p: q}, indices or token texts.
            Lengths may differ. Sources of (head, source) pairs are aligned in the same way.

    Example:
        >>> Patch("L5.mlp", Prompt("The capital of Italy is", target=" Rome")).brief
        "Patch(['L5.mlp'], donor='The capital of Italy is')"
    """

    donor: Donor | None = None
    align: Any = None

    def __init__(self, sites: Any, donor: Donor, *, align: Any = None, positions: Positions = "target") -> None:
        _put(self, sites, positions, donor=need_donor("donor", donor), align=plain_align(align))

    def _detail(self) -> str:
        return f", donor={_prompt_of(self.donor)!r}{_align_text(self.align)}"

    def _short(self) -> str:
        return f", donor={_said(self.donor)}{_align_text(self.align)}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Mean(Intervention):
    """Give sites the mean of their values over a set of prompts (mean ablation), streamed.

    Args:
        sites, positions: as everywhere. over: recordings or `Prompt`s; prompts are run one at a time and only the
            sums are kept. align: as in `Patch`.
    """

    over: tuple[Donor, ...] = ()
    align: Any = None

    def __init__(self, sites: Any, over: Any, *, align: Any = None, positions: Positions = "target") -> None:
        if isinstance(over, (str, Prompt, Recording)) or not _check.iterable(over):
            raise ArgumentError(_check.message("over", "a sequence of recordings or prompts", over))
        donors = tuple(need_donor("over", one) for one in over)
        if not donors:
            raise ArgumentError(_check.message("over", "at least one recording or prompt", list(donors)))
        _put(self, sites, positions, over=donors, align=plain_align(align))

    def _detail(self) -> str:
        return f", over={[_prompt_of(one) for one in self.over]!r}{_align_text(self.align)}"

    def _short(self) -> str:
        return f", over=<{len(self.over)} prompts>{_align_text(self.align)}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Attend(Intervention):
    """Set the attention weight of (head, source) pairs; the head writes what follows from it.

    Args:
        sites: (head, source) pairs, as ``L12.H4<3``. weight: the new alpha[t, j].
        renormalise: give the row's other weights what is left, in proportion, so that its sum stays as it was
            (0 with renormalising is attention knockout). Default: the others stay as they are.

    Example:
        >>> Attend("L12.H4<3", 0.0, renormalise=True)
        Attend(['L12.H4<3'], 0.0, renormalise=True)
    """

    weight: float = 0.0
    renormalise: bool = False

    def __init__(
        self, sites: Any, weight: float, *, renormalise: bool = False, positions: Positions = "target"
    ) -> None:
        _check.flag("renormalise", renormalise)
        _put(self, sites, positions, weight=_check.finite("weight", weight), renormalise=renormalise)

    def _accept(self, site: Site) -> None:
        need_kind(site, (HeadSource,), "Attend", "a (head, source) pair such as L12.H4<3, which has a weight")

    def _detail(self) -> str:
        return f", {self.weight}, renormalise={self.renormalise}"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Cut(Intervention):
    """Let one reader read the stream without one writer's addend; nobody else notices (see `Edge`).

    The reader reads N(r - u) instead of N(r), u and r being this run's. The same as ``Zero(Edge(writer, reader,
    side, norm))``; several writers and readers are all their pairs.

    Example:
        >>> Cut("L3.mlp", "L5.N7", norm="frozen")
        Cut(['L3.mlp->L5.N7:frozen'])
        >>> Cut("L3.mlp", "L9.H4", side="query") == Cut("L3.mlp->L9.H4.query")
        True
    """

    def __init__(
        self,
        writer: Any,
        reader: Any = None,
        *,
        side: Literal["all", "query", "key", "value"] = "all",
        norm: Literal["live", "frozen"] = "live",
        positions: Positions = "target",
    ) -> None:
        if reader is None:
            edges = as_sites(writer)
        else:
            edges = tuple(Edge(a, b, side, norm) for a in as_sites(writer) for b in as_sites(reader))
        _put(self, edges, positions)

    def _accept(self, site: Site) -> None:
        need_kind(site, (Edge,), "Cut", "an edge: a writer and a reader, or 'L3.mlp->L5.N7'")


def as_interventions(given: Any) -> tuple[Intervention, ...]:
    """One intervention, or a list of them, as a non-empty tuple."""
    if isinstance(given, Intervention):
        return (given,)
    if not _check.iterable(given):
        raise InterventionError(_check.message("interventions", "a list of Zero, Scale, Patch, Cut, ...", given))
    found = tuple(given)
    for one in found:
        if not isinstance(one, Intervention):
            raise InterventionError(_check.message("interventions", "a list of Zero, Scale, Patch, Cut, ...", one))
    if not found:
        raise InterventionError("`interventions` must hold at least one operation; got none.")
    return found


def _prompt_of(donor: Donor | None) -> Prompt | None:
    return donor.prompt.source if isinstance(donor, Recording) else donor


def _said(donor: Donor | None) -> str:
    prompt = _prompt_of(donor)
    return repr(None if prompt is None else prompt.text if prompt.text is not None else list(prompt.ids or ()))


def _align_text(align: Any) -> str:
    return "" if align is None else f", align={dict(align) if isinstance(align, tuple) else align!r}"

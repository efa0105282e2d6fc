"""Addresses: texts to sites, and what is made of sites: slices, positions, edges.

====================  ================================================  =====================================
`Slice`               many sites; ``*``, ``a:b`` and ``a,b`` for any     ``L20:24.N*``, ``L*.H*<3``,
                      number                                            ``L3.H0,2``
`At`                  a site at one position of the prompt              ``L3.mlp@2``, ``L12.H4@-1``
`Edge`                what one reader takes in from one writer          ``L3.mlp->L5.N7``,
                                                                        ``L3.H2->L9.H4.query``,
                                                                        ``embed->unembed:frozen``
====================  ================================================  =====================================
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from resid_surgery._check import choice, iterable, message, whole
from resid_surgery.errors import SiteError
from resid_surgery.sites import (
    CONSTANTS,
    AttnNeuron,
    Bias,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    Projection,
    Resid,
    SharedNeuron,
    Site,
    Sizes,
    Sublayer,
)

SIDES = ("all", "query", "key", "value")
EDGE_NORMS = ("live", "frozen")
WRITERS = (Neuron, ExpertNeuron, SharedNeuron, Head, HeadSource, AttnNeuron, Sublayer, Bias, Constant)
READERS = (Neuron, ExpertNeuron, SharedNeuron, Head, HeadSource, Sublayer)

_FORMS: tuple[tuple[str, type[Site], dict[str, Any]], ...] = (
    ("L{layer}.N{index}", Neuron, {}),
    ("L{layer}.H{head}", Head, {}),
    ("L{layer}.H{head}<{source}", HeadSource, {}),
    ("L{layer}.H{head}.D{index}", AttnNeuron, {}),
    ("L{layer}.H{head}.D{index}<{source}", AttnNeuron, {}),
    ("L{layer}.{side}{head}", Projection, {}),
    ("L{layer}.{part}", Sublayer, {}),
    ("L{layer}.resid_{stage}", Resid, {}),
    ("L{layer}.{part}.bias", Bias, {}),
    ("L{layer}.E{expert}.N{index}", ExpertNeuron, {}),
    ("L{layer}.shared.N{index}", SharedNeuron, {}),
    ("L{layer}.E{expert}.bias", Bias, {"part": "mlp"}),
    ("L{layer}.shared.bias", Bias, {"part": "mlp", "expert": "shared"}),
)
_WORDS = {"part": "attn|mlp", "stage": "pre|mid|post", "side": "[QKV]"}


def _compiled(form: str, number: str, signed: str) -> re.Pattern[str]:
    def group(found: re.Match[str]) -> str:
        name = found[1]
        return f"(?P<{name}>{_WORDS.get(name, signed if name == 'layer' else number)})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(form)))


_ONE = [(_compiled(form, r"[0-9]{1,9}", r"-?[0-9]{1,9}"), cls, fixed) for form, cls, fixed in _FORMS]
_MANY = [(_compiled(form, r"[0-9:,*]+", r"[-0-9:,*]+"), cls, fixed) for form, cls, fixed in _FORMS]


@final
@dataclass(frozen=True)
class Slice(Site):
    """Many sites of one kind: ``*`` for all, ``a:b`` for a range, ``a,b`` for a set, in place of any number.

    Layers that have no such site (a layer without attention, say) are left out where the layers are a
    range or ``*``; sources run up to the position operated on.

    Example:
        >>> Slice("L20:24.N*")
        Slice(text='L20:24.N*')
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not any(form.fullmatch(self.text) for form, _, _ in _MANY):
            raise SiteError(message("slice", "a site with *, a:b or a,b for its numbers, as in L20:24.H*", self.text))
        for name, value in self._match()[2].items():
            if name not in _WORDS:
                list(_members(name, value, 0))

    def __str__(self) -> str:
        return self.text

    @property
    def kind(self) -> type[Site]:
        """What its members are."""
        return self._match()[0]

    def resolve(self, sizes: Sizes) -> Site:
        """Refused: a slice is many sites."""
        raise SiteError(f"`{self}` is a slice of sites, where one site is needed.")

    def _match(self) -> tuple[type[Site], dict[str, Any], dict[str, str]]:
        return next(
            (cls, fixed, found.groupdict()) for form, cls, fixed in _MANY if (found := form.fullmatch(self.text))
        )

    def expand(self, sizes: Sizes, position: int) -> tuple[Site, ...]:
        """The sites, in order, of a model; sources run up to `position`.

        Raises:
            SiteError: a number is out of range, or nothing is left.
        """
        cls, fixed, given = self._match()
        names = [name for name in given if name != "layer" and name not in _WORDS]
        words = {name: value for name, value in given.items() if name in _WORDS}
        found: list[Site] = []
        for layer in dict.fromkeys(_members("layer", given["layer"], sizes.n_layers)):
            probe = cls(layer=layer, **fixed, **words, **dict.fromkeys(names, 0))  # type: ignore[call-arg]
            try:
                probe = probe.resolve(sizes)
            except SiteError:
                if set(given["layer"]) & set("*:"):
                    continue
                raise
            ends = {name: size for name, size, _ in probe._limits(sizes.sizes[layer % sizes.n_layers])}
            ends["source"] = position + 1
            sets = [list(dict.fromkeys(_members(name, given[name], ends[name]))) for name in names]
            found += [replace(probe, **dict(zip(names, one, strict=True))) for one in itertools.product(*sets)]
        if not found:
            raise SiteError(f"`{self}` names no site of {sizes.name}.")
        return tuple(one.resolve(sizes) for one in found)


def _members(name: str, text: str, size: int) -> Iterator[int]:
    """The numbers that a set names, `size` being how many there are (0: only the spelling is looked at)."""
    for item in dict.fromkeys(text.split(",")):
        if item == "*":
            yield from range(size)
        elif re.fullmatch(r"-?[0-9]{0,9}:-?[0-9]{0,9}", item):
            low, high = (int(end) if end else None for end in item.split(":"))
            if size and not all(end is None or -size <= end <= size for end in (low, high)):
                raise SiteError(f"`{name}` must be in 0..{size - 1}; got {item}.")
            yield from range(size)[low:high]
        elif re.fullmatch(r"-?[0-9]{1,9}", item):
            yield int(item) % size if size and -size <= int(item) < 0 else int(item)
        else:
            raise SiteError(message(name, "a number, *, a:b, or several with commas", text))


@final
@dataclass(frozen=True)
class At(Site):
    """A site at one position of the prompt; in an intervention it goes before ``positions``."""

    site: Site
    position: int

    def __post_init__(self) -> None:
        if not isinstance(self.site, Site) or isinstance(self.site, (At, Edge)):
            raise SiteError(message("site", "a site", self.site))
        object.__setattr__(self, "position", whole("position", self.position, -(10**9), error=SiteError))

    def __str__(self) -> str:
        return f"{self.site}@{self.position}"

    def resolve(self, sizes: Sizes) -> Site:
        """Refused: only operations and edges know positions."""
        raise SiteError(f"`{self}` names a position, which only interventions take.")


@final
@dataclass(frozen=True)
class Edge(Site):
    """What one reader takes in from one writer: with e the change of the writer's addend u, the reader alone
    reads N(r + e) instead of N(r).

    Args:
        writer: an addend of the stream that comes before the reader: a sublayer, neuron, head, (head, source),
            attention neuron, bias or ``embed``.
        reader: a neuron (all its keys), a head, a (head, source), a sublayer, or ``unembed``.
        side: of a head: "query" (u at the position of the query), "key", "value" (u at every source, or at the
            one that a (head, source) names), or "all". A KV group is un-shared: only this head's reading, for this
            position, changes.
        norm: "live" gives the reader's norm the scale of r + e, "frozen" keeps that of r. Centring is redone.

    Example:
        >>> str(Edge("L3.mlp", "L9.H4", side="query"))
        'L3.mlp->L9.H4.query'
    """

    writer: Any
    reader: Any
    side: Literal["all", "query", "key", "value"] = "all"
    norm: Literal["live", "frozen"] = "live"

    def __post_init__(self) -> None:
        for name, kinds in (("writer", WRITERS), ("reader", (*READERS, Constant))):
            one = getattr(self, name)
            one = parse_site(one) if isinstance(one, str) else one
            object.__setattr__(self, name, one)
            wrong = isinstance(one, Constant) and one.name != ("embed" if name == "writer" else "unembed")
            if not isinstance(one, kinds) or wrong:
                what = {
                    "writer": "an addend of the stream: a sublayer, neuron, head, (head, source), bias, or embed",
                    "reader": "a neuron, head, (head, source) or sublayer, or unembed",
                }[name]
                raise SiteError(message(name, what, str(one) if isinstance(one, Site) else one))
        choice("side", self.side, SIDES, error=SiteError)
        choice("norm", self.norm, EDGE_NORMS, error=SiteError)
        if self.side != "all" and not isinstance(self.reader, (Head, HeadSource)):
            raise SiteError(f"`side` must be 'all' for `{self.reader}`, which is no head; got {self.side!r}.")
        if isinstance(self.reader, HeadSource) and self.side not in ("key", "value"):
            raise SiteError(
                f"`side` must be 'key' or 'value' for `{self.reader}`: the query has no source. Got {self.side!r}; "
                f"use L{self.reader.layer}.H{self.reader.head} for the query or all sides."
            )

    def __str__(self) -> str:
        side = "" if self.side == "all" else f".{self.side}"
        return f"{self.writer}->{self.reader}{side}" + (":frozen" if self.norm == "frozen" else "")

    def resolve(self, sizes: Sizes) -> Site:
        """The same edge with non-negative layers, both ends checked and in forward order.

        Raises:
            SiteError: an end does not exist, or the writer does not come before the reader.
        """
        edge = replace(self, writer=self.writer.resolve(sizes), reader=self.reader.resolve(sizes))
        written, read = _place(edge.writer), _place(edge.reader)
        same_state = written[0] == read[0] and written[1] == 0 and not sizes.between(read[0])
        if written >= read or same_state:
            raise SiteError(
                f"`{self}` is no edge of {sizes.name}: {edge.writer} is not in what {edge.reader} reads. A writer must "
                "come before its reader."
            )
        return edge


def _place(site: Site) -> tuple[int, int]:
    """(layer, 0 for attention, 1 for the MLP) of a writer or reader."""
    if isinstance(site, Constant):
        return (-1, 0) if site.name == "embed" else (10**9, 0)
    part = getattr(site, "part", "mlp" if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)) else "attn")
    return site.layer, int(part == "mlp")  # type: ignore[attr-defined]


def parse_site(text: str) -> Site:
    """The site that `text` names; the inverse of ``str``.

    Raises:
        SiteError: the text is not a site.

    Example:
        >>> parse_site("L12.H4<3")
        HeadSource(layer=12, head=4, source=3)
        >>> str(parse_site("L20.N1297"))
        'L20.N1297'
        >>> parse_site("L3.mlp@2")
        At(site=Sublayer(layer=3, part='mlp'), position=2)
    """
    if isinstance(text, str):
        if "->" in text:
            return _parse_edge(text)
        if found := re.fullmatch(r"(.+)@(-?[0-9]{1,9})", text):
            return At(parse_site(found[1]), int(found[2]))
        if text in CONSTANTS:
            return Constant(text)
        for pattern, cls, fixed in _ONE:
            if match := pattern.fullmatch(text):
                named = {k: v if k in _WORDS else int(v) for k, v in match.groupdict().items()}
                return cls(**named, **fixed)
        if set(text) & set("*:,") and any(pattern.fullmatch(text) for pattern, _, _ in _MANY):
            return Slice(text)
    raise SiteError(
        message(
            "site", "a site such as L20.N1297, L3.E5.N17, L12.H4, L12.H4<3, L3.H4.D7, L12.mlp or L3.resid_pre", text
        )
    )


def _parse_edge(text: str) -> Edge:
    writer, _, rest = text.partition("->")
    reader, frozen, _ = rest.partition(":frozen") if rest.endswith(":frozen") else (rest, "", "")
    side = next((one for one in SIDES[1:] if reader.endswith(f".{one}")), None)
    reader = reader if side is None else reader.removesuffix(f".{side}")
    return Edge(writer, reader, side or "all", "frozen" if frozen else "live")  # type: ignore[arg-type]


def as_sites(given: Any) -> tuple[Site, ...]:
    """One site, its text, or an iterable of either, as a non-empty tuple of sites."""
    if isinstance(given, (Site, str)):
        given = (given,)
    if not iterable(given):
        raise SiteError(message("sites", "a site, its text, or a sequence of them", given))
    sites = tuple(one if isinstance(one, Site) else parse_site(one) for one in given)
    if not sites:
        raise SiteError(message("sites", "at least one site", list(sites)))
    return sites


def expand(sites: Iterable[Site], sizes: Sizes, position: int) -> Iterator[Site]:
    """Sites with every slice replaced by its members; sources run up to `position`."""
    for site in sites:
        if isinstance(site, At) and isinstance(site.site, Slice):
            yield from (At(one, site.position) for one in site.site.expand(sizes, position))
        elif isinstance(site, Slice):
            yield from site.expand(sizes, position)
        else:
            yield site

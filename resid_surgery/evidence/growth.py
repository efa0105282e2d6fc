"""Growth: a source graph's nodes and edges, the most promising first."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from resid_surgery.attribution.asking import NEURONS, Ask
from resid_surgery.attribution.growing import AT_ONCE, ask_for, expand, followable
from resid_surgery.attribution.readings import Reader, require_closed_reading
from resid_surgery.attribution.shares import Listed, Writers
from resid_surgery.sites import Site

FAN = 64


@final
@dataclass(eq=False)
class Node:
    """A site at a position, as a writer and, if it is followed, as a reader.

    Attributes:
        number: of the node, in the order of growth; 0 is the root. site, position, kind: which. priority: see the
            module. depth: edges from the root. serves: (node, reading) that a head or layer is followed for.
        reader, listed: if it is followed. taken: reading -> sum of the shares of its edges, and how many they are.
    """

    number: int
    site: Site
    position: int
    kind: str
    priority: float
    depth: int
    serves: tuple[int, int] | None = None
    reader: Reader | None = None
    listed: tuple[Listed, ...] = ()
    taken: dict[int, tuple[float, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique: the site and its position, with the node's number where it serves one reading."""
        bare = "unembed" if self.number == 0 else f"{self.site}@{self.position}"
        return bare if self.serves is None else f"{bare}#{self.number}"


@final
@dataclass(frozen=True, eq=False)
class Link:
    """An edge: node `writer` into reading `reading` of node `reader`."""

    writer: int
    reader: int
    reading: int
    share: float
    priority: float


Offer = tuple[float, int, int, int, int]
"""(-priority, order, reader's node, reading, which of its listed writers): what a heap sorts."""


@final
class Growth:
    """A graph as it grows.

    Attributes:
        writers: of the run. most: nodes wanted. nodes, links: so far.
    """

    def __init__(self, writers: Writers, most: int) -> None:
        self.writers, self.most = writers, most
        self.nodes: list[Node] = []
        self.links: list[Link] = []
        self._known: dict[tuple[Site, int], int] = {}
        self._offers: list[Offer] = []
        self._order = itertools.count()

    def grow(self, root: Ask) -> None:
        """From the root until there are as many nodes as wanted, or nothing is left to take in."""
        self.nodes.append(Node(0, root.site, root.position, "readout", 1.0, 0))
        self._follow([self.nodes[0]], [root])
        while self._offers and len(self.nodes) < self.most:
            fresh = list(self._take())
            self._follow(fresh, [self._ask(node) for node in fresh])

    def _take(self) -> Iterator[Node]:
        """Take in the best edges, until so many of their writers can be followed; those."""
        found = 0
        while self._offers and len(self.nodes) < self.most and found < AT_ONCE:
            priority, _, reader, reading, which = heapq.heappop(self._offers)
            node = self._link(reader, reading, which, -priority)
            if node is not None and followable(self.writers, node.site, node.position):
                found += 1
                yield node

    def _link(self, reader: int, reading: int, which: int, priority: float) -> Node | None:
        """Take in one edge; its writer, if that is a new node."""
        below, listed = self.nodes[reader], self.nodes[reader].listed[reading]
        segment, member, share = (int(listed.segments[which]), int(listed.members[which]), float(listed.shares[which]))
        site, position = self.writers.site(segment, member), self.writers.position(segment, member)
        served = followable(self.writers, site, position) and not isinstance(site, NEURONS)
        number = None if served else self._known.get((site, position))
        fresh = None
        if number is None:
            number = len(self.nodes)
            serves = (reader, reading) if served else None
            kind = self.writers.kind(segment)
            fresh = Node(number, site, position, kind, priority, below.depth + 1, serves)
            self.nodes.append(fresh)
            if not served:
                self._known[site, position] = number
        self.links.append(Link(number, reader, reading, share, priority))
        total, count = below.taken.get(reading, (0.0, 0))
        below.taken[reading] = (total + share, count + 1)
        return fresh

    def _ask(self, node: Node) -> Ask:
        reader, reading = node.serves or (0, 0)
        below = self.nodes[reader].reader
        assert below is not None
        return ask_for(below, below.readings[reading], node.site, node.position)

    def _follow(self, nodes: list[Node], asks: list[Ask]) -> None:
        """Split what some nodes read, and offer their sources."""
        for node, (reader, lists) in zip(nodes, expand(self.writers, asks, FAN) if asks else [], strict=True):
            node.reader, node.listed = reader, lists
            for r, (reading, listed) in enumerate(zip(reader.readings, lists, strict=True)):
                name, total = f"{node.name}.{reading.key}", listed.total + sum(reading.constants.values())
                require_closed_reading(self.writers.rec, name, total, reading.measured, listed.size)
                unit = node.priority / len(lists) / max(listed.size, 1e-30)
                for which, share in enumerate(listed.shares.tolist()):
                    if share != 0:
                        heapq.heappush(self._offers, (-unit * abs(share), next(self._order), node.number, r, which))

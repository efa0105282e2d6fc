"""Finding: the sets of sites that a plan names, for one recorded prompt.

A located set is searched for once at its largest k; smaller ones are its first members. A random set is drawn from the
candidates that its model has left, by a generator seeded with (plan's seed, prompt's number, draw), so that it is the
same whichever machine does the work.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import pandas as pd
import xxhash

from resid_surgery import _check
from resid_surgery.attribution.locating import Located, locate
from resid_surgery.attribution.queries import Query
from resid_surgery.errors import ArgumentError
from resid_surgery.experiments.grammar import literal, referred
from resid_surgery.experiments.plans import Plan
from resid_surgery.sites import Site
from resid_surgery.stream.blocks import Numbering
from resid_surgery.stream.recording import Recording

Key = tuple[tuple[str, Any], ...]


def substituted(one: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with their axes' values in place."""
    return {name: put_in(value, values) for name, value in one.items()}


def put_in(value: Any, values: Mapping[str, Any]) -> Any:
    """Plain data with every ``"$name"`` that has a value replaced by it."""
    if isinstance(value, list):
        return [put_in(one, values) for one in value]
    if isinstance(value, dict):
        return {key: put_in(one, values) for key, one in value.items()}
    name = referred(value)
    return values[name] if name is not None and name in values else literal(value)


@final
@dataclass(eq=False)
class Finder:
    """The sets of one recording, each found when it is first asked for.

    Attributes:
        plan: whose sets. rec: where. number: the prompt's number in the run.
    """

    plan: Plan
    rec: Recording
    number: int
    _located: dict[tuple[str, Key], Located] = field(default_factory=dict)
    _drawn: dict[tuple[str, Key], list[Site]] = field(default_factory=dict)

    def sites(self, name: str, values: Mapping[str, Any]) -> list[Any]:
        """The sites (or their texts) of a set at some values of its axes, best first."""
        one = self.plan.locate[name]
        if "sites" in one:
            return as_list(put_in(one["sites"], values))
        if "like" in one:
            size = len(self.sites(one["like"], values))
            return list(self.drawn(name, values)[:size])
        return list(self.located(name, values).sites[: largest(self.plan, name, values)[0]])

    def located(self, name: str, values: Mapping[str, Any]) -> Located:
        """What a search gives, at the largest k that the plan asks for with these other values."""
        _, most, key = largest(self.plan, name, values)
        if (name, key) not in self._located:
            wanted = substituted(self.plan.locate[name], values) | {"k": most}
            self._located[name, key] = locate(self.rec, **wanted, progress=False)
        return self._located[name, key]

    def drawn(self, name: str, values: Mapping[str, Any]) -> list[Site]:
        """Others of the same kind in the same layers, as many as the largest of their likes."""
        one = self.plan.locate[name]
        found = self.located(one["like"], values)
        _, _, key = largest(self.plan, one["like"], values)
        draw = put_in(one.get("draw", 0), values)
        at = (name, (*key, ("draw of the set", draw)))
        if at not in self._drawn:
            like = substituted(self.plan.locate[one["like"]], values)
            query = Query.of(self.rec, like.get("kind", "neuron"), like.get("norm", "frozen"), like.get("layers"))
            self._drawn[at] = others(query, found.sites, self._generator(name, key, draw))
        return self._drawn[at]

    def table(self) -> pd.DataFrame:
        """One row per set, cell (the largest k stands for all) and site.

        Columns: set, axes, rank, site, kind, layer, score (its name), value (of the score), bs_target, evaluations,
        candidates, proof ("drawn" for random ones), norm, position.
        """
        frames = [self._rows(name, values) for name, values in self._cells()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _cells(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, one in self.plan.locate.items():
            if "sites" in one:
                continue
            seen = set()
            for values in self.plan.combinations(self.plan.axes_of(one)):
                key = (*largest(self.plan, one.get("like", name), values)[2], put_in(one.get("draw"), values))
                if key not in seen:
                    seen.add(key)
                    yield name, values

    def _rows(self, name: str, values: Mapping[str, Any]) -> pd.DataFrame:
        one = self.plan.locate[name]
        of = one.get("like", name)
        k = referred(self.plan.locate[of].get("k"))
        told = {axis for axis, _ in largest(self.plan, of, values)[2]} | {referred(one.get("draw"))}
        shown: dict[str, Any] = {axis: value for axis, value in values.items() if axis != k or axis in told}
        found = self.located(one.get("like", name), values)
        if "like" in one:
            sites = self.drawn(name, values)
            out = pd.DataFrame({"rank": range(1, len(sites) + 1), "site": [str(site) for site in sites],
                                "kind": found.table["kind"].iloc[0], "layer": [site_layer(site) for site in sites],
                                "norm": found.table["norm"].iloc[0],
                                "position": found.table["position"].iloc[0]})  # fmt: skip
            return out.assign(**shown, set=name, proof="drawn")
        table = found.table.assign(value=found.table[found.score])
        if found.score != "bs_target":
            table = table.drop(columns=found.score)
        about: dict[str, Any] = {
            "score_name": found.score,
            "evaluations": found.evaluations,
            "candidates": found.candidates,
        }
        return table.assign(set=name, proof=found.proof, **about, **shown)

    def _generator(self, name: str, key: Key, draw: Any) -> np.random.Generator:
        said = xxhash.xxh3_64_intdigest(repr((name, key, draw)).encode())
        return np.random.default_rng([self.plan.seed, self.number, said])


def largest(plan: Plan, name: str, values: Mapping[str, Any]) -> tuple[int, int, Key]:
    """(this k, the largest k, what else tells the search from others) of a located set."""
    one = plan.locate[name]
    k = one.get("k", 10)
    used = plan.axes_of({key: value for key, value in one.items() if key != "k"})
    axis, asked = referred(k), put_in(k, values)
    most = max(plan.axes[axis]) if axis is not None and axis not in used else asked
    return asked, most, tuple((other, values[other]) for other in used)


def others(query: Query, found: tuple[Site, ...], rng: np.random.Generator) -> list[Site]:
    """As many candidates as were found, at random, none of them among these.

    Raises:
        ArgumentError: too few are left.
    """
    numbering, taken = Numbering(query.blocks()), set(found)
    if len(numbering) < 2 * len(taken):
        left = len(numbering) - len(taken)
        raise ArgumentError(_check.message("like", f"of a set of at most {left} sites, as many as are left", len(taken),
                                           model=query.rec.model.name))  # fmt: skip
    order = rng.choice(len(numbering), 2 * len(taken), replace=False)
    drawn = (numbering.site(int(i)) for i in order)
    return [site for site in drawn if site not in taken][: len(taken)]


def as_list(given: Any) -> list[Any]:
    """One, or several, as a list."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def site_layer(site: Site) -> int | None:
    """The layer of a site, where it has one."""
    return getattr(site, "layer", None)

"""Importing: probes and rewrites from the public files of knowledge editing, and from the library's own.

Every format has one reader: a generator that takes the fields of each record and yields the rewrites and probes that
they hold. Fields that no reader asks for are counted and reported; a missing one is an error that names its record.
Nothing is tokenised here, so no special token can depend on where a file lies.
"""

import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from resid_surgery._check import choice, message
from resid_surgery._check import path as as_path
from resid_surgery.editing.formats import Found, counterfact, easyedit, lre, pararel, zsre
from resid_surgery.editing.hops import mquake, rippleedits
from resid_surgery.editing.probes import SCHEMA, Probe, ProbeSet, probe_set
from resid_surgery.editing.records import Fields, Tally, read_records
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, LoadError, PromptError

WHAT = "resid_surgery probes"
MOST = 2_000_000
"""Rewrites and probes of one call; the largest public sets make half a million."""


def read_probes(path: Any, *, format: str | None = None) -> ProbeSet:
    """Probes and rewrites from a file of a public format, or of `save_probes`.

    Args:
        path: of a JSON or JSON-lines file. ParaRel keeps patterns and triples apart: give both paths in a list.
        format: one of `FORMATS`; None finds it out from the fields of the first record.

    Returns:
        The probes; `.rewrites` of the facts as far as the format has new answers (LRE and ParaRel have none, so that
        their prompts are locality probes of no rewrite); `.ignored` says "field: how often" of what no probe was made
        of. Answers have one leading space, prompts no trailing one.

    Raises:
        LoadError: not found, larger than 1 GiB, damaged, or of no known format.
        PromptError: a field of a record is missing or of the wrong type; its number and id are named.

    Source: Meng et al. 2022 (CounterFact); Levy et al. 2017 and Mitchell et al. 2022 (zsRE); Zhang et al. 2024
    (KnowEdit); Cohen et al. 2023 (RippleEdits); Zhong et al. 2023 (MQuAKE); Hernandez et al. 2024 (LRE);
    Elazar et al. 2021 (ParaRel).
    """
    if format is not None:
        choice("format", format, FORMATS)
    paths, tally = _paths(path), Tally()
    records = chain.from_iterable(read_records(one, tally) for one in paths)
    first = next(records, None)
    where = ", ".join(map(str, paths))
    if first is None:
        raise LoadError(f"{where} holds no record.")
    kind = format or _format(first, ", ".join(one.name for one in paths))
    found = list(islice(_READERS[kind](chain([first], records)), MOST + 1))
    if len(found) > MOST:
        raise LoadError(f"{where} must make at most {MOST:,} probes; it makes more. Split it into parts.")
    rewrites = tuple(dict.fromkeys(one for one in found if isinstance(one, Rewrite)))
    probes: list[Probe] | dict[Probe, None] = [one for one in found if isinstance(one, Probe)]
    if kind != "resid_surgery":
        probes = dict.fromkeys(probes)
    name = tally.name or ", ".join(one.stem for one in paths)
    return ProbeSet(probe_set(probes).probes, name, rewrites, tally.ignored())


def load_probes(path: Any) -> ProbeSet:
    """Probes that `save_probes` wrote, equal to those that were saved.

    Raises:
        LoadError: not found, too large, damaged, or not written by `save_probes`.
    """
    return read_probes(path, format="resid_surgery")


def _paths(given: Any) -> list[Path]:
    many = given if isinstance(given, (list, tuple)) else [given]
    if not many or not all(isinstance(one, (str, os.PathLike)) for one in many):
        raise ArgumentError(message("path", "a path or a list of paths", given))
    return [as_path("path", one) for one in many]


def _format(first: Fields, where: str) -> str:
    for kind, sign in _SIGNS.items():
        if sign(first.data):
            return kind
    listed = "; ".join(f"{kind}: {looked}" for kind, looked in _LOOKED_FOR.items())
    raise LoadError(
        f"{where} is of no known format: its first record has the fields {', '.join(first.data) or 'none'}. "
        f"Looked for {listed}."
    )


def _own(records: Iterator[Fields]) -> Found:
    head = next(records)
    if head.data.get("what") != WHAT or head.data.get("schema") != SCHEMA:
        raise LoadError(
            f"{head.at} must begin a file of schema {SCHEMA} written by rs.save_probes; got {head.data!r:.120}."
        )
    head.tally.name = head.maybe("name") or ""
    head.take(*head.data)
    try:
        rewrites = [Rewrite(**one.whole()) for one in head.parts("rewrites", needed=False)]
        probes = [Probe(**record.whole()) for record in islice(records, MOST + 1)]
        hash(tuple(probes))
    except (TypeError, ValueError, AttributeError, PromptError) as error:
        raise LoadError(f"{head.at} begins a damaged file of probes: {error}.") from error
    if "hash" in head.data and ProbeSet(tuple(probes)).hash != head.data["hash"]:
        raise LoadError(f"{head.at} begins a damaged file of probes: they are not those that were written.")
    yield from rewrites
    yield from probes


def _nested(data: dict[str, Any]) -> bool:
    """Whether questions about what follows and what stays come in lists, as KnowEdit has them."""
    inside = [data.get(name) for name in ("portability", "locality")]
    return any(isinstance(v, list) for one in inside if isinstance(one, dict) for v in one.values()) or {
        "text", "labels", "concept"} <= data.keys()  # fmt: skip


_LOOKED_FOR = {
    "resid_surgery": "what, schema",
    "mquake": "requested_rewrite (a list)",
    "counterfact": "requested_rewrite (an object)",
    "rippleedits": "edit (an object)",
    "zsre": "src, alt",
    "knowedit": "prompt, target_new, with lists in portability or locality",
    "easyedit": "prompt, target_new",
    "lre": "prompt_templates, samples",
    "pararel": "pattern, or sub_label and obj_label",
}
_SIGNS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "resid_surgery": lambda data: data.get("what") == WHAT,
    "mquake": lambda data: isinstance(data.get("requested_rewrite"), list),
    "counterfact": lambda data: isinstance(data.get("requested_rewrite"), dict),
    "rippleedits": lambda data: isinstance(data.get("edit"), dict),
    "zsre": lambda data: {"src", "alt"} <= data.keys(),
    "knowedit": lambda data: _nested(data) and ({"prompt", "target_new"} <= data.keys() or "labels" in data),
    "easyedit": lambda data: {"prompt", "target_new"} <= data.keys(),
    "lre": lambda data: {"prompt_templates", "samples"} <= data.keys(),
    "pararel": lambda data: "pattern" in data or {"sub_label", "obj_label"} <= data.keys(),
}
FORMATS = tuple(_SIGNS)
"""Formats that `read_probes` knows, in the order in which it looks for them."""
_READERS: dict[str, Callable[[Iterator[Fields]], Found]] = {
    "resid_surgery": _own, "mquake": mquake, "counterfact": counterfact, "rippleedits": rippleedits, "zsre": zsre,
    "knowedit": easyedit, "easyedit": easyedit, "lre": lre, "pararel": pararel,
}  # fmt: skip

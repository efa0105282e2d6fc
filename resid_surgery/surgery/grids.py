"""Grids: the usual sets of interventions: one operation at every site and position, patching between prompts,
and singles against all together."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from resid_surgery import _check
from resid_surgery.addresses import At, as_sites, expand
from resid_surgery.errors import ArgumentError, InterventionError, SiteError
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording, be_recording
from resid_surgery.surgery.interventions import Intervention, Patch, Set, as_interventions
from resid_surgery.surgery.sweeping import sweep

Rows = list[tuple[dict[str, Any], Intervention]]
DIRECTIONS = ("denoise", "noise")


def grid(rec: Recording, operation: Callable[..., Any], sites: Any, *, positions: Any = "target") -> Rows:
    """One row for every site at every position, with its coordinates, for `sweep`.

    Args:
        rec: a recording. operation: called as ``operation(site, positions=p)``: an operation's class, or a
            function that makes one. sites: sites or slices, as ``"L*.H*"`` or ``"L*.resid_pre"``.
        positions: "target", "each" (every position up to the predicting one), indices or token text.

    Returns:
        (coordinates, intervention) pairs. Coordinates: site, kind, layer, head, index, source, expert (as far as the
        site has them), position, token (the prompt's, there). (head, source) pairs from later positions are left out.

    Raises:
        SiteError, PromptError: a site or position does not exist.

    Example:
        >>> import resid_surgery as rs
        >>> rec = rs.record(rs.load(rs.tiny("llama")), rs.Prompt(ids=[1, 2, 3], target=5))
        >>> rows = rs.grid(rec, rs.Zero, "L*.H*", positions="each")
        >>> rows[1][1]
        Zero(['L0.H0'], positions=1)
    """
    be_recording(rec)
    if not callable(operation):
        raise ArgumentError(
            _check.message("operation", "an operation's class, or a function of (site, positions)", operation)
        )
    prompt, a = rec.prompt, rec.model.anatomy
    places = (
        range(prompt.position + 1)
        if isinstance(positions, str) and positions == "each"
        else prompt.positions(positions)
    )
    rows: Rows = []
    for one in expand(as_sites(sites), a, max(places)):
        if isinstance(one, At):
            raise SiteError(f"`sites` of a grid must be without positions, which are a coordinate; got {one}.")
        site = one.resolve(a)
        for position in places:
            source = getattr(site, "source", None)
            if source is not None and source > position:
                continue
            named: dict[str, Any] = {"site": str(site), "kind": type(site).__name__}
            named |= {name: value for name in ("layer", "head", "index", "source", "expert")
                      if (value := getattr(site, name, None)) is not None}  # fmt: skip
            named |= {"position": position, "token": prompt.tokens[position]}
            try:
                rows.append((named, operation(site, positions=position)))
            except TypeError as error:
                raise ArgumentError(
                    f"`operation` must be callable as operation(site, positions=p): {error}."
                ) from error
    if not rows:
        raise SiteError("`sites` and `positions` must name at least one row; got none.")
    return rows


def patching(
    clean: Recording,
    corrupt: Recording,
    sites: Any = "L*.resid_pre",
    *,
    positions: Any = "each",
    align: Any = None,
    direction: str = "denoise",
    **options: Any,
) -> pd.DataFrame:
    """Activation patching between two prompts, with normalised scores: where does what they differ in flow?

    With m = bs(target) - mean bs(versus) of the clean prompt's tokens (its bs-value of the target where it has no
    competitors), score = (m(patched) - m(run)) / (m(donor) - m(run)): 0 changes nothing, 1 makes up the whole
    difference between the prompts.

    Args:
        clean, corrupt: recordings of one model. sites: sites or slices: ``L*.resid_pre``, ``L*.attn``, ``L*.H*``,
            ``L*.H*<*``, ... positions: as in `grid`. align: which position of the donor a position takes its value
            from (see `Patch`).
        direction: "denoise" runs the corrupt prompt and patches in clean values; "noise" the other way round.
        options: of `sweep`.

    Returns:
        `sweep`'s table with the column ``score``; its clean values are those of the prompt that is run. ``.attrs`` has
        run, donor (m of each) and direction.

    Raises:
        InterventionError: the prompts have the same m, or positions do not line up. More as in `sweep`.

    Source: Vig et al. 2020; Meng et al. 2022 (causal tracing); Zhang & Nanda 2024, arXiv 2309.16042 (metrics).
    """
    be_recording(clean, "clean")
    be_recording(corrupt, "corrupt")
    _check.choice("direction", direction, DIRECTIONS)
    tokens = {"target": clean.prompt.target, "versus": clean.prompt.versus, "names": clean.prompt.names}
    run, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    base = replace(run, prompt=replace(run.prompt, **tokens))  # type: ignore[arg-type]
    m_run, m_donor = (_difference(one, clean) for one in (run, donor))
    if abs(m_donor - m_run) <= 1e-6 * max(abs(m_donor), abs(m_run), 1.0):
        raise InterventionError(
            f"`clean` and `corrupt` must differ in what is measured; both give {m_run:.6g}. Choose a target and "
            "competitors that tell the prompts apart."
        )
    rows = grid(base, lambda site, positions: Patch(site, donor, align=align, positions=positions), sites,
                positions=positions)  # fmt: skip
    table = sweep(base, rows, **options)
    versus = [name for name in table.columns if name.startswith("bs_versus_")]
    m = table["bs_target"] - (table[versus].mean(axis=1) if versus else 0.0)
    at = list(table.columns).index("bs_target")
    table.insert(at, "score", (m - m_run) / (m_donor - m_run))
    table.attrs |= {"run": m_run, "donor": m_donor, "direction": direction}
    return table


def additivity(rec: Recording, interventions: Any, **options: Any) -> pd.DataFrame:
    """How far the joint effect of a set is from the sum of its single effects.

    Args:
        rec: a recording. interventions: a list; every site of it is a single. options: of `sweep`.

    Returns:
        Columns: role ("single", then "sum", "joint" and "interaction" = joint - sum), what, bs_change_* (logits),
        log_prob_change (nats), direct (logits).

    Raises:
        InterventionError: fewer than two singles. More as in `sweep`.
    """
    be_recording(rec)
    if "where" in options:
        raise ArgumentError("`where` does not go with additivity: the sum is over all singles.")
    given = as_interventions(interventions)
    singles = [single for one in given for single in _singles(rec, one)]
    if len(singles) < 2:
        raise InterventionError(f"`interventions` must hold at least two sites to compare; got {len(singles)}.")
    rows = [({"role": "single", "what": one.brief}, [one]) for one in singles]
    table = sweep(rec, [*rows, ({"role": "joint", "what": f"all {len(singles)}"}, list(given))], **options)
    values = [name for name in table.columns if name.startswith("bs_change_") or name in ("log_prob_change", "direct")]
    table = table[["role", "what", *values]]
    total = table.iloc[:-1][values].sum()
    joint = table.iloc[-1][values]
    extra = pd.DataFrame([{"role": "sum", "what": f"of {len(singles)} singles", **total}, dict(table.iloc[-1]),
                          {"role": "interaction", "what": "joint - sum", **(joint - total)}])  # fmt: skip
    return pd.concat([table.iloc[:-1], extra], ignore_index=True)


def _difference(rec: Recording, clean: Recording) -> float:
    bs = rec.work(rec.bs_values)
    versus = [float(bs[i]) for i in clean.prompt.versus]
    return float(bs[clean.prompt.target]) - (sum(versus) / len(versus) if versus else 0.0)


def _singles(rec: Recording, one: Intervention) -> Iterator[Intervention]:
    """The same operation on each of its sites alone."""
    if isinstance(one, Set):
        for site, values in zip(one.sites, one.values, strict=True):
            many = isinstance(one.positions, tuple)
            yield Set([site], [list(values) if many else values[0]], positions=one.positions)
        return
    for spec in one.sites:
        at = spec.position if isinstance(spec, At) else one.positions
        for site in expand([spec], rec.model.anatomy, max(rec.prompt.positions(at))):
            yield with_sites(one, (site,))


def with_sites(one: Intervention, sites: tuple[Site, ...]) -> Intervention:
    """A copy of an intervention on other sites."""
    copy = object.__new__(type(one))
    for name, value in vars(one).items():
        object.__setattr__(copy, name, value)
    object.__setattr__(copy, "sites", sites)
    return copy

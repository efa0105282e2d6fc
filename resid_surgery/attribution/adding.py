"""Adding: how a distribution changes when a vector is added to what it is read from (paper: distribution change).

bs-values add up; the softmax of the sum is the new distribution. What is added alike to every token changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from resid_surgery import _check
from resid_surgery.addresses import as_sites, expand
from resid_surgery.attribution.catalogue import NORMS
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.prompts import token_text
from resid_surgery.sites import Site
from resid_surgery.stream.recording import Recording, need_recording
from resid_surgery.stream.subvalues import resolve_in, state_of, vector_of
from resid_surgery.stream.vocabulary import Readout

COLUMNS = ["case", "token", "token_id", "role", "bs_before", "bs_added", "bs_after", "prob_before", "prob_after"]


def add_bs_values(x: Any, added: Any, *, tokens: Sequence[str] | None = None) -> pd.DataFrame:
    """The arithmetic of a distribution's change, on given numbers: p = softmax(x + v) (paper: direct addition).

    Args:
        x: (token,) bs-values, logits. added: what is added to them: one such row, several, or name -> row.
        tokens: names of the tokens; 1, 2, 3, ... by default.

    Returns:
        One row a case and token: case, token, bs_before, bs_added, bs_after (logits), prob_before, prob_after.

    Raises:
        ArgumentError: rows of different lengths, or what is no finite number.

    Example:
        >>> import resid_surgery as rs
        >>> from resid_surgery.attribution.adding import add_bs_values
        >>> table = add_bs_values([1, 2, 3], [[5, 5, 5], [1, 4, 5], [4, 1, 5]])
        >>> table.loc[table["token"] == "3", "prob_after"].round(3).tolist()
        [0.665, 0.879, 0.946]

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3 (worked numbers).
    """
    before = _numbers("x", x)
    if tokens is not None and (not _check.iterable(tokens) or any(map(_check.iterable, tokens))):
        raise ArgumentError(_check.message("tokens", "None, or a sequence of names", tokens))
    names = [str(i + 1) for i in range(len(before))] if tokens is None else [str(one) for one in tokens]
    if len(names) != len(before):
        raise ArgumentError(_check.message("tokens", f"{len(before)} names, one a number of `x`", names))
    frames = []
    for case, row in _cases(added).items():
        v = _numbers("added", row)
        if len(v) != len(before):
            raise ArgumentError(_check.message("added", f"rows of {len(before)} numbers, as `x` is", list(row)))
        columns = {"bs_before": before, "bs_added": v, "bs_after": before + v}
        columns |= {"prob_before": _softmax(before), "prob_after": _softmax(before + v)}
        frames.append(pd.DataFrame({"case": case, "token": names} | columns))
    if not frames:
        raise ArgumentError(_check.message("added", "at least one row of numbers", added))
    return pd.concat(frames, ignore_index=True)


def _cases(added: Any) -> dict[str, Any]:
    if isinstance(added, Mapping):
        return {str(name): row for name, row in added.items()}
    if not _check.iterable(added):
        raise ArgumentError(_check.message("added", "a row of numbers, several, or name -> row", added))
    added = list(added)
    rows = [added] if added and not _check.iterable(added[0]) else added
    return {"+ [" + ", ".join(f"{v:g}" for v in _numbers("added", row)) + "]": row for row in rows}


def _numbers(name: str, row: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    found = [_check.finite(name, one) for one in row] if _check.iterable(row) else []
    if not found:
        raise ArgumentError(_check.message(name, "a row of finite numbers", row))
    return np.array(found)


def _softmax(x: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    e = np.exp(x - x.max())
    return e / e.sum()  # type: ignore[no-any-return]


def add_subvalues(rec: Recording, sites: Any, *, top: int = 3, norm: str = "frozen") -> pd.DataFrame:
    """The same on a model: which tokens a subvalue raises when it is added to the stream that it is written into.

    p = softmax(cap(bs(x + v))) against softmax(cap(bs(x))), with x as in the log-prob increase.

    Args:
        rec: a recording. sites: addends of a sublayer, or slices of them; a case each.
        top: how many tokens beside target and competitors, by change of probability.
        norm: "frozen" or "own", as in `scores`; with "own", bs_added is what the bs-values change by.

    Returns:
        One row a case and token: case (the site), token, token_id, role ("target", "versus" or "mover"), bs_before,
        bs_added, bs_after (logits, constants in bs_before), prob_before, prob_after, norm, position, closure (|before +
        added - after|).

    Raises:
        SiteError: a site is no addend of a sublayer. ArgumentError: unknown norm, `top` out of range.

    Source: Yu & Ananiadou, arXiv 2312.12141, section 3 (distribution change).
    """
    _check.choice("norm", norm, NORMS)
    need_recording(rec)
    top = _check.whole("top", top, 0, rec.model.vocab_size, model=rec.model.name)
    found = [resolve_in(rec, one) for one in expand(as_sites(sites), rec.model.anatomy, rec.prompt.position)]
    places = [_place(one) for one in found]
    readout = Readout.of(rec)
    rows = [
        row for site, place in zip(found, places, strict=True) for row in _rows(readout, rec, site, place, top, norm)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["norm"], table["position"] = norm, rec.prompt.position
    table["closure"] = (table["bs_before"] + table["bs_added"] - table["bs_after"]).abs()
    return table


def _rows(
    readout: Readout, rec: Recording, site: Site, place: tuple[int, str], top: int, norm: str
) -> list[tuple[Any, ...]]:
    x, v = state_of(rec, *place), vector_of(rec, site, "here")
    before, after = readout.state(torch.stack([x, x + v]), own=norm == "own")
    added = after - before if norm == "own" else readout.bs(v[None])[0]
    p, q = (torch.softmax(readout.cap(one), -1) for one in (before, after))
    named = [(i, role) for i, _, role in rec.prompt.roles()]
    known = {i for i, _ in named}
    moved = (q - p).abs().topk(min(len(p), top + len(named))).indices.tolist()
    picked = named + [(i, "mover") for i in moved if i not in known][:top]
    return [(str(site), token_text(i, rec.model.tokenizer), i, role,
             *(float(one[i]) for one in (before, added, after, p, q))) for i, role in picked]  # fmt: skip


def _place(site: Site) -> tuple[int, str]:
    layer = getattr(site, "layer", None)
    if layer is None:
        raise SiteError(f"`{site}` is not written by a sublayer, so there is no state that it is added to.")
    return layer, str(getattr(site, "part", "attn" if hasattr(site, "head") else "mlp"))

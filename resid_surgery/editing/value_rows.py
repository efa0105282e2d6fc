"""Value-row edits: change what a neuron writes, its coefficient left as it is.

    row' = row + add;   row' = replace;   row' = row - Q Q^T row;
    row' = row + sign (-l1 (|row| / |e_old|) e_old + l2 (|row| / |e_new|) e_new)

with Q an orthonormal basis of the directions that are projected out and e_w the direction of a token. The last is the
rule of Dai et al. for sign = 1: they edit neurons whose coefficients are positive. A gated neuron's coefficient has
either sign, and half of those that `locate` finds raise a token by a negative coefficient times a row that speaks
against it; there the rule must be turned round (``signs``).
 A row's bs-value for token w is e_w . row / s (s the final norm's scale), so that by default

    e_w = P^T (gain * W_U[w]),  centred where the final norm is a LayerNorm,

P being what stands between the row and the final stream: the gain (and centring) of a post-norm, with scale 1, and
multipliers. With ``direction="embedding"`` e_w is the token's row of the input embedding, as Dai et al. have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery import _check
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.placing import NEURONS, Place, places_of, single_sites, sites_given, stored
from resid_surgery.editing.rewrites import Rewrite
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import token_id
from resid_surgery.sites import AttnNeuron, Site, part_of
from resid_surgery.stream.kinds import neuron_place
from resid_surgery.stream.recording import need_model, reach
from resid_surgery.surgery.arguments import numbers

MODES = ("add", "replace", "project_out", "old / new")
DIRECTIONS = ("unembedding", "embedding")
SIGNS = ("auto", "plain", "old")
SMALL = 1e-10
"""Directions whose singular value is below this share of the largest add nothing to the others."""

Vectors = Float[Tensor, "site d_model"]


def edit_value_rows(
    model: OpenedModel,
    sites: Any,
    *,
    add: Any = None,
    replace: Any = None,
    project_out: Any = None,
    old: str | int | None = None,
    new: str | int | None = None,
    l1: float = 1.0,
    l2: float = 8.0,
    direction: str = "unembedding",
    signs: Any = "auto",
    rewrites: Sequence[Rewrite] = (),
) -> Edit:
    """Change the value vectors of neurons, in one of four ways (see the module for the formulas).

    Args:
        model: from `resid_surgery.load`; never changed.
        sites: neurons, experts' neurons or attention neurons: as in `edit_coefficients` (a `Located` as it is).
        add, replace: a vector (d_model) for all sites, or one a site; what is stored, before a post-norm.
        project_out: tokens (texts or ids) whose direction is removed, or directions (floats, one or several).
        old, new: tokens, one each; either may be left out. The rule of Dai et al. writes one token: for answers of
            several tokens use `edit_rank_one` or `edit_least_squares`.
        l1, l2: how strongly `old` leaves and `new` comes, in units of the row's norm.
        direction: of a token: "unembedding" or "embedding".
        signs: of the rule with `old` and `new`: "plain" (1 for all: the published rule, for coefficients that are
            positive where the fact is read); "old" (-1 where e_old . row < 0: a neuron that raises `old` with such a
            row has a negative coefficient); "auto": "old" for gated and attention neurons where `old` is given, else
            "plain"; or 1 or -1 for each site.
        rewrites: the facts that the edit is meant for, if any.

    Returns:
        An `Edit`. Its ``fitting`` has one row a site: site, tensor, norm_before, norm_after, cosine (of the row before
        and after); with old and new: sign, bs_old_before, bs_old_after, bs_new_before, bs_new_after (e . row: logits
        for a coefficient of 1 at a final scale of 1); with project_out: removed (norm of what left).

    Raises:
        ArgumentError: not exactly one way is given, or numbers of another shape. SiteError: a site does not exist or
        has not exactly one value vector. PromptError: `old`, `new` or a projected token is not one token.

    Source: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers, section 5 (l1 = 1, l2 = 8).
    """
    need_model(model)
    mode = _mode(add=add, replace=replace, project_out=project_out, both=(old, new))
    _check.choice("direction", direction, DIRECTIONS)
    rows = _Found.of(model, sites)
    steps = {"l1": _check.finite("l1", l1), "l2": _check.finite("l2", l2)}
    settings: dict[str, Any] = {"mode": mode, "sites": [str(one) for one in rows.sites], "direction": direction}
    if mode == "old / new":
        tokens = {name: token_id(one, model.tokenizer, model, name)
                  for name, one in (("old", old), ("new", new)) if one is not None}  # fmt: skip
        after, columns = _dai(rows, tokens, steps, direction, signs)
        settings |= {**steps, **tokens, "signs": signs if isinstance(signs, str) else list(signs)}
    elif mode == "project_out":
        after, columns = _without(rows, project_out, direction)
    else:
        after, columns = _moved(rows, mode, add if mode == "add" else replace), {}
    return new_edit(model, rows.changed(after), method="edit_value_rows", settings=settings, rewrites=rewrites,
                    fitting=rows.report(after, columns))  # fmt: skip


def token_directions(
    model: OpenedModel, layer: int, part: str, tokens: Sequence[int], direction: str = "unembedding"
) -> Float[Tensor, "token d_model"]:
    """e_w of tokens for rows of a layer's sublayer ("attn" or "mlp"), float64: e_w . row is the row's bs-value for w at
    scales of 1; with "embedding", the tokens' rows of the input embedding."""
    if direction == "embedding":
        embed: Tensor = model.module.get_input_embeddings().weight.detach()  # type: ignore[operator]
        return embed[list(tokens)].double().cpu()
    one = torch.ones(1, dtype=model.work_dtype, device=model.device)
    g = model.norm(None, "final_norm").pull(model.work(model.unembedding[list(tokens)]), one)
    g = g * reach(model, layer, part) * model.factor(layer, f"{part}_scale")
    return model.norm(layer, f"{part}_post_norm").pull(g, one).double().cpu()


@final
@dataclass(frozen=True, eq=False)
class _Found:
    """The rows that an edit is about.

    Attributes:
        sites: single ones. places: where each is stored. held: the tensors. rows: as they are, float64.
    """

    model: OpenedModel
    sites: tuple[Site, ...]
    places: tuple[Place, ...]
    held: Mapping[str, Tensor]
    rows: Vectors

    @classmethod
    def of(cls, model: OpenedModel, given: Any) -> "_Found":
        sites = single_sites(model, sites_given(given))
        found = [places_of(model, one) for one in sites]
        for one in sites:
            if not isinstance(one, NEURONS):
                raise SiteError(
                    f"`sites` must be neurons or attention neurons, which have one value vector each; got {one}. "
                    "The rows of a head are L3.H4.D*."
                )
        places = tuple(some[0] for some in found)
        held = stored(model, [one.name for one in places])
        return cls(model, sites, places, held, torch.cat([one.read(held[one.name]) for one in places]))

    def by_sublayer(self, make: Callable[[int, str], Tensor]) -> Tensor:
        """`make(layer, part)` for each site's sublayer, one a site."""
        homes = [(one.layer, part_of(one)) for one in self.sites]  # type: ignore[attr-defined]
        made = {home: make(*home) for home in dict.fromkeys(homes)}
        return torch.stack([made[home] for home in homes])

    def changed(self, after: Vectors) -> list[Rows]:
        """The rows that moved, one change a tensor."""
        found = []
        for name in self.held:
            mine = [i for i, one in enumerate(self.places) if one.name == name]
            place = Place(name, self.places[mine[0]].axes, torch.cat([self.places[i].index for i in mine]))
            found.append(place.added(self.held[name], (after - self.rows)[mine]))
        return found

    def report(self, after: Vectors, columns: Mapping[str, Any]) -> pd.DataFrame:
        """One row a site."""
        norms = [rows.norm(dim=1) for rows in (self.rows, after)]
        cosine = torch.nn.functional.cosine_similarity(self.rows, after, dim=1)
        return pd.DataFrame({
            "site": [str(one) for one in self.sites], "tensor": [one.name for one in self.places],
            "norm_before": norms[0].tolist(), "norm_after": norms[1].tolist(), "cosine": cosine.tolist(), **columns,
        })  # fmt: skip


def _mode(*, add: Any, replace: Any, project_out: Any, both: tuple[Any, Any]) -> str:
    given = [add is not None, replace is not None, project_out is not None, any(one is not None for one in both)]
    if sum(given) != 1:
        named = [mode for mode, one in zip(MODES, given, strict=True) if one]
        raise ArgumentError(_check.message("edit_value_rows", "told exactly one of " + ", ".join(MODES), named))
    return MODES[given.index(True)]


def _moved(found: _Found, mode: str, given: Any) -> Vectors:
    """Rows with a vector added, or with a vector in their place."""
    vectors, (n, d) = numbers(mode, given, high=2), found.rows.shape
    if vectors.shape not in ((d,), (1, d), (n, d)):
        wanted = f"a vector of {d} numbers, or one for each of {n} sites"
        raise ArgumentError(_check.message(mode, wanted, f"shape {tuple(vectors.shape)}", model=found.model.name))
    return found.rows + vectors if mode == "add" else vectors.expand(n, d).clone()


def _without(found: _Found, given: Any, direction: str) -> tuple[Vectors, dict[str, Any]]:
    """Rows without their component in the span of tokens' directions, or of vectors."""
    tokens = _tokens(given, found.model)
    if tokens is None:
        vectors, d = numbers("project_out", given, high=2), found.rows.shape[1]
        if vectors.shape[-1] != d:
            wanted = f"tokens, or directions of {d} numbers"
            got = f"shape {tuple(vectors.shape)}"
            raise ArgumentError(_check.message("project_out", wanted, got, model=found.model.name))
        spans = basis(vectors.reshape(-1, d)).expand(len(found.rows), -1, -1)
    else:
        spans = found.by_sublayer(
            lambda layer, part: basis(token_directions(found.model, layer, part, tokens, direction))
        )
    removed = torch.einsum("sqd,sq->sd", spans, torch.einsum("sqd,sd->sq", spans, found.rows))
    return found.rows - removed, {"removed": removed.norm(dim=1).tolist()}


def basis(vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "q d_model"]:
    """An orthonormal basis of what vectors span.

    Raises:
        ArgumentError: they are all zero.
    """
    _, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    if not float(sizes[0]):
        raise ArgumentError("`project_out` must be directions other than zero.")
    kept: Tensor = right[sizes > SMALL * sizes[0]]
    return kept


def _tokens(given: Any, model: OpenedModel) -> list[int] | None:
    """Ids of tokens, or None where floats were given."""
    if isinstance(given, (str, int)):
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, (str, int)) for one in given):
        return [token_id(one, model.tokenizer, model, "project_out") for one in given]
    return None


def _dai(
    found: _Found, tokens: Mapping[str, int], steps: Mapping[str, float], direction: str, signs: Any
) -> tuple[Vectors, dict[str, Any]]:
    """The norm-scaled rule: `old` leaves by l1 row norms, `new` comes by l2."""
    ids = list(tokens.values())
    both = found.by_sublayer(lambda layer, part: token_directions(found.model, layer, part, ids, direction))
    e = {name: both[:, i] for i, name in enumerate(tokens)}
    sign = _signs(signs, found, e.get("old"))
    scale = (sign * found.rows.norm(dim=1))[:, None]
    after = found.rows.clone()
    for name, times in (("old", -steps["l1"]), ("new", steps["l2"])):
        if name in e:
            after += times * scale * torch.nn.functional.normalize(e[name], dim=1, eps=0)
    said = {f"bs_{name}_{when}": (e[name] * rows).sum(1).tolist()
            for name in e for when, rows in (("before", found.rows), ("after", after))}  # fmt: skip
    return after, {"sign": sign.tolist(), **said}


def _either_sign(model: OpenedModel, site: Site) -> bool:
    """Whether a coefficient is a product, which can be far below zero: of a gated or an attention neuron."""
    if isinstance(site, AttnNeuron):
        return True
    return len(model.group_keys(site.layer, neuron_place(site)[0])) == 2  # type: ignore[attr-defined, arg-type]


def _signs(given: Any, found: _Found, old: Tensor | None) -> Float[Tensor, " site"]:
    n = len(found.sites)
    if isinstance(given, str):
        way = _check.choice("signs", given, SIGNS)
        if old is None and way == "old":
            raise ArgumentError("`signs` must be 'plain' or numbers where no `old` token is given; got 'old'.")
        if old is None or way == "plain":
            return torch.ones(n, dtype=torch.float64)
        turned = (old * found.rows).sum(1) < 0
        if way == "auto":
            turned &= torch.tensor([_either_sign(found.model, one) for one in found.sites])
        return 1.0 - 2.0 * turned.double()
    signs = numbers("signs", given)
    if len(signs) != n or not bool((signs.abs() == 1).all()):
        raise ArgumentError(_check.message("signs", f"'plain', 'old', or 1 or -1 for each of {n} sites", given))
    return signs

"""Placing: which slices of which stored tensors hold a site's value vectors.

A neuron is a row of its down-projection, stored as a column by ``nn.Linear`` (axis 1), as a row by ``Conv1D`` (axis 0),
and inside the 3-D parameter of a mixture's experts. An attention neuron is a row of W_O, a head d_head of them. A whole
sublayer is all its rows and its output biases; where a norm stands between it and the stream, that norm's weights, as
what the norm makes of rows does not grow with them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resid_surgery.addresses import At, Edge, Slice, as_sites, expand
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import tied_paths
from resid_surgery.errors import ArgumentError, SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.replacing import tensors_of
from resid_surgery.sites import (
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
    Sublayer,
)

NEURONS = (Neuron, ExpertNeuron, SharedNeuron, AttnNeuron)
NO_SITES = ("remainder", "constant")


@final
@dataclass(frozen=True, eq=False)
class Place:
    """Slices of one stored tensor.

    Attributes:
        name: path of the tensor, as in the model's ``state_dict``. axes: which axes the index counts along.
        index: (slice, axis). offset: what the model adds to the stored numbers before it multiplies with them (1 for a
            gain that is kept as w with 1 + w meant).
    """

    name: str
    axes: tuple[int, ...]
    index: Int[Tensor, "slice axis"]
    offset: float = 0.0

    def read(self, tensor: Tensor) -> Float[Tensor, "slice *rest"]:
        """The slices of a tensor, in float64, as the model uses them."""
        front = tensor.detach().movedim(self.axes, tuple(range(len(self.axes))))
        return front[tuple(self.index.T.to(tensor.device))].double().cpu() + self.offset

    def added(self, tensor: Tensor, delta: Float[Tensor, "slice *rest"]) -> Rows:
        """What is added to these slices of a tensor, as a change of it."""
        return Rows(self.name, (), tuple(tensor.shape), self.axes, self.index, delta)


def sites_given(given: Any) -> tuple[Site, ...]:
    """Sites, texts and slices as they come: also a `Located` and the like (``.sites``) and tables with a "site" or
    "writer" column, whose rows of remainders and constants are left out; each site once.

    Raises:
        SiteError: no sites, or a text that is none. ArgumentError: a table without such a column.
    """
    if isinstance(given, pd.DataFrame):
        column = next((name for name in ("site", "writer") if name in given), None)
        if column is None:
            raise ArgumentError(
                f"`sites` must be sites, or a table with a 'site' or 'writer' column; got {list(given)}."
            )
        rows = given[~given["kind"].isin(NO_SITES)] if "kind" in given else given
        given = rows[column].tolist()
    return tuple(dict.fromkeys(as_sites(getattr(given, "sites", given))))


def single_sites(model: OpenedModel, sites: Iterable[Site]) -> tuple[Site, ...]:
    """Sites with every slice replaced by its members, checked against a model, each once.

    Raises:
        SiteError: a site does not exist, or stands in no weight.
    """
    found: dict[Site, None] = {}
    for one in sites:
        if isinstance(one, (At, Edge)) or "<" in str(one):
            _refuse(one)
        members = one.expand(model.anatomy, 0) if isinstance(one, Slice) else (one.resolve(model.anatomy),)
        found |= dict.fromkeys(members)
    return tuple(found)


def places_of(model: OpenedModel, site: Site) -> tuple[Place, ...]:
    """Where a single site's value vectors are stored.

    Args:
        model: from `resid_surgery.load`. site: resolved, as `single_sites` gives it.

    Raises:
        SiteError: it is no row of any weight. UnsupportedModelError: a projection of an unknown kind.
    """
    anatomy = model.anatomy
    if isinstance(site, Neuron):
        return (_projection(model, site.layer, "mlp_out", [site.index]),)
    if isinstance(site, SharedNeuron):
        return (_projection(model, site.layer, "shared_out", [site.index]),)
    if isinstance(site, ExpertNeuron):
        return (_experts(model, site.layer, [(site.expert, site.index)]),)
    if isinstance(site, (Head, AttnNeuron)) and getattr(site, "source", None) is None:
        d_head = anatomy.sizes[site.layer].d_head
        first = site.head * d_head
        rows = range(first, first + d_head) if isinstance(site, Head) else [first + site.index]
        return (_projection(model, site.layer, "attn_out", rows),)
    if isinstance(site, Bias):
        return _biases(model, site)
    if isinstance(site, Sublayer):
        anatomy.require(site.layer, site.part, f"{site} as rows of a weight")
        return _post_norm(model, site) or _whole(model, site)
    return _refuse(site)


def stored(model: OpenedModel, names: Iterable[str]) -> Mapping[str, Tensor]:
    """The tensors at some paths.

    Raises:
        SiteError: a tensor is not stored as it is used, or another module shares it, which a change would change too.
    """
    held, found = tensors_of(model.module), {}
    for name in dict.fromkeys(names):
        if name not in held:
            raise SiteError(
                f"`sites` must lie in plain tensors of {model.name}; its state_dict has no {name}: the weight is made "
                "from others (a parametrization). Use interventions (baked=False)."
            )
        if tied := tied_paths(model, name):
            raise SiteError(
                f"`sites` must lie in tensors of their own; {name} of {model.name} is also {', '.join(tied)}, which "
                "would change as well. Untie them first, or use interventions (baked=False)."
            )
        found[name] = held[name]
    return found


def _projection(model: OpenedModel, layer: int, part: str, rows: Iterable[int]) -> Place:
    model.rows(layer, part)  # refuses other kinds of projection
    axis = 1 if isinstance(model.part(layer, part), nn.Linear) else 0  # Conv1D keeps rows as rows
    return Place(f"{model.path(layer, part)}.weight", (axis,), torch.tensor(list(rows))[:, None])


def _experts(model: OpenedModel, layer: int, pairs: Iterable[tuple[int, int]]) -> Place:
    axis = 1 if model.experts(layer).transposed else 2
    return Place(f"{model.path(layer, 'experts')}.down_proj", (0, axis), torch.tensor(list(pairs)))


def _whole(model: OpenedModel, site: Sublayer) -> tuple[Place, ...]:
    """All rows of a sublayer, and its biases."""
    layer, size = site.layer, model.anatomy.sizes[site.layer]
    found: list[Place] = []
    if site.part == "attn":
        found.append(_projection(model, layer, "attn_out", range(len(model.rows(layer, "attn_out").rows))))
    elif not size.n_experts:
        found.append(_projection(model, layer, "mlp_out", range(size.d_mlp)))
    else:
        found.append(_experts(model, layer, [(e, i) for e in range(size.n_experts) for i in range(size.d_expert)]))
        if size.d_mlp:
            found.append(_projection(model, layer, "shared_out", range(size.d_mlp)))
    groups = [*range(size.n_experts), *(["shared"] * bool(size.d_mlp))] if site.part == "mlp" and size.n_experts else []
    biases = [Bias(layer, site.part, expert) for expert in groups] or [Bias(layer, site.part)]
    return (*found, *(place for one in biases for place in _biases(model, one, needed=False)))


def _biases(model: OpenedModel, site: Bias, *, needed: bool = True) -> tuple[Place, ...]:
    """A bias as slices: every number of a projection's, one row of the experts'."""
    layer, mixture = site.layer, bool(model.anatomy.sizes[site.layer].n_experts)
    model.anatomy.require(layer, site.part, str(site))
    if site.part == "mlp" and mixture and site.expert is None:
        raise SiteError(
            f"`{site}` does not say which expert: layer {layer} of {model.name} is a mixture of experts. "
            f"Write L{layer}.E0.bias."
        )
    if isinstance(site.expert, int):
        bias = model.experts(layer).out(site.expert).bias
        name, index = f"{model.path(layer, 'experts')}.down_proj_bias", torch.tensor([[site.expert]])
    else:
        part = "attn_out" if site.part == "attn" else "shared_out" if site.expert else "mlp_out"
        bias = model.rows(layer, part).bias
        name, index = f"{model.path(layer, part)}.bias", torch.arange(0 if bias is None else len(bias))[:, None]
    if bias is None and needed:
        raise SiteError(f"`{site}` does not exist for {model.name}: the projection has no bias.")
    return () if bias is None else (Place(name, (0,), index),)


def _post_norm(model: OpenedModel, site: Sublayer) -> tuple[Place, ...]:
    """The weights of the norm between a sublayer and the stream, or nothing where there is no norm."""
    part = f"{site.part}_post_norm"
    if not model.has(site.layer, part):
        return ()
    module, path = model.part(site.layer, part), model.path(site.layer, part)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise SiteError(
            f"`{site}` cannot be scaled in the weights of {model.name}: what it writes goes through {path}, a norm "
            "without weights. Use baked=False."
        )
    offset = model.anatomy.norms[site.layer, part].offset
    gain = Place(f"{path}.weight", tuple(range(weight.ndim)), _every(weight), offset)
    return (gain,) if not isinstance(bias, Tensor) else (gain, replace(gain, name=f"{path}.bias", offset=0.0))


def _every(tensor: Tensor) -> Int[Tensor, "slice axis"]:
    return torch.cartesian_prod(*(torch.arange(n) for n in tensor.shape)).reshape(-1, tensor.ndim)


def _refuse(site: Site) -> NoReturn:
    """Say why a site is no row of any weight."""
    whole = "Use the whole head or neuron, or an edit of interventions (edit_coefficients with baked=False)."
    if isinstance(site, HeadSource) or "<" in str(site):
        why = f"one source position is no row of a weight. {whole}"
    elif isinstance(site, At):
        why = "weights act at every position. Leave @ out, or use interventions."
    elif isinstance(site, Edge):
        why = "an edge between two sites is no row of a weight. Use rs.Cut or other interventions."
    elif isinstance(site, (Resid, Constant)):
        why = "it is a state or constant of the stream, which no row writes. Name what writes it, or use interventions."
    elif isinstance(site, Projection):
        why = "queries, keys and values are no value vectors. Use interventions."
    else:
        why = "it has no value vector."
    raise SiteError(f"`{site}` cannot be edited in the weights: {why}")


def members(model: OpenedModel, site: Site) -> tuple[Site, ...]:
    """The single sites that one given site or slice names, checked; those of no weight are let through.

    Raises:
        SiteError: a site does not exist.
    """
    bare = site.site if isinstance(site, At) else site
    if isinstance(bare, Slice) and "<" in str(bare):
        return (site,)  # its sources are the prompt's
    return tuple(one.resolve(model.anatomy) for one in expand([bare], model.anatomy, 0))

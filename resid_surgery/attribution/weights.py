"""Weights of heads as low-rank maps of the stream: W_Q, W_K, W_V (d_model x width) and W_O (d_head x d_model).

A head that reads x through its layer's norm, N(x) = gain * centre(x) / s + beta, writes sum_j alpha_j v_j W_O with
v_j = N(x_j) W_V + b_V, where alpha is a softmax of (N(x_t) W_Q + b_Q) . (N(x_j) W_K + b_K). The maps are found by
running the layer's own attention at position 0, where rotations are the identity: zeros give the biases, gradients the
linear parts (one coordinate to a row of a batch), and a probe proves that nothing else was there. Fused, transposed,
grouped and latent projections are all the same to that. Norms inside attention count with scale 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import flag, message
from resid_surgery.addresses import as_sites, expand
from resid_surgery.errors import SiteError, StaleRecordingError, UnsupportedModelError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import Norm
from resid_surgery.models.tracing import projected
from resid_surgery.sites import Head
from resid_surgery.stream.blocks import PostMap
from resid_surgery.stream.recording import closure_tolerance, need_model

SIDES = ("query", "key", "value")
ROWS = 512
KEEP_BYTES = 256 << 20


@final
@dataclass(frozen=True, eq=False)
class Projected:
    """What a layer's attention makes of its input on one side, x @ weight[h] + bias[h], in the model's dtype.

    Attributes:
        weight: (head, d_model, width), one a KV head for keys and values. bias: (head, width).
    """

    weight: Float[Tensor, "head d_model width"]
    bias: Float[Tensor, "head width"]

    def of(self, head: int, n_heads: int) -> "Projected":
        """The map of one of `n_heads` heads, as a stack of one; grouped heads share theirs."""
        group = head * len(self.weight) // n_heads
        return Projected(self.weight[group : group + 1], self.bias[group : group + 1])

    def folded(self, norm: Norm) -> "Projected":
        """The same map of x instead of N(x), with scale s = 1."""
        one, weight = norm.gain.new_ones(1), self.weight.to(norm.gain)
        through = norm.pull(weight.transpose(1, 2), one).transpose(1, 2)
        return Projected(through, self.bias.to(norm.gain) + norm.bias @ weight)


@final
@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The maps of one layer's attention, as it makes them of N(x).

    Attributes:
        query, key: both, or None where they are no maps to be had. value. scaling: of scores. why: there are none. own:
            queries and keys are made of what the layer reads, and the weights of them.
    """

    query: Projected | None
    key: Projected | None
    value: Projected
    scaling: float
    why: str = ""
    own: bool = True

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(one.weight.nbytes for one in (self.query, self.key, self.value) if one is not None)

    def same(self, other: "LayerMaps") -> bool:
        """Whether the maps of both are equal, bit for bit."""
        pairs = [(getattr(self, side), getattr(other, side)) for side in SIDES]
        return self.scaling == other.scaling and all(
            one is two
            or (None not in (one, two) and torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias))
            for one, two in pairs
        )


@final
@dataclass(frozen=True, eq=False)
class HeadMaps:
    """One head's maps, in the working dtype.

    Attributes:
        site: which head.
        w_q, w_k: (d_model, d_key) un-rotated, with biases b_q, b_k; None where there are no such maps: `why`.
        w_v: (d_model, d_head) with bias b_v. w_o: (d_head, d_model).
        scaling: score = scaling * (x w_q + b_q) . (x' w_k + b_k) at distance 0, before a cap and softmax.
    """

    site: Head
    w_q: Float[Tensor, "d_model d_key"] | None
    w_k: Float[Tensor, "d_model d_key"] | None
    w_v: Float[Tensor, "d_model d_head"]
    w_o: Float[Tensor, "d_head d_model"]
    b_q: Float[Tensor, " d_key"] | None
    b_k: Float[Tensor, " d_key"] | None
    b_v: Float[Tensor, " d_head"]
    scaling: float
    why: str

    def ov(self) -> Float[Tensor, "d_model d_model"]:
        """W_V W_O, made on request: row x of the stream at a source -> x W_V W_O of what the head writes."""
        return self.w_v @ self.w_o

    def qk(self) -> Float[Tensor, "d_model d_model"]:
        """scaling * W_Q W_K^T, made on request: x (query side) . qk . x' (key side) is the score without biases.

        Raises:
            UnsupportedModelError: its queries or keys are no maps to be had.
        """
        if self.w_q is None or self.w_k is None:
            raise UnsupportedModelError(f"`{self.site}` has no QK circuit: {self.why}")
        return self.scaling * self.w_q @ self.w_k.T


@final
@dataclass(frozen=True, eq=False, repr=False)
class HeadWeights:
    """Heads' low-rank maps (made when they are asked for); from `head_weights`.

    Attributes:
        model: whose. sites: which heads, in order. folded: what stands in the maps besides the projections:
            "attn_norm gain", "attn_norm centring" (in W_Q, W_K, W_V), "attn_post_norm gain", "attn_post_norm centring",
            "attn_scale" (in W_O); nothing with ``fold=False``.
        layers: the layers' maps. fingerprint: of the weights that they were read from. tree: of the model's shadows,
            which it was read from (`OpenedModel.trees`).
    """

    model: OpenedModel
    sites: tuple[Head, ...]
    folded: tuple[str, ...]
    layers: dict[int, LayerMaps]
    fold: bool
    fingerprint: str
    tree: int

    def __repr__(self) -> str:
        named = ", ".join(map(str, self.sites[:4])) + (", ..." if len(self.sites) > 4 else "")
        return f"HeadWeights({len(self.sites)} heads of {self.model.name}: {named}; folded: {list(self.folded)})"

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[HeadMaps]:
        self.require_fresh()
        return (self._of(site) for site in self.sites)

    def __getitem__(self, head: Any) -> HeadMaps:
        """The maps of one head: its site, or its text.

        Raises:
            SiteError: it is none of these heads. StaleRecordingError: the model's weights changed since.
        """
        (site, *more) = heads_of(self.model, head)
        if more or site not in self.sites:
            raise SiteError(f"`{head}` must be one of the {len(self.sites)} heads of {self!r}.")
        self.require_fresh()
        return self._of(site)

    def require_fresh(self) -> None:
        """Refuse weights other than those that the maps were read from: norms and W_O are read when they are asked for.

        Raises:
            StaleRecordingError: the model's weights changed since, or its modules, hooks or settings so that the maps
                are others.
        """
        if (now := self.model.fingerprint()) != self.fingerprint:
            raise StaleRecordingError(
                f"these head weights of {self.model.name} were read from weights {self.fingerprint[:12]}, but it "
                f"now has {now[:12]}: its weights changed since. Call head_weights again."
            )
        self.model.shadow  # noqa: B018  (made anew if need be, and counted)
        if self.model.trees != self.tree and not all(
            one.same(layer_maps(self.model, i)) for i, one in self.layers.items()
        ):
            raise StaleRecordingError(
                f"these head weights of {self.model.name} are not what it computes with now: modules, hooks or "
                "settings of it (an adapter that was switched, say) changed since. Call head_weights again."
            )

    def _of(self, site: Head) -> HeadMaps:
        maps, n_heads = self.layers[site.layer], self.model.anatomy.sizes[site.layer].n_heads
        norm = attention_norm(self.model, site.layer, fold=self.fold)
        q, k, v = (None if one is None else one.of(site.head, n_heads).folded(norm)
                   for one in (maps.query, maps.key, maps.value))  # fmt: skip
        assert v is not None
        return HeadMaps(
            site=site,
            w_q=None if q is None else q.weight[0],
            w_k=None if k is None else k.weight[0],
            w_v=v.weight[0],
            w_o=written_rows(self.model, site.layer, fold=self.fold)[site.head],
            b_q=None if q is None else q.bias[0],
            b_k=None if k is None else k.bias[0],
            b_v=v.bias[0],
            scaling=maps.scaling,
            why=maps.why,
        )


def head_weights(model: OpenedModel, heads: Any = None, *, fold: bool = True) -> HeadWeights:
    """Every head as a QK and an OV circuit: low-rank maps between vectors of the stream.

    With ``fold=True`` the maps act on the stream itself: W_Q, W_K and W_V take in the gain (and centring) of the norm
    that attention reads through, W_O the gain (and centring) of a post-norm and the residual multiplier. Scales of
    norms are 1 (they belong to a run, not to weights), biases of norms stand in b_Q, b_K, b_V. A gate between
    attention and W_O, which hangs on the input, is left out. Rotations are left out too: scores are at distance 0.

    Args:
        model: from `resid_surgery.load`. heads: None for all, a site, a text or slice ("L5.H1", "L3:6.H*"), or several.
        fold: False gives the maps of N(x), and W_O as it is.

    Returns:
        `HeadWeights`: index it by site or text, or iterate; each is a `HeadMaps`.

    Raises:
        SiteError: no such head. ArgumentError: `fold` is no bool. UnsupportedModelError: a layer's values are not
        affine in what it reads, or another layer's.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    need_weights(model)
    flag("fold", fold)
    sites = heads_of(model, heads)
    layers = {layer: layer_maps(model, layer) for layer in sorted({site.layer for site in sites})}
    folded = _names_of_folded(model, layers) if fold else ()
    return HeadWeights(model, sites, folded, layers, fold, model.known_fingerprint(), model.trees)


def need_weights(model: Any) -> None:
    """Refuse anything but an opened model, and look at all of its weights: what is kept of others is made anew."""
    need_model(model)
    model.fingerprint()


def heads_of(model: OpenedModel, given: Any) -> tuple[Head, ...]:
    """Heads from what a caller gave; None for all of the model's.

    Raises:
        SiteError: something is no head, or does not exist.
    """
    if given is None:
        given = "L*.H*"
    found: list[Head] = []
    for site in expand(as_sites(given), model.anatomy, 0):
        if not isinstance(site, Head):
            raise SiteError(message("heads", "heads such as L5.H1 or L3:6.H*", str(site), model=model.name))
        found.append(site.resolve(model.anatomy))  # type: ignore[arg-type]
    return tuple(dict.fromkeys(found))


def by_layer(heads: Sequence[Head]) -> dict[int, list[Head]]:
    """Heads of each layer, in the order given."""
    found: dict[int, list[Head]] = {}
    for head in heads:
        found.setdefault(head.layer, []).append(head)
    return found


def per_weights(model: OpenedModel) -> dict[Any, Any]:
    """What is kept of a model while its weights, modules, hooks and settings are the same."""
    model.shadow  # noqa: B018  (made anew if need be, and counted)
    now = model.known_fingerprint(), model.trees
    if model.cache.get("circuits", (None,))[0] != now:
        model.cache["circuits"] = now, {}
    return model.cache["circuits"][1]  # type: ignore[no-any-return]


def layer_maps(model: OpenedModel, layer: int) -> LayerMaps:
    """The maps of a layer's attention, kept while the weights are the same (up to `KEEP_BYTES` in all).

    Raises:
        UnsupportedModelError: it is not affine, or its values come from elsewhere.
    """
    kept = per_weights(model).setdefault("maps", {})
    if layer not in kept:
        made = _made(model, layer)
        if made.size + sum(one.size for one in kept.values()) > KEEP_BYTES:
            return made
        kept[layer] = made
    return kept[layer]  # type: ignore[no-any-return]


def attention_norm(model: OpenedModel, layer: int, *, fold: bool = True) -> Norm:
    """The norm that a layer's attention reads through, or none where it is not to be folded."""
    if fold:
        return model.norm(layer, "attn_norm")
    return Norm.absent(model.anatomy.d_model, model.work_dtype, model.device)


def post_unit(model: OpenedModel, layer: int) -> PostMap:
    """What stands between W_O and the stream, for `PostMap.unscaled`: a post-norm's scale belongs to a run."""
    norm = model.norm(layer, "attn_post_norm") if model.has(layer, "attn_post_norm") else None
    return PostMap(norm, None, model.factor(layer, "attn_scale"))


def written_rows(model: OpenedModel, layer: int, *, fold: bool = True) -> Float[Tensor, "head d_head d_model"]:
    """W_O of every head, in the working dtype."""
    size = model.anatomy.sizes[layer]
    rows = model.work(model.rows(layer, "attn_out").rows).reshape(size.n_heads, size.d_head, -1)
    return post_unit(model, layer).unscaled(rows) if fold else rows


def _names_of_folded(model: OpenedModel, layers: dict[int, LayerMaps]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for layer in layers:
        for part in ("attn_norm", "attn_post_norm"):
            if model.has(layer, part):
                found[f"{part} gain"] = None
                if model.norm(layer, part).centred:
                    found[f"{part} centring"] = None
        if model.block(layer).attn_scale != 1.0:
            found["attn_scale"] = None
    return tuple(found)


def _made(model: OpenedModel, layer: int) -> LayerMaps:
    d = model.anatomy.d_model
    x = torch.stack([torch.zeros(d), torch.linspace(-1.0, 2.0, d).sin()]).to(model.device, model.dtype)
    call, _ = projected(model, layer, x[:, None], any_ids(model, 2), unit=True)
    made = {name: side for name in SIDES if (side := getattr(call, name)) is not None and side.requires_grad}
    weights = _jacobians(model, layer, {name: (side.shape[1], side.shape[3]) for name, side in made.items()})
    found = {name: Projected(weights[name], side.detach()[0, :, 0]) for name, side in made.items()}
    wrong = {name: _not_affine(model, found[name], x[1], side.detach()[1, :, 0]) for name, side in made.items()}
    why = {name: wrong.get(name, "not made of its input (another layer's, or another argument)") for name in SIDES}
    said = [f"the {name} of layer {layer} is {why[name]}." for name in SIDES if why[name]]
    if why["value"]:
        raise UnsupportedModelError(f"heads of layer {layer} of {model.name} are no matrices: {said[-1]}")
    if not call.from_scores:
        said = ["the model gives its attention weights only."]
    if said:
        own = call.from_scores and len(made) == len(SIDES)
        return LayerMaps(None, None, found["value"], call.scaling, said[0], own)
    return LayerMaps(found["query"], found["key"], found["value"], call.scaling)


def _jacobians(
    model: OpenedModel, layer: int, shapes: dict[str, tuple[int, int]]
) -> dict[str, Float[Tensor, "head d_model width"]]:
    """Side -> its linear part, of (head, width) shapes: one backward pass for `ROWS` coordinates, one to a row.

    Gradients, not differences: a large bias would round the weights away.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in shapes}
    most = max(heads * width for heads, width in shapes.values())
    for low in range(0, most, ROWS):
        n = min(ROWS, most - low)
        x = torch.zeros(n, 1, model.anatomy.d_model, device=model.device, dtype=model.dtype)
        call, leaf = projected(model, layer, x, any_ids(model, n), unit=True)
        for name, (heads, width) in shapes.items():
            wanted = range(low, min(low + n, heads * width))
            with torch.inference_mode(False):
                picked = torch.zeros(n, heads * width, device=leaf.device, dtype=leaf.dtype)
                picked[range(len(wanted)), wanted] = 1
                made = getattr(call, name)
                wanted_of = picked.view(n, heads, 1, width).to(made.device)
                rows = torch.autograd.grad(made, leaf, wanted_of, retain_graph=True)[0]
            found[name].append(rows[: len(wanted), 0])
    stacked = {name: torch.cat(rows).view(*shapes[name], -1) for name, rows in found.items()}
    return {name: rows.transpose(1, 2).contiguous() for name, rows in stacked.items()}


def _not_affine(
    model: OpenedModel, one: Projected, x: Float[Tensor, " d_model"], made: Float[Tensor, "head width"]
) -> str:
    """Why a map does not give what was made of a probe; nothing if it does."""
    parts, bias = model.work(one.weight) * model.work(x)[:, None], model.work(one.bias)
    off = float((parts.sum(1) + bias - model.work(made)).abs().max())
    size = float((parts.abs().sum(1) + bias.abs()).max())
    if off <= 10 * closure_tolerance(model) * size:
        return ""
    return f"not affine in its input, even with its norms frozen (off by {off:.2g} of {size:.2g})"


def any_ids(model: OpenedModel, rows: int) -> Tensor:
    """(row, 1) tokens of one-token prompts, where they do not matter; no padding, which models warn about."""
    return model.probe_ids()[:, :1].expand(rows, 1)

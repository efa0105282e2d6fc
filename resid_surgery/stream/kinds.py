"""Kinds of subvalues: a layer's neurons, heads, (head, source) pairs and attention neurons as blocks.

Every subvalue is a coefficient times a direction. Blocks come as their sublayer writes them ("raw"), as they
enter the stream behind a post-norm and a multiplier ("here"), or as they reach the final stream ("final").
"""

import bisect
import itertools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.sites import AttnNeuron, ExpertNeuron, Head, HeadSource, Neuron, SharedNeuron, Site
from resid_surgery.stream.blocks import Block, Mixed, PostMap, Square, WeightRows
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.records import AttentionRecord, repeat_kv

Where = Literal["raw", "here", "final"]


def post_map(rec: Recording, layer: int, part: str, where: Where = "here") -> PostMap:
    """The frozen map from a sublayer's output to the stream after it, or to the final stream."""
    if where == "raw":
        return PostMap()
    record = rec.layers[layer]
    post = PostMap.of(rec.model, layer, part, rec.work(record.attn_raw if part == "attn" else record.mlp_raw))
    return post.then(rec.reach(layer, part)) if where == "final" else post


def neuron_block(rec: Recording, layer: int, where: Where = "here") -> Block:
    """The neurons of a layer: coefficient_k times push(factor * w_out_k) (paper: FFN subvalues).

    In a mixture of experts these are the neurons of the experts routed to at t, expert by expert,
    and of the shared expert; the factor is the router weight.
    """
    rec.model.anatomy.require(layer, "mlp", f"L{layer}.N0")
    groups, post = rec.layers[layer].groups, post_map(rec, layer, "mlp", where)
    weights = tuple(WeightRows((layer, "mlp", group.expert, where), rec.model.group_rows(layer, group.expert).rows,
                               post, group.factor) for group in groups)  # fmt: skip
    coefficient = torch.cat([rec.work(group.coefficient) for group in groups])
    first = list(itertools.accumulate((len(one.rows) for one in weights), initial=0))
    starts = torch.tensor(first)

    def home(i: Tensor) -> Tensor:
        return torch.searchsorted(starts, i.cpu(), right=True) - 1

    def direction(i: Tensor) -> Tensor:
        g, out = home(i), []
        for b, one in enumerate(weights):
            mine = i.cpu()[g == b] - first[b]
            out.append(rec.work(one.rows[mine.to(one.rows.device)]) * one.factor)
        order = torch.argsort(torch.argsort(g, stable=True))
        return post.push(out[0] if len(weights) == 1 else torch.cat(out)[order.to(rec.model.device)])

    def site(i: int) -> Site:
        b = bisect.bisect_right(first, i) - 1
        return neuron_site(layer, groups[b].expert, i - first[b])

    def project(g: Tensor) -> Tensor:
        pulled = post.pull(g)
        return torch.cat([(pulled @ rec.work(one.rows).T) * one.factor for one in weights], -1) * coefficient

    def lengths(f: Square) -> Tensor:
        return torch.cat([one.lengths(rec, f) for one in weights])

    return Block("neuron", layer, len(coefficient), project, direction, lengths, site, coefficient, weights=weights)


def neuron_site(layer: int, expert: int | str | None, index: int) -> Site:
    """The site of a neuron of a dense MLP, an expert or the shared expert."""
    if expert is None:
        return Neuron(layer, index)
    return SharedNeuron(layer, index) if expert == "shared" else ExpertNeuron(layer, int(expert), index)


def attention_of(rec: Recording, layer: int, what: str) -> AttentionRecord:
    """A layer's attention at t.

    Raises:
        SiteError: the layer has no attention weights.
    """
    rec.model.anatomy.require(layer, "attn", what)
    found = rec.layers[layer].attention
    assert found is not None
    return found


def attn_neuron_block(rec: Recording, layer: int, where: Where = "here", *, sources: bool = False) -> Block:
    """The attention neurons of a layer: z[h,d] times push(row of W_O) (paper: attention neurons).

    With `sources` one for each source position: alpha[h,j] v[h,j,d] times the same row.
    """
    rows, d_head = rec.model.rows(layer, "attn_out").rows, rec.model.anatomy.sizes[layer].d_head
    if sources:
        parts = joint_parts(rec, layer).transpose(1, 2)  # (head, d_head, source)
    else:
        parts = rec.work(attention_of(rec, layer, f"L{layer}.H0.D0").z)[..., None]
    n = parts.shape[-1]
    per_row = parts.reshape(-1, n)
    post = post_map(rec, layer, "attn", where)
    weights = WeightRows((layer, "attn", None, where), rows, post)

    def site(i: int) -> Site:
        head, index = divmod(i // n, d_head)
        return AttnNeuron(layer, head, index, i % n if sources else None)

    return Block(
        "attn_neuron_source" if sources else "attn_neuron",
        layer,
        per_row.numel(),
        lambda g: ((post.pull(g) @ rec.work(rows).T)[..., None] * per_row).flatten(1),
        lambda i: post.push(rec.work(rows[i.to(rows.device)])),
        lambda f: weights.lengths(rec, f),
        site,
        per_row.reshape(-1),
        per_row=n,
        weights=(weights,),
    )


def head_block(rec: Recording, layer: int, where: Where = "here") -> Block:
    """The heads of a layer: v_h = push(z_h W_O[h])."""
    parts = rec.work(attention_of(rec, layer, f"L{layer}.H0").z)[:, None]
    return _through_w_o(rec, layer, "head", parts, None, where)


def head_source_block(rec: Recording, layer: int, where: Where = "here") -> Block:
    """The joint vectors alpha[h,j] times push(v[h,j] W_O[h]) (paper: attention subvalues)."""
    values, alpha = source_values(rec, layer)
    return _through_w_o(rec, layer, "head_source", values, alpha.reshape(-1), where)


def source_values(
    rec: Recording, layer: int
) -> tuple[Float[Tensor, "head source d_head"], Float[Tensor, "head source"]]:
    """(gate[h] v[h,j], alpha[h,j]) of the sources up to t."""
    one = attention_of(rec, layer, f"L{layer}.H0<0")
    seen = rec.prompt.position + 1
    alpha = rec.work(one.alpha)
    value = repeat_kv(rec.work(one.value), alpha.shape[0])[:, :seen]
    return value if one.gate is None else value * rec.work(one.gate)[:, None], alpha[:, :seen]


def joint_parts(rec: Recording, layer: int) -> Float[Tensor, "head source d_head"]:
    """gate[h] alpha[h,j] v[h,j] of the sources up to t, before W_O; they sum to the head's z."""
    values, alpha = source_values(rec, layer)
    return alpha[..., None] * values


def _through_w_o(
    rec: Recording, layer: int, kind: str, amounts: Tensor, coefficient: Tensor | None, where: Where
) -> Block:
    """Blocks of directions amounts[h, j] W_O[h]; nothing of size d_model is held for them."""
    post, per_head = post_map(rec, layer, "attn", where), amounts.shape[1]
    rows = rec.model.rows(layer, "attn_out").rows
    w_o = rec.work(rows).view(amounts.shape[0], amounts.shape[2], -1)

    def project(g: Tensor) -> Tensor:
        through = torch.einsum("md,had->mha", post.pull(g), w_o)
        found = torch.einsum("mha,hja->mhj", through, amounts).reshape(g.shape[0], -1)
        return found if coefficient is None else found * coefficient

    def direction(i: Tensor) -> Tensor:
        i = i.to(amounts.device)
        h, j = i // per_head, i % per_head
        return post.push(torch.einsum("na,nad->nd", amounts[h, j], w_o[h]))

    def lengths(f: Square) -> Tensor:
        mapped = f.apply(post.push(w_o))
        gram = torch.einsum("had,hbd->hab", mapped, mapped)
        return torch.einsum("hja,hab,hjb->hj", amounts, gram, amounts).clamp_min(0).reshape(-1)

    def site(i: int) -> Site:
        return Head(layer, i) if coefficient is None else HeadSource(layer, i // per_head, i % per_head)

    mixed = Mixed(WeightRows((layer, "attn", None, where), rows, post), amounts)
    return Block(kind, layer, amounts.shape[0] * per_head, project, direction, lengths, site, coefficient, mixed=mixed)


def neuron_place(site: Neuron | ExpertNeuron | SharedNeuron) -> tuple[int | str | None, int]:
    """(expert, index) of a neuron's site."""
    expert = site.expert if isinstance(site, ExpertNeuron) else "shared" if isinstance(site, SharedNeuron) else None
    return expert, site.index

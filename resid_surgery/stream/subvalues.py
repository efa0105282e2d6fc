"""Subvalues: a recording's addends at any grain.

The stream at t is the sum of the addends of one grain; each grain is a list of `Block`s, and what
later blocks multiply the stream by belongs to them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery._check import choice
from resid_surgery.errors import SiteError
from resid_surgery.models.parts import LinearMap
from resid_surgery.sites import (
    AttnNeuron,
    Bias,
    Constant,
    ExpertNeuron,
    Head,
    HeadSource,
    Neuron,
    Resid,
    SharedNeuron,
    Site,
    Sublayer,
)
from resid_surgery.stream.blocks import Block, PostMap, Square, multiplied, stored, sum_of
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.records import AttentionRecord, LayerRecord, NeuronGroup, repeat_kv

Grain = Literal["layer", "head", "head_source", "neuron", "subvalue"]
Kind = Literal["neuron", "head", "head_source", "attn_neuron", "layer"]
GRAINS: tuple[str, ...] = ("layer", "head", "head_source", "neuron", "subvalue")
KINDS: tuple[str, ...] = ("neuron", "head", "head_source", "attn_neuron", "layer")


def neuron_block(rec: Recording, layer: int, *, final: bool = False) -> Block:
    """The neurons of a layer: v_k = push(factor * coefficient_k w_out_k) (paper: FFN subvalues).

    In a mixture of experts these are the neurons of the experts routed to at t, expert by expert,
    and of the shared expert. `final` gives them as they reach the final stream.
    """
    a = rec.model.anatomy
    a.require(layer, "mlp", f"L{layer}.N0")
    groups, post = rec.layers[layer].groups, post_map(rec, layer, "mlp", final=final)
    rows = [rec.model.group_rows(layer, group.expert).rows for group in groups]
    sizes = [rec.work(group.coefficient) * group.factor for group in groups]
    first = torch.tensor([0, *(len(size) for size in sizes)]).cumsum(0)

    def home(i: Tensor) -> Tensor:
        return torch.searchsorted(first, i.cpu(), right=True) - 1

    def vectors(i: Tensor) -> Tensor:
        if len(groups) == 1:
            return post.push(rec.work(rows[0][i.to(rows[0].device)]) * sizes[0][i.to(sizes[0].device), None])
        g, out = home(i), []
        order = torch.argsort(g, stable=True)
        for b in range(len(groups)):
            mine = i.cpu()[g == b] - first[b]
            out.append(rec.work(rows[b][mine.to(rows[b].device)]) * sizes[b][mine.to(sizes[b].device), None])
        return post.push(torch.cat(out)[torch.argsort(order).to(rec.model.device)])

    def site(i: int) -> Site:
        b = int(home(torch.tensor([i])))
        return neuron_site(layer, groups[b].expert, i - int(first[b]))

    def project(g: Tensor) -> Tensor:
        pulled = post.pull(g)
        return torch.cat([(pulled @ rec.work(r).T) * size for r, size in zip(rows, sizes, strict=True)], -1)

    def squares(f: Square) -> Tensor:
        kept = [f.of_rows(rec, (layer, "mlp", group.expert, final), r, post)
                for group, r in zip(groups, rows, strict=True)]  # fmt: skip
        return torch.cat(kept) * torch.cat(sizes).square()

    zero = torch.cat(sizes) == 0
    return Block("neuron", layer, len(zero), project, vectors, site, squares, zero=zero)


def neuron_site(layer: int, expert: int | str | None, index: int) -> Site:
    """The site of a neuron of a dense MLP, an expert or the shared expert."""
    if expert is None:
        return Neuron(layer, index)
    return SharedNeuron(layer, index) if expert == "shared" else ExpertNeuron(layer, int(expert), index)


def neuron_place(site: Neuron | ExpertNeuron | SharedNeuron) -> tuple[int | str | None, int]:
    """(expert, index) of a neuron's site."""
    expert = site.expert if isinstance(site, ExpertNeuron) else "shared" if isinstance(site, SharedNeuron) else None
    return expert, site.index


def attention_of(rec: Recording, layer: int, what: str) -> AttentionRecord:
    """A layer's attention at t.

    Raises:
        SiteError: the layer has no attention weights.
    """
    rec.model.anatomy.require(layer, "attn", what)
    found = rec.layers[layer].attention
    assert found is not None
    return found


def attn_neuron_block(rec: Recording, layer: int, *, final: bool = False) -> Block:
    """The attention neurons of a layer: v = push(z[h,d] W_O row) (paper: attention neurons)."""
    z = rec.work(attention_of(rec, layer, f"L{layer}.H0.D0").z).reshape(-1)
    post = post_map(rec, layer, "attn", final=final)
    rows, d_head = rec.model.rows(layer, "attn_out").rows, rec.model.anatomy.sizes[layer].d_head
    return Block(
        "attn_neuron",
        layer,
        rows.shape[0],
        lambda g: (post.pull(g) @ rec.work(rows).T) * z,
        lambda i: post.push(rec.work(rows[i.to(rows.device)]) * z[i.to(z.device), None]),
        lambda i: AttnNeuron(layer, i // d_head, i % d_head),
        lambda f: f.of_rows(rec, (layer, "attn", final), rows, post) * z.square(),
        zero=z == 0,
    )


def head_block(rec: Recording, layer: int, *, final: bool = False) -> Block:
    """The heads of a layer: v_h = push(z_h W_O[h])."""
    parts = rec.work(attention_of(rec, layer, f"L{layer}.H0").z)[:, None]
    return _through_w_o(rec, layer, "head", parts, lambda i: Head(layer, i), final)


def head_source_block(rec: Recording, layer: int, *, final: bool = False) -> Block:
    """The joint vectors v_{h,j} = push(alpha[h,j] v[h,j] W_O[h]) (paper: attention subvalues)."""
    parts = joint_parts(rec, layer)
    n = parts.shape[1]
    return _through_w_o(rec, layer, "head_source", parts, lambda i: HeadSource(layer, i // n, i % n), final)


def joint_parts(rec: Recording, layer: int) -> Float[Tensor, "head source d_head"]:
    """gate[h] alpha[h,j] v[h,j] of the sources up to t, before W_O; they sum to the head's z."""
    one = attention_of(rec, layer, f"L{layer}.H0<0")
    seen = rec.prompt.position + 1
    alpha, value = rec.work(one.alpha), repeat_kv(rec.work(one.value), one.alpha.shape[0])
    parts = alpha[:, :seen, None] * value[:, :seen]
    return parts if one.gate is None else parts * rec.work(one.gate)[:, None]


def _through_w_o(
    rec: Recording, layer: int, kind: str, parts: Tensor, site: Callable[[int], Site], final: bool
) -> Block:
    """Blocks of vectors parts[h, j] W_O[h]; nothing of size d_model is held for them."""
    post = post_map(rec, layer, "attn", final=final)
    w_o = rec.work(rec.model.rows(layer, "attn_out").rows).view(parts.shape[0], parts.shape[2], -1)
    per_head = parts.shape[1]

    def project(g: Tensor) -> Tensor:
        through = torch.einsum("md,had->mha", post.pull(g), w_o)
        return torch.einsum("mha,hja->mhj", through, parts).reshape(g.shape[0], -1)

    def vectors(i: Tensor) -> Tensor:
        i = i.to(parts.device)
        h, j = i // per_head, i % per_head
        return post.push(torch.einsum("na,nad->nd", parts[h, j], w_o[h]))

    def squares(f: Square) -> Tensor:
        mapped = f.apply(post.push(w_o))
        gram = torch.einsum("had,hbd->hab", mapped, mapped)
        return torch.einsum("hja,hab,hjb->hj", parts, gram, parts).clamp_min(0).reshape(-1)

    return Block(kind, layer, parts.shape[0] * per_head, project, vectors, site, squares)


def post_map(rec: Recording, layer: int, part: str, *, final: bool = False) -> PostMap:
    """The frozen map from a sublayer's output to the stream after it, or to the final stream."""
    record = rec.layers[layer]
    post = PostMap.of(rec.model, layer, part, rec.work(record.attn_raw if part == "attn" else record.mlp_raw))
    return post.then(rec.reach(layer, part)) if final else post


def sublayer_vector(record: LayerRecord, part: str) -> Tensor:
    """What a sublayer adds."""
    return record.attn_out if part == "attn" else record.mlp_out


def sublayer_blocks(rec: Recording, layer: int, part: str, grain: str, times: Tensor | float) -> list[Block]:
    """The addends of one sublayer at a grain, whole or its parts and biases, each multiplied."""
    row = rec.model.block(layer)
    kind = row.attn_kind if part == "attn" else row.mlp_kind
    if kind == "none":
        return []
    finer = {
        "attn": {"head": head_block, "head_source": head_source_block, "subvalue": head_source_block},
        "mlp": {"neuron": neuron_block, "subvalue": neuron_block},
    }[part]
    if grain not in finer or kind == "opaque":
        site = Sublayer(layer, part)  # type: ignore[arg-type]
        return [
            multiplied(stored(part, layer, rec.work(sublayer_vector(rec.layers[layer], part))[None], [site]), times)
        ]
    blocks = [finer[grain](rec, layer)]
    biases = bias_vectors(rec, layer, part)
    if biases:
        blocks.append(stored("bias", layer, torch.stack(list(biases.values())), list(biases)))
    return [multiplied(block, times) for block in blocks]


def bias_vectors(rec: Recording, layer: int, part: str) -> dict[Site, Tensor]:
    """The output biases of a sublayer as they reach the stream after it, a post-norm's own included.

    In a mixture of experts every routed expert's bias is a row, times its router weight.
    """
    row, post = rec.model.block(layer), post_map(rec, layer, part)
    found: dict[Site, Tensor] = {}
    if part == "mlp" and row.mlp_kind == "experts":
        for group in rec.layers[layer].groups:
            bias = rec.model.group_rows(layer, group.expert).bias
            if bias is not None:
                found[Bias(layer, "mlp", group.expert)] = post.push(rec.work(bias) * group.factor)
    elif (row.attn_kind if part == "attn" else row.mlp_kind) in ("attention", "neurons"):
        written: LinearMap = rec.model.rows(layer, f"{part}_out")
        if written.bias is not None:
            found[Bias(layer, part)] = post.push(rec.work(written.bias))  # type: ignore[arg-type]
    if post.constant is not None:
        site = Bias(layer, part)  # type: ignore[arg-type]
        found[site] = found[site] + post.constant if site in found else post.constant
    return found


def addends(rec: Recording, grain: str = "layer", *, before: tuple[int, str] | None = None) -> list[Block]:
    """The addends of the stream at t, in forward order, as they reach what is asked for.

    Args:
        rec: a recording. grain: "layer", "head", "head_source", "neuron" or "subvalue".
        before: (layer, part) stops before what that sublayer reads; None takes all.

    Returns:
        Blocks whose vectors sum to `resid_final` (or to what that sublayer reads). In bfloat16
        and float16 a ``rounding`` block closes the sum.
    """
    choice("grain", grain, GRAINS)
    a = rec.model.anatomy
    stop = None
    if before is not None:
        stop = (before[0], "attn" if rec.model.block(before[0]).parallel else before[1])
    embed = stored("embed", None, rec.work(rec.embed)[None], [Constant("embed")])
    blocks = [multiplied(embed, rec.reach(0, "pre", stop))]
    for layer in range(a.n_layers):
        for part in ("attn", "mlp"):
            if stop == (layer, part):
                return _with_rounding(rec, blocks, read_by(rec, layer, part))
            blocks += sublayer_blocks(rec, layer, part, grain, rec.reach(layer, part, stop))
    return _with_rounding(rec, blocks, rec.work(rec.resid_final))


def read_by(rec: Recording, layer: int, part: str) -> Float[Tensor, " d_model"]:
    """The state that a sublayer reads (through its norm): resid_pre for attention, resid_mid for
    the MLP, resid_pre for both in a parallel block."""
    return rec.work(rec.layers[layer].resid_pre) if part == "attn" else rec.resid_mid(layer)


def state_of(rec: Recording, layer: int, part: str) -> Float[Tensor, " d_model"]:
    """What a sublayer's output is added to, x of the score C(v, x): the state that it reads, times
    the block's carry where it multiplies its stream."""
    state, row = read_by(rec, layer, part), rec.model.block(layer)
    carry = rec.model.factor(layer, "mlp_carry" if row.parallel else f"{part}_carry")
    return state if isinstance(carry, float) and carry == 1.0 else state * carry


def candidates(rec: Recording, kind: str, layer: int) -> list[tuple[str, Block]]:
    """(part, block) of the subvalues of one kind in one layer, as they enter the stream there.

    Nothing for a layer that has none of that kind (a state-space layer has no heads).
    """
    row = rec.model.block(layer)
    if kind == "layer":
        return [(part, one) for part in ("attn", "mlp") for one in sublayer_blocks(rec, layer, part, "layer", 1.0)]
    if kind == "neuron":
        return [("mlp", neuron_block(rec, layer))] if row.mlp_kind in ("neurons", "experts") else []
    if row.attn_kind != "attention":
        return []
    build = {"head": head_block, "head_source": head_source_block, "attn_neuron": attn_neuron_block}[kind]
    return [("attn", build(rec, layer))]


def vector_of(rec: Recording, site: Site) -> Float[Tensor, " d_model"]:
    """The vector that a site adds to the final stream at t.

    Raises:
        SiteError: the site does not exist in the model or the prompt, or is not an addend.
    """
    site = resolve_in(rec, site)
    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        return _neuron_vector(rec, site)
    if isinstance(site, Head):
        return head_block(rec, site.layer, final=True).vectors(torch.tensor([site.head]))[0]
    if isinstance(site, HeadSource):
        index = site.head * (rec.prompt.position + 1) + site.source
        return head_source_block(rec, site.layer, final=True).vectors(torch.tensor([index]))[0]
    if isinstance(site, AttnNeuron):
        return _attn_neuron_vector(rec, site)
    if isinstance(site, Sublayer):
        return rec.work(sublayer_vector(rec.layers[site.layer], site.part)) * rec.reach(site.layer, site.part)
    if isinstance(site, Bias):
        if isinstance(site.expert, int):
            need_group(rec, ExpertNeuron(site.layer, site.expert, 0), str(site))
        bias = bias_vectors(rec, site.layer, site.part).get(site)
        if bias is None:
            raise SiteError(f"`{site}` does not exist for {rec.model.name}: that sublayer has no output bias.")
        return bias * rec.reach(site.layer, site.part)
    if isinstance(site, Constant) and site.name == "embed":
        return rec.work(rec.embed) * rec.reach(0, "pre")
    if isinstance(site, Resid):
        raise SiteError(f"`{site}` is a state of the stream, not an addend; read it with rs.lens.")
    raise SiteError(f"`{site}` is a constant of the readout, not a vector in the stream; see rs.decompose.")


def _neuron_vector(rec: Recording, site: Neuron | ExpertNeuron | SharedNeuron) -> Tensor:
    expert, index = neuron_place(site)
    group = need_group(rec, site)
    row = rec.work(rec.model.group_rows(site.layer, expert).rows[index])
    return post_map(rec, site.layer, "mlp", final=True).push(row * rec.work(group.coefficient[index]) * group.factor)


def need_group(rec: Recording, site: Neuron | ExpertNeuron | SharedNeuron, what: str | None = None) -> NeuronGroup:
    """The active neurons that a site is one of; `what` is the site to name in messages.

    Raises:
        SiteError: its expert was not routed to at t.
    """
    expert, _ = neuron_place(site)
    group = rec.layers[site.layer].group(expert)
    if group is None:
        routed = [g.expert for g in rec.layers[site.layer].groups if g.expert != "shared"]
        raise SiteError(
            f"`{what or site}` is not active: layer {site.layer} of {rec.model.name} routed position "
            f"{rec.prompt.position} to experts {routed}. Pick one of them."
        )
    return group


def resolve_in(rec: Recording, site: Site) -> Site:
    """A site checked against the recording's model and prompt length."""
    site = site.resolve(rec.model.anatomy)
    source, t = getattr(site, "source", None), rec.prompt.position
    if source is not None and source > t:
        raise SiteError(
            f"`{site}` reads source position {source}, but the predicting position is {t} "
            f"({rec.n_positions} tokens): sources are 0..{t}."
        )
    return site


def _attn_neuron_vector(rec: Recording, site: AttnNeuron) -> Tensor:
    parts = joint_parts(rec, site.layer)[site.head, :, site.index]
    z = rec.work(attention_of(rec, site.layer, str(site)).z)
    size = z[site.head, site.index] if site.source is None else parts[site.source]
    d_head = rec.model.anatomy.sizes[site.layer].d_head
    row = rec.model.rows(site.layer, "attn_out").rows[site.head * d_head + site.index]
    return post_map(rec, site.layer, "attn", final=True).push(rec.work(row) * size)


def _with_rounding(rec: Recording, blocks: list[Block], total: Tensor) -> list[Block]:
    if rec.model.dtype not in (torch.bfloat16, torch.float16):
        return blocks
    rest = total - sum_of(blocks)
    return [*blocks, stored("rounding", None, rest[None], [Constant("rounding")])]

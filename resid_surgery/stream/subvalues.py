"""Subvalues: a recording's addends at any grain.

The stream at t is the sum of the addends of one grain; each grain is a list of `Block`s, and what
later blocks multiply the stream by belongs to them.
"""

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
from resid_surgery.stream.blocks import Block, multiplied, stored, sum_of
from resid_surgery.stream.kinds import (
    Where,
    attention_of,
    attn_neuron_block,
    head_block,
    head_source_block,
    joint_parts,
    neuron_block,
    neuron_place,
    post_map,
)
from resid_surgery.stream.recording import Recording
from resid_surgery.stream.records import LayerRecord, NeuronGroup

Grain = Literal["layer", "head", "head_source", "neuron", "subvalue"]
GRAINS: tuple[str, ...] = ("layer", "head", "head_source", "neuron", "subvalue")
KINDS: tuple[str, ...] = ("neuron", "head", "head_source", "attn_neuron", "attn_neuron_source", "layer")


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


def candidates(rec: Recording, kind: str, layer: int, where: Where = "here") -> list[tuple[str, Block]]:
    """(part, block) of the subvalues of one kind in one layer, as they enter the stream there (or see `kinds`).

    Nothing for a layer that has none of that kind (a state-space layer has no heads).
    """
    row = rec.model.block(layer)
    if kind == "layer":
        parts = [(part, rec.reach(layer, part) if where == "final" else 1.0) for part in ("attn", "mlp")]
        return [(part, one) for part, times in parts for one in sublayer_blocks(rec, layer, part, "layer", times)]
    if kind == "neuron":
        return [("mlp", neuron_block(rec, layer, where))] if row.mlp_kind in ("neurons", "experts") else []
    if row.attn_kind != "attention":
        return []
    if kind.startswith("attn_neuron"):
        return [("attn", attn_neuron_block(rec, layer, where, sources=kind == "attn_neuron_source"))]
    return [("attn", (head_block if kind == "head" else head_source_block)(rec, layer, where))]


def vector_of(rec: Recording, site: Site, where: Literal["here", "final"] = "final") -> Float[Tensor, " d_model"]:
    """The vector that a site adds to the final stream at t, or to the stream where it is written ("here").

    Raises:
        SiteError: the site does not exist in the model or the prompt, or is not an addend.
    """
    site = resolve_in(rec, site)

    def times(layer: int, part: str) -> Tensor | float:
        return rec.reach(layer, part) if where == "final" else 1.0

    if isinstance(site, (Neuron, ExpertNeuron, SharedNeuron)):
        return _neuron_vector(rec, site, where)
    if isinstance(site, Head):
        return head_block(rec, site.layer, where).vectors(torch.tensor([site.head]))[0]
    if isinstance(site, HeadSource):
        index = site.head * (rec.prompt.position + 1) + site.source
        return head_source_block(rec, site.layer, where).vectors(torch.tensor([index]))[0]
    if isinstance(site, AttnNeuron):
        return _attn_neuron_vector(rec, site, where)
    if isinstance(site, Sublayer):
        return rec.work(sublayer_vector(rec.layers[site.layer], site.part)) * times(site.layer, site.part)
    if isinstance(site, Bias):
        if isinstance(site.expert, int):
            need_group(rec, ExpertNeuron(site.layer, site.expert, 0), str(site))
        bias = bias_vectors(rec, site.layer, site.part).get(site)
        if bias is None:
            raise SiteError(f"`{site}` does not exist for {rec.model.name}: that sublayer has no output bias.")
        return bias * times(site.layer, site.part)
    if isinstance(site, Constant) and site.name == "embed":
        return rec.work(rec.embed) * times(0, "pre")
    if isinstance(site, Resid):
        raise SiteError(f"`{site}` is a state of the stream, not an addend; read it with rs.lens.")
    raise SiteError(f"`{site}` is a constant of the readout, not a vector in the stream; see rs.decompose.")


def _neuron_vector(rec: Recording, site: Neuron | ExpertNeuron | SharedNeuron, where: Where) -> Tensor:
    expert, index = neuron_place(site)
    group = need_group(rec, site)
    row = rec.work(rec.model.group_rows(site.layer, expert).rows[index])
    return post_map(rec, site.layer, "mlp", where).push(row * rec.work(group.coefficient[index]) * group.factor)


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


def _attn_neuron_vector(rec: Recording, site: AttnNeuron, where: Where) -> Tensor:
    parts = joint_parts(rec, site.layer)[site.head, :, site.index]
    z = rec.work(attention_of(rec, site.layer, str(site)).z)
    size = z[site.head, site.index] if site.source is None else parts[site.source]
    d_head = rec.model.anatomy.sizes[site.layer].d_head
    row = rec.model.rows(site.layer, "attn_out").rows[site.head * d_head + site.index]
    return post_map(rec, site.layer, "attn", where).push(rec.work(row) * size)


def _with_rounding(rec: Recording, blocks: list[Block], total: Tensor) -> list[Block]:
    if rec.model.dtype not in (torch.bfloat16, torch.float16):
        return blocks
    rest = total - sum_of(blocks)
    return [*blocks, stored("rounding", None, rest[None], [Constant("rounding")])]

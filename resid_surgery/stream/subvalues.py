"""Subvalues: a recording's addends at any grain, never materialised until asked.

The stream at t is the sum of the addends of one grain. Each grain is a list of `Block`s: runs of
addends of one layer and kind that know how to project themselves on directions (one matrix
product), to give their vectors for chosen members, and to name their sites. Everything downstream
(ledgers, scores, bounds, sources) is built from `Block.project` and `Block.vectors`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resid_surgery._check import choice
from resid_surgery.errors import SiteError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import LinearMap, Norm
from resid_surgery.sites import AttnNeuron, Bias, Constant, Head, HeadSource, Neuron, Resid, Site, Sublayer
from resid_surgery.stream.recording import LayerRecord, Recording, repeat_kv

Grain = Literal["layer", "head", "head_source", "neuron", "subvalue"]
Kind = Literal["neuron", "head", "head_source", "attn_neuron", "layer"]
GRAINS: tuple[str, ...] = ("layer", "head", "head_source", "neuron", "subvalue")
KINDS: tuple[str, ...] = ("neuron", "head", "head_source", "attn_neuron", "layer")


@final
@dataclass(frozen=True, eq=False)
class PostMap:
    """What stands between a sublayer's output and the stream, frozen: v -> gain * centre(v) / s.

    The identity (norm None) where the family has no post-norm.
    """

    norm: Norm | None = None
    s: Tensor | None = None

    @classmethod
    def of(cls, model: OpenedModel, layer: int, part: str, raw: Tensor) -> "PostMap":
        """The post-norm of a sublayer, frozen at what it read in this run."""
        if not model.has(f"{part}_post_norm"):
            return cls()
        norm = model.norm(layer, f"{part}_post_norm")
        return cls(norm, norm.scale(raw))

    def push(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """A vector in the sublayer's output, as it reaches the stream."""
        if self.norm is None or self.s is None:
            return v
        return self.norm.linear(v, self.s)

    def unscaled(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """`push` times s: the part that depends on no recording."""
        return v if self.norm is None else self.norm.centre(v) * self.norm.gain

    def pull(self, g: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """The transpose of `push`."""
        if self.norm is None or self.s is None:
            return g
        return self.norm.pull(g, self.s)

    @property
    def constant(self) -> Tensor | None:
        """The post-norm's own bias, an addend of its own."""
        return None if self.norm is None or not bool(self.norm.bias.any()) else self.norm.bias


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A run of addends v_i = push(sum_a parts[i, a] rows[row_of(i), a]) of one layer and kind.

    Attributes:
        kind: "embed", "attn", "mlp", "neuron", "head", "head_source", "attn_neuron", "bias",
            "constant" or "rounding". layer: or None.
        count: how many addends.
        project: (m, d_model) directions -> (m, count) dot products with every addend.
        vectors: (n,) member indices -> (n, d_model) their vectors.
        site: member index -> its site.
        squares: a linear map f (see `Square`) -> (count,) squared length of f(v).
        zero: (count,) True where the addend is exactly zero, if cheap to know.
    """

    kind: str
    layer: int | None
    count: int
    project: Callable[[Float[Tensor, "m d_model"]], Float[Tensor, "m count"]]
    vectors: Callable[[Int[Tensor, " n"]], Float[Tensor, "n d_model"]]
    site: Callable[[int], Site]
    squares: Callable[["Square"], Float[Tensor, " count"]]
    zero: Tensor | None = None

    def all_vectors(self) -> Float[Tensor, "count d_model"]:
        """Every member's vector; meant for small blocks."""
        return self.vectors(torch.arange(self.count))


@final
@dataclass(frozen=True, eq=False)
class Square:
    """The linear map f(v) = gain * centre(v) (gain 1 if not `gained`) of a norm, whose squared
    lengths bounds need. Those of weight rows depend on no recording and are kept per model."""

    norm: Norm
    gained: bool

    def apply(self, v: Tensor) -> Tensor:
        """f(v)."""
        centred = self.norm.centre(v)
        return centred * self.norm.gain if self.gained else centred

    def of_rows(self, rec: Recording, layer: int, part: str, post: "PostMap") -> Tensor:
        """(row,) squared lengths of f(push(row)) for the rows of W_O or the down-projection."""
        key = (rec.fingerprint, layer, part, self.gained)
        kept = rec.model.cache.setdefault("row_squares", {})
        if key not in kept:
            for old in [k for k in kept if k[0] != rec.fingerprint]:
                kept.pop(old, None)
            kept[key] = self.apply(post.unscaled(rec.work(rec.model.rows(layer, part).rows))).square().sum(-1)
        return kept[key] if post.s is None else kept[key] / post.s.square()  # type: ignore[no-any-return]


@final
class Numbering:
    """The members of several blocks under one numbering, in block order."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.first = torch.tensor([0, *(block.count for block in blocks)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.first[-1])

    def home(self, numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Which block each number belongs to."""
        return torch.searchsorted(self.first, numbers, right=True) - 1

    def place(self, number: int) -> tuple[int, int]:
        """(block, member) of a number."""
        b = int(self.home(torch.tensor([number])))
        return b, number - int(self.first[b])

    def site(self, number: int) -> Site:
        """The site of a number."""
        b, member = self.place(number)
        return self.blocks[b].site(member)

    def vectors(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Their vectors, in the order given; one look-up a block."""
        home = self.home(numbers)
        parts, order = [], []
        for b in sorted(set(home.tolist())):
            mine = torch.nonzero(home == b)[:, 0]
            parts.append(self.blocks[b].vectors(numbers[mine] - self.first[b]))
            order.append(mine)
        found = torch.cat(parts)
        return found[torch.argsort(torch.cat(order)).to(found.device)]


def stored(kind: str, layer: int | None, vectors: Tensor, sites: Sequence[Site]) -> Block:
    """A block of given vectors (count, d_model)."""
    return Block(
        kind,
        layer,
        len(sites),
        project=lambda g: g @ vectors.T,
        vectors=lambda i: vectors[i.to(vectors.device)],
        site=lambda i: sites[i],
        squares=lambda f: f.apply(vectors).square().sum(-1),
    )


def neuron_block(rec: Recording, layer: int) -> Block:
    """The neurons of a layer: v_k = push(coefficient_k w_out_k) (paper: FFN subvalues)."""
    record = rec.layers[layer]
    coefficient, post = rec.work(record.coefficient), post_map(rec, layer, "mlp")
    rows = rec.model.rows(layer, "mlp_out").rows
    return Block(
        "neuron",
        layer,
        rows.shape[0],
        lambda g: (post.pull(g) @ rec.work(rows).T) * coefficient,
        lambda i: post.push(rec.work(rows[i.to(rows.device)]) * coefficient[i.to(coefficient.device), None]),
        lambda i: Neuron(layer, i),
        lambda f: f.of_rows(rec, layer, "mlp_out", post) * coefficient.square(),
        zero=coefficient == 0,
    )


def attn_neuron_block(rec: Recording, layer: int) -> Block:
    """The attention neurons of a layer: v = push(z[h,d] W_O row) (paper: attention neurons)."""
    z, post = rec.work(rec.layers[layer].z).reshape(-1), post_map(rec, layer, "attn")
    rows, d_head = rec.model.rows(layer, "attn_out").rows, rec.model.anatomy.d_head
    return Block(
        "attn_neuron",
        layer,
        rows.shape[0],
        lambda g: (post.pull(g) @ rec.work(rows).T) * z,
        lambda i: post.push(rec.work(rows[i.to(rows.device)]) * z[i.to(z.device), None]),
        lambda i: AttnNeuron(layer, i // d_head, i % d_head),
        lambda f: f.of_rows(rec, layer, "attn_out", post) * z.square(),
        zero=z == 0,
    )


def head_block(rec: Recording, layer: int) -> Block:
    """The heads of a layer: v_h = push(z_h W_O[h])."""
    parts = rec.work(rec.layers[layer].z)[:, None]
    return _through_w_o(rec, layer, "head", parts, lambda i: Head(layer, i))


def head_source_block(rec: Recording, layer: int) -> Block:
    """The joint vectors v_{h,j} = push(alpha[h,j] v[h,j] W_O[h]) (paper: attention subvalues)."""
    parts = joint_parts(rec, layer)
    n_sources = parts.shape[1]
    return _through_w_o(rec, layer, "head_source", parts, lambda i: HeadSource(layer, i // n_sources, i % n_sources))


def joint_parts(rec: Recording, layer: int) -> Float[Tensor, "head source d_head"]:
    """alpha[h,j] v[h,j] of the sources up to t, before W_O; they sum to the head's z."""
    record = rec.layers[layer]
    seen = rec.prompt.position + 1
    alpha, value = rec.work(record.alpha), repeat_kv(rec.work(record.value), record.alpha.shape[0])
    return alpha[:, :seen, None] * value[:, :seen]


def _through_w_o(rec: Recording, layer: int, kind: str, parts: Tensor, site: Callable[[int], Site]) -> Block:
    """Blocks of vectors parts[h, j] W_O[h]; nothing of size d_model is held for them."""
    post = post_map(rec, layer, "attn")
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


def post_map(rec: Recording, layer: int, part: str) -> PostMap:
    """The frozen map from a sublayer's output to the stream."""
    record = rec.layers[layer]
    return PostMap.of(rec.model, layer, part, rec.work(record.attn_raw if part == "attn" else record.mlp_raw))


def sublayer_vector(record: LayerRecord, part: str) -> Tensor:
    """What a sublayer adds."""
    return record.attn_out if part == "attn" else record.mlp_out


def sublayer_blocks(rec: Recording, layer: int, part: str, grain: str) -> list[Block]:
    """The addends of one sublayer at a grain: whole, or its parts and its bias."""
    finer = {
        "attn": {"head": head_block, "head_source": head_source_block, "subvalue": head_source_block},
        "mlp": {"neuron": neuron_block, "subvalue": neuron_block},
    }[part]
    if grain not in finer:
        site = Sublayer(layer, part)  # type: ignore[arg-type]
        return [stored(part, layer, rec.work(sublayer_vector(rec.layers[layer], part))[None], [site])]
    blocks = [finer[grain](rec, layer)]
    bias = bias_vector(rec, layer, part)
    if bias is not None:
        blocks.append(stored("bias", layer, bias[None], [Bias(layer, part)]))  # type: ignore[arg-type]
    return blocks


def bias_vector(rec: Recording, layer: int, part: str) -> Tensor | None:
    """A sublayer's output bias as it reaches the stream, a post-norm's own bias included."""
    written: LinearMap = rec.model.rows(layer, f"{part}_out")
    post = post_map(rec, layer, part)
    terms = [] if written.bias is None else [post.push(rec.work(written.bias))]
    if post.constant is not None:
        terms.append(post.constant)
    return sum(terms[1:], terms[0]) if terms else None


def addends(rec: Recording, grain: str = "layer", *, before: tuple[int, str] | None = None) -> list[Block]:
    """The addends of the stream at t, in forward order.

    Args:
        rec: a recording. grain: "layer", "head", "head_source", "neuron" or "subvalue".
        before: (layer, part) stops before what that sublayer reads; None takes all.

    Returns:
        Blocks whose vectors sum to `resid_final` (or to what that sublayer reads). In bfloat16
        and float16 a ``rounding`` block closes the sum.
    """
    choice("grain", grain, GRAINS)
    a = rec.model.anatomy
    blocks = [stored("embed", None, rec.work(rec.embed)[None], [Constant("embed")])]
    for layer in range(a.n_layers):
        for part in ("attn", "mlp"):
            if before is not None and (layer, part) == (before[0], "attn" if a.parallel else before[1]):
                return _with_rounding(rec, blocks, state_of(rec, layer, part))
            blocks += sublayer_blocks(rec, layer, part, grain)
    return _with_rounding(rec, blocks, rec.work(rec.resid_final))


def state_of(rec: Recording, layer: int, part: str) -> Float[Tensor, " d_model"]:
    """What a sublayer is added to in the score C(v, x): resid_pre for attention, resid_mid for
    the MLP (resid_pre for both in a parallel block)."""
    return rec.work(rec.layers[layer].resid_pre) if part == "attn" else rec.resid_mid(layer)


def candidates(rec: Recording, kind: str, layer: int) -> list[tuple[str, Block]]:
    """(part, block) of the subvalues of one kind in one layer."""
    if kind == "layer":
        return [(part, sublayer_blocks(rec, layer, part, "layer")[0]) for part in ("attn", "mlp")]
    if kind == "neuron":
        return [("mlp", neuron_block(rec, layer))]
    build = {"head": head_block, "head_source": head_source_block, "attn_neuron": attn_neuron_block}[kind]
    return [("attn", build(rec, layer))]


def vector_of(rec: Recording, site: Site) -> Float[Tensor, " d_model"]:
    """The vector that a site adds to the stream at t.

    Raises:
        SiteError: the site does not exist in the model or the prompt, or is not an addend.
    """
    site = resolve_in(rec, site)
    if isinstance(site, Neuron):
        return neuron_block(rec, site.layer).vectors(torch.tensor([site.index]))[0]
    if isinstance(site, Head):
        return head_block(rec, site.layer).vectors(torch.tensor([site.head]))[0]
    if isinstance(site, HeadSource):
        parts = joint_parts(rec, site.layer)
        index = site.head * parts.shape[1] + site.source
        return head_source_block(rec, site.layer).vectors(torch.tensor([index]))[0]
    if isinstance(site, AttnNeuron):
        return _attn_neuron_vector(rec, site)
    if isinstance(site, Sublayer):
        return rec.work(sublayer_vector(rec.layers[site.layer], site.part))
    if isinstance(site, Bias):
        bias = bias_vector(rec, site.layer, site.part)
        if bias is None:
            raise SiteError(f"`{site}` does not exist for {rec.model.name}: that sublayer has no output bias.")
        return bias
    if isinstance(site, Constant) and site.name == "embed":
        return rec.work(rec.embed)
    if isinstance(site, Resid):
        raise SiteError(f"`{site}` is a state of the stream, not an addend; read it with rs.lens.")
    raise SiteError(f"`{site}` is a constant of the readout, not a vector in the stream; see rs.decompose.")


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
    size = rec.work(rec.layers[site.layer].z)[site.head, site.index] if site.source is None else parts[site.source]
    row = rec.model.rows(site.layer, "attn_out").rows[site.head * rec.model.anatomy.d_head + site.index]
    return post_map(rec, site.layer, "attn").push(rec.work(row) * size)


def _with_rounding(rec: Recording, blocks: list[Block], total: Tensor) -> list[Block]:
    if rec.model.dtype not in (torch.bfloat16, torch.float16):
        return blocks
    rest = total - sum_of(blocks)
    return [*blocks, stored("rounding", None, rest[None], [Constant("rounding")])]


def sum_of(blocks: Sequence[Block]) -> Float[Tensor, " d_model"]:
    """The sum of all vectors of some blocks."""
    out = blocks[0].all_vectors().sum(0)
    for block in blocks[1:]:
        out = out + block.all_vectors().sum(0)
    return out

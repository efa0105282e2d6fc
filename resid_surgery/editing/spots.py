"""Spots: the places at which an edit acts, and how exposed each token is to it there.

At an output projection, with k its input and h the stream behind the sublayer (in the base), |dW k + db| / |h|; at a
projection of what is read, |dW x + db| / |W x + b|; at rows of the embedding or unembedding, 1 at their own tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor

from resid_surgery.editing.acting import acted, matrices
from resid_surgery.editing.changes import Change
from resid_surgery.editing.roles import Role
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.parts import linear_map
from resid_surgery.models.taps import Tap, TapName
from resid_surgery.models.tracing import mixing

Reads = Mapping[Tap, Any]
Part = tuple[Role, Change]


class Spot(Protocol):
    """A place at which an edit acts: which taps it needs, and how exposed each position is."""

    @property
    def name(self) -> str: ...
    @property
    def taps(self) -> tuple[Tap, ...]: ...
    def measure(self, model: OpenedModel, reads: Reads, ids: Tensor) -> Float[Tensor, "row position"]: ...


@final
@dataclass(frozen=True, eq=False)
class Writes:
    """Output projections of one sublayer: the norm of what is written otherwise, relative to the stream."""

    layer: int
    sublayer: str
    parts: tuple[Part, ...]
    mixture: bool
    split: bool

    @property
    def name(self) -> str:
        return f"L{self.layer}.{self.sublayer} / stream"

    @property
    def taps(self) -> tuple[Tap, ...]:
        groups = {role.group for role, _ in self.parts}
        inputs = [Tap("attn_z", self.layer)] if self.sublayer == "attn" else []
        if self.sublayer == "mlp":
            inputs += [Tap("coef", self.layer)] if None in groups else []
            inputs += [Tap("shared_coef", self.layer)] if "shared" in groups else []
            inputs += [Tap("experts_call", self.layer)] if "experts" in groups else []
            inputs += [Tap("mlp_read", self.layer)] if self.mixture else []
        state = [Tap("block_in", self.layer), Tap("attn_add", self.layer)] if self.split else []
        return (*inputs, *(state or [Tap("block_out", self.layer)]))

    def measure(self, model: OpenedModel, reads: Reads, ids: Tensor) -> Float[Tensor, "row position"]:
        moved = self.moved(model, reads).reshape(*ids.shape, -1)
        return _ratio(moved.norm(dim=-1), self.state(model, reads).norm(dim=-1))

    def state(self, model: OpenedModel, reads: Reads) -> Float[Tensor, "row position d_model"]:
        """The stream behind the sublayer: resid_mid for attention where there is one, else resid_post."""
        if not self.split:
            return model.work(reads[Tap("block_out", self.layer)])
        carry, scale = model.factor(self.layer, "attn_carry"), model.factor(self.layer, "attn_scale")
        before, added = (model.work(reads[tap]) for tap in (Tap("block_in", self.layer), Tap("attn_add", self.layer)))
        return carry * before + scale * added

    def moved(self, model: OpenedModel, reads: Reads) -> Float[Tensor, "n d_model"]:
        """What the sublayer's output changes by, before a post-norm."""
        routed: Tensor | float = 1.0
        shared: Tensor | float = 1.0
        if self.mixture:
            read = reads[Tap("mlp_read", self.layer)].flatten(0, 1)
            routed, shared = (
                model.work(torch.tensor(f, dtype=torch.float64))[:, None] for f in mixing(model, self.layer, read)
            )
        total: Tensor | float = 0.0
        for role, change in self.parts:
            if role.group == "experts":
                total = total + routed * _routed_write(model, role, change, reads[Tap("experts_call", self.layer)])
                continue
            factor = shared if role.group == "shared" else 1.0
            total = total + factor * _plain_write(model, role, change, reads)
        assert isinstance(total, Tensor)
        return total


def _plain_write(model: OpenedModel, role: Role, change: Change, reads: Reads) -> Float[Tensor, "n d_model"]:
    assert role.layer is not None
    name: TapName = "attn_z" if role.sublayer == "attn" else "coef" if role.group is None else "shared_coef"
    return _through(model, role, change, model.work(reads[Tap(name, role.layer)].flatten(0, 1)))


def _through(model: OpenedModel, role: Role, change: Change, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
    """What a change of a projection's weight or bias adds to its output."""
    if role.input_axis is None:
        return model.work(change.dense()).expand(len(x), -1)
    return acted(change, role.input_axis - role.lead, x)


def _routed_write(model: OpenedModel, role: Role, change: Change, call: Any) -> Float[Tensor, "n d_model"]:
    """Experts: only the tokens that are routed to a changed one have it."""
    assert role.layer is not None
    experts, states = model.experts(role.layer), model.work(call.states.flatten(0, 1))
    out = torch.zeros_like(states)
    for (e,), one in matrices(change, 1):
        for token, slot in _routed(call, e):
            x = states[token]
            if role.input_axis is not None:
                x = model.work(experts.coefficient(experts.pre_activations(x.to(call.states.dtype), e)))
            weight = model.work(call.weight.flatten(0, 1)[token, slot])[:, None]
            out[token] += weight * _through(model, role, one, x)
    return out


def _routed(call: Any, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, slots) at which an expert is called; nothing where it is not."""
    token, slot = torch.nonzero(call.index.flatten(0, 1) == expert, as_tuple=True)
    if len(token):
        yield token, slot


@final
@dataclass(frozen=True, eq=False)
class ReadsIn:
    """A projection of what is read: the change of its output relative to the output itself."""

    module: str
    tap: Tap
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return f"{self.module} / pre-activation"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (self.tap,)

    def measure(self, model: OpenedModel, reads: Reads, ids: Tensor) -> Float[Tensor, "row position"]:
        x = model.work(reads[self.tap].flatten(0, 1))
        now = linear_map(model.module.get_submodule(self.module), self.module)
        made = x @ model.work(now.rows) + (0.0 if now.bias is None else model.work(now.bias))
        moved = torch.stack([_through(model, role, change, x) for role, change in self.parts]).sum(0)
        return _ratio(moved.norm(dim=-1), made.norm(dim=-1)).reshape(ids.shape)


@final
@dataclass(frozen=True, eq=False)
class RoutedKeys:
    """Keys of experts: the change of all routed experts' pre-activations relative to these, laid end to end."""

    layer: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return f"L{self.layer}.experts / pre-activation"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap("experts_call", self.layer),)

    def measure(self, model: OpenedModel, reads: Reads, ids: Tensor) -> Float[Tensor, "row position"]:
        call = reads[Tap("experts_call", self.layer)]
        states, experts = model.work(call.states.flatten(0, 1)), model.experts(self.layer)
        moved, made = states.new_zeros(len(states)), states.new_zeros(len(states))
        changed = self._by_expert()
        for e in range(experts.count):
            for token, _ in _routed(call, e):
                x = states[token]
                made[token] += torch.cat(experts.pre_activations(x, e), -1).square().sum(-1)
                ways = [_through(model, role, one, x) for role, one in changed.get(e, ())]
                moved[token] += torch.stack(ways).sum(0).square().sum(-1) if ways else 0.0
        return _ratio(moved.sqrt(), made.sqrt()).reshape(ids.shape)

    def _by_expert(self) -> dict[int, list[Part]]:
        found: dict[int, list[Part]] = {}
        for role, change in self.parts:
            for (e,), one in matrices(change, 1):
                found.setdefault(e, []).append((role, one))
        return found


@final
@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of the embedding (a changed token is read) or the unembedding (it follows)."""

    kind: str
    rows: Tensor
    taps: tuple[Tap, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} / token"

    def measure(self, model: OpenedModel, reads: Reads, ids: Tensor) -> Float[Tensor, "row position"]:
        hit = self.rows.to(ids.device)[ids].double()
        if self.kind == "embed":
            return hit
        return torch.cat([hit[:, 1:], torch.zeros_like(hit[:, :1])], 1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where both are 0."""
    return torch.where(a == 0, torch.zeros_like(a), a / b)

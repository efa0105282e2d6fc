"""Reading MLPs: which projections are keys, which is the down-projection, what the activation is.

An MLP is accepted when its coefficients (the down-projection's input) are reproduced from what its
keys write: act(gate) * up or act(up), or a norm of that; a mixture of experts when its output is
reproduced from what its experts' tensors make of what they read. Anything else is no MLP.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from resid_surgery.errors import out_of_memory
from resid_surgery.models.calls import Call, close, flatten, norm_before, same
from resid_surgery.models.experts import experts_of
from resid_surgery.models.modes import GradKept


@final
@dataclass(frozen=True, eq=False)
class Neurons:
    """A dense MLP: paths from the top.

    Attributes:
        keys: projections, gate first, ``[0]``/``[1]`` for halves. activation: path of a callable.
        coef_norm: path of a norm before the down-projection, or None. down: its call.
        read: what the keys read.
    """

    keys: tuple[str, ...]
    activation: str
    coef_norm: str | None
    down: Call
    read: Tensor


@final
@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP as it was found.

    Attributes:
        unit: path of its module from the top (the block's own where it has none). down: the call whose
            output is written. read: what it reads. norm: the call that made what it reads, or None.
        neurons: of a dense MLP, or of the shared expert. experts: path of the experts, or None.
        shared_first: the shared expert is computed before the routed ones. other: path of a module
            beside the unit whose output is added to its.
    """

    unit: str
    down: Call
    read: Tensor
    norm: Call | None
    neurons: Neurons | None
    experts: str | None = None
    shared_first: bool = False
    other: str | None = None

    @property
    def state(self) -> Tensor:
        """The state of the stream that it reads, before its norm."""
        return self.read if self.norm is None or self.norm.x is None else self.norm.x

    def fields(self, rel: Callable[[str], str]) -> dict[str, Any]:
        """As fields of a `BlockLayout`."""
        norm = None if self.norm is None else rel(self.norm.path)
        one = self.neurons
        if self.experts is None:
            assert one is not None
            return {"mlp_kind": "neurons", "mlp": rel(self.unit), "mlp_out": rel(one.down.path), "mlp_norm": norm,
                    "keys": tuple(rel(k) for k in one.keys), "activation": _rel(one.activation, rel),
                    "coef_norm": None if one.coef_norm is None else rel(one.coef_norm)}  # fmt: skip
        fields: dict[str, Any] = {"mlp_kind": "experts", "mlp": rel(self.unit), "experts": rel(self.experts),
                                  "mlp_norm": norm}  # fmt: skip
        if one is not None:
            fields |= {"shared_keys": tuple(rel(k) for k in one.keys), "shared_activation": _rel(one.activation, rel),
                       "shared_out": rel(one.down.path), "shared_first": self.shared_first,
                       "mlp_with": None if self.other is None else rel(self.other)}  # fmt: skip
        return fields


def _rel(activation: str, rel: Callable[[str], str]) -> str:
    """A path inside the block; a function of torch (":silu") stays as it is."""
    return activation if activation.startswith(":") else rel(activation)


def read_mlp(
    unit: Call | None, inside: Sequence[Call], block: Call, tolerance: float, loose: Sequence[Call] = ()
) -> Mlp | str:
    """The MLP that a module (or, for loose projections, the block itself) is, or why it is none."""
    within = list(loose) if unit is None else [c for c in inside if c.path.startswith(unit.path + ".")]
    home = block if unit is None else unit
    routed = [c for c in within if experts_of(c.module) is not None]
    if routed:
        return _mixture(home, routed[0], within, inside, tolerance)
    if any(isinstance(p, nn.Parameter) and p.ndim == 3 for c in within for p in c.module.parameters(recurse=False)):
        return "its experts are stored or called in a way that is not known"
    assert block.x is not None
    found = read_neurons(home, within, inside, block.x.shape[-1], tolerance)
    if isinstance(found, str):
        return found
    return Mlp(home.path, found.down, found.read, norm_before(inside, found.read, found.down.start), found)


def read_neurons(home: Call, within: Sequence[Call], inside: Sequence[Call], d: int, tolerance: float) -> Neurons | str:
    """The dense MLP among some calls: keys, activation and down-projection that reproduce its coefficients."""
    linear = {c: c.y.shape[-1] for c in within if c.linear and c.x is not None and c.y is not None}
    downs = [c for c, width in linear.items() if width == d]
    if not downs:
        return "no projection in it writes vectors of the stream's size"
    down = max(downs, key=lambda c: c.start)
    coefficient = down.x
    assert coefficient is not None
    m = coefficient.shape[-1]
    keys = [c for c, width in linear.items() if c.end < down.start and width in (m, 2 * m)]
    if not keys:
        return "no projection before its down-projection is as wide as its coefficients"
    keys = [c for c in keys if same(c.x, keys[0].x)]
    parts = {path: value for c in keys for path, value in _halves(c, m)}
    norms = [c for c in inside if c.norm and same(c.y, coefficient) and c.end < down.start]
    for activation, act in activations(home, within):
        for names, product in _products(parts, act):
            for norm in [None, *norms]:
                wanted = coefficient if norm is None else norm.x
                if wanted is not None and wanted.shape == product.shape and close(product, wanted, tolerance):
                    read = keys[0].x
                    assert read is not None
                    return Neurons(names, activation, None if norm is None else norm.path, down, read)
    return "its coefficients are not act(gate) * up or act(up) of any activation that it holds"


def activations(home: Call, within: Sequence[Call]) -> Iterator[tuple[str, Any]]:
    """(path from the top, callable) of everything that may be the activation."""
    seen: set[str] = set()
    for call in within:
        passing = isinstance(call.module, (nn.Dropout, nn.Identity))
        if call.leaf and not (call.linear or call.norm or passing) and call.path not in seen:
            seen.add(call.path)
            yield call.path, call.module
    yield from ((f":{name}", getattr(nn.functional, name)) for name in ("silu", "gelu", "relu"))
    owners = {home.path: home.module} | {c.path: c.module for c in within if not c.leaf}
    for path, owner in owners.items():
        named = vars(owner) | dict(owner.named_children())
        for name, value in named.items():
            if "act" in name and callable(value) and not isinstance(value, type) and f"{path}.{name}" not in seen:
                seen.add(f"{path}.{name}")
                yield f"{path}.{name}", value


def _halves(call: Call, m: int) -> list[tuple[str, Tensor]]:
    assert call.y is not None
    if call.y.shape[-1] == m:
        return [(call.path, call.y)]
    return [(f"{call.path}[0]", call.y[:, :m]), (f"{call.path}[1]", call.y[:, m:])]


def _products(parts: dict[str, Tensor], act: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Key names and the coefficients that they would make."""
    for gate, value in parts.items():
        try:
            with GradKept(), torch.no_grad():
                on = act(value)
        except (TypeError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            return  # it takes something else: not this MLP's activation
        if not isinstance(on, Tensor) or on.shape != value.shape:
            return
        if len(parts) == 1:
            yield (gate,), on
        for up, other in parts.items():
            if up != gate:
                yield (gate, up), on * other


def _mixture(unit: Call, routed: Call, within: Sequence[Call], inside: Sequence[Call], tolerance: float) -> Mlp | str:
    """A mixture of experts: routed experts, perhaps with a shared one, each scaled by one number a token."""
    experts = experts_of(routed.module)
    call = _routing(routed)
    assert experts is not None
    if call is None or unit.y is None or unit.x is None:
        return "its experts are not called with (states, indices, weights)"
    hidden, index, weight = call
    with GradKept(), torch.no_grad():
        made = experts.output(hidden, index, weight)
    if routed.y is None or not close(made, routed.y, 10 * tolerance):
        return "its experts do not compute activation(gate, up) through their own tensors"
    if not same(flatten(hidden), unit.x):
        return "its experts do not read what the MLP reads"
    rest = [c for c in within if c.path != routed.path and not c.path.startswith(routed.path + ".")]
    shared = read_neurons(unit, rest, inside, unit.y.shape[-1], tolerance)
    neurons = shared if isinstance(shared, Neurons) else None
    terms = [routed.y] + ([] if neurons is None or neurons.down.y is None else [neurons.down.y])
    if not mixes(unit.y, terms, 10 * tolerance):
        return "its output is not its routed experts plus a multiple of one shared expert"
    first = neurons is not None and neurons.down.end < routed.start
    return Mlp(unit.path, unit, unit.x, norm_before(inside, unit.x, unit.start), neurons, routed.path, first)


def beside(mlps: list[Mlp]) -> list[Mlp]:
    """A mixture and a dense MLP that read the same and are added are one MLP with a shared expert."""
    if len(mlps) != 2 or not same(mlps[0].read, mlps[1].read):
        return mlps
    routed, dense = mlps
    if routed.experts is None or routed.neurons is not None or dense.experts is not None:
        return mlps
    assert routed.down.y is not None
    assert dense.down.y is not None
    both = replace(routed.down, y=routed.down.y + dense.down.y, end=dense.down.end)
    return [replace(routed, down=both, neurons=dense.neurons, other=dense.unit)]


def mixes(total: Tensor, terms: Sequence[Tensor], tolerance: float) -> bool:
    """Whether every token's total is a weighted sum of its terms (numbers that may differ by token)."""
    a = torch.stack([t.double().cpu() for t in terms], -1)
    c = torch.linalg.lstsq(a, total.double().cpu()[..., None], driver="gelsd").solution
    return close((a @ c)[..., 0], total.cpu(), tolerance, a)


def _routing(call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    """(states, indices, weights) that the experts were called with."""
    args, kwargs = call.args
    values = [*args, *kwargs.values()]
    if len(values) != 3 or not all(isinstance(v, Tensor) for v in values):
        return None
    hidden, index, weight = values
    return (hidden, index, weight) if not index.is_floating_point() and index.shape == weight.shape else None

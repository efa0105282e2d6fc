"""Wiring: reading a `Layout` off one forward, by what flows where.

No names are needed: W_O is the last projection inside the module that computes attention, the
norm after it is whoever reads its output, the norm before the MLP is whoever's output the MLP
reads, and the weights with which writers enter the stream are solved for. What is read here is a
proposal; `resid_surgery.load` proves it or refuses the model.
"""

import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resid_surgery.errors import UnsupportedModelError
from resid_surgery.models.calls import Call, misfit, norm_before, same, watch
from resid_surgery.models.ends import UnreadableError, UnrecognisedError, find_chain, read_head, solve, weighted_sum
from resid_surgery.models.layout import BlockLayout, Factor, Layout
from resid_surgery.models.mlps import Mlp, beside, read_mlp

# Attention that does not go through transformers' attention interface: where its weights meet its values.
ATTENTION_OPERATIONS: dict[str, str] = {
    "BloomAttention": "product:torch_bmm_0",
    "CodeGenAttention": "weights:self__attn_0",
    "DiffLlamaAttention": "differential:groupnorm",
    "FalconAttention": "sdpa:torch_nn_functional_scaled_dot_product_attention_0",
    "FalconAttention eager": "named:F_softmax_0,value_layer_0",
    "FalconAttention alibi": "sdpa:torch_nn_functional_scaled_dot_product_attention_1",
    "FalconAttention eager alibi": "named:F_softmax_1,value_layer_0",
    "GPTJAttention": "weights:self__attn_0",
    "GPTNeoSelfAttention": "weights:self__attn_0",
    "GPTNeoXJapaneseAttention": "weights:self__attn_0",
    "MptAttention": "product:torch_matmul_1",
    "XGLMAttention": "product:torch_bmm_1",
}
_CALLS_INTERFACE: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.004}
_MIXES = re.compile(r"mamba|delta|linearattention|lightning|conv|recurrent|ssm|attention|mixer|lstm|rwkv|kda|lru", re.I)
_NO_MIXES = re.compile(r"(mlp|moe|moeblock|feedforward)$", re.I)


def read_layout(module: nn.Module, name: str, ids: Tensor) -> Layout:
    """The layout of a causal language model, read off one forward of a few tokens.

    Args:
        module: a shadow, in evaluation mode. name: for messages. ids: (1, position).

    Raises:
        UnsupportedModelError: its stream is no sum of its blocks' writers, and why.
    """
    calls = watch(module, ids)
    config: Any = getattr(module, "config", None)
    try:
        path, chain = find_chain(module, calls, ids.shape[1])
        assert chain[0].x is not None
        width = TOLERANCE[chain[0].x.dtype]
        found = [_Block(block, calls, config, width) for block in chain]
        # a layer in which a writer wrote nothing but zeros is read like another one of its kind
        loud = {one.kind: one for one in reversed(found) if not one.silent}
        rows = []
        for layer, one in enumerate(found):
            try:
                rows.append(loud.get(one.kind, one).read() if one.silent else one.read())
            except UnreadableError as why:
                if why.vague:  # what the head says, or that nothing attends, is plainer
                    read_head(calls, chain[-1], config, width)
                    _require_attention(module.get_submodule(path))
                raise UnreadableError(f"in layer {layer}, {why}") from None
        _require_attention(module.get_submodule(path))
        norm, unembed, before, after, cap = read_head(calls, chain[-1], config, width)
    except UnreadableError as why:
        raise UnsupportedModelError(
            f"{name} (type '{getattr(config, 'model_type', None)}', {type(module).__name__}) is refused: {why}."
        ) from None
    return Layout(
        blocks=path,
        final_norm=norm,
        unembed=unembed,
        block=rows[0] if all(row == rows[0] for row in rows) else tuple(rows),
        head_scale=before,
        logit_scale=after,
        logit_cap=cap,
        family=str(getattr(config, "model_type", None) or type(module).__name__),
    )


def _require_attention(blocks: nn.Module) -> None:
    if not any(attention_mix(one) is not None for one in blocks.modules()):
        raise UnreadableError(
            "none of its layers has attention weights: it is a recurrent or state-space model (a private attention "
            "needs anatomy=Layout(...) with its `mix`)"
        )


@final
@dataclass(frozen=True, eq=False)
class _Step:
    """A tensor on the way from a writer to the stream: what made it, and how."""

    path: str
    kind: str
    y: Tensor


@final
class _Block:
    """The calls inside one block, and what they say."""

    def __init__(self, block: Call, calls: Sequence[Call], config: Any, tolerance: float) -> None:
        self.block, self.config, self.tolerance = block, config, tolerance
        assert block.x is not None
        assert block.y is not None
        self.x, self.y, self.d = block.x, block.y, block.x.shape[-1]
        self.inside = [c for c in calls if c.path.startswith(block.path + ".")]
        self.children = [c for c in self.inside if "." not in self.rel(c)]

    @property
    def kind(self) -> tuple[tuple[str, type[nn.Module]], ...]:
        """What modules it is made of: the same for layers that are wired alike."""
        return tuple((name, type(one)) for name, one in self.block.module.named_modules())

    @property
    def silent(self) -> bool:
        """Whether a module that may write to the stream gave nothing but zeros (a pruned or fresh layer)."""
        writers = [c for c in self.inside if not c.leaf or (c.linear and "." not in self.rel(c))]
        return any(c.y is not None and c.y.shape == self.x.shape and not bool(c.y.any()) for c in writers)

    def rel(self, call: Call) -> str:
        """A call's path inside the block."""
        return call.path[len(self.block.path) + 1 :]

    def read(self) -> BlockLayout:
        """The block's layout.

        Raises:
            UnreadableError: why there is none.
        """
        cross = [n for n, m in self.block.module.named_children() if re.search(r"cross|encoder_attn", n)]
        if cross:
            raise UnreadableError(f"the block has {cross[0]}: it is the decoder of an encoder-decoder")
        if any(c.norm and same(c.y, self.y) for c in self.inside):
            raise UnreadableError("the block ends in a norm of the sum (post-LayerNorm): the stream is no ledger")
        mixer, mlp = self._writers()
        values: dict[str, Any] = {"attn_kind": "none", "mlp_kind": "none"}
        if mixer is not None:
            values |= mixer[0]
        if mlp is not None:
            values |= mlp.fields(self.rel_path)
        return BlockLayout(**(values | self._sums(mixer, mlp)))

    def rel_path(self, path: str) -> str:
        """A path from the top, made relative to the block."""
        return path[len(self.block.path) + 1 :]

    def _writers(self) -> tuple[tuple[dict[str, Any], list[_Step]] | None, Mlp | None]:
        """The mixer (fields, steps to the stream) and the MLP."""
        attention = [c for c in self.inside if attention_mix(c.module) is not None]
        attention = [c for c in attention if not any(c.path.startswith(o.path + ".") for o in attention)]
        if len(attention) > 1:
            raise UnreadableError(f"there are {len(attention)} attention modules")
        units = [c for c in self.children if not c.leaf and c.y is not None and c.y.shape == self.x.shape]
        units = [c for c in units if not any(a.path == c.path or a.path.startswith(c.path + ".") for a in attention)]
        loose = [c for c in self.children if c.leaf and c.linear]
        mlps: list[Mlp] = []
        mixers: list[tuple[dict[str, Any], list[_Step]]] = [self._attention(a) for a in attention]
        for unit in units:
            found = read_mlp(unit, self.inside, self.block, self.tolerance)
            if isinstance(found, Mlp):
                mlps.append(found)
            elif _MIXES.search(type(unit.module).__name__) and not _NO_MIXES.search(type(unit.module).__name__):
                mixers.append(self._opaque(unit))
            else:
                raise UnrecognisedError(f"{self.rel(unit)} ({type(unit.module).__name__}) is no known MLP: {found}")
        if loose and not mlps:
            found = read_mlp(None, self.inside, self.block, self.tolerance, loose)
            if not isinstance(found, Mlp):
                names = ", ".join(self.rel(c) for c in loose)
                raise UnrecognisedError(f"the projections {names} make no known MLP: {found}")
            mlps.append(found)
        mlps = beside(mlps)
        if len(mixers) > 1 or len(mlps) > 1 or not (mixers or mlps):
            what = [str(f["attn"]) for f, _ in mixers] + [self.rel_path(m.unit) for m in mlps]
            raise UnrecognisedError(
                f"it has {len(what)} writers ({', '.join(what)}); attention and MLP, one each, are known"
            )
        return (mixers[0] if mixers else None), (mlps[0] if mlps else None)

    def _attention(self, call: Call) -> tuple[dict[str, Any], list[_Step]]:
        inside = [c for c in self.inside if c.path.startswith(call.path + ".") and c.linear and c.end <= call.end]
        outs = [c for c in inside if c.y is not None and c.y.shape == self.x.shape]
        if not outs:
            return self._opaque(call)
        w_o = max(outs, key=lambda c: c.start)
        first = min(inside, key=lambda c: c.start)
        norm = self._norm_of(first.x, first.start)
        fields = {"attn_kind": "attention", "attn": self.rel(call), "attn_out": self.rel(w_o), "attn_norm": norm}
        return fields | {"mix": attention_mix(call.module)}, self._steps(w_o)

    def _opaque(self, call: Call) -> tuple[dict[str, Any], list[_Step]]:
        norm = self._norm_of(call.x, call.start)
        return {"attn_kind": "opaque", "attn": self.rel(call), "attn_norm": norm}, self._steps(call)

    def _norm_of(self, read: Tensor | None, start: int) -> str | None:
        made = norm_before(self.inside, read, start)
        return None if made is None else self.rel(made)

    def _steps(self, call: Call) -> list[_Step]:
        """A writer's output and what norms (or convolutions) make of it on the way to the stream."""
        assert call.y is not None
        steps, end = [_Step(self.rel(call), "raw", call.y)], call.end
        while True:
            last = steps[-1].y
            readers = [c for c in self.inside if c.leaf and c.start > end and same(c.x, last) and not c.linear]
            readers = [c for c in readers if c.y is not None and c.y.shape == last.shape]
            if not readers:
                return steps
            reader = readers[0]
            end = reader.end
            assert reader.y is not None
            if not same(reader.y, last):
                steps.append(_Step(self.rel(reader), "norm" if reader.norm else "other", reader.y))

    def _sums(self, mixer: tuple[dict[str, Any], list[_Step]] | None, mlp: Mlp | None) -> dict[str, Any]:
        """How the writers enter the stream: post-norms, parallel or not, scales and carries."""
        a_steps = [] if mixer is None else mixer[1]
        m_steps = [] if mlp is None else self._steps(mlp.down)
        if mixer is None or mlp is None:
            part = "attn" if mlp is None else "mlp"
            return self._solved(self.y, self.x, [(part, a_steps or m_steps)], "its output")
        state = mlp.state
        shares = mlp.norm is not None and self.rel(mlp.norm) == mixer[0]["attn_norm"]
        if (same(state, self.x) and bool(a_steps[-1].y.any())) or shares:
            return {"parallel": True} | self._solved(
                self.y, self.x, [("attn", a_steps), ("mlp", m_steps)], "its output"
            )
        first = self._solved(state, self.x, [("attn", a_steps)], "what its MLP reads")
        return first | self._solved(self.y, state, [("mlp", m_steps)], "its output")

    def _solved(self, total: Tensor, base: Tensor, writers: list[tuple[str, list[_Step]]], what: str) -> dict[str, Any]:
        """total = carry * base + sum of scale * writer: the best fit over every form of the writers."""
        if total.shape != base.shape:
            raise UnreadableError(f"{what} has shape {list(total.shape)}, the stream {list(base.shape)}")
        best: tuple[float, tuple[_Step, ...], list[Factor]] | None = None
        for steps in itertools.product(*(reversed(steps) for _, steps in writers)):
            terms = [base, *(step.y for step in steps)]
            for error, factors in (self._numbers(total, terms), self._vectors(total, terms)):
                if error <= self.tolerance and (best is None or error < best[0] / 2):
                    best = error, steps, factors
        if best is None:
            raise UnrecognisedError(f"{what} is no weighted sum of the stream and what was written to it")
        _, steps, factors = best
        values: dict[str, Any] = {f"{writers[-1][0]}_carry": factors[0]}
        for (part, _), step, factor in zip(writers, steps, factors[1:], strict=True):
            values[f"{part}_scale"] = factor
            if step.kind == "norm":
                values[f"{part}_post_norm"] = step.path
            elif step.kind == "other":
                if part == "mlp":
                    raise UnreadableError(f"{step.path} stands between the MLP and the stream and is no norm")
                values |= {"attn_kind": "opaque", "attn": step.path}
        return values

    def _numbers(self, total: Tensor, terms: list[Tensor]) -> tuple[float, list[Factor]]:
        """(error, factors): numbers, each as what it is named if that fits about as well."""
        solved = solve(total, terms)
        measured: list[Factor] = [c if bool(t.any()) else 1.0 for c, t in zip(solved, terms, strict=True)]
        exact = self._misfit(measured, total, terms)
        own = self._own()
        for options, allowed in ((own + self._configured(), 2 * exact), (own, 4 * torch.finfo(total.dtype).eps)):
            named = [self._nearest(float(value), options) for value in measured]
            error = self._misfit(named, total, terms)
            if error <= max(allowed, 1e-12):
                return error, named
        return exact, measured

    def _misfit(self, factors: Sequence[Factor], total: Tensor, terms: list[Tensor]) -> float:
        return misfit(weighted_sum([self._value(f) for f in factors], terms), total, *terms)

    def _vectors(self, total: Tensor, terms: list[Tensor]) -> tuple[float, list[Factor]]:
        """(error, factors): vectors of d_model, parameters or buffers of the block, or 1."""
        names = [n for n, p in self._tensors().items() if p.shape == (self.d,) and "." not in n]
        best: tuple[float, list[Factor]] = float("inf"), []
        options: list[Factor] = [1.0, *names]
        for chosen in itertools.product(options, repeat=len(terms)) if names else ():
            error = self._misfit(chosen, total, terms)
            if error < best[0]:
                best = error, list(chosen)
        return best

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.block.module.named_parameters()) | dict(self.block.module.named_buffers())

    def _value(self, factor: Factor) -> Tensor | float:
        if not isinstance(factor, str):
            return factor
        tensor = self._tensors()[factor].detach().double()
        return float(tensor) if tensor.numel() == 1 else tensor

    def _own(self) -> list[tuple[float, Factor]]:
        """What a factor may be: 1, or a parameter or buffer of the block."""
        return [(1.0, 1.0), *((float(t.detach()), name) for name, t in self._tensors().items() if t.numel() == 1)]

    def _configured(self) -> list[tuple[float, Factor]]:
        """What else it may be: a number that the block or the config holds, or one over it."""
        found: list[tuple[float, Factor]] = []
        for owner in (self.block.module, self.config):
            for name, given in sorted(vars(owner).items()):
                if isinstance(given, float) and given and not name.startswith("_"):
                    found += [(given, given), (1 / given, 1 / given)]
        return found

    def _nearest(self, value: float, options: list[tuple[float, Factor]]) -> Factor:
        """The nearest option, if it is near; else the value as measured."""
        away, factor = min(((abs(number - value), factor) for number, factor in options), key=lambda o: o[0])
        return factor if away <= max(self.tolerance, 1e-7) * abs(value) else value


def attention_mix(module: nn.Module) -> str | None:
    """Where a module's attention weights meet its values (see `BlockLayout.mix`), or None."""
    kind = type(module)
    if kind.__name__ in ATTENTION_OPERATIONS:
        config = getattr(module, "config", None)
        eager = " eager" if getattr(config, "_attn_implementation", None) == "eager" else ""
        alibi = " alibi" if getattr(config, "alibi", False) else ""
        names = (f"{kind.__name__}{eager}{alibi}", kind.__name__)
        return next(ATTENTION_OPERATIONS[name] for name in names if name in ATTENTION_OPERATIONS)
    if kind not in _CALLS_INTERFACE:
        try:
            source = inspect.getsource(kind.forward)
        except (OSError, TypeError):
            source = ""
        _CALLS_INTERFACE[kind] = re.search(r"\battention_interface\(", source) is not None
    return "interface" if _CALLS_INTERFACE[kind] else None

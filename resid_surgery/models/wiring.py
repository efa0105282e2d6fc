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
from resid_surgery.models.calls import Call, close, flatten, same, watch
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


class UnreadableError(Exception):
    """Why a model's wiring is no ledger; turned into an `UnsupportedModelError` with the model's name.

    `vague` reasons say what was not recognised rather than what stands in the way.
    """

    vague = False


class UnrecognisedError(UnreadableError):
    """A part that is not known."""

    vague = True


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
        path, chain = _find_chain(module, calls, ids.shape[1])
        width = TOLERANCE.get(_dtype(chain[0].x), 1e-5)
        rows = []
        for layer, block in enumerate(chain):
            try:
                rows.append(_Block(block, calls, config, width).read())
            except UnreadableError as why:
                if why.vague:  # what the head says, or that nothing attends, is plainer
                    _read_head(calls, chain[-1], config, width)
                    _require_attention(module.get_submodule(path))
                raise UnreadableError(f"in layer {layer}, {why}") from None
        _require_attention(module.get_submodule(path))
        norm, unembed, before, after, cap = _read_head(calls, chain[-1], config, width)
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


def _dtype(x: Tensor | None) -> torch.dtype:
    return torch.float32 if x is None else x.dtype


def _find_chain(module: nn.Module, calls: Sequence[Call], n_positions: int) -> tuple[str, list[Call]]:
    """The block list: modules called once each, in order, each reading what the one before left."""
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    found: list[tuple[int, str, list[Call]]] = []
    repeated = None
    for path, one in module.named_modules():
        if not isinstance(one, nn.ModuleList) or len(one) == 0:
            continue
        runs = [by_path.get(f"{path}.{i}", []) for i in range(len(one))]
        if any(len(run) > 1 for run in runs) and all(runs):
            repeated = path
        if all(len(run) == 1 for run in runs):
            chain = [run[0] for run in runs]
            wide = chain[0].x is not None and chain[0].y is not None and chain[0].x.shape == chain[0].y.shape
            if wide and all(a.end < b.start for a, b in itertools.pairwise(chain)):
                found.append((sum(p.numel() for p in one.parameters()), path, chain))
    if not found:
        hint = f"{repeated} runs more than once a forward" if repeated else "no list of blocks runs as a chain"
        raise UnreadableError(f"{hint}, so its stream is no sum of one addend a writer")
    _, path, chain = max(found, key=lambda item: item[0])
    for i, call in enumerate(chain):
        shape = list(call.shape)
        if len(shape) > 3:
            raise UnreadableError(
                f"the stream that enters layer {i} has shape {shape}: it is kept in several copies "
                "(hyper-connections), which are mixed between layers"
            )
        if len(shape) != 3 or shape[0] != 1 or shape[1] != n_positions:
            raise UnreadableError(
                f"the stream that enters layer {i} has shape {shape} for {n_positions} tokens: the model adds "
                "tokens of its own, merges some, or turns positions around"
            )
    for i, (a, b) in enumerate(itertools.pairwise(chain)):
        if not same(a.y, b.x):
            raise UnreadableError(
                f"what layer {i + 1} reads is not what layer {i} left: something happens between blocks"
            )
    return path, chain


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
        norm = self._norm_of(min(inside, key=lambda c: c.start).x)
        fields = {"attn_kind": "attention", "attn": self.rel(call), "attn_out": self.rel(w_o), "attn_norm": norm}
        return fields | {"mix": attention_mix(call.module)}, self._steps(w_o)

    def _opaque(self, call: Call) -> tuple[dict[str, Any], list[_Step]]:
        return {"attn_kind": "opaque", "attn": self.rel(call), "attn_norm": self._norm_of(call.x)}, self._steps(call)

    def _norm_of(self, read: Tensor | None) -> str | None:
        made = [c for c in self.inside if c.norm and same(c.y, read)]
        return self.rel(made[0]) if made else None

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
        state = mlp.state(self.inside)
        mixer_norm = mixer[0]["attn_norm"]
        shares = mixer_norm is not None and self._norm_of(mlp.read) == mixer_norm
        if same(state, self.x) or shares:
            return {"parallel": True} | self._solved(
                self.y, self.x, [("attn", a_steps), ("mlp", m_steps)], "its output"
            )
        first = self._solved(state, self.x, [("attn", a_steps)], "what its MLP reads")
        return first | self._solved(self.y, state, [("mlp", m_steps)], "its output")

    def _solved(self, total: Tensor, base: Tensor, writers: list[tuple[str, list[_Step]]], what: str) -> dict[str, Any]:
        """total = carry * base + sum of scale * writer, trying each writer's last form first."""
        if total.shape != base.shape:
            raise UnreadableError(f"{what} has shape {list(total.shape)}, the stream {list(base.shape)}")
        for form in ("numbers", "vectors"):
            for steps in itertools.product(*(reversed(steps) for _, steps in writers)):
                terms = [base, *(step.y for step in steps)]
                found = solve(total, terms, self.tolerance) if form == "numbers" else self._vectors(total, terms)
                if found is None:
                    continue
                factors = [self._named(f) if isinstance(f, float) else f for f in found]
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
        raise UnrecognisedError(f"{what} is no weighted sum of the stream and what was written to it")

    def _vectors(self, total: Tensor, terms: list[Tensor]) -> list[Any] | None:
        """Factors that are vectors of d_model: parameters or buffers of the block, or 1."""
        named = dict(self.block.module.named_parameters()) | dict(self.block.module.named_buffers())
        vectors: dict[str | float, Any] = {1.0: 1.0}
        vectors |= {n: p.detach().double() for n, p in named.items() if p.shape == (self.d,) and "." not in n}
        for chosen in itertools.product(vectors, repeat=len(terms)):
            made = sum(vectors[name] * term.double() for name, term in zip(chosen, terms, strict=True))
            if isinstance(made, Tensor) and close(made, total, self.tolerance, *terms):
                return list(chosen)
        return None

    def _named(self, value: float) -> Factor:
        """A measured factor as the parameter, attribute or config entry that it is, else as measured."""
        if value == 1.0:
            return value
        near = max(self.tolerance, 1e-7)
        tensors = dict(self.block.module.named_parameters()) | dict(self.block.module.named_buffers())
        for name, tensor in tensors.items():
            if tensor.numel() == 1 and abs(float(tensor) - value) <= near * abs(value):
                return name
        for owner in (self.block.module, self.config):
            for name, given in sorted(vars(owner).items()):
                if isinstance(given, float) and not isinstance(given, bool) and given and not name.startswith("_"):
                    for option in (given, 1 / given):
                        if abs(option - value) <= near * abs(value):
                            return option
        return value


def solve(total: Tensor, terms: Sequence[Tensor], tolerance: float) -> list[float] | None:
    """Numbers c with total = sum c_i terms_i, all 1 if that already fits; None if nothing does."""
    a = torch.stack([t.double().reshape(-1) for t in terms], 1)
    b = total.double().reshape(-1)
    ones = [1.0] * len(terms)
    if close(a.sum(1), b, tolerance, a):
        return ones
    c = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    return [float(v) for v in c] if close(a @ c, b, tolerance, a) else None


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


def _read_head(
    calls: Sequence[Call], last: Call, config: Any, tolerance: float
) -> tuple[str, str, float, float, float | None]:
    """Final norm, unembedding, logit scale and cap: logits = cap(scale * W_U N(x))."""
    norms = [c for c in calls if c.start > last.end and c.norm and same(c.x, last.y)]
    if not norms:
        raise UnreadableError("no norm reads the stream after the last block, so bs-values are not defined")
    norm = norms[0]
    heads = [c for c in calls if c.start > norm.end and c.linear]
    if not heads or norm.y is None:
        raise UnreadableError("no projection to the vocabulary follows the final norm")
    head = heads[-1]
    before = None if head.x is None or head.x.shape != norm.y.shape else solve(head.x, [norm.y], tolerance)
    logits = flatten(calls[-1].y)
    if before is None or head.y is None or logits is None or logits.shape != head.y.shape:
        raise UnreadableError(
            f"{head.path} does not read the final norm's output: the head is not linear after one norm"
        )
    caps = [v for k, v in sorted(vars(config).items()) if "cap" in k and isinstance(v, (int, float)) and v]
    scales = [v for k, v in sorted(vars(config).items()) if "logit" in k and isinstance(v, float) and v]
    options = dict.fromkeys([1.0, *scales, *(1 / s for s in scales)])
    for cap in [None, *caps]:
        for scale in options:
            bs = head.y.double() * scale
            if close(bs if cap is None else cap * torch.tanh(bs / cap), logits, tolerance):
                return norm.path, head.path, before[0], scale, None if cap is None else float(cap)
    measured = solve(logits, [head.y], tolerance)
    if measured is None:
        raise UnreadableError("its logits are no multiple and no known soft-cap of what the unembedding writes")
    return norm.path, head.path, before[0], measured[0], None

"""Readers, slowly: what a reader takes from the stream, by running the model's own modules.

One plain forward with plain PyTorch hooks says what every module read and wrote. A share is then what a reading loses
when its reader alone is given N_s(r - u) in place of N_s(r), one writer after the other: modules are called again with
the other input, norms keep the scale that the clean run had. Nothing of the library is used; where things are in each
family is written out again here, on purpose.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Where:
    """Module paths of one family, relative to a block unless they start at the top."""

    blocks: str
    final_norm: str
    attn: str
    w_o: str
    attn_norm: str | None
    mlp: str
    mlp_norm: str | None
    keys: tuple[str, ...]
    down: str
    act: str
    attn_post: str | None = None
    mlp_post: str | None = None
    inner_norms: tuple[str, ...] = ()  # inside attention, before queries, keys or values
    centred: bool = False
    one_plus: bool = False
    conv1d: bool = False
    parallel: bool = False
    experts: str | None = None  # how gate and up share a table: "halves" or "interleaved"
    shared: str | None = None
    fused: str | None = None  # an attention that hands nothing to transformers' interface
    gated: bool = False  # something stands between the mixed values and W_O
    coefficient_norm: str | None = None  # a norm over all coefficients
    times: str | None = None  # a config field: what every sublayer's output is multiplied by
    divided: str | None = None  # a config field: what the logits are divided by
    carries: tuple[str, str] | None = None  # what the stream is multiplied by where attention and the MLP are added


LLAMA = dict(
    blocks="model.layers", final_norm="model.norm", attn="self_attn", w_o="self_attn.o_proj",
    attn_norm="input_layernorm", mlp="mlp", mlp_norm="post_attention_layernorm",
    keys=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj", act="mlp.act_fn",
)  # fmt: skip
POST = dict(attn_post="post_attention_layernorm", mlp_post="post_feedforward_layernorm")
LATENT = dict(experts="halves", shared="mlp.shared_experts", inner_norms=("q_a_layernorm", "kv_a_layernorm"))
WHERE: dict[str, Where] = {
    "gpt2": Where("transformer.h", "transformer.ln_f", "attn", "attn.c_proj", "ln_1", "mlp", "ln_2", ("mlp.c_fc",),
                  "mlp.c_proj", "mlp.act", centred=True, conv1d=True),
    "llama": Where(**LLAMA),
    "gemma2": Where(**LLAMA | POST | dict(mlp_norm="pre_feedforward_layernorm", one_plus=True)),
    "olmo2": Where(**LLAMA | POST | dict(attn_norm=None, mlp_norm=None, inner_norms=("q_norm", "k_norm"))),
    "qwen3": Where(**LLAMA, inner_norms=("q_norm", "k_norm")),
    "gpt_neox": Where("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention", "attention.dense",
                      "input_layernorm", "mlp", "post_attention_layernorm", ("mlp.dense_h_to_4h",),
                      "mlp.dense_4h_to_h", "mlp.act", centred=True, parallel=True),
    "phi": Where(**LLAMA | dict(w_o="self_attn.dense", mlp_norm="input_layernorm", keys=("mlp.fc1",), down="mlp.fc2",
                                act="mlp.activation_fn", final_norm="model.final_layernorm", centred=True,
                                inner_norms=("q_layernorm", "k_layernorm"), parallel=True)),
    "granite": Where(**LLAMA, times="residual_multiplier", divided="logits_scaling"),
    "mixtral": Where(**LLAMA, experts="halves"),
    "deepseek_v2": Where(**LLAMA, **LATENT),
    "deepseek_v3": Where(**LLAMA, **LATENT),
    "deepseek_v32": Where(**LLAMA, **LATENT),
    "doge": Where(**LLAMA, inner_norms=("q_norm", "k_norm"), carries=("input_residual", "post_attention_residual")),
    "gpt_oss": Where(**LLAMA, experts="interleaved"),
    "bitnet": Where(**LLAMA, gated=True, coefficient_norm="mlp.ffn_sub_norm"),
    "bloom": Where("transformer.h", "transformer.ln_f", "self_attention", "self_attention.dense", "input_layernorm",
                   "mlp", "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "mlp.gelu_impl",
                   centred=True, fused="by head"),
    "mpt": Where("transformer.blocks", "transformer.norm_f", "attn", "attn.out_proj", "norm_1", "ffn", "norm_2",
                 ("ffn.up_proj",), "ffn.down_proj", "ffn.act", centred=True, fused="by part"),
}  # fmt: skip
GRAINS = {"layer": (), "head": ("head",), "head_source": ("head_source",), "neuron": ("neuron",),
          "subvalue": ("head_source", "neuron")}  # fmt: skip


@dataclass(frozen=True)
class Addend:
    """What one writer adds to the stream at one position."""

    site: str
    position: int
    layer: int
    part: str
    vector: Tensor


@dataclass(frozen=True)
class Worth:
    """Where vectors are read, and what they are worth there.

    Attributes:
        stop: (layer, part) that reads. take: (n, d_model) vectors as they reach it -> (n,).
    """

    stop: tuple[int, str]
    take: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """Neurons of one down-projection at one position."""

    prefix: str
    keys: tuple[tuple[Tensor, Tensor], ...]  # (rows (d_model, n), bias (n,)) of gate and up, or of up alone
    made: Callable[..., Tensor]  # pre-activations -> coefficients
    rows: Tensor  # (n, d_model)
    bias: Tensor | None
    factor: float
    kept: Tensor | None = None  # what a norm over all coefficients multiplies each by


@dataclass(frozen=True)
class Reading:
    """A number that a reader takes from the stream.

    Attributes:
        stop: (layer, part) that reads. positions: whose input it hangs on. at: (position, (n, d_model) what is read
            there in place of what was) -> (n,) numbers; the first row is what was read.
    """

    stop: tuple[int, str]
    positions: tuple[int, ...]
    at: Callable[[int, Tensor], Tensor]
    source: int | None = None
    made: Callable[[int, Tensor], Tensor] | None = None  # the same, for what is handed on


class _Stop(Exception):  # noqa: N818
    """An attention call has been seen."""


class Run:
    """One plain forward: what every module read and wrote, and the modules to ask again."""

    def __init__(self, family: str, model: nn.Module, ids: list[int]) -> None:
        self.where, self.model, self.ids = WHERE[family], model, list(ids)
        self.text = model.config.get_text_config()
        self.blocks = list(model.get_submodule(self.where.blocks))
        self.read: dict[tuple[int, str], Tensor] = {}
        self.wrote: dict[tuple[int, str], Tensor] = {}
        self.asked: dict[int, tuple[Any, Any]] = {}
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: list[dict[str, Any]] = []
        with torch.no_grad(), ExitStack() as stack:
            for i in range(len(self.blocks)):
                self._listen(stack, i)
            stack.enter_context(self._overheard(self.calls.append))
            out = model(torch.tensor([ids]), use_cache=False, output_attentions=bool(self.where.fused))
        self.logits = out.logits[0].double()
        self.weights = [one[0].double() for one in out.attentions] if self.where.fused else [
            call["weights"][0].double() for call in self.calls]  # fmt: skip

    # what is where

    def module(self, layer: int, path: str) -> nn.Module:
        return self.blocks[layer].get_submodule(path)

    def has(self, layer: int, path: str | None) -> bool:
        try:
            return path is not None and self.module(layer, path) is not None
        except AttributeError:
            return False

    def rows(self, layer: int, path: str) -> tuple[Tensor, Tensor | None]:
        """(input coordinate, what it writes) and the bias."""
        module = self.module(layer, path)
        weight = module.weight.detach().double()
        bias = getattr(module, "bias", None)
        return weight if self.where.conv1d else weight.T, None if bias is None else bias.detach().double()

    # listening

    def _listen(self, stack: ExitStack, i: int) -> None:
        where, block = self.where, self.blocks[i]
        self._keep(stack, block, (i, "pre"), (i, "post"))
        self._keep(stack, block.get_submodule(where.w_o), (i, "z"), (i, "attn_raw"))
        self._keep(stack, block.get_submodule(where.mlp), (i, "mlp_read"), (i, "mlp_out"))
        for name, path in (("attn", where.attn_post), ("mlp", where.mlp_post)):
            if path:
                self._keep(stack, block.get_submodule(path), (i, f"{name}_post_read"), (i, f"{name}_post"))
        if self.has(i, where.down):
            self._keep(stack, self.module(i, where.down), (i, "coefficient"), (i, "mlp_raw"))
        if self.has(i, f"{where.mlp}.experts"):

            def routed(module: nn.Module, args: Any, kwargs: Any) -> None:
                _, index, weight = [*args, *kwargs.values()]
                self.routed[i] = index.reshape(len(self.ids), -1), weight.reshape(len(self.ids), -1).double()

            handle = self.module(i, f"{where.mlp}.experts").register_forward_pre_hook(routed, with_kwargs=True)
            stack.callback(handle.remove)

        def asked(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.asked[i] = args, kwargs

        stack.callback(self.module(i, where.attn).register_forward_pre_hook(asked, with_kwargs=True).remove)

    def _keep(self, stack: ExitStack, module: nn.Module, read: tuple[int, str], wrote: tuple[int, str]) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            self.read[read] = value.detach().reshape(len(self.ids), -1).double()
            self.wrote[wrote] = made.detach().reshape(len(self.ids), -1).double()

        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    @contextmanager
    def _overheard(self, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """`tell` is told of every attention call."""
        home = sys.modules[type(self.module(0, self.where.attn)).__module__]
        if self.where.fused:
            yield
            return
        own = home.eager_attention_forward

        def heard(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
            out = own(module, query, key, value, *a, **k)
            mask = a[0] if a else k.get("attention_mask")
            kept = dict(query=query, key=key, value=value, weights=out[1])
            tell({name: tensor.detach() for name, tensor in kept.items()} | dict(
                mask=mask, scaling=k.get("scaling"), cap=k.get("softcap"), sinks=getattr(module, "sinks", None)
            ))  # fmt: skip
            return out

        with patch.object(home, "eager_attention_forward", heard):
            yield

    # norms

    def scale(self, module: nn.Module | None, x: Tensor) -> Tensor:
        """The root mean square, or the standard deviation, of each vector."""
        if module is None:
            return torch.ones_like(x[..., :1])
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.where.centred else x

    def linear(self, module: nn.Module | None, v: Tensor, state: Tensor) -> Tensor:
        """gain * centred v / s, the s of a state; v itself where there is no norm."""
        if module is None:
            return v
        gain = module.weight.detach().double() + (1.0 if self.where.one_plus else 0.0)
        return gain * self.centre(v) / self.scale(module, state)

    def beta(self, module: nn.Module | None, like: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        return torch.zeros_like(like) if bias is None else bias.detach().double()

    def norm_of(self, stop: tuple[int, str]) -> nn.Module | None:
        layer, part = stop
        if part == "final":
            return self.model.get_submodule(self.where.final_norm)
        path = self.where.attn_norm if part == "attn" else self.where.mlp_norm
        return None if path is None else self.module(layer, path)

    def state(self, stop: tuple[int, str], position: int) -> Tensor:
        """What a reader reads before its norm."""
        layer, part = stop
        if part == "final":
            return self.wrote[len(self.blocks) - 1, "post"][position]
        pre = self.read[layer, "pre"][position]
        if part == "attn" or self.where.parallel:
            return pre
        return self.carry(2 * layer) * pre + self.added(layer, "attn", position)

    def normed(
        self, stop: tuple[int, str], position: int, *, without: Tensor | None = None, live: bool = False
    ) -> Tensor:
        """(n, d_model) N(r - u) for every u, with the scale of r, or live; N(r) if there is no u."""
        module, r = self.norm_of(stop), self.state(stop, position)
        rest = r[None] if without is None else r - without
        return self.linear(module, rest, rest if live else r) + self.beta(module, r)

    # writers

    @property
    def times(self) -> float:
        return getattr(self.text, self.where.times) if self.where.times else 1.0

    def place(self, stop: tuple[int, str]) -> int:
        """When a sublayer reads: 2 for every layer before it and 1 for attention of its own, if that comes before."""
        return 2 * stop[0] + (stop[1] == "mlp" and not self.where.parallel)

    def carry(self, place: int) -> Tensor | float:
        """What the stream is multiplied by where a sublayer is added to it."""
        if self.where.carries is None:
            return 1.0
        return getattr(self.blocks[place // 2], self.where.carries[place % 2]).detach().double()

    def reach(self, v: Tensor, layer: int, part: str, stop: tuple[int, str]) -> Tensor:
        """Vectors that a sublayer added (the embedding: layer -1, "mlp") as they reach a reader."""
        for place in range(2 * layer + (part == "mlp") + 1, self.place(stop)):
            v = v * self.carry(place)
        return v

    def worth_of(self, worth: Worth, layer: int, part: str, v: Tensor, position: int) -> Tensor:
        """(n,) worth of vectors in a sublayer's output."""
        return worth.take(self.reach(self.through_post(layer, part, v, position), layer, part, worth.stop))

    def raw(self, layer: int, part: str, position: int) -> Tensor:
        """What a sublayer writes before a post-norm."""
        dense = part == "attn" or (layer, "mlp_raw") in self.wrote
        return self.wrote[layer, f"{part}_raw" if dense else "mlp_out"][position]

    def through_post(self, layer: int, part: str, v: Tensor, position: int) -> Tensor:
        """Vectors in a sublayer's output as they reach the stream: the post-norm frozen."""
        path = self.where.attn_post if part == "attn" else self.where.mlp_post
        module = self.module(layer, path) if path else None
        return self.linear(module, v, self.raw(layer, part, position)) * self.times

    def added(self, layer: int, part: str, position: int) -> Tensor:
        post = (layer, f"{part}_post")
        return (self.wrote[post][position] if post in self.wrote else self.raw(layer, part, position)) * self.times

    def addends(self, grain: str, position: int) -> list[Addend]:
        """Every writer at one position, at a grain."""
        found = [Addend("embed", position, -1, "mlp", self.read[0, "pre"][position])]
        for layer in range(len(self.blocks)):
            for part, kinds in (("attn", ("head", "head_source")), ("mlp", ("neuron",))):
                kind = next((one for one in GRAINS[grain] if one in kinds), None)
                if kind is None:
                    made = [(f"L{layer}.{part}", self.added(layer, part, position))]
                else:
                    inside = list(
                        self._neurons(layer, position) if part == "mlp" else self._heads(kind, layer, position)
                    )
                    made = [(site, self.through_post(layer, part, v, position)) for site, v in inside]
                found += [Addend(site, position, layer, part, vector) for site, vector in made]
        return found

    def _heads(self, kind: str, layer: int, position: int) -> Iterator[tuple[str, Tensor]]:
        rows, bias = self.rows(layer, self.where.w_o)
        alpha = self.weights[layer]
        n_heads, z = len(alpha), self.read[layer, "z"][position].view(len(alpha), -1)
        w_o = rows.view(n_heads, z.shape[1], -1)
        for h in range(n_heads):
            if kind == "head":
                yield f"L{layer}.H{h}", z[h] @ w_o[h]
            else:
                for j in range(position + 1):
                    yield f"L{layer}.H{h}<{j}", self.mixed(layer, h, position, j) @ w_o[h]
        if bias is not None:
            yield f"L{layer}.attn.bias", bias

    def mixed(self, layer: int, head: int, position: int, source: int) -> Tensor:
        """What a head takes from one source, as it reaches W_O."""
        v = self.values(layer)
        alpha, group = self.weights[layer], len(self.weights[layer]) // len(v)
        return alpha[head, position, source] * v[head // group, source] * self.gate(layer, position)[head]

    def gate(self, layer: int, position: int) -> Tensor:
        """What multiplies mixed values on their way to W_O, a head and coordinate each."""
        alpha, v = self.weights[layer], self.values(layer)
        z = self.read[layer, "z"][position].view(len(alpha), -1)
        if not self.where.gated:
            return torch.ones_like(z)
        mix = torch.stack([alpha[h, position] @ v[h * len(v) // len(alpha)] for h in range(len(alpha))])
        return z / mix

    def _neurons(self, layer: int, position: int) -> Iterator[tuple[str, Tensor]]:
        read = self.read[layer, "mlp_read"][position]
        groups = self.groups(layer, position)
        for one in groups:
            m = self.coefficients(one, read[None])[0]
            for k in range(len(m)):
                yield f"{one.prefix}.N{k}", m[k] * one.rows[k] * one.factor
        for one in groups:
            if one.bias is not None:
                bias = f"L{layer}.mlp.bias" if one.prefix == f"L{layer}" else f"{one.prefix}.bias"
                yield bias, one.bias * one.factor

    # MLPs

    def groups(self, layer: int, position: int) -> list[Group]:
        """The neurons that are active at a position."""
        where = self.where
        if layer not in self.routed:
            return [self._dense(f"L{layer}", layer, where.keys, where.down, where.act, position)]
        index, weight = (one[position].tolist() for one in self.routed[layer])
        found = [self._expert(layer, e, w) for e, w in zip(index, weight, strict=True)]
        if where.shared:
            inside = tuple(f"{where.shared}.{key.split('.')[-1]}" for key in where.keys)
            down, act = f"{where.shared}.down_proj", f"{where.shared}.act_fn"
            found.append(self._dense(f"L{layer}.shared", layer, inside, down, act, position))
        return found

    def _dense(self, prefix: str, layer: int, keys: tuple[str, ...], down: str, act: str, position: int) -> Group:
        function = self.module(layer, act)
        read = []
        for path in keys:
            rows, bias = self.rows(layer, path)
            read.append((rows, torch.zeros(rows.shape[1], dtype=rows.dtype) if bias is None else bias))
        rows, bias = self.rows(layer, down)
        one = Group(prefix, tuple(read), lambda *pre: _gated(function, *pre), rows, bias, 1.0)
        if self.where.coefficient_norm:
            plain = self.coefficients(one, self.read[layer, "mlp_read"][position][None])[0]
            kept = self.read[layer, "coefficient"][position] / torch.where(plain == 0, 1.0, plain)
            one = Group(prefix, one.keys, one.made, rows, bias, 1.0, kept)
        return one

    def _expert(self, layer: int, e: int, weight: float) -> Group:
        table = self.module(layer, f"{self.where.mlp}.experts")
        down, both = table.down_proj.detach().double()[e], table.gate_up_proj.detach().double()[e]
        if self.where.experts == "halves":
            zero = torch.zeros(down.shape[1], dtype=down.dtype)
            keys = tuple((half.T, zero) for half in both.chunk(2))
            return Group(f"L{layer}.E{e}", keys, lambda *pre: _gated(table.act_fn, *pre), down.T, None, weight)
        bias = table.gate_up_proj_bias.detach().double()[e]
        keys = (both[:, ::2], bias[::2]), (both[:, 1::2], bias[1::2])

        def made(gate: Tensor, up: Tensor) -> Tensor:
            gate, up = gate.clamp(max=table.limit), up.clamp(-table.limit, table.limit)
            return (up + 1) * gate * torch.sigmoid(gate * table.alpha)

        return Group(f"L{layer}.E{e}", keys, made, down, table.down_proj_bias.detach().double()[e], weight)

    def coefficients(self, group: Group, read: Tensor) -> Tensor:
        """(n, neuron) coefficients of what an MLP would read."""
        made = group.made(*(read @ rows + bias for rows, bias in group.keys))
        return made if group.kept is None else made * group.kept

    def routing(self, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
        """(index, weight) with which the MLP's own router would route what it read."""
        found: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            _, index, weight = [*args, *kwargs.values()]
            found.append((index.reshape(len(read), -1), weight.reshape(len(read), -1).double()))

        handle = self.module(layer, f"{self.where.mlp}.experts").register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                self.module(layer, self.where.mlp)(read[None].to(self.model.dtype))
        finally:
            handle.remove()
        return found[0]

    # attention

    def values(self, layer: int) -> Tensor:
        """(kv head, position, d_head) of the clean run."""
        if self.where.fused:
            return self._fused(layer, self.asked_states(layer))[0]
        return self.calls[layer]["value"][0].double()

    def asked_states(self, layer: int) -> Tensor:
        """(1, position, d_model) what attention read."""
        args, kwargs = self.asked[layer]
        return args[0] if args else kwargs["hidden_states"]

    def _fused(self, layer: int, x: Tensor) -> Tensor:
        """(row, head, position, d_head) values of an attention with one projection for all."""
        attn, n_heads = self.module(layer, self.where.attn), self.text.num_attention_heads
        with torch.no_grad():
            both = (attn.query_key_value if self.where.fused == "by head" else attn.Wqkv)(x).double()
        shape = (n_heads, 3, -1) if self.where.fused == "by head" else (3, n_heads, -1)
        both = both.view(*x.shape[:2], *shape)
        return (both[..., 2, :] if self.where.fused == "by head" else both[:, :, 2]).transpose(1, 2)

    def project(self, layer: int, position: int, rows: Tensor, *, frozen: bool) -> dict[str, Tensor]:
        """Queries, keys and values of attention that reads `rows` at a position; norms inside it keep the scale that
        they have in the first row, if `frozen`."""
        x = self.asked_states(layer).detach().repeat(len(rows), 1, 1)
        x[:, position] = rows.to(x.dtype)
        if self.where.fused:
            return {"value": self._fused(layer, x)}
        args, kwargs = self.asked[layer]
        args, kwargs = (x, *args[1:]) if args else args, kwargs if args else kwargs | {"hidden_states": x}
        heard: list[dict[str, Any]] = []

        def tell(call: dict[str, Any]) -> None:
            heard.append(call)
            raise _Stop

        attn = self.module(layer, self.where.attn)
        with torch.no_grad(), ExitStack() as stack:
            for path in self.where.inner_norms if frozen else ():
                stack.callback(attn.get_submodule(path).register_forward_hook(self._frozen).remove)
            stack.enter_context(self._overheard(tell))
            with suppress(_Stop):
                attn(*args, **kwargs)
        return {name: heard[0][name].double() for name in ("query", "key", "value")}

    def _frozen(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A norm's output with the scale of the first row in place of each row's own."""
        x, beta = args[0].double(), self.beta(module, output)
        return ((output.double() - beta) * self.scale(module, x) / self.scale(module, x[:1]) + beta).to(output.dtype)

    def score(self, layer: int, head: int, source: int, query: Tensor, key: Tensor) -> float:
        """scaling q . k, before a cap and the softmax."""
        total = 0.0
        for a, b in zip(query.tolist(), key.tolist(), strict=True):
            total += a * b
        scaling = self.calls[layer]["scaling"]
        return total * (len(query) ** -0.5 if scaling is None else scaling)

    def bias(self, layer: int, head: int, t: int, source: int) -> float:
        """What the mask adds to a score; -inf where it hides it."""
        mask = self.calls[layer]["mask"]
        if mask is None:
            return 0.0
        one = float(mask[0, min(head, mask.shape[1] - 1), t, source])
        return one if one > torch.finfo(mask.dtype).min / 2 else -torch.inf

    def attend(self, layer: int, head: int, t: int, scores: list[float]) -> Tensor:
        """(source,) weights of scores, through cap, mask, sink and softmax."""
        call = self.calls[layer]
        e = torch.tensor(scores, dtype=torch.float64)
        if call["cap"] is not None:
            e = torch.tanh(e / call["cap"]) * call["cap"]
        e = e + torch.tensor([self.bias(layer, head, t, j) for j in range(t + 1)], dtype=torch.float64)
        if call["sinks"] is not None:
            e = torch.cat([e, call["sinks"].detach().double()[head : head + 1]])
        return torch.softmax(e, -1)[: t + 1]

    # readings

    def neuron(self, layer: int, position: int, prefix: str, k: int) -> dict[str, Reading]:
        """Gate and up pre-activations of a neuron; hands on its coefficient."""
        group = next(one for one in self.groups(layer, position) if one.prefix == prefix)
        names = ("gate", "up")[-len(group.keys) :]

        def made(p: int, rows: Tensor) -> Tensor:
            return self.coefficients(group, rows)[:, k]

        found = {}
        for name, (rows, bias) in zip(names, group.keys, strict=True):

            def at(p: int, read: Tensor, row: Tensor = rows[:, k], own: Tensor = bias[k]) -> Tensor:
                return read @ row + own

            found[name] = Reading((layer, "mlp"), (position,), at, made=made)
        return found

    def value(self, layer: int, t: int, worth: Tensor, sources: tuple[int, ...]) -> Reading:
        """sum over heads and sources of alpha gate v . worth; worth is (head, d_head)."""
        alpha, gate = self.weights[layer], self.gate(layer, t)

        def at(p: int, rows: Tensor) -> Tensor:
            v = self.project(layer, p, rows, frozen=True)["value"]
            group, total = len(alpha) // v.shape[1], torch.zeros(len(rows), dtype=torch.float64)
            for h in range(len(alpha)):
                for j in sources:
                    total += alpha[h, t, j] * (v[:, h // group, j] @ (gate[h] * worth[h]))
            return total

        return Reading((layer, "attn"), sources, at, sources[0] if len(sources) == 1 else None)

    def scores(self, layer: int, head: int, t: int, source: int, side: str) -> Reading:
        """The score of one source with one side read; hands on the weight of that source."""
        call = self.calls[layer]
        query, keys = call["query"][0, head, t].double(), call["key"][0].double()
        kv = head // (call["query"].shape[1] // len(keys))
        position = t if side == "query" else source

        def sides(rows: Tensor, frozen: bool) -> list[tuple[Tensor, Tensor]]:
            made = self.project(layer, position, rows, frozen=frozen)
            if side == "query":
                return [(one[head, t], keys[kv, source]) for one in made["query"]]
            return [(query, one[kv, source]) for one in made["key"]]

        def at(p: int, rows: Tensor) -> Tensor:
            bias = self.bias(layer, head, t, source)
            found = [self.score(layer, head, source, q, k) for q, k in sides(rows, True)]
            return torch.tensor(found, dtype=torch.float64) + (0.0 if bias == -torch.inf else bias)

        def made(p: int, rows: Tensor) -> Tensor:
            found = []
            for q, k in sides(rows, False):
                row = [self.score(layer, head, j, q, k if j == source else keys[kv, j]) for j in range(t + 1)]
                found.append(self.attend(layer, head, t, row)[source])
            return torch.stack(found)

        return Reading((layer, "attn"), (position,), at, source, made)

    # readouts

    def token_weights(self, t: int, readout: str, target: int, versus: tuple[int, ...]) -> Tensor:
        """(vocabulary,) what a readout takes of each token's bs-value."""
        weights = torch.zeros_like(self.logits[t])
        if readout == "difference":
            for token in versus:
                weights[token] -= 1 / len(versus)
        if readout == "log_prob":
            weights -= torch.softmax(self.logits[t], -1)
        weights[target] += 1
        return weights

    def readout(self, t: int, weights: Tensor) -> Worth:
        """What vectors of the final stream at t are worth to a readout, the scale of the final norm frozen."""
        stop = (len(self.blocks), "final")
        w_u = self.model.get_output_embeddings().weight.detach().double()
        divided = getattr(self.text, self.where.divided) if self.where.divided else 1.0

        return Worth(
            stop, lambda v: self.linear(self.norm_of(stop), v, self.state(stop, t)) @ w_u.T @ weights / divided
        )

    def head_worth(self, layer: int, t: int, to: Worth, heads: list[int]) -> Tensor:
        """(head, d_head) what one unit of each coordinate of z is worth; 0 for other heads."""
        rows, _ = self.rows(layer, self.where.w_o)
        worth = self.worth_of(to, layer, "attn", rows, t).view(len(self.weights[layer]), -1)
        kept = torch.zeros_like(worth)
        kept[heads] = worth[heads]
        return kept

    def layer(self, layer: int, t: int, to: Worth) -> Reading:
        """What an MLP's neurons write is worth, with every gate (or the slope from 0) kept."""
        groups, clean = self.groups(layer, t), self.normed((layer, "mlp"), t)

        def worth(one: Group) -> Tensor:
            return self.worth_of(to, layer, "mlp", one.rows, t) * one.factor

        def at(p: int, rows: Tensor) -> Tensor:
            total = torch.zeros(len(rows), dtype=torch.float64)
            for one in groups:
                pre = [clean @ w + b for w, b in one.keys]
                kept = 1.0 if one.kept is None else one.kept
                rest = one.made(*pre[:-1], torch.zeros_like(pre[-1])) * kept
                slope = (one.made(*pre) * kept - rest) / pre[-1]
                up, bias = one.keys[-1]
                total += (rest + slope * (rows @ up + bias)) @ worth(one)
            return total

        def made(p: int, rows: Tensor) -> Tensor:
            return torch.stack([self.coefficients(one, rows) @ worth(one) for one in groups]).sum(0)

        return Reading((layer, "mlp"), (t,), at, made=made)

    def unembed(self, t: int, weights: Tensor) -> Reading:
        """A readout of the final stream."""
        w_u = self.model.get_output_embeddings()
        divided = getattr(self.text, self.where.divided) if self.where.divided else 1.0
        bias = 0.0 if w_u.bias is None else w_u.bias.detach().double()

        def at(p: int, rows: Tensor) -> Tensor:
            return (rows @ w_u.weight.detach().double().T + bias) / divided @ weights

        return Reading((len(self.blocks), "final"), (t,), at)

    # shares

    def seen(self, reading: Reading, grain: str) -> list[Addend]:
        """The writers that a reading hangs on."""
        return [
            replace(one, vector=self.reach(one.vector, one.layer, one.part, reading.stop))
            for p in reading.positions for one in self.addends(grain, p)
            if 2 * one.layer + (one.part == "mlp") < self.place(reading.stop)
        ]  # fmt: skip

    def shares(self, reading: Reading, addends: list[Addend]) -> list[float]:
        """What the reading loses when its reader reads N_s(r - u) in place of N_s(r), for every u alone."""
        return self._each(reading, addends, lambda numbers: numbers[0] - numbers[1:], reading.at, live=False)

    def without(self, reading: Reading, addends: list[Addend], norm: str) -> list[float]:
        """What the reader hands on when it reads N(r - u)."""
        made = reading.made or reading.at
        return self._each(reading, addends, lambda numbers: numbers[1:], made, live=norm == "live")

    def _each(
        self, reading: Reading, addends: list[Addend], taken: Callable[[Tensor], Tensor], made: Any, *, live: bool
    ) -> list[float]:
        found = [0.0] * len(addends)
        for p in reading.positions:
            mine = [i for i, one in enumerate(addends) if one.position == p]
            if mine:
                us = torch.stack([addends[i].vector for i in mine])
                rows = [self.normed(reading.stop, p), self.normed(reading.stop, p, without=us, live=live)]
                for i, number in zip(mine, taken(made(p, torch.cat(rows))).tolist(), strict=True):
                    found[i] = number
        return found

    def clean(self, reading: Reading) -> float:
        """The number as it was."""
        p = reading.positions[0]
        return float(reading.at(p, self.normed(reading.stop, p))[0])

    def handed_on(self, reading: Reading) -> float:
        """What the reader handed on."""
        p = reading.positions[0]
        return float((reading.made or reading.at)(p, self.normed(reading.stop, p))[0])

    def only(self, reading: Reading, kept: list[Addend], norm: str) -> float:
        """What the reader hands on when it reads nothing but some addends."""
        made, total = reading.made or reading.at, self.handed_on(reading)
        for p in reading.positions:
            here = sum((one.vector for one in kept if one.position == p), torch.zeros_like(self.state(reading.stop, p)))
            gone = (self.state(reading.stop, p) - here)[None]
            rows = [self.normed(reading.stop, p), self.normed(reading.stop, p, without=gone, live=norm == "live")]
            clean, left = made(p, torch.cat(rows)).tolist()
            total += left - clean
        return total

    def inner(self, reading: Reading, one: Addend) -> float:
        """u . key, with no norm between the stream and the reader."""
        read = self.normed(reading.stop, one.position)
        clean, more = reading.at(one.position, torch.cat([read, read + one.vector])).tolist()
        return more - clean


def _gated(act: Callable[[Tensor], Tensor], *pre: Tensor) -> Tensor:
    return act(pre[0]) * pre[1] if len(pre) == 2 else act(pre[0])

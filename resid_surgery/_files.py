"""Files written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> Path:
    """Let `write` fill a file beside the target, and move that into place: a half-written one never stands there.

    Args:
        path: the target. write: fills the file that it is given. durable: wait until it is on the disk, and its name
            too, so that it also outlives a loss of power.

    Raises:
        OSError: the folder cannot be written; what stood at `path` is as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        if durable:
            _to_disk(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable and os.name == "posix":
        _to_disk(path.parent)
    return path


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> Path:
    """`whole`, of bytes."""
    return whole(path, lambda part: part.write_bytes(content))


def utf8(text: str) -> bytes:
    """Text as bytes; a lone surrogate, as broken tokens have, becomes the escape ``\\udXXX`` (JSON's own)."""
    return text.encode("utf-8", "backslashreplace")

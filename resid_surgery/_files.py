"""Files written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside the target, and move that into place: a half-written one never stands there.

    Raises:
        OSError: the folder cannot be written; what stood at `path` is as it was.
    """
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def write_whole(path: Path, content: bytes) -> Path:
    """`whole`, of bytes."""
    return whole(path, lambda part: part.write_bytes(content))


def utf8(text: str) -> bytes:
    """Text as bytes; a lone surrogate, as broken tokens have, becomes the escape ``\\udXXX`` (JSON's own)."""
    return text.encode("utf-8", "backslashreplace")

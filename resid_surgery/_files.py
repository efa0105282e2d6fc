"""Files written whole or not at all, and read without trust: regular ones, of bounded size, as strict JSON."""

import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import xxhash

DEEPEST = 64  # levels of JSON inside one another; nothing that is read here has ten
LONGEST_LINE = 1 << 26
BLOCK = 1 << 24


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


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """A regular file (or a link to one), opened to be read in bytes; a pipe is not waited for.

    Args:
        path: of the file. most: the bytes that it may have; None for any number.

    Raises:
        OSError: it cannot be opened, is a folder, pipe or device, or is larger.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a path with a null byte in it
        raise OSError(str(error)) from None
    file = None
    try:
        held = os.fstat(handle)
        if not stat.S_ISREG(held.st_mode):
            raise OSError("it is no regular file but a folder, a pipe or a device")
        if most is not None and held.st_size > most:
            raise OSError(f"it must have at most {most} bytes; it has {held.st_size}")
        file = os.fdopen(handle, "rb")
    finally:
        if file is None:
            os.close(handle)
    return file


def open_text(path: Path, most: int | None) -> BinaryIO:
    """`open_regular`, of a text: what begins with null bytes is none, and is refused before any more of it is read.

    Raises:
        OSError: as of `open_regular`. UnicodeError: it holds null bytes.
    """
    file = open_regular(path, most)
    if b"\0" in file.peek(1):  # type: ignore[attr-defined]
        file.close()
        raise UnicodeError("it holds null bytes, so it is no text in UTF-8")
    return file


def text_lines(path: Path, most: int | None, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a text file, one in memory at a time.

    Raises:
        OSError: as of `open_regular`; a line has more than `longest` bytes. UnicodeError: as of `open_text`.
    """
    with open_text(path, most) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise OSError(f"a line of it has more than {longest} bytes")
            yield line


def read_json(path: Path, most: int, *, strict: bool = True) -> Any:
    """The data of a JSON file; see `parse_json`.

    Raises:
        OSError: as of `open_regular`. ValueError: as of `open_text` and `parse_json`.
    """
    with open_text(path, most) as file:
        return parse_json(file.read(most + 1), strict=strict)


def parse_json(content: bytes | str, *, strict: bool = True) -> Any:
    """The data of a JSON text, with or without a byte order mark.

    Args:
        content: the text. strict: refuse what readers of JSON do not agree on: a key that stands twice in one object,
            and numbers that are none (NaN) or not finite.

    Raises:
        ValueError: it is no UTF-8 or no JSON, is nested deeper than `DEEPEST` levels, or not strict.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _refuse, "parse_float": _finite}
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, **hooks if strict else {})
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [x for one in level for x in (one.values() if isinstance(one, dict) else one)
                 if isinstance(x, (dict, list))]  # fmt: skip
    if level:
        raise ValueError("it is nested too deeply")
    return value


def plain_name(text: object) -> bool:
    """Whether a text names a file of the folder that it stands in, and leads nowhere else."""
    return isinstance(text, str) and Path(text).name == text and text not in ("", "..") and "\0" not in text


def file_hash(path: Path, most: int | None = None) -> str:
    """128-bit hash of a file's bytes, read a block at a time.

    Raises:
        OSError: as of `open_regular`.
    """
    total = xxhash.xxh3_128()
    with open_regular(path, most) as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is too large for a number")
    return value

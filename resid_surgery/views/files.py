"""Writing results: CSV tables and a picture, each file whole or not at all."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from resid_surgery._check import message
from resid_surgery._check import path as path_of
from resid_surgery._files import utf8, whole, write_whole
from resid_surgery.errors import ArgumentError, LoadError
from resid_surgery.evidence.operating import Operated
from resid_surgery.views.plots import plot_grid, plot_stream, pyplot_module
from resid_surgery.views.report import write_report


def check_out(folder: Path, name: str = "--out") -> Path:
    """A folder that can be written, made if need be; refused before any work is done.

    Raises:
        ArgumentError: it is a file, cannot be made or written, or matplotlib is missing.
    """
    pyplot_module()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"`{name}` must be a folder that can be written; {folder}: {error.strerror}.") from None
    return folder


def write_operated(done: Operated, folder: Path, *, interactive: bool = True) -> list[Path]:
    """Every table as CSV, the stream's picture and the page ``report.html``; returns the files written."""
    files = [write_table(folder / f"{name}.csv", table) for name, table in done.tables().items()]
    files.append(_picture(folder / "stream.png", plot_stream(done.stream, marked=done.sites)))
    return [*files, write_report(done, folder / "report.html", interactive=interactive)]


def write_sweep(table: pd.DataFrame, value: str, folder: Path) -> list[Path]:
    """A sweep as CSV, and as a heat map where it has layers; returns the files written."""
    files = [write_table(folder / "sweep.csv", table)]
    if "layer" in table and table["layer"].notna().any():
        files.append(_picture(folder / "sweep.png", plot_grid(table, value)))
    return files


def save_results(
    folder: str | Path,
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Tables as CSV, figures as PNG and texts in one folder, each file whole or not at all.

    Args:
        folder: made if need be. tables: name -> table. figures: name -> Axes or Figure; they are closed. texts: file
            name, with its ending, -> text.

    Returns:
        The files written.

    Raises:
        ArgumentError: the folder cannot be written; a name is no file's name; two files have one; matplotlib cannot
            draw a figure (mathematics in a label that is none, say). LoadError: a file cannot be written.
    """
    figures, texts = {} if figures is None else figures, {} if texts is None else texts
    _require_results(tables, figures, texts)
    place = check_out(path_of("folder", folder, "a folder"), "folder")
    files = [write_table(place / f"{name}.csv", table) for name, table in tables.items()]
    files += [_picture(place / f"{name}.png", drawn) for name, drawn in figures.items()]
    for name, words in texts.items():
        with _written(place / name):
            files.append(write_whole(place / name, utf8(words)))
    return files


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """A table as CSV, whole or not at all.

    Raises:
        LoadError: the file cannot be written.
    """
    with _written(path):
        return whole(path, lambda part: table.to_csv(part, index=False, errors="backslashreplace"))


def _picture(path: Path, drawn: Any) -> Path:
    """A figure, or that of Axes, as PNG; it is closed."""
    figure = getattr(drawn, "figure", drawn)
    try:
        with _written(path):
            return whole(path, lambda part: figure.savefig(part, dpi=150))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ArgumentError(
            f"the figure for {path} cannot be drawn: matplotlib says {str(error).strip()[:200]!r}."
        ) from error
    finally:
        pyplot_module().close(figure)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """In this block a file is written.

    Raises:
        LoadError: that cannot be done.
    """
    try:
        yield
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error.strerror or error}.") from error


def _require_results(tables: Any, figures: Any, texts: Any) -> None:
    """Refuse, before anything is written, what is no results under names of files."""
    kinds: tuple[tuple[str, Any, str, Callable[[Any], bool]], ...] = (
        ("tables", tables, "DataFrames", lambda one: isinstance(one, pd.DataFrame)),
        ("figures", figures, "Axes or Figures", lambda one: hasattr(getattr(one, "figure", one), "savefig")),
        ("texts", texts, "texts", lambda one: isinstance(one, str)),
    )
    for name, given, what, good in kinds:
        if not isinstance(given, Mapping):
            raise ArgumentError(message(name, f"a mapping from names to {what}", given))
        for key, one in given.items():
            if not isinstance(key, str) or key != Path(path_of(name, key, "named as files can be")).name:
                raise ArgumentError(message(name, "named as files can be", key))
            if not good(one):
                raise ArgumentError(message(f"{name}[{key!r}]", f"among {what}", one))
    names = [*(f"{name}.csv" for name in tables), *(f"{name}.png" for name in figures), *texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ArgumentError(message("texts", "named unlike the files of tables and figures", twice[0]))

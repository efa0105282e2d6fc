"""Writing results: CSV tables and a picture, each file whole or not at all."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from resid_surgery._check import message
from resid_surgery._check import path as path_of
from resid_surgery._files import whole
from resid_surgery.errors import ArgumentError
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
    files = []
    for name, table in done.tables().items():
        files.append(whole(folder / f"{name}.csv", lambda path, t=table: t.to_csv(path, index=False)))  # type: ignore[misc]
    axes = plot_stream(done.stream, marked=done.sites)
    figure = axes.figure
    try:
        files.append(whole(folder / "stream.png", lambda path: figure.savefig(path, dpi=150)))  # type: ignore[union-attr]
    finally:
        pyplot_module().close(figure)
    return [*files, write_report(done, folder / "report.html", interactive=interactive)]


def write_sweep(table: pd.DataFrame, value: str, folder: Path) -> list[Path]:
    """A sweep as CSV, and as a heat map where it has layers; returns the files written."""
    files = [whole(folder / "sweep.csv", lambda path: table.to_csv(path, index=False))]
    if "layer" in table and table["layer"].notna().any():
        figure = plot_grid(table, value).figure
        try:
            files.append(whole(folder / "sweep.png", lambda path: figure.savefig(path, dpi=150)))  # type: ignore[union-attr]
        finally:
            pyplot_module().close(figure)
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
        ArgumentError: the folder cannot be written; a name is no file's name.
    """
    figures, texts = {} if figures is None else figures, {} if texts is None else texts
    _require_results(tables, figures, texts)
    place = check_out(path_of("folder", folder, "a folder"), "folder")
    files = [whole(place / f"{name}.csv", lambda path, t=table: t.to_csv(path, index=False))  # type: ignore[misc]
             for name, table in tables.items()]  # fmt: skip
    for name, drawn in figures.items():
        figure = getattr(drawn, "figure", drawn)
        try:
            files.append(whole(place / f"{name}.png", lambda path, f=figure: f.savefig(path, dpi=150)))  # type: ignore[misc]
        finally:
            pyplot_module().close(figure)
    for name, words in texts.items():
        files.append(whole(place / name, lambda path, t=words: path.write_text(t, encoding="utf-8")))  # type: ignore[misc]
    return files


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

"""Exposure: where an edit can do damage, found with one cheap pass of the base over a corpus.

Texts are read in windows, windows of equal length together, and nothing is kept but the most exposed positions, so
memory does not grow with the corpus.
"""

import heapq
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor

from resid_surgery._check import iterable, message, whole
from resid_surgery._check import path as as_path
from resid_surgery._check import progress as check_progress
from resid_surgery._files import parse_json, text_lines
from resid_surgery._progress import progress as progress_bar
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.exposing import Exposer, combined
from resid_surgery.editing.probes import Probe, ProbeSet, probe_set
from resid_surgery.errors import ArgumentError, LoadError, PromptError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import Prompt, bind, encode, token_text

WINDOW = 512
AT_ONCE = 64
BATCH_TOKENS = 1024
COLUMNS = ("text", "position", "token", "token_id", "context", "exposure")


@final
@dataclass(frozen=True)
class _Window:
    """A stretch of one text: `start` is the position of its first token in the text."""

    text: int
    start: int
    ids: tuple[int, ...]


def exposure(
    model: OpenedModel,
    edit: Edit,
    texts: Any,
    *,
    top: int | None = None,
    tokens: int | None = None,
    context: int = 12,
    window: int = WINDOW,
    progress: bool = True,
) -> pd.DataFrame:
    """How strongly an edit acts on each token of a corpus (base model only): |dW k| / |h| at the edited layer.

    For a value row |m| |dv| / |h|, for a scaling |s - 1| |m| |v| / |h|, for a rank-one change |u . k| |v| / |h|, with h
    the stream behind the sublayer in the base. Exact at the lowest edited layer, before a post-norm; see `exposing` for
    other tensors. Several places are combined as the root of the sum of their squares.

    Args:
        model: the base. edit: changes of weights, or scalings of neurons and heads (wherever they act).
        texts: an iterable of texts, probes or token ids, or the path of a file with a text a line (``.jsonl``: a JSON
            object a line, with "text"). It is read once and may be endless where `tokens` is given.
        top: keep the most exposed positions only; memory is then flat. None keeps all.
        tokens: stop after reading so many. context: how many tokens the context shows, the position's own last.
        window: longer texts are read in windows of so many tokens, each by itself. progress: a bar, on a terminal.

    Returns:
        One row a position: text (its index), position, token, token_id, context, exposure, one column a place (its name
        says what it is relative to), unexposable (tensors for which it is not defined, such as norms). With `top` the
        most exposed first, else in reading order.

    Raises:
        ArgumentError: exposure is defined for no tensor of the edit, or an argument is no good.
        PromptError: a text cannot be tokenised. LoadError: the file cannot be read.

    Example:
        >>> import resid_surgery as rs  # doctest: +SKIP
        >>> rs.exposure(model, edit, "corpus.txt", top=20)  # doctest: +SKIP
    """
    check_progress(progress)
    exposer = Exposer(model, edit)
    top, tokens = (
        None if value is None else whole(name, value, 1) for name, value in (("top", top), ("tokens", tokens))
    )
    context = whole("context", context, 1)
    window = min(whole("window", window, 1), model.context or window)
    kept = _Kept(top)
    known = len(texts) if iterable(texts) and isinstance(texts, Sized) else tokens or 0
    with progress_bar("exposure", known, shown=progress is not False and known > 0) as step:
        stream = _capped(_windows(model, texts_of(texts), window), tokens)
        while some := list(itertools.islice(stream, AT_ONCE)):
            for batch in _batches(some):
                kept.add(batch, exposer.by_place(torch.tensor([one.ids for one in batch])))
            step(done=len({one.text for one in some}) if tokens is None else sum(len(one.ids) for one in some))
    return _table(model, kept.rows(), exposer, context)


@final
class _Kept:
    """Positions and their exposures: all of them, or the highest in a heap."""

    def __init__(self, top: int | None) -> None:
        self.top = top
        self.heap: list[tuple[float, int, int, _Window, tuple[float, ...]]] = []

    def add(self, batch: Sequence[_Window], places: Tensor) -> None:
        total = combined(places)
        for row, one in enumerate(batch):
            for at in self._worth(total[row]):
                item = (float(total[row, at]), -one.text, -(one.start + at), one, tuple(places[:, row, at].tolist()))
                if self.top is None:
                    self.heap.append(item)
                elif len(self.heap) < self.top:
                    heapq.heappush(self.heap, item)
                elif item[:3] > self.heap[0][:3]:
                    heapq.heapreplace(self.heap, item)

    def _worth(self, values: Tensor) -> list[int]:
        """Positions that may be among the highest: at most so many of one sequence, and above the lowest kept."""
        if self.top is None:
            return list(range(len(values)))
        floor = self.heap[0][0] if len(self.heap) == self.top else -1.0
        best = values.topk(min(self.top, len(values))).indices.tolist()
        return [at for at in sorted(best) if float(values[at]) >= floor]

    def rows(self) -> list[tuple[float, int, int, _Window, tuple[float, ...]]]:
        if self.top is None:
            return sorted(self.heap, key=lambda item: (-item[1], -item[2]))
        return sorted(self.heap, key=lambda item: item[:3], reverse=True)


def texts_of(texts: Any) -> Iterator[Any]:
    """Texts, probes' texts or token ids, one at a time; of a file its lines.

    Raises:
        ArgumentError: no iterable. LoadError: a file that cannot be read, or a line without a text.
    """
    if isinstance(texts, (str, os.PathLike)):
        yield from _lines(as_path("texts", texts, "an iterable of texts or ids, or the path of a file"))
        return
    if not iterable(texts):
        raise ArgumentError(message("texts", "an iterable of texts or ids, or the path of a file", texts))
    for one in texts:
        yield one.text if isinstance(one, Probe) else one


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file that are not empty; of JSON lines, their texts."""
    try:
        for number, content in enumerate(text_lines(path, None), 1):
            line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                yield _text_in(line, path, number) if path.suffix == ".jsonl" else line.rstrip("\r\n")
    except LoadError:
        raise
    except (OSError, UnicodeError) as error:
        raise LoadError(f"`texts` must be an iterable of texts or a readable file; {path}: {error}.") from error


def _text_in(line: str, path: Path, number: int) -> str:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise LoadError(f"line {number} of {path} is no JSON: {error}.") from error
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str) or not text:
        raise LoadError(f'line {number} of {path} must be an object with a "text", or a text; got {line[:60]!r}.')
    return text


def _windows(model: OpenedModel, texts: Iterable[Any], window: int) -> Iterator[_Window]:
    for i, one in enumerate(texts):
        ids = _ids(model, one)
        for low in range(0, len(ids), window):
            yield _Window(i, low, ids[low : low + window])


def _ids(model: OpenedModel, one: Any) -> tuple[int, ...]:
    """Token ids of one text; a text may be longer than the model's context."""
    if isinstance(one, str):
        if model.tokenizer is None or not one:
            return bind(Prompt(one, target=0), model.tokenizer, model).ids  # says what is wrong
        ids = encode(model.tokenizer, one)
        over = next((i for i in ids if i >= model.vocab_size), None)
        if over is not None or not ids:
            raise PromptError(message("texts", f"texts of tokens below {model.vocab_size}", one, model=model.name))
        return tuple(ids)
    return tuple(whole("texts", i, 0, model.vocab_size - 1, model=model.name) for i in _sequence(one))


def _sequence(one: Any) -> Iterable[Any]:
    given = one.tolist() if isinstance(one, Tensor) and one.device.type != "meta" and not one.is_sparse else one
    if not iterable(given) or isinstance(given, Tensor):
        raise ArgumentError(message("texts", "an iterable of texts, probes or sequences of token ids", one))
    return given


def _capped(windows: Iterator[_Window], tokens: int | None) -> Iterator[_Window]:
    """Windows until so many tokens were read; the last one is cut."""
    left = tokens
    for one in windows:
        if left is not None and len(one.ids) >= left:
            yield _Window(one.text, one.start, one.ids[:left])
            return
        left = None if left is None else left - len(one.ids)
        yield one


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Windows of equal length together; nothing is padded."""
    ordered = sorted(windows, key=lambda one: len(one.ids))
    for length, group in itertools.groupby(ordered, key=lambda one: len(one.ids)):
        members = list(group)
        rows = max(1, BATCH_TOKENS // length)
        yield from (members[low : low + rows] for low in range(0, len(members), rows))


def _table(model: OpenedModel, rows: Sequence[Any], exposer: Exposer, context: int) -> pd.DataFrame:
    left = ", ".join(exposer.unexposable)
    said = [(*_where(model, one, -at, context), total, *places, left) for total, _, at, one, places in rows]
    return pd.DataFrame(said, columns=[*COLUMNS, *exposer.columns, "unexposable"])


def _where(model: OpenedModel, one: _Window, position: int, context: int) -> tuple[int, int, str, int, str]:
    """(text, position, token, token id, context) of a position."""
    at = position - one.start
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())  # a probe of it gets its own
    shown = [i for i in one.ids[max(0, at + 1 - context) : at + 1] if i not in special]
    return one.text, position, token_text(one.ids[at], model.tokenizer), one.ids[at], text_of(model, shown)


def text_of(model: OpenedModel, ids: Sequence[int]) -> str:
    """Token ids as one text; ``#17#4`` where there is no tokenizer."""
    if model.tokenizer is None:
        return "".join(token_text(i, None) for i in ids)
    return str(model.tokenizer.decode(list(ids)))


def exposure_probes(table: pd.DataFrame, *, high: int = 10, middle: int = 10, zero: int = 10) -> ProbeSet:
    """Locality probes from contexts of high, middle and (next to) no exposure, at most one a text while texts last.

    Args:
        table: from `exposure` over all positions (with `top` there are no middle ones). high, middle, zero: how many.

    Returns:
        Probes of the axis "locality" whose text is the context: the highest in the stratum "high exposure"; those
        around the median with the criterion "middle exposure", and the lowest with "zero exposure".

    Raises:
        ArgumentError: it is no such table, or has fewer contexts than asked for.
        PromptError: the contexts are no texts, as of a model without a tokenizer.
    """
    if not isinstance(table, pd.DataFrame) or not {"context", "exposure", "text", "token", "token_id"} <= set(table):
        raise ArgumentError(message("table", "what rs.exposure returns", type(table).__name__))
    counts = [whole(name, n, 0) for name, n in (("high", high), ("middle", middle), ("zero", zero))]
    if len(table) and (table["token"] == "#" + table["token_id"].astype(str)).all():
        raise PromptError(
            "`table` must hold contexts as texts; it is of a model without a tokenizer. Open it with one."
        )
    whole_table = table[table["context"].str.strip() != ""].drop_duplicates("context")
    if len(whole_table) < sum(counts):
        raise ArgumentError(message("table", f"of at least {sum(counts)} distinct contexts", len(whole_table)))
    away = (whole_table["exposure"] - whole_table["exposure"].median()).abs()
    orders = (-whole_table["exposure"], away, whole_table["exposure"])
    probes: list[Probe] = []
    taken: set[Any] = set()
    for n, order, criterion in zip(counts, orders, ("high", "middle", "zero"), strict=True):
        for index in _spread(whole_table, order, taken)[:n]:
            taken.add(index)
            stratum = "high exposure" if criterion == "high" else ""
            text = str(whole_table.at[index, "context"])
            probes.append(Probe("locality", text, stratum=stratum, criterion=f"{criterion} exposure"))
    return probe_set(probes, "exposure")


def _spread(table: pd.DataFrame, order: pd.Series, taken: set[Any]) -> list[Any]:
    """Row labels in order, the first of every text before the second of any; without those taken."""
    left = order[[label not in taken for label in order.index]].sort_values(kind="stable")
    turn = table.loc[left.index, "text"].groupby(table.loc[left.index, "text"]).cumcount()
    return list(turn.sort_values(kind="stable").index)

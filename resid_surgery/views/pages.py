"""Pages: what a report is made of, before it is HTML: controls, charts, and tables that open and close."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import pandas as pd
from markupsafe import Markup

from resid_surgery._html import cell_text, table_html
from resid_surgery.editing.gating import STATES

BESIDE = ("text_before", "text_after")


@final
@dataclass(frozen=True)
class Card:
    """One prompt with what was said before and after."""

    head: tuple[tuple[str, str], ...]
    before: str
    after: str


@final
@dataclass(frozen=True)
class Control:
    """A choice of the reader's: rows of charts and tables that name another value are not shown.

    Attributes:
        name: of the field of rows that it chooses. label: in words. options: value -> its words; the first is chosen.
        note: what it means.
    """

    name: str
    label: str
    options: Mapping[str, str]
    note: str = ""


@final
@dataclass(frozen=True)
class Chart:
    """Points that can be hovered and walked.

    Attributes:
        title, note. spec: Vega-Lite, without its data. rows: one a point: name and tip (label, text) for people, unit
            of what is drawn, the fields that the spec draws, and those that controls choose by.
        more: further data by name.
    """

    title: str
    spec: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Part:
    """A section that opens and closes: a table, or cards.

    Attributes:
        table: with its rows. chosen: columns that controls choose rows by. shown_with: column -> (control, value) that
            it is shown with.
    """

    title: str
    table: pd.DataFrame | None = None
    note: str = ""
    shown: bool = True
    cards: tuple[Card, ...] = ()
    drawings: tuple[Markup, ...] = ()
    chosen: tuple[str, ...] = ()
    shown_with: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def count(self) -> str:
        """How many rows."""
        n = len(self.cards) if self.table is None else len(self.table)
        return f"{n} row{'' if n == 1 else 's'}"

    def left_out(self, limit: int) -> str:
        """What is said where a page holds no more than its first rows or cards; nothing where it holds all."""
        n = len(self.cards) if self.table is None else len(self.table)
        return f"The first {limit} of {n} are in this page; sorting and filters see no others." if n > limit else ""

    def html(self, limit: int, *, exact: bool) -> Markup:
        """Its table; `exact` numbers for sorting stand beside the shown ones."""
        if self.table is None:
            return Markup()
        classes = {str(name): _state_class for name in self.table if str(name).startswith(("state", "verdict"))}
        return Markup(table_html(self.table, limit=limit, classes=classes, exact=exact, chosen=self.chosen,
                                 shown_with=self.shown_with))  # fmt: skip


@final
@dataclass(frozen=True)
class Page:
    """What the template is filled with."""

    title: str
    about: str
    parts: tuple[Part, ...]
    state: str = ""
    line: str = ""
    gates: tuple[Mapping[str, Any], ...] = ()
    controls: tuple[Control, ...] = ()
    charts: tuple[Chart, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the scripts that it needs."""
        return ("charts", "tables") if self.charts else ("tables",)


def part(title: str, table: pd.DataFrame, *, note: str = "", shown: bool = True, **more: Any) -> Part:
    """A table as a section; texts before and after as cards, side by side."""
    if set(BESIDE) <= set(table):
        return Part(title, note=note, shown=shown, cards=tuple(map(_card, table.to_dict("records"))))
    return Part(title, table, note, shown, **more)


def table_page(title: str, about: str, tables: Mapping[str, pd.DataFrame], **more: Any) -> Page:
    """A page of tables."""
    return Page(title, about, tuple(part(name, table) for name, table in tables.items()), **more)


def capitalised(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables under their names as headings."""
    return {name.replace("_", " ").capitalize(): one for name, one in tables.items()}


def with_drawings(one: Part, drawings: tuple[Markup, ...]) -> Part:
    """A section with drawings above its table."""
    return replace(one, drawings=drawings)


def tips(*pairs: tuple[str, Any]) -> list[list[str]]:
    """What a tooltip says: label and text, in order; what is missing is left out."""
    return [[label, text] for label, value in pairs if (text := cell_text(value))]


def _card(row: Mapping[Any, Any]) -> Card:
    told = {str(key): cell_text(value) for key, value in row.items() if key not in BESIDE}
    first = "prompt" if "prompt" in told else next(iter(told), "")
    head = tuple((key, told[key]) for key in dict.fromkeys([first, *told]) if key in told)
    return Card(head, *(cell_text(row[name]) for name in BESIDE))


def _state_class(value: Any) -> str:
    return value if value in STATES else ""

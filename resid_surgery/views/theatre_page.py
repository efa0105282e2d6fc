"""The theatre's page: a thin layer of NiceGUI over `theatre`, one `Page` a browser tab.

The page sends texts and numbers; what they may mean is decided by `theatre`, and work is done in turn by `Line`.
Errors are said beside the field that they are about.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, final

import pandas as pd
from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from resid_surgery.errors import ResidSurgeryError
from resid_surgery.models.opening import OpenedModel
from resid_surgery.views import theatre as play
from resid_surgery.views import theatre_acts as doing
from resid_surgery.views import theatre_tables as tables
from resid_surgery.views.theatre_knobs import Knobs
from resid_surgery.views.theatre_line import Line, SupersededError
from resid_surgery.views.theatre_parts import (
    BARS,
    EDGE,
    NUMBER,
    SIGNED,
    SITE,
    TOKEN,
    Problem,
    entry,
    heading,
    listed,
    quiet,
)
from resid_surgery.views.theatre_recipe import FILE, recipe

STYLE = Path(__file__).with_name("theatre.css")
PAUSE = 0.25  # seconds without a wish before a text is generated
FIRST = "The capital of France is"
KINDS = {"neuron": "neurons", "head_source": "heads, by source", "head": "heads"}
FACES = {"auto": None, "light": False, "dark": True}


def application(model: OpenedModel, load: str, opened: Callable[[], Any]) -> FastAPI:
    """The web application of one model, to be guarded and served.

    Args:
        model: with a tokenizer. load: the expression that opens it. opened: called once it is served.
    """
    line, made = Line(), FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    nicegui_app.on_startup(opened)
    nicegui_app.on_shutdown(line.close)
    ui.page("/")(lambda: Page(model, load, line).build())
    ui.run_with(made, title="resid_surgery: the theatre", dark=None, language="en-US", tailwind=False,
                show_welcome_message=False, reconnect_timeout=10)  # fmt: skip
    return made


@final
class Page:
    """One tab: what it shows, and what its controls do."""

    def __init__(self, model: OpenedModel, load: str, line: Line) -> None:
        self.model, self.load, self.line = model, load, line
        self.stage: play.Stage | None = None
        self.acts, self.marked = doing.Acts(), pd.DataFrame()
        self.plain: Any = 0  # how many tokens of the clean continuation stand there

    # -- what it is made of

    def build(self) -> None:
        """Make the page's elements."""
        ui.add_css(STYLE.read_text(encoding="utf-8"))
        ui.colors(primary="#2167b5")
        ui.on_exception(lambda _: self._tell(None, "That failed unexpectedly; the terminal says why."))
        ui.context.client.on_delete(lambda: self.line.drop(self))
        with ui.header(elevated=False).classes("top"):
            TextElement(tag="h1", text="The theatre")
            ui.label(f"{self.model.name}, {str(self.model.dtype).removeprefix('torch.')}").classes("model")
            self.status = ui.label("").classes("status").props("role=status aria-live=polite data-testid=status")
            self.busy = ui.spinner(size="sm").props("aria-hidden=true")
            self.busy.set_visibility(False)
            dark = ui.dark_mode(None)
            ui.toggle(list(FACES), value="auto", on_change=lambda e: dark.set_value(FACES[e.value])).props(
                "dense unelevated no-caps aria-label=appearance"
            )
        with ui.element("div").classes("stage"):
            self._prompt()
            with ui.element("div").classes("wide"):
                self._stream()
                self._subvalues()
                self._details()
            with ui.element("div").classes("side"):
                self._distribution()
                self._operations()
                self._continuation()

    def _prompt(self) -> None:
        with ui.card().classes("block prompt"):
            heading("Prompt")
            with ui.element("div").classes("fields"):
                self.text = ui.input("Prompt, ending right before the prediction", value=FIRST).classes("grow")
                self.target = ui.input("Target token (empty: the model's first choice)").classes("token-field")
                self.versus = ui.input_chips("Competitors (Enter adds one)", new_value_mode="add-unique")
                self.versus.classes("token-field")
                ui.button("Read", on_click=self.read).props("unelevated no-caps").classes("go")
            for field in (self.text, self.target):
                field.on("keydown.enter", self.read)
            ui.label("A token has its leading space: ' Paris', not 'Paris'.").classes("hint")
            self.tokens = ui.element("ol").classes("tokens").props('aria-label="tokens of the prompt"')

    def _stream(self) -> None:
        with ui.card().classes("block"):
            heading("The stream")
            ui.label("bs-values at the predicting position. Diamonds are located subvalues; the table below has them, "
                     "too.").classes("hint")  # fmt: skip
            self.chart = ui.echart({"series": []}, on_point_click=self._clicked, renderer="svg").classes("chart")
            self.chart.props('data-testid=stream role=img aria-label="bs-values along the stream"')

    def _subvalues(self) -> None:
        with ui.card().classes("block"):
            with ui.element("div").classes("fields"):
                heading("Located subvalues")
                self.kind = ui.toggle(KINDS, value="neuron", on_change=self.find).props("dense unelevated no-caps")
                self.kind.props('aria-label="kind of subvalue"')
                self.site = ui.input("Another: L20.N1297, L12.H4, L12.H4<3").classes("grow")
                self.site.on("keydown.enter", lambda: self.choose(self.site.value))
                quiet("Operate", lambda: self.choose(self.site.value))
            self.unknown = Problem()
            self.found = listed("subvalues", [], "site", [("site", SITE), ("log_prob_increase", NUMBER % 3)])
            self.found.on("choose", lambda e: self.choose(e.args))

    def _details(self) -> None:
        with ui.card().classes("block") as self.details:
            self.chosen = heading("Sources")
            self.spectrum = ui.label("").classes("hint")
            self.refused = ui.label("").classes("hint")
            self.sources = listed("sources", tables.SOURCES, "id", [("edge", EDGE)])
            self.sources.on("sever", lambda e: self.sever(*tables.ends(e.args)))
        self.details.set_visibility(False)

    def _distribution(self) -> None:
        with ui.card().classes("block"):
            heading("Distribution")
            self.said = ui.label("").classes("said").props("data-testid=summary")
            slots = [("token", TOKEN), ("bars", BARS), ("change", SIGNED)]
            slots += [(name, NUMBER % 4) for name in ("prob_before", "prob_after")]
            self.shares = listed("distribution", tables.DISTRIBUTION, "id", slots)
            self.shares.on("pick", lambda e: self.pick(*e.args))
            self.split = listed("split", tables.SPLIT, "id")
            self.split.set_visibility(False)

    def _operations(self) -> None:
        with ui.card().classes("block"):
            with ui.element("div").classes("fields"):
                heading("Operations")
                ui.space()
                quiet("Clear", self.clear)
                quiet("Export as a recipe", self.export)
            self.knobs = Knobs(turned=self.turn, moded=self.mode, gone=self.drop)
            with ui.element("div").classes("fields"):
                self.writer = ui.input("Cut from, such as L20.mlp").classes("grow")
                self.reader = ui.input("as read by, such as L27.N846").classes("grow")
                self.side = ui.select(["all", "query", "key", "value"], value="all", label="side").classes("short")
                quiet("Cut", lambda: self.sever(self.writer.value, self.reader.value, self.side.value))
            self.wrong = Problem()

    def _continuation(self) -> None:
        with ui.card().classes("block"):
            with ui.element("div").classes("fields"):
                heading("Continuation")
                ui.space()
                self.new = ui.number("tokens", value=12, min=1, max=doing.MOST_NEW, step=1, on_change=self.regenerate)
                self.new.classes("short")
            self.unsaid = Problem()
            with ui.element("dl").classes("texts"):
                self.before, self.after = (entry(name) for name in ("clean", "operated"))

    # -- what its controls do

    @contextmanager
    def _telling(self, field: Any = None, failed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Says errors at a field, or in the status line; what a later wish replaced is forgotten."""
        self._tell(field, "")
        self.busy.set_visibility(True)
        try:
            yield
        except ResidSurgeryError as error:
            self._tell(field, str(error))
            failed()
        except SupersededError:
            return
        self.busy.set_visibility(False)

    def _tell(self, field: Any, why: str) -> None:
        if field is None:
            self.status.set_text(why)
        else:
            field.error = why or None

    async def read(self) -> None:
        """Record the prompt that is typed, and show it."""
        text, target, versus = str(self.text.value or ""), str(self.target.value or ""), self.versus.value or ()
        with self._telling():
            wrong = await self.line.ask(self, "read", lambda: play.faults(self.model, text, target, versus))
            for name, field in (("text", self.text), ("target", self.target), ("versus", self.versus)):
                self._tell(field, wrong.get(name, ""))
            if wrong:
                return
            stage = await self.line.ask(self, "read", lambda: play.read(self.model, text, target, versus))
            if self.stage is None or self.stage.rec.prompt.ids != stage.rec.prompt.ids:
                self._forget()
            self.stage = stage
            self._show_prompt(stage)
            await self.find()
            await self.perform()

    def _forget(self) -> None:
        """Of another prompt nothing stays: no operation, no number, no text, no answer that is still to come."""
        for kind in ("about", "measure", "generate"):
            self.line.drop(self, kind)
        self.acts, self.plain, self.marked = doing.Acts(), 0, pd.DataFrame()
        self.details.set_visibility(False)
        for table in (self.found, self.shares, self.split):
            table.rows = []
        for label in (self.said, self.before, self.after):
            label.set_text("")
        for field in (self.unknown, self.wrong, self.unsaid):
            self._tell(field, "")

    async def find(self) -> None:
        """Locate subvalues of the chosen kind."""
        if (stage := self.stage) is None:
            return
        with self._telling(self.unknown, lambda: self._show_found(stage, pd.DataFrame())):
            kind = str(self.kind.value)
            self._show_found(stage, await self.line.ask(self, "find", lambda: play.found(stage, kind)))

    async def choose(self, text: Any) -> None:
        """Give a subvalue a slider, and show what it promotes and what feeds it."""
        if (stage := self.stage) is None:
            return
        with self._telling(self.unknown):
            site = doing.a_site(stage, text)
            if all(one.site != site for one in self.acts.knobs):
                self._set(self.acts.turned(doing.Knob(site)))
            told = await self.line.ask(self, "about", lambda: play.about(stage, site))
            self.chosen.set_text(f"Sources of {site}")
            self.spectrum.set_text(tables.spectrum_text(told))
            self.sources.rows = tables.source_rows(told.sources)
            self.refused.set_text(told.why)
            self.details.set_visibility(True)

    async def turn(self, knob: doing.Knob, value: Any, show: Callable[[float], Any]) -> None:
        """A slider was moved, or its number typed; the other of the two follows."""
        if (stage := self.stage) is None:
            return
        with self._telling(self.wrong):
            number = doing.a_value(value)
            acts = self.acts.turned(replace(knob, value=number))
            if acts != self.acts:
                doing.checked(stage, acts.operations)
                self.acts = acts
                show(number)
                await self.perform()

    async def mode(self, knob: doing.Knob, mode: Any) -> None:
        """A slider is to scale, or to hold a coefficient: it begins where nothing changes."""
        if (stage := self.stage) is not None:
            with self._telling(self.wrong):
                self._set(self.acts.turned(doing.in_mode(stage, knob.site, mode)))
                await self.perform()

    async def sever(self, writer: Any, reader: Any, side: str = "all") -> None:
        """Cut an edge."""
        if (stage := self.stage) is None:
            return
        with self._telling(self.wrong):
            acts = self.acts.cut(doing.a_cut(stage, writer, reader, side))
            doing.checked(stage, acts.operations)
            self._set(acts)
            await self.perform()

    async def drop(self, gone: Any) -> None:
        """Take an operation back."""
        self._set(self.acts.without(gone))
        await self.perform()

    async def clear(self) -> None:
        """Take all operations back."""
        self._set(doing.Acts())
        await self.perform()

    async def pick(self, role: Any, token: Any) -> None:
        """Make a listed token the target or a competitor."""
        with self._telling():
            text = play.picked(self.model, token)
            if role == "target":
                self.target.set_value(text)
                self.versus.set_value([one for one in self.versus.value if one != text])
            else:
                self.versus.set_value(list(dict.fromkeys([*self.versus.value, text])))
            if role == "versus" and self.stage is not None and not self.target.value:
                p = self.stage.rec.prompt  # the target that is shown stays the target
                self.target.set_value(p.names[p.target])
            await self.read()

    async def perform(self) -> None:
        """Run the operations, show the distribution, and generate anew."""
        if (stage := self.stage) is None:
            return
        self.line.drop(self, "generate")
        with self._telling():
            begin, operations = perf_counter(), self.acts.operations
            outcome = await self.line.ask(self, "measure", lambda: doing.measured(stage, operations))
            self._show(outcome)
            self.status.set_text(f"answered in {1000 * (perf_counter() - begin):.0f} ms")
            await self.regenerate()

    async def regenerate(self) -> None:
        """Generate the clean and the operated continuation, in idle time."""
        if (stage := self.stage) is None or self.new.value is None:
            return
        with self._telling(self.unsaid):
            operations, number = self.acts.operations, doing.a_length(self.new.value)
            if self.plain != number:
                await self._generate(stage, (), number, self.before)
                self.plain = number
            if operations:
                await self._generate(stage, operations, number, self.after)
            else:
                self.after.set_text(self.before.text)

    async def export(self) -> None:
        """Hand the recipe to the browser; nothing is written here."""
        if (stage := self.stage) is None:
            return
        with self._telling(self.unsaid):
            operations, new = self.acts.operations, doing.a_length(self.new.value)
            outcome = await self.line.ask(self, "export", lambda: doing.measured(stage, operations))
            ui.download.content(recipe(stage, operations, outcome, new, self.load), FILE, "text/x-python")

    # -- what it shows

    async def _generate(self, stage: play.Stage, operations: Sequence[Any], new: int, label: ui.label) -> None:
        loop = asyncio.get_running_loop()

        def work(stop: Callable[[], bool]) -> str:
            def tell(text: str) -> bool:
                loop.call_soon_threadsafe(label.set_text, text)
                return stop()

            return doing.continued(stage, operations, new, tell=tell)

        label.set_text(await self.line.ask_patiently(self, "generate", work, pause=PAUSE))

    def _set(self, acts: doing.Acts) -> None:
        self.acts = acts
        if self.stage is not None:
            self.knobs.show(self.stage, acts)

    def _clicked(self, event: Any) -> Any:
        return self.choose(event.name) if event.series_name == tables.MARK else None

    def _show_prompt(self, stage: play.Stage) -> None:
        self.tokens.clear()
        with self.tokens:
            for i, token in enumerate(stage.rec.prompt.tokens):
                kind = "token at" if i == stage.rec.prompt.position else "token"
                TextElement(tag="li", text=repr(token)).classes(kind).props(f"title=position-{i}")
        self.knobs.show(stage, self.acts)
        self._draw(stage)

    def _draw(self, stage: play.Stage) -> None:
        self.chart.options.clear()
        self.chart.options.update(tables.stream_chart(stage, self.marked if len(self.marked) else None))
        self.chart.update()

    def _show_found(self, stage: play.Stage, marked: pd.DataFrame) -> None:
        self.marked, self.found.columns = marked, tables.found_columns(stage)
        for name in play.readout_columns(stage):
            self.found.add_slot(f"body-cell-{name}", NUMBER % 2)
        self.found.rows = tables.found_rows(stage, marked)
        self._draw(stage)

    def _show(self, outcome: doing.Outcome) -> None:
        self.said.set_text(tables.summary(outcome))
        self.shares.rows = tables.distribution_rows(outcome)
        self.split.rows = tables.split_rows(outcome)
        self.split.set_visibility(bool(self.split.rows))

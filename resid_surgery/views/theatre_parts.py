"""Parts that the theatre's page is made of. Templates are constants: what they show comes to them as data, as text."""

from collections.abc import Callable, Sequence
from typing import Any, final

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

SITE = """<q-td :props="props"><q-btn dense flat no-caps class="site" :label="props.value"
  :aria-label="'operate on ' + props.value" @click="$parent.$emit('choose', props.row.site)" /></q-td>"""
NUMBER = """<q-td :props="props">{{ props.value.toFixed(%d) }}</q-td>"""
SIGNED = """<q-td :props="props">{{ (props.value > 0 ? '+' : '') + props.value.toFixed(2) }}</q-td>"""
TOKEN = """<q-td :props="props"><span class="token">{{ props.value }}</span>
  <span v-if="props.row.role" class="role">{{ props.row.role }}</span><span v-else class="picks">
  <q-btn dense flat no-caps size="sm" label="target" :aria-label="'make ' + props.value + ' the target'"
    @click="$parent.$emit('pick', ['target', props.row.id])" />
  <q-btn dense flat no-caps size="sm" label="versus" :aria-label="'make ' + props.value + ' a competitor'"
    @click="$parent.$emit('pick', ['versus', props.row.id])" /></span></q-td>"""
BARS = """<q-td :props="props"><div class="bars" aria-hidden="true">
  <div class="bar before" :style="{width: props.row.wide_before + '%'}"></div>
  <div class="bar after" :style="{width: props.row.wide_after + '%'}"></div></div></q-td>"""
EDGE = """<q-td :props="props"><q-btn dense outline no-caps size="sm" label="cut" :aria-label="'cut ' + props.value"
  @click="$parent.$emit('sever', props.value)" /></q-td>"""


def heading(text: str) -> TextElement:
    """A block's heading."""
    return TextElement(tag="h2", text=text)


def entry(name: str) -> ui.label:
    """A term and an empty text that describes it, of a list of them."""
    TextElement(tag="dt", text=name)
    with ui.element("dd"):
        return ui.label("").classes("continued").props(f"data-testid=continued-{name}")


def listed(name: str, columns: list[dict[str, Any]], key: str, slots: Sequence[tuple[str, str]] = ()) -> ui.table:
    """An empty table with templates for some of its cells."""
    made = ui.table(rows=[], columns=columns, row_key=key).classes(f"table {name}")
    for column, template in slots:
        made.add_slot(f"body-cell-{column}", template)
    return made.props(f'flat dense hide-no-data data-testid={name} role=region aria-label="{name}"')


@final
class Problem:
    """A line under controls that says what is wrong with them; nothing where nothing is."""

    def __init__(self) -> None:
        self.label = ui.label("").classes("problem").props("role=alert")
        self.error = None

    @property
    def error(self) -> str | None:
        """What it says."""
        return self.label.text or None

    @error.setter
    def error(self, why: str | None) -> None:
        self.label.set_text(why or "")
        self.label.set_visibility(bool(why))


def quiet(text: str, on_click: Callable[[], Any]) -> ui.button:
    """A button beside others."""
    return ui.button(text, on_click=on_click, color=None).props("outline dense no-caps").classes("quiet")


@final
class Range:
    """The browser's own slider, which keyboards and screen readers know.

    Its value belongs to the browser: it is given once, as an attribute, and afterwards set only where another control
    changed it, so that nothing pulls at a slider that is being dragged.
    """

    def __init__(self, low: float, high: float, step: float, value: float, name: str) -> None:
        self.element = ui.element("input").classes("range grow")
        given = {"type": "range", "min": low, "max": high, "step": round(step, 6), "^value": value, "aria-label": name}
        self.element.props.update(given)

    def listen(self, told: Callable[[Any], Any]) -> None:
        """Call back with each value while it is dragged, twenty times a second at most."""
        self.element.on(
            "input", lambda e: told(e.args), js_handler="(e) => emit(e.target.valueAsNumber)", throttle=0.05
        )

    def show(self, value: float) -> None:
        """Move it."""
        ui.run_javascript(f"getHtmlElement({self.element.id}).value = {float(value)!r}")

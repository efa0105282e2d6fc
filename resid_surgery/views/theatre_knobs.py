"""The theatre's sliders and cuts: a row an operation, with its controls."""

from collections.abc import Callable
from functools import partial
from typing import Any, final

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from resid_surgery.sites import Neuron
from resid_surgery.views.theatre import Stage
from resid_surgery.views.theatre_acts import MODES, Acts, Knob, span
from resid_surgery.views.theatre_parts import Range

STEPS = 120


@final
class Knobs:
    """The list of operations; its rows are made anew when one comes or goes, not while one is turned.

    Attributes:
        turned: called with a knob, its new value, and a function that shows the value on the knob's other control.
        moded: with a knob and its new mode. gone: with a site or a cut.
    """

    def __init__(
        self,
        *,
        turned: Callable[[Knob, Any, Callable[[float], Any]], Any],
        moded: Callable[[Knob, Any], Any],
        gone: Callable[[Any], Any],
    ) -> None:
        self.turned, self.moded, self.gone = turned, moded, gone
        self.rows = ui.element("ul").classes("knobs").props('data-testid=operations aria-label="operations"')

    def show(self, stage: Stage, acts: Acts) -> None:
        """Show these operations."""
        self.rows.clear()
        with self.rows:
            for knob in acts.knobs:
                self._knob(stage, knob)
            for cut in acts.cuts:
                self._row(f"cut {cut.sites[0]}", cut)
            if not (acts.knobs or acts.cuts):
                TextElement(tag="li", text="None yet: choose a subvalue, or cut an edge.").classes("hint")

    def _row(self, said: str, gone: Any, controls: Callable[[], Any] = lambda: None) -> None:
        with ui.element("li").classes("knob"):
            TextElement(tag="span", text=said).classes("site")
            controls()
            button = ui.button(icon="close", on_click=partial(self.gone, gone), color=None).classes("remove")
            button.props(f'flat dense round size=sm aria-label="remove {said}"')

    def _knob(self, stage: Stage, knob: Knob) -> None:
        self._row(str(knob.site), knob.site, lambda: self._controls(stage, knob))

    def _controls(self, stage: Stage, knob: Knob) -> None:
        low, high = span(stage, knob)
        if isinstance(knob.site, Neuron):
            mode = ui.select(list(MODES), value=knob.mode).props(f'dense aria-label="mode of {knob.site}"')
            mode.on_value_change(lambda e: self.moded(knob, e.value))
        else:
            TextElement(tag="span", text=knob.mode)
        slider = Range(low, high, (high - low) / STEPS, knob.value, f"{knob.mode} {knob.site}")
        number = (
            ui.number(value=knob.value, step=0.1).props(f'dense aria-label="value of {knob.site}"').classes("short")
        )
        slider.listen(lambda value: self.turned(knob, value, number.set_value))
        number.on_value_change(lambda e: None if e.value is None else self.turned(knob, e.value, slider.show))

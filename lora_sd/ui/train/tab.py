"""The Train tab: its form on the left, the run on the right."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.ui.train.events import wire_train_form
from lora_sd.ui.train.form import TrainForm, build_train_form
from lora_sd.ui.train.handlers import TrainHandlers
from lora_sd.ui.train.run_panel import RunPanel, build_run_panel


@dataclass(frozen=True)
class TrainTab:
    """What other parts of the page need of this tab.

    Attributes:
        loaded, opened: arguments of the events for when the page is loaded, and when this tab is
            opened.
    """

    form: TrainForm
    panel: RunPanel
    loaded: dict[str, Any]
    opened: dict[str, Any]

    @property
    def data_set(self) -> Component:
        """The choice of a data set; its value is the data set's id, and may be set to another."""
        return self.form.fields["data.folder"]

    @property
    def to_pictures(self) -> gr.Button:
        """The button that leads to the data set's pictures and captions."""
        return self.form.to_pictures


def build_train_tab(handlers: TrainHandlers) -> TrainTab:
    """Lay out and wire the tab inside the current Blocks."""
    with gr.Row(equal_height=False, elem_classes="two-sides"):
        with gr.Column(scale=5, min_width=320, elem_classes="form-side"):
            form = build_train_form(handlers)
        with gr.Column(scale=6, min_width=320, elem_classes="run-side"):
            panel = build_run_panel(handlers.running, form.start)
    return TrainTab(form, panel, *wire_train_form(form, panel, handlers))

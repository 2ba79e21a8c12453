"""The parts of the page that show samples, on the run panel and on the Compare tab."""

import gradio as gr

from lora_sd.ui.texts import say


def build_gallery(elem_id: str, columns: int) -> gr.Gallery:
    """Where samples are shown, with what they show below them; hidden until there are some."""
    return gr.Gallery(
        show_label=False,
        columns=columns,
        height="auto",
        format="webp",
        buttons=["fullscreen"],
        interactive=False,
        visible=False,
        elem_id=elem_id,
        elem_classes="captioned",
    )


def build_step_slider(elem_id: str) -> gr.Slider:
    """Chooses the step whose samples are shown; hidden until there are two."""
    return gr.Slider(
        0, 1, 0, step=1, label=say("run.samples_of"), visible=False, elem_id=elem_id, buttons=[]
    )

"""The Generate tab: an adapter, a scale, a prompt; the picture without and with it.

What its parts do is in generate_events.py.
"""

from dataclasses import dataclass

import gradio as gr

from lora_sd.ui.generate.handlers import MOST_SCALE, MOST_STEPS

EMPTY = (
    '<section class="empty"><svg viewBox="0 0 64 40" aria-hidden="true">'
    '<path d="M14 4 H50 V36 H14 Z M32 2 V38 M27 20 l-4 -3 M27 20 l-4 3 M37 20 l4 -3 M37 20 l4 3"/>'
    "</svg><h3>Before and after</h3><p>Choose an adapter, describe a picture, and press "
    "<b>Generate</b>. You see the same picture without the adapter and with it, and slide "
    "between the two.</p></section>"
)
NOTHING = "No adapters yet. Train one on the Train tab, or add a file below."

STRIP_TITLE = "<h3>The same picture at rising scales</h3>"


@dataclass(frozen=True)
class GenerateTab:
    """The tab's parts."""

    adapter: gr.Dropdown
    scale: gr.Slider
    download: gr.DownloadButton
    base: gr.Textbox
    file: gr.File
    file_problems: gr.HTML
    prompt: gr.Textbox
    seed: gr.Number
    dice: gr.Button
    negative: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    problems: gr.HTML
    draw: gr.Button
    strip: gr.Button
    cancel: gr.Button
    empty: gr.HTML
    pair: gr.ImageSlider
    said: gr.HTML
    strip_title: gr.HTML
    strip_picture: gr.Image
    has_pair: gr.State
    seen: gr.State
    """The newest result when the adapter was chosen, as `GenerateHandlers.to_choose` takes it."""


def build_generate_tab() -> GenerateTab:
    """Lay out the tab inside the current Blocks."""
    with gr.Row(equal_height=False, elem_classes="two-sides"):
        with gr.Column(scale=5, min_width=320, elem_classes="form-side"):
            gr.HTML("<h2>Your adapter</h2>", elem_classes="heading")
            adapter = gr.Dropdown(
                [], label="Adapter", info=NOTHING, allow_custom_value=True, elem_id="adapter"
            )
            scale = gr.Slider(
                0,
                MOST_SCALE,
                1.0,
                step=0.05,
                label="Scale",
                info="How strongly the adapter acts: 0 is the base alone, 1 as it was trained.",
                elem_id="scale",
            )
            download = gr.DownloadButton(
                "Download this adapter", size="md", visible=False, elem_id="download"
            )
            with gr.Accordion("Add a file from elsewhere", open=False):
                base = gr.Textbox(
                    "tiny-sd", label="The base model it was made for", elem_id="upload-base"
                )
                file = gr.File(
                    file_types=[".safetensors"],
                    label="Adapter file (.safetensors)",
                    height=110,
                    elem_id="adapter-file",
                )
                file_problems = gr.HTML()
            gr.HTML("<h2>The picture</h2>", elem_classes="heading")
            prompt = gr.Textbox(
                label="Prompt", lines=2, placeholder="a fox, ink drawing", elem_id="prompt"
            )
            with gr.Row(elem_classes="seed-row"):
                seed = gr.Number(0, label="Seed", scale=3, min_width=120, elem_id="seed")
                dice = gr.Button("Another seed", scale=2, min_width=120, elem_id="dice")
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", elem_id="negative")
                with gr.Row():
                    steps = gr.Slider(
                        1,
                        MOST_STEPS,
                        25,
                        step=1,
                        label="Denoising steps",
                        elem_id="denoising-steps",
                    )
                    guidance = gr.Slider(0, 20, 7.5, step=0.5, label="Guidance", elem_id="guidance")
            problems = gr.HTML(elem_id="generate-problems")
            with gr.Row():
                draw = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                strip = gr.Button("Strip of scales", size="lg", elem_id="strip")
            cancel = gr.Button("Cancel", visible=False, elem_id="cancel")
        with gr.Column(scale=6, min_width=320, elem_classes="picture-side"):
            empty = gr.HTML(EMPTY)
            pair = gr.ImageSlider(
                label="Before and after",
                format="png",
                type="pil",
                interactive=False,
                visible=False,
                show_label=False,
                max_height=640,
                elem_id="pair",
            )
            said = gr.HTML(visible=False, elem_id="pair-caption")
            strip_title = gr.HTML(STRIP_TITLE, visible=False, elem_classes="part-title")
            strip_picture = gr.Image(
                show_label=False,
                format="png",
                interactive=False,
                visible=False,
                buttons=["fullscreen", "download"],
                elem_id="strip-picture",
            )
    return GenerateTab(
        adapter=adapter,
        scale=scale,
        download=download,
        base=base,
        file=file,
        file_problems=file_problems,
        prompt=prompt,
        seed=seed,
        dice=dice,
        negative=negative,
        steps=steps,
        guidance=guidance,
        problems=problems,
        draw=draw,
        strip=strip,
        cancel=cancel,
        empty=empty,
        pair=pair,
        said=said,
        strip_title=strip_title,
        strip_picture=strip_picture,
        has_pair=gr.State(False),
        seen=gr.State(),
    )

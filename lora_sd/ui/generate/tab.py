"""The Generate tab: adapters, their scales, a prompt; the picture without and with them.

What its parts do is in events.py.
"""

from dataclasses import dataclass

import gradio as gr

from lora_sd.schedulers import SCHEDULERS
from lora_sd.ui.generate.grid import ROWS, SCALES
from lora_sd.ui.generate.request import (
    LEAST_PX,
    MOST_ADAPTERS,
    MOST_GUIDANCE,
    MOST_PART,
    MOST_SCALE,
    MOST_STEPS,
    PARTS,
)
from lora_sd.ui.texts import say

_PICTURE = (
    '<svg viewBox="0 0 64 40" aria-hidden="true">'
    '<path d="M14 4 H50 V36 H14 Z M32 2 V38 M27 20 l-4 -3 M27 20 l-4 3 M37 20 l4 -3 M37 20 l4 3"/>'
    "</svg>"
)


@dataclass(frozen=True)
class AdapterRow:
    """The fields of one adapter; `remove` is None for the first, which stays."""

    group: gr.Group
    adapter: gr.Dropdown
    scale: gr.Slider
    linear: gr.Slider
    conv: gr.Slider
    text_encoder: gr.Slider
    remove: gr.Button | None

    @property
    def scales(self) -> list[gr.Slider]:
        """All that can be slid."""
        return [self.scale, self.linear, self.conv, self.text_encoder]


@dataclass(frozen=True)
class GenerateTab:
    """The tab's parts."""

    adapters: list[AdapterRow]
    add: gr.Button
    download: gr.DownloadButton
    prompt: gr.Textbox
    seed: gr.Number
    dice: gr.Button
    count: gr.Number
    negative: gr.Textbox
    width: gr.Number
    height: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    scheduler: gr.Dropdown
    base: gr.Dropdown
    from_picture: gr.UploadButton
    picture_problems: gr.HTML
    problems: gr.HTML
    draw: gr.Button
    cancel: gr.Button
    rows: gr.Radio
    scales: gr.Textbox
    row_prompts: gr.Textbox
    row_adapters: gr.Dropdown
    draw_grid: gr.Button
    grid_problems: gr.HTML
    empty: gr.HTML
    pair: gr.ImageSlider
    said: gr.HTML
    bring_back: gr.Button
    history_title: gr.HTML
    history: gr.Gallery
    grid_title: gr.HTML
    grid: gr.Image
    has_pair: gr.State
    kept: gr.State
    """What the history shows, newest first, as `events.Kept`."""
    shown: gr.State
    """The settings of the picture that the pair shows."""
    seen: gr.State
    """The newest result when the adapter was chosen, as `GenerateHandlers.to_choose` takes it."""

    @property
    def first(self) -> AdapterRow:
        """The first adapter's fields."""
        return self.adapters[0]


def build_generate_tab() -> GenerateTab:
    """Lay out the tab inside the current Blocks."""
    with gr.Row(equal_height=False, elem_classes="two-sides"):
        with gr.Column(scale=5, min_width=320, elem_classes="form-side"):
            gr.HTML(f"<h2>{say('generate.adapters_title')}</h2>", elem_classes="heading")
            adapters = [_adapter_row(number) for number in range(1, MOST_ADAPTERS + 1)]
            with gr.Row():
                add = gr.Button(
                    say("generate.add"), size="md", min_width=140, elem_id="add-adapter"
                )
                download = gr.DownloadButton(
                    say("generate.download"),
                    size="md",
                    min_width=140,
                    visible=False,
                    elem_id="download",
                )
            gr.HTML(f"<h2>{say('generate.picture_title')}</h2>", elem_classes="heading")
            prompt = gr.Textbox(
                label=say("generate.prompt"),
                lines=2,
                placeholder=say("generate.prompt_example"),
                elem_id="prompt",
            )
            with gr.Row(elem_classes="seed-row"):
                seed = gr.Number(
                    0, label=say("generate.seed"), scale=3, min_width=100, elem_id="seed"
                )
                dice = gr.Button(say("generate.dice"), scale=2, min_width=100, elem_id="dice")
                count = gr.Number(
                    1,
                    label=say("generate.count"),
                    scale=2,
                    min_width=90,
                    elem_id="count",
                )
            with gr.Accordion(say("generate.more"), open=False, elem_id="more-settings"):
                negative = gr.Textbox(
                    label=say("generate.negative"),
                    info=say("generate.negative_help"),
                    elem_id="negative",
                )
                with gr.Row(elem_classes="level"):
                    width, height = (
                        gr.Number(
                            0,
                            step=LEAST_PX,
                            label=say(f"generate.{side}"),
                            info=say("generate.size_help"),
                            min_width=120,
                            elem_id=side,
                        )
                        for side in ("width", "height")
                    )
                with gr.Row():
                    steps = gr.Slider(
                        1,
                        MOST_STEPS,
                        25,
                        step=1,
                        label=say("generate.steps"),
                        min_width=150,
                        elem_id="denoising-steps",
                    )
                    guidance = gr.Slider(
                        0,
                        MOST_GUIDANCE,
                        7.5,
                        step=0.5,
                        label=say("generate.guidance"),
                        min_width=150,
                        elem_id="guidance",
                    )
                scheduler = gr.Dropdown(
                    [(say("generate.scheduler_own"), ""), *((one, one) for one in SCHEDULERS)],
                    value="",
                    label=say("generate.scheduler"),
                    elem_id="scheduler",
                )
                base = gr.Dropdown(
                    [(say("generate.base_own"), "")],
                    value="",
                    allow_custom_value=True,
                    label=say("generate.base"),
                    info=say("generate.base_help"),
                    elem_id="draw-base",
                )
                from_picture = gr.UploadButton(
                    say("generate.from_picture"),
                    file_types=[".png"],
                    size="md",
                    elem_id="from-picture",
                )
                picture_problems = gr.HTML(elem_id="picture-problems")
            problems = gr.HTML(elem_id="generate-problems")
            draw = gr.Button(say("generate.draw"), variant="primary", size="lg", elem_id="generate")
            cancel = gr.Button(say("generate.cancel"), visible=False, elem_id="cancel")
            with gr.Accordion(say("generate.grid_title"), open=False, elem_id="grid-settings"):
                rows = gr.Radio(
                    [(say(f"generate.rows_{one}"), one) for one in ROWS],
                    value=ROWS[0],
                    label=say("generate.rows"),
                    info=say("generate.rows_help"),
                    elem_id="grid-rows",
                )
                row_prompts = gr.Textbox(
                    label=say("generate.row_prompts"),
                    lines=3,
                    visible=False,
                    elem_id="row-prompts",
                )
                row_adapters = gr.Dropdown(
                    [],
                    multiselect=True,
                    allow_custom_value=True,
                    visible=False,
                    label=say("generate.row_adapters"),
                    elem_id="row-adapters",
                )
                scales = gr.Textbox(
                    SCALES,
                    label=say("generate.scales"),
                    info=say("generate.scales_help"),
                    elem_id="grid-scales",
                )
                grid_problems = gr.HTML(elem_id="grid-problems")
                draw_grid = gr.Button(say("generate.draw_grid"), size="lg", elem_id="draw-grid")
        with gr.Column(scale=6, min_width=320, elem_classes="picture-side"):
            empty = gr.HTML(
                f'<section class="empty">{_PICTURE}<h3>{say("generate.empty_title")}</h3>'
                f"<p>{say('generate.empty')}</p></section>"
            )
            pair = gr.ImageSlider(
                label=say("generate.pair"),
                format="png",
                type="pil",
                interactive=False,
                visible=False,
                show_label=False,
                max_height=640,
                elem_id="pair",
            )
            said = gr.HTML(visible=False, elem_id="pair-caption")
            bring_back = gr.Button(
                say("generate.bring_back"), size="md", visible=False, elem_id="bring-back"
            )
            history_title = gr.HTML(
                f"<h3>{say('generate.history')}</h3>"
                f'<p class="hint">{say("generate.history_help")}</p>',
                visible=False,
                elem_classes="part-title",
            )
            history = gr.Gallery(
                label=say("generate.history"),
                show_label=False,
                columns=6,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                visible=False,
                elem_id="history",
            )
            grid_title = gr.HTML(
                f"<h3>{say('generate.grid_picture')}</h3>",
                visible=False,
                elem_classes="part-title",
            )
            grid = gr.Image(
                label=say("generate.grid_picture"),
                show_label=False,
                format="png",
                type="pil",
                interactive=False,
                visible=False,
                buttons=["fullscreen", "download"],
                elem_id="scale-grid",
            )
    return GenerateTab(
        adapters=adapters,
        add=add,
        download=download,
        prompt=prompt,
        seed=seed,
        dice=dice,
        count=count,
        negative=negative,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        base=base,
        from_picture=from_picture,
        picture_problems=picture_problems,
        problems=problems,
        draw=draw,
        cancel=cancel,
        rows=rows,
        scales=scales,
        row_prompts=row_prompts,
        row_adapters=row_adapters,
        draw_grid=draw_grid,
        grid_problems=grid_problems,
        empty=empty,
        pair=pair,
        said=said,
        bring_back=bring_back,
        history_title=history_title,
        history=history,
        grid_title=grid_title,
        grid=grid,
        has_pair=gr.State(False),
        kept=gr.State([]),
        shown=gr.State(),
        seen=gr.State(),
    )


def _adapter_row(number: int) -> AdapterRow:
    end = "" if number == 1 else f"-{number}"
    name = say("generate.adapter") if number == 1 else say("generate.nth", number=number)
    with gr.Group(visible=number == 1, elem_classes="adapter-row") as group:
        adapter = gr.Dropdown(
            [],
            label=name,
            info=say("generate.nothing") if number == 1 else None,
            allow_custom_value=True,
            elem_id=f"adapter{end}",
        )
        scale = gr.Slider(
            0,
            MOST_SCALE,
            1.0,
            step=0.05,
            label=say("generate.scale"),
            info=say("generate.scale_help") if number == 1 else None,
            elem_id=f"scale{end}",
        )
        with gr.Accordion(say("generate.parts"), open=False, elem_id=f"parts{end}"):
            if number == 1:
                gr.HTML(f'<p class="hint">{say("generate.parts_help")}</p>')
            linear, conv, text_encoder = (
                gr.Slider(
                    0,
                    MOST_PART,
                    1.0,
                    step=0.05,
                    label=say(f"generate.{part}"),
                    elem_id=f"{part.replace('_', '-')}{end}",
                )
                for part in PARTS
            )
        remove = (
            gr.Button(say("generate.remove"), size="sm", elem_id=f"remove{end}")
            if number > 1
            else None
        )
    return AdapterRow(group, adapter, scale, linear, conv, text_encoder, remove)

"""The Train tab: its form on the left; the run on the right is in run_panel.py."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.ui import fields
from lora_sd.ui.data import pictures
from lora_sd.ui.data.report import build_data_report, wire_data_report
from lora_sd.ui.show import layers_html, sentences_html, thumbs_html
from lora_sd.ui.train.family_settings import follow
from lora_sd.ui.train.handlers import Shown, TrainHandlers
from lora_sd.ui.train.more_settings import build_more_settings
from lora_sd.ui.train.run_panel import RunPanel, build_run_panel


@dataclass(frozen=True)
class TrainTab:
    """What other parts of the page need of this tab."""

    panel: RunPanel


def build_train_tab(handlers: TrainHandlers) -> TrainTab:
    """Lay out the tab inside the current Blocks."""
    config = handlers.starting_config()
    values = fields.form_values(config, fields.FIELDS)
    form: dict[str, Component] = {}

    def add(name: str, **options: Any) -> None:
        form[name] = fields.component(name, values[name], **options)

    with gr.Row(equal_height=False, elem_classes="two-sides"):
        with gr.Column(scale=5, min_width=320, elem_classes="form-side"):
            gr.HTML("<h2>1. Your pictures</h2>", elem_classes="heading")
            source = gr.Radio(
                [("Use a folder", "folder"), ("Upload pictures", "upload")],
                value="folder",
                show_label=False,
                container=False,
                elem_classes="segments",
                elem_id="source",
            )
            offered = handlers.folders()
            with gr.Column(elem_classes="snug") as folder_side:
                folder = gr.Dropdown(
                    [(one.label, one.id) for one in offered],
                    value=offered[0].id if offered else None,
                    label="Folder of pictures",
                    allow_custom_value=True,
                    elem_id="folder",
                )
                thumbs = gr.HTML()
            with gr.Column(visible=False, elem_classes="snug") as upload_side:
                files = gr.File(
                    file_count="multiple",
                    label="Pictures, captions (fox.txt or .caption), masks (fox-mask.png)",
                    height=170,
                    elem_id="files",
                )
                upload_thumbs = gr.HTML()
                table = gr.Dataframe(
                    headers=["Picture", "Caption"],
                    datatype=["str", "str"],
                    type="array",
                    column_count=2,
                    static_columns=[0],
                    column_widths=["32%", "68%"],
                    interactive=True,
                    visible=False,
                    max_height=260,
                    label="Captions: press one to change it",
                    elem_id="captions",
                )
                data_name = gr.Textbox(
                    label="Name of the data set",
                    placeholder="my-cat",
                    info="The pictures are kept under this name for the next run.",
                    elem_id="data-name",
                )
            mask_note = gr.HTML(visible=False, elem_id="mask-note")
            with gr.Row(elem_classes="level"):
                add("data.trigger_word", placeholder="none")
                add("data.caption", info=False, placeholder="a photo of my cat", visible=False)
            data_report = build_data_report()
            gr.HTML("<h2>2. What to train</h2>", elem_classes="heading")
            with gr.Row():
                add("output.name", info=False, placeholder="as the pictures")
                add("base.model", info=False)
            base_note = gr.HTML(visible=False, elem_id="base-note")
            with gr.Row(elem_classes="tips"):
                add("train.steps", min_width=90)
                add("optimizer.learning_rate", min_width=90)
                add("train.batch_size", min_width=90)
                add("adapter.rank", min_width=90)
                add("data.resolution_px", min_width=90)
                add("train.seed", min_width=90)
            add("sample.prompts", lines=3)
            with gr.Accordion("More settings", open=False, elem_id="more"):
                build_more_settings(add)
            look_at_layers = gr.Button("Show which layers learn", size="md", elem_id="show-layers")
            layers = gr.HTML(elem_id="layers")
            with gr.Column(elem_classes="start-bar"):
                problems = gr.HTML(elem_id="problems")
                start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
        with gr.Column(scale=6, min_width=320, elem_classes="run-side"):
            panel = build_run_panel(handlers)

    names = {part: name for name, part in form.items()}
    caption, masks, prompts = form["data.caption"], form["data.masks"], form["sample.prompts"]
    masks_there = gr.State(0)
    given_prompts = gr.State(prompts.value)  # what the page put there, not the user
    settings = gr.State(handlers.starting_settings())

    def show_source(
        chosen: object, folder_id: object, paths: object, setting: object
    ) -> dict[Any, Any]:
        uploading = chosen == "upload"
        shown = handlers.show_upload(paths) if uploading else handlers.show_folder(folder_id)
        return {
            folder_side: gr.update(visible=not uploading),
            upload_side: gr.update(visible=uploading),
        } | about(shown, setting)

    def about(shown: Shown, setting: object) -> dict[Any, Any]:
        return {
            caption: gr.update(visible=shown.lacks_captions),
            masks_there: shown.masks,
            mask_note: tell_masks(shown.masks, setting),
        }

    def tell_masks(there: int, setting: object) -> dict[str, Any]:
        return _hint(pictures.mask_sentence(there, setting))

    def show_folder(folder_id: object, setting: object) -> dict[Any, Any]:
        shown = handlers.show_folder(folder_id)
        return {thumbs: _shown_html(shown)} | about(shown, setting)

    def show_upload(paths: object, chosen: object, setting: object) -> dict[Any, Any]:
        shown = handlers.show_upload(paths)
        rows = [[file.name, caption] for file, caption in shown.pairs]
        updates = {
            upload_thumbs: _shown_html(shown),
            table: gr.update(value=rows, visible=bool(rows)),
        }
        return updates | (about(shown, setting) if chosen == "upload" else {})

    def fit_prompts(data: dict[Component, Any]) -> dict[Any, Any]:
        fitting = handlers.fitting_prompts(
            data[source], data[folder], data[table], data[form["data.trigger_word"]], data[caption]
        )
        if fitting is None or data[prompts] != data[given_prompts]:
            return gr.skip()
        return {prompts: fitting, given_prompts: fitting}

    def follow_base(data: dict[Component, Any]) -> dict[Any, Any]:
        sent = {names[part]: value for part, value in data.items() if part in names}
        followed = follow(sent, data[settings])
        if not followed.sentence:
            return gr.skip()
        updates = {form[name]: value for name, value in followed.updates.items()}
        return updates | {settings: followed.settings, base_note: _hint(followed.sentence)}

    def press_start(data: dict[Component, Any]) -> dict[Any, Any]:
        started = handlers.start(
            {names[part]: value for part, value in data.items() if part in names},
            data[source],
            data[folder],
            {"name": data[data_name], "files": data[files], "captions": data[table]},
        )
        updates: dict[Any, Any] = {problems: sentences_html(started.problems)}
        if started.run:
            updates[panel.run] = gr.update(choices=handlers.run_names(), value=started.run)
            updates[form["output.name"]] = ""
        if started.saved:
            choices = [(one.label, one.id) for one in handlers.folders()]
            updates |= {
                source: "folder",
                folder_side: gr.update(visible=True),
                upload_side: gr.update(visible=False),
                folder: gr.update(choices=choices, value=started.saved.id),
                files: None,
            }
        return updates

    def show_layers(data: dict[Component, Any]) -> str:
        shown = handlers.layers({names[part]: value for part, value in data.items()})
        return sentences_html(shown.problems) + layers_html(shown.table, shown.notices)

    wire_data_report(
        data_report, handlers, form, source, folder, {"files": files, "captions": table}
    )
    quick = {"show_progress": "hidden", "queue": False}
    told = [caption, masks_there, mask_note]
    source.input(
        show_source, [source, folder, files, masks], [folder_side, upload_side, *told], **quick
    )
    folder.change(
        show_folder,
        [folder, masks],
        [thumbs, *told],
        show_progress="hidden",
        concurrency_id="look",
    )
    files.change(
        show_upload, [files, source, masks], [upload_thumbs, table, *told], concurrency_id="look"
    )
    masks.change(tell_masks, [masks_there, masks], mask_note, **quick)
    chosen = [source, folder, table, form["data.trigger_word"], caption]
    gr.on(
        [part.change for part in chosen],
        fit_prompts,
        {*chosen, prompts, given_prompts},
        [prompts, given_prompts],
        trigger_mode="always_last",
        **quick,
    )
    form["base.model"].change(
        follow_base,
        {*form.values(), settings},
        [*form.values(), settings, base_note],
        trigger_mode="always_last",
        **quick,
    )
    look_at_layers.click(show_layers, {*form.values()}, layers, concurrency_id="look")
    start.click(
        press_start,
        {*form.values(), source, folder, data_name, files, table},
        [problems, panel.run, form["output.name"], source, folder_side, upload_side, folder, files],
        concurrency_id="trainer",
        concurrency_limit=1,
        show_progress="hidden",
    ).then(**panel.refresh)

    def fill(setting: object) -> dict[Any, Any]:
        offered = handlers.folders()
        first = offered[0].id if offered else None
        return {
            folder: gr.update(choices=[(one.label, one.id) for one in offered], value=first),
        } | show_folder(first, setting)

    gr.on(None, fill, masks, [folder, thumbs, *told], **quick)
    return TrainTab(panel)


def _hint(sentence: str) -> dict[str, Any]:
    """A sentence in small print; without one, nothing."""
    return gr.update(value=f'<p class="hint">{escape(sentence)}</p>', visible=bool(sentence))


def _shown_html(shown: Shown) -> str:
    return sentences_html(shown.problems) + thumbs_html(shown.pairs)

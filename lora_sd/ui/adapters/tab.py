"""The Adapters tab: a card for each run and imported file; the chosen one with all that can be done
with it.

What its parts do is in events.py.
"""

from dataclasses import dataclass

import gradio as gr

from lora_sd.ui.adapters.handlers import MOST_COMBINED, MOST_SCALE
from lora_sd.ui.adapters.tools import FORMATS
from lora_sd.ui.texts import say

# A press is seen at once; on a narrow page, what it chose is brought into sight.
CHOOSE_CARD = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (!card) return;
  element.querySelectorAll('[data-id]').forEach(
    one => one.setAttribute('aria-pressed', String(one === card)));
  trigger('click', {id: card.dataset.id});
  if (window.innerWidth < 900)
    document.getElementById('adapter-chosen').scrollIntoView({behavior: 'smooth'});
});
"""


@dataclass(frozen=True)
class Tool:
    """A thing to do with the chosen adapter: its button, and what comes of it."""

    start: gr.Button
    cancel: gr.Button
    problems: gr.HTML
    result: gr.HTML


@dataclass(frozen=True)
class AdaptersTab:
    """The tab's parts."""

    search: gr.Textbox
    cards: gr.HTML
    undo_row: gr.Row
    undo_said: gr.HTML
    undo: gr.Button
    last_deleted: gr.State
    """Its id in the trash."""
    file: gr.File
    file_base: gr.Dropdown
    file_said: gr.HTML
    trash: gr.Dropdown
    restore: gr.Button
    empty_trash: gr.Button
    trash_said: gr.HTML
    panel: gr.Column
    chosen: gr.HTML
    version: gr.Dropdown
    """Its value is the id of the chosen adapter, or of a run that has none."""
    use: gr.Button
    format: gr.Radio
    download: gr.Button
    download_file: gr.DownloadButton
    download_said: gr.HTML
    name: gr.Textbox
    rename: gr.Button
    delete: gr.Button
    name_said: gr.HTML
    inspect: Tool
    verify: Tool
    compare: Tool
    compare_with: gr.Dropdown
    combine: Tool
    combine_scale: gr.Slider
    combine_others: list[gr.Dropdown]
    combine_scales: list[gr.Slider]
    combine_rows: list[gr.Row]
    combine_how: gr.Radio
    combine_rank: gr.Number
    combine_name: gr.Textbox
    resize: Tool
    resize_by: gr.Radio
    resize_rank: gr.Number
    resize_energy: gr.Slider
    resize_size: gr.Number
    resize_name: gr.Textbox
    bake: Tool
    bake_base: gr.Dropdown
    bake_scale: gr.Slider
    bake_as: gr.Radio
    bake_name: gr.Textbox


def build_adapters_tab() -> AdaptersTab:
    """Lay out the tab inside the current Blocks."""
    with gr.Row(equal_height=False, elem_classes="two-sides"):
        with gr.Column(scale=5, min_width=320, elem_classes="form-side"):
            gr.HTML(f"<h2>{say('adapters.all')}</h2>", elem_classes="heading")
            search = gr.Textbox(
                label=say("adapters.search"),
                placeholder=say("adapters.search_example"),
                elem_id="adapter-search",
            )
            with gr.Row(visible=False, elem_id="adapter-undo-row") as undo_row:
                undo_said = gr.HTML(elem_id="adapter-undo-said")
                undo = gr.Button(say("adapters.undo"), size="md", elem_id="adapter-undo")
            cards = gr.HTML(js_on_load=CHOOSE_CARD, elem_id="adapter-cards")
            with gr.Accordion(say("adapters.import"), open=False):
                file = gr.File(
                    file_types=[".safetensors"],
                    label=say("adapters.import_file"),
                    height=130,
                    elem_id="adapter-import",
                )
                file_base = gr.Dropdown(
                    [(say("adapters.it_tells"), "")],
                    value="",
                    label=say("adapters.import_base"),
                    info=say("adapters.import_base_help"),
                    allow_custom_value=True,
                    elem_id="adapter-import-base",
                )
                file_said = gr.HTML(elem_id="adapter-import-said")
            with gr.Accordion(say("adapters.trash"), open=False):
                trash = gr.Dropdown(
                    [],
                    label=say("adapters.deleted"),
                    info=say("adapters.deleted_help"),
                    allow_custom_value=True,
                    elem_id="adapter-trash",
                )
                with gr.Row():
                    restore = gr.Button(say("adapters.restore"), elem_id="adapter-restore")
                    empty_trash = gr.Button(
                        say("adapters.empty_trash"), elem_id="adapter-empty-trash"
                    )
                trash_said = gr.HTML(elem_id="adapter-trash-said")
        with gr.Column(scale=6, min_width=320, visible=False, elem_id="adapter-chosen") as panel:
            chosen = gr.HTML(elem_id="adapter-facts")
            version = gr.Dropdown(
                [],
                label=say("adapters.version"),
                info=say("adapters.version_help"),
                allow_custom_value=True,
                visible=False,
                elem_id="adapter-version",
            )
            with gr.Row(elem_classes="download-row"):
                format = gr.Radio(
                    [(say("adapters.as_it_is"), ""), *((name, name) for name in FORMATS)],
                    value="",
                    label=say("adapters.format"),
                    info=say("adapters.format_help"),
                    elem_classes="segments",
                    elem_id="adapter-format",
                )
            with gr.Row():
                use = gr.Button(say("adapters.use"), variant="primary", elem_id="adapter-use")
                download = gr.Button(say("adapters.download"), elem_id="adapter-download")
            download_file = gr.DownloadButton(
                say("adapters.download"), elem_id="adapter-download-file"
            )
            download_said = gr.HTML(elem_id="adapter-download-said")
            with gr.Accordion(say("adapters.rename_or_delete"), open=False):
                name = gr.Textbox(label=say("adapters.name"), max_length=64, elem_id="adapter-name")
                with gr.Row():
                    rename = gr.Button(say("adapters.rename"), elem_id="adapter-rename")
                    delete = gr.Button(
                        say("adapters.delete"), variant="stop", elem_id="adapter-delete"
                    )
                gr.HTML(f'<p class="hint">{say("adapters.delete_help")}</p>')
                name_said = gr.HTML(elem_id="adapter-name-said")
            with gr.Accordion(say("adapters.inspect"), open=False):
                _help("inspect_help")
                inspect = _tool("inspect")
            with gr.Accordion(say("adapters.verify"), open=False):
                _help("verify_help")
                verify = _tool("verify")
            with gr.Accordion(say("adapters.compare"), open=False):
                _help("compare_help")
                compare_with = gr.Dropdown(
                    [],
                    label=say("adapters.compare_with"),
                    allow_custom_value=True,
                    elem_id="compare-with",
                )
                compare = _tool("compare")
            with gr.Accordion(say("adapters.combine"), open=False):
                _help("combine_help")
                combine_scale = _scale(say("adapters.scale_of_this"), "combine-scale")
                others, scales, rows = [], [], []
                for number in range(1, MOST_COMBINED):
                    with gr.Row(visible=number == 1) as row:
                        others.append(
                            gr.Dropdown(
                                [],
                                label=say("adapters.with"),
                                allow_custom_value=True,
                                min_width=140,
                                elem_id=f"combine-with-{number}",
                            )
                        )
                        scales.append(_scale(say("adapters.its_scale"), f"combine-scale-{number}"))
                    rows.append(row)
                combine_how = gr.Radio(
                    [(say("adapters.how_exact"), "exact"), (say("adapters.how_rank"), "rank")],
                    value="exact",
                    label=say("adapters.how"),
                    info=say("adapters.how_help"),
                    elem_classes="segments",
                    elem_id="combine-how",
                )
                combine_rank = gr.Number(
                    16,
                    label=say("adapters.rank"),
                    precision=0,
                    visible=False,
                    elem_id="combine-rank",
                )
                combine_name = _result_name("combine-name")
                combine = _tool("combine")
            with gr.Accordion(say("adapters.resize"), open=False):
                _help("resize_help")
                resize_by = gr.Radio(
                    [(say(f"adapters.by_{by}"), by) for by in ("rank", "energy", "size")],
                    value="rank",
                    label=say("adapters.by"),
                    elem_classes="segments",
                    elem_id="resize-by",
                )
                resize_rank = gr.Number(
                    4,
                    label=say("adapters.rank"),
                    info=say("adapters.rank_help"),
                    precision=0,
                    elem_id="resize-rank",
                )
                resize_energy = gr.Slider(
                    50,
                    100,
                    95,
                    step=0.5,
                    label=say("adapters.energy"),
                    info=say("adapters.energy_help"),
                    visible=False,
                    elem_id="resize-energy",
                )
                resize_size = gr.Number(
                    20,
                    label=say("adapters.size_mb"),
                    info=say("adapters.size_help"),
                    visible=False,
                    elem_id="resize-size",
                )
                resize_name = _result_name("resize-name")
                resize = _tool("resize")
            with gr.Accordion(say("adapters.bake"), open=False):
                _help("bake_help")
                bake_base = gr.Dropdown(
                    [(say("adapters.its_own_base"), "")],
                    value="",
                    label=say("adapters.bake_base"),
                    info=say("adapters.bake_base_help"),
                    allow_custom_value=True,
                    elem_id="bake-base",
                )
                bake_scale = _scale(say("adapters.scale"), "bake-scale")
                bake_as = gr.Radio(
                    [(say("adapters.as_file"), True), (say("adapters.as_folder"), False)],
                    value=True,
                    label=say("adapters.bake_as"),
                    info=say("adapters.bake_as_help"),
                    elem_classes="segments",
                    elem_id="bake-as",
                )
                bake_name = _result_name("bake-name")
                bake = _tool("bake")
    return AdaptersTab(
        search=search, cards=cards, undo_row=undo_row, undo_said=undo_said, undo=undo, file=file,
        last_deleted=gr.State(),
        file_base=file_base, file_said=file_said, trash=trash, restore=restore,
        empty_trash=empty_trash, trash_said=trash_said, panel=panel, chosen=chosen,
        version=version, use=use, format=format, download=download, download_file=download_file,
        download_said=download_said, name=name, rename=rename, delete=delete, name_said=name_said,
        inspect=inspect, verify=verify, compare=compare, compare_with=compare_with,
        combine=combine, combine_scale=combine_scale, combine_others=others,
        combine_scales=scales, combine_rows=rows, combine_how=combine_how,
        combine_rank=combine_rank, combine_name=combine_name, resize=resize, resize_by=resize_by,
        resize_rank=resize_rank, resize_energy=resize_energy, resize_size=resize_size,
        resize_name=resize_name, bake=bake, bake_base=bake_base, bake_scale=bake_scale,
        bake_as=bake_as, bake_name=bake_name,
    )  # fmt: skip


def _tool(name: str) -> Tool:
    """The button that starts it, the one that ends it, and a place for what comes of it."""
    with gr.Row():
        start = gr.Button(say(f"adapters.{name}_start"), elem_id=f"adapter-{name}")
        cancel = gr.Button(say("adapters.cancel"), visible=False, elem_id=f"{name}-cancel")
    problems = gr.HTML(elem_id=f"{name}-problems")
    result = gr.HTML(elem_id=f"{name}-result", elem_classes="tool-result")
    return Tool(start, cancel, problems, result)


def _help(key: str) -> None:
    gr.HTML(f'<p class="hint">{say(f"adapters.{key}")}</p>')


def _scale(label: str, elem_id: str) -> gr.Slider:
    return gr.Slider(
        -MOST_SCALE, MOST_SCALE, 1.0, step=0.05, label=label, min_width=140, elem_id=elem_id
    )


def _result_name(elem_id: str) -> gr.Textbox:
    return gr.Textbox(label=say("adapters.result_name"), max_length=64, elem_id=elem_id)

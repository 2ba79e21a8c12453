"""The Data set tab: the pictures as cards, and beside them what can be done with all of them.

What its parts do is in events.py and editor.js.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lora_sd.ui.data.bulk import KINDS
from lora_sd.ui.data.handlers import FILTERS
from lora_sd.ui.families import TITLES
from lora_sd.ui.texts import say

EDITOR = Path(__file__).with_name("editor.js")
CHOOSE_TAG = """
element.addEventListener("click", ({ target }) => {
  const pressed = target.closest("button");
  if (pressed) trigger("chosen", { tag: pressed.dataset.tag });
});
"""


@dataclass(frozen=True)
class UploadParts:
    """Files from the visitor's machine."""

    files: gr.File
    name: gr.Textbox
    make: gr.Button
    add: gr.Button
    told: gr.HTML
    cancel: gr.Button


@dataclass(frozen=True)
class BulkParts:
    """One change to many captions."""

    panel: gr.Accordion
    kind: gr.Radio
    text: gr.Textbox
    by: gr.Textbox
    preview: gr.HTML
    apply: gr.Button
    told: gr.HTML


@dataclass(frozen=True)
class KeepParts:
    """Copies and deleted data sets."""

    name: gr.Textbox
    copy: gr.Button
    delete: gr.Button
    deleted: gr.Dropdown
    bring_back: gr.Button
    told: gr.HTML
    cancel: gr.Button


@dataclass(frozen=True)
class DataParts:
    """The tab's parts."""

    chosen: gr.Dropdown
    base: gr.Dropdown
    summary: gr.HTML
    train: gr.Button
    copy_first: gr.Button
    told: gr.HTML
    cancel: gr.Button
    undo: gr.Button
    redo: gr.Button
    upload: UploadParts
    bulk: BulkParts
    tags: gr.HTML
    keep: KeepParts
    check: gr.Button
    stop_check: gr.Button
    report: gr.HTML
    download: gr.DownloadButton
    search: gr.Textbox
    which: gr.Dropdown
    cards: gr.HTML
    back: gr.Button
    pager: gr.HTML
    next: gr.Button
    page: gr.State


def build_parts(answers: Sequence[Callable[[Any], Any]]) -> DataParts:
    """Lay out the tab inside the current Blocks.

    Args:
        answers: what the cards ask of the app by themselves: 'save', 'look' and 'remove'.
    """
    with gr.Row(equal_height=False, elem_classes="two-sides", elem_id="data-tab"):
        with gr.Column(scale=4, min_width=320, elem_classes="form-side"):
            chosen = gr.Dropdown(
                [],
                label=say("data.data_set"),
                info=say("data.data_set_help"),
                allow_custom_value=True,
                elem_id="data-set",
            )
            summary = gr.HTML(elem_id="data-summary")
            with gr.Row(equal_height=True, elem_classes="snug"):
                train = gr.Button(say("data.train"), variant="primary", elem_id="data-train")
                copy_first = gr.Button(
                    say("data.copy.first"), visible=False, elem_id="data-copy-first"
                )
            told, cancel = _told("data-told")
            with gr.Row(equal_height=True, elem_classes="snug"):
                undo = gr.Button(
                    say("data.undo.undo"), size="md", interactive=False, elem_id="data-undo"
                )
                redo = gr.Button(
                    say("data.undo.redo"), size="md", interactive=False, elem_id="data-redo"
                )
            upload = _upload()
            bulk = _bulk()
            with gr.Accordion(say("data.tags.title"), open=False):
                gr.HTML(f'<p class="hint">{say("data.tags.help")}</p>')
                tags = gr.HTML(elem_id="data-tags", js_on_load=CHOOSE_TAG)
            keep = _keep()
            check = gr.Button(say("data.check.check"), size="md", elem_id="check-pictures")
            stop_check = gr.Button(say("data.cancel"), size="md", visible=False)
            download = gr.DownloadButton(
                say("data.check.download"), size="sm", visible=False, elem_id="report-download"
            )
        with gr.Column(scale=8, min_width=320, elem_classes="cards-side"):
            report = gr.HTML(elem_id="data-report")
            with gr.Row(elem_classes="snug", elem_id="data-filter"):
                search = gr.Textbox(
                    label=say("data.search"),
                    placeholder=say("data.search_placeholder"),
                    scale=3,
                    min_width=160,
                    elem_id="data-search",
                )
                which = gr.Dropdown(
                    [(say(f"data.filter.{one}"), one) for one in FILTERS],
                    value="all",
                    label=say("data.show"),
                    scale=2,
                    min_width=140,
                    elem_id="data-which",
                )
                base = gr.Dropdown(
                    [(title, name) for name, title in TITLES.items()],
                    value="tiny-sd",
                    label=say("data.base"),
                    scale=2,
                    min_width=140,
                    elem_id="data-base",
                )
            cards = gr.HTML(
                elem_id="data-cards",
                js_on_load=EDITOR.read_text(encoding="utf-8"),
                server_functions=list(answers),
                unsaved=say("data.card.unsaved"),
            )
            with gr.Row(elem_id="data-pager"):
                back = gr.Button(say("data.pager.back"), size="sm", min_width=80)
                pager = gr.HTML()
                forward = gr.Button(say("data.pager.next"), size="sm", min_width=80)
    return DataParts(
        chosen=chosen,
        base=base,
        summary=summary,
        train=train,
        copy_first=copy_first,
        told=told,
        cancel=cancel,
        undo=undo,
        redo=redo,
        upload=upload,
        bulk=bulk,
        tags=tags,
        keep=keep,
        check=check,
        stop_check=stop_check,
        report=report,
        download=download,
        search=search,
        which=which,
        cards=cards,
        back=back,
        pager=pager,
        next=forward,
        page=gr.State(1),
    )


def _upload() -> UploadParts:
    with gr.Accordion(say("data.upload.title"), open=False, elem_id="data-upload"):
        gr.HTML(f'<p class="hint">{say("data.upload.files_help")}</p>')
        files = gr.File(
            file_count="multiple", label=say("data.upload.files"), height=170, elem_id="files"
        )
        name = gr.Textbox(
            label=say("data.upload.name"),
            info=say("data.upload.name_help"),
            placeholder=say("data.upload.name_placeholder"),
            elem_id="data-name",
        )
        with gr.Row(elem_classes="snug"):
            make = gr.Button(say("data.upload.make"), variant="primary", elem_id="data-make")
            add = gr.Button(say("data.upload.add"), visible=False, elem_id="data-add")
        told, cancel = _told("upload-told")
    return UploadParts(files, name, make, add, told, cancel)


def _told(name: str) -> tuple[gr.HTML, gr.Button]:
    """Where it is told what came of a press, and what ends it."""
    return gr.HTML(elem_id=name), gr.Button(say("data.cancel"), size="md", visible=False)


def _bulk() -> BulkParts:
    with gr.Accordion(
        say("data.bulk.title"), open=False, visible=False, elem_id="data-bulk"
    ) as panel:
        kind = gr.Radio(
            [(say(f"data.bulk.{one}"), one) for one in KINDS],
            value="prefix",
            label=say("data.bulk.kind"),
            elem_id="bulk-kind",
        )
        text = gr.Textbox(
            label=say("data.bulk.text"), info=say("data.bulk.text_help"), elem_id="bulk-text"
        )
        by = gr.Textbox(label=say("data.bulk.by"), visible=False, elem_id="bulk-by")
        gr.HTML(f'<p class="hint">{say("data.bulk.scope")}</p>')
        preview = gr.HTML(elem_id="bulk-preview")
        apply = gr.Button(say("data.bulk.apply"), interactive=False, elem_id="bulk-apply")
        told = gr.HTML(elem_id="bulk-told")
    return BulkParts(panel, kind, text, by, preview, apply, told)


def _keep() -> KeepParts:
    with gr.Accordion(say("data.copy.title"), open=False, elem_id="data-keep"):
        name = gr.Textbox(
            label=say("data.copy.name"),
            placeholder=say("data.upload.name_placeholder"),
            elem_id="copy-name",
        )
        copy = gr.Button(say("data.copy.copy"), elem_id="data-copy")
        delete = gr.Button(
            say("data.deleted.delete"), variant="stop", visible=False, elem_id="data-delete"
        )
        deleted = gr.Dropdown(
            [], label=say("data.deleted.choose"), visible=False, elem_id="data-deleted"
        )
        bring_back = gr.Button(
            say("data.deleted.bring_back"), visible=False, elem_id="data-bring-back"
        )
        told, cancel = _told("keep-told")
    return KeepParts(name, copy, delete, deleted, bring_back, told, cancel)

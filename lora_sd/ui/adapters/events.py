"""What happens when a part of the Adapters tab is used: between its parts and the handlers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_sd.errors import UserError
from lora_sd.ui.adapters import html
from lora_sd.ui.adapters.cards import item_of
from lora_sd.ui.adapters.handlers import AdapterHandlers, Chosen, OnStep
from lora_sd.ui.adapters.tab import AdaptersTab, Tool
from lora_sd.ui.cancelling import page_of
from lora_sd.ui.show import sentences_html
from lora_sd.ui.texts import say

_PROGRESS = gr.Progress()
SHOWN_EVERY_S = 0.1
PRESS_DOWNLOAD = "() => document.querySelector('#adapter-download-file')?.click()"
Updates = dict[Any, Any]


@dataclass(frozen=True)
class AdaptersEvents:
    """Events that other parts of the page cause."""

    opened: dict[str, Any]
    """Arguments of the event that reads the cards anew."""


def wire_adapters_tab(tab: AdaptersTab, handlers: AdapterHandlers) -> AdaptersEvents:
    """Connect the tab's parts with the handlers."""
    tools = [tab.inspect, tab.verify, tab.compare, tab.combine, tab.resize, tab.bake]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    looking: dict[str, Any] = {"concurrency_id": "look", "show_progress": "hidden"}
    changing: dict[str, Any] = {"concurrency_id": "adapter files", "show_progress": "hidden"}
    lists = [tab.cards, tab.compare_with, *tab.combine_others, tab.trash, tab.file_base]
    lists += [tab.bake_base]
    about = [tab.panel, tab.chosen, tab.version, tab.name, tab.use, tab.download]
    about += [tab.download_said, tab.name_said, tab.combine_name, tab.resize_name, tab.bake_name]
    about += [part for tool in tools for part in (tool.problems, tool.result)]

    def show_lists(search: object, chosen: object) -> Updates:
        others, bases = handlers.others(), handlers.bases()
        deleted = handlers.trashed()
        return {
            tab.cards: _cards(handlers, search, chosen),
            tab.compare_with: gr.update(choices=others),
            **{one: gr.update(choices=[(say("adapters.nothing_more"), ""), *others])
               for one in tab.combine_others},
            tab.trash: gr.update(
                choices=[(one.name, one.id) for one in deleted],
                value=deleted[0].id if deleted else None,
            ),
            tab.file_base: gr.update(
                choices=[(say("adapters.it_tells"), ""), *handlers.families(), *bases]
            ),
            tab.bake_base: gr.update(choices=[(say("adapters.its_own_base"), ""), *bases]),
        }  # fmt: skip

    def show_chosen(chosen: Chosen | None) -> Updates:
        cleared = {part: "" for tool in tools for part in (tool.problems, tool.result)}
        cleared |= {tab.download_said: "", tab.name_said: ""}
        if chosen is None:
            return {**cleared, tab.panel: gr.update(visible=False), tab.version: None}
        card, version = chosen.card, chosen.version
        choices = [(one.label, one.id) for one in card.versions]
        there = version is not None
        return {
            **cleared,
            tab.panel: gr.update(visible=True),
            tab.chosen: html.chosen_html(chosen),
            tab.version: gr.update(
                choices=choices or [(say("adapters.none_yet"), card.id)],
                value=version.id if version else card.id,
                visible=len(choices) > 1,
            ),
            tab.name: card.name,
            tab.use: gr.update(interactive=there),
            tab.download: gr.update(interactive=there),
            tab.combine_name: f"{card.name}-combined"[:64],
            tab.resize_name: f"{card.name}-small"[:64],
            tab.bake_name: f"{card.name}-baked"[:64],
        }

    def open_tab(search: object, adapter_id: object) -> Updates:
        """The lists anew; what is chosen, and what came of it, stays as long as it is there."""
        chosen = handlers.choose(adapter_id)
        item = chosen.card.id if chosen else ""
        found = show_lists(search, item)
        return found if item == item_of(adapter_id) else found | show_chosen(chosen)

    def press_card(event: gr.EventData) -> Updates:
        sent = event._data
        return show_chosen(handlers.choose(sent.get("id") if isinstance(sent, dict) else None))

    def choose_version(adapter_id: object) -> Updates:
        return show_chosen(handlers.choose(adapter_id))

    def type_search(search: object, adapter_id: object) -> str:
        return _cards(handlers, search, item_of(adapter_id))

    def add_file(file: object, base: object, search: object) -> Updates:
        if file is None:
            return gr.skip()
        try:
            added = handlers.import_file(file, base)
        except UserError as error:
            return {tab.file_said: sentences_html(error.problems), tab.file: None}
        words = html.said_html(say("adapters.imported", name=added.file.stem))
        return (
            show_lists(search, added.id)
            | show_chosen(handlers.choose(added.id))
            | {tab.file_said: words, tab.file: None}
        )

    def press_rename(adapter_id: object, wish: object, search: object) -> Updates:
        try:
            item = handlers.rename(adapter_id, wish)
        except UserError as error:
            return {tab.name_said: sentences_html(error.problems)}
        return show_lists(search, item) | show_chosen(handlers.choose(item))

    def press_delete(adapter_id: object, search: object) -> Updates:
        try:
            deleted = handlers.delete(adapter_id)
        except UserError as error:
            return {tab.name_said: sentences_html(error.problems)}
        chosen = handlers.choose(None)
        return (
            show_lists(search, chosen.card.id if chosen else "")
            | show_chosen(chosen)
            | {
                tab.undo_row: gr.update(visible=True),
                tab.last_deleted: deleted.id,
                tab.undo_said: html.said_html(say("adapters.was_deleted", name=deleted.name)),
            }
        )

    def press_restore(trash_id: object, search: object) -> Updates:
        try:
            item = handlers.restore(trash_id)
        except UserError as error:
            return {tab.trash_said: sentences_html(error.problems)}
        return (
            show_lists(search, item)
            | show_chosen(handlers.choose(item))
            | {tab.undo_row: gr.update(visible=False), tab.trash_said: ""}
        )

    def press_empty(search: object, adapter_id: object) -> Updates:
        try:
            handlers.empty_trash()
        except UserError as error:
            return {tab.trash_said: sentences_html(error.problems)}
        return show_lists(search, item_of(adapter_id)) | {
            tab.undo_row: gr.update(visible=False),
            tab.trash_said: html.said_html(say("adapters.trash_emptied")),
        }

    def press_download(adapter_id: object, format: object) -> Updates:
        try:
            file, notices = handlers.download(adapter_id, format)
        except UserError as error:
            return {
                tab.download_said: sentences_html(error.problems),
                tab.download_file: gr.update(value=None),
            }
        said = html.said_html(say("adapters.ready", name=file.name), notices)
        return {tab.download_said: said, tab.download_file: gr.update(value=str(file))}

    def run_inspect(data: Updates, on_step: OnStep) -> str:
        return html.inspection_html(handlers.inspect(data[tab.version], on_step))

    def run_verify(data: Updates, on_step: OnStep) -> str:
        return html.verified_html(*handlers.verify(data[tab.version], on_step))

    def run_compare(data: Updates, on_step: OnStep) -> str:
        found = handlers.compare(data[tab.version], data[tab.compare_with], on_step)
        return html.compared_html(found)

    def run_combine(data: Updates, on_step: OnStep) -> str:
        values: dict[str, Any] = {
            "adapter": data[tab.version],
            "scale": data[tab.combine_scale],
            "name": data[tab.combine_name],
            "rank": data[tab.combine_rank] if data[tab.combine_how] == "rank" else None,
        }
        for number, other in enumerate(tab.combine_others, 1):
            values[f"other_{number}"] = data[other]
            values[f"scale_{number}"] = data[tab.combine_scales[number - 1]]
        return html.made_html(handlers.combine(values, on_step))

    def run_resize(data: Updates, on_step: OnStep) -> str:
        values = {
            "adapter": data[tab.version],
            "by": data[tab.resize_by],
            "rank": data[tab.resize_rank],
            "energy": data[tab.resize_energy],
            "size": data[tab.resize_size],
            "name": data[tab.resize_name],
        }
        return html.made_html(handlers.resize(values, on_step))

    def run_bake(data: Updates, on_step: OnStep) -> str:
        values = {
            "adapter": data[tab.version],
            "base": data[tab.bake_base],
            "scale": data[tab.bake_scale],
            "single_file": data[tab.bake_as],
            "name": data[tab.bake_name],
        }
        return html.baked_html(handlers.bake(values, on_step))

    def cancel(page: gr.Request) -> None:
        handlers.cancelling.cancel(page_of(page))

    def wire_tool(
        tool: Tool, run: Callable[[Updates, OnStep], str], inputs: set[Any], makes: bool = False
    ) -> None:
        """Start and cancel; the lists anew after what makes a file."""

        def begin(page: gr.Request) -> Any:
            handlers.cancelling.begin(page_of(page))
            return gr.update(visible=True)

        def press(data: Updates, page: gr.Request, progress: gr.Progress = _PROGRESS) -> Updates:
            try:
                return {
                    tool.problems: "",
                    tool.result: run(data, _report(handlers, page, progress)),
                }
            except UserError as error:
                return {tool.problems: sentences_html(error.problems), tool.result: ""}

        def end(search: object, adapter_id: object) -> Updates:
            hidden: Updates = {tool.cancel: gr.update(visible=False)}
            return hidden | show_lists(search, item_of(adapter_id)) if makes else hidden

        tool.start.click(begin, None, tool.cancel, **quick).then(
            press,
            {tab.version, *inputs},
            [tool.problems, tool.result],
            show_progress_on=tool.result,
            concurrency_id="adapters",
            concurrency_limit=1,
        ).then(end, [tab.search, tab.version], [tool.cancel, *(lists if makes else [])], **looking)
        tool.cancel.click(cancel, None, None, **quick)

    wire_tool(tab.inspect, run_inspect, set())
    wire_tool(tab.verify, run_verify, set())
    wire_tool(tab.compare, run_compare, {tab.compare_with})
    combined = {tab.combine_scale, *tab.combine_others, *tab.combine_scales}
    combined |= {tab.combine_how, tab.combine_rank, tab.combine_name}
    wire_tool(tab.combine, run_combine, combined, makes=True)
    resized = {tab.resize_by, tab.resize_rank, tab.resize_energy, tab.resize_size}
    wire_tool(tab.resize, run_resize, resized | {tab.resize_name}, makes=True)
    baked = {tab.bake_base, tab.bake_scale, tab.bake_as, tab.bake_name}
    wire_tool(tab.bake, run_bake, baked, makes=True)

    tab.search.change(
        type_search, [tab.search, tab.version], tab.cards, trigger_mode="always_last", **looking
    )
    tab.cards.click(press_card, None, about, **looking)
    tab.version.input(choose_version, tab.version, about, **looking)
    files = [*lists, *about]
    tab.file.upload(
        add_file,
        [tab.file, tab.file_base, tab.search],
        [*files, tab.file_said, tab.file],
        concurrency_id="adapter files",
        show_progress_on=tab.file,
    )
    tab.rename.click(press_rename, [tab.version, tab.name, tab.search], files, **changing)
    tab.delete.click(
        press_delete,
        [tab.version, tab.search],
        [*files, tab.undo_row, tab.undo_said, tab.last_deleted],
        **changing,
    )
    restored = [*files, tab.undo_row, tab.trash_said]
    tab.undo.click(press_restore, [tab.last_deleted, tab.search], restored, **changing)
    tab.restore.click(press_restore, [tab.trash, tab.search], restored, **changing)
    tab.empty_trash.click(
        press_empty, [tab.search, tab.version], [*lists, tab.undo_row, tab.trash_said], **changing
    )
    tab.download.click(
        press_download,
        [tab.version, tab.format],
        [tab.download_said, tab.download_file],
        concurrency_id="adapters",
        concurrency_limit=1,
        show_progress_on=tab.download_said,
    ).then(None, None, None, js=PRESS_DOWNLOAD)
    for number, row in enumerate(tab.combine_rows[1:]):
        tab.combine_others[number].input(
            lambda other: gr.update(visible=bool(other)), tab.combine_others[number], row, **quick
        )
    tab.combine_how.input(
        lambda how: gr.update(visible=how == "rank"), tab.combine_how, tab.combine_rank, **quick
    )
    tab.resize_by.input(
        lambda by: [gr.update(visible=by == one) for one in ("rank", "energy", "size")],
        tab.resize_by,
        [tab.resize_rank, tab.resize_energy, tab.resize_size],
        **quick,
    )
    return AdaptersEvents(
        opened={
            "fn": open_tab,
            "inputs": [tab.search, tab.version],
            "outputs": files,
            **looking,
        }
    )


def _cards(handlers: AdapterHandlers, search: object, chosen: object) -> str:
    return html.cards_html(handlers.cards(search), str(chosen), bool(search))


def _report(handlers: AdapterHandlers, page: gr.Request, progress: gr.Progress) -> OnStep:
    """Shows how far the work is, and ends it when this page cancels."""
    progress(0, desc=say("adapters.reading"))
    shown = 0.0

    def on_step(done: int, total: int) -> bool:
        nonlocal shown
        if total and time.monotonic() - shown > SHOWN_EVERY_S:
            shown = time.monotonic()
            progress((done, total), desc=say("adapters.working"), unit=say("adapters.layers_unit"))
        return handlers.cancelling.is_cancelled(page_of(page))

    return on_step

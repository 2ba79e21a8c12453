"""What happens when a part of the Data set tab is used: between its parts and the handlers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.errors import UserError
from lora_sd.ui.cancelling import page_of
from lora_sd.ui.data import cards
from lora_sd.ui.data.handlers import DataHandlers, Done, Shown
from lora_sd.ui.data.pictures import OnFile, counted
from lora_sd.ui.data.tab import DataParts, build_parts
from lora_sd.ui.show import sentences_html
from lora_sd.ui.texts import say

PREVIEWED = 6
WORKING = '<div class="working"></div>'
_PROGRESS = gr.Progress()
View = Callable[[dict[Component, Any]], dict[Any, Any]]


@dataclass(frozen=True)
class DataTab:
    """What other parts of the page need of this tab."""

    chosen: gr.Dropdown
    """Its value is the id of the data set that is shown."""
    train: gr.Button
    """Train with the data set that is shown."""
    opened: dict[str, Any]
    """Arguments of the event that shows the chosen data set as it is now."""
    choose: dict[str, Any]
    """Arguments of the event that chooses a data set, for `opened` to show; its input: the id."""
    as_choice: dict[str, Any]
    """Arguments of the event that puts the chosen one into another list; its output: that list."""


def build_data_tab(handlers: DataHandlers) -> DataTab:
    """Lay out the tab inside the current Blocks, and connect its parts with the handlers."""
    tab = build_parts(_answers(handlers))
    looking: dict[str, Any] = {"concurrency_id": "data", "concurrency_limit": 4}
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    view = {tab.chosen, tab.base, tab.search, tab.which, tab.page}
    shown = [
        tab.chosen, tab.cards, tab.summary, tab.copy_first, tab.undo, tab.redo, tab.upload.add,
        tab.bulk.panel, tab.tags, tab.keep.delete, tab.keep.deleted, tab.keep.bring_back,
        tab.pager, tab.back, tab.next, tab.page,
    ]  # fmt: skip

    asked: Counter[str] = Counter()  # by page: how often what it shows was to change

    def unless_overtaken(fn: View) -> Callable[..., Any]:
        """What a page asked for last is what it shows, whatever is answered last."""

        def press(data: dict[Component, Any], page: gr.Request) -> Any:
            session = page_of(page)
            asked[session] += 1
            mine, updates = asked[session], fn(data)
            return updates if asked[session] == mine else gr.skip()

        return press

    def look(data: dict[Component, Any], data_set: object = None, page: object = 1) -> Shown:
        return handlers.show(
            data_set or data[tab.chosen], data[tab.base], data[tab.search], data[tab.which], page
        )

    def refresh(data: dict[Component, Any]) -> dict[Any, Any]:
        return _updates(tab, handlers, look(data, page=data[tab.page]))

    def first_page(data: dict[Component, Any]) -> dict[Any, Any]:
        return _updates(tab, handlers, look(data))

    def turn(by: int) -> View:
        return lambda data: _updates(tab, handlers, look(data, page=int(data[tab.page]) + by))

    def edited(data: dict[Component, Any]) -> dict[Any, Any]:
        """After an edit on a card, which shows it already."""
        updates = refresh(data)
        return {part: updates[part] for part in (tab.summary, tab.undo, tab.redo, tab.tags)}

    def opened(data: dict[Component, Any]) -> dict[Any, Any]:
        ids = [one.id for one in handlers.offered()]
        chosen = data[tab.chosen] if data[tab.chosen] in ids else next(iter(ids), None)
        return _updates(tab, handlers, look(data, chosen, data[tab.page]))

    def choose(data_set: object) -> dict[Any, Any]:
        return {tab.chosen: as_choice(data_set), tab.search: "", tab.which: "all", tab.page: 1}

    def as_choice(data_set: object) -> dict[str, Any]:
        choices = [(one.label, one.id) for one in handlers.offered()]
        return gr.update(choices=choices, value=data_set)

    def find_tag(event: gr.EventData) -> str:
        sent = event._data if isinstance(event._data, dict) else {}
        return str(sent.get("tag", ""))[:200]

    wired = [tab.chosen.input, tab.search.input, tab.which.input, tab.base.input]
    gr.on(
        wired, unless_overtaken(first_page), view, shown, trigger_mode="always_last",
        show_progress="hidden", **looking,
    )  # fmt: skip
    tab.back.click(unless_overtaken(turn(-1)), view, shown, show_progress="hidden", **looking)
    tab.next.click(unless_overtaken(turn(1)), view, shown, show_progress="hidden", **looking)
    tab.cards.edited(
        edited, view, [tab.summary, tab.undo, tab.redo, tab.tags],
        trigger_mode="always_last", show_progress="hidden", **looking,
    )  # fmt: skip
    tab.tags.chosen(find_tag, None, tab.search, **quick).then(
        unless_overtaken(first_page), view, shown, show_progress="hidden", **looking
    )

    def preview(data: dict[Component, Any]) -> dict[Any, Any]:
        planned = handlers.preview(
            data[tab.chosen], data[tab.base], data[tab.search], data[tab.which], form(data)
        )
        sentence = ""
        if data[tab.bulk.text]:
            key = f"data.bulk.would.{'one' if len(planned.changes) == 1 else 'many'}"
            sentence = say(key, count=len(planned.changes), of=planned.of)
        html = cards.changes_html(planned.changes, PREVIEWED, sentence)
        return {
            tab.bulk.preview: sentences_html(planned.problems) + html,
            tab.bulk.apply: gr.update(interactive=bool(planned.changes)),
            tab.bulk.by: gr.update(visible=data[tab.bulk.kind] == "replace"),
            tab.bulk.told: "",
        }

    def form(data: dict[Component, Any]) -> dict[str, Any]:
        bulk = tab.bulk
        return {"kind": data[bulk.kind], "text": data[bulk.text], "by": data[bulk.by]}

    bulk_fields = {tab.bulk.kind, tab.bulk.text, tab.bulk.by}
    previewed = [tab.bulk.preview, tab.bulk.apply, tab.bulk.by, tab.bulk.told]
    gr.on(
        [tab.bulk.kind.change, tab.bulk.text.change, tab.bulk.by.change, *wired],
        preview,
        {*view, *bulk_fields},
        previewed,
        trigger_mode="always_last",
        **quick,
    )

    def act(told: gr.HTML, done: Done) -> dict[Any, Any]:
        said = f'<p class="said" role="status">{escape(done.said)}</p>' if done.said else ""
        updates: dict[Any, Any] = {told: sentences_html(done.problems) + said}
        return updates | ({tab.chosen: done.data_set} if done.data_set else {})

    def acting(told: gr.HTML, fn: Callable[[object], Done]) -> Callable[..., dict[Any, Any]]:
        def press(value: object, page: gr.Request) -> dict[Any, Any]:
            asked[page_of(page)] += 1
            return act(told, fn(value))

        return press

    def apply(data: dict[Component, Any]) -> dict[Any, Any]:
        view_of = (data[tab.chosen], data[tab.base], data[tab.search], data[tab.which])
        return act(tab.bulk.told, handlers.apply(*view_of, form(data))) | {
            tab.bulk.apply: gr.update(interactive=False),
            tab.bulk.preview: "",
        }

    tab.bulk.apply.click(
        apply,
        {*view, *bulk_fields},
        [tab.bulk.told, tab.bulk.apply, tab.bulk.preview, tab.chosen],
        show_progress="hidden",
        **looking,
    ).then(unless_overtaken(refresh), view, shown, show_progress="hidden", **looking)
    for button, told, fn, part in (
        (tab.undo, tab.told, handlers.undo, tab.chosen),
        (tab.redo, tab.told, handlers.redo, tab.chosen),
        (tab.keep.delete, tab.keep.told, handlers.delete, tab.chosen),
        (tab.keep.bring_back, tab.keep.told, handlers.bring_back, tab.keep.deleted),
    ):
        button.click(
            acting(told, fn), part, [told, tab.chosen], show_progress="hidden", **looking
        ).then(unless_overtaken(refresh), view, shown, show_progress="hidden", **looking)

    def on_file(page: gr.Request, progress: gr.Progress, words: str) -> OnFile:
        progress(0, desc=words)

        def advance(done: int, of: int) -> bool:
            progress((done, of), desc=words, unit="files")
            return handlers.cancelling.is_cancelled(page_of(page))

        return advance

    def begin(page: gr.Request) -> tuple[Any, str]:
        asked[page_of(page)] += 1
        handlers.cancelling.begin(page_of(page))
        return gr.update(visible=True), WORKING

    def press_cancel(page: gr.Request) -> None:
        handlers.cancelling.cancel(page_of(page))

    def make(
        data: dict[Component, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        advance = on_file(page, progress, say("data.upload.checking"))
        return uploaded(handlers.upload(data[tab.upload.name], data[tab.upload.files], advance))

    def add(
        data: dict[Component, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        advance = on_file(page, progress, say("data.upload.checking"))
        return uploaded(handlers.add(data[tab.chosen], data[tab.upload.files], advance))

    def uploaded(done: Done) -> dict[Any, Any]:
        emptied = {tab.upload.files: None, tab.upload.name: ""} if done.data_set else {}
        return act(tab.upload.told, done) | emptied

    def copy_to(told: gr.HTML) -> Callable[..., dict[Any, Any]]:
        def press(
            data: dict[Component, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
        ) -> dict[Any, Any]:
            advance = on_file(page, progress, say("data.copy.copying"))
            return act(told, handlers.copy(data[tab.chosen], data[tab.keep.name], advance))

        return press

    upload, keep = tab.upload, tab.keep
    for button, told, cancel, press, inputs in (
        (upload.make, upload.told, upload.cancel, make, {upload.name, upload.files}),
        (upload.add, upload.told, upload.cancel, add, {tab.chosen, upload.files}),
        (keep.copy, keep.told, keep.cancel, copy_to(keep.told), {tab.chosen, keep.name}),
        (tab.copy_first, tab.told, tab.cancel, copy_to(tab.told), {tab.chosen, keep.name}),
    ):
        changed = [told, tab.chosen, *([upload.files, upload.name] if told is upload.told else [])]
        button.click(begin, None, [cancel, told], **quick).then(
            press, inputs, changed, show_progress_on=told, **looking
        ).then(lambda: gr.update(visible=False), None, cancel, **quick).then(
            unless_overtaken(refresh), view, shown, show_progress="hidden", **looking
        )

    def check(
        data: dict[Component, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        advance = on_file(page, progress, say("data.check.checking"))
        checked = handlers.check(data[tab.chosen], data[tab.base], advance)
        panel = (
            f'<div class="report-panel" tabindex="0" role="region" '
            f'aria-label="{escape(say("data.check.region"))}">{checked.html}</div>'
        )
        return {
            tab.report: sentences_html(checked.problems) + (panel if checked.html else ""),
            tab.download: gr.update(visible=bool(checked.file), value=checked.file),
        }

    tab.check.click(begin, None, [tab.stop_check, tab.report], **quick).then(
        check,
        {tab.chosen, tab.base},
        [tab.report, tab.download],
        concurrency_id="check-pictures",
        concurrency_limit=1,
        show_progress_on=tab.report,
    ).then(lambda: gr.update(visible=False), None, tab.stop_check, **quick)
    tab.chosen.input(
        lambda: ("", gr.update(visible=False)), None, [tab.report, tab.download], **quick
    )
    for cancel in (tab.cancel, upload.cancel, keep.cancel, tab.stop_check):
        cancel.click(press_cancel, None, None, **quick)

    return DataTab(
        chosen=tab.chosen,
        train=tab.train,
        opened={
            "fn": unless_overtaken(opened), "inputs": view, "outputs": shown,
            "show_progress": "hidden", **looking,
        },
        choose={
            "fn": choose, "outputs": [tab.chosen, tab.search, tab.which, tab.page], **quick,
        },
        as_choice={"fn": as_choice, "inputs": tab.chosen, **quick},
    )  # fmt: skip


def _answers(handlers: DataHandlers) -> list[Callable[[Any], Any]]:
    """What the cards ask by themselves (editor.js): each takes one dict, which is checked."""

    def sent(asked: object) -> dict[str, Any]:
        return asked if isinstance(asked, dict) else {}

    def save(asked: Any) -> dict[str, Any]:
        data = sent(asked)
        saved = handlers.save(
            data.get("data_set"), data.get("base"), data.get("picture"), data.get("before"),
            data.get("caption"),
        )  # fmt: skip
        if saved.card is None:
            return {"saved": False, "caption": None, "told": sentences_html(saved.problems)}
        if saved.conflict is not None:
            told = sentences_html([say("data.card.conflict", now=saved.conflict)])
            return {"saved": False, "caption": saved.conflict, "told": told}
        told = f'<p class="saved">{escape(say("data.card.saved"))}</p>'
        return {
            "saved": True,
            "caption": saved.card.picture.lines,
            "told": cards.told_html(saved.card) + told,
        }

    def look(asked: Any) -> str:
        data = sent(asked)
        try:
            card, file = handlers.look_at(
                data.get("data_set"), data.get("base"), data.get("picture")
            )
        except UserError as error:
            return cards.closable_html(sentences_html(error.problems))
        return cards.large_html(card, file)

    def remove(asked: Any) -> dict[str, str]:
        data = sent(asked)
        done = handlers.remove(data.get("data_set"), data.get("picture"))
        if done.problems:
            return {"told": sentences_html(done.problems)}
        name = say("data.card.gone", name=data["picture"])
        return {"told": "", "gone": f"<p>{escape(name)}</p>"}

    return [save, look, remove]


def _updates(tab: DataParts, handlers: DataHandlers, shown: Shown) -> dict[Any, Any]:
    """The tab as it is to be for a page of pictures."""
    choices = [(one.label, one.id) for one in handlers.offered()]
    deleted = [(one.name, one.id) for one in handlers.deleted()]
    chosen = shown.folder.id if shown.folder else None
    return {
        tab.chosen: gr.update(choices=choices, value=chosen),
        tab.cards: _cards(shown),
        tab.summary: sentences_html(shown.problems) + _summary(shown),
        tab.copy_first: gr.update(visible=bool(chosen) and not shown.editable),
        tab.undo: _history_button("data.undo.undo", shown.undo),
        tab.redo: _history_button("data.undo.redo", shown.redo),
        tab.upload.add: gr.update(visible=shown.editable),
        tab.bulk.panel: gr.update(visible=shown.editable),
        tab.tags: cards.tags_html(shown.tags),
        tab.keep.delete: gr.update(visible=shown.editable),
        tab.keep.deleted: gr.update(
            choices=deleted, value=deleted[0][1] if deleted else None, visible=bool(deleted)
        ),
        tab.keep.bring_back: gr.update(visible=bool(deleted)),
        tab.pager: f"<p>{escape(say('data.pager.page', page=shown.page, pages=shown.pages))}</p>",
        tab.back: gr.update(interactive=shown.page > 1),
        tab.next: gr.update(interactive=shown.page < shown.pages),
        tab.page: shown.page,
    }


def _cards(shown: Shown) -> str:
    if not shown.cards:
        key = "data.nothing_found" if shown.total else "data.nothing_there"
        return f'<p class="hint">{escape(say(key))}</p>'
    found = ""
    if shown.found < shown.total:
        some = say("data.found.some", found=shown.found, total=shown.total)
        found = f'<p class="hint">{escape(some)}</p>'
    data_set = shown.folder.id if shown.folder else ""
    return found + cards.cards_html(data_set, shown.base, shown.cards, shown.editable)


def _summary(shown: Shown) -> str:
    if not shown.folder:
        return ""
    there = counted(shown.total)
    said = [say("data.summary.all", pictures=there)]
    if shown.bare:
        key = f"data.summary.bare.{'one' if shown.bare == 1 else 'many'}"
        said = [say(key, pictures=there, count=shown.bare)]
    for key, count in (("data.summary.cut", shown.cut), ("data.summary.masks", shown.masks)):
        if count:
            said.append(say(f"{key}.{'one' if count == 1 else 'many'}", count=count))
    if not shown.editable:
        said.append(say("data.read_only_note"))
    return f'<p class="hint">{escape(" ".join(said))}</p>'


def _history_button(key: str, what: str) -> dict[str, Any]:
    text = say(f"{key}_what", what=what) if what else say(key)
    return gr.update(value=text, interactive=bool(what))

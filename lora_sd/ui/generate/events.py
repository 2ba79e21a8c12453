"""What happens when a part of the Generate tab is used: between its parts and the handlers."""

import random
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lora_sd.errors import UserError
from lora_sd.ui.adapters.offered import OfferedAdapter, download_copy
from lora_sd.ui.cancelling import page_of
from lora_sd.ui.generate import pictures
from lora_sd.ui.generate.handlers import BY_HAND, Drawn, GenerateHandlers
from lora_sd.ui.generate.pictures import Restored
from lora_sd.ui.generate.request import MOST_SEED, MOST_STEPS, PARTS
from lora_sd.ui.generate.request import field as field_name
from lora_sd.ui.generate.studio import OnStep
from lora_sd.ui.generate.tab import GenerateTab
from lora_sd.ui.show import enlarged, sentences_html
from lora_sd.ui.texts import say

_PROGRESS = gr.Progress()
SMALL_PX, SMALL_SHOWN_PX, LARGE_SHOWN_PX = 128, 448, 640  # a small picture blurs when too large
HISTORY = 48
# A narrow page has the form far above the pictures: what is filled in is brought into sight.
SHOW_FORM = """() => {
  if (window.innerWidth >= 900) return;
  const said = document.querySelector('#generate-problems .problems');
  const shown = said ?? document.getElementById('adapter');
  shown.scrollIntoView({behavior: 'smooth', block: 'center'});
}"""
Updates = dict[Any, Any]


@dataclass(frozen=True)
class GenerateEvents:
    """Events that other parts of the page cause."""

    opened: dict[str, Any]
    """Arguments of the event that reads the list of adapters anew."""
    seen: dict[str, Any]
    """Arguments of the event that keeps a result that is there by now from being chosen."""
    choose: dict[str, Any]
    """Arguments of the event that chooses the adapter of a run; its inputs: run and prompt."""
    choose_adapter: dict[str, Any]
    """Arguments of the event that chooses an adapter by its id; its inputs: id and prompt."""
    left: dict[str, Any]
    """Arguments of the event that a closed page causes: what it began is stopped."""


@dataclass(frozen=True)
class Kept:
    """A pair of pictures of the history: their files, what they are, and their settings."""

    small: Path
    """As it was drawn."""
    before: Path
    after: Path
    """Large enough to look at."""
    is_small: bool
    caption: str
    note: dict[str, Any]


def wire_generate_tab(tab: GenerateTab, handlers: GenerateHandlers) -> GenerateEvents:
    """Connect the tab's parts with the handlers."""
    fields: dict[Any, str] = {
        tab.prompt: "prompt", tab.negative: "negative", tab.seed: "seed", tab.steps: "steps",
        tab.guidance: "guidance", tab.width: "width", tab.height: "height", tab.count: "count",
        tab.scheduler: "scheduler", tab.base: "base",
    }  # fmt: skip
    for number, row in enumerate(tab.adapters, 1):
        for name in ("adapter", "scale", *PARTS):
            fields[getattr(row, name)] = field_name(name, number)
    grid_fields: dict[Any, str] = {
        tab.rows: "rows", tab.scales: "scales", tab.row_prompts: "row_prompts",
        tab.row_adapters: "row_adapters",
    }  # fmt: skip

    def values_of(data: dict[Any, Any]) -> dict[str, Any]:
        return {name: data[part] for part, name in (fields | grid_fields).items() if part in data}

    # --- drawing ---

    def report(values: dict[str, Any], page: str, progress: gr.Progress) -> OnStep:
        """Show how far the drawing is, and stop it when this page cancels or wants another."""

        def on_step(done: int, total: int) -> bool:
            if done:
                unit = say("generate.steps_unit")
                progress((done, total), desc=say("generate.drawing"), unit=unit)
            else:
                progress(0, desc=say("generate.loading"))
            return handlers.cancelling.is_cancelled(page) or handlers.is_stale(page, values)

        return on_step

    def begin(page: gr.Request) -> dict[str, Any]:
        handlers.cancelling.begin(page_of(page))
        return gr.update(visible=True)

    def press_cancel(page: gr.Request) -> None:
        handlers.cancelling.cancel(page_of(page))

    def press_draw(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> Updates:
        values, name = values_of(data), page_of(page)
        handlers.begin(name, values)
        try:
            drawn = handlers.draw(handlers.request(values), report(values, name, progress))
        except UserError as error:
            is_stale = handlers.is_stale(name, values)
            return {tab.problems: gr.skip() if is_stale else sentences_html(error.problems)}
        finally:
            handlers.end(name)
        kept = [_kept(one) for one in drawn]
        history = [*kept, *(one for one in data[tab.kept] if one not in kept)][:HISTORY]
        return {
            tab.problems: "",
            tab.kept: history,
            tab.history_title: gr.update(visible=True),
            tab.history: _gallery(history),
            **show_pair(kept[0]),
        }

    def show_pair(one: Kept) -> Updates:
        return {
            tab.empty: gr.update(visible=False),
            tab.pair: gr.update(
                value=(str(one.before), str(one.after)),
                visible=True,
                max_height=SMALL_SHOWN_PX if one.is_small else LARGE_SHOWN_PX,
            ),
            tab.said: gr.update(value=one.caption, visible=True),
            tab.bring_back: gr.update(visible=True),
            tab.shown: one.note,
            tab.has_pair: True,
        }

    def release(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> Updates:
        handlers.cancelling.begin(page_of(page))
        return press_draw(data, page, progress) if data[tab.has_pair] else {tab.problems: gr.skip()}

    def want_other(data: dict[Any, Any], page: gr.Request) -> dict[str, Any]:
        if data[tab.has_pair]:
            handlers.wants_other(page_of(page), values_of(data))
        return gr.update(visible=bool(data[tab.has_pair]))

    def press_grid(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> Updates:
        values, name = values_of(data), page_of(page)
        try:
            picture = handlers.draw_grid(handlers.grid(values), report(values, name, progress))
        except UserError as error:
            return {tab.grid_problems: sentences_html(error.problems)}
        return {
            tab.grid_problems: "",
            tab.empty: gr.update(visible=False),
            tab.grid_title: gr.update(visible=True),
            tab.grid: gr.update(value=picture, visible=True),
        }

    # --- pictures drawn before ---

    def press_picture(kept: list[Kept], chosen: gr.SelectData) -> Updates:
        place = chosen.index
        if not isinstance(place, int) or not 0 <= place < len(kept):
            return {tab.has_pair: gr.skip()}
        return show_pair(kept[place])

    def press_bring_back(note: object) -> Updates:
        try:
            restored = handlers.restore(note if isinstance(note, dict) else {})
        except UserError as error:
            return {tab.problems: sentences_html(error.problems)}
        return {tab.problems: sentences_html(restored.notices)} | _filled(restored)

    def read_picture(file: object) -> Updates:
        try:
            restored = handlers.read_picture(file)
        except UserError as error:
            return {tab.picture_problems: sentences_html(error.problems)}
        return {tab.picture_problems: sentences_html(restored.notices)} | _filled(restored)

    def _filled(restored: Restored) -> Updates:
        """The form's fields with these values, and the rows of the adapters that there are."""
        values = restored.values
        updates = {part: values[name] for part, name in fields.items() if name in values}
        for number, row in enumerate(tab.adapters[1:], 2):
            updates[row.group] = gr.update(visible=bool(values[field_name("adapter", number)]))
        return updates | {tab.seen: BY_HAND}

    # --- adapters ---

    def choose_adapter(chosen: object, written: object) -> Updates:
        return {tab.seen: BY_HAND} | _chosen(handlers.find(chosen), written)

    def _chosen(found: OfferedAdapter | None, written: object) -> Updates:
        copy = str(download_copy(found)) if found else None
        updates: Updates = {tab.download: gr.update(value=copy, visible=copy is not None)}
        adopted = handlers.adopted(found)
        if adopted.steps is not None:
            updates[tab.steps] = min(adopted.steps, MOST_STEPS)
            updates[tab.guidance] = adopted.guidance
        if adopted.prompt and not written:
            updates[tab.prompt] = adopted.prompt
        return updates

    def _lists() -> Updates:
        """All lists anew, without what is chosen."""
        choices = [(one.label, one.id) for one in handlers.adapters()]
        bases = [(one.label, one.id) for one in handlers.bases()]
        nothing = "" if choices else say("generate.nothing")
        return {
            tab.first.adapter: gr.update(choices=choices, info=nothing),
            **{row.adapter: gr.update(choices=choices) for row in tab.adapters[1:]},
            tab.base: gr.update(choices=[(say("generate.base_own"), ""), *bases]),
        }

    def list_adapters(chosen: object, written: object, seen: object) -> Updates:
        """The lists anew, and with them what to choose."""
        to_choose, newest = handlers.to_choose(chosen, seen), handlers.newest_result()
        if to_choose == chosen and seen in (BY_HAND, newest):
            return _lists()
        return _choose(to_choose, written) | {tab.seen: newest}

    def _choose(value: object, written: object) -> Updates:
        lists = _lists()
        lists[tab.first.adapter] |= {"value": value}
        return lists | _chosen(handlers.find(value), written)

    def choose_run(run: object, written: object) -> Updates:
        """The newest adapter of a run: its result, or its newest checkpoint."""
        found = handlers.newest_of(run)
        return _choose(found, written) if found else list_adapters(None, written, None)

    def choose_by_id(adapter_id: object, written: object) -> Updates:
        return {tab.seen: BY_HAND} | _choose(adapter_id, written)

    def add_row(*chosen: object) -> list[Any]:
        """Show the first row that is hidden: those without an adapter are taken to be."""
        shown = [*map(bool, chosen)]
        if False in shown:
            shown[shown.index(False)] = True
        return [gr.update(visible=one) for one in shown]

    def choose_rows(kind: object, first: object) -> Updates:
        """The grid's fields for a kind of rows."""
        offered = handlers.adapters()
        if kind == "checkpoints":
            found = handlers.find(first)
            offered = handlers.checkpoints(found) if found else []
        own = "row_checkpoints" if kind == "checkpoints" else "row_adapters"
        return {
            tab.row_prompts: gr.update(visible=kind == "prompts"),
            tab.row_adapters: gr.update(
                visible=kind in ("checkpoints", "adapters"),
                choices=[(one.label, one.id) for one in offered],
                value=[],
                label=say(f"generate.{own}"),
                info=say("generate.row_checkpoints_help") if kind == "checkpoints" else None,
            ),
        }

    # --- wiring ---

    inputs = {*fields, tab.has_pair, tab.kept}
    drawing: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
    pair_parts = [tab.empty, tab.pair, tab.said, tab.bring_back, tab.shown, tab.has_pair]
    drawn_parts = [tab.problems, tab.kept, tab.history_title, tab.history, *pair_parts]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    looking: dict[str, Any] = {"concurrency_id": "look", "show_progress": "hidden"}

    def end() -> dict[str, Any]:
        return gr.update(visible=False)

    gr.on([tab.draw.click, tab.prompt.submit], begin, None, tab.cancel, **quick).then(
        press_draw, inputs, drawn_parts, show_progress_on=[tab.pair, tab.empty], **drawing
    ).then(end, None, tab.cancel, **quick)
    tab.draw_grid.click(begin, None, tab.cancel, **quick).then(
        press_grid,
        {*inputs, *grid_fields},
        [tab.grid_problems, tab.empty, tab.grid_title, tab.grid],
        show_progress_on=[tab.grid, tab.empty],
        **drawing,
    ).then(end, None, tab.cancel, **quick)
    tab.cancel.click(press_cancel, None, None, **quick)
    again: dict[str, Any] = {"inputs": inputs, "outputs": drawn_parts, **drawing}
    slid = [slider.release for row in tab.adapters for slider in row.scales]
    gr.on(slid, want_other, inputs, tab.cancel, **quick)
    gr.on(slid, release, show_progress_on=tab.pair, trigger_mode="always_last", **again).then(
        end, None, tab.cancel, **quick
    )
    tab.dice.click(
        lambda: random.randint(0, MOST_SEED), None, tab.seed, show_progress="hidden"
    ).then(release, show_progress_on=tab.pair, **again)

    tab.history.select(press_picture, tab.kept, pair_parts, **quick)
    adapter_parts = [row.group for row in tab.adapters[1:]]
    filled = [*fields, *adapter_parts, tab.seen]
    tab.bring_back.click(press_bring_back, tab.shown, [tab.problems, *filled], **looking).then(
        None, None, None, js=SHOW_FORM
    )
    tab.from_picture.upload(
        read_picture, tab.from_picture, [tab.picture_problems, *filled], **looking
    )

    others = tab.adapters[1:]
    tab.add.click(add_row, [row.adapter for row in others], [row.group for row in others], **quick)
    for row in others:
        assert row.remove
        row.remove.click(
            lambda: (None, gr.update(visible=False)), None, [row.adapter, row.group], **quick
        ).then(release, show_progress_on=tab.pair, **again)
    gr.on(
        [tab.rows.input, tab.first.adapter.change],
        choose_rows,
        [tab.rows, tab.first.adapter],
        [tab.row_prompts, tab.row_adapters],
        **looking,
    )
    chosen_parts = [tab.seen, tab.download, tab.prompt, tab.steps, tab.guidance]
    tab.first.adapter.input(
        choose_adapter, [tab.first.adapter, tab.prompt], chosen_parts, **looking
    )
    looking["outputs"] = [*(row.adapter for row in tab.adapters), tab.base, *chosen_parts]
    return GenerateEvents(
        opened={
            "fn": list_adapters,
            "inputs": [tab.first.adapter, tab.prompt, tab.seen],
            **looking,
        },
        seen={"fn": handlers.newest_result, "outputs": tab.seen, **quick},
        choose={"fn": choose_run, **looking},
        choose_adapter={"fn": choose_by_id, **looking},
        left={"fn": press_cancel},
    )


def _kept(drawn: Drawn) -> Kept:
    request = drawn.request
    said = say("generate.caption", adapters=request.adapters_said(), seed=request.seed)
    return Kept(
        pictures.keep(drawn.after),
        pictures.keep(enlarged(drawn.before)),
        pictures.keep(enlarged(drawn.after)),
        drawn.after.width <= SMALL_PX,
        f'<p class="pair-caption"><span>{say("generate.before")}</span><b>{escape(said)}</b>'
        f"<span>{say('generate.after')}</span></p>",
        pictures.note_of(request),
    )


def _gallery(kept: list[Kept]) -> dict[str, Any]:
    shown = [(str(one.small), say("generate.in_history", **one.note)) for one in kept]
    return gr.update(value=shown, visible=True, selected_index=None)

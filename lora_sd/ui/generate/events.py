"""What happens when a part of the Generate tab is used: between its parts and the handlers."""

import random
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lora_sd.errors import UserError
from lora_sd.ui.adapters.offered import OfferedAdapter, download_copy
from lora_sd.ui.generate.handlers import (
    BY_HAND,
    MOST_SEED,
    MOST_STEPS,
    GenerateHandlers,
    OnStep,
    Request,
)
from lora_sd.ui.generate.tab import NOTHING, GenerateTab
from lora_sd.ui.show import enlarged, sentences_html

_PROGRESS = gr.Progress()
SMALL_PX, SMALL_SHOWN_PX, LARGE_SHOWN_PX = 128, 448, 640  # a small picture blurs when too large


@dataclass(frozen=True)
class GenerateEvents:
    """Events that other parts of the page cause."""

    opened: dict[str, Any]
    """Arguments of the event that reads the list of adapters anew."""
    seen: dict[str, Any]
    """Arguments of the event that keeps a result that is there by now from being chosen."""
    choose: dict[str, Any]
    """Arguments of the event that chooses the adapter of a run; its inputs: run and prompt."""


def wire_generate_tab(tab: GenerateTab, handlers: GenerateHandlers) -> GenerateEvents:
    """Connect the tab's parts with the handlers."""
    fields = {
        tab.adapter: "adapter", tab.scale: "scale", tab.prompt: "prompt", tab.seed: "seed",
        tab.negative: "negative", tab.steps: "steps", tab.guidance: "guidance", tab.base: "base",
    }  # fmt: skip

    def wish(data: dict[Any, Any]) -> Request:
        return handlers.request({name: data[part] for part, name in fields.items()})

    def report(page: gr.Request, progress: gr.Progress) -> OnStep:
        """Show how far the drawing is, and stop it when this page cancels."""
        progress(0, desc="Loading the base model")

        def on_step(done: int, total: int) -> bool:
            progress((done, total), desc="Drawing", unit="steps")
            return handlers.cancelling.is_cancelled(_id(page))

        return on_step

    def begin(page: gr.Request) -> dict[str, Any]:
        handlers.cancelling.begin(_id(page))
        return gr.update(visible=True)

    def press_cancel(page: gr.Request) -> None:
        handlers.cancelling.cancel(_id(page))

    def press_draw(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        try:
            checked = wish(data)
            before, after = handlers.before_and_after(checked, report(page, progress))
        except UserError as error:
            return {tab.problems: sentences_html(error.problems)}
        return {
            tab.problems: "",
            tab.empty: gr.update(visible=False),
            tab.pair: gr.update(
                value=(enlarged(before), enlarged(after)),
                visible=True,
                max_height=SMALL_SHOWN_PX if after.width <= SMALL_PX else LARGE_SHOWN_PX,
            ),
            tab.said: gr.update(value=_caption(checked), visible=True),
            tab.has_pair: True,
        }

    def press_strip(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        try:
            picture = handlers.strip(wish(data), report(page, progress))
        except UserError as error:
            return {tab.problems: sentences_html(error.problems)}
        return {
            tab.problems: "",
            tab.empty: gr.update(visible=False),
            tab.strip_title: gr.update(visible=True),
            tab.strip_picture: gr.update(value=picture, visible=True),
        }

    def release_scale(
        data: dict[Any, Any], page: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> dict[Any, Any]:
        handlers.cancelling.begin(_id(page))
        return press_draw(data, page, progress) if data[tab.has_pair] else gr.skip()

    def choose_adapter(chosen: object, written: object) -> dict[Any, Any]:
        return {tab.seen: BY_HAND} | _chosen(handlers.find(chosen), written)

    def _chosen(found: OfferedAdapter | None, written: object) -> dict[Any, Any]:
        copy = str(download_copy(found)) if found else None
        updates: dict[Any, Any] = {tab.download: gr.update(value=copy, visible=copy is not None)}
        config = found.config() if found else None
        if config:  # draw as the run's own samples were drawn
            updates[tab.steps] = min(config.sample.steps, MOST_STEPS)
            updates[tab.guidance] = config.sample.guidance
            if config.sample.prompts and not written:
                updates[tab.prompt] = config.sample.prompts[0]
        return updates

    def list_adapters(chosen: object, written: object, seen: object) -> dict[Any, Any]:
        """The list anew, and with it what to choose."""
        offered, to_choose = handlers.adapters(), handlers.to_choose(chosen, seen)
        newest = handlers.newest_result()
        if to_choose == chosen and seen in (BY_HAND, newest):
            return {tab.adapter: _choices(offered)}
        return _choose(offered, to_choose, written) | {tab.seen: newest}

    def _choose(offered: list[OfferedAdapter], value: object, written: object) -> dict[Any, Any]:
        return {tab.adapter: _choices(offered) | {"value": value}} | _chosen(
            handlers.find(value), written
        )

    def choose_run(run: object, written: object) -> dict[Any, Any]:
        """The newest adapter of a run: its result, or its newest checkpoint."""
        offered = handlers.adapters()
        ids = [one.id for one in offered if one.id == run or one.id.startswith(f"{run}/")]
        return _choose(offered, ids[0], written) if ids else list_adapters(None, written, None)

    def add_file(uploaded: object, base_name: object, written: object) -> dict[Any, Any]:
        if uploaded is None:
            return gr.skip()
        try:
            added = handlers.add_file(uploaded, base_name)
        except UserError as error:
            return {tab.file_problems: sentences_html(error.problems)}
        return {tab.file_problems: "", tab.file: None, tab.seen: BY_HAND} | _choose(
            handlers.adapters(), added.id, written
        )

    inputs = {*fields, tab.has_pair}
    chosen_parts = [tab.seen, tab.download, tab.prompt, tab.steps, tab.guidance]
    drawing: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": 1}
    pair_parts = [tab.problems, tab.empty, tab.pair, tab.said, tab.has_pair]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}

    def end() -> dict[str, Any]:
        return gr.update(visible=False)

    gr.on([tab.draw.click, tab.prompt.submit], begin, None, tab.cancel, **quick).then(
        press_draw, inputs, pair_parts, show_progress_on=[tab.pair, tab.empty], **drawing
    ).then(end, None, tab.cancel, **quick)
    tab.strip.click(begin, None, tab.cancel, **quick).then(
        press_strip,
        inputs,
        [tab.problems, tab.empty, tab.strip_title, tab.strip_picture],
        show_progress_on=[tab.strip_picture, tab.empty],
        **drawing,
    ).then(end, None, tab.cancel, **quick)
    tab.cancel.click(press_cancel, None, None, **quick)
    tab.scale.release(
        release_scale,
        inputs,
        pair_parts,
        show_progress_on=tab.pair,
        trigger_mode="always_last",
        **drawing,
    )
    tab.dice.click(
        lambda: random.randint(0, MOST_SEED), None, tab.seed, show_progress="hidden"
    ).then(release_scale, inputs, pair_parts, show_progress_on=tab.pair, **drawing)
    tab.file.upload(
        add_file,
        [tab.file, tab.base, tab.prompt],
        [tab.file_problems, tab.file, tab.adapter, *chosen_parts],
        show_progress_on=tab.file,
        **drawing,
    )
    looking: dict[str, Any] = {"concurrency_id": "look", "show_progress": "hidden"}
    tab.adapter.input(choose_adapter, [tab.adapter, tab.prompt], chosen_parts, **looking)
    looking["outputs"] = [tab.adapter, *chosen_parts]
    return GenerateEvents(
        opened={"fn": list_adapters, "inputs": [tab.adapter, tab.prompt, tab.seen], **looking},
        seen={"fn": handlers.newest_result, "outputs": tab.seen, **quick},
        choose={"fn": choose_run, **looking},
    )


def _choices(offered: list[OfferedAdapter]) -> dict[str, Any]:
    choices = [(one.label, one.id) for one in offered]
    return gr.update(choices=choices, info="" if choices else NOTHING)


def _id(page: gr.Request) -> str:
    return str(page.session_hash)


def _caption(wish: Request) -> str:
    return (
        '<p class="pair-caption"><span>without the adapter</span>'
        f"<b>{escape(wish.adapter.label)}, scale {wish.scale:g}, seed {wish.seed}</b>"
        "<span>with the adapter</span></p>"
    )

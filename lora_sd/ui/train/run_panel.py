"""The run on the Train tab: state, curves, samples, gauge, log, queue; read anew every second."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lora_sd.ui.adapters.offered import download_copy
from lora_sd.ui.curves import Drawn, loss_curve, rate_curve, validation_curve
from lora_sd.ui.queue import QueueState
from lora_sd.ui.sample_parts import build_gallery, build_step_slider
from lora_sd.ui.samples import Sample, shown_picture, slider
from lora_sd.ui.show import sentences_html
from lora_sd.ui.texts import say
from lora_sd.ui.train.run_handlers import Look, RunHandlers, Told
from lora_sd.ui.train.run_view import RunView, card_html, gauge_html

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class RunPanel:
    """The panel's parts that other parts of the page need.

    Attributes:
        run: its value is the run that is shown.
        said: HTML for what is to be said of a start.
        use, compare: buttons that lead to other tabs with that run.
        refresh: arguments of the event that looks whether anything is to be shown anew, which costs
            the browser little.
    """

    run: gr.Dropdown
    said: gr.HTML
    use: gr.Button
    compare: gr.Button
    refresh: dict[str, Any]


def build_run_panel(handlers: RunHandlers, start: gr.Button) -> RunPanel:
    """Lay out the panel inside the current column.

    Args:
        start: the form's button, which says what a press would do while a run is at work.
    """
    run = gr.Dropdown(
        [], value=None, label=say("run.run"), allow_custom_value=True, visible=False, elem_id="run"
    )
    card = gr.HTML(_empty_html(), elem_id="run-card")

    def button(name: str, **options: Any) -> gr.Button:
        shared = {"visible": False, "size": "md", "min_width": 90, "elem_id": name}
        return gr.Button(say(f"run.{name.replace('-', '_')}"), **{**shared, **options})

    with gr.Row(elem_classes="actions"):
        go_on = button("go-on", variant="primary")
        pause = button("pause")
        stop = button("stop")
        save = button("save-now")
        sample = button("sample-now")
        resume = button("resume", variant="primary")
        use = button("use", variant="primary")
        download = gr.DownloadButton(
            say("run.download"), visible=False, size="md", min_width=90, elem_id="run-download"
        )
        compare = button("compare")
    said = gr.HTML(elem_id="run-said")
    with gr.Column(visible=False, elem_id="queue", elem_classes="snug") as queue_side:
        queue_title = gr.HTML(elem_id="queue-title", elem_classes="part-title")
        entry = gr.Radio(
            [],
            label=say("queue.title"),
            show_label=False,
            container=False,
            elem_id="queue-entries",
        )
        with gr.Row(elem_classes="actions"):
            small: dict[str, Any] = {"size": "sm", "min_width": 80}
            up = gr.Button(say("queue.up"), elem_id="queue-up", **small)
            down = gr.Button(say("queue.down"), elem_id="queue-down", **small)
            remove = gr.Button(say("queue.remove"), elem_id="queue-remove", **small)
            hold = gr.Button(say("queue.hold"), elem_id="queue-hold", **small)
            queue_go_on = gr.Button(
                say("queue.go_on"), variant="primary", elem_id="queue-go-on", **small
            )
    curve = gr.HTML(visible=False, elem_id="curve")
    curves = gr.HTML(visible=False, elem_id="curves")
    samples_title = gr.HTML(visible=False, elem_classes="part-title", elem_id="samples-title")
    samples = build_gallery("samples", columns=4)
    sample_step = build_step_slider("sample-step")
    grid_title = gr.HTML(f"<h3>{say('run.grid')}</h3>", visible=False, elem_classes="part-title")
    grid = gr.Image(
        show_label=False,
        format="png",
        buttons=["fullscreen", "download"],
        interactive=False,
        visible=False,
        elem_id="grid",
    )
    with gr.Accordion(say("run.gauge_title"), visible=False, elem_id="gauge-fold") as gauge_fold:
        gauge = gr.HTML(elem_id="gauge")
    with gr.Accordion(say("run.log"), open=False, visible=False, elem_id="log-fold") as log_fold:
        log = gr.HTML(elem_id="log")
    shown = gr.State({})
    # How often run or queue were seen to have changed. A State would tell of it through the queue.
    changed = gr.Number(0, precision=0, visible=False)
    chosen = gr.State(None)  # of the queue: Gradio refuses, with a toast, an entry that has gone
    wanted = gr.State((None, None))  # a run, and the step of it whose samples were chosen by hand
    parts: dict[str, Any] = {
        "run": run, "card": card, "go_on": go_on, "pause": pause, "stop": stop, "save": save,
        "sample": sample, "resume": resume, "use": use, "download": download, "compare": compare,
        "queue": queue_side, "queue_title": queue_title, "queue_entry": entry, "queue_hold": hold,
        "queue_go_on": queue_go_on, "curve": curve, "curves": curves,
        "samples_title": samples_title, "samples": samples, "sample_step": sample_step,
        "grid_title": grid_title, "grid": grid, "gauge_fold": gauge_fold, "gauge": gauge,
        "log_fold": log_fold, "log": log, "start": start,
    }  # fmt: skip

    def look(data: dict[Any, Any]) -> Look:
        of_run, step = data[wanted]
        seen = data[shown].get("at_work")
        return handlers.look(data[run], step if of_run == data[run] else None, seen)

    def peek(data: dict[Any, Any]) -> Any:
        found = stamps(handlers, look(data))
        return gr.skip() if found == data[shown] else data[changed] + 1

    def show(data: dict[Any, Any]) -> dict[Any, Any]:
        updates, now = changes(handlers, look(data), data[shown], data[chosen])
        return {**{parts[name]: update for name, update in updates.items()}, shown: now}

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    refresh: dict[str, Any] = {
        "fn": peek, "inputs": {run, shown, wanted, changed}, "outputs": changed,
        "trigger_mode": "once", **quick,
    }  # fmt: skip
    changed.change(
        show,
        {run, shown, wanted, chosen},
        [*parts.values(), shown],
        trigger_mode="always_last",
        **quick,
    )
    gr.Timer(LOOK_EVERY_S).tick(**refresh)
    run.input(**refresh)
    sample_step.input(
        lambda name, step, seen: (name, None if step == seen.get("newest_sample") else step),
        [run, sample_step, shown],
        wanted,
        trigger_mode="always_last",
        queue=False,
        show_progress="hidden",
    ).then(**refresh)
    control: dict[str, Any] = {"concurrency_id": "trainer", "show_progress": "hidden"}

    def wire(pressed: gr.Button, act: Callable[[object], Told], on: Any) -> None:
        pressed.click(lambda value: told_html(act(value)), on, said, **control).then(**refresh)

    wire(stop, handlers.stop, run)
    wire(pause, handlers.pause, run)
    wire(go_on, handlers.go_on, run)
    wire(resume, handlers.resume, run)
    wire(save, lambda name: handlers.ask_now(name, "save"), run)
    wire(sample, lambda name: handlers.ask_now(name, "sample"), run)
    entry.input(lambda one: one, entry, chosen, queue=False, show_progress="hidden")
    wire(up, lambda one: handlers.move(one, -1), chosen)
    wire(down, lambda one: handlers.move(one, 1), chosen)
    wire(remove, handlers.remove, chosen)
    wire(hold, lambda _: handlers.hold(True), entry)
    wire(queue_go_on, lambda _: handlers.hold(False), entry)
    return RunPanel(run, said, use, compare, refresh)


def told_html(told: Told) -> str:
    """What came of a press, as a box of problems or a line of small print."""
    notice = f'<p class="hint" role="status">{escape(told.notice)}</p>' if told.notice else ""
    return sentences_html(told.problems) + notice


def changes(
    handlers: RunHandlers, look: Look, before: dict[str, Any], chosen: object = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(updates, stamps) of the parts that changed since the last look, which had `before`.

    Args:
        chosen: the entry of the queue that is chosen on the page.
    """
    now, updates = stamps(handlers, look), {}
    for name, stamp in now.items():
        if name in UNSEEN or before.get(name) == stamp:
            continue
        try:
            updates[name] = (
                _queue_update(name, look.queue, chosen)
                if name.startswith("queue")
                else _update(name, handlers, look, look.view or RunView(""))
            )
        except (OSError, SyntaxError):  # a picture that is still being written: next time
            now[name] = before.get(name)
    return updates, now


UNSEEN = ("at_work", "newest_sample")  # kept for the next look alone


def stamps(handlers: RunHandlers, look: Look) -> dict[str, Any]:
    """What each part shows, short enough to compare and to keep for each open page."""
    view, found = look.view, _queue_stamps(look.queue)
    if view is None:
        return found
    drawn = (view.name, view.course.step, view.steps)
    result = handlers.result(view.name)
    return found | {
        "at_work": look.at_work,
        "newest_sample": view.sample_steps[-1] if view.sample_steps else None,
        "run": (look.names, view.name, look.at_work),
        "card": (view.name, card_html(view)),
        "go_on": view.is_paused,
        "pause": view.can_ask and not view.is_paused,
        "stop": view.can_stop,
        "save": (view.can_ask, "save" in view.asked),
        "sample": (view.can_ask, "sample" in view.asked),
        "resume": view.can_resume,
        "use": (view.has_adapter, view.tone),
        "download": result and result.stamp(),
        "compare": len(look.names) > 1,
        "curve": drawn,
        "curves": drawn,
        "samples_title": view.sample_step,
        "samples": [(one.stamp(), one.base) for one in view.samples],
        "sample_step": (view.sample_steps, view.sample_step),
        "grid_title": view.grid is not None,
        "grid": view.grid and (str(view.grid), view.grid.stat().st_mtime_ns),
        "gauge_fold": view.steps > 0,
        "gauge": (view.name, view.course.gauged and view.course.gauged.step),
        "log_fold": bool(view.log),
        "log": hash(view.log),
        "start": look.at_work is not None,
    }


def _update(name: str, handlers: RunHandlers, look: Look, view: RunView) -> Any:
    drawn = [Drawn(view.name, view.course, view.steps)]
    match name:
        case "run":
            return gr.update(
                choices=[
                    (say("run.run_at_work", run=one) if one == look.at_work else one, one)
                    for one in look.names
                ],
                value=view.name,
                visible=len(look.names) > 1,
            )
        case "card":
            return card_html(view)
        case "go_on":
            return gr.update(visible=view.is_paused)
        case "pause":
            return gr.update(visible=view.can_ask and not view.is_paused)
        case "stop":
            return gr.update(visible=view.can_stop)
        case "save" | "sample":
            return gr.update(visible=view.can_ask, interactive=name not in view.asked)
        case "resume":
            return gr.update(visible=view.can_resume)
        case "use":
            variant = "primary" if view.tone == "good" else "secondary"
            return gr.update(visible=view.has_adapter, variant=variant)
        case "download":
            result = handlers.result(view.name)
            file = str(download_copy(result)) if result else None
            return gr.update(value=file, visible=file is not None)
        case "compare":
            return gr.update(visible=len(look.names) > 1)
        case "curve":
            return gr.update(value=loss_curve(drawn), visible=view.steps > 0)
        case "curves":
            both = rate_curve(drawn)
            if view.course.validated.losses:
                both = validation_curve(drawn) + both
            return gr.update(value=f'<div class="small">{both}</div>', visible=view.steps > 0)
        case "samples":
            pictures = [cell for one in view.samples for cell in _pair(one, view.sample_step or 0)]
            return gr.update(value=pictures, visible=bool(pictures))
        case "samples_title":
            step = view.sample_step
            title = say("run.samples", step=step) if step else say("run.samples_before")
            return gr.update(value=f"<h3>{title}</h3>", visible=step is not None)
        case "sample_step":
            steps = view.sample_steps
            return gr.update(value=view.sample_step, visible=len(steps) > 1, **slider(steps))
        case "grid_title":
            return gr.update(visible=view.grid is not None)
        case "grid":
            return gr.update(value=view.grid and _opened(view.grid), visible=bool(view.grid))
        case "gauge_fold":
            return gr.update(visible=view.steps > 0)
        case "gauge":
            return gauge_html(view.course.gauged, view.steps)
        case "start":
            return gr.update(value=say("train.queue" if look.at_work else "train.start"))
        case "log_fold":
            return gr.update(visible=bool(view.log))
        case _:
            return f'<pre tabindex="0">{escape(view.log)}</pre>'


def _queue_stamps(queue: QueueState) -> dict[str, Any]:
    there = bool(queue.entries) or queue.is_held
    return {
        "queue": there,
        "queue_title": ("held", queue.held_by),  # never None: it is written at the first look
        "queue_entry": queue.entries,
        "queue_hold": queue.is_held,
        "queue_go_on": queue.is_held,
    }


def _queue_update(name: str, queue: QueueState, chosen: object = None) -> Any:
    match name:
        case "queue":
            return gr.update(visible=bool(queue.entries) or queue.is_held)
        case "queue_title":
            about = say("queue.about")
            if queue.is_held:
                about = say("queue.held_by", run=queue.held_by) if queue.held_by else ""
                about = about or say("queue.held")
            return f'<h3>{say("queue.title")}</h3><p class="hint">{escape(about)}</p>'
        case "queue_entry":
            entries = _entries(queue)
            is_there = chosen in [id for _, id in entries]
            return gr.update(choices=entries, value=chosen if is_there else None)
        case "queue_hold":
            return gr.update(visible=not queue.is_held)
        case _:
            return gr.update(visible=queue.is_held)


def _entries(queue: QueueState) -> list[tuple[str, str]]:
    """(what is written, id) of each entry."""
    found = []
    for place, one in enumerate(queue.entries, 1):
        key = "entry_problem" if one.problem else "entry" if one.config else "entry_resume"
        text = say(f"queue.{key}", place=place, run=one.run, problem=one.problem)
        found.append((text, one.id))
    return found


def _pair(one: Sample, step: int) -> list[tuple[Image.Image, str]]:
    """The base's picture, where there is one, and the sample, with what they show."""
    own = say("run.step_picture" if step else "run.base_picture", step=step, prompt=one.prompt)
    cells = [(shown_picture(one.file), own)]
    if one.base is not None:
        cells.insert(0, (shown_picture(one.base), say("run.base_picture", prompt=one.prompt)))
    return cells


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        picture.load()
        return picture


def _empty_html() -> str:
    return (
        '<section class="empty"><svg viewBox="0 0 64 40" aria-hidden="true">'
        '<path d="M2 34 C 12 34, 12 8, 22 14 S 34 30, 44 26 S 56 30, 62 30"/></svg>'
        f"<h3>{say('run.empty_title')}</h3><p>{say('run.empty')}</p></section>"
    )

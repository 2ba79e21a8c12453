"""The run on the Train tab: state, loss curve, samples, log; read anew every second or so."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lora_sd.ui.adapters.offered import download_copy
from lora_sd.ui.curves import Drawn, loss_curve
from lora_sd.ui.show import enlarged, sentences_html
from lora_sd.ui.train.handlers import TrainHandlers
from lora_sd.ui.train.run_view import RunView, card_html

LOOK_EVERY_S = 1.5
EMPTY = (
    '<section class="empty"><svg viewBox="0 0 64 40" aria-hidden="true">'
    '<path d="M2 34 C 12 34, 12 8, 22 14 S 34 30, 44 26 S 56 30, 62 30"/></svg>'
    "<h3>Nothing trained yet</h3><p>Press <b>Start training</b>. The example pictures and the "
    "small base model come with the project: there is nothing to download, and the first samples "
    "appear here within a minute or so.</p></section>"
)

GRID_TITLE = "<h3>The result: each prompt at rising scales</h3>"


@dataclass(frozen=True)
class RunPanel:
    """The panel's parts that other parts of the page need."""

    run: gr.Dropdown
    use: gr.Button
    refresh: dict[str, Any]
    """Arguments of the event that reads the run anew."""


def build_run_panel(handlers: TrainHandlers) -> RunPanel:
    """Lay out the panel inside the current column."""
    run = gr.Dropdown(
        handlers.run_names(),
        value=None,
        label="Run",
        allow_custom_value=True,
        visible=False,
        elem_id="run",
    )
    card = gr.HTML(EMPTY, elem_id="run-card")
    with gr.Row(elem_classes="actions"):
        stop = gr.Button("Stop and save", visible=False, elem_id="stop")
        resume = gr.Button("Resume", variant="primary", visible=False, elem_id="resume")
        use = gr.Button("Try it out", variant="primary", visible=False, elem_id="use")
        download = gr.DownloadButton("Download", visible=False, elem_id="run-download")
    said = gr.HTML()
    curve = gr.HTML(visible=False, elem_id="curve")
    grid_title = gr.HTML(GRID_TITLE, visible=False, elem_classes="part-title")
    grid = gr.Image(
        show_label=False,
        format="png",
        buttons=["fullscreen", "download"],
        interactive=False,
        visible=False,
        elem_id="grid",
    )
    samples_title = gr.HTML(visible=False, elem_classes="part-title", elem_id="samples-title")
    samples = gr.Gallery(
        show_label=False,
        columns=3,
        height="auto",
        format="png",
        buttons=["fullscreen"],
        interactive=False,
        visible=False,
        elem_id="samples",
    )
    with gr.Accordion("Log", open=False, visible=False, elem_id="log-fold") as log_fold:
        log = gr.HTML(elem_id="log")
    shown = gr.State({})
    parts: dict[str, Any] = {
        "run": run, "card": card, "stop": stop, "resume": resume, "use": use,
        "download": download, "curve": curve, "samples_title": samples_title,
        "samples": samples, "grid_title": grid_title, "grid": grid,
        "log_fold": log_fold, "log": log,
    }  # fmt: skip

    def look(data: dict[Any, Any]) -> dict[Any, Any]:
        view = handlers.look(data[run])
        updates, now = changes(handlers, view, data[shown])
        if not updates:
            return gr.skip()
        return {parts[name]: update for name, update in updates.items()} | {shown: now}

    def press_stop(name: object) -> str:
        return sentences_html(handlers.stop(name))

    def press_resume(name: object) -> str:
        return sentences_html(handlers.resume(name))

    refresh = {
        "fn": look,
        "inputs": {run, shown},
        "outputs": [*parts.values(), shown],
        "queue": False,
        "show_progress": "hidden",
        "trigger_mode": "once",
    }
    timer = gr.Timer(LOOK_EVERY_S)
    timer.tick(**refresh)
    run.input(**refresh)
    control: dict[str, Any] = {"concurrency_id": "trainer", "show_progress": "hidden"}
    stop.click(press_stop, run, said, **control).then(**refresh)
    resume.click(press_resume, run, said, **control).then(**refresh)
    return RunPanel(run, use, refresh)


def changes(
    handlers: TrainHandlers, view: RunView | None, before: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(updates, stamps) of the parts that changed since the last look, which had `before`."""
    if view is None:
        return {}, {}
    now, updates = _stamps(handlers, view), {}
    for name in [name for name, stamp in now.items() if before.get(name) != stamp]:
        try:
            updates[name] = _update(name, handlers, view)
        except (OSError, SyntaxError):  # a picture that is still being written: next time
            now[name] = before.get(name)
    return updates, now


def _stamps(handlers: TrainHandlers, view: RunView) -> dict[str, Any]:
    """What each part shows, short enough to compare and to keep for each open page."""
    return {
        "run": (handlers.run_names(), view.name),
        "card": (view.name, card_html(view)),
        "stop": view.can_stop,
        "resume": view.can_resume,
        "use": (view.has_adapter, view.tone),
        "download": (result := handlers.result(view.name)) and result.stamp(),
        "curve": (view.name, view.course.loss[-1:], view.steps),
        "samples_title": _step_of(view),
        "samples": [_file_stamp(file) for file in view.samples],
        "grid_title": view.grid is not None,
        "grid": view.grid and _file_stamp(view.grid),
        "log_fold": bool(view.log),
        "log": hash(view.log),
    }


def _update(name: str, handlers: TrainHandlers, view: RunView) -> Any:
    match name:
        case "run":
            names = handlers.run_names()
            return gr.update(choices=names, value=view.name, visible=len(names) > 1)
        case "card":
            return card_html(view)
        case "stop":
            return gr.update(visible=view.can_stop)
        case "resume":
            return gr.update(visible=view.can_resume)
        case "use":
            variant = "primary" if view.tone == "good" else "secondary"
            return gr.update(visible=view.has_adapter, variant=variant)
        case "download":
            result = handlers.result(view.name)
            file = str(download_copy(result)) if result else None
            return gr.update(value=file, visible=file is not None)
        case "curve":
            html = loss_curve([Drawn(view.name, view.course, view.steps)])
            return gr.update(value=html, visible=bool(view.course.loss))
        case "samples":
            pictures = [_sample(file) for file in view.samples]
            return gr.update(value=pictures, visible=bool(pictures))
        case "samples_title":
            step = _step_of(view)
            title = f"Samples at step {step:,}" if step else "Samples before training"
            return gr.update(value=f"<h3>{title}</h3>", visible=step is not None)
        case "grid_title":
            return gr.update(visible=view.grid is not None)
        case "grid":
            return gr.update(value=view.grid and _opened(view.grid), visible=bool(view.grid))
        case "log_fold":
            return gr.update(visible=bool(view.log))
        case _:
            return _log_html(view.log)


def _step_of(view: RunView) -> int | None:
    """The step of the samples that are shown."""
    return int(view.samples[0].stem.split("_")[1]) if view.samples else None


def _sample(file: Path) -> tuple[Image.Image, str]:
    """A sample, and its prompt."""
    picture = _opened(file)
    return enlarged(picture), str(picture.info.get("prompt", ""))


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        picture.load()
        return picture


def _file_stamp(file: Path) -> tuple[str, int]:
    return str(file), file.stat().st_mtime_ns


def _log_html(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"

"""What the page says about a run, read from its folder alone."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

from lora_sd.run_folder import STALE_AFTER_S, WORKING, RunFolder, Status
from lora_sd.ui import fields
from lora_sd.ui.launch import Trainer
from lora_sd.ui.metrics import RECENT_STEPS, Course, read_course
from lora_sd.ui.show import sentence_html

Tone = Literal["busy", "good", "calm", "bad"]
LOG_LINES = 40


@dataclass
class RunView:
    """A run as the page shows it."""

    name: str
    badge: str = ""
    tone: Tone = "calm"
    message: str = ""
    step: int = 0
    steps: int = 0
    course: Course = Course()
    seconds_left: float | None = None
    can_stop: bool = False
    can_resume: bool = False
    has_adapter: bool = False
    samples: list[Path] = field(default_factory=list)
    grid: Path | None = None
    log: str = ""


def read_run(trainer: Trainer, name: str) -> RunView:
    """Read a run's folder; one that never came to have a folder shows why."""
    run = RunFolder(trainer.outputs / name)
    status, view = run.read_status(), RunView(name)
    starting = trainer.is_starting(name)
    if starting:
        view.badge, view.tone, view.can_stop = "Starting", "busy", True
        view.message = "Loading the libraries and the base model."
    elif status is None:
        _never_began(view, trainer, run)
    else:
        _began(view, status, trainer)
    if status is not None:
        view.step, view.steps = status.step, status.steps
        view.course = read_course(run.metrics_file)
        step_s = view.course.step_s
        if step_s is not None and view.tone == "busy" and not starting:
            view.seconds_left = step_s * max(0, view.steps - view.step)
    view.can_stop = view.can_stop and not trainer.is_stopping(name)
    if trainer.is_stopping(name):
        view.badge, view.message = "Stopping", "Finishing this step and saving it."
    if not run.config_file.is_file():
        view.can_resume = False
    view.has_adapter = bool(run.adapter_files())
    samples = run.sample_files()
    newest = samples[-1].name.rpartition("_")[0] if samples else ""
    view.samples = [file for file in samples if file.name.startswith(newest + "_")]
    view.grid = run.grid_file if run.grid_file.is_file() else None
    view.log = _log(run, trainer)
    return view


def _never_began(view: RunView, trainer: Trainer, run: RunFolder) -> None:
    """It ended before it wrote a status."""
    sentences = trainer.console_errors(run.name)
    lines = trainer.console(run.name).strip().splitlines()
    view.badge, view.tone = "Not started", "bad"
    view.can_resume = run.config_file.is_file()
    if trainer.was_stopped(run.name) and not sentences:
        view.badge, view.tone, view.message = "Stopped", "calm", "Stopped before it began."
        return
    view.message = " ".join(sentences) or (
        f"The trainer ended before it began. Its last line: {lines[-1]}"
        if lines
        else "The trainer ended before it began."
    )


def _began(view: RunView, status: Status, trainer: Trainer) -> None:
    errors = trainer.console_errors(view.name)
    if status.is_interrupted():
        view.badge, view.tone, view.can_resume = "Interrupted", "bad", True
        view.message = (
            f"The trainer's process is gone, at step {status.step:,} of {status.steps:,}. "
            "What was saved is safe: resume to go on from there."
        )
    elif status.state in WORKING:
        view.badge, view.tone, view.can_stop = _busy_badge(status), "busy", True
        words = status.message or "stop whenever you like: what was learned is saved"
        view.message = words[:1].upper() + words[1:] + "."
        if status.seconds_silent() > STALE_AFTER_S:
            view.message = f"No sign of life for {duration(status.seconds_silent())}."
    elif status.state == "finished":
        view.badge, view.tone = "Finished", "good"
        view.message = "The adapter is ready to use and to download."
        if status.message:
            view.message += f" Read back: {status.message}."
    elif status.state == "stopped":
        view.badge, view.tone, view.can_resume = "Stopped", "calm", True
        view.message = (
            f"Stopped at step {status.step:,} of {status.steps:,}, and saved. "
            "Resume to go on as if nothing had happened."
        )
    else:
        view.badge, view.tone, view.can_resume = "Failed", "bad", True
        view.message = status.message or "The trainer failed; its log says why."
    if errors and view.can_resume and " ".join(errors) not in view.message:
        view.message = " ".join(errors)  # why the last try to go on did not begin


def _busy_badge(status: Status) -> str:
    badges = {"starting": "Starting", "sampling": "Drawing samples", "saving": "Saving"}
    return badges.get(status.state, "Training")


def _log(run: RunFolder, trainer: Trainer) -> str:
    try:
        with open(run.log_file, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        text = trainer.console(run.name)
    return "\n".join(text.splitlines()[-LOG_LINES:])


def duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def card_html(view: RunView) -> str:
    """The run's state at a glance."""
    share = 100 * view.step / view.steps if view.steps else 0.0
    facts = [("Step", f"{view.step:,}", f"of {view.steps:,}" if view.steps else "")]
    if view.seconds_left is not None:
        facts.append(("Time left", duration(view.seconds_left), ""))
    if view.course.images_per_s is not None:
        facts.append(("Speed", f"{view.course.images_per_s:.3g}", "images/s"))
    if view.course.recent_loss is not None:
        of = min(RECENT_STEPS, view.course.step)
        facts.append(("Loss", f"{view.course.recent_loss:.4f}", f"mean of {of}"))
    shown = "".join(
        f"<div><dt>{what}</dt><dd>{value} <small>{unit}</small></dd></div>"
        for what, value, unit in facts
    )
    waiting = " waiting" if view.tone == "busy" and not view.course.loss else ""
    return (
        f'<section class="run-card tone-{view.tone}" data-state="{escape(view.badge.lower())}">'
        f'<header><h3>{escape(view.name)}</h3><span class="badge">{escape(view.badge)}</span>'
        f"</header><p>{sentence_html(fields.in_page_words(view.message))}&nbsp;</p>"
        f'<div class="bar{waiting}" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}"><i style="width:{share:.2f}%"></i></div>'
        + (f"<dl>{shown}</dl>" if view.steps else "")
        + "</section>"
    )

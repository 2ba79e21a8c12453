"""What the page says about a run, read from its folder alone."""

from dataclasses import dataclass, field
from html import escape
from math import log10
from pathlib import Path
from typing import Literal

from lora_sd.gauge_bounds import EXPLODING, LARGE, NIL, NIL_SHARE
from lora_sd.run_folder import STALE_AFTER_S, WORKING, Request, RunFolder, Status
from lora_sd.ui import fields
from lora_sd.ui.launch import Trainer
from lora_sd.ui.metrics import RECENT_STEPS, Course, Gauged, read_course
from lora_sd.ui.samples import Sample, nearest, sample_steps, samples_at
from lora_sd.ui.show import sentence_html
from lora_sd.ui.texts import say

Tone = Literal["busy", "good", "calm", "bad"]
LOG_LINES = 40
LOG_BYTES = 16_384
LAST_LINES = 20  # of a trainer that crashed
LEAST_SHOWN = 1e-5  # of the gauge, whose bars are logarithmic up to 1


@dataclass
class RunView:
    """A run as the page shows it.

    Attributes:
        state: names the texts and styles of its badge: 'training', 'stopped' ...
        asked: what it was asked for and has not done yet.
        sample_step: the step whose samples are shown.
        last_lines: what a trainer that crashed wrote last.
    """

    name: str
    state: str = ""
    tone: Tone = "calm"
    message: str = ""
    step: int = 0
    steps: int = 0
    course: Course = Course()
    seconds_left: float | None = None
    can_stop: bool = False
    can_ask: bool = False
    can_resume: bool = False
    is_paused: bool = False
    asked: frozenset[Request] = frozenset()
    has_adapter: bool = False
    sample_steps: list[int] = field(default_factory=list)
    sample_step: int | None = None
    samples: list[Sample] = field(default_factory=list)
    grid: Path | None = None
    log: str = ""
    last_lines: tuple[str, ...] = ()

    @property
    def badge(self) -> str:
        """The state in a word or two."""
        return say(f"run.state.{self.state}")


def read_run(trainer: Trainer, name: str, sample_step: int | None = None) -> RunView:
    """Read a run's folder; one that never came to have a folder shows why.

    Args:
        sample_step: whose samples to show; None: the newest.
    """
    run = RunFolder(trainer.outputs / name)
    status, view = run.read_status(), RunView(name)
    starting = trainer.is_starting(name)
    if starting:
        view.state, view.tone, view.can_stop = "starting", "busy", True
        view.message = say("run.loading")
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
    if trainer.is_stopping(name):
        view.state, view.message = "stopping", say("run.finishing_step")
        view.can_stop = view.can_ask = view.is_paused = False
    if not run.config_file.is_file():
        view.can_resume = False
    view.has_adapter = bool(run.adapter_files())
    view.sample_steps = sample_steps(run)
    view.sample_step = nearest(view.sample_steps, sample_step)
    if view.sample_step is not None:
        view.samples = samples_at(run, view.sample_step)
    view.grid = run.grid_file if run.grid_file.is_file() else None
    view.log = _log(run, trainer)
    return view


def _never_began(view: RunView, trainer: Trainer, run: RunFolder) -> None:
    """It ended before it wrote a status."""
    sentences = trainer.console_errors(run.name)
    ending = trainer.ending(run.name)
    view.state, view.tone = "not_started", "bad"
    view.can_resume = run.config_file.is_file()
    if trainer.was_stopped(run.name) and not sentences:
        view.state, view.tone, view.message = "stopped", "calm", say("run.stopped_before")
    elif sentences:
        view.message = " ".join(sentences)
    elif last := [line for line in ending.last_lines if line.strip()][-1:]:
        view.message = say("run.ended_before_line", line=last[0].strip())
        view.last_lines = ending.last_lines[-LAST_LINES:]
    else:
        view.message = say("run.ended_before")


def _began(view: RunView, status: Status, trainer: Trainer) -> None:
    errors = trainer.console_errors(view.name)
    if status.is_interrupted():
        view.state, view.tone, view.can_resume = "interrupted", "bad", True
        said = trainer.ending(view.name)
        view.message = say("run.interrupted", step=status.step, steps=status.steps)
        if ending := said.sentence():
            view.message = f"{ending} {view.message}"
        view.last_lines = said.last_lines[-LAST_LINES:]
    elif status.state in WORKING:
        _at_work(view, status, trainer)
    elif status.state == "finished":
        view.state, view.tone = "finished", "good"
        view.message = say("run.ready")
        if status.message:
            view.message += " " + say("run.read_back", how=status.message)
    elif status.state == "stopped":
        view.state, view.tone, view.can_resume = "stopped", "calm", True
        view.message = say("run.stopped", step=status.step, steps=status.steps)
    else:
        view.state, view.tone, view.can_resume = "failed", "bad", True
        view.message = status.message or say("run.failed")
    if errors and view.can_resume and " ".join(errors) not in view.message:
        view.message = " ".join(errors)  # why the last try to go on did not begin


def _at_work(view: RunView, status: Status, trainer: Trainer) -> None:
    view.state, view.tone, view.can_stop, view.can_ask = status.state, "busy", True, True
    view.asked = trainer.asked(view.name)
    view.is_paused = "pause" in view.asked or status.state == "paused"
    if status.state == "paused":
        view.tone, view.message = "calm", say("run.paused", step=status.step)
    elif "pause" in view.asked and status.state == "training":
        view.state, view.message = "pausing", say("run.finishing_to_pause")
    elif "save" in view.asked or "sample" in view.asked:
        view.message = say("run.asked")
    elif status.message:
        view.message = status.message[:1].upper() + status.message[1:] + "."
    else:
        view.message = say("run.stop_whenever")
    if status.seconds_silent() > STALE_AFTER_S:
        view.message = say("run.silent", how_long=duration(status.seconds_silent()))


def _log(run: RunFolder, trainer: Trainer) -> str:
    try:
        with open(run.log_file, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        text = trainer.console(run.name)
    return "\n".join(text.splitlines()[-LOG_LINES:])


def duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return say("run.seconds", seconds=whole)
    minutes = whole // 60
    if whole < 600:
        return say("run.minutes_seconds", minutes=minutes, seconds=whole % 60)
    if whole < 3600:
        return say("run.minutes", minutes=minutes)
    return say("run.hours", hours=minutes // 60, minutes=minutes % 60)


def card_html(view: RunView) -> str:
    """The run's state at a glance."""
    share = 100 * view.step / view.steps if view.steps else 0.0
    course = view.course
    left = "" if view.seconds_left is None else duration(view.seconds_left)
    speed = "" if course.images_per_s is None else f"{course.images_per_s:.3g}"
    loss = "" if course.recent_loss is None else f"{course.recent_loss:.4f}"
    count = min(RECENT_STEPS, course.step)
    facts = [
        (say("run.step"), f"{view.step:,}", say("run.of_steps", steps=view.steps)),
        (say("run.time_left"), left, ""),
        (say("run.speed"), speed, say("run.images_per_s")),
        (say("run.loss"), loss, say("run.mean_of", count=count)),
    ]
    shown = "".join(
        f"<div><dt>{what}</dt><dd>{value} <small>{unit}</small></dd></div>"
        if value
        else f"<div><dt>{what}</dt><dd>&ndash;</dd></div>"
        for what, value, unit in facts
    )
    waiting = " waiting" if view.tone == "busy" and not course.loss else ""
    last = "\n".join(view.last_lines).strip()
    lines = (
        f'<details class="last-lines"><summary>{say("run.last_lines")}</summary>'
        f'<pre tabindex="0">{escape(last)}</pre></details>'
        if last
        else ""
    )
    return (
        f'<section class="run-card tone-{view.tone}" data-state="{view.state}">'
        f"<header><h3>{escape(view.name)}</h3>"
        f'<span class="badge" role="status">{view.badge}</span></header>'
        f"<p>{sentence_html(fields.in_page_words(view.message))}</p>{lines}"
        f'<div class="bar{waiting}" role="progressbar" aria-label="{say("run.progress")}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}">'
        f'<i style="width:{share:.2f}%"></i></div><dl>{shown}</dl></section>'
    )


def gauge_html(gauged: Gauged | None, steps: int) -> str:
    """How large the update is beside the weights it adapts: a sentence, and bars."""
    if gauged is None:
        return f'<p class="hint">{say("run.gauge_later")}</p>'
    rows = [(say(f"run.gauge.{name}"), value) for name, value in gauged.kinds.items()]
    blocks = sorted(gauged.blocks.items(), key=lambda one: -one[1])
    return (
        f'<p class="hint">{say("run.gauge_about", step=gauged.step)} '
        f"<b>{gauge_sentence(gauged, steps)}</b></p>{_bars_html(rows)}"
        f"<details><summary>{say('run.gauge_blocks')}</summary>{_bars_html(blocks)}</details>"
    )


def gauge_sentence(gauged: Gauged, steps: int) -> str:
    """What the numbers mean, by the bounds at which the trainer warns."""
    largest = max(gauged.kinds.values())
    if largest > EXPLODING:
        return say("run.gauge_exploding")
    if largest > LARGE:
        return say("run.gauge_large")
    if largest < NIL:
        return say("run.gauge_nil" if gauged.step >= NIL_SHARE * steps else "run.gauge_early")
    return say("run.gauge_learns")


def _bars_html(rows: list[tuple[str, float]]) -> str:
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td><i style='width:"
        f"{100 * (1 - log10(min(max(value, LEAST_SHOWN), 1.0)) / log10(LEAST_SHOWN)):.1f}%'></i>"
        f"</td><td>{100 * value:.3g} %</td></tr>"
        for name, value in rows
    )
    return f'<table class="gauge">{cells}</table>'

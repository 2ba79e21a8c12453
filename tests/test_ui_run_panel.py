"""The run panel: what it shows of a run, what it sends to the page, what it tells a run."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ui_fake_trainer import config, fake_trainer, state, wait_for  # noqa: F401

from lora_sd.base_files import pickles
from lora_sd.gauge_bounds import NIL
from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui import samples
from lora_sd.ui.launch import Trainer
from lora_sd.ui.metrics import Gauged
from lora_sd.ui.queue import QueuedRun, QueueState, Submitted
from lora_sd.ui.show import sentences_html
from lora_sd.ui.train import run_panel
from lora_sd.ui.train.run_handlers import Look, RunHandlers, submitted_sentence
from lora_sd.ui.train.run_panel import changes
from lora_sd.ui.train.run_view import card_html, duration, gauge_html, gauge_sentence, read_run
from lora_sd.ui.workplace import Workplace


@pytest.fixture
def handlers(trainer: Trainer) -> RunHandlers:
    return RunHandlers(Workplace(trainer.outputs, None, trainer))


@pytest.fixture
def run(trainer: Trainer) -> RunFolder:
    run = RunFolder(trainer.outputs / "run")
    run.samples.mkdir(parents=True)
    run.config_file.write_text("{}")
    run.write_status(Status("training", 3, 10))
    return run


def draw(run: RunFolder, step: int, index: int, seed: int = 1) -> Path:
    """A sample as the trainer writes it."""
    file, info = run.sample_file(step, index), PngInfo()
    asked = {"prompt": f"fox {index}", "seed": seed, "adapter": f"at {step}", "scale": 1.0}
    info.add_text("lora_sd", json.dumps(asked))
    Image.effect_noise((64, 64), 90).save(file, pnginfo=info)
    return file


@pytest.mark.parametrize("files", [["a b.ckpt"], ["one.bin", "two's.bin"]])
def test_a_command_is_code_of_its_own(run: RunFolder, trainer: Trainer, files: list[str]) -> None:
    paths = [Path("/models", name) for name in files]
    refused = pickles.refusal("<model>", paths)
    command = pickles.command({path: pickles.converted(path) for path in paths})
    code = f">{escape(command)}</code>"
    assert code in sentences_html(refused.problems)
    run.write_status(Status("failed", 0, 10, f"{refused.problems[0]} Set train.steps to less."))
    card = card_html(read_run(trainer, "run"))
    assert re.search(re.escape(code) + r" Set &#x27;[^;]*Steps&#x27; to less\.", card)
    assert "&lt;model&gt;" in card
    assert "<code" not in sentences_html(["Nothing to run, with: python -c x"])


def test_card_escapes_what_a_run_says(run: RunFolder, trainer: Trainer) -> None:
    run.write_status(Status("failed", 3, 10, "<img src=x onerror=alert(1)>"))
    assert "<img" not in card_html(read_run(trainer, "run"))


def test_the_last_lines_of_a_crash_are_shown(trainer: Trainer) -> None:
    trainer.start(config(trainer.outputs, rank=77))
    wait_for(lambda: trainer.current() is None)
    view = read_run(trainer, "run")
    assert view.badge == "Not started" and view.last_lines
    assert "something nobody foresaw</pre>" in card_html(view)


def test_only_changes_are_sent_and_half_written_pictures_wait(
    run: RunFolder, handlers: RunHandlers
) -> None:
    sample = draw(run, 3, 0)
    whole = sample.read_bytes()
    for file in (sample, run.grid_file):
        file.write_bytes(whole[: len(whole) // 2])
    updates, shown = changes(handlers, handlers.look(None), {})
    assert {"card", "stop"} <= updates.keys() and not {"samples", "grid"} & updates.keys()
    for file in (sample, run.grid_file):
        file.write_bytes(whole)
    updates, shown = changes(handlers, handlers.look(None), shown)
    assert updates.keys() == {"samples", "grid"}
    assert changes(handlers, handlers.look(None), shown) == ({}, shown)


def test_samples_stand_beside_the_base_s_of_the_same(run: RunFolder, handlers: RunHandlers) -> None:
    base = [draw(run, 0, index) for index in (0, 1)]
    draw(run, 5, 0)
    later = [draw(run, 10, 0), draw(run, 10, 1, seed=2)]
    run.sample_file(10, 2).write_bytes(b"")
    view = handlers.look("run").view
    assert view and (view.sample_steps, view.sample_step) == ([0, 5, 10], 10)
    assert [(one.file, one.base) for one in view.samples] == [(later[0], base[0]), (later[1], None)]
    updates, _ = changes(handlers, handlers.look("run"), {})
    said = [text for _, text in updates["samples"]["value"]]
    assert said == ["base: fox 0", "step 10: fox 0", "step 10: fox 1"]
    earlier = handlers.look("run", 6).view
    assert earlier and earlier.sample_step == 5 and len(earlier.samples) == 1
    for wrong in ("x", [3], float("nan"), -1e300, True):
        assert handlers.look("run", wrong).view


def test_a_slider_goes_from_sample_to_sample() -> None:
    assert samples.slider([0, 20, 50]) == {"minimum": 0, "maximum": 50, "step": 10}
    assert samples.slider([20, 30]) == {"minimum": 0, "maximum": 30, "step": 10}
    assert samples.slider([0]) == samples.slider([]) == {"minimum": 0, "maximum": 1, "step": 1}
    assert samples.nearest([0, 20, 50], 34) == 20 and samples.nearest([], 3) is None


def test_a_run_that_waits_says_so(run: RunFolder, trainer: Trainer, handlers: RunHandlers) -> None:
    def shown() -> tuple[str, dict[str, bool]]:
        updates, _ = changes(handlers, handlers.look("run"), {})
        names = ("pause", "go_on", "stop", "save", "sample", "resume")
        return read_run(trainer, "run").badge, {name: updates[name]["visible"] for name in names}

    at_work = {"stop": True, "save": True, "sample": True, "resume": False}
    assert shown() == ("Training", {"pause": True, "go_on": False} | at_work)
    run.ask("pause")
    assert shown() == ("Pausing", {"pause": False, "go_on": True} | at_work)
    run.write_status(Status("paused", 3, 10))
    assert shown() == ("Paused", {"pause": False, "go_on": True} | at_work)
    run.write_status(Status("stopped", 3, 10))
    assert shown()[1] == dict.fromkeys(at_work, False) | {
        "pause": False, "go_on": False, "resume": True,
    }  # fmt: skip


def test_what_was_asked_for_cannot_be_asked_again_before_it_is_done(
    run: RunFolder, handlers: RunHandlers
) -> None:
    assert handlers.ask_now("run", "save").problems == []
    updates, shown = changes(handlers, handlers.look("run"), {})
    assert not updates["save"]["interactive"] and updates["sample"]["interactive"]
    run.withdraw("save")
    updates, _ = changes(handlers, handlers.look("run"), shown)
    assert updates["save"]["interactive"]


@pytest.mark.parametrize("name", ["../run", "", None, 3, "no-such-run"])
def test_only_names_of_runs_are_told_anything(handlers: RunHandlers, name: Any) -> None:
    for tell in (handlers.stop, handlers.resume, handlers.pause, handlers.go_on):
        assert tell(name).problems
    assert handlers.ask_now(name, "save").problems
    assert handlers.move(name, 1).problems and handlers.remove(name).problems


def test_the_next_run_is_followed_by_who_watched_the_one_before(
    handlers: RunHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        (handlers.outputs / name).mkdir(parents=True)
        (handlers.outputs / name / "config.yaml").write_text("{}")
    monkeypatch.setattr(handlers.trainer, "current", lambda: "two")

    def shown(look: Look) -> str:
        assert look.view
        return look.view.name

    assert shown(handlers.look(None)) == "two"
    assert shown(handlers.look("one", was_at_work="one")) == "two"
    assert shown(handlers.look("three", was_at_work="one")) == "three"
    assert shown(handlers.look("two", was_at_work="two")) == "two"


def test_no_run_is_no_error(handlers: RunHandlers) -> None:
    look = handlers.look("gone", 3, ["x"])
    assert look.view is None
    updates, _ = changes(handlers, look, {})
    assert not updates["queue"]["visible"]


def test_a_queue_is_shown_with_what_holds_it_and_what_is_wrong() -> None:
    entries = (
        QueuedRun("a", "cat", "train: {}"),
        QueuedRun("b", "owl"),
        QueuedRun("c", "fox", "", "no"),
    )
    queue = QueueState(entries, held_by="ink")
    assert run_panel._entries(queue) == [
        ("1. cat", "a"), ("2. owl, goes on", "b"), ("3. fox: no", "c"),
    ]  # fmt: skip
    assert "'ink' was stopped" in run_panel._queue_update("queue_title", queue).replace(
        "&#x27;", "'"
    )
    assert run_panel._queue_update("queue_go_on", queue)["visible"]
    assert not run_panel._queue_update("queue_hold", queue)["visible"]
    assert run_panel._queue_update("queue_entry", queue, "b")["value"] == "b"
    assert run_panel._queue_update("queue_entry", queue, "gone")["value"] is None
    said = submitted_sentence(Submitted("owl", 2, "ink"))
    assert said == "'owl' waits in the queue, at place 2: 'ink' is being trained."
    assert submitted_sentence(Submitted("owl")) == ""


def test_the_gauge_tells_by_the_trainer_s_bounds() -> None:
    def said(size: float, step: int = 50) -> str:
        return gauge_sentence(Gauged(step, {"update_conv": size, "update_linear": 0.0}, {}), 100)

    assert said(NIL / 2, 5) != said(NIL / 2) and "raise the learning rate" in said(NIL / 2)
    assert said(NIL * 2) == "It learns." and "strong" in said(0.5) and "overwhelms" in said(1.5)
    html = gauge_html(Gauged(50, {"update_conv": 0.1}, {"<mid>": 1.0}), 100)
    assert "Convolutions" in html and "width:80.0%" in html and "&lt;mid&gt;" in html
    assert "Measured at steps" in gauge_html(None, 100)


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 900, 7500)] == ["5 s", "1 min 5 s", "15 min", "2 h 5 min"]

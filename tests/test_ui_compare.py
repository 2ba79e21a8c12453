"""Two runs side by side."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from ui_fake_trainer import config, fake_trainer  # noqa: F401

from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui.compare.handlers import CompareHandlers, Row
from lora_sd.ui.compare.tab import changes
from lora_sd.ui.launch import Trainer
from lora_sd.ui.workplace import Workplace


@pytest.fixture
def handlers(trainer: Trainer) -> CompareHandlers:
    return CompareHandlers(Workplace(trainer.outputs, None, trainer))


def make_run(outputs: Path, name: str, steps: tuple[int, ...] = (), **train: Any) -> RunFolder:
    """A run as the trainer leaves it, with samples of some steps and of the base."""
    run = RunFolder(outputs / name)
    run.samples.mkdir(parents=True)
    run.config_file.write_text(config(outputs, name, **train).to_yaml())
    run.write_status(Status("finished", 20, 20))
    for step in (1, 2):
        run.append_metrics(
            {"step": step, "loss": 1 / step, "lr": 1e-3, "validation_loss": 1 / step}
        )
    for step in steps:
        draw(run, step)
    return run


def draw(run: RunFolder, step: int, prompt: str = "fox", seed: int = 1) -> Path:
    info = PngInfo()
    info.add_text("lora_sd", json.dumps({"prompt": prompt, "seed": seed, "adapter": run.name}))
    file = run.sample_file(step, 0)
    Image.effect_noise((64, 64), 90).save(file, pnginfo=info)
    return file


def test_only_what_differs_is_told_and_no_path(handlers: CompareHandlers) -> None:
    make_run(handlers.outputs, "one")
    other = make_run(handlers.outputs, "other", rank=16, seed=7)
    values = yaml.safe_load(other.config_file.read_text())
    values["data"]["folder"] = "/secret/place/cats"
    other.config_file.write_text(yaml.safe_dump(values))
    found = handlers.compare("one", "other")
    assert found.problems == []
    told = {row.one: row.other for row in found.settings}
    assert len(told) == 3 and told["8"] == "16" and told["assets/ink-icons"] == "cats"
    assert "secret" not in str(changes(found, {}))


def test_results_and_curves_are_of_both(handlers: CompareHandlers) -> None:
    for name in ("one", "other"):
        make_run(handlers.outputs, name)
    found = handlers.compare("one", "other")
    assert Row("Lowest validation loss", *["0.5000 at step 2"] * 2) in found.results
    assert [run.name for run in found.drawn] == ["one", "other"] and found.settings == []
    updates, shown = changes(found, {})
    assert updates["curves"].count("of-1") >= 3
    assert "All settings are the same" in updates["settings"]
    assert changes(handlers.compare("one", "other"), shown) == ({}, shown)


def test_pictures_are_those_of_the_same_prompt_seed_and_step(handlers: CompareHandlers) -> None:
    one = make_run(handlers.outputs, "one", (0, 10, 20, 30))
    other = make_run(handlers.outputs, "other", (0, 10, 25, 30))
    found = handlers.compare("one", "other").pictures
    assert (found.steps, found.step, found.has_base) == ([10, 30], 30, True)
    [(left, right)] = found.pairs
    assert left.file == one.sample_file(30, 0) and right.file == other.sample_file(30, 0)
    assert handlers.compare("one", "other", 12).pictures.step == 10
    draw(other, 30, seed=2)
    found = handlers.compare("one", "other").pictures
    assert found.pairs == [] and "same prompt, seed" in found.notice
    updates, _ = changes(handlers.compare("one", "other", 10), {})
    said = [text for _, text in updates["pictures"]["value"]]
    assert said == ["base: fox", "one: fox", "other: fox"]


def test_bases_that_differ_have_no_picture_in_common(handlers: CompareHandlers) -> None:
    for name in ("one", "other"):
        run = make_run(handlers.outputs, name, (0, 10))
    values = yaml.safe_load(run.config_file.read_text())
    values["base"]["model"] = "another"
    run.config_file.write_text(yaml.safe_dump(values))
    found = handlers.compare("one", "other")
    assert found.pictures.pairs and not found.pictures.has_base
    assert (
        "no step" in handlers.compare("one", make_run(handlers.outputs, "x").name).pictures.notice
    )


@pytest.mark.parametrize(
    "one, other",
    [
        ("one", "one"),
        ("one", None),
        ("one", "../one"),
        ("one", ["one"]),
        (3, "one"),
        ("one", "broken"),
    ],
)
def test_what_cannot_be_compared_is_said(handlers: CompareHandlers, one: Any, other: Any) -> None:
    make_run(handlers.outputs, "one")
    make_run(handlers.outputs, "broken").config_file.write_text("train: {steps: x}")
    found = handlers.compare(one, other)
    assert len(found.problems) == 1 and found.drawn == []
    updates, _ = changes(found, {})
    assert str(handlers.outputs) not in updates["problems"]
    assert 'role="alert"' in updates["problems"] and updates["curves"] == ""


def test_no_runs_is_said(handlers: CompareHandlers) -> None:
    assert "no runs yet" in handlers.compare(None, None).problems[0]


def test_the_newest_two_are_compared_unless_others_were_chosen(handlers: CompareHandlers) -> None:
    assert handlers.choice(None, None) == (None, None)
    make_run(handlers.outputs, "one")
    assert handlers.choice(None, None) == ("one", None)
    for name in ("two", "three"):
        make_run(handlers.outputs, name)
    newest = handlers.names()
    assert handlers.choice(None, None) == (newest[0], newest[1])
    assert handlers.choice("one", "two") == ("one", "two")
    assert handlers.choice("one", "one") == ("one", newest[0] if newest[0] != "one" else newest[1])
    assert handlers.choice(["x"], 3) == (newest[0], newest[1])


def test_a_run_at_work_is_looked_at_again(handlers: CompareHandlers) -> None:
    make_run(handlers.outputs, "one")
    run = make_run(handlers.outputs, "other")
    _, shown = changes(handlers.compare("one", "other"), {})
    run.write_status(Status("training", 3, 20))
    updates, _ = changes(handlers.compare("one", "other"), shown)
    assert updates["timer"].active

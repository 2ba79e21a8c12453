"""Samples: the base beside the adapter, each prompt at its own scale, and no failure ends a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import choose, randomise
from heard import heard
from PIL import Image
from test_train import losses, tensors, train

from lora_sd import inject, samples
from lora_sd.errors import BaseModelError
from lora_sd.formats import save_adapter
from lora_sd.generate import Cancelled, PictureSettings, generate
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.sample_prompts import SamplePrompts
from lora_sd.samples import Samples, read_settings

SHARED = PictureSettings("", seed=5, steps=2, guidance=2, width_px=16, height_px=16, adapter="run")


class Drawing:
    """A run's folder, its samples, and a base with an adapter that has learnt something."""

    def __init__(self, base, root: Path) -> None:
        self.base, self.file = base, root / "prompts.txt"
        self.run: RunFolder = create_run(root / "outputs", "run", "run", "")
        inject.attach(base.components, choose(base.components))
        randomise(base.components)
        self.write("a red wall", "a blue wall --am 0.5")

    def write(self, *lines: str) -> None:
        self.file.write_text("\n".join(lines))

    def draw(self, step: int) -> list[str]:
        prompts = SamplePrompts(["an own one"], self.file, SHARED, 8)
        drawn = Samples(self.base, self.run, prompts, Accelerator())
        return [file.name for file in drawn.draw(step, lambda done, of: False)]

    def pixels(self, step: int, index: int) -> np.ndarray:
        return np.asarray(Image.open(self.run.sample_file(step, index)), dtype=int)


@pytest.fixture
def drawing(base, tmp_path):
    return Drawing(base, tmp_path)


def fails_for(prompt, error):
    """A `generate` that cannot draw one of the prompts."""

    def draw(base, settings, on_step):
        if any(one.prompt == prompt for one in settings):
            raise error
        return generate(base, settings, on_step)

    return draw


def test_step_0_is_the_base_and_later_ones_the_adapter_at_each_ones_scale(drawing):
    assert drawing.draw(0) == [f"step_000000_0{n}.png" for n in range(3)]
    assert drawing.draw(100) == [f"step_000100_0{n}.png" for n in range(3)]
    settings = [read_settings(drawing.run.sample_file(100, n)) for n in range(3)]
    assert [one.prompt for one in settings] == ["an own one", "a red wall", "a blue wall"]
    assert [one.scale for one in settings] == [1, 1, 0.5]
    assert settings[1] == replace(SHARED, prompt="a red wall", seed=6)
    half = generate_at(drawing.base, settings[2], 0.5)
    inject.detach(drawing.base.components)
    for n, one in enumerate(settings):
        plain = np.asarray(generate(drawing.base, [one])[0], dtype=int)
        assert np.abs(drawing.pixels(0, n) - plain).max() <= 1
        assert np.abs(drawing.pixels(100, n) - plain).max() > 3
    assert np.abs(drawing.pixels(100, 2) - half).max() <= 1


def generate_at(base, one, scale):
    inject.set_scale(base.components, scale)
    return np.asarray(generate(base, [one])[0], dtype=int)


def test_the_pictures_of_the_base_say_that_the_adapter_is_off(drawing):
    drawing.draw(0)
    assert read_settings(drawing.run.sample_file(0, 0)).scale == 0


def test_the_scale_is_put_back(drawing):
    drawing.draw(10)
    assert {layer.scale for layer in inject.lora_layers(drawing.base.components).values()} == {1.0}


def test_a_prompt_that_comes_later_gets_its_picture_of_the_base_once(drawing, monkeypatch):
    drawing.draw(0)
    drawing.write("a green wall", "a red wall --d 6", "a blue wall --d 7 --am 2")
    drawing.draw(50)
    assert read_settings(drawing.run.sample_file(0, 3)).prompt == "a green wall"
    drawn = []
    monkeypatch.setattr(
        samples, "generate", lambda base, some, on: drawn.extend(some) or generate(base, some, on)
    )
    drawing.draw(60)
    assert [one.scale for one in drawn] == [1, 1, 1, 2]  # and none of the base's again
    assert len(list(drawing.run.samples.glob("step_000000_*"))) == 4


def test_the_sheet_has_a_row_for_each_prompt_and_is_no_sample(drawing):
    drawing.write("a red wall --w 32", "a blue wall --h 24 --s 3")
    drawing.draw(0)
    drawing.draw(100)
    sizes = [Image.open(drawing.run.sample_file(100, n)).size for n in range(3)]
    assert sizes == [(16, 16), (32, 16), (16, 24)]
    sheet = Image.open(drawing.run.samples / "sheet_000100.png")
    one_column = Image.open(drawing.run.samples / "sheet_000000.png")
    assert sheet.width > one_column.width and sheet.height == one_column.height
    assert all(file.name.startswith("step_") for file in drawing.run.sample_files())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        BaseModelError("The picture holds values that are not finite numbers."),
        AssertionError("\n\nodd"),
    ],
)
def test_one_that_fails_is_told_and_marked_and_the_others_are_drawn(drawing, monkeypatch, error):
    monkeypatch.setattr(samples, "generate", fails_for("a red wall", error))
    with heard() as lines:
        drawing.draw(0)
        names = drawing.draw(100)
    assert names == ["step_000100_00.png", "step_000100_02.png"]
    assert "The picture of 'a red wall' by step 100 could not be drawn." in lines
    assert (drawing.run.samples / "sheet_000100.png").is_file()
    monkeypatch.undo()
    assert len(drawing.draw(200)) == 3  # and so is the base's that was missing
    assert len(list(drawing.run.samples.glob("step_000000_*"))) == 3


def test_values_that_are_no_numbers_give_no_picture(drawing):
    for layer in inject.lora_layers(drawing.base.components).values():
        torch.nn.init.constant_(layer.lora_up.weight, torch.nan)
    with heard() as lines:
        assert drawing.draw(100) == []
    assert sum("could not be drawn" in line for line in lines) == 3
    assert len(list(drawing.run.samples.glob("step_000000_*"))) == 3  # the base is as it was


def test_a_disk_that_cannot_be_written_does_not_end_the_run(drawing, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "save_picture", full)
    with heard() as lines:
        assert drawing.draw(0) == []
    assert "The samples of step 0 could not be drawn." in lines


def test_asked_to_stop_nothing_is_left_half_drawn(drawing):
    prompts = SamplePrompts([], drawing.file, SHARED, 8)
    half = Samples(drawing.base, drawing.run, prompts, Accelerator())
    assert half.draw(0, lambda done, of: True) == [] and not half.is_drawn(0)
    assert list(drawing.run.samples.iterdir()) == []
    half.draw(0, lambda done, of: False)
    assert half.is_drawn(0)


def test_damaged_pictures_of_the_base_are_drawn_again(drawing):
    drawing.draw(0)
    drawing.run.sample_file(0, 1).write_bytes(b"no picture")
    assert read_settings(drawing.run.sample_file(0, 1)) is None
    assert len(drawing.draw(100)) == 3
    assert (drawing.run.samples / "step_000000_03.png").is_file()


def test_the_grid_takes_prompts_of_all_sizes(drawing):
    drawing.write("a red wall --w 32", "a blue wall --s 3")
    save_adapter(inject.collect(drawing.base.components), drawing.run.adapter_file)
    inject.detach(drawing.base.components)
    prompts = SamplePrompts([], drawing.file, SHARED, 8)
    Samples(drawing.base, drawing.run, prompts, Accelerator()).draw_grid([0, 1], lambda *_: False)
    assert Image.open(drawing.run.grid_file).width > 64


@pytest.mark.parametrize("fails", [False, True])
def test_drawing_does_not_change_the_training(run_settings, monkeypatch, tmp_path, fails):

    run_settings["adapter"] |= {"dropout": 0.3}
    run_settings["sample"] = {"prompts": [], "every_steps": 0}
    plain = train(run_settings)
    run_settings["output"]["name"] = "drawn"
    file = tmp_path / "prompts.txt"
    file.write_text("a red wall\na blue wall --am 0.5 --w 24")
    run_settings["sample"] = {"prompt_file": str(file), "every_steps": 2, "steps": 2}
    if fails:
        monkeypatch.setattr(samples, "generate", fails_for("a red wall", RuntimeError("odd")))
    drawn = train(run_settings)
    assert len(drawn.sample_files()) == (4 if fails else 8)
    assert losses(drawn) == losses(plain) and tensors(drawn, 6) == tensors(plain, 6)


def test_settings_of_a_picture_are_plain_json(drawing):
    drawing.draw(0)
    text = Image.open(drawing.run.sample_file(0, 0)).info
    assert json.loads(text["lora_sd"])["prompt"] == text["prompt"] == "an own one"


def test_cancelled_is_not_taken_for_a_failure(drawing, monkeypatch):
    monkeypatch.setattr(samples, "generate", fails_for("an own one", Cancelled()))
    with heard() as lines:
        assert drawing.draw(0) == []
    assert lines == ["The samples of step 0: not drawn, since the run is to stop."]

"""The pictures that a run draws: samples on the way, and the grid of scales at the end.

No picture is worth a run: whatever goes wrong while one is drawn is logged, its place on the sheet
says that it failed, and training goes on. Only a sampler that never returns holds a run up: what
runs inside the trainer's process cannot be broken off from there.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from lora_sd import inject, layer_names
from lora_sd.base_model import BaseModel
from lora_sd.formats import load_adapter
from lora_sd.generate import (
    Cancelled,
    OnStep,
    PictureSettings,
    generate,
    generate_at_scales,
    save_picture,
    write_png,
)
from lora_sd.merge import weights_with_adapters
from lora_sd.run_folder import RunFolder
from lora_sd.sample_prompts import SamplePrompts
from lora_sd.sample_sheet import draw_sheet, picture_or_reason

log = logging.getLogger("lora_sd")
LONGEST_REASON = 120


def shared_settings(
    base: BaseModel,
    largest_px: int,
    *,
    negative_prompt: str,
    seed: int,
    steps: int,
    guidance: float,
) -> PictureSettings:
    """What the sample pictures have in common: squares of the largest training resolution.

    Args:
        largest_px: that resolution, rounded down here to what the model draws.
    """
    step_px = base.size_step_px
    side_px = max(largest_px // step_px, 1) * step_px
    return PictureSettings("", negative_prompt, seed, steps, guidance, side_px, side_px)


class Samples:
    """Draws the sample pictures of a run, each at its own scale, with the base's beside them.

    The base's pictures are those of step 0. A prompt that comes later, in an edited file, has the
    base's drawn then, and kept as one of step 0, too. Nothing that is drawn changes the training:
    pictures have generators of their own, and the adapter's scale is put back.

    Files: samples/step_000100_00.png, one a prompt, and samples/sheet_000100.png, with a row for
    each prompt: the base's picture and the one of this step.
    """

    def __init__(
        self, base: BaseModel, run: RunFolder, prompts: SamplePrompts, accelerator: Accelerator
    ) -> None:
        self._base, self._run, self._prompts = base, run, prompts
        self._accelerator = accelerator

    def draw(self, step: int, on_step: OnStep) -> list[Path]:
        """Draw the samples of a step, in the main process; the files of those that came about.

        Args:
            on_step: called at every denoising step; drawing stops when it returns True.
        """
        files: list[Path] = []
        if self._accelerator.is_main_process:
            with _pictures_may_fail(f"The samples of step {step}"):
                files = self._draw(step, on_step)
        self._accelerator.wait_for_everyone()
        return files

    def is_drawn(self, step: int) -> bool:
        """Whether the samples of a step were drawn, as far as they can be."""
        return self.sheet_file(step).is_file()

    def sheet_file(self, step: int) -> Path:
        """samples/sheet_000100.png"""
        return self._run.samples / f"sheet_{step:06d}.png"

    def draw_grid(self, scales: Sequence[float], on_step: OnStep) -> None:
        """Draw every prompt at every scale from the adapter's file, as a user of it would; no
        adapter may be attached."""
        self._base.eval()
        with _pictures_may_fail("The grid"):
            settings = self._settings()
            adapter = load_adapter(
                self._run.adapter_file, layer_names.layer_shapes(self._base.components)
            )
            merged = weights_with_adapters(self._base.components)
            rows: dict[int, list[Image.Image]] = {}
            for numbers in _alike(settings):
                some = [settings[number] for number in numbers]
                drawn = generate_at_scales(self._base, merged, adapter, scales, some, on_step)
                rows |= zip(numbers, drawn, strict=True)
            labels = [f"scale {scale:g}" for scale in scales]
            own = [replace(one, scale=1.0) for one in settings]  # the columns say the scale
            grid = draw_sheet([rows[number] for number in sorted(rows)], own, labels)
            write_png(grid, self._run.grid_file)
            log.info("Grid: %s", self._run.grid_file)

    def _settings(self) -> list[PictureSettings]:
        return [replace(one, adapter=self._run.name) for one in self._prompts.read()]

    def _draw(self, step: int, on_step: OnStep) -> list[Path]:
        self._base.eval()
        settings = self._settings()
        of_base = self._drawn_of_base(settings, on_step)
        rows = [[of_base[_without_adapter(one)]] for one in settings]
        files = [file for file, _ in dict.fromkeys(cell for row in rows for cell in row) if file]
        if step > 0:
            files = []
            pictures = self._draw_each(settings, f"step {step}", on_step)
            for index, (row, cell, one) in enumerate(zip(rows, pictures, settings, strict=True)):
                picture, reason = cell
                file = self._run.sample_file(step, index)
                if picture is not None:
                    save_picture(picture, file, one)
                    files.append(file)
                row.append((file if picture is not None else None, reason))
        columns = ["base", f"step {step}"] if step else ["base"]
        cells = [
            [picture_or_reason(file, reason, one) for file, reason in row]
            for row, one in zip(rows, settings, strict=True)
        ]
        write_png(draw_sheet(cells, settings, columns), self.sheet_file(step))
        return files

    def _drawn_of_base(
        self, settings: Sequence[PictureSettings], on_step: OnStep
    ) -> dict[PictureSettings, tuple[Path | None, str]]:
        """(file, why there is none) of the base's picture for each of the settings; what is not
        there yet is drawn."""
        found: dict[PictureSettings, tuple[Path | None, str]] = {}
        for file in sorted(self._run.samples.glob(f"{_stem(self._run, 0)}*.png")):
            if (of_file := read_settings(file)) is not None:
                found.setdefault(_without_adapter(of_file), (file, ""))
        # At scale 0 the layers give the base's output to the bit, whatever was learnt.
        missing = [
            one
            for one in dict.fromkeys(replace(one, scale=0.0) for one in settings)
            if _without_adapter(one) not in found
        ]
        drawn = self._draw_each(missing, "the base", on_step)
        index = 0
        for one, (picture, reason) in zip(missing, drawn, strict=True):
            while (file := self._run.sample_file(0, index)).exists():
                index += 1
            if picture is not None:
                save_picture(picture, file, one)
            found[_without_adapter(one)] = (file if picture is not None else None, reason)
            index += 1  # a failed one keeps its place free
        return found

    def _draw_each(
        self, settings: Sequence[PictureSettings], whose: str, on_step: OnStep
    ) -> list[tuple[Image.Image | None, str]]:
        """(picture, why there is none) for each of the settings."""
        found: list[tuple[Image.Image | None, str]] = [(None, "")] * len(settings)
        waiting = _alike(settings)
        while waiting:
            numbers = waiting.pop(0)
            some = [settings[number] for number in numbers]
            try:
                inject.set_scale(self._base.components, some[0].scale)
                with self._accelerator.autocast():
                    pictures = generate(self._base, some, on_step)
                for number, picture in zip(numbers, pictures, strict=True):
                    found[number] = (picture, "")
            except Cancelled:
                raise
            except Exception as error:
                if len(numbers) > 1:  # perhaps one of them alone is to blame, or they are too many
                    waiting = [[number] for number in numbers] + waiting
                    continue
                said = (str(error).strip().splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {said}"[:LONGEST_REASON]
                found[numbers[0]] = (None, reason)
                log.warning(
                    "The picture of '%s' by %s could not be drawn.",
                    some[0].prompt, whose, exc_info=True,
                )  # fmt: skip
            finally:
                inject.set_scale(self._base.components, 1.0)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return found


def read_settings(file: Path) -> PictureSettings | None:
    """The settings in a sample's PNG; None when it has none that can be understood."""
    try:
        with Image.open(file) as picture:
            return PictureSettings(**json.loads(picture.info["lora_sd"]))
    except (OSError, SyntaxError, ValueError, LookupError, TypeError):
        return None


def _stem(run: RunFolder, step: int) -> str:
    """'step_000000_'"""
    return run.sample_file(step, 0).stem.rpartition("_")[0] + "_"


def _without_adapter(one: PictureSettings) -> PictureSettings:
    """What the base's picture depends on."""
    return replace(one, adapter="", scale=1.0)


def _alike(settings: Sequence[PictureSettings]) -> list[list[int]]:
    """The numbers of pictures that `generate` can draw in one call."""
    found: dict[tuple[float, ...], list[int]] = {}
    for number, one in enumerate(settings):
        key = (one.width_px, one.height_px, one.steps, one.guidance, one.scale)
        found.setdefault(key, []).append(number)
    return list(found.values())


@contextlib.contextmanager
def _pictures_may_fail(what: str) -> Iterator[None]:
    """Pictures are not worth a run: their failure is logged, and the run goes on."""
    try:
        yield
    except Cancelled:
        log.info("%s: not drawn, since the run is to stop.", what)
    except Exception:
        log.warning("%s could not be drawn.", what, exc_info=True)

"""The pictures that a run draws: samples on the way, and the grid of scales at the end."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from accelerate import Accelerator

from lora_sd import layer_names
from lora_sd.base_model import BaseModel
from lora_sd.config import Config
from lora_sd.formats import load_adapter
from lora_sd.generate import (
    Cancelled,
    OnStep,
    PictureSettings,
    draw_grid,
    generate,
    generate_at_scales,
    save_picture,
    write_png,
)
from lora_sd.merge import MergedWeights
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")


def sample_settings(config: Config, base: BaseModel, adapter_name: str) -> list[PictureSettings]:
    """The settings of each sample picture: squares of the largest training resolution."""
    sample, step_px = config.sample, base.size_step_px
    side_px = max(max(config.data.resolution_px) // step_px, 1) * step_px
    return [
        PictureSettings(
            prompt=prompt,
            negative_prompt=sample.negative_prompt,
            seed=sample.seed + number,
            steps=sample.steps,
            guidance=sample.guidance,
            width_px=side_px,
            height_px=side_px,
            adapter=adapter_name,
        )
        for number, prompt in enumerate(sample.prompts)
    ]


def draw_samples(
    base: BaseModel,
    run: RunFolder,
    step: int,
    settings: list[PictureSettings],
    accelerator: Accelerator,
    on_step: OnStep,
) -> None:
    """Draw the sample pictures; a failure is logged, and training goes on."""
    if accelerator.is_main_process:
        base.eval()
        with _pictures_may_fail(f"The samples of step {step}"), accelerator.autocast():
            pictures = generate(base, settings, on_step)
            for index, (picture, one) in enumerate(zip(pictures, settings, strict=True)):
                save_picture(picture, run.sample_file(step, index), one)
    accelerator.wait_for_everyone()


def draw_scale_grid(
    base: BaseModel,
    run: RunFolder,
    scales: Sequence[float],
    settings: list[PictureSettings],
    on_step: OnStep,
) -> None:
    """Draw every prompt at every scale from the adapter's file, as a user of it would."""
    base.eval()
    with _pictures_may_fail("The grid"):
        adapter = load_adapter(run.adapter_file, layer_names.layer_shapes(base.components))
        merged = MergedWeights(base.components)
        rows = generate_at_scales(base, merged, adapter, scales, settings, on_step)
        labels = [f"scale {scale:g}" for scale in scales]
        write_png(draw_grid(rows, [one.prompt for one in settings], labels), run.grid_file)
        log.info("Grid: %s", run.grid_file)


@contextlib.contextmanager
def _pictures_may_fail(what: str) -> Iterator[None]:
    """Pictures are not worth a run: their failure is logged, and the run goes on."""
    try:
        yield
    except Cancelled:
        log.info("%s: not drawn, since the run is to stop.", what)
    except Exception:
        log.warning("%s could not be drawn.", what, exc_info=True)

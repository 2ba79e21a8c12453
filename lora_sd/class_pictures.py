"""Prior preservation with pictures that the base draws itself (DreamBooth, arXiv 2208.12242)."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from lora_sd import durable
from lora_sd.base_model import BaseModel
from lora_sd.data.captions import plain_caption
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.listing import list_folder
from lora_sd.data.scan import Index, Job, scan
from lora_sd.errors import DataError
from lora_sd.generate import (
    Cancelled,
    PictureSettings,
    generate,
    pictures_at_once,
    save_picture,
)
from lora_sd.randomness import seed_at


def draw_missing(
    base: BaseModel,
    options: FolderOptions,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[int, int], bool] = lambda drawn, of: False,
    index: Path | None = None,
) -> int:
    """Fill `options.folder` up to `options.class_pictures` pictures that can be read, each drawn by
    the base of `options.caption`, without the trigger word; how many were drawn.

    A picture's seed comes from the number in its name, so that a stopped run goes on with the same
    pictures. What is in the folder already stays as it is; the folder is made when it is missing.
    Pictures are squares of the folder's largest resolution. Each has the caption beside it, so that
    the folder can be used anywhere.

    Args:
        steps, guidance: denoising steps and guidance scale.
        seed: the run's.
        on_step: called with (pictures drawn, pictures to draw) after each denoising step; drawing
            ends when it returns True, and what is drawn already stays.
        index: as of `read_folders`: pictures that it knows need not be decoded to be counted.

    Raises:
        DataError: the folder cannot be made or read, or there is no caption to draw.
        UserError: a picture or its caption cannot be written.
    """
    if not (options.caption or "").strip():
        raise DataError(f"'{options.folder}' wants class pictures, but has no caption to draw.")
    missing = options.class_pictures - count_readable(options.folder, index)
    if missing <= 0:
        return 0
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"'{options.folder}' cannot be made: {error.strerror}.") from None
    prompt = plain_caption(options.caption or "", replace(options, trigger_word=None))
    step = math.lcm(base.size_step_px, 8)  # diffusers' pipelines want multiples of 8
    side = max(1, max(options.resolution_px) // step) * step
    at_once = pictures_at_once(side, side)
    numbers = list(islice(_free_numbers(options.folder), missing))
    drawn = 0

    def watch(_: int, __: int) -> bool:
        return on_step(drawn, missing)

    for start in range(0, missing, at_once):
        batch = numbers[start : start + at_once]
        settings = [
            PictureSettings(
                prompt,
                seed=seed_at(seed, "class picture", number) % 2**31,
                steps=steps,
                guidance=guidance,
                width_px=side,
                height_px=side,
                scale=0.0,
            )
            for number in batch
        ]
        try:
            pictures = generate(base, settings, watch)
        except Cancelled:
            break
        for number, picture, one in zip(batch, pictures, settings, strict=True):
            file = _file(options.folder, number)
            if not file.with_suffix(".txt").exists():
                durable.write_text(file.with_suffix(".txt"), f"{options.caption}\n")
            save_picture(picture, file, one)
            drawn += 1
    return drawn


def count_readable(folder: Path, index: Path | None = None) -> int:
    """How many pictures of a folder and those inside it can be read; none where there is none.

    Raises:
        DataError: it is no folder, or cannot be read.
    """
    if not folder.exists():
        return 0
    listing = list_folder(folder)
    jobs = [Job(listing.path(name)) for name in listing.pictures]
    remembered = Index(index)
    readable = sum(scanned.facts is not None for scanned in scan(jobs, remembered))
    remembered.save()
    return readable


def _free_numbers(folder: Path) -> Iterator[int]:
    """Numbers whose names nothing in the folder has."""
    return (number for number in count(1) if not os.path.lexists(_file(folder, number)))


def _file(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"

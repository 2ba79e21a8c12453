"""Prompts -> images, with adapters merged or live, and a labelled grid of images by scale."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from lora_sd import durable, inject
from lora_sd.adapter import Adapter
from lora_sd.base_model import BaseModel
from lora_sd.label_font import Font, label_font, readable
from lora_sd.merge import LiveWeights, MergedWeights
from lora_sd.schedulers import scheduler_named

OnStep = Callable[[int, int], bool]  # (denoising steps done, in all) -> whether to stop
MOST_IN_A_BATCH = 8
PIXELS_IN_A_BATCH = 2**20  # four pictures of 512 px, one of 1024
PIXELS_DECODED_AT_ONCE = 2**18  # one of 512 px: the VAE takes more memory than the UNet
STRIP = "strip"
SMALL_PICTURE_PX = 256


@dataclass(frozen=True)
class PictureSettings:
    """Everything that makes a picture again: it is written into the PNG's text."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    width_px: int = 0
    """0: the base model's own resolution."""
    height_px: int = 0
    adapter: str = ""
    scale: float = 1.0
    scheduler: str = ""
    """A name of `schedulers.SCHEDULERS`; empty: the base model's own."""


class Cancelled(Exception):
    """Raised inside `generate` when `on_step` asks for it."""


def generate(
    base: BaseModel,
    settings: Sequence[PictureSettings],
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Draw pictures with the base's weights as they are now.

    The noise of a picture comes from its own seed on the CPU, so that a picture does not depend on
    what is drawn beside it or on which device, but for rounding.

    Args:
        settings: one for each picture. All must share size, steps, guidance and scheduler;
            `adapter` and `scale` are not acted on here.
        on_step: called with (denoising steps done, steps in all); drawing stops when it returns
            True.

    Raises:
        Cancelled: `on_step` asked for it.
        BaseModelError: the scheduler cannot draw with this base, or a picture is no finite numbers.
    """
    pipeline = base.pipeline()
    pipeline.scheduler = scheduler_named(settings[0].scheduler, base)
    parts = _parts(base, settings)
    pictures: dict[int, Image.Image] = {}
    done = 0
    total = sum(settings[part[0]].steps for part in parts)

    def count(_: object, __: int, ___: object, kwargs: dict[str, object]) -> dict[str, object]:
        nonlocal done
        done += 1
        if on_step and on_step(min(done, total), total):  # some schedulers take a step more
            raise Cancelled
        return kwargs

    for part in parts:
        chosen = [settings[number] for number in part]
        first = chosen[0]
        width_px, height_px = _size_px(base, first)
        with torch.no_grad():
            latents = pipeline(
                **_embeddings(base, chosen),
                generator=[torch.Generator("cpu").manual_seed(one.seed) for one in chosen],
                num_inference_steps=first.steps,
                guidance_scale=first.guidance,
                width=width_px,
                height=height_px,
                callback_on_step_end=count,
                output_type="latent",
            ).images
        decoded_at_once = _at_once(width_px, height_px, PIXELS_DECODED_AT_ONCE)
        decoded = [base.decode(some) for some in latents.split(decoded_at_once)]
        pictures |= zip(part, chain.from_iterable(decoded), strict=True)
    return [pictures[number] for number in range(len(settings))]


def pictures_at_once(width_px: int, height_px: int) -> int:
    """How many pictures of a size `generate` draws together."""
    return _at_once(width_px, height_px, PIXELS_IN_A_BATCH)


def _at_once(width_px: int, height_px: int, pixels: int) -> int:
    return max(1, min(MOST_IN_A_BATCH, pixels // (width_px * height_px)))


def _size_px(base: BaseModel, one: PictureSettings) -> tuple[int, int]:
    """Width and height of a picture."""
    return one.width_px or base.resolution_px, one.height_px or base.resolution_px


def _parts(base: BaseModel, settings: Sequence[PictureSettings]) -> list[list[int]]:
    """The numbers of the pictures that are drawn together. Longer prompts are drawn apart, since
    they would lengthen the others, which changes these."""
    by_length: dict[int, list[int]] = {}
    for number, one in enumerate(settings):
        tokens = base.max_tokens_for([one.prompt, one.negative_prompt])
        by_length.setdefault(tokens, []).append(number)
    return [
        numbers[i : i + at_once]
        for numbers in by_length.values()
        for at_once in [pictures_at_once(*_size_px(base, settings[numbers[0]]))]
        for i in range(0, len(numbers), at_once)
    ]


def _embeddings(base: BaseModel, settings: Sequence[PictureSettings]) -> dict[str, torch.Tensor]:
    """What diffusers' pipeline wants instead of prompts, read as in training."""
    texts = {
        "": [one.prompt for one in settings],
        "negative_": [one.negative_prompt for one in settings],
    }
    longest = base.max_tokens_for([text for some in texts.values() for text in some])
    found = {}
    for kind, some in texts.items():
        embedding = base.encode_text(some, longest)
        found[f"{kind}prompt_embeds"] = embedding.hidden
        if embedding.pooled is not None:
            found[f"{kind}pooled_prompt_embeds"] = embedding.pooled
    return found


def generate_at_scales(
    base: BaseModel,
    merged: MergedWeights | LiveWeights,
    adapter: Adapter,
    scales: Sequence[float],
    settings: Sequence[PictureSettings],
    on_step: OnStep | None = None,
) -> list[list[Image.Image]]:
    """The same pictures at several scales: result[i][j] is settings[i] at scales[j].

    The adapter is merged for each scale; at the end the base's weights are back, bit for bit.
    """
    columns = []
    try:
        for number, scale in enumerate(scales):
            merged.set([(adapter, scale)])

            def over_all(done: int, total: int, before: int = number) -> bool:
                return bool(on_step and on_step(before * total + done, len(scales) * total))

            columns.append(generate(base, settings, over_all))
    finally:
        merged.set([])
    return [list(row) for row in zip(*columns, strict=True)]


def generate_strip(
    base: BaseModel,
    adapter: Adapter,
    scales: Sequence[float],
    settings: PictureSettings,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """The same picture at several scales, all in one pass of the UNet for each denoising step.

    The adapter acts live, with a scale of its own for each sample of the batch; quicker than
    merging for each scale where the pictures are small, and equal to it but for rounding.
    """
    pictures: list[Image.Image] = []
    at_once = pictures_at_once(*_size_px(base, settings))
    parts = [scales[i : i + at_once] for i in range(0, len(scales), at_once)]
    inject.attach_adapter(base.components, adapter, adapter_name=STRIP)
    try:
        for number, part in enumerate(parts):
            inject.set_scale(base.components, torch.tensor(part), STRIP)

            def over_all(done: int, total: int, before: int = number) -> bool:
                return bool(on_step and on_step(before * total + done, len(parts) * total))

            pictures += generate(base, [settings] * len(part), over_all)
    finally:
        inject.detach(base.components, STRIP)
    return pictures


def save_picture(picture: Image.Image, path: Path, settings: PictureSettings) -> None:
    """Write a PNG with its settings (text chunk 'lora_sd', JSON) and its prompt ('prompt')."""
    info = PngInfo()
    info.add_text("lora_sd", json.dumps(asdict(settings)))
    info.add_text("prompt", settings.prompt)
    write_png(picture, path, info)


def write_png(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG at once: someone may be looking at the folder."""
    data = io.BytesIO()
    picture.save(data, "PNG", pnginfo=info)
    durable.write_bytes(path, data.getvalue())


def draw_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> Image.Image:
    """One picture of all pictures, with labels; small pictures are enlarged."""
    width, height = rows[0][0].size
    enlarge = max(1, SMALL_PICTURE_PX // max(width, height) // 2)
    width, height = width * enlarge, height * enlarge
    font_px = max(12, min(24, width // 9))
    font = label_font([*row_labels, *column_labels], font_px)
    gap = 6
    label_px = max(180, int(width * 1.4))
    top_px = font_px * 2
    grid = Image.new(
        "RGB",
        (label_px + len(column_labels) * (width + gap), top_px + len(rows) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        centre = label_px + column * (width + gap) + width // 2
        draw.text((centre, top_px // 2), readable(label, font), "black", font, anchor="mm")
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = top_px + row * (height + gap)
        unreadable = f"row {row + 1}: no font on this computer has its letters"
        text = _wrap(readable(label, font, unreadable), font, label_px - 2 * gap)
        draw.multiline_text((gap, top + height // 2), text, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            large = picture.resize((width, height), Image.Resampling.LANCZOS)
            grid.paste(large, (label_px + column * (width + gap), top))
    return grid


def _wrap(text: str, font: Font, width_px: int) -> str:
    """Lines of that width: broken between words, and within those of a longer one."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)

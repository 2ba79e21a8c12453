"""One picture of many sample pictures, of whatever sizes, with their prompts beside them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_sd.generate import PictureSettings, draw_grid

LARGEST_CELL_PX = 512
LONGEST_LABEL = 160
FAILED_PX = 128  # least side of a cell without a picture


def picture_or_reason(file: Path | None, reason: str, one: PictureSettings) -> Image.Image:
    """A picture of a sheet; for one that failed, a place that says so."""
    if file is not None:
        try:
            with Image.open(file) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError):
            reason = "its file cannot be read"
    size_px = max(one.width_px, FAILED_PX), max(one.height_px, FAILED_PX)
    cell = Image.new("RGB", size_px, "#eeeeee")
    font_px = max(12, cell.width // 32)
    letters, lines = int(cell.width / (0.6 * font_px)) - 1, int(cell.height / (1.4 * font_px)) - 1
    text = textwrap.wrap(
        f"could not be drawn: {reason}", letters, max_lines=lines, placeholder=" ..."
    )
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(font_px)
    draw.multiline_text((font_px // 2, font_px // 2), "\n".join(text), "#aa0000", font)
    return cell


def draw_sheet(
    rows: Sequence[Sequence[Image.Image]],
    settings: Sequence[PictureSettings],
    columns: Sequence[str],
) -> Image.Image:
    """A sheet of pictures, whatever their sizes, with their prompts."""
    sizes = [picture.size for row in rows for picture in row]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    shrink = min(1.0, LARGEST_CELL_PX / max(width, height))
    cell = round(width * shrink), round(height * shrink)
    cells = [[_fitted(picture, cell, shrink) for picture in row] for row in rows]
    return draw_grid(cells, [_label(one) for one in settings], columns)


def _fitted(picture: Image.Image, size: tuple[int, int], shrink: float) -> Image.Image:
    """The picture in the middle of a cell."""
    if shrink < 1:
        smaller = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
        picture = picture.resize(smaller, Image.Resampling.LANCZOS)
    if picture.size == size:
        return picture
    cell = Image.new("RGB", size, "white")
    cell.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return cell


def _label(one: PictureSettings) -> str:
    prompt = one.prompt
    if len(prompt) > LONGEST_LABEL:
        prompt = prompt[: LONGEST_LABEL - 1] + "…"
    return prompt if one.scale == 1 else f"{prompt} (scale {one.scale:g})"

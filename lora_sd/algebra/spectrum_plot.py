"""A PNG of an adapter's numbers: norms by block, and each block's spectrum, linear and conv apart.

Drawn with Pillow at twice the size and scaled down, which smooths the lines.
"""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lora_sd import durable
from lora_sd.algebra.low_rank import KINDS
from lora_sd.algebra.spectrum import BLOCK_ORDER, Group, LayerFacts, by_block

SHARP = 2
PANEL_PX = (520, 300)
MARGIN_PX = (74, 54, 22, 52)  # left, top, right, bottom, around a panel's axes
TITLE_PX = 56
LEGEND_PX = 44
KIND_COLOURS = {"linear": "#2f6db5", "conv": "#e0862f", "text encoder": "#7a4fb0"}
BLOCK_COLOURS = dict(
    zip(
        BLOCK_ORDER,
        ("#0b3c7d", "#2f6db5", "#5a9bd8", "#93c4ee", "#222222", "#7d1a0b", "#b8401f", "#e0762f")
        + ("#f2ae5c", "#3a9a5b", "#7a4fb0", "#c06bc9"),
        strict=True,
    )
)
INK, PALE, WHITE = "#333333", "#dddddd", "white"
LEAST_SHARE = 1e-4  # of the largest singular value, at the foot of a logarithmic axis


def write_plot(facts: Sequence[LayerFacts], title: str, path: Path) -> None:
    """Write the plot as a PNG.

    Raises:
        UserError: it cannot be written.
    """
    file = io.BytesIO()
    draw_plot(facts, title).save(file, "PNG", optimize=True)
    durable.write_bytes(path, file.getvalue())


def draw_plot(facts: Sequence[LayerFacts], title: str) -> Image.Image:
    """Norms by block above; below, for each kind of layer, the spectrum of each block and the
    energy that a rank keeps."""
    groups = by_block(facts)
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in groups)]
    columns = max(2, len(kinds))
    width, height = PANEL_PX
    size = (columns * width, TITLE_PX + 3 * height + LEGEND_PX)
    image = Image.new("RGB", (size[0] * SHARP, size[1] * SHARP), WHITE)
    canvas = _Canvas(ImageDraw.Draw(image))
    canvas.text((24, TITLE_PX // 2), title, 16, "lm", most_px=size[0] - 48)
    _draw_norms(canvas, (0, TITLE_PX, size[0], height), groups, kinds)
    for column, kind in enumerate(kinds):
        own = [group for group in groups if group.kind == kind]
        left = column * width
        _draw_spectra(canvas, (left, TITLE_PX + height, width, height), own, kind)
        _draw_kept(canvas, (left, TITLE_PX + 2 * height, width, height), own, kind)
    blocks = [block for block in BLOCK_ORDER if any(group.block == block for group in groups)]
    colours = [(block, BLOCK_COLOURS[block]) for block in blocks]
    canvas.legend((24, TITLE_PX + 3 * height + LEGEND_PX // 2 - 8), colours)
    return image.resize(size, Image.Resampling.LANCZOS)


Box = tuple[int, int, int, int]  # left, top, width, height of a panel
Place = Callable[[float, float], tuple[float, float]]


class _Canvas:
    """Draws in pixels of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: str, width_px: float = 1) -> None:
        scaled = [(x * SHARP, y * SHARP) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(width_px * SHARP)), joint="curve")

    def dot(self, place: tuple[float, float], colour: str, radius_px: float = 2.5) -> None:
        x, y, r = place[0] * SHARP, place[1] * SHARP, radius_px * SHARP
        self.draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def bar(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle((left * SHARP, top * SHARP, right * SHARP, bottom * SHARP), colour)

    def text(
        self,
        place: tuple[float, float],
        text: str,
        size_px: int = 12,
        anchor: str = "mm",
        colour: str = INK,
        most_px: float = math.inf,
    ) -> None:
        font = ImageFont.load_default(size_px * SHARP)
        while font.getlength(text) > most_px * SHARP and len(text) > 4:
            text = f"{text.removesuffix('...')[:-1]}..."
        self.draw.text((place[0] * SHARP, place[1] * SHARP), text, colour, font, anchor=anchor)

    def legend(self, place: tuple[float, float], entries: Sequence[tuple[str, str]]) -> None:
        """Names beside patches of their colours, in a row."""
        x, y = place
        for name, colour in entries:
            self.bar(x, y + 2, x + 12, y + 14, colour)
            self.text((x + 18, y + 8), name, 12, "lm")
            x += 36 + ImageFont.load_default(12).getlength(name)

    def axes(
        self,
        box: Box,
        title: str,
        x_label: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
    ) -> None:
        """Grid lines at the y ticks, labels at both; ticks are shares (0..1) of the axis."""
        left, top, right, bottom = inner(box)
        self.text((left, box[1] + 28), title, 14, "lm")
        for share, label in y_ticks:
            y = bottom - share * (bottom - top)
            self.line([(left, y), (right, y)], PALE)
            self.text((left - 8, y), label, 11, "rm")
        for share, label in x_ticks:
            self.text((left + share * (right - left), bottom + 12), label, 11)
        self.line([(left, bottom), (right, bottom)], INK)
        self.text(((left + right) / 2, bottom + 32), x_label, 11)


def inner(box: Box) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the axes inside a panel."""
    left, top, width, height = box
    return (
        left + MARGIN_PX[0],
        top + MARGIN_PX[1],
        left + width - MARGIN_PX[2],
        top + height - MARGIN_PX[3],
    )


def _draw_norms(canvas: _Canvas, box: Box, groups: Sequence[Group], kinds: Sequence[str]) -> None:
    """Bars: the norm of each block's updates, a colour for each kind."""
    relative = all(group.relative_norm is not None for group in groups)
    height_of = {
        (group.block, group.kind): (group.relative_norm or 0.0) if relative else group.norm
        for group in groups
    }
    blocks = [block for block in BLOCK_ORDER if any(block == own for own, _ in height_of)]
    ticks = round_ticks(max(height_of.values()))
    top_value = ticks[-1]
    left, top, right, bottom = inner(box)
    of_base = " over the norm of the base weights" if relative else ""
    canvas.axes(
        box,
        f"norm of the update by block{of_base}",
        "",
        [((n + 0.5) / len(blocks), block) for n, block in enumerate(blocks)],
        [(tick / top_value, f"{tick:g}") for tick in ticks],
    )
    canvas.legend((right - 250, box[1] + 20), [(kind, KIND_COLOURS[kind]) for kind in kinds])
    slot = (right - left) / len(blocks)
    for n, block in enumerate(blocks):
        own = [kind for kind in kinds if (block, kind) in height_of]
        bar = min(0.8 * slot / max(2, len(own)), 56)
        start = left + (n + 0.5) * slot - bar * len(own) / 2
        for i, kind in enumerate(own):
            value = height_of[block, kind]
            y = bottom - value / top_value * (bottom - top)
            x = start + i * bar
            canvas.bar(x + 1, min(y, bottom - 1), x + bar - 1, bottom - 1, KIND_COLOURS[kind])
            canvas.text((x + bar / 2, y - 8), f"{value:.2g}", 10)


def _draw_spectra(canvas: _Canvas, box: Box, groups: Sequence[Group], kind: str) -> None:
    """Lines: root of the energy in each block's n-th directions, on a logarithmic axis."""
    spectra = {group.block: group.spectrum() for group in groups}
    highest = max(max(values) for values in spectra.values()) or 1.0
    above = [v for values in spectra.values() for v in values if v > highest * LEAST_SHARE]
    foot = math.log10(min(above, default=highest)) - 0.1
    span = math.log10(highest) + 0.1 - foot
    y_ticks = [((math.log10(tick) - foot) / span, f"{tick:g}") for tick in log_ticks(foot, span)]
    longest = max(map(len, spectra.values()))
    x_label = "direction (1 is the largest)"
    canvas.axes(box, f"{kind}: spectrum", x_label, _rank_ticks(longest), y_ticks)
    place = _placing(box, longest)
    for block, values in spectra.items():
        heights = [(math.log10(max(value, 10**foot)) - foot) / span for value in values]
        points = [place(n + 1, height) for n, height in enumerate(heights)]
        _draw_curve(canvas, points, BLOCK_COLOURS[block])


def _draw_kept(canvas: _Canvas, box: Box, groups: Sequence[Group], kind: str) -> None:
    """Lines: share of each block's energy that is kept when its layers are cut to a rank."""
    longest = max(len(group.spectrum()) for group in groups)
    y_ticks = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
    title = f"{kind}: energy that a rank keeps"
    canvas.axes(box, title, "rank", _rank_ticks(longest), y_ticks)
    place = _placing(box, longest)
    for group in groups:
        energies = (value * value / (group.energy or 1.0) for value in group.spectrum())
        points = [place(n + 1, kept) for n, kept in enumerate(itertools.accumulate(energies))]
        _draw_curve(canvas, points, BLOCK_COLOURS[group.block])


def _draw_curve(canvas: _Canvas, points: Sequence[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        canvas.line(points, colour, 1.6)
    for point in points if len(points) <= 32 else ():
        canvas.dot(point, colour)


def _placing(box: Box, longest: int) -> Place:
    """(rank, share of the height) -> pixels."""
    left, top, right, bottom = inner(box)

    def place(rank: float, share: float) -> tuple[float, float]:
        x = left + _along(rank, longest) * (right - left)
        return x, bottom - share * (bottom - top)

    return place


def _along(rank: float, longest: int) -> float:
    return (rank - 0.5) / longest


def _rank_ticks(longest: int) -> list[tuple[float, str]]:
    every = 1
    while longest > 16 * every:
        every *= 2
    ranks = sorted({1, *range(every, longest + 1, every)})
    return [(_along(rank, longest), str(rank)) for rank in ranks]


def log_ticks(foot: float, span: float) -> list[float]:
    """Powers of ten between 10^foot and 10^(foot + span); below two decades 2 and 5 times them."""
    powers = range(math.floor(foot), math.ceil(foot + span) + 1)
    ticks = [10.0**power * m for power in powers for m in ((1, 2, 5) if span < 2 else (1,))]
    return [tick for tick in ticks if foot <= math.log10(tick) <= foot + span]


def round_ticks(highest: float) -> list[float]:
    """About five round numbers from 0 to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= highest / 5)
    return [round(step * n, 12) for n in range(math.ceil(highest / step) + 1)]

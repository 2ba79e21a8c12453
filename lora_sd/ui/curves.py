"""Curves of runs as SVG: loss, validation loss with the base's as a line, learning rates.

    loss_curve(["a", course], ["b", other])   several runs on one plot, each in its own colour
    small_curve(course.loss)                  a line for a card

A drawing is stretched to its place, so what is written stands outside the SVG as HTML. A plot has a
fixed height, with and without lines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lora_sd.ui.metrics import Course, Points
from lora_sd.ui.texts import say

LEAST_STEPS = 100  # that the width stands for, so that a short run is seen as a whole
SMOOTHING_SHARE = 0.04  # of the steps shown, as the half-life of the running mean


@dataclass(frozen=True)
class Drawn:
    """A run whose curves are drawn.

    Attributes:
        name: in the legend, where there are several.
        steps: of the whole run: a short one has its whole width from the start.
    """

    name: str
    course: Course
    steps: int = 0


@dataclass(frozen=True)
class _Line:
    """A line of a plot.

    Attributes:
        style: 'raw', 'smooth', 'level' or 'dots', with a rule each in style.css.
        key: in the legend; '' for none.
    """

    points: Points
    style: str
    run: int = 0
    key: str = ""


def loss_curve(runs: Sequence[Drawn]) -> str:
    """Each step's loss faint, where there is one run; its smoothed course strong."""
    lines, ends = [], []
    longest = max((run.course.step for run in runs), default=0)
    for number, run in enumerate(runs):
        if not (points := run.course.loss):
            continue
        # Over as many steps in each, so that what is smoother has learned more steadily.
        smooth = smoothed(points, SMOOTHING_SHARE * longest / run.course.steps_a_point)
        ends.append(say("run.curve_end", name=run.name, value=smooth[-1][1], step=smooth[-1][0]))
        every = run.course.steps_a_point
        if len(runs) == 1:
            each = say("run.each_step") if every == 1 else say("run.mean_of_steps", count=every)
            lines.append(_Line(points, "raw", number, each))
        key = say("run.smoothed") if len(runs) == 1 else run.name
        lines.append(_Line(smooth, "smooth", number, key))
    return _plot(say("run.loss"), lines, runs, ends)


def validation_curve(runs: Sequence[Drawn]) -> str:
    """The validation losses; the base's is a broken line."""
    lines, ends = [], []
    for number, run in enumerate(runs):
        found = run.course.validated
        if not found.losses:
            continue
        step, loss = found.losses[-1]
        ends.append(say("run.curve_end", name=run.name, value=loss, step=step))
        key = say("run.adapter") if len(runs) == 1 else run.name
        lines.append(_Line(found.losses, "smooth dots", number, key))
        if found.base is not None:
            width = max(_last_step(runs), 1)
            key = say("run.base") if number == 0 or len(runs) == 1 else ""
            lines.append(_Line([(0, found.base), (width, found.base)], "level", number, key))
    return _plot(say("run.validation"), lines, runs, ends)


def rate_curve(runs: Sequence[Drawn]) -> str:
    """The learning rates, a line a group."""
    lines, ends = [], []
    for number, run in enumerate(runs):
        groups = run.course.rates
        for place, (group, points) in enumerate(groups.items()):
            if not points:
                continue
            step, rate = points[-1]
            ends.append(say("run.rate_end", name=run.name, value=rate, step=step))
            key = run.name if len(runs) > 1 else group if len(groups) > 1 else ""
            colour = number if len(runs) > 1 else place
            lines.append(_Line(points, "smooth", colour, key if len(runs) < 2 or not place else ""))
    return _plot(say("run.rate"), lines, runs, ends, from_zero=True)


def small_curve(points: Points) -> str:
    """The smoothed course of losses as a small line without words, for a card; '' for none."""
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    smooth = smoothed(points, SMOOTHING_SHARE * len(points))
    low, high = min(loss for _, loss in smooth), max(loss for _, loss in smooth)
    scale = _Scale(smooth[0][0], smooth[-1][0], low, high if high > low else low + 1)
    said = say("run.small_curve", first=smooth[0][1], last=smooth[-1][1])
    return (
        f'<svg class="small-curve" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(said)}"><polyline points="{scale.path(smooth)}"/></svg>'
    )


def smoothed(points: Points, half_life: float) -> list[tuple[int, float]]:
    """A running mean that forgets half in so many points: started without bias, as Adam's."""
    keep = 0.5 ** (1 / max(1.0, half_life))
    mean, weight, smooth = 0.0, 0.0, []
    for step, loss in points:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        smooth.append((step, mean / weight))
    return smooth


@dataclass(frozen=True)
class _Scale:
    """Where a step and a value are in a square of 100."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(100 * (step - self.first) / (self.last - self.first or 1), 2)

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return round(100 * (1 - (inside - self.low) / (self.high - self.low)), 2)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in points)


def _plot(
    title: str,
    lines: Sequence[_Line],
    runs: Sequence[Drawn],
    ends: Sequence[str],
    from_zero: bool = False,
) -> str:
    """A figure of lines; without any, its empty frame."""
    last = _last_step(runs)
    low, high = _limits(lines, from_zero)
    scale = _Scale(0, last, low, high)
    ticks_y = _ticks(low, high, 4) if lines else []
    ticks_x = [tick for tick in _ticks(0, last, 5) if tick == int(tick)]
    grid = "".join(f'<line x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in map(scale.y, ticks_y))
    labels = "".join(
        f'<span class="tick-y" style="top:{scale.y(tick)}%">{_short(tick)}</span>'
        for tick in ticks_y
    ) + "".join(
        f'<span class="tick-x" style="left:{scale.x(tick)}%">{int(tick):,}</span>'
        for tick in ticks_x
    )
    drawn = "".join(
        f'<polyline class="{line.style} of-{line.run}" points="{scale.path(line.points)}"/>'
        for line in lines
    )
    marks = "".join(
        f'<i class="{mark} of-{line.run}" style="left:{scale.x(step)}%;top:{scale.y(value)}%"></i>'
        for line in lines
        for mark, points in (
            ("end", line.points[-1:] if "smooth" in line.style else []),
            ("dot", line.points[:-1] if "dots" in line.style and len(line.points) < 60 else []),
        )
        for step, value in points
    )
    keys = "".join(
        f'<span class="key {line.style} of-{line.run}">{escape(line.key)}</span>'
        for line in sorted(lines, key=lambda line: line.style == "raw")
        if line.key
    )
    said = f"{title}. {' '.join(ends) or say('run.nothing_yet')}"
    empty = "" if lines else f'<em class="nothing">{say("run.nothing_yet")}</em>'
    return (
        f'<figure class="curve" role="img" aria-label="{escape(said)}">'
        f'<figcaption><b>{escape(title)}</b>{keys}</figcaption><div class="plot">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="grid">{grid}</g>{drawn}</svg>{marks}{labels}{empty}</div></figure>'
    )


def _last_step(runs: Sequence[Drawn]) -> int:
    """The step at the right end."""
    return max((max(run.course.step, min(run.steps, LEAST_STEPS), 1) for run in runs), default=1)


def _limits(lines: Sequence[_Line], from_zero: bool) -> tuple[float, float]:
    """What the drawing shows of the values: of those of each step, all but a hundredth of outliers
    at the top."""
    if not lines:
        return 0.0, 1.0
    lows, highs = [], []
    for line in lines:
        ordered = sorted(value for _, value in line.points)
        lows.append(ordered[0])
        highs.append(
            ordered[int(0.99 * (len(ordered) - 1))] if line.style == "raw" else ordered[-1]
        )
    low, high = min(lows), max(highs)
    if from_zero:
        return 0.0, 1.08 * high or 1.0
    room = 0.08 * (high - low) or max(abs(high), 1e-6) * 0.1
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    start = math.ceil(low / size)
    digits = max(0, 3 - math.floor(math.log10(size)))
    return [round(size * n, digits) for n in range(start, math.floor(high / size) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}"

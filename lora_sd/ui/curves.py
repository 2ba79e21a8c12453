"""The loss curve as SVG: each step's loss faint, its smoothed course strong."""

import math
from collections.abc import Sequence
from html import escape

MOST_POINTS = 300
LEAST_STEPS = 100  # that the width stands for, so that a short run is seen as a whole
SMOOTHING_SHARE = 0.04  # of the steps shown, as the half-life of the running mean


def loss_curve(losses: Sequence[tuple[int, float]], steps: int) -> str:
    """HTML of a run's losses; an empty text when there are none.

    The drawing is stretched to its place, so the labels stand outside the SVG as HTML.

    Args:
        losses: (step, loss), in the order of the steps.
        steps: steps of the whole run: a short one has its whole width from the start.
    """
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        return ""
    smooth = _smoothed(points)
    raw, line = _thinned(points), _thinned(smooth, last=True)
    low, high = _limits(points, smooth)
    first, last = 0, max(points[-1][0], min(steps, LEAST_STEPS), 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = 100 * (step - first) / (last - first)
        y = 100 * (1 - (min(max(loss, low), high) - low) / (high - low))
        return round(x, 2), round(y, 2)

    ticks_y = _ticks(low, high, 5)
    ticks_x = [tick for tick in _ticks(first, last, 5) if tick == int(tick)]
    grid = "".join(
        f'<line x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (place(0, t)[1] for t in ticks_y)
    )
    labels = "".join(
        f'<span class="tick-y" style="top:{place(0, tick)[1]}%">{_short(tick)}</span>'
        for tick in ticks_y
    ) + "".join(
        f'<span class="tick-x" style="left:{place(tick, low)[0]}%">{int(tick):,}</span>'
        for tick in ticks_x
    )
    end_x, end_y = place(*smooth[-1])
    said = f"Loss by step: {smooth[-1][1]:.4f} at step {smooth[-1][0]}"
    return (
        f'<figure class="loss-curve" role="img" aria-label="{escape(said)}">'
        '<figcaption><b>Loss</b><span class="key key-smooth">smoothed</span>'
        '<span class="key key-raw">each step</span></figcaption><div class="plot">'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="grid">{grid}</g>'
        f'<polyline class="raw" points="{_path(raw, place)}"/>'
        f'<polyline class="smooth" points="{_path(line, place)}"/></svg>'
        f'<i class="end" style="left:{end_x}%;top:{end_y}%"></i>{labels}</div></figure>'
    )


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean that forgets: started without bias, as Adam's."""
    keep = 0.5 ** (1 / max(1.0, SMOOTHING_SHARE * len(points)))
    mean, weight, smooth = 0.0, 0.0, []
    for step, loss in points:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        smooth.append((step, mean / weight))
    return smooth


def _thinned(points: Sequence[tuple[int, float]], last: bool = False) -> list[tuple[int, float]]:
    """At most MOST_POINTS of them, the last one always."""
    every = math.ceil(len(points) / MOST_POINTS)
    thin = list(points[::every])
    return [*thin, points[-1]] if last and thin[-1] != points[-1] else thin


def _limits(
    points: Sequence[tuple[int, float]], smooth: Sequence[tuple[int, float]]
) -> tuple[float, float]:
    """What the drawing shows of the losses: all but a hundredth of outliers at the top."""
    ordered = sorted(loss for _, loss in points)
    low = min(ordered[0], min(loss for _, loss in smooth))
    high = max(ordered[int(0.99 * (len(ordered) - 1))], max(loss for _, loss in smooth))
    room = 0.08 * (high - low) or max(abs(high), 1e-6) * 0.1
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    start = math.ceil(low / size)
    return [round(size * n, 12) for n in range(start, math.floor(high / size) + 1)]


def _path(points: Sequence[tuple[int, float]], place) -> str:  # type: ignore[no-untyped-def]
    return " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))


def _short(value: float) -> str:
    return f"{value:.4g}"

"""Which size a picture is trained at, and what is cut off for it: aspect-ratio buckets."""

from dataclasses import dataclass
from functools import lru_cache

Size = tuple[int, int]


class TooSmall(ValueError):
    """Why a picture has no size to train at; the text goes into a sentence after its name."""


@dataclass(frozen=True)
class Crop:
    """A part of a picture, and the size it is scaled to.

    `box` is (left, top, right, bottom) in the upright picture's pixels. `size_px` is (width,
    height): the bucket.
    """

    box: tuple[float, float, float, float]
    size_px: Size


def fit(
    size_px: Size,
    resolution_px: int,
    step_px: int,
    max_aspect_ratio: float = 2.0,
    upscale: bool = False,
) -> Crop:
    """The bucket of a picture of `size_px` (width, height), and the middle of it in that shape.

    Of the sizes of at most resolution_px squared, the one whose shape is nearest. A picture that
    would have to be enlarged gets its own size, rounded down.

    Args:
        step_px: what the bucket's sides are multiples of.
        max_aspect_ratio: the longest bucket's long side / short side.
        upscale: enlarge small pictures.

    Raises:
        TooSmall: a side has not even `step_px` pixels, and it is not to be enlarged.
    """
    width, height = size_px
    sizes = bucket_sizes(resolution_px, step_px, max_aspect_ratio)
    if not upscale:
        own = _own_size(size_px, step_px, max_aspect_ratio)
        if own[0] * own[1] <= resolution_px**2:
            return _middle(size_px, own)
        sizes = tuple(s for s in sizes if s[0] <= width and s[1] <= height)
    return _middle(size_px, min(sizes, key=lambda size: _unlikeness(size_px, size)))


@lru_cache(maxsize=64)
def bucket_sizes(
    resolution_px: int, step_px: int, max_aspect_ratio: float = 2.0
) -> tuple[Size, ...]:
    """Every (width, height) of multiples of `step_px` that makes good use of the resolution: at
    most resolution_px squared, and at least three quarters of it, with no room for another step in
    the longer side; and the largest square.

    Raises:
        ValueError: not even one step fits into the resolution.
    """
    if resolution_px < step_px:
        raise ValueError(f"a resolution of {resolution_px} px holds no step of {step_px} px")
    side = resolution_px // step_px * step_px
    landscape = [(side, side)]
    for height in range(step_px, resolution_px + 1, step_px):
        widest = min(resolution_px**2 // height, _longest(height, max_aspect_ratio))
        width = widest // step_px * step_px
        if width >= height and width * height >= 0.75 * resolution_px**2:
            landscape.append((width, height))
    return tuple(dict.fromkeys(landscape + [(height, width) for width, height in landscape]))


def time_ids(size_px: Size, crop: Crop) -> tuple[int, int, int, int, int, int]:
    """What SDXL is told of a picture: (original height, original width, pixels cut off at the top,
    at the left, target height, target width).

    The original size is the file's; what is cut off counts in pixels of the scaled picture (SDXL
    paper, section 2.2, and diffusers' training script).
    """
    left, top, right, bottom = crop.box
    width, height = crop.size_px
    cut_top = round(top * height / (bottom - top))
    cut_left = round(left * width / (right - left))
    return size_px[1], size_px[0], cut_top, cut_left, height, width


def _own_size(size_px: Size, step_px: int, max_aspect_ratio: float) -> Size:
    """The largest size of multiples of the step that the picture holds."""
    width, height = (side // step_px * step_px for side in size_px)
    if not width or not height:
        raise TooSmall(
            f"has {size_px[0]} x {size_px[1]} pixels, and each side needs {step_px} or more: "
            f"enlarge it, or set data.upscale"
        )
    longest = _longest(min(width, height), max_aspect_ratio) // step_px * step_px
    return min(width, longest), min(height, longest)


def _longest(side: int, max_aspect_ratio: float) -> int:
    return int(max_aspect_ratio * side + 1e-6)  # 1.4 * 320 is 448, whatever floats say


def _unlikeness(size_px: Size, bucket: Size) -> tuple[float, int, int]:
    """What sorts buckets: the nearest shape, then the larger, then the less long."""
    ours, theirs = size_px[0] * bucket[1], size_px[1] * bucket[0]
    return max(ours, theirs) / min(ours, theirs), -bucket[0] * bucket[1], max(bucket)


def _middle(size_px: Size, bucket: Size) -> Crop:
    """The largest box of the bucket's shape, in the middle."""
    width, height = size_px
    wide, high = bucket
    if width * high >= height * wide:
        left = (width - height * wide / high) / 2
        return Crop((left, 0.0, width - left, float(height)), bucket)
    top = (height - width * high / wide) / 2
    return Crop((0.0, top, float(width), height - top), bucket)

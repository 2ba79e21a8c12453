"""What the data report measures of one picture: likeness, sharpness, borders, a thumbnail.

The thresholds are set for few false alarms: what they find may be wrong, and what they do not find
may still be there. docs/LOG.md has what they find of changed photographs, icons and drawings.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.float32]

THUMBNAIL_PX = 224
THUMBNAIL_QUALITY = 72
STANDARD_PX = 512
"""Longest side at which sharpness and borders are measured: what a base of 512 px would see. Larger
pictures are made smaller first, smaller ones are taken as they are."""

BLURRED = 0.15
"""Below this sharpness a picture may be blurred; sharp photographs have 0.2 and more."""

MOST_HASH_BITS = 10
MOST_UNLIKE = 30
MOST_LIGHTER = 40
MOST_LONGER = 1.2
"""Near-duplicates differ in at most so many of 64 bits; nowhere in shape, colour or place by more
than so many of 255 levels, over what a shift by a 24th of the picture explains; in brightness by at
most so many levels; and in width / height by less than this factor."""

BORDER_LEVELS = 10
EDGE_LEVELS = 24
STRAIGHT = 0.85
NARROWEST = 0.015
"""A border is a strip along two opposite sides, each at least this share of the picture, within so
many levels of one colour, that ends at a straight line, as a subject's plain ground does not: that
share of the line differs from it by more than so many levels. Along the other two sides there is
either the same or no plain strip."""

_SMALL = 24
_HASH_PX = 32
_TILES = 8
_LOOKED_AT = 32


@dataclass(frozen=True)
class Measures:
    """Of one upright RGB picture.

    Attributes:
        shape: width / height.
        hash: 64 bits that pictures which look alike have nearly in common.
        small: (24, 24, 3), its colours.
        sharpness: None where nothing can be told: too small, or one colour.
        borders: widths of a border at (left, top, right, bottom), shares of the picture's sides.
        thumbnail: a JPEG of at most 224 px.
    """

    shape: float
    hash: int
    small: NDArray[np.uint8]
    sharpness: float | None
    borders: tuple[float, float, float, float]
    thumbnail: bytes


def measure(picture: Image.Image) -> Measures:
    """Everything that the report wants of a picture; for reading threads, as Pillow and numpy leave
    the other threads alone."""
    standard = picture.copy()
    standard.thumbnail((STANDARD_PX, STANDARD_PX), Image.Resampling.BOX)
    grey = np.asarray(standard.convert("L"), np.float32)
    return Measures(
        shape=picture.width / picture.height,
        hash=perceptual_hash(standard),
        small=np.asarray(standard.resize((_SMALL, _SMALL), Image.Resampling.BOX)),
        sharpness=sharpness(grey),
        borders=borders(grey),
        thumbnail=thumbnail(standard),
    )


def thumbnail(picture: Image.Image) -> bytes:
    """A small JPEG of a picture."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


def perceptual_hash(picture: Image.Image) -> int:
    """Whether each of the 8 x 8 lowest frequencies lies above their median: what stays when a
    picture is scaled, compressed or made lighter (pHash: Zauner, Implementation and benchmarking of
    perceptual image hash functions, 2010)."""
    grey = picture.convert("L").resize((_HASH_PX, _HASH_PX), Image.Resampling.BOX)
    frequencies = (_COSINES @ np.asarray(grey, np.float32) @ _COSINES.T).ravel()
    above = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def _cosines() -> Grey:
    """The first 8 rows of the discrete cosine transform (DCT-II)."""
    places = (np.arange(_HASH_PX) + 0.5) * np.pi / _HASH_PX
    return np.cos(np.outer(np.arange(8), places)).astype(np.float32)


_COSINES = _cosines()


def sharpness(grey: Grey) -> float | None:
    """Deviation of the Laplacian over the deviation of the grey itself, in the sharpest of the
    tiles with much contrast.

    The plain variance of the Laplacian calls fog, dark pictures and portraits before a soft ground
    blurred. Contrast cancels out here, and a few sharp places are enough.
    """
    height, width = (side // _TILES for side in (grey.shape[0] - 2, grey.shape[1] - 2))
    if min(height, width) < 4:
        return None
    middle = grey[1:-1, 1:-1]
    laplacian = 4 * middle - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    detail, contrast = (
        values[: height * _TILES, : width * _TILES]
        .reshape(_TILES, height, _TILES, width)
        .var(axis=(1, 3))
        .ravel()
        for values in (laplacian, middle)
    )
    if contrast.max() < 4:
        return None
    busiest = contrast >= np.percentile(contrast, 75)
    ratios = np.sqrt(detail[busiest] / (contrast[busiest] + 4))  # 4: rounding and JPEG's noise
    return float(np.sort(ratios)[-4])


def are_alike(one: Measures, other: Measures) -> bool:
    """Whether two pictures may be near-duplicates."""
    if (one.hash ^ other.hash).bit_count() > MOST_HASH_BITS:
        return False
    if not 1 / MOST_LONGER < one.shape / other.shape < MOST_LONGER:
        return False
    a, b = (each.small.astype(np.float32) for each in (one, other))
    if abs(a.mean() - b.mean()) > MOST_LIGHTER:
        return False
    a, b = a - a.mean(), b - b.mean()
    gain = float((a * b).sum() / max((b * b).sum(), 1.0))
    b = b * min(max(gain, 0.67), 1.5)
    return max(_outside(a, b), _outside(b, a)) <= MOST_UNLIKE


def like_earlier(measures: Sequence[Measures]) -> list[int | None]:
    """For each picture the first one that it may be a near-duplicate of, which itself is like none
    before; None for the others. One of each such group is enough to learn from.

    Of many alike, only the nearest few of each picture are looked at closely.
    """
    found: list[int | None] = []
    firsts: list[int] = []
    hashes = np.zeros(len(measures), np.uint64)
    for number, one in enumerate(measures):
        bits = np.bitwise_count(hashes[: len(firsts)] ^ np.uint64(one.hash))
        near = np.flatnonzero(bits <= MOST_HASH_BITS)
        nearest = near[np.argsort(bits[near], kind="stable")][:_LOOKED_AT]
        alike = (firsts[k] for k in nearest if are_alike(measures[firsts[k]], one))
        first = next(alike, None)
        found.append(first)
        if first is None:
            hashes[len(firsts)] = one.hash
            firsts.append(number)
    return found


def _outside(a: Grey, b: Grey) -> float:
    """By how much `a` leaves, where it does most, the range of `b` in the 3 x 3 cells around."""
    padded = np.pad(b, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = [padded[y : y + _SMALL, x : x + _SMALL] for y in range(3) for x in range(3)]
    above = a - np.max(around, axis=0)
    return float(np.maximum(above, np.min(around, axis=0) - a).max())


def borders(grey: Grey) -> tuple[float, float, float, float]:
    """Widths of uniform strips along opposite sides (left, top, right, bottom), as shares."""
    height, width = grey.shape
    top, bottom, left, right = (_plain_lines(one) for one in _from_each_side(grey))
    if top + bottom >= height or left + right >= width:
        return (0.0, 0.0, 0.0, 0.0)  # one colour all over
    outer = _from_each_side(grey)
    inner = _from_each_side(grey[top : height - bottom, left : width - right])
    straight = [_ends_straight(lines, edge[0]) for lines, edge in zip(inner, outer, strict=True)]
    vertical = min(top, bottom) >= NARROWEST * height and straight[0] and straight[1]
    horizontal = min(left, right) >= NARROWEST * width and straight[2] and straight[3]
    vertical = vertical and (horizontal or not (left or right)) and _same_colour(*outer[:2])
    horizontal = horizontal and (vertical or not (top or bottom)) and _same_colour(*outer[2:])
    return (
        left / width * horizontal,
        top / height * vertical,
        right / width * horizontal,
        bottom / height * vertical,
    )


def _from_each_side(grey: Grey) -> tuple[Grey, Grey, Grey, Grey]:
    """The lines of a picture as seen from its top, bottom, left and right."""
    return grey, grey[::-1], grey.T, grey.T[::-1]


def _plain_lines(lines: Grey) -> int:
    """How many first lines are of the colour of the very first."""
    near = np.abs(lines - np.median(lines[0])) <= BORDER_LEVELS
    plain = near.mean(axis=1) >= 0.99  # JPEG leaves some noise
    return int(np.argmin(plain)) if not plain.all() else len(lines)


def _ends_straight(lines: Grey, border: Grey) -> bool:
    """Whether the first lines inside a border differ from it along most of their length."""
    first = np.abs(lines[:3] - np.median(border)).max(axis=0)
    return float((first > EDGE_LEVELS).mean()) >= STRAIGHT


def _same_colour(one: Grey, other: Grey) -> bool:
    return bool(abs(np.median(one[0]) - np.median(other[0])) <= 2 * BORDER_LEVELS)

"""Variants of a picture: mirrored, cut elsewhere, in other colours. The first is always plain."""

import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps

from lora_sd.data.buckets import Crop, Size
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import Picture

JITTERED_VARIANTS = 8
HUE_SHARE = 0.1  # a hue shows sooner than a brightness: 0.5 shifts it by 0.05 of the circle


@dataclass(frozen=True)
class Variant:
    """All that was drawn at random for one variant of a picture.

    `crop` is of the mirrored picture where `mirrored`. `colours` are the factors of brightness,
    contrast and saturation, and the hue's shift in full turns; None leaves them as they are.
    """

    crop: Crop
    mirrored: bool = False
    colours: tuple[float, float, float, float] | None = None


def variant_count(options: FolderOptions) -> int:
    """How many variants of each picture there are."""
    if options.variants:
        return options.variants
    if options.crop_jitter or options.colour_jitter:
        return JITTERED_VARIANTS
    return 2 if options.flip else 1


def choose_variant(picture: Picture, crop: Crop, number: int) -> Variant:
    """Variant `number` of a picture; what is drawn depends on its content, whatever its name."""
    return choose(picture.size_px, crop, picture.options, number, int(picture.sha256[:15], 16))


def drawn_crop(picture: Picture, crop: Crop, number: int) -> Crop:
    """The crop that variant `number` really has, as `buckets.time_ids` wants it."""
    return choose_variant(picture, crop, number).crop


def choose(size_px: Size, crop: Crop, options: FolderOptions, number: int, seed: int) -> Variant:
    """Draw a variant of a picture of `size_px` (width, height); a function of its arguments alone.

    Every second one is mirrored. Crops get smaller by up to `options.crop_jitter`, though never so
    small that they had to be enlarged without `options.upscale`, and lie anywhere in the picture.
    """
    if number == 0:
        return Variant(crop)
    draw = random.Random(f"{seed} {number}")
    mirrored = options.flip and number % 2 == 1
    if options.crop_jitter:
        crop = _jittered(crop, size_px, options, draw)
    colours = None
    if share := options.colour_jitter:
        brightness, contrast, saturation = (draw.uniform(1 - share, 1 + share) for _ in range(3))
        hue = draw.uniform(-share, share) * HUE_SHARE
        colours = brightness, contrast, saturation, hue
    return Variant(crop, mirrored, colours)


def apply(
    variant: Variant, picture: Image.Image, mask: Image.Image | None
) -> tuple[Image.Image, Image.Image | None]:
    """The variant of an upright RGB picture, and the same part of its mask."""
    drawn = _cut(variant, picture)
    if variant.colours:
        drawn = _recoloured(drawn, *variant.colours)
    return drawn, None if mask is None else _cut(variant, mask)


def _cut(variant: Variant, picture: Image.Image) -> Image.Image:
    if variant.mirrored:
        picture = ImageOps.mirror(picture)
    return picture.resize(variant.crop.size_px, Image.Resampling.LANCZOS, box=variant.crop.box)


def _jittered(crop: Crop, size_px: Size, options: FolderOptions, draw: random.Random) -> Crop:
    """A smaller box of the same shape, somewhere in the picture."""
    left, top, right, bottom = crop.box
    smallest = 1 - options.crop_jitter
    if not options.upscale:
        smallest = min(1.0, max(smallest, crop.size_px[0] / (right - left)))
    scale = draw.uniform(smallest, 1.0)
    width, height = scale * (right - left), scale * (bottom - top)
    left = draw.uniform(0.0, size_px[0] - width)
    top = draw.uniform(0.0, size_px[1] - height)
    # Not a hair beyond the edge, which Pillow refuses.
    box = left, top, min(left + width, size_px[0]), min(top + height, size_px[1])
    return Crop(box, crop.size_px)


def _recoloured(
    picture: Image.Image, brightness: float, contrast: float, saturation: float, hue: float
) -> Image.Image:
    picture = ImageEnhance.Brightness(picture).enhance(brightness)
    picture = ImageEnhance.Contrast(picture).enhance(contrast)
    picture = ImageEnhance.Color(picture).enhance(saturation)
    turns, *rest = picture.convert("HSV").split()
    turns = turns.point([(value + round(hue * 256)) % 256 for value in range(256)])
    return Image.merge("HSV", (turns, *rest)).convert("RGB")

"""What is measured of a picture: likeness, sharpness, borders."""

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lora_sd.data.report.measures import BLURRED, are_alike, like_earlier, measure


@cache
def scene(seed: int, size: tuple[int, int] = (480, 320)) -> Image.Image:
    """Shapes before a soft ground, with fine detail, as a photograph has them."""
    random = np.random.default_rng(seed)
    ground = Image.fromarray(random.integers(40, 220, (4, 5, 3), np.uint8))
    picture = ground.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        wide, high = random.integers(20, 120, 2)
        colour = tuple(int(level) for level in random.integers(20, 230, 3))
        draw.ellipse((x - wide, y - high, x + wide, y + high), colour)
    noise = random.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image, quality: int = 40) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "compressed": compressed,
    "half the size": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "lighter": lambda p: ImageEnhance.Brightness(p).enhance(1.1),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.8),
    "softer": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
}


@pytest.mark.parametrize("change", COPIES)
def test_changed_copies_are_alike(change: str) -> None:
    for seed in range(5):
        assert are_alike(measure(scene(seed)), measure(COPIES[change](scene(seed)))), seed


def test_different_pictures_are_not_alike() -> None:
    measures = [measure(scene(seed)) for seed in range(15)]
    assert like_earlier(measures) == [None] * 15


def face(mouth: tuple[int, int]) -> Image.Image:
    """A round face before white; `mouth` are the angles of an arc."""
    picture = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((16, 16, 240, 240), "#ffd83a")
    for x in (85, 155):
        draw.ellipse((x, 80, x + 24, 116), "black")
    draw.arc((100, 145, 156, 185), *mouth, fill="black", width=12)
    return picture


def test_a_detail_that_differs_is_a_difference() -> None:
    smile, frown = measure(face((20, 160))), measure(face((200, 340)))
    assert (smile.hash ^ frown.hash).bit_count() <= 10  # the hash alone would call them alike
    assert not are_alike(smile, frown)


def test_the_same_shape_in_another_colour_is_not_alike() -> None:
    hearts = [Image.new("RGB", (64, 64), "white") for _ in range(2)]
    for picture, colour in zip(hearts, ("#d03030", "#308030"), strict=True):
        ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), colour)
    assert not are_alike(*map(measure, hearts))


def test_a_picture_stretched_to_another_shape_is_not_alike() -> None:
    assert not are_alike(measure(scene(1)), measure(scene(1).resize((480, 200))))


def test_each_group_is_led_by_its_first_picture() -> None:
    first, other = scene(1), scene(2)
    pictures = [first, other, compressed(first), first, compressed(other)]
    assert like_earlier([measure(one) for one in pictures]) == [None, None, 0, 0, 1]


def test_many_pictures_are_compared_at_once() -> None:
    one = measure(scene(1))
    assert like_earlier([one] * 300) == [None] + [0] * 299


@pytest.mark.parametrize("seed", range(4))
def test_blur_is_found_and_sharp_pictures_are_not(seed: int) -> None:
    sharp = scene(seed)
    value, soft = measure(sharp).sharpness, measure(sharp.filter(ImageFilter.GaussianBlur(3)))
    assert value is not None and value > BLURRED
    assert soft.sharpness is not None and soft.sharpness < BLURRED


def test_neither_fog_nor_a_soft_ground_is_blur() -> None:
    fog = Image.blend(scene(3), Image.new("RGB", (480, 320), "#cccccc"), 0.75)
    assert (measure(fog).sharpness or 0) > BLURRED
    portrait = scene(3).filter(ImageFilter.GaussianBlur(6))
    portrait.paste(scene(4).crop((150, 60, 330, 260)), (150, 60))
    assert (measure(portrait).sharpness or 0) > BLURRED


def test_nothing_is_said_of_the_sharpness_of_one_colour_or_of_few_pixels() -> None:
    assert measure(Image.new("RGB", (300, 300), "#204060")).sharpness is None
    assert measure(scene(1, (20, 20))).sharpness is None


@pytest.mark.parametrize(
    "border, expected",
    [((0, 40), (0, 1, 0, 1)), ((40, 0), (1, 0, 1, 0)), ((24, 24), (1, 1, 1, 1))],
)
@pytest.mark.parametrize("colour", ["black", "white"])
def test_borders_are_found_on_the_right_sides(
    border: tuple[int, int], expected: tuple[int, ...], colour: str
) -> None:
    left, top = border
    grey = Image.new("RGB", (480, 320), "#808080")
    inside = Image.blend(scene(5), grey, 0.5)  # so that no edge has the border's colour
    framed = compressed(ImageOps.expand(inside, (left, top, left, top), colour), 85)
    found = measure(framed).borders
    assert tuple(int(share > 0) for share in found) == expected
    width, height = framed.size
    for share, wanted in zip(found, (left / width, top / height) * 2, strict=True):
        assert share == pytest.approx(wanted, abs=0.01)


def test_a_subject_on_a_plain_ground_has_no_borders() -> None:
    for picture in (face((20, 160)), Image.new("RGB", (99, 99), "white"), scene(6)):
        assert measure(picture).borders == (0, 0, 0, 0)
    camera = Image.new("RGB", (200, 200), "#b48ae0")  # straight sides, round top
    draw = ImageDraw.Draw(camera)
    draw.rectangle((20, 70, 180, 160), "black")
    draw.ellipse((60, 40, 140, 120), "black")
    assert measure(camera).borders == (0, 0, 0, 0)


def test_thumbnails_are_small_jpegs_of_the_same_shape() -> None:
    small = Image.open(io.BytesIO(measure(scene(1, (1200, 600))).thumbnail))
    assert small.format == "JPEG" and small.size == (224, 112)


def test_any_size_can_be_measured() -> None:
    for size in ((1, 1), (1, 4000), (4000, 1), (3, 2)):
        assert measure(Image.new("RGB", size, "red")).borders == (0, 0, 0, 0)

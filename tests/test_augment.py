"""Variants of pictures: the first is plain, all stay inside, none depends on another."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lora_sd.data.augment import apply, choose, variant_count
from lora_sd.data.buckets import TooSmall, fit
from lora_sd.data.folder_options import FolderOptions


def options(**changes):
    return FolderOptions(Path("pictures"), **changes)


def noise(size):
    """A picture of which no two parts are alike."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def draw_variant(picture, mask, crop, options, number, seed):
    """(the picture, its mask, the crop that was used) of a variant."""
    variant = choose(picture.size, crop, options, number, seed)
    return *apply(variant, picture, mask), variant.crop


def close(one, other, most):
    """Whether two pictures differ by at most so much on average, of 255."""
    difference = np.asarray(one, np.float32) - np.asarray(other, np.float32)
    return float(np.abs(difference).mean()) <= most


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"flip": True}, 2),
        ({"crop_jitter": 0.1, "flip": True}, 8),
        ({"colour_jitter": 0.1}, 8),
        ({"colour_jitter": 0.1, "variants": 3}, 3),
        ({"flip": True, "variants": 1}, 1),
    ],
)
def test_how_many_variants_there_are(changes, count):
    assert variant_count(options(**changes)) == count


def test_the_first_variant_is_the_plain_crop():
    picture, wild = noise((90, 70)), options(flip=True, crop_jitter=0.5, colour_jitter=0.5)
    crop = fit(picture.size, 48, 16)
    plain = picture.resize(crop.size_px, Image.Resampling.LANCZOS, box=crop.box)
    drawn, mask, used = draw_variant(picture, None, crop, wild, 0, seed=1)
    assert close(drawn, plain, 0) and mask is None and used == crop


def test_with_flip_every_second_variant_is_the_mirror_image():
    picture = noise((90, 64))
    crop = fit(picture.size, 64, 64)
    drawn = [draw_variant(picture, None, crop, options(flip=True), k, 7) for k in range(4)]
    assert close(drawn[1][0], ImageOps.mirror(drawn[0][0]), 0.01)
    assert close(drawn[2][0], drawn[0][0], 0) and close(drawn[3][0], drawn[1][0], 0)


sides = st.integers(16, 400)


@given(
    st.tuples(sides, sides), st.floats(0.01, 0.5), st.booleans(), st.booleans(), st.integers(0, 9)
)
def test_jittered_crops_keep_their_shape_and_stay_in_the_picture(
    size, jitter, flip, upscale, number
):
    try:
        plain = fit(size, 64, 16, upscale=upscale)
    except TooSmall:
        return
    wanted = options(crop_jitter=jitter, flip=flip, upscale=upscale)
    crop = choose(size, plain, wanted, number, seed=2).crop
    width, height = crop.box[2] - crop.box[0], crop.box[3] - crop.box[1]
    assert 0 <= crop.box[0] < crop.box[2] <= size[0] and 0 <= crop.box[1] < crop.box[3] <= size[1]
    assert crop.size_px == plain.size_px
    assert width * crop.size_px[1] == pytest.approx(height * crop.size_px[0])
    share = width / (plain.box[2] - plain.box[0])
    assert 1 - jitter - 1e-6 <= share <= 1 + 1e-6
    if not upscale:
        assert width >= crop.size_px[0] - 1e-6


def test_jitter_moves_and_shrinks_the_crop():
    plain = fit((400, 300), 64, 16)
    crops = [choose((400, 300), plain, options(crop_jitter=0.3), k, 2).crop for k in range(1, 40)]
    widths = [crop.box[2] - crop.box[0] for crop in crops]
    whole = plain.box[2] - plain.box[0]
    assert min(widths) < 0.75 * whole and max(widths) > 0.95 * whole
    assert len({crop.box[0] for crop in crops}) == len({crop.box[1] for crop in crops}) == 39


def test_the_crop_that_is_given_back_is_the_one_that_was_cut():
    picture, wanted = noise((200, 150)), options(crop_jitter=0.3, flip=True)
    plain = fit(picture.size, 64, 16)
    for number in range(6):
        drawn, _, used = draw_variant(picture, None, plain, wanted, number, seed=4)
        shown = ImageOps.mirror(picture) if number % 2 else picture
        expected = shown.resize(used.size_px, Image.Resampling.LANCZOS, box=used.box)
        assert close(drawn, expected, 0)


def test_the_mask_is_cut_like_its_picture():
    mask = Image.new("L", (200, 150))
    mask.paste(255, (120, 30, 170, 90))
    picture, wanted = mask.convert("RGB"), options(crop_jitter=0.4, flip=True)
    for number in range(6):
        drawn, cut, _ = draw_variant(picture, mask, fit(picture.size, 64, 16), wanted, number, 4)
        assert close(drawn.convert("L"), cut, 0.01)


def test_colours_vary_and_shapes_do_not():
    picture = noise((64, 64)).resize((8, 8)).resize((64, 64))
    crop = fit(picture.size, 64, 16)
    drawn = [
        draw_variant(picture, picture.convert("L"), crop, options(colour_jitter=0.4), k, 4)
        for k in range(8)
    ]
    assert not any(close(drawn[0][0], one[0], 0.5) for one in drawn[1:])
    assert all(close(drawn[0][1], one[1], 0) and one[2] == crop for one in drawn)


def test_colours_vary_by_no_more_than_asked():
    grey = Image.new("RGB", (16, 16), (128, 128, 128))
    crop = fit(grey.size, 16, 16)
    values = [
        draw_variant(grey, None, crop, options(colour_jitter=0.1), k, 4)[0].getpixel((3, 3))
        for k in range(1, 60)
    ]
    assert all(max(value) - min(value) <= 1 and 114 <= value[0] <= 142 for value in values)
    assert min(values)[0] < 120 and max(values)[0] > 136


def test_a_hue_is_turned():
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    crop = fit(red.size, 16, 16)
    turns = set()
    for number in range(1, 30):
        drawn = draw_variant(red, None, crop, options(colour_jitter=0.5), number, 4)[0]
        turn = drawn.convert("HSV").getpixel((3, 3))[0]
        turns.add((turn + 128) % 256 - 128)
    assert min(turns) < -4 and max(turns) > 4 and max(map(abs, turns)) <= 15


def test_a_variant_depends_on_its_number_and_seed_alone():
    wild = options(flip=True, crop_jitter=0.3, colour_jitter=0.3)
    plain = fit((200, 150), 64, 16)
    one = [choose((200, 150), plain, wild, number, 5) for number in range(8)]
    assert [choose((200, 150), plain, wild, number, 5) for number in (6, 2)] == [one[6], one[2]]
    other = [choose((200, 150), plain, wild, number, 6) for number in range(8)]
    assert one[0] == other[0] and len(set(one + other)) == 15

"""Buckets: sizes that use the resolution well, crops that stay in the picture, never enlarged."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_sd.data.buckets import Crop, TooSmall, bucket_sizes, fit, time_ids

sides = st.integers(1, 6000)
sizes = st.tuples(sides, sides)
resolutions = st.integers(64, 1100)
steps = st.sampled_from([8, 16, 32, 64])
ratios = st.floats(1, 4).map(lambda ratio: round(ratio, 2))


@given(sizes, resolutions, steps, ratios, st.booleans())
def test_a_crop_is_a_bucket_and_lies_in_the_picture(size, resolution, step, ratio, upscale):
    try:
        crop = fit(size, resolution, step, ratio, upscale)
    except TooSmall:
        assert min(size) < step and not upscale
        return
    width, height = crop.size_px
    left, top, right, bottom = crop.box
    assert width % step == height % step == 0 < width * height <= resolution**2
    assert max(width, height) <= ratio * min(width, height) + 1e-6
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) * height == pytest.approx((bottom - top) * width)
    assert math.isclose(right - left, size[0]) or math.isclose(bottom - top, size[1])
    if not upscale:
        assert right - left >= width - 1e-6 and bottom - top >= height - 1e-6


@given(sizes, resolutions, steps, ratios, st.booleans())
def test_a_picture_on_its_side_has_the_bucket_on_its_side(size, resolution, step, ratio, upscale):
    assume(upscale or min(size) >= step)
    upright = fit(size, resolution, step, ratio, upscale).size_px
    assert fit(size[::-1], resolution, step, ratio, upscale).size_px == upright[::-1]


@given(sizes, resolutions, steps, ratios)
def test_no_bucket_has_a_nearer_shape(size, resolution, step, ratio):
    def cut_off(bucket):
        return abs(math.log(size[0] / size[1] * bucket[1] / bucket[0]))

    chosen = fit(size, resolution, step, ratio, upscale=True).size_px
    nearest = min(map(cut_off, bucket_sizes(resolution, step, ratio)))
    assert cut_off(chosen) == pytest.approx(nearest)


@given(resolutions, steps, ratios)
def test_buckets_use_most_of_the_resolution(resolution, step, ratio):
    side = resolution // step * step
    for width, height in bucket_sizes(resolution, step, ratio):
        assert (width, height) == (side, side) or width * height >= 0.75 * resolution**2


@given(st.integers(128, 900), st.floats(1, 1.4), st.integers(0, 300), steps)
def test_a_small_picture_loses_less_than_a_step_of_each_side(shorter, shape, more, step):
    size = shorter, int(shorter * shape)
    resolution = math.ceil(math.sqrt(size[0] * size[1])) + more
    bucket = fit(size, resolution, step, 2.0).size_px
    assert all(own - step < side <= own for own, side in zip(size, bucket, strict=True))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((3000, 3000), (512, 512)),
        ((1024, 768), (576, 448)),
        ((1500, 1000), (640, 384)),
        ((2000, 1000), (640, 320)),
        ((9000, 1000), (640, 320)),
        ((600, 500), (576, 448)),
        ((500, 500), (448, 448)),
        ((70, 1000), (64, 128)),
    ],
)
def test_the_buckets_of_sd15(size, bucket):
    assert fit(size, 512, 64).size_px == bucket


def test_where_the_nearest_bucket_is_a_little_too_wide_the_next_is_taken():
    assert fit((955, 642), 768, 32).size_px == (896, 640)
    assert fit((955, 642), 768, 32, upscale=True).size_px == (960, 608)


def test_of_two_buckets_of_one_shape_the_larger_is_taken():
    assert {(704, 352), (720, 360)} <= set(bucket_sizes(512, 8))
    assert fit((2000, 1000), 512, 8).size_px == (720, 360)


def test_what_is_smaller_than_a_step_is_told_with_its_size():
    with pytest.raises(TooSmall, match="has 40 x 900 pixels, and each side needs 64 or more"):
        fit((40, 900), 512, 64)
    assert fit((40, 40), 512, 64, upscale=True).size_px == (512, 512)


def test_a_resolution_below_a_step_is_refused():
    with pytest.raises(ValueError, match="holds no step"):
        bucket_sizes(32, 64)


def test_time_ids_count_what_is_cut_off_in_scaled_pixels():
    crop = Crop((200.0, 100.0, 1200.0, 1100.0), (500, 500))
    assert time_ids((2000, 1500), crop) == (1500, 2000, 50, 100, 500, 500)
    assert time_ids((512, 512), fit((512, 512), 512, 64)) == (512, 512, 0, 0, 512, 512)

"""Pictures: the same settings give the same picture, and scale 0 is the base."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lora_sd.generate import (
    Cancelled,
    PictureSettings,
    draw_grid,
    generate,
    generate_at_scales,
    generate_strip,
    save_picture,
)
from lora_sd.merge import MergedWeights


def one(seed=1, prompt="a red wall"):
    return PictureSettings(prompt, seed=seed, steps=3, guidance=2)


def pixels(pictures):
    return [np.asarray(picture, dtype=int) for picture in pictures]


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(base):
    alone = pixels(generate(base, [one(7)]))[0]
    beside = pixels(generate(base, [one(1), one(2, "a blue wall"), one(7)]))
    assert np.abs(beside[2] - alone).max() <= 1
    assert np.abs(beside[0] - alone).max() > 8


def test_many_pictures_are_drawn_in_parts(base):
    assert len(generate(base, [one(seed) for seed in range(10)])) == 10


def test_at_scale_0_and_afterwards_it_is_the_base(base, adapter):
    before = pixels(generate(base, [one()]))[0]
    merged = MergedWeights(base.components)
    rows = generate_at_scales(base, merged, adapter, [0, 0.5, 1], [one()])
    zero, half, whole = pixels(rows[0])
    assert np.array_equal(zero, before)
    assert np.abs(half - before).max() > 2 and np.abs(whole - half).max() > 2
    assert np.array_equal(pixels(generate(base, [one()]))[0], before)


def test_a_strip_in_one_pass_equals_merging_for_each_scale(base, adapter):
    scales = [0.0, 0.5, 1.0]
    before = {name: p.clone() for name, p in base.unet.named_parameters()}
    strip = pixels(generate_strip(base, adapter, scales, one()))
    after = dict(base.unet.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    merged = MergedWeights(base.components)
    (row,) = generate_at_scales(base, merged, adapter, scales, [one()])
    for picture, expected in zip(strip, pixels(row), strict=True):
        assert np.abs(picture - expected).max() <= 2
    assert np.abs(strip[2] - strip[0]).max() > 8


def test_cancelling_stops_and_puts_the_base_back(base, adapter):
    before = base.unet.conv_in.weight.clone()
    seen = []

    def stop_at_the_second(done, total):
        seen.append((done, total))
        return done == 2

    with pytest.raises(Cancelled):
        generate_at_scales(
            base, MergedWeights(base.components), adapter, [1, 2], [one()], stop_at_the_second
        )
    assert seen == [(1, 6), (2, 6)]
    assert bool((base.unet.conv_in.weight == before).all())


def test_a_saved_picture_carries_its_settings(base, tmp_path):
    save_picture(generate(base, [one()])[0], tmp_path / "p.png", one())
    with Image.open(tmp_path / "p.png") as picture:
        assert PictureSettings(**json.loads(picture.text["lora_sd"])) == one()


def test_the_grid_shows_every_picture_at_its_place():
    colours = ["red", "green", "blue", "black"]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    grid = draw_grid([pictures[:2], pictures[2:]], ["one", "two"], ["0", "1"])
    found = {
        grid.getpixel((x, y)) for x in range(0, grid.width, 9) for y in range(0, grid.height, 9)
    }
    assert {picture.getpixel((0, 0)) for picture in pictures} <= found

"""Pictures: the same settings give the same picture, and scale 0 is the base."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import choose
from diffusers import StableDiffusionXLPipeline
from make_bases import make_base
from PIL import Image

from lora_sd import inject
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError
from lora_sd.generate import (
    Cancelled,
    PictureSettings,
    draw_grid,
    generate,
    generate_at_scales,
    generate_strip,
    pictures_at_once,
    save_picture,
)
from lora_sd.merge import MergedWeights
from lora_sd.schedulers import SCHEDULERS, scheduler_named


def one(seed=1, prompt="a red wall"):
    return PictureSettings(prompt, seed=seed, steps=3, guidance=2)


def pixels(pictures):
    return [np.asarray(picture, dtype=int) for picture in pictures]


LONG = " ".join(["red"] * 80)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    return make_base("sdxl", tmp_path_factory.mktemp("sdxl") / "base", predicts_v=True)


@pytest.fixture
def sdxl(sdxl_folder):
    return load_base_model(str(sdxl_folder), torch.device("cpu"), torch.float32)


def test_pictures_are_those_of_diffusers(base):
    given = PictureSettings(
        "a red wall", "grey", seed=3, steps=4, guidance=3, width_px=24, height_px=16
    )
    expected = base.pipeline()(
        "a red wall",
        negative_prompt="grey",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=3,
        width=24,
        height=16,
    ).images
    assert np.array_equal(pixels(generate(base, [given])), pixels(expected))


@pytest.mark.parametrize("width, height", [(0, 0), (24, 16), (16, 32)])
def test_sdxl_s_pictures_are_those_of_diffusers(sdxl_folder, sdxl, width, height):
    """Of a pipeline that diffusers loads itself, with v-prediction and zero terminal SNR."""
    given = PictureSettings(
        "a red wall", "grey", seed=3, steps=4, guidance=3, width_px=width, height_px=height
    )
    scheduler = sdxl.scheduler
    assert scheduler.config.timestep_spacing == "trailing" and sdxl.zero_terminal_snr
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, scheduler=scheduler)
    expected = pipeline(
        "a red wall",
        negative_prompt="grey",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=4,
        guidance_scale=3,
        width=width or None,
        height=height or None,
    ).images
    (ours,) = pixels(generate(sdxl, [given]))
    assert np.abs(ours - pixels(expected)[0]).max() <= 1
    assert ours.shape == (height or 16, width or 16, 3) and ours.std() > 1


def test_sdxl_with_adapters_live_and_merged(sdxl):
    inject.attach(sdxl.components, choose(sdxl.components, "full", clamp_ranks=True))
    for layer in inject.lora_layers(sdxl.components).values():
        torch.nn.init.normal_(layer.lora_up.weight, std=0.5)
    adapter = inject.collect(sdxl.components)
    inject.detach(sdxl.components)
    before = pixels(generate(sdxl, [one()]))[0]
    strip = pixels(generate_strip(sdxl, adapter, [0.0, 0.5, 1.0], one()))
    merged = MergedWeights(sdxl.components)
    (row,) = generate_at_scales(sdxl, merged, adapter, [0.0, 0.5, 1.0], [one()])
    for picture, expected in zip(strip, pixels(row), strict=True):
        assert np.abs(picture - expected).max() <= 2
    assert np.abs(strip[2] - strip[0]).max() > 8
    assert np.array_equal(pixels(generate(sdxl, [one()]))[0], before)


def test_a_long_prompt_is_drawn_whole_and_changes_no_other(base):
    short, long, longer = one(1), one(1, LONG), one(1, LONG + " w a l l")
    alone = pixels(generate(base, [short]))[0]
    drawn = pixels(generate(base, [long, short, longer, one(1, "a wall")]))
    assert np.abs(drawn[1] - alone).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).max() > 2
    assert np.abs(pixels(generate(base, [longer]))[0] - drawn[2]).max() <= 1


def test_parts_that_were_released_come_back_to_draw(sdxl):
    before = pixels(generate(sdxl, [one()]))
    sdxl.release("vae", "text_encoder", "text_encoder_2")
    assert np.array_equal(pixels(generate(sdxl, [one()])), before)


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(base):
    alone = pixels(generate(base, [one(7)]))[0]
    beside = pixels(generate(base, [one(1), one(2, "a blue wall"), one(7)]))
    assert np.abs(beside[2] - alone).max() <= 1
    assert np.abs(beside[0] - alone).max() > 8


@pytest.mark.parametrize(
    "width_px, height_px, drawn", [(64, 64, 8), (512, 512, 4), (1024, 512, 2), (2048, 2048, 1)]
)
def test_how_many_pictures_are_drawn_at_once_follows_from_their_pixels(width_px, height_px, drawn):
    assert pictures_at_once(width_px, height_px) == drawn


def test_many_pictures_are_drawn_in_parts_and_decoded_in_smaller_ones(base, adapter, monkeypatch):
    settings = [one(seed) for seed in range(5)]
    expected = pixels(generate(base, settings))
    seen = {"unet": [], "decoder": []}
    for name, module in (("unet", base.unet), ("decoder", base.vae.decoder)):
        module.register_forward_pre_hook(lambda _, given, n=name: seen[n].append(len(given[0])))
    monkeypatch.setattr("lora_sd.generate.PIXELS_IN_A_BATCH", 2 * 16**2 + 1)
    monkeypatch.setattr("lora_sd.generate.PIXELS_DECODED_AT_ONCE", 16**2)
    drawn = pixels(generate(base, settings))
    assert seen["decoder"] == [1] * 5 and set(seen["unet"]) == {4, 2}  # with and without the prompt
    assert all(
        np.abs(ours - theirs).max() <= 1 for ours, theirs in zip(drawn, expected, strict=True)
    )
    assert len(generate_strip(base, adapter, [0.0, 0.5, 1.0], one())) == 3


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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_in_its_own_way(base, name):
    settings = replace(one(), scheduler=name, steps=4)
    (drawn,) = pixels(generate(base, [settings]))
    assert drawn.std() > 1
    assert np.array_equal(pixels(generate(base, [settings]))[0], drawn)
    kind, options = SCHEDULERS[name]
    made = scheduler_named(name, base)
    assert type(made).__name__ == kind and options.items() <= dict(made.config).items()
    assert made.config.prediction_type == base.prediction_type
    assert made.config.beta_schedule == base.scheduler.config.beta_schedule


def test_a_scheduler_that_cannot_draw_is_an_error(base, sdxl):
    with pytest.raises(BaseModelError, match="no scheduler 'none'"):
        generate(base, [replace(one(), scheduler="none")])
    with pytest.raises(BaseModelError, match="PNDM cannot draw"):  # with zero terminal SNR
        generate(sdxl, [replace(one(), scheduler="PNDM")])
    assert scheduler_named("Euler", sdxl).config.rescale_betas_zero_snr


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


def ink(grid: Image.Image, right: int) -> tuple[int, int, int, int]:
    """Where something is written in the column of the rows' labels."""
    labels = grid.crop((0, 30, right, grid.height)).convert("L").point(lambda value: value < 128)
    return labels.getbbox() or (0, 0, 0, 0)


def test_a_long_label_without_spaces_is_broken_too():
    picture = Image.new("RGB", (64, 64), "white")
    grid = draw_grid([[picture]], ["icon" * 30], ["0"])
    left, top, right, bottom = ink(grid, grid.width)
    assert right < 180 and bottom - top > 40

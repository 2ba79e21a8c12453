"""Noise: what it is made of, and that all of it comes from the generator that is given."""

import pytest
import torch
from diffusers import DDPMScheduler

from lora_sd.objective import Objective
from lora_sd.randomness import generator

SHAPE = torch.Size((4, 32, 24))
OFFSET, MULTIRES = {"noise_offset": 0.1}, {"multires_noise_iterations": 6}
PERTURBED = {"input_perturbation": 0.1}
KINDS = [{}, OFFSET, MULTIRES, PERTURBED, OFFSET | PERTURBED, MULTIRES | PERTURBED]


def drawn(shape=SHAPE, place=0, **options):
    return Objective(DDPMScheduler(), **options).draw_noise(shape, generator(0, place))


def many(count=300, **options):
    """The target's noise (count, channels, height, width)."""
    return torch.stack([drawn(place=i, **options)[0] for i in range(count)])


def test_the_plain_objective_draws_white_noise_and_nothing_else():
    draw, same = generator(0, 0), generator(0, 0)
    noise, added = Objective(DDPMScheduler()).draw_noise(SHAPE, draw)
    assert added is noise and torch.equal(noise, torch.randn(SHAPE, generator=same))
    assert torch.equal(draw.get_state(), same.get_state())


@pytest.mark.parametrize("options", KINDS)
def test_the_generator_alone_decides(options):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = drawn(**options), drawn(**options), drawn(place=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for kind in (0, 1):
        assert torch.equal(first[kind], again[kind]) and not torch.equal(first[kind], other[kind])
        assert first[kind].shape == SHAPE and first[kind].dtype == torch.float32


def test_an_offset_shifts_each_channel_by_a_normal_number():
    shifts = many(noise_offset=0.5) - many()
    torch.testing.assert_close(shifts, shifts[..., :1, :1].expand_as(shifts), rtol=0, atol=1e-5)
    each = shifts[..., 0, 0]
    assert abs(float(each.mean())) < 0.05 and float(each.std()) == pytest.approx(0.5, rel=0.1)
    between = torch.corrcoef(each.T) - torch.eye(4)
    assert between.abs().max() < 0.2  # each channel by its own


def test_coarser_noise_is_alike_in_neighbouring_places_and_of_deviation_1():
    white, coarse = many(100), many(100, multires_noise_iterations=6, multires_noise_discount=0.5)

    def likeness(noise, distance):
        return float((noise[..., distance:] * noise[..., :-distance]).mean())

    assert abs(likeness(white, 1)) < 0.01
    assert likeness(coarse, 1) > likeness(coarse, 4) > 0.02
    for one in coarse:
        assert float(one.std()) == pytest.approx(1, abs=1e-5)
    more = many(100, multires_noise_iterations=6, multires_noise_discount=0.8)
    assert likeness(more, 4) > 2 * likeness(coarse, 4)


def test_one_iteration_adds_one_coarser_resolution():
    few, more = (many(50, multires_noise_iterations=n, multires_noise_discount=1.0) for n in (1, 3))
    far = [float((noise[..., 8:] * noise[..., :-8]).mean()) for noise in (few, more)]
    assert abs(far[0]) < 0.02 < far[1]
    assert float((few[..., 1:] * few[..., :-1]).mean()) > 0.05


def test_without_a_discount_coarser_noise_is_white():
    torch.testing.assert_close(
        drawn(multires_noise_iterations=6, multires_noise_discount=0.0)[0],
        drawn()[0] / drawn()[0].std(),
    )


@pytest.mark.parametrize("shape", [(4, 2, 2), (4, 1, 3), (4, 64, 2), (16, 7, 5)])
def test_coarser_noise_fits_any_size(shape):
    noise, _ = drawn(torch.Size(shape), multires_noise_iterations=10, multires_noise_discount=1.0)
    assert noise.shape == shape and noise.isfinite().all()


@pytest.mark.parametrize("options", [{}, OFFSET, MULTIRES])
def test_a_perturbation_is_added_and_the_target_does_not_know(options):
    noise, added = drawn(input_perturbation=0.1, **options)
    assert torch.equal(noise, drawn(**options)[0])
    more = added - noise
    assert float(more.std()) == pytest.approx(0.1, rel=0.1) and abs(float(more.mean())) < 0.01
    assert abs(float((more * noise).mean())) < 0.01  # other noise, not more of the same

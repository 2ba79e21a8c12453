"""Distances against their formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lora_sd.objective.distance import (
    absolute_error,
    huber_c_of_timesteps,
    pseudo_huber_error,
    smooth_l1_error,
    squared_error,
)

C = torch.tensor([0.1, 1.0])
OF_C = [pseudo_huber_error, smooth_l1_error]


def everywhere(*values, dtype=torch.float32):
    """Pictures (n, 4, 8, 8) of one value each."""
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)


def test_each_distance_is_its_formula_for_every_picture_with_its_own_c():
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 8, 8)
    d, c = (predicted - target).double(), C.double().view(-1, 1, 1, 1)
    root = (d**2 + c**2).sqrt() - c
    expected = {
        squared_error: d**2,
        absolute_error: d.abs(),
        pseudo_huber_error: 2 * c * root,
        smooth_l1_error: 2 * root,
    }
    for measure, errors in expected.items():
        found = measure(predicted, target, *[C] if measure in OF_C else [])
        torch.testing.assert_close(found, errors.flatten(1).mean(1).float())


def test_small_distances_are_squares_and_large_ones_lines():
    zero = torch.zeros(2, 4, 8, 8)
    small, large = everywhere(1e-4, 1e-3), everywhere(100.0, 100.0)
    d = torch.tensor([1e-4, 1e-3])
    torch.testing.assert_close(pseudo_huber_error(small, zero, C), d**2, rtol=1e-4, atol=0)
    torch.testing.assert_close(smooth_l1_error(small, zero, C), d**2 / C, rtol=1e-4, atol=0)
    torch.testing.assert_close(pseudo_huber_error(large, zero, C), 200 * C, rtol=0.02, atol=0)
    expected = torch.full((2,), 200.0)
    torch.testing.assert_close(smooth_l1_error(large, zero, C), expected, rtol=0.02, atol=0)


def test_an_outlier_pulls_less_than_by_its_square():
    def pull(measure, *c):
        predicted = torch.zeros(1, 1, 1, 2, requires_grad=True)
        measure(predicted, torch.tensor([[[[1.0, 50.0]]]]), *c).sum().backward()
        return float(predicted.grad[..., 1] / predicted.grad[..., 0])

    assert pull(squared_error) == pytest.approx(50)
    assert pull(absolute_error) == pytest.approx(1)
    for measure in OF_C:
        assert 1 < pull(measure, torch.tensor([0.1])) < 1.01


@pytest.mark.parametrize("measure", [squared_error, absolute_error, *OF_C])
def test_everything_is_computed_in_float32_and_a_perfect_prediction_has_no_gradient(measure):
    c = [C] if measure in OF_C else []
    predicted = everywhere(0.5, 300.0, dtype=torch.float16).clone().requires_grad_()
    target = predicted.detach().clone()
    target[1] = 0  # 300 squared is beyond float16
    errors = measure(predicted, target, *c)
    assert errors.dtype == torch.float32 and errors.isfinite().all()
    errors.sum().backward()
    assert predicted.grad.isfinite().all()
    assert not predicted.grad[0].any() and predicted.grad[1].any()


@pytest.mark.parametrize("measure", [squared_error, absolute_error, *OF_C])
def test_a_mask_counts_places_within_the_whole_picture(measure):
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 8, 8)
    c = [C] if measure in OF_C else []
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :, :2] = 1
    found = measure(predicted, target, *c, mask)
    part = measure(predicted[..., :2], target[..., :2], *c)
    torch.testing.assert_close(found, torch.tensor([float(part[0]) / 4, 0]))
    half = measure(predicted, target, *c, torch.full((2, 1, 8, 8), 0.5))
    torch.testing.assert_close(half, measure(predicted, target, *c) / 2)


def test_c_falls_with_noise_as_in_kohya():
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for t in (0, 1, 500, 999):
        a = float(schedule.alphas_cumprod[t])
        sigma = ((1 - a) / a) ** 0.5
        expected = {
            "constant": 0.2,
            "exponential": math.exp(-(-math.log(0.2) / 1000) * t),
            "snr": (1 - 0.2) / (1 + sigma) ** 2 + 0.2,
        }
        for by, c in expected.items():
            assert float(huber_c_of_timesteps(schedule, 0.2, by)[t]) == pytest.approx(c, rel=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("c", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("by", ["constant", "exponential", "snr"])
def test_c_lies_between_1_and_what_is_asked(by, c, zero):
    found = huber_c_of_timesteps(DDPMScheduler(rescale_betas_zero_snr=zero), c, by)
    assert found.shape == (1000,) and found.isfinite().all()
    assert found.min() >= min(c, 1) - 1e-6 and found.max() <= max(c, 1) + 1e-6
    assert float(found[-1]) == pytest.approx(c, rel=0.01, abs=0.011)
    if by != "constant":
        assert float(found[0]) == pytest.approx(1, abs=0.1)

"""Noise, target and error against their formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from lora_sd.objective import Objective, prediction_target, squared_error
from lora_sd.randomness import generator


@pytest.fixture
def parts():
    torch.manual_seed(0)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    return latents, noise, torch.tensor([0, 400, 999])


def signal_and_noise(schedule, timesteps):
    signal = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()


def test_noisy_latents_are_the_weighted_sum(parts):
    latents, noise, timesteps = parts
    schedule = DDPMScheduler()
    signal, spread = signal_and_noise(schedule, timesteps)
    expected = signal * latents + spread * noise
    torch.testing.assert_close(Objective(schedule).noisy(latents, noise, timesteps), expected)


def test_an_epsilon_model_is_asked_for_the_noise(parts):
    assert prediction_target(DDPMScheduler(), *parts) is parts[1]


def test_a_v_model_is_asked_for_the_velocity(parts):
    latents, noise, timesteps = parts
    schedule = DDPMScheduler(prediction_type="v_prediction")
    signal, spread = signal_and_noise(schedule, timesteps)
    expected = signal * noise - spread * latents
    torch.testing.assert_close(prediction_target(schedule, *parts), expected)


def test_the_error_is_per_sample_and_in_float32():
    prediction = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    target = torch.stack([torch.full((4, 8, 8), 2.0), torch.full((4, 8, 8), 0.5)])
    assert squared_error(prediction, target).tolist() == [4.0, 0.25]


def test_every_timestep_is_drawn_about_as_often():
    schedule = DDPMScheduler(num_train_timesteps=10)
    drawn = [Objective(schedule).draw_timestep(generator(0, "t", i)) for i in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=10)
    assert counts.shape == (10,) and counts.min() > 140 and counts.max() < 260

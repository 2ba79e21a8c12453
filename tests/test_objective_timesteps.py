"""Timesteps: how often each is drawn, against the densities and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from lora_sd.errors import ConfigError
from lora_sd.objective import Objective
from lora_sd.randomness import generator

LOGIT, BIASED = {"timesteps": "logit_normal"}, {"timesteps": "biased"}
KINDS = [{}, LOGIT, BIASED | {"timestep_bias": 1.0}, BIASED | {"timestep_bias": -1.0}]


def drawn(count=4000, total=1000, **options):
    """Timesteps (count) of an objective, all from one generator."""
    objective = Objective(DDPMScheduler(num_train_timesteps=total), **options)
    draw = generator(0, "timesteps")
    return torch.tensor([objective.draw_timestep(draw) for _ in range(count)])


def furthest(timesteps, distribution, total=1000):
    """The Kolmogorov-Smirnov statistic against a distribution function of u, in units of what 1 of
    1000 true samples passes."""
    found = (timesteps.double().sort().values + 0.5) / total
    expected = distribution(found)
    steps = torch.arange(1, len(found) + 1) / len(found)
    return float((steps - expected).abs().max() * len(found) ** 0.5 / 1.95)


def test_the_plain_objective_draws_as_it_always_did():
    draw, same = generator(0, 0), generator(0, 0)
    for _ in range(20):
        found = Objective(DDPMScheduler()).draw_timestep(draw)
        assert found == int(torch.randint(1000, (), generator=same))
    assert torch.equal(draw.get_state(), same.get_state())


def test_uniform_is_uniform():
    assert furthest(drawn(), lambda u: u) < 1


@pytest.mark.parametrize("options", KINDS)
def test_a_range_includes_both_its_ends_and_nothing_else(options):
    found = drawn(min_timestep=3, max_timestep=6, **options)
    assert found.unique().tolist() == [3, 4, 5, 6]
    assert drawn(20, max_timestep=0, **options).unique().tolist() == [0]
    assert drawn(20, min_timestep=7, max_timestep=7, **options).unique().tolist() == [7]
    assert drawn(total=4, **options).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.0, 0.5), (-2.0, 2.0)])
def test_logit_normal_is_that_of_diffusers(mean, deviation):
    objective = Objective(DDPMScheduler(), **LOGIT, logit_mean=mean, logit_deviation=deviation)
    for place in range(50):
        u = compute_density_for_timestep_sampling(
            "logit_normal", 1, mean, deviation, generator=generator(0, place)
        )
        assert objective.draw_timestep(generator(0, place)) == int(u * 1000)


def test_a_logit_mean_above_0_gives_noisier_timesteps():
    low, middle, high = (drawn(500, **LOGIT, logit_mean=m).median() for m in (-1.0, 0.0, 1.0))
    assert low < 350 < middle < 650 < high
    schedule = DDPMScheduler()
    assert schedule.alphas_cumprod[high] < schedule.alphas_cumprod[low]  # noisier indeed


@pytest.mark.parametrize("bias", [0.5, 1.0, 4.0])
def test_a_bias_has_the_density_that_is_said(bias):
    noisy = drawn(**BIASED, timestep_bias=bias)
    assert furthest(noisy, lambda u: u ** (1 + bias)) < 1
    late = drawn(**BIASED, timestep_bias=-bias)
    assert furthest(late, lambda u: 1 - (1 - u) ** (1 + bias)) < 1
    assert furthest(noisy, lambda u: u) > 3  # the measure tells them apart


def test_no_bias_is_uniform():
    assert furthest(drawn(**BIASED), lambda u: u) < 1


@pytest.mark.parametrize("options", [BIASED | {"timestep_bias": -4.0}, LOGIT | {"logit_mean": 5.0}])
def test_a_share_that_is_rounded_to_1_stays_in_the_range(options, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.0))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.tensor(100.0))
    assert drawn(1, **options).tolist() == [999]


@pytest.mark.parametrize("name", ["min_timestep", "max_timestep"])
def test_a_timestep_beyond_the_schedule_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name} is 1000, and the base's last timestep is 999"):
        Objective(DDPMScheduler(), **{name: 1000})
    Objective(DDPMScheduler(), **{name: 999})

"""Weights of timesteps against their formulas, against diffusers, and against one another."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from lora_sd.errors import ConfigError
from lora_sd.objective import Objective
from lora_sd.objective.weighting import snr_of_timesteps, weights_of_timesteps

EPSILON, V = "epsilon", "v_prediction"
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALL = torch.arange(1000)


def schedule_of(kind, zero=False):
    return DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero, **STABLE)


def weights(weighting, kind, gamma=5.0, zero=False):
    return weights_of_timesteps(schedule_of(kind, zero), weighting, gamma)


@pytest.mark.parametrize("zero", [False, True])
def test_the_snr_is_that_of_diffusers(zero):
    schedule = schedule_of(V, zero)
    snr = snr_of_timesteps(schedule)
    torch.testing.assert_close(snr.float(), compute_snr(schedule, ALL), rtol=1e-4, atol=0)
    assert snr.isfinite().all() and (snr.diff() < 0).all() and (snr[-1] == 0) == zero


@pytest.mark.parametrize("gamma", [0.5, 5, 20])
@pytest.mark.parametrize(("kind", "more"), [(EPSILON, 0), (V, 1)])
def test_min_snr_is_that_of_diffusers_training_scripts(kind, more, gamma):
    snr = compute_snr(schedule_of(kind), ALL)
    expected = torch.stack([snr, gamma * torch.ones(1000)], 1).min(1)[0] / (snr + more)
    torch.testing.assert_close(weights("min_snr", kind, gamma), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "more"), [(EPSILON, 0), (V, 1)])
def test_soft_min_snr_is_that_of_its_paper(kind, more):
    snr = snr_of_timesteps(schedule_of(kind))
    of_the_picture = 1 / (1 / snr + 1 / 5)
    expected = (of_the_picture / (snr + more)).float()
    torch.testing.assert_close(weights("soft_min_snr", kind), expected)


@pytest.mark.parametrize("kind", [EPSILON, V])
def test_soft_min_snr_lies_below_min_snr_and_near_it_at_both_ends(kind):
    share = weights("soft_min_snr", kind) / weights("min_snr", kind)
    assert (share < 1).all() and share.min() == pytest.approx(0.5, abs=0.01)  # where SNR is gamma
    assert share[-1] > 0.99 and share[0] > 0.99


def test_debiased_is_that_of_its_paper_and_of_kohya_for_v():
    signal = schedule_of(EPSILON).alphas_cumprod.double()
    expected = ((1 - signal) / signal).sqrt().float()
    torch.testing.assert_close(weights("debiased", EPSILON), expected)
    torch.testing.assert_close(weights("debiased", V), (1 - signal).float())


def errors_of_one_picture(kind, means_otherwise, **options):
    """(the weighted errors of a prediction, the errors of the picture that it means), at five
    timesteps; the prediction means the same picture for both kinds."""
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 8, 8).double()
    meant = latents + means_otherwise * torch.randn(5, 4, 8, 8).double()
    timesteps = torch.tensor([0, 100, 400, 700, 999])
    objective = Objective(schedule_of(kind), **options)
    signal = objective.schedule.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    predicted = {
        EPSILON: (noisy - signal.sqrt() * meant) / (1 - signal).sqrt(),
        V: (signal.sqrt() * noisy - meant) / (1 - signal).sqrt(),
    }[kind]
    target = {EPSILON: noise, V: signal.sqrt() * noise - (1 - signal).sqrt() * latents}[kind]
    picture_errors = (meant - latents).square().flatten(1).mean(1).float()
    return objective.errors(predicted, target, timesteps), picture_errors


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_a_prediction_counts_the_same_whichever_kind_of_base_made_it(weighting):
    found = [errors_of_one_picture(kind, 0.5, weighting=weighting)[0] for kind in (EPSILON, V)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)
    plain = [errors_of_one_picture(kind, 0.5)[0] for kind in (EPSILON, V)]
    assert not torch.allclose(plain[0], plain[1], rtol=0.1)


def test_debiased_under_v_is_the_error_of_the_picture():
    found, of_the_picture = errors_of_one_picture(V, 0.5, weighting="debiased")
    torch.testing.assert_close(found, of_the_picture, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased"])
def test_zero_terminal_snr_has_finite_weights_under_v(weighting):
    found = weights(weighting, V, zero=True)
    assert found.isfinite().all() and (found >= 0).all()
    assert found[-1] == (1 if weighting == "debiased" else 0)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_a_finite_limit_is_taken_where_the_snr_is_zero(weighting):
    assert weights(weighting, EPSILON, zero=True)[-1] == 1


def test_an_infinite_weight_is_refused_where_it_would_be_drawn():
    schedule = schedule_of(EPSILON, zero=True)
    with pytest.raises(ConfigError, match=r"'debiased' divides.*max_timestep to 998"):
        Objective(schedule, weighting="debiased")
    Objective(schedule, weighting="debiased", max_timestep=998)


def test_no_weighting_is_no_tensor_at_all():
    assert weights("none", EPSILON) is None

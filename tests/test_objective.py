"""Noise, target and error against their formulas."""

from functools import partial

import pytest
import torch
from conftest import PICTURE_PX
from diffusers import DDPMScheduler
from PIL import Image

from lora_sd.config.training import ObjectiveGroup
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.store import MemoryStore
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import make_views
from lora_sd.errors import ConfigError
from lora_sd.objective import Objective, prediction_target, squared_error
from lora_sd.objective.distance import (
    absolute_error,
    huber_c_of_timesteps,
    pseudo_huber_error,
    smooth_l1_error,
)
from lora_sd.objective.weighting import weights_of_timesteps
from lora_sd.randomness import generator
from lora_sd.train_step import errors_of


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


def test_the_plain_objective_is_that_of_the_plain_settings():
    schedule = DDPMScheduler()
    assert Objective(schedule, **ObjectiveGroup().model_dump()) == Objective(schedule)


def test_the_plain_error_is_the_squared_error_to_the_bit(parts):
    latents, noise, timesteps = parts
    found = Objective(DDPMScheduler()).errors(latents, noise, timesteps)
    assert torch.equal(found, squared_error(latents, noise))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("error", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("weighting", ["none", "min_snr", "soft_min_snr", "debiased"])
def test_weights_of_timesteps_multiply_any_distance_masked_or_not(parts, kind, error, weighting):
    latents, noise, timesteps = parts
    schedule = DDPMScheduler(prediction_type=kind)
    mask = torch.rand(3, 1, 8, 8)
    measure = {"l2": squared_error, "l1": absolute_error}.get(error)
    if measure is None:
        c = huber_c_of_timesteps(schedule, 0.1, "snr")[timesteps]
        measure = partial(pseudo_huber_error if error == "huber" else smooth_l1_error, c=c)
    objective = Objective(schedule, error=error, weighting=weighting)
    weights = weights_of_timesteps(schedule, weighting, 5.0)
    for options in ({}, {"mask": mask}):
        expected = measure(latents, noise, **options)
        expected = expected if weights is None else expected * weights[timesteps]
        found = objective.errors(latents, noise, timesteps, **options)
        torch.testing.assert_close(found, expected)
        assert found.shape == (3,) and (found > 0).all()


@pytest.mark.parametrize("by", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("error", ["huber", "smooth_l1"])
def test_each_picture_has_the_c_of_its_timestep(parts, error, by):
    latents, noise, timesteps = parts
    schedule = DDPMScheduler()
    objective = Objective(schedule, error=error, huber_c=0.3, huber_schedule=by)
    c = huber_c_of_timesteps(schedule, 0.3, by)[timesteps]
    measure = {"huber": pseudo_huber_error, "smooth_l1": smooth_l1_error}[error]
    expected = measure(latents, noise, c)
    torch.testing.assert_close(objective.errors(latents, noise, timesteps), expected)
    alone = [
        float(objective.errors(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1]))
        for i in range(3)
    ]
    torch.testing.assert_close(torch.tensor(alone), expected)


@pytest.mark.parametrize("name", ["noise_offset", "multires_noise_iterations"])
def test_noise_other_than_white_is_refused_with_zero_terminal_snr(name):
    schedule = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match=rf"{name} is not for a base with zero terminal SNR"):
        Objective(schedule, **{name: 1})
    Objective(schedule, input_perturbation=0.1, weighting="min_snr")
    Objective(DDPMScheduler(prediction_type="v_prediction"), **{name: 1})


def test_all_that_is_wrong_is_told_at_once():
    schedule = DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError) as caught:
        Objective(schedule, weighting="debiased", noise_offset=0.1)
    assert len(caught.value.problems) == 2


def test_masks_and_the_weight_of_class_pictures_go_with_any_weighting(base, tmp_path):
    """Each picture's part of the loss: its folder's weight x its timestep's x its masked error."""
    folders = []
    for kind, loss_weight in (("training", 1.0), ("regularisation", 0.5)):
        (tmp_path / kind).mkdir()
        for name, left in (("a", 0), ("b", 255)):
            picture = Image.new("RGBA", (PICTURE_PX, PICTURE_PX), (200, 0, 0, 255))
            picture.paste((0, 0, 0, left), (0, 0, PICTURE_PX // 2, PICTURE_PX))
            picture.save(tmp_path / kind / f"{name}.png")
        options = {"resolution_px": (PICTURE_PX,), "masks": "alpha", "caption": kind}
        folders.append(
            FolderOptions(tmp_path / kind, kind=kind, loss_weight=loss_weight, **options)
        )
    views, _ = make_views(read_folders(folders), 8)
    schedule = base.noise_schedule()
    plain, weighted = Objective(schedule), Objective(schedule, weighting="min_snr", snr_gamma=1.0)
    losses, parts = [], []
    for objective in (plain, weighted):
        data = TrainingData(base, views, MemoryStore(), objective, seed=0, step_pictures=4)
        data.encode(lambda done, of: False)
        (batch,) = data.batches(0, 4)
        errors = errors_of(base, objective, batch, 75)
        losses.append((errors * batch.weights).sum())
        parts.append((errors, batch))
    (errors, batch), (found, same) = parts
    assert torch.equal(batch.weights, same.weights) and torch.equal(batch.noise, same.noise)
    by_kind = dict(zip(batch.captions, (batch.weights * 4).tolist(), strict=True))
    assert by_kind == {"training": 1.0, "regularisation": 0.5}
    assert not batch.mask[0].all() or not batch.mask[1].all()
    timestep_weights = weights_of_timesteps(schedule, "min_snr", 1.0)[batch.timesteps]
    assert timestep_weights.min() < 0.9
    torch.testing.assert_close(found, errors * timestep_weights)
    torch.testing.assert_close(losses[1], (errors * timestep_weights * batch.weights).sum())


@pytest.mark.parametrize("error", ["l2", "huber"])
def test_errors_are_computed_where_the_tensors_are(parts, error):
    objective = Objective(DDPMScheduler(), error=error, weighting="min_snr")
    elsewhere = [tensor.to("meta") for tensor in parts]  # stands for a GPU
    assert objective.errors(*elsewhere).device.type == "meta"
    assert objective.errors(*parts).isfinite().all()

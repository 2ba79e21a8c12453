"""What the UNet is asked to predict, and how far off it is: pure functions of tensors."""

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F


def add_noise(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The latents (batch, channels, height, width) as they are at timesteps (batch).

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4.
    """
    return schedule.add_noise(latents, noise, timesteps)


def prediction_target(
    schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """The noise for an epsilon model, the velocity for a v-prediction model.

    Velocity: Salimans and Ho 2022, "Progressive Distillation", section 4.
    """
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample (batch), in float32.

    Args:
        mask: (batch, 1, height, width), how much each place counts, 0 to 1. The mean stays over the
            whole picture, so that a small masked part counts as little as it is large (as in
            kohya's masked loss).
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (error if mask is None else error * mask).flatten(1).mean(1)


def random_timestep(schedule: DDPMScheduler, generator: torch.Generator) -> int:
    """A timestep, every one equally likely."""
    return int(torch.randint(schedule.config.num_train_timesteps, (), generator=generator))

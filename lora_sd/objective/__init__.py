"""What the UNet is asked to predict, from what noise, and how far off it is."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Size, Tensor
from torch.nn import functional as F


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


@dataclass(frozen=True)
class Objective:
    """What is asked of the UNet; the default is the plain one.

    Args:
        schedule: the noise schedule, which knows the prediction type.
    """

    schedule: DDPMScheduler

    def draw_timestep(self, draw: torch.Generator) -> int:
        """A timestep for one picture."""
        return int(torch.randint(self.schedule.config.num_train_timesteps, (), generator=draw))

    def draw_noise(self, shape: Size, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """(the noise that is the target's, the noise that is added) for one picture's latents
        (channels, height, width); the same tensor where nothing is perturbed."""
        noise = torch.randn(shape, generator=draw)
        return noise, noise

    def noisy(self, latents: Tensor, added_noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents (n, channels, height, width) as they are at timesteps (n).

        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4.
        """
        return self.schedule.add_noise(latents, added_noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict."""
        return prediction_target(self.schedule, latents, noise, timesteps)

    def errors(
        self, predicted: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The weighted error of each picture (n), in float32.

        Args:
            mask: (n, 1, height, width), how much each place counts.
        """
        return squared_error(predicted, target, mask)

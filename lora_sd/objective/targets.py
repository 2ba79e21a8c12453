"""What the UNet is asked to predict."""

from diffusers import DDPMScheduler
from torch import Tensor


def prediction_target(
    schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """The noise for an epsilon model, the velocity for a v-prediction model.

    Velocity: Salimans and Ho 2022, "Progressive Distillation", section 4.
    """
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise

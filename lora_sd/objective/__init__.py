"""What the UNet is asked to predict, from what noise, and how far off it is.

| file | |
| --- | --- |
| targets.py | what is predicted |
| timesteps.py | which timestep a picture is shown at |
| noise.py | what noise is added |
| distance.py | how far the prediction is from its target |
| weighting.py | how much each timestep counts |

All are functions of tensors and numbers; `Objective` puts them together.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDPMScheduler
from torch import Size, Tensor

from lora_sd.errors import ConfigError
from lora_sd.objective import noise as noises
from lora_sd.objective import timesteps as distributions
from lora_sd.objective.distance import (
    Distance,
    HuberSchedule,
    absolute_error,
    huber_c_of_timesteps,
    pseudo_huber_error,
    smooth_l1_error,
    squared_error,
)
from lora_sd.objective.targets import prediction_target
from lora_sd.objective.timesteps import Timesteps
from lora_sd.objective.weighting import Weighting, weights_of_timesteps

__all__ = ["Objective", "prediction_target", "squared_error"]


@dataclass(frozen=True)
class Objective:
    """What is asked of the UNet; the default is the plain one.

    Args:
        schedule: the noise schedule, which knows the prediction type.
        weighting, snr_gamma: of timesteps, see weighting.py.
        error, huber_c, huber_schedule: see distance.py.
        noise_offset, multires_noise_iterations, multires_noise_discount, input_perturbation: see
            noise.py.
        timesteps, timestep_bias, logit_mean, logit_deviation: how they are drawn, see timesteps.py.
        min_timestep, max_timestep: the range they are drawn from, both included; None: the last.

    Raises:
        ConfigError: the settings do not fit this schedule.
    """

    schedule: DDPMScheduler
    weighting: Weighting = "none"
    snr_gamma: float = 5.0
    error: Distance = "l2"
    huber_c: float = 0.1
    huber_schedule: HuberSchedule = "snr"
    noise_offset: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = 0.3
    input_perturbation: float = 0.0
    timesteps: Timesteps = "uniform"
    timestep_bias: float = 0.0
    logit_mean: float = 0.0
    logit_deviation: float = 1.0
    min_timestep: int = 0
    max_timestep: int | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ConfigError(problems)

    def draw_timestep(self, draw: torch.Generator) -> int:
        """A timestep for one picture."""
        low, high = self.min_timestep, self._highest
        if self.timesteps == "logit_normal":
            return distributions.logit_normal(
                low, high, self.logit_mean, self.logit_deviation, draw
            )
        if self.timesteps == "biased":
            return distributions.biased(low, high, self.timestep_bias, draw)
        return distributions.uniform(low, high, draw)

    def draw_noise(self, shape: Size, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """(the noise that is the target's, the noise that is added) for one picture's latents
        (channels, height, width); the same tensor where nothing is perturbed."""
        noise = noises.white_noise(shape, draw)
        if self.noise_offset:
            noise = noises.with_offset(noise, self.noise_offset, draw)
        if self.multires_noise_iterations:
            noise = noises.with_coarser(
                noise, self.multires_noise_iterations, self.multires_noise_discount, draw
            )
        if self.input_perturbation:
            return noise, noises.perturbed(noise, self.input_perturbation, draw)
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
        """The weighted error of each picture (n), in float32: what is made small, and what a run
        reports as its loss. Losses of different objectives are not comparable; the validation loss,
        which is the plain objective's for every run, is.

        Args:
            mask: (n, 1, height, width), how much each place counts.
        """
        if self.error == "l2":
            errors = squared_error(predicted, target, mask)
        elif self.error == "l1":
            errors = absolute_error(predicted, target, mask)
        else:
            measure = pseudo_huber_error if self.error == "huber" else smooth_l1_error
            c = self._huber_c.to(timesteps.device)[timesteps]
            errors = measure(predicted, target, c, mask)
        if self._weights is None:
            return errors
        return errors * self._weights.to(timesteps.device)[timesteps]

    @cached_property
    def _weights(self) -> Tensor | None:
        return weights_of_timesteps(self.schedule, self.weighting, self.snr_gamma)

    @cached_property
    def _huber_c(self) -> Tensor:
        return huber_c_of_timesteps(self.schedule, self.huber_c, self.huber_schedule)

    @property
    def _highest(self) -> int:
        last = self.schedule.config.num_train_timesteps - 1
        return last if self.max_timestep is None else self.max_timestep

    def _problems(self) -> list[str]:
        """What cannot be right with this schedule, in sentences."""
        last = self.schedule.config.num_train_timesteps - 1
        for name in ("min_timestep", "max_timestep"):
            if (value := getattr(self, name)) is not None and value > last:
                return [
                    f"objective.{name} is {value}, and the base's last timestep is {last}: set it "
                    f"to {last} or lower."
                ]
        problems = []
        drawn = slice(self.min_timestep, self._highest + 1)
        if self._weights is not None and not self._weights[drawn].isfinite().all():
            problems.append(
                f"objective.weighting '{self.weighting}' divides by the signal-to-noise ratio, "
                f"which is 0 at the base's last timestep: set objective.max_timestep to "
                f"{last - 1}, or choose another weighting."
            )
        has_zero_snr = not self.schedule.alphas_cumprod[-1]
        for name in ("noise_offset", "multires_noise_iterations"):
            if has_zero_snr and getattr(self, name):
                problems.append(
                    f"objective.{name} is not for a base with zero terminal SNR, which learns "
                    f"bright and dark pictures from nothing but white noise: set it to 0."
                )
        return problems

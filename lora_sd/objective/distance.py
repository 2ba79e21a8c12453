"""How far a prediction is from its target: one number for each picture, in float32.

A mask (n, 1, height, width) says how much each place counts, 0 to 1. The mean stays over the whole
picture, so that a small masked part counts as little as it is large (as in kohya's masked loss).

The pseudo-Huber loss is a square where it is small against c and a line where it is large, so that
outliers move it less: Charbonnier et al. 1997, "Deterministic Edge-Preserving Regularization in
Computed Imaging", scaled as in kohya's sd-scripts. That c falls with noise is from Khrapov et al.
2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss".
"""

from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]


def masked_mean(distance: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each picture (n) over all its places, those of a mask counting as it says."""
    return (distance if mask is None else distance * mask).flatten(1).mean(1)


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each picture (n), in float32."""
    return masked_mean(F.mse_loss(prediction.float(), target.float(), reduction="none"), mask)


def absolute_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error of each picture (n), in float32."""
    return masked_mean(F.l1_loss(prediction.float(), target.float(), reduction="none"), mask)


def smooth_l1_error(
    prediction: Tensor, target: Tensor, c: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean of 2 (sqrt(d^2 + c^2) - c) of each picture (n), in float32: d^2 / c, then 2 |d|.

    Args:
        c: (n), above 0.
    """
    c = c.view(-1, *[1] * (prediction.dim() - 1))
    squared = F.mse_loss(prediction.float(), target.float(), reduction="none")
    # The same as above, without a difference of near numbers, which for small d is all rounding.
    return masked_mean(2 * squared / ((squared + c**2).sqrt() + c), mask)


def pseudo_huber_error(
    prediction: Tensor, target: Tensor, c: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean of 2 c (sqrt(d^2 + c^2) - c) of each picture (n), in float32: d^2, then 2 c |d|.

    Args:
        c: (n), above 0.
    """
    return c * smooth_l1_error(prediction, target, c, mask)


def huber_c_of_timesteps(schedule: DDPMScheduler, c: float, by: HuberSchedule) -> Tensor:
    """The c of every timestep (timesteps), in float32 on the CPU.

    'constant': c. 'exponential': from 1 at the first timestep to about c at the last, c^(t / T).
    'snr': near 1 where there is little noise and c in nothing but noise, c + (1 - c) / (1 + s)^2,
    where s is the noise in relation to the picture, 1 / sqrt(SNR). All as kohya's sd-scripts.
    """
    signal = schedule.alphas_cumprod.cpu().double()
    if by == "constant":
        found = torch.full_like(signal, c)
    elif by == "exponential":
        found = torch.tensor(c, dtype=torch.float64) ** (torch.arange(len(signal)) / len(signal))
    else:
        relative_noise = ((1 - signal) / signal).sqrt()  # infinite at SNR 0, which gives c
        found = c + (1 - c) / (1 + relative_noise) ** 2
    return found.to(torch.float32)

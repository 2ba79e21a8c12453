"""How much each timestep's error counts, by its signal-to-noise ratio (SNR).

An error of the picture that a prediction means (x0) is an error of the noise (epsilon) or of the
velocity (v) times a factor: |x0 error|^2 = |epsilon error|^2 / SNR = |v error|^2 / (SNR + 1). So a
weight w of the picture's error is w / SNR under epsilon and w / (SNR + 1) under v, and the same
weighting learns the same from both kinds of base.

| weighting | of the picture's error | under epsilon | under v |
| --- | --- | --- | --- |
| none, epsilon | SNR | 1 | |
| none, v | SNR + 1 | | 1 |
| min_snr | min(SNR, gamma) | min(SNR, gamma) / SNR | min(SNR, gamma) / (SNR + 1) |
| soft_min_snr | SNR gamma / (SNR + gamma) | gamma / (SNR + gamma) | that / (SNR + 1) |
| debiased | sqrt(SNR), 1 | 1 / sqrt(SNR) | 1 / (SNR + 1) |

With zero terminal SNR the last timestep's SNR is 0: under v all weights are finite there (0, 0 and
1), so with min_snr and soft_min_snr that timestep teaches nothing, as their formulas have it. Under
epsilon debiased is infinite there, and `Objective` refuses it.
"""

from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased"]


def snr_of_timesteps(schedule: DDPMScheduler) -> Tensor:
    """The signal-to-noise ratio of every timestep (timesteps), in float64 on the CPU.

    A noisy picture is sqrt(a) picture + sqrt(1 - a) noise, and its SNR a / (1 - a): Kingma et al.
    2021, "Variational Diffusion Models", section 3.1.
    """
    signal = schedule.alphas_cumprod.cpu().double()
    return signal / (1 - signal)


def min_snr(snr: Tensor, gamma: float, predicts_v: bool) -> Tensor:
    """Weights of timesteps by their SNR, the picture's error counting at most gamma.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4;
    for v appendix B, and diffusers' training scripts.
    """
    if predicts_v:
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # not min(snr, gamma) / snr, which is 0 / 0 at SNR 0


def soft_min_snr(snr: Tensor, gamma: float, predicts_v: bool) -> Tensor:
    """Weights of timesteps by their SNR: min_snr without its kink, always a little lower.

    Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass
    Diffusion Transformers", whose 1 / (sigma^2 + 1 / gamma) with sigma^2 = 1 / SNR it is.
    """
    under_epsilon = gamma / (snr + gamma)
    return under_epsilon * snr / (snr + 1) if predicts_v else under_epsilon


def debiased(snr: Tensor, predicts_v: bool) -> Tensor:
    """Weights of timesteps by their SNR, for the picture to be told right from much noise.

    Under epsilon Yu et al. 2023, "Debias the Training of Diffusion Models": from 1 / SNR, which
    makes it the picture's error, the root is taken as these weights differ a hundred-thousandfold
    from first to last. Under v the picture's error itself has weights of a usable range, and no
    root is taken: kohya's sd-scripts, issue 1058 and pull request 1715.
    """
    return 1 / (snr + 1) if predicts_v else 1 / snr.sqrt()


def weights_of_timesteps(
    schedule: DDPMScheduler, weighting: Weighting, gamma: float
) -> Tensor | None:
    """The weight of every timestep (timesteps), in float32 on the CPU; None where all are 1."""
    if weighting == "none":
        return None
    snr = snr_of_timesteps(schedule)
    predicts_v = schedule.config.prediction_type == "v_prediction"
    if weighting == "min_snr":
        weights = min_snr(snr, gamma, predicts_v)
    elif weighting == "soft_min_snr":
        weights = soft_min_snr(snr, gamma, predicts_v)
    else:
        weights = debiased(snr, predicts_v)
    return weights.to(torch.float32)

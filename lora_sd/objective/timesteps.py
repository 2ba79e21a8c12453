"""Which timestep a picture is shown at. 0 has the least noise.

Every function draws one whole number between `low` and `high`, both included. Except for the
uniform one they draw u between 0 and 1, 1 being the noisiest, and cut the range into equal parts.
"""

from typing import Literal

import torch
from torch import Generator

Timesteps = Literal["uniform", "logit_normal", "biased"]


def uniform(low: int, high: int, draw: Generator) -> int:
    """All alike: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1."""
    return int(torch.randint(low, high + 1, (), generator=draw))


def logit_normal(low: int, high: int, mean: float, deviation: float, draw: Generator) -> int:
    """The logit of u is normal: most often in the middle, and never quite at the ends.

    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    section 3.1. A mean above 0 gives more noisy timesteps, as there; in diffusers' script for
    Stable Diffusion 3 it gives fewer, as that one counts them from the noisy end.
    """
    normal = mean + deviation * torch.randn((), generator=draw)
    return _at(float(torch.sigmoid(normal)), low, high)


def biased(low: int, high: int, bias: float, draw: Generator) -> int:
    """The density of u is (1 + b) u^b for a bias b above 0, (1 + b) (1 - u)^b with b = -bias below.

    With 1 the noisiest timestep is the most frequent and the least noisy one never comes, with a
    straight line between; 0 is uniform. The thought is of Mou et al. 2023, "T2I-Adapter", section
    3.4, whose cubic sampling has the density of a power, too, but one that is infinite at its end.
    """
    drawn = float(torch.rand((), generator=draw, dtype=torch.float64))
    u = drawn ** (1 / (1 + abs(bias)))  # the inverse of the distribution u^(1 + b)
    return _at(u if bias >= 0 else 1 - u, low, high)


def _at(u: float, low: int, high: int) -> int:
    count = high - low + 1
    return low + min(int(u * count), count - 1)  # u may have been rounded to 1

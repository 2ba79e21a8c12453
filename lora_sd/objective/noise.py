"""Noise that is more than white. Everything is drawn from the generator that is given, on the CPU,
for one picture's latents (channels, height, width)."""

import torch
from torch import Generator, Size, Tensor
from torch.nn import functional as F


def white_noise(shape: Size, draw: Generator) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=draw)


def with_offset(noise: Tensor, strength: float, draw: Generator) -> Tensor:
    """The noise, each channel of it shifted by one normal number times the strength.

    White noise hides a picture's mean brightness much later than its details, so that a model
    takes it from the noise it starts with: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    return noise + strength * torch.randn(noise.shape[0], 1, 1, generator=draw)


def with_coarser(noise: Tensor, iterations: int, discount: float, draw: Generator) -> Tensor:
    """The noise together with noise of coarser and coarser resolutions, scaled to deviation 1.

    Number i, from 1 on, has sides r^i times shorter, with r drawn anew between 2 and 4, is
    interpolated and counts discount^i; the last is the one with a side of one place. Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training". There and in kohya's sd-scripts a number
    0 adds a second white noise; white noise counts sqrt(2) here for that, so that the same discount
    gives the same noise (and 6 iterations here are 7 there).
    """
    height, width = noise.shape[-2:]
    mixed = 2**0.5 * noise
    for i in range(1, iterations + 1):
        shrinking = float(2 + 2 * torch.rand((), generator=draw)) ** i
        size = max(1, int(height / shrinking)), max(1, int(width / shrinking))
        coarse = torch.randn(1, noise.shape[0], *size, generator=draw)
        finer = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        mixed = mixed + discount**i * finer[0]
        if 1 in size:
            break
    return mixed / mixed.std()


def perturbed(noise: Tensor, strength: float, draw: Generator) -> Tensor:
    """The noise that is added where `noise` is the target's: with more of its own, unseen by it.

    It stands for the errors of earlier steps of drawing: Ning et al. 2023, "Input Perturbation
    Reduces Exposure Bias in Diffusion Models", algorithm 1.
    """
    return noise + strength * torch.randn(noise.shape, generator=draw)

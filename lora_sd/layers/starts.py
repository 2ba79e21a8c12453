"""How `lora_down` starts. `lora_up` starts at zero, so that a fresh adapter changes nothing."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def kaiming(weight: Tensor, rank: int, generator: torch.Generator) -> None:
    """Kaiming uniform with a = sqrt(5), as in loralib and PEFT."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def gaussian(weight: Tensor, rank: int, generator: torch.Generator) -> None:
    """Gaussian with standard deviation 1 / rank."""
    nn.init.normal_(weight, std=1 / rank, generator=generator)


def orthogonal(weight: Tensor, rank: int, generator: torch.Generator) -> None:
    """Orthonormal rows: Saxe et al. 2013, "Exact solutions to the nonlinear dynamics"."""
    nn.init.orthogonal_(weight, generator=generator)


INITS: dict[str, Callable[[Tensor, int, torch.Generator], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}

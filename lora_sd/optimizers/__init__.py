"""Optimizers by name, what each parameter learns at, and how the learning rate moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_sd.optimizers.groups import parameter_groups
from lora_sd.optimizers.schedules import make_schedule

__all__ = ["make_optimizer", "make_schedule", "parameter_groups"]


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], options: Sequence[str], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a name.

    Args:
        groups: parameters with their 'lr' and 'weight_decay', as `parameter_groups` gives them.
        options: further arguments, as NAME=VALUE.

    Raises:
        ConfigError: the package that it is in is not installed, or it has no such argument.
    """
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW([dict(group) for group in groups], fused=fused)

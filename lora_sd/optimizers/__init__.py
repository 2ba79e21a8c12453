"""Optimizers by name, what each parameter learns at, and how the learning rate moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_sd.errors import ConfigError
from lora_sd.optimizers.by_name import kind_of
from lora_sd.optimizers.groups import parameter_groups
from lora_sd.optimizers.max_norm import scale_weight_norms
from lora_sd.optimizers.options import read_options
from lora_sd.optimizers.resumable import Resumable, averages_itself, learning_rates, resumable
from lora_sd.optimizers.schedules import Schedule, make_schedule

__all__ = [
    "Resumable",
    "Schedule",
    "averages_itself",
    "learning_rates",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
    "scale_weight_norms",
]


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], options: Sequence[str], device: torch.device
) -> Resumable:
    """The optimizer of a name.

    Its state goes through `torch.save` and `torch.load(weights_only=True)` and is taken over to the
    bit, whatever the precision of the parameters; what the groups and options say is the present
    settings', not the saved ones'.

    Args:
        name: one of those in `by_name`.
        groups: parameters with their 'lr' and 'weight_decay', as `parameter_groups` gives them.
        options: further arguments, as NAME=VALUE.

    Raises:
        ConfigError: the package that it is in is not installed, or it has no such argument, or
            refuses its value.
    """
    kind = kind_of(name, device)
    try:
        plain = kind.load()
    except ImportError as error:
        extra = "-memory" if kind.source == "torchao" else ""
        raise ConfigError(
            f"'optimizer.name' is {name}, whose package cannot be imported ({error}). Install it "
            f"with `pip install -r requirements{extra}.txt`, or choose adamw."
        ) from error
    given = {**kind.always, **read_options(name, options, plain, kind.elsewhere)}
    optimizer = resumable(plain)
    optimizer.source = kind.source or plain.__module__.partition(".")[0]
    optimizer.settings = frozenset({"name", "lr", "weight_decay", *given})
    try:
        return optimizer([dict(group) for group in groups], **given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"'optimizer.options': {name} does not take {', '.join(options)}: {error}."
        ) from error

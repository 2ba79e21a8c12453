"""How the learning rate moves: a factor on it, as a function of the step."""

from typing import Any

from diffusers.optimization import get_scheduler
from torch.optim import Optimizer


def make_schedule(
    optimizer: Optimizer,
    steps: int,
    *,
    name: str,
    warmup_steps: int,
    floor: float = 0.0,
    cycles: int = 1,
    power: float = 1.0,
    decay_share: float = 0.2,
) -> Any:
    """The schedule of a name over `steps` optimizer steps."""
    return get_scheduler(
        {"constant": "constant_with_warmup"}.get(name, name),
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=steps,
    )

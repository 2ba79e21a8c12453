"""Weights that are averaged over steps: which ones are used, and which ones learn."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from lora_sd.optimizers.resumable import averages_itself


class WeightAverage(EMAModel):
    """An exponential moving average of the trained parameters, in float32.

    At step n it reaches over about the last n^(3/4) steps, as the library's notes advise for runs
    below ten thousand steps, and over 1 / (1 - decay) at most.

    Call `step(parameters)` after each optimizer step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__(parameters, decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        self.to(dtype=torch.float32)  # bfloat16 would round the small changes away

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over; the decay stays the present settings'."""
        super().load_state_dict({**state, "decay": self.decay})


def make_ema(parameters: Sequence[nn.Parameter], decay: float) -> WeightAverage | None:
    """The average that a decay asks for; None for a decay of 0."""
    return WeightAverage(parameters, decay) if decay else None


@contextmanager
def averaged(optimizer: Any, ema: EMAModel | None = None) -> Iterator[None]:
    """Inside, the weights that are to be used are in place: the average's, where there is one,
    which is `ema`'s or a schedule-free optimizer's own. After it the weights that learn are back,
    bit for bit.

    For samples, validation and the result. A checkpoint is saved outside of it: it holds the
    weights that learn, and the average in the states of `optimizer` and `ema`.

    Args:
        optimizer: the optimizer, or accelerate's wrapper of it.
        ema: of the optimizer's parameters in the order of its groups.
    """
    if ema is None and not averages_itself(optimizer):
        yield
        return
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    learning = [one.detach().clone() for one in parameters]
    modes = [group.get("train_mode") for group in optimizer.param_groups]
    try:
        if ema is not None:
            ema.copy_to(parameters)
        else:
            optimizer.eval()
        yield
    finally:
        # Not the optimizer's own way back, which rounds.
        with torch.no_grad():
            torch._foreach_copy_(parameters, learning)
        for group, mode in zip(optimizer.param_groups, modes, strict=True):
            if mode is not None:
                group["train_mode"] = mode

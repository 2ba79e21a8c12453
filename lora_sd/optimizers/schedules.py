"""How the learning rate moves: a factor on it, as a function of the step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer


def factor(
    step: int,
    steps: int,
    *,
    name: str,
    warmup_steps: int = 0,
    floor: float = 0.0,
    cycles: int = 1,
    power: float = 1.0,
    decay_share: float = 0.2,
) -> float:
    """What the learning rate is multiplied by at a step, counted from 0.

    It rises from 0 along a line over `warmup_steps`, and then falls from 1 to `floor`, which it
    reaches at `steps` and keeps. Where the warm-up is as long as the run or longer, it rises to the
    end. Schedules that diffusers' or transformers' `optimization` has too are the same here; to the
    bit, as far as constants and cosines go.

    Args:
        name: 'constant': 1;
            'linear': along a line;
            'cosine': along half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5);
            'cosine_with_restarts': along `cycles` of them, one after the other;
            'polynomial': along the remaining share to the `power`;
            'warmup_stable_decay': 1, and over the last `decay_share` of all steps along 1 minus the
            square root (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond
            Fixed Training Durations", section 3);
            'rex': (1 - p) / (1/2 + (1 - p) / 2) of the progress p (Chen et al. 2021, "REX:
            Revisiting Budgeted Training with an Improved Schedule", section 3).

    Raises:
        KeyError: there is no such schedule.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant":
        return 1.0
    start = warmup_steps
    if name == "warmup_stable_decay":
        start = max(warmup_steps, steps - round(decay_share * steps))
    progress = (step - start) / max(1, steps - start)
    if progress >= 1:
        return floor
    return floor + (1.0 - floor) * FALLS[name](max(0.0, progress), cycles, power)


def _linear(progress: float, cycles: int, power: float) -> float:
    return 1.0 - progress


def _cosine(progress: float, cycles: int, power: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine_with_restarts(progress: float, cycles: int, power: float) -> float:
    return _cosine((cycles * progress) % 1.0, cycles, power)


def _polynomial(progress: float, cycles: int, power: float) -> float:
    return (1.0 - progress) ** power


def _one_minus_root(progress: float, cycles: int, power: float) -> float:
    return 1.0 - math.sqrt(progress)


def _rex(progress: float, cycles: int, power: float) -> float:
    return (1.0 - progress) / (0.5 + 0.5 * (1.0 - progress))


FALLS: dict[str, Callable[[float, int, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "warmup_stable_decay": _one_minus_root,
    "rex": _rex,
}


class Schedule:
    """Moves the learning rates of an optimizer's groups, all by the same factor.

    Its state is the step alone, and how often the rates were halved: the rates that go with it are
    those of the present settings. A resumed run whose settings were changed on purpose, such as to
    more steps, goes on at the rate that a run of these settings has at that step. torch's
    `LambdaLR` would put the saved run's rates back.

    Attributes:
        step_count: optimizer steps since the start of the run.
        scale: a further factor, 1 unless rates were halved.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer = optimizer
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.step_count, self.scale = 0, 1.0
        self._factor = factor
        self._apply()

    def at(self, step: int) -> float:
        """What the learning rates are multiplied by at a step."""
        return self._factor(step) * self.scale

    def step(self) -> None:
        """Go on by one step; after the optimizer's."""
        self.step_count += 1
        self._apply()

    def halve(self) -> None:
        """Halve the learning rates from now to the end of the run."""
        self.scale /= 2
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The present learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step_count, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over, and set the optimizer's rates, which is to be loaded before it."""
        self.step_count, self.scale = state["step"], state["scale"]
        self._apply()

    def _apply(self) -> None:
        now = self.at(self.step_count)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * now


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
) -> Schedule:
    """The schedule of a name over `steps` optimizer steps; `factor` explains it."""
    return Schedule(
        optimizer,
        partial(
            factor,
            steps=steps,
            name=name,
            warmup_steps=warmup_steps,
            floor=floor,
            cycles=cycles,
            power=power,
            decay_share=decay_share,
        ),
    )


def warmup_note(steps: int, warmup_steps: int) -> str:
    """The sentence about a warm-up that the run is too short for; '' where it is long enough."""
    if warmup_steps < steps:
        return ""
    reached = (steps - 1) / warmup_steps
    return (
        f"The warm-up of {warmup_steps} steps is as long as the run of {steps} or longer: the "
        f"learning rate only rises, to {reached:.0%} of what is set. Lower optimizer.warmup_steps."
    )

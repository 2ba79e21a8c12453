"""Sides that take turns, and what their turns say: clocks, medians and spreads."""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

Given = TypeVar("Given")


@dataclass(frozen=True)
class Spread:
    """A median, and between what the middle half of the rounds lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value from each round; of fewer than four, the lowest and the highest."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times what theirs took mine took, in the rounds that both have."""
    return Spread.of([one / other for one, other in zip(mine, theirs, strict=False)])


def now(device: str) -> float:
    """Seconds: on the CPU of this process's processor time, on a GPU when all of it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    sides: Mapping[str, Callable[[], Given]],
    rounds: int,
    warm_up: int = 1,
    once: Collection[str] = (),
) -> dict[str, list[Given]]:
    """What each side gives in each round; who begins a round ends the next.

    Garbage is collected between rounds only.

    Args:
        sides: by name, what a turn is.
        warm_up: rounds beforehand, for nothing.
        once: those that take part in the first round alone.
    """
    given: dict[str, list[Given]] = {name: [] for name in sides}
    names = list(sides)
    gc.disable()
    try:
        for number in range(-warm_up, rounds):
            gc.collect()
            for name in names:
                if number > 0 and name in once:
                    continue
                value = sides[name]()
                if number >= 0:
                    given[name].append(value)
            names = names[1:] + names[:1]
    finally:
        gc.enable()
    return given

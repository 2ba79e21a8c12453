"""Which picture is seen when: a function of the seed and the step alone.

An epoch shows every item as often as was promised. Its order is shuffled, then packed so that a
step's pictures are of one bucket wherever that is possible: they can run as one batch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from lora_sd.data.repeats import showing_rates
from lora_sd.randomness import generator


@dataclass(frozen=True, slots=True)
class Seen:
    """One showing of an item; `count` is how many times the run has shown it before."""

    item: int
    epoch: int
    count: int


class Order:
    """The endless stream of epochs, cut into steps.

    Args:
        buckets: of each item, what must be equal for two to run in one batch.
        repeats: of each item, how many times an epoch shows it. 0.5 is every other epoch.
        is_prior: of each item, whether it is for prior preservation: the repeats of these are
            scaled so that all together are shown as often as all others together.
        step_pictures: items of one optimizer step.

    Raises:
        ValueError: there is nothing but prior items.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        repeats: Sequence[float],
        is_prior: Sequence[bool],
        step_pictures: int,
        seed: int,
    ) -> None:
        self.step_pictures = step_pictures
        self.seed = seed
        numbers = {bucket: number for number, bucket in enumerate(dict.fromkeys(buckets))}
        self._bucket = np.array([numbers[bucket] for bucket in buckets], dtype=np.int64)
        self._groups = _groups(repeats, is_prior, seed)
        self._rate = sum((len(items) * rate for rate, items in self._groups), Fraction(0))
        if not self._rate:
            raise ValueError("nothing to learn: there are no items, or prior ones only")
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def step(self, step: int) -> list[Seen]:
        """What a step shows: `step_pictures` items, of two or more epochs where one ends."""
        seen: list[Seen] = []
        position = step * self.step_pictures
        end = position + self.step_pictures
        while position < end:
            epoch = self._epoch_at(position)
            start = self.epoch_start(epoch)
            items, counts = self._packed(epoch)
            part = slice(position - start, end - start)
            pairs = zip(items[part].tolist(), counts[part].tolist(), strict=True)
            seen += [Seen(item, epoch, count) for item, count in pairs]
            position = start + min(len(items), end - start)
        return seen

    def epoch_size(self, epoch: int) -> int:
        """How many showings an epoch has."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    @property
    def mean_epoch_size(self) -> float:
        """How many showings an epoch has in the mean; below 1 where repeats are small."""
        return float(self._rate)

    def epoch_start(self, epoch: int) -> int:
        """How many showings all epochs before it have."""
        return sum(int(len(items) * epoch * rate) for rate, items in self._groups)

    def _epoch_at(self, position: int) -> int:
        """The epoch that holds a position of the stream."""
        epoch = int(position / self._rate)
        while self.epoch_start(epoch) > position:
            epoch -= 1
        while self.epoch_start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _shown_before(self, epoch: int) -> np.ndarray:
        """How many times the epochs before have shown each item: floor(epoch * repeats + phase).

        The phases of n items with the same repeats are 0/n, 1/n ... (n-1)/n, so that an epoch's
        share of them has the same size, to one item, in every epoch (Hermite's identity).
        """
        shown = np.zeros(len(self._bucket), dtype=np.int64)
        for rate, items in self._groups:
            whole, part = divmod(epoch * rate, 1)
            shown[items] = int(whole)
            shown[items[len(items) - int(len(items) * part) :]] += 1
        return shown

    def _packed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(items, counts) of an epoch, in order."""
        if self._epoch is None or self._epoch[0] != epoch:
            before = self._shown_before(epoch)
            times = self._shown_before(epoch + 1) - before
            items = self._pack(np.repeat(np.arange(len(times)), times), epoch)
            counts = before[items] + _earlier(items)
            self._epoch = epoch, items, counts
        return self._epoch[1:]

    def _pack(self, items: np.ndarray, epoch: int) -> np.ndarray:
        """Shuffle an epoch's showings, and put them in order so that each step has one bucket.

        The epoch begins and ends within a step. Between, every bucket's showings fill as many whole
        steps as they can; what is left of all of them, bucket by bucket, fills the ends and the
        other steps. So no more steps are mixed than there are buckets, besides the two ends.
        """
        draw = generator(self.seed, "order", epoch)

        def shuffled(length: int) -> np.ndarray:
            return torch.randperm(length, generator=draw).numpy()

        size = self.step_pictures
        head = min(-self.epoch_start(epoch) % size, len(items))
        steps = (len(items) - head) // size
        items = items[shuffled(len(items))]
        bucket = shuffled(int(self._bucket.max()) + 1)[self._bucket[items]]
        items = items[np.argsort(bucket, kind="stable")]
        each = np.split(items, np.cumsum(np.bincount(bucket))[:-1])
        pure = np.concatenate([one[: len(one) // size * size] for one in each]).reshape(-1, size)
        rest = [one[len(one) // size * size :] for one in each]
        # The ends may want a pure step's showings, too.
        mixed = np.concatenate([*rest, pure[steps:].flatten()])
        missing = max(0, steps - len(pure)) * size
        whole = np.concatenate([pure[:steps], mixed[head : head + missing].reshape(-1, size)])
        whole = whole[shuffled(steps)]
        return np.concatenate([mixed[:head], whole.flatten(), mixed[head + missing :]])


def _groups(
    repeats: Sequence[float], is_prior: Sequence[bool], seed: int
) -> list[tuple[Fraction, np.ndarray]]:
    """Items of the same repeats: (how often an epoch shows each, the items in order of phase)."""
    members: dict[tuple[Fraction, bool], list[int]] = {}
    for item, rate in enumerate(showing_rates(repeats, is_prior)):
        members.setdefault((rate, is_prior[item]), []).append(item)
    groups = []
    for number, ((rate, _), items) in enumerate(members.items()):
        # Neighbours in a folder are alike: they shall not take turns all at once.
        turns = torch.randperm(len(items), generator=generator(seed, "phase", number)).numpy()
        groups.append((rate, np.array(items, dtype=np.int64)[turns]))
    return groups


def _earlier(items: np.ndarray) -> np.ndarray:
    """For each place, how many earlier places hold the same item."""
    order = np.argsort(items, kind="stable")
    ordered = items[order]
    earlier = np.empty(len(items), dtype=np.int64)
    earlier[order] = np.arange(len(items)) - np.searchsorted(ordered, ordered, side="left")
    return earlier

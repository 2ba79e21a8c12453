"""Which settings fit which graphics card: what is changed first, second, ... until all fits.

The order is that in which a run out of memory steps down (`out_of_memory`), and goes on where that
cannot: what costs nothing but time comes first, what changes numbers later, what is learnt last.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lora_sd.plan.prediction import LOADING, Phase
from lora_sd.plan.setting import Setting

CARDS_GB = (6, 8, 12, 16, 24)
GIB = 2**30
CONTEXT_BYTES = 600_000_000
"""Assumed: CUDA's context and cuDNN's workspaces, which no tensor is."""
SLACK = 1.05
"""Assumed: what the allocator holds beyond the tensors, for its rounding and its gaps."""

Predict = Callable[[Setting], Iterable[Phase]]


@dataclass(frozen=True)
class Card:
    """A graphics card, and how the run fits.

    Attributes:
        gb: its memory, in GiB as makers count it.
        fits: whether any of the settings that are tried does.
        changes: what is changed for that, in words; empty: as set.
        flags: the same as flags of the trainer.
        highest: bytes that the run then takes, with what is assumed of CUDA.
        phase: when that is.
    """

    gb: float
    fits: bool
    changes: tuple[str, ...]
    flags: Mapping[str, str]
    highest: int
    phase: str


@dataclass(frozen=True)
class Step:
    """One way to train that takes less than the one before."""

    setting: Setting
    changes: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)

    def then(self, what: str, flags: Mapping[str, str], **changed: object) -> "Step":
        """The same with one thing more changed."""
        setting = replace(self.setting, **changed)  # type: ignore[arg-type]
        return Step(setting, (*self.changes, what), {**self.flags, **flags})


def steps_down(setting: Setting, accumulation: int = 1, tile_px: int = 0) -> list[Step]:
    """Ways to train, each with less memory than the one before; the first is as set.

    Args:
        accumulation: passes of a step, as set.
        tile_px: the side of a tile of the VAE's.
    """
    steps = [Step(setting)]

    def add(what: str, flags: Mapping[str, str], **changed: object) -> None:
        steps.append(steps[-1].then(what, flags, **changed))

    if not setting.gradient_checkpointing:
        add(
            "gradient checkpointing",
            {"memory.gradient_checkpointing": ""},
            gradient_checkpointing=True,
        )
    if setting.batch_size > 1:
        passes = setting.batch_size * accumulation
        add(
            f"batches of 1, {passes} to a step",
            {"train.batch_size": "1", "train.gradient_accumulation": str(passes)},
            batch_size=1,
            adds_up=True,
        )
    if setting.dtype == torch.float32:
        add("the base in bfloat16", {"base.dtype": "bfloat16"}, dtype=torch.bfloat16)
    if not setting.slices_vae and tile_px < max(*setting.size_px, *(setting.sample_px or (0, 0))):
        add("the VAE in tiles", {"memory.vae_slicing": ""}, slices_vae=True)
    if setting.options.dora == "off":
        for bits in ("int8", "nf4"):
            if setting.base_weights == "full" or (setting.base_weights, bits) == ("int8", "nf4"):
                add(
                    f"the base's weights in {bits}",
                    {"memory.base_weights": bits},
                    base_weights=bits,
                )
    attention = tuple(plan for plan in setting.plans if ".attn" in plan.name)
    if 0 < len(attention) < len(setting.plans):
        add("adapting attention only", {"adapter.preset": "attention"}, plans=attention)
    return steps


def fit_cards(
    setting: Setting,
    accumulation: int,
    predict: Predict,
    tile_px: int,
    cards_gb: Sequence[float] = CARDS_GB,
) -> list[Card]:
    """For each card the first of `steps_down` that fits it.

    Args:
        accumulation, tile_px: as of `steps_down`.
        predict: the phases of a setting, one by one: it is asked only for as many as it takes.
    """
    steps = steps_down(setting, accumulation, tile_px)
    known = [_Lazy(predict, step.setting) for step in steps]
    found, first = [], 0
    for gb in sorted(cards_gb, reverse=True):
        for first in range(first, len(steps)):  # noqa: B020 (what no larger card fits, this does not)
            too_much = known[first].above(gb * GIB)
            if too_much is None or _is_final(too_much, known[first].setting):
                break
        highest = too_much or known[first].highest()
        step, taken = steps[first], with_overhead(highest.total)
        found.append(Card(gb, too_much is None, step.changes, step.flags, taken, highest.name))
    return found[::-1]


def _is_final(phase: Phase, setting: Setting) -> bool:
    """Whether no later step makes that phase smaller: the base is always loaded whole."""
    return phase.name == LOADING and setting.dtype != torch.float32


class _Lazy:
    """The phases of a setting, as many as were asked for."""

    def __init__(self, predict: Predict, setting: Setting) -> None:
        self._coming: Iterator[Phase] | None = None
        self._predict, self.setting = predict, setting
        self._known: list[Phase] = []

    def above(self, limit: float) -> Phase | None:
        """The first phase that takes more than a limit."""
        for phase in self._all():
            if with_overhead(phase.total) > limit:
                return phase
        return None

    def highest(self) -> Phase:
        """The phase that takes most."""
        return max(self._all(), key=lambda phase: phase.total)

    def _all(self) -> Iterator[Phase]:
        yield from self._known
        if self._coming is None:
            self._coming = iter(self._predict(self.setting))
        for phase in self._coming:
            self._known.append(phase)
            yield phase


def with_overhead(tensors: int) -> int:
    """What a GPU is asked for by a process with so many bytes of tensors: an assumption."""
    return int(tensors * SLACK) + CONTEXT_BYTES

"""The plan of a run, as plain values."""

from dataclasses import dataclass

from lora_sd.plan.cards import Card
from lora_sd.plan.measurement import Measured
from lora_sd.plan.prediction import TRAINING, Phase

ASSUMED = (
    "Memory is said of tensors. A GPU wants more: CUDA's context and workspaces, taken for 0.6 GB, "
    "and what its allocator holds in gaps, taken for 5 %; both are in the figures for cards, and "
    "were not measured.",
    "A step is taken for one with pictures of the largest size; smaller ones take less.",
)


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        device: it is planned for: 'cuda', 'cpu' or 'mps'.
        size_px: (width, height) of the largest pictures.
        pictures, epoch: how many there are, and how many an epoch shows; None: not known.
        layers, parameters: that are adapted, and that learn.
        phases: memory by part of the run, from shapes.
        measured: a real step; None where none was done.
        adapter_bytes, checkpoint_bytes: of the result's file, and of one checkpoint on disk.
        checkpoints: how many are kept.
        encoded_bytes: of the encoded pictures on disk.
        cards: how the run fits graphics cards.
        notices: sentences on what is not known.
    """

    base: str
    device: str
    size_px: tuple[int, int]
    batch_size: int
    gradient_accumulation: int
    steps: int
    pictures: int | None
    epoch: float | None
    layers: int
    parameters: int
    phases: tuple[Phase, ...]
    measured: Measured | None
    adapter_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    encoded_bytes: int
    cards: tuple[Card, ...]
    notices: tuple[str, ...]

    @property
    def pictures_seen(self) -> int:
        """Showings of pictures in the whole run, of one process."""
        return self.steps * self.batch_size * self.gradient_accumulation

    @property
    def epochs(self) -> float | None:
        """How often the run goes through the pictures; None: not known."""
        return self.pictures_seen / self.epoch if self.epoch else None

    @property
    def highest(self) -> Phase:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def training(self) -> Phase:
        """The phase that was measured."""
        return next(phase for phase in self.phases if phase.name == TRAINING)

    @property
    def time_s(self) -> float | None:
        """Seconds of all steps, without encoding, samples and saving; None: not measured."""
        if self.measured is None:
            return None
        return self.measured.pass_s * self.gradient_accumulation * self.steps

"""What all tabs work on: the folder of all runs, the pictures offered, the trainer, its
queue."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_sd.ui.bases import MODELS
from lora_sd.ui.launch import Trainer
from lora_sd.ui.queue import RunQueue


@dataclass(frozen=True)
class Workplace:
    """Handed to every tab's handlers.

    Args:
        outputs: the folder of all runs.
        pictures: a folder whose folders of pictures are offered beside the example and the saved
            data sets.
        trainer: the one trainer of `outputs`.
        models: a folder whose checkpoints are offered as base models.
        queue: the runs that wait for it.
    """

    outputs: Path
    pictures: Path | None
    trainer: Trainer
    models: Path = MODELS
    queue: RunQueue = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "queue", RunQueue(self.trainer))

"""What all tabs work on: the folder of all runs, the pictures offered, the trainer."""

from dataclasses import dataclass
from pathlib import Path

from lora_sd.ui.launch import Trainer


@dataclass(frozen=True)
class Workplace:
    """Handed to every tab's handlers.

    Args:
        outputs: the folder of all runs.
        pictures: a folder whose folders of pictures are offered beside the example and the saved
            data sets.
        trainer: the one trainer of `outputs`.
    """

    outputs: Path
    pictures: Path | None
    trainer: Trainer

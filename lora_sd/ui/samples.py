"""The sample pictures of a run as the page shows them: each beside the base's of the same prompt,
seed and settings."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_sd.run_folder import RunFolder
from lora_sd.ui.show import enlarged


@dataclass(frozen=True)
class Sample:
    """A sample picture.

    Attributes:
        asked: all that the picture depends on but for the adapter.
        base: the base's picture of the same; None where there is none, and for the base's own.
    """

    file: Path
    prompt: str
    asked: str
    base: Path | None = None

    def stamp(self) -> tuple[str, int]:
        """Changes when the file does."""
        return str(self.file), self.file.stat().st_mtime_ns


def sample_steps(run: RunFolder) -> list[int]:
    """The steps that have samples, in their order; 0 has the base's."""
    found = (file.stem.split("_")[1] for file in run.sample_files())
    return sorted({int(step) for step in found if step.isdecimal()})


def samples_at(run: RunFolder, step: int) -> list[Sample]:
    """The samples of a step, a prompt each; a file that is still being written is left out."""
    of_base = {one.asked: one.file for one in _read(run, 0)}
    if step == 0:
        return _read(run, 0)
    return [
        Sample(one.file, one.prompt, one.asked, of_base.get(one.asked)) for one in _read(run, step)
    ]


def same_asked(one: Sequence[Sample], other: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Samples of two runs that were asked for alike."""
    there = {sample.asked: sample for sample in other}
    return [(sample, there[sample.asked]) for sample in one if sample.asked in there]


def nearest(steps: Sequence[int], wanted: float | None) -> int | None:
    """The step of those there are that is nearest to the wanted one; the last for None."""
    if not steps:
        return None
    return steps[-1] if wanted is None else min(steps, key=lambda step: abs(step - wanted))


def slider(steps: Sequence[int]) -> dict[str, Any]:
    """The bounds of a slider over steps. It begins at 0 always: Gradio refuses, with a toast, a
    value that was right for the bounds before."""
    return {"minimum": 0, "maximum": max([*steps, 1]), "step": math.gcd(*steps) or 1}


def shown_picture(file: Path) -> Image.Image:
    """A sample, large enough to look at.

    Raises:
        OSError, SyntaxError: it cannot be read, perhaps not yet.
    """
    with Image.open(file) as picture:
        return enlarged(picture.convert("RGB"))


def _read(run: RunFolder, step: int) -> list[Sample]:
    found = []
    stem = run.sample_file(step, 0).stem.rpartition("_")[0]
    for file in sorted(run.samples.glob(f"{stem}_*.png")):
        try:
            with Image.open(file) as picture:
                text = str(picture.info.get("lora_sd", ""))
        except (OSError, SyntaxError):
            continue
        try:
            settings = json.loads(text)
            asked = {k: v for k, v in settings.items() if k not in ("adapter", "scale")}
            found.append(Sample(file, str(settings["prompt"]), json.dumps(asked, sort_keys=True)))
        except (ValueError, LookupError, AttributeError):
            found.append(Sample(file, "", file.stem.rpartition("_")[2]))
    return found

"""Curves and samples for TensorBoard and Weights & Biases, beside what every run writes itself.

metrics.jsonl and samples/ are the record of a run; these are copies for other programs to show. So
nothing that goes wrong with them ends a run: it is logged once, and that tracker is off from then.
"""

import importlib.util
import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lora_sd import durable
from lora_sd.errors import ConfigError
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")
FLUSH_S = 10
WANDB_ID = "lora_sd_id.txt"


def check_trackers(tensorboard: bool, wandb_project: str | None) -> None:
    """Whether what the settings ask for is installed.

    Raises:
        ConfigError: with what to install.
    """
    problems = [
        f"'{setting}' needs the package {package}, which is not installed: "
        f"`pip install {package}`, or {otherwise}."
        for setting, package, wanted, otherwise in (
            ("output.tensorboard", "tensorboard", tensorboard, "set it to false"),
            ("output.wandb", "wandb", bool(wandb_project), "leave it empty"),
        )
        if wanted and not _is_installed(package)
    ]
    if problems:
        raise ConfigError(problems)


class Tracker(Protocol):
    """One place that curves and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        """PNGs of a step."""

    def flush(self) -> None:
        """Have all that was given on the disk, or on its way."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Writes event files.

    Args:
        folder: where to.
        step: where the run stands; what was written of later steps is forgotten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_S)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        for file in files:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"samples/{_place(file)}", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Sends to Weights & Biases. A run that goes on is the same run there, by an id that lies in
    its folder; steps that it has been given already it passes over itself.

    Args:
        folder: of the run; wandb's own files go into its wandb/.
        settings: what the run was started with, to be shown there.
    """

    def __init__(self, project: str, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            id=_stable_id(folder / "wandb" / WANDB_ID),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        shown = {}
        for file in files:
            with Image.open(file) as picture:
                prompt = str(picture.info.get("prompt", ""))
            shown[f"samples/{_place(file)}"] = self._wandb.Image(str(file), caption=prompt)
        self._run.log(shown, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All the trackers of a run; none in processes other than the main one.

    Args:
        step: where the run stands: 0, or the step that it goes on from.
        settings: for Weights & Biases, without anything private.
    """

    def __init__(
        self,
        run: RunFolder,
        step: int,
        *,
        is_main: bool,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._on: dict[str, Tracker] = {}
        if not is_main:
            return
        if tensorboard:
            self._start("TensorBoard", lambda: TensorBoard(run.path / "tensorboard", step))
        if wandb_project:
            self._start(
                "Weights & Biases",
                lambda: WandB(wandb_project, run.name, run.path, settings or {}),
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics; numbers in dicts are named 'outer/inner', and what is no finite number
        is left out."""
        flat = dict(_flat(values))
        self._each(lambda tracker: tracker.scalars(step, flat))

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        """The sample pictures of a step."""
        if files:
            self._each(lambda tracker: tracker.pictures(step, files))

    def flush(self) -> None:
        """To be called at each checkpoint, so that no curve has a gap where a run goes on."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """The run is over."""
        self._each(lambda tracker: tracker.close())
        self._on = {}

    def _start(self, name: str, start: Callable[[], Tracker]) -> None:
        self._guard(name, lambda: self._on.__setitem__(name, start()))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._on.items()):
            self._guard(name, partial(act, tracker))

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._on.pop(name, None)
            log.warning(
                "Note: %s has failed and is off for the rest of this run, which goes on: %s: %s",
                name, type(error).__name__, error,
            )  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif f"{prefix}{name}" == "step":
            continue
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _place(file: Path) -> str:
    """'03' of 'step_000100_03.png'."""
    return file.stem.rpartition("_")[2]


def _stable_id(file: Path) -> str:
    """The id in a file, which is made where there is none."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        made = uuid.uuid4().hex[:16]
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(file, made + "\n")
        return made


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

"""The loss on held-out pictures, with noise and timesteps that stay the same, against the base's.

The loss of a single picture at a single timestep differs far more from the next one's than an
adapter changes it. So every measurement uses the same pictures, noise and timesteps, and is paired:
what counts is how far each picture's loss lies below the one that the base alone has on it.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_sd import inject
from lora_sd.base_model import BaseModel
from lora_sd.data.findings import counted
from lora_sd.data.training_data import VALIDATION_TIMES, Batch, TrainingData
from lora_sd.errors import ConfigError, UserError
from lora_sd.formats import save_adapter
from lora_sd.formats.safetensors_file import read_header
from lora_sd.objective import Objective
from lora_sd.out_of_memory import is_out_of_memory
from lora_sd.text_encoding import TextEmbedding
from lora_sd.train_step import errors_of

log = logging.getLogger("lora_sd")
BEST_STEP, BEST_LOSS = "lora_sd.best_step", "lora_sd.validation_loss"
CLEAR = 2.0
"""Standard errors from which a difference is called one."""


def check_validation(has_pictures: bool, keep_best: bool, patience: int) -> None:
    """Whether the settings that want validation pictures have some.

    Raises:
        ConfigError: they have none.
    """
    wanting = [
        name
        for name, wants in (("train.keep_best", keep_best), ("train.patience", patience > 0))
        if wants
    ]
    if wanting and not has_pictures:
        raise ConfigError(
            f"'{' and '.join(wanting)}' {'goes' if len(wanting) == 1 else 'go'} by the loss on "
            f"validation pictures, and no folder holds any. Put some pictures that are not trained "
            f"on into a folder of their own, name it under data.folders with kind: validation, or "
            f"leave {'it' if len(wanting) == 1 else 'them'} off."
        )


@dataclass(frozen=True)
class Paired:
    """A measurement beside the base's.

    Attributes:
        loss, base: mean squared error, whatever the run's own objective is; the base's.
        gain: by how much the loss lies below the base's.
        gain_error: the standard error of the gain over pictures; None for a single picture.
    """

    loss: float
    base: float
    gain: float
    gain_error: float | None

    @classmethod
    def of(cls, errors: Tensor, base: Tensor, pictures: Sequence[int]) -> "Paired":
        """Compare errors (views, timesteps) with the base's.

        Args:
            pictures: the number of the picture that each view shows; views of one picture at
                several resolutions are no independent evidence.
        """
        gains: dict[int, list[float]] = {}
        for picture, gain in zip(pictures, (base - errors).mean(1).tolist(), strict=True):
            gains.setdefault(picture, []).append(gain)
        each = torch.tensor([sum(some) / len(some) for some in gains.values()], dtype=torch.float64)
        error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else None
        loss, of_base = float(errors.mean()), float(base.mean())
        return cls(loss, of_base, of_base - loss, error)

    def metrics(self) -> dict[str, float]:
        """By the names that they have in the metrics."""
        found = {
            "validation_loss": self.loss,
            "validation_base": self.base,
            "validation_gain": self.gain,
            "validation_gain_error": self.gain_error,
        }
        return {name: value for name, value in found.items() if value is not None}

    def sentence(self) -> str:
        """'0.1234, which is 0.0066 (standard error 0.0012) below the base's'."""
        side = "below" if self.gain >= 0 else "above"
        if self.gain_error is None:
            return f"{self.loss:.4f}, which is {abs(self.gain):.4f} {side} the base's"
        error = f"standard error {self.gain_error:.4f}"
        if not abs(self.gain) > CLEAR * self.gain_error:
            return (
                f"{self.loss:.4f}, not clearly apart from the base's, which is {self.base:.4f} "
                f"({abs(self.gain):.4f} {'better' if self.gain >= 0 else 'worse'}, {error})"
            )
        return f"{self.loss:.4f}, which is {abs(self.gain):.4f} ({error}) {side} the base's"


@dataclass(frozen=True)
class BestFile:
    """Where and how the best adapter is kept.

    Attributes:
        dtype, format: as of the result.
        describe: the metadata of the run.
    """

    path: Path
    dtype: torch.dtype
    format: str
    describe: Callable[[], dict[str, str]]

    def loss(self) -> float:
        """What the file says of itself; infinity where there is none."""
        try:
            return float(read_header(self.path).metadata[BEST_LOSS])
        except (UserError, LookupError, ValueError):
            return math.inf

    def write(self, base: BaseModel, step: int, loss: float) -> None:
        """Replace the file by the adapter as it is now, whole or not at all."""
        adapter = inject.collect(base.components)
        adapter.metadata = {
            **self.describe(),
            "ss_steps": str(step),
            BEST_STEP: str(step),
            BEST_LOSS: repr(loss),
        }
        save_adapter(adapter, self.path, self.dtype, self.format)


class Validation:
    """Measures the validation loss, keeps the best adapter, and knows when it is time to end.

    All processes measure a share and know the whole, so that they decide alike. Its state goes into
    checkpoints: a run that goes on decides as if it had not been interrupted.

    Args:
        batch_size: most samples of one pass: what fits in training fits here.
        best: keep the adapter with the lowest loss so far; None: do not.
        patience: the run is over after so many measurements without a new lowest loss; 0: never.
        about: changes with all that the base's loss depends on: pictures, base, precision. Losses
            that were measured under another one are forgotten.
        beat: called after each pass, for a sign of life.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        max_tokens: int,
        accelerator: Accelerator,
        *,
        batch_size: int,
        best: BestFile | None = None,
        patience: int = 0,
        about: str = "",
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._base, self._data, self._accelerator = base, data, accelerator
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self._best, self._patience = best, patience
        self._about, self._beat = about, beat
        numbers: dict[Path, int] = {}
        self._pictures = [
            numbers.setdefault(Path(view.picture.file), len(numbers)) for view in data.held_out
        ]
        self._of_base: Tensor | None = None
        self._lowest, self._lowest_step, self._kept = math.inf, 0, math.inf
        self._since_lowest = 0

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self._since_lowest

    def measure_base(self) -> None:
        """Measure the base's loss, unless it is known, and say it in the log."""
        if self._of_base is not None:
            return
        # At scale 0 the layers give the base's output to the bit, whatever was learnt.
        inject.set_scale(self._base.components, 0.0)
        try:
            self._of_base = self._errors()
        finally:
            inject.set_scale(self._base.components, 1.0)
        pictures = counted(len(set(self._pictures)), "picture")
        log.info("Validation loss of the base: %.4f (%s).", float(self._of_base.mean()), pictures)

    def measure(self, step: int) -> dict[str, float]:
        """Measure the loss after `step`, and act upon it: the best adapter is written, and the log
        says how it stands; the numbers for the metrics."""
        self.measure_base()
        assert self._of_base is not None
        paired = Paired.of(self._errors(), self._of_base, self._pictures)
        is_lowest = paired.loss < self._lowest  # never where it is no number
        if is_lowest:
            self._lowest, self._lowest_step, self._since_lowest = paired.loss, step, 0
        else:
            self._since_lowest += 1
        log.info(
            "Validation loss at step %d: %s%s.",
            step, paired.sentence(), "; the lowest so far" if is_lowest else "",
        )  # fmt: skip
        if self._best is not None and paired.loss < self._kept:
            self._keep(self._best, step, paired.loss)
        if self.is_over:
            log.info("%s", self.why_over())
        return paired.metrics()

    def why_over(self) -> str:
        """A sentence on why the run ends before its last step."""
        return (
            f"The validation loss has not fallen below {self._lowest:.4f}, that of step "
            f"{self._lowest_step}, for {counted(self._since_lowest, 'validation')}: the run ends "
            f"early (train.patience)."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to know; plain values."""
        return {
            "about": self._about,
            "of_base": None if self._of_base is None else self._of_base.tolist(),
            "lowest": self._lowest,
            "lowest_step": self._lowest_step,
            "since_lowest": self._since_lowest,
            "kept": self._kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a better adapter that was kept since stays the best."""
        if state["about"] != self._about:
            log.warning(
                "Note: validation begins anew, as its pictures, the base or the precision changed."
            )
            return
        of_base = state["of_base"]
        self._of_base = None if of_base is None else torch.tensor(of_base, dtype=torch.float64)
        self._lowest, self._lowest_step = state["lowest"], state["lowest_step"]
        self._since_lowest, self._kept = state["since_lowest"], state["kept"]
        if self._best is not None:
            self._kept = min(self._kept, self._best.loss())

    def _keep(self, best: BestFile, step: int, loss: float) -> None:
        """Write the best adapter; a disk that is full is no reason to end a run."""
        try:
            if self._accelerator.is_main_process:
                best.write(self._base, step, loss)
            self._kept = loss
        except UserError as error:
            log.warning("The best adapter so far could not be kept. %s", " ".join(error.problems))

    @torch.no_grad()
    def _errors(self) -> Tensor:
        """The error of every view at every timestep (views, timesteps), in float64 on the CPU, the
        same in all processes."""
        self._base.eval()
        accelerator, device = self._accelerator, self._base.device
        plain = Objective(self._base.noise_schedule())
        found = torch.zeros(len(self._pictures) * VALIDATION_TIMES, device=device)
        for number, (places, batch) in enumerate(self._data.held_out_batches(self._batch_size)):
            # Batches are the same however many processes share them, and so are the numbers.
            if number % accelerator.num_processes == accelerator.process_index:
                found[places] = self._errors_of(plain, batch).float()
                self._beat()
        if accelerator.num_processes > 1:
            found = accelerator.reduce(found, "sum")  # of numbers and zeros: exact
        return found.cpu().double().view(-1, VALIDATION_TIMES)

    def _errors_of(self, objective: Objective, batch: Batch) -> Tensor:
        """The errors of a batch; where memory does not suffice for it, one by one."""
        try:
            with self._accelerator.autocast():
                return errors_of(
                    self._base, objective, batch.to(self._base.device), self._max_tokens
                )
        except Exception as error:
            if len(batch.names) == 1 or not is_out_of_memory(error):
                raise
        # Only now, when the exception has let go of what was computed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return torch.cat([self._errors_of(objective, one) for one in _one_by_one(batch)])


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    for number in range(len(batch.names)):
        own = slice(number, number + 1)
        parts: dict[str, Any] = {
            name: None if value is None else value[own]
            for name, value in vars(batch).items()
            if name != "text"
        }
        text = batch.text
        if text is not None:
            pooled = None if text.pooled is None else text.pooled[own]
            text = TextEmbedding(text.hidden[own], pooled)
        yield Batch(**parts, text=text)

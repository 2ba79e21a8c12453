"""Memory that runs out in training: known for what it is, stepped down from, or told with advice.

In one process a step that runs out is done again with less: gradient checkpointing first, then
batches of half the size, again and again. Neither changes what is seen or learned, but for rounding
(and for what is dropped at random, which is drawn for each batch). With several processes there is
no stepping down: the others are in the midst of adding up gradients with the one that failed, and
cannot be asked to begin the step again.
"""

import contextlib
import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_sd.errors import OutOfMemory, UserError, shown_size

if TYPE_CHECKING:
    from lora_sd.base_model import BaseModel
    from lora_sd.config import Config
    from lora_sd.train_step import TrainStep

log = logging.getLogger("lora_sd")
SIGNS = (
    "out of memory",  # CUDA, ROCm, Apple's MPS, XPU
    "can't allocate memory",  # the CPU's allocator on Linux
    "not enough memory",  # on Windows
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)
USUAL = (
    "What takes less: --memory.gradient_checkpointing, then a smaller train.batch_size with as "
    "much more train.gradient_accumulation, then memory.base_weights int8. `python -m lora_sd "
    "plan` says what fits."
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory has run out."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def let_go(error: BaseException, parameters: Sequence[nn.Parameter] = ()) -> None:
    """Free what a failed step holds: what its functions were working with, and the gradients."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error = following
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def step_down(worker: "TrainStep", base: "BaseModel") -> str | None:
    """Let the next step take less memory; what was done, as a sentence; None: nothing is left."""
    if not base.unet.is_gradient_checkpointing:
        base.enable_gradient_checkpointing()
        return "gradient checkpointing is on from here: less memory, about a third more time"
    if worker.batch_size > 1:
        worker.batch_size //= 2
        return f"from here at most {worker.batch_size} pictures go through a pass, in more passes"
    return None


class SteppingDown:
    """A `TrainStep` whose steps are done again with less where memory runs out.

    Args:
        parameters: what learns.
        steps_down: whether that is wanted; else a step that runs out ends the run.
        save: saves a checkpoint of where the run stands. The step that failed has changed nothing.
        advise: sentences on what would fit.
    """

    def __init__(
        self,
        worker: "TrainStep",
        parameters: Sequence[nn.Parameter],
        *,
        steps_down: bool,
        save: Callable[[], None],
        advise: Callable[[], list[str]],
    ) -> None:
        self._worker, self._parameters = worker, parameters
        self._steps_down, self._save, self._advise = steps_down, save, advise
        self._base, self._stepped = worker.base, 0

    def state_dict(self) -> dict[str, Any]:
        """How often it was stepped down, so that a run that goes on is the same."""
        return {"steps": self._stepped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Step down as often."""
        while self._stepped < state["steps"] and (said := step_down(self._worker, self._base)):
            self._stepped += 1
            log.info("Memory has run out before: %s.", said)

    def gradients(self, step: int) -> tuple[float, list[str]]:
        """As `TrainStep.gradients`.

        Raises:
            OutOfMemory: nothing is left to step down to, or it is not wanted; a checkpoint has
                been saved, in one process.
        """
        while True:
            failed = self._try(step)
            if not isinstance(failed, str):
                return failed
            alone = self._worker.accelerator.num_processes == 1
            said = None
            if alone and self._steps_down:
                said = step_down(self._worker, self._base)
                self._stepped += said is not None
            if said is None:
                kept = "What was saved before is whole."
                if alone:
                    self._save()
                    kept = f"Step {step} is saved."
                raise OutOfMemory(
                    [f"Memory ran out in step {step + 1}: {failed}. {kept}", *self._advise()]
                )
            log.warning("Memory ran out in step %d, which is done again: %s.", step + 1, said)

    def _try(self, step: int) -> tuple[float, list[str]] | str:
        """The step's result, or why there is none."""
        try:
            return self._worker.gradients(step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error, self._parameters)
            return first_line(error)


@contextlib.contextmanager
def told(advise: Callable[[], list[str]]) -> Iterator[None]:
    """Memory that runs out inside is told as a sentence, with advice: while the base is loaded,
    pictures are encoded, or the optimizer makes its states.

    Raises:
        OutOfMemory: it ran out.
    """
    failed = None
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        failed = first_line(error)
    if failed is not None:
        kept = "What was saved before is whole."
        raise OutOfMemory([f"Memory ran out: {failed}. {kept}", *advise()])


def first_line(error: BaseException) -> str:
    """What an error says, without its second thoughts."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition(". ")[0].rstrip(".")


def advice(config: "Config", device: torch.device) -> list[str]:
    """Sentences on which settings would fit what there is, from the run's plan by shapes; never an
    error."""
    try:
        return _advice(config, device)
    except Exception:  # whatever it is, it is not what the user is to be told now
        log.debug("No plan could be made.", exc_info=True)
        return [USUAL]


def _advice(config: "Config", device: torch.device) -> list[str]:
    from lora_sd.plan import make_plan
    from lora_sd.plan.cards import GIB

    if device.type != "cuda":
        return [USUAL]
    has = torch.cuda.get_device_properties(device).total_memory
    plan = make_plan(config, measured=False, device="cuda", cards_gb=(has / GIB,))
    card = plan.cards[0]
    wanted = f"By its plan the run takes {shown_size(plan.highest.total)} of tensors at most"
    there = f"({plan.highest.name}), and the GPU has {shown_size(has)}"
    if not card.fits:
        return [
            f"{wanted} {there}. No change of settings that keeps the pictures' size would fit it: "
            f"{' + '.join(card.changes) or 'as set'} still takes {shown_size(card.highest)}. Lower "
            f"data.resolution_px, or choose a smaller base."
        ]
    if not card.changes:
        return [f"{wanted} {there}, which should do: another program may be using it.", USUAL]
    flags = " ".join(f"--{name} {value}".rstrip() for name, value in card.flags.items())
    return [f"{wanted} {there}. {shown_size(card.highest)} would do with {flags}"]

"""Loss, gradient and weights that are no finite numbers: noticed within their step, never saved,
and told with the picture that they come from and the likely cause."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from lora_sd.data.training_data import Batch
from lora_sd.errors import BadNumbers, shown_list
from lora_sd.optimizers import Schedule
from lora_sd.train_step import TrainStep, errors_of

log = logging.getLogger("lora_sd")
MOST_SKIPPED = 20  # a scaler that starts at 65536 and halves finds a loss scale in fewer steps
MOST_HALVINGS = 5


@dataclass(frozen=True)
class Cause:
    """Where numbers that are not finite come from.

    Attributes:
        text: sentences on it, with what to do.
        names: of the pictures.
        slower_helps: whether a lower learning rate may help.
    """

    text: str
    names: tuple[str, ...] = ()
    slower_helps: bool = False


class FoundBadNumbers(BadNumbers):
    """What `NumbersGuard` raises, and `NumbersGuard.after` deals with.

    Attributes:
        keeps_weights: whether the adapter is still as it was after the step before.
        slower_helps: whether a lower learning rate may help.
    """

    def __init__(self, text: str, keeps_weights: bool, slower_helps: bool) -> None:
        super().__init__(text)
        self.keeps_weights, self.slower_helps = keeps_weights, slower_helps


class NumbersGuard:
    """Watches the numbers of a run. It has a state, so that a resumed run counts on.

    Args:
        parameters: what learns.
        accelerator: whose scaler, where it has one, skips steps of too large gradients by itself.
        schedule: of the learning rate.
        halves: whether a run goes on at half the learning rate, rather than stop.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        accelerator: Accelerator,
        schedule: Schedule,
        halves: bool,
    ) -> None:
        self._parameters, self._accelerator = parameters, accelerator
        self._schedule, self._halves = schedule, halves
        self._skipped = self._skipped_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """How often the scaler has skipped a step. The schedule keeps how often it was halved."""
        return {"skipped": self._skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Count on from a state."""
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def check(
        self, worker: TrainStep, step: int, loss: float, grad_norm: float, bad: Sequence[str]
    ) -> None:
        """Look at a step's loss and gradient before they change anything.

        Args:
            step: steps done before this one.
            loss, grad_norm: of all processes.
            bad: this process's pictures whose error is not finite.

        Raises:
            FoundBadNumbers: one of them is not finite, or too many steps in a row were skipped.
        """
        if torch.isfinite(torch.tensor([loss, grad_norm])).all():
            self._skipped_in_a_row = 0
            return
        scaler = self._accelerator.scaler
        if scaler is not None and torch.isfinite(torch.tensor(loss)):
            self._skip(step, scaler.get_scale())
            return
        cause = self._gathered(find_cause(worker, step, self._parameters, bad))
        what = f"The loss became {loss}"
        if torch.isfinite(torch.tensor(loss)):
            what = f"The gradient became {grad_norm}, at a loss of {loss:.4g},"
        raise FoundBadNumbers(
            f"{what} at step {step + 1}, and nothing was learned from that step. {cause.text}",
            keeps_weights=are_finite(self._parameters),
            slower_helps=cause.slower_helps,
        )

    def _skip(self, step: int, scale: float) -> None:
        """Count a step that the scaler is about to skip."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise FoundBadNumbers(
                f"{MOST_SKIPPED} steps in a row, up to step {step + 1}, had gradients that float16 "
                f"does not hold, down to a loss scale of {scale:g}, and nothing was learned from "
                f"them. Set train.mixed_precision to bf16, or to no; or lower "
                f"optimizer.learning_rate.",
                keeps_weights=are_finite(self._parameters),
                slower_helps=True,
            )
        log.warning(
            "Step %d is skipped: float16 does not hold its gradient at a loss scale of %g. That is "
            "usual now and then; skipped so far: %d.",
            step + 1, scale, self._skipped,
        )  # fmt: skip

    def check_weights(self, step: int) -> None:
        """Look at the adapter after an optimizer step.

        Args:
            step: steps done before this one.

        Raises:
            FoundBadNumbers: a weight is not finite.
        """
        if not are_finite(self._parameters):
            raise FoundBadNumbers(
                f"The optimizer made weights of the adapter that are no finite numbers at step "
                f"{step + 1}; they are not saved. Lower optimizer.learning_rate.",
                keeps_weights=False,
                slower_helps=True,
            )

    def told(self) -> dict[str, float]:
        """What the metrics of a step say of it: nothing, where nothing was wrong."""
        said: dict[str, float] = {}
        if self._schedule.scale != 1:
            said["learning_rate_factor"] = self._schedule.scale
        if self._skipped:
            said["skipped_steps"] = self._skipped
        return said

    def after(
        self,
        error: FoundBadNumbers,
        step: int,
        save: Callable[[], None],
        go_back: Callable[[], int],
    ) -> int:
        """What a run does about it: go back and on at half the learning rate, or end.

        A run that is killed meanwhile comes here again, and does the same.

        Args:
            step: steps done.
            save: save a checkpoint of `step`.
            go_back: put the run back to its newest checkpoint, and tell that one's step.

        Returns:
            The step to go on from.

        Raises:
            FoundBadNumbers: `error`, when the run is to end; the last good weights are saved.
        """
        scale = self._schedule.scale / 2
        if not self._halves or not error.slower_helps or scale < 0.5**MOST_HALVINGS:
            if error.keeps_weights and step:
                log.error("%s", error)
                save()
                error.problems[-1] += f" The weights of step {step} are saved."
            else:
                error.problems[-1] += " What was saved before is whole."
            raise error
        for parameter in self._parameters:
            parameter.grad = None
        scaler = self._accelerator.scaler
        if scaler is not None and error.keeps_weights:
            scaler.update()  # or it holds this step's gradient to be scaled back already
        step = go_back()
        while self._schedule.scale > scale:
            self._schedule.halve()
        log.warning("Note: %s", error)
        log.warning(
            "Note: the run goes on from step %d with %g of its learning rate; %g at the least.",
            step, scale, 0.5**MOST_HALVINGS,
        )  # fmt: skip
        return step

    def _gathered(self, cause: Cause) -> Cause:
        """The cause that this process found, or another where the picture is that one's."""
        if self._accelerator.num_processes == 1:
            return cause
        causes: list[Cause] = gather_object([cause])
        return next((one for one in causes if one.names), causes[0])


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number is finite; at the cost of one pass over them."""
    if not tensors:
        return True
    tensors = [one.detach() for one in tensors]
    # Two to three times as fast as `isfinite` of each, but squares of large numbers overflow.
    if torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all():
        return True
    return all(bool(torch.isfinite(one).all()) for one in tensors)


# --- where they come from ---


def find_cause(
    worker: TrainStep, step: int, parameters: Sequence[nn.Parameter], bad: Sequence[str]
) -> Cause:
    """Find what makes a step's loss or gradient not finite, by doing its pictures one by one.

    It takes a step's time, and changes nothing: neither gradients nor what is drawn later.

    Args:
        bad: the pictures whose error is not finite; none: the gradient alone is not.
    """
    if not are_finite(parameters):
        return Cause(
            "The adapter's weights are no finite numbers: lower optimizer.learning_rate.",
            slower_helps=True,
        )
    world, rank = worker.accelerator.num_processes, worker.accelerator.process_index
    # One of several sizes and passes at a time, in the order of the step.
    batches = worker.data.batches(step, 1, world, rank)
    suspects = [batch for batch in batches if not bad or batch.names[0] in bad]
    spoiled = {batch.names[0]: batch for batch in suspects if not _is_fine(worker, batch)}
    names = tuple(dict.fromkeys([*bad, *spoiled]))
    who = f"It comes from {shown_list(names)}" if names else "It comes from no picture alone"
    for batch in suspects:  # what goes in, first
        inside = _wrong_input(worker, batch)
        if inside:
            return Cause(f"{who}: {inside}", names)
    layer = _broken_base_layer(worker)
    if layer:
        return Cause(
            f"{who}: the base model's layer '{layer}' holds numbers that are not finite. Its file "
            f"is damaged: get it again.",
            names,
        )
    if worker.accelerator.mixed_precision == "fp16" and all(
        _is_fine(worker, batch, in_float32=True) for batch in spoiled.values()
    ):
        return Cause(
            f"{who}: float16 does not hold what the model computes there. Set "
            f"train.mixed_precision to bf16, or to no.",
            names,
        )
    more = ""
    if worker.base.unet.dtype == torch.float16:
        more = " Or float16 is too narrow for this base: set base.dtype to bfloat16 or float32."
    return Cause(
        f"{who}: the adapter's weights have most likely grown too large, since the pictures' "
        f"latents, the captions and the base model are finite. Lower optimizer.learning_rate."
        f"{more}",
        names,
        slower_helps=True,
    )


def _wrong_input(worker: TrainStep, batch: Batch) -> str:
    """What of a picture is not finite before the model sees it; '' where all is."""
    if not are_finite([batch.latents]):
        return (
            "its encoded latents hold numbers that are not finite. Delete the cache "
            "(data.cache_folder), so that it is encoded again, or leave the picture out."
        )
    with torch.no_grad():
        text = batch.text or worker.base.encode_tokens(
            worker.base.tokens(batch.captions, worker.max_tokens)
        )
    if not are_finite([text.hidden, *([] if text.pooled is None else [text.pooled])]):
        return (
            f"its encoded caption '{batch.captions[0][:60]}' holds numbers that are not finite. "
            f"Delete the cache (data.cache_folder), so that it is encoded again; where that does "
            f"not help, the base's text encoder is damaged or base.dtype too narrow for it."
        )
    noise = [batch.noise, batch.added_noise, batch.weights]
    if not are_finite(noise if batch.mask is None else [*noise, batch.mask]):
        return "its noise, mask or weight is not finite: look at the settings of its folder."
    return ""


def _is_fine(worker: TrainStep, batch: Batch, in_float32: bool = False) -> bool:
    """Whether a picture's error and the gradient of it are finite.

    Args:
        in_float32: compute in the adapter's own precision, whatever was asked for.
    """
    learned = [
        parameter
        for component in worker.base.components.values()
        for parameter in component.parameters()
        if parameter.requires_grad
    ]
    batch = batch.to(worker.accelerator.device)
    with worker.accelerator.autocast() if not in_float32 else _float32(worker):
        errors = errors_of(worker.base, worker.objective, batch, worker.max_tokens)
    gradients = torch.autograd.grad(errors.sum(), learned, allow_unused=True)
    return are_finite([errors, *(one for one in gradients if one is not None)])


def _float32(worker: TrainStep) -> torch.autocast:
    return torch.autocast(worker.accelerator.device.type, enabled=False)


def _broken_base_layer(worker: TrainStep) -> str:
    """The first layer of the base in use that holds a number that is not finite, or ''."""
    for part, component in worker.base.components.items():
        for name, weight in component.named_parameters():
            plain = weight.dtype.is_floating_point and weight.device.type != "meta"
            if weight.requires_grad or not plain or type(weight) is not nn.Parameter:
                continue  # what learns, is let go or is kept in a few bits
            if not torch.isfinite(weight).all():
                return f"{part}.{name.rpartition('.')[0].removesuffix('.base')}"
    return ""

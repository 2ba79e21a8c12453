"""One step of training: the gradients of all its pictures, batch by batch."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_sd.base_model import BaseModel
from lora_sd.data.training_data import Batch, TrainingData
from lora_sd.objective import Objective
from lora_sd.randomness import seed_at


def errors_of(
    base: BaseModel,
    objective: Objective,
    batch: Batch,
    max_tokens: int,
    unet: nn.Module | None = None,
    encoders: Sequence[nn.Module] | None = None,
) -> Tensor:
    """The error of each picture of a batch (n), where its mask counts.

    Args:
        unet, encoders: stand in for the base's own.
    """
    text = batch.text
    if text is None:  # not encoded beforehand
        text = base.encode_tokens(base.tokens(batch.captions, max_tokens), encoders)
    noisy = objective.noisy(batch.latents, batch.added_noise, batch.timesteps)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    predicted = base.predict(noisy, batch.timesteps, text, batch.time_ids, unet)
    return objective.errors(predicted, target, batch.timesteps, batch.mask)


@dataclass
class TrainStep:
    """Works through the pictures of a step.

    Attributes:
        unet, encoders: the trained models, or DDP's wrappers around them.
        batch_size: most pictures of one forward and backward pass; it may be lowered between
            steps, which changes nothing but the memory that is wanted.
    """

    base: BaseModel
    objective: Objective
    data: TrainingData
    accelerator: Accelerator
    unet: nn.Module
    encoders: Sequence[nn.Module]
    batch_size: int
    max_tokens: int
    seed: int
    trains_text: bool

    def share(self) -> None:
        """Wrap what learns, so that several processes share its gradients."""
        if self.accelerator.num_processes > 1:
            self.unet = self._shared(self.unet)
            self.encoders = [self._shared(encoder) for encoder in self.encoders]

    def _shared(self, model: nn.Module) -> nn.Module:
        learns = any(parameter.requires_grad for parameter in model.parameters())
        # DDP refuses what does not learn.
        return self.accelerator.prepare_model(model) if learns else model

    def gradients(self, step: int) -> tuple[float, list[str]]:
        """Add up the gradients of a step; (its loss, the pictures whose error is no number).

        The loss is that of all processes, the pictures are this one's.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        world, rank = accelerator.num_processes, accelerator.process_index
        _set_mode(self.base.unet, True)
        for encoder in self.base.text_encoders:
            _set_mode(encoder, self.trains_text)
        total = torch.zeros((), device=device)
        seen: list[tuple[list[str], Tensor]] = []
        batches = self.data.batches(step, self.batch_size, world, rank)
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            # For the adapter's dropouts, and those that a base may have of its own.
            torch.manual_seed(seed_at(self.seed, "dropout", step, number, rank))
            with contextlib.ExitStack() as stack:
                if number < len(batches) - 1:
                    for model in (self.unet, *self.encoders):
                        stack.enter_context(accelerator.no_sync(model))
                with accelerator.autocast():
                    errors = errors_of(
                        self.base, self.objective, batch, self.max_tokens, self.unet, self.encoders
                    )
                loss = (errors * batch.weights).sum()
                # Processes' gradients are averaged, and here they are parts of a sum.
                accelerator.backward(loss * world)
            total += loss.detach()
            seen.append((batch.names, errors.detach()))
        loss_value = float(accelerator.reduce(total, "sum"))
        if loss_value == loss_value and abs(loss_value) != float("inf"):
            return loss_value, []
        bad = [
            name
            for names, errors in seen
            for name, error in zip(names, errors.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(error))
        ]
        return loss_value, bad


def _set_mode(model: nn.Module, training: bool) -> None:
    """Put a model into training mode or out of it; where it is, that would visit every module."""
    if model.training != training:
        model.train(training)

"""The loss on held-out pictures, with noise and timesteps that stay the same."""

import torch
from accelerate import Accelerator

from lora_sd.base_model import BaseModel
from lora_sd.data.training_data import TrainingData
from lora_sd.objective import Objective
from lora_sd.train_step import errors_of


@torch.no_grad()
def validation_loss(
    base: BaseModel, data: TrainingData, max_tokens: int, accelerator: Accelerator
) -> float:
    """The mean squared error on the validation pictures, whatever the run's own objective is."""
    base.eval()
    plain = Objective(base.noise_schedule())
    with accelerator.autocast():
        found = [
            float(errors_of(base, plain, batch.to(base.device), max_tokens).mean())
            for batch in data.held_out_batches()
        ]
    return sum(found) / len(found)

"""Convolutions laid out with the channels last in memory, as GPUs' tensor cores read them."""

import torch
from torch import nn

from lora_sd.layers import LoRALayer


@torch.no_grad()
def use_channels_last(*models: nn.Module) -> None:
    """Lay out the convolutions of models, of adapters in them too; what they compute follows by
    itself, and differs by rounding alone.

    Parameters stay the same objects. A part that was let go comes back in the same layout.
    """
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.to(memory_format=torch.channels_last)
            if isinstance(module, LoRALayer):
                for name in ("down_start", "up_start"):
                    start = getattr(module, name)
                    if start is not None and start.dim() == 4:
                        setattr(module, name, start.to(memory_format=torch.channels_last))

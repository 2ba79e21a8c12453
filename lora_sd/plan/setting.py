"""What the memory of a run depends on, as plain values."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_sd.layer_choice import LayerPlan
from lora_sd.layers import LayerOptions


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        size_px: (width, height) of the largest pictures.
        batch_size: pictures of a pass.
        adds_up: whether a step has several passes, whose gradients add up.
        plans, options: the adapted layers, and how they are made.
        optimizer: its name.
        dtype: of the frozen base.
        base_weights: 'full', or in how many bits the UNet's frozen linear layers are kept.
        adapter_dtype: of what learns.
        autocast: the dtype of mixed precision, or None.
        like_cuda: whether a GPU of NVIDIA's computes.
        text: whether texts are encoded before training ('cached'), in each pass by frozen encoders
            ('frozen'), or by encoders that learn ('trained').
        max_tokens: of a caption.
        ema: whether a moving average of the adapter is kept.
        keeps_idle_parts: whether VAE and encoders stay where they are when they are not used.
        slices_vae: whether the VAE works in slices and tiles.
        validates: whether the loss on validation pictures is measured.
        sample_px: (width, height) of sample pictures, or None for none.
        samples: how many are drawn.
        draws_grid: whether the grid of scales is drawn at the end.
    """

    size_px: tuple[int, int]
    batch_size: int
    adds_up: bool
    plans: tuple[LayerPlan, ...]
    options: LayerOptions
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float32
    base_weights: Literal["full", "int8", "fp8", "nf4"] = "full"
    adapter_dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    like_cuda: bool = False
    gradient_checkpointing: bool = False
    text: Literal["cached", "frozen", "trained"] = "cached"
    max_tokens: int = 75
    ema: bool = False
    keeps_idle_parts: bool = False
    slices_vae: bool = False
    validates: bool = False
    sample_px: tuple[int, int] | None = None
    samples: int = 0
    draws_grid: bool = False

"""What memory and speed a run is to have: base weights in few bits, the adapter's precision,
layouts, attention, compilation, parts that wait elsewhere.

`check` says what cannot be had together, before anything is loaded; `apply` sets it all up, once
the adapter is attached and before it learns or a checkpoint is loaded into it.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lora_sd.errors import ConfigError, shown_size

if TYPE_CHECKING:
    from lora_sd.base_model import BaseModel
    from lora_sd.layers import LoRALayer

FP8_IN_TRITON = (8, 9)  # compute capability: Ada and Hopper


def check(
    device: torch.device,
    mixed_precision: str,
    *,
    base_weights: str = "full",
    adapter_dtype: str = "float32",
    compile: bool = False,
    dora: str = "off",
    module_dropout: float = 0.0,
) -> None:
    """Find what these settings cannot do together, or not on this machine.

    Args:
        mixed_precision: as it will be: 'no', 'fp16' or 'bf16'.

    Raises:
        ConfigError: all problems, at once.
    """
    problems = []
    if base_weights != "full":
        if importlib.util.find_spec("torchao") is None:
            problems.append(
                f"'memory.base_weights' is {base_weights}, which needs torchao: "
                f"pip install -r requirements-memory.txt."
            )
        if dora != "off":
            problems.append(
                f"'adapter.dora' learns the norms of the base's own weights, and "
                f"'memory.base_weights' is {base_weights}, which rounds them: set one of the two "
                f"back (dora: off, or base_weights: full)."
            )
        if base_weights == "fp8" and device.type == "mps":
            problems.append(
                "'memory.base_weights' is fp8, which Apple's GPUs do not have: use int8 or nf4."
            )
    if adapter_dtype == "bfloat16" and mixed_precision == "fp16":
        problems.append(
            "'memory.adapter_dtype' is bfloat16, and with 'train.mixed_precision' fp16 gradients "
            "are scaled, which wants a float32 adapter: set adapter_dtype to float32, or "
            "mixed_precision to bf16."
        )
    if compile:
        from lora_sd.memory.compilation import why_not_compile

        if reason := why_not_compile(device):
            problems.append(
                f"'memory.compile' is on, and torch.compile does not work here: {reason}. Turn it "
                f"off, or install what is missing (on the CPU a C++ compiler such as g++)."
            )
        elif (
            base_weights == "fp8"
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) < FP8_IN_TRITON
        ):
            problems.append(
                "'memory.compile' cannot compile base_weights fp8 for this GPU, which has no such "
                "numbers: use int8, or leave compile off."
            )
        if module_dropout:
            problems.append(
                "'memory.compile' cannot compile 'adapter.module_dropout', which decides at each "
                "layer whether it takes part: use dropout or rank_dropout, or leave compile off."
            )
    if problems:
        raise ConfigError(problems)


def apply(
    base: "BaseModel",
    layers: Mapping[str, "LoRALayer"],
    *,
    base_weights: str = "full",
    adapter_dtype: str = "float32",
    channels_last: bool = False,
    compile: bool = False,
    attention_slicing: bool = False,
    vae_slicing: bool = False,
    idle_parts: str = "release",
) -> list[str]:
    """Set a base model and the adapter attached to it up; sentences for the log.

    Before an optimizer is made, or a checkpoint loaded: parameters change their dtype. All of it
    is the same to the bit each time, so that a resumed run goes on with the same weights.
    """
    from lora_sd.memory import attention, compilation, layouts, quantization

    told = []
    base.idle.way = idle_parts
    if base_weights != "full":
        before = quantization.weight_bytes(base.unet)
        done, left = quantization.quantize(base.unet, base_weights)
        after = quantization.weight_bytes(base.unet)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        rest = f" ({left} have no form for it and stay)" if left else ""
        told.append(
            f"{done} linear layers of the UNet are kept in {base_weights}{rest}, convolutions as "
            f"they are: its weights take {shown_size(after)} instead of {shown_size(before)}."
        )
    for layer in layers.values():
        layer.set_dtype(getattr(torch, adapter_dtype))
    attention.use_attention(base.unet, attention_slicing)
    if attention_slicing:
        told.append(
            "Attention is computed head by head, and scaled-dot-product attention is off, which is "
            "quicker and, in training, keeps several times less: leave memory.attention_slicing "
            "off unless that fails."
        )
    if vae_slicing:
        attention.slice_vae(base.vae)
    if channels_last:
        layouts.use_channels_last(base.unet, base.vae)
    if compile:
        count = compilation.compile_blocks(base.unet)
        told.append(f"{count} blocks of the UNet are compiled in the first steps.")
    return told

"""torch.compile for the UNet in training, block by block.

The blocks that repeat are compiled, not the whole: a tenth of the time at the start, and most of
the gain, as what is between them is little. Their modules stay what they are: no name changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
MOST_VARIANTS = 512  # of one block's code: widths, picture sizes, with and without an adapter


def compile_blocks(unet: nn.Module, backend: str = "inductor") -> int:
    """Compile the repeated blocks of a UNet when they are first used in training; how many.

    Validation and drawing go on as they are: they come with other batches, without gradient and at
    other scales of the adapter, and each of these would be compiled anew.

    A second picture size compiles once more, for any size then; further ones do not.
    """
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        limits: Any = torch._dynamo.config
        setattr(limits, name, max(getattr(limits, name), MOST_VARIANTS))
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(backend=backend)
        block._compiled_call_impl = _in_training(block, block._compiled_call_impl)
    return len(blocks)


def _in_training(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(block.forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_trained = block.training and torch.is_grad_enabled()
        return (compiled if is_trained else block._call_impl)(*args, **kwargs)

    return call


@functools.cache
def why_not_compile(device: torch.device) -> str:
    """Why torch.compile does not work on a device, as the end of a sentence; '' when it does.

    It is tried: a missing C++ compiler, missing headers or a missing triton all show. Seconds.
    """
    try:
        double = torch.compile(lambda x: x * 2 + 1)
        double(torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers raise
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ""

"""The fast path of an adapted layer: fewer and cheaper operations where nothing special is asked.

With x the input (rows for places), W (out, in) the frozen weight, D = lora_down, U = lora_up, r the
rank and s = scale * scaling, a linear layer is

    y = x W^T + b + s (x D^T) U^T  =  x (W + s U D)^T + b

and a convolution the same, with `*` for the products with W and D, as U is 1 x 1. It is computed

by rank    as on the left. The update is added into the base's output in place, and the factor s
           goes into that same operation, or into U, which is small. The update costs 3 r (in + out)
           multiplications a place, forward and backward, in thin matrices.
by weight  as on the right: r in out multiplications, whatever the number of places. But autograd
           finds the factors' gradients by way of W's, which is in * out multiplications a place. So
           it is for layers of few channels where there are gradients, and for all with many places
           where there are none (`pays_by_weight`); and on the CPU in full precision alone, since
           W + s U D in bfloat16, or in a GPU's TF32, would round most of the update away.

Both ways a fresh layer, U = 0, returns the base's output to the last bit: W + 0 = W, y + 0 = y.
Outputs and gradients are the plain path's but for rounding; `LoRALayer.forward` is the plain path.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_BREAK_EVEN = 6
DRAWING_BREAK_EVEN = 1.5
"""Measured on one CPU core at ranks 4 to 16, with the UNets of the embedded base and of SD 1.5."""


def adapted(base: Any, x: Tensor, down: Tensor, up: Tensor, factor: float) -> Tensor | None:
    """base(x) + factor * up(down(x)); None where there is no fast path.

    There is one for plain linear layers and convolutions without groups, which do no more than
    their own forward, where all is in one precision or in autocast's.
    """
    if not is_plain(base):
        return None
    weight, bias = base.weight, base.bias
    dtype = common_precision(x, weight, down, up)
    if dtype is None:
        return None
    is_linear = type(base) is nn.Linear
    if pays_by_weight(x, weight, down, up, dtype):
        whole = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=factor)
        if is_linear:
            return F.linear(x, whole, bias)
        out: Tensor = base._conv_forward(x, whole.view_as(weight), bias)
        return out
    if not x.dtype == up.dtype == dtype:
        x, up = x.to(dtype), up.to(dtype)
    if is_linear:
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, weight, bias)
        return out.addmm_(F.linear(rows, down), up.T, alpha=factor).view(*x.shape[:-1], -1)
    hidden = base._conv_forward(x, down, None)
    out = base._conv_forward(x, weight, bias)
    return out.add_(F.conv2d(hidden, up if factor == 1 else up * factor))


def is_plain(base: Any) -> bool:
    """Whether calling a layer is its own forward and nothing else."""
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return False
    return type(base) is nn.Linear or type(base) is nn.Conv2d and base.groups == 1


def common_precision(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> torch.dtype | None:
    """What a layer computes in, or None where several precisions meet."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype if x.dtype == weight.dtype == down.dtype == up.dtype else None
    narrow = torch.get_autocast_dtype(device)
    given = {x.dtype, weight.dtype, down.dtype, up.dtype}
    return narrow if given <= {narrow, torch.float32} else None


def pays_by_weight(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype) -> bool:
    """Whether the update is better added to the weight than to the output.

    Where the factors learn: where the weight is no more than `LEARNING_BREAK_EVEN` times as large
    as they are (thin products run at half the speed), and smaller than the input. Where they do
    not: where by rank takes `DRAWING_BREAK_EVEN` times the multiplications.
    """
    if not x.is_cpu or dtype not in (torch.float32, torch.float64):
        return False
    factors, size = down.numel() + up.numel(), weight.numel()
    if torch.is_grad_enabled() and (down.requires_grad or up.requires_grad):
        return size < x.numel() and size <= LEARNING_BREAK_EVEN * factors
    places = x.numel() / weight.shape[1]
    return DRAWING_BREAK_EVEN * size * len(down) <= places * factors

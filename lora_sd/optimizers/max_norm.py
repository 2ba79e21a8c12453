"""Keep each layer's update from growing beyond a norm."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_sd.layers import LoRALayer


@torch.no_grad()
def scale_weight_norms(layers: Iterable[LoRALayer], max_norm: float) -> int:
    """Scale each update whose Frobenius norm is above `max_norm` down to it, after a step.

    kohya's `scale_weight_norms`: both factors are multiplied by the root of the ratio, so that
    the update, scaling * up @ down, is multiplied by the ratio. An up-bias and DoRA's magnitude are
    left as they are: the norm is that of what the factors add to the weight.

    Returns:
        How many layers were scaled. Reading it is the one time that a GPU is waited for.

    Raises:
        ValueError: PiSSA, whose update is a difference of two products: scaling the factors would
            not scale it, and would take away from the base.
    """
    ratios = []
    for layer in layers:
        if layer.down_start is not None:
            raise ValueError("the norm of PiSSA's update cannot be kept by scaling its factors")
        ratio = max_norm / update_norm(layer).clamp(min=max_norm)
        layer.lora_down.weight.mul_(ratio.sqrt())
        layer.lora_up.weight.mul_(ratio.sqrt())
        ratios.append(ratio)
    return int((torch.stack(ratios) < 1).sum()) if ratios else 0


def update_norm(layer: LoRALayer) -> Tensor:
    """The Frobenius norm of scaling * up @ down, without the product: a number, in float32.

    |U D|^2 = trace(D^T U^T U D) = sum of (U^T U) * (D D^T): matrices of the rank's size. A grouped
    convolution is as many products side by side.
    """
    down, up = layer.lora_down.weight.float(), layer.lora_up.weight.float()
    width = up.shape[1]
    groups = down.shape[0] // width
    ups, downs = up.reshape(groups, -1, width), down.reshape(groups, width, -1)
    square = ((ups.mT @ ups) * (downs @ downs.mT)).sum()
    return square.clamp(min=0).sqrt() * layer.scaling

"""Frozen linear layers in few bits, of shapes alone: `memory.quantization` without numbers."""

import math

import torch
from torch import Size, Tensor, nn

from lora_sd.memory.quantization import (
    BLOCK,
    SCALES_BLOCK,
    LinearOfPacked,
    QuantizedLinear,
    plain_linears,
)


class ShapedQuantizedLinear(QuantizedLinear):
    """A `QuantizedLinear` on the meta device.

    Args:
        autocast: the dtype of mixed precision, or None: the meta device cannot be asked for it.
    """

    def __init__(self, linear: nn.Linear, kind: str, autocast: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype, self.autocast = kind, linear.weight.dtype, autocast
        self.register_parameter("bias", linear.bias)
        for name, (shape, dtype) in kept(kind, linear.weight.shape).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = x if self.autocast is None else x.to(self.autocast)
        out: Tensor = LinearOfPacked.apply(
            x, self.bias, self.kind, self.weight_shape, *self._packed()
        )
        return out


def kept(kind: str, weight_shape: Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is kept of a weight, by name."""
    if kind != "nf4":
        numbers = torch.int8 if kind == "int8" else torch.uint8
        return {
            "numbers": (tuple(weight_shape), numbers),
            "row_scale": ((weight_shape[0], 1), torch.float32),
        }
    size = math.prod(weight_shape)
    scales = size // BLOCK
    return {
        "numbers": ((size // 2,), torch.uint8),
        "scales": ((scales,), torch.int8),
        "scales_factor": ((scales // math.gcd(scales, SCALES_BLOCK),), torch.float32),
        "scales_mean": ((), torch.float32),
        "levels": ((16,), torch.float32),
    }


def pack(model: nn.Module, kind: str, autocast: torch.dtype | None) -> None:
    """Put the linear layers of a model on the meta device into few bits, as `quantize` does."""
    for parent, name, layer in list(plain_linears(model)):
        if kind != "nf4" or layer.weight.numel() % BLOCK == 0:
            setattr(parent, name, ShapedQuantizedLinear(layer, kind, autocast))

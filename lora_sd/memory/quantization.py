"""Frozen linear layers whose weights are kept in 8 or 4 bits, under adapters in full precision.

    int8   one scale for each row:  W = scale * q,  q whole, -128 to 127
    fp8    one scale for each row:  W = scale * q,  q a float8 (e4m3)
    nf4    blocks of 64 numbers, each one of the 16 quantiles of a normal distribution times the
           block's largest, which is kept in 8 bits itself: Dettmers et al. 2023, "QLoRA", section 3

torchao makes the numbers. Its own layers would leave the whole weight in memory, unpacked, until
the backward pass; here it is unpacked for the forward pass, forgotten, and unpacked once more.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from lora_sd.layers import LoRALayer

BLOCK = 64  # numbers of nf4 that share a scale
SCALES_BLOCK = 256  # such scales that share a scale of their own, or as many as divide them evenly
BITS = ("int8", "fp8", "nf4")


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` with its weight in few bits. It computes with the weight unpacked, in
    the input's precision, or in autocast's; gradients pass through it to its input.

    What is kept are parameters, as DDP would send buffers around before every step.

    Args:
        linear: its bias is adopted.
        kind: 'int8', 'fp8' or 'nf4'.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype = kind, linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        for name, tensor in _PACK[kind](linear.weight.detach().float()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.train(linear.training)

    @property
    def weight_shape(self) -> Size:
        """(out_features, in_features), without unpacking anything."""
        return Size((self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight unpacked, in the precision that it had: a copy, to read and not to change."""
        return _unpacked(self.kind, self._packed(), self.weight_shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out: Tensor = LinearOfPacked.apply(
            x, self.bias, self.kind, self.weight_shape, *self._packed()
        )
        return out

    def _packed(self) -> list[Tensor]:
        return [getattr(self, name) for name in _KEPT[self.kind]]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class LinearOfPacked(torch.autograd.Function):
    """x @ W^T + bias, of which only what is packed waits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, kind: str, shape: Size, *packed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.kind, ctx.shape = kind, shape
        weight = _unpacked(kind, packed, shape, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors  # once: with gradient checkpointing, asking recomputes
        weight = _unpacked(ctx.kind, packed, ctx.shape, grads[0].dtype)
        return (grads[0] @ weight, None, None, None, *[None] * len(packed))


def _unpacked(kind: str, packed: Any, shape: Size, dtype: torch.dtype) -> Tensor:
    if kind == "nf4":
        return _unpack_nf4(*packed).reshape(shape).to(dtype)
    numbers, scale = packed
    if kind == "fp8":
        numbers = numbers.view(torch.float8_e4m3fn)
    return (numbers.float() * scale).to(dtype)


def _unpack_nf4(
    numbers: Tensor, scales: Tensor, scales_factor: Tensor, scales_mean: Tensor, levels: Tensor
) -> Tensor:
    grouped = scales.view(len(scales_factor), -1)
    largest = (grouped / scales_factor[:, None]).flatten() + scales_mean
    which = torch.stack([numbers >> 4, numbers & 15], dim=-1).view(-1, BLOCK)
    return levels[which.int()] * largest[:, None]


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    ao = torchao_quantization()
    packed = ao.Int8Tensor.from_hp(weight, ao.PerRow())
    return {"numbers": packed.qdata, "row_scale": packed.scale}


def _pack_fp8(weight: Tensor) -> dict[str, Tensor]:
    ao = torchao_quantization()
    packed = ao.Float8Tensor.from_hp(weight, torch.float8_e4m3fn, ao.PerRow())
    # As bytes, since gloo and older NCCL do not send float8.
    return {"numbers": packed.qdata.view(torch.uint8), "row_scale": packed.scale}


def _pack_nf4(weight: Tensor) -> dict[str, Tensor]:
    scales = weight.numel() // BLOCK
    packed = torchao_quantization().to_nf4(
        weight.contiguous(), BLOCK, math.gcd(scales, SCALES_BLOCK)
    )
    return {
        "numbers": packed.quantized_data,
        "scales": packed.quantized_scalers,
        "scales_factor": packed.quantization_factor,
        "scales_mean": packed.scaler_mean,
        "levels": packed.nf4,
    }


_PACK: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "int8": _pack_int8,
    "fp8": _pack_fp8,
    "nf4": _pack_nf4,
}
_KEPT = {
    "int8": ("numbers", "row_scale"),
    "fp8": ("numbers", "row_scale"),
    "nf4": ("numbers", "scales", "scales_factor", "scales_mean", "levels"),
}


def torchao_quantization() -> Any:
    """torchao's module of that name; slow to import, and only wanted here."""
    import torchao.quantization

    return torchao.quantization


@torch.no_grad()
def quantize(model: nn.Module, kind: str) -> tuple[int, int]:
    """Put the linear layers of a model, also those under adapters, into few bits, one by one.

    Convolutions, norms and the adapters' own factors stay; so do linear layers that nf4 has no form
    for: whose weight has no multiple of 64 numbers, or a block of zeros.

    Returns:
        how many layers were quantized, and how many linear layers were not.
    """
    done = left = 0
    for parent, name, layer in list(plain_linears(model)):
        if kind == "nf4" and not _fits_nf4(layer.weight):
            left += 1
            continue
        setattr(parent, name, QuantizedLinear(layer, kind))
        done += 1
    return done, left


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model has its weight in few bits."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """What all weights of a model take, adapters included."""
    return sum(
        tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers())
    )


def plain_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of the base's linear layers; not of the factors in wrappers."""
    for name, child in model.named_children():
        if isinstance(model, LoRALayer) and name != "base":
            continue
        if isinstance(child, nn.Linear) and not isinstance(child, QuantizedLinear):
            yield model, name, child
        else:
            yield from plain_linears(child)


def _fits_nf4(weight: Tensor) -> bool:
    if weight.numel() % BLOCK:
        return False
    largest = weight.detach().float().reshape(-1, BLOCK).abs().amax(1)
    # torchao's scales of scales are of what differs from their mean.
    grouped = (largest - largest.mean()).view(-1, math.gcd(len(largest), SCALES_BLOCK))
    return bool(largest.amin() > 0 and grouped.abs().amax(1).amin() > 0)

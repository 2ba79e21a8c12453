"""Adapters with random factors for the layers of a known family, or of one layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.low_rank import kind_of
from lora_sd.formats.families import layer_shapes

SHAPES = [(6, 5), (5, 6, 1, 1), (6, 4, 3, 3), (4, 7, 3, 1)]
"""Weights of linear layers and convolutions of several kinds."""


def random_layer(shape: Sequence[int], rank: int, alpha: float = 3.0, seed: int = 0) -> LoRAWeights:
    """A layer as if trained, its singular values falling."""
    noise = torch.Generator().manual_seed(seed)
    fall = 0.7 ** torch.arange(rank)
    down = torch.randn(rank, *shape[1:], generator=noise) * fall.view(-1, *[1] * (len(shape) - 1))
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=noise)
    return LoRAWeights(down / down[0].numel() ** 0.5, 0.3 * up / shape[0] ** 0.5, alpha)


def random_adapter(
    family: str = "sd15", rank: int = 4, conv_rank: int = 3, seed: int = 0, every: int = 1
) -> Adapter:
    """An adapter of every n-th of the family's linear layers and convolutions."""
    names = [name for name in layer_shapes(family) if not name.endswith("token_embedding")]
    layers = {}
    for number, name in enumerate(names[::every]):
        shape = layer_shapes(family)[name]
        most = min(shape[0], shape[1:].numel())
        wanted = conv_rank if kind_of(name, shape) == "conv" else rank
        layers[name] = random_layer(shape, min(wanted, most), seed=1000 * seed + number)
    return Adapter(layers)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())

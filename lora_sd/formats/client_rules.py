"""What other programs expect of an adapter beyond its format.

Programs that read a file otherwise than it says do so without a message: diffusers applies one
alpha to all of a UNet's attention and one to a text encoder, whatever the file says of the single
layers; A1111 and diffusers drop or refuse text-encoder attention unless all four layers are there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.parts import ATTENTION, TEXT_ATTENTION, TEXT_ENCODERS, component_of

UNET_ATTENTION = tuple(f".{name}" for name in ATTENTION)


def with_one_alpha(adapter: Adapter) -> Adapter:
    """The same adapter with one alpha for the UNet's attention and one for each text encoder.

    It is the most common one; the other layers' `up` takes up the difference, in float32.
    """
    layers = dict(adapter.layers)
    for group in _alpha_groups(layers):
        counted = Counter(layers[name].alpha for name in group)
        alpha = max(counted, key=lambda alpha: (counted[alpha], alpha), default=1.0)
        for name in group:
            layer = layers[name]
            if layer.alpha != alpha:
                up = layer.up.float() * (layer.alpha / alpha)
                bias = None if layer.up_bias is None else layer.up_bias * (layer.alpha / alpha)
                layers[name] = replace(layer, up=up, alpha=alpha, up_bias=bias)
    return Adapter(layers, adapter.metadata)


def with_whole_attention(adapter: Adapter, format: str) -> tuple[Adapter, int]:
    """The same adapter with the text-encoder attention that clients want to see.

    kohya's format: all four layers in each block that has one. diffusers': any one in a text
    encoder, without which diffusers refuses it. What is missing is added with factors of zeros, of
    rank 1.

    Returns:
        the adapter and how many layers were added.
    """
    layers = dict(adapter.layers)
    for encoder in TEXT_ENCODERS:
        mine = {name: w for name, w in layers.items() if component_of(name) == encoder}
        blocks = {
            name.rpartition(".")[0] + ".": layer.weight_shape[0]
            for name, layer in mine.items()
            if ".self_attn." in name
        }
        if format == "diffusers":
            first = f"{encoder}.text_model.encoder.layers.0.self_attn."
            blocks = {first: _width(mine)} if mine and not blocks else {}
        for block, width in blocks.items():
            like = next(iter(mine.values()))
            down, up = torch.zeros(1, width), torch.zeros(width, 1)
            for name in (block + layer for layer in TEXT_ATTENTION):
                layers.setdefault(name, LoRAWeights(down, up, like.alpha))
    return Adapter(layers, adapter.metadata), len(layers) - len(adapter.layers)


def _alpha_groups(names: Iterable[str]) -> Iterator[list[str]]:
    """The layers that must share an alpha."""
    names = list(names)
    yield [n for n in names if component_of(n) == "unet" and n.endswith(UNET_ATTENTION)]
    for encoder in TEXT_ENCODERS:
        yield [name for name in names if component_of(name) == encoder]


def _width(layers: dict[str, LoRAWeights]) -> int:
    """A text encoder's width, from any of its layers that are no attention: fc1, fc2, tokens, or
    the projection."""
    name, layer = next(iter(layers.items()))
    return layer.weight_shape[0 if name.endswith("fc2") else 1]

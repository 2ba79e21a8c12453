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
from lora_sd.parts import TEXT_ENCODERS, component_of

UNET_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


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


def with_whole_attention(adapter: Adapter, need_one: bool = False) -> tuple[Adapter, int]:
    """The same adapter with all four attention layers in each text-encoder block that has one.

    The missing ones are added with factors of zeros, of rank 1.

    Args:
        need_one: add a text encoder's first block also when it has no attention layer at all:
            diffusers refuses its own format without one.

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
        if mine and not blocks and need_one:
            blocks = {f"{encoder}.text_model.encoder.layers.0.self_attn.": _width(mine)}
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

"""The mathematics of one adapted layer.

A wrapper owns the frozen layer it adapts and adds a trained product of low rank:

    y = base(x) + scale * scaling * up(down(x)),    scaling = alpha / rank

`scale` is what a person slides: 1 as trained, 0 off; a tensor of one scale for each sample draws a
strip of scales in one pass. `lora_up` starts at zero, so that a fresh wrapper returns the base
layer's output to the last bit. Source: Hu et al. 2021, "LoRA", section 4.1; for convolutions the
LoCon form of LyCORIS (a k x k down, a 1 x 1 up).

Wrappers nest: a second adapter wraps the first one's wrapper, and their updates add up.
"""

from lora_sd.layers.kinds import KINDS, ConvLoRA, EmbeddingLoRA, LinearLoRA, wrapper_of
from lora_sd.layers.layer import (
    GIVEN,
    PISSA,
    Adaptable,
    LayerOptions,
    LoRALayer,
    add_to_bias,
    innermost,
    magnitude_shape,
    rank_limit,
    restore_bias,
    weight_shape,
)
from lora_sd.layers.starts import INITS

__all__ = [
    "GIVEN",
    "INITS",
    "KINDS",
    "Adaptable",
    "ConvLoRA",
    "EmbeddingLoRA",
    "LayerOptions",
    "LinearLoRA",
    "LoRALayer",
    "PISSA",
    "add_to_bias",
    "innermost",
    "magnitude_shape",
    "rank_limit",
    "restore_bias",
    "weight_shape",
    "wrapper_of",
]

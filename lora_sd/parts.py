"""Which part of a model a layer belongs to, and how strongly an adapter acts on each part.

A layer's part is its component ('unet', 'text_encoder', 'text_encoder_2'), its block, and whether
it is a convolution. Names of layers are as in `adapter`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Size

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
FIRST_ENCODER = re.compile(r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.")
BLOCKS = (*(f"down.{n}" for n in range(4)), "mid", *(f"up.{n}" for n in range(4)))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TOKENS = "token_embedding"
"""How the full name of a text encoder's token table ends."""
REST = "rest"
"""The block of layers outside the blocks: conv_in, conv_out, the time embedding."""


def component_of(name: str) -> str:
    """'unet', 'text_encoder' or 'text_encoder_2': how a full layer name begins."""
    return name.partition(".")[0]


def block_of(name: str) -> str:
    """'down.1', 'mid', 'up.0', 'rest', or a text encoder's name, of a full layer name."""
    component = component_of(name)
    if component in TEXT_ENCODERS:
        return component
    found = re.match(r"unet\.(?:(down|up)_blocks\.(\d+)|(mid)_block)\.", name)
    if not found:
        return REST
    return found[3] or f"{found[1]}.{found[2]}"


def unread_layers(names: Iterable[str], clip_skip: int = 1) -> set[str]:
    """Layers of the first text encoder that come behind the one whose output the UNet reads: an
    adapter in them would learn nothing. SDXL reads the last but one; of its second encoder, which
    also gives the pooled output, all is read.

    Args:
        names: full layer names of the whole model.
    """
    names = list(names)
    is_sdxl = any(component_of(name) == "text_encoder_2" for name in names)
    numbers = {name: int(found[1]) for name in names if (found := FIRST_ENCODER.match(name))}
    last_read = max(numbers.values(), default=0) - (1 if is_sdxl else clip_skip - 1)
    return {name for name, number in numbers.items() if number > last_read}


def is_conv(weight_shape: Sequence[int] | Size) -> bool:
    """Whether a weight is a convolution's with a kernel above 1 x 1.

    As in kohya's tools, a 1 x 1 convolution counts as linear: it is the same mathematics.
    """
    return len(weight_shape) == 4 and tuple(weight_shape[2:]) != (1, 1)


@dataclass(frozen=True)
class Scales:
    """How strongly each part of an adapter acts: 1 as trained, 0 off; the factors multiply.

    Attributes:
        overall: for every layer.
        linear, conv: for the UNet's linear layers (1 x 1 convolutions among them) and for its
            convolutions.
        text_encoder: for the text encoders' layers.
        blocks: further factors by block: {'mid': 0.5, 'up.1': 0}.
    """

    overall: float = 1.0
    linear: float = 1.0
    conv: float = 1.0
    text_encoder: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str, weight_shape: Sequence[int] | Size) -> float:
        """The scale of one layer, by its full name and the shape of its weight."""
        if component_of(name) in TEXT_ENCODERS:
            kind = self.text_encoder
        else:
            kind = self.conv if is_conv(weight_shape) else self.linear
        return self.overall * kind * self.blocks.get(block_of(name), 1.0)

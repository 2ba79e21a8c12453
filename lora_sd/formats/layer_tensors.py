"""The tensors of one layer as files store them, brought into the shapes that `adapter` defines.

A file's tensors are called by their part in the layer: DOWN and UP, the factors; MID, the middle
factor of LyCORIS's Tucker form; ALPHA; UP_BIAS; EMBEDDING_DOWN and EMBEDDING_UP, a token table's
factors; MAGNITUDE, DoRA's in LyCORIS's shape; PEFT_MAGNITUDE, DoRA's in PEFT's shape.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor

from lora_sd.adapter import LoRAWeights

DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"
UP_BIAS, MAGNITUDE, PEFT_MAGNITUDE = "up_bias", "magnitude", "peft_magnitude"
EMBEDDING_DOWN, EMBEDDING_UP = "embedding_down", "embedding_up"


def is_whole(parts: Mapping[str, object]) -> bool:
    """Whether both factors are there."""
    return (DOWN in parts and UP in parts) or (EMBEDDING_DOWN in parts and EMBEDDING_UP in parts)


def weight_shape(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...] | None:
    """Shape of the base weight that tensors of these shapes fit; None when they do not go together.

    A 1 x 1 kernel is dropped, as files may hold such layers either way: compare with `flat`.
    """
    if EMBEDDING_DOWN in shapes:
        down, up = shapes[EMBEDDING_DOWN], shapes[EMBEDDING_UP]
        fitting = len(down) == len(up) == 2 and up[1] == down[0] > 0
        return (down[1], up[0]) if fitting else None
    down, up = shapes[DOWN], shapes[UP]
    if len(down) not in (2, 4) or flat(up) != tuple(up[:2]) or len(up) < 2 or down[0] == 0:
        return None
    if MID not in shapes:
        return flat((up[0], *down[1:])) if up[1] == down[0] else None
    mid = shapes[MID]
    fitting = len(mid) == 4 and flat(down) == tuple(down[:2])
    return flat((up[0], down[1], *mid[2:])) if fitting and mid[:2] == (up[1], down[0]) else None


def flat(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape without a 1 x 1 kernel."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def to_weights(parts: Mapping[str, Tensor], shape: Size, alpha: float | None) -> LoRAWeights:
    """The layer's factors for a base weight of that shape, which they fit (`weight_shape`).

    A Tucker layer's middle and down factors become one k x k down, exactly, in float32.

    Args:
        alpha: None: as the layer's tensors say, or else its rank.

    Raises:
        ValueError: alpha, the bias or the magnitude is not one of this layer's, or it has both a
            bias and a magnitude, as PEFT refuses it too.
    """
    embedding = EMBEDDING_DOWN in parts
    if embedding:
        down, up = parts[EMBEDDING_DOWN], parts[EMBEDDING_UP]
    else:
        down, up = parts[DOWN], parts[UP]
        if MID in parts:
            middle = parts[MID].float()
            down = torch.einsum("rskl,si->rikl", middle, down.float().flatten(1))
            up = up.float()
        kernel = (1, 1) if len(shape) == 4 else ()
        down = down.reshape(down.shape[0], *shape[1:])
        up = up.reshape(*up.shape[:2], *kernel)
    bias = parts.get(UP_BIAS)
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"its bias is {tuple(bias.shape)}, its outputs are {shape[0]}")
    magnitude = _magnitude(parts, shape)
    if bias is not None and magnitude is not None:
        raise ValueError("it has both an up-bias and a DoRA magnitude, which PEFT refuses too")
    return LoRAWeights(down, up, _alpha(parts, down.shape[0], alpha), bias, magnitude, embedding)


def _alpha(parts: Mapping[str, Tensor], rank: int, alpha: float | None) -> float:
    """alpha as the tensors say, else as given, else the rank."""
    if ALPHA in parts:
        if parts[ALPHA].numel() != 1:
            raise ValueError("its alpha is not one number")
        alpha = float(parts[ALPHA].item())
    if alpha is None:
        return float(rank)
    if alpha <= 0:
        raise ValueError(f"its alpha is {alpha:g}, and must be above 0")
    return alpha


def _magnitude(parts: Mapping[str, Tensor], shape: Size) -> Tensor | None:
    """DoRA's magnitude (out, 1[, 1, 1]) or (1, in[, 1, 1])."""
    found = parts.get(MAGNITUDE, parts.get(PEFT_MAGNITUDE))
    if found is None:
        return None
    per_output = PEFT_MAGNITUDE in parts or found.dim() == 1 or found.shape[0] != 1
    ones = (1,) * (len(shape) - 2)
    if found.numel() != shape[0 if per_output else 1]:
        raise ValueError(f"its DoRA magnitude is {tuple(found.shape)} for a weight {tuple(shape)}")
    return found.reshape((shape[0], 1, *ones) if per_output else (1, shape[1], *ones))

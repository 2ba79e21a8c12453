"""The transforms of diffusers' example script, on PIL pictures, as torchvision documents them."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    """How a picture is resized."""

    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class Lambda:
    """Any function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        return self.function(value)


class Resize:
    """The shorter side becomes `size` pixels."""

    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.way = size, Image.Resampling[interpolation.name]

    def __call__(self, picture: Image.Image) -> Image.Image:
        factor = self.size / min(picture.size)
        width, height = (max(self.size, int(side * factor)) for side in picture.size)
        return picture.resize((width, height), self.way)


class CenterCrop:
    """The square of `size` pixels in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = ((side - self.size) // 2 for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class ToTensor:
    """(3, height, width) float32 from 0 to 1."""

    def __call__(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class Normalize:
    """Subtract a mean, divide by a deviation, channel by channel."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.mean, self.deviation = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, deviation)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.deviation

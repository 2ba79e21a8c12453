"""The mathematics of one adapted layer.

A wrapper owns the frozen layer it adapts and adds a trained product of low rank:

    y = base(x) + scale * scaling * up(down(x)),    scaling = alpha / rank

`scale` is what a person slides: 1 as trained, 0 off. `lora_up` starts at zero, so that a fresh
wrapper returns the base layer's output to the last bit. Source: Hu et al. 2021, "LoRA", section
4.1; for convolutions the LoCon form of LyCORIS (a k x k down, a 1 x 1 up).
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


def kaiming(weight: Tensor, rank: int, generator: torch.Generator) -> None:
    """Kaiming uniform with a = sqrt(5), as in loralib and PEFT."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def gaussian(weight: Tensor, rank: int, generator: torch.Generator) -> None:
    """Gaussian with standard deviation 1 / rank."""
    nn.init.normal_(weight, std=1 / rank, generator=generator)


INITS: dict[str, Callable[[Tensor, int, torch.Generator], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
}


class LoRALayer(nn.Module):
    """What every adapted layer has in common; use `LinearLoRA` or `ConvLoRA`.

    Args:
        base: the layer to adapt. It is adopted, not copied, and frozen.
        lora_down: from the base's input to `rank` channels.
        lora_up: from `rank` channels to the base's output, set to zero here.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        init: name of `lora_down`'s start: 'kaiming' or 'gaussian'.
        generator: source of that start; a CPU generator.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        lora_down: nn.Linear | nn.Conv2d,
        lora_up: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float | None,
        init: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_down = lora_down
        self.lora_up = lora_up
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = 1.0
        INITS[init](lora_down.weight, rank, generator or torch.default_generator)
        nn.init.zeros_(lora_up.weight)
        self.lora_down.to(base.weight.device)
        self.lora_up.to(base.weight.device)

    @property
    def scaling(self) -> float:
        """alpha / rank: the one place where it is computed for a live layer."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; diffusers and transformers read it, for its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the scaled update, in the base output's dtype."""
        out = self.base(x)
        if self.scale == 0:
            return out
        down = self.lora_down(x.to(self.lora_down.weight.dtype))
        return out + self.lora_up(down * (self.scale * self.scaling)).to(out.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"


class LinearLoRA(LoRALayer):
    """An `nn.Linear` with a low-rank update. Input (..., in_features), output (..., out_features).

    Raises:
        ValueError: the rank is above min(in_features, out_features).
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        check_rank(base, rank)
        super().__init__(
            base,
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
            rank,
            alpha,
            init,
            generator,
        )
        self.in_features, self.out_features = base.in_features, base.out_features


class ConvLoRA(LoRALayer):
    """An `nn.Conv2d` with a low-rank update. Input (batch, in_channels, height, width).

    `lora_down` has the base's kernel, stride, padding and dilation, and `rank` output channels;
    `lora_up` is 1 x 1.

    Raises:
        ValueError: the rank is above the limit, or the base is a grouped convolution.
    """

    def __init__(
        self,
        base: nn.Conv2d,
        rank: int,
        alpha: float | None = None,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        if base.groups != 1:
            raise ValueError(f"a convolution with {base.groups} groups cannot be adapted")
        check_rank(base, rank)
        super().__init__(
            base,
            nn.Conv2d(
                base.in_channels,
                rank,
                base.kernel_size,  # type: ignore[arg-type]
                base.stride,  # type: ignore[arg-type]
                base.padding,  # type: ignore[arg-type]
                base.dilation,  # type: ignore[arg-type]
                bias=False,
                padding_mode=base.padding_mode,
            ),
            nn.Conv2d(rank, base.out_channels, 1, bias=False),
            rank,
            alpha,
            init,
            generator,
        )
        self.in_channels, self.out_channels = base.in_channels, base.out_channels


def rank_limit(base: nn.Module) -> int:
    """The highest useful rank: the smaller side of the weight seen as (out, in * kernel)."""
    return min(cast(Tensor, base.weight).flatten(1).shape)


def check_rank(base: nn.Module, rank: int) -> None:
    """Raises ValueError when `rank` is not between 1 and the layer's limit."""
    if not 1 <= rank <= rank_limit(base):
        raise ValueError(f"rank {rank} is outside 1..{rank_limit(base)}")


def delta_weight(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """(alpha / rank) * up @ down in float32, shaped as the base's weight.

    One formula for linear and convolution: down (rank, in) or (rank, in, k, k), up (out, rank) or
    (out, rank, 1, 1).
    """
    rank = down.shape[0]
    delta = (alpha / rank) * (up.float().flatten(1) @ down.float().flatten(1))
    return delta.reshape(up.shape[0], *down.shape[1:])

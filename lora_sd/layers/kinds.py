"""`LinearLoRA`, `ConvLoRA`, `EmbeddingLoRA`: the shapes of the factors and how they are applied."""

from typing import Any, Self, TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from lora_sd.layers.layer import LoRALayer, innermost

Layer = TypeVar("Layer", bound=LoRALayer)


class LinearLoRA(LoRALayer):
    """An `nn.Linear` with a low-rank update. Input (..., in_features), output (..., out_features).

    Seeds 000 to 004 call it LinearLora, LoRALinear, LinearLoRA, LinearLoralayer and Linear.
    """

    base: nn.Linear

    @classmethod
    def alone(
        cls, in_features: int, out_features: int, rank: int, alpha: float | None = None, **opts: Any
    ) -> Self:
        """A layer without a base, whose output is the update alone, to add to a base's output."""
        return _without_base(cls(nn.Linear(in_features, out_features), rank, alpha, **opts))

    def _factors(self, rank: int, up_bias: bool) -> tuple[nn.Module, nn.Module]:
        down = skip_init(nn.Linear, self.base.in_features, rank, bias=False)
        return down, skip_init(nn.Linear, rank, self.base.out_features, bias=up_bias)

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _up(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


class ConvLoRA(LoRALayer):
    """An `nn.Conv2d` with a low-rank update. Input (batch, in_channels, height, width).

    `lora_down` has the base's kernel, stride, padding, dilation and groups, and `rank` output
    channels; `lora_up` is 1 x 1 with the base's groups.

    Raises:
        ValueError: also where the rank is no multiple of the base's groups.
    """

    base: nn.Conv2d
    rank_axis = 1

    @classmethod
    def alone(
        cls,
        in_channels: int,
        out_channels: int,
        rank: int,
        alpha: float | None = None,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        **opts: Any,
    ) -> Self:
        """A layer without a base, whose output is the update alone, to add to a base's output."""
        base = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        return _without_base(cls(base, rank, alpha, **opts))

    def _factors(self, rank: int, up_bias: bool) -> tuple[nn.Module, nn.Module]:
        base = innermost(self.base)
        self.groups = base.groups
        if rank % base.groups:
            raise ValueError(
                f"rank {rank} is no multiple of the convolution's {base.groups} groups"
            )
        down = skip_init(
            nn.Conv2d,
            base.in_channels,
            rank,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            base.groups,
            bias=False,
            padding_mode=base.padding_mode,
        )
        return down, skip_init(
            nn.Conv2d, rank, base.out_channels, 1, groups=base.groups, bias=up_bias
        )

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        # nn.Conv2d's own way of padding, for padding modes other than zeros
        return cast(Tensor, self.lora_down._conv_forward(x, weight, None))

    def _up(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(hidden, weight, groups=self.groups)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)

    def _by_input(self, values: Tensor) -> Tensor:
        return values.repeat(1, self.groups, 1, 1)

    @property
    def in_channels(self) -> int:
        return self.base.in_channels

    @property
    def out_channels(self) -> int:
        return self.base.out_channels


class EmbeddingLoRA(LoRALayer):
    """An `nn.Embedding` with a low-rank update. Input: ids (...), output (..., embedding_dim).

    The table's update is (up @ down)^T, as in PEFT. Initialisations take the rank for the fan-in,
    since a lookup sums over nothing else.
    """

    base: nn.Embedding

    def _factors(self, rank: int, up_bias: bool) -> tuple[nn.Module, nn.Module]:
        down = skip_init(nn.Linear, self.base.num_embeddings, rank, bias=False)
        return down, skip_init(nn.Linear, rank, self.base.embedding_dim, bias=up_bias)

    def _init_view(self) -> Tensor:
        transposed: Tensor = self.lora_down.weight.T
        return transposed

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        base = innermost(self.base)
        return F.embedding(
            x, weight.T, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq
        )

    def _up(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def _down_dims(self, x: Tensor) -> int:
        return x.dim() + 1

    def _dropped(self, x: Tensor) -> Tensor:
        return x  # ids

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base.embedding_dim


KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LinearLoRA,
    nn.Conv2d: ConvLoRA,
    nn.Embedding: EmbeddingLoRA,
}


def wrapper_of(layer: nn.Module) -> type[LoRALayer]:
    """The class that adapts a layer, wrapped already or not."""
    plain = innermost(layer)
    return next(wrapper for kind, wrapper in KINDS.items() if isinstance(plain, kind))


def _without_base(layer: Layer) -> Layer:
    if layer.magnitude is not None:
        raise ValueError("DoRA needs the base whose weights it decomposes")
    layer.base = None  # type: ignore[assignment]
    return layer

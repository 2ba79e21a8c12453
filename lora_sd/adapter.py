"""What any adapter file means: layer name -> factors and alpha, and metadata.

Stands between layers and files: layers know no format, and formats know no model.

A layer's full name is its component and its path there: 'unet.mid_block.attentions.0.proj_in',
'text_encoder.text_model.encoder.layers.0.mlp.fc1', 'text_encoder_2.text_model...'. A text encoder's
path always begins with 'text_model.', whatever the installed transformers calls its parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Size, Tensor

from lora_sd.errors import AdapterError, shown_list


def delta_weight(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """(alpha / rank) * up @ down in float32, shaped as the base's weight.

    One formula for linear layers and convolutions, grouped ones too: down (rank, in / groups[, k,
    k]), up (out, rank / groups[, 1, 1]). The groups are told by rank against up's width.
    """
    rank, width = down.shape[0], up.shape[1]
    groups = rank // width
    by_group = up.float().reshape(groups, -1, width) @ down.float().reshape(groups, width, -1)
    return (alpha / rank) * by_group.reshape(up.shape[0], *down.shape[1:])


def in_file_precision(alpha: float) -> float:
    """An alpha rounded to float32."""
    return float(torch.tensor(alpha, dtype=torch.float32))


def norms(weight: Tensor, shape: Size) -> Tensor:
    """Euclidean norms of a weight over every axis along which `shape` has size 1; of that shape."""
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=axes or None, keepdim=True)


@dataclass(frozen=True)
class LoRAWeights:
    """The factors of one layer.

    Attributes:
        down: linear (rank, in), convolution (rank, in / groups, k, k), embedding (rank, tokens).
        up: linear (out, rank), convolution (out, rank / groups, 1, 1), embedding (width, rank).
        alpha: the update is scaled by alpha / rank; rank-stabilised scaling is folded into it.
        up_bias: (out,) added to the output with the same scaling; in PEFT's files only.
        magnitude: DoRA's norm of the adapted weight for each output (out, 1[, 1, 1]) as in PEFT,
            or for each input (1, in[, 1, 1]) as in LyCORIS.
        embedding: whether the factors are a token table's, whose update is their transpose.
    """

    down: Tensor
    up: Tensor
    alpha: float
    up_bias: Tensor | None = None
    magnitude: Tensor | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        # As files hold it, so that a live layer, its file and its checkpoint agree to the bit.
        object.__setattr__(self, "alpha", in_file_precision(self.alpha))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def size(self) -> int:
        """How many numbers it holds, alpha left out."""
        tensors = (self.down, self.up, self.up_bias, self.magnitude)
        return sum(tensor.numel() for tensor in tensors if tensor is not None)

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> Size:
        """Shape of the base weight that the factors fit."""
        if self.embedding:
            return Size((self.down.shape[1], self.up.shape[0]))
        return Size((self.up.shape[0], *self.down.shape[1:]))

    def to(self, device: str | torch.device, copy: bool = False) -> "LoRAWeights":
        """The same on a device; `copy`: with tensors of its own."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, copy=copy)

        return replace(
            self,
            down=self.down.to(device, copy=copy),
            up=self.up.to(device, copy=copy),
            up_bias=moved(self.up_bias),
            magnitude=moved(self.magnitude),
        )

    def low_rank(self) -> Tensor:
        """scaling * up @ down in float32, shaped as the base weight; DoRA left out."""
        delta = delta_weight(self.down, self.up, self.alpha)
        return delta.T if self.embedding else delta

    def delta(self, base: Tensor | None = None) -> Tensor:
        """What is added to the base weight at scale 1, in float32, shaped as it.

        Args:
            base: the base weight, which a layer with a magnitude needs.

        Raises:
            ValueError: the layer has a magnitude and no base weight is given.
        """
        if self.magnitude is None:
            return self.low_rank()
        if base is None:
            raise ValueError("the update of a DoRA layer depends on its base weight")
        # Liu et al. 2024, "DoRA", equation 5; in place, since weights are large
        base = base.float()
        weight = self.low_rank().add_(base)
        magnitude = self.magnitude.float()
        return weight.mul_(magnitude / norms(weight, magnitude.shape)).sub_(base)

    def add_to(self, weight: Tensor, scale: float, base: Tensor) -> None:
        """Add scale * delta to a float32 weight in place; without forming delta where it can be."""
        is_plain = self.magnitude is None and not self.embedding
        if is_plain and self.up.shape[1] == self.rank and weight.is_contiguous():
            up, down = self.up.float().flatten(1), self.down.float().flatten(1)
            weight.flatten(1).addmm_(up, down, alpha=scale * self.scaling)
        else:
            weight.add_(self.delta(base), alpha=scale)

    def bias_delta(self) -> Tensor | None:
        """What is added to the base's bias at scale 1 (out,), in float32; None: nothing."""
        return None if self.up_bias is None else self.scaling * self.up_bias.float()


@dataclass
class Adapter:
    """All the factors for one base model, by full layer name (module docstring)."""

    layers: dict[str, LoRAWeights]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_sdxl(self) -> bool:
        """Whether it belongs to an SDXL model, whose layers kohya's files name differently."""
        return (
            self.metadata.get("ss_base_model_version", "").startswith("sdxl")
            or any(name.startswith("text_encoder_2.") for name in self.layers)
            or any(
                name.endswith("attn2.to_k") and layer.weight_shape[1] == 2048
                for name, layer in self.layers.items()
            )
        )

    def check_fits(self, shapes: Mapping[str, Size], source: str) -> None:
        """Every layer must exist in the model with the right shape.

        Args:
            shapes: weight shape of each layer of the model (`layer_names.layer_shapes`).
            source: what to call the adapter in the message.

        Raises:
            AdapterError: naming counts and the first offenders.
        """
        missing = [name for name in self.layers if name not in shapes]
        if missing:
            raise AdapterError(
                f"'{source}' was made for another model: {len(missing)} of its {len(self.layers)} "
                f"layers do not exist in this one, such as {shown_list(missing, 2)}."
            )
        wrong = [
            f"{name} is {tuple(layer.weight_shape)} in the file and {tuple(shapes[name])} here"
            for name, layer in self.layers.items()
            if layer.weight_shape != shapes[name]
        ]
        if wrong:
            raise AdapterError(
                f"'{source}' was made for another model: {len(wrong)} of its {len(self.layers)} "
                f"layers have another shape; {wrong[0]}."
            )

"""What any adapter file means: layer name -> (down, up, alpha), and metadata.

Stands between layers and files: layers know no format, and formats know no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Size, Tensor

from lora_sd.errors import AdapterError, shown_list
from lora_sd.layers import delta_weight


@dataclass(frozen=True)
class LoRAWeights:
    """The factors of one layer: down (rank, in[, k, k]), up (out, rank[, 1, 1])."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> Size:
        """Shape of the base weight that the factors fit."""
        return Size((self.up.shape[0], *self.down.shape[1:]))

    def delta(self) -> Tensor:
        """What is added to the base weight at scale 1, in float32."""
        return delta_weight(self.down, self.up, self.alpha)


@dataclass
class Adapter:
    """All the pairs for one base model, by full layer name ('unet.mid_block....to_q')."""

    layers: dict[str, LoRAWeights]
    metadata: dict[str, str] = field(default_factory=dict)

    def check_fits(self, shapes: Mapping[str, Size], source: str) -> None:
        """Every layer must exist in the model with the right shape.

        Args:
            shapes: weight shape of each layer of the model (`inject.layer_shapes`).
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

"""Put adapters into base weights at a scale, and take them out again, bit for bit.

A merged weight is always computed from a kept copy of the base, in float32, and never by adding
to or subtracting from the last result: so a thousand changes of scale leave no trace.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError
from lora_sd.layers import LoRALayer


class MergedWeights:
    """The weights of some models, with any adapters merged into them at any scales.

    Generation then costs exactly what the base costs.

    Args:
        components: the models by the name that begins their layers' names: {'unet': unet}.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = dict(components)
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Make the weights base + sum of scale * delta; with no adapter, or at scale 0, the base.

        Raises:
            AdapterError: an adapter has a layer that the models lack, or of another shape; the
                weights are then as before.
        """
        active = [(adapter, scale) for adapter, scale in adapters if scale != 0]
        names = {name for adapter, _ in active for name in adapter.layers}
        shapes = {name: self._weight(name).shape for name in names}
        for adapter, _ in active:
            adapter.check_fits(shapes, "the adapter")
        for name in names - self._kept.keys():
            self._kept[name] = self._weight(name).clone()
        for name, base in self._kept.items():
            if name not in names:
                self._weight(name).copy_(base)
                continue
            merged = base.float()
            for adapter, scale in active:
                if name in adapter.layers:
                    merged = merged + scale * adapter.layers[name].delta().to(base.device)
            self._weight(name).copy_(merged)

    def clear(self) -> None:
        """Put the base weights back and forget the copies."""
        self.set([])
        self._kept.clear()

    def _weight(self, name: str) -> Tensor:
        component, _, path = name.partition(".")
        try:
            module = self._components[component].get_submodule(path)
        except (KeyError, AttributeError):
            raise AdapterError(
                f"The adapter was made for another model: this one has no layer '{name}'."
            ) from None
        weight = (module.base if isinstance(module, LoRALayer) else module).weight
        assert isinstance(weight, Tensor)
        return weight

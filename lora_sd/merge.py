"""Put adapters into base weights at a scale, and take them out again, bit for bit.

A merged weight is always computed from a kept copy of the base, in float32, and never by adding
to or subtracting from the last result: so a thousand changes of scale leave no trace.

A base in few bits (`memory.quantization`) takes no update in: most are smaller than the distance of
two of its numbers. Adapters act on it live.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_sd import inject
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.layer_names import adaptable_layers, layer_shapes
from lora_sd.layers import add_to_bias, restore_bias
from lora_sd.memory.quantization import is_quantized
from lora_sd.parts import Scales


def weights_with_adapters(components: Mapping[str, nn.Module]) -> "MergedWeights | LiveWeights":
    """What puts adapters into these models: merged, or live where weights are in few bits."""
    if any(is_quantized(model) for model in components.values()):
        return LiveWeights(components)
    return MergedWeights(components)


class MergedWeights:
    """The weights of some models, with any adapters merged into them at any scales.

    Generation then costs exactly what the base costs. Layers must not be wrapped or taken out while
    anything is merged.

    Args:
        components: the models by the name that begins their layers' names: {'unet': unet}.

    Raises:
        ValueError: weights are in few bits.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        if any(is_quantized(model) for model in components.values()):
            raise ValueError("a weight in few bits has no room for an update: use LiveWeights")
        self._layers: dict[str, Any] = dict(adaptable_layers(components))
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._merged: dict[str, list[tuple[LoRAWeights, float]]] = {}

    @torch.no_grad()
    def set(self, adapters: Sequence[tuple[Adapter, float | Scales]]) -> None:
        """Make the weights base + sum of scale * delta; with no adapter, or at scale 0, the base.
        Only layers whose adapters or scales are others than before are computed.

        Raises:
            AdapterError: an adapter has a layer that the models lack, or of another shape; the
                weights are then as before.
        """
        shapes = {name: layer.weight.shape for name, layer in self._layers.items()}
        wanted: dict[str, list[tuple[LoRAWeights, float]]] = {}
        for adapter, scale in adapters:
            adapter.check_fits(shapes, "the adapter")
            scales = scale if isinstance(scale, Scales) else Scales(scale)
            for name, weights in adapter.layers.items():
                if amount := scales.of(name, weights.weight_shape):
                    wanted.setdefault(name, []).append((weights, amount))
        for name in wanted.keys() - self._kept.keys():
            layer = self._layers[name]
            bias = cast(Tensor | None, getattr(layer, "bias", None))
            self._kept[name] = layer.weight.clone(), None if bias is None else bias.clone()
        for name, (base, bias) in self._kept.items():
            amounts = wanted.get(name, [])
            if _same(amounts, self._merged.pop(name, None)):  # away, should what follows fail
                self._merged[name] = amounts
                continue
            layer = self._layers[name]
            restore_bias(layer, bias)
            merged = layer.weight.copy_(base)
            if amounts and base.dtype != torch.float32:
                merged = base.float()
            for weights, amount in amounts:
                weights.to(base.device).add_to(merged, amount, base)
                add_to_bias(layer, weights.bias_delta(), amount)
            if merged is not layer.weight:
                layer.weight.copy_(merged)
            self._merged[name] = amounts

    def clear(self) -> None:
        """Put the base weights back and forget the copies."""
        self.set([])
        self._kept.clear()
        self._merged.clear()


def _same(
    amounts: list[tuple[LoRAWeights, float]], merged: list[tuple[LoRAWeights, float]] | None
) -> bool:
    """Whether these very weights are merged already at the same scales."""
    return merged is not None and [(id(one), amount) for one, amount in amounts] == [
        (id(one), amount) for one, amount in merged
    ]


class LiveWeights:
    """As `MergedWeights`, but the adapters act beside the weights, which are left alone.

    Args:
        components: the models by the name that begins their layers' names: {'unet': unet}.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components
        self._attached: list[tuple[Adapter, str]] = []
        self._names = (f"live {number}" for number in count())

    def set(self, adapters: Sequence[tuple[Adapter, float | Scales]]) -> None:
        """Let the models act as base + sum of scale * delta; with no adapter, as the base.

        Raises:
            AdapterError: an adapter has a layer that the models lack, or of another shape; all is
                then as before.
        """
        shapes = layer_shapes(self._components)
        for adapter, _ in adapters:
            adapter.check_fits(shapes, "the adapter")
        if [id(adapter) for adapter, _ in adapters] != [id(one) for one, _ in self._attached]:
            self.clear()
            for adapter, _ in adapters:
                name = next(self._names)
                inject.attach_adapter(self._components, adapter, adapter_name=name)
                self._attached.append((adapter, name))
        for (_, scale), (_, name) in zip(adapters, self._attached, strict=True):
            inject.set_scale(self._components, scale, name)

    def clear(self) -> None:
        """Take the adapters out."""
        for _, name in self._attached:
            inject.detach(self._components, name)
        self._attached.clear()

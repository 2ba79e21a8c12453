"""Put adapters into the layers of a model, take them out, and collect what was trained.

A model is a UNet alone, or its parts by component: {'unet': unet, 'text_encoder': text_encoder}.
Layers have full names, as in `adapter`; which of them are adapted, `layer_choice` says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError
from lora_sd.layer_choice import LayerPlan
from lora_sd.layer_names import Model, components_of, layer_shapes, walk
from lora_sd.layers import (
    GIVEN,
    LayerOptions,
    LoRALayer,
    innermost,
    weight_shape,
    wrapper_of,
)
from lora_sd.parts import TOKENS, Scales
from lora_sd.randomness import generator


def attach(
    model: Model,
    plans: Sequence[LayerPlan],
    options: LayerOptions | None = None,
    seed: int = 0,
    adapter_name: str = "default",
) -> dict[str, LoRALayer]:
    """Wrap the planned layers, freeze everything else; the new layers by full name.

    Each layer's start depends on the seed and its own name alone, so that choosing other layers
    beside it changes nothing. Layers of another adapter's are wrapped once more. A token table has
    neither up-bias nor DoRA.

    Raises:
        ValueError: a layer is adapted already under that adapter's name.
    """
    places = dict(walk(model))
    options = options or LayerOptions()
    tokens = replace(options, up_bias=False, dora="off")
    for module in components_of(model).values():
        module.requires_grad_(False)
    attached: dict[str, LoRALayer] = {}
    for plan in plans:
        base, (root, path) = places[plan.name]
        if any(layer.adapter_name == adapter_name for layer in _chain(base)):
            raise ValueError(f"layer '{plan.name}' is adapted already")
        layer = wrapper_of(base)(
            base,  # type: ignore[arg-type]
            plan.rank,
            plan.alpha,
            **asdict(tokens if plan.name.endswith(TOKENS) else options),
            generator=generator(seed, "start", plan.name),
        )
        layer.adapter_name = adapter_name
        root.set_submodule(path, layer)
        attached[plan.name] = layer
    return attached


@torch.no_grad()
def attach_adapter(
    model: Model,
    adapter: Adapter,
    scale: float | torch.Tensor | Scales = 1.0,
    adapter_name: str = "default",
) -> dict[str, LoRALayer]:
    """Attach layers that hold an adapter's weights, live: a scale can be changed at any time.

    They do not learn.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    adapter.check_fits(layer_shapes(model), "the adapter")
    attached: dict[str, LoRALayer] = {}
    for up_bias in (False, True):
        plans = [
            LayerPlan(name, weights.rank, weights.alpha, weights.weight_shape)
            for name, weights in adapter.layers.items()
            if (weights.up_bias is not None) == up_bias
        ]
        if plans:
            options = LayerOptions(init=GIVEN, up_bias=up_bias)
            attached |= attach(model, plans, options, adapter_name=adapter_name)
    for name, layer in attached.items():
        weights = adapter.layers[name]
        if weights.magnitude is not None:
            layer.add_magnitude(weights.magnitude)
        layer.load(weights)
        layer.requires_grad_(False)
    set_scale(model, scale, adapter_name)
    return attached


def detach(model: Model, adapter_name: str | None = None) -> None:
    """Put the plain layers back, or take one adapter's wrappers out; bit for bit."""
    for _, (module, (root, path)) in list(walk(model)):
        layers = list(_chain(module))
        kept = [layer for layer in layers if adapter_name not in (None, layer.adapter_name)]
        if len(kept) == len(layers):
            continue
        for layer in layers:
            layer.unmerge()
        inner = innermost(module)
        for layer in reversed(kept):
            layer.base = inner
            inner = layer
        root.set_submodule(path, inner)


def lora_layers(model: Model, adapter_name: str = "default") -> dict[str, LoRALayer]:
    """An adapter's layers by full name."""
    return {
        name: layer
        for name, (module, _) in walk(model)
        for layer in _chain(module)
        if layer.adapter_name == adapter_name
    }


def set_scale(
    model: Model, scale: float | torch.Tensor | Scales, adapter_name: str = "default"
) -> None:
    """Set the scale of an adapter's layers: 1 as trained, 0 gives the base bit for bit.

    Args:
        scale: one for all layers; a tensor (samples,) of one for each sample; or by part.
    """
    for name, layer in lora_layers(model, adapter_name).items():
        if isinstance(scale, Scales):
            layer.set_scale(scale.of(name, weight_shape(innermost(layer))))
        else:
            layer.set_scale(scale)


def collect(model: Model, adapter_name: str = "default", exact: bool = False) -> Adapter:
    """A copy of what an adapter's layers hold, on the CPU.

    Args:
        exact: in the form from which training goes on to the bit (`LoRALayer.weights`).
    """
    return Adapter(
        {
            name: layer.weights(exact).to("cpu", copy=True)
            for name, layer in lora_layers(model, adapter_name).items()
        }
    )


def load(layers: Mapping[str, LoRALayer], adapter: Adapter) -> None:
    """Copy an adapter's weights into attached layers of the same names, ranks and alphas.

    Raises:
        AdapterError: naming every layer that is missing, unexpected or different, at once.
    """
    problems = [f"layer '{name}' is missing from it" for name in layers.keys() - adapter.layers]
    for name, weights in adapter.layers.items():
        if name not in layers:
            problems.append(f"layer '{name}' is not adapted here")
        elif different := layers[name].difference(weights):
            problems.append(f"layer '{name}' {different}")
    if problems:
        raise AdapterError([f"The adapter does not fit: {problem}." for problem in problems])
    for name, weights in adapter.layers.items():
        layers[name].load(weights)


def _chain(module: Any) -> Iterator[LoRALayer]:
    """The wrappers of a layer, outermost first."""
    while isinstance(module, LoRALayer):
        yield module
        module = module.base

"""What learns, in groups of the same learning rate and weight decay."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_sd.layers import LoRALayer
from lora_sd.parts import TEXT_ENCODERS, component_of


def parameter_groups(
    layers: Mapping[str, LoRALayer],
    *,
    learning_rate: float,
    conv_learning_rate: float | None,
    text_encoder_rates: Mapping[str, float],
    block_learning_rates: Sequence[str],
    lora_plus_ratio: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The trained parameters in groups: 'params', 'lr', 'weight_decay'.

    Weight decay is on the factors alone: it would pull DoRA's magnitudes off the base's norms.

    Args:
        layers: by full name.
        text_encoder_rates: by component.

    Raises:
        ConfigError: a pattern fits no layer.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, layer in layers.items():
        component = component_of(name)
        rate = text_encoder_rates[component] if component in TEXT_ENCODERS else learning_rate
        for part, parameter in layer.named_parameters():
            if parameter.requires_grad:
                decay = weight_decay if part.endswith("weight") else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]

"""What learns, in groups of the same learning rate and weight decay."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size, nn

from lora_sd.errors import ConfigError
from lora_sd.layers import LoRALayer
from lora_sd.parts import TEXT_ENCODERS, component_of, is_conv
from lora_sd.patterns import invalid_pattern, is_meant, nearest_layers


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
    """The trained parameters in groups: 'name', 'params', 'lr', 'weight_decay'.

    Names say what sets a group apart: 'unet', 'unet conv' (with a rate of its own), 'unet x0.5' (by
    a pattern), 'unet up' (with LoRA+), 'unet norms' (without weight decay). Weight decay is on the
    factors alone: it would pull DoRA's magnitudes off the base's norms.

    Layers whose rate is 0 get no group and stop to require gradients.

    Args:
        layers: by full name.
        conv_learning_rate: of the UNet's convolutions with a kernel above 1 x 1.
        text_encoder_rates: by component.
        block_learning_rates: 'PATTERN=FACTOR'; the last that fits a layer counts.
        lora_plus_ratio: how many times faster lora_up learns than lora_down (Hayou et al. 2024,
            "LoRA+", section 4).

    Raises:
        ConfigError: a pattern fits no layer, a factor is no number of 0 or more, or nothing learns;
            all problems at once.
    """
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    rules = _rules(block_learning_rates, shapes)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, layer in layers.items():
        label = component_of(name)
        rate = text_encoder_rates[label] if label in TEXT_ENCODERS else learning_rate
        if label not in TEXT_ENCODERS and conv_learning_rate and is_conv(shapes[name]):
            label, rate = f"{label} conv", conv_learning_rate
        factors = [factor for pattern, factor in rules if is_meant(pattern, name, shapes[name])]
        if factors and factors[-1] == 0:
            layer.requires_grad_(False)
            continue
        if factors and factors[-1] != 1:
            label, rate = f"{label} x{factors[-1]:g}", rate * factors[-1]
        for part, parameter in layer.named_parameters():
            if not parameter.requires_grad:
                continue
            is_up, decays = part.startswith("lora_up."), part.endswith("weight")
            is_faster = is_up and lora_plus_ratio != 1
            group = f"{label}{' up' if is_faster else ''}{'' if decays else ' norms'}"
            faster = rate * lora_plus_ratio if is_faster else rate
            decay = weight_decay if decays else 0.0
            groups.setdefault((group, faster, decay), []).append(parameter)
    if not groups:
        raise ConfigError(
            "Nothing learns: 'optimizer.block_learning_rates' gives every layer the factor 0."
        )
    return [
        {"name": name, "params": members, "lr": rate, "weight_decay": decay}
        for (name, rate, decay), members in groups.items()
    ]


def _rules(texts: Sequence[str], shapes: Mapping[str, Size]) -> list[tuple[str, float]]:
    """(pattern, factor) of each 'PATTERN=FACTOR'."""
    rules, problems = [], []
    for text in texts:
        pattern, _, written = (part.strip() for part in text.rpartition("="))
        factor = _factor(written)
        wrong = invalid_pattern(pattern)
        if not pattern or factor is None:
            problems.append(
                f"'optimizer.block_learning_rates' holds '{text}': write PATTERN=FACTOR, such as "
                f"block:mid=0.5 or *attn1*=0."
            )
        elif wrong:
            problems.append(f"'optimizer.block_learning_rates': {wrong}")
        elif not any(is_meant(pattern, name, shape) for name, shape in shapes.items()):
            problems.append(
                f"'optimizer.block_learning_rates': no layer that learns matches '{pattern}'."
                f"{nearest_layers(pattern, shapes)}"
            )
        else:
            rules.append((pattern, factor))
    if problems:
        raise ConfigError(problems)
    return rules


def _factor(written: str) -> float | None:
    """A number of 0 or more; None when it is none."""
    try:
        factor = float(written)
    except ValueError:
        return None
    return factor if math.isfinite(factor) and factor >= 0 else None

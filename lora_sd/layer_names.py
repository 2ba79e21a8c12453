"""The layers of a model by full name, as in `adapter`: what can be adapted, and where it lies.

A model is a UNet alone, or its parts by component: {'unet': unet, 'text_encoder': text_encoder}.
"""

from collections.abc import Iterator, Mapping

from torch import Size, nn

from lora_sd.layers import Adaptable, LoRALayer, innermost, weight_shape
from lora_sd.parts import TEXT_ENCODERS, TOKENS

Model = nn.Module | Mapping[str, nn.Module]
Place = tuple[nn.Module, str]  # (a component, the path below it as its own parts are called)


def components_of(model: Model) -> dict[str, nn.Module]:
    """The parts of a model by component; a module alone is a UNet."""
    return {"unet": model} if isinstance(model, nn.Module) else dict(model)


def adaptable_layers(model: Model) -> dict[str, Adaptable]:
    """Every linear and convolution layer, and the text encoders' token tables, by full name; where
    one is adapted already, the plain layer under it."""
    found: dict[str, Adaptable] = {}
    for name, (module, _) in walk(model):
        layer = innermost(module)
        is_tokens = isinstance(layer, nn.Embedding) and name.endswith(TOKENS)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) or is_tokens:
            found[name] = layer
    return found


def layer_shapes(model: Model) -> dict[str, Size]:
    """Weight shape of every adaptable layer, by full name."""
    return {name: weight_shape(layer) for name, layer in adaptable_layers(model).items()}


def walk(model: Model) -> Iterator[tuple[str, tuple[nn.Module, Place]]]:
    """(full name, (module, its place)) of every part of a model, not looking into wrappers."""

    def below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            yield f"{prefix}{name}", child
            if not isinstance(child, LoRALayer):
                yield from below(child, f"{prefix}{name}.")

    for component, root in components_of(model).items():
        for path, module in below(root, ""):
            named = path
            if component in TEXT_ENCODERS and not path.startswith(("text_model", "text_proj")):
                named = f"text_model.{path}"  # transformers 5.6 and newer leave it out
            yield f"{component}.{named}", (module, (root, path))

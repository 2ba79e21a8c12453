"""kohya's adapter format, which A1111, Forge, ComfyUI, InvokeAI, kohya's tools and diffusers read.

Three tensors a layer: `X.lora_down.weight`, `X.lora_up.weight` and the 0-d `X.alpha`; with DoRA a
fourth, LyCORIS's `X.dora_scale`. X is a prefix and the layer's path with dots as underscores:

    UNet                'lora_unet_', diffusers' path; in SDXL adapters the LDM path
    text encoders       'lora_te_text_model_...'; in SDXL adapters 'lora_te1_', 'lora_te2_'

Metadata: kohya's `ss_*` keys and `modelspec.*`, all strings.
"""

import json
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Size, Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.formats import layer_tensors as parts_of
from lora_sd.formats.layer_tables import layer_shapes
from lora_sd.formats.ldm_names import unet_ldm_names
from lora_sd.parts import component_of, is_conv

PARTS = {
    "lora_down.weight": parts_of.DOWN,
    "lora_up.weight": parts_of.UP,
    "lora_mid.weight": parts_of.MID,
    "lora_A.weight": parts_of.DOWN,
    "lora_B.weight": parts_of.UP,
    "alpha": parts_of.ALPHA,
    "dora_scale": parts_of.MAGNITUDE,
}
PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}


def keys_of(shapes: Mapping[str, Size], is_sdxl: bool) -> dict[str, str]:
    """{full layer name: X} as kohya's tools write it (module docstring).

    Args:
        shapes: weight shape of each layer to name; of a UNet that is built like SDXL's and is not
            SDXL's own, as many of its layers as there are, as LDM's numbers depend on the layout.
    """
    ldm_paths = _ldm_paths(shapes) if is_sdxl else {}
    keys = {}
    for name in shapes:
        component, _, path = name.partition(".")
        prefix = PREFIXES[component][-1 if is_sdxl and component != "unet" else 0]
        keys[name] = prefix + ldm_paths.get(name, path).replace(".", "_")
    return keys


def known_keys(shapes: Mapping[str, Size]) -> dict[str, str]:
    """{X: full layer name} in every spelling that is in use; the first one is what we write.

    SDXL's UNet in diffusers' names (A1111 reads it so), 'lora_te1_' on SD 1.5, and text encoders
    without 'text_model_' are found in files besides kohya's own names.

    Args:
        shapes: weight shape of each layer of a model.
    """
    ldm_paths = _ldm_paths(shapes)
    known = {}
    for name in shapes:
        component, _, path = name.partition(".")
        paths = [path, path.removeprefix("text_model.")]
        if name in ldm_paths:
            paths.append(ldm_paths[name])
        for prefix in PREFIXES[component]:
            known.update({prefix + path.replace(".", "_"): name for path in paths})
    return known


def is_key(name: str) -> bool:
    """Whether a layer's name in a file is of this format."""
    return "." not in name and name.startswith(("lora_", "lycoris_"))


def split(tensor_name: str) -> tuple[str, str] | None:
    """(X, part) of a tensor's name; None when it is not one of this format's."""
    key, _, rest = tensor_name.partition(".")
    return (key, PARTS[rest]) if is_key(key) and rest in PARTS else None


def to_tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha stays float32.

    Up-biases and token tables have no place in it and are left out (`fitting_format`).
    """
    layers = {name: layer for name, layer in adapter.layers.items() if not layer.embedding}
    keys = keys_of({name: layer.weight_shape for name, layer in layers.items()}, adapter.is_sdxl)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{keys[name]}.lora_down.weight"] = layer.down.to(dtype)
        tensors[f"{keys[name]}.lora_up.weight"] = layer.up.to(dtype)
        tensors[f"{keys[name]}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[f"{keys[name]}.dora_scale"] = layer.magnitude.to(dtype)
    return tensors


def network_metadata(adapter: Adapter) -> dict[str, str]:
    """The `ss_network_*` keys that say what the tensors say: kohya's tools show them.

    Of differing ranks and alphas the most common one is told.
    """
    layers = adapter.layers.values()
    linear = [layer for layer in layers if not is_conv(layer.weight_shape)]
    conv = [layer for layer in layers if is_conv(layer.weight_shape)]
    rank, alpha = _most_common(linear or conv)
    arguments: dict[str, str] = {}
    if conv:
        conv_rank, conv_alpha = _most_common(conv)
        arguments |= {"conv_dim": str(conv_rank), "conv_alpha": f"{conv_alpha:g}"}
    magnitudes = [layer.magnitude for layer in layers if layer.magnitude is not None]
    if magnitudes:
        per_output = any(magnitude.shape[0] != 1 for magnitude in magnitudes)
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": str(per_output)}
    metadata = {
        "ss_network_module": "lycoris.kohya" if magnitudes else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }
    return {**metadata, "ss_network_args": json.dumps(arguments)} if arguments else metadata


def _ldm_paths(shapes: Mapping[str, Size]) -> dict[str, str]:
    """{full name: LDM path} of the UNet layers among these.

    SDXL's own layers are seen as part of the whole SDXL UNet, as an adapter may hold few of them.
    """
    unet = {name: shape for name, shape in shapes.items() if component_of(name) == "unet"}
    sdxl = layer_shapes("sdxl")
    layout = sdxl if all(sdxl.get(name) == shape for name, shape in unet.items()) else unet
    found = unet_ldm_names(name.removeprefix("unet.") for name in layout)
    return {
        name: found[name.removeprefix("unet.")]
        for name in unet
        if name.removeprefix("unet.") in found
    }


def _most_common(layers: list[LoRAWeights]) -> tuple[int, float]:
    """(rank, alpha) that most of the layers have."""
    return Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0][0]

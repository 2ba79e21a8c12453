"""kohya's adapter format, which A1111, Forge, ComfyUI, InvokeAI, kohya's tools and diffusers read.

Three tensors a layer: `X.lora_down.weight`, `X.lora_up.weight` and the 0-d `X.alpha`, where X is
`lora_unet_` and the diffusers path with dots as underscores. Metadata: kohya's `ss_*` keys and
`modelspec.*`, all strings.
"""

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.errors import AdapterError, shown_list

PREFIXES = {"unet": "lora_unet_"}
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def key_of(layer_name: str) -> str:
    """'unet.mid_block.attentions.0.proj_in' -> 'lora_unet_mid_block_attentions_0_proj_in'."""
    component, _, path = layer_name.partition(".")
    return PREFIXES[component] + path.replace(".", "_")


def to_tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha stays float32."""
    tensors = {}
    for name, layer in adapter.layers.items():
        key = key_of(name)
        tensors[f"{key}.{DOWN}"] = layer.down.to(dtype)
        tensors[f"{key}.{UP}"] = layer.up.to(dtype)
        tensors[f"{key}.{ALPHA}"] = torch.tensor(layer.alpha)
    return tensors


def from_tensors(
    tensors: dict[str, Tensor], metadata: dict[str, str], layer_names: Iterable[str], source: str
) -> Adapter:
    """The adapter in a kohya file, for a model with these layers.

    The model's own names are looked up, never guessed from the underscores. A layer without alpha
    is read as alpha = rank, and the metadata says so under 'lora_sd.note'.

    Args:
        source: the file's name, for messages.

    Raises:
        AdapterError: keys that belong to no layer of the model, or layers that are not whole.
    """
    names = {key_of(name): name for name in layer_names}
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for tensor_name, tensor in tensors.items():
        key, _, part = tensor_name.partition(".")
        if key in names and part in (DOWN, UP, ALPHA):
            parts.setdefault(key, {})[part] = tensor
        else:
            foreign.append(tensor_name)
    if foreign:
        raise AdapterError(
            f"'{source}' does not fit this model: {len(foreign)} of its {len(tensors)} tensors "
            f"belong to no layer of it, such as {shown_list(foreign, 2)}."
        )
    if not parts:
        raise AdapterError(f"'{source}' holds no adapter: it has no tensors.")
    halves = [key for key, found in parts.items() if DOWN not in found or UP not in found]
    if halves:
        raise AdapterError(
            f"'{source}' is not whole: {len(halves)} of its {len(parts)} layers lack lora_down or "
            f"lora_up, such as {shown_list(halves, 2)}."
        )
    layers, without_alpha = {}, 0
    for key, found in parts.items():
        down, up = found[DOWN], found[UP]
        if down.dim() not in (2, 4) or up.dim() != down.dim() or up.shape[1] != down.shape[0]:
            raise AdapterError(
                f"'{source}': the factors of '{key}' do not go together: lora_down is "
                f"{tuple(down.shape)}, lora_up is {tuple(up.shape)}."
            )
        without_alpha += ALPHA not in found
        alpha = float(found[ALPHA].item()) if ALPHA in found else float(down.shape[0])
        if alpha <= 0:
            raise AdapterError(f"'{source}': alpha of '{key}' is {alpha:g}; it must be above 0.")
        layers[names[key]] = LoRAWeights(down, up, alpha)
    if without_alpha:
        note = f"{without_alpha} layers have no alpha and were read as alpha = rank"
        metadata = {**metadata, "lora_sd.note": note}
    return Adapter(layers, metadata)


def network_metadata(adapter: Adapter) -> dict[str, str]:
    """The `ss_network_*` keys that say what the tensors say: kohya's tools show them."""
    linear = [layer for layer in adapter.layers.values() if layer.down.shape[2:] in ((), (1, 1))]
    conv = [layer for layer in adapter.layers.values() if layer.down.shape[2:] not in ((), (1, 1))]
    first = (linear or conv)[0]
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
    }
    if conv:
        extra = {"conv_dim": str(conv[0].rank), "conv_alpha": f"{conv[0].alpha:g}"}
        metadata["ss_network_args"] = json.dumps(extra)
    return metadata

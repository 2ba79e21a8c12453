"""diffusers' adapter format: PEFT's keys, and the alphas in the file's metadata.

A layer's tensors are `<full layer name>.lora_A.weight` (down) and `.lora_B.weight` (up), where it
applies `.lora_B.bias` and `.lora_magnitude_vector`; a token table's `.lora_embedding_A` and
`.lora_embedding_B`. `lora_adapter_metadata` is one JSON object with PEFT's LoraConfig of each
component, its fields named 'unet.r', 'unet.lora_alpha', ... Read besides: PEFT's own files
('base_model.model.'), and the keys of older diffusers (attention processors, 'lora_linear_layer').
"""

import json
import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.formats import layer_tensors as parts_of
from lora_sd.parts import component_of

CONFIG_KEY = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."
ENDINGS = {
    r"\.lora_(A|down)(\.default)?\.weight": parts_of.DOWN,
    r"\.lora_(B|up)(\.default)?\.weight": parts_of.UP,
    r"\.lora_B(\.default)?\.bias": parts_of.UP_BIAS,
    r"\.lora_embedding_A(\.default)?": parts_of.EMBEDDING_DOWN,
    r"\.lora_embedding_B(\.default)?": parts_of.EMBEDDING_UP,
    r"\.lora_magnitude_vector(\.default)?(\.weight)?": parts_of.PEFT_MAGNITUDE,
    r"\.dora_scale": parts_of.MAGNITUDE,
    r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight": parts_of.DOWN,
    r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight": parts_of.UP,
    r"\.alpha": parts_of.ALPHA,
}
OLD_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def known_keys(layer_names: Iterable[str]) -> dict[str, str]:
    """{layer's name in a file: full layer name} in every spelling that is in use.

    Found besides the full names: text encoders without 'text_model.', names without their
    component (of the UNet or the first text encoder), and older diffusers' names of attention.
    """
    known = {}
    for name in layer_names:
        component, _, path = name.partition(".")
        paths = {path, path.removeprefix("text_model.")}
        ending = path.rpartition(".")[2]
        if component == "unet" and path.endswith(".to_out.0"):
            paths.add(path.removesuffix(".0"))
        elif component != "unet" and ending in OLD_NAMES:
            paths |= {path.removesuffix(ending) + OLD_NAMES[ending] for path in set(paths)}
        known.update({f"{component}.{path}": name for path in paths})
        if component != "text_encoder_2":
            known.update({path: name for path in paths})
    return known


def split(tensor_name: str) -> tuple[str, str] | None:
    """(layer's name in the file, part) of a tensor's name; None when it is not of this format."""
    for ending, part in ENDINGS.items():
        found = re.search(rf"{ending}$", tensor_name)
        if found:
            name = tensor_name[: found.start()].removeprefix(PEFT_PREFIX)
            return name.replace(".processor.", "."), part
    return None


def to_tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a diffusers file.

    Where some layers of a component have an up-bias, the others without DoRA get one of zeros, as
    PEFT has them all or none. A magnitude for each input, which PEFT does not know, is a
    `dora_scale`.
    """
    with_bias = {
        component_of(name) for name, layer in adapter.layers.items() if layer.up_bias is not None
    }
    tensors = {}
    for name, layer in adapter.layers.items():
        if layer.embedding:
            tensors[f"{name}.lora_embedding_A"] = layer.down.to(dtype)
            tensors[f"{name}.lora_embedding_B"] = layer.up.to(dtype)
        else:
            tensors[f"{name}.lora_A.weight"] = layer.down.to(dtype)
            tensors[f"{name}.lora_B.weight"] = layer.up.to(dtype)
        if layer.up_bias is not None:
            tensors[f"{name}.lora_B.bias"] = layer.up_bias.to(dtype)
        elif component_of(name) in with_bias and not layer.embedding and layer.magnitude is None:
            tensors[f"{name}.lora_B.bias"] = torch.zeros(layer.up.shape[0], dtype=dtype)
        if layer.magnitude is not None:
            key, magnitude = _magnitude(name, layer.magnitude)
            tensors[key] = magnitude.to(dtype)
    return tensors


def holds_magnitudes(adapter: Adapter) -> bool:
    """Whether PEFT can express the adapter's DoRA: all layers of a component or none, by output."""
    per_component: dict[str, set[bool]] = {}
    for name, layer in adapter.layers.items():
        if layer.magnitude is not None and not _is_per_output(layer.magnitude):
            return False
        per_component.setdefault(component_of(name), set()).add(layer.magnitude is not None)
    return all(len(kinds) == 1 for kinds in per_component.values())


def lora_config(adapter: Adapter) -> str:
    """The value of `lora_adapter_metadata`, from which diffusers builds the layers.

    Only fields that every version of PEFT knows, unless a layer needs a newer one: PEFT refuses
    the file for a field unknown to it. Text encoders' paths are without 'text_model.', which some
    versions of transformers have and some have not; patterns fit both.
    """
    components: dict[str, dict[str, LoRAWeights]] = {}
    for name, layer in adapter.layers.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = layer
    config: dict[str, object] = {}
    for component, layers in components.items():
        rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
        fields: dict[str, object] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_pattern(p): w.rank for p, w in layers.items() if w.rank != rank},
            "alpha_pattern": {_pattern(p): w.alpha for p, w in layers.items() if w.alpha != alpha},
            "target_modules": sorted(path.removeprefix("text_model.") for path in layers),
        }
        if any(layer.up_bias is not None for layer in layers.values()):
            fields["lora_bias"] = True
        if any(layer.magnitude is not None for layer in layers.values()):
            fields["use_dora"] = True
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    return json.dumps(config, indent=2, sort_keys=True)


def _pattern(path: str) -> str:
    """A regular expression that fits one layer only: PEFT takes a pattern for a path's ending."""
    inside = path.removeprefix("text_model.")
    optional = r"(?:text_model\.)?" if inside != path else ""
    return f"^{optional}{re.escape(inside)}"


def _is_per_output(magnitude: Tensor) -> bool:
    return magnitude.shape[0] != 1


def _magnitude(name: str, magnitude: Tensor) -> tuple[str, Tensor]:
    """(key, tensor) of a layer's DoRA magnitude: PEFT's (out,), for convolutions (1, out, 1, 1).

    PEFT leaves '.weight' away; transformers 5 does not find a text encoder's then.
    """
    if not _is_per_output(magnitude):
        return f"{name}.dora_scale", magnitude
    ending = "" if component_of(name) == "unet" else ".weight"
    shape = (1, -1, 1, 1) if magnitude.dim() == 4 else (-1,)
    return f"{name}.lora_magnitude_vector{ending}", magnitude.reshape(shape)

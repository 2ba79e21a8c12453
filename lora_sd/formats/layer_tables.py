"""The layers of the model families that are known by name, with the shapes of their weights.

`layer_shapes.json` holds those of SD 1.5, SD 2.1 and SDXL: every linear and convolution layer and
the text encoders' token tables, as diffusers and transformers build them. tiny-sd's are read from
its own weights.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Size

from lora_sd.formats.safetensors_file import read_header
from lora_sd.known_bases import EMBEDDED
from lora_sd.parts import TOKENS

FAMILIES = ("tiny-sd", "sd15", "sd21", "sdxl")
DATA = Path(__file__).with_name("layer_shapes.json")


@cache
def layer_shapes(family: str) -> dict[str, Size]:
    """Weight shape of every layer that an adapter can have, by full layer name. Do not change it.

    Args:
        family: one of FAMILIES.
    """
    if family == "tiny-sd":
        return _tiny_sd()
    table = json.loads(DATA.read_text())[family]
    return {name: Size(shape) for name, shape in table.items()}


def family_of(shapes: Mapping[str, Size]) -> str:
    """The family whose UNet has these layers, by weight shapes of full layer names; '': none.

    Text encoders are not compared: single files of SD 2.1 hold a layer more than folders.
    """
    unet = {name: shape for name, shape in shapes.items() if name.startswith("unet.")}
    for family in FAMILIES:
        known = layer_shapes(family)
        if unet == {name: known[name] for name in known if name.startswith("unet.")}:
            return family
    return ""


def _tiny_sd() -> dict[str, Size]:
    unet = read_header(EMBEDDED["tiny-sd"] / "unet" / "diffusion_pytorch_model.safetensors").tensors
    text = read_header(EMBEDDED["tiny-sd"] / "text_encoder" / "model.safetensors").tensors
    tensors = {f"unet.{name}": entry for name, entry in unet.items()}
    for name, entry in text.items():
        tensors[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = entry
    return {
        name.removesuffix(".weight"): Size(entry.shape)
        for name, entry in tensors.items()
        if name.endswith(".weight")
        and len(entry.shape) > 1
        and (".embeddings." not in name or name.endswith(f"{TOKENS}.weight"))
    }

"""What a model is that cannot be used here, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Size

from lora_sd.base_files.original import UNET
from lora_sd.errors import BaseModelError, shown_list

WANTED = "only Stable Diffusion 1, 2 and XL can be used"
BY_CHANNELS = {  # what a UNet's input holds besides the noisy latents
    9: "an inpainting model: its UNet is also given a mask and a masked picture",
    5: "a depth-to-image model: its UNet is also given a depth map",
    8: "an InstructPix2Pix model: its UNet is also given a picture to change",
    7: "an upscaling model: its UNet is also given a small picture",
}
BY_KEY = {  # parts of tensor names that only one architecture has
    "double_blocks.": "Flux",
    "joint_blocks.": "Stable Diffusion 3",
    "noise_refiner.": "Lumina",
    "adaln_single.": "PixArt",
    "effnet.": "Stable Cascade",
}
REFINER_KEY = "conditioner.embedders.0.model."
REFINER_WIDTH = 384  # of the UNet's first layer; SDXL's base has 320


def foreign_file(keys: Sequence[str], has_unet: bool) -> str:
    """The rest of a sentence that tells what a foreign single file is, by its tensors' names."""
    for part, architecture in BY_KEY.items():
        if any(part in key for key in keys):
            return f"is a {architecture} model; {WANTED}."
    if has_unet or any(key.startswith(UNET) for key in keys):
        return (
            "is a checkpoint of another kind of model, whose layers are not those of Stable "
            "Diffusion 1, 2 or XL."
        )
    if any("lora_" in key for key in keys):
        return "is an adapter, not a base model."
    if any(key.startswith(("encoder.conv_in.", "first_stage_model.")) for key in keys):
        return "is a VAE, not a base model: name it as base.vae."
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in keys):
        return "is one part of a diffusers folder. Name the folder that holds model_index.json."
    return (
        f"is not a Stable Diffusion checkpoint: it has no '{UNET}...', but "
        f"{shown_list(keys, 2) or 'nothing'}."
    )


def check_folder(name: str, index: Mapping[str, Any]) -> None:
    """Raises BaseModelError where a folder's model_index.json names another kind of model."""
    unet = (index.get("unet") or [None, None])[-1]
    if unet != "UNet2DConditionModel":
        kind = index.get("_class_name") or "model"
        raise BaseModelError(f"'{name}' is a {kind} without Stable Diffusion's UNet; {WANTED}.")


def check_text_to_image(name: str, shapes: Mapping[str, Size], others: Sequence[str]) -> None:
    """Raises BaseModelError where a model's UNet is given more than noise and a text, or is SDXL's
    refiner.

    Args:
        shapes: of the model's tensors.
        others: keys of a single file that are not among them.
    """
    conv_in = shapes.get("unet.conv_in.weight")
    if conv_in is None:
        raise BaseModelError(f"'{name}' holds no UNet: 'unet.conv_in' is missing.")
    decoder = shapes.get("vae.decoder.conv_in.weight")
    latents = decoder[1] if decoder else 4
    if conv_in[1] != latents:
        what = BY_CHANNELS.get(
            conv_in[1],
            f"not a text-to-image model: its UNet is given more than latents of {latents} channels",
        )
        raise BaseModelError(
            f"'{name}' is {what} ({conv_in[1]} channels in all). Adapters are trained on "
            f"text-to-image models."
        )
    if conv_in[0] == REFINER_WIDTH or any(key.startswith(REFINER_KEY) for key in others):
        raise BaseModelError(f"'{name}' is SDXL's refiner; adapters belong to its base model.")
    if any(key.startswith("unet.class_embedding.") for key in shapes):
        raise BaseModelError(f"'{name}' is an unCLIP model: its UNet is also given a picture.")

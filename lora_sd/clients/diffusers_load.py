"""Really load an adapter file with diffusers, into a copy of a base model's structure."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from lora_sd.base_model import BaseModel

FLAT = "text_encoder.text_model."


def deltas_in_diffusers(path: Path, base: BaseModel) -> dict[str, Tensor]:
    """{full layer name: what diffusers adds to the layer's weight at scale 1} of a file.

    The base's own parts are left alone: the file goes into fresh ones of the same structure, with
    random weights.

    Raises:
        Exception: whatever diffusers or PEFT raise when they refuse the file.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        unet = type(base.unet).from_config(base.unet.config)
        text_encoder = type(base.text_encoder)(base.text_encoder.config)
        pipeline = StableDiffusionPipeline(
            vae=base.vae,
            text_encoder=text_encoder,
            tokenizer=base.tokenizer,
            unet=unet,
            scheduler=base.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="file")
    deltas = {}
    for component, model in (("unet", unet), ("text_encoder", text_encoder)):
        for name, module in model.named_modules():
            layer: Any = module
            if hasattr(layer, "get_delta_weight") and "file" in layer.scaling:
                full = f"{component}.{name}"
                if component == "text_encoder":
                    full = FLAT + name.removeprefix("text_model.")
                deltas[full] = layer.get_delta_weight("file").detach()
    return deltas


class _quiet:
    """Silence what diffusers and PEFT say of a file that is on trial."""

    def __enter__(self) -> None:
        self._level = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *error: object) -> None:
        diffusers_logging.set_verbosity(self._level)

"""Base models that are known without a look at their files: the one that ships with the project,
and the published families, Stable Diffusion 1.5, 2.1 and XL, whose configs `known_bases.json` holds
(the tables of Hugging Face's repositories). Light: it does without torch.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_sd.errors import BaseModelError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = {"tiny-sd": ASSETS / "tiny-sd"}
"""Models that ship with the project, by name."""
PUBLISHED = ("sd15", "sd21", "sdxl")
CLIP_TOKENIZER = ASSETS / "clip_tokenizer"
"""That of every published Stable Diffusion (`tools/clip_tokenizer.py` makes it)."""
CLIP_TOKENS = 49_408
HUB_ID = re.compile(r"\w[\w.\-]*/\w[\w.\-]*(?<!\.safetensors)(?<!\.ckpt)", re.ASCII)
"""How a model on Hugging Face's hub is named."""


@cache
def published_configs(family: str) -> Mapping[str, dict[str, Any]]:
    """Config of each part of 'sd15', 'sd21' or 'sdxl'. Do not change it."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    found: Mapping[str, dict[str, Any]] = table[family]
    return found


def size_step_px(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> int:
    """What the sides of pictures must be multiples of, so that the UNet can halve their latents.

    Raises:
        BaseModelError: a config does not say how many sizes of picture its part works at.
    """
    try:
        levels = [len(config["block_out_channels"]) for config in (unet_config, vae_config)]
    except (LookupError, TypeError):
        raise BaseModelError(
            "The base model's config of its UNet or its VAE is damaged: it has no list "
            "'block_out_channels'."
        ) from None
    return int(2 ** (sum(levels) - len(levels)))

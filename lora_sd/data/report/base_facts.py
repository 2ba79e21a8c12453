"""What the data report needs of a base model, found without loading it: which sizes pictures may
have, and how captions become tokens."""

import json
from dataclasses import dataclass, replace
from typing import Any

from lora_sd.errors import BaseModelError
from lora_sd.known_bases import (
    CLIP_TOKENIZER,
    EMBEDDED,
    PUBLISHED,
    published_configs,
    size_step_px,
)


@dataclass(frozen=True)
class BaseFacts:
    """`step_px` is what the sides of training pictures are multiples of; `notice` a sentence, where
    it is a guess."""

    step_px: int
    tokenizer: Any
    notice: str = ""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text each of its tokens begins and ends."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [(begin, end) for begin, end in encoded["offset_mapping"]]


def base_facts(model: str) -> BaseFacts:
    """Of a base model as `base.model` names it, or of a family: 'sd15', 'sd21', 'sdxl'. A model of
    the hub that is not on this machine is taken for one of the family that its name tells of.

    Raises:
        BaseModelError: it is not there, or no Stable Diffusion.
    """
    if model in EMBEDDED or model in PUBLISHED:
        return _known(model)
    from lora_sd.base_files import NotHere, open_base  # imports torch
    from lora_sd.base_files.tokenizers import load_tokenizers

    try:
        files = open_base(model)
        files.check_configs()
    except NotHere:
        family = family_by_name(model)
        notice = (
            f"The base model '{model}' is not on this machine yet. Going by its name, it was "
            f"taken for {family}; base.model {' or '.join(PUBLISHED)} says it for sure."
        )
        return replace(_known(family), notice=notice)
    except BaseModelError as error:
        hint = f"To check pictures without it, name its family: {', '.join(PUBLISHED)}."
        raise BaseModelError([*error.problems, hint]) from None
    step_px = size_step_px(files.config("unet"), files.config("vae"))
    return BaseFacts(step_px, load_tokenizers(files)["tokenizer"])


def _known(name: str) -> BaseFacts:
    """Of a model that needs no looking for, without importing torch."""
    from transformers import CLIPTokenizer  # slow to import too

    if folder := EMBEDDED.get(name):
        configs = {
            part: json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            for part in ("unet", "vae")
        }
        tokenizer = folder / "tokenizer"
    else:
        configs, tokenizer = dict(published_configs(name)), CLIP_TOKENIZER
    step_px = size_step_px(configs["unet"], configs["vae"])
    return BaseFacts(step_px, CLIPTokenizer.from_pretrained(str(tokenizer)))


def family_by_name(model: str) -> str:
    """The family that the name of a hub's model tells of."""
    return "sdxl" if "xl" in model.lower() else "sd15"

"""What the data report needs of a base model, found without loading it: which sizes pictures may
have, and how captions become tokens."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_sd.errors import BaseModelError

ROOT = Path(__file__).resolve().parents[3]
EMBEDDED = {"tiny-sd": ROOT / "assets" / "tiny-sd"}
CLIP_TOKENIZER = ROOT / "assets" / "clip_tokenizer"
STEPS_PX = {"sd15": 64, "sd21": 64, "sdxl": 32}
"""8 pixels a latent, times the UNet's halvings."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)", re.ASCII)


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
    from transformers import CLIPTokenizer  # slow to import; it leaves torch out

    folder, step_px, notice = EMBEDDED.get(model), STEPS_PX.get(model, 0), ""
    if not folder and not step_px:
        from lora_sd.base_files import open_base  # imports torch

        try:
            files = open_base(model)
            folder = files.path if files.is_folder else None
            step_px = STEPS_PX.get(files.family, 0)
        except BaseModelError as error:
            if not HUB_ID.fullmatch(model) or Path(model).exists():
                hint = f"To check pictures without it, name its family: {', '.join(STEPS_PX)}."
                raise BaseModelError([*error.problems, hint]) from None
            family = family_by_name(model)
            step_px = STEPS_PX[family]
            notice = (
                f"The base model '{model}' is not on this machine yet. Going by its name, it was "
                f"taken for {family}; base.model {' or '.join(STEPS_PX)} says it for sure."
            )
    if folder and not step_px:
        step_px = 2 ** (_levels(folder / "vae") + _levels(folder / "unet") - 2)
    own = folder / "tokenizer" if folder else CLIP_TOKENIZER
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(own if own.is_dir() else CLIP_TOKENIZER))
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"The tokenizer in '{own}' is damaged: {error}.") from None
    return BaseFacts(step_px or 64, tokenizer, notice)


def family_by_name(model: str) -> str:
    """The family that the name of a hub's model tells of."""
    return "sdxl" if "xl" in model.lower() else "sd15"


def _levels(part: Path) -> int:
    """How many sizes of picture a part works at, each half of the one before."""
    try:
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        return len(config["block_out_channels"])
    except (OSError, ValueError, LookupError, TypeError):
        raise BaseModelError(f"'{part / 'config.json'}' is missing or damaged.") from None

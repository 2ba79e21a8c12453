"""BLIP and Florence-2: captions in sentences, by transformers' own code."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from lora_sd.captioning.opening import (
    DETAILS,
    EXAMPLES,
    CaptionerFiles,
    CaptioningError,
    SentenceChoice,
)

BEAMS = 3


class SentenceCaptioner:
    """A loaded BLIP or Florence-2.

    Args:
        device: where it runs; in half precision on a GPU.

    Raises:
        CaptioningError: its files are incomplete or damaged.
    """

    def __init__(self, files: CaptionerFiles, choice: SentenceChoice, device: torch.device) -> None:
        from transformers import (
            AutoProcessor,
            BlipForConditionalGeneration,
            Florence2ForConditionalGeneration,
        )

        kinds: dict[str, Any] = {
            "blip": BlipForConditionalGeneration,
            "florence2": Florence2ForConditionalGeneration,
        }
        options = {"local_files_only": True, "trust_remote_code": False}
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        try:
            self._processor = AutoProcessor.from_pretrained(files.folder, **options)
            self._model, report = kinds[files.kind].from_pretrained(
                files.folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
            )
        except Exception as error:  # transformers raises anything on files that are not whole
            raise CaptioningError(f"'{files.name}' cannot be loaded: {_line(error)}.") from None
        if missing := report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}:
            raise CaptioningError(
                f"'{files.name}' lacks {len(missing)} of its weights, such as '{min(missing)}'. "
                f"Download it anew; Florence-2 must be in transformers' format, as "
                f"{EXAMPLES['florence2']} is."
            )
        self._model = self._model.to(device).eval()
        self._task = DETAILS[choice.detail] if files.kind == "florence2" else None
        self._max_tokens = choice.max_tokens

    @torch.no_grad()
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A sentence for each picture; beam search, so that the same picture gives the same."""
        asked = {"text": [self._task] * len(pictures)} if self._task else {}
        inputs = self._processor(images=list(pictures), return_tensors="pt", **asked)
        inputs = inputs.to(self._model.device, self._model.dtype)
        tokens = self._model.generate(
            **inputs, max_new_tokens=self._max_tokens, num_beams=BEAMS, do_sample=False
        )
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

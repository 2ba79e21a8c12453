"""A base model's tokenizers: its own, or CLIP's, which ships with the project."""

import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

from lora_sd.base_files.configs import TOKENIZERS
from lora_sd.base_files.files import BaseFiles
from lora_sd.errors import BaseModelError
from lora_sd.known_bases import CLIP_TOKENIZER, CLIP_TOKENS

PAD_OF_OPEN_CLIP = "!"
"""Token 0, with which OpenCLIP fills a text up: in SD 2, and in SDXL's second encoder."""


def load_tokenizers(files: BaseFiles) -> dict[str, CLIPTokenizer]:
    """The tokenizer of each text encoder: {'tokenizer': ..., 'tokenizer_2': ...}.

    Raises:
        BaseModelError: one is damaged, or missing and not CLIP's.
    """
    found = {}
    for name in TOKENIZERS:
        encoder = name.replace("tokenizer", "text_encoder")
        if files.has_component(encoder):
            found[name] = _load(files, name, int(files.config(encoder).get("vocab_size", 0)))
    return found


def _load(files: BaseFiles, name: str, wanted_tokens: int) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as scratch:
        folder = files.path / name if files.is_folder else Path(scratch)
        for file, text in files.packed_files(name).items():
            (folder / file).write_text(text, encoding="utf-8")
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            if wanted_tokens != CLIP_TOKENS:
                raise BaseModelError(
                    f"The base model '{files.name}' lacks its {name}, which is not CLIP's: its "
                    f"text encoder knows {wanted_tokens:,} tokens."
                )
            tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), local_files_only=True)
            if name == "tokenizer_2" or files.has_open_clip:
                # Set afterwards: named at the start, '!' in a text would become that token too.
                tokenizer.pad_token = PAD_OF_OPEN_CLIP
            return tokenizer
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BaseModelError(
                f"The {name} of the base model '{files.name}' is damaged: {reason}"
            ) from error
    if not 3 < len(tokenizer) <= wanted_tokens:
        raise BaseModelError(
            f"The {name} of the base model '{files.name}' knows {len(tokenizer):,} tokens, its "
            f"text encoder {wanted_tokens:,}: they do not belong together."
        )
    return tokenizer

"""Configs of a base model's parts: what says how to build them, beside their weights.

A diffusers folder has them. A single file has none: those of the published families ship with this
project, and a file that this project writes of any other model carries its own, and its tokenizers,
in its metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sd.errors import BaseModelError
from lora_sd.known_bases import CLIP_TOKENS, PUBLISHED, published_configs

METADATA_KEY = "lora_sd.model_files"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
Config = dict[str, Any]


def config_file(component: str) -> str:
    """Where a folder has a part's config: 'unet/config.json'."""
    return f"{component}/{'scheduler_' if component == 'scheduler' else ''}config.json"


def read_json(path: Path) -> Config:
    """A JSON object of a model's folder.

    Raises:
        BaseModelError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise BaseModelError(f"'{path}' is damaged: it is not a JSON object. Get the model again.")


def packed(folder: Path, family: str) -> dict[str, str]:
    """Metadata for the single file of a folder's model, from which the model can be built again;
    none where it is built just as the family's own."""
    configs = {
        name: read_json(folder / name)
        for name in map(config_file, COMPONENTS)
        if (folder / name).is_file()
    }
    if family in PUBLISHED and not _differ(configs, published_configs(family)):
        return {}
    files = {name: json.dumps(config) for name, config in configs.items()}
    has_own_tokens = any(
        config.get("vocab_size", CLIP_TOKENS) != CLIP_TOKENS for config in configs.values()
    )
    for name in TOKENIZERS if has_own_tokens else ():
        for file in TOKENIZER_FILES:
            if (folder / name / file).is_file():
                files[f"{name}/{file}"] = (folder / name / file).read_text(encoding="utf-8")
    return {METADATA_KEY: json.dumps(files)}


def _differ(configs: Mapping[str, Config], published: Mapping[str, Config]) -> bool:
    """Whether any published entry is missing or another here."""
    return any(
        configs.get(config_file(component), {}).get(key) != value
        for component, config in published.items()
        for key, value in config.items()
        if key != "_diffusers_version"
    )


def unpacked(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """{'unet/config.json': its text} of a single file's metadata; empty where it has none.

    Raises:
        BaseModelError: it is damaged.
    """
    if METADATA_KEY not in metadata:
        return {}
    configs = {*map(config_file, COMPONENTS)}
    known = configs | {f"{name}/{file}" for name in TOKENIZERS for file in TOKENIZER_FILES}
    try:
        files = json.loads(metadata[METADATA_KEY])
        whole = all(isinstance(json.loads(files[one]), dict) for one in configs & files.keys())
        are_texts = all(isinstance(text, str) for text in files.values())
        if whole and are_texts and files.keys() <= known:  # others could be paths to anywhere
            return dict(files)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise BaseModelError(f"'{name}' is damaged: '{METADATA_KEY}' in its metadata cannot be read.")

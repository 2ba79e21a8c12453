"""The tensors in a diffusers folder: which files hold them, and what they are called."""

import re
from pathlib import Path

from lora_sd.base_files import configs, pickles
from lora_sd.base_files.files import WEIGHTS, Entry
from lora_sd.base_files.original import Piece
from lora_sd.base_files.tensor_stream import read_header
from lora_sd.errors import BaseModelError, shown_list

VARIANT = re.compile(r"(\.\w+)?\.safetensors|\.safetensors\.index(\.\w+)?\.json")
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def folder_entries(component: str, folder: Path) -> list[Entry]:
    """The tensors in one component's folder.

    Raises:
        BaseModelError: there are none, or they are damaged.
    """
    entries = []
    for file in weight_files(folder, WEIGHTS[component]):
        for stored in read_header(file)[0]:
            name = f"{component}.{canonical_key(component, stored.key)}"
            entries.append(Entry(stored, Piece(stored.key, (name,))))
    return entries


def only_pickled(folder: Path, stem: str) -> Path | None:
    """The weights of a component's folder that has pickled ones alone."""
    stem = pickles.PICKLED_STEM.get(stem, stem)
    if any(folder.glob("*.safetensors*")):
        return None
    return min(
        (file for file in folder.glob(f"{stem}*.bin")), key=lambda p: len(p.name), default=None
    )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weights of one component: a file, or the shards that its index lists.

    Of several variants the plain one is taken, else the first by name ('fp16', 'non_ema').

    Raises:
        BaseModelError: there are none, or a shard is missing.
    """
    found = [VARIANT.fullmatch(file.name.removeprefix(stem)) for file in folder.glob(f"{stem}.*")]
    for variant in sorted({match[1] or match[2] or "" for match in found if match}):
        whole = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            names = sorted(set(configs.read_json(index).get("weight_map", {}).values()))
            shards = [folder / Path(name).name for name in names]
            missing = [str(shard) for shard in shards if not shard.is_file()]
            if missing:
                raise BaseModelError(f"The base model lacks {shown_list(missing)}. Get it again.")
            return shards
    raise BaseModelError(f"'{folder}' holds no weights: '{stem}.safetensors' is missing.")


def canonical_key(component: str, key: str) -> str:
    """A folder's key as this project names it, whichever library version wrote it."""
    if component == "vae" and ".attentions." in key:
        head, _, part = key.rpartition(".")
        stem, _, last = head.rpartition(".")
        return f"{stem}.{OLD_VAE_ATTENTION.get(last, last)}.{part}"
    if component.startswith("text_encoder") and not key.startswith(
        ("text_model.", "text_projection.")
    ):
        return f"text_model.{key}"
    return key

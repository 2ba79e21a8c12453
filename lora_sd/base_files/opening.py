"""Find and open a base model's files, and check that they are a Stable Diffusion's."""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from lora_sd.base_files.original import OPEN_CLIP, UNET, Piece, from_original
from lora_sd.base_files.tensor_stream import StoredTensor, read_header
from lora_sd.errors import BaseModelError, shown_list
from lora_sd.formats.layer_tables import EMBEDDED, family_of

WEIGHTS = {  # component: name of its weights, without '.safetensors'
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
VARIANT = re.compile(r"(\.\w+)?\.safetensors|\.safetensors\.index(\.\w+)?\.json")
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
HUB_ID = re.compile(r"\w[\w.\-]*/\w[\w.\-]*", re.ASCII)
PICKLED = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, and which of the model's tensors it holds."""

    stored: StoredTensor
    piece: Piece

    @property
    def shape(self) -> Size:
        """Shape of each of the model's tensors in it."""
        return self.piece.split_shape(self.stored.shape)


class BaseFiles:
    """A base model on disk; use `open_base`.

    Tensors are named as in `original` ('unet.conv_in.weight'), layers as in `adapter`
    ('unet.conv_in').

    Attributes:
        name: what the user called it.
        path: the folder or file.
        entries: its tensors in the files' order.
        rest: tensors of a single file that are no part of a diffusers model, such as the EMA copy.
        metadata: of a single file.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        entries: list[Entry],
        rest: list[StoredTensor],
        metadata: dict[str, str],
    ) -> None:
        self.name, self.path, self.metadata = name, path, metadata
        self.entries, self.rest = entries, rest
        self._at = {
            name: (entry, number)
            for entry in entries
            for number, name in enumerate(entry.piece.names)
        }

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def tensor_shapes(self) -> dict[str, Size]:
        """Shape of every tensor of the model, by its name."""
        return {name: entry.shape for name, (entry, _) in self._at.items()}

    @cached_property
    def shapes(self) -> dict[str, Size]:
        """Weight shape of every layer that an adapter can have: linear layers, convolutions and
        token tables of the UNet and the text encoders, by full layer name."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.tensor_shapes.items()
            if name.endswith(".weight")
            and len(shape) in (2, 4)
            and not name.startswith("vae.")
            and not name.endswith(".position_embedding.weight")
        }

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in its file."""
        return self._at[name][0].stored.dtype

    def read(self, layer: str) -> Tensor:
        """The weight of a layer, in the file's dtype."""
        return self.tensor(f"{layer}.weight")

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name; of stacked ones, only that part is read."""
        entry, number = self._at[name]
        if entry.piece.kind == "stacked":
            rows = entry.shape[0]
            return entry.stored.read(number * rows, rows)
        return entry.piece.split(entry.stored.read())[0]

    def has_component(self, component: str) -> bool:
        """Whether it has any weights of 'text_encoder_2', say."""
        return any(name.startswith(f"{component}.") for name in self.tensor_shapes)

    @cached_property
    def has_open_clip(self) -> bool:
        """Whether `text_encoder` is an OpenCLIP model, as in Stable Diffusion 2."""
        if self.is_folder:
            return self.config("text_encoder").get("hidden_act") == "gelu"
        return any(entry.stored.key.startswith([*OPEN_CLIP][0]) for entry in self.entries)

    def config(self, component: str) -> dict[str, Any]:
        """The config of a folder's component, {} where there is none."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.path / component / name
        return _read_json(path) if path.is_file() else {}

    @cached_property
    def family(self) -> str:
        """'tiny-sd', 'sd15', 'sd21' or 'sdxl', by the shapes of the UNet's layers, or ''."""
        return family_of(self.shapes)


def open_base(name: str) -> BaseFiles:
    """Open a base model's files and check that they are a text-to-image Stable Diffusion's.

    Args:
        name: 'tiny-sd', the path of a diffusers folder, or of a `.safetensors` checkpoint in the
            original layout, or the hub id of a model in Hugging Face's cache on this machine;
            nothing is fetched. Of a folder's variants the plain one is taken, else the one there
            is.

    Raises:
        BaseModelError: not there, damaged, pickled, or something else than such a model.
    """
    path = EMBEDDED.get(name, Path(os.path.expanduser(name)))
    try:
        path.stat()
    except FileNotFoundError:
        base = _open_cached(name)
        _check(base)
        return base
    except (OSError, ValueError) as error:  # too long a name, no right to look, a null character
        reason = getattr(error, "strerror", None) or error
        raise BaseModelError(f"The base model '{name}' cannot be opened: {reason}.") from None
    if path.is_dir():
        base = _open_folder(name, path)
    elif path.suffix.lower() in PICKLED:
        raise BaseModelError(
            f"'{name}' is a pickled checkpoint, which can run any program when it is read. Get the "
            f"model as .safetensors."
        )
    else:
        base = _open_single_file(name, path)
    _check(base)
    return base


def _open_cached(hub_id: str) -> BaseFiles:
    """Open a hub id's model in Hugging Face's cache; the network is not asked."""
    if not HUB_ID.fullmatch(hub_id):
        raise BaseModelError(
            f"There is no base model '{hub_id}'. Name a diffusers folder, a .safetensors "
            f"checkpoint, or {shown_list(list(EMBEDDED))}."
        )
    # Slow to import, and only wanted here.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(hub_id, "model_index.json")
    except HFValidationError:
        index = None
    if not isinstance(index, str):
        raise BaseModelError(
            f"There is no base model '{hub_id}' on this machine yet: it is no path, and is not in "
            f"Hugging Face's cache. The first training with it fetches a model of the hub."
        )
    try:
        return _open_folder(hub_id, Path(index).parent)
    except BaseModelError as error:
        raise BaseModelError(
            [f"The base model '{hub_id}' is on this machine in part only.", *error.problems]
        ) from None


def _open_folder(name: str, path: Path) -> BaseFiles:
    if not (path / "model_index.json").is_file():
        raise BaseModelError(
            f"'{name}' is not a diffusers folder: it holds no model_index.json. Name the folder "
            f"that does, or a .safetensors checkpoint."
        )
    index = _read_json(path / "model_index.json")
    entries, problems = [], []
    for component in WEIGHTS:
        if not index.get(component, [None])[0]:
            continue
        try:
            for file in weight_files(path / component, WEIGHTS[component]):
                for stored in read_header(file)[0]:
                    canonical = f"{component}.{_canonical(component, stored.key)}"
                    entries.append(Entry(stored, Piece(stored.key, (canonical,))))
        except BaseModelError as error:
            problems += error.problems
    if problems:
        raise BaseModelError(problems)
    return BaseFiles(name, path, entries, [], {})


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weights of one component: a file, or the shards that its index lists.

    Of several variants the plain one is taken, else the first by name ('fp16', 'non_ema').

    Raises:
        BaseModelError: there are none, only pickled ones, or a shard is missing.
    """
    found = [VARIANT.fullmatch(file.name.removeprefix(stem)) for file in folder.glob(f"{stem}.*")]
    for variant in sorted({match[1] or match[2] or "" for match in found if match}):
        whole = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            shards = [folder / Path(name).name for name in names]
            missing = [str(shard) for shard in shards if not shard.is_file()]
            if missing:
                raise BaseModelError(f"The base model lacks {shown_list(missing)}. Get it again.")
            return shards
    if any(file.suffix in PICKLED for file in folder.glob("*")):
        raise BaseModelError(
            f"'{folder}' holds pickled weights only, which can run any program when they are read. "
            f"Get the model as .safetensors."
        )
    raise BaseModelError(f"'{folder}' holds no weights: '{stem}.safetensors' is missing.")


def _canonical(component: str, key: str) -> str:
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


def _open_single_file(name: str, path: Path) -> BaseFiles:
    stored, metadata = read_header(path)
    by_key = {one.key: one for one in stored}
    pieces, rest = from_original({key: one.shape for key, one in by_key.items()})
    strange = [key for key in rest if key.startswith(UNET)]
    unet = [piece for piece in pieces if piece.key.startswith(UNET)]
    if strange or not unet:
        raise BaseModelError(f"'{name}' {_what_is(list(by_key), bool(unet))}")
    entries = [Entry(by_key[piece.key], piece) for piece in pieces]
    return BaseFiles(name, path, entries, [by_key[key] for key in rest], metadata)


def _what_is(keys: list[str], has_unet: bool) -> str:
    """The rest of a sentence that tells what a foreign file is."""
    if has_unet or any(key.startswith(UNET) for key in keys):
        return (
            "is a checkpoint of another kind of model, whose layers are not those of Stable "
            "Diffusion 1, 2 or XL."
        )
    if any("lora_" in key for key in keys):
        return "is an adapter, not a base model."
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in keys):
        return "is one part of a diffusers folder. Name the folder that holds model_index.json."
    return (
        f"is not a Stable Diffusion checkpoint: it has no '{UNET}...', but "
        f"{shown_list(keys, 2) or 'nothing'}."
    )


def _check(base: BaseFiles) -> None:
    """Refuses what is no text-to-image model, and what lacks weights."""
    conv_in = base.shapes.get("unet.conv_in")
    if conv_in is None:
        raise BaseModelError(f"'{base.name}' holds no UNet: 'unet.conv_in' is missing.")
    decoder = base.tensor_shapes.get("vae.decoder.conv_in.weight")
    latents = decoder[1] if decoder else 4
    if conv_in[1] != latents:
        raise BaseModelError(
            f"'{base.name}' is not a text-to-image model: its UNet takes {conv_in[1]} channels and "
            f"its latents have {latents} (9 means inpainting)."
        )
    refiner = "conditioner.embedders.0.model."
    if any(stored.key.startswith(refiner) for stored in base.rest):
        raise BaseModelError(f"'{base.name}' is SDXL's refiner; adapters belong to its base model.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise BaseModelError(f"'{path}' is damaged: it is not a JSON object. Get the model again.")

"""A base model's files, opened: its tensors by name, and its configs; nothing is loaded."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from lora_sd.base_files import configs
from lora_sd.base_files.original import OPEN_CLIP, Piece
from lora_sd.base_files.tensor_stream import StoredTensor
from lora_sd.errors import BaseModelError, shown_list
from lora_sd.formats.layer_tables import family_of
from lora_sd.known_bases import PUBLISHED, published_configs

WEIGHTS = {  # component: name of its weights, without '.safetensors'
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


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
        """The config of a component or of the scheduler: a folder's, what a single file carries in
        its metadata, or its family's; {} where there is none."""
        name = configs.config_file(component)
        if self.is_folder:
            path = self.path / name
            return configs.read_json(path) if path.is_file() else {}
        if self._packed:
            return dict(json.loads(self._packed.get(name, "{}")))
        known = self.family in PUBLISHED
        return dict(published_configs(self.family).get(component, {})) if known else {}

    def missing_configs(self) -> list[str]:
        """Configs that would be wanted to build the model, by their place in a folder."""
        parts = [component for component in WEIGHTS if self.has_component(component)]
        return [configs.config_file(one) for one in (*parts, "scheduler") if not self.config(one)]

    def check_configs(self) -> None:
        """Raises BaseModelError where the model does not say how its parts are built."""
        missing = self.missing_configs()
        if missing and self.is_folder:
            raise BaseModelError(
                f"The base model '{self.name}' lacks {shown_list(missing)}. Get it again."
            )
        if missing:
            raise BaseModelError(
                f"'{self.name}' is of no published family (SD 1, SD 2, SDXL) and does not say how "
                f"it is built. Name its diffusers folder, or a file that this project's `bake` "
                f"made of it."
            )

    def packed_files(self, folder: str) -> dict[str, str]:
        """{name: text} of a folder's files that a single file carries in its metadata."""
        inside = f"{folder}/"
        return {
            name.removeprefix(inside): text
            for name, text in self._packed.items()
            if name.startswith(inside)
        }

    @property
    def has_configs(self) -> bool:
        """Whether the model's files say how it is built, rather than its family alone."""
        return self.is_folder or bool(self._packed)

    @cached_property
    def _packed(self) -> dict[str, str]:
        return configs.unpacked(self.metadata, self.name)

    @cached_property
    def family(self) -> str:
        """'tiny-sd', 'sd15', 'sd21' or 'sdxl', by the shapes of the UNet's layers, or ''."""
        return family_of(self.shapes)

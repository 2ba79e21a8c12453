"""The names and shapes of layers that each client knows, for the base models that ship here."""

import json
import lzma
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_sd.clients.outline import Shape

FOLDER = Path(__file__).parent / "tables"
TABLES = ("sd15", "sd21", "sdxl")


class Module(NamedTuple):
    """A module of diffusers' models: its class, and the shape of its weight."""

    kind: str
    shape: Shape

    @property
    def takes_lora(self) -> bool:
        return self.kind in ("Linear", "Conv2d")


class Target(NamedTuple):
    """What a key of ComfyUI or Forge acts on; shape None: their model has no such weight."""

    weight: str
    shape: Shape | None


class A1111Layer(NamedTuple):
    """What a key of A1111 acts on: its module's name and class, whether that takes a LoRA, and
    which projection of an OpenCLIP attention it is."""

    layer: str
    kind: str
    shape: Shape | None
    takes_lora: bool
    projection: str | None


@dataclass(frozen=True)
class Tables:
    """Keys are what stands before '.lora_down' and the like in a file.

    Attributes:
        family: 'sd15', 'sd21', 'sdxl', or another, whose tables are a stand-in.
        is_sdxl: whether kohya's files name the UNet's layers in the LDM way.
        modules: component -> path as in files ('text_model.encoder...') -> module.
    """

    family: str
    is_sdxl: bool
    modules: dict[str, dict[str, Module]]
    comfy: dict[str, Target]
    forge: dict[str, Target]
    a1111: dict[str, A1111Layer]
    invoke: dict[str, Shape]
    kohya: dict[str, Shape]

    @cached_property
    def unet_layers(self) -> dict[str, Shape]:
        """'lora_unet_' and the diffusers path of each linear and convolution layer -> shape."""
        return {
            "lora_unet_" + path.replace(".", "_"): module.shape
            for path, module in self.modules.get("unet", {}).items()
            if module.takes_lora
        }

    @cached_property
    def ldm_names(self) -> dict[str, str]:
        """'lora_unet_' and the LDM path -> the same with the diffusers path."""
        keys_of: dict[str, list[str]] = {}
        for key, target in self.comfy.items():
            if key.startswith("lora_unet_") and target.shape is not None:
                keys_of.setdefault(target.weight, []).append(key)
        return {
            other: key
            for key in self.unet_layers
            for other in keys_of.get(self.comfy[key].weight, [])
            if other not in self.unet_layers and "class_embedding" not in other
        }

    @cached_property
    def text_layers(self) -> dict[str, Shape]:
        """kohya's key of each linear layer of the text encoders -> shape."""
        return {k: m.shape for k, m in self.text_modules.items() if m.kind == "Linear"}

    @cached_property
    def text_modules(self) -> dict[str, Module]:
        """kohya's key of each module of the text encoders."""
        first = "lora_te1_" if self.is_sdxl else "lora_te_"
        return {
            prefix + path.replace(".", "_"): module
            for component, prefix in (("text_encoder", first), ("text_encoder_2", "lora_te2_"))
            for path, module in self.modules.get(component, {}).items()
        }

    @cached_property
    def text_paths(self) -> dict[tuple[str, str], Module]:
        """The text encoders' modules by component and path with underscores."""
        return {
            (component, path.replace(".", "_")): module
            for component in ("text_encoder", "text_encoder_2")
            for path, module in self.modules.get(component, {}).items()
        }


@lru_cache(maxsize=3)
def load_tables(family: str) -> Tables:
    """The tables of 'sd15', 'sd21' or 'sdxl'."""
    raw = json.loads(lzma.decompress((FOLDER / f"{family}.json.xz").read_bytes()))
    unet = _targets(raw["comfy_unet"])
    return Tables(
        family=family,
        is_sdxl=family == "sdxl",
        modules={
            component: {path: Module(kind, tuple(shape)) for path, kind, shape in rows}
            for component, rows in raw["modules"].items()
        },
        comfy={**unet, **_targets(raw["comfy_text"])},
        forge={**unet, **_targets(raw["forge_text"])},
        a1111={
            key: A1111Layer(layer, kind, _shape(shape), takes_lora, projection)
            for key, (layer, kind, shape, takes_lora, projection) in raw["a1111"].items()
        },
        invoke={key: tuple(shape) for key, shape in raw["invoke"].items()},
        kohya={key: tuple(shape) for key, shape in raw["kohya"].items()},
    )


def _shape(shape: list[int] | None) -> Shape | None:
    return None if shape is None else tuple(shape)


def _targets(rows: dict[str, Any]) -> dict[str, Target]:
    return {key: Target(weight, _shape(shape)) for key, (weight, shape) in rows.items()}

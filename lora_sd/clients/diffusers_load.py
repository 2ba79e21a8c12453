"""Really load an adapter file with diffusers, into a copy of a base model's structure."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from lora_sd.base_model import BaseModel


class LoadedLayer(NamedTuple):
    """What a layer became in diffusers: alpha / rank * up @ down, and its DoRA magnitude."""

    low_rank: Tensor
    magnitude: Tensor | None


def load_in_diffusers(path: Path, base: BaseModel) -> dict[str, LoadedLayer]:
    """What diffusers makes of a file, by full layer name.

    The base's own parts are left alone: the file goes into fresh ones of the same structure, with
    random weights.

    Raises:
        Exception: whatever diffusers or PEFT raise when they refuse the file.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        fresh: dict[str, Any] = {"unet": type(base.unet).from_config(base.unet.config)}
        for name, part in base.components.items():
            if name != "unet":
                fresh[name] = type(part)(part.config)
        pipeline = base.pipeline(**fresh)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="file")
    loaded = {}
    for component, model in fresh.items():
        for name, module in model.named_modules():
            layer: Any = module
            if hasattr(layer, "get_delta_weight") and "file" in layer.scaling:
                full = f"{component}.{name}"
                if component != "unet":
                    full = f"{component}.text_model.{name.removeprefix('text_model.')}"
                dora = layer.lora_magnitude_vector
                magnitude = dora["file"].weight.detach() if "file" in dora else None
                loaded[full] = LoadedLayer(layer.get_delta_weight("file").detach(), magnitude)
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers and PEFT say of a file that is on trial."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)

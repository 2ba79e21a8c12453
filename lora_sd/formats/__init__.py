"""File <-> Adapter. Each format has a module; what the file is, its keys say."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Size

from lora_sd.adapter import Adapter
from lora_sd.formats import kohya
from lora_sd.formats.safetensors_file import read_tensors, write_tensors


def save_adapter(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write an adapter in kohya's format, whole or not at all.

    Raises:
        AdapterError: a value is not finite, or becomes infinite in `dtype`.
        UserError: the file cannot be written.
    """
    metadata = {**kohya.network_metadata(adapter), **adapter.metadata}
    write_tensors(path, kohya.to_tensors(adapter, dtype), metadata)


def load_adapter(path: Path, shapes: Mapping[str, Size]) -> Adapter:
    """Read an adapter file for a model.

    Args:
        shapes: weight shape of each layer of the model (`inject.layer_shapes`).

    Raises:
        AdapterError: the file is damaged, foreign or for another model; it fits wholly or is
            refused.
    """
    tensors, metadata = read_tensors(path)
    adapter = kohya.from_tensors(tensors, metadata, shapes, str(path))
    adapter.check_fits(shapes, str(path))
    return adapter

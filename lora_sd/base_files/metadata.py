"""What files made from a base model say of it: kohya's `ss_*` keys in adapters, Stability's
ModelSpec 1.0.1 in checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from lora_sd.base_files import configs
from lora_sd.base_files.files import BaseFiles
from lora_sd.base_files.prediction import said
from lora_sd.formats import versions
from lora_sd.formats.versions import ARCHITECTURES

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


def kohya_version(base: BaseFiles) -> str:
    """`ss_base_model_version`, or the model's own name where it is none that kohya knows."""
    prediction_type = said(base)[0] or "epsilon"
    return versions.kohya_version(base.family, prediction_type) or Path(base.name).stem


def adapter_metadata(base: BaseFiles) -> dict[str, str]:
    """What an adapter for this model says of it."""
    return versions.adapter_metadata(kohya_version(base))


def checkpoint_metadata(base: BaseFiles, title: str, adapters: Sequence[str]) -> dict[str, str]:
    """What a checkpoint made of this model and these adapters says, besides what the model's own
    file said. No date is in it, so that the same sources give the same file."""
    stale = ("format", "modelspec.hash_sha256", "modelspec.date")
    metadata = {key: value for key, value in base.metadata.items() if key not in stale}
    metadata |= {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.merged_from": ", ".join([Path(base.name).stem, *adapters]),
    }
    prediction = said(base)[0] or ("" if base.family == "sd21" else "epsilon")
    if prediction and (architecture := ARCHITECTURES.get(kohya_version(base))):
        metadata["modelspec.architecture"] = architecture
        metadata["modelspec.prediction_type"] = "v" if prediction == "v_prediction" else "epsilon"
    if base.is_folder:
        metadata |= configs.packed(base.path, base.family)
    return metadata

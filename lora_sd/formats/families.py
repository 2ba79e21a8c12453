"""Families of models that are known by name: their layers, and which one an adapter is for."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError, shown_list
from lora_sd.formats.kohya import keys_of
from lora_sd.formats.layer_tables import FAMILIES, layer_shapes
from lora_sd.formats.layer_tensors import flat, is_whole, weight_shape
from lora_sd.formats.reading import known_keys, load_adapter, sort_names
from lora_sd.formats.safetensors_file import read_header

__all__ = ["FAMILIES", "detect_family", "layer_shapes", "load_any"]

ARCHITECTURES = {
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-v2": "sd21",
    "stable-diffusion-v1": "sd15",
}


def load_any(path: Path, allow_partial: bool = False) -> tuple[Adapter, str]:
    """(adapter, family) of a file, for tools that have no model.

    Raises:
        AdapterError: as `load_adapter` and `detect_family`.
    """
    family = detect_family(path)
    return load_adapter(path, layer_shapes(family), allow_partial), family


def detect_family(path: Path) -> str:
    """The family whose layers an adapter file's layers are, by names and shapes.

    Where several families have them all, kohya's naming decides, then the metadata. A file that
    fits none wholly counts to the one that most of its layers fit. No values are read.

    Raises:
        AdapterError: the file is damaged, for an unknown model, or could be for several.
    """
    header = read_header(path)
    if not header.tensors:
        raise AdapterError(f"'{path}' holds no adapter: it has no tensors.")
    names = sort_names(header.tensors)
    shapes = {
        key: weight_shape({part: header.tensors[tensor].shape for part, tensor in parts.items()})
        for key, parts in names.layers.items()
        if is_whole(parts)
    }
    fitting = {family: _count_fitting(family, shapes) for family in FAMILIES}
    best = [family for family in FAMILIES if fitting[family] == max(fitting.values())]
    most, _ = max(fitting.values())
    if not shapes and names.twice:
        twice = shown_list(sorted(names.twice), 2)
        raise AdapterError(f"'{path}' holds its layers twice, under different names: {twice}.")
    if not shapes and not names.other_kinds:
        raise AdapterError(
            f"'{path}' holds no layer with both of an adapter's factors, but tensors such as "
            f"{shown_list(sorted(header.tensors), 2)}."
        )
    if 2 * most <= len(shapes):
        kinds = ", ".join(sorted(names.other_kinds))
        raise AdapterError(
            f"'{path}' is an adapter of the kind {kinds}; only LoRA, LoCon and DoRA can be read."
            if kinds
            else f"'{path}' is for no model that is known here ({', '.join(FAMILIES)}): at most "
            f"{most} of its {len(shapes)} layers fit one of them."
        )
    said = _said_family(header.metadata)
    if said in best:
        return said
    if len(best) > 1:
        raise AdapterError(
            f"'{path}' fits {' and '.join(best)} alike, and its metadata does not say which it was "
            f"made for. Say so with --base {best[0]}, for example."
        )
    return best[0]


def _count_fitting(family: str, shapes: Mapping[str, tuple[int, ...] | None]) -> tuple[int, int]:
    """How many of a file's layers are a family's by name and shape, and how many of these are
    named as kohya's tools name them for it: 'lora_te_' is SD 1.5's, 'lora_te1_' SDXL's."""
    known, own = _known_shapes(family), _own_keys(family)
    fitting = [key for key, shape in shapes.items() if key in known and known[key] == shape]
    return len(fitting), sum(key in own for key in fitting)


@cache
def _known_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """{layer's name in a file: shape of its weight, without a 1 x 1 kernel}."""
    shapes = layer_shapes(family)
    return {key: flat(shapes[name]) for key, name in known_keys(shapes).items()}


@cache
def _own_keys(family: str) -> frozenset[str]:
    return frozenset(keys_of(layer_shapes(family), is_sdxl=family == "sdxl").values())


def _said_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata names, if any."""
    version = metadata.get("ss_base_model_version", "")
    if version in FAMILIES:
        return version
    if version.startswith("sdxl"):
        return "sdxl"
    if version.startswith("sd_v2") or metadata.get("ss_v2") == "True":
        return "sd21"
    if version.startswith("sd_v1"):
        return "sd15"
    architecture = metadata.get("modelspec.architecture", "")
    return next((f for start, f in ARCHITECTURES.items() if architecture.startswith(start)), None)

"""An adapter file as the verbs take it: read for the family of models that it was made for."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_sd.adapter import Adapter


@dataclass(frozen=True)
class Source:
    """An adapter file, read.

    Attributes:
        family: one of `formats.families.FAMILIES`, or 'custom' for another model's.
        format: 'kohya' or 'diffusers', whose names its tensors have.
        dtype: precision of its factors; the widest where they differ.
    """

    path: Path
    adapter: "Adapter"
    family: str
    format: str
    dtype: "torch.dtype"

    @property
    def notes(self) -> list[str]:
        """What was read otherwise than the file says, for the user."""
        from lora_sd.formats.reading import NOTE

        note = self.adapter.metadata.get(NOTE)
        return [f"'{self.path}': {note}"] if note else []

    def chosen_dtype(self, name: str | None) -> "torch.dtype":
        """The dtype of that name ('float16'), or the source's own for None."""
        import torch

        return self.dtype if name is None else getattr(torch, name)


def read_source(path: Path, base: str | None = None, allow_partial: bool = False) -> Source:
    """Read an adapter file.

    Args:
        base: its base model or family, where the file's layers do not tell: 'tiny-sd', 'sd15',
            'sd21', 'sdxl', a diffusers folder or a .safetensors file.

    Raises:
        AdapterError: it is damaged, does not fit the base, or belongs to no family that is known.
        BaseModelError: the base cannot be read.
    """
    import torch

    from lora_sd.base_files import open_base
    from lora_sd.formats import load_adapter
    from lora_sd.formats.families import FAMILIES, layer_shapes, load_any

    if base is None:
        adapter, family = load_any(path, allow_partial)
    elif base in FAMILIES:
        adapter, family = load_adapter(path, layer_shapes(base), allow_partial), base
    else:
        files = open_base(base)
        adapter, family = load_adapter(path, files.shapes, allow_partial), files.family or "custom"
    dtypes = {factor.dtype for w in adapter.layers.values() for factor in (w.down, w.up)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return Source(path, adapter, family, format_of(path), dtype)


def format_of(path: Path) -> str:
    """'kohya' or 'diffusers', by the names of an adapter file's tensors."""
    from lora_sd.formats.safetensors_file import read_header

    names = read_header(path).tensors
    return "kohya" if any(name.startswith(("lora_", "lycoris_")) for name in names) else "diffusers"


def named_for(metadata: dict[str, str], family: str) -> dict[str, str]:
    """The metadata, saying also which family it is for where it did not: A1111 hides adapters that
    it takes for another family's."""
    from lora_sd.formats.versions import ARCHITECTURES, VERSIONS

    if "ss_base_model_version" in metadata or family not in VERSIONS:
        return metadata
    version = VERSIONS[family]
    return {
        "modelspec.architecture": f"{ARCHITECTURES[version]}/lora",
        "ss_v2": str(family == "sd21"),
        **metadata,
        "ss_base_model_version": version,
    }


def write_result(
    adapter: "Adapter", path: Path, dtype: "torch.dtype", format: str, family: str
) -> list[str]:
    """Write what a verb made of adapters, in that format or in one that holds all of it; notices
    for the user. The name in A1111's list becomes the file's own."""
    from lora_sd.adapter import Adapter
    from lora_sd.formats import save_adapter

    metadata = {**named_for(adapter.metadata, family), "ss_output_name": path.stem}
    return save_adapter(Adapter(adapter.layers, metadata), path, dtype, format)


def size_in_mb(path: Path) -> str:
    """'4.3 MB'."""
    return f"{path.stat().st_size / 1e6:.2f} MB"

"""Adapter files as the verbs take them, read for the family of models that they were made for, and
as they write them: read back at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from lora_sd.adapter import Adapter
    from lora_sd.base_files import BaseFiles


@dataclass(frozen=True)
class Source:
    """An adapter file, read.

    Attributes:
        family: one of `formats.families.FAMILIES`, or 'custom' for another model's.
        shapes: weight shape of each layer of the model that it was read for.
        format: 'kohya' or 'diffusers', whose names its tensors have.
        dtype: precision of its factors; the widest where they differ.
    """

    path: Path
    adapter: "Adapter"
    family: str
    shapes: "Mapping[str, torch.Size]"
    format: str
    dtype: "torch.dtype"

    @property
    def notes(self) -> list[str]:
        """What was left out or read otherwise than the file says, for the user."""
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
        allow_partial: leave out what cannot be read; `Source.notes` say what.

    Raises:
        AdapterError: it is damaged, does not fit the base, or belongs to no family that is known.
        BaseModelError: the base cannot be read.
    """
    from lora_sd.base_files import open_base
    from lora_sd.formats.families import FAMILIES, detect_family, layer_shapes

    if base is not None and base not in FAMILIES:
        return read_for(open_base(base), path, allow_partial)
    family = base or detect_family(path)
    return _read(path, family, layer_shapes(family), allow_partial)


def read_for(base: "BaseFiles", path: Path, allow_partial: bool = False) -> Source:
    """Read an adapter file for a base model that is open already.

    Raises:
        AdapterError: it is damaged, or does not fit the base.
    """
    return _read(path, base.family or "custom", base.shapes, allow_partial)


def _read(
    path: Path, family: str, shapes: "Mapping[str, torch.Size]", allow_partial: bool
) -> Source:
    import torch

    from lora_sd.formats import load_adapter

    adapter = load_adapter(path, shapes, allow_partial)
    dtypes = {factor.dtype for w in adapter.layers.values() for factor in (w.down, w.up)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return Source(path, adapter, family, shapes, format_of(path), dtype)


def base_reader(base: str | None) -> "Callable[[str], torch.Tensor] | None":
    """Gives a layer's base weight by its full name; None where there are no weights: without a
    base, or where it is only a family's name ('sd15', 'sd21', 'sdxl').

    Raises:
        BaseModelError: the base cannot be read.
    """
    from lora_sd.base_files import open_base
    from lora_sd.formats.layer_tables import FAMILIES
    from lora_sd.known_bases import EMBEDDED

    if base is None or (base in FAMILIES and base not in EMBEDDED):
        return None
    return open_base(base).read


def format_of(path: Path) -> str:
    """'kohya' or 'diffusers', by the names of an adapter file's tensors."""
    from lora_sd.formats.safetensors_file import read_header

    names = read_header(path).tensors
    return "kohya" if any(name.startswith(("lora_", "lycoris_")) for name in names) else "diffusers"


def named_for(metadata: dict[str, str], family: str) -> dict[str, str]:
    """The metadata, saying also which family it is for where it did not."""
    from lora_sd.formats.versions import VERSIONS, adapter_metadata

    if "ss_base_model_version" in metadata or family not in VERSIONS:
        return metadata
    said = adapter_metadata(VERSIONS[family])
    return {**said, **metadata}


def write_result(
    adapter: "Adapter",
    path: Path,
    dtype: "torch.dtype",
    format: str,
    family: str,
    shapes: "Mapping[str, torch.Size]",
    exact: bool = False,
    title: str | None = None,
) -> list[str]:
    """Write what a verb made, in that format or in one that holds all of it, and read it back;
    notices for the user, the last on how the file compares and what the clients make of it.

    Args:
        family, shapes: of the model that it is for, as in `Source`.
        exact: as of `save_adapter`.
        title: its name in A1111's list; None: the file's own.

    Raises:
        AdapterError: it cannot be written, or what is read back is not what was meant.
    """
    from lora_sd.adapter import Adapter
    from lora_sd.formats import save_adapter
    from lora_sd.verify import check_file

    metadata = {**named_for(adapter.metadata, family), "ss_output_name": title or path.stem}
    notices = save_adapter(Adapter(adapter.layers, metadata), path, dtype, format, exact)
    report = check_file(path, family, adapter, shapes=shapes)
    if not report.ok:
        raise AdapterError([f"'{path}': {report.summary()}", *report.lines()])
    return [*notices, f"Read back: {report.summary()}.", *report.client_notes(most=2)]

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
        family: one of `formats.families.FAMILIES`.
        format: 'kohya' or 'diffusers', whose names its tensors have.
        dtype: precision of its factors; the widest where they differ.
    """

    path: Path
    adapter: "Adapter"
    family: str
    format: str
    dtype: "torch.dtype"

    def chosen_dtype(self, name: str | None) -> "torch.dtype":
        """The dtype of that name ('float16'), or the source's own for None."""
        import torch

        return self.dtype if name is None else getattr(torch, name)


def read_source(path: Path, allow_partial: bool = False) -> Source:
    """Read an adapter file without a model.

    Raises:
        AdapterError: it is damaged, or belongs to no family that is known.
    """
    import torch

    from lora_sd.formats.families import load_any

    adapter, family = load_any(path, allow_partial)
    dtypes = {factor.dtype for w in adapter.layers.values() for factor in (w.down, w.up)}
    widest = torch.float16 if dtypes == {torch.float16} else torch.float32
    if dtypes == {torch.bfloat16}:
        widest = torch.bfloat16
    return Source(path, adapter, family, format_of(path), widest)


def format_of(path: Path) -> str:
    """'kohya' or 'diffusers', by the names of an adapter file's tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return "kohya" if any(name.startswith(("lora_", "lycoris_")) for name in names) else "diffusers"

"""What the rules of the clients look at: an adapter file's names, shapes, alphas and metadata."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lora_sd.formats.safetensors_file import read_header

Shape = tuple[int, ...]

OTHER_KINDS = (
    "hada_", "lokr_", "oft_", "on_input", "a1.", "a2.", "b1.", "b2.", "dyn_", "reshape_weight",
    "set_weight", "rescale", "lora_mid",
)  # fmt: skip
"""How the tensors of other kinds of adapters begin (LoHa, LoKr, OFT, GLoRA, IA3): known by name."""


@dataclass(frozen=True)
class Outline:
    """Names and shapes of the tensors in the file's order, the values of the alphas, metadata."""

    shapes: dict[str, Shape]
    alphas: dict[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def layers(self) -> dict[str, dict[str, str]]:
        """kohya's way to read keys: {what stands before the first dot: {what follows: key}}."""
        layers: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            prefix, _, part = key.partition(".")
            layers.setdefault(prefix, {})[part] = key
        return layers


def read_outline(path: Path) -> Outline:
    """The outline of an adapter file; of its tensors only the alphas are read.

    Raises:
        AdapterError: not a safetensors file, cut short, or holding what no adapter holds.
    """
    header = read_header(path)
    shapes = {key: entry.shape for key, entry in header.tensors.items()}
    with safe_open(path, "pt") as file:
        alphas = {key: float(file.get_tensor(key)) for key in shapes if _is_alpha(key, shapes[key])}
    return Outline(shapes, alphas, header.metadata)


def outline_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Outline:
    """The outline of a file that would hold these tensors (of the meta device, alphas excepted),
    in the order in which they are written."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    shapes = {key: tuple(tensors[key].shape) for key in order}
    alphas = {key: float(tensors[key]) for key in order if _is_alpha(key, shapes[key])}
    return Outline(shapes, alphas, metadata)


def is_by_output(magnitude: Shape, up: Shape) -> bool:
    """Whether DoRA's norms (out, 1[, 1, 1]) are the outputs', not (1, in[, 1, 1]) the inputs'."""
    return magnitude[:1] == up[:1] and magnitude[:1] != (1,)


def is_other_kind(part: str) -> bool:
    """Whether a tensor belongs to an adapter that is neither LoRA nor LoCon."""
    return part.startswith(OTHER_KINDS)


def _is_alpha(key: str, shape: Shape) -> bool:
    return key.endswith(".alpha") and math.prod(shape) == 1

"""What the rules of the clients look at: an adapter file's header and its alphas, no tensors."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_sd.errors import AdapterError

Shape = tuple[int, ...]

ALPHA_FORMATS = {
    "F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U8": "<B",
}  # fmt: skip

OTHER_KINDS = (
    "hada_", "lokr_", "oft_", "on_input", "a1.", "a2.", "b1.", "b2.", "dyn_", "reshape_weight",
    "set_weight", "rescale", "lora_mid",
)  # fmt: skip
"""How the tensors of other kinds of adapters begin (LoHa, LoKr, OFT, GLoRA, IA3): known by name."""


@dataclass(frozen=True)
class Header:
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


def read_header(path: Path) -> Header:
    """The header of a safetensors file, and the alphas behind it.

    Raises:
        AdapterError: not a safetensors file, cut short, or unreadable.
    """
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > 2**26:
                raise ValueError("a header of more than 64 MiB")
            entries = json.loads(file.read(size))
            metadata = entries.pop("__metadata__", {})
            shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
            alphas = {}
            for key, shape in shapes.items():
                if key.endswith(".alpha") and math.prod(shape) == 1:
                    begin, end = entries[key]["data_offsets"]
                    file.seek(8 + size + begin)
                    value = _number(entries[key]["dtype"], file.read(end - begin))
                    if value is not None:
                        alphas[key] = value
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"'{path}' is not a whole safetensors file ({error}).") from error
    return Header(shapes, alphas, metadata)


def is_other_kind(part: str) -> bool:
    """Whether a tensor belongs to an adapter that is neither LoRA nor LoCon."""
    return part.startswith(OTHER_KINDS)


def _number(dtype: str, data: bytes) -> float | None:
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    return float(struct.unpack(ALPHA_FORMATS[dtype], data)[0]) if dtype in ALPHA_FORMATS else None

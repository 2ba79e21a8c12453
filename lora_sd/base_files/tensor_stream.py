"""Read and write safetensors files tensor by tensor, so that a model of any size needs the memory
of its largest tensor only.

Read with plain file reads rather than a memory map, whose pages would count as ours.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from lora_sd.errors import BaseModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where it lies, in bytes from the file's start, and what it is."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: Size
    offset: int

    def read(self, first_row: int = 0, rows: int | None = None) -> Tensor:
        """The tensor, or `rows` of its first axis from `first_row` on.

        Raises:
            BaseModelError: the file has become shorter since it was opened.
        """
        shape = self.shape if rows is None else Size((rows, *self.shape[1:]))
        tensor = torch.empty(shape, dtype=self.dtype)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb") as file:
            file.seek(self.offset + first_row * self.shape[1:].numel() * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise BaseModelError(f"'{self.path}' was cut short while it was read.")
        return tensor


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """(the tensors in the file's order, metadata); no tensor is read.

    Raises:
        BaseModelError: there is no such file, or it is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt"):  # the library checks that the header and the length agree
            pass
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
    except FileNotFoundError:
        raise BaseModelError(f"There is no file '{path}'.") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise BaseModelError(
            f"'{path}' is damaged, cut short or no safetensors file ({error}). Get it again."
        ) from None
    metadata = header.pop("__metadata__", {})
    strange = [key for key, entry in header.items() if entry["dtype"] not in DTYPES]
    if strange:
        raise BaseModelError(
            f"'{path}' holds '{strange[0]}' in the number format {header[strange[0]]['dtype']}, "
            f"which cannot be read here. Use a float16, bfloat16 or float32 file."
        )
    tensors = [
        StoredTensor(
            path,
            key,
            DTYPES[entry["dtype"]],
            Size(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for key, entry in header.items()
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset), metadata


def file_bytes(plan: Mapping[str, tuple[torch.dtype, Size]]) -> int:
    """Size of the tensors of a file to be written."""
    return sum(dtype.itemsize * shape.numel() for dtype, shape in plan.values())


def write_tensor_file(
    path: Path,
    plan: Mapping[str, tuple[torch.dtype, Size]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write a safetensors file, one tensor in memory at a time, and fsync it.

    The file grows in place: give a staged path and rename it when this returns.

    Args:
        plan: dtype and shape of each tensor by its key.
        tensor_of: makes the tensor of a key; called once each, wide dtypes first, as the library
            orders them, so that every tensor is aligned.
        watch: wraps the walk over the keys, to show progress.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    order = sorted(plan, key=lambda key: -plan[key][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key in order:
        dtype, shape = plan[key]
        start, end = end, end + dtype.itemsize * shape.numel()
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    # What is no Unicode, as a file's name may be, is written as question marks.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in watch(order):
            tensor = tensor_of(key)
            if (tensor.dtype, tensor.shape) != plan[key]:
                raise ValueError(f"'{key}' is {tensor.dtype} {tuple(tensor.shape)}: not as planned")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

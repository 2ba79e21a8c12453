"""Read and write safetensors files of adapters.

The header is read and judged by our own code before the library sees the file: safetensors takes
duplicate keys, 600,000 empty tensors, any dtype and any name, and a file may come from anywhere.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from lora_sd import durable
from lora_sd.errors import AdapterError, shown_list, shown_size

MOST_BYTES = 2**30
MOST_HEADER_BYTES = 4 * 2**20
MOST_TENSORS = 20_000
LIBRARY_HEADER_BYTES = 100_000_000  # more than that, safetensors itself refuses
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
BYTES_PER_VALUE = {"F16": 2, "BF16": 2, "F32": 4}
BYTES_PER_ALPHA = {**BYTES_PER_VALUE, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
OF_THE_BODY = ("sshs_model_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor: its dtype as safetensors names it ('F16'), and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its values: its tensors by name, and its metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of an adapter file; no value is loaded.

    Raises:
        AdapterError: as `read_tensors`, except for values that are not finite numbers.
    """
    with _opened(path) as file:
        return _checked_header(file, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter file.

    Raises:
        AdapterError: not a safetensors file, truncated, too large, or holding what no adapter
            holds; nothing of it has been loaded then.
    """
    with _opened(path) as file:
        metadata = _checked_header(file, path).metadata
        file.seek(0)
        try:
            data = file.read()
        except OSError as error:
            raise AdapterError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    try:
        tensors = parse_tensors(data)
    except SafetensorError as error:
        raise AdapterError(f"'{path}' is damaged or cut short ({error}). Get it again.") from None
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"'{path}' holds values that are not finite numbers, in {shown_list(bad, 2)}."
        )
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write an adapter file: whole or not at all, with the umask's mode.

    The same tensors and metadata give the same bytes: everything is sorted. The SHA-256 of the
    file behind its header is added to the metadata as `sshs_model_hash`, which A1111 and Forge
    take as the adapter's identity, and as `modelspec.hash_sha256`.

    Raises:
        AdapterError: a tensor holds a value that is not finite, or the file would be too large to
            be read again; nothing has been written then.
    """
    if len(tensors) > MOST_TENSORS:
        raise AdapterError(
            f"'{path}' is not written: it would hold {len(tensors):,} tensors, and could not be "
            f"read again: at most {MOST_TENSORS:,} are."
        )
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size_bytes > MOST_BYTES - MOST_HEADER_BYTES:
        raise AdapterError(
            f"'{path}' is not written: it would be {shown_size(size_bytes)} large, and is not read "
            f"above 1 GiB. Choose a lower rank, or float16."
        )
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"'{path}' is not written: {len(bad)} tensors hold values that are not finite numbers, "
            f"such as {shown_list(bad, 1)}."
        )
    header, body = _serialize(tensors, metadata)
    if len(header) > MOST_HEADER_BYTES:
        longest = max(metadata, key=lambda key: len(metadata[key]), default="")
        raise AdapterError(
            f"'{path}' is not written: its header would be {shown_size(len(header))} large, and is "
            f"not read above 4 MiB. The longest of its metadata is "
            f"{shown_list([longest])}, {shown_size(len(metadata.get(longest, '')))}."
        )
    durable.write_bytes(path, struct.pack("<Q", len(header)) + header + body)


def _serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """(header, body) of the file: wide dtypes first, so that every tensor is aligned, then by name.

    The library writes metadata in an order that changes from run to run. What is no Unicode, as a
    file's name may be, is written as question marks.
    """
    header: dict[str, Any] = {}
    body = bytearray()
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor, start = tensors[name].detach().cpu().contiguous(), len(body)
        body += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(body)],
        }
    digest = durable.sha256_bytes(bytes(body))
    hashes = dict(zip(OF_THE_BODY, (digest, f"0x{digest}"), strict=True))
    header = {"__metadata__": dict(sorted({**metadata, **hashes}.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    return text + b" " * (-len(text) % 8), bytes(body)


def _opened(path: Path) -> BinaryIO:
    """The file, open for reading; AdapterError when there is none or it is too large."""
    try:
        if not path.is_file():
            raise AdapterError(f"There is no adapter file '{path}'.")
        if path.stat().st_size > MOST_BYTES:
            raise AdapterError(f"'{path}' is larger than 1 GiB: no adapter is.")
        return open(path, "rb")
    except OSError as error:
        raise AdapterError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def _checked_header(file: BinaryIO, path: Path) -> Header:
    """Read the header from the file's start and judge it."""
    length = path.stat().st_size
    start = file.read(9)
    size = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else -1
    if size < 0 or start[8:] != b"{" or size > LIBRARY_HEADER_BYTES:
        raise AdapterError(f"'{path}' is not a safetensors file.")
    if 8 + size > length:
        raise AdapterError(f"'{path}' is cut short: its header is not whole. Get it again.")
    if size > MOST_HEADER_BYTES:
        raise AdapterError(
            f"'{path}' has a header of {shown_size(size)}, its names and metadata: above 4 MiB it "
            f"is not read."
        )
    repeated: list[str] = []

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(entries)
        if len(found) < len(entries):
            repeated.extend(key for key, n in Counter(k for k, _ in entries).items() if n > 1)
        return found

    try:
        header = json.loads(b"{" + file.read(size - 1), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        raise AdapterError(f"'{path}' is not a safetensors file: its header is damaged.") from None
    metadata = header.pop("__metadata__", {})
    if len(header) > MOST_TENSORS:
        raise AdapterError(f"'{path}' holds {len(header):,} tensors: no adapter does.")
    strange = [name[:60] for name in header if not NAME.fullmatch(name)]
    if strange:
        raise AdapterError(f"'{path}' has tensors with strange names: {strange[0]!r}.")
    if repeated:
        raise AdapterError(f"'{path}' names {shown_list([repeated[0][:200]])} twice.")
    if not isinstance(metadata, dict):
        raise AdapterError(f"'{path}' is not a safetensors file: its metadata is damaged.")
    tensors = {name: _entry(name, said, length - 8 - size, path) for name, said in header.items()}
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _entry(name: str, said: Any, body_length: int, path: Path) -> TensorEntry:
    """Judge what the header says of one tensor: a kind that adapters hold, inside the file.

    An alpha may be an integer: diffusers writes int64.
    """
    said = said if isinstance(said, dict) else {}
    dtype, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    sizes = BYTES_PER_ALPHA if "alpha" in name and shape in ([], [1]) else BYTES_PER_VALUE
    if (
        not _are_counts(shape)
        or not _are_counts(offsets)
        or len(shape) > 4
        or len(offsets) != 2
        or not isinstance(dtype, str)
        or dtype not in sizes
        or offsets[1] - offsets[0] != math.prod(shape) * sizes[dtype]
    ):
        raise AdapterError(f"'{path}': tensor '{name}' is not of a kind that adapters hold.")
    if offsets[1] > body_length:
        raise AdapterError(
            f"'{path}' is cut short or damaged: '{name}' is not whole. Get it again."
        )
    return TensorEntry(dtype, tuple(shape))


def _are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

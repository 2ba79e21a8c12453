"""Read and write safetensors files of adapters.

The header is read and judged by our own code before the library sees the file: safetensors takes
duplicate keys, 600,000 empty tensors, any dtype and any name, and a file may come from anywhere.
"""

import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize
from torch import Tensor

from lora_sd import durable
from lora_sd.errors import AdapterError, shown_list

MOST_BYTES = 2**30
MOST_HEADER_BYTES = 4 * 2**20
MOST_TENSORS = 20_000
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
DTYPES = {"F16", "BF16", "F32"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter file.

    Raises:
        AdapterError: not a safetensors file, truncated, too large, or holding what no adapter
            holds; nothing of it has been loaded then.
    """
    try:
        if not path.is_file():
            raise AdapterError(f"There is no adapter file '{path}'.")
        if path.stat().st_size > MOST_BYTES:
            raise AdapterError(f"'{path}' is larger than 1 GiB: no adapter is.")
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    metadata = _check_header(data, path)
    try:
        tensors = parse_tensors(data)
    except SafetensorError as error:
        raise AdapterError(f"'{path}' is damaged or cut short ({error}). Get it again.") from None
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise AdapterError(
            f"'{path}' holds values that are not finite numbers, in {shown_list(bad, 2)}."
        )
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write an adapter file: whole or not at all, with the umask's mode.

    `sshs_model_hash` is added to the metadata: the SHA-256 of the file behind its header, which
    A1111 and Forge take as the adapter's identity.

    Raises:
        AdapterError: a tensor holds a value that is not finite; nothing has been written then.
    """
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AdapterError(
            f"'{path}' is not written: {len(bad)} tensors hold values that are not finite numbers, "
            f"such as {shown_list(bad, 1)}."
        )
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = serialize(plain, metadata)
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    metadata = {**metadata, "sshs_model_hash": durable.sha256_bytes(body)}
    durable.write_bytes(path, serialize(plain, metadata))


def _check_header(data: bytes, path: Path) -> dict[str, str]:
    """Judge the header; returns the metadata."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if size < 0 or data[8:9] != b"{" or size > MOST_HEADER_BYTES:
        raise AdapterError(f"'{path}' is not a safetensors file.")
    if 8 + size > len(data):
        raise AdapterError(f"'{path}' is cut short: its header is not whole. Get it again.")
    repeated: list[str] = []

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, n in Counter(k for k, _ in entries).items() if n > 1)
        return dict(entries)

    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        raise AdapterError(f"'{path}' is not a safetensors file: its header is damaged.") from None
    metadata = header.pop("__metadata__", {})
    names = list(header)
    if len(names) > MOST_TENSORS:
        raise AdapterError(f"'{path}' holds {len(names):,} tensors: no adapter does.")
    if repeated:
        raise AdapterError(f"'{path}' names {shown_list(repeated, 1)} twice.")
    strange = [name[:60] for name in names if not NAME.fullmatch(name)]
    if strange:
        raise AdapterError(f"'{path}' has tensors with strange names: {strange[0]!r}.")
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or len(shape) > 4 or entry.get("dtype") not in DTYPES:
            if "alpha" in name and isinstance(shape, list) and len(shape) <= 1:
                continue  # alpha may be an integer: diffusers writes int64
            raise AdapterError(f"'{path}': tensor '{name}' is not of a kind that adapters hold.")
    if not isinstance(metadata, dict):
        raise AdapterError(f"'{path}' is not a safetensors file: its metadata is damaged.")
    return {str(key): str(value) for key, value in metadata.items()}

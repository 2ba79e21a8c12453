"""File <-> Adapter. Each format has a module; what a file is, its tensors' names say."""

from pathlib import Path

import torch
from torch import Tensor

from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.client_rules import with_one_alpha, with_whole_attention
from lora_sd.formats.reading import NOTE, load_adapter
from lora_sd.formats.safetensors_file import OF_THE_BODY, write_tensors

__all__ = ["FORMATS", "fitting_format", "load_adapter", "save_adapter"]

FORMATS = ("kohya", "diffusers")
UNDERFLOW_TO_TELL = 0.001
OF_ONE_FILE = (NOTE, diffusers.CONFIG_KEY, "format", "sshs_legacy_hash", *OF_THE_BODY)
"""Metadata that is true of the file it was read from only."""


def save_adapter(
    adapter: Adapter,
    path: Path,
    dtype: torch.dtype = torch.float16,
    format: str = "kohya",
    exact: bool = False,
) -> list[str]:
    """Write an adapter, whole or not at all.

    The same adapter gives the same bytes.

    Args:
        format: one of FORMATS; another one is taken where it cannot hold the adapter
            (`fitting_format`).
        exact: keep factors and alphas as they are, for reading back here. Otherwise they are
            brought into the form that every client reads rightly, to the same effect
            (`client_rules`).

    Returns:
        sentences for the user: what was written otherwise than asked, and values lost.

    Raises:
        AdapterError: there is no layer, a value is not finite, or becomes infinite in `dtype`.
        UserError: the file cannot be written.
    """
    if not adapter.layers:
        raise AdapterError(f"'{path}' is not written: the adapter has no layers.")
    format, notices = fitting_format(adapter, format)
    metadata = {k: v for k, v in adapter.metadata.items() if k not in OF_ONE_FILE}
    metadata.pop("ss_network_args", None)
    metadata |= kohya.network_metadata(adapter)
    if not exact:
        adapter, added = with_whole_attention(adapter, format)
        if added:
            notices.append(
                f"{added} text-encoder attention layers that do nothing were added to the file: "
                f"A1111 and diffusers read all four of a block or none."
            )
    if format == "diffusers":
        tensors = diffusers.to_tensors(adapter, dtype)
        metadata |= {"format": "pt", diffusers.CONFIG_KEY: diffusers.lora_config(adapter)}
    else:
        adapter = adapter if exact else with_one_alpha(adapter)
        tensors = kohya.to_tensors(adapter, dtype)
    write_tensors(path, tensors, metadata)
    return notices + _underflow(adapter, dtype)


def fitting_format(adapter: Adapter, wanted: str) -> tuple[str, list[str]]:
    """(format that can hold the adapter, sentences on why it is not the wanted one).

    Args:
        wanted: one of FORMATS; or 'auto': kohya's, but diffusers' for DoRA by output, which most of
            kohya's clients misread.
    """
    layers = adapter.layers.values()
    if wanted == "auto":
        magnitudes = [one.magnitude for one in layers if one.magnitude is not None]
        wanted = "diffusers" if any(one.shape[0] > 1 for one in magnitudes) else "kohya"
    only_peft = [
        what
        for what, there in (
            ("up-biases", any(layer.up_bias is not None for layer in layers)),
            ("token embeddings", any(layer.embedding for layer in layers)),
        )
        if there
    ]
    if only_peft and not diffusers.holds_magnitudes(adapter):
        return "diffusers", [
            f"No client reads DoRA together with {' and '.join(only_peft)} as it was trained here: "
            f"use this adapter in lora_sd only."
        ]
    if only_peft and wanted == "kohya":
        return "diffusers", [
            f"kohya's format has no place for {' and '.join(only_peft)}; diffusers' has, which "
            f"A1111, Forge, InvokeAI, kohya's tools and LyCORIS cannot read, and ComfyUI only in "
            f"part."
        ]
    if wanted == "diffusers" and not diffusers.holds_magnitudes(adapter):
        return "kohya", [
            "diffusers' format has no place for DoRA in some layers only, or by input; kohya's has."
        ]
    return wanted, []


def _underflow(adapter: Adapter, dtype: torch.dtype) -> list[str]:
    """A sentence when more than 0.1 % of the values other than zero become zero in `dtype`."""
    tensors: list[Tensor] = [t for layer in adapter.layers.values() for t in (layer.down, layer.up)]
    before = sum(int(tensor.count_nonzero()) for tensor in tensors)
    lost = before - sum(int(tensor.to(dtype).count_nonzero()) for tensor in tensors)
    if lost <= UNDERFLOW_TO_TELL * before:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{lost:,} of {before:,} values ({lost / before:.1%}) are too small for {name} and were "
        f"saved as 0. Save in float32 or bfloat16 to keep them."
    ]

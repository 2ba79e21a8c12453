"""`extract`: an adapter of what a fine-tuned model has more than its base."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd.errors import ConfigError, shown_size
from lora_sd.verbs.arguments import (
    DTYPES,
    FORMATS,
    add_output,
    add_rank_limit,
    check_output,
    check_rank_limit,
    progress,
    tell_written,
)

if TYPE_CHECKING:
    from lora_sd.algebra.extraction import Extraction

DESCRIPTION = """\
Make an adapter of what a fine-tuned model has more than its base: base plus adapter comes as near
to the tuned model as the rank allows. Both may be tiny-sd, a diffusers folder or a .safetensors
checkpoint, also one of each.

Each layer's difference is cut to --rank by singular value decomposition; with --energy to the
lowest rank that keeps this share of it, --rank at most. What is lost is stated as a relative
Frobenius error. Layers that do not differ are left out. What no adapter holds (biases, norms, token
tables, the VAE) is counted."""
EXAMPLE = """\
  python -m lora_sd extract tuned.safetensors sd15.safetensors -o tuned-lora.safetensors --rank 64
  python -m lora_sd extract models/tuned models/sd15 -o tuned-lora.safetensors \\
      --energy 0.95 --no-text-encoder"""
RANK = 32


def extract(
    tuned: str,
    base: str,
    output: Path,
    *,
    rank: int = RANK,
    conv_rank: int | None = None,
    energy: float | None = None,
    text_encoders: bool = True,
    threshold: float = 0.0,
    format: str = "kohya",
    dtype: str = "float16",
    overwrite: bool = False,
) -> "tuple[Extraction, list[str]]":
    """Write the adapter; what was found, and the format's notices.

    Args:
        tuned, base: 'tiny-sd', a diffusers folder or a `.safetensors` checkpoint.
        rank, conv_rank, energy, text_encoders, threshold: as of `algebra.extraction.extract`.
        format, dtype: how to write it.

    Raises:
        ConfigError: a rank, a share or the threshold is out of range.
        BaseModelError: a model cannot be read, or they are of different kinds.
        AdapterError: the models do not differ, or what is read back is not what was meant.
        UserError: the output exists, or cannot be written.
    """
    import torch

    from lora_sd.algebra.extraction import extract as extracted
    from lora_sd.base_files import open_base
    from lora_sd.verbs.source import write_result

    check_output(output, overwrite)
    check_rank_limit(rank, conv_rank, energy)
    if not 0 <= threshold < 1:
        raise ConfigError(f"--threshold is {threshold:g}; it is a share from 0 up to below 1.")
    files = open_base(base)
    found = extracted(
        open_base(tuned),
        files,
        rank,
        conv_rank,
        energy,
        text_encoders,
        threshold,
        partial(progress, what="extracting"),
    )
    family, chosen = files.family or "custom", getattr(torch, dtype)
    return found, write_result(found.adapter, output, chosen, format, family, files.shapes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", metavar="TUNED", help="the fine-tuned model")
    parser.add_argument("base", metavar="BASE", help="the model that it was made from")
    add_output(parser)
    add_rank_limit(parser, RANK)
    parser.add_argument(
        "--no-text-encoder", action="store_true", help="leave the text encoders' layers out"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out layers that differ by at most this share of their weight's norm "
        "(default: 0: only those that are the same)",
    )
    parser.add_argument("--format", choices=FORMATS, default="kohya", help="(default: kohya)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="(default: float16)")
    parser.add_argument("--layers", action="store_true", help="print each layer's rank and error")


def run(options: argparse.Namespace) -> int:
    from lora_sd.algebra.spectrum import span

    found, notices = extract(
        options.tuned,
        options.base,
        options.output,
        rank=options.rank,
        conv_rank=options.conv_rank,
        energy=options.energy,
        text_encoders=not options.no_text_encoder,
        threshold=options.threshold,
        format=options.format,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    layers = found.adapter.layers
    if options.layers:
        for name, layer in layers.items():
            print(f"{100 * found.errors[name]:6.2f} %  rank {layer.rank:4}  {name}")
    ranks = span([layer.rank for layer in layers.values()])
    size = shown_size(options.output.stat().st_size)
    facts = [f"{len(layers)} layers", f"ranks {ranks}", size, found.error.sentence()]
    tell_written(options.output, facts, [*told(found), *notices])
    return 0


def told(found: "Extraction") -> list[str]:
    """Sentences on what is not in the adapter."""
    from lora_sd.errors import shown_list

    lines = []
    if found.unchanged:
        lines.append(f"{len(found.unchanged)} layers do not differ and were left out.")
    if found.left_over:
        lines.append(
            f"{len(found.left_over)} tensors differ but have no place in an adapter, such as "
            f"{shown_list(found.left_over, 2)}: the tuned model is not reached in full."
        )
    if found.unmatched:
        lines.append(
            f"{len(found.unmatched)} layers are in one of the models only, such as "
            f"{shown_list(found.unmatched, 1)}: they were left out."
        )
    return lines

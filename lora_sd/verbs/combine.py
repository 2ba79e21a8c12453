"""`combine`: one adapter of several, each at its scale."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd.errors import AdapterError, ConfigError, shown_size
from lora_sd.verbs.arguments import (
    Watch,
    add_allow_partial,
    add_base,
    add_dtype,
    add_output,
    add_rank_limit,
    check_output,
    check_rank_limit,
    nearest,
    progress,
    tell_written,
)

if TYPE_CHECKING:
    from lora_sd.adapter import Adapter
    from lora_sd.algebra.low_rank import TruncationError
    from lora_sd.parts import Scales
    from lora_sd.verbs.source import Source

DESCRIPTION = """\
Make one adapter of several, each at its scale: using the result at scale 1 is using all of them.

Without --rank, --conv-rank or --energy the result is exact and as large as its sources together:
their ranks stand side by side. With one of them it is the best approximation, and its error is
stated as a relative Frobenius norm.

FILE=SCALE gives a scale, which may be negative (1 without it). Parts have factors of their own
behind a comma: linear, conv, text_encoder, or a block (down.0 .. down.3, mid, up.0 .. up.3, rest).

DoRA layers are combined exactly where they stand alone at scale 1. Otherwise what they add depends
on the base weights: give --base and a limit."""
EXAMPLE = """\
  python -m lora_sd combine cat.safetensors=0.8 ink.safetensors=0.5 -o cat-ink.safetensors
  python -m lora_sd combine cat.safetensors ink.safetensors=0.7,text_encoder=0,mid=0.5 \\
      -o cat-ink.safetensors --rank 16 --conv-rank 8"""
KIND_PARTS = ("linear", "conv", "text_encoder")


@dataclass(frozen=True)
class Combined:
    """What `combine` did; the error is 0 where no limit was set."""

    adapter: "Adapter"
    error: "TruncationError"
    exact: bool
    notices: list[str]


def combine(
    sources: "Sequence[tuple[Path, Scales]]",
    output: Path,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    watch: Watch = progress,
) -> Combined:
    """Write the sum of several adapters, in kohya's format where that holds all of it.

    Args:
        sources: adapter files and their scales.
        rank, conv_rank, energy: as of `resize`; none: exact.
        base: the base model, where there are DoRA layers or it is of no known family: 'tiny-sd',
            a diffusers folder or a .safetensors file.
        dtype: 'float16', 'bfloat16', 'float32'; None: the sources' own, or float32 where they
            differ.
        allow_partial: leave out what of an adapter cannot be read.
        watch: as of `arguments.progress`.

    Raises:
        AdapterError: an adapter cannot be read, they belong to different models, DoRA layers need
            more than was given, or what is read back is not what was meant.
        UserError: the output exists, or cannot be written.
    """
    import torch

    from lora_sd.algebra.combination import Ingredient
    from lora_sd.algebra.combination import combine as combined
    from lora_sd.algebra.low_rank import RankLimit
    from lora_sd.errors import Problems
    from lora_sd.verbs.source import base_reader, read_source, write_result

    check_output(output, overwrite)
    check_rank_limit(rank, conv_rank, energy)
    found: list[Source] = []
    problems = Problems()
    for path, _ in sources:
        with problems.gathered():
            found.append(read_source(path, base, allow_partial))
    problems.tell()
    families = {source.family: source.path for source in found}
    if len(families) > 1:
        made_for = ", ".join(f"'{path}' for {family}" for family, path in families.items())
        raise AdapterError(f"The adapters were made for different models: {made_for}.")
    ingredients = [
        Ingredient(source.adapter, scales, _name_of(source))
        for source, (_, scales) in zip(found, sources, strict=True)
    ]
    limit = RankLimit(rank, conv_rank, energy)
    adapter, error = combined(
        ingredients, limit, base_reader(base), partial(watch, what="combining")
    )
    dtypes = {source.dtype for source in found}
    own = dtypes.pop() if len(dtypes) == 1 else torch.float32
    chosen = getattr(torch, dtype) if dtype else own
    format = "kohya" if any(source.format == "kohya" for source in found) else "diffusers"
    notices = [note for source in found for note in source.notes]
    notices += write_result(adapter, output, chosen, format, found[0].family, found[0].shapes)
    return Combined(adapter, error, limit.is_none, notices)


def _name_of(source: "Source") -> str:
    return source.adapter.metadata.get("ss_output_name") or source.path.stem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE[=SCALE]", help="the adapters and their scales"
    )
    add_output(parser)
    add_rank_limit(parser)
    add_base(parser, "for DoRA layers, and ")
    add_dtype(parser)
    add_allow_partial(parser)


def run(options: argparse.Namespace) -> int:
    from lora_sd.algebra.spectrum import span

    done = combine(
        [parsed_source(text) for text in options.files],
        options.output,
        rank=options.rank,
        conv_rank=options.conv_rank,
        energy=options.energy,
        base=options.base,
        dtype=options.dtype,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
    )
    layers = done.adapter.layers
    ranks = span([layer.rank for layer in layers.values()])
    said = "exact" if done.exact else done.error.sentence()
    size = shown_size(options.output.stat().st_size)
    facts = [f"{len(layers)} layers", f"ranks {ranks}", size, said]
    tell_written(options.output, facts, done.notices)
    return 0


def parsed_source(text: str) -> "tuple[Path, Scales]":
    """'cat.safetensors=0.8,conv=0.5' -> its path and Scales(0.8, conv=0.5).

    Raises:
        ConfigError: a scale is no number, or a part is unknown.
    """
    from lora_sd.parts import BLOCKS, REST, TEXT_ENCODERS, Scales

    ending = ".safetensors="
    stem, found, said = text.rpartition(ending)
    if not found:
        return Path(text), Scales()
    blocks = (*BLOCKS, REST, TEXT_ENCODERS[1])
    values: dict[str, float] = {}
    problems = []
    for entry in said.split(","):
        part, equals, number = entry.rpartition("=")
        name = part if equals else "overall"
        if equals and name not in (*KIND_PARTS, *blocks):
            hint = nearest(name, (*KIND_PARTS, *blocks))
            problems.append(f"'{text}': there is no part '{name}' to scale.{hint}")
        elif name in values:
            problems.append(f"'{text}' gives the scale of '{part or 'all'}' twice.")
        try:
            values[name] = float(number) if "_" not in number else math.nan
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            problems.append(f"'{text}': '{number}' is not a scale; write a number such as 0.8.")
    if problems:
        raise ConfigError(problems)
    kinds = {name: value for name, value in values.items() if name in ("overall", *KIND_PARTS)}
    own = {name: value for name, value in values.items() if name in blocks}
    return Path(stem + ending.removesuffix("=")), Scales(**kinds, blocks=own)

"""`convert`: an adapter file in another format or precision."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd.errors import AdapterError, ConfigError, shown_size
from lora_sd.verbs.arguments import (
    FORMATS,
    add_allow_partial,
    add_base,
    add_dtype,
    add_output,
    check_output,
    tell_written,
)

if TYPE_CHECKING:
    from lora_sd.adapter import Adapter

DESCRIPTION = """\
Write an adapter in another format, in another precision, or both.

  kohya      read by A1111, Forge, ComfyUI, InvokeAI, kohya's tools, LyCORIS and diffusers
  diffusers  read by diffusers and PEFT alone (ComfyUI reads a part); holds up-biases and
             token embeddings, which kohya's format cannot

Read are both, also in the spellings of LyCORIS, PEFT, older diffusers and A1111. Converting there
and back gives the same numbers, bit for bit, as long as the precision stays. One thing is changed
in kohya files: diffusers knows a single alpha for all attention layers of a model, so that layers
with another one take the difference into lora_up; --exact leaves them."""
EXAMPLE = """\
  python -m lora_sd convert peft.safetensors -o cat.safetensors --format kohya
  python -m lora_sd convert cat.safetensors -o cat-half.safetensors --dtype float16"""


@dataclass(frozen=True)
class Converted:
    """What `convert` did."""

    format: str
    dtype: str
    layers: int
    notices: list[str]


def convert(
    source: Path,
    output: Path,
    *,
    format: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    exact: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Write an adapter file in another format or precision.

    Args:
        format: 'kohya' or 'diffusers'; None: the source's.
        base: the base model or family, where the adapter's layers do not tell.
        dtype: 'float16', 'bfloat16', 'float32'; None: the source's.
        exact: keep every factor and alpha as it is, though some client may misread the file.
        allow_partial: leave out what cannot be read, or what the format cannot hold.

    Raises:
        AdapterError: the source cannot be read, the format cannot hold it, or what is read back is
            not what was meant.
        UserError: the output exists, or cannot be written.
    """
    from lora_sd.formats import fitting_format
    from lora_sd.verbs.source import read_source, write_result

    check_output(output, overwrite)
    if format is None and dtype is None:
        raise ConfigError("Say what to convert to: --format, --dtype, or both.")
    found = read_source(source, base, allow_partial)
    chosen = found.chosen_dtype(dtype)
    wanted = format or found.format
    adapter, notices = found.adapter, found.notes
    if fitting_format(adapter, wanted)[0] != wanted:
        adapter, left_out = _that_fits(adapter, wanted)
        if not allow_partial or fitting_format(adapter, wanted)[0] != wanted:
            _, why = fitting_format(found.adapter, wanted)
            raise AdapterError([f"'{source}' does not go into {wanted}'s format: {why[0]}"])
        notices += [f"left out: {left_out}"]
    if found.dtype.itemsize > chosen.itemsize:
        name = str(chosen).removeprefix("torch.")
        notices += [f"numbers were rounded to {name}"]
    title = adapter.metadata.get("ss_output_name")
    notices += write_result(
        adapter, output, chosen, wanted, found.family, found.shapes, exact, title
    )
    return Converted(wanted, str(chosen).removeprefix("torch."), len(adapter.layers), notices)


def _that_fits(adapter: "Adapter", wanted: str) -> "tuple[Adapter, str]":
    """The adapter without what kohya's format cannot hold, and what that was."""
    from lora_sd.adapter import Adapter

    if wanted != "kohya":
        return adapter, "nothing"
    biases = sum(layer.up_bias is not None for layer in adapter.layers.values())
    layers = {
        name: replace(layer, up_bias=None)
        for name, layer in adapter.layers.items()
        if not layer.embedding
    }
    tables = len(adapter.layers) - len(layers)
    return Adapter(layers, adapter.metadata), f"{biases} up-biases, {tables} token embeddings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, .safetensors")
    add_output(parser)
    parser.add_argument("--format", choices=FORMATS, help="default: as the source")
    add_base(parser)
    add_dtype(parser)
    parser.add_argument(
        "--exact", action="store_true", help="keep every number, though diffusers may misread it"
    )
    add_allow_partial(parser, ", or the format cannot hold")


def run(options: argparse.Namespace) -> int:
    done = convert(
        options.file,
        options.output,
        format=options.format,
        base=options.base,
        dtype=options.dtype,
        exact=options.exact,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
    )
    size = shown_size(options.output.stat().st_size)
    facts = [f"{done.layers} layers", f"{done.format} format", done.dtype, size]
    tell_written(options.output, facts, done.notices)
    return 0

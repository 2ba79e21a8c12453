"""`bake`: adapters put into a base model for good, which is saved."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd import durable
from lora_sd.errors import Problems, UserError, shown_list, shown_size
from lora_sd.verbs.arguments import (
    Watch,
    add_allow_partial,
    add_dtype,
    progress,
    tell_written,
)
from lora_sd.verbs.combine import parsed_source

if TYPE_CHECKING:
    from lora_sd.base_files import BaseFiles
    from lora_sd.parts import Scales

DESCRIPTION = """\
Put one or several adapters into a base model for good and save it: as a diffusers folder, or as one
file in the original layout, which A1111, Forge, ComfyUI and InvokeAI load, when the output ends in
.safetensors.

The base is tiny-sd, a diffusers folder or a .safetensors checkpoint, and stays as it is. A single
file can only become a single file. FILE=SCALE gives a scale, as of `combine`: 0.8, or by part,
1,conv=0.5,text_encoder=0,mid=0.7.

The sum is made in float32 and rounded once. The model is read and written tensor by tensor: the
memory of its largest tensor is enough."""
EXAMPLE = """\
  python -m lora_sd bake models/sd15 cat.safetensors=0.8 -o models/sd15-cat
  python -m lora_sd bake sd15.safetensors cat.safetensors ink.safetensors=0.5 \\
      -o sd15-cat-ink.safetensors --dtype float16"""


@dataclass(frozen=True)
class Baked:
    """What `bake` did.

    Attributes:
        layers: how many layers of the base were changed.
        size_bytes: of the file or of the folder with all its files.
        left_out: how many tensors of an EMA copy in a single file were not written.
        files_left_out: files of the base's folder with weights that were not read: other variants,
            pickled ones, checkpoints beside the parts.
        notes: what of the adapters was left out or read otherwise than their files say.
    """

    layers: int
    size_bytes: int
    left_out: int
    files_left_out: list[str]
    notes: list[str]


def bake(
    base: str,
    sources: "Sequence[tuple[Path, Scales]]",
    output: Path,
    *,
    dtype: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    watch: Watch = progress,
) -> Baked:
    """Write a base model with adapters in it.

    Args:
        base: 'tiny-sd', a diffusers folder or a `.safetensors` checkpoint.
        sources: adapter files and their scales.
        output: a `.safetensors` file in the original layout, or else a diffusers folder.
        dtype: 'float16', 'bfloat16', 'float32'; None: each tensor's own.
        allow_partial: leave out what of an adapter cannot be read.
        watch: as of `arguments.progress`.

    Raises:
        BaseModelError: the base cannot be read.
        AdapterError: an adapter cannot be read or belongs to another model, or a sum is too large
            for the dtype.
        UserError: the output exists, is or holds the base or an adapter, or cannot be written.
    """
    import torch

    from lora_sd.base_files import open_base
    from lora_sd.base_files.baking import (
        Recipe,
        gather_updates,
        write_folder,
        write_single_file,
    )
    from lora_sd.base_files.metadata import checkpoint_metadata
    from lora_sd.verbs.source import Source, read_for

    files = open_base(base)
    check_target(files, [path for path, _ in sources], output, overwrite)
    problems = Problems()
    found: list[Source] = []
    for path, _ in sources:
        with problems.gathered():
            found.append(read_for(files, path, allow_partial))
    problems.tell()
    adapters = [(one.adapter, scales) for one, (_, scales) in zip(found, sources, strict=True)]
    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    recipe = Recipe(files, gather_updates(files, adapters), chosen)
    each = partial(watch, what="baking", unit="tensor")
    files_left_out: list[str] = []
    with durable.staged(output, overwrite) as path:
        if is_single_file(output):
            names = [source.stem for source, _ in sources]
            write_single_file(recipe, path, checkpoint_metadata(files, output.stem, names), each)
        else:
            files_left_out = write_folder(recipe, path, each)
    written = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
    return Baked(
        layers=len(recipe.updates),
        size_bytes=sum(path.stat().st_size for path in written),
        left_out=sum(stored.key.startswith("model_ema.") for stored in files.rest),
        files_left_out=files_left_out,
        notes=[note for one in found for note in one.notes],
    )


def is_single_file(output: Path) -> bool:
    """Whether a file is asked for, rather than a folder."""
    return output.suffix.lower() == ".safetensors"


def check_target(
    base: "BaseFiles", adapters: Sequence[Path], output: Path, overwrite: bool
) -> None:
    """Whether the output may be written, asked before any work is done.

    Raises:
        UserError: it is or holds the base or an adapter, lies in the base, exists and may not be
            replaced, holds files that are no model's, or its folder does not exist.
    """
    from lora_sd.base_files.baking import foreign_files

    durable.check_place(output)
    single = is_single_file(output)
    inputs = {"the base model": base.path} | {f"the adapter '{path}'": path for path in adapters}
    for what, path in inputs.items() if output.exists() else ():
        if os.path.exists(path) and any(place.samefile(output) for place in _places(path)):
            verb = "is" if path.samefile(output) else "holds"
            raise UserError(
                f"The output '{output}' {verb} {what}, which would be lost. Name another."
            )
    if base.is_folder and any(place.samefile(base.path) for place in _places(output)):
        raise UserError(
            f"The output '{output}' lies in the base model's folder. Name another, so that the "
            f"base stays as it is."
        )
    if not single and not base.is_folder:
        raise UserError(
            f"'{base.name}' is a single file, without the settings and the tokenizer that a folder "
            f"needs: let the output end in .safetensors. diffusers makes a folder of that: "
            f"StableDiffusionPipeline.from_single_file(...).save_pretrained(...)."
        )
    if not output.parent.is_dir():
        raise UserError(f"There is no folder '{output.parent}' to write '{output.name}' into.")
    if output.exists() and not overwrite:
        raise UserError(f"'{output}' exists already. Choose another name, or add --overwrite.")
    if output.is_dir() and (single or not (output / "model_index.json").is_file()):
        raise UserError(f"'{output}' is a folder and no diffusers model: it is not overwritten.")
    if output.is_file() and not single:
        raise UserError(f"'{output}' is a file. A single file's name must end in '.safetensors'.")
    if output.is_dir() and (foreign := foreign_files(base, output)):
        raise UserError(
            f"'{output}' holds what no model's folder does, and --overwrite would remove it: "
            f"{shown_list(foreign)}. Move that away, or name another output."
        )


def _places(path: Path) -> list[Path]:
    """The path, links resolved, and the folders that it lies in; those that exist."""
    resolved = path.resolve()
    return [place for place in (resolved, *resolved.parents) if place.exists()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="tiny-sd, a diffusers folder or a .safetensors checkpoint"
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE[=SCALE]", help="the adapters and their scales"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        required=True,
        help="a .safetensors file in the original layout, or else a diffusers folder",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output if it exists already"
    )
    add_dtype(parser)
    add_allow_partial(parser)


def run(options: argparse.Namespace) -> int:
    done = bake(
        options.base,
        [parsed_source(text) for text in options.files],
        options.output,
        dtype=options.dtype,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
    )
    adapters = "1 adapter" if len(options.files) == 1 else f"{len(options.files)} adapters"
    facts = [f"{adapters} in {done.layers} layers", shown_size(done.size_bytes)]
    tell_written(options.output, facts, [*done.notes, *told(done)])
    return 0


def told(done: Baked) -> list[str]:
    """Sentences on what of the base was not written."""
    lines = []
    if done.left_out:
        lines.append(
            f"The {done.left_out} tensors of the base's EMA copy were left out: it is the model "
            f"without the adapters."
        )
    if done.files_left_out:
        lines.append(
            f"Left out of the folder, as weights without the adapters: "
            f"{shown_list(done.files_left_out)}."
        )
    return lines

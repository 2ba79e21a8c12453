"""`resize`: lower an adapter's rank by truncated SVD."""

import argparse
import re
import tempfile
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
    progress,
    tell_written,
)

if TYPE_CHECKING:
    import torch

    from lora_sd.adapter import Adapter
    from lora_sd.algebra.low_rank import RankLimit, TruncationError
    from lora_sd.verbs.source import Source

DESCRIPTION = """\
Lower an adapter's rank by a truncated singular value decomposition of each layer: the best
approximation of that rank. What is lost is stated as a relative Frobenius error: the norm of the
difference over the norm of the whole.

Say how far with --rank, --energy or --size; together they all hold. `inspect` shows what each
block needs. Every layer keeps its alpha and, in a DoRA adapter, its magnitude: the norms that
training gave the weights stay, and the stated error is of the directions only."""
EXAMPLE = """\
  python -m lora_sd resize cat.safetensors -o cat-8.safetensors --rank 8 --conv-rank 4
  python -m lora_sd resize cat.safetensors -o cat-small.safetensors --energy 0.95
  python -m lora_sd resize cat.safetensors -o cat-20mb.safetensors --size 20MB"""
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
TRIES = 5


@dataclass(frozen=True)
class Resized:
    """What `resize` did: the file holds `adapter`, which has this error against its source."""

    adapter: "Adapter"
    error: "TruncationError"
    notices: list[str]


def resize(
    source: Path,
    output: Path,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size_bytes: int | None = None,
    base: str | None = None,
    dtype: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    watch: Watch = progress,
) -> Resized:
    """Write an adapter at a lower rank, in its own format.

    Args:
        rank, conv_rank: the highest for linear layers and for convolutions; without `conv_rank`
            both have `rank`.
        energy: share (0..1) of each layer's energy to keep.
        size_bytes: the most that the file may take: the same share of energy in every layer, as
            high as fits.
        base: the base model or family, where the adapter's layers do not tell.
        dtype: 'float16', 'bfloat16', 'float32'; None: the source's.
        allow_partial: leave out what of the source cannot be read.
        watch: as of `arguments.progress`.

    Raises:
        ConfigError: no limit is given, or one that cannot be.
        AdapterError: the source cannot be read, the size cannot be reached, or what is read back is
            not what was meant.
        UserError: the output exists, or cannot be written.
    """
    from lora_sd.algebra.low_rank import RankLimit
    from lora_sd.algebra.resizing import resize as resized
    from lora_sd.algebra.resizing import spectra
    from lora_sd.verbs.source import read_source, write_result

    check_output(output, overwrite)
    check_rank_limit(rank, conv_rank, energy)
    if (rank, conv_rank, energy, size_bytes) == (None,) * 4:
        raise ConfigError("Say how far to resize: --rank, --conv-rank, --energy or --size.")
    found = read_source(source, base, allow_partial)
    chosen = found.chosen_dtype(dtype)
    limit = RankLimit(rank, conv_rank, energy)
    values = spectra(found.adapter, partial(watch, what="measuring"))
    if size_bytes is not None:
        return _to_size(found, output, limit, values, size_bytes, chosen, watch)
    adapter, error = resized(found.adapter, limit, values, partial(watch, what="resizing"))
    notices = found.notes + write_result(
        adapter, output, chosen, found.format, found.family, found.shapes
    )
    return Resized(adapter, error, notices)


def _to_size(
    found: "Source",
    output: Path,
    limit: "RankLimit",
    values: dict[str, "torch.Tensor"],
    size_bytes: int,
    dtype: "torch.dtype",
    watch: Watch,
) -> Resized:
    """Resize and write beside the output until the file fits; only then is it moved there.

    The header's size is not known before: taken as none, then from the last try.
    """
    from lora_sd import durable
    from lora_sd.algebra.resizing import limit_for_size, tensor_bytes
    from lora_sd.algebra.resizing import resize as resized
    from lora_sd.verbs.source import write_result

    header_bytes = 0
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output.parent) as folder:
        staged = Path(folder) / output.name
        for _ in range(TRIES):
            room = size_bytes - header_bytes
            tried = limit_for_size(found.adapter, values, room, dtype.itemsize, limit)
            if tried is None:
                raise AdapterError(_too_small(found, size_bytes, header_bytes, dtype.itemsize))
            adapter, error = resized(found.adapter, tried, values, partial(watch, what="resizing"))
            notices = found.notes + write_result(
                adapter, staged, dtype, found.format, found.family, found.shapes
            )
            ranks = {name: layer.rank for name, layer in adapter.layers.items()}
            written = staged.stat().st_size
            if written <= size_bytes:
                durable.replace(staged, output)
                return Resized(adapter, error, notices)
            header_bytes = written - tensor_bytes(found.adapter, ranks, dtype.itemsize)
        raise AdapterError(f"No file of at most {size_bytes:,} bytes was found; ask for less.")


def _too_small(found: "Source", size_bytes: int, header_bytes: int, itemsize: int) -> str:
    from lora_sd.algebra.resizing import tensor_bytes

    ones = dict.fromkeys(found.adapter.layers, 1)
    least = header_bytes + tensor_bytes(found.adapter, ones, itemsize)
    return (
        f"'{found.path}' cannot be made as small as {size_bytes:,} bytes: at rank 1 in every layer "
        f"it takes about {least:,} bytes. Ask for more, or for float16."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, .safetensors")
    add_output(parser)
    add_rank_limit(parser)
    parser.add_argument(
        "--size", metavar="BYTES", type=parsed_size, help="the largest file: 20MB, 500kB, 4.5MiB"
    )
    add_base(parser)
    add_dtype(parser)
    add_allow_partial(parser)


def run(options: argparse.Namespace) -> int:
    from lora_sd.algebra.spectrum import span

    done = resize(
        options.file,
        options.output,
        rank=options.rank,
        conv_rank=options.conv_rank,
        energy=options.energy,
        size_bytes=options.size,
        base=options.base,
        dtype=options.dtype,
        allow_partial=options.allow_partial,
        overwrite=options.overwrite,
    )
    layers = done.adapter.layers.values()
    ranks = span([layer.rank for layer in layers])
    before, after = (shown_size(p.stat().st_size) for p in (options.file, options.output))
    facts = [f"ranks {ranks}", f"{before} -> {after}", done.error.sentence()]
    dora = sum(layer.magnitude is not None for layer in layers)
    about_dora = f"{dora} DoRA layers keep their magnitude; the error is of their directions."
    tell_written(options.output, facts, [about_dora] * bool(dora) + done.notices)
    return 0


def parsed_size(text: str) -> int:
    """Bytes of '20MB' (10^6), '20MiB' (2^20), '500kB' or '20000'."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text, re.IGNORECASE)
    if not found or found[2].lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 20MB or 4.5MiB")
    return int(float(found[1]) * UNITS[found[2].lower()])

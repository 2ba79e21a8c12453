"""`inspect`: what an adapter file holds, in numbers, as a table, as JSON or as a plot."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd import durable
from lora_sd.errors import shown_size
from lora_sd.verbs.arguments import (
    Watch,
    add_allow_partial,
    add_base,
    check_output,
    progress,
)

if TYPE_CHECKING:
    from lora_sd.algebra.spectrum import Group, LayerFacts

DESCRIPTION = """\
Show what an adapter file holds, summed by block and kind of layer:

  norm       Frobenius norm of what is added to the base weights at scale 1
  of base    that norm over the norm of the base weights (with --base)
  energy     share of all squared norms
  eff. rank  directions in real use: exp of the entropy of the spectrum's energy shares
  stable     energy over that of the largest direction
  rank 95 %  rank that keeps 95 % of the energy: what `resize --energy 0.95` would choose

A 1x1 convolution counts as linear. For DoRA layers the numbers are of the low-rank part."""
EXAMPLE = """\
  python -m lora_sd inspect outputs/tiny/adapter.safetensors
  python -m lora_sd inspect cat.safetensors --base sd15.safetensors --plot cat.png"""
WIDEST_VALUE = 100


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        facts: one entry for each layer.
        sha256: of the whole file.
        notes: what was left out or read otherwise than the file says.
    """

    path: Path
    family: str
    format: str
    dtype: str
    size_bytes: int
    sha256: str
    parameters: int
    metadata: dict[str, str]
    facts: "Sequence[LayerFacts]"
    notes: list[str]


def inspect(
    path: Path, base: str | None = None, allow_partial: bool = False, watch: Watch = progress
) -> Inspection:
    """Read an adapter file and compute its numbers.

    Args:
        base: a base model, for norms relative to its weights: 'tiny-sd', a diffusers folder or a
            .safetensors file; or its family, which has no weights.
        allow_partial: leave out what of the file cannot be read.
        watch: as of `arguments.progress`.

    Raises:
        AdapterError: the file is damaged, or belongs to another model than `base`.
        BaseModelError: the base cannot be read.
    """
    from lora_sd.algebra.spectrum import layer_facts
    from lora_sd.verbs.source import base_reader, read_source

    source = read_source(path, base, allow_partial)
    adapter, read, notes = source.adapter, base_reader(base), source.notes
    if base is not None and read is None:
        notes.append(
            f"Norms relative to the base need its weights, and '{base}' is only a family's name: "
            f"give --base a diffusers folder or a .safetensors file."
        )
    facts = list(watch(layer_facts(adapter, read), "inspecting", len(adapter.layers)))
    weights = (tensor for w in adapter.layers.values() for tensor in (w.down, w.up))
    return Inspection(
        path=path,
        family=source.family,
        format=source.format,
        dtype=str(source.dtype).removeprefix("torch."),
        size_bytes=path.stat().st_size,
        sha256=durable.sha256(path),
        parameters=sum(tensor.numel() for tensor in weights),
        metadata=adapter.metadata,
        facts=facts,
        notes=notes,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, .safetensors")
    add_base(parser, "for relative norms, and ")
    add_allow_partial(parser)
    parser.add_argument("--layers", action="store_true", help="a row for each layer")
    parser.add_argument("--json", action="store_true", help="everything as JSON, for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw norms and spectra too")
    parser.add_argument(
        "--overwrite", action="store_true", help="write the plot even if the file exists already"
    )


def run(options: argparse.Namespace) -> int:
    if options.plot:
        check_output(options.plot, options.overwrite, ".png")
    found = inspect(options.file, options.base, options.allow_partial)
    if options.plot:
        from lora_sd.algebra.spectrum_plot import write_plot

        title = f"{found.path.name}: {_summary(found)}"
        write_plot(found.facts, title, options.plot)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
        return 0
    print(f"{found.path}\n  {_summary(found)}\n  sha256 {found.sha256}\n")
    for note in found.notes:
        print(f"{note}\n")
    print(table(found.facts, options.layers))
    print("\nmetadata")
    for line in metadata_lines(found.metadata):
        print(f"  {line}")
    if options.plot:
        print(f"\nplot: '{options.plot}'")
    return 0


def as_json(found: Inspection) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    from lora_sd.algebra.spectrum import by_block, by_kind

    def numbers(part: "LayerFacts") -> dict[str, Any]:
        return {
            "name": part.name,
            "shape": list(part.shape),
            "block": part.block,
            "kind": part.kind,
            "rank": part.rank,
            "alpha": part.alpha,
            "scaling": part.scaling,
            "norm": part.norm,
            "relative_norm": part.relative_norm,
            "effective_rank": part.effective_rank,
            "stable_rank": part.stable_rank,
            "dora": part.dora,
            "singular_values": list(part.values),
        }

    def sums(group: "Group") -> dict[str, Any]:
        return {
            "block": group.block,
            "kind": group.kind,
            "layers": len(group.layers),
            "norm": group.norm,
            "relative_norm": group.relative_norm,
            "energy": group.energy,
            "spectrum": group.spectrum(),
        }

    return {
        "file": found.path.name,
        "family": found.family,
        "format": found.format,
        "dtype": found.dtype,
        "size_bytes": found.size_bytes,
        "sha256": found.sha256,
        "parameters": found.parameters,
        "metadata": found.metadata,
        "notes": found.notes,
        "kinds": [sums(group) for group in by_kind(found.facts)],
        "blocks": [sums(group) for group in by_block(found.facts)],
        "layers": [numbers(part) for part in found.facts],
    }


def table(facts: "Sequence[LayerFacts]", each_layer: bool = False) -> str:
    """Rows by block and kind, or by layer, and the sums by kind below."""
    from lora_sd.algebra.spectrum import Group, by_block, by_kind

    rows = [Group(part.block, part.kind, [part]) for part in facts]
    names = [part.name for part in facts]
    if not each_layer:
        rows = by_block(facts)
        names = [group.name for group in rows]
    kinds = by_kind(facts)
    total = sum(group.energy for group in kinds) or 1.0
    with_base = all(group.relative_norm is not None for group in kinds)
    head = ["layer" if each_layer else "block", "layers", "rank", "alpha", "norm"]
    head += ["of base"] if with_base else []
    head += ["energy", "eff. rank", "stable", "rank 95 %"]

    def cells(name: str, group: Group) -> list[str]:
        relative = [f"{group.relative_norm:.2g}"] if group.relative_norm is not None else []
        return [
            name,
            str(len(group.layers)),
            group.ranks,
            group.alphas,
            f"{group.norm:.3g}",
            *(relative if with_base else []),
            f"{100 * group.energy / total:.1f} %",
            f"{group.mean(lambda layer: layer.effective_rank):.1f}",
            f"{group.mean(lambda layer: layer.stable_rank):.1f}",
            f"{group.mean(lambda layer: layer.rank_for_most):.1f}",
        ]

    body = [cells(name, group) for name, group in zip(names, rows, strict=True)]
    sums = [cells(f"all {group.kind}", group) for group in kinds]
    return "\n".join(_aligned([head, *body], sums))


def _aligned(rows: Sequence[Sequence[str]], sums: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, *sums, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells])

    ruler = "-" * len(line(rows[0]))
    yield line(rows[0])
    yield ruler
    yield from map(line, rows[1:])
    yield ruler
    yield from map(line, sums)


def metadata_lines(metadata: dict[str, str]) -> Iterator[str]:
    """'key  value' for each entry, long ones cut, without characters that drive a terminal."""
    if not metadata:
        yield "(none)"
    width = max(map(len, metadata), default=0)
    for key, value in sorted(metadata.items()):
        readable = _tags(value) if key == "ss_tag_frequency" else value
        shown = _printable(readable)
        if len(shown) > WIDEST_VALUE:
            shown = f"{shown[:WIDEST_VALUE].rstrip()} ... ({len(value):,} characters)"
        yield f"{_printable(key):{width}}  {shown}"


def _tags(value: str) -> str:
    """'24 x ink drawing, 10 x white background' of kohya's {folder: {tag: count}}."""
    try:
        counts = [entry for tags in json.loads(value).values() for entry in tags.items()]
        ordered = sorted(counts, key=lambda entry: -int(entry[1]))
    except (ValueError, TypeError, AttributeError):
        return value
    return ", ".join(f"{count} x {tag}" for tag, count in ordered)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _summary(found: Inspection) -> str:
    ranks = {fact.rank for fact in found.facts}
    rank = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    dora = sum(fact.dora for fact in found.facts)
    return ", ".join(
        [
            f"{found.family} adapter",
            f"{len(found.facts)} layers",
            rank,
            *([f"{dora} with DoRA"] if dora else []),
            f"{found.parameters:,} numbers",
            f"{found.format} format",
            found.dtype,
            shown_size(found.size_bytes),
        ]
    )

"""`verify`: whether an adapter file loads whole in every client."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sd.verbs.arguments import add_base

if TYPE_CHECKING:
    from lora_sd.verify import Report

DESCRIPTION = """\
Check that an adapter file loads whole and right in A1111, Forge, ComfyUI, InvokeAI, kohya's tools,
LyCORIS and diffusers, by the names and shapes that each of them accepts. For a model whose shapes
no client knows, as tiny-sd's, their naming rules stand in, and diffusers really loads the file.

Exit status: 0 every client loads all of it, 1 some do not, 2 the file cannot be read."""
EXAMPLE = """\
  python -m lora_sd verify outputs/tiny/adapter.safetensors"""


def verify(path: Path, base: str | None = None) -> "tuple[str, Report]":
    """(family, what was found) of an adapter file.

    Args:
        base: the base model or its family, where the file's layers do not tell. diffusers really
            loads the file where it is a diffusers folder that no client knows, or 'tiny-sd'.

    Raises:
        AdapterError: the file is damaged, or for no model that is known.
        BaseModelError: the base cannot be read.
    """
    import torch

    from lora_sd.base_files import open_base
    from lora_sd.base_loading import load_base_model
    from lora_sd.clients.tables import TABLES
    from lora_sd.formats.families import detect_family
    from lora_sd.parts import component_of
    from lora_sd.verify import check_file

    named = base or detect_family(path)
    if named in TABLES:
        return named, check_file(path, named)
    files = open_base(named)
    family = files.family or files.name
    has_two = any(component_of(name) == "text_encoder_2" for name in files.shapes)
    model = None
    if files.is_folder and family not in TABLES and not has_two:  # SDXL is not loaded
        model = load_base_model(named, torch.device("cpu"), torch.float32)
    return family, check_file(path, family, base=model, shapes=files.shapes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, .safetensors")
    add_base(parser)


def run(options: argparse.Namespace) -> int:
    from lora_sd.clients.report import TITLES

    family, report = verify(options.file, options.base)
    print(f"'{options.file}': {family} adapter, {report.modules} layers")
    rule = "would load all of it" if report.by_rules else "loads all of it"
    for client, found in report.clients.items():
        print(f"  {TITLES[client]:13}  {rule if found.ok else 'does not: see below'}")
    if report.in_diffusers is not None:
        print(
            f"  really loaded by diffusers: {'not right' if report.in_diffusers else 'all of it'}"
        )
    for line in report.lines():
        print(line)
    return 0 if report.ok and report.everywhere else 1

"""`verify`: whether an adapter file loads whole in every client."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Check that an adapter file loads whole and right in A1111, Forge, ComfyUI, InvokeAI, kohya's tools,
LyCORIS and diffusers, by the names and shapes that each of them accepts. Nothing is written.

Exit status: 0 every client loads all of it, 1 some do not, 2 the file cannot be read."""
EXAMPLE = """\
  python -m lora_sd verify outputs/tiny/adapter.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, .safetensors")


def run(options: argparse.Namespace) -> int:
    from lora_sd.formats.families import detect_family
    from lora_sd.verify import check_file

    report = check_file(options.file, detect_family(options.file))
    print(f"'{options.file}': {report.summary()}")
    for line in report.lines():
        print(line)
    return 0 if report.ok else 1

"""Pickled checkpoints: refused, with the command that converts them."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_sd.errors import BaseModelError

SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
BEGINNINGS = (b"PK\x03\x04", b"\x80")  # a zip archive, as torch writes since 1.6; a bare pickle
# One line without double quotes, as every shell takes it. Opened, as torch goes by names otherwise.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; a = sys.argv[1:]; "
    "[save_file({k: t.contiguous().clone() for k, t in s.get('state_dict', s).items() "
    "if torch.is_tensor(t)}, new, {'format': 'pt'}) for old, new in zip(a[::2], a[1::2]) "
    "for s in [torch.load(open(old, 'rb'), map_location='cpu', weights_only=True)]]"
)
PICKLED_STEM = {"model": "pytorch_model"}
"""What transformers calls the file of pickled weights whose safetensors file is 'model'."""


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or by how it begins."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            # A safetensors file begins with a length in 8 bytes, which may be any, and a brace.
            return start.startswith(BEGINNINGS) and not start.endswith(b"{")
    except OSError:
        return False


def refusal(name: str, files: Sequence[Path]) -> BaseModelError:
    """Says that a model is pickled, and how to convert its files."""
    return BaseModelError(
        f"'{name}' is pickled, and a pickle can run any program when it is read. Get the model as "
        f".safetensors, or convert it, on a machine that holds nothing of worth, with: "
        f"{command({file: converted(file) for file in files})}"
    )


def converted(file: Path) -> Path:
    """The name of a pickle's safetensors file, which does not exist yet."""
    stem = file.stem
    for new, old in PICKLED_STEM.items():
        if stem.partition(".")[0] == old:
            stem = new + stem.removeprefix(old)
    target = file.with_name(f"{stem}.safetensors")
    return file.with_name(f"{stem}_converted.safetensors") if target.exists() else target


def command(files: Mapping[Path, Path]) -> str:
    """A command line that converts files and runs nothing that is in them."""
    names = [str(name) for pair in files.items() for name in pair]
    quoted = subprocess.list2cmdline(names) if os.name == "nt" else shlex.join(names)
    return f'python -c "{CONVERT}" {quoted}'

"""Save and resume a run: whole or not at all, and bit for bit.

A checkpoint is a folder that appears with one rename, after every file in it is on the disk:

    adapter.safetensors   the adapter in float32, usable like the result
    optimizer.pt          optimizer, schedule and gradient scaler (loaded with weights_only)
    manifest.json         written last: step, settings, data, versions, and every file's SHA-256
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_sd import __version__, durable
from lora_sd.adapter import Adapter
from lora_sd.algebra.comparison import compare
from lora_sd.errors import RunError, UserError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.run_folder import RunFolder

FORMAT = 1
ADAPTER, OPTIMIZER, MANIFEST = "adapter.safetensors", "optimizer.pt", "manifest.json"
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on as itself."""

    config: dict[str, Any]
    data: str
    base: str


def save(
    run: RunFolder,
    step: int,
    adapter: Adapter,
    state: dict[str, Any],
    identity: Identity,
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    Raises:
        RunError: the disk has no room for it; nothing has been written or removed then.
    """
    final = run.checkpoint(step)
    if final.exists():
        try:
            _read_manifest(final)
            return final
        except ValueError:  # damaged, and passed over when the run was resumed
            durable.remove_folder(final)
    need = SPARE_BYTES + 2 * max((_size(old) for old in _folders(run)), default=0)
    free = shutil.disk_usage(run.path).free
    if free < need:
        raise RunError(
            f"'{run.path}' has {free / 1e6:.0f} MB of free disk, and a checkpoint wants "
            f"{need / 1e6:.0f} MB. Make room, then go on with --resume '{run.path}'."
        )

    def fill(folder: Path) -> None:
        save_adapter(adapter, folder / ADAPTER, torch.float32, exact=True)
        _read_back(folder / ADAPTER, adapter)
        torch.save(state, folder / OPTIMIZER)
        manifest = {
            "format": FORMAT,
            "step": step,
            "config": identity.config,
            "data": identity.data,
            "base": identity.base,
            "versions": {"lora_sd": __version__, "torch": torch.__version__},
            "files": {
                name: [(folder / name).stat().st_size, durable.sha256(folder / name)]
                for name in (ADAPTER, OPTIMIZER)
            },
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    try:
        durable.write_folder(final, fill)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise RunError(
            f"The checkpoint '{final}' could not be written: {reason}. Earlier "
            f"ones are whole; go on with --resume '{run.path}'."
        ) from error
    for old in _folders(run)[:-keep]:
        durable.remove_folder(old)
    return final


def _read_back(file: Path, adapter: Adapter) -> None:
    """Raises RunError when an adapter's file does not hold what was saved."""
    shapes = {name: layer.weight_shape for name, layer in adapter.layers.items()}
    comparison = compare(load_adapter(file, shapes), adapter)
    if not comparison.ok:
        raise RunError(f"what was read back of {ADAPTER} is not what was saved")


def find_newest(run: RunFolder, identity: Identity) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint, why newer ones were passed over).

    None when the run has not saved any yet.

    Raises:
        RunError: there are checkpoints and all are damaged, or the run is no longer the same:
            its settings, pictures or base model have changed.
    """
    rejected = []
    folders = _folders(run)
    for folder in reversed(folders):
        try:
            manifest = _read_manifest(folder)
        except ValueError as error:
            rejected.append(f"'{folder}' is passed over: {error}.")
            continue
        _check_same(run, manifest, identity)
        return folder, rejected
    if folders:
        raise RunError(
            [f"No checkpoint of '{run.path}' can be used; nothing was changed.", *rejected]
        )
    return None, rejected


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The optimizer's, schedule's and scaler's state of a checkpoint that `find_newest` chose."""
    return dict(torch.load(folder / OPTIMIZER, map_location=device, weights_only=True))


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, which its name says and a whole manifest confirms."""
    return int(folder.name.removeprefix("step_"))


def clean(run: RunFolder) -> int:
    """Remove what a killed save left behind; the number of leftovers. Only under the run's lock."""
    leftovers = list(run.checkpoints.glob(".tmp-*"))
    for leftover in leftovers:
        durable.remove_folder(leftover)
    return len(leftovers)


def _folders(run: RunFolder) -> list[Path]:
    """Checkpoint folders by step, oldest first: by the name, never by the clock."""
    folders = [
        folder
        for folder in run.checkpoints.glob("step_*")
        if re.fullmatch(r"step_\d+", folder.name) and folder.is_dir()
    ]
    return sorted(folders, key=step_of)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest whose files are all as it says; ValueError with the reason otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        if not all(isinstance(group, dict) for group in manifest["config"].values()):
            raise TypeError("groups of settings expected")
        str(manifest["data"] + manifest["base"])
        wrong_step = manifest["step"] != step_of(folder)
        version = manifest["format"]
    except FileNotFoundError:
        raise ValueError("it has no manifest") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("its manifest is damaged") from None
    if version != FORMAT:
        raise ValueError(f"its format is {version}, and this version reads {FORMAT}")
    if wrong_step:
        raise ValueError("its manifest is of another step")
    for name in (ADAPTER, OPTIMIZER):
        size, digest = files.get(name, (None, None))
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size or durable.sha256(file) != digest:
            raise ValueError(f"{name} is damaged")
    return dict(manifest)


def _check_same(run: RunFolder, manifest: dict[str, Any], identity: Identity) -> None:
    problems = [
        f"'{group}.{name}' was {was!r} and is now {identity.config[group].get(name)!r}"
        for group, settings in manifest["config"].items()
        for name, was in settings.items()
        if identity.config.get(group, {}).get(name) != was
    ]
    if manifest["data"] != identity.data:
        problems.append("the images or captions have changed")
    if manifest["base"] != identity.base:
        problems.append("the base model has changed")
    if problems:
        raise RunError(
            f"'{run.path}' cannot go on as the same run: {'; '.join(problems)}. Put that back, or "
            f"start a new run."
        )

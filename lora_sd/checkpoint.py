"""Save a run and find where it stood: whole or not at all, and bit for bit.

A checkpoint is a folder that appears with one rename, after every file in it is on the disk:

    adapter.safetensors   the weights that learn, in float32; usable like the result,
                          but where that is an average
    state.pt              states by name: optimizer, schedule, ... (read with weights_only)
    pictures.json         a fingerprint of every picture with its caption, by name
    manifest.json         written last: step, settings, versions, every file's size and SHA-256,
                          and a SHA-256 of itself

There are no random states in it: all that is drawn is a function of the seed and the step.
"""

import importlib.metadata
import io
import json
import logging
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_sd import __version__, durable
from lora_sd.adapter import Adapter
from lora_sd.algebra.comparison import compare
from lora_sd.errors import BadNumbers, DiskFull, RunError, UserError, shown_list, shown_size
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")
FORMAT = 2
ADAPTER, STATE, PICTURES, MANIFEST = (
    "adapter.safetensors", "state.pt", "pictures.json", "manifest.json",
)  # fmt: skip
FILES = (ADAPTER, STATE, PICTURES)
SPARE_BYTES = 64 * 2**20
TIMES_LAST = 2  # so much room is wanted, of what the last checkpoint took
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on as itself.

    Attributes:
        config: the settings by group.
        pictures: a fingerprint of each picture with its caption, by name, in the run's order.
        base: a fingerprint of the base model.
        step_pictures: pictures in a step, of all processes and passes together.
    """

    config: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, str]
    base: str
    step_pictures: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all as its manifest says."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    def identity(self) -> Identity:
        """What the run was when it was saved."""
        pictures = json.loads((self.folder / PICTURES).read_text(encoding="utf-8"))
        return Identity(
            self.manifest["config"], pictures, self.manifest["base"], self.manifest["step_pictures"]
        )

    def adapter(self, shapes: Mapping[str, torch.Size]) -> Adapter:
        """The adapter, given the shapes of the layers' weights."""
        return load_adapter(self.folder / ADAPTER, shapes)

    def state(self, device: torch.device) -> dict[str, Any]:
        """The states by name."""
        # accelerate's CPU of several processes is 'cpu:0', which torch.load does not know.
        place = torch.device("cpu") if device.type == "cpu" else device
        return dict(torch.load(self.folder / STATE, map_location=place, weights_only=True))


@dataclass(frozen=True)
class Rejected:
    """A folder that is no checkpoint to go on from; `reason` is a clause."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        return f"'{self.folder}' is passed over: {self.reason}."


def save(
    run: RunFolder,
    step: int,
    adapter: Adapter,
    state: Mapping[str, Any],
    identity: Identity,
    keep: int,
    wait: Callable[[str], bool] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`.

    Args:
        state: what `state_dict()` gave, by name.
        wait: called with a sentence, again and again, while there is no room; it takes a moment,
            and says whether to go on waiting. None: no room is an error at once.

    Raises:
        BadNumbers: a weight or a state is no finite number.
        DiskFull: there is no room for it.
        RunError: it cannot be written, or the run's folder has gone.

        Earlier checkpoints are as they were then.
    """
    run.check_there()
    final = run.checkpoint(step)
    if final.exists():
        try:
            _read_manifest(final)
            return final
        except ValueError:  # damaged since it was written
            durable.remove_folder(final)
    _check_finite(step, adapter, state)
    serialized = io.BytesIO()  # torch.save to a full disk says nothing of the disk
    torch.save(dict(state), serialized)

    def fill(folder: Path) -> None:
        save_adapter(adapter, folder / ADAPTER, torch.float32, exact=True)
        _read_back(folder / ADAPTER, adapter)
        (folder / STATE).write_bytes(serialized.getbuffer())
        (folder / PICTURES).write_text(json.dumps(dict(identity.pictures)), encoding="utf-8")
        _write_manifest(folder, step, identity, sorted(state))

    while True:
        try:
            _check_room(run, serialized.getbuffer().nbytes)
            durable.write_folder(final, fill)
            break
        except (OSError, UserError) as error:
            run.check_there()
            if not durable.is_full(error):
                raise RunError(_not_written(run, final, error)) from error
            said = str(error) if isinstance(error, _NoRoom) else _not_written(run, final, error)
            if wait is None or not wait(said):
                raise DiskFull(
                    f"{said} Make room, then go on with --resume '{run.path}'."
                ) from error
    prune(run, keep)
    return final


def prune(run: RunFolder, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`. Only under the run's lock."""
    for old in _folders(run)[:-keep]:
        try:
            durable.remove_folder(old)
        except OSError as error:  # the new one is safe, and the old one is tried again next time
            log.warning("Note: '%s' could not be removed: %s.", old, error.strerror or error)


class _NoRoom(DiskFull):
    """Found before anything is written."""


def _check_room(run: RunFolder, state_bytes: int) -> None:
    largest = max([state_bytes, *(_size(old) for old in _folders(run))])
    need = SPARE_BYTES + TIMES_LAST * largest
    free = shutil.disk_usage(run.checkpoints if run.checkpoints.is_dir() else run.path).free
    if free < need:
        raise _NoRoom(
            f"'{run.path}' has {shown_size(free)} of free disk, and a checkpoint wants "
            f"{shown_size(need)}."
        )


def _not_written(run: RunFolder, final: Path, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    reason = str(error).rstrip(".") if cause is None else cause.strerror or str(cause)
    earlier = f" Earlier ones in '{run.path}' are whole." if _folders(run) else ""
    return f"The checkpoint '{final}' could not be written: {reason}.{earlier}"


def _check_finite(step: int, adapter: Adapter, state: Mapping[str, Any]) -> None:
    """Raises BadNumbers when anything that is to be kept is no finite number."""
    bad = [
        name
        for name, layer in adapter.layers.items()
        if not all(_is_finite(value) for value in vars(layer).values())
    ]
    if bad:
        raise BadNumbers(
            f"Step {step} is not saved: {len(bad)} layers hold values that are no finite numbers, "
            f"such as {shown_list(bad, 3)}. Earlier checkpoints are whole."
        )
    bad = [name for name, values in state.items() if not all(map(_is_finite, _tensors(values)))]
    if bad:
        raise BadNumbers(
            f"Step {step} is not saved: values in the state of {shown_list(bad)} are no finite "
            f"numbers. Earlier checkpoints are whole."
        )


def _is_finite(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(value.isfinite().all())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if type(values) in (torch.Tensor, torch.nn.Parameter):  # quantised ones judge themselves
        yield values
    elif isinstance(values, Mapping):
        for one in values.values():
            yield from _tensors(one)
    elif isinstance(values, list | tuple):
        for one in values:
            yield from _tensors(one)


def _read_back(file: Path, adapter: Adapter) -> None:
    """Raises RunError when an adapter's file does not hold what was saved."""
    shapes = {name: layer.weight_shape for name, layer in adapter.layers.items()}
    comparison = compare(load_adapter(file, shapes), adapter)
    if not comparison.ok:
        raise RunError(f"what was read back of {ADAPTER} is not what was saved")


def versions() -> dict[str, str]:
    """The versions that a run's numbers may depend on, by name."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"lora_sd": __version__, "python": platform.python_version(), **libraries}


def _write_manifest(folder: Path, step: int, identity: Identity, states: list[str]) -> None:
    files = {
        name: [(folder / name).stat().st_size, durable.sha256(folder / name)] for name in FILES
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "step_pictures": identity.step_pictures,
        "base": identity.base,
        "states": states,
        "versions": versions(),
        "files": files,
        "config": {group: dict(values) for group, values in identity.config.items()},
    }
    # As it is read: a tuple of the settings is a list then.
    manifest = json.loads(json.dumps(manifest))
    text = json.dumps({**manifest, "sha256": _own_digest(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _own_digest(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return durable.sha256_bytes(json.dumps(rest, sort_keys=True).encode())


def find_newest(run: RunFolder) -> tuple[Checkpoint | None, list[Rejected]]:
    """(the newest whole checkpoint, what was passed over on the way to it, newest first).

    None when the run has not saved any yet. Newest is by the step, never by the clock.

    Raises:
        RunError: there are checkpoints, and each is damaged in some way that is told.
    """
    rejected: list[Rejected] = []
    folders = _folders(run)
    for folder in reversed(folders):
        try:
            return Checkpoint(folder, step_of(folder), _read_manifest(folder)), rejected
        except ValueError as error:
            rejected.append(Rejected(folder, str(error)))
    if folders:
        raise RunError(
            [
                f"No checkpoint of '{run.path}' can be used; nothing was changed.",
                *map(str, rejected),
            ]
        )
    return None, rejected


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, which its name says and a whole manifest confirms."""
    return int(folder.name.removeprefix("step_"))


def set_aside(rejected: Rejected) -> Path | None:
    """Rename a damaged folder, so that it neither counts as a checkpoint nor is removed as an old
    one; its new place. Only under the run's lock."""
    folder = rejected.folder
    place = folder.with_name(f"damaged_{folder.name}")
    number = 1
    while place.exists():
        number += 1
        place = folder.with_name(f"damaged_{folder.name}-{number}")
    try:
        folder.rename(place)
    except OSError:
        return None
    return place


def clean(run: RunFolder) -> int:
    """Remove what a killed process left half written; the number of leftovers. Only under the
    run's lock."""
    folders = (run.path, run.checkpoints, run.samples)
    leftovers = [leftover for folder in folders for leftover in folder.glob(".tmp-*")]
    for leftover in leftovers:
        durable.remove_folder(leftover)
    return len(leftovers)


def _folders(run: RunFolder) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    folders = [
        folder
        for folder in run.checkpoints.glob("step_*")
        if re.fullmatch(r"step_\d+", folder.name) and folder.is_dir()
    ]
    return sorted(folders, key=step_of)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest whose files are all as it says; ValueError with the reason otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if isinstance(version, int) and version != FORMAT:
            age = "a newer" if version > FORMAT else "an older"
            raise _Reason(
                f"it is of {age} version of lora_sd (format {version}; this one reads {FORMAT})"
            )
        if manifest["sha256"] != _own_digest(manifest):
            raise TypeError("not what was written")
        files = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
    except _Reason as reason:
        raise ValueError(str(reason)) from None
    except FileNotFoundError:
        raise ValueError("it has no manifest") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("its manifest is damaged") from None
    if manifest["step"] != step_of(folder):
        raise ValueError(f"its manifest is of another step, {manifest['step']}")
    for name in FILES:
        size, digest = files.get(name, (None, None))
        file = folder / name
        try:
            if file.stat().st_size != size or durable.sha256(file) != digest:
                raise ValueError(f"{name} is damaged")
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
    return dict(manifest)


class _Reason(Exception):
    """Why a manifest is not read, as a clause."""

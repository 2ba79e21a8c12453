"""Files of the Adapters tab: imported, renamed, put into the trash and taken out of it.

.app/adapters/cat.safetensors              an imported file, cat.json beside it: what was said of it
.app/trash/adapters/20260102-030405-cat/   what was deleted: a run's folder, or an imported file
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lora_sd import durable
from lora_sd.errors import AdapterError, RunError
from lora_sd.run_folder import NAME_PATTERN, RunFolder, open_run
from lora_sd.ui.adapters.offered import (
    UPLOAD_MARK,
    UPLOADS,
    OfferedAdapter,
    add_upload,
    find_adapter,
    free_file,
    said_file,
)
from lora_sd.ui.launch import DATASETS
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

KEPT = ".app"
TRASH = ".app/trash/adapters"
MOST_IMPORTED = 1_000
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows keeps these


@dataclass(frozen=True)
class Trashed:
    """Something in the trash, by the name of its folder there."""

    id: str
    name: str


def import_file(outputs: Path, file: Path, base: str = "") -> OfferedAdapter:
    """Keep an uploaded adapter file that can be read wholly.

    Args:
        file: where Gradio put the upload.
        base: the base model that it is said to be for; '': its layers tell.

    Raises:
        UserError: it is no adapter, is damaged, or belongs to another model.
    """
    from lora_sd.verbs.source import read_source

    if len(list((outputs / UPLOADS).glob("*.safetensors"))) >= MOST_IMPORTED:
        raise AdapterError(say("adapters.too_many", most=MOST_IMPORTED))
    read_source(file, base or None)
    return add_upload(outputs, file, base)


def rename(place: Workplace, item: str, wish: object) -> str:
    """Give a run or an imported file another name; its new id.

    Raises:
        UserError: the name cannot be or is taken, or the run is at work.
    """
    name = checked_name(wish)
    if item.startswith(UPLOAD_MARK):
        file = find_adapter(place.outputs, item).file
        target = file.with_name(f"{name}.safetensors")
        if os.path.lexists(target):
            raise AdapterError(say("adapters.taken", name=name))
        _move(file, target)
        with contextlib.suppress(FileNotFoundError):
            os.rename(said_file(file), said_file(target))
        return UPLOAD_MARK + name
    if name == DATASETS or os.path.lexists(place.outputs / name):
        raise RunError(say("adapters.taken", name=name))
    with _at_rest(place, item) as run:
        _move(run.path, place.outputs / name)
    _move_start(place.outputs / KEPT, item, place.outputs / KEPT, name)
    return name


def move_to_trash(place: Workplace, item: str) -> Trashed:
    """Delete a run with all that it saved, or an imported file, so that it can be taken back.

    Raises:
        UserError: the run is at work or waits in the queue, or there is no such thing.
    """
    name = item.removeprefix(UPLOAD_MARK)
    number, folder = 1, _new_trash(place.outputs, name)
    while folder.exists():
        number += 1
        folder = _new_trash(place.outputs, f"{name}-{number}")
    if item.startswith(UPLOAD_MARK):
        file = find_adapter(place.outputs, item).file
        folder.mkdir(parents=True)
        _move(file, folder / file.name)
        with contextlib.suppress(FileNotFoundError):
            os.rename(said_file(file), folder / said_file(file).name)
    else:
        with _at_rest(place, item) as run:
            folder.mkdir(parents=True)
            _move(run.path, folder / name)
        _move_start(place.outputs / KEPT, name, folder, name)
    return Trashed(folder.name, name)


def trashed(outputs: Path) -> list[Trashed]:
    """What is in the trash, the last deleted first."""
    folders = sorted((outputs / TRASH).glob("*-*-*"), reverse=True)
    return [Trashed(f.name, content.name) for f in folders if (content := _content(f))]


def restore(outputs: Path, trash_id: object) -> str:
    """Take something out of the trash; its id, under a free name where its own is taken.

    Raises:
        UserError: it is not, or no longer, in the trash.
    """
    folder = _trash_folder(outputs, trash_id)
    content = _content(folder)
    if content is None:
        raise AdapterError(say("adapters.not_in_trash"))
    if content.is_dir():
        number, target = 1, outputs / content.name
        while os.path.lexists(target):
            number += 1
            target = outputs / f"{content.name}-{number}"
        _move(content, target)
        _move_start(folder, content.name, outputs / KEPT, target.name)
        restored = target.name
    else:
        target = free_file(outputs, content.stem)
        _move(content, target)
        with contextlib.suppress(FileNotFoundError):
            os.rename(said_file(content), said_file(target))
        restored = UPLOAD_MARK + target.stem
    durable.remove_folder(folder)
    return restored


def empty_trash(outputs: Path) -> None:
    """Delete for good what is in the trash."""
    try:
        durable.remove_folder(outputs / TRASH)
    except OSError as error:
        raise AdapterError(say("adapters.not_emptied", why=error.strerror or error)) from None


def checked_name(wish: object) -> str:
    """A name that a run, an adapter or a model can have.

    Raises:
        AdapterError: it cannot be.
    """
    name = wish.strip() if isinstance(wish, str) else ""
    name = name.removesuffix(".safetensors")
    if not NAME_PATTERN.fullmatch(name) or DEVICES.fullmatch(name) or name.endswith("."):
        raise AdapterError(say("adapters.bad_name"))
    return name


@contextmanager
def _at_rest(place: Workplace, name: str) -> Iterator[RunFolder]:
    """A run that no trainer works on, and none can begin to as long as this holds.

    Raises:
        RunError: it is at work, waits in the queue, or there is none.
    """
    try:
        run = open_run(place.outputs, name)
    except RunError:
        raise RunError(say("adapters.no_longer", name=name)) from None
    if place.trainer.current() == name or place.trainer.is_stopping(name):
        raise RunError(say("adapters.at_work", name=name))
    if any(entry.run == name for entry in place.queue.state().entries):
        raise RunError(say("adapters.in_queue", name=name))
    lock = FileLock(run.lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(say("adapters.at_work", name=name)) from None
    except OSError as error:
        raise RunError(say("adapters.not_moved", why=error.strerror or error)) from None
    try:
        yield run
    finally:
        lock.release()


def _move(old: Path, new: Path) -> None:
    try:
        os.rename(old, new)
        durable.sync_folder(new.parent)
    except FileNotFoundError:
        raise AdapterError(say("adapters.no_longer", name=old.stem)) from None
    except OSError as error:  # Windows: a program has one of its files open
        raise AdapterError(say("adapters.not_moved", why=error.strerror or error)) from None


def _move_start(old_folder: Path, old: str, folder: Path, name: str) -> None:
    """Move what the last start of a run left beside the runs, as `Trainer` keeps it."""
    for ending in ("log", "yaml"):
        with contextlib.suppress(OSError):
            os.rename(old_folder / f"{old}.{ending}", folder / f"{name}.{ending}")


def _new_trash(outputs: Path, name: str) -> Path:
    return outputs / TRASH / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def _trash_folder(outputs: Path, trash_id: object) -> Path:
    for one in trashed(outputs):
        if one.id == trash_id:
            return outputs / TRASH / one.id
    raise AdapterError(say("adapters.not_in_trash"))


def _content(folder: Path) -> Path | None:
    """The run or the adapter file in a folder of the trash."""
    found = [p for p in folder.iterdir() if p.is_dir() or p.suffix == ".safetensors"]
    return found[0] if found else None

"""The data sets that are kept in <outputs>/datasets: made, changed, copied, deleted, brought back.

What is deleted lies in <outputs>/.app/datasets/deleted for a week, and is gone with the first
deletion after that.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lora_sd import durable
from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.data import caption_files
from lora_sd.data.caption_sources import kohya_name
from lora_sd.data.listing import list_folder, stem_key
from lora_sd.errors import DataError, UserError
from lora_sd.run_folder import NAME_PATTERN, open_run
from lora_sd.ui.data.history import History
from lora_sd.ui.data.look import captions_of
from lora_sd.ui.data.pictures import Cancelled, OnFile, Upload
from lora_sd.ui.launch import DATASETS
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

KEPT_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Deleted:
    """A deleted data set that can be brought back."""

    id: str
    name: str
    at: float


class SavedSets:
    """The data sets of an outputs folder.

    Args:
        place: whose outputs they lie in, and whose runs may be at work on them.
    """

    def __init__(self, place: Workplace) -> None:
        self._root, self._place = place.outputs / DATASETS, place.outputs / ".app" / DATASETS
        self._work = place

    def history(self, name: str) -> History:
        """The changes of a data set."""
        return History(self._root / name, self._place / "changes" / name)

    def make(self, name: str, uploads: Sequence[Upload], on_file: OnFile) -> None:
        """A new data set of uploaded pictures.

        Raises:
            DataError: the name cannot be used or is taken, or there are no pictures.
            Cancelled: `on_file`, called with (files done, of how many), returned True.
        """
        if not uploads:
            raise DataError(say("data.upload.none"))
        files, _ = _files_of(uploads, set())
        self._new(name, files, on_file)

    def copy(self, source: Path, name: str, on_file: OnFile) -> None:
        """A new data set of the pictures, captions and masks of any folder; as `make`.

        Captions from all sources become .txt files; folders keep their names, which say repeats.
        """
        listing = list_folder(source)
        inside = f"{source.name}/" if kohya_name(source.name) else ""
        files: dict[str, bytes | Path] = {}
        for one in captions_of(listing):
            files[inside + one.name] = listing.path(one.name)
            if one.lines:
                text = PurePosixPath(inside + one.name).with_suffix(".txt")
                files[str(text)] = _text(one.lines)
        for mask in listing.masks.values():
            files[inside + mask] = listing.path(mask)
        self._new(name, files, on_file)

    def add(self, name: str, uploads: Sequence[Upload]) -> dict[str, str]:
        """Add uploaded pictures to a data set; the new names of those whose own are taken."""
        listing = list_folder(self._root / name)
        files, renamed = _files_of(uploads, {stem_key(one) for one in listing.pictures})
        values = {"count": len(uploads)}
        self.history(name).change(_counted("data.did.added", len(uploads)), values, files)
        return renamed

    def write_captions(
        self, name: str, captions: Mapping[str, str], what: str, values: dict[str, Any]
    ) -> None:
        """Change captions by picture; an empty one removes the picture's caption files.

        Args:
            what, values: as for `History.change`.
        """
        listing = list_folder(self._root / name)
        files: dict[str, bytes | None] = {}
        for picture, caption in captions.items():
            own = listing.captions.get(stem_key(picture), [])
            if caption:
                texts = [one for one in own if one.lower().endswith(".txt")]
                file = texts[0] if texts else str(PurePosixPath(picture).with_suffix(".txt"))
                files[file] = _text(caption)
            else:
                files |= dict.fromkeys(own)
        if files:
            self.history(name).change(what, values, files)

    def remove(self, name: str, picture: str) -> None:
        """Take a picture with its captions and mask out of a data set.

        Raises:
            DataError: a run is at work with them.
        """
        self.check_idle(name)
        listing = list_folder(self._root / name)
        stem = stem_key(picture)
        alone = sum(stem_key(one) == stem for one in listing.pictures) == 1
        with_it = [*listing.captions.get(stem, []), listing.masks.get(stem)] if alone else []
        files = dict.fromkeys(filter(None, [picture, *with_it]))
        self.history(name).change("data.did.removed", {"name": picture}, files)

    def check_idle(self, name: str) -> None:
        """Raises DataError while a run that reads this data set is at work or waits."""
        ours = os.path.abspath(self._root / name)
        for run, config in self._configs_at_work():
            if ours in (os.path.abspath(one["folder"]) for one in config.data.folder_options()):
                raise DataError(say("data.in_use", run=run))

    def _configs_at_work(self) -> Iterator[tuple[str, Config]]:
        """(run, its settings) of the run at work and of those that wait."""
        current = self._work.trainer.current()
        texts = [(one.run, one.config) for one in self._work.queue.state().entries]
        for run, text in [*([(current, None)] if current else []), *texts]:
            with contextlib.suppress(UserError, yaml.YAMLError, OSError):
                values = (
                    yaml.safe_load(text)
                    if text
                    else read_yaml(open_run(self._work.outputs, run).config_file)
                )
                yield run, config_from_values(values)

    def delete(self, name: str) -> None:
        """Delete a data set; `bring_back` undoes that.

        Raises:
            DataError: a run is at work with it.
        """
        self.check_idle(name)
        for one in self.deleted():
            if time.time() - one.at > KEPT_S:
                durable.remove_folder(self._place / "deleted" / one.id)
        gone = self._place / "deleted" / f"{time.time_ns()}-{name}"
        gone.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._place / "changes" / name, gone / "changes")
        os.replace(self._root / name, gone / "pictures")

    def deleted(self) -> list[Deleted]:
        """What can be brought back, the newest first."""
        found = []
        for pictures in (self._place / "deleted").glob("[0-9]*-*/pictures"):
            at, _, name = pictures.parent.name.partition("-")
            found.append(Deleted(pictures.parent.name, name, int(at) / 1e9))
        return sorted(found, key=lambda one: -one.at)

    def bring_back(self, deleted_id: object) -> str:
        """The name of a data set that is there again.

        Raises:
            DataError: it is not to be had, or there is one of its name again.
        """
        found = next((one for one in self.deleted() if one.id == deleted_id), None)
        if found is None:
            raise DataError(say("data.deleted.none"))
        if (self._root / found.name).exists():
            raise DataError(say("data.taken", name=found.name))
        gone = self._place / "deleted" / found.id
        os.replace(gone / "pictures", self._root / found.name)
        durable.remove_folder(self._place / "changes" / found.name)
        with contextlib.suppress(FileNotFoundError):
            os.replace(gone / "changes", self._place / "changes" / found.name)
        durable.remove_folder(gone)
        return found.name

    def free_name(self, wanted: str) -> str:
        """A name that no data set has: the wanted one, or that with a number."""
        name, number = wanted, 1
        while (self._root / name).exists():
            number += 1
            name = f"{wanted[:60]}-{number}"
        return name

    def _new(self, name: str, files: Mapping[str, bytes | Path], on_file: OnFile) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise DataError(say("data.bad_name"))
        if (self._root / name).exists():
            raise DataError(say("data.taken", name=name))

        def fill(folder: Path) -> None:
            for done, (file, content) in enumerate(files.items()):
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                else:
                    shutil.copyfile(content, target)
                if on_file(done + 1, len(files)):
                    raise Cancelled

        try:
            durable.write_folder(self._root / name, fill)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise DataError(say("data.not_written", name=name, why=why)) from None
        durable.remove_folder(self._place / "changes" / name)  # of one that was removed by hand


def _files_of(
    uploads: Sequence[Upload], taken: set[str]
) -> tuple[dict[str, bytes | Path], dict[str, str]]:
    """(the files of uploaded pictures by name, the new names of those whose own are taken)."""
    files: dict[str, bytes | Path] = {}
    renamed: dict[str, str] = {}
    taken = set(taken)
    for upload in uploads:
        stem, number = upload.file.stem, 1
        while stem_key(f"{stem}.png") in taken:
            number += 1
            stem = f"{upload.file.stem}-{number}"
        taken.add(stem_key(f"{stem}.png"))
        name = stem + upload.file.suffix
        if name != upload.file.name:
            renamed[upload.file.name] = name
        files[name] = upload.file
        if upload.mask:
            ending = upload.mask.stem[len(upload.file.stem) :]
            files[f"{stem}{ending}{upload.mask.suffix}"] = upload.mask
        if caption := caption_files.tidy(upload.caption, keep_lines=True):
            files[f"{stem}.txt"] = _text(caption)
    return files, renamed


def _text(caption: str) -> bytes:
    return f"{caption}\n".encode()


def _counted(key: str, count: int) -> str:
    return f"{key}.{'one' if count == 1 else 'many'}"

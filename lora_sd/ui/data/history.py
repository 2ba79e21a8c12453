"""Changes to a saved data set, each of which can be undone and done again.

A change is a folder of its own, `<place>/000012/`: `change.json` says what was done and which files
it touched, `old/` has those files as they were before, `new/` as they were left. Undoing puts
`old/` in place, doing it again `new/`; a file that is not there is removed. Both may be repeated,
so a crash in the middle of either loses nothing.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_sd import durable

MOST_KEPT = 100
ONE_EDIT_S = 600.0
"""Edits of one file that follow each other within that time are one change."""
THREADS = 8  # they wait for the disk


@dataclass(frozen=True)
class Change:
    """What was done, as a key of the texts with its values, and the files it touched."""

    what: str
    values: dict[str, Any]
    names: list[str]
    undone: bool = False
    at: float = field(default_factory=time.time)


class History:
    """The changes of one data set.

    Args:
        data_set: its folder.
        place: where its changes are kept, on the same disk.
    """

    def __init__(self, data_set: Path, place: Path) -> None:
        self._data_set, self._place = data_set, place

    def to_undo(self) -> Change | None:
        """The last change that is not undone."""
        return next((one for _, one in self._newest_first() if not one.undone), None)

    def to_redo(self) -> Change | None:
        """The change that was undone last."""
        undone = [one for _, one in self._newest_first() if one.undone]
        return undone[-1] if undone else None

    def change(
        self, what: str, values: dict[str, Any], files: Mapping[str, bytes | Path | None]
    ) -> None:
        """Change files of the data set.

        Args:
            what, values: see `Change`.
            files: by name inside the data set: the new content, a file to copy it from, or None
                to remove it.
        """
        for folder, one in self._newest_first():
            if one.undone:
                durable.remove_folder(folder)
        made = Change(what, values, sorted(files))
        folder = self._same_edit(made) or self._begin(made)
        for name, content in files.items():
            _write(folder / "new" / name, content)
        self._note(folder, made)
        self._put(folder / "new", made.names)
        for old, _ in list(self._newest_first())[MOST_KEPT:]:
            durable.remove_folder(old)

    def undo(self) -> Change | None:
        """Take the last change back; None: there is none."""
        return self._go(self.to_undo(), "old")

    def redo(self) -> Change | None:
        """Do again what was undone last; None: there is none."""
        return self._go(self.to_redo(), "new")

    def _go(self, wanted: Change | None, side: str) -> Change | None:
        for folder, one in self._newest_first():
            if one == wanted:
                self._put(folder / side, one.names)
                self._note(folder, Change(**{**asdict(one), "undone": side == "old"}))
        return wanted

    def _begin(self, made: Change) -> Path:
        """A new change's folder, with the files as they are now."""
        numbers = [int(folder.name) for folder, _ in self._newest_first()]
        folder = self._place / f"{max(numbers, default=0) + 1:06d}"
        durable.remove_folder(folder)  # what a crash has left of one
        for name in made.names:
            if (self._data_set / name).exists():
                _write(folder / "old" / name, self._data_set / name)
        return folder

    def _same_edit(self, made: Change) -> Path | None:
        """The last change's folder, where this one goes on with it."""
        folder, last = next(self._newest_first(), (None, None))
        same = last and (last.what, last.values, last.names) == (
            made.what, made.values, made.names,
        )  # fmt: skip
        return folder if same and last and made.at - last.at < ONE_EDIT_S else None

    def _put(self, side: Path, names: list[str]) -> None:
        """Make files of the data set as they are in one side of a change."""

        def put(name: str) -> None:
            target = self._data_set / name
            if (side / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with durable.staged(target) as staged:
                    shutil.copyfile(side / name, staged)
            else:
                target.unlink(missing_ok=True)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(put, names))

    def _note(self, folder: Path, made: Change) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_text(folder / "change.json", json.dumps(asdict(made)))

    def _newest_first(self) -> Iterator[tuple[Path, Change]]:
        for folder in sorted(self._place.glob("[0-9]" * 6), reverse=True):
            try:
                yield folder, Change(**json.loads((folder / "change.json").read_bytes()))
            except (OSError, ValueError, TypeError):  # a crash before it was whole
                continue


def _write(target: Path, content: bytes | Path | None) -> None:
    """Keep a content in a change; a file that is large is not copied but linked, where it can."""
    target.unlink(missing_ok=True)
    if content is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    try:
        os.link(content, target)
    except OSError:
        shutil.copyfile(content, target)

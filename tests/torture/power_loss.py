"""What a disk holds when the power goes: what was forced onto it, and nothing that is sure besides.

Two disks are kept, which are the ends of what a file system may do:

    late names     a name that was made, changed or removed is so only once its folder was fsynced
    early names    every name is on the disk at once

On both, a file holds what it held when it was last fsynced, and nothing where it never was.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Image = dict[str, bytes | None]
"""Files by their path, and None for folders."""


@dataclass(frozen=True)
class _Names:
    """What is in a folder: the number of what each name stands for, and whether it is a folder."""

    entries: dict[str, tuple[int, bool]]


class PowerLoss:
    """Follows the operations in a folder; to be given to `DiskOperations`.

    What is there at the beginning is taken for safely on the disk.

    Attributes:
        images: after each operation, what the disk would hold without power, by kind of disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data: dict[int, bytes] = {}
        self._names: dict[int, _Names] = {}
        self._kept: list[int] = []  # handles, so that no number is given to another file
        self.images: list[dict[str, Image]] = []
        for path in [folder, *folder.rglob("*")]:
            self._sync(path)

    def on_operation(self, number: int, name: str, path: str, call: Callable[[], Any]) -> Any:
        """Do it, and note what of it is on the disk."""
        if name in ("unlink", "remove", "rmdir", "replace", "rename"):
            self._keep_alive()
        found = call()
        self._keep_alive()
        if name in ("fsync", "fdatasync"):
            self._sync(Path(path))
        self.images.append({"late names": self._late(), "early names": self._early()})
        return found

    def _sync(self, path: Path) -> None:
        """A file's data, or a folder's names, are on the disk."""
        status = path.lstat()
        if path.is_dir():
            entries = {}
            for entry in os.scandir(path):
                entries[entry.name] = (entry.inode(), entry.is_dir(follow_symlinks=False))
            self._names[status.st_ino] = _Names(entries)
        else:
            self._data[status.st_ino] = path.read_bytes()

    def _keep_alive(self) -> None:
        """Hold every file, so that its number stays its own after it is removed."""
        held = {os.fstat(handle).st_ino for handle in self._kept}
        for path in self._folder.rglob("*"):
            if path.lstat().st_ino not in held and not path.is_symlink():
                self._kept.append(os.open(path, os.O_RDONLY))

    def _late(self) -> Image:
        """The disk whose names come with the fsync of their folder."""
        image: Image = {}

        def add(number: int, place: str) -> None:
            for name, (inner, is_folder) in self._names.get(number, _Names({})).entries.items():
                path = f"{place}{name}"
                image[path] = None if is_folder else self._data.get(inner, b"")
                if is_folder:
                    add(inner, f"{path}/")

        add(self._folder.stat().st_ino, "")
        return image

    def _early(self) -> Image:
        """The disk whose names are there at once."""
        image: Image = {}
        for path in self._folder.rglob("*"):
            place = str(path.relative_to(self._folder))
            image[place] = None if path.is_dir() else self._data.get(path.lstat().st_ino, b"")
        return image

    @staticmethod
    def write(image: Image, folder: Path) -> None:
        """Put an image into a new folder."""
        folder.mkdir(parents=True)
        for place, data in sorted(image.items()):
            if data is None:
                (folder / place).mkdir(parents=True, exist_ok=True)
        for place, data in image.items():
            if data is not None:
                (folder / place).write_bytes(data)

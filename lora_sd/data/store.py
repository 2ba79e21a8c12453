"""Where encoded pictures and captions are kept: in memory, or on disk, checked at every reading."""

import contextlib
import hashlib
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Protocol

from safetensors.torch import load, save
from torch import Tensor

from lora_sd.errors import UserError

VERSION = b"lora_sd cache 1"
CHECKSUM = "sha256"
NO_CHECKSUM = "0" * 64
UNFINISHED = ".tmp-"
OLD_S = 3600.0  # a write that was begun so long ago has been given up


class Store(Protocol):
    """Entries by key, each some named tensors on the CPU. `damaged` counts entries that were there
    and could not be used."""

    damaged: int

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry of a key, or None."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep an entry.

        Raises:
            UserError: there is no room for it.
        """


class MemoryStore:
    """Entries that are gone with the process."""

    damaged = 0

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self._entries.get(key)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        self._entries[key] = tensors


class DiskStore:
    """A folder with one safetensors file an entry, which several processes may share.

    A file's metadata holds a checksum of its key and of every other byte in it. Nothing is fsynced:
    what a power loss spoils is noticed and made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0
        self._counting = threading.Lock()
        self._sweep()

    def get(self, key: str) -> dict[str, Tensor] | None:
        try:
            data = self._file(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            data = b""
        place = data.find(f'"{CHECKSUM}":"'.encode()) + len(CHECKSUM) + 4
        if data[place : place + 64] != _checksum(key, data, place):
            with self._counting:
                self.damaged += 1
            return None
        return load(data)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        data = save(tensors, {CHECKSUM: NO_CHECKSUM})
        place = data.index(NO_CHECKSUM.encode())
        file = self._file(key)
        unfinished = self.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "xb") as out:
                out.write(data[:place] + _checksum(key, data, place) + data[place + 64 :])
            _rename(unfinished, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise UserError(
                f"The cache folder '{self.folder}' cannot be written: {error.strerror or error}. "
                f"Make room there, or name another folder with data.cache_folder."
            ) from error

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _sweep(self) -> None:
        """Remove what killed processes were writing."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                is_old = entry.name.startswith(UNFINISHED) and (
                    entry.stat(follow_symlinks=False).st_mtime < time.time() - OLD_S
                )
                if is_old:
                    os.unlink(entry)


def _checksum(key: str, data: bytes, place: int) -> bytes:
    """Of a key and its file's bytes, but for those of the checksum at `place`."""
    digest = hashlib.sha256(VERSION + key.encode())
    digest.update(memoryview(data)[:place])
    digest.update(memoryview(data)[place + 64 :])
    return digest.hexdigest().encode()


def _rename(unfinished: Path, file: Path) -> None:
    try:
        os.replace(unfinished, file)
    except PermissionError:
        # Windows, while another process reads the entry, which is as good as ours.
        if os.name != "nt" or not file.is_file():
            raise
        unfinished.unlink()

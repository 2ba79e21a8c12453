"""Every operation of this process that changes a disk, numbered, so that one of them can fail.

What is wrapped are Python's own calls. That reaches everything that lora_sd writes: it hands no
path to a library that writes by itself (safetensors' and torch's writers are given memory).
"""

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CALLS = (
    "replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "fsync",
    "fdatasync", "truncate", "ftruncate", "chmod", "write",
)  # fmt: skip
FAULTS = {
    "no space": errno.ENOSPC,
    "input/output error": errno.EIO,
    "no permission": errno.EACCES,
    "read-only": errno.EROFS,
    "over the quota": errno.EDQUOT,
    "interrupted": errno.EINTR,
}
DIED = 99  # exit status of a process that `die_at` ended


class DiskOperations:
    """Counts operations, and calls `on_operation` around each.

    Args:
        folder: operations on what lies outside it are let alone.
        on_operation: called with (number, name, path, the call). It makes the call, or not, and
            returns what it gives.
    """

    def __init__(
        self,
        folder: Path,
        on_operation: Callable[[int, str, str, Callable[[], Any]], Any],
    ) -> None:
        self._folder, self._on_operation = os.path.realpath(folder), on_operation
        self._open_files: dict[int, str] = {}
        self._is_within = False
        self.names: list[str] = []

    def does(self, name: str, path: str, call: Callable[[], Any]) -> Any:
        """Make a call, which counts where it is in the folder and not part of another."""
        is_ours = os.path.realpath(path).startswith(self._folder) if path else False
        if self._is_within or not is_ours:
            return call()
        self._is_within = True
        try:
            self.names.append(f"{name} {os.path.relpath(path, self._folder)}")
            return self._on_operation(len(self.names), name, path, call)
        finally:
            self._is_within = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, every operation is seen."""
        kept = {name: getattr(os, name) for name in CALLS}
        open_file, open_handle, close_handle = io.open, os.open, os.close

        def path_of(first: Any, options: dict[str, Any]) -> str:
            if isinstance(first, int):
                with contextlib.suppress(OSError):
                    return os.readlink(f"/proc/self/fd/{first}")
                return ""
            within = options.get("dir_fd")
            start = path_of(within, {}) if isinstance(within, int) else ""
            return os.path.join(start, os.fspath(first))

        def wrapped(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                path = path_of(arguments[0], options)
                return self.does(name, path, lambda: kept[name](*arguments, **options))

            return call

        def watched_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            def call() -> Any:
                return open_file(file, mode, *arguments, **options)

            if not set(mode) & set("wax+") or isinstance(file, int):
                return call()
            path = os.fspath(file)
            return _Written(self.does("open", path, call), path, self)

        def watched_handle(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            def call() -> int:
                return open_handle(path, flags, *arguments, **options)

            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and not isinstance(path, int):
                return self.does("open", path_of(path, options), call)
            return call()

        for name in CALLS:
            setattr(os, name, wrapped(name))
        io.open = builtins.open = watched_open  # type: ignore[assignment]
        os.open = watched_handle
        try:
            yield
        finally:
            for name, call in kept.items():
                setattr(os, name, call)
            io.open = builtins.open = open_file
            os.open, os.close = open_handle, close_handle


class _Written:
    """A file that is open for writing, whose writes and whose end are operations."""

    def __init__(self, file: Any, path: str, operations: DiskOperations) -> None:
        self._file, self._path, self._operations = file, path, operations

    def write(self, data: Any) -> Any:
        """Write, and let it reach the system, so that half of it can be there at a crash."""

        def call() -> Any:
            written = self._file.write(data)
            self._file.flush()
            return written

        call.data, call.file = data, self._file  # type: ignore[attr-defined]
        return self._operations.does("write", self._path, call)

    def close(self) -> None:
        if not self._file.closed:
            self._operations.does("close", self._path, self._file.close)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# --- what goes wrong ---


def die_at(number: int, when: str) -> Callable[[int, str, str, Callable[[], Any]], Any]:
    """End the process 'before' an operation, 'after' it, or 'within' it: half of a write is done
    then."""

    def on_operation(count: int, name: str, path: str, call: Callable[[], Any]) -> Any:
        if count == number and when == "within" and name == "write":
            _write_half(call)
        if count == number and when != "after":
            os._exit(DIED)
        try:
            return call()
        finally:
            if count == number:
                os._exit(DIED)

    return on_operation


def fail_at(
    number: int, error: int, half: bool = False, ever_after: bool = False
) -> Callable[[int, str, str, Callable[[], Any]], Any]:
    """Let an operation fail.

    Args:
        error: the number of the system's error.
        half: half of what a write was to write is there then.
        ever_after: whether all later ones that need room fail too, as on a disk that stays full.
    """
    need_room = ("open", "write", "mkdir", "link", "symlink", "fsync", "close")

    def on_operation(count: int, name: str, path: str, call: Callable[[], Any]) -> Any:
        is_due = count == number or (ever_after and count > number and name in need_room)
        if not is_due:
            return call()
        if name == "write" and half:
            _write_half(call)
        if name == "close":  # the file is closed all the same
            call()
        raise OSError(error, os.strerror(error), path)

    return on_operation


def _write_half(call: Any) -> None:
    data, file = getattr(call, "data", b""), getattr(call, "file", None)
    if file is not None:
        file.write(data[: len(data) // 2])
        file.flush()

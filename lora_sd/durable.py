"""Write files so that a crash leaves the old one or the new one, never half of one."""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from lora_sd.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a sibling file, fsync, one rename, fsync of the folder.

    The result has the umask's mode. A symbolic link is followed, so that its target is updated.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    staged = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(staged, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise UserError(
            f"'{path}' could not be written: {error.strerror or error}. It is as it was before."
        ) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8 with line feeds."""
    write_bytes(path, text.encode("utf-8"))


def replace(staged: Path, final: Path) -> None:
    """Rename a finished file or folder into place and make the rename itself durable.

    Windows refuses the rename while another program holds the file: tried again for 2.5 s.
    """
    for attempt in range(50):
        try:
            os.replace(staged, final)
            break
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (5, 32, 33) or attempt == 49:
                raise
            time.sleep(0.05)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names created in it survive a power loss (no-op on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `final` appear at once and whole: `fill` writes into a staged sibling.

    Every file is fsynced before the one rename. On any error the staged folder is removed.
    """
    staged = final.with_name(f".tmp-{final.name}-{uuid.uuid4().hex[:8]}")
    staged.mkdir(parents=True)
    try:
        fill(staged)
        for file in sorted(staged.iterdir()):
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        sync_folder(staged)
        replace(staged, final)
    except BaseException:
        remove_folder(staged)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, or a file, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()

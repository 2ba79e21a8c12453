"""Write files so that a crash leaves the old one or the new one, never half of one."""

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lora_sd.errors import DiskFull, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, the file size's limit
LONGEST_LABEL_BYTES = 180  # of the 255 that a name may have


def check_place(path: Path) -> None:
    """Whether a file or folder can have that path at all, asked before any work is done.

    Raises:
        UserError: it has no name, one that is no Unicode, or one that is too long, or the system
            cannot look there.
    """
    if not path.name:
        raise UserError(f"The output '{path}' has no name. Name a file or a new folder.")
    try:
        str(path).encode()
        os.lstat(path)
    except UnicodeEncodeError:  # safetensors cannot open it, and so no program can
        raise UserError(f"The output '{path}' is no Unicode. Name another.") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' cannot be written: {reason}. Name another output.") from None


def is_full(error: BaseException | None) -> bool:
    """Whether it, or what it came from, says that there is no room on the disk."""
    if error is None or isinstance(error, DiskFull):
        return error is not None
    return (isinstance(error, OSError) and error.errno in FULL) or is_full(error.__cause__)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a sibling file, fsync, one rename, fsync of the folder.

    The result has the umask's mode. A symbolic link is followed, so that its target is updated.

    Raises:
        DiskFull: there is no room for it.
        UserError: the folder cannot be written.
    """
    with staged(path) as sibling, open(sibling, "wb") as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8 with line feeds."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def staged(final: Path, overwrite: bool = True) -> Iterator[Path]:
    """A sibling path to write a file or folder to. It is fsynced and takes `final`'s place when all
    went well, and is removed otherwise. A symbolic link is followed.

    Args:
        overwrite: False: what another program has put at `final` meanwhile stays.

    Raises:
        DiskFull: there is no room for it.
        UserError: the folder cannot be written, or `final` is there and is not to be overwritten.
    """
    try:
        with _staged(final, overwrite) as sibling:
            yield sibling
    except FileExistsError:
        raise UserError(
            f"'{final}' was not written: another program has put something there meanwhile. Choose "
            f"another name."
        ) from None
    except OSError as error:
        kind = DiskFull if is_full(error) else UserError
        raise kind(
            f"'{final}' could not be written: {error.strerror or error}. It is as it was before."
        ) from error


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the new folder `final` appear at once and whole: `fill` writes into a staged sibling.

    Every file is fsynced before the one rename. On any error the staged folder is removed.

    Raises:
        OSError: the disk is full, the folder cannot be written, or `final` is there already.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with _staged(final, overwrite=False) as sibling:
        sibling.mkdir()
        fill(sibling)


@contextmanager
def _staged(final: Path, overwrite: bool) -> Iterator[Path]:
    """`staged`, with the errors as they are."""
    final = Path(os.path.realpath(final))
    with contextlib.suppress(FileNotFoundError):
        final.lstat()  # too long a name is told before the work, not after it
    _sweep(final)
    path = _sibling(final)
    old = path.with_name(f"{path.name}-old")
    try:
        yield path
        _sync(path)
        if overwrite and path.is_dir() and final.exists():
            replace(final, old)
        _put(path, final, overwrite)
    finally:
        if os.path.lexists(old) and not os.path.lexists(final):
            os.replace(old, final)
        for leftover in (old, path):
            with contextlib.suppress(OSError):  # swept at the next write
                remove_folder(leftover)


def _put(staged: Path, final: Path, overwrite: bool) -> None:
    """Rename a file, or a folder where there is none, into place; FileExistsError where something
    is there that is not to be overwritten."""
    if not overwrite and staged.is_file():
        try:
            os.link(staged, final)  # fails where a name exists, unlike a rename
            sync_folder(final.parent)
            return
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links, such as exFAT
            pass
    if os.path.lexists(final) and not (overwrite and staged.is_file()):
        raise FileExistsError(final)
    replace(staged, final)  # of a folder, it fails where files have come meanwhile


def replace(staged: Path, final: Path) -> None:
    """Rename a finished file or folder into place and make the rename itself durable. A symbolic
    link is followed.

    Windows refuses the rename while another program holds the file: tried again for 2.5 s.
    """
    final = Path(os.path.realpath(final))
    for attempt in range(50):
        try:
            os.replace(staged, final)
            break
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (5, 32, 33) or attempt == 49:
                raise
            time.sleep(0.05)
    sync_folder(final.parent)


def _label(final: Path) -> str:
    """What the names of an output's staged siblings begin with: its own name, where that is short
    enough."""
    name = os.fsencode(final.name)
    if len(name) > LONGEST_LABEL_BYTES:
        return f".tmp-{final.name[:40]}-{sha256_bytes(name)[:12]}-"
    return f".tmp-{final.name}-"


def _sibling(final: Path) -> Path:
    """A new name beside `final` that says which process writes it, and on which machine."""
    owner = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return final.with_name(_label(final) + owner)


def _machine() -> str:
    return sha256_bytes(platform.node().encode())[:8]


def _sweep(final: Path) -> None:
    """Remove what processes of this machine that are no more had staged for `final`. What they had
    set aside and not replaced yet is put back."""
    name = re.compile(rf"{re.escape(_label(final))}{_machine()}-(\d+)-[0-9a-f]{{8}}(-old)?")
    with contextlib.suppress(OSError):
        for found in filter(None, map(name.fullmatch, os.listdir(final.parent))):
            leftover = final.with_name(found[0])
            if _is_at_work(int(found[1]), leftover):
                continue
            if found[2] and not os.path.lexists(final):
                os.replace(leftover, final)
            remove_folder(leftover)


def _is_at_work(pid: int, leftover: Path) -> bool:
    """Whether the process that staged it lives: one of that number that began later is another."""
    try:
        process = psutil.Process(pid)
        began_before = process.create_time() <= leftover.lstat().st_mtime + 1
        return began_before and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _sync(path: Path) -> None:
    """fsync a file, or every file and folder in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else []
    for each in [*files, path]:
        if each.is_dir():
            sync_folder(each)
        else:
            with open(each, "rb+") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names created in it survive a power loss (no-op on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, or a file or a symbolic link, if it is there."""
    if folder.is_dir() and not folder.is_symlink():
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

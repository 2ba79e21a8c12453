"""What lies in a folder of pictures and in the folders inside it, by name alone."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_sd.data import caption_files
from lora_sd.data.caption_files import is_unicode, path_key
from lora_sd.data.findings import Finding
from lora_sd.data.images import OTHER_PICTURES, SUFFIXES
from lora_sd.errors import DataError

MASK_ENDINGS = ("-mask", "-masklabel")  # the first counts where both are there


@dataclass
class Listing:
    """Names inside a folder, with '/', in an order that is the same on every system.

    `captions` and `masks` are by `path_key` of the picture's name without its ending.
    """

    folder: Path
    pictures: list[str] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notices: list[Finding] = field(default_factory=list)

    def path(self, name: str) -> Path:
        return self.folder / name

    def folder_names(self, name: str) -> list[str]:
        """The names of the folders a picture lies in, nearest first, up to the whole folder's."""
        inside = [part.name for part in PurePosixPath(name).parents if part.name]
        return [*inside, os.path.basename(os.path.abspath(self.folder))]


def list_folder(folder: Path) -> Listing:
    """Look through a folder and those inside it.

    What is hidden, and links that leave the folder or lead to folders, are passed over and told.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"The image folder '{folder}' {what}.")
    try:
        os.listdir(folder)
    except OSError as error:
        raise DataError(f"The image folder '{folder}' cannot be read: {error.strerror}.") from None
    found = Listing(folder)
    pictures = []
    for name in sorted(_walk(found), key=_sort_key):
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES or suffix in OTHER_PICTURES:
            pictures.append(name)
        elif suffix in caption_files.SUFFIXES:
            found.captions.setdefault(stem_key(name), []).append(name)
        elif path.name.lower() in caption_files.METADATA:
            found.metadata.append(name)
        else:
            found.others.append(name)
    for names in found.captions.values():
        names.sort(
            key=lambda name: caption_files.SUFFIXES.index(PurePosixPath(name).suffix.lower())
        )
    _part_masks(found, pictures)
    return found


def stem_key(name: str) -> str:
    """`path_key` of a name without its ending: what pictures and their captions share."""
    return path_key(str(PurePosixPath(name).with_suffix("")))


def _sort_key(name: str) -> tuple[tuple[str, ...], str]:
    return tuple(unicodedata.normalize("NFC", part) for part in name.split("/")), name


def _walk(found: Listing) -> Iterator[str]:
    """The names of all files that are looked at; the others are told in `found`."""
    root = os.path.realpath(found.folder)
    seen = {root}
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            entries = list(os.scandir(found.path(inside)))
        except OSError as error:
            reason = f"cannot be looked into: {(error.strerror or str(error)).lower()}"
            found.problems.append(Finding(found.path(inside), reason))
            continue
        for entry in entries:
            name = inside + entry.name
            path = found.path(name)
            is_folder = os.path.isdir(path)  # unlike entry.is_dir(), False of a link to itself
            is_picture = PurePosixPath(name).suffix.lower() in SUFFIXES
            if entry.name.startswith("."):
                if is_folder or is_picture:
                    found.notices.append(Finding(path, "is hidden: not looked at"))
            elif not is_unicode(entry.name):
                found.problems.append(
                    Finding(path, "has a name that is no Unicode", advice="Rename it.")
                )
            elif is_folder and not is_picture:
                real = os.path.realpath(path)
                if entry.is_symlink() or real in seen:
                    found.notices.append(Finding(path, "is a link to a folder: not followed"))
                else:
                    seen.add(real)
                    waiting.append(f"{name}/")
            elif entry.is_symlink() and path.exists() and not _is_inside(path, root):
                found.notices.append(Finding(path, "is a link out of the folder: not followed"))
            else:
                yield name


def _is_inside(path: Path, root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _part_masks(found: Listing, names: list[str]) -> None:
    """Sort picture files into pictures and masks of other pictures."""
    stems = {stem_key(name) for name in names}
    masks: dict[str, dict[str, str]] = {}
    for name in names:
        stem = stem_key(name)
        ending = next((end for end in MASK_ENDINGS if stem.endswith(end)), None)
        if ending and stem.removesuffix(ending) in stems:
            masks.setdefault(stem.removesuffix(ending), {})[ending] = name
        else:
            found.pictures.append(name)
    for stem, endings in masks.items():
        found.masks[stem], *rest = (endings[end] for end in MASK_ENDINGS if end in endings)
        for name in rest:
            found.notices.append(
                Finding(found.path(name), "is a second mask of its picture: not used")
            )

"""The pictures that training, validation and reports work on, each with its caption."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lora_sd.data import images
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import UnreadableImage
from lora_sd.data.room import room_for
from lora_sd.errors import DataError


@dataclass(frozen=True)
class Picture:
    """One picture.

    `name` is its path inside its folder, with '/'; `sha256` is that of the file, `size_px` its
    (width, height) when upright. `caption` is as written or found, before anything is put before
    or behind it: on one line, or with its lines where `options.wildcards`; `caption_source` says
    where it came from, for people. `mask` is the '-mask.png' beside it where `options.masks` is
    'file'. `repeats` are those of the options times the folder name's number.
    """

    file: Path
    name: str
    sha256: str
    size_px: tuple[int, int]
    caption: str
    caption_source: str
    mask: Path | None
    mask_sha256: str
    repeats: float
    options: FolderOptions


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used; the reason makes a sentence after its name. `on_purpose`: its folder
    asks for that."""

    file: Path
    reason: str
    on_purpose: bool = False


@dataclass(frozen=True)
class PictureSet:
    """Everything that was found in some folders.

    `pictures` are in a fixed order: folders as given, names sorted. `left_out` is what is not used,
    with the reason: whole sentences, but that the first goes after the file's name. `notices` are
    sentences worth showing that stop nothing. `inspected` is what `inspect` gave for each picture.
    `without_caption` are sentences on the pictures that are left out as they have no caption.
    """

    pictures: list[Picture]
    left_out: list[LeftOut] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    inspected: dict[Path, Any] = field(default_factory=dict)
    without_caption: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Changes with any content, caption, name, repeats or mask."""
        digest = hashlib.sha256()
        for one in self.pictures:
            said = (one.name, one.sha256, one.caption, one.repeats, one.mask_sha256)
            digest.update(repr(said).encode())
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Of each picture by its name, in order: changes with content, caption, repeats or mask.

        A name that several folders have is numbered: 'a.png (2)'.
        """
        found: dict[str, str] = {}
        for one in self.pictures:
            name, number = one.name, 1
            while name in found:
                number += 1
                name = f"{one.name} ({number})"
            said = (one.sha256, one.caption, one.repeats, one.mask_sha256)
            found[name] = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
        return found


def load_picture(picture: Picture) -> tuple[Image.Image, Image.Image | None]:
    """(the picture in RGB, upright and on its background; its mask 'L', white where it counts).

    The mask has the picture's size; None where the whole picture counts.

    Raises:
        DataError: the picture or its mask is no longer what was found.
    """
    options, data = picture.options, _same(picture.file, picture.sha256)
    with room_for(data):
        decoded = images.decode(data, options.background)
    if decoded.rgb.size != picture.size_px:  # what an index remembers of it is not true
        raise DataError(
            f"'{picture.file}' has not the size that was noted of it. Delete 'pictures.json' in "
            f"the folder of the cache, and start again."
        )
    if picture.mask is not None:
        mask = images.decode_mask(_same(picture.mask, picture.mask_sha256))
        if mask.size != decoded.rgb.size:
            mask = mask.resize(decoded.rgb.size, Image.Resampling.BILINEAR)
        return decoded.rgb, mask
    return decoded.rgb, decoded.alpha if options.masks == "alpha" else None


def _same(file: Path, sha256: str) -> bytes:
    """The file's bytes, if they are those that were checked."""
    try:
        data = images.read_bytes(file)
    except UnreadableImage as error:
        raise DataError(f"'{file}' {error}. It was there when the pictures were checked.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"'{file}' has changed since the pictures were checked. Start again.")
    return data

"""Folders of training pictures: the ones offered, and new ones made from uploads."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_sd.data import caption_files
from lora_sd.data.caption_files import UnreadableCaption
from lora_sd.data.caption_sources import CaptionSources
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import SUFFIXES, UnreadableImage, read_image
from lora_sd.data.listing import MASK_ENDINGS, Listing, list_folder
from lora_sd.errors import DataError, shown_list
from lora_sd.run_folder import NAME_PATTERN
from lora_sd.ui.launch import PROJECT

MOST_FILES = 2_000
MOST_CAPTION = 2_000  # characters
PREVIEWS = 10
PREVIEW_PX = 160


@dataclass(frozen=True)
class PictureFolder:
    """A folder that can be trained on, by the name the page knows it under."""

    id: str
    label: str
    path: Path


@dataclass(frozen=True)
class Upload:
    """An uploaded picture where Gradio put it, under its name, with its caption and its mask."""

    file: Path
    name: str
    caption: str
    mask: Path | None = None


def offered_folders(outputs: Path, more: Path | None) -> list[PictureFolder]:
    """The example, the saved data sets, then the folders in the one named at the start."""
    places = [("example", "Example: ", PROJECT / "assets"), ("mine", "", outputs / "datasets")]
    if more:
        places.append(("more", "", more))
    found = []
    for place, words, root in places:
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            if path.name.startswith(".") or not path.is_dir():
                continue
            listing = _listing(path)
            if listing.pictures and (place != "example" or listing.captions):
                label = f"{words}{path.name} ({_pictures(len(listing.pictures))})"
                found.append(PictureFolder(f"{place}/{path.name}", label, path))
    return found


def find_folder(outputs: Path, more: Path | None, folder_id: object) -> PictureFolder:
    """The offered folder of that id.

    Raises:
        DataError: it is not, or no longer, offered.
    """
    for folder in offered_folders(outputs, more):
        if folder.id == folder_id:
            return folder
    raise DataError("Choose a folder of pictures, or upload some.")


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """(picture, its caption or '') for every picture of a folder and of those inside it, as
    training will read them; none of them is decoded."""
    listing = _listing(folder)
    sources = CaptionSources(listing, FolderOptions(folder))
    pairs = []
    for name in listing.pictures:
        try:
            caption, _ = sources.of(name)
        except UnreadableCaption:  # training will say it in a sentence
            caption = ""
        pairs.append((listing.path(name), caption))
    return pairs


def preview(file: Path) -> Image.Image | None:
    """A small copy of a picture, in its shape; None when it cannot be read."""
    try:
        picture = read_image(file)
    except UnreadableImage:
        return None
    picture.thumbnail((PREVIEW_PX, PREVIEW_PX), Image.Resampling.LANCZOS)
    return picture


def match_uploads(files: Sequence[Path]) -> list[Upload]:
    """Pictures with the captions of the .txt or .caption files, and the '-mask' pictures, of the
    same name.

    Raises:
        DataError: files that are neither or cannot be read, two of one name, or too many: all
            problems at once.
    """
    if len(files) > MOST_FILES:
        raise DataError(f"{len(files)} files are more than the {MOST_FILES} of one upload.")
    problems: list[str] = []
    images: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    for file in files:
        kind = file.suffix.lower()
        place = images if kind in SUFFIXES else texts if kind in caption_files.SUFFIXES else None
        if place is None:
            problems.append(f"'{file.name}' is neither a picture ({_kinds()}) nor a .txt file.")
        elif file.stem in place:
            problems.append(f"There are two files '{file.stem}': give them different names.")
        else:
            place[file.stem] = file
    lonely = sorted(file.name for stem, file in texts.items() if stem not in images)
    if lonely and images:
        problems.append(f"No picture belongs to {shown_list(lonely)}.")
    for file in images.values():
        try:
            read_image(file)
        except UnreadableImage as error:
            problems.append(f"'{file.name}' {error}.")
    captions: dict[str, str] = {}
    for stem, file in texts.items():
        try:
            captions[stem] = caption_files.read_own(file)
        except UnreadableCaption as error:
            problems.append(f"'{file.name}' {error}.")
    if problems:
        raise DataError(problems)
    masks = _masks(images)
    return [
        Upload(file, file.name, captions.get(stem, ""), masks.get(stem))
        for stem, file in sorted(images.items())
        if file not in masks.values()
    ]


def _masks(images: Mapping[str, Path]) -> dict[str, Path]:
    """The pictures that are masks of others, by the name of those."""
    return {
        stem: images[stem + ending]
        for stem in images
        for ending in reversed(MASK_ENDINGS)  # the first counts
        if stem + ending in images
    }


def save_folder(outputs: Path, name: str, uploads: Sequence[Upload]) -> PictureFolder:
    """Make <outputs>/datasets/<name> of uploaded pictures; an existing one is never written over.

    Raises:
        DataError: the name cannot be used or is taken, or there are no pictures.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise DataError(
            "Name the data set with letters, digits, '-', '_' and '.', beginning with a letter or "
            "digit: 'my-cat', for example."
        )
    if not uploads:
        raise DataError("Upload some pictures first.")
    root, target = outputs / "datasets", outputs / "datasets" / name
    root.mkdir(parents=True, exist_ok=True)
    try:
        target.mkdir()
    except FileExistsError:
        raise DataError(f"There is a data set '{name}' already. Choose another name.") from None
    try:
        for number, upload in enumerate(uploads, start=1):
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(upload.name).stem).strip("-")[:60]
            stem = stem or f"picture-{number:03d}"
            while any(target.glob(f"{stem}.*")):
                stem += f"-{number}"
            shutil.copyfile(upload.file, target / (stem + upload.file.suffix.lower()))
            if upload.mask:
                mask = stem + MASK_ENDINGS[0] + upload.mask.suffix.lower()
                shutil.copyfile(upload.mask, target / mask)
            caption = " ".join(upload.caption.split())
            if caption:
                (target / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return PictureFolder(f"mine/{name}", f"{name} ({_pictures(len(uploads))})", target)


def _listing(folder: Path) -> Listing:
    """What is in a folder by name; nothing where it cannot be read."""
    try:
        return list_folder(folder)
    except DataError:
        return Listing(folder)


def _pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number:,} pictures"


def _kinds() -> str:
    return ", ".join(sorted(SUFFIXES))

"""Find and check the images and captions of a training folder, before anything else happens."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_sd.data.images import OTHER_PICTURES, SUFFIXES, UnreadableImage, read_image, square
from lora_sd.errors import DataError, shown_list

MOST_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """One training picture with its caption."""

    file: Path
    caption: str
    resolution_px: int

    def picture(self) -> Image.Image:
        """The picture in RGB, square, of the training resolution; read anew from the file."""
        return square(read_image(self.file)[0], self.resolution_px)


@dataclass(frozen=True)
class ImageFolder:
    """Everything a training folder holds.

    `fingerprint` changes with any image, caption or file name; `notices` are sentences worth
    showing that stop nothing.
    """

    examples: list[Example]
    notices: list[str]
    fingerprint: str


def read_folder(
    folder: Path, resolution_px: int, caption: str | None = None, trigger_word: str | None = None
) -> ImageFolder:
    """Read every image and caption of a folder.

    Args:
        resolution_px: side of the square pictures.
        caption: for images without a .txt beside them.
        trigger_word: put before every caption, with a comma.

    Raises:
        DataError: no folder, no images, or images and captions that cannot be used: all at once.
    """
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"The image folder '{folder}' {what}.")
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"The image folder '{folder}' cannot be read: {error.strerror}.") from None
    texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    caption, trigger = (caption or "").strip(), (trigger_word or "").strip()
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    foreign = [file for file in files if file.suffix.lower() in OTHER_PICTURES]
    if not images:
        raise DataError(_no_images(folder, files, foreign))

    problems = [f"'{file}' is of a kind that is not read: save it as PNG." for file in foreign]
    examples, notices, without_caption = [], [], []
    digest = hashlib.sha256()
    small = 0
    for file in images:
        try:
            picture, notice = read_image(file)
        except UnreadableImage as error:
            problems.append(f"'{file}' {error}.")
            continue
        if notice:
            notices.append(f"'{file.name}' {notice}.")
        try:
            own_caption = read_caption(texts.get(file.stem, file.with_suffix(".txt")))
        except DataError as error:
            problems += error.problems
            continue
        text = ", ".join(part for part in (trigger, own_caption or caption) if part)
        if not text:
            without_caption.append(file.name)
            continue
        small += min(picture.size) < resolution_px
        examples.append(Example(file, text, resolution_px))
        digest.update(os.fsencode(file.name))
        digest.update(f"\n{text}\n{resolution_px}\n".encode())
        digest.update(square(picture, resolution_px).tobytes())
    if without_caption:
        first = Path(without_caption[0])
        problems.append(
            f"'{folder}' holds {len(images)} images, {len(without_caption)} of them without a "
            f"caption: {shown_list(without_caption)}. Add {first.stem}.txt beside {first.name}, "
            f'or set data.caption: "a photo of ...".'
        )
    if problems:
        more = len(problems) - MOST_PROBLEMS_SHOWN
        shown = problems[:MOST_PROBLEMS_SHOWN]
        raise DataError([*shown, f"... and {more} more problems."] if more > 0 else problems)
    if small:
        notices.append(f"{small} images are smaller than {resolution_px} px and were enlarged.")
    stems = {image.stem for image in images}
    orphans = [file.name for stem, file in texts.items() if stem not in stems]
    if orphans:
        notices.append(f"{len(orphans)} captions belong to no image: {shown_list(orphans)}.")
    return ImageFolder(examples, notices, digest.hexdigest())


def read_caption(file: Path) -> str | None:
    """The text of a caption file on one line, or None when there is no such file.

    Raises:
        DataError: it is empty, or not text (UTF-8, or UTF-16 with a byte-order mark).
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"'{file}' cannot be read: {error.strerror or error}.") from None
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"'{file}' is not text in UTF-8. Save it as UTF-8.") from None
    if "\0" in text:
        raise DataError(f"'{file}' is not text. Write the caption as plain text in UTF-8.")
    caption = " ".join(text.split())
    if not caption:
        raise DataError(f"'{file}' is empty. Write a caption into it, or remove it.")
    return caption


def _no_images(folder: Path, files: list[Path], foreign: list[Path]) -> str:
    found = f"It holds {len(files)} other files." if files else "It is empty."
    if foreign:
        found = f"It holds {len(foreign)} pictures of kinds that are not read, such as "
        found += f"'{foreign[0].name}': save them as PNG."
    inside = [
        f for f in files if f.is_dir() and any(g.suffix.lower() in SUFFIXES for g in f.iterdir())
    ]
    if inside:
        found = f"Its folder '{inside[0].name}' does: name '{inside[0]}' instead."
    kinds = ", ".join(sorted(SUFFIXES))
    return f"The image folder '{folder}' holds no images ({kinds}). {found}"

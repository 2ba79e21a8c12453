"""Folders of training pictures: the ones offered, and new ones made from uploads."""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_sd.data import caption_files
from lora_sd.data.caption_files import UnreadableCaption
from lora_sd.data.caption_sources import CaptionSources
from lora_sd.data.captions import plain_caption
from lora_sd.data.findings import Finding, sentences
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import SUFFIXES, UnreadableImage, read_image
from lora_sd.data.listing import Listing, list_folder, stem_key
from lora_sd.errors import DataError
from lora_sd.ui.launch import DATASETS, PROJECT
from lora_sd.ui.texts import say

MOST_FILES = 2_000
MOST_CAPTION = 2_000  # characters
MOST_PROMPTS = 2  # taken from captions
PREVIEWS = 10
CAPTIONS = (*caption_files.SUFFIXES, *caption_files.METADATA)
TEXTS = {Path(name).suffix or name for name in CAPTIONS}
RENAME = "Give them different names."
OnFile = Callable[[int, int], bool]
"""Called with (files done, of how many); True: the user wants no more of it."""


class Cancelled(Exception):
    """The user wanted no more of it; nothing is left of it."""


@dataclass(frozen=True)
class PictureFolder:
    """A folder that can be trained on, by the name the page knows it under."""

    id: str
    label: str
    path: Path


@dataclass(frozen=True)
class Upload:
    """An uploaded picture where Gradio put it, with its caption and its mask."""

    file: Path
    caption: str
    mask: Path | None = None


def offered_folders(outputs: Path, more: Path | None) -> list[PictureFolder]:
    """The example, the saved data sets, then the folders in the one named at the start."""
    offered = (_offered(*place) for place in _places(outputs, more))
    return [folder for folder in offered if folder]


def find_folder(outputs: Path, more: Path | None, folder_id: object) -> PictureFolder:
    """The offered folder of that id.

    Raises:
        DataError: it is not, or no longer, offered.
    """
    for place in _places(outputs, more):
        if place[0] == folder_id and (folder := _offered(*place)):
            return folder
    raise DataError(say("data.none_chosen"))


def _places(outputs: Path, more: Path | None) -> Iterator[tuple[str, Path]]:
    """(id, path) of every folder that may hold pictures."""
    roots = {"example": PROJECT / "assets", "mine": outputs / DATASETS, "more": more}
    for place, root in roots.items():
        for path in sorted(root.iterdir()) if root and root.is_dir() else []:
            if not path.name.startswith(".") and path.is_dir():
                yield f"{place}/{path.name}", path


def _offered(folder_id: str, path: Path) -> PictureFolder | None:
    """A folder, if it holds pictures; an example has captions too."""
    listing = _listing(path)
    is_example = folder_id.startswith("example/")
    if not listing.pictures or (is_example and not listing.captions):
        return None
    key = "data.label.example" if is_example else "data.label.saved"
    label = say(key, name=path.name, pictures=counted(len(listing.pictures)))
    return PictureFolder(folder_id, label, path)


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


def mask_count(folder: Path) -> int:
    """How many pictures of a folder have a mask file."""
    return len(_listing(folder).masks)


def mask_sentence(masks: int, setting: object) -> str:
    """That mask files are not used; nothing where they are, or there are none."""
    if not masks or setting == "file":
        return ""
    return say(f"data.masks_unused.{'one' if masks == 1 else 'many'}", count=masks)


def prompts_from(captions: Sequence[str], trigger_word: str) -> list[str]:
    """Prompts that call for what the first captions say, each on one line and none twice."""
    options = FolderOptions(Path(), trigger_word=trigger_word)
    prompts = (plain_caption(" ".join(caption.split()), options) for caption in captions)
    return [*dict.fromkeys(filter(None, prompts))][:MOST_PROMPTS]


def match_uploads(files: Sequence[Path], on_file: OnFile = lambda done, of: False) -> list[Upload]:
    """Pictures with the captions and masks that training would find for them in one folder.

    Raises:
        Cancelled: `on_file` returned True.
        DataError: files that cannot be read or would not be used, two of one name, or too many: all
            problems at once.
    """
    if len(files) > MOST_FILES:
        raise DataError(say("data.upload.too_many", count=len(files), most=MOST_FILES))
    problems: list[Finding] = []
    uploads: list[Upload] = []
    by_name: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file in files:
            if by_name.setdefault(file.name, file) is not file:
                problems.append(Finding(file, "is there twice", advice=RENAME))
            elif file.suffix.lower() in TEXTS and file.is_file():
                shutil.copyfile(file, folder / file.name)
            else:  # the name tells what belongs to what
                (folder / file.name).touch()
        listing = list_folder(folder)
        sources = CaptionSources(listing, FolderOptions(folder, wildcards=True))
        for name in listing.pictures:
            mask = listing.masks.get(stem_key(name))
            try:
                caption, _ = sources.of(name)
                uploads.append(Upload(by_name[name], caption, by_name[mask] if mask else None))
            except UnreadableCaption as error:
                problems.append(error.of(by_name[name], "has a caption that "))
        lonely, _ = sources.unclaimed(listing.pictures)
    stems = Counter(map(stem_key, listing.pictures))
    names = [*listing.pictures, *listing.masks.values()]
    for done, name in enumerate(names):
        if on_file(done, len(names)):
            raise Cancelled
        file = by_name[name]
        if stems[stem_key(name)] > 1:
            reason = "shares its name, and so its caption, with another picture"
            problems.append(Finding(file, reason, advice=RENAME))
        try:
            read_image(file)
        except UnreadableImage as error:
            problems.append(Finding(file, error.reason, error.detail))
    kinds, texts = ", ".join(sorted(SUFFIXES)), ", ".join(CAPTIONS)
    for reason, names in (
        ("belongs to no picture", lonely),
        (f"is neither a picture ({kinds}) nor a caption ({texts})", listing.others),
    ):
        problems += [Finding(Path(name), reason) for name in names]
    problems += listing.problems + listing.notices + sources.problems + sources.notices
    if problems:
        raise DataError(sentences([replace(one, file=Path(one.file.name)) for one in problems]))
    return uploads


def _listing(folder: Path) -> Listing:
    """What is in a folder by name; nothing where it cannot be read."""
    try:
        return list_folder(folder)
    except DataError:
        return Listing(folder)


def safe_name(text: str) -> str:
    """A name that a data set may have, as like the text as that can be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "pictures"


def counted(number: int) -> str:
    return say(f"data.pictures.{'one' if number == 1 else 'many'}", count=number)

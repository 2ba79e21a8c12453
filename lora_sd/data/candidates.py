"""The pictures of the folders by name, each with its caption, mask and repeats, not yet decoded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_sd.data.caption_files import UnreadableCaption, is_unicode
from lora_sd.data.caption_sources import MOST_REPEATS, CaptionSources, folder_names, kohya_name
from lora_sd.data.findings import Finding
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import OTHER_PICTURES
from lora_sd.data.listing import Listing, stem_key
from lora_sd.errors import shown_list

NO_CAPTION = "has no caption"


@dataclass(frozen=True)
class Candidate:
    """A picture file with what its folder says of it, before it is decoded."""

    file: Path
    name: str
    caption: str
    caption_source: str
    mask: Path | None
    repeats: float
    options: FolderOptions
    problem: Finding | None


class Found:
    """What the names and caption files of all folders give."""

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []
        self.problems: list[Finding] = []  # of files that are no candidates
        self.unused: list[Finding] = []  # left out on purpose
        self.oddities: list[Finding] = []
        self.notices: list[str] = []

    def add(self, listing: Listing, options: FolderOptions) -> None:
        """The pictures of one folder."""
        sources = CaptionSources(listing, options)
        without_mask, stems = 0, Counter(stem_key(name) for name in listing.pictures)
        for name in listing.pictures:
            file, mask = listing.path(name), None
            if file.suffix.lower() in OTHER_PICTURES:
                reason = f"is a {file.suffix[1:].upper()} file, a kind that is not read"
                self.problems.append(Finding(file, reason, advice="Save it as PNG."))
                continue
            repeats, problem = _repeats(options.folder, name, file)
            if repeats == 0:
                self.unused.append(Finding(file, "lies in a folder whose name asks for no repeats"))
                continue
            caption = source = ""
            try:
                caption, source = sources.of(name)
                if not caption or not is_unicode(caption):
                    problem = Finding(file, NO_CAPTION)
            except UnreadableCaption as error:
                problem = Finding(file, "has a caption that cannot be used", str(error))
            if options.masks == "file":
                mask_name = listing.masks.get(stem_key(name))
                mask = listing.path(mask_name) if mask_name else None
                without_mask += mask is None
            self.candidates.append(
                Candidate(
                    file, name, caption, source, mask, options.repeats * repeats, options, problem
                )
            )
        self.problems += listing.problems + sources.problems
        self.oddities += listing.notices + sources.notices
        captions, rows = sources.unclaimed(listing.pictures)
        shared = [name for name in listing.pictures if stems[stem_key(name)] > 1]
        for names, what in (
            (captions, "captions belong to no picture"),
            (rows, "pictures named in metadata files are not there"),
            (shared, "pictures share their name, and so a caption, with another"),
            (listing.others, "other files are not looked at"),
        ):
            if names:
                self.notices.append(
                    f"'{listing.folder}': {len(names)} {what}: {shown_list(names)}."
                )
        if listing.masks and options.masks == "off":
            self.notices.append(
                f"'{listing.folder}': {len(listing.masks)} masks are not used: data.masks is off."
            )
        if without_mask:
            self.notices.append(
                f"'{listing.folder}': {without_mask} pictures have no mask: all of each counts."
            )


def _repeats(folder: Path, name: str, file: Path) -> tuple[int, Finding | None]:
    """What the name of the nearest of a picture's folders that says so asks for."""
    named = next(filter(None, map(kohya_name, folder_names(folder, name))), None)
    if named is None:
        return 1, None
    if named[0] > MOST_REPEATS:
        reason = f"lies in a folder whose name asks for more than {MOST_REPEATS} repeats"
        return 1, Finding(file, reason, advice="Rename the folder: a number and '_' in front ask.")
    return named[0], None

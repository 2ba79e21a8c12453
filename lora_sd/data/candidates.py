"""The pictures of the folders by name, each with its caption, mask and repeats, not yet decoded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_sd.data.caption_files import UnreadableCaption, is_unicode
from lora_sd.data.caption_sources import MOST_REPEATS, CaptionSources, kohya_name
from lora_sd.data.findings import Finding
from lora_sd.data.folder_options import FolderOptions
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
    problems: list[Finding]


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
        without_mask: list[str] = []
        stems = Counter(stem_key(name) for name in listing.pictures)
        for name in listing.pictures:
            file, mask = listing.path(name), None
            repeats, problems = _repeats(listing, name)
            if repeats == 0:
                self.unused.append(Finding(file, "lies in a folder whose name asks for no repeats"))
                continue
            caption = source = ""
            try:
                caption, source = sources.of(name)
                if not source:
                    problems.append(Finding(file, NO_CAPTION))
                elif not is_unicode(caption):  # of a setting, or the whole folder's name
                    problems.append(Finding(file, "has a caption that is no Unicode"))
            except UnreadableCaption as error:
                problems.append(error.of(file, "has a caption that "))
            if options.masks == "file":
                mask_name = listing.masks.get(stem_key(name))
                mask = listing.path(mask_name) if mask_name else None
                if mask is None:
                    without_mask.append(name)
            self.candidates.append(
                Candidate(
                    file, name, caption, source, mask, options.repeats * repeats, options, problems
                )
            )
        self.problems += listing.problems + sources.problems
        self.oddities += listing.notices + sources.notices
        orphans, rows = sources.unclaimed(listing.pictures)
        shared = [name for name in listing.pictures if stems[stem_key(name)] > 1]
        off = list(listing.masks.values()) if options.masks != "file" else []
        for what, names in (
            ("Captions that belong to no picture", orphans),
            ("Named in metadata files, but not there", rows),
            ("Pictures that share their name, and so a caption, with another", shared),
            ("Other files, not looked at", listing.others),
            (f"Mask files, not used as data.masks is '{options.masks}'", off),
            ("Pictures that have no mask and count wholly", without_mask),
        ):
            if names:
                counted = f"{len(names)} ({shown_list(names)})"
                self.notices.append(f"'{listing.folder}': {what}: {counted}.")


def _repeats(listing: Listing, name: str) -> tuple[int, list[Finding]]:
    """What the name of the nearest of a picture's folders that says so asks for."""
    named = next(filter(None, map(kohya_name, listing.folder_names(name))), None)
    if named is None:
        return 1, []
    if named[0] > MOST_REPEATS:
        reason = f"lies in a folder whose name asks for more than {MOST_REPEATS} repeats"
        advice = "Rename the folder: a number and '_' in front ask."
        return 1, [Finding(listing.path(name), reason, advice=advice)]
    return named[0], []

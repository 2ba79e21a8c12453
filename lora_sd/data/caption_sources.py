"""Which caption a picture gets, and where it came from."""

import re
from pathlib import PurePosixPath

from lora_sd.data import caption_files
from lora_sd.data.caption_files import UnreadableCaption, path_key
from lora_sd.data.findings import Finding
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.listing import Listing, stem_key

MOST_REPEATS = 1000


class CaptionSources:
    """The captions of one folder's pictures.

    Attributes:
        metadata: (caption, file) by `path_key` of the pictures that metadata files name.
        problems, notices: what is wrong or odd with its metadata files, and after `of` of every
            picture with their own files.
    """

    def __init__(self, listing: Listing, options: FolderOptions) -> None:
        self.problems: list[Finding] = []
        self.notices: list[Finding] = []
        self._listing, self._options = listing, options
        self._may_be_empty = options.caption is not None and not options.caption.strip()
        self.metadata: dict[str, tuple[str, str]] = {}
        # A file deeper inside is nearer to its pictures; .jsonl counts before .csv.
        for name in sorted(listing.metadata, key=lambda n: (n.count("/"), n.endswith(".jsonl"))):
            read = caption_files.read_metadata(
                listing.path(name), options.wildcards, self._may_be_empty
            )
            self.problems += read.problems
            self.notices += read.notices
            inside = PurePosixPath(name).parent
            for picture, caption in read.captions.items():
                self.metadata[path_key(str(inside / picture))] = (caption, name)

    def of(self, name: str) -> tuple[str, str]:
        """(caption, where it came from) of a picture, both '' where it has none.

        A trigger word alone is caption enough: it is put before the empty one. A setting 'caption'
        that is given as empty makes the empty caption one like others.

        Raises:
            UnreadableCaption: its own caption file cannot be used.
        """
        options, path = self._options, PurePosixPath(name)
        if own := self._own(name):
            return own
        if path_key(name) in self.metadata:
            return self.metadata[path_key(name)]
        if options.caption is not None:
            return caption_files.tidy(options.caption, options.wildcards), "the setting 'caption'"
        if options.caption_fallback == "file_name":
            return caption_files.tidy(path.stem.replace("_", " ")), "the file's name"
        folders = self._listing.folder_names(name)
        if options.caption_fallback == "folder_name":
            _, words = kohya_name(folders[0]) or (1, folders[0])
        else:
            _, words = next(filter(None, map(kohya_name, folders)), (1, ""))
        if words := caption_files.tidy(words):
            return words, "the folder's name"
        return "", "the setting 'trigger_word'" if options.trigger_word else ""

    def _own(self, name: str) -> tuple[str, str] | None:
        files = self._listing.captions.get(stem_key(name), [])
        if not files:
            return None
        first, *rest = files
        try:
            caption = self._read(first)
        except UnreadableCaption as error:
            detail = f"{first}: {error.detail}" if error.detail else first
            raise UnreadableCaption(error.reason, detail, error.advice) from None
        for other in rest:
            try:
                if self._read(other) == caption:
                    continue
            except UnreadableCaption:
                pass
            second = Finding(
                self._listing.path(other),
                "is a second caption of its picture: the .txt counts, not this",
            )
            if second not in self.notices:  # as two pictures may share them
                self.notices.append(second)
        return caption, first

    def _read(self, name: str) -> str:
        wildcards = self._options.wildcards
        return caption_files.read_own(self._listing.path(name), wildcards, self._may_be_empty)

    def unclaimed(self, pictures: list[str]) -> tuple[list[str], list[str]]:
        """(caption files, names in metadata files) that belong to none of the pictures."""
        known = {path_key(name) for name in pictures}
        stems = {stem_key(name) for name in pictures}
        files = [
            file
            for stem, same in self._listing.captions.items()
            if stem not in stems
            for file in same
        ]
        return files, [name for name in self.metadata if name not in known]


def kohya_name(folder: str) -> tuple[int, str] | None:
    """(repeats, caption) of a folder named as kohya's tools want it, '10_sks cat'; else None."""
    match = re.fullmatch(r"([0-9]+)_(.*)", folder, re.DOTALL)
    return (int(match[1][:9]), match[2]) if match else None

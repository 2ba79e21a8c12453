"""Each picture of a data set as training would see it: its crop, its caption, what is cut off."""

import base64
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.data.buckets import Crop, TooSmall, fit
from lora_sd.data.caption_files import UnreadableCaption, tidy
from lora_sd.data.caption_sources import CaptionSources
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import UnreadableImage, read_image
from lora_sd.data.listing import Listing, list_folder, stem_key
from lora_sd.data.report.base_facts import BaseFacts, base_facts
from lora_sd.data.report.measures import thumbnail
from lora_sd.ui.families import CONFIGS

MOST_KEPT = 4000  # thumbnails, of 5 to 10 kB
THREADS = min(os.cpu_count() or 1, 4)


@dataclass(frozen=True)
class Small:
    """A picture's size (width, height) and a small JPEG of it, or why it cannot be read."""

    size_px: tuple[int, int] = (0, 0)
    jpeg: bytes = field(default=b"", repr=False)
    problem: str = ""


@dataclass(frozen=True)
class Captioned:
    """A picture by its name inside the folder, with the caption that training finds for it.

    `lines` is the caption with its lines kept. `problem` makes a sentence after the name.
    """

    name: str
    lines: str = ""
    source: str = ""
    problem: str = ""
    has_mask: bool = False


@dataclass(frozen=True)
class Card:
    """What is shown of a picture.

    Attributes:
        crops: one for each resolution.
        problem: why it cannot be trained on; a sentence after its name.
        cut_at: place in the caption, on one line, from which nothing is read; None: all is read.
    """

    picture: Captioned
    small: Small
    crops: list[Crop]
    problem: str
    caption: str
    tokens: int
    cut_at: int | None

    @property
    def kept(self) -> float:
        """The share of the picture that is inside its smallest crop."""
        area = math.prod(self.small.size_px)
        boxes = [crop.box for crop in self.crops]
        inside = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
        return min(inside) / area if inside else 0.0


@lru_cache
def settings_for(base: str) -> Config:
    """The settings of the config that is shipped for a base, one of `families.CONFIGS`."""
    values = read_yaml(CONFIGS[base])
    return config_from_values({**values, "base": {**values.get("base", {}), "model": base}})


def facts_of(base: str) -> BaseFacts:
    """A base's tokenizer and sizes; slow to load the first time."""
    with _LOADING:
        return _facts_of(base)


_LOADING = threading.Lock()
_facts_of = lru_cache(base_facts)


def captions_of(listing: Listing) -> list[Captioned]:
    """The pictures of a folder, none of them decoded."""
    sources = CaptionSources(listing, FolderOptions(listing.folder, wildcards=True))
    return [_captioned(listing, sources, name) for name in listing.pictures]


def caption_of(folder: Path, name: str) -> Captioned | None:
    """One picture of a folder, or None."""
    listing = list_folder(folder)
    if name not in listing.pictures:
        return None
    sources = CaptionSources(listing, FolderOptions(folder, wildcards=True))
    return _captioned(listing, sources, name)


def _captioned(listing: Listing, sources: CaptionSources, name: str) -> Captioned:
    has_mask = stem_key(name) in listing.masks
    try:
        lines, source = sources.of(name)
    except UnreadableCaption as error:
        detail = f" ({error.detail})" if error.detail else ""
        problem = f"has a caption that {error.reason}{detail}. {error.advice}".strip()
        return Captioned(name, problem=problem, has_mask=has_mask)
    return Captioned(name, lines, source, has_mask=has_mask)


@lru_cache(4 * MOST_KEPT)
def cut_place(caption: str, base: str) -> tuple[int, int | None]:
    """(tokens of a caption, the place from which it is not read or None)."""
    spans = facts_of(base).spans(caption)
    most = settings_for(base).data.max_tokens
    return len(spans), spans[most][0] if len(spans) > most else None


def cards(folder: Path, pictures: Sequence[Captioned], base: str) -> Iterator[Card]:
    """The pictures with all that is shown of them, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        smalls = pool.map(small, (folder / one.name for one in pictures))
        for picture, shown in zip(pictures, smalls, strict=True):
            yield card(picture, shown, base)


def card(picture: Captioned, shown: Small, base: str) -> Card:
    """One picture with all that is shown of it."""
    data, step_px = settings_for(base).data, facts_of(base).step_px
    problem, crops = shown.problem or picture.problem, []
    if not shown.problem:
        try:
            crops = [
                fit(shown.size_px, side, step_px, data.max_aspect_ratio, data.upscale)
                for side in data.resolution_px
            ]
        except TooSmall as error:
            problem = str(error)
    caption = tidy(picture.lines)
    tokens, cut_at = cut_place(caption, base)
    return Card(picture, shown, crops, problem, caption, tokens, cut_at)


def source_of(jpeg: bytes) -> str:
    """A JPEG as an address that an image of the page can have."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def small(file: Path) -> Small:
    """A picture made small; remembered until the file changes."""
    try:
        found = file.stat()
    except OSError:
        return Small(problem="is not there any more")
    return _small(file, found.st_mtime_ns, found.st_size)


@lru_cache(MOST_KEPT)
def _small(file: Path, mtime_ns: int, size: int) -> Small:
    try:
        picture = read_image(file)
    except UnreadableImage as error:
        return Small(problem=str(error))
    return Small(picture.size, thumbnail(picture))

"""The data report as plain data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_sd.data.buckets import Crop
from lora_sd.data.picture_set import LeftOut


@dataclass(frozen=True)
class CheckedView:
    """A picture at one resolution.

    Attributes:
        kept: share of the picture's area that is inside the crop.
        scale: how much larger (above 1) or smaller it is shown than it is.
        smaller: its sides over those it would have if it were large enough.
    """

    resolution_px: int
    crop: Crop
    kept: float
    scale: float
    smaller: float


MarkKind = Literal[
    "same-file", "near-duplicate", "blurred", "borders", "small", "enlarged", "cropped",
    "caption-cut",
]  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """Something to look at: its kind, and a few words."""

    kind: MarkKind
    text: str


@dataclass(frozen=True)
class CheckedPicture:
    """A picture that can be used.

    Attributes:
        name: inside its folder.
        size_px: (width, height), upright.
        caption: as it is shown when nothing is drawn at random; `varies` tells whether something
            is.
        caption_source: where it was found.
        cut_at: place in the caption from which nothing is read; None: all is read.
        showings: how often an epoch shows it, at all its resolutions together.
        mask: 'file', 'alpha' or ''.
        like: index of the picture that it may be a near-duplicate of.
    """

    file: Path
    folder: Path
    kind: str
    name: str
    size_px: tuple[int, int]
    views: tuple[CheckedView, ...]
    caption: str
    caption_source: str
    varies: bool
    tokens: int
    cut_at: int | None
    showings: float
    mask: str
    like: int | None
    sharpness: float | None
    borders: tuple[float, float, float, float]
    marks: tuple[Mark, ...]
    thumbnail: bytes = field(repr=False)


@dataclass(frozen=True)
class Bucket:
    """A size that pictures are trained at, how many have it, and how often an epoch shows it."""

    size_px: tuple[int, int]
    pictures: int
    showings: float


@dataclass(frozen=True)
class TokenCounts:
    """Of the captions with the fewest tokens, the middle one and the one with the most."""

    fewest: int
    median: int
    most: int


@dataclass(frozen=True)
class CaptionFacts:
    """Of all training captions.

    Attributes:
        tokens: None without pictures.
        tags: (tag, pictures that have it) of captions in which commas part tags, most first.
        tags_once: how many of all tags one picture alone has.
        on_every: tags, else words, that every picture has, and no regularisation caption: what may
            call the result.
        same: (caption, pictures that share it), of two or more, most first.
        empty: pictures without any caption.
    """

    tokens: TokenCounts | None
    tags: tuple[tuple[str, int], ...]
    tags_once: int
    on_every: tuple[str, ...]
    same: tuple[tuple[str, int], ...]
    empty: int


@dataclass(frozen=True)
class Report:
    """Everything; `advice` and `notices` are sentences."""

    folders: tuple[Path, ...]
    max_tokens: int
    step_px: int
    pictures: tuple[CheckedPicture, ...]
    left_out: tuple[LeftOut, ...]
    buckets: tuple[Bucket, ...]
    captions: CaptionFacts
    notices: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def unusable(self) -> list[LeftOut]:
        """What cannot be used, without what is left out on purpose."""
        return [one for one in self.left_out if not one.on_purpose]

    @property
    def kinds(self) -> set[str]:
        """What the pictures are for."""
        return {one.kind for one in self.pictures}

    @property
    def showings(self) -> float:
        """Pictures shown in an epoch."""
        return sum(one.showings for one in self.pictures)


def shown_number(number: float) -> str:
    """As people say it: '112', 'about 112' or '1.5'."""
    if number == round(number) or number < 10:
        return f"{number:.2f}".rstrip("0").rstrip(".")
    return f"about {number:.0f}"

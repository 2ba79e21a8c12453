"""The data report: what would become of each picture of a folder, and what to look at first.

`make_report` gives plain data. `as_json` documents its shape; report_html.py draws it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_sd.data.base_facts import BaseFacts
from lora_sd.data.buckets import Crop, TooSmall, fit
from lora_sd.data.captions import plain_caption, varies
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.measures import BLURRED, Measures, like_earlier, measure
from lora_sd.data.picture_set import LeftOut, Picture
from lora_sd.data.views import check_resolutions, views_of

FORMAT = "lora_sd data report 1"
SMALL = 0.8
"""Below this share of the bucket's sides that it would have if it were larger, a picture is called
small. Rounding to the bucket's step alone takes an eighth at most at 512 px and steps of 64."""
ENLARGED = 1.25
"""A picture that is enlarged by more than that is visibly soft."""
CROPPED = 0.6
"""Below this share of its area that is kept, a picture is called cropped: a square of a 3:2
photograph keeps 0.67, of a 16:9 one 0.56."""


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


OF_SETTINGS: tuple[MarkKind, ...] = ("small", "enlarged", "cropped", "caption-cut")
"""Marks that say as much of the settings: where most pictures have one, `advice` alone tells it."""
MOST = 0.5


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
class CaptionFacts:
    """Of all training captions.

    Attributes:
        tokens: fewest, median and most; None without pictures.
        tags: (tag, pictures that have it) of captions in which commas part tags, most first.
        on_every: tags, else words, that every picture has: what may call the result.
        same: (caption, pictures that share it), of two or more, most first.
        empty: pictures without any caption.
    """

    tokens: tuple[int, int, int] | None
    tags: tuple[tuple[str, int], ...]
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
    def showings(self) -> float:
        """Pictures shown in an epoch."""
        return sum(one.showings for one in self.pictures)


def make_report(
    folders: Sequence[FolderOptions],
    base: BaseFacts,
    max_tokens: int = 75,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
) -> Report:
    """Read every picture of the folders and say what would become of it.

    Args:
        max_tokens: of a caption that are read.
        on_picture: called with (done, of) while pictures are read.

    Raises:
        ConfigError: a resolution is smaller than the step of picture sizes.
        DataError: a folder cannot be read, or none of its pictures can be used.
    """
    from lora_sd.data.report_advice import advice, caption_facts

    check_resolutions(folders, base.step_px)
    found = read_folders(folders, "skip", inspect=measure, on_picture=on_picture)
    left_out = list(found.left_out)
    usable: list[tuple[Picture, tuple[CheckedView, ...]]] = []
    for picture in found.pictures:
        try:
            usable.append((picture, _views(picture, base.step_px)))
        except TooSmall as error:
            left_out.append(LeftOut(picture.file, f"{error}."))
    measures: list[Measures] = [found.inspected[picture.file] for picture, _ in usable]
    like = like_earlier(measures)
    weight = _prior_weight([(picture, len(views)) for picture, views in usable])
    checked: list[CheckedPicture] = []
    for (picture, views), measured, first in zip(usable, measures, like, strict=True):
        original = usable[first][0] if first is not None else None
        checked.append(
            _checked(picture, views, measured, base, max_tokens, weight, first, original)
        )
    facts = caption_facts(checked)
    said = advice(checked, left_out, facts, folders, max_tokens)
    return Report(
        folders=tuple(one.folder for one in folders),
        max_tokens=max_tokens,
        step_px=base.step_px,
        pictures=tuple(_without_common_marks(checked)),
        left_out=tuple(left_out),
        buckets=_buckets(checked),
        captions=facts,
        notices=(*([base.notice] if base.notice else []), *found.notices),
        advice=tuple(said),
    )


def _views(picture: Picture, step_px: int) -> tuple[CheckedView, ...]:
    """The picture at each of its resolutions; raises TooSmall."""
    options = picture.options
    longest = options.max_aspect_ratio
    views = []
    for resolution_px, view in zip(options.resolution_px, views_of(picture, step_px), strict=True):
        crop = view.crop
        full = fit(picture.size_px, resolution_px, step_px, longest, upscale=True)
        left, top, right, bottom = crop.box
        area = (right - left) * (bottom - top)
        views.append(
            CheckedView(
                resolution_px,
                crop,
                kept=area / math.prod(picture.size_px),
                scale=crop.size_px[0] / (right - left),
                smaller=min(1.0, math.sqrt(math.prod(crop.size_px) / math.prod(full.size_px))),
            )
        )
    return tuple(views)


def _prior_weight(usable: Sequence[tuple[Picture, int]]) -> float:
    """What regularisation pictures' repeats are multiplied with, so that all of them are shown as
    often as the training pictures (as `order` does)."""
    shown = {"training": 0.0, "regularisation": 0.0, "validation": 0.0}
    for picture, views in usable:
        shown[picture.options.kind] += picture.repeats * views
    return shown["training"] / shown["regularisation"] if shown["regularisation"] else 0.0


def _checked(
    picture: Picture,
    views: tuple[CheckedView, ...],
    measured: Measures,
    base: BaseFacts,
    max_tokens: int,
    prior_weight: float,
    like: int | None,
    original: Picture | None,
) -> CheckedPicture:
    options = picture.options
    caption = plain_caption(picture.caption, options)
    spans = base.spans(caption)
    cut_at = spans[max_tokens][0] if len(spans) > max_tokens else None
    weights = {"training": 1.0, "regularisation": prior_weight, "validation": 0.0}
    mask = "file" if picture.mask else "alpha" if options.masks == "alpha" else ""
    marks = [
        *_likeness_marks(picture, original),
        *_picture_marks(views, measured),
        *([Mark("caption-cut", f"{len(spans)} tokens, {max_tokens} are read")] if cut_at else []),
    ]
    return CheckedPicture(
        file=picture.file,
        folder=options.folder,
        kind=options.kind,
        name=picture.name,
        size_px=picture.size_px,
        views=views,
        caption=caption,
        caption_source=picture.caption_source,
        varies=varies(picture.caption, options),
        tokens=len(spans),
        cut_at=cut_at,
        showings=picture.repeats * weights[options.kind] * len(views),
        mask=mask,
        like=like,
        sharpness=measured.sharpness,
        borders=measured.borders,
        marks=tuple(marks),
        thumbnail=measured.thumbnail,
    )


def _likeness_marks(picture: Picture, original: Picture | None) -> list[Mark]:
    if original is None:
        return []
    if original.sha256 == picture.sha256:
        return [Mark("same-file", f"the same file as '{original.name}'")]
    return [Mark("near-duplicate", f"may be a near-duplicate of '{original.name}'")]


def _picture_marks(views: Sequence[CheckedView], measured: Measures) -> list[Mark]:
    marks = []
    if measured.sharpness is not None and measured.sharpness < BLURRED:
        marks.append(Mark("blurred", "may be blurred"))
    smallest = min(views, key=lambda view: view.smaller)
    if smallest.smaller < SMALL:
        width, height = smallest.crop.size_px
        marks.append(Mark("small", f"small: {width} x {height} for {smallest.resolution_px} px"))
    largest = max(view.scale for view in views)
    if largest > ENLARGED:
        marks.append(Mark("enlarged", f"enlarged {largest:.1f} times"))
    kept = min(view.kept for view in views)
    if kept < CROPPED:
        marks.append(Mark("cropped", f"{kept:.0%} of it is kept"))
    if any(measured.borders):
        marks.append(Mark("borders", "may have borders"))
    return marks


def _without_common_marks(pictures: Sequence[CheckedPicture]) -> list[CheckedPicture]:
    counts = Counter(mark.kind for one in pictures for mark in one.marks)
    common = {kind for kind in OF_SETTINGS if counts[kind] > MOST * len(pictures)}
    return [
        replace(one, marks=tuple(mark for mark in one.marks if mark.kind not in common))
        for one in pictures
    ]


def _buckets(pictures: Sequence[CheckedPicture]) -> tuple[Bucket, ...]:
    """The sizes of training and regularisation pictures, the most shown first."""
    counts: Counter[tuple[int, int]] = Counter()
    showings: dict[tuple[int, int], float] = {}
    for one in pictures:
        for view in one.views:
            size = view.crop.size_px
            counts[size] += 1
            showings[size] = showings.get(size, 0.0) + one.showings / len(one.views)
    return tuple(Bucket(size, n, showings[size]) for size, n in counts.most_common())


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON takes it. Later versions add keys; `format` changes with any other change.

    {
      "format": "lora_sd data report 1",
      "folders": [folder, ...], "step_px": int, "max_tokens": int,
      "counts": {"used", "left_out", "marked", "showings_per_epoch"},
      "advice": [sentence, ...], "notices": [sentence, ...],
      "left_out": [{"file", "reason", "on_purpose"}, ...],
      "buckets": [{"size_px": [width, height], "pictures", "showings"}, ...],
      "captions": {"tokens": {"fewest", "median", "most"} or null, "tags": [{"tag", "pictures"}],
                   "on_every": [text], "same": [{"caption", "pictures"}], "empty": int},
      "pictures": [{"file", "folder", "kind", "name", "size_px": [width, height],
                    "views": [{"resolution_px", "bucket_px": [width, height],
                               "crop": [left, top, right, bottom], "kept", "scale"}],
                    "caption", "caption_source", "caption_varies", "tokens", "caption_read",
                    "showings", "mask", "like": file or null, "sharpness": number or null,
                    "borders": [left, top, right, bottom],
                    "marks": [{"kind": as MarkKind, "text"}]}, ...]
    }
    """
    facts = report.captions
    tokens = facts.tokens
    return {
        "format": FORMAT,
        "folders": [str(folder) for folder in report.folders],
        "step_px": report.step_px,
        "max_tokens": report.max_tokens,
        "counts": {
            "used": len(report.pictures),
            "left_out": len(report.left_out),
            "marked": sum(bool(one.marks) for one in report.pictures),
            "showings_per_epoch": report.showings,
        },
        "advice": list(report.advice),
        "notices": list(report.notices),
        "left_out": [
            {"file": str(one.file), "reason": one.reason, "on_purpose": one.on_purpose}
            for one in report.left_out
        ],
        "buckets": [
            {"size_px": list(one.size_px), "pictures": one.pictures, "showings": one.showings}
            for one in report.buckets
        ],
        "captions": {
            "tokens": dict(zip(("fewest", "median", "most"), tokens, strict=True))
            if tokens
            else None,
            "tags": [{"tag": tag, "pictures": count} for tag, count in facts.tags],
            "on_every": list(facts.on_every),
            "same": [{"caption": text, "pictures": count} for text, count in facts.same],
            "empty": facts.empty,
        },
        "pictures": [_picture_json(one, report.pictures) for one in report.pictures],
    }


def _picture_json(one: CheckedPicture, all_of_them: Sequence[CheckedPicture]) -> dict[str, Any]:
    return {
        "file": str(one.file),
        "folder": str(one.folder),
        "kind": one.kind,
        "name": one.name,
        "size_px": list(one.size_px),
        "views": [
            {
                "resolution_px": view.resolution_px,
                "bucket_px": list(view.crop.size_px),
                "crop": list(view.crop.box),
                "kept": view.kept,
                "scale": view.scale,
            }
            for view in one.views
        ],
        "caption": one.caption,
        "caption_source": one.caption_source,
        "caption_varies": one.varies,
        "tokens": one.tokens,
        "caption_read": one.caption[: one.cut_at],
        "showings": one.showings,
        "mask": one.mask,
        "like": None if one.like is None else str(all_of_them[one.like].file),
        "sharpness": one.sharpness,
        "borders": list(one.borders),
        "marks": [{"kind": mark.kind, "text": mark.text} for mark in one.marks],
    }

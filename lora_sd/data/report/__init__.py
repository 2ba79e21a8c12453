"""The data report: what would become of each picture of a folder, and what to look at first.

`make_report` gives plain data, the dataclasses of facts.py; html.py draws it.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from lora_sd.data.buckets import fit
from lora_sd.data.captions import plain_caption, varies
from lora_sd.data.findings import counted
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import LeftOut, Picture
from lora_sd.data.repeats import showing_rates
from lora_sd.data.report.advice import MOST, advice, caption_facts
from lora_sd.data.report.base_facts import BaseFacts
from lora_sd.data.report.facts import Bucket, CheckedPicture, CheckedView, Mark, MarkKind, Report
from lora_sd.data.report.measures import BLURRED, Measures, like_earlier, measure
from lora_sd.data.views import View, check_resolutions, fitting_views

FORMAT = "lora_sd data report 1"
SMALL = 0.8
"""Below this share of the bucket's sides that it would have if it were larger, a picture is called
small. Rounding to the bucket's step alone takes an eighth at most at 512 px and steps of 64."""
ENLARGED = 1.25
"""A picture that is enlarged by more than that is visibly soft."""
CROPPED = 0.75
"""Below this share of its area that is kept, a picture is called cropped: one of 1:3 keeps 0.67
where 1:2 is the longest shape. Rounding to the bucket's step alone keeps 0.87 at 512 px and steps
of 64, 0.77 at 64 px and steps of 16. Squares of 3:2 photographs keep 0.67 too; as most pictures
then do, `advice` alone tells it."""
OF_SETTINGS: tuple[MarkKind, ...] = ("small", "enlarged", "cropped", "caption-cut")
"""Marks that say as much of the settings: where most pictures have one, `advice` alone tells it."""


def make_report(
    folders: Sequence[FolderOptions],
    base: BaseFacts,
    max_tokens: int = 75,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
    bad: str = "fail",
) -> Report:
    """Read every picture of the folders and say what would become of it.

    Args:
        max_tokens: of a caption that are read.
        on_picture: called with (done, of) while pictures are read.
        bad: what training does about files that cannot be used, 'fail' or 'skip'.

    Raises:
        ConfigError: a resolution is smaller than the step of picture sizes.
        DataError: a folder cannot be read, or none of its pictures can be used.
    """
    check_resolutions(folders, base.step_px)
    found = read_folders(folders, "skip", inspect=measure, on_picture=on_picture)
    fitting, too_small = fitting_views(found.pictures, base.step_px)
    left_out = found.left_out + [LeftOut(one.file, one.why) for one in too_small]
    usable = [(views[0].picture, _checked_views(views, base.step_px)) for views in fitting]
    measures: list[Measures] = [found.inspected[picture.file] for picture, _ in usable]
    like = like_earlier(measures)
    checked: list[CheckedPicture] = []
    for (picture, views), measured, showings, first in zip(
        usable, measures, _showings(usable), like, strict=True
    ):
        original = usable[first][0] if first is not None else None
        checked.append(
            _checked(picture, views, measured, base, max_tokens, showings, first, original)
        )
    facts = caption_facts(checked)
    said = advice(checked, left_out, found.without_caption, facts, folders, max_tokens, bad)
    undrawn = _undrawn(folders, found.pictures)
    return Report(
        folders=tuple(one.folder for one in folders),
        max_tokens=max_tokens,
        step_px=base.step_px,
        pictures=tuple(_without_common_marks(checked)),
        left_out=tuple(left_out),
        buckets=_buckets(checked),
        captions=facts,
        notices=(*([base.notice] if base.notice else []), *undrawn, *found.notices),
        advice=tuple(said),
    )


def _undrawn(folders: Sequence[FolderOptions], pictures: Sequence[Picture]) -> list[str]:
    """Sentences on the class pictures that are not there yet."""
    said = []
    for options in folders:
        missing = options.class_pictures - sum(one.options == options for one in pictures)
        if missing > 0:
            said.append(
                f"{counted(missing, 'class picture')} still to be drawn into '{options.folder}': "
                f"training has the base do that first, and nothing of "
                f"{'it' if missing == 1 else 'them'} is in this report."
            )
    return said


def _checked_views(views: Sequence[View], step_px: int) -> tuple[CheckedView, ...]:
    """A picture at each of its resolutions."""
    picture = views[0].picture
    resolutions, longest = picture.options.resolution_px, picture.options.max_aspect_ratio
    checked = []
    for resolution_px, view in zip(resolutions, views, strict=True):
        crop = view.crop
        full = fit(picture.size_px, resolution_px, step_px, longest, upscale=True)
        left, top, right, bottom = crop.box
        area = (right - left) * (bottom - top)
        checked.append(
            CheckedView(
                resolution_px,
                crop,
                kept=area / math.prod(picture.size_px),
                scale=crop.size_px[0] / (right - left),
                smaller=min(1.0, math.sqrt(math.prod(crop.size_px) / math.prod(full.size_px))),
            )
        )
    return tuple(checked)


def _showings(usable: Sequence[tuple[Picture, tuple[CheckedView, ...]]]) -> list[float]:
    """How often an epoch shows each picture, at all its resolutions together."""
    kinds = [picture.options.kind for picture, _ in usable]
    repeats = [
        0.0 if picture.options.kind == "validation" else picture.repeats * len(views)
        for picture, views in usable
    ]
    return list(map(float, showing_rates(repeats, [kind == "regularisation" for kind in kinds])))


def _checked(
    picture: Picture,
    views: tuple[CheckedView, ...],
    measured: Measures,
    base: BaseFacts,
    max_tokens: int,
    showings: float,
    like: int | None,
    original: Picture | None,
) -> CheckedPicture:
    options = picture.options
    caption = plain_caption(picture.caption, options)
    spans = base.spans(caption)
    cut_at = spans[max_tokens][0] if len(spans) > max_tokens else None
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
        showings=showings,
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
    trained = [one for one in pictures if one.kind == "training"]
    counts = Counter(mark.kind for one in trained for mark in one.marks)
    common = {kind for kind in OF_SETTINGS if counts[kind] > MOST * len(trained)}
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


def as_json(report: Report) -> str:
    """The fields of `Report` as JSON, without thumbnails. Later versions add keys; 'format' changes
    with any other change."""
    held = asdict(report)
    for one in held["pictures"]:
        del one["thumbnail"]
    counts = {
        "used": len(report.pictures),
        "left_out": len(report.left_out),
        "marked": sum(bool(one.marks) for one in report.pictures),
        "showings_per_epoch": report.showings,
    }
    return json.dumps({"format": FORMAT, "counts": counts} | held, indent=2, default=str)

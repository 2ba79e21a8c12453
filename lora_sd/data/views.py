"""Which pictures are shown at which sizes: every usable picture at each of its resolutions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lora_sd.data.buckets import Crop, Size, TooSmall, fit
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import LeftOut, Picture, PictureSet
from lora_sd.errors import ConfigError, DataError

MOST_SIZES = 12
MOST_SHOWN = 20


@dataclass(frozen=True)
class View:
    """One picture at one resolution."""

    picture: Picture
    crop: Crop


def check_resolutions(folders: Sequence[FolderOptions], step_px: int) -> None:
    """Raises ConfigError when a resolution is below `step_px`, of which the base wants sides to be
    multiples."""
    smallest = min(side for one in folders for side in one.resolution_px)
    if smallest < step_px:
        raise ConfigError(
            f"'data.resolution_px' is {smallest}, and the base wants sides that are multiples of "
            f"{step_px} px: set {step_px} or more."
        )


def views_of(picture: Picture, step_px: int) -> list[View]:
    """The picture at each of its resolutions.

    Raises:
        TooSmall: it has no size to train at.
    """
    options = picture.options
    longest = options.max_aspect_ratio
    return [
        View(picture, fit(picture.size_px, resolution_px, step_px, longest, options.upscale))
        for resolution_px in options.resolution_px
    ]


def make_views(
    found: PictureSet, step_px: int, bad: str = "fail"
) -> tuple[list[View], list[LeftOut]]:
    """(views, the pictures that are too small for any).

    Args:
        step_px: what sides are multiples of.
        bad: 'fail' or 'skip': what to do about those that are too small.

    Raises:
        DataError: some are too small and `bad` is 'fail', or nothing is left to train on.
    """
    views: list[View] = []
    too_small = []
    for picture in found.pictures:
        try:
            views += views_of(picture, step_px)
        except TooSmall as error:
            too_small.append(LeftOut(picture.file, f"{error}."))
    if too_small and bad == "fail":
        raise DataError(
            [f"'{one.file}' {one.reason}" for one in too_small[:MOST_SHOWN]] + _more(len(too_small))
        )
    if all(view.picture.options.kind != "training" for view in views):
        raise DataError("No picture is left to train on.")
    return views, too_small


def _more(count: int) -> list[str]:
    rest = count - MOST_SHOWN
    return [f"... and {rest} more pictures that are too small."] if rest > 0 else []


def describe_sizes(counts: Counter[Size]) -> str:
    """'512x512: 12, 448x576: 8', the most frequent first."""
    shown = [f"{width}x{height}: {n}" for (width, height), n in counts.most_common(MOST_SIZES)]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"{more} more sizes"] if more else shown)

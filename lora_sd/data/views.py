"""Which pictures are shown at which sizes: every usable picture at each of its resolutions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lora_sd.data.buckets import Crop, Size, TooSmall, fit
from lora_sd.data.findings import Finding, sentences
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import LeftOut, Picture, PictureSet
from lora_sd.errors import ConfigError, DataError

MOST_SIZES = 12


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


def fitting_views(
    pictures: Sequence[Picture], step_px: int
) -> tuple[list[list[View]], list[Finding]]:
    """(each picture at each of its resolutions, the pictures that are too small for any).

    Args:
        step_px: what sides are multiples of.
    """
    fitting: list[list[View]] = []
    too_small: list[Finding] = []
    for one in pictures:
        options = one.options
        longest, upscale = options.max_aspect_ratio, options.upscale
        try:
            fitting.append(
                [
                    View(one, fit(one.size_px, resolution_px, step_px, longest, upscale))
                    for resolution_px in options.resolution_px
                ]
            )
        except TooSmall as error:
            too_small.append(Finding(one.file, str(error)))
    return fitting, too_small


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
    fitting, too_small = fitting_views(found.pictures, step_px)
    if too_small and bad == "fail":
        raise DataError(sentences(too_small))
    if all(views[0].picture.options.kind != "training" for views in fitting):
        raise DataError("No picture is left to train on.")
    views = [view for views in fitting for view in views]
    return views, [LeftOut(one.file, one.why) for one in too_small]


def describe_sizes(counts: Counter[Size]) -> str:
    """'512x512: 12, 448x576: 8', the most frequent first."""
    shown = [f"{width}x{height}: {n}" for (width, height), n in counts.most_common(MOST_SIZES)]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"{more} more sizes"] if more else shown)

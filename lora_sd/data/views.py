"""Which pictures are shown at which sizes: every usable picture at each of its resolutions."""

from collections import Counter
from collections.abc import Sequence

from lora_sd.data.buckets import TooSmall, fit
from lora_sd.data.cache import View
from lora_sd.data.picture_set import PictureSet
from lora_sd.errors import DataError

MOST_BUCKETS_SHOWN = 12


def make_views(
    found: PictureSet, step_px: int, bad: str = "fail"
) -> tuple[list[View], list[tuple[str, str]]]:
    """(views, (file, reason) of the pictures that are too small for any).

    Args:
        step_px: what sides are multiples of, where the settings of a folder do not say.
        bad: 'fail' or 'skip': what to do about those that are too small.

    Raises:
        DataError: some are too small and `bad` is 'fail', or nothing is left to train on.
    """
    views, too_small = [], []
    for picture in found.pictures:
        options = picture.options
        step = options.bucket_step_px or step_px
        try:
            for resolution_px in options.resolution_px:
                crop = fit(
                    picture.size_px, resolution_px, step, options.max_aspect_ratio, options.upscale
                )
                views.append(View(picture, crop))
        except TooSmall as error:
            too_small.append((str(picture.file), str(error)))
    if too_small and bad == "fail":
        raise DataError([f"'{file}' {reason}." for file, reason in too_small])
    if all(view.picture.options.kind != "training" for view in views):
        raise DataError("No picture is left to train on.")
    return views, too_small


def describe_buckets(views: Sequence[View]) -> str:
    """'512x512: 12, 448x576: 8': how many views have which size, the most frequent first."""
    counts = Counter(view.crop.size_px for view in views)
    shown = [
        f"{width}x{height}: {n}" for (width, height), n in counts.most_common(MOST_BUCKETS_SHOWN)
    ]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"{more} more sizes"] if more else shown)

"""What a plan needs to know of a run's pictures: how many there are, and how large."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_sd.data.augment import variant_count
from lora_sd.data.captions import varies
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.repeats import showing_rates
from lora_sd.data.views import make_views
from lora_sd.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    size_px: (width, height) of the largest that are trained on.
    sizes: how many sizes there are.
    count: pictures; None where they cannot be read.
    epoch: how many an epoch shows; None likewise.
    encoded_px: pixels of all that is encoded beforehand.
    texts_vary: whether captions are drawn anew each time.
    has_validation: whether some are for validation.
    notices: sentences on what is not known.
    """

    size_px: tuple[int, int]
    sizes: int = 1
    count: int | None = None
    epoch: float | None = None
    encoded_px: int = 0
    texts_vary: bool = False
    has_validation: bool = False
    notices: tuple[str, ...] = ()


def pictures_of(
    folders: Sequence[FolderOptions],
    step_px: int,
    index: Path | None = None,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
) -> Pictures:
    """Read the pictures of a run; where that cannot be, squares of the resolution stand for them.

    Args:
        step_px: what the sides of pictures are multiples of.
        index, on_picture: as of `read_folders`.
    """
    side = max(max(one.resolution_px) for one in folders)
    side = max(side // step_px, 1) * step_px
    varies_by_settings = any(
        one.shuffle_tags or one.tag_dropout or one.wildcards for one in folders
    )
    has_validation = any(one.kind == "validation" for one in folders)
    there = [one for one in folders if not one.class_pictures or one.folder.exists()]
    try:
        found = read_folders(there, "skip", on_picture=on_picture, index=index)
        views, _ = make_views(found, step_px, "skip")
    except DataError as error:
        notice = (
            f"The pictures cannot be read ({error.problems[0].rstrip('.')}): the plan is for "
            f"squares of {side} px, and says nothing of epochs."
        )
        return Pictures(
            (side, side),
            texts_vary=varies_by_settings,
            has_validation=has_validation,
            notices=(notice,),
        )
    shown = [view for view in views if view.picture.options.kind != "validation"]
    held_out = [view for view in views if view.picture.options.kind == "validation"]
    sizes = {view.crop.size_px for view in shown}
    rates = showing_rates(
        [view.picture.repeats for view in shown],
        [view.picture.options.kind == "regularisation" for view in shown],
    )
    encoded = sum(
        view.crop.size_px[0] * view.crop.size_px[1] * variant_count(view.picture.options)
        for view in (*shown, *held_out)
    )
    return Pictures(
        max(sizes, key=lambda size: (size[0] * size[1], size)),
        len(sizes),
        len({view.picture.file for view in views}),
        float(sum(rates)),
        encoded,
        any(varies(view.picture.caption, view.picture.options) for view in shown),
        bool(held_out),
    )

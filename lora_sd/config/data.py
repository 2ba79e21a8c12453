"""Settings of pictures and captions."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lora_sd.config.group import Group, as_list

Resolution = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


class PerFolderGroup(Group):
    """How pictures and captions are treated; each of `data.folders` may have its own."""

    caption: str | None = None
    """One caption for the images that have none of their own; '' lets them have none."""
    caption_fallback: Literal["none", "file_name", "folder_name"] = "none"
    """What captions an image that has no other caption: nothing, its own name, or its folder's. A
    folder named as kohya's tools want it ('10_sks cat') captions its images with that name anyway.
    """
    trigger_word: str | None = Field(None, max_length=200)
    """A word or phrase put before every caption, to call the result by; it is noted in the
    adapter's file."""
    caption_prefix: str = ""
    """Text before every caption, behind the trigger word."""
    caption_suffix: str = ""
    """Text after every caption."""
    shuffle_tags: bool = False
    """Put a caption's tags, which commas part, into another order each time it is shown."""
    keep_tags: int = Field(0, ge=0, le=1000)
    """So many first tags stay in place when tags are shuffled or dropped; '|||' in a caption parts
    what stays from what does not, too."""
    tag_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of tags left out, drawn anew each time a caption is shown."""
    caption_dropout: float = Field(0.05, ge=0, le=1)
    """Share of pictures shown with an empty caption, which keeps guidance working."""
    wildcards: bool = False
    """Draw one of '{a|b}' in captions, and one line of a caption of several lines."""
    resolution_px: Annotated[list[Resolution], BeforeValidator(as_list)] = Field(
        [64], min_length=1, max_length=8
    )
    """Sides of the training pictures in pixels: 64 for tiny-sd, 512 for SD 1.5, 768 for SD 2.1,
    1024 for SDXL. Pictures keep their shape: this is the side of a square of the same area. With
    several, each picture is shown at each."""
    max_aspect_ratio: float = Field(2.0, ge=1, le=8, allow_inf_nan=False)
    """Longest shape, as long side / short side; longer pictures are cut. 1: squares only."""
    upscale: bool = False
    """Enlarge pictures that are smaller than the resolution; else they are shown at their own
    size."""
    flip: bool = False
    """Show pictures mirrored as often as not. Not for faces, text, or anything with sides."""
    crop_jitter: float = Field(0.0, ge=0, le=0.5)
    """Cut up to this share off the sides, each time elsewhere."""
    colour_jitter: float = Field(0.0, ge=0, le=0.5)
    """Vary brightness, contrast, saturation and hue by up to this share."""
    variants: int | None = Field(None, ge=1, le=64)
    """How many versions of each picture are drawn and encoded, to be shown in turn, the first of
    them unchanged. Empty: 1, 2 with flip, 8 with jitter."""
    background: str = "white"
    """What transparent pictures are laid on: a colour's name, or '#rrggbb'."""
    masks: Literal["off", "file", "alpha"] = "off"
    """Where the loss counts: everywhere; where 'cat-mask.png' beside 'cat.png' is white; or where
    the picture is not transparent."""
    unmasked_weight: float = Field(0.0, ge=0, le=1)
    """How much the rest of a masked picture counts."""

    @field_validator("resolution_px")
    @classmethod
    def _each_once(cls, sides: list[int]) -> list[int]:
        if len(set(sides)) < len(sides):
            raise ValueError(
                "a side is named twice; one number stands for all shapes of its area, so write "
                "512 for kohya's 512,512"
            )
        return sides


class FolderGroup(PerFolderGroup):
    folder: str
    """Folder of images; folders inside it belong to it."""
    kind: Literal["training", "regularisation", "validation"] = "training"
    """What its pictures are for: to learn; to stay as they are (prior preservation: shown as often
    as the others all together); or to measure the loss on, unseen."""
    repeats: float = Field(1.0, ge=0.01, le=1000)
    """How often each picture is shown in an epoch, times what its folder's name says ('10_cat');
    0.5: every other epoch."""
    loss_weight: float = Field(1.0, ge=0, le=100)
    """How much its pictures' loss counts (of regularisation: the prior's weight)."""
    class_pictures: int = Field(0, ge=0, le=10_000)
    """For regularisation: have the base draw so many pictures of `caption` into the folder, where
    there are fewer, at the largest resolution, each with its caption beside it."""

    @model_serializer(mode="wrap")
    def _what_was_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what comes from `data`, so that a written config says the same again."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _settings_go_together(self) -> "FolderGroup":
        if self.class_pictures and (self.kind != "regularisation" or not self.caption):
            raise ValueError("class_pictures wants kind: regularisation, and a caption to draw")
        return self


EXAMPLE_FOLDER = "assets/ink-icons"
WITHOUT_SUBJECT: dict[str, Any] = {
    "caption": None,
    "trigger_word": None,
    "caption_prefix": "",
    "caption_suffix": "",
}


class DataGroup(PerFolderGroup):
    folder: str | None = None
    """Folder of training images, each with its caption beside it (fox.png, fox.txt); folders
    inside it belong to it. Empty, with no `folders` either: the example pictures."""
    folders: list[FolderGroup] = []
    """Further folders, each with 'folder', and what it wants of 'kind', 'repeats', 'loss_weight',
    'class_pictures' and of the other settings of `data` for itself: a list in YAML; JSON as a
    flag. Regularisation folders do not take over caption, trigger word, prefix and suffix."""
    bad_pictures: Literal["fail", "skip"] = "fail"
    """What to do about pictures and captions that cannot be used: stop and name them all, or leave
    them out and name them all."""
    max_tokens: Literal[75, 150, 225] = 75
    """Tokens of a caption that are read; more than 75 are encoded in parts, as A1111 and ComfyUI
    do with long prompts."""
    cache: Literal["disk", "memory"] = "disk"
    """Where encoded pictures and captions are kept: on disk, to be found there by the next run, or
    in memory alone."""
    cache_folder: str | None = None
    """Where on disk. Empty: '.cache' in the folder of all runs. It may be deleted at any time."""

    @model_validator(mode="after")
    def _some_folder(self) -> "DataGroup":
        if not self.folder and not self.folders:
            self.folder = EXAMPLE_FOLDER
        if not self.folder and all(one.kind != "training" for one in self.folders):
            raise ValueError("no folder is of kind 'training'")
        return self

    def folder_options(self) -> list[dict[str, Any]]:
        """Each folder with its settings, as `data.folder_options.FolderOptions` takes them."""
        shared = self.model_dump(include=set(PerFolderGroup.model_fields))
        given = [{"folder": self.folder}] if self.folder else []
        each = []
        for one in given + [one.model_dump() for one in self.folders]:
            # What calls the subject is not taken over by pictures of something else.
            own = WITHOUT_SUBJECT if one.get("kind") == "regularisation" else {}
            each.append(shared | own | one)
        for one in each:
            one |= {"folder": Path(one["folder"]), "resolution_px": tuple(one["resolution_px"])}
        return each

"""What a folder of pictures is for, and how its pictures and captions are treated."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FolderOptions:
    """Options of one folder; `config.PerFolderGroup` and `config.FolderGroup` explain each."""

    folder: Path
    kind: str = "training"
    repeats: float = 1.0
    loss_weight: float = 1.0
    class_pictures: int = 0
    caption: str | None = None
    caption_fallback: str = "none"
    trigger_word: str | None = None
    caption_prefix: str = ""
    caption_suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    wildcards: bool = False
    resolution_px: tuple[int, ...] = (64,)
    max_aspect_ratio: float = 2.0
    upscale: bool = False
    flip: bool = False
    crop_jitter: float = 0.0
    colour_jitter: float = 0.0
    variants: int | None = None
    background: str = "white"
    masks: str = "off"
    unmasked_weight: float = 0.0

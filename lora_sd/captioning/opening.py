"""Find a captioning model's files and tell its kind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from lora_sd.errors import UserError

TAGS_FILE = "selected_tags.csv"
TAGGER_FILE = "model.onnx"
EXAMPLES = {
    "blip": "Salesforce/blip-image-captioning-large",
    "florence2": "florence-community/Florence-2-base",
    "tags": "SmilingWolf/wd-swinv2-tagger-v3",
}
"""A model of each kind that is read."""
DETAILS = {
    "short": "<CAPTION>",
    "detailed": "<DETAILED_CAPTION>",
    "long": "<MORE_DETAILED_CAPTION>",
}
"""Florence-2's tasks; BLIP's captions are always short."""
INSTALL = "`pip install -r requirements-captioning.txt` installs what is missing."


class CaptioningError(UserError):
    """A captioning model cannot be found, read or used."""


class Captioner(Protocol):
    """A loaded model."""

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption for each picture in RGB; '' where the model has nothing to say."""


@dataclass(frozen=True)
class CaptionerFiles:
    """A model's folder, and how to read it: 'tags' by ONNX, or sentences by transformers."""

    name: str
    folder: Path
    kind: Literal["blip", "florence2", "tags"]


@dataclass(frozen=True)
class SentenceChoice:
    """How much a sentence says.

    Attributes:
        detail: one of DETAILS.
        max_tokens: longest caption.
    """

    detail: str = "detailed"
    max_tokens: int = 70


@dataclass(frozen=True)
class TagChoice:
    """Which tags make a caption.

    Attributes:
        threshold: least probability of a general tag.
        character_threshold: the same of a character's name.
        rating: whether the likeliest rating ('general', 'sensitive', ...) is a tag too.
        exclude: tags to leave out, with spaces or underscores.
    """

    threshold: float = 0.35
    character_threshold: float = 0.85
    rating: bool = False
    exclude: tuple[str, ...] = ()


def find_captioner(name: str) -> CaptionerFiles:
    """The files of a model by the path of a folder or by hub id; fetched where they are missing.

    Raises:
        CaptioningError: there is no such model, it is of another kind, or it is not on this machine
            and the hub cannot be reached.
    """
    folder = Path(name) if Path(name).is_dir() else _fetch(name, ["config.json", TAGS_FILE])
    if (folder / TAGS_FILE).is_file():
        kind, weights = "tags", [TAGGER_FILE]
    else:
        kind, weights = _model_type(folder), ["*.json", "*.txt", "*.safetensors"]
    if kind not in EXAMPLES:
        found = f"is a model of kind '{kind}'" if kind else f"has no config.json and no {TAGS_FILE}"
        raise CaptioningError(
            f"'{name}' {found}. What is read: BLIP, Florence-2 in transformers' format, and WD14 "
            f"taggers as ONNX, such as {', '.join(EXAMPLES.values())}."
        )
    if not Path(name).is_dir():
        folder = _fetch(name, weights)
    if not any(folder.glob(weights[-1])):
        raise CaptioningError(
            f"'{name}' holds no {weights[-1].removeprefix('*')} file: pickled weights are not "
            f"read, as they can run code. Choose a model that has one."
        )
    return CaptionerFiles(name, folder, kind)  # type: ignore[arg-type]


def _model_type(folder: Path) -> str:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def _fetch(name: str, patterns: list[str]) -> Path:
    """The folder of a hub model's files in Hugging Face's cache; fetched where they are missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"is no folder, and no model of the hub such as {', '.join(EXAMPLES.values())}"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, RepositoryNotFoundError):
        raise CaptioningError(f"'{name}' {where}.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CaptioningError(
            f"'{name}' is not on this machine, and the hub cannot be reached. Download the model "
            f"where there is a network, and name its folder. ({type(error).__name__})"
        ) from None

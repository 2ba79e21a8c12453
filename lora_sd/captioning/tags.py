"""WD14 taggers (SmilingWolf's): captions of booru tags, by ONNX.

Such a model reads a square of its own size, usually 448 px, white around the picture, as floats of
0 to 255 in the order blue, green, red: (n, side, side, 3). It gives a probability for each row of
selected_tags.csv, whose column `category` is 9 for ratings, 4 for characters, 0 for the rest.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_sd.captioning.opening import (
    INSTALL,
    TAGGER_FILE,
    TAGS_FILE,
    CaptionerFiles,
    CaptioningError,
    TagChoice,
)

GENERAL, CHARACTER, RATING = 0, 4, 9
SLOW_TO_START = {"TensorrtExecutionProvider"}  # compiles the model for minutes


class TagCaptioner:
    """A loaded tagger.

    Raises:
        CaptioningError: onnxruntime is not installed, or the model or its tags cannot be read.
    """

    def __init__(self, files: CaptionerFiles, choice: TagChoice) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise CaptioningError(f"WD14 taggers need onnxruntime. {INSTALL}") from None

        self._choice = choice
        self._names, self._categories = read_tags(files.folder / TAGS_FILE)
        providers = [
            name for name in onnxruntime.get_available_providers() if name not in SLOW_TO_START
        ]
        try:
            self._session = onnxruntime.InferenceSession(
                str(files.folder / TAGGER_FILE), providers=providers
            )
        except Exception as error:  # onnxruntime's errors share no class
            raise CaptioningError(
                f"'{files.folder / TAGGER_FILE}' cannot be loaded: {str(error).splitlines()[0]}."
            ) from None
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        shape, tags = self._input.shape, self._output.shape[-1]
        if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or tags != len(self._names):
            raise CaptioningError(
                f"'{files.name}' is no WD14 tagger: it reads {shape} and gives {tags} values for "
                f"the {len(self._names)} tags of {TAGS_FILE}; expected [n, side, side, 3] and one "
                f"value for each tag."
            )

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Tags parted by commas: characters, then the others, each with the likeliest first."""
        side = self._input.shape[1]
        pixels = np.stack([prepared(picture, side) for picture in pictures])
        most = self._input.shape[0]
        size = most if isinstance(most, int) else len(pixels)  # older models take one at a time
        found = [
            row
            for start in range(0, len(pixels), size)
            for row in self._session.run(
                [self._output.name], {self._input.name: pixels[start : start + size]}
            )[0]
        ]
        return [", ".join(self._chosen(row)) for row in found]

    def _chosen(self, probabilities: npt.NDArray[np.float32]) -> list[str]:
        order = np.argsort(-probabilities, kind="stable")
        excluded = {readable(tag.strip()) for tag in self._choice.exclude}

        def over(category: int, threshold: float) -> list[str]:
            return [
                self._names[i]
                for i in order
                if self._categories[i] == category and probabilities[i] > threshold
            ]

        tags = over(CHARACTER, self._choice.character_threshold)
        tags += over(GENERAL, self._choice.threshold)
        if self._choice.rating:
            tags += over(RATING, -1.0)[:1]
        return [tag for tag in tags if tag not in excluded]


def read_tags(file: Path) -> tuple[list[str], list[int]]:
    """(names as they go into a caption, categories) of a selected_tags.csv.

    Raises:
        CaptioningError: it cannot be read, or has other columns.
    """
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            rows = [(row["name"], int(row["category"])) for row in csv.DictReader(opened)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise CaptioningError(
            f"'{file}' is no list of tags: expected CSV in UTF-8 with the columns 'name' and "
            f"'category'."
        ) from None
    return [readable(name) for name, _ in rows], [category for _, category in rows]


def readable(tag: str) -> str:
    """'long hair' for 'long_hair'; faces such as '^_^' and 'x_x' stay as they are."""
    is_word = re.search(r"\w\w", tag.replace("_", " "))
    return tag.replace("_", " ") if is_word else tag


def prepared(picture: Image.Image, side_px: int) -> npt.NDArray[np.float32]:
    """A picture in RGB as the model reads it: (side, side, 3)."""
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    if longest != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]

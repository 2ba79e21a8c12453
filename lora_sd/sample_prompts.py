"""The prompts of a run's sample pictures: those of its settings, then those of a file.

The file has one prompt a line; empty lines and those that begin with '#' are passed over. Settings
of a prompt's own stand behind it, as kohya's trainers write them:

    a red fox in snow --n blurry, text --w 512 --h 768 --d 7 --s 30 --l 5 --am 0.8
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_sd.errors import ConfigError, nearest, printable
from lora_sd.generate import PictureSettings

log = logging.getLogger("lora_sd")
LARGEST_PX = 4096
OPTION = re.compile(r"(?:^|\s)--(?=\S)")
OF_OTHER_MODELS = {
    "cn": "a ControlNet's picture",
    "ctr": "a ratio of control",
    "fs": "the flow shift of other models",
    "g": "the guidance of other models",
    "nr": "a choice of other models",
    "ss": "a sampler",
}
"""Options of kohya's that mean nothing here."""


@dataclass(frozen=True)
class Option:
    """What may stand behind a prompt.

    Attributes:
        field: of `PictureSettings`.
        least, most: of its value; None: it is a text.
    """

    field: str
    words: str
    kind: Callable[[str], Any] = str
    least: float | None = None
    most: float = math.inf


OPTIONS = {
    "n": Option("negative_prompt", "negative prompt"),
    "w": Option("width_px", "width", int, 1, LARGEST_PX),
    "h": Option("height_px", "height", int, 1, LARGEST_PX),
    "d": Option("seed", "seed", int, 0, 2**32 - 1),
    "s": Option("steps", "number of steps", int, 1, 1000),
    "l": Option("guidance", "guidance", float, 0, 50),
    "am": Option("scale", "scale of the adapter", float, -10, 10),
}


class SamplePrompts:
    """What a run draws each time it draws samples.

    Args:
        prompts: the settings' own.
        file: further ones, one a line; it may be edited while the run is at work.
        shared: what a prompt has that says nothing else: size, steps, guidance, ...; its seed is
            the first prompt's, and the next prompt uses the next.
        size_step_px: what sides must be multiples of.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or lines of it are wrong; all of
            them at once.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        file: Path | None,
        shared: PictureSettings,
        size_step_px: int,
    ) -> None:
        self._file, self._shared, self._size_step_px = file, shared, size_step_px
        self._own = [
            replace(shared, prompt=prompt, seed=shared.seed + number)
            for number, prompt in enumerate(prompts)
        ]
        self._of_file = self._read_file()

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self._own or self._of_file)

    def read(self) -> list[PictureSettings]:
        """The settings of each picture as they are now. What is wrong with the file is logged, and
        what it held before is used."""
        try:
            self._of_file = self._read_file()
        except ConfigError as error:
            log.warning("Note: the sample prompts stay as they were. %s", " ".join(error.problems))
        return [*self._own, *self._of_file]

    def _read_file(self) -> list[PictureSettings]:
        if self._file is None:
            return []
        first_seed = self._shared.seed + len(self._own)
        return read_prompts(self._file, replace(self._shared, seed=first_seed), self._size_step_px)


def read_prompts(file: Path, shared: PictureSettings, size_step_px: int) -> list[PictureSettings]:
    """The settings of each picture of a prompt file.

    Raises:
        ConfigError: as `SamplePrompts`.
    """
    if file.suffix.lower() in (".json", ".toml"):
        raise ConfigError(
            f"'{file}' is not read: prompt files here are text, one prompt a line, such as "
            f"'a red fox --w 512 --h 768 --d 7'."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"The prompt file '{file}' cannot be read: {reason}.") from None
    found: list[PictureSettings] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        one = replace(shared, seed=shared.seed + len(found))
        settings, wrong = parse_prompt(line.strip(), one, size_step_px)
        found.append(settings)
        problems += [f"'{file}', line {number}: {sentence}" for sentence in wrong]
    if not found:
        problems = [f"The prompt file '{file}' holds no prompt. Write one a line."]
    if problems:
        raise ConfigError(problems)
    return found


def parse_prompt(
    line: str, shared: PictureSettings, size_step_px: int
) -> tuple[PictureSettings, list[str]]:
    """(the settings of a line's picture, sentences on what is wrong with it)."""
    prompt, *parts = OPTION.split(line)
    prompt = prompt.strip()
    values: dict[str, Any] = {}
    problems = [] if prompt else ["there is no prompt before its options."]
    for part in parts:
        name, _, text = part.strip().partition(" ")
        option = OPTIONS.get(name)
        if option is None:
            problems.append(_unknown(name))
        elif option.field in values:
            problems.append(f"'--{name}' stands there twice.")
        else:
            value, wrong = _value(name, option, text.strip())
            if not wrong and option.field in ("width_px", "height_px"):
                wrong = _size_problem(name, option, value, size_step_px)
            values[option.field] = value
            problems += wrong
    settings = shared if problems else replace(shared, prompt=prompt, **values)
    return settings, problems


def _value(name: str, option: Option, text: str) -> tuple[Any, list[str]]:
    if option.least is None:
        return text, []
    whole = "a whole number" if option.kind is int else "a number"
    wanted = f"{whole} from {option.least:.10g} to {option.most:.10g}"
    try:
        value = option.kind(text)
    except ValueError:
        value = None
    if value is None or not option.least <= value <= option.most:
        shown = f"is '{printable(text)}'" if text else "has no value"
        return None, [f"'--{name}' ({option.words}) {shown}: write {wanted}."]
    return value, []


def _size_problem(name: str, option: Option, side_px: int, step_px: int) -> list[str]:
    if side_px % step_px == 0:
        return []
    near = max(1, round(side_px / step_px)) * step_px
    return [
        f"'--{name}' ({option.words}) is {side_px}, no multiple of {step_px}, which this model "
        f"wants. The nearest is {near}."
    ]


def _unknown(name: str) -> str:
    shown = f"'--{printable(name)}'"
    if name in OF_OTHER_MODELS:
        return f"{shown} ({OF_OTHER_MODELS[name]}) cannot be chosen here. Take it out."
    known = ", ".join(f"--{one} ({option.words})" for one, option in OPTIONS.items())
    return f"{shown} is unknown.{nearest(name, OPTIONS)} There are {known}."

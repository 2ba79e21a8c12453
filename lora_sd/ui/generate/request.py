"""What a page asks to have drawn, checked: the browser is not trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd.config.base import BaseGroup
from lora_sd.errors import ConfigError
from lora_sd.known_bases import HUB_ID
from lora_sd.schedulers import SCHEDULERS
from lora_sd.ui.adapters.offered import OfferedAdapter
from lora_sd.ui.bases import find_base
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

if TYPE_CHECKING:
    from lora_sd.generate import PictureSettings
    from lora_sd.parts import Scales

MOST_ADAPTERS = 4
MOST_SCALE = 1.5
MOST_PART = 2.0
MOST_STEPS = 150
MOST_GUIDANCE = 30.0
MOST_SEED = 2**31 - 1
MOST_PICTURES = 8
MOST_PROMPT = 2_000  # characters
LEAST_PX, MOST_PX = 16, 2048
PARTS = ("linear", "conv", "text_encoder")


@dataclass(frozen=True)
class Used:
    """An adapter of a picture, and how strongly its parts act; the factors multiply."""

    adapter: OfferedAdapter
    scale: float = 1.0
    linear: float = 1.0
    conv: float = 1.0
    text_encoder: float = 1.0

    def scales(self) -> Scales:
        """The same, as merging takes it."""
        from lora_sd.parts import Scales

        return Scales(self.scale, self.linear, self.conv, self.text_encoder)

    @property
    def is_whole(self) -> bool:
        """Whether all its parts act alike."""
        return self.linear == self.conv == self.text_encoder == 1


@dataclass(frozen=True)
class Request:
    """Pictures to draw, of one seed after the other.

    Attributes:
        base: the base model, and how to load it: pairs of `load_base_model`'s arguments.
        base_id: the base as the page chose it; '' for the adapters' own.
        width_px, height_px: 0 for the base model's own resolution.
        scheduler: '' for the base model's own.
        count: how many pictures.
    """

    base: tuple[tuple[str, Any], ...]
    used: tuple[Used, ...]
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    width_px: int = 0
    height_px: int = 0
    scheduler: str = ""
    count: int = 1
    base_id: str = ""

    def settings(self) -> list[PictureSettings]:
        """What `generate` draws."""
        from lora_sd.generate import PictureSettings

        return [
            PictureSettings(
                self.prompt,
                self.negative_prompt,
                seed,
                self.steps,
                self.guidance,
                self.width_px,
                self.height_px,
                scheduler=self.scheduler,
            )
            for seed in range(self.seed, self.seed + self.count)
        ]

    def at_scale(self, scale: float) -> Request:
        """With the first adapter at another scale."""
        first, *others = self.used
        return replace(self, used=(replace(first, scale=scale), *others))

    def of(self, adapter: OfferedAdapter) -> Request:
        """With another adapter in the place of the first."""
        first, *others = self.used
        return replace(self, used=(replace(first, adapter=adapter), *others))

    def without_adapters(self) -> Request:
        """Of the base alone."""
        return replace(self, used=())

    def adapters_said(self) -> str:
        """'fox, scale 0.5 + owl, scale 1'."""
        return " + ".join(
            say("generate.adapter_at", adapter=one.adapter.label, scale=one.scale)
            for one in self.used
        )


def field(name: str, number: int) -> str:
    """The name of a field of the nth adapter: 'scale', 'scale_2'."""
    return name if number == 1 else f"{name}_{number}"


class Checking:
    """Reads values that the browser sent, and notes what is wrong with them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.problems: list[str] = []

    def value(self, key: str) -> Any:
        """What was sent, whatever it is."""
        return self._values.get(key)

    def number(
        self, key: str, label: str, low: float, high: float, default: float, whole: bool = False
    ) -> float:
        """A number from low to high; the default where none was sent at all."""
        raw = self._values.get(key, default)
        wrong = isinstance(raw, bool) or not isinstance(raw, int | float)
        if wrong or not math.isfinite(raw) or not low <= raw <= high or (whole and raw % 1):
            text = "generate.wrong_whole" if whole else "generate.wrong_number"
            self.problems.append(say(text, name=label, low=low, high=high))
            return default
        return float(raw)

    def whole(self, key: str, label: str, low: int, high: int, default: int) -> int:
        """A whole number from low to high."""
        return int(self.number(key, label, low, high, default, whole=True))

    def size_px(self, key: str, label: str) -> int:
        """Of a side; 0 for the base model's own."""
        raw = self._values.get(key)
        if raw is None or (raw == 0 and not isinstance(raw, bool)):
            return 0
        return self.whole(key, label, LEAST_PX, MOST_PX, 0)

    def text(self, key: str, label: str, most: int = MOST_PROMPT) -> str:
        """Text, without the space round it."""
        raw = self._values.get(key) or ""
        if not isinstance(raw, str) or len(raw) > most or "\0" in raw:
            self.problems.append(say("generate.wrong_text", name=label, most=most))
            return ""
        return raw.strip()

    def end(self) -> None:
        """Raises:
        ConfigError: all that was wrong.
        """
        if self.problems:
            raise ConfigError(self.problems)


def read_request(
    values: Mapping[str, Any], place: Workplace, find: Callable[[object], OfferedAdapter | None]
) -> Request:
    """Check what the browser sent; what was not sent at all is as usual.

    Args:
        values: by name of the field: 'prompt', and for each adapter 'adapter', 'scale' and PARTS,
            the second's with '_2' behind.
        find: an adapter by its id.

    Raises:
        UserError: all problems at once.
    """
    checking = Checking(values)
    used = read_adapters(checking, find)
    request = replace(read_picture(checking), used=tuple(used))
    checking.end()
    return replace(request, base=_base_of(request, place))


def read_adapters(
    checking: Checking, find: Callable[[object], OfferedAdapter | None]
) -> list[Used]:
    """The adapters, of which there must be a first."""
    used = []
    for number in range(1, MOST_ADAPTERS + 1):
        chosen = checking.value(field("adapter", number))
        if number > 1 and (chosen is None or chosen == ""):
            continue
        scale = checking.number(field("scale", number), _label("scale", number), 0, MOST_SCALE, 1)
        parts = [
            checking.number(field(part, number), _label(part, number), 0, MOST_PART, 1)
            for part in PARTS
        ]
        if (found := find(chosen)) is None:
            key = "generate.choose_first" if number == 1 else "generate.choose_nth"
            checking.problems.append(say(key, number=number))
        else:
            used.append(Used(found, scale, *parts))
    return used


def read_picture(checking: Checking) -> Request:
    """All but the adapters and how the base is loaded."""
    request = Request(
        base=(),
        used=(),
        prompt=checking.text("prompt", say("generate.prompt")),
        negative_prompt=checking.text("negative", say("generate.negative")),
        seed=checking.whole("seed", say("generate.seed"), 0, MOST_SEED, 0),
        steps=checking.whole("steps", say("generate.steps"), 1, MOST_STEPS, 25),
        guidance=checking.number("guidance", say("generate.guidance"), 0, MOST_GUIDANCE, 7.5),
        width_px=checking.size_px("width", say("generate.width")),
        height_px=checking.size_px("height", say("generate.height")),
        scheduler=checking.text("scheduler", say("generate.scheduler")),
        count=checking.whole("count", say("generate.count"), 1, MOST_PICTURES, 1),
        base_id=checking.text("base", say("generate.base")),
    )
    if request.scheduler and request.scheduler not in SCHEDULERS:
        checking.problems.append(say("generate.wrong_scheduler"))
    return request


def _base_of(request: Request, place: Workplace) -> tuple[tuple[str, Any], ...]:
    """The chosen base, or the one that the adapters were trained on, loaded as it was then."""
    if request.base_id:
        model = find_base(place.models, request.base_id)
        return tuple(BaseGroup(model=model).options().items())
    known = {one.adapter.label: model for one in request.used if (model := one.adapter.base())}
    if not known:
        raise ConfigError(say("generate.name_a_base", adapter=request.used[0].adapter.label))
    (first, first_base), *others = known.items()
    for second, second_base in others:
        if second_base != first_base:
            raise ConfigError(
                say(
                    "generate.several_bases",
                    first=first,
                    first_base=_shown(first_base),
                    second=second,
                    second_base=_shown(second_base),
                )
            )
    for one in request.used:
        if config := one.adapter.config():
            return tuple(config.base.options().items())
    return tuple(BaseGroup(model=first_base).options().items())


def _shown(model: str) -> str:
    """A base's name without the folders of this machine."""
    return model if HUB_ID.fullmatch(model) else Path(model).name


def _label(name: str, number: int) -> str:
    label = say(f"generate.{name}")
    return label if number == 1 else say("generate.of_nth", name=label, number=number)

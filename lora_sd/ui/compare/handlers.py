"""What happens on the Compare tab: two runs are read from their folders, and set side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_sd.config import config_from_values, read_yaml
from lora_sd.errors import ConfigError, RunError, UserError
from lora_sd.run_folder import RunFolder, list_runs, open_run
from lora_sd.ui import fields
from lora_sd.ui.curves import Drawn
from lora_sd.ui.metrics import GAUGE, Course
from lora_sd.ui.samples import Sample, nearest, same_asked, sample_steps, samples_at
from lora_sd.ui.texts import say
from lora_sd.ui.train.run_view import RunView, read_run
from lora_sd.ui.workplace import Workplace

SAME_FOR_ALL = ("output.name", "output.folder", "data.cache_folder")
MOST_SHOWN = 200  # characters of a setting


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is of, and what both runs have of it."""

    name: str
    one: str
    other: str


@dataclass(frozen=True)
class SamePictures:
    """Pictures that both runs drew of the same prompt and seed at a step.

    Attributes:
        steps: at which both drew; step: that of `pairs`.
        has_base: whether one base's picture stands for both.
        notice: why there are none.
    """

    steps: list[int] = field(default_factory=list)
    step: int | None = None
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)
    has_base: bool = False
    notice: str = ""


@dataclass(frozen=True)
class Compared:
    """Two runs side by side.

    Attributes:
        settings: those that differ.
        results: what came of both.
        at_work: whether either is being trained.
        problems: why they cannot be compared; nothing else is there then.
    """

    names: tuple[str, str] = ("", "")
    settings: list[Row] = field(default_factory=list)
    results: list[Row] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    pictures: SamePictures = SamePictures()
    at_work: bool = False
    problems: list[str] = field(default_factory=list)


class CompareHandlers:
    """The Compare tab's handlers."""

    def __init__(self, place: Workplace) -> None:
        self.outputs, self.trainer = place.outputs, place.trainer

    def names(self) -> list[str]:
        """All runs, newest first."""
        return [run.name for run in list_runs(self.outputs)]

    def choice(self, one: object, other: object) -> tuple[str | None, str | None]:
        """The two runs to compare: those chosen, as far as they are there and are two, and else
        the newest."""
        names = self.names()
        first = one if isinstance(one, str) and one in names else None
        if first is None:
            first = next((name for name in names if name != other), None)
        second = other if isinstance(other, str) and other in names and other != first else None
        if second is None:
            second = next((name for name in names if name != first), None)
        return first, second

    def compare(self, one: object, other: object, step: object = None) -> Compared:
        """Two runs side by side.

        Args:
            step: whose pictures are wanted; the nearest that both have is taken, or the last.
        """
        if not self.names():
            return Compared(problems=[say("compare.none")])
        try:
            runs = [self._open(name) for name in (one, other)]
            if runs[0].name == runs[1].name:
                return Compared(problems=[say("compare.same")])
            values = [_settings(run) for run in runs]
        except UserError as error:
            return Compared(problems=error.problems)
        views = [read_run(self.trainer, run.name) for run in runs]
        wanted = float(step) if isinstance(step, int | float) and abs(step) < 1e12 else None
        return Compared(
            names=(runs[0].name, runs[1].name),
            settings=_differences(*values),
            results=_results(*views),
            drawn=[Drawn(view.name, view.course, view.steps) for view in views],
            pictures=_same_pictures(runs, wanted, _are_of_one_base(*values)),
            at_work=any(view.can_stop for view in views),
        )

    def _open(self, name: object) -> RunFolder:
        if not isinstance(name, str) or name not in self.names():
            raise RunError(say("compare.choose_two"))
        return open_run(self.outputs, name)


def _settings(run: RunFolder) -> dict[str, Any]:
    """The run's settings by dotted name.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        groups = config_from_values(read_yaml(run.config_file)).model_dump()
    except ConfigError:  # which tells the file's path
        raise ConfigError(say("compare.unreadable", run=run.name)) from None
    return {
        f"{group}.{name}": value
        for group, settings in groups.items()
        for name, value in settings.items()
        if f"{group}.{name}" not in SAME_FOR_ALL
    }


def _are_of_one_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in one if name.startswith("base."))


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[Row]:
    return [
        Row(_label(name), _shown(name, value), _shown(name, other[name]))
        for name, value in one.items()
        if value != other[name]
    ]


def _label(name: str) -> str:
    return fields.label(name) if name in fields.FIELDS else say(f"compare.setting.{name}")


def _shown(name: str, value: Any) -> str:
    """A setting's value to be read; of a path, its last name alone: the page tells no paths."""
    if value is None or value == "" or value == []:
        return say("compare.nothing")
    if isinstance(value, bool):
        return say("compare.on" if value else "compare.off")
    if isinstance(value, list):
        parts = [
            _shown(name, part["folder"]) if isinstance(part, dict) else _shown(name, part)
            for part in value
        ]
        return ", ".join(parts)[:MOST_SHOWN]
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    if Path(text).is_absolute() or re.match(r"[A-Za-z]:[\\/]", text):
        text = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text[:MOST_SHOWN]


def _results(one: RunView, other: RunView) -> list[Row]:
    """What came of two runs, without the lines that neither has."""
    both = [_result(one), _result(other)]
    return [
        Row(name, both[0].get(name) or nothing, both[1].get(name) or nothing)
        for name in both[0] | both[1]
        if (nothing := say("compare.nothing")) and (both[0].get(name) or both[1].get(name))
    ]


def _result(view: RunView) -> dict[str, str]:
    course: Course = view.course
    validated, gauged = course.validated, course.gauged
    found = {
        say("compare.state"): view.badge,
        say("run.step"): f"{view.step:,} / {view.steps:,}",
        say("compare.loss"): _number(course.recent_loss),
        say("compare.validation"): _number(validated.losses[-1][1] if validated.losses else None),
        say("compare.lowest_validation"): "",
        say("compare.base_validation"): _number(validated.base),
        say("compare.speed"): "" if course.images_per_s is None else f"{course.images_per_s:.3g}",
    }
    if validated.losses:
        step, loss = min(validated.losses, key=lambda one: one[1])
        found[say("compare.lowest_validation")] = say("compare.at_step", value=loss, step=step)
    for kind in GAUGE:
        if gauged and kind in gauged.kinds:
            size = f"{100 * gauged.kinds[kind]:.3g} %"
            found[say("compare.update", of=say(f"run.gauge.{kind}"))] = size
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _same_pictures(
    runs: Sequence[RunFolder], wanted: float | None, is_one_base: bool
) -> SamePictures:
    there = [sample_steps(run) for run in runs]
    steps = [step for step in there[0] if step in there[1] and step > 0]
    step = nearest(steps, wanted)
    if step is None:
        return SamePictures(notice=say("compare.no_step"))
    pairs = same_asked(samples_at(runs[0], step), samples_at(runs[1], step))
    notice = "" if pairs else say("compare.not_alike", step=step)
    has_base = is_one_base and any(one.base for one, _ in pairs)
    return SamePictures(steps, step, pairs, has_base, notice)

"""What happens on the run panel: a run is looked at, told things, and the queue is put in order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_sd.errors import UserError
from lora_sd.run_folder import NAME_PATTERN, Request, list_runs
from lora_sd.ui.adapters.offered import OfferedAdapter, find_adapter
from lora_sd.ui.queue import QueueState, Submitted
from lora_sd.ui.texts import say
from lora_sd.ui.train.run_view import RunView, read_run
from lora_sd.ui.workplace import Workplace


@dataclass(frozen=True)
class Look:
    """What the panel shows now.

    Attributes:
        names: all runs, newest first.
        at_work: the run that is being trained.
        view: the run that is shown; None: there are no runs.
        queue: the runs that wait.
    """

    names: list[str]
    at_work: str | None
    view: RunView | None
    queue: QueueState


@dataclass(frozen=True)
class Told:
    """What came of telling a run, or the queue, something."""

    problems: list[str] = field(default_factory=list)
    notice: str = ""


class RunHandlers:
    """The run panel's handlers."""

    def __init__(self, place: Workplace) -> None:
        self.outputs, self.trainer, self.queue = place.outputs, place.trainer, place.queue

    def names(self) -> list[str]:
        """All runs, newest first, with one that is just being started at the top."""
        names = [run.name for run in list_runs(self.outputs)]
        launched = self.trainer.last_launched()
        if launched and launched not in names and self.trainer.has_console(launched):
            names.insert(0, launched)
        return names

    def look(self, selected: object, step: object = None, was_at_work: object = None) -> Look:
        """The selected run as it is now, or the one at work, or the newest.

        Args:
            step: whose samples are shown; None: the newest.
            was_at_work: at the last look; who watched that run sees the next one when it begins.
        """
        names, at_work = self.names(), self.trainer.current()
        queue = self.queue.state()
        if not names:
            return Look(names, at_work, None, queue)
        ended = selected == was_at_work and at_work is not None and at_work != was_at_work
        name = selected if selected in names and not ended else at_work
        name = str(name if name in names else names[0])
        step = round(step) if isinstance(step, int | float) and abs(step) < 1e12 else None
        return Look(names, at_work, read_run(self.trainer, name, step), queue)

    def result(self, run: str) -> OfferedAdapter | None:
        """The finished adapter of a run."""
        try:
            return find_adapter(self.outputs, run)
        except UserError:
            return None

    def stop(self, run: object) -> Told:
        """Ask a run to save and end."""
        return self._tell(run, self.trainer.stop)

    def pause(self, run: object) -> Told:
        """Ask a run to wait after its step."""
        return self._tell(run, self.trainer.pause)

    def go_on(self, run: object) -> Told:
        """Let a paused run go on."""
        return self._tell(run, self.trainer.go_on)

    def ask_now(self, run: object, request: Request) -> Told:
        """Ask a run to save, or to draw its samples, after its step."""
        ask = {"save": self.trainer.save_now, "sample": self.trainer.sample_now}[request]
        return self._tell(run, ask)

    def resume(self, run: object) -> Told:
        """Go on with a run that ended early, or put that into the queue."""
        return self._tell(run, self.queue.resume)

    def move(self, entry: object, by: int) -> Told:
        """Move an entry of the queue up (-1) or down (+1)."""
        return self._with_entry(entry, lambda known: self.queue.move(known, by))

    def remove(self, entry: object) -> Told:
        """Take an entry out of the queue."""
        return self._with_entry(entry, self.queue.remove)

    def hold(self, holds: bool) -> Told:
        """Start nothing more from the queue, or go on with it."""
        return _told(self.queue.hold if holds else self.queue.go_on)

    def _tell(self, run: object, action: Callable[[str], Any]) -> Told:
        if not isinstance(run, str) or not NAME_PATTERN.fullmatch(run):
            return Told([say("run.choose_first")])
        return _told(lambda: action(run))

    def _with_entry(self, entry: object, action: Callable[[str], Any]) -> Told:
        known = [one.id for one in self.queue.state().entries]
        if not isinstance(entry, str) or entry not in known:
            return Told([say("queue.choose_first")])
        return _told(lambda: action(entry))


def submitted_sentence(submitted: Submitted) -> str:
    """What is to be said of a run that waits; '' for one that was started."""
    if not submitted.place:
        return ""
    key = "queue.waits_for" if submitted.behind else "queue.waits"
    return say(key, run=submitted.run, place=submitted.place, behind=submitted.behind)


def _told(action: Callable[[], Any]) -> Told:
    try:
        done = action()
    except UserError as error:
        return Told(error.problems)
    return Told(notice=submitted_sentence(done) if isinstance(done, Submitted) else "")

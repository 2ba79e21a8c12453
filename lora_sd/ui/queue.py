"""The queue of runs: started one after the other, by whichever app is open on the folder.

It is kept in <outputs>/.app/queue, so that it outlives the app. Nothing is lost when the app ends:
the run at work goes on, and the next one begins when an app is there again.

    a run that fails           is left behind, and the next one begins
    a run that somebody stops  holds the queue, until it is told to go on
    what cannot be started     stays in the queue with the reason, and the next one begins
"""

import json
import logging
import threading
import uuid
from dataclasses import asdict, dataclass, replace

import yaml

from lora_sd import durable
from lora_sd.config import Config, config_from_values
from lora_sd.errors import RunError, UserError
from lora_sd.run_folder import RunFolder
from lora_sd.ui.launch import Trainer, names_like
from lora_sd.ui.texts import say

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
MOST_QUEUED = 100


@dataclass(frozen=True)
class QueuedRun:
    """A run that waits for its turn.

    Attributes:
        id: names the entry.
        run: the run's name.
        config: its settings as YAML; None: the run is there already, and is to go on.
        problem: why it could not be started; it is passed over until it is removed.
    """

    id: str
    run: str
    config: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class QueueState:
    """The queue as it stands.

    Attributes:
        held_by: the run whose stop holds the queue, or "" where a person holds it; None: not held.
        watched: the run at work, whose end decides how the queue goes on.
    """

    entries: tuple[QueuedRun, ...] = ()
    held_by: str | None = None
    watched: str = ""

    @property
    def is_held(self) -> bool:
        """Whether nothing is started until the queue is told to go on."""
        return self.held_by is not None

    def waiting(self) -> list[QueuedRun]:
        """The entries that can be started."""
        return [one for one in self.entries if not one.problem]


@dataclass(frozen=True)
class Submitted:
    """What became of a wish to train.

    Attributes:
        run: the run's name.
        place: 0 when it was started at once, else its place in the queue, from 1.
        behind: the run at work that it waits for; "" where there is none.
    """

    run: str
    place: int = 0
    behind: str = ""


class RunQueue:
    """The one queue of an outputs folder.

    Args:
        trainer: starts the runs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._file = trainer.outputs / ".app" / "queue" / "queue.json"
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Start what waits, one after the other, for as long as this program runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look_again_and_again, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Start nothing more from this program."""
        self._closed.set()

    def state(self) -> QueueState:
        """The queue as it stands; cheap enough to be asked every second."""
        try:
            values = json.loads(self._file.read_text(encoding="utf-8"))
            entries = tuple(QueuedRun(**one) for one in values["entries"])
            state = QueueState(entries, values["held_by"], values["watched"])
        except (OSError, ValueError, TypeError, LookupError):  # none yet, or damaged
            return QueueState()
        return state if _is_sound(state) else QueueState()

    def submit(self, config: Config) -> Submitted:
        """Start a new run, or put it at the end of the queue where another is at work.

        Raises:
            RunError: the name is taken, the queue is full, or the run cannot be started.
        """
        run = str(config.output.name)
        with self._trainer.alone():
            self.check_name(run)
            if self._is_turn():
                self._trainer.start(config)
                self._write(replace(self.state(), watched=run))
                return Submitted(run)
            return self._append(QueuedRun(uuid.uuid4().hex, run, config.to_yaml()))

    def resume(self, run: str) -> Submitted:
        """Go on with a run, or put that at the end of the queue where another is at work. Where its
        stop has held the queue, that goes on after it.

        Raises:
            RunError: there is no such run, it is at work or waits already, or cannot be started.
        """
        with self._trainer.alone():
            self._trainer.open(run)
            if self._trainer.current() == run:
                raise RunError(say("trainer.at_work", run=run))
            if any(one.run == run for one in self.state().waiting()):
                raise RunError(say("trainer.queued_already", run=run))
            if self._is_turn():
                self._trainer.resume(run)
                state = self.state()
                held_by = None if state.held_by == run else state.held_by
                self._write(replace(state, watched=run, held_by=held_by))
                return Submitted(run)
            return self._append(QueuedRun(uuid.uuid4().hex, run))

    def move(self, entry: str, by: int) -> None:
        """Move an entry towards the front (-1) or the end (+1); one that has gone is no error."""
        with self._trainer.alone():
            state = self.state()
            entries = list(state.entries)
            for place, one in enumerate(entries):
                if one.id == entry:
                    entries.insert(max(0, place + by), entries.pop(place))
                    self._write(replace(state, entries=tuple(entries)))
                    return

    def remove(self, entry: str) -> None:
        """Take an entry out; one that has gone is no error."""
        with self._trainer.alone():
            state = self.state()
            entries = tuple(one for one in state.entries if one.id != entry)
            self._write(replace(state, entries=entries))

    def hold(self) -> None:
        """Start nothing more until told to go on; the run at work goes on."""
        with self._trainer.alone():
            self._write(replace(self.state(), held_by=""))

    def go_on(self) -> None:
        """Start the next run as soon as none is at work."""
        with self._trainer.alone():
            state = self.state()
            is_over = state.watched and self._trainer.current() is None
            self._write(replace(state, held_by=None, watched="" if is_over else state.watched))

    def check_name(self, name: str) -> None:
        """Raise RunError where a run of that name is there, or waits."""
        if self._trainer.is_taken(name):
            raise RunError(say("trainer.name_taken", run=name))
        if name in self._queued_names():
            raise RunError(say("trainer.name_queued", run=name))

    def free_name(self, wish: str) -> str:
        """A run name that no run has and none waits under: `wish`, or with a number."""
        queued = self._queued_names()
        return next(
            name
            for name in names_like(wish)
            if name not in queued and not self._trainer.is_taken(name)
        )

    def look(self) -> None:
        """Start the next run, where none is at work and the queue is not held.

        Raises:
            RunError: the outputs folder cannot be written to.
        """
        if not self.state().waiting():
            return
        if (current := self._trainer.current()) and current == self.state().watched:
            return
        with self._trainer.alone():
            state = before = self.state()
            if current := self._trainer.current():
                state = replace(state, watched=current)
            else:
                if state.watched and self._was_stopped(state.watched):
                    state = replace(state, held_by=state.watched)
                state = replace(state, watched="")
                while not state.is_held and not state.watched and state.waiting():
                    state = self._start(state, state.waiting()[0])
            if state != before:
                self._write(state)

    def _is_turn(self) -> bool:
        """Whether a run may begin at once: none is at work, and none that waits would be next."""
        state = self.state()
        return self._trainer.current() is None and (state.is_held or not state.waiting())

    def _start(self, state: QueueState, entry: QueuedRun) -> QueueState:
        """Start an entry; the queue without it, or with the reason why it could not be started."""
        rest = tuple(one for one in state.entries if one.id != entry.id)
        try:
            if entry.config is None:
                self._trainer.resume(entry.run)
            else:
                self._trainer.start(config_from_values(yaml.safe_load(entry.config)))
        except UserError as error:
            passed_over = replace(entry, problem=" ".join(error.problems))
            entries = tuple(passed_over if one.id == entry.id else one for one in state.entries)
            return replace(state, entries=entries)
        return replace(state, entries=rest, watched=entry.run)

    def _append(self, entry: QueuedRun) -> Submitted:
        state, current = self.state(), self._trainer.current() or ""
        if len(state.entries) >= MOST_QUEUED:
            raise RunError(say("trainer.queue_full", count=len(state.entries)))
        state = replace(state, entries=(*state.entries, entry), watched=current or state.watched)
        self._write(state)
        return Submitted(entry.run, len(state.waiting()), current)

    def _was_stopped(self, run: str) -> bool:
        """Whether a run that has ended did so because somebody stopped it."""
        status = RunFolder(self._trainer.outputs / run).read_status()
        if status is not None and status.state in ("stopped", "finished", "failed"):
            return status.state == "stopped"
        return self._trainer.was_stopped(run)  # before it began, or killed as it did not end

    def _queued_names(self) -> set[str]:
        return {one.run for one in self.state().entries}

    def _write(self, state: QueueState) -> None:
        if not state.entries and state.held_by:  # nothing is left for the stopped run to hold
            state = replace(state, held_by=None)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_text(self._file, json.dumps(asdict(state)))
        except OSError as error:
            raise RunError(say("trainer.not_written", reason=error.strerror)) from None
        except UserError as error:  # whose sentence tells where on this machine
            reason = getattr(error.__cause__, "strerror", None) or type(error).__name__
            raise RunError(say("trainer.not_written", reason=reason)) from None

    def _look_again_and_again(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:
                log.warning("The queue of runs could not be looked after.", exc_info=True)


def _is_sound(state: QueueState) -> bool:
    """Whether what was read is what is written."""
    texts = [text for one in state.entries for text in (one.id, one.run, one.problem)]
    return (
        all(isinstance(text, str) for text in [*texts, state.watched])
        and all(isinstance(one.config, str | None) for one in state.entries)
        and isinstance(state.held_by, str | None)
    )

"""The queue of runs: started one after the other, by whichever app is open on the folder.

It is kept in <outputs>/.app/queue, so that it outlives the app. Nothing is lost when the app ends:
the run at work goes on, and the next one begins when the app is there again.

    a run that fails          is left behind, and the next one begins
    a run that somebody stops holds the queue, until it is told to go on
    what cannot be started    stays in the queue with the reason, and the next one begins
"""

import logging
from dataclasses import dataclass

from lora_sd.config import Config
from lora_sd.ui.launch import Trainer

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
MOST_QUEUED = 100


@dataclass(frozen=True)
class QueuedRun:
    """A run that waits for its turn.

    Attributes:
        id: names the entry, as two entries may be about the same run.
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
        watched: the run whose end decides how the queue goes on.
    """

    entries: tuple[QueuedRun, ...] = ()
    held_by: str | None = None
    watched: str = ""

    @property
    def is_held(self) -> bool:
        """Whether nothing is started until the queue is told to go on."""
        return self.held_by is not None


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

    def start(self) -> None:
        """Start what waits, one after the other, for as long as this program runs."""

    def state(self) -> QueueState:
        """The queue as it stands; cheap enough to be asked every second."""
        return QueueState()

    def submit(self, config: Config) -> Submitted:
        """Start a new run, or put it at the end of the queue where another is at work.

        Raises:
            RunError: the name is taken, the queue is full, or the run cannot be started.
        """
        return Submitted(self._trainer.start(config))

    def resume(self, run: str) -> Submitted:
        """Go on with a run, or put that at the end of the queue where another is at work.

        Raises:
            RunError: there is no such run, it is at work or waits already, or cannot be started.
        """
        return Submitted(self._trainer.resume(run))

    def move(self, entry: str, by: int) -> None:
        """Move an entry towards the front (-1) or the end (+1); one that has gone is no error."""
        raise NotImplementedError

    def remove(self, entry: str) -> None:
        """Take an entry out; one that has gone is no error."""
        raise NotImplementedError

    def hold(self) -> None:
        """Start nothing more until told to go on; the run at work goes on."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Start the next run as soon as none is at work."""
        raise NotImplementedError

    def check_name(self, name: str) -> None:
        """Raise RunError where a run of that name is there, or waits."""
        self._trainer.check_free(name)

    def free_name(self, wish: str) -> str:
        """A run name that no run has and none waits under: `wish`, or with a number."""
        return self._trainer.free_name(wish)

"""What a run tells while it works: status, metrics, log, bar.

None of it is worth a run: where it cannot be written, as on a full disk, that is said once and the
run goes on. Metrics are kept and written when there is room again.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from lora_sd.errors import RunError, UserError
from lora_sd.run_folder import RunFolder, State, Status
from lora_sd.trackers import Trackers

log = logging.getLogger("lora_sd")
HEARTBEAT_S = 1.0
LOG_EVERY_S = 20.0
LOOK_FOR_ROOM_S = 1.0


class RunRecord:
    """Writes status.json, metrics.jsonl, train.log and the progress bar of one run.

    As a context manager it holds the run's lock, so that one trainer writes to a folder at a time,
    and records how the run ended when an exception ends it.

    Args:
        is_main: whether this is the process that writes; the others keep still.

    Raises:
        RunError: on entering: another trainer is at work in the folder.
    """

    def __init__(self, run: RunFolder, steps: int, is_main: bool) -> None:
        self._run, self._steps, self._is_main = run, steps, is_main
        self._lock = FileLock(run.lock_file)
        self._status = Status("starting", 0, steps)
        self._handlers: list[logging.Handler] = []
        self._bar: tqdm | None = None
        self._written = self._logged = self._started = 0.0
        self._first_step = 0
        self._unwritten: list[dict[str, Any]] = []
        self._has_said_unwritten = False
        self.trackers = Trackers(run, 0, is_main=False)  # none, until there are some

    def __enter__(self) -> "RunRecord":
        if self._is_main:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                who = self._holder()
                raise RunError(
                    f"'{self._run.path}' is being trained by {who} now, which has locked it."
                ) from None
            except OSError as error:
                raise RunError(f"'{self._run.path}' cannot be used: {error.strerror}.") from None
            with contextlib.suppress(OSError):  # Windows keeps a locked file to itself
                self._run.lock_file.write_text(str(os.getpid()))
            try:
                file = _LogFile(self._run.log_file, self._say_unwritten)
            except OSError as error:
                self._lock.release()
                raise RunError(f"'{self._run.path}' cannot be used: {error.strerror}.") from None
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            self._handlers = [_AboveTheBar(), file]
        log.setLevel(logging.INFO if self._is_main else logging.CRITICAL)
        log.propagate = False
        for handler in self._handlers:
            log.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, UserError):
            if self._written:  # otherwise it was refused before it began: all is as it was
                self.state("failed", " ".join(error.problems))
        elif error is not None:
            log.error("The run failed.", exc_info=error)
            self.state("failed", f"{type(error).__name__}: {error}")
        self.trackers.close()
        for handler in self._handlers:
            log.removeHandler(handler)
            with contextlib.suppress(OSError):  # what is still to be written finds no room
                handler.close()
        self._lock.release()

    def _holder(self) -> str:
        """Who holds the lock."""
        with contextlib.suppress(OSError, ValueError):
            return f"process {int(self._run.lock_file.read_text())}"
        status = self._run.read_status()
        return f"process {status.pid}" if status else "another process"

    def state(self, state: State, message: str = "", step: int | None = None) -> None:
        """Enter a state, and say so at once."""
        self._status.state, self._status.message = state, message
        if step is not None:
            self._status.step = step
        self._write()

    @contextlib.contextmanager
    def during(self, state: State, message: str) -> Iterator[None]:
        """Be in a state for a while, then in the one before."""
        before = self._status.state, self._status.message
        self.state(state, message)
        yield
        self.state(*before)

    @contextlib.contextmanager
    def paused(self, message: str) -> Iterator[None]:
        """Be paused for a while, which counts neither for the speed nor for the time left."""
        began = time.monotonic()
        with self.during("paused", message):
            yield
        self._started += time.monotonic() - began
        if self._bar is not None:
            self._bar.unpause()

    def beat(self, message: str = "") -> None:
        """A sign of life, at most one a second; `message` says what is being done."""
        self._status.message = message or self._status.message
        if time.monotonic() - self._written >= HEARTBEAT_S:
            self._write()

    def wait_for_room(self, is_to_stop: Callable[[], bool]) -> Callable[[str], bool]:
        """What `checkpoint.save` calls while there is no room: a wait of a second with signs of
        life, until `is_to_stop`."""
        has_said = False

        def wait(why: str) -> bool:
            nonlocal has_said
            if not has_said:
                log.warning("%s The run waits until there is room.", why)
            has_said = True
            self.beat(f"waiting for room on the disk: {why}")
            until = time.monotonic() + LOOK_FOR_ROOM_S
            while time.monotonic() < until and not is_to_stop():
                time.sleep(0.05)
            return not is_to_stop()

        return wait

    def training_from(self, step: int) -> None:
        """The loop begins, or begins again from an earlier step: show the bar, start the clock."""
        if self._bar is not None:
            self._bar.close()
        self._started, self._first_step = time.monotonic(), step
        self._bar = tqdm(
            total=self._steps,
            initial=step,
            unit="step",
            disable=not self._is_main,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self.state("training", "", step)

    def step(
        self,
        step: int,
        loss: float,
        rates: Mapping[str, float],
        grad_norm: float,
        images: int,
        more: Mapping[str, Any],
    ) -> None:
        """One step is done: a line of metrics, the bar, now and then a line in the log.

        Args:
            rates: the learning rates by group; 'lr' is the first of them.
            images: pictures in this step.
            more: what was measured besides at this step, by the name it has in the metrics.
        """
        if not self._is_main or self._bar is None:
            return
        now = time.monotonic()
        seconds = now - self._started
        images_per_s = images * (step - self._first_step) / max(seconds, 1e-9)
        self._append(
            metrics := {
                "step": step,
                "loss": loss,
                "lr": next(iter(rates.values())),
                **({"rates": dict(rates)} if len(set(rates.values())) > 1 else {}),
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "images_per_s": round(images_per_s, 3),
                "seconds": round(seconds, 3),
                **more,
            }
        )
        self.trackers.log(step, metrics)
        self._status.step = step
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:.1f} images/s", refresh=False)
        self._bar.update()
        if step == self._steps:
            self._bar.close()
        if now - self._logged >= LOG_EVERY_S or step == self._steps:
            self._logged = now
            left = seconds / (step - self._first_step) * (self._steps - step)
            text = "step %d/%d, loss %.4f, %.1f images/s, %.0f s left"
            log.info(text, step, self._steps, loss, images_per_s, left)
        self.beat()

    def _append(self, values: dict[str, Any]) -> None:
        """Add a line to the metrics, and those before it that found no room.

        Raises:
            RunError: the run's folder has gone.
        """
        # A run that has gone back to a checkpoint tells its steps again.
        self._unwritten = [one for one in self._unwritten if one["step"] < values["step"]]
        self._unwritten.append(values)
        try:
            while self._unwritten:
                self._run.append_metrics(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            self._run.check_there()
            self._say_unwritten(error)

    def _say_unwritten(self, error: OSError) -> None:
        """Say, once, that a record cannot be written."""
        if self._has_said_unwritten:
            return
        self._has_said_unwritten = True  # before it is said: the log may be what cannot be written
        reason = error.strerror or error
        log.warning(
            "Note: the run's log, metrics or status cannot be written (%s). Training goes on; "
            "metrics are written when they can be again.",
            reason,
        )

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._is_main:
            try:
                self._run.write_status(self._status)
            except OSError as error:
                self._say_unwritten(error)


class _LogFile(logging.FileHandler):
    """train.log; lines that find no room are kept by the stream for the next."""

    def __init__(self, file: Path, on_error: Callable[[OSError], None]) -> None:
        super().__init__(file, encoding="utf-8")
        self._on_error = on_error

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        else:
            self._on_error(error)


class _AboveTheBar(logging.Handler):
    """Log lines on the terminal, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the window, or the program that listens, has gone
            tqdm.write(self.format(record), file=sys.stderr)

"""Start, watch and stop the trainer: the command a user would type, in a process of its own.

What was started is written to <outputs>/.app/trainer.json, so that a restarted app, or another one
on the same folder, finds it. A lock in that folder makes sure that one is started at a time.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lora_sd.config import Config
from lora_sd.errors import EXIT_RESUMABLE, RunError
from lora_sd.run_folder import (
    NAME_PATTERN,
    REQUESTS,
    WORKING,
    Request,
    RunFolder,
    list_runs,
    open_run,
)
from lora_sd.ui.accelerate_launch import ENDED
from lora_sd.ui.texts import say

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = (
    *(sys.executable, "-P", str(PROJECT / "lora_sd" / "ui" / "accelerate_launch.py")),
    str(PROJECT / "train_sd_lora.py"),
)
DATASETS = "datasets"  # the folder of data sets beside the runs
KILL_AFTER_S = 60.0
LOCKED_S = 60.0  # longer than a start takes, even where a drawing is waited for
HAS_SIGNALS = os.name != "nt"  # Ctrl-Break reaches only the group that this app has started
MOST_CONSOLE = 64 * 1024  # bytes of console output that are read
LAST_LINES = 20
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")


@dataclass(frozen=True)
class Ending:
    """How the last start of a run ended.

    Attributes:
        code: the trainer's exit status, negative for a signal; None where nobody saw it.
        last_lines: the end of what it wrote.
    """

    code: int | None
    last_lines: tuple[str, ...]

    def sentence(self) -> str:
        """'It crashed (signal 11, SIGSEGV).'; "" where it ended well, or nothing is known."""
        if self.code in (None, 0, EXIT_RESUMABLE):
            return ""
        if self.code > 0:
            return say("trainer.exit_status", code=self.code)
        known = {one.value: one.name for one in signal.Signals}
        name = known.get(-self.code, "?")
        kind = (
            "killed_for_memory" if name == "SIGKILL" else "crashed" if name in CRASHES else "killed"
        )
        return say(f"trainer.{kind}", number=-self.code, name=name)


@dataclass(frozen=True)
class Launched:
    """A trainer that was started: its run, and the process that leads its group.

    Attributes:
        stopped: whether somebody asked it to stop.
    """

    run: str
    pid: int
    process_started: float
    stopped: bool = False

    def process(self) -> psutil.Process | None:
        """The process, if it still runs and is the one that was started."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError, OverflowError):
            return None


class Trainer:
    """The one trainer of an outputs folder, whoever started it.

    Args:
        outputs: the folder of all runs.
        command: the trainer's command, to which `--config FILE` or `--resume RUN` is added.
    """

    def __init__(self, outputs: Path, command: Sequence[str] = COMMAND) -> None:
        self.outputs = outputs
        self._command = list(command)
        self._folder = outputs / ".app"
        self._file_lock = FileLock(self._folder / "lock", timeout=LOCKED_S)
        self._before_launch: list[Callable[[], None]] = []
        self._ending: set[str] = set()

    def before_launch(self, do: Callable[[], None]) -> None:
        """Have something done before each start, as to free memory that training may need."""
        self._before_launch.append(do)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else starts a run or changes the queue meanwhile, in this app or in another.

        Raises:
            RunError: somebody does so for a long time, or the folder cannot be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file_lock.acquire()
        except Timeout:
            raise RunError(say("trainer.busy")) from None
        except OSError as error:
            raise _not_written(error) from None
        try:
            yield
        finally:
            self._file_lock.release()

    def current(self) -> str | None:
        """The run that is being trained now, by this app, an earlier one or a terminal."""
        launched = self._launched()
        if launched and launched.process():
            return launched.run
        for run in list_runs(self.outputs):
            status = run.read_status()
            if status and status.state in WORKING and status.is_alive():
                return run.name
        return None

    def is_starting(self, name: str) -> bool:
        """Whether its process runs, but has not made itself known in the run folder yet."""
        launched = self._launched()
        if not (launched and launched.run == name and launched.process()):
            return False
        status = RunFolder(self.outputs / name).read_status()
        return status is None or status.heartbeat < launched.process_started

    def is_stopping(self, name: str) -> bool:
        """Whether it was asked to stop and has not ended yet."""
        launched = self._launched()
        return name in self._ending or bool(
            launched and launched.run == name and launched.stopped and launched.process()
        )

    def start(self, config: Config) -> str:
        """Start a new run; its name.

        Raises:
            RunError: a trainer is at work already, the name is taken, or it cannot be started.
        """
        name = config.output.name
        if not name:
            raise ValueError("the app names its runs")
        with self.alone():
            self.check_free(name)
            file = self._folder / f"{name}.yaml"
            try:
                file.write_text(config.to_yaml(), encoding="utf-8")
            except OSError as error:
                raise _not_written(error) from None
            self._launch(name, ["--config", str(file)])
        return name

    def resume(self, name: str) -> str:
        """Go on with a run that stopped, failed or was interrupted; its name.

        Raises:
            RunError: a trainer is at work already, there is no such run, or it cannot be started.
        """
        with self.alone():
            self._refuse_second()
            run = self.open(name)
            self._launch(name, ["--resume", str(run.path)])
        return name

    def stop(self, name: str) -> None:
        """Ask a run to save and end; it is killed when it has not ended after a minute.

        Raises:
            RunError: that run is not being trained.
        """
        process, grouped = self._find(name)
        if process is None:
            raise RunError(say("trainer.not_training", run=name))
        with self.alone():
            if name in self._ending:
                return
            self._ending.add(name)
            launched = self._launched()
            if launched and launched.run == name:
                with contextlib.suppress(RunError):  # a full disk: it is stopped all the same
                    self._write_record(replace(launched, stopped=True))
        arguments = (name, process, grouped)
        threading.Thread(target=self._end, args=arguments, daemon=True).start()

    def pause(self, name: str) -> None:
        """Ask a run to wait after its step, until it is told to go on.

        Raises:
            RunError: that run is not being trained, or has not begun.
        """
        self._begun(name).ask("pause")

    def go_on(self, name: str) -> None:
        """Let a run that was paused go on.

        Raises:
            RunError: that run is not being trained, or has not begun.
        """
        self._begun(name).withdraw("pause")

    def save_now(self, name: str) -> None:
        """Ask a run to save after its step, and go on.

        Raises:
            RunError: that run is not being trained, or has not begun.
        """
        self._begun(name).ask("save")

    def sample_now(self, name: str) -> None:
        """Ask a run to draw its samples after its step, and go on.

        Raises:
            RunError: that run is not being trained, or has not begun.
        """
        self._begun(name).ask("sample")

    def asked(self, name: str) -> frozenset[Request]:
        """What a run was asked for and has not begun to do: a button's press that is not answered
        yet. A paused run is asked to pause for as long as it waits."""
        run = RunFolder(self.outputs / name)
        return frozenset(one for one in REQUESTS if run.request_file(one).exists())

    def was_stopped(self, name: str) -> bool:
        """Whether the last start of a run was asked to end, on a page."""
        launched = self._launched()
        return bool(launched and launched.run == name and launched.stopped)

    def console_errors(self, name: str) -> list[str]:
        """The `error:` sentences that the last start of a run left on the console."""
        return [
            line.partition("error: ")[2]
            for line in self.console(name).splitlines()
            if line.startswith("error: ")
        ]

    def ending(self, name: str) -> Ending:
        """How the last start of a run ended."""
        code = None
        lines = []
        for line in self.console(name).splitlines():
            if line.startswith(ENDED):
                with contextlib.suppress(ValueError):
                    code = int(line.removeprefix(ENDED))
            elif line.strip():
                lines.append(line)
        return Ending(code, tuple(lines[-LAST_LINES:]))

    def console(self, name: str) -> str:
        """The end of what the last start of a run wrote to the console, as a terminal would show
        it: of a line that was written over, such as a progress bar's, the last state."""
        try:
            with open(self._console_file(name), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_CONSOLE))
                text = file.read().decode("utf-8", "replace")
        except (OSError, ValueError):
            return ""
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))

    def last_launched(self) -> str | None:
        """The run that was started last from a page, even if it never made a run folder."""
        launched = self._launched()
        return launched.run if launched else None

    def has_console(self, name: str) -> bool:
        """Whether a start of that run left console output."""
        return self._console_file(name).is_file()

    def open(self, name: str) -> RunFolder:
        """The folder of a run.

        Raises:
            RunError: there is no such run.
        """
        try:
            return open_run(self.outputs, name)
        except RunError:  # whose sentence tells where on this machine
            raise RunError(say("trainer.no_run", run=name)) from None

    def is_taken(self, name: str) -> bool:
        """Whether a new run cannot have that name."""
        return (
            not NAME_PATTERN.fullmatch(name)
            or name == DATASETS
            or os.path.lexists(self.outputs / name)
            or (self.last_launched() == name and self.current() == name)
        )

    def check_free(self, name: str) -> None:
        """Raise RunError unless a run of that name could be started now."""
        self._refuse_second()
        if self.is_taken(name):
            raise RunError(say("trainer.name_taken", run=name))

    def _refuse_second(self) -> None:
        if current := self.current():
            raise RunError(say("trainer.at_work", run=current))

    def _begun(self, name: str) -> RunFolder:
        """The folder of a run that is at work now."""
        if self._find(name)[0] is None:
            raise RunError(say("trainer.not_training", run=name))
        if self.is_starting(name):
            raise RunError(say("trainer.not_begun", run=name))
        return self.open(name)

    def _launch(self, name: str, arguments: list[str]) -> None:
        for do in self._before_launch:
            do()
        try:
            with open(self._console_file(name), "wb") as console:
                popen = subprocess.Popen(
                    [*self._command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                    start_new_session=os.name != "nt",
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RunError(say("trainer.not_started", reason=reason)) from None
        self._ending.discard(name)
        threading.Thread(target=popen.wait, daemon=True).start()  # no zombie is left
        self._write_record(Launched(name, popen.pid, _started(popen.pid)))

    def _find(self, name: str) -> tuple[psutil.Process | None, bool]:
        """(process, whether it leads a group of its own) of a run that is being trained."""
        launched = self._launched()
        if launched and launched.run == name and (found := launched.process()):
            return found, True
        with contextlib.suppress(RunError, psutil.Error):
            status = open_run(self.outputs, name).read_status()
            if status and status.state in WORKING and status.is_alive():
                return psutil.Process(status.pid), False
        return None, False

    def _end(self, name: str, process: psutil.Process, grouped: bool) -> None:
        """Ask, wait, kill. The launcher is left to end by itself after the trainer that it
        started, so that the trainer never becomes an orphan that nobody waits for."""
        try:
            trainers = process.children() if grouped else [process]
            members = [*trainers, process]
            run = RunFolder(self.outputs / name)
            if trainers and HAS_SIGNALS:
                for trainer in trainers:
                    with contextlib.suppress(psutil.Error):
                        trainer.terminate()
            elif not HAS_SIGNALS and run.config_file.is_file():
                with contextlib.suppress(OSError):  # a full disk: it is killed after a minute
                    run.request_file("stop").touch()
            else:
                _signal_group(process.pid, getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
            until = time.monotonic() + KILL_AFTER_S
            while time.monotonic() < until and any(map(_runs, members)):
                time.sleep(0.2)
            if any(map(_runs, members)):
                if grouped and os.name != "nt":
                    _signal_group(process.pid, signal.SIGKILL)
                for member in members:
                    with contextlib.suppress(psutil.Error):
                        member.kill()
        except psutil.NoSuchProcess:
            pass
        finally:
            self._ending.discard(name)

    def _launched(self) -> Launched | None:
        """The trainer that was started last from a page, by whatever app on this folder."""
        try:
            values = json.loads((self._folder / "trainer.json").read_text(encoding="utf-8"))
            return Launched(
                str(values["run"]),
                int(values["pid"]),
                float(values["process_started"]),
                values.get("stopped") is True,
            )
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError):
            return None

    def _write_record(self, launched: Launched) -> None:
        staged = self._folder / ".tmp-trainer.json"
        try:
            staged.write_text(json.dumps(asdict(launched)), encoding="utf-8")
            os.replace(staged, self._folder / "trainer.json")
        except OSError as error:
            raise _not_written(error) from None

    def _console_file(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def names_like(wish: str) -> Iterator[str]:
    """Run names: `wish` as far as it can be one, then with numbers."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", wish).strip("-._")[:56] or "run"
    yield stem
    for number in itertools.count(2):
        yield f"{stem}-{number}"


def _not_written(error: OSError) -> RunError:
    return RunError(say("trainer.not_written", reason=error.strerror or type(error).__name__))


def _started(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:  # it has ended already
        return 0.0


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            os.kill(leader, number)
        else:
            os.killpg(leader, number)

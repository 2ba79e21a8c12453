"""Start, watch and stop the trainer: the command a user would type, in a process of its own.

What was started is written to <outputs>/.app/trainer.json, so that a restarted app finds it again.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lora_sd.config import Config
from lora_sd.errors import RunError
from lora_sd.run_folder import REQUESTS, WORKING, Request, RunFolder, list_runs, open_run

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--quiet"),
    str(PROJECT / "train_sd_lora.py"),
)
DATASETS = "datasets"  # the folder of data sets beside the runs
KILL_AFTER_S = 60.0
HAS_SIGNALS = os.name != "nt"  # Ctrl-Break reaches only the group that this app has started
MOST_CONSOLE = 64 * 1024  # bytes of console output that are read


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
        """'It was killed by signal 9 (SIGKILL).'; "" where nothing is known."""
        return ""


@dataclass(frozen=True)
class Launched:
    """A trainer that was started: its run, and the process that leads its group."""

    run: str
    pid: int
    process_started: float

    def process(self) -> psutil.Process | None:
        """The process, if it still runs and is the one that was started."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError):
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
        self._lock = threading.Lock()
        self._stopping: set[str] = set()
        self._stopped: set[str] = set()
        self._launched = self._read_record()

    def current(self) -> str | None:
        """The run that is being trained now, by this app, an earlier one or a terminal."""
        if self._launched and self._launched.process():
            return self._launched.run
        for run in list_runs(self.outputs):
            status = run.read_status()
            if status and status.state in WORKING and status.is_alive():
                return run.name
        return None

    def is_starting(self, name: str) -> bool:
        """Whether its process runs, but has not made itself known in the run folder yet."""
        if not (self._launched and self._launched.run == name and self._launched.process()):
            return False
        status = RunFolder(self.outputs / name).read_status()
        return status is None or status.heartbeat < self._launched.process_started

    def is_stopping(self, name: str) -> bool:
        """Whether it was asked to stop and has not ended yet."""
        return name in self._stopping

    def start(self, config: Config) -> str:
        """Start a new run; its name.

        Raises:
            RunError: a trainer is at work already, or the name is taken.
        """
        name = config.output.name
        if not name:
            raise ValueError("the app names its runs")
        with self._lock:
            self.check_free(name)
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"{name}.yaml"
            file.write_text(config.to_yaml(), encoding="utf-8")
            self._launch(name, ["--config", str(file)])
        return name

    def resume(self, name: str) -> str:
        """Go on with a run that stopped, failed or was interrupted; its name.

        Raises:
            RunError: a trainer is at work already, or there is no such run.
        """
        with self._lock:
            self._refuse_second()
            run = open_run(self.outputs, name)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._launch(name, ["--resume", str(run.path)])
        return name

    def stop(self, name: str) -> None:
        """Ask a run to save and end; it is killed when it has not ended after a minute.

        Raises:
            RunError: that run is not being trained.
        """
        process, grouped = self._find(name)
        if process is None:
            raise RunError(f"'{name}' is not being trained now.")
        with self._lock:
            if name in self._stopping:
                return
            self._stopping.add(name)
            self._stopped.add(name)
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

    def _begun(self, name: str) -> RunFolder:
        """The folder of a run that is at work now."""
        if self._find(name)[0] is None:
            raise RunError(f"'{name}' is not being trained now.")
        return open_run(self.outputs, name)

    def was_stopped(self, name: str) -> bool:
        """Whether its end was asked for from this page."""
        return name in self._stopped

    def console_errors(self, name: str) -> list[str]:
        """The `error:` sentences that the last start of a run left on the console."""
        return [
            line.partition("error: ")[2]
            for line in self.console(name).splitlines()
            if line.startswith("error: ")
        ]

    def ending(self, name: str) -> Ending:
        """How the last start of a run ended."""
        return Ending(None, tuple(self.console(name).splitlines()[-20:]))

    def console(self, name: str) -> str:
        """The end of what the last start of a run wrote to the console."""
        try:
            with open(self._console_file(name), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_CONSOLE))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def last_launched(self) -> str | None:
        """The run that was started last from this page, even if it never made a run folder."""
        return self._launched.run if self._launched else None

    def has_console(self, name: str) -> bool:
        """Whether a start of that run left console output."""
        return self._console_file(name).is_file()

    def check_free(self, name: str) -> None:
        """Raise RunError unless a run of that name could be started now."""
        self._refuse_second()
        if name == DATASETS or (self.outputs / name).exists():
            raise RunError(f"There is a run '{name}' already. Choose another name.")

    def free_name(self, wish: str) -> str:
        """A run name that is not taken: `wish`, or with a number."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", wish).strip("-._")[:56] or "run"
        number, name = 1, stem
        while name == DATASETS or (self.outputs / name).exists():
            number += 1
            name = f"{stem}-{number}"
        return name

    def _refuse_second(self) -> None:
        current = self.current()
        if current:
            raise RunError(f"'{current}' is being trained. Stop it first, or wait for its end.")

    def _launch(self, name: str, arguments: list[str]) -> None:
        with open(self._console_file(name), "wb") as console:
            popen = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._stopping.discard(name)
        self._stopped.discard(name)
        self._launched = Launched(name, popen.pid, _started(popen.pid))
        threading.Thread(target=popen.wait, daemon=True).start()  # no zombie is left
        staged = self._folder / ".tmp-trainer.json"
        staged.write_text(json.dumps(asdict(self._launched)), encoding="utf-8")
        os.replace(staged, self._folder / "trainer.json")

    def _find(self, name: str) -> tuple[psutil.Process | None, bool]:
        """(process, whether it leads a group of its own) of a run that is being trained."""
        if self._launched and self._launched.run == name and (found := self._launched.process()):
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
            self._stopping.discard(name)

    def _read_record(self) -> Launched | None:
        try:
            values = json.loads((self._folder / "trainer.json").read_text(encoding="utf-8"))
            return Launched(
                str(values["run"]), int(values["pid"]), float(values["process_started"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _console_file(self, name: str) -> Path:
        return self._folder / f"{name}.log"


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

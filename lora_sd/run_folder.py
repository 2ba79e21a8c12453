"""Where things are inside outputs/<run>/, and how its records are read and appended.

The trainer writes, the app and other programs only read; they share nothing else.

    config.yaml               everything needed to run it again
    status.json               state, step, pid and heartbeat (replaced at once)
    metrics.jsonl             one line a step
    train.log                 what the terminal showed
    changes.json              what was changed when the run went on, where anything was
    stop, pause, save, sample made by somebody who asks that of the run (run_requests.py)
    samples/                  step_000100_00.png ..., settings in the PNG's text;
                              sheet_000100.png, with the base's pictures beside them
    checkpoints/step_000100/  full state, to resume bit for bit
    grid.png                  prompts by scales, at the end
    adapter.safetensors       the result
    best.safetensors          the adapter of the lowest validation loss, where it is kept
"""

import contextlib
import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from lora_sd import durable
from lora_sd.errors import DiskFull, RunError, shown_list

log = logging.getLogger("lora_sd")
State = Literal[
    "starting", "training", "sampling", "saving", "paused", "finished", "stopped", "failed"
]
WORKING: frozenset[str] = frozenset({"starting", "training", "sampling", "saving", "paused"})
Request = Literal["stop", "pause", "save", "sample"]
REQUESTS: tuple[Request, ...] = get_args(Request)
STALE_AFTER_S = 30.0
OLDER_S = 2.0  # a file system may keep time in steps of two seconds
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class Status:
    """The state of a run as its trainer last wrote it.

    `pid` and `process_started` (seconds since the epoch) together name the trainer's process: a
    pid alone may have been given to another program since.
    """

    state: State
    step: int = 0
    steps: int = 0
    message: str = ""
    pid: int = 0
    process_started: float = 0.0
    heartbeat: float = 0.0

    def is_alive(self) -> bool:
        """Whether the trainer's process is running now."""
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.process_started) < 1.0
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.Error, ValueError, OverflowError):
            return False

    def is_interrupted(self) -> bool:
        """Whether it says it is at work, but its process is gone."""
        return self.state in WORKING and not self.is_alive()

    def seconds_silent(self) -> float:
        """Seconds since the last sign of life."""
        return max(0.0, time.time() - self.heartbeat)


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.status_file = self.path / "status.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "train.log"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.grid_file = self.path / "grid.png"
        self.adapter_file = self.path / "adapter.safetensors"
        self.changes_file = self.path / "changes.json"
        self.best_file = self.path / "best.safetensors"
        self.lock_file = self.path / ".lock"

    @property
    def name(self) -> str:
        return self.path.name

    def check_there(self) -> None:
        """Raises RunError when the folder has gone while the run was at work."""
        if not self.path.is_dir():
            raise RunError(
                f"'{self.path}' has gone: it was removed or moved while the run was at work, which "
                f"has stopped. If it is elsewhere now, go on with --resume from there."
            )

    def sample_file(self, step: int, index: int) -> Path:
        """samples/step_000100_00.png"""
        return self.samples / f"step_{step:06d}_{index:02d}.png"

    def checkpoint(self, step: int) -> Path:
        """checkpoints/step_000100"""
        return self.checkpoints / f"step_{step:06d}"

    def request_file(self, request: Request) -> Path:
        """The file whose being there asks the run for something."""
        return self.path / request

    def is_asked(self, request: Request, since: float) -> bool:
        """Whether the run is asked for something now. A file from before `since` (seconds since the
        epoch) was meant for the run as it was at work then: it is removed."""
        file = self.request_file(request)
        try:
            if file.stat().st_mtime >= since - OLDER_S:
                return True
            log.warning("Note: '%s' was left from before, and is removed.", file)
            file.unlink()
        except OSError:  # there is none, mostly
            pass
        return False

    def ask(self, request: Request) -> None:
        """Ask the run for something. A pause lasts until it is withdrawn; anything else is done
        once.

        Raises:
            RunError: the file cannot be made.
        """
        try:
            self.request_file(request).touch()
        except OSError as error:
            raise RunError(f"'{self.name}' cannot be written to: {error.strerror}.") from None

    def withdraw(self, request: Request) -> None:
        """Ask no longer.

        Raises:
            RunError: the file cannot be removed.
        """
        try:
            self.request_file(request).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"'{self.name}' cannot be written to: {error.strerror}.") from None

    def write_status(self, status: Status) -> None:
        """Replace status.json at once; the writer's pid and the time are filled in.

        Not fsynced, since it is written about every second and worth nothing after a power loss.
        """
        status.pid = os.getpid()
        status.process_started = psutil.Process().create_time()
        status.heartbeat = time.time()
        staged = self.status_file.with_name(f".tmp-status-{status.pid}.json")
        staged.write_text(json.dumps(asdict(status)), encoding="utf-8")
        os.replace(staged, self.status_file)

    def read_status(self) -> Status | None:
        """The last status, or None when there is none that can be understood."""
        try:
            values = json.loads(self.status_file.read_text(encoding="utf-8"))
            known = {field.name for field in fields(Status)}
            status = Status(**{key: value for key, value in values.items() if key in known})
            if status.state not in get_args(State):
                return None
            return Status(
                status.state,
                int(status.step),
                int(status.steps),
                str(status.message),
                int(status.pid),
                float(status.process_started),
                float(status.heartbeat),
            )
        except (OSError, ValueError, OverflowError, TypeError, AttributeError):
            return None

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl: a whole one, or none.

        Raises:
            OSError: it cannot be written.
        """
        with open(self.metrics_file, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            line = (json.dumps(values) + "\n").encode()
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line that is still being written is left out."""
        try:
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return [record for line in text.splitlines() if (record := _record(line)) is not None]

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again."""
        kept = [record for record in self.read_metrics() if _step(record) <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        with contextlib.suppress(OSError):
            if self.metrics_file.read_bytes() == lines.encode():
                return
        durable.write_text(self.metrics_file, lines)

    def sample_files(self) -> list[Path]:
        """The sample pictures, oldest step first."""
        return sorted(self.samples.glob("step_*.png"))

    def adapter_files(self) -> list[Path]:
        """Adapters that can be used now: the result, then the checkpoints', newest first."""
        saved = sorted(self.checkpoints.glob("step_*/adapter.safetensors"), reverse=True)
        return ([self.adapter_file] if self.adapter_file.is_file() else []) + saved


def create_run(root: Path, name: str | None, default_name: str, config_yaml: str) -> RunFolder:
    """Make a new run folder with its config.yaml; an existing run is never written over.

    Args:
        root: the folder of all runs.
        name: the name asked for; when it is taken, that is an error.
        default_name: the name otherwise; a number is added when it is taken.
        config_yaml: text of config.yaml.

    Raises:
        DiskFull: there is no room for it.
        RunError: the name is taken, or the folder cannot be made.
    """

    def fill(folder: Path) -> None:
        run = RunFolder(folder)
        run.samples.mkdir()
        run.checkpoints.mkdir()
        run.config_file.write_bytes(config_yaml.encode())

    candidates: Iterator[str]
    if name:
        candidates = iter([name])
    else:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", default_name).strip("-._")[:56] or "run"
        candidates = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 100_000))
    for candidate in candidates:
        run = RunFolder(root / candidate)
        try:
            if os.path.lexists(run.path):
                continue
            durable.write_folder(run.path, fill)
        except (OSError, ValueError) as error:
            taken = isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY)
            if taken and os.path.lexists(run.path):  # by another, a moment ago
                continue
            kind = DiskFull if durable.is_full(error) else RunError
            reason = getattr(error, "strerror", None) or error
            raise kind(f"'{run.path}' cannot be made: {reason}.") from None
        return run
    raise RunError(
        f"'{root / (name or default_name)}' exists already. Go on with it with --resume "
        f"'{root / (name or default_name)}', or choose another --output.name."
    )


def list_runs(root: Path) -> list[RunFolder]:
    """All runs below a folder, the one last written to first."""
    runs = [RunFolder(path.parent) for path in Path(root).glob("*/config.yaml")]

    def last_written(run: RunFolder) -> float:
        file = run.status_file if run.status_file.is_file() else run.config_file
        return file.stat().st_mtime

    return sorted(runs, key=last_written, reverse=True)


def open_run(root: Path, name: str) -> RunFolder:
    """The run of that name below a folder; a path is not accepted as a name.

    Raises:
        RunError: the name is not a run's name, or there is no such run.
    """
    if not NAME_PATTERN.fullmatch(name) or not (root / name / "config.yaml").is_file():
        raise RunError(f"There is no run '{name}' in '{root}'.")
    return RunFolder(root / name)


def run_to_resume(path: Path) -> RunFolder:
    """The run that a path names, which is to go on.

    Raises:
        RunError: there is none, or it is something else, with what is wanted instead.
    """
    run, wanted = RunFolder(path), "--resume wants the folder of a run"
    try:
        if path.is_dir() and run.config_file.is_file():
            return run
        if not os.path.lexists(path):
            near = [str(one.path) for one in list_runs(path.parent)]
            there = f" That folder holds the runs {shown_list(near)}." if near else ""
            raise RunError(f"There is no run '{path}'.{there}")
        if path.is_file() and path.suffix == ".safetensors":
            raise RunError(
                f"'{path}' is an adapter, and {wanted}. --like takes an adapter: it starts a new "
                f"run with its settings."
            )
        if not path.is_dir():
            raise RunError(f"'{path}' is a file, and {wanted}.")
        for above in list(path.resolve().parents)[:2]:
            if RunFolder(above).config_file.is_file():
                raise RunError(
                    f"'{path}' is a part of the run '{above}': give that to --resume. It goes on "
                    f"from its newest whole checkpoint."
                )
        if inside := [str(one.path) for one in list_runs(path)]:
            raise RunError(f"'{path}' holds runs: give one of {shown_list(inside)} to --resume.")
    except OSError as error:
        raise RunError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    raise RunError(f"'{path}' holds no config.yaml, and {wanted}.")


def _step(record: dict[str, Any]) -> float:
    """The step of a line; a line without one sorts behind every step."""
    step = record.get("step")
    return step if isinstance(step, int) else float("inf")


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None

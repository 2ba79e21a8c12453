"""What metrics.jsonl tells of a run, kept short however long the run is, and read on from where it
was read before."""

import json
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_POINTS = 400  # even
RECENT_STEPS = 50  # over which speed is measured
MOST_GROUPS = 6  # learning rates that are told apart
MOST_READERS = 256
MOST_READ = 16 * 1024**2  # bytes at once; the rest comes with the next look
GAUGE = ("update_linear", "update_conv", "update_text_encoder")

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Validated:
    """Validation losses by step, and the base's."""

    losses: Points = ()
    base: float | None = None
    gain: float | None = None
    gain_error: float | None = None


@dataclass(frozen=True)
class Gauged:
    """How large the adapter's update is beside the weights it adapts, at the last look."""

    step: int
    kinds: Mapping[str, float]
    blocks: Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """How a run went so far.

    Attributes:
        step: the last step told.
        loss: at most MOST_POINTS means over `steps_a_point` steps.
        rates: learning rates by group; one alone is called 'lr'.
        recent_loss: its mean over the last RECENT_STEPS.
        step_s: seconds a step of late.
    """

    step: int = 0
    loss: Points = ()
    steps_a_point: int = 1
    rates: Mapping[str, Points] = field(default_factory=dict)
    validated: Validated = Validated()
    gauged: Gauged | None = None
    recent_loss: float | None = None
    images_per_s: float | None = None
    step_s: float | None = None


def read_course(file: Path) -> Course:
    """The course that a metrics.jsonl tells; only what is new in it is read."""
    with _lock:
        reader = _readers.pop(file, None) or _Reader(file)
        _readers[file] = reader
        while len(_readers) > MOST_READERS:
            _readers.popitem(last=False)
    return reader.read()


class _Reader:
    """Reads one file on; from the start when it was cut or replaced."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._end, self._last_line = 0, b""
        self._course = Course()
        self._loss = _Thinned(MOST_POINTS)
        self._rates: dict[str, _Thinned] = {}
        self._validated = _Thinned(MOST_POINTS)
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self._more: dict[str, Any] = {}
        self._gauged: Gauged | None = None

    def read(self) -> Course:
        with self._lock:
            try:
                lines = self._new_lines()
            except OSError:
                self._forget()
                return self._course
            for line in lines:
                self._take(line)
            if lines:
                self._course = self._told()
            return self._course

    def _new_lines(self) -> list[bytes]:
        with open(self._file, "rb") as file:
            # A run that goes on drops the steps after its checkpoint, and writes them again.
            file.seek(self._end - len(self._last_line))
            if file.read(len(self._last_line)) != self._last_line:
                self._forget()
                file.seek(0)
            text = file.read(MOST_READ)
        whole = text[: text.rfind(b"\n") + 1]  # a last line may still be being written
        lines = whole.splitlines(keepends=True)
        if lines:
            self._end, self._last_line = self._end + len(whole), lines[-1]
        return lines

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict) or not _is_number(record.get("step")):
            return
        step = int(record["step"])
        if _is_number(record.get("loss")):
            self._loss.add(step, record["loss"])
            self._recent.append(record)
        rates = record.get("rates")
        rates = rates if isinstance(rates, dict) else {"lr": record.get("lr")}
        for name, rate in list(rates.items())[:MOST_GROUPS]:
            if _is_number(rate):
                self._rates.setdefault(name, _Thinned(MOST_POINTS)).add(step, rate)
        if _is_number(record.get("validation_loss")):
            self._validated.add(step, record["validation_loss"])
            self._more = record
        kinds = {name: record[name] for name in GAUGE if _is_number(record.get(name))}
        if kinds:
            blocks = record.get("update_blocks")
            found = blocks.items() if isinstance(blocks, dict) else ()
            self._gauged = Gauged(step, kinds, {k: v for k, v in found if _is_number(v)})

    def _told(self) -> Course:
        recent = list(self._recent)
        losses = [record["loss"] for record in recent]
        speeds = sorted(r["images_per_s"] for r in recent if _is_number(r.get("images_per_s")))
        return Course(
            step=int(recent[-1]["step"]) if recent else 0,
            loss=self._loss.points(),
            steps_a_point=self._loss.every,
            rates={name: one.points() for name, one in self._rates.items()},
            validated=Validated(
                self._validated.points(),
                *(
                    value if _is_number(value := self._more.get(f"validation_{name}")) else None
                    for name in ("base", "gain", "gain_error")
                ),
            ),
            gauged=self._gauged,
            recent_loss=sum(losses) / len(losses) if losses else None,
            images_per_s=speeds[len(speeds) // 2] if speeds else None,
            step_s=_seconds_a_step(recent),
        )


class _Thinned:
    """Any number of points, of which at most `most` are kept: neighbours are averaged."""

    def __init__(self, most: int) -> None:
        self._most, self.every = most, 1
        self._points: list[tuple[int, float]] = []
        self._sum, self._count, self._step = 0.0, 0, 0

    def add(self, step: int, value: float) -> None:
        self._sum, self._count, self._step = self._sum + value, self._count + 1, step
        if self._count == self.every:
            self._points.append((step, self._sum / self._count))
            self._sum, self._count = 0.0, 0
        if len(self._points) == self._most:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
            self.every *= 2

    def points(self) -> list[tuple[int, float]]:
        """What is kept, and the mean of what came since."""
        rest = [(self._step, self._sum / self._count)] if self._count else []
        return self._points + rest


def _seconds_a_step(recent: Sequence[dict[str, Any]]) -> float | None:
    times: list[tuple[int, float]] = []
    for record in recent:
        if _is_number(record.get("seconds")):
            now = int(record["step"]), float(record["seconds"])
            if times and (now[0] <= times[-1][0] or now[1] < times[-1][1]):
                times = []  # the run went on: its clock began anew
            times.append(now)
    if len(times) < 2:
        return None
    return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_lock = threading.Lock()
_readers: OrderedDict[Path, _Reader] = OrderedDict()
